"""A tree of qdiscs that is not ours: written down, and put back.

Strategy: what the kernel tells of a qdisc, a class or a filter is nearly what it has to
be given to make it. So a tree is kept as the kernel's own messages, in an order in which
they can be given back, without what changes by itself: counters, times, and who does
the work. Two trees are the same if their messages are.

Not all comes back: filters through BPF programs (the kernel tells their names, not how
to get them), actions of police and the qdisc red (they want a table that it does not
tell), random distributions of netem, blocks that several devices share. `put_back` says
what did not.

All functions raise `OSError`, and are about the namespace of the calling thread.
"""

import struct
from collections.abc import Callable, Iterator
from typing import Final

from itmlang.links import classid_text
from runtime import qdisc
from runtime.netlink import NESTED, attribute, attributes
from runtime.qdisc import KIND, MESSAGE, NEW_CLASS, NEW_FILTER, NEW_QDISC, OPTIONS, ROOT

_STAB, _CHAIN = 8, 11  # TCA_STAB, TCA_CHAIN
# Kinds whose classes are made one by one; those of others come with the qdisc.
_WITH_CLASSES: Final = frozenset({"drr", "hfsc", "htb", "qfq"})
# Of the options of filters: their actions, flags and counters.
_FILTERS: Final = {
    "basic": (3, None, 5), "bpf": (1, 9, None), "flower": (3, 22, None), "fw": (4, None, None),
    "matchall": (2, 3, 4), "u32": (7, 11, 9),
}  # fmt: skip
_SKIPS: Final = 0x3  # TCA_CLS_FLAGS_SKIP_HW, …_SW; the others are told, never asked for
_ACTION_PARTS: Final = frozenset({KIND, OPTIONS, 6})  # …, TCA_ACT_COOKIE
# Of the options of actions, the first are their parameters and the second the times, or the
# other way round.
_PARAMETERS_FIRST: Final = frozenset({"connmark", "csum", "ct", "ife", "nat"})
_U32_DIVISOR: Final = 4


def recorded(device: int) -> list[str]:
    """The tree of a device from its root on, as text; empty where the root is the kernel's own."""
    found = [_Object(NEW_QDISC, body) for body in qdisc.qdisc_bodies(device)]
    there = [one for one in found if one.handle]
    classes = [_Object(NEW_CLASS, body) for body in qdisc.class_bodies(device)]
    roots = [one for one in there if one.parent == ROOT]
    return [one.text() for root in roots for one in _below(device, root, there, classes)]


def put_back(device: int, tree: list[str]) -> list[str]:
    """Make it again, in the place of the root; what did not come back, in words."""
    told = []
    for number, text in enumerate(tree):
        one = _Object.from_text(text)
        flags = qdisc.CREATE | (qdisc.EXCLUSIVE if number else qdisc.REPLACE)
        try:
            qdisc.put_body(one.message, flags, device, one.body)
        except OSError as error:
            told.append(f"{one}: {error.strerror}")
    if told:
        return told
    now = set(recorded(device))
    return [f"{_Object.from_text(one)}: it is not as it was" for one in tree if one not in now]


class _Object:
    """A qdisc, a class or a filter: `message` says which, `body` is what the kernel tells."""

    def __init__(self, message: int, body: bytes) -> None:
        self.message, self.body = message, body
        _, _, self.handle, self.parent, self.info = MESSAGE.unpack_from(body)
        self.parts = dict(attributes(body[MESSAGE.size :]))
        self.kind = self.parts[KIND].rstrip(b"\0").decode()

    @classmethod
    def from_text(cls, text: str) -> "_Object":
        message, _, body = text.partition(" ")
        return cls(int(message), bytes.fromhex(body))

    def text(self) -> str:
        """What is to be given to the kernel to make it."""
        # The kernel tells in a class's info what hangs there; that has its own message.
        info = self.info if self.message == NEW_FILTER else 0
        body = MESSAGE.pack(0, 0, self.handle, self.parent, info)
        body += attribute(KIND, self.parts[KIND])
        if OPTIONS in self.parts:
            body += attribute(OPTIONS, self._options())
        if _STAB in self.parts and self.message == NEW_QDISC:
            body += attribute(_STAB | NESTED, self.parts[_STAB])
        if any(self.parts.get(_CHAIN, b"")):
            body += attribute(_CHAIN, self.parts[_CHAIN])
        return f"{self.message} {body.hex()}"

    def __str__(self) -> str:
        if self.message == NEW_FILTER:
            of = classid_text(self.parent)
            return f"the filter {self.kind} of {of}, preference {self.info >> 16}"
        what = "class" if self.message == NEW_CLASS else "qdisc"
        return f"the {what} {self.kind} {classid_text(self.handle)}"

    def _options(self) -> bytes:
        options = self.parts[OPTIONS]
        if self.message == NEW_QDISC and self.kind == "htb":
            return _changed(options, lambda kind, value: (
                _htb(value) if kind == qdisc.HTB_GLOBAL else value))  # fmt: skip
        if self.message == NEW_CLASS and self.kind == "htb":
            return _changed(options, lambda kind, value: (
                qdisc.without_level(value) if kind == qdisc.HTB_PARAMETERS else value))  # fmt: skip
        if self.message != NEW_FILTER or self.kind not in _FILTERS:
            return options
        actions, flags, counters = _FILTERS[self.kind]

        def settable(kind: int, value: bytes) -> bytes | None:
            if kind == counters:
                return None
            if kind == flags:
                (number,) = struct.unpack("=I", value)
                return struct.pack("=I", number & _SKIPS)
            return _changed(value, lambda _, one: _action(one)) if kind == actions else value

        return _changed(options, settable)


def _below(
    device: int, top: _Object, there: list[_Object], classes: list[_Object]
) -> Iterator[_Object]:
    """A qdisc, its classes, what hangs on them, and their filters."""
    yield top
    own = [one for one in classes if one.handle >> 16 == top.handle >> 16]
    if top.kind in _WITH_CLASSES:
        # Parents first; HFSC's own root class comes with the qdisc.
        made, waiting = {ROOT, top.handle}, [one for one in own if one.handle != top.handle]
        waiting.sort(key=lambda one: one.handle)
        while ready := [one for one in waiting if one.parent in made]:
            yield from ready
            made |= {one.handle for one in ready}
            waiting = [one for one in waiting if one.handle not in made]
    hanging = [one for one in there if one.parent >> 16 == top.handle >> 16]
    for one in sorted(hanging, key=lambda one: one.parent):
        yield from _below(device, one, there, classes)
    for parent in sorted({top.handle, *(one.handle for one in own)}):
        yield from _filters(device, parent)


def _filters(device: int, parent: int) -> Iterator[_Object]:
    """Those of a qdisc or class. The kernel numbers u32's first tables in the order in which
    preferences come, and filters have their table's number."""
    found = [_Object(NEW_FILTER, body) for body in qdisc.filter_bodies(device, parent)]
    groups: dict[tuple[int, int], list[_Object]] = {}
    for one in found:
        if one.parent == parent and one.handle:  # the others stand for a whole preference
            groups.setdefault((_chain(one), one.info), []).append(one)
    ordered = []
    for key, group in groups.items():
        tables = [one for one in group if one.kind == "u32" and _is_table(one)]
        first = tables[-1:]  # comes by itself; the kernel tells it last
        nodes = [one for one in group if one not in tables]
        ordered.append((first[0].handle if first else 0, key, [*tables[:-1], *nodes]))
    for *_, group in sorted(ordered, key=lambda one: one[:2]):
        yield from group


def _chain(one: _Object) -> int:
    return int.from_bytes(one.parts.get(_CHAIN, b""), "little")


def _is_table(one: _Object) -> bool:
    return _U32_DIVISOR in dict(attributes(one.parts.get(OPTIONS, b"")))


def _htb(told: bytes) -> bytes:
    """The whole version is told, and its first half is to be given; the last number counts."""
    version, *others = struct.unpack("=5I", told)
    return struct.pack("=5I", version >> 16, *others[:-1], 0)


def _changed(options: bytes, change: Callable[[int, bytes], bytes | None]) -> bytes:
    found = ((kind, change(kind, value)) for kind, value in attributes(options))
    return b"".join(attribute(kind, value) for kind, value in found if value is not None)


def _action(data: bytes) -> bytes:
    """An action as it is to be made: one of its own, without what it counted and when."""
    parts = dict(attributes(data))
    kind = parts[KIND].rstrip(b"\0").decode()
    times, parameters = (2, 1) if kind in _PARAMETERS_FIRST else (1, 2)

    def settable(number: int, value: bytes) -> bytes | None:
        if number == times:
            return None
        # struct tc_gen: index, capab, action, refcnt, bindcnt. By its index, it could be
        # another one by then.
        return bytes(4) + value[4:12] + bytes(8) + value[20:] if number == parameters else value

    without = parts[OPTIONS] if kind == "police" else _changed(parts[OPTIONS], settable)
    return b"".join(
        attribute(number, without if number == OPTIONS else value)
        for number, value in parts.items()
        if number in _ACTION_PARTS
    )
