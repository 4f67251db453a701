"""The ruleset as nftables text; the only printer.

The text loads in one transaction and loads again without harm: each table is
made if missing, emptied of rules (its sets and counters keep what they learned)
and filled. It is written so that nft 1.0.6 and later take it: tabs, one
statement a line, names that no nft keyword can collide with.

nftables runs base chains of equal priority last-registered first, so tables are
printed in reverse: the file's first policy is registered last and runs first.
"""

from dataclasses import dataclass
from typing import Final

from itmlang.nft.model import Chain, Counter, FlowSet, Rule, Ruleset, Table
from itmlang.source import Span

# NFTNL_UDATA_COMMENT_MAXLEN, include/libnftnl/udata.h.
LONGEST_COMMENT: Final = 128
LONGEST_QUOTE: Final = 100


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
    for table in reversed(ruleset.tables):
        printer.line()
        _table(printer, table)
    return printer.done()


def print_base_chains(table: Table) -> dict[str, str]:
    """For each hook, the text that hangs the policy in there again: the base chain alone."""
    texts = {}
    for chain in table.base_chains:
        assert chain.hook is not None
        printer = _Printer()
        printer.line(f"table inet {table.name} {{")
        _chain(printer, chain)
        printer.line("}")
        texts[chain.hook.name] = printer.done().text
    return texts


def _order(ruleset: Ruleset) -> list[str]:
    """What runs at each hook, in order."""
    hooks: dict[str, list[tuple[int, str]]] = {}
    for table in ruleset.tables:
        for chain in table.base_chains:
            assert chain.hook is not None
            hooks.setdefault(chain.hook.name, []).append((chain.hook.priority, table.policy))
    return [
        f"at {hook}: "
        + ", ".join(f"{name} ({priority})" for priority, name in sorted(at, key=lambda p: p[0]))
        for hook, at in hooks.items()
    ]


def _table(printer: _Printer, table: Table) -> None:
    printer.line(f"table inet {table.name}", table.span)
    printer.line(f"flush table inet {table.name}", table.span)
    printer.line()
    printer.line(f"table inet {table.name} {{", table.span)
    for counter in table.counters:
        _counter(printer, counter)
    for flow_set in table.sets:
        _set(printer, flow_set)
    for chain in table.chains:
        _chain(printer, chain)
    printer.line("}")


def _counter(printer: _Printer, counter: Counter) -> None:
    printer.line(f"\tcounter {counter.name} {{", counter.span)
    printer.line("\t}", counter.span)
    printer.line()


def _set(printer: _Printer, flow_set: FlowSet) -> None:
    span = flow_set.span
    printer.line(f"\tset {flow_set.name} {{", span)
    printer.line(f"\t\ttypeof {flow_set.expression}", span)
    printer.line(f"\t\tsize {flow_set.size}", span)
    if flow_set.timeout is None:
        printer.line("\t\tflags dynamic", span)
    else:
        printer.line("\t\tflags dynamic,timeout", span)
        printer.line(f"\t\ttimeout {_duration(flow_set.timeout)}", span)
    printer.line("\t}", span)
    printer.line()


def _chain(printer: _Printer, chain: Chain) -> None:
    printer.line(f"\tchain {chain.name} {{", chain.span)
    if chain.hook is not None:
        hook = f"type filter hook {chain.hook.name} priority {chain.hook.priority}"
        printer.line(f"\t\t{hook}; policy accept;", chain.span)
    shown = 0
    for rule in chain.rules:
        if rule.span.line != shown:
            shown = rule.span.line
            printer.line(f"\t\t# {shown}: {_quoted(rule.span)}")
        printer.line(f'\t\t{rule.text} comment "{comment(rule)}"', rule.span)
    printer.line("\t}")
    printer.line()


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
    text = _plain(span.source.line(span.line).strip())
    return text if len(text) <= LONGEST_QUOTE else text[:LONGEST_QUOTE] + " ..."


def _plain(text: str) -> str:
    """Text without characters that would end a line or upset a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text.replace("\t", " "))


def _duration(milliseconds: int) -> str:
    """A time as nft takes it: `1h30m`."""
    parts = []
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        number, milliseconds = divmod(milliseconds, size)
        if number:
            parts.append(f"{number}{unit}")
    return "".join(parts)
