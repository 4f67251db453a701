"""The bytes behind all views of a packet: copied when first written, kept consistent.

Nothing is looked at until somebody asks. One field written leaves the rest of the
bytes alone: checksums follow by RFC 1624, so a packet that came damaged stays so, and
a copy of the headers alone is enough. Checksums cover what RFC 8200 section 8.1 and
RFC 1122 section 3.2.1.8 say: a source-routed packet's final destination.
"""

from typing import Final

from itmlang.headers.extensions import DestinationOptions, Extension, Routing, read_extensions
from itmlang.headers.options import read_options
from itmlang.packet import (
    DCCP,
    PSEUDO_CHECKSUMS,
    UDP,
    Layout,
    MalformedError,
    locate,
    mend,
    rewrite,
    updated_checksum,
)
from itmlang.values import IPV4

IPV4_HEADER: Final = 20
IPV6_HEADER: Final = 40
IPV4_CHECKSUM: Final = (10,)
_LONGEST = 65_535
# Where the checksums lie that cover the addresses. The kernel's rules know all but DCCP's.
_CHECKSUMS: Final = {**PSEUDO_CHECKSUMS, DCCP: 6}
_SOURCE_ROUTES: Final = frozenset({131, 137})  # loose and strict, RFC 791


class IncompleteError(ValueError):
    """What was asked needs bytes that are not here: of a headers-only copy, or of other fragments."""


class Buffer:
    """A packet's bytes, for the views of this package; programs use `Packet`."""

    __slots__ = ("_bytes", "_copy", "_found")

    # What is read; the same object as `_copy` as soon as something was written.
    _bytes: bytes | bytearray
    _copy: bytearray | None
    _found: Layout | None

    def _layout(self) -> Layout:
        """Where the headers lie. Raises `MalformedError`."""
        found = self._found
        if found is None:
            found = self._found = locate(self._bytes)
        return found

    def _end(self) -> int:
        """Where the bytes of the packet end that are here."""
        return min(len(self._bytes), self._layout().length)

    def _writable(self) -> bytearray:
        if self._copy is None:
            self._bytes = self._copy = bytearray(self._bytes[: self._layout().length])
        return self._copy

    def _moved(self) -> None:
        """What was written tells where headers lie: look again."""
        self._found = None

    def _within_transport(self, protocol: int, least: int) -> int | None:
        """Where the transport header begins, if it is this protocol's and so many bytes are here."""
        layout = self._layout()
        if layout.protocol != protocol or layout.fragment_offset:
            return None
        return layout.transport if layout.transport + least <= self._end() else None

    def _extensions(self) -> tuple[tuple[Extension, ...], int]:
        """The IPv6 extension headers, and the number of what follows them."""
        end = min(self._layout().transport, self._end())
        return read_extensions(bytes(self._bytes[IPV6_HEADER:end]), self._bytes[6])

    # What checksums cover beside the transport's bytes.

    def _ends(self) -> bytes:
        """Source and destination as a pseudo-header has them."""
        data, layout = self._bytes, self._layout()
        if layout.family == IPV4:
            destination = bytes(data[16:20])
            if layout.transport > IPV4_HEADER:
                destination = self._source_routed() or destination
            return bytes(data[12:16]) + destination
        source, destination = bytes(data[8:24]), bytes(data[24:40])
        if layout.transport > IPV6_HEADER:
            for extension in self._extensions()[0]:
                if isinstance(extension, Routing) and extension.final_destination:
                    destination = extension.final_destination.packed
                elif isinstance(extension, DestinationOptions):
                    source = extension.home_address or source
        return source + destination

    def _source_routed(self) -> bytes | None:
        """The last address of a source route that is not at its end (RFC 791 section 3.1)."""
        for kind, data in read_options(bytes(self._bytes[IPV4_HEADER : self._layout().transport])):
            if kind in _SOURCE_ROUTES and len(data) >= 5 and data[0] <= len(data) - 1:
                return data[-4:]
        return None

    def _checksum_of_ends(self) -> int | None:
        """Where the transport checksum lies that covers the addresses, None if there is none.

        Raises `IncompleteError` if it is not among the bytes, `MalformedError` if it cannot
        be known which protocol follows.
        """
        layout = self._layout()
        if layout.fragment_offset:
            return None
        if layout.protocol is None:
            raise MalformedError("the extension headers are broken off: what follows is not known")
        offset = _CHECKSUMS.get(layout.protocol)
        if offset is None:
            return None
        place = layout.transport + offset
        if place + 2 > self._end():
            raise IncompleteError(
                f"the checksum of protocol {layout.protocol}, which covers the addresses, "
                "is not among the bytes of this packet"
            )
        if layout.protocol == UDP and self._bytes[place : place + 2] == b"\0\0":
            return None  # no checksum is used
        return place

    def _follow(self, ends: bytes) -> None:
        """Mend the transport checksum after its pseudo-header had these ends."""
        after = self._ends()
        if after == ends:
            return
        place = self._checksum_of_ends()
        if place is not None:
            mend(self._writable(), place, int.from_bytes(ends), int.from_bytes(after))

    def _write_address(self, offset: int, new: bytes) -> None:
        if self._bytes[offset : offset + len(new)] == new:
            return
        self._checksum_of_ends()  # refuse before anything is written
        ends = self._ends()
        ipv4 = self._layout().family == IPV4
        rewrite(self._writable(), offset, new, IPV4_CHECKSUM if ipv4 else ())
        self._follow(ends)

    # Parts of another length.

    def _splice(self, start: int, end: int, new: bytes) -> None:
        """Put other bytes in place of some behind the IP header; its length follows."""
        layout = self._layout()
        length = layout.length + len(new) - (end - start)
        self._check_length(length)
        data = self._writable()
        data[start:end] = new
        if layout.family == IPV4:
            rewrite(data, 2, length.to_bytes(2), IPV4_CHECKSUM)
        else:
            data[4:6] = (length - IPV6_HEADER).to_bytes(2)
        self._moved()

    def _check_length(self, length: int) -> None:
        most = _LONGEST + (0 if self._layout().family == IPV4 else IPV6_HEADER)
        if length > most:
            raise ValueError(f"the packet would be {length} bytes long; {most} is the most")

    def _replace_ipv4_options(self, raw: bytes) -> None:
        layout = self._layout()
        if self._bytes[IPV4_HEADER : layout.transport] == raw:
            return
        self._checksum_of_ends()
        ends, size = self._ends(), IPV4_HEADER + len(raw)
        length = layout.length + size - layout.transport
        self._check_length(length)
        data = self._writable()
        before = bytes(data[: layout.transport])
        after = bytearray(before[:IPV4_HEADER] + raw)
        after[0] = 0x40 | size // 4
        after[2:4] = length.to_bytes(2)
        checksum = updated_checksum(
            int.from_bytes(before[10:12]), int.from_bytes(before), int.from_bytes(after)
        )
        after[10:12] = checksum.to_bytes(2)
        data[: layout.transport] = after
        self._moved()
        self._follow(ends)

    def _replace_extensions(self, following: int, raw: bytes) -> None:
        self._checksum_of_ends()
        ends, layout = self._ends(), self._layout()
        before = self._bytes, self._copy, layout
        self._bytes = self._copy = bytearray(self._bytes[: layout.length])
        try:
            self._splice(IPV6_HEADER, layout.transport, raw)
            self._copy[6] = following
            self._moved()
            self._checksum_of_ends()
            self._follow(ends)
        except ValueError:  # what follows is none of a packet without these headers
            self._bytes, self._copy, self._found = before
            raise
