"""Netlink's own bytes, where a library asks for too much or nothing.

For the names of tables, or the counters of one, libnftables 1.0.6 fetches every rule of
every table first, those of other tools included. The kernel answers each with one dump.
`runtime/qdisc.py` sends and reads what is here for queues.
"""

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

# From include/uapi/linux: netlink.h, netfilter/nfnetlink.h, netfilter/nf_tables.h.
_NETLINK_NETFILTER: Final = 12
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_DUMP_INTR, _NLM_F_DUMP = 0x1, 0x4, 0x10, 0x300
_NLM_F_CAPPED, _NLM_F_ACK_TLVS = 0x100, 0x200
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_SOL_NETLINK, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK = 270, 10, 11
_NLMSGERR_ATTR_MSG: Final = 1
_NFNL_SUBSYS_NFTABLES: Final = 10
_NFT_MSG_GETTABLE, _NFT_MSG_GETSETELEM, _NFT_MSG_GETOBJ = 1, 13, 19
_NFTA_TABLE_NAME: Final = 1
_NFTA_SET_ELEM_LIST_TABLE, _NFTA_SET_ELEM_LIST_SET, _NFTA_SET_ELEM_LIST_ELEMENTS = 1, 2, 3
_NFTA_OBJ_TABLE, _NFTA_OBJ_NAME, _NFTA_OBJ_TYPE, _NFTA_OBJ_DATA = 1, 2, 3, 4
_NFT_OBJECT_COUNTER: Final = 1
_NFTA_COUNTER_BYTES, _NFTA_COUNTER_PACKETS = 1, 2
# netfilter/nfnetlink_conntrack.h.
_CONNECTIONS: Final = 1
_CT_NEW, _CT_GET = 0, 1
_CTA_TUPLE_ORIG, _CTA_MARK, _CTA_ZONE, _CTA_MARK_MASK = 1, 8, 18, 21
NESTED: Final = 0x8000
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
    number, table = _place(path)
    asked = attribute(_NFTA_OBJ_TABLE, table.encode() + b"\0") + attribute(
        _NFTA_OBJ_TYPE, struct.pack("!I", _NFT_OBJECT_COUNTER)
    )
    for _, found in _dump(_NFT_MSG_GETOBJ, number, asked):
        if _text(found[_NFTA_OBJ_TABLE]) == table:
            data = dict(attributes(found[_NFTA_OBJ_DATA]))
            yield (
                _text(found[_NFTA_OBJ_NAME]),
                int.from_bytes(data[_NFTA_COUNTER_PACKETS], "big"),
                int.from_bytes(data[_NFTA_COUNTER_BYTES], "big"),
            )


def elements(path: str, name: str) -> list[bytes]:
    """The elements of a set or map of a table, sorted, each as the kernel tells it.

    Raises `OSError`, also where there is none of this name.
    """
    number, table = _place(path)
    asked = attribute(_NFTA_SET_ELEM_LIST_TABLE, table.encode() + b"\0") + attribute(
        _NFTA_SET_ELEM_LIST_SET, name.encode() + b"\0"
    )
    return sorted(
        element
        for _, found in _dump(_NFT_MSG_GETSETELEM, number, asked)
        for _, element in attributes(found.get(_NFTA_SET_ELEM_LIST_ELEMENTS, b""))
    )


def _place(path: str) -> tuple[int, str]:
    """The number of a table's family, and its name."""
    family, _, table = path.partition(" ")
    return next(number for number, name in _FAMILIES.items() if name == family), table


def clear_marks(bits: int) -> int:
    """Clear bits in the marks of all tracked connections; how many had any. Raises `OSError`."""
    found = [
        (family, one)
        for family, one in _dump(_CT_GET, 0, subsystem=_CONNECTIONS)
        if int.from_bytes(one.get(_CTA_MARK, b"")) & bits
    ]
    # ctnetlink_change_mark: the mask's bits are cleared, then those of the mark are turned.
    cleared = attribute(_CTA_MARK, bytes(4)) + attribute(_CTA_MARK_MASK, bits.to_bytes(4))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as netlink:
        for family, one in found:
            body = _GENERIC.pack(family, 0, 0) + attribute(
                _CTA_TUPLE_ORIG | NESTED, one[_CTA_TUPLE_ORIG]
            )
            if _CTA_ZONE in one:
                body += attribute(_CTA_ZONE, one[_CTA_ZONE])
            kind = _CONNECTIONS << 8 | _CT_NEW
            length = _HEADER.size + len(body) + len(cleared)
            # A connection that has ended meanwhile needs none: no answer is asked for.
            netlink.send(_HEADER.pack(length, kind, _NLM_F_REQUEST, 0, 0) + body + cleared)
    return len(found)


def _dump(
    kind: int, family: int, asked: bytes = b"", subsystem: int = _NFNL_SUBSYS_NFTABLES
) -> list[tuple[int, dict[int, bytes]]]:
    """All objects of a kind: (family, attributes)."""
    bodies = dump(_NETLINK_NETFILTER, subsystem << 8 | kind, _GENERIC.pack(family, 0, 0) + asked)
    return [(body[0], dict(attributes(body[_GENERIC.size :]))) for body in bodies]


def dump(protocol: int, kind: int, asked: bytes) -> list[bytes]:
    """What the kernel answers to a dump, by its bodies, asked again if they changed meanwhile.

    `protocol` is that of the socket, `kind` the type of the request. Raises `OSError`.
    """
    flags = _NLM_F_REQUEST | _NLM_F_DUMP
    message = _HEADER.pack(_HEADER.size + len(asked), kind, flags, 0, 0) + asked
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) as netlink:
        while True:
            netlink.send(message)
            found, torn = _answer(netlink)
            if not torn:
                return found


def request(protocol: int, kind: int, flags: int, body: bytes) -> None:
    """Have the kernel do something. Raises `OSError`, with the kernel's own words if it has any."""
    flags |= _NLM_F_REQUEST | _NLM_F_ACK
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) as netlink:
        with suppress(OSError):  # older than its words
            for option in (_NETLINK_EXT_ACK, _NETLINK_CAP_ACK):
                netlink.setsockopt(_SOL_NETLINK, option, 1)
        netlink.send(_HEADER.pack(_HEADER.size + len(body), kind, flags, 0, 0) + body)
        answer = netlink.recv(1 << 17)
    _, _, flags, _, _ = _HEADER.unpack_from(answer)
    (code,) = struct.unpack_from("=i", answer, _HEADER.size)
    if not code:
        return
    words = os.strerror(-code)
    if flags & _NLM_F_ACK_TLVS:
        length, *_ = _HEADER.unpack_from(answer, _HEADER.size + 4)
        told = _HEADER.size + 4 + (_HEADER.size if flags & _NLM_F_CAPPED else length)
        message = dict(attributes(answer[told:])).get(_NLMSGERR_ATTR_MSG)
        words += f" ({_text(message)})" if message else ""
    raise OSError(-code, words)


def _answer(netlink: socket.socket) -> tuple[list[bytes], bool]:
    """The objects of one dump; did they change while it was made?"""
    found: list[bytes] = []
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
            found.append(body)


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, value) of each attribute, without the flags of its type."""
    at = 0
    while at < len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        yield kind & _TYPE, data[at + _ATTRIBUTE.size : at + length]
        at += _aligned(length)


def attribute(kind: int, value: bytes) -> bytes:
    """As the kernel reads it; `NESTED` in `kind` says that there are others inside."""
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(_aligned(length) - length)


def _aligned(length: int) -> int:
    return length + 3 & ~3


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode()
