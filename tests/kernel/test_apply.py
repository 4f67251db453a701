"""Applying policies to a real kernel, each test in a network namespace of its own."""

import json
import signal
import socket
import subprocess
import sys
import time

import pytest

from itmlang.diagnostics import CompileError
from itmlang.pipeline import Compiled, compile
from itmlang.source import Source
from runtime import apply as runtime_apply
from runtime import nft, state
from runtime.errors import MachineError, UsageError
from runtime.traffic import Namespace, TrafficError
from tests.support.needs import unavailable

ITMC = [sys.executable, "-c", "from runtime.cli.main import main; main()"]
FLOW = """
policy watch(threshold: packets = 3) {{
    at output
    interest {{ protocol udp }}
    flow conn by daddr, dport timeout 1m max 16
    classify {{ few when conn.packets <= threshold; many }}
    log {{ count conn }}
    process {{ {process} }}
}}
"""
MARK = """
policy {name} {{
    at output
    priority {priority}
    interest {{ protocol udp }}
    classify {{ all }}
    process {{ all {{ set dscp {dscp} }} }}
}}
"""


@pytest.fixture
def host(tmp_path, monkeypatch):
    """The test runs in a namespace of its own, with a state folder of its own."""
    monkeypatch.setenv("ITM_STATE_DIR", str(tmp_path / "state"))
    try:
        namespace = Namespace.create("host")
    except TrafficError as error:
        unavailable(error)
    try:
        with namespace.entered():
            yield namespace
    finally:
        namespace.close()


def policy(text: str, name: str = "/policies/a.itm") -> Compiled:
    return compile(Source(name, text))


def send(count: int, port: int = 9) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(count):
            sender.sendto(b"x", ("127.0.0.1", port))


def counts(name: str) -> dict[str, int]:
    (status,) = runtime_apply.status([name])
    return {c.name: c.packets for c in status.classes}


def last_dscp() -> int:
    """Send one datagram and say which DSCP it left with."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP) as tap,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        tap.settimeout(5)
        sender.sendto(b"x", ("127.0.0.1", 9))
        return tap.recv(100)[1] >> 2


def test_applying_again_keeps_every_count(host):
    text = FLOW.format(process="many { set dscp cs1 }")
    runtime_apply.apply(policy(text))
    send(3)
    before = runtime_apply.flow_counts("watch")["conn"]
    runtime_apply.apply(policy(text))
    assert runtime_apply.flow_counts("watch")["conn"] == before == {("127.0.0.1", 9): (3, 87)}
    assert counts("watch") == {"few": 3, "many": 0}
    send(3)
    # Packets 1 to 4 saw at most 3 logged before them, across the two applies.
    assert counts("watch") == {"few": 4, "many": 2}
    assert runtime_apply.flow_counts("watch")["conn"] == {("127.0.0.1", 9): (6, 174)}


def test_another_action_keeps_every_count(host):
    runtime_apply.apply(policy(FLOW.format(process="many { set dscp cs1 }")))
    send(5)
    done = runtime_apply.apply(policy(FLOW.format(process="many { set dscp cs2 }")))
    assert done.lost == ()
    assert counts("watch") == {"few": 4, "many": 1}
    assert last_dscp() == 16


def test_another_key_starts_again_and_says_so(host):
    text = FLOW.format(process="")
    runtime_apply.apply(policy(text))
    send(2)
    done = runtime_apply.apply(policy(text.replace("daddr, dport", "dport")))
    assert sorted(done.lost) == [
        "flow_conn_ip6_3_packets",
        "flow_conn_ip6_over_3_packets",
        "flow_conn_ip_3_packets",
        "flow_conn_ip_over_3_packets",
    ]
    send(1)
    assert runtime_apply.flow_counts("watch")["conn"] == {(9,): (1, 29)}


def test_nothing_stays_of_what_left_the_file(host):
    runtime_apply.apply(policy(FLOW.format(process="") + MARK.format(name="m", priority=0, dscp=1)))
    done = runtime_apply.apply(policy(MARK.format(name="m", priority=5, dscp=1)))
    assert done.removed == ("watch",)
    assert nft.tables() == ("itm_m",)
    chains = {
        o["chain"]["name"]: o["chain"].get("prio") for o in nft.table("itm_m") if "chain" in o
    }
    assert chains == {"output": -145, "classify": None, "class_all": None}


def test_policies_of_several_files_run_in_the_order_they_came(host):
    first = [MARK.format(name=n, priority=0, dscp=d) for n, d in (("a1", 1), ("a2", 2))]
    second = MARK.format(name="b1", priority=0, dscp=3)
    runtime_apply.apply(policy("".join(first)))
    assert last_dscp() == 2
    runtime_apply.apply(policy(second, "/policies/b.itm"))
    assert last_dscp() == 3
    runtime_apply.apply(policy("".join(reversed(first))))
    assert last_dscp() == 3
    runtime_apply.remove(["b1"])
    assert last_dscp() == 1
    assert [s.name for s in runtime_apply.loaded()] == ["a2", "a1"]


def test_priority_comes_before_order(host):
    texts = [MARK.format(name=n, priority=p, dscp=d) for n, p, d in (("x", 7, 1), ("y", -7, 2))]
    runtime_apply.apply(policy("".join(texts)))
    assert last_dscp() == 1


def test_a_name_belongs_to_one_file(host):
    runtime_apply.apply(policy(MARK.format(name="m", priority=0, dscp=1)))
    with pytest.raises(CompileError, match="loaded already, from /policies/a"):
        runtime_apply.apply(policy(MARK.format(name="m", priority=0, dscp=2), "/policies/b.itm"))
    assert last_dscp() == 1


def test_a_refusal_is_shown_at_the_policys_line_and_changes_nothing(host):
    runtime_apply.apply(policy(MARK.format(name="m", priority=0, dscp=1)))
    compiled = policy(MARK.format(name="m", priority=0, dscp=2))
    broken = compiled.text.text.replace("ip dscp set 0x02", "jump nowhere")
    text = type(compiled.text)(broken, compiled.text.lines)
    with pytest.raises(MachineError) as refusal:
        runtime_apply.apply(Compiled(**{**vars(compiled), "text": text}))
    (diagnostic,) = refusal.value.diagnostics
    assert diagnostic.span is not None
    assert diagnostic.span.line == 7
    assert "No such file or directory" in diagnostic.message
    assert last_dscp() == 1
    assert runtime_apply.status()[0].drift is False


def test_what_fails_after_loading_is_no_refusal(host, monkeypatch):
    prepare, calls = state.Store.prepare, []

    def full_the_second_time(store, wanted):
        calls.append(wanted)
        if len(calls) == 2:
            raise MachineError("no space left")
        return prepare(store, wanted)

    monkeypatch.setattr(state.Store, "prepare", full_the_second_time)
    assert runtime_apply.apply(policy(MARK.format(name="m", priority=0, dscp=1))).loaded == ("m",)
    assert len(calls) == 2
    assert (last_dscp(), [s.state for s in runtime_apply.loaded()]) == (1, ["on"])


def test_other_tables_are_left_alone(host):
    nft.load("table inet theirs {\n\tcounter kept {\n\t\tpackets 3 bytes 4\n\t}\n}\n")
    before = nft.table_text("theirs")
    runtime_apply.apply(policy(FLOW.format(process="")))
    runtime_apply.remove([])
    assert nft.tables() == ("theirs",)
    assert nft.table_text("theirs") == before


def test_what_somebody_else_changed_is_seen_and_mended(host):
    compiled = policy(MARK.format(name="m", priority=0, dscp=1))
    runtime_apply.apply(compiled)
    nft.load("flush chain inet itm_m classify\n")
    assert runtime_apply.status()[0].drift is True
    runtime_apply.apply(compiled)
    assert runtime_apply.status()[0].drift is False
    nft.load("delete table inet itm_m\n")
    assert runtime_apply.status()[0].state == "missing"
    runtime_apply.apply(compiled)
    assert (runtime_apply.status()[0].state, last_dscp()) == ("on", 1)


def test_remove_takes_what_a_crash_left(host):
    nft.load(policy(MARK.format(name="m", priority=0, dscp=1)).text.text)
    assert [s.state for s in runtime_apply.loaded()] == ["unknown"]
    with pytest.raises(UsageError, match="no policy `n` is loaded"):
        runtime_apply.remove(["n"])
    assert runtime_apply.remove(["m"]) == ("m",)
    assert nft.tables() == ()


def test_a_dry_run_changes_nothing(host):
    runtime_apply.apply(policy(MARK.format(name="m", priority=0, dscp=1)), check=True)
    assert nft.tables() == ()
    assert runtime_apply.loaded() == ()


def test_an_unusable_state_folder_changes_nothing(host, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ITM_STATE_DIR", str(tmp_path / "file"))
    with pytest.raises(MachineError, match="cannot be written"):
        runtime_apply.apply(policy(MARK.format(name="m", priority=0, dscp=1)))
    assert nft.tables() == ()


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 99}', '{"schema": 1}', "\udcff"])
def test_a_damaged_state_file_changes_nothing(host, content):
    compiled = policy(MARK.format(name="m", priority=0, dscp=1))
    runtime_apply.apply(compiled)
    path = state.directory() / "state.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(MachineError, match="cannot be read"):
        runtime_apply.apply(policy(MARK.format(name="m", priority=0, dscp=2)))
    assert last_dscp() == 1


def run(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ITMC, *arguments], input=text, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_command_from_apply_to_remove(host, tmp_path):
    file = tmp_path / "a.itm"
    file.write_text(FLOW.format(process="many { set dscp cs1 }"))
    assert run("apply", str(file)).stdout == "loaded watch\n"
    send(5)
    status = json.loads(run("status", "--json").stdout)
    assert status["schema"] == 1
    (watch,) = status["policies"]
    assert [(c["name"], c["packets"]) for c in watch["classes"]] == [("few", 4), ("many", 1)]
    assert watch["flows"][0]["entries"] == 1
    assert json.loads(run("list", "--json").stdout)["policies"][0]["hook"] == "output"
    assert run("remove", "wach").returncode == 2
    assert run("remove", "watch").stdout == "removed watch\n"
    assert nft.tables() == ()


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_run_removes_when_it_ends(host, tmp_path, end):
    file = tmp_path / "a.itm"
    file.write_text(MARK.format(name="m", priority=0, dscp=1))
    process = subprocess.Popen([*ITMC, "run", str(file)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "loaded m\n"
        assert nft.tables() == ("itm_m",)
        process.send_signal(end)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
    assert nft.tables() == ()


def test_two_at_once_come_one_after_the_other(host, tmp_path):
    files = []
    for index in range(6):
        files.append(tmp_path / f"{index}.itm")
        files[-1].write_text(MARK.format(name=f"m{index}", priority=0, dscp=index))
    running = [subprocess.Popen([*ITMC, "apply", str(f)], stdout=subprocess.DEVNULL) for f in files]
    assert [process.wait(timeout=60) for process in running] == [0] * 6
    assert sorted(s.name for s in runtime_apply.loaded()) == [f"m{i}" for i in range(6)]
    assert last_dscp() == int(runtime_apply.loaded()[-1].name[1:])


def test_killed_at_any_time_leaves_the_old_or_the_new(host, tmp_path):
    file = tmp_path / "a.itm"
    file.write_text(MARK.format(name="m", priority=0, dscp=1))
    assert run("apply", str(file)).returncode == 0
    for attempt in range(12):
        dscp = attempt % 2 + 1
        file.write_text(MARK.format(name="m", priority=0, dscp=dscp))
        process = subprocess.Popen([*ITMC, "apply", str(file)], stdout=subprocess.DEVNULL)
        time.sleep(0.05 + attempt * 0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert last_dscp() in (1, 2)
    assert run("apply", str(file)).returncode == 0
    assert last_dscp() == dscp


def test_without_rights_it_says_what_to_do(host, tmp_path):
    file = tmp_path / "a.itm"
    file.write_text(MARK.format(name="m", priority=0, dscp=1))
    done = subprocess.run(
        ["setpriv", "--bounding-set", "-net_admin", *ITMC, "apply", str(file)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 3
    assert "run it as root" in done.stderr
    assert "Traceback" not in done.stderr
