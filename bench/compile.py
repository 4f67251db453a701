"""How long large policies take to compile, and in how much memory.

Each shape of policy is generated with 100 to 20 000 classes, with and without an action
for each, and compiled three times, each time in a process of its own. The time goes from
the text to the printed ruleset, the grammar's loading in it. A table goes to stdout
(least, median and greatest of the three), all numbers to `bench/results/compile.json`.

    python -m bench.compile [CLASSES …]
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from typing import Final

from itmlang.pipeline import compile
from itmlang.source import Source

SIZES: Final = (100, 1_000, 2_500, 5_000, 10_000, 20_000)
RUNS: Final = 3
RESULTS: Final = Path(__file__).parent / "results" / "compile.json"
ACTIONS: Final = ("set dscp ef", "drop", "set mark 7 accept", "limit 100 packets/s")


def _address(n: int) -> str:
    return f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}"


def _prefix(n: int) -> str:
    return f"10.{n >> 8}.{n & 255}.0/24"


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


def policy(shape: str, classes: int, *, process: bool = True) -> str:
    """A policy of so many classes; with `process`, each has an action."""
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


def measure(shape: str, classes: int, process: bool) -> dict[str, float]:
    """Seconds, greatest memory (MB) and rules of one compilation in this process."""
    source = Source("large.itm", policy(shape, classes, process=process))
    start = time.perf_counter()
    compiled = compile(source)
    seconds = time.perf_counter() - start
    rules = sum(len(chain.rules) for table in compiled.ruleset.tables for chain in table.chains)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": round(seconds, 3), "megabytes": round(memory, 1), "rules": rules}


def _in_a_process(*arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.compile", "--one", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main(sizes: tuple[int, ...]) -> None:
    """Measure all shapes and sizes; print the table and write the numbers."""
    results = []
    columns = ("shape", "actions", "classes", "rules", "min", "median", "max s", "MB")
    print("{:18}{:8}{:>8}{:>8}{:>8}{:>8}{:>8}{:>6}".format(*columns))
    for shape, actions, classes in product(SHAPES, ("with", "without"), sizes):
        runs = [_in_a_process(shape, actions, str(classes)) for _ in range(RUNS)]
        seconds = [run["seconds"] for run in runs]
        megabytes = max(run["megabytes"] for run in runs)
        rules = runs[0]["rules"]
        times = "".join(f"{one:8.2f}" for one in (min(seconds), median(seconds), max(seconds)))
        print(f"{shape:18}{actions:8}{classes:8}{rules:8}{times}{megabytes:6.0f}", flush=True)
        results.append({"shape": shape, "actions": actions, "classes": classes, "rules": rules,
                        "seconds": seconds, "megabytes": megabytes})  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2], int(sys.argv[4]), sys.argv[3] == "with")))
    else:
        main(tuple(map(int, sys.argv[1:])) or SIZES)
