"""What is counted and learned survives: each test changes something under real packets.

Packets go over loopback of a namespace of its own and are told apart by their ports.
Counts are exact before and after, and the very next packets of each flow are judged by
what was counted of it and the newest threshold.
"""

import os
import random
import re
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from itmlang.pipeline import compile
from itmlang.resources import resource
from itmlang.source import Reader, Source, no_files
from runtime import apply as runtime_apply
from runtime import nft
from runtime import status as runtime_status
from runtime.apply import apply, planned, set_parameter
from runtime.cli.files import reader
from runtime.errors import UsageError
from runtime.plan import Plan
from runtime.store import load
from runtime.traffic import Namespace, add_address, add_link_route, veth
from runtime.units import Recorder, Unit, unit_of
from tests.support.cases import CASES
from tests.support.cases import read as read_case
from tests.support.commands import PATIENCE, lasting

SO_RCVBUFFORCE = 33  # include/uapi/asm-generic/socket.h
# The IP length of a datagram with one byte.
ONE = 29
WATCH = """
policy watch(threshold: packets = 3) {
    at output
    interest { protocol udp }
    flow conn by daddr, dport timeout 1m max 64
    classify { few when conn.packets <= threshold  many }
    log { count conn }
    process { many { set dscp cs1 } }
}
"""


def unit(text: str, name: str = "/policies/a.itm", read: Reader = no_files) -> Unit:
    recorder = Recorder(read)
    return unit_of(compile(Source(name, text), recorder), name, recorder.reads)


def send(count: int, port: int = 9, size: int = ONE, to: str = "127.0.0.1") -> None:
    """Datagrams of an IP length."""
    family = socket.AF_INET6 if ":" in to else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sender:
        for _ in range(count):
            sender.sendto(b"x" * (size - (48 if ":" in to else 28)), (to, port))


def classes(policy: str = "watch") -> dict[str, int]:
    """The packets of each class, as its counter in the kernel has them."""
    found = {}
    for path in runtime_apply.our_tables():
        for name, (packets, _) in nft.counters(path).items():
            owner, dot, rest = name.rpartition(".")
            if rest.startswith("class_") and policy == (owner if dot else path.split("itm_")[1]):
                found[rest.removeprefix("class_")] = packets
    return found


def flows(flow: str = "conn", policy: str = "watch") -> dict[tuple, tuple[int, int]]:
    return runtime_status.flow_counts(policy)[flow]


def judged(count: int, port: int = 9, size: int = ONE, policy: str = "watch") -> list[str]:
    """The class that each of the next packets of a flow gets."""
    found = []
    before = classes(policy)
    for _ in range(count):
        send(1, port, size)
        after = classes(policy)
        found += [name for name in after for _ in range(after[name] - before.get(name, 0))]
        before = after
    return found


def few_then_many(few: int, count: int) -> list[str]:
    few = min(max(few, 0), count)
    return ["few"] * few + ["many"] * (count - few)


def listing(handles: bool = True) -> dict[str, str]:
    """All tables of ours as nftables lists them, with counts; a sign of life renews its time."""
    flags = ["-a"] if handles else []
    return {
        path: re.sub(
            r"0x00000000 expires \w+",
            "",
            subprocess.run(
                ["nft", *flags, "-nn", "list", "table", *path.split()],
                capture_output=True, text=True, check=True,
            ).stdout,
        )
        for path in runtime_apply.our_tables()
    }  # fmt: skip


def table_of(path: str) -> dict[str, str]:
    """Each object of a table as nftables lists it, without elements and counts."""
    text = subprocess.run(
        ["nft", "-s", "-t", "list", "table", *path.split()],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    # A port of UDP is one of any protocol to a set.
    text = re.sub(r"(typeof .*)(?:udp|tcp) (?=[sd]port)", r"\1th ", text)
    found = {}
    for block in re.split(r"\n(?=\t\w)", text.rstrip().removesuffix("}")):
        found[block.split("{")[0].strip()] = block.strip()
    return found


def without_times(text: str) -> str:
    return re.sub(r" expires \w+", "", text)


def reloaded(plan: Plan) -> list[tuple[str, str, str]]:
    return sorted((c.action, c.kind, c.name) for c in plan.changes if c.action != "keep")


# Nothing to do means that nothing is done.

FILES = [*sorted(resource("policies").glob("*.itm")), *sorted(CASES.rglob("*.case"))]
BATCHES = 8


def unit_of_file(path: Path, folder: Path) -> Unit:
    """All as if they came from one file of the folder, so that each replaces the one before."""
    read, text = reader(), path.read_text()
    if path.suffix == ".case":
        case = read_case(path)
        read, text = case._read, case.policy
        for name, module in case.modules.items():
            (folder / f"{name}.py").write_text(module)
    recorder = Recorder(read)
    made = compile(Source(str(path), text), recorder)
    return unit_of(made, str(folder / "a.itm"), recorder.reads)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_what_was_just_applied_needs_nothing(host, batch, tmp_path):
    """Of every policy of the library and every case."""
    veth(host, "eth0", host, "eth1")
    # What overlays need: their own address, a way to the others, a key.
    add_address(host, "lo", "192.0.2.1/32")
    add_link_route(host, "192.0.2.0/24", "eth0")
    (tmp_path / "mesh.key").write_text("a key of some length\n")
    (tmp_path / "mesh.key").chmod(0o600)
    problems = []
    for path in FILES[batch::BATCHES]:
        one = unit_of_file(path, tmp_path)
        apply(one)
        plan, state = planned(one)
        if not plan.empty or reloaded(plan):
            problems.append(f"{path}: {reloaded(plan)}\n{plan.before.text}{plan.after.text}")
        before = listing()
        done = apply(unit_of_file(path, tmp_path))
        if (done.generation, load().generation) != (0, state.generation):
            problems.append(f"{path}: a new generation for nothing")
        if listing() != before:
            problems.append(f"{path}: the kernel was touched for nothing")
        if set(before) != {table.path for table in one.ruleset.tables}:
            problems.append(f"{path}: the tables are {sorted(before)}")
        problems += [f"{path}: {s.changed}" for s in runtime_status.status() if s.drift]
    runtime_apply.remove([])
    assert runtime_apply.our_tables() == []
    assert not problems, "\n".join(problems)


# A threshold moves.


@pytest.mark.parametrize(
    ("old", "new"),
    [(3, 6), (6, 3), (0, 2), (2, 0), (1, 0), (0, 1), (1, 30_501), (30_501, 2), (5, 4), (4, 5)],
)
@pytest.mark.parametrize("way", ["parameter", "literal", "set"])
def test_the_next_packet_is_judged_by_the_new_threshold(host, old, new, way):
    text = WATCH if way != "literal" else WATCH.replace("<= threshold", "<= 3")
    here = text.replace("= 3)", f"= {old})").replace("<= 3", f"<= {old}")
    there = text.replace("= 3)", f"= {new})").replace("<= 3", f"<= {new}")
    counted = sorted({0, 1, old, old + 1, old + 3, new, new + 1, new + 3} & set(range(12)))
    apply(unit(here))
    for known in counted:
        send(known, 100 + known)
    before, total = flows(), classes()
    move = way == "set"
    done = set_parameter("watch", "threshold", str(new)) if move else apply(unit(there))
    assert done.lost == ()
    assert (flows(), classes()) == (before, total)
    wrong = {}
    for known in counted:
        got = judged(8, 100 + known)
        if got != few_then_many(new + 1 - known, 8):
            wrong[known] = got
    assert wrong == {}
    assert flows() == {
        ("127.0.0.1", 100 + known): (known + 8, ONE * (known + 8)) for known in counted
    }


def test_large_thresholds_move_exactly(host):
    """The limit in the kernel changes its unit beyond 15 250 packets, and again beyond 106 751."""

    def at(threshold: int) -> Unit:
        return unit(WATCH.replace("<= threshold", f"<= {threshold}"))

    apply(at(15_200))
    send(15_100, 5)
    send(15_400, 6)
    for threshold in (15_400, 15_250, 107_000, 3_000_000, 15_251, 20_000, 15_249):
        assert apply(at(threshold)).lost == ()
    send(145, 5)
    assert judged(8, 5) == few_then_many(5, 8)
    assert apply(at(15_410)).lost == ()
    assert judged(15, 6) == few_then_many(11, 15)
    send(147, 5)
    assert judged(15, 5) == few_then_many(11, 15)
    send(20, 7)
    assert apply(at(30_600)).lost == ()
    send(30_575, 7)
    assert judged(10, 7) == few_then_many(6, 10)


def of_bytes(threshold: int) -> Unit:
    text = WATCH.replace("threshold: packets = 3", f"threshold: bytes = {threshold}")
    return unit(text.replace(".packets", ".bytes"))


@pytest.mark.parametrize(
    ("old", "new"),
    [(100, 300), (300, 100), (0, 60), (60, 0), (29, 58), (58, 29), (57, 59), (1, 28), (10**7, 87)],
)
@pytest.mark.parametrize("sizes", [(ONE,), (1400, ONE, ONE, 40), (40, 200, ONE)])
def test_thresholds_of_bytes_move_exactly(host, old, new, sizes):
    apply(of_bytes(old))
    known = (0, 1, 2, 3, 4, 10)
    for count in known:
        send(count, 100 + count)
    before = flows(), classes()
    assert apply(of_bytes(new)).lost == ()
    assert (flows(), classes()) == before
    for count in known:
        total, wanted, got = count * ONE, [], []
        for index in range(8):
            size = sizes[index % len(sizes)]
            wanted.append("few" if total <= new else "many")
            total += size
            got += judged(1, 100 + count, size)
        assert got == wanted, count


def test_several_thresholds_move_past_one_another(host):
    text = WATCH.replace(
        "few when conn.packets <= threshold  many",
        "few when conn.packets <= LOW  some when conn.bytes < SIZE and conn.packets != OTHER  many",
    )

    def at(low: int, size: int, other: int) -> Unit:
        return unit(
            text.replace("LOW", str(low)).replace("SIZE", str(size)).replace("OTHER", str(other))
        )

    moves = [(3, 200, 5), (5, 150, 3), (1, 400, 9), (9, 29, 1), (0, 58, 0), (4, 90, 2)]
    apply(at(*moves[0]))
    counted = dict.fromkeys(range(100, 104), 0)
    for low, size, other in moves[1:] * 2:
        for port in counted:
            send(port - 99, port)
            counted[port] += port - 99
        assert apply(at(low, size, other)).lost == ()
        for port in counted:
            known = counted[port]
            wanted = "few" if known <= low else "many"
            if wanted == "many" and known * ONE < size and known != other:
                wanted = "some"
            assert judged(1, port) == [wanted], (low, size, other, known)
            counted[port] += 1
    assert flows() == {("127.0.0.1", p): (n, n * ONE) for p, n in counted.items()}


# Something else changes: every count goes on.

EDITS = {
    "action": [("set dscp cs1", "set dscp cs2")],
    "action added": [("set dscp cs1", "set dscp cs1 set ttl 9")],
    "action gone": [("many { set dscp cs1 }", "")],
    "class added": [("classify {", "classify { none when dport == 1")],
    "class removed": [("  many }", "}"), ("many { set dscp cs1 }", "")],
    "class renamed": [("  many }", "  lots }"), ("many {", "lots {")],
    "comment lines": [("policy watch", "# one\n\n# two\npolicy watch"), ("    log", "# x\n    log")],
    "interest": [("protocol udp", "protocol { udp, tcp }")],
    "interest of its own": [("protocol udp", "dport 100-200 protocol udp")],
    "hook": [("at output", "at postrouting")],
    "hooks": [("at output", "at postrouting, output")],
    "priority": [("at output", "at output priority 5")],
    "timeout": [("timeout 1m", "timeout 1h")],
    "larger": [("max 64", "max 128")],
    "smaller": [("max 64", "max 9")],
    "note": [("count conn", 'count conn sample 1 in 3 record "r"')],
    "rate": [("few when", "fast when conn.rate > 1000000 packets/s  few when")],
    "age": [("few when", "old when conn.age > 1h  few when")],
    "connections": [("few when", "busy when conn.connections > 5  few when")],
    "limit": [("many { set", "many { limit 10 packets/s burst 500 per conn else { accept } set")],
    "flow": [("classify", "flow by_port by dport classify"), ("log {", "log { count by_port")],
    "policy before": [("policy watch", "policy first { at output }\npolicy watch")],
    "policy behind": [("#end", "policy last { at output }")],
    "learns": [
        ("policy watch", "set seen: address timeout 1h\npolicy watch"),
        ("#end", ""),
        ("process", "update { add daddr to @seen } process"),
    ],
    "shares": [
        ("policy watch", "set seen: address timeout 1h\npolicy first { at output interest { saddr "
         "@seen } classify { c } }\npolicy watch"),
        ("process", "update { add daddr to @seen } process"),
    ],
    "template": [("policy watch", "policy inner"), ("#end", "use inner as watch")],
}  # fmt: skip


def edited(text: str, edits: list[tuple[str, str]]) -> str:
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize("edit", EDITS)
def test_every_count_goes_on(host, edit):
    """There and back again; the flows are below, at and above their threshold."""
    text = WATCH + "#end\n"
    other = edited(text, EDITS[edit])
    counted = {101: 1, 103: 3, 104: 4, 105: 5, 109: 9}
    apply(unit(text))
    for port, count in counted.items():
        send(count, port)
    few = {101: 1, 103: 3, 104: 4, 105: 4, 109: 4}
    assert classes() == {"few": 16, "many": 6}
    kept = sum(few.values())
    for round, now in enumerate((other, text)):
        done = apply(unit(now))
        assert [n for n in done.lost if "conn" in n] == []
        assert flows() == {("127.0.0.1", p): (n, n * ONE) for p, n in counted.items()}
        assert classes()["few"] == kept
        if edit == "connections" and round == 0:
            send(0)
        for port in counted:
            again = judged(2, port)
            wanted = few_then_many(4 - counted[port], 2)
            if round == 0 and edit == "class renamed":
                wanted = [{"many": "lots"}.get(one, one) for one in wanted]
            if round == 0 and edit == "class removed":
                wanted = [one for one in wanted if one == "few"]
            twice = edit == "hooks" and round == 0
            if twice:  # a packet is counted at both hooks, one after the other
                wanted = few_then_many(4 - counted[port], 4)
            assert again == wanted, port
            counted[port] += 4 if twice else 2
            kept += wanted.count("few")
    assert planned(unit(text))[0].empty
    assert [s.changed for s in runtime_status.status()] == [()]


def test_comment_lines_move_line_numbers_and_nothing_else(host):
    apply(unit(WATCH))
    send(5)
    before = listing(handles=False)["inet itm_watch"]
    done = apply(unit("# a\n# b\n" + WATCH))
    assert {c.action for c in done.plan.changes if c.kind != "chain"} == {"keep"}
    assert {mark for c in done.plan.changes for mark, _ in c.rules} == {"~"}
    after = listing(handles=False)["inet itm_watch"]
    assert re.sub(r"itm:\d+", "", without_times(before)) == re.sub(
        r"itm:\d+", "", without_times(after)
    )
    assert before != after


def test_another_order_keeps_everything(host):
    second = WATCH.replace("policy watch", "policy other").replace("cs1", "cs2")
    apply(unit(WATCH + second))
    send(6)
    before = [(flows("conn", name), classes(name)) for name in ("watch", "other")]
    done = apply(unit(second + WATCH))
    assert done.lost == ()
    assert [(flows("conn", name), classes(name)) for name in ("watch", "other")] == before
    assert [s.name for s in runtime_status.loaded()] == ["other", "watch"]
    assert judged(2) == judged(2, policy="other") == ["many", "many"]


# Keys.


def keyed(key: str, more: str = "") -> Unit:
    text = WATCH.replace("by daddr, dport", f"by {key}").replace(
        "protocol udp", f"protocol udp {more}"
    )
    return unit(text)


def to_several() -> dict[tuple[str, int], int]:
    """Packets to several addresses and ports."""
    sent = {("127.0.0.1", 5): 2, ("127.0.0.1", 6): 1, ("127.0.0.2", 5): 4, ("127.0.0.3", 7): 3}
    for (address, port), count in sent.items():
        send(count, port, to=address)
    return sent


def test_a_coarser_key_gets_the_sums(host):
    apply(keyed("daddr, dport"))
    sent = to_several()
    done = apply(keyed("dport"))
    assert done.lost == ()
    assert ("migrate", "set", "flow_conn_inet") in reloaded(done.plan)
    assert flows() == {(5,): (6, 6 * ONE), (6,): (1, ONE), (7,): (3, 3 * ONE)}
    assert [judged(4, port) for port in (5, 6, 7)] == [few_then_many(few, 4) for few in (0, 3, 1)]
    assert sum(packets for packets, _ in flows().values()) == sum(sent.values()) + 12
    left = [name for name in nft.table("inet itm_watch").sets if "_ip" in name]
    assert left == []


def test_a_permuted_key_keeps_each_count(host):
    apply(keyed("daddr, dport"))
    sent = to_several()
    done = apply(keyed("dport, daddr"))
    assert done.lost == ()
    assert flows() == {(port, a): (n, n * ONE) for (a, port), n in sent.items()}
    assert [judged(2, 5), judged(2, 7)] == [few_then_many(2, 2), few_then_many(2, 2)]
    assert apply(keyed("daddr, dport")).lost == ()
    assert flows()["127.0.0.1", 5] == (4, 4 * ONE)


def test_a_finer_key_starts_again_and_the_plan_says_so(host):
    apply(keyed("daddr"))
    to_several()
    (lost,) = {c.note for c in planned(keyed("daddr, dport"))[0].lost if c.name == "flow_conn_ip"}
    assert "nobody counted by dport before" in lost
    done = apply(keyed("daddr, dport"))
    assert "flow_conn_ip" in done.lost
    assert flows() == {}
    assert judged(5, 5) == few_then_many(4, 5)
    assert classes() == {"few": 10 - 1 + 4, "many": 1 + 1} or sum(classes().values()) == 15


def test_another_key_starts_again_and_the_plan_says_so(host):
    apply(keyed("daddr"))
    to_several()
    done = apply(keyed("dport"))
    assert "flow_conn_ip" in done.lost
    assert flows() == {}


def test_both_families_are_summed_where_the_address_leaves_the_key(host):
    apply(keyed("daddr, dport"))
    send(2, 5)
    send(3, 5, 60, to="::1")
    send(1, 6, 60, to="::1")
    assert flows() == {("127.0.0.1", 5): (2, 58), ("::1", 5): (3, 180), ("::1", 6): (1, 60)}
    apply(keyed("daddr, dport", "sport 0-65535"))
    assert flows()["::1", 5] == (3, 180)
    assert apply(keyed("dport")).lost == ()
    assert flows() == {(5,): (5, 238), (6,): (1, 60)}
    assert judged(1, 5) == ["many"]


def test_flows_of_ipv6_keep_their_counts(host):
    apply(unit(WATCH))
    send(3, 5, 60, to="::1")
    apply(unit(WATCH.replace("= 3)", "= 4)")))
    send(3, 5, 60, to="::1")
    assert flows() == {("::1", 5): (6, 360)}
    assert classes() == {"few": 5, "many": 1}


def test_flows_by_connection_keep_their_counts(host):
    apply(keyed("connection"))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect(("127.0.0.1", 5))
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with receiver:
            receiver.bind(("127.0.0.1", 5))
            for _ in range(3):
                sender.send(b"x")
            before = flows()
            assert list(before.values()) == [(3, 3 * ONE)]
            text = WATCH.replace("by daddr, dport", "by connection").replace("= 3)", "= 5)")
            assert apply(unit(text)).lost == ()
            assert flows() == before
            for _ in range(4):
                sender.send(b"x")
    assert list(flows().values()) == [(7, 7 * ONE)]
    assert classes() == {"few": 6, "many": 1}


KEYS = [
    "dport",
    "protocol",
    "mark",
    "family, dport",
    "out, dport",
    "daddr, sport, dport, protocol, out",
]


@pytest.mark.parametrize("key", KEYS)
def test_flows_by_any_key_keep_their_counts(host, key):
    apply(keyed(key))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind(("127.0.0.1", 0))
        for _ in range(3):
            sender.sendto(b"x", ("127.0.0.1", 5))
        before = flows()
        assert list(before.values()) == [(3, 3 * ONE)]
        text = WATCH.replace("by daddr, dport", f"by {key}").replace("= 3)", "= 5)")
        assert apply(unit(text)).lost == ()
        for _ in range(4):
            sender.sendto(b"x", ("127.0.0.1", 5))
    assert dict.fromkeys(before, (7, 7 * ONE)) == flows()
    assert classes() == {"few": 6, "many": 1}


# Names of interfaces may have any character.


def test_a_key_with_a_comma_in_it_is_carried_over(host):
    veth(host, "a,b}", host, "cd")
    text = """
policy watch(threshold: packets = {}) {{
    at ingress "cd"
    flow conn by in, dport
    classify {{ few when conn.packets <= threshold  many }}
    log {{ count conn }}
}}
"""
    apply(unit(text.format(3)))
    nft.load(
        'add element inet itm_watch flow_conn_inet { "a,b}" . 5 counter packets 3 bytes 90 }\n'
    )
    assert apply(unit(text.format(5))).lost == ()
    assert flows() == {("a,b}", 5): (3, 90)}
    assert apply(unit(text.replace("in, dport", "in").format(5))).lost == ()
    assert flows() == {("a,b}",): (3, 90)}


# Sizes and times.


def expiries(name: str, path: str = "inet itm_watch") -> dict[str, int]:
    return {" . ".join(e.key): e.expires for e in nft.elements(path, name)}


def test_another_timeout_holds_from_the_next_packet_on(host):
    apply(unit(WATCH))
    send(2, 5)
    send(2, 6)
    done = apply(unit(WATCH.replace("timeout 1m", "timeout 1h")))
    assert {c.learned for c in done.plan.changes if c.kind == "set"} == {"kept"}
    send(1, 5)
    left = expiries("flow_conn_ip")
    assert left["127.0.0.1 . 6"] <= 60_000 < 3_000_000 < left["127.0.0.1 . 5"]
    apply(unit(WATCH.replace("timeout 1m", "timeout 5s")))
    send(1, 6)
    assert expiries("flow_conn_ip")["127.0.0.1 . 6"] <= 5_000
    assert flows() == {("127.0.0.1", 5): (3, 87), ("127.0.0.1", 6): (3, 87)}


@pytest.mark.parametrize("edit", [("= 3)", "= 5)"), ("by daddr, dport", "by dport")])
def test_a_shorter_timeout_together_with_a_move(host, edit):
    """What is made anew cannot live longer than its set lets it."""
    apply(unit(WATCH.replace("timeout 1m", "timeout 1h")))
    send(2, 5)
    done = apply(unit(WATCH.replace("timeout 1m", "timeout 5s").replace(*edit)))
    assert done.lost == ()
    assert [packets for packets, _ in flows().values()] == [2]
    name = "flow_conn_inet" if "by" in edit[0] else "flow_conn_ip_threshold_packets"
    assert all(left <= 5_000 for left in expiries(name).values())


def test_a_smaller_table_keeps_those_that_were_asked_last(host):
    apply(unit(WATCH))
    for port in range(20):
        send(2, 100 + port)
        time.sleep(0.005)
    done = apply(unit(WATCH.replace("max 64", "max 8").replace("daddr, dport", "dport")))
    assert done.lost == ()
    assert flows() == {(100 + port,): (2, 2 * ONE) for port in range(12, 20)}
    apply(unit(WATCH.replace("max 64", "max 100").replace("daddr, dport", "dport")))
    for port in range(50):
        send(1, 500 + port)
    assert len(flows()) == 58


# Ages, rates, connections, limits.


def test_ages_go_on(host):
    text = WATCH.replace("conn.packets <= threshold", "conn.age < AGE")
    apply(unit(text.replace("AGE", lasting(2))))
    send(1, 5)
    start = time.monotonic()
    time.sleep(PATIENCE)
    send(1, 6)
    assert apply(unit(text.replace("AGE", lasting(1.5)))).lost == ()
    assert [judged(1, 5), judged(1, 6)] == [["few"], ["few"]]
    time.sleep(max(0, start + 1.6 * PATIENCE - time.monotonic()))
    assert [judged(1, 5), judged(1, 6)] == [["many"], ["few"]]
    # Longer again: the old one was over, and stays so for what is known.
    assert apply(unit(text.replace("AGE", "1h"))).lost == ()
    assert judged(1, 6) == ["few"]
    # Another action leaves ages alone.
    assert apply(unit(text.replace("AGE", "1h").replace("cs1", "cs2"))).lost == ()
    assert judged(1, 6) == ["few"]
    assert {k: n for k, (n, _) in flows().items()} == {("127.0.0.1", 5): 3, ("127.0.0.1", 6): 5}


def test_rates_begin_anew_and_counts_go_on(host):
    text = WATCH.replace("conn.packets <= threshold", "conn.rate <= RATE packets/m")
    apply(unit(text.replace("RATE", "5")))
    assert judged(8, 5) == few_then_many(6, 8)
    done = apply(unit(text.replace("RATE", "7")))
    assert not [n for n in done.lost if n == "flow_conn_ip"]
    assert flows() == {("127.0.0.1", 5): (8, 8 * ONE)}
    # Buckets of the old rate hold no more.
    assert judged(9, 6) == few_then_many(8, 9)


def test_limits_for_each_flow_keep_the_flows_counts(host):
    text = WATCH.replace("set dscp cs1", "limit 2 packets/h burst 2 per conn else { drop }")
    apply(unit(text))
    with pytest.raises(PermissionError):
        send(9, 5)
    count = flows()["127.0.0.1", 5]
    done = apply(unit(text.replace("2 packets/h", "3 packets/h")))
    assert "flow_conn_ip" not in done.lost
    assert flows()["127.0.0.1", 5] == count


def test_connections_are_counted_again(host):
    text = """
policy watch {
    at output
    interest { protocol tcp dport 5 }
    flow conn by daddr
    classify { few when conn.connections <= COUNT  many }
    log { count conn }
}
"""
    apply(unit(text.replace("COUNT", "1")))
    with socket.socket() as server:
        server.bind(("127.0.0.1", 5))
        server.listen()
        with socket.create_connection(("127.0.0.1", 5)), socket.create_connection(("127.0.0.1", 5)):
            count = flows()["127.0.0.1",]
            assert count[0] >= 4
            done = apply(unit(text.replace("COUNT", "2")))
            assert "flow_conn_ip" not in done.lost
            assert flows()["127.0.0.1",] == count


# Policies that begin or cease to share a learned set: their table gets another name.

LEARN = """
set seen: address timeout TIME max 100
policy learn {
    at output
    interest { protocol udp  dport 9 }
    flow conn by daddr timeout 1m
    classify { few when conn.packets <= 3  many }
    log { count conn }
    update { add daddr to @seen ADDED }
}
"""
ASK = """
policy ask {
    at output
    interest { protocol udp }
    flow conn by dport timeout 1m
    classify { known when daddr in @seen and conn.packets <= 5  new }
    log { count conn }
}
"""
NOT_ASKED = ASK.replace("daddr in @seen and ", "")


def learning(time: str = "1h", added: str = "") -> str:
    return LEARN.replace("TIME", time).replace("ADDED", added)


def told() -> dict[str, dict]:
    return {
        name: {"flows": flows("conn", name), "classes": classes(name)} for name in ("learn", "ask")
    }


def learned(name: str = "learned_seen_ip") -> dict[str, tuple[int | None, int | None]]:
    """The elements of the learned set: its table is the one that is named by one that has it."""
    found = [
        {" . ".join(e.key): (e.timeout, e.expires) for e in nft.elements(path, name)}
        for path in runtime_apply.our_tables()
        if name in nft.table(path).sets
    ]
    (only,) = found
    return only


@pytest.mark.parametrize("first", ["learn", "ask"])
def test_beginning_and_ceasing_to_share_keeps_everything(host, first):
    def text(ask: str) -> str:
        return learning() + ask if first == "learn" else ask + learning()

    apply(unit(text(NOT_ASKED)))
    assert runtime_apply.our_tables() == ["inet itm_ask", "inet itm_learn"]
    send(6)
    for ask in (ASK, NOT_ASKED, ASK, NOT_ASKED):
        before, elements = told(), learned()
        done = apply(unit(text(ask)))
        assert done.lost == ()
        assert told() == before
        ((address, (timeout, left)),) = learned().items()
        assert (address, timeout) == ("127.0.0.1", None)
        assert left is not None and 3_000_000 < left <= elements[address][1]
        shares = ask is ASK
        assert runtime_apply.our_tables() == (
            [f"inet itm_{first}"] if shares else ["inet itm_ask", "inet itm_learn"]
        )
        send(1)
    assert flows("conn", "learn") == {("127.0.0.1",): (10, 10 * ONE)}
    assert flows("conn", "ask") == {(9,): (10, 10 * ONE)}
    assert classes("learn") == {"few": 4, "many": 6}
    assert classes("ask") == {"known": 6, "new": 4}


def test_a_learned_set_moves_with_another_time(host):
    apply(unit(NOT_ASKED + learning("1h")))
    send(1)
    done = apply(unit(ASK + learning("5s")))
    assert done.lost == ()
    ((_, (timeout, left)),) = learned().items()
    assert timeout is None and left is not None and left <= 5_000


def test_what_was_learned_for_a_time_of_its_own_keeps_it(host):
    apply(unit(NOT_ASKED + learning("1h", "for 2h")))
    send(1)
    assert apply(unit(ASK + learning("5m", "for 2h"))).lost == ()
    ((_, (timeout, left)),) = learned().items()
    assert timeout == 7_200_000 and left is not None and left > 7_000_000


def test_a_learned_sets_time_and_size_change_in_place(host):
    apply(unit(learning("1h")))
    send(1)
    before = learned()
    done = apply(unit(learning("2h").replace("max 100", "max 200")))
    assert done.lost == ()
    assert learned().keys() == before.keys()
    sets = nft.table("inet itm_learn").sets
    assert (sets["learned_seen_ip"].size, sets["learned_seen_ip"].timeout) == (200, 7_200_000)
    send(1)
    ((_, (_, left)),) = learned().items()
    assert left is not None and left > 7_000_000


# Sets with fixed values.

LISTED = """
set some: address from "some.txt"
policy watch {
    at output
    interest { protocol udp }
    classify { listed when daddr in @some  other }
}
"""


def listing_of(*elements: str) -> Unit:
    def read(path: str, by: Source, library: bool) -> Source:
        return Source(path, "".join(f"{element}\n" for element in elements))

    return unit(LISTED, read=read)


def test_elements_that_left_a_file_are_gone_from_the_kernel(host):
    apply(listing_of("127.0.0.1", "127.0.1.0/24", "10.0.0.0/8"))
    send(3, to="127.0.0.1")
    send(2, to="127.0.1.9")
    assert classes() == {"listed": 5, "other": 0}
    done = apply(listing_of("127.0.0.1", "10.0.0.0/9", "::1"))
    assert done.lost == ()
    assert [e.key for e in nft.elements("inet itm_watch", "set_some_ip")] == [
        ("10.0.0.0/9",),
        ("127.0.0.1",),
    ]
    send(1, to="127.0.0.1")
    send(1, to="127.0.1.9")
    send(1, size=60, to="::1")
    assert classes() == {"listed": 7, "other": 1}
    apply(listing_of("127.0.1.9"))
    send(1, size=60, to="::1")
    assert classes() == {"listed": 7, "other": 2}
    assert "set_some_ip6" not in nft.table("inet itm_watch").sets


# What somebody changes by hand.

SETS = "set local: address = { 127.0.0.0/8 }\n" + WATCH.replace(
    "protocol udp", "protocol udp daddr @local"
)
TABLE = "inet itm_watch"


def first_handle(chain: str) -> int:
    return nft.table(TABLE).chains[chain].handles[0]


BY_HAND = {
    "chain added": (f"add chain {TABLE} theirs", "chain theirs was added"),
    "base chain added": (
        f"add chain {TABLE} theirs {{ type filter hook output priority 7; policy drop; }}",
        "chain theirs was added",
    ),
    "chain emptied": (f"flush chain {TABLE} classify", "chain classify was changed"),
    "base chain deleted": (
        f"flush chain {TABLE} output\ndelete chain {TABLE} output", "chain output is gone"),
    "rule added": (f"add rule {TABLE} class_few drop", "chain class_few was changed"),
    "rule inserted": (f"insert rule {TABLE} log_flows return", "chain log_flows was changed"),
    "rule deleted": (
        f"delete rule {TABLE} classify handle HANDLE", "chain classify was changed"),
    "jump to theirs": (
        f"add chain {TABLE} theirs\ninsert rule {TABLE} classify jump theirs",
        "chain theirs was added"),
    "policy drop": (
        f"add chain {TABLE} output {{ policy drop; }}", "chain output was changed"),
    "set added": (f"add set {TABLE} theirs {{ type ipv4_addr; }}", "set theirs was added"),
    "value set added": (
        f"add set {TABLE} theirs {{ type ipv4_addr; flags interval; }}", "set theirs was added"),
    "set asked by theirs": (
        f"add set {TABLE} theirs {{ type ipv4_addr; }}\n"
        f"insert rule {TABLE} classify ip daddr @theirs drop", "chain classify was changed"),
    "counter added": (f"add counter {TABLE} theirs", "counter theirs was added"),
    "element added": (
        f"add element {TABLE} set_local_ip {{ 10.0.0.0/8 }}", "set set_local_ip was changed"),
    "element deleted": (
        f"delete element {TABLE} set_local_ip {{ 127.0.0.0/8 }}", "set set_local_ip was changed"),
    "set emptied": (f"flush set {TABLE} set_local_ip", "set set_local_ip was changed"),
    "dormant": (f"add table {TABLE} {{ flags dormant; }}", "the table was made dormant"),
    "map added": (
        f"add map {TABLE} theirs {{ type ipv4_addr : verdict; }}", "map theirs was added"),
    "map asked by theirs": (
        f"add map {TABLE} theirs {{ type ipv4_addr : verdict; }}\n"
        f"add rule {TABLE} classify ip daddr vmap @theirs", "map theirs was added"),
    "quota added": (f"add quota {TABLE} theirs {{ over 5 bytes; }}", "quota theirs was added"),
    "limit asked by theirs": (
        f"add limit {TABLE} theirs {{ rate 5/second; }}\n"
        f"insert rule {TABLE} classify limit name theirs drop", "limit theirs was added"),
    "map of quotas": (
        f"add quota {TABLE} one {{ over 5 bytes; }}\n"
        f"add map {TABLE} theirs {{ type ipv4_addr : quota; elements = {{ 10.0.0.1 : one }}; }}",
        "quota one was added"),
    "ct timeout": (
        f"add ct timeout {TABLE} theirs {{ protocol tcp; l3proto ip; policy = {{ established: 9 }}; }}",
        "ct timeout theirs was added"),
}  # fmt: skip


@pytest.mark.parametrize("what", BY_HAND)
def test_what_is_changed_by_hand_is_seen_and_mended(host, what):
    command, drift = BY_HAND[what]
    fresh = unit(SETS)
    apply(fresh)
    for port, count in ((5, 2), (6, 5)):
        send(count, port)
    before, counted = table_of(TABLE), (flows(), classes())
    nft.load(command.replace("HANDLE", str(first_handle("classify"))) + "\n")
    (status,) = runtime_status.status()
    assert status.drift and drift in status.changed
    assert not planned(fresh)[0].empty
    done = apply(fresh)
    assert [name for name in done.lost if "conn" in name] == []
    assert (flows(), classes()) == counted
    assert table_of(TABLE) == before
    assert runtime_status.status()[0].changed == ()
    assert planned(fresh)[0].empty
    assert [judged(4, 5), judged(1, 6)] == [few_then_many(2, 4), ["many"]]


def test_what_is_gone_by_hand_is_made_again(host):
    fresh = unit(SETS)
    apply(fresh)
    send(2, 5)
    nft.load(f"delete table {TABLE}\n")
    assert runtime_status.status()[0].state == "missing"
    apply(fresh)
    assert (flows(), classes()) == ({}, {"few": 0, "many": 0})
    assert judged(5, 5) == few_then_many(4, 5)


def test_with_the_state_lost_counts_and_thresholds_go_on(host):
    apply(unit(WATCH))
    for port, count in ((5, 2), (6, 4), (7, 9)):
        send(count, port)
    before = flows(), classes()
    shutil.rmtree(os.environ["ITM_STATE_DIR"])
    assert [s.state for s in runtime_status.loaded()] == ["unknown"]
    for text in (WATCH, WATCH.replace("= 3)", "= 5)")):
        done = apply(unit(text))
        assert done.lost == ()
        assert (flows(), classes()) == before
        assert (runtime_status.status()[0].state, runtime_status.status()[0].changed) == ("on", ())
        shutil.rmtree(os.environ["ITM_STATE_DIR"])
    assert apply(unit(WATCH)).lost == ()
    assert planned(unit(WATCH))[0].empty
    wanted = [few_then_many(2, 3), ["many"], ["many"]]
    assert [judged(3, 5), judged(1, 6), judged(1, 7)] == wanted


def test_with_the_state_lost_ages_and_learned_sets_go_on(host):
    text = learning().replace("conn.packets <= 3", "conn.age <= 300ms")
    apply(unit(text))
    send(1)
    time.sleep(0.4)
    send(1)
    assert classes("learn") == {"few": 1, "many": 1}
    shutil.rmtree(os.environ["ITM_STATE_DIR"])
    assert apply(unit(text)).lost == ()
    assert list(learned()) == ["127.0.0.1"]
    send(1)
    assert classes("learn") == {"few": 1, "many": 2}


# One parameter.

TWO = """
policy watch(threshold: packets = 3 within 1-1000, other: packets = 100, class: dscp = cs1) {
    at output
    interest { protocol udp }
    flow conn by daddr, dport timeout 1m max 64
    flow host by daddr
    classify {
        few  when conn.packets <= threshold
        some when host.packets <= other
        many
    }
    log { count conn count host }
    process { many { set dscp class } }
}
policy beside { at output  classify { c when dport == 1 } }
"""


def rules(text: str) -> dict[str, str]:
    """Each line of a listing that has a handle, by it."""
    found = {}
    kind = ""
    for line in text.splitlines():
        kind = line.split()[0] if re.match(r"\t\w", line) else kind
        handle = re.search(r" # handle (\d+)$", line)
        if handle:
            found[f"{kind if line.startswith(chr(9) * 2) else 'object'} {handle[1]}"] = line
    return found


def test_one_parameter_replaces_only_the_rules_that_hold_its_number(host):
    apply(unit(TWO))
    for port in (5, 6):
        send(4 + port, port)
    before, counted = listing(), (flows(), flows("host"), classes())
    done = set_parameter("watch", "threshold", "7")
    assert done.lost == ()
    assert (flows(), flows("host"), classes()) == counted
    after = listing()
    assert before["inet itm_beside"] == after["inet itm_beside"]
    old, new = rules(before[TABLE]), rules(after[TABLE])
    assert old.keys() == new.keys()
    differing = [handle for handle in old if old[handle] != new[handle]]
    assert len(differing) == 2  # of both families
    for handle in differing:
        assert "limit rate over 1/week burst 3 packets" in old[handle]
        assert old[handle].replace("burst 3 ", "burst 7 ") == new[handle]
    assert judged(1, 5) == ["some"]
    # The parameter holds until the file is applied again.
    (status,) = runtime_status.status(["watch"])
    assert status.parameters["threshold"] == "7"
    set_parameter("watch", "class", "cs3")
    assert runtime_status.status(["watch"])[0].parameters["threshold"] == "7"
    done = apply(unit(TWO))
    assert done.generation
    assert rules(listing()[TABLE]).keys() >= {
        handle for handle, line in old.items() if "class_many" not in line
    } - {handle for handle in old if "cs1" in old[handle]}
    assert runtime_status.status(["watch"])[0].parameters["threshold"] == "3"
    assert apply(unit(TWO)).generation == 0


@pytest.mark.parametrize(
    ("policy", "parameter", "value", "message"),
    [
        ("watch", "threshold", "1001", "threshold"),
        ("watch", "threshold", "0", "threshold"),
        ("watch", "threshold", "", "threshold"),
        ("watch", "threshold", "-1", "threshold"),
        ("watch", "threshold", "many", "threshold"),
        ("watch", "threshold", "3 4", "threshold"),
        ("watch", "threshold", "3) { at input } policy evil(x: packets = 3", "threshold"),
        ("watch", "threshold", "5s", "threshold"),
        ("watch", "threshold", "3 # x", "threshold"),
        ("watch", "class", "cs9", "class"),
        ("watch", "threshhold", "3", "threshold"),
        ("watch", "", "3", "no parameter"),
        ("wach", "threshold", "3", "watch"),
        ("beside", "threshold", "3", "no parameter"),
    ],
)
def test_what_cannot_be_set_changes_nothing(host, policy, parameter, value, message):
    apply(unit(TWO))
    send(2)
    before, generation = listing(), load().generation
    with pytest.raises(UsageError) as refused:
        set_parameter(policy, parameter, value)
    assert message in f"{refused.value} {refused.value.help}"
    assert {p: without_times(t) for p, t in listing().items()} == {
        p: without_times(t) for p, t in before.items()
    }
    assert load().generation == generation


def test_no_packet_is_lost_or_uncounted_while_a_parameter_is_set(host):
    """A stream of one flow, and 50 changes of its threshold, which it passes meanwhile."""
    apply(
        unit(TWO.replace("within 1-1000", "").replace("other: packets = 100", "other: packets = 1"))
    )
    stop, sent = threading.Event(), []
    receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 26)
    receiver.bind(("127.0.0.1", 0))
    port = receiver.getsockname()[1]

    def stream(namespace: Namespace) -> None:
        with namespace.entered():
            sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with sender:
            while not stop.is_set():
                sender.sendto(len(sent).to_bytes(4, "big"), ("127.0.0.1", port))
                sent.append(0)
                time.sleep(0.0005)

    thread = threading.Thread(target=stream, args=(host,))
    thread.start()
    try:
        for number in range(50):
            known = flows().get(("127.0.0.1", port), (0, 0))[0]
            set_parameter("watch", "threshold", str((known + 100, 3, known // 2 + 1)[number % 3]))
        known = flows()["127.0.0.1", port][0]
        set_parameter("watch", "threshold", str(known + 500))
    finally:
        stop.set()
        thread.join()
    receiver.setblocking(False)
    got = [int.from_bytes(receiver.recv(100), "big") for _ in sent]
    receiver.close()
    assert got == list(range(len(sent)))
    assert sum(classes().values()) == len(sent)
    assert flows() == {("127.0.0.1", port): (len(sent), 32 * len(sent))}
    # After the dust settles, the flow is judged by its count.
    for threshold in (len(sent) + 3, len(sent) + 9):
        set_parameter("watch", "threshold", str(threshold))
    assert judged(12, port) == ["few"] * 10 + ["many"] * 2


# Any changes, one after another.

PIECES = {
    "at": ["output", "postrouting", "output, postrouting", "output priority 5", "prerouting, output"],
    "interest": ["protocol udp", "protocol { udp, tcp }", "daddr @local", "not daddr @more", ""],
    "key": ["daddr, dport", "dport", "daddr", "dport, daddr", "saddr, daddr, dport"],
    "options": ["timeout 1m max 64", "timeout 2m max 64", "max 9", ""],
    "when": ["conn.packets <= 3", "conn.packets <= threshold", "conn.bytes < 500",
             "conn.packets < 3 and dport in { 1-9, 80 }", "conn.age < 1h", "conn.rate < 5 packets/s",
             "daddr in @seen", "daddr in @local or length in 1-99", "random < 30%", "dport != 9"],
    "action": ["set dscp cs1", "set dscp cs2 set ttl 9", "accept", "set tos minimize-delay",
               "limit 5 packets/s burst 9 per conn else { set dscp 3 }", ""],
    "more": ["", "", 'sample 1 in 3', 'record "r"'],
    "update": ["", "", "update { add daddr to @seen }", "update { add daddr to @seen when conn.packets > 2 }"],
}  # fmt: skip
HEAD = """
set local: address = { LOCAL }
set more: address = { 10.0.0.0/8, ::1 }
set seen: address timeout 1h max 50
"""


def walk(chance: random.Random, known: dict[str, dict[str, str]]) -> str:
    """A policy file that differs a little from the one before."""
    for _ in range(chance.randint(1, 3)):
        name = chance.choice("abc")
        if name not in known or (len(known) > 1 and chance.random() < 0.15):
            if known.pop(name, None) is None:
                known[name] = {piece: chance.choice(PIECES[piece]) for piece in PIECES}
                known[name]["number"] = str(chance.randint(0, 9))
            continue
        piece = chance.choice([*PIECES, "number"])
        known[name][piece] = chance.choice(PIECES.get(piece, [str(n) for n in range(9)]))
    names = list(known)
    if chance.random() < 0.2:
        chance.shuffle(names)
    text = chance.choice(["", "# moved\n"]) + HEAD.replace(
        "LOCAL", chance.choice(["127.0.0.0/8", "127.0.0.1, 10.0.0.0/9", "127.0.0.1, ::1"])
    )
    for name in names:
        one = known[name]
        text += (
            f"policy {name}(threshold: packets = {one['number']}) {{ at {one['at']}\n"
            f"interest {{ {one['interest']} }}\nflow conn by {one['key']} {one['options']}\n"
            f"classify {{ x when {one['when']}\ny when dport in {{ 5, 9-20 }}\nz }}\n"
            f"log {{ count conn {one['more']} }}\n"
            f"process {{ x {{ {one['action']} }} }}\n{one['update']} }}\n"
        )
    return text


@pytest.mark.parametrize("seed", range(4))
def test_any_changes_end_where_a_fresh_load_does(host, seed):
    chance, known = random.Random(seed), {}
    for step in range(15):
        text = walk(chance, known)
        one = unit(text)
        apply(one)
        send(2, chance.choice([5, 9, 80, 1000]))
        fresh = Namespace.create("fresh")
        try:
            with fresh.entered():
                if one.ruleset.tables:
                    nft.load(compile(Source("/policies/a.itm", text)).text.text)
                wanted = {path: table_of(path) for path in runtime_apply.our_tables()}
        finally:
            fresh.close()
        got = {path: table_of(path) for path in runtime_apply.our_tables()}
        differing = {
            (path, name): (got.get(path, {}).get(name), wanted.get(path, {}).get(name))
            for path in {**got, **wanted}
            for name in {**got.get(path, {}), **wanted.get(path, {})}
            if got.get(path, {}).get(name) != wanted.get(path, {}).get(name)
        }
        assert differing == {}, (seed, step, text)
        assert reloaded(planned(one)[0]) == [], (seed, step)
        assert [s.changed for s in runtime_status.status() if s.drift] == [], (seed, step)


def test_flows_of_one_name_in_several_policies_are_told_apart(host):
    """Their sets have one name, in tables of their own; so may somebody else's."""
    other = WATCH.replace("policy watch", "policy other").replace("by daddr, dport", "by daddr")
    nft.load("table inet theirs {\n\tset flow_conn_ip {\n\t\ttype inet_service\n\t}\n}\n")
    apply(unit(WATCH + other))
    send(2, 5)
    assert planned(unit(WATCH + other))[0].empty
    assert planned(unit(other + WATCH))[0].lost == ()
    apply(unit(other + WATCH))
    assert flows() == {("127.0.0.1", 5): (2, 2 * ONE)}
    assert flows("conn", "other") == {("127.0.0.1",): (2, 2 * ONE)}
