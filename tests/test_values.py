"""Sets of values against Python's sets."""

from hypothesis import given
from hypothesis import strategies as st

from itmlang.values import Addresses, InexpressibleError, Names, Ranges

LIMIT = 20
intervals = st.lists(st.tuples(st.integers(-3, LIMIT + 5), st.integers(-3, LIMIT + 5)), max_size=6)


def members(ranges: Ranges) -> set[int]:
    return {n for n in range(-2, LIMIT + 3) if n in ranges}


def plain(pairs: list[tuple[int, int]]) -> set[int]:
    return {n for lo, hi in pairs for n in range(max(lo, 0), min(hi, LIMIT) + 1)}


def canonical(ranges: Ranges) -> bool:
    """Sorted, none empty, none touching the next."""
    flat = [n for span in ranges.spans for n in span]
    gaps = zip(ranges.spans, ranges.spans[1:], strict=False)
    return flat == sorted(flat) and all(a[1] + 1 < b[0] for a, b in gaps)


@given(intervals)
def test_ranges_hold_their_intervals(pairs: list[tuple[int, int]]) -> None:
    ranges = Ranges.of(LIMIT, pairs)
    assert members(ranges) == plain(pairs)
    assert canonical(ranges)
    assert ranges.empty == (not plain(pairs))
    assert ranges.full == (len(plain(pairs)) == LIMIT + 1)


@given(intervals, intervals)
def test_ranges_are_sets(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    left, right = Ranges.of(LIMIT, a), Ranges.of(LIMIT, b)
    for found, wanted in (
        (left.union(right), plain(a) | plain(b)),
        (left.intersection(right), plain(a) & plain(b)),
        (left.complement(), set(range(LIMIT + 1)) - plain(a)),
    ):
        assert members(found) == wanted
        assert canonical(found)
    assert left.complement().complement() == left


@given(intervals, intervals, st.sampled_from((4, 6)), st.integers(0, LIMIT))
def test_addresses_are_two_sets(
    a: list[tuple[int, int]], b: list[tuple[int, int]], family: int, value: int
) -> None:
    left = Addresses.of([(4, max(lo, 0), hi) for lo, hi in a])
    right = Addresses.of([(6, max(lo, 0), hi) for lo, hi in b])
    host = (family, value)
    assert (host in left.union(right)) == (host in left or host in right)
    assert (host in left.complement()) != (host in left)
    assert left.intersection(right).empty


patterns = st.frozensets(
    st.sampled_from(("eth0", "eth1", "eth*", "eth0*", "e*", "lo", "wlan*")), max_size=3
)
names = st.builds(Names, patterns, st.booleans())


@given(names, names, st.sampled_from(("eth0", "eth1", "eth01", "eth2", "e", "lo", "wlan0", "x")))
def test_names_are_sets(a: Names, b: Names, name: str) -> None:
    assert (name in a.complement()) != (name in a)
    try:
        assert (name in a.intersection(b)) == (name in a and name in b)
        assert (name in a.union(b)) == (name in a or name in b)
    except InexpressibleError:
        pass  # told, and the caller keeps the two apart


@given(names)
def test_names_know_when_they_are_all_or_none(a: Names) -> None:
    probes = ("eth0", "eth7", "lo", "wlan0", "e", "zz")
    assert not a.empty or not any(name in a for name in probes)
    assert not a.full or all(name in a for name in probes)
