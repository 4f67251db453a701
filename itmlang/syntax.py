"""The syntax tree: what was written, with its place, and nothing about its meaning.

Frozen dataclasses; every node has the span it came from. Names are not looked
up here and values have no types yet.
"""

from dataclasses import dataclass

from itmlang.source import Source, Span


@dataclass(frozen=True)
class Name:
    span: Span
    text: str


# Values.


@dataclass(frozen=True)
class Number:
    """An integer, with the unit that stood behind it ("" for none)."""

    span: Span
    value: int
    unit: str = ""


@dataclass(frozen=True)
class Address:
    """An IPv4 or IPv6 address or prefix, not yet checked."""

    span: Span
    text: str


@dataclass(frozen=True)
class Text:
    """A quoted string, without its quotes."""

    span: Span
    text: str


@dataclass(frozen=True)
class Word:
    """A parameter or the name of a value (`http`, `ef`, `minimize-delay`)."""

    span: Span
    text: str


@dataclass(frozen=True)
class Sum:
    span: Span
    terms: tuple["Value", ...]


@dataclass(frozen=True)
class Interval:
    span: Span
    low: "Value"
    high: "Value"


@dataclass(frozen=True)
class Listing:
    span: Span
    items: tuple["Value", ...]


Value = Number | Address | Text | Word | Sum | Interval | Listing


# Conditions.


@dataclass(frozen=True)
class FieldName:
    """A field as written: `saddr`, `tcp.flags`, `conn.packets`."""

    span: Span
    text: str


@dataclass(frozen=True)
class Comparison:
    span: Span
    field: FieldName
    operator: str  # one of == != < <= > >= in has
    value: Value


@dataclass(frozen=True)
class Negation:
    span: Span
    term: "Condition"


@dataclass(frozen=True)
class AllOf:
    span: Span
    terms: tuple["Condition", ...]


@dataclass(frozen=True)
class AnyOf:
    span: Span
    terms: tuple["Condition", ...]


Condition = Comparison | Negation | AllOf | AnyOf


# The statements of a policy.


@dataclass(frozen=True)
class At:
    span: Span
    hooks: tuple[Name, ...]


@dataclass(frozen=True)
class Priority:
    span: Span
    value: Value
    negative: bool


@dataclass(frozen=True)
class InterestLine:
    span: Span
    excluded: bool
    field: FieldName
    value: Value


@dataclass(frozen=True)
class Interest:
    span: Span
    lines: tuple[InterestLine, ...]


@dataclass(frozen=True)
class FlowOption:
    span: Span
    name: str  # "timeout" or "max"
    value: Value


@dataclass(frozen=True)
class Flow:
    span: Span
    name: Name
    key: tuple[FieldName, ...]
    options: tuple[FlowOption, ...]


@dataclass(frozen=True)
class ClassRule:
    """`NAME when CONDITION`, or `NAME` alone: otherwise."""

    span: Span
    name: Name
    condition: Condition | None


@dataclass(frozen=True)
class Classify:
    span: Span
    rules: tuple[ClassRule, ...]


@dataclass(frozen=True)
class Count:
    span: Span
    flow: Name


@dataclass(frozen=True)
class Log:
    span: Span
    counts: tuple[Count, ...]


@dataclass(frozen=True)
class Action:
    """`words` names the action (`set tos`, `drop`); `value` is its operand, if any."""

    span: Span
    words: tuple[str, ...]
    value: Value | None


@dataclass(frozen=True)
class ClassBlock:
    span: Span
    name: Name
    actions: tuple[Action, ...]


@dataclass(frozen=True)
class Process:
    span: Span
    blocks: tuple[ClassBlock, ...]


@dataclass(frozen=True)
class Run:
    span: Span
    where: Name


@dataclass(frozen=True)
class Fail:
    span: Span
    mode: Name


Statement = At | Priority | Interest | Flow | Classify | Log | Process | Run | Fail


@dataclass(frozen=True)
class Parameter:
    span: Span
    name: Name
    type: Name
    default: Value | None


@dataclass(frozen=True)
class Policy:
    span: Span
    name: Name
    parameters: tuple[Parameter, ...]
    statements: tuple[Statement, ...]


@dataclass(frozen=True)
class File:
    source: Source
    policies: tuple[Policy, ...]


# Packets, for `itmc explain` and tests.


@dataclass(frozen=True)
class Endpoint:
    span: Span
    address: Address
    port: Number | None


@dataclass(frozen=True)
class PacketOption:
    span: Span
    name: str
    value: Value


@dataclass(frozen=True)
class PacketText:
    span: Span
    protocol: Name
    source: Endpoint
    destination: Endpoint
    options: tuple[PacketOption, ...]


@dataclass(frozen=True)
class Expectation:
    """`kind` is "class", "untouched", "drop" or a field's name."""

    span: Span
    kind: str
    policy: Name | None = None
    name: Name | None = None
    value: Value | None = None


@dataclass(frozen=True)
class Send:
    span: Span
    count: Number
    packet: PacketText
    expectations: tuple[Expectation, ...]
