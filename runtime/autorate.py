"""A link's rate that follows a bottleneck behind it, by the delay and the load seen here: pure.

Whoever sends faster than the bottleneck carries makes a queue there that grows (in seconds)
by sent/carried - 1 each second. So two delays, and what was sent between their probes, tell
what the bottleneck carries: sent / (1 + growth). A probe sits in that queue itself: what it
tells is as old as it. What was sent since then is known, so the queue as it must be now is
worked out from it, and the rate is chosen so that the queue comes to the set-point within the
horizon: under what the bottleneck carries while there is too much of it, a little over when
there is too little. That is how the rate rises, too; what was carried without delay is
taken for granted, step by step. A delay that the next probe does not confirm was no queue.
Now and then the queue is emptied for a moment: whoever measures delays takes the least round
trip for the path's own, and must see it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

_PROBE: Final = 1.05  # at most this share of what is known to be carried
_QUEUED: Final = 0.33  # of the set-point: less may be noise, no queue
_TRUST: Final = 0.5  # of a new measurement that is near
_SHARP: Final = 2.0  # times the set-point: a delay that is more than noise
_CONFIRMING: Final = 0.5  # of what is expected next after a cut: less says it was wrong
_CONFIRMED: Final = 3  # samples over the set-point make a queue of a link that is hardly used
_BACK: Final = 0.7  # of the rate, for each sample that is missing, from the second on
_SAME: Final = 0.0001  # seconds between probes that are one
_TRAIL: Final = 40  # samples remembered

Trail = tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Estimate:
    """What is known of a bottleneck: what it carries (bytes a second), and from what.

    `trail` is what was sent: (from, to, bytes a second). The last probe was sent at
    `sent` and found `delay` seconds. `before` is what was known before the last cut, as
    long as it is not confirmed (else 0); at `cut` was the last sharp one. `over` samples in a row
    were over the set-point.
    """

    capacity: float
    trail: Trail = ()
    sent: float | None = None
    delay: float = 0.0
    before: float = 0.0
    cut: float | None = None
    over: int = 0
    emptied: float | None = None


@dataclass(frozen=True)
class Goal:
    """What is asked for: a delay (seconds), a rate for idle times, a cooldown, gains."""

    delay: float
    base: float
    cooldown: float
    gains: Mapping[str, float]


def follow(
    was: Estimate, goal: Goal, rate: float, delay: float, load: float | None, age: float,
    now: float, elapsed: float,
) -> tuple[Estimate, float, str, str]:  # fmt: skip
    """(what is known now, the rate, the reason, what held it).

    `delay` is the queue's in seconds, found by a probe sent `age` ago (0: its own delay ago).
    `load` is what was sent over the last `elapsed` seconds (None: unknown) while the rate was
    `rate`, both in bytes a second.
    """
    gains = goal.gains
    trail = _noted(was.trail, load, rate, now, elapsed)
    sent = now - max(age, delay)
    now_known = replace(was, trail=trail, sent=sent, delay=delay)
    if was.emptied is None or delay <= _QUEUED * goal.delay:
        now_known = replace(now_known, emptied=now)
    busy = load is not None and load >= gains["busy"] * rate
    carried = _carried(was, now_known, goal.delay)
    expected = _queue(was.capacity, now_known, was.delay, was.sent, sent)
    if was.before and delay < _CONFIRMING * expected:
        known = replace(now_known, capacity=was.before, before=0.0, over=0)
        why = "the last delay was no queue"
    elif delay > goal.delay:
        known, why = _cut(was, now_known, carried, goal.delay, busy, now)
    else:
        known, why = _raise(now_known, goal, carried, load, busy, elapsed)

    queue = _queue(known.capacity, known, delay, sent, now)
    share = 1 + (goal.delay - queue) / gains["horizon"]
    overdue = known.emptied is not None and now - known.emptied > gains["empty"]
    if busy and elapsed > 0 and overdue:
        share = min(share, 1 - (queue + _QUEUED * goal.delay) / elapsed)
        why = "shows what the path is without a queue"
    wanted = known.capacity * min(max(share, gains["drain"]), _PROBE)
    cooling = _cooling(known, goal, now)
    if cooling and wanted > known.capacity:
        return known, known.capacity, why, f"cooldown for {cooling:.3g} s"
    return known, wanted, why, ""


def is_old(was: Estimate, delay: float, age: float, now: float) -> bool:
    """Is it what the last probe told, or an earlier one? Then there is nothing new to know."""
    return was.sent is not None and now - max(age, delay) <= was.sent + _SAME


def missing(
    was: Estimate, rate: float, load: float | None, gains: Mapping[str, float], lost: int,
    now: float, elapsed: float,
) -> tuple[Estimate, float]:  # fmt: skip
    """What is known, and the rate, when a sample is missing for the `lost`th time in a row.

    Once is nothing. Twice, while the link is loaded, may be a queue that holds the answers.
    """
    known = replace(was, trail=_noted(was.trail, load, rate, now, elapsed))
    if lost < 2 or load is None or load < gains["busy"] * rate:
        return known, rate
    return known, _BACK * rate


def _noted(trail: Trail, load: float | None, rate: float, now: float, elapsed: float) -> Trail:
    if elapsed <= 0:
        return trail
    return (*trail, (now - elapsed, now, rate if load is None else load))[-_TRAIL:]


def _carried(was: Estimate, known: Estimate, setpoint: float) -> float | None:
    """What the bottleneck carried between the last two probes; None if that cannot be told."""
    least = _QUEUED * setpoint
    if was.sent is None or known.sent is None or known.sent <= was.sent or known.delay <= least:
        return None
    growth = (known.delay - was.delay) / (known.sent - was.sent)
    return _mean(known.trail, was.sent, known.sent) / max(1 + growth, 0.1)


def _cut(
    was: Estimate, known: Estimate, carried: float | None, setpoint: float, busy: bool, now: float
) -> tuple[Estimate, str]:
    """There is a queue: the bottleneck carries what it carried, and no more."""
    known = replace(known, over=was.over + 1, before=0.0)
    if not busy and known.over < _CONFIRMED:
        return known, "delay without load"
    if carried is None:
        return known, "a queue"
    if not busy:  # a path's own troubles; if it is a bottleneck, it is found by and by
        carried = max(carried, was.capacity * _TRUST)
    sharp = known.delay > _SHARP * setpoint and carried < was.capacity
    capacity = was.capacity + (1.0 if sharp else _TRUST) * (carried - was.capacity)
    known = replace(known, capacity=capacity)
    if not sharp:
        return known, "a queue"
    before = 0.0 if was.before else was.capacity
    return replace(known, before=before, cut=now), "a queue: the bottleneck carries less"


def _raise(
    known: Estimate, goal: Goal, carried: float | None, load: float | None, busy: bool,
    elapsed: float,
) -> tuple[Estimate, str]:  # fmt: skip
    """There is no queue to speak of: what was sent was carried."""
    known = replace(known, over=0, before=0.0)
    if busy and load is not None:
        most = known.capacity * (1 + goal.gains["rise"] * elapsed)
        return replace(known, capacity=min(max(known.capacity, carried or load), most)), "no queue"
    if load is None:
        return known, "no queue, load unknown"
    toward = min(goal.gains["drift"] * elapsed, 1.0)
    capacity = known.capacity + toward * (goal.base - known.capacity)
    return replace(known, capacity=capacity), "idle"


def _cooling(known: Estimate, goal: Goal, now: float) -> float:
    """Seconds until the rate may rise over what is known to be carried."""
    return 0.0 if known.cut is None else max(known.cut + goal.cooldown - now, 0.0)


def _mean(trail: Trail, begin: float, end: float) -> float:
    """What was sent between two times, in bytes a second; the trail's last if it has none."""
    parts = [(min(to, end) - max(since, begin), load) for since, to, load in trail]
    length = sum(part for part, _ in parts if part > 0)
    if length <= 0:
        return trail[-1][2] if trail else 0.0
    return sum(part * load for part, load in parts if part > 0) / length


def _queue(
    capacity: float, known: Estimate, queue: float, begin: float | None, end: float
) -> float:
    """The queue (seconds) at a time, from what it was earlier and what was sent since."""
    if begin is None or capacity <= 0:
        return queue
    for since, to, load in known.trail:
        length = min(to, end) - max(since, begin)
        if length > 0:
            queue = max(queue + (load / capacity - 1) * length, 0.0)
    return queue
