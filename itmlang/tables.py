"""What policies learn while they run: flow tables, buckets for each flow, learned sets.

They behave as nftables' dynamic sets do: an entry is renewed by what is written to
it, leaves by time alone, and a full table takes nothing new. Times are seconds.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Final

from itmlang import ir
from itmlang.conntrack import Connection
from itmlang.packet import Packet
from itmlang.rates import Bucket, period

# How long a flow stays over a rate after its bucket ran out, as in `nft.lower`.
_OVER_RATE: Final = 1.0
_FOR_EVER: Final = float("inf")

Key = tuple[object, ...]


@dataclass(slots=True)
class Entry:
    """What was logged of one flow: `first` and `last` are when, `over` until when it is over a rate."""

    packets: int = 0
    bytes: int = 0
    first: float = 0.0
    last: float = 0.0
    connections: int = 0
    tracked: set[Connection] | None = None
    buckets: dict[tuple[str, int], Bucket] | None = None
    over: dict[tuple[str, int], float] | None = None


_NOTHING: Final = Entry()


@dataclass
class FlowTable:
    """The entries of one flow, a table for each family if the key has addresses.

    `rates` are the (attribute, threshold) that are asked of it, `connections` whether
    its connections are.
    """

    flow: ir.Flow
    rates: tuple[tuple[str, int], ...] = ()
    connections: bool = False
    entries: dict[int, dict[Key, Entry]] = field(default_factory=dict)
    uncounted: int = 0

    def __post_init__(self) -> None:
        self._getters = tuple(f.get for f in self.flow.key)
        self._by_address = self.flow.by_address
        self._timeout = _FOR_EVER if self.flow.timeout is None else self.flow.timeout / 1000
        # Until when nothing in a full table can expire.
        self._full_until: dict[int, float] = {}
        # The key of the packet that was asked about last: logging it needs the same one.
        self._asked: tuple[Packet | None, Key | None] = (None, None)

    def forget(self) -> None:
        """A packet comes: the same one may come again, at another hook and rewritten."""
        self._asked = None, None

    def key(self, packet: Packet) -> Key | None:
        """The packet's key, None if it lacks one of the fields."""
        key = tuple([get(packet) for get in self._getters])
        return None if None in key else key

    def _table(self, packet: Packet) -> dict[Key, Entry]:
        return self.entries.setdefault(packet.family if self._by_address else 0, {})

    def look_up(self, packet: Packet, now: float) -> Entry | None:
        """What was logged of the packet's flow, None if the packet has no key."""
        asked, key = self._asked
        if asked is not packet:
            key = self.key(packet)
            self._asked = packet, key
        if key is None:
            return None
        entry = self._table(packet).get(key)
        return _NOTHING if entry is None or now - entry.last >= self._timeout else entry

    def count(self, packet: Packet, now: float) -> Entry | None:
        """Log the packet; None if it has no key, or if it is new and the table is full."""
        asked, key = self._asked
        if asked is not packet:
            key = self.key(packet)
        self._asked = None, None  # what comes now may rewrite the packet
        if key is None:
            return None
        table = self._table(packet)
        entry = table.get(key)
        if entry is None or now - entry.last >= self._timeout:
            table.pop(key, None)
            if len(table) >= self.flow.size and not self._room(packet, table, now):
                self.uncounted += 1
                return None
            entry = table[key] = Entry(first=now)
        entry.packets += 1
        entry.bytes += packet.length
        entry.last = now
        if self.rates:
            self._measure(entry, packet, now)
        if self.connections:
            self._track(entry, packet, now)
        return entry

    def _room(self, packet: Packet, table: dict[Key, Entry], now: float) -> bool:
        """Take what has expired out of a full table; is there room then?"""
        family = packet.family if self._by_address else 0
        if now < self._full_until.get(family, 0.0):
            return False
        for old in [k for k, e in table.items() if now - e.last >= self._timeout]:
            del table[old]
        if len(table) < self.flow.size:
            return True
        # Entries can only be renewed until then, so none need be looked at before.
        self._full_until[family] = min(e.last for e in table.values()) + self._timeout
        return False

    def _measure(self, entry: Entry, packet: Packet, now: float) -> None:
        if entry.buckets is None or entry.over is None:
            entry.buckets, entry.over = {}, {}
            for attribute, threshold in self.rates:
                in_bytes = attribute == "byte_rate"
                amount, seconds, _ = period(threshold, in_bytes)
                burst = 0 if in_bytes else amount
                entry.buckets[attribute, threshold] = Bucket(amount, seconds, in_bytes, burst)
        for asked, bucket in entry.buckets.items():
            if bucket.over(packet.length, now):
                entry.over[asked] = now + _OVER_RATE

    def _track(self, entry: Entry, packet: Packet, now: float) -> None:
        if packet.connection is None:
            return
        if entry.tracked is None:
            entry.tracked = set()
        entry.tracked.add(packet.connection)
        # The packet's own connection, if new, lives only once the packet has left.
        entry.tracked = {
            one
            for one in entry.tracked
            if one.alive(now) or (one is packet.connection and not one.confirmed)
        }
        entry.connections = len(entry.tracked)


@dataclass
class Buckets:
    """A token bucket for each entry of a flow; a packet without one is not limited."""

    limit: ir.Limit
    table: FlowTable
    buckets: dict[int, dict[Key, tuple[Bucket, float]]] = field(default_factory=dict)
    # By family: until then nothing in a full table can expire.
    _full_until: dict[int, float] = field(default_factory=dict)

    def over(self, packet: Packet, now: float) -> bool:
        """Is the flow's bucket out? A new flow that finds no room is not limited."""
        key = self.table.key(packet)
        if key is None:
            return False
        flow = self.table.flow
        family = packet.family if flow.by_address else 0
        held = self.buckets.setdefault(family, {})
        timeout = _FOR_EVER if flow.timeout is None else flow.timeout / 1000
        found = held.get(key)
        if found is None or now - found[1] >= timeout:
            held.pop(key, None)
            if len(held) >= flow.size:
                if now < self._full_until.get(family, 0.0):
                    return False
                for old in [k for k, (_, last) in held.items() if now - last >= timeout]:
                    del held[old]
                if len(held) >= flow.size:
                    self._full_until[family] = min(last for _, last in held.values()) + timeout
                    return False
            found = (new_bucket(self.limit), now)
        held[key] = (found[0], now)
        return found[0].over(packet.length, now)


def new_bucket(limit: ir.Limit) -> Bucket:
    return Bucket(limit.amount, limit.seconds, limit.in_bytes, limit.burst)


@dataclass
class SetTable:
    """The elements of a learned set, with the time when each leaves; addresses by family."""

    set: ir.LearnedSet
    elements: dict[int, dict[Hashable, float]] = field(default_factory=dict)
    unlearned: dict[str, int] = field(default_factory=dict)  # by policy
    # By family: until then nothing in a full set can expire.
    _full_until: dict[int, float] = field(default_factory=dict)

    def _held(self, value: Hashable) -> dict[Hashable, float]:
        return self.elements.setdefault(_family(value), {})

    def held(self, now: float) -> int:
        """How many elements there are."""
        return sum(end > now for part in self.elements.values() for end in part.values())

    def has(self, value: Hashable, now: float) -> bool:
        return self._held(value).get(value, 0.0) > now

    def add(self, value: Hashable, now: float, timeout: int | None, policy: str) -> bool:
        """Add or renew an element, for so many milliseconds; False if there is no room."""
        time = self.set.timeout if timeout is None else timeout
        family, held = _family(value), self._held(value)
        if not held.get(value, 0.0) > now:
            held.pop(value, None)
            if len(held) >= self.set.size and now >= self._full_until.get(family, 0.0):
                for old in [v for v, end in held.items() if end <= now]:
                    del held[old]
                self._full_until[family] = min(held.values(), default=0.0)
            if len(held) >= self.set.size:
                self.unlearned[policy] = self.unlearned.get(policy, 0) + 1
                return False
        end = held[value] = _FOR_EVER if time is None else now + time / 1000
        if family in self._full_until:
            self._full_until[family] = min(self._full_until[family], end)
        return True

    def remove(self, value: Hashable) -> None:
        self._held(value).pop(value, None)


def _family(value: Hashable) -> int:
    """The family of an address, 0 of other values."""
    return value[0] if isinstance(value, tuple) else 0
