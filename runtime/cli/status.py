"""`itmc status`: what runs, and what it counted."""

from dataclasses import asdict

import click

from runtime.cli.output import as_json, table
from runtime.status import PolicyStatus, PythonStatus, Waiting, pending, status

# Of a table's size, where a warning begins.
_NEARLY_FULL = 0.9
_MOST_TOLD = 5


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--json", "in_json", is_flag=True, help="As JSON.")
def command(names: tuple[str, ...], in_json: bool) -> None:
    """Show the loaded policies (or those named): classes, flows, drift."""
    policies = status(names)
    if in_json:
        as_json({"schema": 1, "pending": as_pending(), "policies": [_json(p) for p in policies]})
        return
    tell_pending()
    if not policies:
        click.echo("no policy is loaded")
    for policy in policies:
        _show(policy)


def as_pending() -> dict[str, object] | None:
    """What waits to be confirmed, for JSON."""
    found = pending()
    return None if found is None else asdict(found)


def tell_pending() -> None:
    """Say what waits to be confirmed."""
    found = pending()
    if found is not None:
        click.echo(_told(found))


def _told(waiting: Waiting) -> str:
    back = f"generation {waiting.back}" if waiting.back else "nothing loaded"
    if waiting.overdue:
        return (
            f"generation {waiting.generation} was not confirmed in time: `itmc rollback`, or the "
            f"next change, goes back to {back}"
        )
    return (
        f"generation {waiting.generation} waits for `itmc confirm`: {waiting.seconds:.0f} s left, "
        f"then back to {back}"
    )


def _json(policy: PolicyStatus) -> dict[str, object]:
    hooks = [{"hook": hook, "nft_priority": priority} for hook, priority in policy.hooks]
    return {**asdict(policy), "hooks": hooks}


def _show(policy: PolicyStatus) -> None:
    hooks = ", ".join(hook for hook, _ in policy.hooks)
    parts = [policy.state, f"at {hooks}" if hooks else "at no hook", f"priority {policy.priority}"]
    parts += [f"from {policy.file}"] if policy.file else []
    click.echo(f"{policy.name}: {', '.join(parts)}")
    if policy.parameters:
        told = ", ".join(f"{name} = {value}" for name, value in policy.parameters.items())
        click.echo(f"  with {told}")
    if policy.state == "missing":
        click.echo("  its table is gone from the kernel: `itmc apply` brings it back")
    elif policy.state == "unknown":
        click.echo("  a table of ours that no record knows: apply its file, or remove it")
    elif policy.drift:
        click.echo(
            f"  changed by something else: {'; '.join(policy.changed[:_MOST_TOLD])}"
            + ("; …" if len(policy.changed) > _MOST_TOLD else "")
        )
        click.echo("  `itmc apply` puts it right")
    if policy.classes:
        table(("class", "packets", "bytes"), [(c.name, c.packets, c.bytes) for c in policy.classes])
    if policy.python is not None:
        _show_python(policy.python)
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


def _show_python(python: PythonStatus) -> None:
    """What is done in Python, and what went wrong there."""
    queues = ", ".join(map(str, python.queues))
    word = "queue" if len(python.queues) == 1 else "queues"
    by = f"{python.workers} of {len(python.queues)} workers serve"
    if python.program:
        by = f"served by the program {python.program}"
        by += f" (process {python.process})" if python.process else ", which is not there"
    click.echo(
        f"  in Python by {word} {queues}: {by}, "
        f"{python.handled} packets handled, {python.waiting} wait"
    )
    if python.trouble:
        click.echo(f"  not served: {python.trouble}")
    became = "passed" if python.fails == "open" else "were dropped"
    for number, what in (
        (python.unserved, f"{became} unserved (fail {python.fails})"),
        (python.dropped, "were dropped because a queue was full"),
        (python.failed, "made a handler fail"),
        (python.hung, "took a handler too long"),
        (python.refused, "did not go through their tunnel"),
        (python.cut, "were too long to be handled"),
    ):
        if number:
            click.echo(f"  {number} packets {what}")
    if python.log:
        click.echo(f"  its log ends: {python.log[-1]}")


def _warn_of_full(what: str, entries: int, size: int, lost: int) -> None:
    if lost:
        click.echo(f"  {what} was full: {lost} packets found no room; give it a larger `max`")
    elif entries >= size * _NEARLY_FULL:
        click.echo(f"  {what} is nearly full: {entries} of {size}; give it a larger `max`")
