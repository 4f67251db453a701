"""Policies -> simpler policies of the same meaning.

Conditions come out in negation normal form, with tests on one field merged and
flow tests turned into `Over`. What the interest says of every packet (`Facts`)
prunes the rest: no IPv6 variant where only IPv4 comes, no test of a field that
each packet has. True is `And(())`, false is `Or(())`.

Negation is the delicate part. A test is false on a packet without the field, so
`not sport in S` is true there and is NOT "sport in the complement of S". Only
where every packet has the field may the set be complemented.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Final

from itmlang import ir, values
from itmlang.diagnostics import Findings
from itmlang.fields import FIELDS, Field, hook_kind
from itmlang.source import Span
from itmlang.values import FAMILIES, IPV4, Addresses, InexpressibleError, Names, Ranges, ValueSet

# In a policy with more rules (times intervals of chance) than this, only equal conditions are looked for among earlier classes.
MOST_COMPARED: Final = 500


# A random number is one of a million; this many intervals of them can be told apart.
MOST_DRAWN: Final = 10**6 - 1
MOST_DRAWS: Final = 16

ANY_PROTOCOL: Final = Ranges(255, ((0, 255),))
# Fields of which not every value can occur, by what is known of the packets.
_NARROWED: Final = frozenset(FIELDS[n] for n in ("protocol", "fragment", "random", "family"))


@dataclass(frozen=True)
class Facts:
    """What holds for every packet that a condition is asked about."""

    hooks: tuple[str, ...]
    families: tuple[int, ...] = FAMILIES
    protocols: Ranges = ANY_PROTOCOL
    protocol_known: bool = False  # no packet lacks the field `protocol`
    interested: bool = False  # the packets have passed the interest
    fragments: bool = False  # all are later fragments, so without transport header
    diverted: bool = False  # none is one
    draws: tuple[int, int] | None = None  # the random numbers that they have

    def always_has(self, field: Field) -> bool:
        """Does every packet have the field?"""
        if any(field.hooks.get(hook_kind(hook)) != "all" for hook in self.hooks):
            return False
        if not all(field.in_family(family) for family in self.families):
            return False
        if field is FIELDS["protocol"]:
            return self.protocol_known or self.families == (IPV4,)
        return field.whole and field.protocols is None

    def rule_out(self, field: Field) -> bool:
        """Does no packet have the field, by its family or its protocol?"""
        if not any(field.in_family(family) for family in self.families):
            return True
        if field.protocols is None:
            return False
        return self.fragments or not any(p in self.protocols for p in field.protocols)


@dataclass(frozen=True)
class Draw:
    """The classes for the packets whose random number lies between two others."""

    low: int
    high: int
    rules: tuple[ir.ClassRule, ...]


@dataclass(frozen=True)
class Variant:
    """The conditions of a policy for some of its packets, and what is known of these.

    Where classes ask for `random`, each interval between the numbers that they name
    has its own rules, so that all of them see the same number.
    """

    facts: Facts
    interest: ir.Condition
    draws: tuple[Draw, ...]
    updates: tuple[ir.Addition | ir.Removal, ...]

    @property
    def rules(self) -> tuple[ir.ClassRule, ...]:
        return tuple(rule for draw in self.draws for rule in draw.rules)


@dataclass(frozen=True)
class Simplified:
    """A policy with its conditions in simple form; `policy` is the one it came from.

    Later fragments have no transport header, but the kernel reads ports and flags
    from whatever stands there. Where a policy asks for such fields, `fragments` is
    what it means for later fragments, and `whole` is for all other packets only.
    Where its rules ask connection tracking there are none (`reassembled`): the kernel
    puts fragments together before any policy sees them.
    """

    policy: ir.Policy
    whole: Variant
    fragments: Variant | None
    reassembled: bool = False

    @property
    def variants(self) -> tuple[Variant, ...]:
        return (self.whole,) if self.fragments is None else (self.whole, self.fragments)

    @property
    def rules(self) -> tuple[ir.ClassRule, ...]:
        return tuple(rule for variant in self.variants for rule in variant.rules)

    def tests(self) -> Iterator[ir.Test]:
        """All tests of fields."""
        for variant in self.variants:
            asked = (*variant.rules, *variant.updates)
            for condition in (variant.interest, *(a.condition for a in asked)):
                yield from (leaf for leaf in ir.leaves(condition) if isinstance(leaf, ir.Test))


def simplify(policy: ir.Policy, findings: Findings) -> Simplified:
    """Simplify one policy; what can never match is warned about."""
    if policy.tracks:
        said = Findings()
        reassembled = _variant(policy, Facts(policy.hooks, diverted=True), said)
        if _asks_tracking(policy, reassembled):
            for diagnostic in said.diagnostics:
                findings.add(diagnostic)
            return Simplified(policy, reassembled, None, reassembled=True)
    whole = _variant(policy, Facts(policy.hooks), findings)
    asked = [*whole.rules, *whole.updates]
    conditions = [whole.interest, *(a.condition for a in asked if a.condition is not None)]
    learns = any(update.field.protocols is not None for update in whole.updates)
    if not learns and not any(asks_transport(condition) for condition in conditions):
        return Simplified(policy, whole, None)
    # What was said of the policy as a whole needs no repeating.
    if any(_asks_fragment(condition) for condition in policy.conditions):
        whole = _variant(policy, Facts(policy.hooks, diverted=True), Findings())
    else:
        whole = replace(whole, facts=replace(whole.facts, diverted=True))
    fragments = _variant(policy, Facts(policy.hooks, fragments=True), Findings())
    return Simplified(policy, whole, fragments)


def _asks_tracking(policy: ir.Policy, variant: Variant) -> bool:
    """Do the rules for these conditions ask connection tracking anything?

    What was simplified away does not count: then the kernel has no reason to track.
    """
    asked = (*variant.rules, *variant.updates)
    leaves = [
        leaf for c in (variant.interest, *(a.condition for a in asked)) for leaf in ir.leaves(c)
    ]
    flows = [leaf.flow for leaf in leaves if isinstance(leaf, ir.Over | ir.FlowTest)]
    flows += [count.flow for count in policy.counts]
    steps = [step for rule in variant.rules for step in policy.process.get(rule.name, ())]
    while steps:
        step = steps.pop()
        if isinstance(step, ir.Limit):
            flows += [step.flow] if step.flow is not None else []
            steps.extend(step.otherwise)
    return any(
        leaf.attribute == "connections"
        if isinstance(leaf, ir.Over | ir.FlowTest)
        else leaf.field.tracked
        for leaf in leaves
    ) or any(field.tracked for flow in flows for field in flow.key)


def _asks_fragment(condition: ir.Condition) -> bool:
    return any(
        isinstance(leaf, ir.Test) and leaf.field is FIELDS["fragment"]
        for leaf in ir.leaves(condition)
    )


def asks_transport(condition: ir.Condition) -> bool:
    """Does the condition look at a transport header, or whether there is none?"""
    match condition:
        case ir.Test() | ir.Bits() | ir.Member():
            return condition.field.protocols is not None or condition.field is FIELDS["fragment"]
        case ir.Over() | ir.FlowTest():
            return keyed_by_transport(condition.flow)
        case ir.Not():
            return asks_transport(condition.term)
        case ir.And() | ir.Or():
            return any(map(asks_transport, condition.terms))


def keyed_by_transport(flow: ir.Flow) -> bool:
    return any(field.protocols is not None for field in flow.key)


def _variant(policy: ir.Policy, outside: Facts, findings: Findings) -> Variant:
    interest = _Simplifier(policy, outside).condition(policy.interest)
    facts = narrowed(interest, outside)
    if not facts.families or is_false(interest):
        findings.warning(
            "W005",
            f"the interest of `{policy.name}` matches no packet",
            policy.interest.span,
            help="its fields are and-ed: one of them rules out what another one asks for"
            if len(conjuncts(policy.interest)) > 1
            else "",
        )
        return Variant(facts, FALSE(policy.interest.span), (Draw(0, MOST_DRAWN, ()),), ())
    draws, intervals = [], _draws(policy, findings)
    for low, high in intervals:
        drawn = replace(facts, draws=(low, high))
        # A class that one interval lacks may be in another one.
        told = findings if (low, high) == (0, MOST_DRAWN) else Findings()
        draws.append(Draw(low, high, _rules(policy, drawn, len(intervals), told)))
    return Variant(facts, interest, tuple(draws), _updates(policy, facts))


def _draws(policy: ir.Policy, findings: Findings) -> list[tuple[int, int]]:
    """The intervals of random numbers that the classes tell apart."""
    cuts = {0}
    span = policy.span
    for leaf in (leaf for rule in policy.rules for leaf in ir.leaves(rule.condition)):
        if isinstance(leaf, ir.Test) and leaf.field is FIELDS["random"]:
            assert isinstance(leaf.values, Ranges)
            span = leaf.span
            for low, high in leaf.values.spans:
                cuts |= {low, high + 1}
    starts = sorted(cut for cut in cuts if cut <= MOST_DRAWN)
    if len(starts) > MOST_DRAWS:
        findings.error(
            "E036",
            f"the classes tell {len(starts)} intervals of `random` apart, the most are {MOST_DRAWS}",
            span,
            help="use fewer different percentages",
        )
        return []
    return list(zip(starts, [*(s - 1 for s in starts[1:]), MOST_DRAWN], strict=True))


def _updates(policy: ir.Policy, facts: Facts) -> tuple[ir.Addition | ir.Removal, ...]:
    """The updates that can happen, their conditions in simple form."""
    simplifier = _Simplifier(policy, facts)
    kept = []
    for update in policy.updates:
        if simplifier.ruled_out(update.field):
            continue
        condition = None
        if update.condition is not None:
            condition = simplifier.condition(update.condition)
            if is_false(condition):
                continue
        kept.append(replace(update, condition=condition))
    return tuple(kept)


def TRUE(span: Span) -> ir.Condition:
    return ir.And((), span)


def FALSE(span: Span) -> ir.Condition:
    return ir.Or((), span)


def is_true(condition: ir.Condition) -> bool:
    return isinstance(condition, ir.And) and not condition.terms


def is_false(condition: ir.Condition) -> bool:
    return isinstance(condition, ir.Or) and not condition.terms


def conjuncts(condition: ir.Condition) -> tuple[ir.Condition, ...]:
    return condition.terms if isinstance(condition, ir.And) else (condition,)


def disjuncts(condition: ir.Condition) -> tuple[ir.Condition, ...]:
    return condition.terms if isinstance(condition, ir.Or) else (condition,)


def narrowed(interest: ir.Condition, facts: Facts) -> Facts:
    """What the interest tells of the packets that pass it."""
    families = set(facts.families)
    protocols, known = facts.protocols, facts.protocol_known
    for term in conjuncts(interest):
        if not isinstance(term, ir.Test | ir.Member):
            continue
        found = term.values if isinstance(term, ir.Test) else None
        match found:
            case Addresses():
                families &= {f for f in FAMILIES if not found.family(f).empty}
            case Ranges() if term.field is FIELDS["family"]:
                families &= {f for f in FAMILIES if (0 if f == IPV4 else 1) in found}
            case Ranges() if term.field is FIELDS["protocol"]:
                protocols, known = protocols.intersection(found), True
            case _:
                pass
        if term.field.protocols is not None:
            protocols, known = protocols.intersection(protocols_of(term.field)), True
    return replace(
        facts,
        families=tuple(f for f in FAMILIES if f in families),
        protocols=protocols,
        protocol_known=known,
        interested=True,
    )


def is_positive(condition: ir.Condition) -> bool:
    """Is the condition nothing but tests that must hold?"""
    return not is_false(condition) and all(
        isinstance(term, ir.Test | ir.Member | ir.Bits | ir.Over) for term in conjuncts(condition)
    )


@cache
def protocols_of(field: Field) -> Ranges:
    """The protocols whose packets can have the field."""
    if field.protocols is None:
        return ANY_PROTOCOL
    return Ranges.of(255, [(p, p) for p in field.protocols])


def _rules(
    policy: ir.Policy, facts: Facts, draws: int, findings: Findings
) -> tuple[ir.ClassRule, ...]:
    simplifier = _Simplifier(policy, facts)
    kept: list[ir.ClassRule] = []
    compared = kept if len(policy.rules) * draws <= MOST_COMPARED else []
    seen: dict[object, ir.ClassRule] = {}
    for rule in policy.rules:
        if rule.condition is None:
            kept.append(rule)
            break  # what follows was warned about by the checker
        condition = simplifier.condition(rule.condition)
        if is_false(condition):
            findings.warning(
                "W004", f"no packet can be `{rule.name}` here", rule.span,
                help="its condition contradicts itself, the interest, or what is counted",
            )  # fmt: skip
            continue
        form = shape(condition)
        earlier = seen.get(form) or next(
            (k for k in compared if k.condition and _implies(condition, k.condition)), None
        )
        if earlier is not None:
            findings.warning(
                "W001",
                f"`{rule.name}` is never reached: `{earlier.name}` takes its packets",
                rule.span,
                notes=(("the earlier class is here", earlier.span),),
            )
        elif is_true(condition):
            kept.append(replace(rule, condition=None))
            break
        else:
            kept.append(replace(rule, condition=condition))
            seen[form] = kept[-1]
    return tuple(kept)


def shape(condition: ir.Condition) -> object:
    """A condition without its places: equal for equal meaning written alike."""
    match condition:
        case ir.Test():
            return ("test", condition.field.name, condition.values)
        case ir.Member():
            return ("member", condition.field.name, condition.set.name)
        case ir.Bits():
            return ("bits", condition.field.name, condition.mask)
        case ir.FlowTest():
            return ("flow", condition.flow.name, condition.attribute, condition.values)
        case ir.Over():
            return ("over", condition.flow.name, condition.attribute, condition.threshold)
        case ir.Not():
            return ("not", shape(condition.term))
        case ir.And() | ir.Or():
            return (type(condition).__name__, frozenset(map(shape, condition.terms)))


def _implies(a: ir.Condition, b: ir.Condition) -> bool:
    """Is b true wherever a is? May say False where it is hard to see."""
    match a, b:
        case _, ir.Or():
            return any(_implies(a, term) for term in b.terms)
        case _, ir.And():
            return all(_implies(a, term) for term in b.terms)
        case ir.And(), _:
            return any(_implies(term, b) for term in a.terms)
        case ir.Or(), _:
            return bool(a.terms) and all(_implies(term, b) for term in a.terms)
        case ir.Test(), ir.Test():
            if a.field is not b.field:
                return False
            if a.named is not None or b.named is not None:  # these may be large
                return a.values == b.values
            return values.within(a.values, b.values)
        case ir.Over(), ir.Over():
            same = (a.flow.name, a.attribute) == (b.flow.name, b.attribute)
            return same and a.threshold >= b.threshold
        case _:
            return shape(a) == shape(b)


class _Simplifier:
    def __init__(self, policy: ir.Policy, facts: Facts) -> None:
        self.facts = facts
        self.counted = {count.flow.name for count in policy.counts}
        self.ruled_out = cache(facts.rule_out)
        self._always_has = cache(facts.always_has)

    def condition(self, condition: ir.Condition) -> ir.Condition:
        """The simple form of the condition."""
        normal = self._normal(condition, False)
        if any(isinstance(leaf, ir.Over) for leaf in ir.leaves(normal)):
            return self._assume_keys(normal, frozenset())
        return normal

    def _normal(self, condition: ir.Condition, negate: bool) -> ir.Condition:
        """The normal form of the condition, or of its negation."""
        match condition:
            case ir.Not():
                return self._normal(condition.term, not negate)
            case ir.And() | ir.Or():
                terms = [self._normal(term, negate) for term in condition.terms]
                conjunction = isinstance(condition, ir.And) != negate
                return (self._and if conjunction else self._or)(terms, condition.span)
            case ir.FlowTest():
                return self._normal(self._overs(condition), negate)
            case ir.Test():
                return self._test(condition, negate)
            case ir.Bits():
                if self.ruled_out(condition.field) or not condition.mask:
                    return self._constant(negate, condition.span)
            case ir.Member():
                if self.ruled_out(condition.field):
                    return self._constant(negate, condition.span)
            case ir.Over():
                if any(self.ruled_out(field) for field in condition.flow.key):
                    return self._constant(negate, condition.span)
        return ir.Not(condition, condition.span) if negate else condition

    @staticmethod
    def _constant(value: bool, span: Span) -> ir.Condition:
        return TRUE(span) if value else FALSE(span)

    def _test(self, test: ir.Test, negate: bool) -> ir.Condition:
        if test.field is FIELDS["fragment"] and not (self.facts.fragments or self.facts.diverted):
            return ir.Not(test, test.span) if negate else test  # only asked whether it is asked
        found, full = self._possible(test)
        if found.empty or self.ruled_out(test.field):
            return self._constant(negate, test.span)
        always = self._always_has(test.field)
        if full and always:
            return self._constant(not negate, test.span)
        if negate and always:
            return self._test(replace(test, values=values.complement(test.values)), False)
        simple = test if found is test.values else replace(test, values=found)
        return ir.Not(simple, test.span) if negate else simple

    def _possible(self, test: ir.Test) -> tuple[ValueSet, bool]:
        """The values that can occur, and whether that is every value that can."""
        if test.field not in _NARROWED and self.facts.families == FAMILIES:
            return test.values, test.values.full
        match test.values:
            case Addresses():
                none = Addresses()
                kept = [
                    (test.values if family in self.facts.families else none).family(family)
                    for family in FAMILIES
                ]
                full = all(test.values.family(f).full for f in self.facts.families)
                return Addresses(*kept), full
            case Ranges() if self.facts.interested and test.field is FIELDS["protocol"]:
                found = test.values.intersection(self.facts.protocols)
                return found, found == self.facts.protocols
            case Ranges() if test.field is FIELDS["fragment"] and (
                self.facts.fragments or self.facts.diverted
            ):
                possible = Ranges.of(1, [(int(self.facts.fragments),) * 2])
                found = test.values.intersection(possible)
                return found, found == possible
            case Ranges() if test.field is FIELDS["random"]:
                # 100% is a number that is never drawn.
                drawn = self.facts.draws or (0, MOST_DRAWN)
                found = test.values.intersection(Ranges(MOST_DRAWN, (drawn,)))
                return found, found.spans == (drawn,)
            case Ranges() if self.facts.interested and test.field is FIELDS["family"]:
                possible = Ranges.of(1, [(0 if f == IPV4 else 1,) * 2 for f in self.facts.families])
                found = test.values.intersection(possible)
                return found, found == possible
            case _:
                return test.values, test.values.full

    def _overs(self, test: ir.FlowTest) -> ir.Condition:
        """A test of a flow's count, by thresholds; the flow's key is what must be there."""
        covered = {name for field in test.flow.key for name in field.covers}
        here = [
            ir.Test(f, f.type.everything, test.span)
            for f in test.flow.key
            if not self._always_has(f) and f.name not in covered
        ]
        if test.flow.name not in self.counted:  # always 0
            zero = 0 in test.values
            return ir.And(tuple(here), test.span) if zero else FALSE(test.span)
        parts: list[ir.Condition] = []
        for lo, hi in test.values.spans:
            terms: list[ir.Condition] = [*here] if lo == 0 else []
            if lo > 0:
                terms.append(ir.Over(test.flow, test.attribute, lo - 1, test.span))
            if hi < test.values.limit:
                over = ir.Over(test.flow, test.attribute, hi, test.span)
                terms.append(ir.Not(over, test.span))
            parts.append(ir.And(tuple(terms), test.span))
        return ir.Or(tuple(parts), test.span)

    def _and(self, terms: Sequence[ir.Condition], span: Span) -> ir.Condition:
        flat = [leaf for term in terms for leaf in conjuncts(term)]
        if any(is_false(leaf) for leaf in flat):
            return FALSE(span)
        merged = _merge(flat, values.intersection, max, min)
        if any(self._empty(t) for t in merged) or _contradicts(merged):
            return FALSE(span)
        if self._protocols(merged).empty:
            return FALSE(span)
        return merged[0] if len(merged) == 1 else ir.And(tuple(merged), span)

    def _or(self, terms: Sequence[ir.Condition], span: Span) -> ir.Condition:
        flat = [leaf for term in terms for leaf in disjuncts(term)]
        merged = _merge(flat, values.union, min, max)
        merged = [self._test(t, False) if isinstance(t, ir.Test) else t for t in merged]
        if any(is_true(t) for t in merged) or _contradicts(merged):
            return TRUE(span)
        merged = [t for t in merged if not is_false(t)]
        return merged[0] if len(merged) == 1 else ir.Or(tuple(merged), span)

    def _protocols(self, terms: Iterable[ir.Condition]) -> Ranges:
        """The protocols of the packets for which all of the terms can hold."""
        possible = self.facts.protocols
        for term in terms:
            match term:
                case ir.Test(values=Ranges() as found) if term.field is FIELDS["protocol"]:
                    possible = possible.intersection(found)
                case ir.Test() | ir.Bits() | ir.Member() if term.field.protocols is not None:
                    possible = possible.intersection(protocols_of(term.field))
                case ir.Over():
                    for field in term.flow.key:
                        possible = possible.intersection(protocols_of(field))
        return possible

    def _empty(self, term: ir.Condition) -> bool:
        return isinstance(term, ir.Test) and self._possible(term)[0].empty

    def _assume_keys(self, term: ir.Condition, present: frozenset[str]) -> ir.Condition:
        """Without tests that a flow's key is there, where `Over` of that flow says so already.

        `present` are the fields that conjuncts above have shown to be there.
        """
        match term:
            case ir.Test() if term.field.name in present and term.values.full:
                return TRUE(term.span)
            case ir.And():
                keys = (f.name for t in term.terms if isinstance(t, ir.Over) for f in t.flow.key)
                here = present | frozenset(keys)
                kept = [leaf for t in term.terms for leaf in conjuncts(self._assume_keys(t, here))]
                if any(map(is_false, kept)):
                    return FALSE(term.span)
                return kept[0] if len(kept) == 1 else ir.And(tuple(kept), term.span)
            case ir.Or():
                choices = [
                    leaf for t in term.terms for leaf in disjuncts(self._assume_keys(t, present))
                ]
                if any(map(is_true, choices)):
                    return TRUE(term.span)
                return choices[0] if len(choices) == 1 else ir.Or(tuple(choices), term.span)
            case _:
                return term


def _merge(
    terms: Iterable[ir.Condition],
    combine: Callable[[ValueSet, ValueSet], ValueSet],
    stronger: Callable[[int, int], int],
    weaker: Callable[[int, int], int],
) -> list[ir.Condition]:
    """Tests of one field made one, thresholds of one flow made one, doubles dropped."""
    merged: dict[object, ir.Condition] = {}
    united: dict[object, list[ValueSet]] = {}  # all at once, for there may be thousands
    for term in terms:
        match term:
            case ir.Test() if term.named is not None or term.field is FIELDS["random"]:
                key: object = shape(term)  # a named set keeps its name, a draw is drawn
            case ir.Test():
                key = ("test", term.field.name)
                old = merged.get(key)
                if combine is values.union and not isinstance(term.values, Names):
                    united.setdefault(key, []).append(term.values)
                    term = old or term
                elif isinstance(old, ir.Test):
                    try:
                        term = replace(old, values=combine(old.values, term.values))
                    except InexpressibleError:
                        key = (key, len(merged))
            case ir.Over():
                key = ("over", term.flow.name, term.attribute)
                old = merged.get(key)
                if isinstance(old, ir.Over):
                    term = replace(old, threshold=stronger(old.threshold, term.threshold))
            case ir.Not(term=ir.Over() as over):
                key = ("not over", over.flow.name, over.attribute)
                old = merged.get(key)
                if isinstance(old, ir.Not) and isinstance(old.term, ir.Over):
                    threshold = weaker(old.term.threshold, over.threshold)
                    term = ir.Not(replace(over, threshold=threshold), old.span)
            case _:
                key = shape(term)
        merged[key] = term
    for key, sets in united.items():
        test = merged[key]
        if isinstance(test, ir.Test) and len(sets) > 1:
            merged[key] = replace(test, values=values.union_all(test.field.type.nothing, sets))
    return list(merged.values())


def _contradicts(terms: Sequence[ir.Condition]) -> bool:
    """Is there a term beside its own negation?"""
    negated = {shape(t.term) for t in terms if isinstance(t, ir.Not)}
    return bool(negated) and any(shape(t) in negated for t in terms)
