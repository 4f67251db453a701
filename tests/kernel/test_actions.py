"""What actions and log entries do beside the packet itself: answers, routes, copies."""

import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from itmlang.packet import Header
from itmlang.pipeline import compile
from itmlang.source import Source
from runtime import nft
from runtime.lab import Capture, Network
from runtime.traffic import Namespace, TrafficError, set_sysctl
from tests.support.needs import unavailable

FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
PORT = 7
SECONDS = 2.0  # for what should come
ANY_PROTOCOL, STRANGE = 0x0003, 0x88B5  # IEEE 802.1: for local experiments
ARP = 0x0806
# include/uapi/linux/netfilter/nfnetlink_log.h
NETFILTER, PACKET, CONFIGURE = 12, 4 << 8, 4 << 8 | 1
COMMAND, MODE, THRESHOLD, BIND, COPY_PACKET, PAYLOAD, PREFIX = 1, 2, 5, 1, 2, 9, 10


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    try:
        entered = Network().__enter__()
    except TrafficError as error:
        unavailable(error)
    with entered as network:
        # Without these, only so many errors are sent in a second.
        set_sysctl(network.manager, "net/ipv4/icmp_ratelimit", "0")
        set_sysctl(network.manager, "net/ipv6/icmp/ratelimit", "0")
        yield network


@pytest.fixture(autouse=True)
def _clean(network: Network) -> Iterator[None]:
    yield
    with network.manager.entered():
        nft.load("".join(f"delete table {path}\n" for path in nft.tables()))


def load(network: Network, text: str) -> None:
    with network.manager.entered():
        nft.load(compile(Source("test.itm", text)).text.text)


def counted(network: Network, path: str) -> dict[str, int]:
    with network.manager.entered():
        return {name: packets for name, (packets, _) in nft.counters(path).items()}


def opened(ns: Namespace, family: int, kind: int, port: int = 0) -> socket.socket:
    with ns.entered():
        one = socket.socket(FAMILIES[family], kind)
    one.settimeout(SECONDS)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if port:
        one.bind(("", port))
    return one


@pytest.mark.parametrize("hook", ['ingress "eth0"', "prerouting", "input", "forward", "output"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_reject_reaches_the_sender(network: Network, hook: str, family: int) -> None:
    load(
        network,
        f"policy p {{ at {hook} classify {{ c when dport == {PORT} }} process {{ c {{ reject }} }} }}",
    )
    sender = network.manager if hook == "output" else network.client
    receiver = network.manager if hook == "input" else network.server
    addresses = network.client_gateway if hook == "input" else network.server_address
    with ExitStack() as stack:
        # Both listen, so whatever refuses is the policy.
        listener = stack.enter_context(opened(receiver, family, socket.SOCK_STREAM, PORT))
        listener.listen()
        hearer = stack.enter_context(opened(receiver, family, socket.SOCK_DGRAM, PORT))
        tcp = stack.enter_context(opened(sender, family, socket.SOCK_STREAM))
        with pytest.raises(ConnectionRefusedError):
            tcp.connect((addresses[family], PORT))
        udp = stack.enter_context(opened(sender, family, socket.SOCK_DGRAM))
        udp.connect((addresses[family], PORT))
        with suppress(PermissionError):  # what a local sender is told beside
            udp.send(b"x")
        with pytest.raises(ConnectionRefusedError):
            udp.recv(1)
        hearer.settimeout(0.02)
        with pytest.raises(TimeoutError):
            hearer.recv(1)
    assert counted(network, "inet itm_p") == {"class_c": 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mark_at_output_finds_another_route(network: Network, family: int) -> None:
    rule = ("rule", "add", "fwmark", "0x5/0xffffff", "lookup", "100")
    other = ("route", "add", "default", "via", network.client_address[family], "table", "100")
    with network.manager.entered():
        for command in (rule, other):
            subprocess.run(["ip", f"-{family}", *command], check=True)
    load(
        network,
        "policy p { at output classify { c when dport == 7 } process { c { set mark 5 } } }",
    )
    assert passes(network, family, network.server_address[family], 8) == "server"
    assert passes(network, family, network.server_address[family], 7) == "client"


@pytest.mark.parametrize("family", FAMILIES)
def test_another_destination_at_output_finds_its_route(network: Network, family: int) -> None:
    there = network.client_address[family]
    load(
        network,
        "policy p { at output classify { c when dport == 7 } "
        f"process {{ c {{ limit 1/s else {{ }} set daddr {there} }} }} }}",
    )
    assert passes(network, family, network.server_address[family], 8) == "server"
    assert passes(network, family, network.server_address[family], 7) == "client"


def passes(network: Network, family: int, address: str, port: int) -> str:
    """Which host a datagram of the manager arrives at."""
    with (
        Capture(network.client, "eth0") as client,
        Capture(network.server, "eth0") as server,
        opened(network.manager, family, socket.SOCK_DGRAM) as sender,
    ):
        sender.sendto(b"where to?", (address, port))
        found = {"client": client.stop(), "server": server.stop()}
    (host,) = (name for name, got in found.items() if any(b"where to?" in g.data for g in got))
    return host


def test_samples_reach_the_log_group(network: Network) -> None:
    load(
        network,
        "policy watch { at forward interest { dport 7 } log { sample 1 in 4 group 9 } }",
    )
    with log_group(network.manager, 9) as log:
        for family in FAMILIES:
            with opened(network.client, family, socket.SOCK_DGRAM) as sender:
                for number in range(9):
                    text = f"{family} {number} ".encode() + bytes(200)
                    sender.sendto(text, (network.server_address[family], PORT))
        heads = {4: 28, 6: 48}
        wanted = [(4, 0), (4, 4), (4, 8), (6, 3), (6, 7)]
        for family, number in wanted:
            prefix, payload = copied(log)
            assert prefix == b"watch\0"
            assert payload[heads[family] :].startswith(f"{family} {number} ".encode())
            assert len(payload) == 128
        log.settimeout(0.05)
        with pytest.raises(TimeoutError):
            copied(log)
    assert counted(network, "inet itm_watch") == {"sampled": len(wanted)}


def log_group(ns: Namespace, group: int) -> socket.socket:
    """A netlink socket that gets what is logged to a group."""
    with ns.entered():
        log = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETFILTER)
    log.settimeout(SECONDS)
    for kind, value in (
        (COMMAND, struct.pack("B", BIND)),
        (MODE, struct.pack("!IBx", 0xFFFF, COPY_PACKET)),
        (THRESHOLD, struct.pack("!I", 1)),
    ):
        attribute = struct.pack("=HH", 4 + len(value), kind) + value
        attribute += bytes(-len(attribute) % 4)
        header = struct.pack("=IHHIIBBH", 20 + len(attribute), CONFIGURE, 5, 1, 0, 0, 0,
                             socket.htons(group))  # fmt: skip
        log.send(header + attribute)
        (failure,) = struct.unpack_from("=i", log.recv(4096), 16)
        assert failure == 0
    return log


def copied(log: socket.socket) -> tuple[bytes, bytes]:
    """The next copy's prefix and bytes."""
    message = log.recv(1 << 16)
    length, kind = struct.unpack_from("=IH", message)
    assert kind == PACKET
    found, at = {}, 20
    while at < length:
        size, attribute = struct.unpack_from("=HH", message, at)
        found[attribute & 0x3FFF] = message[at + 4 : at + size]
        at += -(-size // 4) * 4
    return found[PREFIX], found[PAYLOAD]


def test_no_class_takes_frames_that_are_not_ip(network: Network) -> None:
    load(
        network,
        'policy out { at egress "eth1" flow f by protocol classify { all } log { count f sample 1 in 1 } '
        "process { all { drop } } }\n"
        'policy into { at ingress "eth0" classify { all } process { all { drop } } }',
    )
    arp = struct.pack("!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, b"abcdef", bytes(4), bytes(6), bytes(4))
    looks_like_ip = bytes(Header(17, (4, 1), (4, 2), 1, PORT).build().data)
    for sender, device, receiver in (
        (network.manager, "eth1", network.server),
        (network.client, "eth0", network.manager),
    ):
        with sender.entered():
            link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            link.bind((device, 0))
        with receiver.entered():
            tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ANY_PROTOCOL))
            tap.bind(("eth0", ANY_PROTOCOL))
            tap.settimeout(SECONDS)
        with link, tap:
            for kind, body in ((ARP, arp), (STRANGE, looks_like_ip)):
                link.send(b"\xff" * 12 + struct.pack("!H", kind) + body)
                assert tap.recv(1 << 16)[12:14] == struct.pack("!H", kind)
    assert counted(network, "inet itm_into") == {"class_all": 0}
    assert set(counted(network, "netdev itm_out").values()) == {0}
