"""What the documents show is what comes out."""

import re
from pathlib import Path

import pytest

from itmlang.pipeline import compile
from itmlang.resources import resource
from itmlang.source import Source
from runtime.cli.main import COMMANDS
from tests.test_cli import itmc

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
    policy, tests, _ = resource("policies", "size_aware.itm").read_text().partition('\ntest "')
    assert tests
    assert bare(block("itm")) == bare(policy)


def test_the_ruleset_is_what_compile_prints():
    path = resource("policies", "size_aware.itm")
    printed = compile(Source("size_aware.itm", path.read_text())).text.text
    shown = bare(block("nft"))
    assert [line for line in shown if line not in bare(printed)] == []
    # In the same order, too.
    rest = iter(bare(printed))
    assert all(line in rest for line in shown)


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "ARCHITECTURE.md",
        "docs/language.md",
        "docs/library.md",
        "docs/cookbook.md",
        "docs/doctor.md",
        "docs/boot.md",
        "docs/libitm.md",
    ],
)
def test_links_lead_somewhere(name):
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_the_readmes_site_holds_what_it_tests(tmp_path):
    site = tmp_path / "site.itm"
    site.write_text(re.findall(r"```itm\n(.*?)```", README, re.DOTALL)[1])
    done = itmc("test", str(site))
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 test, 22 packets, all as expected" in done.stdout


def test_every_command_named_exists():
    for name in re.findall(r"^ +itmc ([a-z-]+)", README, re.MULTILINE):
        assert name in COMMANDS


def test_every_module_stands_in_the_architecture():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    modules = [p.name for p in (*ROOT.glob("itmlang/*.py"), *ROOT.glob("runtime/*.py"))]
    assert [m for m in modules if m != "__init__.py" and m not in text] == []


def examples() -> list[tuple[str, str]]:
    """The policies of the language reference, each with the nftables shown below it."""
    text = (ROOT / "docs" / "language.md").read_text()
    found = re.findall(r"```itm\n(.*?)```\n(?:```nft\n(.*?)```)?", text, re.DOTALL)
    assert len(found) > 8
    return found


@pytest.mark.parametrize("policy, rules", examples())
def test_examples_of_the_reference_compile(policy, rules):
    printed = bare(compile(Source("example.itm", policy)).text.text)
    assert [line for line in bare(rules) if line not in printed] == []
