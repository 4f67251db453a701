"""Policies that encapsulate and decapsulate, by the kernel's own tunnels and by Python.

    client 10.1.0.2 - near 10.1.0.1 | 192.0.2.1 - core - 192.0.2.9 | 10.3.0.1 far - server 10.3.0.2

What is asked holds for both ways, and their packets are the same to the last byte.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import IPRoute
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_Router_Alert
from scapy.packet import Raw

from itmlang import tunnel as pure
from itmlang.packet import Packet
from runtime import nft, traffic, tunnels
from runtime.lab import Capture
from runtime.traffic import Namespace, TrafficError, add_address, add_route, set_sysctl, veth
from tests.kernel.test_tunnels import exchanged, listing, mtu, number, push, send, until
from tests.support.commands import PATIENCE, lasting
from tests.support.frames import wrong_checksums
from tests.support.needs import unavailable

NEAR = """
policy out {{
    at prerouting, output
    {run}
    interest {{ daddr 10.3.0.0/16 }}
    classify {{ all }}
    process {{ all {{ encapsulate to 192.0.2.9 from 192.0.2.1 }} }}
}}
policy back {{
    at prerouting
    {run}
    interest {{ protocol ipip  saddr 192.0.2.9  daddr 192.0.2.1 }}
    classify {{ all }}
    process {{ all {{ decapsulate }} }}
}}
"""
FAR = (
    NEAR.replace("10.3.", "10.1.").replace("192.0.2.9", "X")
    .replace("192.0.2.1", "192.0.2.9").replace("X", "192.0.2.1")
)  # fmt: skip
WAYS = {"kernel": "", "python": "run python"}
BOTH = pytest.mark.parametrize("way", WAYS)
CLIENT, SERVER, OURS, THEIRS = "10.1.0.2", "10.3.0.2", "192.0.2.1", "192.0.2.9"
WITHOUT_BPF = """
import runtime.bpf
def load(*_):
    raise OSError(22, "no such program here")
runtime.bpf.load = load
"""


@dataclass
class Five:
    """The five machines, with a folder for their files and their states."""

    hosts: dict[str, Namespace]
    folder: Path

    def start(self, host: str, *words: str, sabotage: str = "") -> subprocess.Popen[str]:
        """An itmc at a host, behind some lines of Python."""
        code = f"{sabotage}\nfrom runtime.cli.main import main\nmain()"
        with self.hosts[host].entered():
            return subprocess.Popen(
                [sys.executable, "-c", code, *words], text=True, cwd=self.folder,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env={**os.environ, "ITM_STATE_DIR": str(self.folder / "state"),
                     "PYTHONPATH": str(Path(__file__).parents[2])},
            )  # fmt: skip

    def itmc(
        self, host: str, *words: str, code: int = 0, sabotage: str = ""
    ) -> subprocess.CompletedProcess[str]:
        process = self.start(host, *words, sabotage=sabotage)
        output, error = process.communicate()
        assert process.returncode == code, output + error
        return subprocess.CompletedProcess(words, process.returncode, output, error)

    def apply(self, host: str, text: str, *options: str, sabotage: str = "") -> str:
        path = self.folder / f"{host}.itm"
        path.write_text(text)
        return self.itmc(host, "apply", *options, path.name, sabotage=sabotage).stdout

    def both(self, way: str, sabotage: str = "") -> None:
        """Tunnels at both ends."""
        for host, text in (("near", NEAR), ("far", FAR)):
            self.apply(host, text.format(run=WAYS[way]), sabotage=sabotage)

    def status(self, host: str) -> dict[str, Any]:
        told = json.loads(self.itmc(host, "status", "--json").stdout)["policies"]
        return {policy["name"]: policy for policy in told}

    def end(self) -> None:
        for host in ("near", "far"):
            self.itmc(host, "remove", "--all")


@contextmanager
def _five(folder: Path, *, offloads: bool = False) -> Iterator[Five]:
    with ExitStack() as stack:
        hosts = {}
        for name in ("client", "near", "core", "far", "server"):
            hosts[name] = Namespace.create(name)
            stack.callback(hosts[name].close)
        veth(hosts["client"], "eth0", hosts["near"], "eth0", offloads=offloads)
        # Here every packet is one of the wire.
        veth(hosts["near"], "eth1", hosts["core"], "eth0")
        veth(hosts["core"], "eth1", hosts["far"], "eth1")
        veth(hosts["far"], "eth0", hosts["server"], "eth0", offloads=offloads)
        for host, link, address in (
            ("client", "eth0", "10.1.0.2/24"), ("near", "eth0", "10.1.0.1/24"),
            ("near", "eth1", "192.0.2.1/30"), ("core", "eth0", "192.0.2.2/30"),
            ("core", "eth1", "192.0.2.10/30"), ("far", "eth1", "192.0.2.9/30"),
            ("far", "eth0", "10.3.0.1/24"), ("server", "eth0", "10.3.0.2/24"),
        ):  # fmt: skip
            add_address(hosts[host], link, address)
        add_route(hosts["client"], "default", via="10.1.0.1")
        add_route(hosts["server"], "default", via="10.3.0.1")
        add_route(hosts["near"], "default", via="192.0.2.2")
        add_route(hosts["far"], "default", via="192.0.2.10")
        # The core knows the ends of the tunnel alone.
        for name in ("near", "core", "far"):
            set_sysctl(hosts[name], "net/ipv4/ip_forward", "1")
        yield Five(hosts, folder)


@pytest.fixture(params=[False, True], ids=["wire", "offloads"])
def offloads(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Five]:
    """No tunnels yet."""
    try:
        with _five(tmp_path) as made:
            try:
                yield made
            finally:
                made.end()
    except TrafficError as error:
        unavailable(error)


@pytest.fixture(params=WAYS, scope="module")
def five(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Five]:
    """Tunnels both ways, for tests that change nothing of them."""
    try:
        with _five(tmp_path_factory.mktemp("five")) as made:
            made.both(request.param)
            yield made
            made.end()
    except TrafficError as error:
        unavailable(error)


# Real traffic.


DATA = bytes(range(251)) * 8000  # 2 MB


def copied(
    five: Five, data: bytes = DATA, source: str = "client", patience: float = 20 * PATIENCE
) -> bool:
    """The client sends over TCP, the server sends it back: is it the same?"""
    with five.hosts["server"].entered():
        listener = socket.create_server((SERVER, 80))

    def echo() -> None:
        with contextlib.suppress(OSError), listener.accept()[0] as end:
            end.settimeout(patience)
            got = b"".join(iter(lambda: end.recv(1 << 20), b""))
            end.sendall(got)

    thread = threading.Thread(target=echo)
    thread.start()
    try:
        with five.hosts[source].entered():
            sender = socket.socket()
        with sender:
            sender.settimeout(patience)
            sender.connect((SERVER, 80))
            sender.sendall(data)
            sender.shutdown(socket.SHUT_WR)
            got = b"".join(iter(lambda: sender.recv(1 << 20), b""))
            return hashlib.sha256(got).digest() == hashlib.sha256(data).digest()
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # nobody came
        listener.close()
        thread.join()


def arrives(five: Five, size: int, source: str = "client", patience: float = PATIENCE) -> bool:
    """A datagram that may be fragmented: does the server get it whole?"""
    with five.hosts["server"].entered():
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with five.hosts[source].entered():
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with receiver, sender:
        receiver.bind((SERVER, 2))
        receiver.settimeout(patience)
        sender.setsockopt(socket.IPPROTO_IP, 10, 0)  # IP_MTU_DISCOVER, IP_PMTUDISC_DONT
        data = os.urandom(size)
        try:
            sender.sendto(data, (SERVER, 2))
            return receiver.recv(1 << 16) == data
        except OSError:
            return False


def test_tcp_goes_through_the_tunnel_both_ways(five: Five) -> None:
    before = counted(five)
    with (
        Capture(five.hosts["core"], "eth0") as there,
        Capture(five.hosts["core"], "eth1") as back,
        Capture(five.hosts["client"], "eth0") as own,
    ):
        assert copied(five)
        time.sleep(0.2 * PATIENCE)
    outer = [one.data for capture in (there, back) for one in capture.packets]
    assert len(outer) > 2 * len(DATA) / 1500
    assert {one[9] for one in outer} == {4}, "nothing but tunnelled packets"
    assert {(one[12:16], one[16:20]) for one in outer} == {
        (socket.inet_aton(OURS), socket.inet_aton(THEIRS)),
        (socket.inet_aton(THEIRS), socket.inet_aton(OURS)),
    }
    arrived = [one.data for one in own.packets]
    assert not [wrong for one in arrived for wrong in wrong_checksums(one)]
    assert counted(five) - before >= len(outer)


def counted(five: Five) -> int:
    told = five.status("near")
    return sum(told[name]["classes"][0]["packets"] for name in ("out", "back"))


# The same bytes.


def inner(size: int = 8, source: str = CLIENT, **fields: Any) -> bytes:
    ends = {"src": source, "dst": SERVER, "id": 77}
    return bytes(IP(**(ends | fields)) / UDP(sport=1, dport=2) / Raw(bytes(size)))


def carrying(packet: Any, **fields: Any) -> bytes:
    return bytes(IP(**({"src": CLIENT, "dst": SERVER, "id": 77} | fields)) / packet)


INNERS = [
    *(inner(tos=tos) for tos in (0, 1, 2, 3, 0xB8, 0xFF)),
    *(inner(flags=flags, id=identity) for flags in (0, "DF") for identity in (1, 0xFFFF)),
    *(inner(options=[IPOption_Router_Alert()] * n, flags="DF") for n in (1, 9)),
    *(inner(ttl=ttl) for ttl in (3, 255)),
    inner(1452, flags="DF"),
    inner(1452),
    carrying(TCP(sport=5, dport=6, flags="A") / Raw(b"tcp")),
    # Of another connection: of one that it does not know, connection tracking drops
    # what comes while the first packet waits for Python.
    carrying(TCP(sport=7, dport=6, flags="A") / Raw(bytes(1000)), flags="DF"),
    carrying(ICMP() / Raw(b"echo")),
    carrying(Raw(b"of a protocol that nobody knows"), proto=253),
]


def on_the_wire(packet: bytes, forwarded: bool) -> bytes:
    made = pure.Tunnel(number(OURS), number(THEIRS)).encapsulate(packet, 1500, forwarded)
    assert isinstance(made, bytes)
    routed = Packet(bytearray(made))
    routed.set_ttl(64)
    return bytes(routed.data)


def test_forwarded_packets_have_the_same_bytes(five: Five) -> None:
    client, core = five.hosts["client"], five.hosts["core"]
    found = exchanged(core, "eth0", len(INNERS), lambda: push(client, "eth0", INNERS))
    assert found == [on_the_wire(packet, True) for packet in INNERS]


def test_packets_of_the_machine_itself_have_the_same_bytes(five: Five) -> None:
    packets = [inner(source=source, tos=tos, flags=flags, ttl=7) for source in (OURS, "10.1.0.1")
               for tos in (0, 0xB9) for flags in (0, "DF")]  # fmt: skip
    near, core = five.hosts["near"], five.hosts["core"]
    found = exchanged(core, "eth0", len(packets), lambda: send(near, packets))
    assert found == [on_the_wire(packet, False) for packet in packets]


def carried(payload: bytes, **fields: Any) -> bytes:
    ends = {"src": OURS, "dst": THEIRS, "proto": 4, "ttl": 9}
    return bytes(IP(**(ends | fields)) / payload)


def forwarded(packet: bytes, hops: int = 1) -> bytes:
    made = Packet(bytearray(packet))
    made.set_ttl(made.ttl - hops)
    return bytes(made.data)


def test_what_comes_out_has_the_same_bytes(five: Five) -> None:
    """All of INNERS, all pairs of ECN, and options, with which only Python takes it out."""
    outers = [carried(packet) for packet in INNERS]
    outers += [
        carried(inner(tos=0xB8 | ours), tos=theirs) for ours in range(4) for theirs in range(4)
    ]
    outers.append(carried(inner() + b"what stands behind it"))
    wanted = [pure.decapsulate(outer) for outer in outers]
    outers.append(carried(inner(id=5), options=[IPOption_Router_Alert()]))
    wanted.append(inner(id=5))
    there = [forwarded(one) for one in wanted if isinstance(one, bytes)]
    assert len(there) == len(wanted) - 1
    core, server = five.hosts["core"], five.hosts["server"]
    found = exchanged(server, "eth0", len(there), lambda: push(core, "eth1", outers))
    # The kernel's own tunnels may be faster than Python with what came before.
    assert sorted(found) == sorted(there)


@pytest.mark.parametrize("flags", [0, "DF"])
def test_fragments_of_tunnelled_packets_are_taken_out_together(
    five: Five, flags: int | str
) -> None:
    """Another encapsulator lets the core fragment what must not be fragmented inside."""
    core, server = five.hosts["core"], five.hosts["server"]
    packet = inner(1400, flags=flags)
    fragments = [carried(packet[:800], flags="MF", id=9), carried(packet[800:], frag=100, id=9)]
    with server.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind((SERVER, 2))
        receiver.settimeout(5 * PATIENCE)
        push(core, "eth1", fragments)
        assert receiver.recv(1 << 16) == bytes(1400)


# MTU.


def told(five: Five, size: int, host: str = "client") -> int | None:
    """What a socket learns from a datagram of so many bytes that must not be fragmented."""
    with five.hosts[host].entered():
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sender:
        sender.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER, IP_PMTUDISC_DO
        sender.connect((SERVER, 7))
        try:
            sender.send(bytes(size - 28))
            time.sleep(0.3 * PATIENCE)
            sender.send(bytes(size - 28))
        except ConnectionRefusedError:  # it came there
            return None
        except OSError:
            return int(sender.getsockopt(socket.IPPROTO_IP, 14))  # IP_MTU
    return None


def errors(five: Five, packets: Sequence[bytes]) -> list[tuple[bytes, int]]:
    """The ICMP errors that the client gets for packets, with the next hop's MTU."""
    last = bytes(IP(src=CLIENT, dst="10.1.0.1") / ICMP())
    client = five.hosts["client"]
    with Capture(client, "eth0") as capture:
        push(client, "eth0", [*packets, last])
        until(lambda: any(one.data[20] == 0 for one in capture.packets if one.data[9] == 1), "echo")
        time.sleep(0.2 * PATIENCE)
    found = []
    for one in capture.packets:
        error = IP(one.data)
        if error.src == "10.1.0.1" and one.data[9] == 1 and one.data[20] in (3, 11):
            assert wrong_checksums(one.data) == []
            found.append((bytes(error[ICMP].payload), error[ICMP].nexthopmtu))
    return found


@pytest.mark.parametrize("size", [1481, 1500])
def test_senders_are_told_of_the_inner_mtu(five: Five, size: int) -> None:
    packet = inner(size - 28, flags="DF", id=size)
    assert [(told[:28], mtu) for told, mtu in errors(five, [packet])] == [(packet[:28], 1480)]


def test_nobody_is_told_without_need(five: Five) -> None:
    assert errors(five, [inner(1452, flags="DF"), inner(1472), inner(1453, id=3)]) == []


@BOTH
@pytest.mark.parametrize("source", ["client", "near"])
def test_sockets_learn_the_inner_mtu(network: Five, way: str, source: str) -> None:
    network.both(way)
    assert told(network, 1480, source) is None
    assert told(network, 1500, source) == 1480
    # They know it now, and so may send other fragments than before.
    assert arrives(network, 3000, source) and arrives(network, 1473, source)
    assert copied(network, source=source)


@BOTH
def test_a_narrower_path_is_learned(network: Five, way: str) -> None:
    """The core takes 1400 bytes: who sends is told, no connection hangs, nothing is lost
    that may be fragmented: the core fragments the outer packets, and the far end gets them."""
    network.both(way)
    assert arrives(network, 1452)
    mtu(network.hosts["core"], "eth1", 1400)
    mtu(network.hosts["far"], "eth1", 1400)
    assert arrives(network, 1452), "outer fragments"
    assert told(network, 1500) == 1480
    until(lambda: arrives(network, 1472), "fragments, which are not fragmented again")
    assert copied(network)
    until(lambda: [mtu for _, mtu in errors(network, [inner(1400, flags="DF")])] == [1380],
          "the sender is told of 1380")  # fmt: skip
    assert arrives(network, 1352) and arrives(network, 9000)


@pytest.mark.parametrize("size", [1452, 1453, 1472, 1480, 3000, 20_000])
@pytest.mark.parametrize("source", ["client", "near"])
def test_what_may_be_fragmented_arrives_whole(five: Five, size: int, source: str) -> None:
    assert arrives(five, size, source)


@BOTH
def test_packets_that_are_cut_late_and_open_checksums(tmp_path: Path, way: str) -> None:
    """The ends' stacks leave checksums open and packets uncut; in the core they must not be."""
    try:
        with _five(tmp_path, offloads=True) as five:
            five.both(way)
            with (
                Capture(five.hosts["core"], "eth0") as there,
                Capture(five.hosts["core"], "eth1") as back,
            ):
                assert copied(five)
                assert arrives(five, 1000)
            five.end()
    except TrafficError as error:
        unavailable(error)
    between = [packet.data for packet in (*there.packets, *back.packets)]
    # Of packets that the kernel cuts late, it is the pieces that get shorter, not the data.
    assert max(map(len, between)) in (1480, 1500) and len(between) > 2 * len(DATA) / 1500
    checked = [*between[:200], *between[-200:]]
    assert [wrong_checksums(data) for data in checked] == [[]] * len(checked)


# Hops, loops, what is not ours.


def test_the_tunnel_is_one_hop(five: Five) -> None:
    client, server = five.hosts["client"], five.hosts["server"]
    packets = [inner(ttl=ttl) for ttl in (64, 3)]
    found = exchanged(server, "eth0", 2, lambda: push(client, "eth0", packets))
    assert found == [forwarded(packet, 2) for packet in packets]


def test_a_packet_whose_time_ends_is_answered(five: Five) -> None:
    packet = inner(ttl=1, id=11)
    assert [told[:28] for told, _ in errors(five, [packet])] == [packet[:28]]


def test_loops_are_refused(five: Five) -> None:
    loops = [inner(source=THEIRS), inner(source=OURS),
             bytes(IP(src=OURS, dst=SERVER) / Raw(inner()))]  # fmt: skip
    good = inner(id=5)
    client, core = five.hosts["client"], five.hosts["core"]
    found = exchanged(core, "eth0", 1, lambda: push(client, "eth0", [*loops, good]))
    assert found == [on_the_wire(good, True)]


def test_tunnels_of_others_are_left_alone(five: Five) -> None:
    """From elsewhere to the far end, and through it to the server."""
    core, far, server = five.hosts["core"], five.hosts["far"], five.hosts["server"]
    through = carried(inner(), dst=SERVER)
    with far.entered():
        nft.load(
            "table inet foreign { counter came { }\n chain c { type filter hook input priority 0; "
            'ip protocol 4 ip saddr 192.0.2.2 counter name "came"\n }\n }'
        )
        foreign = carried(inner(), src="192.0.2.2")
        found = exchanged(server, "eth0", 1, lambda: push(core, "eth1", [foreign, through]))
        assert nft.counters("inet foreign")["came"][0] == 1
        nft.load("delete table inet foreign")
    assert found == [forwarded(through)]


# There and gone.


def processes(place: Namespace) -> set[str]:
    """The command lines of those that are in a network namespace."""
    own, found = os.fstat(place.fd).st_ino, set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "ns/net").stat().st_ino == own:
                found.add((folder / "cmdline").read_text().replace("\0", " "))
    return found


def everything(place: Namespace) -> list[str]:
    """All that a policy with tunnels could leave behind in a namespace."""
    # Of IPv6, which tunnels leave alone, the kernel itself adds routes a moment after a link.
    found = [line for line in listing(place) if not line.endswith(", 10)")]
    with place.entered():
        found += nft.tables()
        for table in ("raw", "unix", "netfilter/nfnetlink_queue"):
            lines = Path(f"/proc/thread-self/net/{table}").read_text().splitlines()
            found += [table + str(line.split()[1:6]) for line in lines]
    return found + sorted(processes(place))


def same(place: Namespace, before: list[str]) -> None:
    """It is so again, once those who end have ended."""
    deadline = time.monotonic() + 5 * PATIENCE
    while everything(place) != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert everything(place) == before


def strict(place: Namespace) -> None:
    """As a machine that is no router."""
    set_sysctl(place, "net/ipv4/ip_forward", "0")
    for link in ("all", "eth0", "eth1"):
        set_sysctl(place, f"net/ipv4/conf/{link}/rp_filter", "1")


@BOTH
def test_apply_sets_what_is_needed_and_remove_puts_all_back(network: Five, way: str) -> None:
    ends = [network.hosts[host] for host in ("near", "far")]
    for place in ends:
        strict(place)
    before = [everything(place) for place in ends]
    assert not arrives(network, 10, patience=0.2)
    network.both(way)
    assert arrives(network, 10) and arrives(network, 3000) and copied(network)
    assert arrives(network, 10, "near")
    for host in ("near", "far"):
        assert not any(p["drift"] for p in network.status(host).values())
    network.end()
    for place, was in zip(ends, before, strict=True):
        same(place, was)


@BOTH
def test_off_and_on_again(network: Five, way: str) -> None:
    network.both(way)
    network.itmc("near", "disable", "out")
    assert not arrives(network, 10, patience=0.3)
    network.itmc("near", "enable", "out")
    assert arrives(network, 10)


@BOTH
def test_rolled_back_by_hand_and_by_time(network: Five, way: str) -> None:
    network.both(way)
    near = network.hosts["near"]
    was = [line for line in everything(near) if "serve" not in line]
    elsewhere = NEAR.format(run=WAYS[way]).replace("to 192.0.2.9", "to 192.0.2.10")
    network.apply("near", elsewhere)
    assert not arrives(network, 10, patience=0.3)
    network.itmc("near", "rollback")
    assert arrives(network, 10)
    network.apply("near", elsewhere, "--confirm", lasting(2))
    assert not arrives(network, 10, patience=0.3)
    until(lambda: arrives(network, 10, patience=0.1), "it goes back")
    network.apply("near", NEAR.format(run=WAYS[way]))
    assert arrives(network, 10) and was


@BOTH
def test_gone_by_time(network: Five, way: str) -> None:
    near = network.hosts["near"]
    strict(near)
    before = everything(near)
    network.apply("near", NEAR.format(run=WAYS[way]), "--confirm", lasting(2))
    same(near, before)


@BOTH
def test_killed_at_any_time(network: Five, way: str) -> None:
    """The next command finds a tunnel that works or none; after `remove` all is as it was."""
    near, chance = network.hosts["near"], random.Random(5)
    strict(near)
    before = everything(near)
    network.apply("far", FAR.format(run=WAYS[way]))
    (network.folder / "near.itm").write_text(NEAR.format(run=WAYS[way]))
    for words in (("apply", "near.itm"), ("remove", "--all")) * 4:
        process = network.start("near", *words)
        time.sleep(chance.uniform(0.25, 1.0) * PATIENCE)
        process.kill()
        process.communicate()
    network.itmc("near", "apply", "near.itm")
    assert arrives(network, 10)
    assert not any(policy["drift"] for policy in network.status("near").values())
    network.itmc("near", "remove", "--all")
    same(near, before)


def test_killed_behind_the_transaction(network: Five) -> None:
    """No policy is there any more, but its tunnels are: the next command takes them away."""
    near = network.hosts["near"]
    before = everything(near)
    network.apply("near", NEAR.format(run=""))
    network.itmc("near", "remove", "--all", code=-9, sabotage=(
        "import os\nfrom runtime import steering\n"
        "steering.settle = lambda *_: os.kill(os.getpid(), 9)"
    ))  # fmt: skip
    with near.entered():
        assert not nft.tables() and tunnels.look()[0]
    network.itmc("near", "remove", "--all")
    same(near, before)


# Several.


OTHER = """
policy other {{
    at prerouting
    interest {{ daddr 10.4.0.0/16 }}
    classify {{ one when daddr in 10.4.1.0/24; two when daddr in 10.4.2.0/24 }}
    process {{ one {{ encapsulate to {first} from 192.0.2.1 }}
               two {{ encapsulate to {second} from 192.0.2.1 }} }}
}}
"""


def ways(five: Five) -> dict[str, str]:
    """Where packets go from the client: by the destination, the far end of their tunnel."""
    client, core = five.hosts["client"], five.hosts["core"]
    asked = [SERVER, "10.4.1.1", "10.4.2.1"]
    packets = [inner(dst=address) for address in asked]
    found = exchanged(core, "eth0", len(packets), lambda: push(client, "eth0", packets))
    tunnelled = [IP(data) for data in found if data[9] == 4]
    return {str(packet.payload.dst): packet.dst for packet in tunnelled}


def test_two_files_have_tunnels_with_different_numbers(network: Five) -> None:
    network.apply("near", NEAR.format(run=""))
    other = network.folder / "other.itm"
    other.write_text(OTHER.format(first="192.0.2.6", second=THEIRS))
    network.itmc("near", "apply", "other.itm")
    right = {SERVER: THEIRS, "10.4.1.1": "192.0.2.6", "10.4.2.1": THEIRS}
    assert ways(network) == right
    with network.hosts["near"].entered():
        ends = [entry.destination for entry in tunnels.look()[0]]
    assert sorted(ends) == sorted([number(THEIRS), number("192.0.2.6")]), "the same end, one tunnel"
    network.itmc("near", "remove", "out", "back")
    assert ways(network) == {address: end for address, end in right.items() if address != SERVER}


def test_no_packet_goes_another_tunnels_way_while_numbers_change(network: Five) -> None:
    client, other = network.hosts["client"], network.folder / "other.itm"
    other.write_text(OTHER.format(first="192.0.2.6", second=THEIRS))
    network.itmc("near", "apply", "other.itm")
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            push(client, "eth0", [inner(dst="10.4.1.1")] * 20)
            time.sleep(0.001)

    thread = threading.Thread(target=flood)
    with Capture(network.hosts["core"], "eth0") as capture:
        thread.start()
        # By itself the second class's tunnel would have the first one's number now.
        other.write_text(re.sub(r"one (when.*?;|\{.*?\})", "", other.read_text()))
        network.itmc("near", "apply", "other.itm")
        network.itmc("near", "rollback")
        stop.set()
        thread.join()
    ends = [IP(one.data).dst for one in capture.packets if one.data[9] == 4]
    assert set(ends) == {"192.0.2.6"}


def test_more_tunnels_than_the_mark_tells_apart(network: Five) -> None:
    """The fifteenth is Python's, and works as the others."""
    names = [f"c{n}" for n in range(15)]
    classes = "".join(f"{c} when daddr == 10.4.0.{n}\n" for n, c in enumerate(names))
    into = "".join(f"{c} {{ encapsulate to 192.0.2.{n + 100} from 192.0.2.1 }}\n"
                   for n, c in enumerate(names))  # fmt: skip
    network.apply(
        "near",
        f"policy many {{ at prerouting interest {{ daddr 10.4.0.0/16 }}\n"
        f"classify {{ {classes} rest }}\nprocess {{ {into} }} }}",
    )
    placed = network.itmc("near", "compile", "--placement", "near.itm").stdout
    assert len(re.findall("BPF program on a route", placed)) == 14
    assert re.search(r"class c14\b.*queue.*14 tunnels", placed), placed
    packets = [inner(dst=f"10.4.0.{n}") for n in range(15)]
    client, core = network.hosts["client"], network.hosts["core"]
    found = exchanged(core, "eth0", 15, lambda: push(client, "eth0", packets))
    assert {IP(data).dst for data in found} == {f"192.0.2.{n + 100}" for n in range(15)}


# What others change, and what the machine lacks.


def changes(five: Five) -> list[tuple[str, str, str]]:
    told = json.loads(five.itmc("near", "plan", "--json", "near.itm").stdout)
    assert told["changed"] == any(c["action"] != "keep" for c in told["changes"])
    return [(c["action"], c["policy"], c["note"]) for c in told["changes"] if c["kind"] == "tunnel"]


def test_plan_shows_tunnels(network: Five) -> None:
    text = NEAR.format(run="")
    (network.folder / "near.itm").write_text(text)
    into = "to 192.0.2.9 from 192.0.2.1, number 1"
    out = "from 192.0.2.9/32 to 192.0.2.1, number 2"
    assert changes(network) == [("create", "out", into), ("create", "back", out)]
    network.apply("near", text)
    assert changes(network) == [("keep", "out", into), ("keep", "back", out)]
    # Nothing of the rules is another but the tunnel's number.
    (network.folder / "near.itm").write_text(text.replace("from 192.0.2.1", "from 10.1.0.1"))
    other = "to 192.0.2.9 from 10.1.0.1, number 3"
    assert changes(network) == [("replace", "out", f"{into} -> {other}"), ("keep", "back", out)]
    (network.folder / "near.itm").write_text(text[text.index("policy back") :])
    assert changes(network) == [("delete", "out", into), ("keep", "back", out)]


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("rule", "its rule 26997 is gone"),
        ("route", "its route is gone"),
        ("filter", "its filter at eth1 is gone"),
        ("sysctl", "net/ipv4/ip_forward is 0, not 1"),
    ],
)
def test_what_others_took_away_is_told_and_put_back(network: Five, what: str, told: str) -> None:
    network.both("kernel")
    near = network.hosts["near"]
    with near.entered():
        match what:
            case "rule":
                (rule,) = (r for r in traffic.mark_rules(near, tunnels.OWNER) if not r.link)
                traffic.delete_mark_rule(near, rule)
            case "route":
                traffic.delete_default_route(near, tunnels.TABLES + 1)
            case "filter":
                ((handle, _),) = traffic.bpf_filters(near, "eth1", tunnels.PRIORITY).items()
                traffic.delete_bpf_filter(near, "eth1", tunnels.PRIORITY, handle)
            case "sysctl":
                set_sysctl(near, "net/ipv4/ip_forward", "0")
    said = [text for policy in network.status("near").values() for text in policy["changed"]]
    assert [text for text in said if told in text] == said and said
    network.itmc("near", "apply", "near.itm")
    assert not any(policy["drift"] for policy in network.status("near").values())
    assert arrives(network, 10) and copied(network)


def test_a_link_that_comes_again_has_its_filter_again(network: Five) -> None:
    network.both("kernel")
    near, core = network.hosts["near"], network.hosts["core"]
    with near.entered(), IPRoute() as netlink:
        netlink.link("del", index=socket.if_nametoindex("eth1"))
    assert not arrives(network, 10, patience=0.2)
    # Nothing that has nothing to do with it is refused meanwhile.
    network.itmc("near", "disable", "back")
    network.itmc("near", "enable", "back")
    veth(near, "eth1", core, "eth0")
    add_address(near, "eth1", "192.0.2.1/30")
    add_address(core, "eth0", "192.0.2.2/30")
    add_route(near, "default", via="192.0.2.2")
    until(lambda: arrives(network, 10, patience=0.2) and copied(network, DATA[:1000], patience=0.5),
          "the tunnel works again")  # fmt: skip
    # Till it is there, Python takes out what the filter would have.
    until(lambda: not any(policy["drift"] for policy in network.status("near").values()), "filter")


def test_without_bpf_python_does_it(network: Five) -> None:
    network.both("kernel", sabotage=WITHOUT_BPF)
    with network.hosts["near"].entered():
        assert tunnels.look() == ((), ())
    assert {one["python"]["workers"] for one in network.status("near").values()} == {1}
    assert arrives(network, 10) and arrives(network, 3000) and copied(network)


@BOTH
def test_what_follows_is_done_to_the_outer_packet(network: Five, way: str) -> None:
    """So Python encapsulates: behind it, it is another packet."""
    text = NEAR.format(run=WAYS[way]).replace(
        "encapsulate to 192.0.2.9 from 192.0.2.1", "encapsulate to 192.0.2.9 from 192.0.2.1; set dscp cs1"
    )  # fmt: skip
    network.apply("near", text)
    client, core = network.hosts["client"], network.hosts["core"]
    packet = inner(tos=1)
    (found,) = exchanged(core, "eth0", 1, lambda: push(client, "eth0", [packet]))
    assert (found[1], found[21]) == (0x21, 0x01) and wrong_checksums(found) == []
    assert found[20:] == forwarded(packet)


def test_at_boot_tunnels_come_with_the_network(network: Five) -> None:
    """The policies are loaded first, when there is no way to anywhere; then the runtime
    starts, and makes the tunnels as soon as it can."""
    near, kept = network.hosts["near"], network.folder / "kept.json.gz"
    sabotage = (
        "from pathlib import Path\nimport runtime.store, runtime.apply\n"
        f"runtime.store.boot_file = runtime.apply.boot_file = lambda **_: Path({str(kept)!r})"
    )
    network.apply("far", FAR.format(run=""))
    network.apply("near", NEAR.format(run=""), sabotage=sabotage)
    network.itmc("near", "remove", "--all")
    addresses = [("eth0", "10.1.0.1/24"), ("eth1", "192.0.2.1/30")]
    with near.entered(), IPRoute() as netlink:
        for link, address in addresses:
            index = socket.if_nametoindex(link)
            netlink.addr("del", index=index, address=address[:-3], prefixlen=int(address[-2:]))
    network.itmc("near", "boot", sabotage=sabotage)
    with near.entered():
        assert tunnels.look() == ((), ()) and nft.tables()
    runtime = network.start("near", "serve")
    try:
        for link, address in addresses:
            add_address(near, link, address)
        add_route(near, "default", via="192.0.2.2")
        until(lambda: arrives(network, 10, patience=0.2) and copied(network, b"data", patience=0.5),
              "the tunnels are there")  # fmt: skip
        until(lambda: not any(one["drift"] for one in network.status("near").values()), "filters")
    finally:
        runtime.terminate()
        runtime.communicate()


def test_the_runtime_of_a_state_that_is_gone_ends(network: Five) -> None:
    """It must not make the folder again that it looks for."""
    near = network.hosts["near"]
    network.apply("near", NEAR.format(run=""))
    assert processes(near)
    shutil.rmtree(network.folder / "state")
    until(lambda: not processes(near), "it ends")
