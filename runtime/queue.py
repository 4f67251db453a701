"""Packets from a queue of the kernel by NetfilterQueue; the only user of that library.

Strategy: the library takes messages apart and gives verdicts, one packet at a time.
Messages are fetched for it (`run_socket` takes whatever has `recv`): so a call is bounded,
overruns are seen, and nothing is cut off. The library's own `run` reads into 4 096 bytes,
cuts packets to 4 016, and does not return while packets keep coming. For the same reason
the copy range is set here, as is fail-open, which it has no call for.
"""

import errno
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

from netfilterqueue import NetfilterQueue, Packet

from runtime.netqueue import (
    LONGEST,
    NF_ACCEPT,
    Batch,
    Cut,
    Serve,
    Settings,
    config,
    copied,
    longest,
    no_longer,
    open_to_all,
    refused,
    waiting,
)


class LibraryReader:
    """A `netqueue.Reader` by NetfilterQueue, in the network namespace of the calling thread.

    It has the kernel segment packets, whatever the settings say. `cut` answers where `serve`
    gave new bytes for a packet of which not all was copied. Raises `MachineError` if the
    kernel gives us no queue.
    """

    def __init__(self, settings: Settings, serve: Serve, cut: Cut) -> None:
        self.truncated = 0
        self._serve, self._cut = serve, cut
        self._settings = settings = replace(settings, segments=True)
        self._longest = longest(settings)
        self._batch = Batch(self._longest)
        self._messages: Iterator[bytes] = iter(())
        self._count = 0
        try:
            self._queue = NetfilterQueue()
            self._queue.bind(
                settings.queue, self._answer, settings.length, sock_len=settings.buffer
            )
        except OSError as error:  # the library's own ones come without a number
            code = error.errno or (errno.EPERM if os.geteuid() else errno.EINVAL)
            raise refused(settings.queue, code) from error
        # The port that bound the queue is the one that may configure it: the same socket.
        self._socket = socket.socket(fileno=os.dup(self._queue.get_fd()))
        self._socket.send(config(settings.queue, copied(settings), *open_to_all(settings)))

    @property
    def overruns(self) -> int:
        return self._batch.overruns

    def fileno(self) -> int:
        return self._socket.fileno()

    def read(self) -> int:
        sizes = self._batch.receive(self._socket.fileno())
        memory, starts = self._batch.memory, self._batch.starts
        self._messages = (memory[at : at + size] for at, size in zip(starts, sizes, strict=False))
        self._count = 0
        self._queue.run_socket(cast(Any, self))
        return self._count

    def close(self) -> None:
        if self.fileno() < 0:
            return
        with self._socket:
            self._socket.send(no_longer(self._settings.queue))
            while waiting(self.fileno()):
                self.read()
            self._queue.unbind()
            del self._queue  # which closes its own descriptor

    def recv(self, _: int) -> bytes:
        """The next message that was fetched, for `run_socket`."""
        for message in self._messages:
            return message
        raise BlockingIOError(errno.EAGAIN)

    def _answer(self, packet: Packet) -> None:
        self._count += 1
        payload, mark = packet.get_payload(), packet.mark
        length = _length(payload) if len(payload) == self._longest else 0
        verdict, new, wanted = self._serve(
            payload, mark, packet.hook, packet.indev, packet.outdev, length
        )
        if new is not None:
            if length or len(new) > LONGEST:
                self.truncated += 1
                verdict, _, wanted = self._cut(mark)
            else:
                packet.set_payload(bytes(new))
        packet.set_mark(wanted)
        if verdict == NF_ACCEPT:
            packet.accept()
        else:
            packet.drop()


def _length(packet: bytes) -> int:
    """The length by the IP header, where more was sent than `packet` has; else 0."""
    total = int.from_bytes(packet[2:4]) if packet[0] >> 4 == 4 else 40 + int.from_bytes(packet[4:6])
    return total if total > len(packet) else 0
