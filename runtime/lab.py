"""Throwaway networks and real traffic in them.

Strategy: three namespaces in a row, client - manager - server, with nothing on
their links but what is sent on purpose. Flows are real TCP downloads, all sockets
driven by one event loop in one thread. What a flow did is not asked of its ends
but read off the wire at the receivers, by packet sockets; a capture that lost a
packet is an error, so a count can be trusted.
"""

import asyncio
import hashlib
import os
import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Self

from runtime.traffic import Namespace, add_address, add_route, set_sysctl, veth

ETH_P_ALL, ETH_P_IP, ETH_P_IPV6 = 0x0003, 0x0800, 0x86DD
SOL_PACKET, PACKET_STATISTICS, PACKET_IGNORE_OUTGOING = 263, 6, 23
SO_RCVBUFFORCE, SO_TIMESTAMPNS = 33, 35
TCP_CLOSE = 7
CAPTURE_BUFFER = 128 << 20  # bytes as the kernel counts them, 2 KB and more for a packet

SOCKET_FAMILY: Mapping[int, int] = {4: socket.AF_INET, 6: socket.AF_INET6}

Address = tuple[str, int]


class LabError(Exception):
    """An experiment came to no result; the message says which one and how far it got."""


class Network:
    """client eth0 - eth0 manager eth1 - eth0 server, with IPv4 and IPv6, for a `with` block.

    The manager forwards; the other two have their default routes through it.
    Addresses are by family, 4 or 6. Entering raises TrafficError.
    """

    client_address: Mapping[int, str] = {4: "10.0.1.1", 6: "fd00:1::1"}
    client_gateway: Mapping[int, str] = {4: "10.0.1.254", 6: "fd00:1::fe"}
    server_gateway: Mapping[int, str] = {4: "10.0.2.254", 6: "fd00:2::fe"}
    server_address: Mapping[int, str] = {4: "10.0.2.1", 6: "fd00:2::1"}
    prefix_length: Mapping[int, int] = {4: 24, 6: 64}

    client: Namespace
    manager: Namespace
    server: Namespace

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.client = self._namespace("client", stack)
            self.manager = self._namespace("manager", stack)
            self.server = self._namespace("server", stack)
            veth(self.client, "eth0", self.manager, "eth0")
            veth(self.manager, "eth1", self.server, "eth0")
            # Only now: a link that comes up where IPv6 forwards joins multicast groups.
            set_sysctl(self.manager, "net/ipv4/ip_forward", "1")
            set_sysctl(self.manager, "net/ipv6/conf/all/forwarding", "1")
            for family, length in self.prefix_length.items():
                for ns, link, address in (
                    (self.client, "eth0", self.client_address),
                    (self.manager, "eth0", self.client_gateway),
                    (self.manager, "eth1", self.server_gateway),
                    (self.server, "eth0", self.server_address),
                ):
                    add_address(ns, link, f"{address[family]}/{length}")
                add_route(self.client, "default", via=self.client_gateway[family])
                add_route(self.server, "default", via=self.server_gateway[family])
            self._resources = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._resources.close()

    @staticmethod
    def _namespace(name: str, stack: ExitStack) -> Namespace:
        ns = Namespace.create(name)
        stack.callback(ns.close)
        return ns


@dataclass(frozen=True, slots=True)
class Captured:
    """A packet as it arrived.

    `time` in seconds since the epoch, stamped by the kernel; `data` from the first
    byte of the IP header.
    """

    time: float
    data: bytes


class Capture:
    """The IPv4 and IPv6 packets that arrive at one link, for a `with` block.

    `packets` grows in the order of arrival. Entering raises LabError if the link
    cannot be listened to, leaving it if packets were lost.
    """

    def __init__(self, namespace: Namespace, link: str) -> None:
        self.packets: list[Captured] = []
        self._namespace, self._link = namespace, link
        self._where = f"{namespace.name}/{link}"
        self._stopping = threading.Event()
        self._failure: OSError | None = None

    def __enter__(self) -> Self:
        try:
            with self._namespace.entered():
                self._socket = _packet_socket(self._link)
        except OSError as error:
            raise LabError(f"cannot capture on {self._where}: {error.strerror}") from error
        self._reader = threading.Thread(target=self._read, name="capture", daemon=True)
        self._reader.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.stop()
        except LabError:
            if error is None:  # Else the first error says more.
                raise

    def stop(self) -> list[Captured]:
        """Read what has arrived so far, listen no more, and return `packets`.

        Raises LabError if a packet was lost. A second call only returns `packets`.
        """
        if not self._stopping.is_set():
            self._stopping.set()
            self._reader.join()
            with self._socket:
                statistics = self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8)
            _, lost = struct.unpack("=II", statistics)
            if self._failure:
                raise LabError(f"the capture on {self._where} broke off: {self._failure.strerror}")
            if lost:
                raise LabError(f"the capture on {self._where} lost {lost} packets")
        return self.packets

    def _read(self) -> None:
        while True:
            # Asked before reading: if nothing comes after that, all has been read.
            stopping = self._stopping.is_set()
            try:
                data, control, _, address = self._socket.recvmsg(1 << 16, 64)
            except TimeoutError:
                if stopping:
                    return
                continue
            except OSError as failure:
                self._failure = failure
                return
            if address[1] in (ETH_P_IP, ETH_P_IPV6):
                ((_, _, stamp),) = control
                seconds, nanoseconds = struct.unpack("@ll", stamp)
                self.packets.append(Captured(seconds + nanoseconds / 1e9, data))


@dataclass(frozen=True)
class Flow:
    """A download, seen in the direction of its data, so `source` is the server.

    `family` is 4 or 6, `size` in bytes; an address is (IP address, port).
    """

    family: int
    size: int
    source: Address
    destination: Address


@dataclass(frozen=True)
class FlowRecord:
    """What a flow did: `seconds` from connecting to the end of the data, and its packets.

    `forward` are the packets with the data, as the client received them; `backward`
    the acknowledgements, as the server did.
    """

    flow: Flow
    seconds: float
    forward: tuple[Captured, ...]
    backward: tuple[Captured, ...]


def run_flows(
    network: Network,
    sizes: Sequence[int],
    families: Sequence[int] = (4, 6),
    congestion: str = "cubic",
    timeout: float = 30.0,
    parallel: int = 1,
    port: int = 80,
) -> list[FlowRecord]:
    """Download each of `sizes` (bytes) over each family by TCP, from the server to the client.

    `congestion` is the kernel's name of the congestion control on both sides,
    `timeout` in seconds bounds each flow, `parallel` flows run at a time, the server
    listens on `port`. The records come in the order of families, then sizes, and hold
    every packet from the first SYN to the acknowledgement of the last FIN.

    Raises LabError if a flow fails, stalls or brings wrong bytes, or if a capture lost
    packets. It runs an asyncio event loop of its own, so no coroutine may call it.
    """
    if parallel < 1:
        raise ValueError("parallel must be at least 1")
    files = {size: _content(size) for size in sizes}
    with (
        Capture(network.client, "eth0") as at_client,
        Capture(network.server, "eth0") as at_server,
        ExitStack() as stack,
    ):
        listeners = [
            stack.enter_context(_listener(network, family, port, congestion))
            for family in dict.fromkeys(families)
        ]

        async def run() -> list[tuple[Flow, float]]:
            # Kept, because the loop itself refers to its tasks only weakly.
            servers = [asyncio.create_task(_serve(listener, files)) for listener in listeners]
            slots = asyncio.Semaphore(parallel)
            downloads = [
                _download(network, family, port, files[size], congestion, timeout, slots)
                for family in families
                for size in sizes
            ]
            results = await asyncio.gather(*downloads)
            for server in servers:
                server.cancel()
            return results

        results = asyncio.run(run())
    if len({flow.destination for flow, _ in results}) < len(results):
        raise LabError("two flows had the same ports, so their packets cannot be told apart")
    forward, backward = _by_flow(at_client.packets), _by_flow(at_server.packets)
    return [
        FlowRecord(
            flow,
            seconds,
            tuple(forward[_key(flow.source, flow.destination)]),
            tuple(backward[_key(flow.destination, flow.source)]),
        )
        for flow, seconds in results
    ]


async def _serve(listener: socket.socket, files: Mapping[int, bytes]) -> None:
    """Answer every connection with the file of the size that it asks for."""
    loop = asyncio.get_running_loop()

    async def answer(connection: socket.socket) -> None:
        with connection, suppress(OSError):  # The client sees the failure too, and reports it.
            request = await loop.sock_recv(connection, 8)
            await loop.sock_sendall(connection, files.get(int.from_bytes(request), b""))

    # The stack closes also those whose answer is cancelled before it begins.
    with ExitStack() as connections:
        async with asyncio.TaskGroup() as answers:
            while True:
                connection, _ = await loop.sock_accept(listener)
                connections.enter_context(connection)
                answers.create_task(answer(connection))


async def _download(
    network: Network,
    family: int,
    port: int,
    expected: bytes,
    congestion: str,
    timeout: float,
    slots: asyncio.Semaphore,
) -> tuple[Flow, float]:
    loop = asyncio.get_running_loop()
    server, size, received = (network.server_address[family], port), len(expected), bytearray()
    what = f"IPv{family} download of {size} bytes from {server[0]} port {port}"
    try:
        async with slots, asyncio.timeout(timeout):
            with network.client.entered():
                client = socket.socket(SOCKET_FAMILY[family])
            with _ready(client, congestion):
                started = time.perf_counter()
                await loop.sock_connect(client, server)
                await loop.sock_sendall(client, size.to_bytes(8))
                while chunk := await loop.sock_recv(client, 1 << 18):
                    received += chunk
                seconds = time.perf_counter() - started
                flow = Flow(family, size, server, client.getsockname()[:2])
                client.shutdown(socket.SHUT_WR)
                # Closed means that the last acknowledgement has come in, past the captures.
                while client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != TCP_CLOSE:
                    await asyncio.sleep(0.0005)
    except OSError as error:
        late = isinstance(error, TimeoutError)
        why = f"not done after {timeout:g} s" if late else os.strerror(error.errno or 0)
        raise LabError(f"{what}: {why}, with {len(received)} bytes received") from error
    if received != expected:
        raise LabError(f"{what}: got {len(received)} bytes, and not those that were sent")
    return flow, seconds


def _content(size: int) -> bytes:
    """Bytes that look random, the same for every download of this size."""
    return hashlib.shake_128(size.to_bytes(8)).digest(size)


def _listener(network: Network, family: int, port: int, congestion: str) -> socket.socket:
    """A listening socket; the connections that it accepts inherit its congestion control."""
    address = (network.server_address[family], port)
    try:
        with network.server.entered():
            listener = socket.create_server(address, family=SOCKET_FAMILY[family])
    except OSError as error:
        raise LabError(f"cannot listen on port {port}: {error.strerror}") from error
    return _ready(listener, congestion)


def _ready(tcp: socket.socket, congestion: str) -> socket.socket:
    try:
        tcp.setblocking(False)
        tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
    except OSError as error:
        tcp.close()
        raise LabError(f"this kernel has no congestion control {congestion}") from error
    return tcp


def _packet_socket(link: str) -> socket.socket:
    # Without a protocol it hears nothing until it is bound to its one link.
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
    try:
        packets.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        packets.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, CAPTURE_BUFFER)
        packets.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        packets.settimeout(0.02)  # seconds: how late a reader notices that it should stop
        packets.bind((link, ETH_P_ALL))
    except OSError:
        packets.close()
        raise
    return packets


def _by_flow(packets: Iterable[Captured]) -> Mapping[bytes, list[Captured]]:
    """The TCP packets among `packets`, in their order, by the `_key` of their flow."""
    flows: defaultdict[bytes, list[Captured]] = defaultdict(list)
    for packet in packets:
        match packet.data[0] >> 4, packet.data:
            case 4, data if data[9] == socket.IPPROTO_TCP:
                ports = 4 * (data[0] & 0x0F)
                flows[data[12:20] + data[ports : ports + 4]].append(packet)
            case 6, data if data[6] == socket.IPPROTO_TCP:
                flows[data[8:44]].append(packet)
    return flows


def _key(source: Address, destination: Address) -> bytes:
    """Addresses, then ports, as in a packet."""
    family = SOCKET_FAMILY[6 if ":" in source[0] else 4]
    hosts = (socket.inet_pton(family, host) for host, _ in (source, destination))
    return b"".join(hosts) + struct.pack("!HH", source[1], destination[1])
