"""`set sport N`, `set dport N`: rewrite ports; the transport's checksum follows.

nftables mends the checksums of TCP, UDP and SCTP (not of DCCP and UDP-Lite, whose
packets are left alone). A UDP checksum of zero means "none" over IPv4 and stays:
there the port is written raw, past nftables' arithmetic. SCTP's is computed anew
over the packet (`nft_payload_csum_sctp`), which for a fragment would be wrong: the
fragments are left alone.
"""

from dataclasses import dataclass
from typing import Final

from itmlang import values
from itmlang.actions.action import Action, Lowered
from itmlang.packet import SCTP, TCP, UDP, Packet
from itmlang.values import IPV4, Ranges

_PLACES: Final = {"sport": 0, "dport": 16}  # bits into the transport header


def _lower(field: str, port: int, family: int, protocols: Ranges) -> Lowered:
    rules = []
    if TCP in protocols:
        rules.append(f"tcp {field} set {port}")
    if UDP in protocols:
        rules.append(f"udp checksum 0 @th,{_PLACES[field]},16 set {port}")
        rules.append(f"udp checksum != 0 udp {field} set {port}")
    if SCTP in protocols:
        whole = (
            "ip frag-off & 0x3fff == 0" if family == IPV4
            else "meta nfproto ipv6 exthdr frag missing"
        )  # fmt: skip
        rules.append(f"{whole} sctp {field} set {port}")
    return Lowered(tuple(rules))


@dataclass(frozen=True)
class SetSport(Action):
    words = ("set", "sport")
    operand = values.PORT

    def lower(self, family: int, protocols: Ranges) -> Lowered:
        return _lower("sport", self.value, family, protocols)

    def run(self, packet: Packet) -> None:
        packet.set_source_port(self.value)


@dataclass(frozen=True)
class SetDport(Action):
    words = ("set", "dport")
    operand = values.PORT

    def lower(self, family: int, protocols: Ranges) -> Lowered:
        return _lower("dport", self.value, family, protocols)

    def run(self, packet: Packet) -> None:
        packet.set_destination_port(self.value)
