"""What has to be said to nftables to get from what runs to what is wanted; pure.

Three things are held against each other, object by object: what is wanted, what was
loaded last, and what the kernel lists now. An object that was loaded as it is wanted
and that the kernel lists as it did then is kept. So nothing has to be guessed about
how nftables rewrites what it is given, and what somebody changed by hand is found.

Counts, learned sets and counters stay where they are as long as their form holds;
what must be made anew gets what can be carried over (`migrate`). Everything is one
transaction, in stages: what stands in the way goes, what is new is declared, sets
are filled, rules edited, base chains hung in, leftovers deleted.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import SequenceMatcher
from ipaddress import IPv4Address
from typing import Final

from itmlang.links import Link, rate_text
from itmlang.nft.model import Chain, Counter, FlowSet, Rule, Table, Tunnel, ValueSet
from itmlang.nft.text import Text, print_part, print_ruleset, rule_line
from itmlang.source import Span
from runtime.listing import Running, RunningChain, RunningSet, digest
from runtime.migrate import Left, Move
from runtime.state import State

# Beyond so many comparisons a changed chain is filled again as a whole.
_MOST_COMPARED: Final = 4_000_000
# A rule with a set in braces.
_ANONYMOUS: Final = re.compile(r"(?:^| )(?!@[\w.]+ )\S+ \{")
_ASKED: Final = re.compile(r"@([\w.]+)")

_BUCKETS: Final = "buckets start full"
_AGAIN: Final = {
    "control": "the file's value holds until its controller moves it again",
    "networks": "they are discovered again",
    "stay": "connections go by what is chosen now",
    "route": "packets go directly until the paths are probed again",
    "bucket": _BUCKETS,
    "limit": _BUCKETS,
    "recent": "flows over the rate are found again within a second",
    "connections": "connections are counted anew as their packets come",
    "busy": "connections are counted anew as their packets come",
}


@dataclass(frozen=True)
class Change:
    """What becomes of one object.

    `action` is "create", "keep", "migrate", "replace" or "delete"; `kind` "table",
    "chain", "set", "counter", "tunnel" (of the kernel's) or "link". `learned` says what becomes of what it learned: "kept",
    "carried", "lost", or "" where it learns nothing. `rules` are the rules that come
    ("+"), go ("-") or only point to another line ("~").
    """

    action: str
    kind: str
    table: str
    policy: str
    name: str
    note: str = ""
    learned: str = ""
    rules: tuple[tuple[str, str], ...] = ()

    @property
    def loss(self) -> str:
        """What is said of an object whose learned state is lost."""
        what = "goes, with what it learned" if self.action == "delete" else "starts again from zero"
        return f"{self.policy or self.table}: {self.name} {what}: {self.note}"


@dataclass
class Script:
    """Commands, each line with the policy's place behind it."""

    lines: list[str] = field(default_factory=list)
    spans: list[Span | None] = field(default_factory=list)

    def say(self, text: str, span: Span | None = None) -> None:
        self.lines.append(text)
        self.spans.append(span)

    def part(self, text: Text) -> None:
        self.lines += text.text.splitlines()
        self.spans += text.lines

    @property
    def text(self) -> str:
        return "".join(f"{line}\n" for line in self.lines)


@dataclass
class Leaving:
    """What goes, with what it learned: (table, set) and (table, counter)."""

    sets: list[tuple[str, FlowSet]] = field(default_factory=list)
    counters: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """`before` and `after` are the transaction; between them go the elements of `moves`.

    `counters` are (table, name) of new counters with those that they continue.
    """

    changes: tuple[Change, ...]
    before: Script
    after: Script
    moves: tuple[Move, ...]
    counters: tuple[tuple[tuple[str, str], tuple[str, str]], ...]
    state: State
    deleted: tuple[str, ...]  # names of policies
    touched: tuple[str, ...]  # tables
    leaving: Leaving
    resized: bool  # a set that stays gets another size or time-out
    was: Mapping[str, str]  # the touched tables as they are before: see `fingerprint`

    @property
    def empty(self) -> bool:
        """Is everything as it is wanted?"""
        beside = any(c.kind in ("tunnel", "link") and c.action != "keep" for c in self.changes)
        return not (self.before.lines or self.after.lines or beside)

    @property
    def digest(self) -> str:
        """The same for the same changes to the same kernel, whatever was counted meanwhile."""
        told = json.dumps([asdict(c) for c in self.changes if c.action != "keep"])
        return digest((told, self.before.text, self.after.text))

    @property
    def lost(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.learned == "lost")


def plan(
    wanted: State,
    before: State,
    kernel: Mapping[str, Running],
    scope: Collection[str] | None = None,
    kept: Left | None = None,
    *,
    crooked: Mapping[str, Sequence[str]] = {},
) -> Plan:
    """The transaction from what runs to what is wanted.

    `kernel` holds our tables that exist, by their paths. `scope` are the tables to be made right,
    None for all; of others only the order at their hooks is. `kept` is what the wanted
    generation had learned when it was left. `crooked` says of links what somebody else changed.
    """
    return _Planning(wanted, before, kernel, scope, kept or Left(), crooked).done()


class _Planning:
    def __init__(
        self,
        wanted: State,
        before: State,
        kernel: Mapping[str, Running],
        scope: Collection[str] | None,
        kept: Left,
        crooked: Mapping[str, Sequence[str]],
    ) -> None:
        self.wanted, self.before, self.kernel, self.kept = wanted, before, kernel, kept
        self.crooked = crooked
        self.clear, self.declare = Script(), Script()
        self.edit, self.hang, self.tidy = Script(), Script(), Script()
        self.changes: list[Change] = []
        self.moves: list[Move] = []
        self.counters: list[tuple[tuple[str, str], tuple[str, str]]] = []
        self.touched: dict[str, None] = {}
        self.tables = {table.path: table for table in wanted.tables}
        self.written = {table.path: table for table in before.tables}
        # Counters that are there, and among them those of the state, by what they count.
        self.counting = {path: set(running.counters) for path, running in kernel.items()}
        self.counted = {
            (one.policy, one.kind, one.of): (path, one.name)
            for path, table in reversed(self.written.items())
            for one in table.counters
            if one.name in self.counting.get(path, ())
        }
        known = {*self.tables, *self.written}
        self.scope = known if scope is None else known & set(scope)
        self.on = {entry.name for entry in wanted.policies if entry.on}
        self.hanging: list[tuple[str, Table, Chain]] = []  # base chains, in the order they come
        self.renewed: set[tuple[str, str]] = set()  # those of them that are there
        self.leaving = Leaving()
        self.resized = False

    def done(self) -> Plan:
        fresh = self._fresh()
        self._order()
        for path in [p for p in self.written if p in self.scope and p not in self.tables]:
            self._delete_table(self.written[path])
        plannings = [
            _TablePlanning(self, table) for path, table in self.tables.items() if path in self.scope
        ]
        for planning in plannings:
            planning.work()
        for planning in plannings:  # now it is known what goes on elsewhere
            planning.forget()
        self._tunnels()
        self._links()
        self._hang()
        before, after = self.clear, Script()
        if fresh is not None:
            before.part(fresh)
        else:
            for stage, into in (
                (self.declare, before), (self.edit, after), (self.hang, after), (self.tidy, after),
            ):  # fmt: skip
                into.lines += stage.lines
                into.spans += stage.spans
        return Plan(
            changes=tuple(self.changes),
            before=before,
            after=after,
            moves=tuple(self.moves),
            counters=tuple(self.counters),
            state=self.wanted,
            deleted=tuple(n for n in self.before.names if n not in self.wanted.names),
            touched=tuple(self.touched),
            leaving=self.leaving,
            resized=self.resized,
            was={path: fingerprint(self.kernel.get(path)) for path in self.touched},
        )

    def _fresh(self) -> Text | None:
        """The whole text of the only unit, where nothing of it is there yet."""
        if len(self.wanted.units) != 1 or self.kernel or self.before.units or self.kept.counters:
            return None
        if len(self.on) != len(self.wanted.policies):
            return None
        return print_ruleset(self.wanted.units[0].ruleset)

    def _delete_table(self, table: Table) -> None:
        path = table.path
        if path not in self.kernel:
            return
        self.touched[path] = None
        there = self.kernel[path]
        self.leaving.sets += [(path, one) for one in table.sets if one.name in there.sets]
        self.leaving.counters += [
            (path, one.name) for one in table.counters if one.name in self.counting[path]
        ]
        self.clear.say(f"delete table {path}")
        staying = [name for name in table.policies if name in self.wanted.names]
        note = f"{', '.join(staying)} moved to another table" if staying else "no longer wanted"
        learned = "" if staying else "lost"
        policy = table.policies[0]
        self.changes.append(Change("delete", "table", path, policy, table.name, note, learned))

    def _tunnels(self) -> None:
        """What becomes of the tunnels; `runtime.steering` does it."""
        wanted, before = (
            {
                (t.policy, t.name): (path, t)
                for path, table in tables.items()
                if path in self.scope
                for t in table.tunnels
            }
            for tables in (self.tables, self.written)
        )
        for key in dict.fromkeys([*before, *wanted]):
            path, tunnel = wanted.get(key) or before[key]
            action, note = "keep", _way(tunnel)
            if key not in wanted:
                action = "delete"
            elif key not in before:
                action = "create"
            elif _way(before[key][1]) != note:
                action, note = "replace", f"{_way(before[key][1])} -> {note}"
            self.changes.append(Change(action, "tunnel", path, *key, note))

    def _links(self) -> None:
        """What becomes of the links; `runtime.steering` does it, too."""
        wanted = {link.name: link for link in self.wanted.active_links}
        before = {link.name: link for link in self.before.active_links}
        own = {
            link.name
            for state in (self.wanted, self.before)
            for unit in state.units
            if not unit.policies or any(t.path in self.scope for t in unit.ruleset.tables)
            for link in unit.links
        }
        for name in dict.fromkeys([*before, *wanted]):
            told = shape(wanted.get(name) or before[name])
            action, note = "keep", told
            if name not in wanted:
                action = "delete"
            elif name not in before:
                action = "create"
            elif shape(before[name]) != told:
                action, note = "replace", f"{shape(before[name])} -> {told}"
            elif self.crooked.get(name):
                action, note = "replace", "; ".join(self.crooked[name])
            if action != "keep" or name in own:
                self.changes.append(Change(action, "link", "", name, name, note))

    # Base chains, which run in an order.

    def _order(self) -> None:
        """Find what must be hung in: what is new, and what the kernel would run in a wrong order.

        Of equal priorities the kernel runs the last-registered chain first. New chains
        come before those that are kept.
        """
        for members in self._by_hook().values():
            kept = [(n, t, c) for n, t, c in members if self._hangs(t, c)]
            previous = self.before.names
            known = len(members) == 1 or all(name in previous for name, _, _ in kept)
            if known:
                kept.sort(key=lambda m: previous.index(m[0]) if m[0] in previous else -1)
            new = [member for member in members if member not in kept]
            in_order = known and members == new + kept
            renewed = [] if in_order else kept
            self.renewed |= {(table.path, chain.name) for _, table, chain in renewed}
            self.hanging += [m for m in reversed(members) if m in new or m in renewed]

    def _hang(self) -> None:
        for name, table, chain in self.hanging:
            if (table.path, chain.name) in self.renewed and table.path not in self.scope:
                self.unhook(table.path, name, chain.name, "hung in again, for the order")
            self.touched[table.path] = None
            self.hang.part(print_part(table, chains=[chain]))

    def _by_hook(self) -> dict[tuple[str, int], list[tuple[str, Table, Chain]]]:
        """The base chains of the policies that are on, by hook and priority, in order."""
        groups: dict[tuple[str, int], list[tuple[str, Table, Chain]]] = {}
        for name in (name for name in self.wanted.names if name in self.on):
            table = self.wanted.table_of(name)
            if table.path not in self.scope and table.path not in self.kernel:
                continue  # taken away by somebody; applying its file brings it back
            # Where packets come back from Python stands behind the policy.
            for chain in sorted(table.base_chains, key=lambda c: c.role == "settle"):
                if chain.policy == name and chain.hook is not None:
                    key = chain.hook.name, chain.hook.priority
                    groups.setdefault(key, []).append((name, table, chain))
        return groups

    def stays(self, table: Table, chain: Chain) -> bool:
        """Is the base chain where it should be, and may it stay there?"""
        return self._hangs(table, chain) and (table.path, chain.name) not in self.renewed

    def _hangs(self, table: Table, chain: Chain) -> bool:
        found = self.kernel.get(table.path)
        running = found.chains.get(chain.name) if found is not None else None
        return running is not None and running.hook == chain.hook and not running.drops

    def unhook(self, path: str, policy: str, chain: str, note: str) -> None:
        """Take a base chain away that is hung in again later; nothing jumps to one."""
        self.clear.say(f"flush chain {path} {chain}")
        self.clear.say(f"delete chain {path} {chain}")
        self.changes.append(Change("replace", "chain", path, policy, chain, note))


class _TablePlanning:
    """The plan for one table that is wanted."""

    def __init__(self, whole: _Planning, table: Table) -> None:
        self.whole, self.table, self.path = whole, table, table.path
        self.running = whole.kernel.get(table.path, Running({}, {}, (), {}))
        self.exists = table.path in whole.kernel
        self.written = whole.written.get(table.path)
        self.listed = whole.before.listed.get(table.path, {})
        self.chains = {
            c.name: c for c in table.chains if c.hook is None or c.policy in whole.on
        }  # fmt: skip
        old = self.written
        self.old_chains = {c.name: c for c in old.chains} if old else {}
        self.old_sets = {s.name: s for s in old.sets} if old else {}
        self.old_values = {v.name: v for v in old.values} if old else {}
        self.old_counters = {c.name: c for c in old.counters} if old else {}
        self.drifted = {
            name
            for name, chain in self.running.chains.items()
            if self.listed.get(name) != chain.digest
        }
        # What new elements hold is as written only where the rules are.
        self.as_written = self.exists and not self.drifted
        self.gone: set[str] = set()  # sets that are deleted and made again

    def work(self) -> None:
        begun = self._lines()
        if not self.exists:
            self._change("create", "table", self.table.policies[0], self.table.name)
        elif self.running.flags:
            self._change(
                "replace", "table", self.table.policies[0], self.table.name,
                f"something else made it {self.running.flags}",
            )  # fmt: skip
            self.whole.clear.say(f"add table {self.path}")
        counters = [c for c in self.table.counters if self._counter(c)]
        values = [v for v in self.table.values if self._value_set(v)]
        # Counts first: what becomes of the other sets follows from them.
        in_turn = sorted(self.table.sets, key=lambda s: s.role != "count")
        declared = {s.name for s in in_turn if self._flow_set(s)}
        sets = [s for s in self.table.sets if s.name in declared]
        new, edits = self._chains()
        self._leftover_chains()
        self.whole.leaving.sets += [
            (self.path, one) for name, one in self.old_sets.items() if name in self.gone
        ]
        for name in sorted(self.gone):
            self.whole.clear.say(f"delete {self.running.sets[name].kind} {self.path} {name}")
        if counters or values or sets or new or not self.exists:
            self.whole.declare.part(
                print_part(
                    self.table,
                    counters=counters,
                    values=values,
                    sets=sets,
                    chains=[Chain(c.name, c.span, c.policy) for c in new],
                )
            )
        for edit in edits:
            self._edit(edit)
        if self._lines() != begun:
            # A map's elements would hold on to chains that go. Its controller writes them again.
            kept = {one.name for one in self.table.values}
            for name, running in self.running.sets.items():
                if running.kind == "map" and name not in kept:
                    self.whole.clear.say(f"flush map {self.path} {name}")
            self.whole.touched[self.path] = None

    def _lines(self) -> int:
        stages = (self.whole.clear, self.whole.declare, self.whole.edit, self.whole.tidy)
        return sum(len(stage.lines) for stage in stages)

    def _change(
        self,
        action: str,
        kind: str,
        policy: str,
        name: str,
        note: str = "",
        learned: str = "",
        rules: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.whole.changes.append(
            Change(action, kind, self.path, policy, name, note, learned, tuple(rules))
        )

    # Counters.

    def _counter(self, one: Counter) -> bool:
        """Must the counter be declared?"""
        if one.name in self.whole.counting.get(self.path, ()):
            self._change("keep", "counter", one.policy, one.name, learned="kept")
            return False
        source = self._counter_elsewhere(one)
        if source is None:
            self._change("create", "counter", one.policy, one.name)
            return True
        self.whole.counters.append(((self.path, one.name), source))
        note = f"continues {' '.join(source)}"
        self._change("migrate", "counter", one.policy, one.name, note, "carried")
        return False

    def _counter_elsewhere(self, one: Counter) -> tuple[str, str] | None:
        """The same counter of the policy, as it was kept or where it is in another table."""
        if (self.path, one.name) in self.whole.kept.counters:
            return self.path, one.name
        return self.whole.counted.get((one.policy, one.kind, one.of))

    # Sets.

    def _value_set(self, one: ValueSet) -> bool:
        """Must the set's elements be said (again)?"""
        policy = self.table.policies[0] if not self.table.shared else ""
        running = self.running.sets.get(one.name)
        said = self.old_values.get(one.name)
        count = f"{len(one.elements)} elements"
        if running is None:
            self._change("create", one.kind, policy, one.name, count)
            return True
        if (
            (running.kind, running.types) != (one.kind, (one.type,))
            or running.flags != ({"interval"} if one.interval else set())
        ):  # fmt: skip
            self.gone.add(one.name)
            self._change("replace", one.kind, policy, one.name, f"of another type; {count}")
            return True
        listed = self.running.values.get(one.name)
        sound = self.listed.get(one.name) == listed
        if sound and said is not None and said.entries == one.entries:
            self._change("keep", one.kind, policy, one.name, count)
            return False
        if not one.verdicts:  # a map is emptied where its elements are said
            self.whole.declare.say(f"flush set {self.path} {one.name}", one.span)
        self._change("replace", one.kind, policy, one.name, _elements_note(one, said, sound))
        return True

    def _flow_set(self, one: FlowSet) -> bool:
        """Must the set be declared?"""
        running = self.running.sets.get(one.name)
        if running is None:
            self._fill(one, "create", "", emptied=False)
            return True
        said = self.old_sets.get(one.name)
        other = _other_form(one, running)
        in_place = (running.size, running.timeout) != (one.size, one.timeout)
        if (
            other
            or running.size > one.size
            or (in_place and said is not None and _sized(said) == _sized(one))
        ):
            # Below what it holds a size limits nothing (the kernel asks whether it is equal);
            # or the kernel did not take the new one where the set is.
            self.gone.add(one.name)
            self._fill(one, "replace", other or _sizes(one, running), emptied=False)
            return True
        self.whole.resized |= in_place
        if not self._holds(one, said, running):
            self._fill(one, "replace", _moved(one, said), emptied=True)
            return in_place
        if in_place:
            note = _sizes(one, running)
            self._change("migrate", "set", one.policy, one.name, note, "kept")
            return True
        self._change("keep", "set", one.policy, one.name, learned="kept")
        return False

    def _holds(self, one: FlowSet, said: FlowSet | None, running: RunningSet) -> bool:
        """Do the set's elements say what they should?"""
        if one.role in ("count", "learned") or one.written:
            return True
        if one.role == "young":
            return running.timeout == one.timeout  # the age itself
        if said is None or not self.as_written or self._moved(one):
            return False
        return (said.statement, said.threshold, said.attribute) == (
            one.statement, one.threshold, one.attribute,
        )  # fmt: skip

    def _moved(self, one: FlowSet) -> bool:
        """Had the policy a controller that may have moved the threshold, and has it none now?"""
        old, new = (
            any(s.role == "control" and s.policy == one.policy for s in sets)
            for sets in (self.old_sets.values(), self.table.sets)
        )
        return old and not new

    def _fill(self, one: FlowSet, action: str, note: str, *, emptied: bool) -> None:
        """How the set gets what it should hold; without a way, it begins empty."""
        move, how, known = self._move(one, emptied)
        if move is not None and any(one.size < source.size for _, source in move.sources):
            how += f", as many as find room ({one.size})"
        parts = [part for part in (note, how) if part]
        if move is not None:
            self.whole.moves.append(move)
            self._change("migrate", "set", one.policy, one.name, "; ".join(parts), "carried")
        else:
            learned = "lost" if known else ""
            self._change(action, "set", one.policy, one.name, "; ".join(parts), learned)
        if emptied:
            self.whole.declare.say(f"flush set {self.path} {one.name}", one.span)

    def _move(self, one: FlowSet, emptied: bool) -> tuple[Move | None, str, bool]:
        """The move that fills a set, in words; without one, whether something is lost."""
        if one.role in ("count", "learned") and self._kept(one):
            return Move(self.path, one, "copy", ((self.path, one),)), "as it was kept", True
        if one.role == "count":
            return self._summed(one)
        if one.role == "learned":
            found = [
                (path, other)
                for path, other in self._elsewhere("learned")
                if (other.flow, other.family) == (one.flow, one.family)
            ]
            if any(other.types == one.types for _, other in found):
                same = tuple((p, o) for p, o in found if o.types == one.types)[:1]
                return Move(self.path, one, "copy", same), "its elements are carried over", True
            return None, "values of another type are forgotten" if found else "", bool(found)
        if one.role in _AGAIN:
            there = emptied or one.name in self.running.sets
            return None, _AGAIN[one.role] if there else "", False
        counts = self._counts(one)
        if counts is None or not self._counted(counts):
            return None, "", False
        if one.role == "young":
            young = [
                (path, other)
                for path, other in self._elsewhere("young")
                if (other.policy, other.flow, other.family, other.key)
                == (one.policy, one.flow, one.family, one.key)
            ]
            if young:
                return Move(self.path, one, "age", tuple(young[:1])), "ages go on", True
            move = Move(self.path, one, "begin", ((self.path, counts),))
            return move, "ages begin now: they were not measured before", True
        how = "over" if one.role == "over" else "budget"
        move = Move(self.path, one, how, ((self.path, counts),), emptied)
        return move, f"reckoned from {counts.name}", True

    def _summed(self, one: FlowSet) -> tuple[Move | None, str, bool]:
        """Counts by another key, or in another table."""
        found = [
            (path, other)
            for path, other in self._elsewhere("count")
            if (other.policy, other.flow) == (one.policy, one.flow)
        ]
        if not found:
            return None, "", False
        fitting = tuple(
            (path, other)
            for path, other in found
            if set(one.key) <= set(other.key) and one.family in (0, other.family)
        )
        if not fitting:
            new = sorted(set(one.key) - {name for _, other in found for name in other.key})
            why = f"nobody counted by {', '.join(new)} before" if new else "of another family"
            return None, why, True
        coarser = any(len(other.key) > len(one.key) for _, other in fitting)
        how = f"summed by {', '.join(one.key)}" if coarser else "its counts are carried over"
        how += ", but for packets that come meanwhile"
        return Move(self.path, one, "sum", fitting), how, True

    def _kept(self, one: FlowSet) -> bool:
        """Is there what this very set held when the wanted generation was left?"""
        kept = self.whole.kept.sets.get((self.path, one.name))
        return kept is not None and kept.key == one.key

    def _elsewhere(self, role: str) -> Iterator[tuple[str, FlowSet]]:
        """The sets with a role that were loaded and are there: in this table first."""
        paths = [self.path, *(path for path in self.whole.written if path != self.path)]
        for path in paths:
            table, there = self.whole.written.get(path), self.whole.kernel.get(path)
            for one in table.sets if table is not None and there is not None else ():
                if one.role == role and there is not None and one.name in there.sets:
                    yield path, one

    def _counts(self, one: FlowSet) -> FlowSet | None:
        """The set of counts from which a set of the same flow follows."""
        return next(
            (
                other
                for other in self.table.sets
                if other.role == "count"
                and (other.policy, other.flow, other.family) == (one.policy, one.flow, one.family)
            ),
            None,
        )

    def _counted(self, counts: FlowSet) -> bool:
        """Will there be counts?"""
        moved = any(
            move.target.name == counts.name and move.table == self.path for move in self.whole.moves
        )
        return moved or (counts.name in self.running.sets and counts.name not in self.gone)

    # Chains.

    def _chains(self) -> tuple[list[Chain], list[Chain]]:
        """New chains, and those whose rules must be edited; what must be empty is emptied."""
        new, edits = [], []
        for chain in self.chains.values():
            running = self._there(chain)
            if running is None and chain.name in self.running.chains:
                note = "something else hung it in"
                self.whole.unhook(self.path, chain.policy, chain.name, note)
            if chain.hook is not None and not self.whole.stays(self.table, chain):
                if running is not None:
                    moved = running.hook != chain.hook or running.drops
                    why = "its hook is another" if moved else "hung in again, for the order"
                    self.whole.unhook(self.path, chain.policy, chain.name, why)
                else:
                    self._create(chain)
                continue  # `_hang` does that
            if running is None:
                new.append(chain)
                edits.append(chain)
                self._create(chain)
            elif chain.name in self.drifted or self._asks_gone(running):
                self.whole.clear.say(f"flush chain {self.path} {chain.name}")
                edits.append(chain)
                note = "it asks a set that is made again"
                if chain.name in self.drifted:
                    known = chain.name in self.listed
                    note = "something else changed it" if known else "nobody knows what it held"
                rules = [("-", rule) for rule in running.rules] + [
                    ("+", rule_line(rule)) for rule in chain.rules
                ]
                self._change("replace", "chain", chain.policy, chain.name, note, rules=rules)
            else:
                edits.append(chain)
        return new, edits

    def _there(self, chain: Chain) -> RunningChain | None:
        """The chain as it is, unless something else made it a base chain: it must go first."""
        running = self.running.chains.get(chain.name)
        if running is not None and chain.hook is None and running.hook is not None:
            return None
        return running

    def _create(self, chain: Chain) -> None:
        rules = [("+", rule_line(rule)) for rule in chain.rules]
        note = _many(chain.rules)
        self._change("create", "chain", chain.policy, chain.name, note, rules=rules)

    def _asks_gone(self, running: RunningChain) -> bool:
        return bool(self.gone) and any(
            name in self.gone for rule in running.rules for name in _ASKED.findall(rule)
        )

    def _edit(self, chain: Chain) -> None:
        running = self._there(chain)
        if running is None or chain.name in self.drifted or self._asks_gone(running):
            self.whole.edit.part(print_part(self.table, chains=[_without_hook(chain)]))
            return
        said = self.old_chains.get(chain.name)
        old = said.rules if said else []
        # What was taken as it was loaded has the very same rules.
        if old == chain.rules or [*map(rule_line, old)] == [*map(rule_line, chain.rules)]:
            self._change("keep", "chain", chain.policy, chain.name, _many(chain.rules))
            return
        edits = rule_edits(old, chain.rules)
        told = edits.told if edits is not None else ()
        note = _many(chain.rules)
        if edits is None or not edits.in_place or len(old) != len(running.handles):
            self.whole.clear.say(f"flush chain {self.path} {chain.name}")
            self.whole.edit.part(print_part(self.table, chains=[_without_hook(chain)]))
            if edits is None:
                note = f"{_many(old)} make room for {note}"
            self._change("replace", "chain", chain.policy, chain.name, note, rules=told)
            return
        at = f"{self.path} {chain.name}"
        for place, rule in edits.replaced:
            which = f"rule {at} handle {running.handles[place]}"
            self.whole.edit.say(f"replace {which} {rule_line(rule)}", rule.span)
        for place in edits.deleted:
            self.whole.edit.say(f"delete rule {at} handle {running.handles[place]}")
        for rule in edits.added:
            self.whole.edit.say(f"add rule {at} {rule_line(rule)}", rule.span)
        self._change("replace", "chain", chain.policy, chain.name, note, rules=told)

    def _leftover_chains(self) -> None:
        """Chains that the kernel has and nobody wants any more."""
        tidy = self.whole.tidy
        chains = [name for name in self.running.chains if name not in self.chains]
        for name in chains:
            self.whole.clear.say(f"flush chain {self.path} {name}")
        for name in chains:
            base = self.running.chains[name].hook is not None
            (self.whole.clear if base else tidy).say(f"delete chain {self.path} {name}")
            said = self.old_chains.get(name)
            off = base and said is not None and said.policy in self.whole.wanted.names
            off = off and said is not None and said.policy not in self.whole.on
            note = "" if said else "something else made it"
            note = "its policy is off" if off else note
            self._change("delete", "chain", said.policy if said else "", name, note)

    def forget(self) -> None:
        """Sets and counters that the kernel has and nobody wants any more."""
        begun, tidy = self._lines(), self.whole.tidy
        wanted = {s.name for s in self.table.sets} | {v.name for v in self.table.values}
        going = [name for name in self.running.sets if name not in wanted]
        for name in sorted(going, key=lambda n: self.running.sets[n].kind != "map"):
            tidy.say(f"delete {self.running.sets[name].kind} {self.path} {name}")
            said_set = self.old_sets.get(name)
            if said_set is not None:
                self.whole.leaving.sets.append((self.path, said_set))
            self._change(
                "delete", self.running.sets[name].kind, said_set.policy if said_set else "", name,
                *self._forgotten(said_set),
            )  # fmt: skip
        counters = {c.name for c in self.table.counters}
        for name in [name for name in self.running.counters if name not in counters]:
            tidy.say(f"delete counter {self.path} {name}")
            self.whole.leaving.counters.append((self.path, name))
            said_counter = self.old_counters.get(name)
            self._change(
                "delete", "counter", said_counter.policy if said_counter else "", name,
                *self._counted_on(name),
            )  # fmt: skip
        # Maps first: they may refer to the others.
        for kind, name in sorted(self.running.others, key=lambda o: (o[0] != "map", o)):
            tidy.say(f"delete {kind} {self.path} {name}")
            self._change("delete", kind, "", name, "something else made it")
        if self._lines() != begun:
            self.whole.touched[self.path] = None

    def _counted_on(self, name: str) -> tuple[str, str]:
        """What is said of a counter that goes."""
        used = any(source == (self.path, name) for _, source in self.whole.counters)
        if used:
            return "its count is carried over", "carried"
        said = self.old_counters.get(name)
        if said is None or said.kind != "class" or said.policy not in self.whole.wanted.names:
            return "", ""
        return f"there is no class {said.of} any more", "lost"

    def _forgotten(self, one: FlowSet | None) -> tuple[str, str]:
        """What is said of a set that goes."""
        if one is None or one.role not in ("count", "learned"):
            return "", ""
        used = any(path == self.path and source.name == one.name for path, source in self._used())
        if used:
            return "its counts are carried over", "carried"
        if one.policy and one.policy not in self.whole.wanted.names:
            return "", ""
        return "no longer wanted", "lost"

    def _used(self) -> Iterator[tuple[str, FlowSet]]:
        for move in self.whole.moves:
            yield from move.sources


# Rules.


@dataclass(frozen=True)
class Edits:
    """How a chain's rules become others; places are those of the old rules.

    `added` come behind all that are there.
    """

    inserted: tuple[tuple[int, Rule], ...]  # before this place, in this order
    replaced: tuple[tuple[int, Rule], ...]
    deleted: tuple[int, ...]
    added: tuple[Rule, ...]
    told: tuple[tuple[str, str], ...]

    @property
    def in_place(self) -> bool:
        """Can libnftables 1.0.6 edit the chain?

        For a rule to come before another one, it reads all rules of the machine, anybody's,
        and crashes at some; and it aborts where one with ranges in braces comes by `replace`.
        """
        return not self.inserted and not any(_ANONYMOUS.search(r.text) for _, r in self.replaced)


def rule_edits(old: Sequence[Rule], new: Sequence[Rule]) -> Edits | None:
    """The edits from one list of rules to another; None if there is too much to compare.

    Rules that are the same but for their comments keep their places.
    """
    begin, end = 0, 0
    shortest = min(len(old), len(new))
    while begin < shortest and old[begin].text == new[begin].text:
        begin += 1
    while end < shortest - begin and old[-1 - end].text == new[-1 - end].text:
        end += 1
    middle_old = [rule.text for rule in old[begin : len(old) - end]]
    middle_new = [rule.text for rule in new[begin : len(new) - end]]
    if len(middle_old) * len(middle_new) > _MOST_COMPARED:
        return None
    matcher = SequenceMatcher(None, middle_old, middle_new, autojunk=False)
    steps = [("equal", 0, begin, 0, begin)] if begin else []
    steps += [
        (tag, a + begin, b + begin, c + begin, d + begin)
        for tag, a, b, c, d in matcher.get_opcodes()
    ]
    if end:
        steps.append(("equal", len(old) - end, len(old), len(new) - end, len(new)))
    inserted: list[tuple[int, Rule]] = []
    replaced: list[tuple[int, Rule]] = []
    deleted: list[int] = []
    told: list[tuple[str, str]] = []
    for tag, a, b, c, d in steps:
        pairs = list(zip(range(a, b), range(c, d), strict=False))
        for place, index in pairs:
            if tag == "equal" and rule_line(old[place]) != rule_line(new[index]):
                replaced.append((place, new[index]))
                told.append(("~", rule_line(new[index])))
            elif tag != "equal":
                replaced.append((place, new[index]))
                told += [("-", rule_line(old[place])), ("+", rule_line(new[index]))]
        for place in range(a + len(pairs), b):
            deleted.append(place)
            told.append(("-", rule_line(old[place])))
        for index in range(c + len(pairs), d):
            inserted.append((b, new[index]))
            told.append(("+", rule_line(new[index])))
    added = tuple(rule for place, rule in inserted if place == len(old))
    inserted = inserted[: len(inserted) - len(added)]
    return Edits(tuple(inserted), tuple(replaced), tuple(deleted), added, tuple(told))


def _without_hook(chain: Chain) -> Chain:
    return Chain(chain.name, chain.span, chain.policy, None, chain.rules)


# In words.


def _many(rules: Sequence[Rule]) -> str:
    return "1 rule" if len(rules) == 1 else f"{len(rules)} rules"


def _elements_note(one: ValueSet, said: ValueSet | None, sound: bool) -> str:
    if said is None or not sound:
        return f"something else changed it; {len(one.elements)} elements"
    old, new = set(said.entries), set(one.entries)
    return f"{len(new - old)} elements come, {len(old - new)} go"


def shape(link: Link) -> str:
    """All that is asked of a link, in words."""
    classes = []
    for one in link.classes:
        parts = [f"{one.name} priority {one.priority}"]
        parts += [f"at least {rate_text(one.least)}"] if one.least else []
        parts += [f"at most {rate_text(one.most)}"] if one.most < link.rate else []
        parts += [f"queue {one.queue}"] if one.queue else []
        parts += [f"inner {one.inner}"] if one.inner else []
        parts += [f"dscp {', '.join(map(str, one.dscp))}"] if one.dscp else []
        parts += ["otherwise"] if one.number == link.otherwise else []
        classes.append(" ".join(parts))
    at = f"{link.interface}{' ingress' if link.ingress else ''}"
    return f"{at} {rate_text(link.rate)}: {'; '.join(classes)}"


def _other_form(one: FlowSet, running: RunningSet) -> str:
    """Why a set cannot stay what it is, "" if it can."""
    if running.types != one.types:
        return "another key"
    if running.kind != ("map" if one.is_map else "set"):
        return "of another kind"
    dynamic = one.written or "dynamic" in running.flags
    if ("timeout" in running.flags) != one.timed or not dynamic:
        return "other flags"
    if (running.timeout is None) != (one.timeout is None):
        # Its elements could never get a time, or lose theirs.
        return "with a time-out now" if one.timeout is not None else "without a time-out now"
    return ""


def _sized(one: FlowSet) -> tuple[int, int | None]:
    return one.size, one.timeout


def _sizes(one: FlowSet, running: RunningSet) -> str:
    parts = []
    if one.size != running.size:
        parts.append(f"size {running.size} becomes {one.size}")
    if one.timeout != running.timeout:
        parts.append(f"time-out {running.timeout} ms becomes {one.timeout} ms")
    return ", ".join(parts)


def _moved(one: FlowSet, said: FlowSet | None) -> str:
    if said is None or said.threshold == one.threshold:
        return ""
    return f"threshold {said.threshold} becomes {one.threshold}"


def fingerprint(running: Running | None) -> str:
    """A table's form in short, "" for one that is not there."""
    if running is None:
        return ""
    sets = sorted(
        f"{name} {one.size} {one.timeout} {one.types}" for name, one in running.sets.items()
    )
    seen = sorted(f"{name} {one}" for name, one in listed(running).items())
    others = sorted(f"{kind} {name}" for kind, name in running.others)
    return digest((*seen, *sets, *sorted(running.counters), *others, running.flags))


def _way(tunnel: Tunnel) -> str:
    """Where a tunnel leads, in words."""
    number = f"number {tunnel.number}"
    if not tunnel.inward:
        source = f" from {IPv4Address(tunnel.source)}" if tunnel.source else ""
        return f"to {IPv4Address(tunnel.destination)}{source}, {number}"
    sources = [f"{IPv4Address(address)}/{length}" for address, length in tunnel.sources]
    ends = [str(IPv4Address(address)) for address in tunnel.destinations]
    links = f" at {', '.join(tunnel.devices)}" if tunnel.devices else ""
    return f"from {', '.join(sources) or 'anywhere'} to {', '.join(ends)}{links}, {number}"


def listed(running: Running) -> dict[str, str]:
    """What the state keeps of how a table is listed."""
    return {
        **{name: chain.digest for name, chain in running.chains.items()},
        **running.values,
    }


def drift(table: Table, running: Running, seen: Mapping[str, str], on: Iterable[str]) -> list[str]:
    """What somebody else changed of a table, in words."""
    wanted = {c.name for c in table.chains if c.hook is None or c.policy in set(on)}
    now = listed(running)
    found = [f"chain {name} is gone" for name in sorted(wanted - set(running.chains))]
    found += [
        f"{'chain' if name in running.chains else running.sets[name].kind} {name} was "
        + ("changed" if name in seen else "added")
        for name in sorted(now)
        if now[name] != seen.get(name)
    ]
    known = {s.name for s in table.sets} | {v.name for v in table.values}
    maps = {v.name for v in table.values if v.verdicts}
    found += [
        f"{'map' if name in maps else 'set'} {name} is gone"
        for name in sorted(known - set(running.sets))
    ]
    found += [
        f"{running.sets[name].kind} {name} was added"
        for name in sorted(set(running.sets) - known - set(now))
    ]
    found += [
        f"set {one.name} was changed"
        for one in table.sets
        if (there := running.sets.get(one.name)) is not None
        and (_other_form(one, there) or (there.size, there.timeout) != _sized(one))
    ]
    counters = {c.name for c in table.counters}
    found += [f"counter {name} is gone" for name in sorted(counters - set(running.counters))]
    found += [f"counter {name} was added" for name in sorted(set(running.counters) - counters)]
    found += [f"{kind} {name} was added" for kind, name in sorted(running.others)]
    if running.flags:
        found.append(f"the table was made {running.flags}")
    return found
