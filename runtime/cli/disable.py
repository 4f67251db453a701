"""`itmc disable`: switch policies off, without losing what they learned."""

import click

from runtime.apply import switch


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def command(names: tuple[str, ...]) -> None:
    """Take policies off their hooks; what they learned stays.

    Flows, counters and learned sets are kept; applying the file keeps it as it is.
    """
    changed = switch(names, on=False)
    for name in dict.fromkeys(names):
        click.echo(f"{name}: {'off now' if name in changed else 'off already'}")
