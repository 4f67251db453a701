"""Links of policies in the kernel: trees of HTB put there, looked at, taken away.

Strategy: at each interface of a link, what is there is compared with what is wanted, and
each difference is a step: `put` does the steps, `wrong` tells them. So to put a link
twice changes nothing, and what changes does so in place: a class keeps its packets and
its counters when its rates or its queue's limit change. Another priority costs it the packets
that wait: the kernel has a class with packets go on at its old one until it has none left,
which a busy one never has.

A tree is a root with the link's handle, one class with the link's rate, and below it a
class for each of the link's, with a queue of its own. What nothing is guaranteed to gets
a trickle, so that it borrows, and all that is borrowed goes by priority. Packets that a
policy gave a class have it in their priority, which HTB looks at first; filters classify
the rest, the last of them to the class `otherwise`. (HTB has a default class, but that
cannot be changed while packets wait.)

What comes in at an interface is led to an IFB device of its own, whose name and alias
say so, and is shaped as it leaves that: behind the filters of tunnels, before anything else
of the stack. Chains at the hook ingress of that interface do not see it any more.

What stood in the way (somebody else's root qdisc, and all that hangs on it) is written
down by `before`, before anything is done, for the caller to keep.
"""

import errno
import socket
import subprocess
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, TypedDict
from zlib import crc32

from itmlang.links import PROBES, Link, LinkClass, classid_text
from runtime import qdisc, trees
from runtime.errors import MachineError
from runtime.qdisc import Counts as Counts
from runtime.qdisc import Match, Qdisc, Shape

# How ours are known: filters by "it", devices by their alias.
PREFERENCE: Final = 0x6974
_IFB: Final = "itm-"
_LONGEST_NAME: Final = 15  # of a device (linux/if.h: IFNAMSIZ)

_INNER: Final = 1  # the lower half of the handle of the class that has the link's rate
_TRICKLE: Final = 1000  # bytes a second, for a class that nothing is guaranteed to
_PROBED: Final = 8000  # bytes a second, of a controller's probes
# The time in which a class may send what it saved up, and the packets that it may at least:
# too little, and timers that come late cost rate.
_BURST, _BURST_PACKETS = 2_000_000, 2  # nanoseconds
_FRAME: Final = 1600  # bytes, with the link's own header
_QUANTUM: Final = (1514, 60_000)  # bytes that classes of one priority send in turn
_KINDS: Final = {"": ("fq_codel", "pfifo"), "fq_codel": ("fq_codel",), "fifo": ("pfifo",)}
_PACKET: Final = 1500  # bytes, of those that wait
# As many packets wait as leave in this time, at least and at most so many. fq_codel drops
# by the time that packets wait: there, the limit only bounds memory.
_WAITING: Final = {"pfifo": (0.1, 50, 1000), "fq_codel": (1.0, 1000, 10_240)}
_TARGET, _INTERVAL = 5_000, 100_000  # microseconds (RFC 8289), but a packet's time and a half

# What keeps a link itself alive goes to its best class, as do IPv6's neighbours (RFC 4861):
# ARP, 802.2 (spanning tree), LACP, PPPoE's discovery, 802.1X, LLDP (linux/if_ether.h).
# All else that is not IP may carry anything (VLANs, PPPoE, MPLS, storage).
_VITAL: Final = (qdisc.ARP, 0x0004, 0x8809, 0x8863, 0x888E, 0x88CC)
_ICMPV6, _SOLICITATION, _ADVERTISEMENT = 58, 135, 136
_NEIGHBOURS, _BY_DSCP4, _BY_DSCP6, _OTHERWISE = range(PREFERENCE + 0x10, PREFERENCE + 0x14)
_COMING_IN: Final = Match(PREFERENCE + 0x20, qdisc.ALL)


class Egress(TypedDict):
    """Of an interface: its index, the handles that roots of ours may have, and the tree that
    stood there before, as `runtime/trees.py` has it."""

    index: int
    handles: list[int]
    tree: list[str]


class Ingress(TypedDict):
    """Of an interface: its index, and whether it has its qdisc clsact from us."""

    index: int
    clsact: bool


class Aside(TypedDict):
    """Of an interface: its index, and a tree of somebody else's that has made room for a link."""

    index: int
    tree: list[str]


class Before(TypedDict):
    """What was there before, by interface. Who had leave to put a tree `aside` has it for as long
    as that is the same: to switch a link off and on asks nobody again."""

    egress: dict[str, Egress]
    ingress: dict[str, Ingress]
    aside: dict[str, Aside]


@dataclass(frozen=True)
class Done:
    """`before` is what is still to be kept; `told` what did not come back of what stood
    in the way, and why."""

    before: Before
    told: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Place:
    """An interface of a link that is here, and its index."""

    link: Link
    interface: str
    index: int


@dataclass(frozen=True)
class _Step:
    """Something that is not as it should be: told as it is, and as what is to be done.

    With `alone`, the steps that follow come of this one.
    """

    wrong: str
    todo: str
    do: Callable[[], None]
    alone: bool = False


def interfaces(link: Link) -> list[str]:
    """Its interfaces that are here now, in the calling thread's namespace; sorted.

    A pattern fits no device of ours, and not `lo`. Raises MachineError.
    """
    return [place.interface for place in _places([link])]


def speed(interface: str) -> int | None:
    """What the hardware of an interface says that it sends, in bytes a second, if it does."""
    return qdisc.speed(interface)


def at_rate(link: Link, rate: int) -> Link:
    """The link with another rate, in bytes a second.

    A class whose ceiling is the link's rate follows it; no ceiling is over it. Guarantees
    that sum to more than the new rate shrink, each by its share.
    """
    sum_ = sum(one.least for one in link.classes)
    classes = tuple(
        replace(
            one,
            most=rate if one.most >= link.rate else min(one.most, rate),
            least=one.least * rate // sum_ if sum_ > rate else one.least,
        )
        for one in link.classes
    )
    return replace(link, rate=rate, classes=classes)


def foreign(
    links: Iterable[Link], earlier: Before | None = None, *, again: bool = False
) -> dict[str, str]:
    """By interface, the kinds of root qdiscs that somebody else set. Raises MachineError.

    `earlier` is what was stored when links were put before: it says which are ours. With
    `again`, what has made room before, and is the same, may do so again: it is left out.
    """
    with _asking():
        roots = _roots(qdisc.qdiscs())
        aside = earlier["aside"] if again and earlier else {}
        return {
            place.interface: root.kind
            for place in _places(links)
            if not place.link.ingress and (root := roots.get(place.index)) and root.handle
            and not _is_ours(root, [place.link.handle, *_handles(earlier, place.interface)])
            and aside.get(place.interface) != _aside(place.index)
        }  # fmt: skip


def before(
    links: Iterable[Link], earlier: Before | None = None, shared: Collection[str] = ()
) -> Before:
    """What `put` is going to change of what is not ours, to be stored before it does.

    `earlier` is what was stored when links were put before. `shared` are interfaces that
    have their qdisc clsact from tunnels of ours. Raises MachineError.
    """
    with _asking():
        queues = qdisc.qdiscs()
        here = _here()
        roots = _roots(queues)
        ready = {one.device for one in queues if qdisc.is_clsact(one)}
        found = _copy(earlier, here)
        for place in _places(links):
            name, index = place.interface, place.index
            if place.link.ingress:
                ours = index not in ready or name in shared
                found["ingress"].setdefault(name, {"index": index, "clsact": ours})
                continue
            entry = found["egress"].setdefault(name, {"index": index, "handles": [], "tree": []})
            if place.link.handle not in entry["handles"]:
                entry["handles"].append(place.link.handle)
            root = roots.get(index)
            if root and root.handle and not _is_ours(root, entry["handles"]):
                found["aside"][name] = _aside(index)
                entry["tree"] = found["aside"][name]["tree"]
    return found


def put(links: Iterable[Link], stored: Before) -> Done:
    """Make the links of the calling thread's namespace exactly these, where they are now.

    `stored` is what `before` gave for them. What is right already is left alone. Raises
    MachineError; what was done till then is ours, and the next `put` takes it up: of the
    links that were there before, to have them again.
    """
    wanted = _places(links)
    coming = {place.interface for place in wanted if place.link.ingress}
    leaving = {place.interface for place in wanted if not place.link.ingress}
    told: list[str] = []
    here = _here()
    rest = _copy(stored, here)
    for name in sorted(rest["egress"].keys() - leaving):
        with _doing("take a link's queues away", name):
            told += _put_back(name, rest["egress"].pop(name))
    for name in sorted(rest["ingress"].keys() - coming):
        with _doing("take a link's queues away", name):
            _lead_away(rest["ingress"].pop(name))
    with _asking():
        for name, (index, alias) in sorted(qdisc.ifbs().items()):
            of = alias.removeprefix(_IFB)
            if alias.startswith(_IFB) and name == _ifb(of) and of not in coming:
                qdisc.delete_device(index)
    for place in wanted:
        _make(place)
    return Done(rest, tuple(told))


def take_away(stored: Before | None) -> tuple[str, ...]:
    """Leave no link in the calling thread's namespace, and what was `stored` as it was.

    What did not come back is told. A root that somebody else has set since is left as it is.
    Raises MachineError.
    """
    return put((), stored or _untouched()).told


def wrong(links: Iterable[Link]) -> dict[str, list[str]]:
    """By name, what of these links is not as `put` makes it, in words. Raises MachineError."""
    found: dict[str, list[str]] = {}
    for link in links:
        told = found.setdefault(link.name, [])
        places = _places([link])
        if not places and not link.pattern:
            told.append(f"its interface {link.interface} is not there")
        with _asking():
            queues = qdisc.qdiscs()
            ifbs = qdisc.ifbs() if link.ingress else {}
            for place in places:
                for step in _look(place, queues, ifbs):
                    told.append(f"{step.wrong} at {place.interface}")
                    if step.alone:
                        break
    return found


def stats(links: Iterable[Link]) -> dict[tuple[str, str], dict[str, Counts]]:
    """By link and interface, by class, what it has sent and what waits; "" is the whole link.

    Links and classes that are not there are left out. Drops are those of a class's queue:
    they begin anew when its kind changes. Raises MachineError.
    """
    found = {}
    with _asking():
        queues = qdisc.qdiscs()
        below = {(one.device, one.parent): one for one in queues}
        here = _here()
        for place in _places(links):
            device = here.get(_device(place), 0)
            root = below.get((device, qdisc.ROOT))
            if root is None or not _is_ours(root, [place.link.handle]):
                continue
            there = qdisc.classes(device)
            counts = {"": root.counts}
            for one in place.link.classes:
                classid = place.link.classid(one)
                queue = below.get((device, classid))
                if classid in there and queue is not None:
                    sent = there[classid].counts
                    counts[one.name] = replace(
                        queue.counts,
                        packets=sent.packets, bytes=sent.bytes, overlimits=sent.overlimits,
                    )  # fmt: skip
            found[place.link.name, place.interface] = counts
    return found


def rate(link: Link) -> int | None:
    """The rate that a link has now at its first interface, in bytes a second; None without one.

    Raises MachineError.
    """
    with _asking():
        here = _here()
        for place in _places([link]):
            shaped = qdisc.classes(here.get(_device(place), 0)).get(link.handle << 16 | _INNER)
            if shaped is not None:
                return shaped.shape.ceiling
    return None


def set_rate(link: Link, interface: str, rate: int) -> None:
    """Change the rate of a link that is there, in bytes a second, in place and nothing else.

    What follows it does, as `at_rate` says: `link` is as the policy has it. Raises
    MachineError, also where the link is not there.
    """
    with _doing("set its rate", interface, link):
        device = _here().get(_ifb(interface) if link.ingress else interface, 0)
        link = at_rate(link, rate)
        for handle, shape in _shapes(link).items():
            qdisc.put_class(device, handle, shape, change=True)
        # So many packets wait as leave in some time: a slower link has shorter queues.
        leaves = {one.parent: one for one in qdisc.qdiscs() if one.device == device}
        for one in _classes(link):
            for step in _look_at_queue(link, one, device, leaves.get(link.classid(one)), old=False):
                step.do()


# What a tree should be.


def _classes(link: Link) -> tuple[LinkClass, ...]:
    """The link's classes, and the one for a controller's probes, which wait behind nothing."""
    if not link.probed:
        return link.classes
    probes = LinkClass(
        "probes", PROBES, 0, min(_PROBED, link.rate // 10), link.rate, 50, "fifo", (), link.span
    )
    return (*link.classes, probes)


def _shapes(link: Link) -> dict[int, Shape]:
    """By handle, what its classes are; the one above the others first."""
    inner = link.handle << 16 | _INNER
    quantum = min(max(link.rate // 500, _QUANTUM[0]), _QUANTUM[1])
    # It sends nothing of itself, but without a quantum, the kernel warns of the one it makes up.
    found = {inner: replace(_shape(qdisc.ROOT, link.rate, link.rate), quantum=quantum)}
    trickle = max(1, min(_TRICKLE, link.rate // 100))
    for one in _classes(link):
        rate = min(max(one.least, trickle), one.most)
        found[link.classid(one)] = replace(
            _shape(inner, rate, one.most), quantum=quantum, priority=one.priority
        )
    return found


def _shape(parent: int, rate: int, ceiling: int) -> Shape:
    return Shape(parent, rate, ceiling, _bucket(rate), _bucket(ceiling))


def _bucket(rate: int) -> int:
    """What a class may save up: the kernel has it as the time that sending it takes."""
    packets = _BURST_PACKETS * _FRAME * 10**9 // rate
    return min(max(_BURST, packets) // qdisc.TICK, 0xFFFF_FFFF)


def _limit(one: LinkClass, kind: str) -> int:
    seconds, least, most = _WAITING[kind]
    return one.queue or min(max(int(one.most * seconds / _PACKET), least), most)


def _leads(link: Link) -> dict[Match, int]:
    """The filters: where they lead."""
    best = link.classid(min(link.classes, key=lambda one: one.priority))
    found = {Match(PREFERENCE + n, protocol): best for n, protocol in enumerate(_VITAL)}
    for kind in (_SOLICITATION, _ADVERTISEMENT):
        words = ((0x0000_FF00, _ICMPV6 << 8, 4), (0xFF00_0000, kind << 24, 40))
        found[Match(_NEIGHBOURS, qdisc.IPV6, words)] = best
    for one in link.classes:
        for dscp in one.dscp:
            word4, word6 = (0x00FC_0000, dscp << 18, 0), (0x0FC0_0000, dscp << 22, 0)
            found[Match(_BY_DSCP4, qdisc.IPV4, (word4,))] = link.classid(one)
            found[Match(_BY_DSCP6, qdisc.IPV6, (word6,))] = link.classid(one)
    found[Match(_OTHERWISE, qdisc.ALL)] = link.handle << 16 | link.otherwise
    return found


# What it is, and what is to be done.


def _make(place: _Place) -> None:
    try:
        if place.link.ingress:
            with _doing("make the device for what comes in", place.interface, place.link):
                _make_ifb(place.interface)
        with _asking():
            steps = _look(place, qdisc.qdiscs(), qdisc.ifbs() if place.link.ingress else {})
            for step in steps:
                with _doing(step.todo, place.interface, place.link):
                    step.do()
    except MachineError:
        if _here().get(place.interface) == place.index:
            raise
        # The interface went meanwhile, and all with it.


def _look(
    place: _Place, queues: list[Qdisc], ifbs: Mapping[str, tuple[int, str]]
) -> Iterator[_Step]:
    """What is wrong at a place, in the order in which it is to be mended."""
    link = place.link
    if not link.ingress:
        yield from _look_at_tree(link, place.index, queues)
        return
    name = _ifb(place.interface)
    if name not in ifbs:
        yield _Step(f"its device {name} is gone", "", _nothing)
        return
    device, _ = ifbs[name]
    yield from _look_at_tree(link, device, queues)
    if not any(one.device == place.index and qdisc.is_clsact(one) for one in queues):
        yield _Step(
            "the qdisc clsact is gone", "add the qdisc clsact",
            partial(qdisc.add_clsact, place.index),
        )  # fmt: skip
    found = qdisc.filters(place.index, qdisc.INCOMING).get(_COMING_IN)
    if found is None or found.redirect != device:
        handle = found.handle if found else 0
        yield _Step(
            f"nothing leads to {name} what comes in", "lead what comes in to the link",
            partial(
                qdisc.put_filter, place.index, qdisc.INCOMING, _COMING_IN, 0,
                redirect=device, handle=handle,
            ),
        )  # fmt: skip


def _look_at_tree(link: Link, device: int, queues: list[Qdisc]) -> Iterator[_Step]:
    root = _roots(queues).get(device)
    there, shapes = qdisc.classes(device), _shapes(link)
    ours = root is not None and _is_ours(root, [link.handle])
    if ours and all(
        there[h].shape.parent == shapes[h].parent for h in there.keys() & shapes.keys()
    ):
        leaves = {one.parent: one for one in queues if one.device == device}
        filters = qdisc.filters(device, link.handle << 16)
    else:
        there, leaves, filters = {}, {}, {}
        how = f"is {root.kind} {classid_text(root.handle)}" if root and root.handle else "is gone"
        yield _Step(
            f"its root qdisc {'was changed' if ours else how}", "set the root qdisc",
            partial(_make_root, link, device, anew=ours), alone=True,
        )  # fmt: skip
    names = {link.classid(one): f"class {one.name}" for one in _classes(link)}
    for handle, shape in shapes.items():
        name = names.get(handle, "the class above all")
        found = there.get(handle)
        if found is None or found.shape != _comparable(shape, handle in names):
            yield _Step(
                f"{name} is gone" if found is None else f"{name} {_difference(found.shape, shape)}",
                f"give {name} its rate",
                partial(qdisc.put_class, device, handle, shape),
            )  # fmt: skip
    for one in _classes(link):
        handle = link.classid(one)
        old = handle in there and there[handle].shape.priority != one.priority
        yield from _look_at_queue(link, one, device, leaves.get(handle), old=old)
    yield from _look_at_filters(link, device, filters)
    for handle in sorted(there.keys() - shapes.keys(), reverse=True):
        yield _Step(
            f"there is a class {classid_text(handle)}",
            f"delete the class {classid_text(handle)}",
            partial(qdisc.delete_class, device, handle),
        )  # fmt: skip


def _look_at_queue(
    link: Link, one: LinkClass, device: int, found: Qdisc | None, *, old: bool
) -> Iterator[_Step]:
    """`old`: what waits there has the priority that the class had."""
    kinds = _KINDS[one.inner]
    if found is None:
        wrong = f"the queue of class {one.name} is gone"
    elif found.kind not in kinds:
        wrong = f"the queue of class {one.name} is {found.kind}"
    else:
        kinds = (found.kind,)
        if old:
            wrong = f"the queue of class {one.name} has its old priority"
        elif qdisc.limit(found) != _limit(one, found.kind):
            wrong = f"the queue of class {one.name} holds {qdisc.limit(found)} packets"
        else:
            return
    yield _Step(
        wrong, f"give class {one.name} its queue ({kinds[-1]})",
        partial(_make_queue, device, link.classid(one), one, kinds, anew=old and found is not None),
    )  # fmt: skip


def _look_at_filters(
    link: Link, device: int, there: Mapping[Match, qdisc.Filter]
) -> Iterator[_Step]:
    root, wanted = link.handle << 16, _leads(link)
    for match, target in wanted.items():
        found = there.get(match)
        if found is None or found.target != target:
            handle, how = (found.handle, "leads elsewhere") if found else (0, "is gone")
            yield _Step(
                f"the filter to {classid_text(target)} of preference {match.preference} {how}",
                f"lead packets to {classid_text(target)}",
                partial(qdisc.put_filter, device, root, match, target, handle=handle),
            )  # fmt: skip
    for match in sorted(there.keys() - wanted.keys()):
        yield _Step(
            f"there is a filter of preference {match.preference} to "
            f"{classid_text(there[match].target)}",
            "delete a filter",
            partial(qdisc.delete_filter, device, root, match, there[match].handle),
        )  # fmt: skip


def _nothing() -> None:
    """What `_make` has done already."""


def _comparable(shape: Shape, leaf: bool) -> Shape:
    return shape if leaf else replace(shape, quantum=0, priority=0)


def _difference(found: Shape, wanted: Shape) -> str:
    if found.rate != wanted.rate:
        return f"is guaranteed {found.rate} bytes/s, not {wanted.rate}"
    if found.ceiling != wanted.ceiling:
        return f"gets {found.ceiling} bytes/s at most, not {wanted.ceiling}"
    if found.priority != wanted.priority:
        return f"has priority {found.priority}, not {wanted.priority}"
    return "was changed"


def _make_root(link: Link, device: int, *, anew: bool) -> None:
    if anew:
        qdisc.delete_root(device)
    qdisc.put_root(device, link.handle << 16, link.otherwise)


def _make_queue(
    device: int, classid: int, one: LinkClass, kinds: tuple[str, ...], *, anew: bool
) -> None:
    """Of the first of these kinds that the kernel has."""
    if anew:
        qdisc.delete_queue(device, classid)
    for kind in kinds:
        limit = _limit(one, kind)
        try:
            if kind == "pfifo":
                qdisc.put_fifo(device, classid, limit)
            else:
                target = max(_TARGET, _FRAME * 1_500_000 // one.most)
                interval = _INTERVAL + target - _TARGET
                qdisc.put_fq_codel(device, classid, limit, target, interval)
            return
        except OSError as error:
            if kind == kinds[-1] or error.errno not in (errno.ENOENT, errno.EOPNOTSUPP):
                raise


def _put_back(name: str, entry: Egress) -> list[str]:
    """Take a root of ours away and make what was there before; what did not come back."""
    index, tree = entry["index"], entry["tree"]
    root = _roots(qdisc.qdiscs()).get(index)
    if root is not None and root.handle:
        # Of what somebody was killed over, a part is there.
        part = bool(tree) and {*trees.recorded(index)} < {*tree}
        if not part and not _is_ours(root, entry["handles"]):
            return []
        qdisc.delete_root(index)
    return [f"{name}: {one}" for one in trees.put_back(index, tree)]


def _make_ifb(interface: str) -> None:
    name = _ifb(interface)
    found = qdisc.ifbs().get(name)
    if found is not None and found[1] == _IFB + interface:
        return
    if not Path("/sys/module/ifb").exists():
        # Loaded by the kernel itself, it would make two devices that nobody wants.
        with suppress(OSError):
            subprocess.run(["modprobe", "-q", "ifb", "numifbs=0"], check=False)
    qdisc.add_ifb(name, _IFB + interface)


def _lead_away(entry: Ingress) -> None:
    """Let what comes in come in; its IFB goes later."""
    index = entry["index"]
    if not any(one.device == index and qdisc.is_clsact(one) for one in qdisc.qdiscs()):
        return
    if _COMING_IN in qdisc.filters(index, qdisc.INCOMING):
        qdisc.delete_filter(index, qdisc.INCOMING, _COMING_IN)
    ways = (qdisc.INCOMING, qdisc.OUTGOING)
    if entry["clsact"] and not any(qdisc.filter_bodies(index, way) for way in ways):
        qdisc.delete_clsact(index)


# Where.


def _here() -> dict[str, int]:
    """The devices of the calling thread's namespace."""
    return {name: index for index, name in socket.if_nameindex()}


def _places(links: Iterable[Link]) -> list[_Place]:
    here = sorted(_here().items())
    return [
        _Place(link, name, index)
        for link in links
        for name, index in here
        if link.fits(name) and not (link.pattern and (name == "lo" or name.startswith(_IFB)))
    ]


def _device(place: _Place) -> str:
    """Where the tree is."""
    return _ifb(place.interface) if place.link.ingress else place.interface


def _ifb(interface: str) -> str:
    name = _IFB + interface
    return name if len(name) <= _LONGEST_NAME else f"{_IFB}{crc32(interface.encode()):08x}"


def _roots(queues: Iterable[Qdisc]) -> dict[int, Qdisc]:
    return {one.device: one for one in queues if one.parent == qdisc.ROOT}


def _is_ours(root: Qdisc, handles: Collection[int]) -> bool:
    return root.kind == "htb" and root.handle >> 16 in handles


def _handles(stored: Before | None, interface: str) -> list[int]:
    return (
        stored["egress"][interface]["handles"] if stored and interface in stored["egress"] else []
    )


def _copy(stored: Before | None, here: Mapping[str, int]) -> Before:
    """What is stored of interfaces that are still the same, by the names that they have now."""
    stored = stored or _untouched()
    names = {index: name for name, index in here.items()}
    return {
        "egress": {
            names[one["index"]]: {
                "index": one["index"], "handles": [*one["handles"]], "tree": [*one["tree"]],
            }
            for one in stored["egress"].values()
            if one["index"] in names
        },
        "ingress": {
            names[one["index"]]: {"index": one["index"], "clsact": one["clsact"]}
            for one in stored["ingress"].values()
            if one["index"] in names
        },
        "aside": {
            names[one["index"]]: one for one in stored["aside"].values() if one["index"] in names
        },
    }  # fmt: skip


def _untouched() -> Before:
    return {"egress": {}, "ingress": {}, "aside": {}}


def _aside(index: int) -> Aside:
    return {"index": index, "tree": trees.recorded(index)}


def _asking() -> AbstractContextManager[None]:
    return _doing("look at the queues")


@contextmanager
def _doing(what: str, interface: str = "", link: Link | None = None) -> Iterator[None]:
    """Turn what the kernel refuses into a MachineError that says what was to be done."""
    try:
        yield
    except OSError as error:
        where = " at ".join(filter(None, (f"link {link.name}" if link else "", interface)))
        lacking = error.errno in (errno.ENOENT, errno.EOPNOTSUPP)
        raise MachineError(
            f"{where}{': ' if where else ''}cannot {what}: {error.strerror or error}",
            "this needs root (CAP_NET_ADMIN)" if error.errno in (errno.EPERM, errno.EACCES)
            else "`itmc doctor` says what this machine can do" if lacking
            else "`tc qdisc` and `tc class` show what is there",
        ) from error  # fmt: skip
