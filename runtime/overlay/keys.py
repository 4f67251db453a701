"""The key of an overlay: a file beside the policy, that nobody else may read.

Whoever has the key can steer the overlay's packets, so a key that others can read, or change,
is refused like one that is missing. So is an overlay of another box.
"""

import errno
import os
import socket
import stat
from collections.abc import Iterable
from ipaddress import IPv4Address
from pathlib import Path

from itmlang.diagnostics import Diagnostic
from itmlang.overlays import Overlay
from runtime.errors import MachineError
from runtime.overlay.wire import key_of
from runtime.state import State
from runtime.units import Unit

_CODE = "E072"


class KeyFileError(Exception):
    """A key that cannot be used: why, and what to do about it."""

    def __init__(self, message: str, help: str = "") -> None:
        super().__init__(message)
        self.message, self.help = message, help


def path_of(unit: Unit, overlay: Overlay) -> Path:
    """Where an overlay's key lies: its path is relative to the policy file."""
    return Path(unit.beside or "", overlay.key)


def read(unit: Unit, overlay: Overlay) -> bytes:
    """The key of an overlay. Raises `KeyFileError`."""
    path = path_of(unit, overlay)
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read(1 << 16)
    except FileNotFoundError:
        raise KeyFileError(
            f"there is no key `{overlay.key}`",
            "make one beside the policy, the same for all members: "
            f"`openssl rand -hex 32 > {overlay.key}`, `chmod 600 {overlay.key}`",
        ) from None
    except OSError as error:
        raise KeyFileError(f"the key `{overlay.key}` cannot be read: {error.strerror}") from error
    if mode & 0o027:
        raise KeyFileError(
            f"the key `{overlay.key}` is open to others (mode {mode:04o})",
            f"`chmod 600 {overlay.key}`",
        )
    try:
        return key_of(data)
    except ValueError as error:
        raise KeyFileError(f"`{overlay.key}` cannot be used", str(error)) from error


def refuse(before: State, wanted: State) -> None:
    """Refuse overlays that are new, or of a changed file, whose key cannot be used or that are
    not this box's.

    Raises `MachineError`, with the policy's lines.
    """
    known = {id(unit) for unit in before.units}
    found: list[Diagnostic] = []
    for unit in (unit for unit in wanted.units if id(unit) not in known):
        for overlay in overlays(unit):
            try:
                read(unit, overlay)
            except KeyFileError as error:
                found.append(Diagnostic(_CODE, error.message, overlay.key_at, help=error.help))
            address = str(IPv4Address(overlay.address))
            if not _is_ours(address):
                found.append(Diagnostic(
                    "E060", f"{address} is no address of this box", overlay.span,
                    help=f"`self` is one; `ip address add {address}/32 dev lo` would give it that",
                ))  # fmt: skip
    if found:
        raise MachineError("an overlay cannot work here; nothing was changed", "", tuple(found))


def _is_ours(address: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as trial:
        try:
            trial.bind((address, 0))
        except OSError as error:
            return error.errno != errno.EADDRNOTAVAIL
    return True


def overlays(unit: Unit) -> Iterable[Overlay]:
    """The overlays of a unit."""
    return (overlay for table in unit.ruleset.tables for overlay in table.overlays)
