"""`set saddr A`, `set daddr A`: rewrite addresses of packets of A's family.

The kernel mends IPv4's header checksum and, for the addresses in the
pseudo-header, those of TCP, UDP, UDP-Lite and ICMPv6
(`nft_payload_l4csum_offset`). Not DCCP's: such packets are left alone.

Neither can it mend a checksum that is not there: a TCP fragment so small that it
ends before (RFC 3128) is left alone, too. Over IPv6 that comes by itself; over
IPv4 the kernel would have mended the header's checksum by then, and left the
address (`nft_payload_set_eval`), so there TCP has rules of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from itmlang import values
from itmlang.actions.action import Action, Lowered
from itmlang.packet import DCCP, TCP, Packet
from itmlang.values import IPV4, Ranges


def _lower(field: str, address: tuple[int, int], family: int, protocols: Ranges) -> Lowered:
    if address[0] != family:
        return Lowered()
    header = "ip" if family == IPV4 else "ip6"
    change = f"{header} {field} set {values.address_text(*address)}"
    return Lowered(tuple(f"{guard} {change}".strip() for guard in _guards(family, protocols)))


def _guards(family: int, protocols: Ranges) -> Iterator[str]:
    """Matches that together let all packets through whose checksums will be right."""
    apart = [TCP, DCCP] if family == IPV4 else [DCCP]
    names = [name for number, name in ((TCP, "tcp"), (DCCP, "dccp"))
             if number in apart and number in protocols]  # fmt: skip
    others = protocols.intersection(Ranges.of(255, [(n, n) for n in apart]).complement())
    if not others.empty:
        listed = names[0] if len(names) == 1 else "{ " + ", ".join(names) + " }"
        yield f"meta l4proto != {listed}" if names else ""
    if "tcp" in names:
        yield "meta l4proto tcp ip frag-off & 0x1fff != 0"
        yield "tcp checksum >= 0"  # it is there


@dataclass(frozen=True)
class SetSaddr(Action):
    words = ("set", "saddr")
    operand = values.ADDRESS
    reroutes = True

    def lower(self, family: int, protocols: Ranges) -> Lowered:
        return _lower("saddr", self.value, family, protocols)

    def run(self, packet: Packet) -> None:
        packet.set_source(self.value)


@dataclass(frozen=True)
class SetDaddr(Action):
    words = ("set", "daddr")
    operand = values.ADDRESS
    reroutes = True

    def lower(self, family: int, protocols: Ranges) -> Lowered:
        return _lower("daddr", self.value, family, protocols)

    def run(self, packet: Packet) -> None:
        packet.set_destination(self.value)
