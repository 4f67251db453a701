"""The model of connection tracking: what it says, how long connections live, its memory."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from itmlang.conntrack import NEW, Connection, Conntrack, Tracked
from itmlang.packet import MalformedError, Packet
from tests.support.connections import (
    ACK,
    FIN,
    GRE,
    HOPS_OF_THE_LOST,
    ICMP,
    ICMPV6,
    RST,
    SCRIPTS,
    SCTP,
    SYN,
    TCP,
    UDP,
    UDPLITE,
    Step,
    gre,
    icmp,
    said,
    script,
    sctp,
    tcp,
    udp,
)

THERE, BACK = (1000, 80), (80, 1000)
HANDSHAKE = [
    (">", TCP, tcp(THERE, SYN), "new"),
    ("<", TCP, tcp(BACK, SYN | ACK), "established reply"),
    (">", TCP, tcp(THERE, ACK), "established"),
]
FIN_THERE = (">", TCP, tcp(THERE, FIN | ACK), "established")
FIN_BACK = ("<", TCP, tcp(BACK, FIN | ACK), "established reply")
ACK_BACK = ("<", TCP, tcp(BACK, ACK), "established reply")
RST_BACK = ("<", TCP, tcp(BACK, RST | ACK), "established reply")


def run(conntrack: Conntrack, steps: list[Step], now: float = 0.0) -> Tracked:
    """All steps at one time; what was said of the last one."""
    for number, step in enumerate(steps):
        packet = Packet(bytearray(step.data))
        tracked = conntrack.track(packet, now)
        assert said(tracked) == step.said, f"packet {number}: {step.data.hex()}"
        if packet.ttl != HOPS_OF_THE_LOST:
            conntrack.confirm(tracked, now)
    return tracked


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name: str) -> None:
    run(Conntrack(), SCRIPTS[name])


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ([(">", UDP, udp(THERE), "new")], 30),
        ([(">", UDPLITE, udp(THERE), "new")], 30),
        ([(">", ICMP, icmp(8), "new")], 30),
        ([(">", GRE, gre(), "new")], 30),
        ([(">", GRE, gre(), "new"), *[("<", GRE, gre(), "established reply")] * 2], 180),
        ([(">", 50, b"", "new")], 600),
        ([(">", SCTP, sctp(THERE, 1), "new")], 10),
        (HANDSHAKE[:1], 120),
        (HANDSHAKE[:2], 60),
        (HANDSHAKE, 432_000),
        ([(">", TCP, tcp(THERE, ACK), "new")], 300),
        ([*HANDSHAKE, FIN_THERE], 120),
        ([*HANDSHAKE, FIN_THERE, ACK_BACK], 60),
        ([*HANDSHAKE, FIN_THERE, FIN_BACK], 30),
    ],
)
def test_lives_for(text: list[tuple[str, int, bytes, str]], seconds: int) -> None:
    conntrack = Conntrack()
    connection = run(conntrack, script(4, text), 100.0).connection
    assert connection is not None
    assert connection.alive(100 + seconds - 0.001)
    assert not connection.alive(100 + seconds)


def test_each_packet_renews_the_time() -> None:
    conntrack = Conntrack()
    for now in (0, 29, 58):
        tracked = run(conntrack, script(4, [(">", UDP, udp(THERE), "new")]), now)
    number = tracked.connection and tracked.connection.number
    tracked = run(conntrack, script(4, [(">", UDP, udp(THERE), "new")]), 88)
    assert tracked.connection and tracked.connection.number != number


def test_a_repeated_syn_renews_nothing() -> None:
    conntrack = Conntrack()
    for now in (0, 100):
        connection = run(conntrack, script(4, HANDSHAKE[:1]), now).connection
    assert connection is not None and not connection.alive(120)


def test_a_stream_of_udp_lives_longer() -> None:
    conntrack = Conntrack()
    steps = script(4, [(">", UDP, udp(THERE), "new"), ("<", UDP, udp(BACK), "established reply")])
    run(conntrack, steps)
    connection = run(conntrack, steps[1:], 2.0).connection
    assert connection is not None and not connection.alive(32)
    connection = run(conntrack, steps[1:], 2.1).connection
    assert connection is not None and connection.alive(122) and not connection.alive(122.1)


@pytest.mark.parametrize(
    "text",
    [
        [*HANDSHAKE, RST_BACK],
        [*HANDSHAKE[:1], RST_BACK],
        [*HANDSHAKE, FIN_THERE, FIN_BACK, ACK_BACK],
    ],
)
def test_a_closed_connection_is_not_alive(text: list[tuple[str, int, bytes, str]]) -> None:
    connection = run(Conntrack(), script(6, text)).connection
    assert connection is not None and not connection.alive(0)


def test_what_is_dropped_is_never_alive() -> None:
    conntrack = Conntrack()
    numbers = set()
    for _ in range(2):
        connection = run(conntrack, script(4, [("x", UDP, udp(THERE), "new")])).connection
        assert connection is not None and not connection.alive(0)
        numbers.add(connection.number)
    assert len(numbers) == 2 and len(conntrack) == 0


def test_both_directions_and_errors_have_one_connection() -> None:
    conntrack = Conntrack()
    numbers = set()
    for step in SCRIPTS["icmp errors 6"][1:3]:
        tracked = run(conntrack, [step])
        assert isinstance(tracked.connection, Connection)
        numbers.add(tracked.connection.number)
    assert len(numbers) == 1


def test_two_packets_before_the_first_is_confirmed() -> None:
    conntrack = Conntrack()
    (step,) = script(4, [(">", UDP, udp(THERE), "new")])
    first, second = (conntrack.track(Packet(bytearray(step.data)), 0) for _ in range(2))
    conntrack.confirm(first, 0)
    conntrack.confirm(second, 0)
    assert run(conntrack, [step]).connection is first.connection


def test_memory_is_bounded() -> None:
    conntrack = Conntrack()
    for number in range(50_000):
        text = [(">", UDP, udp((number, 80)), "new")]
        run(conntrack, script(4, text), number / 10)  # 300 of them are alive at a time
        assert len(conntrack) <= 2500


@given(
    st.binary(max_size=60),
    st.sampled_from((1, 6, 17, 44, 47, 51, 58, 59, 132, 136)),
    st.sampled_from((4, 6)),
)
def test_any_bytes_are_tracked(body: bytes, protocol: int, family: int) -> None:
    conntrack = Conntrack()
    (step,) = script(family, [(">", protocol, body, "")])
    for now in (0.0, 1.0):
        try:
            packet = Packet(bytearray(step.data))
        except MalformedError:
            return
        tracked = conntrack.track(packet, now)
        assert (tracked.connection is None) == (tracked.direction is None)
        conntrack.confirm(tracked, now)
        if tracked.state == NEW:
            assert len(conntrack) == 1


def test_errors_quoting_anything() -> None:
    conntrack = Conntrack()
    run(conntrack, script(4, [(">", UDP, udp(THERE), "new")]))
    whole = script(4, [(">", UDP, udp(THERE), "")])[0].data
    for size in range(len(whole)):
        expected = "related reply" if size >= 24 else "invalid"
        text = [("<", ICMP, icmp(11, payload=whole[:size]), expected)]
        run(conntrack, script(4, text))
    for protocol in (ICMP, ICMPV6):
        run(conntrack, script(6, [("<", protocol, icmp(3, payload=whole), "invalid")]))
