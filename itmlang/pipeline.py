"""The passes, in order: text -> trees -> declarations -> checked -> simplified -> placed -> ruleset -> text."""

from dataclasses import dataclass

from itmlang import ir
from itmlang.check import check
from itmlang.diagnostics import Diagnostic, Findings
from itmlang.modules import Reader, load, no_files
from itmlang.nft.lower import lower
from itmlang.nft.model import Ruleset
from itmlang.nft.text import Text, print_ruleset
from itmlang.place import Placement, place
from itmlang.resolve import resolve
from itmlang.simplify import Simplified, simplify
from itmlang.source import Source
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
    policies, trials = _analyse(source, read, findings)
    return Checked(source, policies, trials, findings.diagnostics)


def compile(source: Source, read: Reader = no_files) -> Compiled:
    """All passes; `read` gives the files that this one names. Raises `CompileError` with all the errors found."""
    findings = Findings()
    policies, trials = _analyse(source, read, findings)
    return lowered(source, policies, trials, findings)


def lowered(
    source: Source,
    policies: tuple[ir.Policy, ...],
    trials: tuple[Trial, ...],
    findings: Findings,
) -> Compiled:
    """Checked policies through the later passes. Raises `CompileError`."""
    simplified = tuple(simplify(policy, findings) for policy in policies)
    findings.raise_errors()
    placements = tuple(p for s in simplified for p in place(s.policy, s.whole.facts))
    ruleset = lower(source.name, simplified, findings)
    return Compiled(
        source,
        policies,
        trials,
        simplified,
        placements,
        ruleset,
        print_ruleset(ruleset),
        findings.diagnostics,
    )


def _analyse(
    source: Source, read: Reader, findings: Findings
) -> tuple[tuple[ir.Policy, ...], tuple[Trial, ...]]:
    program = resolve(load(source, read, findings), read, findings)
    policies = check(program, findings)
    trials = read_trials(program, policies, findings)
    findings.raise_errors()
    return policies, trials
