"""The sign of life that the rules of a policy wait for; see `itmlang/nft/queueing.py`."""

import errno
import socket
import struct
from typing import Final

from itmlang import marks

BEAT: Final = 0.5  # seconds between two signs of life; the kernel waits for two seconds
_SO_MARK: Final = 36
_DISCARD: Final = 9  # the port that a sign of life names (RFC 863); it never gets there


class Life:
    """The sign of life of the policy whose first queue is `first`."""

    def __init__(self, first: int) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_MARK, struct.pack("=I", marks.BEAT | first))

    def send(self) -> str:
        """Give the sign; why it cannot be given, "" if it can."""
        try:
            self._socket.sendto(b"", ("127.0.0.1", _DISCARD))
        except OSError as error:
            if error.errno != errno.EPERM:  # what the rule that takes it lets the sender see
                return f"no sign of life can be sent: {error.strerror}; is the loopback up?"
        return ""

    def close(self) -> None:
        self._socket.close()
