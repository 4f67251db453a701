"""A policy file in its one canonical form, comments kept.

The pieces of the text come out as they went in; what is decided anew is what stands
between two of them: nothing, a blank, or a line break. That depends on the two and on
the brackets around them. The author is asked in few places only: which blocks and lists
stand on one line, where long items are broken, where a line is left empty, and where
the comments are. Each answer is written down so that it is found again, hence a second
run changes nothing.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from itmlang.diagnostics import Findings
from itmlang.parser import Piece, pieces
from itmlang.source import Source

WIDTH: Final = 100
INDENT: Final = 4
# Operands further to the right are no longer aligned.
RIGHTMOST: Final = 60

# What has a line of its own in a block that is written with several lines.
_ITEMS: Final = frozenset(
    {
        "include", "set_declaration", "policy", "use", "test",
        "at", "priority", "interest", "flow", "classify", "log", "process", "update", "run", "fail",
        "queues", "call", "encapsulate", "into_link", "control", "controller", "timer",
        "overlay", "overlay_self", "overlay_neighbor", "overlay_destination", "overlay_probe",
        "overlay_choose", "overlay_key", "overlay_port", "overlay_sticky", "overlay_discover", "route",
        "link", "link_interface", "link_rate", "link_otherwise", "link_class",
        "class_setting", "class_least", "class_most",
        "interest_line", "class_rule", "count", "sample", "record", "class_block", "action",
        "verdict", "limit", "addition", "removal", "test_policy", "path", "wait", "send",
    }
)  # fmt: skip
_LISTS: Final = frozenset({"list_of", "parameters", "arguments"})
_NEVER_ON_ONE_LINE: Final = frozenset({"policy", "test", "link", "overlay"})
# Before these, and behind a comma, the author may break an item.
_BREAKABLE: Final = frozenset(
    {"_AND", "_OR", "_WHEN", "_FOR", "_EXPECT", "_TOWARD", "_WITH", "_WITHIN", "TIMEOUT", "MAX"}
)
_OPERATORS: Final = frozenset({"_AND", "_OR"})
_LITERALS: Final = frozenset({"NUMBER", "DECIMAL", "DURATION", "ADDRESS4", "ADDRESS6", "STRING"})


@dataclass(frozen=True)
class _Gap:
    """What stood before a piece. `above` has the comments on lines of their own."""

    broken: bool
    behind: str  # the comment at the end of the line before
    above: tuple[tuple[bool, str], ...]  # each with whether an empty line was before it
    empty_line: bool  # the last thing before the piece


@dataclass(frozen=True)
class _Bracket:
    """An open block or list. `inside` and `outside` are the columns of its items and its end."""

    broken: bool
    inside: int
    outside: int


@dataclass
class _Line:
    indent: int
    text: str = ""
    comment: str = ""
    first: int = -1  # the piece it begins with
    anchor: int = 0  # where blanks go in to align it with its neighbours, 0 for nowhere

    @property
    def end(self) -> int:
        return self.indent + len(self.text)


def layout(source: Source) -> str:
    """The text in canonical form. Raises `CompileError` if it cannot be parsed."""
    findings = Findings()
    found = tuple(pieces(source, findings))
    findings.raise_errors()
    lines = _Printer(source.text, found).lines()
    _align(lines)
    return "".join(_text(line) for line in lines)


def _text(line: _Line) -> str:
    comment = f"  {line.comment}" if line.comment else ""
    return " " * line.indent + line.text + comment + "\n"


def _gap(text: str, first: bool) -> _Gap:
    parts = re.split(r"(#[^\n]*)", text)
    empty_lines = [blank.count("\n") > 1 for blank in parts[::2]]
    comments = [comment.rstrip() for comment in parts[1::2]]
    behind = ""
    if comments and not first and "\n" not in parts[0]:
        behind = comments.pop(0)
        del empty_lines[0]
    above = tuple(zip(empty_lines, comments, strict=False))
    return _Gap("\n" in text, behind, above, empty_lines[-1])


class _Printer:
    """Puts one piece after the other; holds the lines so far and the brackets open now."""

    def __init__(self, text: str, found: tuple[Piece, ...]) -> None:
        self._pieces = found
        starts = [piece.start for piece in found] + [len(text)]
        ends = [0] + [piece.end for piece in found]
        self._gaps = [
            _gap(text[end:start], first=end == 0) for end, start in zip(ends, starts, strict=True)
        ]
        self._text = text
        self._closing = _closing(found)
        self._lines: list[_Line] = []
        self._open = [_Bracket(broken=True, inside=0, outside=0)]
        self._operands: list[int] = []  # columns of the condition and of each group in it

    def lines(self) -> list[_Line]:
        ends = set(self._closing.values())
        for index, piece in enumerate(self._pieces):
            closed = self._open.pop() if index in ends else None
            if piece.rule == "group" and piece.text == ")":
                self._operands.pop()
            if self._breaks(index, closed):
                self._break(index, closed)
                self._lines.append(_Line(self._indent(index, closed), piece.text, first=index))
            else:
                self._lines[-1].text += self._between(index) + piece.text
            self._remember(index)
        self._comments(len(self._pieces), 0)
        return self._lines

    def _remember(self, index: int) -> None:
        """What later lines need to know of a piece that has been put."""
        piece, line = self._pieces[index], self._lines[-1]
        column = line.end - len(piece.text)
        before = self._pieces[index - 1] if index else piece
        if before.kind == "_WHEN":
            self._operands = [column]
        elif before.rule == "group" and before.text == "(":
            self._operands.append(column)
        if index in self._closing:
            broken = self._broken(index)
            self._open.append(_Bracket(broken, line.indent + INDENT, line.indent))
            begin = index - (2 if piece.rule == "link_class" else 1)
            if piece.rule in ("class_block", "link_class") and line.first == begin and not broken:
                line.anchor = column - line.indent
        if piece.kind == "_EXPECT" and "send" in self._pieces[line.first].begins:
            line.anchor = column - line.indent

    def _broken(self, start: int) -> bool:
        """Does the block or list that was just opened go on for several lines?"""
        piece, end = self._pieces[start], self._closing[start]
        if end == start + 1:
            return bool(self._gaps[end].behind or self._gaps[end].above)
        if "\n" in self._text[piece.end : self._pieces[end].start]:
            return True
        if piece.rule in _LISTS or piece.rule in _NEVER_ON_ONE_LINE:
            return piece.rule in _NEVER_ON_ONE_LINE
        column = self._lines[-1].end
        for index in range(start + 1, end + 1):
            column += len(self._between(index)) + len(self._pieces[index].text)
            if column > WIDTH:
                return True
        return False

    def _breaks(self, index: int, closed: _Bracket | None) -> bool:
        """Does this piece begin a line?"""
        piece, gap, inner = self._pieces[index], self._gaps[index], self._open[-1]
        if index == 0 or gap.behind or gap.above:
            return True
        if closed:
            return closed.broken
        if index - 1 in self._closing or not _ITEMS.isdisjoint(piece.begins):
            return inner.broken
        if piece.kind in _OPERATORS:
            return gap.broken or self._gaps[index + 1].broken
        return gap.broken and (self._pieces[index - 1].text == "," or piece.kind in _BREAKABLE)

    def _indent(self, index: int, closed: _Bracket | None) -> int:
        """The column of a piece that begins a line."""
        piece, inner = self._pieces[index], self._open[-1]
        if closed:
            return closed.outside
        if index == 0 or index - 1 in self._closing or not _ITEMS.isdisjoint(piece.begins):
            return inner.inside
        before = self._pieces[index - 1]
        if before.text == "," and before.rule in _LISTS:
            return inner.inside
        if piece.kind in _OPERATORS:
            # The operand behind it stands below the one before it.
            operator = min(self._operands[-1], RIGHTMOST) - len(piece.text) - 1
            return max(operator, inner.inside + INDENT // 2)
        return inner.inside + INDENT

    def _break(self, index: int, closed: _Bracket | None) -> None:
        """End the line: comments, and the empty line that the author left."""
        began = self._comments(index, closed.inside if closed else self._indent(index, closed))
        if self._gaps[index].empty_line and began and not closed:
            self._lines.append(_Line(0))

    def _comments(self, index: int, indent: int) -> bool:
        """Put the comments before a piece; False as long as nothing is in its block before it."""
        gap = self._gaps[index]
        if gap.behind:
            self._lines[-1].comment = gap.behind
        began = index > 0 and index - 1 not in self._closing
        for empty_line, comment in gap.above:
            if empty_line and began:
                self._lines.append(_Line(0))
            self._lines.append(_Line(indent, comment))
            began = True
        return began

    def _between(self, index: int) -> str:
        """The blanks before a piece that stands behind another one on its line."""
        before, piece = self._pieces[index - 1], self._pieces[index]
        if not _ITEMS.isdisjoint(piece.begins):
            return " " if before.text == "{" else "  "
        together = (
            piece.text in (",", ")", "]", ".")
            or before.text in ("(", "[", ".")
            or (piece.text == "(" and piece.rule in _LISTS)
            or (piece.kind == "UNIT" and piece.text == "%")
            or (piece.kind == "RATE" and piece.text.startswith("/"))
            # `fd00::1 :80` has a port, `fd00::1:80` has none.
            or (piece.text == ":" and before.kind != "ADDRESS6")
            or (before.text == ":" and before.rule == "endpoint")
            or (before.text == "-" and before.rule in ("priority", "gain"))
            # `to-` is a name like any other, `to -` is not.
            or (piece.text == "-" and before.kind == "WORD" and before.end == piece.start)
            or (piece.text == "-" and self._short_range(index))
            or (before.text == "-" and self._short_range(index - 1))
        )
        return "" if together else " "

    def _short_range(self, minus: int) -> bool:
        """A range of two literals, `1-1023`. Elsewhere `a-b` would be one word."""
        around = self._pieces[minus - 1], self._pieces[minus + 1]
        beyond = (self._pieces[i].text for i in (minus - 2, minus + 2) if i < len(self._pieces))
        return (
            self._pieces[minus].rule == "range"
            and all(piece.kind in _LITERALS for piece in around)
            and "+" not in beyond
        )


def _closing(found: tuple[Piece, ...]) -> dict[int, int]:
    """The pieces that open a block or list, each with the one that closes it."""
    closing, stack = {}, []
    for index, piece in enumerate(found):
        if piece.text == "{" or (piece.text == "(" and piece.rule in _LISTS):
            stack.append(index)
        elif piece.text == "}" or (piece.text == ")" and piece.rule in _LISTS):
            closing[stack.pop()] = index
    return closing


def _align(lines: Iterable[_Line]) -> None:
    """Below each other: the blocks of classes, what packets expect, comments behind lines."""
    for anchored, run in groupby(lines, key=lambda line: (line.indent, line.anchor > 0)):
        if anchored[1]:
            _pad(list(run))
    for commented, run in groupby(lines, key=lambda line: (line.indent, bool(line.comment))):
        group = list(run)
        column = max(line.end for line in group)
        if commented[1] and column <= WIDTH:
            for line in group:
                line.text += " " * (column - line.end)


def _pad(run: list[_Line]) -> None:
    """Align what stands at the anchors, if it still fits."""
    column = max(line.anchor for line in run)
    if all(line.end + column - line.anchor <= WIDTH for line in run):
        for line in run:
            blanks = " " * (column - line.anchor)
            line.text = line.text[: line.anchor] + blanks + line.text[line.anchor :]
