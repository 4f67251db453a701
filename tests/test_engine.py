"""The engine by itself: packets and marks in, answers and effects out, and a clock that we turn."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.packet import Raw

from itmlang import marks
from itmlang.headers import Packet
from itmlang.nft.model import TRACKED
from itmlang.pipeline import compile
from itmlang.source import Source
from runtime.engine import ACCEPT, DROP, Answer, Engine, Log, Send
from runtime.handlers import Class, Handler, HungError, Verdict

OUTPUT, FORWARD, PREROUTING = 3, 2, 0
UDP_PACKET = bytes(IP(src="10.0.0.1", dst="10.0.0.2", ttl=9) / UDP(sport=1, dport=2) / b"hello")
IPV6_PACKET = bytes(IPv6(src="fd00::1", dst="fd00::2") / TCP(sport=1, dport=2) / b"hello")
LARGE = bytes(IP(src="10.0.0.1", dst="10.0.0.2", flags="DF") / UDP() / bytes(1460))
# Bits of the mark that are none of the engine's.
OTHERS = 0x00AB_CDEF
TUNNEL = 0x3000_0000


class Paths:
    """Every way begins at 192.0.2.9 and takes `limit` bytes."""

    def __init__(self, limit: int = 1500) -> None:
        self.limit = limit

    def source(self, destination: int) -> int:
        return 0xC000_0209

    def mtu(self, destination: int, source: int = 0) -> int:
        return self.limit

    def towards(self, other: int) -> int:
        return 0xC000_0209


NAMES = {0: None, 1: "lo", 2: "eth0"}


def engine(
    text: str, paths: Paths | None = None, **functions: Callable[[Packet], object]
) -> Engine:
    """The engine of a policy's text, with handlers `m:NAME`."""
    (policy,) = (compiled := compile(Source("p.itm", text))).policies
    (queue,) = compiled.ruleset.tables[0].queues
    handlers = {f"m:{name}": Handler(f"m:{name}", one) for name, one in functions.items()}
    return Engine(policy, queue, handlers, paths or Paths(), NAMES)


def policy(process: str, more: str = "", classes: str = "a") -> str:
    return f"policy p {{ at output classify {{ {classes} }} process {{ {process} }} {more} }}"


def sent(
    one: Engine, data: bytes = UDP_PACKET, *, number: int = 1, mark: int = TUNNEL | OTHERS,
    hook: int = OUTPUT, length: int = 0, now: float = 1.0,
) -> Answer:  # fmt: skip
    """The answer to a packet with a number in its class bits."""
    return one.packet(data, mark | number << marks.CLASS_SHIFT, hook, 0, 2, length, now)


def number_of(mark: int) -> int:
    return (mark & marks.CLASS_BITS) >> marks.CLASS_SHIFT


def others(mark: int) -> int:
    return mark & ~marks.CLASS_BITS


def nothing(packet: Packet) -> None:
    pass


# What a handler says.


@pytest.mark.parametrize("said", [None, Verdict.ACCEPT, Verdict.MODIFIED])
def test_what_was_not_written_passes_as_it_is(said):
    one = engine(policy('a { call "m:f" }'), f=lambda packet: said)
    assert sent(one) == (ACCEPT, None, TUNNEL | OTHERS)


def test_a_handler_sees_the_packet_and_where_it_is():
    seen = []

    def f(packet: Packet) -> None:
        seen.append((packet.data, packet.mark, packet.input, packet.output, packet.hook))

    sent(engine(policy('a { call "m:f" }'), f=f))
    assert seen == [(UDP_PACKET, OTHERS, None, "eth0", "output")]


def test_what_was_written_goes_back():
    def f(packet: Packet) -> None:
        packet.ip.ttl -= 1

    verdict, data, mark = sent(engine(policy('a { call "m:f" }'), f=f))
    expected = IP(UDP_PACKET)
    expected.ttl, expected.chksum = 8, None
    assert (verdict, bytes(data or b""), mark) == (ACCEPT, bytes(expected), TUNNEL | OTHERS)


def test_a_drop_keeps_the_mark_and_is_counted():
    one = engine(policy('a { call "m:f" }'), f=lambda packet: Verdict.DROP)
    assert sent(one) == (DROP, None, TUNNEL | OTHERS)
    assert (one.counts.packets, one.counts.dropped) == (1, 1)


PARTS = {
    "a call": 'a { call "m:f" }',
    "a call first": 'a { call "m:f" set ttl 7 }',
    "a call last": 'a { call "m:g" call "m:f" }',
    "a call of a limit": 'a { limit 1/h burst 1 else { call "m:f" } call "m:f" }',
}


@pytest.mark.parametrize("part", PARTS)
def test_the_mark_is_written_but_for_what_is_itms_own(part):
    def f(packet: Packet) -> None:
        packet.mark = 0x42

    assert sent(engine(policy(PARTS[part]), f=f, g=nothing))[2] == TUNNEL | 0x42


@pytest.mark.parametrize("part", PARTS)
@given(mark=st.integers(0, marks.ALL))
def test_bits_of_others_stay(part, mark):
    one = engine_of(part)
    wanted = mark & ~marks.CLASS_BITS
    assert (
        one.packet(UDP_PACKET, wanted | 1 << marks.CLASS_SHIFT, OUTPUT, 0, 2, 0, 1.0)[2] == wanted
    )
    # A number that is nobody's: another program's packet, or of rules that are gone.
    for number in (0, 9, 15):
        found = one.packet(UDP_PACKET, wanted | number << marks.CLASS_SHIFT, OUTPUT, 0, 2, 0, 1.0)
        assert found == (ACCEPT, None, wanted)


_ENGINES: dict[str, Engine] = {}


def engine_of(part: str) -> Engine:
    return _ENGINES.setdefault(part, engine(policy(PARTS[part]), f=nothing, g=nothing))


def test_a_class_that_a_handler_names_has_its_actions_done():
    one = engine(
        policy(
            'a { call "m:f" } b { set ttl 3 } c { drop } d { }', classes="a b when ttl == 1 c d"
        ),
        f=lambda packet: Class(packet.payload.decode()),
    )
    verdict, data, mark = sent(one, bytes(IP(ttl=9) / UDP() / b"b"))
    assert (verdict, IP(data).ttl, mark) == (ACCEPT, 3, TUNNEL | OTHERS)
    assert sent(one, bytes(IP(ttl=9) / UDP() / b"c"))[0] == DROP
    assert sent(one, bytes(IP(ttl=9) / UDP() / b"d"))[:2] == (ACCEPT, None)
    assert (one.counts.failed, one.counts.dropped) == (0, 1)


def test_what_follows_a_call_is_done_behind_it():
    order = []

    def f(packet: Packet) -> None:
        order.append(packet.ip.ttl)

    one = engine(policy('a { call "m:f" set ttl 5 call "m:f" set mark 0x7 drop }'), f=f)
    assert sent(one) == (DROP, None, TUNNEL | OTHERS)
    assert order == [9, 5]


def test_a_reject_is_the_kernels_to_do():
    one = engine(policy('a { call "m:f" reject }'), f=nothing)
    verdict, _, mark = sent(one)
    assert (verdict, number_of(mark), others(mark)) == (ACCEPT, marks.MOST_NUMBERS, TUNNEL | OTHERS)


def test_classes_are_told_apart_by_their_numbers():
    one = engine(
        policy('a { call "m:f" } b { call "m:g" set ttl 4 }', classes="a when ttl == 1 b"),
        f=lambda packet: Verdict.DROP, g=nothing,
    )  # fmt: skip
    assert [name for name, _ in one.queue.entries] == ["a", "b"]
    assert [sent(one, number=number)[0] for number in (1, 2)] == [DROP, ACCEPT]
    assert IP(sent(one, number=2)[1]).ttl == 4


# Once per connection.

ONCE = policy(
    'a { call "m:f" once per connection set ttl 3 } b { set ttl 4 }', classes="a when ttl == 9 b"
)


@pytest.mark.parametrize(
    ("said", "mark", "decision"),
    [
        (None, None, "accept a"),
        (Verdict.ACCEPT, 0x42, "accept a marked"),
        (Class("a"), None, "accept a"),
        (Class("b"), None, "class b"),
        (Class("b"), 0x42, "class b marked"),
        (Verdict.DROP, None, "drop"),
    ],
)
def test_what_a_handler_decides_goes_to_the_kernel_as_a_number(said, mark, decision):
    def f(packet: Packet) -> object:
        if mark is not None:
            packet.mark = mark
        return said

    one = engine(ONCE, f=f)
    verdict, data, given = sent(one)
    number = len(one.queue.entries) + 1 + one.queue.decisions.index(decision)
    assert (verdict, data, number_of(given)) == (ACCEPT, None, number)
    assert others(given) == TUNNEL | (OTHERS if mark is None else mark)
    assert one.counts.dropped == (decision == "drop")


def test_a_decision_that_nobody_can_keep_is_a_failure():
    one = engine(
        policy(
            'a { call "m:f" once per connection } b { call "m:f" }', classes="a when ttl == 9 b"
        ),
        f=lambda packet: Class("b"),
    )
    assert sent(one) == (ACCEPT, None, TUNNEL | OTHERS)
    assert one.counts.failed == 1


# Handlers that misbehave.


def raises(packet: Packet) -> None:
    packet.ip.ttl = 1  # half done: the packet passes as it came
    packet.mark = 5
    raise ValueError("on purpose")


def leaves(packet: Packet) -> None:
    raise SystemExit(1)


def interrupts(packet: Packet) -> None:
    raise KeyboardInterrupt


def hangs(packet: Packet) -> None:
    raise HungError


def recurses(packet: Packet) -> None:
    recurses(packet)


def reads_too_far(packet: Packet) -> None:
    packet.data[10_000]


def writes_nonsense(packet: Packet) -> None:
    packet.ip.ttl = 300


BAD = {
    one.__name__: one
    for one in (raises, leaves, interrupts, hangs, recurses, reads_too_far, writes_nonsense)
} | {
    f"says {said!r}": (lambda packet, said=said: said)
    for said in (42, 0, False, "drop", Verdict, Class("nowhere"), [], object)
}


@pytest.mark.parametrize("mode", ["open", "closed"])
@pytest.mark.parametrize("part", ['a { call "m:f" }', 'a { call "m:f" set ttl 3 }', ONCE])
@pytest.mark.parametrize("bad", BAD)
def test_a_failure_costs_its_packet_and_is_counted(bad, part, mode):
    text = policy(part, f"fail {mode}") if part != ONCE else ONCE[:-1] + f"fail {mode} }}"
    one = engine(text, f=BAD[bad])
    for _ in range(2):
        assert sent(one) == (ACCEPT if mode == "open" else DROP, None, TUNNEL | OTHERS)
    assert (one.counts.failed, one.counts.hung) == ((0, 2) if bad == "hangs" else (2, 0))
    assert not one.inside
    assert one.calling == 2
    (first, second) = one.effects()
    assert first == second
    assert isinstance(first, Log)
    assert first.text.startswith("m:f took too long" if bad == "hangs" else "m:f failed: ")
    assert "\n" not in first.text
    one.reload({"m:f": Handler("m:f", nothing)})
    assert sent(one)[0] == ACCEPT


def test_failures_are_logged_at_a_bounded_rate():
    one = engine(policy('a { call "m:f" }'), f=raises)
    lines: list[str] = []
    for number in range(3000):
        sent(one, now=number / 1000)
        lines += [effect.text for effect in one.effects() if isinstance(effect, Log)]
    assert len(lines) == 15
    assert [line for line in lines if "held back" in line] == [lines[5], lines[10]]
    assert lines[5].endswith(" (995 more lines were held back)")
    assert one.counts.failed == 3000


def test_the_log_line_names_the_place_in_the_handler():
    one = engine(policy('a { call "m:f" }'), f=raises)
    sent(one)
    (line,) = one.effects()
    assert isinstance(line, Log)
    assert line.text.startswith("m:f failed: ValueError: on purpose (test_engine.py:")


# Packets of which not all is here.


def test_what_a_handler_wants_whole_is_cut_where_it_is_not():
    one = engine(policy('a { call "m:f" }', "fail closed"), f=nothing)
    assert sent(one, LARGE[:500], length=len(LARGE)) == (DROP, None, TUNNEL | OTHERS)
    assert one.unseen(TUNNEL | OTHERS | 1 << marks.CLASS_SHIFT) == (DROP, None, TUNNEL | OTHERS)
    assert (one.counts.cut, one.calling) == (2, 0)


def test_how_much_is_copied_follows_from_who_asks():
    def made(text: str, *handlers: Handler) -> tuple[bool, int]:
        (policy,) = (compiled := compile(Source("p.itm", text))).policies
        (queue,) = compiled.ruleset.tables[0].queues
        one = Engine(policy, queue, {h.target: h for h in handlers}, Paths(), NAMES)
        return one.reads, one.copy

    headers, short = Handler("m:f", nothing, 256, True), Handler("m:f", nothing, 500)
    whole = Handler("m:g", nothing)
    call = policy('a { call "m:f" }')
    both = policy('a { call "m:f" } b { call "m:g" }', classes="a when ttl == 1 b")
    assert made(call, headers) == (True, 256)
    assert made(call, short) == (False, 500)
    assert made(both, headers, whole) == (False, 65_535)
    assert made(both, short, whole) == (False, 65_535)
    assert made(policy('a { call "m:f" set ttl 3 }'), headers) == (False, 65_535)
    assert made(policy('a { call "m:f" }', "queues 1 copy 128 bytes"), whole_of("m:f")) == (
        True,
        128,
    )
    assert made(ONCE, whole_of("m:f"))[0]


def whole_of(target: str) -> Handler:
    return Handler(target, nothing)


def test_a_reloaded_handler_is_shown_what_it_asks_for_now():
    (policy_,) = (compiled := compile(Source("p.itm", policy('a { call "m:f" }')))).policies
    (queue,) = compiled.ruleset.tables[0].queues
    one = Engine(policy_, queue, {"m:f": Handler("m:f", nothing, 256, True)}, Paths(), NAMES)
    assert sent(one, LARGE[:256], length=len(LARGE))[0] == ACCEPT
    assert one.counts.cut == 0
    one.reload({"m:f": Handler("m:f", nothing)})
    sent(one, LARGE[:256], length=len(LARGE))
    assert one.counts.cut == 1


# Tunnels.


def test_a_packet_is_put_into_its_tunnel():
    one = engine(policy("a { encapsulate to 203.0.113.1 }", "run python"))
    verdict, data, mark = sent(one, hook=FORWARD, number=0)
    assert (verdict, mark) == (ACCEPT, TUNNEL | OTHERS)
    outer = IP(data)
    assert (outer.src, outer.dst, outer.proto) == ("192.0.2.9", "203.0.113.1", 4)
    assert bytes(outer.payload) == UDP_PACKET
    assert list(one.effects()) == []


def test_what_does_not_fit_is_told_to_its_sender():
    one = engine(policy("a { encapsulate to 203.0.113.1 }", "run python"), Paths(1400))
    assert sent(one, LARGE, hook=FORWARD, number=0)[0] == DROP
    (effect,) = one.effects()
    assert isinstance(effect, Send)
    error = IP(effect.packet)
    assert (error.dst, error[ICMP].type, error[ICMP].code, error[ICMP].nexthopmtu) == (
        "10.0.0.1", 3, 4, 1380,
    )  # fmt: skip
    assert one.counts.dropped == 1


def test_what_no_way_leads_to_is_refused_and_said():
    one = engine(policy("a { encapsulate to 203.0.113.1 }", "run python"), Paths(0))
    assert sent(one, number=0)[0] == DROP
    (effect,) = one.effects()
    assert isinstance(effect, Log)
    assert "did not go through its tunnel" in effect.text
    assert one.counts.refused == 1


def test_what_is_known_of_a_way_is_asked_again():
    paths = Paths(1500)
    one = engine(policy("a { encapsulate to 203.0.113.1 }", "run python"), paths)
    assert sent(one, bytes(IP(src="10.0.0.1") / UDP() / bytes(1300)), number=0)[0] == ACCEPT
    paths.limit = 700
    assert sent(one, UDP_PACKET, number=0, now=1.5)[0] == ACCEPT
    assert sent(one, LARGE, number=0, now=9.0)[0] == DROP


def test_a_packet_is_taken_out_of_its_tunnel():
    one = engine(policy("a { decapsulate }", "run python").replace("output", "prerouting"))
    nested = bytes(IP(src="203.0.113.1", dst="192.0.2.9", proto=4) / Raw(UDP_PACKET))
    verdict, data, _ = sent(one, nested, hook=PREROUTING, number=0)
    assert (verdict, bytes(data or b"")[20:]) == (ACCEPT, UDP_PACKET[20:])
    junk = bytes(IP(src="203.0.113.1", dst="192.0.2.9", proto=4) / Raw(b"junk"))
    assert sent(one, junk, hook=PREROUTING, number=0)[0] == DROP
    assert one.counts.refused == 1


# All of a policy.

WHOLE = """
policy p {
    at forward
    run python
    flow f by saddr, daddr
    interest { protocol udp }
    classify { few when f.packets <= 2  many }
    log { count f }
    process { few { set dscp ef } many { drop } }
}
"""


def test_a_whole_policy_runs_here_and_counts():
    one = engine(WHOLE)
    verdicts = [sent(one, hook=FORWARD, number=1)[0] for _ in range(5)]
    assert verdicts == [ACCEPT] * 3 + [DROP] * 2
    assert (one.state.packets, one.state.bytes["few"]) == (
        {"few": 3, "many": 2}, 3 * len(UDP_PACKET),
    )  # fmt: skip
    assert sent(one, IPV6_PACKET, hook=FORWARD) == (ACCEPT, None, TUNNEL | OTHERS)


def test_a_whole_policy_is_told_what_connection_tracking_says():
    one = engine("""
        policy p {
            at forward
            run python
            classify { new when ct.state == new  reply when ct.direction == reply  other }
            process { new { set ttl 1 } reply { set ttl 2 } other { set ttl 3 } }
        }
    """)
    for number, (state, direction) in enumerate(TRACKED, 1):
        _, data, mark = sent(one, hook=FORWARD, number=number)
        wanted = 1 if state == "new" else 2 if direction == "reply" else 3
        assert (IP(data).ttl, mark) == (wanted, TUNNEL | OTHERS), (state, direction)


# Whatever comes.

EVERY = {
    "call": policy('a { call "m:f" }'),
    "resume": policy('a { call "m:f" set ttl 3 set dport 7 }'),
    "limit": policy('a { limit 10/s burst 1 else { call "m:f" drop } call "m:f" }'),
    "once": ONCE,
    "moved": policy(
        'a { call "m:to_b" } b { set ttl 4 set tcp.mss 1000 }', classes="a when ttl == 9 b"
    ),
    "encapsulate": policy("a { encapsulate to 203.0.113.1 }", "run python"),
    "decapsulate": policy("a { decapsulate }", "run python").replace("output", "prerouting"),
    "whole": WHOLE,
    "closed": policy('a { call "m:f" }', "fail closed"),
}


def touches(packet: Packet) -> None:
    """Read and write whatever a packet has."""
    packet.ip.ttl = 7
    for one in (packet.tcp, packet.udp):
        if one is not None:
            one.source_port = 99
    packet.payload = packet.payload[::-1]


def to_b(packet: Packet) -> Class:
    packet.ip.ttl = 2
    return Class("b")


@dataclass
class Fuzzed:
    """An engine of each kind, made once."""

    made: Mapping[str, Engine] = field(
        default_factory=lambda: {
            name: engine(
                text, **{k: v for k, v in (("f", touches), ("to_b", to_b)) if f"m:{k}" in text}
            )
            for name, text in EVERY.items()
        }
    )


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Fuzzed]:
    yield Fuzzed()


GOOD = st.sampled_from([UDP_PACKET, IPV6_PACKET, LARGE, bytes(IP(proto=4) / IP() / TCP())])


@st.composite
def broken(draw: st.DrawFn) -> bytes:
    """A packet with some bytes changed, cut off or added; or anything."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=120))
    data = bytearray(draw(GOOD))
    for _ in range(draw(st.integers(0, 4))):
        # Mostly where headers are.
        data[draw(st.integers(0, min(len(data) - 1, draw(st.sampled_from([9, 40, 2000])))))] = draw(
            st.integers(0, 255)
        )
    return bytes(data[: draw(st.integers(0, len(data)))]) + draw(st.sampled_from([b"", b"more"]))


@settings(max_examples=1500, deadline=None)
@given(
    data=broken(), mark=st.integers(0, marks.ALL), hook=st.integers(0, 4),
    ends=st.tuples(st.integers(0, 2), st.integers(0, 2)), more=st.sampled_from([0, 0, 5000]),
)  # fmt: skip
def test_no_packet_comes_out_as_an_exception(fuzzed, data, mark, hook, ends, more):
    for one in fuzzed.made.values():
        verdict, new, given = one.packet(data, mark, hook, *ends, more, 1.0)
        assert verdict in (ACCEPT, DROP)
        assert new is None or (verdict == ACCEPT and new[:1])
        assert given & marks.TUNNEL_BITS == mark & marks.TUNNEL_BITS
        assert 0 <= given <= marks.ALL
        numbers = len(one.queue.entries) + len(one.queue.decisions)
        assert number_of(given) == 0 or len(one.queue.entries) < number_of(given) <= numbers
        assert not one.inside
        list(one.effects())
