"""kill -9 at any instant leaves the old or the new; two `itmc` at once come one after the other.

A warm process is forked and killed, so that two hundred instants take seconds; they are
spread over the time that an apply takes, which is measured first.
"""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable

import pytest

from runtime import apply as runtime_apply
from runtime import nft, store
from runtime import status as runtime_status
from tests.kernel.test_apply import MARK, last_dscp, policy, send
from tests.support import commands
from tests.support.commands import rules, run, until

# Two tables that both change, a policy that comes and goes, a flow whose threshold moves.
WATCH = """
policy watch {{
    at output
    interest {{ protocol udp }}
    flow conn by daddr, dport timeout 1h max 16
    classify {{ few when conn.packets <= {threshold}; {many} }}
    log {{ count conn }}
    process {{ few {{ set dscp {dscp} }} {many} {{ set dscp {dscp} }} }}
}}
"""
A = WATCH.format(threshold=3, many="many", dscp=4) + MARK.format(name="m", priority=1, dscp=4)
B = (
    WATCH.format(threshold=7, many="lots", dscp=16)
    + MARK.format(name="m", priority=1, dscp=16)
    + MARK.format(name="other", priority=2, dscp=16)
)
INSTANTS, PARTS = 200, 4


def forked(work: Callable[[], object]) -> int:
    """A child process that does this; its id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def ended_at(instant: float, work: Callable[[], object]) -> bool:
    """Kill the work at an instant (seconds from its start), with all locks gone; was it in time?"""
    child = forked(work)
    time.sleep(instant)
    os.kill(child, signal.SIGKILL)
    _, how = os.waitpid(child, 0)
    with store.locked():  # its own child may be with the kernel still
        pass
    return os.WIFSIGNALED(how)


def flows() -> dict[str, object]:
    return runtime_status.flow_counts("watch")


@pytest.mark.parametrize("part", range(PARTS))
def test_killed_at_any_instant_it_leaves_the_old_or_the_new(host, part):
    draw = random.Random(part)
    units = {"a": policy(A), "b": policy(B)}
    references, times = {}, []
    for name in "abab":
        begun = time.monotonic()
        runtime_apply.apply(units[name])
        times.append(time.monotonic() - begun)
        references[name] = rules()
        if name == "a":
            send(2)
    counted = flows()
    assert counted == {"conn": {("127.0.0.1", 9): (4, 116)}}
    # Applying takes longer on a busy machine: the latest instant is kept a little beyond its end.
    runs, latest = "b", max(times[1:])
    told = {"old": 0, "new": 0, "killed": 0}
    for number in range(INSTANTS // PARTS):
        new = "a" if runs == "b" else "b"
        unit = units[new]
        killed = ended_at(draw.uniform(0, latest), lambda u=unit: runtime_apply.apply(u))
        latest *= 1.01 if killed else 0.96
        found = rules()
        assert found in (references[runs], references[new]), "a mix"
        told["killed"] += killed
        told["new" if found == references[new] else "old"] += 1
        runs = new if found == references[new] else runs
        assert flows() == counted  # the state can be read, too
        if number % 4 == 3:  # else the next one meets what was left half done
            runs = draw.choice("ab")
            runtime_apply.apply(units[runs])
            assert rules() == references[runs]
            assert {s.name for s in runtime_status.loaded() if not s.drift} == {
                "watch", "m", *(["other"] if runs == "b" else []),
            }  # fmt: skip
            assert flows() == counted
    print(told)
    assert min(told.values()) >= INSTANTS // PARTS // 20, told


def test_killed_at_any_instant_a_change_to_be_confirmed_goes_back(host):
    draw = random.Random(9)
    units = {"a": policy(A), "b": policy(B)}
    runtime_apply.apply(units["a"])
    send(5)
    reference, counted = rules(), flows()
    begun = time.monotonic()
    runtime_apply.apply(units["b"], confirm=60)
    longest = time.monotonic() - begun
    runtime_apply.rollback()
    assert (rules(), flows()) == (reference, counted)
    seen = set()
    for _ in range(25):
        ended_at(draw.uniform(0, longest), lambda: runtime_apply.apply(units["b"], confirm=0.3))
        seen.add(rules() == reference)
        until(lambda: rules() == reference, 3)
        until(lambda: not commands.processes(), 3)
        assert flows() == counted
        runtime_apply.apply(units["a"])
        assert (rules(), commands.pending()) == (reference, {})
    assert seen == {True, False}


@pytest.mark.parametrize("second", [A, MARK.format(name="n", priority=0, dscp=8)])
def test_what_was_loaded_but_not_written_down_is_taken_in_by_the_next_change(host, second):
    """Whatever file that is of: nothing stays that no record knows."""
    runtime_apply.apply(policy(A))
    send(5)
    killed_before("commit", lambda: runtime_apply.apply(policy(B)))
    assert {s.name: s.state for s in runtime_status.loaded()}["other"] == "unknown"
    other = second is not A
    runtime_apply.apply(policy(second, "/policies/n.itm" if other else "/policies/a.itm"))
    states = {s.name: s.state for s in runtime_status.loaded()}
    known = {"watch": "on", "m": "on"} | ({"other": "on", "n": "on"} if other else {})
    assert states == known
    assert flows() == {"conn": {("127.0.0.1", 9): (5, 145)}}
    if other:
        runtime_apply.apply(policy(B))
    assert not any(s.drift for s in runtime_status.loaded())


def test_what_was_written_but_not_loaded_is_forgotten(host):
    runtime_apply.apply(policy(A))
    before = rules()
    killed_before("_load", lambda: runtime_apply.apply(policy(B)), of=runtime_apply)
    assert (rules(), (store.directory() / "state.json.new").exists()) == (before, True)
    runtime_apply.apply(policy(A))
    assert {s.name: s.state for s in runtime_status.loaded()} == {"watch": "on", "m": "on"}
    assert sorted(one.name for one in store.directory().iterdir()) == [
        "generation-1.json.gz", "left-1.json.gz", "lock", "state.json",
    ]  # fmt: skip


@pytest.mark.parametrize("step", ["_load", "commit", "seen"])
def test_remove_after_a_crash_leaves_nothing(host, step):
    runtime_apply.apply(policy(A))
    of = runtime_apply if step == "_load" else store.Store
    killed_before(step, lambda: runtime_apply.apply(policy(B)), of=of)
    done = run("remove", "--all")
    assert (done.returncode, done.stderr) == (0, "")
    assert (nft.tables(), rules(), commands.processes()) == ((), "", {})
    assert run("list").stdout == "no policy is loaded\n"


def test_a_killed_remove_is_finished_by_the_next_one(host):
    runtime_apply.apply(policy(A))
    killed_before("commit", lambda: runtime_apply.remove(["m"]))
    assert run("remove", "watch").returncode == 0
    assert (nft.tables(), runtime_status.loaded()) == ((), ())


def killed_before(step: str, work: Callable[[], object], of: object = store.Store) -> None:
    """Do the work in a process that is killed when it comes to a step."""

    def broken() -> None:
        setattr(of, step, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        work()

    _, how = os.waitpid(forked(broken), 0)
    assert os.WIFSIGNALED(how)


@pytest.mark.parametrize("many", [2, 8])
def test_several_at_once_come_one_after_the_other(host, many):
    started = []
    for number in range(many):
        one = subprocess.Popen(
            [*commands.command(), "apply", "-"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        one.stdin.write(MARK.format(name="m", priority=0, dscp=4 * (number + 1)))
        started.append(one)
    for one in started:
        one.stdin.close()
    for one in started:
        assert (one.wait(60), one.stdout.read(), one.stderr.read()) == (0, "loaded m\n", "")
        one.stdout.close()
        one.stderr.close()
    found = store.Store(store.directory())
    assert [one.number for one in found.generations()] == list(range(many, 0, -1))
    (unit,) = found.state.units
    assert f"set dscp {last_dscp()} " in unit.source.text
    assert [(s.state, s.drift) for s in runtime_status.loaded()] == [("on", False)]
    assert found.state.generation == many
