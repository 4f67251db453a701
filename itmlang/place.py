"""Where each part of a policy runs, and why.

The kernel takes whatever nftables can say. An action answers for itself: one
whose `lower` returns None needs the queue. Until there is a queue runtime, such
an action would be an error; this version has none.
"""

from dataclasses import dataclass

from itmlang import ir
from itmlang.simplify import Facts


@dataclass(frozen=True)
class Placement:
    """One part of a policy, "kernel" or "queue", and the reason in words."""

    policy: str
    part: str
    where: str
    reason: str


def place(policy: ir.Policy, facts: Facts) -> tuple[Placement, ...]:
    """The placement of a policy's interest and classification, log, classes and updates."""

    def lacking(steps: ir.Steps) -> list[str]:
        found = []
        for step in steps:
            if isinstance(step, ir.Limit):
                found += lacking(step.otherwise)
            elif any(step.action.lower(f, facts.protocols) is None for f in facts.families):
                found.append(str(step.action))
        return found

    def needs_queue(name: str) -> list[str]:
        return lacking(policy.process.get(name, ()))

    placements = [
        Placement(policy.name, "interest, classify", "kernel", "nftables has all its fields")
    ]
    if policy.counts or policy.notes:
        placements.append(Placement(policy.name, "log", "kernel", "flow counters are dynamic sets"))
    if policy.updates:
        placements.append(
            Placement(policy.name, "update", "kernel", "learned sets are dynamic sets")
        )
    for name in policy.classes:
        queued = needs_queue(name)
        reason = (
            "nftables has no " + ", ".join(queued) if queued else "nftables has all its actions"
        )
        where = "queue" if queued else "kernel"
        placements.append(Placement(policy.name, f"class {name}", where, reason))
    return tuple(placements)
