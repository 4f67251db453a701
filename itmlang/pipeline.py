"""The passes, in order: text -> trees -> declarations -> checked -> simplified -> placed -> ruleset -> text -> allowed by the machine."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from itmlang import ir
from itmlang.capabilities import EVERYTHING, Capabilities
from itmlang.check import check
from itmlang.diagnostics import Diagnostic, Findings
from itmlang.modules import load
from itmlang.nft.lower import lower
from itmlang.nft.model import Ruleset
from itmlang.nft.needs import refuse_lacking
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
) -> Compiled:
    """All passes; `read` gives the files that this one names, `given` values of parameters.

    Raises `CompileError` with all the errors found, also where a policy needs what the
    machine of the `capabilities` lacks.
    """
    findings = Findings()
    with _no_collection():
        policies, trials = _analyse(source, read, findings, given)
        return lowered(source, policies, trials, findings, capabilities)


def lowered(
    source: Source,
    policies: tuple[ir.Policy, ...],
    trials: tuple[Trial, ...],
    findings: Findings,
    capabilities: Capabilities = EVERYTHING,
) -> Compiled:
    """Checked policies through the later passes. Raises `CompileError`."""
    simplified = tuple(simplify(policy, findings) for policy in policies)
    findings.raise_errors()
    placements = tuple(p for s in simplified for p in place(s.policy, s.whole.facts))
    ruleset = lower(source.name, simplified, findings)
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
