"""Connections as Linux tracks them, as far as a policy can see them.

One dictionary leads from what identifies a direction of a connection (addresses,
and ports or what stands for them) to the connection and the direction, so a packet
costs one look-up. Per protocol a function then says whether the packet fits, what
it makes of the connection's state, and how long the connection lives from now. An
expired connection is removed when it is met, and a sweep from time to time removes
the others. Nothing here reads a clock: time comes in as seconds.

The facts are those of Linux 6.18: net/netfilter/nf_conntrack_core.c, and
nf_conntrack_proto_{tcp,udp,sctp,gre,icmp,icmpv6}.c beside it, with the defaults of
Documentation/networking/nf_conntrack-sysctl.rst (`nf_conntrack_tcp_loose` is 1).

What is not modelled: sequence windows of TCP, and so neither packets that are invalid
for being outside nor the 300 s that a connection is left with when data stays without
acknowledgement, is sent again and again, or meets a closed window; verification tags
of SCTP; wrong checksums, which make a packet invalid at prerouting; reassembly: the
kernel puts fragments together before it tracks, here each is judged by itself, so a
later one is invalid; the authentication header of IPv6, which the kernel looks behind;
helpers and expectations (FTP, SIP, the keys of PPTP's GRE), zones, NAT, and the limit
`nf_conntrack_max`.
"""

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

from itmlang.packet import ICMP, ICMPV6, TCP, UDP, MalformedError, Packet
from itmlang.values import IPV4, IPV6, PROTOCOLS

INVALID, ESTABLISHED, RELATED, NEW, UNTRACKED = range(5)  # `ct state`
ORIGINAL, REPLY = range(2)  # `ct direction`

_GRE, _SCTP, _UDPLITE = PROTOCOLS["gre"], PROTOCOLS["sctp"], PROTOCOLS["udplite"]
_NO_NEXT = 59  # of IPv6, RFC 8200 section 4.7
# DCCP is not among them: since Linux 6.16 it is tracked by its addresses alone.
_WITH_PORTS: Final = frozenset({TCP, UDP, _SCTP, _UDPLITE})

# Family, protocol, source, destination, and two numbers: the ports; or the identifier
# of an ICMP request and its type and code; or zero and the call of PPTP's GRE.
_Key = tuple[int, int, int, int, int, int]

_ICMP_OF: Final = {IPV4: ICMP, IPV6: ICMPV6}
_REQUESTS: Final = {ICMP: {8: 0, 13: 14, 15: 16, 17: 18}, ICMPV6: {128: 129, 139: 140}}
_ANSWERS: Final = {
    protocol: answers | {answer: request for request, answer in answers.items()}
    for protocol, answers in _REQUESTS.items()
}
_ERRORS: Final = {ICMP: frozenset({3, 4, 5, 11, 12}), ICMPV6: frozenset(range(128))}
# Multicast listener discovery and neighbour discovery.
_NEVER_TRACKED: Final = {ICMP: frozenset[int](), ICMPV6: frozenset({*range(130, 137), 143})}


@dataclass(slots=True, eq=False)
class Connection:
    """One connection; `number` (32 bits) is its own, as `ct id` is."""

    number: int
    keys: tuple[_Key, _Key]  # of the original and the reply direction
    state: str = "N"  # of TCP and SCTP, see `_TCP_MOVES` and `_SCTP_MOVES`
    replied: bool = False
    confirmed: bool = False
    opened: float = 0.0
    timeout: float = 0.0
    expires: float = -math.inf
    # Of TCP: the kind, direction and end of the packet before, and what it remembers.
    last: tuple[str, int, int] = ("", ORIGINAL, 0)
    closing: bool = False  # a FIN began to close it
    challenged: bool = False  # a SYN came while the last acknowledgement was awaited
    simultaneous: bool = False  # both ends sent a SYN

    def alive(self, now: float) -> bool:
        """Would `ct count`, having met it once, still count it at `now` (seconds)?

        Not if it was never confirmed, has timed out, or is of TCP and closed (TIME_WAIT
        or CLOSE): `find_or_evict` and `already_closed` in net/netfilter/nf_conncount.c.
        The new connection of the packet at hand counts before it is confirmed.
        """
        closed = self.keys[ORIGINAL][1] == TCP and self.state in "TC"
        return now < self.expires and not closed


class Tracked(NamedTuple):
    """What conntrack says of a packet: `ct state`, `ct direction`, and the connection."""

    state: int
    direction: int | None = None
    connection: Connection | None = None


class Conntrack:
    """All connections of a host."""

    def __init__(self) -> None:
        self._connections: dict[_Key, tuple[Connection, int]] = {}
        self._number = 0
        self._crowded = 4096  # entries at which the next sweep is due

    def __len__(self) -> int:
        """The connections in the table, also those that timed out and were not met since."""
        return len(self._connections) // 2

    def track(self, packet: Packet, now: float) -> Tracked:
        """Find or open the packet's connection, at prerouting or output; `now` in seconds."""
        key = _key(packet)
        if key is None:
            return Tracked(INVALID)
        protocol, kind = key[1], key[5] >> 8
        if protocol in _ERRORS:
            if kind in _NEVER_TRACKED[protocol]:
                return Tracked(UNTRACKED)
            if kind in _ERRORS[protocol]:
                return self._related(packet, now)
        found = self._find(key, now)
        if found is None:
            reply = _inverse(key)
            if reply is None:
                return Tracked(INVALID)
            self._number = (self._number + 1) & 0xFFFFFFFF
            found = Connection(self._number, (key, reply), opened=now), ORIGINAL
        connection, direction = found
        result = _PROTOCOLS.get(protocol, _generic)(connection, packet, direction, now)
        if result is _Result.REOPENED:
            connection.expires = -math.inf
            return self.track(packet, now)
        if result is _Result.INVALID:
            return Tracked(INVALID)
        if not isinstance(result, _Result):
            connection.timeout = result
            if connection.confirmed:
                connection.expires = now + result
        if direction == REPLY:
            connection.replied = True
        return Tracked(ESTABLISHED if connection.replied else NEW, direction, connection)

    def confirm(self, tracked: Tracked, now: float) -> None:
        """The packet left the host or was delivered: its connection, if new, is kept."""
        connection = tracked.connection
        if connection is None or connection.confirmed:
            return
        if self._find(connection.keys[ORIGINAL], now) is not None:
            return  # another packet of it came first
        if len(self._connections) >= self._crowded:
            for old, _ in list(self._connections.values()):
                if now >= old.expires:
                    self._remove(old)
            self._crowded = max(4096, 2 * len(self._connections))
        connection.confirmed = True
        connection.expires = now + connection.timeout
        for direction, key in enumerate(connection.keys):
            self._connections[key] = connection, direction

    def _find(self, key: _Key, now: float) -> tuple[Connection, int] | None:
        found = self._connections.get(key)
        if found is not None and now >= found[0].expires:
            self._remove(found[0])
            return None
        return found

    def _remove(self, connection: Connection) -> None:
        for key in connection.keys:
            self._connections.pop(key, None)

    def _related(self, packet: Packet, now: float) -> Tracked:
        """An ICMP error belongs to the connection of the packet that it quotes."""
        quoted = _quoted(packet)
        key = None if quoted is None else _key(quoted)
        inverse = None if key is None else _inverse(key)
        found = None if inverse is None else self._find(inverse, now)
        # Nobody but the quoted packet's sender may be told.
        if found is None or quoted is None or quoted.source != packet.destination:
            return Tracked(INVALID)
        connection, direction = found
        return Tracked(RELATED, direction, connection)


def _key(packet: Packet) -> _Key | None:
    """What identifies the packet's direction of its connection; None if it cannot have one."""
    (family, source), (_, destination) = packet.source, packet.destination
    protocol = packet.protocol
    if protocol is None or packet.fragment_offset or (family, protocol) == (IPV6, _NO_NEXT):
        return None
    first = second = 0
    if protocol in _WITH_PORTS:
        ports = packet.transport_bytes(0, 4)
        if ports is None:
            return None
        first, second = struct.unpack("!HH", ports)
    elif protocol in _ICMP_OF.values():
        header = packet.transport_bytes(0, 8)
        if header is None or protocol != _ICMP_OF[family]:
            return None
        second, first = struct.unpack("!H2xH", header[:6])
    elif protocol == _GRE:
        # Version 1 is PPTP's (RFC 2637), always for PPP; any other has no key here.
        header = packet.transport_bytes(0, 8)
        if header is not None and header[1] & 7 == 1:
            if header[2:4] != b"\x88\x0b":
                return None
            second = int.from_bytes(header[6:])
    return family, protocol, source, destination, first, second


def _inverse(key: _Key) -> _Key | None:
    """The key of the packets that come back; None if none can."""
    family, protocol, source, destination, first, second = key
    if protocol not in _ANSWERS:
        return family, protocol, destination, source, second, first
    answer = _ANSWERS[protocol].get(second >> 8)
    if answer is None:
        return None
    return family, protocol, destination, source, first, answer << 8 | second & 0xFF


def _quoted(packet: Packet) -> Packet | None:
    """The packet within an ICMP error, which may be cut short."""
    data = packet.data[packet.transport + 8 :]
    place, outside = (2, 0) if packet.family == IPV4 else (4, 40)
    if len(data) < max(outside, 20):
        return None
    struct.pack_into("!H", data, place, len(data) - outside)
    try:
        quoted = Packet(data)
    except MalformedError:
        return None
    return quoted if quoted.family == packet.family else None


class _Result(Enum):
    """What a protocol says of a packet, instead of a new timeout."""

    INVALID = 0
    UNCHANGED = 1  # valid, and the connection's time runs on
    REOPENED = 2  # the connection is over, the packet opens the next one


_Protocol = Callable[[Connection, Packet, int, float], float | _Result]


def _generic(connection: Connection, packet: Packet, direction: int, now: float) -> float:
    return 600


def _gre(connection: Connection, packet: Packet, direction: int, now: float) -> float:
    return 180 if connection.replied else 30


def _icmp(connection: Connection, packet: Packet, direction: int, now: float) -> float | _Result:
    _, protocol, *_, kind = connection.keys[ORIGINAL]
    return 30 if kind >> 8 in _REQUESTS[protocol] else _Result.INVALID


def _udp(connection: Connection, packet: Packet, direction: int, now: float) -> float | _Result:
    length = packet.transport_bytes(4, 4)
    size = len(packet.data) - packet.transport
    if length is None or not 8 <= int.from_bytes(length[:2]) <= size:
        return _Result.INVALID
    # A question and its answer are no stream yet.
    return 120 if connection.replied and now - connection.opened > 2 else 30


def _udplite(connection: Connection, packet: Packet, direction: int, now: float) -> float | _Result:
    header = packet.transport_bytes(4, 4)
    if header is None or header[2:] == b"\0\0":  # without a checksum, RFC 3828 section 3.1
        return _Result.INVALID
    coverage = int.from_bytes(header[:2])
    if coverage and not 8 <= coverage <= len(packet.data) - packet.transport:
        return _Result.INVALID
    return 120 if connection.replied else 30


# The states are None, Syn sent, syn Received, Established, Fin wait, close Wait, Last
# acknowledgement, Time wait, Closed, and D: SYN sent by both ends. For each kind of packet
# stands what comes after each of them, for the original direction, then for replies: "."
# is a packet that may or may not be valid and changes nothing, "!" an invalid one. This
# and the timeouts are the kernel's `tcp_conntracks` and `tcp_timeouts`.
_TCP_STATES: Final = "NSREFWLTCD"
_TCP_MOVES: Final = {
    "syn": ("SS.....SSD", "!D!!!!!S!D"),
    "syn+ack": ("!!R!!!!!!R", "!R.......R"),
    "fin": ("!!FFLLLTC!", "!!FFLLLTC!"),
    "ack": ("E!EEWWTTC!", "!.REWWTTC."),
    "rst": ("!CCCCCCCCC", "!CCCCCCCCC"),
}
_TCP_TIMEOUTS: Final = {
    "S": 120, "R": 60, "E": 432_000, "F": 120, "W": 60, "L": 30, "T": 120, "C": 10, "D": 120,
}  # fmt: skip
_TCP_ONE_SIDED = 300  # seconds of an established connection that only one end was seen of
# What FIN, SYN, RST, ACK and URG make of a packet (`tcp_valid_flags`); others are invalid.
_TCP_KINDS: Final = {
    0x02: "syn", 0x22: "syn", 0x12: "syn+ack", 0x04: "rst", 0x14: "rst",
    0x11: "fin", 0x31: "fin", 0x10: "ack", 0x30: "ack",
}  # fmt: skip


def _tcp(connection: Connection, packet: Packet, direction: int, now: float) -> float | _Result:
    header = packet.transport_bytes(0, 20)
    size = len(packet.data) - packet.transport
    if header is None or not 20 <= header[12] >> 4 << 2 <= size:
        return _Result.INVALID
    kind = _TCP_KINDS.get(header[13] & 0x37)
    if kind is None:
        return _Result.INVALID
    before = connection.state
    after = _TCP_MOVES[kind][direction][_TCP_STATES.index(before)]
    last_kind, last_direction, last_end = connection.last
    if after == "S" and before in "TC":
        if connection.closing or (last_kind, last_direction) == ("rst", direction):
            return _Result.REOPENED
        after = "."
    if after == "!":
        return _Result.INVALID
    sequence, acknowledged = struct.unpack_from("!II", header, 4)
    if after == ".":
        answered = (last_kind, last_direction, last_end) == ("syn", 1 - direction, acknowledged)
        if kind != "syn+ack" or not answered:
            end = sequence + size - (header[12] >> 4 << 2) + (kind.startswith("syn"))
            connection.last = kind, direction, end & 0xFFFFFFFF
            if (kind, direction) == ("syn", ORIGINAL):
                connection.challenged, connection.simultaneous = before == "L", False
            return _Result.UNCHANGED
        # The SYN that seemed out of place was right: both ends began anew.
        before, after, connection.closing, connection.challenged = "S", "R", False, False
    elif after == "T" and before == "L" and kind == "ack" and connection.challenged:
        if (last_kind, last_direction) == ("syn", 1 - direction):
            connection.challenged = False  # it answers that SYN, not the FIN: RFC 5961
            return _Result.UNCHANGED
    elif after == "D":
        connection.simultaneous = True
    elif after == "R" and (direction, kind) == (REPLY, "ack") and connection.simultaneous:
        after = "E"
    connection.last = kind, direction, last_end
    connection.state = after
    connection.closing |= after == "F" != before
    timeout = _TCP_TIMEOUTS[after]
    if not connection.replied:
        if kind == "rst":
            connection.expires = -math.inf  # refused: nothing is kept of it
            return _Result.UNCHANGED
        if kind == "syn" and before == "S":
            return _Result.UNCHANGED
        timeout = min(timeout, _TCP_ONE_SIDED)
    return timeout


# The same of SCTP: None, Closed, cookie Wait, cookie echoed (K), Established, shutdown
# Sent, shutdown Received, shutdown Acknowledged, Heartbeat sent; by the type of a chunk
# (RFC 9260 section 3.2), others change nothing (`sctp_conntracks` and `sctp_timeouts`).
_SCTP_STATES: Final = "NCWKESRAH"
_INIT, _INIT_ACK, _ABORT, _COOKIE_ECHO, _COOKIE_ACK, _SHUTDOWN_COMPLETE = 1, 2, 6, 10, 11, 14
_SCTP_MOVES: Final = {
    _INIT: ("CCWKECCAW", "!CWKESRA!"),
    _INIT_ACK: ("CCWKESRAC", "!WWKESRA!"),
    4: ("HCWKESRAH", "!CWKESRAH"),  # heartbeat
    5: ("CCWKESRAH", "!CWKESRAE"),  # and its acknowledgement
    _ABORT: ("CCCCCCCCC", "!CCCCCCC!"),
    7: ("CCWKSSRAC", "!CWKRSRA!"),  # shutdown
    8: ("ACWKEAAAA", "!CWKEAAA!"),  # and its acknowledgement
    9: ("CCWKESRAC", "!CWCESRA!"),  # error
    _COOKIE_ECHO: ("CCKKESRAC", "!CKKESRA!"),
    _COOKIE_ACK: ("CCWEESRAC", "!CWEESRA!"),
    _SHUTDOWN_COMPLETE: ("CCWKESRCC", "!CWKESRC!"),
}
_SCTP_TIMEOUTS: Final = {"C": 10, "W": 3, "K": 3, "E": 210, "S": 3, "R": 3, "A": 3, "H": 30}
_SCTP_ALONE: Final = frozenset({_INIT, _INIT_ACK, _SHUTDOWN_COMPLETE})
_SCTP_FIRST: Final = _SCTP_ALONE | {_COOKIE_ECHO, _COOKIE_ACK}  # of the chunks in a packet
_SCTP_OPENING: Final = _SCTP_MOVES.keys() - {_ABORT, _SHUTDOWN_COMPLETE, _COOKIE_ACK}
_SCTP_TAGGED: Final = frozenset({4, 5, 8})  # what opens a connection with a tag, section 8.4


def _sctp(connection: Connection, packet: Packet, direction: int, now: float) -> float | _Result:
    chunks = _chunks(packet)
    tagged = packet.transport_bytes(4, 4) != bytes(4)
    if not chunks or (tagged and _INIT in chunks):
        return _Result.INVALID
    opens = _SCTP_OPENING.issuperset(chunks)
    if tagged and _SCTP_TAGGED.isdisjoint(chunks):
        opens = False
    if not (connection.confirmed or opens):
        return _Result.INVALID
    for chunk in chunks:
        before = connection.state
        if chunk in _SCTP_MOVES:
            after = _SCTP_MOVES[chunk][direction][_SCTP_STATES.index(before)]
            if after == "!":
                return _Result.INVALID
            connection.state = after
    if chunks == [_INIT] and before == connection.state == "C" and connection.confirmed:
        return _Result.UNCHANGED
    return _SCTP_TIMEOUTS[connection.state]


def _chunks(packet: Packet) -> list[int]:
    """The types of an SCTP packet's chunks; none if they cannot stand together."""
    chunks: list[int] = []
    offset = 12
    while (header := packet.transport_bytes(offset, 4)) is not None:
        chunk, length = header[0], int.from_bytes(header[2:])
        # The rest of these two begins with 16 bytes, the initiate tag first.
        if chunk in {_INIT, _INIT_ACK} and packet.transport_bytes(offset, 20) is None:
            return []
        if length == 0 or (chunks and (chunks[0] in _SCTP_ALONE or chunk in _SCTP_FIRST)):
            return []
        chunks.append(chunk)
        offset += (length + 3) & ~3
    return chunks


_PROTOCOLS: Final[Mapping[int, _Protocol]] = {
    TCP: _tcp, UDP: _udp, _UDPLITE: _udplite, _SCTP: _sctp, _GRE: _gre,
    ICMP: _icmp, ICMPV6: _icmp,
}  # fmt: skip
