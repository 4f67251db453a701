"""Tests -> nftables matches.

A rule is a conjunction of tests. A test of an address or of an IP header field
reads differently for IPv4 and IPv6, so a conjunction that has one becomes a
match for each family; all others become one match for both. What nftables
leaves to its reader is made explicit here: a port is one only behind a protocol
that has ports, an interface name only where there is an interface.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from itmlang import ir, values
from itmlang.fields import ANY_FAMILY, EGRESS, FIELDS, INGRESS, Field, hook_kind
from itmlang.rates import period
from itmlang.simplify import Facts, protocols_of
from itmlang.source import Span
from itmlang.values import IPV4, Names, Ranges, ValueSet


@dataclass(frozen=True)
class Lookup:
    """The packet has the field, and it is looked up: `text` is `@SET` or `vmap @MAP`.

    The lowest `bits` of the value do not count.
    """

    field: Field
    text: str
    bits: int = 0


Asked = ir.Test | ir.Member | ir.Bits | ir.Over
Leaf = Asked | Lookup

# Types of which nftables has a set with intervals that any field of the type can ask.
_SET_TYPES = (values.ADDRESS, values.PORT, values.INTERFACE, values.PROTOCOL)

_IPV6_HEADER, _LONGEST = 40, 65_535

# The protocols whose header nft knows by name, for `tcp sport` instead of `th sport`.
_HEADERS = {6: "tcp", 17: "udp", 33: "dccp", 132: "sctp", 136: "udplite"}


@dataclass(frozen=True)
class FlowNames:
    """How the sets of a policy's flows are called.

    A threshold that comes from a parameter goes by the parameter's name (`labels`, by
    flow, attribute and value), so that its sets stay the same when the value moves.
    """

    prefix: str = ""
    labels: Mapping[tuple[str, str, int], str] = field(default_factory=dict)

    def count(self, flow: ir.Flow, family: int) -> str:
        """The set with a counter for each flow."""
        return self.prefix + flow_set(flow, family)

    def meter(self, flow: ir.Flow, attribute: str, threshold: int, family: int) -> str:
        """The set whose elements tell when a flow passes a threshold; of an age, the young."""
        return f"{self.count(flow, family)}_{self._threshold(flow, attribute, threshold)}"

    def over(self, flow: ir.Flow, attribute: str, threshold: int, family: int) -> str:
        """The set of the flows that are past a threshold."""
        return f"{self.count(flow, family)}_over_{self._threshold(flow, attribute, threshold)}"

    def _threshold(self, flow: ir.Flow, attribute: str, threshold: int) -> str:
        label = self.labels.get((flow.name, attribute, threshold))
        return f"{label}_{attribute}" if label else threshold_name(attribute, threshold)


@dataclass(frozen=True)
class Context:
    """The packets a rule sees, narrowed by the rule's own test of the protocol."""

    facts: Facts
    protocols: Ranges

    @property
    def header(self) -> str:
        """How the transport header is called: by its protocol, or `th`."""
        spans = self.protocols.spans
        if len(spans) == 1 and spans[0][0] == spans[0][1]:
            return _HEADERS.get(spans[0][0], "th")
        return "th"


def matches(terms: Sequence[Leaf], facts: Facts, names: FlowNames) -> Iterator[tuple[int, str]]:
    """(family, match) for each family of packets on which all of the terms can hold.

    The family is ANY_FAMILY where one match serves both. An empty match holds
    for every packet. `names` are those of flow sets.
    """
    context, guard, rest = _guard(terms, facts)
    if context.protocols.empty:
        return
    names_family = any(_by_family(term, facts) for term in rest)
    for family in facts.families if names_family else (ANY_FAMILY,):
        parts = [_leaf(term, family, context, names) for term in rest]
        if any(part is None for part in parts):
            continue
        texts = [part for part in parts if part]
        if names_family and facts.families != (family,) and not _implies_family(texts):
            texts.insert(0, "meta nfproto " + ("ipv4" if family == IPV4 else "ipv6"))
        yield family, " ".join(dict.fromkeys([*guard, *texts]))


def key_expression(flow: ir.Flow, family: int, context: Context) -> str:
    """A flow's key as nftables writes it, e.g. `ip saddr . tcp sport`."""
    return " . ".join(_expression(field, family, context) for field in flow.key)


def key_match(
    key: Sequence[Field], family: int, facts: Facts, span: Span
) -> tuple[str, str] | None:
    """(match that must come first, key) for statements on a set with these fields.

    None if no packet has the key.
    """
    flow = ir.Flow("", tuple(key), None, 0, span)
    context, guard, _ = _guard([ir.Over(flow, "packets", 0, span)], facts)
    if context.protocols.empty:
        return None
    present = [f.present for f in key if f.present and not facts.always_has(f)]
    return " ".join([*guard, *present]), key_expression(flow, family, context)


def family_suffix(family: int) -> str:
    return {ANY_FAMILY: "inet", IPV4: "ip"}.get(family, "ip6")


def flow_set(flow: ir.Flow, family: int) -> str:
    """The name of the set that holds a flow's entries, and the beginning of the others' names."""
    return f"flow_{flow.name}_{family_suffix(family)}"


def threshold_name(attribute: str, threshold: int) -> str:
    """A threshold as part of a set's name: `10_packets`, `500_packets_per_second`."""
    match attribute:
        case "age":
            return f"{values.duration_text(threshold)}_age"
        case "packet_rate":
            amount, _, unit = period(threshold, False)
            return f"{amount}_packets_per_{unit}"
        case "byte_rate":
            amount, _, unit = period(threshold, True)
            return f"{amount}_bytes_per_{unit}"
        case _:
            return f"{threshold}_{attribute}"


def named_set(one: ir.AnySet, family: int) -> str:
    """The name of a named or learned set; one of addresses has two, by family."""
    kind = "learned" if isinstance(one, ir.LearnedSet) else "set"
    if one.type is values.ADDRESS:
        return f"{kind}_{one.name}_{family_suffix(family)}"
    # A set of ports `x_ip` is not the IPv4 half of a set of addresses `x`.
    alike = one.name.endswith(("_ip", "_ip6", "_inet"))
    return f"{kind}_{one.name}" + ("_inet" if alike else "")


def refers(test: ir.Test, family: int) -> str:
    """How a test refers to its named set: `@name`, `!= @name`, or "" if it cannot."""
    named = test.named
    if named is None or named.type not in _SET_TYPES:
        return ""
    asked, held = _of_family(test.values, family), _of_family(named.values, family)
    if not asked.empty and not asked.full:
        if asked == held:
            return "@" + named_set(named, family)
        if asked == held.complement():
            return "!= @" + named_set(named, family)
    return ""


def _of_family(found: ValueSet, family: int) -> ValueSet:
    return found.family(family) if isinstance(found, values.Addresses) else found


def _by_family(term: Leaf, facts: Facts) -> bool:
    match term:
        case ir.Over():
            return term.flow.by_address
        case ir.Member() if term.field is FIELDS["family"]:
            return False  # the set is asked, for both alike
        case _:
            named = term.field.by_family or term.field is FIELDS["family"]
            return named or _length_in_header(term.field, facts)


def _length_in_header(field: Field, facts: Facts) -> bool:
    """Is the length to be read from the IP header?

    At ingress and egress `meta length` is not yet, or no longer, that of the packet
    alone: padding comes with it, or the link's header.
    """
    return field is FIELDS["length"] and any(hook_kind(h) in (INGRESS, EGRESS) for h in facts.hooks)


def _implies_family(texts: Iterable[str]) -> bool:
    """Does nft itself put the test of the family before one of these?"""
    return any(text.startswith(("ip ", "ip6 ", "icmp type", "icmpv6 type")) for text in texts)


def _fields(term: Leaf) -> tuple[Field, ...]:
    return term.flow.key if isinstance(term, ir.Over) else (term.field,)


def _guard(terms: Sequence[Leaf], facts: Facts) -> tuple[Context, list[str], list[Leaf]]:
    """The context of a rule, the test of the protocol that it needs, and its other terms."""
    known, asked = facts.protocols, False
    spelled = said = False
    limits: list[Ranges] = []
    rest: list[Leaf] = []
    for term in terms:
        if isinstance(term, ir.Test) and term.field is FIELDS["protocol"]:
            assert isinstance(term.values, Ranges)
            known, asked = _both(known, term.values), True
            continue
        rest.append(term)
        for one in _fields(term):
            spelled |= one.by_protocol
            said |= one.says_protocol
            if one.protocols is not None:
                limits.append(protocols_of(one))
    possible = known
    for protocols in limits:
        possible = _both(possible, protocols)
    context = Context(facts, possible)
    if possible.empty or (not asked and possible == facts.protocols):
        return context, [], rest
    if (spelled and context.header != "th") or said:
        return context, [], rest  # nft puts `meta l4proto` before `tcp sport` by itself
    expression = FIELDS["protocol"].nft[ANY_FAMILY]
    return context, [expression + " " + _set(FIELDS["protocol"], ANY_FAMILY, possible)], rest


@cache
def _both(one: Ranges, other: Ranges) -> Ranges:
    """The protocols in both sets, of which there are few."""
    return one.intersection(other)


def _expression(field: Field, family: int, context: Context) -> str:
    expression = field.nft.get(family) or field.nft[ANY_FAMILY]
    return expression.format(proto=context.header)


def _leaf(term: Leaf, family: int, context: Context, names: FlowNames) -> str | None:
    """The match for one term: "" if it always holds for the family, None if it never does."""
    if not isinstance(term, ir.Over) and not term.field.in_family(family) and family != ANY_FAMILY:
        return None
    match term:
        case ir.Over():
            own = family if term.flow.by_address else ANY_FAMILY
            present = " ".join(
                f.present for f in term.flow.key if f.present and not context.facts.always_has(f)
            )
            key = key_expression(term.flow, family, context)
            if term.attribute == "age":
                known = names.over(term.flow, "packets", 0, own)
                young = names.meter(term.flow, "age", term.threshold, own)
                text = f"{present} {key} @{known} {key} != @{young}"
            else:
                name = names.over(term.flow, term.attribute, term.threshold, own)
                text = f"{present} {key} @{name}"
            return text.strip()
        case ir.Member():
            present = "" if context.facts.always_has(term.field) else term.field.present
            expression = _expression(term.field, family, context)
            return f"{present} {expression} @{named_set(term.set, family)}".strip()
        case Lookup():
            present = "" if context.facts.always_has(term.field) else term.field.present
            mask = _mask(term.field, family, term.bits) if term.bits else ""
            expression = _expression(term.field, family, context)
            return f"{present} {expression}{mask} {term.text}".strip()
        case ir.Bits():
            expression = _expression(term.field, family, context)
            return f"{expression} & {term.field.nft_value(term.mask)} != 0"
        case ir.Test():
            return _test(term, family, context)


def _mask(field: Field, family: int, bits: int) -> str:
    """What clears the lowest bits of a value."""
    if field.type.kind == "address":
        mask = values.ADDRESS_MAX[family] >> bits << bits
        return f" & {values.address_text(family, mask)}"
    return f" & {field.type.limit >> bits << bits:#x}"


def _test(test: ir.Test, family: int, context: Context) -> str | None:
    if test.field is FIELDS["family"] and family != ANY_FAMILY:
        assert isinstance(test.values, Ranges)
        return "" if (0 if family == IPV4 else 1) in test.values else None
    if _length_in_header(test.field, context.facts):
        assert isinstance(test.values, Ranges)
        return _length(test.field, family, test.values)
    expression = _expression(test.field, family, context)
    reference = refers(test, family)
    if reference:
        absent = reference.startswith("!=") and not context.facts.always_has(test.field)
        present = test.field.present if absent else ""
        return f"{present} {expression} {reference}".strip()
    match test.values:
        case Names():
            return _interface(test.field, expression, test.values, context)
        case Ranges():
            return f"{expression} {_set(test.field, family, test.values)}"
        case _:
            own = test.values.family(family)
            if own.empty:
                return None
            return "" if own.full else f"{expression} {_set(test.field, family, own)}"


def _length(field: Field, family: int, asked: Ranges) -> str | None:
    """The length by the IP header; that of IPv6 leaves itself out."""
    less = 0 if family == IPV4 else _IPV6_HEADER
    written = Ranges.of(
        _LONGEST, [(lo - less, hi if hi == asked.limit else hi - less) for lo, hi in asked.spans]
    )
    if written.empty:
        return None
    return f"{'ip' if family == IPV4 else 'ip6'} length {_set(field, family, written)}"


def _interface(field: Field, expression: str, names: Names, context: Context) -> str:
    present = "" if context.facts.always_has(field) else field.present
    if names.full:
        return present
    quoted = [f'"{name}"' for name in sorted(names.patterns)]
    text = quoted[0] if len(quoted) == 1 else "{ " + ", ".join(quoted) + " }"
    # Without an interface the name reads as empty: no name equals it, but `!=` would hold.
    guard = present if names.inverted else ""
    return f"{guard} {expression} {'!= ' if names.inverted else ''}{text}".strip()


def _set(field: Field, family: int, found: Ranges) -> str:
    """The right side of a match: a value, a range, a set, or what it must not be."""
    if field.listed:
        return _elements(field, family, found)
    if found.full:
        # In numbers, for names do not stand in ranges.
        return f"{0:{field.nft_format}}-{found.limit:{field.nft_format}}"
    if len(found.spans) > 1:
        outside = found.complement()
        if _written(field, outside) < _written(field, found):
            return "!= " + _elements(field, family, outside).removeprefix("== ")
    if (len(found.spans) == 1 and family not in values.FAMILIES) or field.type.kind != "address":
        (lo, hi), *more = found.spans
        if not more and lo == 0 and hi > 0:
            return f"<= {field.nft_value(hi)}"
        if not more and hi == found.limit and lo < hi:
            return f">= {field.nft_value(lo)}"
    return _elements(field, family, found)


def _written(field: Field, found: Ranges) -> int:
    """How many elements it takes to write a set."""
    if field.listed or (field.type is values.FLAGS and len(found.spans) > 1):
        return sum(hi - lo + 1 for lo, hi in found.spans)
    return len(found.spans)


def element(field: Field, family: int, low: int | str, high: int | str) -> str:
    """Values of a field as elements of a set are written: one, or those from one to another."""
    if isinstance(low, str) or isinstance(high, str):
        return f'"{low}"'
    if field.type.kind == "address":
        return values.prefix_text(family, low, high)
    if low == high:
        return field.nft_value(low)
    # Names do not stand in ranges, nft reads the hyphen as part of them.
    return f"{low:{field.nft_format}}-{high:{field.nft_format}}"


def _elements(field: Field, family: int, found: Ranges) -> str:
    spans = found.spans
    if len(spans) != _written(field, found):
        # nft 1.0.6 crashes when it lists a set of intervals of flags.
        spans = tuple((n, n) for lo, hi in spans for n in range(lo, hi + 1))
    elements = [element(field, family, lo, hi) for lo, hi in spans]
    if elements and field.type is values.FLAGS and "-" not in elements[0] and len(elements) == 1:
        return "== " + elements[0]  # a flag alone would ask for the bit
    return elements[0] if len(elements) == 1 else "{ " + ", ".join(elements) + " }"
