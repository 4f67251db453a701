"""What an action is.

An action is one file: how it is written (`words`, `operand`), what nftables makes
of it (`lower`), what it does to a packet (`run`). It stands in the tuple of
`itmlang.actions`, and nothing else in the compiler names it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from itmlang.fields import EGRESS, HOOKS, INGRESS
from itmlang.packet import Packet
from itmlang.values import Ranges, Type


@dataclass(frozen=True)
class Lowered:
    """nftables rules, to stand one after the other, and the shared chains they jump to."""

    rules: tuple[str, ...] = ()
    chains: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Action:
    """One action with its operand (0 where it has none; an address is (family, integer)).

    `verdict` ("accept", "drop" or "reject") is how an action ends its policy; such an
    action is the last of its class. `hooks` are those where it can stand, `why` says
    why not elsewhere. `reroutes` tells that the packet's route may be another one then,
    `in_python` that nftables cannot say it, `kernels_own` why Python cannot do it, `defragments` that it needs fragments put together.
    """

    words: ClassVar[tuple[str, ...]]
    operand: ClassVar[Type | None] = None
    verdict: ClassVar[str] = ""
    hooks: ClassVar[tuple[str, ...]] = (INGRESS, *HOOKS, EGRESS)
    why: ClassVar[str] = ""
    reroutes: ClassVar[bool] = False
    in_python: ClassVar[bool] = False
    kernels_own: ClassVar[str] = ""
    defragments: ClassVar[bool] = False
    value: Any = 0

    @property
    def handler(self) -> str:
        """The function of the user's that it calls, as `module:function`, "" for none."""
        return ""

    @property
    def once(self) -> bool:
        """Is it done for a connection's first packet alone?"""
        return False

    def refusal(self) -> str:
        """Why the operand cannot be used, "" if it can."""
        return ""

    def lower(self, family: int, protocols: Ranges) -> Lowered | None:
        """The rules for packets of a family that have one of the protocols.

        None if the action is `in_python`. Rules that are the same for both
        families are taken once.
        """
        return Lowered()

    @property
    def ending(self) -> tuple[str, ...]:
        """The rules that give the verdict."""
        return (self.verdict,) if self.verdict else ()

    def run(self, packet: Packet) -> None:
        """Do to the packet what the rules do."""

    def __str__(self) -> str:
        operand = [] if self.operand is None else [self.operand.text(self.value)]
        return " ".join([*self.words, *operand])
