"""Round-trip times to a host, by ICMP echo (RFC 792, RFC 4443).

One request goes out every interval. An answer tells its round trip; while one is missing, the
time that the oldest has waited is a lower bound of it. An answer to a later request shows that
the earlier ones are lost: they no longer count.
"""

import os
import secrets
import socket
import struct
from collections import deque
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Final

_ECHO, _REPLY = 8, 0
_ECHO6, _REPLY6 = 128, 129
_ICMP_FILTER: Final = 1  # linux/icmp.h, of the level SOL_RAW
_ICMP6_FILTER: Final = 1  # linux/icmpv6.h: ICMPV6_FILTER
_SOL_RAW: Final = 255
_SILENT: Final = 2.0  # seconds without an answer, after which nothing is known
_LATEST: Final = 0.5  # seconds: a request that waits for longer may be lost
_WINDOW: Final = 60.0  # seconds in which the least round trip is looked for
_MOST_WAITING: Final = 256


class Prober:
    """Sends requests to a host and reckons with the answers; `priority` is a link's classid.

    Times are in seconds, of the caller's clock. Raises `OSError` if there are no raw sockets here.
    """

    def __init__(self, host: str, interval: float, priority: int = 0) -> None:
        self._six = ip_address(host).version == 6
        family = socket.AF_INET6 if self._six else socket.AF_INET
        protocol = socket.IPPROTO_ICMPV6 if self._six else socket.IPPROTO_ICMP
        self._socket = socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK, protocol)
        reply = _REPLY6 if self._six else _REPLY
        if self._six:
            words = [0xFFFFFFFF] * 8
            words[reply >> 5] &= ~(1 << (reply & 31)) & 0xFFFFFFFF
            self._socket.setsockopt(protocol, _ICMP6_FILTER, struct.pack("=8I", *words))
        else:
            self._socket.setsockopt(
                _SOL_RAW, _ICMP_FILTER, struct.pack("=I", 0xFFFFFFFF ^ 1 << reply)
            )
        if priority:  # not behind what the link itself lets wait
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, priority)
        self._host, self._interval = host, interval
        self._key = secrets.token_bytes(8)  # that nobody else's answers are taken for ours
        self._number = os.getpid() & 0xFFFF
        self._sequence = 0
        self._waiting: deque[tuple[int, float]] = deque(maxlen=_MOST_WAITING)
        self._due = 0.0
        self._last: tuple[float, float] | None = None  # the last answer: when, and its round trip
        self._least: deque[tuple[float, float]] = deque()
        self.trouble = ""

    def fileno(self) -> int:
        """The socket's, that is readable when an answer may be there."""
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def tick(self, now: float) -> float:
        """Send what is due; when to be called again."""
        if now >= self._due:
            self._due = max(self._due + self._interval, now + self._interval / 2)
            self._send(now)
        return self._due

    def _send(self, now: float) -> None:
        self._sequence = self._sequence + 1 & 0xFFFF
        body = self._key + struct.pack("!d", now)
        kind = _ECHO6 if self._six else _ECHO
        head = struct.pack("!BBHHH", kind, 0, 0, self._number, self._sequence)
        if not self._six:  # the kernel fills in ICMPv6's
            head = head[:2] + struct.pack("!H", _checksum(head + body)) + head[4:]
        try:
            self._socket.sendto(head + body, (self._host, 0))
        except OSError as error:
            self.trouble = f"no probe can be sent to {self._host}: {error.strerror}"
        else:
            self.trouble = ""
            self._waiting.append((self._sequence, now))

    def read(self, now: float) -> None:
        """Take the answers that are there."""
        while True:
            try:
                data = self._socket.recv(256)
            except OSError:
                return
            if not self._six:
                data = data[(data[0] & 15) * 4 :] if data else b""
            if len(data) < 24 or data[8:16] != self._key:
                continue
            number, sequence = struct.unpack_from("!HH", data, 4)
            sent = next((at for n, at in self._waiting if n == sequence), None)
            if number == self._number and sent is not None:
                while self._waiting and self._waiting[0][0] != sequence:
                    self._waiting.popleft()  # overtaken: lost
                self._waiting.popleft()
                self._took(now, max(0.0, now - sent))

    def _took(self, now: float, trip: float) -> None:
        self._last = now, trip
        while self._least and self._least[-1][1] >= trip:
            self._least.pop()
        self._least.append((now, trip))
        while self._least[0][0] < now - _WINDOW:
            self._least.popleft()

    def trip(self, now: float) -> tuple[float, float] | None:
        """The round trip as far as it is known, and how old that is; None if nobody answers."""
        if self._last is None or now - self._last[0] > _SILENT:
            return None
        at, trip = self._last
        waits = now - self._waiting[0][1] if self._waiting else 0.0
        if trip < waits <= _LATEST:
            return waits, waits
        return trip, now - at + trip

    def delay(self, now: float) -> tuple[float, float] | None:
        """How much longer than the least round trip of the last minute the last one took; its age.

        Only what was answered counts: a probe that is lost would look like a queue.
        """
        if self._last is None or now - self._last[0] > _SILENT:
            return None
        at, trip = self._last
        return max(0.0, trip - self._least[0][1]), now - at + trip


def _checksum(data: bytes) -> int:
    words: Sequence[int] = struct.unpack(f"!{len(data) // 2}H", data)
    total = sum(words)
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF
