"""Tables of classes -> verdict maps, and the chains that they lead to.

    map classes_1 { type ipv4_addr : verdict; elements = { 10.0.0.1 : goto class_a, … } }
    ip saddr vmap @classes_1

A piece with something left to ask is a chain; its packets come back where nothing holds
there. Which clauses become tables is decided elsewhere (`itmlang.dispatch`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from itmlang import ir, values
from itmlang.dispatch import (
    FEWEST,
    SINGLE,
    Ask,
    Body,
    Clause,
    Common,
    Crossing,
    Piece,
    Step,
    Table,
)
from itmlang.fields import ANY_FAMILY
from itmlang.nft import model
from itmlang.nft.match import FlowNames, Leaf, Lookup, element, matches
from itmlang.nft.model import Chain, ValueSet
from itmlang.simplify import Facts
from itmlang.source import Span

_FEW_RANGES: Final = 8  # that are found as quickly as a single value among many


@dataclass(frozen=True)
class Lowering:
    """What the lowering of a policy does for the tables of its classes.

    `further` makes a chain that continues one, `number` counts what a name begins; `emit`
    writes the rules for a condition: chain, condition, target, what falling through means
    ("" if nothing short does), label, facts; `rule` writes one as it is.
    """

    table: model.Table
    prefix: str
    names: FlowNames
    further: Callable[[Chain, Span], Chain]
    number: Callable[[str], int]
    rule: Callable[[Chain, str, Span, str], None]
    emit: Callable[[Chain, ir.Condition, str, str, str, Facts], None]
    bodies: dict[Body, Chain] = field(default_factory=dict)
    tables: dict[Table, str] = field(default_factory=dict)

    def steps(self, chain: Chain, steps: Sequence[Step], facts: Facts, fallback: str = "") -> None:
        """Write the steps into a chain; `fallback` is a verdict that means to fall through."""
        parts: list[list[Step]] = []
        for step in steps:
            last = parts[-1][-1] if parts else None
            if (
                isinstance(step, Ask)
                and isinstance(last, Ask)
                and last.first.rule is step.first.rule
            ):
                parts[-1].append(step)  # what is left of a rule is asked together again
            else:
                parts.append([step])
        for index, part in enumerate(parts):
            self._step(chain, part, facts, fallback if index == len(parts) - 1 else "")

    def _step(self, chain: Chain, part: Sequence[Step], facts: Facts, fallback: str) -> None:
        match part[0]:
            case Table() as table if len(table.pieces) < FEWEST and not table.bits:
                self._few(chain, table, facts)
            case Table() as table:
                self._look_up(chain, table, f"vmap @{self._map(table, chain)}", facts)
            case Crossing() as crossing:
                self._crossing(chain, crossing, facts)
            case Common() as common:
                inside = self.further(chain, common.first.rule.span)
                self.emit(chain, common.term, f"jump {inside.name}", "", "", facts)
                self.steps(inside, common.body.steps, common.body.facts, "return")
            case Ask():
                clauses = [step.first for step in part if isinstance(step, Ask)]
                rule = clauses[0].rule
                terms = tuple(map(_condition, clauses))
                condition = terms[0] if len(terms) == 1 else ir.Or(terms, rule.span)
                self.emit(chain, condition, self._target(rule), fallback, rule.name, facts)

    def _target(self, rule: ir.ClassRule) -> str:
        return f"goto {self.prefix}class_{rule.name}"

    def _few(self, chain: Chain, table: Table, facts: Facts) -> None:
        """A rule for each piece."""
        for piece in table.pieces:
            span = piece.body.steps[0].first.rule.span
            test = ir.Test(table.field, _values(table, piece), span)
            terms = [term for term in table.terms if isinstance(term, Leaf)]
            label = piece.body.steps[0].first.rule.name if piece.body.plain else ""
            for _, text in matches([*terms, test], facts, self.names):
                self.rule(chain, f"{text} {self._verdict(piece.body, chain)}", span, label)

    def _crossing(self, chain: Chain, crossing: Crossing, facts: Facts) -> None:
        """Packets in the tables of one field alone stay, those in several go aside."""
        span = crossing.first.rule.span
        aside = self.further(chain, span)
        fields = crossing.fields
        keys = {table: f"@{self._keys(table)}" for table in crossing.tables}
        for index, tables in enumerate(fields):
            known = chain
            if index < len(fields) - 1:
                known = self.further(chain, span)
                for table in tables:
                    self._look_up(chain, table, keys[table], facts, f"jump {known.name}")
                for other in (table for later in fields[index + 1 :] for table in later):
                    self._look_up(known, other, keys[other], facts, f"goto {aside.name}")
            for table in tables:
                self._step(known, [table], facts, "")
        self.steps(aside, crossing.steps, facts, "return")

    def _look_up(
        self, chain: Chain, table: Table, how: str, facts: Facts, ending: str = ""
    ) -> None:
        """A rule for packets that the table knows, or has among its keys."""
        terms: list[Leaf] = [term for term in table.terms if isinstance(term, Leaf)]
        terms.append(Lookup(table.field, how, table.bits))
        for _, text in matches(terms, _of_family(facts, table.family), self.names):
            self.rule(chain, f"{text} {ending}", table.first.rule.span, "")

    # Maps and sets.

    def _map(self, table: Table, chain: Chain) -> str:
        if table not in self.tables:
            name = f"{self.prefix}classes_{self.number('classes')}"
            self.tables[table] = name
            verdicts = [self._verdict(piece.body, chain) for piece in table.pieces]
            keys = [element(table.field, table.family, p.low, p.high) for p in table.pieces]
            self.table.values.append(
                ValueSet(
                    name, table.field.key_type(table.family), tuple(keys), table.first.rule.span,
                    interval=any(p.low != p.high for p in table.pieces),
                    verdicts=tuple(verdicts),
                    spans=tuple(p.body.steps[0].first.rule.span for p in table.pieces),
                )
            )  # fmt: skip
        return self.tables[table]

    def _verdict(self, body: Body, chain: Chain) -> str:
        if body.plain:
            return self._target(body.steps[0].first.rule)
        if body not in self.bodies:
            inside = self.further(chain, body.steps[0].first.rule.span)
            self.bodies[body] = inside
            self.steps(inside, body.steps, body.facts, "return")
        return f"{'goto' if body.decides else 'jump'} {self.bodies[body].name}"

    def _keys(self, table: Table) -> str:
        """The set of all that a table knows."""
        name = f"{self.prefix}keys_{self.number('keys')}"
        spans = _joined(table)
        keys = tuple(element(table.field, table.family, *_ends(one)) for one in spans)
        self.table.values.append(
            ValueSet(
                name, table.field.key_type(table.family), keys, table.first.rule.span,
                interval=any(low != high for low, high in map(_ends, spans)),
            )
        )  # fmt: skip
        return name


def _condition(clause: Clause) -> ir.Condition:
    return clause.terms[0] if len(clause.terms) == 1 else ir.And(clause.terms, clause.rule.span)


def _ends(one: Piece) -> tuple[int | str, int | str]:
    return one.low, one.high


def _joined(table: Table) -> list[Piece]:
    """The pieces of a table; where they touch made one, if few are left then."""
    found: list[Piece] = []
    for piece in table.pieces:
        last = found[-1] if found else None
        if last is not None and isinstance(last.high, int) and last.high + 1 == piece.low:
            found[-1] = replace(last, high=piece.high)
        else:
            found.append(piece)
    exact = all(piece.low == piece.high for piece in table.pieces)
    return list(table.pieces) if exact and (table.bits or len(found) > _FEW_RANGES or
        table.field.datatype in SINGLE) else found  # fmt: skip


def _of_family(facts: Facts, family: int) -> Facts:
    return facts if family == ANY_FAMILY else replace(facts, families=(family,))


def _values(table: Table, piece: Piece) -> values.ValueSet:
    """The values of a piece as a test has them."""
    if isinstance(piece.low, str) or isinstance(piece.high, str):
        return values.Names(frozenset({str(piece.low)}))
    if table.field.type.kind == "address":
        return values.Addresses.of([(table.family, piece.low, piece.high)])
    return values.Ranges.of(table.field.type.limit, [(piece.low, piece.high)])
