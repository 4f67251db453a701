"""Runs: each case in namespaces of its own, some at a time, the calmest of a few tries.

Flows of a few milliseconds are measured on a machine that has other things to do. A run in
which the generator itself was late is made again, and the one with the least delay is kept:
it is judged by its own start times alone, never by what came of the flows.
"""

import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from bench.mice import flows
from bench.mice.bottleneck import SERVER, Bottleneck, loaded, network
from bench.mice.measure import Case, Flow, Outcome, read
from bench.mice.sizes import TABLES, arrivals

CALM: Final = 0.01  # seconds that a flow may begin late
TRIES: Final = 3


@dataclass(frozen=True)
class Settings:
    """What all runs have in common: `seconds` of arrivals, sizes divided by `scale`."""

    link: Bottleneck
    seconds: float
    scale: dict[str, float]


def run(settings: Settings, case: Case) -> Outcome:
    """One case. Raises `BottleneckError`, `FlowsError`, `TrafficError`."""
    best: Outcome | None = None
    for _ in range(TRIES):
        found = _once(settings, case)
        if best is None or found.late < best.late:
            best = found
        if best.late <= CALM:
            break
    assert best is not None
    return best


def _once(settings: Settings, case: Case) -> Outcome:
    table, link = TABLES[case.table], settings.link
    planned = arrivals(
        table, settings.scale[case.table], case.load, link.rate, settings.seconds, case.seed
    )
    with network() as hosts, loaded(hosts["router"], case, link) as watch:
        start, done = flows.run(hosts["server"], SERVER, hosts["client"], planned, case.congestion)
        trace = watch.trace(start)
        lost = watch.lost()
    late = max(began - one.at for one, (began, _) in zip(planned, done, strict=True))
    return Outcome(
        case,
        [Flow(one.at, one.size, one.kind, took) for one, (_, took) in zip(planned, done, strict=True)],
        trace, lost, late,
    )  # fmt: skip


def experiment(settings: Settings, cases: Sequence[Case], jobs: int, log: Path) -> list[Outcome]:
    """All cases; those that `log` has already are not run again. Raises as `run`."""
    there = {one.case: one for one in read(log)}
    missing = [case for case in cases if case not in there]
    with log.open("a") as file:
        for number, found in enumerate(_all(settings, missing, jobs), 1):
            there[found.case] = found
            file.write(found.line() + "\n")
            file.flush()
            print(f"{number} of {len(missing)}: {found.case}", file=sys.stderr)
    return [there[case] for case in cases]


def _all(settings: Settings, cases: Sequence[Case], jobs: int) -> Iterator[Outcome]:
    # A process each: a namespace is entered by a thread, and these fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context) as pool:
        futures = []
        for case in cases:
            futures.append(pool.submit(partial(run, settings, case)))
            time.sleep(0.05)  # not all at once
        for future in as_completed(futures):
            yield future.result()
