"""Probes on the wire: what is made is read, and nothing else is."""

import hashlib
import hmac
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.overlay.wire import (
    ANSWER,
    FORGED,
    LARGEST,
    MALFORMED,
    MOST_NEIGHBORS,
    MOST_PREFIXES,
    PROBE,
    SPAN,
    TRUNCATED,
    Message,
    RefusedError,
    Told,
    Window,
    contains,
    key_of,
    overlaps,
    pack,
    unpack,
)

KEY = b"a key of some length"
A, B, V = 0xC0000201, 0xC0000202, 0xC0000203
MESSAGE = Message(PROBE, A, B, V, 1_700_000_000_000_000, b"\x00\x01clock\xff")
TELLING = Message(
    ANSWER, B, A, 0, 7, b"12345678", told=Told(((10 << 24, 8), (B, 32)), (V, 0xFFFFFFFE))
)


@st.composite
def messages(draw: st.DrawFn) -> Message:
    addresses = draw(st.lists(st.integers(1, 2**32 - 1), min_size=3, max_size=3, unique=True))
    via = draw(st.sampled_from((0, addresses[2])))
    answers = draw(st.booleans())
    told = None
    if answers and draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, 32), max_size=MOST_PREFIXES))
        value = draw(st.integers(0, 2**32 - 1))
        told = Told(
            tuple((value >> (32 - n) << (32 - n), n) for n in lengths),
            tuple(draw(st.lists(st.integers(1, 2**32 - 1), max_size=MOST_NEIGHBORS))),
        )
    return Message(
        ANSWER if answers else PROBE, addresses[0], addresses[1], via,
        draw(st.integers(0, 2**64 - 1)), draw(st.binary(min_size=8, max_size=8)),
        not answers and draw(st.booleans()), told,
    )  # fmt: skip


def reason(data: bytes, key: bytes = KEY) -> str:
    with pytest.raises(RefusedError) as found:
        unpack(data, key)
    return found.value.reason


def signed(body: bytes) -> bytes:
    return body + hmac.new(KEY, body, hashlib.sha256).digest()[:16]


@settings(deadline=None)
@given(messages())
def test_what_is_packed_is_unpacked(message: Message) -> None:
    data = pack(message, KEY)
    assert len(data) <= LARGEST
    assert unpack(data, KEY) == message


def test_the_bytes_are_those_of_the_format() -> None:
    """By hand, so that two versions understand each other."""
    body = (
        b"itm\x01\x02\x01\x01\x01" + bytes.fromhex("c0000202 c0000201 00000000")
        + (7).to_bytes(8, "big") + b"12345678" + bytes.fromhex("0a000000 08 c0000203")
    )  # fmt: skip
    message = Message(ANSWER, B, A, 0, 7, b"12345678", told=Told(((10 << 24, 8),), (V,)))
    assert pack(message, KEY) == signed(body)


def test_as_much_as_can_be_told_fits() -> None:
    told = Told(tuple((n << 8, 24) for n in range(1, MOST_PREFIXES + 1)), (V,) * MOST_NEIGHBORS)
    assert len(pack(replace(TELLING, told=told), KEY)) <= LARGEST


@pytest.mark.parametrize("message", [MESSAGE, TELLING], ids=["probe", "answer"])
def test_each_truncation_is_told_from_the_rest(message: Message) -> None:
    data = pack(message, KEY)
    assert {reason(data[:length]) for length in range(len(data))} == {TRUNCATED}


@pytest.mark.parametrize("message", [MESSAGE, TELLING], ids=["probe", "answer"])
def test_each_flipped_bit_is_refused(message: Message) -> None:
    data = bytearray(pack(message, KEY))
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        assert reason(bytes(data)) in (FORGED, MALFORMED, TRUNCATED)
        data[bit // 8] ^= 1 << bit % 8
    unpack(bytes(data), KEY)


def test_another_key_is_forged() -> None:
    assert reason(pack(MESSAGE, b"another key, as long")) == FORGED
    assert reason(pack(MESSAGE, KEY)[:-16] + bytes(16)) == FORGED


@settings(deadline=None)
@given(st.binary(max_size=LARGEST + 1))
def test_random_bytes_are_refused(data: bytes) -> None:
    assert reason(data) in (TRUNCATED, FORGED, MALFORMED)


@settings(deadline=None)
@given(st.binary(max_size=80))
def test_random_bytes_under_a_good_tag_raise_nothing_else(rest: bytes) -> None:
    """A member that is broken, or of another version."""
    try:
        unpack(signed(b"itm\x01" + rest), KEY)
    except RefusedError as error:
        assert error.reason in (TRUNCATED, MALFORMED)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (3, b"\x02"),  # another version
        (4, b"\x03"),  # another kind
        (5, b"\x04"),  # an unknown flag
        (8, bytes(4)),  # nobody's
        (12, bytes(4)),  # to nobody
        (8, B.to_bytes(4, "big")),  # to its own sender
        (16, A.to_bytes(4, "big")),  # by way of its own sender
    ],
)  # fmt: skip
def test_nonsense_under_a_good_tag_is_malformed(at: int, value: bytes) -> None:
    body = bytearray(pack(MESSAGE, KEY)[:-16])
    body[at : at + len(value)] = value
    assert reason(signed(bytes(body))) == MALFORMED


def test_a_longer_datagram_is_malformed() -> None:
    assert reason(signed(pack(MESSAGE, KEY)[:-16] + b"\x00")) == MALFORMED


def test_host_bits_in_a_network_are_malformed() -> None:
    body = bytearray(pack(TELLING, KEY)[:-16])
    body[39] = 1  # 10.0.0.1/8
    assert reason(signed(bytes(body))) == MALFORMED


@pytest.mark.parametrize(
    "wrong",
    [
        replace(MESSAGE, sender=0), replace(MESSAGE, target=A), replace(MESSAGE, via=B),
        replace(MESSAGE, sequence=-1), replace(MESSAGE, sequence=2**64), replace(MESSAGE, echo=b""),
        replace(MESSAGE, kind=9), replace(MESSAGE, told=Told()), replace(TELLING, asks=True),
        replace(TELLING, told=Told(((1, 8),))), replace(TELLING, told=Told((), (0,))),
        replace(TELLING, told=Told((), (V,) * (MOST_NEIGHBORS + 1))),
    ],
)  # fmt: skip
def test_no_message_is_made_that_would_be_refused(wrong: Message) -> None:
    with pytest.raises(ValueError):
        pack(wrong, KEY)


@pytest.mark.parametrize("data", [b"", b" \n", b"short", b"  fifteen bytes..\n"])
def test_a_short_key_is_refused_with_what_to_do(data: bytes) -> None:
    with pytest.raises(ValueError, match="openssl rand"):
        key_of(data)


def test_white_space_around_a_key_is_none_of_it() -> None:
    assert key_of(b"\n sixteen bytes ok \n") == b"sixteen bytes ok"


# The window of sequence numbers.


def test_each_number_is_fresh_once() -> None:
    window = Window()
    order = [5, 3, 4, 9, 8, 5 + SPAN, 6 + SPAN]
    assert [window.fresh(n) for n in order] == [True] * len(order)
    assert [window.fresh(n) for n in order] == [False] * len(order)


def test_what_is_older_than_the_window_is_refused() -> None:
    window = Window()
    assert window.fresh(10 * SPAN)
    assert not window.fresh(9 * SPAN)
    assert not window.fresh(0)
    assert window.fresh(9 * SPAN + 1)


def test_a_restarted_sender_is_ahead_of_what_it_sent() -> None:
    window = Window()
    start = 1_700_000_000_000_000
    assert all(window.fresh(start + n) for n in range(2000))
    later = start + 3_000_000
    assert window.fresh(later) and not window.fresh(start + 1999)


@settings(deadline=None)
@given(st.lists(st.integers(0, 3 * SPAN) | st.integers(0, 2**64 - 1), max_size=200))
def test_the_window_is_a_set_of_the_last_numbers(numbers: list[int]) -> None:
    window, seen = Window(), set[int]()
    for number in numbers:
        expected = number not in seen and number > max(seen, default=-1) - SPAN
        assert window.fresh(number) == expected
        if expected:
            seen.add(number)


# Networks.


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 32), st.integers(0, 2**32 - 1), st.integers(0, 32))
def test_networks_as_the_library_has_them(a: int, n: int, b: int, m: int) -> None:
    one, other = (a >> (32 - n) << (32 - n), n), (b >> (32 - m) << (32 - m), m)
    real = IPv4Network(one)
    assert overlaps(one, other) == real.overlaps(IPv4Network(other))
    assert contains(one, b) == (IPv4Address(b) in real)
