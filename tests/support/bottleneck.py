"""A link whose bottleneck lies beyond us, as a fluid: a shaper, a bottleneck that moves, probes.

Time goes in milliseconds. What is offered goes through the shaper at the rate that is
controlled, into the bottleneck's queue. Twice a period a probe is sent through that queue; its
answer comes back later, with noise, or not at all. Rates are in bytes a second, times in
seconds, delays in milliseconds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from runtime.laws import Sample, Settings, State, begin, step

_TICK = 0.001
_PACKET = 1500
_TRIP = 0.02  # round trip without queues
_SILENT = 2.0  # seconds without an answer, after which nothing is known
_LATELY = 30.0  # the least round trip of so long is taken for the path's own


class Saturating:
    """As much as the shaper takes."""

    def offered(self, now: float, dropped: bool) -> float:
        return 1e12


@dataclass
class Share:
    """A share of what the shaper would take: a link that is hardly used."""

    rate: float

    def offered(self, now: float, dropped: bool) -> float:
        return self.rate


@dataclass
class Reno:
    """Flows of TCP as a fluid: a packet more each round trip, half after a loss."""

    flows: int = 4
    rate: float = 50_000.0
    lost: float = -1.0

    def offered(self, now: float, dropped: bool) -> float:
        if dropped and now - self.lost > 2 * _TRIP:
            # One of the flows loses, not all.
            self.rate *= 1 - 0.5 / self.flows
            self.lost = now
        self.rate += self.flows * _PACKET / _TRIP * _TICK / _TRIP * 0.2
        return self.rate


@dataclass
class Trace:
    """What came out, a point for each millisecond: (time, delay in ms, rate, carried, true rate)."""

    points: list[tuple[float, float, float, float, float]] = field(default_factory=list)
    decisions: list[tuple[float, str, str]] = field(default_factory=list)

    def within(self, begin: float, end: float) -> list[tuple[float, float, float, float, float]]:
        return [p for p in self.points if begin <= p[0] < end]

    def worst(self, begin: float, end: float) -> float:
        """The largest delay (ms)."""
        return max(p[1] for p in self.within(begin, end))

    def high(self, begin: float, end: float, share: float = 0.99) -> float:
        """The delay (ms) that is not exceeded in this share of the time."""
        delays = sorted(p[1] for p in self.within(begin, end))
        return delays[int(share * (len(delays) - 1))]

    def used(self, begin: float, end: float) -> float:
        """What was carried, as a share of what could have been."""
        part = self.within(begin, end)
        return sum(p[3] for p in part) / sum(p[4] for p in part)

    def rate(self, begin: float, end: float) -> float:
        """The mean rate of the shaper."""
        part = self.within(begin, end)
        return sum(p[2] for p in part) / len(part)

    def calm(self, after: float, limit: float) -> float:
        """From when on the delay stays within a limit for half a second."""
        since = after
        for now, delay, *_ in self.within(after, 1e9):
            if delay > limit:
                since = now + _TICK
            elif now - since >= 0.5:
                return since
        return 1e9


@dataclass
class Probes:
    """What a prober knows: the last answer, again and again until there is a newer one."""

    last: tuple[float, float] | None = None  # answered at, round trip
    waiting: list[tuple[float, float]] = field(default_factory=list)  # sent at, answered at
    trips: list[tuple[float, float]] = field(default_factory=list)

    def send(self, now: float, takes: float) -> None:
        self.waiting.append((now, now + takes))

    def sample(self, now: float) -> tuple[float | None, float]:
        """Milliseconds over the least round trip lately, and how old that is."""
        for sent, at in sorted(self.waiting, key=lambda one: one[1]):
            if at <= now and (sent, at) in self.waiting:
                self.last = at, at - sent
                self.trips.append(self.last)
                self.waiting = [one for one in self.waiting if one[0] > sent]
        self.trips = [one for one in self.trips if one[0] > now - _LATELY]
        if self.last is None or now - self.last[0] > _SILENT:
            return None, 0.0
        at, trip = self.last
        least = min((one[1] for one in self.trips), default=trip)
        return 1000 * (trip - least), now - at + trip


def run(
    settings: Settings, true_rate: Callable[[float], float], seconds: float, *,
    load: Saturating | Share | Reno | None = None, noise: float = 0.0, spikes: float = 0.0,
    lost: float = 0.0, silent: tuple[float, float] = (0.0, 0.0), buffer: float = 2.0,
    trip: float = 0.02, seed: int = 1, state: State | None = None,
) -> Trace:  # fmt: skip
    """Lets a controller steer the shaper's rate.

    `noise` is the probes' (ms, at most, each way evenly), `spikes` the share of probes that are
    60 to 120 ms late for no reason, `lost` the share that never comes back; while `silent` none
    does. `trip` is the round trip without queues. `buffer` is the bottleneck's, in seconds of its first rate.
    """
    random, load = Random(seed), load or Saturating()
    state = state or begin(settings)
    rate, shaper, queue = state.written, 0.0, 0.0
    space, dropped, sent = buffer * true_rate(0.0), False, 0.0
    probes, trace, period = Probes(), Trace(), round(settings.period / _TICK)
    for tick in range(round(seconds / _TICK)):
        now = tick * _TICK
        carries = true_rate(now)
        if tick % period == 0 and tick:
            delay, age = probes.sample(now)
            state, decision = step(settings, state, Sample(delay, sent / settings.period, age), now)
            trace.decisions.append((now, decision.reason, decision.blocked))
            rate, sent = state.written, 0.0
        if tick % (period // 2) == 0:
            takes = trip + queue / carries + random.uniform(0, noise) / 1000
            if random.random() < spikes:
                takes += random.uniform(0.06, 0.12)
            gone = random.random() < lost or silent[0] <= now < silent[1]
            probes.send(now, 1e9 if gone else takes)
        wanted = load.offered(now, dropped)
        shaper = min(shaper + wanted * _TICK, 0.1 * rate + rate * _TICK)
        dropped = shaper >= 0.1 * rate
        out = min(shaper, rate * _TICK)
        shaper -= out
        sent += out
        queue += out
        carried = min(queue, carries * _TICK)
        queue -= carried
        if queue > space:
            queue, dropped = space, True
        trace.points.append((now, 1000 * queue / carries, rate, carried / _TICK, carries))
    return trace
