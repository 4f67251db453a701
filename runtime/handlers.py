"""Functions of the user's: found, loaded, loaded again, and what they may answer.

A handler's module is looked for beside the policy file, then on Python's path. A handler
says by `headers_only` or `whole_packets` how much of a packet it wants; else it gets all.
To load a changed handler again means to import everything that lies beside the policy
anew; if that fails, the one that runs goes on.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any, Final, TypeVar

from itmlang.semantics import Did

HEADERS: Final = 256  # bytes: IPv6 with extension headers and a whole TCP header
LARGEST: Final = 65_535
_COPY: Final = "_itm_copy"
_PACKAGE: Final = "_itm_handlers"  # of modules that are called as Python's own are
# Modules that are never the user's, wherever the policy lies.
_OTHERS: Final = sys.stdlib_module_names | {"__main__", "itmlang", "libitm", "runtime"}

Function = Callable[..., object]
PACKET: Final = "one packet"  # what a handler is called with
F = TypeVar("F", bound=Callable[..., object])


class HandlerError(Exception):
    """A handler cannot be loaded, or answered what is no answer; the message says why."""

    target = ""  # which one


class HungError(BaseException):
    """A handler took too long. No `Exception`, so that handlers do not catch it by accident."""


class Verdict(Enum):
    """What becomes of a packet (NF_ACCEPT, NF_DROP of linux/netfilter.h).

    `MODIFIED` is `ACCEPT` for a packet that was written; a change is noticed without it, too.
    """

    ACCEPT = "accept"
    DROP = "drop"
    MODIFIED = "modified"


@dataclass(frozen=True)
class Class:
    """The packet (and with `once per connection`, the rest of its connection) is of this class."""

    name: str


@dataclass(frozen=True)
class Handler:
    """A loaded handler.

    `copy` is how many bytes of each packet it asks for; with `reads` it changes none of them.
    """

    target: str
    function: Function
    copy: int = LARGEST
    reads: bool = False


def headers_only(function: F) -> F:
    """The handler asks for headers alone: 256 bytes. It changes nothing but the mark."""
    setattr(function, _COPY, (HEADERS, True))
    return function


def whole_packets(limit: int = LARGEST) -> Callable[[F], F]:
    """The handler asks for whole packets of at most so many bytes; longer ones it is not shown."""
    if not isinstance(limit, int) or not 128 <= limit <= LARGEST:
        raise ValueError(f"a limit lies between 128 and {LARGEST} bytes")

    def mark(function: F) -> F:
        setattr(function, _COPY, (limit, False))
        return function

    return mark


def load(targets: Iterable[str], beside: Path | None, takes: str = PACKET) -> dict[str, Handler]:
    """The handlers by their names (`module:function`); modules beside a policy file come first.

    `takes` says what they are called with, "" for nothing.

    Raises `HandlerError`.
    """
    if beside is not None and str(beside) not in sys.path:
        sys.path.insert(0, str(beside))
    importlib.invalidate_caches()
    found = {}
    for target in sorted(set(targets)):
        try:
            found[target] = _load(target, beside, takes)
        except HandlerError as error:
            error.target = target
            raise
    return found


def reload(targets: Iterable[str], beside: Path | None) -> dict[str, Handler]:
    """The handlers anew, from what lies beside the policy now.

    Raises `HandlerError`; then all modules are as they were.
    """
    wanted = sorted(set(targets))
    before = dict(sys.modules)
    for name in _own(sys.modules, wanted, beside):
        del sys.modules[name]
    try:
        return load(wanted, beside)
    except BaseException:
        sys.modules.clear()
        sys.modules.update(before)
        raise


def _own(
    modules: Mapping[str, ModuleType], targets: Iterable[str], beside: Path | None
) -> list[str]:
    """The modules that are the user's: those beside the policy, and those that are named."""
    named = {target.partition(":")[0] for target in targets}
    found = []
    for name, module in list(modules.items()):
        if name.partition(".")[0] in _OTHERS:
            continue
        file = getattr(module, "__file__", None) or ""
        near = beside is not None and Path(file).is_relative_to(beside)
        if name in named or (near and "-packages/" not in file):
            found.append(name)
    return found


def _importable(name: str, beside: Path | None) -> str:
    """The name by which a module can be imported so that one beside the policy comes first.

    One that is called as Python's own are (`site`) cannot take their place for everybody:
    it is a module of a package whose folder is the policy's.
    """
    first = name.partition(".")[0]
    if beside is None or not ((beside / f"{first}.py").is_file() or (beside / first).is_dir()):
        return name
    known = sys.modules.get(first)
    places = [getattr(known, "__file__", None), *getattr(known, "__path__", ())]
    near = any(place and Path(place).is_relative_to(beside) for place in places)
    if first not in sys.stdlib_module_names and (known is None or near):
        return name
    package = sys.modules.setdefault(_PACKAGE, ModuleType(_PACKAGE))
    package.__path__ = [str(beside)]
    return f"{_PACKAGE}.{name}"


def _load(target: str, beside: Path | None, takes: str) -> Handler:
    module_name, _, path = target.partition(":")
    try:
        found: Any = importlib.import_module(_importable(module_name, beside))
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            raise HandlerError(f"there is no module `{error.name}`") from error
        raise HandlerError(f"`{module_name}` needs a module `{error.name}`") from error
    except HungError:
        raise
    except BaseException as error:  # whatever the user's code raises
        raise HandlerError(f"`{module_name}` cannot be imported: {described(error)}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise HandlerError(f"`{module_name}` has no `{path}`")
        found = getattr(found, part)
    if not callable(found):
        raise HandlerError(f"`{target}` is no function")
    if inspect.iscoroutinefunction(found):
        raise HandlerError(f"`{target}` is a coroutine: what it answers would come too late")
    with suppress(TypeError, ValueError):  # not every callable tells what it takes
        signature = inspect.signature(found)
        try:
            signature.bind(*([None] if takes else []))
        except TypeError as error:
            raise HandlerError(f"`{target}` does not take {takes or 'nothing'}: {error}") from error
    copy, reads = getattr(found, _COPY, (LARGEST, False))
    return Handler(target, found, copy, reads)


def answered(said: object) -> Did:
    """What a handler's answer means. Raises `HandlerError` for what is no answer."""
    match said:
        case None | Verdict.ACCEPT | Verdict.MODIFIED:
            return Did()
        case Verdict.DROP:
            return Did("drop")
        case Class(name):
            return Did("", name)
    raise HandlerError(f"{said!r:.80} is no verdict")


def described(error: BaseException) -> str:
    """An error of the user's code in one line, with the place in it."""
    text = (
        f"{type(error).__name__}: {error}".splitlines()[0] if str(error) else type(error).__name__
    )
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if isinstance(error, SyntaxError) and error.filename:
        return f"{text} ({Path(error.filename).name}:{error.lineno})"
    if trace is None or trace.tb_frame.f_code.co_filename.startswith("<"):
        return text
    return f"{text} ({Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})"
