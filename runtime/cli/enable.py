"""`itmc enable`: switch policies and links on again, with all that they learned."""

from collections.abc import Sequence

import click

from runtime.apply import switch
from runtime.cli.output import warn


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def command(names: tuple[str, ...]) -> None:
    """Hang policies that are off into their hooks again, put links to their interfaces.

    Flows, counters and learned sets are as they were left. A link begins to count anew.
    """
    report(names, on=True)


def report(names: Sequence[str], *, on: bool) -> None:
    """Switch policies and say which changed."""
    changed, state = switch(names, on=on, tell=warn), "on" if on else "off"
    for name in dict.fromkeys(names):
        click.echo(f"{name}: {state} {'now' if name in changed else 'already'}")
