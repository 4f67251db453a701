"""Controllers and timers: what a policy's `control` section asks for.

A controller samples a measure, and writes one parameter: of its policy, or a link's rate.
Pure data; `itmlang/laws.py` has the laws, `runtime/controller.py` runs them.
"""

from dataclasses import dataclass
from typing import Final

from itmlang.links import rate_text
from itmlang.source import Span
from itmlang.values import (
    BYTES,
    DURATION,
    NUMBER,
    OCTET,
    PACKET_RATE,
    PACKETS,
    PERCENT,
    PERIODS,
    RATE,
    Type,
)  # fmt: skip

# A controlled parameter takes so many values at most: each has rules of its own, ready for
# when it comes. Over two decades they are 7 % apart, finer than any set-point.
MOST_STEPS: Final = 64
SHORTEST_PERIOD: Final = 50  # milliseconds between two samples

# The types of parameters that a controller can write.
CONTROLLED: Final[tuple[Type, ...]] = (
    BYTES, DURATION, NUMBER, OCTET, PACKET_RATE, PACKETS, PERCENT, RATE,
)  # fmt: skip
_A_DAY: Final = PERIODS["s"] * len(PERIODS)


@dataclass(frozen=True)
class Measure:
    """What is measured.

    `kind` is "class" (of the policy's), "flow", "link", "rtt" or "delay" (to a host), or "cpu".
    `of` names it: (class,), (flow,), (link, class or ""), (address,) or (). `unit` is
    "packets", "bytes", "packets/s", "bytes/s", "flows", "ms" or "%" (of a class: of what its link sends); with
    "dropped/s", packets that a link drops.
    """

    kind: str
    of: tuple[str, ...]
    unit: str
    text: str


@dataclass(frozen=True)
class Controller:
    """A loop: every `period` milliseconds, `written` moves so that `measure` comes to `target`.

    `written` is a parameter's name, or `LINK.rate` (bytes a second). `base` is the file's value,
    between `low` and `high`; a rate is in bytes or packets a second, a time in milliseconds, a
    percentage in percent. `steps` are the values that rules of a parameter are ready for, as texts,
    with `values` what they are. `law` is one of `itmlang.laws`, or a function of the user's
    as `module:function`. With `dry`, decisions are only logged. `sites` are the maps of the table
    that lead to the rules in force.
    """

    policy: str
    written: str
    period: int
    measure: Measure
    target: float
    law: str
    gains: tuple[tuple[str, float], ...]
    base: float
    low: float
    high: float
    whole: bool
    dry: bool
    steps: tuple[str, ...]
    values: tuple[float, ...]
    span: Span
    sites: tuple[str, ...] = ()

    @property
    def link(self) -> str:
        """The link whose rate it writes, "" if it writes a parameter."""
        return self.written.removesuffix(".rate") if "." in self.written else ""

    def shown(self, value: float) -> str:
        """What is in force where a value is written, as a policy has it."""
        return self.steps[self.step(value)] if self.steps else rate_text(value)

    def step(self, value: float) -> int:
        """The place of the step that is nearest to a value."""
        return min(range(len(self.values)), key=lambda n: abs(self.values[n] - value))


@dataclass(frozen=True)
class Timer:
    """`target` (as `module:function`) is called every `period` milliseconds."""

    policy: str
    period: int
    target: str
    span: Span


def number(type: Type, raw: int) -> float:
    """A value of a type, as laws have it: bytes or packets a second, ms, percent."""
    if type.name == RATE.name:
        return raw / _A_DAY / 8
    if type.name == PACKET_RATE.name:
        return raw / _A_DAY
    return raw / 10_000 if type.name == PERCENT.name else raw


def measured(value: float, unit: str) -> str:
    """A sample or a set-point in words, of four digits."""
    if unit == "bytes/s":
        return rate_text(value, 4)
    shown = f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{shown}%" if unit == "%" else f"{shown} {unit.replace('dropped', 'packets')}"


def text(type: Type, value: float) -> str:
    """The value as it would be written in a policy."""
    if type.name == RATE.name:
        return f"{round(value * 8)} bit"
    if type.name == PACKET_RATE.name:
        return f"{round(value)} packets/s"
    if type.name == PERCENT.name:
        return f"{value:.4f}%"
    if type.name == DURATION.name:
        return f"{round(value)}ms"
    return str(round(value))


def steps(type: Type, low: float, high: float, base: float) -> tuple[float, ...]:
    """The values that a controlled parameter takes, `base` among them.

    All, if they are few and whole; else they lie apart by one ratio.
    """
    whole = type.name not in (PERCENT.name,)
    if whole and high - low < MOST_STEPS:
        found = {float(n) for n in range(round(low), round(high) + 1)}
    else:
        begin = max(low, (high - low) / 10_000, 1.0 if whole else 0.0001)
        ratio = (high / begin) ** (1 / (MOST_STEPS - 2))
        found = {low} | {begin * ratio**n for n in range(MOST_STEPS - 1)}
        found = {float(round(value)) if whole else round(value, 4) for value in found}
    return tuple(sorted({value for value in found if low <= value <= high} | {base, low, high}))
