"""What a program of the user's asks for: packets of some interest at a hook, and what it does to them.

Pure. A registration becomes a policy of one class, as text: so interest is compiled,
refused and loaded like everybody's. The five functions become one handler.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from enum import Enum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, Final

from itmlang.diagnostics import CompileError
from itmlang.headers import Packet
from itmlang.pipeline import Compiled, compile
from itmlang.source import Source
from runtime.errors import UsageError
from runtime.handlers import HEADERS as HEADER_BYTES
from runtime.handlers import LARGEST, Function, Handler, HandlerError, Verdict, whole_packets
from runtime.units import Unit, unit_of

Value = int | str | range | IPv4Address | IPv4Network | IPv6Address | IPv6Network
Values = Value | Iterable[Value] | None

_NAME: Final = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_WORD: Final = re.compile(r"@?[\w.:/*-]+", re.ASCII)
# The language's names of fields that are Python's own words.
_SPELLED: Final = {"indev": "in", "outdev": "out"}


class Copy(Enum):
    """How much of each packet a program sees, beside a number of bytes.

    `HEADERS`: the first 256 bytes, which the program only reads; it may give a verdict and
    write the mark. Such packets come several times as fast.
    """

    HEADERS = "headers"


@dataclass(frozen=True, kw_only=True)
class Interest:
    """Which packets a program wants: those that fit in every field; None is any.

    A field takes one value or several: numbers and names (`"tcp"`, `80`), ranges
    (`range(1024, 2048)`, `"1024-2047"`), addresses and prefixes, as text or as objects of
    `ipaddress`, and names of devices. `lines` are further lines of the policy language's
    `interest`, such as `"not dport 22"`.
    """

    family: Values = None
    protocol: Values = None
    saddr: Values = None
    daddr: Values = None
    sport: Values = None
    dport: Values = None
    indev: Values = None
    outdev: Values = None
    lines: str = ""

    @property
    def text(self) -> str:
        """The lines of the policy language. Raises `UsageError` for what is no value."""
        found = []
        for one in fields(self):
            values = getattr(self, one.name)
            if one.name != "lines" and values is not None:
                found.append(f"{_SPELLED.get(one.name, one.name)} {_said(one.name, values)}")
        return "\n".join([*found, *self.lines.splitlines()])


Classify = Callable[[Packet], object]
Log = Callable[[Packet], object]
Process = Callable[[Packet, Any], Verdict | None]
Update = Callable[[Packet], object]
Control = Callable[[Packet], object]


@dataclass(frozen=True, kw_only=True)
class Info:
    """What is done to packets of an interest: five functions, called in this order.

    `classify` says the packet's class, any value; 0 and None are class 0, for which `process`
    is not called. Without it, all packets are of class 1. `log` notes what there is to note.
    `process` gets the packet and its class, may change the packet, and gives a verdict; None
    accepts. `update` brings classes up to date with what was logged, and `control` the
    program's own parameters with the state of the system. `label` is the name that `itmc
    status` shows; without one it is the program's and the hook.
    """

    interest: Interest = Interest()
    classify: Classify | None = None
    log: Log | None = None
    process: Process | None = None
    update: Update | None = None
    control: Control | None = None
    label: str = ""


@dataclass(frozen=True)
class Request:
    """One registration of a program: `name` is its policy's, `number` tells it from others.

    `copy` is a number of bytes or `Copy.HEADERS`, `fail` is "open" or "closed".
    """

    program: str
    name: str
    hook: str
    info: Info
    copy: int | Copy
    priority: int
    fail: str
    file: str  # the program's, for messages

    @property
    def handler(self) -> Handler:
        """The five functions as one."""
        reads = self.copy is Copy.HEADERS
        size = HEADER_BYTES if isinstance(self.copy, Copy) else self.copy
        return Handler(self.name, in_order(self.info, reads=reads), size, reads)

    def target(self, number: int) -> str:
        """What the policy calls. Another number has another queue."""
        return f"{self.program}:r{number}"

    def policy(self, number: int) -> str:
        """The policy's text."""
        inside = self.info.interest.text
        interest = f"interest {{\n{inside}\n}}\n" if inside.strip() else ""
        return (
            f"policy {self.name} {{\nat {self.hook}\npriority {self.priority}\n{interest}"
            "classify { packets }\n"
            f'process {{ packets {{ call "{self.target(number)}" }} }}\n'
            f"fail {self.fail}\n}}\n"
        )

    def compile(self, number: int) -> Compiled:
        """The policy, compiled. Raises `UsageError`."""
        try:
            made = compile(Source(self.file, self.policy(number)))
        except CompileError as error:
            first = next(d for d in error.diagnostics if d.is_error)
            raise UsageError(f"{self.name}: {first.message}", first.help) from None
        if made.warnings:  # no packet can be of interest
            raise UsageError(f"{self.name}: {made.warnings[0].message}", made.warnings[0].help)
        return made

    def unit(self, compiled: Compiled) -> Unit:
        """What is loaded for it."""
        unit = unit_of(compiled, f"program {self.program}: {self.name}")
        return replace(unit, program=self.program)


def request(
    program: str,
    name: str,
    hook: str,
    info: Info,
    copy: int | Copy = LARGEST,
    priority: int = 0,
    fail: str = "open",
    file: str = "",
) -> Request:
    """A registration that is sound. Raises `UsageError`."""
    for word, what in ((hook, "hook"), (fail, "fail")):
        if not isinstance(word, str) or _NAME.fullmatch(word) is None:
            raise UsageError(f"{what} is a word, not {word!r}")
    check_name(name)
    if not isinstance(copy, Copy):
        try:
            whole_packets(copy)
        except ValueError as error:
            raise UsageError(f"{name}: {error}", "or libitm.HEADERS") from None
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise UsageError(f"{name}: priority is a number, not {priority!r}")
    for one in ("classify", "log", "process", "update", "control"):
        function = getattr(info, one)
        if function is not None and not callable(function):
            raise UsageError(f"{name}: {one} is a function or None, not {function!r}")
    made = Request(program, name, hook, info, copy, priority, fail, file or program)
    made.compile(0)
    return made


def check_name(name: object) -> None:
    """Raise `UsageError` for what cannot be a program's or a policy's name."""
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise UsageError(f"{name!r} is no name", "letters, digits and _, not a digit first")


def in_order(info: Info, *, reads: bool) -> Function:
    """The five functions as one handler; one that only `reads` must not change a packet."""
    classify, log, process = info.classify, info.log, info.process
    update, control = info.update, info.control

    def handle(packet: Packet) -> object:
        kind = 1 if classify is None else classify(packet)
        if log is not None:
            log(packet)
        verdict = None
        if process is not None and kind is not None and kind != 0:
            verdict = process(packet, kind)
        if update is not None:
            update(packet)
        if control is not None:
            control(packet)
        if reads and packet.altered:
            raise HandlerError("it has the headers only, and changed them: ask for whole packets")
        return verdict

    return handle


def _said(field: str, values: Values) -> str:
    """Values as the policy language has them."""
    if isinstance(values, Iterable) and not isinstance(
        values, str | range | IPv4Network | IPv6Network
    ):
        listed = [_one(field, value) for value in values]
        if not listed:
            raise UsageError(f"{field}: no value, so no packet", "leave it out for any")
        return listed[0] if len(listed) == 1 else f"{{ {', '.join(listed)} }}"
    return _one(field, values)


def _one(field: str, value: object) -> str:
    match value:
        case range() if len(value) and value.step == 1:
            return f"{value[0]}-{value[-1]}"
        case str() if field in _SPELLED and value.isprintable() and '"' not in value:
            return f'"{value}"'
        case str() if _WORD.fullmatch(value):
            return value
        case int() if not isinstance(value, bool):
            return str(value)
        case IPv4Address() | IPv4Network() | IPv6Address() | IPv6Network():
            return str(value)
    raise UsageError(f"{field} cannot be {value!r}")
