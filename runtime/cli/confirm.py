"""`itmc confirm`: keep what `apply --confirm` loaded."""

import click

from runtime.apply import confirm
from runtime.cli.output import warn


@click.command()
def command() -> None:
    """Keep the change that waits to be confirmed.

    Exit code 5 if that comes too late: it was rolled back.
    """
    generation, unkept = confirm()
    click.echo(f"confirmed: generation {generation} stays")
    if unkept:
        warn(f"it would not survive a reboot: {unkept}")
