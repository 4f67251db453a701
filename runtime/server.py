"""One queue of a policy, served within a process: its reader, its engine, what the engine asks for.

Whoever has one polls `fileno`, calls `serve` when there are packets, `told` now and then,
and `look` whenever the alarm goes (`watching`): that breaks off a handler that hangs.
"""

import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any, Final

from itmlang import ir
from itmlang.nft.model import Queue
from runtime.engine import Engine, Log, Send
from runtime.handlers import Handler, HungError
from runtime.netqueue import RawReader, Reader, Settings
from runtime.pathmtu import PathMtu

ALARM: Final = 0.25  # seconds between two looks at a handler
_PATIENCE: Final = 4  # looks after which one that is still the same is broken off


class Interfaces(dict[int, str | None]):
    """Interfaces' names by index, each asked once until `clear`."""

    def __missing__(self, index: int) -> str | None:
        name = None
        with suppress(OSError):
            name = socket.if_indextoname(index) if index else None
        self[index] = name
        return name


class Server:
    """Serves one queue, `number` among the policy's, in the calling thread's network namespace.

    Lines for the log go to `log`. Raises `MachineError` if the kernel gives us no queue.
    """

    def __init__(
        self,
        policy: ir.Policy,
        queue: Queue,
        number: int,
        handlers: Mapping[str, Handler],
        log: Callable[[str], None],
    ) -> None:
        self._paths, self._names = PathMtu(), Interfaces()
        self.engine = Engine(policy, queue, handlers, self._paths, self._names)
        self._queue, self._log = queue, log
        self._reader = self._open(number)
        self._seen, self._looks = 0, 0
        self._raw: socket.socket | None = None

    def _open(self, number: int) -> Reader:
        """The queue, by the reader that fits.

        Bytes that handlers rewrite go by the library's. What only reads, and tunnels, whose
        bytes are our own, go by the one that takes many packets at a time.
        """
        queue, engine = self._queue, self.engine
        settings = Settings(
            number, queue.length, queue.buffer, engine.copy, segments=not engine.reads
        )
        packet, unseen, clock = engine.packet, engine.unseen, time.monotonic

        def serve(
            payload: bytes, mark: int, hook: int, input: int, output: int, length: int
        ) -> Any:
            try:
                return packet(payload, mark, hook, input, output, length, clock())
            except BaseException:  # broken off a moment too late: nothing may get out of here
                return unseen(mark)

        if engine.reads or engine.tunnels:
            return RawReader(settings, serve, unseen)
        from runtime.queue import LibraryReader

        return LibraryReader(settings, serve, unseen)

    def fileno(self) -> int:
        """What poll(2) is asked for packets."""
        return self._reader.fileno()

    def serve(self) -> int:
        """Handle a bounded number of those packets that wait; how many. Raises OSError."""
        handled = self._reader.read()
        self._perform()
        return handled

    def reload(self, handlers: Mapping[str, Handler]) -> bool:
        """Handle packets by these handlers from now on; False if that takes another reader."""
        engine = self.engine
        before = engine.reads, engine.copy
        engine.reload(handlers)
        return (engine.reads, engine.copy) == before

    def look(self) -> None:
        """Break a handler off that was running at the last looks already: raises `HungError` in it."""
        engine = self.engine
        if not engine.inside or engine.calling != self._seen:
            self._seen, self._looks = engine.calling, 0
            return
        self._looks += 1
        if self._looks >= _PATIENCE:
            self._looks = 0
            raise HungError

    def refresh(self) -> None:
        """From here on ask anew what interfaces and routes there are."""
        self._names.clear()

    def told(self) -> dict[str, Any]:
        """What it did so far."""
        state = self.engine.state
        told: dict[str, Any] = {
            **asdict(self.engine.counts),
            "overruns": self._reader.overruns,
            "truncated": self._reader.truncated,
        }
        if self._queue.whole:
            told["classes"] = {n: [state.packets[n], state.bytes[n]] for n in state.packets}
        return told

    def close(self) -> None:
        """Handle what waits, and leave the queue."""
        self._reader.close()
        self._perform()
        if self._raw is not None:
            self._raw.close()
            self._raw = None

    def _perform(self) -> None:
        """Do what the engine asks for; what it asks for that nobody knows is a mistake."""
        for effect in self.engine.effects():
            match effect:
                case Send(packet):
                    self._send(packet)
                case Log(text):
                    self._log(text)
                case _:
                    raise TypeError(f"unknown effect: {effect!r}")

    def _send(self, packet: bytes) -> None:
        if self._raw is None:
            self._raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        destination = socket.inet_ntoa(packet[16:20])
        with suppress(OSError):  # an error that cannot be told is not told
            self._raw.sendto(packet, (destination, 0))


@contextmanager
def watching(look: Callable[[], None]) -> Iterator[None]:
    """Have the process's alarm call `look` now and then, which may raise into what runs."""
    before = signal.signal(signal.SIGALRM, lambda *_: look())
    signal.siginterrupt(signal.SIGALRM, False)
    signal.setitimer(signal.ITIMER_REAL, ALARM, ALARM)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
