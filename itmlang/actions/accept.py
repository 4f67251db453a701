"""`accept`: done with this policy; later policies and other tables still see the packet."""

from dataclasses import dataclass

from itmlang.actions.action import Action, Lowered
from itmlang.packet import Packet


@dataclass(frozen=True)
class Accept(Action):
    words = ("accept",)
    verdict = "accept"

    def lower(self, family: int) -> Lowered:
        return Lowered()

    def run(self, packet: Packet) -> None:
        pass
