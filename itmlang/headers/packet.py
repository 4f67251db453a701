"""`Packet`: what a handler is given."""

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address
from typing import Final, NamedTuple

from itmlang.headers.buffer import IPV6_HEADER, Buffer, IncompleteError
from itmlang.headers.extensions import Extension, write_extensions
from itmlang.headers.ip import IPv4Header, IPv6Header
from itmlang.headers.transport import ICMPHeader, ICMPv6Header, TCPHeader, Transport, UDPHeader
from itmlang.packet import PORT_PROTOCOLS, MalformedError, locate
from itmlang.values import IPV4

_TRANSPORTS: Final = (TCPHeader, UDPHeader, ICMPHeader, ICMPv6Header)
_LARGEST_MARK = 0xFFFF_FFFF


class FiveTuple(NamedTuple):
    """What a flow's packets share; ports are None where the packet has none."""

    source: IPv4Address | IPv6Address
    destination: IPv4Address | IPv6Address
    protocol: int | None
    source_port: int | None
    destination_port: int | None


class Packet(Buffer):
    """An IP packet as it passes a hook. Reading parses no more than it must, writing fixes the rest.

    `data` begins with the IP header; it may be a copy of the packet's beginning alone
    (then `whole` is False), and bytes behind the packet's IP length are ignored.
    Every access to headers raises `MalformedError` if the IP header is not whole, or is none.
    """

    __slots__ = ("_hook", "_input", "_mark", "_output")

    def __init__(
        self,
        data: bytes,
        *,
        mark: int = 0,
        input: str | None = None,
        output: str | None = None,
        hook: str = "",
    ) -> None:
        self._bytes, self._copy, self._found = data, None, None
        self._mark, self._input, self._output, self._hook = mark, input, output, hook

    # Beside the bytes.

    @property
    def input(self) -> str | None:
        """The interface that the packet came in by, None if it began here."""
        return self._input

    @property
    def output(self) -> str | None:
        """The interface that the packet leaves by, None where that is not known yet."""
        return self._output

    @property
    def hook(self) -> str:
        """Where the packet was taken from: `prerouting`, `forward`, …"""
        return self._hook

    @property
    def mark(self) -> int:
        """The packet mark, 32 bits. Not part of the bytes, so it leaves `altered` alone."""
        return self._mark

    @mark.setter
    def mark(self, mark: int) -> None:
        if not isinstance(mark, int) or not 0 <= mark <= _LARGEST_MARK:
            raise ValueError(f"mark is a number from 0 to 0xffffffff, not {mark!r}")
        self._mark = mark

    # The whole.

    @property
    def data(self) -> bytes:
        """All bytes. Assigning puts another whole packet in place, as it is."""
        return bytes(self._bytes)

    @data.setter
    def data(self, data: bytes) -> None:
        found = locate(data)
        if found.length > len(data):
            raise MalformedError(f"the packet is {found.length} bytes, here are {len(data)}")
        self._bytes = self._copy = bytearray(data[: found.length])
        self._found = None

    @property
    def altered(self) -> bool:
        """Was a byte written? Writing what was there before does not count."""
        return self._copy is not None

    @property
    def length(self) -> int:
        """The packet's length on the wire in bytes, from the IP header on."""
        return self._layout().length

    @property
    def whole(self) -> bool:
        """Are all the packet's bytes here, and not a copy of its beginning alone?"""
        return self._layout().length <= len(self._bytes)

    @property
    def is_fragment(self) -> bool:
        """Is it a fragment, the first one or a later one?"""
        return self._layout().is_fragment

    @property
    def is_later_fragment(self) -> bool:
        """Is it a fragment without a transport header?"""
        return self._layout().fragment_offset != 0

    # The headers.

    @property
    def ip(self) -> IPv4Header | IPv6Header:
        """The IP header; the two kinds share most of their fields."""
        return (IPv4Header if self._layout().family == IPV4 else IPv6Header)(self)

    @property
    def tcp(self) -> TCPHeader | None:
        """The TCP header, None if there is none whole: other protocols, later fragments."""
        return TCPHeader.of(self)

    @property
    def udp(self) -> UDPHeader | None:
        return UDPHeader.of(self)

    @property
    def icmp(self) -> ICMPHeader | None:
        """The ICMP header, of IPv4 alone."""
        return ICMPHeader.of(self)

    @property
    def icmpv6(self) -> ICMPv6Header | None:
        """The ICMPv6 header, of IPv6 alone."""
        return ICMPv6Header.of(self)

    @property
    def extensions(self) -> tuple[Extension, ...]:
        """The IPv6 extension headers that are whole, in their order; none in IPv4.

        Assigning replaces them all; next headers and the length follow. Raises `ValueError`
        in IPv4, `MalformedError` if the packet's own are broken off.
        """
        return () if self._layout().family == IPV4 else self._extensions()[0]

    @extensions.setter
    def extensions(self, extensions: Iterable[Extension]) -> None:
        layout = self._layout()
        if layout.family == IPV4:
            raise ValueError("an IPv4 packet has no extension headers")
        broken = layout.protocol is None and not layout.fragment_offset
        if broken or layout.transport > self._end():
            raise MalformedError("the packet's extension headers are broken off")
        following, raw = write_extensions(extensions, self._extensions()[1])
        if following != self._bytes[6] or raw != self._bytes[IPV6_HEADER : layout.transport]:
            self._replace_extensions(following, raw)

    def _transport(self) -> Transport | None:
        for kind in _TRANSPORTS:
            found = kind.of(self)
            if found is not None:
                return found
        return None

    @property
    def payload(self) -> bytes:
        """What is behind the headers that have a view: of TCP, of UDP, or of IP if it is neither.

        It can be assigned, longer or shorter: lengths follow, the checksum is made anew. A
        protocol without a view keeps its own checksum within the payload. Raises
        `IncompleteError` if the packet is a copy of its headers; assigning, also if it is
        a fragment: its checksum is over all of them. TCP's sequence numbers are the caller's.
        """
        self._need_whole("payload")
        transport, end = self._transport(), self._end()
        start, end = (
            (min(self._layout().transport, end), end) if transport is None else transport._payload()
        )
        return bytes(self._bytes[start:end])

    @payload.setter
    def payload(self, payload: bytes) -> None:
        self._need_whole("payload")
        if self.is_fragment:
            raise IncompleteError(
                "a fragment's payload cannot be written: its checksum covers the other fragments"
            )
        if payload == self.payload:
            return
        transport, layout = self._transport(), self._layout()
        if transport is not None:
            transport._replace_payload(payload)
        elif layout.protocol is None or layout.transport > self._end():
            raise MalformedError("the extension headers are broken off: what follows is not known")
        else:
            self._splice(layout.transport, self._end(), payload)

    def _need_whole(self, what: str) -> None:
        if not self.whole:
            raise IncompleteError(
                f"only {len(self._bytes)} of the packet's {self.length} bytes were copied: "
                f"ask for whole packets to use its {what}"
            )

    @property
    def five_tuple(self) -> FiveTuple:
        """Addresses, protocol and ports: the key of the packet's flow.

        TCP, UDP, DCCP, SCTP and UDP-Lite have ports, in all packets but later fragments.
        """
        ip, layout = self.ip, self._layout()
        source_port = destination_port = None
        if layout.protocol in PORT_PROTOCOLS:
            start = self._within_transport(layout.protocol, 4)
            if start is not None:
                ports = self._bytes[start : start + 4]
                source_port = ports[0] << 8 | ports[1]
                destination_port = ports[2] << 8 | ports[3]
        return FiveTuple(ip.source, ip.destination, layout.protocol, source_port, destination_port)

    def __repr__(self) -> str:
        try:
            source, destination, protocol, *ports = self.five_tuple
        except MalformedError as error:
            return f"<Packet: {error}>"
        ends = (f"{source}", f"{destination}")
        if None not in ports:
            ends = (f"{source} port {ports[0]}", f"{destination} port {ports[1]}")
        return f"<Packet of protocol {protocol}, {ends[0]} to {ends[1]}, {self.length} bytes>"
