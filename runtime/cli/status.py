"""`itmc status`: what runs, and what it counted."""

from dataclasses import asdict

import click

from runtime.apply import PolicyStatus, status
from runtime.cli.output import as_json, table

# Of a table's size, where a warning begins.
_NEARLY_FULL = 0.9


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--json", "in_json", is_flag=True, help="As JSON.")
def command(names: tuple[str, ...], in_json: bool) -> None:
    """Show the loaded policies (or those named): classes, flows, drift."""
    policies = status(names)
    if in_json:
        as_json({"schema": 1, "policies": [_json(p) for p in policies]})
        return
    if not policies:
        click.echo("no policy is loaded")
    for policy in policies:
        _show(policy)


def _json(policy: PolicyStatus) -> dict[str, object]:
    hooks = [{"hook": hook, "nft_priority": priority} for hook, priority in policy.hooks]
    return {**asdict(policy), "hooks": hooks}


def _show(policy: PolicyStatus) -> None:
    hooks = ", ".join(hook for hook, _ in policy.hooks)
    parts = [policy.state, f"at {hooks}" if hooks else "at no hook", f"priority {policy.priority}"]
    parts += [f"from {policy.file}"] if policy.file else []
    click.echo(f"{policy.name}: {', '.join(parts)}")
    if policy.state == "missing":
        click.echo("  its table is gone from the kernel: `itmc apply` brings it back")
    elif policy.state == "unknown":
        click.echo("  a table of ours that no record knows: apply its file, or remove it")
    elif policy.drift:
        click.echo("  its rules were changed by something else: `itmc apply` puts them right")
    if policy.classes:
        table(("class", "packets", "bytes"), [(c.name, c.packets, c.bytes) for c in policy.classes])
    if policy.noted:
        table(("log", "packets", "bytes"), [(n.name, n.packets, n.bytes) for n in policy.noted])
    if policy.flows:
        rows = [
            (f.name, ", ".join(f.key), f.entries, f.size,
             "-" if f.uncounted is None else f.uncounted)
            for f in policy.flows
        ]  # fmt: skip
        table(("flow", "by", "entries", "max", "packets without room"), rows)
    if policy.learned:
        sets = [(f"@{s.name}", s.entries, s.size, s.unlearned) for s in policy.learned]
        table(("learned set", "entries", "max", "additions without room"), sets)
    for flow in policy.flows:
        _warn_of_full(f"the flow `{flow.name}`", flow.entries, flow.size, flow.uncounted or 0)
    for one in policy.learned:
        _warn_of_full(f"the set `@{one.name}`", one.entries, one.size, one.unlearned)
    click.echo()


def _warn_of_full(what: str, entries: int, size: int, lost: int) -> None:
    if lost:
        click.echo(f"  {what} was full: {lost} packets found no room; give it a larger `max`")
    elif entries >= size * _NEARLY_FULL:
        click.echo(f"  {what} is nearly full: {entries} of {size}; give it a larger `max`")
