"""The ruleset as nftables text; the only printer.

The text loads in one transaction and loads again without harm: each table is
made if missing, emptied of rules (its sets and counters keep what they learned)
and filled. It is written so that nft 1.0.6 and later take it: tabs, one
statement a line, names that no nft keyword can collide with.

nftables runs base chains of equal priority last-registered first, so tables are
printed in reverse: the file's first policy is registered last and runs first.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from itmlang.nft.model import Chain, Counter, FlowSet, Rule, Ruleset, Table, ValueSet, duration
from itmlang.source import Span

# NFTNL_UDATA_COMMENT_MAXLEN, include/libnftnl/udata.h.
LONGEST_COMMENT: Final = 128
LONGEST_QUOTE: Final = 100
# Elements of a named set on one line.
IN_A_ROW: Final = 8


@dataclass(frozen=True)
class Text:
    """A printed ruleset; `lines[n]` is the policy's place behind line n (counted from 0)."""

    text: str
    lines: tuple[Span | None, ...]


class _Printer:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.spans: list[Span | None] = []

    def line(self, text: str = "", span: Span | None = None) -> None:
        self.lines.append(text)
        self.spans.append(span)

    def done(self) -> Text:
        return Text("\n".join(self.lines) + "\n", tuple(self.spans))


def print_ruleset(ruleset: Ruleset) -> Text:
    """The whole text for a file, as `itmc compile` prints and `itmc apply` loads it."""
    printer = _Printer()
    printer.line(f"# {_plain(ruleset.file)}, compiled by itmc")
    for line in _order(ruleset):
        printer.line(f"# {line}")
    if len(ruleset.tables) > 1:
        printer.line(
            "# Tables stand in reverse: of equal priorities, the last registered runs first."
        )
    if [name for table in ruleset.tables for name in table.policies] != list(ruleset.order):
        _hang_in_order(printer, ruleset)
    for table in reversed(ruleset.tables):
        printer.line()
        _table(printer, table)
    return printer.done()


def _hang_in_order(printer: _Printer, ruleset: Ruleset) -> None:
    """The base chains alone, the last policy's first: another table's policy runs in between."""
    printer.line("# Some share a table, with others between them: base chains come first.")
    for policy in reversed(ruleset.order):
        table = ruleset.table_of(policy)
        printer.line()
        printer.line(f"table {table.path} {{", table.span)
        for chain in table.base_chains:
            if chain.policy == policy:
                printer.line(f"\tchain {chain.name} {{ {_hook(chain)} }}", chain.span)
        printer.line("}")


def print_part(
    table: Table,
    *,
    counters: Iterable[Counter] = (),
    values: Sequence[ValueSet] = (),
    sets: Iterable[FlowSet] = (),
    chains: Iterable[Chain] = (),
) -> Text:
    """Some objects of a table, as a block that adds them to it."""
    printer = _Printer()
    printer.line(f"table {table.path} {{", table.span)
    for counter in counters:
        _counter(printer, counter)
    for value_set in values:
        _value_set(printer, value_set)
    for flow_set in sets:
        _set(printer, flow_set)
    for chain in chains:
        _chain(printer, chain)
    printer.line("}")
    _entries(printer, table, values)
    return printer.done()


def _order(ruleset: Ruleset) -> list[str]:
    """What runs at each hook, in order."""
    hooks: dict[str, list[tuple[int, str]]] = {}
    for policy in ruleset.order:
        for chain in ruleset.table_of(policy).base_chains:
            if chain.hook is not None and chain.policy == policy and not chain.role:
                hooks.setdefault(chain.hook.name, []).append((chain.hook.priority, policy))
    return [
        f"at {hook}: "
        + ", ".join(f"{name} ({priority})" for priority, name in sorted(at, key=lambda p: p[0]))
        for hook, at in hooks.items()
    ]


def _table(printer: _Printer, table: Table) -> None:
    printer.line(f"table {table.path}", table.span)
    printer.line(f"flush table {table.path}", table.span)
    for value_set in table.values:
        if value_set.verdicts:
            continue
        # Emptied before it is filled again, or elements that left the file would stay.
        kind = f"{{ type {value_set.type};{' flags interval;' if value_set.interval else ''} }}"
        printer.line(f"add set {table.path} {value_set.name} {kind}", value_set.span)
        printer.line(f"flush set {table.path} {value_set.name}", value_set.span)
    printer.line()
    printer.line(f"table {table.path} {{", table.span)
    for counter in table.counters:
        _counter(printer, counter)
    for value_set in table.values:
        _value_set(printer, value_set)
    for flow_set in table.sets:
        _set(printer, flow_set)
    for chain in _in_reverse(table):
        _chain(printer, chain)
    printer.line("}")
    _entries(printer, table, table.values)


def _entries(printer: _Printer, table: Table, values: Iterable[ValueSet]) -> None:
    """The elements of maps, last of all: the chains that they lead to come first.

    A map must be declared once for that: nftables 1.0.6 adds elements where it first reads of it.
    """
    for one in values:
        if not one.verdicts:
            continue
        printer.line()
        printer.line(f"flush map {table.path} {one.name}", one.span)
        printer.line(f"add element {table.path} {one.name} {{", one.span)
        places = one.spans or (one.span,) * len(one.elements)
        for key, verdict, place in zip(one.elements, one.verdicts, places, strict=True):
            printer.line(f"\t{key} : {verdict},", place)
        printer.line("}", one.span)


def _in_reverse(table: Table) -> list[Chain]:
    """The chains; of several policies the last comes first, for the order at one hook."""
    if not table.shared:
        return table.chains
    order = list(table.policies)
    return sorted(table.chains, key=lambda c: -order.index(c.policy) if c.policy else 1)


def _counter(printer: _Printer, counter: Counter) -> None:
    printer.line(f"\tcounter {counter.name} {{", counter.span)
    printer.line("\t}", counter.span)
    printer.line()


def _value_set(printer: _Printer, value_set: ValueSet) -> None:
    span, elements = value_set.span, value_set.elements
    printer.line(f"\t{value_set.kind} {value_set.name} {{", span)
    printer.line(f"\t\ttype {value_set.types}", span)
    if value_set.interval:
        printer.line("\t\tflags interval", span)
    if elements and not value_set.verdicts:
        rows = [elements[n : n + IN_A_ROW] for n in range(0, len(elements), IN_A_ROW)]
        for number, row in enumerate(rows):
            begin = "elements = { " if number == 0 else "             "
            end = " }" if number == len(rows) - 1 else ","
            printer.line(f"\t\t{begin}{', '.join(row)}{end}", span)
    printer.line("\t}", span)
    printer.line()


def _set(printer: _Printer, flow_set: FlowSet) -> None:
    span = flow_set.span
    if flow_set.written:
        printer.line(f"\t{'map' if flow_set.is_map else 'set'} {flow_set.name} {{", span)
        printer.line(f"\t\ttype {flow_set.expression}", span)
        printer.line(f"\t\tsize {flow_set.size}", span)
        flags = "interval,timeout" if flow_set.role in ("route", "networks") else "timeout"
        printer.line(f"\t\tflags {flags}", span)
        printer.line("\t}", span)
        printer.line()
        return
    printer.line(f"\tset {flow_set.name} {{", span)
    printer.line(f"\t\ttypeof {flow_set.expression}", span)
    printer.line(f"\t\tsize {flow_set.size}", span)
    printer.line(f"\t\tflags dynamic{',timeout' if flow_set.timed else ''}", span)
    if flow_set.timeout is not None:
        printer.line(f"\t\ttimeout {duration(flow_set.timeout)}", span)
    printer.line("\t}", span)
    printer.line()


def _chain(printer: _Printer, chain: Chain) -> None:
    printer.line(f"\tchain {chain.name} {{", chain.span)
    if chain.hook is not None:
        printer.line(f"\t\t{_hook(chain)}", chain.span)
    shown = 0
    for rule in chain.rules:
        line = rule.span.line
        if line != shown:
            shown = line
            printer.line(f"\t\t# {shown}: {_quoted(rule.span)}")
        printer.line(f"\t\t{rule_line(rule)}", rule.span)
    if chain.role == "queue" and not chain.rules:
        # What has no text: a target of xtables.
        printer.line(f"\t\t# NFQUEUE {chain.number}, put in when this is loaded", chain.span)
    printer.line("\t}")
    printer.line()


def _hook(chain: Chain) -> str:
    """Where a base chain hangs, as its declaration says it."""
    assert chain.hook is not None
    kind, _, device = chain.hook.name.partition(" ")
    hook = f"type {chain.hook.kind} hook {kind}" + (f" device {device}" if device else "")
    return f"{hook} priority {chain.hook.priority}; policy accept;"


def rule_line(rule: Rule) -> str:
    """A rule with its comment, as it is added."""
    return f'{rule.text} comment "{comment(rule)}"'


def comment(rule: Rule) -> str:
    """File, line and class, in what nftables takes: no quotes, at most 128 bytes."""
    end = f":{rule.span.line}" + (f" {rule.label}" if rule.label else "")
    file = _plain(rule.span.source.name).replace('"', "?")
    room = LONGEST_COMMENT - len(end.encode())
    while len(file.encode()) > room:
        file = "..." + file[4:] if file.startswith("...") else "..." + file[3:]
    return file + end


def _quoted(span: Span) -> str:
    """The policy's line, or its beginning: all of a policy may stand on one line."""
    text = span.source.line(span.line, LONGEST_QUOTE + 100).strip()
    return _plain(text) if len(text) <= LONGEST_QUOTE else _plain(text[:LONGEST_QUOTE]) + " ..."


def _plain(text: str) -> str:
    """Text without characters that would end a line or upset a terminal."""
    text = text.replace("\t", " ")
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)
