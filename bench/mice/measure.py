"""What runs say: completion times by size, goodput and fairness of long flows, the bars.

Only flows that arrive between `settle` and the end of a run count, the same ones for every
contender: so a controller has found its place, and a queue has filled.
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean, median
from typing import Final

KINDS: Final = ("short", "medium", "long")
BAR_SHORT: Final = 0.1  # of the FIFO's mean, at a load of 0.8
BAR_LONG: Final = 1.05
BAR_FOUND: Final = 1.2  # of the best fixed threshold's mean


@dataclass(frozen=True)
class Case:
    """One run to be made. `contender` is "fifo", "fixed" or "controlled".

    `threshold` in packets is what it is fixed at, or where a controller starts (0: none).
    """

    table: str
    congestion: str
    load: float
    seed: int
    contender: str
    threshold: int = 0


@dataclass(frozen=True)
class Flow:
    """What a flow did: seconds from the start to its arrival, bytes, kind, seconds it took."""

    at: float
    size: int
    kind: str
    took: float | None


@dataclass(frozen=True)
class Moment:
    """What the link and the controller did at a time, in seconds from the start.

    `share` is the first class's part of the link's rate since the last moment, `backlog` its
    packets waiting, and `bulk` those of the other class.
    """

    at: float
    threshold: float
    share: float
    backlog: float
    bulk: float


@dataclass(frozen=True)
class Outcome:
    """A run: its flows in the order of arrival, what the link did, packets lost at it.

    `late` is by how many seconds a flow began late at most: how busy the machine was.
    """

    case: Case
    flows: Sequence[Flow]
    trace: Sequence[Moment]
    lost: int
    late: float

    def line(self) -> str:
        """As a line of JSON."""
        return json.dumps(
            {
                "case": asdict(self.case), "lost": self.lost, "late": round(self.late, 4),
                "flows": [[round(f.at, 4), f.size, f.kind, f.took and round(f.took, 6)] for f in self.flows],
                "trace": [[round(m.at, 2), m.threshold, round(m.share, 4), m.backlog, m.bulk]
                          for m in self.trace],
            }
        )  # fmt: skip

    @classmethod
    def of(cls, line: str) -> "Outcome":
        """From its `line`."""
        found = json.loads(line)
        return cls(
            Case(**found["case"]), [Flow(*one) for one in found["flows"]],
            [Moment(*one) for one in found["trace"]], found["lost"], found["late"],
        )  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """Flows of one kind, of all seeds together. Times in milliseconds.

    `goodput` is the mean of the flows' bits a second, `fairness` Jain's index of it (1: all
    the same), each run's own, and their mean; `undone` flows never ended.
    """

    table: str
    congestion: str
    load: float
    contender: str
    threshold: int
    kind: str
    flows: int
    mean: float
    median: float
    p99: float
    goodput: float
    fairness: float
    undone: int


def read(path: Path) -> list[Outcome]:
    """The outcomes in a file of JSON lines; of a case that is there twice, the last."""
    found = [Outcome.of(line) for line in path.read_text().splitlines()] if path.exists() else []
    return list({one.case: one for one in found}.values())


def counted(outcome: Outcome, settle: float) -> list[Flow]:
    """The flows of an outcome that count."""
    return [flow for flow in outcome.flows if flow.at >= settle]


def jain(shares: Sequence[float]) -> float:
    """Jain's index: 1 if all are equal, 1/n if one has all (Jain, Chiu, Hawe 1984)."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0


def summaries(outcomes: Iterable[Outcome], settle: float) -> list[Summary]:
    """By table, congestion control, load, contender, threshold, and kind of flow."""

    def key(one: Outcome) -> tuple[str, str, float, str, int]:
        case = one.case
        return case.table, case.congestion, case.load, case.contender, case.threshold

    found = []
    for names, runs in groupby(sorted(outcomes, key=key), key):
        together = [counted(run, settle) for run in runs]
        for kind in KINDS:
            chosen = [[f for f in flows if f.kind == kind] for flows in together]
            times = sorted(f.took for flows in chosen for f in flows if f.took is not None)
            if not times:
                continue
            rates = [[f.size * 8 / f.took for f in flows if f.took] for flows in chosen]
            rates = [one for one in rates if one]
            found.append(
                Summary(
                    *names, kind, len(times), 1e3 * fmean(times), 1e3 * median(times),
                    1e3 * percentile(times, 0.99),
                    fmean(rate for one in rates for rate in one), fmean(map(jain, rates)),
                    sum(f.took is None for flows in chosen for f in flows),
                )
            )  # fmt: skip
    return found


def percentile(ordered: Sequence[float], share: float) -> float:
    """The least value that `share` of the values do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclass(frozen=True)
class Verdict:
    """One table, congestion control and load against the bars.

    `short` and `long` are the means with the fixed threshold `best` over the FIFO's, `found` the
    worst of the controlled means of short flows over that of `best`, by start: `by_start`.
    """

    table: str
    congestion: str
    load: float
    best: int
    short: float
    long: float
    by_start: Mapping[int, float]

    @property
    def found(self) -> float:
        return max(self.by_start.values(), default=math.nan)


def verdicts(found: Sequence[Summary]) -> list[Verdict]:
    """Where there is a FIFO and a fixed threshold to compare with."""

    def key(one: Summary) -> tuple[str, str, float]:
        return one.table, one.congestion, one.load

    answer = []
    for names, ones in groupby(sorted(found, key=key), key):
        by = {(one.contender, one.threshold, one.kind): one.mean for one in ones}
        fixed = [t for contender, t, kind in by if (contender, kind) == ("fixed", "short")]
        if not fixed or ("fifo", 0, "short") not in by:
            continue
        best = min(fixed, key=lambda t: by["fixed", t, "short"])
        ratios = {
            kind: by.get(("fixed", best, kind), math.nan) / by.get(("fifo", 0, kind), math.nan)
            for kind in ("short", "long")
        }
        starts = {
            t: mean / by["fixed", best, "short"]
            for (contender, t, kind), mean in by.items()
            if (contender, kind) == ("controlled", "short")
        }
        answer.append(Verdict(*names, best, ratios["short"], ratios["long"], starts))
    return answer


def table_of(found: Sequence[Summary]) -> str:
    """All summaries as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(asdict(found[0])), lineterminator="\n")
    writer.writeheader()
    for one in found:
        fields = asdict(one)
        writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in fields.items()})
    return text.getvalue()


def markdown(found: Sequence[Summary], settings: str) -> str:
    """The bars, then all numbers."""
    lines = [
        "# Mice and elephants", "", settings, "",
        "| table | congestion | load | best fixed | short: of FIFO's mean | long: of FIFO's mean "
        "| controlled: of best fixed's short mean |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for one in verdicts(found):
        starts = ", ".join(f"from {t}: {r:.2f}" for t, r in sorted(one.by_start.items()))
        lines.append(
            f"| {one.table} | {one.congestion} | {one.load} | {one.best} | {one.short:.3f} "
            f"| {one.long:.2f} | {starts} |"
        )
    lines += [
        "", f"Bars: short at most {BAR_SHORT} at load 0.8, long at most {BAR_LONG}, controlled at most "
        f"{BAR_FOUND}.", "", "Completion times in ms, goodput of a flow in Mbit/s:", "",
        "| table | congestion | load | contender | threshold | kind | flows | mean | median | p99 "
        "| goodput | fairness |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for s in found:
        lines.append(
            f"| {s.table} | {s.congestion} | {s.load} | {s.contender} | {s.threshold or ''} | {s.kind} "
            f"| {s.flows} | {s.mean:.2f} | {s.median:.2f} | {s.p99:.2f} | {s.goodput / 1e6:.2f} "
            f"| {s.fairness:.2f} |"
        )
    return "\n".join(lines) + "\n"
