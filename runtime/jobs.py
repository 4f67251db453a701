"""What the runtime's processes do, each a job: a queue, a policy's controllers, its timers, an
overlay.

Pure. A job has a name; `part` is another number for other work, so that what goes on
unchanged is left alone; `calls` are functions of the user's, with their places in the policy, that
are looked for beside it first.
"""

from dataclasses import dataclass
from zlib import crc32

from itmlang.control import Controller, Timer
from itmlang.links import Link
from itmlang.nft.model import Queue, Table
from itmlang.overlays import Overlay
from itmlang.source import Span
from runtime.units import Unit


@dataclass(frozen=True)
class QueueJob:
    """One queue of a policy: `number` is one of the policy's queues."""

    unit: Unit
    queue: Queue
    number: int

    @property
    def name(self) -> str:
        return f"{self.queue.policy} {self.number}"

    @property
    def policy(self) -> str:
        return self.queue.policy

    @property
    def part(self) -> int:
        """Another one for other work."""
        return self.queue.part

    @property
    def calls(self) -> tuple[tuple[str, Span], ...]:
        """The handlers, with their places in the policy."""
        return self.queue.calls

    @property
    def targets(self) -> tuple[str, ...]:
        """The handlers that the policy calls."""
        return tuple(target for target, _ in self.queue.calls)


@dataclass(frozen=True)
class ControlJob:
    """The controllers of a policy, with its table and the links that they name."""

    unit: Unit
    policy: str
    table: Table

    @property
    def name(self) -> str:
        return f"{self.policy} control"

    @property
    def controllers(self) -> tuple[Controller, ...]:
        return tuple(one for one in self.table.controllers if one.policy == self.policy)

    @property
    def links(self) -> dict[str, Link]:
        return {link.name: link for link in self.unit.links}

    @property
    def part(self) -> int:
        """Another one for other controllers, and for anything else that the rules follow from:
        flows that are known follow a parameter by them."""
        return crc32(repr(self.unit.made_of).encode())

    @property
    def calls(self) -> tuple[tuple[str, Span], ...]:
        """Laws that are the user's own, with their places in the policy."""
        return tuple((one.law, one.span) for one in self.controllers if ":" in one.law)


@dataclass(frozen=True)
class TimerJob:
    """The timers of a policy."""

    unit: Unit
    policy: str
    timers: tuple[Timer, ...]

    @property
    def name(self) -> str:
        return f"{self.policy} timers"

    @property
    def part(self) -> int:
        """Another one for other timers."""
        return crc32(repr([(t.target, t.period) for t in self.timers]).encode())

    @property
    def calls(self) -> tuple[tuple[str, Span], ...]:
        """The functions that are called, with their places in the policy."""
        return tuple((timer.target, timer.span) for timer in self.timers)


@dataclass(frozen=True)
class Site:
    """A map or set that an overlay's process writes: its table, its name and role (of
    `FlowSet`), what stands before the names of its policy's chains, and, of "stay", where the
    neighbour's number stands in a connection's mark."""

    table: str
    name: str
    role: str
    prefix: str
    shift: int


@dataclass(frozen=True)
class OverlayJob:
    """An overlay: its probes, and the choice of ways. `policy` is the overlay's own."""

    unit: Unit
    policy: str
    overlay: Overlay

    @property
    def name(self) -> str:
        return f"{self.policy} overlay"

    @property
    def part(self) -> int:
        """Another one for other members, destinations or settings, or other rules to lead to."""
        one = self.overlay
        plain = [
            repr(value) for name, value in sorted(vars(one).items())
            if name not in ("neighbors", "destinations", "key_at", "span")
        ]  # fmt: skip
        plain += [f"{n.name} {n.address}" for n in one.neighbors]
        plain += [f"{d.prefixes} {d.egress}" for d in one.destinations]
        return crc32(f"{plain} {self.sites}".encode())

    @property
    def sites(self) -> tuple[Site, ...]:
        """The maps that lead to the rules of neighbours, the sets of what is discovered."""
        one = self.overlay
        names = {"route": one.chosen, "stay": one.staying, "networks": f"learned_{one.name}_ip"}
        return tuple(
            Site(table.path, found.name, found.role, before, found.threshold)
            for table in self.unit.ruleset.tables
            for found in table.sets
            if found.role in names
            for before in (table.prefix(found.policy) if found.policy else "",)
            if found.name == before + names[found.role]
        )

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables that count the overlay's packets."""
        return tuple(
            table.path
            for table in self.unit.ruleset.tables
            if any(one.kind in ("sent", "back") for one in table.counters)
        )

    @property
    def calls(self) -> tuple[tuple[str, Span], ...]:
        return ()


Job = QueueJob | ControlJob | TimerJob | OverlayJob
