"""docs/errors.md, made from tests/errors/codes: a file for each code, as sections of plain text.

    # what the code means, in one line
    why it comes and what to do, a paragraph
    --- wrong [with E010] [encoded latin-1]    `with` names codes that come beside it
    --- file NAME                              a file that the policy names
    --- mended                                 without text, only its files differ
    --- command                                instead of `wrong`: `$ itmc …` and what it prints; also `ip`, `tc`

What is shown of a wrong policy is what `itmc check policy.itm` prints today.
"""

import io
import re
import shlex
import subprocess
from collections.abc import Mapping
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from runtime.cli.exits import exit_code_of
from runtime.cli.main import itmc

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = ROOT / "docs" / "errors.md"
CODES: Final = ROOT / "tests" / "errors" / "codes"
POLICY: Final = "policy.itm"
# Of more diagnostics only the first and the last are shown.
_MOST_SHOWN: Final = 4
_COMMAND: Final = re.compile(r"\$ (?:itmc|ip|tc) ")
_SECTION: Final = re.compile(r"^--- (\w+)(.*)\n", re.MULTILINE)
_DIAGNOSTIC: Final = re.compile(r"^(?:\S.*: )?(?:error|warning)\[([EW]\d{3})\]", re.MULTILINE)
_HEAD: Final = """\
# Errors and warnings

What `itmc` says about a policy has a code that stays the same while its words may
change. For each code: what it means, a policy that is wrong that way, what
`itmc check` says about it, and the policy mended. An error stops the compiler, a
warning does not.

This page is made from [tests/errors/codes](../tests/errors/codes) by
`pytest tests/test_errors_page.py --bless`.
"""


@dataclass
class Example:
    """A policy with the files it names."""

    policy: str
    files: dict[str, str] = field(default_factory=dict)
    encoding: str = "utf-8"

    def checked(self) -> str:
        """What `itmc check` prints about it."""
        with TemporaryDirectory() as folder, chdir(folder):
            Path(POLICY).write_bytes(self.policy.encode(self.encoding))
            _write(self.files)
            return _printed(["check", POLICY])


@dataclass
class Entry:
    """A code's file."""

    code: str
    meaning: str
    text: str
    wrong: Example | None
    mended: Example | None
    beside: tuple[str, ...]  # codes that the wrong example has, too
    files: dict[str, str]  # of the command
    command: str

    def dialogue(self, more: Mapping[str, str]) -> str:
        """The commands with what they print today; `more` are files too large to show."""
        lines = [line for line in self.command.splitlines() if _COMMAND.match(line)]
        with TemporaryDirectory() as folder, chdir(folder):
            _write({**self.files, **more})
            return "".join(f"{line}\n{_said(shlex.split(line)[1:])}" for line in lines)

    def bless(self, command: str) -> None:
        """Put what the commands print into the file."""
        path = CODES / f"{self.code}.txt"
        path.write_text(path.read_text("utf-8").replace(self.command, command), "utf-8")


def _write(files: Mapping[str, str]) -> None:
    for name, text in files.items():
        Path(name).write_text(text, encoding="utf-8")


def _said(words: list[str]) -> str:
    """What a command prints: ours, or `ip` and `tc`, which prepare a machine."""
    if words[0] == "itmc":
        return _printed(words[1:])
    return subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout


def _printed(arguments: list[str]) -> str:
    """What `itmc` prints, on both streams."""
    out = io.StringIO()
    with redirect_stderr(out), redirect_stdout(out):
        try:
            itmc.main(arguments, prog_name="itmc", standalone_mode=False)
        except Exception as error:
            exit_code_of(error)
    return out.getvalue()


def entries() -> list[Entry]:
    """All codes' files: errors, then warnings."""
    return [read(path) for path in sorted(CODES.glob("*.txt"))]


def read(path: Path) -> Entry:
    text = path.read_text(encoding="utf-8")
    marks = list(_SECTION.finditer(text))
    head = text[: marks[0].start()] if marks else text
    meaning, _, body = head.partition("\n")
    assert meaning.startswith("# "), f"{path}: begin with one line, what the code means"
    entry = Entry(path.stem, meaning[2:], body.strip(), None, None, (), {}, "")
    files = entry.files
    for index, mark in enumerate(marks):
        end = marks[index + 1].start() if index + 1 < len(marks) else len(text)
        content, words = text[mark.end() : end], mark.group(2).split()
        match mark.group(1):
            case "wrong":
                options = dict(zip(words[::2], words[1::2], strict=True))
                entry.wrong = Example(content, encoding=options.get("encoded", "utf-8"))
                entry.beside = (
                    tuple(options.get("with", "").split(",")) if "with" in options else ()
                )
                files = entry.wrong.files
            case "mended":
                assert entry.wrong is not None, f"{path}: what is mended was wrong before"
                entry.mended = Example(content or entry.wrong.policy, dict(files))
                files = entry.mended.files
            case "file":
                files[words[0]] = content
            case "command":
                entry.command = content
            case other:
                raise ValueError(f"{path}: no section is called {other}")
    return entry


def codes(printed: str) -> list[str]:
    """The codes of what was printed, in order."""
    return _DIAGNOSTIC.findall(printed)


def page() -> str:
    """The text of docs/errors.md."""
    found = entries()
    lines = [_HEAD, "| code | meaning |", "| --- | --- |"]
    lines += [f"| [{e.code}](#{e.code.lower()}) | {e.meaning} |" for e in found]
    return "\n".join(lines) + "\n" + "".join(map(_section, found))


def _section(entry: Entry) -> str:
    parts = [f"\n## {entry.code}\n\n**{entry.meaning}.**\n\n{entry.text}\n"]
    if entry.wrong is not None:
        parts += [_block("itm", entry.wrong.policy), _files(entry.wrong.files)]
        parts += [_block("text", _shown(entry.code, entry.wrong.checked()))]
    if entry.command:
        parts += [_files(entry.files), _block("text", entry.command)]
    if entry.mended is not None and entry.wrong is not None:
        parts.append("\nMended:\n")
        if (entry.mended.policy, entry.mended.encoding) != (
            entry.wrong.policy,
            entry.wrong.encoding,
        ):
            parts.append(_block("itm", entry.mended.policy))
        changed = {
            name: text
            for name, text in entry.mended.files.items()
            if entry.wrong.files.get(name) != text
        }
        parts.append(_files(changed))
    return "".join(parts)


def _shown(code: str, printed: str) -> str:
    """What was printed; in the middle of much of the same, dots."""
    starts = [mark.start() for mark in _DIAGNOSTIC.finditer(printed)]
    if len(starts) <= _MOST_SHOWN:
        return printed
    return printed[: starts[1]] + "…\n" + printed[starts[-1] :]


def _files(files: Mapping[str, str]) -> str:
    return "".join(
        f"\n`{name}`:\n{_block('itm' if name.endswith('.itm') else 'text', text)}"
        for name, text in files.items()
    )


def _block(language: str, text: str) -> str:
    body = "\n".join(line.rstrip() for line in text.strip("\n").splitlines())
    return f"\n```{language}\n{body}\n```\n"
