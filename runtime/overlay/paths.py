"""How a path does, by the answers to its probes, and which of several is taken: pure.

**Out and back.** A path is out when `k` of its last `n` answers are missing (at least two, so
never for one). It is back after `n - k + 1` answers in a row, at least two: then `k` of the last
`n` cannot be missing. A path that goes out again soon after needs twice as many each time, so
that one that comes and goes is not used.

**Round-trip times.** The raw one is the median of the last seven: one late answer does not move
it. The smoothed one is the mean of the first `1 / _GAIN` and then their exponentially weighted
average (RFC 6298, 2, with a smaller gain, as much more is decided here than a timer). A sample
after a longer time than a period weighs more, up to an eighth. Both begin anew when a path is back.

**Loss** is counted over the last 128 probes, the raw one over the last 32, while the path is not
out. A few lost packets say little, so what is held against the chosen path is what it loses at the
least, and against another path what it may lose at the most (the ends of Wilson's interval,
1927). Loss under 2 % makes no difference, as in RON's choice by throughput.

**Cost.** By `rtt`: the round-trip time plus a millisecond, under which differences are the
machines' own. By `loss`: the loss. By `both`: time × √loss, which is what a TCP connection's
rate is inversely proportional to (Mathis et al., 1997), as in RON's choice by throughput.

**The choice** moves when another path is better by the margin both in the raw and in the smoothed
measure (as in babeld), and both have just answered, not before the hold-down is over; at once if
the chosen path is out. The direct path, which costs no neighbour anything, is taken back when it
looks no worse. If all fall silent, the choice stays: most likely only the far side's runtime
ended, and its data path works. So whoever takes over from a silent path must have answered a
probe sent well into the silence, and the silent one must have missed the last two.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Final

from itmlang.overlays import DIRECT, Overlay

UNKNOWN: Final = "unknown"  # nothing was answered yet
WORKING: Final = "working"
OUT: Final = "out"
SUSPECT: Final = "suspect"  # working, by its probes; but packets do not come back

_GAIN: Final = 1 / 32
_LARGEST_GAIN: Final = 1 / 8
_RAW: Final = 7  # round-trip times whose median is the raw one
_LONG, _SHORT = 128, 32  # probes over which loss is counted
_AT_LEAST, _AT_MOST = (1.0, 4.0), (0.0, -1.5)  # raw and smoothed: standard deviations
_ABOUT: Final = (0.0, 0.0)
_NO_LOSS: Final = 0.02  # less is the same
_NO_TIME: Final = 0.001  # seconds
_KNOWN: Final = 5  # answers, before a path is compared by its measures
_MOST_NEEDED: Final = 64  # answers in a row, until a path is back
_SOON: Final = 512  # probes: going out again within so many is soon
_SUSPECTED: Final = 30.0  # seconds; then twice as long each time
_LONGEST_SUSPECTED: Final = 600.0


@dataclass(frozen=True)
class Rule:
    """How to choose: a measure of `itmlang.overlays.MEASURES`, a margin (0.1: ten percent
    better), a hold-down in seconds."""

    measure: str
    margin: float
    hold: float

    @classmethod
    def of(cls, overlay: Overlay) -> "Rule":
        return cls(overlay.measure, overlay.margin / 100, overlay.hold / 1000)


class Path:
    """A path to an egress. Times are seconds of one clock that never goes back.

    `state` is `UNKNOWN`, `WORKING` or `OUT`; see `shown` for `SUSPECT`. `answers` counts since
    it last came back. `every` is the period that it should be probed with.
    """

    __slots__ = (
        "_costs", "_doubted", "_every", "_loss", "_losses", "_measure", "_missing", "_needed", "_outs",
        "_probes", "_recent", "_row", "_suspicions", "_taken", "_times", "answers", "last", "lost",
        "raw", "smoothed", "state", "suspect",
    )  # fmt: skip

    def __init__(self, lost: tuple[int, int], measure: str, every: float) -> None:
        self.lost = (max(lost[0], 2), max(lost[1], 2))
        self.state = UNKNOWN
        self.raw: float | None = None  # seconds
        self.smoothed: float | None = None
        self.answers = 0
        self.last: float | None = None  # when the last answer came
        self.suspect = -math.inf  # until then
        self._measure, self._every = measure, every
        self._recent: deque[bool] = deque(maxlen=self.lost[1])
        self._times: deque[float] = deque(maxlen=_RAW)
        self._losses: deque[bool] = deque(maxlen=_LONG)
        self._loss = 0  # of these
        self._probes = 0  # since it is back
        self._row = 0  # answers in a row, while it is out
        self._needed = 0
        self._outs = 0
        self._missing = 0  # in a row
        self._taken = -math.inf  # when the last probe was sent that was answered,
        self._doubted = -math.inf  # and the second (or only) one of those missing in a row
        self._suspicions = 0
        self._costs: dict[tuple[float, float], tuple[float, float]] = {}

    def answered(self, sent: float, now: float, *, timed: bool = True) -> None:
        """The answer to a probe that was sent at that time has come; `timed`: just now."""
        self.last = now
        self._costs.clear()
        gap = sent - self._taken
        self._taken = max(self._taken, sent)
        self._missing = 0
        if self.state != WORKING:
            self._row += 1
            if self.state == OUT and self._row < self._needed:
                return
            self._begin()
        self._recent.append(True)
        self._count(lost=False)
        self.answers += 1
        if not timed:
            return
        time = now - sent
        self._times.append(time)
        self.raw = median(self._times)
        gain = max(min(_GAIN * gap / self._every, _LARGEST_GAIN), _GAIN, 1 / self.answers)
        self.smoothed = (
            time if self.smoothed is None else self.smoothed + gain * (time - self.smoothed)
        )

    def missed(self, sent: float) -> bool:
        """An answer did not come in time. Is the path out because of that?"""
        self._costs.clear()
        self._missing += 1
        if self._missing <= 2:
            self._doubted = sent
        self._row = 0
        if self.state == OUT:
            return False
        self._recent.append(False)
        self._count(lost=True)
        if self._recent.count(False) < self.lost[0]:
            return False
        self._out()
        return True

    def suspected(self, now: float) -> float:
        """Packets do not come back by it, though answers do. How long it is suspect from now."""
        if now > self.suspect + _LONGEST_SUSPECTED:
            self._suspicions = 0
        length = min(_SUSPECTED * 2.0**self._suspicions, _LONGEST_SUSPECTED)
        self._suspicions = min(self._suspicions + 1, 8)
        self.suspect = now + length
        return length

    def cleared(self) -> None:
        """It was not the path's fault."""
        self.suspect = -math.inf

    def shown(self, now: float) -> str:
        """Its state, with `SUSPECT`."""
        return SUSPECT if self.state == WORKING and now < self.suspect else self.state

    @property
    def loss(self) -> float | None:
        """The share of the last 128 probes that was lost while it was not out."""
        return self._loss / len(self._losses) if self._losses else None

    @property
    def young(self) -> bool:
        """Does it answer, but too few times yet to be compared?"""
        return self._row > 0 if self.state == OUT else 0 < self.answers < _KNOWN

    @property
    def missing(self) -> int:
        """Answers missing in a row."""
        return self._missing

    def takes_over_from(self, silent: "Path") -> bool:
        """Does it work where another one is silent, or were only all of them silent together?"""
        return silent._missing > 1 and self._taken >= silent._doubted

    def cost(self, sure: tuple[float, float] = _ABOUT) -> tuple[float, float]:
        """By the raw and by the smoothed measure; infinite if nothing is known.

        `sure` standard deviations less is taken for lost than is (below 0: more).
        """
        if sure not in self._costs:
            self._costs[sure] = self._cost(*sure)
        return self._costs[sure]

    def _cost(self, lately: float, long: float) -> tuple[float, float]:
        if self.raw is None or self.smoothed is None:
            return math.inf, math.inf
        raw, smoothed = self.raw + _NO_TIME, self.smoothed + _NO_TIME
        if self._measure == "rtt":
            return raw, smoothed
        count = len(self._losses)
        short = min(count, _SHORT)
        last = sum(self._losses[count - 1 - n] for n in range(short)) if self._loss else 0
        loss = _bound(last, short, lately), _bound(self._loss, count, long)
        low, high = (max(one, _NO_LOSS) for one in loss)
        if self._measure == "loss":
            return low, high
        return raw * math.sqrt(low), smoothed * math.sqrt(high)

    def _begin(self) -> None:
        self.state = WORKING
        self.raw = self.smoothed = None
        self.answers = 0
        self._recent.clear()
        self._times.clear()
        self._losses.clear()
        self._loss = self._probes = 0

    def _out(self) -> None:
        k, n = self.lost
        self._outs = min(self._outs + 1, 8) if self._probes < _SOON else 1
        self._needed = min(max(n - k + 1, 2) << (self._outs - 1), _MOST_NEEDED)
        self._row = 0
        self.state = OUT

    def _count(self, *, lost: bool) -> None:
        self._probes += 1
        if len(self._losses) == _LONG:
            self._loss -= self._losses[0]
        self._losses.append(lost)
        self._loss += lost


def better(paths: Mapping[int, Path], chosen: int, since: float, now: float, rule: Rule) -> int:
    """The neighbour by which packets should go instead of `chosen`, or that one itself.

    `paths` are the candidates, in the order in which they are preferred if all else is equal.
    `since` is when the choice last moved.
    """
    present = paths[chosen]
    state = present.shown(now)
    if state == UNKNOWN:  # it gets its time to answer, or to miss
        return chosen
    others = {via: path for via, path in paths.items() if via != chosen and path.state == WORKING}
    sound = {via: path for via, path in others.items() if now >= path.suspect}
    if state == OUT:
        proven = {v: p for v, p in others.items() if p.takes_over_from(present)}
        return _cheapest({v: p for v, p in proven.items() if v in sound} or proven, chosen)
    if state == SUSPECT:
        return _cheapest(sound, chosen)
    if now < since + rule.hold or present.answers < _KNOWN or present.missing:
        return chosen
    known = {v: p for v, p in sound.items() if p.answers >= _KNOWN and not p.missing}
    raw, smoothed = present.cost(_AT_LEAST)
    factor = 1 + rule.margin
    found = {}
    for via, path in known.items():
        its_raw, its_smoothed = path.cost(_AT_MOST)
        if its_raw * factor <= raw and its_smoothed * factor <= smoothed:
            found[via] = path
    if not found and (direct := known.get(DIRECT)) is not None:
        no_worse = zip(direct.cost(), present.cost(), strict=True)
        if all(its <= here for its, here in no_worse):
            return DIRECT
    return _cheapest(found, chosen)


def _cheapest(paths: Mapping[int, Path], otherwise: int) -> int:
    return min(paths, key=lambda via: paths[via].cost()[1], default=otherwise)


def _bound(lost: int, count: int, sure: float) -> float:
    """The share that is lost, an end of Wilson's interval: the lower one if `sure` is above 0."""
    share, square = lost / count, sure * sure
    center = share + square / (2 * count)
    half = sure * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    return max((center - half) / (1 + square / count), 0.0)
