"""`itmc run`: apply, serve in the foreground, remove on Ctrl-C (the paper's `libitm_run`)."""

import signal
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import click

from runtime.apply import apply, remove
from runtime.cli.apply import report
from runtime.cli.files import file_argument, unit
from runtime.store import directory, load

_LOOK = 0.5  # seconds between two looks at the runtime's log


@click.command()
@file_argument
def command(file: str | None) -> None:
    """Apply FILE, stay in the foreground, and remove its policies on Ctrl-C.

    Policies of FILE that were loaded before are replaced, and removed, too.
    Also on SIGTERM and SIGHUP: when the terminal goes, so do the policies. What goes wrong
    with their handlers meanwhile is said on stderr.
    """
    ends = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    result = unit(file, load())
    # Blocked before anything is loaded: a signal then waits for `sigwait`, and
    # nothing can come between loading and removing.
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    log = _Log(directory() / "runtime.log")
    done = apply(result, boot=False)
    try:
        report(done, "loaded")
        click.echo("running; Ctrl-C removes it")
        while signal.sigtimedwait(ends, _LOOK) is None:
            log.tell(done.loaded)
    finally:
        # Some may have been removed by somebody else meanwhile.
        state = load()
        left = {*state.names, *(link.name for link in state.links)}
        gone = [name for name in [*done.loaded, *done.links] if name in left]
        if gone:
            remove(gone)
    click.echo(f"\nremoved {', '.join(gone)}" if gone else "\nnothing was left to remove")


class _Log:
    """The runtime's log, from its end on."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, path.stat().st_size if path.exists() else 0

    def tell(self, policies: Collection[str]) -> None:
        """Say on stderr what is new in it about some policies."""
        with suppress(OSError), open(self._path, "rb") as file:
            if file.seek(0, 2) < self._at:  # it was full, and is a new one
                self._at = 0
            file.seek(self._at)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._at += len(line)
                _, _, told = line.decode(errors="replace").rstrip().split(" ", 2)
                if told.split(" ", 1)[0] in policies:
                    click.echo(told, err=True)
