"""Checked conditions -> text, close to the language, for people who debug a policy."""

from typing import Final

from itmlang import ir, values
from itmlang.values import Addresses, Names, Ranges, ValueSet

_TYPES: Final = {
    "age": values.DURATION,
    "byte_rate": values.RATE,
    "packet_rate": values.PACKET_RATE,
}


def condition_text(condition: ir.Condition) -> str:
    """A condition on one line, fully bracketed."""
    match condition:
        case ir.And(terms=()):
            return "always"
        case ir.Or(terms=()):
            return "never"
        case ir.And():
            return "(" + " and ".join(map(condition_text, condition.terms)) + ")"
        case ir.Or():
            return "(" + " or ".join(map(condition_text, condition.terms)) + ")"
        case ir.Not():
            return f"not {condition_text(condition.term)}"
        case ir.Member():
            return f"{condition.field.name} in @{condition.set.name}"
        case ir.Test(named=ir.NamedSet() as named) if condition.values == named.values:
            return f"{condition.field.name} in @{named.name}"
        case ir.Test() if condition.values.full:
            return f"{condition.field.name} is there"
        case ir.Test():
            return f"{condition.field.name} in {_set(condition.values, condition.field.type)}"
        case ir.Bits():
            return f"{condition.field.name} has any of {condition.mask:#04x}"
        case ir.FlowTest():
            inside = _set(condition.values, values.PACKETS)
            return f"{condition.flow.name}.{condition.attribute} in {inside}"
        case ir.Over():
            type = _TYPES.get(condition.attribute, values.PACKETS)
            attribute = "rate" if condition.attribute.endswith("_rate") else condition.attribute
            return f"{condition.flow.name}.{attribute} > {type.text(condition.threshold)}"


def _set(found: ValueSet, type: values.Type) -> str:
    match found:
        case Ranges():
            items = [type.text(lo) if lo == hi else f"{lo}-{hi}" for lo, hi in found.spans]
        case Addresses():
            items = [values.prefix_text(*interval) for interval in values.intervals(found)]
        case Names():
            items = [f'"{name}"' for name in sorted(found.patterns)]
            return ("not " if found.inverted else "") + "{ " + ", ".join(items) + " }"
    return "{ " + ", ".join(items) + " }"
