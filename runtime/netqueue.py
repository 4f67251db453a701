"""Packets from a queue of the kernel: what all readers share, and the fast one.

Strategy: a netlink socket of our own. One system call (recvmmsg) fetches all the packets
that wait, up to `_BATCH`; one more answers them. Neighbours with the same verdict and mark
share a batch verdict, which holds for all packets up to its id: packets come in the order
of their ids and are answered in that order, so everything before the first of them has
its answer already.

Messages of one kind of packet differ in few bytes. How they look is therefore worked out
once (`_Layout`), and from then on two calls of `struct` compare what must be the same and
take out what is not. A message that looks like none of those known is walked through.

Sources: include/uapi/linux/netlink.h, netfilter/nfnetlink.h, netfilter/nfnetlink_queue.h;
the order of messages and verdicts is that of net/netfilter/nfnetlink_queue.c.
"""

import ctypes
import errno
import mmap
import os
import select
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from runtime.errors import MachineError

NF_DROP, NF_ACCEPT = 0, 1  # include/uapi/linux/netfilter.h

Answer = tuple[int, bytes | bytearray | None, int]
"""A verdict (`NF_DROP`, `NF_ACCEPT`), the packet's new bytes or None for unchanged, its mark."""

Serve = Callable[[bytes, int, int, int, int, int], Answer]
"""Answers one packet: its bytes as far as they were copied, its mark, its hook (NF_INET_*), the
indexes of its interfaces in and out (0 for none), and its length in bytes where that is more
than was copied, else 0. It must not raise: what waits behind the packet would be dropped."""

Cut = Callable[[int], Answer]
"""Answers a packet that cannot be changed or shown because not all of it is here, by its mark.
New bytes are not taken from it."""


@dataclass(frozen=True)
class Settings:
    """What is asked of the kernel for a queue, one of the network namespace's 65 536.

    `length`: packets that may wait, further ones pass unserved. `buffer`: bytes of the
    socket's receive buffer as the kernel counts them, some 1 KB for the smallest packet.
    `copy`: bytes that are copied of each packet. `segments`: cut packets that the stack
    has put together (GSO) before they are queued, and complete their checksums; only so
    may a packet be given new bytes.
    """

    queue: int
    length: int = 4096
    buffer: int = 8 << 20
    copy: int = 65_535
    segments: bool = True


class Reader(Protocol):
    """One queue, read without waiting."""

    @property
    def overruns(self) -> int:
        """How often the socket's buffer was full; what it could not take passed unserved."""

    @property
    def truncated(self) -> int:
        """Packets answered by `Cut`."""

    def fileno(self) -> int:
        """What poll(2) is asked for packets."""

    def read(self) -> int:
        """Serve what waits, a bounded number of packets; how many. Raises OSError."""

    def close(self) -> None:
        """Serve what waits and leave the queue; no packet is lost. A second call does nothing."""


_NETLINK_NETFILTER: Final = 12
_SOL_NETLINK, _NETLINK_CAP_ACK = 270, 10
_SO_RCVBUFFORCE: Final = 33
_NLM_F_REQUEST, _NLM_F_ACK = 0x1, 0x4
_NLMSG_ERROR: Final = 2
_SUBSYSTEM: Final = 3 << 8  # NFNL_SUBSYS_QUEUE
_MSG_PACKET, _MSG_VERDICT, _MSG_CONFIG, _MSG_VERDICT_BATCH = (_SUBSYSTEM | n for n in range(4))
_CMD, _PARAMS, _MAXLEN, _MASK, _FLAGS = 1, 2, 3, 4, 5  # NFQA_CFG_*
_BIND, _COPY_PACKET = 1, 2
_F_FAIL_OPEN, _F_GSO = 0x1, 0x4
_PACKET_HDR, _VERDICT_HDR, _MARK, _INDEV, _OUTDEV, _PAYLOAD, _CAP_LEN = 1, 2, 3, 5, 6, 10, 13
_TYPE: Final = 0x3FFF  # of an attribute, without its flags

_HEADER: Final = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_START: Final = 20  # bytes of that and of the generic header: family, version, queue
_ATTRIBUTE: Final = struct.Struct("=HH")  # length, type
# One verdict: both headers, its attribute with verdict and id, the attribute of the mark.
_VERDICT: Final = struct.Struct(">24sII4sI")
_MARK_NEXT: Final = _ATTRIBUTE.pack(8, _MARK)

_BATCH: Final = 64  # packets
LONGEST: Final = 0xFFFF - _ATTRIBUTE.size  # bytes of a packet that an attribute can hold
_HEADROOM: Final = 512  # bytes of a message before the packet: about 120 are in use
_LAYOUTS: Final = 32  # that are remembered
_FLUSH: Final = 1 << 16  # bytes of verdicts in one call; the kernel's default limit is 208 KB


def config(queue: int, *attributes: tuple[int, bytes], acknowledge: bool = False) -> bytes:
    """A message that sets attributes (NFQA_CFG_*) of a queue, for the socket that is bound to it."""
    body = struct.pack("!BBH", socket.AF_UNSPEC, 0, queue)
    for kind, value in attributes:
        size = _ATTRIBUTE.size + len(value)
        body += _ATTRIBUTE.pack(size, kind) + value + bytes(-size % 4)
    flags = _NLM_F_REQUEST | (_NLM_F_ACK if acknowledge else 0)
    return _HEADER.pack(_HEADER.size + len(body), _MSG_CONFIG, flags, 1, 0) + body


def open_to_all(settings: Settings) -> tuple[tuple[int, bytes], ...]:
    """The attributes by which what a full queue cannot take passes, and GSO's as it is wanted."""
    flags = _F_FAIL_OPEN | (0 if settings.segments else _F_GSO)
    return (
        (_MASK, struct.pack("!I", _F_FAIL_OPEN | _F_GSO)),
        (_FLAGS, struct.pack("!I", flags)),
    )


def copied(settings: Settings) -> tuple[int, bytes]:
    """The attribute by which packets come with their first `copy` bytes."""
    return _PARAMS, struct.pack("!IB", longest(settings), _COPY_PACKET)


def longest(settings: Settings) -> int:
    """The most bytes that are copied of a packet: enough for the fields of any IP header."""
    return max(60, min(settings.copy, LONGEST))


def no_longer(queue: int) -> bytes:
    """The message after which no packet waits any more: all pass unserved."""
    return config(queue, (_MAXLEN, bytes(4)))


def release(link: socket.socket, queue: int) -> None:
    """Let all that waits in a queue pass unserved, and all that would come; marks stay.

    For whoever has a copy of the socket by which the queue's reader reads, and finds the
    reader gone. Raises OSError.
    """
    link.setblocking(False)
    link.send(no_longer(queue))
    for row in table():
        if row[0] == queue:
            last = row[7]
            body = struct.pack("!BBH", socket.AF_UNSPEC, 0, queue)
            body += _ATTRIBUTE.pack(12, _VERDICT_HDR) + struct.pack("!II", NF_ACCEPT, last)
            size = _HEADER.size + len(body)
            link.send(_HEADER.pack(size, _MSG_VERDICT_BATCH, _NLM_F_REQUEST, 0, 0) + body)


def table() -> list[list[int]]:
    """The queues that somebody reads, in this thread's namespace.

    Of each: number, netlink port of its reader, packets that wait, how and how much is copied,
    packets dropped because it was full, and because the socket was, and the last packet's id
    (seq_show of net/netfilter/nfnetlink_queue.c).
    """
    try:
        lines = Path("/proc/thread-self/net/netfilter/nfnetlink_queue").read_text().splitlines()
    except OSError:
        return []
    return [[int(word) for word in line.split()] for line in lines]


def refused(queue: int, code: int) -> MachineError:
    """Why the kernel did not give us a queue, by its error number."""
    what = f"cannot serve queue {queue}"
    reader = _reader(queue)
    if reader is not None:
        return MachineError(
            f"{what}: another program reads it (netlink port {reader}, often its process id)",
            "end that program, or give this one other queues",
        )
    if code in (errno.EPERM, errno.EACCES):
        return MachineError(f"{what}: this needs root (CAP_NET_ADMIN)", "run it as root")
    if code in (errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT):
        return MachineError(
            f"{what}: this kernel has no queues for programs",
            "modprobe nfnetlink_queue, or a kernel with CONFIG_NETFILTER_NETLINK_QUEUE",
        )
    return MachineError(f"{what}: {os.strerror(code)}")


def waiting(fd: int) -> bool:
    """Is there anything to read?"""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def _reader(queue: int) -> int | None:
    """The netlink port of who reads a queue in this thread's namespace."""
    return next((row[1] for row in table() if row[0] == queue), None)


@dataclass(frozen=True, slots=True)
class _Layout:
    """How the messages of one kind of packet look.

    `shape` takes out the bytes that are `same` in all of them, `values` the rest of interest:
    id, mark and, of a packet that is not `whole`, its length. The packet begins at `start`.
    """

    shape: struct.Struct
    same: tuple[bytes, ...]
    values: struct.Struct
    whole: bool
    hook: int
    input: int
    output: int
    start: int

    @classmethod
    def of(cls, message: bytes) -> "_Layout | None":
        """The layout of a message; None if it is not one of a packet with its bytes."""
        if len(message) < _START or _HEADER.unpack_from(message)[:2] != (len(message), _MSG_PACKET):
            return None
        places, at = {}, _START
        while at + _ATTRIBUTE.size <= len(message):
            size, kind = _ATTRIBUTE.unpack_from(message, at)
            if size < _ATTRIBUTE.size or at + size > len(message):
                return None
            places[kind & _TYPE] = at + _ATTRIBUTE.size, size - _ATTRIBUTE.size
            at += size + -size % 4
        start, length = places.get(_PAYLOAD, (0, 0))
        if start + length != len(message) or places.get(_PACKET_HDR) != (_START + 4, 7):
            return None
        number = _START + 4

        def value(kind: int) -> int:
            return int.from_bytes(message[places[kind][0] :][:4]) if kind in places else 0

        varying = sorted(
            # The length; the id; values that differ; the length of the packet's attribute.
            [(0, 4), (number, 4), (start - 4, 2)]
            + [
                place
                for kind, place in places.items()
                if kind not in (_PACKET_HDR, _INDEV, _OUTDEV, _PAYLOAD)
            ]
        )
        shape, end = ">", 0
        for place, size in varying:
            shape += f"{place - end}s{size}x"
            end = place + size
        shape += f"{start - end}s"
        # The padding behind the hook is 0, so it stands for a mark that is not there.
        mark, size = places.get(_MARK, (number + 7, 1))
        cut, of_cut = places.get(_CAP_LEN, (start, 4))
        if message[number + 7] or (_MARK in places and size != 4) or of_cut != 4 or cut < mark:
            return None
        values = f">{number}xI{mark - number - 4}x{'B' if size == 1 else 'I'}"
        if _CAP_LEN in places:
            values += f"{cut - mark - size}xI"
        compiled = struct.Struct(shape)
        return cls(
            compiled,
            compiled.unpack_from(message),
            struct.Struct(values),
            _CAP_LEN not in places,
            message[number + 6],
            value(_INDEV),
            value(_OUTDEV),
            start,
        )


class _Vector(ctypes.Structure):
    """`struct iovec`."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Header(ctypes.Structure):
    """`struct msghdr`."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint),
        ("vectors", ctypes.POINTER(_Vector)),
        ("vectors_length", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Message(ctypes.Structure):
    """`struct mmsghdr`: how to receive, and how much was received."""

    _fields_ = (("header", _Header), ("length", ctypes.c_uint))


class Batch:
    """Memory for the messages that one call of recvmmsg(2) may bring.

    Message n begins at `starts[n]` of `memory`.
    """

    def __init__(self, longest: int) -> None:
        """`longest`: bytes of a packet."""
        room = longest + _HEADROOM & ~63
        self.memory: Final = mmap.mmap(-1, room * _BATCH)  # a slice of it is bytes, in one step
        self.starts: Final = range(0, room * _BATCH, room)
        self._base = ctypes.c_char.from_buffer(self.memory)
        address = ctypes.addressof(self._base)
        self._vectors = (_Vector * _BATCH)(
            *(_Vector(address + start, room) for start in self.starts)
        )
        self._messages = (_Message * _BATCH)()
        for message, vector in zip(self._messages, self._vectors, strict=True):
            message.header.vectors, message.header.vectors_length = ctypes.pointer(vector), 1
        words = memoryview(self._messages).cast("B").cast("I")
        self._sizes = words[_Message.length.offset // 4 :: ctypes.sizeof(_Message) // 4]
        self._recvmmsg = ctypes.CDLL(None, use_errno=True).recvmmsg
        self.overruns = 0

    def receive(self, fd: int) -> list[int]:
        """The sizes of the messages that came, maybe none; overruns are counted. Raises OSError."""
        while (count := self._recvmmsg(fd, self._messages, _BATCH, socket.MSG_DONTWAIT, None)) < 0:
            match ctypes.get_errno():
                case errno.EAGAIN:
                    return []
                case errno.ENOBUFS:
                    self.overruns += 1
                case errno.EINTR:
                    pass
                case code:
                    raise OSError(code, os.strerror(code))
        return self._sizes[:count].tolist()


class RawReader:
    """A `Reader` on a netlink socket of its own, in the network namespace of the calling thread.

    `cut` answers where `serve` gave new bytes for a packet of which not all was copied, or
    which the stack may still have to segment. Raises `MachineError` if the kernel gives us
    no queue.
    """

    def __init__(self, settings: Settings, serve: Serve, cut: Cut) -> None:
        self.truncated = 0
        self._settings, self._serve, self._cut = settings, serve, cut
        self._layouts: list[_Layout] = []
        self._refusal: int | None = None
        self._batch = Batch(longest(settings))
        queue = struct.pack("!BBH", socket.AF_UNSPEC, 0, settings.queue)
        header = _ATTRIBUTE.pack(12, _VERDICT_HDR)
        self._to_many = (
            _HEADER.pack(_VERDICT.size, _MSG_VERDICT_BATCH, _NLM_F_REQUEST, 0, 0) + queue + header
        )
        self._to_one = struct.pack("=HHII", _MSG_VERDICT, _NLM_F_REQUEST, 0, 0) + queue + header
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        except OSError as error:
            raise refused(settings.queue, error.errno or 0) from error
        try:
            self._bind()
        except OSError as error:
            self._socket.close()
            raise refused(settings.queue, error.errno or 0) from error

    def _bind(self) -> None:
        settings, ours = self._settings, self._socket
        ours.bind((0, 0))
        ours.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, settings.buffer)
        ours.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)  # an error does not repeat the packet
        # In one message: of a queue that is bound but has no copy range yet, packets are dropped.
        ours.send(
            config(
                settings.queue,
                (_CMD, struct.pack("!BBH", _BIND, 0, socket.AF_UNSPEC)),
                copied(settings),
                (_MAXLEN, struct.pack("!I", settings.length)),
                *open_to_all(settings),
                acknowledge=True,
            )
        )
        # The kernel has answered when `send` returns; packets may stand before its answer.
        while self._refusal is None and waiting(self.fileno()):
            self.read()
        if self._refusal:
            raise OSError(self._refusal, os.strerror(self._refusal))

    @property
    def overruns(self) -> int:
        return self._batch.overruns

    def fileno(self) -> int:
        return self._socket.fileno()

    def read(self) -> int:
        sizes = self._batch.receive(self._socket.fileno())
        return self._answer(sizes) if sizes else 0

    def _answer(self, sizes: list[int]) -> int:
        memory, serve, layouts = self._batch.memory, self._serve, self._layouts
        segments = self._settings.segments
        parts: list[bytes | bytearray] = []
        alike, last, shared, shared_mark = False, 0, 0, 0  # neighbours that wait for one verdict
        count, room = 0, _FLUSH
        try:
            for at, size in zip(self._batch.starts, sizes, strict=False):
                for layout in layouts:
                    if layout.shape.unpack_from(memory, at) == layout.same:
                        break
                else:
                    found = self._learned(memory[at : at + size])
                    if found is None:
                        continue
                    layout = found
                if layout.whole:
                    number, mark = layout.values.unpack_from(memory, at)
                    length = 0
                else:
                    number, mark, length = layout.values.unpack_from(memory, at)
                payload = memory[at + layout.start : at + size]
                verdict, new, wanted = serve(
                    payload, mark, layout.hook, layout.input, layout.output, length
                )
                count += 1
                if new is not None and (length or not segments or len(new) > LONGEST):
                    self.truncated += 1
                    verdict, _, wanted = self._cut(mark)
                    new = None
                if verdict != shared or wanted != shared_mark or new is not None:
                    if alike:
                        parts.append(
                            _VERDICT.pack(self._to_many, shared, last, _MARK_NEXT, shared_mark)
                        )
                        alike = False
                    shared, shared_mark = verdict, wanted
                if new is None:
                    last, alike = number, True
                    continue
                size = _ATTRIBUTE.size + len(new)
                padding = -size % 4
                whole = _VERDICT.size + size + padding
                if room < whole:
                    self._send(parts)
                    parts, room = [], _FLUSH
                room -= whole
                head = whole.to_bytes(4, sys.byteorder) + self._to_one
                parts += (
                    _VERDICT.pack(head, verdict, number, _MARK_NEXT, wanted),
                    _ATTRIBUTE.pack(size, _PAYLOAD),
                    new,
                    bytes(padding),
                )
        finally:
            if alike:
                parts.append(_VERDICT.pack(self._to_many, shared, last, _MARK_NEXT, shared_mark))
            self._send(parts)
        return count

    def _learned(self, message: bytes) -> _Layout | None:
        """The layout of a message that looks like none before; of what is no packet, None."""
        layout = _Layout.of(message)
        if layout is not None:
            self._layouts.insert(0, layout)
            del self._layouts[_LAYOUTS:]
        elif (
            self._refusal is None
            # Later errors are about verdicts on packets that are gone: the queue was flushed.
            and len(message) >= _START
            and _HEADER.unpack_from(message)[1] == _NLMSG_ERROR
        ):
            self._refusal = -struct.unpack_from("=i", message, _HEADER.size)[0]
        return layout

    def _send(self, parts: list[bytes | bytearray]) -> None:
        if parts:
            self._socket.send(b"".join(parts))

    def close(self) -> None:
        if self._socket.fileno() < 0:
            return
        with self._socket:
            self._socket.send(no_longer(self._settings.queue))
            while waiting(self.fileno()):
                self.read()
