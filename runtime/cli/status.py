"""`itmc status`: what runs, what it counted, what its controllers decided."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any, Final

import click

from itmlang.control import Controller
from runtime.cli.output import as_json, table
from runtime.cli.words import (
    absence,
    controllers,
    decided,
    link_line,
    overlay_line,
    paths,
    policy_line,
    routed,
    sampled,
    timers,
    uncalled,
)
from runtime.decisions import parsed
from runtime.errors import UsageError
from runtime.status import (
    LinkStatus,
    PolicyStatus,
    PythonStatus,
    Waiting,
    control_log,
    link_status,
    pending,
    status,
)
from runtime.store import load

# Of a table's size, where a warning begins.
_NEARLY_FULL = 0.9
_MOST_TOLD = 5
_DECISIONS: Final = 20  # that are shown


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--control", is_flag=True, help="What the controllers of policy NAME decided.")
@click.option(
    "--last", type=click.IntRange(min=1), default=None, metavar="N",
    help="With --control: so many decisions (20, with --json all that are kept).",
)  # fmt: skip
@click.option("--json", "in_json", is_flag=True, help="As JSON; with --control, as lines of JSON.")
def command(names: tuple[str, ...], control: bool, last: int | None, in_json: bool) -> None:
    """Show the loaded policies and links (or those named): classes, flows, drift, controllers."""
    if control:
        _show_log(names, last, in_json)
        return
    if last is not None:
        raise UsageError("--last goes with --control")
    state = load()
    policies, links = status(names, state), link_status(names, state)
    if in_json:
        as_json(
            {
                "schema": 1,
                "pending": as_pending(),
                "policies": [_json(p) for p in policies],
                "links": [asdict(link) for link in links],
            }
        )
        return
    tell_pending()
    if not policies and not links:
        click.echo("no policy is loaded")
    for policy in policies:
        _show(policy)
    for link in links:
        _show_link(link)


def as_pending() -> dict[str, object] | None:
    """What waits to be confirmed, for JSON."""
    found = pending()
    return None if found is None else asdict(found)


def tell_pending() -> None:
    """Say what waits to be confirmed."""
    told = told_pending()
    if told:
        click.echo(told)


def told_pending() -> str:
    """What waits to be confirmed, "" for nothing."""
    found = pending()
    return "" if found is None else _told(found)


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
    click.echo(policy_line(policy))
    if policy.parameters:
        told = ", ".join(f"{name} = {value}" for name, value in policy.parameters.items())
        click.echo(f"  with {told}")
    if policy.state == "missing":
        click.echo("  its table is gone from the kernel: `itmc apply` brings it back")
    elif policy.state == "unknown":
        click.echo("  a table of ours that no record knows: apply its file, or remove it")
    elif policy.drift:
        _show_drift(policy.changed)
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
    if policy.ways:
        table(("by", "packets", "bytes"), [(w.name, w.packets, w.bytes) for w in policy.ways])
    if policy.overlay is not None:
        click.echo(f"  {overlay_line(policy.overlay)}")
        if policy.overlay.destinations:
            table(*paths(policy.overlay))
        for line in routed(policy.overlay):
            click.echo(f"  {line}")
    if policy.control:
        table(*controllers(policy))
        for line in decided(policy):
            click.echo(f"  {line}")
    if policy.timers:
        table(*timers(policy))
        for line in uncalled(policy):
            click.echo(f"  {line}")
    for flow in policy.flows:
        _warn_of_full(f"the flow `{flow.name}`", flow.entries, flow.size, flow.uncounted or 0)
    for one in policy.learned:
        _warn_of_full(f"the set `@{one.name}`", one.entries, one.size, one.unlearned)
    click.echo()


def _show_drift(changed: Sequence[str], also: str = "") -> None:
    told = "; ".join(changed[:_MOST_TOLD]) + ("; …" if len(changed) > _MOST_TOLD else "")
    click.echo(f"  changed by something else: {told}")
    click.echo(f"  `itmc apply` puts it right{also}")


def _show_link(link: LinkStatus) -> None:
    click.echo(link_line(link))
    if absence(link):
        click.echo(f"  {absence(link)}")
    elif link.drift:
        _show_drift(link.changed, "; with `--force`, also where a root qdisc is somebody else's")
    if link.state == "on":
        rows = [
            (c.name, c.priority, c.packets, c.bytes, c.drops, c.waiting, c.waiting_bytes)
            for c in link.classes
        ]
        table(("class", "priority", "packets", "bytes", "drops", "waiting", "bytes waiting"), rows)
    click.echo()


def _show_log(names: Sequence[str], last: int | None, in_json: bool) -> None:
    """What controllers decided."""
    if len(names) != 1:
        raise UsageError("--control shows one policy: name it", "`itmc status NAME --control`")
    log, written = control_log(names[0])
    if in_json:
        for line in log[-last:] if last else log:
            click.echo(line)
        return
    found = [one for line in log[-(last or _DECISIONS) :] for one in parsed(line)]
    if not found:
        click.echo("nothing was decided yet")
        return
    head = ("time", "controls", "value", "sample", "wanted", "because", "held back by")
    table(head, [_decision(one, written) for one in found])
    if len(found) < len(log):
        click.echo(f"the last {len(found)} of {len(log)} decisions")


def _decision(
    one: Mapping[str, Any], controllers: Mapping[str, Controller]
) -> tuple[str, str, str, str, str, str, str]:
    written, value, unit = one.get("written", "-"), one.get("value"), one.get("unit", "")
    shown = "-" if value is None else value if isinstance(value, str) else f"{value:g}"
    if value is not None and written in controllers:
        shown = controllers[written].shown(value)
    because = one.get("reason", "") + (" (dry run)" if one.get("dry") else "")
    return (
        _clock(one.get("time")), written, shown, sampled(one.get("sample"), unit),
        sampled(one.get("target"), unit), because, one.get("blocked", ""),
    )  # fmt: skip


def _clock(when: float | None) -> str:
    if when is None:
        return "-"
    at = datetime.fromtimestamp(when)
    return at.strftime("%H:%M:%S.") + f"{at.microsecond // 1000:03}"


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
