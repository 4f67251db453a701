"""Packet captures: read them packet by packet, and write them again.

Strategy: one record at a time out of a large buffer, so a capture may be longer than memory
and may come through a pipe. Two generators know the two file formats and give the same raw
records; what a link type looks like is one row of a table: where the type of the payload
stands, where the payload begins, and which types mean IP. Times are integers in nanoseconds,
because no float holds today's date to the nanosecond. Nothing in a file is trusted: every
length is checked before so many bytes are read.

Sources: pcap-savefile(5) and draft-ietf-opsawg-pcap, draft-ietf-opsawg-pcapng, and
https://www.tcpdump.org/linktypes.html for the link types. The limits are those of libpcap.
"""

import gzip
import io
import os
import secrets
import shutil
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, Self, cast

LONGEST: Final = 262_144  # bytes of one packet; MAXIMUM_SNAPLEN in libpcap
_LONGEST_BLOCK: Final = 16 << 20  # bytes; INITIAL_MAX_BLOCKSIZE in libpcap
_BUFFER: Final = 1 << 20
_SECOND: Final = 10**9  # ns

# A classic file's first bytes -> its byte order and the nanoseconds in its unit of time.
_MAGIC: Final = {
    struct.pack(order + "I", magic): (order, unit)
    for order, (magic, unit) in product("<>", ((0xA1B2C3D4, 1000), (0xA1B23C4D, 1)))
}
_ORDER_MARK: Final = {struct.pack(order + "I", 0x1A2B3C4D): order for order in "<>"}
_RECORD: Final = struct.Struct("<4I")  # as it is written
_BLOCK: Final = {order: struct.Struct(order + "2I") for order in "<>"}
# Interface, upper and lower half of the time, captured length, length: of enhanced packet
# blocks and of the obsolete ones, which also count lost packets.
_PACKET: Final = {
    order: {6: struct.Struct(order + "5I"), 2: struct.Struct(order + "H2x4I")} for order in "<>"
}
_SECTION: Final = 0x0A0D0D0A  # the same in both byte orders
_INTERFACE, _SIMPLE_PACKET = 1, 3
_END_OF_OPTIONS, _TIME_RESOLUTION, _TIME_OFFSET = 0, 9, 14

_HELP_CUT = "what comes before is whole; copy the file again, or wait until it is finished"
_HELP_KINDS = "give a pcap or pcapng file, as written by tcpdump, dumpcap or Wireshark"
_HELP_LINK = "known are Ethernet, raw IP, Linux cooked and BSD loopback: capture one of them"


class CaptureError(Exception):
    """A capture cannot be read, or not beyond some byte of it, or cannot be written.

    `message` says which file, at which byte of it (unpacked, if it is gzipped) and what is
    wrong; `help` says what to do.
    """

    def __init__(self, message: str, help: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.help = help


class CapturedPacket(NamedTuple):
    """One packet of a capture.

    `time` is in nanoseconds since 1970. `link` is the link-layer header with all VLAN tags,
    `network` everything behind it, which may be longer than the IP packet (Ethernet pads) or
    no valid one. In a packet that is not IP, such as ARP, `network` is None and `link` is
    the whole. `length` is how many bytes the packet had on the wire.
    """

    time: int
    link_type: int
    link: bytes
    network: bytes | None
    length: int

    @property
    def cut(self) -> bool:
        """Whether the snapshot length cut the packet short."""
        return len(self.link) + len(self.network or b"") < self.length


class _LinkType(NamedTuple):
    number: int
    type_start: int  # where the payload's type is in the header, in bytes
    type_end: int
    header: int  # bytes
    ip: frozenset[bytes]  # the types that mean IP


class _Interface(NamedTuple):
    """An interface of a pcapng section; ticks * numerator // denominator + zero is a time."""

    number: int  # of its link type
    layer: _LinkType | None  # None if that is not known
    snapshot: int  # bytes, 0 for no limit
    numerator: int
    denominator: int
    zero: int


_Record = tuple[int, _LinkType, int, bytes]  # time, link type, length on the wire, frame

_ETHER_TYPES: Final = frozenset({b"\x08\x00", b"\x86\xdd"})
# 802.1Q, 802.1ad, and what was in use before 802.1ad. Behind each: two bytes of tag, then a type.
_VLAN_TYPES: Final = frozenset({b"\x81\x00", b"\x88\xa8", b"\x91\x00"})
# AF_INET, then AF_INET6 as Linux, Windows, OpenBSD and NetBSD, FreeBSD, and macOS number it; in
# the byte order of the machine that captured, which need not be that of the file.
_FAMILIES: Final = frozenset(
    number.to_bytes(4, order) for number in (2, 10, 23, 24, 28, 30) for order in ("little", "big")
)
_NO_IP: Final = -1
_ANY: Final = frozenset({b""})  # the type of zero length: there is nothing but IP

LINK_TYPES: Final = {
    row[0]: _LinkType(*row)
    for row in (
        (0, 0, 4, 4, _FAMILIES),  # NULL
        (1, 12, 14, 14, _ETHER_TYPES),  # ETHERNET
        (12, 0, 0, 0, _ANY),  # RAW, as most systems number it within a file
        (14, 0, 0, 0, _ANY),  # RAW, as OpenBSD does
        (101, 0, 0, 0, _ANY),  # RAW
        (108, 0, 4, 4, _FAMILIES),  # LOOP
        (113, 14, 16, 16, _ETHER_TYPES),  # LINUX_SLL
        (228, 0, 0, 0, _ANY),  # IPV4
        (229, 0, 0, 0, _ANY),  # IPV6
        (276, 0, 2, 20, _ETHER_TYPES),  # LINUX_SLL2
    )
}


class Capture:
    """A capture to read: iterate over it, once, for its packets.

    `path` may be `-` for standard input. The file is pcap (both byte orders, micro- or
    nanoseconds) or pcapng (both, any sections and interfaces), gzipped or not. Packets of
    pcapng that have no time of their own get that of the packet before.

    Constructing raises `CaptureError` if the file cannot be read or is no capture,
    iterating does where it is cut short or damaged, after all the packets before that.

    `link_type` is the link type, in pcapng that of the first interface (None until it was
    met). `nanoseconds` says whether writing the times takes nanoseconds; it is True for all
    pcapng, where an interface with finer times may still come. `size` is the bytes of the
    file as it lies on disk, None for a pipe.
    """

    link_type: int | None = None
    nanoseconds = True

    def __init__(self, path: str | Path) -> None:
        self.name = str(path)
        self._offset = 0  # of the record that is being read
        with ExitStack() as stack, self._errors():
            self._raw = stack.enter_context(_open(self.name, 0, "rb"))
            status = os.fstat(self._raw.fileno())
            self.size = status.st_size if stat.S_ISREG(status.st_mode) else None
            os.set_blocking(self._raw.fileno(), True)  # or a slow pipe looks like its end
            file = io.BufferedReader(self._raw, _BUFFER)
            self._file: BinaryIO = file
            if file.peek(2)[:2] == b"\x1f\x8b":
                self._file = io.BufferedReader(cast(Any, _Unzipped(fileobj=file)), _BUFFER)
            self._records = self._recognise()
            stack.pop_all()  # it stays open

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._raw.close()

    @property
    def position(self) -> int:
        """How many bytes of `size` have been read, or of the packets' records from a pipe."""
        return self._offset if self.size is None else self._raw.tell()

    def __iter__(self) -> Iterator[CapturedPacket]:
        with self._errors():
            for time, layer, length, frame in self._records:
                number, start, end, payload, ip = layer
                if frame[start:end] not in ip:
                    payload = _behind_tags(frame, layer)
                    if payload == _NO_IP:
                        yield CapturedPacket(time, number, frame, None, length)
                        continue
                yield CapturedPacket(time, number, frame[:payload], frame[payload:], length)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What reading raises becomes a CaptureError."""
        try:
            yield
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise self._error(f"the gzipped file is damaged: {error}", _HELP_CUT) from error
        except OSError as error:
            message = f"{self.name}: cannot be read: {error.strerror}"
            raise CaptureError(message, _HELP_KINDS) from error
        except struct.error as error:
            raise self._damaged("a block is too short for its type") from error

    def _recognise(self) -> Iterator[_Record]:
        magic = self._file.read(4)
        if magic in _MAGIC:
            header = self._file.read(20)
            if len(header) < 20:
                raise self._error("the capture ends within its header", _HELP_CUT)
            order, unit = _MAGIC[magic]
            # The upper half says how long the frame check sequences are: not our business.
            self.link_type = struct.unpack(order + "16xI", header)[0] & 0xFFFF
            self.nanoseconds = unit == 1
            if self.link_type not in LINK_TYPES:
                raise self._unknown(self.link_type)
            return self._pcap(order, unit, LINK_TYPES[self.link_type])
        if magic == _SECTION.to_bytes(4, "big"):
            return self._pcapng(magic)
        what = "is no packet capture" if magic else "is empty"
        raise CaptureError(f"{self.name}: the file {what}", _HELP_KINDS)

    def _pcap(self, order: str, unit: int, layer: _LinkType) -> Iterator[_Record]:
        read, unpack = self._file.read, struct.Struct(order + "4I").unpack
        self._offset = 24
        while header := read(16):
            if len(header) < 16:
                raise self._cut()
            seconds, fraction, captured, length = unpack(header)
            if captured > LONGEST:
                raise self._too_long(captured)
            frame = read(captured)
            if len(frame) < captured:
                raise self._cut()
            yield seconds * _SECOND + fraction * unit, layer, length, frame
            self._offset += 16 + captured

    def _pcapng(self, magic: bytes) -> Iterator[_Record]:
        interfaces: list[_Interface] = []
        time = 0
        for kind, order, body in self._blocks(magic):
            if kind in _PACKET[order]:
                number, high, low, captured, length = _PACKET[order][kind].unpack_from(body)
                start, ticks = 20, high << 32 | low
            elif kind == _SIMPLE_PACKET:
                (length,) = struct.unpack_from(order + "I", body)
                number, start, ticks, captured = 0, 4, None, length
            else:
                if kind == _SECTION:
                    interfaces.clear()
                    if struct.unpack_from(order + "4xH", body) != (1,):
                        raise self._damaged("a section of another pcapng than 1")
                elif kind == _INTERFACE:
                    interfaces.append(self._interface(body, order))
                    if self.link_type is None:
                        self.link_type = interfaces[0].number
                continue
            if number >= len(interfaces):
                raise self._damaged(f"a packet of interface {number}, which is not described")
            link_number, layer, snapshot, numerator, denominator, zero = interfaces[number]
            if layer is None:
                raise self._unknown(link_number)
            if ticks is not None:
                time = ticks * numerator // denominator + zero
            elif snapshot:
                captured = min(length, snapshot)
            if captured > LONGEST:
                raise self._too_long(captured)
            if start + captured > len(body) - 4:
                raise self._damaged("a packet is longer than its block")
            yield time, layer, length, body[start : start + captured]

    def _blocks(self, magic: bytes) -> Iterator[tuple[int, str, bytes]]:
        """All blocks as type, byte order, and what follows the first length, second and all.

        `magic` is what was read already of the first one.
        """
        read, order = self._file.read, "<"
        head = magic + read(4)
        while head:
            mark = b""
            if head[:4] == magic:
                # Only what follows tells the byte order in which to read the block's length.
                mark = read(4)
                if len(mark) < 4:
                    raise self._cut()
                if mark not in _ORDER_MARK:
                    raise self._damaged("a section without a byte order")
                order = _ORDER_MARK[mark]
            if len(head) < 8:
                raise self._cut()
            kind, size = _BLOCK[order].unpack(head)
            if not 12 <= size <= _LONGEST_BLOCK or size % 4:
                raise self._damaged(f"a block of {size} bytes cannot be")
            body = mark + read(size - 8 - len(mark))
            if len(body) < size - 8:
                raise self._cut()
            if body[-4:] != head[4:]:
                raise self._damaged("a block says two lengths of itself")
            yield kind, order, body
            self._offset += size
            head = read(8)

    def _interface(self, body: bytes, order: str) -> _Interface:
        number, snapshot = struct.unpack_from(order + "H2xI", body)
        resolution, zero, at, end = 6, 0, 8, len(body) - 4
        while at < end:
            code, size = struct.unpack_from(order + "2H", body, at)
            at += 4
            if at + size > end:
                raise self._damaged("an option is longer than its block")
            if code == _END_OF_OPTIONS:
                break
            if code == _TIME_RESOLUTION and size == 1:
                resolution = body[at]
            elif code == _TIME_OFFSET and size == 8:
                zero = struct.unpack_from(order + "q", body, at)[0] * _SECOND
            at += (size + 3) // 4 * 4
        units = 2 ** (resolution & 0x7F) if resolution & 0x80 else 10**resolution
        return _Interface(number, LINK_TYPES.get(number), snapshot, _SECOND, units, zero)

    def _unknown(self, number: int) -> CaptureError:
        return self._error(f"packets of link type {number}, which is not known", _HELP_LINK)

    def _cut(self) -> CaptureError:
        return self._error("the capture ends in the middle of a record", _HELP_CUT)

    def _too_long(self, captured: int) -> CaptureError:
        return self._damaged(f"a packet of {captured} bytes, more than the {LONGEST} there can be")

    def _damaged(self, what: str) -> CaptureError:
        return self._error(what, "what comes before is whole; the file is damaged from here on")

    def _error(self, what: str, help: str) -> CaptureError:
        return CaptureError(f"{self.name}: byte {self._offset}: {what}", help)


class CaptureWriter:
    """A capture to write, for a `with` block: classic pcap, whichever of the two was read.

    The link type is that of the packets; times are to the nanosecond if they are in `like`,
    the capture that they come from, else to the microsecond. A file is written beside `path`
    and renamed when the block is left without an exception; otherwise there is what was
    there before. `-` is standard output; that, pipes and devices are written directly.
    Entering, writing and leaving the block raise `CaptureError`.
    """

    def __init__(self, path: str | Path, like: Capture) -> None:
        self.name = str(path)
        self._like = like
        self._unit = 1 if like.nanoseconds else 1000
        self._link_type: int | None = None
        self._old = os.path.exists(self.name)
        direct = self.name == "-" or (self._old and not os.path.isfile(self.name))
        self._target = os.path.realpath(self.name)  # of a link, what it points to is replaced
        self._beside = "" if direct else f"{self._target}.{secrets.token_hex(4)}.part"

    def __enter__(self) -> Self:
        try:
            raw = _open(self._beside or self.name, 1, "xb" if self._beside else "wb")
        except OSError as error:
            raise self._unwritable(error) from error
        self._file = io.BufferedWriter(raw, _BUFFER)
        if self._beside and self._old:
            with suppress(OSError):  # Not all file systems have modes.
                shutil.copymode(self._target, self._beside)
        return self

    def write(self, packet: CapturedPacket, network: bytes | bytearray | None = None) -> None:
        """One packet more, unchanged or with other IP bytes.

        What the captured payload has behind as many bytes as `network` (Ethernet's padding)
        stays. Raises `CaptureError` if its link type is not that of the packets before, or
        if its time is before 1970 or after 2106.
        """
        time, link_type, link, before, length = packet
        if link_type != self._link_type:
            self._begin(link_type)
        payload: bytes | bytearray = before or b""
        if network is not None:
            length += max(0, len(network) - len(payload))
            payload = network + payload[len(network) :]
        captured = len(link) + len(payload)
        seconds, rest = divmod(time, _SECOND)
        try:
            head = _RECORD.pack(seconds, rest // self._unit, captured, length)
            self._file.write(b"".join((head, link, payload)))
        except struct.error as error:
            what = f"pcap cannot hold a time of {seconds} seconds after 1970"
            raise CaptureError(f"{self.name}: {what}", "correct the capture's times") from error
        except OSError as error:
            raise self._unwritable(error) from error

    def _begin(self, link_type: int) -> None:
        """The file's header, or an error if it was written for another link type."""
        if self._link_type is not None:
            what = f"packets of link types {self._link_type} and {link_type} in one capture"
            help = "give a capture of one interface, or leave out the one to write"
            raise CaptureError(f"{self.name}: {what}", help)
        magic = 0xA1B23C4D if self._unit == 1 else 0xA1B2C3D4
        self._link_type = link_type
        self._file.write(struct.pack("<IHHIIII", magic, 2, 4, 0, 0, LONGEST, link_type))

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            if kind is None and self._link_type is None:  # No packet, still a capture.
                self._begin(1 if self._like.link_type is None else self._like.link_type)
            self._file.close()
            if kind is None and self._beside:
                os.replace(self._beside, self._target)
        except OSError as error:
            if kind is None:
                raise self._unwritable(error) from error
        finally:
            if self._beside:
                with suppress(OSError):
                    os.unlink(self._beside)

    def _unwritable(self, error: OSError) -> CaptureError:
        help = "name a file in a directory that can be written to and has room"
        return CaptureError(f"{self.name}: cannot be written: {error.strerror}", help)


class _Unzipped(gzip.GzipFile):
    """What is unpacked so far is handed on at once, so that a damage loses nothing before it."""

    def readinto(self, buffer: Any) -> int:
        return self.readinto1(buffer)


def _behind_tags(frame: bytes, layer: _LinkType) -> int:
    """Where the IP packet begins behind VLAN tags, _NO_IP if there is none."""
    kind, payload = frame[layer.type_start : layer.type_end], layer.header
    while kind in _VLAN_TYPES:
        kind = frame[payload + 2 : payload + 4]
        payload += 4
    return payload if kind in layer.ip else _NO_IP


def _open(name: str, standard: int, mode: str) -> io.FileIO:
    """The file, or for `-` the descriptor `standard`, which is not to be closed."""
    return io.FileIO(standard, mode, closefd=False) if name == "-" else io.FileIO(name, mode)
