"""`itmc flows`: the flows that a policy has learned, largest first."""

import click

from runtime.cli.output import as_json, table
from runtime.status import flows


@click.command()
@click.argument("name")
@click.option("--top", type=click.IntRange(min=1), default=None, help="Only so many of them.")
@click.option("--json", "in_json", is_flag=True, help="As JSON.")
def command(name: str, top: int | None, in_json: bool) -> None:
    """Show the flows of policy NAME, those with the most bytes first."""
    found = flows(name)
    shown = found[:top]
    if in_json:
        rows = [{**vars(one), "key": list(one.key), "expires_ms": one.expires} for one in shown]
        for row in rows:
            del row["expires"]
        as_json({"schema": 1, "policy": name, "total": len(found), "flows": rows})
        return
    if not found:
        click.echo("no flow is known")
        return
    table(
        ("flow", "key", "packets", "bytes", "forgotten in"),
        [
            (f.flow, " ".join(str(k) for k in f.key), f"{f.packets:,}", f"{f.bytes:,}",
             "never" if f.expires is None else f"{f.expires / 1000:.0f} s")
            for f in shown
        ],
    )  # fmt: skip
    if len(shown) < len(found):
        click.echo(f"{len(shown)} of {len(found)} flows")
