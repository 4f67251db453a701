"""Programs that handle packets themselves: a hook, an interest, five functions, and timers.

Each registration is a policy of its own (`runtime/program.py`), loaded like any other, so
`itmc list`, `status`, `disable` and `remove` know it. Its queue is served here, though:
one loop in the program's main thread waits for packets, timers, and whoever asks how it
goes. Rules are loaded and taken away by a thread beside it, one change after the other,
while packets are served on: what waits in a queue when a hook goes is lost, and so
hardly anything waits.

A program that is killed leaves its policies behind: without a sign of life the kernel does
to their packets what `fail` says. Whichever program begins next takes them away.
"""

import logging
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from itmlang.diagnostics import CompileError
from itmlang.headers import Packet
from runtime import nft, talk
from runtime.apply import apply, withdraw
from runtime.errors import MachineError, UsageError
from runtime.handlers import LARGEST, HungError, Verdict, described
from runtime.life import BEAT, Life
from runtime.program import Copy, Info, Interest, Request, check_name, request
from runtime.server import Server, watching
from runtime.store import directory
from runtime.talk import Listener
from runtime.units import Unit

LONGEST_TICK: Final = 10.0  # seconds after which a timer's function is broken off
_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TRIES: Final = 4  # queues that are tried: somebody may have the first one
_LINES: Final = 5  # of the log that are kept for `itmc status`

_log: Final = logging.getLogger("libitm")
F = TypeVar("F", bound=Callable[..., Any])
P = TypeVar("P", bound=Callable[[Packet], Verdict | None])


@dataclass(eq=False)
class Registration:
    """Packets that a program registered for; `name` is what `itmc` calls it."""

    name: str
    hook: str
    info: Info
    _request: Request = field(repr=False)
    _served: "_Served | None" = field(default=None, repr=False)
    _counts: dict[str, int] = field(default_factory=dict, repr=False)

    @property
    def active(self) -> bool:
        """Are its rules loaded, and its packets handled?"""
        return self._served is not None

    @property
    def counts(self) -> dict[str, int]:
        """Packets since the program runs: `packets` handled, and among them `dropped` by a
        verdict, `failed` and `hung` in a function, `cut` as longer than what was asked for."""
        return self._served.told() if self._served is not None else dict(self._counts)


@dataclass(eq=False)
class Timer:
    """A function that is called every so many `seconds`.

    `calls` is how often it was, `skipped` how often it was not because it, or something
    else, took too long; `failed` how often it raised or was broken off.
    """

    function: Callable[[], object]
    seconds: float
    calls: int = 0
    skipped: int = 0
    failed: int = 0
    _due: float = field(default=0.0, repr=False)


class _Served:
    """A registration that is loaded: its queue, and the sign of life."""

    def __init__(self, one: Registration, number: int) -> None:
        made = one._request
        self.one = one
        compiled = made.compile(number)
        self.unit = made.unit(compiled)
        queue = self.unit.ruleset.tables[0].queues[0]
        handlers = {made.target(number): made.handler}
        self.server = Server(compiled.policies[0], queue, queue.first, handlers, _say)
        self.number = queue.first
        self.life = Life(queue.first)

    def told(self) -> dict[str, int]:
        return self.server.told()

    def close(self) -> None:
        self.server.close()
        self.life.close()


class App:
    """A program of some name that handles packets in the network namespace it runs in.

        app = App("qos_ctrl")
        app.register("postrouting", Info(interest=Interest(protocol="tcp"), process=process))
        app.register_timer(tick, seconds=1)
        app.run()

    One program of a name runs in a namespace. What is registered before `run` is loaded by
    it, all else at once. All methods but `run` may be called from any thread, from timers
    and from functions that handle a packet.
    """

    def __init__(self, name: str) -> None:
        """Raises `UsageError` if it is no name: letters, digits and _."""
        check_name(name)
        self.name = name
        self._registrations: dict[str, Registration] = {}
        self._timers: list[Timer] = []
        self._lock = threading.Lock()
        self._running: _Run | None = None
        self._stopped = False

    # Packets.

    def register(
        self,
        hook: str,
        info: Info,
        *,
        copy: int | Copy = LARGEST,
        priority: int = 0,
        fail: str = "open",
    ) -> Registration:
        """Handle packets of an interest at a hook.

        `hook` is one of prerouting, input, forward, output, postrouting. `copy` is how many
        bytes a packet may have to be shown, or `Copy.HEADERS`. Policies and programs of lower
        `priority` see packets first, of equal ones those that came first. With `fail` "open",
        packets that nobody handles in time pass, with "closed" they are dropped.

        While the program runs it is loaded when this returns; called by a function that
        handles a packet or by a timer, it is loaded a moment later, and a refusal is
        logged. Raises `UsageError` for what cannot be, `MachineError` if the machine refuses.
        """
        with self._lock:
            name = info.label or self._free(f"{self.name}_{hook}")
            if name in self._registrations:
                raise UsageError(f"{self.name} has a registration {name} already")
            made = request(self.name, name, hook, info, copy, priority, fail, _file())
            one = self._registrations[name] = Registration(name, hook, info, made)
            running = self._running
        if running is not None:
            try:
                running.change(lambda: running.load(one))
            except BaseException:
                self._registrations.pop(name, None)
                raise
        return one

    def unregister(self, which: Registration | str) -> None:
        """Take a registration, or all those at a hook, away again.

        Packets that wait are handled still. Raises `UsageError` if there is none,
        `MachineError` if the machine refuses.
        """
        with self._lock:
            found = [r for r in self._registrations.values() if which is r or which == r.hook]
            for one in found:
                del self._registrations[one.name]
            running = self._running
        if not found:
            raise UsageError(f"{self.name} has no registration {getattr(which, 'name', which)}")
        if running is not None:
            running.change(lambda: running.unload(found))

    def on(
        self,
        hook: str,
        *,
        copy: int | Copy = LARGEST,
        priority: int = 0,
        fail: str = "open",
        label: str = "",
        **interest: Any,
    ) -> Callable[[P], P]:
        """Register a function of one packet: a decorator. `interest`: the fields of `Interest`."""

        def register(function: P) -> P:
            info = Info(
                interest=Interest(**interest),
                process=lambda packet, _: function(packet),
                label=label,
            )
            self.register(hook, info, copy=copy, priority=priority, fail=fail)
            return function

        return register

    def _free(self, name: str) -> str:
        """The name, with a number behind it if it is taken."""
        number, found = 1, name
        while found in self._registrations:
            number += 1
            found = f"{name}_{number}"
        return found

    # Timers.

    def register_timer(self, function: Callable[[], object], seconds: float) -> Timer:
        """Call a function every so many seconds while the program runs.

        It begins when everything is loaded that was registered before. Packets wait meanwhile. Where it takes longer than its time, calls are left out, not
        made up for; one that takes ten seconds is broken off. Raises `UsageError`.
        """
        if not callable(function):
            raise UsageError(f"a timer calls a function, not {function!r}")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
            raise UsageError(f"a timer's seconds are a number above 0, not {seconds!r}")
        timer = Timer(function, seconds, _due=time.monotonic() + seconds)
        with self._lock:
            self._timers.append(timer)
            running = self._running
        if running is not None:
            running.wake()
        return timer

    def unregister_timer(self, timer: Timer) -> None:
        """Call it no more. Raises `UsageError` if it is none of the program's."""
        with self._lock:
            if timer not in self._timers:
                raise UsageError(f"{self.name} has no such timer")
            self._timers.remove(timer)

    def every(self, seconds: float) -> Callable[[F], F]:
        """Register a timer: a decorator."""

        def register(function: F) -> F:
            self.register_timer(function, seconds)
            return function

        return register

    # Running.

    @property
    def registrations(self) -> tuple[Registration, ...]:
        with self._lock:
            return tuple(self._registrations.values())

    @property
    def timers(self) -> tuple[Timer, ...]:
        with self._lock:
            return tuple(self._timers)

    @property
    def running(self) -> bool:
        """Has `run` begun, and not begun to clean up?"""
        return self._running is not None

    def run(self) -> None:
        """Handle packets until `stop` or a signal (SIGINT, SIGTERM, SIGHUP), then clean up.

        It belongs into the main thread. An exception that ends it (a timer that calls
        `sys.exit`) goes on when all is cleaned up. Raises `UsageError` if a program of this
        name runs already, `MachineError` if the machine refuses.
        """
        if threading.current_thread() is not threading.main_thread():
            raise UsageError("run() belongs into the main thread: signals come there")
        if self._running is not None:
            raise UsageError(f"{self.name} runs already")
        nft.require_rights()
        try:
            with ExitStack() as stack:
                run = _Run(self, stack)
                with self._lock:
                    self._running = run
                    waiting = list(self._registrations.values())
                run.whole(waiting)
        finally:
            self._running, self._stopped = None, False

    def stop(self) -> None:
        """Have `run` clean up and return; before it was called, as soon as it is."""
        self._stopped = True
        running = self._running
        if running is not None:
            running.wake()


class _Run:
    """One run of a program: its loop, and the changes beside it."""

    def __init__(self, app: App, stack: ExitStack) -> None:
        self._app, self._folder = app, directory()
        self._thread = threading.get_ident()
        self._served: dict[Registration, _Served] = {}
        # What the other thread did, for the loop.
        self._come: deque[_Served] = deque()
        self._gone: deque[Registration] = deque()
        self._begun = threading.Lock()  # held while a change begins
        self._ended = False
        self._beat_due = 0.0
        self._trouble = ""
        self._ticking: float | None = None  # since when a timer's function runs
        try:
            self._listener = Listener(self._folder, app.name)
        except OSError as error:
            raise UsageError(
                f"a program {app.name} runs already in this network namespace",
                "end it, or give this one another name",
            ) from error
        stack.callback(self._listener.close)
        self._selector = selectors.DefaultSelector()
        stack.callback(self._selector.close)
        # Not a bare descriptor: whoever rings too late must not write into another one's.
        self._bell, self._rope = (stack.enter_context(end) for end in socket.socketpair())
        self._bell.setblocking(False)
        self._rope.setblocking(False)
        self._changes = ThreadPoolExecutor(1, f"{app.name} changes")
        stack.callback(self._changes.shutdown)
        self._changes.submit(int).result()  # the thread is in our network namespace from now on
        self._selector.register(self._listener, selectors.EVENT_READ, self._asked)
        self._selector.register(self._bell, selectors.EVENT_READ, self._rung)
        stack.enter_context(_signals(app.stop))
        stack.enter_context(watching(self._look))

    def whole(self, waiting: list[Registration]) -> None:
        """From the first rule loaded to the last one taken away."""
        try:
            begun = self._begin(lambda: self._load_all(waiting))
            while not begun.done():
                self._turn(timers=False)
            begun.result()
            now = time.monotonic()
            for timer in self._app.timers:
                timer._due = now + timer.seconds
            while not self._app._stopped:
                self._turn(timers=True)
        finally:
            self._end()

    # Changes, by the thread beside the loop.

    def change(self, do: Callable[[], None]) -> None:
        """Have a change made, and wait for it, except in the loop's own thread."""
        future = self._begin(do)
        if threading.get_ident() != self._thread:
            future.result()
            return

        def tell(done: "Future[None]") -> None:
            error = done.exception()
            if error is not None:
                _say(f"{self._app.name}: {error}")

        future.add_done_callback(tell)

    def _begin(self, do: Callable[[], None], *, last: bool = False) -> "Future[None]":
        with self._begun:
            if self._ended:
                raise UsageError(f"{self._app.name} is ending")
            self._ended = last
            future = self._changes.submit(do)
        future.add_done_callback(lambda _: self.wake())
        return future

    def _load_all(self, waiting: list[Registration]) -> None:
        name = self._app.name
        gone = withdraw(lambda unit: unit.program == name or self._is_gone(unit))
        if gone:
            _say(f"{name}: {', '.join(gone)} of a program that was killed: taken away")
        for one in waiting:
            self.load(one)

    def _is_gone(self, unit: Unit) -> bool:
        return not talk.lives(self._folder, unit.program)

    def load(self, one: Registration) -> None:
        """Serve the queue first, then load the rules that lead to it."""
        served = self._open(one)
        try:
            apply(served.unit, boot=False, why=f"program {self._app.name}")
        except BaseException as error:
            served.close()
            if isinstance(error, CompileError):
                first = error.diagnostics[0]
                raise UsageError(first.message, first.help) from None
            raise
        served.life.send()
        one._served = served
        self._come.append(served)
        self.wake()

    def _open(self, one: Registration) -> _Served:
        for number in range(_TRIES - 1):
            try:
                return _Served(one, number)
            except MachineError:
                continue
        return _Served(one, _TRIES - 1)

    def unload(self, going: list[Registration]) -> None:
        """The rules first, then the queues that they led to."""
        names = {one.name for one in going}
        name = self._app.name
        try:
            withdraw(lambda unit: unit.program == name and set(unit.names) <= names)
        finally:
            self._gone.extend(going)
            self.wake()

    # The loop.

    def wake(self) -> None:
        with suppress(OSError):  # it rings already, or it is over
            self._rope.send(b"!")

    def _rung(self) -> None:
        self._bell.recv(1 << 12)

    def _turn(self, *, timers: bool) -> None:
        """One turn of the loop: what is due, then what comes until something else is."""
        while self._come:
            served = self._come.popleft()
            self._served[served.one] = served
            self._selector.register(served.server, selectors.EVENT_READ, served.server.serve)
        while self._gone:
            self._leave(self._gone.popleft())
        now = time.monotonic()
        if now >= self._beat_due:
            self._beat(now)
        due = self._beat_due
        for timer in self._app.timers if timers else ():
            if now >= timer._due:
                self._tick(timer, now)
            due = min(due, timer._due)
        if self._app._stopped and timers:
            return
        for key, _ in self._selector.select(max(0.0, due - time.monotonic())):
            key.data()

    def _leave(self, one: Registration) -> None:
        served = self._served.pop(one, None)
        if served is not None:
            self._selector.unregister(served.server)
            served.close()
            one._counts, one._served = served.told(), None

    def _beat(self, now: float) -> None:
        self._beat_due = now + BEAT
        trouble = ""
        for served in self._served.values():
            trouble = served.life.send() or trouble
            served.server.refresh()
        if trouble and trouble != self._trouble:
            _say(f"{self._app.name}: {trouble}")
        self._trouble = trouble

    def _tick(self, timer: Timer, now: float) -> None:
        missed = int((now - timer._due) / timer.seconds)
        timer.skipped += missed
        timer._due += (missed + 1) * timer.seconds
        timer.calls += 1
        try:
            try:
                self._ticking = now
                timer.function()
            finally:
                self._ticking = None
        except HungError:
            self._failed(timer, "took too long")
        except Exception as error:
            self._failed(timer, f"failed: {described(error)}")

    def _failed(self, timer: Timer, how: str) -> None:
        timer.failed += 1
        name = getattr(timer.function, "__name__", "its function")
        _say(f"{self._app.name}: the timer {name} {how}")

    def _look(self) -> None:
        """Break off what hangs."""
        began = self._ticking
        if began is not None and time.monotonic() - began > LONGEST_TICK:
            self._ticking = None
            raise HungError
        for served in list(self._served.values()):
            served.server.look()

    # Who asks.

    def _asked(self) -> None:
        link = self._listener.accept()
        if link is not None:
            self._selector.register(link, selectors.EVENT_READ, lambda: self._answer(link))

    def _answer(self, link: socket.socket) -> None:
        self._selector.unregister(link)
        if talk.question(link) is None:
            link.close()
            return
        workers = [
            {
                "policy": served.one.name, "queue": served.number, "process": os.getpid(),
                "ready": True, "started": 1, "error": "", "counts": served.told(),
            }
            for served in self._served.values()
        ]  # fmt: skip
        talk.answer(
            link, {"process": os.getpid(), "trouble": self._trouble, "log": [], "workers": workers}
        )

    # The end.

    def _end(self) -> None:
        """Take all rules away while packets are served on, then leave the queues."""
        app, name = self._app, self._app.name
        with app._lock:
            app._running = None  # whatever is registered from here on waits for the next run
        done = self._begin(lambda: self._withdraw_all(name), last=True)
        try:
            while not done.done():
                self._turn(timers=False)
        finally:
            done.result()
            while self._come:
                served = self._come.popleft()
                self._served[served.one] = served
                self._selector.register(served.server, selectors.EVENT_READ)
            for one in list(self._served):
                self._leave(one)

    def _withdraw_all(self, name: str) -> None:
        try:
            withdraw(lambda unit: unit.program == name)
        except MachineError as error:
            _say(f"{name}: its rules stay, and packets go past it: {error.message}")


@contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """Signals that end a program stop it; those that somebody had it ignore stay so (nohup)."""
    before = {
        one: signal.signal(one, lambda *_: stop())
        for one in _ENDING
        if signal.getsignal(one) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for one, how in before.items():
            signal.signal(one, how)


def _file() -> str:
    """The program's own file, for `itmc list`."""
    name = sys.argv[0] if sys.argv else ""
    return name if name and Path(name).is_file() else "a program"


def _say(text: str) -> None:
    _log.warning("%s", text)
