"""A case before a real kernel: raw frames in, and what came of them.

The hosts at both ends take no part: a table of theirs drops all that arrives
(packet sockets see it before), so that no reset or ICMP error answers. The
manager's own answers are dropped as they leave, before any policy sees them: what
the kernel sends of itself has no user behind its socket.
"""

import socket
import struct
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Self

from itmlang import ir
from itmlang.nft.model import TABLE_PREFIX, Ruleset
from itmlang.packet import Packet
from itmlang.semantics import Host, Visit
from runtime import nft
from runtime.lab import Capture, Network
from runtime.traffic import MAC
from tests.support.frames import routed

_ETHERTYPE = {4: 0x0800, 6: 0x86DD}
_SILENT = """
table inet silent {
	chain arriving { type filter hook prerouting priority -500; policy drop; }
}
"""
_OBSERVER = """
table inet observer {
	counter arrived { }
	chain arriving { type filter hook input priority 300; counter name "arrived"; }
	chain answering { type filter hook output priority -500; meta skuid 0 accept; drop; }
}
"""
_ARRIVAL = 1.0  # seconds that a packet which should arrive may take
_ABSENCE = 0.01  # seconds after which one that should not arrive is taken for dropped
SO_MARK, IPV6_RECVTCLASS = 36, 66
_LOCAL = {socket.AF_INET: (1, 6, 17, 132), socket.AF_INET6: (6, 17, 58, 132)}  # see `Locals`
# Of ctnetlink, include/uapi/linux/netfilter/nfnetlink_conntrack.h.
_CONNTRACK_DELETE, _NETLINK_NETFILTER = 1 << 8 | 2, 12


def through(host: Host, packet: Packet, path: str, now: float) -> list[Visit]:
    """`Host.traverse` with routing in between: the TTL goes down before `forward`."""

    def before(hook: str, packet: Packet) -> None:
        if hook == "forward":
            routed(packet.data)

    return host.traverse(packet, path, now, before=before)


def placed(packet: Packet, path: str) -> Packet:
    """The packet with the manager's interfaces, by its addresses."""
    inside, outside = ("eth0", "eth1") if from_client(bytes(packet.data)) else ("eth1", "eth0")
    packet.input = None if path == "out" else inside
    packet.output = {"forward": outside, "in": None, "out": _way_out(bytes(packet.data))}[path]
    return packet


def _addresses(data: bytes) -> tuple[bytes, bytes]:
    return (data[12:16], data[16:20]) if data[0] >> 4 == 4 else (data[8:24], data[24:40])


def side_of(data: bytes) -> int:
    """Where a packet goes: 1 to the client's network, 2 to the server's."""
    return _side(_addresses(data)[1])


def from_client(data: bytes) -> bool:
    return _side(_addresses(data)[0]) != 2


def _way_out(data: bytes) -> str:
    return "eth1" if _side(_addresses(data)[1]) == 2 else "eth0"


def _side(address: bytes) -> int:
    """1 for the client's networks, 2 for the server's."""
    return address[2] if len(address) == 4 else address[3]


@dataclass(frozen=True)
class Arrival:
    """A packet that came through: its bytes, of a local IPv6 one those behind the header.

    For the latter, its socket tells the traffic class.
    """

    data: bytes
    traffic_class: int | None = None


def counted(host: Host) -> dict[str, int]:
    """What `Wire.counted` should find, by the semantics."""
    found = {}
    for name, state in host.states.items():
        found |= {f"{name} class {c}": n for c, n in state.packets.items()}
        found |= {
            f"{name} uncounted {count.flow.name}": state.flows[count.flow.name].uncounted
            for count in state.policy.counts
        }
        for change in state.policy.updates:
            if isinstance(change, ir.Addition):
                table = host.sets[change.set.name]
                found[f"{name} unlearned {change.set.name}"] = table.unlearned.get(name, 0)
        for note, number in zip(state.policy.notes, state.noted, strict=True):
            found[f"{name} {'sampled' if isinstance(note, ir.Sample) else 'recorded'} "] = number
    return found


class Wire:
    """The network with raw sockets into each side, for a `with` block."""

    def __init__(self, network: Network) -> None:
        self.network = network

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for host in (self.network.client, self.network.server):
                with host.entered():
                    nft.load(_SILENT)
            with self.network.manager.entered():
                nft.load(_OBSERVER)
            with self.network.client.entered():
                self._client = stack.enter_context(_link_socket())
            with self.network.server.entered():
                self._server = stack.enter_context(_link_socket())
            with self.network.manager.entered():
                self._raw = {
                    4: stack.enter_context(_raw_socket(socket.AF_INET)),
                    6: stack.enter_context(_raw_socket(socket.AF_INET6)),
                }
            self._resources = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._resources.close()

    @contextmanager
    def loaded(self, text: str) -> Iterator["Exchange"]:
        """The ruleset in the manager; all tables of ours are gone afterwards."""
        with self.network.manager.entered():
            _forget_connections()
            nft.load(text)
        try:
            with (
                Capture(self.network.client, "eth0") as client,
                Capture(self.network.server, "eth0") as server,
            ):
                yield Exchange(self, client, server)
        finally:
            with self.network.manager.entered():
                ours = [path for path in nft.tables() if f" {TABLE_PREFIX}" in path]
                nft.load("".join(f"delete table {path}\n" for path in ours))

    def send(self, data: bytes, path: str, mark: int = 0) -> None:
        if path == "out":
            self._send_out(data, mark)
            return
        sender = self._client if from_client(data) else self._server
        mac = bytes.fromhex(MAC.replace(":", ""))
        sender.send(mac + mac + struct.pack("!H", _ETHERTYPE[data[0] >> 4]) + data)

    def _send_out(self, data: bytes, mark: int) -> None:
        version = data[0] >> 4
        destination = _addresses(data)[1]
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        sender = self._raw[version]
        sender.setsockopt(socket.SOL_SOCKET, SO_MARK, struct.pack("=I", mark))
        with suppress(PermissionError):  # what the sender of a dropped packet is told
            sender.sendto(data, (socket.inet_ntop(family, destination), 0))

    def counted(self, ruleset: Ruleset) -> dict[str, int]:
        """The counters of a ruleset's policies that have a meaning there, by policy and what they
        count: those of an overlay's paths have none."""
        return {
            f"{counter.policy} {counter.kind} {counter.of}": found[counter.name]
            for table in ruleset.tables
            for found in (self.counters(table.path),)
            for counter in table.counters
            if counter.kind not in ("via", "sent", "back")
        }

    def counters(self, path: str) -> dict[str, int]:
        """The packets that each named counter of a table (`family name`) has seen."""
        with self.network.manager.entered():
            return {name: packets for name, (packets, _) in nft.counters(path).items()}


class Locals:
    """Raw sockets of the manager that hear what is delivered to it, for a `with` block.

    They hear ICMP, TCP, UDP and SCTP without extension headers or fragments.
    """

    def __init__(self, wire: Wire) -> None:
        self._sockets: dict[tuple[int, int], socket.socket] = {}
        with wire.network.manager.entered():
            for family, protocols in _LOCAL.items():
                for protocol in protocols:
                    one = socket.socket(family, socket.SOCK_RAW, protocol)
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
                    if family == socket.AF_INET6:
                        one.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVTCLASS, 1)
                    one.setblocking(False)
                    self._sockets[4 if family == socket.AF_INET else 6, protocol] = one

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for one in self._sockets.values():
            one.close()

    def heard(self) -> dict[tuple[int, int], list[tuple[bytes, int | None]]]:
        """What came since the last call, by family and protocol: bytes and IPv6's traffic class.

        Of IPv6 the bytes begin behind the header.
        """
        found: dict[tuple[int, int], list[tuple[bytes, int | None]]] = {}
        for key, one in self._sockets.items():
            with suppress(BlockingIOError):
                while True:
                    data, control, _, _ = one.recvmsg(1 << 16, 256)
                    tos = int.from_bytes(control[0][2], "little") if control else None
                    found.setdefault(key, []).append((data, tos))
        return found


class Exchange:
    """Packets sent one by one, each with what arrived of it."""

    def __init__(self, wire: Wire, client: Capture, server: Capture) -> None:
        self._wire = wire
        self._captures = {1: client, 2: server}
        self._seen = {1: 0, 2: 0}

    def pass_on(
        self, data: bytes, path: str, mark: int, expected: bool, leaving: bytes = b""
    ) -> Arrival | None:
        """Send a packet and wait for it, only a moment if it is `expected` to be dropped.

        `leaving` is what should come of it, where it may be addressed elsewhere then.
        """
        if path == "in":
            return self._locally(data, expected)
        self._wire.send(data, path, mark)
        side = _side(_addresses(leaving or data)[1])
        found = self._captures[side].packets
        deadline = time.monotonic() + (_ARRIVAL if expected else _ABSENCE)
        while len(found) <= self._seen[side] and time.monotonic() < deadline:
            time.sleep(0.0002)
        if len(found) <= self._seen[side]:
            return None
        self._seen[side] += 1
        return Arrival(found[self._seen[side] - 1].data)

    def burst(
        self, sends: Iterable[bytes], path: str, expected: Mapping[int, int]
    ) -> dict[int, list[bytes]]:
        """Send packets on a path past the manager; what arrived at each side, in order.

        Waits for the `expected` number at each side, and a moment for more.
        """
        for data in sends:
            self._wire.send(data, path)
        deadline = time.monotonic() + _ARRIVAL
        while time.monotonic() < deadline and any(
            len(self._captures[side].packets) < self._seen[side] + number
            for side, number in expected.items()
        ):
            time.sleep(0.001)
        time.sleep(_ABSENCE)
        found = {}
        for side, capture in self._captures.items():
            found[side] = [one.data for one in capture.packets[self._seen[side] :]]
            self._seen[side] += len(found[side])
        return found

    def stray(self) -> int:
        """How many packets arrived that nobody waited for."""
        return sum(len(capture.stop()) - self._seen[side]
                   for side, capture in self._captures.items())  # fmt: skip

    def _locally(self, data: bytes, expected: bool) -> Arrival | None:
        family = socket.AF_INET if data[0] >> 4 == 4 else socket.AF_INET6
        protocol = data[9] if family == socket.AF_INET else data[6]
        before = self._wire.counters("inet observer")["arrived"]
        with self._wire.network.manager.entered():
            listener = socket.socket(family, socket.SOCK_RAW, protocol)
        with listener:
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVTCLASS, 1)
            self._wire.send(data, "in")
            listener.settimeout(_ARRIVAL if expected else _ABSENCE)
            try:
                received, control, _, _ = listener.recvmsg(1 << 16, 256)
            except TimeoutError:
                received, control = b"", []
        arrived = self._wire.counters("inet observer")["arrived"] - before
        if not arrived:
            return None
        if family == socket.AF_INET:
            return Arrival(received)
        ((_, _, raw),) = control
        return Arrival(received, int.from_bytes(raw, "little"))


def _forget_connections() -> None:
    """Empty the caller's connection tracking, so that no test meets another one's."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as netlink:
        netlink.settimeout(1)
        netlink.send(struct.pack("=IHHIIBBH", 20, _CONNTRACK_DELETE, 5, 1, 0, 0, 0, 0))
        (failure,) = struct.unpack_from("=i", netlink.recv(4096), 16)
        if failure:
            raise OSError(-failure, "the connections cannot be forgotten")


def _link_socket() -> socket.socket:
    link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    link.bind(("eth0", 0))
    return link


def _raw_socket(family: int) -> socket.socket:
    return socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)


def nft_check(text: str) -> str:
    """What the `nft` of the machine says against a ruleset, in the caller's namespace."""
    done = subprocess.run(
        ["nft", "--check", "--file", "-"], input=text, capture_output=True, text=True, check=False
    )
    return done.stderr if done.returncode else ""
