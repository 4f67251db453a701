"""Packets a second by how many classes a policy has, as ratios to one class.

Every contender has a line of namespaces of its own, sender - router - sink, with real
forwarding in its router, all at once: a policy of 1 to 10 000 classes as itm compiles it, in its
linear form (`--no-optimize`), what aerleon and foomuuri make of the same terms, and no rules.
Packets are spread evenly over the classes, in random order. The contenders take turns in each
round; a run is the medians over its rounds, with rulesets loaded anew. After each run every
packet must have arrived, and every class must have counted exactly the packets that are its own.

    python -m bench.growth [--shapes exact …] [--runs 3] [--rounds 9] [--seconds 0.1] [--quick]

Needs root and a C compiler; to get the peers PyPI and Debian once (`python -m bench.peers`);
for the picture matplotlib. What is measured is the processor time of a packet from the sender's
link to the sink: a packet a second is one of a processor that does nothing else.
"""

import argparse
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from bench import wire
from bench.peers import PEERS, PeerError, versions
from bench.shapes import KINDS, MOST, SHAPES, policy, terms
from bench.wire import Line, Packet, Spread, Stream
from runtime import nft

SIZES: Final = (1, 10, 100, 1_000, 10_000)
BARS: Final = {"exact": 0.9, "ranges": 0.9, "prefixes": 0.9, "mixed": 0.8}
ITMC: Final = str(Path(sys.executable).with_name("itmc"))
TABLE: Final = "inet itm_growth"
_PACKETS: Final = 10_000  # of a stream; a class has at least one
# What peers' rules counted; and those among them that ask nothing, behind all terms.
_COUNTED: Final = re.compile(r"\bcounter packets (\d+)")
_REST: Final = re.compile(r"^\t\t(?:ct state new )?counter packets (\d+)", re.M)


class LossError(Exception):
    """Packets are missing, or were counted where they do not belong."""


@dataclass(frozen=True)
class Contender:
    """Who, with how many classes: `ruleset` is what nft loads."""

    name: str
    classes: int
    ruleset: str

    @property
    def title(self) -> str:
        return f"{self.name} {self.classes}" if self.classes else self.name


def compiled(file: Path, *options: str) -> str:
    """What itmc makes of a policy."""
    command = [ITMC, "compile", *options, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def can_be_linear() -> bool:
    """Has this compiler passes that can be left out?"""
    done = subprocess.run([ITMC, "compile", "--help"], capture_output=True, text=True, check=True)
    return "--no-optimize" in done.stdout


def contenders(
    shape: str, sizes: Sequence[int], peers: bool, folder: Path
) -> tuple[list[Contender], dict[str, str]]:
    """All of a shape; and who is missing, and why."""
    made, missing = [Contender("no rules", 0, "")], {}
    for size in sizes:
        file = folder / "growth.itm"
        file.write_text(policy(terms(shape, size)))
        made.append(Contender("itm", size, compiled(file)))
        if size == sizes[-1]:
            if can_be_linear():
                made.append(Contender("linear", size, compiled(file, "--no-optimize")))
            else:
                missing["linear"] = "this itmc has no --no-optimize: what it makes is linear"
    for name, peer in PEERS.items() if peers else ():
        try:
            made.append(
                Contender(name, sizes[-1], peer(terms(shape, sizes[-1]), folder / shape).text)
            )
        except PeerError as error:
            missing[name] = str(error)
    return made, missing


def traffic(shape: str, classes: int) -> tuple[list[Packet], list[str]]:
    """Packets in random order, and the class of each, spread evenly.

    Of mixed terms there are always packets of every kind, or those of one class would be
    cheaper to forward than those of many; what has no class then is in `rest`.
    """
    kinds = max(classes, KINDS) if shape == "mixed" else max(classes, 1)
    wanted, packets, names = terms(shape, kinds), [], []
    order = list(range(_PACKETS))
    random.Random(1).shuffle(order)
    for n in order:
        packets.append(wanted[n % kinds].packet(n // kinds))
        names.append(f"c{n % kinds}" if n % kinds < classes else "rest")
    return packets, names


def checked(one: Contender, line: Line, stream: Stream, names: Sequence[str]) -> None:
    """Raises LossError unless each packet arrived, and was counted in its class."""
    arrived = line.arrived()
    if arrived != stream.sent:
        raise LossError(f"{one.title} classes: {stream.sent} packets sent, {arrived} arrived")
    if not one.ruleset:
        return
    expected: Counter[str] = Counter()
    for number, name in enumerate(names):
        expected[f"class_{name}"] += stream.times(number)
    if one.name in PEERS:
        with line.router.entered():
            text = subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True).stdout  # fmt: skip
        whole, rest = (sum(map(int, found.findall(text))) for found in (_COUNTED, _REST))
        if (whole, rest) != (stream.sent, expected["class_rest"]):
            raise LossError(
                f"{one.title} classes: {stream.sent} packets sent, {whole} counted, {rest} of them by no term"
            )
        return
    with line.router.entered():
        found = {name: packets for name, (packets, _) in nft.counters(TABLE).items()}
    for name in sorted(found | expected):
        if found.get(name, 0) != expected[name]:
            raise LossError(
                f"{one.title}: {name} counted {found.get(name, 0)} packets of {expected[name]}"
            )


@dataclass(frozen=True)
class Run:
    """By contender: thousand packets a second, and the ratio to one class."""

    kpps: Mapping[str, float]
    ratio: Mapping[str, float]


def run(shape: str, racing: Sequence[Contender], rounds: int, seconds: float, folder: Path) -> Run:
    """Load all, let them take turns, check. Raises LossError."""
    program, paces = wire.compiled("packets", folder), {}
    streams: dict[str, Stream] = {}
    names = {}
    with ExitStack() as stack:
        for one in racing:
            classes = one.classes or racing[-1].classes
            file = folder / f"{shape}-{classes}"
            packets, names[one.title] = traffic(shape, classes)
            if not file.exists():
                wire.stored(packets, file)
            line = stack.enter_context(wire.line())
            line.load(one.ruleset)
            streams[one.title] = stack.enter_context(Stream(line, program, file, wire.processor()))
            paces[one.title] = streams[one.title].pace(seconds)
        costs: dict[str, list[float]] = {one.title: [] for one in racing}
        for number in range(rounds):
            for one in racing[:: 1 if number % 2 else -1]:
                count = paces[one.title]
                # What others left in the caches is not this one's cost.
                took = streams[one.title].send(count, count // 5)
                costs[one.title].append(took / count)
        for one in racing:
            checked(one, streams[one.title].line, streams[one.title], names[one.title])
    base = costs["itm 1"]
    return Run(
        {title: 1e-3 / median(found) for title, found in costs.items()},
        {
            title: median(b / cost for b, cost in zip(base, found, strict=True))
            for title, found in costs.items()
        },
    )


def measure(
    shapes: Sequence[str], sizes: Sequence[int], peers: bool, runs: int, rounds: int, seconds: float
) -> dict[str, Any]:
    """Raises LossError."""
    found: dict[str, Any] = {}
    for shape in shapes:
        with tempfile.TemporaryDirectory() as place:
            racing, missing = contenders(shape, sizes, peers, Path(place))
            done = [run(shape, racing, rounds, seconds, Path(place)) for _ in range(runs)]
        found[shape] = {
            "contenders": {
                one.title: {
                    "name": one.name,
                    "classes": one.classes,
                    "kpps": Spread.of([each.kpps[one.title] for each in done], 1).told(),
                    "ratio": Spread.of([each.ratio[one.title] for each in done]).told(),
                }
                for one in racing
            },
            "missing": missing,
        }
    return {
        "machine": wire.machine(), "peers": versions() if peers else {}, "runs": runs,
        "rounds": rounds, "seconds": seconds, "sizes": list(sizes), "bars": BARS, "shapes": found,
    }  # fmt: skip


def markdown(found: Mapping[str, Any]) -> str:
    lines = [
        "# Packets a second by classes", "",
        f"Ratios to one class: median (least to greatest) of {found['runs']} runs of "
        f"{found['rounds']} rounds of {found['seconds']:g} s each; {wire.described(found['machine'])}. "
        + " ".join(f"{name} {version}." for name, version in found["peers"].items()),
        "Written by `python -m bench.growth`.", "",
    ]  # fmt: skip
    titles = dict.fromkeys(
        title for shape in found["shapes"].values() for title in shape["contenders"]
    )
    shapes = found["shapes"]

    def cell(shape: str, title: str) -> str:
        row = shapes[shape]["contenders"].get(title)
        return str(Spread(row["ratio"][0], row["ratio"][1], row["ratio"][2])) if row else "none"

    rows = [[title, *(cell(shape, title) for shape in shapes)] for title in titles]
    rows.append(["bar, for the most classes", *(str(found["bars"][shape]) for shape in shapes)])
    lines += wire.table(["contender, classes", *shapes], rows)
    for shape, one in shapes.items():
        lines += [f"\n{shape}: no {name}: {why}." for name, why in one["missing"].items()]
        kpps = one["contenders"]["itm 1"]["kpps"][1]
        lines += [f"\n{shape}: with one class {kpps:g} thousand packets a second."]
    return "\n".join(lines) + "\n"


def draw(found: Mapping[str, Any], plot: Any) -> None:
    """The ratios of each shape over the number of classes; others than itm are marks."""
    others = {"linear": "v", **dict(zip(PEERS, "x+", strict=True))}
    for shape, one in found["shapes"].items():
        rows = [row for row in one["contenders"].values() if row["name"] == "itm"]
        ratios = [row["ratio"][1] for row in rows]
        (line,) = plot.plot([row["classes"] for row in rows], ratios, "o-", label=shape)
        for row in one["contenders"].values():
            if mark := others.get(row["name"]):
                plot.plot(row["classes"], row["ratio"][1], mark, color=line.get_color())
    for name, mark in others.items():
        plot.plot([], [], mark, color="grey", label=name)
    plot.set(xscale="log", yscale="log", xlabel="classes", ylabel="packets a second, to one class")
    plot.legend()


def slow(found: Mapping[str, Any]) -> list[str]:
    """What is under its bar."""
    under = []
    for shape, one in found["shapes"].items():
        title = f"itm {found['sizes'][-1]}"
        ratio = one["contenders"][title]["ratio"][1]
        if ratio < BARS[shape]:
            under.append(
                f"{shape}: {title}: {ratio} of one class, at least {BARS[shape]} is wanted"
            )
    return under


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=tuple(SHAPES))
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help=f"1 to {MOST}")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.1, help="of each contender in a round")
    parser.add_argument("--without-peers", action="store_true")
    wire.options(parser, "few classes, no peers")
    given = parser.parse_args(arguments)
    if given.quick:
        given.sizes, given.runs, given.rounds, given.seconds = (1, 20), 1, 2, 0.005
    sizes = sorted({1, *given.sizes})  # all is to one class
    if not 1 < sizes[-1] <= MOST:
        parser.error(f"the most classes are 2 to {MOST}")
    try:
        found = measure(
            given.shapes, sizes, not (given.without_peers or given.quick),
            given.runs, given.rounds, given.seconds,
        )  # fmt: skip
    except LossError as error:
        print(error, file=sys.stderr)
        return 2
    wire.kept("growth", found, markdown(found), lambda plot: draw(found, plot), wire.folder(given))
    under = [] if given.quick else slow(found)
    print(*under, sep="\n")
    return 1 if under else 0


if __name__ == "__main__":
    sys.exit(main())
