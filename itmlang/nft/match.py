"""Tests -> nftables matches.

A rule is a conjunction of tests. A test of an address or of an IP header field
reads differently for IPv4 and IPv6, so a conjunction that has one becomes a
match for each family; all others become one match for both. What nftables
leaves to its reader is made explicit here: a port is one only behind a protocol
that has ports, an interface name only where there is an interface.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from itmlang import ir, values
from itmlang.fields import ANY_FAMILY, FIELDS, Field
from itmlang.simplify import Facts
from itmlang.values import IPV4, Names, Ranges

Leaf = ir.Test | ir.Bits | ir.Over

# The protocols whose header nft knows by name, for `tcp sport` instead of `th sport`.
_HEADERS = {6: "tcp", 17: "udp", 33: "dccp", 132: "sctp", 136: "udplite"}


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


def matches(terms: Sequence[Leaf], facts: Facts) -> Iterator[tuple[int, str]]:
    """(family, match) for each family of packets on which all of the terms can hold.

    The family is ANY_FAMILY where one match serves both. An empty match holds
    for every packet.
    """
    context, guard, rest = _guard(terms, facts)
    if context.protocols.empty:
        return
    names_family = any(_by_family(term) for term in rest)
    for family in facts.families if names_family else (ANY_FAMILY,):
        parts = [_leaf(term, family, context) for term in rest]
        if any(part is None for part in parts):
            continue
        texts = [part for part in parts if part]
        if names_family and facts.families != (family,) and not _implies_family(texts):
            texts.insert(0, "meta nfproto " + ("ipv4" if family == IPV4 else "ipv6"))
        yield family, " ".join(dict.fromkeys([*guard, *texts]))


def key_expression(flow: ir.Flow, family: int, context: Context) -> str:
    """A flow's key as nftables writes it, e.g. `ip saddr . tcp sport`."""
    return " . ".join(_expression(field, family, context) for field in flow.key)


def key_match(flow: ir.Flow, family: int, facts: Facts) -> tuple[str, str] | None:
    """(match that must come first, key) for statements on a flow's set.

    None if no packet has the key.
    """
    over = ir.Over(flow, "packets", 0, flow.span)
    context, guard, _ = _guard([over], facts)
    if context.protocols.empty:
        return None
    present = [f.present for f in flow.key if f.present and not facts.always_has(f)]
    return " ".join([*guard, *present]), key_expression(flow, family, context)


def family_suffix(family: int) -> str:
    return {ANY_FAMILY: "inet", IPV4: "ip"}.get(family, "ip6")


def over_set(flow: ir.Flow, attribute: str, threshold: int, family: int) -> str:
    """The name of the set of flows that are past a threshold."""
    return f"flow_{flow.name}_{family_suffix(family)}_over_{threshold}_{attribute}"


def _by_family(term: Leaf) -> bool:
    match term:
        case ir.Over():
            return term.flow.by_address
        case _:
            return len(term.field.families()) > 1 or term.field is FIELDS["family"]


def _implies_family(texts: Iterable[str]) -> bool:
    """Does nft itself put the test of the family before one of these?"""
    return any(text.startswith(("ip ", "ip6 ")) for text in texts)


def _fields(term: Leaf) -> tuple[Field, ...]:
    return term.flow.key if isinstance(term, ir.Over) else (term.field,)


def _guard(terms: Sequence[Leaf], facts: Facts) -> tuple[Context, list[str], list[Leaf]]:
    """The context of a rule, the test of the protocol that it needs, and its other terms."""
    known, asked = facts.protocols, False
    rest: list[Leaf] = []
    for term in terms:
        if isinstance(term, ir.Test) and term.field is FIELDS["protocol"]:
            assert isinstance(term.values, Ranges)
            known, asked = known.intersection(term.values), True
        else:
            rest.append(term)
    possible = known
    for protocols in (f.protocols for t in rest for f in _fields(t) if f.protocols is not None):
        possible = possible.intersection(Ranges.of(255, [(p, p) for p in protocols]))
    context = Context(facts, possible)
    if possible.empty or (not asked and possible == facts.protocols):
        return context, [], rest
    spelled = any("{proto}" in e for t in rest for f in _fields(t) for e in f.nft.values())
    tcp_flags = any(FIELDS["tcp.flags"] in _fields(t) for t in rest)
    if (spelled and context.header != "th") or (tcp_flags and context.header == "tcp"):
        return context, [], rest  # nft puts `meta l4proto` before `tcp sport` by itself
    expression = FIELDS["protocol"].nft[ANY_FAMILY]
    return context, [expression + " " + _set(FIELDS["protocol"], ANY_FAMILY, possible)], rest


def _expression(field: Field, family: int, context: Context) -> str:
    expression = field.nft.get(family) or field.nft[ANY_FAMILY]
    return expression.format(proto=context.header)


def _leaf(term: Leaf, family: int, context: Context) -> str | None:
    """The match for one term: "" if it always holds for the family, None if it never does."""
    match term:
        case ir.Over():
            own = family if term.flow.by_address else ANY_FAMILY
            name = over_set(term.flow, term.attribute, term.threshold, own)
            present = " ".join(
                f.present for f in term.flow.key if f.present and not context.facts.always_has(f)
            )
            key = key_expression(term.flow, family, context)
            return f"{present} {key} @{name}".strip()
        case ir.Bits():
            expression = _expression(term.field, family, context)
            return f"{expression} & {term.field.nft_value(term.mask)} != 0"
        case ir.Test():
            return _test(term, family, context)


def _test(test: ir.Test, family: int, context: Context) -> str | None:
    if test.field is FIELDS["family"] and family != ANY_FAMILY:
        assert isinstance(test.values, Ranges)
        return "" if (0 if family == IPV4 else 1) in test.values else None
    expression = _expression(test.field, family, context)
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
    outside = found.complement()
    if found.full:
        return f"{field.nft_value(0)}-{field.nft_value(found.limit)}"
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
    if field.type is values.FLAGS and len(found.spans) > 1:
        return sum(hi - lo + 1 for lo, hi in found.spans)
    return len(found.spans)


def _elements(field: Field, family: int, found: Ranges) -> str:
    def element(lo: int, hi: int) -> str:
        if field.type.kind == "address":
            return values.prefix_text(family, lo, hi)
        if lo == hi:
            return field.nft_value(lo)
        # Names do not stand in ranges, nft reads the hyphen as part of them.
        low, high = (format(n, field.nft_format) for n in (lo, hi))
        return f"{low}-{high}"

    spans = found.spans
    if len(spans) != _written(field, found):
        # nft 1.0.6 crashes when it lists a set of intervals of flags.
        spans = tuple((n, n) for lo, hi in spans for n in range(lo, hi + 1))
    elements = [element(lo, hi) for lo, hi in spans]
    if elements and field.type is values.FLAGS and "-" not in elements[0] and len(elements) == 1:
        return "== " + elements[0]  # a flag alone would ask for the bit
    return elements[0] if len(elements) == 1 else "{ " + ", ".join(elements) + " }"
