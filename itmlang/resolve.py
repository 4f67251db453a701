"""Modules -> what a file declares: sets, policies, instances, tests.

Names are one space for the file and all that it includes. A policy of the file
itself is an instance if all its parameters have defaults; an included one is a
template, and each `use` makes an instance of either.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Final

from itmlang import ir, syntax, values
from itmlang.diagnostics import Findings, did_you_mean
from itmlang.evaluate import Scope, single, value_set
from itmlang.fields import FIELDS
from itmlang.modules import Module
from itmlang.parser import parse
from itmlang.source import Reader, Source, Span, UnreadableError
from itmlang.values import Addresses, Type, ValueSet

# nft allows 255 characters; with the prefixes of generated names this is plenty.
LONGEST_NAME: Final = 64
DEFAULT_SIZE: Final = 65_536
# Entries of a set that are given twice: lists from elsewhere have many of them.
MOST_TWICE: Final = 5
_FORMS: Final = {
    "address": "an address, a prefix or a range a-b",
    "interface": "a name, or a pattern that ends in `*`",
}
_NAME: Final = re.compile(r"[a-z][a-z0-9_]*")
_ELEMENT: Final = re.compile(
    r'(?P<address>[0-9a-fA-F.:/]*[.:][0-9a-fA-F.:/]*)|(?P<number>0x[0-9a-fA-F]+|[0-9]+)'
    r"|(?P<word>[A-Za-z_][\w-]*)"
)  # fmt: skip


# Values of parameters as text, by policy and parameter.
Given = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Instance:
    """A policy to be loaded, or to be tested: a template and what is particular about it."""

    name: syntax.Name
    policy: syntax.Policy
    arguments: Mapping[str, syntax.Value] = field(default_factory=dict)
    use: syntax.Use | None = None


@dataclass(frozen=True)
class Program:
    """All that a file and its includes declare."""

    sets: Mapping[str, ir.AnySet]
    policies: Mapping[str, syntax.Policy]
    instances: tuple[Instance, ...]
    templates: tuple[syntax.Policy, ...]  # of the file itself, of which there is no instance
    tests: tuple[syntax.Test, ...]  # of the file itself
    links: tuple[syntax.Link, ...] = ()
    overlays: tuple[syntax.Overlay, ...] = ()


def resolve(
    modules: Sequence[Module], read: Reader, findings: Findings, given: Given | None = None
) -> Program:
    """The declarations of the modules, the last of which is the file itself.

    `given` are values of parameters that take the place of those in the file.
    """
    parsed = not findings.failed
    sets: dict[str, ir.AnySet] = {}
    for module in modules:
        for item in module.file.items:
            if isinstance(item, syntax.SetDeclaration):
                if item.name.text in sets:
                    _twice("sets", item.name, sets[item.name.text].span, findings)
                else:
                    made = _set(item, sets, read, findings)
                    sets.update({item.name.text: made} if made is not None else {})
    policies: dict[str, syntax.Policy] = {}
    for module in modules:
        for item in module.file.items:
            if isinstance(item, syntax.Policy):
                if item.name.text in policies:
                    _twice("policies", item.name, policies[item.name.text].name.span, findings)
                policies.setdefault(item.name.text, item)
    main = modules[-1].file
    if parsed:  # else who knows what the missing items use
        _unused_sets(modules, findings)
    tests = tuple(item for item in main.items if isinstance(item, syntax.Test))
    links = tuple(i for m in modules for i in m.file.items if isinstance(i, syntax.Link))
    for link in links:
        check_name(link.name, findings)
        if link.name.text in policies:
            _twice("things", link.name, policies[link.name.text].name.span, findings)
    overlays = tuple(i for m in modules for i in m.file.items if isinstance(i, syntax.Overlay))
    for overlay in overlays:
        name, others = overlay.name, (policies, sets, {link.name.text: link for link in links})
        for other in (known[name.text] for known in others if name.text in known):
            _twice(
                "things", name, other.span, findings, help="an overlay is a set and a policy, too"
            )
    instances = _instances(modules, policies, findings)
    instances = tuple(
        with_values(one, (given or {}).get(one.name.text, {}), findings) for one in instances
    )
    if not links and not overlays:
        _check_there_is_something(main, instances, policies, findings)
    used = {instance.policy.name.text for instance in instances}
    templates = tuple(
        item
        for item in main.items
        if isinstance(item, syntax.Policy) and item.name.text not in used
    )
    return Program(sets, policies, instances, templates, tests, links, overlays)


def _twice(what: str, name: syntax.Name, first: Span, findings: Findings, help: str = "") -> None:
    findings.error(
        "E012", f"there are two {what} named `{name.text}`", name.span,
        notes=(("the first one is here", first),), help=help,
    )  # fmt: skip


def _unused_sets(modules: Sequence[Module], findings: Findings) -> None:
    """Warn about sets of the file itself that nothing names."""
    declared = [i for i in modules[-1].file.items if isinstance(i, syntax.SetDeclaration)]
    named = _set_names([module.file.items for module in modules]) if declared else set()
    for item in declared:
        if item.name.text not in named:
            findings.warning(
                "W011", f"the set `@{item.name.text}` is never used", item.name.span,
                help=f"ask for it, as in `{_example(item)}`, or leave it out",
            )  # fmt: skip


def _example(node: syntax.SetDeclaration) -> str:
    fields = {"address": "saddr", "port": "dport", "interface": "in"}
    return f"{fields.get(node.type.text, node.type.text)} in @{node.name.text}"


def _set_names(parts: list[object]) -> set[str]:
    """The sets that are named anywhere in these parts of trees."""
    named, left = set(), list(parts)
    while left:
        part = left.pop()
        if isinstance(part, syntax.SetName):
            named.add(part.text)
        elif isinstance(part, tuple):
            left += part
        elif not isinstance(part, Span | str | int) and is_dataclass(part):
            left += vars(part).values()
    return named


def check_name(name: syntax.Name, findings: Findings) -> None:
    """Refuse what cannot be a name."""
    if not _NAME.fullmatch(name.text):
        findings.error(
            "E011",
            f"`{name.text}` cannot be a name",
            name.span,
            help=values.unit_help(name.text)
            or "a name has lower-case letters, digits and `_`, and begins with a letter",
        )
    elif len(name.text) > LONGEST_NAME:
        findings.error("E011", f"the name is longer than {LONGEST_NAME} characters", name.span)


# Policies and uses.


def _instances(
    modules: Sequence[Module], policies: Mapping[str, syntax.Policy], findings: Findings
) -> tuple[Instance, ...]:
    made: dict[str, Instance] = {}
    used: set[str] = set()
    for module in modules:
        for item in module.file.items:
            match item:
                case syntax.Policy() if not module.included and policies[item.name.text] is item:
                    if all(p.default is not None for p in item.parameters):
                        made[item.name.text] = Instance(item.name, item)
                case syntax.Use():
                    used.add(item.policy.text)
                    instance = _use(item, policies, findings)
                    if instance is None:
                        continue
                    first = made.get(instance.name.text)
                    if first is not None:
                        _twice(
                            "policies", instance.name, first.name.span, findings,
                            help=f"give it a name of its own: `use {item.policy.text}(…) as NAME`",
                        )  # fmt: skip
                    made.setdefault(instance.name.text, instance)
                case _:
                    pass
    for item in modules[-1].file.items:
        if isinstance(item, syntax.Policy) and not {item.name.text} & (used | set(made)):
            lacking = next((p for p in item.parameters if p.default is None), None)
            if lacking is None:
                continue  # another policy has the name, which was said
            findings.warning(
                "W007",
                f"`{item.name.text}` is not loaded: `{lacking.name.text}` has no value",
                lacking.span,
                help=f"give it a default, or `use {item.name.text}({lacking.name.text} = …) as …`",
            )
    return tuple(made.values())


def with_values(instance: Instance, given: Mapping[str, str], findings: Findings) -> Instance:
    """The instance with parameters that were given a value from outside of the file."""
    if not given:
        return instance
    # Read as it would be written.
    told = ", ".join(f"{name} = {text}" for name, text in sorted(given.items()))
    source = Source("given", f"use {instance.policy.name.text}({told})")
    items = parse(source, findings).items
    match items:
        case (syntax.Use(instance=None, statements=()) as use,) if len(use.arguments) == len(given):
            found = {
                name: use_value.value
                for name, use_value in zip(sorted(given), use.arguments, strict=True)
            }
            return replace(instance, arguments={**instance.arguments, **found})
        case _ if not findings.failed:
            findings.error("E001", "this is not one value", Span(source, 0, len(source.text)))
    return instance


def _use(
    node: syntax.Use, policies: Mapping[str, syntax.Policy], findings: Findings
) -> Instance | None:
    policy = policies.get(node.policy.text)
    if policy is None:
        findings.error(
            "E010", f"there is no policy `{node.policy.text}`", node.policy.span,
            help=did_you_mean(node.policy.text, policies)
            or "write it in this file, or include the one that has it: "
            f'`include "{node.policy.text}.itm"`',
        )  # fmt: skip
        return None
    given = arguments(policy, node.arguments, node.policy.span, findings)
    return Instance(node.instance or node.policy, policy, given, node)


def arguments(
    policy: syntax.Policy, given: Iterable[syntax.Argument], span: Span, findings: Findings
) -> dict[str, syntax.Value]:
    """The arguments by the names of the policy's parameters; each must get a value."""
    names = [p.name.text for p in policy.parameters]
    free, found = list(names), dict[str, syntax.Value]()
    for argument in given:
        if argument.name is None and not free:
            findings.error(
                "E019", f"`{policy.name.text}` has {len(names)} parameters, not more",
                argument.span, notes=(("it is declared here", policy.name.span),),
            )  # fmt: skip
            continue
        name = free[0] if argument.name is None else argument.name.text
        if name not in names:
            findings.error(
                "E019", f"`{policy.name.text}` has no parameter `{name}`", argument.span,
                help=did_you_mean(name, names),
            )  # fmt: skip
        elif name in found:
            findings.error("E019", f"`{name}` is given twice", argument.span)
        else:
            free.remove(name)
            found[name] = argument.value
    lacking = [p.name.text for p in policy.parameters if p.default is None]
    for name in (n for n in lacking if n not in found):
        findings.error(
            "E019", f"`{name}` has no value: `{policy.name.text}` has no default for it", span,
            help=f"write `{policy.name.text}({name} = …)`",
        )  # fmt: skip
    return found


def _check_there_is_something(
    main: syntax.File,
    instances: Sequence[Instance],
    policies: Mapping[str, syntax.Policy],
    findings: Findings,
) -> None:
    if instances or findings.failed:
        return
    own = next((i for i in main.items if isinstance(i, syntax.Policy)), None)
    if own is not None:
        findings.error(
            "E014",
            "no policy here can be loaded: each has a parameter without a value",
            own.name.span,
            help="give each parameter a default: `name: type = value`",
        )
    elif policies:
        name = next(iter(policies))
        include = next(i for i in main.items if isinstance(i, syntax.Include))
        findings.error(
            "E014", "no policy here is loaded: an included one is a template", include.span,
            help=f"name it: `use {name}`",
        )  # fmt: skip
    else:
        findings.error(
            "E002",
            "the file holds no policy",
            Span(main.source, 0, 0),
            help="begin with `policy NAME { at HOOK … }`",
        )


# Sets.


def _set(
    node: syntax.SetDeclaration,
    sets: Mapping[str, ir.AnySet],
    read: Reader,
    findings: Findings,
) -> ir.AnySet | None:
    type = values.PARAMETER_TYPES.get(node.type.text)
    check_name(node.name, findings)
    if type is None:
        findings.error(
            "E010", f"there is no type `{node.type.text}`", node.type.span,
            help=did_you_mean(node.type.text, values.PARAMETER_TYPES),
        )  # fmt: skip
        return None
    if isinstance(node.content, tuple):
        return _learned(node, type, node.content, findings)
    if isinstance(node.content, syntax.Text) and node.from_file:
        found = _from_file(node.content, type, node.span.source, read, findings)
    else:
        found = _literal(node.content, type, Scope(sets), findings)
    if found is None:
        # What was reported is not reported again where the set is used.
        return ir.NamedSet(node.name.text, type, type.everything, node.span)
    if found.empty:
        findings.warning("W008", f"the set `@{node.name.text}` is empty", node.span)
    return ir.NamedSet(node.name.text, type, found, node.span)


def _learned(
    node: syntax.SetDeclaration,
    type: Type,
    options: tuple[syntax.SizeOption, ...],
    findings: Findings,
) -> ir.LearnedSet:
    given = size_options(options, Scope(), findings)
    known = list(dict.fromkeys(f.type.name for f in FIELDS.values() if f.datatype))
    if type.name not in known:
        findings.error(
            "E038", f"{type.name} values cannot be learned", node.type.span,
            help=f"nftables has such sets of {', '.join(known)} values",
        )  # fmt: skip
    return ir.LearnedSet(
        node.name.text, type, given.get("timeout"), given.get("max", DEFAULT_SIZE), node.span
    )


def size_options(
    options: Iterable[syntax.SizeOption], scope: Scope, findings: Findings
) -> dict[str, int]:
    """`timeout` (in milliseconds) and `max` of a table, as far as they are given."""
    given: dict[str, int] = {}
    for option in options:
        type = values.DURATION if option.name == "timeout" else values.NUMBER
        if option.name in given:
            findings.error("E012", f"`{option.name}` is given twice", option.span)
        value = single(option.value, type, scope, findings)
        if value == 0:
            findings.error("E023", f"`{option.name}` cannot be 0", option.value.span)
        given[option.name] = value or 1
    return given


def _literal(node: syntax.Value, type: Type, scope: Scope, findings: Findings) -> ValueSet | None:
    items = node.items if isinstance(node, syntax.Listing) else (node,)
    return _union(((item, item.span) for item in items), type, scope, findings)


def _union(
    elements: Iterable[tuple[syntax.Value, Span]], type: Type, scope: Scope, findings: Findings
) -> ValueSet | None:
    """The values of all elements; one that comes again is warned about, a few times."""
    sets: list[ValueSet] = []
    first: dict[ValueSet, Span] = {}
    complete, again = True, 0
    for element, span in elements:
        found = value_set(element, type, scope, findings)
        if found is None:
            complete = False
            continue
        if found in first:
            again += 1
            if again <= MOST_TWICE:
                findings.warning(
                    "W009", f"`{span.text}` is given twice", span,
                    notes=(("the first one is here", first[found]),),
                )  # fmt: skip
            last = span
        first.setdefault(found, span)
        sets.append(found)
    if again > MOST_TWICE:
        findings.warning("W009", f"{again - MOST_TWICE} more entries are given twice", last)
    return values.union_all(type.nothing, sets) if complete else None


def _from_file(
    path: syntax.Text, type: Type, by: Source, read: Reader, findings: Findings
) -> ValueSet | None:
    try:
        source = read(path.text, by, False)
    except UnreadableError as error:
        findings.error(
            "E017", f"`{path.text}` cannot be read: {error}", path.span,
            help="the path is relative to the policy file",
        )  # fmt: skip
        return None
    if type.kind == "address":
        found = _plain_addresses(source, findings)
        if found is not None:
            return found
    return _union(_elements(source, type, findings), type, Scope(), findings)


def _plain_addresses(source: Source, findings: Findings) -> ValueSet | None:
    """The fast way for long lists: nothing but addresses and prefixes, none twice; else None."""
    intervals: dict[tuple[int, int, int], None] = {}
    lines = 0
    for line in source.text.split("\n"):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            intervals[values.network_interval(text)] = None
        except ValueError:
            return None
        lines += 1
    return Addresses.of(intervals) if lines == len(intervals) else None


def _elements(
    source: Source, type: Type, findings: Findings
) -> Iterator[tuple[syntax.Value, Span]]:
    """The elements of a set's file, one a line."""
    start = 0
    for line in source.text.split("\n"):
        content = line.partition("#")[0].rstrip()
        text = content.strip()
        if text:
            begin = start + len(content) - len(content.lstrip())
            span = Span(source, begin, begin + len(text))
            node = _element(text, span, type)
            if node is None:
                findings.error(
                    "E018", f"`{text}` is no {type.name}", span,
                    help=did_you_mean(text, type.names)
                    or "one element a line: " + _FORMS.get(type.kind, "a value or a range a-b"),
                )  # fmt: skip
            else:
                yield node, span
        start += len(line) + 1


def _element(text: str, span: Span, type: Type) -> syntax.Value | None:
    """The value that a line stands for, None if it is none of the type."""
    if type.kind == "interface":
        quoted = len(text) > 1 and text[0] == text[-1] == '"'
        return syntax.Text(span, text[1:-1] if quoted else text)
    whole = _ELEMENT.fullmatch(text)
    low, dash, high = text.partition("-")
    if dash and not (whole and text in type.names):
        low, high = low.rstrip(), high.lstrip()
        ends = (
            _element(low, Span(span.source, span.start, span.start + len(low)), type),
            _element(high, Span(span.source, span.end - len(high), span.end), type),
        )
        if all(isinstance(end, syntax.Number | syntax.Address | syntax.Word) for end in ends):
            return syntax.Interval(span, *ends)  # type: ignore[arg-type]
    if whole is None:
        return None
    if (type.kind == "address") != bool(whole["address"]):
        return None
    if whole["address"]:
        return syntax.Address(span, text)
    if whole["number"]:
        return syntax.Number(span, int(text, 0) if text[:2] == "0x" else int(text[:40]))
    return syntax.Word(span, text) if text in (*type.names, *type.refused) else None
