"""What itm knows beside the kernel: which policies it loaded, from which file, in which order.

One JSON file per network namespace under /run/itm (or $ITM_STATE_DIR). The
kernel stays the truth about what runs; this is what the kernel cannot tell. The
file is written whole and renamed, and a lock serialises all that change it.
"""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from runtime.errors import MachineError

SCHEMA: Final = 2
_SO_NETNS_COOKIE: Final = 71  # include/uapi/asm-generic/socket.h, Linux 5.14


@dataclass(frozen=True)
class FlowRecord:
    """A flow of a loaded policy; `sets` are (family, set) that count it, for each family."""

    name: str
    key: tuple[str, ...]
    size: int
    sets: tuple[tuple[int, str], ...]
    uncounted: str  # the counter of packets that found no room, "" without one (of limits)


@dataclass(frozen=True)
class SetRecord:
    """A learned set that a policy asks or fills; `sets` are its nftables sets."""

    name: str
    size: int
    sets: tuple[str, ...]
    unlearned: str  # the counter of additions that found no room, "" without one


@dataclass(frozen=True)
class Record:
    """A loaded policy. `table` is its table's `family name`, shared by policies of one file that
    share a learned set; there its objects have `prefix` before their names."""

    name: str
    table: str
    prefix: str
    file: str  # absolute, or "-"
    shown: str  # as the user gave it
    hooks: tuple[tuple[str, int, str], ...]  # (hook, the kernel's priority, base chain)
    priority: int
    classes: tuple[str, ...]
    flows: tuple[FlowRecord, ...]
    learned: tuple[SetRecord, ...]
    noted: tuple[str, ...]  # the counters "sampled" and "recorded", as far as there are any
    base_chains: dict[str, str]  # for each base chain, nftables text that hangs it in again
    on: bool = True  # off, its base chains are gone and all else stays
    digest: str = ""  # of the table's listing, to notice what others changed
    applied: float = 0.0  # seconds since the epoch


@dataclass(frozen=True)
class State:
    """All loaded policies of a namespace, in the order they run at equal priority."""

    records: tuple[Record, ...] = ()

    def of_file(self, file: str) -> tuple[Record, ...]:
        return tuple(r for r in self.records if r.file == file)

    def find(self, name: str) -> Record | None:
        return next((r for r in self.records if r.name == name), None)

    def without(self, names: set[str]) -> "State":
        return replace(self, records=tuple(r for r in self.records if r.name not in names))


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


@contextmanager
def locked() -> Iterator["Store"]:
    """The state, for changing: at most one process of a namespace is inside.

    Raises `MachineError` if the folder cannot be used or the file is damaged.
    """
    folder = directory()
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise _unusable(folder, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Store(folder, load())
    finally:
        os.close(lock)


def load() -> State:
    """The state as it is; empty if nothing was ever loaded.

    Raises `MachineError` if the file is damaged or of another version.
    """
    path = directory() / "state.json"
    try:
        raw = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return State()
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, str(error)) from error
    try:
        data = json.loads(raw)
        if data["schema"] != SCHEMA:
            raise _damaged(path, f"it has version {data['schema']}, not {SCHEMA}")
        return State(tuple(_record(item) for item in data["policies"]))
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def _record(item: dict[str, Any]) -> Record:
    flows = tuple(
        FlowRecord(
            name=flow["name"],
            key=tuple(flow["key"]),
            size=flow["size"],
            sets=tuple((family, name) for family, name in flow["sets"]),
            uncounted=flow["uncounted"],
        )
        for flow in item["flows"]
    )
    learned = tuple(
        SetRecord(one["name"], one["size"], tuple(one["sets"]), one["unlearned"])
        for one in item["learned"]
    )
    hooks = tuple((hook, priority, chain) for hook, priority, chain in item["hooks"])
    known = {**item, "flows": flows, "hooks": hooks, "learned": learned}
    known |= {name: tuple(item[name]) for name in ("classes", "noted")}
    return Record(**known)


@dataclass
class Store:
    """The state file, under its lock."""

    folder: Path
    state: State

    def prepare(self, state: State) -> Path:
        """Write a state beside the one that holds; `commit` puts it in its place.

        Two steps, so that a full or read-only disk is found before the kernel is
        touched. Raises `MachineError`.
        """
        path = self.folder / "state.json.new"
        content = {"schema": SCHEMA, "policies": [asdict(record) for record in state.records]}
        try:
            with open(path, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _unusable(self.folder, error) from error
        return path

    def commit(self, prepared: Path, state: State) -> None:
        os.replace(prepared, self.folder / "state.json")
        self.state = state


def _unusable(folder: Path, error: OSError) -> MachineError:
    return MachineError(
        f"the state folder {folder} cannot be written: {error.strerror}",
        "run as root, or set ITM_STATE_DIR to a folder that can be written",
    )


def _damaged(path: Path, why: str) -> MachineError:
    return MachineError(
        f"the state file {path} cannot be read: {why}",
        "delete it and apply your policies again; what runs in the kernel stays until then",
    )
