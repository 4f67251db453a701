"""One TCP stream through the kernel's tunnels, against the same path by mark routing without one.

Four namespaces in a row: a sender, the two ends of the tunnel, a receiver. The contenders
are policies that `itmc apply` loads at both ends: `encapsulate to …` with `decapsulate`, and an
overlay's `route by …`, each end the other one's relay, against `set mark`, whose mark a rule of
routing sends along the same links. Nobody answers the overlay's probes: its choice is
written by hand. Offloads are on,
as on a fast machine: packets of 64 KB go through both ends. The contenders take turns in
each round, so a ratio compares what ran side by side.

    python -m bench.tunnel [--rounds 9] [--seconds 2] [--congestion cubic]

Needs root. The congestion control is set on both sides: the host's own may pace (BBR), and
then measures itself.
"""

import argparse
import json
import multiprocessing
import os
import platform
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, Final

from runtime import nft
from runtime.traffic import (
    MarkRule,
    Namespace,
    add_address,
    add_mark_rule,
    add_route,
    set_sysctl,
    veth,
)

RESULTS: Final = Path(__file__).parent / "results"
CHUNK: Final = 1 << 20
WARM: Final = 0.5  # seconds before bytes are counted
BEGUN: Final = 1.0  # seconds in which an overlay empties its map
BAR: Final = 0.7
MARK: Final = 7
TUNNEL: Final = """\
policy into {{ at prerouting interest {{ daddr {there} }} classify {{ all }}
  process {{ all {{ encapsulate to {end} from {own} }} }} }}
policy back {{ at prerouting interest {{ protocol ipip saddr {end} daddr {own} }}
  classify {{ all }} process {{ all {{ decapsulate }} }} }}
"""
MARKED: Final = f"""\
policy marked {{{{ at prerouting interest {{{{ daddr {{there}} }}}} classify {{{{ all }}}}
  process {{{{ all {{{{ set mark {MARK} }}}} }}}} }}}}
"""
OVERLAY: Final = """\
overlay mesh {{ self {own} neighbor relay {end} destination {there} at 192.0.2.9 key from "key" }}
policy outward {{ at prerouting interest {{ daddr @mesh }} classify {{ all }}
  process {{ all {{ route by mesh }} }} }}
"""
CHOICE: Final = "add element inet itm_outward route_mesh {{ {there} : goto via_relay }}"
CONTENDERS: Final = {"tunnel": TUNNEL, "overlay": OVERLAY, "mark": MARKED}
ENDS: Final = {  # namespace: the addresses behind the other end, that end, its own
    "near": {"there": "10.3.0.0/16", "end": "192.0.2.2", "own": "192.0.2.1"},
    "far": {"there": "10.1.0.0/16", "end": "192.0.2.1", "own": "192.0.2.2"},
}


@contextmanager
def network() -> Iterator[Mapping[str, Namespace]]:
    with ExitStack() as stack:
        hosts = {}
        for name in ("sender", "near", "far", "receiver"):
            hosts[name] = Namespace.create(name)
            stack.callback(hosts[name].close)
        veth(hosts["sender"], "eth0", hosts["near"], "eth0", offloads=True)
        veth(hosts["near"], "eth1", hosts["far"], "eth1", offloads=True)
        veth(hosts["far"], "eth0", hosts["receiver"], "eth0", offloads=True)
        for host, link, address in (
            ("sender", "eth0", "10.1.0.2/24"), ("near", "eth0", "10.1.0.1/24"),
            ("near", "eth1", "192.0.2.1/30"), ("far", "eth1", "192.0.2.2/30"),
            ("far", "eth0", "10.3.0.1/24"), ("receiver", "eth0", "10.3.0.2/24"),
        ):  # fmt: skip
            add_address(hosts[host], link, address)
        add_route(hosts["sender"], "default", via="10.1.0.1")
        add_route(hosts["receiver"], "default", via="10.3.0.1")
        for name, host in ENDS.items():
            set_sysctl(hosts[name], "net/ipv4/ip_forward", "1")
            # Without the mark there is no way to the other side.
            add_route(hosts[name], host["there"], via=host["end"], table=MARK)
            add_mark_rule(hosts[name], MarkRule(MARK, 0xFF, MARK, 1000, 4))
        yield hosts


def itmc(host: Namespace, folder: Path, *words: str) -> None:
    with host.entered():
        subprocess.run(
            [sys.executable, "-m", "runtime.cli.main", *words], check=True, text=True,
            capture_output=True, env={**os.environ, "ITM_STATE_DIR": str(folder)},
        )  # fmt: skip


@contextmanager
def loaded(hosts: Mapping[str, Namespace], contender: str) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        key = Path(folder, "key")
        key.touch(0o600)
        key.write_text(secrets.token_hex(32))
        for name, ends in ENDS.items():
            path = Path(folder, f"{name}.itm")
            path.write_text(CONTENDERS[contender].format(**ends))
            itmc(hosts[name], Path(folder, "state"), "apply", str(path))
        if contender == "overlay":
            time.sleep(BEGUN)
            for name, ends in ENDS.items():
                with hosts[name].entered():
                    nft.load(CHOICE.format(**ends))
        try:
            yield
        finally:
            for name in ENDS:
                itmc(hosts[name], Path(folder, "state"), "remove", "--all")


def _tcp(congestion: str) -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
    return made


def _receive(host: Namespace, congestion: str, seconds: float, told: Connection) -> None:
    """Count what comes, in a process of its own."""
    with host.entered(), _tcp(congestion) as listener:
        listener.bind(("10.3.0.2", 5001))
        listener.listen()
        told.send(None)
        link, _ = listener.accept()
        buffer = bytearray(CHUNK)
        begun = time.perf_counter() + WARM
        got = 0
        with link:
            while (now := time.perf_counter()) < begun + seconds:
                size = link.recv_into(buffer)
                got += size if now >= begun else 0
        told.send(got * 8 / (now - begun))


def stream(hosts: Mapping[str, Namespace], congestion: str, seconds: float) -> float:
    """Bits a second of one stream."""
    ours, theirs = multiprocessing.Pipe()
    receiver = multiprocessing.Process(
        target=_receive, args=(hosts["receiver"], congestion, seconds, theirs)
    )
    receiver.start()
    ours.recv()
    data = bytes(CHUNK)
    with hosts["sender"].entered():
        link = _tcp(congestion)
    with link:
        link.settimeout(10)
        link.connect(("10.3.0.2", 5001))
        try:
            while True:
                link.send(data)
        except OSError:
            pass  # the receiver has seen enough
    found: float = ours.recv()
    receiver.join()
    return found


def measure(rounds: int, seconds: float, congestion: str) -> dict[str, Any]:
    rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    with network() as hosts:
        for number in range(rounds):
            for name in list(CONTENDERS)[:: 1 if number % 2 else -1]:
                with loaded(hosts, name):
                    rates[name].append(stream(hosts, congestion, seconds))
    ratios = {
        name: sorted(round(t / m, 3) for t, m in zip(found, rates["mark"], strict=True))
        for name, found in rates.items()
        if name != "mark"
    }
    return {
        "kernel": platform.release(), "processors": os.cpu_count(), "rounds": rounds,
        "seconds": seconds, "congestion": congestion,
        "gigabits": {name: [round(rate / 1e9, 2) for rate in found] for name, found in rates.items()},
        "median": {name: round(median(found) / 1e9, 2) for name, found in rates.items()},
        "ratio": {name: round(median(found), 3) for name, found in ratios.items()},
        "ratios": ratios,
        "bar": BAR,
    }  # fmt: skip


def markdown(found: Mapping[str, Any]) -> str:
    lines = [
        "# One TCP stream through the kernel's tunnels", "",
        f"Linux {found['kernel']}, {found['processors']} processors, "
        f"{found['rounds']} rounds of {found['seconds']:g} s each in turn, {found['congestion']}. "
        "Written by `python -m bench.tunnel`.", "",
        "| path | Gbit/s, median | lowest | highest |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, rates in found["gigabits"].items():
        lines.append(f"| {name} | {found['median'][name]} | {min(rates)} | {max(rates)} |")
    for name, ratios in found["ratios"].items():
        lines += ["", f"Median of the rounds' ratios, {name} to mark: **{found['ratio'][name]}** "
                  f"(from {ratios[0]} to {ratios[-1]}; the bar is {found['bar']})."]  # fmt: skip
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--congestion", default="cubic")
    given = parser.parse_args(arguments)
    found = measure(given.rounds, given.seconds, given.congestion)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "tunnel.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "tunnel.md").write_text(markdown(found))
    print(markdown(found), end="")


if __name__ == "__main__":
    main()
