"""The kernel's nftables, through libnftables; the only user of its binding.

Text goes in as a file in memory, because only for files does libnftables name
the line of each error. Every call runs in a child process: an assertion in the
library (1.0.6 has several) then ends the child, and the caller gets an error
instead of being killed.
"""

import ctypes
import json
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from runtime import netlink
from runtime.errors import MachineError
from runtime.listing import Element, Running, digest, read_elements, read_table

_ERROR: Final = re.compile(
    r"^/proc/self/fd/\d+:(?P<line>\d+):(?P<first>\d+)-(?P<last>\d+): Error: (?P<message>.*)$", re.M
)
_CAP_NET_ADMIN: Final = 12  # include/uapi/linux/capability.h


@dataclass(frozen=True)
class NftError:
    """One refusal: its line in the text (counted from 1, 0 if unknown) and its message."""

    line: int
    message: str


class NftRefusalError(Exception):
    """nftables or the kernel refused a script; nothing of it was done."""

    def __init__(self, errors: tuple[NftError, ...]) -> None:
        super().__init__("; ".join(error.message for error in errors))
        self.errors = errors


@dataclass(frozen=True)
class _Answer:
    code: int
    output: str
    error: str


def load(script: str, *, check: bool = False) -> None:
    """Run a script as one transaction; with `check`, only try whether it would be taken.

    Raises `NftRefusalError` if it is refused as a whole, `MachineError` if there is
    no nftables here or no right to use it.
    """
    require_rights()
    answer = _in_child(script, "", check)
    if answer.code == 0:
        return
    errors = tuple(
        NftError(int(found["line"]), found["message"]) for found in _ERROR.finditer(answer.error)
    )
    raise NftRefusalError(errors or (NftError(0, answer.error.strip() or "no reason given"),))


def version() -> str:
    """The version of libnftables, "" if it does not say. Raises `MachineError` without one."""
    listing = _list_json("list flowtables")  # of all listings the least
    return next((item["metainfo"]["version"] for item in listing if "metainfo" in item), "")


def tables() -> tuple[str, ...]:
    """All tables that a policy can have, as `family name`, sorted: of inet and netdev."""
    require_rights()
    with _asking():
        return tuple(sorted(netlink.tables()))


def table(path: str) -> Running:
    """A table of ours (`family name`) as the kernel has it.

    Raises `MachineError` if nftables cannot list it.
    """
    text = _list(f"list table {path}", "stateless terse handle")
    sets = _list_json(f"list sets table {path}", "terse") if "\n\tset " in text else []
    # Asked for one table's sets, nftables 1.0.6 tells of every table's.
    family, name = path.split()
    own = {"family": family, "table": name}
    sets = [item for item in sets if own.items() <= item.get("set", {}).items()]
    running = read_table(text, sets)
    fixed = [n for n, found in running.sets.items() if not found.flags & {"dynamic", "timeout"}]
    with _asking():  # there may be hundreds of them, and libnftables reads all for each
        values = {name: digest(one.hex() for one in netlink.elements(path, name)) for name in fixed}
    return replace(running, values=values)


def counters(path: str) -> dict[str, tuple[int, int]]:
    """(packets, bytes) of each named counter of a table."""
    require_rights()
    with _asking():
        return {name: (packets, size) for name, packets, size in netlink.counters(path)}


def elements(path: str, name: str) -> list[Element]:
    """The elements of a set of a table; none if there is no such set.

    Raises `MachineError` if they cannot be listed.
    """
    answer = _in_child(f"list set {path} {name}", "", False)
    if answer.code != 0 and "No such file" not in answer.error:
        raise _unlisted(answer)
    return read_elements(answer.output) if answer.code == 0 else []


@contextmanager
def _asking() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MachineError(
            f"the kernel does not tell what runs: {error.strerror}", "does it have nf_tables?"
        ) from error


def _list_json(command: str, flags: str = "") -> list[dict[str, Any]]:
    output = _list(command, f"json {flags}")
    listing: list[dict[str, Any]] = json.loads(output)["nftables"] if output else []
    return listing


def _list(command: str, flags: str) -> str:
    require_rights()
    answer = _in_child(command, flags, False)
    if answer.code != 0:
        raise _unlisted(answer)
    return answer.output


def _unlisted(answer: _Answer) -> MachineError:
    reason = answer.error.strip().splitlines() or ["no reason given"]
    return MachineError(f"nftables cannot list what runs: {reason[0]}", "try again")


def require_rights() -> None:
    """Raise `MachineError` without CAP_NET_ADMIN: every call below needs it."""
    with open("/proc/thread-self/status", encoding="ascii") as status:
        effective = next(line.split()[1] for line in status if line.startswith("CapEff:"))
    if not int(effective, 16) >> _CAP_NET_ADMIN & 1:
        raise MachineError(
            "this needs the right to change the network", "run it as root (or with CAP_NET_ADMIN)"
        )


def _in_child(script: str, flags: str, check: bool) -> _Answer:
    """Run a script in a child process of this namespace and bring its answer back."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(read_end)
            # The library prints what it asserts; the caller says what happened.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            with os.fdopen(write_end, "wb") as pipe:
                pickle.dump(_run(script, flags.split(), check), pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        raw = pipe.read()
    _, ended = os.waitpid(child, 0)
    if not raw:
        how = f"signal {os.WTERMSIG(ended)}" if os.WIFSIGNALED(ended) else "an error"
        raise MachineError(
            f"libnftables ended with {how}", "this is a bug in libnftables; a newer one may do"
        )
    answer: _Answer | str = pickle.loads(raw)
    if isinstance(answer, str):
        raise MachineError(answer, "install it: apt-get install libnftables1")
    return answer


def _run(script: str, flags: list[str], check: bool) -> _Answer | str:
    """In the child: what libnftables answers, or why it cannot be asked."""
    try:
        import nftables

        nft = nftables.Nftables()
    except (ImportError, OSError, AttributeError) as error:
        return f"libnftables cannot be loaded: {error}"
    # Numbers come back as numbers: the name tables of two hosts may differ.
    nft.set_numeric_proto_output(True)
    nft.set_numeric_prio_output(True)
    nft.set_json_output("json" in flags)
    nft.set_handle_output("handle" in flags)
    nft.set_terse_output("terse" in flags)
    nft.set_stateless_output("stateless" in flags)
    if check:
        # The binding of 1.0.2 has no call for it.
        context = ctypes.c_void_p(nft._Nftables__ctx)
        ctypes.CDLL("libnftables.so.1").nft_ctx_set_dry_run(context, ctypes.c_bool(True))
    if script.startswith("list "):
        return _Answer(*nft.cmd(script))
    memory = os.memfd_create("itm")
    with os.fdopen(memory, "wb", closefd=False) as file:
        file.write(script.encode())
    return _Answer(*nft.cmd(f'include "/proc/self/fd/{memory}"'))
