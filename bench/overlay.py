"""An overlay of many members, simulated with the engine that runs in earnest.

Members lie in a square; what is between two of them has a delay that grows with the distance, a
detour that differs from pair to pair (so a way by a neighbour may be shorter), jitter and loss.
Pairs fail and come back at random, half of them such that only direct paths are hit, others
get slow for a while, and whole boxes fail. Each member has a few neighbours and
probes all others. What the engines do is compared with what is true in the simulation.

    python -m bench.overlay [--quick] [--into FOLDER] [--seed 1] [--jobs 1]

All members answer; of large overlays only some probe, as members are alike and time is short
(it says how many). The rest follows: who probes n times a second is asked as often. No network
and no root are needed. Writes overlay.json and overlay.md.
"""

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import Pool
from pathlib import Path
from random import Random
from statistics import mean, median
from typing import Any, Final

from itmlang.overlays import DIRECT
from runtime.overlay import wire
from runtime.overlay.engine import Effect, Move, Send
from tests.support.members import Members, overlay

RESULTS: Final = Path(__file__).parent / "results"
FIRST: Final = 192 << 24 | 1  # the first member's address
NEIGHBORS: Final = 5
LAST_MILE, ACROSS, JITTER = 0.004, 0.04, 0.05  # one way: seconds, seconds, share
DETOUR, MISLED, MISLED_BY = 0.3, 0.15, (1.5, 3.0)  # mean detour; share of pairs led far around
LOSS, LOSSY, LOSSY_BY = 0.0005, 0.05, 0.01  # one way; share of pairs that lose more, how much
PAIR_FAILS, PAIR_DOWN = 900.0, 30.0  # seconds on average from one failure of a pair to the next
BOX_FAILS, BOX_DOWN = 7200.0, 20.0
PAIR_SLOW, SLOW_FOR, SLOW_BY = 3600.0, 60.0, (2.0, 5.0)
OUTER: Final = 20
HEADERS: Final = 28


@dataclass(frozen=True)
class Setting:
    """An overlay: how many, how many of them probe, how often and for how long (seconds)."""

    members: int
    probing: int
    every: float
    timeout: float
    warm: float
    seconds: float
    budget: float = 200.0

    @property
    def title(self) -> str:
        return f"{self.members} members, every {self.every:g} s"


FULL: Final = (
    Setting(10, 5, 0.2, 0.2, 60, 900),
    Setting(10, 10, 1.0, 0.5, 60, 1200),
    Setting(50, 8, 1.0, 0.5, 120, 600),
    Setting(200, 8, 1.0, 0.5, 180, 600),
)
QUICK: Final = (
    Setting(10, 4, 0.2, 0.2, 30, 120),
    Setting(50, 2, 1.0, 0.5, 60, 120),
    Setting(200, 1, 1.0, 0.5, 120, 120),
)


@dataclass
class Found:
    """What came of a setting. `detection`: seconds from a failure of the chosen path to the move
    to one that truly works, where there was one. `recovered`: failures that ended before that.
    Shares are of (member, destination, look); `ratio` is the chosen path's round trip to the
    best one's while the chosen one works."""

    detection: list[float] = field(default_factory=list)
    recovered: int = 0
    looks: int = 0
    best: int = 0
    near: int = 0
    broken: int = 0
    direct_broken: int = 0
    ratios: list[float] = field(default_factory=list)
    direct_ratios: list[float] = field(default_factory=list)
    moves: int = 0
    needless: int = 0
    probes: int = 0
    octets: int = 0
    forwarded: int = 0


class World:
    """What is true: delays, and what is down."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.setting = setting
        self.random = Random(seed)
        self.net = Members(seed)
        self.found = Found()
        self.addresses = [FIRST + n for n in range(setting.members)]
        self.places = {a: (self.random.random(), self.random.random()) for a in self.addresses}
        self.probing = self.addresses[: setting.probing]
        self.neighbors = {
            a: self.random.sample([b for b in self.addresses if b != a], NEIGHBORS)
            for a in self.probing
        }
        self.downs: dict[tuple[int, int], int] = {}
        self.broken: dict[tuple[int, int], float] = {}
        self.counting = False
        self._links()
        self._members()
        self.net.watch = self._watch

    def _links(self) -> None:
        inner = {n for its in self.neighbors.values() for n in its}
        self.direct_pairs = sorted(
            {_pair(a, b) for a in self.probing for b in self.addresses if a != b}
        )
        self.pairs = sorted({*self.direct_pairs, *(_pair(n, b) for n in inner for b in self.addresses if n != b)})  # fmt: skip
        for one, other in self.pairs:
            distance = math.dist(self.places[one], self.places[other])
            detour = 1 + self.random.expovariate(1 / DETOUR)
            if self.random.random() < MISLED:
                detour *= self.random.uniform(*MISLED_BY)
            delay = LAST_MILE + ACROSS * distance * detour
            loss = LOSSY_BY if self.random.random() < LOSSY else LOSS
            for link in self.net.both(one, other):
                link.delay, link.jitter, link.loss = delay, JITTER, loss

    def _members(self) -> None:
        setting = self.setting
        for address in self.addresses:
            others = [a for a in self.addresses if a != address]
            if address in self.neighbors:
                neighbors, egresses = self.neighbors[address], others
            else:  # it answers only: by whatever way it is asked
                neighbors, egresses = others, []
            one = overlay(
                address, neighbors, egresses, every=round(setting.every * 1000),
                timeout=round(setting.timeout * 1000), hold=round(5000 * setting.every),
            )  # fmt: skip
            self.net.join(one, budget=setting.budget)

    # What goes wrong.

    def start(self) -> None:
        self._next(self._fail_pair, PAIR_FAILS / len(self.pairs))
        self._next(self._fail_box, BOX_FAILS / len(self.addresses))
        self._next(self._slow_pair, PAIR_SLOW / len(self.pairs))

    def _next(self, do: Any, average: float) -> None:
        self.net.at(self.net.now + self.random.expovariate(1 / average), do, average)

    def _fail_pair(self, average: float) -> None:
        self._next(self._fail_pair, average)
        pair = self.random.choice(self.direct_pairs if self.random.random() < 0.5 else self.pairs)
        self._set(pair, 1)
        self.net.at(self.net.now + self.random.expovariate(1 / PAIR_DOWN), self._set, pair, -1)

    def _set(self, pair: tuple[int, int], more: int) -> None:
        self.downs[pair] = self.downs.get(pair, 0) + more
        for link in self.net.both(*pair):
            link.up = not self.downs[pair]
        self._look_for_broken()

    def _fail_box(self, average: float) -> None:
        self._next(self._fail_box, average)
        box = self.random.choice(self.addresses)
        if box in self.net.down:
            return
        self.net.down.add(box)
        self._look_for_broken()
        self.net.at(self.net.now + self.random.expovariate(1 / BOX_DOWN), self._up, box)

    def _up(self, box: int) -> None:
        self.net.down.discard(box)
        self._look_for_broken()

    def _slow_pair(self, average: float) -> None:
        self._next(self._slow_pair, average)
        pair = self.random.choice(self.pairs)
        factor = self.random.uniform(*SLOW_BY)
        self._delay(pair, factor)
        self.net.at(
            self.net.now + self.random.expovariate(1 / SLOW_FOR), self._delay, pair, 1 / factor
        )

    def _delay(self, pair: tuple[int, int], factor: float) -> None:
        for link in self.net.both(*pair):
            link.delay *= factor

    # What is true of it.

    def trip(self, member: int, via: int, to: int) -> float:
        """A path's round trip without jitter; infinite if it is down."""
        down = self.net.down
        if member in down or to in down or via in down:
            return math.inf
        links = self.net.links
        if via == DIRECT:
            link = links[member, to]
            return 2 * link.delay if link.up else math.inf
        first, second = links[member, via], links[via, to]
        return 2 * (first.delay + second.delay) if first.up and second.up else math.inf

    def trips(self, member: int, to: int) -> dict[int, float]:
        vias = (DIRECT, *(n for n in self.neighbors[member] if n != to))
        return {via: self.trip(member, via, to) for via in vias}

    def _look_for_broken(self) -> None:
        """After a change: which chosen paths are down that need not be?"""
        if not self.counting:
            return
        for member in self.probing:
            for to, via in self.net.engines[member].chosen.items():
                works = self.trip(member, via, to) < math.inf
                if works:
                    if self.broken.pop((member, to), None) is not None:
                        self.found.recovered += 1
                elif min(self.trips(member, to).values()) == math.inf:
                    self.broken.pop((member, to), None)
                else:
                    self.broken.setdefault((member, to), self.net.now)

    def _watch(self, member: int, effect: Effect) -> None:
        if not self.counting or member not in self.neighbors:
            return
        if isinstance(effect, Send) and effect.data[4] == wire.PROBE:
            self.found.probes += 1
            size = len(effect.data) + HEADERS
            self.found.octets += size + (OUTER if effect.via else 0)
            self.found.forwarded += size if effect.via else 0
        elif isinstance(effect, Move):
            self.found.moves += 1
            before = self.trip(member, effect.prior, effect.egress)
            after = self.trip(member, effect.via, effect.egress)
            self.found.needless += before <= after
            begun = self.broken.get((member, effect.egress))
            if begun is not None and after < math.inf:
                self.found.detection.append(self.net.now - begun)
                del self.broken[member, effect.egress]

    def look(self) -> None:
        """How good are the choices?"""
        found = self.found
        for member in self.probing:
            if member in self.net.down:
                continue
            for to, via in self.net.engines[member].chosen.items():
                trips = self.trips(member, to)
                best = min(trips.values())
                if best == math.inf:
                    continue
                found.looks += 1
                found.best += trips[via] == best
                found.near += trips[via] <= 1.1 * best
                found.broken += trips[via] == math.inf
                found.direct_broken += trips[DIRECT] == math.inf
                if trips[via] < math.inf:
                    found.ratios.append(trips[via] / best)
                if trips[DIRECT] < math.inf:
                    found.direct_ratios.append(trips[DIRECT] / best)


def simulate(given: tuple[Setting, int]) -> dict[str, Any]:
    """A setting's results."""
    setting, seed = given
    begun = time.process_time()
    world = World(setting, seed)
    world.start()
    world.net.run(setting.warm)
    world.counting = True
    step = 2.0
    for _ in range(int(setting.seconds / step)):
        world.net.run(step)
        world.look()
    found = world.found
    seconds = setting.seconds * setting.probing
    usual, others = (
        world.net.engines[FIRST].status(world.net.now)[k] for k in ("period", "period_others")
    )
    # A member is asked as often as it asks, and answers are as long as probes.
    return {
        "setting": asdict(setting),
        "title": setting.title,
        "period_chosen_s": usual,
        "period_others_s": others,
        "paths": (setting.members - 1) * (NEIGHBORS + 1) - NEIGHBORS,
        "failures": len(found.detection) + found.recovered,
        "moved": len(found.detection),
        "recovered_first": found.recovered,
        "detection_s": _spread(found.detection),
        "probes_per_second": found.probes / seconds,
        "sent_bytes_per_second": 2 * found.octets / seconds,
        "forwarded_bytes_per_second": 2 * found.forwarded / seconds,
        "on_best": found.best / found.looks,
        "within_tenth": found.near / found.looks,
        "broken": found.broken / found.looks,
        "direct_broken": found.direct_broken / found.looks,
        "ratio": mean(found.ratios),
        "direct_ratio": mean(found.direct_ratios),
        "moves_per_hour": 3600 * found.moves / seconds / (setting.members - 1),
        "needless_per_hour": 3600 * found.needless / seconds / (setting.members - 1),
        "computed_s": time.process_time() - begun,
    }


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The results as Markdown."""
    rows: list[tuple[str, list[str]]] = [
        ("simulated", [f"{r['setting']['probing']} probing for {r['setting']['seconds'] / 60:g} min" for r in results]),
        ("paths a member probes", [f"{r['paths']}" for r in results]),
        ("period, chosen / others", [f"{r['period_chosen_s']:.2g} / {r['period_others_s']:.3g} s" for r in results]),
        ("probes a member sends", [f"{r['probes_per_second']:.0f}/s" for r in results]),
        ("probes and answers a member sends", [f"{r['sent_bytes_per_second'] / 1000:.1f} kB/s" for r in results]),
        ("and forwards for others", [f"{r['forwarded_bytes_per_second'] / 1000:.1f} kB/s" for r in results]),
        ("failures of a chosen path, others working", [f"{r['failures']}" for r in results]),
        ("left after: median", [f"{r['detection_s']['median']:.2f} s" for r in results]),
        ("90 %", [f"{r['detection_s']['90%']:.2f} s" for r in results]),
        ("99 %", [f"{r['detection_s']['99%']:.2f} s" for r in results]),
        ("longest", [f"{r['detection_s']['longest']:.2f} s" for r in results]),
        ("back before it was left", [f"{r['recovered_first']}" for r in results]),
        ("time on the best path", [f"{r['on_best']:.1%}" for r in results]),
        ("time within 10 % of the best", [f"{r['within_tenth']:.1%}" for r in results]),
        ("round trip to the best's, mean", [f"{r['ratio']:.3f}" for r in results]),
        ("the direct path's", [f"{r['direct_ratio']:.3f}" for r in results]),
        ("time on a broken path, others working", [f"{r['broken']:.2%}" for r in results]),
        ("the direct path's", [f"{r['direct_broken']:.2%}" for r in results]),
        ("moves an hour, a destination", [f"{r['moves_per_hour']:.1f}" for r in results]),
        ("of these to a path that was no better", [f"{r['needless_per_hour']:.2f}" for r in results]),
    ]  # fmt: skip
    head = ["", *(r["title"] for r in results)]
    lines = [head, ["---"] + ["---:"] * len(results), *([name, *cells] for name, cells in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _pair(one: int, other: int) -> tuple[int, int]:
    return (one, other) if one < other else (other, one)


def _spread(times: Sequence[float]) -> dict[str, float]:
    every = sorted(times) or [math.nan]
    last = len(every) - 1
    return {
        "mean": mean(every), "median": median(every), "90%": every[round(0.9 * last)],
        "99%": every[round(0.99 * last)], "longest": every[-1],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="half a minute or so; few members probe"
    )
    parser.add_argument("--into", type=Path, default=RESULTS, help="the folder for the results")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="settings at the same time")
    given = parser.parse_args()
    settings = [(one, given.seed) for one in (QUICK if given.quick else FULL)]
    results = []
    with Pool(given.jobs) as pool:
        for one in pool.imap(simulate, settings):
            results.append(one)
            print(f"{one['title']}: left after {one['detection_s']['median']:.2f} s, "
                  f"{one['computed_s']:.0f} s of computing", flush=True)  # fmt: skip
    text = table(results)
    given.into.mkdir(parents=True, exist_ok=True)
    (given.into / "overlay.md").write_text(text)
    (given.into / "overlay.json").write_text(
        json.dumps({"seed": given.seed, "results": results}, indent=1) + "\n"
    )
    print(text, end="")


if __name__ == "__main__":
    main()
