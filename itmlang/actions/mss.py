"""`set tcp.mss N`: lower TCP's maximum segment size option (RFC 9293 section 3.7.1).

The kernel writes it only where it is larger (`nft_exthdr_tcp_set_eval`): raising it
would stall connections. It gets TCP's checksum wrong where the option begins at an odd
place, behind a single NOP (`inet_proto_csum_replace2` there knows whole words only), and
nothing in nftables could mend it. So the even places are tried one by one; a packet with
the option at an odd one is left alone. Only a packet whose option is too large comes
that far, which is the first one of a connection.
"""

from dataclasses import dataclass
from typing import Final

from itmlang import values
from itmlang.actions.action import Action, Lowered
from itmlang.packet import Packet
from itmlang.values import Ranges

# Where the option can begin, in bytes into TCP's header, and how it does: its kind and length.
_EVEN_PLACES: Final = range(20, 57, 2)
_BEGINNING: Final = 0x0204


@dataclass(frozen=True)
class SetMss(Action):
    words = ("set", "tcp.mss")
    operand = values.MSS

    def lower(self, family: int, protocols: Ranges) -> Lowered:
        chain, change = f"mss_{self.value}", f"tcp option maxseg size set {self.value}"
        tried = (f"@th,{place * 8},16 {_BEGINNING:#06x} {change}" for place in _EVEN_PLACES)
        larger = f"tcp option maxseg size > {self.value} jump {chain}"
        return Lowered((larger,), {chain: tuple(tried)})

    def run(self, packet: Packet) -> None:
        packet.set_tcp_mss(self.value)
