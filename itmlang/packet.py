"""IP packets on bytes: parse, rewrite, build.

`Packet` sees a packet exactly as nftables does, because the semantics must
agree with the kernel on odd packets too: the transport header is where
`ipv6_find_hdr` (net/ipv6/exthdrs_core.c) finds it, a later fragment has none,
and a header field is there if its bytes are there. A field that a packet does
not have reads as None. Rewriting keeps the IPv4 header checksum right by
RFC 1624, the way the kernel does, so that both give the same bytes.
"""

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from itmlang.values import IPV4, IPV6, PROTOCOLS

TCP: Final = PROTOCOLS["tcp"]
UDP: Final = PROTOCOLS["udp"]
ICMP: Final = PROTOCOLS["icmp"]
ICMPV6: Final = PROTOCOLS["icmpv6"]
DCCP: Final = PROTOCOLS["dccp"]
SCTP: Final = PROTOCOLS["sctp"]
UDPLITE: Final = PROTOCOLS["udplite"]
# Where the checksum of a transport header lies, and whose covers the addresses, too.
_PORT_CHECKSUMS: Final = {TCP: 16, UDP: 6}
PSEUDO_CHECKSUMS: Final = {**_PORT_CHECKSUMS, UDPLITE: 6, ICMPV6: 2}
# Protocols whose ports can be rewritten: those whose checksum nftables mends.
REWRITTEN_PORTS: Final = frozenset({TCP, UDP, SCTP})
# Protocols whose header begins with a source and a destination port:
# TCP, UDP, DCCP (RFC 4340), SCTP (RFC 9260), UDP-Lite (RFC 3828).
PORT_PROTOCOLS: Final = frozenset({6, 17, 33, 132, 136})

FRAGMENT: Final = 44
_AUTHENTICATION, _NO_NEXT = 51, 59
_EXTENSIONS: Final = frozenset({0, 43, FRAGMENT, _AUTHENTICATION, _NO_NEXT, 60})
_IPV4_HEADER, _IPV6_HEADER = 20, 40
_FRAGMENT_OFFSET = 185  # in units of eight bytes: behind 1480
MSS_OPTION: Final = 2
_TCP_FLAGS_OFFSET, _TCP_HEADER, _MSS_LENGTH = 13, 20, 4


class MalformedError(ValueError):
    """The bytes are no IPv4 or IPv6 packet that a host's IP layer would accept."""


class Layout(NamedTuple):
    """Where a packet's headers lie, as its bytes tell."""

    family: int
    length: int  # of the whole packet, as the IP header has it
    protocol: int | None  # of the transport; None where IPv6 extension headers are broken off
    transport: int  # where the transport header begins; what a later fragment holds instead
    fragment_offset: int
    is_fragment: bool  # the first one, too


def locate(data: bytes | bytearray) -> Layout:
    """Find the headers; `data` may end before the packet does.

    Raises `MalformedError` without a whole IP header, or if its length is no packet's.
    """
    version = data[0] >> 4 if data else 0
    if version == IPV6:
        return _locate_ipv6(data)
    if version != IPV4:
        raise MalformedError("neither an IPv4 nor an IPv6 header")
    transport = (data[0] & 15) * 4
    if not _IPV4_HEADER <= transport <= len(data):
        raise MalformedError("the IPv4 header is cut short")
    length = data[2] << 8 | data[3]
    if length < transport:
        raise MalformedError("the IPv4 total length does not fit the header")
    fragment = (data[6] << 8 | data[7]) & 0x3FFF
    return Layout(IPV4, length, data[9], transport, fragment & 0x1FFF, fragment != 0)


def _locate_ipv6(data: bytes | bytearray) -> Layout:
    if len(data) < _IPV6_HEADER:
        raise MalformedError("the IPv6 header is cut short")
    length = _IPV6_HEADER + (data[4] << 8 | data[5])
    end = min(length, len(data))
    offset, following, is_fragment = _IPV6_HEADER, data[6], False
    while following in _EXTENSIONS and following != _NO_NEXT:
        if offset + (4 if following == FRAGMENT else 2) > end:
            # A broken chain: the kernel knows no transport protocol either.
            return Layout(IPV6, length, None, offset, 0, is_fragment)
        if following == _AUTHENTICATION:
            break
        after, size = data[offset], (data[offset + 1] + 1) * 8
        if following == FRAGMENT:
            size, is_fragment = 8, True
            fragment_offset = struct.unpack_from("!H", data, offset + 2)[0] & 0xFFF8
            if fragment_offset:
                known = after not in _EXTENSIONS or after == _NO_NEXT
                protocol = after if known else None
                return Layout(IPV6, length, protocol, offset + size, fragment_offset, True)
        following, offset = after, offset + size
    return Layout(IPV6, length, following, offset, 0, is_fragment)


@dataclass
class Packet:
    """One IP packet and what the stack knows beside its bytes.

    `input` and `output` are the interfaces (None where there is none yet, or any
    more), `mark` is the packet mark; `ct_state`, `ct_direction` and `connection` are
    what connection tracking says of it, `draw` is its random number, from
    0 to 999 999. Raises `MalformedError` when constructed
    from bytes without a whole IP header.
    """

    data: bytearray
    input: str | None = None
    output: str | None = None
    mark: int = 0
    ct_state: int = 0  # invalid: what nftables reads where nothing was tracked
    ct_direction: int | None = None
    connection: Any = None  # a `conntrack.Connection`
    draw: int = 0
    priority: int = 0  # the class of a link that it waits in, a classid
    family: int = field(init=False)
    protocol: int | None = field(init=False)
    fragment_offset: int = field(init=False, default=0)
    is_fragment: bool = field(init=False, default=False)  # the first one, too
    transport: int = field(init=False)  # offset of the transport header

    def __post_init__(self) -> None:
        (
            self.family, length, self.protocol, self.transport,
            self.fragment_offset, self.is_fragment,
        ) = locate(self.data)  # fmt: skip
        if length > len(self.data):
            raise MalformedError("the IP length does not fit the packet")
        del self.data[length:]

    def replace(self, data: bytes) -> None:
        """Put another packet's bytes in place. Raises `MalformedError`."""
        self.data[:] = data
        self.__post_init__()

    # Header fields, each None where the packet has none.

    @property
    def source(self) -> tuple[int, int]:
        return self._address(12, 8)

    @property
    def destination(self) -> tuple[int, int]:
        return self._address(16, 24)

    def _address(self, ipv4_offset: int, ipv6_offset: int) -> tuple[int, int]:
        if self.family == IPV4:
            return IPV4, int.from_bytes(self.data[ipv4_offset : ipv4_offset + 4])
        return IPV6, int.from_bytes(self.data[ipv6_offset : ipv6_offset + 16])

    def transport_bytes(self, offset: int, size: int) -> bytes | None:
        """Bytes of the transport header, None in a later fragment or past the packet's end."""
        start = self.transport + offset
        if self.protocol is None or self.fragment_offset or start + size > len(self.data):
            return None
        return bytes(self.data[start : start + size])

    def _port(self, offset: int) -> int | None:
        if self.protocol not in PORT_PROTOCOLS or self.fragment_offset:
            return None
        start = self.transport + offset
        data = self.data
        return data[start] << 8 | data[start + 1] if start + 2 <= len(data) else None

    @property
    def source_port(self) -> int | None:
        return self._port(0)

    @property
    def destination_port(self) -> int | None:
        return self._port(2)

    @property
    def tcp_flags(self) -> int | None:
        raw = self.transport_bytes(_TCP_FLAGS_OFFSET, 1) if self.protocol == TCP else None
        return None if raw is None else raw[0]

    @property
    def length(self) -> int:
        """The IP length in bytes, header included."""
        return len(self.data)

    @property
    def ttl(self) -> int:
        return self.data[8] if self.family == IPV4 else self.data[7]

    @property
    def tos(self) -> int:
        """The TOS byte of IPv4, the traffic class of IPv6 (RFC 2474): DSCP and ECN."""
        if self.family == IPV4:
            return self.data[1]
        first: int = struct.unpack_from("!H", self.data, 0)[0]
        return first >> 4 & 0xFF

    @property
    def dscp(self) -> int:
        return self.tos >> 2

    @property
    def ecn(self) -> int:
        return self.tos & 3

    @property
    def icmp_type(self) -> int | None:
        """The type of an ICMP packet (IPv4 alone)."""
        return self._first_byte() if self.protocol == ICMP and self.family == IPV4 else None

    @property
    def icmpv6_type(self) -> int | None:
        """The type of an ICMPv6 packet (IPv6 alone)."""
        return self._first_byte() if self.protocol == ICMPV6 and self.family == IPV6 else None

    def _first_byte(self) -> int | None:
        raw = self.transport_bytes(0, 1)
        return None if raw is None else raw[0]

    @property
    def is_later_fragment(self) -> bool:
        return self.fragment_offset != 0

    @property
    def tcp_mss(self) -> int | None:
        """The value of TCP's maximum segment size option (RFC 9293 section 3.7.1)."""
        place = self._mss_place()
        return None if place is None else self._word(place)

    def _mss_place(self) -> int | None:
        raw = self.transport_bytes(12, 1) if self.protocol == TCP else None
        size = 0 if raw is None else (raw[0] >> 4) * 4
        header = self.transport_bytes(0, size) if size >= _TCP_HEADER else None
        place = None if header is None else mss_place(header)
        return None if place is None else self.transport + place

    def _word(self, place: int) -> int:
        return self.data[place] << 8 | self.data[place + 1]

    # Rewriting. Each leaves the packet alone if it lacks the field.

    def set_ttl(self, ttl: int) -> None:
        """Write the TTL (hop limit); the IPv4 header checksum follows."""
        if self.family == IPV6:
            self.data[7] = ttl
        else:
            rewrite(self.data, 8, bytes((ttl, self.data[9])), [10])

    def set_source(self, address: tuple[int, int]) -> None:
        """Write the source address (family, integer) of a packet of its family."""
        self._set_address(address, 12, 8)

    def set_destination(self, address: tuple[int, int]) -> None:
        self._set_address(address, 16, 24)

    def _set_address(self, address: tuple[int, int], ipv4_offset: int, ipv6_offset: int) -> None:
        family, value = address
        # The kernel cannot mend DCCP's checksum, nor one that a tiny first fragment lacks:
        # such packets are left alone, as are those of which it does not know what they carry.
        if family != self.family or self.protocol in (DCCP, None):
            return
        transport = self._checksum_place(PSEUDO_CHECKSUMS)
        if self.protocol == TCP and transport is None and not self.fragment_offset:
            return
        checksums = [transport] if transport is not None else []
        if family == IPV4:
            rewrite(self.data, ipv4_offset, value.to_bytes(4), [10, *checksums])
        else:
            rewrite(self.data, ipv6_offset, value.to_bytes(16), checksums)

    def set_source_port(self, port: int) -> None:
        """Write the source port of TCP, UDP and SCTP (whose checksum lies over all fragments)."""
        self._set_port(port, 0)

    def set_destination_port(self, port: int) -> None:
        self._set_port(port, 2)

    def _set_port(self, port: int, offset: int) -> None:
        if self.protocol not in REWRITTEN_PORTS or self._port(offset) is None:
            return
        start = self.transport + offset
        if self.protocol == SCTP:
            if self.is_fragment:
                return
            self.data[start : start + 2] = port.to_bytes(2)
            if len(self.data) >= self.transport + 12:
                check = self.transport + 8
                self.data[check : check + 4] = bytes(4)
                value = crc32c(memoryview(self.data)[self.transport :])
                self.data[check : check + 4] = value.to_bytes(4, "little")
            return
        place = self._checksum_place(_PORT_CHECKSUMS)
        if place is not None:
            rewrite(self.data, start, port.to_bytes(2), [place])
        elif self.protocol == UDP and self.transport_bytes(6, 2) == b"\0\0":
            self.data[start : start + 2] = port.to_bytes(2)

    def _checksum_place(self, offsets: Mapping[int, int]) -> int | None:
        """Where the transport checksum lies; None if there is none, or UDP's is not used."""
        offset = offsets.get(self.protocol if self.protocol is not None else -1)
        raw = None if offset is None else self.transport_bytes(offset, 2)
        if raw is None or (self.protocol == UDP and raw == b"\0\0"):
            return None
        assert offset is not None
        return self.transport + offset

    def set_tcp_mss(self, size: int) -> None:
        """Lower TCP's maximum segment size option, if it is sound and begins at an even place."""
        place = self._mss_place()
        if place is None or self._word(place) <= size:
            return
        if (place - self.transport) % 2 or self.data[place - 1] != _MSS_LENGTH:
            return
        before, check = self._word(place), self.transport + 16
        self.data[place : place + 2] = size.to_bytes(2)
        checksum = updated_checksum(self._word(check), before, size)
        self.data[check : check + 2] = (0 if checksum == 0xFFFF else checksum).to_bytes(2)

    def set_tos(self, tos: int) -> None:
        """Write the TOS byte (traffic class); the IPv4 header checksum follows."""
        before = struct.unpack_from("!H", self.data, 0)[0]
        after = (before & 0xFF00) | tos if self.family == IPV4 else (before & 0xF00F) | (tos << 4)
        if after == before:
            return
        struct.pack_into("!H", self.data, 0, after)
        if self.family == IPV4:
            checksum = struct.unpack_from("!H", self.data, 10)[0]
            struct.pack_into("!H", self.data, 10, updated_checksum(checksum, before, after))

    def set_dscp(self, dscp: int) -> None:
        """Write the DSCP, ECN kept."""
        self.set_tos(dscp << 2 | self.ecn)


def rewrite(data: bytearray, offset: int, new: bytes, checksums: Iterable[int]) -> None:
    """Replace whole 16-bit words; the checksums at these places follow (RFC 1624)."""
    before, after = int.from_bytes(data[offset : offset + len(new)]), int.from_bytes(new)
    data[offset : offset + len(new)] = new
    for place in checksums:
        mend(data, place, before, after)


def mend(data: bytearray, place: int, before: int, after: int) -> None:
    """Let the checksum at a place follow changed 16-bit words, given as one number each."""
    checksum = updated_checksum(data[place] << 8 | data[place + 1], before, after)
    data[place], data[place + 1] = checksum >> 8, checksum & 0xFF


def mss_place(header: bytes | bytearray) -> int | None:
    """Where the value of the MSS option lies in a TCP header, None if it has none that is sound.

    Options are walked as `nft_exthdr_tcp_eval` does.
    """
    at, size = _TCP_HEADER, len(header)
    while at < size - 1:
        kind, length = header[at], header[at + 1]
        step = 1 if kind <= 1 or length == 0 else length
        if kind == MSS_OPTION:
            return None if at + step > size or step < 4 else at + 2
        at += step
    return None


def transport_checksum(protocol: int, ends: bytes, transport: bytes | bytearray) -> int:
    """The checksum of TCP, UDP, ICMP or ICMPv6, from its bytes with a checksum of zero.

    `ends` are the source and destination of the pseudo-header (RFC 9293 section 3.1,
    RFC 8200 section 8.1).
    """
    pseudo = b"" if protocol == ICMP else ends + struct.pack("!II", len(transport), protocol)
    checksum = internet_checksum(pseudo + transport)
    return checksum or 0xFFFF if protocol == UDP else checksum


# 65 536 is 1 modulo 65 535, so a sum of 16-bit words with its carries folded back in is
# the words as one big-endian number modulo 65 535: one's complement has two zeros.


def internet_checksum(data: bytes | bytearray) -> int:
    """The checksum of RFC 1071 over some bytes (an odd last one is padded)."""
    number = int.from_bytes(data) << 8 * (len(data) % 2)
    return -number % 0xFFFF if number else 0xFFFF


def updated_checksum(checksum: int, before: int, after: int) -> int:
    """RFC 1624 equation 3 for changed 16-bit words, given as one big-endian number each.

    A result of zero is written as 0xffff, as `nft_payload` does: equal in one's
    complement, and the same bytes as the kernel's.
    """
    return (checksum + before - after) % 0xFFFF or 0xFFFF


def crc32c(data: Iterable[int]) -> int:
    """The checksum of SCTP (RFC 9260 appendix A)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC32C[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _crc32c_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


_CRC32C: Final = _crc32c_table()


@dataclass(frozen=True)
class Header:
    """A packet as one writes it: `tcp 10.0.0.1:1000 -> 10.0.0.2:80 flags syn length 60`.

    Addresses are (family, integer). `length` is the IP length, at least what the
    headers need. ICMP packets are echo requests.
    """

    protocol: int
    source: tuple[int, int]
    destination: tuple[int, int]
    source_port: int | None = None
    destination_port: int | None = None
    flags: int | None = None  # a TCP packet without flags given carries ACK
    tos: int = 0
    ttl: int = 64
    length: int | None = None
    type: int | None = None  # of ICMP; an echo request if not given
    mss: int | None = None  # TCP's maximum segment size option
    fragment: bool = False  # a later fragment, with what would be the payload
    input: str | None = None
    output: str | None = None
    mark: int = 0

    @property
    def least_length(self) -> int:
        """The IP length of the headers alone."""
        ip = _IPV4_HEADER if self.source[0] == IPV4 else _IPV6_HEADER
        return ip + len(self._transport(b""))

    def _transport(self, payload: bytes) -> bytes:
        ports = struct.pack("!HH", self.source_port or 0, self.destination_port or 0)
        if self.protocol == TCP:
            flags = 0x10 if self.flags is None else self.flags
            option = b"" if self.mss is None else struct.pack("!BBH", MSS_OPTION, 4, self.mss)
            size = _TCP_HEADER + len(option) << 2
            fixed = struct.pack("!IIBBHHH", 1, 1, size, flags, 65535, 0, 0)
            return ports + fixed + option + payload
        if self.protocol == UDP:
            return ports + struct.pack("!HH", 8 + len(payload), 0) + payload
        if self.protocol in (ICMP, ICMPV6):
            echo = 8 if self.protocol == ICMP else 128
            kind = echo if self.type is None else self.type
            return struct.pack("!BBHHH", kind, 0, 0, 1, 1) + payload
        if self.protocol in PORT_PROTOCOLS:
            return ports + bytes(8) + payload
        return payload

    def build(self) -> Packet:
        """The packet, with right checksums (DCCP and UDP-Lite: header only, checksum zero)."""
        padding = max(0, (self.length or 0) - self.least_length)
        transport = bytearray(self._transport(bytes(padding)))
        family, source = self.source
        size = 4 if family == IPV4 else 16
        ends = source.to_bytes(size) + self.destination[1].to_bytes(size)
        place = {TCP: 16, UDP: 6, ICMP: 2, ICMPV6: 2}.get(self.protocol)
        if place is not None:
            checksum = transport_checksum(self.protocol, ends, transport)
            struct.pack_into("!H", transport, place, checksum)
        elif self.protocol == SCTP:
            struct.pack_into("<I", transport, 8, crc32c(transport))
        if family == IPV4:
            total = _IPV4_HEADER + len(transport)
            identity, offset = (1, _FRAGMENT_OFFSET) if self.fragment else (0, 0)
            header = bytearray(
                struct.pack("!BBHHHBBH", 0x45, self.tos, total, identity, offset, self.ttl,
                            self.protocol, 0) + ends
            )  # fmt: skip
            struct.pack_into("!H", header, 10, internet_checksum(header))
        else:
            first, following = 6 << 28 | self.tos << 20, self.protocol
            if self.fragment:
                extension = struct.pack("!BBHI", self.protocol, 0, _FRAGMENT_OFFSET << 3, 1)
                transport, following = bytearray(extension + transport), FRAGMENT
            fixed = struct.pack("!IHBB", first, len(transport), following, self.ttl)
            header = bytearray(fixed + ends)
        return Packet(header + transport, self.input, self.output, self.mark)
