"""Questions to a process of ours, and its answers: JSON, a line there and a line back.

It listens on a socket with an abstract name: that is the network namespace's, and ends
with its process, however that ends. So the name also tells whether the process lives. Such
a name has no owner and no mode: each side asks the kernel who the other one is.
"""

import hashlib
import json
import os
import socket
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

_LINE: Final = 1 << 22
_QUESTION: Final = 1 << 16
_PATIENCE: Final = 1.0  # seconds that whoever asked may take to read


def ask(
    folder: Path, message: Mapping[str, Any], patience: float = 5.0, *, program: str = ""
) -> dict[str, Any] | None:
    """What the runtime of a state's folder answers, or that program of it.

    None if there is none, or it does not answer within so many seconds.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(patience)
            link.connect(_name(folder, program))
            if not _ours(link):
                return None
            link.sendall(json.dumps(message).encode() + b"\n")
            with link.makefile("rb") as answer:
                found: dict[str, Any] = json.loads(answer.readline(_LINE))
                return found
    except (OSError, ValueError):
        return None


def lives(folder: Path, program: str = "") -> bool:
    """Is there the runtime, or such a program, whether it answers or not?"""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.setblocking(False)
        try:
            link.connect(_name(folder, program))
        except BlockingIOError:  # it hangs, and others wait for it already
            return True
        except OSError:
            return False
        return _ours(link)


class Listener:
    """Hears who asks the runtime of a state's folder, or that program of it.

    Raises `OSError` (EADDRINUSE) if there is one already.
    """

    def __init__(self, folder: Path, program: str = "") -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.bind(_name(folder, program))
            self._socket.listen(16)
        except OSError:
            self._socket.close()
            raise
        self._socket.setblocking(False)

    def fileno(self) -> int:
        return self._socket.fileno()

    def accept(self) -> socket.socket | None:
        """Who asks next, without waiting; None for nobody, and for who has no right to."""
        try:
            link, _ = self._socket.accept()
        except BlockingIOError:
            return None
        if not _ours(link):
            link.close()
            return None
        link.setblocking(False)
        return link

    def close(self) -> None:
        self._socket.close()


def question(link: socket.socket) -> dict[str, Any] | None:
    """What somebody asks; None for nothing that could be answered."""
    try:
        found = json.loads(link.recv(_QUESTION))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "command" in found else None


def answer(link: socket.socket, found: Mapping[str, Any]) -> None:
    """Tell whoever asked, if they still listen, and hang up."""
    with suppress(OSError):
        link.setblocking(True)
        link.settimeout(_PATIENCE)
        link.sendall(json.dumps(found).encode() + b"\n")
    link.close()


def _name(folder: Path, program: str) -> str:
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()
    return f"\0itm-runtime-{digest}" + (f"-{program}" if program else "")


def _ours(link: socket.socket) -> bool:
    """Is the other side of our own user, or root?"""
    who = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return struct.unpack("=iII", who)[1] in (0, os.geteuid())
