"""docs/errors.md: each code has an entry, and what it shows is what comes out."""

import re

import pytest

from runtime import nft
from runtime.traffic import Namespace, TrafficError
from tests.support.commands import nothing_left
from tests.support.errors_page import CODES, PAGE, ROOT, Entry, codes, entries, page
from tests.support.needs import unavailable

ENTRIES = entries()
SHOWN = [entry for entry in ENTRIES if entry.wrong is not None]
COMMANDS = [entry for entry in ENTRIES if entry.command]
# Files that are too large to be shown.
LARGE = {"E006": {"generated.itm": "# nothing\n" * 2**20}}
# What a kernel refuses that lacks a module.
REFUSED = {"E060": "ct id"}


def ids(entry: Entry) -> str:
    return entry.code


def test_every_code_of_the_sources_has_an_entry_and_no_other():
    sources = [*ROOT.glob("itmlang/**/*.py"), *ROOT.glob("runtime/**/*.py")]
    used = {code for path in sources for code in re.findall(r'"([EW]\d{3})"', path.read_text())}
    assert used == {entry.code for entry in ENTRIES}, f"add or remove files of {CODES}"


@pytest.mark.parametrize("entry", ENTRIES, ids=ids)
def test_an_entry_has_a_text_and_an_example(entry):
    assert entry.text
    assert not entry.meaning.endswith(".")
    assert (entry.wrong is not None and entry.mended is not None) or entry.command


@pytest.mark.parametrize("entry", SHOWN, ids=ids)
def test_a_wrong_example_has_its_code_and_no_other(entry):
    printed = entry.wrong.checked()
    assert entry.code in codes(printed), printed
    assert set(codes(printed)) == {entry.code, *entry.beside}, printed


@pytest.mark.parametrize("entry", SHOWN, ids=ids)
def test_a_mended_example_is_sound(entry):
    printed = entry.mended.checked()
    assert "no errors" in printed
    assert codes(printed) == [], printed


def test_large_files_and_refusals_belong_to_an_entry():
    assert {*LARGE, *REFUSED} <= {entry.code for entry in COMMANDS}


@pytest.mark.parametrize("entry", COMMANDS, ids=ids)
def test_a_command_prints_what_is_shown(entry, tmp_path, monkeypatch, request):
    monkeypatch.setenv("ITM_STATE_DIR", str(tmp_path))
    refused = REFUSED.get(entry.code)
    if refused is not None:
        monkeypatch.setattr(nft, "load", lambda script, check=False: refuse(script, refused))
    try:
        namespace = Namespace.create("host")
    except TrafficError as error:
        unavailable(error)
    try:
        with namespace.entered(), nothing_left():
            printed = entry.dialogue(LARGE.get(entry.code, {}))
    finally:
        namespace.close()
    assert entry.code in codes(printed), printed
    if request.config.getoption("--bless"):
        entry.bless(printed)
    else:
        assert entry.command == printed


def refuse(script, text):
    """Refuse the first rule that has the text, as nftables does."""
    line = next(n for n, line in enumerate(script.splitlines(), 1) if text in line)
    raise nft.NftRefusalError(
        (nft.NftError(line, "Could not process rule: No such file or directory"),)
    )


def test_the_page_is_what_the_files_make(request):
    made = page()
    if request.config.getoption("--bless"):
        PAGE.write_text(made, encoding="utf-8")
    assert PAGE.exists(), "make it: pytest tests/test_errors_page.py --bless"
    assert PAGE.read_text(encoding="utf-8") == made, "make it anew, with --bless"
