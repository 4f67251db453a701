"""Where each part of a policy runs, and why.

The kernel takes whatever nftables can say. In a class, what stands before the first action
that needs Python is the kernel's as well; from there on packets are handed over, but for a
handler that decides once for a connection, behind which the kernel goes on.
"""

from collections.abc import Collection
from dataclasses import dataclass

from itmlang import ir, marks
from itmlang.capabilities import EVERYTHING, Capabilities
from itmlang.links import Link
from itmlang.nft.model import Queue, Tunnel
from itmlang.tunnelling import Inward, inward, outward, why_not


@dataclass(frozen=True)
class Placement:
    """One part of a policy, "kernel", "queue" or "process", the reason in words, and the queues'
    numbers."""

    policy: str
    part: str
    where: str
    reason: str
    queues: range = range(0)


def place(
    policy: ir.Policy,
    queue: Queue | None,
    tunnels: Collection[Tunnel] = (),
    capabilities: Capabilities = EVERYTHING,
) -> tuple[Placement, ...]:
    """The placement of a policy's parts, in the order in which packets come to them.

    `queue` is what its lowering made, None where nothing is handed over; `tunnels` are
    those of its classes that the kernel serves, as far as it has the `capabilities`.
    """
    served = {tunnel.name: tunnel for tunnel in tunnels}
    numbers = range(0) if queue is None else range(queue.first, queue.first + queue.many)
    found: list[Placement] = []

    def kernel(part: str, reason: str) -> None:
        found.append(Placement(policy.name, part, "kernel", reason))

    def queued(part: str, reason: str) -> None:
        found.append(Placement(policy.name, part, "queue", reason, numbers))

    if policy.in_python:
        kernel("interest", "nftables has all its fields")
        if policy.notes:
            kernel("sample, record", "nftables logs packets")
        queued("all else", "the policy says `run python`")
    else:
        kernel("interest, classify", "nftables has all its fields")
        if policy.counts or policy.notes:
            kernel("log", "flow counters are dynamic sets")
        if policy.updates:
            kernel("update", "learned sets are dynamic sets")
        for name in policy.classes:
            part, steps = f"class {name}", policy.process.get(name, ())
            begin = ir.python_part(steps)
            if begin == len(steps):
                kernel(part, "nftables has all its actions")
                continue
            if begin:
                kernel(part, f"nftables has what comes first: {_told(steps[:begin])}")
            step, first = steps[begin], _told(steps[begin : begin + 1])
            if name in served:
                number = served[name].number
                if not served[name].inward:
                    kernel(part, f"{first}: its tunnel {number}, a BPF program on a route")
                    continue
                kernel(part, f"{first}: its tunnel {number}, a BPF program on the links")
                queued(part, f"{first} of what the program leaves alone: fragments, options")
                continue
            if isinstance(step, ir.Step) and step.action.once:
                queued(part, f"a connection's first packet, for {first}")
                rest = _told(steps[begin + 1 :])
                kernel(part, "what was decided holds for the others" + (rest and f", then {rest}"))
                continue
            behind = _told(steps[begin + 1 :])
            more = f", and what follows: {behind}" if behind else ""
            why = why_not(policy, name)
            feature = "BPF on routes" if outward(policy, name) else ""
            if isinstance(inward(policy, name), Inward):
                feature = "BPF on links"
            if feature:
                why = f"it has {marks.MOST_TUNNELS} tunnels already"
                if feature not in capabilities.features:
                    why = f"it lacks {feature}"
            if why:
                queued(part, f"{first}: the kernel cannot, because {why}")
                continue
            if isinstance(step, ir.Limit):
                lacks = next(s.action for s in ir.every_step((step,)) if s.in_python)
                queued(part, f"nftables has no {lacks}, so Python limits: {first}{more}")
                continue
            queued(part, f"nftables has no {first}{more}")
    if queue is not None:
        open = policy.fails_open
        kernel("unserved", "`fail open`: it passes" if open else "`fail closed`: it is dropped")
    for one in policy.controllers:
        what = "it writes the rate of a qdisc" if one.link else "rules for each value are there"
        reason = f"laws are Python; {what}, so no packet waits for it"
        found.append(Placement(policy.name, f"control {one.written}", "process", reason))
    for timer in policy.timers:
        found.append(Placement(policy.name, f"every {timer.period} ms", "process",
                               f'call "{timer.target}" is Python'))  # fmt: skip
    return tuple(found)


def place_link(link: Link) -> Placement:
    """Where a link's packets wait."""
    way = f"what comes in at {link.interface}, by an IFB device" if link.ingress else link.interface
    return Placement(link.name, "link", "kernel", f"a tree of HTB qdiscs: {way}")


def _told(steps: ir.Steps) -> str:
    """Steps as the policy has them, on one line."""
    return "; ".join(
        str(step.action) if isinstance(step, ir.Step) else " ".join(step.span.text.split())
        for step in steps
    )
