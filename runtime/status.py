"""What runs: the loaded policies in their order, what they counted, what others changed."""

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from itmlang.control import Controller, Timer
from itmlang.diagnostics import did_you_mean
from itmlang.nft.model import TABLE_PREFIX, FlowSet, Table
from runtime import decisions, netqueue, nft, steering
from runtime.apply import kernel, our_tables
from runtime.errors import UsageError
from runtime.overlay.status import OverlayStatus, seen
from runtime.plan import drift
from runtime.state import Entry, State
from runtime.store import Store, directory, load, now, reading, waiting
from runtime.talk import ask, lives
from runtime.warden import overdue


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
class PythonStatus:
    """What a policy has in Python, in packets.

    Of the kernel: `unserved` were meant for Python and got `fail open` or `fail closed`
    because nobody served them, `waiting` are in the queues now, `dropped` were dropped because
    a queue or its socket was full. Of the workers since they first started: `handled`, and
    among them those that a handler `failed` on or took too long for (`hung`), that no tunnel
    took (`refused`) and of which too little was copied (`cut`). `trouble` is what keeps
    packets from being served now, in words, "" for nothing; `log` are the last lines about it.
    """

    queues: tuple[int, ...]
    fails: str  # "open" or "closed"
    workers: int  # that serve now, one for each queue
    process: int  # the runtime's or the program's, 0 if there is none
    unserved: int
    waiting: int
    dropped: int
    handled: int
    failed: int
    hung: int
    refused: int
    cut: int
    trouble: str
    program: str  # that serves its queues by itself; "" for the runtime
    log: tuple[str, ...]


@dataclass(frozen=True)
class LinkClassStatus:
    """A class of a link: what it has sent, what it dropped, and what waits in it now."""

    name: str
    priority: int
    packets: int
    bytes: int
    drops: int
    waiting: int  # packets
    waiting_bytes: int


@dataclass(frozen=True)
class LinkStatus:
    """A scheduled interface.

    `state` is "on", "off" or "waiting" (no interface is there). `rate` is what it is shaped to
    now, `file_rate` what its file says, in bytes a second; they differ while a
    controller moves it. `interfaces` are those that are here. Counts are of all of them.
    """

    name: str
    state: str
    file: str
    interface: str
    ingress: bool
    rate: int
    file_rate: int
    interfaces: tuple[str, ...]
    classes: tuple[LinkClassStatus, ...]
    drift: bool
    changed: tuple[str, ...]


@dataclass(frozen=True)
class TimerStatus:
    """A timer: how often it was called, and was not because it was still at it.

    `trouble` is what keeps it from being called, "" for nothing.
    """

    target: str
    period: int  # milliseconds
    called: int
    skipped: int
    failed: int
    trouble: str = ""


@dataclass(frozen=True)
class ControlStatus:
    """A controller: what it writes, where that is now and where the file has it.

    `value` and `sample` are None as long as nothing was decided since it began; they are in the
    units of `itmlang.control`. In a dry run, `value` is what it would have written, and `would`
    the same as a policy has it ("" otherwise); so are `in_force` and `in_file`. `at` is when it
    decided last, in seconds since the epoch. `trouble` is what keeps it from running, "" for
    nothing.
    """

    written: str
    value: float | None
    base: float
    measure: str
    unit: str
    sample: float | None
    target: float
    law: str
    dry: bool
    reason: str
    blocked: str
    trouble: str
    period: int  # milliseconds
    low: float
    high: float
    in_force: str
    in_file: str
    would: str
    at: float | None


@dataclass(frozen=True)
class PolicyStatus:
    """A loaded policy.

    `state` is "on", "off" (its rules are not asked), "missing" (its table is gone) or
    "unknown" (a table of ours that the state knows nothing of). `changed` tells what
    somebody else changed of its table, in words.
    """

    name: str
    state: str
    file: str
    hooks: tuple[tuple[str, int], ...]
    priority: int
    drift: bool
    classes: tuple[ClassStatus, ...] = ()
    flows: tuple[FlowStatus, ...] = ()
    learned: tuple[SetStatus, ...] = ()
    noted: tuple[ClassStatus, ...] = ()  # what was sampled and recorded
    changed: tuple[str, ...] = ()
    parameters: Mapping[str, str] = field(default_factory=dict)
    python: PythonStatus | None = None
    control: tuple[ControlStatus, ...] = ()
    timers: tuple[TimerStatus, ...] = ()
    ways: tuple[ClassStatus, ...] = ()  # what went by neighbours of an overlay
    overlay: OverlayStatus | None = None


@dataclass(frozen=True)
class Glance:
    """What `glance` saw at a moment (seconds of the monotonic clock).

    Of policies without flows, learned sets and drift, of links without drift.
    """

    at: float
    state: State
    policies: tuple[PolicyStatus, ...]
    links: tuple[LinkStatus, ...]


@dataclass(frozen=True)
class FlowCount:
    """A flow: its key, field by field, and what was counted of it."""

    flow: str
    key: tuple[Any, ...]
    packets: int
    bytes: int
    expires: int | None  # milliseconds until it is forgotten


@dataclass(frozen=True)
class Waiting:
    """A generation that waits to be confirmed, and the one it goes back to (0: nothing loaded).

    `seconds` are left. `overdue`: whoever should have gone back by now was ended, so the
    next change does it first.
    """

    generation: int
    back: int
    seconds: float
    overdue: bool


def pending() -> Waiting | None:
    """What waits to be confirmed. Raises `MachineError` if its record is damaged."""
    found = waiting(directory())
    if found is None:
        return None
    late = overdue(found)
    left = 0.0 if late else round(found.until - now(), 1)
    return Waiting(found.generation, found.back, left, late)


def loaded(known: State | None = None) -> tuple[PolicyStatus, ...]:
    """All loaded policies in the order they run, without counts; `known` is the state, if it was
    read already."""
    return _statuses(counts=False, known=known)


def status(names: Sequence[str] = (), known: State | None = None) -> tuple[PolicyStatus, ...]:
    """The loaded policies (or those named) with their counts; names of links are left to
    `link_status`.

    `known` is the state, if it was read already. Raises `UsageError` for a name that is
    not loaded.
    """
    found = _statuses(counts=True, names=names, known=known)
    refuse_unknown(names, {s.name for s in found})
    return tuple(s for s in found if not names or s.name in names)


def refuse_unknown(names: Sequence[str], known: Collection[str] = ()) -> None:
    """Refuse names that are neither `known` nor of policies or links: raises `UsageError`."""
    if {*names} <= {*known}:
        return
    links = [link.name for link in load().links]
    loaded = [one.name for one in _statuses(counts=False)]
    for name in names:
        if name not in loaded and name not in links:
            _refuse(name, [*loaded, *links])


def link_status(names: Sequence[str] = (), known: State | None = None) -> tuple[LinkStatus, ...]:
    """The links (or those named) with their counts; names of policies are left to `status`.

    `known` is the state, if it was read already. Raises `MachineError`.
    """
    nft.require_rights()
    with reading(known) as store:
        return links_of(store.state, names, steering.wrong_links(store.state))


def links_of(
    state: State, names: Collection[str] = (), wrong: Mapping[str, Sequence[str]] = {}
) -> tuple[LinkStatus, ...]:
    """The links of a state (or those named), with what is `wrong` with them, by name.

    Raises `MachineError`.
    """
    if not state.links:
        return ()
    from runtime import links  # 0.2 s that is not needed without links

    counted = links.stats(state.active_links)
    found = []
    for unit in state.units:
        for link in unit.links:
            if names and link.name not in names:
                continue
            here = tuple(links.interfaces(link))
            off = link.name in state.resting
            counts = [c for (name, _), c in counted.items() if name == link.name]
            classes = tuple(
                LinkClassStatus(
                    one.name, one.priority,
                    *(sum(getattr(c[one.name], what) for c in counts if one.name in c)
                      for what in ("packets", "bytes", "drops", "waiting", "waiting_bytes")),
                )
                for one in link.classes
            )  # fmt: skip
            changed = tuple(wrong.get(link.name, ()))
            found.append(
                LinkStatus(
                    link.name, "off" if off else "on" if here else "waiting", unit.shown,
                    link.interface, link.ingress, links.rate(link) or link.rate, link.rate,
                    here, classes, bool(changed) and bool(here), changed,
                )
            )  # fmt: skip
    return tuple(found)


def glance(names: Collection[str] = (), known: State | None = None) -> Glance:
    """What the loaded policies and links (or those named) counted, at little cost: the state is
    not locked meanwhile, no rule and no flow is read.

    `known` is the state as it was the last time: it is read again if it changed. Raises
    `MachineError`.
    """
    nft.require_rights()
    with reading(known) as store:
        state = store.state
    return Glance(
        time.monotonic(), state,
        _with_runtime(store, [
            _glanced(state, entry) for entry in state.policies if not names or entry.name in names
        ]),
        links_of(state, names),
    )  # fmt: skip


def _glanced(state: State, entry: Entry) -> PolicyStatus:
    table, unit = state.table_of(entry.name), state.unit_of(entry.name)
    policy = next(p for p in unit.policies if p.name == entry.name)
    counters = nft.counters(table.path)
    own = [c for c in table.counters if c.policy == entry.name and c.kind in ("class", "via")]
    gone = any(c.name not in counters for c in own)
    return PolicyStatus(
        entry.name,
        "missing" if gone else "on" if entry.on else "off",
        unit.shown, _hooks(table, entry.name), policy.priority, gone,
        () if gone else tuple(ClassStatus(c.of, *counters[c.name]) for c in own if c.kind == "class"),
        parameters=policy.parameters,
        ways=() if gone else tuple(ClassStatus(c.of, *counters[c.name]) for c in own if c.kind == "via"),
    )  # fmt: skip


def _hooks(table: Table, policy: str) -> tuple[tuple[str, int], ...]:
    return tuple(
        (c.hook.name, c.hook.priority)
        for c in table.base_chains
        if c.policy == policy and c.hook is not None and not c.role
    )


def control_log(name: str) -> tuple[list[str], dict[str, Controller]]:
    """What a policy's controllers decided: lines of JSON, the oldest first; and the controllers, by
    what they write.

    Raises `UsageError` if it has none, or is not loaded.
    """
    state = load()
    if name in {link.name for link in state.links}:
        theirs = [
            one.policy for table in state.tables for one in table.controllers if one.link == name
        ]
        raise UsageError(
            f"`{name}` is a link: policies have controllers",
            f"`itmc status {theirs[0]} --control` has what decides its rate" if theirs else "",
        )
    table = _table(state, name)
    mine = {one.written: one for one in table.controllers if one.policy == name}
    if not mine and all(one.name != name for one in table.overlays):
        raise UsageError(f"`{name}` has no controller", "a `control` section gives it one")
    return decisions.lines(directory(), name), mine


def _refuse(name: str, known: Sequence[str]) -> None:
    raise UsageError(
        f"no policy `{name}` is loaded",
        did_you_mean(name, known) or "`itmc list` shows what is loaded",
    )


def _statuses(
    *, counts: bool, names: Sequence[str] = (), known: State | None = None
) -> tuple[PolicyStatus, ...]:
    nft.require_rights()
    with reading(known) as store:
        told = _told(store.state, counts, names)
        return _with_runtime(store, told) if counts else told


def _told(state: State, counts: bool, names: Sequence[str]) -> tuple[PolicyStatus, ...]:
    running = kernel(state)
    on = [entry.name for entry in state.policies if entry.on]
    counters: dict[str, Mapping[str, tuple[int, int]]] = {}
    found = []
    for entry in state.policies:
        if names and entry.name not in names:
            continue
        table = state.table_of(entry.name)
        unit = state.unit_of(entry.name)
        loaded_as = next(p for p in unit.policies if p.name == entry.name)
        there = running.get(table.path)
        word = "missing" if there is None else "on" if entry.on else "off"
        changed = ["its table is gone"]
        if there is not None:
            changed = drift(table, there, state.listed.get(table.path, {}), on)
            changed += steering.drift(state, entry.name)
            if counts and table.path not in counters:
                counters[table.path] = nft.counters(table.path)
        told = _counts(table, entry.name, counters[table.path]) if counts and there else {}
        found.append(
            PolicyStatus(
                entry.name,
                word,
                unit.shown,
                _hooks(table, entry.name),
                loaded_as.priority,
                bool(changed),
                changed=tuple(changed),
                parameters=loaded_as.parameters,
                **told,
            )
        )
    ours = {table.path for table in state.tables}
    for path in (path for path in our_tables() if path not in ours):
        name = path.split()[1].removeprefix(TABLE_PREFIX)
        at = [chain.hook for chain in nft.table(path).chains.values() if chain.hook]
        hooks = tuple((hook.name, hook.priority) for hook in at)
        found.append(PolicyStatus(name, "unknown", "", hooks, 0, True))
    # Stable: at equal priority the state's order is the order they run.
    return tuple(sorted(found, key=lambda s: s.priority))


def _with_runtime(store: Store, told: Sequence[PolicyStatus]) -> tuple[PolicyStatus, ...]:
    """The statuses, with what the runtime says of those that have packets for Python."""
    queues = {
        queue.policy: (unit.program, queue)
        for unit in store.state.units
        for table in unit.ruleset.tables
        for queue in table.queues
    }
    controlled = any(t.controllers or t.timers or t.overlays for t in store.state.tables)
    programs = {program for program, _ in queues.values()} | ({""} if controlled else set())
    answers = {
        program: ask(store.folder, {"command": "status"}, 1.0, program=program) or {}
        for program in sorted(programs)
    }
    if controlled:
        told = [_with_control(store, one, answers[""]) for one in told]
    waiting = {row[0]: (row[2], row[5] + row[6]) for row in netqueue.table()}
    found = []
    for one in told:
        if one.name not in queues or one.state in ("missing", "unknown"):
            found.append(one)
            continue
        program, queue = queues[one.name]
        answer = answers[program]
        table = store.state.table_of(one.name)
        counter = next(
            c.name for c in table.counters if (c.policy, c.kind) == (one.name, "unserved")
        )
        unserved = nft.counters(table.path).get(counter, (0, 0))[0]
        workers = [
            w for w in answer.get("workers", ())
            if (w["policy"], w.get("does", "queue")) == (one.name, "queue")
        ]  # fmt: skip
        counts = [w["counts"] for w in workers]
        numbers = range(queue.first, queue.first + queue.many)
        trouble = next((w["error"] for w in workers if w["error"]), answer.get("trouble", ""))
        if not answer:
            trouble = _absent(store.folder, program, one.name)
        python = PythonStatus(
            queues=tuple(numbers),
            fails="open" if queue.fails_open else "closed",
            workers=sum(w["ready"] for w in workers),
            process=answer.get("process", 0),
            unserved=unserved,
            waiting=sum(waiting[n][0] for n in numbers if n in waiting),
            dropped=sum(waiting[n][1] for n in numbers if n in waiting),
            handled=sum(c.get("packets", 0) for c in counts),
            failed=sum(c.get("failed", 0) for c in counts),
            hung=sum(c.get("hung", 0) for c in counts),
            refused=sum(c.get("refused", 0) for c in counts),
            cut=sum(c.get("cut", 0) for c in counts),
            trouble=trouble,
            program=program,
            log=tuple(line for line in answer.get("log", ()) if line.startswith(f"{one.name} ")),
        )
        classes = one.classes
        if queue.whole:
            classes = _whole_classes(counts)
        found.append(replace(one, python=python, classes=classes))
    return tuple(found)


def _with_control(store: Store, policy: PolicyStatus, answer: Mapping[str, Any]) -> PolicyStatus:
    """The status, with what the policy's controllers, timers and overlay do."""
    if policy.state in ("missing", "unknown"):
        return policy
    table = store.state.table_of(policy.name)
    mine = [one for one in table.controllers if one.policy == policy.name]
    timers = [one for one in table.timers if one.policy == policy.name]
    workers = {w["does"]: w for w in answer.get("workers", ()) if w["policy"] == policy.name}
    absent = (
        ""
        if answer or not (mine or timers or table.overlays)
        else _absent(store.folder, "", policy.name)
    )
    control, rings = workers.get("control", {}), workers.get("timers", {})
    overlay = next((one for one in table.overlays if one.name == policy.name), None)
    prober = workers.get("overlay", {})
    last: Mapping[str, Mapping[str, Any]] = {}
    if mine and control.get("process"):
        # Before it began, what is written was the file's.
        begun = time.time() - control.get("age", 0.0)
        last = decisions.last(store.folder, policy.name, {one.written for one in mine}, begun)
    off = "the policy is off" if policy.state == "off" else ""
    counts = rings.get("counts", {}).get("timers", {})
    return replace(
        policy,
        overlay=None if overlay is None else seen(
            overlay, prober.get("state", {}), off or absent or prober.get("error", "")
        ),
        control=tuple(
            _controlled(
                one, last.get(one.written, {}), off or absent or control.get("error", ""),
                store.state,
            )
            for one in mine
        ),
        timers=tuple(
            _rung(one, counts.get(f"{one.target} {one.period}", {}), off or absent or rings.get("error", ""))
            for one in timers
        ),
    )  # fmt: skip


def _rung(one: Timer, counts: Mapping[str, int], trouble: str) -> TimerStatus:
    called, skipped, failed = (counts.get(what, 0) for what in ("called", "skipped", "failed"))
    return TimerStatus(one.target, one.period, called, skipped, failed, trouble)


def _controlled(
    one: Controller, last: Mapping[str, Any], trouble: str, state: State
) -> ControlStatus:
    value = last.get("value")
    held = _held(one, state) if value is None or one.dry else value
    return ControlStatus(
        written=one.written,
        value=value,
        base=one.base,
        measure=one.measure.text,
        unit=one.measure.unit,
        sample=last.get("sample"),
        target=one.target,
        law=one.law,
        dry=one.dry,
        reason=last.get("reason", ""),
        blocked=last.get("blocked", ""),
        trouble=trouble,
        period=one.period,
        low=one.low,
        high=one.high,
        in_force=one.shown(held),
        in_file=one.shown(one.base),
        would=one.shown(value) if one.dry and value is not None else "",
        at=last.get("time"),
    )


def _held(one: Controller, state: State) -> float:
    """What holds where nothing was decided: the file's value. Of a link, its rate: where the
    runtime was killed, that is what it was."""
    link = next((link for link in state.active_links if link.name == one.link), None)
    if link is None:
        return one.base
    from runtime import links  # 0.2 s that is not needed without links

    return links.rate(link) or one.base


def _absent(folder: Path, program: str, policy: str) -> str:
    """Why a program, or the runtime, does not answer."""
    who = f"its program {program}" if program else "the runtime"
    if lives(folder, program):
        return f"{who} does not answer: it hangs, or was stopped"
    if not program:
        return "the runtime does not run: `itmc apply` or `itmc serve` starts it"
    return f"its program {program} is gone: start it again, or `itmc remove {policy}`"


def _whole_classes(counts: Iterable[Mapping[str, Any]]) -> tuple[ClassStatus, ...]:
    """The classes of a policy that runs in Python, as its workers counted them."""
    total: dict[str, tuple[int, int]] = {}
    for one in counts:
        for name, (packets, size) in one.get("classes", {}).items():
            before = total.get(name, (0, 0))
            total[name] = (before[0] + packets, before[1] + size)
    return tuple(ClassStatus(name, *numbers) for name, numbers in total.items())


def _counts(table: Table, policy: str, counters: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """What the kernel counted of a policy, as fields of `PolicyStatus`."""
    own = [c for c in table.counters if c.policy == policy]
    by_kind = {(c.kind, c.of): counters.get(c.name, (0, 0)) for c in own}
    rules = "\n".join(r.text for c in table.chains if c.policy == policy for r in c.rules)
    learned: dict[str, list[FlowSet]] = {}
    for one in table.sets:
        if one.role == "learned" and f"@{one.name} " in rules + " ":
            learned.setdefault(one.flow, []).append(one)
    return {
        "classes": tuple(ClassStatus(c.of, *by_kind["class", c.of]) for c in own if c.kind == "class"),
        "flows": tuple(
            FlowStatus(
                name,
                sets[0].key,
                sum(len(nft.elements(table.path, one.name)) for one in sets),
                sets[0].size,
                by_kind["uncounted", name][0] if ("uncounted", name) in by_kind else None,
            )
            for name, sets in flow_sets(table, policy).items()
        ),
        "learned": tuple(
            SetStatus(
                name,
                sum(len(nft.elements(table.path, one.name)) for one in sets),
                sets[0].size,
                by_kind.get(("unlearned", name), (0, 0))[0],
            )
            for name, sets in learned.items()
        ),
        "noted": tuple(
            ClassStatus(c.kind, *by_kind[c.kind, c.of])
            for c in own
            if c.kind in ("sampled", "recorded")
        ),
        "ways": tuple(ClassStatus(c.of, *by_kind[c.kind, c.of]) for c in own if c.kind == "via"),
    }  # fmt: skip


def flow_sets(table: Table, policy: str) -> dict[str, list[FlowSet]]:
    """The sets that hold a policy's flows, by flow; the buckets of limits are among them."""
    found: dict[str, list[FlowSet]] = {}
    for one in table.sets:
        if one.policy != policy:
            continue
        if one.role == "count":
            found.setdefault(one.flow, []).append(one)
        elif one.role == "limit":
            number = one.name.rpartition("_")[2]
            found.setdefault(f"{one.flow} (limit {number})", []).append(one)
    return found


def flows(name: str) -> tuple[FlowCount, ...]:
    """The flows of a loaded policy, those with the most bytes first.

    Raises `UsageError` if it is not loaded.
    """
    nft.require_rights()
    state = load()
    table = _table(state, name)
    found = [
        FlowCount(flow, tuple(_value(k) for k in e.key), e.packets, e.bytes, e.expires)
        for flow, sets in flow_sets(table, name).items()
        for one in sets
        if one.role == "count"
        for e in nft.elements(table.path, one.name)
    ]
    return tuple(sorted(found, key=lambda f: (-f.bytes, -f.packets, str(f.key))))


def _table(state: State, name: str) -> Table:
    if state.find(name) is None:
        _refuse(name, state.names)
    return state.table_of(name)


def flow_counts(name: str) -> dict[str, dict[tuple[Any, ...], tuple[int, int]]]:
    """For each flow of a loaded policy: its keys with (packets, bytes), as the kernel has them."""
    table = _table(load(), name)
    return {
        flow: {
            tuple(_value(k) for k in e.key): (e.packets, e.bytes)
            for one in sets
            for e in nft.elements(table.path, one.name)
        }
        for flow, sets in flow_sets(table, name).items()
    }


def _value(text: str) -> Any:
    """A field of a key: a number, or a name or address as it stands."""
    if text.isdigit():
        return int(text)
    return int(text, 16) if text.startswith("0x") else text.strip('"')
