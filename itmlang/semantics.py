"""The meaning of a policy, in plain Python: the oracle for every backend.

`step` takes one packet through one policy, in the paper's order (section 3.2):
interest, classify, log, process. It works on the checked policy and not on what
the simplifier made of it, so that the two can be held against each other.
`traverse` takes a packet past all policies, hook by hook.

State is what the policy learned: its flow tables. `step` changes it in place
(replaying a capture is the other use of this module) and changes the packet.
Time is given in seconds by the caller; nothing here reads a clock.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from itmlang import ir
from itmlang.fields import FIELDS
from itmlang.packet import Packet
from itmlang.source import Span

# Which hooks a packet passes (the paper's figure 5), by where it comes from and goes to.
PATHS: Final[Mapping[str, tuple[str, ...]]] = {
    "forward": ("prerouting", "forward", "postrouting"),
    "in": ("prerouting", "input"),
    "out": ("output", "postrouting"),
}


@dataclass
class Entry:
    """What was logged of one flow; `last` is when, in seconds."""

    packets: int = 0
    bytes: int = 0
    last: float = 0.0


@dataclass
class FlowTable:
    """The entries of one flow, a table for each family if the key has addresses."""

    flow: ir.Flow
    entries: dict[int, dict[tuple[object, ...], Entry]] = field(default_factory=dict)
    uncounted: int = 0

    def key(self, packet: Packet) -> tuple[object, ...] | None:
        """The packet's key, None if it lacks one of the fields."""
        key = tuple(f.get(packet) for f in self.flow.key)
        return None if None in key else key

    def _table(self, packet: Packet) -> dict[tuple[object, ...], Entry]:
        return self.entries.setdefault(packet.family if self.flow.by_address else 0, {})

    def _expired(self, entry: Entry, now: float) -> bool:
        timeout = self.flow.timeout
        return timeout is not None and now - entry.last >= timeout / 1000

    def look_up(self, packet: Packet, now: float) -> Entry | None:
        """What was logged of the packet's flow, None if the packet has no key."""
        key = self.key(packet)
        if key is None:
            return None
        entry = self._table(packet).get(key)
        return Entry() if entry is None or self._expired(entry, now) else entry

    def count(self, packet: Packet, now: float) -> Entry | None:
        """Log the packet; None if it has no key, or if it is new and the table is full."""
        key = self.key(packet)
        if key is None:
            return None
        table = self._table(packet)
        entry = table.get(key)
        if entry is None or self._expired(entry, now):
            table.pop(key, None)
            if len(table) >= self.flow.size:
                for old in [k for k, e in table.items() if self._expired(e, now)]:
                    del table[old]
            if len(table) >= self.flow.size:
                self.uncounted += 1
                return None
            entry = table[key] = Entry()
        entry.packets += 1
        entry.bytes += packet.length
        entry.last = now
        return entry


@dataclass
class State:
    """All that one policy learned."""

    flows: dict[str, FlowTable]

    @classmethod
    def of(cls, policy: ir.Policy) -> "State":
        return cls({flow.name: FlowTable(flow) for flow in policy.flows})


@dataclass(frozen=True)
class Line:
    """One thing that happened, at its place in the policy."""

    section: str
    span: Span
    text: str
    result: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a policy made of a packet.

    `name` is the class, None for the paper's class 0 and for packets without
    interest. `lines` is the story, empty unless it was asked for.
    """

    interested: bool
    name: str | None
    verdict: str  # "accept" or "drop"
    lines: tuple[Line, ...] = ()


def step(
    policy: ir.Policy, state: State, packet: Packet, now: float, *, told: bool = False
) -> Outcome:
    """One packet through one policy; `told` asks for the story."""
    lines: list[Line] | None = [] if told else None
    evaluation = _Evaluation(state, packet, now, lines)
    evaluation.section = "interest"
    if not evaluation.holds(policy.interest):
        return Outcome(False, None, "accept", tuple(lines or ()))
    evaluation.section = "classify"
    name = None
    for rule in policy.rules:
        if rule.condition is None or evaluation.holds(rule.condition):
            evaluation.tell(rule.span, rule.name)
            name = rule.name
            break
    _log(policy, state, packet, now, lines)
    verdict = "accept"
    for use in policy.process.get(name, ()) if name is not None else ():
        before = packet.tos
        use.action.run(packet)
        verdict = use.action.verdict or verdict
        if lines is not None:
            change = "" if packet.tos == before else f"tos {before:#04x} -> {packet.tos:#04x}"
            result = change or use.action.verdict or "no change"
            lines.append(Line("process", use.span, str(use.action), result))
    return Outcome(True, name, verdict, tuple(lines or ()))


def _log(
    policy: ir.Policy, state: State, packet: Packet, now: float, lines: list[Line] | None
) -> None:
    for count in policy.counts:
        table = state.flows[count.flow.name]
        before = table.look_up(packet, now)
        packets = before.packets if before is not None else 0
        after = table.count(packet, now)
        if lines is None:
            continue
        if before is None:
            result = "not counted: the packet lacks a field of the key"
        elif after is None:
            result = "not counted: the table is full"
        else:
            result = f"packets {packets} -> {after.packets}, bytes {after.bytes}"
        lines.append(Line("log", count.span, f"count {count.flow.name}", result))


@dataclass
class _Evaluation:
    """Conditions, asked of one packet; logic is two-valued."""

    state: State
    packet: Packet
    now: float
    lines: list[Line] | None
    section: str = ""

    def tell(self, span: Span, text: str, result: str = "") -> None:
        if self.lines is not None:
            self.lines.append(Line(self.section, span, text, result))

    def holds(self, condition: ir.Condition) -> bool:
        match condition:
            case ir.And():
                return all(self.holds(term) for term in condition.terms)
            case ir.Or():
                return any(self.holds(term) for term in condition.terms)
            case ir.Not():
                return not self.holds(condition.term)
            case ir.Test():
                value = condition.field.get(self.packet)
                result = value is not None and value in condition.values  # type: ignore[operator]
                self._tell_field(condition.span, condition.field.name, value, result)
            case ir.Bits():
                value = condition.field.get(self.packet)
                result = isinstance(value, int) and bool(value & condition.mask)
                self._tell_field(condition.span, condition.field.name, value, result)
            case ir.FlowTest():
                number = self._logged(condition.flow, condition.attribute)
                result = number is not None and number in condition.values
                name = f"{condition.flow.name}.{condition.attribute}"
                self._tell_number(condition.span, name, number, result)
            case ir.Over():
                number = self._logged(condition.flow, condition.attribute)
                result = number is not None and number > condition.threshold
        return result

    def _logged(self, flow: ir.Flow, attribute: str) -> int | None:
        entry = self.state.flows[flow.name].look_up(self.packet, self.now)
        if entry is None:
            return None
        return entry.packets if attribute == "packets" else entry.bytes

    def _tell_number(self, span: Span, name: str, number: int | None, result: bool) -> None:
        if self.lines is None:
            return
        shown = "the packet lacks a field of the key" if number is None else f"{name} is {number}"
        self.tell(span, " ".join(span.text.split()), f"{_yes(result)} ({shown})")

    def _tell_field(self, span: Span, name: str, value: object, result: bool) -> None:
        if self.lines is None:
            return
        if value is None:
            shown = f"the packet has no {name}"
        else:
            shown = f"{name} is {FIELDS[name].type.text(value)}"  # type: ignore[arg-type]
        self.tell(span, " ".join(span.text.split()), f"{_yes(result)} ({shown})")


def _yes(result: bool) -> str:
    return "yes" if result else "no"


@dataclass(frozen=True)
class Visit:
    """One policy's turn with a packet at a hook."""

    hook: str
    policy: ir.Policy
    outcome: Outcome


def at_hook(policies: Iterable[ir.Policy], hook: str) -> list[ir.Policy]:
    """The policies at a hook in the order they run: by priority, then as given."""
    return sorted((p for p in policies if hook in p.hooks), key=lambda p: p.priority)


def traverse(
    policies: Sequence[ir.Policy],
    states: Mapping[str, State],
    packet: Packet,
    path: str,
    now: float,
    *,
    told: bool = False,
) -> list[Visit]:
    """A packet past all policies on a path (a key of `PATHS`); a dropped one goes no further.

    Nothing is routed and the TTL stays. What one policy changes the next one sees.
    """
    visits: list[Visit] = []
    for hook in PATHS[path]:
        for policy in at_hook(policies, hook):
            outcome = step(policy, states[policy.name], packet, now, told=told)
            visits.append(Visit(hook, policy, outcome))
            if outcome.verdict == "drop":
                return visits
    return visits
