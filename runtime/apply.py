"""Change what runs: load policies, take them away, switch, set and roll them back.

Every change goes the same way, and the order of things is what makes it safe: the
state's lock first, then the plan from what the kernel holds to what is wanted, then
the new generation written beside the old, then one transaction, then the state
renamed into place. Whatever fails before the transaction changes nothing; the
transaction is all or nothing; and what is left is a rename. Where somebody was killed
before it, the next change asks the kernel which of the two holds.
"""

import re
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from logging import warning
from typing import Final

from itmlang.diagnostics import CompileError, Diagnostic, did_you_mean
from itmlang.links import Link, overlap
from itmlang.nft.model import TABLE_PREFIX, Queue
from runtime import decisions, netlink, nft, serving, steering, xt
from runtime.errors import MachineError, RolledBackError, UsageError
from runtime.listing import Element, Running
from runtime.migrate import Contents, Dump, Kept, Left, Move, corrections
from runtime.nft import NftRefusalError
from runtime.plan import Plan, Script, fingerprint, listed, plan
from runtime.state import State
from runtime.store import Generation, Store, boot_file, locked, read_generation, reading
from runtime.units import Unit, replay, unit_of
from runtime.warden import arm, overdue, told

# Takes a sentence that is to be said beside a result.
Tell = Callable[[str], None]
# A flow that gets packets while its threshold moves is put right so often.
_CORRECTIONS: Final = 4
# Sets that may hold more are not kept for a rollback: reading them would take seconds.
_LARGEST_KEPT: Final = 262_144
_ENDING: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGTSTP)
_DEVICE: Final = re.compile(r'\bdevice "[^"]+"')


@dataclass(frozen=True)
class Applied:
    """What was changed: names of policies loaded and removed, of links, and the plan.

    `absent` are devices of hooks that are not here; the kernel waits for them. `off`
    are policies that were off and stayed so. `generation` is the new one's number, 0 if
    nothing changed. `told` are sentences that the user must read beside it.
    """

    loaded: tuple[str, ...]
    removed: tuple[str, ...]
    plan: Plan
    absent: tuple[str, ...] = ()
    off: tuple[str, ...] = ()
    generation: int = 0
    told: tuple[str, ...] = ()
    links: tuple[str, ...] = ()

    @property
    def lost(self) -> tuple[str, ...]:
        """Sets whose contents were lost."""
        return tuple(change.name for change in self.plan.lost)


def planned(unit: Unit, known: State | None = None) -> tuple[Plan, State]:
    """What `apply` would do with a unit, and the state it would start from.

    `known` is that state, if it was read already.

    Raises `CompileError` if a policy's name belongs to another file.
    """
    nft.require_rights()
    with reading(known) as store:
        return _of_unit(unit, store.state), store.state


def _of_unit(unit: Unit, state: State) -> Plan:
    _refuse_foreign(unit, state)
    others = [other for other in state.units if other.file != unit.file]
    (unit,) = xt.fitted(steering.fitted([unit], state, others))
    old = state.unit(unit.file)
    units = (old, unit) if old else (unit,)
    scope = {table.path for one in units for table in one.ruleset.tables}
    gone = set(old.names) - set(unit.names) if old else set[str]()
    wanted = state.without(gone).with_unit(unit, time.time())
    crooked = steering.crooked(state, unit.link_names)
    return plan(wanted, state, kernel(state, wanted), scope, crooked=crooked)


def apply(
    unit: Unit,
    *,
    known: State | None = None,
    check: bool = False,
    digest: str = "",
    why: str = "",
    confirm: float = 0,
    boot: bool = True,
    force: bool = False,
) -> Applied:
    """Load a file's policies in one transaction; with `check`, only try it.

    Applying a file again replaces what it brought before. With `digest`, only the plan
    that has it is carried out. With `confirm`, everything goes back after so many
    seconds unless `confirm` comes before. `known` is the state if it was read already.
    Without `boot` it is not there again after a reboot. With `force`, links also go where
    somebody else has set a qdisc: that is put aside.

    Raises `CompileError` if a policy's name belongs to another file, `UsageError` if the
    plan is another one, `MachineError` if the machine refuses; in all cases nothing was
    changed.
    """
    with _changing(known) as store:
        if not check:
            _refuse_unconfirmed(store)
        change = _of_unit(unit, store.state)
        if digest and change.digest != digest:
            raise UsageError(
                f"the plan is another one by now: {change.digest}, not {digest}; nothing was changed",
                "`itmc plan` shows it",
            )
        steering.refuse(store.state, change.state, force=force)
        if any(table.overlays for table in unit.ruleset.tables):
            from runtime.overlay import keys  # only for who has some

            keys.refuse(store.state, change.state)
        if check:
            _load(_script(change, {}, _dump), check=True)
            return _applied(change, unit)
        said: list[str] = []
        forced = unit.link_names if force else ()
        old = store.state.unit(unit.file)
        if change.empty and old is not None and old.made_of == unit.made_of:
            # Handlers may have changed.
            serving.prepare(store.folder, store.state.generation, store.state, {unit.file})
            if forced:
                steering.prepare(store.folder, store.state, store.state, forced)
            said += steering.settle(store.folder, store.state)
            if boot:
                _keep_for_boot(store, said.append)
            return _applied(change, unit, 0, said)
        number = carry_out(
            store, change, why or f"apply {unit.shown}",
            confirm=confirm, boot=boot, forced=forced, tell=said.append,
        )  # fmt: skip
        return _applied(change, unit, number, said)


def _applied(change: Plan, unit: Unit, number: int = 0, said: Sequence[str] = ()) -> Applied:
    hooks = [c.hook.name for t in unit.ruleset.tables for c in t.base_chains if c.hook]
    absent = dict.fromkeys(device for hook in hooks if (device := _absent(hook)))
    off = tuple(e.name for e in change.state.policies if e.name in unit.names and not e.on)
    off += tuple(name for name in unit.link_names if name in change.state.resting)
    return Applied(
        unit.ruleset.order,
        change.deleted,
        change,
        tuple(absent),
        off,
        number,
        tuple(said),
        unit.link_names,
    )


def remove(names: Sequence[str], tell: Tell | None = None) -> tuple[str, ...]:
    """Take policies away, all in one transaction; an empty list takes all.

    Without names, every table of ours goes, also those that a crash left behind.
    Returns the names; what else is to be said goes to `tell`. Raises `UsageError` for a
    name that is not loaded.
    """
    with _changing() as store:
        _refuse_unconfirmed(store)
        state = store.state
        ours = {table.path for table in state.tables}
        strays = {
            path: path.split()[1].removeprefix(TABLE_PREFIX)
            for path in our_tables()
            if path not in ours
        }
        named = [link.name for link in state.links]
        known = sorted({*state.names, *named, *strays.values()})
        _refuse_unknown(names, known)
        going = list(dict.fromkeys(names)) or known
        wanted = state.without(set(going))
        scope = {state.table_of(name).path for name in going if name in state.names}
        change = plan(wanted, state, kernel(state, wanted), scope)
        for path, name in strays.items():
            if name in going:
                change.before.say(f"delete table {path}")
        if going:
            carry_out(store, change, "remove " + (" ".join(names) or "--all"), tell=tell)
        else:  # what was kept for the boot goes, too
            _keep_for_boot(store, tell)
    return tuple(going)


def withdraw(going: Callable[[Unit], bool]) -> tuple[str, ...]:
    """Take away those units of programs that are `going`; the names of their policies.

    Raises `MachineError`; then nothing was changed.
    """
    with _changing() as store:
        state = store.state
        units = [unit for unit in state.units if unit.program and going(unit)]
        names = tuple(name for unit in units for name in unit.names)
        if names:
            _refuse_unconfirmed(store)
            wanted = state.without(set(names))
            scope = {table.path for unit in units for table in unit.ruleset.tables}
            change = plan(wanted, state, kernel(state, wanted), scope)
            carry_out(store, change, f"end of {units[0].program}", boot=False)
    return names


def switch(names: Sequence[str], *, on: bool, tell: Tell | None = None) -> tuple[str, ...]:
    """Take policies off their hooks, or hang them in again; all that they learned stays.

    Returns the names that were not so already. Raises `UsageError` for a name that
    is not loaded, `MachineError` if the machine refuses; then nothing was changed.
    """
    with _changing() as store:
        _refuse_unconfirmed(store)
        state = store.state
        links = {link.name for link in state.links}
        _refuse_unknown(names, [*state.names, *links])
        running = kernel(state, state)
        for name in (name for name in names if name not in links):
            if state.table_of(name).path not in running:
                raise MachineError(
                    f"the table of `{name}` is gone from the kernel",
                    "`itmc apply` brings it back",
                )
        wanted = state.switched(set(names), on=on)
        changing = tuple(
            entry.name
            for entry in state.policies
            if entry.name in names
            and (entry.on != on or (on and not _hooked(state, entry.name, running)))
        ) + tuple(sorted(n for n in links & set(names) if (n in state.resting) == on))
        scope = {state.table_of(name).path for name in changing if name not in links}
        change = plan(wanted, state, running, scope)
        if changing:
            why = f"{'enable' if on else 'disable'} {' '.join(names)}"
            carry_out(store, change, why, tell=tell)
    return changing


def _hooked(state: State, policy: str, running: Mapping[str, Running]) -> bool:
    """Are all base chains of a policy where they should be?"""
    table = state.table_of(policy)
    chains = (c.name for c in table.base_chains if c.policy == policy)
    return all(chain in running[table.path].chains for chain in chains)


def set_parameter(policy: str, parameter: str, value: str) -> Applied:
    """Give a parameter of a loaded policy another value, until its file is applied again.

    The policy is compiled from what it was loaded from. Rules that do not name the
    parameter stay as they are. Raises `UsageError` if there is no such policy or
    parameter, or the value does not fit; `MachineError` if the machine refuses.
    """
    with _changing() as store:
        _refuse_unconfirmed(store)
        state = store.state
        if any(link.name == policy for link in state.links):
            raise UsageError(
                f"`{policy}` is a link, which has no parameters",
                "change it in its file, and apply that",
            )
        _refuse_unknown([policy], state.names)
        old = state.unit_of(policy)
        known = next(p for p in old.policies if p.name == policy).parameters
        if parameter not in known:
            raise UsageError(
                f"`{policy}` has no parameter `{parameter}`",
                did_you_mean(parameter, known) or f"it has {', '.join(known) or 'none'}",
            )
        given = {**old.given, policy: {**old.given.get(policy, {}), parameter: value}}
        from itmlang.dispatch import OPTIMISATIONS
        from itmlang.pipeline import compile  # 0.1 s that no other change needs

        try:
            passes = OPTIMISATIONS if old.optimised else ()
            compiled = compile(old.source, replay(old), given=given, optimisations=passes)
            if any(table.tunnels for table in compiled.ruleset.tables):
                from runtime.capabilities import without_tunnels

                machine = without_tunnels(compiled.ruleset)
                if machine is not None:
                    compiled = compile(
                        old.source, replay(old), machine, given, optimisations=passes
                    )
        except CompileError as error:
            first = error.diagnostics[0]
            raise UsageError(
                f"`{parameter}` cannot be {value}: {first.message}; nothing was changed", first.help
            ) from error
        # What was removed of the file stays away.
        unit = unit_of(compiled, old.file, old.reads, given).without(set(old.removed))
        change = _of_unit(unit, state)
        if change.empty:
            return _applied(change, unit)
        said: list[str] = []
        why = f"set {policy}.{parameter} {value}"
        number = carry_out(store, change, why, tell=said.append)
        return _applied(change, unit, number, said)


def rollback(number: int = 0, tell: Tell | None = None) -> tuple[Generation | None, Plan]:
    """Go back to the generation before this one, or to one of those that are kept.

    Returns what holds now (None: nothing is loaded) with the plan that led there. Raises
    `UsageError` if there is no such generation, `MachineError` if it is damaged or the
    machine refuses; then nothing was changed.
    """
    with _changing() as store:
        if store.pending is not None:
            back = store.pending.back
            done = back_to(store, back)
            store.settle("rolled back")
            if number in (0, back):
                return done
        if not number:
            if not store.state.generation:
                raise UsageError(
                    "nothing is loaded: there is nothing to go back to",
                    "`itmc rollback --to N` loads one of those that are kept"
                    if store.numbers
                    else "",
                )
            number = store.generation(store.state.generation)[1].parent
            if number and number not in store.numbers:
                raise UsageError(
                    f"generation {number} is no longer kept",
                    "`itmc rollback --list` shows which are",
                )
        elif number not in store.numbers:
            raise UsageError(
                f"there is no generation {number}",
                "`itmc rollback --list` shows those that are kept",
            )
        return back_to(store, number, tell=tell)


def back_to(
    store: Store, number: int, *, sure: bool = False, tell: Tell | None = None
) -> tuple[Generation | None, Plan]:
    """Load a generation that is kept (0: the time before all), under the lock.

    With `sure`, also where the disk is too full to write that down.
    """
    wanted, made = store.generation(number) if number else (State(), None)
    state = store.state
    applied = {entry.name: entry.applied for entry in state.policies}
    entries = (replace(e, applied=applied.get(e.name, time.time())) for e in wanted.policies)
    wanted = replace(
        wanted,
        units=xt.fitted(steering.fitted(wanted.units, state)),
        policies=tuple(entries),
        listed=state.listed,
    )
    kept = store.left(number)
    change = plan(wanted, state, kernel(state, wanted), None, kept)
    carry_out(store, change, "", back=True, sure=sure, kept=kept, tell=tell)
    return made, change


def _go_back(store: Store, number: int) -> Generation | None:
    """Go back as the warden does: nobody is there to mend a full disk first."""
    _finish(store)
    return back_to(store, number, sure=True)[0]


def confirm() -> tuple[int, str]:
    """Keep the change that waits.

    Returns its generation, and why it would not survive a reboot ("" if it would).

    Raises `UsageError` if none waits, `RolledBackError` if it is too late.
    """
    with _changing() as store:
        pending = store.pending
        if pending is None:
            if store.ended == "rolled back":
                raise _too_late()
            raise UsageError("nothing waits to be confirmed")
        if overdue(pending) or store.state.generation != pending.generation:
            back_to(store, pending.back)
            store.settle("rolled back")
            raise _too_late()
        store.settle("confirmed")
        return pending.generation, store.keep_for_boot()


def _too_late() -> RolledBackError:
    return RolledBackError("too late: it was rolled back", "`itmc apply` loads it again")


def restore() -> tuple[Generation, Plan] | None:
    """Load the generation that was confirmed last, as at boot; None if none was kept.

    Raises `MachineError` if it is damaged or refused.
    """
    nft.require_rights()
    path = boot_file(confined=True)
    if path is None or not path.exists():
        return None
    wanted, made = read_generation(path)
    with _changing() as store:
        _refuse_unconfirmed(store)
        state = store.state
        gone = {name for unit in wanted.units if unit.program for name in unit.names}
        wanted = wanted.without(gone)  # no program has begun again
        entries = tuple(replace(e, applied=time.time()) for e in wanted.policies)
        wanted = replace(
            wanted,
            units=xt.fitted(steering.fitted(wanted.units, state)),
            policies=entries,
            listed=state.listed,
        )
        change = plan(wanted, state, kernel(state, wanted))
        if not change.empty or state.names != wanted.names:
            why = f"boot: {made.why.removeprefix('boot: ')}"
            carry_out(store, change, why, serve=False)
    return made, change


# The one way to change anything.


@contextmanager
def _changing(known: State | None = None) -> Iterator[Store]:
    """The state, for changing; what a killed command left half done is finished first."""
    nft.require_rights()
    with locked(known) as store:
        _finish(store)
        yield store


def _finish(store: Store) -> None:
    """Decide what holds where a command was ended before it could say: the kernel knows."""
    begun = store.begun()
    if begun is None:
        if steering.unsettled(store.folder):
            with suppress(MachineError, OSError):
                steering.settle(store.folder, store.state)
        return
    wanted, was = begun
    running = kernel(store.state, wanted)
    if wanted.generation == store.state.generation or any(
        fingerprint(running.get(path)) != form for path, form in was.items()
    ):
        store.commit(wanted)
        with suppress(MachineError):
            xt.fill(xt.missing(wanted, was))
        if store.pending is None:
            store.keep_for_boot()
    else:
        store.abandon()
        pending = store.pending
        if pending is not None and pending.generation == wanted.generation:
            store.settle("")
    serving.settle(store.folder)
    with suppress(MachineError, OSError):  # what wants more says what is wrong
        steering.settle(store.folder, store.state)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals that end a command come when this is done: it then knows what became of it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def carry_out(
    store: Store,
    change: Plan,
    why: str,
    *,
    back: bool = False,
    sure: bool = False,
    confirm: float = 0,
    kept: Left | None = None,
    boot: bool = True,
    serve: bool = True,
    forced: Sequence[str] = (),
    tell: Tell | None = None,
) -> int:
    """Carry a plan out under the lock, as a new generation or going back to one; `sure` if
    also where that cannot be written down. Links named in `forced` take the place of what
    somebody else has set.

    Returns the generation's number; without `boot` it is not there again after a reboot,
    without `serve` the runtime, and tunnels with it, are left to a service of its own.
    What else is to be said goes to `tell`. Raises `MachineError`; then nothing was changed.
    """
    before = store.state
    old, late = before.generation, not serve

    def dump(path: str, name: str) -> Sequence[Element]:
        found = kept.sets.get((path, name)) if kept is not None else None
        return found.elements if found is not None else _dump(path, name)

    contents = Contents(change.moves, dump)
    try:
        left = _leaving(change, tell)
        try:
            state = (
                store.prepare_back(change.state, change.was)
                if back
                else store.prepare(change.state, why, change.digest, change.was)
            )
            store.leave(old, left)
        except MachineError:
            if not sure:
                raise
            state = change.state
        if serve:
            try:
                serving.prepare(store.folder, state.generation, state, _changed(store.state, state))
            except (MachineError, CompileError) as error:
                if not sure:
                    raise
                why_not = error if isinstance(error, MachineError) else error.diagnostics[0]
                _tell(tell, why_not.message)
                serve = False
        try:
            if not late:
                steering.prepare(store.folder, store.state, state, forced)
        except MachineError as error:
            if not sure:
                raise
            _tell(tell, error.message)
        if confirm:
            arm(store, state.generation, old, confirm, _go_back)
        script = _script(change, _continued(change, kept), dump, contents)
        if serve and script.lines:
            for command in serving.signs_of_life(state, change.touched):
                script.say(command)
        empty = xt.missing(state, change.touched)
    except BaseException:
        _nothing_done(store, confirm)
        raise
    with _undisturbed():
        try:
            if script.lines:
                _load(script)
        except MachineError as error:
            # Where libnftables crashed, only the kernel knows; the next change asks it.
            if isinstance(error.__cause__, NftRefusalError):
                _nothing_done(store, confirm)
            raise
        # The kernel has it already: what fails from here on must not look like a refusal.
        try:
            xt.fill(empty)
            xt.fill(xt.missing(state, change.touched))  # what the transaction emptied
        except MachineError as error:
            _tell(tell, error.message)
        try:
            store.commit(state)
        except (MachineError, OSError) as error:
            _tell(tell, f"what was loaded could not be written down: {error}")
            return state.generation
        for bits in _forgotten_decisions(before, state):
            with suppress(OSError):  # no connection is tracked here
                netlink.clear_marks(bits)
        serving.settle(store.folder)
        decisions.forget(store.folder, state.names)
        try:
            if not late:
                for text in steering.settle(store.folder, state):
                    _tell(tell, text)
        except (MachineError, OSError) as error:
            _tell(tell, f"links or tunnels that are no longer wanted are still there: {error}")
        with suppress(MachineError, OSError):
            correct(change.moves, contents)
            seen = {t.path: state.listed.get(t.path, {}) for t in state.tables}
            store.seen(seen | {path: _listed(path) for path in change.touched if path in seen})
            if change.resized:
                _insist(store, change)
        if boot and not confirm:
            with suppress(MachineError, OSError):
                _keep_for_boot(store, tell)
        for name, number in contents.cut.items():
            _tell(tell, f"{name}: {number} entries found no room in its new size")
    return state.generation


def _changed(old: State, new: State) -> set[str]:
    """The files of units that were not loaded like this before."""
    before = {unit.file: unit.made_of for unit in old.units}
    return {unit.file for unit in new.units if before.get(unit.file) != unit.made_of}


def _forgotten_decisions(before: State, state: State) -> set[int]:
    """The bits of connections' marks that held decisions, and mean something else now."""

    def held(one: State) -> set[tuple[str, int, tuple[str, ...]]]:
        return {(q.policy, q.kept, q.decisions) for t in one.tables for q in t.queues if q.kept}

    return {bits for _, bits, _ in held(before) - held(state)}


def _tell(tell: Tell | None, text: str) -> None:
    if tell is not None:
        tell(text)


def _keep_for_boot(store: Store, tell: Tell | None) -> None:
    why_not = store.keep_for_boot()
    if why_not:
        _tell(tell, f"this would not survive a reboot: {why_not}")


def _insist(store: Store, change: Plan) -> None:
    """Make sets anew that did not get their size or time-out.

    Linux 6.1 takes a new one for a set that is there, and ignores it.
    """
    state = store.state
    again = plan(state, state, kernel(state), change.touched)
    if again.empty:
        return
    contents = Contents(again.moves, _dump)
    _load(_script(again, {}, _dump, contents))
    correct(again.moves, contents)
    store.seen(dict(state.listed) | {path: _listed(path) for path in again.touched})


def _nothing_done(store: Store, confirm: float) -> None:
    store.abandon()
    if confirm:
        store.settle("")  # nothing has to go back
    serving.settle(store.folder)
    with suppress(MachineError, OSError):
        steering.settle(store.folder, store.state)


def _script(
    change: Plan,
    counters: Mapping[tuple[str, str], tuple[int, int]],
    dump: Dump,
    contents: Contents | None = None,
) -> Script:
    """The transaction, elements and counters included."""
    contents = contents or Contents(change.moves, dump)
    script = Script([*change.before.lines], [*change.before.spans])
    for (path, name), _ in change.counters:
        packets, size = counters.get((path, name), (0, 0))
        script.say(f"add counter {path} {name} {{ packets {packets} bytes {size} }}")
    for move in change.moves:
        for command in contents.commands(move):
            script.say(command, move.target.span)
    script.lines += change.after.lines
    script.spans += change.after.spans
    return script


def _continued(change: Plan, kept: Left | None) -> dict[tuple[str, str], tuple[int, int]]:
    """What the new counters begin with."""
    running: dict[str, dict[str, tuple[int, int]]] = {}
    found = {}
    for target, (path, name) in change.counters:
        if kept is not None and (path, name) in kept.counters:
            found[target] = kept.counters[path, name]
            continue
        if path not in running:
            running[path] = nft.counters(path)
        found[target] = running[path].get(name, (0, 0))
    return found


def _leaving(change: Plan, tell: Tell | None) -> Left:
    """What goes with a plan, and what it learned."""
    learned = [(p, s) for p, s in change.leaving.sets if s.role in ("count", "learned")]
    for name in dict.fromkeys(one.name for _, one in learned if one.size > _LARGEST_KEPT):
        _tell(tell, f"{name} is too large to be kept for a rollback (over {_LARGEST_KEPT} entries)")
    sets = {
        (path, one.name): Kept(one.key, tuple(nft.elements(path, one.name)))
        for path, one in learned
        if one.size <= _LARGEST_KEPT
    }
    running = {path: nft.counters(path) for path in {p for p, _ in change.leaving.counters}}
    counters = {
        (path, name): running[path][name]
        for path, name in change.leaving.counters
        if name in running[path]
    }
    return Left(sets, counters)


def _dump(path: str, name: str) -> Sequence[Element]:
    return nft.elements(path, name)


def correct(moves: Sequence[Move], contents: Contents) -> None:
    """Put flows right that got packets while their threshold moved."""
    pairs = [
        (move, (path, source.name))
        for move in moves
        if move.how in ("budget", "over")
        for path, source in move.sources
    ]
    before = {key: contents.of(*key) for _, key in pairs}
    for _ in range(_CORRECTIONS if pairs else 0):
        now = {key: _dump(*key) for key in before}
        commands, late = [], 0
        for move, key in pairs:
            found, many = corrections(move, before[key], now[key])
            commands += found
            late += many
        if not late:
            return
        with suppress(NftRefusalError):  # a flow may have expired meanwhile
            nft.load("".join(f"{command}\n" for command in commands))
        before = now


def _load(script: Script, *, check: bool = False) -> None:
    """The transaction; a refusal is shown at the policy's lines."""
    try:
        nft.load(script.text, check=check)
    except NftRefusalError as refusal:
        diagnostics = []
        for error in refusal.errors:
            index = error.line - 1
            span = script.spans[index] if 0 <= index < len(script.spans) else None
            message = f"the kernel refused this: {error.message}"
            absent = _absent_at(script.lines, error.line)
            if absent:
                message = f"there is no device {absent} here"
            place = "" if span else "nftables"
            diagnostics.append(Diagnostic("E060", message, span, place=place))
        raise MachineError(
            "nftables refused the ruleset; nothing was changed",
            "`itmc compile` shows the rules",
            tuple(dict.fromkeys(diagnostics)),
        ) from refusal


def _absent_at(lines: Sequence[str], line: int) -> str:
    """The device that is missing for the base chain that begins at a line, or has its hook there.

    Linux takes such chains since 6.16, and then waits for the device.
    """
    for text in lines[max(0, line - 1) : line + 1]:
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


# What the kernel has of ours.


def our_tables() -> list[str]:
    """The tables of ours that exist, as `family name`."""
    return [path for path in nft.tables() if path.split()[1].startswith(TABLE_PREFIX)]


def kernel(*states: State) -> dict[str, Running]:
    """The tables of these states that the kernel has."""
    wanted = {table.path for state in states for table in state.tables}
    return {path: nft.table(path) for path in our_tables() if path in wanted}


def _listed(path: str) -> dict[str, str]:
    try:
        return listed(nft.table(path))
    except MachineError:
        return {}  # nftables cannot list what it took


# Refusals.


def _refuse_unknown(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise UsageError(
                f"no policy `{name}` is loaded",
                did_you_mean(name, known) or "`itmc list` shows what is loaded",
            )


def _refuse_unconfirmed(store: Store) -> None:
    """While a change waits to be confirmed, nothing else may come between.

    If its time is over (whoever should have gone back was ended), it goes back now.
    """
    pending = store.pending
    if pending is None:
        return
    if overdue(pending):
        made, _ = back_to(store, pending.back)
        store.settle("rolled back")
        warning("the last change was not confirmed in time; %s first", told(made))
        return
    raise MachineError(
        "the last `apply --confirm` waits to be confirmed; nothing was changed",
        "`itmc confirm` keeps it, `itmc rollback` takes it back",
    )


def _refuse_foreign(unit: Unit, state: State) -> None:
    """A policy name belongs to the file that brought it, and so does a table."""
    errors = []
    others = [other for other in state.units if other.file != unit.file]
    for table in unit.ruleset.tables:
        # What is left of policies that shared it still goes by the first one's name.
        for other in others:
            taken = [t for t in other.ruleset.tables if t.path == table.path]
            if taken and table.policies[0] not in other.names:
                errors.append(
                    Diagnostic(
                        "E050",
                        f"`{taken[0].policies[0]}`, from {other.shown}, has the table {table.name}",
                        table.span,
                        help="give the policy another name, or "
                        f"`itmc remove {taken[0].policies[0]}` first",
                    )
                )
    queues = [queue for table in unit.ruleset.tables for queue in table.queues]
    errors += [
        _collision(queue, theirs, other)
        for queue in queues
        for other in others
        for table in other.ruleset.tables
        for theirs in table.queues
        if _collides(queue, theirs)
    ]
    for link in unit.links:
        errors += _taken(link, others)
    for policy in unit.policies:
        owner = next((o for o in others if policy.name in {*o.names, *o.link_names}), None)
        if owner is not None:
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


def _taken(link: Link, others: Sequence[Unit]) -> list[Diagnostic]:
    """A link's name, and its interface, belong to the file that brought them."""
    for other in others:
        for theirs in other.links:
            same = theirs.name == link.name or theirs.handle == link.handle
            if same or (overlap(theirs, link) and theirs.ingress == link.ingress):
                what = "has that name" if same else f"is a link of {theirs.interface}, too"
                return [
                    Diagnostic(
                        "E050", f"`{theirs.name}`, from {other.shown}, {what}", link.at,
                        help=f"`itmc remove {theirs.name}` first, or write both in one file",
                    )
                ]  # fmt: skip
        if link.name in other.names:
            help = f"give it another name, or `itmc remove {link.name}` first"
            message = f"a policy named `{link.name}` is loaded already, from {other.shown}"
            return [Diagnostic("E050", message, link.span, help=help)]
    return []


def _collides(one: Queue, other: Queue) -> bool:
    """Do policies of two files have queues in common, or bits for what they decide?"""
    apart = one.first + one.many <= other.first or other.first + other.many <= one.first
    return not apart or bool(one.kept & other.kept)


def _collision(one: Queue, other: Queue, unit: Unit) -> Diagnostic:
    if one.kept & other.kept:
        message = f"`{other.policy}`, from {unit.shown}, keeps its decisions in the same bits"
        help = "policies that decide `once per connection` belong in one file"
    else:
        message = f"`{other.policy}`, from {unit.shown}, has the queue {other.first}, too"
        help = f"give one of them another: `queues {one.many} from N`"
    return Diagnostic("E064", message, one.span, help=help)
