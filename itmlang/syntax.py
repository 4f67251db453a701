"""The syntax tree: what was written, with its place, and nothing about its meaning.

Frozen dataclasses; every node has the span it came from. Names are not looked
up here and values have no types yet.
"""

from dataclasses import dataclass
from fractions import Fraction

from itmlang.source import Source, Span


@dataclass(frozen=True)
class Name:
    span: Span
    text: str


# Values.


@dataclass(frozen=True)
class Number:
    """A number, with the unit that stood behind it ("" for none)."""

    span: Span
    value: int | Fraction
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
class SetName:
    """`@name`, without its sign."""

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


Value = Number | Address | Text | Word | SetName | Sum | Interval | Listing


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
class Asserted:
    """A field alone: it is true (`fragment`)."""

    span: Span
    field: FieldName


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


Condition = Comparison | Asserted | Negation | AllOf | AnyOf


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
class SizeOption:
    """How long and how many entries a table holds."""

    span: Span
    name: str  # "timeout" or "max"
    value: Value


@dataclass(frozen=True)
class Flow:
    span: Span
    name: Name
    key: tuple[FieldName, ...]
    options: tuple[SizeOption, ...]


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
class Sample:
    """`sample ONE in MANY group GROUP`."""

    span: Span
    one: Value
    many: Value
    group: Value | None


@dataclass(frozen=True)
class Record:
    """`record "prefix" at most RATE`."""

    span: Span
    prefix: Text
    rate: Value | None


@dataclass(frozen=True)
class Log:
    span: Span
    entries: tuple[Count | Sample | Record, ...]


@dataclass(frozen=True)
class Action:
    """`words` names the action (`set tos`, `drop`); `value` is its operand, if any."""

    span: Span
    words: tuple[str, ...]
    value: Value | None


@dataclass(frozen=True)
class Call:
    """`call "module:function"`, `once` for each connection."""

    span: Span
    target: Text
    once: bool


@dataclass(frozen=True)
class Encapsulate:
    """`encapsulate to ADDRESS from ADDRESS`; without `source` the route chooses it."""

    span: Span
    target: Value
    source: Value | None


@dataclass(frozen=True)
class Limit:
    """`limit RATE burst N per FLOW else { … }`; `otherwise` is None without an `else`."""

    span: Span
    rate: Value
    burst: Value | None
    flow: Name | None
    otherwise: tuple["ActionNode", ...] | None


@dataclass(frozen=True)
class IntoLink:
    """`priority LINK.CLASS`."""

    span: Span
    target: FieldName


@dataclass(frozen=True)
class Route:
    """`route by OVERLAY`."""

    span: Span
    overlay: Name


ActionNode = Action | Call | Encapsulate | IntoLink | Route | Limit


@dataclass(frozen=True)
class ClassBlock:
    span: Span
    name: Name
    actions: tuple[ActionNode, ...]


@dataclass(frozen=True)
class Process:
    span: Span
    blocks: tuple[ClassBlock, ...]


@dataclass(frozen=True)
class Addition:
    """`add FIELD to @set for DURATION when CONDITION`."""

    span: Span
    field: FieldName
    set: SetName
    duration: Value | None
    condition: Condition | None


@dataclass(frozen=True)
class Removal:
    """`remove FIELD from @set when CONDITION`."""

    span: Span
    field: FieldName
    set: SetName
    condition: Condition | None


@dataclass(frozen=True)
class Update:
    span: Span
    changes: tuple[Addition | Removal, ...]


@dataclass(frozen=True)
class Run:
    span: Span
    where: Name


@dataclass(frozen=True)
class Fail:
    span: Span
    mode: Name


@dataclass(frozen=True)
class Queues:
    """`queues N length N buffer SIZE copy SIZE from N`: how packets reach Python.

    Each option is its word and its value.
    """

    span: Span
    number: Value
    options: tuple[tuple[Name, Value], ...]


# Controllers and timers.


@dataclass(frozen=True)
class Measure:
    """`wan.bulk.backlog`, `rtt 192.0.2.1`: what is measured, and of whom if it is no name."""

    span: Span
    name: FieldName
    of: Value | None


@dataclass(frozen=True)
class Gain:
    """`kp 0.5`: a setting of a controller's law, or one that all have."""

    span: Span
    name: Name
    negative: bool
    value: Value


@dataclass(frozen=True)
class Bounds:
    """`within 2-200`."""

    span: Span
    value: Value


@dataclass(frozen=True)
class Dry:
    """`dry run`: decisions are logged, nothing is written."""

    span: Span


@dataclass(frozen=True)
class Controller:
    """`WRITTEN every PERIOD toward MEASURE = TARGET with LAW …`.

    `law` is a name, or the function of the user's as a text.
    """

    span: Span
    written: FieldName
    period: Value
    measure: Measure
    target: Value
    law: Name | Text
    options: tuple[Gain | Bounds | Dry, ...]


@dataclass(frozen=True)
class Timer:
    """`every PERIOD call "module:function"`."""

    span: Span
    period: Value
    target: Text


@dataclass(frozen=True)
class Control:
    span: Span
    entries: tuple[Controller | Timer, ...]


Statement = (
    At | Priority | Interest | Flow | Classify | Log | Process | Update | Control | Run | Fail
    | Queues
)  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """`name: type = default within bounds`."""

    span: Span
    name: Name
    type: Name
    default: Value | None
    bounds: Value | None


@dataclass(frozen=True)
class Policy:
    span: Span
    name: Name
    parameters: tuple[Parameter, ...]
    statements: tuple[Statement, ...]


# The other things of a file.


@dataclass(frozen=True)
class Include:
    span: Span
    path: Text


@dataclass(frozen=True)
class SetDeclaration:
    """A named set: its values, the file they are in, or the options of one that is learned."""

    span: Span
    name: Name
    type: Name
    content: Value | Text | tuple[SizeOption, ...]
    from_file: bool


@dataclass(frozen=True)
class Argument:
    """`name = value`, or a value by its position."""

    span: Span
    name: Name | None
    value: Value


@dataclass(frozen=True)
class Use:
    """`use POLICY(arguments) as INSTANCE { … }`."""

    span: Span
    policy: Name
    arguments: tuple[Argument, ...]
    instance: Name | None
    statements: tuple[At | Priority | Interest, ...]


@dataclass(frozen=True)
class LinkInterface:
    """`interface "eth1"`, also `ingress`."""

    span: Span
    interface: Text
    ingress: bool


@dataclass(frozen=True)
class LinkRate:
    span: Span
    value: Value


@dataclass(frozen=True)
class LinkOtherwise:
    """`otherwise CLASS`: where packets go of which nobody says more."""

    span: Span
    name: Name


@dataclass(frozen=True)
class ClassSetting:
    """`priority 0`, `at least 1 mbit`, `queue 100 packets`; `name` is the words."""

    span: Span
    name: str
    value: Value


@dataclass(frozen=True)
class LinkClass:
    span: Span
    name: Name
    settings: tuple[ClassSetting, ...]


@dataclass(frozen=True)
class Link:
    """`link NAME { … }`: a scheduled interface."""

    span: Span
    name: Name
    lines: tuple[LinkInterface | LinkRate | LinkOtherwise | LinkClass, ...]


@dataclass(frozen=True)
class OverlaySelf:
    """`self ADDRESS`: this traffic manager's own."""

    span: Span
    value: Value


@dataclass(frozen=True)
class OverlayNeighbor:
    span: Span
    name: Name
    value: Value


@dataclass(frozen=True)
class OverlayDestination:
    """`destination PREFIX at EGRESS`."""

    span: Span
    prefixes: Value
    egress: Value


@dataclass(frozen=True)
class OverlayProbe:
    """`probe every T timeout T lost after K of N`."""

    span: Span
    every: Value
    timeout: Value | None
    lost: Value | None
    of: Value | None


@dataclass(frozen=True)
class OverlayChoose:
    """`choose by MEASURE margin P hold T`."""

    span: Span
    measure: Name
    margin: Value | None
    hold: Value | None


@dataclass(frozen=True)
class OverlayKey:
    """`key from "FILE"`."""

    span: Span
    path: Text


@dataclass(frozen=True)
class OverlayPort:
    span: Span
    value: Value


@dataclass(frozen=True)
class OverlaySticky:
    span: Span


@dataclass(frozen=True)
class OverlayDiscover:
    """`discover max N`."""

    span: Span
    most: Value | None


OverlayLine = (
    OverlaySelf | OverlayNeighbor | OverlayDestination | OverlayProbe | OverlayChoose | OverlayKey
    | OverlayPort | OverlaySticky | OverlayDiscover | Run
)  # fmt: skip


@dataclass(frozen=True)
class Overlay:
    """`overlay NAME { … }`: traffic managers that send packets by one another."""

    span: Span
    name: Name
    lines: tuple[OverlayLine, ...]


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
    """`kind` is "class", "untouched", a verdict or a field's name."""

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


# Tests in the file.


@dataclass(frozen=True)
class TestPolicy:
    """`policy NAME(arguments)`: what the test is about."""

    span: Span
    name: Name
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Path:
    """The packets that follow are forwarded, for this host (`in`) or from it (`out`)."""

    span: Span
    name: Name


@dataclass(frozen=True)
class Wait:
    span: Span
    value: Value


@dataclass(frozen=True)
class Test:
    span: Span
    name: Text
    lines: tuple[TestPolicy | Path | Wait | Send, ...]


Item = Include | SetDeclaration | Policy | Use | Link | Overlay | Test


@dataclass(frozen=True)
class File:
    """A policy file as written, its items in order."""

    source: Source
    items: tuple[Item, ...]
