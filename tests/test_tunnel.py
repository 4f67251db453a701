"""IPv4 within IPv4: each answer, against scapy, there and back, and cut at every byte."""

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_Router_Alert

from itmlang.packet import Packet, internet_checksum
from itmlang.tunnel import (
    Expired,
    Refused,
    TooBig,
    Tunnel,
    decapsulate,
    fragmentation_needed,
    time_exceeded,
)

NEAR, FAR, ROUTER = 0x0A02_0001, 0x0A03_0002, 0x0A01_0002
TUNNEL = Tunnel(NEAR, FAR)
ENDS = {"src": "10.1.0.1", "dst": "10.4.0.2"}


def ip(payload: Any = None, **fields: Any) -> bytes:
    return bytes(
        IP(**(ENDS | fields)) / (UDP(sport=1, dport=2) / b"12345" if payload is None else payload)
    )


def sealed(data: bytes | bytearray) -> bytes:
    """The packet, its header checksum made right after a change."""
    size = (data[0] & 15) * 4
    data = bytearray(data)
    data[10:12] = bytes(2)
    data[10:12] = internet_checksum(data[:size]).to_bytes(2)
    return bytes(data)


def outer(inner: bytes, **fields: Any) -> bytes:
    ends = {"src": "10.2.0.1", "dst": "10.3.0.2", "proto": 4, "ttl": 64}
    return bytes(IP(**(ends | fields)) / inner)


packets = st.builds(
    lambda tos, identity, flags, offset, ttl, options, payload, source: sealed(
        IP(
            src=source, dst="10.4.0.2", tos=tos, id=identity, flags=flags, frag=offset, ttl=ttl,
            proto=17, options=[IPOption_Router_Alert()] * options,
        ).build() + payload
    ),
    st.integers(0, 255), st.integers(0, 0xFFFF), st.sampled_from((0, 1, 2)),
    st.sampled_from((0, 0, 185, 8191)), st.integers(2, 255), st.integers(0, 10),
    st.binary(max_size=64), st.sampled_from(("10.1.0.1", "192.0.2.255", "255.255.255.254")),
)  # fmt: skip


def whole(data: bytes) -> bytes:
    """With the total length of what is there."""
    return sealed(data[:2] + len(data).to_bytes(2) + data[4:])


@given(packets.map(whole), st.booleans())
def test_the_outer_header_is_scapys(inner: bytes, forwarded: bool) -> None:
    made = TUNNEL.encapsulate(inner, 1500, forwarded)
    assert isinstance(made, bytes)
    read = IP(inner)
    carried = bytearray(inner)
    carried[8] -= forwarded
    identity = (read.id + read.frag * 8) & 0xFFFF
    assert made == outer(
        sealed(carried), tos=read.tos, id=identity,
        flags=2 if read.flags.DF or read.flags.MF or read.frag else 0,
        ttl=65 if forwarded else 64,
    )  # fmt: skip


@given(packets.map(whole), st.booleans())
def test_what_went_in_comes_out(inner: bytes, forwarded: bool) -> None:
    made = TUNNEL.encapsulate(inner, 1500, forwarded)
    assert isinstance(made, bytes)
    back = decapsulate(made)
    assert isinstance(back, bytes)
    packet = Packet(bytearray(back))
    if forwarded:
        packet.set_ttl(packet.ttl + 1)
    # One of the two ways to write a checksum of zero is as good as the other.
    assert sealed(packet.data) == inner


def test_siblings_among_fragments_get_identifications_of_their_own() -> None:
    """All have the same; if their outer packets are fragmented, parts must not be mixed."""
    made = [TUNNEL.encapsulate(ip(id=7, flags=1, frag=at), 1500, True) for at in (0, 1, 185, 8191)]
    assert [IP(one).id for one in made if isinstance(one, bytes)] == [7, 15, 1487, 65535]


def test_what_stands_behind_a_packet_stays_out() -> None:
    assert TUNNEL.encapsulate(ip() + b"padding", 1500, False) == outer(ip(), id=1, flags=0)


@pytest.mark.parametrize(
    ("length", "flags", "answer"),
    [(1480, "DF", bytes), (1481, "DF", TooBig(1480)), (1481, 0, bytes), (65515, 0, bytes)],
)
def test_a_packet_too_long(length: int, flags: Any, answer: Any) -> None:
    made = TUNNEL.encapsulate(ip(bytes(length - 20), flags=flags, proto=17), 1500, True)
    assert made == answer or (answer is bytes and isinstance(made, bytes))


def test_what_no_packet_can_carry_is_refused() -> None:
    made = TUNNEL.encapsulate(ip(bytes(65496), proto=17), 1500, True)
    assert isinstance(made, Refused) and "as long" in made.reason


@pytest.mark.parametrize("ttl", [0, 1])
def test_forwarding_ends_with_the_time_to_live(ttl: int) -> None:
    assert TUNNEL.encapsulate(ip(ttl=ttl), 1500, True) == Expired()


def test_a_packet_of_ours_may_live_one_hop_but_not_none() -> None:
    assert TUNNEL.encapsulate(ip(ttl=1), 1500, False) == outer(ip(ttl=1), id=1)
    made = TUNNEL.encapsulate(ip(ttl=0), 1500, False)
    assert isinstance(made, Refused) and "zero" in made.reason


@pytest.mark.parametrize(
    ("inner", "forwarded", "word"),
    [
        (ip(src="10.3.0.2"), True, "other end"),
        (ip(src="10.3.0.2"), False, "other end"),
        (ip(src="10.2.0.1"), True, "this end"),
        (outer(ip()), False, "before"),
        (outer(ip()), True, "this end"),
    ],
)
def test_loops_are_refused(inner: bytes, forwarded: bool, word: str) -> None:
    made = TUNNEL.encapsulate(inner, 1500, forwarded)
    assert isinstance(made, Refused) and word in made.reason


def test_other_tunnels_and_our_own_packets_are_no_loops() -> None:
    for inner in (ip(src="10.2.0.1"), outer(ip(), dst="10.9.0.1"), ip(dst="10.3.0.2")):
        assert isinstance(TUNNEL.encapsulate(inner, 1500, False), bytes)


@pytest.mark.parametrize("first", [0x00, 0x44, 0x50, 0x60, 0xF5])
def test_what_is_not_ipv4_is_refused(first: int) -> None:
    made = TUNNEL.encapsulate(bytes([first]) + ip()[1:], 1500, True)
    assert isinstance(made, Refused) and "IPv4" in made.reason


# RFC 6040 figure 4, rows: the inner ECN, columns: the outer one; None is a drop.
ECN = {0: (0, 0, 0, None), 2: (2, 1, 2, 3), 1: (1, 1, 1, 3), 3: (3, 3, 3, 3)}


@pytest.mark.parametrize("ours", range(4))
@pytest.mark.parametrize("theirs", range(4))
def test_congestion_is_told(ours: int, theirs: int) -> None:
    inner = ip(tos=0xB8 | ours, options=[IPOption_Router_Alert()])
    found = decapsulate(outer(inner, tos=theirs))
    wanted = ECN[ours][theirs]
    if wanted is None:
        assert isinstance(found, Refused) and "6040" in found.reason
    else:
        assert found == ip(tos=0xB8 | wanted, options=[IPOption_Router_Alert()])


def test_options_and_padding_of_the_outer_packet_go() -> None:
    data = outer(ip(), options=[IPOption_Router_Alert()] * 3) + b"padding"
    assert decapsulate(data) == ip()


def test_what_stands_behind_the_inner_packet_goes() -> None:
    assert decapsulate(outer(ip() + b"more")) == ip()


def broken(data: bytes, offset: int, value: bytes, *, seal: bool = True) -> bytes:
    changed = data[:offset] + value + data[offset + len(value) :]
    return sealed(changed) if seal else changed


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"\x65" + outer(ip())[1:], "carries one"),
        (ip(), "carries one"),
        (broken(outer(ip()), 2, b"\xff\xff"), "carries one"),
        (broken(outer(ip()), 2, b"\x00\x13"), "carries one"),
        (outer(ip(), flags=1), "fragment"),
        (outer(ip(), frag=1), "fragment"),
        (broken(outer(ip()), 8, b"\x07", seal=False), "checksum is wrong"),
        (outer(b""), "what it carries"),
        (outer(ip()[:19]), "what it carries"),
        (outer(b"\x60" + ip()[1:]), "what it carries"),
        (outer(b"\x44" + ip()[1:]), "what it carries"),
        (outer(broken(ip(), 2, b"\x00\x13")), "what it carries"),
        (outer(broken(ip(), 2, b"\x00\xff")), "what it carries"),
        (outer(broken(ip(), 8, b"\x07", seal=False)), "inner packet is wrong"),
        (outer(ip(ttl=0)), "zero"),
    ],
)
def test_what_came_out_of_no_tunnel(data: bytes, word: str) -> None:
    found = decapsulate(data)
    assert isinstance(found, Refused) and word in found.reason


def test_cut_at_every_byte() -> None:
    packet = outer(ip(options=[IPOption_Router_Alert()]))
    for end in range(len(packet)):
        cut = packet[:end]
        assert isinstance(decapsulate(cut), Refused)
        assert isinstance(TUNNEL.encapsulate(cut, 1500, True), Refused)
        assert time_exceeded(cut, ROUTER) is None
        shorter = sealed(cut[:2] + end.to_bytes(2) + cut[4:]) if end >= 20 else cut
        assert isinstance(decapsulate(shorter), Refused)


@given(st.binary(max_size=120), st.booleans(), st.integers(88, 1500))
def test_noise_has_an_answer(data: bytes, forwarded: bool, mtu: int) -> None:
    assert isinstance(TUNNEL.encapsulate(data, mtu, forwarded), bytes | TooBig | Expired | Refused)
    assert isinstance(decapsulate(data), bytes | Refused)
    assert isinstance(fragmentation_needed(data, ROUTER, mtu), bytes | None)


# Errors.


def test_fragmentation_needed_is_scapys() -> None:
    packet = ip(TCP(sport=1, dport=2) / bytes(1460), flags="DF", id=9)
    head = IP(src="10.1.0.2", dst="10.1.0.1", tos=0xC0, ttl=64, id=9)
    wanted = head / ICMP(type=3, code=4, nexthopmtu=1480) / packet[:548]
    assert fragmentation_needed(packet, ROUTER, 1480) == bytes(wanted)
    assert len(bytes(wanted)) == 576


@pytest.mark.parametrize("size", [0, 1, 527, 528, 529])
def test_time_exceeded_is_scapys(size: int) -> None:
    packet = ip(bytes(size), proto=17, id=9) + b"padding"
    head = IP(src="10.1.0.2", dst="10.1.0.1", tos=0xC0, ttl=64, id=9)
    wanted = head / ICMP(type=11, code=0) / packet[: 20 + min(size, 528)]
    assert time_exceeded(packet, ROUTER) == bytes(wanted)


@pytest.mark.parametrize(
    "packet",
    [
        *(ip(ICMP(type=kind)) for kind in (3, 4, 5, 11, 12)),
        ip(b"", proto=1),
        ip(frag=1),
        *(ip(src=source) for source in ("0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255")),
        *(ip(dst=target) for target in ("224.0.0.1", "255.255.255.255")),
        b"\x44" + ip()[1:],
        struct.pack("!BBH", 0x45, 0, 400) + ip()[4:],
    ],
)
def test_some_packets_get_no_error(packet: bytes) -> None:
    assert time_exceeded(packet, ROUTER) is None
    assert fragmentation_needed(packet, ROUTER, 1480) is None


@pytest.mark.parametrize("packet", [ip(ICMP(type=8)), ip(ICMP(type=0)), ip(flags=1)])
def test_others_do(packet: bytes) -> None:
    assert time_exceeded(packet, ROUTER) is not None
