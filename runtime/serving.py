"""The runtime: one process in a network namespace that keeps a worker for each queue alive.

Which queues there are follows from the state on disk. `apply` asks for the workers of what
it is about to load before it touches the kernel (`prepare`), and tells when it is done
(`settle`): workers that nobody needs any more answer what waits, and end. So packets never
go to a queue without a worker, and a handler that cannot be loaded refuses the change.

While a worker of a policy answers, it sends the kernel the sign of life that the rules wait
for (`itmlang/nft/queueing.py`). A worker that ended is started again, one that says nothing
is ended first. The supervisor has a copy of each worker's queue socket: so a queue outlives
its worker until what waits there was let go unserved, and a handler that takes its process
with it loses no packets. Who wants to know asks by `talk`.
"""

import fcntl
import json
import logging
import logging.handlers
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from itmlang.diagnostics import CompileError, Diagnostic
from runtime import decisions, steering, talk
from runtime.errors import MachineError
from runtime.jobs import ControlJob, Job, OverlayJob, QueueJob, TimerJob
from runtime.life import BEAT, Life
from runtime.netqueue import release
from runtime.pathmtu import PathMtu
from runtime.state import State
from runtime.store import Store, directory
from runtime.talk import Listener, ask

_CARE: Final = BEAT / 2  # seconds between two looks after the workers
_SILENT: Final = 2.0  # seconds after which a worker that says nothing is ended
_LONGEST_PAUSE: Final = 30.0  # seconds before a worker that fails again and again is started
_PREPARED: Final = 20.0  # seconds that workers may take to load
_TAKING_OVER: Final = 3.0  # seconds that another runtime may take to end
_MENDED: Final = 1.0  # seconds between two looks at the paths of tunnels
_UNCLAIMED: Final = 60.0  # seconds after which workers of a change that never came end
_LONGEST_MESSAGE: Final = 1 << 16
_LOG_SIZE: Final = 1 << 20
_RATE: Final = 20  # lines of the log a second, of all workers

_DOES: Final[Mapping[type, str]] = {
    QueueJob: "queue", ControlJob: "control", TimerJob: "timers", OverlayJob: "overlay",
}  # fmt: skip

Reply = Callable[[Mapping[str, Any]], None]


def jobs(state: State) -> dict[str, Job]:
    """What is to be done for a state, by what tells it apart: all queues that no program serves
    by itself, the controllers, timers and overlays of the policies that are on.

    Other controllers and timers of a policy are other jobs, so that they are tried beside those
    that run.
    """
    found: list[Job] = []
    on = {entry.name for entry in state.policies if entry.on}
    for unit in (unit for unit in state.units if not unit.program):
        for table in unit.ruleset.tables:
            found += [
                QueueJob(unit, queue, number)
                for queue in table.queues
                for number in range(queue.first, queue.first + queue.many)
            ]
            controlled = dict.fromkeys(one.policy for one in table.controllers)
            found += [ControlJob(unit, name, table) for name in controlled if name in on]
            for name in dict.fromkeys(one.policy for one in table.timers if one.policy in on):
                timers = tuple(one for one in table.timers if one.policy == name)
                found.append(TimerJob(unit, name, timers))
            found += [
                OverlayJob(unit, one.name, one) for one in table.overlays if one.name in on
            ]  # fmt: skip
    return {
        f"{job.name} {job.part}" if isinstance(job, ControlJob | TimerJob) else job.name: job
        for job in found
    }


def looked_after(state: State) -> bool:
    """Has a state what must follow the machine's links: tunnels of the kernel's, links?"""
    return bool(state.active_links) or any(table.tunnels for table in state.tables)


# For those who ask.


def prepare(folder: Path, number: int, state: State, files: Collection[str]) -> None:
    """Have workers for all queues of a generation that is written, but does not hold yet.

    Handlers that policies of these files call are loaded anew.
    Starts the runtime if there is none. Raises `MachineError` if a worker cannot start.
    """
    if not jobs(state) and not looked_after(state):
        return
    if not talk.lives(folder):
        _start(folder)
    message = {"command": "prepare", "generation": number, "files": sorted(files)}
    answer = ask(folder, message, _PREPARED + 5)
    if answer is None:
        raise MachineError(
            "the runtime does not answer; nothing was changed",
            f"if it hangs, end it; its log is {folder / 'runtime.log'}",
        )
    if answer.get("target"):
        raise CompileError([_unloaded(state, answer)])
    if answer.get("error"):
        raise MachineError(f"{answer['error']}; nothing was changed")


def _unloaded(state: State, answer: Mapping[str, Any]) -> Diagnostic:
    """A handler that cannot be loaded, at its place in the policy."""
    span = next(
        (
            span
            for job in jobs(state).values()
            if job.policy == answer["policy"]
            for target, span in job.calls
            if target == answer["target"]
        ),
        None,
    )
    return Diagnostic(
        "E063", answer["error"], span,
        help="modules are looked for beside the policy file, then on Python's path",
    )  # fmt: skip


def signs_of_life(state: State, paths: Collection[str]) -> list[str]:
    """What a transaction on these tables says so that their policies are served at once."""
    return [
        f"add element {table.path} {one.name} {{ 0x00000000 }}"
        for unit in state.units
        if not unit.program
        for table in unit.ruleset.tables
        if table.path in paths
        for one in table.sets
        if one.role == "serving"
    ]


def settle(folder: Path) -> None:
    """Say that the state on disk holds now."""
    ask(folder, {"command": "settle"})


def _start(folder: Path) -> None:
    """Start the runtime as a process of its own, and wait until it answers."""
    environment = {**os.environ}
    chosen = environment.get("ITM_STATE_DIR")
    if chosen:  # perhaps a relative path
        environment["ITM_STATE_DIR"] = os.path.abspath(chosen)
    command = [sys.executable, "-m", "runtime.cli.main", "serve", "--detached"]
    try:
        started = subprocess.Popen(
            command, cwd=Path(__file__).parents[1], env=environment, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
    except OSError as error:
        raise MachineError(f"the runtime cannot be started: {error.strerror}") from error
    deadline = time.monotonic() + _PREPARED
    assert started.stderr is not None
    while time.monotonic() < deadline:
        if ask(folder, {"command": "status"}) is not None:
            started.stderr.close()
            started.returncode = 0  # it is no child to wait for: it outlives us
            return
        if started.poll() is not None:
            said = started.stderr.read().decode(errors="replace").strip()
            raise MachineError("the runtime ended at once", said.partition("\n")[0])
        time.sleep(0.05)
    started.kill()
    started.wait()
    raise MachineError("the runtime does not answer", f"its log is {folder / 'runtime.log'}")


# The runtime itself.


@dataclass
class _Worker:
    """A queue's worker: its process, what it said last, and how often it was started."""

    job: Job
    part: int = 0  # what it does, as it was started
    process: int = 0
    link: socket.socket | None = None
    queue: socket.socket | None = None  # a copy of the one that it reads
    ready: bool = False
    going: bool = False  # of controllers and timers: told to begin
    heard: float = 0.0
    begun: float = 0.0
    started: int = 0
    failures: int = 0  # in a row, each soon after a start
    again: float = 0.0  # when it may be started again
    ending: bool = False
    restarting: bool = False  # it ends to be started anew
    reloading: bool = False
    error: str = ""
    target: str = ""  # the handler that the error is about
    counts: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)  # what else it told of itself last
    before: dict[str, int] = field(default_factory=dict)  # what earlier processes of it counted

    @property
    def well(self) -> bool:
        return self.ready and bool(self.process)


@dataclass
class _Preparing:
    """Somebody waits until these workers are ready."""

    names: frozenset[str]
    until: float
    reply: Reply


class Runtime:
    """The process that keeps the workers; see `serve`."""

    def __init__(self, folder: Path, *, detached: bool, log: logging.Logger) -> None:
        self._folder, self._detached, self._log = folder, detached, log
        self._workers: dict[str, _Worker] = {}
        self._wanted: dict[str, Job] = {}
        self._prepared: tuple[dict[str, Job], float] | None = None
        self._preparing: list[_Preparing] = []
        self._selector = selectors.DefaultSelector()
        self._stopping = False
        self._used, self._until = False, time.monotonic() + _PREPARED
        self._lives: dict[int, Life] = {}
        self._notify = os.environ.pop("NOTIFY_SOCKET", "")  # of whoever waits until we serve
        self._cared = time.monotonic()
        self._trouble = ""
        self._follows = False  # is there what must follow the machine's links?
        self._tunnels = False  # of the kernel's, whose paths must be looked after
        self._paths = PathMtu()
        self._links: list[tuple[int, str]] = []  # at which the tunnels are as they should be
        self._amiss = ""
        self._mend = 0.0
        self._last: list[str] = []  # the last lines of the log
        self._logged, self._second = 0, 0

    def run(self) -> None:
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if self._detached else self._stop)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        try:
            listener = Listener(self._folder)
        except OSError as error:
            raise MachineError(f"the runtime's socket cannot be had: {error.strerror}") from error
        self._selector.register(listener, selectors.EVENT_READ, lambda: self._accept(listener))
        if self._detached:
            _fall_silent()
        try:
            self._serve()
        finally:
            listener.close()  # before the lock is free for another one

    def _serve(self) -> None:
        self._settle()
        due = 0.0
        while not self._stopping:
            # Messages first: whoever was stopped itself must not take others for silent.
            for key, _ in self._selector.select(max(0.0, due - time.monotonic())):
                key.data()
            now = time.monotonic()
            if now >= due:
                self._care(now)
                due = now + _CARE
        self._end_all()

    def _stop(self, *_: object) -> None:
        self._stopping = True

    # What is wanted.

    def _settle(self) -> None:
        """Keep the workers of the state as it is, and end the others."""
        self._prepared = None
        try:
            state = Store(self._folder).state
            self._wanted, self._follows = jobs(state), looked_after(state)
            self._tunnels = any(table.tunnels for table in state.tables)
            self._mend = 0.0
        except MachineError as error:
            self._say(f"the state cannot be read: {error.message}")
            return
        self._arrange()
        for one in self._workers.values():
            # Queues whose numbers the policy gives stay, whatever is done behind them.
            if one.process and not one.ending and one.part != one.job.part:
                self._restart(one)
        self._let_go()
        self._beat(time.monotonic())
        self._stop_unneeded()

    def _let_go(self) -> None:
        """Controllers and timers begin when what they are for holds, and those before have ended."""
        ending = {one.job.name for one in self._workers.values() if one.ending}
        for name, one in self._workers.items():
            begins = not isinstance(one.job, QueueJob) and name in self._wanted and one.well
            begins = begins and one.job.name not in ending
            if begins and not one.going and one.link is not None:
                one.going, one.begun = True, time.monotonic()
                with suppress(OSError):
                    one.link.send(b'{"command": "go"}')

    def _stop_unneeded(self) -> None:
        """End where nobody needs it; whoever started it may still be about to ask."""
        needed = self._wanted or self._follows or self._workers or self._prepared is not None
        if self._detached and not needed and (self._used or time.monotonic() >= self._until):
            self._stopping = True

    def _arrange(self) -> None:
        prepared = self._prepared[0] if self._prepared else {}
        needed = {**prepared, **self._wanted}
        # Where nothing of before goes on, what is to come is tried.
        needed |= {
            name: prepared[name] for name, one in self._workers.items()
            if name in prepared and not one.well
        }  # fmt: skip
        for name, job in needed.items():
            one = self._workers.get(name)
            if one is None:
                one = self._workers[name] = _Worker(job)
            one.job = job
            if one.ending:  # wanted again, while it still goes
                self._restart(one)
        for name, one in self._workers.items():
            if name not in needed and not one.ending:
                self._end(one)

    def _prepare(self, number: int, files: Collection[str], reply: Reply) -> None:
        try:
            state, _ = Store(self._folder).generation(number)
        except MachineError as error:
            reply({"error": error.message})
            return
        now, self._used = time.monotonic(), True
        wanted = jobs(state)
        self._prepared = wanted, now + _UNCLAIMED
        self._arrange()
        for name in wanted:
            one = self._workers[name]
            one.again, one.failures, one.error, one.target = 0.0, 0, "", ""
            if one.process and not one.well and not one.restarting:
                self._restart(one)  # what it loads may be of before
            if one.well and one.link is not None and one.job.unit.file in files:
                one.reloading = True
                with suppress(OSError):
                    one.link.send(b'{"command": "reload"}')
        self._preparing.append(_Preparing(frozenset(wanted), now + _PREPARED, reply))
        self._care(now)

    @staticmethod
    def _late(workers: list[_Worker]) -> dict[str, Any]:
        """Why workers are not ready in time: what they wait for is in most cases an import."""
        late = next((w for w in workers if not w.well), workers[0])
        policy, calls = late.job.policy, late.job.calls
        if not calls:
            return {"error": f"the worker of `{policy}` takes too long to start"}
        target = calls[0][0]
        error = f"`{target}` takes too long to be imported"
        return {"error": error, "target": target, "policy": policy}

    def _answer_preparing(self, now: float) -> None:
        for one in list(self._preparing):
            workers = [self._workers[name] for name in sorted(one.names & self._workers.keys())]
            ready = all(w.well and not w.reloading for w in workers)
            failed = next((w for w in workers if w.error), None)
            if len(workers) < len(one.names):  # whoever asked is gone, and another change came
                one.reply({"error": "another change came"})
                self._preparing.remove(one)
                continue
            if failed is not None:
                policy = failed.job.policy
                one.reply({"error": failed.error, "target": failed.target, "policy": policy})
            elif ready:
                one.reply({"ready": True})
            elif now >= one.until:
                one.reply(self._late(workers))
            else:
                continue
            self._preparing.remove(one)
            if failed is not None or not ready:  # that change does not come
                for each in workers:
                    each.error, each.target = "", ""  # whoever asked knows it
                self._settle()

    # Workers.

    def _care(self, now: float) -> None:
        """Everything that is due: workers to be started, ended, told of; the sign of life."""
        if now - self._cared > _SILENT / 2:  # it was this process that stood still
            for one in self._workers.values():
                one.heard = max(one.heard, now)
        self._cared = now
        self._reap(now)
        if self._prepared is not None and now >= self._prepared[1]:
            if (self._folder / "state.json.new").exists():
                # A command was ended before it could say what holds: the next one finds out.
                self._prepared = self._prepared[0], now + _UNCLAIMED
            else:
                self._settle()
        for one in list(self._workers.values()):
            if one.process and now - one.heard > (_PREPARED if one.reloading else _SILENT):
                self._say(f"{one.job.name} says nothing: it is ended")
                self._release(one)
                os.kill(one.process, signal.SIGKILL)
                one.heard = now
            elif not one.process and not one.ending and now >= one.again:
                self._begin(one, now)
        self._beat(now)
        self._mend_links(now)
        self._answer_preparing(now)
        if self._notify and all(
            one.well or one.error for name, one in self._workers.items() if name in self._wanted
        ):
            _say_ready(self._notify)
            self._notify = ""
        if self._detached and not self._folder.exists():
            self._stopping = True  # nobody can want anything of it any more

    def _mend_links(self, now: float) -> None:
        """Have qdiscs and the kernel's tunnels at links that came lately (at boot, all come late),
        and give tunnels the MTU that their paths have by now."""
        if not self._follows or now < self._mend:
            return
        self._mend = now + _MENDED
        links, trouble = socket.if_nameindex(), ""
        try:
            if links != self._links and steering.mend(self._folder, self._controlled()):
                self._links = links
            if self._tunnels:
                from runtime import tunnels  # 0.2 s that most need not

                tunnels.refresh(self._paths)
        except MachineError as error:
            trouble = error.message
        if trouble and trouble != self._amiss:
            self._say(trouble)
        self._amiss = trouble

    def _controlled(self) -> set[str]:
        """The links whose rates controllers write now."""
        return {
            each.link
            for one in self._workers.values()
            if one.process and isinstance(one.job, ControlJob)
            for each in one.job.controllers
            if each.link
        }

    def _begin(self, one: _Worker, now: float) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                _leave_behind(theirs)
                _work(one.job, theirs)
                status = 0
            except BaseException as error:
                with suppress(OSError):
                    theirs.send(json.dumps({"log": f"it ended: {error!r:.500}"}).encode())
            finally:
                os._exit(status)
        theirs.close()
        ours.setblocking(False)
        one.process, one.link, one.ready, one.heard = child, ours, False, now + _PREPARED
        one.going = False
        one.begun, one.part = now, one.job.part
        one.started += 1
        self._selector.register(ours, selectors.EVENT_READ, lambda: self._hear(one))

    def _hear(self, one: _Worker) -> None:
        # It may have been found to be gone while this was on its way.
        if one.link is not None and not self._heard(one, one.link):
            self._selector.unregister(one.link)
            one.link.close()
            one.link = None
            self._reap(time.monotonic())

    def _heard(self, one: _Worker, link: socket.socket) -> bool:
        """Take what a worker says; False if it will say no more."""
        while True:
            try:
                raw, sockets, _, _ = socket.recv_fds(link, _LONGEST_MESSAGE, 1)
            except BlockingIOError:
                return True
            except OSError:
                return False
            for descriptor in sockets:
                if one.queue is not None:
                    one.queue.close()
                one.queue = socket.socket(fileno=descriptor)
            if not raw:
                return False
            self._told(one, json.loads(raw))

    def _told(self, one: _Worker, message: Mapping[str, Any]) -> None:
        one.heard = time.monotonic()
        if message.get("ready"):
            one.ready, one.error, one.target = True, "", ""
            self._let_go()
            self._beat(one.heard)
        if "counts" in message:
            one.counts = message["counts"]
        if "state" in message:
            one.state = message["state"]
        if "log" in message:
            self._say(f"{one.job.name}: {message['log']}")
        if "reloaded" in message:
            one.reloading = False
        if "restarting" in message:
            one.reloading, one.restarting, one.ready = False, True, False
        if message.get("error") and not one.restarting:
            one.error, one.target = message["error"], message.get("target", "")
            self._say(f"{one.job.name}: {message['error']}")
        self._answer_preparing(one.heard)

    def _reap(self, now: float) -> None:
        for name, one in list(self._workers.items()):
            if not one.process:
                continue
            try:
                ended, status = os.waitpid(one.process, os.WNOHANG)
            except ChildProcessError:
                ended, status = one.process, 0
            if not ended:
                continue
            if one.link is not None:
                self._heard(one, one.link)  # what it said last
                with suppress(KeyError):
                    self._selector.unregister(one.link)
                one.link.close()
            self._release(one)
            began = one.ready
            one.process, one.link, one.ready, one.reloading = 0, None, False, False
            one.before = _added(one.before, one.counts)
            one.counts, one.state = {}, {}
            if isinstance(one.job, ControlJob):
                self._links = []  # rates that it wrote are to be the file's again
                self._mend = 0.0
            if one.ending:
                del self._workers[name]
                if isinstance(one.job, ControlJob | OverlayJob):
                    self._forget_decisions()
                self._let_go()
                continue
            if one.restarting:
                one.restarting, one.again = False, now
                continue
            how = f"was ended by signal {-os.waitstatus_to_exitcode(status)}"
            if os.WIFEXITED(status):
                how = f"ended by itself, with code {os.WEXITSTATUS(status)}"
            if not one.error:
                self._say(f"{one.job.name} {how}")
                one.error = "" if began else f"a worker {how} before it was ready"
            one.failures = 1 if now - one.begun > _LONGEST_PAUSE else one.failures + 1
            one.again = now + min(_LONGEST_PAUSE, 0.1 * 2 ** (one.failures - 1))
        self._stop_unneeded()

    def _forget_decisions(self) -> None:
        """A controller, or an overlay, may have written a line after its policy was removed."""
        with suppress(MachineError):
            decisions.forget(self._folder, Store(self._folder).state.names)

    def _release(self, one: _Worker) -> None:
        """Let go unserved what waits for a worker that is gone, or is about to go."""
        if one.queue is None:
            return
        assert isinstance(one.job, QueueJob)
        with one.queue, suppress(OSError):
            release(one.queue, one.job.number)
        one.queue = None

    def _end(self, one: _Worker) -> None:
        one.ending = True
        if one.process:
            _tell_to_end(one)
        else:
            self._workers = {n: w for n, w in self._workers.items() if w is not one}

    def _restart(self, one: _Worker) -> None:
        one.ending, one.restarting, one.ready = False, True, False
        _tell_to_end(one)

    def _end_all(self) -> None:
        for one in list(self._workers.values()):
            self._end(one)
        deadline = time.monotonic() + _SILENT
        while self._workers and time.monotonic() < deadline:
            self._reap(time.monotonic())
            time.sleep(0.01)
        for one in self._workers.values():
            if one.process:
                os.kill(one.process, signal.SIGKILL)
        if self._follows and not self._links:  # a controller ended
            with suppress(MachineError, OSError):
                steering.mend(self._folder)

    # The sign of life.

    def _beat(self, now: float) -> None:
        by_policy: dict[int, list[_Worker]] = {}
        for one in self._workers.values():
            if not one.ending and isinstance(one.job, QueueJob):
                by_policy.setdefault(one.job.queue.first, []).append(one)
        trouble = ""
        for first, workers in sorted(by_policy.items()):
            if any(one.well and now - one.heard <= _SILENT for one in workers):
                if first not in self._lives:
                    self._lives[first] = Life(first)
                trouble = self._lives[first].send() or trouble
        for first in [first for first in self._lives if first not in by_policy]:
            self._lives.pop(first).close()
        if trouble and trouble != self._trouble:
            self._say(trouble)
        self._trouble = trouble

    # Who asks.

    def _accept(self, listener: Listener) -> None:
        link = listener.accept()
        if link is not None:
            self._selector.register(link, selectors.EVENT_READ, lambda: self._asked(link))

    def _asked(self, link: socket.socket) -> None:
        self._selector.unregister(link)
        message = talk.question(link)
        if message is None:
            link.close()
            return
        reply, command = partial(talk.answer, link), message["command"]
        if command == "prepare":
            self._prepare(int(message["generation"]), message["files"], reply)
        elif command == "settle":
            self._settle()
            reply({})
        elif command == "give way":
            self._stopping = self._stopping or self._detached
            reply({})
        else:
            reply(self._status())

    def _status(self) -> dict[str, Any]:
        return {
            "process": os.getpid(),
            "trouble": self._trouble,
            "log": self._last,
            "workers": [
                {
                    "policy": one.job.policy,
                    "does": _DOES[type(one.job)],
                    "queue": one.job.number if isinstance(one.job, QueueJob) else None,
                    "process": one.process,
                    "ready": one.well,
                    "started": one.started,
                    "age": round(time.monotonic() - one.begun, 3),
                    "error": one.error,
                    "counts": _added(one.before, one.counts),
                    "state": one.state,
                }
                for _, one in sorted(self._workers.items())
                if not one.ending
            ],
        }

    def _say(self, text: str) -> None:
        """A line for the log, and for `status`."""
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._logged = second, 0
        self._logged += 1
        if self._logged <= _RATE:
            self._log.warning("%s", text)
            self._last = [*self._last[-19:], text]


def _work(job: Job, link: socket.socket) -> None:
    """Do a job, in a process of its own: what most commands need not is imported there."""
    match job:
        case QueueJob():
            from runtime import worker

            worker.work(job, link)
        case ControlJob():
            from runtime import controller

            controller.work(job, link)
        case TimerJob():
            from runtime import timers

            timers.work(job, link)
        case OverlayJob():
            from runtime.overlay import process

            process.work(job, link)


def _added(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Counts of two processes together."""
    found = dict(one)
    for name, value in other.items():
        if isinstance(value, dict):
            found[name] = _added(found.get(name, {}), value)
        elif isinstance(value, list):
            old = found.get(name, [0] * len(value))
            found[name] = [a + b for a, b in zip(old, value, strict=True)]
        else:
            found[name] = found.get(name, 0) + value
    return found


def serve(*, detached: bool) -> None:
    """Be the runtime of this namespace until nobody needs it (`detached`), or until a signal.

    One that `apply` started gives way to one that is to stay. Raises `MachineError` if there
    is one that stays already.
    """
    folder = directory()
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # of whoever started us
    if not detached:
        ask(folder, {"command": "give way"})
    with _alone(folder, _TAKING_OVER):
        Runtime(folder, detached=detached, log=_logger(folder, detached)).run()


@contextmanager
def _alone(folder: Path, patience: float) -> Iterator[None]:
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        lock = os.open(folder / "runtime.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise MachineError(f"{folder} cannot be used: {error.strerror}") from error
    try:
        deadline = time.monotonic() + patience
        while not _taken(lock):
            if time.monotonic() >= deadline:
                raise MachineError("the runtime runs already in this network namespace")
            time.sleep(0.02)
        yield
    finally:
        os.close(lock)


def _taken(lock: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _tell_to_end(one: _Worker) -> None:
    if one.link is not None:
        with suppress(OSError):
            one.link.send(b'{"command": "stop"}')  # which wakes it
    os.kill(one.process, signal.SIGTERM)


def _say_ready(address: str) -> None:
    """Tell the service manager, see sd_notify(3)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link, suppress(OSError):
        link.sendto(b"READY=1", "\0" + address[1:] if address[0] == "@" else address)


def _fall_silent() -> None:
    """Whoever started us reads no more: what handlers print goes nowhere."""
    os.chdir("/")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.close(null)


def _leave_behind(link: socket.socket) -> None:
    """In a child: only its link stays open, of the parent's lock, links and queues nothing."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) != link.fileno():
            with suppress(OSError):
                os.close(int(name))


def _logger(folder: Path, detached: bool) -> logging.Logger:
    """Lines go to a file beside the state, of bounded size, and to stderr in the foreground."""
    log = logging.getLogger("itm.runtime")
    log.propagate = False
    log.setLevel(logging.INFO)
    log.handlers = [
        logging.handlers.RotatingFileHandler(
            folder / "runtime.log", maxBytes=_LOG_SIZE, backupCount=1, delay=True
        )
    ]
    log.handlers[0].setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    if not detached:
        log.handlers.append(logging.StreamHandler())
    return log
