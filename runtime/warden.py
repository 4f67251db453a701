"""A change that goes back by itself unless it is confirmed.

The way back is armed before the kernel is touched, in a process of its own (the
warden): its own session, no files of its parent open, deaf to the signals that end
a shell's children. It counts on the clock that nobody can set. What it goes back to
is a generation on disk, and it does so under the same lock as every other change.
Should somebody end the warden, the next command that changes anything goes back.
"""

import contextlib
import os
import signal
import syslog
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from runtime.errors import MachineError, RolledBackError
from runtime.store import Generation, Pending, Store, boot, directory, ended, locked, now, waiting

_DEAF: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGQUIT, signal.SIGTERM,
                signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR1, signal.SIGUSR2)  # fmt: skip
_LOOK: Final = 0.2  # seconds between two looks at whether it was confirmed
_RETRY: Final = 5.0  # seconds until going back is tried again where it failed
_TRIES: Final = 100


# Loads a generation that is kept, under the lock; what then holds.
GoBack = Callable[[Store, int], Generation | None]


def overdue(pending: Pending) -> bool:
    """Should it have gone back by now?"""
    return pending.boot != boot() or now() > pending.until


def arm(store: Store, generation: int, back: int, seconds: float, go_back: GoBack) -> None:
    """Start the warden, and wait until it is there. Raises `MachineError`."""
    pending = Pending(generation, back, now() + seconds, boot(), seconds)
    store.wait_for_confirmation(pending)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        # A second fork, so that nobody has to wait for the warden's end.
        try:
            os.setsid()
            if os.fork() == 0:
                _warden(pending, write_end, go_back)
        finally:
            os._exit(0)
    os.close(write_end)
    os.waitpid(child, 0)
    with os.fdopen(read_end) as pipe:
        number = pipe.read()
    if not number:
        store.settle("")
        raise MachineError("the process that would go back cannot be started; nothing was changed")
    store.wait_for_confirmation(replace(pending, warden=int(number)))


def wait(generation: int) -> None:
    """Wait until a change is confirmed. Raises `RolledBackError` if it is rolled back."""
    folder = directory()
    while True:
        # In this order: the one file becomes the other.
        pending, word = waiting(folder), ended(folder, generation)
        if word == "confirmed":
            return
        if word or pending is None or pending.generation != generation:
            word = ended(folder, generation)
            if word == "confirmed":
                return
            raise RolledBackError(
                "it was not confirmed: rolled back", "`itmc apply` loads it again"
            )
        time.sleep(_LOOK)


# The warden.


def _warden(pending: Pending, ready: int, go_back: GoBack) -> None:
    """Wait for the deadline, then go back unless it was confirmed."""
    for one in _DEAF:
        signal.signal(one, signal.SIG_IGN)
    chosen = os.environ.get("ITM_STATE_DIR")
    if chosen:  # perhaps a relative path
        os.environ["ITM_STATE_DIR"] = os.path.abspath(chosen)
    os.chdir("/")
    folder = directory()
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    # The lock, too: it is held as long as anybody has it open.
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) != ready:
            with contextlib.suppress(OSError):
                os.close(int(name))
    os.write(ready, str(os.getpid()).encode())
    os.close(ready)
    while now() < pending.until:
        if not _waits(folder, pending):
            return
        time.sleep(min(_LOOK, max(0.0, pending.until - now())))
    for _ in range(_TRIES):
        try:
            with locked() as store:
                if not _waits(folder, pending):
                    return
                made = go_back(store, pending.back)
                store.settle("rolled back")
            _log(f"not confirmed within {pending.seconds:g} s: {told(made)}")
            return
        except Exception as error:  # whatever it is: it may be mended meanwhile
            _log(f"cannot go back: {error}")
            time.sleep(_RETRY)


def _waits(folder: Path, pending: Pending) -> bool:
    """Does it still wait? Damage does not keep it from going back."""
    try:
        found = waiting(folder)
    except MachineError:
        return True
    return found is not None and found.generation == pending.generation


def told(made: Generation | None) -> str:
    """What was gone back to, in words."""
    return f"rolled back to generation {made.number}" if made else "rolled back to nothing loaded"


def _log(message: str) -> None:
    syslog.openlog("itm", syslog.LOG_PID, syslog.LOG_DAEMON)
    syslog.syslog(syslog.LOG_WARNING, message)
