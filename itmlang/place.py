"""Where each part of a policy runs, and why.

The kernel takes whatever nftables can say. An action answers for itself: one
whose `lower` returns None needs the queue. Until there is a queue runtime, such
an action would be an error; this version has none.
"""

from dataclasses import dataclass

from itmlang import ir


@dataclass(frozen=True)
class Placement:
    """One part of a policy, "kernel" or "queue", and the reason in words."""

    policy: str
    part: str
    where: str
    reason: str


def place(policy: ir.Policy, families: tuple[int, ...]) -> tuple[Placement, ...]:
    """The placement of a policy's interest and classification, log and classes."""

    def needs_queue(name: str) -> list[str]:
        steps = policy.process.get(name, ())
        return [
            str(step.action)
            for step in steps
            if any(step.action.lower(family) is None for family in families)
        ]

    placements = [
        Placement(policy.name, "interest, classify", "kernel", "nftables has all its fields")
    ]
    if policy.counts:
        placements.append(Placement(policy.name, "log", "kernel", "flow counters are dynamic sets"))
    for name in policy.classes:
        queued = needs_queue(name)
        reason = (
            "nftables has no " + ", ".join(queued) if queued else "nftables has all its actions"
        )
        where = "queue" if queued else "kernel"
        placements.append(Placement(policy.name, f"class {name}", where, reason))
    return tuple(placements)
