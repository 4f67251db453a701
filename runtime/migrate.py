"""What is learned, carried over into sets of another form; pure.

Counts are the truth of a flow; what else is known of it follows from them: how much
is left until a threshold, and whether it is past. So a moved threshold leaves the
counters alone and makes the sets around them anew. A coarser key gets the sums.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from itmlang import rates
from itmlang.nft.model import FlowSet, duration
from runtime.listing import Element

# Holds for every packet: there is none of two bytes.
_SPENT: Final = "limit rate over 1 bytes/second burst 1 bytes"
_MOST: Final = 2**32 - 1  # a burst has 32 bits; nftables 1.0.6 cuts off the others
# So many elements go into one command.
_IN_ONE: Final = 500

# (table, set) -> its elements.
Dump = Callable[[str, str], Sequence[Element]]


@dataclass(frozen=True)
class Move:
    """How a set gets what it should hold from the start.

    `how` is "sum" (counts of a finer key), "copy" (elements as they are), "budget" (what
    is left until the threshold), "over" (the flows past it), "age" (from the young of
    another age) or "begin" (all known flows are young). `sources` are (table, set); of
    "budget", "over" and "begin" it is the one set of counts, as the new ruleset has it.
    """

    table: str
    target: FlowSet
    how: str
    sources: tuple[tuple[str, FlowSet], ...]
    emptied: bool = False  # the set is there, and holds something else


@dataclass(frozen=True)
class Kept:
    """The elements that a set with this key held."""

    key: tuple[str, ...]
    elements: tuple[Element, ...]


@dataclass(frozen=True)
class Left:
    """What a generation had learned when it was left, of what then went: by (table, name).

    Counters are (packets, bytes).
    """

    sets: Mapping[tuple[str, str], Kept] = field(default_factory=dict)
    counters: Mapping[tuple[str, str], tuple[int, int]] = field(default_factory=dict)

    def later(self, passed: int) -> "Left":
        """The same some milliseconds later: what would have expired is gone."""
        return Left(
            {
                name: Kept(kept.key, tuple(e for one in kept.elements for e in _aged(one, passed)))
                for name, kept in self.sets.items()
            },
            self.counters,
        )


def _aged(element: Element, passed: int) -> Iterator[Element]:
    if element.expires is None:
        yield element
    elif element.expires > passed:
        yield replace(element, expires=element.expires - passed)


class Contents:
    """What the sets of the new ruleset hold, as far as it is known."""

    def __init__(self, moves: Iterable[Move], dump: Dump) -> None:
        self._moves = {(move.table, move.target.name): move for move in moves}
        self._dump = dump
        self._known: dict[tuple[str, str], Sequence[Element]] = {}
        self.cut: dict[str, int] = {}  # sets of counts and learned ones, what found no room

    def of(self, table: str, name: str) -> Sequence[Element]:
        """A set's elements: carried over, or as they are."""
        key = table, name
        if key not in self._known:
            move = self._moves.get(key)
            self._known[key] = self._dump(*key) if move is None else self._moved(move)
        return self._known[key]

    def _moved(self, move: Move) -> Sequence[Element]:
        target = move.target
        match move.how:
            case "sum":
                return self._cut(summed(move, self._dump), target)
            case "copy":
                found = [e for path, one in move.sources for e in self._dump(path, one.name)]
                return self._cut(found, target)
            case "age":
                ((path, source),) = move.sources
                return _of_age(self._dump(path, source.name), source, target)
            case _:
                ((path, source),) = move.sources
                counts = self.of(path, source.name)
                if move.how == "over":
                    counts = [e for e in counts if _total(e, target) > target.threshold]
                if move.how == "budget":
                    counts = [e for e in counts if _sayable(e, target)]
                if move.how == "begin":
                    counts = [replace(e, expires=None) for e in counts]
                return fitting(counts, target)

    def _cut(self, found: Sequence[Element], target: FlowSet) -> Sequence[Element]:
        if len(found) > target.size:
            self.cut[target.name] = len(found) - target.size
        return fitting(found, target)

    def commands(self, move: Move) -> list[str]:
        """nftables commands that fill the set of a move."""
        texts = [
            _text(element, move.target, move.how)
            for element in self.of(move.table, move.target.name)
        ]
        begin = f"add element {move.table} {move.target.name}"
        rows = [texts[n : n + _IN_ONE] for n in range(0, len(texts), _IN_ONE)]
        return [f"{begin} {{ {', '.join(row)} }}" for row in rows]


def summed(move: Move, dump: Dump) -> list[Element]:
    """The counts of a finer key, added up by the new one."""
    found: dict[tuple[str, ...], Element] = {}
    for path, source in move.sources:
        places = [source.key.index(name) for name in move.target.key]
        for element in dump(path, source.name):
            key = tuple(element.key[place] for place in places)
            known = found.get(key)
            if known is None:
                found[key] = replace(element, key=key)
                continue
            found[key] = Element(
                key,
                known.packets + element.packets,
                known.bytes + element.bytes,
                expires=_later(known.expires, element.expires),
            )
    return list(found.values())


def _later(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else max(one, other)


def fitting(elements: Iterable[Element], target: FlowSet) -> list[Element]:
    """The elements as the set can take them: with its time-out, and no more than it holds."""
    found = list(elements)
    if len(found) > target.size:  # those that were asked last
        forever = 2**63
        found.sort(key=lambda e: -(forever if e.expires is None else e.expires))
        found = found[: target.size]
    if target.timeout is None:
        return found
    # What was learned for a time of its own keeps that.
    own = target.role == "learned"
    return [_within(e if own else replace(e, timeout=None), target.timeout) for e in found]


def _within(element: Element, timeout: int) -> Element:
    """The element as the kernel takes it: none expires later than its time-out."""
    if element.expires is None:
        return element
    most = timeout if element.timeout is None else element.timeout
    return replace(element, expires=min(element.expires, most))


def _of_age(young: Iterable[Element], source: FlowSet, target: FlowSet) -> list[Element]:
    """Those that are still young by another age."""
    older = target.threshold - source.threshold
    found = [replace(e, timeout=None, expires=(e.expires or 1) + older) for e in young]
    return fitting([e for e in found if e.expires is not None and e.expires > 0], target)


def _total(element: Element, target: FlowSet) -> int:
    return element.bytes if target.attribute == "bytes" else element.packets


def _text(element: Element, target: FlowSet, how: str) -> str:
    """An element as a command names it."""
    text = " . ".join(element.key)
    if target.role == "count":
        text += f" counter packets {element.packets} bytes {element.bytes}"
    elif how == "budget":
        text += " " + _left(element, target)
    timeout = target.timeout if element.timeout is None else element.timeout
    if target.timed and timeout is not None:
        text += f" timeout {duration(timeout)}"
        if element.expires is not None:
            text += f" expires {duration(max(1, element.expires))}"
    return text


def _sayable(element: Element, target: FlowSet) -> bool:
    """Can it be said what is left of the threshold? If not (4 GB and more), all of it is."""
    return target.threshold - _total(element, target) <= _MOST


def _left(element: Element, target: FlowSet) -> str:
    """The statement that holds from the packet on that takes the flow over its threshold.

    A quota cannot be said in an element (nftables 1.0.6), a limit of bytes means the same.
    """
    left = target.threshold - _total(element, target)
    if left <= 0:
        return _SPENT
    if target.attribute == "packets":
        return f"limit rate over 1/{rates.slowest(left, False)} burst {left} packets"
    # A bucket of bytes holds one period's and the burst.
    unit = rates.slowest(left, True)
    return f"limit rate over 1 bytes/{unit} burst {max(1, left - 1)} bytes"


def corrections(
    move: Move, before: Sequence[Element], now: Sequence[Element]
) -> tuple[list[str], int]:
    """Commands for flows that got packets while their threshold moved; how many they are.

    The packets between the reading of the counts and the transaction are in the counts,
    but not in what is left of the threshold.
    """
    known = {element.key: _total(element, move.target) for element in before}
    late = [e for e in now if _total(e, move.target) != known.get(e.key, 0)]
    if move.how == "budget":
        late = [e for e in late if _sayable(e, move.target)]
    at = f"element {move.table} {move.target.name}"
    commands = []
    for element in fitting(late, move.target):
        key = " . ".join(element.key)
        if move.how == "over":
            if _total(element, move.target) > move.target.threshold:
                commands.append(f"add {at} {{ {_text(element, move.target, move.how)} }}")
            continue
        # Added first, for what is not there cannot be deleted.
        commands += [
            f"add {at} {{ {key} }}",
            f"delete {at} {{ {key} }}",
            f"add {at} {{ {_text(element, move.target, move.how)} }}",
        ]
    return commands, len(late)
