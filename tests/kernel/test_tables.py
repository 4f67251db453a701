"""Classes that are looked up, loaded and changed: maps are held to their file like rules."""

import re
import subprocess

import pytest

from itmlang.dispatch import OPTIMISATIONS
from itmlang.pipeline import compile
from itmlang.source import Source
from runtime import apply as runtime_apply
from runtime import nft, store
from runtime import status as runtime_status
from runtime.cli.files import file_key
from runtime.units import Unit, from_json, to_json, unit_of
from tests.kernel.test_apply import counts, send
from tests.kernel.test_apply import listing as listed
from tests.support.commands import run

PORTS = range(1, 9)


def text(*ports: object, ttl: int = 64, process: str = "") -> str:
    rules = "\n".join(
        f"        {name} when dport {'in' if '-' in str(port) else '=='} {port}"
        + (f" and ttl == {ttl}" if name == "b" else "")
        for name, port in zip("abcdefgh", ports or PORTS, strict=True)
    )
    return f"""policy many {{
    at output
    interest {{ protocol udp }}
    flow conn by daddr timeout 1m max 16
    classify {{
{rules}
        rest when conn.packets > 100
    }}
    log {{ count conn }}
    process {{ {process} }}
}}
"""


def unit(source: str, optimise: bool = True) -> Unit:
    passes = OPTIMISATIONS if optimise else ()
    return unit_of(
        compile(Source("/policies/m.itm", source), optimisations=passes),
        file_key("/policies/m.itm"),
    )


def listing() -> str:
    """The table without the time that its flows have left."""
    return re.sub(r" expires \w+", "", listed("inet itm_many"))


def drift() -> tuple[str, ...]:
    (status,) = runtime_status.status(["many"])
    return tuple(status.changed)


def loaded(one: Unit) -> dict[tuple[str, str], str]:
    done = runtime_apply.apply(one)
    assert not drift()
    assert runtime_apply.planned(one, store.load())[0].empty
    return {(c.kind, c.name): c.action for c in done.plan.changes if c.action != "keep"}


def seen() -> int:
    return sum(packets for packets, _ in runtime_status.flow_counts("many")["conn"].values())


def test_applying_again_changes_nothing(host):
    loaded(unit(text()))
    send(2, port=3)
    send(2, port=2)
    assert counts("many") | {} == dict.fromkeys("abcdefgh", 0) | {"b": 2, "c": 2, "rest": 0}
    before = listing()
    assert loaded(unit(text())) == {}
    assert listing() == before
    one = unit(text())
    assert to_json(from_json(to_json(one))) == to_json(one)


def test_a_changed_class_is_a_changed_map(host):
    loaded(unit(text()))
    send(3, port=3)
    done = loaded(unit(text(1, 2, 30, 4, 5, 6, 7, 8)))
    assert done == {("map", "classes_1"): "replace"}
    send(1, port=3)
    send(1, port=30)
    assert counts("many")["c"] == 4
    assert seen() == 5


def test_a_map_of_ranges_is_made_anew_and_what_was_learned_stays(host):
    loaded(unit(text()))
    send(3, port=3)
    done = loaded(unit(text(1, 2, "30-40", 4, 5, 6, 7, 8)))
    assert done["map", "classes_1"] == "replace"
    send(2, port=35)
    assert counts("many")["c"] == 5
    assert seen() == 5
    assert loaded(unit(text()))["map", "classes_1"] == "replace"
    send(1, port=3)
    assert (counts("many")["c"], seen()) == (6, 6)


def test_classes_come_and_go(host):
    loaded(unit(text()))
    send(1, port=8)
    fewer = text().replace("        h when dport == 8\n", "        i when dport == 9\n")
    loaded(unit(fewer))
    send(1, port=8)
    send(1, port=9)
    assert counts("many")["i"] == 1
    three = fewer.replace("dport == 4", "ttl == 1").replace("dport == 5", "ttl == 2")
    three = three.replace("dport == 6", "ttl == 3").replace("dport == 7", "ttl == 4")
    three = three.replace("dport == 9", "ttl == 5")
    assert loaded(unit(three))["map", "classes_1"] == "delete"
    assert "map " not in listing()
    send(1, port=3)
    assert counts("many")["c"] == 1
    assert seen() == 4


def test_with_and_without_optimisations_counts_stay(host):
    loaded(unit(text(), optimise=False))
    send(3, port=2)
    assert loaded(unit(text()))["map", "classes_1"] == "create"
    send(3, port=2)
    assert loaded(unit(text(), optimise=False))["map", "classes_1"] == "delete"
    send(3, port=2)
    assert (counts("many")["b"], seen()) == (9, 9)


@pytest.mark.parametrize(
    "command, told",
    [
        ("delete element inet itm_many classes_1 {{ 3 }}", "map classes_1 was changed"),
        ("add element inet itm_many classes_1 {{ 33 : goto class_a }}", "map classes_1 was changed"),
        ("flush map inet itm_many classes_1", "map classes_1 was changed"),
        ("add map inet itm_many other {{ type mark : verdict; }}", "map other was added"),
    ],
)  # fmt: skip
def test_what_others_do_to_a_map_is_seen_and_mended(host, command, told):
    loaded(unit(text()))
    send(1, port=3)
    before = listing()
    nft.load(command.format() + "\n")
    assert drift() == (told,)
    loaded(unit(text()))
    assert listing() == before
    send(1, port=3)
    assert counts("many")["c"] == 2


def test_a_map_that_was_taken_away_comes_back(host):
    loaded(unit(text()))
    send(1, port=3)
    nft.load("flush chain inet itm_many classify\ndelete map inet itm_many classes_1\n")
    assert "map classes_1 is gone" in drift()
    loaded(unit(text()))
    send(1, port=3)
    assert (counts("many")["c"], seen()) == (2, 2)


def test_removing_leaves_nothing(host):
    loaded(unit(text()))
    runtime_apply.remove([])
    ruleset = subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True)
    assert ruleset.stdout == ""


def test_a_class_that_other_classes_stand_behind_moves(host):
    loaded(unit(text()))
    done = loaded(unit(text(ttl=63)))
    assert ("map", "classes_1") not in done
    send(1, port=2)
    assert counts("many")["b"] == 0


def test_the_option_means_the_same_for_every_command(host, tmp_path):
    file = tmp_path / "m.itm"
    file.write_text(text())
    plain = run("compile", "--no-optimize", str(file)).stdout
    assert "map classes_1" in run("compile", str(file)).stdout
    assert "map " not in plain
    assert run("apply", "--no-optimize", str(file)).returncode == 0
    assert "map " not in listing()
    assert run("plan", "--exit-code", "--no-optimize", str(file)).returncode == 0
    assert run("plan", "--exit-code", str(file)).returncode == 4
    assert run("apply", str(file)).returncode == 0
    assert "map classes_1" in listing()
