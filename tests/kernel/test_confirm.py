"""`apply --confirm`: it goes back by itself, whatever becomes of who applied it."""

import ast
import fcntl
import json
import os
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest

from runtime import apply as runtime_apply
from runtime import nft, store, warden
from runtime import status as runtime_status
from runtime.errors import MachineError
from tests.kernel.test_apply import MARK, counts, last_dscp, policy, send
from tests.support import commands
from tests.support.commands import (
    PATIENCE,
    alive,
    lasting,
    one_message,
    pending,
    processes,
    rules,
    run,
    until,
)

FINE = """
policy watch {
    at output
    interest { protocol udp }
    flow conn by daddr, dport timeout 1h max 16
    classify { few when conn.packets <= 3; many }
    log { count conn }
    process { few { set dscp 4 } many { set dscp 8 } }
}
"""
# Neither the ports of the flows nor the class `few` are left of it.
COARSE = FINE.replace("by daddr, dport", "by daddr").replace("few", "little").replace("4 }", "16 }")
OLD, NEW = (MARK.format(name="m", priority=0, dscp=dscp) for dscp in (4, 16))


@pytest.fixture
def file(host, tmp_path):
    """A policy file; the machine is a namespace of its own."""
    with commands.nothing_left():
        yield tmp_path / "m.itm"


@pytest.fixture
def applied(file):
    """OLD is applied, NEW stands in the file."""
    file.write_text(OLD)
    assert run("apply", str(file)).returncode == 0
    file.write_text(NEW)
    return file


def test_it_returns_at_once_and_goes_back_with_what_was_learned(file):
    file.write_text(FINE)
    run("apply", str(file))
    send(5, port=9)
    send(2, port=10)
    before = runtime_status.flow_counts("watch"), counts("watch"), rules()
    assert before[:2] == (
        {"conn": {("127.0.0.1", 9): (5, 145), ("127.0.0.1", 10): (2, 58)}},
        {"few": 6, "many": 1},
    )
    file.write_text(COARSE)
    done = run("apply", "--confirm", lasting(2), str(file))
    assert done.returncode == 0
    assert done.stderr == (
        "itmc: watch: class_few goes, with what it learned: there is no class few any more\n"
    )
    assert f"`itmc confirm` within {lasting(2)} keeps it, else it is rolled back" in done.stdout
    left = float(pending()["until"]) - time.clock_gettime(time.CLOCK_BOOTTIME)
    assert 0 < left < 2 * PATIENCE
    assert runtime_status.flow_counts("watch") == {"conn": {("127.0.0.1",): (7, 203)}}
    took = until(lambda: rules() == before[2])
    assert left - 0.3 < took < left + 3 * PATIENCE
    until(lambda: not pending())
    assert (runtime_status.flow_counts("watch"), counts("watch")) == before[:2]
    assert [(s.state, s.drift) for s in runtime_status.loaded()] == [("on", False)]
    send(1, port=10)  # the third of its flow
    send(1, port=9)  # the sixth
    assert counts("watch") == {"few": 7, "many": 2}


def test_confirm_in_time_keeps_it(applied):
    run("apply", "--confirm", lasting(2), str(applied))
    watching = pending()["warden"]
    done = run("confirm")
    assert (done.returncode, done.stdout) == (0, "confirmed: generation 2 stays\n")
    until(lambda: not alive(watching), 1)
    time.sleep(2 * PATIENCE)
    assert last_dscp() == 16
    again = run("confirm")
    assert (again.returncode, one_message(again)) == (2, "itmc: nothing waits to be confirmed")


def test_confirm_that_comes_too_late_says_so(applied):
    run("apply", "--confirm", lasting(0.2), str(applied))
    until(lambda: last_dscp() == 4)
    until(lambda: not pending())
    done = run("confirm")
    assert (done.returncode, one_message(done)) == (5, "itmc: too late: it was rolled back")
    # It is so no longer once something else was changed.
    run("apply", str(applied))
    assert run("confirm").returncode == 2


def test_confirm_after_the_deadline_but_before_anybody_went_back(applied):
    run("apply", "--confirm", lasting(0.5), str(applied))
    os.kill(pending()["warden"], signal.SIGKILL)
    time.sleep(0.6 * PATIENCE)
    assert last_dscp() == 16
    done = run("confirm")
    assert (done.returncode, one_message(done)) == (5, "itmc: too late: it was rolled back")
    assert last_dscp() == 4


def test_nothing_was_ever_to_be_confirmed(file):
    assert run("confirm").returncode == 2


@pytest.mark.parametrize(("confirms", "code"), [(True, 0), (False, 5)])
def test_wait_tells_how_it_ended(applied, confirms, code):
    waiting = subprocess.Popen(
        [*commands.command(), "apply", "--confirm", lasting(3), "--wait", str(applied)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until(lambda: pending() and last_dscp() == 16)
    if confirms:
        run("confirm")
    said, told = waiting.communicate(timeout=30 * PATIENCE)
    assert waiting.returncode == code
    assert last_dscp() == (16 if confirms else 4)
    assert ("confirmed" in said, "rolled back" in told) == (confirms, not confirms)


def test_wait_is_answered_by_rollback_too(applied):
    waiting = subprocess.Popen(
        [*commands.command(), "apply", "--confirm", lasting(60), "--wait", str(applied)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until(lambda: pending() and last_dscp() == 16)
    assert run("rollback").returncode == 0
    waiting.communicate(timeout=10 * PATIENCE)
    assert (waiting.returncode, last_dscp()) == (5, 4)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("step", ["_load", "commit", "seen", "keep"])
def test_it_goes_back_when_the_applying_process_is_killed(file, first, step):
    """Right before the transaction, right after it, before and after the state is written."""
    if not first:
        file.write_text(OLD)
        run("apply", str(file))
    before = rules()
    file.write_text(NEW)
    where = {
        "_load": "runtime.apply", "commit": "runtime.store.Store", "seen": "runtime.store.Store",
        "keep": "runtime.cli.apply",
    }[step]  # fmt: skip
    name = "report" if step == "keep" else step
    kill = (
        "import os, runtime.apply, runtime.store, runtime.cli.apply\n"
        f"own, real = os.getpid(), {where}.{name}\n"
        f"{where}.{name} = lambda *a, **k: os.kill(own, 9) if os.getpid() == own else real(*a, **k)"
    )
    done = run("apply", "--confirm", lasting(1), str(file), before=kill)
    assert done.returncode == -signal.SIGKILL
    watching = pending()["warden"]
    assert (rules() == before) is (step == "_load")
    until(lambda: not alive(watching))
    assert rules() == before
    assert not pending()
    assert [s.state for s in runtime_status.loaded()] == ([] if first else ["on"])
    assert run("confirm").returncode in ((2, 5) if step == "_load" else (5,))


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT", "SIGTERM", "SIGPIPE", "SIGQUIT"])
def test_it_goes_back_when_its_session_is_ended(applied, name):
    one = getattr(signal, name)
    shell = subprocess.Popen(
        ["sh", "-c", '"$@"; sleep 60', "sh", *commands.command(), "apply", "--confirm", lasting(2),
         str(applied)],
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until(lambda: pending().get("warden") and last_dscp() == 16)
    watching = pending()["warden"]
    os.killpg(shell.pid, one)
    os.kill(watching, one)
    if one != signal.SIGPIPE:
        time.sleep(0.1 * PATIENCE)
    os.killpg(shell.pid, signal.SIGKILL)
    shell.wait()
    assert os.getsid(watching) not in (os.getsid(0), shell.pid)
    assert last_dscp() == 16
    until(lambda: last_dscp() == 4)


def test_it_goes_back_when_its_terminal_goes_away(applied):
    mine, terminal = os.openpty()
    shell = subprocess.Popen(
        ["sh", "-c", '"$@"; sleep 60', "sh", *commands.command(), "apply", "--confirm", lasting(2),
         str(applied)],
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(terminal)
    until(lambda: pending().get("warden") and last_dscp() == 16)
    watching = pending()["warden"]
    os.close(mine)
    assert shell.wait(10 * PATIENCE) == -signal.SIGHUP
    assert alive(watching)
    until(lambda: last_dscp() == 4)


@pytest.mark.parametrize("streams", [">&- 2>&-", "<&- >&- 2>&-", "| true", "2>&1 | true"])
def test_it_goes_back_when_nobody_reads_what_it_says(applied, streams):
    shell = ["bash", "-c", f'"$@" {streams}', "sh"]
    subprocess.run(
        [*shell, *commands.command(), "apply", "--confirm", lasting(1), applied], check=False
    )
    assert (last_dscp(), pending()["generation"]) == (16, 2)
    until(lambda: last_dscp() == 4)


def test_it_needs_neither_the_file_nor_the_folder_it_was_started_in(host, tmp_path, monkeypatch):
    """Its state may be named by a path from there."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ITM_STATE_DIR", "../state")
    Path("m.itm").write_text(OLD)
    run("apply", "m.itm")
    Path("m.itm").write_text(NEW)
    run("apply", "--confirm", lasting(1))
    watching = pending()["warden"]
    assert os.readlink(f"/proc/{watching}/cwd") == "/"
    Path("m.itm").unlink()
    folder.rmdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ITM_STATE_DIR", "state")
    assert last_dscp() == 16
    until(lambda: last_dscp() == 4)


def test_the_first_apply_of_all_goes_back_to_nothing(file):
    nft.load("table inet theirs {\n}\n")
    file.write_text(NEW)
    run("apply", "--confirm", lasting(0.5), str(file))
    assert nft.tables() == ("inet itm_m", "inet theirs")
    until(lambda: not pending())
    assert nft.tables() == ("inet theirs",)
    assert runtime_status.loaded() == ()
    assert run("list").stdout == "no policy is loaded\n"
    assert run("apply", str(file)).returncode == 0


def test_what_was_added_taken_away_and_switched_goes_back(file):
    both = MARK.format(name="a", priority=0, dscp=4) + MARK.format(name="b", priority=1, dscp=8)
    file.write_text(both)
    run("apply", str(file))
    run("disable", "a")
    before, states = rules(), {s.name: s.state for s in runtime_status.loaded()}
    assert states == {"a": "off", "b": "on"}
    file.write_text(both.replace("policy b", "policy c"))
    run("apply", "--confirm", lasting(0.5), str(file))
    assert {s.name: s.state for s in runtime_status.loaded()} == {"a": "off", "c": "on"}
    until(lambda: not pending())
    assert (rules(), {s.name: s.state for s in runtime_status.loaded()}) == (before, states)


def test_while_it_waits_nothing_else_changes_anything(applied):
    run("apply", "--confirm", lasting(60), str(applied))
    watching = pending()["warden"]
    other = applied.with_name("other.itm")
    other.write_text(OLD.replace("policy m", "policy n"))
    before = rules()
    for words in (
        ("apply", str(applied)), ("apply", str(other)), ("apply", "--confirm", lasting(5), str(other)),
        ("remove", "m"), ("remove", "--all"),
        ("set", "m.x", "3"), ("enable", "m"), ("disable", "m"),
    ):  # fmt: skip
        done = run(*words)
        assert done.returncode == 3, words
        assert one_message(done) == (
            "itmc: the last `apply --confirm` waits to be confirmed; nothing was changed"
        )
        assert "`itmc confirm` keeps it, `itmc rollback` takes it back" in done.stderr
        assert rules() == before
    assert run("plan", str(applied)).returncode == 0
    done = run("rollback")
    assert (done.returncode, done.stdout.startswith("back to generation 1: ")) == (0, True)
    assert last_dscp() == 4
    until(lambda: not alive(watching), 1)
    assert run("disable", "m").returncode == 0


def test_status_and_list_say_what_waits(applied):
    assert json.loads(run("status", "--json").stdout)["pending"] is None
    run("apply", "--confirm", lasting(60), str(applied))
    for words in (["status"], ["list"]):
        told = run(*words).stdout.splitlines()[0]
        assert told.startswith("generation 2 waits for `itmc confirm`: ")
        assert told.endswith(" s left, then back to generation 1")
        found = json.loads(run(*words, "--json").stdout)["pending"]
        assert 50 < found.pop("seconds") / PATIENCE < 60
        assert found == {"generation": 2, "back": 1, "overdue": False}


def test_a_dead_warden_is_made_up_for_by_the_next_change(applied):
    run("apply", "--confirm", lasting(0.5), str(applied))
    os.kill(pending()["warden"], signal.SIGKILL)
    time.sleep(0.6 * PATIENCE)
    for words in (["status"], ["list"]):
        assert run(*words).stdout.splitlines()[0] == (
            "generation 2 was not confirmed in time: `itmc rollback`, or the next change, goes "
            "back to generation 1"
        )
        found = json.loads(run(*words, "--json").stdout)["pending"]
        assert found == {"generation": 2, "back": 1, "seconds": 0.0, "overdue": True}
    assert run("apply", "--dry-run", str(applied)).returncode == 0  # it only looks
    assert last_dscp() == 16
    other = applied.with_name("other.itm")
    other.write_text(OLD.replace("policy m", "policy n").replace("dscp 4", "dscp 8"))
    done = run("apply", str(other))
    assert (done.returncode, done.stdout) == (0, "loaded n\n")
    assert "not confirmed in time; rolled back to generation 1 first" in one_message(done)
    run("disable", "n")
    assert last_dscp() == 4
    assert (pending(), run("status").stdout.startswith("m: on")) == ({}, True)


def test_an_empty_plan_has_nothing_to_confirm(applied):
    applied.write_text(OLD)
    done = run("apply", "--confirm", lasting(60), "--wait", str(applied))
    assert done.returncode == 0
    assert done.stdout.endswith("nothing changed: there is nothing to confirm\n")
    assert (pending(), processes()) == ({}, {})


def test_a_refusal_leaves_nothing_waiting(applied):
    refuse = "import runtime.plan\nruntime.plan.Script.text = property(lambda self: 'nonsense\\n')"
    before = rules()
    done = run("apply", "--confirm", lasting(60), str(applied), before=refuse)
    assert (done.returncode, rules(), pending()) == (3, before, {})
    until(lambda: not processes(), 1)
    assert run("rollback", "--list").stdout.count("apply") == 1


def test_ctrl_c_in_the_middle_leaves_the_way_back_armed(applied):
    """It comes when the kernel has decided: nothing is loaded that nobody watches."""
    interrupt = (
        "import os, signal, runtime.nft as nft\n"
        "load = nft.load\n"
        "def slow(*a, **k):\n"
        "    os.killpg(0, signal.SIGINT)\n"
        "    load(*a, **k)\n"
        "nft.load = slow"
    )
    done = subprocess.run(
        [*commands.command(interrupt), "apply", "--confirm", lasting(1), str(applied)],
        start_new_session=True, check=False,
    )  # fmt: skip
    assert done.returncode == 130
    assert (last_dscp(), pending()["generation"]) == (16, 2)
    assert [(s.state, s.drift) for s in runtime_status.loaded()] == [("on", False)]
    until(lambda: last_dscp() == 4)


def test_nothing_is_left_and_nobody_is_kept_waiting(applied):
    run("apply", "--confirm", lasting(2), str(applied))
    watching = pending()["warden"]
    assert set(processes()) == {watching}
    assert processes()[watching] in "SDR"
    # Nothing of its parent's is open: no terminal, no pipe, no lock.
    links = {os.readlink(one) for one in Path(f"/proc/{watching}/fd").iterdir()}
    assert links == {"/dev/null"}
    begun = time.monotonic()
    with store.locked():
        assert time.monotonic() - begun < 0.5 * PATIENCE
    assert run("status").returncode == 0
    assert run("apply", str(applied)).returncode == 3
    until(lambda: not processes() and not alive(watching))
    assert last_dscp() == 4
    assert {one.name for one in store.directory().iterdir()} == {
        "lock", "state.json", "rolled-back.json",
        *(f"generation-{n}.json.gz" for n in (1, 2)),
    }  # fmt: skip


def test_called_as_a_library_it_leaves_no_zombie(host):
    others = commands.zombies()  # of tests that failed
    runtime_apply.apply(policy(OLD))
    for _ in range(3):
        runtime_apply.apply(policy(NEW), confirm=0.2 * PATIENCE)
        until(lambda: not pending())
        until(lambda: not processes())
    assert (commands.zombies(), last_dscp()) == (others, 4)


def test_waiting_costs_nothing(applied):
    run("apply", "--confirm", lasting(3), str(applied))
    watching = pending()["warden"]
    time.sleep(2 * PATIENCE)
    spent = Path(f"/proc/{watching}/stat").read_text().rpartition(")")[2].split()[11:13]
    assert sum(map(int, spent)) <= 10 * PATIENCE  # hundredths of a second


@pytest.mark.parametrize("jump", [-(10**9), 10**9])
def test_the_wall_clock_does_not_matter(applied, jump):
    """It jumps between all calls, in the warden, too."""
    clock = f"import time, itertools\nreal, calls = time.time, itertools.count()\ntime.time = lambda: real() + next(calls) * {jump}"  # fmt: skip
    run("apply", "--confirm", lasting(2), str(applied), before=clock)
    assert run("status", before=clock).stdout.startswith("generation 2 waits for")
    time.sleep(0.5 * PATIENCE)
    assert last_dscp() == 16
    took = until(lambda: last_dscp() == 4)
    assert took < 3 * PATIENCE
    run("apply", "--confirm", lasting(60), str(applied), before=clock)
    assert run("confirm", before=clock).returncode == 0
    assert last_dscp() == 16


def test_only_the_clock_that_nobody_sets_decides():
    asked = {
        node.attr
        for node in ast.walk(ast.parse(Path(warden.__file__).read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "time"
    }
    assert asked == {"sleep"}
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert before <= store.now() <= time.clock_gettime(time.CLOCK_BOOTTIME)


def test_another_boot_is_overdue(applied):
    run("apply", "--confirm", lasting(60), str(applied))
    os.kill(pending()["warden"], signal.SIGKILL)
    path = store.directory() / "pending.json"
    path.write_text(json.dumps({**pending(), "boot": "another"}))
    assert json.loads(run("list", "--json").stdout)["pending"]["overdue"] is True
    assert run("confirm").returncode == 5
    assert last_dscp() == 4


def test_without_a_warden_nothing_is_changed(applied, monkeypatch):
    """As where no more processes may be started."""
    before = rules()
    monkeypatch.setattr(warden, "_warden", lambda *_: None)
    with pytest.raises(MachineError, match="cannot be started; nothing was changed"):
        runtime_apply.apply(policy(NEW, str(applied)), confirm=60)
    assert (rules(), pending()) == (before, {})


@pytest.mark.parametrize("words", [
    ("--confirm", "x"), ("--confirm", "0s"), ("--confirm", "8d"), ("--confirm", "-5s"),
    ("--wait",), ("--confirm", "5s", "--dry-run"),
])  # fmt: skip
def test_wrong_use(applied, words):
    before = rules()
    assert run("apply", *words, str(applied)).returncode == 2
    assert (rules(), pending()) == (before, {})
