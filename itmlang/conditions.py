"""Conditions as written -> checked conditions: which fields, which values, at which hooks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from itmlang import ir, syntax, values
from itmlang.diagnostics import Findings, did_you_mean
from itmlang.evaluate import Scope, find_set, single, value_set
from itmlang.fields import (
    EGRESS,
    FIELDS,
    FLOW_ATTRIBUTES,
    TRACKING,
    TRACKING_HOOKS,
    Field,
    hook_kind,
)
from itmlang.source import Span
from itmlang.values import Ranges, Type

# What can stand in interest and conditions.
COMPARED: Final = {name: field for name, field in FIELDS.items() if field.compared}
_ONLY_IPV4: Final = Ranges(1, ((0, 0),))
_PATHS: Final = (
    ("prerouting", "input"), ("prerouting", "forward", "postrouting"), ("output", "postrouting"),
)  # fmt: skip


@dataclass
class Conditions:
    """The check of one policy's conditions. None is returned after a reported error."""

    hooks: tuple[str, ...]
    flows: Mapping[str, ir.Flow]
    scope: Scope
    findings: Findings
    priority: int = 0

    def field(self, name: syntax.FieldName, known: Mapping[str, Field]) -> Field | None:
        """The field of this name among those that can be used here."""
        if name.text in known:
            return known[name.text]
        if name.text in FIELDS:
            message = f"`{name.text}` cannot be used here"
        else:
            message = f"there is no field `{name.text}`"
        self.findings.error("E010", message, name.span, help=did_you_mean(name.text, known))
        return None

    def met(self, field: Field, span: Span) -> bool:
        """Can packets at all of the hooks have the field?"""
        missing = [hook for hook in self.hooks if hook_kind(hook) not in field.hooks]
        for hook in missing:
            lack = (
                f"have no `{field.name}` interface"
                if field.type is values.INTERFACE
                else "are not known to connection tracking"
            )
            self.findings.error(
                "E030",
                f"packets at {hook} {lack}",
                span,
                help=f"`{field.name}` is known at {', '.join(field.hooks)}",
            )
        # At the very same priority, whichever was loaded last comes first.
        early = [h for h in self.hooks if h in TRACKING_HOOKS and self.priority <= TRACKING]
        if field.tracked and early and not missing:
            self.findings.error(
                "E043",
                f"packets at {early[0]} are not tracked yet at priority {self.priority}",
                span,
                help=f"connection tracking comes there at {TRACKING}: the priority must be higher",
            )
            return False
        return not missing

    def _counts_once(self, span: Span) -> bool:
        """Does no packet pass two of the hooks?

        `ct count` does not know a new connection again within the same tick of the kernel's
        clock (nf_conncount.c), so the second hook would count it once more.
        """
        for path in _PATHS:
            passed = [hook for hook in path if hook in self.hooks]
            if len(passed) > 1:
                self.findings.error(
                    "E044", f"a packet passes {passed[0]} and {passed[1]}, and the kernel would "
                    "count a new connection at both", span,
                    help=f"count connections in a policy that stands only at {passed[0]}",
                )  # fmt: skip
                return False
        return True

    def weighed(self, span: Span) -> bool:
        """Do the hooks know how many bytes an IP packet has?

        At egress the kernel's counters, quotas and limits add the link's header
        (`skb->len` there), of a length that only the device knows.
        """
        for hook in self.hooks:
            if hook_kind(hook) == EGRESS:
                self.findings.error(
                    "E030", f"bytes at {hook} would have the link's header among them", span,
                    help="use postrouting, where they are those of the IP packet, or count packets",
                )  # fmt: skip
                return False
        return True

    def test(
        self, field: Field, value: syntax.Value, span: Span, *, inverted: bool = False
    ) -> ir.Condition | None:
        """`field in value`, where the value may be a named or a learned set."""
        named = self.scope.named_set(value)
        if isinstance(named, ir.LearnedSet):
            if named.type.name != field.type.name:
                self.findings.error(
                    "E038", f"`@{named.name}` holds {named.type.name} values, "
                    f"but `{field.name}` is {field.type.article} {field.type.name}", value.span,
                )  # fmt: skip
                return None
            member: ir.Condition = ir.Member(field, named, span)
            if named.known is not None:
                ipv4 = ir.Test(FIELDS["family"], _ONLY_IPV4, span)
                member = ir.And((ipv4, member), span)
                member = ir.Or((ir.Test(field, named.known, span), member), span)
            # `!=` is false where the field is missing, and `not` would be true there.
            here = ir.Test(field, field.type.everything, span)
            return ir.And((here, ir.Not(member, span)), span) if inverted else member
        found = value_set(value, field.type, self.scope, self.findings)
        if found is None:
            return None
        if inverted:
            found = values.complement(found)
        return ir.Test(field, found, span, None if named is None or named.inline else named)

    def condition(self, node: syntax.Condition) -> ir.Condition | None:
        """The condition, its names resolved and its values typed."""
        match node:
            case syntax.AllOf() | syntax.AnyOf():
                found = [self.condition(term) for term in node.terms]
                terms = tuple(term for term in found if term is not None)
                kind = ir.And if isinstance(node, syntax.AllOf) else ir.Or
                return kind(terms, node.span) if len(terms) == len(found) else None
            case syntax.Negation():
                inner = self.condition(node.term)
                return None if inner is None else ir.Not(inner, node.span)
            case syntax.Asserted():
                return self._asserted(node)
            case syntax.Comparison():
                return self._comparison(node)

    def _asserted(self, node: syntax.Asserted) -> ir.Condition | None:
        field = FIELDS.get(node.field.text)
        if field is not None and field.type is values.BOOLEAN:
            return ir.Test(field, Ranges(1, ((1, 1),)), node.span)
        self.findings.error(
            "E031", f"`{node.field.text}` is no condition by itself", node.span,
            help="compare it: `dport == 80`, `conn.packets > 10`",
        )  # fmt: skip
        return None

    def _comparison(self, node: syntax.Comparison) -> ir.Condition | None:
        flow_name, _, attribute = node.field.text.partition(".")
        if flow_name in self.flows:
            return self._flow_test(node, self.flows[flow_name], attribute)
        field = COMPARED.get(node.field.text)
        if field is None:
            names = [*COMPARED, *(f"{f}.{a}" for f in self.flows for a in FLOW_ATTRIBUTES)]
            what = "flow" if attribute in FLOW_ATTRIBUTES else "field"
            shown = flow_name if what == "flow" else node.field.text
            self.findings.error(
                "E010", f"there is no {what} `{shown}`", node.field.span,
                help=did_you_mean(node.field.text, names)
                or (f"declare it, as in `flow {shown} by saddr`" if what == "flow" else ""),
            )  # fmt: skip
            return None
        if not self.met(field, node.field.span):
            return None
        if node.operator == "has":
            return self._has(node, field)
        if node.operator in ("==", "!=", "in"):
            return self.test(field, node.value, node.span, inverted=node.operator == "!=")
        found = self._ordered(node, field.type)
        return None if found is None else ir.Test(field, found, node.span)

    def _has(self, node: syntax.Comparison, field: Field) -> ir.Condition | None:
        if field.type is not values.FLAGS:
            self.findings.error(
                "E031", f"`has` asks for a flag, and `{field.name}` has none", node.span,
                help="use `in`, as in `dport in { 80, 443 }`",
            )  # fmt: skip
            return None
        found = value_set(node.value, field.type, self.scope, self.findings)
        if not isinstance(found, Ranges):
            return None
        mask = 0
        for lo, hi in found.spans:
            for value in range(lo, hi + 1):
                mask |= value
        return ir.Bits(field, mask, node.span)

    def _ordered(self, node: syntax.Comparison, type: Type) -> Ranges | None:
        """The values for which `field < value` and the like hold."""
        unordered = (values.FAMILY, values.FLAGS, values.BOOLEAN, values.CT_STATE,
                     values.CT_DIRECTION)  # fmt: skip
        if type.kind not in ("integer", "duration") or type in unordered:
            self.findings.error(
                "E031",
                f"`{node.operator}` does not fit: {type.article} {type.name} has no order",
                node.span,
                help="use `in`, with a prefix or a range"
                if type is values.ADDRESS
                else "use `==`, `!=` or `in`",
            )
            return None
        value = single(node.value, type, self.scope, self.findings)
        if value is None:
            return None
        interval = {
            "<": (0, value - 1),
            "<=": (0, value),
            ">": (value + 1, type.limit),
            ">=": (value, type.limit),
        }[node.operator]
        return Ranges.of(type.limit, [interval])

    def _flow_test(
        self, node: syntax.Comparison, flow: ir.Flow, attribute: str
    ) -> ir.Condition | None:
        type = FLOW_ATTRIBUTES.get(attribute)
        if type is None:
            shown = f"has no `{attribute}`" if attribute else "needs to be told what of it"
            self.findings.error(
                "E010", f"the flow `{flow.name}` {shown}", node.field.span,
                help=did_you_mean(attribute, FLOW_ATTRIBUTES),
            )  # fmt: skip
            return None
        if node.operator == "has":
            self.findings.error("E031", "`has` asks for a flag; compare a count", node.span)
            return None
        if attribute == "connections" and not (
            self.met(FIELDS["connection"], node.field.span) and self._counts_once(node.field.span)
        ):
            return None
        if attribute == "bytes" and not self.weighed(node.field.span):
            return None
        if attribute in ("rate", "age"):
            return self._threshold(node, flow, attribute, type)
        if node.operator in ("==", "!=", "in"):
            found = value_set(node.value, type, self.scope, self.findings)
            if found is not None and node.operator == "!=":
                found = values.complement(found)
        else:
            found = self._ordered(node, type)
        return ir.FlowTest(flow, attribute, found, node.span) if isinstance(found, Ranges) else None

    def _threshold(
        self, node: syntax.Comparison, flow: ir.Flow, attribute: str, type: Type
    ) -> ir.Condition | None:
        """An age or a rate: it lies on one side of a threshold or on the other."""
        if node.operator not in ("<", "<=", ">", ">="):
            self.findings.error(
                "E031", f"`{node.operator}` does not fit: a flow's {attribute} is above "
                "or below a threshold, never exactly something", node.span, help="use `>` or `<`",
            )  # fmt: skip
            return None
        if attribute == "rate":
            type = self._rate_type(node.value)
            attribute = "byte_rate" if type is values.RATE else "packet_rate"
            if type is values.RATE and not self.weighed(node.span):
                return None
        value = single(node.value, type, self.scope, self.findings)
        if value is None:
            return None
        if value == 0:
            self.findings.error("E023", "a threshold of 0 is none", node.value.span)
            return None
        above = (value + 1, type.limit) if ">" in node.operator else (0, value)
        return ir.FlowTest(flow, attribute, Ranges.of(type.limit, [above]), node.span)

    def _rate_type(self, node: syntax.Value) -> Type:
        """Packets or bits? The unit tells, or the parameter's type."""
        match node:
            case syntax.Number() if node.unit in values.PACKET_RATE.units:
                return values.PACKET_RATE
            case syntax.Word() if node.text in self.scope.parameters:
                given = self.scope.parameters[node.text].type
                return values.PACKET_RATE if given is values.PACKET_RATE else values.RATE
            case syntax.Sum():
                return self._rate_type(node.terms[0])
            case _:
                return values.RATE

    def rate(self, node: syntax.Value) -> tuple[Type, int] | None:
        """A rate of bits or packets (a day), 0 refused."""
        type = self._rate_type(node)
        value = single(node, type, self.scope, self.findings)
        if value == 0:
            self.findings.error("E023", "a rate of 0 lets nothing through: use `drop`", node.span)
            return None
        return None if value is None else (type, value)

    def learned(self, name: syntax.SetName, field: Field) -> ir.LearnedSet | None:
        """The set that `update` adds the field to or removes it from."""
        found = find_set(name, field.type, self.scope, self.findings)
        if found is None:
            return None
        if isinstance(found, ir.NamedSet) or found.known is not None:
            self.findings.error(
                "E038", f"the set `@{name.text}` has fixed values: it learns nothing", name.span,
                notes=(("it is declared here", found.span),),
                help=f"declare it as `set {name.text}: {found.type.name} timeout 10m max 10000`",
            )  # fmt: skip
            return None
        if found.type.name != field.type.name or not field.datatype:
            self.findings.error(
                "E038", f"`{field.name}` does not go into `@{found.name}`, a set of "
                f"{found.type.name} values", name.span,
                notes=(("it is declared here", found.span),),
            )  # fmt: skip
            return None
        return found


def flow_tests(condition: ir.Condition | None) -> list[ir.FlowTest]:
    """All tests of flows in a condition, from left to right."""
    return [leaf for leaf in ir.leaves(condition) if isinstance(leaf, ir.FlowTest)]
