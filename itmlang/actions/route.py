"""`route by OVERLAY`: the packet goes through the best of the overlay's neighbours, or directly.

Which one that is follows from probes: it stands in a map of the kernel's, from networks to the
rules of a neighbour, that the runtime writes. What came out of a tunnel goes on directly, so
that no packet circles.
"""

from dataclasses import dataclass

from itmlang.actions.action import Action, Lowered
from itmlang.packet import Packet
from itmlang.values import Ranges


@dataclass(frozen=True)
class RouteBy(Action):
    """`value` is the overlay's name."""

    words = ("route", "by")
    hooks = ("prerouting", "output")
    why = "there the packet's way is chosen already"
    verdict = "accept"
    reroutes = True
    kernels_own = "the chosen way stands in a map of the kernel's; `run python` in the overlay has Python encapsulate"

    @property
    def overlay(self) -> str:
        return str(self.value)

    def lower(self, family: int, protocols: Ranges) -> Lowered | None:
        return Lowered()

    def run(self, packet: Packet) -> None:
        """Nothing that is known without the machine: until a better path is found, it is the
        direct one."""

    def __str__(self) -> str:
        return f"route by {self.value}"
