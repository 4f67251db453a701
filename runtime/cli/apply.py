"""`itmc apply`: load a file's policies, in one transaction."""

import click

from runtime.apply import Applied, apply
from runtime.cli.files import compiled, file_argument
from runtime.cli.output import warn


@click.command()
@file_argument
@click.option("--dry-run", is_flag=True, help="Ask the kernel whether it would take it; no change.")
def command(file: str | None, dry_run: bool) -> None:
    """Load the policies of FILE into the kernel of this network namespace.

    All of it or nothing. Applying a file again replaces what it brought; flows keep
    their counts and classes their counters, unless a flow's key or threshold changed,
    or policies began or ceased to share a learned set.
    """
    report(apply(compiled(file), check=dry_run), "would load" if dry_run else "loaded")


def report(done: Applied, verb: str) -> None:
    """Say what was done."""
    click.echo(f"{verb} {', '.join(done.loaded)}")
    if done.removed:
        click.echo(f"removed {', '.join(done.removed)} (no longer in the file)")
    if done.off:
        click.echo(f"off, as before: {', '.join(done.off)} (`itmc enable` switches on)")
    if done.absent:
        warn(
            f"there is no device {', '.join(done.absent)} here yet",
            "what stands at it begins when it comes up",
        )
    if done.lost:
        warn(
            f"these flow tables start again from zero: {', '.join(done.lost)}",
            "a key or a threshold changed, the flow is gone, or policies began or ceased to "
            "share a learned set (then class counters start again, too)",
        )
