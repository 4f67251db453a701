"""Applying policies to a real kernel, each test in a network namespace of its own."""

import json
import signal
import socket
import subprocess
import sys
import time

import pytest

from itmlang.diagnostics import CompileError
from itmlang.packet import Header
from itmlang.pipeline import Compiled, compile
from itmlang.source import Source
from runtime import apply as runtime_apply
from runtime import nft, state
from runtime.errors import MachineError, UsageError
from runtime.traffic import MAC, Namespace, TrafficError, veth
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
    assert nft.tables() == ("inet itm_m",)
    chains = {
        o["chain"]["name"]: o["chain"].get("prio") for o in nft.table("inet itm_m") if "chain" in o
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
    before = nft.table_text("inet theirs")
    runtime_apply.apply(policy(FLOW.format(process="")))
    runtime_apply.remove([])
    assert nft.tables() == ("inet theirs",)
    assert nft.table_text("inet theirs") == before


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


DEVICE = """
policy m(class: dscp = {dscp}) {{
    at {hook}
    interest {{ protocol udp }}
    flow f by dport
    classify {{ few when f.packets < 3  many }}
    log {{ count f }}
    process {{ many {{ set dscp class }} }}
}}
"""


@pytest.mark.parametrize("hook", ['ingress "lo"', 'egress "lo"'])
def test_policies_at_devices_are_applied_kept_and_removed(host, hook):
    family = "netdev" if hook.startswith("egress") else "inet"
    runtime_apply.apply(policy(DEVICE.format(hook=hook, dscp=1)))
    assert nft.tables() == (f"{family} itm_m",)
    send(5)
    before = runtime_apply.flow_counts("m")["f"]
    assert before == {(9,): (5, 5 * 29 + 5 * 14 * (family == "netdev"))}
    done = runtime_apply.apply(policy(DEVICE.format(hook=hook, dscp=2)))
    assert (done.lost, done.absent) == ((), ())
    assert runtime_apply.flow_counts("m")["f"] == before
    assert counts("m") == {"few": 3, "many": 2}
    assert last_dscp() == 2
    (status,) = runtime_apply.status()
    assert (status.state, status.drift, status.hooks) == ("on", False, ((hook, -150),))
    assert runtime_apply.remove(["m"]) == ("m",)
    assert nft.tables() == ()


def test_a_policy_that_moves_to_another_hook_leaves_nothing_behind(host):
    for hook in ("output", 'egress "lo"', 'ingress "lo"', 'ingress "lo", output', "output"):
        runtime_apply.apply(policy(DEVICE.format(hook=hook, dscp=1)))
        family = "netdev" if "egress" in hook else "inet"
        assert nft.tables() == (f"{family} itm_m",)
        hooks = [h for h in nft.table(f"{family} itm_m") if "hook" in h.get("chain", {})]
        assert len(hooks) == hook.count(",") + 1
        assert runtime_apply.status()[0].drift is False


def test_policies_of_several_files_run_in_order_at_a_device(host):
    at = MARK.replace("at output", 'at egress "lo"')
    first = [at.format(name=n, priority=0, dscp=d) for n, d in (("a1", 1), ("a2", 2))]
    runtime_apply.apply(policy("".join(first)))
    assert last_dscp() == 2
    runtime_apply.apply(policy(at.format(name="b1", priority=0, dscp=3), "/policies/b.itm"))
    assert last_dscp() == 3
    runtime_apply.apply(policy("".join(reversed(first))))
    assert last_dscp() == 3
    runtime_apply.remove(["b1"])
    assert last_dscp() == 1


def test_all_kinds_of_device_names_can_be_hooked(host):
    names = ("eth0.100", "eth0-100", "br_lan", "wg0@x", "1a")
    for name in names:
        veth(host, name, host, f"p{names.index(name)}")
    hooks = ", ".join(f'ingress "{name}"' for name in names)
    compiled = policy(DEVICE.format(hook=hooks, dscp=1))
    runtime_apply.apply(compiled)
    assert runtime_apply.apply(compiled).lost == ()
    (status,) = runtime_apply.status()
    assert [hook for hook, _ in status.hooks] == [f'ingress "{name}"' for name in names]
    assert status.drift is False


@pytest.mark.parametrize("kind", ["ingress", "egress"])
def test_a_device_that_is_not_there_is_named(host, tmp_path, kind):
    file = tmp_path / "a.itm"
    file.write_text(DEVICE.format(hook=f'{kind} "late0"', dscp=1))
    done = run("apply", str(file))
    if done.returncode:  # Linux before 6.16
        assert "there is no device late0 here" in done.stderr
        assert nft.tables() == ()
        return
    assert "there is no device late0 here yet" in done.stderr
    assert run("apply", str(file)).returncode == 0
    veth(host, "late0", host, "late1")
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as link:
        link.bind(("late0" if kind == "egress" else "late1", 0))
        head = bytes.fromhex(MAC.replace(":", "")) * 2 + b"\x08\x00"
        link.send(head + bytes(Header(17, (4, 1), (4, 2), 1, 2).build().data))
    assert counts("m") == {"few": 1, "many": 0}


def test_a_refused_device_is_named_at_the_policy(host, monkeypatch):
    compiled = policy(DEVICE.format(hook='egress "late0"', dscp=1))
    line = next(
        n for n, text in enumerate(compiled.text.text.splitlines(), 1) if "chain egress" in text
    )

    def refuse(script, *, check=False):
        raise nft.NftRefusalError((nft.NftError(line, "Could not process rule: No such file"),))

    monkeypatch.setattr(nft, "load", refuse)
    with pytest.raises(MachineError) as refusal:
        runtime_apply.apply(compiled)
    (diagnostic,) = refusal.value.diagnostics
    assert diagnostic.message == "there is no device late0 here"
    assert diagnostic.span is not None
    assert diagnostic.span.line == 3


def test_remove_takes_both_tables_that_a_crash_left(host):
    for hook in ("output", 'egress "lo"'):
        nft.load(policy(DEVICE.format(hook=hook, dscp=1)).text.text)
    assert runtime_apply.remove([]) == ("m",)
    assert nft.tables() == ()


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_run_removes_when_it_ends(host, tmp_path, end):
    file = tmp_path / "a.itm"
    file.write_text(MARK.format(name="m", priority=0, dscp=1))
    process = subprocess.Popen([*ITMC, "run", str(file)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "loaded m\n"
        assert nft.tables() == ("inet itm_m",)
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


LEARN = """
set seen: address timeout {timeout} max {size}
policy learn {{
    at output
    interest {{ protocol udp  dport 9 }}
    flow f by daddr
    classify {{ c when f.packets > 1 }}
    log {{ count f }}
    update {{ add daddr to @seen }}
}}
"""
ASK = """
policy ask {
    at output
    interest { protocol udp }
    classify { known when daddr in @seen  new }
    process { known { set dscp 1 } new { set dscp 2 } }
}
"""


def learning(timeout="1h", size=100) -> str:
    return LEARN.format(timeout=timeout, size=size)


def learned() -> dict[str, int]:
    """Entries of the learned sets, by policy and set."""
    return {
        f"{s.name} {one.name}": one.entries for s in runtime_apply.status() for one in s.learned
    }


def test_removing_a_policy_leaves_the_others_of_its_table_alone(host):
    alone = "set alone: port timeout 1m\n"
    with_alone = learning().replace("add daddr to @seen", "add daddr to @seen  add dport to @alone")
    runtime_apply.apply(policy(alone + with_alone + ASK))
    assert last_dscp() == 1  # `learn` comes first
    assert learned() == {"learn seen": 1, "learn alone": 1, "ask seen": 1}
    runtime_apply.remove(["learn"])
    assert [(s.name, s.state, s.drift) for s in runtime_apply.status()] == [("ask", "on", False)]
    assert learned() == {"ask seen": 1}
    assert last_dscp() == 1
    assert counts("ask") == {"known": 2, "new": 0}
    left = [next(iter(item.values())).get("name", "") for item in nft.table("inet itm_learn")]
    assert [name for name in left if name.startswith("learn.")] == []
    # What it alone had learned is gone, too.
    assert [name for name in left if name.startswith("learned")] == [
        "learned_seen_ip",
        "learned_seen_ip6",
    ]
    runtime_apply.apply(policy(learning() + ASK))
    assert learned() == {"learn seen": 1, "ask seen": 1}
    runtime_apply.remove(["ask"])
    assert [(s.name, s.drift) for s in runtime_apply.status()] == [("learn", False)]
    runtime_apply.remove(["learn"])
    assert nft.tables() == ()


def test_applying_again_keeps_what_was_learned(host):
    text = learning() + ASK
    runtime_apply.apply(policy(text))
    send(3)
    before = runtime_apply.flow_counts("learn")
    done = runtime_apply.apply(policy(text.replace("known { set dscp 1 }", "known { set dscp 3 }")))
    assert done.lost == ()
    assert (learned()["ask seen"], last_dscp()) == (1, 3)
    assert before == {"f": {("127.0.0.1",): (3, 87)}}
    assert runtime_apply.flow_counts("learn") == {"f": {("127.0.0.1",): (4, 116)}}
    # Another time and size hold from now on; what is in stays.
    done = runtime_apply.apply(policy(learning("2h", 200) + ASK))
    assert done.lost == ()
    assert learned()["ask seen"] == 1
    (status,) = runtime_apply.status(["ask"])
    assert status.learned[0].size == 200
    assert "timeout 2h" in nft.table_text("inet itm_learn")
    assert "size 200" in nft.table_text("inet itm_learn")


def test_a_learned_set_of_another_type_starts_again_and_says_so(host):
    text = learning() + ASK
    runtime_apply.apply(policy(text))
    send(1)
    other = text.replace("set seen: address", "set seen: port").replace("daddr", "dport")
    done = runtime_apply.apply(policy(other))
    assert {"learned_seen_ip", "learned_seen_ip6"} <= set(done.lost)
    assert learned() == {"learn seen": 0, "ask seen": 0}
    assert last_dscp() == 1
    numbers = (
        "set seen: number timeout 1h\npolicy learn { at output  update { add mark to @seen } }\n"
    )
    assert runtime_apply.apply(policy(numbers)).removed == ("ask",)
    send(1)
    assert learned() == {"learn seen": 1}
    protocols = numbers.replace("number", "protocol").replace("mark", "protocol")
    assert runtime_apply.apply(policy(protocols)).lost == ("learned_seen",)
    assert learned() == {"learn seen": 0}


def test_what_is_lost_with_a_table_of_another_name_is_said(host):
    runtime_apply.apply(policy(learning() + ASK))
    send(2)
    done = runtime_apply.apply(policy("set seen: address timeout 1h max 100\n" + ASK))
    assert done.removed == ("learn",)
    assert nft.tables() == ("inet itm_ask",)
    assert set(done.lost) == {"learned_seen_ip", "learned_seen_ip6"}
    assert last_dscp() == 2


def test_a_table_that_others_still_use_is_not_taken(host):
    runtime_apply.apply(policy(learning() + ASK))
    send(1)
    runtime_apply.remove(["learn"])
    with pytest.raises(CompileError, match=r"`ask`, from .*, has the table itm_learn"):
        runtime_apply.apply(
            policy(MARK.format(name="learn", priority=0, dscp=9), "/policies/b.itm")
        )
    assert (last_dscp(), [s.name for s in runtime_apply.loaded()]) == (1, ["ask"])


def test_policies_that_share_keep_their_order_among_other_files(host):
    other = MARK.format(name="b", priority=0, dscp=9)
    runtime_apply.apply(policy(learning() + ASK))
    runtime_apply.apply(policy(other, "/policies/b.itm"))
    assert last_dscp() == 9
    third = ASK.replace("policy ask", "policy again").replace("dscp 1", "dscp 3")
    runtime_apply.apply(policy(learning() + ASK + third))
    assert [s.name for s in runtime_apply.loaded()] == ["learn", "ask", "b", "again"]
    assert last_dscp() == 3
    runtime_apply.apply(policy(ASK + learning()))
    assert [s.name for s in runtime_apply.loaded()] == ["ask", "learn", "b"]
    assert last_dscp() == 9
    runtime_apply.remove(["b"])
    assert last_dscp() == 1


def test_another_kind_of_chain_keeps_its_place(host):
    first, second = (MARK.format(name=n, priority=0, dscp=d) for n, d in (("a", 1), ("b", 2)))
    runtime_apply.apply(policy(first))
    runtime_apply.apply(policy(second, "/policies/b.itm"))
    assert last_dscp() == 2
    # A mark has packets of our own routed anew: the chain must be of another type.
    marking = second.replace("set dscp 2", "set mark 1 set dscp 3")
    runtime_apply.apply(policy(marking, "/policies/b.itm"))
    assert last_dscp() == 3
    assert [s.name for s in runtime_apply.loaded()] == ["a", "b"]


def test_elements_that_left_the_file_are_gone(host):
    def listed(type: str, field: str, elements: str) -> Compiled:
        text = MARK.format(name="m", priority=0, dscp=1)
        text = text.replace("protocol udp", f"protocol udp  {field} @some")
        return policy(f"set some: {type} = {{ {elements} }}\n{text}")

    def sets() -> list[str]:
        return [item["set"]["name"] for item in nft.table("inet itm_m") if "set" in item]

    runtime_apply.apply(listed("address", "daddr", "127.0.0.1, 10.0.0.0/8, fd00::/8"))
    assert (last_dscp(), sorted(sets())) == (1, ["set_some_ip", "set_some_ip6"])
    done = runtime_apply.apply(listed("address", "daddr", "127.0.0.2, 10.0.0.0/9"))
    assert (done.lost, last_dscp(), sets()) == ((), 0, ["set_some_ip"])
    done = runtime_apply.apply(listed("port", "dport", "9, 11-19"))
    assert (done.lost, last_dscp(), sets()) == ((), 1, ["set_some"])
    done = runtime_apply.apply(listed("interface", "out", '"lo", "e*"'))
    assert (done.lost, last_dscp(), sets()) == ((), 1, ["set_some"])
    done = runtime_apply.apply(listed("interface", "out", '"e*"'))
    assert (done.lost, last_dscp(), sets()) == ((), 0, ["set_some"])
    assert runtime_apply.status()[0].drift is False


def test_a_hundred_thousand_prefixes_load_in_seconds(host, tmp_path):
    lines = [f"{10 + n // 65536}.{n // 256 % 256}.{n % 256}.0/25" for n in range(99_999)]
    (tmp_path / "listed.txt").write_text("\n".join([*lines, "127.0.0.1"]))
    file = tmp_path / "a.itm"
    file.write_text(
        'set listed: address from "listed.txt"\n'
        "policy m { at output  interest { protocol udp }\n"
        "classify { c when daddr in @listed } process { c { set dscp 1 } } }\n"
    )
    start = time.monotonic()
    for _ in range(2):
        assert run("apply", str(file)).stdout == "loaded m\n"
    assert time.monotonic() - start < 60  # it takes 3 and 5 seconds
    assert last_dscp() == 1
    assert len(nft.elements("inet itm_m", "set_listed_ip")) == 100_000


def test_a_learned_set_may_lose_its_timeout_and_get_one(host):
    timed, for_ever = learning(), learning().replace("timeout 1h", "")
    for text, short in ((timed, True), (for_ever, False), (timed, True)):
        assert runtime_apply.apply(policy(text)).lost == ()
        send(1)  # renews the element, with the new time
        (element,) = nft.elements("inet itm_learn", "learned_seen_ip")
        assert (element["expires"] <= 3600) == short
