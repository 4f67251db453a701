"""`itmc plan`: what `apply` would change on this machine."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from difflib import unified_diff
from typing import Any, Final

import click

from runtime.apply import planned
from runtime.cli.exits import CHANGES
from runtime.cli.files import file_argument, optimise_option, unit
from runtime.cli.output import as_json, say
from runtime.plan import Change, Plan
from runtime.store import load
from runtime.units import Unit

_MOST_SHOWN: Final = 12  # changes of one kind of a policy, without --rules
_KINDS: Final = (
    "table",
    "chain",
    "set",
    "map",
    "counter",
    "tunnel",
    "link",
)  # and what others made
_MOST_LINES: Final = 60  # of a diff
_SIGNS: Final = {"create": "+", "delete": "-", "replace": "~", "migrate": ">", "keep": "="}
_COLOURS: Final = {"+": "green", "-": "red", "~": "yellow", ">": "cyan"}


@click.command()
@file_argument
@click.option("--rules", is_flag=True, help="Show each object and the rules that come and go.")
@click.option("--json", "in_json", is_flag=True, help="As JSON, all objects.")
@click.option("--exit-code", "tell", is_flag=True, help="Exit with 4 if there are changes.")
@optimise_option
def command(file: str | None, rules: bool, in_json: bool, tell: bool, optimise: bool) -> None:
    """Show what `itmc apply FILE` would change, object by object, and change nothing.

    It is held against what the kernel has now. `+` comes, `-` goes, `~` is replaced,
    `>` is made anew with what it learned; everything else stays as it is.
    `itmc apply --digest D` does it only if the plan is still this one.
    """
    state = load()
    wanted = unit(file, state, optimise)
    plan, _ = planned(wanted, state)
    if in_json:
        as_json(_json(plan))
    elif plan.empty:
        click.echo(f"{wanted.shown}: no changes (digest {plan.digest})")
    else:
        old = state.unit(wanted.file)
        _show_lines(old, wanted)
        _show(plan, rules)
        click.echo(f"\ndigest {plan.digest}")
    if tell and not plan.empty:
        raise click.exceptions.Exit(CHANGES)


def _json(plan: Plan) -> dict[str, Any]:
    return {
        "schema": 1,
        "digest": plan.digest,
        "changed": not plan.empty,
        "removed": list(plan.deleted),
        "changes": [
            {**asdict(c), "rules": [{"sign": sign, "rule": rule} for sign, rule in c.rules]}
            for c in plan.changes
        ],
    }


def _show_lines(old: Unit | None, new: Unit) -> None:
    """The lines of the policy that changed."""
    if old is None:
        return
    before = {old.source.name: old.source.text} | {r.source.name: r.source.text for r in old.reads}
    after = {new.source.name: new.source.text} | {r.source.name: r.source.text for r in new.reads}
    for policy, values in old.given.items():
        for name, value in values.items():
            say(f"{policy}.{name} = {value}, which was set by hand, goes back to the file's value")
    for name in dict.fromkeys([*before, *after]):
        lines = list(
            unified_diff(
                before.get(name, "").splitlines(), after.get(name, "").splitlines(),
                f"{name} (loaded)", name, lineterm="", n=1,
            )
        )  # fmt: skip
        for line in lines[:_MOST_LINES]:
            _coloured(line, line[:1] if line[:1] in "+-" else "")
        if len(lines) > _MOST_LINES:
            say(f"… and {len(lines) - _MOST_LINES} more lines")
        if lines:
            say("")


def _show(plan: Plan, rules: bool) -> None:
    groups: dict[tuple[str, str], list[Change]] = {}
    for change in plan.changes:
        groups.setdefault((change.table, change.policy), []).append(change)
    for (table, policy), changes in groups.items():
        if all(change.action == "keep" for change in changes):
            continue
        say(f"{policy or 'shared'} ({table})" if table else policy)
        for kind in dict.fromkeys((*_KINDS, *(change.kind for change in changes))):
            _show_kind([c for c in changes if c.kind == kind and c.action != "keep"], rules)
        kept = Counter(change.kind for change in changes if change.action == "keep")
        if kept:
            say("  = " + ", ".join(_many(n, kind) for kind, n in kept.items()) + _stay(kept))
    if plan.deleted:
        say(f"removed: {', '.join(plan.deleted)}")
    actions = Counter(change.action for change in plan.changes)
    say("\n" + ", ".join(f"{actions.get(a, 0)} {a}" for a in _SIGNS))


def _stay(kept: Counter[str]) -> str:
    return " stays" if sum(kept.values()) == 1 else " stay"


def _show_kind(changes: Sequence[Change], rules: bool) -> None:
    for change in changes if rules else changes[:_MOST_SHOWN]:
        sign = _SIGNS[change.action]
        told = f"  {sign} {change.kind} {change.name}"
        told += f": {change.note}" if change.note else ""
        told += _learned(change)
        _coloured(told, sign)
        if rules:
            for mark, rule in change.rules:
                _coloured(f"      {mark} {rule}", mark)
        elif change.rules and change.action != "create":
            say(f"      rules: {_counts(mark for mark, _ in change.rules)}")
    if not rules and len(changes) > _MOST_SHOWN:
        actions = Counter(change.action for change in changes[_MOST_SHOWN:])
        told = ", ".join(f"{n} to {action}" for action, n in actions.items())
        say(
            f"    … and {_many(len(changes) - _MOST_SHOWN, changes[0].kind)} more: {told} (--rules shows all)"
        )


def _learned(change: Change) -> str:
    match change.learned:
        case "lost":
            return " [what it learned is LOST]"
        case "kept" | "carried":
            return " [what it learned stays]"
        case _:
            return ""


def _counts(marks: Iterable[str]) -> str:
    words = {"+": "come", "-": "go", "~": "only point to another line"}
    found = Counter(marks)
    return ", ".join(f"{found[mark]} {word}" for mark, word in words.items() if found[mark])


def _many(number: int, kind: str) -> str:
    return f"{number} {kind}{'s' if number != 1 else ''}"


def _coloured(text: str, sign: str) -> None:
    say(text, _COLOURS.get(sign, ""))
