"""How long large policies take to compile, and in how much memory; beside aerleon.

Each shape of policy is made with 100 to 100 000 classes (or elements of one set), and compiled
in a process of its own; the time goes from the text to the printed ruleset, the grammar's loading
in it. Then whole processes in turn: `itmc compile` and aerleon on the same terms, and
`itmc --version` and `--help`. Exits with 1 if a bar is missed.

    python -m bench.compile [CLASSES …] [--shapes address …] [--actions with without] [--quick]

aerleon comes from PyPI once (`python -m bench.peers`); for the picture matplotlib.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Final

from bench import peers, shapes, wire
from bench.wire import Spread
from itmlang.diagnostics import CompileError
from itmlang.pipeline import compile
from itmlang.source import Source

SIZES: Final = (100, 1_000, 10_000, 100_000)
ELEMENTS: Final = "elements"
RUNS: Final = 3
_LARGE: Final = 50_000  # classes; of so many one run is enough
ITMC: Final = str(Path(sys.executable).with_name("itmc"))
ACTIONS: Final = ("set dscp ef", "drop", "set mark 7 accept", "limit 100 packets/s")
# What is wanted of these sizes: seconds, and MB.
BARS: Final = {"classes": (10_000, 2.0, 500.0), ELEMENTS: (100_000, 3.0, 500.0)}
STARTS: Final = {"itmc --version": 0.15, "itmc --help": 0.15}  # seconds
LINEAR: Final = 1.5  # at most so many times the seconds of a class, per ten times the classes


def _address(n: int) -> str:
    return f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}"


def _prefix(n: int) -> str:
    return f"{10 + (n >> 16)}.{n >> 8 & 255}.{n & 255}.0/24"


def _port(n: int) -> int:
    return 1 + n % 60_000


# What class `n` asks.
SHAPES: Final[dict[str, Callable[[int], str]]] = {
    "address": lambda n: f"saddr == {_address(n)}",
    "prefix": lambda n: f"daddr in {_prefix(n)}",
    "ports": lambda n: f"dport in {_port(3 * n)}-{_port(3 * n) + 1}",
    "address and port": lambda n: f"dport == {_port(n)} and saddr == {_address(n)}",
    "mixed": lambda n: (
        f"saddr == {_address(n)} and protocol == tcp",
        f"daddr in {_prefix(n)} or (sport == {_port(n)} and not dport in {{ 80, 443 }})",
        f"protocol == udp and dport in {_port(n)}-{_port(n) + 9} and saddr in {_prefix(n)}",
        f"saddr in {{ {_address(n)}, fd00::{n % 65_536:x} }} and length > {n % 1500}",
        f"dport == {_port(n)} and conn.packets > {n % 10}",
    )[n % 5],
}
CHOSEN: Final = ("address", "prefix", "mixed", ELEMENTS)


def policy(shape: str, classes: int, *, process: bool = True) -> str:
    """A policy of so many classes; with `process`, each has an action."""
    if shape == ELEMENTS:
        return _elements(classes)
    rules = [f"        c{n} when {SHAPES[shape](n)}" for n in range(classes)]
    blocks = [f"        c{n} {{ {ACTIONS[n % len(ACTIONS)]} }}" for n in range(classes)]
    lines = [
        "policy large {",
        "    at forward",
        *(["    flow conn by connection"] if shape == "mixed" else []),
        *("    classify {", *rules, "    }"),
        *(["    log {", "        count conn", "    }"] if shape == "mixed" else []),
        *(["    process {", *blocks, "    }"] if process else []),
        "}",
    ]
    return "\n".join(lines) + "\n"


def _elements(many: int) -> str:
    """A set of so many addresses, and a class for them."""
    listed = ",\n    ".join(_address(n) for n in range(many))
    return (
        f"set blocked: address = {{\n    {listed}\n}}\n"
        "policy large {\n    at forward\n    classify { in_it when saddr in @blocked  rest }\n"
        "    process { in_it { drop } }\n}\n"
    )


def measure(shape: str, classes: int, process: bool) -> dict[str, Any]:
    """Seconds, greatest memory (MB) and rules of one compilation in this process; or why none."""
    source = Source("large.itm", policy(shape, classes, process=process))
    start = time.perf_counter()
    try:
        compiled = compile(source)
    except CompileError as error:
        return {"refused": str(error)[:200]}
    seconds = time.perf_counter() - start
    rules = sum(len(chain.rules) for table in compiled.ruleset.tables for chain in table.chains)
    # Not getrusage's: that begins with what the process had that started this one.
    status = Path("/proc/self/status").read_text()
    memory = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    return {"seconds": round(seconds, 3), "megabytes": round(memory, 1), "rules": rules}


def _in_a_process(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.compile", "--one", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def growth(chosen: Sequence[str], actions: Sequence[str], sizes: Sequence[int], runs: int) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A row for each shape and size, the sizes of a shape one after the other."""
    for shape, action, size in product(chosen, actions, sizes):
        if shape == ELEMENTS and action != actions[0]:
            continue
        done = [
            _in_a_process(shape, action, str(size)) for _ in range(1 if size > _LARGE else runs)
        ]
        row = {"shape": shape, "actions": action if shape != ELEMENTS else "", "size": size}
        if refused := next((one["refused"] for one in done if "refused" in one), None):
            yield row | {"refused": refused}
            continue
        yield row | {
            "rules": done[0]["rules"],
            "seconds": Spread.of([one["seconds"] for one in done]).told(),
            "megabytes": max(one["megabytes"] for one in done),
        }


def _whole(*command: str) -> float:
    """Seconds of a process, as installed: with compiled modules."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}  # fmt: skip
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - begin


def beside(sizes: Sequence[int], runs: int) -> list[dict[str, Any]]:
    """`itmc compile` and aerleon in turn, on terms of the mixed shape."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "same.itm")
        for size in sizes:
            wanted, own, other = shapes.terms("mixed", size), [], []
            file.write_text(shapes.policy(wanted))
            try:
                for _ in range(runs):
                    own.append(_whole(ITMC, "compile", str(file)))
                    other.append(peers.aerleon(wanted, Path(place)).seconds)
            except peers.PeerError as error:
                return [{"size": size, "missing": str(error)}]
            rows.append(
                {
                    "size": size,
                    "itmc": Spread.of(own).told(),
                    "aerleon": Spread.of(other).told(),
                    "ratio": round(median(o / p for o, p in zip(own, other, strict=True)), 3),
                }
            )
    return rows


def starts(runs: int) -> dict[str, list[float]]:
    """Seconds of commands that compile nothing."""
    for command in STARTS:
        _whole(ITMC, *command.split()[1:])
    return {
        command: Spread.of([_whole(ITMC, *command.split()[1:]) for _ in range(runs)]).told()
        for command in STARTS
    }


def _compiled(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of what was not refused."""
    return [row for row in found["growth"] if "refused" not in row]


def missed(found: Mapping[str, Any]) -> list[str]:
    """Which bars, and by what."""
    said = []
    rows = {(row["shape"], row["actions"], row["size"]): row for row in _compiled(found)}
    said += [
        f"{row['shape']}, {row['size']}: {row['refused']}"
        for row in found["growth"]
        if "refused" in row
    ]
    for (shape, actions, size), row in rows.items():
        name = " ".join(filter(None, (shape, actions and f"{actions} actions")))
        wanted, seconds, megabytes = BARS[ELEMENTS if shape == ELEMENTS else "classes"]
        if size == wanted and row["seconds"][1] > seconds:
            said.append(f"{name}, {size}: {row['seconds'][1]} s, at most {seconds} are wanted")
        if size == wanted and row["megabytes"] > megabytes:
            said.append(f"{name}, {size}: {row['megabytes']} MB, at most {megabytes} are wanted")
        less = rows.get((shape, actions, size // 10))
        if less and size > 1_000 and row["seconds"][1] > 10 * LINEAR * less["seconds"][1]:
            said.append(f"{name}: {size} take more than {10 * LINEAR:g} times as long as {size // 10}")  # fmt: skip
    for command, most in STARTS.items():
        if found["starts"][command][1] > most:
            said.append(f"{command}: {found['starts'][command][1]} s, at most {most} are wanted")
    return said


def markdown(found: Mapping[str, Any]) -> str:
    lines = [
        "# Compiling", "",
        f"Median (least to greatest) of {found['runs']} runs; {wire.described(found['machine'])}. "
        "Written by `python -m bench.compile`.", "",
        *wire.table(
            ["shape", "actions", "size", "rules", "seconds", "MB"],
            [[row["shape"], row["actions"], row["size"], row["rules"], Spread(*row["seconds"]), row["megabytes"]]
             if "rules" in row else [row["shape"], row["actions"], row["size"], row["refused"], "", ""]
             for row in found["growth"]],
        ), "",
        *wire.table(
            ["mixed classes", "itmc compile, s", "aerleon, s", "itmc to aerleon"],
            [[row["size"], Spread(*row["itmc"]), Spread(*row["aerleon"]), row["ratio"]]
             if "itmc" in row else [row["size"], row["missing"], "", ""] for row in found["beside"]],
        ), "",
        *(f"{command}: {Spread(*seconds)} s\n" for command, seconds in found["starts"].items()),
    ]  # fmt: skip
    return "\n".join(lines)


def draw(found: Mapping[str, Any], plot: Any) -> None:
    """Seconds over classes: a straight line of slope 1 is linear."""
    for shape, actions in dict.fromkeys((row["shape"], row["actions"]) for row in _compiled(found)):
        rows = [
            row for row in _compiled(found) if (row["shape"], row["actions"]) == (shape, actions)
        ]
        title = " ".join(filter(None, (shape, actions and f"({actions} actions)")))
        plot.plot([row["size"] for row in rows], [row["seconds"][1] for row in rows], "o-", label=title)  # fmt: skip
    if rows := [row for row in found["beside"] if "itmc" in row]:
        for who, title in (
            ("aerleon", "aerleon, whole"),
            ("itmc", "itmc compile of its terms, whole"),
        ):
            plot.plot([row["size"] for row in rows], [row[who][1] for row in rows], "x--", label=title)  # fmt: skip
    plot.set(xscale="log", yscale="log", xlabel="classes or elements", ylabel="seconds")
    plot.legend()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sizes", nargs="*", type=int, default=list(SIZES))
    parser.add_argument("--shapes", nargs="+", choices=(*SHAPES, ELEMENTS), default=CHOSEN)
    parser.add_argument("--actions", nargs="+", choices=("with", "without"), default=["without"])
    parser.add_argument("--runs", type=int, default=RUNS)
    wire.options(parser, "few classes, without aerleon")
    given = parser.parse_args(arguments)
    if given.quick:
        given.sizes, given.runs = [100, 1_000], 1
    rows = growth(given.shapes, given.actions, given.sizes, given.runs)
    same = [size for size in given.sizes if size <= shapes.MOST]
    found = {
        "machine": wire.machine(), "runs": given.runs, "growth": list(rows),
        "beside": [] if given.quick else beside(same, given.runs), "starts": starts(5 * given.runs),
    }  # fmt: skip
    wire.kept("compile", found, markdown(found), lambda plot: draw(found, plot), wire.folder(given))
    said = [] if given.quick else missed(found)
    print(*said, sep="\n")
    return 1 if said else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2], int(sys.argv[4]), sys.argv[3] == "with")))
    else:
        sys.exit(main())
