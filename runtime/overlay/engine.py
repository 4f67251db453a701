"""What a member of an overlay does: probe, answer, measure, choose and learn; no sockets, no clock.

The caller tells what happened and when, and does what comes back. Time is that of a monotonic
clock, in seconds. A clock that goes back, or a call that comes much too late (the process was
stopped, the machine slept), is taken for what it is: what was waited for is forgotten and
counts neither as answered nor as lost.

**Probes.** Each candidate of each egress, the direct path and every neighbour but the egress
itself, is probed once a period; the phases are spread over it. No more than the budget is sent
in all (a token bucket): where egresses × candidates / period is more, the chosen paths keep
their period as long as they need at most half of it, and the others share the rest. `status`
shows both periods. After an answer of a chosen path is missing, the next probe is sent at once
(as RON does), unless its turn comes soon, and other candidates are looked at early: that is
what makes a failure short where periods are long. Paths that begin to answer, too, are probed
like chosen ones until enough is known of them.

**Answers.** A fresh probe of an authenticated sender, from its own address, is answered once, by
the way it came. All else is counted by its reason and changes nothing.

**Progress.** If packets go out to an egress and none come back, although some did before, the
chosen path becomes suspect and the next one is tried, each candidate once. If none helps,
nobody is at home: the choice goes back to the best by its probes, suspicions are dropped, and
nothing more is tried until packets have come back again, and not before a time that doubles.
While it lasts each message says so: what is lost may be what comes back, by the other side's path,
which that one cannot see, as packets sent again look alive to it. So it leaves its path, too.

**Learning**, where the overlay discovers: members are asked now and then what is behind them,
and neighbours for their own neighbours, which are members, too (`learning.py`). What a member
tells no longer, or has not told for three times, is forgotten.
"""

import heapq
import math
import struct
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from random import Random
from typing import Any, Final

from itmlang.overlays import DIRECT, Overlay
from runtime.overlay import learning, paths, wire
from runtime.overlay.learning import Prefix
from runtime.overlay.paths import OUT, Path, Rule, better
from runtime.overlay.progress import Progress

BUDGET: Final = 200.0  # probes a second, of all paths together

_BURST: Final = 0.25  # seconds' worth of the budget that may be sent at once
_GAP: Final = 3.0  # periods: a call that comes so late is no information
_LEAST_GAP: Final = 1.0  # seconds
_LATE: Final = 0.5  # periods: after a call that comes so late, answers may lie about unread
_GRACE: Final = 0.02  # seconds, for reading them
_ONE: Final = 1 - 1e-6  # token: sums of floats are not exact
_APART: Final = 0.002  # seconds between two probes that are sent early
_STALLED: Final = (4, 1.0)  # periods, and seconds at least, without packets that come back
_ROUND: Final = 30.0  # seconds between two rounds of trying in vain; then twice as long
_LONGEST_ROUND: Final = 600.0
_HELLO: Final = (5, 1.0)  # periods, and seconds at least, between two questions
_HELLOS: Final = 0.1  # of the budget, for questions
_REGULAR: Final = 0.8  # of the budget, for paths whose turn it is; the rest is for early looks
_UNTOLD: Final = 3.5  # of these periods: what was told is forgotten
_MOST_SENDERS: Final = 4096  # whose sequence numbers are remembered
_SILENT: Final = 600.0  # seconds, after which a sender's are forgotten
_REASONS: Final = (
    "sent", "returned", "missed", "late", "answered", "forged", "replayed", "truncated", "malformed",
    "unexpected", "limited",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Send:
    """Send a datagram to a member's port, through the tunnel to `via` (0: directly)."""

    via: int
    to: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Move:
    """Packets to an egress's networks go by `via` (0: directly) from now on, before by `prior`."""

    egress: int
    via: int
    prior: int
    reason: str


@dataclass(frozen=True, slots=True)
class Learned:
    """An egress told of networks behind it. They go by `via`, as all that is behind it does."""

    egress: int
    prefixes: tuple[Prefix, ...]
    via: int


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Networks that were learned of an egress are no longer its own."""

    egress: int
    prefixes: tuple[Prefix, ...]


Effect = Send | Move | Learned | Forgotten


@dataclass(eq=False, slots=True)
class _Task:
    """What is sent to a member once in a while. `stamp` tells its present entry in the queue."""

    member: int
    next: float = math.inf
    stamp: int = 0
    sent: float = -math.inf


@dataclass(eq=False, slots=True)
class _Candidate(_Task):
    """A path to an egress, by a neighbour or directly."""

    via: int = DIRECT
    path: Path = field(kw_only=True)
    waiting: int = 0  # probes


@dataclass(eq=False, slots=True)
class _Question(_Task):
    """What a member told when it was asked last, and when."""

    told: wire.Told | None = None
    at: float = -math.inf


@dataclass(eq=False, slots=True)
class _Egress:
    address: int
    candidates: dict[int, _Candidate]
    paths: dict[int, Path]
    chosen: int
    learned: tuple[Prefix, ...] = ()
    moved: float | None = None
    why: str = ""
    moves: int = 0
    progress: Progress = field(default_factory=Progress)
    tried: set[int] = field(default_factory=set)
    vain: bool = False  # packets go there and bring nothing back, by any way so far
    blamed: bool = False  # it says so of its own packets to us
    calm: float = -math.inf  # no round of trying begins before
    rounds: int = 0


@dataclass(eq=False, slots=True)
class _Waiting:
    """A probe whose answer is waited for."""

    target: int
    via: int
    echo: bytes
    sent: float
    candidate: _Candidate | None


@dataclass(eq=False, slots=True)
class _Sender:
    """Whose probes are answered: which were there, and how many more may come just now."""

    window: wire.Window
    tokens: float
    at: float


class Engine:
    """A member at work.

    `start_us` is the time of day at which it starts, in microseconds: it must be greater than at
    any earlier start of this member. `chosen` are the neighbours by which packets to egresses
    go already, as left by an engine before this one (else all go directly); no `Move`
    repeats them. `budget` is in probes a second.
    """

    def __init__(
        self, overlay: Overlay, key: bytes, start_us: int, seed: int,
        *, chosen: Mapping[int, int] | None = None, budget: float = BUDGET,
    ) -> None:  # fmt: skip
        self._overlay, self._key = overlay, key
        self._rule = Rule.of(overlay)
        self._every, self._timeout = overlay.every / 1000, overlay.timeout / 1000
        self._budget = budget
        self._random = Random(seed)
        self._first = self._sequence = start_us
        self._own = wire.Window()  # the sequence numbers that were answered
        self._names = {one.address: one.name for one in overlay.neighbors}
        self._vias = (DIRECT, *(one.address for one in overlay.neighbors))
        self._neighbors = frozenset(self._vias[1:])
        self._tunnels = frozenset(overlay.members)
        self._told = wire.Told(
            tuple(sorted(overlay.own))[: wire.MOST_PREFIXES],
            tuple(sorted(self._neighbors))[: wire.MOST_NEIGHBORS],
        )
        self._counts = dict.fromkeys(_REASONS, 0)
        self._queue: list[tuple[float, int, int, _Task]] = []
        self._entries = 0
        self._waiting: dict[int, _Waiting] = {}
        self._deadlines: deque[tuple[float, int]] = deque()
        self._senders: dict[int, _Sender] = {}
        self._egresses: dict[int, _Egress] = {}
        self._questions: dict[int, _Question] = {}
        self._now: float | None = None
        self._ahead = 0.0  # of the caller's clock, which went back
        self._due = -math.inf
        self._starved = -math.inf  # no tokens until then
        self._grace = -math.inf
        self._tokens, self._filled = budget * _BURST, 0.0
        given = chosen or {}
        for address in overlay.egresses:
            self._add(address, given.get(address, DIRECT))
        if overlay.discover:
            for address in overlay.members:
                self._questions[address] = _Question(address)
        self._pace()

    # What the caller sees.

    @property
    def due(self) -> float:
        """When `tick` is to be called next; at once before the first call, never: infinite."""
        return self._due - self._ahead

    @property
    def chosen(self) -> dict[int, int]:
        """By which neighbour (0: directly) packets go to each egress."""
        return {one.address: one.chosen for one in self._egresses.values()}

    def tick(self, now: float) -> Sequence[Effect]:
        """What is to be done now that it is this time; to be called when it is `due`, or earlier."""
        time = self._clock(now)
        effects: list[Effect] = []
        late = time - self._due > max(_LATE * self._every, _GRACE)
        if late and self._grace < time - self._every and self._deadlines:
            self._grace = time + _GRACE
        if time >= self._grace:
            self._expire(time, effects)
        self._send_due(time, effects)
        self._plan(time)
        return effects

    def received(self, now: float, data: bytes, source: int) -> Sequence[Effect]:
        """A datagram has come from an address. Whatever it is, this raises nothing."""
        time = self._clock(now)
        effects: list[Effect] = []
        try:
            message = wire.unpack(data, self._key)
        except wire.RefusedError as error:
            self._counts[error.reason] += 1
            return effects
        if message.target != self._overlay.address or message.sender != source:
            self._counts["unexpected"] += 1
        elif message.kind == wire.PROBE:
            self._answer(message, time, effects)
        else:
            self._take(message, time, effects)
        self._plan(time)
        return effects

    def progress(self, now: float, counts: Mapping[int, tuple[int, int]]) -> Sequence[Effect]:
        """For egresses, how many TCP packets went to their networks and came back from there, as
        the kernel counts them; to be called about once a period."""
        time = self._clock(now)
        effects: list[Effect] = []
        patience = max(_STALLED[0] * self._every, _STALLED[1])
        for address, (sent, returned) in counts.items():
            if (egress := self._egresses.get(address)) is None:
                continue
            if egress.progress.looked(sent, returned, time):
                egress.tried.clear()
                egress.vain = False
                if time > egress.calm + _LONGEST_ROUND:
                    egress.rounds = 0
            elif (stalled := egress.progress.stalled(time)) >= patience and time >= egress.calm:
                self._distrust(egress, stalled, time, effects)
        self._plan(time)
        return effects

    def status(self, now: float) -> dict[str, Any]:
        """All of it for JSON: times in milliseconds where they are measures, else in seconds."""
        time = max(now + self._ahead, self._now if self._now is not None else -math.inf)
        configured: dict[int, list[Prefix]] = {}
        for one in self._overlay.destinations:
            configured.setdefault(one.egress, []).extend(one.prefixes)
        usual, stretched = self._periods
        return {
            "overlay": self._overlay.name,
            "address": _text(self._overlay.address),
            "period": usual,
            "period_others": stretched,
            "budget": self._budget,
            "counters": dict(self._counts),
            "egresses": [
                {
                    "egress": _text(egress.address),
                    "prefixes": [_prefix(one) for one in configured.get(egress.address, ())],
                    "learned": [_prefix(one) for one in egress.learned],
                    "candidates": [
                        self._shown(one, egress, time) for one in egress.candidates.values()
                    ],
                    "choice": self._name(egress.chosen),
                    "via": _via(egress.chosen),
                    "moved": None if egress.moved is None else time - egress.moved,
                    "why": egress.why,
                    "moves": egress.moves,
                }
                for egress in self._egresses.values()
            ],
            "members": [
                {"address": _text(one.member), "told": one.told is not None,
                 "known": "file" if one.member in self._tunnels else "learned"}
                for one in self._questions.values()
            ],
        }  # fmt: skip

    def _shown(self, one: _Candidate, egress: _Egress, time: float) -> dict[str, Any]:
        path = one.path
        return {
            "name": self._name(one.via),
            "via": _via(one.via),
            "state": path.shown(time),
            "chosen": one.via == egress.chosen,
            "rtt_raw": _milliseconds(path.raw),
            "rtt": _milliseconds(path.smoothed),
            "loss": path.loss,
            "last": None if path.last is None else time - path.last,
        }

    def _name(self, via: int) -> str:
        return "direct" if via == DIRECT else self._names[via]

    # Time.

    def _clock(self, now: float) -> float:
        """The engine's own time, which never goes back. Notices gaps."""
        if not math.isfinite(now):
            raise ValueError(f"{now} is no time")
        time = now + self._ahead
        if self._now is None:
            self._now = self._due = self._filled = time
            self._begin(time)
            return time
        if time < self._now:
            self._ahead += self._now - time
            time = self._now
            self._lose_track(time)
        elif time - self._due > max(_GAP * self._every, _LEAST_GAP):
            self._lose_track(time)
        self._now = time
        return time

    def _begin(self, time: float) -> None:
        """All paths get their phases: those by one neighbour lie evenly over the period, and
        those of one egress far from each other."""
        vias, egresses = len(self._vias), len(self._egresses)
        for number, egress in enumerate(self._egresses.values()):
            for place, via in enumerate(self._vias):
                if (one := egress.candidates.get(via)) is None:
                    continue
                between = (place + self._random.random()) / (vias * egresses)
                phase = (number / egresses + place / vias + between) % 1
                self._at(one, time + phase * self._period(one))
        self._spread(self._questions.values(), time)

    def _spread(self, tasks: Iterable[_Task], time: float) -> None:
        every = list(tasks)
        for number, one in enumerate(every):
            phase = (number + self._random.random()) / len(every)
            self._at(one, time + phase * self._period(one))

    def _lose_track(self, time: float) -> None:
        """What happened meanwhile is not known."""
        for waiting in self._waiting.values():
            if waiting.candidate is not None:
                waiting.candidate.waiting = 0
        self._waiting.clear()
        self._deadlines.clear()
        self._begin(time)
        self._starved = self._grace = -math.inf
        self._due = time
        for egress in self._egresses.values():
            egress.progress.again()
        for one in self._questions.values():
            one.at = time

    def _plan(self, time: float) -> None:
        """When is there something to do again?"""
        while self._queue and self._queue[0][2] != self._queue[0][3].stamp:
            heapq.heappop(self._queue)
        due = self._queue[0][0] if self._queue else math.inf
        due = max(due, self._starved)
        if self._deadlines:
            due = min(due, max(self._deadlines[0][0], self._grace))
        self._due = max(due, time)

    # What is sent.

    def _pace(self) -> None:
        """How often chosen paths, the others and questions have their turn, within the budget."""
        chosen = len(self._egresses)
        others = sum(len(one.candidates) for one in self._egresses.values()) - chosen
        budget = self._budget * _REGULAR
        usual = max(self._every, chosen / (budget / 2 if others else budget))
        rest = budget - chosen / usual
        stretched = max(self._every, others / rest) if others else usual
        self._periods = usual, stretched
        asked = max(_HELLO[0] * self._every, _HELLO[1])
        self._asked = max(asked, len(self._questions) / (_HELLOS * self._budget))

    def _period(self, task: _Task) -> float:
        if isinstance(task, _Candidate):
            egress = self._egresses[task.member]
            return self._periods[egress.chosen != task.via]
        return self._asked

    def _at(self, task: _Task, time: float) -> None:
        """Its turn is then, instead of when it was to be."""
        task.next = time
        task.stamp += 1
        self._push(task, time)

    def _push(self, task: _Task, time: float) -> None:
        self._entries += 1
        heapq.heappush(self._queue, (time, self._entries, task.stamp, task))

    def _send_due(self, time: float, effects: list[Effect]) -> None:
        self._tokens += (time - self._filled) * self._budget
        self._tokens = min(self._tokens, max(self._budget * _BURST, 1.0))
        self._filled = time
        while self._queue and self._queue[0][0] <= time:
            if self._tokens < _ONE:
                self._starved = time + (1 - self._tokens) / self._budget
                return
            _, _, stamp, task = heapq.heappop(self._queue)
            if stamp != task.stamp:
                continue
            self._tokens -= 1
            self._probe(task, time, effects)
            if task.next <= time:  # it was its turn, and not only an early look
                period = self._period(task)
                after = task.next + period
                self._at(task, after if after > time else time + period)

    def _probe(self, task: _Task, time: float, effects: list[Effect]) -> None:
        via, candidate = DIRECT, None
        if isinstance(task, _Candidate):
            via, candidate = task.via, task
            task.waiting += 1
        else:
            assert isinstance(task, _Question)
            if task.at < time - _UNTOLD * self._asked and task.told is not None:
                task.told = None
                self._review(time, effects)
            if task.member in self._egresses:
                via = self._egresses[task.member].chosen
        task.sent = time
        sequence, self._sequence = self._sequence, self._sequence + 1
        echo = struct.pack("!q", int(time * 1e6))
        message = wire.Message(
            wire.PROBE,
            self._overlay.address,
            task.member,
            via,
            sequence,
            echo,
            candidate is None,
            vain=self._complains(task.member),
        )
        self._waiting[sequence] = _Waiting(task.member, via, echo, time, candidate)
        self._deadlines.append((time + self._timeout, sequence))
        self._counts["sent"] += 1
        effects.append(Send(via, task.member, wire.pack(message, self._key)))

    # What comes.

    def _answer(self, probe: wire.Message, time: float, effects: list[Effect]) -> None:
        sender = self._senders.get(probe.sender)
        burst = max(self._budget * _BURST, 1.0)
        if sender is None or time > sender.at + _SILENT:
            if sender is None and not self._room(time):
                self._counts["limited"] += 1
                return
            sender = self._senders[probe.sender] = _Sender(wire.Window(), burst, time)
        if not sender.window.fresh(probe.sequence):
            self._counts["replayed"] += 1
            return
        sender.tokens = min(sender.tokens + (time - sender.at) * self._budget, burst)
        sender.at = time
        if sender.tokens < 1:
            self._counts["limited"] += 1
            return
        sender.tokens -= 1
        answer = wire.Message(
            wire.ANSWER, self._overlay.address, probe.sender, probe.via, probe.sequence, probe.echo,
            told=self._told if probe.asks else None, vain=self._complains(probe.sender),
        )  # fmt: skip
        self._blame(probe, time, effects)
        self._counts["answered"] += 1
        back = probe.via if probe.via in self._tunnels else DIRECT
        effects.append(Send(back, probe.sender, wire.pack(answer, self._key)))

    def _room(self, time: float) -> bool:
        """Can one more sender be remembered?"""
        if len(self._senders) < _MOST_SENDERS:
            return True
        for address in [a for a, one in self._senders.items() if time > one.at + _SILENT]:
            del self._senders[address]
        return len(self._senders) < _MOST_SENDERS

    def _take(self, answer: wire.Message, time: float, effects: list[Effect]) -> None:
        sequence = answer.sequence
        waiting = self._waiting.get(sequence)
        if waiting is None:
            if sequence >= self._sequence:
                self._counts["unexpected"] += 1
            elif sequence < self._first or not self._own.fresh(sequence):
                self._counts["replayed"] += 1
            else:
                self._counts["late"] += 1
            return
        if (answer.sender, answer.via, answer.echo) != (waiting.target, waiting.via, waiting.echo):
            self._counts["unexpected"] += 1
            return
        del self._waiting[sequence]
        self._own.fresh(sequence)
        self._counts["returned"] += 1
        self._blame(answer, time, effects)
        if (candidate := waiting.candidate) is not None:
            candidate.waiting -= 1
            # Later than that, but still waited for: it lay in the socket, who knows how long.
            timed = time <= waiting.sent + self._timeout
            candidate.path.answered(waiting.sent, time, timed=timed)
            if candidate.path.young and candidate.next > time + self._periods[0]:
                self._at(candidate, time + self._periods[0])
            egress = self._egresses.get(candidate.member)
            if egress is not None:
                self._choose(egress, time, effects)
        elif answer.told is not None:
            self._hear(answer.sender, answer.told, time, effects)

    def _expire(self, time: float, effects: list[Effect]) -> None:
        """Answers that did not come in time."""
        while self._deadlines and self._deadlines[0][0] <= time:
            _, sequence = self._deadlines.popleft()
            waiting = self._waiting.pop(sequence, None)
            if waiting is None or (candidate := waiting.candidate) is None:
                continue
            self._counts["missed"] += 1
            candidate.waiting -= 1
            out = candidate.path.missed(waiting.sent)
            egress = self._egresses.get(candidate.member)
            if egress is None or egress.candidates.get(candidate.via) is not candidate:
                continue  # forgotten meanwhile
            if candidate.via == egress.chosen and (out or candidate.path.state != OUT):
                self._look_early(egress, candidate, time)
            self._choose(egress, time, effects)

    def _look_early(self, egress: _Egress, missing: _Candidate, time: float) -> None:
        """An answer of the chosen path is missing: is it out, and do others work?"""
        unsure = missing.path.state != OUT or missing.path.missing < 2
        if unsure and not missing.waiting and missing.next > time + self._timeout / 2:
            self._push(missing, time)
        place = time
        for other in egress.candidates.values():
            soon = other.waiting or other.next <= time + self._every
            if other is not missing and not soon and other.sent < time - self._every:
                place += _APART
                self._push(other, place)

    # What is chosen.

    def _choose(self, egress: _Egress, time: float, effects: list[Effect]) -> None:
        since = -math.inf if egress.moved is None else egress.moved
        via = better(egress.paths, egress.chosen, since, time, self._rule)
        if via == egress.chosen:
            return
        before, after = egress.paths[egress.chosen], egress.paths[via]
        here, there = self._name(egress.chosen), self._name(via)
        state = before.shown(time)
        if state == OUT:
            reason = f"{here}: {before.missing} answers in a row are missing"
        elif state == paths.SUSPECT:
            reason = f"{here} is suspect: packets by it did not come back"
        else:
            reason = f"{there}: {_described(after)}, {here}: {_described(before)}"
        self._move(egress, via, reason, time, effects)

    def _move(
        self, egress: _Egress, via: int, reason: str, time: float, effects: list[Effect]
    ) -> None:
        prior, egress.chosen = egress.chosen, via
        egress.moved, egress.why = time, reason
        egress.moves += 1
        egress.progress.again()
        one = egress.candidates[via]
        if one.next > time + self._periods[0]:  # it is probed more often from now on
            self._at(one, time + self._random.random() * self._periods[0])
        effects.append(Move(egress.address, via, prior, reason))

    def _distrust(
        self, egress: _Egress, stalled: float, time: float, effects: list[Effect]
    ) -> None:
        """Packets by the chosen path do not come back: to the next one that was not tried yet."""
        path = egress.paths[egress.chosen]
        silent = path.state == OUT
        egress.vain = True
        egress.tried.add(egress.chosen)
        path.suspected(time)
        rest = {via: one for via, one in egress.paths.items() if via not in egress.tried}
        usable = {
            via: one for via, one in rest.items()
            if one.state == paths.WORKING and time >= one.suspect
        }  # fmt: skip
        if not usable and silent:  # no answers by any: the data itself may tell
            usable = rest
        what = f"no packets have come back for {stalled:.1f} s by {self._name(egress.chosen)}"
        if usable:
            via = min(usable, key=lambda one: usable[one].cost()[1])
            passing = "" if silent else ", though its probes pass"
            self._move(egress, via, what + passing, time, effects)
            return
        for via in egress.tried:
            egress.paths[via].cleared()
        egress.tried.clear()
        egress.vain = False
        egress.progress.alive = False
        egress.calm = time + min(_ROUND * 2**egress.rounds, _LONGEST_ROUND)
        egress.rounds = min(egress.rounds + 1, 8)
        working = {v: one for v, one in egress.paths.items() if one.state == paths.WORKING}
        best = min(working, key=lambda via: working[via].cost()[1], default=egress.chosen)
        if best != egress.chosen:
            self._move(egress, best, f"{what}, nor by any other: nobody is there", time, effects)

    def _complains(self, member: int) -> bool:
        egress = self._egresses.get(member)
        return egress is not None and egress.vain

    def _blame(self, message: wire.Message, time: float, effects: list[Effect]) -> None:
        """The other side's packets bring nothing back: perhaps it is our path that loses them."""
        egress = self._egresses.get(message.sender)
        if egress is None or egress.blamed == message.vain:
            return
        egress.blamed = message.vain
        if not message.vain or time < egress.calm:
            return
        others = {
            via: one for via, one in egress.paths.items()
            if via != egress.chosen and one.state == paths.WORKING and time >= one.suspect
        }  # fmt: skip
        if not others:
            return
        was = self._name(egress.chosen)
        egress.paths[egress.chosen].suspected(time)
        via = min(others, key=lambda one: others[one].cost()[1])
        self._move(
            egress, via, f"its packets bring nothing back: what goes by {was} may be lost", time,
            effects,
        )  # fmt: skip

    # What is learned.

    def _hear(self, member: int, told: wire.Told, time: float, effects: list[Effect]) -> None:
        question = self._questions.get(member)
        if question is None:
            return
        before, question.told, question.at = question.told, told, time
        if before != told:
            self._review(time, effects)

    def _review(self, time: float, effects: list[Effect]) -> None:
        """Make what is known what is told."""
        known = dict.fromkeys(learning.members(self._overlay, self._heard()))
        for address in [a for a in self._questions if a not in known]:
            self._questions.pop(address).stamp += 1
        fresh = [_Question(a, at=time) for a in known if a not in self._questions]
        self._questions |= {one.member: one for one in fresh}
        before = {one.address: one.learned for one in self._egresses.values() if one.learned}
        after = learning.networks(self._overlay, self._heard(), before)
        for address, prefixes in before.items():
            gone = tuple(one for one in prefixes if one not in after.get(address, ()))
            self._egresses[address].learned = after.get(address, ())
            if gone:
                effects.append(Forgotten(address, gone))
            if address not in after and address not in self._overlay.egresses:
                self._drop(address)
        new: list[_Task] = []
        for address, prefixes in after.items():
            if address not in self._egresses:
                new += self._add(address, DIRECT).candidates.values()
            self._egresses[address].learned = prefixes
            more = tuple(one for one in prefixes if one not in before.get(address, ()))
            if more:
                effects.append(Learned(address, more, self._egresses[address].chosen))
        self._pace()
        self._spread(new, time)
        self._spread(fresh, time)

    def _heard(self) -> dict[int, wire.Told | None]:
        return {address: one.told for address, one in self._questions.items()}

    def _add(self, address: int, chosen: int) -> _Egress:
        candidates = {
            via: _Candidate(
                address, via=via, path=Path(self._overlay.lost, self._overlay.measure, self._every)
            )
            for via in self._vias
            if via != address
        }
        egress = _Egress(
            address, candidates, {via: one.path for via, one in candidates.items()},
            chosen if chosen in candidates else DIRECT,
        )  # fmt: skip
        self._egresses[address] = egress
        return egress

    def _drop(self, address: int) -> None:
        for one in self._egresses.pop(address).candidates.values():
            one.stamp += 1


def _described(path: Path) -> str:
    time = f"{(path.smoothed or 0.0) * 1000:.1f} ms"
    return f"{time}, {path.loss:.1%} lost" if path.loss else time


def _milliseconds(time: float | None) -> float | None:
    return None if time is None else round(time * 1000, 3)


def _text(address: int) -> str:
    return str(IPv4Address(address))


def _prefix(one: Prefix) -> str:
    return f"{_text(one[0])}/{one[1]}"


def _via(via: int) -> str | None:
    return None if via == DIRECT else _text(via)
