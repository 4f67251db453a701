"""Mice and elephants: short flows behind long ones, at a bottleneck that knows their size or not.

A link of 100 Mbit/s (HTB) towards the clients; downloads arrive at random, of sizes as
measured in two clusters, divided by a scale so that a run takes half a minute. The same flows
(same seed, same sizes, at each load the same but for the time between them) go through

- `fifo`: a link with one class, a FIFO;
- `fixed`: the policy size_aware with a fixed threshold, and two classes of strict priority;
- `controlled`: the same, the threshold under control, from several starts.

    python -m bench.mice [--tables web-search data-mining] [--loads .4 .6 .8 .9]
        [--seeds 1 2 3 4 5] [--congestion cubic reno] [--thresholds 2 5 10 17 25 …]
        [--starts 2 200] [--seconds 40] [--settle 15] [--rate 100] [--queue 1000]
        [--scale 4 100] [--jobs 4] [--results FOLDER]

Every run is a line of `runs.jsonl` in the results, and is not made again if it is there: an
experiment that was broken off goes on, and more seeds add to it. Then come `mice.csv`,
`mice.md` (with the bars) and pictures (with matplotlib). Needs root. The congestion control
is set on every socket, since the host's own may pace (BBR).

`load` is what the flows offer, headers included, of the link's rate. A flow is short up to
100 KB before scaling, long from 1 MB (web search) or 10 MB (data mining). Its time is taken at
the receiver, from connect() to the last byte. Flows of the first `settle` seconds do not count.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from bench.mice.bottleneck import CONTROL, Bottleneck, BottleneckError
from bench.mice.experiment import Settings, experiment
from bench.mice.flows import FlowsError
from bench.mice.measure import Case, markdown, summaries, table_of
from bench.mice.sizes import TABLES
from runtime.traffic import TrafficError

RESULTS: Final = Path(__file__).parent.parent / "results" / "mice"
THRESHOLDS: Final = (2, 5, 10, 17, 25, 35, 50, 70, 100, 200)


def cases(given: argparse.Namespace) -> list[Case]:
    """All runs, ordered so that what is compared runs near in time."""
    contenders = [("fifo", 0)]
    contenders += [("fixed", threshold) for threshold in given.thresholds]
    contenders += [("controlled", start) for start in given.starts]
    return [
        Case(table, congestion, load, seed, *contender)
        for seed in given.seeds
        for table in given.tables
        for congestion in given.congestion
        for load in given.loads
        for contender in contenders
    ]


def arguments_of(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.mice", description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=["web-search"])
    parser.add_argument("--scale", nargs="+", type=float, default=[4.0, 100.0],
                        help="for web search and data mining")  # fmt: skip
    parser.add_argument("--loads", nargs="+", type=float, default=[0.4, 0.6, 0.8, 0.9])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--congestion", nargs="+", default=["cubic"])
    parser.add_argument("--thresholds", nargs="*", type=int, default=THRESHOLDS, help="packets")
    parser.add_argument("--starts", nargs="*", type=int, default=[2, 200], help="of controllers")
    parser.add_argument("--control", default=CONTROL, help="the controller, as a policy has it")
    parser.add_argument("--seconds", type=float, default=40.0, help="of arrivals")
    parser.add_argument("--settle", type=float, default=15.0, help="seconds that do not count")
    parser.add_argument("--rate", type=float, default=100.0, help="of the link, Mbit/s")
    parser.add_argument("--queue", type=int, default=1000, help="packets, of each class")
    parser.add_argument("--jobs", type=int, default=4, help="runs at a time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    given = arguments_of(words)
    given.results.mkdir(parents=True, exist_ok=True)
    link = Bottleneck(given.rate * 1e6, given.queue, given.control)
    scale = dict(zip(TABLES, given.scale, strict=True))
    settings = Settings(link, given.seconds, scale)
    try:
        outcomes = experiment(settings, cases(given), given.jobs, given.results / "runs.jsonl")
    except (BottleneckError, FlowsError, TrafficError) as error:
        sys.exit(str(error))
    found = summaries(outcomes, given.settle)
    sizes = ", ".join(f"{name} ÷ {scale[name]:g}" for name in given.tables)
    said = (
        f"Link {given.rate:g} Mbit/s, {given.queue} packets a queue; {sizes}; {len(given.seeds)} seeds of "
        f"{given.seconds:g} s, the first {given.settle:g} s not counted; control: `{given.control}`. "
        "Written by `python -m bench.mice`."
    )
    (given.results / "mice.csv").write_text(table_of(found))
    (given.results / "mice.md").write_text(markdown(found, said))
    print(markdown(found, said), end="")
    with suppress(ModuleNotFoundError):
        from bench.mice.plot import draw

        draw(outcomes, found, given.settle, given.results)


if __name__ == "__main__":
    main()
