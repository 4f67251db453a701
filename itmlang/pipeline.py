"""The passes, in order: text -> trees -> declarations -> checked -> simplified -> ruleset -> text -> allowed by the machine."""

import gc
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from itmlang import ir
from itmlang.capabilities import EVERYTHING, Capabilities
from itmlang.check import check, check_instance
from itmlang.diagnostics import Diagnostic, Findings
from itmlang.dispatch import OPTIMISATIONS
from itmlang.evaluate import Scope
from itmlang.links import Link
from itmlang.modules import load
from itmlang.nft.lower import lower
from itmlang.nft.model import Ruleset
from itmlang.nft.needs import refuse_lacking
from itmlang.nft.queueing import for_xt
from itmlang.nft.text import Text, print_ruleset
from itmlang.nft.variants import varied
from itmlang.overlaying import named_sets, overlays
from itmlang.place import Placement, place, place_link
from itmlang.resolve import Given, Program, resolve, with_values
from itmlang.simplify import Simplified, shape, simplify
from itmlang.source import Reader, Source, no_files
from itmlang.trials import Trial, read_trials


@dataclass(frozen=True)
class Checked:
    """What a policy file means, and what was said about it."""

    source: Source
    policies: tuple[ir.Policy, ...]
    trials: tuple[Trial, ...]
    links: tuple[Link, ...]
    warnings: tuple[Diagnostic, ...]


@dataclass(frozen=True)
class Compiled:
    """A policy file in all its later forms.

    `optimisations` are those of `dispatch` that were allowed.
    """

    source: Source
    policies: tuple[ir.Policy, ...]
    trials: tuple[Trial, ...]
    simplified: tuple[Simplified, ...]
    placements: tuple[Placement, ...]
    ruleset: Ruleset
    text: Text
    warnings: tuple[Diagnostic, ...]
    optimisations: frozenset[str]


def analyse(source: Source, read: Reader = no_files, given: Given | None = None) -> Checked:
    """Parse and check; `read` gives the files that this one names, `given` values of parameters.

    Raises `CompileError` with all the errors found.
    """
    findings = Findings()
    with _no_collection():
        _, policies, links, trials = _analyse(source, read, findings, given)
    return Checked(source, policies, trials, links, findings.diagnostics)


def compile(
    source: Source,
    read: Reader = no_files,
    capabilities: Capabilities = EVERYTHING,
    given: Given | None = None,
    queue: str = "",
    optimisations: Collection[str] = OPTIMISATIONS,
) -> Compiled:
    """All passes; `read` gives the files that this one names, `given` values of parameters.

    `queue` is the form of rules to queues, "native" or "xt"; what the machine takes if left out.
    `optimisations` are the passes of `dispatch` to be done: each may be left out, and the
    ruleset means the same.

    Raises `CompileError` with all the errors found, also where a policy needs what the
    machine of the `capabilities` lacks.
    """
    findings = Findings()
    with _no_collection():
        program, policies, links, trials = _analyse(source, read, findings, given)
        others = {
            (policy.name, one.written): [
                _moved(program, policies, links, policy, one.written, step) for step in one.steps
            ]
            for policy in policies
            for one in policy.controllers
        }
        return lowered(
            source, policies, trials, findings, capabilities, queue, links, others, optimisations
        )


def _moved(
    program: Program,
    policies: Sequence[ir.Policy],
    links: Sequence[Link],
    policy: ir.Policy,
    parameter: str,
    step: str,
) -> ir.Policy:
    """A policy with another value of a parameter that has a controller."""
    instance = next(one for one in program.instances if one.name.text == policy.name)
    quiet = Findings()  # what there is to say was said
    given = with_values(instance, {parameter: step}, quiet)
    moved = check_instance(
        given, program.sets, quiet, {link.name: link for link in links},
        {one.overlay.name: one.overlay for one in policies if one.overlay is not None},
    )  # fmt: skip
    quiet.raise_errors()
    assert moved is not None
    return moved


def lowered(
    source: Source,
    policies: tuple[ir.Policy, ...],
    trials: tuple[Trial, ...],
    findings: Findings,
    capabilities: Capabilities = EVERYTHING,
    queue: str = "",
    links: tuple[Link, ...] = (),
    others: Mapping[tuple[str, str], Sequence[ir.Policy]] | None = None,
    optimisations: Collection[str] = OPTIMISATIONS,
) -> Compiled:
    """Checked policies through the later passes. Raises `CompileError`.

    `others` are, by name and parameter, the policies that have controllers, for each value.
    """
    simplified = tuple(simplify(_asked_of_kernel(policy), findings) for policy in policies)
    findings.raise_errors()
    scheduled = tuple(link for link in links if not link.only_marks)
    quiet = Findings()
    moved = {
        key: [simplify(_asked_of_kernel(one), quiet) for one in several]
        for key, several in (others or {}).items()
    }

    def made(several: Sequence[Simplified], findings: Findings) -> Ruleset:
        names = [s.policy.name for s in simplified if not _steady(s, moved)]
        return lower(source.name, several, findings, capabilities, optimisations, names)

    ruleset = replace(made(simplified, findings), links=scheduled)
    _vary(ruleset, policies, simplified, moved, findings, made)
    handing = {one.policy: one for table in ruleset.tables for one in table.queues}
    tunnels = [one for table in ruleset.tables for one in table.tunnels]
    placements = tuple(
        one
        for p in policies
        for one in place(
            p, handing.get(p.name), [t for t in tunnels if t.policy == p.name], capabilities
        )
    ) + tuple(place_link(link) for link in links)
    if (queue or capabilities.queue) == "xt":
        ruleset = for_xt(ruleset)
    text = print_ruleset(ruleset)
    refuse_lacking(text, capabilities, findings)
    findings.raise_errors()
    return Compiled(
        source,
        policies,
        trials,
        simplified,
        placements,
        ruleset,
        text,
        findings.diagnostics,
        frozenset(optimisations),
    )


def _steady(simple: Simplified, moved: Mapping[tuple[str, str], Sequence[Simplified]]) -> bool:
    """Do the classes look up the same values, whatever the policy's controllers do?"""

    def asked(one: Simplified) -> list[object]:
        return [
            (rule.name, [shape(t) for t in ir.leaves(rule.condition) if not isinstance(t, ir.Over)])
            for rule in one.rules
        ]

    others = [
        o for (name, _), several in moved.items() if name == simple.policy.name for o in several
    ]
    return not others or all(asked(other) == asked(simple) for other in others)


def _vary(
    ruleset: Ruleset,
    policies: Iterable[ir.Policy],
    simplified: Sequence[Simplified],
    others: Mapping[tuple[str, str], Sequence[Simplified]],
    findings: Findings,
    made: Callable[[Sequence[Simplified], Findings], Ruleset],
) -> None:
    """Put the rules that controllers move into the ruleset, for each value."""
    for policy in policies:
        table, quiet = ruleset.table_of(policy.name), Findings()
        for one in policy.controllers:
            tables = [
                made(
                    [other if s.policy.name == policy.name else s for s in simplified], quiet
                ).table_of(policy.name)
                for other in others.get((policy.name, one.written), ())
            ]
            if tables:
                one = varied(table, policy.name, one, tables, findings)
            table.controllers.append(one)
        table.timers += policy.timers


def _asked_of_kernel(policy: ir.Policy) -> ir.Policy:
    """What a policy learns in Python is known there alone: its interest is asked again."""
    if not policy.in_python:
        return policy
    terms = [
        term
        for term in policy.interest.terms
        if not any(isinstance(leaf, ir.Member) for leaf in ir.leaves(term))
    ]
    return replace(policy, interest=ir.And(tuple(terms), policy.interest.span))


def _analyse(
    source: Source, read: Reader, findings: Findings, given: Given | None = None
) -> tuple[Program, tuple[ir.Policy, ...], tuple[Link, ...], tuple[Trial, ...]]:
    program = resolve(load(source, read, findings), read, findings, given)
    found = overlays(program.overlays, Scope(program.sets), findings)
    program = replace(program, sets={**program.sets, **named_sets(program.overlays, found)})
    policies, links = check(program, found, findings)
    trials = read_trials(program, policies, links, findings)
    findings.raise_errors()
    return program, policies, links, trials


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python looks for no cycles meanwhile.

    The passes leave none, and to go through all that they have made, again and again,
    would take as long as the passes themselves.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
