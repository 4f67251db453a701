"""An nftables ruleset as data: what lowering makes, what the printer prints.

Rules hold their matches and statements as nftables text; everything that the
rest of itm needs to know about a ruleset (which chain hangs at which hook,
which counter counts which class, which set holds which flows) is data beside it.
"""

from dataclasses import dataclass, field
from typing import Final

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
    """Where a base chain hangs; `priority` is the kernel's."""

    name: str
    priority: int


@dataclass
class Chain:
    name: str
    span: Span
    hook: BaseHook | None = None
    rules: list[Rule] = field(default_factory=list)


@dataclass(frozen=True)
class Counter:
    """A named counter. `kind` is "class" or "uncounted" (a flow's packets that found no room)."""

    name: str
    kind: str
    of: str
    span: Span


@dataclass(frozen=True)
class FlowSet:
    """A dynamic set with one element a flow.

    `role` is "count" (elements carry a counter; `key` names the fields), "meter"
    (a further threshold of the same flow) or "over" (the flows past a threshold).
    `timeout` is in milliseconds, None for none.
    """

    name: str
    flow: str
    role: str
    family: int  # 0: both
    key: tuple[str, ...]
    types: tuple[str, ...]
    expression: str
    size: int
    timeout: int | None
    span: Span


@dataclass
class Table:
    """All that one policy brings into the kernel."""

    policy: str
    span: Span
    counters: list[Counter] = field(default_factory=list)
    sets: list[FlowSet] = field(default_factory=list)
    chains: list[Chain] = field(default_factory=list)

    @property
    def name(self) -> str:
        return TABLE_PREFIX + self.policy

    @property
    def base_chains(self) -> list[Chain]:
        return [chain for chain in self.chains if chain.hook is not None]


@dataclass(frozen=True)
class Ruleset:
    """The tables of a file, in the order of its policies."""

    file: str
    tables: tuple[Table, ...]
