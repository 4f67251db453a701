"""Tunnels of the kernel: client - near - middle - far - server, with a tunnel from near to far.

The middle knows no way to the client or the server, so what passes has been in a tunnel.
"""

import hashlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import IPRoute
from scapy.layers.inet import ICMP, IP, UDP, IPOption_Router_Alert
from scapy.packet import Raw

from itmlang import tunnel as pure
from itmlang.packet import Packet, internet_checksum
from runtime import nft, traffic, tunnels
from runtime.errors import MachineError
from runtime.lab import Capture
from runtime.pathmtu import PathMtu
from runtime.traffic import Namespace, TrafficError, add_address, add_route, set_sysctl, veth
from runtime.tunnels import Before, Decapsulation, Encapsulation, Entry, Exit
from tests.support.commands import PATIENCE
from tests.support.frames import wrong_checksums
from tests.support.needs import unavailable


def number(address: str) -> int:
    return int.from_bytes(socket.inet_aton(address))


CLIENT, SERVER = "10.1.0.1", "10.4.0.2"
NEAR, FAR = "10.2.0.1", "10.3.0.2"
IN, OUT = 0x1000_0000, 0x2000_0000
INTO = Encapsulation(IN, number(FAR))
BACK = Encapsulation(IN, number(NEAR), number(FAR))
AT_NEAR = Decapsulation(OUT, (number(NEAR),))
AT_FAR = Decapsulation(
    OUT, (number("192.0.2.9"), number(FAR)), ((number("10.2.0.0"), 24),), ("eth0",)
)
WAIT = 5.0 * PATIENCE  # seconds until what does not come is missing


@dataclass
class Line:
    client: Namespace
    near: Namespace
    middle: Namespace
    far: Namespace
    server: Namespace

    def put(self) -> None:
        """Tunnels both ways."""
        for place, wanted in ((self.near, (INTO, AT_NEAR)), (self.far, (BACK, AT_FAR))):
            with place.entered():
                put(*wanted)


def put(*wanted: tunnels.Tunnel, earlier: Before | None = None) -> Before:
    """As a caller does it: what was there is stored, as JSON, before anything is changed."""
    stored: Before = json.loads(json.dumps(tunnels.before(wanted, tunnels.needs(wanted), earlier)))
    tunnels.put(wanted, stored)
    return stored


def steer(place: Namespace, to: str) -> None:
    with place.entered():
        nft.load(
            f"""
            table inet steer {{
              counter marked {{ }}
              counter foreign {{ }}
              chain before {{ type filter hook prerouting priority -150;
                ip protocol 4 counter name "foreign"
                meta mark & 0xf0000000 == {OUT:#x} counter name "marked"
                ip daddr {to} meta mark set meta mark & 0x0fffffff | {IN:#x}
              }}
              chain here {{ type route hook output priority -150;
                ip daddr {to} meta mark set meta mark & 0x0fffffff | {IN:#x}
              }}
            }}
            """
        )


def build(stack: ExitStack, offloads: bool) -> Line:
    names = ("client", "near", "middle", "far", "server")
    places = [stack.enter_context(_closing(Namespace.create(name))) for name in names]
    line = Line(*places)
    for n, (left, right) in enumerate(pairwise(places), 1):
        ends = "eth1" if n > 1 else "eth0"
        veth(left, ends, right, "eth0", offloads=offloads)
        add_address(left, ends, f"10.{n}.0.1/24")
        add_address(right, "eth0", f"10.{n}.0.2/24")
    for place in (line.near, line.middle, line.far):
        set_sysctl(place, "net/ipv4/ip_forward", "1")
    for place, via in ((line.client, "10.1.0.2"), (line.near, "10.2.0.2"),
                       (line.far, "10.3.0.1"), (line.server, "10.4.0.1")):  # fmt: skip
        add_route(place, "default", via=via)
    steer(line.near, "10.4.0.0/24")
    steer(line.far, "10.1.0.0/24")
    return line


class _closing:
    def __init__(self, place: Namespace) -> None:
        self.place = place

    def __enter__(self) -> Namespace:
        return self.place

    def __exit__(self, *exception: object) -> None:
        self.place.close()


@pytest.fixture
def line() -> Iterator[Line]:
    with ExitStack() as stack:
        try:
            made = build(stack, offloads=False)
        except TrafficError as error:
            unavailable(error)
        yield made


@pytest.fixture
def fast_line() -> Iterator[Line]:
    with ExitStack() as stack:
        try:
            made = build(stack, offloads=True)
        except TrafficError as error:
            unavailable(error)
        yield made


def until(true: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def push(place: Namespace, link: str, packets: Sequence[bytes]) -> None:
    """Out of a link, byte for byte."""
    mac = bytes.fromhex(traffic.MAC.replace(":", ""))
    with place.entered(), socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM) as wire:
        for packet in packets:
            wire.sendto(packet, (link, 0x0800, 0, 0, mac))


def send(place: Namespace, packets: Sequence[bytes]) -> None:
    """From a host itself, by way of its routing."""
    with place.entered(), socket.socket(socket.AF_INET, socket.SOCK_RAW, 255) as raw:
        for packet in packets:
            raw.sendto(packet, (socket.inet_ntoa(packet[16:20]), 0))


def exchanged(place: Namespace, link: str, count: int, act: Callable[[], None]) -> list[bytes]:
    with Capture(place, link) as capture:
        act()
        until(lambda: len(capture.packets) >= count, f"{count} packets to {place.name}")
    return [packet.data for packet in capture.packets]


def counters(place: Namespace) -> dict[str, int]:
    with place.entered():
        return {name: packets for name, (packets, _) in nft.counters("inet steer").items()}


def inner(size: int = 8, source: str = CLIENT, **fields: Any) -> bytes:
    ends = {"src": source, "dst": SERVER, "id": 77}
    return bytes(IP(**(ends | fields)) / UDP(sport=1, dport=2) / Raw(bytes(size)))


INNERS = [
    *(inner(tos=tos) for tos in (0, 1, 2, 3, 0xB8, 0xFF)),
    *(inner(flags=flags, id=identity) for flags in (0, "DF") for identity in (1, 0xFFFF)),
    *(inner(options=[IPOption_Router_Alert()] * n, flags="DF") for n in (1, 9)),
    *(inner(flags="MF", frag=frag, id=0xFFF0) for frag in (0, 1, 185)),
    inner(frag=8000),
    *(inner(ttl=ttl) for ttl in (3, 255)),
    inner(1452, flags="DF"),
    inner(1452),
    inner(dst="10.4.0.77"),
]  # fmt: skip


def on_the_wire(packet: bytes, forwarded: bool) -> bytes:
    """What Python makes, and what the kernel makes of it when it forwards that."""
    made = pure.Tunnel(number(NEAR), number(FAR)).encapsulate(packet, 1500, forwarded)
    assert isinstance(made, bytes)
    routed = Packet(bytearray(made))
    routed.set_ttl(64)
    return bytes(routed.data)


def test_forwarded_packets_are_those_of_python(line: Line) -> None:
    line.put()
    found = exchanged(line.middle, "eth0", len(INNERS), lambda: push(line.client, "eth0", INNERS))
    assert found == [on_the_wire(packet, True) for packet in INNERS]


def test_packets_of_our_own_are_those_of_python(line: Line) -> None:
    line.put()
    packets = [inner(source=source, tos=tos, flags=flags)
               for source in (NEAR, "10.1.0.2") for tos in (0, 0xB9) for flags in (0, "DF")]  # fmt: skip
    found = exchanged(line.middle, "eth0", len(packets), lambda: send(line.near, packets))
    assert found == [on_the_wire(packet, False) for packet in packets]


def test_loops_are_refused(line: Line) -> None:
    line.put()
    set_sysctl(line.near, "net/ipv4/conf/eth0/accept_local", "1")
    loops = [inner(source=FAR), inner(source=NEAR)]
    nested = bytes(IP(src=NEAR, dst=SERVER) / Raw(inner()))
    good = inner(id=5)

    def act() -> None:
        push(line.client, "eth0", [*loops, nested, good])

    assert exchanged(line.middle, "eth0", 1, act) == [on_the_wire(good, True)]


def carried(payload: bytes, **fields: Any) -> bytes:
    ends = {"src": NEAR, "dst": FAR, "proto": 4, "ttl": 9}
    return bytes(IP(**(ends | fields)) / payload)


def forwarded(outer: bytes) -> list[bytes]:
    """What comes out of the far end, if Python takes it out and the kernel forwards it."""
    found = pure.decapsulate(outer)
    if isinstance(found, pure.Refused):
        return []
    packet = Packet(bytearray(found))
    packet.set_ttl(packet.ttl - 1)
    return [bytes(packet.data)]


def test_what_comes_out_is_what_python_takes_out(line: Line) -> None:
    """All of INNERS, and all pairs of ECN."""
    line.put()
    outers = [carried(packet) for packet in INNERS]
    outers += [
        carried(inner(tos=0xB8 | ours), tos=theirs) for ours in range(4) for theirs in range(4)
    ]
    outers.append(carried(inner() + b"what stands behind it"))
    outers.append(carried(inner(ttl=0)))
    wanted = [packet for outer in outers for packet in forwarded(outer)]
    assert len(wanted) == len(outers) - 2
    found = exchanged(line.server, "eth0", len(wanted), lambda: push(line.middle, "eth1", outers))
    assert found == wanted
    assert counters(line.far) == {"foreign": 0, "marked": len(wanted)}


def broken(packet: bytes, offset: int, value: bytes, seal: bool = True) -> bytes:
    data = bytearray(packet)
    data[offset : offset + len(value)] = value
    if seal:
        data[10:12] = bytes(2)
        data[10:12] = internet_checksum(data[:20]).to_bytes(2)
    return bytes(data)


def test_what_is_no_tunnels_is_left_alone(line: Line) -> None:
    """Fragments and options, too: the stack goes on with them, or Python."""
    line.put()
    untouched = [
        carried(inner(), src="10.9.0.1"),
        carried(inner(), dst=SERVER),
        carried(inner(), flags="MF"),
        carried(inner(), frag=1),
        carried(inner(), options=[IPOption_Router_Alert()]),
        carried(b"\x60" + inner()[1:]),
        carried(broken(inner(), 0, b"\x44")),
        carried(broken(inner(), 2, b"\xff\xff")),
        carried(broken(inner(), 2, b"\x00\x13")),
        carried(inner()[:19]),
        # What looks like the inner header is in the outer one's options.
        broken(carried(inner(40)), 0, b"\x4a"),
    ]
    dropped = [broken(carried(inner()), 8, b"\x10", seal=False)]
    good = carried(inner(id=5))
    # One among them is for the server, as it is; the kernel counts its TTL down.
    passed = Packet(bytearray(untouched[1]))
    passed.set_ttl(8)
    found = exchanged(
        line.server, "eth0", 2, lambda: push(line.middle, "eth1", [*untouched, *dropped, good])
    )
    assert found == [bytes(passed.data), *forwarded(good)]
    assert counters(line.far) == {"foreign": len(untouched), "marked": 1}


# Real traffic.


def copied(line: Line, data: bytes) -> bytes:
    """The client sends, the server sends it back; the digest of what came."""
    with line.server.entered():
        listener = socket.create_server((SERVER, 5000))

    def echo() -> None:
        with listener, listener.accept()[0] as end:
            end.settimeout(WAIT)
            got = b"".join(iter(lambda: end.recv(1 << 20), b""))
            end.sendall(got)

    with line.client.entered():
        sender = socket.socket()
    thread = threading.Thread(target=echo)
    thread.start()
    try:
        with sender:
            sender.settimeout(WAIT)
            sender.connect((SERVER, 5000))
            sender.sendall(data)
            sender.shutdown(socket.SHUT_WR)
            return hashlib.sha256(b"".join(iter(lambda: sender.recv(1 << 20), b""))).digest()
    finally:
        thread.join()


DATA = bytes(range(251)) * 8000  # 2 MB


def test_tcp_both_ways(line: Line) -> None:
    line.put()
    with (
        Capture(line.middle, "eth0") as there,
        Capture(line.middle, "eth1") as back,
        Capture(line.server, "eth0") as arrived,
    ):
        assert copied(line, DATA) == hashlib.sha256(DATA).digest()
    between = [packet.data for packet in (*there.packets, *back.packets)]
    assert len(between) > 2 * len(DATA) / 1500 and {data[9] for data in between} == {4}
    received = [packet.data for packet in arrived.packets]
    # The server is told of the tunnel's MTU by ICMP.
    assert {data[9] for data in received} == {1, 6}
    # Scapy takes its time: some of the packets at their full length, and the others.
    checked = [*between[:200], *received[:200], *between[-50:], *received[-50:]]
    assert [wrong_checksums(data) for data in checked] == [[]] * len(checked)


def test_tcp_in_packets_that_are_cut_late(fast_line: Line) -> None:
    """With offloads on a packet of 64 KB goes through both ends of the tunnel as it is."""
    fast_line.put()
    with Capture(fast_line.middle, "eth0") as there:
        assert copied(fast_line, DATA) == hashlib.sha256(DATA).digest()
    assert max(len(packet.data) for packet in there.packets) > 5000


def test_what_came_out_uncut_is_cut_behind(fast_line: Line) -> None:
    """The link behind the tunnel can do nothing: the kernel has to, and to the inner length."""
    fast_line.put()
    traffic._offloads_off(fast_line.far, "eth1")
    traffic._offloads_off(fast_line.server, "eth0")
    with Capture(fast_line.server, "eth0") as arrived:
        assert copied(fast_line, DATA) == hashlib.sha256(DATA).digest()
    packets = [packet.data for packet in arrived.packets]
    # The way in shortens the pieces by what it adds; the way out must not lengthen them, or
    # they might be too long for what lies behind.
    # What the sender gives one by one is as long as it may be.
    assert max(map(len, packets)) <= 1480
    assert Counter(map(len, packets)).most_common(1)[0][0] == 1480 - pure.HEADER
    checked = packets[:100] + packets[-100:]
    assert [wrong_checksums(data) for data in checked] == [[]] * len(checked)


def test_tcp_from_the_tunnels_end_itself(line: Line) -> None:
    """The connection starts with an MTU of 1500, and learns."""
    line.put()
    here = Line(line.near, line.near, line.middle, line.far, line.server)
    # Answers to the near end itself need no tunnel.
    assert copied(here, DATA) == hashlib.sha256(DATA).digest()


# MTU.


def mtu(place: Namespace, link: str, size: int) -> None:
    with place.entered(), IPRoute() as netlink:
        netlink.link("set", index=socket.if_nametoindex(link), mtu=size)


def told(line: Line, size: int) -> int | None:
    """Of an unfragmentable packet from the client: the MTU of the ICMP error that comes."""
    packet, last = inner(size - 28, flags="DF"), bytes(IP(src=CLIENT, dst="10.1.0.2") / ICMP())

    def act() -> None:
        push(line.client, "eth0", [packet, last])

    found = exchanged(line.client, "eth0", 1, act)
    errors = [IP(data) for data in found if data[20:22] == b"\3\4"]
    for error in errors:
        assert wrong_checksums(bytes(error)) == []
        assert bytes(error[ICMP].payload)[:20] == packet[:20]
    return errors[0][ICMP].nexthopmtu if errors else None


def arrives(line: Line, size: int) -> bool:
    """A datagram that may be fragmented."""
    with line.server.entered():
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with line.client.entered():
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with receiver, sender:
        receiver.bind((SERVER, 7))
        receiver.settimeout(PATIENCE)
        sender.setsockopt(socket.IPPROTO_IP, 10, 0)  # IP_MTU_DISCOVER, IP_PMTUDISC_DONT
        sender.sendto(bytes(size), (SERVER, 7))
        try:
            return len(receiver.recv(65535)) == size
        except TimeoutError:
            return False


def test_senders_are_told_what_the_tunnel_takes(line: Line) -> None:
    line.put()
    assert told(line, 1481) == 1480
    assert told(line, 1480) is None
    assert arrives(line, 1472) and arrives(line, 9000)


def test_a_narrower_way_is_learned(line: Line) -> None:
    line.put()
    mtu(line.middle, "eth1", 1300)
    mtu(line.far, "eth0", 1300)
    with line.near.entered(), PathMtu() as paths:
        assert not tunnels.refresh(paths) and paths.descriptors
        assert paths.mtu(number(FAR), number(NEAR)) == 1500
        # Too long for the middle: it tells the near end, which cannot tell the client yet.
        assert told(line, 1400) is None
        until(paths.changed, "an ICMP error for the socket")
        assert not paths.changed()
        assert paths.mtu(number(FAR), number(NEAR)) == 1300
        assert tunnels.refresh(paths) and not tunnels.refresh(paths)
        assert tunnels.look()[0] == (Entry(IN, number(NEAR), number(FAR), 1280, True),)
    assert told(line, 1400) == 1280
    assert arrives(line, 1252) and arrives(line, 9000)


def test_the_socket_of_a_path_takes_no_packet(line: Line) -> None:
    with line.far.entered(), PathMtu() as paths:
        assert paths.mtu(number("10.3.0.1")) == 1500
        assert paths.source(number("10.3.0.1")) == number(FAR)
        push(line.middle, "eth1", [carried(inner(), src="10.3.0.1")] * 3)
        until(lambda: counters(line.far)["foreign"] == 3, "three packets")
        duplicate = socket.socket(fileno=socket.dup(paths.descriptors[0]))
        with duplicate, pytest.raises(BlockingIOError):
            duplicate.recv(1, socket.MSG_DONTWAIT)


def test_no_way_is_no_mtu(host: Namespace) -> None:
    with PathMtu() as paths:
        assert paths.mtu(number(FAR)) == 0 and paths.source(number(FAR)) == 0


# There and gone.


def listing(place: Namespace) -> list[str]:
    """All that a tunnel could leave behind."""
    found = []
    with place.entered(), IPRoute() as netlink:
        for one in (*netlink.get_rules(), *netlink.get_routes(), *netlink.get_qdiscs()):
            found.append(str((one["attrs"], one["family"])))
        for link in netlink.get_links():
            for parent in (0xFFFF_FFF2, 0xFFFF_FFF3):
                filters = netlink.get_filters(link["index"], parent=parent)
                found += [f"{link['index']} {one['handle']} {one['attrs']}" for one in filters]
        for path in sorted(Path("/proc/sys/net/ipv4").glob("conf/*/*")):
            found.append(f"{path} {path.read_text() if path.stat().st_mode & 0o400 else ''}")
        found.append(Path("/proc/sys/net/ipv4/ip_forward").read_text())
    return found


def test_nothing_is_left_behind(line: Line) -> None:
    set_sysctl(line.near, "net/ipv4/ip_forward", "0")
    set_sysctl(line.near, "net/ipv4/conf/eth1/forwarding", "1")
    set_sysctl(line.near, "net/ipv4/conf/all/rp_filter", "1")
    before = listing(line.near)
    with line.near.entered():
        stored = put(INTO, AT_NEAR)
        assert tunnels.needs((INTO, AT_NEAR)) == ()
        assert listing(line.near) != before
        tunnels.take_away(stored)
        assert tunnels.look() == ((), ())
        assert listing(line.near) == before
        tunnels.take_away(stored)
    assert listing(line.near) == before


def test_what_is_right_is_left_alone(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    with line.near.entered():
        stored = put(INTO, AT_NEAR)
        before = listing(line.near)
        monkeypatch.setattr(tunnels.bpf, "load", None)
        assert put(INTO, AT_NEAR, earlier=stored) == stored
    assert listing(line.near) == before


def test_what_changes_is_changed(line: Line) -> None:
    other = Encapsulation(IN, number("10.3.0.77"))
    third = Encapsulation(0x3000_0000, number(FAR))
    with line.near.entered():
        stored = put(INTO, AT_NEAR, third)
        ours = number(NEAR)
        assert tunnels.look() == (
            (Entry(IN, ours, number(FAR), 1480, True), Entry(0x3000_0000, ours, number(FAR), 1480, True)),
            (Exit("eth0", OUT), Exit("eth1", OUT)),
        )  # fmt: skip
        narrower = Decapsulation(OUT, (ours,), devices=("eth1",))
        put(other, narrower, earlier=stored)
        assert tunnels.look() == (
            (Entry(IN, ours, number("10.3.0.77"), 1480, True),), (Exit("eth1", OUT),)
        )  # fmt: skip


@pytest.mark.parametrize(
    "step", ["add_filter_queue", "put_bpf_filter", "put_bpf_route", "add_mark_rule"]
)
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_who_is_killed_leaves_what_the_next_can_take(
    line: Line, step: str, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, real = listing(line.near), getattr(traffic, step)

    def killed(*given: Any) -> None:
        if late:
            real(*given)
        raise KeyboardInterrupt

    wanted = (INTO, AT_NEAR)
    with line.near.entered():
        stored = tunnels.before(wanted, tunnels.needs(wanted))
        for following in ("take away", "put"):
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(traffic, step, killed)
                tunnels.put(wanted, stored)
            if following == "put":
                tunnels.put(wanted, stored)
                assert [entry.steered for entry in tunnels.look()[0]] == [True]
            tunnels.take_away(stored)
            assert listing(line.near) == before


def test_what_others_did_is_theirs(line: Line) -> None:
    """A filter on our queue, and a sysctl set to something else."""
    set_sysctl(line.near, "net/ipv4/ip_forward", "0")
    set_sysctl(line.near, "net/ipv4/conf/eth0/rp_filter", "1")
    set_sysctl(line.near, "net/ipv4/conf/eth1/rp_filter", "1")
    with line.near.entered():
        stored = put(INTO, AT_NEAR)
        set_sysctl(line.near, "net/ipv4/conf/eth0/rp_filter", "0")
        program = tunnels.bpf.load(tunnels.bpf.ON_LINK, tunnels.bpf.PASS)
        traffic.put_bpf_filter(line.near, "eth0", tunnels.PRIORITY, 7, program, "theirs")
        tunnels.take_away(stored)
        assert traffic.links_with_filter_queue(line.near) == {"eth0"}
        assert traffic.bpf_filters(line.near, "eth0", tunnels.PRIORITY) == {7: "theirs"}
        sysctls = {name: Path(f"/proc/sys/net/ipv4/{name}").read_text().strip()
                   for name in ("ip_forward", "conf/eth0/rp_filter", "conf/eth1/rp_filter")}  # fmt: skip
    assert sysctls == {"ip_forward": "0", "conf/eth0/rp_filter": "0", "conf/eth1/rp_filter": "1"}


# What the machine must be told.


def needed(*wanted: tunnels.Tunnel, **how: bool) -> dict[str, str]:
    return {
        setting.name.removeprefix("net/ipv4/"): setting.value
        for setting in tunnels.needs(wanted, **how)
    }


def test_needs(line: Line) -> None:
    strict = {f"conf/{link}/rp_filter": "2" for link in ("eth0", "eth1")}
    local = {f"conf/{link}/accept_local": "1" for link in ("eth0", "eth1")}
    with line.near.entered():
        assert needed(INTO, AT_NEAR) == {} and needed() == {}
        assert needed(INTO, in_python=True) == local
        set_sysctl(line.near, "net/ipv4/ip_forward", "0")
        assert needed(INTO) == {"ip_forward": "1"} and needed(INTO, forwarded=False) == {}
        set_sysctl(line.near, "net/ipv4/ip_forward", "1")
        set_sysctl(line.near, "net/ipv4/conf/all/rp_filter", "1")
        assert needed(INTO) == {} and needed(AT_NEAR) == strict
        assert needed(Decapsulation(OUT, (number(NEAR),), (), ("eth1",))) == {
            "conf/eth1/rp_filter": "2"
        }
        assert needed(INTO, in_python=True) == strict | local
        set_sysctl(line.near, "net/ipv4/conf/all/src_valid_mark", "1")
        assert needed(INTO) == strict and needed(INTO, forwarded=False) == {}
        set_sysctl(line.near, "net/ipv4/conf/all/accept_local", "1")
        assert needed(INTO, in_python=True) == strict


@pytest.mark.parametrize("case", ["forwarding", "way back", "mark"])
def test_what_is_needed_is_and_helps(line: Line, case: str) -> None:
    set_sysctl(line.far, "net/ipv4/conf/all/rp_filter", "1")
    set_sysctl(line.near, "net/ipv4/conf/all/rp_filter", "1")
    match case:
        case "forwarding":
            set_sysctl(line.near, "net/ipv4/ip_forward", "0")
        case "way back":
            add_route(line.far, "10.1.0.0/24", via="10.4.0.2")
        case "mark":
            set_sysctl(line.near, "net/ipv4/conf/all/src_valid_mark", "1")
    nothing: Before = {"sysctls": {}, "links": ["eth0"]}
    with line.near.entered():
        tunnels.put((INTO,), nothing)
    with line.far.entered():
        tunnels.put((AT_FAR,), nothing)
    assert not arrives(line, 8)
    for place, wanted in ((line.near, INTO), (line.far, AT_FAR)):
        with place.entered():
            put(wanted)
    assert arrives(line, 8)


# Errors.


@pytest.mark.parametrize(
    ("wanted", "word"),
    [
        (Encapsulation(IN, number("10.9.0.1")), "there is no route to 10.9.0.1"),
    ],
)
def test_what_cannot_be(host: Namespace, wanted: tunnels.Tunnel, word: str) -> None:
    with pytest.raises(MachineError, match=word) as caught:
        put(wanted)
    assert caught.value.help
    assert tunnels.look() == ((), ())
