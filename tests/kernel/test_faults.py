"""What can be wrong with the machine: one clear message, the right exit code, and the rules stay."""

import gzip
import json
import os
import shlex
import subprocess
import time

import pytest

from runtime import status as runtime_status
from runtime import store
from tests.kernel.test_apply import MARK, last_dscp
from tests.support import commands
from tests.support.commands import one_message, pending, processes, rules, run, until

OLD, NEW = (MARK.format(name="m", priority=0, dscp=dscp) for dscp in (4, 16))
CHANGES = (
    ("apply", "m.itm"), ("apply", "--confirm", "5s", "m.itm"), ("remove", "m"), ("remove", "--all"),
    ("disable", "m"), ("rollback",),
)  # fmt: skip
LOOKS = (("status",), ("list",), ("plan", "m.itm"))


@pytest.fixture
def applied(host, tmp_path, monkeypatch):
    """OLD is applied, NEW stands in `m.itm`; both are generations' worth of going back."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "m.itm"
    with commands.nothing_left():
        for text in (NEW, OLD):
            file.write_text(text)
            assert run("apply", "m.itm").returncode == 0
        file.write_text(NEW)
        yield file


def refused(code: int, *words: str, before: str = "", by: tuple[str, ...] = ()) -> str:
    """The one message of a command that fails; the rules stay as they are."""
    found = rules()
    done = run(*words, before=before, by=by)
    assert (done.returncode, rules()) == (code, found), (words, done.stderr)
    return one_message(done)


# The policy.


@pytest.mark.parametrize("words", [(), ("--confirm", "5s"), ("--dry-run",)])
def test_a_policy_that_does_not_compile(applied, words):
    applied.write_text(NEW.replace("set dscp", "set dcsp"))
    done = run("apply", *words, "m.itm")
    assert (done.returncode, last_dscp()) == (1, 4)
    assert done.stderr.startswith("m.itm:7:")
    assert (pending(), store.load().generation) == ({}, 2)


# The disk.


def in_a_small_folder(script: str, size: str = "256k") -> list[str]:
    """What a shell script prints whose state folder is a small file system of its own.

    `fill N` fills it but for N pages. `itmc` is at hand; errors go to stdout, too.
    """
    itmc = shlex.join(commands.command())
    setup = f"""
    mkdir state; mount -t tmpfs -o size={size} tmpfs state; export ITM_STATE_DIR=$PWD/state
    itmc() {{ {itmc} "$@" 2>&1 && echo "exit 0" || echo "exit $?"; }}
    free() {{ stat -f -c %f state; }}
    fill() {{ rm -f state/fill; head -c $((4096 * ($(free) - $1))) /dev/zero >state/fill; }}
    marks() {{ nft --numeric list chain inet itm_m class_all | grep -o 'ip dscp set 0x..' || true; }}
    """
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-euc", setup + script],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "Traceback" not in done.stdout
    return done.stdout.splitlines()


def bulky(text: str) -> str:
    """Hardly compressed, so that a generation takes several pages."""
    return text + "".join(f"# {os.urandom(30).hex()}\n" for _ in range(150))


def test_a_full_disk_however_little_room_there_is(host, tmp_path, monkeypatch):
    """With less and less of what a change must write: it fits as a whole, or nothing is changed."""
    monkeypatch.chdir(tmp_path)
    for name, text in (("old", OLD), ("new", NEW)):
        (tmp_path / name).write_text(bulky(text))
    said = in_a_small_folder("""
    cp old m.itm; itmc apply m.itm
    for pages in 0 1 2 3 4 5 6 7 8 9 10; do
      echo "== $pages"
      cp new m.itm; fill $pages; itmc apply m.itm; marks; ls state/net-*/*.part 2>&1 | grep -v "No such" || true
      rm state/fill; cp old m.itm; itmc apply m.itm; marks
    done
    """)
    rounds = "\n".join(said).split("== ")[1:]
    took = [_full(one.splitlines()[1:]) for one in rounds]
    assert (took[0], took[1], took[-1]) == (False, False, True)
    assert took == sorted(took)


def _full(lines: list[str]) -> bool:
    """One round: was the change made? And was all as it should be?"""
    last = ["exit 0", "ip dscp set 0x04"]
    assert lines[-2:] == last
    assert lines[-3].startswith("loaded m")
    if "exit 0" in lines[:-3]:
        assert lines[0] == "loaded m"
        assert lines[-4] == "ip dscp set 0x10"
        return True
    (message,) = [line for line in lines[:-3] if line.startswith("itmc: ")]
    assert message.endswith("cannot be written: No space left on device; nothing was changed")
    assert lines[-5:-3] == ["exit 3", "ip dscp set 0x04"]
    assert len(lines) == 7  # message, help, exit, marks; no half-written file
    return False


def test_a_disk_that_fills_while_a_change_waits(host, tmp_path, monkeypatch):
    """The rules go back all the same; that it cannot be written down shows as drift."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.itm").write_text(OLD)
    (tmp_path / "new.itm").write_text(NEW)
    said = in_a_small_folder("""
    itmc apply m.itm
    cp new.itm m.itm
    itmc apply --confirm 1s m.itm
    marks
    fill 0
    sleep 2
    marks
    itmc confirm
    itmc apply m.itm
    itmc status
    rm state/fill
    itmc rollback
    itmc status
    """)
    marks = [line for line in said if line.startswith("ip dscp")]
    assert marks == ["ip dscp set 0x10", "ip dscp set 0x04"]
    assert [line for line in said if line.startswith("exit")][2:] == [
        "exit 5", "exit 3", "exit 0", "exit 0", "exit 0",
    ]  # fmt: skip
    assert "too late: it was rolled back" in "\n".join(said)
    assert "\n".join(said).count("changed by something else") == 1


def test_confirm_needs_no_room(host, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.itm").write_text(OLD)
    said = in_a_small_folder("""
    itmc apply --confirm 1s m.itm; fill 0; itmc confirm; sleep 1.5; marks
    """)
    assert "confirmed: generation 1 stays" in said
    assert said[-1] == "ip dscp set 0x04"


def test_a_read_only_state_folder(host, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.itm").write_text(OLD)
    (tmp_path / "new.itm").write_text(NEW)
    said = in_a_small_folder("""
    itmc apply m.itm >/dev/null
    cp new.itm m.itm
    mount -o remount,ro state
    for words in "apply m.itm" "apply --confirm 5s m.itm" "remove m" "disable m" "rollback"; do
      itmc $words; marks
    done
    echo ==; itmc list | tail -1; itmc status | head -1; itmc plan m.itm | tail -1
    mount -o remount,rw state; itmc apply m.itm; marks
    """)
    cut = said.index("==")
    for at in range(0, cut, 4):
        assert said[at].startswith("itmc: the state folder ")
        assert said[at].endswith("cannot be written: Read-only file system; nothing was changed")
        assert said[at + 1].startswith("      = help: ")
        assert said[at + 2 : at + 4] == ["exit 3", "ip dscp set 0x04"]
    assert cut == 20
    assert [line for line in said[cut:] if line.startswith("exit")] == ["exit 0"] * 3
    assert said[-1] == "ip dscp set 0x10"


# The state.


def damage(name: str, change) -> None:
    path = store.directory() / name
    path.write_bytes(change(path.read_bytes()))


def with_values(**values):
    return lambda raw: json.dumps({**json.loads(raw), **values}).encode()


STATES = {
    "empty": lambda raw: b"",
    "cut": lambda raw: raw[: len(raw) // 2],
    "zeroes": lambda raw: b"\0" * len(raw),
    "text": lambda raw: b"hello",
    "no_utf8": lambda raw: b"\xff\xfe" + raw,
    "list": lambda raw: b"[1, 2]",
    "null": lambda raw: b"null",
    "deep": lambda raw: b"[" * 100_000,
    "no_schema": lambda raw: b"{}",
    "generation_is_text": with_values(generation="x"),
    "generation_is_infinite": lambda raw: raw.replace(b'"generation": 2', b'"generation": Infinity'),
    "generation_is_gone": with_values(generation=77),
    "kept_is_a_number": with_values(kept=3),
    "kept_holds_text": with_values(kept=["x"]),
    "listed_is_a_list": with_values(listed=[]),
    "listed_holds_numbers": with_values(listed={"inet itm_m": 3}),
    "applied_is_null": with_values(applied=None),
    "applied_holds_text": with_values(applied={"m": "today"}),
}  # fmt: skip


@pytest.mark.parametrize("change", STATES)
def test_a_damaged_state_file(applied, change):
    damage("state.json", STATES[change])
    for words in (CHANGES[0], CHANGES[3], CHANGES[5], *LOOKS):
        message = refused(3, *words)
        name = "generation-77.json.gz" if change == "generation_is_gone" else "state.json"
        assert f"{name} cannot be used: " in message, message
        assert "nothing was changed" in message
    assert last_dscp() == 4


def test_a_state_of_another_version(applied):
    for version in (store.SCHEMA - 1, store.SCHEMA + 1, "x"):
        damage("state.json", with_values(schema=version))
        for words in (*CHANGES, *LOOKS):
            message = refused(3, *words)
            assert f"has version {version}, not {store.SCHEMA}; nothing was changed" in message
    # What the message's help says:
    for path in store.directory().iterdir():
        path.unlink()
    assert run("apply", "m.itm").returncode == 0
    assert (last_dscp(), [(s.state, s.drift) for s in runtime_status.loaded()]) == (
        16, [("on", False)],
    )  # fmt: skip


def as_json(change):
    return lambda raw: gzip.compress(json.dumps(change(json.loads(gzip.decompress(raw)))).encode())


GENERATIONS = {
    "empty": lambda raw: b"",
    "cut": lambda raw: raw[: len(raw) // 2],
    "flipped": lambda raw: raw[:200] + bytes([raw[200] ^ 0x20]) + raw[201:],
    "no_gzip": lambda raw: b"hello",
    "no_json": lambda raw: gzip.compress(b"hello"),
    "a_list": as_json(lambda data: [data]),
    "of_another_version": as_json(lambda data: {**data, "schema": 99}),
    "another_one": as_json(
        lambda data: {**data, "generation": {**data["generation"], "number": 9}}
    ),
    "no_units": as_json(lambda data: {**data, "units": []}),
    "units_of_text": as_json(lambda data: {**data, "units": ["x"]}),
    "a_unit_without_tables": as_json(
        lambda data: {**data, "units": [{**data["units"][0], "tables": None}]}
    ),
    "a_policy_too_many": as_json(
        lambda data: {**data, "policies": [*data["policies"], ["x", True]]}
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", [*GENERATIONS, "gone"])
def test_a_damaged_generation(applied, change):
    def break_it(number: int) -> None:
        if change == "gone":
            (store.directory() / f"generation-{number}.json.gz").unlink()
        else:
            damage(f"generation-{number}.json.gz", GENERATIONS[change])

    break_it(1)
    message = refused(3, "rollback")
    assert "generation-1.json.gz" in message
    assert "nothing was changed" in message
    assert run("rollback", "--list").stdout.count("apply m.itm") == 1
    assert run("apply", "m.itm").returncode == 0  # what holds is whole
    assert run("rollback").returncode == 0
    break_it(2)
    for words in (*CHANGES, *LOOKS):
        message = refused(3, *words)
        assert "generation-2.json.gz" in message
        assert "nothing was changed" in message
    assert last_dscp() == 4


PENDINGS = {
    "empty": lambda raw: b"",
    "cut": lambda raw: raw[:20],
    "null": lambda raw: b"null",
    "list": lambda raw: b"[]",
    "lacking": lambda raw: b'{"generation": 3}',
    "until_is_text": with_values(until="soon"),
    "until_is_nan": lambda raw: raw.replace(b'"until": ', b'"until": NaN, "x": '),
    "back_is_null": with_values(back=None),
}  # fmt: skip


@pytest.mark.parametrize("change", PENDINGS)
def test_a_damaged_record_of_what_waits(applied, change):
    """Nothing is changed on such grounds, and it goes back all the same."""
    run("apply", "--confirm", "2s", "m.itm")
    damage("pending.json", PENDINGS[change])
    for words in (CHANGES[0], ("confirm",), ("list",)):
        message = refused(3, *words)
        assert "pending.json cannot be used: it does not hold what it should" in message
    assert last_dscp() == 16
    until(lambda: last_dscp() == 4)
    until(lambda: not processes())
    assert run("apply", "m.itm").returncode == 0


def test_what_a_set_had_learned_may_be_lost_but_the_rules_go_back(applied):
    """Damage to what was kept of counters is no reason to stay cut off."""
    applied.write_text(
        NEW.replace("classify { all }", "classify { every }").replace("all {", "every {")
    )
    assert run("apply", "--confirm", "1s", "m.itm").returncode == 0
    (kept,) = store.directory().glob("left-*")
    kept.write_bytes(b"hello")
    assert last_dscp() == 16
    until(lambda: last_dscp() == 4)


# The namespace.


@pytest.fixture
def named(tmp_path, monkeypatch):
    """A namespace of `ip netns`: its name, and how to run something in it, whatever becomes of that."""
    monkeypatch.setenv("ITM_STATE_DIR", str(tmp_path / "state"))
    name = f"itm-test-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], check=False).returncode:
        pytest.skip("needs root and ip netns")
    inside = subprocess.Popen(["ip", "netns", "exec", name, "sleep", "600"])
    until(lambda: os.path.basename(os.readlink(f"/proc/{inside.pid}/exe")) != "ip")
    try:
        yield name, ("nsenter", f"--net=/proc/{inside.pid}/ns/net")
    finally:
        inside.kill()
        inside.wait()
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def marks_of(by) -> str:
    listing = subprocess.run(
        [*by, "nft", "--numeric", "list", "ruleset"], capture_output=True, text=True, check=True
    )
    return listing.stdout


def test_a_namespace_that_vanishes_while_a_change_waits(named, tmp_path):
    name, by = named
    file = tmp_path / "m.itm"
    for words, text in ((("apply",), OLD), (("apply", "--confirm", "2s"), NEW)):
        file.write_text(text)
        run(*words, str(file), by=("ip", "netns", "exec", name))
    assert "dscp set 0x10" in marks_of(by)
    subprocess.run(["ip", "netns", "delete", name], check=True)
    until(lambda: "dscp set 0x04" in marks_of(by))
    until(lambda: "waits" not in run("status", by=by).stdout)


def test_a_namespace_that_vanishes_while_a_policy_is_read(named, tmp_path):
    """It is there as long as somebody is in it; `itmc` is."""
    name, by = named
    applying = subprocess.Popen(
        ["ip", "netns", "exec", name, *commands.command(), "apply", "-"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    time.sleep(1)
    subprocess.run(["ip", "netns", "delete", name], check=True)
    assert applying.communicate(OLD, timeout=30) == ("loaded m\n", "")
    assert applying.returncode == 0
    assert "dscp set 0x04" in marks_of(by)


# Rights and libraries.


@pytest.mark.parametrize("words", [
    *CHANGES, *LOOKS, ("confirm",), ("enable", "m"), ("set", "m.x", "1"), ("flows", "m"), ("boot",),
    ("apply", "--dry-run", "m.itm"),
])  # fmt: skip
def test_no_right_to_change_the_network(applied, words):
    by = ("setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin")
    assert refused(3, *words, by=by) == "itmc: this needs the right to change the network"
    assert last_dscp() == 4


@pytest.mark.parametrize("broken", [
    "sys.modules['nftables'] = None",
    "import ctypes\nreal = ctypes.LibraryLoader.LoadLibrary\ndef load(self, name):\n"
        "    if 'nftables' in name: raise OSError(f'{name}: cannot open shared object file')\n"
        "    return real(self, name)\nctypes.LibraryLoader.LoadLibrary = load",
])  # fmt: skip
@pytest.mark.parametrize("words", [*CHANGES, *LOOKS])
def test_libnftables_is_missing(applied, broken, words):
    message = refused(3, *words, before=broken)
    assert message.startswith("itmc: libnftables cannot be loaded: ")
    assert (pending(), processes()) == ({}, {})
    assert run("apply", "m.itm").returncode == 0


def test_libnftables_crashes_in_the_transaction(applied):
    """Whether the kernel took it is asked of the kernel."""
    crash = (
        "import os, runtime.nft as nft\n"
        "own, run = os.getpid(), nft._run\n"
        "def crashing(script, flags, check):\n"
        "    done = run(script, flags, check)\n"
        "    if os.getppid() == own and not script.startswith('list '): os.kill(os.getpid(), 6)\n"
        "    return done\n"
        "nft._run = crashing"
    )
    done = run("apply", "--confirm", "1s", "m.itm", before=crash)
    assert (done.returncode, one_message(done)) == (3, "itmc: libnftables ended with signal 6")
    assert last_dscp() == 16  # it took it
    until(lambda: last_dscp() == 4)
    until(lambda: not pending())
    assert [(s.state, s.drift) for s in runtime_status.loaded()] == [("on", False)]


# What survives a reboot.


def test_where_nothing_can_be_kept_for_the_next_boot_it_is_said(named, tmp_path):
    name, by = named
    file = tmp_path / "m.itm"
    file.write_text(OLD)
    boot = tmp_path / "state/boot"
    boot.parent.mkdir()
    boot.write_text("")
    done = run("apply", str(file), by=("ip", "netns", "exec", name))
    assert (done.returncode, done.stdout) == (0, "loaded m\n")
    assert one_message(done) == (
        f"itmc: this would not survive a reboot: {boot}/netns-{name}.json.gz cannot be written: "
        "File exists"
    )
    assert "dscp set 0x04" in marks_of(by)
    # As soon as it can be, the same again keeps it.
    boot.unlink()
    assert run("apply", str(file), by=by).stderr == ""
    assert len(list(boot.iterdir())) == 1
