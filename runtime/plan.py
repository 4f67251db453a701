"""What has to be said to nftables to get from what runs to what is wanted; pure.

The text that `itmc compile` prints does most: it makes what is missing, empties
the tables of rules and fills them again, and sets and counters keep what they
learned. Around it goes what the text cannot know: objects that are no longer
wanted, sets whose key changed, and base chains that must hang elsewhere. All of
it is one script, so one transaction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from itmlang.nft.model import BaseHook, FlowSet, Ruleset, Table
from itmlang.nft.text import Text, print_base_chains
from runtime.state import FlowRecord, Record, State


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
            hook = BaseHook(chain["hook"], chain["prio"]) if "hook" in chain else None
            chains[chain["name"]] = hook
        elif "set" in item:
            kind = item["set"]["type"]
            sets[item["set"]["name"]] = (kind,) if isinstance(kind, str) else tuple(kind)
        elif "counter" in item:
            counters.append(item["counter"]["name"])
    return Running(chains, sets, tuple(counters))


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
    wanted = {table.name for table in ruleset.tables}
    deleted = [r.name for r in state.of_file(file) if f"itm_{r.name}" not in wanted]
    for name in deleted:
        if f"itm_{name}" in kernel:
            prologue.append(f"delete table inet itm_{name}")
    lost: list[str] = []
    for table in ruleset.tables:
        if table.name in kernel:
            commands, gone = _stale(table, kernel[table.name])
            prologue += commands
            lost += gone
    after = _ordered(records, file, state.without(set(deleted)))
    epilogue, rehooked = _rehook(after, {t.policy: t for t in ruleset.tables}, state, kernel)
    script = "".join(f"{line}\n" for line in prologue) + text.text + epilogue
    return Plan(script, len(prologue), after, tuple(deleted), tuple(lost), rehooked)


def _stale(table: Table, kernel: Running) -> tuple[list[str], list[str]]:
    """Commands that take away what a table no longer has or has in another form."""
    hooks = {chain.name: chain.hook for chain in table.chains}
    types = {s.name: s.types for s in table.sets}
    counters = {c.name for c in table.counters}
    kinds = {
        "chain": [n for n, hook in kernel.chains.items() if n not in hooks or hooks[n] != hook],
        "set": [n for n, kind in kernel.sets.items() if types.get(n) != kind],
        "counter": [n for n in kernel.counters if n not in counters],
    }
    commands = [
        f"delete {kind} inet {table.name} {name}" for kind, names in kinds.items() for name in names
    ]
    # Without their rules, nothing refers to them any more.
    empty = [f"flush table inet {table.name}"] if commands else []
    return empty + commands, kinds["set"]


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
    tables: Mapping[str, Table],
    before: State,
    kernel: Mapping[str, Running],
) -> tuple[str, tuple[str, ...]]:
    """Commands that renew base chains where the kernel would run policies in a wrong order.

    Of equal priorities the kernel runs the last-registered chain first. New chains
    are registered when the text is loaded, those that are kept stay behind them.
    """
    groups: dict[tuple[str, int], list[Record]] = {}
    for record in after.records:
        for place in record.hooks:
            groups.setdefault(place, []).append(record)
    previous = [r.name for r in before.records]
    commands: list[str] = []
    rehooked: dict[str, None] = {}
    for (hook, priority), members in groups.items():
        kept = [
            r.name
            for r in members
            if (found := kernel.get(f"itm_{r.name}")) is not None
            and found.chains.get(hook) == BaseHook(hook, priority)
        ]
        kept.sort(key=lambda name: previous.index(name) if name in previous else -1)
        new = [r.name for r in members if r.name not in kept]
        if [r.name for r in members] == new + kept:
            continue
        for record in reversed(members):
            table = f"itm_{record.name}"
            if record.name not in tables and table not in kernel:
                continue  # taken away by somebody; applying its file brings it back
            commands.append(f"flush chain inet {table} {hook}")
            commands.append(f"delete chain inet {table} {hook}")
            commands.append(record.base_chains[hook])
            rehooked[record.name] = None
    return "".join(f"{command}\n" for command in commands), tuple(rehooked)


def record(table: Table, file: str, shown: str, priority: int, applied: float) -> Record:
    """What the state keeps of a table."""
    hooks = tuple(
        (chain.hook.name, chain.hook.priority) for chain in table.base_chains if chain.hook
    )
    return Record(
        name=table.policy,
        file=file,
        shown=shown,
        hooks=hooks,
        priority=priority,
        classes=tuple(c.of for c in table.counters if c.kind == "class"),
        flows=_flows(table.sets, {c.of: c.name for c in table.counters if c.kind == "uncounted"}),
        base_chains=print_base_chains(table),
        applied=applied,
    )


def _flows(sets: Sequence[FlowSet], uncounted: Mapping[str, str]) -> tuple[FlowRecord, ...]:
    counting: dict[str, list[FlowSet]] = {}
    for flow_set in sets:
        if flow_set.role == "count":
            counting.setdefault(flow_set.flow, []).append(flow_set)
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
