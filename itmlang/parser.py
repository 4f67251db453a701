"""Text to syntax tree; the only module that knows lark.

The text is first cut into its top-level items by their braces, so that a
syntax error in one policy does not hide what is wrong in the next. Each item
is then parsed by LALR, its tree built without recursion. Nesting is bounded
before parsing, so that no later pass can run out of stack.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

from lark import Lark, Token, UnexpectedCharacters, UnexpectedInput, v_args
from lark.exceptions import UnexpectedToken
from lark.lexer import PatternStr
from lark.tree import Meta
from lark.utils import TextSlice
from lark.visitors import Transformer_NonRecursive

from itmlang import syntax
from itmlang.diagnostics import Findings, did_you_mean
from itmlang.resources import resource
from itmlang.source import Source, Span

DEEPEST_NESTING: Final = 64
MOST_WORDS: Final = 1_000_000

_TERMINALS: Final = {
    "WORD": "a name",
    "NUMBER": "a number",
    "UNIT": "a unit",
    "DURATION": "a duration",
    "ADDRESS4": "an address",
    "ADDRESS6": "an address",
    "STRING": "a string",
    "OPERATOR": "a comparison",
    "_INTEREST": "`interest {`",
    "_CLASSIFY": "`classify {`",
    "_LOG": "`log {`",
    "_PROCESS": "`process {`",
    "$END": "the end",
}
# Words of the language that later versions will know.
_LATER: Final = frozenset(
    {
        "include", "set", "use", "link", "overlay", "tunnel", "test", "update", "control",
        "sample", "record", "limit", "call", "reject", "encapsulate", "decapsulate", "route",
        "send", "proxy", "every", "add", "remove",
    }
)  # fmt: skip
_MARKS: Final = re.compile(
    r'#[^\n]*|"[^"\n]*"|[{}()]|^policy\b|(?:\bnot\b(?:[\s;]|#[^\n]*\n)*){64}', re.MULTILINE
)


def parse(source: Source, findings: Findings) -> syntax.File:
    """The tree of a policy file; syntax errors go to `findings`, one a top-level item."""
    policies: list[syntax.Policy] = []
    if _too_long(source, findings):
        return syntax.File(source, ())
    for start, end in _items(source, findings):
        policy = _parse(source, "start", start, end, findings)
        if isinstance(policy, syntax.Policy):
            policies.append(policy)
    if not policies and not findings.failed:
        findings.error(
            "E002",
            "the file holds no policy",
            Span(source, 0, 0),
            help="begin with `policy NAME { at HOOK … }`",
        )
    return syntax.File(source, tuple(policies))


def _too_long(source: Source, findings: Findings) -> bool:
    """Refuse what would take too much time and memory; counted cheaply, before parsing."""
    if len(source.text) < MOST_WORDS:
        return False
    for count, word in enumerate(re.finditer(r"\w+|[^\s\w]", source.text)):
        if count == MOST_WORDS:
            span = Span(source, word.start(), word.end())
            findings.error("E006", f"the file has more than {MOST_WORDS} words", span)
            return True
    return False


def parse_packet(source: Source, findings: Findings) -> syntax.PacketText | None:
    """A packet as `itmc explain` takes it, None after a syntax error."""
    tree = _parse(source, "packet", 0, len(source.text), findings)
    return tree if isinstance(tree, syntax.PacketText) else None


def parse_send(source: Source, findings: Findings) -> syntax.Send | None:
    """A test's line, `send N PACKET expect …`, None after a syntax error."""
    tree = _parse(source, "send", 0, len(source.text), findings)
    return tree if isinstance(tree, syntax.Send) else None


def _items(source: Source, findings: Findings) -> Iterator[tuple[int, int]]:
    """The extent of each top-level item, by brackets; an unclosed one ends where the next begins.

    An item that nests too deeply is reported and left out.
    """
    start, too_deep = 0, False
    stack: list[str] = []
    for mark in _MARKS.finditer(source.text):
        text = mark.group()
        if text == "policy" and stack:
            yield start, mark.start()
            start, too_deep = mark.start(), False
            stack.clear()
        elif text in "{(":
            stack.append(text)
            if len(stack) > DEEPEST_NESTING and not too_deep:
                too_deep = True
                _report_depth(Span(source, mark.start(), mark.end()), findings)
        elif text.startswith("not") and not too_deep:
            too_deep = True
            _report_depth(Span(source, mark.start(), mark.start() + 3), findings)
        elif text == ")" and stack[-1:] == ["("]:
            stack.pop()
        elif text == "}":
            # A brace closes what was left open inside of it, too.
            while stack and stack.pop() != "{":
                pass
            if not stack:
                if not too_deep:
                    yield start, mark.end()
                start, too_deep = mark.end(), False
    rest = re.sub(r"#[^\n]*", "", source.text[start:])
    if rest.strip(" \t\r\n\f;") and not too_deep:
        yield start, len(source.text)


def _report_depth(span: Span, findings: Findings) -> None:
    findings.error(
        "E003",
        f"this nests more than {DEEPEST_NESTING} deep",
        span,
        help="split the condition, or use a list: `field in { a, b }`",
    )


def _parse(source: Source, rule: str, start: int, end: int, findings: Findings) -> Any:
    try:
        tree = _grammar(rule).parse(TextSlice(source.text, start, end))
        return _Builder(source).transform(tree)
    except UnexpectedInput as error:
        _report(source, error, rule, end, findings)
        return None


@cache
def _grammar(rule: str) -> Lark:
    # One parser a start rule: a keyword of one is an ordinary name in the others.
    return Lark(
        Path(resource("grammar", "itm.lark")).read_text(encoding="utf-8"),
        parser="lalr",
        start=rule,
        propagate_positions=True,
        maybe_placeholders=True,
    )


def _report(
    source: Source, error: UnexpectedInput, rule: str, end: int, findings: Findings
) -> None:
    """Say what stands where something else was expected."""
    if isinstance(error, UnexpectedCharacters):
        at = error.pos_in_stream or 0
        character = source.text[at]
        span = Span(source, at, at + 1)
        if character == '"':
            findings.error("E004", "the string has no end on its line", span)
        else:
            shown = character if character.isprintable() else f"U+{ord(character):04X}"
            expected = _expected(rule, error.allowed or ())
            findings.error("E001", f"unexpected `{shown}`{expected}", span)
        return
    assert isinstance(error, UnexpectedToken)
    token = error.token
    if token.type == "$END":
        last = len(source.text[:end].rstrip())
        span = Span(source, max(0, last - 1), last)
        findings.error("E001", f"the text ends too early{_expected(rule, error.expected)}", span)
        return
    span = Span(source, token.start_pos or 0, token.end_pos or 0)
    help = ""
    if token.type == "WORD":
        words = [w for t in error.expected if (w := _spelling(rule, t)).isalpha()]
        help = did_you_mean(str(token), words)
        help = help if help.startswith("did") else ""
        if str(token) in words:  # a section's keyword is none without its brace
            help = "a `{` is missing behind it"
        if str(token) in _LATER:
            help = f"`{token}` belongs to the language, but this version does not have it yet"
    findings.error(
        "E001", f"unexpected `{token}`{_expected(rule, error.expected)}", span, help=help
    )


def _spelling(rule: str, terminal: str) -> str:
    """How a terminal is written, or what it is."""
    if terminal in _TERMINALS:
        return _TERMINALS[terminal].strip("` {") if terminal[0] == "_" else _TERMINALS[terminal]
    for definition in _grammar(rule).terminals:
        if definition.name == terminal and isinstance(definition.pattern, PatternStr):
            return definition.pattern.value
    return terminal.strip("_").lower()


def _expected(rule: str, terminals: Sequence[str] | set[str]) -> str:
    """`: expected a, b or c`, or nothing where the choice is too wide to help."""
    texts = set()
    for terminal in terminals:
        text = _TERMINALS.get(terminal) or f"`{_spelling(rule, terminal)}`"
        texts.add(text)
    choice = sorted(texts - {"`;`"})
    if not choice or len(choice) > 10:
        return ""
    if len(choice) == 1:
        return f": expected {choice[0]}"
    return f": expected {', '.join(choice[:-1])} or {choice[-1]}"


def _integer(digits: str) -> int:
    """A literal's value. One of absurd length becomes a number that no type takes."""
    if len(digits) > 40:
        return 10**40
    return int(digits, 16) if digits[:2] in ("0x", "0X") else int(digits)


@v_args(meta=True)
class _Builder(Transformer_NonRecursive[Token, Any]):
    """Lark's tree to ours. Each method is a rule of the grammar."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source

    def _span(self, meta: Meta) -> Span:
        return Span(self._source, meta.start_pos, meta.end_pos)

    def _token_span(self, token: Token) -> Span:
        return Span(self._source, token.start_pos or 0, token.end_pos or 0)

    def _name(self, token: Token) -> syntax.Name:
        return syntax.Name(self._token_span(token), str(token))

    # Values.

    def number(self, meta: Meta, children: list[Token]) -> syntax.Number:
        return syntax.Number(self._span(meta), _integer(children[0]))

    def quantity(self, meta: Meta, children: list[Token]) -> syntax.Number:
        return syntax.Number(self._span(meta), _integer(children[0]), str(children[1]))

    def duration(self, meta: Meta, children: list[Token]) -> syntax.Number:
        digits = re.match(r"[0-9]+", children[0])
        assert digits is not None
        return syntax.Number(
            self._span(meta), _integer(digits.group()), children[0][digits.end() :]
        )

    def address(self, meta: Meta, children: list[Token]) -> syntax.Address:
        return syntax.Address(self._span(meta), str(children[0]))

    def string(self, meta: Meta, children: list[Token]) -> syntax.Text:
        return syntax.Text(self._span(meta), children[0][1:-1])

    def word(self, meta: Meta, children: list[Token]) -> syntax.Word:
        return syntax.Word(self._span(meta), str(children[0]))

    def added(self, meta: Meta, children: list[syntax.Value]) -> syntax.Sum:
        return syntax.Sum(self._span(meta), tuple(children))

    def range(self, meta: Meta, children: list[Any]) -> syntax.Interval:
        return syntax.Interval(self._span(meta), children[0], children[2])

    def list_of(self, meta: Meta, children: list[syntax.Value | None]) -> syntax.Listing:
        return syntax.Listing(self._span(meta), tuple(c for c in children if c is not None))

    # Conditions.

    def field(self, meta: Meta, children: list[Token]) -> syntax.FieldName:
        return syntax.FieldName(self._span(meta), ".".join(children))

    def comparison(self, meta: Meta, children: list[Any]) -> syntax.Comparison:
        field, operator, value = children
        return syntax.Comparison(self._span(meta), field, str(operator), value)

    def group(self, meta: Meta, children: list[syntax.Condition]) -> syntax.Condition:
        return children[0]

    def negated(self, meta: Meta, children: list[Any]) -> syntax.Condition:
        term: syntax.Condition = children[1]
        # `not not x` is x: written a million times, it must not nest.
        return (
            term.term
            if isinstance(term, syntax.Negation)
            else syntax.Negation(self._span(meta), term)
        )

    def all_of(self, meta: Meta, children: list[syntax.Condition]) -> syntax.AllOf:
        return syntax.AllOf(self._span(meta), tuple(children))

    def any_of(self, meta: Meta, children: list[syntax.Condition]) -> syntax.AnyOf:
        return syntax.AnyOf(self._span(meta), tuple(children))

    # Statements.

    def name(self, meta: Meta, children: list[Token]) -> syntax.Name:
        return self._name(children[0])

    def hook(self, meta: Meta, children: list[Token]) -> syntax.Name:
        return syntax.Name(self._span(meta), " ".join(c for c in children if c is not None))

    def at(self, meta: Meta, children: list[syntax.Name]) -> syntax.At:
        return syntax.At(self._span(meta), tuple(children))

    def priority(self, meta: Meta, children: list[Any]) -> syntax.Priority:
        return syntax.Priority(self._span(meta), children[1], children[0] is not None)

    def interest_line(self, meta: Meta, children: list[Any]) -> syntax.InterestLine:
        excluded, field, value = children
        return syntax.InterestLine(self._span(meta), excluded is not None, field, value)

    def interest(self, meta: Meta, children: list[syntax.InterestLine]) -> syntax.Interest:
        return syntax.Interest(self._span(meta), tuple(children))

    def flow_option(self, meta: Meta, children: list[Any]) -> syntax.FlowOption:
        return syntax.FlowOption(self._span(meta), str(children[0]), children[1])

    def flow(self, meta: Meta, children: list[Any]) -> syntax.Flow:
        key = tuple(c for c in children if isinstance(c, syntax.FieldName))
        options = tuple(c for c in children if isinstance(c, syntax.FlowOption))
        return syntax.Flow(self._span(meta), children[0], key, options)

    def class_rule(self, meta: Meta, children: list[Any]) -> syntax.ClassRule:
        return syntax.ClassRule(self._span(meta), *children)

    def classify(self, meta: Meta, children: list[syntax.ClassRule]) -> syntax.Classify:
        return syntax.Classify(self._span(meta), tuple(children))

    def count(self, meta: Meta, children: list[syntax.Name]) -> syntax.Count:
        return syntax.Count(self._span(meta), children[0])

    def log(self, meta: Meta, children: list[syntax.Count]) -> syntax.Log:
        return syntax.Log(self._span(meta), tuple(children))

    def action(self, meta: Meta, children: list[Any]) -> syntax.Action:
        verb, field, value = children
        return syntax.Action(self._span(meta), (str(verb), field.text), value)

    def verdict(self, meta: Meta, children: list[Token]) -> syntax.Action:
        return syntax.Action(self._span(meta), (str(children[0]),), None)

    def class_block(self, meta: Meta, children: list[Any]) -> syntax.ClassBlock:
        return syntax.ClassBlock(self._span(meta), children[0], tuple(children[1:]))

    def process(self, meta: Meta, children: list[syntax.ClassBlock]) -> syntax.Process:
        return syntax.Process(self._span(meta), tuple(children))

    def run(self, meta: Meta, children: list[Token]) -> syntax.Run:
        return syntax.Run(self._span(meta), self._name(children[0]))

    def fail(self, meta: Meta, children: list[Token]) -> syntax.Fail:
        return syntax.Fail(self._span(meta), self._name(children[0]))

    def parameter(self, meta: Meta, children: list[Any]) -> syntax.Parameter:
        return syntax.Parameter(self._span(meta), *children)

    def parameters(self, meta: Meta, children: list[Any]) -> tuple[syntax.Parameter, ...]:
        return tuple(c for c in children if c is not None)

    def policy(self, meta: Meta, children: list[Any]) -> syntax.Policy:
        name, parameters, *statements = children
        return syntax.Policy(self._span(meta), name, parameters or (), tuple(statements))

    # Packets and tests.

    def endpoint(self, meta: Meta, children: list[Token | None]) -> syntax.Endpoint:
        address = children[0]
        assert address is not None
        port = children[1]
        return syntax.Endpoint(
            self._span(meta),
            syntax.Address(self._token_span(address), str(address)),
            None if port is None else syntax.Number(self._token_span(port), _integer(port)),
        )

    def packet_key(self, meta: Meta, children: list[Token]) -> str:
        return str(children[0])

    def packet_option(self, meta: Meta, children: list[Any]) -> syntax.PacketOption:
        name, *given = children
        value = given[0] if len(given) == 1 else syntax.Listing(self._span(meta), tuple(given))
        return syntax.PacketOption(self._span(meta), name, value)

    def packet(self, meta: Meta, children: list[Any]) -> syntax.PacketText:
        protocol, source, destination, *options = children
        return syntax.PacketText(
            self._span(meta), self._name(protocol), source, destination, tuple(options)
        )

    def expect_class(self, meta: Meta, children: list[Any]) -> syntax.Expectation:
        first, second = children
        policy, name = (first, second) if second is not None else (None, first)
        return syntax.Expectation(self._span(meta), "class", policy, name)

    def expect_untouched(self, meta: Meta, children: list[Any]) -> syntax.Expectation:
        return syntax.Expectation(self._span(meta), "untouched")

    def expect_drop(self, meta: Meta, children: list[Any]) -> syntax.Expectation:
        return syntax.Expectation(self._span(meta), "drop")

    def expect_field(self, meta: Meta, children: list[Any]) -> syntax.Expectation:
        return syntax.Expectation(self._span(meta), children[0], value=children[1])

    def send(self, meta: Meta, children: list[Any]) -> syntax.Send:
        number, packet, *expectations = children
        count = syntax.Number(self._token_span(number), _integer(number))
        return syntax.Send(self._span(meta), count, packet, tuple(expectations))
