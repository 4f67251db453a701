"""`itmc boot`: what was confirmed last comes back after a reboot, and nothing else.

A reboot, as far as it matters, is: no tables, no state of this namespace, what was kept
for the boot still there.
"""

import gzip
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from runtime import nft, store
from runtime import status as runtime_status
from runtime.traffic import Namespace
from tests.kernel.test_apply import MARK, last_dscp, send
from tests.kernel.test_generations import WATCH
from tests.kernel.test_libitm import program
from tests.support import commands
from tests.support.commands import one_message, pending, rules, run, until

NAME = f"itm-boot-{os.getpid()}"


@pytest.fixture
def box(tmp_path, monkeypatch):
    """The test runs in a namespace of `ip netns`, with a state folder of its own."""
    monkeypatch.setenv("ITM_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    if subprocess.run(["ip", "netns", "add", NAME], check=False).returncode:
        pytest.skip("needs root and ip netns")
    subprocess.run(["ip", "-n", NAME, "link", "set", "lo", "up"], check=True)
    try:
        with (
            open(f"/run/netns/{NAME}", "rb") as file,
            Namespace(NAME, file).entered(),
            commands.nothing_left(),
        ):
            yield tmp_path / "state/boot" / f"netns-{NAME}.json.gz"
    finally:
        subprocess.run(["ip", "netns", "delete", NAME], check=True)


def mark(dscp: int) -> None:
    Path("m.itm").write_text(MARK.format(name="m", priority=0, dscp=dscp))


def reboot() -> None:
    for process in commands.processes():  # nobody who waits to go back outlives it
        os.kill(process, 9)
    shutil.rmtree(store.directory())
    nft.load(
        "".join(f"delete table {path}\n" for path in nft.tables())
        or "add table inet x\ndelete table inet x\n"
    )


def test_what_was_applied_is_there_again_without_its_files(box):
    Path("lib.itm").write_text("set web = { 80, 443 }\n")
    Path("m.itm").write_text(WATCH + MARK.format(name="m", priority=0, dscp=4))
    Path("other.itm").write_text(MARK.format(name="n", priority=0, dscp=8))
    run("apply", "m.itm")
    run("apply", "other.itm")
    run("disable", "m")
    run("set", "watch.threshold", "5")
    send(4)
    before, order = rules(), [s.name for s in runtime_status.loaded()]
    reboot()
    for file in Path().glob("*.itm"):
        file.unlink()
    assert nft.tables() == ()
    done = run("boot")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "generation 4 (set watch.threshold 5): watch, m, n\n"
    assert rules() == before
    assert [s.name for s in runtime_status.loaded()] == order
    assert {s.name: (s.state, s.drift) for s in runtime_status.loaded()} == {
        "watch": ("on", False), "m": ("off", False), "n": ("on", False),
    }  # fmt: skip
    assert last_dscp() == 8
    assert runtime_status.flow_counts("watch")["conn"].keys() == {("127.0.0.1", 9)}
    (made,) = json.loads(run("rollback", "--list", "--json").stdout)["generations"]
    assert (made["number"], made["why"]) == (1, "boot: set watch.threshold 5")


def test_twice_in_a_row_is_harmless(box):
    mark(4)
    run("apply", "m.itm")
    for _ in range(2):  # also where nothing was rebooted
        done = run("boot")
        assert (done.returncode, done.stdout) == (0, "generation 1 (apply m.itm): m as it was\n")
    reboot()
    run("boot")
    send(3)
    before, counted = rules(), runtime_status.status()[0].classes
    done = run("boot")
    assert (done.returncode, done.stdout.endswith(": m as it was\n")) == (0, True)
    assert (rules(), runtime_status.status()[0].classes) == (before, counted)
    assert len(store.Store(store.directory()).generations()) == 1
    # Three boots later it still says what was applied.
    for _ in range(3):
        reboot()
        assert run("boot").stdout.endswith(" (boot: apply m.itm): m\n")


def test_what_waited_to_be_confirmed_is_not_there_again(box):
    mark(4)
    run("apply", "m.itm")
    mark(16)
    run("apply", "--confirm", "60s", "m.itm")
    assert last_dscp() == 16
    reboot()
    assert run("boot").returncode == 0
    assert last_dscp() == 4
    # Once it is confirmed, it is; and what was rolled back is not.
    run("apply", "--confirm", "60s", "m.itm")
    run("confirm")
    mark(8)
    run("apply", "--confirm", "200ms", "m.itm")
    until(lambda: not pending())
    reboot()
    run("boot")
    assert last_dscp() == 16


def test_what_was_killed_before_it_was_written_down_is_not_kept_before_it_is_confirmed(box):
    mark(4)
    run("apply", "m.itm")
    mark(16)
    kill = (
        "import os, runtime.store as s\nown, real = os.getpid(), s.Store.commit\n"
        "s.Store.commit = lambda *a: os.kill(own, 9) if os.getpid() == own else real(*a)"
    )
    run("apply", "--confirm", "60s", "m.itm", before=kill)
    assert (last_dscp(), run("disable", "m").returncode) == (16, 3)
    kept = box.read_bytes()
    assert run("confirm").returncode == 0
    assert (last_dscp(), box.read_bytes() != kept) == (16, True)
    mark(8)
    run("apply", "--confirm", "60s", "m.itm", before=kill)
    assert (last_dscp(), run("disable", "m").returncode) == (8, 3)
    reboot()
    run("boot")
    assert last_dscp() == 16


def test_what_was_never_confirmed_leaves_nothing_for_the_boot(box):
    mark(4)
    run("apply", "--confirm", "60s", "m.itm")
    assert not box.exists()
    reboot()
    done = run("boot")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "no policies were kept for this network namespace: nothing to load\n"
    assert nft.tables() == ()


def test_rollback_and_remove_hold_after_a_boot(box):
    for dscp in (4, 8):
        mark(dscp)
        run("apply", "m.itm")
    run("rollback")
    reboot()
    run("boot")
    assert last_dscp() == 4
    run("remove", "m")
    reboot()
    done = run("boot")
    assert (done.returncode, done.stdout) == (0, "generation 2 (remove m): nothing as it was\n")
    assert nft.tables() == ()


def test_back_to_the_time_before_all_holds_after_a_boot(box):
    mark(4)
    run("apply", "m.itm")
    assert box.exists()
    run("rollback")
    assert not box.exists()
    reboot()
    assert run("boot").returncode == 0
    assert nft.tables() == ()


def test_where_nothing_was_ever_applied_the_boot_is_no_failure(box):
    done = run("boot")
    assert (done.returncode, done.stderr) == (0, "")
    assert not store.directory().exists()


def test_a_namespace_without_a_name_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("ITM_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    mark(4)
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", '"$@" apply m.itm && "$@" boot', "sh", *commands.command()],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "Operation not permitted" in done.stderr:
        pytest.skip("needs root")
    assert done.stdout.startswith("loaded m\nno policies were kept for this network namespace")
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "state/boot").exists()


@pytest.mark.parametrize("damage", [
    lambda raw: b"",
    lambda raw: raw[:100],
    lambda raw: raw[:60] + bytes([raw[60] ^ 1]) + raw[61:],
    lambda raw: b"no gzip",
    lambda raw: gzip.compress(b"[]"),
    lambda raw: gzip.compress(b'{"schema": 6}'),
])  # fmt: skip
def test_a_damaged_file_is_a_clear_error(box, damage):
    mark(4)
    run("apply", "m.itm")
    reboot()
    box.write_bytes(damage(box.read_bytes()))
    done = run("boot")
    assert (done.returncode, nft.tables()) == (3, ())
    assert f"{box} cannot be used: " in one_message(done)
    # Applying mends it.
    assert run("apply", "m.itm").returncode == 0
    reboot()
    assert run("boot").returncode == 0
    assert last_dscp() == 4


def test_a_file_of_another_version_is_a_clear_error(box):
    mark(4)
    run("apply", "m.itm")
    reboot()
    data = json.loads(gzip.decompress(box.read_bytes()))
    box.write_bytes(gzip.compress(json.dumps({**data, "schema": 99}).encode()))
    done = run("boot")
    assert (done.returncode, nft.tables()) == (3, ())
    assert f"{box} has version 99, not {store.SCHEMA}" in one_message(done)


def test_what_the_kernel_refuses_at_boot_is_told_and_nothing_is_loaded(box):
    mark(4)
    run("apply", "m.itm")
    reboot()
    refuse = "import runtime.plan\nruntime.plan.Script.text = property(lambda self: 'nonsense\\n')"
    done = run("boot", before=refuse)
    assert (done.returncode, nft.tables()) == (3, ())
    assert "nftables refused the ruleset; nothing was changed" in done.stderr
    assert run("boot").returncode == 0
    assert last_dscp() == 4


def test_programs_are_not_loaded_again(box, tmp_path):
    """Whoever served their packets is gone; what else was confirmed comes back."""
    mark(4)
    with program(tmp_path):
        run("apply", "m.itm")
        assert [s.name for s in runtime_status.loaded()] == ["program_output", "m"]
    reboot()
    assert run("boot").returncode == 0
    assert [s.name for s in runtime_status.loaded()] == ["m"]
