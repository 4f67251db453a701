"""What the documents show is what comes out."""

import re
from pathlib import Path

import pytest

from itmlang.pipeline import compile
from itmlang.resources import resource
from itmlang.source import Source
from runtime.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found is not None
    return found.group(1)


def bare(text: str) -> list[str]:
    """Lines without comments of policies and of rules."""
    lines = [re.sub(r' comment "[^"]*"$', "", line).strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_the_first_policy_is_the_librarys():
    assert bare(block("itm")) == bare(resource("policies", "size_aware.itm").read_text())


def test_the_ruleset_is_what_compile_prints():
    path = resource("policies", "size_aware.itm")
    printed = compile(Source("size_aware.itm", path.read_text())).text.text
    shown = bare(block("nft"))
    assert [line for line in shown if line not in bare(printed)] == []
    # In the same order, too.
    rest = iter(bare(printed))
    assert all(line in rest for line in shown)


@pytest.mark.parametrize("name", ["README.md", "ARCHITECTURE.md", "docs/language.md"])
def test_links_lead_somewhere(name):
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_every_command_named_exists():
    for name in re.findall(r"^ +itmc ([a-z]+)", README, re.MULTILINE):
        assert name in COMMANDS


def test_every_module_stands_in_the_architecture():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    modules = [p.name for p in (*ROOT.glob("itmlang/*.py"), *ROOT.glob("runtime/*.py"))]
    assert [m for m in modules if m != "__init__.py" and m not in text] == []
