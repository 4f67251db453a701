"""IPv4 within IPv4 (RFC 2003) on bytes: into a tunnel, out of it, and the errors it may cause.

Strategy: what a tunnel's outer headers have in common is added up once, and both
headers are written by one `struct` call. The checksum of RFC 1071 needs no loop: 65536
leaves the remainder 1 when divided by 65535, so a header, read as one number, leaves
the same remainder as the sum of its 16-bit words. The bytes are those that the kernel's
programs make (`runtime/tunnels.py`); tests hold the two to it.

Packets come complete: the kernel finishes checksums that it left to the hardware, and
cuts what is longer than the MTU, before it queues a packet (unless the queue asks for
uncut ones), so nothing of that is done here. What is not IPv4 is refused and meant to
be left alone, IPv6 too.
"""

import struct
from dataclasses import dataclass, field
from typing import Final

from itmlang.packet import ICMP, internet_checksum

PROTOCOL: Final = 4  # IPv4 as what an IPv4 packet carries (IANA protocol numbers)
HEADER: Final = 20  # bytes of an outer header: it has no options
TTL: Final = 64  # of an outer packet on the wire (RFC 1700)
DONT_FRAGMENT: Final = 0x4000
FRAGMENT: Final = 0x3FFF  # more fragments follow, or this is not the first

_LONGEST: Final = 0xFFFF
# A header as far as it has no options; two of them, the second up to its checksum.
_FIXED: Final = struct.Struct("!BBHHHBBHII")
_BOTH: Final = struct.Struct("!BBHHHBBHIIBBHHHBBH")
_UNCHANGED: Final = 12  # where in the inner header nothing is written any more

# RFC 792: the errors, about which there is no error (RFC 1122 section 3.2.2).
_ICMP_ERRORS: Final = frozenset({3, 4, 5, 11, 12})
_UNREACHABLE, _FRAGMENTATION_NEEDED, _TIME_EXCEEDED = 3, 4, 11
_INTERNETWORK_CONTROL: Final = 0xC0  # RFC 1812 section 4.3.2.5
_ICMP_LONGEST: Final = 576  # RFC 1812 section 4.3.2.3
_LOOPBACK, _MULTICAST = 127, 224  # the first byte of such addresses, or the least one


@dataclass(frozen=True)
class TooBig:
    """The packet must not be fragmented and is longer than the `mtu` bytes that the tunnel takes."""

    mtu: int


@dataclass(frozen=True)
class Expired:
    """The packet's time to live ends here."""


@dataclass(frozen=True)
class Refused:
    """The packet must not go into the tunnel, or has not come out of one."""

    reason: str


_NO_IPV4: Final = Refused("it is no sound IPv4 packet")
_FROM_FAR_END: Final = Refused("it comes from the tunnel's other end (RFC 2003 section 3.2)")
_FROM_HERE: Final = Refused("it comes from this end of the tunnel (RFC 2003 section 3.2)")
_AGAIN: Final = Refused("it has been in this tunnel before")
_DEAD: Final = Refused("its time to live is zero (RFC 2003 section 3.1)")
_TOO_LONG: Final = Refused("no IPv4 packet can carry one as long")


@dataclass(frozen=True)
class Tunnel:
    """From an address of this machine to the tunnel's other end; IPv4 addresses as integers."""

    source: int
    destination: int
    # What is the same in all outer headers, added up.
    _sum: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_sum", 0x4500 + PROTOCOL + self.source + self.destination)

    def encapsulate(
        self, inner: bytes, mtu: int, forwarded: bool
    ) -> bytes | TooBig | Expired | Refused:
        """The packet within one to the tunnel's other end, or why it does not go there.

        `mtu` is what the path to the other end takes, in bytes of the outer packet. A
        packet that is `forwarded` is one caught before the kernel has routed it: its time
        to live is counted down here, and the outer one's will be by the kernel, so that
        it leaves with 64. One that starts at this machine keeps its own.

        TOS and ECN are copied (RFC 6040 section 4.1, normal mode), and so is "don't
        fragment". A longer packet that may be fragmented goes in whole; the kernel
        fragments the outer one. What is a fragment already is not fragmented again on its way
        (RFC 2003 section 3.1 leaves that to us): at the other end a program may take some out,
        and the stack the rest, and they would not find together. Options stay inside.
        Bytes behind the packet's end go.
        """
        if len(inner) < HEADER:
            return _NO_IPV4
        first, tos, total, identity, fragment, ttl, protocol, check, source, destination = (
            _FIXED.unpack_from(inner)
        )
        if not (0x45 <= first <= 0x4F and (first & 15) * 4 <= total <= len(inner)):
            return _NO_IPV4
        if source == self.destination:
            return _FROM_FAR_END
        if source == self.source:
            if forwarded:
                return _FROM_HERE
            if protocol == PROTOCOL and destination == self.destination:
                return _AGAIN
        outer_ttl = TTL
        if forwarded:
            if ttl <= 1:
                return Expired()
            ttl, check, outer_ttl = ttl - 1, (check + 0x100) % 0xFFFF, TTL + 1
        elif ttl == 0:
            return _DEAD
        unfragmented = fragment & DONT_FRAGMENT
        length = total + HEADER
        if length > mtu:
            if unfragmented:
                return TooBig(mtu - HEADER)
            if length > _LONGEST:
                return _TOO_LONG
        elif fragment & FRAGMENT:
            unfragmented = DONT_FRAGMENT
        # A packet that nobody fragments may have any identification (RFC 6864 section 4.1).
        # For the others the inner one's serves, and needs no memory shared by all that
        # encapsulate: a sender gives no two packets the same while they may be on the way.
        # Fragments of one packet share it, so their places (in bytes) are added; else
        # those of their outer packets that are fragmented once more would be mixed up.
        outer_identity = (identity + (fragment << 3)) & 0xFFFF
        words = self._sum + tos + length + outer_identity + unfragmented + (outer_ttl << 8)
        return _BOTH.pack(
            0x45, tos, length, outer_identity, unfragmented, outer_ttl, PROTOCOL, -words % 0xFFFF,
            self.source, self.destination,
            first, tos, total, identity, fragment, ttl, protocol, check,
        ) + inner[_UNCHANGED:total]  # fmt: skip


# What the inner packet's ECN becomes, by the outer packet's times four and its own
# (RFC 6040 figure 4): "congestion experienced" cannot be told to who does not know it,
# which None stands for: that packet is dropped, as the loss it would have been.
_ECN_OUT: Final = (0, 1, 2, 3, 0, 1, 1, 3, 0, 1, 2, 3, None, 3, 3, 3)

_NO_TUNNEL: Final = Refused("it is no IPv4 packet that carries one")
_PART: Final = Refused("it is a fragment, and only the whole packet holds the inner one")
_DAMAGED: Final = Refused("its header checksum is wrong")
_INNER_DAMAGED: Final = Refused("the header checksum of the inner packet is wrong")
_NO_INNER: Final = Refused("what it carries is no sound IPv4 packet")
_CONGESTED: Final = Refused("it met congestion that its ends cannot be told of (RFC 6040)")


def decapsulate(outer: bytes) -> bytes | Refused:
    """The packet within, or why there is none.

    Its time to live stays: the kernel counts it down when it forwards. A fragment is
    refused; where connection tracking runs, fragments have been put together before.
    RFC 2003 demands nothing of the addresses. Whose tunnels are let in is for the policy
    to say, and inner sources that cannot be (our own, loopback) the kernel drops when it
    routes the packet.
    """
    if len(outer) < HEADER:
        return _NO_TUNNEL
    first, tos, total, _, fragment, _, protocol, _, _, _ = _FIXED.unpack_from(outer)
    start = (first & 15) * 4
    if not (0x45 <= first <= 0x4F and start <= total <= len(outer) and protocol == PROTOCOL):
        return _NO_TUNNEL
    if fragment & FRAGMENT:
        return _PART
    if int.from_bytes(outer[:start]) % 0xFFFF:
        return _DAMAGED
    if total - start < HEADER:
        return _NO_INNER
    first, inner_tos, length, _, _, ttl, _, check, _, _ = _FIXED.unpack_from(outer, start)
    header = (first & 15) * 4
    if not (0x45 <= first <= 0x4F and header <= length <= total - start):
        return _NO_INNER
    if int.from_bytes(outer[start : start + header]) % 0xFFFF:
        return _INNER_DAMAGED
    if ttl == 0:
        return _DEAD
    ecn = _ECN_OUT[(tos & 3) << 2 | inner_tos & 3]
    if ecn is None:
        return _CONGESTED
    change = ecn - (inner_tos & 3)
    inner = outer[start : start + length]
    if not change:
        return inner
    changed = bytearray(inner)
    changed[1] = inner_tos + change
    changed[10:12] = ((check - change) % 0xFFFF).to_bytes(2)
    return bytes(changed)


def fragmentation_needed(packet: bytes, router: int, mtu: int) -> bytes | None:
    """The ICMP packet that tells the sender of another, from `router`: at most `mtu` bytes.

    RFC 1191 section 4. None if no error may be sent about the packet: as `time_exceeded`.
    """
    return _error(packet, router, _UNREACHABLE, _FRAGMENTATION_NEEDED, mtu)


def time_exceeded(packet: bytes, router: int) -> bytes | None:
    """The ICMP packet that tells the sender of another: its time to live ended at `router`.

    RFC 792. None if no error may be sent about the packet (RFC 1812 section 4.3.2.7): it
    is an error itself, a later fragment, to several hosts, from no single one, or broken.
    """
    return _error(packet, router, _TIME_EXCEEDED, 0, 0)


def _error(packet: bytes, router: int, kind: int, code: int, value: int) -> bytes | None:
    if len(packet) < HEADER:
        return None
    first, _, total, identity, fragment, _, protocol, _, source, destination = _FIXED.unpack_from(
        packet
    )
    header = (first & 15) * 4
    if not (0x45 <= first <= 0x4F and header <= total <= len(packet)) or fragment & 0x1FFF:
        return None
    if source >> 24 in (0, _LOOPBACK) or source >> 24 >= _MULTICAST:
        return None
    if destination >> 24 >= _MULTICAST:
        return None
    if protocol == ICMP and (total == header or packet[header] in _ICMP_ERRORS):
        return None
    told = packet[: min(total, _ICMP_LONGEST - HEADER - 8)]
    check = internet_checksum(struct.pack("!BBHI", kind, code, 0, value) + told)
    length = HEADER + 8 + len(told)
    fixed = _FIXED.pack(
        0x45, _INTERNETWORK_CONTROL, length, identity, 0, TTL, ICMP, 0, router, source
    )
    own_check = (-int.from_bytes(fixed) % 0xFFFF).to_bytes(2)
    return (
        fixed[:10] + own_check + fixed[12:] + struct.pack("!BBHI", kind, code, check, value) + told
    )
