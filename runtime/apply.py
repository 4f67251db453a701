"""Load policies, take them away, and see what runs.

The order of things is what makes it safe: the state's lock first, then the new
state written beside the old, then one transaction, then the state renamed into
place. Whatever fails before the transaction changes nothing; the transaction is
all or nothing; and what is left is a rename.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from itmlang.diagnostics import CompileError, Diagnostic, did_you_mean
from itmlang.nft.model import TABLE_PREFIX
from itmlang.pipeline import Compiled
from runtime import nft
from runtime.errors import MachineError, UsageError
from runtime.nft import NftRefusalError
from runtime.plan import Plan, Running, plan, record, running
from runtime.state import Record, State, load, locked


@dataclass(frozen=True)
class Applied:
    """What `apply` did: names of policies loaded and removed, flow sets that were lost."""

    loaded: tuple[str, ...]
    removed: tuple[str, ...]
    lost: tuple[str, ...]


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
        records = [
            record(table, file, compiled.source.name, priorities[table.policy], now)
            for table in compiled.ruleset.tables
        ]
        kernel = _kernel()
        _refuse_foreign(compiled, file, store.state)
        change = plan(compiled.ruleset, compiled.text, file, records, store.state, kernel)
        if check:
            _load(change, compiled, check=True)
            return Applied(tuple(r.name for r in records), change.deleted, change.lost)
        prepared = store.prepare(change.state)
        _load(change, compiled)
        renewed = {r.name for r in records} | set(change.rehooked)
        store.commit(prepared, change.state)
        digested = _with_digests(change.state, renewed)
        # The policies are loaded: what fails from here on must not look like a refusal.
        with suppress(MachineError):
            store.commit(store.prepare(digested), digested)
    return Applied(tuple(r.name for r in records), change.deleted, change.lost)


def remove(names: Sequence[str]) -> tuple[str, ...]:
    """Take policies away, all in one transaction; an empty list takes all.

    Without names, every table of ours goes, also those that a crash left behind.
    Returns the names. Raises `UsageError` for a name that is not loaded.
    """
    nft.require_rights()
    with locked() as store:
        present = [name.removeprefix(TABLE_PREFIX) for name in _our_tables()]
        known = sorted({*present, *(r.name for r in store.state.records)})
        for name in names:
            if name not in known:
                raise UsageError(
                    f"no policy `{name}` is loaded",
                    did_you_mean(name, known) or "`itmc list` shows what is loaded",
                )
        going = list(dict.fromkeys(names)) or known
        left = store.state.without(set(going))
        prepared = store.prepare(left)
        script = "".join(
            f"delete table inet {TABLE_PREFIX}{name}\n" for name in going if name in present
        )
        if script:
            try:
                nft.load(script)
            except NftRefusalError as refusal:
                raise MachineError(f"nftables refused: {refusal}; nothing was removed") from refusal
        store.commit(prepared, left)
    return tuple(going)


def file_key(name: str) -> str:
    """What identifies a policy file: its absolute path, `-` for standard input."""
    return name if name == "-" else str(Path(name).resolve())


def _refuse_foreign(compiled: Compiled, file: str, state: State) -> None:
    """A policy name belongs to the file that brought it."""
    errors = []
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
    return [name for name in nft.tables() if name.startswith(TABLE_PREFIX)]


def _kernel() -> dict[str, Running]:
    return {name: running(nft.table(name)) for name in _our_tables()}


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
            place = "" if span else "nftables"
            diagnostics.append(Diagnostic("E060", message, span, place=place))
        raise MachineError(
            "nftables refused the ruleset; nothing was changed",
            "`itmc compile` shows the rules",
            tuple(dict.fromkeys(diagnostics)),
        ) from refusal


def _with_digests(state: State, names: set[str]) -> State:
    """The state with the digests of the named tables taken anew."""
    records = tuple(
        replace(r, digest=_digest(r.name)) if r.name in names else r for r in state.records
    )
    return State(records)


def _digest(name: str) -> str:
    try:
        listing = nft.table_text(TABLE_PREFIX + name)
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
    """`entries` flows of at most `size` (for each address family) are known."""

    name: str
    key: tuple[str, ...]
    entries: int
    size: int
    uncounted: int  # packets of new flows that found the table full, or had no key


@dataclass(frozen=True)
class PolicyStatus:
    """A loaded policy. `state` is "on", "missing" (its table is gone) or "unknown" (not ours to
    tell: a table of ours that the state knows nothing of)."""

    name: str
    state: str
    file: str
    hooks: tuple[tuple[str, int], ...]
    priority: int
    drift: bool
    classes: tuple[ClassStatus, ...]
    flows: tuple[FlowStatus, ...]


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
    found = []
    for r in state.records:
        if names and r.name not in names:
            continue
        there = TABLE_PREFIX + r.name in present
        found.append(
            _status(r, there, counts)
            if there
            else PolicyStatus(r.name, "missing", r.shown, r.hooks, r.priority, True, (), ())
        )
    for table in sorted(present - {TABLE_PREFIX + r.name for r in state.records}):
        name = table.removeprefix(TABLE_PREFIX)
        hooks = tuple(
            (hook.name, hook.priority) for hook in running(nft.table(table)).chains.values() if hook
        )
        found.append(PolicyStatus(name, "unknown", "", hooks, 0, True, (), ()))
    # Stable: at equal priority the state's order is the order they run.
    return tuple(sorted(found, key=lambda s: s.priority))


def _status(r: Record, there: bool, counts: bool) -> PolicyStatus:
    drift = not there or (bool(r.digest) and _digest(r.name) != r.digest)
    if not counts:
        return PolicyStatus(r.name, "on", r.shown, r.hooks, r.priority, drift, (), ())
    counters = _counters(TABLE_PREFIX + r.name)
    classes = tuple(ClassStatus(n, *counters.get(f"class_{n}", (0, 0))) for n in r.classes)
    flows = tuple(
        FlowStatus(
            flow.name,
            flow.key,
            sum(len(nft.elements(TABLE_PREFIX + r.name, name)) for _, name in flow.sets),
            flow.size,
            counters.get(flow.uncounted, (0, 0))[0],
        )
        for flow in r.flows
    )
    return PolicyStatus(r.name, "on", r.shown, r.hooks, r.priority, drift, classes, flows)


def _counters(table: str) -> Mapping[str, tuple[int, int]]:
    found = {}
    for item in nft.table(table):
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
            for element in nft.elements(TABLE_PREFIX + name, set_name):
                counter = element.get("counter", {})
                key = tuple(element["val"])
                table[key] = (counter.get("packets", 0), counter.get("bytes", 0))
    return found
