"""Files: which policy is meant, reading it in bounded time and memory, writing all or nothing."""

import gc
import json
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

import click

from itmlang.capabilities import EVERYTHING, Capabilities, CapabilitiesError, from_json
from itmlang.diagnostics import CompileError, Diagnostic
from itmlang.resources import resource
from itmlang.source import Reader, Source, Span, UnreadableError
from runtime.cli.output import show
from runtime.errors import UsageError
from runtime.state import State
from runtime.units import Recorder, Unit, renamed, still_holds, unit_of

if TYPE_CHECKING:  # the compiler is imported when it is needed: an unchanged file needs none
    from itmlang.pipeline import Compiled

LARGEST_FILE: Final = 8 * 2**20

file_argument = click.argument("file", required=False, type=click.Path())
machine_option = click.option(
    "--for", "machine", type=click.Path(), metavar="BOX.JSON",
    help="For the machine whose `itmc doctor --json` this is: errors where it lacks something.",
)  # fmt: skip
optimise_option = click.option(
    "--optimize/--no-optimize", "optimise", default=True,
    help="Have the kernel look classes up, or ask one after the other (to compare: both mean the same).",
)  # fmt: skip


def reader() -> Reader:
    """A reader of the files that policies name: beside them, then in the policy library."""
    known: dict[str, Source] = {}

    def read_other(path: str, by: Source, library: bool) -> Source:
        beside = Path() if by.name == "-" else Path(by.name).parent
        places = [beside / path, *([resource("policies", path)] if library else [])]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise UnreadableError("there is no such file" if not places[0].exists()
                                  else "this is no regular file")  # fmt: skip
        key = os.path.realpath(found)
        if by.name != "-":
            known.setdefault(os.path.realpath(by.name), by)
        if key not in known:
            try:
                known[key] = read(str(found))
            except UsageError as error:
                raise UnreadableError(error.message) from error
        return known[key]

    return read_other


def read(name: str | None) -> Source:
    """The text of a policy file.

    Raises `UsageError` if there is none or it cannot be read, `CompileError` if what
    it holds is no text, too large or nothing at all.
    """
    name = name or default()
    return decoded(name, contents(name))


def decoded(name: str, raw: bytes) -> Source:
    """What a policy file holds, as text. Raises `CompileError` as `read` does."""
    if len(raw) > LARGEST_FILE:
        message = f"the file is larger than {LARGEST_FILE >> 20} MiB"
        raise CompileError([Diagnostic("E006", message, place=name)])
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _no_text(name, raw, error.start, "is no UTF-8") from error
    if "\0" in text:
        raise _no_text(name, raw, raw.index(0), "is zero")
    # A byte order mark is no part of the text; neither are other systems' line ends.
    return Source(name, text.removeprefix("\ufeff").replace("\r\n", "\n"))


def unit(name: str | None, known: State, optimise: bool = True) -> Unit:
    """A policy file as it is to be loaded; its warnings go to stderr.

    What was loaded from it already is taken as it is, if nothing changed that it was
    made from.
    """
    source, recorder = read(name), Recorder(reader())
    key = file_key(source.name)
    loaded = known.unit(key)
    if loaded is not None and still_holds(loaded, source, reader(), optimise):
        return loaded
    from itmlang.dispatch import OPTIMISATIONS
    from itmlang.pipeline import compile

    passes = OPTIMISATIONS if optimise else ()
    result = compile(source, recorder, optimisations=passes)
    if any(table.tunnels for table in result.ruleset.tables):
        from runtime.capabilities import without_tunnels  # 0.2 s that most policies need not

        machine = without_tunnels(result.ruleset)
        if machine is not None:
            recorder = Recorder(reader())
            result = compile(source, recorder, machine, optimisations=passes)
    gc.freeze()  # it stays as long as the process: no need to look through it
    show(result.warnings)
    made = unit_of(result, key, recorder.reads)
    if loaded is not None and loaded.shown != made.shown:
        return renamed(made, loaded)
    return made


def file_key(name: str) -> str:
    """What identifies a policy file: its absolute path, `-` for standard input."""
    return name if name == "-" else str(Path(name).resolve())


def compiled(
    name: str | None,
    capabilities: Capabilities = EVERYTHING,
    queue: str = "",
    optimise: bool = True,
) -> "Compiled":
    """A policy file through all passes; its warnings go to stderr."""
    from itmlang.dispatch import OPTIMISATIONS
    from itmlang.pipeline import compile

    passes = OPTIMISATIONS if optimise else ()
    result = compile(read(name), reader(), capabilities, queue=queue, optimisations=passes)
    gc.freeze()  # it stays as long as the process: no need to look through it
    show(result.warnings)
    return result


def capabilities(name: str | None) -> Capabilities:
    """The capabilities in a file (`-` for standard input), everything if there is none.

    Raises `UsageError` for a file that is no such thing.
    """
    if name is None:
        return EVERYTHING
    help = "make it on that machine: `itmc doctor --json > box.json`"
    try:
        return from_json(json.loads(contents(name)))
    except UsageError as error:
        raise UsageError(error.message, help) from error
    except CapabilitiesError as error:
        raise UsageError(f"{name} tells of no machine: {error}", help) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} is no JSON", help) from error


def write(path: Path, text: str) -> None:
    """The whole file or nothing: a reader never sees half of it.

    What is no regular file (a device, a pipe) is written to, never replaced.
    """
    try:
        target = path.resolve()
        if target.exists() and not target.is_file():
            target.write_text(text, encoding="utf-8")
            return
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
        descriptor, beside = tempfile.mkstemp(prefix=".itm", dir=target.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(beside, mode)
            os.replace(beside, target)
        except BaseException:
            os.unlink(beside)
            raise
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


def default() -> str:
    """The policy file that is meant when none is named."""
    if Path("site.itm").exists():
        return "site.itm"
    found = sorted(p.name for p in Path().glob("[!.]*.itm") if p.is_file())
    if len(found) == 1:
        return found[0]
    what = "there is no *.itm here" if not found else f"there are {len(found)} *.itm files here"
    raise UsageError(f"which policy file? {what}", "name one, or call yours site.itm")


def contents(name: str) -> bytes:
    """What a file holds, or the beginning of what is too much; `-` is standard input."""
    if name == "-":
        if sys.stdin is None:
            raise UsageError("standard input is closed", "name a policy file")
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


def _no_text(name: str, raw: bytes, at: int, problem: str) -> CompileError:
    """Byte `at` is none of a text: shown in its line, as far as that can be shown."""
    source = Source(name, raw.decode("utf-8", "replace"))
    start = len(raw[:at].decode("utf-8"))
    message = f"this is no text: byte {at} {problem}"
    return CompileError(
        [Diagnostic("E005", message, Span(source, start, start + 1), help="save it as UTF-8")]
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
