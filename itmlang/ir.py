"""The checked policy: all names resolved, all values typed, nothing left to ask.

This is what the semantics run and what the backends lower. It knows neither
lark nor nftables. A comparison has become "the field's value lies in this set";
on a packet without the field that is false, whatever the set (the language's
logic is two-valued, and `Not` negates the result).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from itmlang.actions import Action
from itmlang.control import Controller, Timer
from itmlang.fields import Field
from itmlang.overlays import Overlay, is_via
from itmlang.source import Span
from itmlang.values import Ranges, Type, ValueSet


@dataclass(frozen=True, eq=False)
class NamedSet:
    """A set of values that has a name, so that rules can refer to it by that; with `inline` they
    say its values instead."""

    name: str
    type: Type
    values: ValueSet
    span: Span
    inline: bool = False


@dataclass(frozen=True, eq=False)
class LearnedSet:
    """A set that policies fill and empty while they run.

    `timeout` is in milliseconds, for additions that give no time of their own; None
    for ever. `size` bounds the elements (of one address family). `known` are IPv4 networks that
    are in it always: it is an overlay's then, which the runtime fills with networks.
    """

    name: str
    type: Type
    timeout: int | None
    size: int
    span: Span
    known: ValueSet | None = None


AnySet = NamedSet | LearnedSet


@dataclass(frozen=True)
class Test:
    """The packet has the field, and its value lies in the set.

    `named` is the set of which the test was written, if it was of one alone.
    """

    field: Field
    values: ValueSet
    span: Span
    named: NamedSet | None = None


@dataclass(frozen=True)
class Member:
    """The packet has the field, and its value is now in a learned set."""

    field: Field
    set: LearnedSet
    span: Span


@dataclass(frozen=True)
class Bits:
    """The packet has the field, and one of the mask's bits is set in it."""

    field: Field
    mask: int
    span: Span


@dataclass(frozen=True, eq=False)
class Flow:
    """A table of counters, one entry for each value of the key.

    `timeout` is in milliseconds since the entry was last counted, None for never.
    `size` bounds the entries of one address family.
    """

    name: str
    key: tuple[Field, ...]
    timeout: int | None
    size: int
    span: Span

    @property
    def by_address(self) -> bool:
        """Does the key hold an address, so that each family has a table of its own?"""
        return any(f.by_family for f in self.key)


@dataclass(frozen=True)
class FlowTest:
    """The packet has the flow's key, and what was logged before it lies in the set.

    `attribute` is "packets", "bytes", "age" (milliseconds), "connections",
    "packet_rate" or "byte_rate" (values of PACKET_RATE and RATE); of an age or a rate
    only one threshold is asked.
    """

    flow: Flow
    attribute: str
    values: Ranges
    span: Span


@dataclass(frozen=True)
class Over:
    """More than `threshold` was logged of the packet's flow before it.

    The simplifier's form of a `FlowTest`: it is what the kernel can look up. It
    is false where the packet lacks the flow's key.
    """

    flow: Flow
    attribute: str
    threshold: int
    span: Span


@dataclass(frozen=True)
class Not:
    term: "Condition"
    span: Span


@dataclass(frozen=True)
class And:
    terms: tuple["Condition", ...]
    span: Span


@dataclass(frozen=True)
class Or:
    terms: tuple["Condition", ...]
    span: Span


Condition = Test | Member | Bits | FlowTest | Over | Not | And | Or


@dataclass(frozen=True)
class ClassRule:
    """Packets for which the condition holds (None: all) belong to the class."""

    name: str
    condition: Condition | None
    span: Span


@dataclass(frozen=True)
class Step:
    """One action of a class."""

    action: Action
    span: Span

    @property
    def in_python(self) -> bool:
        return self.action.in_python


@dataclass(frozen=True, eq=False)
class Limit:
    """A token bucket for the packets of a class, or one for each entry of a flow.

    `amount` packets (or bytes, if `in_bytes`) come in every `seconds`; a packet that
    finds too little of them takes the steps `otherwise`. As in the kernel
    (net/netfilter/nft_limit.c), a bucket of packets holds `burst`, one of bytes holds
    `amount` + `burst`.
    """

    amount: int
    seconds: int
    in_bytes: bool
    burst: int
    flow: Flow | None
    otherwise: tuple["Step | Limit", ...]
    span: Span

    @property
    def in_python(self) -> bool:
        return any(step.in_python for step in self.otherwise)


Steps = tuple[Step | Limit, ...]


def verdict(steps: Steps) -> str:
    """The verdict with which steps end, "" if they leave it to what follows."""
    last = steps[-1] if steps else None
    return last.action.verdict if isinstance(last, Step) else ""


def python_part(steps: Steps, start: int = 0) -> int:
    """Where the part of the steps begins that runs in Python, from `start` on; their end if none."""
    return next((n for n in range(start, len(steps)) if steps[n].in_python), len(steps))


def handed_over(steps: Steps) -> Steps:
    """The steps that Python does: from the first that needs it on.

    Behind one that is done `once` for a connection the kernel goes on.
    """
    part = steps[python_part(steps) :]
    first = part[0] if part else None
    return part[:1] if isinstance(first, Step) and first.action.once else part


def every_step(steps: Steps) -> Iterator[Step]:
    """All actions of some steps, those of limits, too."""
    for step in steps:
        if isinstance(step, Limit):
            yield from every_step(step.otherwise)
        else:
            yield step


@dataclass(frozen=True)
class Queueing:
    """How packets reach Python.

    `number` queues, each with a worker of its own; `length` packets wait in each at most;
    `buffer` bytes has each socket; of each packet `copy` bytes are copied (None: as many
    as its handler asks for); `first` is the first queue's number (None: by what is done there).
    """

    number: int = 1
    length: int = 4096
    buffer: int = 8 << 20
    copy: int | None = None
    first: int | None = None
    span: Span | None = None  # None if the policy does not say

    @property
    def given(self) -> range:
        """The numbers of queues that the policy names."""
        return range(0) if self.first is None else range(self.first, self.first + self.number)


@dataclass(frozen=True)
class Count:
    flow: Flow
    span: Span


@dataclass(frozen=True)
class Sample:
    """Every `many`th packet of interest is copied to a netlink log group."""

    many: int
    group: int
    span: Span


@dataclass(frozen=True)
class Record:
    """Packets of interest are written to the kernel's log, at most `amount` in `seconds`."""

    prefix: str
    amount: int
    seconds: int
    span: Span


@dataclass(frozen=True)
class Addition:
    """The field's value goes into the set, for `timeout` milliseconds (None: the set's own)."""

    field: Field
    set: LearnedSet
    timeout: int | None
    condition: Condition | None
    span: Span


@dataclass(frozen=True)
class Removal:
    """The field's value leaves the set."""

    field: Field
    set: LearnedSet
    condition: Condition | None
    span: Span


@dataclass(frozen=True)
class Policy:
    """One policy as it is loaded, with its parameters' values put in.

    A hook is its name, with the device for `ingress` and `egress`: `ingress "eth0"`;
    `at` is where they are written. `process` has the actions of each class, and of packets
    that go by a neighbour (`itmlang.overlays.via`). `overlay` is the one whose own policy
    this is, `routes` are those that it routes by.
    """

    name: str
    hooks: tuple[str, ...]
    at: Span
    priority: int
    interest: And
    flows: tuple[Flow, ...]
    rules: tuple[ClassRule, ...]
    counts: tuple[Count, ...]
    notes: tuple[Sample | Record, ...]
    process: dict[str, Steps]
    updates: tuple[Addition | Removal, ...]
    span: Span
    parameters: dict[str, str] = field(default_factory=dict)
    in_python: bool = False  # `run python`: all of it
    fails_open: bool = True  # what becomes of packets for Python that nobody serves
    queueing: Queueing = Queueing()
    controllers: tuple[Controller, ...] = ()
    timers: tuple[Timer, ...] = ()
    tunnels_in_python: bool = False
    overlay: Overlay | None = None
    routes: tuple[Overlay, ...] = ()

    @property
    def ways(self) -> tuple[str, ...]:
        """What packets that go by a neighbour are called in `process`."""
        return tuple(filter(is_via, self.process))

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order they first appear."""
        return tuple(dict.fromkeys(rule.name for rule in self.rules))

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """All conditions: the interest, the classes', the updates'."""
        asked = (*self.rules, *self.updates)
        return (self.interest, *(c.condition for c in asked if c.condition is not None))

    @property
    def hands_over(self) -> bool:
        """Are there packets for Python?"""
        return self.in_python or any(map(handed_over, self.process.values()))

    @property
    def tracks(self) -> bool:
        """Does the policy name anything that connection tracking tells or keeps?"""
        if any(s.action.once for steps in self.process.values() for s in every_step(steps)):
            return True
        if any(field.tracked for flow in self.flows for field in flow.key):
            return True
        return any(
            leaf.attribute == "connections"
            if isinstance(leaf, FlowTest | Over)
            else leaf.field.tracked
            for condition in self.conditions
            for leaf in leaves(condition)
        )

    @property
    def learned(self) -> tuple[LearnedSet, ...]:
        """The learned sets that the policy asks or changes, sorted by name."""
        asked = [
            leaf.set for c in self.conditions for leaf in leaves(c) if isinstance(leaf, Member)
        ]
        changed = [change.set for change in self.updates]
        return tuple(sorted(dict.fromkeys([*asked, *changed]), key=lambda one: one.name))


def leaves(condition: Condition | None) -> Iterator[Test | Member | Bits | FlowTest | Over]:
    """The tests of a condition, from left to right; negated ones, too."""
    left = [] if condition is None else [condition]
    while left:
        match left.pop():
            case And() | Or() as node:
                left += reversed(node.terms)
            case Not() as node:
                left.append(node.term)
            case leaf:
                yield leaf
