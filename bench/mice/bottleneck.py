"""Clients, a router with a bottleneck, servers; and what the router does to the flows.

Three namespaces in a row, without offloads, so that a packet counted is a packet of the wire.
All that a contender is, is the text of a policy file: `policy_of` says which. `itmc apply`
loads it into the router, which has no other rules: a FIFO is a link with one class.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from socket import if_nametoindex
from typing import Final

from bench.mice.measure import Case, Moment
from runtime import qdisc
from runtime.traffic import Namespace, add_address, add_route, set_sysctl, veth

SERVER: Final = "10.0.2.1"
# The first packets of flows are to be a twentieth of what the link carries: a percent too
# little raises the threshold by one packet a second.
CONTROL: Final = (
    "threshold every 1s toward wan.interactive.share = 5% with pi kp 0 ki 1 within 2-200"
)
LOOK: Final = 0.05  # seconds between two looks at the queues

FIFO: Final = """\
link wan {{
    interface "eth0"
    rate {rate} mbit
    class all {{ priority 0 queue {queue} packets inner fifo }}
    otherwise all
}}
"""
CLASSES: Final = """\
link wan {{
    interface "eth0"
    rate {rate} mbit
    class interactive {{ priority 0 queue {queue} packets inner fifo }}
    class bulk        {{ priority 1 queue {queue} packets inner fifo }}
    otherwise bulk
}}

policy size_aware(threshold: packets = {threshold}) {{
    at postrouting

    interest {{
        protocol tcp
    }}

    flow conn by saddr, sport, daddr, dport timeout 2m max 65536

    classify {{
        short when conn.packets <= threshold or tcp.flags has fin
        long
    }}

    log {{ count conn }}

    process {{
        short {{ priority wan.interactive }}
        long  {{ priority wan.bulk }}
    }}
{control}}}
"""


@dataclass(frozen=True)
class Bottleneck:
    """A link of `rate` (bits a second, whole megabits) whose classes queue so many packets each.

    `control` is the line of the policy's `control` section.
    """

    rate: float = 100e6
    queue: int = 1000
    control: str = CONTROL


class BottleneckError(Exception):
    """The router did not take the policy; the message says why."""


def policy_of(case: Case, link: Bottleneck) -> str:
    """The policy file of a contender."""
    control = f"\n    control {{\n        {link.control}\n    }}\n"
    return (FIFO if case.contender == "fifo" else CLASSES).format(
        rate=f"{link.rate / 1e6:g}",
        queue=link.queue,
        threshold=case.threshold,
        control=control if case.contender == "controlled" else "",
    )


@contextmanager
def network() -> Iterator[Mapping[str, Namespace]]:
    """client eth0 - eth0 router eth1 - eth0 server. Raises TrafficError."""
    with ExitStack() as stack:
        hosts = {}
        for name in ("client", "router", "server"):
            hosts[name] = Namespace.create(name)
            stack.callback(hosts[name].close)
        veth(hosts["client"], "eth0", hosts["router"], "eth0")
        veth(hosts["router"], "eth1", hosts["server"], "eth0")
        set_sysctl(hosts["router"], "net/ipv4/ip_forward", "1")
        # A flow is not to profit from what others before it have learned of the path.
        set_sysctl(hosts["server"], "net/ipv4/tcp_no_metrics_save", "1")
        for host, link, address in (
            ("client", "eth0", "10.0.1.1/24"), ("router", "eth0", "10.0.1.254/24"),
            ("router", "eth1", "10.0.2.254/24"), ("server", "eth0", f"{SERVER}/24"),
        ):  # fmt: skip
            add_address(hosts[host], link, address)
        add_route(hosts["client"], "default", via="10.0.1.254")
        add_route(hosts["server"], "default", via="10.0.2.254")
        yield hosts


@contextmanager
def loaded(router: Namespace, case: Case, link: Bottleneck) -> Iterator["Watch"]:
    """The contender at work on the router, and watched. Raises BottleneckError."""
    with tempfile.TemporaryDirectory() as folder:
        path, state = Path(folder, "size_aware_link.itm"), Path(folder, "state")
        path.write_text(policy_of(case, link))
        _itmc(router, state, "apply", str(path))
        try:
            with Watch(router, case, link, state) as watch:
                yield watch
        finally:
            _itmc(router, state, "remove", "--all")


def _itmc(router: Namespace, state: Path, *words: str) -> None:
    with router.entered():
        done = subprocess.run(
            [sys.executable, "-m", "runtime.cli.main", *words], text=True, check=False,
            capture_output=True, env={**os.environ, "ITM_STATE_DIR": str(state)},
        )  # fmt: skip
    if done.returncode:
        raise BottleneckError(f"itmc {' '.join(words)}: {done.stderr.strip()}")


@dataclass
class Watch:
    """What the link's classes do, looked at now and then, and what its controller decided."""

    router: Namespace
    case: Case
    link: Bottleneck
    state: Path
    _looks: list[tuple[float, tuple[qdisc.Counts, ...]]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Watch":
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        with self.router.entered():
            device = if_nametoindex("eth0")
            due = time.monotonic()
            while not self._stop.is_set():
                # The leaves, the first class first: the inner class has none above it.
                found = sorted(
                    (c for c in qdisc.classes(device).values() if c.shape.parent != qdisc.ROOT),
                    key=lambda c: c.handle,
                )
                self._looks.append((time.monotonic(), tuple(c.counts for c in found)))
                due += LOOK
                self._stop.wait(max(0.0, due - time.monotonic()))

    def lost(self) -> int:
        """Packets that found no room in the link's queues."""
        return sum(one.drops for one in self._looks[-1][1])

    def trace(self, start: float) -> list[Moment]:
        """What happened by the second since `start`, a time of the monotonic clock."""
        values = self._thresholds(start)
        found: list[Moment] = []
        looks = [(at - start, counts) for at, counts in self._looks if at >= start and counts]
        for second in range(int(looks[-1][0]) if looks else 0):
            chosen = [one for one in looks if second <= one[0] < second + 1]
            if len(chosen) < 2:
                continue
            (begun, before), (ended, after) = chosen[0], chosen[-1]
            part = (after[0].bytes - before[0].bytes) * 8 / self.link.rate / (ended - begun)
            waiting = [sum(counts[n].waiting for _, counts in chosen) / len(chosen)
                       for n in range(len(before))]  # fmt: skip
            value = float(self.case.threshold)
            for at, written in values:
                value = written if at <= second else value
            if len(waiting) == 1:
                part, waiting = 0.0, [0.0, *waiting]
            found.append(Moment(float(second), value, part, *(round(w, 2) for w in waiting)))
        return found

    def _thresholds(self, start: float) -> list[tuple[float, float]]:
        """What the controller wrote, by time since `start`."""
        epoch = time.time() - time.monotonic() + start
        found = []
        for log in sorted(self.state.rglob("control-*.jsonl*"), reverse=True):
            for line in log.read_text().splitlines():
                with suppress(ValueError, KeyError, TypeError):
                    told = json.loads(line)
                    found.append((told["time"] - epoch, float(told["value"])))
        return sorted(found)
