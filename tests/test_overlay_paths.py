"""A path by its answers, and the choice among several."""

from collections.abc import Iterable
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.overlay.paths import OUT, SUSPECT, UNKNOWN, WORKING, Path, Rule, better
from runtime.overlay.progress import Progress

PERIOD = 0.2
TIMEOUT = 0.2
RULE = Rule("rtt", 0.1, 1.0)
NEVER = -1e9  # the choice has not moved


def path(lost: tuple[int, int] = (3, 4), measure: str = "rtt") -> Path:
    return Path(lost, measure, PERIOD)


class Probed:
    """Paths that are probed at the same times: `probe` by round-trip times, None is missing."""

    def __init__(self, *names: int, measure: str = "rtt", lost: tuple[int, int] = (3, 4)) -> None:
        self.paths = {name: path(lost, measure) for name in names}
        self.now = 100.0

    def probe(self, times: dict[int, float | None], count: int = 1) -> None:
        for _ in range(count):
            for name, time in times.items():
                if time is None:
                    self.paths[name].missed(self.now)
                else:
                    self.paths[name].answered(self.now, self.now + time)
            self.now += PERIOD

    def better(self, chosen: int, since: float = NEVER, rule: Rule = RULE) -> int:
        return better(self.paths, chosen, since, self.now, rule)


def states(one: Path, answers: Iterable[bool]) -> list[str]:
    found = []
    for n, there in enumerate(answers):
        if there:
            one.answered(n * PERIOD, n * PERIOD + 0.01)
        else:
            one.missed(n * PERIOD)
        found.append(one.state)
    return found


# Out and back.


@pytest.mark.parametrize("lost", [(3, 4), (2, 3), (2, 2), (4, 4), (5, 64), (1, 1), (1, 4)])
def test_a_path_is_out_after_k_of_n_and_never_after_one(lost: tuple[int, int]) -> None:
    k = max(lost[0], 2)
    assert states(path(lost), [True] * 5 + [False] * k) == [WORKING] * (4 + k) + [OUT]


def test_missing_ones_need_not_follow_each_other() -> None:
    assert states(path(), [True, False, True, False, False])[-1] == OUT
    assert states(path(), [True, False, False, True, True, False, False])[-1] == WORKING


def test_a_path_that_never_answers_is_out_and_one_answer_makes_it_known() -> None:
    assert states(path(), [False] * 3) == [UNKNOWN, UNKNOWN, OUT]
    assert states(path(), [False, True]) == [UNKNOWN, WORKING]


@pytest.mark.parametrize(("lost", "needed"), [((3, 4), 2), ((2, 4), 3), ((2, 2), 2), ((2, 10), 9)])
def test_it_is_back_when_k_of_n_can_no_longer_be_missing(
    lost: tuple[int, int], needed: int
) -> None:
    found = states(path(lost), [True, *[False] * lost[0], *[True] * needed])
    assert found[-needed:] == [OUT] * (needed - 1) + [WORKING]


def test_what_was_missing_before_it_is_back_does_not_count() -> None:
    one = path((3, 4))
    states(one, [True, False, False, False, True, True])
    one.missed(10.0)
    one.missed(10.2)
    assert one.state == WORKING


def test_a_path_that_comes_and_goes_stays_out_longer_each_time() -> None:
    one, needed = path(), []
    states(one, [True])
    for _ in range(5):
        states(one, [False] * 3)
        count = 0
        while one.state == OUT:
            states(one, [True])
            count += 1
        needed.append(count)
    assert all(later == 2 * earlier for earlier, later in pairwise(needed))
    states(one, [True] * 600 + [False] * 3)  # a long calm: all is forgiven
    assert states(one, [True, True])[-1] == WORKING


# Measures.


def test_the_raw_time_is_not_moved_by_single_late_answers() -> None:
    both = Probed(1)
    both.probe({1: 0.01}, 20)
    both.probe({1: 0.19})
    both.probe({1: 0.18})
    assert both.paths[1].raw == pytest.approx(0.01)
    assert both.paths[1].smoothed == pytest.approx(0.01 + 0.35 / 22, rel=0.1)


def test_the_smoothed_time_begins_as_a_mean_and_goes_where_the_time_goes() -> None:
    one = Probed(1)
    for time in (0.01, 0.02, 0.03):
        one.probe({1: time})
    assert one.paths[1].smoothed == pytest.approx(0.02)
    one.probe({1: 0.05}, 300)
    assert one.paths[1].smoothed == pytest.approx(0.05, rel=0.01)


def test_rare_samples_weigh_more_but_not_all() -> None:
    """Else a path that is rarely probed would be known for what it was long ago."""
    often, seldom = path(), path()
    for one, period in ((often, PERIOD), (seldom, 20 * PERIOD)):
        for n in range(60):
            one.answered(n * period, n * period + (0.01 if n < 50 else 0.03))
    assert often.smoothed == pytest.approx(0.01 + 0.02 * (1 - (31 / 32) ** 10), rel=0.02)
    assert seldom.smoothed == pytest.approx(0.01 + 0.02 * (1 - (7 / 8) ** 10), rel=0.02)


def test_measures_begin_anew_after_an_outage() -> None:
    one = Probed(1)
    one.probe({1: 0.01}, 50)
    one.probe({1: None}, 4)
    one.probe({1: 0.1}, 2)
    assert one.paths[1].smoothed == pytest.approx(0.1)
    assert one.paths[1].loss == 0


def test_loss_is_a_share_of_the_last_probes() -> None:
    one = Probed(1)
    assert one.paths[1].loss is None
    for n in range(200):
        one.probe({1: None if n % 4 == 0 else 0.01})
    assert one.paths[1].loss == pytest.approx(0.25)


# The choice.


def test_the_direct_path_is_taken_as_long_as_nothing_is_known() -> None:
    one = Probed(0, 1, 2)
    assert one.better(0) == 0
    one.probe({1: 0.01, 2: 0.02}, 10)
    assert one.better(0) == 0  # it may yet answer
    one.probe({0: None, 1: 0.01, 2: 0.02}, 3)
    assert one.better(0) == 1


def test_equal_paths_are_a_tie() -> None:
    one = Probed(0, 1, 2)
    one.probe({0: 0.02, 1: 0.02, 2: 0.02}, 50)
    assert one.better(0) == 0
    assert one.better(2) == 0  # and the direct one costs no neighbour anything


def test_a_move_needs_the_margin() -> None:
    one = Probed(0, 1)
    one.probe({0: 0.100, 1: 0.0925}, 200)
    assert one.better(0) == 0
    one.probe({0: 0.100, 1: 0.089}, 400)
    assert one.better(0) == 1


def test_a_move_needs_both_measures() -> None:
    one = Probed(0, 1)
    one.probe({0: 0.02, 1: 0.06}, 200)
    one.probe({0: 0.06, 1: 0.02}, 4)  # raw: 1 is better; smoothed: not yet
    assert one.paths[1].raw == pytest.approx(0.02) and one.better(0) == 0
    one.probe({0: 0.06, 1: 0.02}, 60)
    assert one.better(0) == 1
    one.probe({0: 0.01, 1: 0.02}, 4)  # and now the other way around
    assert one.better(0) == 0


def test_a_millisecond_makes_no_difference() -> None:
    one = Probed(0, 1)
    one.probe({0: 0.0003, 1: 0.0002}, 100)
    assert one.better(0) == 0


def test_hold_down_keeps_the_choice_but_not_on_a_dead_path() -> None:
    one = Probed(0, 1)
    one.probe({0: 0.1, 1: 0.01}, 20)
    assert one.better(0, since=one.now - 0.9) == 0
    assert one.better(0, since=one.now - 1.1) == 1
    one.probe({0: None, 1: 0.01}, 3)
    assert one.better(0, since=one.now) == 1


def test_the_best_of_several_is_taken_from_a_dead_path() -> None:
    one = Probed(0, 1, 2, 3)
    one.probe({0: 0.01, 1: 0.05, 2: 0.03, 3: 0.04}, 20)
    one.probe({0: None, 1: 0.05, 2: None, 3: 0.04}, 3)
    assert one.better(0) == 3


def test_when_all_fall_silent_the_choice_stays_whoever_is_missed_first() -> None:
    for chosen in (0, 1, 2):
        one = Probed(0, 1, 2)
        one.probe({0: 0.02, 1: 0.02, 2: 0.02}, 20)
        # The far side stops: some still answered what was sent last, others did not.
        one.probe({name: None if name == chosen else 0.02 for name in one.paths})
        for _ in range(10):
            for name in (chosen, *(n for n in one.paths if n != chosen)):
                one.paths[name].missed(one.now)
                assert one.better(chosen) == chosen
            one.now += PERIOD


def test_when_all_come_back_the_choice_stays_whoever_is_back_first() -> None:
    one = Probed(0, 1)
    one.probe({0: 0.02, 1: 0.02}, 20)
    one.probe({0: None, 1: None}, 10)
    for _ in range(4):
        one.paths[1].answered(one.now, one.now + 0.02)
        assert one.better(0) == 0
        one.paths[0].answered(one.now + 0.1, one.now + 0.12)
        assert one.better(0) == 0
        one.now += PERIOD


def test_when_all_were_silent_the_one_that_comes_back_is_taken() -> None:
    one = Probed(0, 1)
    one.probe({0: 0.02, 1: 0.02}, 20)
    one.probe({0: None, 1: None}, 10)
    one.probe({0: None, 1: 0.02}, 2)
    assert one.better(0) == 1


def test_suspect_paths_are_left_and_not_taken() -> None:
    one = Probed(0, 1, 2)
    one.probe({0: 0.01, 1: 0.02, 2: 0.03}, 20)
    one.paths[0].suspected(one.now)
    assert one.paths[0].shown(one.now) == SUSPECT
    assert one.better(0, since=one.now) == 1
    one.paths[1].suspected(one.now)
    assert one.better(0) == 2
    one.paths[2].suspected(one.now)
    assert one.better(0) == 0
    one.probe({0: None, 1: 0.02, 2: 0.03}, 3)
    assert one.better(0) == 1  # suspect, but this one is dead


def test_suspicions_last_longer_each_time_and_end() -> None:
    one = path()
    states(one, [True])
    lengths = [one.suspected(1000.0) for _ in range(8)]
    assert lengths == [30, 60, 120, 240, 480, 600, 600, 600]
    assert one.shown(1600.1) == WORKING
    assert one.suspected(1600.0 + 601) == 30  # it was well for long


# Loss.


@pytest.mark.parametrize("measure", ["loss", "both"])
def test_a_lossy_path_is_left_for_a_sound_one(measure: str) -> None:
    rule, random = Rule(measure, 0.1, 0.0), Random(1)
    one = Probed(0, 1, measure=measure, lost=(8, 8))
    for _ in range(200):
        one.probe({0: None if random.random() < 0.15 else 0.02, 1: 0.02})
    assert one.better(0, rule=rule) == 1
    assert one.better(1, rule=rule) == 1


def test_by_time_alone_loss_counts_for_nothing() -> None:
    one, random = Probed(0, 1, lost=(8, 8)), Random(1)
    for _ in range(200):
        one.probe({0: None if random.random() < 0.15 else 0.02, 1: 0.02})
    assert one.better(0) == 0


@pytest.mark.parametrize("measure", ["loss", "both"])
def test_a_few_lost_packets_are_nothing(measure: str) -> None:
    rule = Rule(measure, 0.1, 0.0)
    one = Probed(0, 1, measure=measure)
    one.probe({0: None, 1: 0.02})
    one.probe({0: 0.02, 1: 0.02}, 6)
    one.probe({0: None, 1: 0.02})
    one.probe({0: 0.02, 1: 0.02}, 6)
    assert one.better(0, rule=rule) == 0


def test_both_weighs_time_against_loss() -> None:
    rule = Rule("both", 0.1, 0.0)
    for slower, expected in ((0.03, 1), (0.2, 0)):
        one, random = Probed(0, 1, measure="both", lost=(8, 8)), Random(2)
        for _ in range(300):
            one.probe({0: None if random.random() < 0.2 else 0.02, 1: slower})
        assert one.better(0, rule=rule) == expected


# Whatever happens, the rules hold.


@settings(deadline=None)
@given(
    st.sampled_from(("rtt", "loss", "both")),
    st.lists(st.tuples(*[st.sampled_from((None, 0.001, 0.01, 0.02, 0.15))] * 3), max_size=80),
)
def test_the_choice_never_goes_to_what_does_not_work(
    measure: str, rounds: list[tuple[float | None, float | None, float | None]]
) -> None:
    one = Probed(0, 1, 2, measure=measure)
    chosen, moved, rule = 0, NEVER, Rule(measure, 0.1, 1.0)
    for times in rounds:
        one.probe(dict(zip((0, 1, 2), times, strict=True)))
        via = better(one.paths, chosen, moved, one.now, rule)
        if via == chosen:
            continue
        assert one.paths[via].state == WORKING
        assert one.paths[chosen].state == OUT or one.now >= moved + rule.hold
        chosen, moved = via, one.now


# What the data tells.


def looks(*counts: tuple[int, int], period: float = 0.5) -> tuple[Progress, float]:
    one, now = Progress(), 0.0
    for sent, returned in counts:
        now += period
        one.looked(sent, returned, now)
    return one, now


def test_packets_that_go_out_in_vain_are_noticed() -> None:
    one, now = looks((0, 0), (10, 8), (13, 8), (13, 8), (15, 8))
    assert one.stalled(now) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "counts",
    [
        ((0, 0), (10, 0), (20, 0), (30, 0)),  # nothing ever came back: another way, or nobody
        ((0, 0), (10, 8), (12, 8), (12, 8)),  # two packets are nothing
        ((0, 0), (10, 8), (20, 9), (30, 10)),  # some come back
        ((0, 0), (10, 8), (10, 8), (10, 8)),  # idle
        ((50, 40), (60, 48), (3, 2), (3, 2)),  # the counters began anew
        ((0, 0), (10, 8), (20, 8), (21, 9)),  # and now they do
    ],
)
def test_nothing_is_made_of_less(counts: tuple[tuple[int, int], ...]) -> None:
    one, now = looks(*counts)
    assert one.stalled(now) == 0


def test_after_a_change_the_count_begins_anew() -> None:
    one, now = looks((0, 0), (10, 8), (20, 8), (25, 8))
    assert one.stalled(now) > 0
    one.again()
    assert one.stalled(now) == 0
    one.looked(27, 8, now + 0.5)
    assert one.stalled(now + 5) == 0  # two
    one.looked(28, 8, now + 1)
    assert one.stalled(now + 1) == pytest.approx(0.5)
