"""Policies forced to Python, and the text of rules to queues that any kernel takes."""

from dataclasses import replace

from itmlang.diagnostics import Findings
from itmlang.nft.model import Ruleset
from itmlang.nft.queueing import for_xt
from itmlang.nft.text import print_ruleset
from itmlang.pipeline import Compiled, lowered
from itmlang.workers import refuse


def in_python(compiled: Compiled) -> tuple[Compiled | None, str]:
    """The same policies, all in Python; or why Python cannot have them."""
    policies = tuple(replace(p, in_python=True) for p in compiled.policies)
    findings = Findings()
    for policy in policies:
        refuse(policy, policy.span, findings)
    learned = [one for p in policies for one in p.learned]
    if findings.failed:
        return None, findings.diagnostics[0].message
    if len(learned) != len(set(learned)):
        return None, "policies share a learned set"
    if any(s.in_python for p in compiled.policies for steps in p.process.values() for s in steps):
        return None, "it is in Python already"
    return lowered(compiled.source, policies, compiled.trials, Findings()), ""


def xt_text(ruleset: Ruleset) -> str:
    """The text to load on a kernel without nftables' own `queue`."""
    return print_ruleset(for_xt(ruleset)).text
