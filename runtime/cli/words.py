"""What `status`, `list` and `top` say alike: of policies, links, controllers, timers and overlays."""

from collections.abc import Sequence

from itmlang.control import measured
from itmlang.links import rate_text
from itmlang.values import duration_text
from runtime.overlay.status import OverlayStatus
from runtime.status import LinkStatus, PolicyStatus

# Head and rows of a table.
Rows = tuple[Sequence[str], list[Sequence[object]]]


def policy_line(policy: PolicyStatus) -> str:
    """A policy: its state, where it hangs, where it came from."""
    hooks = ", ".join(hook for hook, _ in policy.hooks)
    parts = [policy.state, f"at {hooks}" if hooks else "at no hook", f"priority {policy.priority}"]
    parts += [f"from {policy.file}"] if policy.file else []
    return f"{policy.name}: {', '.join(parts)}"


def link_line(link: LinkStatus) -> str:
    """A link: its state, its interfaces, its rate."""
    return f"{link.name}: {link.state}, link of {interfaces(link)}, {rate(link)}, from {link.file}"


def interfaces(link: LinkStatus) -> str:
    """What a link is of, and what is here of that."""
    told = link.interface
    if link.interfaces and link.interfaces != (link.interface,):
        told += f" ({', '.join(link.interfaces)})"
    return f"{told} ingress" if link.ingress else told


def rate(link: LinkStatus) -> str:
    """A link's rate; where a controller moved it, the file's as well."""
    if link.rate == link.file_rate:
        return rate_text(link.rate)
    return f"{rate_text(link.rate, 4)} now ({rate_text(link.file_rate)} in its file)"


def absence(link: LinkStatus) -> str:
    """Why a link waits, "" if it does not."""
    if link.state != "waiting":
        return ""
    if link.interface.endswith("*"):
        return f"no interface {link.interface} is here yet: it begins when one comes"
    return f"its interface {link.interface} is gone: it begins again when that comes back"


def controllers(policy: PolicyStatus) -> Rows:
    """What each controller of a policy writes, measures, wants."""
    return (
        ("controls", "now", "file", "by", "measure", "sample", "wanted", "every"),
        [
            (
                one.written, one.in_force, one.in_file, f"{one.law}, dry run" if one.dry else one.law,
                one.measure, sampled(one.sample, one.unit), sampled(one.target, one.unit),
                duration_text(one.period),
            )
            for one in policy.control
        ],
    )  # fmt: skip


def decided(policy: PolicyStatus) -> list[str]:
    """What controllers decided last, and what held them back."""
    found = []
    for one in policy.control:
        if one.trouble:
            found.append(f"{one.written} is not controlled: {one.trouble}")
            continue
        told = one.reason or ("nothing was decided yet" if one.at is None else "")
        told += ("; " if told and one.blocked else "") + one.blocked
        told += f"; it would be {one.would}" if one.would else ""
        found.append(f"{one.written}: {told}")
    return found


def sampled(value: float | None, unit: str) -> str:
    """A sample or set-point, "-" for none."""
    return "-" if value is None else measured(value, unit)


def overlay_line(one: OverlayStatus) -> str:
    """An overlay: this member, its neighbours, its probes."""
    near = ", ".join(f"{name} {address}" for name, address in one.neighbors.items()) or "none"
    return f"overlay member {one.address}, neighbours: {near}; a probe every {one.period:g} s"


def paths(one: OverlayStatus) -> Rows:
    """The ways to each destination, and which is chosen."""

    def milliseconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f} ms"

    rows: list[Sequence[object]] = []
    for to in one.destinations:
        for number, path in enumerate(to.paths):
            networks = ", ".join((*to.networks, *to.learned))
            rows.append(
                (
                    to.egress if number == 0 else "", networks if number == 0 else "", path.name,
                    "chosen" if path.chosen else "", path.state, milliseconds(path.rtt),
                    "-" if path.loss is None else f"{path.loss:.0%}",
                    "-" if path.answered is None else f"{path.answered:.1f} s ago",
                )
            )  # fmt: skip
    return ("to", "networks", "by", "", "state", "round trip", "loss", "answered"), rows


def routed(one: OverlayStatus) -> list[str]:
    """When and why choices moved, what probes were refused, and what is wrong."""
    found = [f"it does not probe: {one.trouble}"] if one.trouble else []
    for to in one.destinations:
        if to.moved is not None:
            times = "once" if to.moves == 1 else f"{to.moves} times"
            found.append(
                f"{to.egress} goes {by(to.choice)} for {to.moved:.0f} s ({times} moved): {to.why}"
            )
    refused = ("forged", "replayed", "truncated", "malformed", "limited")
    told = ", ".join(f"{one.counters[k]} {k}" for k in refused if one.counters.get(k))
    return found + ([f"datagrams not taken: {told}"] if told else [])


def by(choice: str) -> str:
    """`directly`, or by which neighbour."""
    return "directly" if choice == "direct" else f"by {choice}"


def timers(policy: PolicyStatus) -> Rows:
    """A policy's timers, and how often they were called."""
    return (
        ("calls", "every", "called", "skipped", "failed"),
        [
            (one.target, duration_text(one.period), one.called, one.skipped, one.failed)
            for one in policy.timers
        ],
    )


def uncalled(policy: PolicyStatus) -> list[str]:
    """Why timers are not called."""
    told = dict.fromkeys(one.trouble for one in policy.timers if one.trouble)
    return [f"timers are not called: {trouble}" for trouble in told]
