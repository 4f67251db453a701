"""`itmc disable`: switch policies and links off, without losing what they learned."""

import click

from runtime.cli.enable import report


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def command(names: tuple[str, ...]) -> None:
    """Take policies off their hooks, links off their interfaces; what was learned stays.

    Flows, counters and learned sets are kept; applying the file leaves them off. An interface
    without its link sends as it did before; packets that wait in the link are lost.
    """
    report(names, on=False)
