"""Packets that a policy file cannot write down, and checksums by another hand than itm's."""

import struct

from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6
from scapy.layers.sctp import crc32c
from scapy.packet import Packet as Layer

SHAPES = (
    "options", "fragment", "first-fragment", "short",
    "hop-by-hop", "destination-options", "both-options",
    "no-checksum", "nop", "nop-nop",
)  # fmt: skip
_CHECKSUMS = {6: 16, 17: 6}
_IDENTITY = 0x1234  # not 0, or a raw socket would choose another one
_PADDING = bytes((1, 4, 0, 0, 0, 0))  # PadN, RFC 8200 section 4.2


def shaped(data: bytes, shape: str) -> bytes:
    """The packet in another shape: with IP options or extension headers, as a fragment, cut short.

    `fragment` is a later one, `short` has eight bytes behind its IP header. UDP can have
    `no-checksum`, TCP one `nop` or two (`nop-nop`) before its other options. Several shapes
    are joined by `+`.
    """
    first, _, others = shape.partition("+")
    if first and first not in SHAPES:
        raise ValueError(f"no shape is called {first}")
    data = _shaped(data, first)
    return shaped(data, others) if others else data


def _shaped(data: bytes, shape: str) -> bytes:
    version = data[0] >> 4
    start = 20 if version == 4 else 40
    match shape:
        case "no-checksum":
            return data[: start + 6] + bytes(2) + data[start + 8 :]
        case "nop" | "nop-nop":
            nops = shape.count("nop")
            options = bytes((1,)) * nops + data[start + 20 :] + bytes(-nops % 4)
            body = bytearray(data[start : start + 20] + options)
            body[12] = len(body) << 2
            return _with_body(data[:start], body)
    return _shaped_ipv4(data, shape) if version == 4 else _shaped_ipv6(data, shape)


def _with_body(head: bytes, body: bytearray) -> bytes:
    """The packet with another transport part, lengths and checksums to fit."""
    made, version = bytearray(head), head[0] >> 4
    protocol = head[9] if version == 4 else head[6]
    place = _CHECKSUMS[protocol]
    ends = head[12:20] if version == 4 else head[8:40]
    body[place : place + 2] = bytes(2)
    pseudo = ends + struct.pack("!II", len(body), protocol)
    struct.pack_into("!H", body, place, ones_complement(pseudo + body))
    if version == 4:
        struct.pack_into("!HHHBBH", made, 2, 20 + len(body), 0, 0, head[8], protocol, 0)
        struct.pack_into("!H", made, 10, ones_complement(made))
    else:
        struct.pack_into("!H", made, 4, len(body))
    return bytes(made + body)


def _shaped_ipv4(data: bytes, shape: str) -> bytes:
    head, body = bytearray(data[:20]), data[20:]
    struct.pack_into("!H", head, 4, _IDENTITY)
    if shape == "options":
        head[0] = 0x46
        head += bytes((1, 1, 1, 0))  # three times "no operation", then the end
    elif shape == "fragment":
        struct.pack_into("!H", head, 6, 185)
    elif shape == "first-fragment":
        struct.pack_into("!H", head, 6, 0x2000)
    elif shape == "short":
        body = body[:8]
        struct.pack_into("!H", head, 6, 0x2000)
    elif shape:
        raise ValueError(f"IPv4 has no shape {shape}")
    struct.pack_into("!H", head, 2, len(head) + len(body))
    struct.pack_into("!H", head, 10, 0)
    struct.pack_into("!H", head, 10, ones_complement(head))
    return bytes(head) + body


def _shaped_ipv6(data: bytes, shape: str) -> bytes:
    head, body, protocol = bytearray(data[:40]), data[40:], data[6]
    match shape:
        case "hop-by-hop":
            head[6], body = 0, bytes((protocol, 0)) + _PADDING + body
        case "destination-options":
            head[6], body = 60, bytes((protocol, 0)) + _PADDING + body
        case "both-options":
            head[6] = 0
            body = bytes((60, 0)) + _PADDING + bytes((protocol, 0)) + _PADDING + body
        case "fragment":
            head[6], body = 44, struct.pack("!BBHI", protocol, 0, 185 << 3, 7) + body
        case "first-fragment":
            head[6], body = 44, struct.pack("!BBHI", protocol, 0, 1, 7) + body
        case "short":
            head[6], body = 44, struct.pack("!BBHI", protocol, 0, 1, 7) + body[:8]
        case "":
            pass
        case _:
            raise ValueError(f"IPv6 has no shape {shape}")
    struct.pack_into("!H", head, 4, len(body))
    return bytes(head) + body


def ones_complement(data: bytes | bytearray) -> int:
    """The checksum of RFC 1071, added up byte by byte."""
    total = sum(byte << 8 if index % 2 == 0 else byte for index, byte in enumerate(data))
    while total > 0xFFFF:
        total = (total >> 16) + (total & 0xFFFF)
    return 0xFFFF - total


def wrong_checksums(data: bytes) -> list[str]:
    """The layers of a packet whose checksum is not the one that scapy computes."""
    layer: type[Layer] = IP if data[0] >> 4 == 4 else IPv6
    given, fresh = layer(data), layer(data)
    fragment = _is_fragment(data)
    wrong = []
    for kind, name in ((IP, "chksum"), (TCP, "chksum"), (UDP, "chksum"), (ICMP, "chksum"),
                       (ICMPv6EchoRequest, "cksum")):  # fmt: skip
        if kind not in given or (fragment and kind is not IP):
            continue
        found = getattr(given[kind], name)
        if kind is UDP and found == 0:
            continue  # no checksum is used
        delattr(fresh[kind], name)
        wanted = getattr(layer(bytes(fresh))[kind], name)
        if found % 0xFFFF != wanted % 0xFFFF:  # both zeros of one's complement are right
            wrong.append(f"{kind.__name__} {found:#06x}, not {wanted:#06x}")
    start = (data[0] & 15) * 4 if data[0] >> 4 == 4 else 40
    if data[9 if data[0] >> 4 == 4 else 6] == 132 and not fragment:
        sctp = data[start:]
        wanted = crc32c(sctp[:8] + bytes(4) + sctp[12:])
        if sctp[8:12] != wanted.to_bytes(4):  # scapy has it in the order of the wire
            wrong.append(f"SCTP {sctp[8:12].hex()}")
    return wrong


def _is_fragment(data: bytes) -> bool:
    if data[0] >> 4 == 4:
        return bool(struct.unpack_from("!H", data, 6)[0] & 0x3FFF)
    return data[6] == 44


def routed(data: bytearray) -> None:
    """What forwarding does to a packet: its TTL goes down by one, the IPv4 checksum follows."""
    if data[0] >> 4 == 6:
        data[7] -= 1
        return
    data[8] -= 1
    # net/ipv4/ip_forward.c by way of ip_decrease_ttl: add 0x0100, carry included.
    check = struct.unpack_from("!H", data, 10)[0] + 0x0100
    struct.pack_into("!H", data, 10, (check + (check >= 0xFFFF)) & 0xFFFF)
