"""The loop over the grammar's tables makes what Lark's trees say: the same nodes, parts and places."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lark import Lark, Token, Tree, UnexpectedInput

from itmlang.grammar import Grammar
from itmlang.resources import resource
from itmlang.source import Source, Span
from tests.support.cases import cases
from tests.test_parser import OTHERS

ROOT = Path(__file__).parents[1]
TEXTS = [
    *OTHERS,
    "",
    "policy p { at forward classify { c when not ((a == 1) or (b == { 1, 2-3, })) and (c) } }",
    *(path.read_text() for path in sorted(ROOT.glob("policies/*.itm"))),
    *(path.read_text() for path in sorted(ROOT.glob("tests/errors/*.itm"))),
    *(case.policy for case in cases()),
]


class Nodes:
    """Makes each node a tuple of its rule, its place and its parts."""

    def __getattr__(self, rule: str) -> Callable[[Span, list[Any]], object]:
        return lambda span, parts: (rule, parts and (span.start, span.end), tuple(parts))


def as_tuples(part: Any) -> Any:
    if not isinstance(part, Tree):
        return part
    parts = tuple(map(as_tuples, part.children))
    place = parts and (part.meta.start_pos, part.meta.end_pos)
    return str(part.data), place or [], parts


@pytest.mark.parametrize("start", ["start", "test"])
def test_the_loop_makes_what_lark_says(start: str) -> None:
    grammar = Grammar(start)
    text = resource("grammar", "itm.lark").read_text()
    lark = Lark(text, parser="lalr", start=start, propagate_positions=True, maybe_placeholders=True)
    fitting = 0
    for text in TEXTS:
        source = Source("text.itm", text)
        try:
            tree = lark.parse(text)
        except UnexpectedInput as error:
            with pytest.raises(type(error)) as found:
                grammar.parse(source, 0, len(text), Nodes())
            assert found.value.pos_in_stream == error.pos_in_stream
        else:
            assert grammar.parse(source, 0, len(text), Nodes()) == as_tuples(tree)
            fitting += 1
    assert fitting >= (100 if start == "start" else 1)


def test_tokens_have_their_places() -> None:
    text = 'policy p {\n at forward log { record "x" } }'
    found: list[Token] = []

    class Tokens(Nodes):
        def record(self, span: Span, parts: list[Any]) -> None:
            found.append(parts[0])

    Grammar("start").parse(Source("text.itm", text), 0, len(text), Tokens())
    assert [(one, one.start_pos, one.type) for one in found] == [('"x"', text.index('"'), "STRING")]
