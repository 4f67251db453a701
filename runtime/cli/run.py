"""`itmc run`: apply, serve in the foreground, remove on Ctrl-C (the paper's `libitm_run`)."""

import signal

import click

from runtime.apply import apply, remove
from runtime.cli.apply import report
from runtime.cli.files import compiled, file_argument


@click.command()
@file_argument
def command(file: str | None) -> None:
    """Apply FILE, stay in the foreground, and remove its policies on Ctrl-C.

    Policies of FILE that were loaded before are replaced, and removed, too.
    Also on SIGTERM and SIGHUP: when the terminal goes, so do the policies.
    """
    ends = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    result = compiled(file)
    # Blocked before anything is loaded: a signal then waits for `sigwait`, and
    # nothing can come between loading and removing.
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    done = apply(result)
    try:
        report(done, "loaded")
        click.echo("running; Ctrl-C removes it")
        signal.sigwait(ends)
    finally:
        remove(done.loaded)
    click.echo(f"\nremoved {', '.join(done.loaded)}")
