"""Values as written -> sets of values of a given type.

The type says what is acceptable; every refusal names the value and what would
be taken instead. None is returned after a refusal that has been reported.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_network

from itmlang import ir, syntax, values
from itmlang.diagnostics import Findings, did_you_mean
from itmlang.source import Span
from itmlang.values import Addresses, Names, Ranges, Type, ValueSet

_LONGEST_INTERFACE = 15  # IFNAMSIZ - 1, include/uapi/linux/if.h
_MOST_UNITS = 12  # of more (those of rates) the message gives examples


@dataclass(frozen=True)
class Parameter:
    """A parameter of a policy with its value; `values` is None after an error.

    `set` is the named set that it stands for, if it is one; a learned set has no values.
    """

    type: Type
    values: ValueSet | None
    set: ir.AnySet | None = None


@dataclass
class Scope:
    """What a value may name: parameters and sets; and which of the parameters were named."""

    sets: Mapping[str, ir.AnySet] = field(default_factory=dict)
    parameters: dict[str, Parameter] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def named_set(self, node: syntax.Value) -> ir.AnySet | None:
        """The set that a value is, if it is nothing but one: `@name`, or a parameter for one."""
        if not isinstance(node, syntax.SetName | syntax.Word):
            return None
        parameter = self.parameters.get(node.text)
        if parameter is not None and parameter.set is not None:
            self.used.add(node.text)
            return parameter.set
        return self.sets.get(node.text) if isinstance(node, syntax.SetName) else None


def find_set(
    node: syntax.SetName, type: Type, scope: Scope, findings: Findings
) -> ir.AnySet | None:
    """The set of this name, or an error; the type is what is wanted."""
    found = scope.named_set(node)
    parameter = scope.parameters.get(node.text)
    if found is None and parameter is not None:
        scope.used.add(node.text)
        if parameter.values is not None:  # else it has no value yet, or a refused one
            findings.error(
                "E038", f"the parameter `{node.text}` is no set here", node.span,
                help=f"give it one: `{node.text} = @…`",
            )  # fmt: skip
    elif found is None:
        findings.error(
            "E010", f"there is no set `@{node.text}`", node.span,
            help=did_you_mean(node.text, scope.sets)
            or f"declare it: `set {node.text}: {type.name} = {{ … }}`",
        )  # fmt: skip
    return found


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
        case syntax.SetName():
            return _set_values(node, type, scope, findings)
        case syntax.Word():
            return _word(node, type, scope, findings)


def one_address(node: syntax.Value, scope: Scope, findings: Findings) -> tuple[int, int] | None:
    """One address: (family, integer)."""
    found = value_set(node, values.ADDRESS, scope, findings)
    if not isinstance(found, Addresses):
        return None
    every = list(values.intervals(found))
    if len(every) == 1 and every[0][1] == every[0][2]:
        return every[0][0], every[0][1]
    findings.error("E022", "one address is wanted here, not several", node.span)
    return None


def single(node: syntax.Value, type: Type, scope: Scope, findings: Findings) -> int | None:
    """One value of an integer type."""
    found = value_set(node, type, scope, findings)
    if found is None:
        return None
    if isinstance(found, Ranges) and len(found.spans) == 1 and len(set(found.spans[0])) == 1:
        return found.spans[0][0]
    findings.error("E022", f"one {type.name} is wanted here, not several", node.span)
    return None


def _set_values(
    node: syntax.SetName, type: Type, scope: Scope, findings: Findings
) -> ValueSet | None:
    parameter = scope.parameters.get(node.text)
    if parameter is not None and parameter.set is None:
        scope.used.add(node.text)
        return _parameter(syntax.Word(node.span, node.text), parameter, type, findings)
    found = find_set(node, type, scope, findings)
    if found is None:
        return None
    if isinstance(found, ir.LearnedSet):
        findings.error(
            "E038", f"the set `@{node.text}` is learned, it has no values to stand here", node.span,
            help=f"ask for it alone, as in `saddr in @{node.text}`",
        )  # fmt: skip
        return None
    if found.type.name != type.name:
        findings.error(
            "E020",
            f"the set `@{node.text}` is of type {found.type.name}, "
            f"but {_wanted(type)} is wanted here",
            node.span,
        )
        return None
    if isinstance(found.values, Ranges):
        # One name may stand for types of different limits: a packet's length, a flow's bytes.
        return Ranges.of(type.limit, found.values.spans)
    return found.values


def _wanted(type: Type) -> str:
    if type.kind in ("address", "interface"):
        return f"{type.article} {type.name}"
    if type.kind == "duration":
        return "a duration such as `250ms`, `5s` or `2m`"
    if type is values.RATE:
        return "a rate such as `10 mbit`, `64 KB/s` or `500 packets/s`"
    if type is values.PACKET_RATE:
        return "a rate such as `500 packets/s` or `10/m`"
    if type is values.PERCENT:
        return "a percentage such as `1%`"
    if type.units:
        return f"a number of {type.name}"
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
        help = f"units that fit: {', '.join(type.units)}" if type.units else "leave the unit out"
        findings.error(
            "E021",
            f"`{node.span.text}` has the unit `{node.unit}`, but {_wanted(type)} is wanted here",
            node.span,
            help=help if len(type.units) <= _MOST_UNITS else "",
        )
        return None
    value = node.value * type.units.get(node.unit, 1)
    if value != int(value):
        help = "the finest percentage is 0.0001%" if type is values.PERCENT else ""
        findings.error("E020", f"`{node.span.text}` is no whole {type.name}", node.span, help=help)
        return None
    if value > type.limit:
        findings.error(
            "E023",
            f"{node.span.text} is too large: the greatest {type.name} is {type.text(type.limit)}",
            node.span,
        )
        return None
    whole = int(value) + (type.offsets.get(node.unit, 0) if value else 0)
    return _integers(type, whole, whole)


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
            most = 128 if ":" in node.text else 32
            length = node.text.partition("/")[2]
            too_long = length.isdigit() and (len(length) > 3 or int(length) > most)
            why = f"a prefix has {most} bits at most" if too_long else error
            findings.error("E024", f"`{node.text}` is no address or prefix: {why}", node.span)
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
    if node.text in scope.sets:
        help = f"a set is named with an `@`: `@{node.text}`"
    elif type.kind == "interface":
        help = f'an interface stands in quotes: "{node.text}"'
    else:
        help = did_you_mean(node.text, [*scope.parameters, *type.names])
    findings.error(
        "E010",
        f"`{node.text}` is neither a parameter nor {_wanted(type)}",
        node.span,
        help=help,
    )
    return None


def _parameter(
    node: syntax.Word, parameter: Parameter, type: Type, findings: Findings
) -> ValueSet | None:
    if isinstance(parameter.set, ir.LearnedSet):
        findings.error(
            "E038", f"`{node.text}` is a learned set, it has no values to stand here", node.span,
            help=f"ask for it alone, as in `saddr in @{node.text}`",
        )  # fmt: skip
        return None
    if parameter.values is None:
        return None  # its value was refused already
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
        help = f"write `{node.high.span.text}-{node.low.span.text}`"
        if family != other:
            problem, help = "mixes IPv4 and IPv6", "both may stand in a list: `{ a-b, c-d }`"
        findings.error("E027", f"the range `{node.span.text}` {problem}", node.span, help=help)
        return None
    return Addresses.of([(family, start, end)]) if family else _integers(type, start, end)


def _sum(node: syntax.Sum, type: Type, scope: Scope, findings: Findings) -> ValueSet | None:
    if type.kind not in ("integer", "duration"):
        _refuse(node, type, findings)
        return None
    terms = [single(term, type, scope, findings) for term in node.terms]
    total = sum(term for term in terms if term is not None)
    if type.offsets and terms[0] is not None:  # the period is the first one's
        periods = len(values.PERIODS)
        total = sum(term - term % periods for term in terms if term is not None)
        total += terms[0] % periods
    if None in terms:
        return None
    if total > type.limit:
        findings.error("E023", f"{node.span.text} is {total}, too large", node.span)
        return None
    return _integers(type, total, total)
