"""How long planning and applying takes, against `nft -f` of the same ruleset.

Whole processes, one after the other, in network namespaces of their own: each round
runs every command once, so that a ratio compares what ran side by side. What is loaded
is a policy with a class for each of many hosts, or of hosts and ports; every class
rewrites DSCP, which is what makes four or five rules of it. Exits with 1 if planning or
applying what is loaded already takes more than `MOST` times what `nft -f` needs to load it.

    python -m bench.apply --classes 2500 10000 --rounds 5 1

Needs root. Close to nothing else should run on the machine.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Final

from runtime.traffic import Namespace

ROOT: Final = Path(__file__).resolve().parents[1]

MOST: Final = 1.3  # times `nft -f`, for what does not change
ITMC: Final = str(Path(sys.executable).with_name("itmc"))
SHAPES: Final = ("hosts", "hosts and ports", "hosts, a flow")
UNCHANGED: Final = ("plan, unchanged", "apply, unchanged")


def policy(classes: int, shape: str, *, action: str = "cs3", first: str = "") -> str:
    """A policy: `action` is what the class in the middle does, `first` a class before all others."""
    flow, ports = "flow" in shape, "ports" in shape
    lines = ["policy big {", "    at forward"]
    if flow:
        lines += ["    flow f by saddr, daddr", "    log { count f }"]
    lines += ["    classify {"] + ([f"        {first}"] if first else [])
    for n in range(classes):
        host = f"10.{n // 62_500}.{n // 250 % 250}.{n % 250}"
        port = f" and dport == {n % 60_000 + 1}" if ports else ""
        lines.append(f"        c{n} when saddr == {host}{port}")
    lines += ["        long when f.packets > 100"] if flow else []
    lines += ["        rest", "    }", "    process {"]
    for n in range(classes):
        lines.append(
            f"        c{n} {{ set dscp {action if n == classes // 2 else f'cs{n % 7 + 1}'} }}"
        )
    return "\n".join([*lines, "    }", "}", ""])


@dataclass(frozen=True)
class Run:
    """One process: how long it took (seconds), and the memory of its largest part (MB)."""

    seconds: float
    megabytes: float


class Bench:
    """A folder for policies and state, and the commands run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "ITM_STATE_DIR": str(folder / "state"),
            # As installed: modules are compiled, whatever the caller's environment says.
            "PYTHONPYCACHEPREFIX": str(folder / "compiled"),
            "PYTHONDONTWRITEBYTECODE": "",
        }

    def run(self, *command: str, state: str = "state") -> Run:
        """Run a command that has to succeed."""
        environment = {**self.environment, "ITM_STATE_DIR": str(self.folder / state)}
        begin = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=subprocess.DEVNULL
        )
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
        return Run(seconds, used.ru_maxrss / 1024)

    def write(self, text: str) -> None:
        (self.folder / "big.itm").write_text(text)


@contextmanager
def namespace() -> Iterator[None]:
    """A network namespace for the processes that are started inside."""
    made = Namespace.create("bench")
    try:
        with made.entered():
            yield
    finally:
        made.close()


def measure(classes: int, shape: str, rounds: int) -> tuple[dict[str, list[Run]], int]:
    """All commands, `rounds` times each; and how many rules they are about."""
    found: dict[str, list[Run]] = {}
    with tempfile.TemporaryDirectory() as place, namespace():
        bench = Bench(Path(place))

        def note(name: str, run: Run) -> None:
            found.setdefault(name, []).append(run)

        base = policy(classes, shape)
        bench.write(base)
        bench.run(ITMC, "compile", "big.itm", "-o", "big.nft")
        text = (bench.folder / "big.nft").read_text()
        bench.run(ITMC, "apply", "big.itm")
        bench.run(ITMC, "list")
        for number in range(rounds):
            with namespace():
                note("nft -f, empty namespace", bench.run("nft", "-f", "big.nft"))
            with namespace():
                note("first apply", bench.run(ITMC, "apply", "big.itm", state=f"first{number}"))
            note("plan, unchanged", bench.run(ITMC, "plan", "big.itm"))
            note("apply, unchanged", bench.run(ITMC, "apply", "big.itm"))
            note("status", bench.run(ITMC, "status"))
            note("list", bench.run(ITMC, "list"))
            bench.write(policy(classes, shape, action="cs5"))
            note("plan, one class changed", bench.run(ITMC, "plan", "big.itm"))
            note("apply, one class changed", bench.run(ITMC, "apply", "big.itm"))
            bench.write(base)
            bench.run(ITMC, "apply", "big.itm")
            bench.write(policy(classes, shape, first="early when ttl == 3"))
            note("plan, all lines moved", bench.run(ITMC, "plan", "big.itm"))
            note("apply, all lines moved", bench.run(ITMC, "apply", "big.itm"))
            bench.write(base)
            bench.run(ITMC, "apply", "big.itm")
            note("--version", bench.run(ITMC, "--version"))
            note("--help", bench.run(ITMC, "--help"))
        bench.run(ITMC, "remove", "--all")
    return found, text.count(' comment "')


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "min": round(min(values), 3),
        "median": round(statistics.median(values), 3),
        "max": round(max(values), 3),
    }


def told(found: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, object]]:
    """Seconds of each command, times `nft -f` of the same round, and memory."""
    load = found["nft -f, empty namespace"]
    return {
        name: {
            "seconds": spread([run.seconds for run in runs]),
            "ratio": spread(
                [run.seconds / one.seconds for run, one in zip(runs, load, strict=True)]
            ),
            "megabytes": round(max(run.megabytes for run in runs)),
        }
        for name, runs in found.items()
    }


def show(title: str, results: Mapping[str, Mapping[str, object]]) -> None:
    print(f"\n{title}\n{'':26} {'seconds':>22} {'times nft -f':>20} {'MB':>6}")
    for name, row in results.items():
        columns = [
            " / ".join(f"{v:.2f}" for v in row[key].values()) for key in ("seconds", "ratio")
        ]  # type: ignore[attr-defined]
        print(f"{name:26} {columns[0]:>22} {columns[1]:>20} {row['megabytes']:>6}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="min / median / max of each command")
    parser.add_argument("--classes", type=int, nargs="+", default=[2500])
    parser.add_argument("--rounds", type=int, nargs="+", default=[5], help="for each of CLASSES")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "apply.json")
    options = parser.parse_args()
    policies, slow = [], []
    for classes, rounds in zip_longest(
        options.classes, options.rounds, fillvalue=options.rounds[-1]
    ):
        for shape in SHAPES:
            found, rules = measure(classes, shape, rounds)
            results = told(found)
            title = f"{classes} classes ({shape}): {rules} rules, {rounds} rounds"
            show(title, results)
            policies.append(
                {
                    "classes": classes,
                    "shape": shape,
                    "rules": rules,
                    "rounds": rounds,
                    "commands": results,
                }
            )
            for name in UNCHANGED:
                ratio = results[name]["ratio"]["median"]  # type: ignore[index]
                slow += [f"{title}: {name}: {ratio} times"] if ratio > MOST else []
    content = {
        "machine": {"kernel": platform.release(), "cpus": os.cpu_count(), "python": platform.python_version()},
        "at_most": MOST,
        "policies": policies,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=2) + "\n")
    print(*(["", *slow] if slow else []), sep="\n")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
