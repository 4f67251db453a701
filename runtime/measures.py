"""Measures: what controllers look at, asked of the kernel.

Nothing is reset by asking, and nothing waits: counters are read, of which rates are the
differences; a queue's backlog is the mean of several looks in a period; round trips are of
probes that go out by themselves. What cannot be had is None, and a counter that began again
gives no rate that once.
"""

from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

from itmlang.control import Measure
from itmlang.links import Link
from itmlang.nft.model import Table
from runtime import links, nft
from runtime.errors import MachineError
from runtime.laws import Sample
from runtime.links import Counts
from runtime.probe import Prober

LOOKS: Final = 10  # at a queue in a period
SHORTEST_LOOK: Final = 0.02  # seconds between two
_STALE: Final = 0.005  # seconds for which what was read serves others, too
_COUNTED: Final = {"bytes/s": "bytes", "packets/s": "packets", "dropped/s": "drops"}
_WINDOW: Final = 5.0  # seconds over which a share is taken: of one second it is mostly noise
_CPU: Final = "/proc/stat"


class Machine:
    """What the kernel tells of a policy and its links, read once for all who ask together."""

    def __init__(self, table: Table, policy: str, named: Mapping[str, Link]) -> None:
        self._table, self._links = table, named
        self._counters = {
            c.of: c.name for c in table.counters if (c.policy, c.kind) == (policy, "class")
        }
        self._flows = {
            flow: [
                s.name for s in table.sets if (s.policy, s.role, s.flow) == (policy, "count", flow)
            ]
            for flow in {s.flow for s in table.sets if s.policy == policy}
        }
        self._counted: tuple[float, Mapping[str, tuple[int, int]]] = (-1.0, {})
        self._queued: tuple[float, Mapping[tuple[str, str], Mapping[str, Counts]]] = (-1.0, {})

    def counted(self, name: str, now: float) -> tuple[int, int] | None:
        """Packets and bytes of a class of the policy."""
        if now - self._counted[0] > _STALE:
            self._counted = now, nft.counters(self._table.path)
        return self._counted[1].get(self._counters.get(name, ""))

    def entries(self, flow: str) -> int:
        """How many flows are known."""
        return sum(len(nft.elements(self._table.path, one)) for one in self._flows.get(flow, ()))

    def queued(self, of: tuple[str, ...], now: float) -> list[Counts]:
        """What a (link, class) counts, or all of the link ("") at each of its interfaces."""
        link, name = of
        if now - self._queued[0] > _STALE:
            self._queued = now, links.stats(self._links.values())
        return [
            counts[name] for (one, _), counts in self._queued[1].items()
            if one == link and name in counts
        ]  # fmt: skip


class Meter:
    """One measure, sampled once a `period` (seconds). Raises `OSError` where probes cannot go."""

    def __init__(
        self, measure: Measure, machine: Machine, period: float, load: Link | None
    ) -> None:
        self._measure, self._machine, self._load = measure, machine, load
        self._before: dict[str, tuple[float, float]] = {}
        self._looks: list[float] = []
        self._sent: deque[tuple[float, int, int]] = deque()  # of a share: when, own, all bytes
        self._due = 0.0
        self._every = max(SHORTEST_LOOK, period / LOOKS)
        self.prober: Prober | None = None
        if measure.kind in ("rtt", "delay"):
            # Its own link's queues are not what is to be seen.
            interval = max(SHORTEST_LOOK, period / 2)
            self.prober = Prober(measure.of[0], interval, load.probe if load is not None else 0)

    def close(self) -> None:
        if self.prober is not None:
            self.prober.close()

    def tick(self, now: float) -> float:
        """Do what is due between two samples; when to be called again."""
        if self.prober is not None:
            return self.prober.tick(now)
        if self._measure.unit not in ("packets", "bytes") or self._measure.kind != "link":
            return now + 60.0
        if now >= self._due:
            self._due = now + self._every
            with suppress(MachineError):
                found = self._machine.queued(self._measure.of, now)
                if found:  # none while its interface is away
                    in_bytes = self._measure.unit == "bytes"
                    waits = sum(one.waiting_bytes if in_bytes else one.waiting for one in found)
                    self._looks.append(float(waits))
        return self._due

    def sample(self, now: float) -> Sample:
        """What is measured now. Raises `MachineError` if the kernel does not tell."""
        value, age = self._value(now)
        load = None
        if self._load is not None:
            found = self._machine.queued((self._load.name, ""), now)
            load = self._rate("load", sum(one.bytes for one in found) if found else None, now)
        return Sample(value, load, age)

    def _value(self, now: float) -> tuple[float | None, float]:
        measure, machine = self._measure, self._machine
        match measure.kind:
            case "class":
                counted = machine.counted(measure.of[0], now)
                which = 1 if measure.unit == "bytes/s" else 0
                return self._rate("class", None if counted is None else counted[which], now), 0.0
            case "flow":
                return float(machine.entries(measure.of[0])), 0.0
            case "link":
                return self._of_link(now), 0.0
            case "cpu":
                return self._busy(now), 0.0
        assert self.prober is not None
        found = self.prober.trip(now) if measure.kind == "rtt" else self.prober.delay(now)
        return (None, 0.0) if found is None else (found[0] * 1000, found[1])

    def _of_link(self, now: float) -> float | None:
        measure = self._measure
        if measure.unit in ("packets", "bytes"):
            self.tick(now)
            looks, self._looks = self._looks, []
            return sum(looks) / len(looks) if looks else None
        found = self._machine.queued(measure.of, now)
        if measure.unit == "%":
            return self._share(found, now)
        which = _COUNTED[measure.unit]
        return self._rate("link", sum(getattr(one, which) for one in found) if found else None, now)

    def _share(self, found: list[Counts], now: float) -> float | None:
        """Percent of the bytes that the link has sent of late; None if that is none."""
        link = self._machine.queued((self._measure.of[0], ""), now)
        if not found or not link:
            self._sent.clear()
            return None
        sent = now, sum(one.bytes for one in found), sum(one.bytes for one in link)
        if self._sent and (sent[1] < self._sent[-1][1] or sent[2] < self._sent[-1][2]):
            self._sent.clear()  # counted anew
        self._sent.append(sent)
        while len(self._sent) > 2 and self._sent[1][0] <= now - _WINDOW + _STALE:
            self._sent.popleft()
        _, own, all_ = self._sent[0]
        return 100.0 * (sent[1] - own) / (sent[2] - all_) if sent[2] > all_ else None

    def _rate(self, what: str, count: int | None, now: float) -> float | None:
        """The count's difference to the last one, a second."""
        before = self._before.get(what)
        if count is None:
            self._before.pop(what, None)
            return None
        self._before[what] = now, count
        if before is None or count < before[1] or now <= before[0]:
            return None
        return (count - before[1]) / (now - before[0])

    def _busy(self, now: float) -> float | None:
        """Percent of all processors' time (proc(5)) that was not idle."""
        try:
            with open(_CPU, encoding="ascii") as file:
                times = [int(word) for word in file.readline().split()[1:9]]
        except (OSError, ValueError):
            return None
        total, idle = sum(times), times[3] + times[4]
        was, self._before["cpu"] = self._before.get("cpu"), (float(total), float(idle))
        if was is None or total <= was[0]:
            return None
        return 100.0 * (1 - (idle - was[1]) / (total - was[0]))
