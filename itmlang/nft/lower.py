"""Simplified policies -> tables, chains, sets and rules.

Each policy is a table of its own: a base chain at each hook takes what is of
interest to `classify`, which goes to the chain of the first class that fits; that
one counts the packet, logs it, runs the actions and gives the verdict.

Classification falls through: a rule whose match fails, or that nftables breaks
off because the packet lacks a field, goes on to the next rule, and that is just
the language's "a comparison on a missing field is false". What is left are
negations (`t` goes somewhere else first) and disjunctions inside of conjunctions
(a chain of their own), so that a condition of size n becomes O(n) rules.

A flow is a dynamic set with a counter in each element. A threshold on it is a
limit (packets) or quota (bytes) in the same element, evaluated when the packet
is logged, that latches the flow into a second set; classification looks only
there. So it sees what was logged before this packet, exactly.
"""

from collections.abc import Sequence
from typing import Final

from itmlang import ir
from itmlang.diagnostics import Findings
from itmlang.fields import ANY_FAMILY
from itmlang.nft.match import Leaf, family_suffix, key_match, matches, over_set
from itmlang.nft.model import MANGLE, BaseHook, Chain, Counter, FlowSet, Rule, Ruleset, Table
from itmlang.simplify import (
    Facts,
    Simplified,
    Variant,
    asks_transport,
    conjuncts,
    disjuncts,
    is_false,
    is_true,
    keyed_by_transport,
)
from itmlang.source import Span
from itmlang.values import IPV4, IPV6

# A chain may be this many jumps and gotos away from its hook
# (NFT_JUMP_STACK_SIZE, include/net/netfilter/nf_tables.h).
DEEPEST_CHAIN: Final = 16

# Later fragments. The kernel finds no transport header in them, yet loads its fields
# from whatever bytes come there (measured on 6.18), so rules must leave them out.
_LATER_FRAGMENT: Final = {IPV4: "ip frag-off & 0x1fff != 0", IPV6: "frag frag-off != 0"}

# nft_limit keeps burst * unit in nanoseconds in 64 bits. A bucket refills by one
# packet a unit, so the longest unit that the burst allows is the most exact one.
_LIMIT_UNITS: Final = {"week": 604_800, "day": 86_400, "hour": 3_600, "minute": 60, "second": 1}
_MOST_PACKETS: Final = 2**32 - 1  # the burst of nft_limit is 32 bits wide


def lower(file: str, policies: Sequence[Simplified], findings: Findings) -> Ruleset:
    """The ruleset for the policies of a file."""
    tables = tuple(_Lowering(policy, findings).table for policy in policies)
    findings.raise_errors()
    return Ruleset(file, tables)


class _Lowering:
    """The lowering of one policy."""

    def __init__(self, simplified: Simplified, findings: Findings) -> None:
        self.policy = simplified.policy
        self.whole, self.fragments = simplified.whole, simplified.fragments
        self.variants = simplified.variants
        self.facts: Facts = self.whole.facts  # of the packets that rules are being made for
        self.findings = findings
        self.table = Table(self.policy.name, self.policy.span)
        self._names: dict[str, int] = {}
        self._shared: dict[str, Chain] = {}
        self._counters()
        self._hooks()
        self._classify()
        if self.policy.counts:
            self._log()
        for name in dict.fromkeys(rule.name for variant in self.variants for rule in variant.rules):
            self._class(name)
        self.table.chains.extend(self._shared.values())
        self._check_depth()

    # Chains and rules.

    def _chain(self, name: str, span: Span, hook: BaseHook | None = None) -> Chain:
        chain = Chain(name, span, hook)
        self.table.chains.append(chain)
        return chain

    def _further(self, chain: Chain, span: Span) -> Chain:
        """A chain that continues one: `classify_1` for `classify`."""
        stem = chain.name.rstrip("0123456789").removesuffix("_")
        self._names[stem] = self._names.get(stem, 0) + 1
        return self._chain(f"{stem}_{self._names[stem]}", span)

    def _rule(self, chain: Chain, text: str, span: Span, label: str = "") -> None:
        chain.rules.append(Rule(text.strip(), span, label))

    # Counters and sets.

    def _counters(self) -> None:
        # A class that nothing can reach keeps its counter: it is there, at 0.
        spans = {rule.name: rule.span for rule in reversed(self.policy.rules)}
        for name in self.policy.classes:
            self.table.counters.append(Counter(f"class_{name}", "class", name, spans[name]))
        for count in self.policy.counts:
            name = f"flow_{count.flow.name}_uncounted"
            self.table.counters.append(Counter(name, "uncounted", count.flow.name, count.span))

    # Hooks.

    def _hooks(self) -> None:
        """The base chains; several share a chain for the interest."""
        span = self.policy.interest.span
        priority = MANGLE + self.policy.priority
        bases = [self._chain(h, span, BaseHook(h, priority)) for h in self.policy.hooks]
        chain = bases[0]
        if len(bases) > 1:
            chain = self._chain("interest", span)
            for base in bases:
                self._rule(base, "goto interest", span)
        if asks_transport(self.whole.interest) and self.fragments is not None:
            self._divert(chain, self._fragments_of_interest(chain, self.fragments), span)
        self._interest(chain, self.whole.interest, "goto classify")

    def _interest(self, chain: Chain, interest: ir.Condition, target: str) -> None:
        inside, self.facts = self.facts, Facts(self.policy.hooks)  # nothing is known yet
        self._emit(chain, interest, target, fallback="return")
        self.facts = inside

    def _fragments_of_interest(self, chain: Chain, fragments: Variant) -> str:
        """Where later fragments go, if the interest asks for ports."""
        if is_false(fragments.interest):
            return "return"
        other = self._chain(f"{chain.name}_fragments", self.policy.interest.span)
        self._interest(other, fragments.interest, self._fragment_class(fragments))
        return f"goto {other.name}"

    def _divert(self, chain: Chain, target: str, span: Span) -> None:
        """Rules that send later fragments elsewhere."""
        for family, match in _LATER_FRAGMENT.items():
            if family in self.facts.families:
                self._rule(chain, f"{match} {target}", span)

    # Classification.

    @property
    def _unclassified(self) -> str:
        return "goto log_flows" if self.policy.counts else "return"

    def _fragment_class(self, fragments: Variant) -> str:
        """Where later fragments of interest go: to their class, if that is plain."""
        if not fragments.rules:
            return self._unclassified
        if fragments.rules[0].condition is None:
            return f"goto class_{fragments.rules[0].name}"
        return "goto classify_fragments"

    def _classify(self) -> None:
        chain = self._chain("classify", self.policy.span)
        if self.fragments is not None:
            target = self._fragment_class(self.fragments)
            if not asks_transport(self.whole.interest):
                span = self.whole.rules[0].span
                self._divert(chain, target, span)
            self._rules(chain, self.whole)
            if target == "goto classify_fragments":
                self._rules(self._chain("classify_fragments", self.policy.span), self.fragments)
        else:
            self._rules(chain, self.whole)

    def _rules(self, chain: Chain, variant: Variant) -> None:
        outside, self.facts = self.facts, variant.facts
        for index, rule in enumerate(variant.rules):
            target, label = f"goto class_{rule.name}", rule.name
            if rule.condition is None:
                self._rule(chain, target, rule.span, label)
                break
            following = variant.rules[index + 1 : index + 2]
            fallback = ""
            if not following:
                fallback = self._unclassified
            elif following[0].condition is None:
                fallback = f"goto class_{following[0].name}"
            self._emit(chain, rule.condition, target, fallback, label)
        else:
            if self.policy.counts:
                self._rule(chain, self._unclassified, self.policy.counts[0].span)
        self.facts = outside

    def _emit(
        self,
        chain: Chain,
        condition: ir.Condition,
        target: str,
        fallback: str = "",
        label: str = "",
    ) -> None:
        """Rules that go to the target if the condition holds, and else fall through.

        `fallback` is a verdict that means the same as falling through, if there is
        one: then what rules the condition out can go there at once.
        """
        if is_true(condition):
            self._rule(chain, target, condition.span, label)
            return
        # What needs the fallback comes last: before it, others may still hold.
        alternatives = sorted(disjuncts(condition), key=lambda t: not _positive(t))
        for index, term in enumerate(alternatives):
            last = index == len(alternatives) - 1
            self._emit_conjunction(chain, term, target, fallback if last else "", label)

    def _emit_conjunction(
        self, chain: Chain, condition: ir.Condition, target: str, fallback: str, label: str
    ) -> None:
        terms = conjuncts(condition)
        positive: list[Leaf] = []
        negative: list[Leaf] = []
        choices: list[ir.Or] = []
        for term in terms:
            match term:
                case ir.Or():
                    choices.append(term)
                case ir.Not(term=ir.Test() | ir.Bits() | ir.Over() as leaf):
                    negative.append(leaf)
                case ir.Test() | ir.Bits() | ir.Over():
                    positive.append(term)
                case _:
                    raise TypeError(f"not in normal form: {term!r}")
        if choices or (negative and not fallback):
            inner = self._further(chain, condition.span)
            self._match(chain, positive, f"jump {inner.name}", condition.span, label)
            self._exclude(inner, negative, "return", label)
            for choice in choices[:-1]:
                following = self._further(chain, choice.span)
                self._emit(inner, choice, f"goto {following.name}", "return", label)
                inner = following
            if choices:
                self._emit(inner, choices[-1], target, "return", label)
            else:
                self._rule(inner, target, condition.span, label)
        else:
            self._exclude(chain, negative, fallback, label)
            self._match(chain, positive, target, condition.span, label)

    def _exclude(self, chain: Chain, leaves: Sequence[Leaf], verdict: str, label: str) -> None:
        for leaf in leaves:
            self._match(chain, [leaf], verdict, leaf.span, label)

    def _match(
        self, chain: Chain, leaves: Sequence[Leaf], verdict: str, span: Span, label: str
    ) -> None:
        for _, text in matches(leaves, self.facts):
            self._rule(chain, f"{text} {verdict}", span, label)

    # Logging.

    def _asked(self, flow: ir.Flow) -> list[tuple[str, int, Span]]:
        """The thresholds (attribute, number, place) that conditions ask of a flow, sorted."""
        found: dict[tuple[str, int], Span] = {}
        stack = [
            rule.condition
            for variant in self.variants
            for rule in variant.rules
            if rule.condition is not None
        ]
        while stack:
            match stack.pop():
                case ir.Over() as over if over.flow is flow:
                    found.setdefault((over.attribute, over.threshold), over.span)
                case ir.Not() as negation:
                    stack.append(negation.term)
                case ir.And() | ir.Or() as several:
                    stack.extend(several.terms)
        return [(*asked, found[asked]) for asked in sorted(found)]

    def _log(self) -> None:
        chain = self._chain("log_flows", self.policy.counts[0].span)
        # A later fragment is in no flow that is keyed by ports.
        counts = sorted(self.policy.counts, key=lambda count: keyed_by_transport(count.flow))
        diverted = False
        for count in counts:
            if keyed_by_transport(count.flow) and not diverted:
                self._divert(chain, "return", count.span)
                diverted = True
            families = self.facts.families if count.flow.by_address else (ANY_FAMILY,)
            for family in families:
                self._count(chain, count, family)

    def _count(self, chain: Chain, count: ir.Count, family: int) -> None:
        """Count one flow for one family: a set for each threshold, or one without any."""
        flow = count.flow
        matched = key_match(flow, family, self.facts)
        if matched is None:
            self.findings.warning(
                "W006",
                f"no packet here has the key of `{flow.name}`: it counts nothing",
                count.span,
            )
            return
        guard, key = matched
        asked = self._asked(flow)
        # One packet takes a flow over a threshold of 0: it needs no meter, and comes
        # first, so that a flow that finds no room there is not counted either.
        entry = "".join(
            self._latch(flow, attribute, 0, family, key)
            for attribute, number, _ in asked
            if number == 0
        )
        metered = [threshold for threshold in asked if threshold[1]]
        stem = first = f"flow_{flow.name}_{family_suffix(family)}"
        for index, (attribute, number, span) in enumerate(metered):
            name = f"{stem}_{number}_{attribute}"
            first = first if index else name
            self._flow_set(flow, name, "meter" if index else "count", family, key)
            latch = self._latch(flow, attribute, number, family, key)
            meter = self._meter(attribute, number, span)
            update = f"update @{name} {{ {key} counter {meter} }} {latch}"
            self._rule(chain, f"{guard} {'' if index else entry}{update}", count.span)
        if not metered:
            self._flow_set(flow, stem, "count", family, key)
            self._rule(chain, f"{guard} {entry}update @{stem} {{ {key} counter }}", count.span)
        full = f'{guard} {key} != @{first} counter name "flow_{flow.name}_uncounted"'
        self._rule(chain, full, count.span)

    def _latch(self, flow: ir.Flow, attribute: str, threshold: int, family: int, key: str) -> str:
        name = over_set(flow, attribute, threshold, family)
        self._flow_set(flow, name, "over", family, key)
        return f"update @{name} {{ {key} }} "

    def _meter(self, attribute: str, threshold: int, span: Span) -> str:
        """The statement that lets a rule go on from the packet after the threshold."""
        if attribute == "bytes":
            return f"quota over {threshold} bytes"
        if threshold > _MOST_PACKETS:
            self.findings.error(
                "E040", f"the kernel cannot count beyond {_MOST_PACKETS} packets", span,
                help="ask for bytes instead",
            )  # fmt: skip
            return ""
        unit = next(
            name for name, seconds in _LIMIT_UNITS.items() if threshold * seconds * 10**9 < 2**64
        )
        return f"limit rate over 1/{unit} burst {threshold} packets"

    def _flow_set(self, flow: ir.Flow, name: str, role: str, family: int, key: str) -> None:
        self.table.sets.append(
            FlowSet(
                name=name,
                flow=flow.name,
                role=role,
                family=family,
                key=tuple(f.name for f in flow.key),
                types=tuple(f.key_type(family) for f in flow.key),
                expression=key,
                size=flow.size,
                timeout=flow.timeout,
                span=flow.span,
            )
        )

    # Processing.

    def _class(self, name: str) -> None:
        span = next(r.span for v in self.variants for r in v.rules if r.name == name)
        chain = self._chain(f"class_{name}", span)
        log = " jump log_flows" if self.policy.counts else ""
        self._rule(chain, f'counter name "class_{name}"{log}', span, name)
        steps = self.policy.process.get(name, ())
        for step in steps:
            for family in self.facts.families:
                rules = step.action.lower(family)
                if rules is None:
                    raise NotImplementedError(f"{step.action} is not placed in the kernel")
                for text in rules.rules:
                    self._rule(chain, text, step.span, name)
                for shared, content in rules.chains.items():
                    if shared not in self._shared:
                        self._shared[shared] = Chain(shared, step.span)
                        for text in content:
                            self._rule(self._shared[shared], text, step.span)
        # The verdict is always given: `classify` may have jumped here, and a chain
        # that just ends would return into it.
        verdict = steps[-1].action.verdict if steps else ""
        self._rule(chain, verdict or "accept", steps[-1].span if steps else span, name)

    # The kernel's bound on nesting.

    def _check_depth(self) -> None:
        follow = {chain.name: chain for chain in self.table.chains}
        level = self.table.base_chains
        for _ in range(DEEPEST_CHAIN):
            reached = {
                word
                for chain in level
                for rule in chain.rules
                for word in rule.text.replace(",", " ").split()
                if word in follow
            }
            if not reached:
                return
            level = [follow[name] for name in sorted(reached)]
        self.findings.error(
            "E041",
            f"a condition nests too deep for the kernel, which follows {DEEPEST_CHAIN} jumps",
            level[0].span,
            help="split it into several `CLASS when …` lines: they are or-ed",
        )


def _positive(condition: ir.Condition) -> bool:
    """Is the condition nothing but tests that must hold?"""
    return not is_false(condition) and all(
        isinstance(term, ir.Test | ir.Bits | ir.Over) for term in conjuncts(condition)
    )
