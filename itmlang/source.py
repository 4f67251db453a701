"""Source text and positions in it.

A `Source` is one policy file as it was read; a `Span` is a piece of one.
Every later stage carries spans, so that any finding, the kernel's included,
can be shown at the policy's own line. A `Reader` gets the path of another file as
a source names it, and gives that source or says why not.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True, eq=False)
class Source:
    """One policy text. `name` is the path as the user gave it, `-` for standard input."""

    name: str
    text: str = field(repr=False)

    @cached_property
    def line_starts(self) -> tuple[int, ...]:
        starts = [0]
        position = self.text.find("\n")
        while position >= 0:
            starts.append(position + 1)
            position = self.text.find("\n", position + 1)
        return tuple(starts)

    def position(self, offset: int) -> tuple[int, int]:
        """The line and the column of an offset, both counted from 1."""
        index = bisect_right(self.line_starts, offset) - 1
        return index + 1, offset - self.line_starts[index] + 1

    def line(self, number: int, most: int | None = None) -> str:
        """The text of a line (counted from 1), without its end; `most` characters of it."""
        start = self.line_starts[number - 1]
        end = self.line_starts[number] if number < len(self.line_starts) else len(self.text)
        if most is not None:
            end = min(end, start + most)
        return self.text[start:end].rstrip("\r\n")


@dataclass(frozen=True)
class Span:
    """The characters `start` to `end` (exclusive) of a source."""

    source: Source
    start: int
    end: int

    @property
    def line(self) -> int:
        return self.source.position(self.start)[0]

    @property
    def column(self) -> int:
        return self.source.position(self.start)[1]

    @property
    def text(self) -> str:
        return self.source.text[self.start : self.end]

    def contains(self, other: "Span") -> bool:
        return self.source is other.source and self.start <= other.start and other.end <= self.end

    def to(self, other: "Span") -> "Span":
        """The span from the start of this one to the end of the other."""
        return Span(self.source, self.start, max(self.end, other.end))

    def __str__(self) -> str:
        return f"{self.source.name}:{self.line}"


class UnreadableError(Exception):
    """A file that another one names cannot be read; the message says why."""


# (path as written, the source it stands in, whether the policy library is searched, too)
# -> the file; the same file gives the same object. Raises `UnreadableError`.
Reader = Callable[[str, Source, bool], Source]


def no_files(path: str, source: Source, library: bool) -> Source:
    """A reader for texts that have no files around them."""
    raise UnreadableError("there are no files here")
