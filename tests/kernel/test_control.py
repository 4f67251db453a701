"""Controllers, timers and links of policies on a real kernel, and what becomes of them in trouble.

Each test is in a namespace of its own, with the interface `eth1` towards another one. What a
controller decides comes from a file that the test writes (`law:told`), so that what is tested
is everything around it: the rules, the flows, the log, the end.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from itmlang.diagnostics import CompileError
from itmlang.links import class_number, handle
from itmlang.pipeline import compile
from itmlang.source import Source
from runtime import apply as runtime_apply
from runtime import links, nft, steering, store, talk
from runtime import status as runtime_status
from runtime.decisions import decisions
from runtime.errors import MachineError, UsageError
from runtime.nft import NftRefusalError
from runtime.status import LinkStatus, PolicyStatus
from runtime.traffic import Namespace, add_address, veth
from runtime.units import Unit, unit_of
from tests.support import commands
from tests.support.commands import PATIENCE, until

PEER = "10.9.0.2"
OURS = f"{handle('wan'):x}:"  # of the link's root qdisc
LAW = """\
import pathlib, time
FILE = pathlib.Path(__file__).with_name("value")

def told(situation):
    text = FILE.read_text()
    if text == "raise":
        raise RuntimeError("no idea")
    if text == "hang":
        while True:
            pass
    return float(text) if text[:1].isdigit() else text

def slowly(situation):
    time.sleep(0.3)
    return told(situation)

def tick():
    with open(FILE.with_name("ticks"), "a") as file:
        file.write("x")

def slow():
    tick()
    time.sleep(2)

def broken():
    raise RuntimeError("no")
"""
LINK = """\
link wan {{
    interface "{interface}"
    rate {rate}
    class fast {{ priority 0  dscp ef }}
    class bulk {{ priority 1  at least 1 mbit  queue 50 packets  inner fifo }}
}}
"""
POLICY = """\
policy p(threshold: packets = 10) {{
    at output
    interest {{ protocol udp  dport 5000 }}
    flow conn by saddr, sport, daddr, dport
    classify {{ short when conn.packets < threshold  long }}
    log {{ count conn }}
    control {{ {control} }}
}}
"""
TOLD = 'threshold every 100ms toward short.rate = 5 packets/s with call "law:told" within 2-200'
RATE = 'wan.rate every 100ms toward cpu = 50% with call "law:told" within 1 mbit-20 mbit'


def text(
    control: str = TOLD, *, rate: str = "10 mbit", interface: str = "eth1", link: bool = False
) -> str:
    found = POLICY.format(control=control)
    return found + LINK.format(interface=interface, rate=rate) if link else found


@dataclass
class Machine:
    folder: Path
    here: Namespace
    there: Namespace

    def unit(self, source: str, file: str = "p.itm") -> Unit:
        path = str(self.folder / file)
        Path(path).write_text(source)
        return unit_of(compile(Source(path, source)), path)

    def apply(self, source: str, file: str = "p.itm", **how: Any) -> runtime_apply.Applied:
        return runtime_apply.apply(self.unit(source, file), **how)

    def tell(self, value: object) -> None:
        (self.folder / "value").write_text(str(value))

    @property
    def ticks(self) -> int:
        path = self.folder / "ticks"
        return len(path.read_text()) if path.exists() else 0

    def log(self, name: str = "p") -> list[Mapping[str, Any]]:
        return decisions(store.directory(), name)

    def status(self, name: str = "p") -> PolicyStatus:
        (found,) = runtime_status.status([name])
        return found

    def link(self) -> LinkStatus:
        (found,) = runtime_status.link_status()
        return found

    def worker(self, does: str) -> int:
        """The process that does so, once it is there."""
        found: list[int] = []

        def there() -> bool:
            answer = talk.ask(store.directory(), {"command": "status"}) or {"workers": []}
            found[:] = [w["process"] for w in answer["workers"] if w["does"] == does and w["ready"]]
            return bool(found)

        until(there)
        return found[0]


@pytest.fixture
def machine(host: Namespace, tmp_path: Path) -> Iterator[Machine]:
    there = Namespace.create("there")
    veth(host, "eth1", there, "eth2")
    add_address(host, "eth1", "10.9.0.1/24")
    add_address(there, "eth2", f"{PEER}/24")
    (tmp_path / "law.py").write_text(LAW)
    (tmp_path / "value").write_text("10")
    with commands.nothing_left():
        yield Machine(tmp_path, host, there)
        runtime_apply.remove([])
        until(lambda: not commands.processes())
        assert nft.tables() == ()
        assert OURS not in tc()
    there.close()


def tc(interface: str = "") -> str:
    """The namespace's qdiscs, classes and filters as `tc` shows them."""
    device = ["dev", interface] if interface else []
    shown = ""
    for kind in ("qdisc", "class", "filter"):
        if kind == "qdisc" or interface:
            shown += subprocess.run(
                ["tc", kind, "show", *device], capture_output=True, text=True, check=False
            ).stdout
    return shown


def send(many: int, port: int = 4000) -> None:
    """Datagrams of one flow to the peer."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ends:
        ends.bind(("10.9.0.1", port))
        for _ in range(many):
            ends.sendto(b"x", (PEER, 5000))


def in_force() -> str:
    """The rules that the map leads to: the value, "" for the file's."""
    listed = subprocess.run(
        ["nft", "list", "map", "inet", "itm_p", "by_threshold_1"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = {
        word for word in listed.replace(",", " ").split() if word.startswith("by_threshold_1_")
    }
    assert len(found) <= 1
    return found.pop().removeprefix("by_threshold_1_") if found else ""


def kill_all() -> None:
    """The whole runtime, at once; who goes with its parent is gone already."""
    for process in commands.processes():
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def moved() -> bool:
    """Is another value in force than the file's, 10?"""
    return in_force() not in ("", "10")


def classes(machine: Machine) -> dict[str, int]:
    return {one.name: one.packets for one in machine.status().classes}


def rate() -> int:
    (link,) = store.load().links
    found = links.rate(link)
    return 0 if found is None else found * 8


# Parameters.


def test_a_moved_threshold_changes_elements_and_no_rule_and_forgets_no_count(
    machine: Machine,
) -> None:
    machine.apply(text())
    send(6)
    before = commands.rules()
    machine.tell(4)
    until(lambda: in_force() == "4")
    assert commands.rules() == before
    send(1)  # the seventh of its flow: over the new threshold
    send(5, port=4001)  # four of a new one are short
    assert classes(machine) == {"short": 6 + 4, "long": 1 + 1}
    machine.tell(100)
    until(lambda: 95 < int(in_force()) < 105)
    send(10)
    assert classes(machine) == {"short": 20, "long": 2}
    counted = sorted(flow.packets for flow in runtime_status.flows("p"))
    assert counted == [5, 17]
    assert commands.rules() == before
    assert not machine.status().drift


def test_the_log_has_each_decision_with_its_reason(machine: Machine) -> None:
    machine.tell(20)
    machine.apply(text())
    until(lambda: any(one["wanted"] for one in machine.log()))
    decided = [one for one in machine.log() if one["wanted"] is not None]
    assert [(o["written"], o["value"], o["target"]) for o in decided] == [("threshold", 20, 5)]
    assert decided[0]["reason"] and decided[0]["unit"] == "packets/s"
    until(lambda: len([one for one in machine.log() if one["sample"] is not None]) > 2)
    (shown,) = machine.status().control
    assert (shown.value, shown.base, shown.law) == (20, 10, "law:told")


def test_without_its_controller_the_file_has_its_way_again(machine: Machine) -> None:
    machine.tell(50)
    machine.apply(text())
    until(moved)
    kill_all()
    until(lambda: in_force() == "", limit=10)  # the kernel's own doing
    send(12)
    assert classes(machine) == {"short": 10, "long": 2}
    machine.apply(text())  # which starts the runtime again
    until(moved)


def test_a_file_without_the_controller_takes_it_away(machine: Machine) -> None:
    machine.tell(50)
    machine.apply(text())
    until(moved)
    send(20)
    machine.apply(text("").replace("control {  }", ""))
    assert "by_threshold" not in commands.rules()
    send(1)
    assert classes(machine) == {"short": 20, "long": 1}
    until(lambda: not commands.processes())


def test_a_policy_that_is_off_is_not_controlled(machine: Machine) -> None:
    machine.tell(50)
    machine.apply(text())
    until(moved)
    runtime_apply.switch(["p"], on=False)
    until(lambda: in_force() == "")
    assert machine.status().control[0].trouble == "the policy is off"
    runtime_apply.switch(["p"], on=True)
    until(moved)


def test_a_dry_run_only_tells(machine: Machine) -> None:
    machine.tell(50)
    machine.apply(text(TOLD + " dry run"))
    until(lambda: any(one["wanted"] == 50 for one in machine.log()))
    assert all(one["dry"] for one in machine.log())
    time.sleep(0.3)
    assert in_force() == ""


def test_set_moves_what_the_controller_starts_from(machine: Machine) -> None:
    machine.tell("nothing")
    machine.apply(text())
    runtime_apply.set_parameter("p", "threshold", "30")
    until(lambda: machine.status().control[0].base == 30)
    send(40)
    assert classes(machine) == {"short": 30, "long": 10}


@pytest.mark.parametrize("told", ["raise", "hang", "nonsense", "nan"])
def test_a_law_in_trouble_leaves_the_parameter_and_says_so(machine: Machine, told: str) -> None:
    machine.tell(20)
    other = 'every 100ms call "law:tick"'
    machine.apply(text(f"{TOLD} {other}"))
    until(lambda: in_force() == "20")
    machine.tell("0nan" if told == "nan" else told)
    until(lambda: any(one["blocked"] for one in machine.log()), limit=20)
    assert in_force() == "20"
    ticked = machine.ticks
    until(lambda: machine.ticks > ticked)
    machine.tell(40)
    until(lambda: in_force() in ("39", "40", "41", "42"), limit=20)


def test_many_slow_turns_are_no_law_that_hangs(machine: Machine) -> None:
    machine.apply(text(TOLD.replace("law:told", "law:slowly")))
    until(lambda: len(machine.log()) >= 15, limit=20)
    assert not any("too long" in one["blocked"] for one in machine.log())


def test_a_law_that_cannot_be_loaded_refuses_the_file_at_its_line(machine: Machine) -> None:
    with pytest.raises(CompileError) as caught:
        machine.apply(text(TOLD.replace("law:told", "law:nothing")))
    (found,) = caught.value.diagnostics
    assert (found.code, found.span is not None and found.span.line) == ("E063", 7)
    assert nft.tables() == ()


def test_a_change_to_a_law_that_cannot_be_loaded_is_refused_and_the_old_one_goes_on(
    machine: Machine,
) -> None:
    machine.tell(20)
    machine.apply(text(f'{TOLD} every 100ms call "law:tick"'))
    until(lambda: in_force() == "20")
    for wrong in (TOLD.replace("law:told", "law:nothing"), 'every 100ms call "law:nothing"'):
        with pytest.raises(CompileError) as caught:
            machine.apply(text(wrong))
        (found,) = caught.value.diagnostics
        assert (found.code, found.span is not None and found.span.line) == ("E063", 7)
    machine.tell(30)
    until(lambda: in_force() in ("29", "31"))
    ticked = machine.ticks
    until(lambda: machine.ticks > ticked)
    machine.apply(text(TOLD.replace("2-200", "2-100")))  # nothing stands in the way of a good one
    until(lambda: in_force() in ("29", "30", "31"))


def test_a_change_in_between_is_waited_for(machine: Machine) -> None:
    """A controller moves nothing while somebody else changes what is loaded."""
    machine.apply(text())
    with store.locked():
        machine.tell(20)
        until(lambda: any("under way" in one["blocked"] for one in machine.log()))
        assert in_force() == ""
    until(lambda: in_force() == "20")


def test_other_files_come_and_go_beside_a_controller(machine: Machine) -> None:
    machine.tell(20)
    machine.apply(text())
    until(lambda: in_force() == "20")
    worker = machine.worker("control")
    other = "policy q { at output  classify { all } }"
    for _ in range(3):
        machine.apply(other, "q.itm")
        runtime_apply.remove(["q"])
    assert machine.worker("control") == worker
    machine.apply(text().replace("sport, daddr", "sport,  daddr"))  # only the text is another
    until(lambda: in_force() == "20")
    assert not machine.status().drift


# Timers.


def test_timers_are_called_and_slow_ones_are_not_piled_up(machine: Machine) -> None:
    source = 'every 200ms call "law:slow" every 200ms call "law:broken"'
    machine.apply(text(source))
    until(lambda: machine.ticks >= 2)
    slow, broken = machine.status().timers
    until(lambda: machine.status().timers[0].skipped > 5)
    until(lambda: machine.status().timers[1].failed >= 5)
    slow, broken = machine.status().timers
    assert slow.called <= machine.ticks + 1
    assert slow.failed == 0
    assert broken.failed >= 5
    answer = talk.ask(store.directory(), {"command": "status"})
    assert answer is not None
    complaints = [line for line in answer["log"] if "law:broken failed" in line]
    assert len(complaints) == 1  # at a bounded rate


# Links.


def test_a_link_comes_with_its_file_and_goes_with_it(machine: Machine) -> None:
    bare = tc("eth1")
    machine.apply(text("", link=True).replace("control {  }", ""))
    assert rate() == 10_000_000
    link = machine.link()
    assert (link.state, link.drift, [c.name for c in link.classes]) == (
        "on",
        False,
        ["fast", "bulk"],
    )
    machine.apply(text("", link=True, rate="20 mbit").replace("control {  }", ""))
    assert rate() == 20_000_000
    runtime_apply.remove(["p"])
    assert tc("eth1") == bare
    until(lambda: not commands.processes())


def test_a_file_of_a_link_alone(machine: Machine) -> None:
    machine.apply(LINK.format(interface="eth1", rate="5 mbit"))
    assert rate() == 5_000_000
    runtime_apply.remove(["wan"])
    assert "htb" not in tc("eth1")
    with pytest.raises(UsageError):
        runtime_apply.remove(["wan"])


def test_a_class_keeps_what_it_counted_whichever_come_and_go_beside_it(machine: Machine) -> None:
    classes = {
        "fast": "class fast { priority 0  dscp ef }",
        "bulk": "class bulk { priority 1 }",
        "web": "class web { priority 2  dscp cs3 }",
    }

    def load(*names: str) -> Mapping[str, int]:
        body = " ".join(classes[name] for name in names)
        machine.apply(f'link wan {{ interface "eth1"  rate 10 mbit  {body}  otherwise bulk }}')
        return {one.name: one.packets for one in machine.link().classes}

    load("fast", "bulk")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ends:
        ends.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 46 << 2)
        for _ in range(30):
            ends.sendto(b"x", (PEER, 5000))
    until(lambda: machine.link().classes[0].packets == 30)
    assert load("web", "bulk", "fast")["fast"] == 30
    assert load("bulk", "fast")["fast"] == 30


def test_a_link_is_switched_off_and_on(machine: Machine) -> None:
    bare = tc("eth1")
    machine.apply(LINK.format(interface="eth1", rate="5 mbit"))
    assert runtime_apply.switch(["wan"], on=False) == ("wan",)
    assert tc("eth1") == bare and machine.link().state == "off"
    assert runtime_apply.switch(["wan"], on=False) == ()
    machine.apply(LINK.format(interface="eth1", rate="6 mbit"))  # stays off
    assert tc("eth1") == bare
    assert runtime_apply.switch(["wan"], on=True) == ("wan",)
    assert rate() == 6_000_000


def test_a_missing_interface_refuses_and_a_pattern_waits(machine: Machine) -> None:
    with pytest.raises(MachineError) as caught:
        machine.apply(text(link=True, interface="eth7"))
    (found,) = caught.value.diagnostics
    assert (found.code, found.span is not None and found.span.line) == ("E068", 10)
    assert nft.tables() == () and store.load().names == ()
    machine.apply(text(link=True, interface="veth*"))
    assert machine.link().state == "waiting" and not machine.link().drift
    veth(machine.here, "veth3", machine.there, "veth4")
    until(lambda: "htb" in tc("veth3"))
    assert machine.link().interfaces == ("veth3",)


def test_a_rate_over_what_the_hardware_sends_needs_force(machine: Machine) -> None:
    with pytest.raises(MachineError) as caught:
        machine.apply(text(link=True, rate="11 gbit"))  # veth says 10
    assert [one.code for one in caught.value.diagnostics] == ["E070"]
    assert "htb" not in tc("eth1") and nft.tables() == ()
    machine.apply(text(link=True, rate="11 gbit"), force=True)
    assert rate() == 11_000_000_000
    # Whoever changes another line of the file is not asked again.
    machine.apply(text(link=True, rate="11 gbit").replace("dport 5000", "dport 5001"))
    assert rate() == 11_000_000_000


def test_an_interface_that_comes_back_gets_its_link_again(machine: Machine) -> None:
    machine.apply(text(link=True))
    subprocess.run(["ip", "link", "delete", "eth1"], check=True)
    assert machine.link().state == "waiting"
    veth(machine.here, "eth1", machine.there, "eth2")
    until(lambda: "htb" in tc("eth1"))
    assert rate() == 10_000_000 and machine.link().state == "on"


def test_somebody_elses_qdisc_is_not_replaced_but_put_aside(machine: Machine) -> None:
    subprocess.run(
        "tc qdisc add dev eth1 root handle 7: htb default 10 && "
        "tc class add dev eth1 parent 7: classid 7:10 htb rate 3mbit burst 5000",
        shell=True, check=True,
    )  # fmt: skip
    theirs = tc("eth1")
    with pytest.raises(MachineError) as caught:
        machine.apply(text(link=True))
    assert [one.code for one in caught.value.diagnostics] == ["E069"]
    assert tc("eth1") == theirs and nft.tables() == ()
    machine.apply(text(link=True), force=True)
    assert rate() == 10_000_000
    machine.apply(text(link=True, rate="12 mbit"))  # ours by now
    assert rate() == 12_000_000
    runtime_apply.remove(["p"])
    assert tc("eth1") == theirs


def test_a_qdisc_that_somebody_sets_later_stays_until_force(machine: Machine) -> None:
    wan = LINK.format(interface="eth1", rate="5 mbit")
    machine.apply(wan, "wan.itm")
    theirs = [
        "tc",
        "qdisc",
        "replace",
        "dev",
        "eth1",
        "root",
        "handle",
        "9:",
        "pfifo",
        "limit",
        "3",
    ]
    subprocess.run(theirs, check=True)
    found = tc("eth1")
    beside = machine.apply(text(""))
    assert "pfifo" in " ".join(beside.told) and tc("eth1") == found
    assert runtime_apply.switch(["p"], on=False) == ("p",)
    assert "--force" in " ".join(machine.apply(wan, "wan.itm").told) and tc("eth1") == found
    runtime_apply.switch(["wan"], on=False)
    runtime_apply.switch(["wan"], on=True)
    assert tc("eth1") == found
    machine.apply(wan, "wan.itm", force=True)
    assert rate() == 5_000_000
    # Who gave leave is not asked again, to switch off and on, or to go back.
    runtime_apply.switch(["wan"], on=False)
    assert tc("eth1") == found
    runtime_apply.switch(["wan"], on=True)
    assert rate() == 5_000_000
    runtime_apply.remove(["wan"])
    assert tc("eth1") == found
    runtime_apply.rollback()
    assert rate() == 5_000_000
    runtime_apply.remove(["wan"])
    with pytest.raises(MachineError):
        machine.apply(wan, "wan.itm")  # which is another matter
    assert tc("eth1") == found


def test_leave_to_put_aside_is_for_what_was_there(machine: Machine) -> None:
    wan = LINK.format(interface="eth1", rate="5 mbit")
    theirs = ["tc", "qdisc", "replace", "dev", "eth1", "root", "handle", "9:", "pfifo", "limit"]
    subprocess.run([*theirs, "3"], check=True)
    machine.apply(wan, force=True)
    runtime_apply.switch(["wan"], on=False)
    subprocess.run([*theirs, "4"], check=True)
    found = tc("eth1")
    runtime_apply.switch(["wan"], on=True)
    assert tc("eth1") == found


def test_what_the_kernel_refuses_leaves_the_link_as_it_was(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.apply(text(link=True))
    before = tc("eth1")

    def refused(*_: object, **__: object) -> None:
        raise MachineError("no") from NftRefusalError(())

    with monkeypatch.context() as broken, pytest.raises(MachineError):
        broken.setattr(runtime_apply, "_load", refused)
        machine.apply(text(link=True, rate="3 mbit").replace("dport 5000", "dport 5001"))
    assert tc("eth1") == before


def test_a_change_that_is_not_confirmed_takes_the_link_back(machine: Machine) -> None:
    machine.apply(text(link=True))
    path = machine.folder / "p.itm"
    path.write_text(text(link=True, rate="4 mbit"))
    done = commands.run("apply", str(path), "--confirm", commands.lasting(1.5))
    assert done.returncode == 0, done.stderr
    assert rate() == 4_000_000
    until(lambda: rate() == 10_000_000)


def test_drift_of_a_link_is_told_and_mended(machine: Machine) -> None:
    machine.apply(text(link=True))
    subprocess.run(
        ["tc", "class", "change", "dev", "eth1", "parent", _class(1), "classid", _class(class_number("bulk")),
         "htb", "rate", "2mbit", "prio", "1"], check=True,
    )  # fmt: skip
    link = machine.link()
    assert link.drift and "eth1" in " ".join(link.changed)
    change, _ = runtime_apply.planned(machine.unit(text(link=True)))
    assert [(c.action, c.kind, c.name) for c in change.changes if c.action != "keep"] == [
        ("replace", "link", "wan")
    ]
    machine.apply(text(link=True))
    assert not machine.link().drift
    assert runtime_apply.planned(machine.unit(text(link=True)))[0].empty


def _class(number: int) -> str:
    (link,) = store.load().links
    return f"{link.handle:x}:{number:x}"


def test_a_controlled_rate_goes_back_when_its_controller_ends(machine: Machine) -> None:
    machine.tell(500_000)  # bytes a second
    machine.apply(text(RATE, link=True))
    until(lambda: rate() == 4_000_000)
    link = machine.link()
    assert not link.drift
    assert (link.rate, link.file_rate) == (500_000, 1_250_000)
    machine.tell("nothing")  # what comes next starts from the file's
    os.kill(machine.worker("control"), signal.SIGKILL)
    until(lambda: rate() == 10_000_000)
    machine.tell(250_000)
    until(lambda: rate() == 2_000_000)
    machine.apply(text(RATE, link=True, rate="8 mbit"))
    machine.tell("nothing")
    until(lambda: rate() == 8_000_000)
    machine.tell(250_000)
    until(lambda: rate() == 2_000_000)
    machine.apply(text("", link=True, rate="8 mbit").replace("control {  }", ""))
    until(lambda: rate() == 8_000_000)


def test_a_runtime_that_was_killed_sets_rates_right_as_it_comes_back(machine: Machine) -> None:
    machine.tell(500_000)
    machine.apply(text(RATE, link=True))
    until(lambda: rate() == 4_000_000)
    kill_all()
    until(lambda: not commands.processes())
    machine.tell("nothing")
    machine.apply(text(RATE, link=True))
    until(lambda: rate() == 10_000_000)


# Measures.


def _sampled(machine: Machine, fits: Callable[[float], bool]) -> None:
    until(lambda: any(one["sample"] is not None and fits(one["sample"]) for one in machine.log()))


def test_rates_and_flows_are_measured(machine: Machine) -> None:
    machine.tell("nothing")
    machine.apply(text(TOLD.replace("short.rate = 5 packets/s", "conn.flows = 3")))
    for port in range(4000, 4007):
        send(1, port)
    _sampled(machine, lambda flows: flows == 7)
    machine.apply(text(TOLD.replace("every 100ms", "every 1s")))
    begun = time.monotonic()
    machine.worker("control")
    while time.monotonic() - begun < 4 * PATIENCE:
        send(1, 4100 + int(time.monotonic() * 1000) % 30_000)
        time.sleep(0.02)
    found = [one["sample"] for one in machine.log() if one["unit"] == "packets/s"]
    spent = classes(machine)["short"] / (time.monotonic() - begun)
    assert any(one is not None and spent / 2 < one < spent * 2 for one in found), (found, spent)


def test_the_round_trip_is_measured_and_a_silent_host_leads_to_the_safe_value(
    machine: Machine,
) -> None:
    measured = TOLD.replace("short.rate = 5 packets/s", f"rtt {PEER} = 5ms")
    machine.tell(20)
    machine.apply(text(measured.replace(" within", " lost 5 safe 10 within")))
    _sampled(machine, lambda milliseconds: 0 < milliseconds < 500)
    until(lambda: in_force() == "20")
    subprocess.run(["ip", "link", "set", "eth1", "down"], check=True)
    until(lambda: in_force() in ("", "10"), limit=20)
    assert any(one["blocked"] == "no sample" for one in machine.log())
    subprocess.run(["ip", "link", "set", "eth1", "up"], check=True)
    until(lambda: in_force() == "20", limit=20)


def test_backlog_drops_and_rate_of_a_class_are_measured(machine: Machine) -> None:
    machine.tell("nothing")
    source = text(
        TOLD.replace("short.rate = 5 packets/s", "wan.bulk.backlog = 5 packets"), link=True,
        rate="100 kbit",
    ).replace("at least 1 mbit", "")  # fmt: skip
    machine.apply(source)
    machine.worker("control")
    until(
        lambda: send(400) is None and any(10 < (one["sample"] or 0) <= 50 for one in machine.log())
    )
    machine.apply(source.replace("wan.bulk.backlog = 5 packets", "wan.bulk.drops = 5 packets/s"))
    machine.worker("control")
    until(lambda: send(200, 5000) is None and any(
        (one["sample"] or 0) > 0 for one in machine.log() if one["unit"] == "dropped/s"
    ))  # fmt: skip
    machine.apply(source.replace("wan.bulk.backlog = 5 packets", "wan.rate = 50 kbit"))
    _sampled(machine, lambda rate: 100_000 / 8 * 0.5 < rate < 100_000 / 8 * 1.5)


def test_a_class_has_its_share_of_what_the_link_sends(machine: Machine) -> None:
    machine.tell("nothing")
    source = text(TOLD.replace("short.rate = 5 packets/s", "wan.bulk.share = 50%"), link=True)
    machine.apply(source.replace(
        "control {", "process { short { priority wan.bulk } long { priority wan.fast } }  control {"
    ))  # fmt: skip
    machine.worker("control")
    begun = time.monotonic()
    port = 4000
    while time.monotonic() - begun < 3 * PATIENCE:
        send(12, port)  # ten of each flow are short
        port += 1
        time.sleep(0.05)
    found = [one["sample"] for one in machine.log() if one["sample"] is not None]
    assert found and all(75 < one < 90 for one in found[-5:]), found


def test_a_link_that_is_away_is_no_sample(machine: Machine) -> None:
    machine.tell(20)
    machine.apply(
        text(TOLD.replace("short.rate = 5 packets/s", "wan.bulk.rate = 5 mbit"), link=True,
             interface="veth*")
    )  # fmt: skip
    until(lambda: len(machine.log()) > 5)
    assert {one["sample"] for one in machine.log()} == {None}
    assert in_force() == "10"


def test_steering_tells_of_controllers(machine: Machine) -> None:
    machine.apply(text(RATE, link=True))
    assert list(steering.controlled(store.load())) == ["wan"]
    runtime_apply.switch(["p"], on=False)
    assert steering.controlled(store.load()) == {}
