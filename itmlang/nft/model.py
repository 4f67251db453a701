"""An nftables ruleset as data: what lowering makes, what the printer prints.

Rules hold their matches and statements as nftables text; everything that the
rest of itm needs to know about a ruleset (which chain hangs at which hook,
which counter counts which class, which set holds which flows) is data beside it.
"""

from dataclasses import dataclass, field
from typing import Final

from itmlang.control import Controller, Timer
from itmlang.links import Link
from itmlang.overlays import Overlay
from itmlang.source import Span

TABLE_PREFIX: Final = "itm_"
# Priority 0 of a policy: nftables' `mangle`, after connection tracking (-200) and
# before destination NAT (-100).
MANGLE: Final = -150


@dataclass(frozen=True)
class Rule:
    """`text` ends in a verdict or a statement; `span` is the policy's line behind it."""

    text: str
    span: Span
    label: str = ""  # the class that the rule is about, for its comment


@dataclass(frozen=True)
class BaseHook:
    """Where a base chain hangs; `priority` is the kernel's, `kind` nftables' chain type.

    The name has the device of an ingress or egress: `ingress "eth0"`.
    """

    name: str
    priority: int
    kind: str = "filter"


@dataclass
class Chain:
    """A chain. `role` is "" or, of a policy with packets for Python, "queue" (it hands packets
    to the queue `number`), "settle" (the base chain where they come back) or "beat"; or
    "tunnel" (it steers packets of the kernel's tunnel `number`), "via" (it has those that go by
    a neighbour of an overlay), or "control" (`variants`)."""

    name: str
    span: Span
    policy: str = ""  # "" for one that the policies of a table share
    hook: BaseHook | None = None
    rules: list[Rule] = field(default_factory=list)
    role: str = ""
    number: int = 0


@dataclass(frozen=True)
class Queue:
    """What a policy has in Python, and the queues that lead there.

    They are `many`, from the number `first` on. `entries` are classes with the step at
    which Python takes over, by their number in the class bits of the mark, from 1;
    `decisions` are what `once per connection` can come to, by the numbers after those.
    `calls` are the handlers, as `module:function`, with their places in the policy.
    `whole` says that all of the policy is there; the class bits then carry one of
    `TRACKED`. `length` are packets, `buffer` and `copy` bytes (None: as handlers ask).
    `encapsulates` tells that packets which come in are put into tunnels there,
    `decapsulates` that they are taken out. `kept` are the bits of the connection's mark
    that hold decisions. `part` is a checksum of all that is done there.
    """

    policy: str
    first: int
    many: int
    length: int
    buffer: int
    copy: int | None
    fails_open: bool
    whole: bool
    entries: tuple[tuple[str, int], ...]
    decisions: tuple[str, ...]
    calls: tuple[tuple[str, Span], ...]
    span: Span
    encapsulates: bool = False
    decapsulates: bool = False
    kept: int = 0
    part: int = 0


@dataclass(frozen=True)
class Tunnel:
    """A tunnel of the kernel's own, for a class: `number` is what the tunnel bits of the mark say.

    It leads to `destination` from `source` (0: as routing chooses), IPv4 integers. With
    `inward` it is the end of tunnels: what comes from `sources` (prefixes; none: anywhere) to
    `destinations` by `devices` (none: any).
    """

    policy: str
    name: str
    number: int
    span: Span
    inward: bool = False
    destination: int = 0
    source: int = 0
    sources: tuple[tuple[int, int], ...] = ()
    destinations: tuple[int, ...] = ()
    devices: tuple[str, ...] = ()

    def same_as(self, other: "Tunnel") -> bool:
        """Can both have the same number? It leads to one place; what comes in is one class's."""
        if self.inward or other.inward:
            return self.inward and other.inward and self._place == other._place
        return (self.destination, self.source) == (other.destination, other.source)

    @property
    def _place(self) -> tuple[str, str]:
        return self.policy, self.name


# What the class bits tell a policy that runs in Python as a whole of connection tracking:
# state and direction, by number, from 1. Without tracking it is the first.
TRACKED: Final = (
    ("invalid", ""), ("untracked", ""), ("new", "original"), ("established", "original"),
    ("established", "reply"), ("related", "original"), ("related", "reply"),
)  # fmt: skip


@dataclass(frozen=True)
class Counter:
    """A named counter of a policy.

    `kind` is "class", "uncounted" (a flow's packets that found no room), "unlearned"
    (a learned set's), "sampled", "recorded", "via" (went by a neighbour), "sent" and "back" (an
    overlay's TCP packets, by egress) or "unserved" (meant for Python).
    """

    name: str
    kind: str
    of: str
    span: Span
    policy: str


@dataclass(frozen=True)
class FlowSet:
    """A dynamic set with one element a flow.

    `role` is "count" (elements carry a counter; `key` names the fields), "meter" (what
    is left of a flow's packets or bytes until a threshold), "over" (the flows past one),
    "young" (those not older than an age), "bucket" and "recent" (of a rate, and the
    flows that went over it within a second), "connections" and "busy" (of a flow's
    connections, and the flows with too many), "limit" (the buckets of a limit for each
    flow), "control" (a map to the rules in force, see `variants`), "route" (a map from networks to
    the rules of the chosen neighbour), "stay" (one from marks of connections to those of a
    neighbour that works), "serving" (whether the runtime is alive) "learned" (a learned set's elements,
    `flow` is the set's name) or "networks" (those that an overlay has discovered).
    Of "stay", `threshold` is where the neighbour's number stands in a connection's mark.
    `statement` is what new elements hold; `attribute` and `threshold` are those of
    meter, over and young.
    `timeout` is in milliseconds; None for none, and `timed` tells whether elements
    may still bring their own.
    """

    name: str
    policy: str  # "" for a learned set: it is the table's
    flow: str
    role: str
    family: int  # 0: both
    key: tuple[str, ...]
    types: tuple[str, ...]
    expression: str
    size: int
    timeout: int | None
    span: Span
    timed: bool = True
    statement: str = ""
    attribute: str = ""
    threshold: int = 0

    @property
    def written(self) -> bool:
        """Does the runtime alone write it? No packet adds to it."""
        return self.is_map or self.role == "networks"

    @property
    def is_map(self) -> bool:
        """Is it a map to rules, which the runtime writes?"""
        return self.role in ("control", "route", "stay")


@dataclass(frozen=True)
class ValueSet:
    """A named set with its elements as nftables writes them; `type` is nftables' own.

    With `verdicts`, one for each element, it is a map to them. `spans` are the elements' own
    places, none where they stand together. `interval` tells whether some are ranges.
    """

    name: str
    type: str
    elements: tuple[str, ...]
    span: Span
    interval: bool = True
    verdicts: tuple[str, ...] = ()
    spans: tuple[Span, ...] = ()

    @property
    def entries(self) -> tuple[tuple[str, ...], ...]:
        """The elements, each with its verdict if it has one."""
        return tuple(zip(self.elements, self.verdicts or ("",) * len(self.elements), strict=True))

    @property
    def kind(self) -> str:
        """What nftables calls it."""
        return "map" if self.verdicts else "set"

    @property
    def types(self) -> str:
        """Its type as it is declared."""
        return f"{self.type} : verdict" if self.verdicts else self.type


@dataclass
class Table:
    """All that one policy brings into the kernel, or several that share a learned set.

    Then chains, counters and flow sets have their policy's name before a dot, and the
    table is called by the first of them (`title`), also when that one is taken away.
    """

    policies: tuple[str, ...]
    span: Span
    family: str = "inet"  # or "netdev"
    title: str = ""
    shared: bool = False
    counters: list[Counter] = field(default_factory=list)
    values: list[ValueSet] = field(default_factory=list)
    sets: list[FlowSet] = field(default_factory=list)
    chains: list[Chain] = field(default_factory=list)
    queues: list[Queue] = field(default_factory=list)
    tunnels: list[Tunnel] = field(default_factory=list)
    controllers: list[Controller] = field(default_factory=list)
    timers: list[Timer] = field(default_factory=list)
    overlays: list[Overlay] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.title = self.title or self.policies[0]
        self.shared = self.shared or len(self.policies) > 1

    @property
    def name(self) -> str:
        return TABLE_PREFIX + self.title

    @property
    def path(self) -> str:
        """The table as commands name it: `inet itm_edge`."""
        return f"{self.family} {self.name}"

    def prefix(self, policy: str) -> str:
        """What stands before a policy's names."""
        return f"{policy}." if self.shared else ""

    @property
    def base_chains(self) -> list[Chain]:
        return [chain for chain in self.chains if chain.hook is not None]


@dataclass(frozen=True)
class Ruleset:
    """The tables of a file, and the names of its policies in their order.

    The tables stand in the order of their first policies. `links` are scheduled beside them.
    """

    file: str
    tables: tuple[Table, ...]
    order: tuple[str, ...]
    links: tuple[Link, ...] = ()

    def table_of(self, policy: str) -> Table:
        return next(table for table in self.tables if policy in table.policies)


def duration(milliseconds: int) -> str:
    """A time as nft takes it: `1h30m`."""
    parts = []
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        number, milliseconds = divmod(milliseconds, size)
        if number:
            parts.append(f"{number}{unit}")
    return "".join(parts)
