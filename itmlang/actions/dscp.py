"""`set dscp X`: write the DSCP (RFC 2474) of either family; ECN is kept."""

from dataclasses import dataclass

from itmlang import values
from itmlang.actions.action import Action, Lowered
from itmlang.fields import FIELDS
from itmlang.packet import Packet
from itmlang.values import IPV4, Ranges


@dataclass(frozen=True)
class SetDscp(Action):
    words = ("set", "dscp")
    operand = values.DSCP

    def lower(self, family: int, protocols: Ranges) -> Lowered:
        # nftables fixes the IPv4 header checksum for `ip dscp set`, and only because
        # it knows the field: a raw payload write would leave it wrong.
        header = "ip" if family == IPV4 else "ip6"
        return Lowered((f"{header} dscp set {FIELDS['dscp'].nft_value(self.value)}",))

    def run(self, packet: Packet) -> None:
        packet.set_dscp(self.value)
