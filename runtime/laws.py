"""Controllers as functions: (settings, state, sample, now) to (state, decision); no clock, no I/O.

A law says where the parameter should be. What all laws share is here, so that no law can
go without: bounds, a time between moves, samples that are missing, clocks that
jump, whole numbers that do not lose their fractions, and gains that swing. A controller starts
at the file's value; without a measure it goes back there.

A parameter that goes to and fro by more than a twentieth of its range, and no less each
time, has gains too high for what it controls: they are halved, again and again if need be,
and doubled after a calm that is longer each time. Additive increase saws by nature, and
gets more patience.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Final

from itmlang.laws import LARGEST, LAWS, complete, faults
from runtime import autorate
from runtime.handlers import HungError, described

_GAP: Final = 2.0  # periods: a longer time between two steps counts as this
_SMALL: Final = 0.001  # of the range: smaller moves wait until they add up
_SWING: Final = 0.05  # of the range: what is less is noise
_DECAY: Final = 0.8  # a swing of less than this share of the last one is dying out
_SWINGS: Final = 4  # in a row, until gains are halved
_WHOLE_CYCLE: Final = 30  # steps: a slower swing is none of the gains' doing
_SAW: Final = 2  # as much for a law that saws by nature
_CALM: Final = 100  # steps without a swing, until gains are doubled again; then four times more
_LONGEST_CALM: Final = 25_600
_LEAST_DAMPING: Final = 1 / 1024
_MOST_LOST: Final = 1_000_000  # as far as is counted

Show = Callable[[float], str]


@dataclass(frozen=True)
class Sample:
    """A measurement: `value` in the set-point's unit, None if there is none.

    For `autorate`, `value` is a queueing delay in milliseconds and `load` what the link sent
    since the last sample in bytes a second (None: unknown). `age` is how many seconds ago it was
    so: for a probe, how long ago it was sent.
    """

    value: float | None
    load: float | None = None
    age: float = 0.0


@dataclass(frozen=True)
class Situation:
    """What a user's function sees: it answers the parameter's new value, or None to leave it.

    `value` is the parameter's, `sample` the measure's; `elapsed` seconds have passed since
    the last call (at most twice the period), `now` is a clock that only goes forward.
    """

    value: float
    sample: Sample
    setpoint: float
    low: float
    high: float
    base: float
    period: float
    gains: Mapping[str, float]
    elapsed: float
    now: float


Function = Callable[[Situation], object]


@dataclass(frozen=True)
class Settings:
    """A controller as a policy describes it.

    `law` is a name of `itmlang.laws.LAWS`, `function` the user's own for "call". `base` is the
    file's value. `period` and `cooldown` are in seconds. `measure`, `unit` and `show` (of the
    parameter's values) are for reasons in words. Raises `ValueError` if they make no sense.
    """

    law: str
    setpoint: float
    low: float
    high: float
    base: float
    period: float
    gains: Mapping[str, float] = field(default_factory=dict)
    cooldown: float = 0.0
    integer: bool = False
    function: Function | None = None
    measure: str = "measure"
    unit: str = ""
    show: Show = "{:.6g}".format

    def __post_init__(self) -> None:
        numbers = (self.setpoint, self.low, self.high, self.base, self.period, self.cooldown)
        wrong = [text for _, text in faults(self.law, self.gains)]
        if not all(_sound(one) for one in (*numbers, *self.gains.values())):
            wrong.append("a number is not finite, or too large")
        elif not self.low <= self.base <= self.high:
            wrong.append("the file's value lies outside of the bounds")
        elif self.integer and math.ceil(self.low) > math.floor(self.high):
            wrong.append("no whole number lies within the bounds")
        elif self.period <= 0 or self.cooldown < 0:
            wrong.append("a period is more than nothing, a cooldown not less")
        if (self.law == "call") != (self.function is not None):
            wrong.append("the law `call` has a function, and no other has")
        if wrong:
            raise ValueError("; ".join(wrong))
        object.__setattr__(self, "gains", complete(self.law, self.gains))

    @property
    def safe(self) -> float:
        """The value without a measure."""
        return min(max(self.gains.get("safe", self.base), self.low), self.high)


@dataclass(frozen=True)
class Swings:
    """How a parameter went to and fro: up (1) or down (-1) to `extreme`, from `turn`.

    `size` is the last swing's, `count` how many in a row did not die out; `since` steps ago
    was the last turn.
    """

    way: int = 0
    extreme: float = 0.0
    turn: float = 0.0
    size: float = 0.0
    count: int = 0
    since: int = 0


@dataclass(frozen=True)
class State:
    """What a controller remembers. `value` is the parameter before rounding, `written` as it is.

    `memory` is the law's own: an integral, the way it is going, an estimate. At `seen` was the
    last step, at `moved` the last change; `lost` samples in a row are missing. Gains are taken
    times `damping`, which is raised after `calm` steps without swings.
    """

    value: float
    written: float
    memory: "float | autorate.Estimate | None" = None
    seen: float | None = None
    moved: float | None = None
    lost: int = 0
    damping: float = 1.0
    calm: int = _CALM
    swings: Swings = Swings()


@dataclass(frozen=True)
class Decision:
    """What comes of a step: `value` is to be written, None leaves the parameter as it is.

    `reason` says why in words, `blocked` what held a move back ("" if nothing did). `raw` is
    what the law asked for before bounds and all else, None if it was not asked.
    """

    value: float | None
    reason: str
    blocked: str = ""
    raw: float | None = None


@dataclass(frozen=True)
class _Wanted:
    """What a law says: the value, why, and its new memory."""

    value: float
    reason: str
    memory: "float | autorate.Estimate | None" = None
    blocked: str = ""
    free: bool = False  # of the cooldown: the law sees to it


def begin(settings: Settings, value: float | None = None) -> State:
    """A controller's first state: at the file's value, or at the one the parameter has now."""
    start = settings.base if value is None or not _sound(value) else value
    start = min(max(start, settings.low), settings.high)
    written = settings.base if value is None or not _sound(value) else value
    return State(start, written)


def step(settings: Settings, state: State, sample: Sample, now: float) -> tuple[State, Decision]:
    """One step of a controller, to be taken once a period; `now` in seconds of any clock.

    Raises `HungError` if that is raised while a function of the user's runs; nothing else.
    """
    if not _sound(now) or (state.seen is not None and now < state.seen):
        return _jumped(state, now), Decision(None, "the clock went back", "clock jumped")
    elapsed = settings.period if state.seen is None else now - state.seen
    state = replace(state, seen=now)
    if elapsed > _GAP * settings.period:
        elapsed = _GAP * settings.period
        if isinstance(state.memory, autorate.Estimate):  # what was sent meanwhile is not known
            state = replace(state, memory=autorate.Estimate(state.value))
    if sample.value is None or not _sound(sample.value) or _old(state, sample, now):
        state = replace(state, lost=min(state.lost + 1, _MOST_LOST))
        return _missing(settings, state, sample, elapsed)
    state = replace(state, lost=0)
    try:
        wanted = _LAWS[settings.law](settings, state, sample, elapsed)
    except _NonsenseError as error:
        return state, Decision(None, str(error), "no value")
    state = replace(state, memory=wanted.memory)
    return _move(settings, state, wanted, now)


def _move(settings: Settings, state: State, wanted: _Wanted, now: float) -> tuple[State, Decision]:
    """The parameter goes where it is wanted, if nothing stands against it."""
    value = min(max(wanted.value, settings.low), settings.high)
    blocked = wanted.blocked
    if not blocked and wanted.value <= settings.low and state.written <= _least(settings):
        blocked = "at its lowest"
    elif not blocked and wanted.value >= settings.high and state.written >= _most(settings):
        blocked = "at its highest"
    written = _rounded(settings, state.written, value)
    wait = 0.0 if state.moved is None else state.moved + settings.cooldown - now
    if written != state.written and wait > 0 and not wanted.free:
        reason = f"{wanted.reason}: would be {settings.show(written)}"
        return state, Decision(None, reason, f"cooldown for {wait:.3g} s", wanted.value)
    state, told = _damped(settings, replace(state, value=value))
    return _write(state, settings, written, wanted.reason, told, blocked, wanted.value, now)


def _write(
    state: State, settings: Settings, written: float, reason: str, told: str, blocked: str,
    raw: float | None, now: float,
) -> tuple[State, Decision]:  # fmt: skip
    change = written - state.written
    if not change:
        return state, Decision(None, reason + told, blocked, raw)
    reason += f": {'+' if change > 0 else '-'}{settings.show(abs(change))}{told}"
    return replace(state, written=written, moved=now), Decision(written, reason, blocked, raw)


def _missing(
    settings: Settings, state: State, sample: Sample, elapsed: float
) -> tuple[State, Decision]:
    """No sample: the parameter stays, and goes to the safe value if none comes for long."""
    now = state.seen
    assert now is not None
    value, reason, memory = state.value, "no sample", state.memory
    follows = LAWS[settings.law].load
    if state.lost >= settings.gains["lost"]:
        # A link: what may have been a queue until now is a dead sensor, so it need not stay
        # as low as it was backed off. But never above what it was found to carry.
        value = min(settings.safe, _estimate(state).capacity) if follows else settings.safe
        if not follows:
            memory = None
        elif state.lost >= 2 * settings.gains["lost"]:
            memory = autorate.Estimate(value, sent=_estimate(state).sent)
        reason = f"{state.lost} samples missing, the safe value"
    elif follows:
        memory, value = autorate.missing(
            _estimate(state), state.value, _load(sample), settings.gains, state.lost, now, elapsed
        )
        if value != state.value:
            reason = f"{state.lost} samples missing under load"
    value = min(max(value, settings.low), settings.high)
    written = _rounded(settings, state.written, value)
    state = replace(state, value=value, memory=memory)
    return _write(state, settings, written, reason, "", "no sample", None, now)


def _jumped(state: State, now: float) -> State:
    """Times of another clock mean nothing: the cooldown begins anew."""
    memory = None if isinstance(state.memory, autorate.Estimate) else state.memory
    if not _sound(now):
        return replace(state, memory=memory)
    return replace(state, memory=memory, seen=now, moved=None if state.moved is None else now)


def _damped(settings: Settings, state: State) -> tuple[State, str]:
    """The gains' share, from how the parameter swung; and what there is to tell."""
    if LAWS[settings.law].load:
        return state, ""
    saws = settings.law == "aimd"
    swings = _swung(state.swings, state.value, _SWING * (settings.high - settings.low), saws)
    state = replace(state, swings=swings)
    if swings.count >= _SWINGS and state.damping > _LEAST_DAMPING:
        state = replace(state, damping=state.damping / 2, swings=replace(swings, count=0))
        return state, f"; it swings: gains at 1/{round(1 / state.damping)}"
    if swings.since >= state.calm and state.damping < 1:
        calm = min(4 * state.calm, _LONGEST_CALM)
        swings = replace(swings, since=0)
        state = replace(state, damping=state.damping * 2, calm=calm, swings=swings)
        share = "full" if state.damping == 1 else f"1/{round(1 / state.damping)}"
        return state, f"; calm again: gains at {share}"
    return state, ""


def _swung(was: Swings, value: float, least: float, saws: bool) -> Swings:
    """The swings with one more value; turns back by less than `least` are none."""
    since = min(was.since + 1, _LONGEST_CALM)
    if was.way == 0:
        way = (value > was.extreme) - (value < was.extreme) if was.since else 0
        return Swings(way, value, value if not was.since else was.turn, since=since)
    if (value - was.extreme) * was.way >= 0:
        return replace(was, extreme=value, since=since)
    if abs(value - was.extreme) < max(least, 1e-12):
        return replace(was, since=since)
    size = abs(was.extreme - was.turn)
    lasting = size >= least and size >= _DECAY * was.size
    quick = since <= (_SAW if saws else _WHOLE_CYCLE)
    count = was.count + 1 if lasting and quick else 0
    return Swings(-was.way, value, was.extreme, size, count)


def _rounded(settings: Settings, written: float, value: float) -> float:
    """What is to be written for a value: whole if need be, what it is if that is near."""
    rounded = value
    if settings.integer:
        rounded = float(min(max(round(value), _least(settings)), _most(settings)))
    least = _SMALL * (settings.high - settings.low)
    ends = (_least(settings), _most(settings), settings.base)
    if abs(rounded - written) < least and rounded not in ends:
        inside = settings.low <= written <= settings.high
        return written if inside else rounded
    return rounded


def _least(settings: Settings) -> float:
    return math.ceil(settings.low) if settings.integer else settings.low


def _most(settings: Settings) -> float:
    return math.floor(settings.high) if settings.integer else settings.high


def _sound(number: float) -> bool:
    return math.isfinite(number) and abs(number) <= LARGEST


# The laws. Each is asked with a state whose `seen` is now.


class _NonsenseError(Exception):
    """A user's function raised, or answered what is no number; the message says which."""


def _value(sample: Sample) -> float:
    assert sample.value is not None
    return sample.value


def _error(settings: Settings, sample: Sample) -> tuple[float, str]:
    """How far the measure is under the set-point, and the same in words."""
    error = settings.setpoint - _value(sample)
    where = "under" if error > 0 else "over" if error < 0 else "at"
    unit = f" {settings.unit}" if settings.unit else ""
    return error, f"{settings.measure} {_value(sample):.4g} {where} {settings.setpoint:g}{unit}"


def _threshold(settings: Settings, state: State, sample: Sample, elapsed: float) -> _Wanted:
    """Sets off beyond the margin, and goes on until the set-point itself is reached."""
    error, reason = _error(settings, sample)
    sign = (error > 0) - (error < 0)
    way = state.memory if isinstance(state.memory, float) else 0.0
    if abs(error) > settings.gains["margin"]:
        way = float(sign)
    elif way != sign:
        way = 0.0
    value = state.value + way * settings.gains["step"] * state.damping
    return _Wanted(value, reason, way)


def _p(settings: Settings, state: State, sample: Sample, elapsed: float) -> _Wanted:
    """The damping makes it slow and leaves where it settles."""
    error, reason = _error(settings, sample)
    goal = settings.base + settings.gains["kp"] * error
    return _Wanted(state.value + state.damping * (goal - state.value), reason)


def _pi(settings: Settings, state: State, sample: Sample, elapsed: float) -> _Wanted:
    """The integral goes no further than what takes the parameter to its bound."""
    error, reason = _error(settings, sample)
    proportional = settings.gains["kp"] * state.damping * error
    more = settings.gains["ki"] * state.damping * error * elapsed
    before = state.memory if isinstance(state.memory, float) else state.value
    integral = before + more
    if more > 0:
        integral = min(integral, max(before, settings.high - proportional))
    elif more < 0:
        integral = max(integral, min(before, settings.low - proportional))
    return _Wanted(integral + proportional, reason, integral)


def _aimd(settings: Settings, state: State, sample: Sample, elapsed: float) -> _Wanted:
    error, reason = _error(settings, sample)
    if error >= 0:
        return _Wanted(state.value + settings.gains["add"] * state.damping, reason)
    share = 1 - (1 - settings.gains["factor"]) * state.damping
    return _Wanted(state.value * share, reason)


def _autorate(settings: Settings, state: State, sample: Sample, elapsed: float) -> _Wanted:
    """See `runtime/autorate.py`. It sees to the cooldown itself: that never holds a cut back."""
    assert state.seen is not None
    goal = autorate.Goal(settings.setpoint / 1000, settings.base, settings.cooldown, settings.gains)
    delay, age = _delay(sample)
    known, rate, why, blocked = autorate.follow(
        _estimate(state), goal, state.value, delay, _load(sample), age, state.seen, elapsed
    )
    known = replace(known, capacity=min(max(known.capacity, settings.low), settings.high))
    _, reason = _error(settings, sample)
    return _Wanted(rate, f"{reason}, {why}", known, blocked, free=True)


def _estimate(state: State) -> autorate.Estimate:
    known = state.memory
    return known if isinstance(known, autorate.Estimate) else autorate.Estimate(state.value)


def _delay(sample: Sample) -> tuple[float, float]:
    """In seconds, and how old it is."""
    return max(_value(sample), 0.0) / 1000, sample.age if _sound(sample.age) else 0.0


def _old(state: State, sample: Sample, now: float) -> bool:
    known = state.memory
    return isinstance(known, autorate.Estimate) and autorate.is_old(known, *_delay(sample), now)


def _load(sample: Sample) -> float | None:
    if sample.load is None or not _sound(sample.load):
        return None
    return max(sample.load, 0.0)


def _call(settings: Settings, state: State, sample: Sample, elapsed: float) -> _Wanted:
    assert settings.function is not None and state.seen is not None
    situation = Situation(
        state.value, sample, settings.setpoint, settings.low, settings.high, settings.base,
        settings.period, settings.gains, elapsed, state.seen,
    )  # fmt: skip
    try:
        answer = settings.function(situation)
        if answer is None:
            return _Wanted(state.value, "the function leaves it")
        if isinstance(answer, bool) or not isinstance(answer, Real) or not _sound(float(answer)):
            raise _NonsenseError(f"the function answered {answer!r:.60}, which is no value")
        asked = float(answer)
    except (_NonsenseError, HungError):  # it took too long: the caller knows what to do
        raise
    except BaseException as error:  # a guest: nothing of what it does may get out of here
        raise _NonsenseError(f"the function failed: {_described(error)}") from error
    _, reason = _error(settings, sample)
    value = state.value + state.damping * (asked - state.value)
    return _Wanted(value, f"{reason}, by the function")


def _described(error: BaseException) -> str:
    try:
        return described(error)[:200]
    except Exception:  # its own text fails
        return type(error).__name__


_LAWS: Final[Mapping[str, Callable[[Settings, State, Sample, float], _Wanted]]] = {
    "threshold": _threshold,
    "p": _p,
    "pi": _pi,
    "aimd": _aimd,
    "autorate": _autorate,
    "call": _call,
}
