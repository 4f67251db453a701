"""IP packets on bytes: parse, rewrite, build.

`Packet` sees a packet exactly as nftables does, because the semantics must
agree with the kernel on odd packets too: the transport header is where
`ipv6_find_hdr` (net/ipv6/exthdrs_core.c) finds it, a later fragment has none,
and a header field is there if its bytes are there. A field that a packet does
not have reads as None. Rewriting keeps the IPv4 header checksum right by
RFC 1624, the way the kernel does, so that both give the same bytes.
"""

import struct
from dataclasses import dataclass, field
from typing import Final

from itmlang.values import IPV4, IPV6, PROTOCOLS

TCP: Final = PROTOCOLS["tcp"]
UDP: Final = PROTOCOLS["udp"]
ICMP: Final = PROTOCOLS["icmp"]
ICMPV6: Final = PROTOCOLS["icmpv6"]
# Protocols whose header begins with a source and a destination port:
# TCP, UDP, DCCP (RFC 4340), SCTP (RFC 9260), UDP-Lite (RFC 3828).
PORT_PROTOCOLS: Final = frozenset({6, 17, 33, 132, 136})

_FRAGMENT, _AUTHENTICATION, _NO_NEXT = 44, 51, 59
_EXTENSIONS: Final = frozenset({0, 43, _FRAGMENT, _AUTHENTICATION, _NO_NEXT, 60})
_IPV4_HEADER, _IPV6_HEADER = 20, 40
_TCP_FLAGS_OFFSET = 13


class MalformedError(ValueError):
    """The bytes are no IPv4 or IPv6 packet that a host's IP layer would accept."""


@dataclass
class Packet:
    """One IP packet and what the stack knows beside its bytes.

    `input` and `output` are the interfaces (None where there is none yet, or any
    more), `mark` is the packet mark. Raises `MalformedError` when constructed
    from bytes without a whole IP header.
    """

    data: bytearray
    input: str | None = None
    output: str | None = None
    mark: int = 0
    family: int = field(init=False)
    protocol: int | None = field(init=False)
    fragment_offset: int = field(init=False, default=0)
    transport: int = field(init=False)  # offset of the transport header

    def __post_init__(self) -> None:
        version = self.data[0] >> 4 if self.data else 0
        if version == IPV4:
            self._locate_ipv4()
        elif version == IPV6:
            self._locate_ipv6()
        else:
            raise MalformedError("neither an IPv4 nor an IPv6 header")

    def _locate_ipv4(self) -> None:
        data = self.data
        if len(data) < _IPV4_HEADER or (data[0] & 15) * 4 < _IPV4_HEADER:
            raise MalformedError("the IPv4 header is cut short")
        self.transport = (data[0] & 15) * 4
        total = struct.unpack_from("!H", data, 2)[0]
        if total < self.transport or total > len(data):
            raise MalformedError("the IPv4 total length does not fit the packet")
        del data[total:]
        self.family, self.protocol = IPV4, data[9]
        self.fragment_offset = struct.unpack_from("!H", data, 6)[0] & 0x1FFF

    def _locate_ipv6(self) -> None:
        data = self.data
        if len(data) < _IPV6_HEADER:
            raise MalformedError("the IPv6 header is cut short")
        total = _IPV6_HEADER + struct.unpack_from("!H", data, 4)[0]
        if total > len(data):
            raise MalformedError("the IPv6 payload length does not fit the packet")
        del data[total:]
        self.family, self.protocol, self.transport = IPV6, None, _IPV6_HEADER
        offset, following = _IPV6_HEADER, data[6]
        while following in _EXTENSIONS and following != _NO_NEXT:
            if offset + 2 > len(data):
                return  # a broken chain: the kernel knows no transport protocol either
            after, size = data[offset], (data[offset + 1] + 1) * 8
            if following == _FRAGMENT:
                if offset + 4 > len(data):
                    return
                size = 8
                fragment_offset = struct.unpack_from("!H", data, offset + 2)[0] & 0xFFF8
                if fragment_offset:
                    if after in _EXTENSIONS and after != _NO_NEXT:
                        return
                    self.protocol, self.fragment_offset = after, fragment_offset
                    return
            elif following == _AUTHENTICATION:
                break
            following, offset = after, offset + size
        self.protocol, self.transport = following, offset

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
        if self.protocol not in PORT_PROTOCOLS:
            return None
        raw = self.transport_bytes(offset, 2)
        return None if raw is None else int.from_bytes(raw)

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
    def connection(self) -> tuple[object, ...] | None:
        """A key of the packet's connection, the same for both directions.

        It stands for the kernel's connection tracking; that the kernel would call
        a packet invalid or untracked is not modelled.
        """
        ends: tuple[object, ...]
        if self.protocol is None or self.fragment_offset:
            return None
        if self.protocol in PORT_PROTOCOLS:
            if self.source_port is None or self.destination_port is None:
                return None
            ends = ((self.source, self.source_port), (self.destination, self.destination_port))
        elif self.protocol in (ICMP, ICMPV6):
            identifier = int.from_bytes(self.transport_bytes(4, 2) or b"")
            return (self.protocol, *sorted((self.source, self.destination)), identifier)
        else:
            ends = (self.source, self.destination)
        return (self.protocol, *sorted(ends))

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


def internet_checksum(data: bytes | bytearray) -> int:
    """The checksum of RFC 1071 over some bytes (an odd last one is padded)."""
    if len(data) % 2:
        data = bytes(data) + b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def updated_checksum(checksum: int, before: int, after: int) -> int:
    """RFC 1624 equation 3 for one changed 16-bit word.

    A result of zero is written as 0xffff, as `nft_payload` does: equal in one's
    complement, and the same bytes as the kernel's.
    """
    total = (~checksum & 0xFFFF) + (~before & 0xFFFF) + after
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return (~total & 0xFFFF) or 0xFFFF


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
            return ports + struct.pack("!IIBBHHH", 1, 1, 0x50, flags, 65535, 0, 0) + payload
        if self.protocol == UDP:
            return ports + struct.pack("!HH", 8 + len(payload), 0) + payload
        if self.protocol in (ICMP, ICMPV6):
            echo = 8 if self.protocol == ICMP else 128
            return struct.pack("!BBHHH", echo, 0, 0, 1, 1) + payload
        if self.protocol in PORT_PROTOCOLS:
            return ports + bytes(8) + payload
        return payload

    def build(self) -> Packet:
        """The packet, with right checksums (SCTP and DCCP: header only, checksum zero)."""
        padding = max(0, (self.length or 0) - self.least_length)
        transport = bytearray(self._transport(bytes(padding)))
        family, source = self.source
        size = 4 if family == IPV4 else 16
        ends = source.to_bytes(size) + self.destination[1].to_bytes(size)
        place = {TCP: 16, UDP: 6, ICMP: 2, ICMPV6: 2}.get(self.protocol)
        if place is not None:
            pseudo = ends + struct.pack("!II", len(transport), self.protocol)
            covered = transport if self.protocol == ICMP else pseudo + transport
            checksum = internet_checksum(covered)
            if self.protocol == UDP:
                checksum = checksum or 0xFFFF
            struct.pack_into("!H", transport, place, checksum)
        if family == IPV4:
            total = _IPV4_HEADER + len(transport)
            header = bytearray(
                struct.pack("!BBHHHBBH", 0x45, self.tos, total, 0, 0, self.ttl, self.protocol, 0)
                + ends
            )
            struct.pack_into("!H", header, 10, internet_checksum(header))
        else:
            first = 6 << 28 | self.tos << 20
            fixed = struct.pack("!IHBB", first, len(transport), self.protocol, self.ttl)
            header = bytearray(fixed + ends)
        return Packet(header + transport, self.input, self.output, self.mark)
