"""`itmc boot`: load the last confirmed generation, as the service does at boot."""

import click

from runtime.apply import restore


@click.command()
def command() -> None:
    """Load the policies that were confirmed last in this network namespace.

    They are loaded from what was kept of them, not from their files.
    """
    done = restore()
    if done is None:
        click.echo("no policies were kept for this network namespace: nothing to load")
        return
    made, plan = done
    names = ", ".join(plan.state.names) or "nothing"
    click.echo(
        f"generation {made.number} ({made.why}): {names}{' as it was' if plan.empty else ''}"
    )
