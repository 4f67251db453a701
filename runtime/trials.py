"""Tests in the file, before a real kernel: a throwaway traffic manager between two wires.

Each test gets namespaces of its own: a manager with the links that the test's
packets and policies name, and a silent host at the other end of each link. Raw
frames go in at one end; what comes out is read off the other, and the class
counters of the ruleset tell how the kernel classified them. Packets for the
manager itself are seen by a counter behind the policies and, over IPv4, by a raw
socket. What cannot be seen from outside (the mark, a local IPv6 packet's bytes) is
not judged.
"""

import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from itmlang import ir
from itmlang.actions.encapsulate import Decapsulate, Encapsulate
from itmlang.diagnostics import Findings
from itmlang.fields import EGRESS, INGRESS, hook_kind
from itmlang.nft.model import Ruleset
from itmlang.packet import Packet
from itmlang.pipeline import Compiled, lowered
from itmlang.source import Source
from itmlang.trials import (
    INTERFACES,
    VERDICTS,
    Expected,
    Failure,
    Send,
    Trial,
    Wait,
    built,
    classes_text,
    field_text,
)
from itmlang.values import IPV4, address_text
from runtime import nft
from runtime.errors import UsageError
from runtime.handlers import HandlerError, load
from runtime.lab import Capture
from runtime.traffic import MAC, Namespace, add_address, add_link_route, set_sysctl, veth

ENTERING, LEAVING = INTERFACES
LONGEST_WAIT: Final = 10.0  # seconds that a test may let pass before a real kernel
_ARRIVAL, _ABSENCE = 3.0, 0.05  # seconds to wait for packets that should come, that should not
_ETHERTYPE: Final = {4: 0x0800, 6: 0x86DD}
_SO_MARK: Final = 36
# What the manager says of itself (resets, ICMP errors) stays inside; what we send has a user.
_OBSERVER: Final = """
table inet observer {
	counter arrived { }
	chain arriving { type filter hook input priority 300; counter name "arrived"; }
	chain answering { type filter hook output priority -500; meta skuid 0 accept; drop; }
}
"""


@dataclass(frozen=True)
class KernelRun:
    """What a test came to: its failures, or why it was not run ("" if it was)."""

    failures: tuple[Failure, ...] = ()
    not_run: str = ""


def _tunnels(policy: ir.Policy) -> bool:
    # By a neighbour nothing goes here: nobody probes.
    classes = (steps for name, steps in policy.process.items() if name not in policy.ways)
    steps = [step for steps in classes for step in ir.every_step(steps)]
    return any(isinstance(step.action, Encapsulate | Decapsulate) for step in steps)


@contextmanager
def _python(namespace: Namespace, compiled: Compiled) -> Iterator[None]:
    """What the policies have in Python, if anything. Raises `UsageError`, `MachineError`."""
    calls = {name: at for t in compiled.ruleset.tables for q in t.queues for name, at in q.calls}
    if not any(table.queues for table in compiled.ruleset.tables):
        yield
        return
    from runtime.aside import served

    file = compiled.source.name
    try:
        handlers = load(calls, None if file == "-" else Path(file).resolve().parent)
    except HandlerError as error:
        raise UsageError(f"{calls[error.target]}: {error}") from error
    with served(namespace, compiled, handlers):
        yield


def run_in_kernel(source: Source, trial: Trial, path: str = "forward") -> KernelRun:
    """The trial through the kernel; `path` is that of packets for which the test names none.

    Raises `TrafficError`, `LabError`, `CompileError` or `MachineError` if the machine
    or the compiler refuses.
    """
    waits = max((step.seconds for step in trial.steps if isinstance(step, Wait)), default=0.0)
    if waits > LONGEST_WAIT:
        return KernelRun(not_run=f"it waits {waits:g} s, longer than {LONGEST_WAIT:g} s")
    sends = [step for step in trial.steps if isinstance(step, Send)]
    ways = {(s.header.destination, s.header.output or "") for s in sends}
    if len({destination for destination, _ in ways}) < len(ways):
        return KernelRun(not_run="one destination leaves by several interfaces")
    if any(_tunnels(policy) for policy in trial.policies):
        return KernelRun(not_run="tunnels need a network to lead through")
    ruleset = lowered(source, trial.policies, (), Findings(), queue="xt")
    with _bench(trial, sends, path) as bench, ExitStack() as stack:
        with bench.manager.entered():
            nft.load(_OBSERVER)
            nft.load(ruleset.text.text)
        stack.enter_context(_python(bench.manager, ruleset))
        failures = []
        for step in trial.steps:
            if isinstance(step, Wait):
                time.sleep(step.seconds)
            else:
                failure = bench.judge(step, step.path or path, ruleset.ruleset)
                failures += [failure] if failure is not None else []
        return KernelRun(tuple(failures))


@contextmanager
def _bench(trial: Trial, sends: Sequence[Send], path: str) -> Iterator["_Bench"]:
    hooks = [hook for policy in trial.policies for hook in policy.hooks]
    devices = {hook.partition(" ")[2].strip('"') for hook in hooks
               if hook_kind(hook) in (INGRESS, EGRESS)}  # fmt: skip
    inputs = {s.header.input or ENTERING for s in sends}
    outputs = {s.header.output or LEAVING for s in sends}
    with ExitStack() as stack:
        manager, outside = (
            stack.enter_context(_closing(Namespace.create(name))) for name in ("manager", "wires")
        )
        for sysctl in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"):
            set_sysctl(manager, sysctl, "1")
        for kind in ("all", "default"):
            set_sysctl(manager, f"net/ipv4/conf/{kind}/rp_filter", "0")
        wires = {}
        for number, link in enumerate(sorted(inputs | outputs | devices)):
            wires[link] = f"wire{number}"
            veth(manager, link, outside, wires[link])
        bench = _Bench(manager, outside, wires)
        for send in sends:
            family, destination = send.header.destination
            host = f"{address_text(family, destination)}/{32 if family == IPV4 else 128}"
            link = "lo" if (send.path or path) == "in" else send.header.output or LEAVING
            bench.route(host, link)
        for link in sorted(inputs | outputs):
            bench.captures[link] = stack.enter_context(Capture(outside, wires[link]))
        yield bench


@contextmanager
def _closing(namespace: Namespace) -> Iterator[Namespace]:
    try:
        yield namespace
    finally:
        namespace.close()


@dataclass
class _Bench:
    manager: Namespace
    outside: Namespace
    wires: dict[str, str]  # link of the manager -> its other end
    captures: dict[str, Capture] = field(default_factory=dict)
    _routed: set[str] = field(default_factory=set)

    def route(self, host: str, link: str) -> None:
        if host in self._routed:
            return
        self._routed.add(host)
        if link == "lo":
            add_address(self.manager, "lo", host)
        else:
            add_link_route(self.manager, host, link)

    def judge(self, send: Send, path: str, ruleset: Ruleset) -> Failure | None:
        """Send the packets and compare: the first expectation that does not hold."""
        before = self._counters(ruleset)
        dropped = any(e.kind in ("drop", "reject") for e in send.expected)
        arrived = self._pass(send, path, dropped)
        after = self._counters(ruleset)
        told = {key: after[key] - before[key] for key in after if after[key] > before[key]}
        expected = list(send.expected)
        if not {e.kind for e in expected} & {*VERDICTS}:
            expected.append(Expected("accept", None, send.span))
        for one in expected:
            came = self._came(one, send, path, told, arrived)
            if came is not None:
                return Failure(send, 0, one, f"{came} (kernel)", (), None)
        return None

    def _came(
        self,
        expected: Expected,
        send: Send,
        path: str,
        told: dict[tuple[str, str], int],
        arrived: "list[bytes | None]",
    ) -> str | None:
        classes = list(told)
        match expected.kind:
            case "class":
                counted = [n for (policy, name), n in told.items()
                           if name == expected.value and expected.policy in ("", policy)]  # fmt: skip
                if sum(counted) >= send.count:
                    return None
                number = sum(counted)
                return f"{number} of {send.count} packets, {classes_text(classes)}"
            case "untouched":
                if classes:
                    return classes_text(classes)
                sent = bytes(send.header.build().data)
                same = all(one is None or _alike(one, sent) for one in arrived)
                return None if same else "the packet was changed"
            case "drop" | "reject":
                return None if not arrived else f"{len(arrived)} of {send.count} packets passed"
            case "accept":
                missing = send.count - len(arrived)
                return None if not missing else f"{missing} of {send.count} packets did not arrive"
            case "mark":
                return None  # no wire carries it
            case name:
                for data in arrived:
                    packet = None if data is None else Packet(bytearray(data))
                    if packet is None:
                        continue
                    if name == "ttl" and packet.ttl + 1 == expected.value and path == "forward":
                        continue  # written before the packet was routed
                    came = field_text(name, expected.value, packet)
                    if came is not None:
                        return came
                return None

    def _pass(self, send: Send, path: str, dropped: bool) -> "list[bytes | None]":
        """Send the packets; those that came through, None for one that only a counter saw."""
        packet = built(send.header, path)
        data = bytes(packet.data)
        if path == "in":
            return self._locally(send, data, dropped)
        link = send.header.output or LEAVING
        found = self.captures[link].packets
        first = len(found)
        self._inject(send, data, path)
        deadline = time.monotonic() + (_ABSENCE if dropped else _ARRIVAL)
        while len(found) - first < send.count and time.monotonic() < deadline:
            time.sleep(0.001)
        return [captured.data for captured in found[first:]]

    def _locally(self, send: Send, data: bytes, dropped: bool) -> "list[bytes | None]":
        before = self._arrived()
        family = socket.AF_INET if data[0] >> 4 == 4 else socket.AF_INET6
        received: list[bytes | None] = []
        with self.manager.entered():
            listener = socket.socket(family, socket.SOCK_RAW, send.header.protocol)
        with listener:
            listener.settimeout(_ABSENCE if dropped else 0.2)
            self._inject(send, data, "in")
            deadline = time.monotonic() + (_ABSENCE if dropped else _ARRIVAL)
            while self._arrived() - before < send.count and time.monotonic() < deadline:
                time.sleep(0.001)
            arrived = self._arrived() - before
            if family == socket.AF_INET:
                with suppress(TimeoutError):
                    while len(received) < arrived:
                        received.append(listener.recv(1 << 16))
        return [*received, *([None] * (arrived - len(received)))]

    def _inject(self, send: Send, data: bytes, path: str) -> None:
        if path == "out":
            self._send_out(send, data)
            return
        mac = bytes.fromhex(MAC.replace(":", ""))
        frame = mac + mac + struct.pack("!H", _ETHERTYPE[data[0] >> 4]) + data
        with self.outside.entered():
            link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        with link:
            link.bind((self.wires[send.header.input or ENTERING], 0))
            for _ in range(send.count):
                link.send(frame)

    def _send_out(self, send: Send, data: bytes) -> None:
        version, (family, destination) = data[0] >> 4, send.header.destination
        with self.manager.entered():
            kind = socket.AF_INET if version == 4 else socket.AF_INET6
            raw = socket.socket(kind, socket.SOCK_RAW, socket.IPPROTO_RAW)
        with raw:
            raw.setsockopt(socket.SOL_SOCKET, _SO_MARK, send.header.mark)
            for _ in range(send.count):
                with suppress(PermissionError):  # what the sender of a dropped packet is told
                    raw.sendto(data, (address_text(family, destination), 0))

    def _arrived(self) -> int:
        with self.manager.entered():
            return sum(packets for packets, _ in nft.counters("inet observer").values())

    def _counters(self, ruleset: Ruleset) -> dict[tuple[str, str], int]:
        """The class counters, by policy and class."""
        found: dict[tuple[str, str], int] = {}
        for table in ruleset.tables:
            with self.manager.entered():
                counted = nft.counters(table.path)
            found |= {
                (c.policy, c.of): counted[c.name][0] for c in table.counters if c.kind == "class"
            }
        return found


def _alike(arrived: bytes, sent: bytes) -> bool:
    """The same packet, but for what routing did to its TTL, and sending to its identity?"""
    packets = [Packet(bytearray(data)) for data in (arrived, sent)]
    for packet in packets:
        packet.set_ttl(0)
        if packet.family == IPV4:
            packet.data[4:6] = packet.data[10:12] = b"\0\0"
    return packets[0].data == packets[1].data
