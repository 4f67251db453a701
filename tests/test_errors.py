"""Wrong policies: what is expected stands on the offending line.

    bad_field == 3        # error[E010] there is no field

Several may stand on one line. The text is part of the message. What is expected in a
file that the policy includes or reads stands in that file.
"""

import re
from pathlib import Path

import pytest

from itmlang.diagnostics import CompileError, Diagnostic
from itmlang.pipeline import compile
from itmlang.source import Source
from tests.support.files import beside

FILES = sorted((Path(__file__).parent / "errors").glob("*.itm"))
ROOT = Path(__file__).parents[1]
_EXPECTED = re.compile(r"(?:error|warning)\[([EW]\d{3})\] (.*?)(?=\s*# (?:error|warning)\[|$)")
# In `test_parser`, `test_cli`, `test_trials` and `test_capabilities`.
_ELSEWHERE = {"E028", "E006", "E046", "E061"}


def expected(text: str) -> list[tuple[int, str, str]]:
    return [
        (number, match.group(1), match.group(2).strip())
        for number, line in enumerate(text.splitlines(), 1)
        for match in _EXPECTED.finditer(line)
    ]


def reported(path: Path) -> tuple[list[Diagnostic], dict[str, str]]:
    """What is said of a file, and the text of each file that was read for it."""
    main = Source(path.name, path.read_text())
    sources = {path.name: main}
    try:
        found = compile(main, beside(path.parent, sources)).warnings
    except CompileError as error:
        found = error.diagnostics
    return list(found), {name: source.text for name, source in sources.items()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_errors_stand_on_their_lines(path: Path) -> None:
    diagnostics, texts = reported(path)
    missing = [(name, *one) for name, text in texts.items() for one in expected(text)]
    surplus = []
    assert missing, "say what is expected, and where"
    for found in diagnostics:
        place = (found.span.source.name, found.span.line) if found.span else ("", 0)
        match = next(
            (m for m in missing if m[:3] == (*place, found.code) and m[3] in found.message), None
        )
        if match is None:
            surplus.append(f"{place}: {found.code} {found.message}")
        else:
            missing.remove(match)
    assert (missing, surplus) == ([], [])


def test_the_link_that_a_help_line_shows_is_one() -> None:
    reference = "policy p { at output classify { c } process { c { priority wan.bulk } } %s }"
    control = "control { wan.rate every 1s toward cpu = 5% with p kp 1 within 1 mbit-2 mbit }"
    with pytest.raises(CompileError) as caught:
        compile(Source("p.itm", reference % control))
    shown = [re.findall("`(link .*)`", one.help) for one in caught.value.diagnostics]
    examples = [one for found in shown for one in found]
    assert examples
    for example in examples:
        compile(Source("p.itm", example + reference % ""))


def test_each_code_has_a_file() -> None:
    sources = "".join(path.read_text() for path in ROOT.glob("itmlang/**/*.py"))
    codes = set(re.findall(r'"([EW]\d{3})"', sources)) - _ELSEWHERE
    files = [path for path in FILES[0].parent.iterdir() if path.is_file()]
    shown = {code for path in files for _, code, _ in expected(path.read_text())}
    assert sorted(codes - shown) == []
