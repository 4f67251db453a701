"""Tables lead to the very class that comes first, whatever the packet.

Random policies of many classes, over random packets: the steps are followed as the kernel
follows what they become, and held against the classes in their order. ITM_EXAMPLES makes the
search longer.
"""

import os
from collections.abc import Callable, Sequence
from random import Random

import pytest

from itmlang import ir
from itmlang.diagnostics import Findings
from itmlang.dispatch import OPTIMISATIONS, Ask, Common, Crossing, Step, Table, dispatch
from itmlang.fields import ANY_FAMILY
from itmlang.packet import Packet
from itmlang.pipeline import analyse, compile
from itmlang.semantics import _Closures
from itmlang.simplify import simplify
from itmlang.source import Source
from tests.support.kernel import placed
from tests.support.language import LEAVES, SETS, Chance, Wants, placed_here
from tests.test_simplify import NOW, after_much, rules_for, variant_for

POLICIES = int(os.environ.get("ITM_EXAMPLES", "300"))
PLAIN = Wants(False, False, False, False)
Holds = Callable[[ir.Condition], bool]


def policy(random: Chance) -> ir.Policy:
    here = tuple(leaf for leaf in LEAVES if not leaf.startswith("in "))
    rules = " ".join(random.many(here))
    interest = random.choice(("", "protocol tcp", "family ipv4", "saddr 10.0.0.0/24", "dport 0-80"))
    text = f"""{SETS} policy p {{
        at forward interest {{ {interest} }}
        flow f by saddr flow g by saddr, dport flow n by sport
        classify {{ {rules} }} log {{ count f count g }}
        update {{ add saddr to @met when ttl == 3 }} }}"""
    return analyse(Source("random", placed_here(text))).policies[0]


class Followed:
    """A packet on its way through the steps."""

    def __init__(self, packet: Packet, holds: Holds) -> None:
        self.packet, self.holds = packet, holds
        self.lookups = 0

    def first(self, steps: Sequence[Step]) -> ir.ClassRule | None:
        for step in steps:
            found = self._at(step)
            if found is not None:
                return found
        return None

    def _at(self, step: Step) -> ir.ClassRule | None:
        match step:
            case Ask():
                return step.first.rule if all(map(self.holds, step.first.terms)) else None
            case Common():
                return self.first(step.body.steps) if self.holds(step.term) else None
            case Crossing():
                known = [tables for tables in step.fields if any(map(self._knows, tables))]
                aside = self.first(step.steps) if len(known) > 1 else None
                return aside or self.first(step.tables)
            case Table():
                self.lookups += 1
                body = self._piece(step) if all(map(self.holds, step.terms)) else None
                return None if body is None else self.first(body)

    def _knows(self, table: Table) -> bool:
        return self._piece(table) is not None and all(map(self.holds, table.terms))

    def _piece(self, table: Table) -> Sequence[Step] | None:
        value = table.field.get(self.packet)
        if isinstance(value, tuple):
            family, value = value
            if family != table.family:
                return None
        if value is None or table.family not in (ANY_FAMILY, self.packet.family):
            return None
        if isinstance(value, int):
            value = value >> table.bits << table.bits
        there = [p.body.steps for p in table.pieces if p.low <= value <= p.high]  # type: ignore[operator]
        assert len(there) < 2, "pieces are disjoint"
        return there[0] if there else None


@pytest.mark.parametrize(
    "passes",
    [OPTIMISATIONS, ("tables",), ("tables", "crossings"), ("tables", "buckets"), ("common",), ()],
)
def test_the_first_class_is_found(passes: tuple[str, ...]) -> None:
    tables = crossings = commons = found = 0
    for seed in range(POLICIES if passes == OPTIMISATIONS else POLICIES // 4):
        random = Chance(seed)
        one = policy(random)
        simple = simplify(one, Findings())
        made = {}
        for _ in range(12):
            packet = placed(Packet(bytearray(random.packet(PLAIN, "forward"))), "forward")
            packet.mark = random.randint(0, 2)
            variant = variant_for(simple, packet)
            closures = _Closures(after_much(one, packet, Random(seed)), None)
            closures.section = "classify"

            def holds(
                condition: ir.Condition, of: _Closures = closures, packet: Packet = packet
            ) -> bool:
                return of.predicate(condition)(packet, NOW)

            if not holds(one.interest):
                continue
            rules = rules_for(variant, packet)
            asked = [rule for rule in rules if rule.condition is not None]
            if id(variant) not in made:
                made[id(variant)] = dispatch(asked, variant.facts, passes)
            steps = made[id(variant)]
            wanted = next((r for r in asked if r.condition is None or holds(r.condition)), None)
            assert Followed(packet, holds).first(steps) is wanted, (seed, one.span.source.text)
            found += wanted is not None
            tables += any(isinstance(step, Table) for step in steps)
            crossings += any(isinstance(step, Crossing) for step in steps)
            commons += any(isinstance(step, Common) for step in steps)
    assert found > 100
    assert bool(tables) == ("tables" in passes)
    assert bool(crossings) == ("crossings" in passes)
    assert bool(commons) == ("common" in passes)


# Shapes of classes, some of them bad for tables.
SHAPES = {
    "nested, with more to ask": lambda n: f"dport in 1-{n + 2} and ttl == {n % 250}",
    "nested from both ends": lambda n: f"dport in {n + 1}-{65_000 - n}",
    "overlapping": lambda n: f"daddr in 10.0.0.{n % 200}-10.{n % 250}.{n // 250}.9 and length > {n}",
    "alternating": lambda n: f"{('saddr', 'daddr')[n % 2]} == 10.0.{n // 250}.{n % 250}",
    "four fields": lambda n: (
        f"{('saddr', 'daddr')[n % 2]} in 10.{n // 250}.{n % 250}.0/24"
        if n % 4 < 2
        else f"{('sport', 'dport')[n % 2]} in {3 * n + 1}-{3 * n + 2} or mark == {n}"
    ),
    "one host, many ports": lambda n: f"saddr == 10.0.0.{n % 7} and dport in {20 * n}-{20 * n + 17}",
    "all but one": lambda n: f"saddr != 10.0.{n // 250}.{n % 250} and dport == {n + 1}",
    "hosts in a network": lambda n: f"daddr in 10.{n % 3}.0.0/16 or saddr == 10.0.{n // 250}.{n % 250}",
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_rules_and_elements_grow_with_the_classes(shape: str) -> None:
    def size(classes: int) -> int:
        rules = " ".join(f"c{n} when {SHAPES[shape](n)}" for n in range(classes))
        text = f"policy p {{ at forward classify {{ {rules} }} }}"
        (table,) = compile(Source("size.itm", text)).ruleset.tables
        return sum(len(chain.rules) for chain in table.chains) + sum(
            len(one.elements) for one in table.values
        )

    few, many = size(150), size(1200)
    assert many < 8 * few * 1.6, (few, many)
    assert many < 1200 * 30, many


def test_a_policy_too_deep_for_tables_goes_without() -> None:
    def maps(depth: int) -> int:
        inside = "mark == {n}"
        for n in range(depth):
            inside = f"(ttl == {n} or (length > {n} and {inside}))"
        rules = " ".join(
            f"c{n} when saddr == 10.0.0.{n % 4} and daddr == 10.0.0.{n // 4 % 4} "
            f"and dport == {n // 16} and {inside.format(n=n)}"
            for n in range(64)
        )
        text = f"policy p {{ at forward, postrouting classify {{ {rules} }} }}"
        (table,) = compile(Source("deep.itm", text)).ruleset.tables
        return sum(bool(one.verdicts) for one in table.values)

    assert maps(9) == 1 + 4 + 16
    assert maps(11) == 0


CONTROLLED = """policy p(threshold: packets = 10, edge: number = 10) {{
    at output
    flow conn by saddr, sport, daddr, dport
    classify {{
        a when dport == 1
        b when dport == 2 and conn.packets < threshold
        c when dport == 3
        d when dport in 4-50
        e when mark == edge
    }}
    log {{ count conn }}
    control {{ {} every 1s toward a.rate = 5 packets/s with pi kp 1 ki 1 within 2-20 }}
}}"""


@pytest.mark.parametrize("parameter, maps", [("threshold", 1), ("edge", 0)])
def test_what_a_controller_moves_is_looked_up_where_the_values_stay(
    parameter: str, maps: int
) -> None:
    compiled = compile(Source("control.itm", CONTROLLED.format(parameter)))
    (table,) = compiled.ruleset.tables
    assert sum(bool(one.verdicts) for one in table.values) == maps
    assert table.controllers[0].sites
