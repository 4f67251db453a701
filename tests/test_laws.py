"""Controllers by simulation: plants that answer late, sensors that fail, clocks that jump."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from itmlang.laws import LARGEST, LAWS, complete, faults
from runtime.handlers import HungError
from runtime.laws import Decision, Sample, Settings, Situation, State, begin, step
from tests.support.bottleneck import Reno, Saturating, Share, Trace, run

MBIT = 125_000.0  # bytes a second


def make(law: str, gains: dict[str, float] | None = None, **more: Any) -> Settings:
    """A controller of a threshold of packets by a backlog."""
    values: dict[str, Any] = {
        "setpoint": 5.0, "low": 2.0, "high": 200.0, "base": 10.0, "period": 1.0,
        "measure": "backlog", "unit": "packets",
    }  # fmt: skip
    return Settings(law, gains=gains or {}, **{**values, **more})


def fed(
    one: Settings, values: list[float | None], state: State | None = None, begins: float = 0.0
) -> tuple[State, list[Decision]]:
    """The decisions on samples that come once a period."""
    state, decisions = state or begin(one), []
    for n, value in enumerate(values):
        state, decision = step(one, state, Sample(value), begins + n * one.period)
        decisions.append(decision)
    return state, decisions


def plant(
    one: Settings, steps: int, *, gain: float = 0.1, lag: float = 3.0, late: int = 2,
    offset: Callable[[int], float] = lambda n: 0.0,
) -> Iterator[tuple[float, float, Decision]]:  # fmt: skip
    """A first-order plant with dead time under control: (measure, parameter, decision) each step.

    It comes to `gain` times the parameter, plus an offset, with a lag and after `late` steps.
    """
    state = begin(one)
    waiting = deque([state.written] * (late + 1), late + 1)
    measured = gain * state.written + offset(0)
    for n in range(steps):
        state, decision = step(one, state, Sample(measured), n * one.period)
        waiting.append(state.written)
        measured += (gain * waiting[0] + offset(n) - measured) / lag
        yield measured, state.written, decision


def swing(values: list[float]) -> float:
    return max(values) - min(values)


# Laws.


def test_pi_settles_at_the_set_point_and_overshoots_little():
    out = [measured for measured, _, _ in plant(make("pi", {"kp": 5, "ki": 1.2}), 60)]
    assert out[0] < 1.1
    assert max(out) < 5 * 1.2
    assert all(abs(one - 5) < 0.1 for one in out[40:])


def test_pi_answers_a_disturbance():
    one = make("pi", {"kp": 5, "ki": 1.2})
    out = list(plant(one, 120, offset=lambda n: 0.0 if n < 60 else 3.0))
    assert max(measured for measured, _, _ in out[60:]) > 6
    assert all(abs(measured - 5) < 0.1 for measured, _, _ in out[100:])
    assert out[-1][1] == pytest.approx(20, abs=1)


def test_a_negative_gain_is_for_a_parameter_that_lowers_its_measure():
    one = make("pi", {"kp": -5, "ki": -1.2}, base=100.0)
    out = list(plant(one, 80, gain=-0.1, offset=lambda n: 15.0))
    assert out[-1][0] == pytest.approx(5, abs=0.1)


def test_pi_comes_back_from_its_bound_without_winding_up():
    """For a thousand steps it cannot reach the set-point; then it can."""
    one = make("pi", {"kp": 5, "ki": 1.2})
    out = list(plant(one, 1100, offset=lambda n: -30.0 if n < 1000 else 0.0))
    assert (out[999][1], out[999][2].blocked) == (200, "at its highest")
    # Without anti-windup the integral would be some 10 000 by now.
    assert all(abs(measured - 5) < 0.5 for measured, _, _ in out[1025:])


def test_p_stands_off_by_its_gain():
    out = list(plant(make("p", {"kp": 10.0}), 60))
    # y = 0.1 (10 + 10 (5 - y)): 3.
    assert out[-1][0] == pytest.approx(3, abs=0.01)


def test_the_threshold_law_sets_off_at_its_margin_and_goes_on_to_the_set_point():
    one = make("threshold", {"step": 4, "margin": 2})
    _, decisions = fed(one, [5, 6.9, 7.1, 6, 5.1, 4.9, 3.1, 2.9, 4, 5.1])
    written = [decision.value for decision in decisions]
    assert written == [None, None, 6, 2, None, None, None, 6, 10, None]
    assert decisions[2].reason == "backlog 7.1 over 5 packets: -4"
    assert decisions[4].blocked == "at its lowest"


def test_aimd_saws():
    """A queue that stands whenever the rate is over what the way takes."""
    one = make("aimd", {"add": 1, "factor": 0.5}, setpoint=1.0, low=1.0, high=50.0)
    state, rates = begin(one), []
    for n in range(100):
        state, _ = step(one, state, Sample(2.0 if state.written > 20 else 0.0), float(n))
        rates.append(state.written)
    peaks = [rate for rate, after in pairwise(rates) if after < rate]
    assert len(peaks) > 5
    assert all(20 < peak <= 21 for peak in peaks)
    assert all(after == pytest.approx(peak / 2) for peak, after in pairwise(rates) if after < peak)
    assert state.damping == 1


# What all laws share.


def test_whole_numbers_do_not_lose_their_fractions():
    one = make("threshold", {"step": 0.25}, integer=True)
    _, decisions = fed(one, [0.0] * 8)
    assert [d.value for d in decisions if d.value is not None] == [11, 12]


def test_whole_numbers_stay_within_bounds_that_are_none():
    one = make("p", {"kp": 100}, low=2.5, high=7.4, base=5.0, integer=True)
    _, decisions = fed(one, [-100.0, 100.0])
    assert [d.value for d in decisions] == [7, 3]


def test_small_moves_wait_until_they_add_up():
    one = make("threshold", {"step": 0.05})
    _, decisions = fed(one, [0.0] * 8)
    # A thousandth of the range is 0.198.
    assert [d.value for d in decisions if d.value] == [pytest.approx(10.2), pytest.approx(10.4)]


def test_bounds_are_told():
    one = make("p", {"kp": 100})
    _, decisions = fed(one, [-100.0, -100.0, 100.0, 100.0])
    assert [d.value for d in decisions] == [200, None, 2, None]
    assert [d.blocked for d in decisions] == ["", "at its highest", "", "at its lowest"]
    assert decisions[0].raw == 10_510


def test_a_cooldown_holds_moves_and_tells_for_how_long():
    one = make("threshold", {"step": 5}, cooldown=3.0)
    _, decisions = fed(one, [0.0] * 5)
    assert [d.value for d in decisions] == [15, None, None, 20, None]
    assert [d.blocked for d in decisions] == [
        "",
        "cooldown for 2 s",
        "cooldown for 1 s",
        "",
        "cooldown for 2 s",
    ]
    assert decisions[1].reason == "backlog 0 under 5 packets: would be 20"


def test_lost_samples_hold_then_lead_to_the_safe_value():
    one = make("threshold", {"step": 5, "lost": 3})
    state, decisions = fed(one, [0.0, 0.0, None, math.nan, 0.0, None, None, None, None, 0.0])
    assert [d.value for d in decisions] == [15, 20, None, None, 25, None, None, 10, None, 15]
    assert {d.blocked for d in decisions[5:9]} == {"no sample"}
    assert decisions[7].reason == "3 samples missing, the safe value: -15"
    assert state.lost == 0


def test_the_safe_value_may_be_another_one():
    one = make("pi", {"kp": 1, "ki": 1, "lost": 1, "safe": 150})
    state, decisions = fed(one, [None])
    assert decisions[0].value == 150
    # From there it goes on without a jump: by its error alone.
    assert fed(one, [5.0], state, 1.0)[0].value == 150


def test_the_clock_may_jump_back():
    one = make("threshold", {"step": 5}, cooldown=3.0)
    state, _ = fed(one, [0.0], begins=1000.0)
    state, decisions = fed(one, [0.0] * 5, state, begins=3.0)
    assert decisions[0].blocked == "clock jumped"
    # It does not wait a thousand seconds for its cooldown to end.
    assert [d.value for d in decisions] == [None, None, None, 20, None]


def test_a_long_gap_is_integrated_for_two_periods():
    one = make("pi", {"kp": 0, "ki": 1})
    state, _ = fed(one, [4.0])
    assert state.value == 11
    assert step(one, state, Sample(4.0), 86_400.0)[0].value == 13


@pytest.mark.parametrize("now", [math.nan, math.inf, -math.inf])
def test_a_time_that_is_none_is_not_remembered(now):
    one = make("pi", {"kp": 1, "ki": 1})
    state, decision = step(one, fed(one, [4.0])[0], Sample(4.0), now)
    assert (state.seen, decision.blocked) == (0.0, "clock jumped")


@pytest.mark.parametrize("law, gains", [
    ("pi", {"kp": 60, "ki": 20}), ("p", {"kp": 300}), ("threshold", {"step": 60}),
])  # fmt: skip
def test_gains_that_swing_are_damped_and_told(law, gains):
    one = make(law, gains)
    out = list(plant(one, 2000))
    before, after = ([w for _, w, _ in part] for part in (out[5:20], out[-500:]))
    assert swing(before) > 100
    assert swing(after) < 0.25 * swing(before)
    told = [decision.reason for _, _, decision in out if "it swings" in decision.reason]
    assert "it swings: gains at 1/2" in told[0]


def test_gains_that_do_not_swing_are_left_alone():
    one = make("pi", {"kp": 5, "ki": 1.2})
    out = plant(one, 400, offset=lambda n: 3.0 * (n // 100 % 2))
    assert not [d.reason for _, _, d in out if "swings" in d.reason]


def test_swings_that_die_out_are_left_alone():
    one = make("call", function=lambda now: 100 + 90 * (-0.75) ** now.now)
    state, _ = fed(one, [5.0] * 20)
    assert state.damping == 1


def test_gains_come_back_after_a_calm():
    one = make("pi", {"kp": 5, "ki": 1.2})
    state = replace(begin(one), damping=0.25)
    state, decisions = fed(one, [5.0] * 600, state)
    assert state.damping == 1
    assert [d.reason.split("; ")[1] for d in decisions if "calm" in d.reason] == [
        "calm again: gains at 1/2", "calm again: gains at full",
    ]  # fmt: skip


def test_a_controller_goes_on_from_what_it_is_told():
    one = make("threshold", {"step": 5})
    assert fed(one, [0.0], begin(one, 50.0))[1][0].value == 55
    assert fed(one, [5.0], begin(one, 500.0))[1][0].value == 200


# Functions of the user's.


def test_a_users_function_sees_where_it_is():
    seen: list[Situation] = []

    def function(now: Situation) -> float:
        seen.append(now)
        return now.value * now.gains["by"]

    one = make("call", {"by": 1.5}, function=function)
    _, decisions = fed(one, [7.0, 7.0])
    assert [d.value for d in decisions] == [15, 22.5]
    assert (seen[1].value, seen[1].sample.value, seen[1].elapsed, seen[1].base) == (15, 7, 1, 10)
    assert decisions[0].reason == "backlog 7 over 5 packets, by the function: +5"


def fails(now: Situation) -> float:
    raise RuntimeError("no idea")


def leaves(now: Situation) -> float:
    raise SystemExit(3)


@pytest.mark.parametrize("function, told", [
    (fails, "the function failed: RuntimeError: no idea (test_laws.py:"),
    (leaves, "the function failed: SystemExit: 3 (test_laws.py:"),
    (lambda now: math.nan, "the function answered nan, which is no value"),
    (lambda now: -math.inf, "the function answered -inf, which is no value"),
    (lambda now: "12", "the function answered '12', which is no value"),
    (lambda now: True, "the function answered True, which is no value"),
    (lambda now: 10**400, "the function failed: OverflowError"),
])  # fmt: skip
def test_a_users_function_may_fail(function, told):
    one = make("call", function=function)
    state, (decision,) = fed(one, [7.0])
    assert decision.value is None
    assert decision.reason.startswith(told)
    assert decision.blocked == "no value"
    assert state.value == 10


def test_a_function_that_is_broken_off_is_the_callers_to_tell():
    def hangs(now: Situation) -> float:
        raise HungError

    with pytest.raises(HungError):
        fed(make("call", function=hangs), [7.0])


def test_a_users_function_is_held_within_bounds_and_may_leave_it():
    answers = iter([1e9, None, -5])
    one = make("call", function=lambda now: next(answers))
    assert [d.value for d in fed(one, [7.0] * 3)[1]] == [200, None, 2]


# What makes no sense.


@pytest.mark.parametrize("law, gains, told", [
    ("pi", {"kp": 1}, "pi needs ki: parameter for each unit of error, a second"),
    ("pi", {"kp": 1, "ki": 1, "kd": 1}, "pi has no gain kd: it has kp, ki, lost, safe"),
    ("aimd", {"add": 1, "factor": 2}, "factor lies between 0 and 1"),
    ("aimd", {"add": math.nan}, "add lies between 0 and 1e+12"),
    ("p", {"kp": 1, "lost": 2.5}, "lost is a whole number"),
])  # fmt: skip
def test_wrong_gains(law, gains, told):
    assert [text for _, text in faults(law, gains)] == [told]
    with pytest.raises(ValueError, match=told.split(":")[0].replace("+", r"\+")):
        make(law, gains)


def test_each_laws_gains_have_defaults_within_their_limits():
    for name, law in LAWS.items():
        defaults = complete(name, {})
        assert not [fault for fault in faults(name, defaults) if fault[0]]
        assert set(defaults) | {n for n, g in law.gains.items() if g.default is None} == set(
            law.gains
        )


@pytest.mark.parametrize("wrong, told", [
    ({"base": 1.0}, "lies outside of the bounds"),
    ({"low": 9.1, "high": 9.9, "base": 9.5, "integer": True}, "no whole number"),
    ({"period": 0.0}, "a period is more"),
    ({"setpoint": math.inf}, "not finite"),
    ({"function": fails}, "no other has"),
])  # fmt: skip
def test_wrong_settings(wrong, told):
    with pytest.raises(ValueError, match=told):
        make("p", {"kp": 1}, **wrong)


# A link whose true rate moves.


def link(period: float = 0.1, gains: dict[str, float] | None = None, **more: Any) -> Settings:
    return make(
        "autorate", gains, setpoint=15.0, low=MBIT, high=20 * MBIT, base=10 * MBIT, period=period,
        integer=True, measure="delay", unit="ms", **more,
    )  # fmt: skip


def moves(*rates: tuple[float, float]) -> Callable[[float], float]:
    """The true rate: (from, Mbit/s), …"""
    return lambda now: [rate for begins, rate in rates if begins <= now][-1] * MBIT


HALVED = moves((0, 10), (10, 5))
SENSORS = {
    "exact": {}, "noisy": {"noise": 5.0}, "losing": {"lost": 0.2},
    "both": {"noise": 5.0, "lost": 0.2}, "with spikes": {"noise": 3.0, "spikes": 0.03},
}  # fmt: skip


@pytest.mark.parametrize("sensor", SENSORS)
@pytest.mark.parametrize("period", [0.05, 0.1])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_when_the_bottleneck_halves_the_delay_is_gone_within_a_second(sensor, period, seed):
    trace = run(link(period), HALVED, 20, seed=seed, **SENSORS[sensor])
    assert trace.worst(10, 11) > 75
    assert trace.calm(10, limit=30) < 11
    assert trace.used(11, 20) > 0.9
    assert trace.high(11, 20, share=0.95) < 30


def test_without_control_the_delay_stays():
    """So that the tests above can fail."""
    stiff = replace(link(), low=10 * MBIT)
    assert run(stiff, HALVED, 20).calm(10, limit=30) > 19


def test_flows_of_tcp_are_followed_as_well():
    trace = run(link(), HALVED, 30, load=Reno(), noise=3.0)
    assert trace.calm(10, limit=30) < 11
    assert trace.used(11, 30) > 0.9


@pytest.mark.parametrize("buffer", [0.05, 0.2])
def test_a_short_buffer_hides_how_much_too_much_is_sent(buffer):
    """Once it is full the delay grows no more, whatever is sent."""
    trace = run(link(), moves((0, 20), (10, 5)), 30, buffer=buffer, noise=3.0)
    assert trace.calm(10, limit=30) < 12.5
    assert trace.used(15, 30) > 0.9


def test_it_creeps_up_when_the_rate_returns():
    trace = run(link(), moves((0, 5), (10, 10)), 30, noise=3.0, lost=0.05)
    seconds = [trace.rate(n, n + 1) / MBIT for n in range(10, 16)]
    assert seconds[0] < 6.5 < 7 < seconds[1] < 9 < seconds[2]
    assert trace.used(14, 30) > 0.9
    assert trace.high(10, 30) < 30


def test_it_stays_within_its_bounds():
    trace = run(link(), moves((0, 40), (10, 0.5)), 20, noise=3.0, buffer=0.01)
    assert max(p[2] for p in trace.points) == 20 * MBIT
    assert trace.rate(9, 10) == 20 * MBIT
    assert min(p[2] for p in trace.points) == MBIT
    assert "at its highest" in {blocked for _, _, blocked in trace.decisions}


def test_an_idle_link_drifts_to_its_base():
    from_below = run(link(), moves((0, 4)), 60, load=Later(20), noise=3.0)
    assert from_below.rate(19, 20) < 5 * MBIT
    assert from_below.rate(59, 60) == pytest.approx(10 * MBIT, rel=0.1)
    assert from_below.worst(25, 60) < 1


class Later(Saturating):
    """As much as goes through, until a time; then nearly nothing."""

    def __init__(self, ends: float) -> None:
        self.ends = ends

    def offered(self, now: float, dropped: bool) -> float:
        return 1e12 if now < self.ends else 0.2 * MBIT


def test_delay_without_load_lowers_nothing_at_once():
    """Somebody else's queue, or a sensor's whim."""
    trace = run(link(), moves((0, 10)), 30, load=Share(0.5 * MBIT), spikes=0.1, seed=3)
    assert trace.rate(10, 30) > 8 * MBIT
    assert "delay without load" in " ".join(reason for _, reason, _ in trace.decisions)


def silent(rate: float) -> Trace:
    return run(link(), moves((0, rate)), 40, noise=3.0, silent=(15, 25))


def test_a_silent_sensor_leads_to_the_base_from_above():
    trace = silent(18)
    assert trace.rate(14, 15) > 16 * MBIT
    assert trace.rate(16, 25) == 10 * MBIT
    assert trace.rate(25.2, 25.5) < 12 * MBIT
    assert trace.rate(35, 40) > 16 * MBIT


def test_after_a_short_silence_it_goes_on_where_it_was():
    trace = run(link(), moves((0, 18)), 20, noise=3.0, silent=(15, 15.75))
    assert trace.rate(15.65, 15.8) == 10 * MBIT
    assert trace.rate(16.5, 17) > 16 * MBIT


def test_a_silent_sensor_never_raises_the_rate():
    trace = silent(5)
    before = trace.rate(14, 15)
    assert max(p[2] for p in trace.within(16, 25)) <= 1.05 * before
    assert trace.used(26, 40) > 0.9


def test_a_cooldown_holds_the_creep_but_no_cut():
    rates = moves((0, 10), (10, 5), (11, 10), (18, 5))
    trace = run(link(cooldown=5.0), rates, 25, noise=3.0)
    assert trace.calm(10, limit=30) < 11
    assert trace.rate(13, 14) < 5.3 * MBIT
    assert "cooldown" in " ".join(b for t, _, b in trace.decisions if 11 < t < 14)
    assert trace.rate(17, 18) > 6 * MBIT
    assert trace.calm(18, limit=30) < 19


def test_the_paths_own_round_trip_is_seen_again_and_again():
    """Who only sees a queue that always stands takes it for the path, and adds to it."""
    often, never = (
        run(link(gains={"empty": every}), moves((0, 10)), 150, noise=3.0) for every in (10, 1e9)
    )
    assert often.high(120, 150) < 30 < never.high(120, 150)
    assert often.used(5, 150) > 0.99


def test_without_a_load_it_still_follows():
    one, state = link(), begin(link())
    for n, delay in enumerate([0, 0, 50, 100, 150, 200]):
        state, _ = step(one, state, Sample(float(delay)), n / 10)
    assert state.written < 5 * MBIT


def sampled(delays: list[float], load: float | None = None) -> list[float]:
    """The rates after delays (ms) of probes that come back at once; a saturated link by default."""
    one, rates = link(), []
    state = begin(one)
    for n, delay in enumerate(delays):
        sample = Sample(delay, state.written if load is None else load)
        state, _ = step(one, state, sample, n / 10)
        rates.append(state.written / MBIT)
    return rates


def test_a_delay_that_the_next_probe_does_not_confirm_was_none():
    rates = sampled([15, 15, 15, 90, 15, 15])
    assert rates[3] < 5
    assert rates[5] > 9.5


def test_a_probe_upwards_is_a_small_step():
    assert sampled([0.0])[0] == pytest.approx(10.5)


def test_two_such_delays_in_a_row_do_not_raise_the_rate():
    assert max(sampled([15, 16, 120, 60, 15, 15])) < 11


def test_a_queue_of_a_link_that_is_hardly_used_lowers_it_by_half_at_most():
    rates = sampled([60.0] * 3 + [0.0] * 5, 0.5 * MBIT)
    assert rates[1] > 9.9
    assert 4.9 < rates[-1] < 9


def test_the_drain_leaves_a_share():
    trace = run(link(gains={"drain": 0.8}), HALVED, 20)
    assert min(p[2] for p in trace.within(10, 20)) > 0.8 * 4.5 * MBIT


# Whatever comes.

NUMBERS = st.floats() | st.sampled_from([0.0, 1e300, -1e300, 1e15, 5e-324])
SAMPLES = st.builds(
    Sample,
    st.none() | NUMBERS | st.floats(0, 50),
    st.none() | NUMBERS | st.floats(0, 1e7),
    NUMBERS | st.floats(0, 1),
)
GAINS = {
    "threshold": ["step", "margin"], "p": ["kp"], "pi": ["kp", "ki"], "aimd": ["add", "factor"],
    "autorate": ["rise", "drift", "busy", "drain", "horizon", "empty"], "call": [],
}  # fmt: skip


@st.composite
def controllers(draw: st.DrawFn) -> Settings:
    law = draw(st.sampled_from(sorted(LAWS)))
    gains = {
        name: draw(st.floats(LAWS[law].gains[name].low, LAWS[law].gains[name].high))
        for name in GAINS[law]
    }
    gains["lost"] = draw(st.integers(1, 4))
    low, base, high = sorted(draw(st.floats(-LARGEST, LARGEST) | st.floats(0, 100)) for _ in "123")
    whole = draw(st.booleans()) and math.ceil(low) <= math.floor(high)
    answers = draw(st.lists(NUMBERS, min_size=1))
    return Settings(
        law, draw(st.floats(-1e12, 1e12)), low, high, base,
        draw(st.floats(0.01, 1e6)), gains, draw(st.floats(0, 100)), whole,
        (lambda now: answers[int(now.now) % len(answers)]) if law == "call" else None,
    )  # fmt: skip


@limits(deadline=None)
@given(controllers(), st.lists(st.tuples(SAMPLES, NUMBERS | st.floats(0, 100)), max_size=80))
def test_whatever_comes_the_value_stays_within_bounds(one, events):
    state, now = begin(one), 0.0
    for n, (sample, jump) in enumerate(events):
        now = jump if n % 5 == 4 else now + abs(jump) if jump < 1e6 else now + one.period
        state, decision = step(one, state, sample, now)
        assert one.low <= state.value <= one.high
        assert decision.value is None or decision.value == state.written
        if state.written != one.base:
            assert one.low <= state.written <= one.high
            assert not one.integer or state.written == round(state.written)
        assert decision.reason
        assert len(repr(state)) < 8000
        assert "nan" not in repr(state).replace("seen=nan", "")
