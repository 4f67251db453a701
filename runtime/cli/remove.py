"""`itmc remove`: take policies and links away."""

import click

from runtime.apply import remove
from runtime.cli.output import warn
from runtime.errors import UsageError


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option(
    "--all", "everything", is_flag=True, help="All policies and links, and all tables named itm_*."
)
def command(names: tuple[str, ...], everything: bool) -> None:
    """Remove the named policies, rules and learned state, in one transaction, and links.

    What a link has put aside at its interface comes back.
    """
    if bool(names) == everything:
        raise UsageError("name the policies or links to remove, or say --all")
    gone = remove(names, warn)
    click.echo(f"removed {', '.join(gone)}" if gone else "no policy is loaded")
