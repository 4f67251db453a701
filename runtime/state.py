"""What is loaded in this network namespace: the units, their policies' order, what was seen.

The kernel stays the truth about what runs; this is what the kernel cannot tell: the
texts, what each set is for, and how nftables listed what it was given, so that what
others change is noticed. Pure; `runtime.store` keeps it on disk.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from itmlang.links import Link
from itmlang.nft.model import Table
from runtime.units import Unit


@dataclass(frozen=True)
class Entry:
    """A loaded policy: is it on, and since when is it loaded (seconds since the epoch)?"""

    name: str
    on: bool = True
    applied: float = 0.0


@dataclass(frozen=True)
class State:
    """All units of a namespace; `policies` stand in the order they run at equal priority.

    `listed` has, for each table and object, a digest of how the kernel listed it after
    it was loaded. `generation` is the number under which the state is kept, 0 for none.
    """

    units: tuple[Unit, ...] = ()
    policies: tuple[Entry, ...] = ()
    listed: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    generation: int = 0
    resting: frozenset[str] = frozenset()  # links that are off

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.policies)

    def find(self, name: str) -> Entry | None:
        return next((entry for entry in self.policies if entry.name == name), None)

    def unit(self, file: str) -> Unit | None:
        return next((unit for unit in self.units if unit.file == file), None)

    def unit_of(self, policy: str) -> Unit:
        return next(unit for unit in self.units if policy in unit.names)

    def table_of(self, policy: str) -> Table:
        return self.unit_of(policy).ruleset.table_of(policy)

    def priority(self, policy: str) -> int:
        return next(p.priority for p in self.unit_of(policy).policies if p.name == policy)

    @property
    def tables(self) -> Iterator[Table]:
        for unit in self.units:
            yield from unit.ruleset.tables

    @property
    def links(self) -> tuple[Link, ...]:
        """All links, in the order of their units."""
        return tuple(link for unit in self.units for link in unit.links)

    @property
    def active_links(self) -> tuple[Link, ...]:
        """Those that are on."""
        return tuple(link for link in self.links if link.name not in self.resting)

    def with_unit(self, unit: Unit, now: float) -> "State":
        """The state with a unit in the place of the one from the same file, or behind all others.

        Places among other files' policies are kept, the file's order holds within. What
        was off stays off.
        """
        old = self.unit(unit.file)
        known = set(old.names) if old else set()
        queue = [
            replace(self.find(name) or Entry(name), applied=now) for name in unit.ruleset.order
        ]
        placed: list[Entry] = []
        for entry in self.policies:
            if entry.name not in known:
                placed.append(entry)
                continue
            # This place belongs to the file's next policy that was there already; new
            # ones that stand before it come along.
            while queue:
                first = queue.pop(0)
                placed.append(first)
                if first.name in known:
                    break
        units = tuple(unit if one is old else one for one in self.units)
        made = replace(self, units=units if old else (*units, unit), policies=(*placed, *queue))
        return made._rested(self.resting)

    def _rested(self, resting: frozenset[str]) -> "State":
        """The state with those of some links off that it has."""
        return replace(self, resting=resting & {link.name for link in self.links})

    def without(self, names: set[str]) -> "State":
        """The state without some policies."""
        units = (
            unit.without(names) if names & {*unit.names, *unit.link_names} else unit
            for unit in self.units
        )
        made = replace(
            self,
            units=tuple(unit for unit in units if unit.policies or unit.links),
            policies=tuple(entry for entry in self.policies if entry.name not in names),
        )
        return made._rested(self.resting)

    def switched(self, names: set[str], *, on: bool) -> "State":
        """The state with some policies and links on or off."""
        entries = (replace(e, on=on) if e.name in names else e for e in self.policies)
        resting = self.resting - names if on else self.resting | names
        return replace(self, policies=tuple(entries))._rested(resting)
