"""What nftables says of our tables, read; pure.

A table is listed as text, without elements and counts and with handles: of rules
that is both quick and complete, where the JSON of 1.0.6 leaves things out. Only the
types of keys come from JSON, for the text names the expression they came from. The
elements of a set are listed as text, too, so that their keys can be said again as
they stand.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from itmlang.nft.model import BaseHook

_HANDLE: Final = re.compile(r" # handle (\d+)$")
_BASE: Final = re.compile(
    r'type (?P<kind>\w+) hook (?P<hook>\w+)(?: devices? = \{ "?(?P<first>[^", }]+)"? \}'
    r'| device "?(?P<device>[^" ]+)"?)? priority (?P<priority>-?\d+);'
)
_TIME: Final = re.compile(r"(\d+)(ms|d|h|m|s)")
_UNITS: Final = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}
_SETS: Final = ("set", "map")
_DEFAULT: Final = re.compile(r"^\s*timeout (\w+)$", re.MULTILINE)  # of a set
_WORD: Final = r'(?:"[^"]*"|[^\s,{}"]+)'
_ELEMENT: Final = re.compile(
    rf"(?P<key>{_WORD}(?: \. {_WORD})*)"
    r"(?: counter packets (?P<packets>\d+) bytes (?P<bytes>\d+))?"
    r"(?: (?:limit rate|quota|ct count) [^,}]*?)?"
    r"(?: timeout (?P<timeout>\w+))?(?: expires (?P<expires>\w+))?(?=,|\s*\})"
)


@dataclass(frozen=True)
class RunningChain:
    """A chain: where it hangs, its rules as nftables lists them, and their handles."""

    hook: BaseHook | None
    rules: tuple[str, ...]
    handles: tuple[int, ...]
    drops: bool = False  # its policy, of a base chain; all of ours accept

    @cached_property
    def digest(self) -> str:
        """The same as long as nobody changes the chain."""
        return digest((repr(self.hook), str(self.drops), *self.rules))


@dataclass(frozen=True)
class RunningSet:
    """A set: the types of its key, its size (0: the kernel's own) and time-out (ms, None for none)."""

    types: tuple[str, ...]
    size: int
    timeout: int | None
    flags: frozenset[str]
    kind: str = "set"  # or "map"


@dataclass(frozen=True)
class Running:
    """One of our tables as the kernel has it.

    `values` are digests of the elements of its sets with fixed values, `flags` the
    table's own, `others` objects of kinds that no policy makes, as (kind, name).
    """

    chains: Mapping[str, RunningChain]
    sets: Mapping[str, RunningSet]
    counters: tuple[str, ...]
    values: Mapping[str, str]
    flags: str = ""
    others: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Element:
    """An element of a set: its key as nftables writes it, field by field.

    `timeout` and `expires` are in milliseconds; None where the set's own holds, or none.
    """

    key: tuple[str, ...]
    packets: int = 0
    bytes: int = 0
    timeout: int | None = None
    expires: int | None = None


def digest(lines: Iterable[str]) -> str:
    """A short name for a text."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def read_table(text: str, sets: Sequence[Mapping[str, Any]] = ()) -> Running:
    """A table from its listing (`list table`, stateless, terse, with handles), without `values`.

    `sets` is the JSON of its sets.
    """
    types = {item["set"]["name"]: item["set"]["type"] for item in sets if "set" in item}
    chains: dict[str, RunningChain] = {}
    found: dict[str, RunningSet] = {}
    counters: list[str] = []
    others: list[tuple[str, str]] = []
    flags = ""
    for kind, name, body in _blocks(text):
        if kind == "chain":
            chains[name] = _chain(body)
        elif kind in _SETS:
            found[name] = _set(body, types.get(name, ()), kind)
        elif kind == "counter":
            counters.append(name)
        elif kind == "flags":
            flags = name
        else:
            others.append((kind, name))
    return Running(chains, found, tuple(counters), {}, flags, tuple(others))


def _blocks(text: str) -> Iterator[tuple[str, str, list[str]]]:
    """(kind, name, lines) for each object of a listed table."""
    kind, name, body = "", "", []
    for line in text.splitlines():
        if line.startswith("\t\t"):
            body.append(line[2:])
        elif line.startswith("\t}") and kind:
            yield kind, name, body
            kind = ""
        elif line.startswith("\tflags "):
            yield "flags", line.removeprefix("\tflags "), []
        elif line.startswith("\t"):
            *words, name = line.partition(" {")[0].split()
            kind, body = " ".join(words), []


def _chain(body: Sequence[str]) -> RunningChain:
    hook, drops = None, False
    rules, handles = [], []
    for line in body:
        base = _BASE.match(line) if line.startswith("type ") else None
        if base:
            device = base["device"] or base["first"]
            at = f'{base["hook"]} "{device}"' if device else base["hook"]
            hook = BaseHook(at, int(base["priority"]), base["kind"])
            drops = "policy drop" in line
            continue
        handle = _HANDLE.search(line)
        if handle:
            rules.append(line[: handle.start()])
            handles.append(int(handle[1]))
    return RunningChain(hook, tuple(rules), tuple(handles), drops)


def _set(body: Sequence[str], types: str | Sequence[str], kind: str) -> RunningSet:
    size, timeout, flags = 0, None, frozenset[str]()
    for line in body:
        word, _, rest = line.partition(" ")
        if word == "type" and kind == "map":
            types = tuple(rest.partition(" : ")[0].split(" . "))
        elif word == "size":
            size = int(rest.split()[0])
        elif word == "timeout":
            timeout = milliseconds(rest)
        elif word == "flags":
            flags = frozenset(rest.split(","))
    fields = (types,) if isinstance(types, str) else tuple(types)
    return RunningSet(fields, size, timeout, flags, kind)


def milliseconds(text: str) -> int:
    """A time as nftables writes it: `1m30s500ms`."""
    return sum(int(number) * _UNITS[unit] for number, unit in _TIME.findall(text))


def read_elements(text: str) -> list[Element]:
    """The elements of a set, from its listing.

    Older kernels (6.1 does, 6.18 does not) list the set's time-out again at each element
    that a packet added (net/netfilter/nft_dynset.c): that is not the element's own.
    """
    head, found, listed = text.partition("elements = {")
    if not found:
        return []
    default = _DEFAULT.search(head)
    return [
        Element(
            tuple(_fields(match["key"])),
            int(match["packets"] or 0),
            int(match["bytes"] or 0),
            _own(match["timeout"], default and default[1]),
            milliseconds(match["expires"]) if match["expires"] else None,
        )
        for match in _ELEMENT.finditer(listed)
    ]


def _own(timeout: str | None, default: str | None) -> int | None:
    return None if timeout is None or timeout == default else milliseconds(timeout)


def _fields(key: str) -> list[str]:
    return key.split(" . ") if '"' not in key else re.findall(rf"({_WORD})(?: \. |$)", key)
