"""What has to be said to nftables to get from what runs to what is wanted; pure.

The text that `itmc compile` prints does most: it makes what is missing, empties
the tables of rules and fills them again, and sets and counters keep what they
learned. Around it goes what the text cannot know: objects that are no longer
wanted, sets whose key changed, and base chains that must hang elsewhere. All of
it is one script, so one transaction.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from itmlang.nft.model import BaseHook, FlowSet, Ruleset, Table
from itmlang.nft.text import Text, print_base_chains
from runtime.state import FlowRecord, Record, SetRecord, State


@dataclass(frozen=True)
class Running:
    """One of our tables as the kernel has it."""

    chains: Mapping[str, BaseHook | None]
    sets: Mapping[str, tuple[str, ...]]  # name -> the types of its key
    counters: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """`script` is the transaction; the compiled text begins behind its first `offset` lines."""

    script: str
    offset: int
    state: State
    deleted: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()  # flow sets that cannot be kept
    rehooked: tuple[str, ...] = field(default=())  # policies whose base chains were renewed


def running(listing: Sequence[Mapping[str, Any]]) -> Running:
    """What libnftables' JSON listing says of a table."""
    chains: dict[str, BaseHook | None] = {}
    sets: dict[str, tuple[str, ...]] = {}
    counters = []
    for item in listing:
        if "chain" in item:
            chain = item["chain"]
            chains[chain["name"]] = _base_hook(chain) if "hook" in chain else None
        elif "set" in item:
            kind = item["set"]["type"]
            sets[item["set"]["name"]] = (kind,) if isinstance(kind, str) else tuple(kind)
        elif "counter" in item:
            counters.append(item["counter"]["name"])
    return Running(chains, sets, tuple(counters))


def _base_hook(chain: Mapping[str, Any]) -> BaseHook:
    device = chain.get("dev", "")
    name = f'{chain["hook"]} "{device}"' if device else chain["hook"]
    return BaseHook(name, chain["prio"], chain.get("type", "filter"))


def plan(
    ruleset: Ruleset,
    text: Text,
    file: str,
    records: Sequence[Record],
    state: State,
    kernel: Mapping[str, Running],
) -> Plan:
    """The transaction that loads a file's ruleset.

    `records` describe the file's policies; `kernel` holds our tables that exist.
    """
    prologue: list[str] = []
    wanted = {table.path for table in ruleset.tables}
    ours = state.of_file(file)
    names = {r.name for r in records}
    deleted = [r.name for r in ours if r.name not in names]
    lost: list[str] = []
    for path in dict.fromkeys(r.table for r in ours):
        if path not in wanted and path in kernel:
            prologue.append(f"delete table {path}")
            staying = [r for r in ours if r.table == path and r.name in names]
            lost += _learned_by(staying, kernel[path])
    unwanted = tuple(r.prefix for r in ours if r.name in deleted and r.prefix)
    for table in ruleset.tables:
        if table.path in kernel:
            commands, gone = _stale(table, kernel[table.path])
            prologue += commands
            lost += [name for name in gone if not name.startswith(unwanted)]
    # What was off stays off.
    off = {r.name for r in ours if not r.on}
    kept = [replace(r, on=r.name not in off) for r in records]
    after = _ordered(kept, file, state.without(set(deleted)))
    epilogue, rehooked = _rehook(after, ruleset, state, kernel)
    unhooked = [c for r in kept if not r.on for _, _, chain in r.hooks for c in _unhook(r, chain)]
    epilogue += "".join(f"{command}\n" for command in unhooked)
    script = "".join(f"{line}\n" for line in prologue) + text.text + epilogue
    return Plan(script, len(prologue), after, tuple(deleted), tuple(lost), rehooked)


def _stale(table: Table, kernel: Running) -> tuple[list[str], list[str]]:
    """Commands that take away what a table no longer has or has in another form."""
    hooks = {chain.name: chain.hook for chain in table.chains}
    types = {s.name: s.types for s in table.sets} | {v.name: (v.type,) for v in table.values}
    counters = {c.name for c in table.counters}
    kinds = {
        "chain": [n for n, hook in kernel.chains.items() if n not in hooks or hooks[n] != hook],
        "set": [n for n, kind in kernel.sets.items() if types.get(n) != kind],
        "counter": [n for n in kernel.counters if n not in counters],
    }
    commands = [
        f"delete {kind} {table.path} {name}" for kind, names in kinds.items() for name in names
    ]
    # Without their rules, nothing refers to them any more.
    empty = [f"flush table {table.path}"] if commands else []
    learned = [name for name in kinds["set"] if not _is_fixed(name)]
    return empty + commands, learned


def _learned_by(records: Sequence[Record], kernel: Running) -> list[str]:
    """The sets of a table in which these policies keep what they learned."""
    learned = _learned_sets(records)
    own = tuple(r.prefix for r in records)
    return [
        name
        for name in kernel.sets
        if name in learned or (name.startswith(own) and not _is_fixed(name))
    ]


def _is_fixed(name: str) -> bool:
    """Is this the name of a set with fixed values? What belongs to a policy has a dot."""
    return name.startswith("set_") and "." not in name


def _learned_sets(records: Sequence[Record]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(n for r in records for one in r.learned for n in one.sets))


def _ordered(records: Sequence[Record], file: str, state: State) -> State:
    """The new state: places among other files' policies are kept, file order holds within."""
    old = {r.name for r in state.of_file(file)}
    queue = list(records)
    result: list[Record] = []
    for record in state.records:
        if record.file != file:
            result.append(record)
            continue
        # This place belongs to the file's next policy that was there already; new
        # ones that stand before it come along.
        while queue:
            first = queue.pop(0)
            result.append(first)
            if first.name in old:
                break
    return State((*result, *queue))


def _rehook(
    after: State,
    ruleset: Ruleset,
    before: State,
    kernel: Mapping[str, Running],
) -> tuple[str, tuple[str, ...]]:
    """Commands that renew base chains where the kernel would run policies in a wrong order.

    Of equal priorities the kernel runs the last-registered chain first. New chains
    are registered when the text is loaded, those that are kept stay behind them.
    """
    groups = _by_hook(after)
    previous = [r.name for r in before.records]
    forms = {
        (table.path, chain.name): chain.hook
        for table in ruleset.tables
        for chain in table.base_chains
    }
    wanted = {table.path for table in ruleset.tables}
    commands: list[str] = []
    rehooked: dict[str, None] = {}
    for (hook, priority), members in groups.items():
        kept = [
            r.name
            for r, chain in members
            if (found := kernel.get(r.table)) is not None
            and (base := found.chains.get(chain)) is not None
            and (base.name, base.priority) == (hook, priority)
            and base == forms.get((r.table, chain), base)  # or its type made it a new one
        ]
        kept.sort(key=lambda name: previous.index(name) if name in previous else -1)
        new = [r.name for r, _ in members if r.name not in kept]
        # Where the state was lost, nobody knows in which order the kernel has them.
        known = len(members) == 1 or all(name in previous for name in kept)
        if known and [r.name for r, _ in members] == new + kept:
            continue
        for record, chain in reversed(members):
            if record.table not in wanted and record.table not in kernel:
                continue  # taken away by somebody; applying its file brings it back
            commands += _unhook(record, chain)
            commands.append(record.base_chains[chain])
            rehooked[record.name] = None
    return "".join(f"{command}\n" for command in commands), tuple(rehooked)


def _by_hook(state: State) -> dict[tuple[str, int], list[tuple[Record, str]]]:
    """The policies that are on with their base chains, by hook and priority, in order."""
    groups: dict[tuple[str, int], list[tuple[Record, str]]] = {}
    for record in (r for r in state.records if r.on):
        for hook, priority, chain in record.hooks:
            groups.setdefault((hook, priority), []).append((record, chain))
    return groups


def _unhook(record: Record, chain: str) -> list[str]:
    """Commands that take a base chain away; nothing jumps to one."""
    return [f"flush chain {record.table} {chain}", f"delete chain {record.table} {chain}"]


def switching(
    names: Sequence[str], state: State, kernel: Mapping[str, Running]
) -> tuple[str, tuple[str, ...]]:
    """Commands that take the named policies off their hooks or hang them in again.

    `state` tells which of them are to be on. Everything else of a policy stays as it
    is, and so does what it learned. With the names of policies whose chains are renewed.
    """
    commands: list[str] = []
    touched = dict.fromkeys(names)
    for record in (r for r in state.records if r.name in names and not r.on):
        for _, _, chain in record.hooks:
            if chain in kernel[record.table].chains:
                commands += _unhook(record, chain)
    for members in _by_hook(state).values():
        if not any(record.name in names for record, _ in members):
            continue
        for record, chain in reversed(members):
            if record.table not in kernel:
                continue
            if chain in kernel[record.table].chains:
                commands += _unhook(record, chain)
            commands.append(record.base_chains[chain])
            touched[record.name] = None
    return "".join(f"{command}\n" for command in commands), tuple(touched)


def removal(going: Sequence[Record], state: State, kernel: Mapping[str, Running]) -> str:
    """Commands that take policies away; a table goes with the last policy in it."""
    names = {r.name for r in going}
    commands: list[str] = []
    for path in dict.fromkeys(r.table for r in going):
        if path not in kernel:
            continue
        staying = [r for r in state.records if r.table == path and r.name not in names]
        if not staying:
            commands.append(f"delete table {path}")
            continue
        leaving = [r for r in going if r.table == path]
        for record in leaving:
            commands += _without(record, kernel[path])
        kept = _learned_sets(staying)
        orphans = [name for name in _learned_sets(leaving) if name not in kept]
        commands += [f"delete set {path} {name}" for name in orphans if name in kernel[path].sets]
    return "".join(f"{command}\n" for command in commands)


def _without(record: Record, kernel: Running) -> list[str]:
    """Commands that take one policy out of a table that it shares."""
    chains, sets, counters = (
        [name for name in names if name.startswith(record.prefix)]
        for names in (kernel.chains, kernel.sets, kernel.counters)
    )
    # Emptied first, for chains that others jump to cannot be deleted.
    commands = [f"flush chain {record.table} {name}" for name in chains]
    for kind, names in (("chain", chains), ("set", sets), ("counter", counters)):
        commands += [f"delete {kind} {record.table} {name}" for name in names]
    return commands


def records_of(
    table: Table, file: str, shown: str, priorities: Mapping[str, int], applied: float
) -> list[Record]:
    """What the state keeps of a table's policies."""
    return [
        record(table, policy, file, shown, priorities[policy], applied) for policy in table.policies
    ]


def record(
    table: Table, policy: str, file: str, shown: str, priority: int, applied: float
) -> Record:
    """What the state keeps of one policy of a table."""
    counters = [c for c in table.counters if c.policy == policy]
    rules = (r.text for c in table.chains if c.policy == policy for r in c.rules)
    named = {name for text in rules for name in re.findall(r"@(\w+)", text)}
    return Record(
        name=policy,
        table=table.path,
        prefix=table.prefix(policy),
        file=file,
        shown=shown,
        hooks=tuple(
            (chain.hook.name, chain.hook.priority, chain.name)
            for chain in table.base_chains
            if chain.hook is not None and chain.policy == policy
        ),
        priority=priority,
        classes=tuple(c.of for c in counters if c.kind == "class"),
        flows=_flows(
            [s for s in table.sets if s.policy == policy],
            {c.of: c.name for c in counters if c.kind == "uncounted"},
        ),
        learned=_learned(
            [s for s in table.sets if s.role == "learned" and s.name in named],
            {c.of: c.name for c in counters if c.kind == "unlearned"},
        ),
        noted=tuple(c.name for c in counters if c.kind in ("sampled", "recorded")),
        base_chains=print_base_chains(table, policy),
        applied=applied,
    )


def _learned(sets: Sequence[FlowSet], unlearned: Mapping[str, str]) -> tuple[SetRecord, ...]:
    by_name: dict[str, list[FlowSet]] = {}
    for one in sets:
        by_name.setdefault(one.flow, []).append(one)
    return tuple(
        SetRecord(name, found[0].size, tuple(s.name for s in found), unlearned.get(name, ""))
        for name, found in by_name.items()
    )


def _flows(sets: Sequence[FlowSet], uncounted: Mapping[str, str]) -> tuple[FlowRecord, ...]:
    counting: dict[str, list[FlowSet]] = {}
    for flow_set in sets:
        if flow_set.role == "count":
            counting.setdefault(flow_set.flow, []).append(flow_set)
        elif flow_set.role == "limit":
            number = flow_set.name.rpartition("_")[2]
            counting.setdefault(f"{flow_set.flow} (limit {number})", []).append(flow_set)
    return tuple(
        FlowRecord(
            name=name,
            key=found[0].key,
            size=found[0].size,
            sets=tuple((s.family, s.name) for s in found),
            uncounted=uncounted.get(name, ""),
        )
        for name, found in counting.items()
    )
