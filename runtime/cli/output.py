"""What goes to the terminal: diagnostics and messages to stderr, tables and JSON to stdout."""

import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from itmlang.diagnostics import Diagnostic, render

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


_NUMBER: Final = re.compile(r"[\d,]+(\.\d+)?( [a-z/]+|%)?")


def show(diagnostics: Iterable[Diagnostic]) -> None:
    """Diagnostics to stderr, in the order of the file, coloured on a terminal."""

    def place(diagnostic: Diagnostic) -> tuple[str, int]:
        span = diagnostic.span
        return (span.source.name, span.start) if span is not None else ("", -1)

    for diagnostic in sorted(diagnostics, key=place):
        text = render(diagnostic)
        colour = "red" if diagnostic.is_error else "yellow"
        for word in ("error[", "warning["):
            text = text.replace(f": {word}", f": {_style(word, colour)}", 1)
        _to_stderr(text)


def warn(message: str, help: str = "") -> None:
    """One message to stderr, with what to do."""
    _to_stderr(f"itmc: {message}" + (f"\n      = help: {help}" if help else ""))


def say(message: str, colour: str = "") -> None:
    """One line to stdout, coloured on a terminal."""
    text = _printable(message)
    if colour and sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        text = click.style(text, fg=colour)
    click.echo(text)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Aligned columns to stdout; numbers stand right."""
    console().print(laid_out(head, rows))


def laid_out(head: Sequence[str], rows: Iterable[Sequence[object]]) -> "Table":
    """The table; numbers, with their unit, stand right, and so does "-" for a missing one."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    cells = [[str(cell) for cell in row] for row in rows]
    for index, title in enumerate(head):
        column = [row[index] for row in cells if row[index] != "-"]
        numbers = column and all(map(_NUMBER.fullmatch, column))
        made.add_column(title, justify="right" if numbers else "left", overflow="fold")
    for row in cells:
        made.add_row(*row)
    return made


def console() -> "Console":
    """Stdout, for what rich prints."""
    from rich.console import Console

    # Nobody's terminal: then nothing is cut to a width, nor coloured.
    terminal = sys.stdout.isatty()
    return Console(
        width=None if terminal else 500, force_terminal=terminal, highlight=False, markup=False,
        no_color="NO_COLOR" in os.environ, emoji=False,
    )  # fmt: skip


def as_json(value: Any) -> None:
    """A value to stdout as JSON."""
    click.echo(json.dumps(value, indent=2))


def _to_stderr(text: str) -> None:
    click.echo(_printable(text), err=True)


def _printable(text: str) -> str:
    # A lone surrogate (a file name that is no UTF-8) must not end in a traceback.
    return text.encode("utf-8", "replace").decode()


def _style(text: str, colour: str) -> str:
    if "NO_COLOR" in os.environ or not sys.stderr.isatty():
        return text
    return click.style(text, fg=colour, bold=True)
