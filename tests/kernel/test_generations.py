"""Generations: what is kept of each change, and going back to them."""

import getpass
import json
import time

import pytest

from runtime import apply as runtime_apply
from runtime import nft, store
from runtime import status as runtime_status
from runtime.errors import UsageError
from tests.kernel.test_apply import MARK, counts, last_dscp, policy, send
from tests.support.commands import one_message, rules, run

WATCH = """
policy watch(threshold: packets = 3) {
    at output
    interest { protocol udp }
    flow conn by daddr, dport timeout 1h max 16
    classify { few when conn.packets <= threshold; many }
    log { count conn }
    process { few { set dscp 4 } many { set dscp 8 } }
}
"""


def mark(dscp: int, name: str = "m") -> str:
    return MARK.format(name=name, priority=0, dscp=dscp)


def kept() -> list[int]:
    return [one.number for one in store.Store(store.directory()).generations()]


def current() -> int:
    return store.load().generation


def test_who_when_why_and_the_plans_digest_are_kept(host, tmp_path, monkeypatch):
    monkeypatch.delenv("SUDO_USER", raising=False)
    file = tmp_path / "m.itm"
    file.write_text(mark(4))
    planned = json.loads(run("plan", "--json", str(file)).stdout)["digest"]
    run("apply", str(file))
    monkeypatch.setenv("SUDO_USER", "alice")
    run("disable", "m")
    found = json.loads(run("rollback", "--list", "--json").stdout)
    assert found["schema"] == 1
    second, first = found["generations"]
    assert abs(first.pop("when") - time.time()) < 60
    assert first == {
        "number": 1, "parent": 0, "who": getpass.getuser(), "why": f"apply {file}",
        "digest": planned, "current": False,
    }  # fmt: skip
    assert (second["number"], second["parent"], second["current"]) == (2, 1, True)
    assert (second["who"], second["why"]) == ("alice", "disable m")
    rows = run("rollback", "--list").stdout.splitlines()
    assert rows[2].split()[:2] == ["2", "*"]
    assert ("alice" in rows[2], f"apply {file}" in rows[3], planned in rows[3]) == (True,) * 3


def test_nothing_is_kept_where_nothing_was_loaded(host):
    assert run("rollback", "--list").stdout == "no generation is kept\n"
    assert json.loads(run("rollback", "--list", "--json").stdout)["generations"] == []
    done = run("rollback")
    assert (done.returncode, one_message(done)) == (
        2, "itmc: nothing is loaded: there is nothing to go back to",
    )  # fmt: skip
    assert run("rollback", "--json").returncode == 2


def test_ten_are_kept_and_it_goes_back_one_by_one(host):
    listings = {}
    for number in range(1, 14):
        runtime_apply.apply(policy(mark(number)))
        listings[number] = rules()
    assert kept() == list(range(13, 3, -1))
    folder = store.directory()
    assert {one.name for one in folder.glob("*.gz")} == {
        f"generation-{number}.json.gz" for number in range(4, 14)
    }
    for number in range(12, 3, -1):
        made, _ = runtime_apply.rollback()
        assert made is not None
        assert (made.number, current(), rules()) == (number, number, listings[number])
    with pytest.raises(UsageError, match="generation 3 is no longer kept"):
        runtime_apply.rollback()
    assert (last_dscp(), kept()) == (4, list(range(13, 3, -1)))
    with pytest.raises(UsageError, match="there is no generation 99"):
        runtime_apply.rollback(99)
    runtime_apply.rollback(13)
    assert rules() == listings[13]


def test_the_way_back_from_the_oldest_is_kept(host):
    for number in range(1, 11):
        runtime_apply.apply(policy(mark(number)))
    runtime_apply.rollback(1)
    for number in (20, 21):
        runtime_apply.apply(policy(mark(number)), confirm=60)
        assert len(kept()) == 10
        assert runtime_apply.rollback()[0].number == 1
        assert last_dscp() == 1
    runtime_apply.apply(policy(mark(22)))
    assert kept() == [13, 12, 11, *range(10, 4, -1), 1]
    assert runtime_apply.rollback()[0].number == 1
    assert last_dscp() == 1


def test_what_is_applied_after_a_rollback_comes_after_where_that_led(host):
    for dscp in (4, 8, 12):
        runtime_apply.apply(policy(mark(dscp)))
    runtime_apply.rollback(1)
    runtime_apply.apply(policy(mark(16)))
    assert (current(), kept(), last_dscp()) == (4, [4, 3, 2, 1], 16)
    assert (runtime_apply.rollback()[0].number, last_dscp()) == (1, 4)
    assert runtime_apply.rollback()[0] is None
    assert (current(), nft.tables()) == (0, ())
    with pytest.raises(UsageError, match="nothing to go back to"):
        runtime_apply.rollback()
    runtime_apply.rollback(3)
    assert last_dscp() == 12


def test_each_kind_of_change_can_be_taken_back(host, tmp_path):
    file = tmp_path / "all.itm"
    file.write_text(WATCH + mark(16, "m"))
    run("apply", str(file))
    send(5)
    flows, counted, before = runtime_status.flow_counts("watch"), counts("watch"), rules()
    assert counted == {"few": 4, "many": 1}
    for change in (
        ["remove", "m"], ["disable", "watch"], ["set", "watch.threshold", "9"],
        ["remove", "watch"], ["remove", "--all"],
    ):  # fmt: skip
        assert run(*change).returncode == 0, change
        assert rules() != before, change
        done = run("rollback")
        assert (done.returncode, done.stderr) == (0, ""), change
        assert rules() == before, change
        assert (runtime_status.flow_counts("watch"), counts("watch")) == (flows, counted), change
        assert [(s.name, s.state, s.drift) for s in runtime_status.loaded()] == [
            ("watch", "on", False), ("m", "on", False),
        ], change  # fmt: skip
    run("disable", "m")
    off = rules()
    run("enable", "m")
    run("rollback")
    assert (rules(), {s.name: s.state for s in runtime_status.loaded()}) == (
        off, {"watch": "on", "m": "off"},
    )  # fmt: skip


def test_what_went_comes_back_only_as_long_as_nothing_newer_is_known(host):
    """Counts that a change took away are not mixed into later ones."""
    by_port = policy(WATCH)
    runtime_apply.apply(by_port)
    send(5)
    runtime_apply.apply(policy(mark(16), "/policies/a.itm"))  # `watch` goes with its counts
    runtime_apply.rollback()
    assert runtime_status.flow_counts("watch")["conn"] == {("127.0.0.1", 9): (5, 145)}
    send(2)
    runtime_apply.apply(policy(WATCH.replace("dscp 8", "dscp 12")))
    send(1)
    runtime_apply.rollback()
    assert runtime_status.flow_counts("watch")["conn"] == {("127.0.0.1", 9): (8, 232)}
    assert not list(store.directory().glob("left-1.*"))


def test_a_rollback_needs_no_files_and_no_compiler(host, tmp_path):
    file = tmp_path / "m.itm"
    file.write_text(mark(4))
    run("apply", str(file))
    file.write_text(mark(8))
    run("apply", str(file))
    file.unlink()
    broken = "import sys\nsys.modules['lark'] = sys.modules['itmlang.parser'] = None"
    done = run("rollback", before=broken)
    assert (done.returncode, last_dscp()) == (0, 4)
    assert done.stdout.startswith(f"back to generation 1: apply {file}, 20")


def test_the_same_again_makes_no_generation(host):
    for _ in range(3):
        runtime_apply.apply(policy(mark(4)))
        runtime_apply.switch(["m"], on=True)
    assert kept() == [1]
