"""How long a path that has died in silence is used: overlays against Debian's babeld.

Two diamonds of namespaces, alike (`tests/support/diamond.py`): in one, overlays in the traffic
managers; in the other, babeld in all routers. Probes and hellos have the same interval. Datagrams go
from the client to the server, one each 5 ms; in the router of the shortest path everything
is dropped from some moment on, and what counts is the time until they arrive again. The
contenders take turns in each round, at moments that lie anywhere between two probes.

    python -m bench.babel [--rounds 10] [--interval 0.2]

Needs root, and babeld (`apt-get install babeld`), only here.
"""

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Final

from runtime.traffic import set_sysctl
from tests.support.commands import until
from tests.support.diamond import HOSTS, LINKS, MANAGERS, SERVER, Diamond
from tests.support.mesh import Box, mesh

RESULTS: Final = Path(__file__).parent / "results"
CONTENDERS: Final = ("overlay", "babeld")
CALM: Final = 15  # hellos, until everybody knows everybody again


@contextmanager
def overlays(diamond: Diamond, interval: float) -> Iterator[Callable[[], bool]]:
    """Yields what tells whether packets go directly again, and all paths are known."""
    diamond.apply(every=interval)
    yield (
        lambda: (
            diamond.ways() == ("direct", "direct") and diamond.known(diamond.near, MANAGERS["far"])
        )
    )


@contextmanager
def babel(diamond: Diamond, interval: float) -> Iterator[Callable[[], bool]]:
    """babeld instead of the static routes; yields what tells whether the shortest path is taken."""
    routers = [box for name, box in diamond.mesh.boxes.items() if name not in HOSTS]
    with ExitStack() as stack:
        for number, box in enumerate(routers, 1):
            stack.enter_context(babeld(box, number, interval))
        core = diamond.core.addresses["near"]

        def directly() -> bool:
            with diamond.near.ns.entered():
                route = subprocess.run(
                    ["ip", "route", "get", SERVER], capture_output=True, text=True, check=False
                ).stdout
            return f"via {core} " in route

        yield directly


@contextmanager
def babeld(box: Box, number: int, interval: float) -> Iterator[None]:
    """A router that finds its routes by itself."""
    hosts = [HOSTS[name] for name in box.links if name in HOSTS]
    lines = [f"router-id 02:00:00:00:00:00:00:{number:02x}"]
    lines += [f"redistribute ip {network} allow" for network in hosts]
    lines += ["redistribute local deny", "redistribute deny"]
    with box.ns.entered():
        routes = subprocess.run(
            ["ip", "route", "show", "proto", "static"], capture_output=True, text=True, check=True
        ).stdout
        for route in routes.splitlines():
            subprocess.run(["ip", "route", "del", route.split()[0]], check=True)
        for name, link in box.links.items():
            if name in HOSTS:
                continue
            # Our links have neither multicast nor addresses of IPv6, by which Babel talks.
            set_sysctl(box.ns, f"net/ipv6/conf/{link}/disable_ipv6", "0")
            subprocess.run(["ip", "link", "set", link, "multicast", "on"], check=True)
            address = f"fe80::{number:x}:{link[3:]}/64"
            subprocess.run(["ip", "addr", "add", address, "dev", link, "nodad"], check=True)
            lines.append(f"interface {link} type wired hello-interval {interval}")
        config = box.folder / "babeld.conf"
        config.write_text("\n".join(lines) + "\n")
        log = (box.folder / "babeld.log").open("w")
        daemon = subprocess.Popen(
            ["babeld", "-c", str(config), "-S", "", "-I", str(box.folder / "babeld.pid")],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        yield
    finally:
        daemon.terminate()
        daemon.wait()
        log.close()


def died(diamond: Diamond, back: Callable[[], bool], interval: float) -> float:
    """For how long no packets came after the shortest path has died (seconds); and heal it."""
    until(back, 60)
    time.sleep((CALM + random.random()) * interval)
    with diamond.stream() as stream:
        begun = time.monotonic()
        diamond.core.die()
        time.sleep(2 * interval)
        stream.flowing(20)
        found = stream.gap(begun)
    diamond.core.trouble()
    return found


def measure(rounds: int, interval: float) -> dict[str, Any]:
    gaps: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        diamonds, back = {}, {}
        # The last one's folder of states is in force; babeld needs none.
        for name, run in (("babeld", babel), ("overlay", overlays)):
            (folder / name).mkdir()
            made = stack.enter_context(mesh(folder / name, LINKS, MANAGERS, HOSTS))
            diamonds[name] = Diamond(made)
            back[name] = stack.enter_context(run(diamonds[name], interval))
        for number in range(rounds):
            for name in CONTENDERS[:: 1 if number % 2 else -1]:
                gaps[name].append(died(diamonds[name], back[name], interval))
                print(f"{number + 1} {name:8} {gaps[name][-1]:.3f} s", flush=True)
    middle = {name: round(median(found), 3) for name, found in gaps.items()}
    return {
        "kernel": platform.release(), "processors": os.cpu_count(), "rounds": rounds,
        "interval": interval, "gaps": {name: [round(one, 3) for one in sorted(found)]
                                       for name, found in gaps.items()},
        "median": middle, "no_later": middle["overlay"] <= middle["babeld"],
    }  # fmt: skip


def markdown(found: Mapping[str, Any]) -> str:
    lines = [
        "# A path that dies in silence", "",
        f"Linux {found['kernel']}, {found['processors']} processors, {found['rounds']} rounds in "
        f"turn, a probe or hello every {found['interval']:g} s. Written by `python -m bench.babel`.",
        "", "| | seconds without a packet, median | least | most |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, gaps in found["gaps"].items():
        lines.append(f"| {name} | {found['median'][name]} | {gaps[0]} | {gaps[-1]} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--interval", type=float, default=0.2)
    given = parser.parse_args(arguments)
    if shutil.which("babeld") is None:
        parser.error("there is no babeld: `apt-get install babeld`")
    found = measure(given.rounds, given.interval)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "babel.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "babel.md").write_text(markdown(found))
    print(markdown(found), end="")
    return 0 if found["no_later"] else 1


if __name__ == "__main__":
    sys.exit(main())
