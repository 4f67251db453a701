"""`set tos NAME` and `unset tos NAME`: the types of service of RFC 1349, as in the paper's figure 11.

Setting: a packet that has the bit is untouched; any other gets exactly this
type of service. Unsetting: a packet that has the bit loses all three; any other
is untouched. Precedence and ECN are kept, so the type of service is the lower
half of the DSCP (three bits) and the precedence its upper half.

nftables cannot compute a DSCP from itself on every release (1.0.6 wants a
constant), and a raw write would leave the IPv4 checksum wrong. So for IPv4 a
verdict map on the DSCP leads to one constant `ip dscp set` for each precedence;
it maps only packets that need a change. IPv6 has no header checksum, there one
raw rule does it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from itmlang import values
from itmlang.actions.action import Action, Lowered
from itmlang.packet import Packet
from itmlang.values import IPV4, Ranges

_TOS_BITS = 0x1C  # of the TOS byte; the paper's 0x02 is ECN today


def _changes(wanted: Callable[[int], bool], service: int) -> Iterator[tuple[str, str]]:
    """(DSCP interval, chain that writes the new DSCP), for each run of DSCPs that change."""
    for precedence in range(0, 64, 8):
        matching = Ranges.of(63, [(precedence | n,) * 2 for n in range(8) if wanted(n << 2)])
        for lo, hi in matching.spans:
            interval = f"{lo:#04x}" if lo == hi else f"{lo:#04x}-{hi:#04x}"
            yield interval, f"dscp_{precedence | service:#04x}"


def _lower_ipv4(wanted: Callable[[int], bool], tos: int) -> Lowered:
    changes = list(_changes(wanted, tos >> 2))
    entries = ", ".join(f"{interval} : jump {chain}" for interval, chain in changes)
    chains = {chain: (f"ip dscp set {chain.removeprefix('dscp_')}",) for _, chain in changes}
    return Lowered((f"ip dscp vmap {{ {entries} }}",), chains)


@dataclass(frozen=True)
class SetTos(Action):
    words = ("set", "tos")
    operand = values.TOS_BIT

    def lower(self, family: int, protocols: Ranges) -> Lowered:
        if family == IPV4:
            return _lower_ipv4(lambda tos: not tos & self.value, self.value)
        # The traffic class is bits 4 to 11 of the header, hence the shift by 4.
        bit, others = self.value << 4, 0xFFFF & ~(_TOS_BITS << 4)
        test = f"meta nfproto ipv6 @nh,0,16 & {bit:#06x} == 0"
        return Lowered((f"{test} @nh,0,16 set @nh,0,16 & {others:#06x} | {bit:#06x}",))

    def run(self, packet: Packet) -> None:
        if not packet.tos & self.value:
            packet.set_tos(packet.tos & ~_TOS_BITS | self.value)


@dataclass(frozen=True)
class UnsetTos(Action):
    words = ("unset", "tos")
    operand = values.TOS_BIT

    def lower(self, family: int, protocols: Ranges) -> Lowered:
        if family == IPV4:
            return _lower_ipv4(lambda tos: bool(tos & self.value), 0)
        bit, others = self.value << 4, 0xFFFF & ~(_TOS_BITS << 4)
        test = f"meta nfproto ipv6 @nh,0,16 & {bit:#06x} != 0"
        return Lowered((f"{test} @nh,0,16 set @nh,0,16 & {others:#06x}",))

    def run(self, packet: Packet) -> None:
        if packet.tos & self.value:
            packet.set_tos(packet.tos & ~_TOS_BITS)
