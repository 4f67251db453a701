"""The cost of a packet in a compiled ruleset, to the shortest ruleset written by hand.

The policy is `policies/size_aware.itm`, and `handwritten/size_aware.nft` means the same: first
both get packets of every kind, and what leaves them and what they counted must be equal. Cost is
the processor time of a packet over forwarding it without rules. Four lines of namespaces
take turns: no rules, compiled, by hand, and by hand once more: the last ratio would be 1 on a
machine without noise, and how far it is from 1 is what this bench cannot tell apart.

A round is the whole life of its flows, that of an empty table: one packet of each flow that
is new, 10 that are still short, 11 that are long (the first of them not measured). Then the
tables are emptied. A run is the medians of its rounds, with rulesets loaded anew.

    python -m bench.overhead [--runs 3] [--rounds 40] [--flows 2000] [--quick]

Needs root and a C compiler.
"""

import argparse
import random
import re
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Final

from bench import wire
from bench.growth import LossError, compiled
from bench.wire import HERE, Line, Packet, Spread, Stream
from runtime import nft

POLICY: Final = HERE.parent / "policies" / "size_aware.itm"
BY_HAND: Final = HERE / "handwritten" / "size_aware.nft"
BAR: Final = 1.05
SHORT, LONG = 11, 11  # packets of a flow in a round
PARTS: Final = ("new", "short", "long", "all")
_SET: Final = re.compile(r"^\tset (\w+) \{", re.M)
_TABLE: Final = re.compile(r"^table (inet \w+) \{", re.M)


@dataclass(frozen=True)
class Loaded:
    """A ruleset in a router, and packets towards it."""

    name: str
    ruleset: str
    line: Line
    stream: Stream

    def emptied(self) -> None:
        """Forget all flows."""
        if not self.ruleset:
            return
        table = _TABLE.findall(self.ruleset)[0]
        with self.line.router.entered():
            nft.load("".join(f"flush set {table} {one}\n" for one in _SET.findall(self.ruleset)))

    def counters(self) -> dict[str, int]:
        with self.line.router.entered():
            found = nft.counters(_TABLE.findall(self.ruleset)[0])
        return {name: packets for name, (packets, _) in sorted(found.items()) if "class" in name}


def kinds() -> list[bytes]:
    """Frames of every kind that the policy tells apart, most of them twelve times and more."""
    found = []
    for number, to in enumerate(("10.128.0.1", "fd80::1")):
        plain = Packet(to, "tcp", 4000 + number, 80, 0x10)
        for tos in range(0, 256, 5):
            found += [replace(plain, sport=2000 + tos, tos=tos).frame()] * 13
        fin = replace(plain, flags=0x11).frame()
        found += [fin] * 13 + [plain.frame()] * 3 + [Packet(to, "udp").frame()] * 13
        found += [later(plain.frame())] * 2
    short = Packet("10.128.0.1", "tcp", 5000, 80, 0x10).frame()
    return found + [cut(short, 8)] * 13 + [cut(short, 2)] * 13 + [short] * 3


def later(frame: bytes) -> bytes:
    """The same as a later fragment."""
    ether, head, rest = frame[:14], frame[14:34], frame[34:]
    if ether.endswith(b"\x08\0"):
        return ether + mended(head[:6] + b"\0\x10" + head[8:]) + rest
    head, load = frame[14:54], frame[54:]
    extension = bytes((head[6], 0, 0, 0x10, 0, 0, 0, 1))  # RFC 8200, section 4.5
    size = (len(extension) + len(load)).to_bytes(2, "big")
    return ether + head[:4] + size + bytes((44,)) + head[7:] + extension + load


def cut(frame: bytes, many: int) -> bytes:
    """The same over IPv4, with so many bytes of TCP."""
    head = frame[14:34]
    return frame[:14] + mended(head[:2] + (20 + many).to_bytes(2, "big") + head[4:]) + frame[34 : 34 + many]  # fmt: skip


def mended(head: bytes) -> bytes:
    """A header of IPv4 with its checksum."""
    bare = head[:10] + b"\0\0" + head[12:]
    return bare[:10] + wire.checksum(bare).to_bytes(2, "big") + bare[12:]


def seen(one: Loaded, frames: Sequence[bytes]) -> list[bytes]:
    """What comes to the sink of these, a frame each."""
    with one.line.sender.entered():
        out = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    with one.line.sink.entered():
        come = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # ETH_P_ALL
    found = []
    with out, come:
        out.bind(("eth0", 0))
        come.bind(("eth0", 3))
        come.settimeout(5)
        for frame in frames:
            out.send(frame)
            found.append(come.recv(2048))
    return found


def compared(first: Loaded, second: Loaded) -> None:
    """Raises LossError unless both do the same to packets of every kind."""
    frames = kinds()
    for sent, one, other in zip(frames, seen(first, frames), seen(second, frames), strict=True):
        if one != other:
            raise LossError(
                f"{first.name} and {second.name} differ: {sent.hex()} becomes {one.hex()}, {other.hex()}"
            )
    if first.counters() != second.counters():
        raise LossError(f"{first.name} and {second.name} count otherwise: {first.counters()}, {second.counters()}")  # fmt: skip


def run(ruleset: str, by_hand: str, rounds: int, flows: int, folder: Path) -> dict[str, Any]:
    """The parts' costs in ns, and their ratios. Raises LossError."""
    program = wire.compiled("packets", folder)
    order = list(range(flows))
    random.Random(1).shuffle(order)
    file = wire.stored(
        [Packet(f"10.129.{n >> 8}.{n & 255}", "tcp", 1024 + n, 80, 0x10) for n in order],
        folder / "flows",
    )
    texts = {"none": "", "compiled": ruleset, "by hand": by_hand, "again": by_hand}
    spent: dict[str, dict[str, list[float]]] = {
        name: {part: [] for part in PARTS} for name in texts
    }
    with ExitStack() as stack:
        racing = []
        for name, text in texts.items():
            line = stack.enter_context(wire.line())
            line.load(text)
            stream = stack.enter_context(Stream(line, program, file, wire.processor()))
            racing.append(Loaded(name, text, line, stream))
        compared(racing[1], racing[2])
        before = [(one.line.arrived(), one.counters() if one.ruleset else {}) for one in racing]
        for number in range(rounds):
            turn = racing[:: 1 if number % 2 else -1]
            for one in turn:
                one.emptied()
            for part, count, first in (
                ("new", 1, 0), ("short", SHORT - 1, 0), ("long", LONG - 1, 1),
            ):  # fmt: skip
                for one in turn:
                    took = one.stream.send(count * flows, first * flows)
                    spent[one.name][part].append(took / count / flows * 1e9)
            for one in turn:
                new, short, long = (spent[one.name][part][-1] for part in PARTS[:3])
                whole = (new + (SHORT - 1) * short + LONG * long) / (SHORT + LONG)
                spent[one.name]["all"].append(whole)
        for one, (came, counted) in zip(racing, before, strict=True):
            _check(one, came, counted, rounds * flows)
    return {
        "ns": {
            name: {part: median(values) for part, values in parts.items()}
            for name, parts in spent.items()
        },
        "ratio": _ratios(spent, "compiled"),
        "noise": _ratios(spent, "again"),
    }


def _check(one: Loaded, came: int, counted: Mapping[str, int], all_flows: int) -> None:
    """Every packet arrived, and is in the class that its place in its flow gives it."""
    arrived = one.line.arrived() - came
    if arrived != one.stream.sent:
        raise LossError(f"{one.name}: {one.stream.sent} packets sent, {arrived} arrived")
    expected = {"class_short": SHORT * all_flows, "class_long": LONG * all_flows}
    for name in expected if one.ruleset else ():
        found = one.counters()[name] - counted[name]
        if found != expected[name]:
            raise LossError(f"{one.name}: {name} counted {found} packets of {expected[name]}")


def _ratios(spent: Mapping[str, Mapping[str, Sequence[float]]], name: str) -> dict[str, float]:
    """Costs over forwarding, to those by hand of the same round."""
    return {
        part: median(
            (cost - none) / (hand - none)
            for cost, none, hand in zip(
                spent[name][part], spent["none"][part], spent["by hand"][part], strict=True
            )
        )
        for part in PARTS
    }


def measure(runs: int, rounds: int, flows: int) -> dict[str, Any]:
    """Raises LossError."""
    with tempfile.TemporaryDirectory() as place:
        texts = compiled(POLICY), BY_HAND.read_text()
        done = [run(*texts, rounds, flows, Path(place)) for _ in range(runs)]
    return {
        "machine": wire.machine(), "runs": runs, "rounds": rounds, "flows": flows, "bar": BAR,
        "ns": {
            name: {part: Spread.of([one["ns"][name][part] for one in done], 0).told() for part in PARTS}
            for name in done[0]["ns"]
        },
        **{
            kind: {part: Spread.of([one[kind][part] for one in done]).told() for part in PARTS}
            for kind in ("ratio", "noise")
        },
    }  # fmt: skip


def markdown(found: Mapping[str, Any]) -> str:
    rows = [
        [f"{name}, ns", *(str(Spread(*parts[part])) for part in PARTS)]
        for name, parts in found["ns"].items()
    ]
    rows += [
        [title, *(str(Spread(*found[kind][part])) for part in PARTS)]
        for title, kind in (
            ("**compiled to by hand, over none**", "ratio"),
            ("by hand again to by hand, over none", "noise"),
        )
    ]
    lines = [
        "# Compiled, to by hand", "",
        f"`size_aware`: median (least to greatest) of {found['runs']} runs of {found['rounds']} rounds "
        f"of {found['flows']} flows; {wire.described(found['machine'])}. The bar, for all packets, is "
        f"{found['bar']}. Written by `python -m bench.overhead`.", "",
        *wire.table(["a packet", *PARTS], rows),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--flows", type=int, default=2000, help="at most 60000")
    wire.options(parser, "few flows")
    given = parser.parse_args(arguments)
    if given.quick:
        given.runs, given.rounds, given.flows = 1, 3, 200
    try:
        found = measure(given.runs, given.rounds, given.flows)
    except LossError as error:
        print(error, file=sys.stderr)
        return 2
    wire.kept("overhead", found, markdown(found), None, wire.folder(given))
    ratio = found["ratio"]["all"][1]
    if given.quick or ratio <= BAR:
        return 0
    print(f"size_aware: {ratio} times the cost of by hand, at most {BAR} is wanted")
    return 1


if __name__ == "__main__":
    sys.exit(main())
