"""What controllers decided: lines of JSON beside the state, of bounded size.

Each has the time (seconds since the epoch), what is written, where it is then, the sample
with its unit and set-point, the reason in words, and what stood against a move.
"""

import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

LARGEST: Final = 1 << 20  # bytes of a log; one more of that size is kept
MOST: Final = 1000  # decisions that are read


def log_file(folder: Path, policy: str) -> Path:
    """Where a policy's decisions are written."""
    return folder / f"control-{policy}.jsonl"


def choice_file(folder: Path, overlay: str) -> Path:
    """Where an overlay's choice of paths is kept for its next process."""
    return folder / f"overlay-{overlay}.json"


def lines(folder: Path, policy: str) -> list[str]:
    """The log of a policy's controllers as it is, the oldest line first."""
    found: list[str] = []
    path = log_file(folder, policy)
    for one in (path.with_name(path.name + ".1"), path):
        found += _read(one)
    return found


def decisions(folder: Path, policy: str, most: int = MOST) -> list[Mapping[str, Any]]:
    """The last decisions of a policy's controllers, the oldest first."""
    return [one for line in lines(folder, policy)[-most:] for one in parsed(line)]


def last(
    folder: Path, policy: str, written: Collection[str], since: float
) -> dict[str, Mapping[str, Any]]:
    """The last decision about each of these that are written, of those made since a time
    (seconds since the epoch). Where that has no value, it has that of the one before."""
    found: dict[str, dict[str, Any]] = {}
    path = log_file(folder, policy)
    for file in (path, path.with_name(path.name + ".1")):
        for line in reversed(_read(file)):
            for one in parsed(line):
                if one.get("time", 0.0) < since:
                    return dict(found)
                if one.get("written") in written:
                    known = found.setdefault(one["written"], dict(one))
                    if "value" in one:
                        known.setdefault("value", one["value"])
                if len(found) == len(written) and all("value" in each for each in found.values()):
                    return dict(found)
    return dict(found)


def parsed(line: str) -> list[Mapping[str, Any]]:
    """The decision of a line; none if that was cut off as it was written."""
    with suppress(ValueError):
        found = json.loads(line)
        if isinstance(found, dict):
            return [found]
    return []


def forget(folder: Path, but: Collection[str]) -> None:
    """Remove what is kept of decisions, but of these policies."""
    for path in (*folder.glob("control-*.jsonl*"), *folder.glob("overlay-*.json")):
        if path.name.partition("-")[2].partition(".")[0] not in but:
            with suppress(OSError):
                path.unlink()


def _read(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
