"""The checked policy: all names resolved, all values typed, nothing left to ask.

This is what the semantics run and what the backends lower. It knows neither
lark nor nftables. A comparison has become "the field's value lies in this set";
on a packet without the field that is false, whatever the set (the language's
logic is two-valued, and `Not` negates the result).
"""

from dataclasses import dataclass, field

from itmlang.actions import Action
from itmlang.fields import Field
from itmlang.source import Span
from itmlang.values import Ranges, ValueSet


@dataclass(frozen=True)
class Test:
    """The packet has the field, and its value lies in the set."""

    field: Field
    values: ValueSet
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
        return any(len(f.families()) > 1 for f in self.key)


@dataclass(frozen=True)
class FlowTest:
    """The packet has the flow's key, and what was logged before it lies in the set."""

    flow: Flow
    attribute: str  # "packets" or "bytes"
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


Condition = Test | Bits | FlowTest | Over | Not | And | Or


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


@dataclass(frozen=True)
class Count:
    flow: Flow
    span: Span


@dataclass(frozen=True)
class Policy:
    """One policy as it is loaded, with its parameters' values put in."""

    name: str
    hooks: tuple[str, ...]
    priority: int
    interest: And
    flows: tuple[Flow, ...]
    rules: tuple[ClassRule, ...]
    counts: tuple[Count, ...]
    process: dict[str, tuple[Step, ...]]
    span: Span
    parameters: dict[str, str] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order they first appear."""
        return tuple(dict.fromkeys(rule.name for rule in self.rules))
