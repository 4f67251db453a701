"""A process that calls a policy's timers: `every 10s call "module:function"`.

Each has a thread of its own, so that a slow one holds up no other. A function that is still
at it when its time comes again is not called a second time: that is counted. One that
raises costs nothing but a line in the log, at a bounded rate.
"""

import selectors
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Final

from itmlang.control import Timer
from runtime.handlers import Handler, HandlerError, described, load
from runtime.jobs import TimerJob
from runtime.worker import TICK, die_with_parent, hear, say

_PATIENCE: Final = 10.0  # seconds between two lines about one timer


def work(job: TimerJob, link: socket.socket) -> None:
    """Call the timers until the parent says "stop" or is gone."""
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.dont_write_bytecode = True
    try:
        handlers = load([timer.target for timer in job.timers], job.unit.beside, "")
    except HandlerError as error:
        say(link, {"error": str(error), "target": error.target})
        return
    rings = [_Ring(timer, handlers[timer.target], link) for timer in job.timers]
    say(link, {"ready": True})
    with selectors.DefaultSelector() as selector:
        selector.register(link, selectors.EVENT_READ)
        while True:
            if selector.select(TICK):
                message = hear(link)
                if message is None or message.get("command") == "stop":
                    return  # the threads are daemons: they end with the process
                if message.get("command") == "go":
                    for ring in rings:
                        ring.start()
                if message.get("command") == "reload":
                    say(link, {"restarting": True})
                    return
            say(
                link,
                {"counts": {"timers": {f"{r.target} {r.timer.period}": r.counts() for r in rings}}},
            )


@dataclass
class _Ring:
    """One timer: `called` times, `skipped` while it was still at it, `failed`."""

    timer: Timer
    handler: Handler
    link: socket.socket
    called: int = 0
    skipped: int = 0
    failed: int = 0
    _busy: threading.Event = field(default_factory=threading.Event)
    _told: float = -_PATIENCE

    @property
    def target(self) -> str:
        return self.timer.target

    def counts(self) -> dict[str, int]:
        return {"called": self.called, "skipped": self.skipped, "failed": self.failed}

    def start(self) -> None:
        threading.Thread(target=self._run, daemon=True, name=self.target).start()

    def _run(self) -> None:
        period = self.timer.period / 1000
        due = time.monotonic() + period
        while True:
            time.sleep(max(0.0, due - time.monotonic()))
            self._call()
            late = time.monotonic() - due
            missed = int(late / period)
            self.skipped += missed
            due += (missed + 1) * period

    def _call(self) -> None:
        self.called += 1
        try:
            self.handler.function()
        except BaseException as error:  # sys.exit() as well: it is the user's function
            self.failed += 1
            now = time.monotonic()
            if now - self._told >= _PATIENCE:
                self._told = now
                say(self.link, {"log": f"{self.target} failed: {described(error)}"})
