"""Policy files: which one is meant, and reading it in bounded time and memory."""

import os
import stat
import sys
from pathlib import Path
from typing import BinaryIO, Final

import click

from itmlang.diagnostics import CompileError, Diagnostic
from itmlang.pipeline import Compiled, compile
from itmlang.source import Source, Span
from runtime.cli.output import show
from runtime.errors import UsageError

LARGEST_FILE: Final = 8 * 2**20

file_argument = click.argument("file", required=False, type=click.Path())


def read(name: str | None) -> Source:
    """The text of a policy file.

    Raises `UsageError` if there is none or it cannot be read, `CompileError` if what
    it holds is no text, too large or nothing at all.
    """
    name = name or _default()
    raw = _bytes(name)
    source = Source(name, "")
    if len(raw) > LARGEST_FILE:
        raise _wrong(source, "E006", f"the file is larger than {LARGEST_FILE >> 20} MiB")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _wrong(source, "E005", f"this is no text: byte {error.start} is no UTF-8") from error
    if "\0" in text:
        raise _wrong(source, "E005", f"this is no text: byte {raw.index(0)} is zero")
    # A byte order mark is no part of the text; neither are other systems' line ends.
    return Source(name, text.removeprefix("\ufeff").replace("\r\n", "\n"))


def compiled(name: str | None) -> Compiled:
    """A policy file through all passes; its warnings go to stderr."""
    result = compile(read(name))
    show(result.warnings)
    return result


def _default() -> str:
    if Path("site.itm").exists():
        return "site.itm"
    found = sorted(p.name for p in Path().glob("[!.]*.itm") if p.is_file())
    if len(found) == 1:
        return found[0]
    what = "there is no *.itm here" if not found else f"there are {len(found)} *.itm files here"
    raise UsageError(f"which policy file? {what}", "name one, or call yours site.itm")


def _bytes(name: str) -> bytes:
    if name == "-":
        return _some(sys.stdin.buffer)
    try:
        # Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"{name}: {reason}", "give the path of a policy file") from error
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise UsageError(f"{name}: this is {kind}", "give the path of a policy file")
    with os.fdopen(descriptor, "rb") as file:
        os.set_blocking(descriptor, True)
        try:
            return _some(file)
        except OSError as error:
            raise UsageError(f"{name}: {error.strerror}") from error


def _some(file: BinaryIO) -> bytes:
    """What there is to read, but no more than shows that it is too much."""
    return file.read(LARGEST_FILE + 1)


def _wrong(source: Source, code: str, message: str) -> CompileError:
    return CompileError([Diagnostic(code, message, Span(source, 0, 0))])
