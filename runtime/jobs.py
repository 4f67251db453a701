"""What the runtime's processes do, each a job: a queue, a policy's controllers, its timers.

Pure. A job has a name; `part` is another number for other work, so that what goes on
unchanged is left alone; `calls` are functions of the user's, with their places in the policy, that
are looked for beside it first.
"""

from dataclasses import dataclass
from zlib import crc32

from itmlang.control import Controller, Timer
from itmlang.links import Link
from itmlang.nft.model import Queue, Table
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
        """Another one for other controllers, or for another rate of a link."""
        plain = [
            sorted((name, repr(value)) for name, value in vars(one).items() if name != "span")
            for one in self.controllers
        ]
        rates = [(name, link.rate, link.handle) for name, link in sorted(self.links.items())]
        return crc32(f"{plain} {rates} {dict(self.unit.given)}".encode())

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


Job = QueueJob | ControlJob | TimerJob
