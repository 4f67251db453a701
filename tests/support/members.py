"""Members of an overlay and what is between them, simulated: the engines are the real ones.

A queue of events, in seconds. A link carries a datagram from one member to another, late by its
delay and jitter, or not at all; by way of a neighbour it takes two links. Links can be
changed at any time, one direction apart from the other.
"""

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from itmlang.overlays import DIRECT, Destination, Neighbor, Overlay
from runtime.overlay.engine import Effect, Engine, Forgotten, Learned, Move, Send

_HEADERS = 28  # bytes of IPv4 and UDP
_OUTER = 20  # and of another IPv4 in a tunnel


@dataclass(slots=True)
class Link:
    """One direction between two members: seconds, a share of the delay, a share of packets."""

    delay: float = 0.01
    jitter: float = 0.0  # evenly up to this share more or less
    loss: float = 0.0
    up: bool = True


@dataclass
class Members:
    """The members, and what is between them. `down` are boxes that nothing passes, `silent`
    those without a runtime: data passes, probes are not answered."""

    seed: int = 0
    key: bytes = b"0123456789abcdef"
    now: float = 1000.0
    links: dict[tuple[int, int], Link] = field(default_factory=dict)
    engines: dict[int, Engine] = field(default_factory=dict)
    down: set[int] = field(default_factory=set)
    silent: set[int] = field(default_factory=set)
    moves: list[tuple[float, int, Move]] = field(default_factory=list)
    learned: list[tuple[float, int, Learned | Forgotten]] = field(default_factory=list)
    sent: dict[int, int] = field(default_factory=dict)
    octets: dict[int, int] = field(default_factory=dict)
    watch: Callable[[int, Effect], None] | None = None

    def __post_init__(self) -> None:
        self._random = Random(self.seed)
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0
        self._woken: dict[int, float] = {}

    def join(self, overlay: Overlay, **more: Any) -> Engine:
        """A traffic manager starts, or starts again."""
        address = overlay.address
        engine = Engine(
            overlay, self.key, int(self.now * 1e6), self.seed * 1000 + address % 1000, **more
        )
        self.engines[address] = engine
        self._wake(address, self.now)
        return engine

    def link(self, one: int, other: int) -> Link:
        return self.links.setdefault((one, other), Link())

    def both(self, one: int, other: int) -> tuple[Link, Link]:
        return self.link(one, other), self.link(other, one)

    def at(self, time: float, do: Callable[..., None], *given: Any) -> None:
        self._count += 1
        heapq.heappush(self._events, (time, self._count, do, given))

    def run(self, seconds: float) -> None:
        """Let time pass."""
        until = self.now + seconds
        while self._events and self._events[0][0] <= until:
            self.now, _, do, given = heapq.heappop(self._events)
            do(*given)
        self.now = until

    def passes(self, sender: int, to: int, via: int) -> float | None:
        """How long a packet takes now, None if it is lost."""
        if via == DIRECT:
            return self._crosses(sender, to)
        first = self._crosses(sender, via)
        second = None if via in self.down else self._crosses(via, to)
        return None if first is None or second is None else first + second

    def _crosses(self, sender: int, to: int) -> float | None:
        link = self.links.get((sender, to))
        if link is None or not link.up or sender in self.down:
            return None
        if link.loss and self._random.random() < link.loss:
            return None
        if not link.jitter:
            return link.delay
        return link.delay * (1 + link.jitter * (2 * self._random.random() - 1))

    def _do(self, address: int, effects: Iterable[Effect]) -> None:
        for effect in effects:
            if self.watch is not None:
                self.watch(address, effect)
            match effect:
                case Send():
                    self._send(address, effect)
                case Move():
                    self.moves.append((self.now, address, effect))
                case Learned() | Forgotten():
                    self.learned.append((self.now, address, effect))

    def _send(self, address: int, one: Send) -> None:
        self.sent[address] = self.sent.get(address, 0) + 1
        size = len(one.data) + _HEADERS + (_OUTER if one.via else 0)
        self.octets[address] = self.octets.get(address, 0) + size
        if (late := self.passes(address, one.to, one.via)) is not None:
            self.at(self.now + late, self._deliver, address, one.to, one.data)

    def _deliver(self, sender: int, to: int, data: bytes) -> None:
        if to in self.down or to in self.silent or to not in self.engines:
            return
        self._do(to, self.engines[to].received(self.now, data, sender))
        self._wake(to, self.engines[to].due)

    def _wake(self, address: int, time: float) -> None:
        """The engine's `tick` is due then; of several times the earliest holds."""
        time = max(time, self.now)
        if time < self._woken.get(address, float("inf")):
            self._woken[address] = time
            self.at(time, self._tick, address, time)

    def _tick(self, address: int, time: float) -> None:
        if self._woken.get(address) != time:
            return
        del self._woken[address]
        engine = self.engines[address]
        if address in self.down or address in self.silent:
            self._wake(address, self.now + 0.1)
            return
        self._do(address, engine.tick(self.now))
        self._wake(address, engine.due)


def overlay(
    address: int, neighbors: Iterable[int], egresses: Iterable[int], **more: Any
) -> Overlay:
    """A member's overlay, with five probes a second; behind an egress is what `behind` says."""
    values: dict[str, Any] = {
        "own": (), "every": 200, "timeout": 200, "lost": (3, 4), "measure": "rtt", "margin": 10,
        "hold": 1000, "sticky": False, "discover": 0, "in_python": False, "port": 4748,
        "key": "mesh.key",
    }  # fmt: skip
    nowhere: Any = None
    return Overlay(
        name="mesh", address=address,
        neighbors=tuple(Neighbor(f"n{n & 0xFFFF}", n, nowhere) for n in neighbors),
        destinations=tuple(Destination((behind(e),), e, nowhere) for e in egresses),
        key_at=nowhere, span=nowhere, **{**values, **more},
    )  # fmt: skip


def behind(egress: int) -> tuple[int, int]:
    """The network behind an egress: a /24 of its own in 10.0.0.0/8."""
    return (10 << 24 | (egress & 0xFFFF) << 8, 24)
