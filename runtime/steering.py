"""What loaded policies need beside rules: links, the kernel's tunnels, sysctls.

Which those are follows from the state. They are put before the rules that lead there,
with the ones that still run, and taken away behind the rules that led there. What was
there before is written down first, beside the state, and put back when no policy needs
it any more.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from itmlang import marks
from itmlang.control import Controller
from itmlang.diagnostics import Diagnostic
from itmlang.links import Link, overlap
from itmlang.nft import model
from itmlang.nft.tunnels import renumbered
from runtime import store
from runtime.errors import MachineError
from runtime.plan import shape
from runtime.state import State
from runtime.store import directory
from runtime.units import Unit

if TYPE_CHECKING:
    from runtime import links, tunnels

_FILE: Final = "routing.json"
_LINKS: Final = "links.json"


def fitted(units: Iterable[Unit], state: State, others: Iterable[Unit] = ()) -> tuple[Unit, ...]:
    """Units that are to run after a state, beside others, with numbers of their own for their
    tunnels. Raises `MachineError` if there are too many."""
    before, taken = _by_number(state.units), _by_number(others)
    found = []
    for unit in units:
        ruleset = renumbered(unit.ruleset, taken, before)
        if ruleset is None:
            raise MachineError(
                f"the mark tells {marks.MOST_TUNNELS} of the kernel's tunnels apart, "
                "and there are more",
                "`run python` in a policy puts its packets into tunnels by Python",
            )
        found.append(unit if ruleset is unit.ruleset else unit.with_ruleset(ruleset))
        taken |= _by_number(found[-1:])
    return tuple(found)


def _by_number(units: Iterable[Unit]) -> dict[int, model.Tunnel]:
    return {t.number: t for unit in units for table in unit.ruleset.tables for t in table.tunnels}


def kernel_tunnels(state: State) -> list[model.Tunnel]:
    """The kernel's tunnels that a state has, each once, by number."""
    found = _by_number(state.units)
    return [found[number] for number in sorted(found)]


def prepare(folder: Path, before: State, wanted: State, force: Collection[str] = ()) -> None:
    """Have what a state needs that does not hold yet, beside what runs. Raises `MachineError`.

    Only links named in `force` take the place of what somebody else has set.
    """
    if steers(before) or steers(wanted):
        numbered = _by_number(before.units) | _by_number(wanted.units)
        _put(folder, numbered.values(), [*_in_python(before), *_in_python(wanted)])
    if before.active_links or wanted.active_links:
        new = wanted.active_links
        going = [
            link for link in before.active_links
            if not any(o.name == link.name or overlap(o, link) for o in new)
        ]  # fmt: skip
        _put_links(folder, [*new, *going], controlled(wanted), force=force)


def settle(folder: Path, state: State, live: Collection[str] | None = None) -> tuple[str, ...]:
    """Have what a state needs, and nothing else; what did not come back, and where somebody else's
    qdisc is in the way, in words.

    Rates that controllers write stay: of the links named `live`, of all that have one if left
    out. Raises `MachineError`.
    """
    path = folder / _FILE
    told: tuple[str, ...] = ()
    if state.active_links or (folder / _LINKS).exists():
        free = controlled(state)
        kept = free if live is None else {n: one for n, one in free.items() if n in live}
        told = _put_links(folder, state.active_links, kept, settled=True)
    if steers(state):
        stored = _put(folder, kernel_tunnels(state), _in_python(state))
        _keep(path, stored, settled=True)
    elif path.exists():
        from runtime import tunnels

        tunnels.take_away(_stored(path)[0])
        path.unlink()
    return told


def unsettled(folder: Path) -> bool:
    """Was somebody ended between `prepare` and `settle`, or is he in between?"""
    return not (_stored(folder / _FILE)[1] and _stored_links(folder)[1])


def mend(folder: Path, controlled: Collection[str] = ()) -> bool:
    """Have what the state needs, also at interfaces that came since; was it done?

    The rates of links that are `controlled` stay as they are.

    Not while somebody changes the state, or where somebody was ended who did: then the next
    change does it. Raises `MachineError`.
    """
    with store.locked_at_once() as held:
        if held is None or unsettled(folder):
            return False
        settle(folder, held.state, controlled)
        return True


# Links.


def refuse(before: State, wanted: State, *, force: bool) -> None:
    """Refuse links that are new, or other than before, where they cannot stand here.

    With `force`, what somebody else has set gives way, and the hardware's rate is no bound.
    Raises `MachineError`, with the policy's lines.
    """
    asked = {link.name: shape(link) for link in before.active_links}
    new = [link for link in wanted.active_links if asked.get(link.name) != shape(link)]
    if not new:
        return
    from runtime import links  # 0.2 s that most changes need not

    found: list[Diagnostic] = []
    stored = _stored_links(directory())[0]
    for link in new:
        here = links.interfaces(link)
        if not here and not link.pattern:
            found.append(
                Diagnostic(
                    "E068", f"there is no interface {link.interface} here", link.at,
                    help="a pattern that ends in `*` waits for it",
                )
            )  # fmt: skip
        for name, kind in {} if force else links.foreign([link], stored).items():
            found.append(
                Diagnostic(
                    "E069",
                    f"{name} has a root qdisc {kind} that somebody else set",
                    link.at,
                    help="`itmc apply --force` puts it aside, until the link is removed",
                )
            )
        for name in [] if force else here:
            speed = links.speed(name)
            if speed is not None and speed < link.rate:
                found.append(
                    Diagnostic(
                        "E070", f"{name} sends {speed * 8 // 10**6} mbit at most, less than the "
                        "link's rate", link.span,
                        help="a slower link queues nothing: its hardware does; "
                        "`--force` if it tells less than it can",
                    )
                )  # fmt: skip
    if found:
        raise MachineError("a link cannot stand here; nothing was changed", "", tuple(found))


def controlled(state: State) -> dict[str, Controller]:
    """The controllers that write rates of links, by link."""
    on = {entry.name for entry in state.policies if entry.on}
    return {
        one.link: one
        for table in state.tables
        for one in table.controllers
        if one.link and one.policy in on and not one.dry
    }


def wrong_links(state: State, some: Sequence[Link] | None = None) -> dict[str, list[str]]:
    """By name, what somebody else changed of the links, or of `some`. Raises `MachineError`."""
    active = state.active_links if some is None else some
    if not active:
        return {}
    from runtime import links

    free = controlled(state)
    found = links.wrong(_as_written(active, free))
    moving = free.keys() & found.keys()
    if any(found[name] for name in moving):
        # Its controller may just have written another rate: that is not wrong twice.
        again = links.wrong(_as_written(active, free))
        found |= {name: [one for one in found[name] if one in again[name]] for name in moving}
    return found


def crooked(state: State, names: Collection[str]) -> dict[str, list[str]]:
    """By name, what somebody else changed of these links, where they may be put right.

    Raises `MachineError`.
    """
    active = [link for link in state.active_links if link.name in names]
    if not active:
        return {}
    from runtime import links

    reachable, _ = _allowed(active, _stored_links(directory())[0], ())
    here = {link.name for link in reachable if links.interfaces(link)}
    return {name: told for name, told in wrong_links(state, reachable).items() if name in here}


def _put_links(
    folder: Path,
    wanted: Iterable[Link],
    free: Mapping[str, Controller],
    *,
    settled: bool = False,
    force: Collection[str] = (),
) -> tuple[str, ...]:
    from runtime import links

    path = folder / _LINKS
    stored = _stored_links(folder)[0]
    wanted, blocked = _allowed(_as_written(wanted, free), stored, force)
    shared = _stored(folder / _FILE)[0]
    before = links.before(wanted, stored, shared["links"] if shared else ())
    _keep_links(path, before, settled=False)
    done = links.put(wanted, before)
    _keep_links(path, done.before, settled=settled)
    if settled and not (wanted or done.before["aside"]):
        path.unlink()
    return (*done.told, *blocked)


def _as_written(wanted: Iterable[Link], free: Mapping[str, Controller]) -> list[Link]:
    """The links with the rates that their controllers have written."""
    from runtime import links

    found = []
    for link in wanted:
        one = free.get(link.name)
        rate = links.rate(link) if one is not None else None
        within = one is not None and rate is not None and one.low <= rate <= one.high
        found.append(links.at_rate(link, rate) if within and rate is not None else link)
    return found


def _allowed(
    wanted: Iterable[Link], stored: "links.Before | None", force: Collection[str]
) -> tuple[list[Link], list[str]]:
    """The links, without interfaces where somebody else has set something that has not made room
    before (but those named in `force`); and where that is, in words."""
    from runtime import links

    found, told = [], []
    for link in wanted:
        blocked = {} if link.name in force else links.foreign([link], stored, again=True)
        if not blocked:
            found.append(link)
            continue
        found += [
            replace(link, interface=name) for name in links.interfaces(link) if name not in blocked
        ]
        told += [
            f"{link.name} is not at {name}: somebody else has set a root qdisc {kind} there, which "
            "only `itmc apply --force` puts aside"
            for name, kind in sorted(blocked.items())
        ]
    return found, told


def _stored_links(folder: Path) -> "tuple[links.Before | None, bool]":
    found = store.read(folder / _LINKS)
    if found is None:
        return None, True
    return cast("links.Before", found["before"]), bool(found["settled"])


def _keep_links(path: Path, before: "links.Before", *, settled: bool) -> None:
    store.write(path, json.dumps({"before": before, "settled": settled}).encode())


# Tunnels.


def steers(state: State) -> bool:
    """Does a state need anything of routing?"""
    return bool(kernel_tunnels(state) or _in_python(state))


def _stored(path: Path) -> "tuple[tunnels.Before | None, bool]":
    """What was there before, and whether what is there now is what the state needs."""
    found = store.read(path)
    if found is None:
        return None, True
    return cast("tunnels.Before", found["before"]), bool(found["settled"])


def _keep(path: Path, before: "tunnels.Before", *, settled: bool) -> None:
    store.write(path, json.dumps({"before": before, "settled": settled}).encode())


def _put(
    folder: Path, kernel: Iterable[model.Tunnel], queues: Iterable[model.Queue]
) -> "tunnels.Before":
    from runtime import tunnels  # 0.2 s that most changes need not

    path = folder / _FILE
    ways = [_way(one) for one in kernel]
    links = _stored_links(folder)[0]
    shared = [name for name, one in links["ingress"].items() if one["clsact"]] if links else []
    stored = tunnels.before(ways, _settings(ways, queues), _stored(path)[0], shared=shared)
    _keep(path, stored, settled=False)
    tunnels.put(ways, stored)
    return stored


def _settings(
    ways: "Iterable[tunnels.Tunnel]", queues: Iterable[model.Queue]
) -> "set[tunnels.Setting]":
    """The sysctls that are not as tunnels need them, in the kernel and in Python."""
    from runtime import tunnels

    queues = list(queues)
    entering = [tunnels.Encapsulation(0, 0)] if any(q.encapsulates for q in queues) else []
    leaving = [tunnels.Decapsulation(0, ())] if any(q.decapsulates for q in queues) else []
    return {*tunnels.needs(ways), *tunnels.needs([*entering, *leaving], in_python=True)}


def _way(one: model.Tunnel) -> "tunnels.Tunnel":
    from runtime import tunnels

    mark = one.number << marks.TUNNEL_SHIFT
    if one.inward:
        return tunnels.Decapsulation(mark, one.destinations, one.sources, one.devices)
    return tunnels.Encapsulation(mark, one.destination, one.source or None)


def _in_python(state: State) -> list[model.Queue]:
    """The queues behind which Python puts packets into tunnels, or takes them out."""
    return [
        queue
        for table in state.tables
        for queue in table.queues
        if queue.encapsulates or queue.decapsulates
    ]


def drift(state: State, policy: str) -> list[str]:
    """What somebody else changed of a policy's tunnels in the kernel, and of the sysctls that its
    tunnels need, in words. Raises `MachineError`."""
    table = state.table_of(policy)
    wanted = [tunnel for tunnel in table.tunnels if tunnel.policy == policy]
    queues = [queue for queue in _in_python(state) if queue.policy == policy]
    if not wanted and not queues:
        return []
    from runtime import tunnels

    ways = [_way(one) for one in wanted]
    wrong = tunnels.wrong(ways)
    return [
        *(f"the tunnel of class {t.name}: {told}"
          for t, way in zip(wanted, ways, strict=True) for told in wrong[way]),
        *(f"{one.name} is {one.found}, not {one.value}: {one.why}"
          for one in sorted(_settings(ways, queues))),
    ]  # fmt: skip
