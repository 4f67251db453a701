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
limit (packets) or quota (bytes) in an element of a set beside it, evaluated when the
packet is logged, that latches the flow into a third set; classification looks only
there. So it sees what was logged before this packet, exactly. A rate latches for
a second; an age is a flow that is known, but no longer in a set of young ones.

Policies that share a learned set share a table: nftables' rules reach no further.
"""

import re
from collections import Counter as Counted
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from itertools import takewhile
from typing import Final

from itmlang import ir, marks, overlays, rates, values
from itmlang.actions.route import RouteBy
from itmlang.capabilities import EVERYTHING, Capabilities
from itmlang.diagnostics import Findings
from itmlang.dispatch import FEWEST, OPTIMISATIONS, dispatch
from itmlang.fields import ANY_FAMILY, EGRESS, Field, hook_kind
from itmlang.nft import tunnels
from itmlang.nft.dispatch import Lowering as Dispatching
from itmlang.nft.match import (
    Asked,
    FlowNames,
    Leaf,
    key_match,
    matches,
    named_set,
    refers,
)
from itmlang.nft.model import (
    MANGLE,
    BaseHook,
    Chain,
    Counter,
    FlowSet,
    Rule,
    Ruleset,
    Table,
    Tunnel,
    ValueSet,
    duration,
)
from itmlang.nft.queueing import Handing, Kept, defragmented, settle
from itmlang.simplify import (
    MOST_DRAWN,
    Draw,
    Facts,
    Simplified,
    Variant,
    asks_transport,
    conjuncts,
    disjuncts,
    is_false,
    is_positive,
    is_true,
    keyed_by_transport,
)
from itmlang.source import Span
from itmlang.tunnelling import Inward, inward, outward
from itmlang.values import FAMILIES, IPV4, IPV6, Addresses, Names

# A chain may be this many jumps and gotos away from its hook
# (NFT_JUMP_STACK_SIZE, include/net/netfilter/nf_tables.h).
DEEPEST_CHAIN: Final = 16

# Later fragments. The kernel finds no transport header in them, yet loads its fields
# from whatever bytes come there (measured on 6.18), so rules must leave them out.
_LATER_FRAGMENT: Final = {IPV4: "ip frag-off & 0x1fff != 0", IPV6: "frag frag-off != 0"}

# A flow stays over a rate for so long after its bucket ran out, in milliseconds.
OVER_RATE: Final = 1000
# "For ever" in a learned set is a hundred years. The kernel gives an element that came
# without a time none later on, and drops one with a time when it is renewed without.
FOR_EVER: Final = 36_500 * 86_400_000
_QUOTED: Final = re.compile(r'"[^"]*"')  # a log's prefix may look like anything
# A set of values in braces, and what is to lie in it or not.
_BRACES: Final = re.compile(
    r"\b(meta l4proto|(?:th|tcp|udp|sctp|dccp|udplite) [sd]port|ip6? [sd]addr)"
    r"( !=)? (\{ [^}]* \})"
)
_TARGET: Final = re.compile(r"\b(?:goto|jump) ([\w.]+)")
_ASKED: Final = re.compile(r"@([\w.]+)")
_TOO_DEEP: Final = "E041"
_MOST_REPEATED: Final = 16  # rules with the same set in braces
_MOST_PACKETS: Final = 2**32 - 1  # the burst of nft_limit is 32 bits wide
_MOST_ELEMENTS: Final = 2**32 - 1  # so is a set's size


def lower(
    file: str,
    policies: Sequence[Simplified],
    findings: Findings,
    capabilities: Capabilities = EVERYTHING,
    optimisations: Collection[str] = OPTIMISATIONS,
    plain: Collection[str] = (),
) -> Ruleset:
    """The ruleset for the policies of a file.

    `optimisations` are those of `dispatch`; the policies whose names are in `plain` get none.
    """
    tables = []
    kept = Kept({number for one in policies for number in one.policy.queueing.given})
    for group in _groups(policies):
        passes = {s.policy.name: () if s.policy.name in plain else optimisations for s in group}
        before, said = deepcopy(kept), Findings()
        table = _table(group, said, kept, capabilities, passes)
        if any(passes.values()) and any(found.code == _TOO_DEEP for found in said.diagnostics):
            # Asked one after the other, they may be less deep.
            kept, said = before, Findings()
            table = _table(group, said, kept, capabilities, {})
        for diagnostic in said.diagnostics:
            findings.add(diagnostic)
        tables.append(table)
    findings.raise_errors()
    return Ruleset(file, tuple(tables), tuple(one.policy.name for one in policies))


def _table(
    group: Sequence[Simplified],
    findings: Findings,
    kept: Kept,
    capabilities: Capabilities,
    passes: Mapping[str, Collection[str]],
) -> Table:
    """The table of some policies, each with the passes that stand by its name."""
    egress = any(hook_kind(h) == EGRESS for one in group for h in one.policy.hooks)
    names = tuple(one.policy.name for one in group)
    table = Table(names, group[0].policy.span, "netdev" if egress else "inet")
    shared: dict[str, Chain] = {}
    for one in group:
        own = passes.get(one.policy.name, ())
        _Lowering(one, table, shared, findings, kept, capabilities, own)
    _value_sets(table, group)
    table.chains.extend(shared.values())
    _reach(table, findings)
    _share_sets(table)
    return table


def _groups(policies: Sequence[Simplified]) -> list[list[Simplified]]:
    """The policies by table: those that share a learned set together, by the first of them."""
    groups: list[list[Simplified]] = []
    learned = {one.policy.name: set(one.policy.learned) for one in policies}
    for one in policies:
        own = learned[one.policy.name]
        joined = [g for g in groups if any(own & learned[o.policy.name] for o in g)]
        merged = [other for group in joined for other in group] + [one]
        if joined:
            groups[groups.index(joined[0])] = merged
            groups = [g for g in groups if g is merged or g not in joined]
        else:
            groups.append(merged)
    order = {one.policy.name: index for index, one in enumerate(policies)}
    return [sorted(group, key=lambda one: order[one.policy.name]) for group in groups]


def _value_sets(table: Table, group: Iterable[Simplified]) -> None:
    """The named sets that the table's rules refer to."""
    found: dict[str, ValueSet] = {}
    for one in group:
        for test in one.tests():
            if test.named is None:
                continue
            for family in FAMILIES if test.field.by_family else (ANY_FAMILY,):
                if refers(test, family):
                    name = named_set(test.named, family)
                    if name not in found:
                        found[name] = _value_set(name, test.named, test.field, family)
    rules = (rule.text for chain in table.chains for rule in chain.rules)
    asking = (_QUOTED.sub("", text) for text in rules if "@set_" in text) if found else ()
    named = {word for text in asking for word in re.findall(r"@(set_\w+)", text)}
    table.values.extend(found[name] for name in sorted(found) if name in named)


def _value_set(name: str, named: ir.NamedSet, field: Field, family: int) -> ValueSet:
    elements: Iterable[str]
    match named.values:
        case Names():
            elements = (f'"{pattern}"' for pattern in sorted(named.values.patterns))
        case Addresses():
            spans = named.values.family(family).spans
            elements = (values.prefix_text(family, lo, hi) for lo, hi in spans)
        case _:
            elements = (str(lo) if lo == hi else f"{lo}-{hi}" for lo, hi in named.values.spans)
    return ValueSet(name, field.key_type(family), tuple(elements), named.span)


def _share_sets(table: Table) -> None:
    """A set of values that many rules have in braces becomes one of the table's.

    Each set in braces is a set to the kernel, which goes through all of them for each new one.
    """
    rules = [rule for chain in table.chains for rule in chain.rules if "{" in rule.text]
    found: Counted[tuple[str, str, str]] = Counted()
    for expression, _, braces in (m.groups() for r in rules for m in _BRACES.finditer(r.text)):
        found[*_kind_of(expression), braces] += 1
    names: dict[tuple[str, str, str], str] = {}
    for (stem, type, braces), many in found.items():
        if many > _MOST_REPEATED:
            name = f"{stem}_{1 + sum(one[0] == stem for one in names)}"
            names[stem, type, braces] = name
            span = next(rule.span for rule in rules if braces in rule.text)
            elements = tuple(braces.strip("{} ").split(", "))
            ranges = any("-" in one or "/" in one for one in elements)
            table.values.append(ValueSet(name, type, elements, span, interval=ranges))
    if not names:
        return

    def named(match: re.Match[str]) -> str:
        expression, other, braces = match.groups()
        name = names.get((*_kind_of(expression), braces))
        return match[0] if name is None else f"{expression}{other or ''} @{name}"

    for chain in table.chains:
        chain.rules[:] = [
            replace(rule, text=_BRACES.sub(named, rule.text)) if "{" in rule.text else rule
            for rule in chain.rules
        ]


def _kind_of(expression: str) -> tuple[str, str]:
    """What a set of an expression's values is called, and its type."""
    if expression.endswith("port"):
        return "ports", "inet_service"
    if expression.endswith("addr"):
        return "addresses", "ipv6_addr" if expression.startswith("ip6 ") else "ipv4_addr"
    return "protocols", "inet_proto"


class _Lowering:
    """The lowering of one policy into its table."""

    def __init__(
        self,
        simplified: Simplified,
        table: Table,
        shared: dict[str, Chain],
        findings: Findings,
        kept: Kept,
        capabilities: Capabilities,
        optimisations: Collection[str],
    ) -> None:
        self.policy = simplified.policy
        self._optimisations = optimisations
        self.whole, self.fragments = simplified.whole, simplified.fragments
        self.variants = simplified.variants
        self._reassembled = simplified.reassembled
        self.facts: Facts = self.whole.facts  # of the packets that rules are being made for
        self.findings = findings
        self.table = table
        self.prefix = table.prefix(self.policy.name)
        self.names = FlowNames(self.prefix, self._labels())
        self._names: dict[str, int] = {}
        self._counted: set[str] = set()  # the names of our counters
        self._shared = shared
        self._logs = bool(self.policy.counts or self.policy.notes)
        self._updates = any(variant.updates for variant in self.variants)
        updating = f"{self.prefix}update_sets" if self._updates else ""
        self.handing = Handing(self.policy, kept, updating=updating)
        self._outward: dict[str, Tunnel] = {}
        self._stay: dict[str, int] = {}  # where connections' ways stand in their marks
        self._inward: Tunnel | None = None
        self._tunnels(kept, capabilities)
        if self.policy.overlay is not None:
            table.overlays.append(self.policy.overlay)
        self._counters()
        self._hooks()
        if self.policy.in_python:
            if self.policy.notes:
                self._notes_alone()
            settle(self.table, self.policy, self.handing, findings)
            return
        self._classify()
        if self._logs or self._updates:
            self._log()
        spans: dict[str, Span] = {}
        for rule in (rule for variant in self.variants for rule in variant.rules):
            spans.setdefault(rule.name, rule.span)
        for rule in self.policy.rules:  # a handler may give a class that no condition leads to
            if rule.name in self.handing.targets:
                spans.setdefault(rule.name, rule.span)
        for name, span in spans.items():
            self._class(name, span)
        if self._updates:
            self._update()
        self._asked_sets()
        settle(self.table, self.policy, self.handing, findings)

    # Chains and rules.

    def _chain(self, name: str, span: Span, hook: BaseHook | None = None) -> Chain:
        chain = Chain(self.prefix + name, span, self.policy.name, hook)
        self.table.chains.append(chain)
        return chain

    def _further(self, chain: Chain, span: Span) -> Chain:
        """A chain that continues one: `classify_1` for `classify`."""
        stem = chain.name.removeprefix(self.prefix).rstrip("0123456789").removesuffix("_")
        return self._numbered(stem, span)

    def _numbered(self, stem: str, span: Span) -> Chain:
        return self._chain(f"{stem}_{self._number(stem)}", span)

    def _number(self, stem: str) -> int:
        self._names[stem] = self._names.get(stem, 0) + 1
        return self._names[stem]

    def _goto(self, name: str) -> str:
        return f"goto {self.prefix}{name}"

    def _rule(self, chain: Chain, text: str, span: Span, label: str = "") -> None:
        if self.table.family == "netdev":
            # Its packets have no nfproto; the protocol above the link tells the same.
            text = re.sub(r"meta nfproto (!= )?ip(v4|v6)", _as_protocol, text)
        chain.rules.append(Rule(text.strip(), span, label))

    # Counters and sets.

    def _counter(self, name: str, kind: str, of: str, span: Span) -> str:
        """Make a named counter; its statement."""
        full = self.prefix + name
        if full not in self._counted:
            self._counted.add(full)
            counter = Counter(full, kind, of, span, self.policy.name)
            self.table.counters.append(counter)
        return f'counter name "{full}"'

    def _counters(self) -> None:
        if self.policy.in_python:  # there it counts
            return
        # A class that nothing can reach keeps its counter: it is there, at 0.
        spans = {rule.name: rule.span for rule in reversed(self.policy.rules)}
        for name in self.policy.classes:
            self._counter(f"class_{name}", "class", name, spans[name])
        for count in self.policy.counts:
            flow = count.flow.name
            self._counter(f"flow_{flow}_uncounted", "uncounted", flow, count.span)

    # Hooks.

    def _hooks(self) -> None:
        """The base chains; several share a chain for the interest."""
        span = self.policy.interest.span
        bases = [self._base(hook, self.policy.at) for hook in self.policy.hooks]
        chain = bases[0]
        if len(bases) > 1:
            chain = self._chain("interest", span)
            for base in bases:
                self._rule(base, self._goto("interest"), span)
        overlay = self.policy.overlay
        # What Python takes out of a tunnel comes by no such rule: then nothing is watched.
        watched = [] if overlay is None or self._inward is None else self._watched("back", overlay)
        if self._inward is not None:
            self._out_of_tunnel(chain, self._inward, watched)
        for text in watched:
            self._rule(chain, text, span)
        if self.table.family == "netdev":
            self._rule(chain, "meta protocol != { ip, ip6 } return", span)
        if asks_transport(self.whole.interest) and self.fragments is not None:
            self._divert(chain, self._fragments_of_interest(chain, self.fragments), span)
        target = "classify"
        if self.policy.in_python:
            target = "note_packets" if self.policy.notes else "hand_over"
        self._interest(chain, self.whole.interest, self._goto(target))

    def _base(self, hook: str, span: Span) -> Chain:
        kind, _, device = hook.partition(" ")
        # Only chains of this type have a packet of our own routed anew.
        reroutes = kind == "output" and any(step.action.reroutes for step in self._all_steps())
        name = kind + (f"_{re.sub(r'[^A-Za-z0-9_]', '_', device.strip(chr(34)))}" if device else "")
        while any(c.name == self.prefix + name for c in self.table.chains):
            name += f"_{self.policy.hooks.index(hook)}"
        priority = MANGLE + self.policy.priority
        return self._chain(name, span, BaseHook(hook, priority, "route" if reroutes else "filter"))

    def _all_steps(self) -> Iterable[ir.Step]:
        stack = [step for steps in self.policy.process.values() for step in steps]
        while stack:
            match stack.pop():
                case ir.Step() as step:
                    yield step
                case ir.Limit() as limit:
                    stack.extend(limit.otherwise)

    def _interest(self, chain: Chain, interest: ir.Condition, target: str) -> None:
        inside, self.facts = self.facts, Facts(self.policy.hooks)  # nothing is known yet
        self._emit(chain, interest, target, fallback="return")
        self.facts = inside

    def _fragments_of_interest(self, chain: Chain, fragments: Variant) -> str:
        """Where later fragments go, if the interest asks for ports."""
        if is_false(fragments.interest):
            return "return"
        if self.policy.in_python:
            target = self._goto("note_packets" if self.policy.notes else "hand_over")
        else:
            target = self._fragment_class(fragments)
        name = f"{chain.name.removeprefix(self.prefix)}_fragments"
        other = self._chain(name, self.policy.interest.span)
        self._interest(other, fragments.interest, target)
        return f"goto {other.name}"

    def _divert(self, chain: Chain, target: str, span: Span) -> None:
        """Rules that send later fragments elsewhere; behind connection tracking there are none."""
        for family, match in _LATER_FRAGMENT.items():
            if family in self.facts.families and not self._reassembled:
                self._rule(chain, f"{match} {target}", span)

    # Classification.

    @property
    def _unclassified(self) -> str:
        return self._goto("log_flows") if self._logs or self._updates else "return"

    def _fragment_class(self, fragments: Variant) -> str:
        """Where later fragments of interest go: to their class, if that is plain."""
        if not fragments.rules:
            return self._unclassified
        if len(fragments.draws) == 1 and fragments.rules[0].condition is None:
            return self._goto(f"class_{fragments.rules[0].name}")
        return self._goto("classify_fragments")

    def _classify(self) -> None:
        chain = self._chain("classify", self.policy.span)
        if self.fragments is not None:
            target = self._fragment_class(self.fragments)
            asked = [r for r in self.policy.rules if r.condition and asks_transport(r.condition)]
            if asked and not asks_transport(self.whole.interest):
                self._divert(chain, target, asked[0].span)
            self._draws(chain, self.whole)
            if target == self._goto("classify_fragments"):
                self._draws(self._chain("classify_fragments", self.policy.span), self.fragments)
        else:
            self._draws(chain, self.whole)

    def _draws(self, chain: Chain, variant: Variant) -> None:
        """The classes; where they ask for `random`, one number is drawn for all of them."""
        if len(variant.draws) == 1:
            self._rules(chain, variant.draws[0], variant.facts)
            return
        span = variant.rules[0].span if variant.rules else self.policy.span
        entries = []
        for draw in variant.draws:
            drawn = self._further(chain, span)
            entries.append(f"{_interval(draw)} : goto {drawn.name}")
            self._rules(drawn, draw, variant.facts)
        mapping = f"numgen random mod {MOST_DRAWN + 1} vmap {{ {', '.join(entries)} }}"
        self._rule(chain, mapping, span)

    def _rules(self, chain: Chain, draw: Draw, facts: Facts) -> None:
        asked = list(takewhile(lambda rule: rule.condition is not None, draw.rules))
        last = draw.rules[len(asked)] if len(asked) < len(draw.rules) else None
        final = self._unclassified if last is None else self._goto(f"class_{last.name}")
        steps = dispatch(asked, facts, self._optimisations)
        self._tables_of_classes().steps(chain, steps, facts, final)
        if last is not None:
            self._rule(chain, final, last.span, last.name)
        elif final != "return":
            logged = (*self.policy.counts, *self.policy.notes, *self.policy.updates)
            self._rule(chain, final, logged[0].span)

    def _tables_of_classes(self) -> Dispatching:
        return Dispatching(
            self.table, self.prefix, self.names, self._further, self._number, self._rule,
            self._emit_with,
        )  # fmt: skip

    def _emit_with(
        self,
        chain: Chain,
        condition: ir.Condition,
        target: str,
        fallback: str,
        label: str,
        facts: Facts,
    ) -> None:
        outside, self.facts = self.facts, facts
        self._emit(chain, condition, target, fallback, label)
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
        alternatives = disjuncts(condition)
        if len(alternatives) > 1:
            alternatives = tuple(sorted(alternatives, key=lambda t: not is_positive(t)))
        for index, term in enumerate(alternatives):
            last = index == len(alternatives) - 1
            self._emit_conjunction(chain, term, target, fallback if last else "", label)

    def _emit_conjunction(
        self, chain: Chain, condition: ir.Condition, target: str, fallback: str, label: str
    ) -> None:
        terms = conjuncts(condition)
        positive: list[Leaf] = []
        negative: list[Asked] = []
        choices: list[ir.Or] = []
        for term in terms:
            match term:
                case ir.Or():
                    choices.append(term)
                case ir.Not(term=ir.Test() | ir.Member() | ir.Bits() | ir.Over() as leaf):
                    negative.append(leaf)
                case ir.Test() | ir.Member() | ir.Bits() | ir.Over():
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

    def _exclude(self, chain: Chain, leaves: Sequence[Asked], verdict: str, label: str) -> None:
        for leaf in leaves:
            self._match(chain, [leaf], verdict, leaf.span, label)

    def _match(
        self, chain: Chain, leaves: Sequence[Leaf], verdict: str, span: Span, label: str
    ) -> None:
        for _, text in matches(leaves, self.facts, self.names):
            self._rule(chain, f"{text} {verdict}", span, label)

    # Logging.

    def _labels(self) -> dict[tuple[str, str, int], str]:
        """For thresholds that come from a parameter, its name: by flow, attribute and value."""
        labels: dict[tuple[str, str, int], str] = {}
        for flow in self.policy.flows:
            for attribute, thresholds in self._asked(flow).items():
                for threshold, span in thresholds:
                    words = re.findall(r"\w+", span.text)
                    named = [word for word in words if word in self.policy.parameters]
                    if named:
                        labels[flow.name, attribute, threshold] = self._label(
                            named[0], (flow.name, attribute), labels
                        )
        return labels

    @staticmethod
    def _label(name: str, asked: tuple[str, str], known: Mapping[tuple[str, str, int], str]) -> str:
        """A label that no other threshold of the flow has: `threshold`, `threshold_2`."""
        # `over_x` would read as another set's name.
        stem = f"param_{name}" if name.startswith("over_") else name
        taken = {label for key, label in known.items() if key[:2] == asked}
        names = (stem, *(f"{stem}_{number}" for number in range(2, len(taken) + 3)))
        return next(label for label in names if label not in taken)

    @cached_property
    def _overs(self) -> list[ir.Over]:
        """What is asked of flows, in order."""
        return [
            leaf
            for variant in self.variants
            for asked in (*variant.rules, *variant.updates)
            for leaf in ir.leaves(asked.condition)
            if isinstance(leaf, ir.Over)
        ]

    def _asked(self, flow: ir.Flow) -> dict[str, list[tuple[int, Span]]]:
        """For each attribute, the thresholds (number, place) that are asked of a flow, sorted."""
        found: dict[tuple[str, int], Span] = {}
        for leaf in self._overs:
            if leaf.flow is flow:
                found.setdefault((leaf.attribute, leaf.threshold), leaf.span)
        by_attribute: dict[str, list[tuple[int, Span]]] = {}
        for attribute, threshold in sorted(found):
            place = (threshold, found[attribute, threshold])
            by_attribute.setdefault(attribute, []).append(place)
        return by_attribute

    def _log(self) -> None:
        """What is done with each packet of interest; those without a class end here, too."""
        first = (*self.policy.counts, *self.policy.notes, *self.policy.updates)[0]
        chain = self._chain("log_flows", first.span)
        if self._updates:
            # For a packet of class 0 nothing comes between logging and updating.
            both, chain = chain, self._chain("log_only", first.span)
            if self._logs:
                self._rule(both, f"jump {chain.name}", first.span)
            else:
                self.table.chains.remove(chain)
            self._rule(both, self._goto("update_sets"), self.policy.updates[0].span)
        for note in self.policy.notes:
            self._note(chain, note)
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

    def _notes_alone(self) -> None:
        """Samples and records of a policy whose other parts run in Python."""
        span = self.policy.notes[0].span
        chain = self._chain("note_packets", span)
        for note in self.policy.notes:
            self._note(chain, note)
        self._rule(chain, self._goto("hand_over"), span)

    def _note(self, chain: Chain, note: ir.Sample | ir.Record) -> None:
        """A sample or a record, counted."""
        match note:
            case ir.Sample():
                counter = self._counter("sampled", "sampled", "", note.span)
                text = (
                    f"numgen inc mod {note.many} 0 {counter} "
                    f'log prefix "{self.policy.name}" group {note.group} snaplen 128'
                )
            case ir.Record():
                counter = self._counter("recorded", "recorded", "", note.span)
                rate = f"{note.amount}/{rates.unit(note.seconds)} burst {note.amount} packets"
                text = f'limit rate {rate} {counter} log prefix "{note.prefix}"'
        self._rule(chain, text, note.span)

    def _count(self, chain: Chain, count: ir.Count, family: int) -> None:
        """Count one flow for one family, and meter it for each threshold."""
        flow = count.flow
        matched = key_match(flow.key, family, self.facts, flow.span)
        if matched is None:
            self.findings.warning(
                "W006",
                f"no packet here has the key of `{flow.name}`: it counts nothing",
                count.span,
            )
            return
        guard, key = matched
        asked = self._asked(flow)
        ages = [threshold for threshold, _ in asked.get("age", ())]
        known = self.names.over(flow, "packets", 0, family)
        for threshold in ages:
            # Put among the young by its first packet, and taken out by time alone.
            young = self.names.meter(flow, "age", threshold, family)
            # A young flow may outlive its entry, so there can be more of them than entries:
            # each place in the table is taken anew once a time-out at most.
            often = 0 if flow.timeout is None else -(-threshold // flow.timeout)
            size = min(flow.size * (1 + often), _MOST_ELEMENTS)
            self._flow_set(
                flow, young, "young", family, key, timeout=threshold, size=size,
                attribute="age", threshold=threshold,
            )  # fmt: skip
        if ages:
            # Known first: what finds no room there is not young either.
            entries = "".join(
                f"update @{self.names.meter(flow, 'age', threshold, family)} {{ {key} }} "
                for threshold in ages
            )
            new = f"{key} != @{known} update @{known} {{ {key} }} {entries}"
            self._rule(chain, f"{guard} {new}", count.span)
        # One packet takes a flow over a threshold of 0: it needs no meter, and comes
        # first, so that a flow that finds no room there is not counted either.
        totals = [(a, n, s) for a in ("bytes", "packets") for n, s in asked.get(a, ())]
        zero = dict.fromkeys(attribute for attribute, number, _ in totals if number == 0)
        if ages:
            zero["packets"] = None
        entry = "".join(self._latch(flow, attribute, 0, family, key) for attribute in sorted(zero))
        # The counter is in a set of its own, which a moved threshold leaves alone.
        counting = self.names.count(flow, family)
        self._flow_set(flow, counting, "count", family, key, statement="counter")
        update = f"{entry}update @{counting} {{ {key} counter }} "
        for attribute, number, span in (total for total in totals if total[1]):
            name = self.names.meter(flow, attribute, number, family)
            meter = self._meter(attribute, number, span)
            self._flow_set(
                flow, name, "meter", family, key,
                statement=meter, attribute=attribute, threshold=number,
            )  # fmt: skip
            latch = self._latch(flow, attribute, number, family, key)
            metered = f"update @{name} {{ {key} {meter} }} {latch}"
            self._rule(chain, f"{guard} {update}{metered}", count.span)
            update = ""
        if update:
            self._rule(chain, f"{guard} {update}", count.span)
        uncounted = self._counter(f"flow_{flow.name}_uncounted", "uncounted", flow.name, count.span)
        self._rule(chain, f"{guard} {key} != @{counting} {uncounted}", count.span)
        for attribute in ("byte_rate", "packet_rate"):
            for threshold, span in asked.get(attribute, ()):
                self._rate(chain, count, family, guard, key, attribute, threshold, span)
        for threshold, _ in asked.get("connections", ()):
            self._connections(chain, count, family, guard, key, threshold)

    def _rate(
        self,
        chain: Chain,
        count: ir.Count,
        family: int,
        guard: str,
        key: str,
        attribute: str,
        threshold: int,
        span: Span,
    ) -> None:
        """A bucket in each element, one period deep; where it runs out, the flow is over."""
        flow, in_bytes = count.flow, attribute == "byte_rate"
        amount, seconds, _ = rates.period(threshold, in_bytes)
        if not rates.fits(amount, seconds, 0 if in_bytes else amount, in_bytes):
            self.findings.error(
                "E042", "the kernel cannot measure this rate", span,
                help=rates.advice(amount, seconds, 0, in_bytes),
            )  # fmt: skip
            return
        name = self.names.meter(flow, attribute, threshold, family)
        limit = _limit(amount, seconds, in_bytes, 0 if in_bytes else amount)
        self._flow_set(flow, name, "bucket", family, key, statement=limit)
        over = self.names.over(flow, attribute, threshold, family)
        self._flow_set(flow, over, "recent", family, key, timeout=OVER_RATE)
        update = f"update @{name} {{ {key} {limit} }}"
        self._rule(chain, f"{guard} {update} update @{over} {{ {key} }}", count.span)

    def _connections(
        self, chain: Chain, count: ir.Count, family: int, guard: str, key: str, threshold: int
    ) -> None:
        """The flow's open connections, counted by conntrack; over or not as of this packet."""
        flow = count.flow
        name = self.names.meter(flow, "connections", threshold, family)
        # The kernel takes no time-out here; it drops elements without connections.
        self._flow_set(
            flow, name, "connections", family, key,
            timeout=None, timed=False, statement=f"ct count over {threshold}",
        )  # fmt: skip
        over = self.names.over(flow, "connections", threshold, family)
        self._flow_set(flow, over, "busy", family, key)
        inner = self._numbered("connections", count.span)
        # The kernel would count a packet of no connection as one, or drop it if it cannot.
        tracked = "ct state != { invalid, untracked }"
        self._rule(chain, f"{guard} {tracked} jump {inner.name}", count.span)
        update = f"update @{over} {{ {key} }}"
        counted = f"add @{name} {{ {key} ct count over {threshold} }}"
        self._rule(inner, f"{counted} {update} return", count.span)
        self._rule(inner, f"delete @{over} {{ {key} }}", count.span)

    def _latch(self, flow: ir.Flow, attribute: str, threshold: int, family: int, key: str) -> str:
        name = self.names.over(flow, attribute, threshold, family)
        self._flow_set(flow, name, "over", family, key, attribute=attribute, threshold=threshold)
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
        unit = rates.slowest(threshold, in_bytes=False)
        return f"limit rate over 1/{unit} burst {threshold} packets"

    def _flow_set(
        self,
        flow: ir.Flow,
        name: str,
        role: str,
        family: int,
        key: str,
        *,
        timeout: int | None = -1,
        timed: bool = True,
        size: int = 0,
        statement: str = "",
        attribute: str = "",
        threshold: int = 0,
    ) -> None:
        """A set of the flow's; its time-out and size are the flow's if none is given."""
        self.table.sets.append(
            FlowSet(
                name=name,
                policy=self.policy.name,
                flow=flow.name,
                role=role,
                family=family,
                key=tuple(f.name for f in flow.key),
                types=tuple(f.key_type(family) for f in flow.key),
                expression=key,
                size=size or flow.size,
                timeout=flow.timeout if timeout == -1 else timeout,
                span=flow.span,
                timed=timed,
                statement=statement,
                attribute=attribute,
                threshold=threshold,
            )
        )

    # Processing.

    def _class(self, name: str, span: Span) -> None:
        chain = self._chain(f"class_{name}", span)
        counter = self._counter(f"class_{name}", "class", name, span)
        logging = "log_only" if self._updates else "log_flows"
        log = f" jump {self.prefix}{logging}" if self._logs else ""
        steps = self.policy.process.get(name, ())
        self._elsewhere(chain, steps, name)
        self._rule(chain, f"{counter}{log}", span, name)
        if name in self.handing.targets:
            # Packets come here that were counted already, as those of another class.
            self._rule(chain, self._goto(f"moved_{name}"), span, name)
            chain = self._chain(f"moved_{name}", span)
            self.handing.moved[name] = chain.name
        self._act(chain, steps, 0, span, name)

    def _act(self, chain: Chain, steps: ir.Steps, start: int, span: Span, name: str) -> None:
        """The actions from one on: what nftables can say, then what it hands over to Python."""
        begin = ir.python_part(steps, start)
        last = steps[-1] if steps else None
        if isinstance(last, ir.Step) and isinstance(last.action, RouteBy):
            self._steps(chain, steps[start:-1], name)
            self._route(chain, last, last.action, name)
            return
        self._steps(chain, steps[start:begin], name)
        if begin < len(steps):
            step = steps[begin]
            if name in self._outward:
                self._into_tunnel(chain, step.span, name)
                return
            if isinstance(step, ir.Step) and step.action.defragments:
                self._rule(chain, defragmented(self.policy), step.span, name)
            number = self.handing.number(name, begin, step.span)
            if isinstance(step, ir.Step) and step.action.once:
                self._decided(chain, steps, begin, name)
            elif self._updates:
                self._rule(chain, f"jump {self.prefix}update_sets", step.span, name)
            self._rule(chain, marks.with_class(number), step.span, name)
            self._rule(chain, self._goto("to_python"), step.span, name)
            return
        # The verdict is always given: `classify` may have jumped here, and a chain
        # that just ends would return into it.
        if not ir.verdict(steps):
            self._end(chain, ("accept",), steps[-1].span if steps else span, name)

    def _route(self, chain: Chain, step: ir.Step, action: RouteBy, name: str) -> None:
        """To the rules of the chosen neighbour; where none is chosen, packets go directly."""
        overlay = next(one for one in self.policy.routes if one.name == action.overlay)
        map = f"{self.prefix}{overlay.chosen}"
        # What came out of a tunnel, and the runtime's probes, have a number in the mark.
        free = f"meta mark & {marks.TUNNEL_BITS:#010x} == 0 "
        if not self._updates:
            self._rule(chain, f"{tunnels.TAKEN} accept", step.span, name)
            free = ""
        known = any(one.name == map for one in self.table.sets)
        if not overlay.in_python:
            for text in self._watched("sent", overlay):
                self._rule(chain, f"{free}{text}", step.span, name)
        stays = self._staying(overlay)
        if stays:
            to = f"@{self.prefix}{overlay.staying}"
            self._rule(chain, f"{free}{stays} vmap {to}", step.span, name)
        self._rule(chain, f"{free}ip daddr vmap @{map}", step.span, name)
        self._end(chain, step.action.ending, step.span, name)
        if known:
            return
        self.table.sets.append(
            FlowSet(
                name=map, policy=self.policy.name, flow="", role="route", family=IPV4,
                key=("daddr",), types=("ipv4_addr",), expression="ipv4_addr : verdict",
                size=2 * overlays.MOST_DESTINATIONS, timeout=None, span=step.span,
            )
        )  # fmt: skip
        if stays:
            self.table.sets.append(
                FlowSet(
                    name=f"{self.prefix}{overlay.staying}", policy=self.policy.name, flow="",
                    role="stay", family=0, key=("mark",), types=("mark",),
                    expression="mark : verdict", size=marks.MOST_TUNNELS, timeout=None, threshold=self._stay[overlay.name],
                    span=step.span,
                )
            )  # fmt: skip
        for number, neighbor in enumerate(overlay.neighbors, 1):
            by = overlays.via(overlay.name, neighbor.name)
            one = self._chain(f"via_{neighbor.name}", neighbor.span)
            one.role = "via"
            label = f"via {neighbor.name}"
            if stays:
                value = number << self._stay[overlay.name]
                others = marks.ALL ^ overlays.STAY_BITS << self._stay[overlay.name]
                keep = f"ct mark set ct mark & {others:#010x} | {value:#010x}"
                self._rule(one, f"{stays} != {value:#010x} {keep}", neighbor.span, label)
            counter = self._counter(f"via_{neighbor.name}", "via", neighbor.name, neighbor.span)
            self._rule(one, counter, neighbor.span, label)
            self._act(one, self.policy.process[by], 0, neighbor.span, by)

    def _staying(self, overlay: overlays.Overlay) -> str:
        """The bits of a connection's mark that say by which neighbour it goes; "" if it may move."""
        if not overlay.sticky:
            return ""
        if overlay.name not in self._stay:
            place = self.handing.kept.take(overlays.STAY_BITS.bit_length())
            if place is None:
                self.findings.error(
                    "E062", "the connection's mark has no room for one more sticky overlay",
                    overlay.span, help="leave `sticky` out",
                )  # fmt: skip
            self._stay[overlay.name] = place or 0
        return f"ct mark & {overlays.STAY_BITS << self._stay[overlay.name]:#010x}"

    def _watched(self, what: str, overlay: overlays.Overlay) -> list[str]:
        """Rules that count an overlay's TCP packets, "sent" or come "back", by egress: a path that
        answers probes may lose data. For a few they are as quick as a look-up."""
        field = "daddr" if what == "sent" else "saddr"
        to = {
            egress: [
                values.prefix_text(IPV4, *overlays.ends(prefix))
                for one in overlay.destinations
                if one.egress == egress
                for prefix in one.prefixes
            ]
            for egress in overlay.egresses
        }
        counters = {
            egress: self._counter(name, what, name, overlay.span)
            for egress in to
            for name in (overlays.counted(what, egress),)
        }
        if len(to) < FEWEST:
            return [
                f"meta l4proto tcp ip {field} "
                + (networks[0] if len(networks) == 1 else f"{{ {', '.join(networks)} }}")
                + f" {counters[egress]}"
                for egress, networks in to.items()
            ]
        name = f"{self.prefix}{what}_{overlay.name}"
        if all(one.name != name for one in self.table.values):
            elements, verdicts = [], []
            for egress, networks in to.items():
                counting = self._chain(overlays.counted(what, egress), overlay.span)
                self._rule(counting, counters[egress], overlay.span)
                elements += networks
                verdicts += [f"jump {counting.name}"] * len(networks)
            self.table.values.append(
                ValueSet(name, "ipv4_addr", tuple(elements), overlay.span, verdicts=tuple(verdicts))
            )
        return [f"meta l4proto tcp ip {field} vmap @{name}"]

    def _into_tunnel(self, chain: Chain, span: Span, name: str) -> None:
        """The class's packets go into a tunnel of the kernel's own."""
        tunnel = self._outward[name]
        if self._updates:
            self._rule(chain, f"jump {self.prefix}update_sets", span, name)
        stem = f"tunnel_to_{values.address_text(IPV4, tunnel.destination).replace('.', '_')}"
        found = [c for c in self.table.chains if c.role == "tunnel" and c.number == tunnel.number]
        if not found:
            into = self._numbered(stem, span) if self._has(stem) else self._chain(stem, span)
            into.role, into.number = "tunnel", tunnel.number
            for text in tunnels.rules(tunnel, ""):
                self._rule(into, text, span, name)
            found = [into]
        self._rule(chain, f"goto {found[0].name}", span, name)

    def _has(self, name: str) -> bool:
        return any(c.name == self.prefix + name for c in self.table.chains)

    def _tunnels(self, kept: Kept, capabilities: Capabilities) -> None:
        """Find which classes the kernel's tunnels can serve, as far as there are numbers."""
        policy = self.policy
        for name in (*policy.classes, *policy.ways):
            span = next((s.span for s in policy.process.get(name, ()) if s.in_python), policy.span)
            way, end = outward(policy, name), inward(policy, name)
            if way is not None and "BPF on routes" in capabilities.features:
                number = kept.tunnel((way.destination, way.source))
                if number is not None:
                    made = Tunnel(
                        policy.name, name, number, span,
                        destination=way.destination, source=way.source or 0,
                    )  # fmt: skip
                    self._outward[name] = made
                    self.table.tunnels.append(made)
            if isinstance(end, Inward) and "BPF on links" in capabilities.features:
                number = kept.tunnel((policy.name, name))
                if number is not None:
                    self._inward = Tunnel(
                        policy.name, name, number, span, inward=True, sources=end.sources,
                        destinations=end.destinations, devices=end.devices,
                    )  # fmt: skip
                    self.table.tunnels.append(self._inward)

    def _out_of_tunnel(self, chain: Chain, tunnel: Tunnel, watched: Iterable[str]) -> None:
        """What a program on the link took out of a tunnel is counted for its class."""
        name, span = tunnel.name, tunnel.span
        taken = self._chain(f"taken_{name}", span)
        taken.role, taken.number = "tunnel", tunnel.number
        counter = self._counter(f"class_{name}", "class", name, span)
        for text in tunnels.rules(tunnel, counter, watched):
            self._rule(taken, text, span, name)
        # An overlay's own policy has nothing else to ask of what goes into a tunnel.
        word = "jump" if self.policy.overlay is None else "goto"
        self._rule(chain, f"{tunnels.TAKEN} {word} {taken.name}", span, name)

    def _decided(self, chain: Chain, steps: ir.Steps, index: int, name: str) -> None:
        """What was decided for the connection holds, and its packets stay in the kernel."""
        step = steps[index]
        accepted = self._chain(f"decided_{name}", step.span)
        dropped = self._chain(f"dropped_{name}", step.span)
        self.handing.deciding[name] = accepted.name
        self.handing.dropping = dropped.name
        accept = (f"accept {name}", f"accept {name} marked")
        self._rule(chain, self.handing.restored(accept[1:]), step.span, name)
        targets = {**dict.fromkeys(accept, accepted.name), "drop": dropped.name}
        self._rule(chain, self.handing.lookup(targets), step.span, name)
        self._end(dropped, ("drop",), step.span, name)
        self._act(accepted, steps, index + 1, step.span, name)

    def _elsewhere(self, chain: Chain, steps: ir.Steps, name: str) -> None:
        """Packets of a connection that was given another class go there, before they are counted."""
        step = next((s for s in steps if isinstance(s, ir.Step) and s.action.once), None)
        if step is None or not self.handing.targets:
            return
        plain = {f"class {t}": f"{self.prefix}class_{t}" for t in self.handing.targets}
        marked = {f"{one} marked": target for one, target in plain.items()}
        self._rule(chain, self.handing.restored(marked), step.span, name)
        self._rule(chain, self.handing.lookup({**plain, **marked}), step.span, name)

    def _steps(self, chain: Chain, steps: ir.Steps, label: str) -> None:
        for step in steps:
            if isinstance(step, ir.Limit):
                self._limit(chain, step, label)
                continue
            rules: dict[str, None] = {}
            for family in self.facts.families:
                lowered = step.action.lower(family, self.facts.protocols)
                if lowered is None:
                    raise NotImplementedError(f"{step.action} is not placed in the kernel")
                rules.update(dict.fromkeys(lowered.rules))
                for shared, content in lowered.chains.items():
                    if shared not in self._shared:
                        self._shared[shared] = Chain(shared, step.span)
                        for text in content:
                            self._rule(self._shared[shared], text, step.span)
            for text in rules:
                self._rule(chain, text, step.span, label)
            if step.action.verdict:
                self._end(chain, step.action.ending, step.span, label)

    def _end(self, chain: Chain, ending: Iterable[str], span: Span, label: str) -> None:
        """What comes last: the updates, then the verdict."""
        if self._updates:
            self._rule(chain, f"jump {self.prefix}update_sets", span, label)
        for text in ending:
            self._rule(chain, text, span, label)

    def _limit(self, chain: Chain, limit: ir.Limit, label: str) -> None:
        """A packet that finds the bucket empty goes another way, and may come back."""
        verb = "goto" if ir.verdict(limit.otherwise) else "jump"
        plain = limit.otherwise[0] if len(limit.otherwise) == 1 else None
        if isinstance(plain, ir.Step) and plain.action.verdict == "drop" and not self._updates:
            target = "drop"
        elif limit.otherwise:
            otherwise = self._numbered("limit", limit.span)
            target = f"{verb} {otherwise.name}"
        else:
            return
        over = _limit(limit.amount, limit.seconds, limit.in_bytes, limit.burst)
        if limit.flow is None:
            self._rule(chain, f"{over} {target}", limit.span, label)
        else:
            self._limit_each(chain, limit, limit.flow, over, target, label)
        if target != "drop":
            self._steps(otherwise, limit.otherwise, label)

    def _limit_each(
        self, chain: Chain, limit: ir.Limit, flow: ir.Flow, over: str, target: str, label: str
    ) -> None:
        """A bucket for each entry of a flow; a later fragment is in none that has ports."""
        buckets = self._number("buckets")
        if keyed_by_transport(flow) and not self._reassembled:
            outer, chain = chain, self._chain(f"buckets_{buckets}", limit.span)
            self._rule(outer, f"jump {chain.name}", limit.span, label)
            self._divert(chain, "return", limit.span)
        for family in self.facts.families if flow.by_address else (ANY_FAMILY,):
            matched = key_match(flow.key, family, self.facts, flow.span)
            if matched is None:
                continue
            guard, key = matched
            name = f"{self.names.count(flow, family)}_limit_{buckets}"
            self._flow_set(flow, name, "limit", family, key, statement=over)
            text = f"{guard} update @{name} {{ {key} {over} }} {target}"
            self._rule(chain, text, limit.span, label)

    # Updating.

    def _update(self) -> None:
        chain = self._chain("update_sets", self.policy.updates[0].span)
        # As they were written: a variant no longer asks whether it is one of fragments.
        asked = self.policy.updates
        by_transport = any(
            (u.condition is not None and asks_transport(u.condition))
            or u.field.protocols is not None
            for u in asked
        )
        if self.fragments is not None and by_transport:
            target = "return"
            if self.fragments.updates:
                target = self._goto("update_fragments")
                self._changes(self._chain("update_fragments", chain.span), self.fragments)
            self._divert(chain, target, chain.span)
        self._changes(chain, self.whole)

    def _changes(self, chain: Chain, variant: Variant) -> None:
        outside, self.facts = self.facts, variant.facts
        for update in variant.updates:
            if update.condition is None:
                self._change(chain, update)
                continue
            # In chains of their own, so that a condition of many parts counts once.
            asked, inner = (
                self._numbered("update", update.span),
                self._numbered("change", update.span),
            )
            before = len(self.table.chains)
            self._emit(asked, update.condition, f"goto {inner.name}", "return")
            self._change(inner, update)
            inside = [asked, *self.table.chains[before:]]
            if any(" jump " in f" {rule.text}" for one in inside for rule in one.rules):
                self._once(chain, inside, inner, update.span)
            else:
                self._rule(chain, f"jump {asked.name}", update.span)
        self.facts = outside

    def _once(self, chain: Chain, inside: Sequence[Chain], change: Chain, span: Span) -> None:
        """A change for a condition of several chains, which ends in them and not behind them.

        It would be made (and counted) again for each alternative that holds. So it sets a
        bit of the mark, one of the compiler's own, at which the others stop.
        """
        clear = f"meta mark set meta mark & {marks.ALL ^ marks.CHANGED:#010x}"
        for one in inside:
            rules, one.rules = one.rules, []
            for index, rule in enumerate(rules):
                one.rules.append(rule)
                if " jump " in f" {rule.text}" and index < len(rules) - 1:
                    self._rule(one, f"meta mark & {marks.CHANGED:#010x} != 0 return", rule.span)
        self._rule(change, f"meta mark set meta mark | {marks.CHANGED:#010x}", span)
        self._rule(chain, clear, span)
        self._rule(chain, f"jump {inside[0].name}", span)
        self._rule(chain, clear, span)

    def _change(self, chain: Chain, update: ir.Addition | ir.Removal) -> None:
        for family in self.facts.families if update.field.by_family else (ANY_FAMILY,):
            matched = key_match([update.field], family, self.facts, update.span)
            if matched is None or not update.field.in_family(family):
                continue
            guard, key = matched
            name = self._learned_set(update.set, update.field, family, key)
            if isinstance(update, ir.Removal):
                self._rule(chain, f"{guard} delete @{name} {{ {key} }}", update.span)
                continue
            time = f" timeout {duration(update.timeout)}" if update.timeout is not None else ""
            self._rule(chain, f"{guard} update @{name} {{ {key}{time} }}", update.span)
            counter = f"set_{update.set.name}_unlearned"
            statement = self._counter(counter, "unlearned", update.set.name, update.span)
            self._rule(chain, f"{guard} {key} != @{name} {statement}", update.span)

    def _asked_sets(self) -> None:
        """The learned sets that conditions ask, whoever fills them."""
        for leaf in (leaf for c in self.policy.conditions for leaf in ir.leaves(c)):
            if not isinstance(leaf, ir.Member):
                continue
            families = FAMILIES if leaf.set.known is None else (IPV4,)
            for family in families if leaf.field.by_family else (ANY_FAMILY,):
                matched = key_match([leaf.field], family, self.facts, leaf.span)
                if matched is not None:
                    self._learned_set(leaf.set, leaf.field, family, matched[1])

    def _learned_set(self, one: ir.LearnedSet, field: Field, family: int, key: str) -> str:
        name = named_set(one, family)
        timeout: int | None = FOR_EVER if one.timeout is None else one.timeout
        role = "learned"
        if one.known is not None:
            role, timeout, key = "networks", None, field.key_type(family)
        if all(s.name != name for s in self.table.sets):
            self.table.sets.append(
                FlowSet(
                    name=name, policy="", flow=one.name, role=role, family=family,
                    key=(field.name,), types=(field.key_type(family),), expression=key,
                    size=one.size, timeout=timeout, span=one.span,
                )
            )  # fmt: skip
        return name


def _limit(amount: int, seconds: int, in_bytes: bool, burst: int) -> str:
    """The statement that holds for packets over a rate."""
    unit = rates.unit(seconds)
    if in_bytes:
        extra = f" burst {burst} bytes" if burst else ""
        return f"limit rate over {amount} bytes/{unit}{extra}"
    return f"limit rate over {amount}/{unit} burst {burst} packets"


def _interval(draw: Draw) -> str:
    return str(draw.low) if draw.low == draw.high else f"{draw.low}-{draw.high}"


def _as_protocol(found: re.Match[str]) -> str:
    return f"meta protocol {found[1] or ''}ip" + ("6" if found[2] == "v6" else "")


# What can be reached, and how deep.


def _reach(table: Table, findings: Findings) -> None:
    """Drop chains that nothing leads to, and values that no rule asks; refuse what is too deep."""
    follow = {chain.name: chain for chain in table.chains}
    leading = {one.name: {verdict.split()[1] for verdict in one.verdicts} for one in table.values}
    asked: set[str] = set()
    level = table.base_chains
    found = {chain.name for chain in level}
    depth = 0
    while level:
        text = "\n".join(
            rule.text if "log prefix" not in rule.text else _QUOTED.sub("", rule.text)
            for chain in level
            for rule in chain.rules
        )
        reached = set(_TARGET.findall(text))
        here = set(_ASKED.findall(text))
        asked |= here
        for name in here & leading.keys():
            reached |= leading[name]
        if "vmap @" in text and "route_" in text:
            reached |= {chain.name for chain in table.chains if chain.role == "via"}
        level = [follow[name] for name in sorted(reached) if name in follow]
        found |= {chain.name for chain in level}
        depth += 1
        if depth == DEEPEST_CHAIN and level:
            findings.error(
                _TOO_DEEP,
                f"a condition nests too deep for the kernel, which follows {DEEPEST_CHAIN} jumps",
                level[0].span,
                help="split it into several `CLASS when …` lines: they are or-ed",
            )
            return
    table.chains[:] = [chain for chain in table.chains if chain.name in found]
    table.values[:] = [one for one in table.values if one.name in asked]
