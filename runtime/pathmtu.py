"""What the paths to the ends of tunnels take, as the kernel learns it.

Strategy: routers on the way tell us of packets too big for what comes behind them, but
the kernel heeds only what concerns a protocol that somebody speaks, and nobody speaks the
tunnels' (IPv4 in IPv4). So a raw socket of that protocol is connected to each end. It is
there for the errors alone; the kernel keeps what they say with the route, for some ten
minutes (`net.ipv4.route.mtu_expires`), and says it to whoever connects a socket.
"""

import ctypes
import socket
import struct
from contextlib import suppress
from typing import Final, Self

from itmlang.tunnel import PROTOCOL

_IP_MTU, _IP_MTU_DISCOVER, _IP_PMTUDISC_DO = 14, 10, 2  # linux/in.h
_SO_ATTACH_FILTER: Final = 26  # asm-generic/socket.h
_DISCARD: Final = 9  # a port that is never sent to (RFC 863)
_TAKE_NOTHING: Final = struct.pack("HBBI", 0x06, 0, 0, 0)  # classic BPF: return 0


class PathMtu:
    """The MTU towards tunnels' ends, learned for as long as this lives; for a `with` block.

    An end is known from when it is first asked for. From then on the kernel answers
    packets in unwanted tunnels from that end with no "protocol unreachable".
    """

    def __init__(self) -> None:
        self._sockets: dict[tuple[int, int], socket.socket] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget all; a second call does nothing."""
        while self._sockets:
            self._sockets.popitem()[1].close()

    def mtu(self, destination: int, source: int = 0) -> int:
        """The longest packet, in bytes, to a tunnel's end; 0 if there is no way there.

        `source` is ours, 0 for the one that routing chooses. A system call or two.
        """
        path = self._connected(destination, source)
        return 0 if path is None else path.getsockopt(socket.IPPROTO_IP, _IP_MTU)

    def source(self, destination: int) -> int:
        """Our address on the way to a tunnel's end; 0 if there is no way there."""
        path = self._connected(destination, 0)
        return 0 if path is None else _number(path.getsockname()[0])

    def towards(self, other: int) -> int:
        """Our address on the way to any other machine; 0 if there is no way there."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((_text(other), _DISCARD))
            except OSError:
                return 0
            return _number(probe.getsockname()[0])

    @property
    def descriptors(self) -> list[int]:
        """Each has an error to report (POLLERR) when ICMP came about its end: `changed`."""
        return [path.fileno() for path in self._sockets.values()]

    def changed(self) -> bool:
        """Did ICMP come since the last time that this was asked?"""
        errors = [
            path.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) for path in self._sockets.values()
        ]
        return any(errors)

    def _connected(self, destination: int, source: int) -> socket.socket | None:
        path = self._sockets.get((destination, source))
        if path is None:
            path = socket.socket(socket.AF_INET, socket.SOCK_RAW, PROTOCOL)
            self._sockets[destination, source] = path
            code = ctypes.create_string_buffer(_TAKE_NOTHING, len(_TAKE_NOTHING))
            none = struct.pack("@HP", 1, ctypes.addressof(code))
            path.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, none)
            path.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DO)
            if source:
                # One that is not ours gets no ICMP either.
                with suppress(OSError):
                    path.bind((_text(source), 0))
        try:
            # Each time: the way may be another now.
            path.connect((_text(destination), 0))
        except OSError:
            return None
        return path


def _text(address: int) -> str:
    return socket.inet_ntoa(address.to_bytes(4))


def _number(address: str) -> int:
    return int.from_bytes(socket.inet_aton(address))
