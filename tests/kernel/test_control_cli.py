"""Links, controllers and timers as `itmc` shows them, on a real kernel.

Each test is in a namespace of its own, with the interface `eth1` towards another one. What a
controller decides comes from a file that the test writes (`law:told`).
"""

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from itmlang.links import Link
from runtime import links, nft, store
from runtime import status as runtime_status
from runtime.decisions import log_file
from runtime.traffic import Namespace, add_address, veth
from tests.support import commands
from tests.support.commands import PATIENCE, run, until

PEER = "10.9.0.2"
EF = 46 << 2  # as a TOS
LAW = """\
import pathlib
FILE = pathlib.Path(__file__).with_name("value")

def told(situation):
    return float(FILE.read_text())

def tick():
    pass
"""
SITE = """\
link wan {{
    interface "{interface}"
    rate 10 mbit
    class fast {{ priority 0  dscp ef }}
    class bulk {{ priority 1  at most 100 kbit  queue 5 packets  inner fifo }}
}}
policy edge(threshold: packets = 10) {{
    at output
    interest {{ protocol udp  dport 5000 }}
    flow conn by saddr, sport, daddr, dport
    classify {{ short when conn.packets < threshold  long }}
    log {{ count conn }}
    control {{ {control} }}
}}
"""
THRESHOLD = 'threshold every 50ms toward short.rate = 5 packets/s with call "law:told" within 2-200'
RATE = 'wan.rate every 50ms toward cpu = 50% with call "law:told" within 1 mbit-20 mbit'
TICK = 'every 50ms call "law:tick"'


@dataclass
class Site:
    file: Path

    def write(self, *control: str, interface: str = "eth1") -> None:
        text = SITE.format(control=" ".join(control), interface=interface)
        self.file.write_text(text if control else text.replace("    control {  }\n", ""))

    def apply(self, *control: str, interface: str = "eth1") -> None:
        self.write(*control, interface=interface)
        done = run("apply", str(self.file))
        assert (done.returncode, done.stderr) == (0, "")

    def tell(self, value: object) -> None:
        self.file.with_name("value").write_text(str(value))

    def kill(self) -> None:
        """End the runtime, and all that it began."""
        for process in commands.processes():
            with suppress(ProcessLookupError):  # it went with its parent
                os.kill(process, signal.SIGKILL)
        until(lambda: not commands.processes())


@pytest.fixture
def site(host: Namespace, tmp_path: Path) -> Iterator[Site]:
    there = Namespace.create("there")
    veth(host, "eth1", there, "eth2")
    add_address(host, "eth1", "10.9.0.1/24")
    add_address(there, "eth2", f"{PEER}/24")
    (tmp_path / "law.py").write_text(LAW)
    made = Site(tmp_path / "site.itm")
    made.tell(10)
    with commands.nothing_left():
        yield made
        assert run("remove", "--all").returncode == 0
        until(lambda: not commands.processes())
        assert nft.tables() == ()
    there.close()


def send(many: int, port: int = 4000, tos: int = 0, size: int = 400) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ends:
        ends.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)
        ends.bind(("10.9.0.1", port))
        for _ in range(many):
            ends.sendto(b"x" * size, (PEER, 5000))


@contextmanager
def traffic(**how: Any) -> Iterator[None]:
    """Datagrams all the time, a few at once."""
    ending = threading.Event()

    def go() -> None:  # in the namespace that the thread is begun in
        while not ending.wait(0.02):
            send(10, **how)

    thread = threading.Thread(target=go)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


def status(*names: str) -> dict[str, Any]:
    done = run("status", "--json", *names)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def shown(*arguments: str) -> str:
    """What a command prints, spaces shrunk to one."""
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    return "\n".join(" ".join(line.split()) for line in done.stdout.splitlines())


def controller(name: str = "edge", index: int = 0) -> dict[str, Any]:
    (policy,) = status(name)["policies"]
    found: dict[str, Any] = policy["control"][index]
    return found


def logs() -> list[str]:
    return sorted(path.name for path in store.directory().glob("control-*"))


# Status.


def test_status_shows_a_links_classes_and_what_they_drop(site: Site) -> None:
    site.apply()
    send(2, tos=EF)
    send(40)  # six kilobytes wait, and a burst may leave at once
    found = status()
    (link,) = found["links"]
    assert (found["schema"], link["name"], link["state"]) == (1, "wan", "on")
    assert (link["rate"], link["file_rate"], link["interfaces"]) == (1250000, 1250000, ["eth1"])
    fast, bulk = link["classes"]
    assert (fast["name"], fast["priority"], fast["packets"], fast["drops"]) == ("fast", 0, 2, 0)
    assert bulk["packets"] + bulk["waiting"] + bulk["drops"] == 40
    assert bulk["drops"] > 20
    text = shown("status")
    assert "\nwan: on, link of eth1, 10 mbit, from " in text
    assert "\nclass priority packets bytes drops waiting bytes waiting\n" in text
    assert "\nfast 0 2 " in text
    assert f" {bulk['drops']} " in text
    only = shown("status", "wan")
    assert only.startswith("wan: on") and "edge" not in only
    assert (status("edge")["links"], status("wan")["policies"]) == ([], [])


def test_status_tells_what_others_did_to_a_link_and_apply_mends_it(site: Site) -> None:
    site.apply()
    site.kill()  # it may be about to look after the link
    subprocess.run(["tc", "qdisc", "delete", "dev", "eth1", "root"], check=True)
    (link,) = status("wan")["links"]
    assert (link["state"], link["drift"]) == ("on", True)
    text = shown("status", "wan")
    assert "changed by something else: its root qdisc is gone at eth1" in text
    assert "`itmc apply` puts it right" in text
    assert run("apply", str(site.file)).returncode == 0
    assert not status("wan")["links"][0]["drift"]
    assert "changed by" not in shown("status", "wan")


def test_status_says_what_a_link_waits_for(site: Site) -> None:
    site.apply(interface="ppp*")
    text = shown("status", "wan")
    assert "wan: waiting, link of ppp*, 10 mbit" in text
    assert "no interface ppp* is here yet: it begins when one comes" in text
    assert "priority" not in text
    assert "wan ppp* 10 mbit waiting" in shown("list")


def test_an_interface_that_goes_is_told(site: Site) -> None:
    site.apply()
    subprocess.run(["ip", "link", "delete", "eth1"], check=True)
    text = shown("status", "wan")
    assert "its interface eth1 is gone: it begins again when that comes back" in text
    assert "wan: waiting, link of eth1," in shown("top", "wan", "--interval", "100ms")


def test_status_shows_controllers_and_timers(site: Site) -> None:
    site.tell(50)
    site.apply(THRESHOLD, TICK)
    until(lambda: controller()["value"] == 50)
    one = controller()
    (step,) = [step for step in (49, 50, 51) if one["in_force"] == str(step)]
    assert (one["in_file"], one["base"], one["target"], one["unit"]) == ("10", 10, 5, "packets/s")
    assert (one["law"], one["dry"], one["would"], one["trouble"]) == ("law:told", False, "", "")
    assert (one["period"], one["low"], one["high"]) == (50, 2, 200)
    until(lambda: status("edge")["policies"][0]["timers"][0]["called"] > 1)
    (timer,) = status("edge")["policies"][0]["timers"]
    assert (timer["target"], timer["period"], timer["failed"]) == ("law:tick", 50, 0)
    text = shown("status", "edge")
    assert "\ncontrols now file by measure sample wanted every\n" in text
    assert f"\nthreshold {step} 10 law:told short.rate 0 packets/s 5 packets/s 50ms\n" in text
    assert "\nthreshold: short.rate 0 under 5 packets/s, by the function" in text
    assert "\ncalls every called skipped failed\n" in text
    assert "\nlaw:tick 50ms " in text


def test_a_dry_run_shows_what_it_would_be(site: Site) -> None:
    site.tell(200)
    site.apply(THRESHOLD + " dry run")
    until(lambda: controller()["would"] == "200")
    assert controller()["in_force"] == "10"
    text = shown("status", "edge")
    assert "\nthreshold 10 10 law:told, dry run " in text
    assert "; it would be 200\n" in text


def test_the_rate_that_a_controller_moved_is_no_drift_and_is_shown(site: Site) -> None:
    site.tell(625000)
    site.apply(RATE)
    until(lambda: status("wan")["links"][0]["rate"] == 625000)
    (link,) = status("wan")["links"]
    assert (link["file_rate"], link["drift"]) == (1250000, False)
    assert "wan: on, link of eth1, 5 mbit now (10 mbit in its file)," in shown("status", "wan")
    assert "wan eth1 5 mbit now (10 mbit in its file) on" in shown("list")
    assert "5 mbit now (10 mbit in its file)" in shown("top", "--interval", "100ms")
    assert "\nwan.rate 5 mbit 10 mbit law:told cpu " in shown("status", "edge")


def test_who_looks_is_in_no_controllers_way(site: Site) -> None:
    site.apply(THRESHOLD)
    until(lambda: controller()["value"] == 10)
    log = log_file(store.directory(), "edge")
    with store.reading():  # as long as `status` reads a large flow table
        before = len(log.read_text())
        site.tell(100)
        until(lambda: '"value": 100' in log.read_text()[before:])
        assert "under way" not in log.read_text()[before:]


def test_a_rate_that_moves_while_it_is_looked_at_is_no_drift(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.tell(625000)
    site.apply(RATE)
    until(lambda: status("wan")["links"][0]["rate"] == 625000)
    site.kill()
    (wan,) = store.load().links
    wrong, rates = links.wrong, [500000]

    def meanwhile(wanted: Iterable[Link]) -> dict[str, list[str]]:
        if rates:
            links.set_rate(wan, "eth1", rates.pop())
        return wrong(wanted)

    monkeypatch.setattr(links, "wrong", meanwhile)
    (found,) = runtime_status.link_status()
    assert (found.rate, found.changed, rates) == (500000, (), [])
    subprocess.run(["tc", "qdisc", "delete", "dev", "eth1", "root"], check=True)
    assert runtime_status.link_status()[0].changed == ("its root qdisc is gone at eth1",)


def test_a_policy_that_is_off_says_that_nothing_is_controlled(site: Site) -> None:
    site.tell(50)
    site.apply(THRESHOLD, TICK)
    until(lambda: controller()["value"] == 50)
    assert run("disable", "edge").stdout == "edge: off now\n"
    until(lambda: controller()["value"] is None)
    one = controller()  # not what the log ends with
    assert (one["in_force"], one["trouble"]) == ("10", "the policy is off")
    text = shown("status", "edge")
    assert "threshold is not controlled: the policy is off" in text
    assert "timers are not called: the policy is off" in text


def test_what_an_earlier_controller_decided_is_not_taken_for_what_holds(site: Site) -> None:
    site.tell(50)
    site.apply(THRESHOLD)
    until(lambda: controller()["value"] == 50)
    site.apply(THRESHOLD.replace("50ms", "1h"))
    until(lambda: controller()["value"] is None)
    assert controller()["in_force"] == "10"
    assert len(logs()) == 1


def test_without_the_runtime_status_says_so(site: Site) -> None:
    site.tell(50)
    site.apply(THRESHOLD)
    until(lambda: controller()["value"] == 50)
    site.kill()
    assert (controller()["value"], controller()["in_force"]) == (None, "10")
    text = shown("status", "edge")
    assert "threshold is not controlled: the runtime does not run: `itmc apply`" in text


def test_without_the_runtime_a_rate_is_what_it_was_left_at(site: Site) -> None:
    site.tell(250_000)
    site.apply(RATE)
    until(lambda: controller()["in_force"] == "2 mbit")
    site.kill()
    assert (controller()["value"], controller()["in_force"]) == (None, "2 mbit")


# The log.


def test_the_decisions_are_a_table_or_the_lines_as_they_are(site: Site) -> None:
    site.tell(50)
    site.apply(THRESHOLD)
    until(lambda: len(run("status", "edge", "--control", "--json").stdout.splitlines()) > 8)
    lines = run("status", "edge", "--control", "--json").stdout.splitlines()
    there = log_file(store.directory(), "edge").read_text().splitlines()
    assert lines == there[: len(lines)]
    assert len(run("status", "edge", "--control", "--json", "--last", "2").stdout.splitlines()) == 2
    text = shown("status", "edge", "--control", "--last", "3").splitlines()
    assert text[0] == "time controls value sample wanted because held back by"
    assert len(text) == 2 + 3 + 1
    assert " threshold 49 0 packets/s 5 packets/s short.rate 0 under" in text[3]
    assert text[-1].startswith("the last 3 of ")


def test_a_log_that_cannot_be_shown(site: Site) -> None:
    site.apply(RATE)
    for arguments, message, help in (
        (
            ["wan"],
            "itmc: `wan` is a link: policies have controllers",
            "`itmc status edge --control`",
        ),
        (["nix"], "itmc: no policy `nix` is loaded", ""),
        ([], "itmc: --control shows one policy: name it", ""),
        (["edge", "wan"], "itmc: --control shows one policy: name it", ""),
    ):
        done = run("status", *arguments, "--control")
        assert (done.returncode, done.stdout) == (2, "")
        assert commands.one_message(done) == message
        assert help in done.stderr
    assert "--last goes with --control" in run("status", "--last", "3").stderr
    site.apply(TICK)
    done = run("status", "edge", "--control")
    assert commands.one_message(done) == "itmc: `edge` has no controller"
    assert done.returncode == 2


def test_nothing_decided_is_no_error(site: Site) -> None:
    site.apply(THRESHOLD.replace("50ms", "1h"))
    assert shown("status", "edge", "--control") == "nothing was decided yet"
    assert run("status", "edge", "--control", "--json").stdout == ""
    assert "threshold: nothing was decided yet" in shown("status", "edge")


# List, and changes.


def test_a_link_is_listed_switched_and_removed(site: Site) -> None:
    bare = tc()
    site.apply()
    assert "\nlink interface rate state file\n" in shown("list")
    assert "wan eth1 10 mbit on" in shown("list")
    (link,) = json.loads(run("list", "--json").stdout)["links"]
    assert (link["name"], link["state"], link["interface"]) == ("wan", "on", "eth1")
    assert run("disable", "wan").stdout == "wan: off now\n"
    assert tc() == bare
    assert "wan: off, link of eth1" in shown("status")
    assert "wan eth1 10 mbit off" in shown("list")
    assert "wan: off" in shown("top", "--interval", "100ms")
    assert run("enable", "wan").stdout == "wan: on now\n"
    assert "htb" in tc()
    assert run("remove", "wan", "edge").returncode == 0
    assert tc() == bare
    assert shown("list") == shown("status") == shown("top", "--interval", "100ms")
    assert shown("list") == "no policy is loaded"


def tc() -> str:
    done = subprocess.run(["tc", "qdisc", "show", "dev", "eth1"], capture_output=True, text=True)
    return done.stdout


def test_a_link_has_nothing_to_set(site: Site) -> None:
    site.apply(TICK)
    done = run("set", "wan.rate", "5 mbit")
    assert (done.returncode, done.stdout) == (2, "")
    assert "`wan` is a link" in done.stderr and "apply" in done.stderr


@pytest.mark.parametrize("how", ["on", "off", "killed"])
def test_remove_leaves_no_log(site: Site, how: str) -> None:
    site.tell(50)
    site.apply(THRESHOLD)
    until(lambda: logs() == ["control-edge.jsonl"])
    older = log_file(store.directory(), "edge").with_name("control-edge.jsonl.1")
    older.write_text("")
    if how == "off":
        run("disable", "edge")
        until(lambda: controller()["value"] is None)
        assert len(logs()) == 2  # a policy that is off keeps it
    elif how == "killed":
        site.kill()
    assert run("remove", "edge").returncode == 0
    until(lambda: not logs())
    until(lambda: not commands.processes() or "wan" in shown("list"))
    time.sleep(0.2)
    assert logs() == []


# Top.


def test_top_shows_rates_where_nobody_watches(site: Site) -> None:
    site.apply(THRESHOLD.replace("short", "long"), TICK)
    with traffic(tos=EF):
        rows = {
            row[0]: row for line in shown("top", "--interval", "500ms").splitlines()
            if (row := line.split())
        }  # fmt: skip
    assert rows["class"] == ["class", "priority", "packets/s", "rate", "drops/s", "waiting"]
    assert float(rows["long"][1].replace(",", "")) > 50
    assert rows["short"][1] == "0"
    assert float(rows["fast"][2].replace(",", "")) > 50
    assert rows["fast"][4] in ("kbit", "mbit")
    assert rows["threshold"][:4] == ["threshold", "10", "10", "law:told"]
    assert "law:tick" in rows
    with traffic():
        found = shown("top", "wan", "--interval", "500ms").splitlines()
    bulk = next(line.split() for line in found if line.startswith("bulk"))
    assert float(bulk[5].replace(",", "")) > 0  # drops/s
    assert int(bulk[6]) in range(6)
    assert not any(line.startswith("edge") for line in found)


def test_top_refuses_what_it_cannot_show(site: Site) -> None:
    site.apply()
    done = run("top", "wen")
    assert (done.returncode, commands.one_message(done)) == (2, "itmc: no policy `wen` is loaded")
    assert "did you mean `wan`?" in done.stderr
    for text in ("10ms", "soon", "0s"):
        assert run("top", "--interval", text).returncode == 2


def test_a_glance_holds_up_no_change(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.apply(RATE, TICK)
    free = []
    counters = nft.counters

    def asked(path: str) -> dict[str, tuple[int, int]]:
        with store.locked_at_once() as held:
            free.append(held is not None)
        return counters(path)

    monkeypatch.setattr(nft, "counters", asked)
    found = runtime_status.glance()
    assert free and all(free)
    assert [one.name for one in found.policies] == ["edge"]
    assert [one.name for one in found.links] == ["wan"]


class Terminal:
    """`itmc` on a terminal of its own."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process, self.end = pty.fork()
        if self.process == 0:
            os.environ.update({"TERM": "xterm-256color", **environment})
            command = [*commands.command(), *arguments]
            os.execv(command[0], command)
        self.before = termios.tcgetattr(self.end)
        self.said = ""

    def read(self, wanted: Callable[[str], bool]) -> None:
        """Until it said what is wanted, or ended."""
        due = time.monotonic() + 15 * PATIENCE
        while not wanted(self.said):
            assert time.monotonic() < due, self.said[-1000:]
            if select.select([self.end], [], [], 0.1)[0]:
                try:
                    self.said += os.read(self.end, 1 << 16).decode(errors="replace")
                except OSError:  # it ended
                    return

    def press(self, key: str) -> None:
        os.write(self.end, key.encode())

    def ended(self) -> int:
        self.read(lambda said: False)
        assert termios.tcgetattr(self.end) == self.before
        _, code = os.waitpid(self.process, 0)
        os.close(self.end)
        return os.waitstatus_to_exitcode(code)


@pytest.mark.parametrize("end", ["q", "Q", "\x03", "SIGTERM"])
def test_top_is_live_on_a_terminal_and_leaves_it_as_it_was(site: Site, end: str) -> None:
    site.apply(THRESHOLD)
    top = Terminal("top", "--interval", "100ms")
    top.read(lambda said: said.count("wan: on") >= 3)  # drawn again and again
    assert "\x1b[?1049h" in top.said and "\x1b[?1049l" not in top.said
    send(30)
    top.read(lambda said: re.search(r"long .* 20 ", said) is not None)
    if end == "SIGTERM":
        os.kill(top.process, signal.SIGTERM)
    else:
        top.press(end)
    assert top.ended() == 0
    assert top.said.rstrip().endswith("\x1b[?25h\x1b[?1049l")  # the cursor, the screen before


def test_top_shows_trouble_in_colour_unless_told_not_to(site: Site) -> None:
    site.apply(THRESHOLD)
    run("disable", "edge")
    for environment, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        top = Terminal("top", "--interval", "100ms", **environment)
        top.read(lambda said: said.count("is not controlled") >= 2)
        top.press("q")
        assert top.ended() == 0
        assert ("\x1b[33m" in top.said) == coloured


def test_top_goes_on_while_policies_come_and_go(site: Site) -> None:
    top = Terminal("top", "--interval", "100ms")
    top.read(lambda said: "no policy is loaded" in said)
    site.apply(THRESHOLD)
    top.read(lambda said: "wan: on" in said and "threshold" in said)
    subprocess.run(["ip", "link", "delete", "eth1"], check=True)
    top.read(lambda said: "wan: waiting" in said)
    assert run("remove", "--all").returncode == 0
    seen = len(top.said)
    top.read(lambda said: "no policy is loaded" in said[seen:])
    top.press("q")
    assert top.ended() == 0
