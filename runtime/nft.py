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
from dataclasses import dataclass
from typing import Any, Final

from runtime.errors import MachineError

_ERROR: Final = re.compile(
    r"^/proc/self/fd/\d+:(?P<line>\d+):(?P<first>\d+)-(?P<last>\d+): Error: (?P<message>.*)$", re.M
)
_DEVICE: Final = re.compile(r'^\tchain (\S+) \{\n\t\ttype \w+ hook \w+ device "([^"]+)"', re.M)
FAMILIES: Final = ("inet", "netdev")
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


def tables() -> tuple[str, ...]:
    """All tables that a policy can have, as `family name`, sorted: of inet and netdev."""
    listing = _list_json("list tables")
    found = (item["table"] for item in listing if "table" in item)
    return tuple(sorted(f"{t['family']} {t['name']}" for t in found if t["family"] in FAMILIES))


def table(path: str) -> list[dict[str, Any]]:
    """The objects of a table (`family name`) as libnftables' JSON has them, without elements.

    Base chains at a device have it as `dev`, which the JSON of 1.0.6 leaves out.
    """
    listing = _list_json(f"list table {path}", "terse")
    chains = [item["chain"] for item in listing if "hook" in item.get("chain", {})]
    at_device = [c for c in chains if c["hook"] in ("ingress", "egress") and "dev" not in c]
    if at_device:
        devices = dict(_DEVICE.findall(table_text(path)))
        for chain in at_device:
            chain["dev"] = devices.get(chain["name"], "")
    return listing


def table_text(path: str) -> str:
    """A table as text without elements and counts: the same as long as nobody changes it."""
    answer = _in_child(f"list table {path}", "stateless terse", False)
    return answer.output if answer.code == 0 else ""


def elements(path: str, name: str) -> list[dict[str, Any]]:
    """The elements of a set of a table, as libnftables' JSON has them."""
    for item in _list_json(f"list set {path} {name}"):
        if "set" in item:
            return [_element(e) for e in item["set"].get("elem", [])]
    return []


def _element(item: Any) -> dict[str, Any]:
    found = item["elem"] if isinstance(item, dict) and "elem" in item else {"val": item}
    value = found["val"]
    concat = value.get("concat") if isinstance(value, dict) else None
    return {**found, "val": concat if concat is not None else [value]}


def _list_json(command: str, flags: str = "") -> list[dict[str, Any]]:
    require_rights()
    answer = _in_child(command, f"json {flags}", False)
    if answer.code != 0:
        reason = answer.error.strip().splitlines() or ["no reason given"]
        raise MachineError(f"nftables cannot list what runs: {reason[0]}", "try again")
    listing: list[dict[str, Any]] = json.loads(answer.output)["nftables"] if answer.output else []
    return listing


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
    nft.set_json_output("json" in flags)
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
