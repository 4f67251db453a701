"""The laws that controllers may follow: what they are called, their gains and the gains' limits.

Pure tables, for the compiler to check what a `control` block says; `runtime/laws.py`
is what the laws do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

# Larger numbers are no measurements of anything on a machine.
LARGEST: Final = 1e15


@dataclass(frozen=True)
class Gain:
    """A gain of a law: `low` and `high` are the least and the largest that make sense.

    `unit` says what it is counted in: "parameter" and "measure" (in their units), "seconds",
    "samples" (whole numbers), "share" (0 to 1), "per second", or "" for a plain number.
    `default` is None if there is none; `needed` if it must be given then.
    """

    meaning: str
    low: float
    high: float
    default: float | None = None
    unit: str = ""
    needed: bool = False


@dataclass(frozen=True)
class Law:
    """A law: `gains` by name, those common to all among them.

    With `load`, its measure is a delay (ms) and its parameter the rate of a link, whose load
    it must be told as well. With `free`, gains of any name may be given: it is the user's own.
    """

    meaning: str
    gains: Mapping[str, Gain]
    load: bool = False
    free: bool = False


_COMMON: Final = {
    "lost": Gain(
        "so many samples missing in a row lead to the safe value", 1, 1000, 5, "samples"
    ),
    "safe": Gain(
        "the value without a measure (else the file's)", -LARGEST, LARGEST, unit="parameter"
    ),
}  # fmt: skip


def _law(meaning: str, gains: dict[str, Gain], load: bool = False, free: bool = False) -> Law:
    return Law(meaning, MappingProxyType(gains | _COMMON), load, free)


def _any(meaning: str, unit: str = "") -> Gain:
    return Gain(meaning, -1e12, 1e12, unit=unit, needed=True)


LAWS: Final[Mapping[str, Law]] = MappingProxyType(
    {
        "threshold": _law(
            "one step at a time, from where the measure leaves its margin until it is back",
            {
                "step": _any("a step while the measure is under; back by it while over", "parameter"),
                "margin": Gain("how far off the measure may be", 0, 1e12, 0, "measure"),
            },
        ),
        "p": _law(
            "the file's value, plus kp for each unit that the measure is under",
            {"kp": _any("parameter for each unit of error")},
        ),
        "pi": _law(
            "as p, and ki a second for each unit, for as long as there is an error",
            {
                "kp": _any("parameter for each unit of error"),
                "ki": _any("parameter for each unit of error, a second"),
            },
        ),
        "aimd": _law(
            "up by a sum while the measure is under, to a share when it is over",
            {
                "add": Gain("up by it each period", 0, 1e12, unit="parameter", needed=True),
                "factor": Gain("to this share", 0, 1, 0.5, "share"),
            },
        ),
        "autorate": _law(
            "a link's rate follows what its bottleneck carries without delay",
            {
                "rise": Gain("at most so much more, as a share of the rate", 0.001, 10, 0.25, "per second"),
                "drift": Gain("back to the file's value while idle", 0, 10, 0.1, "per second"),
                "busy": Gain("a link that carries this share of its rate is loaded", 0.1, 1, 0.75, "share"),
                "drain": Gain("least share of the bottleneck's rate while its queue drains", 0.05, 0.95, 0.3, "share"),
                "horizon": Gain("the queue is to be gone after so long", 0.02, 10, 0.15, "seconds"),
                "empty": Gain("at least so often the queue is emptied", 1, LARGEST, 10, "seconds"),
            },
            load=True,
        ),
        "call": _law("a Python function of one's own", {}, free=True),
    }
)  # fmt: skip


def faults(law: str, gains: Mapping[str, float]) -> list[tuple[str, str]]:
    """What is wrong with the gains given for a law: (gain, in words), nothing if all is well.

    The gain is empty where it is one that is missing. Raises `KeyError` for an unknown law.
    """
    known, found = LAWS[law], []
    for name, value in sorted(gains.items()):
        gain = known.gains.get(name)
        if gain is None:
            if not known.free:
                found.append((name, f"{law} has no gain {name}: it has {', '.join(known.gains)}"))
        elif not gain.low <= value <= gain.high:
            found.append((name, f"{name} lies between {gain.low:g} and {gain.high:g}"))
        elif gain.unit == "samples" and value != int(value):
            found.append((name, f"{name} is a whole number"))
    missing = [name for name, gain in known.gains.items() if gain.needed and name not in gains]
    return found + [("", f"{law} needs {name}: {known.gains[name].meaning}") for name in missing]


def complete(law: str, gains: Mapping[str, float]) -> dict[str, float]:
    """The gains with the law's defaults for those not given, by name."""
    defaults = {n: g.default for n, g in LAWS[law].gains.items() if g.default is not None}
    return dict(sorted((defaults | dict(gains)).items()))
