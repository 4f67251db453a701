"""A condition of size n becomes O(n) rules, whatever its shape; so does a policy."""

from collections.abc import Sequence
from random import Random

import pytest

from itmlang.nft import lower
from itmlang.pipeline import compile
from itmlang.source import Source
from tests.support.language import CLEAR, CONNECTIONS, LEAVES, SETS, TRACKED

# Rules and chains for each leaf, at most: two families, later fragments with rules of
# their own, and of a disjunction inside of a conjunction a chain with its way in and out.
MOST_EACH = 14
DRAWS = 4  # intervals of `random` in these tests: each has the rules again
POOL = LEAVES + CLEAR + TRACKED + CONNECTIONS
SHAPES = ("balanced", "left", "right", "alternating", "negated", "wide", "random")


def stubborn(number: int) -> tuple[str, list[str]]:
    """Sets, and as many tests that neither merge with each other nor contradict each other."""
    sets, leaves = [], []
    for n in range(number):
        sets += [
            f"set a{n}: address = {{ 10.{n // 250}.{n % 250}.1, fd00::{n + 1:x} }}",
            f"set p{n}: port = {{ {n + 1}, {40_000 + n} }}",
            f"set l{n}: address timeout 1m",
        ]
        leaves.append(
            (f"saddr in @a{n}", f"dport in @p{n}", f"daddr in @l{n}", f"sport != @p{n}",
             f"not saddr in @l{n}", f"not dport in @p{n}")[n % 6]
        )  # fmt: skip
    return "\n".join(sets), leaves


def grown(random: Random, shape: str, leaves: int, pool: Sequence[str]) -> str:
    """A condition of a shape with so many leaves, at most 50 levels deep."""
    parts = [random.choice(pool) for _ in range(leaves)] if len(pool) != leaves else list(pool)
    if shape == "wide":
        word = random.choice((" or ", " and "))
        return word.join(f"({a} or {b})" for a, b in zip(parts[::2], parts[1::2], strict=False))
    if shape == "balanced":
        word = " and "
        while len(parts) > 1:
            word = " or " if word == " and " else " and "
            parts = [f"({word.join(parts[i : i + 2])})" for i in range(0, len(parts), 2)]
        return parts[0]
    # Each level takes as many leaves as the depth demands.
    each = max(1, leaves // 45)
    text = parts.pop()
    level = 0
    while parts:
        taken, parts = parts[:each], parts[each:]
        word = (" and ", " or ")[level % 2 if shape != "random" else random.randint(0, 1)]
        inner = [text, *taken] if shape in ("left", "random") else [*taken, text]
        text = f"({word.join(inner)})"
        if shape == "negated" or (shape == "random" and random.random() < 0.4):
            text = f"not {text}"
        level += 1
    return text


def size(text: str) -> tuple[int, int]:
    """(rules and chains, characters) that a policy compiles to."""
    compiled = compile(Source("size.itm", text))
    (table,) = compiled.ruleset.tables
    rules = sum(len(chain.rules) + 1 for chain in table.chains)
    written = sum(len(rule.text) for chain in table.chains for rule in chain.rules)
    return rules, written


def policy(classify: str, update: str = "", sets: str = SETS) -> str:
    return (
        f"{sets} policy p {{ at forward flow f by saddr, dport flow g by sport flow n by saddr "
        f"classify {{ {classify} }} log {{ count f count g }} update {{ {update} }} }}"
    )


@pytest.fixture
def bottomless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the kernel's bound on nesting, which would refuse most of these."""
    monkeypatch.setattr(lower, "DEEPEST_CHAIN", 10_000)


@pytest.mark.usefixtures("bottomless")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_condition_is_linear(shape: str) -> None:
    random = Random(shape)
    base, _ = size(policy("c when ttl == 3"))
    for leaves in (10, 40, 160, 640):
        for _ in range(6 if leaves < 640 else 2):
            condition = grown(random, shape, leaves, POOL)
            flows = 60 * 4  # rules of the thresholds, which the pool bounds
            found, _ = size(policy(f"c when {condition}"))
            assert found <= base + flows + MOST_EACH * leaves, (shape, leaves)
            found, _ = size(policy("c", f"add saddr to @seen when {condition}"))
            assert found <= base + flows + MOST_EACH * leaves, (shape, leaves)


@pytest.mark.usefixtures("bottomless")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_condition_that_nothing_simplifies_is_linear(shape: str) -> None:
    random = Random(shape)
    for leaves in (9, 60, 300):
        sets, pool = stubborn(leaves)
        condition = grown(random, shape, leaves, pool)
        found, _ = size(policy(f"c when {condition}", "", sets))
        assert leaves / 2 < found < 60 + 6 * leaves, (shape, leaves)
        changes = f"add saddr to @l0 when {condition}"
        found, _ = size(policy("c", changes, sets))
        assert leaves / 2 < found < 60 + 6 * leaves, (shape, leaves)


@pytest.mark.usefixtures("bottomless")
@pytest.mark.parametrize("shape", SHAPES)
def test_draws_multiply_by_their_number_only(shape: str) -> None:
    random = Random(shape)
    drawn = ("random < 25%", "random < 50%", "random >= 75%")
    base, _ = size(policy("c when ttl == 3"))
    for leaves in (10, 40, 160):
        condition = grown(random, shape, leaves, POOL + drawn * 20)
        found, _ = size(policy(f"c when {condition}"))
        assert found <= base + 240 + DRAWS * (MOST_EACH * leaves + 4), (shape, leaves)


@pytest.mark.usefixtures("bottomless")
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_written_is_linear(shape: str) -> None:
    """A rule has at most a few matches, also behind merged tests."""
    random = Random(shape)
    for leaves in (40, 160, 640):
        _, written = size(policy(f"c when {grown(random, shape, leaves, POOL)}"))
        assert written < 40_000 + MOST_EACH * 150 * leaves, (shape, leaves)


def test_many_thresholds_of_a_flow_are_linear() -> None:
    def rules(number: int) -> int:
        spans = ", ".join(f"{10 * n}-{10 * n + 3}" for n in range(number))
        return size(policy(f"c when f.packets in {{ {spans} }} or f.bytes != {{ {spans} }}"))[0]

    few, more, most = rules(20), rules(40), rules(80)
    assert most - more == 2 * (more - few)


def test_many_classes_and_updates_are_linear() -> None:
    def rules(number: int) -> int:
        ask = "saddr == 10.0.{n}.1 and (dport == {n} or not sport == {n}) and f.packets > {n}"
        classes = " ".join(f"c{n} when {ask.format(n=n + 1)}" for n in range(number))
        updates = " ".join(f"add saddr to @seen when {ask.format(n=n + 1)}" for n in range(number))
        return size(policy(classes, updates))[0]

    few, more, most = rules(20), rules(40), rules(80)
    assert most - more == 2 * (more - few)
