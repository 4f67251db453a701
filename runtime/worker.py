"""A process that serves one queue of a policy.

It loads the handlers, opens the queue, and then reads, answers and does what else the
engine asks for, until it is told to end: then it answers what waits, and leaves. Twice a
second it says to its parent what it did; a parent that is gone takes it along. An alarm
four times a second finds a handler that does not come back, and breaks it off; while one
is merely slow, it says that the worker lives.
"""

import ctypes
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from itmlang import ir
from runtime.errors import MachineError
from runtime.handlers import Handler, HandlerError, HungError, load, reload
from runtime.jobs import QueueJob
from runtime.server import ALARM, Server, watching
from runtime.units import Unit, replay

TICK: Final = 0.5  # seconds between two signs of life
_LONGEST_LOAD: Final = 40  # looks that it may take to load handlers anew
_LATEST: Final = 12  # looks after which a worker ends that was told to
_PR_SET_PDEATHSIG: Final = 1  # include/uapi/linux/prctl.h
_LONGEST_MESSAGE: Final = 1 << 16


def policy_of(unit: Unit, name: str) -> ir.Policy:
    """A policy of a unit, compiled from its texts."""
    from itmlang.pipeline import compile

    result = compile(unit.source, replay(unit), given=unit.given)
    return next(policy for policy in result.policies if policy.name == name)


def work(job: QueueJob, link: socket.socket) -> None:
    """Serve a queue until the parent says "stop" or is gone."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # A cached module is taken for the file's as long as their second is the same.
    sys.dont_write_bytecode = True
    try:
        policy = policy_of(job.unit, job.queue.policy)
        handlers = load(job.targets, job.unit.beside)
        worker = Worker(job, policy, handlers, link)
    except HandlerError as error:
        say(link, {"error": str(error), "target": error.target})
        return
    except MachineError as error:
        say(link, {"error": error.message})
        return
    worker.run()


class Worker:
    def __init__(
        self,
        job: QueueJob,
        policy: ir.Policy,
        handlers: Mapping[str, Handler],
        link: socket.socket,
    ) -> None:
        self._job, self._link = job, link
        self._stopping = False
        signal.signal(signal.SIGTERM, self._stop)  # from here on, packets may wait
        self._server = Server(policy, job.queue, job.number, handlers, self._log)
        self._late = 0  # looks since it was told to end
        self._loading = 0  # looks while handlers are loaded anew
        self._called = 0

    def run(self) -> None:
        server = self._server
        with watching(self._look), selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ, server.serve)
            selector.register(self._link, selectors.EVENT_READ, self._listen)
            self._ready()
            due = time.monotonic()
            while not self._stopping:
                now = time.monotonic()
                if now >= due:
                    self._tell()
                    due = now + TICK
                for key, _ in selector.select(max(0.0, due - now)):
                    key.data()
            server.close()
        self._tell()

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _ready(self) -> None:
        """Say so, with a copy of the queue's socket."""
        with suppress(OSError):
            socket.send_fds(self._link, [b'{"ready": true}'], [self._server.fileno()])

    def _look(self) -> None:
        """See whether a handler hangs; raises `HungError` in it."""
        if self._stopping:
            self._late += 1
            if self._late > _LATEST:
                os._exit(1)  # it caught what should have ended it
        if self._loading:
            self._loading += 1
            if self._loading > _LONGEST_LOAD:
                raise HungError
        called = self._server.engine.calling
        if called != self._called:
            self._called = called
            say(self._link, {"alive": True})
        self._server.look()

    def _log(self, text: str) -> None:
        say(self._link, {"log": text})

    def _tell(self) -> None:
        self._server.refresh()
        say(self._link, {"counts": self._server.told()})

    def _listen(self) -> None:
        message = hear(self._link)
        if message is None or message.get("command") == "stop":
            self._stopping = True
        elif message.get("command") == "reload":
            self._reload()

    def _reload(self) -> None:
        try:
            self._loading = 1
            handlers = reload(self._job.targets, self._job.unit.beside)
        except HandlerError as error:
            say(self._link, {"reloaded": False, "error": str(error), "target": error.target})
            return
        except HungError:
            late = f"it takes more than {_LONGEST_LOAD * ALARM:.0f} s to load the handlers"
            say(self._link, {"reloaded": False, "error": late})
            return
        finally:
            self._loading = 0
        if self._server.reload(handlers):
            say(self._link, {"reloaded": True})
        else:
            # Another reader is needed, or more of each packet: a fresh process opens the queue anew.
            say(self._link, {"restarting": True})
            self._stopping = True


def say(link: socket.socket, message: Mapping[str, Any]) -> None:
    """Say something to the supervisor, if it listens."""
    with suppress(OSError):  # nobody listens: the next read finds that out
        link.send(json.dumps(message).encode(), socket.MSG_DONTWAIT)


def hear(link: socket.socket) -> dict[str, Any] | None:
    """A message, None if the other side is gone."""
    try:
        raw = link.recv(_LONGEST_MESSAGE)
    except BlockingIOError:
        return {}
    except OSError:
        return None
    found: dict[str, Any] | None = json.loads(raw) if raw else None
    return found


def die_with_parent() -> None:
    """Have this process end when its parent does."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
