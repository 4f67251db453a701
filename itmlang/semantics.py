"""The meaning of a policy, in plain Python: the oracle for every backend.

`State.step` takes one packet through one policy, in the paper's order (section
3.2): interest, classify, log, process, update. It works on the checked policy and
not on what the simplifier made of it, so that the two can be held against each
other. `Host.traverse` takes a packet past all policies, hook by hook, with
connection tracking before them.

A policy is turned into Python closures once, since captures of millions of packets
are replayed; `told` closures do the same and tell of it. State is what a policy
learned; it is changed in place, and so is the packet. Time is given in seconds by
the caller; nothing here reads a clock, and chance is seeded.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final

from itmlang import ir
from itmlang.actions import Action
from itmlang.conntrack import Connection, Conntrack, Tracked
from itmlang.fields import EGRESS, FIELDS, INGRESS, TRACKING, TRACKING_HOOKS, Field
from itmlang.links import classid_text
from itmlang.packet import Packet
from itmlang.rates import Bucket
from itmlang.source import Span
from itmlang.tables import Buckets, Entry, FlowTable, SetTable, new_bucket
from itmlang.values import Addresses, Names, Ranges, ValueSet, duration_text

# Which hooks a packet passes (the paper's figure 5), by where it comes from and goes to.
PATHS: Final[Mapping[str, tuple[str, ...]]] = {
    "forward": (INGRESS, "prerouting", "forward", "postrouting", EGRESS),
    "in": (INGRESS, "prerouting", "input"),
    "out": ("output", "postrouting", EGRESS),
}
_MANY: Final = 2**64  # no count gets there
_DRAWN: Final = 10**6  # a random number is one of so many

Predicate = Callable[[Packet, float], bool]


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that happened, at its place in the policy."""

    section: str
    span: Span
    text: str
    result: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a policy made of a packet.

    `name` is the class, None for the paper's class 0 and for packets without
    interest. `lines` is the story, empty unless it was asked for; `decided` is the
    line that gave the class.
    """

    interested: bool
    name: str | None
    verdict: str  # "accept", "drop" or "reject"
    lines: tuple[Line, ...] = ()
    decided: Span | None = None

    @property
    def dropped(self) -> bool:
        return self.verdict != "accept"


_UNTOUCHED: Final = Outcome(False, None, "accept")


@dataclass(frozen=True, slots=True)
class Did:
    """What an action in Python came to: a verdict ("" for none), another class, or neither."""

    verdict: str = ""
    name: str | None = None


# Does an action that nftables cannot say to a packet.
Doer = Callable[[Action, Packet, float], Did]
PASSED: Final = Did()


def nothing_done(action: Action, packet: Packet, now: float) -> Did:
    """Leaves the packet as it is: for where no handler is loaded and no path is known."""
    return PASSED


@dataclass(frozen=True, slots=True)
class _Decided:
    """What was decided for a connection; `mark` is None if its packets keep theirs."""

    verdict: str
    name: str | None
    mark: int | None


class State:
    """One policy and all that it learned. Learned sets are shared among policies."""

    def __init__(
        self,
        policy: ir.Policy,
        sets: dict[str, SetTable] | None = None,
        random: Random | None = None,
        do: Doer = nothing_done,
    ) -> None:
        self.policy = policy
        self._do = do
        # Where Python's part of a class's steps begins.
        self._begins = {name: ir.python_part(steps) for name, steps in policy.process.items()}
        self._decided: dict[Connection, _Decided] = {}
        self._once = {
            name
            for name, steps in policy.process.items()
            for step in steps
            if isinstance(step, ir.Step) and step.action.once
        }
        self.sets = {} if sets is None else sets
        for one in policy.learned:
            self.sets.setdefault(one.name, SetTable(one))
        self.random = random or Random(0)
        rates, connections = _asked(policy)
        self.flows = {
            flow.name: FlowTable(flow, tuple(rates.get(flow.name, ())), flow.name in connections)
            for flow in policy.flows
        }
        self.packets = dict.fromkeys(policy.classes, 0)
        self.bytes = dict.fromkeys(policy.classes, 0)
        self.noted = [0] * len(policy.notes)  # packets that were sampled, recorded
        self._interested = 0
        self._records = [
            Bucket(note.amount, note.seconds, False, note.amount)
            if isinstance(note, ir.Record) else None
            for note in policy.notes
        ]  # fmt: skip
        self._limits: dict[int, Bucket | Buckets] = {}
        self._draws = any(
            isinstance(leaf, ir.Test) and leaf.field is FIELDS["random"]
            for rule in policy.rules for leaf in ir.leaves(rule.condition)
        )  # fmt: skip
        self._plain = _Closures(self, None)
        self._telling: _Closures | None = None

    def step(self, packet: Packet, now: float, *, told: bool = False) -> Outcome:
        """One packet through the policy; `told` asks for the story."""
        run = self._plain
        if told:
            run = self._telling = self._telling or _Closures(self, [])
        lines = run.lines
        if lines is not None:
            lines.clear()
        if run.interest is not None and not run.interest(packet, now):
            return _UNTOUCHED if lines is None else Outcome(False, None, "accept", tuple(lines))
        for table in self.flows.values():
            table.forget()
        if self._draws:
            packet.draw = self.random.randrange(_DRAWN)
        found: ir.ClassRule | None = None
        for predicate, rule in run.rules:
            if predicate is None or predicate(packet, now):
                found = rule
                break
        name = None
        if found is not None:
            name = found.name
            if name in self._once:
                name = self._moved(name, packet)
            self.packets[name] += 1
            self.bytes[name] += packet.length
            run.tell("classify", found.span, name)
        for count in self.policy.counts:
            self._count(count, packet, now, lines)
        if self.policy.notes:
            self._note(packet, now, run)
        steps, begin = self.policy.process.get(name or "", ()), self._begins.get(name or "", 0)
        verdict = self._act(steps, packet, now, run, begin)
        if lines is None:
            return run.outcomes[name, verdict or "accept"]
        decided = found.span if found is not None else None
        return Outcome(True, name, verdict or "accept", tuple(lines), decided)

    def resume(self, name: str, begin: int, packet: Packet, now: float, moved: bool = False) -> str:
        """The verdict of a class's actions from one on, as Python does them; "" if they give none.

        All before was done already: it is what the kernel hands over. `moved` tells that it
        was a handler that named the class.
        """
        steps = self.policy.process.get(name, ())
        return self._process(steps[begin:] if begin else steps, packet, now, self._plain, moved)

    def _moved(self, name: str, packet: Packet) -> str:
        """The class that was decided for the packet's connection, else its own."""
        decided = self._decided.get(packet.connection)
        if decided is None or decided.name is None:
            return name
        if decided.mark is not None:
            packet.mark = decided.mark
        return decided.name

    def _act(
        self,
        steps: ir.Steps,
        packet: Packet,
        now: float,
        run: "_Closures",
        begin: int | None = None,
    ) -> str:
        """What the kernel does, the updates, what Python does; the verdict, "" for none."""
        begin = ir.python_part(steps) if begin is None else begin
        verdict = self._process(steps[:begin], packet, now, run) if begin else ""
        if not verdict and begin < len(steps):
            step = steps[begin]
            if isinstance(step, ir.Step) and step.action.once:
                decided = self._decide(step, packet, now)
                if decided.mark is not None:
                    packet.mark = decided.mark
                told = f"class {decided.name}" if decided.name is not None else decided.verdict
                run.tell("process", step.span, str(step.action), told or "accept")
                if decided.name is not None:
                    return self._act(self.policy.process.get(decided.name, ()), packet, now, run)
                if decided.verdict != "drop":
                    return self._act(steps[begin + 1 :], packet, now, run)
                verdict = "drop"
        for update, predicate in run.updates:
            if predicate is None or predicate(packet, now):
                self._update(update, packet, now, run)
        return verdict or self._process(steps[begin:], packet, now, run)

    def _decide(self, step: ir.Step, packet: Packet, now: float) -> _Decided:
        """What holds for the packet's connection; its first packet decides."""
        known = self._decided.get(packet.connection)
        if known is not None:
            return known
        mark = packet.mark
        did = self._do(step.action, packet, now)
        given = self.policy.process.get(did.name or "", ())
        if step in ir.every_step(given):  # its own class
            did = Did(did.verdict)
        elif ir.handed_over(given):  # the kernel keeps no class that is for Python
            return _Decided("" if self.policy.fails_open else "drop", None, None)
        decided = _Decided(did.verdict, did.name, packet.mark if packet.mark != mark else None)
        if packet.connection is not None:
            self._decided[packet.connection] = decided
        return decided

    def _count(self, count: ir.Count, packet: Packet, now: float, lines: list[Line] | None) -> None:
        table = self.flows[count.flow.name]
        if lines is None:
            table.count(packet, now)
            return
        before = table.look_up(packet, now)
        packets = before.packets if before is not None else 0
        after = table.count(packet, now)
        if before is None:
            result = "not counted: the packet lacks a field of the key"
        elif after is None:
            result = "not counted: the table is full"
        else:
            result = f"packets {packets} -> {after.packets}, bytes {after.bytes}"
        lines.append(Line("log", count.span, f"count {count.flow.name}", result))

    def _note(self, packet: Packet, now: float, run: "_Closures") -> None:
        for index, (note, bucket) in enumerate(zip(self.policy.notes, self._records, strict=True)):
            if isinstance(note, ir.Sample):
                taken = self._interested % note.many == 0
            else:
                taken = bucket is not None and not bucket.over(packet.length, now)
            self.noted[index] += taken
            run.tell("log", note.span, " ".join(note.span.text.split()), "yes" if taken else "no")
        self._interested += 1

    def _process(
        self, steps: ir.Steps, packet: Packet, now: float, run: "_Closures", moved: bool = False
    ) -> str:
        """Do the steps; the verdict, "" if they give none. A packet is `moved` to a class once."""
        for step in steps:
            if isinstance(step, ir.Limit):
                over = self._bucket(step).over(packet.length if step.flow is None else packet, now)  # type: ignore[arg-type]
                run.tell("process", step.span, _head(step.span), "over" if over else "within")
                if over:
                    verdict = self._process(step.otherwise, packet, now, run, moved)
                    if verdict:
                        return verdict
                continue
            action = step.action
            if action.in_python:
                did = self._do(action, packet, now)
                if run.lines is not None:
                    told = did.verdict or (f"class {did.name}" if did.name is not None else "done")
                    run.tell("process", step.span, str(action), told)
                if did.verdict:
                    return did.verdict
                given = None if did.name is None else self.policy.process.get(did.name, ())
                # To name its own class is to go on.
                if given is not None and not moved and step not in ir.every_step(given):
                    return self._process(given, packet, now, run, moved=True) or "accept"
                continue
            if run.lines is not None:
                _tell_action(step, packet, run)
            else:
                action.run(packet)
            if action.verdict:
                return action.verdict
        return ""

    def _bucket(self, limit: ir.Limit) -> "Bucket | Buckets":
        found = self._limits.get(id(limit))
        if found is None:
            if limit.flow is None:
                found = new_bucket(limit)
            else:
                found = Buckets(limit, self.flows[limit.flow.name])
            self._limits[id(limit)] = found
        return found

    def _update(
        self, update: ir.Addition | ir.Removal, packet: Packet, now: float, run: "_Closures"
    ) -> None:
        value = update.field.get(packet)
        text = " ".join(update.span.text.split())
        if value is None:
            run.tell("update", update.span, text, f"the packet has no {update.field.name}")
            return
        table = self.sets[update.set.name]
        shown = update.field.type.text(value)
        if isinstance(update, ir.Removal):
            table.remove(value)
            run.tell("update", update.span, text, f"{shown} is out")
        elif table.add(value, now, update.timeout, self.policy.name):
            time = update.set.timeout if update.timeout is None else update.timeout
            until = "for ever" if time is None else f"for {duration_text(time)}"
            run.tell("update", update.span, text, f"{shown} is in, {until}")
        else:
            run.tell("update", update.span, text, f"{shown} finds no room")


def _asked(policy: ir.Policy) -> tuple[dict[str, list[tuple[str, int]]], set[str]]:
    """The rates that conditions ask of each flow, and the flows whose connections they ask."""
    rates: dict[str, list[tuple[str, int]]] = {}
    connections: set[str] = set()
    for leaf in (leaf for c in policy.conditions for leaf in ir.leaves(c)):
        if isinstance(leaf, ir.FlowTest) and leaf.attribute.endswith("_rate"):
            asked = rates.setdefault(leaf.flow.name, [])
            rate = (leaf.attribute, _side(leaf)[0])
            asked += [rate] if rate not in asked else []
        elif isinstance(leaf, ir.FlowTest) and leaf.attribute == "connections":
            connections.add(leaf.flow.name)
    return rates, connections


def _side(test: ir.FlowTest) -> tuple[int, bool]:
    """(threshold, whether the test holds above it) of a test of a rate."""
    low, high = test.values.spans[0]
    return (high, False) if low == 0 else (low - 1, True)


def _head(span: Span) -> str:
    """What is written up to a brace, on one line."""
    return " ".join(span.text.partition("{")[0].split())


def _tell_action(step: ir.Step, packet: Packet, run: "_Closures") -> None:
    before, mark = bytes(packet.data), packet.mark
    tos, priority = packet.tos, packet.priority
    step.action.run(packet)
    if packet.tos != tos:
        change = f"tos {tos:#04x} -> {packet.tos:#04x}"
    elif packet.mark != mark:
        change = f"mark {mark:#x} -> {packet.mark:#x}"
    elif packet.priority != priority:
        change = f"waits in the link's class {classid_text(packet.priority)}"
    else:
        change = "changed" if packet.data != before else ""
    run.tell("process", step.span, str(step.action), change or step.action.verdict or "no change")


class _Closures:
    """A policy's conditions as closures; with `lines`, they tell what they find."""

    def __init__(self, state: State, lines: list[Line] | None) -> None:
        self.state, self.lines = state, lines
        policy = state.policy
        self.section = "interest"
        # Without an interest there is nothing to ask.
        self.interest = self.predicate(policy.interest) if policy.interest.terms else None
        self.section = "classify"
        self.rules = [
            (None if rule.condition is None else self.predicate(rule.condition), rule)
            for rule in policy.rules
        ]
        self.section = "update"
        self.updates = [
            (one, None if one.condition is None else self.predicate(one.condition))
            for one in policy.updates
        ]
        self.outcomes = {
            (name, verdict): Outcome(True, name, verdict)
            for name in (None, *policy.classes)
            for verdict in ("accept", "drop", "reject")
        }

    def tell(self, section: str, span: Span, text: str, result: str = "") -> None:
        if self.lines is not None:
            self.lines.append(Line(section, span, text, result))

    def predicate(self, condition: ir.Condition) -> Predicate:
        """The condition as a function of (packet, now); logic is two-valued."""
        match condition:
            case ir.And():
                return _all([self.predicate(term) for term in condition.terms])
            case ir.Or():
                return _any([self.predicate(term) for term in condition.terms])
            case ir.Not():
                term = self.predicate(condition.term)
                return lambda packet, now: not term(packet, now)
            case ir.Test():
                get = self._getter(condition.field)
                contains = _membership(condition.values)
                leaf: Predicate = lambda packet, now: (  # noqa: E731
                    (value := get(packet)) is not None and contains(value)
                )
                return self._told(leaf, condition.span, self._field_told(condition.field))
            case ir.Bits():
                get, mask = condition.field.get, condition.mask

                def bits(packet: Packet, now: float) -> bool:
                    value = get(packet)
                    return isinstance(value, int) and bool(value & mask)

                return self._told(bits, condition.span, self._field_told(condition.field))
            case ir.Member():
                get, table = condition.field.get, self.state.sets[condition.set.name]

                def member(packet: Packet, now: float) -> bool:
                    value = get(packet)
                    return value is not None and table.has(value, now)

                return self._told(member, condition.span, self._field_told(condition.field))
            case ir.FlowTest():
                return self._flow_test(condition)
            case ir.Over():
                above = Ranges(_MANY, ((condition.threshold + 1, _MANY),))
                attribute, flow = condition.attribute, condition.flow
                return self._flow_test(ir.FlowTest(flow, attribute, above, condition.span))

    def _getter(self, field: Field) -> Callable[[Packet], object]:
        if field is FIELDS["random"] and self.section == "update":
            # After the classes, each question is a draw of its own.
            random = self.state.random

            def drawn(packet: Packet) -> object:
                packet.draw = random.randrange(_DRAWN)
                return packet.draw

            return drawn
        return field.get

    def _flow_test(self, test: ir.FlowTest) -> Predicate:
        table, attribute = self.state.flows[test.flow.name], test.attribute
        if attribute.endswith("_rate"):
            threshold, above = _side(test)
            asked = attribute, threshold

            def rate(packet: Packet, now: float) -> bool:
                entry = table.look_up(packet, now)
                if entry is None:
                    return False
                over = entry.over is not None and entry.over.get(asked, 0.0) > now
                return over == above

            return self._told(rate, test.span, self._flow_told(table, attribute))
        number, contains = _ATTRIBUTES[attribute], _membership(test.values)

        def counted(packet: Packet, now: float) -> bool:
            entry = table.look_up(packet, now)
            return entry is not None and contains(number(entry, now))

        return self._told(counted, test.span, self._flow_told(table, attribute))

    # The story.

    def _told(
        self, leaf: Predicate, span: Span, shown: Callable[[Packet, float], str]
    ) -> Predicate:
        lines, section = self.lines, self.section
        if lines is None:
            return leaf

        def telling(packet: Packet, now: float) -> bool:
            result = leaf(packet, now)
            why = f"{'yes' if result else 'no'} ({shown(packet, now)})"
            lines.append(Line(section, span, " ".join(span.text.split()), why))
            return result

        return telling

    @staticmethod
    def _field_told(field: Field) -> Callable[[Packet, float], str]:
        def shown(packet: Packet, now: float) -> str:
            value = field.get(packet)
            if value is None:
                return f"the packet has no {field.name}"
            return f"{field.name} is {field.type.text(value)}"

        return shown

    @staticmethod
    def _flow_told(table: FlowTable, attribute: str) -> Callable[[Packet, float], str]:
        name = f"{table.flow.name}.{attribute.removeprefix('byte_').removeprefix('packet_')}"

        def shown(packet: Packet, now: float) -> str:
            entry = table.look_up(packet, now)
            if entry is None:
                return "the packet lacks a field of the key"
            if attribute.endswith("_rate"):
                over = entry.over is not None and any(end > now for end in entry.over.values())
                return f"{name} is {'over' if over else 'not over'}"
            if attribute == "age":
                return f"{name} is {duration_text(max(0, _age(entry, now) - 1))}"
            return f"{name} is {_ATTRIBUTES[attribute](entry, now)}"

        return shown


def _age(entry: Entry, now: float) -> int:
    """Milliseconds since the flow's first packet; a flow is past a threshold that it reaches."""
    return int((now - entry.first) * 1000) + 1 if entry.packets else 0


_ATTRIBUTES: Final[Mapping[str, Callable[[Entry, float], int]]] = {
    "packets": lambda entry, now: entry.packets,
    "bytes": lambda entry, now: entry.bytes,
    "age": _age,
    "connections": lambda entry, now: entry.connections,
}


def _all(terms: list[Predicate]) -> Predicate:
    if len(terms) == 1:
        return terms[0]

    def every(packet: Packet, now: float) -> bool:
        for term in terms:  # noqa: SIM110  a generator takes twice the time
            if not term(packet, now):
                return False
        return True

    return every


def _any(terms: list[Predicate]) -> Predicate:
    if len(terms) == 1:
        return terms[0]

    def some(packet: Packet, now: float) -> bool:
        for term in terms:  # noqa: SIM110
            if term(packet, now):
                return True
        return False

    return some


def _membership(found: ValueSet) -> Callable[[object], bool]:
    """Whether a value is in the set, in the fastest way for its form."""
    match found:
        case Ranges(spans=((low, high),)):
            return lambda value: low <= value <= high  # type: ignore[operator]
        case Ranges() if found.limit <= 0xFFFF:
            return frozenset(n for lo, hi in found.spans for n in range(lo, hi + 1)).__contains__
        case Ranges() | Addresses() | Names():
            return found.__contains__  # type: ignore[return-value]


# A host: several policies.


@dataclass(frozen=True, slots=True)
class Visit:
    """One policy's turn with a packet at a hook."""

    hook: str
    policy: ir.Policy
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class _Stop:
    """One thing that a packet meets: a hook (`state` is None) or a policy there."""

    hook: str
    state: State | None = None


# Connection tracking, and where it keeps a new connection: before egress.
_TRACK: Final = _Stop("track")
_CONFIRM: Final = _Stop("confirm")
_Step = Callable[[Packet, float], Outcome]


def at_hook(policies: Iterable[ir.Policy], hook: str) -> list[ir.Policy]:
    """The policies at a hook (with its device) in the order they run: by priority, then as given."""
    return sorted((p for p in policies if hook in p.hooks), key=lambda p: p.priority)


@dataclass
class Host:
    """The policies of a traffic manager and what they learned; chance begins at `seed`."""

    policies: Sequence[ir.Policy]
    seed: int = 0
    do: Doer = nothing_done
    states: dict[str, State] = field(init=False)
    sets: dict[str, SetTable] = field(default_factory=dict)

    def __post_init__(self) -> None:
        random = Random(self.seed)
        self.states = {p.name: State(p, self.sets, random, self.do) for p in self.policies}
        self._conntrack = Conntrack() if any(p.tracks for p in self.policies) else None
        self._ways: dict[tuple[str, str | None, str | None], list[_Stop]] = {}
        self._steps: dict[tuple[str, str | None, str | None], list[_Step | _Stop]] = {}

    def _way(self, path: str, entering: str | None, leaving: str | None) -> "list[_Stop]":
        """All that a packet with these interfaces meets on a path, in order."""
        way = self._ways.get((path, entering, leaving))
        if way is not None:
            return way
        way = self._ways[path, entering, leaving] = []
        tracked = self._conntrack is None
        for kind in PATHS[path]:
            if kind == EGRESS:
                way.append(_CONFIRM)
            way.append(_Stop(kind))
            device = {INGRESS: entering, EGRESS: leaving}.get(kind)
            hook = f'{kind} "{device}"' if kind in (INGRESS, EGRESS) else kind
            for policy in at_hook(self.policies, hook):
                if not tracked and kind in TRACKING_HOOKS and policy.priority >= TRACKING:
                    way.append(_TRACK)
                    tracked = True
                way.append(_Stop(hook, self.states[policy.name]))
            if not tracked and kind in TRACKING_HOOKS:
                way.append(_TRACK)
                tracked = True
        if EGRESS not in PATHS[path]:
            way.append(_CONFIRM)
        return way

    def traverse(
        self,
        packet: Packet,
        path: str,
        now: float,
        *,
        told: bool = False,
        before: Callable[[str, Packet], None] | None = None,
    ) -> list[Visit]:
        """A packet past all policies on a path (a key of `PATHS`); a dropped one goes no further.

        Nothing is routed and the TTL stays, unless `before`, called ahead of each
        hook, does it. What one policy changes the next one sees.
        """
        visits: list[Visit] = []
        tracked: Tracked | None = None
        for stop in self._way(path, packet.input, packet.output):
            if stop is _TRACK:
                tracked = self._track(packet, now)
            elif stop is _CONFIRM:
                self._confirm(tracked, now)
            elif stop.state is not None:
                outcome = stop.state.step(packet, now, told=told)
                visits.append(Visit(stop.hook, stop.state.policy, outcome))
                if outcome.verdict != "accept":
                    return visits
            elif before is not None:
                before(stop.hook, packet)
        return visits

    def pass_on(self, packet: Packet, path: str, now: float) -> str:
        """Like `traverse`, but only the verdict comes of it: for many packets."""
        key = path, packet.input, packet.output
        steps = self._steps.get(key)
        if steps is None:
            tracking = (_TRACK, _CONFIRM) if self._conntrack is not None else ()
            steps = self._steps[key] = [
                stop if stop.state is None else stop.state.step
                for stop in self._way(*key)
                if stop in tracking or stop.state is not None
            ]
        tracked: Tracked | None = None
        for step in steps:
            if step is _TRACK:
                tracked = self._track(packet, now)
            elif step is _CONFIRM:
                self._confirm(tracked, now)
            else:
                verdict = step(packet, now).verdict  # type: ignore[operator]
                if verdict != "accept":
                    return verdict
        return "accept"

    def _confirm(self, tracked: Tracked | None, now: float) -> None:
        """What happens behind input and postrouting: a new connection is kept."""
        if tracked is not None and self._conntrack is not None:
            self._conntrack.confirm(tracked, now)

    def _track(self, packet: Packet, now: float) -> Tracked | None:
        if self._conntrack is None:
            return None
        tracked = self._conntrack.track(packet, now)
        packet.ct_state, packet.ct_direction = tracked.state, tracked.direction
        packet.connection = tracked.connection
        return tracked
