"""The headers of TCP, UDP, ICMP and ICMPv6: there if all their bytes are, and in no later fragment."""

from collections.abc import Iterable
from typing import ClassVar

from itmlang.headers.buffer import Buffer, IncompleteError
from itmlang.headers.options import Option, padded_options, read_options
from itmlang.headers.view import Bit, Number, View
from itmlang.packet import (
    ICMP,
    ICMPV6,
    MSS_OPTION,
    TCP,
    UDP,
    mss_place,
    rewrite,
    transport_checksum,
    updated_checksum,
)
from itmlang.values import IPV4, IPV6

_TCP_HEADER, _TCP_CHECKSUM = 20, 16


class Transport(View):
    """A header behind the IP header, with a checksum over itself and the payload."""

    __slots__ = ()
    protocol: ClassVar[int]
    _least: ClassVar[int] = 8  # bytes of the header without options
    _checksum: ClassVar[int]  # where the checksum lies
    _family: ClassVar[int] = 0  # the one that has it; 0 is both

    @classmethod
    def _place(cls, packet: Buffer) -> int | None:
        place = packet._within_transport(cls.protocol, cls._least)
        if place is not None and cls._family and cls._family != packet._layout().family:
            return None
        return place

    def _checksums(self, start: int) -> Iterable[int]:
        return (start + self._checksum,)

    def _bytes(self, offset: int, size: int) -> bytes:
        at = self._start() + offset
        return bytes(self._packet._bytes[at : at + size])

    @property
    def checksum(self) -> int:
        """The checksum over header and payload; it follows what is written."""
        return int.from_bytes(self._bytes(self._checksum, 2))

    @property
    def header_length(self) -> int:
        """Bytes of the header, options included."""
        self._start()
        return self._least

    def _payload(self) -> tuple[int, int]:
        """Where the payload begins and ends, as far as its bytes are here."""
        return self._start() + self.header_length, self._packet._end()

    def _replace_payload(self, payload: bytes) -> None:
        """Lengths follow; the checksum is made anew, for the payload is."""
        start, packet = self._start(), self._packet
        packet._splice(start + self.header_length, packet._end(), payload)
        data, checksums = packet._writable(), self._checksums(start)
        for place in checksums:
            data[place : place + 2] = b"\0\0"
            segment = data[start : packet._end()]
            checksum = transport_checksum(self.protocol, packet._ends(), segment)
            data[place : place + 2] = checksum.to_bytes(2)


class TCPHeader(Transport):
    """RFC 9293."""

    __slots__ = ()
    protocol = TCP
    _least, _checksum = _TCP_HEADER, _TCP_CHECKSUM
    source_port = Number(0, 0xFFFF)
    destination_port = Number(2, 0xFFFF)
    sequence = Number(4, 0xFFFF_FFFF, size=4)
    acknowledgement = Number(8, 0xFFFF_FFFF, size=4)
    flags = Number(12, 0xFF)  # FIN is 1, SYN 2, RST 4, PSH 8, ACK 16, URG 32, ECE 64, CWR 128
    fin, syn, rst, psh = Bit(12, 0), Bit(12, 1), Bit(12, 2), Bit(12, 3)
    ack, urg, ece, cwr = Bit(12, 4), Bit(12, 5), Bit(12, 6), Bit(12, 7)
    window = Number(14, 0xFFFF)
    urgent_pointer = Number(18, 0xFFFF)

    @classmethod
    def _place(cls, packet: Buffer) -> int | None:
        place = packet._within_transport(TCP, _TCP_HEADER)
        if place is None:
            return None
        size = (packet._bytes[place + 12] >> 4) * 4
        return place if _TCP_HEADER <= size <= packet._end() - place else None

    @property
    def header_length(self) -> int:
        return (self._bytes(12, 1)[0] >> 4) * 4

    @property
    def options(self) -> tuple[Option, ...]:
        """The options up to the end of the list, as the kernel reads them.

        Assigning pads them; lengths and checksums follow. Raises `ValueError` if they take
        more than 40 bytes, `IncompleteError` if they would change a fragment's length.
        """
        return read_options(self._bytes(_TCP_HEADER, self.header_length - _TCP_HEADER))

    @options.setter
    def options(self, options: Iterable[Option]) -> None:
        raw, packet, start = (
            padded_options(options, 40, "a TCP header"),
            self._packet,
            self._start(),
        )
        before = self._bytes(0, self.header_length)
        grown = _TCP_HEADER + len(raw) - len(before)
        if raw == before[_TCP_HEADER:]:
            return
        if grown and packet._layout().is_fragment:
            raise IncompleteError("a fragment's options can change, but not their length")
        after = bytearray(before[:_TCP_HEADER] + raw)
        after[12] = (_TCP_HEADER + len(raw)) // 4 << 4 | before[12] & 15
        length = packet._layout().length - start  # the pseudo-header has it, too
        changed = updated_checksum(self.checksum, length, length + grown)
        checksum = updated_checksum(changed, int.from_bytes(before), int.from_bytes(after))
        after[_TCP_CHECKSUM : _TCP_CHECKSUM + 2] = checksum.to_bytes(2)
        packet._splice(start, start + len(before), bytes(after))

    @property
    def mss(self) -> int | None:
        """The maximum segment size option's value, as policies see it; None without the option.

        Assigning adds the option if there is none.
        """
        place = mss_place(self._bytes(0, self.header_length))
        return None if place is None else int.from_bytes(self._bytes(place, 2))

    @mss.setter
    def mss(self, size: int) -> None:
        if not isinstance(size, int) or not 0 <= size <= 0xFFFF:
            raise ValueError(f"mss is a number from 0 to 65535, not {size!r}")
        place, start = mss_place(self._bytes(0, self.header_length)), self._start()
        if place is None:
            self.options = (Option(MSS_OPTION, size.to_bytes(2)), *self.options)
            return
        # Checksums are of whole words: with the bytes around if it begins at an odd place.
        odd = place % 2
        before = self._bytes(place - odd, 2 + 2 * odd)
        after = before[:odd] + size.to_bytes(2) + before[odd + 2 :]
        if after != before:
            data = self._packet._writable()
            rewrite(data, start + place - odd, after, self._checksums(start))


class UDPHeader(Transport):
    """RFC 768. A checksum of zero is none, and stays so."""

    __slots__ = ()
    protocol = UDP
    _checksum = 6
    source_port = Number(0, 0xFFFF)
    destination_port = Number(2, 0xFFFF)

    def _checksums(self, start: int) -> Iterable[int]:
        return () if self._packet._bytes[start + 6 : start + 8] == b"\0\0" else (start + 6,)

    @property
    def length(self) -> int:
        """Bytes of header and payload, as the header says."""
        return int.from_bytes(self._bytes(4, 2))

    def _payload(self) -> tuple[int, int]:
        start, end = super()._payload()
        said = start - 8 + self.length
        return start, said if start <= said <= end else end

    def _replace_payload(self, payload: bytes) -> None:
        length = 8 + len(payload)
        if length > 0xFFFF:
            raise ValueError(f"a UDP packet of {length} bytes; 65535 is the most")
        start, packet = self._start(), self._packet
        packet._check_length(start + length)
        packet._writable()[start + 4 : start + 6] = length.to_bytes(2)
        super()._replace_payload(payload)


class _Message(Transport):
    """What ICMP and ICMPv6 share: four bytes, then four that the type gives a meaning."""

    __slots__ = ()
    _checksum = 2
    type = Number(0, 0xFF, shift=8)
    code = Number(0, 0xFF)
    identifier = Number(4, 0xFFFF)  # of echo requests and replies
    sequence = Number(6, 0xFFFF)

    @property
    def rest(self) -> bytes:
        """The four bytes behind the checksum."""
        return self._bytes(4, 4)

    @rest.setter
    def rest(self, new: bytes) -> None:
        if len(new) != 4:
            raise ValueError(f"the rest of the header is 4 bytes, not {len(new)}")
        start = self._start()
        if new != self.rest:
            rewrite(self._packet._writable(), start + 4, bytes(new), self._checksums(start))


class ICMPHeader(_Message):
    """RFC 792."""

    __slots__ = ()
    protocol, _family = ICMP, IPV4


class ICMPv6Header(_Message):
    """RFC 4443."""

    __slots__ = ()
    protocol, _family = ICMPV6, IPV6
