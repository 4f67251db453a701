"""Simplifying keeps the meaning: random conditions over random packets.

ITM_EXAMPLES makes the search longer.
"""

import os
from copy import copy
from dataclasses import replace
from itertools import count
from random import Random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from itmlang import ir
from itmlang.conntrack import Connection
from itmlang.diagnostics import CompileError, Findings, render
from itmlang.fields import FIELDS
from itmlang.packet import Header, Packet
from itmlang.pipeline import analyse
from itmlang.semantics import State, _asked, _Closures
from itmlang.simplify import Simplified, Variant, simplify
from itmlang.source import Source
from itmlang.tables import Entry
from tests.support.frames import shaped
from tests.support.language import (
    CLEAR,
    CONNECTIONS,
    DRAWN,
    INTERESTS,
    KEYS,
    LEARNED,
    LEAVES,
    SETS,
    SHAPES,
    TIMED,
    TRACKED,
)

# Which hooks, and the interfaces that a packet there can have.
PLACES = (
    ("prerouting", ({"input": "eth0"}, {"input": "eth1"}, {"input": "lo"})),
    ("forward", ({"input": "eth0", "output": "eth1"}, {"input": "eth1", "output": "eth0"})),
    ("postrouting", ({"output": "eth1"}, {"input": "eth0", "output": "eth1"}, {"output": "x"})),
    ("output", ({"output": "eth1"}, {"output": "lo"})),
    ("forward, postrouting", ({"input": "eth0", "output": "eth1"},)),
)
ALL_KEYS = (*KEYS, "connection", "connection")

ENDS = (4, 17, 1, 2, 3, 4)  # of a connection, which are not asked
NOW = 5.0  # when all is asked; flows are half a second old or five


def conditions(*pools: tuple[str, ...]) -> st.SearchStrategy[str]:
    """Conditions whose leaves come from the pools, from each as often."""
    return st.recursive(
        st.one_of([st.sampled_from(pool) for pool in pools]),
        lambda inner: st.one_of(
            inner.map(lambda c: f"not ({c})"),
            st.lists(inner, min_size=2, max_size=3).map(lambda cs: "(" + " and ".join(cs) + ")"),
            st.lists(inner, min_size=2, max_size=3).map(lambda cs: "(" + " or ".join(cs) + ")"),
        ),
        max_leaves=8,
    )


UNDRAWN = conditions(LEAVES, LEAVES, TIMED + CLEAR, TRACKED, CONNECTIONS)
ALL = conditions(LEAVES, LEAVES, TIMED + CLEAR, TRACKED, CONNECTIONS, DRAWN, DRAWN)


@st.composite
def packets(draw: st.DrawFn, interfaces: tuple[dict[str, str], ...]) -> Packet:
    family = draw(st.sampled_from((4, 6)))
    icmp = 1 if family == 4 else 58
    base = 0x0A000000 if family == 4 else 0xFD00 << 112
    protocol = draw(st.sampled_from((6, 6, 17, icmp, icmp, 132, 47, 59 - icmp)))
    port = st.sampled_from((0, 1, 2, 3, 80, 65535))
    ends = [(family, base + draw(st.integers(1, 4))) for _ in range(2)]
    header = Header(
        protocol, ends[0], ends[1], draw(port), draw(port),
        flags=draw(st.sampled_from((None, 0, 1, 2, 4, 16, 18, 255))),
        tos=draw(st.sampled_from((0, 1, 0x10, 0xB8, 0xFF))),
        ttl=draw(st.sampled_from((1, 4, 63, 64))),
        length=draw(st.sampled_from((None, 100))),
        type=draw(st.sampled_from((None, 0, 3, 8, 128, 129, 255))),
        mss=draw(st.sampled_from((None, 0, 536, 1000, 1460))),
    )  # fmt: skip
    data = shaped(bytes(header.build().data), draw(st.sampled_from(SHAPES[family])))
    mark = draw(st.integers(0, 2))
    packet = Packet(bytearray(data), mark=mark, **draw(st.sampled_from(interfaces)))
    packet.draw = draw(st.sampled_from((0, 99_999, 100_000, 329_999, 330_000, 500_000, 999_999)))
    if draw(st.booleans()):
        packet.ct_state, packet.ct_direction = draw(st.integers(1, 3)), draw(st.integers(0, 1))
        packet.connection = Connection(draw(st.integers(1, 3)), (ENDS, ENDS))
    else:
        packet.ct_state = draw(st.sampled_from((0, 4)))
    return packet


def policy_of(text: str) -> ir.Policy | None:
    try:
        return analyse(Source("random", text)).policies[0]
    except CompileError as error:
        codes = {d.code for d in error.diagnostics if d.is_error}
        assert codes <= {"E030", "E044"}, "\n".join([text, *map(render, error.diagnostics)])
        return None


@st.composite
def situations(draw: st.DrawFn, asked: st.SearchStrategy[str]) -> tuple[str, list[Packet], int]:
    hook, interfaces = draw(st.sampled_from(PLACES))
    rules = [f"c{n} when {draw(asked)}" for n in range(draw(st.integers(1, 3)))]
    changes = []
    for name in draw(st.lists(st.sampled_from(sorted(LEARNED)), max_size=2)):
        word = draw(st.sampled_from(("add {} to", "remove {} from")))
        field = draw(st.sampled_from(LEARNED[name]))
        changes.append(f"{word.format(field)} @{name} when {draw(UNDRAWN)}")
    text = f"""{SETS} policy p {{
        at {hook}
        interest {{ {draw(st.sampled_from(INTERESTS))} }}
        flow f by {draw(st.sampled_from(ALL_KEYS))}
        flow g by {draw(st.sampled_from(ALL_KEYS))}
        flow n by {draw(st.sampled_from(ALL_KEYS))}
        classify {{ {" ".join(rules)} }}
        log {{ count f count g }}
        update {{ {" ".join(changes)} }}
    }}"""
    several = draw(st.lists(packets(interfaces), min_size=1, max_size=6))
    return text, several, draw(st.integers(0, 2**32))


def after_much(policy: ir.Policy, packet: Packet, random: Random) -> State:
    """A state in which anything may have happened to the packet's flows and values."""
    state = State(policy)
    rates, _ = _asked(policy)
    for name in ("f", "g"):
        table = state.flows[name]
        key = table.key(packet)
        if key is None or random.random() < 0.3:
            continue
        entry = Entry(random.randint(1, 5), random.randint(20, 300), random.choice((0.0, 4.5)), NOW)
        entry.connections = random.randint(0, 4)
        entry.over = {asked: random.choice((0.0, 9.0)) for asked in rates.get(name, ())}
        table.entries[packet.family if table.flow.by_address else 0] = {key: entry}
    for change in state.sets.values():
        for field in (FIELDS[name] for name in LEARNED[change.set.name]):
            value = field.get(packet)
            if value is not None and random.random() < 0.5:
                change.add(value, NOW, None, "p")
    return state


def variant_for(simple: Simplified, packet: Packet) -> Variant:
    """What is left of a policy for the packet: later fragments may have their own."""
    later = packet.fragment_offset and simple.fragments is not None
    return simple.fragments if later else simple.whole


def rules_for(variant: Variant, packet: Packet) -> tuple[ir.ClassRule, ...]:
    """Those that the packet's random number leads to."""
    return next(draw.rules for draw in variant.draws if draw.low <= packet.draw <= draw.high)


@settings(max_examples=int(os.environ.get("ITM_EXAMPLES", "600")), deadline=None,
          suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
@given(situations(ALL))
def test_simplifying_keeps_the_meaning(situation: tuple[str, list[Packet], int]) -> None:
    text, several, seed = situation
    policy = policy_of(text)
    if policy is None:
        return
    simple = simplify(policy, Findings())
    for packet in several:
        if simple.reassembled and packet.fragment_offset:
            continue  # there is none behind connection tracking
        variant = variant_for(simple, packet)
        closures = _Closures(after_much(policy, packet, Random(seed)), None)
        closures.section = "classify"  # in an update, each question is a draw of its own

        def holds(condition: ir.Condition, of: _Closures = closures, one: Packet = packet) -> bool:
            return of.predicate(condition)(one, NOW)

        wanted = holds(policy.interest)
        assert holds(variant.interest) == wanted, f"interest of {text}"
        if not wanted:
            continue
        first = next((r.name for r in policy.rules if holds(r.condition)), None)
        rules = rules_for(variant, packet)
        kept = next((r.name for r in rules if r.condition is None or holds(r.condition)), None)
        assert kept == first, text
        changes = [u.span for u in policy.updates if u.field.get(packet) is not None
                   and holds(u.condition)]  # fmt: skip
        left = [u.span for u in variant.updates if u.field.get(packet) is not None
                and holds(u.condition)]  # fmt: skip
        assert left == changes, text


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(situations(UNDRAWN))
def test_step_asks_the_checked_policy(situation: tuple[str, list[Packet], int]) -> None:
    text, several, _ = situation
    policy = policy_of(text)
    if policy is None:
        return
    simple = simplify(policy, Findings())
    whole = State(policy)
    simpler = {id(v): State(replace(policy, rules=v.rules), whole.sets) for v in simple.variants}
    for other in simpler.values():
        other.flows = whole.flows  # what one logs, the other one sees
    number = count()
    for packet in several * 3:
        now = float(next(number)) / 4
        if simple.reassembled and packet.fragment_offset:
            continue  # there is none behind connection tracking
        simple_state = simpler[id(variant_for(simple, packet))]
        copies = [copy(packet), copy(packet)]
        # Asked first, logged once.
        closures = _Closures(simple_state, None)
        name = None
        if closures.interest is None or closures.interest(copies[0], now):
            name = next(
                (r.name for ask, r in closures.rules if ask is None or ask(copies[0], now)), None
            )
        assert whole.step(copies[1], now).name == name, text
