"""Applying policies to a real kernel, each test in a network namespace of its own."""

import gzip
import json
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from itmlang.diagnostics import CompileError
from itmlang.nft.text import print_ruleset
from itmlang.packet import Header
from itmlang.pipeline import compile
from itmlang.source import Source
from runtime import apply as runtime_apply
from runtime import nft, store
from runtime import status as runtime_status
from runtime.cli.files import file_key
from runtime.errors import MachineError, UsageError
from runtime.traffic import MAC, veth
from runtime.units import Unit, unit_of
from tests.support.commands import PATIENCE

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


def policy(text: str, name: str = "/policies/a.itm") -> Unit:
    return unit_of(compile(Source(name, text)), file_key(name))


def text_of(unit: Unit) -> str:
    return print_ruleset(unit.ruleset).text


def listing(path: str) -> str:
    """A table as the `nft` of the machine lists it, counts and elements included."""
    return subprocess.run(
        ["nft", "list", "table", *path.split()], capture_output=True, text=True, check=True
    ).stdout


def send(count: int, port: int = 9, to: str = "127.0.0.1") -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(count):
            sender.sendto(b"x", (to, port))


def counts(name: str) -> dict[str, int]:
    (status,) = runtime_status.status([name])
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
    before = runtime_status.flow_counts("watch")["conn"]
    runtime_apply.apply(policy(text))
    assert runtime_status.flow_counts("watch")["conn"] == before == {("127.0.0.1", 9): (3, 87)}
    assert counts("watch") == {"few": 3, "many": 0}
    send(3)
    # Packets 1 to 4 saw at most 3 logged before them, across the two applies.
    assert counts("watch") == {"few": 4, "many": 2}
    assert runtime_status.flow_counts("watch")["conn"] == {("127.0.0.1", 9): (6, 174)}


def test_another_action_keeps_every_count(host):
    runtime_apply.apply(policy(FLOW.format(process="many { set dscp cs1 }")))
    send(5)
    done = runtime_apply.apply(policy(FLOW.format(process="many { set dscp cs2 }")))
    assert done.lost == ()
    assert counts("watch") == {"few": 4, "many": 1}
    assert last_dscp() == 16


def learned_of(done: runtime_apply.Applied, kind: str = "set") -> dict[str, str]:
    """What the plan says becomes of what its objects learned."""
    return {c.name: c.learned for c in done.plan.changes if c.kind == kind and c.learned}


def test_another_threshold_keeps_every_count(host):
    text = FLOW.format(process="")
    runtime_apply.apply(policy(text))
    send(5)
    assert counts("watch") == {"few": 4, "many": 1}
    for threshold, few, many in ((7, 7, 2), (1, 7, 5), (14, 10, 6)):
        before = runtime_status.flow_counts("watch")["conn"]
        done = runtime_apply.apply(policy(text.replace("= 3", f"= {threshold}")))
        assert done.lost == ()
        assert learned_of(done, "counter") == dict.fromkeys(
            ("class_few", "class_many", "flow_conn_uncounted"), "kept"
        )
        assert learned_of(done)["flow_conn_ip"] == "kept"
        assert runtime_status.flow_counts("watch")["conn"] == before
        send({7: 4, 1: 3, 14: 4}[threshold])
        # As if the threshold had always been this one.
        assert counts("watch") == {"few": few, "many": many}
    assert runtime_status.flow_counts("watch")["conn"] == {("127.0.0.1", 9): (16, 464)}


def test_a_coarser_key_gets_the_sums_and_the_plan_says_so(host):
    text = FLOW.format(process="")
    runtime_apply.apply(policy(text))
    send(2)
    send(1, to="127.0.0.2")
    send(1, port=10)
    coarser = policy(text.replace("daddr, dport", "dport"))
    plan, _ = runtime_apply.planned(coarser)
    told = {c.name: (c.action, c.note, c.learned) for c in plan.changes if c.kind == "set"}
    assert told["flow_conn_inet"] == (
        "migrate",
        "summed by dport, but for packets that come meanwhile",
        "carried",
    )
    assert told["flow_conn_ip"] == ("delete", "its counts are carried over", "carried")
    done = runtime_apply.apply(coarser)
    assert (done.lost, done.plan.digest) == ((), plan.digest)
    assert runtime_status.flow_counts("watch")["conn"] == {(9,): (3, 87), (10,): (1, 29)}
    # The threshold sees the sums, too.
    before = counts("watch")
    send(3)
    assert counts("watch") == {"few": before["few"] + 1, "many": before["many"] + 2}
    assert runtime_status.flow_counts("watch")["conn"] == {(9,): (6, 174), (10,): (1, 29)}


def test_a_finer_key_starts_again_and_says_so(host):
    text = FLOW.format(process="")
    runtime_apply.apply(policy(text.replace("daddr, dport", "dport")))
    send(5)
    finer = policy(text)
    plan, _ = runtime_apply.planned(finer)
    notes = {c.name: c.note for c in plan.lost}
    assert set(notes) == {"flow_conn_inet", "flow_conn_ip", "flow_conn_ip6"}
    assert notes["flow_conn_ip"] == "nobody counted by daddr before"
    assert sorted(runtime_apply.apply(finer).lost) == sorted(notes)
    before = counts("watch")
    send(1)
    assert runtime_status.flow_counts("watch")["conn"] == {("127.0.0.1", 9): (1, 29)}
    assert counts("watch") == {"few": before["few"] + 1, "many": before["many"]}


def test_nothing_stays_of_what_left_the_file(host):
    runtime_apply.apply(policy(FLOW.format(process="") + MARK.format(name="m", priority=0, dscp=1)))
    done = runtime_apply.apply(policy(MARK.format(name="m", priority=5, dscp=1)))
    assert done.removed == ("watch",)
    assert nft.tables() == ("inet itm_m",)
    running = nft.table("inet itm_m")
    assert {name: chain.hook and chain.hook.priority for name, chain in running.chains.items()} == {
        "output": -145,
        "classify": None,
        "class_all": None,
    }
    assert (running.counters, dict(running.sets)) == (("class_all",), {})


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
    assert [s.name for s in runtime_status.loaded()] == ["a2", "a1"]


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
    broken = policy(MARK.format(name="m", priority=0, dscp=2))
    for chain in broken.ruleset.tables[0].chains:
        chain.rules = [
            replace(rule, text="jump nowhere") if "ip dscp set 0x02" in rule.text else rule
            for rule in chain.rules
        ]
    with pytest.raises(MachineError) as refusal:
        runtime_apply.apply(broken)
    (diagnostic,) = refusal.value.diagnostics
    assert diagnostic.span is not None
    assert diagnostic.span.line == 7
    assert "No such file or directory" in diagnostic.message
    assert last_dscp() == 1
    assert runtime_status.status()[0].drift is False


@pytest.mark.parametrize("step", ["commit", "correct", "seen", "keep_for_boot"])
@pytest.mark.parametrize("error", [MachineError("no space left"), OSError(28, "No space left")])
def test_what_fails_after_loading_is_no_refusal(host, monkeypatch, step, error):
    wanted = policy(MARK.format(name="m", priority=0, dscp=1))
    with monkeypatch.context() as broken:
        calls = []

        def fail(*arguments):
            calls.append(arguments)
            raise error

        broken.setattr(runtime_apply if step == "correct" else store.Store, step, fail)
        assert runtime_apply.apply(wanted).loaded == ("m",)
        assert len(calls) == 1
    word = "unknown" if step == "commit" else "on"
    assert (last_dscp(), [s.state for s in runtime_status.loaded()]) == (1, [word])
    runtime_apply.apply(wanted)
    assert (last_dscp(), [(s.state, s.drift) for s in runtime_status.loaded()]) == (
        1, [("on", False)],
    )  # fmt: skip


@pytest.mark.parametrize("where, step", [(store, "write"), (store.Store, "prepare")])
def test_what_fails_before_loading_changes_nothing(host, monkeypatch, where, step):
    runtime_apply.apply(policy(MARK.format(name="m", priority=0, dscp=1)))
    before = listing("inet itm_m")

    def full(*arguments):
        raise MachineError("no space left")

    monkeypatch.setattr(where, step, full)
    with pytest.raises(MachineError, match="no space left"):
        runtime_apply.apply(policy(MARK.format(name="m", priority=0, dscp=2)))
    assert listing("inet itm_m") == before
    assert [(s.state, s.drift) for s in runtime_status.loaded()] == [("on", False)]


def test_other_tables_are_left_alone(host):
    nft.load("table inet theirs {\n\tcounter kept {\n\t\tpackets 3 bytes 4\n\t}\n}\n")
    before = listing("inet theirs")
    runtime_apply.apply(policy(FLOW.format(process="")))
    runtime_apply.remove([])
    assert nft.tables() == ("inet theirs",)
    assert listing("inet theirs") == before


def test_what_somebody_else_changed_is_seen_and_mended(host):
    compiled = policy(MARK.format(name="m", priority=0, dscp=1))
    runtime_apply.apply(compiled)
    nft.load("flush chain inet itm_m classify\n")
    assert runtime_status.status()[0].drift is True
    runtime_apply.apply(compiled)
    assert runtime_status.status()[0].drift is False
    nft.load("delete table inet itm_m\n")
    assert runtime_status.status()[0].state == "missing"
    runtime_apply.apply(compiled)
    assert (runtime_status.status()[0].state, last_dscp()) == ("on", 1)


def test_remove_takes_what_a_crash_left(host):
    nft.load(text_of(policy(MARK.format(name="m", priority=0, dscp=1))))
    assert [s.state for s in runtime_status.loaded()] == ["unknown"]
    with pytest.raises(UsageError, match="no policy `n` is loaded"):
        runtime_apply.remove(["n"])
    assert runtime_apply.remove(["m"]) == ("m",)
    assert nft.tables() == ()


def test_a_dry_run_changes_nothing(host):
    runtime_apply.apply(policy(MARK.format(name="m", priority=0, dscp=1)), check=True)
    assert nft.tables() == ()
    assert runtime_status.loaded() == ()


def test_an_unusable_state_folder_changes_nothing(host, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ITM_STATE_DIR", str(tmp_path / "file"))
    with pytest.raises(MachineError, match="cannot be written"):
        runtime_apply.apply(policy(MARK.format(name="m", priority=0, dscp=1)))
    assert nft.tables() == ()


STATE = '{"schema": 6, "generation": 1, "kept": [1], %s}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "state.json cannot be used: it does not hold what it should"),
        ("[]", "it does not hold what it should"),
        ("null", "it does not hold what it should"),
        ('{"schema": 6}', "it does not hold what it should"),
        ('{"schema": 6, "generation": "x"}', "it does not hold what it should"),
        (STATE.replace("1", "7") % '"applied": {}, "listed": {}', "it is gone"),
        (STATE % '"applied": {}, "listed": []', "it does not hold what it should"),
        (STATE % '"applied": {}, "listed": {"inet itm_m": 3}', "it does not hold what it should"),
        (STATE % '"applied": 3, "listed": {}', "it does not hold what it should"),
        ("\udcff", "it does not hold what it should"),
        ('{"schema": 99}', "state.json has version 99, not 6"),
        ('{"schema": 1}', "state.json has version 1, not 6"),
    ],
)
def test_a_damaged_state_file_changes_nothing(host, content, message):
    runtime_apply.apply(policy(MARK.format(name="m", priority=0, dscp=1)))
    path = store.directory() / "state.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    before = listing("inet itm_m")
    for change in (
        lambda: runtime_apply.apply(policy(MARK.format(name="m", priority=0, dscp=2))),
        lambda: runtime_apply.remove([]),
        lambda: runtime_apply.switch(["m"], on=False),
        lambda: runtime_apply.rollback(),
        runtime_status.status,
    ):
        with pytest.raises(MachineError) as refusal:
            change()
        assert message in refusal.value.message
        assert "nothing was changed" in refusal.value.message
        assert str(path.parent) in refusal.value.message + (refusal.value.help or "")
    assert listing("inet itm_m") == before
    assert last_dscp() == 1


@pytest.mark.parametrize("content", [None, "", "{}", "[]", "9"])
def test_a_damaged_generation_changes_nothing(host, content):
    runtime_apply.apply(policy(MARK.format(name="m", priority=0, dscp=1)))
    (path,) = store.directory().glob("generation-*")
    if content is None:
        path.write_bytes(path.read_bytes()[:-9])
    else:
        path.write_bytes(gzip.compress(content.encode()))
    before = listing("inet itm_m")
    for change in (
        lambda: runtime_apply.apply(policy(MARK.format(name="m", priority=0, dscp=2))),
        lambda: runtime_apply.remove([]),
        runtime_status.status,
    ):
        with pytest.raises(MachineError, match=r"generation .* cannot be used: .*nothing was"):
            change()
    assert listing("inet itm_m") == before


def run(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ITMC, *arguments],
        input=text, capture_output=True, text=True, timeout=60 * PATIENCE, check=False,
    )  # fmt: skip


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
    before = runtime_status.flow_counts("m")["f"]
    assert before == {(9,): (5, 5 * 29 + 5 * 14 * (family == "netdev"))}
    done = runtime_apply.apply(policy(DEVICE.format(hook=hook, dscp=2)))
    assert (done.lost, done.absent) == ((), ())
    assert runtime_status.flow_counts("m")["f"] == before
    assert counts("m") == {"few": 3, "many": 2}
    assert last_dscp() == 2
    (status,) = runtime_status.status()
    assert (status.state, status.drift, status.hooks) == ("on", False, ((hook, -150),))
    assert runtime_apply.remove(["m"]) == ("m",)
    assert nft.tables() == ()


def test_a_policy_that_moves_to_another_hook_leaves_nothing_behind(host):
    for hook in ("output", 'egress "lo"', 'ingress "lo"', 'ingress "lo", output', "output"):
        runtime_apply.apply(policy(DEVICE.format(hook=hook, dscp=1)))
        family = "netdev" if "egress" in hook else "inet"
        assert nft.tables() == (f"{family} itm_m",)
        chains = nft.table(f"{family} itm_m").chains.values()
        assert {c.hook.name for c in chains if c.hook} == set(hook.split(", "))
        assert runtime_status.status()[0].drift is False


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
    (status,) = runtime_status.status()
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
    calls = []

    def refuse(script, *, check=False):
        calls.append(script)
        line = next(n for n, text in enumerate(script.splitlines(), 1) if "chain egress" in text)
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
        nft.load(text_of(policy(DEVICE.format(hook=hook, dscp=1))))
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
        assert process.wait(timeout=30 * PATIENCE) == 0
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
    assert [process.wait(timeout=60 * PATIENCE) for process in running] == [0] * 6
    assert sorted(s.name for s in runtime_status.loaded()) == [f"m{i}" for i in range(6)]
    assert last_dscp() == int(runtime_status.loaded()[-1].name[1:])


def test_killed_at_any_time_leaves_the_old_or_the_new(host, tmp_path):
    file = tmp_path / "a.itm"
    file.write_text(MARK.format(name="m", priority=0, dscp=1))
    assert run("apply", str(file)).returncode == 0
    for attempt in range(12):
        dscp = attempt % 2 + 1
        file.write_text(MARK.format(name="m", priority=0, dscp=dscp))
        process = subprocess.Popen([*ITMC, "apply", str(file)], stdout=subprocess.DEVNULL)
        time.sleep((0.05 + attempt * 0.02) * PATIENCE)
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
        capture_output=True, text=True, timeout=60 * PATIENCE, check=False,
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
        f"{s.name} {one.name}": one.entries for s in runtime_status.status() for one in s.learned
    }


def test_removing_a_policy_leaves_the_others_of_its_table_alone(host):
    alone = "set alone: port timeout 1m\n"
    with_alone = learning().replace("add daddr to @seen", "add daddr to @seen  add dport to @alone")
    runtime_apply.apply(policy(alone + with_alone + ASK))
    assert last_dscp() == 1  # `learn` comes first
    assert learned() == {"learn seen": 1, "learn alone": 1, "ask seen": 1}
    runtime_apply.remove(["learn"])
    assert [(s.name, s.state, s.drift) for s in runtime_status.status()] == [("ask", "on", False)]
    assert learned() == {"ask seen": 1}
    assert last_dscp() == 1
    assert counts("ask") == {"known": 2, "new": 0}
    left = nft.table("inet itm_learn")
    names = [*left.chains, *left.sets, *left.counters]
    assert [name for name in names if name.startswith("learn.")] == []
    # What it alone had learned is gone, too.
    assert sorted(left.sets) == ["learned_seen_ip", "learned_seen_ip6"]
    runtime_apply.apply(policy(learning() + ASK))
    assert learned() == {"learn seen": 1, "ask seen": 1}
    runtime_apply.remove(["ask"])
    assert [(s.name, s.drift) for s in runtime_status.status()] == [("learn", False)]
    runtime_apply.remove(["learn"])
    assert nft.tables() == ()


def test_applying_again_keeps_what_was_learned(host):
    text = learning() + ASK
    runtime_apply.apply(policy(text))
    send(3)
    before = runtime_status.flow_counts("learn")
    done = runtime_apply.apply(policy(text.replace("known { set dscp 1 }", "known { set dscp 3 }")))
    assert done.lost == ()
    assert (learned()["ask seen"], last_dscp()) == (1, 3)
    assert before == {"f": {("127.0.0.1",): (3, 87)}}
    assert runtime_status.flow_counts("learn") == {"f": {("127.0.0.1",): (4, 116)}}
    # Another time and size hold from now on; what is in stays.
    done = runtime_apply.apply(policy(learning("2h", 200) + ASK))
    assert done.lost == ()
    assert learned()["ask seen"] == 1
    (status,) = runtime_status.status(["ask"])
    assert status.learned[0].size == 200
    running = nft.table("inet itm_learn").sets["learned_seen_ip"]
    assert (running.size, running.timeout) == (200, 7_200_000)


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


def test_what_was_learned_goes_along_into_a_table_of_another_name(host):
    runtime_apply.apply(policy(learning() + ASK))
    send(2)
    renamed = policy("set seen: address timeout 1h max 100\n" + ASK)
    plan, _ = runtime_apply.planned(renamed)
    told = {(c.table, c.name): (c.note, c.learned) for c in plan.changes if c.kind == "set"}
    assert told == {
        ("inet itm_ask", f"learned_seen_{family}"): ("its elements are carried over", "carried")
        for family in ("ip", "ip6")
    }
    done = runtime_apply.apply(renamed)
    assert (done.removed, done.lost) == (("learn",), ())
    assert nft.tables() == ("inet itm_ask",)
    assert learned() == {"ask seen": 1}
    (element,) = nft.elements("inet itm_ask", "learned_seen_ip")
    assert 3_500_000 < element.expires <= 3_600_000
    assert last_dscp() == 1
    assert counts("ask") == {"known": 3, "new": 0}


def test_policies_that_begin_or_cease_to_share_keep_their_counts(host):
    alone = learning()
    sharing = ASK.replace("policy ask", "policy apart").replace(
        "classify", "flow g by dport\n    log { count g }\n    classify"
    )
    apart = sharing.replace("@seen", "127.0.0.0/8")
    runtime_apply.apply(policy(alone + apart))
    assert nft.tables() == ("inet itm_apart", "inet itm_learn")
    send(1)
    for number, text in enumerate((alone + sharing, alone + apart, sharing + alone), 2):
        wanted = policy(text)
        plan, _ = runtime_apply.planned(wanted)
        told = [c for c in plan.changes if c.kind in ("set", "counter")]
        for part in ("class_known", "class_c", "flow_f_ip", "flow_g_inet", "learned_seen_ip"):
            found = {c.learned for c in told if c.name.endswith(part)}
            assert found in ({"kept"}, {"carried"}), (number, part, told)
        assert runtime_apply.apply(wanted).lost == ()
        assert len(nft.tables()) == 1 + (text == alone + apart)
        send(1)
        assert counts("apart") == {"known": number, "new": 0}
        # Of its flow, the first packet and the second saw at most one before them.
        assert counts("learn") == {"c": max(0, number - 2)}
        assert runtime_status.flow_counts("learn") == {"f": {("127.0.0.1",): (number, 29 * number)}}
        assert runtime_status.flow_counts("apart") == {"g": {(9,): (number, 29 * number)}}
        assert learned()["learn seen"] == 1


def test_a_table_that_others_still_use_is_not_taken(host):
    runtime_apply.apply(policy(learning() + ASK))
    send(1)
    runtime_apply.remove(["learn"])
    with pytest.raises(CompileError, match=r"`ask`, from .*, has the table itm_learn"):
        runtime_apply.apply(
            policy(MARK.format(name="learn", priority=0, dscp=9), "/policies/b.itm")
        )
    assert (last_dscp(), [s.name for s in runtime_status.loaded()]) == (1, ["ask"])


def test_policies_that_share_keep_their_order_among_other_files(host):
    other = MARK.format(name="b", priority=0, dscp=9)
    runtime_apply.apply(policy(learning() + ASK))
    runtime_apply.apply(policy(other, "/policies/b.itm"))
    assert last_dscp() == 9
    third = ASK.replace("policy ask", "policy again").replace("dscp 1", "dscp 3")
    runtime_apply.apply(policy(learning() + ASK + third))
    assert [s.name for s in runtime_status.loaded()] == ["learn", "ask", "b", "again"]
    assert last_dscp() == 3
    runtime_apply.apply(policy(ASK + learning()))
    assert [s.name for s in runtime_status.loaded()] == ["ask", "learn", "b"]
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
    assert [s.name for s in runtime_status.loaded()] == ["a", "b"]


def test_elements_that_left_the_file_are_gone(host):
    def listed(type: str, field: str, elements: str) -> Unit:
        text = MARK.format(name="m", priority=0, dscp=1)
        text = text.replace("protocol udp", f"protocol udp  {field} @some")
        return policy(f"set some: {type} = {{ {elements} }}\n{text}")

    def sets() -> list[str]:
        return list(nft.table("inet itm_m").sets)

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
    assert runtime_status.status()[0].drift is False


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
    assert run("apply", str(file)).stdout == "loaded m\n"
    assert run("apply", str(file)).stdout == "loaded m: as it was\n"
    assert len(nft.elements("inet itm_m", "set_listed_ip")) == 100_000
    assert last_dscp() == 1
    (tmp_path / "listed.txt").write_text("\n".join([*lines, "127.0.0.2"]))
    assert run("apply", str(file)).stdout == "loaded m\n"
    assert time.monotonic() - start < 60 * PATIENCE  # it takes 10 seconds
    assert last_dscp() == 0
    assert len(nft.elements("inet itm_m", "set_listed_ip")) == 100_000


def test_a_learned_set_may_lose_its_timeout_and_get_one(host):
    timed, for_ever = learning(), learning().replace("timeout 1h", "")
    for text, short in ((timed, True), (for_ever, False), (timed, True)):
        assert runtime_apply.apply(policy(text)).lost == ()
        send(1)  # renews the element, with the new time
        (element,) = nft.elements("inet itm_learn", "learned_seen_ip")
        assert (element.expires <= 3_600_000) == short
