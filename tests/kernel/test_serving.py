"""Packets through handlers on a real kernel, and what becomes of them when a part of it fails.

Each test is in a namespace of its own: policies with `call`, handlers written beside them,
a runtime that `apply` starts, datagrams over the loopback. When a test is over, nothing
of the runtime may be left.
"""

import os
import random
import signal
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from itmlang import marks
from itmlang.diagnostics import CompileError
from itmlang.pipeline import compile
from itmlang.source import Source
from runtime import apply as runtime_apply
from runtime import netqueue, nft, serving, store, talk
from runtime import status as runtime_status
from runtime.status import PythonStatus
from runtime.traffic import Namespace, add_address, veth
from runtime.units import Unit, unit_of
from tests.kernel.test_crash import ended_at, killed_before
from tests.support import commands
from tests.support.commands import until
from tests.support.kernel import SO_MARK

PORT = 5000
LOCAL = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
SO_RCVBUFFORCE = 33
POLICY = """\
policy {name} {{
    at output
    priority {priority}
    interest {{ protocol udp  dport 5000 }}
    classify {{ all }}
    process {{ all {{ {action} }} }}
    {more}
}}
"""


def text(
    action: str = 'call "hand:handle"', name: str = "p", priority: int = 0, more: str = ""
) -> str:
    return POLICY.format(name=name, priority=priority, action=action, more=more)


@dataclass
class Machine:
    """The namespace's policies, with their handlers in a folder."""

    folder: Path

    def handlers(self, source: str, module: str = "hand") -> None:
        beginning = "from libitm import Class, Verdict, headers_only, whole_packets\n"
        (self.folder / f"{module}.py").write_text(beginning + source)

    def unit(self, source: str, file: str = "p.itm") -> Unit:
        path = str(self.folder / file)
        Path(path).write_text(source)
        return unit_of(compile(Source(path, source)), path)

    def apply(self, source: str, file: str = "p.itm") -> runtime_apply.Applied:
        return runtime_apply.apply(self.unit(source, file))

    def python(self, name: str = "p") -> PythonStatus:
        (found,) = runtime_status.status([name])
        assert found.python is not None
        return found.python

    def handled(self, many: int, name: str = "p") -> PythonStatus:
        """The status once so many packets were handled."""
        until(lambda: sum(one["packets"] for one in self.counts(name)) >= many)
        found = self.python(name)
        assert found.handled == many
        return found

    @property
    def runtime(self) -> dict[str, Any]:
        answer = talk.ask(store.directory(), {"command": "status"})
        assert answer is not None
        return answer

    def counts(self, name: str = "p") -> list[dict[str, Any]]:
        """What each worker of a policy counted."""
        workers = self.runtime["workers"]
        return [{"packets": 0, **one["counts"]} for one in workers if one["policy"] == name]

    @property
    def workers(self) -> list[int]:
        """Those that serve."""
        return [one["process"] for one in self.runtime["workers"] if one["ready"]]

    def processes(self) -> list[int]:
        """The supervisor and its workers."""
        return sorted(commands.processes())

    def signal(self, number: int, processes: Sequence[int]) -> None:
        for process in processes:
            os.kill(process, number)
        if number == signal.SIGSTOP:
            until(lambda: all(commands.processes()[process] == "T" for process in processes))


@pytest.fixture
def machine(host: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # as it is on most machines
    made = Machine(tmp_path)
    with commands.nothing_left():
        yield made
        for process in commands.processes():
            os.kill(process, signal.SIGCONT)
        runtime_apply.remove([])
        until(lambda: not commands.processes())
        assert netqueue.table() == []
        assert nft.tables() == ()


class Ends:
    """Datagrams over the loopback, each with a number; a sender for each flow."""

    def __init__(self, family: int = socket.AF_INET, port: int = PORT) -> None:
        self._family, self._to = family, (LOCAL[family], port)
        self.receiver = socket.socket(family, socket.SOCK_DGRAM)
        self.receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        self.receiver.bind(self._to)
        self._senders: dict[int, socket.socket] = {}

    def send(self, data: bytes = b"x", flow: int = 0, mark: int = 0) -> bool:
        """Send a datagram; False if the kernel says that it was dropped."""
        if flow not in self._senders:
            self._senders[flow] = socket.socket(self._family, socket.SOCK_DGRAM)
        sender = self._senders[flow]
        sender.setsockopt(socket.SOL_SOCKET, SO_MARK, struct.pack("=I", mark))
        try:
            sender.sendto(data, self._to)
        except PermissionError:
            return False
        return True

    def receive(self, wait: float = 5.0) -> bytes | None:
        """The next datagram, None if none comes."""
        self.receiver.settimeout(wait)
        try:
            return self.receiver.recv(1 << 16)
        except TimeoutError:
            return None

    def received(self) -> list[bytes]:
        """All that has arrived."""
        found = []
        self.receiver.setblocking(False)
        try:
            while True:
                found.append(self.receiver.recv(1 << 16))
        except BlockingIOError:
            return found

    def passes(self, data: bytes = b"probe", wait: float = 0.3) -> bool:
        """Does a datagram come through now?"""
        self.received()
        self.send(data)
        return self.receive(wait) is not None

    def close(self) -> None:
        for one in (self.receiver, *self._senders.values()):
            one.close()


@pytest.fixture
def ends() -> Iterator[Callable[..., Ends]]:
    made: list[Ends] = []

    def make(family: int = socket.AF_INET, port: int = PORT) -> Ends:
        made.append(Ends(family, port))
        return made[-1]

    yield make
    for one in made:
        one.close()


HANDLER = """
def handle(packet):
    packet.payload = packet.payload.upper()
"""


def test_a_policy_is_served_from_its_first_packet_on(machine, ends):
    machine.handlers(HANDLER)
    machine.apply(text())
    udp = ends()
    udp.send(b"hello")
    assert udp.receive() == b"HELLO"
    found = machine.handled(1)
    assert (found.unserved, found.workers, found.trouble) == (0, 1, "")


# Fail open, fail closed.


@dataclass
class Pair:
    """Two policies, one that fails open and one that fails closed, with datagrams for each."""

    machine: Machine
    open: Ends
    closed: Ends

    @property
    def unserved(self) -> tuple[int, int]:
        """Of each, the packets that the kernel counted because nobody served them."""
        found = {one.name: one.python for one in runtime_status.status()}
        assert found["o"] is not None
        assert found["c"] is not None
        return found["o"].unserved, found["c"].unserved

    def served(self) -> bool:
        """Do packets of both come through their handler now?"""
        for one in (self.open, self.closed):
            one.received()
            one.send(b"served")
        return [one.receive(0.3) for one in (self.open, self.closed)] == [b"SERVED"] * 2

    def passed_by(self) -> bool:
        """Does the kernel pass the runtime by now, each policy in its way?"""
        self.open.received()
        self.open.send(b"unserved")
        # Whoever sends what is dropped at output is told so.
        return self.open.receive(0.05) == b"unserved" and not self.closed.send(b"unserved")

    def each_is_counted(self, many: int = 10) -> None:
        """Unserved packets pass or are dropped, all of them, and `status` says how many."""
        before = self.unserved
        for number in range(many):
            assert self.open.send(b"%d" % number)
            assert not self.closed.send(b"%d" % number)
            assert self.open.receive() == b"%d" % number
        assert self.closed.received() == []
        assert self.unserved == (before[0] + many, before[1] + many)

    def none_is_unserved(self, many: int = 10) -> None:
        before = self.unserved
        for number in range(many):
            assert self.open.send(b"a%d" % number)
            assert self.closed.send(b"a%d" % number)
            assert self.open.receive() == self.closed.receive() == b"A%d" % number
        assert self.unserved == before


@pytest.fixture
def pair(machine: Machine, ends: Callable[..., Ends]) -> Pair:
    machine.handlers(HANDLER)
    return Pair(machine, ends(), ends(port=PORT + 1))


def both(more: str = "") -> str:
    closed = text(name="c", more="fail closed " + more)
    return text(name="o", more="fail open " + more) + closed.replace("dport 5000", "dport 5001")


def test_killed_it_is_passed_by_at_once(pair):
    pair.machine.apply(both())
    pair.none_is_unserved()
    pair.machine.signal(signal.SIGKILL, pair.machine.processes())
    until(lambda: not commands.processes())
    assert (pair.unserved, netqueue.table()) == ((0, 0), [])
    pair.each_is_counted()
    told = commands.run("status", "c").stdout
    assert "10 packets were dropped unserved (fail closed)" in told
    assert "not served: the runtime does not run: `itmc apply` or `itmc serve` starts it" in told
    pair.machine.apply(both())
    pair.none_is_unserved()


def test_a_killed_worker_is_started_again_and_takes_no_packet_along(pair):
    """What waited for it passes or is dropped unserved; it does not vanish."""
    pair.machine.apply(both())
    for _ in range(3):
        workers, supervisor = pair.machine.workers, pair.machine.runtime["process"]
        before = pair.unserved
        pair.machine.signal(signal.SIGSTOP, workers)
        for number in range(10):
            pair.open.send(b"%d" % number)
            pair.closed.send(b"%d" % number)
        pair.machine.signal(signal.SIGKILL, workers)
        until(
            lambda gone=set(workers): pair.machine.workers and not gone & set(pair.machine.workers)
        )
        assert sorted(pair.open.received()) == [b"%d" % number for number in range(10)]
        assert pair.unserved == (before[0] + 10, before[1] + 10)
        until(lambda: len(pair.machine.workers) == 2)
        pair.none_is_unserved()
        assert pair.machine.runtime["process"] == supervisor
    assert "was ended by signal 9" in pair.machine.runtime["log"][-1]
    pair.closed.received()


def test_a_stopped_supervisor_is_passed_by_and_its_workers_survive_it(pair):
    pair.machine.apply(both())
    supervisor, workers = pair.machine.runtime["process"], pair.machine.workers
    pair.machine.signal(signal.SIGSTOP, [supervisor])
    until(pair.passed_by, 5)
    pair.each_is_counted()
    answer = pair.machine.python("o").trouble
    assert answer == "the runtime does not answer: it hangs, or was stopped"
    pair.machine.signal(signal.SIGCONT, [supervisor])
    until(pair.served)
    assert (pair.machine.runtime["process"], pair.machine.workers) == (supervisor, workers)
    pair.none_is_unserved()


def test_a_stopped_worker_is_replaced_and_takes_no_packet_along(pair):
    pair.machine.apply(both())
    workers = pair.machine.workers
    pair.machine.signal(signal.SIGSTOP, workers)
    for number in range(10):
        pair.open.send(b"%d" % number)
        pair.closed.send(b"%d" % number)
    assert pair.open.receive(5) is not None
    until(lambda: pair.unserved == (10, 10), 5)
    until(pair.served)
    assert set(pair.machine.workers).isdisjoint(workers)
    pair.none_is_unserved()
    assert any("says nothing: it is ended" in line for line in pair.machine.runtime["log"])


def test_all_stopped_it_is_passed_by_and_goes_on_where_it_was(pair):
    pair.machine.apply(both())
    everyone = pair.machine.processes()
    pair.machine.signal(signal.SIGSTOP, everyone)
    for number in range(10):
        assert pair.open.send(b"a%d" % number)
        assert pair.closed.send(b"a%d" % number)
    assert (pair.open.received(), pair.unserved) == ([], (0, 0))
    until(pair.passed_by, 5)
    pair.each_is_counted()
    pair.machine.signal(signal.SIGCONT, everyone)
    waited = [b"A%d" % number for number in range(10)]
    assert [pair.open.receive() for _ in waited] == waited
    assert [pair.closed.receive() for _ in waited] == waited
    until(pair.served)
    assert pair.machine.processes() == everyone
    pair.none_is_unserved()


def test_what_finds_its_queue_full_is_unserved(pair):
    pair.machine.apply(both("queues 1 length 4 packets"))
    workers = pair.machine.workers
    pair.machine.signal(signal.SIGSTOP, workers)
    for number in range(10):
        assert pair.open.send(b"a%d" % number)
        assert pair.closed.send(b"a%d" % number)  # whoever was queued is not told
    assert pair.open.received() == [b"a%d" % number for number in range(4, 10)]
    assert pair.closed.received() == []
    assert (pair.unserved, pair.machine.python("o").waiting) == ((6, 6), 4)
    pair.machine.signal(signal.SIGCONT, workers)
    for one in (pair.open, pair.closed):
        assert [one.receive() for _ in range(4)] == [b"A%d" % number for number in range(4)]
    pair.none_is_unserved()
    assert pair.machine.workers == workers


def test_a_slow_handler_keeps_its_worker(machine, ends):
    """One batch takes it longer than a silent worker may live."""
    machine.handlers("import time\ndef handle(packet):\n    time.sleep(0.06)\n")
    machine.apply(text())
    udp, workers = ends(), machine.workers
    for number in range(60):
        udp.send(b"%d" % number)
    assert [udp.receive() for _ in range(60)] == [b"%d" % number for number in range(60)]
    found = machine.handled(60)
    assert (found.unserved, found.hung, machine.workers) == (0, 0, workers)


def test_as_after_a_boot_it_is_passed_by_until_it_is_started(pair, monkeypatch, tmp_path):
    for module in (store, runtime_apply):
        monkeypatch.setattr(module, "boot_file", lambda **_: tmp_path / "boot.json.gz")
    pair.machine.apply(both())
    for process in pair.machine.processes():
        os.kill(process, signal.SIGKILL)
    until(lambda: not commands.processes())
    for path in nft.tables():
        nft.load(f"delete table {path}\n")
    (store.directory() / "state.json").unlink()
    assert runtime_apply.restore() is not None
    assert commands.processes() == {}
    pair.each_is_counted()
    with serve() as foreground:
        until(pair.served)
        pair.none_is_unserved()
    assert foreground.returncode == 0
    assert commands.processes() == {}
    pair.each_is_counted()


def test_a_loopback_without_its_address_is_said_and_passed_by(machine, ends, tmp_path):
    """The sign of life goes that way; packets of other links then pass unserved."""
    far = Namespace.create("far")
    with closing(far):
        here = Namespace.here()
        veth(here, "eth0", far, "eth0")
        add_address(here, "eth0", "10.9.0.1/24")
        add_address(far, "eth0", "10.9.0.2/24")
        machine.handlers(HANDLER)
        machine.apply(text())
        with far.entered():
            receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            receiver.bind(("10.9.0.2", PORT))
        with receiver, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            receiver.settimeout(5)

            def sent() -> bytes:
                sender.sendto(b"x", ("10.9.0.2", PORT))
                return receiver.recv(100)

            assert sent() == b"X"
            loopback("del")
            until(lambda: sent() == b"x", 5)
            before = machine.python().unserved
            assert [sent() for _ in range(10)] == [b"x"] * 10
            found = machine.python()
            assert found.unserved == before + 10
            assert found.trouble == (
                "no sign of life can be sent: Network is unreachable; is the loopback up?"
            )
            loopback("add")
            until(lambda: sent() == b"X", 5)
            assert machine.python().trouble == ""
        here.close()


def loopback(what: str) -> None:
    subprocess.run(["ip", "address", what, "127.0.0.1/8", "dev", "lo"], check=True)


@contextmanager
def serve() -> Iterator[subprocess.Popen[str]]:
    """`itmc serve` in the foreground, ended by Ctrl-C."""
    process = subprocess.Popen(
        [*commands.command(), "serve"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        until(
            lambda: process.poll() is not None or talk.ask(store.directory(), {"command": "status"})
        )
        yield process
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.said = process.communicate(timeout=30 * commands.PATIENCE)


# Several policies, several queues.

TELLING = """
def tell(packet, name):
    packet.payload += b"%s%d.%d.%d " % (name, packet.ip.tos >> 2, packet.mark, packet.udp.source_port)
    packet.ip.tos += 4
    packet.mark += 1
    packet.udp.source_port += 1
def a(packet): tell(packet, b"a")
def b(packet): tell(packet, b"b")
"""
# Each kernel policy counts what it finds and leaves something else.
IN_KERNEL = """
policy {name} {{
    at output
    priority {priority}
    interest {{ protocol udp  dport 5000 }}
    classify {{ found when dscp == {dscp} and mark == {mark} and sport == {sport}  missed }}
    process {{ found {{ set dscp {new[0]} set mark {new[1]} set sport {new[2]} }} }}
}}
"""


@pytest.mark.parametrize("priorities", [(0, 0, 0, 0), (-2, -1, -1, 2)])
@pytest.mark.parametrize("order", ["aKbL", "KaLb", "abKL"])
def test_each_policy_sees_what_the_one_before_it_changed(machine, ends, order, priorities):
    machine.handlers(TELLING)
    dscp, mark, sport = 0, 1, 4000
    source, expected = "", b"x"
    for name, priority in zip(order, priorities, strict=True):
        if name.islower():
            source += text(f'call "hand:{name}"', name, priority)
            expected += b"%s%d.%d.%d " % (name.encode(), dscp, mark, sport)
            new = dscp + 1, mark + 1, sport + 1
        else:
            new = dscp + 10, mark + 10, sport + 10
            source += IN_KERNEL.format(
                name=name.lower() * 2, priority=priority, dscp=dscp, mark=mark, sport=sport, new=new
            )
        dscp, mark, sport = new
    machine.apply(source)
    udp = ends()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind(("127.0.0.1", 4000))
        sender.setsockopt(socket.SOL_SOCKET, SO_MARK, struct.pack("=I", 1))
        for _ in range(3):
            sender.sendto(b"x", ("127.0.0.1", PORT))
            udp.receiver.settimeout(5)
            assert udp.receiver.recvfrom(1000) == (expected, ("127.0.0.1", sport))
    for name in "kl":
        (found,) = runtime_status.status([name * 2])
        assert {c.name: c.packets for c in found.classes} == {"found": 3, "missed": 0}
    for name in "ab":
        machine.handled(3, name)


def test_only_packets_of_the_class_that_needs_it_are_queued(machine, ends):
    machine.handlers(HANDLER)
    machine.apply("""
        policy p {
            at output
            interest { protocol udp  dport 5000 }
            classify { a when length > 100  b }
            process { a { call "hand:handle" } b { set dscp cs1 } }
        }
    """)
    udp = ends()
    for number in range(30):
        udp.send(b"a" * (200 if number % 3 else 2))
    assert Counter(udp.receive() for _ in range(30)) == {b"aa": 10, b"A" * 200: 20}
    assert machine.handled(20).unserved == 0
    (found,) = runtime_status.status(["p"])
    assert {c.name: c.packets for c in found.classes} == {"a": 20, "b": 10}
    assert [row[7] for row in netqueue.table()] == [20]


@pytest.mark.parametrize("family", LOCAL)
def test_each_flow_stays_with_one_worker_in_its_order(machine, ends, family):
    machine.handlers("import os\ndef handle(packet):\n    packet.payload += b' %d' % os.getpid()\n")
    machine.apply(text(more="queues 4"))
    udp, flows, packets = ends(family), 48, 20
    for number in range(packets):
        for flow in range(flows):
            udp.send(b"%d %d" % (flow, number), flow)
    seen: dict[int, list[int]] = {}
    workers: dict[int, set[int]] = {}
    for _ in range(flows * packets):
        flow, number, worker = map(int, (udp.receive() or b"").split())
        seen.setdefault(flow, []).append(number)
        workers.setdefault(flow, set()).add(worker)
    assert seen == {flow: list(range(packets)) for flow in range(flows)}
    assert {len(one) for one in workers.values()} == {1}
    assert set.union(*workers.values()) == set(machine.workers)
    assert len(machine.workers) == 4
    found = machine.handled(flows * packets)
    assert (found.unserved, found.workers, len(found.queues)) == (0, 4, 4)


def test_one_worker_less_of_several_is_passed_by_alone(machine, ends):
    """A handler that ends its process at one flow costs the others nothing."""
    machine.handlers("""
import os
def handle(packet):
    if packet.payload == b"end":
        os._exit(7)
    packet.payload = packet.payload.upper()
""")
    machine.apply(text(more="queues 2"))
    udp = ends()
    before = machine.workers
    udp.send(b"end")
    assert udp.receive() == b"end"  # unserved, as it waited when the worker went
    until(lambda: len(machine.workers) == 2 and machine.workers != before)
    assert len(set(machine.workers) & set(before)) == 1
    assert machine.python().unserved == 1
    assert machine.runtime["log"][-1].endswith("ended by itself, with code 7")
    for flow in range(20):
        udp.send(b"x", flow)
        assert udp.receive() == b"X"


# Once per connection.

ONCE = """
import os
def handle(packet):
    word = packet.payload
    if word == b"drop":
        return Verdict.DROP
    if word == b"class":
        return Class("other")
    if word == b"mark":
        packet.mark = 0x42
    if word == b"both":
        packet.mark = 0x43
        return Class("other")
"""
DECIDED = """
policy p {{
    at output
    interest {{ protocol {protocol} }}
    classify {{ asked  other }}
    process {{ asked {{ call "hand:handle" once per connection  set ttl 77 }}  other {{ set ttl 99 }} }}
}}
"""
# Others write the connections' marks, too, before and behind us; and all is redirected.
OTHERS = """
table inet others {
    chain before {
        type filter hook output priority -180
        ct mark 0x0 ct mark set 0x00123400
    }
    chain behind {
        type filter hook output priority 100
        meta mark 0x42 counter name marked
        meta mark 0x43 counter name moved
        meta l4proto udp meta mark 0 ct mark and 0x00ffff00 == 0x00123400 counter name kept ct mark set ct mark or 0x00000080
    }
    chain away {
        type nat hook output priority -100
        udp dport 5000 redirect to :5001
    }
    counter marked { }
    counter moved { }
    counter kept { }
}
"""
IP_RECVTTL = 12


def test_a_handler_decides_once_for_a_udp_connection(machine, ends):
    machine.handlers(ONCE)
    nft.load(OTHERS)
    try:
        machine.apply(DECIDED.format(protocol="udp"))
        found = {
            word: conversation(ends, word) for word in ("pass", "drop", "class", "mark", "both")
        }
        counters = {name: packets for name, (packets, _) in nft.counters("inet others").items()}
        # A connection whose first packet is dropped never begins: its next one is a first one.
        handled = machine.handled(8)
    finally:
        nft.load("delete table inet others")
    assert found == {
        "pass": [77] * 6, "drop": [], "class": [99] * 6, "mark": [77] * 6, "both": [99] * 6,
    }  # fmt: skip
    assert counters == {"marked": 6, "moved": 6, "kept": 12}
    assert handled.unserved == 0
    (status,) = runtime_status.status(["p"])
    assert {c.name: c.packets for c in status.classes} == {"asked": 18, "other": 10}


def conversation(ends: Callable[..., Ends], word: str) -> list[int]:
    """Four packets there, the first of which says a word, two back: the TTLs of those that arrive."""
    server, client = ends(port=PORT + 1), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    found = []

    def heard(one: socket.socket) -> tuple[str, int] | None:
        one.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
        one.settimeout(0.3 if word == "drop" else 5)
        try:
            _, ((_, _, ttl),), _, address = one.recvmsg(100, 100)
        except TimeoutError:
            return None
        found.append(int.from_bytes(ttl, "little"))
        return address

    with client, closing(server):
        for number in range(4):
            with suppress(PermissionError):
                said = b"x" if number and word != "drop" else word.encode()
                client.sendto(said, ("127.0.0.1", PORT))
            peer = heard(server.receiver)
        if peer is not None:
            for _ in range(2):
                server.receiver.sendto(b"back", peer)
                heard(client)
    return found


def test_a_handler_decides_once_for_a_tcp_connection(machine):
    machine.handlers("""
def handle(packet):
    return Class("other") if packet.tcp.destination_port == 5001 else None
""")
    machine.apply(DECIDED.format(protocol="tcp"))
    with (
        socket.create_server(("127.0.0.1", PORT)) as one,
        socket.create_server(("127.0.0.1", PORT + 1)) as two,
    ):
        for number, server in enumerate((one, two, one, two), 1):
            with (
                socket.create_connection(server.getsockname()) as client,
                server.accept()[0] as peer,
            ):
                peer.sendall(bytes(1 << 20))
                client.sendall(b"x")
                assert peer.recv(10) == b"x"
                size = 0
                while size < 1 << 20:
                    size += len(client.recv(1 << 20))
            assert machine.handled(number).unserved == 0
    (status,) = runtime_status.status(["p"])
    classes = {c.name: c for c in status.classes}
    assert classes["asked"].bytes > 2 << 20
    assert classes["other"].bytes > 2 << 20


# Handlers that misbehave.

MISBEHAVING = """
import ctypes, os, signal, sys, threading, time

def handle(packet):
    word = packet.payload.decode()
    if word in globals():
        return globals()[word]()
    packet.payload = packet.payload.upper()

def raises():
    raise ValueError("on purpose\\nand a second line")
def leaves():
    sys.exit("on purpose")
def interrupts():
    raise KeyboardInterrupt
def recurses():
    recurses()
def nonsense():
    return 42
def number():
    return 0
def no_class():
    return Class("nowhere")
def sleeps():
    time.sleep(60)
def loops():
    while True:
        pass
def catches():
    while True:
        try:
            time.sleep(1)
        except Exception:
            pass
def leaks():
    for _ in range(20):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
def prints():
    print("x" * (1 << 20), flush=True)
    print("x" * (1 << 20), file=sys.stderr, flush=True)
    os.write(1, b"y" * 100)
    os.write(2, b"y" * 100)

def ends():
    os._exit(3)
def kills():
    os.kill(os.getpid(), signal.SIGKILL)
def crashes():
    ctypes.string_at(0)
def never():
    while True:
        try:
            time.sleep(1)
        except BaseException:
            pass
"""


@pytest.mark.parametrize("mode", ["open", "closed"])
def test_what_a_handler_does_wrong_costs_only_its_packet(machine, ends, mode):
    machine.handlers(MISBEHAVING)
    machine.apply(text(more=f"fail {mode}"))
    udp, everyone = ends(), machine.processes()
    wrong = ["raises", "leaves", "interrupts", "recurses", "nonsense", "number", "no_class"]
    hanging = ["sleeps", "loops", "catches"] if mode == "open" else []
    for word in (*wrong, *hanging, "leaks", "prints"):
        udp.send(b"before")
        udp.send(word.encode())
        udp.send(b"behind")
        passes = mode == "open" or word in ("leaks", "prints")
        expected = [b"BEFORE", word.encode(), b"BEHIND"]
        assert [udp.receive() for _ in range(2 + passes)] == [
            one for one in expected if passes or one.isupper()
        ]
    found = machine.handled(3 * (len(wrong) + len(hanging) + 2))
    assert (found.failed, found.hung, found.unserved) == (len(wrong), len(hanging), 0)
    assert machine.processes() == everyone
    log = (store.directory() / "runtime.log").read_text()
    assert "hand:handle failed: ValueError: on purpose (hand.py:" in log
    assert "second line" not in log
    assert not hanging or "hand:handle took too long" in log
    assert found.log


def test_a_handler_that_takes_its_process_with_it_costs_only_its_packet(machine, ends):
    machine.handlers(MISBEHAVING)
    machine.apply(text())
    udp, supervisor = ends(), machine.runtime["process"]
    for word in (b"ends", b"kills", b"crashes", b"never"):
        for one in (b"before", word, b"behind"):
            udp.send(one)
        found = [udp.receive() for _ in range(3)]
        assert found[0].upper() == b"BEFORE"
        assert found[1:] == [word, b"behind"]
        until(lambda: udp.passes() and machine.workers, 10)
        until(lambda: udp.send(b"again") and udp.receive() == b"AGAIN")
    assert machine.runtime["process"] == supervisor
    log = (store.directory() / "runtime.log").read_text()
    for how in ("with code 3", "by signal 9", "by signal 11", "says nothing: it is ended"):
        assert how in log


def test_the_log_is_written_at_a_bounded_rate(machine, ends):
    machine.handlers("def handle(packet):\n    raise ValueError(packet.payload)\n")
    machine.apply(text())
    udp, begun = ends(), time.monotonic()
    for number in range(300):
        udp.send(b"%d" % number)
    machine.handled(300)
    time.sleep(1)
    udp.send(b"late")
    until(lambda: "late" in (store.directory() / "runtime.log").read_text())
    lines = (store.directory() / "runtime.log").read_text().splitlines()
    seconds = time.monotonic() - begun
    assert 5 <= len(lines) <= 5 * (seconds + 1)
    assert f"({301 - len(lines)} more lines were held back)" in lines[-1]


def test_the_log_does_not_grow_without_bound(tmp_path):
    log = serving._logger(tmp_path, True)
    try:
        for _ in range(40):
            log.warning("%s", "x" * (1 << 17))
    finally:
        log.handlers[0].close()
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes.keys() == {"runtime.log", "runtime.log.1"}
    assert max(sizes.values()) <= serving._LOG_SIZE


def test_a_handler_sees_as_much_of_a_packet_as_it_asks_for(machine, ends):
    machine.handlers("""
@headers_only
def headers(packet):
    assert len(packet.data) <= 256 and not packet.whole
    packet.mark = 1000 + packet.length

@headers_only
def rewrites(packet):
    packet.ip.tos = 4

@whole_packets(500)
def short(packet):
    packet.payload = packet.payload.upper()
""")
    machine.apply(
        text('call "hand:short"', "short", 0)
        + text('call "hand:headers"', "headers", 1)
        + text('call "hand:rewrites"', "rewrites", 2)
    )
    nft.load(f"""
table inet seen {{
    counter here {{ }}
    chain late {{ type filter hook output priority 100; meta mark {1000 + 1428} counter name here; }}
}}
""")
    udp = ends()
    udp.send(b"x" * 400)
    udp.send(b"x" * 1400)
    assert [udp.receive() for _ in range(2)] == [b"X" * 400, b"x" * 1400]
    assert nft.counters("inet seen")["here"][0] == 1
    nft.load("delete table inet seen")
    found = {name: machine.handled(2, name) for name in ("short", "headers", "rewrites")}
    assert {name: one.cut for name, one in found.items()} == {
        "short": 1, "headers": 0, "rewrites": 2,
    }  # fmt: skip


# Changes under traffic.


class Stream:
    """Numbered datagrams at a steady rate, until it is stopped."""

    def __init__(self, udp: Ends, rate: int = 2000) -> None:
        self._udp, self._rate = udp, rate
        self.sent = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        begun = time.monotonic()
        while not self._stopping.is_set():
            # A slow machine never catches up.
            while self._behind(begun) and not self._stopping.is_set():
                self._udp.send(b"%d" % self.sent)
                self.sent += 1
            time.sleep(0.001)

    def _behind(self, begun: float) -> bool:
        return self.sent < (time.monotonic() - begun) * self._rate

    def __enter__(self) -> "Stream":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopping.set()
        self._thread.join()

    def arrived(self, *, ordered: bool = True) -> list[list[bytes]]:
        """What became of each datagram, in words, once all of them are there."""
        found: list[list[bytes]] = []
        while len(found) < self.sent:
            data = self._udp.receive(2)
            if data is None:
                break
            found.append(data.split())
        numbers = [int(words[0]) for words in found]
        assert (numbers if ordered else sorted(numbers)) == list(range(self.sent))
        return found


VERSION = "def handle(packet):\n    packet.payload += b' %d'\n"


def test_a_changed_handler_is_taken_in_and_no_packet_is_lost(machine, ends):
    machine.handlers(VERSION % 0)
    machine.apply(text())
    everyone = machine.processes()
    with Stream(ends()) as stream:
        for version in range(1, 8):
            machine.handlers(VERSION % version)
            machine.apply(text())
            time.sleep(0.05)
    versions = [int(words[1]) for words in stream.arrived()]
    assert versions == sorted(versions)
    assert set(versions) == set(range(8))
    found = machine.handled(stream.sent)
    assert (found.unserved, found.failed) == (0, 0)
    assert machine.processes() == everyone
    assert stream.sent > 1000


BROKEN = {
    "does not parse": (
        "def handle(packet):\n    return (\n",
        "`hand` cannot be imported: SyntaxError",
    ),
    "raises": (
        "raise RuntimeError('on purpose')",
        "`hand` cannot be imported: RuntimeError: on purpose",
    ),
    "leaves": ("import sys; sys.exit(1)", "`hand` cannot be imported: SystemExit: 1"),
    "is gone": ("def other(packet): pass", "`hand` has no `handle`"),
    "needs more": ("import nowhere_to_be_found", "`hand` needs a module `nowhere_to_be_found`"),
    "takes two": (
        "def handle(one, two):\n    return None",
        "`hand:handle` does not take one packet: missing a required argument: 'two'",
    ),
    "comes later": (
        "async def handle(packet):\n    return None",
        "`hand:handle` is a coroutine: what it answers would come too late",
    ),
    "is none": ("handle = 3", "`hand:handle` is no function"),
}


def test_a_handler_that_cannot_be_loaded_refuses_the_change_and_the_old_one_goes_on(machine, ends):
    machine.handlers(VERSION % 1)
    machine.apply(text())
    udp, everyone = ends(), machine.processes()
    generation = store.load().generation
    other = text(name="q").replace("dport 5000", "dport 7")
    done = commands.run("apply", str(machine.folder / "p.itm"))
    assert (done.returncode, done.stderr) == (0, "")
    for handler, said in BROKEN.values():
        machine.handlers(handler)
        # One that runs, and one that would get a worker of its own.
        for source, file in ((text(), "p.itm"), (other, "q.itm")):
            with pytest.raises(CompileError) as refused:
                machine.apply(source, file)
            (found,) = refused.value.diagnostics
            assert found.span is not None
            assert (found.code, found.span.text) == ("E063", 'call "hand:handle"')
            assert found.message.startswith(said)
            assert found.span.source.name.endswith(file)
        udp.send(b"x")
        assert udp.receive() == b"x 1"
    done = commands.run("apply", str(machine.folder / "p.itm"))
    assert done.returncode == 1
    assert "p.itm:6:21: error[E063]: `hand:handle` is no function" in done.stderr
    assert "modules are looked for beside the policy file" in done.stderr
    python = machine.handled(len(BROKEN))
    assert (python.unserved, python.trouble, machine.processes()) == (0, "", everyone)
    assert store.load().generation == generation
    # What another file needs is not asked when this one is applied.
    machine.handlers(VERSION % 1, "other")
    machine.apply(text('call "other:handle"', "r").replace("dport 5000", "dport 7"), "r.itm")
    machine.handlers(VERSION % 2)
    assert commands.run("apply", str(machine.folder / "p.itm")).returncode == 0
    udp.send(b"x")
    assert udp.receive() == b"x 2"


def test_another_need_of_bytes_opens_the_queue_anew(machine, ends):
    """Headers alone are read by another reader than what is rewritten."""
    machine.handlers("@headers_only\ndef handle(packet):\n    packet.mark = 5\n")
    machine.apply(text())
    udp = ends()
    machine.handlers(HANDLER)
    machine.apply(text())
    udp.send(b"x" * 1400)
    assert udp.receive() == b"X" * 1400
    machine.handlers("@headers_only\ndef handle(packet):\n    assert len(packet.data) <= 256\n")
    machine.apply(text())
    udp.send(b"x" * 1400)
    assert udp.receive() == b"x" * 1400
    assert machine.python().failed == 0


def test_another_python_part_has_queues_of_its_own(machine, ends, capsys):
    """So rules and workers change in one step, natively; see `runtime.xt` for the other form."""
    machine.handlers(VERSION % 1)
    machine.apply(text())
    queues, unserved = {machine.python().queues}, 0
    with Stream(ends()) as stream:
        for number in range(1, 6):
            time.sleep(0.05)
            machine.apply(text(f'call "hand:handle" set dscp {number}'))
            queues.add(machine.python().queues)
    # Those of the new queues may overtake the last ones of the old.
    handled = [len(words) == 2 for words in stream.arrived(ordered=False)]
    unserved = machine.python().unserved
    with capsys.disabled():
        print(f"\n5 changes of queues under {stream.sent} packets: {unserved} unserved", end=" ")
    assert len(queues) == 6
    assert handled.count(False) == unserved
    assert unserved == 0 if native() else unserved < stream.sent / 5
    until(lambda: len(machine.processes()) == 2)


def test_queues_that_the_policy_numbers_stay_and_are_served_anew(machine, ends):
    """There, what is done behind a queue changes when the rules have; in between it is passed by."""
    machine.handlers(VERSION % 1)
    fixed = "queues 2 from 100"
    machine.apply(text(more=fixed))
    machine.apply(text('call "hand:handle" call "hand:handle"', more=fixed))
    udp = ends()
    until(lambda: udp.passes() and udp.send(b"x") and udp.receive() == b"x 1 1")
    assert machine.python().queues == (100, 101)
    until(lambda: len(machine.workers) == 2)
    before = machine.python().unserved
    for flow in range(10):
        udp.send(b"x", flow)
        assert udp.receive() == b"x 1 1"
    assert machine.python().unserved == before


def native() -> bool:
    """Is what is loaded in nftables' own form?"""
    tables = store.load().tables
    return all(c.rules for table in tables for c in table.chains if c.role == "queue")


# The runtime follows the state.


def queues_served() -> set[int]:
    return {row[0] for row in netqueue.table()}


def queues_wanted() -> set[int]:
    return {job.number for job in serving.jobs(store.load()).values()}


def settled() -> bool:
    """Are there workers for what the state says, and no others?"""
    return queues_served() == queues_wanted()


def test_workers_follow_every_change(machine, ends):
    machine.handlers(VERSION % 1)
    udp = ends()

    def outcome() -> bytes:
        until(settled)
        udp.send(b"x")
        return udp.receive() or b""

    one, two = text('call "hand:handle"'), text('call "hand:handle" set dscp 4 call "hand:handle"')
    machine.apply(one)
    assert outcome() == b"x 1"
    machine.apply(two)
    assert outcome() == b"x 1 1"
    runtime_apply.rollback()
    assert outcome() == b"x 1"
    runtime_apply.switch(["p"], on=False)
    assert outcome() == b"x"
    runtime_apply.switch(["p"], on=True)
    assert outcome() == b"x 1"
    runtime_apply.apply(machine.unit(two), confirm=60)
    assert outcome() == b"x 1 1"
    runtime_apply.rollback()
    assert outcome() == b"x 1"
    runtime_apply.apply(machine.unit(two), confirm=0.5 * commands.PATIENCE)
    assert outcome() == b"x 1 1"
    until(lambda: not commands.pending())
    assert outcome() == b"x 1"
    machine.apply(text(name="q").replace("dport 5000", "dport 7"), "q.itm")
    assert outcome() == b"x 1"
    runtime_apply.remove(["p"])
    assert outcome() == b"x"
    assert machine.python("q").unserved == 0
    runtime_apply.remove(["q"])
    until(lambda: not commands.processes())


def test_a_worker_that_is_wanted_again_while_it_ends_is_replaced(machine, ends):
    machine.handlers(VERSION % 1)
    machine.apply(text())
    old = machine.workers
    machine.signal(signal.SIGSTOP, old)  # so that it takes long to end
    machine.apply(text('call "hand:handle" call "hand:handle"'))
    runtime_apply.rollback()
    udp = ends()
    udp.send(b"x")
    assert udp.receive() == b"x 1"
    assert set(machine.workers).isdisjoint(old)
    until(settled)


def test_a_sign_of_life_that_nobody_waits_for_is_a_packet_like_others(machine, ends):
    """Of a policy that is not loaded yet, or is off: here it is no packet that came back."""
    machine.handlers(VERSION % 1)
    machine.apply(text('call "hand:handle" reject'))
    udp = ends(port=PORT + 1)
    udp.send(b"x", mark=marks.BEAT | 1)
    assert udp.receive() == b"x"
    assert machine.python().unserved == 0


def test_a_parameter_of_what_python_does_is_set(machine, ends):
    machine.handlers(VERSION % 1)
    source = text('call "hand:handle" set ttl hops').replace(
        "policy p", "policy p(hops: number = 9)"
    )
    machine.apply(source)
    udp = ends()
    udp.receiver.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
    for hops in (9, 11):
        udp.send(b"x")
        data, ((_, _, ttl),), _, _ = udp.receiver.recvmsg(100, 100)
        assert (data, ttl[0]) == (b"x 1", hops)
        runtime_apply.set_parameter("p", "hops", "11")
    assert machine.python().unserved == 0
    until(settled)


def test_going_back_does_not_wait_for_a_handler_that_is_gone(machine, ends):
    """A change that nobody confirmed goes back, and what nobody can serve is passed by."""
    machine.handlers(VERSION % 1)
    machine.apply(text())
    machine.handlers(VERSION % 2, "later")
    runtime_apply.apply(machine.unit(text('call "later:handle"')), confirm=1 * commands.PATIENCE)
    (machine.folder / "hand.py").unlink()
    until(lambda: not commands.pending())
    assert [unit.source.text for unit in store.load().units] == [text()]
    udp = ends()
    udp.send(b"x")
    assert udp.receive() == b"x"
    until(lambda: machine.python().trouble == "there is no module `hand`")
    machine.handlers(VERSION % 3)
    machine.apply(text())
    udp.send(b"x")
    assert udp.receive() == b"x 3"


def test_killed_at_any_instant_an_apply_leaves_what_the_next_one_mends(machine, ends):
    machine.handlers(VERSION % 1)
    draw, udp = random.Random(5), ends()
    units = [machine.unit(text(f'call "hand:handle" set dscp {number}')) for number in range(2)]
    times = []
    for number in (0, 1, 0):
        begun = time.monotonic()
        runtime_apply.apply(units[number])
        times.append(time.monotonic() - begun)
    killed = 0
    for number in range(14):
        killed += ended_at(
            draw.uniform(0, max(times[1:])),
            lambda n=number: runtime_apply.apply(units[(n + 1) % 2]),
        )
        if number % 3 == 2:  # the runtime, too, at times
            going = machine.processes()[: draw.randint(1, 2)]
            machine.signal(signal.SIGKILL, going)
            until(lambda going=going: not set(going) & set(machine.processes()))
        udp.received()
        udp.send(b"x")
        assert udp.receive() in (b"x", b"x 1")  # whatever happened, traffic goes on
        if number % 2:
            runtime_apply.apply(units[draw.randint(0, 1)])
            until(lambda: udp.passes() and machine.workers)
            before = machine.python().unserved
            udp.send(b"x")
            assert udp.receive() == b"x 1"
            assert machine.python().unserved == before
            until(settled)
    assert killed >= 3
    last = machine.unit(text('call "hand:handle" set dscp 9'))
    killed_before("commit", lambda: runtime_apply.apply(last))
    assert commands.run("remove", "--all").returncode == 0
    until(lambda: not commands.processes())
    assert (netqueue.table(), nft.tables()) == ([], ())


def test_one_runtime_serves_a_namespace(machine, ends):
    """A second one that is to stay is refused; the one of `apply` gives way, and takes over again."""
    machine.handlers(VERSION % 1)
    machine.apply(text())
    detached, udp = machine.runtime["process"], ends()
    with serve() as foreground:
        until(lambda: machine.python().process not in (0, detached) and machine.workers)
        assert machine.runtime["process"] == foreground.pid
        second = commands.run("serve")
        assert (second.returncode, commands.one_message(second)) == (
            3, "itmc: the runtime runs already in this network namespace",
        )  # fmt: skip
        machine.handlers("def handle(packet):\n    raise ValueError('on purpose')\n")
        machine.apply(text(name="q").replace("dport 5000", "dport 5001"), "q.itm")
        other = ends(port=PORT + 1)
        other.send(b"x")
        assert other.receive() == b"x"
        until(lambda: machine.python("q").failed == 1)
        assert machine.python("q").process == foreground.pid
        runtime_apply.remove([])
        assert foreground.poll() is None  # it stays
        machine.handlers(VERSION % 2)
        machine.apply(text())
        udp.send(b"x")
        assert udp.receive() == b"x 2"
    assert foreground.returncode == 0
    assert "hand:handle failed: ValueError: on purpose" in foreground.said[1]
    assert commands.processes() == {}


def test_a_handler_that_cannot_be_loaded_is_in_nobodys_way(machine, ends):
    """A queue of a fixed number has one reader: the handler is only tried once the old one went."""
    machine.handlers(VERSION % 1)
    fixed = "queues 1 from 100"
    machine.apply(text(more=fixed))
    with suppress(CompileError):
        machine.apply(text('call "hand:nothing"', more=fixed))
    machine.apply(text(more=fixed))
    udp = ends()
    udp.send(b"x")
    assert udp.receive() == b"x 1"


def test_another_reader_of_the_queue_is_named(machine):
    machine.handlers(VERSION % 1)
    with closing(
        netqueue.RawReader(netqueue.Settings(100), lambda *_: (1, None, 0), lambda _: (1, None, 0))
    ):
        (machine.folder / "p.itm").write_text(text(more="queues 1 from 100"))
        done = commands.run("apply", str(machine.folder / "p.itm"))
        assert done.returncode == 3
        assert "cannot serve queue 100: another program reads it" in done.stderr
    assert nft.tables() == ()


# All of a policy in Python.

WHOLE = {
    "thresholds": """
        flow conn by saddr, sport, daddr, dport
        interest { protocol udp  dport 5000 }
        classify { few when conn.packets <= 3  many }
        log { count conn }
        process { few { set dscp cs1 } many { set dscp cs2 set ttl 9 } }
    """,
    "drops": """
        interest { protocol udp  dport 5000 }
        classify { long when length > 190  short }
        process { long { drop } short { set dscp ef } }
    """,
    "limits": """
        interest { protocol udp  dport 5000 }
        classify { all }
        process { all { limit 1/h burst 4 else { set dscp ef } set ttl 33 } }
    """,
    "learns": """
        interest { protocol udp  dport 5000 }
        classify { known when sport in @seen  new }
        process { known { set dscp cs3 } new { set dscp cs4 } }
        update { add sport to @seen }
    """,
    "rewrites": """
        interest { protocol udp  dport 5000 }
        classify { small when length <= 40  large }
        process { small { set daddr 127.0.0.2 } large { set ttl 3 set dport 5000 } }
    """,
}


@pytest.mark.parametrize("name", WHOLE)
def test_run_python_does_what_run_kernel_does(machine, ends, name):
    more = "set seen: port max 16\n" if name == "learns" else ""
    outcomes = {}
    for where in ("kernel", "python"):
        machine.apply(more + f"policy p {{ at output\n run {where}\n{WHOLE[name]} }}")
        outcomes[where] = exchanged(10)
        found = machine.handled(10) if where == "python" else None
        (status,) = runtime_status.status(["p"])
        outcomes[where] += [{c.name: c.packets for c in status.classes}]
        runtime_apply.remove(["p"])
    assert found is not None
    assert found.unserved == 0
    assert outcomes["kernel"] == outcomes["python"]


def exchanged(many: int) -> list[object]:
    """What arrives of packets of several lengths and flows: bytes without identification and
    checksums, which the stack leaves open on the loopback and completes for a queue."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP) as tap,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as two,
    ):
        one.bind(("127.0.0.1", 4001))
        two.bind(("127.0.0.1", 4002))
        found: list[object] = []
        tap.settimeout(0.3)
        for number in range(many):
            sender = two if number % 3 else one
            with suppress(PermissionError):
                sender.sendto(b"x" * (number * 20), ("127.0.0.1", PORT))
            try:
                data = bytearray(tap.recv(1000))
                data[4:6] = data[10:12] = data[26:28] = b"\0\0"
                found.append(bytes(data))
            except TimeoutError:
                found.append(None)
        return found


def test_run_says_what_goes_wrong_with_handlers(machine, ends):
    machine.handlers(MISBEHAVING)
    machine.apply(text(name="q").replace("dport 5000", "dport 5001"), "q.itm")
    machine.unit(text(), "p.itm")
    process = subprocess.Popen(
        [*commands.command(), "run", str(machine.folder / "p.itm")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    udp, other = ends(), ends(port=PORT + 1)
    assert process.stdout is not None
    assert process.stdout.readline() == "loaded p\n"
    other.send(b"nonsense")
    udp.send(b"raises")
    assert (udp.receive(), other.receive()) == (b"raises", b"nonsense")
    log = store.directory() / "runtime.log"
    until(lambda: log.exists() and log.read_text().count("failed") == 2)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30 * commands.PATIENCE)
    assert process.returncode == 0
    assert "removed p" in said[0]
    (line,) = said[1].splitlines()
    assert line.startswith("p ")
    assert "hand:handle failed: ValueError: on purpose (hand.py:" in line
