"""What is said about a policy: errors and warnings, each at its place.

A pass collects all it can find in a `Findings` and raises `CompileError` once,
at its end. Nothing in the compiler prints; `render` gives the text of one
diagnostic and the command line decides where it goes.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

from itmlang.source import Span

# Past this many errors the rest says nothing new.
MOST_ERRORS = 50
# Wider lines (generated, or not text at all) are shown in part.
WIDEST_LINE = 160
# No message needs more; what is longer quotes something absurd.
LONGEST_MESSAGE = 400
# Nothing that we know is called so long.
LONGEST_GUESS = 100


@dataclass(frozen=True)
class Diagnostic:
    """One finding. `code` is stable (`E…` error, `W…` warning); `help` says what to do."""

    code: str
    message: str
    span: Span | None = None
    notes: tuple[tuple[str, Span | None], ...] = ()
    help: str = ""
    place: str = ""  # shown instead of the span's place when there is no span

    @property
    def is_error(self) -> bool:
        return self.code.startswith("E")


class CompileError(Exception):
    """The policy is wrong; `diagnostics` holds at least one error, warnings too."""

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        self.diagnostics = tuple(diagnostics)
        super().__init__("; ".join(d.message for d in self.diagnostics))


@dataclass
class Findings:
    """The diagnostics of one compilation, in the order they were found."""

    _found: dict[tuple[str, str, Span | None], Diagnostic] = field(default_factory=dict)
    _errors: int = 0
    _reason: tuple[str, Span] | None = None

    @property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        return tuple(self._found.values())

    @contextmanager
    def because(self, text: str, span: Span) -> Iterator[None]:
        """Errors that are found inside, but not within the span, get this note."""
        self._reason = text, span
        try:
            yield
        finally:
            self._reason = None

    def error(
        self,
        code: str,
        message: str,
        span: Span | None = None,
        *,
        notes: tuple[tuple[str, Span | None], ...] = (),
        help: str = "",
    ) -> None:
        self.add(Diagnostic(code, message, span, notes, help))

    # A warning is made exactly like an error; its code tells them apart.
    warning = error

    def add(self, diagnostic: Diagnostic) -> None:
        """Record a finding; the same one at the same place is said once."""
        key = diagnostic.code, diagnostic.message, diagnostic.span
        if key in self._found:
            return
        if self._reason is not None and diagnostic.is_error:
            within, span = self._reason[1], diagnostic.span
            if span is not None and not within.contains(span):
                diagnostic = replace(diagnostic, notes=(*diagnostic.notes, self._reason))
        self._found[key] = diagnostic
        self._errors += diagnostic.is_error
        if self._errors >= MOST_ERRORS:
            note = Diagnostic("E099", f"stopped after {MOST_ERRORS} errors", diagnostic.span)
            raise CompileError([*self.diagnostics, note])

    @property
    def failed(self) -> bool:
        return self._errors > 0

    def raise_errors(self) -> None:
        """Raise `CompileError` if an error was found."""
        if self.failed:
            raise CompileError(self.diagnostics)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A help line with the nearest known name, or the known names if they are few."""
    names = sorted(set(known))
    if len(name) > LONGEST_GUESS:
        return ""
    near = get_close_matches(name, names, n=1, cutoff=0.6)
    near = near or get_close_matches(name.lower(), names, n=1, cutoff=0.6)
    if near:
        return f"did you mean `{near[0]}`?"
    if names and len(names) <= 12:
        return "known here: " + ", ".join(names)
    return ""


def _shown(text: str) -> str:
    """A source line made safe for a terminal: tabs are blanks, the rest of C0 is `?`."""
    text = text.replace("\t", " ")
    return "".join(c if c.isprintable() else "?" for c in text)


def _excerpt(span: Span) -> list[str]:
    line = span.source.line(span.line)
    start = span.column - 1
    width = max(1, min(span.end - span.start, len(line) - start))
    cut = max(0, start - WIDEST_LINE // 2) if len(line) > WIDEST_LINE else 0
    shown = _shown(line[cut : cut + WIDEST_LINE])
    marks = " " * (start - cut) + "^" * max(1, min(width, WIDEST_LINE - (start - cut)))
    gutter = f"{span.line:>5} | "
    return [gutter + shown, " " * (len(gutter) - 2) + "| " + marks]


def render(diagnostic: Diagnostic) -> str:
    """The text of a diagnostic: `FILE:LINE:COL: error[E012]: message`, the line, notes, help."""
    kind = "error" if diagnostic.is_error else "warning"
    span = diagnostic.span
    message = _shown(diagnostic.message)
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[: LONGEST_MESSAGE // 2]} … {message[-LONGEST_MESSAGE // 4 :]}"
    place = f"{span.source.name}:{span.line}:{span.column}" if span else diagnostic.place
    lines = [f"{place}: {kind}[{diagnostic.code}]: {message}".removeprefix(": ")]
    if span is not None:
        lines += _excerpt(span)
    for text, where in diagnostic.notes:
        lines.append(f"      = note: {text}" + (f" ({where})" if where else ""))
    if diagnostic.help:
        lines.append(f"      = help: {diagnostic.help}")
    return "\n".join(lines)
