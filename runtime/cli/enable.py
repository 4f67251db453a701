"""`itmc enable`: switch policies on, without losing what they learned."""

import click

from runtime.apply import switch


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def command(names: tuple[str, ...]) -> None:
    """Hang policies that are off into their hooks again.

    Flows, counters and learned sets are kept; applying the file keeps it as it is.
    """
    changed = switch(names, on=True)
    for name in dict.fromkeys(names):
        click.echo(f"{name}: {'on now' if name in changed else 'on already'}")
