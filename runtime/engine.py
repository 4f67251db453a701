"""What Python does with packets of a policy: no sockets, no clock, events in and effects out.

A packet comes with the class bits of its mark, which say what of the policy is left to do
to it: the actions of a class from one on, or (`run python`) all of it. The answer is a
verdict, new bytes if it was changed, and a mark with clear class bits; numbers in those
bits tell the kernel's rules what is theirs to do (reject, remember). Whatever else is to
happen (an ICMP error to be sent, a line for the log) is an effect, taken by `effects`.

A handler is a guest: whatever it raises or answers costs the packet at hand what
`fail open` or `fail closed` says, is counted, and is logged at a bounded rate.
What a class is left to do is worked out once; the common cases (one handler, one tunnel)
have functions of their own, because packets pass here.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Final, Protocol

from itmlang import ir, marks
from itmlang.actions import Action
from itmlang.actions.encapsulate import Decapsulate, Encapsulate
from itmlang.fields import FIELDS
from itmlang.headers import Packet as Headers
from itmlang.nft.model import TRACKED, Queue
from itmlang.nft.queueing import REJECTED
from itmlang.packet import MalformedError, Packet
from itmlang.semantics import Did, State
from itmlang.tunnel import (
    PROTOCOL,
    Expired,
    Refused,
    TooBig,
    Tunnel,
    decapsulate,
    fragmentation_needed,
    time_exceeded,
)
from runtime.handlers import (
    HEADERS,
    Handler,
    HandlerError,
    HungError,
    Verdict,
    answered,
    described,
)

DROP, ACCEPT = 0, 1  # NF_DROP, NF_ACCEPT of linux/netfilter.h
Answer = tuple[int, bytes | bytearray | None, int]
# What handles a packet: its bytes, mark, hook, interfaces.
Part = Callable[[bytes, int, int, int, int], Answer]
# NF_INET_* of linux/netfilter.h.
HOOKS: Final = ("prerouting", "input", "forward", "output", "postrouting")
_MINE: Final = marks.ALL ^ marks.CLASS_BITS  # what is left of a mark
_TUNNELS: Final = marks.TUNNEL_BITS
_OURS: Final = marks.ALL ^ marks.KEPT  # the bits that a handler may write
_LOGGED: Final = 5  # lines a second
_ASKED_AGAIN: Final = 1.0  # seconds for which what is known of a way is taken to hold


@dataclass(frozen=True)
class Send:
    """A packet to be sent as it is, towards its destination."""

    packet: bytes


@dataclass(frozen=True)
class Log:
    text: str


Effect = Send | Log


class Paths(Protocol):
    """What is known of the ways to other machines; addresses are IPv4 integers."""

    def source(self, destination: int) -> int:
        """Our address towards another one, 0 if there is no way."""

    def mtu(self, destination: int, source: int = 0) -> int:
        """The largest packet that the way takes, in bytes; 0 if there is no way."""

    def towards(self, other: int) -> int:
        """Our address towards any machine, 0 if there is no way."""


class Names(Protocol):
    """Interfaces by their index; 0 is none."""

    def __getitem__(self, index: int) -> str | None: ...


@dataclass
class Counts:
    """Packets since the start: handed over, dropped by a verdict, those that a handler failed
    on, those for which it took too long, those that no tunnel took, and those of which too
    little was copied to handle them."""

    packets: int = 0
    dropped: int = 0
    failed: int = 0
    hung: int = 0
    refused: int = 0
    cut: int = 0


@dataclass
class _Rate:
    """Lets so many lines a second pass, and counts the others."""

    since: float = 0.0
    passed: int = 0
    held: int = 0

    def take(self, now: float) -> bool:
        if now - self.since >= 1:
            self.since, self.passed = now, 0
        self.passed += 1
        if self.passed > _LOGGED:
            self.held += 1
            return False
        return True


def _ends(policy: ir.Policy) -> dict[str, Encapsulate]:
    """The classes whose last action, and the only one of Python's, leads into a tunnel."""
    found = {}
    for name, steps in policy.process.items():
        last = steps[-1] if steps else None
        if (
            isinstance(last, ir.Step)
            and isinstance(last.action, Encapsulate)
            and ir.python_part(steps) == len(steps) - 1
        ):
            found[name] = last.action
    return found


class Engine:
    """One queue's worth of a policy.

    `now` of each call is seconds of a clock that never goes back. Handlers are given by
    their names, all that the policy calls.
    """

    def __init__(
        self,
        policy: ir.Policy,
        queue: Queue,
        handlers: Mapping[str, Handler],
        paths: Paths,
        names: Names,
    ) -> None:
        self.policy, self.queue = policy, queue
        self.counts = Counts()
        self.calling = 0  # how often a handler was called; see `overlong`
        self.inside = False  # is one running?
        self._paths, self._names = paths, names
        self._effects: list[Effect] = []
        self._rate = _Rate()
        self._tracks = policy.tracks
        self._now = 0.0
        self._hook = ""  # where the packet at hand was taken from
        self._tunnels: dict[Encapsulate, tuple[Tunnel, int]] = {}
        self._renew = 0.0
        # Of a whole policy, tunnels that end a class come behind all that it learns: they
        # need no packet taken apart, and are done by themselves.
        self._entering = _ends(policy) if queue.whole else {}
        process = {
            name: steps[:-1] if name in self._entering else steps
            for name, steps in policy.process.items()
        }
        self.state = State(replace(policy, process=process), {}, Random(0), self._do)
        self._decisions = {
            name: number << marks.CLASS_SHIFT
            for number, name in enumerate(queue.decisions, len(queue.entries) + 1)
        }
        # The answer to a packet that could not be handled.
        self._lost = ACCEPT if queue.fails_open else DROP
        self._take(handlers)

    def _take(self, handlers: Mapping[str, Handler]) -> None:
        """Work out what these handlers make of the policy."""
        self._handlers = dict(handlers)
        entries, process = self.queue.entries, self.policy.process
        self._parts = [self._part(name, begin) for name, begin in entries]
        # Of which numbers a packet may be shown in part: those for a handler alone that asks for
        # a packet's beginning.
        self._shown = [False] * (marks.MOST_NUMBERS + 1)
        for number, (name, begin) in enumerate(entries, 1):
            first = process[name][begin]
            if isinstance(first, ir.Step) and first.action.handler:
                part = self.queue.copy is not None or self._handlers[first.action.handler].reads
                alone = len(process[name]) == begin + 1
                self._shown[number] = (alone and part) or first.action.once

    @property
    def reads(self) -> bool:
        """Is it certain that no packet's bytes are changed here?"""
        if self.queue.whole:
            return False
        return all(self._only_reads(name, begin) for name, begin in self.queue.entries)

    def _only_reads(self, name: str, begin: int) -> bool:
        steps = self.policy.process[name][begin:]
        step = steps[0]
        if not isinstance(step, ir.Step) or not step.action.handler:
            return False
        handler = self._handlers[step.action.handler]
        return step.action.once or (
            len(steps) == 1 and (handler.reads or self.queue.copy is not None)
        )

    @property
    def tunnels(self) -> bool:
        """Is all that it changes of packets' bytes the way into tunnels and out of them?"""
        process, queue = self.policy.process, self.queue
        parts = process.values() if queue.whole else (process[n][b:] for n, b in queue.entries)
        return all(
            isinstance(step.action, Encapsulate | Decapsulate)
            for part in parts
            for step in ir.every_step(part)
        )

    @property
    def copy(self) -> int:
        """How many bytes of each packet are wanted."""
        if not self.reads:
            whole = [h.copy for h in self._handlers.values()] if self._called_alone else []
            return max(whole, default=65_535)
        if self.queue.copy is not None:
            return self.queue.copy
        return max((min(h.copy, HEADERS) for h in self._handlers.values()), default=HEADERS)

    @property
    def _called_alone(self) -> bool:
        """Is all that Python does a call?"""
        parts = [self.policy.process[name][begin:] for name, begin in self.queue.entries]
        return not self.queue.whole and all(
            len(part) == 1 and isinstance(part[0], ir.Step) and part[0].action.handler
            for part in parts
        )

    def effects(self) -> Iterable[Effect]:
        """What is to be done beside the answers, since the last call."""
        found, self._effects = self._effects, []
        return found

    def reload(self, handlers: Mapping[str, Handler]) -> None:
        """The same handlers, loaded anew."""
        self._take(handlers)

    # Packets.

    def packet(
        self, payload: bytes, mark: int, hook: int, input: int, output: int, length: int, now: float
    ) -> Answer:
        """The answer to one packet; what is copied of it begins with its IP header."""
        self.counts.packets += 1
        self._now = now
        number = (mark & marks.CLASS_BITS) >> marks.CLASS_SHIFT
        if length and not self._shown[number]:
            self.counts.cut += 1
            return self._lost, None, mark & _MINE
        if self.queue.whole:
            return self._whole(payload, mark, number, hook, input, output)
        if not 0 < number <= len(self._parts):
            # Not from our rules as they are: somebody else's packet passes.
            return self._lost, None, mark & _MINE
        return self._parts[number - 1](payload, mark, hook, input, output)

    def unseen(self, mark: int) -> Answer:
        """The answer to a packet of which not all is here, where a handler changed it."""
        self.counts.cut += 1
        return self._lost, None, mark & _MINE

    def _whole(
        self, payload: bytes, mark: int, number: int, hook: int, input: int, output: int
    ) -> Answer:
        """A packet through the whole policy."""
        try:
            packet = Packet(
                bytearray(payload), self._names[input], self._names[output], mark & _MINE
            )
        except MalformedError:
            return self._lost, None, mark & _MINE
        if self._tracks and 0 < number <= len(TRACKED):
            state, direction = TRACKED[number - 1]
            packet.ct_state = FIELDS["ct.state"].type.names[state]
            names = FIELDS["ct.direction"].type.names
            packet.ct_direction = names[direction] if direction else None
        self._hook = HOOKS[hook]
        outcome = self.state.step(packet, self._now)
        entering = self._entering.get(outcome.name or "")
        if entering is None or outcome.verdict != "accept":
            return self._answer(packet, payload, outcome.verdict, mark)
        made = self._encapsulate(entering, bytes(packet.data), hook)
        if made is None:
            self.counts.dropped += 1
            return DROP, None, mark & _MINE
        return ACCEPT, made, mark & _TUNNELS | packet.mark & _OURS

    def _part(self, name: str, begin: int) -> Part:
        """What does the rest of a class to a packet."""
        steps = self.policy.process[name][begin:]
        first = steps[0]
        if isinstance(first, ir.Step):
            handler = first.action.handler
            if first.action.once:
                return self._deciding(name, self._handlers[handler])
            if handler and len(steps) == 1:
                return self._calling(name, self._handlers[handler])
            if isinstance(first.action, Encapsulate) and len(steps) == 1:
                return self._tunnelling(first.action)
        return self._resuming(name, begin)

    def _resuming(self, name: str, begin: int) -> Part:
        """Any rest of a class, by the semantics."""

        def resume(payload: bytes, mark: int, hook: int, input: int, output: int) -> Answer:
            names = self._names
            try:
                packet = Packet(bytearray(payload), names[input], names[output], mark & _MINE)
            except MalformedError:
                return self._lost, None, mark & _MINE
            self._hook = HOOKS[hook]
            return self._answer(
                packet, payload, self.state.resume(name, begin, packet, self._now), mark
            )

        return resume

    def _calling(self, name: str, handler: Handler) -> Part:
        """One handler, and nothing else."""
        function, names, counts = handler.function, self._names, self.counts

        def call(payload: bytes, mark: int, hook: int, input: int, output: int) -> Answer:
            packet = Headers(
                payload,
                mark=mark & _OURS,
                input=names[input],
                output=names[output],
                hook=HOOKS[hook],
            )
            self.calling += 1
            self.inside = True
            try:
                said = function(packet)
                if said is None or said is Verdict.ACCEPT or said is Verdict.MODIFIED:
                    new = packet.data if packet.altered else None
                    return ACCEPT, new, mark & _TUNNELS | packet.mark & _OURS
                if said is Verdict.DROP:
                    counts.dropped += 1
                    return DROP, None, mark & _MINE
                did = self._did(said)
            except BaseException as error:
                self._failed(handler, error)
                return self._lost, None, mark & _MINE
            finally:
                self.inside = False
            return self._moved(name, did, packet, payload, mark)

        return call

    def _moved(self, name: str, did: Did, headers: Headers, payload: bytes, mark: int) -> Answer:
        """The actions of the class that a handler named; its own have been done."""
        try:
            packet = Packet(bytearray(headers.data), headers.input, headers.output, headers.mark)
        except MalformedError:
            return self._lost, None, mark & _MINE
        verdict = ""
        if did.name is not None and did.name != name:
            verdict = self.state.resume(did.name, 0, packet, self._now, moved=True)
        return self._answer(packet, payload, verdict, mark)

    def _deciding(self, name: str, handler: Handler) -> Part:
        """One handler for a connection's first packet; the kernel keeps what it says."""
        names = self._names

        def decide(payload: bytes, mark: int, hook: int, input: int, output: int) -> Answer:
            packet = Headers(
                payload,
                mark=mark & _OURS,
                input=names[input],
                output=names[output],
                hook=HOOKS[hook],
            )
            did = self._called(handler, packet)
            if did is None:
                return self._lost, None, mark & _MINE
            if did.verdict == "drop":
                self.counts.dropped += 1
                return ACCEPT, None, mark & _MINE | self._decisions["drop"]
            decision = f"class {did.name}" if did.name not in (None, name) else f"accept {name}"
            if decision not in self._decisions:
                self._failed(
                    handler, ValueError(f"a connection cannot be given the class {did.name}")
                )
                return self._lost, None, mark & _MINE
            if packet.mark != mark & _OURS:
                decision += " marked"
            return ACCEPT, None, mark & _TUNNELS | packet.mark & _OURS | self._decisions[decision]

        return decide

    def _tunnelling(self, action: Encapsulate) -> Part:
        """One tunnel, and nothing else."""
        encapsulate = self._encapsulate

        def wrap(payload: bytes, mark: int, hook: int, input: int, output: int) -> Answer:
            made = encapsulate(action, payload, hook)
            if made is None:
                self.counts.dropped += 1
                return DROP, None, mark & _MINE
            return ACCEPT, None if made is payload else made, mark & _MINE

        return wrap

    def _answer(self, packet: Packet, payload: bytes, verdict: str, mark: int) -> Answer:
        if verdict == "drop":
            self.counts.dropped += 1
            return DROP, None, mark & _MINE
        kept = mark & _TUNNELS | packet.mark & _OURS
        changed = packet.data if packet.data != payload else None
        if verdict == "reject":
            return ACCEPT, changed, kept | REJECTED << marks.CLASS_SHIFT
        return ACCEPT, changed, kept

    # Actions, for the semantics.

    def _do(self, action: Action, packet: Packet, now: float) -> Did:
        match action:
            case Encapsulate():
                payload = bytes(packet.data)
                made = self._encapsulate(action, payload, HOOKS.index(self._hook))
            case Decapsulate():
                payload = bytes(packet.data)
                made = self._decapsulate(payload)
            case _:
                return self._do_call(self._handlers[action.handler], packet)
        if made is None:
            return Did("drop")
        if made is not payload:
            packet.replace(made)
        return Did()

    def _do_call(self, handler: Handler, packet: Packet) -> Did:
        headers = Headers(
            bytes(packet.data), mark=packet.mark & _OURS, input=packet.input, output=packet.output,
            hook=self._hook,
        )  # fmt: skip
        did = self._called(handler, headers)
        if did is None:
            return Did("accept" if self.queue.fails_open else "drop")
        packet.mark = packet.mark & marks.KEPT | headers.mark & _OURS
        if headers.altered:
            packet.replace(headers.data)
        return did

    def _called(self, handler: Handler, packet: Headers) -> Did | None:
        """What a handler says; None if it failed."""
        self.calling += 1
        self.inside = True
        try:
            return self._did(handler.function(packet))
        except BaseException as error:
            self._failed(handler, error)
            return None
        finally:
            self.inside = False

    def _did(self, said: object) -> Did:
        did = answered(said)
        if did.name is not None and did.name not in self.policy.classes:
            raise HandlerError(f"the policy has no class {did.name}")
        return did

    def _failed(self, handler: Handler, error: BaseException) -> None:
        if isinstance(error, HungError):
            self.counts.hung += 1
            text = f"{handler.target} took too long"
        else:
            self.counts.failed += 1
            text = f"{handler.target} failed: {described(error)}"
        self.log(text)

    def log(self, text: str) -> None:
        """A line for the log, if there were not too many within this second."""
        held = self._rate.held
        if self._rate.take(self._now):
            more = f" ({held} more lines were held back)" if held else ""
            self._rate.held = 0
            self._effects.append(Log(text + more))

    # Tunnels.

    def _encapsulate(self, action: Encapsulate, payload: bytes, hook: int) -> bytes | None:
        """The packet in its tunnel, as it is if it is no IPv4 packet, None if it is to go."""
        if payload[:1] and payload[0] >> 4 != 4:
            return payload
        tunnel = self._tunnels.get(action)
        if tunnel is None or self._now >= self._renew:
            tunnel = self._way(action)
        if tunnel is None:
            self._refused("there is no route to the tunnel's end")
            return None
        forwarded = hook == 0
        made = tunnel[0].encapsulate(payload, tunnel[1], forwarded)
        match made:
            case bytes():
                return made
            case TooBig(mtu):
                self._tell(payload, lambda router: fragmentation_needed(payload, router, mtu))
            case Expired():
                self._tell(payload, lambda router: time_exceeded(payload, router))
            case Refused(reason):
                self._refused(reason)
        return None

    def _way(self, action: Encapsulate) -> tuple[Tunnel, int] | None:
        """The tunnel, and what its way takes as of now; asked again every second."""
        if self._now >= self._renew:
            self._tunnels.clear()
            self._renew = self._now + _ASKED_AGAIN
        source = action.source or self._paths.source(action.destination)
        mtu = self._paths.mtu(action.destination, action.source or 0)
        if not source or not mtu:
            return None
        found = self._tunnels[action] = Tunnel(source, action.destination), mtu
        return found

    def _decapsulate(self, payload: bytes) -> bytes | None:
        if payload[0] >> 4 != 4 or payload[9] != PROTOCOL:
            return payload
        made = decapsulate(payload)
        if isinstance(made, Refused):
            self._refused(made.reason)
            return None
        return made

    def _tell(self, payload: bytes, error: Callable[[int], bytes | None]) -> None:
        """An ICMP error to the packet's sender, from our address towards it."""
        sender = int.from_bytes(payload[12:16])
        router = self._paths.towards(sender)
        made = error(router) if router else None
        if made is not None:
            self._effects.append(Send(made))

    def _refused(self, reason: str) -> None:
        self.counts.refused += 1
        self.log(f"a packet did not go through its tunnel: {reason}")
