"""Topologies of namespaces for overlays: traffic managers, plain routers, hosts, and their faults.

Boxes are joined by links; each gets static routes along the fewest links to every address there
is, so the direct path is the shorter one and a relay is reached by the longer. A traffic manager
has a stable address on `lo` and policies of its own; a host has a router on its only link.
What goes wrong does so on the way, in a plain router: all that comes in at an interface (or at any)
is dropped, by chance or always, or waits. Everything is ended and gone when the mesh is.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import ip_interface, ip_network
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from itmlang.pipeline import compile
from itmlang.source import Source
from runtime import apply as runtime_apply
from runtime import nft, store, talk
from runtime.decisions import decisions
from runtime.traffic import (
    Namespace,
    add_address,
    add_route,
    add_xt_queue_rule,
    set_sysctl,
    veth,
)
from runtime.units import Unit, unit_of
from tests.support import commands
from tests.support.commands import PATIENCE, ROOT, until

_Result = TypeVar("_Result")


@dataclass
class Box:
    """A namespace of the mesh; a traffic manager if it has policies."""

    name: str
    ns: Namespace
    folder: Path
    address: str = ""
    links: dict[str, str] = field(default_factory=dict)  # to a neighbour: the interface
    addresses: dict[str, str] = field(default_factory=dict)  # ours on the link to a neighbour

    # Policies.

    def unit(self, text: str, file: str = "mesh.itm") -> Unit:
        path = str(self.folder / file)
        Path(path).write_text(text)
        return unit_of(compile(Source(path, text)), path)

    def apply(self, text: str, file: str = "mesh.itm", **how: Any) -> runtime_apply.Applied:
        with self.ns.entered():
            return runtime_apply.apply(self.unit(text, file), **how)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`itmc` in here."""
        with self.ns.entered():
            return commands.run(*words)

    def nft(self, *words: str) -> str:
        with self.ns.entered():
            return subprocess.run(
                ["nft", *words], check=True, capture_output=True, text=True
            ).stdout

    # What the runtime says.

    def asked(self) -> dict[str, Any]:
        with self.ns.entered():
            return talk.ask(store.directory(), {"command": "status"}) or {"workers": [], "log": []}

    def worker(self, does: str = "overlay") -> dict[str, Any]:
        """What is known of a process that serves; empty if there is none."""
        found = [w for w in self.asked()["workers"] if w["does"] == does and w["ready"]]
        return found[0] if found else {}

    def state(self) -> dict[str, Any]:
        """What the engine told of itself last."""
        found: dict[str, Any] = self.worker().get("state", {})
        return found

    def paths(self, egress: str) -> dict[str, dict[str, Any]]:
        """The candidates to an egress, by their names."""
        for one in self.state().get("egresses", ()):
            if one["egress"] == egress:
                return {each["name"]: each for each in one["candidates"]}
        return {}

    def choice(self, egress: str) -> str:
        for one in self.state().get("egresses", ()):
            if one["egress"] == egress:
                return str(one["choice"])
        return ""

    def moves(self, overlay: str = "mesh") -> list[Mapping[str, Any]]:
        """The moves that are written down."""
        with self.ns.entered():
            return decisions(store.directory(), overlay)

    def elements(self, table: str = "itm_outward", map: str = "route_mesh") -> dict[str, str]:
        """What a map of choices says: the networks and the chains that they lead to."""
        try:
            listing = json.loads(self.nft("-j", "list", "map", "inet", table, map))
        except subprocess.CalledProcessError as error:
            if "No such file" not in error.stderr:
                raise
            return {}
        found = {}
        for item in listing["nftables"]:
            for key, verdict in item.get("map", {}).get("elem", ()):
                value = key["elem"]["val"] if "elem" in key else key
                prefix = value["prefix"] if isinstance(value, dict) else {"addr": value, "len": 32}
                found[f"{prefix['addr']}/{prefix['len']}"] = verdict["goto"]["target"]
        return found

    def counter(self, name: str, table: str = "itm_outward") -> int:
        """The packets that a counter has seen."""
        with self.ns.entered():
            return nft.counters(f"inet {table}")[name][0]

    # Processes.

    def processes(self) -> list[int]:
        with self.ns.entered():
            return sorted(commands.processes())

    def kill(self, processes: Sequence[int], number: int = signal.SIGKILL) -> None:
        """Signal processes, of this box only."""
        for one in set(self.processes()).intersection(processes):
            with suppress(ProcessLookupError):
                os.kill(one, number)

    def end(self) -> None:
        """End what still runs in here, and remove all policies."""
        with self.ns.entered(), commands.nothing_left():
            for process in commands.processes():
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGCONT)
            if store.directory().exists():
                runtime_apply.remove([])
            until(lambda: not commands.processes())

    # Faults: for plain routers.

    def trouble(self, *rules: str) -> None:
        """Have packets that come in go through these rules; none for an end of all trouble."""
        made = "table inet trouble\ndelete table inet trouble\n"
        if rules:
            lines = "\n".join(rules)
            hook = "type filter hook prerouting priority -400;"
            made += f"table inet trouble {{ chain arriving {{ {hook}\n{lines}\n}}\n}}\n"
        with self.ns.entered():
            nft.load(made)

    def die(self, from_: str = "") -> None:
        """Drop in silence all that comes, or what comes from a neighbour."""
        self.trouble(f'iifname "{self.links[from_]}" drop' if from_ else 'iifname "eth*" drop')

    def lose(self, percent: int) -> None:
        self.trouble(f"numgen random mod 100 < {percent} drop")

    @contextmanager
    def slow(self, milliseconds: float, jitter: float = 0.0) -> Iterator[None]:
        """Whatever passes waits, each way."""
        with self.ns.entered():
            line = subprocess.Popen(
                [sys.executable, "-m", "tests.support.delay", "7", str(milliseconds), str(jitter)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
            )  # fmt: skip
        try:
            assert line.stdout is not None and line.stdin is not None
            assert line.stdout.readline() == b"ready\n"
            with self.ns.entered():
                nft.load(
                    """
                    table inet slow { chain line { }
                      chain arriving { type filter hook prerouting priority -390;
                        iifname "eth*" jump line
                      }
                    }
                    """
                )
            add_xt_queue_rule(self.ns, "slow", "line", 7)
            yield
        finally:
            with self.ns.entered():
                nft.load("table inet slow\ndelete table inet slow\n")
            line.communicate()  # its input ends, and so does it


class Mesh:
    """Boxes and what joins them; `managers` have these addresses, `hosts` these networks.

    `links` are pairs of names. A host's network is that of its only link, in which it is the
    second (`10.1.0.0/16`: 10.1.0.2/24) and its router the first. Enter it with `mesh(…)`.
    """

    def __init__(
        self,
        stack: ExitStack,
        folder: Path,
        links: Sequence[tuple[str, str]],
        managers: Mapping[str, str],
        hosts: Mapping[str, str],
        offloads: bool,
    ) -> None:
        names = list(dict.fromkeys(name for pair in links for name in pair))
        self.folder, self._hosts = folder, hosts
        self.boxes: dict[str, Box] = {}
        for name in names:
            ns = Namespace.create(name)
            stack.callback(ns.close)
            own = folder / name
            own.mkdir()
            self.boxes[name] = Box(name, ns, own, managers.get(name, ""))
        self._subnets: dict[tuple[str, str], str] = {}
        for number, (a, b) in enumerate(links, 1):
            self._join(a, b, number, offloads)
        for name, box in self.boxes.items():
            if box.address:
                add_address(box.ns, "lo", f"{box.address}/32")
            if name not in hosts:
                set_sysctl(box.ns, "net/ipv4/ip_forward", "1")
            self._routes(box)
        stack.callback(self.end)

    def __getitem__(self, name: str) -> Box:
        return self.boxes[name]

    @property
    def managers(self) -> list[Box]:
        return [box for box in self.boxes.values() if box.address]

    def _join(self, a: str, b: str, number: int, offloads: bool) -> None:
        ends = self.boxes[a], self.boxes[b]
        names = [f"eth{len(end.links)}" for end in ends]
        veth(ends[0].ns, names[0], ends[1].ns, names[1], offloads=offloads)
        host = next((one for one in (a, b) if one in self._hosts), None)
        base = ip_network(self._hosts[host]) if host else ip_network(f"172.16.{number}.0/24")
        size = 24 if host else 30
        first = [base[1], base[2]] if host != a else [base[2], base[1]]
        for end, other, link, address in zip(ends, (b, a), names, first, strict=True):
            add_address(end.ns, link, f"{address}/{size}")
            end.links[other], end.addresses[other] = link, str(address)
        self._subnets[a, b] = str(base if host else ip_interface(f"{base[0]}/{size}").network)

    def _routes(self, box: Box) -> None:
        if box.name in self._hosts:
            (router,) = box.links
            add_route(box.ns, "default", via=self.boxes[router].addresses[box.name])
            return
        towards = self._towards(box)
        for other in self.boxes.values():
            if other.address and other is not box:
                self._route(box, f"{other.address}/32", towards[other.name])
        for (a, b), subnet in self._subnets.items():
            if box.name not in (a, b):
                # Of both ends, the near one.
                end = next(one for one in towards if one in (a, b))
                self._route(box, subnet, towards[end])

    def _route(self, box: Box, to: str, by: str) -> None:
        add_route(box.ns, to, via=self.boxes[by].addresses[box.name])

    def _towards(self, box: Box) -> dict[str, str]:
        """By box, nearest first, the neighbour that leads to it along the fewest links."""
        found = {name: name for name in box.links}
        waiting = deque(found)
        while waiting:
            name = waiting.popleft()
            for other in self.boxes[name].links:
                if other != box.name and other not in found:
                    found[other] = found[name]
                    waiting.append(other)
        return found

    # All at once.

    def everywhere(self, act: Callable[[Box], _Result], boxes: Sequence[Box] = ()) -> list[_Result]:
        """Do something in several boxes (all managers if none are given) at the same time."""
        chosen = boxes or self.managers
        with ThreadPoolExecutor(len(chosen)) as pool:
            return list(pool.map(act, chosen))

    def heal(self) -> None:
        for box in self.boxes.values():
            if not box.address and box.name not in self._hosts:
                box.trouble()

    def end(self) -> None:
        """End what runs in all traffic managers, and remove their policies."""
        self.everywhere(Box.end)


@contextmanager
def mesh(
    folder: Path,
    links: Sequence[tuple[str, str]],
    managers: Mapping[str, str],
    hosts: Mapping[str, str],
    *,
    offloads: bool = False,
) -> Iterator[Mesh]:
    """A mesh, with state folders of its own. Raises `TrafficError`."""
    before = os.environ.get("ITM_STATE_DIR")
    os.environ["ITM_STATE_DIR"] = str(folder / "state")  # each namespace has its own in there
    try:
        with ExitStack() as stack:
            yield Mesh(stack, folder, links, managers, hosts, offloads)
    finally:
        if before is None:
            del os.environ["ITM_STATE_DIR"]
        else:
            os.environ["ITM_STATE_DIR"] = before


# Traffic.


class Stream:
    """Numbered datagrams from one box to another, one each few milliseconds, for a `with` block."""

    PORT = 5600

    def __init__(
        self, sender: Box, receiver: Box, to: str, *, source: str = "", every: float = 0.005
    ) -> None:
        self.every = every * PATIENCE
        self.arrived: list[tuple[float, int]] = []  # when (time.monotonic()), which
        self._stopping = threading.Event()
        with receiver.ns.entered():
            self._in = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._in.bind((to, self.PORT))
        self._in.settimeout(0.1)
        with sender.ns.entered():
            self._out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        if source:
            self._out.bind((source, 0))
        self._out.connect((to, self.PORT))
        self._threads = [threading.Thread(target=one) for one in (self._send, self._receive)]

    def __enter__(self) -> "Stream":
        for one in self._threads:
            one.start()
        self.flowing()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopping.set()
        for one in self._threads:
            one.join()
        self._in.close()
        self._out.close()

    def _send(self) -> None:
        number = 0
        while not self._stopping.wait(self.every):
            with suppress(OSError):  # an ICMP error
                self._out.send(number.to_bytes(8))
            number += 1

    def _receive(self) -> None:
        while not self._stopping.is_set():
            with suppress(TimeoutError):
                data = self._in.recv(64)
                self.arrived.append((time.monotonic(), int.from_bytes(data)))

    def flowing(self, many: int = 5) -> None:
        """Wait until so many more have come."""
        seen = len(self.arrived)
        until(lambda: len(self.arrived) >= seen + many)

    def gap(self, since: float) -> float:
        """The longest time in which none came, since then (to be asked when they come again)."""
        times = [since, *(at for at, _ in list(self.arrived) if at > since)]
        return max((b - a for a, b in pairwise(times)), default=0.0)


class Download:
    """A TCP connection: the far side sends at a modest rate until told to end; nothing is lost."""

    PORT = 5700
    PIECE = bytes(range(256)) * 8

    def __init__(self, client: Box, server: Box, to: str, *, source: str = "") -> None:
        with server.ns.entered():
            self._listener = socket.create_server((to, self.PORT))
        self._listener.settimeout(20 * PATIENCE)
        with client.ns.entered():
            self._link = socket.socket()
        self._link.settimeout(20 * PATIENCE)
        if source:
            self._link.bind((source, 0))
        self._to = to
        self._stopping = threading.Event()
        self.got = 0
        self.wrong: list[str] = []
        self._threads = [threading.Thread(target=one) for one in (self._serve, self._fetch)]

    def __enter__(self) -> "Download":
        for one in self._threads:
            one.start()
        until(lambda: self.got)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopping.set()
        for one in self._threads:
            one.join()
        self._listener.close()
        self._link.close()

    def _serve(self) -> None:
        try:
            end, _ = self._listener.accept()
            end.settimeout(20 * PATIENCE)
            with end:
                while not self._stopping.wait(0.005):
                    end.sendall(self.PIECE)
        except OSError as error:
            self.wrong.append(f"the server: {error}")

    def _fetch(self) -> None:
        try:
            self._link.connect((self._to, self.PORT))
            while data := self._link.recv(1 << 16):
                at = self.got % len(self.PIECE)
                many = -(-(at + len(data)) // len(self.PIECE))
                if data != (self.PIECE * many)[at : at + len(data)]:
                    self.wrong.append("other bytes than were sent")
                self.got += len(data)
        except OSError as error:
            self.wrong.append(f"the client: {error}")

    def goes_on(self) -> None:
        """Wait until some more has come."""
        before = self.got
        until(lambda: self.got >= before + 5 * len(self.PIECE) or self.wrong, 30)
        assert not self.wrong
