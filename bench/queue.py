"""Packets a second through a queue, and one TCP stream, against a program in C and against scapy.

Three namespaces in a row: a sender, a router whose prerouting chain queues everything, and
a sink. UDP comes faster than anybody serves it; what a full queue lets by is dropped right
behind it, so what leaves the router was served. It is counted while the flood lasts.
The contenders take turns in each round, so that a ratio compares what ran side by side:

- `C`: libnetfilter_queue, a packet at a time (`queue.c`). It accepts, whatever the job;
- `scapy`: NetfilterQueue, and scapy for the packet;
- `runtime`: a policy with a handler, loaded by `itmc apply`, with all that stands behind it;
- `run python`: a policy all of which runs in Python;
- `raw` and `library`: bare loops of the runtime's two readers, with the least work for the job;
- `none`: no rules (streams only); `once`: the runtime decides once per connection.

    python -m bench.queue [--rounds 5] [--seconds 1.5] [--only packets|streams] [--jobs accept …]

Needs root, a C compiler and libnetfilter-queue-dev, scapy, and for the picture matplotlib.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import select
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, Final

from bench.wire import HERE, RESULTS, ROUTER, SINK, Line, compiled
from bench.wire import line as bare_line
from itmlang import marks
from itmlang.tunnel import Tunnel
from runtime import netqueue, nft
from runtime.netqueue import NF_ACCEPT, Answer, RawReader, Reader, Serve, Settings
from runtime.nft import NftRefusalError
from runtime.traffic import Namespace, add_xt_queue_rule, set_sysctl

ITMC: Final = str(Path(sys.executable).with_name("itmc"))
FIRST: Final = 7  # queue
PORT: Final = 5001
TOS: Final = 0x10
SIZES: Final = (64, 1400)  # bytes of a packet, with its IP header
QUEUES: Final = (1, 2, 3)
JOBS: Final = {  # who has which job; C accepts in any case
    "accept": ("C", "scapy", "runtime", "raw", "library"),
    "tos": ("C", "scapy", "runtime", "raw", "library"),
    "encapsulate": ("C", "runtime", "run python", "raw", "library"),
}
STREAMS: Final = ("none", "C", "scapy", "runtime", "once", "raw", "library")
_WARM: Final = 0.4  # seconds of a flood before it is counted

# What stands around the queues of all contenders but the runtime, which brings its own.
RULES: Final = """\
table inet bench {{
{queues}
	chain queued {{
		type filter hook prerouting priority -150
		meta l4proto {protocol} {number} jump spread
	}}
	chain behind {{
		type filter hook prerouting priority -149
		{behind}
	}}
}}
"""
COUNTED: Final = """\
table inet counted {
	counter left { }
	chain leaving {
		type filter hook postrouting priority 300
		counter name "left"
	}
}
"""
POLICY: Final = """\
policy bench {{
    at prerouting
    interest {{ protocol {protocol} }}
    classify {{ all }}
    process {{ all {{ {action} }} }}
    {more}
    queues {queues}
}}
"""
HANDLERS: Final = f"""\
import libitm

@libitm.headers_only
def accept(packet):
    pass

def tos(packet):
    packet.ip.tos = {TOS:#x}

def encapsulate(packet):
    libitm.encapsulate(packet, "{ROUTER}", "{SINK}", 1500)
"""
# What the class does, and what else the policy says.
ACTIONS: Final = {
    ("runtime", "accept"): ('call "bench_hands:accept"', ""),
    ("runtime", "tos"): ('call "bench_hands:tos"', ""),
    ("runtime", "encapsulate"): ('call "bench_hands:encapsulate"', ""),
    ("run python", "encapsulate"): (f"encapsulate to {SINK} from {ROUTER}", "run python"),
    ("once", "accept"): ('call "bench_hands:accept" once per connection', ""),
}


# The bare loops, each in a process of its own.


def job(name: str) -> Serve:
    """The least that does a job, on bytes."""
    others = marks.ALL ^ marks.CLASS_BITS
    tunnel = Tunnel(*(int.from_bytes(socket.inet_aton(end)) for end in (ROUTER, SINK)))

    def accept(payload: bytes, mark: int, *_: int) -> Answer:
        return NF_ACCEPT, None, mark & others

    def tos(payload: bytes, mark: int, *_: int) -> Answer:
        new = bytearray(payload)
        (check,) = struct.unpack_from("!H", payload, 10)
        new[1] = TOS
        # RFC 1624, equation 3.
        total = (check ^ 0xFFFF) + (payload[1] ^ 0xFFFF) + TOS
        total = (total & 0xFFFF) + (total >> 16)
        struct.pack_into("!H", new, 10, (total + (total >> 16) & 0xFFFF) ^ 0xFFFF)
        return NF_ACCEPT, new, mark & others

    def encapsulate(payload: bytes, mark: int, *_: int) -> Answer:
        outer = tunnel.encapsulate(payload, 1500, True)
        return NF_ACCEPT, outer if isinstance(outer, bytes) else None, mark & others

    return {"accept": accept, "tos": tos, "encapsulate": encapsulate}[name]


def bare(reader: str, what: str, queue: int) -> None:
    """Serve a queue until the process is ended."""
    if reader == "scapy":
        _scapy(what, queue)
    cut = job("accept")
    # Of packets that are only accepted the raw reader needs no more than their headers.
    settings = Settings(queue, copy=256, segments=False) if what == "accept" else Settings(queue)
    made: Reader
    if reader == "raw":
        made = RawReader(settings, job(what), lambda mark: cut(b"", mark, 0, 0, 0, 0))
    else:
        from runtime.queue import LibraryReader

        made = LibraryReader(Settings(queue), job(what), lambda mark: cut(b"", mark, 0, 0, 0, 0))
    poll = select.poll()
    poll.register(made, select.POLLIN)
    while True:
        poll.poll()
        made.read()


def _scapy(what: str, queue: int) -> None:
    """As programs on the web do it: every packet becomes a tree of layers."""
    from netfilterqueue import NetfilterQueue, Packet
    from scapy.layers.inet import IP

    def handle(packet: Packet) -> None:
        layers = IP(packet.get_payload())
        if what == "tos":
            layers.tos = TOS
            del layers.chksum
            packet.set_payload(bytes(layers))
        packet.set_mark(packet.mark & (marks.ALL ^ marks.CLASS_BITS))
        packet.accept()

    made, settings = NetfilterQueue(), Settings(queue)
    made.bind(queue, handle, settings.length, sock_len=settings.buffer)
    with socket.socket(fileno=os.dup(made.get_fd())) as own:
        own.send(netqueue.config(queue, *netqueue.open_to_all(settings)))
    made.run()


# The network.


@contextmanager
def line(*, offloads: bool) -> Iterator[Line]:
    """With `offloads`, packets on the links are as large as the stack likes to make them."""
    with bare_line(offloads=offloads, silent=not offloads) as made:
        # What is put into a tunnel at prerouting comes from an address of the router's own.
        set_sysctl(made.router, "net/ipv4/conf/eth0/accept_local", "1")
        with made.router.entered():
            nft.load(COUNTED)
        yield made


# Who serves.


@contextmanager
def contender(
    name: str, what: str, protocol: str, queues: int, router: Namespace, folder: Path
) -> Iterator[None]:
    """The router with rules and with somebody who serves its queues, ready."""
    if name == "none":
        yield
        return
    serving = runtime if (name, what) in ACTIONS else programs
    with serving(name, what, protocol, queues, router, folder):
        yield


@contextmanager
def programs(
    name: str, what: str, protocol: str, queues: int, router: Namespace, folder: Path
) -> Iterator[None]:
    """A process for each queue, behind the bench's own rules."""
    numbers = range(FIRST, FIRST + queues)
    rules(protocol, numbers, router)
    with router.entered(), ExitStack() as stack:
        stack.callback(nft.load, "delete table inet bench\n")
        for number in numbers:
            command = [sys.executable, "-m", "bench.queue", "--serve", name, what, str(number)]
            process = subprocess.Popen(
                [str(folder / "queue"), str(number)] if name == "C" else command, cwd=HERE.parent
            )
            stack.callback(process.wait)
            stack.callback(process.terminate)
        _wait_for(queues)
        yield


@contextmanager
def runtime(
    name: str, what: str, protocol: str, queues: int, router: Namespace, folder: Path
) -> Iterator[None]:
    """A policy that is applied, with the runtime that `itmc apply` starts."""
    action, more = ACTIONS[name, what]
    more += "\n    fail closed" if protocol == "udp" else ""
    (folder / "bench_hands.py").write_text(HANDLERS)
    file = folder / "bench.itm"
    file.write_text(POLICY.format(action=action, more=more, protocol=protocol, queues=queues))
    environment = {**os.environ, "ITM_STATE_DIR": str(folder / "state")}

    def itmc(*words: str) -> str:
        return subprocess.run(
            [ITMC, *words], env=environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    with router.entered():
        itmc("apply", str(file))
        try:
            _wait_for(queues)
            yield
            time.sleep(0.6)  # workers tell twice a second
            (status,) = json.loads(itmc("status", "--json"))["policies"]
            python = status["python"]
            if not python["handled"] or python["failed"] or python["refused"]:
                raise SystemExit(f"the runtime failed: {python}")
        finally:
            itmc("remove", "--all")


def rules(protocol: str, numbers: Sequence[int], router: Namespace) -> None:
    """Flows are spread over the queues; what comes back with class bits was not served."""
    bits = f"{marks.CLASS_BITS:#010x}"
    key = "ip saddr . ip daddr . udp sport . udp dport"
    cases = ", ".join(f"{n} : jump queue_{number}" for n, number in enumerate(numbers))
    spread = f"jhash {key} mod {len(numbers)} vmap {{ {cases} }}"
    chains = [f"\tchain queue_{number} {{\n\t}}" for number in numbers]
    chains.append(
        "\tchain spread {\n\t\t"
        + (spread if len(numbers) > 1 else f"jump queue_{numbers[0]}")
        + "\n\t}"
    )
    # A stream would stop if what passed unserved were lost.
    behind = f"meta mark & {bits} != 0 " + ("drop" if protocol == "udp" else "meta mark set 0")
    with router.entered():
        nft.load(
            RULES.format(
                queues="\n".join(chains),
                protocol=protocol,
                number=marks.with_class(1),
                behind=behind,
            )
        )
        for number in numbers:
            try:
                nft.load(f"add rule inet bench queue_{number} queue flags bypass to {number}\n")
            except NftRefusalError:
                add_xt_queue_rule(router, "bench", f"queue_{number}", number)


def _wait_for(queues: int) -> None:
    """Until so many queues of this namespace have a reader."""
    end = time.monotonic() + 20
    while len(netqueue.table()) < queues:
        if time.monotonic() > end:
            raise SystemExit("nobody serves the queues")
        time.sleep(0.02)
    time.sleep(0.1)


# What is measured.


@dataclass(frozen=True)
class Flood:
    """Thousand packets a second that left the router and that were sent; and how long the
    processes that serve the queues had a processor for each that left, in µs."""

    kpps: float
    sent: float
    processor: float


def flood(folder: Path, wire: Line, size: int, seconds: float, many: int) -> Flood:
    """By so many senders."""

    def now() -> tuple[int, float, float]:
        with wire.router.entered():
            # A netlink port is the number of its process, if that has no other one.
            ports = [row[1] for row in netqueue.table()]
            left = nft.counters("inet counted")["left"][0]
            return left, time.monotonic(), sum(map(_processor, ports))

    command = [str(folder / "sender"), SINK, str(size), str(_WARM + seconds + 0.2)]
    with wire.sender.entered():
        senders = [
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(many)
        ]
    time.sleep(_WARM)
    begin, began, before = now()
    time.sleep(seconds)
    end, ended, after = now()
    sent = 0.0
    for sender in senders:
        number, took = map(float, sender.communicate()[0].split())
        sent += number / took / 1e3
    left = max(1, end - begin)
    return Flood(left / (ended - began) / 1e3, sent, (after - before) / left * 1e6)


def _processor(process: int) -> float:
    """Seconds that a process ran."""
    with suppress(OSError):
        return int(Path(f"/proc/{process}/schedstat").read_text().split()[0]) / 1e9
    return math.nan


def stream(wire: Line, seconds: float) -> float:
    """Gbit/s of one TCP stream."""
    fork = multiprocessing.get_context("fork")
    receiving, sending = fork.Pipe(duplex=False)
    with wire.sink.entered():
        server = socket.create_server((SINK, PORT))
        sink = fork.Process(target=_receive, args=(server, sending))
        sink.start()
    with wire.sender.entered():
        client = socket.create_connection((SINK, PORT), timeout=5)
    with server, client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
        client.settimeout(5)
        data, end = bytes(1 << 20), time.monotonic() + seconds
        while time.monotonic() < end:
            client.send(data)
        client.shutdown(socket.SHUT_WR)
        if not receiving.poll(30):
            sink.terminate()
            raise SystemExit("the stream does not end")
        size, took = receiving.recv()
    sink.join()
    return float(size) * 8 / took / 1e9


def _receive(server: socket.socket, result: Connection) -> None:
    connection, _ = server.accept()
    buffer, size, begin = bytearray(1 << 20), 0, time.monotonic()
    while some := connection.recv_into(buffer):
        size += some
    result.send((size, time.monotonic() - begin))


Key = tuple[str, int, int, str]  # job, size, queues, contender


def packets(
    folder: Path,
    jobs: Sequence[str],
    sizes: Sequence[int],
    queues: Sequence[int],
    rounds: int,
    seconds: float,
) -> dict[Key, list[Flood]]:
    found: dict[Key, list[Flood]] = {}
    with line(offloads=False) as wire:
        for _ in range(rounds):
            for what, size, many in product(jobs, sizes, queues):
                for name in JOBS[what]:
                    with contender(name, what, "udp", many, wire.router, folder):
                        # One sender would be slower than two workers.
                        run = flood(folder, wire, size, seconds, min(many, 2))
                    found.setdefault((what, size, many, name), []).append(run)
                    print(f"{what:12}{size:6}{many:3}  {name:14}{run.kpps:8.1f} of {run.sent:.1f}", flush=True)  # fmt: skip
    return found


def streams(folder: Path, rounds: int, seconds: float) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    with line(offloads=True) as wire:
        for _ in range(rounds):
            for name in STREAMS:
                with contender(name, "accept", "tcp", 1, wire.router, folder):
                    found.setdefault(name, []).append(stream(wire, seconds))
                print(f"stream  {name:14}{found[name][-1]:8.2f}", flush=True)
    return found


# What is told.


def ratio(of: Sequence[float], to: Sequence[float] | None) -> float | None:
    """The median of the rounds' ratios."""
    return round(median(a / b for a, b in zip(of, to, strict=True)), 3) if to and all(to) else None


def told_packets(found: Mapping[Key, Sequence[Flood]]) -> list[dict[str, Any]]:
    """A row for each measurement: medians, and ratios to C and scapy of the same round."""
    served = {key: [run.kpps for run in runs] for key, runs in found.items()}
    busy = {key: [run.processor for run in runs] for key, runs in found.items()}
    return [
        {
            "job": what, "bytes": size, "queues": queues, "contender": name,
            "kpps": round(median(kpps), 1), "rounds": [round(one, 1) for one in kpps],
            "sent_kpps": round(median(run.sent for run in found[what, size, queues, name]), 1),
            "to_C": ratio(kpps, served[what, size, queues, "C"]),
            "to_scapy": ratio(kpps, served.get((what, size, queues, "scapy"))),
            "processor_us": round(median(busy[what, size, queues, name]), 2),
            "C_processor": ratio(busy[what, size, queues, "C"], busy[what, size, queues, name]),
            "to_one_queue": ratio(kpps, served.get((what, size, 1, name))),
        }
        for (what, size, queues, name), kpps in served.items()
    ]  # fmt: skip


def told_streams(found: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    return [
        {
            "contender": name, "gbits": round(median(runs), 2),
            "rounds": [round(one, 2) for one in runs],
            "to_none": ratio(runs, found["none"]), "to_C": ratio(runs, found["C"]),
            "to_scapy": ratio(runs, found["scapy"]),
        }
        for name, runs in found.items()
    ]  # fmt: skip


def markdown(results: Mapping[str, Any]) -> str:
    lines = [
        "# Packets through queues",
        "",
        f"Linux {results['machine']['kernel']}, {results['machine']['cpus']} processors, Python "
        f"{results['machine']['python']}; medians of {results['rounds']} rounds, and of the rounds' ratios. "
        "`processor_us` is what the serving processes ran for a packet, `C_processor` how C's compares.",
    ]
    for title, rows in (("Thousand packets a second", "packets"), ("One TCP stream", "streams")):
        if table := results[rows]:
            columns = [name for name in table[0] if name != "rounds"]
            lines += ["", f"## {title}", "", f"| {' | '.join(columns)} |"]
            lines.append("|" + " --- |" * len(columns))
            lines += [
                "| " + " | ".join("" if row[c] is None else str(row[c]) for c in columns) + " |"
                for row in table
            ]
    return "\n".join(lines) + "\n"


def draw(results: Mapping[str, Any], file: Path) -> None:
    """A bar for each contender, by job, of one queue and 64 bytes."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    chosen = [row for row in results["packets"] if (row["bytes"], row["queues"]) == (64, 1)]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots(1, len({row["job"] for row in chosen}) or 1, sharey=True, squeeze=False)
    for plot, what in zip(axes[0], dict.fromkeys(row["job"] for row in chosen), strict=False):
        rows = [row for row in chosen if row["job"] == what]
        plot.bar([row["contender"] for row in rows], [row["kpps"] for row in rows])
        plot.set_title(what)
        plot.tick_params(axis="x", rotation=45)
    axes[0][0].set_ylabel("thousand packets a second")
    figure.suptitle("64 bytes, one queue")
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="packets through queues, in ratios")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement")
    parser.add_argument("--only", choices=("packets", "streams"))
    parser.add_argument("--jobs", nargs="+", choices=tuple(JOBS), default=tuple(JOBS))
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="bytes of a packet")
    parser.add_argument("--queues", nargs="+", type=int, default=QUEUES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    measures: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
        "packets": lambda folder: told_packets(
            packets(
                folder,
                options.jobs,
                options.sizes,
                options.queues,
                options.rounds,
                options.seconds,
            )
        ),
        "streams": lambda folder: told_streams(streams(folder, options.rounds, options.seconds)),
    }
    results: dict[str, Any] = {
        "machine": {"kernel": platform.release(), "cpus": os.cpu_count(), "python": platform.python_version()},
        "rounds": options.rounds,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        compiled("queue", Path(place), "-lnetfilter_queue")
        compiled("sender", Path(place))
        for name, measure in measures.items():
            results[name] = measure(Path(place)) if options.only in (None, name) else []
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "queue.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "queue.md").write_text(markdown(results))
    draw(results, options.out / "queue.png")
    print(markdown(results))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        bare(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
