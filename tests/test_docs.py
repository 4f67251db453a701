"""What the documents show is what comes out."""

import re
from pathlib import Path

import pytest

from itmlang.laws import LAWS
from itmlang.pipeline import compile
from itmlang.resources import resource
from itmlang.source import Source
from runtime.cli.main import COMMANDS
from tests.support.bottleneck import run
from tests.test_cli import itmc
from tests.test_laws import HALVED, SENSORS, link, make, plant

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
        "docs/controllers.md",
        "docs/performance.md",
        "docs/overlay.md",
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


CONTROLLERS = (ROOT / "docs" / "controllers.md").read_text()


def table(heading: str) -> list[list[str]]:
    """The rows of the table of which the heading begins so."""
    _, _, rest = CONTROLLERS.partition(f"| {heading}")
    rows = re.match(r".*\n\| ---.*\n((?:\|.*\n)+)", rest)
    assert rows is not None, heading
    return [[one.strip() for one in row.strip("|").split("|")] for row in rows[1].splitlines()]


def test_the_laws_of_the_page_are_those_there_are():
    shown = {re.findall(r"\w+", row[0])[0]: row[2] for row in table("law |")}
    assert list(shown) == list(LAWS)
    for name, law in LAWS.items():
        given = [
            f"`{gain}` ({one.default:g})" if one.default is not None else f"`{gain}`"
            for gain, one in law.gains.items() if gain not in ("lost", "safe")
        ]  # fmt: skip
        assert shown[name] == (", ".join(given) or "any")


def test_the_controllers_of_the_page_compile():
    shown = re.findall(r"```itm\n(.*?)```", CONTROLLERS, re.DOTALL)
    assert shown
    for one in shown:
        assert compile(Source("shown.itm", one)).policies[0].controllers


@pytest.mark.parametrize("kp, ki, after, most, told", table("kp |"))
def test_the_worked_example_is_what_the_simulator_says(kp, ki, after, most, told):
    out = list(plant(make("pi", {"kp": float(kp), "ki": float(ki)}), 2000))
    late = [n for n, (measured, _, _) in enumerate(out) if abs(measured - 5) > 0.25]
    assert after == f"{late[-1] + 1} s"
    assert most == f"{max(measured for measured, _, _ in out):.2f}"
    if "damped" in told:
        assert f"gains at {told.split()[-1]}" in " ".join(d.reason for _, _, d in out)
        assert f"gains at 1/{2 * int(told[-1])}" not in " ".join(d.reason for _, _, d in out)
    else:
        assert "swings" not in " ".join(d.reason for _, _, d in out)


@pytest.mark.parametrize("sensor, slow, slow_used, fast, fast_used", table("answers |"))
def test_the_links_of_the_page_are_as_fast(sensor, slow, slow_used, fast, fast_used):
    for period, shown, used in ((0.1, slow, slow_used), (0.05, fast, fast_used)):
        name = sensor.partition(":")[0]
        traces = [run(link(period), HALVED, 20, seed=n, **SENSORS[name]) for n in (1, 2, 3)]
        assert f"{max(one.calm(10, 30) for one in traces) - 10:.2f} s" == shown
        assert f"{100 * min(one.used(11, 20) for one in traces):.0f} %" == used
