"""The grammar's tables, and the loop that runs them.

Lark makes the tables: which words each state of the LALR parser takes, and what follows.
Its own loop makes a tree with every node's place in it, and ours is made of that; for a
large policy that is most of the time to compile it. The loop here makes our nodes at
once. It knows nothing of errors: where a word does not fit, Lark parses the text again
and says what is wrong.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from lark import Lark, Token
from lark.grammar import Rule, Terminal
from lark.lexer import BasicLexer, ContextualLexer
from lark.utils import TextSlice

from itmlang.resources import resource
from itmlang.source import Source, Span

_END: Final = "$END"


@dataclass(frozen=True, slots=True)
class _Rule:
    """A rule whose `size` parts are complete.

    `of` are the indexes of the parts that count, -1 for one in brackets that is not there;
    a part in `spread` is a list of parts. Without a name the rule makes such a list; `plain`
    is one of a single part that stands for itself, and `all` says that all parts count.
    """

    origin: str
    size: int
    name: str
    of: tuple[int, ...]
    spread: frozenset[int]
    plain: bool
    all: bool


def _rule(rule: Rule) -> _Rule:
    """A rule of Lark's, shaped as Lark shapes its trees."""
    options, alone = rule.options, rule.options.expand1 and not rule.alias
    assert not alone or len(rule.expansion) == 1, f"{rule} needs a name for its node"
    of: list[int] = []
    index = 0
    for absent in options.empty_indices or [False] * len(rule.expansion):
        if absent:
            of.append(-1)
            continue
        symbol = rule.expansion[index]
        if options.keep_all_tokens or not (isinstance(symbol, Terminal) and symbol.filter_out):
            of.append(index)
        index += 1
    lists = (i for i, s in enumerate(rule.expansion) if not s.is_term and s.name[0] == "_")
    name = rule.alias or rule.origin.name
    return _Rule(
        origin=str(rule.origin.name),
        size=len(rule.expansion),
        name="" if name.startswith("_") else str(name),
        of=tuple(of),
        spread=frozenset(lists),
        plain=alone,
        all=of == [*range(len(rule.expansion))],
    )


@dataclass(frozen=True, slots=True, eq=False)
class _State:
    """A state of the parser: finds the next word, and tells what follows for each symbol.

    That is another state, or a rule that is complete.
    """

    match: Callable[[TextSlice[str], int], tuple[str, str] | None]
    then: dict[str, Any]


class Grammar:
    """The parser for one start rule of the grammar; a keyword of one is a name in the others."""

    def __init__(self, start: str) -> None:
        self.lark = read(start)
        parser = self.lark.parse_interactive("")
        lexer, tables = parser.lexer_thread.lexer, parser.parser_state.parse_conf
        assert isinstance(lexer, ContextualLexer)
        rules = {rule: _rule(rule) for rule in self.lark.rules}
        words = {n: one for n, one in lexer.lexers.items() if isinstance(one, BasicLexer)}
        states = {number: _State(words[number].match, {}) for number in tables.states}
        for number, row in tables.states.items():
            states[number].then.update(
                (str(symbol), rules[then] if isinstance(then, Rule) else states[then])
                for symbol, (_, then) in row.items()
            )
        self._first, self._last = states[tables.start_state], states[tables.end_state]
        self._names = {rule.name for rule in rules.values() if rule.name and not rule.plain}
        ignored = [t for t in self.lark.terminals if t.name in self.lark.ignore_tokens]
        self._blank = re.compile(f"(?:{'|'.join(t.pattern.to_regexp() for t in ignored)})*")

    def parse(self, source: Source, start: int, end: int, nodes: object) -> Any:
        """What `nodes` makes of a piece of the text.

        `nodes` has a method for each rule, which gets the rule's span and its parts: tokens,
        and what the methods returned. Raises `lark.UnexpectedInput` if the text does not fit.
        """
        text, piece = source.text, TextSlice(source.text, start, end)
        blank = self._blank.match
        make = {name: getattr(nodes, name) for name in self._names}
        states = [self._first]
        parts: list[Any] = []
        begins: list[int] = []  # of each part
        at = behind = start  # of the next word, behind the last one
        while True:
            at = blank(text, at, end).end()  # type: ignore[union-attr]
            found = states[-1].match(piece, at) if at < end else ("", _END)
            if found is None:
                break
            word, kind = found
            then = states[-1].then.get(kind)
            while isinstance(then, _Rule):
                if then.plain:
                    states[-1] = states[-2].then[then.origin]
                else:
                    first = len(parts) - then.size
                    begin = begins[first] if then.size else behind
                    made: Any = _counting(then, parts[first:])
                    if then.name:
                        made = make[then.name](Span(source, begin, behind), made)
                    del parts[first:], begins[first:], states[first + 1 :]
                    parts.append(made)
                    begins.append(begin)
                    states.append(states[-1].then[then.origin])
                if states[-1] is self._last:
                    return parts[0]
                then = states[-1].then.get(kind)
            if then is None:
                break
            states.append(then)
            parts.append(Token(kind, word, at))
            begins.append(at)
            at = behind = at + len(word)
        wrong = self.lark.parse_interactive(piece)
        wrong.parser_state.parse_conf.callbacks = {}  # no tree is wanted
        wrong.resume_parse()  # type: ignore[no-untyped-call]
        raise AssertionError("Lark takes what the loop does not")


def _counting(rule: _Rule, parts: list[Any]) -> list[Any]:
    """Those of a rule's parts that count; what is repeated is not copied each time."""
    if not rule.spread:
        return parts if rule.all else [parts[i] if i >= 0 else None for i in rule.of]
    found: list[Any] = []
    for index in rule.of:
        if index in rule.spread:
            found = found + parts[index] if found else parts[index]
        else:
            found.append(parts[index] if index >= 0 else None)
    return found


def read(start: str, *, every_token: bool = False) -> Lark:
    """The grammar as Lark has it; with `every_token` its trees keep all signs and keywords."""
    return Lark(
        resource("grammar", "itm.lark").read_text(encoding="utf-8"),
        parser="lalr",
        start=start,
        maybe_placeholders=not every_token,
        keep_all_tokens=every_token,
    )
