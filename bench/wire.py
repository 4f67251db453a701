"""What benches share: sender - router - sink in namespaces, packets, spreads, results.

Packets are measured without a queue anywhere: `packets.c` hands each to the sender's link,
and the kernel takes it through router and sink before the call returns, on the sender's
processor. So the sender's processor time is the packets' own, whoever else uses the machine,
and no packet is lost because something was not fast enough.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from runtime import nft
from runtime.traffic import MAC, Namespace, add_address, add_route, set_sysctl, veth

HERE: Final = Path(__file__).parent
RESULTS: Final = HERE / "results"
SINK, ROUTER = "10.0.2.1", "10.0.2.254"
SOURCE, SOURCE6 = "10.0.1.1", "fd00:1::1"
BEHIND, BEHIND6 = "10.128.0.0/9", "fd80::/16"  # what is routed to the sink
SLOT: Final = 80  # bytes, of packets.c
_ETHER: Final = bytes.fromhex(MAC.replace(":", "")) * 2
SILENT: Final = """\
table inet silent {
	counter arrived { }
	chain arriving {
		type filter hook prerouting priority -500
		counter name "arrived" drop
	}
}
"""


# The network.


@dataclass(frozen=True)
class Line:
    """sender - router - sink."""

    sender: Namespace
    router: Namespace
    sink: Namespace

    def load(self, ruleset: str) -> None:
        """Give the router a ruleset, as `nft -f` does: not everybody's is read in memory."""
        with self.router.entered():
            done = subprocess.run(
                ["nft", "-f", "-"], input=ruleset, capture_output=True, text=True, check=False
            )
        if done.returncode:
            raise SystemExit(f"nft refuses a ruleset: {done.stderr[:500]}")

    def arrived(self) -> int:
        """Packets that a silent sink has got so far."""
        with self.sink.entered():
            return nft.counters("inet silent")["arrived"][0]


@contextmanager
def line(*, offloads: bool = False, silent: bool = True) -> Iterator[Line]:
    """With `offloads`, packets on the links are as large as the stack likes to make them.

    A `silent` sink counts and drops all that comes.
    """
    with ExitStack() as stack:
        made = Line(
            *(
                stack.enter_context(closing(Namespace.create(name)))
                for name in ("sender", "router", "sink")
            )
        )
        veth(made.sender, "eth0", made.router, "eth0", offloads=offloads)
        veth(made.router, "eth1", made.sink, "eth0", offloads=offloads)
        set_sysctl(made.router, "net/ipv4/ip_forward", "1")
        set_sysctl(made.router, "net/ipv6/conf/all/forwarding", "1")
        for host, link, addresses in (
            (made.sender, "eth0", ("10.0.1.1/24", "fd00:1::1/64")),
            (made.router, "eth0", ("10.0.1.254/24", "fd00:1::fe/64")),
            (made.router, "eth1", (f"{ROUTER}/24", "fd00:2::fe/64")),
            (made.sink, "eth0", (f"{SINK}/24", "fd00:2::1/64")),
        ):
            for address in addresses:
                add_address(host, link, address)
        add_route(made.sender, "default", via="10.0.1.254")
        add_route(made.sink, "default", via=ROUTER)
        add_route(made.router, BEHIND, via=SINK)
        add_route(made.router, BEHIND6, via="fd00:2::1")
        if silent:
            with made.sink.entered():
                nft.load(SILENT)
        yield made


# Packets.


@dataclass(frozen=True)
class Packet:
    """A packet of 54 bytes (IPv6: 74), without data, from the sender's address."""

    to: str
    protocol: str = "udp"
    sport: int = 1024
    dport: int = 53
    flags: int = 0x02  # TCP: SYN
    tos: int = 0

    def frame(self) -> bytes:
        """As it is on the wire, with the checksums that connection tracking looks at."""
        tcp, six = self.protocol == "tcp", ":" in self.to
        number = socket.IPPROTO_TCP if tcp else socket.IPPROTO_UDP
        rest = struct.pack("!IIBBHHH", 1, 0, 0x50, self.flags, 65_535, 0, 0) if tcp else b"\0\x14"
        load = (struct.pack("!HH", self.sport, self.dport) + rest).ljust(20, b"\0")
        family, source = (socket.AF_INET6, SOURCE6) if six else (socket.AF_INET, SOURCE)
        ends = socket.inet_pton(family, source) + socket.inet_pton(family, self.to)
        if tcp or six:  # UDP may leave it out over IPv4
            check, at = (
                checksum(ends + struct.pack("!HH", len(load), number) + load),
                16 if tcp else 6,
            )
            load = load[:at] + check.to_bytes(2, "big") + load[at + 2 :]
        if six:
            head = struct.pack("!IHBB", 6 << 28 | self.tos << 20, len(load), number, 64)
            return _ETHER + b"\x86\xdd" + head + ends + load
        head = struct.pack("!BBHHHBB", 0x45, self.tos, 20 + len(load), 0, 0x4000, 64, number)
        return _ETHER + b"\x08\0" + head + checksum(head + ends).to_bytes(2, "big") + ends + load


def checksum(data: bytes) -> int:
    """Of the internet's headers (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


class Stream:
    """Packets that are sent along a line again and again, in their order."""

    def __init__(self, line: Line, program: Path, file: Path, processor: int) -> None:
        self.line = line
        self.many = file.stat().st_size // SLOT
        self.sent = 0
        with line.sender.entered():
            self._process = subprocess.Popen(
                [program, "eth0", file, str(processor)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )

    def send(self, count: int, first: int = 0) -> float:
        """Seconds of the processor for `count` packets, `first` others sent before them."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{first} {count}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().split()
        if len(answer) != 2:
            raise SystemExit("the sender failed")
        self.sent += first + count
        return float(answer[1])

    def pace(self, seconds: float) -> int:
        """About how many packets go in a time of the processor; at least one round is tried."""
        count, took = 64, self.send(64)
        while took < seconds / 4:
            count *= 2
            took = self.send(count)
        return max(64, round(count * seconds / took))

    def times(self, number: int) -> int:
        """How often the packet of this number has been sent."""
        return self.sent // self.many + (number < self.sent % self.many)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def stored(packets: Iterable[Packet], file: Path) -> Path:
    """The file of packets that a stream reads."""
    with file.open("wb") as out:
        for packet in packets:
            frame = packet.frame()
            out.write((struct.pack("=H", len(frame)) + frame).ljust(SLOT, b"\0"))
    return file


def compiled(name: str, folder: Path, *libraries: str) -> Path:
    """A program in C of this folder."""
    program = folder / name
    command = ["cc", "-O2", "-o", str(program), str(HERE / f"{name}.c"), *libraries]
    try:
        done = subprocess.run(command, check=False).returncode == 0
    except FileNotFoundError:
        done = False
    if not done:
        needs = ["gcc", "libc6-dev", *(f"lib{one.removeprefix('-l')}-dev" for one in libraries)]
        raise SystemExit(
            f"{name}.c does not compile: it needs {', '.join(needs)}".replace("_", "-")
        )
    return program


def processor() -> int:
    """The last one of those that this process may use; the first ones serve the machine."""
    return max(os.sched_getaffinity(0))


# Results.


@dataclass(frozen=True)
class Spread:
    """Least, median and greatest of some values."""

    least: float
    median: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float], digits: int = 3) -> Self:
        found = (min(values), statistics.median(values), max(values))
        return cls(*(round(value, digits) for value in found))

    def told(self) -> list[float]:
        return [self.least, self.median, self.greatest]

    def __str__(self) -> str:
        return f"{self.median:g} ({self.least:g} to {self.greatest:g})"


def machine() -> dict[str, Any]:
    return {
        "kernel": platform.release(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
    }


def kept(
    name: str,
    results: Mapping[str, Any],
    text: str,
    draw: Callable[[Any], None] | None,
    folder: Path | None,
) -> None:
    """Print what is to be read; into the folder goes that, the numbers (JSON) and a picture."""
    print(text, end="", flush=True)
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / f"{name}.md").write_text(text)
    if draw is None:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: it needs matplotlib", file=sys.stderr)
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    draw(figure.subplots())
    figure.savefig(folder / f"{name}.png", dpi=120)


def described(machine: Mapping[str, Any]) -> str:
    return (
        f"Linux {machine['kernel']}, {machine['processors']} processors, Python {machine['python']}"
    )


def options(parser: argparse.ArgumentParser, quick: str) -> None:
    """Those of every bench. With --quick results are only printed, unless --out says where to."""
    parser.add_argument("--quick", action="store_true", help=f"in seconds: {quick}")
    parser.add_argument("--out", type=Path, help="folder of the results (bench/results)")


def folder(given: argparse.Namespace) -> Path | None:
    """Where results go."""
    out: Path | None = given.out
    return out or (None if given.quick else RESULTS)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a table in Markdown."""
    cells = ["" if cell is None else str(cell) for row in rows for cell in row]
    lines = [columns, ["---"] * len(columns)]
    lines += [cells[at : at + len(columns)] for at in range(0, len(cells), len(columns))]
    return [f"| {' | '.join(one)} |" for one in lines]
