"""`set mark N`: write the packet mark, but for the bits that the compiler keeps for itself."""

from dataclasses import dataclass

from itmlang import values
from itmlang.actions.action import Action, Lowered
from itmlang.marks import KEPT
from itmlang.packet import Packet
from itmlang.values import Ranges


@dataclass(frozen=True)
class SetMark(Action):
    words = ("set", "mark")
    operand = values.NUMBER
    reroutes = True

    def refusal(self) -> str:
        return f"the bits {KEPT:#x} of the mark are itm's own" if self.value & KEPT else ""

    def lower(self, family: int, protocols: Ranges) -> Lowered:
        return Lowered((f"meta mark set meta mark & {KEPT:#010x} | {self.value:#x}",))

    def run(self, packet: Packet) -> None:
        packet.mark = packet.mark & KEPT | self.value

    def __str__(self) -> str:
        return f"set mark {self.value:#x}"
