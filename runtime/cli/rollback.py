"""`itmc rollback`: go back to an earlier generation."""

import time

import click

from runtime.apply import rollback
from runtime.cli.output import as_json, table, warn
from runtime.errors import UsageError
from runtime.store import Store, directory


@click.command()
@click.option("--to", "number", type=click.IntRange(min=1), help="To this generation.")
@click.option("--list", "listed", is_flag=True, help="Show the generations that are kept.")
@click.option("--json", "in_json", is_flag=True, help="With --list: as JSON.")
def command(number: int | None, listed: bool, in_json: bool) -> None:
    """Go back to the generation before this one, with what its sets had learned.

    Each change makes a generation; the last ten are kept.
    """
    if listed:
        _list(in_json)
        return
    if in_json:
        raise UsageError("--json goes with --list")
    made, plan = rollback(number or 0, warn)
    if made is None:
        click.echo("back to the time before anything was loaded")
    else:
        click.echo(f"back to generation {made.number}: {made.why}, {_when(made.when)}, {made.who}")
    for change in plan.lost:
        warn(change.loss)


def _list(in_json: bool) -> None:
    store = Store(directory())
    found = store.generations()
    if in_json:
        shown = [{**vars(one), "current": one.number == store.state.generation} for one in found]
        as_json({"schema": 1, "generations": shown})
        return
    if not found:
        click.echo("no generation is kept")
        return
    rows = [
        (
            f"{one.number}{' *' if one.number == store.state.generation else ''}",
            _when(one.when), one.who, one.why, one.digest, one.parent or "-",
        )
        for one in found
    ]  # fmt: skip
    table(("generation", "when", "who", "by", "digest", "came after"), rows)


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
