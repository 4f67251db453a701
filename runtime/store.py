"""The state on disk: generations, which of them holds, and the lock that serialises all changes.

A generation is written whole under its number before the kernel is touched, and
`state.json` names the one that holds; it is renamed into place after the transaction.
So whatever ends a command leaves the old or the new. The last generations are kept,
for `rollback`. The one that was confirmed last is kept where it survives a reboot.
"""

import contextlib
import fcntl
import getpass
import gzip
import json
import os
import socket
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, Final

from runtime.errors import MachineError
from runtime.listing import Element
from runtime.migrate import Kept, Left
from runtime.state import Entry, State
from runtime.units import from_json, to_json

SCHEMA: Final = 6
KEPT: Final = 10  # generations
# What a waiting generation's file is called once it is settled.
_ENDS: Final = {"confirmed": "confirmed.json", "rolled back": "rolled-back.json"}
_SO_NETNS_COOKIE: Final = 71  # include/uapi/asm-generic/socket.h, Linux 5.14


@dataclass(frozen=True)
class Generation:
    """One state that was loaded: its number, that of the one before (0 for none), when
    (seconds since the epoch), by whom, by which command, and the digest of its plan."""

    number: int
    parent: int
    when: float
    who: str
    why: str
    digest: str


@dataclass(frozen=True)
class Pending:
    """A change that waits for `confirm`: until when (seconds of CLOCK_BOOTTIME, which no
    set clock moves), and the generation to go back to."""

    generation: int
    back: int
    until: float
    boot: str  # the boot that the clock counts from
    seconds: float
    warden: int = 0  # the process that goes back


def directory() -> Path:
    """The folder of this network namespace's state."""
    base = Path(os.environ.get("ITM_STATE_DIR") or "/run/itm")
    return base / _namespace()


def _namespace() -> str:
    """A name for the network namespace: its cookie, which is never used again until reboot."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            cookie = probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
            return f"net-{int.from_bytes(cookie, 'little'):x}"
        except OSError:
            return f"netns-{os.stat('/proc/thread-self/ns/net').st_ino}"


def boot_file(*, confined: bool = False) -> Path | None:
    """Where the confirmed generation of this namespace survives a reboot.

    Only the host's own namespace and those of `ip netns` are there again after one;
    None for others. With `confined`, a process that may not look at process 1, as the
    service at boot, is taken to be in the host's unless it is in one of the named.
    """
    own = os.stat("/proc/thread-self/ns/net")
    name = other = ""
    try:
        first = os.stat("/proc/1/ns/net")
        if (first.st_dev, first.st_ino) == (own.st_dev, own.st_ino):
            name = "host"
    except OSError:
        other = "host" if confined else ""
    for place in sorted(Path("/run/netns").glob("*")) if not name else ():
        with contextlib.suppress(OSError):
            found = place.stat()
            if (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino):
                name = f"netns-{place.name}"
    name = name or other
    if not name:
        return None
    chosen = os.environ.get("ITM_STATE_DIR")
    base = Path(chosen) / "boot" if chosen else Path("/var/lib/itm")
    return base / f"{name}.json.gz"


@contextmanager
def locked(known: State | None = None) -> Iterator["Store"]:
    """The state, for changing: at most one process of a namespace is inside.

    What is `known` already is not read again if it still holds.
    Raises `MachineError` if the folder cannot be used or the state is damaged.
    """
    folder = directory()
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise _unusable(folder, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Store(folder, known)
    finally:
        os.close(lock)


@contextmanager
def locked_at_once() -> Iterator["Store | None"]:
    """As `locked`, but None if somebody else is inside, or nothing was ever loaded."""
    folder = directory()
    try:
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        yield None
        return
    try:
        yield Store(folder)
    finally:
        os.close(lock)


@contextmanager
def unchanged() -> Iterator[bool]:
    """Does nobody change the state, or the kernel's tables, now? Then nobody does meanwhile, for
    what writes elements and rates, but no rule. Who looks at them is in nobody's way."""
    try:
        lock = os.open(directory() / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # nothing was ever loaded
        yield False
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        yield False
        return
    try:
        yield True
    finally:
        os.close(lock)


@contextmanager
def reading(known: State | None = None) -> Iterator["Store"]:
    """The state, for looking: nobody changes it, or the kernel's tables, meanwhile.

    Raises `MachineError` if it is damaged or of another version.
    """
    folder = directory()
    try:
        lock = os.open(folder / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # nothing was ever loaded, or it is not ours to read
        yield Store(folder, known)
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield Store(folder, known)
    finally:
        os.close(lock)


def load() -> State:
    """The state as it is; empty if nothing was ever loaded.

    Raises `MachineError` if it is damaged or of another version.
    """
    with reading() as store:
        return store.state


class Store:
    """The state of a namespace on disk."""

    def __init__(self, folder: Path, known: State | None = None) -> None:
        self.folder = folder
        self.state, self._numbers = self._current(folder / "state.json", known or State())

    @property
    def numbers(self) -> tuple[int, ...]:
        """The generations that are kept."""
        return tuple(self._numbers)

    def _current(self, path: Path, known: State) -> tuple[State, list[int]]:
        data = read(path)
        if data is None:
            return State(), []
        with _reading(path):
            if data["schema"] != SCHEMA:
                raise _other_version(path, data["schema"])
            number = int(data["generation"])
            applied = {name: float(when) for name, when in data["applied"].items()}
            listed = {
                table: {name: str(seen) for name, seen in names.items()}
                for table, names in data["listed"].items()
            }
            kept = [int(one) for one in data["kept"]]
            state = known
            if (number, applied) != (known.generation, {e.name: e.applied for e in known.policies}):
                state = self.generation(number)[0] if number else State()
            entries = (replace(e, applied=applied.get(e.name, 0.0)) for e in state.policies)
            state = replace(state, policies=tuple(entries), listed=listed, generation=number)
            return state, kept

    def generation(self, number: int) -> tuple[State, Generation]:
        """A generation that was kept. Raises `MachineError` if it is damaged or gone."""
        path = self._path(number)
        state, made = read_generation(path)
        if made.number != number:
            raise _damaged(path, "it is another generation")
        return state, made

    def generations(self) -> list[Generation]:
        """Those that are kept, the latest first; damaged ones are left out."""
        found = []
        for number in reversed(self._numbers):
            with contextlib.suppress(MachineError):
                found.append(self.generation(number)[1])
        return found

    def _path(self, number: int) -> Path:
        return self.folder / f"generation-{number}.json.gz"

    def prepare(
        self,
        state: State,
        why: str,
        digest: str,
        was: Mapping[str, str] | None = None,
    ) -> State:
        """Write a new generation and the state that names it beside those that hold.

        `commit` puts it in its place: two steps, so that a full or read-only disk is found
        before the kernel is touched. Returns the state with its number. Raises `MachineError`.
        """
        number = max([*self._numbers, self.state.generation, 0]) + 1
        parent = self.state.generation
        made = Generation(number, parent, time.time(), who(), why, digest)
        write(self._path(number), _compressed(_text(state, made)))
        state = replace(state, generation=number)
        numbers = [*self._numbers, number]
        # The one that holds may be the oldest, after a rollback: it is the way back.
        going = [one for one in numbers if one not in (parent, number)][
            : max(0, len(numbers) - KEPT)
        ]
        self._prepare_state(state, [one for one in numbers if one not in going], was or {})
        return state

    def prepare_back(self, state: State, was: Mapping[str, str]) -> State:
        """Prepare the state to be one of the generations that are kept (`state.generation`)."""
        self._prepare_state(state, self._numbers, was)
        return state

    def _prepare_state(self, state: State, numbers: list[int], was: Mapping[str, str]) -> None:
        content = {
            "schema": SCHEMA,
            "generation": state.generation,
            "applied": {entry.name: entry.applied for entry in state.policies},
            "listed": {path: dict(seen) for path, seen in state.listed.items()},
            "kept": numbers,
            "was": dict(was),  # the tables that the transaction touches, before it
        }
        write(self.folder / "state.json.new", json.dumps(content).encode())
        self._next = numbers

    def commit(self, state: State) -> None:
        """The prepared state holds now; generations beyond those that are kept go."""
        os.replace(self.folder / "state.json.new", self.folder / "state.json")
        self.state, self._numbers = state, self._next
        self._tidy()

    def begun(self) -> tuple[State, dict[str, str]] | None:
        """What a command that was ended had prepared and not committed; None for nothing.

        With the tables that its transaction touches, as they were before it.
        """
        path = self.folder / "state.json.new"
        if not path.exists():
            return None
        try:
            state, self._next = self._current(path, self.state)
            was = {str(table): str(form) for table, form in (read(path) or {})["was"].items()}
        except (MachineError, KeyError, AttributeError):
            self.abandon()
            return None
        return state, was

    def abandon(self) -> None:
        """What was prepared will not hold."""
        with contextlib.suppress(OSError):
            (self.folder / "state.json.new").unlink(missing_ok=True)
            self._tidy()

    def _tidy(self) -> None:
        """Files of generations that are not kept go, and what was never written to its end."""
        for path in self.folder.glob("*-*.json.gz"):
            number = path.name.partition("-")[2].partition(".")[0]
            if number.isdigit() and int(number) not in self._numbers:
                path.unlink(missing_ok=True)
        for path in self.folder.glob("*.part"):
            path.unlink(missing_ok=True)

    def seen(self, listed: Mapping[str, Mapping[str, str]]) -> None:
        """Remember how the kernel lists what was loaded."""
        state = replace(self.state, listed=listed)
        self._prepare_state(state, self._numbers, {})
        self.commit(state)

    # What a generation had learned when it was left.

    def leave(self, number: int, left: Left) -> None:
        """Keep what goes as the transaction leaves a generation, instead of what went before."""
        if not (left.sets or left.counters):
            with contextlib.suppress(OSError):
                self._left(number).unlink(missing_ok=True)
            return
        content = {
            "at": now(),
            "boot": boot(),
            "sets": [
                [path, name, kept.key, [[e.key, e.packets, e.bytes, e.timeout, e.expires]
                                        for e in kept.elements]]
                for (path, name), kept in left.sets.items()
            ],
            "counters": [[*key, *counted] for key, counted in left.counters.items()],
        }  # fmt: skip
        write(self._left(number), _compressed(json.dumps(content).encode()))

    def left(self, number: int) -> Left:
        """What was kept of a generation; nothing if that cannot be read or was before a reboot."""
        try:
            with _reading(self._left(number)):
                data = json.loads(gzip.decompress(self._left(number).read_bytes()))
                if data["boot"] != boot():
                    return Left()
                sets = {
                    (path, name): Kept(
                        tuple(key), tuple(Element(tuple(k), *rest) for k, *rest in elements)
                    )
                    for path, name, key, elements in data["sets"]
                }
                counters = {(path, name): (p, b) for path, name, p, b in data["counters"]}
                return Left(sets, counters).later(int((now() - data["at"]) * 1000))
        except MachineError:
            return Left()

    def _left(self, number: int) -> Path:
        return self.folder / f"left-{number}.json.gz"

    # What waits to be confirmed.

    @property
    def pending(self) -> Pending | None:
        return waiting(self.folder)

    def wait_for_confirmation(self, pending: Pending) -> None:
        write(self.folder / "pending.json", json.dumps(asdict(pending)).encode())

    def settle(self, word: str) -> None:
        """What waited is settled: "confirmed", "rolled back", or "" if it never began.

        A rename, which takes no room on the disk. Raises `MachineError`.
        """
        path = self.folder / "pending.json"
        try:
            if word:
                os.replace(path, self.folder / _ENDS[word])
            else:
                path.unlink(missing_ok=True)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise _unusable(self.folder, error) from error

    @property
    def ended(self) -> str:
        """How the waiting of the latest generation ended; "" if it did not wait, or waits."""
        return ended(self.folder, self._numbers[-1]) if self._numbers else ""

    # What survives a reboot.

    def keep_for_boot(self) -> str:
        """Keep the state that holds where it survives a reboot; why not, or ""."""
        path = boot_file()
        if path is None:
            return ""
        try:
            if not self.state.generation:
                path.unlink(missing_ok=True)
                return ""
            content = self._path(self.state.generation).read_bytes()
            if not path.exists() or path.read_bytes() != content:
                path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
                write(path, content)
        except (OSError, MachineError) as error:
            reason = error if isinstance(error, OSError) else error.__cause__
            return f"{path} cannot be written: {getattr(reason, 'strerror', '') or error}"
        return ""


def write(path: Path, content: bytes) -> None:
    """The whole file or nothing. Raises `MachineError`."""
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise _unusable(path.parent, error) from error


def read_generation(path: Path) -> tuple[State, Generation]:
    """A generation from its file. Raises `MachineError` if it is damaged or gone."""
    with _reading(path):
        data = json.loads(gzip.decompress(path.read_bytes()))
        if data["schema"] != SCHEMA:
            raise _other_version(path, data["schema"])
        units = tuple(from_json(unit) for unit in data["units"])
        policies = tuple(Entry(name, bool(on)) for name, on in data["policies"])
        made = Generation(**data["generation"])
        if sorted(e.name for e in policies) != sorted(n for unit in units for n in unit.names):
            raise ValueError("policies without a unit, or units without a place")
        resting = frozenset(data["resting"])
        return State(units, policies, {}, made.number, resting), made


def _text(state: State, made: Generation) -> bytes:
    content = {
        "schema": SCHEMA,
        "generation": asdict(made),
        "policies": [[entry.name, entry.on] for entry in state.policies],
        "resting": sorted(state.resting),
        "units": [to_json(unit) for unit in state.units],
    }
    return json.dumps(content, separators=(",", ":")).encode()


def _compressed(content: bytes) -> bytes:
    # Without the time: gzip refuses those beyond 2106, and a clock may stand anywhere.
    return gzip.compress(content, 1, mtime=0)


def read(path: Path) -> dict[str, Any] | None:
    """What a small JSON file holds, None if there is none. Raises `MachineError` if damaged."""
    with _reading(path):
        try:
            data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        if not isinstance(data, dict):
            raise ValueError("no object")
        return data


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise _damaged(path, "it is gone") from error
    except (OSError, zlib.error, EOFError) as error:
        raise _damaged(path, getattr(error, "strerror", "") or "it cannot be read") from error
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError,
            RecursionError) as error:  # fmt: skip
        raise _damaged(path, "it does not hold what it should") from error


def waiting(folder: Path) -> Pending | None:
    """The change that waits to be confirmed; None for none. Raises `MachineError` if damaged."""
    path = folder / "pending.json"
    data = read(path)
    if data is None:
        return None
    with _reading(path):
        until, seconds = float(data["until"]), float(data["seconds"])
        if not isfinite(until):
            raise ValueError("no time")
        return Pending(
            int(data["generation"]),
            int(data["back"]),
            until,
            str(data["boot"]),
            seconds,
            int(data["warden"]),
        )


def ended(folder: Path, generation: int) -> str:
    """How the waiting of a generation ended: "confirmed", "rolled back", "" if it did not."""
    for word, name in _ENDS.items():
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            if json.loads((folder / name).read_text())["generation"] == generation:
                return word
    return ""


def now() -> float:
    """Seconds that no set clock moves: since the boot, sleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot() -> str:
    """Which boot `now` counts from."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def who() -> str:
    """Who acts: the user who logged in, also behind sudo."""
    with contextlib.suppress(OSError, KeyError):
        return os.environ.get("SUDO_USER") or getpass.getuser()
    return str(os.getuid())


def _unusable(folder: Path, error: OSError) -> MachineError:
    return MachineError(
        f"the state folder {folder} cannot be written: {error.strerror}; nothing was changed",
        "run as root, or set ITM_STATE_DIR to a folder that can be written",
    )


def _damaged(path: Path, why: str) -> MachineError:
    what = "generation" if path.name.startswith("generation-") else "state file"
    return MachineError(
        f"the {what} {path} cannot be used: {why}; nothing was changed",
        f"what runs in the kernel stays; to begin anew, delete the folder {path.parent} and "
        "apply your policies again",
    )


def _other_version(path: Path, found: object) -> MachineError:
    return MachineError(
        f"the state file {path} has version {found}, not {SCHEMA}; nothing was changed",
        "another version of itm wrote it: use that one, or delete the folder "
        f"{path.parent} and apply your policies again; what runs in the kernel stays until then",
    )
