"""Load policies, take them away, and see what runs.

The order of things is what makes it safe: the state's lock first, then the new
state written beside the old, then one transaction, then the state renamed into
place. Whatever fails before the transaction changes nothing; the transaction is
all or nothing; and what is left is a rename.
"""

import hashlib
import re
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from itmlang.diagnostics import CompileError, Diagnostic, did_you_mean
from itmlang.nft.model import TABLE_PREFIX
from itmlang.pipeline import Compiled
from runtime import nft
from runtime.errors import MachineError, UsageError
from runtime.nft import NftRefusalError
from runtime.plan import Plan, Running, plan, records_of, removal, running, switching
from runtime.state import Record, State, Store, load, locked

_DEVICE: Final = re.compile(r'\bdevice "[^"]+"')


@dataclass(frozen=True)
class Applied:
    """What `apply` did: names of policies loaded and removed, flow sets that were lost.

    `absent` are devices of hooks that are not here; the kernel waits for them. `off`
    are policies that were off and stayed so.
    """

    loaded: tuple[str, ...]
    removed: tuple[str, ...]
    lost: tuple[str, ...]
    absent: tuple[str, ...] = ()
    off: tuple[str, ...] = ()


def apply(compiled: Compiled, *, check: bool = False) -> Applied:
    """Load a file's policies in one transaction; with `check`, only try it.

    Applying a file again replaces what it brought before. Raises `CompileError` if
    a policy's name belongs to another file, `MachineError` if the machine refuses;
    in both cases nothing was changed.
    """
    nft.require_rights()
    file = file_key(compiled.source.name)
    priorities = {policy.name: policy.priority for policy in compiled.policies}
    now = time.time()
    with locked() as store:
        tables = compiled.ruleset.tables
        by_name = {
            r.name: r
            for table in tables
            for r in records_of(table, file, compiled.source.name, priorities, now)
        }
        records = [by_name[policy.name] for policy in compiled.policies]
        kernel = _kernel()
        _refuse_foreign(compiled, file, store.state)
        change = plan(compiled.ruleset, compiled.text, file, records, store.state, kernel)
        if check:
            _load(change, compiled, check=True)
            return _applied(change, records)
        prepared = store.prepare(change.state)
        rehooked = [r for r in store.state.records if r.name in change.rehooked]
        renewed = {r.name for r in records} | {r.name for r in rehooked if not _drifted(r)}
        _load(change, compiled)
        _settle(store, prepared, change.state, renewed)
    return _applied(change, records)


def _applied(change: Plan, records: Sequence[Record]) -> Applied:
    hooks = (hook for record in records for hook, _, _ in record.hooks)
    absent = dict.fromkeys(device for hook in hooks if (device := _absent(hook)))
    names = tuple(r.name for r in records)
    off = tuple(r.name for r in change.state.records if r.name in names and not r.on)
    return Applied(names, change.deleted, change.lost, tuple(absent), off)


def _absent_at(script: str, line: int) -> str:
    """The device that is missing for the base chain that begins at a line, or has its hook there.

    Linux takes such chains since 6.16, and then waits for the device.
    """
    for text in script.splitlines()[max(0, line - 1) : line + 1]:
        found = _DEVICE.search(text)
        if found and line:
            return _absent(found[0])
    return ""


def _absent(hook: str) -> str:
    """The device of a hook (`ingress "eth0"`) if it is not in this namespace, else ""."""
    _, quote, device = hook.partition('"')
    device = device.removesuffix(quote)
    try:
        socket.if_nametoindex(device or "lo")
    except OSError:
        return device
    return ""


def remove(names: Sequence[str]) -> tuple[str, ...]:
    """Take policies away, all in one transaction; an empty list takes all.

    Without names, every table of ours goes, also those that a crash left behind.
    Returns the names. Raises `UsageError` for a name that is not loaded.
    """
    nft.require_rights()
    with locked() as store:
        kernel = _kernel()
        recorded = {r.name for r in store.state.records}
        strays = {
            path: path.split()[1].removeprefix(TABLE_PREFIX)
            for path in kernel
            if all(r.table != path for r in store.state.records)
        }
        known = sorted({*recorded, *strays.values()})
        for name in names:
            if name not in known:
                raise UsageError(
                    f"no policy `{name}` is loaded",
                    did_you_mean(name, known) or "`itmc list` shows what is loaded",
                )
        going = list(dict.fromkeys(names)) or known
        left = store.state.without(set(going))
        shared = {r.table for r in store.state.records if r.name in going}
        sound = {r.name for r in left.records if r.table in shared and not _drifted(r)}
        prepared = store.prepare(left)
        script = removal([r for r in store.state.records if r.name in going], store.state, kernel)
        script += "".join(
            f"delete table {path}\n" for path, name in strays.items() if name in going
        )
        if script:
            try:
                nft.load(script)
            except NftRefusalError as refusal:
                raise MachineError(f"nftables refused: {refusal}; nothing was removed") from refusal
        # The tables of those that stay are shorter now, and that is no drift.
        _settle(store, prepared, left, sound)
    return tuple(going)


def switch(names: Sequence[str], *, on: bool) -> tuple[str, ...]:
    """Take policies off their hooks, or hang them in again; all that they learned stays.

    Returns the names that were not so already. Raises `UsageError` for a name that
    is not loaded, `MachineError` if the machine refuses; then nothing was changed.
    """
    nft.require_rights()
    with locked() as store:
        known = [r.name for r in store.state.records]
        for name in names:
            if name not in known:
                raise UsageError(
                    f"no policy `{name}` is loaded",
                    did_you_mean(name, known) or "`itmc list` shows what is loaded",
                )
        kernel = _kernel()
        chosen = [r for r in store.state.records if r.name in names]
        for record in chosen:
            if record.table not in kernel:
                raise MachineError(
                    f"the table of `{record.name}` is gone from the kernel",
                    "`itmc apply` brings it back",
                )
        changing = [r for r in chosen if r.on != on or (on and not _hooked(r, kernel))]
        wanted = State(
            tuple(replace(r, on=on) if r.name in names else r for r in store.state.records)
        )
        script, touched = switching([r.name for r in changing], wanted, kernel)
        tables = {r.table for r in store.state.records if r.name in touched}
        sound = {r.name for r in wanted.records if r.table in tables and not _drifted(r)}
        prepared = store.prepare(wanted)
        if script:
            try:
                nft.load(script)
            except NftRefusalError as refusal:
                raise MachineError(f"nftables refused: {refusal}; nothing was changed") from refusal
        _settle(store, prepared, wanted, sound)
    return tuple(r.name for r in changing)


def _hooked(record: Record, kernel: Mapping[str, Running]) -> bool:
    """Are all base chains of a policy where they should be?"""
    return all(chain in kernel[record.table].chains for _, _, chain in record.hooks)


def file_key(name: str) -> str:
    """What identifies a policy file: its absolute path, `-` for standard input."""
    return name if name == "-" else str(Path(name).resolve())


def _refuse_foreign(compiled: Compiled, file: str, state: State) -> None:
    """A policy name belongs to the file that brought it, and so does a table."""
    errors = []
    for table in compiled.ruleset.tables:
        # What is left of policies that shared it still goes by the first one's name.
        others = [r for r in state.records if r.table == table.path and r.file != file]
        if others and state.find(table.policies[0]) is None:
            errors.append(
                Diagnostic(
                    "E050",
                    f"`{others[0].name}`, from {others[0].shown}, has the table {table.name}",
                    table.span,
                    help=f"give the policy another name, or `itmc remove {others[0].name}` first",
                )
            )
    for policy in compiled.policies:
        owner = state.find(policy.name)
        if owner is not None and owner.file != file:
            errors.append(
                Diagnostic(
                    "E050",
                    f"a policy named `{policy.name}` is loaded already, from {owner.shown}",
                    policy.span,
                    help=f"give it another name, or `itmc remove {policy.name}` first",
                )
            )
    if errors:
        raise CompileError(errors)


def _our_tables() -> list[str]:
    """The tables of ours that exist, as `family name`."""
    return [path for path in nft.tables() if path.split()[1].startswith(TABLE_PREFIX)]


def _kernel() -> dict[str, Running]:
    return {path: running(nft.table(path)) for path in _our_tables()}


def _load(change: Plan, compiled: Compiled, *, check: bool = False) -> None:
    """The transaction; a refusal is shown at the policy's lines."""
    try:
        nft.load(change.script, check=check)
    except NftRefusalError as refusal:
        diagnostics = []
        for error in refusal.errors:
            index = error.line - change.offset - 1
            lines = compiled.text.lines
            span = lines[index] if 0 <= index < len(lines) else None
            message = f"the kernel refused this: {error.message}"
            absent = _absent_at(change.script, error.line)
            if absent:
                message = f"there is no device {absent} here"
            place = "" if span else "nftables"
            diagnostics.append(Diagnostic("E060", message, span, place=place))
        raise MachineError(
            "nftables refused the ruleset; nothing was changed",
            "`itmc compile` shows the rules",
            tuple(dict.fromkeys(diagnostics)),
        ) from refusal


def _settle(store: Store, prepared: Path, state: State, renewed: set[str]) -> None:
    """Put the new state in its place, with digests of what now runs.

    The kernel has it already: what fails from here on must not look like a refusal.
    """
    with suppress(MachineError, OSError):
        store.commit(prepared, state)
        if renewed:
            digested = _with_digests(state, renewed)
            store.commit(store.prepare(digested), digested)


def _with_digests(state: State, names: set[str]) -> State:
    """The state with the digests of the named policies' tables taken anew."""
    digests = {r.table: "" for r in state.records if r.name in names}
    for path in digests:
        digests[path] = _digest(path)
    records = tuple(replace(r, digest=digests.get(r.table, r.digest)) for r in state.records)
    return State(records)


def _drifted(r: Record) -> bool:
    """Did somebody else change the rules of a loaded policy's table?"""
    return bool(r.digest) and _digest(r.table) != r.digest


def _digest(path: str) -> str:
    try:
        listing = nft.table_text(path)
    except MachineError:
        return ""  # nftables cannot list what it took: then drift is not noticed
    return hashlib.sha256(listing.encode()).hexdigest() if listing else ""


# What runs.


@dataclass(frozen=True)
class ClassStatus:
    name: str
    packets: int
    bytes: int


@dataclass(frozen=True)
class FlowStatus:
    """`entries` flows of at most `size` (for each address family) are known.

    `uncounted` are packets of new flows that found the table full; None for the
    buckets of a limit, of which the kernel does not tell.
    """

    name: str
    key: tuple[str, ...]
    entries: int
    size: int
    uncounted: int | None


@dataclass(frozen=True)
class SetStatus:
    """A learned set: `entries` of at most `size` (for each address family)."""

    name: str
    entries: int
    size: int
    unlearned: int  # additions that found it full


@dataclass(frozen=True)
class PolicyStatus:
    """A loaded policy. `state` is "on", "off" (its rules are not asked), "missing" (its table is gone) or "unknown" (not ours to
    tell: a table of ours that the state knows nothing of)."""

    name: str
    state: str
    file: str
    hooks: tuple[tuple[str, int], ...]
    priority: int
    drift: bool
    classes: tuple[ClassStatus, ...]
    flows: tuple[FlowStatus, ...]
    learned: tuple[SetStatus, ...] = ()
    noted: tuple[ClassStatus, ...] = ()  # what was sampled and recorded


def loaded() -> tuple[PolicyStatus, ...]:
    """All loaded policies in the order they run, without counts."""
    return _statuses(counts=False)


def status(names: Sequence[str] = ()) -> tuple[PolicyStatus, ...]:
    """The loaded policies (or those named) with their counts.

    Raises `UsageError` for a name that is not loaded.
    """
    found = _statuses(counts=True, names=names)
    known = {s.name for s in found}
    for name in names:
        if name not in known:
            raise UsageError(
                f"no policy `{name}` is loaded",
                did_you_mean(name, [s.name for s in loaded()])
                or "`itmc list` shows what is loaded",
            )
    return tuple(s for s in found if not names or s.name in names)


def _statuses(*, counts: bool, names: Sequence[str] = ()) -> tuple[PolicyStatus, ...]:
    nft.require_rights()
    state = load()
    present = set(_our_tables())
    seen: dict[str, tuple[str, Mapping[str, tuple[int, int]]]] = {}  # by table
    found = []
    for r in state.records:
        if names and r.name not in names:
            continue
        there = r.table in present
        if there and r.table not in seen:
            seen[r.table] = _digest(r.table), _counters(r.table) if counts else {}
        found.append(
            _status(r, counts, *seen[r.table])
            if there
            else PolicyStatus(r.name, "missing", r.shown, _hooks(r), r.priority, True, (), ())
        )
    for path in sorted(present - {r.table for r in state.records}):
        name = path.split()[1].removeprefix(TABLE_PREFIX)
        hooks = tuple(
            (hook.name, hook.priority) for hook in running(nft.table(path)).chains.values() if hook
        )
        found.append(PolicyStatus(name, "unknown", "", hooks, 0, True, (), ()))
    # Stable: at equal priority the state's order is the order they run.
    return tuple(sorted(found, key=lambda s: s.priority))


def _hooks(r: Record) -> tuple[tuple[str, int], ...]:
    return tuple((hook, priority) for hook, priority, _ in r.hooks)


def _status(
    r: Record, counts: bool, digest: str, counters: Mapping[str, tuple[int, int]]
) -> PolicyStatus:
    drift = bool(r.digest) and digest != r.digest
    state = "on" if r.on else "off"
    if not counts:
        return PolicyStatus(r.name, state, r.shown, _hooks(r), r.priority, drift, (), ())

    def counted(name: str) -> tuple[int, int]:
        return counters.get(name, (0, 0))

    classes = tuple(ClassStatus(n, *counted(f"{r.prefix}class_{n}")) for n in r.classes)
    flows = tuple(
        FlowStatus(
            flow.name,
            flow.key,
            sum(len(nft.elements(r.table, name)) for _, name in flow.sets),
            flow.size,
            counted(flow.uncounted)[0] if flow.uncounted else None,
        )
        for flow in r.flows
    )
    learned = tuple(
        SetStatus(
            one.name,
            sum(len(nft.elements(r.table, name)) for name in one.sets),
            one.size,
            counted(one.unlearned)[0],
        )
        for one in r.learned
    )
    noted = tuple(ClassStatus(n.removeprefix(r.prefix), *counted(n)) for n in r.noted)
    return PolicyStatus(
        r.name, state, r.shown, _hooks(r), r.priority, drift, classes, flows, learned, noted
    )


def _counters(path: str) -> Mapping[str, tuple[int, int]]:
    found = {}
    for item in nft.table(path):
        if "counter" in item:
            counter: dict[str, Any] = item["counter"]
            found[counter["name"]] = (counter["packets"], counter["bytes"])
    return found


def flow_counts(name: str) -> dict[str, dict[tuple[Any, ...], tuple[int, int]]]:
    """For each flow of a loaded policy: its keys with (packets, bytes), as the kernel has them."""
    r = load().find(name)
    if r is None:
        raise UsageError(f"no policy `{name}` is loaded")
    found: dict[str, dict[tuple[Any, ...], tuple[int, int]]] = {}
    for flow in r.flows:
        table = found.setdefault(flow.name, {})
        for _, set_name in flow.sets:
            for element in nft.elements(r.table, set_name):
                counter = element.get("counter", {})
                key = tuple(element["val"])
                table[key] = (counter.get("packets", 0), counter.get("bytes", 0))
    return found
