"""`itmc apply`: load a file's policies, in one transaction."""

import click

from runtime.apply import Applied, apply
from runtime.cli.files import file_argument, optimise_option, unit
from runtime.cli.output import warn
from runtime.cli.span import seconds
from runtime.errors import UsageError
from runtime.store import load
from runtime.warden import wait


@click.command()
@file_argument
@click.option("--dry-run", is_flag=True, help="Ask the kernel whether it would take it; no change.")
@click.option("--force", is_flag=True, help="Put qdiscs aside that somebody else has set at links.")
@click.option("--digest", metavar="D", help="Only if the plan is still the one with this digest.")
@click.option(
    "--confirm",
    metavar="TIME",
    help="Roll back after this time (60s, 5m) unless `itmc confirm` comes.",
)
@click.option("--wait", "waiting", is_flag=True, help="With --confirm: wait for either.")
@optimise_option
def command(
    file: str | None,
    dry_run: bool,
    force: bool,
    digest: str | None,
    confirm: str | None,
    waiting: bool,
    optimise: bool,
) -> None:
    """Load the policies of FILE into the kernel of this network namespace.

    All of it or nothing. Applying a file again replaces what it brought; flows keep
    their counts and classes their counters. `itmc plan` shows before what would change.
    """
    # An empty one (a variable that is not set) must not mean: without it.
    time = 0.0 if confirm is None else seconds(confirm)
    if digest is not None and not digest.strip():
        raise UsageError("--digest needs a digest", "`itmc plan` shows it")
    if waiting and not confirm:
        raise UsageError("--wait goes with --confirm", "as in `itmc apply --confirm 60s --wait`")
    if dry_run and confirm:
        raise UsageError("--dry-run changes nothing: there is nothing to confirm")
    known = load()
    done = apply(
        unit(file, known, optimise),
        known=known,
        check=dry_run,
        digest=digest or "",
        confirm=time,
        force=force,
    )
    report(done, "would load" if dry_run else "loaded")
    if not confirm:
        return
    if not done.generation:
        click.echo("nothing changed: there is nothing to confirm")
        return
    click.echo(f"`itmc confirm` within {confirm} keeps it, else it is rolled back")
    if waiting:
        wait(done.generation)
        click.echo("confirmed")


def report(done: Applied, verb: str) -> None:
    """Say what was done."""
    unchanged = ": as it was" if done.plan.empty else ""
    click.echo(f"{verb} {', '.join([*done.loaded, *done.links])}{unchanged}")
    if done.removed:
        click.echo(f"removed {', '.join(done.removed)} (no longer in the file)")
    if done.off:
        click.echo(f"off, as before: {', '.join(done.off)} (`itmc enable` switches on)")
    tell(done)


def tell(done: Applied) -> None:
    """Say what the user must know beside what was done."""
    if done.absent:
        warn(
            f"there is no device {', '.join(done.absent)} here yet",
            "what stands at it begins when it comes up",
        )
    for change in done.plan.lost:
        warn(change.loss)
    for text in done.told:
        warn(text)
