"""The passes, in order: text -> trees -> declarations -> checked -> simplified -> ruleset -> text -> allowed by the machine."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from itmlang import ir
from itmlang.capabilities import EVERYTHING, Capabilities
from itmlang.check import check
from itmlang.diagnostics import Diagnostic, Findings
from itmlang.modules import load
from itmlang.nft.lower import lower
from itmlang.nft.model import Ruleset
from itmlang.nft.needs import refuse_lacking
from itmlang.nft.queueing import for_xt
from itmlang.nft.text import Text, print_ruleset
from itmlang.place import Placement, place
from itmlang.resolve import Given, resolve
from itmlang.simplify import Simplified, simplify
from itmlang.source import Reader, Source, no_files
from itmlang.trials import Trial, read_trials


@dataclass(frozen=True)
class Checked:
    """What a policy file means, and what was said about it."""

    source: Source
    policies: tuple[ir.Policy, ...]
    trials: tuple[Trial, ...]
    warnings: tuple[Diagnostic, ...]


@dataclass(frozen=True)
class Compiled:
    """A policy file in all its later forms."""

    source: Source
    policies: tuple[ir.Policy, ...]
    trials: tuple[Trial, ...]
    simplified: tuple[Simplified, ...]
    placements: tuple[Placement, ...]
    ruleset: Ruleset
    text: Text
    warnings: tuple[Diagnostic, ...]


def analyse(source: Source, read: Reader = no_files) -> Checked:
    """Parse and check; `read` gives the files that this one names.

    Raises `CompileError` with all the errors found.
    """
    findings = Findings()
    with _no_collection():
        policies, trials = _analyse(source, read, findings)
    return Checked(source, policies, trials, findings.diagnostics)


def compile(
    source: Source,
    read: Reader = no_files,
    capabilities: Capabilities = EVERYTHING,
    given: Given | None = None,
    queue: str = "",
) -> Compiled:
    """All passes; `read` gives the files that this one names, `given` values of parameters.

    `queue` is the form of rules to queues, "native" or "xt"; what the machine takes if left out.

    Raises `CompileError` with all the errors found, also where a policy needs what the
    machine of the `capabilities` lacks.
    """
    findings = Findings()
    with _no_collection():
        policies, trials = _analyse(source, read, findings, given)
        return lowered(source, policies, trials, findings, capabilities, queue)


def lowered(
    source: Source,
    policies: tuple[ir.Policy, ...],
    trials: tuple[Trial, ...],
    findings: Findings,
    capabilities: Capabilities = EVERYTHING,
    queue: str = "",
) -> Compiled:
    """Checked policies through the later passes. Raises `CompileError`."""
    simplified = tuple(simplify(_asked_of_kernel(policy), findings) for policy in policies)
    findings.raise_errors()
    ruleset = lower(source.name, simplified, findings, capabilities)
    handing = {one.policy: one for table in ruleset.tables for one in table.queues}
    tunnels = [one for table in ruleset.tables for one in table.tunnels]
    placements = tuple(
        one
        for p in policies
        for one in place(
            p, handing.get(p.name), [t for t in tunnels if t.policy == p.name], capabilities
        )
    )
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
    )


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
) -> tuple[tuple[ir.Policy, ...], tuple[Trial, ...]]:
    program = resolve(load(source, read, findings), read, findings, given)
    policies = check(program, findings)
    trials = read_trials(program, policies, findings)
    findings.raise_errors()
    return policies, trials


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
