"""Queues of links as the kernel has them: trees of HTB, their filters, IFB devices.

Everything is in the namespace of the calling thread, and devices are told by their
index. It is netlink's own bytes and no library, because a foreign tree has to be read
and written as it is (`runtime/trees.py`), because statistics are read ten times a second,
and because pyroute2 0.9 has no way to say in what time a burst is sent, writes tables of
rates that no kernel of ours reads, and takes filters of u32 as text.

What is asked for here is what the kernel tells later, to the bit, so that what is there
can be compared with what is wanted. All functions raise `OSError`.

Structures and numbers are those of include/uapi/linux: rtnetlink.h, pkt_sched.h,
pkt_cls.h, gen_stats.h, if_link.h, tc_act/tc_mirred.h.
"""

import ctypes
import errno
import fcntl
import socket
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from runtime.netlink import NESTED, attribute, attributes, dump, request

_ROUTE: Final = 0  # NETLINK_ROUTE
NEW_LINK, _DELETE_LINK, _GET_LINK = 16, 17, 18
NEW_QDISC, _DELETE_QDISC, _GET_QDISC = 36, 37, 38
NEW_CLASS, _DELETE_CLASS, _GET_CLASS = 40, 41, 42
NEW_FILTER, _DELETE_FILTER, _GET_FILTER = 44, 45, 46
REPLACE, EXCLUSIVE, CREATE = 0x100, 0x200, 0x400
MESSAGE: Final = struct.Struct("=B3xiIII")  # tcmsg: family, device, handle, parent, info
_LINK: Final = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change

ROOT: Final = 0xFFFF_FFFF  # TC_H_ROOT
_CLSACT: Final = 0xFFFF_FFF1  # TC_H_CLSACT
INCOMING, OUTGOING = 0xFFFF_FFF2, 0xFFFF_FFF3  # with TC_H_MIN_INGRESS, TC_H_MIN_EGRESS
KIND, OPTIONS = 1, 2  # TCA_KIND, TCA_OPTIONS
_STATISTICS: Final = 7  # TCA_STATS2
_BASIC, _QUEUE, _PACKETS = 1, 3, 8  # TCA_STATS_BASIC, …_QUEUE, …_PKT64

# net/pkt_sched.h: PSCHED_SHIFT, the unit in which buckets are told.
TICK: Final = 64  # nanoseconds
HTB_PARAMETERS, HTB_GLOBAL, _HTB_RATE64, _HTB_CEILING64 = 1, 2, 6, 7
_HTB: Final = struct.Struct("=BBHhHIBBHhHIIIIII")  # tc_htb_opt
_HTB_VERSION, _ETHERNET, _R2Q = 3, 1, 10  # …, TC_LINKLAYER_ETHERNET, what nobody uses
_FQ_CODEL_TARGET, _FQ_CODEL_LIMIT, _FQ_CODEL_INTERVAL = 1, 2, 3
_U32_CLASS, _U32_SELECTOR, _U32_ACTION = 1, 5, 7
_SELECTOR: Final = struct.Struct("=BBBxHHhhI")  # tc_u32_sel
_KEY: Final = struct.Struct("=IIii")  # tc_u32_key; mask and value as the packet has them
_TERMINAL: Final = 1  # TC_U32_TERMINAL
_MIRRED_PARAMETERS: Final = 2
_MIRRED: Final = struct.Struct("=IIiiiiI")
_STOLEN, _REDIRECT = 4, 1  # TC_ACT_STOLEN, TCA_EGRESS_REDIR
_IFLA_NAME, _IFLA_KIND, _IFLA_ALIAS, _IFLA_FAMILIES = 3, 18, 20, 26
_INET6_MODE: Final = 8  # IFLA_INET6_ADDR_GEN_MODE; 1 is "none"
_UP: Final = 1  # IFF_UP
# linux/sockios.h, linux/ethtool.h: SIOCETHTOOL, ETHTOOL_GSET and what that fills.
_ETHTOOL, _GET_SETTINGS, _SETTINGS = 0x8946, 0x1, 44

ALL, IPV4, ARP, IPV6 = 0x0003, 0x0800, 0x0806, 0x86DD  # linux/if_ether.h


@dataclass(frozen=True)
class Counts:
    """What a qdisc or a class has seen, and what waits in it now."""

    packets: int = 0
    bytes: int = 0
    drops: int = 0
    waiting: int = 0
    waiting_bytes: int = 0
    overlimits: int = 0


@dataclass(frozen=True)
class Qdisc:
    """A qdisc of a device. Its `handle` is 0 if the kernel itself put it there."""

    device: int
    kind: str
    handle: int
    parent: int
    options: bytes = b""
    counts: Counts = field(default=Counts(), compare=False)


@dataclass(frozen=True)
class Shape:
    """What a class of HTB may send. Rates are in bytes a second, buckets in `TICK`s.

    Of a class that has others below it, `quantum` and `priority` mean nothing.
    """

    parent: int
    rate: int
    ceiling: int
    bucket: int
    ceiling_bucket: int
    quantum: int = 0
    priority: int = 0


@dataclass(frozen=True)
class Class:
    """A class of HTB, and what it has sent."""

    handle: int
    shape: Shape
    counts: Counts = field(default=Counts(), compare=False)


@dataclass(frozen=True, order=True)
class Match:
    """What a filter of u32 takes: packets of a `protocol` with these 32-bit words in them.

    Words are (mask, value, offset from the network header). Filters are asked in
    the order of their `preference`, which all of one protocol may share.
    """

    preference: int
    protocol: int
    words: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True)
class Filter:
    """A filter as it is there: where it leads, a class or (`redirect`) another device."""

    handle: int
    target: int
    redirect: int = 0


# Qdiscs.


def qdiscs() -> list[Qdisc]:
    """Those of all devices."""
    found = []
    for body in dump(_ROUTE, _GET_QDISC, MESSAGE.pack(0, 0, 0, 0, 0)):
        _, device, handle, parent, _ = MESSAGE.unpack_from(body)
        told = dict(attributes(body[MESSAGE.size :]))
        kind, options = told[KIND].rstrip(b"\0").decode(), told.get(OPTIONS, b"")
        found.append(Qdisc(device, kind, handle, parent, options, _counts(told)))
    return found


def put_root(device: int, handle: int, default: int) -> None:
    """Make HTB the root; `default` is the lower half of the class where no filter leads."""
    options = attribute(HTB_GLOBAL, struct.pack("=5I", _HTB_VERSION, _R2Q, default, 0, 0))
    _put(NEW_QDISC, CREATE | REPLACE, device, handle, ROOT, "htb", options)


def delete_root(device: int) -> None:
    """The kernel puts the device's default in its place."""
    _do(_DELETE_QDISC, 0, device, 0, ROOT)


def put_fifo(device: int, parent: int, limit: int) -> None:
    """A queue of so many packets in a class; what waits in one of its kind goes on waiting."""
    _put(NEW_QDISC, CREATE | REPLACE, device, 0, parent, "pfifo", struct.pack("=I", limit))


def put_fq_codel(device: int, parent: int, limit: int, target: int, interval: int) -> None:
    """As `put_fifo`; `target` and `interval` (of RFC 8289) are in microseconds."""
    options = b"".join(
        attribute(kind, struct.pack("=I", value))
        for kind, value in (
            (_FQ_CODEL_TARGET, target),
            (_FQ_CODEL_LIMIT, limit),
            (_FQ_CODEL_INTERVAL, interval),
        )
    )
    _put(NEW_QDISC, CREATE | REPLACE, device, 0, parent, "fq_codel", options)


def delete_queue(device: int, parent: int) -> None:
    """Of a class, with what waits; the kernel puts its default there."""
    _do(_DELETE_QDISC, 0, device, 0, parent)


def limit(one: Qdisc) -> int | None:
    """How many packets may wait in a pfifo or an fq_codel; None for others."""
    if one.kind == "pfifo":
        return _number(one.options)
    if one.kind == "fq_codel":
        return _number(dict(attributes(one.options))[_FQ_CODEL_LIMIT])
    return None


def is_clsact(one: Qdisc) -> bool:
    """Hang filters of incoming packets on it?"""
    return one.kind in ("clsact", "ingress")


def add_clsact(device: int) -> None:
    _put(NEW_QDISC, CREATE | EXCLUSIVE, device, 0xFFFF_0000, _CLSACT, "clsact", b"")


def delete_clsact(device: int) -> None:
    _do(_DELETE_QDISC, 0, device, 0xFFFF_0000, _CLSACT)


# Classes.


def classes(device: int) -> dict[int, Class]:
    """The classes of HTB of a device, by their handle."""
    found = {}
    for body in dump(_ROUTE, _GET_CLASS, MESSAGE.pack(0, device, 0, 0, 0)):
        _, _, handle, parent, _ = MESSAGE.unpack_from(body)
        told = dict(attributes(body[MESSAGE.size :]))
        if told[KIND] != b"htb\0":
            continue
        options = dict(attributes(told[OPTIONS]))
        numbers = _HTB.unpack(options[HTB_PARAMETERS])
        rate, ceiling, bucket, ceiling_bucket, quantum, level, priority = (
            numbers[5], *numbers[11:]
        )  # fmt: skip
        inner = level > 0
        shape = Shape(
            parent,
            _number(options.get(_HTB_RATE64, b"")) or rate,
            _number(options.get(_HTB_CEILING64, b"")) or ceiling,
            bucket,
            ceiling_bucket,
            0 if inner else quantum,
            0 if inner else priority,
        )
        found[handle] = Class(handle, shape, _counts(told))
    return found


def put_class(device: int, handle: int, shape: Shape, *, change: bool = False) -> None:
    """Make a class, or change it in place; `change` alone: refused if it is not there."""
    # Over 32 bits, the kernel takes the rate of the second attribute.
    rates = [min(rate, 0xFFFF_FFFF) for rate in (shape.rate, shape.ceiling)]
    options = attribute(
        HTB_PARAMETERS,
        _HTB.pack(
            0, _ETHERNET, 0, 0, 0, rates[0], 0, _ETHERNET, 0, 0, 0, rates[1],
            shape.bucket, shape.ceiling_bucket, shape.quantum, 0, shape.priority,
        ),
    )  # fmt: skip
    for kind, rate in ((_HTB_RATE64, shape.rate), (_HTB_CEILING64, shape.ceiling)):
        if rate > 0xFFFF_FFFF:
            options += attribute(kind, struct.pack("=Q", rate))
    _put(NEW_CLASS, 0 if change else CREATE, device, handle, shape.parent, "htb", options)


def without_level(parameters: bytes) -> bytes:
    """Those of a class, without what changes when it gets others below it."""
    *others, _, priority = _HTB.unpack(parameters)
    return _HTB.pack(*others, 0, priority)


def delete_class(device: int, handle: int) -> None:
    """No filter may lead there; what waits in it is lost."""
    _do(_DELETE_CLASS, 0, device, handle, 0)


# Filters.


def filters(device: int, parent: int) -> dict[Match, Filter]:
    """The filters of u32 of a qdisc that lead to a class, or to another device."""
    found = {}
    for body in filter_bodies(device, parent):
        _, _, handle, _, info = MESSAGE.unpack_from(body)
        told = dict(attributes(body[MESSAGE.size :]))
        options = dict(attributes(told.get(OPTIONS, b"")))
        if told[KIND] != b"u32\0" or _U32_SELECTOR not in options:
            continue
        selector = options[_U32_SELECTOR]
        words = tuple(
            (socket.ntohl(mask), socket.ntohl(value), offset)
            for mask, value, offset, _ in _KEY.iter_unpack(selector[_SELECTOR.size :])
        )
        match = Match(info >> 16, socket.ntohs(info & 0xFFFF), words)
        target = _number(options.get(_U32_CLASS, b""))
        found[match] = Filter(handle, target, _redirection(options.get(_U32_ACTION, b"")))
    return found


def filter_bodies(device: int, parent: int) -> list[bytes]:
    """All filters of a qdisc or a class, as the kernel tells them."""
    return dump(_ROUTE, _GET_FILTER, MESSAGE.pack(0, device, 0, parent, 0))


def put_filter(
    device: int, parent: int, match: Match, target: int, *, redirect: int = 0, handle: int = 0
) -> None:
    """Have packets go to a class (`target`), or be sent by another device (`redirect`).

    With the `handle` of one that is there, that one leads elsewhere from now on.
    """
    keys = b"".join(
        _KEY.pack(socket.htonl(mask), socket.htonl(value), offset, 0)
        for mask, value, offset in match.words
    )
    selector = _SELECTOR.pack(_TERMINAL, 0, len(match.words), 0, 0, 0, 0, 0) + keys
    options = attribute(_U32_SELECTOR, selector)
    if redirect:
        parameters = _MIRRED.pack(0, 0, _STOLEN, 0, 0, _REDIRECT, redirect)
        action = attribute(KIND, b"mirred\0") + attribute(
            OPTIONS | NESTED, attribute(_MIRRED_PARAMETERS, parameters)
        )
        options += attribute(_U32_ACTION | NESTED, attribute(1 | NESTED, action))
    else:
        options += attribute(_U32_CLASS, struct.pack("=I", target))
    flags = REPLACE if handle else CREATE | EXCLUSIVE
    _put(NEW_FILTER, flags, device, handle, parent, "u32", options, _info(match))


def delete_filter(device: int, parent: int, match: Match, handle: int = 0) -> None:
    """One of a `handle`, or all of its preference and their table."""
    _do(_DELETE_FILTER, 0, device, handle, parent, _info(match), attribute(KIND, b"u32\0"))


def _info(match: Match) -> int:
    return match.preference << 16 | socket.htons(match.protocol)


def _redirection(actions: bytes) -> int:
    """The device that the first action redirects to, 0 if it does not."""
    first = dict(attributes(dict(attributes(actions)).get(1, b"")))
    if first.get(KIND) != b"mirred\0":
        return 0
    parameters = dict(attributes(first[OPTIONS]))[_MIRRED_PARAMETERS]
    *_, way, device = _MIRRED.unpack_from(parameters)
    return int(device) if way == _REDIRECT else 0


# Devices.


def ifbs() -> dict[str, tuple[int, str]]:
    """The IFB devices: index and alias by name."""
    found = {}
    for body in dump(_ROUTE, _GET_LINK, _LINK.pack(0, 0, 0, 0, 0)):
        _, _, index, _, _ = _LINK.unpack_from(body)
        told = dict(attributes(body[_LINK.size :]))
        if dict(attributes(told.get(_IFLA_KIND, b""))).get(1, b"").rstrip(b"\0") == b"ifb":
            name, alias = (
                told.get(one, b"").rstrip(b"\0").decode() for one in (_IFLA_NAME, _IFLA_ALIAS)
            )
            found[name] = index, alias
    return found


def add_ifb(name: str, alias: str) -> int:
    """Make one, up, that sends nothing of itself; its index."""
    body = _LINK.pack(0, 0, 0, 0, 0) + attribute(_IFLA_NAME, name.encode() + b"\0")
    body += attribute(_IFLA_KIND | NESTED, attribute(1, b"ifb\0"))
    request(_ROUTE, NEW_LINK, CREATE | EXCLUSIVE, body)
    index = socket.if_nametoindex(name)
    try:
        body = _LINK.pack(0, 0, index, 0, 0) + attribute(_IFLA_ALIAS, alias.encode())
        request(_ROUTE, NEW_LINK, 0, body)
        # Without an address of its own, it has nothing to tell its neighbours.
        mode = attribute(socket.AF_INET6 | NESTED, attribute(_INET6_MODE, struct.pack("=B", 1)))
        with suppress(OSError):  # a machine without IPv6
            body = _LINK.pack(0, 0, index, 0, 0) + attribute(_IFLA_FAMILIES | NESTED, mode)
            request(_ROUTE, NEW_LINK, 0, body)
        request(_ROUTE, NEW_LINK, 0, _LINK.pack(0, 0, index, _UP, _UP))
    except BaseException:
        delete_device(index)
        raise
    return index


def delete_device(index: int) -> None:
    """Take a device away; nothing is to be done if it is gone."""
    try:
        request(_ROUTE, _DELETE_LINK, 0, _LINK.pack(0, 0, index, 0, 0))
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise


# The rest.


def class_bodies(device: int) -> list[bytes]:
    """All classes of a device, as the kernel tells them."""
    return dump(_ROUTE, _GET_CLASS, MESSAGE.pack(0, device, 0, 0, 0))


def qdisc_bodies(device: int) -> list[bytes]:
    """All qdiscs of a device, as the kernel tells them."""
    bodies = dump(_ROUTE, _GET_QDISC, MESSAGE.pack(0, 0, 0, 0, 0))
    return [body for body in bodies if MESSAGE.unpack_from(body)[1] == device]


def put_body(kind: int, flags: int, device: int, body: bytes) -> None:
    """Make what a body tells, at a device."""
    family, _, *others = MESSAGE.unpack_from(body)
    head = MESSAGE.pack(family, device, *others)
    request(_ROUTE, kind, flags, head + body[MESSAGE.size :])


def speed(device: str) -> int | None:
    """What a device's hardware says that it sends, in bytes a second; None if it does not.

    Asked by ethtool, because /sys/class/net is of the namespace that it was mounted in.
    """
    command = ctypes.create_string_buffer(struct.pack("=I", _GET_SETTINGS), _SETTINGS)
    asked = struct.pack("16sP16x", device.encode(), ctypes.addressof(command))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        try:
            fcntl.ioctl(control, _ETHTOOL, asked)
        except OSError:
            return None
    # struct ethtool_cmd: the lower half of the speed, and the upper.
    low, high = (struct.unpack_from("=H", command, at)[0] for at in (12, 28))
    megabits = high << 16 | low
    return None if megabits in (0, 0xFFFF, 0xFFFF_FFFF) else megabits * 125_000


def _counts(told: dict[int, bytes]) -> Counts:
    parts = dict(attributes(told.get(_STATISTICS, b"")))
    if _BASIC not in parts or _QUEUE not in parts:
        return Counts()
    size, packets = struct.unpack_from("=QI", parts[_BASIC])
    waiting, waiting_bytes, drops, _, overlimits = struct.unpack_from("=5I", parts[_QUEUE])
    packets = _number(parts.get(_PACKETS, b"")) or packets
    return Counts(packets, size, drops, waiting, waiting_bytes, overlimits)


def _put(
    kind: int,
    flags: int,
    device: int,
    handle: int,
    parent: int,
    name: str,
    options: bytes,
    info: int = 0,
) -> None:
    body = attribute(KIND, name.encode() + b"\0")
    body += attribute(OPTIONS, options) if options else b""
    _do(kind, flags, device, handle, parent, info, body)


def _do(
    kind: int, flags: int, device: int, handle: int, parent: int, info: int = 0, body: bytes = b""
) -> None:
    head = MESSAGE.pack(0, device, handle, parent, info)
    request(_ROUTE, kind, flags, head + body)


def _number(value: bytes) -> int:
    return int.from_bytes(value, sys.byteorder)
