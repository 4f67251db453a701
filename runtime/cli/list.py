"""`itmc list`: what is loaded, in the order it runs."""

import click

from itmlang.fields import EGRESS, HOOKS, INGRESS, hook_kind
from runtime.cli.output import as_json, table
from runtime.cli.status import as_pending, tell_pending
from runtime.status import loaded


@click.command()
@click.option("--json", "in_json", is_flag=True, help="As JSON.")
def command(in_json: bool) -> None:
    """Show which policies are loaded, hook by hook, in the order they run."""
    policies = loaded()
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
        as_json({"schema": 1, "pending": as_pending(), "policies": rows})
        return
    tell_pending()
    if not rows:
        click.echo("no policy is loaded")
    else:
        table(("hook", "policy", "state", "priority", "file"),
              [(r["hook"], r["policy"], r["state"], r["priority"], r["file"]) for r in rows])  # fmt: skip


def _order(hook: str) -> tuple[int, str]:
    """In the order in which a packet meets the hooks."""
    return (INGRESS, *HOOKS, EGRESS).index(hook_kind(hook)), hook
