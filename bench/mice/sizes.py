"""Flow sizes from two measured tables, and flows that arrive at random.

A table gives points of the distribution of sizes; between two points it is linear, and it
begins at one byte. Flows arrive as a Poisson process. A seed fixes the flows and the shape of
their arrivals; the load only stretches the time between them, to offer exactly that load: so
the same seed is the same flows at each load and through each bottleneck, and few flows of a
heavy tail do not turn a load of 0.8 into one of 0.7.
"""

import bisect
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

MSS: Final = 1448  # bytes of data in a full packet: 1500 less IPv4 and TCP with timestamps
HEADERS: Final = 66  # bytes of Ethernet, IPv4 and TCP with timestamps around them
BARE: Final = 3  # packets of a download without data: SYN-ACK, and acknowledgements
KB, MB, GB = 1000, 1000_000, 1000_000_000


@dataclass(frozen=True)
class Table:
    """A distribution of flow sizes: (bytes, share of the flows that are not larger).

    Flows of at most `short` bytes are short, of at least `long` are long.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    short: float
    long: float

    def size(self, share: float) -> float:
        """The size, in bytes, that this share of the flows does not exceed."""
        shares = [0.0, *(p for _, p in self.points)]
        sizes = [1.0, *(s for s, _ in self.points)]
        i = max(1, bisect.bisect_left(shares, share))
        part = (share - shares[i - 1]) / (shares[i] - shares[i - 1])
        return sizes[i - 1] + part * (sizes[i] - sizes[i - 1])

    def kind(self, size: float) -> str:
        """`short`, `medium` or `long`, of a size before scaling."""
        return "short" if size <= self.short else "long" if size >= self.long else "medium"


# Alizadeh et al., "Data Center TCP (DCTCP)", SIGCOMM 2010: a cluster that serves web search.
WEB_SEARCH: Final = Table(
    "web-search",
    (
        (10 * KB, 0.15), (20 * KB, 0.2), (30 * KB, 0.3), (50 * KB, 0.4), (80 * KB, 0.53),
        (200 * KB, 0.6), (1 * MB, 0.7), (2 * MB, 0.8), (5 * MB, 0.9), (10 * MB, 0.97),
        (30 * MB, 1.0),
    ),
    short=100 * KB, long=1 * MB,
)  # fmt: skip
# Greenberg et al., "VL2", SIGCOMM 2009: a cluster that runs data mining jobs.
DATA_MINING: Final = Table(
    "data-mining",
    (
        (180, 0.1), (216, 0.2), (560, 0.3), (900, 0.4), (1.1 * KB, 0.5), (1.87 * KB, 0.6),
        (3.16 * KB, 0.7), (10 * KB, 0.8), (400 * KB, 0.9), (3.16 * MB, 0.95), (100 * MB, 0.98),
        (1 * GB, 1.0),
    ),
    short=100 * KB, long=10 * MB,
)  # fmt: skip
TABLES: Final = {table.name: table for table in (WEB_SEARCH, DATA_MINING)}


@dataclass(frozen=True)
class Arrival:
    """A flow to be: `at` seconds from the start, `size` in bytes as sent, and its kind."""

    at: float
    size: int
    kind: str

    @property
    def wire(self) -> int:
        """About how many bytes it is on the link, headers and all."""
        return self.size + HEADERS * (math.ceil(self.size / MSS) + BARE)


def arrivals(
    table: Table, scale: float, load: float, rate: float, seconds: float, seed: int
) -> Sequence[Arrival]:
    """Flows for about `seconds` whose sizes are the table's divided by `scale`.

    They offer `load` of the link's `rate` (bits a second), headers counted.
    """
    random_ = random.Random(f"{table.name} {seed}")
    # As many flows as the mean size suggests at full load: the same flows at each load.
    probes = [table.size((i + 0.5) / 10_000) / scale for i in range(10_000)]
    mean = sum(size + HEADERS * (math.ceil(size / MSS) + BARE) for size in probes) / len(probes)
    count = max(2, round(seconds * rate * load / 8 / mean))
    at, found = 0.0, []
    for _ in range(count):
        at += random_.expovariate(1.0)
        size = table.size(random_.random())
        found.append(Arrival(at, max(1, round(size / scale)), table.kind(size)))
    stretch = sum(flow.wire for flow in found) * 8 / rate / load / at
    return [Arrival(flow.at * stretch, flow.size, flow.kind) for flow in found]
