"""Imports go one way, and each outside library stays behind its one module."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A module imports only from lines above its own; the last one may import all.
ORDER = (
    "source", "diagnostics", "values", "links", "overlays", "control", "laws", "packet", "headers.options", "headers.extensions",
    "headers.buffer", "headers.view", "headers.ip", "headers.transport", "headers.packet", "headers", "tunnel", "fields", "marks",
    "actions.action", "actions.accept", "actions.addresses", "actions.call", "actions.drop", "actions.dscp",
    "actions.encapsulate", "actions.mark", "actions.mss", "actions.ports", "actions.priority", "actions.reject", "actions.route", "actions.tos", "actions.ttl",
    "actions", "capabilities", "resources", "syntax", "grammar", "parser", "layout", "modules", "rates", "ir", "evaluate",
    "packets", "conditions", "resolve", "tunnelling", "workers", "shaping", "overlaying", "controlling", "check", "unparse", "simplify", "dispatch", "nft.model",
    "nft.match", "nft.dispatch", "nft.queueing", "nft.tunnels", "nft.lower", "nft.variants", "place", "nft.text", "nft.needs", "conntrack", "tables", "semantics", "trials", "pipeline",
)  # fmt: skip
# Which modules may import an outside library; a folder stands for all in it.
BEHIND = {
    "lark": ("itmlang/grammar.py", "itmlang/parser.py"),
    "pyroute2": ("runtime/traffic.py",),
    "nftables": ("runtime/nft.py",),
    "netfilterqueue": ("runtime/queue.py",),
    "click": ("runtime/cli/",),
    "rich": ("runtime/cli/",),
}
SOURCES = sorted([*ROOT.glob("itmlang/**/*.py"), *ROOT.glob("runtime/**/*.py"), ROOT / "libitm.py"])


def imports(path: Path) -> set[str]:
    """The full names of the modules that a file imports; `a.b` also for `from a import b`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            found |= {_module(f"{node.module}.{a.name}") or node.module for a in node.names}
    return found


def _module(name: str) -> str | None:
    path = ROOT / name.replace(".", "/")
    return name if path.with_suffix(".py").exists() or (path / "__init__.py").exists() else None


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_imports_go_one_way(path: Path) -> None:
    name, used = _name(path), imports(path)
    if not name.startswith("itmlang."):
        return
    assert not [u for u in used if u.split(".")[0] == "runtime"], "the compiler needs no machine"
    own = name.removeprefix("itmlang.")
    if own == "nft":
        return
    assert own in ORDER, f"give {own} a place in ORDER"
    above = ORDER[: ORDER.index(own)]
    wrong = [
        u for u in used if u.startswith("itmlang.") and u.removeprefix("itmlang.") not in above
    ]
    assert not wrong, f"{own} imports what comes after it: {wrong}"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_libraries_stay_behind_their_module(path: Path) -> None:
    place = str(path.relative_to(ROOT))
    for library in {used.split(".")[0] for used in imports(path)} & set(BEHIND):
        assert place.startswith(BEHIND[library]), f"{library} belongs to {BEHIND[library]}"


def test_order_names_real_modules() -> None:
    assert [m for m in ORDER if _module(f"itmlang.{m}") is None] == []


@pytest.mark.parametrize("command", ["plan", "apply", "list", "status", "top", "rollback"])
def test_what_compiles_nothing_imports_no_compiler(command: str) -> None:
    """An unchanged file needs none: it would be half of the time that its plan takes."""
    code = (
        f"import sys, runtime.cli.main, runtime.cli.{command}\n"
        "print(*{'lark', 'rich', 'pyroute2', 'itmlang.pipeline', 'itmlang.parser'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout.split(), done.stderr) == ([], "")
