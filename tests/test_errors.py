"""Wrong policies: what is expected stands on the offending line.

    bad_field == 3        # error[E010] there is no field

Several may stand on one line. The text is part of the message.
"""

import re
from pathlib import Path

import pytest

from itmlang.diagnostics import CompileError, Diagnostic
from itmlang.pipeline import compile
from itmlang.source import Source

FILES = sorted((Path(__file__).parent / "errors").glob("*.itm"))
ROOT = Path(__file__).parents[1]
_EXPECTED = re.compile(r"(?:error|warning)\[([EW]\d{3})\] (.*?)(?=\s*# (?:error|warning)\[|$)")
_ELSEWHERE = {"E028", "E006"}  # in `test_parser` and `test_cli`


def expected(text: str) -> list[tuple[int, str, str]]:
    return [
        (number, match.group(1), match.group(2).strip())
        for number, line in enumerate(text.splitlines(), 1)
        for match in _EXPECTED.finditer(line)
    ]


def reported(path: Path) -> list[Diagnostic]:
    try:
        return list(compile(Source(path.name, path.read_text())).warnings)
    except CompileError as error:
        return list(error.diagnostics)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_errors_stand_on_their_lines(path: Path) -> None:
    missing, surplus = expected(path.read_text()), []
    assert missing, "say what is expected, and where"
    for found in reported(path):
        line = found.span.line if found.span else 0
        match = next(
            (m for m in missing if m[:2] == (line, found.code) and m[2] in found.message), None
        )
        if match is None:
            surplus.append(f"{line}: {found.code} {found.message}")
        else:
            missing.remove(match)
    assert (missing, surplus) == ([], [])


def test_each_code_has_a_file() -> None:
    sources = "".join(path.read_text() for path in ROOT.glob("itmlang/**/*.py"))
    codes = set(re.findall(r'"([EW]\d{3})"', sources)) - _ELSEWHERE
    shown = {code for path in FILES for _, code, _ in expected(path.read_text())}
    assert sorted(codes - shown) == []
