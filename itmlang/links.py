"""Scheduled interfaces: what a `link` of a policy file asks for.

A link shapes what leaves by an interface (or, with `ingress`, what comes in by it) to
its rate, and shares that among its classes: each has what is guaranteed to it, the rest
goes to the classes in the order of their priority, and none gets more than its ceiling.
Pure data; `runtime/links.py` makes a tree of HTB qdiscs of it.
"""

from dataclasses import dataclass
from typing import Final
from zlib import crc32

from itmlang.source import Span

# linux/pkt_sched.h: TC_HTB_NUMPRIO.
PRIORITIES: Final = 8
MOST_CLASSES: Final = 99
PROBES: Final = 2  # the number of the class that has a controller's probes
# The handle of a link's root qdisc, and the lower half of a class's `classid`, are four decimal
# digits: never `1:`, which others take.
_FIRST_NUMBER, _NUMBERS = 1000, 9000


@dataclass(frozen=True)
class LinkClass:
    """A class of a link.

    `number` is the lower half of its classid. `priority` is 0 (served first) to 7. `least`
    is guaranteed (0: nothing) and `most` its ceiling, in bytes a second. `queue` packets wait at
    most (0: as the ceiling suggests), in a qdisc of the kind `inner`: "fq_codel", "fifo", or ""
    for the first of these that the kernel has. Packets with a DSCP in `dscp` are the class's
    where no policy gave them one.
    """

    name: str
    number: int
    priority: int
    least: int
    most: int
    queue: int
    inner: str
    dscp: tuple[int, ...]
    span: Span


@dataclass(frozen=True)
class Link:
    """A scheduled interface, or several by a pattern that ends in `*`.

    `rate` is in bytes a second; `handle` the upper half of the classids; `otherwise`
    the number of the class that takes packets of which nobody says more. `at` is where the
    interface is written. Without an interface, classes are told by their DSCP alone: this box only
    marks, and one behind it schedules. `probed`: a controller sends probes by it, which wait behind nothing.
    """

    name: str
    interface: str
    ingress: bool
    rate: int
    handle: int
    otherwise: int
    classes: tuple[LinkClass, ...]
    at: Span
    span: Span
    probed: bool = False

    @property
    def only_marks(self) -> bool:
        return not self.interface

    @property
    def pattern(self) -> bool:
        """May its interface come later? A missing one is an error otherwise."""
        return self.interface.endswith("*")

    def fits(self, interface: str) -> bool:
        """Is the link of this interface?"""
        if self.pattern:
            return interface.startswith(self.interface[:-1])
        return interface == self.interface

    def find(self, name: str) -> LinkClass | None:
        """Its class of a name."""
        return next((one for one in self.classes if one.name == name), None)

    @property
    def probe(self) -> int:
        """The classid of its probes, 0 if there are none."""
        return self.handle << 16 | PROBES if self.probed else 0

    def classid(self, one: LinkClass) -> int:
        """The classid of one of its classes (linux/pkt_sched.h: TC_H_MAKE)."""
        return self.handle << 16 | one.number


def overlap(one: Link, other: Link) -> bool:
    """Can an interface fit both?"""
    stems = one.interface.removesuffix("*"), other.interface.removesuffix("*")
    if one.only_marks or other.only_marks:
        return False
    if one.pattern and other.pattern:
        return stems[0].startswith(stems[1]) or stems[1].startswith(stems[0])
    return one.fits(stems[1]) if one.pattern else other.fits(stems[0])


def handle(name: str, taken: frozenset[int] = frozenset()) -> int:
    """The handle of a link's root qdisc: it follows from its name, so that it stays."""
    return _number(name, taken)


def class_number(name: str, taken: frozenset[int] = frozenset()) -> int:
    """The number of a link's class: it follows from its name, so that what waits in a class and
    what it counted stay its own, whichever classes come and go beside it."""
    return _number(name, taken)


def _number(name: str, taken: frozenset[int]) -> int:
    number = crc32(name.encode()) % _NUMBERS
    while (found := int(str(_FIRST_NUMBER + number), 16)) in taken:
        number = (number + 1) % _NUMBERS
    return found


def rate_text(rate: float, digits: int = 6) -> str:
    """A rate of bytes a second as a policy has it: `10 mbit`, of so many digits at most."""
    bits = rate * 8
    for unit, size in (("gbit", 10**9), ("mbit", 10**6), ("kbit", 10**3)):
        if bits >= size:
            return f"{bits / size:.{digits}g} {unit}"
    return f"{bits:.{digits}g} bit"


def classid_text(classid: int) -> str:
    """A classid as tc and nft write it: `1000:10`."""
    return f"{classid >> 16:x}:{classid & 0xFFFF:x}"
