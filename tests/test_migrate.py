"""Carrying over: sums, what is left of thresholds, ages, expiry; without a kernel.

What the kernel does with a budget is acted out by the token bucket of `itmlang.rates`.
"""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from itmlang.nft.model import FlowSet
from itmlang.rates import Bucket
from itmlang.source import Source, Span
from runtime.listing import Element, milliseconds, read_elements
from runtime.migrate import Contents, Kept, Left, Move, corrections, fitting

SPAN = Span(Source("a.itm", "text"), 0, 4)
SECONDS = {"week": 604_800, "day": 86_400, "hour": 3_600, "minute": 60, "second": 1}
PATH = "inet itm_watch"


def flow_set(role: str, key: tuple[str, ...] = ("saddr",), **more: object) -> FlowSet:
    known = {
        "name": f"flow_f_{role}", "policy": "watch", "flow": "f", "role": role, "family": 4,
        "key": key, "types": ("x",) * len(key), "expression": "x", "size": 1000,
        "timeout": 60_000, "span": SPAN,
    }  # fmt: skip
    return FlowSet(**{**known, **more})  # type: ignore[arg-type]


COUNTS = flow_set("count")


def contents(move: Move, elements: list[Element], more: tuple[Move, ...] = ()) -> Contents:
    return Contents([move, *more], lambda path, name: elements)


def budgets(threshold: int, attribute: str, elements: list[Element]) -> dict[tuple, str]:
    """The statement of each element in a set of budgets, from the command."""
    target = flow_set("meter", attribute=attribute, threshold=threshold)
    move = Move(PATH, target, "budget", ((PATH, COUNTS),))
    found = {}
    for command in contents(move, elements).commands(move):
        for text in re.findall(r"(?:\{|,) ([^,]*?)(?= [,}]|,| \})", command):
            key, statement = re.fullmatch(r"(\S+) (limit .*?)(?: timeout .*)?", text).groups()
            found[key,] = statement
    return found


def bucket(statement: str) -> Bucket:
    found = re.fullmatch(
        r"limit rate over (?P<amount>\d+)(?P<bytes> bytes)?/(?P<unit>\w+)"
        r" burst (?P<burst>\d+) (?:packets|bytes)",
        statement,
    )
    assert found is not None, statement
    # What nftables takes as it stands: for none it puts 5, and it cuts off larger ones.
    assert 0 < int(found["burst"]) < 2**32
    one = Bucket(
        int(found["amount"]), SECONDS[found["unit"]], bool(found["bytes"]), int(found["burst"])
    )
    assert one.tokens < 2**63  # the kernel compares signed numbers
    return one


# What is left of a threshold.


@given(st.integers(1, 2**32 - 1), st.integers(0, 2**33))
def test_what_is_left_of_packets_is_the_difference(threshold, packets):
    statement = budgets(threshold, "packets", [Element(("10.0.0.1",), packets, 7)])[("10.0.0.1",)]
    one = bucket(statement)
    if packets >= threshold:
        assert one.over(20, 0.0)
        assert one.over(20, 1e6)
    else:
        assert one.tokens // (SECONDS[statement.split("/")[1].split()[0]] * 10**9) == (
            threshold - packets
        )


@given(st.integers(0, 40), st.integers(0, 40))
def test_the_packet_after_the_threshold_is_the_first_that_is_over(threshold, packets):
    one = bucket(budgets(threshold, "packets", [Element(("a",), packets, 0)])[("a",)])
    passed = [one.over(1500, n * 0.001) for n in range(50)]
    left = max(0, threshold - packets)
    assert passed == [False] * left + [True] * (50 - left)


@given(
    st.integers(0, 5000), st.integers(0, 5000), st.lists(st.integers(20, 65535), max_size=30)
)  # fmt: skip
def test_bytes_run_out_with_the_packet_that_goes_beyond(threshold, size, packets):
    """As a quota does; what the same packet takes is no longer asked then."""
    one = bucket(budgets(threshold, "bytes", [Element(("a",), 0, size)])[("a",)])
    total = size
    for length in packets:
        total += length
        over = one.over(length, 0.0)
        assert over == (total > threshold)
        if over:
            break


@given(st.integers(0, 2**45), st.integers(0, 2**45))
def test_no_budget_of_bytes_is_more_than_the_kernel_can_count(threshold, size):
    found = budgets(threshold, "bytes", [Element(("a",), 0, size)])
    if threshold - size > 2**32 - 1:
        assert found == {}  # it begins with the whole threshold
    else:
        one = bucket(found["a",])
        # The largest packet costs less than what 64 bits hold, so it cannot seem to be free.
        assert one._length * 2**19 < 2**63
        left = max(0, threshold - size)
        assert one.over(left + 1, 0.0) or left < 2


@pytest.mark.parametrize(
    ("threshold", "unit"),
    [(1, "week"), (15_250, "week"), (15_251, "day"), (106_751, "day"), (106_752, "hour"),
     (2_562_047, "hour"), (2_562_048, "minute"), (2**32 - 1, "second")],
)  # fmt: skip
def test_budgets_refill_as_slowly_as_the_kernel_allows(threshold, unit):
    (statement,) = budgets(threshold, "packets", [Element(("a",), 0, 0)]).values()
    assert statement == f"limit rate over 1/{unit} burst {threshold} packets"


@given(
    st.integers(0, 30),
    st.lists(st.integers(0, 60), max_size=9),
    st.sampled_from(["packets", "bytes"]),
)
def test_over_are_those_beyond_the_threshold(threshold, totals, attribute):
    elements = [Element((str(n),), t, t) for n, t in enumerate(totals)]
    target = flow_set("over", attribute=attribute, threshold=threshold)
    move = Move(PATH, target, "over", ((PATH, COUNTS),))
    found = contents(move, elements).of(PATH, target.name)
    assert [e.key for e in found] == [e.key for e in elements if e.packets > threshold]


def test_a_threshold_follows_from_counts_that_are_carried_over_themselves():
    finer = flow_set("count", ("saddr", "dport"), name="finer")
    summing = Move(PATH, COUNTS, "sum", ((PATH, finer),))
    target = flow_set("over", attribute="packets", threshold=4)
    move = Move(PATH, target, "over", ((PATH, COUNTS),))
    elements = [Element(("a", "1"), 3, 9), Element(("a", "2"), 2, 9), Element(("b", "1"), 4, 9)]
    assert [e.key for e in contents(move, elements, (summing,)).of(PATH, target.name)] == [("a",)]


# Sums.

_elements = st.dictionaries(
    st.tuples(st.sampled_from("abc"), st.sampled_from("123"), st.sampled_from("xy")),
    st.tuples(st.integers(0, 10**12), st.integers(0, 10**15), st.none() | st.integers(1, 60_000)),
).map(lambda found: [Element(key, p, b, None, e) for key, (p, b, e) in found.items()])


@given(_elements, st.permutations(("saddr", "dport", "out")), st.integers(1, 3))
def test_sums_by_any_part_of_the_key_keep_the_total(elements, order, many):
    key = tuple(order[:many])
    source = flow_set("count", ("saddr", "dport", "out"))
    move = Move(PATH, flow_set("count", key), "sum", ((PATH, source),))
    found = contents(move, elements).of(PATH, move.target.name)
    assert sum(e.packets for e in found) == sum(e.packets for e in elements)
    assert sum(e.bytes for e in found) == sum(e.bytes for e in elements)
    places = [source.key.index(name) for name in key]
    groups = {tuple(e.key[place] for place in places) for e in elements}
    assert sorted(e.key for e in found) == sorted(groups)
    for one in found:
        members = [e for e in elements if tuple(e.key[p] for p in places) == one.key]
        times = [e.expires for e in members]
        assert one.expires == (None if None in times else max(times))  # type: ignore[type-var]


def test_sums_take_both_families():
    dump = {"ip": [Element(("10.0.0.1", "5"), 2, 58)], "ip6": [Element(("fd00::1", "5"), 3, 180)]}
    sources = tuple((PATH, flow_set("count", ("saddr", "dport"), name=name)) for name in dump)
    move = Move(PATH, flow_set("count", ("dport",)), "sum", sources)
    found = Contents([move], lambda path, name: dump[name]).of(PATH, move.target.name)
    assert found == [Element(("5",), 5, 238)]


# Sizes and times.


@given(_elements, st.integers(1, 30), st.sampled_from([None, 1, 500, 60_000, 10**9]))
def test_fitting_never_exceeds_the_set(elements, size, timeout):
    target = flow_set("count", size=size, timeout=timeout)
    found = fitting(elements, target)
    assert len(found) == min(size, len(elements))
    assert {e.key for e in found} <= {e.key for e in elements}
    for one in found:
        assert timeout is None or one.expires is None or one.expires <= timeout
    # Those that stay live at least as long as any that goes.
    kept = {e.key for e in found}
    forever = 2**63
    left = [e.expires or forever for e in elements if e.key not in kept]
    assert not left or min(e.expires or forever for e in elements if e.key in kept) >= max(left)


@given(_elements, st.integers(1, 100_000))
def test_no_element_outlives_its_time_out(elements, timeout):
    """The kernel refuses what expires later than its time-out."""
    for role in ("count", "learned"):
        target = flow_set(role, ("a", "b", "c"), timeout=timeout)
        known = elements if role == "count" else [replace(e, timeout=60_000) for e in elements]
        known += [replace(e, timeout=None, key=(*e.key[:2], "z")) for e in elements]
        move = Move(PATH, target, "copy", ((PATH, target),))
        for command in contents(move, known).commands(move):
            times = re.findall(r"timeout (\w+)(?: expires (\w+))?", command)
            assert len(times) == len(command.split(", "))
            for own, left in times:
                assert not left or 1 <= milliseconds(left) <= milliseconds(own)


def test_many_elements_go_in_several_commands():
    elements = [Element((str(n),), n, n) for n in range(1001)]
    move = Move(PATH, flow_set("count", size=5000), "copy", ((PATH, COUNTS),))
    commands = contents(move, elements).commands(move)
    assert [len(command.split(", ")) for command in commands] == [500, 500, 1]
    text = "elements = {" + ", ".join(c.split("{ ")[1].rstrip(" }") for c in commands) + " }"
    assert [(e.key, e.packets, e.bytes) for e in read_elements(text)] == [
        (e.key, e.packets, e.bytes) for e in elements
    ]


# Ages.


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.lists(st.integers(1, 10**6), max_size=9))
def test_ages_go_on(old, new, left):
    """A flow of an age is young by the new measure exactly as long as that says."""
    source = flow_set("young", name="old", timeout=old, threshold=old, attribute="age")
    target = flow_set("young", timeout=new, threshold=new, attribute="age")
    young = [Element((str(n),), expires=min(time, old)) for n, time in enumerate(left)]
    move = Move(PATH, target, "age", ((PATH, source),))
    found = {e.key: e.expires for e in contents(move, young).of(PATH, target.name)}
    ages = {e.key: old - (e.expires or 0) for e in young}
    assert found == {key: new - age for key, age in ages.items() if age < new}


def test_where_no_age_was_measured_all_begin():
    target = flow_set("young", timeout=5000, threshold=5000)
    move = Move(PATH, target, "begin", ((PATH, COUNTS),))
    found = contents(move, [Element(("a",), 3, 9, None, 55)]).of(PATH, target.name)
    assert [(e.key, e.expires) for e in found] == [(("a",), None)]


# What a generation had learned, later.


@given(_elements, st.integers(0, 70_000))
def test_what_would_have_expired_meanwhile_is_gone(elements, passed):
    left = Left({(PATH, "s"): Kept(("saddr",), tuple(elements))}, {(PATH, "c"): (3, 4)})
    later = left.later(passed)
    assert later.counters == left.counters
    kept = later.sets[PATH, "s"]
    assert kept.key == ("saddr",)
    assert kept.elements == tuple(
        replace(e, expires=None if e.expires is None else e.expires - passed)
        for e in elements
        if e.expires is None or e.expires > passed
    )


# Flows that got packets while their threshold moved.


def test_corrections_are_for_those_that_moved_alone():
    target = flow_set("meter", attribute="packets", threshold=5)
    move = Move(PATH, target, "budget", ((PATH, COUNTS),))
    before = [Element(("a",), 1, 9), Element(("b",), 2, 9)]
    now = [Element(("a",), 1, 9), Element(("b",), 3, 9), Element(("c",), 1, 9)]
    commands, late = corrections(move, before, now)
    assert late == 2
    at = f"element {PATH} {target.name}"
    assert commands == [
        f"add {at} {{ b }}", f"delete {at} {{ b }}",
        f"add {at} {{ b limit rate over 1/week burst 2 packets timeout 1m }}",
        f"add {at} {{ c }}", f"delete {at} {{ c }}",
        f"add {at} {{ c limit rate over 1/week burst 4 packets timeout 1m }}",
    ]  # fmt: skip
    assert corrections(move, now, now) == ([], 0)


def test_corrections_latch_those_that_went_over():
    target = flow_set("over", attribute="packets", threshold=2)
    move = Move(PATH, target, "over", ((PATH, COUNTS),))
    before = [Element(("a",), 1, 9), Element(("b",), 2, 9)]
    now = [Element(("a",), 2, 9), Element(("b",), 3, 9)]
    commands, late = corrections(move, before, now)
    assert (commands, late) == ([f"add element {PATH} {target.name} {{ b timeout 1m }}"], 2)
