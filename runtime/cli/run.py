"""`itmc run`: apply, serve in the foreground, remove on Ctrl-C (the paper's `libitm_run`)."""

import signal

import click

from runtime.apply import apply, remove
from runtime.cli.apply import report
from runtime.cli.files import file_argument, unit
from runtime.status import loaded
from runtime.store import load


@click.command()
@file_argument
def command(file: str | None) -> None:
    """Apply FILE, stay in the foreground, and remove its policies on Ctrl-C.

    Policies of FILE that were loaded before are replaced, and removed, too.
    Also on SIGTERM and SIGHUP: when the terminal goes, so do the policies.
    """
    ends = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    result = unit(file, load())
    # Blocked before anything is loaded: a signal then waits for `sigwait`, and
    # nothing can come between loading and removing.
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    done = apply(result, boot=False)
    try:
        report(done, "loaded")
        click.echo("running; Ctrl-C removes it")
        signal.sigwait(ends)
    finally:
        # Some may have been removed by somebody else meanwhile.
        left = {policy.name for policy in loaded()}
        gone = [name for name in done.loaded if name in left]
        if gone:
            remove(gone)
    click.echo(f"\nremoved {', '.join(gone)}" if gone else "\nnothing was left to remove")
