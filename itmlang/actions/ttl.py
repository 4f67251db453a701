"""`set ttl N`: write the TTL of IPv4, the hop limit of IPv6."""

from dataclasses import dataclass

from itmlang import values
from itmlang.actions.action import Action, Lowered
from itmlang.packet import Packet
from itmlang.values import IPV4, Ranges


@dataclass(frozen=True)
class SetTtl(Action):
    words = ("set", "ttl")
    operand = values.OCTET

    def lower(self, family: int, protocols: Ranges) -> Lowered:
        field = "ip ttl" if family == IPV4 else "ip6 hoplimit"
        return Lowered((f"{field} set {self.value}",))

    def run(self, packet: Packet) -> None:
        packet.set_ttl(self.value)
