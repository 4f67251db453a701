"""Values as written -> sets of values of a given type.

The type says what is acceptable; every refusal names the value and what would
be taken instead. None is returned after a refusal that has been reported.
"""

from dataclasses import dataclass, field
from ipaddress import ip_network

from itmlang import syntax, values
from itmlang.diagnostics import Findings, did_you_mean
from itmlang.source import Span
from itmlang.values import Addresses, Names, Ranges, Type, ValueSet

_LONGEST_INTERFACE = 15  # IFNAMSIZ - 1, include/uapi/linux/if.h


@dataclass(frozen=True)
class Parameter:
    """A parameter of a policy with its value; `values` is None after an error."""

    type: Type
    values: ValueSet | None


@dataclass
class Scope:
    """The parameters that a value may name, and which of them were."""

    parameters: dict[str, Parameter] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)


def value_set(node: syntax.Value, type: Type, scope: Scope, findings: Findings) -> ValueSet | None:
    """The set of values that a value, range, list or prefix stands for."""
    match node:
        case syntax.Listing():
            found = [value_set(item, type, scope, findings) for item in node.items]
            sets = [one for one in found if one is not None]
            return values.union_all(type.nothing, sets) if len(sets) == len(found) else None
        case syntax.Interval():
            return _interval(node, type, scope, findings)
        case syntax.Sum():
            return _sum(node, type, scope, findings)
        case syntax.Number():
            return _number(node, type, findings)
        case syntax.Address():
            return _address(node, type, findings)
        case syntax.Text():
            return _interface(node, type, findings)
        case syntax.Word():
            return _word(node, type, scope, findings)


def single(node: syntax.Value, type: Type, scope: Scope, findings: Findings) -> int | None:
    """One value of an integer type."""
    found = value_set(node, type, scope, findings)
    if found is None:
        return None
    if isinstance(found, Ranges) and len(found.spans) == 1 and len(set(found.spans[0])) == 1:
        return found.spans[0][0]
    findings.error("E022", f"one {type.name} is wanted here, not several", node.span)
    return None


def _wanted(type: Type) -> str:
    if type.kind in ("address", "interface"):
        return f"{type.article} {type.name}"
    if type.kind == "duration":
        return "a duration such as `250ms`, `5s` or `2m`"
    if type.units:
        return f"a number of {type.name}" if type.plain else f"a number with a unit ({type.name})"
    return f"{type.article} {type.name}"


def _refuse(node: syntax.Value, type: Type, findings: Findings, help: str = "") -> None:
    findings.error(
        "E020", f"`{node.span.text}` does not fit: {_wanted(type)} is wanted here", node.span,
        help=help,
    )  # fmt: skip


def _integers(type: Type, low: int, high: int) -> Ranges:
    return Ranges.of(type.limit, [(low, high)])


def _number(node: syntax.Number, type: Type, findings: Findings) -> ValueSet | None:
    if type.kind not in ("integer", "duration") or (not node.unit and not type.plain):
        names = ", ".join(type.names) if type.kind == "integer" else ""
        _refuse(node, type, findings, f"one of {names}" if names else "")
        return None
    if node.unit and node.unit not in type.units:
        units = ", ".join(type.units)
        findings.error(
            "E021",
            f"`{node.span.text}` has the unit `{node.unit}`, but {_wanted(type)} is wanted here",
            node.span,
            help=f"units that fit: {units}" if units else "leave the unit out",
        )
        return None
    value = node.value * type.units.get(node.unit, 1)
    if value > type.limit:
        findings.error(
            "E023",
            f"{node.span.text} is too large: the greatest {type.name} is {type.text(type.limit)}",
            node.span,
        )
        return None
    return _integers(type, value, value)


def _address(node: syntax.Address, type: Type, findings: Findings) -> ValueSet | None:
    if type.kind != "address":
        _refuse(node, type, findings)
        return None
    try:
        return Addresses.of([values.network_interval(node.text)])
    except ValueError as error:
        try:
            network = ip_network(node.text, strict=False)
        except ValueError:
            findings.error("E024", f"`{node.text}` is no address or prefix: {error}", node.span)
        else:
            findings.error(
                "E024",
                f"the prefix `{node.text}` has bits set behind its length",
                node.span,
                help=f"write `{network}` for the network, or leave out the length for the host",
            )
        return None


def _interface(node: syntax.Text, type: Type, findings: Findings) -> ValueSet | None:
    if type.kind != "interface":
        _refuse(node, type, findings)
        return None
    name, stem = node.text, node.text.removesuffix("*")
    if not name or len(name.encode()) > _LONGEST_INTERFACE:
        problem = "is empty" if not name else f"is longer than {_LONGEST_INTERFACE} bytes"
    elif any(c in '/*\\"' or c.isspace() or not c.isprintable() for c in stem):
        problem = "has a character that no interface name has"
    elif not stem:
        return type.everything
    else:
        return Names(frozenset({name}))
    findings.error(
        "E025", f"the interface name `{name}` {problem}", node.span,
        help="a name such as \"eth0\", or a pattern that ends in `*`",
    )  # fmt: skip
    return None


def _word(node: syntax.Word, type: Type, scope: Scope, findings: Findings) -> ValueSet | None:
    parameter = scope.parameters.get(node.text)
    if parameter is not None:
        scope.used.add(node.text)
        return _parameter(node, parameter, type, findings)
    if node.text in type.names:
        value = type.names[node.text]
        return _integers(type, value, value)
    if node.text in type.refused:
        findings.error(
            "E026", f"`{node.text}` cannot be used: {type.refused[node.text]}", node.span
        )
        return None
    # `ftp-ssh`: the lexer takes hyphens into a word.
    for cut in (i for i, c in enumerate(node.text) if c == "-"):
        low, high = node.text[:cut], node.text[cut + 1 :]
        if {low, high} <= set(type.names) | set(scope.parameters):
            start = node.span.start
            return _interval(
                syntax.Interval(
                    node.span,
                    syntax.Word(Span(node.span.source, start, start + cut), low),
                    syntax.Word(Span(node.span.source, start + cut + 1, node.span.end), high),
                ),
                type, scope, findings,
            )  # fmt: skip
    findings.error(
        "E010",
        f"`{node.text}` is neither a parameter nor {type.article} {type.name}",
        node.span,
        help=did_you_mean(node.text, [*scope.parameters, *type.names]),
    )
    return None


def _parameter(
    node: syntax.Word, parameter: Parameter, type: Type, findings: Findings
) -> ValueSet | None:
    if parameter.values is None:
        return None  # its default was refused already
    given = parameter.type
    plain_number = given is values.NUMBER and type.kind == "integer" and type.plain
    fits = given.name == type.name or plain_number
    if fits and not isinstance(parameter.values, Ranges):
        return parameter.values
    if fits and isinstance(parameter.values, Ranges):
        # Where the number does not fit it is cut off, and an empty set is no value.
        fitting = Ranges.of(type.limit, parameter.values.spans)
        if not fitting.empty:
            return fitting
    findings.error(
        "E020",
        f"the parameter `{node.text}` is of type {parameter.type.name}, "
        f"but {_wanted(type)} is wanted here",
        node.span,
    )
    return None


def _interval(
    node: syntax.Interval, type: Type, scope: Scope, findings: Findings
) -> ValueSet | None:
    low = value_set(node.low, type, scope, findings)
    high = value_set(node.high, type, scope, findings)
    if low is None or high is None:
        return None
    if isinstance(low, Names) or isinstance(high, Names):
        _refuse(node, type, findings)
        return None
    first, last = list(values.intervals(low)), list(values.intervals(high))
    if any(len(ends) != 1 or ends[0][1] != ends[0][2] for ends in (first, last)):
        findings.error("E022", "a range goes from one value to one value", node.span)
        return None
    (family, start, _), (other, _, end) = first[0], last[0]
    if family != other or start > end:
        problem = "is empty: its end lies before its start"
        if family != other:
            problem = "mixes IPv4 and IPv6"
        findings.error("E027", f"the range `{node.span.text}` {problem}", node.span)
        return None
    return Addresses.of([(family, start, end)]) if family else _integers(type, start, end)


def _sum(node: syntax.Sum, type: Type, scope: Scope, findings: Findings) -> ValueSet | None:
    if type.kind not in ("integer", "duration"):
        _refuse(node, type, findings)
        return None
    terms = [single(term, type, scope, findings) for term in node.terms]
    total = sum(term for term in terms if term is not None)
    if None in terms:
        return None
    if total > type.limit:
        findings.error("E023", f"{node.span.text} is {total}, too large", node.span)
        return None
    return _integers(type, total, total)
