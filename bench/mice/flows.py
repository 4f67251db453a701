"""Many TCP downloads at given times, light enough to leave the machine to the kernel.

One process sends, one receives; each is a single loop over epoll. The receiver throws the
data away unread (MSG_TRUNC) and is woken for many packets at a time while much is missing
(SO_RCVLOWAT); the sender wakes once for a whole request (TCP_DEFER_ACCEPT). A flow's time is
taken at the receiver, from just before connect() to the last byte.
"""

import multiprocessing
import os
import selectors
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Final

from bench.mice.sizes import Arrival
from runtime.traffic import Namespace

PORT: Final = 5001
# Each flow has a port of its own: whoever counts flows by their ports for minutes would take one
# for the continuation of another.
FIRST_PORT, PORTS = 10_000, 50_000
CHUNK: Final = 1 << 20
LOW_WATER: Final = 1 << 16
PATIENCE: Final = 60.0  # seconds after the last arrival for flows that are not done
_MSG_TRUNC: Final = socket.MSG_TRUNC

Done = tuple[float, float | None]  # began, seconds since the start; took, None: never done


class FlowsError(Exception):
    """The flows could not run; the message says why."""


def run(
    sender: Namespace, address: str, receiver: Namespace, flows: Sequence[Arrival], congestion: str
) -> tuple[float, Sequence[Done]]:
    """Download every flow at its time; the monotonic clock at the start, and what became of each.

    `address` is the sender's. Raises FlowsError.
    """
    context = multiprocessing.get_context("fork")  # the namespaces are open files
    ready, tell_ready = context.Pipe(duplex=False)
    results, tell_results = context.Pipe(duplex=False)
    server = context.Process(target=_serve, args=(sender, address, congestion, tell_ready))
    client = context.Process(
        target=_receive, args=(receiver, address, flows, congestion, tell_results)
    )
    server.start()
    try:
        if not ready.poll(PATIENCE) or ready.recv() is not None:
            raise FlowsError(f"the sender cannot begin: has the kernel {congestion}?")
        client.start()
        tell_results.close()
        try:
            found: tuple[float, Sequence[Done]] = results.recv()
        except EOFError:
            raise FlowsError("the receiver broke off") from None
        return found
    finally:
        for process in (client, server):
            if process.pid is not None:
                process.terminate()
                process.join()


def _quick() -> None:
    """Before other work of the machine: what waits here would count as time on the link."""
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(10))


def _tcp(congestion: str) -> socket.socket:
    made = socket.socket()
    made.setblocking(False)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def _serve(host: Namespace, address: str, congestion: str, ready: Connection) -> None:
    _quick()
    zeros = memoryview(bytes(CHUNK))
    left: dict[socket.socket, int] = {}
    with host.entered(), selectors.EpollSelector() as waiting:
        try:
            listener = _tcp(congestion)
        except OSError as error:
            ready.send(error.errno)
            return
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 5)
        listener.bind((address, PORT))
        listener.listen(1024)
        waiting.register(listener, selectors.EVENT_READ)
        ready.send(None)

        def go_on(link: socket.socket) -> None:
            try:
                while missing := left[link]:
                    left[link] -= link.send(zeros[: min(missing, CHUNK)])
                link.shutdown(socket.SHUT_WR)
            except BlockingIOError:
                return
            except OSError:
                pass
            del left[link]
            waiting.unregister(link)
            link.close()

        while True:
            for key, _ in waiting.select():
                link = key.fileobj
                assert isinstance(link, socket.socket)
                if link is not listener:
                    go_on(link)
                    continue
                with suppress(BlockingIOError):
                    while True:
                        link, _ = listener.accept()
                        link.setblocking(False)
                        left[link] = int.from_bytes(link.recv(8))
                        waiting.register(link, selectors.EVENT_WRITE)
                        go_on(link)


def _receive(
    host: Namespace,
    address: str,
    flows: Sequence[Arrival],
    congestion: str,
    results: Connection,
) -> None:
    _quick()
    buffer = bytearray(CHUNK)
    began: list[float] = [0.0] * len(flows)
    took: list[float | None] = [None] * len(flows)
    left = [flow.size for flow in flows]
    clock = time.monotonic
    with host.entered(), selectors.EpollSelector() as waiting:
        start, following, open_ = clock() + 0.05, 0, 0
        last = start + flows[-1].at + PATIENCE

        def begin(number: int) -> None:
            link = _tcp(congestion)
            link.bind(("", FIRST_PORT + number % PORTS))
            if left[number] > 2 * LOW_WATER:
                link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, LOW_WATER)
            began[number] = clock()
            with suppress(BlockingIOError):
                link.connect((address, PORT))
            waiting.register(link, selectors.EVENT_WRITE, number)

        def ended(link: socket.socket) -> None:
            waiting.unregister(link)
            link.close()

        while (following < len(flows) or open_) and clock() < last:
            due = start + flows[following].at if following < len(flows) else last
            for key, what in waiting.select(max(0.0, due - clock())):
                link, number = key.fileobj, key.data
                assert isinstance(link, socket.socket)
                try:
                    if what & selectors.EVENT_WRITE:
                        link.send(left[number].to_bytes(8))
                        waiting.modify(link, selectors.EVENT_READ, number)
                        continue
                    got = link.recv_into(buffer, CHUNK, _MSG_TRUNC)
                except BlockingIOError:
                    continue
                except OSError:
                    ended(link)
                    open_ -= 1
                    continue
                before, left[number] = left[number], left[number] - got
                if before > 2 * LOW_WATER >= left[number]:
                    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
                if not left[number]:
                    took[number] = clock() - began[number]
                if not left[number] or not got:
                    ended(link)
                    open_ -= 1
            while following < len(flows) and clock() >= start + flows[following].at:
                begin(following)
                following += 1
                open_ += 1
        results.send((start, [(b - start, t) for b, t in zip(began, took, strict=True)]))
