"""Text to syntax tree, and what is said where there is none.

The text is first cut into its top-level items by their braces, so that a
syntax error in one policy does not hide what is wrong in the next. Each item
is then parsed by LALR (see `grammar`), without recursion. Nesting is bounded
before parsing, so that no later pass can run out of stack.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any, Final

from lark import Lark, Token, UnexpectedCharacters, UnexpectedInput
from lark.exceptions import UnexpectedToken
from lark.lexer import PatternStr
from lark.utils import TextSlice

from itmlang import syntax
from itmlang.diagnostics import Findings, did_you_mean
from itmlang.grammar import Grammar, read
from itmlang.source import Source, Span
from itmlang.values import unit_help

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
    "_UPDATE": "`update {`",
    "_CONTROL": "`control {`",
    "CONTROLLED": "what is controlled",
    "DRY": "`dry run`",
    "SET_NAME": "a set such as `@name`",
    "DECIMAL": "a number",
    "RATE": "a rate",
    "$END": "the end",
}
# Words of the language that later versions will know.
_LATER: Final = frozenset(
    {
        "tunnel", "proxy",
    }
)  # fmt: skip
# What other languages write there.
_ELSEWHERE: Final = {"|": "write `or`", "&": "write `and`", "!": "write `not`", "'": 'write `"`'}
_BEFORE: Final = re.compile(r"[a-z]+(?=\s*\Z)")
# Actions with a form of their own, as they begin where they are written otherwise.
_FORMS: Final = (
    (re.compile(r"\bcall\s+[\w.]*\s*\Z"), 'write `call "module:function"`'),
    (re.compile(r"\bencapsulate\s+\Z"), "write `encapsulate to ADDRESS`"),
    (re.compile(r"\broute\s+\Z"), "write `route by OVERLAY`"),
)
_MARKS: Final = re.compile(
    r'#[^\n]*|"[^"\n]*"|[{}()]|^[ \t]*(?:include|set|policy|use|link|overlay|test)\b'
    r"|(?:\bnot\b(?:[\s;]|#[^\n]*\n)*){64}",
    re.MULTILINE,
)
# Inside of something unclosed, these begin the next item; `set` and others are statements, too.
_HEADS: Final = re.compile(r"(?:policy|use|link|overlay|test)\b(?:[^\n{}()]|\([^\n()]*\))*\{")
_SECTIONS: Final = frozenset({"_INTEREST", "_CLASSIFY", "_LOG", "_PROCESS", "_UPDATE", "_CONTROL"})
_TEST_LINES: Final = frozenset({"_SEND", "_PATH", "_WAIT"})
# What other languages say, and this one does not.
_MEANT: Final = {
    "if": "CLASS when CONDITION", "on": "at HOOK, …", "hook": "at HOOK, …", "match": "interest { … }",
}  # fmt: skip
_TEST: Final = re.compile(r"(?:\s|;|#[^\n]*\n)*test\b")


@dataclass(frozen=True)
class Piece:
    """A word or sign as it stands in the text, for those who care how it is written.

    `kind` is its terminal and `rule` the rule it is a direct part of; `begins` names
    the rules that it is the first piece of.
    """

    text: str
    start: int
    kind: str
    rule: str
    begins: frozenset[str]

    @property
    def end(self) -> int:
        return self.start + len(self.text)


def parse(source: Source, findings: Findings) -> syntax.File:
    """The tree of a policy file; syntax errors go to `findings`, one a top-level item."""
    items: list[syntax.Item] = []
    if _too_long(source, findings):
        return syntax.File(source, ())
    for start, end in _items(source, findings):
        if _TEST.match(source.text, start):
            test = _parse(source, "test", start, end, findings)
            items += [test] if isinstance(test, syntax.Test) else []
        else:
            items += _parse(source, "start", start, end, findings) or ()
    return syntax.File(source, tuple(items))


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
    text, start, too_deep = source.text, 0, False
    stack: list[str] = []
    for mark in _MARKS.finditer(text):
        word = mark.group()
        if word.strip().isalpha():
            if stack and not _HEADS.match(text, mark.start()):
                continue
            if not _blank(text[start : mark.start()]) and not too_deep:
                yield start, mark.start()
            start, too_deep = mark.start(), False
            stack.clear()
        elif word in "{(":
            stack.append(word)
            if len(stack) > DEEPEST_NESTING and not too_deep:
                too_deep = True
                _report_depth(Span(source, mark.start(), mark.end()), findings)
        elif word.startswith("not") and not too_deep:
            too_deep = True
            _report_depth(Span(source, mark.start(), mark.start() + 3), findings)
        elif word == ")" and stack[-1:] == ["("]:
            stack.pop()
        elif word == "}":
            # A brace closes what was left open inside of it, too.
            while stack and stack.pop() != "{":
                pass
            if not stack:
                if not too_deep:
                    yield start, mark.end()
                start, too_deep = mark.end(), False
    if not _blank(text[start:]) and not too_deep:
        yield start, len(text)


def _blank(text: str) -> bool:
    """Nothing but white space, semicolons and comments?"""
    return not re.sub(r"#[^\n]*", "", text).strip(" \t\r\n\f;")


def _report_depth(span: Span, findings: Findings) -> None:
    findings.error(
        "E003",
        f"this nests more than {DEEPEST_NESTING} deep",
        span,
        help="split the condition, or use a list: `field in { a, b }`",
    )


def pieces(source: Source, findings: Findings) -> Iterator[Piece]:
    """Every word and sign of a policy file but `;`, in order; syntax errors go to `findings`."""
    if _too_long(source, findings):
        return
    for start, end in _items(source, findings):
        rule = "test" if _TEST.match(source.text, start) else "start"
        try:
            tree = _every_token(rule).parse(TextSlice(source.text, start, end))
        except UnexpectedInput as error:
            _report(source, error, rule, end, findings)
            continue
        begins: list[str] = []
        left: list[tuple[Any, str]] = [(tree, "")]
        while left:
            node, parent = left.pop()
            if isinstance(node, Token):
                yield Piece(str(node), node.start_pos or 0, node.type, parent, frozenset(begins))
                begins.clear()
            else:
                begins.append(str(node.data))
                left += [(child, str(node.data)) for child in reversed(node.children)]


def _parse(source: Source, rule: str, start: int, end: int, findings: Findings) -> Any:
    try:
        return _grammar(rule).parse(source, start, end, _Nodes(source))
    except UnexpectedInput as error:
        _report(source, error, rule, end, findings)
        return None


_grammar = cache(Grammar)


@cache
def _every_token(rule: str) -> Lark:
    return read(rule, every_token=True)


def _report(
    source: Source, error: UnexpectedInput, rule: str, end: int, findings: Findings
) -> None:
    """Say what stands where something else was expected."""
    if isinstance(error, UnexpectedCharacters):
        at = error.pos_in_stream or 0
        character = source.text[at]
        span = Span(source, at, at + 1)
        if character == '"':
            findings.error(
                "E004", "the string has no end on its line", span, help='close it with `"`'
            )
        else:
            shown = character if character.isprintable() else f"U+{ord(character):04X}"
            expected = _expected(rule, error.allowed or ())
            help = _ELSEWHERE.get(character, "")
            findings.error("E001", f"unexpected `{shown}`{expected}", span, help=help)
        return
    assert isinstance(error, UnexpectedToken)
    token = error.token
    # `expected` has what merged states of the parser accept elsewhere, too.
    accepted = error.accepts or error.expected
    if token.type == "$END":
        last = len(source.text[:end].rstrip())
        span = Span(source, max(0, last - 1), last)
        findings.error("E001", f"the text ends too early{_expected(rule, accepted)}", span)
        return
    span = Span(source, token.start_pos or 0, token.end_pos or 0)
    before = _BEFORE.search(source.text[max(0, span.start - 40) : span.start])
    number = re.search(r"[0-9]\s*$", source.text[max(0, span.start - 40) : span.start])
    help = ""
    if token.type in _SECTIONS:
        help = "a `}` may be missing before it"
    elif token.type in _TEST_LINES:
        help = "an `expect …` may be missing before it"
    elif token.type != "WORD" and token[:1].isalpha() and "WORD" in accepted:
        help = f"`{token}` is a word of the language here: choose another name"
    elif token == "=" and "OPERATOR" in accepted:
        help = "to compare, write `==`"
    elif token == ",":
        help = "several values stand in braces: `{ a, b }`"
    if token.type == "WORD":
        words = [w for t in accepted if (w := _spelling(rule, t)).isalpha()]
        help = did_you_mean(str(token), words)
        help = help if help.startswith("did") else ""
        if number is not None and unit_help(str(token)):
            help = unit_help(str(token))
        elif str(token) in _MEANT:
            help = f"write `{_MEANT[str(token)]}`"
        if str(token) in words:  # a section's keyword is none without its brace
            help = "a `{` is missing behind it"
        if str(token) in _LATER:
            help = _not_yet(str(token))
    if not help and before is not None and before.group() in _LATER:
        help = _not_yet(before.group())
    for form, advice in _FORMS:
        if form.search(source.text[max(0, span.start - 40) : span.start]):
            help = advice
    findings.error("E001", f"unexpected `{token}`{_expected(rule, accepted)}", span, help=help)


def _not_yet(word: str) -> str:
    return f"`{word}` belongs to the language, but this version does not have it yet"


def _spelling(rule: str, terminal: str) -> str:
    """How a terminal is written, or what it is."""
    if terminal in _TERMINALS:
        return _TERMINALS[terminal].strip("` {") if terminal[0] == "_" else _TERMINALS[terminal]
    for definition in _grammar(rule).lark.terminals:
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


def _number(digits: str) -> int | Fraction:
    """A literal's value; one of absurd length becomes a number that no type takes."""
    if "." in digits and len(digits) <= 40:
        return Fraction(digits)
    return _integer(digits.split(".")[0])


def _integer(digits: str) -> int:
    """A literal's value. One of absurd length becomes a number that no type takes."""
    if len(digits) > 40:
        return 10**40
    return int(digits, 16) if digits[:2] in ("0x", "0X") else int(digits)


class _Nodes:
    """The nodes of our tree. Each method is a rule of the grammar, with its span and parts."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def _token_span(self, token: Token) -> Span:
        start = token.start_pos or 0
        return Span(self._source, start, start + len(token))

    def _name(self, token: Token) -> syntax.Name:
        return syntax.Name(self._token_span(token), str(token))

    # Values.

    def number(self, span: Span, children: list[Token]) -> syntax.Number:
        return syntax.Number(span, _number(children[0]))

    def quantity(self, span: Span, children: list[Token]) -> syntax.Number:
        return syntax.Number(span, _number(children[0]), str(children[1]))

    def duration(self, span: Span, children: list[Token]) -> syntax.Number:
        digits = re.match(r"[0-9]+", children[0])
        assert digits is not None
        return syntax.Number(span, _integer(digits.group()), children[0][digits.end() :])

    def address(self, span: Span, children: list[Token]) -> syntax.Address:
        return syntax.Address(span, str(children[0]))

    def string(self, span: Span, children: list[Token]) -> syntax.Text:
        return syntax.Text(span, children[0][1:-1])

    def word(self, span: Span, children: list[Token]) -> syntax.Word:
        return syntax.Word(span, str(children[0]))

    def set_name(self, span: Span, children: list[Token]) -> syntax.SetName:
        return self._set_name(children[0])

    def _set_name(self, token: Token) -> syntax.SetName:
        return syntax.SetName(self._token_span(token), str(token)[1:])

    def _text(self, token: Token) -> syntax.Text:
        return syntax.Text(self._token_span(token), token[1:-1])

    def added(self, span: Span, children: list[syntax.Value]) -> syntax.Sum:
        return syntax.Sum(span, tuple(children))

    def range(self, span: Span, children: list[Any]) -> syntax.Interval:
        return syntax.Interval(span, children[0], children[2])

    def list_of(self, span: Span, children: list[syntax.Value | None]) -> syntax.Listing:
        return syntax.Listing(span, tuple(c for c in children if c is not None))

    # Conditions.

    def field(self, span: Span, children: list[Token]) -> syntax.FieldName:
        return syntax.FieldName(span, ".".join(children))

    def comparison(self, span: Span, children: list[Any]) -> syntax.Comparison:
        field, operator, value = children
        return syntax.Comparison(span, field, str(operator), value)

    def asserted(self, span: Span, children: list[syntax.FieldName]) -> syntax.Asserted:
        return syntax.Asserted(span, children[0])

    def group(self, span: Span, children: list[syntax.Condition]) -> syntax.Condition:
        return children[0]

    def negated(self, span: Span, children: list[Any]) -> syntax.Condition:
        term: syntax.Condition = children[1]
        # `not not x` is x: written a million times, it must not nest.
        return term.term if isinstance(term, syntax.Negation) else syntax.Negation(span, term)

    def all_of(self, span: Span, children: list[syntax.Condition]) -> syntax.AllOf:
        return syntax.AllOf(span, tuple(children))

    def any_of(self, span: Span, children: list[syntax.Condition]) -> syntax.AnyOf:
        return syntax.AnyOf(span, tuple(children))

    # Statements.

    def name(self, span: Span, children: list[Token]) -> syntax.Name:
        return self._name(children[0])

    def hook(self, span: Span, children: list[Token]) -> syntax.Name:
        return syntax.Name(span, " ".join(c for c in children if c is not None))

    def at(self, span: Span, children: list[syntax.Name]) -> syntax.At:
        return syntax.At(span, tuple(children))

    def priority(self, span: Span, children: list[Any]) -> syntax.Priority:
        return syntax.Priority(span, children[1], children[0] is not None)

    def interest_line(self, span: Span, children: list[Any]) -> syntax.InterestLine:
        excluded, field, value = children
        return syntax.InterestLine(span, excluded is not None, field, value)

    def interest(self, span: Span, children: list[syntax.InterestLine]) -> syntax.Interest:
        return syntax.Interest(span, tuple(children))

    def size_option(self, span: Span, children: list[Any]) -> syntax.SizeOption:
        return syntax.SizeOption(span, str(children[0]), children[1])

    def flow(self, span: Span, children: list[Any]) -> syntax.Flow:
        key = tuple(c for c in children if isinstance(c, syntax.FieldName))
        options = tuple(c for c in children if isinstance(c, syntax.SizeOption))
        return syntax.Flow(span, children[0], key, options)

    def class_rule(self, span: Span, children: list[Any]) -> syntax.ClassRule:
        return syntax.ClassRule(span, *children)

    def classify(self, span: Span, children: list[syntax.ClassRule]) -> syntax.Classify:
        return syntax.Classify(span, tuple(children))

    def count(self, span: Span, children: list[syntax.Name]) -> syntax.Count:
        return syntax.Count(span, children[0])

    def sample(self, span: Span, children: list[Any]) -> syntax.Sample:
        one, _, many, group = children
        return syntax.Sample(span, one, many, group)

    def record(self, span: Span, children: list[Any]) -> syntax.Record:
        prefix, rate = children
        return syntax.Record(span, self._text(prefix), rate)

    def log(self, span: Span, children: list[Any]) -> syntax.Log:
        return syntax.Log(span, tuple(children))

    def action(self, span: Span, children: list[Any]) -> syntax.Action:
        verb, field, value = children
        return syntax.Action(span, (str(verb), field.text), value)

    def verdict(self, span: Span, children: list[Token]) -> syntax.Action:
        return syntax.Action(span, (str(children[0]),), None)

    def call(self, span: Span, children: list[Any]) -> syntax.Call:
        target, once = children
        return syntax.Call(span, self._text(target), once is not None)

    def encapsulate(self, span: Span, children: list[Any]) -> syntax.Encapsulate:
        return syntax.Encapsulate(span, *children)

    def into_link(self, span: Span, children: list[Any]) -> syntax.IntoLink:
        return syntax.IntoLink(span, children[0])

    def route(self, span: Span, children: list[Any]) -> syntax.Route:
        return syntax.Route(span, children[0])

    def otherwise(self, span: Span, children: list[Any]) -> tuple[Any, ...]:
        return tuple(children)

    def limit(self, span: Span, children: list[Any]) -> syntax.Limit:
        rate, burst, flow, otherwise = children
        return syntax.Limit(span, rate, burst, flow, otherwise)

    def addition(self, span: Span, children: list[Any]) -> syntax.Addition:
        field, name, duration, condition = children
        return syntax.Addition(span, field, self._set_name(name), duration, condition)

    def removal(self, span: Span, children: list[Any]) -> syntax.Removal:
        field, name, condition = children
        return syntax.Removal(span, field, self._set_name(name), condition)

    def update(self, span: Span, children: list[Any]) -> syntax.Update:
        return syntax.Update(span, tuple(children))

    def class_block(self, span: Span, children: list[Any]) -> syntax.ClassBlock:
        return syntax.ClassBlock(span, children[0], tuple(children[1:]))

    def process(self, span: Span, children: list[syntax.ClassBlock]) -> syntax.Process:
        return syntax.Process(span, tuple(children))

    def measure(self, span: Span, children: list[Any]) -> syntax.Measure:
        return syntax.Measure(span, *children)

    def law(self, span: Span, children: list[Token]) -> syntax.Name:
        return self._name(children[0])

    def law_call(self, span: Span, children: list[Token]) -> syntax.Text:
        return self._text(children[0])

    def gain(self, span: Span, children: list[Any]) -> syntax.Gain:
        name, minus, value = children
        return syntax.Gain(span, name, minus is not None, value)

    def bounds(self, span: Span, children: list[Any]) -> syntax.Bounds:
        return syntax.Bounds(span, children[0])

    def dry(self, span: Span, children: list[Any]) -> syntax.Dry:
        return syntax.Dry(span)

    def controller(self, span: Span, children: list[Any]) -> syntax.Controller:
        written, period, measure, target, law, *options = children
        field = syntax.FieldName(self._token_span(written), str(written))
        return syntax.Controller(span, field, period, measure, target, law, tuple(options))

    def timer(self, span: Span, children: list[Any]) -> syntax.Timer:
        return syntax.Timer(span, children[0], self._text(children[1]))

    def control(self, span: Span, children: list[Any]) -> syntax.Control:
        return syntax.Control(span, tuple(children))

    def run(self, span: Span, children: list[Token]) -> syntax.Run:
        return syntax.Run(span, self._name(children[0]))

    def fail(self, span: Span, children: list[Token]) -> syntax.Fail:
        return syntax.Fail(span, self._name(children[0]))

    def queue_option(self, span: Span, children: list[Any]) -> tuple[syntax.Name, Any]:
        word, value = children
        return self._name(word), value

    def queue_first(self, span: Span, children: list[Any]) -> tuple[syntax.Name, Any]:
        return syntax.Name(span, "from"), children[0]

    def queues(self, span: Span, children: list[Any]) -> syntax.Queues:
        return syntax.Queues(span, children[0], tuple(children[1:]))

    def parameter(self, span: Span, children: list[Any]) -> syntax.Parameter:
        return syntax.Parameter(span, *children)

    def parameters(self, span: Span, children: list[Any]) -> tuple[syntax.Parameter, ...]:
        return tuple(c for c in children if c is not None)

    def policy(self, span: Span, children: list[Any]) -> syntax.Policy:
        name, parameters, *statements = children
        return syntax.Policy(span, name, parameters or (), tuple(statements))

    # Files.

    def start(self, span: Span, children: list[syntax.Item]) -> tuple[syntax.Item, ...]:
        return tuple(children)

    def include(self, span: Span, children: list[Token]) -> syntax.Include:
        return syntax.Include(span, self._text(children[0]))

    def set_values(self, span: Span, children: list[Any]) -> tuple[Any, bool]:
        return children[0], False

    def set_file(self, span: Span, children: list[Token]) -> tuple[Any, bool]:
        return self._text(children[0]), True

    def set_learned(self, span: Span, children: list[Any]) -> tuple[Any, bool]:
        return tuple(children), False

    def set_declaration(self, span: Span, children: list[Any]) -> syntax.SetDeclaration:
        _, name, type, (content, from_file) = children
        return syntax.SetDeclaration(span, name, type, content, from_file)

    def argument(self, span: Span, children: list[Any]) -> syntax.Argument:
        return syntax.Argument(span, *children)

    def arguments(self, span: Span, children: list[Any]) -> tuple[syntax.Argument, ...]:
        return tuple(c for c in children if c is not None)

    def use_block(self, span: Span, children: list[Any]) -> tuple[Any, ...]:
        return tuple(children)

    def use(self, span: Span, children: list[Any]) -> syntax.Use:
        policy, arguments, instance, statements = children
        return syntax.Use(span, policy, arguments or (), instance, statements or ())

    def link_interface(self, span: Span, children: list[Any]) -> syntax.LinkInterface:
        name, ingress = children
        return syntax.LinkInterface(span, self._text(name), ingress is not None)

    def link_rate(self, span: Span, children: list[Any]) -> syntax.LinkRate:
        return syntax.LinkRate(span, children[0])

    def link_otherwise(self, span: Span, children: list[Any]) -> syntax.LinkOtherwise:
        return syntax.LinkOtherwise(span, children[0])

    def class_word(self, span: Span, children: list[Token]) -> syntax.Name:
        return self._name(children[0])

    def gain_word(self, span: Span, children: list[Token]) -> syntax.Name:
        return self._name(children[0])

    def class_setting(self, span: Span, children: list[Any]) -> syntax.ClassSetting:
        return syntax.ClassSetting(span, children[0].text, children[1])

    def class_least(self, span: Span, children: list[Any]) -> syntax.ClassSetting:
        return syntax.ClassSetting(span, "at least", children[0])

    def class_most(self, span: Span, children: list[Any]) -> syntax.ClassSetting:
        return syntax.ClassSetting(span, "at most", children[0])

    def link_class(self, span: Span, children: list[Any]) -> syntax.LinkClass:
        return syntax.LinkClass(span, children[0], tuple(children[1:]))

    def link(self, span: Span, children: list[Any]) -> syntax.Link:
        return syntax.Link(span, children[0], tuple(children[1:]))

    def overlay_self(self, span: Span, children: list[Any]) -> syntax.OverlaySelf:
        return syntax.OverlaySelf(span, *children)

    def overlay_neighbor(self, span: Span, children: list[Any]) -> syntax.OverlayNeighbor:
        return syntax.OverlayNeighbor(span, *children)

    def overlay_destination(self, span: Span, children: list[Any]) -> syntax.OverlayDestination:
        return syntax.OverlayDestination(span, *children)

    def overlay_probe(self, span: Span, children: list[Any]) -> syntax.OverlayProbe:
        every, _, timeout, lost, of = children
        return syntax.OverlayProbe(span, every, timeout, lost, of)

    def overlay_choose(self, span: Span, children: list[Any]) -> syntax.OverlayChoose:
        return syntax.OverlayChoose(span, *children)

    def overlay_key(self, span: Span, children: list[Any]) -> syntax.OverlayKey:
        return syntax.OverlayKey(span, self._text(children[0]))

    def overlay_port(self, span: Span, children: list[Any]) -> syntax.OverlayPort:
        return syntax.OverlayPort(span, *children)

    def overlay_sticky(self, span: Span, children: list[Any]) -> syntax.OverlaySticky:
        return syntax.OverlaySticky(span)

    def overlay_discover(self, span: Span, children: list[Any]) -> syntax.OverlayDiscover:
        return syntax.OverlayDiscover(span, children[-1])

    def overlay(self, span: Span, children: list[Any]) -> syntax.Overlay:
        return syntax.Overlay(span, children[0], tuple(children[1:]))

    # Packets and tests.

    def endpoint(self, span: Span, children: list[Token | None]) -> syntax.Endpoint:
        address = children[0]
        assert address is not None
        port = children[1]
        return syntax.Endpoint(
            span,
            syntax.Address(self._token_span(address), str(address)),
            None if port is None else syntax.Number(self._token_span(port), _integer(port)),
        )

    def packet_key(self, span: Span, children: list[Token]) -> str:
        return str(children[0])

    def packet_option(self, span: Span, children: list[Any]) -> syntax.PacketOption:
        name, *given = children
        value = given[0] if len(given) == 1 else syntax.Listing(span, tuple(given))
        return syntax.PacketOption(span, name, value)

    def packet(self, span: Span, children: list[Any]) -> syntax.PacketText:
        protocol, source, destination, *options = children
        return syntax.PacketText(span, self._name(protocol), source, destination, tuple(options))

    def expect_class(self, span: Span, children: list[Any]) -> syntax.Expectation:
        first, second = children
        policy, name = (first, second) if second is not None else (None, first)
        return syntax.Expectation(span, "class", policy, name)

    def expect_verdict(self, span: Span, children: list[Token]) -> syntax.Expectation:
        return syntax.Expectation(span, str(children[0]))

    def expect_field(self, span: Span, children: list[Any]) -> syntax.Expectation:
        return syntax.Expectation(span, children[0], value=children[1])

    def send(self, span: Span, children: list[Any]) -> syntax.Send:
        number, packet, *expectations = children
        count = (
            syntax.Number(span, 1)
            if number is None
            else syntax.Number(self._token_span(number), _integer(number))
        )
        return syntax.Send(span, count, packet, tuple(expectations))

    def test_policy(self, span: Span, children: list[Any]) -> syntax.TestPolicy:
        name, arguments = children
        return syntax.TestPolicy(span, name, arguments or ())

    def path(self, span: Span, children: list[Token]) -> syntax.Path:
        return syntax.Path(span, self._name(children[0]))

    def wait(self, span: Span, children: list[syntax.Value]) -> syntax.Wait:
        return syntax.Wait(span, children[0])

    def test(self, span: Span, children: list[Any]) -> syntax.Test:
        name, *lines = children
        return syntax.Test(span, self._text(name), tuple(lines))
