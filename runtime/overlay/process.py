"""The process of one overlay: sockets and a clock around the engine, and the map of its choices.

Probes to the far traffic managers go out by one UDP socket, or, by way of a neighbour, as IPv4 in
IPv4 made from scratch, as RFC 2003 has it, through a raw socket (paper section 7.1.2); the tunnels'
other ends open them as they do all packets. What is chosen is written into maps that lead from
networks to the rules of a neighbour. Their elements end by themselves after the time in which
a dead path is noticed, unless they are renewed: when this process is gone, packets go directly.
Only where the direct path is out they last, as then nothing better is known.
"""

import errno
import json
import logging
import logging.handlers
import math
import secrets
import selectors
import signal
import socket
import struct
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from typing import Final

from itmlang import marks, values
from itmlang.nft.model import duration
from itmlang.overlays import DIRECT, STAY_BITS, counted, ends
from itmlang.packet import internet_checksum, transport_checksum
from itmlang.tunnel import Tunnel
from runtime import decisions, netlink, nft, store
from runtime.decisions import log_file
from runtime.errors import MachineError
from runtime.jobs import OverlayJob
from runtime.nft import NftRefusalError
from runtime.overlay import keys
from runtime.overlay.engine import Effect, Engine, Forgotten, Learned, Move, Send
from runtime.overlay.paths import OUT
from runtime.store import directory, unchanged
from runtime.worker import TICK, die_with_parent, hear, say

Network = tuple[int, int]  # address, prefix length

_UDP: Final = 17
_SO_MARK: Final = 36
_LARGEST: Final = 65_535
_AT_ONCE: Final = 256  # datagrams that are read before anything else is done
_PATIENCE: Final = 10.0  # seconds between two lines about the same trouble
_AGAIN: Final = 0.05  # seconds until a choice is written that could not be
_POLITE: Final = 0.15  # seconds that others' change of policies is waited for
_LEAST_LIFE: Final = 0.8  # seconds that an element lives at least


def work(job: OverlayJob, link: socket.socket) -> None:
    """Probe and choose until the parent says "stop" or is gone."""
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        key = keys.read(job.unit, job.overlay)
        wire = _Wire(job.overlay.address, job.overlay.port)
    except keys.KeyFileError as error:
        say(link, {"error": error.message})
        return
    except OSError as error:
        address = _text(job.overlay.address)
        why = error.strerror
        if error.errno == errno.EADDRINUSE:
            why = f"its UDP port {job.overlay.port} is taken (`port` is for another one)"
        say(link, {"error": f"no probes can be sent from {address}: {why}"})
        return
    _Process(job, key, wire, link).run()


class _Wire:
    """The sockets: datagrams to members, directly and in tunnels. Raises `OSError`."""

    def __init__(self, address: int, port: int) -> None:
        self._address, self._port = address, port
        self.plain = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._raw = socket.socket(
            socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_RAW
        )
        for one in (self.plain, self._raw):
            # No overlay is to send these another way.
            one.setsockopt(socket.SOL_SOCKET, _SO_MARK, struct.pack("=I", marks.PROBE))
        self.plain.bind((_text(address), port))

    def send(self, one: Send) -> None:
        """Send a datagram. Raises `OSError`."""
        if one.via == DIRECT:
            self.plain.sendto(one.data, (_text(one.to), self._port))
            return
        inner = _datagram(self._address, one.to, self._port, one.data)
        outer = Tunnel(self._address, one.via).encapsulate(inner, _LARGEST, forwarded=False)
        if isinstance(outer, bytes):
            self._raw.sendto(outer, (_text(one.via), 0))

    def read(self) -> Iterable[tuple[bytes, int]]:
        """The datagrams that are there, with their source addresses; only members use the port."""
        for _ in range(_AT_ONCE):
            try:
                data, (source, _) = self.plain.recvfrom(_LARGEST)
            except OSError:  # none, or an ICMP error about one of ours
                return
            yield data, int.from_bytes(socket.inet_aton(source))


def _datagram(source: int, destination: int, port: int, data: bytes) -> bytes:
    """An IPv4 packet with a UDP datagram, from the port to the same (RFC 791, RFC 768)."""
    ends = source.to_bytes(4) + destination.to_bytes(4)
    udp = struct.pack("!HHHH", port, port, 8 + len(data), 0) + data
    udp = udp[:6] + struct.pack("!H", transport_checksum(_UDP, ends, udp)) + udp[8:]
    head = bytearray(
        struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0x4000, 64, _UDP, 0) + ends
    )
    struct.pack_into("!H", head, 10, internet_checksum(head))
    return bytes(head) + udp


class _Process:
    def __init__(self, job: OverlayJob, key: bytes, wire: _Wire, link: socket.socket) -> None:
        self._job, self._overlay, self._wire, self._link = job, job.overlay, wire, link
        self._names = {n.address: n.name for n in self._overlay.neighbors}
        self._stopping = self._going = self._leaving = False
        self._file = decisions.choice_file(directory(), self._overlay.name)
        self._chosen = self._remembered()
        self._engine = Engine(
            self._overlay, key, time.time_ns() // 1000, secrets.randbits(32), chosen=self._chosen
        )
        self._prefixes: dict[int, list[Network]] = {}
        for one in self._overlay.destinations:
            self._prefixes.setdefault(one.egress, []).extend(one.prefixes)
        detected = (self._overlay.every * self._overlay.lost[0] + self._overlay.timeout) / 1000
        self._life = max(_LEAST_LIFE, detected)
        self._written: dict[tuple[int, int], int] | None = None  # what the maps hold
        self._renew = 0.0
        self._waiting: float | None = None  # since when others change policies
        self._learned: dict[int, list[Network]] = {}
        self._dead: set[tuple[int, int]] = set()  # paths that do not work: egress, neighbour
        self._looked = 0.0
        self._told: dict[str, float] = {}
        self._log = logging.getLogger(f"itm.overlay.{self._overlay.name}")
        self._log.propagate = False
        self._log.setLevel(logging.INFO)
        self._log.handlers = [
            logging.handlers.RotatingFileHandler(
                log_file(directory(), self._overlay.name),
                maxBytes=decisions.LARGEST, backupCount=1, delay=True,
            )
        ]  # fmt: skip
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._link, selectors.EVENT_READ, self._listen)
            selector.register(self._wire.plain, selectors.EVENT_READ, self._receive)
            say(self._link, {"ready": True})
            due = 0.0
            while not self._stopping:
                now = time.monotonic()
                if now >= due:
                    say(self._link, {"counts": {}, "state": self._engine.status(now)})
                    due = now + TICK
                wait = due
                if self._going:
                    if now >= self._engine.due:
                        self._do(self._engine.tick(now))
                    if now >= self._looked:
                        self._looked = now + self._overlay.every / 1000
                        self._look(now)
                    self._write(now)
                    wait = min(due, self._engine.due, self._renew, self._looked)
                for key, _ in selector.select(max(0.0, wait - time.monotonic())):
                    key.data()
            waiting = [key.data for key, _ in selector.select(0)]
            if self._listen in waiting:  # the command may have come with the signal
                self._listen()
        if self._going and self._leaving:  # nobody renews them from now on, so all are to end
            self._renew, self._waiting = 0.0, -math.inf
            self._write(time.monotonic())

    def _receive(self) -> None:
        for data, source in self._wire.read():
            self._do(self._engine.received(time.monotonic(), data, source))

    def _listen(self) -> None:
        message = hear(self._link)
        if message is None or message.get("command") == "stop":
            self._stopping, self._leaving = True, message is not None
        elif message.get("command") == "go":
            self._going = True
        elif message.get("command") == "reload":
            say(self._link, {"restarting": True})
            self._stopping = True

    # What the engine wants.

    def _do(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send():
                    self._send(effect)
                case Move():
                    self._chosen = {**self._chosen, effect.egress: effect.via}
                    self._renew = 0.0
                    self._remember()
                    self._tell(effect)
                case Learned():
                    self._chosen = {**self._chosen, effect.egress: effect.via}
                    known = self._learned.setdefault(effect.egress, [])
                    known += [one for one in effect.prefixes if one not in known]
                    self._renew = 0.0
                case Forgotten():
                    known = self._learned.get(effect.egress, [])
                    known[:] = [one for one in known if one not in effect.prefixes]
                    self._renew = 0.0
                case _:
                    raise TypeError(f"unknown effect: {effect!r}")

    def _send(self, one: Send) -> None:
        try:
            self._wire.send(one)
        except OSError as error:  # it is lost, as one that was sent may be
            to = _text(one.via or one.to)
            self._trouble(f"a probe cannot be sent to {to}: {error.strerror}")

    def _trouble(self, text: str) -> None:
        now = time.monotonic()
        if now - self._told.get(text, -_PATIENCE) >= _PATIENCE:
            self._told = {one: at for one, at in self._told.items() if now - at < _PATIENCE}
            self._told[text] = now
            say(self._link, {"log": text})

    # What the kernel counted.

    def _look(self, now: float) -> None:
        """Do packets come back from where some go? And which connections must leave their path?"""
        counts: dict[str, int] = {}
        for table in self._job.tables:
            with suppress(OSError):
                for name, packets, _ in netlink.counters(table):
                    plain = name.rpartition(".")[2]
                    counts[plain] = counts.get(plain, 0) + packets
        seen = {
            one: (counts.get(counted("sent", one), 0), counts.get(counted("back", one), 0))
            for one in self._overlay.egresses
        }
        self._do(self._engine.progress(now, seen))
        shifts = {site.shift for site in self._job.sites if site.role == "stay"}
        if not shifts:
            return
        addresses = {name: address for address, name in self._names.items()}
        dead = {
            (_number(egress["egress"]), addresses[path["name"]])
            for egress in self._engine.status(now)["egresses"]
            for path in egress["candidates"]
            if path["name"] in addresses and path["state"] not in ("working", "unknown")
        }
        if dead - self._dead:
            for shift in sorted(shifts):
                with suppress(OSError):
                    netlink.clear_marks(STAY_BITS << shift)
        self._dead = dead

    # What is chosen, in the kernel.

    def _write(self, now: float) -> None:
        """Have the maps say what is chosen, and go on saying it."""
        networks = {
            egress: (*self._prefixes.get(egress, ()), *self._learned.get(egress, ()))
            for egress in self._chosen
        }
        wanted = {
            network: via
            for egress, via in sorted(self._chosen.items())
            for network in networks[egress]
            if via in self._names
        }
        found = {network for learned in self._learned.values() for network in learned}
        lasting = {
            network
            for one in self._engine.status(now)["egresses"]
            if not self._leaving
            and any(p["via"] is None and p["state"] == OUT for p in one["candidates"])
            for network in networks.get(_number(one["egress"]), ())
        }
        holds = wanted or found or self._overlay.sticky
        if not holds and wanted == self._written:
            self._renew = math.inf  # nothing ends by itself
        if now < self._renew:
            return
        if self._lead(wanted, found, lasting):
            self._written = wanted
            self._renew = now + self._life / 4
        else:
            self._renew = now + _AGAIN

    def _lead(
        self,
        wanted: Mapping[Network, int],
        found: Collection[Network],
        lasting: Collection[Network],
    ) -> bool:
        """Write all maps and sets; False if somebody changes policies just now."""
        alive = f"timeout {duration(int(1000 * self._life))}"
        shown = {
            one: _shown(one) if one in lasting else f"{_shown(one)} {alive}"
            for one in (*wanted, *found)
        }
        works = [
            one for one in self._names if any((e, one) not in self._dead for e in self._chosen)
        ]
        lines = []
        for site in self._job.sites:
            to = f"goto {site.prefix}via_"
            match site.role:
                case "route":
                    entries = [
                        f"{shown[network]} : {to}{self._names[via]}"
                        for network, via in sorted(wanted.items())
                    ]
                case "stay":
                    entries = [
                        f"{number << site.shift:#010x} {alive} : {to}{name}"
                        for number, (address, name) in enumerate(self._names.items(), 1)
                        if address in works
                    ]
                case _:
                    entries = [shown[network] for network in sorted(found)]
            kind = "set" if site.role == "networks" else "map"
            lines.append(f"flush {kind} {site.table} {site.name}")
            if entries:
                lines.append(f"add element {site.table} {site.name} {{ {', '.join(entries)} }}")
        if not lines:
            return True
        with unchanged() as free:
            # Whoever changes policies may be at it for long, as long as handlers are imported.
            # Meanwhile elements would end, and paths die: only a moment is waited.
            now = time.monotonic()
            self._waiting = None if free else self._waiting or now
            if self._waiting is not None and now - self._waiting < _POLITE:
                return False
            try:
                nft.load("".join(f"{line}\n" for line in lines))
            except (MachineError, NftRefusalError) as error:
                told = error.message if isinstance(error, MachineError) else str(error)
                if not self._leaving:  # else the policy may have been removed
                    self._trouble(f"the choice of paths cannot be written: {told}")
                return False
        return True

    # What was chosen, on disk.

    def _tell(self, move: Move) -> None:
        """A line in the log of decisions."""
        line = {
            "time": round(time.time(), 3), "written": _text(move.egress),
            "value": self._way(move.via), "before": self._way(move.prior), "reason": move.reason,
        }  # fmt: skip
        self._log.info("%s", json.dumps(line))

    def _way(self, via: int) -> str:
        return "direct" if via == DIRECT else f"via {self._names.get(via, _text(via))}"

    def _remember(self) -> None:
        """For who comes after us: a path that works is not left because we were ended."""
        data = {_text(egress): _text(via) for egress, via in sorted(self._chosen.items())}
        with suppress(OSError, MachineError):
            store.write(self._file, json.dumps(data).encode())

    def _remembered(self) -> dict[int, int]:
        found = None
        with suppress(MachineError):
            found = store.read(self._file)
        known: dict[int, int] = {}
        for egress, via in (found or {}).items():
            with suppress(OSError, TypeError):
                known[_number(egress)] = _number(via)
        ways = {DIRECT, *self._names}
        return {e: v for e, v in known.items() if v in ways and e in self._overlay.egresses}


def _shown(network: Network) -> str:
    return values.prefix_text(values.IPV4, *ends(network))


def _text(address: int) -> str:
    return socket.inet_ntoa(address.to_bytes(4))


def _number(address: str) -> int:
    return int.from_bytes(socket.inet_aton(address))
