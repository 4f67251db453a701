"""Simplifying keeps the meaning: random conditions over random packets."""

from dataclasses import replace
from itertools import count

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from itmlang import ir
from itmlang.diagnostics import CompileError, Findings, render
from itmlang.packet import Header, Packet
from itmlang.pipeline import analyse
from itmlang.semantics import Entry, State, _Evaluation, step
from itmlang.simplify import Simplified, Variant, simplify
from itmlang.source import Source
from tests.support.frames import shaped

SHAPES = {
    4: ("", "", "", "options", "fragment", "first-fragment", "short"),
    6: ("", "", "", "hop-by-hop", "both-options", "fragment", "first-fragment", "short"),
}
LEAVES = (
    "family == ipv4", "family != ipv6", "family in { ipv4, ipv6 }",
    "protocol == tcp", "protocol != udp", "protocol in { icmp, udp, 58 }", "protocol > 16",
    "saddr == 10.0.0.1", "saddr != { 10.0.0.0/30, fd00::2 }", "saddr in fd00::/126",
    "saddr in { 0.0.0.0/0 }", "daddr in { 10.0.0.2-10.0.0.3, fd00::1 }", "daddr != 10.0.0.1",
    "sport == 1", "sport != { 1, 3 }", "sport <= 2", "sport >= 0", "sport > 3", "sport in 0-65535",
    "dport in { 1-2, 80 }", "dport != 80", "dport < 0", "dport >= 2", "dport == 3",
    'in == "eth0"', 'in != "eth*"', 'in in { "eth0*", "lo" }', 'in in "*"', 'in != "eth0"',
    'in != { "*" }', 'out == "eth1"', 'out != "e*"', 'out in { "eth0", "eth1" }',
    "length > 60", "length <= 40", "ttl == 64", "ttl < 5", "ttl != { 1-63 }",
    "tos == 0", "tos in 0x10-0x1f", "dscp == ef", "dscp >= 10", "ecn != 0", "mark == 1", "mark > 1",
    "tcp.flags == syn", "tcp.flags != { ack, syn }", "tcp.flags has fin",
    "tcp.flags has { syn, rst }", "tcp.flags in 0-255",
    "f.packets > 1", "f.packets <= 1", "f.packets == 0", "f.packets != 2", "f.packets in { 0, 3-4 }",
    "f.packets >= 0", "f.packets < 0", "f.bytes > 100", "f.bytes <= 200", "f.bytes < 1",
    "g.packets > 0", "g.packets <= 2", "g.bytes >= 100", "g.packets >= 0",
    "n.packets == 0", "n.packets > 0", "n.packets >= 0",
)  # fmt: skip
INTERESTS = (
    "", "", "protocol tcp", "protocol { tcp, udp }", "not protocol tcp", "family ipv4",
    "family ipv6", "not family ipv6", "saddr 10.0.0.0/24", "not saddr { 10.0.0.1, fd00::1 }",
    "daddr fd00::/64", "sport 0-3", "not sport { 2 }", "dport { 1, 80 }", 'in "eth*"',
    'not in "eth0"', "protocol icmp", "not dport 80 protocol udp", "protocol { icmpv6, sctp }",
)  # fmt: skip
# Which hooks, and the interfaces that a packet there can have.
PLACES = (
    ("prerouting", ({"input": "eth0"}, {"input": "eth1"}, {"input": "lo"})),
    ("forward", ({"input": "eth0", "output": "eth1"}, {"input": "eth1", "output": "eth0"})),
    ("postrouting", ({"output": "eth1"}, {"input": "eth0", "output": "eth1"}, {"output": "x"})),
    ("output", ({"output": "eth1"}, {"output": "lo"})),
    ("forward, postrouting", ({"input": "eth0", "output": "eth1"},)),
)
KEYS = ("saddr", "sport", "saddr, dport", "dport, sport", "protocol", "connection", "family, sport")

leaves = st.sampled_from(LEAVES)
conditions = st.recursive(
    leaves,
    lambda inner: st.one_of(
        inner.map(lambda c: f"not ({c})"),
        st.lists(inner, min_size=2, max_size=3).map(lambda cs: "(" + " and ".join(cs) + ")"),
        st.lists(inner, min_size=2, max_size=3).map(lambda cs: "(" + " or ".join(cs) + ")"),
    ),
    max_leaves=8,
)


@st.composite
def packets(draw: st.DrawFn, interfaces: tuple[dict[str, str], ...]) -> Packet:
    family = draw(st.sampled_from((4, 6)))
    icmp = 1 if family == 4 else 58
    base = 0x0A000000 if family == 4 else 0xFD00 << 112
    protocol = draw(st.sampled_from((6, 6, 17, icmp, 132, 47)))
    port = st.sampled_from((0, 1, 2, 3, 80, 65535))
    ends = [(family, base + draw(st.integers(1, 4))) for _ in range(2)]
    header = Header(
        protocol, ends[0], ends[1], draw(port), draw(port),
        flags=draw(st.sampled_from((None, 0, 1, 2, 4, 16, 18, 255))),
        tos=draw(st.sampled_from((0, 1, 0x10, 0xB8, 0xFF))),
        ttl=draw(st.sampled_from((1, 4, 63, 64))),
        length=draw(st.sampled_from((None, 100))),
    )  # fmt: skip
    data = shaped(bytes(header.build().data), draw(st.sampled_from(SHAPES[family])))
    mark = draw(st.integers(0, 2))
    return Packet(bytearray(data), mark=mark, **draw(st.sampled_from(interfaces)))


def policy_of(text: str) -> ir.Policy | None:
    try:
        return analyse(Source("random", text)).policies[0]
    except CompileError as error:
        codes = {d.code for d in error.diagnostics if d.is_error}
        assert codes <= {"E030"}, "\n".join([text, *map(render, error.diagnostics)])
        return None


@st.composite
def situations(draw: st.DrawFn) -> tuple[str, list[Packet], list[tuple[int, int]]]:
    hook, interfaces = draw(st.sampled_from(PLACES))
    rules = [f"c{n} when {draw(conditions)}" for n in range(draw(st.integers(1, 3)))]
    text = f"""policy p {{
        at {hook}
        interest {{ {draw(st.sampled_from(INTERESTS))} }}
        flow f by {draw(st.sampled_from(KEYS))}
        flow g by {draw(st.sampled_from(KEYS))}
        flow n by {draw(st.sampled_from(KEYS))}
        classify {{ {" ".join(rules)} }}
        log {{ count f count g }}
    }}"""
    several = draw(st.lists(packets(interfaces), min_size=1, max_size=6))
    logged = draw(
        st.lists(st.tuples(st.integers(0, 5), st.integers(0, 300)), min_size=2, max_size=2)
    )
    return text, several, logged


def with_counts(policy: ir.Policy, packet: Packet, logged: list[tuple[int, int]]) -> State:
    """A state in which the packet's flows have these counts; what is never counted has none."""
    state = State.of(policy)
    for name, (number, size) in zip(("f", "g"), logged, strict=True):
        table = state.flows[name]
        key = table.key(packet)
        if key is not None:
            found = table.entries.setdefault(packet.family if table.flow.by_address else 0, {})
            found[key] = Entry(number, size, 0.0)
    return state


def variant_for(simple: Simplified, packet: Packet) -> Variant:
    """What is left of a policy for the packet: later fragments may have their own."""
    later = packet.fragment_offset and simple.fragments is not None
    return simple.fragments if later else simple.whole


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(situations())
def test_simplifying_keeps_the_meaning(
    situation: tuple[str, list[Packet], list[tuple[int, int]]],
) -> None:
    text, several, logged = situation
    policy = policy_of(text)
    if policy is None:
        return
    simple = simplify(policy, Findings())
    for packet in several:
        variant = variant_for(simple, packet)
        asked = _Evaluation(with_counts(policy, packet, logged), packet, 0.0, None)
        wanted = asked.holds(policy.interest)
        assert asked.holds(variant.interest) == wanted, f"interest of {text}"
        if not wanted:
            continue
        first = next((r.name for r in policy.rules if asked.holds(r.condition)), None)
        kept = next(
            (r.name for r in variant.rules if r.condition is None or asked.holds(r.condition)),
            None,
        )
        assert kept == first, text


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(situations())
def test_step_asks_the_checked_policy(
    situation: tuple[str, list[Packet], list[tuple[int, int]]],
) -> None:
    text, several, _ = situation
    policy = policy_of(text)
    if policy is None:
        return
    simple = simplify(policy, Findings())
    states, number = [State.of(policy), State.of(policy)], count()
    for packet in several * 3:
        now = float(next(number))
        rules = variant_for(simple, packet).rules
        simpler = replace(policy, rules=rules)
        outcomes = [
            step(
                p, s, Packet(bytearray(packet.data), packet.input, packet.output, packet.mark), now
            )
            for p, s in zip((policy, simpler), states, strict=True)
        ]
        assert outcomes[0].name == outcomes[1].name, text
