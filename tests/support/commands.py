"""`itmc` as its own process in the caller's network namespace, and what it leaves there."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime import store

# How many times longer than usual the tests wait: where the machine is emulated.
PATIENCE = float(os.environ.get("ITM_PATIENCE", "1"))
ROOT = Path(__file__).parents[2]
_MAIN = "from runtime.cli.main import main; main()"


def command(before: str = "") -> list[str]:
    """How to start `itmc`; `before` is Python that runs first, to break something."""
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{before}\n{_MAIN}"]  # fmt: skip


def run(
    *arguments: str, before: str = "", by: Sequence[str] = (), text: str = ""
) -> subprocess.CompletedProcess[str]:
    """`itmc` with these arguments, started `by` another command; it never ends in a traceback."""
    done = subprocess.run(
        [*by, *command(before), *arguments],
        input=text, capture_output=True, text=True, timeout=60 * PATIENCE, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr
    return done


def one_message(done: subprocess.CompletedProcess[str]) -> str:
    """The only message of a command that failed, without its help."""
    messages = [line for line in done.stderr.splitlines() if not line.startswith(" ")]
    assert len(messages) == 1, done.stderr
    return messages[0]


def rules() -> str:
    """All rules of the namespace as nft lists them: no counts, no elements, objects sorted."""
    listing = subprocess.run(
        ["nft", "--stateless", "--terse", "--numeric", "list", "ruleset"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    table, found = "", []
    for line in listing.splitlines():
        if line.startswith("table "):
            table = line
        elif line.startswith("\t") and not line.startswith("\t\t") and line != "\t}":
            found.append(f"{table} {line.strip()}")
        elif line.startswith("\t\t"):
            found[-1] += f"\n{line}"
    return "\n".join(sorted(found))


def lasting(seconds: float) -> str:
    """A time for `itmc`, in which this machine gets as far as most do in these seconds."""
    milliseconds = round(seconds * 1000 * PATIENCE)
    return f"{milliseconds}ms" if milliseconds % 1000 else f"{milliseconds // 1000}s"


def until(holds: Callable[[], object], limit: float = 15.0) -> float:
    """Wait until something holds; how long it took."""
    begun = time.monotonic()
    while not holds():
        assert time.monotonic() - begun < limit * PATIENCE, "it never came"
        time.sleep(0.02)
    return time.monotonic() - begun


def pending() -> dict[str, object]:
    """What waits to be confirmed, from disk; empty for nothing."""
    try:
        found: dict[str, object] = json.loads((store.directory() / "pending.json").read_text())
    except FileNotFoundError:
        return {}
    return found


def alive(process: int) -> bool:
    """Does it run? Whoever ended waits for process 1 to look, as all orphans do."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def processes() -> dict[int, str]:
    """The processes inside the caller's namespace, but the caller: their states."""
    own, found = os.stat("/proc/thread-self/ns/net"), {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            there = os.stat(folder / "ns/net")
            if int(folder.name) != os.getpid() and there.st_ino == own.st_ino:
                found[int(folder.name)] = (folder / "stat").read_text().rpartition(")")[2].split()[0]  # fmt: skip
    return found


def zombies() -> list[int]:
    """Children of the caller that have ended and that it did not wait for."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state == "Z" and int(parent) == os.getpid():
                found.append(int(folder.name))
    return found


@contextmanager
def nothing_left() -> Iterator[None]:
    """End what a failed test leaves waiting in the namespace."""
    try:
        yield
    finally:
        for process in processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
