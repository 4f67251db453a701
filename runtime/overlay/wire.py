"""Probes and their answers as bytes, authenticated: pure.

A datagram is, in network byte order:

    "itm" | version 1 | kind | flags | prefixes told | neighbours told
    sender (4) | target (4) | via (4) | sequence (8) | echo (8)
    told prefixes (address 4, length 1) | told neighbours (4)
    HMAC-SHA256 of all before it under the overlay's key, its first 16 bytes (RFC 2104, 4868)

The tag is looked at before anything else is believed. What it does not say is when it was made:
for that there are sequence numbers. A sender counts from the time it began, in microseconds, so
that a restarted one begins above all it ever sent. Who answers remembers, for each sender, which
of the last `SPAN` numbers were there, and takes none twice and none that is older. An answer
must be of a probe that is still waited for.

Right after the answering side has restarted it remembers nothing, so one probe that somebody has
recorded may pass for fresh. What comes of it is one answer, to the address of the authenticated
sender, who does not wait for it and drops it: no choice is changed, and as each recorded
probe works once and answers are bounded in rate, nobody is flooded.
"""

import hmac
import struct
from dataclasses import dataclass
from typing import Final

VERSION: Final = 1
PROBE: Final = 1
ANSWER: Final = 2
LARGEST: Final = 1200  # bytes of a datagram: fits any path, in a tunnel, too
MOST_PREFIXES: Final = 200  # told in one answer
MOST_NEIGHBORS: Final = 32
LEAST_KEY: Final = 16  # bytes
SPAN: Final = 1024  # sequence numbers that are remembered
LARGEST_SEQUENCE: Final = (1 << 64) - 1

TRUNCATED: Final = "truncated"
FORGED: Final = "forged"
MALFORMED: Final = "malformed"

_MAGIC: Final = b"itm"
_HEAD: Final = struct.Struct("!3sBBBBBIIIQ8s")
_PREFIX: Final = struct.Struct("!IB")
_TAG: Final = 16
_TELL: Final = 1  # a flag: tell me (in a probe), this is what I tell (in an answer)
_VAIN: Final = 2  # another: packets that I send to you bring nothing back

LEAST: Final = _HEAD.size + _TAG  # bytes of the shortest datagram


class RefusedError(Exception):
    """A datagram that is no message of this overlay.

    `reason` is `TRUNCATED` (shorter than it says), `FORGED` (not made with the key, or changed
    since) or `MALFORMED` (another protocol or version, or nonsense under a good tag).
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Told:
    """What a member tells of itself: networks behind it (address, prefix length), and the
    addresses of its neighbours."""

    prefixes: tuple[tuple[int, int], ...] = ()
    neighbors: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Message:
    """A probe, or the answer to one. Addresses are IPv4, integers; `via` 0 is the direct path.

    An answer has the probe's `via`, `sequence` and `echo` (8 bytes that mean something to the
    prober only), and who answers as its sender. `asks`: the probe wants to be told. `told` is
    what an answer tells, None if nothing was asked. `vain`: packets of the sender bring nothing back.
    """

    kind: int
    sender: int
    target: int
    via: int
    sequence: int
    echo: bytes
    asks: bool = False
    told: Told | None = None
    vain: bool = False


def key_of(data: bytes) -> bytes:
    """The key in a file's bytes, without white space around it.

    Raises `ValueError` (what to do about it) if it has less than `LEAST_KEY` bytes.
    """
    key = data.strip()
    if len(key) < LEAST_KEY:
        what = f"has {len(key)} bytes" if key else "is empty"
        raise ValueError(
            f"the key {what}, and at least {LEAST_KEY} are needed: make one with "
            "`openssl rand -hex 32`, the same for all members"
        )
    return key


def pack(message: Message, key: bytes) -> bytes:
    """The bytes of a message. Raises `ValueError` for one that `unpack` would refuse."""
    told = message.told or Told()
    if (fault := _fault(message)) is not None:
        raise ValueError(fault)
    flags = _TELL if message.asks or message.told is not None else 0
    flags |= _VAIN if message.vain else 0
    body = b"".join(
        (
            _HEAD.pack(
                _MAGIC, VERSION, message.kind, flags, len(told.prefixes), len(told.neighbors),
                message.sender, message.target, message.via, message.sequence, message.echo,
            ),
            *(_PREFIX.pack(*one) for one in told.prefixes),
            *(one.to_bytes(4, "big") for one in told.neighbors),
        )
    )  # fmt: skip
    return body + _tag(body, key)


def unpack(data: bytes, key: bytes) -> Message:
    """The message in a datagram. Raises `RefusedError`, and nothing else, for any other bytes."""
    if len(data) < LEAST:
        raise RefusedError(TRUNCATED)
    magic, version, kind, flags, prefixes, neighbors, sender, target, via, sequence, echo = (
        _HEAD.unpack_from(data)
    )
    if magic != _MAGIC or version != VERSION:
        raise RefusedError(MALFORMED)
    length = LEAST + prefixes * _PREFIX.size + neighbors * 4
    if len(data) < length:
        raise RefusedError(TRUNCATED)
    if not hmac.compare_digest(_tag(data[:-_TAG], key), data[-_TAG:]):
        raise RefusedError(FORGED)
    tells, unknown = flags & _TELL, flags & ~(_TELL | _VAIN)
    if len(data) > length or unknown or ((prefixes or neighbors) and not tells):
        raise RefusedError(MALFORMED)
    told = None
    if kind == ANSWER and tells:
        middle = _HEAD.size + prefixes * _PREFIX.size
        told = Told(
            tuple(_PREFIX.iter_unpack(data[_HEAD.size : middle])),
            struct.unpack(f"!{neighbors}I", data[middle:-_TAG]),
        )
    elif prefixes or neighbors:
        raise RefusedError(MALFORMED)
    asks, vain = kind == PROBE and bool(tells), bool(flags & _VAIN)
    message = Message(kind, sender, target, via, sequence, echo, asks, told, vain)
    if _fault(message) is not None:
        raise RefusedError(MALFORMED)
    return message


class Window:
    """Which of the last `SPAN` sequence numbers of a sender were there (as in RFC 4303, 3.4.3)."""

    __slots__ = ("_bits", "_newest")

    def __init__(self) -> None:
        self._newest = -1
        self._bits = 0  # the lowest is the newest number's

    def fresh(self, sequence: int) -> bool:
        """Is it seen for the first time? From now on it is not."""
        ahead = sequence - self._newest
        if ahead > 0:
            kept = self._bits << ahead if ahead < SPAN else 0
            self._bits = (kept | 1) & ((1 << SPAN) - 1)
            self._newest = sequence
            return True
        if -ahead >= SPAN or self._bits >> -ahead & 1:
            return False
        self._bits |= 1 << -ahead
        return True


def contains(prefix: tuple[int, int], address: int) -> bool:
    """Is an address in a network?"""
    return (prefix[0] ^ address) >> (32 - prefix[1]) == 0


def overlaps(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Do two networks share an address?"""
    return (one[0] ^ other[0]) >> (32 - min(one[1], other[1])) == 0


def _tag(body: bytes, key: bytes) -> bytes:
    return hmac.digest(key, body, "sha256")[:_TAG]


def _fault(message: Message) -> str | None:
    """What makes no sense in a message."""
    if message.kind not in (PROBE, ANSWER):
        return "neither a probe nor an answer"
    addresses = (message.sender, message.target, message.via)
    if not all(0 <= one < 1 << 32 for one in addresses) or not message.sender > 0:
        return "an address is none"
    if message.target == 0 or message.sender == message.target or message.via in addresses[:2]:
        return "the ends and what is between are not three"
    if not 0 <= message.sequence <= LARGEST_SEQUENCE or len(message.echo) != 8:
        return "a number does not fit"
    if (message.asks and message.kind != PROBE) or (message.told and message.kind != ANSWER):
        return "probes ask, answers tell"
    told = message.told
    if told is None:
        return None
    if len(told.prefixes) > MOST_PREFIXES or len(told.neighbors) > MOST_NEIGHBORS:
        return "too much is told"
    if not all(_is_prefix(*one) for one in told.prefixes):
        return "a network is none"
    if not all(0 < one < 1 << 32 for one in told.neighbors):
        return "a neighbour is none"
    return None


def _is_prefix(address: int, length: int) -> bool:
    if not (0 <= length <= 32 and 0 <= address < 1 << 32):
        return False
    return address & ((1 << (32 - length)) - 1) == 0
