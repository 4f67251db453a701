"""Classes that a packet is led to by look-ups, instead of being asked one after the other.

Rules of classes are broken up into clauses, conjunctions that lead to a class. Clauses that
test one field become a table: the field's values are cut into disjoint pieces, and each piece
has the clauses that can still hold there, the earlier first, up to one with nothing left to
ask. What a clause asks besides the field is left for the piece, where the same is done again:
a decision tree, the field that tells most clauses apart first.

The first clause that holds decides, whatever the tables. Where clauses by one field and by
another alternate, a packet may be in the tables of both, and the order between them counts.
Mostly it is in one alone, so that is asked first, by the sets of all their keys: a packet in
two of them meets the clauses again in blocks, each with tables of its own, down to blocks that
are asked one by one (`Crossing`). So a packet meets a number of look-ups that grows with the
logarithm of the clauses, and all tables together are as large as the clauses times that.

What no table can have (a negation, a flow's count, a named set) is asked where it stands.
"""

import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, pairwise
from typing import Final, TypeGuard

from itmlang import ir
from itmlang.fields import ANY_FAMILY, Field
from itmlang.simplify import Facts, conjuncts, disjuncts, is_positive, narrowed, shape
from itmlang.values import Addresses, Names, Ranges, intervals

# Each can be left out by itself: tables; ranges in them looked up by their upper bits; tables
# for clauses that alternate; conditions that many clauses have in common, asked once.
OPTIMISATIONS: Final = ("tables", "buckets", "crossings", "common")

# As many clauses make a table: fewer are as quick when they are asked one by one, and easier
# to read.
FEWEST: Final = 4
# Tables of one field behind each other, before clauses that alternate become a crossing.
_MOST_RUNS: Final = 4
# A block of a crossing that is asked one by one; into how many a larger one is divided.
_BLOCK: Final = 16
_BLOCKS: Final = 8
# Crossings inside each other, and tables inside each other: the kernel follows 16 jumps.
_DEEPEST: Final = 3
_NESTED: Final = 3
_FIELDS: Final = 4  # of the tables behind each other
# How often a clause stands in the pieces of a table, on the average.
_REPEATED: Final = 4
_WIDE: Final = 16  # pieces of one clause that make it a wide one, where that is too often

# nftables has maps of these, and intervals in them but for the last.
_TYPES: Final = ("ip_addr", "inet_service", "inet_proto", "ifname", "mark")
SINGLE: Final = ("ifname", "mark")
# As many ranges are worth to be looked up by their upper bits; in how many pieces each may be
# then, and for how many sizes of them that is tried.
_RANGES: Final = 12
_BUCKETS: Final = 16
_SIZES: Final = 8
_CHAIN: Final = 4  # elements that are as much as a chain
_NAMED: Final = 64  # values and intervals of a named set that are looked up one by one

Key = int | str


@dataclass(frozen=True)
class Clause:
    """Packets for which all terms hold belong to the class of the rule."""

    number: int  # its place among the clauses of all rules
    rule: ir.ClassRule
    terms: tuple[ir.Condition, ...]

    @cached_property
    def keys(self) -> "dict[Field, ir.Test]":
        """Its tests by which packets can be looked up, by their fields."""
        found: dict[Field, ir.Test] = {}
        for term in filter(_is_key, self.terms):
            found.setdefault(term.field, term)
        return found

    def without(self, term: ir.Condition, asked: Collection[object] = ()) -> "Clause":
        """What is left of the clause behind one of its terms, and others in the same form."""
        left = tuple(t for t in self.terms if t is not term)
        if asked:
            left = tuple(t for t in left if shape(t) not in asked)
        return Clause(self.number, self.rule, left)


@dataclass(frozen=True, eq=False)
class Ask:
    """A clause, asked where it stands."""

    first: Clause


@dataclass(frozen=True, eq=False)
class Body:
    """What a packet meets that is in a piece of a table; `facts` are those of such packets."""

    steps: tuple["Step", ...]
    facts: Facts

    @property
    def decides(self) -> bool:
        """Does every packet here get a class?"""
        last = self.steps[-1]
        return isinstance(last, Ask) and not last.first.terms

    @property
    def plain(self) -> bool:
        """Is there nothing to ask, for every packet here belongs to one class?"""
        return self.decides and len(self.steps) == 1


@dataclass(frozen=True)
class Piece:
    """The values of a field from `low` to `high` (or one name), and what is there."""

    low: Key
    high: Key
    body: Body


@dataclass(frozen=True, eq=False)
class Table:
    """Leads packets of a family for which the terms hold to the body for their field's value.

    Packets without the field, or in no piece, go on; so do those for which nothing there holds.
    The lowest `bits` of the value do not count: they are clear in the pieces, which are single
    values then. `first` is the first clause that is led to, in each kind of step.
    """

    field: Field
    family: int
    terms: tuple[ir.Condition, ...]
    pieces: tuple[Piece, ...]
    first: Clause
    bits: int = 0


@dataclass(frozen=True, eq=False)
class Crossing:
    """Packets in the tables of one field meet those, packets in several fields' these steps."""

    tables: tuple[Table, ...]
    steps: tuple["Step", ...]

    @property
    def first(self) -> Clause:
        return self.steps[0].first

    @property
    def fields(self) -> list[list[Table]]:
        """The tables, field by field."""
        return [list(same) for _, same in groupby(self.tables, lambda table: table.field)]


@dataclass(frozen=True, eq=False)
class Common:
    """Packets for which the term holds meet these steps."""

    term: ir.Condition
    body: Body

    @property
    def first(self) -> Clause:
        return self.body.steps[0].first


Step = Ask | Table | Crossing | Common


def dispatch(
    rules: Sequence[ir.ClassRule], facts: Facts, optimisations: Collection[str]
) -> tuple[Step, ...]:
    """What leads packets with these facts to the first class whose condition holds.

    Each rule has a condition, in simple form. Without any of the `optimisations` all of
    them are asked in their order.
    """
    clauses: list[Clause] = []
    for rule in rules:
        assert rule.condition is not None
        # What needs chains of its own comes last.
        for term in sorted(disjuncts(rule.condition), key=lambda t: not is_positive(t)):
            clauses.append(Clause(len(clauses), rule, conjuncts(term)))
    return _Dispatching(frozenset(optimisations)).sequence(clauses, facts, ())


class _Dispatching:
    def __init__(self, optimisations: frozenset[str]) -> None:
        self.optimisations = optimisations
        # What was made for the same clauses behind the same tables is the same.
        self.bodies: dict[object, Body] = {}

    def sequence(
        self, clauses: Sequence[Clause], facts: Facts, behind: tuple[tuple[str, int], ...]
    ) -> tuple[Step, ...]:
        """The steps for clauses that stand `behind` tables of other fields."""
        steps: list[Step] = []
        fields = self._fields(clauses, facts) if len(behind) < _NESTED else {}
        for has_field, part in groupby(clauses, lambda c: c.number in fields):
            if has_field:
                steps += self._part(list(part), fields, facts, behind, _DEEPEST)
            else:
                steps += map(Ask, part)
        return tuple(self._common(steps, facts) if "common" in self.optimisations else steps)

    # Which field leads to a clause.

    def _fields(self, clauses: Sequence[Clause], facts: Facts) -> dict[int, Field]:
        """The field by which a clause is looked up, by its number; not all have one."""
        found: dict[int, Field] = {}
        if "tables" not in self.optimisations or len(clauses) < FEWEST:
            return found
        asked: dict[Field, list[Clause]] = {}
        for clause in clauses:
            for one in clause.keys:
                asked.setdefault(one, []).append(clause)
        for _ in range(_FIELDS):
            left = {f: [c for c in a if c.number not in found] for f, a in asked.items()}
            by_worth = {f: _worth(f, some) for f, some in left.items()}
            best = max(by_worth, key=lambda f: by_worth[f], default=None)
            if best is None or by_worth[best] < FEWEST - 2:
                break
            fitting = self._fitting(best, left[best], facts)
            if len(fitting) >= FEWEST:
                found.update((clause.number, best) for clause in fitting)
            del asked[best]
        return found

    @staticmethod
    def _fitting(field: Field, clauses: Sequence[Clause], facts: Facts) -> Sequence[Clause]:
        """Those of the clauses that a table can have without growing beyond all bounds."""
        families = _families(field, facts)
        most = _REPEATED * len(clauses) + _WIDE
        if all(_cut(field, family, clauses, most) is not None for family in families):
            return clauses
        wide = {number for f in families for number in _wide(field, f, clauses)}
        clauses = [clause for clause in clauses if clause.number not in wide]
        if all(_cut(field, family, clauses, most) is not None for family in families):
            return clauses
        return []

    # Tables.

    def _part(
        self,
        clauses: Sequence[Clause],
        fields: dict[int, Field],
        facts: Facts,
        behind: tuple[tuple[str, int], ...],
        deep: int,
    ) -> list[Step]:
        """The steps for clauses behind each other of which each has a field."""
        runs = [(f, list(run)) for f, run in groupby(clauses, lambda c: fields[c.number])]
        crossing = "crossings" in self.optimisations and deep
        if not crossing or len(runs) <= _MOST_RUNS or len(clauses) <= _BLOCK:
            steps: list[Step] = []
            for field, run in runs:
                if len(run) < FEWEST:
                    steps += map(Ask, run)
                else:
                    steps += self._tables(field, run, facts, behind)
            return steps
        by_field: dict[Field, list[Clause]] = {}
        for field, run in runs:
            by_field.setdefault(field, []).extend(run)
        tables = [t for f, some in by_field.items() for t in self._tables(f, some, facts, behind)]
        blocks = -(-len(clauses) // _BLOCK)
        if blocks > _BLOCKS:
            blocks = max(_BLOCKS, math.ceil(blocks ** (1 / deep)))
        size = -(-len(clauses) // blocks)
        inside: list[Step] = []
        for start in range(0, len(clauses), size):
            inside += self._part(clauses[start : start + size], fields, facts, behind, deep - 1)
        return [Crossing(tuple(tables), tuple(inside))]

    def _tables(
        self,
        field: Field,
        clauses: Sequence[Clause],
        facts: Facts,
        behind: tuple[tuple[str, int], ...],
    ) -> list[Table]:
        """The tables of a field, one for each family that spells it by itself."""
        found = []
        by_number = {clause.number: clause for clause in clauses}
        shared = _shared(field, clauses)
        forms = {shape(term) for term in shared}
        for family in _families(field, facts):
            pieces = []
            for low, high, numbers in _cut(field, family, clauses) or ():
                some = [by_number[number] for number in numbers]
                body = self._body(field, family, some, forms, facts, behind)
                pieces.append(Piece(low, high, body))
            if pieces:
                table = Table(field, family, shared, tuple(pieces), _first(pieces))
                found += self._divided(table, facts)
        return found

    def _divided(self, table: Table, facts: Facts) -> list[Table]:
        """The table; one of many ranges as tables of single values, where they are as large.

        Values are looked up by their upper bits alone, and what the lower ones tell apart is a
        small table behind that. What is too wide for it is left in a table of ranges.
        """
        ranges = [p for p in table.pieces if p.low != p.high]
        singles = [p for p in table.pieces if p.low == p.high]
        if "buckets" not in self.optimisations or not ranges or len(table.pieces) < _RANGES:
            return [table]
        bits = _bits(table.pieces)
        if bits is not None:
            return self._bucketed(table, bits, facts)
        if len(singles) < _RANGES:
            return [table]
        parts = [replace(table, pieces=tuple(p), first=_first(p)) for p in (singles, ranges)]
        return [parts[0], *self._divided(parts[1], facts)]

    @staticmethod
    def _bucketed(table: Table, bits: int, facts: Facts) -> list[Table]:
        """The pieces by their upper bits; those that are too wide by themselves."""
        test = ir.Test(table.field, table.field.type.everything, table.first.rule.span)
        inside = narrowed(test, facts)
        if table.family != ANY_FAMILY:
            inside = replace(inside, families=(table.family,))
        wide: list[Piece] = []
        buckets: dict[int, list[Piece]] = {}
        for piece in table.pieces:
            low, high = int(piece.low) >> bits, int(piece.high) >> bits
            if high - low >= _BUCKETS:
                wide.append(piece)
                continue
            for number in range(low, high + 1):
                buckets.setdefault(number, []).append(piece)
        found: list[Piece] = []
        for number, here in sorted(buckets.items()):
            low, high = number << bits, (number + 1 << bits) - 1
            body = here[0].body
            if len(here) > 1 or int(here[0].low) > low or int(here[0].high) < high:
                rest = Table(table.field, table.family, (), tuple(here), _first(here))
                body = Body((rest,), inside)
            found.append(Piece(low, low, body))
        exact = replace(table, pieces=tuple(found), bits=bits, first=_first(found))
        return [exact, replace(table, pieces=tuple(wide), first=_first(wide))] if wide else [exact]

    def _body(
        self,
        field: Field,
        family: int,
        clauses: Sequence[Clause],
        asked: Collection[object],
        facts: Facts,
        behind: tuple[tuple[str, int], ...],
    ) -> Body:
        behind = (*behind, (field.name, family))
        key = (
            behind,
            tuple(c.number for c in clauses),
            tuple(len(c.terms) for c in clauses),
            frozenset(asked),
        )
        if key not in self.bodies:
            known = [c.keys[field] for c in clauses]
            inside = facts
            if family != ANY_FAMILY and facts.families != (family,):
                inside = replace(facts, families=(family,))
            if field.type.kind != "address":
                inside = narrowed(ir.And(tuple(known), clauses[0].rule.span), inside)
            left = [c.without(c.keys[field], asked) for c in clauses]
            self.bodies[key] = Body(self.sequence(left, inside, behind), inside)
        return self.bodies[key]

    # Conditions in common.

    def _common(self, steps: Sequence[Step], facts: Facts) -> list[Step]:
        """The steps, with what clauses behind each other have in common asked once for them."""
        found: list[Step] = []
        for asks, part in groupby(steps, lambda s: isinstance(s, Ask) and bool(s.first.terms)):
            some = list(part)
            if not asks or len(some) < FEWEST:
                found += some
                continue
            found += self._hoisted([s.first for s in some], facts)
        return found

    def _hoisted(self, clauses: Sequence[Clause], facts: Facts) -> Iterator[Step]:
        start = 0
        forms = [{shape(t): t for t in c.terms if _is_plain(t)} for c in clauses]
        while start < len(clauses):
            # The condition that most clauses from here on have.
            best, end = None, start + 1
            for form in forms[start]:
                stop = start
                while stop < len(clauses) and form in forms[stop]:
                    stop += 1
                if stop > end:
                    best, end = form, stop
            if best is None or end - start < FEWEST:
                yield Ask(clauses[start])
                start += 1
                continue
            term = forms[start][best]
            inside = narrowed(term, facts)
            left = [c.without(forms[n][best]) for n, c in enumerate(clauses[start:end], start)]
            yield Common(term, Body(tuple(self._common([*map(Ask, left)], inside)), inside))
            start = end


def _first(pieces: Sequence[Piece]) -> Clause:
    """The first of all clauses that pieces lead to."""
    return min((p.body.steps[0].first for p in pieces), key=lambda clause: clause.number)


def _bits(pieces: Sequence[Piece]) -> int | None:
    """How many of the lowest bits are left out where ranges are looked up; None if that is worse."""
    spans = [(int(p.low), int(p.high)) for p in pieces]
    sizes = Counter((high - low + 1).bit_length() - 1 for low, high in spans)
    most = _REPEATED * len(spans) + 4 * _WIDE
    found: list[tuple[int, int]] = []
    for bits in sorted({0, *(size for size, _ in sizes.most_common(_SIZES))}):
        widths = [(high >> bits) - (low >> bits) + 1 for low, high in spans]
        narrow = [width for width in widths if width <= _BUCKETS]
        if len(narrow) < len(spans) - 2 - len(spans) // 32 or sum(narrow) > most:
            continue
        buckets = {
            number
            for (low, high), width in zip(spans, widths, strict=True)
            if width <= _BUCKETS
            for number in range(low >> bits, (high >> bits) + 1)
        }
        if sum(narrow) > 2 * len(buckets):
            continue
        # Where a range ends between two values with these bits clear, there is a chain.
        clear = (1 << bits) - 1
        chains = sum(bool(low & clear) + bool(high + 1 & clear) for low, high in spans)
        found.append((len(buckets) + _CHAIN * chains, bits))
    return min(found)[1] if found else None


# Tests as keys.


def _is_key(term: ir.Condition) -> TypeGuard[ir.Test]:
    """Can a packet that the test holds for be looked up by the test's field?"""
    if not isinstance(term, ir.Test) or term.field.datatype not in _TYPES:
        return False
    match term.values:
        case Names():
            plain = not term.values.inverted and not term.values.full
            return plain and not any(name.endswith("*") for name in term.values.patterns)
        case Ranges() if term.field.datatype in SINGLE:
            return all(low == high for low, high in term.values.spans)
        case _:
            return term.named is None or len(list(intervals(term.values))) <= _NAMED


def _is_plain(term: ir.Condition) -> bool:
    """Is it one test that must hold, of the packet or of a learned set?"""
    return isinstance(term, ir.Test | ir.Member | ir.Bits)


def _shared(field: Field, clauses: Sequence[Clause]) -> tuple[ir.Condition, ...]:
    """What all of the clauses ask besides the field."""
    first, *others = clauses
    key = first.keys[field]
    terms = {shape(t): t for t in first.terms if t is not key and _is_plain(t)}
    for clause in others:
        if not terms:
            break
        key = clause.keys[field]
        own = {shape(t) for t in clause.terms if t is not key}
        terms = {form: term for form, term in terms.items() if form in own}
    return tuple(terms.values())


def _worth(field: Field, clauses: Sequence[Clause]) -> float:
    """How many clauses a table of the field spares a packet."""
    if not clauses:
        return 0.0
    keys = [clause.keys[field].values for clause in clauses]
    exact = sum(isinstance(v, Names) or all(lo == hi for _, lo, hi in intervals(v)) for v in keys)
    spared = len(keys) - len(keys) / len(set(keys))
    return spared * (0.9 + 0.1 * exact / len(keys))


# Values, cut into disjoint pieces.


def _families(field: Field, facts: Facts) -> tuple[int, ...]:
    return facts.families if field.by_family else (ANY_FAMILY,)


def _spans(test: ir.Test, family: int) -> Sequence[tuple[int, int]]:
    match test.values:
        case Addresses() as addresses:
            return addresses.family(family).spans
        case Ranges() as ranges:
            return ranges.spans
        case Names():
            raise TypeError("names have no spans")


def _cut(
    field: Field, family: int, clauses: Sequence[Clause], most: int | None = None
) -> list[tuple[Key, Key, tuple[int, ...]]] | None:
    """(low, high, numbers of the clauses there) for each piece; None if they have over `most`.

    The clauses of a piece end with one that has nothing left to ask.
    """
    shared = len(_shared(field, clauses)) if clauses else 0
    complete = {c.number for c in clauses if len(c.terms) == 1 + shared}
    if field.type.kind == "interface":
        return [(name, name, _until(found, complete)) for name, found in _by_name(field, clauses)]
    begin: dict[int, list[int]] = {}
    end: dict[int, list[int]] = {}
    for clause in clauses:
        for low, high in _spans(clause.keys[field], family):
            begin.setdefault(low, []).append(clause.number)
            end.setdefault(high + 1, []).append(clause.number)
    pieces: list[tuple[Key, Key, tuple[int, ...]]] = []
    active: list[int] = []
    points = sorted({*begin, *end})
    touching, total = None, 0
    for point, following in pairwise(points):
        for number in end.get(point, ()):
            del active[bisect_left(active, number)]
        for number in begin.get(point, ()):
            insort(active, number)
        if not active:
            touching = None
            continue
        here = _until(active, complete)
        if here == touching:
            pieces[-1] = (pieces[-1][0], following - 1, here)
            continue
        touching = here
        total += len(here)
        if most is not None and total > most:
            return None
        pieces.append((point, following - 1, here))
    return pieces


def _by_name(field: Field, clauses: Sequence[Clause]) -> list[tuple[str, list[int]]]:
    """The numbers of the clauses that ask for a name, by the names, sorted."""
    found: dict[str, list[int]] = {}
    for clause in clauses:
        names = clause.keys[field].values
        for name in names.patterns if isinstance(names, Names) else ():
            found.setdefault(name, []).append(clause.number)
    return sorted(found.items())


def _until(numbers: Sequence[int], complete: Collection[int]) -> tuple[int, ...]:
    """The numbers up to the first that is complete."""
    if numbers[0] in complete:
        return (numbers[0],)
    for place, number in enumerate(numbers):
        if number in complete:
            return tuple(numbers[: place + 1])
    return tuple(numbers)


def _wide(field: Field, family: int, clauses: Sequence[Clause]) -> set[int]:
    """The numbers of the clauses that would stand in many pieces."""
    if field.type.kind == "interface":
        return set()
    spans = {c.number: _spans(c.keys[field], family) for c in clauses}
    points = sorted({p for some in spans.values() for low, high in some for p in (low, high)})
    return {
        number
        for number, some in spans.items()
        if sum(bisect_left(points, high) - bisect_left(points, low) for low, high in some) > _WIDE
    }
