"""`itmc list`: what is loaded, in the order it runs."""

import click

from itmlang.fields import EGRESS, HOOKS, INGRESS, hook_kind
from runtime.cli.output import as_json, table
from runtime.cli.status import as_pending, tell_pending
from runtime.cli.words import interfaces, rate
from runtime.status import links_of, loaded
from runtime.store import load


@click.command()
@click.option("--json", "in_json", is_flag=True, help="As JSON.")
def command(in_json: bool) -> None:
    """Show which policies are loaded, hook by hook, in the order they run, and the links."""
    state = load()
    policies, links = loaded(state), links_of(state)
    rows = [
        {
            "hook": hook, "policy": p.name, "state": p.state,
            "priority": p.priority, "nft_priority": at[hook], "file": p.file,
        }
        for hook in sorted({hook for p in policies for hook, _ in p.hooks}, key=_order)
        for p in policies
        if hook in (at := dict(p.hooks))
    ]  # fmt: skip
    if in_json:
        as_json(
            {
                "schema": 1,
                "pending": as_pending(),
                "policies": rows,
                "links": [
                    {
                        "name": one.name, "state": one.state, "interface": one.interface,
                        "ingress": one.ingress, "interfaces": one.interfaces, "rate": one.rate,
                        "file_rate": one.file_rate, "file": one.file,
                    }
                    for one in links
                ],
            }
        )  # fmt: skip
        return
    tell_pending()
    if not rows and not links:
        click.echo("no policy is loaded")
    if rows:
        table(("hook", "policy", "state", "priority", "file"),
              [(r["hook"], r["policy"], r["state"], r["priority"], r["file"]) for r in rows])  # fmt: skip
    if rows and links:
        click.echo()
    if links:
        table(("link", "interface", "rate", "state", "file"),
              [(one.name, interfaces(one), rate(one), one.state, one.file) for one in links])  # fmt: skip


def _order(hook: str) -> tuple[int, str]:
    """In the order in which a packet meets the hooks."""
    return (INGRESS, *HOOKS, EGRESS).index(hook_kind(hook)), hook
