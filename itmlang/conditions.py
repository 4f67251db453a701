"""Conditions as written -> checked conditions: which fields, which values, at which hooks."""

from collections.abc import Mapping
from dataclasses import dataclass

from itmlang import ir, syntax, values
from itmlang.diagnostics import Findings, did_you_mean
from itmlang.evaluate import Scope, single, value_set
from itmlang.fields import FIELDS, FLOW_ATTRIBUTES, Field
from itmlang.source import Span
from itmlang.values import Ranges, Type


@dataclass
class Conditions:
    """The check of one policy's conditions. None is returned after a reported error."""

    hooks: tuple[str, ...]
    flows: Mapping[str, ir.Flow]
    scope: Scope
    findings: Findings

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
        missing = [hook for hook in self.hooks if hook not in field.hooks]
        for hook in missing:
            self.findings.error(
                "E030",
                f"packets at {hook} have no `{field.name}` interface",
                span,
                help=f"`{field.name}` is known at {', '.join(field.hooks)}",
            )
        return not missing

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
            case syntax.Comparison():
                return self._comparison(node)

    def _comparison(self, node: syntax.Comparison) -> ir.Condition | None:
        flow_name, _, attribute = node.field.text.partition(".")
        if flow_name in self.flows:
            return self._flow_test(node, self.flows[flow_name], attribute)
        known = {name: field for name, field in FIELDS.items() if field.compared}
        field = known.get(node.field.text)
        if field is None:
            names = [*known, *(f"{f}.{a}" for f in self.flows for a in FLOW_ATTRIBUTES)]
            what = "flow" if attribute in FLOW_ATTRIBUTES else "field"
            shown = flow_name if what == "flow" else node.field.text
            self.findings.error(
                "E010", f"there is no {what} `{shown}`", node.field.span,
                help=did_you_mean(node.field.text, names),
            )  # fmt: skip
            return None
        if not self.met(field, node.field.span):
            return None
        if node.operator == "has":
            return self._has(node, field)
        found = self._compared(node, field.type)
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

    def _compared(self, node: syntax.Comparison, type: Type) -> values.ValueSet | None:
        """The set of values for which `field OPERATOR value` holds."""
        ordered = type.kind == "integer" and type not in (values.FAMILY, values.FLAGS)
        if node.operator in ("<", "<=", ">", ">="):
            if not ordered:
                self.findings.error(
                    "E031",
                    f"`{node.operator}` does not fit: {type.article} {type.name} has no order",
                    node.span,
                    help="use `==`, `!=` or `in`",
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
        found = value_set(node.value, type, self.scope, self.findings)
        if found is None:
            return None
        return values.complement(found) if node.operator == "!=" else found

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
        found = self._compared(node, type)
        return ir.FlowTest(flow, attribute, found, node.span) if isinstance(found, Ranges) else None


def flow_tests(condition: ir.Condition | None) -> list[ir.FlowTest]:
    """All tests of flows in a condition, from left to right."""
    match condition:
        case ir.FlowTest():
            return [condition]
        case ir.Not():
            return flow_tests(condition.term)
        case ir.And() | ir.Or():
            return [test for term in condition.terms for test in flow_tests(term)]
        case _:
            return []
