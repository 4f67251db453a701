"""Checked conditions, links, controllers -> text, close to the language, for people who debug a policy."""

from collections.abc import Iterable
from typing import Final

from itmlang import ir, values
from itmlang.control import Controller, Timer, measured
from itmlang.links import Link, classid_text, rate_text
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
            return ("not " if found.inverted else "") + _listed(items)
    return _listed(items)


def link_lines(link: Link) -> list[str]:
    """A link, what it leaves out filled in, with the classids that tc shows."""
    way = " ingress" if link.ingress else ""
    lines = [f'link {link.name} at "{link.interface}"{way} rate {rate_text(link.rate)}']
    for one in link.classes:
        line = f"  class {one.name} {classid_text(link.classid(one))} priority {one.priority}"
        line += f" at least {rate_text(one.least)}" if one.least else ""
        line += f" at most {rate_text(one.most)}"
        line += f" queue {one.queue} packets" if one.queue else ""
        line += f" inner {one.inner}" if one.inner else ""
        if one.dscp:
            line += f" dscp {_listed(map(values.DSCP.text, one.dscp))}"
        lines.append(line + (" otherwise" if one.number == link.otherwise else ""))
    return lines


def controller_text(one: Controller) -> str:
    """A controller on one line, bounds and defaults filled in."""
    gains = "".join(f" {name} {value:g}" for name, value in one.gains)
    law = f'call "{one.law}"' if ":" in one.law else one.law
    line = f"control {one.written} every {one.period} ms toward "
    line += f"{one.measure.text} = {measured(one.target, one.measure.unit)} with {law}{gains} "
    line += f"within {one.shown(one.low)} - {one.shown(one.high)} from {one.shown(one.base)}"
    line += f", {len(one.steps)} values" if one.steps else ""
    return line + (" dry run" if one.dry else "")


def timer_text(one: Timer) -> str:
    """A timer on one line."""
    return f'every {one.period} ms call "{one.target}"'


def _listed(items: Iterable[str]) -> str:
    return "{ " + ", ".join(items) + " }"
