"""Packets of connections, and scripts of them with what conntrack says of each.

The numbers fit each other: a SYN has sequence number -1, all else has 0 and
acknowledges 0, TCP carries no data and the tags of SCTP are 0. So no packet is outside
a window, also where the kernel has not seen the other end's numbers yet and takes 0 for
them: its checks of windows and tags, which the model has not, find nothing.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple

from itmlang.conntrack import Tracked
from itmlang.packet import internet_checksum

ICMP, TCP, UDP, DCCP, GRE, ICMPV6, SCTP, UDPLITE = 1, 6, 17, 33, 47, 58, 132, 136
FIN, SYN, RST, PSH, ACK, URG = 1, 2, 4, 8, 16, 32
NETWORK = {4: 0x0A000000, 6: 0xFD << 120}
HOPS_OF_THE_LOST = 33  # packets with this TTL are to be dropped after conntrack saw them
_CHECKSUM = {ICMP: 2, TCP: 16, UDP: 6, ICMPV6: 2, UDPLITE: 6}


def host(family: int, side: int, number: int = 1) -> bytes:
    """An address of the client's (1) or the server's network (2)."""
    if family == 4:
        return bytes((10, 0, side, number))
    return bytes((0xFD, 0, 0, side, *bytes(11), number))


def ip(source: bytes, destination: bytes, protocol: int, transport: bytes, hops: int = 64) -> bytes:
    """A packet with right checksums, where the protocol has one that is known here."""
    body = bytearray(transport)
    ends = source + destination
    place = _CHECKSUM.get(protocol)
    if place is not None and len(body) >= place + 2:
        # The kernel takes UDP's number for UDP-Lite too (`udplite_error`), which is wrong.
        pseudo = ends + struct.pack("!II", len(body), UDP if protocol == UDPLITE else protocol)
        covered = bytes(body) if protocol == ICMP else pseudo + body
        struct.pack_into("!H", body, place, internet_checksum(covered) or 0xFFFF)
    elif protocol == SCTP and len(body) >= 12:
        struct.pack_into("<I", body, 8, _crc32c(body))
    if len(source) == 16:
        return struct.pack("!IHBB", 6 << 28, len(body), protocol, hops) + ends + body
    head = bytearray(struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 7, 0, hops, protocol, 0))
    struct.pack_into("!H", head, 10, internet_checksum(head + ends))
    return bytes(head + ends + body)


def _crc32c(data: bytes | bytearray) -> int:
    """RFC 9260 appendix A."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def tcp(ports: tuple[int, int], flags: int, window: int = 60_000) -> bytes:
    sequence = 0xFFFFFFFF if flags & SYN else 0
    return struct.pack("!HHIIBBHHH", *ports, sequence, 0, 0x50, flags, window, 0, 0)


def udp(ports: tuple[int, int], payload: bytes = b"") -> bytes:
    return struct.pack("!HHHH", *ports, 8 + len(payload), 0) + payload


def icmp(kind: int, identifier: int = 1, code: int = 0, payload: bytes = b"") -> bytes:
    return struct.pack("!BBHHH", kind, code, 0, identifier, 1) + payload


def sctp(ports: tuple[int, int], *chunks: int, tag: int = 0) -> bytes:
    bodies = (struct.pack("!BBH16x", chunk, 0, 20) for chunk in chunks)
    return struct.pack("!HHII", *ports, tag, 0) + b"".join(bodies)


def gre(call: int | None = None) -> bytes:
    """Plain GRE, or with a call PPTP's."""
    if call is None:
        return struct.pack("!HHI", 0, 0x0800, 0)
    return struct.pack("!HHHHI", 0x3001, 0x880B, 0, call, 1)


def said(tracked: Tracked) -> str:
    """`ct state`, and `ct direction` where it is reply."""
    state = ("invalid", "established", "related", "new", "untracked")[tracked.state]
    return state + " reply" * (tracked.direction == 1)


class Step(NamedTuple):
    data: bytes
    said: str


def script(family: int, text: Sequence[tuple[str, int, bytes, str]]) -> list[Step]:
    """`>` is from the client, `<` from the server, `x` from the client and dropped."""
    client, server = host(family, 1), host(family, 2)
    steps = []
    for arrow, protocol, transport, expected in text:
        ends = (server, client) if arrow == "<" else (client, server)
        hops = HOPS_OF_THE_LOST if arrow == "x" else 64
        steps.append(Step(ip(*ends, protocol, transport, hops), expected))
    return steps


def _scripts(family: int) -> dict[str, list[Step]]:
    there, back = (1000, 80), (80, 1000)
    new, old, reply, bad = "new", "established", "established reply", "invalid"
    client, server = host(family, 1), host(family, 2)
    handshake = [
        (">", TCP, tcp(there, SYN), new),
        ("<", TCP, tcp(back, SYN | ACK), reply),
        (">", TCP, tcp(there, ACK), old),
    ]
    closed = [
        *handshake,
        ("<", TCP, tcp(back, PSH | ACK), reply),
        (">", TCP, tcp(there, FIN | ACK), old),
        ("<", TCP, tcp(back, ACK), reply),
        ("<", TCP, tcp(back, FIN | ACK), reply),
        (">", TCP, tcp(there, ACK), old),
    ]
    protocol, request, answer = (ICMP, 8, 0) if family == 4 else (ICMPV6, 128, 129)
    unreachable = 3 if family == 4 else 1
    quotes = {
        "udp": ip(client, server, UDP, udp(there)),
        "strange": ip(client, server, UDP, udp((5, 5))),
        "echo": ip(client, server, protocol, icmp(request)),
        "cut": ip(client, server, UDP, udp(there))[:-4],
        "answer": ip(server, client, UDP, udp(back)),
        "esp": ip(client, server, 50, bytes(8)),
    }
    error = {
        name: icmp(unreachable, 0, 3 if family == 4 else 4, quote) for name, quote in quotes.items()
    }
    texts = {
        "udp": [
            (">", UDP, udp(there), new),
            (">", UDP, udp(there), new),
            ("<", UDP, udp(back), reply),
            (">", UDP, udp(there), old),
            (">", UDP, udp((1000, 81)), new),
        ],
        "udp cut short": [
            (">", UDP, udp(there)[:3], bad),
            (">", UDP, udp(there)[:7], bad),
            (">", UDP, struct.pack("!HHHH", *there, 9, 0), bad),
            (">", UDP, struct.pack("!HHHH", *there, 7, 0), bad),
            (">", UDP, udp(there) + b"behind", new),
        ],
        "udplite": [
            (">", UDPLITE, struct.pack("!HHHH", *there, 8, 0), new),
            ("<", UDPLITE, struct.pack("!HHHH", *back, 9, 0), bad),
            ("<", UDPLITE, struct.pack("!HHHH", *back, 0, 0), reply),
        ],
        "tcp closed and used again": [*closed, *closed],
        "tcp reset": [
            *handshake,
            ("<", TCP, tcp(back, RST | ACK), reply),
            (">", TCP, tcp(there, ACK), old),
            ("<", TCP, tcp(back, RST | ACK), reply),
            (">", TCP, tcp(there, RST), old),
            (">", TCP, tcp(there, SYN), new),
        ],
        "tcp refused": [
            (">", TCP, tcp(there, SYN), new),
            ("<", TCP, tcp(back, RST | ACK), reply),
            (">", TCP, tcp(there, SYN), new),
            (">", TCP, tcp(there, RST), new),
            ("<", TCP, tcp(back, ACK), new),
        ],
        "tcp first packets": [
            (">", TCP, tcp((1, port), flags), said)
            for port, (flags, said) in enumerate(
                [(RST, bad), (RST | ACK, bad), (SYN | ACK, bad), (FIN | ACK, bad), (ACK, new)]
            )
        ],
        "tcp flags": [
            *handshake,
            *(
                (">", TCP, tcp(there, flags), bad)
                for flags in (0, FIN, SYN | FIN, SYN | RST, FIN | RST, URG, PSH, 63)
            ),
            (">", TCP, tcp(there, ACK | URG | 0xC0), old),
        ],
        "tcp cut short": [
            *handshake,
            (">", TCP, tcp(there, ACK)[:19], bad),
            (">", TCP, tcp(there, ACK)[:12] + b"\x60" + tcp(there, ACK)[13:], bad),
            (">", TCP, tcp(there, ACK)[:12] + b"\x40" + tcp(there, ACK)[13:], bad),
        ],
        "tcp from its middle": [
            (">", TCP, tcp(there, ACK), new),
            (">", TCP, tcp(there, ACK), new),
            ("<", TCP, tcp(back, ACK), reply),
            (">", TCP, tcp(there, ACK), old),
        ],
        "tcp opened by both": [
            (">", TCP, tcp(there, SYN), new),
            ("<", TCP, tcp(back, SYN), reply),
            (">", TCP, tcp(there, SYN | ACK), old),
            ("<", TCP, tcp(back, ACK), reply),
        ],
        "tcp with a new start that was missed": [
            *handshake,
            (">", TCP, tcp(there, SYN), old),
            ("<", TCP, tcp(back, SYN | ACK), reply),
            ("<", TCP, tcp(back, SYN), bad),
            (">", TCP, tcp(there, ACK), old),
        ],
        "tcp with a challenge": [
            *closed[:-1],
            (">", TCP, tcp(there, SYN), old),
            ("<", TCP, tcp(back, ACK), reply),
            (">", TCP, tcp(there, ACK), old),
        ],
        "tcp with the roles exchanged": [
            *closed,
            ("<", TCP, tcp(back, SYN), new),
            (">", TCP, tcp(there, SYN | ACK), reply),
        ],
        "echo": [
            ("<", protocol, icmp(answer), bad),
            (">", protocol, icmp(request), new),
            ("<", protocol, icmp(answer, 2), bad),
            ("<", protocol, icmp(answer, code=1), bad),
            ("<", protocol, icmp(answer), reply),
            (">", protocol, icmp(request), old),
            (">", protocol, icmp(request)[:7], bad),
            (">", ICMP + ICMPV6 - protocol, icmp(request), bad),
        ],
        "icmp errors": [
            ("<", protocol, error["udp"], bad),
            (">", UDP, udp(there), new),
            ("<", protocol, error["udp"], "related reply"),
            ("<", protocol, error["strange"], bad),
            ("<", protocol, error["cut"], "related reply"),
            ("<", protocol, error["cut"][:-2], bad),
            (">", protocol, error["udp"], bad),  # to the wrong end
            (">", protocol, error["answer"], "related"),
            (">", UDP, udp(there), new),
            (">", protocol, icmp(request), new),
            ("<", protocol, error["echo"], "related reply"),
            ("<", protocol, error["esp"], bad),
            (">", 50, bytes(8), new),
            ("<", protocol, error["esp"], "related reply"),
        ],
        "gre": [
            (">", GRE, gre(), new),
            ("<", GRE, gre(), reply),
            (">", GRE, gre(5), new),
            ("<", GRE, gre(5), new),  # no helper tells which calls belong together
            (">", GRE, gre(0), old),
            (">", GRE, b"\x30\x01\x08\x00\0\0\0\5", bad),
            (">", GRE, b"\0", old),
        ],
        "by addresses": [
            (">", 50, bytes(8), new),
            ("<", 50, b"", reply),
            (">", DCCP, bytes(16), new),
            ("<", DCCP, b"\1" * 16, reply),
        ],
        "sctp": [
            (">", SCTP, sctp(there), bad),
            (">", SCTP, sctp(there, 1)[:11], bad),
            *((">", SCTP, sctp(there, chunk), bad) for chunk in (0, 3, 6, 11, 14)),
            (">", SCTP, sctp(there, 1, tag=1), bad),
            (">", SCTP, sctp(there, 1)[:-4], bad),
            (">", SCTP, sctp(there, 1, 0), bad),
            (">", SCTP, sctp((9, 9), 10, tag=1), bad),
            (">", SCTP, sctp(there, 1), new),
            (">", SCTP, sctp(there, 1), new),
            ("<", SCTP, sctp(back, 2), reply),
            (">", SCTP, sctp(there, 10, 0), old),
            (">", SCTP, sctp(there, 0, 10), bad),
            ("<", SCTP, sctp(back, 11, 3), reply),
            (">", SCTP, sctp(there, 7), old),
            ("<", SCTP, sctp(back, 8), reply),
            (">", SCTP, sctp(there, 14), old),
            (">", SCTP, sctp((8, 8), 4), new),
            ("<", SCTP, sctp((8, 8), 2), bad),
            ("<", SCTP, sctp((8, 8), 5), reply),
        ],
        "dropped": [
            ("x", TCP, tcp(there, SYN), new),
            ("<", TCP, tcp(back, SYN | ACK), bad),
            ("x", UDP, udp(there), new),
            ("<", UDP, udp(back), new),
            (">", UDP, udp(there), reply),
        ],
    }
    if family == 4:
        texts["other requests"] = [
            *((">", ICMP, icmp(kind), new) for kind in (13, 15, 17)),
            *(("<", ICMP, icmp(kind), reply) for kind in (14, 16, 18)),
            *((">", ICMP, icmp(kind), bad) for kind in (1, 9, 10, 14, 19, 255)),
        ]
    else:
        texts["neighbours"] = [
            *((">", ICMPV6, icmp(kind) + bytes(16), "untracked") for kind in (131, 135, 136, 143)),
            *((">", ICMPV6, icmp(kind) + bytes(32), bad) for kind in (137, 140, 200)),
            (">", ICMPV6, icmp(139), new),
            ("<", ICMPV6, icmp(140), reply),
            (">", 59, bytes(8), bad),
        ]
    return {name: script(family, text) for name, text in texts.items()}


SCRIPTS = {
    f"{name} {family}": steps for family in (4, 6) for name, steps in _scripts(family).items()
}
