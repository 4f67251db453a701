"""The IPv4 and IPv6 headers. What both have is called the same."""

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address

from itmlang.headers.buffer import IPV4_CHECKSUM, IPV4_HEADER, Buffer
from itmlang.headers.options import Option, padded_options, read_options
from itmlang.headers.view import Address, Bit, Number, View
from itmlang.packet import FRAGMENT, MalformedError
from itmlang.values import IPV4, IPV6


class IPHeader(View):
    """What IPv4 and IPv6 share. Numbers are unsigned."""

    __slots__ = ()
    version: int
    tos: Number  # the TOS byte, in IPv6 the traffic class (RFC 2474)
    dscp: Number  # its upper six bits
    ecn: Number  # its lower two
    ttl: Number  # in IPv6 the hop limit
    source: Address
    destination: Address


class IPv4Header(IPHeader):
    """RFC 791."""

    __slots__ = ()
    version = IPV4
    tos = Number(0, 0xFF)
    dscp = Number(0, 0x3F, shift=2)
    ecn = Number(0, 3)
    identification = Number(4, 0xFFFF)
    dont_fragment = Bit(6, 14)
    more_fragments = Bit(6, 13, moves=True)
    fragment_offset = Number(6, 0x1FFF, moves=True)  # in units of eight bytes
    ttl = Number(8, 0xFF, shift=8)
    # Of what the packet carries. That itself is left as it is.
    protocol = Number(8, 0xFF, moves=True)
    source = Address(12, IPv4Address)
    destination = Address(16, IPv4Address)

    @classmethod
    def _place(cls, packet: Buffer) -> int | None:
        return 0 if packet._layout().family == IPV4 else None

    def _checksums(self, start: int) -> Iterable[int]:
        return IPV4_CHECKSUM

    @property
    def header_length(self) -> int:
        """Bytes of the header, options included."""
        self._start()
        return self._packet._layout().transport

    @property
    def checksum(self) -> int:
        """The header's checksum; it follows what is written."""
        self._start()
        return int.from_bytes(self._packet._bytes[10:12])

    @property
    def options(self) -> tuple[Option, ...]:
        """The options up to the end of the list, as the kernel reads them.

        Assigning pads them; lengths and checksum follow. Raises `ValueError` if they take
        more than 40 bytes.
        """
        return read_options(bytes(self._packet._bytes[IPV4_HEADER : self.header_length]))

    @options.setter
    def options(self, options: Iterable[Option]) -> None:
        self._start()
        self._packet._replace_ipv4_options(padded_options(options, 40, "the IPv4 header"))


class IPv6Header(IPHeader):
    """RFC 8200. Its extension headers are the packet's `extensions`."""

    __slots__ = ()
    version = IPV6
    tos = Number(0, 0xFF, shift=4)
    dscp = Number(0, 0x3F, shift=6)
    ecn = Number(0, 3, shift=4)
    flow_label = Number(0, 0xF_FFFF, size=4)
    ttl = Number(6, 0xFF)
    source = Address(8, IPv6Address)
    destination = Address(24, IPv6Address)

    @classmethod
    def _place(cls, packet: Buffer) -> int | None:
        return 0 if packet._layout().family == IPV6 else None

    @property
    def protocol(self) -> int | None:
        """Of what the packet carries behind the extension headers; None if they are broken off.

        Writing it leaves what is carried as it is.
        """
        self._start()
        return self._packet._layout().protocol

    @protocol.setter
    def protocol(self, number: int) -> None:
        if not isinstance(number, int) or not 0 <= number <= 0xFF:
            raise ValueError(f"protocol is a number from 0 to 255, not {number!r}")
        if self.protocol is None:
            raise MalformedError("the extension headers are broken off: what follows is not known")
        at, packet = 6, self._packet
        size, data = 40, packet._bytes
        while size < packet._layout().transport:
            at, size = size, size + (8 if data[at] == FRAGMENT else (data[size + 1] + 1) * 8)
        if data[at] != number:
            packet._writable()[at] = number
            packet._moved()
