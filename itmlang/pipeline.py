"""The passes, in order: text -> tree -> checked -> simplified -> placed -> ruleset -> text."""

from dataclasses import dataclass

from itmlang import ir
from itmlang.check import check
from itmlang.diagnostics import Diagnostic, Findings
from itmlang.nft.lower import lower
from itmlang.nft.model import Ruleset
from itmlang.nft.text import Text, print_ruleset
from itmlang.parser import parse
from itmlang.place import Placement, place
from itmlang.simplify import Simplified, simplify
from itmlang.source import Source


@dataclass(frozen=True)
class Checked:
    """What a policy file means, and what was said about it."""

    source: Source
    policies: tuple[ir.Policy, ...]
    warnings: tuple[Diagnostic, ...]


@dataclass(frozen=True)
class Compiled:
    """A policy file in all its later forms."""

    source: Source
    policies: tuple[ir.Policy, ...]
    simplified: tuple[Simplified, ...]
    placements: tuple[Placement, ...]
    ruleset: Ruleset
    text: Text
    warnings: tuple[Diagnostic, ...]


def analyse(source: Source) -> Checked:
    """Parse and check. Raises `CompileError` with all the errors found."""
    findings = Findings()
    policies = _analyse(source, findings)
    return Checked(source, policies, findings.diagnostics)


def compile(source: Source) -> Compiled:
    """All passes. Raises `CompileError` with all the errors found."""
    findings = Findings()
    policies = _analyse(source, findings)
    simplified = tuple(simplify(policy, findings) for policy in policies)
    findings.raise_errors()
    placements = tuple(p for s in simplified for p in place(s.policy, s.whole.facts.families))
    ruleset = lower(source.name, simplified, findings)
    return Compiled(
        source,
        policies,
        simplified,
        placements,
        ruleset,
        print_ruleset(ruleset),
        findings.diagnostics,
    )


def _analyse(source: Source, findings: Findings) -> tuple[ir.Policy, ...]:
    policies = check(parse(source, findings), findings)
    findings.raise_errors()
    return policies
