"""Pictures of the outcomes, by matplotlib (of the extra `bench`)."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.mice.measure import BAR_FOUND, KINDS, Outcome, Summary, counted, verdicts

mpl.use("Agg")
_COLOURS = {"fifo": "tab:red", "fixed": "tab:blue", "controlled": "tab:green"}


def draw(
    outcomes: Sequence[Outcome], found: Sequence[Summary], settle: float, folder: Path
) -> None:
    """All pictures, a set for each table and congestion control, as PNG into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for table, congestion in sorted({(one.table, one.congestion) for one in found}):
        names = f"{table}-{congestion}"
        chosen = [one for one in found if (one.table, one.congestion) == (table, congestion)]
        runs = [o for o in outcomes if (o.case.table, o.case.congestion) == (table, congestion)]
        _curves(chosen, runs, settle, f"{table}, {congestion}", folder / f"{names}-threshold.png")
        _traces(runs, settle, f"{table}, {congestion}", folder / f"{names}-control.png")
        _times(chosen, runs, settle, f"{table}, {congestion}", folder / f"{names}-times.png")
        _rest(chosen, f"{table}, {congestion}", folder / f"{names}-long.png")


def _panels(loads: Sequence[float], title: str) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(1, len(loads), figsize=(3.4 * len(loads), 3.4), squeeze=False)
    figure.suptitle(title)
    for axis, load in zip(axes[0], loads, strict=True):
        axis.set_title(f"load {load:g}", fontsize=10)
        axis.grid(alpha=0.3)
    return figure, list(axes[0])


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _curves(
    found: Sequence[Summary], runs: Sequence[Outcome], settle: float, title: str, path: Path
) -> None:
    """Mean time of short flows by threshold; where controllers settled, and the bar for them."""
    loads = sorted({one.load for one in found})
    figure, axes = _panels(loads, f"Mean completion time of short flows, ms: {title}")
    for axis, load in zip(axes, loads, strict=True):
        here = [one for one in found if one.load == load and one.kind == "short"]
        fixed = sorted((s.threshold, s.mean) for s in here if s.contender == "fixed")
        if fixed:
            axis.loglog(
                *zip(*fixed, strict=True), "o-", color=_COLOURS["fixed"], ms=4, label="fixed"
            )
            best = min(mean for _, mean in fixed)
            axis.axhspan(best, BAR_FOUND * best, color="tab:green", alpha=0.15, label="best + 20 %")
        for one in here:
            if one.contender == "fifo":
                axis.axhline(one.mean, color=_COLOURS["fifo"], ls="--", label="FIFO")
        for one in here:
            if one.contender != "controlled":
                continue
            settled = [
                moment.threshold for run in runs for moment in run.trace
                if (run.case.load, run.case.contender, run.case.threshold)
                == (load, "controlled", one.threshold) and moment.at >= settle
            ]  # fmt: skip
            if settled:
                axis.plot(
                    fmean(settled), one.mean, "*", ms=11, label=f"controlled from {one.threshold}"
                )  # at the mean of where it was
        axis.set_xlabel("threshold, packets")
    axes[0].legend(fontsize=7)
    _save(figure, path)


def _traces(runs: Sequence[Outcome], settle: float, title: str, path: Path) -> None:
    """The threshold under control, over time."""
    runs = [run for run in runs if run.case.contender == "controlled" and run.trace]
    loads = sorted({run.case.load for run in runs})
    if not loads:
        return
    figure, axes = _panels(loads, f"Threshold under control: {title}")
    starts = sorted({run.case.threshold for run in runs})
    for axis, load in zip(axes, loads, strict=True):
        for run in runs:
            if run.case.load == load:
                axis.semilogy(
                    [m.at for m in run.trace], [max(1.0, m.threshold) for m in run.trace],
                    color=f"C{starts.index(run.case.threshold)}", alpha=0.6, lw=1,
                )  # fmt: skip
        axis.axvline(settle, color="grey", ls=":")
        axis.set_ylim(1.5, 260)
        axis.set_xlabel("seconds")
    axes[0].set_ylabel("packets")
    axes[0].legend(
        [Line2D([], [], color=f"C{n}") for n in range(len(starts))],
        [f"from {start}" for start in starts], fontsize=7,
    )  # fmt: skip
    _save(figure, path)


def _times(
    found: Sequence[Summary], runs: Sequence[Outcome], settle: float, title: str, path: Path
) -> None:
    """How completion times of each kind are distributed: FIFO, best fixed threshold, control."""
    load = min({one.load for one in found}, key=lambda load: abs(load - 0.8))
    best = {one.load: one.best for one in verdicts(found)}.get(load, 0)
    figure, axes = plt.subplots(1, len(KINDS), figsize=(4.2 * len(KINDS), 3.4))
    figure.suptitle(f"Flows that take longer, load {load:g}: {title}")
    for axis, kind in zip(axes, KINDS, strict=True):
        for contender in _COLOURS:
            times = sorted(
                1e3 * flow.took for run in runs for flow in counted(run, settle)
                if (run.case.load, run.case.contender, flow.kind) == (load, contender, kind)
                and (contender != "fixed" or run.case.threshold == best) and flow.took
            )  # fmt: skip
            if times:
                axis.loglog(
                    times, [1 - n / len(times) for n in range(len(times))],
                    color=_COLOURS[contender],
                    label=f"fixed at {best}" if contender == "fixed" else contender,
                )  # fmt: skip
        axis.set_title(kind, fontsize=10)
        axis.set_xlabel("completion time, ms")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of flows")
    axes[0].legend(fontsize=8)
    _save(figure, path)


def _rest(found: Sequence[Summary], title: str, path: Path) -> None:
    """Long flows by load: mean time, goodput, fairness; FIFO, best fixed threshold, control."""
    best = {one.load: one.best for one in verdicts(found)}
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    figure.suptitle(f"Long flows: {title}")
    for axis, (what, scale, label) in zip(
        axes,
        (("mean", 1, "mean time, ms"), ("goodput", 1e-6, "goodput, Mbit/s"), ("fairness", 1, "Jain's index")),
        strict=True,
    ):  # fmt: skip
        for contender, colour in _COLOURS.items():
            points: dict[float, list[float]] = {}
            for one in found:
                if (one.contender, one.kind) == (contender, "long") and (
                    contender != "fixed" or one.threshold == best.get(one.load)
                ):
                    points.setdefault(one.load, []).append(scale * getattr(one, what))
            loads = sorted(points)
            axis.plot(
                loads, [fmean(points[load]) for load in loads], "o-", color=colour, label=contender
            )
        axis.set_xlabel("load")
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    _save(figure, path)
