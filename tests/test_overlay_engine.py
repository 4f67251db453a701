"""Members at work, with simulated links between them; and what strangers send them."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itmlang.overlays import DIRECT
from runtime.overlay import wire
from runtime.overlay.engine import Effect, Engine, Forgotten, Learned, Move, Send
from tests.support.members import Members, behind, overlay

A, B, V, W, X = (0xC0000201 + n for n in range(5))
KEY = Members().key
PERIOD = 0.2
NOTHING = dict.fromkeys(
    ("forged", "replayed", "truncated", "malformed", "unexpected", "limited", "late"), 0
)


def four(seed: int = 0, **more: Any) -> Members:
    """A and B, and V and W between them; all links take 10 ms, the direct one 20."""
    net = Members(seed)
    for one, other in ((A, B), (A, V), (A, W), (V, B), (W, B), (V, W)):
        net.both(one, other)
    for link in net.both(A, B):
        link.delay = 0.02
    net.join(overlay(A, [V, W], [B], **more))
    net.join(overlay(B, [V, W], [A], **more))
    for between in (V, W):
        net.join(overlay(between, [A, B], []))
    return net


def cut(net: Members, one: int, other: int, *, up: bool = False) -> None:
    for link in net.both(one, other):
        link.up = up


def delays(net: Members, one: int, other: int, delay: float) -> None:
    for link in net.both(one, other):
        link.delay = delay


def moves(net: Members, member: int = A, since: float = 0.0) -> list[int]:
    """By which neighbours the member's choice went."""
    return [move.via for at, who, move in net.moves if who == member and at >= since]


def shown(net: Members, member: int = A) -> dict[str, Any]:
    status: dict[str, Any] = net.engines[member].status(net.now)
    json.dumps(status, allow_nan=False)
    return status


def candidates(net: Members, member: int = A) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in shown(net, member)["egresses"][0]["candidates"]}


# The choice.


def test_the_best_path_is_found() -> None:
    net = four()
    delays(net, A, W, 0.002)
    net.run(5)
    assert net.engines[A].chosen == {B: W}
    assert moves(net) == [W] and moves(net, B) == [W]
    one = shown(net)["egresses"][0]
    assert (one["choice"], one["via"], one["moves"]) == ("n516", "192.0.2.4", 1)
    assert candidates(net)["n516"]["rtt"] == pytest.approx(24, abs=0.1)
    assert "24.0 ms" in one["why"] and "direct: 40.0 ms" in one["why"]


def test_without_a_better_one_the_direct_path_stays() -> None:
    net = four()
    net.run(20)
    assert net.moves == []


@pytest.mark.parametrize("phase", [n / 20 * PERIOD for n in range(20)])
def test_a_dead_path_is_left_within_four_periods(phase: float) -> None:
    """0.8 seconds at five probes a second, whenever it dies."""
    net = four()
    net.run(5 + phase)
    died = net.now
    cut(net, A, B)
    net.run(10)
    assert [round(at - died, 9) <= 4 * PERIOD for at, who, _ in net.moves if who == A] == [True]
    assert net.engines[A].chosen[B] in (V, W)


def test_long_periods_do_not_make_failures_long() -> None:
    """Probes follow each other sooner once an answer is missing."""
    worst = 0.0
    for phase in range(8):
        net = four(every=2000, timeout=500, hold=10_000)
        net.run(20 + phase / 4)
        died = net.now
        cut(net, A, B)
        net.run(20)
        worst = max(worst, next(at for at, who, _ in net.moves if who == A and at > died) - died)
    assert worst <= 2 + 3 * 0.5 + 0.01 < 4 * 2


def test_one_direction_is_enough_to_be_dead() -> None:
    net = four()
    net.run(5)
    net.link(B, A).up = False
    net.run(1)
    assert net.engines[A].chosen[B] != DIRECT


def test_a_slow_path_is_left() -> None:
    net = four()
    net.run(30)
    delays(net, A, B, 0.06)
    net.run(3)
    assert net.engines[A].chosen[B] in (V, W)


def test_paths_come_back_without_flapping() -> None:
    net = four()
    delays(net, A, B, 0.005)
    net.run(10)
    for trouble in (lambda: cut(net, A, B), lambda: delays(net, A, B, 0.08)):
        begun = net.now
        trouble()
        net.run(20)
        assert len(moves(net, since=begun)) == 1 and net.engines[A].chosen[B] != DIRECT
        cut(net, A, B, up=True)
        delays(net, A, B, 0.005)
        net.run(120)
        assert len(moves(net, since=begun)) == 2 and net.engines[A].chosen[B] == DIRECT


def test_a_path_that_comes_and_goes_is_not_followed() -> None:
    net = four()
    delays(net, A, B, 0.005)
    net.run(10)
    begun = net.now
    for _ in range(60):  # up for a second, down for a second
        cut(net, A, B)
        net.run(1)
        cut(net, A, B, up=True)
        net.run(1)
    assert len(moves(net, since=begun)) <= 6


@pytest.mark.parametrize("measure", ["rtt", "loss", "both"])
@pytest.mark.parametrize("seed", range(int(os.environ.get("ITM_SEEDS", "3"))))
def test_equal_paths_are_not_swapped_in_ten_minutes(measure: str, seed: int) -> None:
    """1 % of probes or their answers are lost on each path, and their times differ by 10 %."""
    net = four(seed, measure=measure)
    for (one, other), link in net.links.items():
        link.jitter, link.loss = 0.1, 0.005 if {one, other} == {A, B} else 0.0025
    net.run(600)
    assert net.moves == []
    assert shown(net)["counters"]["missed"] > 50


@pytest.mark.parametrize("measure", ["loss", "both"])
def test_a_lossy_path_is_left(measure: str) -> None:
    net = four(measure=measure, lost=(8, 8))
    net.run(20)
    for link in net.both(A, B):
        link.loss = 0.1
    net.run(60)
    assert net.engines[A].chosen[B] in (V, W)


def test_an_egress_that_is_a_neighbour_is_none_of_its_own_candidates() -> None:
    net = Members()
    net.join(overlay(A, [B, V], [B]))
    assert set(candidates(net)) == {"direct", "n515"}


def test_what_an_engine_before_has_chosen_stays_until_it_is_bad() -> None:
    net = four()
    net.join(overlay(A, [V, W], [B]), chosen={B: V, X: V})
    assert net.engines[A].chosen == {B: V}
    delays(net, A, B, 0.05)
    net.run(30)
    assert moves(net) == []


# All silent.


def test_when_the_far_runtime_ends_nothing_moves() -> None:
    for seed in range(5):
        net = four(seed)
        delays(net, A, W, 0.002)
        net.run(10 + seed / 30)
        begun = net.now
        net.silent.add(B)
        net.run(30)
        assert moves(net, since=begun) == [] and net.engines[A].chosen[B] == W
        assert {one["state"] for one in candidates(net).values()} == {"out"}
        net.silent.clear()
        net.run(30)
        assert moves(net, since=begun) == []


def test_when_all_but_one_die_it_is_found() -> None:
    net = four()
    net.run(5)
    cut(net, A, B)
    cut(net, A, V)
    net.run(1)
    assert net.engines[A].chosen[B] == W


# Data that does not get through.


class Data:
    """Packets to B's network, and what comes back: by those paths that carry data."""

    def __init__(self, net: Members, carries: Callable[[int], bool]) -> None:
        self.net, self.carries = net, carries
        self.sent = self.returned = 0

    def run(self, seconds: float, sending: bool = True) -> None:
        for _ in range(round(seconds / 0.5)):
            self.net.run(0.5)
            engine = self.net.engines[A]
            if sending:
                self.sent += 10
                self.returned += 8 * self.carries(engine.chosen[B])
            effects = engine.progress(self.net.now, {B: (self.sent, self.returned), X: (1, 0)})
            self.net.moves += [(self.net.now, A, one) for one in effects if isinstance(one, Move)]


def test_a_path_that_carries_probes_but_no_data_is_left() -> None:
    net, broken = four(), set[int]()
    data = Data(net, lambda via: via not in broken)
    data.run(10)
    assert moves(net) == []
    broken.add(DIRECT)
    begun = net.now
    data.run(5)
    found = [(at, move) for at, member, move in net.moves if member == A]
    assert len(found) == 1 and found[0][0] - begun <= 2.5
    assert "no packets have come back" in found[0][1].reason
    assert "though its probes pass" in found[0][1].reason
    assert candidates(net)["direct"]["state"] == "suspect"
    data.run(20)
    assert len(moves(net)) == 1
    broken.clear()
    data.run(60)
    assert net.engines[A].chosen[B] == DIRECT and len(moves(net)) == 2


def test_a_path_that_loses_data_both_ways_is_left_by_both() -> None:
    """B sends, A acknowledges what it gets: what B sends again looks to A as if all were well."""
    net, broken = four(), set[int]()
    sent, got = dict.fromkeys((A, B), 1), dict.fromkeys((A, B), 1)

    def run(seconds: float) -> None:
        for _ in range(round(seconds / 0.25)):
            net.run(0.25)
            sent[B] += 4
            if net.engines[B].chosen[A] not in broken:
                got[A] += 4
                sent[A] += 2
                got[B] += 2 * (net.engines[A].chosen[B] not in broken)
            for one, other in ((A, B), (B, A)):
                effects = net.engines[one].progress(net.now, {other: (sent[one], got[one])})
                net.moves += [(net.now, one, each) for each in effects if isinstance(each, Move)]

    run(10)
    assert net.moves == []
    broken.add(DIRECT)
    begun, before = net.now, got[B]
    run(5)
    assert net.engines[A].chosen[B] != DIRECT and net.engines[B].chosen[A] != DIRECT
    assert got[B] > before + 10
    reasons = {member: move.reason for _, member, move in net.moves}
    assert "no packets have come back" in reasons[B]
    assert "its packets bring nothing back" in reasons[A]
    run(20)
    assert len(moves(net, A, begun)) == len(moves(net, B, begun)) == 1


def test_a_path_that_stays_broken_is_tried_less_and_less() -> None:
    net = four()
    data = Data(net, lambda via: via != DIRECT)
    data.returned = data.sent = 100
    data.carries = lambda via: True
    data.run(3)
    data.carries = lambda via: via != DIRECT
    data.run(600)
    times = [at for at, one, move in net.moves if one == A and move.via == DIRECT]
    assert 2 <= len(times) <= 5
    assert times[1] - times[0] > 55 and (len(times) < 3 or times[2] - times[1] > 110)


def test_the_one_path_that_carries_data_is_found() -> None:
    net = four()
    data = Data(net, lambda via: True)
    data.run(5)
    data.carries = lambda via: via == W
    data.run(10)
    assert net.engines[A].chosen[B] == W


def test_hosts_that_are_gone_make_it_circle_once() -> None:
    net = four()
    data = Data(net, lambda via: True)
    data.run(5)
    data.carries = lambda via: False
    data.run(20)
    times = [at for at, member, _ in net.moves if member == A]
    assert len(times) <= 4 and net.engines[A].chosen[B] == DIRECT
    assert all(later - earlier >= 1 for earlier, later in pairwise(times))  # each gets its time
    assert "nobody is there" in shown(net)["egresses"][0]["why"]
    assert {one["state"] for one in candidates(net).values()} == {"working"}
    data.run(600)
    assert len(moves(net)) == len(times)


def test_who_never_answered_is_not_missed() -> None:
    net = four()
    Data(net, lambda via: False).run(60)
    assert moves(net) == []


def test_idle_connections_are_not_missed() -> None:
    net = four()
    data = Data(net, lambda via: True)
    data.run(5)
    data.run(60, sending=False)
    assert moves(net) == []


def test_where_all_are_silent_the_data_tells() -> None:
    net, broken = four(), set[int]()
    data = Data(net, lambda via: via not in broken)
    data.run(5)
    net.silent.add(B)
    data.run(10)
    assert moves(net) == []  # it works: only the runtime is gone
    broken |= {DIRECT, V}
    data.run(10)
    assert net.engines[A].chosen[B] == W
    assert "though" not in shown(net)["egresses"][0]["why"]


# Strangers, and old acquaintances.


def probe(sequence: int = 5, sender: int = B, target: int = A, via: int = 0, **more: Any) -> bytes:
    return wire.pack(
        wire.Message(wire.PROBE, sender, target, via, sequence, b"8 bytes.", **more), KEY
    )


def alone(**more: Any) -> Engine:
    engine = Engine(overlay(A, [V, W], [B], **more), KEY, 1_000_000, 1)
    engine.tick(0.0)
    return engine


def counted(engine: Engine, now: float = 0.0) -> dict[str, int]:
    return {name: engine.status(now)["counters"][name] for name in NOTHING}


def test_a_probe_is_answered_once_to_its_sender_by_the_way_it_came() -> None:
    engine = alone()
    for sequence, via, back in ((1, 0, 0), (2, V, V), (3, X, 0)):
        (effect,) = engine.received(0.1, probe(sequence, via=via), B)
        assert isinstance(effect, Send) and (effect.via, effect.to) == (back, B)
        answer = wire.unpack(effect.data, KEY)
        assert (answer.kind, answer.sender, answer.target) == (wire.ANSWER, A, B)
        assert (answer.sequence, answer.via, answer.echo) == (sequence, via, b"8 bytes.")
        assert answer.told is None
        assert engine.received(0.1, probe(sequence, via=via), B) == []
    assert counted(engine) == NOTHING | {"replayed": 3}


def test_who_asks_is_told() -> None:
    engine = alone(own=((10 << 24, 8), (172 << 24, 16)))
    (effect,) = engine.received(0.1, probe(asks=True), B)
    assert isinstance(effect, Send)
    assert wire.unpack(effect.data, KEY).told == wire.Told(((10 << 24, 8), (172 << 24, 16)), (V, W))


@pytest.mark.parametrize(
    ("data", "source", "reason"),
    [
        (b"", B, "truncated"),
        (probe()[:-1], B, "truncated"),
        (probe()[:-1] + b"\x00", B, "forged"),
        (b"GET / HTTP/1.1" + bytes(60), B, "malformed"),
        (probe(), V, "unexpected"),  # not from whom it says
        (probe(target=V), B, "unexpected"),  # not to us
        (probe(sender=A, target=B), A, "unexpected"),  # our own, sent back
        (wire.pack(wire.Message(wire.ANSWER, B, A, 0, 1_000_500, bytes(8)), KEY), B, "unexpected"),
        (wire.pack(wire.Message(wire.ANSWER, B, A, 0, 999_999, bytes(8)), KEY), B, "replayed"),
    ],
    ids=[
        "nothing", "cut off", "forged", "another protocol", "another source", "another target",
        "our own", "no probe of ours", "a probe of an earlier run",
    ],
)  # fmt: skip
def test_what_is_not_for_us_is_counted_and_nothing_else(
    data: bytes, source: int, reason: str
) -> None:
    engine = alone()
    before = engine.status(0.0)["egresses"]
    assert engine.received(0.0, data, source) == []
    assert counted(engine) == NOTHING | {reason: 1}
    assert engine.status(0.0)["egresses"] == before


def sent(engine: Engine, until: float) -> list[tuple[float, Send]]:
    """What an engine sends that gets no answers."""
    found: list[tuple[float, Send]] = []
    while engine.due <= until:
        now = max(engine.due, 0.0)
        found += [(now, one) for one in engine.tick(now) if isinstance(one, Send)]
    return found


def test_an_answer_counts_once_from_the_right_one_by_the_right_way() -> None:
    engine = alone()
    now, first = next(one for one in sent(engine, 1.0) if one[1].via == V)
    asked = wire.unpack(first.data, KEY)
    engine = alone()
    assert next(one for at, one in sent(engine, now) if one.via == V) == first
    answer = replace(asked, kind=wire.ANSWER, sender=B, target=A)
    for wrong in (
        replace(answer, via=W), replace(answer, via=0), replace(answer, echo=bytes(8)),
        replace(answer, sender=V, via=0),
    ):  # fmt: skip
        assert engine.received(now + 0.01, wire.pack(wrong, KEY), wrong.sender) == []
    assert counted(engine) == NOTHING | {"unexpected": 4}
    engine.received(now + 0.02, wire.pack(answer, KEY), B)
    engine.received(now + 0.03, wire.pack(answer, KEY), B)
    assert counted(engine) == NOTHING | {"unexpected": 4, "replayed": 1}
    shown = {c["via"]: c for c in engine.status(now + 0.05)["egresses"][0]["candidates"]}
    assert shown["192.0.2.3"]["rtt"] == pytest.approx(20)
    assert shown["192.0.2.3"]["last"] == pytest.approx(0.03)
    assert shown["192.0.2.4"]["state"] == shown[None]["state"] == "unknown"


def test_a_late_answer_is_counted_and_is_none() -> None:
    net = four()
    delays(net, A, B, 0.15)
    net.run(5)
    assert candidates(net)["direct"]["state"] == "out"
    assert shown(net)["counters"]["late"] > 15


def test_a_sender_is_answered_no_more_often_than_the_budget() -> None:
    engine = alone()
    answered = sum(
        len(engine.received(1 + n / 1000, probe(n), B)) for n in range(3000)
    )  # a thousand a second
    assert answered <= 3 * 200 + 50
    assert counted(engine, 4)["limited"] == 3000 - answered
    assert len(engine.received(4.0, probe(9000, sender=V), V)) == 1  # others do not suffer


def test_a_restarted_member_is_answered_and_its_old_probes_are_not() -> None:
    net = four()
    recorded: list[Send] = []
    net.watch = lambda who, one: (
        recorded.append(one) if who == A and isinstance(one, Send) and one.to == B else None
    )
    net.run(5)
    net.join(overlay(A, [V, W], [B]))
    net.run(5)
    assert candidates(net)["direct"]["state"] == "working"
    before = counted(net.engines[B])
    old = [one.data for one in recorded if wire.unpack(one.data, KEY).kind == wire.PROBE]
    assert len(old) > 100
    effects = [e for data in old for e in net.engines[B].received(net.now, data, A)]
    assert effects == []
    assert counted(net.engines[B])["replayed"] - before["replayed"] == len(old)


def test_a_recorded_probe_after_a_restart_steers_nothing() -> None:
    net = four()
    recorded: list[bytes] = []
    net.watch = lambda who, one: (
        recorded.append(one.data) if who == A and isinstance(one, Send) and one.to == B else None
    )
    net.run(5)
    old = [data for data in recorded if wire.unpack(data, KEY).kind == wire.PROBE]
    net.join(overlay(B, [V, W], [A]))
    begun = net.now
    for data in old:  # the answers go to A, which waits for none of them
        net._do(B, net.engines[B].received(net.now, data, A))
    net.run(10)
    assert moves(net, A, begun) == moves(net, B, begun) == []
    assert counted(net.engines[A])["replayed"] == len(old) - counted(net.engines[B])["limited"]


def test_a_clock_that_was_set_back_is_forgiven_after_a_silence() -> None:
    engine = alone()
    assert len(engine.received(1.0, probe(10**15), B)) == 1
    assert engine.received(2.0, probe(10**12), B) == []
    assert len(engine.received(700.0, probe(10**12 + 1), B)) == 1


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_no_soup_of_messages_raises_or_steers(data: st.DataObject) -> None:
    """Damaged, repeated, made up with the key, or by a stranger: no choice changes."""
    random = Random(data.draw(st.integers(0, 2**32)))
    net = four(discover=4)
    heard: list[tuple[bytes, int]] = []
    net.watch = lambda who, one: (
        heard.append((one.data, who)) if isinstance(one, Send) and one.to == A else None
    )
    net.run(3)
    engine, begun = net.engines[A], net.now
    for _ in range(300):
        octets, source = random.choice(heard)
        kind = random.randrange(4)
        if kind == 0:
            damaged = bytearray(octets)
            damaged[random.randrange(len(damaged))] ^= random.randrange(1, 256)
            octets = bytes(damaged)
        elif kind == 1:
            octets = random.randbytes(random.randrange(1300))
        elif kind == 2:
            octets = octets[: random.randrange(len(octets))]
        else:
            message = wire.unpack(octets, KEY)
            octets = wire.pack(replace(message, sequence=random.randrange(2**64)), KEY)
        source = random.choice((source, source, X, 0))
        for effect in engine.received(net.now, octets, source):
            assert isinstance(effect, Send) and effect.to == source
        net.run(random.choice((0, 0.01)))
    net.run(2)
    assert moves(net, since=begun) == []


# Budgets.


def busy(egresses: int, neighbors: int, **more: Any) -> Engine:
    around = [0xC6330001 + n for n in range(neighbors)]
    return Engine(overlay(A, around, [0xC6340001 + n for n in range(egresses)], **more), KEY, 0, 1)


def test_each_candidate_is_probed_once_a_period_and_evenly() -> None:
    engine = busy(5, 4)
    every = [one for at, one in sent(engine, 20.0)]
    counts = Counter((one.to, one.via) for one in every)
    assert len(counts) == 25
    # Those that are chosen get more, as their answers are missing at first.
    assert all(98 <= n <= 101 for n in counts.values())


@pytest.mark.parametrize(("egresses", "neighbors"), [(5, 4), (5, 5), (20, 2)])
def test_probes_come_in_no_bursts(egresses: int, neighbors: int) -> None:
    engine = busy(egresses, neighbors, lost=(60, 60))
    found = sent(engine, 10.0)
    for some in (found, [(at, one) for at, one in found if not one.via]):
        slots = Counter(int(at / PERIOD * 10) for at, _ in some)
        assert max(slots.values()) <= 1.5 * len(some) / 500 + 1.5  # of 500 slots


@pytest.mark.parametrize(("egresses", "neighbors"), [(100, 5), (1024, 13), (1024, 0)])
def test_the_budget_holds_whatever_there_is_to_probe(egresses: int, neighbors: int) -> None:
    engine = busy(egresses, neighbors)
    found = sent(engine, 30.0)
    assert 0.6 * 200 * 30 <= len(found) <= 200 * 30 + 50
    for begin in range(30):
        assert sum(begin <= at < begin + 1 for at, _ in found) <= 200 + 50
    status = engine.status(30.0)
    others = egresses * neighbors
    assert egresses / status["period"] + others / status["period_others"] <= 161
    assert status["period"] <= status["period_others"]


def test_where_probes_are_rationed_what_comes_back_is_known_soon() -> None:
    net = Members()
    egresses = [0xC6340001 + n for n in range(100)]
    for far in egresses:
        for one, other in ((A, far), (A, V), (V, far)):
            net.both(one, other)
        net.join(overlay(far, [V], []))
    net.join(overlay(A, [V], egresses))
    net.run(10)
    assert net.moves == []
    cut(net, A, egresses[0])
    net.run(10)
    assert net.engines[A].chosen[egresses[0]] == V
    cut(net, A, egresses[0], up=True)
    net.run(2 * shown(net)["period_others"] + 8 * shown(net)["period"])
    assert net.engines[A].chosen[egresses[0]] == DIRECT


def test_questions_have_a_tenth_of_the_budget() -> None:
    found = sent(busy(1024, 5, discover=64), 30.0)
    asking = [one for _, one in found if wire.unpack(one.data, KEY).asks]
    assert 0.3 * 20 * 30 <= len(asking) <= 20 * 30 + 5


def test_where_probes_are_rationed_failures_are_still_short() -> None:
    net = Members()
    egresses = [0xC6340001 + n for n in range(100)]
    for far in egresses:
        net.both(A, far)
        for between in (V, W):
            net.both(A, between)
            net.both(between, far)
        net.join(overlay(far, [V, W], []))
    net.join(overlay(A, [V, W], egresses))
    net.run(30)
    period, others = (shown(net)[key] for key in ("period", "period_others"))
    assert period > PERIOD and others > 2
    died, dead = net.now, egresses[::10]
    for far in dead:
        cut(net, A, far)
    net.run(10)
    found = {move.egress: at - died for at, _, move in net.moves}
    assert set(found) == set(dead) and max(found.values()) <= period + 3 * 0.2 + 0.05


def test_without_destinations_there_is_nothing_to_do() -> None:
    engine = Engine(overlay(A, [V], []), KEY, 0, 1)
    assert engine.tick(5.0) == [] and engine.due == float("inf")


# Clocks.


def test_a_machine_that_slept_has_lost_nothing() -> None:
    net = four()
    net.run(10)
    engine, before = net.engines[A], shown(net)["counters"]["missed"]
    now = net.now
    for asleep in (3600.0, 5.0, 7200.0):
        now += asleep
        assert not [e for e in engine.tick(now) if not isinstance(e, Send)]
        for _ in range(3):
            now = engine.due
            assert not [e for e in engine.tick(now) if not isinstance(e, Send)]
        status = engine.status(now)
        assert status["counters"]["missed"] == before
        assert {one["state"] for one in status["egresses"][0]["candidates"]} == {"working"}


def test_a_clock_that_goes_back_loses_nothing_and_goes_on() -> None:
    net = four()
    net.run(10)
    engine = net.engines[A]
    while (before := shown(net)["counters"])["sent"] == before["returned"]:
        net.run(0.01)  # until something is waited for
    net._events.clear()
    net._woken.clear()
    net.now -= 500
    for address in net.engines:
        net._wake(address, net.now)
    net.run(10)
    after = shown(net)["counters"]
    assert after["missed"] == before["missed"] and after["returned"] > before["returned"] + 100
    assert net.moves == [] and net.now <= engine.due <= net.now + 1
    last = candidates(net)["direct"]["last"]
    assert last is not None and 0 <= last < 1
    died = net.now
    cut(net, A, B)
    net.run(2)
    assert [at - died <= 0.8 for at, who, _ in net.moves if who == A] == [True]


def test_after_a_late_call_answers_may_still_be_read() -> None:
    """The process had no time for a moment: the answers are in its socket."""
    engine = alone()
    asked: list[Send] = []
    while len(asked) < 3:
        now = max(engine.due, 0.0)
        asked += [one for one in engine.tick(now) if isinstance(one, Send)]
    late = now + 0.35
    engine.tick(late)
    assert engine.status(late)["counters"]["missed"] == 0
    assert engine.due <= late + 0.05
    probe = wire.unpack(asked[0].data, KEY)
    answer = replace(probe, kind=wire.ANSWER, sender=B, target=A)
    engine.received(late + 0.01, wire.pack(answer, KEY), B)
    engine.tick(engine.due)
    status = engine.status(late + 0.05)
    assert status["counters"]["missed"] > 0 and status["counters"]["returned"] == 1
    (one,) = [c for c in status["egresses"][0]["candidates"] if c["state"] == "working"]
    assert one["rtt"] is None  # how long it took is not known


@pytest.mark.parametrize("now", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_time_is_refused(now: float) -> None:
    with pytest.raises(ValueError):
        alone().tick(now)


# Learning.


def village(**more: Any) -> Members:
    """A knows V only; V knows A, B and W; each has a network of its own."""
    net = Members()
    for one in (A, B, V, W):
        for other in (A, B, V, W):
            if one != other:
                net.link(one, other)
    net.join(overlay(A, [V], [], **{"own": (behind(A),), "discover": 8, **more}))
    net.join(overlay(V, [A, B, W], [], own=(behind(V),)))
    net.join(overlay(B, [V], [], own=(behind(B),)))
    net.join(overlay(W, [V], [], own=(behind(W), (172 << 24, 16))))
    return net


def learned(net: Members) -> dict[int, set[tuple[int, int]]]:
    """What A has been told to lead where, by its effects."""
    found: dict[int, set[tuple[int, int]]] = {}
    for _, who, effect in net.learned:
        if who == A and isinstance(effect, Learned):
            assert not found.setdefault(effect.egress, set()) & {*effect.prefixes}
            found[effect.egress] |= {*effect.prefixes}
        elif who == A:
            assert {*effect.prefixes} <= found[effect.egress]
            found[effect.egress] -= {*effect.prefixes}
    return {egress: prefixes for egress, prefixes in found.items() if prefixes}


def told(net: Members, member: int, neighbors: Iterable[int], *own: tuple[int, int]) -> None:
    """The member starts again and tells this."""
    net.join(overlay(member, neighbors, [], own=own))


def test_neighbours_and_their_neighbours_are_learned_and_routed_to() -> None:
    net = village()
    net.run(10)
    assert learned(net) == {
        V: {behind(V)}, B: {behind(B)}, W: {behind(W), (172 << 24, 16)},
    }  # fmt: skip
    assert net.engines[A].chosen == {V: 0, B: 0, W: 0}
    cut(net, A, B)
    net.run(2)
    assert net.engines[A].chosen == {V: 0, B: V, W: 0}
    net.run(30)
    assert B in learned(net)  # by way of V it still tells


def test_nothing_is_learned_unless_it_is_asked_for() -> None:
    net = village(discover=0)
    net.run(10)
    assert net.learned == [] and net.engines[A].chosen == {}


def test_what_is_told_no_longer_is_forgotten() -> None:
    net = village()
    net.run(10)
    told(net, W, [V], behind(W))
    net.run(5)
    assert learned(net)[W] == {behind(W)}
    net.down.add(W)
    net.run(10)
    assert W not in learned(net) and W not in net.engines[A].chosen
    net.down.clear()
    net.run(10)
    assert learned(net)[W] == {behind(W)}


def test_who_is_introduced_no_more_and_silent_is_no_member() -> None:
    net = village()
    net.run(10)
    told(net, V, [A, B], behind(V))
    net.down.add(W)
    net.run(15)
    assert {one["address"] for one in shown(net)["members"]} == {"192.0.2.2", "192.0.2.3"}


@pytest.mark.parametrize("discover", [1, 2, 3])
def test_no_more_is_learned_than_asked_for(discover: int) -> None:
    net = village(discover=discover)
    told(net, V, [A, B, W, *range(0xC6000000, 0xC6000010)], *(behind(n) for n in range(9, 99)))
    net.run(20)
    assert sum(map(len, learned(net).values())) == discover
    assert len(shown(net)["members"]) <= 1 + discover


@pytest.mark.parametrize(
    "network",
    [
        (0, 0),  # everything
        (127 << 24, 8), (224 << 24, 4),
        (V & ~0xFF, 24),  # members' own addresses
        behind(A),  # ours
        (behind(A)[0], 32), (10 << 24, 8),  # within ours, around ours
        behind(X),  # as in the file
        behind(B),  # as another one told before
    ],
)  # fmt: skip
def test_what_clashes_is_not_believed(network: tuple[int, int]) -> None:
    net = Members()
    for one, other in ((A, V), (A, B), (A, W), (A, X), (V, B), (V, W), (V, X)):
        net.both(one, other)
    net.join(overlay(A, [V], [X], own=(behind(A),), discover=8))
    net.join(overlay(V, [A, B, W], [], own=()))
    net.join(overlay(B, [V], [], own=(behind(B),)))
    net.join(overlay(X, [V], []))
    net.run(10)
    net.join(overlay(W, [V], [], own=(network, behind(W))))
    net.run(20)
    assert learned(net) == {B: {behind(B)}, W: {behind(W)}}
    assert net.engines[A].chosen[X] == DIRECT


def test_a_member_within_a_network_of_the_file_is_none() -> None:
    inside = behind(X)[0] + 1
    net = Members()
    for one, other in ((A, V), (A, X), (A, inside)):
        net.both(one, other)
    net.join(overlay(A, [V], [X], discover=8))
    net.join(overlay(V, [inside, 0x7F000001, A], []))
    net.join(overlay(inside, [V], [], own=(behind(W),)))
    net.run(10)
    assert learned(net) == {}
    assert {one["address"] for one in shown(net)["members"]} == {"192.0.2.3", "192.0.2.5"}


def test_a_new_member_within_a_learned_network_ends_that_one() -> None:
    net = village()
    told(net, V, [A, B], (W & ~0xFF, 30))  # 192.0.2.0/30 has B and V: never believed
    net.run(10)
    assert V not in learned(net)
    told(net, V, [A, B], (0xC6000000, 8))
    net.run(5)
    assert learned(net)[V] == {(0xC6000000, 8)}
    told(net, V, [A, B, 0xC6000001], (0xC6000000, 8))
    net.run(5)
    assert V not in learned(net)


def test_only_neighbours_introduce() -> None:
    net = village()
    net.link(A, X), net.link(X, A)
    told(net, B, [V, X], behind(B))
    net.join(overlay(X, [], [], own=(behind(X),)))
    net.run(20)
    assert X not in learned(net)


def test_learned_and_configured_networks_share_their_egress() -> None:
    net = four(discover=8)
    net.join(overlay(B, [V, W], [A], own=(behind(B), behind(X)), discover=8))
    net.run(10)
    assert learned(net)[B] == {behind(X)}
    one = next(e for e in shown(net)["egresses"] if e["egress"] == "192.0.2.2")
    assert one["prefixes"] == ["10.2.2.0/24"] and one["learned"] == ["10.2.5.0/24"]
    net.silent.add(B)
    net.run(20)
    assert B not in learned(net) and B in net.engines[A].chosen


def test_forgotten_comes_before_learned() -> None:
    """A network that goes from one member to another is first taken from the former."""
    net = village()
    net.run(10)
    begun = net.now
    told(net, B, [V], behind(W))
    told(net, W, [V])
    net.run(10)
    changes: list[Effect] = [effect for at, who, effect in net.learned if at > begun and who == A]
    last = [e for e in changes if behind(W) in getattr(e, "prefixes", ())]
    assert [type(one) for one in last] == [Forgotten, Learned]
    assert learned(net)[B] == {behind(W)}
