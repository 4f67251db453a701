"""What the kernel tells of nftables and connections, where libnftables asks for too much or nothing.

For the names of tables, or the counters of one, libnftables 1.0.6 fetches every rule of
every table first, those of other tools included. The kernel answers each with one dump.
"""

import os
import socket
import struct
from collections.abc import Iterator
from typing import Final

# From include/uapi/linux: netlink.h, netfilter/nfnetlink.h, netfilter/nf_tables.h.
_NETLINK_NETFILTER: Final = 12
_NLM_F_REQUEST, _NLM_F_DUMP_INTR, _NLM_F_DUMP = 0x1, 0x10, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NFNL_SUBSYS_NFTABLES: Final = 10
_NFT_MSG_GETTABLE, _NFT_MSG_GETOBJ = 1, 19
_NFTA_TABLE_NAME: Final = 1
_NFTA_OBJ_TABLE, _NFTA_OBJ_NAME, _NFTA_OBJ_TYPE, _NFTA_OBJ_DATA = 1, 2, 3, 4
_NFT_OBJECT_COUNTER: Final = 1
_NFTA_COUNTER_BYTES, _NFTA_COUNTER_PACKETS = 1, 2
# netfilter/nfnetlink_conntrack.h.
_CONNECTIONS: Final = 1
_CT_NEW, _CT_GET = 0, 1
_CTA_TUPLE_ORIG, _CTA_MARK, _CTA_ZONE, _CTA_MARK_MASK = 1, 8, 18, 21
_NESTED: Final = 0x8000
_TYPE: Final = 0x3FFF  # of an attribute, without its flags
_FAMILIES: Final = {1: "inet", 5: "netdev"}

_HEADER: Final = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_GENERIC: Final = struct.Struct("=BBH")  # family, version, resource
_ATTRIBUTE: Final = struct.Struct("=HH")  # length, type


def tables() -> Iterator[str]:
    """The tables of families inet and netdev, as `family name`. Raises `OSError`."""
    for family, found in _dump(_NFT_MSG_GETTABLE, 0):
        if family in _FAMILIES:
            yield f"{_FAMILIES[family]} {_text(found[_NFTA_TABLE_NAME])}"


def counters(path: str) -> Iterator[tuple[str, int, int]]:
    """(name, packets, bytes) of each named counter of a table (`family name`).

    None if there is no such table. Raises `OSError`.
    """
    family, _, table = path.partition(" ")
    number = next(number for number, name in _FAMILIES.items() if name == family)
    asked = _attribute(_NFTA_OBJ_TABLE, table.encode() + b"\0") + _attribute(
        _NFTA_OBJ_TYPE, struct.pack("!I", _NFT_OBJECT_COUNTER)
    )
    for _, found in _dump(_NFT_MSG_GETOBJ, number, asked):
        if _text(found[_NFTA_OBJ_TABLE]) == table:
            data = dict(_attributes(found[_NFTA_OBJ_DATA]))
            yield (
                _text(found[_NFTA_OBJ_NAME]),
                int.from_bytes(data[_NFTA_COUNTER_PACKETS], "big"),
                int.from_bytes(data[_NFTA_COUNTER_BYTES], "big"),
            )


def clear_marks(bits: int) -> int:
    """Clear bits in the marks of all tracked connections; how many had any. Raises `OSError`."""
    found = [
        (family, one)
        for family, one in _dump(_CT_GET, 0, subsystem=_CONNECTIONS)
        if int.from_bytes(one.get(_CTA_MARK, b"")) & bits
    ]
    # ctnetlink_change_mark: the mask's bits are cleared, then those of the mark are turned.
    cleared = _attribute(_CTA_MARK, bytes(4)) + _attribute(_CTA_MARK_MASK, bits.to_bytes(4))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as netlink:
        for family, one in found:
            body = _GENERIC.pack(family, 0, 0) + _attribute(
                _CTA_TUPLE_ORIG | _NESTED, one[_CTA_TUPLE_ORIG]
            )
            if _CTA_ZONE in one:
                body += _attribute(_CTA_ZONE, one[_CTA_ZONE])
            kind = _CONNECTIONS << 8 | _CT_NEW
            length = _HEADER.size + len(body) + len(cleared)
            # A connection that has ended meanwhile needs none: no answer is asked for.
            netlink.send(_HEADER.pack(length, kind, _NLM_F_REQUEST, 0, 0) + body + cleared)
    return len(found)


def _dump(
    kind: int, family: int, asked: bytes = b"", subsystem: int = _NFNL_SUBSYS_NFTABLES
) -> list[tuple[int, dict[int, bytes]]]:
    """All objects of a kind: (family, attributes), asked again if they changed meanwhile."""
    body = _GENERIC.pack(family, 0, 0) + asked
    flags = _NLM_F_REQUEST | _NLM_F_DUMP
    message = _HEADER.pack(_HEADER.size + len(body), subsystem << 8 | kind, flags, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as netlink:
        while True:
            netlink.send(message + body)
            found, torn = _answer(netlink)
            if not torn:
                return found


def _answer(netlink: socket.socket) -> tuple[list[tuple[int, dict[int, bytes]]], bool]:
    """The objects of one dump; did they change while it was made?"""
    found: list[tuple[int, dict[int, bytes]]] = []
    torn = False
    while True:
        data = netlink.recv(1 << 17)
        at = 0
        while at < len(data):
            length, kind, flags, _, _ = _HEADER.unpack_from(data, at)
            body = data[at + _HEADER.size : at + length]
            at += _aligned(length)
            torn |= bool(flags & _NLM_F_DUMP_INTR)
            if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                (code,) = struct.unpack_from("=i", body)
                if code:  # negative
                    raise OSError(-code, os.strerror(-code))
                return found, torn
            found.append((body[0], dict(_attributes(body[_GENERIC.size :]))))


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        yield kind & _TYPE, data[at + _ATTRIBUTE.size : at + length]
        at += _aligned(length)


def _attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(_aligned(length) - length)


def _aligned(length: int) -> int:
    return length + 3 & ~3


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode()
