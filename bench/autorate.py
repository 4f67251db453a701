"""A link whose true rate moves: what `autorate` makes of it, second by second.

Four namespaces in a row: senders, the traffic manager with a `link` under `autorate`, a next
box whose queue (TBF, 300 KB) is the true bottleneck, receivers. Streams of TCP keep it
busy. The true rate halves, and comes back. What is reported is looked up at the bottleneck
itself: its queue, as the time it takes to drain, and what it carried.

    python -m bench.autorate [--rounds 5] [--rate 20] [--streams 4] [--congestion cubic]

Needs root. Bars: 1 s after the true rate has halved, the queue stays under 30 ms (90th
percentile of a look every 20 ms), and 90 % of the true rate is used.
"""

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Final

from runtime import qdisc
from runtime.traffic import Namespace, add_address, add_route, set_sysctl, veth

RESULTS: Final = Path(__file__).parent / "results"
SETTLED, HALVED, BACK = 10.0, 10.0, 15.0  # seconds of each phase
LOOK: Final = 0.02  # seconds between two looks at the bottleneck
LIMIT: Final = 300_000  # bytes that wait there at most
BAR_DELAY, BAR_USE, BAR_WITHIN = 30.0, 0.9, 1.0  # ms, share, seconds
POLICY: Final = """\
link wan {{
    interface "eth1"
    rate {base} kbit
    class fast {{ priority 0 }}
    class bulk {{ priority 1 }}
}}
policy shaped {{
    at postrouting
    classify {{ all }}
    process {{ all {{ priority wan.bulk }} }}
    control {{
        wan.rate every 100ms toward delay 10.3.0.2 = 15ms
            with autorate within {low} kbit-{high} kbit
    }}
}}
"""


@dataclass(frozen=True)
class Phase:
    """A stretch of time at one true rate: when it was over the bar last (seconds from its
    beginning), and from a second on the queue's 50th and 90th percentiles in ms, and the share
    of the true rate that was carried."""

    rate: float
    calm_after: float
    delay: float
    delay90: float
    used: float


@contextmanager
def network() -> Iterator[Mapping[str, Namespace]]:
    with ExitStack() as stack:
        hosts = {}
        for name in ("sender", "manager", "next", "receiver"):
            hosts[name] = Namespace.create(name)
            stack.callback(hosts[name].close)
        veth(hosts["sender"], "eth0", hosts["manager"], "eth0")
        veth(hosts["manager"], "eth1", hosts["next"], "eth0")
        veth(hosts["next"], "eth1", hosts["receiver"], "eth0")
        for host, link, address in (
            ("sender", "eth0", "10.1.0.2/24"), ("manager", "eth0", "10.1.0.1/24"),
            ("manager", "eth1", "192.0.2.1/30"), ("next", "eth0", "192.0.2.2/30"),
            ("next", "eth1", "10.3.0.1/24"), ("receiver", "eth0", "10.3.0.2/24"),
        ):  # fmt: skip
            add_address(hosts[host], link, address)
        add_route(hosts["sender"], "default", via="10.1.0.1")
        add_route(hosts["manager"], "10.3.0.0/24", via="192.0.2.2")
        add_route(hosts["next"], "10.1.0.0/24", via="192.0.2.1")
        add_route(hosts["receiver"], "default", via="10.3.0.1")
        for name in ("manager", "next"):
            set_sysctl(hosts[name], "net/ipv4/ip_forward", "1")
        yield hosts


def bottleneck(host: Namespace, rate: float, verb: str) -> None:
    """The true rate, in bytes a second."""
    with host.entered():
        subprocess.run(
            ["tc", "qdisc", verb, "dev", "eth1", "root", "tbf", "rate", f"{round(rate * 8)}bit",
             "burst", "5000", "limit", str(LIMIT)], check=True,
        )  # fmt: skip


def itmc(host: Namespace, folder: str, *words: str) -> None:
    with host.entered():
        subprocess.run(
            [sys.executable, "-m", "runtime.cli.main", *words], check=True,
            env={**os.environ, "ITM_STATE_DIR": f"{folder}/state"}, stdout=subprocess.DEVNULL,
        )  # fmt: skip


def streams(hosts: Mapping[str, Namespace], many: int, congestion: str) -> list[socket.socket]:
    """Streams that send for as long as their sockets are open."""
    with hosts["receiver"].entered():
        listener = socket.create_server(("10.3.0.2", 5001))
    ends = [listener]
    for _ in range(many):
        with hosts["sender"].entered():
            sending = socket.socket()
        sending.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
        sending.connect(("10.3.0.2", 5001))
        taking, _ = listener.accept()
        ends += [sending, taking]
        threading.Thread(target=_send, args=(sending,), daemon=True).start()
        threading.Thread(target=_take, args=(taking,), daemon=True).start()
    return ends


def _send(end: socket.socket) -> None:
    try:
        while True:
            end.sendall(bytes(16_384))
    except OSError:
        return


def _take(end: socket.socket) -> None:
    try:
        while end.recv(1 << 16):
            pass
    except OSError:
        return


def watched(host: Namespace, rate: float, seconds: float) -> Phase:
    """Look at the bottleneck for some time, from now on."""
    begun, looks = time.monotonic(), []
    with host.entered():
        while (now := time.monotonic() - begun) < seconds:
            queue = next(one for one in qdisc.qdiscs() if one.kind == "tbf")
            counts = queue.counts
            looks.append((now, 1000 * counts.waiting_bytes / rate, counts.bytes))
            time.sleep(LOOK)
    late = [at for at, delay, _ in looks if delay >= BAR_DELAY]
    calm = max(late, default=0.0)
    after = [(at, delay, size) for at, delay, size in looks if at >= BAR_WITHIN]
    used = (after[-1][2] - after[0][2]) / (after[-1][0] - after[0][0]) / rate
    deciles = quantiles([delay for _, delay, _ in after], n=10)
    return Phase(rate, calm, deciles[4], deciles[8], used)


def round_(rate: float, many: int, congestion: str) -> tuple[Phase, Phase, Phase]:
    """One round at a true rate of bytes a second: as it is, halved, back again."""
    with network() as hosts, tempfile.TemporaryDirectory() as folder:
        bottleneck(hosts["next"], rate, "add")
        path = Path(folder) / "shaped.itm"
        kbit = rate * 8 / 1000
        path.write_text(
            POLICY.format(base=round(0.9 * kbit), low=round(0.1 * kbit), high=round(1.5 * kbit))
        )
        itmc(hosts["manager"], folder, "apply", str(path))
        try:
            ends = streams(hosts, many, congestion)
            first = watched(hosts["next"], rate, SETTLED)
            bottleneck(hosts["next"], rate / 2, "change")
            second = watched(hosts["next"], rate / 2, HALVED)
            bottleneck(hosts["next"], rate, "change")
            third = watched(hosts["next"], rate, BACK)
            for end in ends:
                end.close()
            log = next(Path(folder).rglob("control-shaped.jsonl"), None)
            if log is not None and os.environ.get("ITM_KEEP"):
                Path(os.environ["ITM_KEEP"]).write_bytes(log.read_bytes())
            return first, second, third
        finally:
            itmc(hosts["manager"], folder, "remove", "--all")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rate", type=float, default=20, help="the true rate in Mbit/s")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--congestion", default="cubic")
    given = parser.parse_args()
    rounds = []
    for number in range(given.rounds):
        phases = round_(given.rate * 1e6 / 8, given.streams, given.congestion)
        rounds.append(phases)
        for name, one in zip(("as it is", "halved", "back"), phases, strict=True):
            print(f"{number + 1} {name:9} under {BAR_DELAY:.0f} ms after {one.calm_after:.2f} s, queue "
                  f"{one.delay:5.1f} ms (90 %: {one.delay90:5.1f}), used {one.used:.2f}", flush=True)  # fmt: skip
    calm = [r[1].calm_after for r in rounds]
    used = [r[1].used for r in rounds]
    print(f"halved: calm after {median(calm):.2f} s (worst {max(calm):.2f}), used {median(used):.2f} "
          f"(worst {min(used):.2f})")  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "autorate.json").write_text(
        json.dumps(
            {"kernel": platform.release(), "settings": vars(given),
             "rounds": [[asdict(phase) for phase in phases] for phases in rounds]}, indent=1,
        ) + "\n"
    )  # fmt: skip
    return int(median(calm) > BAR_WITHIN or median(used) < BAR_USE)


if __name__ == "__main__":
    sys.exit(main())
