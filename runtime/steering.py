"""What loaded policies need of routing: the kernel's tunnels, and sysctls.

Which those are follows from the state. They are put before the rules that lead there,
with the ones that still run, and taken away behind the rules that led there. What was
there before is written down first, beside the state, and put back when no policy needs
it any more.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from itmlang import marks
from itmlang.nft import model
from itmlang.nft.tunnels import renumbered
from runtime import store
from runtime.errors import MachineError
from runtime.state import State
from runtime.units import Unit

if TYPE_CHECKING:
    from runtime import tunnels

_FILE: Final = "routing.json"


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


def prepare(folder: Path, before: State, wanted: State) -> None:
    """Have what a state needs that does not hold yet, beside what runs. Raises `MachineError`."""
    if steers(before) or steers(wanted):
        numbered = _by_number(before.units) | _by_number(wanted.units)
        _put(folder, numbered.values(), [*_in_python(before), *_in_python(wanted)])


def settle(folder: Path, state: State) -> None:
    """Have what a state needs, and nothing else. Raises `MachineError`."""
    path = folder / _FILE
    if steers(state):
        stored = _put(folder, kernel_tunnels(state), _in_python(state))
        _keep(path, stored, settled=True)
    elif path.exists():
        from runtime import tunnels

        tunnels.take_away(_stored(path)[0])
        path.unlink()


def unsettled(folder: Path) -> bool:
    """Was somebody ended between `prepare` and `settle`, or is he in between?"""
    return not _stored(folder / _FILE)[1]


def mend(folder: Path) -> bool:
    """Have what the state needs, also at links that came since; was it done?

    Not while somebody changes the state, or where somebody was ended who did: then the next
    change does it. Raises `MachineError`.
    """
    with store.locked_at_once() as held:
        if held is None or unsettled(folder):
            return False
        settle(folder, held.state)
        return True


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
    stored = tunnels.before(ways, _settings(ways, queues), _stored(path)[0])
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
