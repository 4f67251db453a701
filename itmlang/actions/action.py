"""What an action is.

An action is one file: how it is written (`words`, `operand`), what nftables makes
of it (`lower`), what it does to a packet (`run`). It stands in the tuple of
`itmlang.actions`, and nothing else in the compiler names it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from itmlang.packet import Packet
from itmlang.values import Type


@dataclass(frozen=True)
class Lowered:
    """nftables rules, to stand one after the other, and the shared chains they jump to."""

    rules: tuple[str, ...] = ()
    chains: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Action:
    """One action with its operand (0 where it has none).

    `verdict` is the nftables verdict with which an action ends its policy; such
    an action is the last of its class.
    """

    words: ClassVar[tuple[str, ...]]
    operand: ClassVar[Type | None] = None
    verdict: ClassVar[str] = ""
    value: int = 0

    def lower(self, family: int) -> Lowered | None:
        """The rules for packets of a family; None where nftables has no way to say it."""
        raise NotImplementedError

    def run(self, packet: Packet) -> None:
        """Do to the packet what the rules do."""
        raise NotImplementedError

    def __str__(self) -> str:
        operand = [] if self.operand is None else [self.operand.text(self.value)]
        return " ".join([*self.words, *operand])
