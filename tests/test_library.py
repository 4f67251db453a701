"""The policy library and the cookbook: each file says what it does, and does it."""

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from itmlang.layout import layout
from itmlang.pipeline import Compiled, compile
from itmlang.resources import resource
from itmlang.source import Source
from itmlang.trials import Failure, run
from runtime import nft
from runtime.cli.files import reader
from runtime.trials import run_in_kernel
from tests.support.serving import xt_text

ROOT = Path(__file__).parent.parent
LIBRARY = sorted(resource("policies").glob("*.itm"))
COOKBOOK = ROOT / "docs" / "cookbook.md"
RECIPES = dict(
    re.findall(r"^## (\d+\. [^\n]*)\n(.*?)(?=^## |\Z)", COOKBOOK.read_text(), re.M | re.S)
)
JOBS = 20
# These are older than the form of the headers.
THE_PAPERS = {"size_aware", "qos_mod"}

library = pytest.mark.parametrize("path", LIBRARY, ids=[path.stem for path in LIBRARY])
recipes = pytest.mark.parametrize("title", RECIPES, ids=[t.partition(".")[0] for t in RECIPES])


def compiled(path: Path) -> Compiled:
    return compile(Source(str(path), path.read_text()), reader())


def recipe(title: str) -> Source:
    (text,) = re.findall(r"```itm\n(.*?)```", RECIPES[title], re.S)
    return Source(str(COOKBOOK), text)


def beside_the_cookbook(path: str, by: Source, library: bool) -> Source:
    """The library, and the list of addresses that one recipe reads."""
    if path == "blocked.txt":
        return Source(path, "192.0.2.0/24  # both families\n2001:db8::7\n")
    return read(path, by, library)


read = reader()


def told(failures: Iterable[Failure]) -> list[str]:
    """What went wrong, for the message."""
    return [
        f"line {f.send.span.line}: expected {f.expected.span.text}, came {f.came}" for f in failures
    ]


def before_the_kernel(result: Compiled) -> list[str]:
    wrong = []
    for trial in result.trials:
        done = run_in_kernel(result.source, trial)
        wrong += [done.not_run] if done.not_run else told(done.failures)
    return wrong


@library
def test_a_header_a_policy_of_the_files_name_and_tests(path):
    result = compiled(path)
    assert [policy.name for policy in result.policies if policy.overlay is None] == [path.stem]
    assert path.read_text().startswith("# ")
    assert len(result.trials) >= 2
    header = path.read_text().partition("\npolicy ")[0]
    if path.stem not in THE_PAPERS:
        assert "# Where: " in header
        untold = [p for p in result.policies[0].parameters if not re.search(rf"\b{p}\b", header)]
        assert untold == []


@library
def test_no_warnings_and_the_canonical_form(path):
    assert compiled(path).warnings == ()
    assert layout(Source(path.name, path.read_text())) == path.read_text()


@library
def test_the_tests_hold(path):
    assert [line for trial in compiled(path).trials for line in told(run(trial))] == []


@library
def test_the_tests_hold_before_the_kernel(path, empty_namespace):
    assert before_the_kernel(compiled(path)) == []


@library
def test_the_kernel_takes_the_defaults(path, empty_namespace):
    with empty_namespace.entered():
        nft.load(xt_text(compiled(path).ruleset), check=True)


def test_the_table_has_every_policy_with_its_hooks_and_parameters():
    rows = re.findall(
        r"^\| \[(\w+)\]\(\.\./policies/\1\.itm\) \| [^|]+ \| ([^|]+) \| `([^|]+)` \|$",
        (ROOT / "docs" / "library.md").read_text(),
        re.M,
    )
    found = []
    for path in LIBRARY:
        (policy,) = (p for p in compiled(path).policies if p.overlay is None)
        found.append((path.stem, ", ".join(policy.hooks), " ".join(policy.parameters) or "-"))
    assert sorted(rows) == found


# The cookbook.


def test_the_cookbook_has_its_jobs():
    assert [title.partition(".")[0] for title in RECIPES] == [str(n + 1) for n in range(JOBS)]


@recipes
def test_a_recipe_compiles_and_its_tests_hold(title):
    source = recipe(title)
    result = compile(source, beside_the_cookbook)
    assert result.warnings == ()
    assert layout(source) == source.text
    assert [line for trial in result.trials for line in told(run(trial))] == []


@recipes
def test_a_recipe_before_the_kernel(title, empty_namespace):
    result = compile(recipe(title), beside_the_cookbook)
    with empty_namespace.entered():
        nft.load(result.text.text, check=True)
    assert before_the_kernel(result) == []
