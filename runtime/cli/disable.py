"""`itmc disable`: switch policies off, without losing what they learned."""

import click

from runtime.cli.enable import report


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def command(names: tuple[str, ...]) -> None:
    """Take policies off their hooks; what they learned stays.

    Flows, counters and learned sets are kept; applying the file leaves them off.
    """
    report(names, on=False)
