"""What a policy file brings: a unit, with all that is needed to load it again.

A unit has the texts it was compiled from and the ruleset they gave, so that a
generation can be loaded years later, whatever became of the files, and a file that
did not change needs no second compilation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itmlang import __version__
from itmlang.control import Controller, Measure, Timer
from itmlang.links import Link, LinkClass
from itmlang.nft.model import (
    BaseHook,
    Chain,
    Counter,
    FlowSet,
    Queue,
    Rule,
    Ruleset,
    Table,
    Tunnel,
    ValueSet,
)
from itmlang.overlays import Destination, Neighbor, Overlay
from itmlang.source import Reader, Source, Span, UnreadableError

if TYPE_CHECKING:  # what is only loaded again needs no compiler
    from itmlang.pipeline import Compiled


@dataclass(frozen=True)
class Read:
    """A file that another one names: who named it, and what it held.

    `library` tells whether the policy library was searched, too.
    """

    path: str
    by: str
    library: bool
    source: Source


@dataclass(frozen=True)
class Loaded:
    """A policy of a unit: its priority, its parameters' values, as text."""

    name: str
    priority: int
    parameters: Mapping[str, str]
    span: Span


@dataclass(frozen=True)
class Unit:
    """A policy file as it was or is to be loaded.

    `file` is its absolute path, or "-" for standard input; `given` are parameters that
    were set by hand, by policy. `compiler` is the version that made the ruleset.
    """

    file: str
    source: Source
    reads: tuple[Read, ...]
    policies: tuple[Loaded, ...]
    ruleset: Ruleset
    given: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    warned: bool = False  # the compiler had something to say
    compiler: str = ""
    removed: tuple[str, ...] = ()  # policies of the file that were taken away
    program: str = ""  # that brought it and serves its queues, see `runtime.app`; "" for a file
    optimised: bool = True  # the compiler's passes were done, see `itmlang.dispatch`

    @property
    def shown(self) -> str:
        """The file's name as the user gave it."""
        return self.source.name

    @property
    def beside(self) -> Path | None:
        """The folder where functions of the user's are looked for first."""
        return None if self.file == "-" else Path(self.file).parent

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(policy.name for policy in self.policies)

    @property
    def made_of(self) -> tuple[object, ...]:
        """All that the ruleset follows from; equal for units that are the same."""
        reads = [(r.path, r.by, r.library, r.source.name, r.source.text) for r in self.reads]
        made = self.source.name, self.source.text, reads, self.given, self.compiler, self.removed
        return (*made, self.optimised)

    def with_ruleset(self, ruleset: Ruleset) -> "Unit":
        """The unit with its ruleset in the form that a machine needs."""
        return replace(self, ruleset=ruleset)

    @property
    def links(self) -> tuple[Link, ...]:
        return self.ruleset.links

    @property
    def link_names(self) -> tuple[str, ...]:
        return tuple(link.name for link in self.links)

    def without(self, names: set[str]) -> "Unit":
        """The unit without some of its policies and links; what the others share stays.

        Links go with the last policy.
        """
        links = tuple(link for link in self.links if link.name not in names)
        if self.policies and not set(self.names) - names:
            links = ()
        tables = tuple(
            table if not names & set(table.policies) else _without(table, names)
            for table in self.ruleset.tables
            if set(table.policies) - names
        )
        ruleset = replace(
            self.ruleset,
            tables=tables,
            order=tuple(name for name in self.ruleset.order if name not in names),
            links=links,
        )
        policies = tuple(p for p in self.policies if p.name not in names)
        own = {*self.names, *self.link_names}
        removed = tuple(sorted({*self.removed, *(names & own)}))
        return replace(self, policies=policies, ruleset=ruleset, removed=removed)


def _without(table: Table, names: set[str]) -> Table:
    """A table of several policies without some of them."""
    chains = [chain for chain in table.chains if chain.policy not in names]
    text = "\n".join(rule.text for chain in chains for rule in chain.rules)
    return replace(
        table,
        policies=tuple(name for name in table.policies if name not in names),
        chains=chains,
        counters=[counter for counter in table.counters if counter.policy not in names],
        values=[one for one in table.values if f"@{one.name}" in text],
        queues=[one for one in table.queues if one.policy not in names],
        tunnels=[one for one in table.tunnels if one.policy not in names],
        controllers=[one for one in table.controllers if one.policy not in names],
        timers=[one for one in table.timers if one.policy not in names],
        overlays=[one for one in table.overlays if one.name not in names],
        sets=[
            one
            for one in table.sets
            if (one.policy or None) not in names and (one.policy or f"@{one.name}" in text)
        ],
    )


@dataclass
class Recorder:
    """A reader that remembers what it read."""

    read: Reader
    reads: list[Read] = field(default_factory=list)

    def __call__(self, path: str, by: Source, library: bool) -> Source:
        source = self.read(path, by, library)
        self.reads.append(Read(path, by.name, library, source))
        return source


def replay(unit: Unit) -> Reader:
    """A reader that gives what a unit was compiled from."""
    known = {(read.path, read.by, read.library): read.source for read in unit.reads}

    def read(path: str, by: Source, library: bool) -> Source:
        try:
            return known[path, by.name, library]
        except KeyError:
            raise UnreadableError("it was not read when this was loaded") from None

    return read


def unit_of(
    compiled: "Compiled",
    file: str,
    reads: Sequence[Read] = (),
    given: Mapping[str, Mapping[str, str]] | None = None,
) -> Unit:
    """The unit that a compiled file is."""
    policies = tuple(
        Loaded(one.name, one.priority, one.parameters, one.span) for one in compiled.policies
    )
    return Unit(
        file=file,
        source=compiled.source,
        reads=tuple(reads),
        policies=policies,
        ruleset=compiled.ruleset,
        given=given or {},
        warned=bool(compiled.warnings),
        compiler=__version__,
        optimised=bool(compiled.optimisations),
    )


def still_holds(unit: Unit, source: Source, read: Reader, optimise: bool = True) -> bool:
    """Would compiling this source give the unit again? Nothing that it was made from changed."""
    if unit.optimised != optimise:
        return False
    if unit.compiler != __version__ or unit.given or unit.warned or unit.removed:
        return False
    if unit.source.text != source.text:
        return False
    # The same files, whatever their paths are called today.
    by_name = {unit.source.name: source}
    try:
        for one in unit.reads:
            found = read(one.path, by_name[one.by], one.library)
            if found.text != one.source.text:
                return False
            by_name[one.source.name] = found
    except (UnreadableError, KeyError):
        return False
    return True


def renamed(unit: Unit, like: Unit) -> Unit:
    """The unit with its files called as another unit of the same file calls them.

    So that nothing changes where a file is named by another path than last time.
    """
    names = {unit.source.name: like.source.name}
    for read in unit.reads:
        known = [
            other.source.name
            for other in like.reads
            if (other.path, other.library, other.by)
            == (read.path, read.library, names.get(read.by, read.by))
        ]
        if known:
            names[read.source.name] = known[0]
    data = to_json(unit)
    data["texts"] = [[names.get(name, name), text] for name, text in data["texts"]]
    data["reads"] = [[path, names.get(by, by), *rest] for path, by, *rest in data["reads"]]
    return from_json(data)


def _fields(one: Any) -> dict[str, Any]:
    return {f.name: getattr(one, f.name) for f in fields(one)}


# To JSON and back. Places in the texts are (text, start, end).


def to_json(unit: Unit) -> dict[str, Any]:
    """The unit as plain values."""
    index: dict[int, int] = {}
    texts: list[Source] = []

    def number(source: Source) -> int:
        if id(source) not in index:
            index[id(source)] = len(texts)
            texts.append(source)
        return index[id(source)]

    number(unit.source)

    def place(span: Span) -> list[int]:
        return [number(span.source), span.start, span.end]

    def chain(one: Chain) -> dict[str, Any]:
        return {
            "name": one.name,
            "policy": one.policy,
            "span": place(one.span),
            "hook": None if one.hook is None else [one.hook.name, one.hook.priority, one.hook.kind],
            "rules": [[rule.text, place(rule.span), rule.label] for rule in one.rules],
            "role": one.role,
            "number": one.number,
        }

    def plain(
        one: Counter | ValueSet | FlowSet | Queue | Tunnel | Controller | Timer | LinkClass,
    ) -> dict[str, Any]:
        return {**_fields(one), "span": place(one.span)}

    def value_set(one: ValueSet) -> dict[str, Any]:
        return {**plain(one), "spans": [place(span) for span in one.spans]}

    def controller(one: Controller) -> dict[str, Any]:
        return {**plain(one), "measure": _fields(one.measure)}

    def link(one: Link) -> dict[str, Any]:
        classes = [plain(each) for each in one.classes]
        return {**_fields(one), "classes": classes, "at": place(one.at), "span": place(one.span)}

    def overlay(one: Overlay) -> dict[str, Any]:
        parts = {
            name: [{**_fields(each), "span": place(each.span)} for each in getattr(one, name)]
            for name in ("neighbors", "destinations")
        }
        return {**_fields(one), **parts, "span": place(one.span), "key_at": place(one.key_at)}

    def queue(one: Queue) -> dict[str, Any]:
        return {**plain(one), "calls": [[target, place(at)] for target, at in one.calls]}

    data = {
        "file": unit.file,
        "reads": [[r.path, r.by, r.library, number(r.source)] for r in unit.reads],
        "policies": [{**_fields(p), "span": place(p.span)} for p in unit.policies],
        "order": list(unit.ruleset.order),
        "given": {name: dict(values) for name, values in unit.given.items()},
        "warned": unit.warned,
        "compiler": unit.compiler,
        "removed": list(unit.removed),
        "program": unit.program,
        "optimised": unit.optimised,
        "links": [link(one) for one in unit.links],
        "tables": [
            {
                **{k: getattr(table, k) for k in ("policies", "family", "title", "shared")},
                "span": place(table.span),
                "counters": [plain(one) for one in table.counters],
                "values": [value_set(one) for one in table.values],
                "sets": [plain(one) for one in table.sets],
                "chains": [chain(one) for one in table.chains],
                "queues": [queue(one) for one in table.queues],
                "tunnels": [plain(one) for one in table.tunnels],
                "controllers": [controller(one) for one in table.controllers],
                "timers": [plain(one) for one in table.timers],
                "overlays": [overlay(one) for one in table.overlays],
            }
            for table in unit.ruleset.tables
        ],
    }
    # Last: the texts are those that something of the unit stands in.
    return {**data, "texts": [[text.name, text.text] for text in texts]}


def from_json(data: Mapping[str, Any]) -> Unit:
    """The unit that `to_json` made these values from.

    Raises `KeyError`, `TypeError`, `ValueError` or `IndexError` for other values.
    """
    texts = [Source(name, text) for name, text in data["texts"]]

    spans: dict[tuple[int, ...], Span] = {}  # several rules stand for one place

    def span(place: Sequence[int]) -> Span:
        key = tuple(place)
        if key not in spans:
            spans[key] = Span(texts[place[0]], place[1], place[2])
        return spans[key]

    def chain(one: Mapping[str, Any]) -> Chain:
        rules = [Rule(text, span(place), label) for text, place, label in one["rules"]]
        hook = BaseHook(*one["hook"]) if one["hook"] else None
        return Chain(
            one["name"], span(one["span"]), one["policy"], hook, rules, one["role"], one["number"]
        )

    def queue(one: Mapping[str, Any]) -> Queue:
        known = {
            "entries": tuple((name, begin) for name, begin in one["entries"]),
            "decisions": tuple(one["decisions"]),
            "calls": tuple((target, span(place)) for target, place in one["calls"]),
            "span": span(one["span"]),
        }
        return Queue(**{**one, **known})

    def tunnel(one: Mapping[str, Any]) -> Tunnel:
        known = {
            "sources": tuple((address, length) for address, length in one["sources"]),
            "destinations": tuple(one["destinations"]),
            "devices": tuple(one["devices"]),
            "span": span(one["span"]),
        }
        return Tunnel(**{**one, **known})

    def controller(one: Mapping[str, Any]) -> Controller:
        known = {
            "measure": Measure(**{**one["measure"], "of": tuple(one["measure"]["of"])}),
            "gains": tuple((name, value) for name, value in one["gains"]),
            "steps": tuple(one["steps"]),
            "values": tuple(one["values"]),
            "sites": tuple(one["sites"]),
            "span": span(one["span"]),
        }
        return Controller(**{**one, **known})

    def link_class(one: Mapping[str, Any]) -> LinkClass:
        return LinkClass(**{**one, "dscp": tuple(one["dscp"]), "span": span(one["span"])})

    def link(one: Mapping[str, Any]) -> Link:
        classes = tuple(link_class(each) for each in one["classes"])
        places = {"at": span(one["at"]), "span": span(one["span"])}
        return Link(**{**one, "classes": classes, **places})

    def overlay(one: Mapping[str, Any]) -> Overlay:
        known = {
            "neighbors": tuple(
                Neighbor(**{**n, "span": span(n["span"])}) for n in one["neighbors"]
            ),
            "destinations": tuple(
                Destination(pairs(d["prefixes"]), d["egress"], span(d["span"]))
                for d in one["destinations"]
            ),
            "own": pairs(one["own"]),
            "lost": tuple(one["lost"]),
            "key_at": span(one["key_at"]),
            "span": span(one["span"]),
        }
        return Overlay(**{**one, **known})

    def pairs(found: Any) -> tuple[tuple[int, int], ...]:
        return tuple((address, length) for address, length in found)

    def value_set(one: Mapping[str, Any]) -> ValueSet:
        known = {
            "elements": tuple(one["elements"]),
            "verdicts": tuple(one.get("verdicts", ())),
            "spans": tuple(span(place) for place in one.get("spans", ())),
            "span": span(one["span"]),
        }
        return ValueSet(**{**one, **known})

    def flow_set(one: Mapping[str, Any]) -> FlowSet:
        known = {"key": tuple(one["key"]), "types": tuple(one["types"]), "span": span(one["span"])}
        return FlowSet(**{**one, **known})

    def table(one: Mapping[str, Any]) -> Table:
        return Table(
            policies=tuple(one["policies"]),
            span=span(one["span"]),
            family=one["family"],
            title=one["title"],
            shared=one["shared"],
            counters=[Counter(**{**c, "span": span(c["span"])}) for c in one["counters"]],
            values=[value_set(v) for v in one["values"]],
            sets=[flow_set(s) for s in one["sets"]],
            chains=[chain(c) for c in one["chains"]],
            queues=[queue(q) for q in one["queues"]],
            tunnels=[tunnel(t) for t in one["tunnels"]],
            controllers=[controller(c) for c in one["controllers"]],
            timers=[Timer(**{**t, "span": span(t["span"])}) for t in one["timers"]],
            overlays=[overlay(o) for o in one["overlays"]],
        )

    tables = tuple(table(one) for one in data["tables"])
    return Unit(
        file=data["file"],
        source=texts[0],
        reads=tuple(Read(path, by, library, texts[n]) for path, by, library, n in data["reads"]),
        policies=tuple(Loaded(**{**p, "span": span(p["span"])}) for p in data["policies"]),
        ruleset=Ruleset(
            texts[0].name, tables, tuple(data["order"]), tuple(link(one) for one in data["links"])
        ),
        given=data["given"],
        warned=data["warned"],
        compiler=data["compiler"],
        removed=tuple(data["removed"]),
        program=data["program"],
        optimised=data.get("optimised", True),
    )
