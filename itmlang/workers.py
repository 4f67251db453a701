"""What a policy cannot have in Python: its workers ask no connection tracking, and each learns alone.

Packets of the same addresses and ports stay with one worker, both directions of them; so
what is kept for each such flow is whole, and all else that a policy keeps needs one queue.
"""

from collections.abc import Iterator
from typing import Final

from itmlang import ir
from itmlang.diagnostics import Findings
from itmlang.fields import EGRESS, FIELDS, INGRESS, hook_kind
from itmlang.source import Span

# What packets have in common that stay with one worker.
_TOGETHER: Final = frozenset(FIELDS[name] for name in ("saddr", "sport", "daddr", "dport"))
_CODE: Final = "E034"


def refuse(policy: ir.Policy, run: Span, findings: Findings) -> None:
    """An error for each thing in the policy's Python part that cannot be there.

    `run` is where it says `run python`, if it does.
    """
    if policy.in_python:
        _kernels_own(policy, run, findings)
    for steps in policy.process.values():
        for step in ir.every_step(steps if policy.in_python else ir.handed_over(steps)):
            if step.action.kernels_own:
                findings.error(
                    _CODE, step.action.kernels_own, step.span,
                    help=f"write `{step.action}` before what needs Python",
                )  # fmt: skip
    _of_connections(policy, findings)
    if policy.queueing.number > 1:
        _of_several(policy, findings)


def _kernels_own(policy: ir.Policy, run: Span, findings: Findings) -> None:
    """What only the kernel has."""

    def refused(message: str, span: Span) -> None:
        notes = () if span == run else (("the policy says `run python` here", run),)
        findings.error(_CODE, message, span, notes=notes)

    for hook in policy.hooks:
        if hook_kind(hook) in (INGRESS, EGRESS):
            refused(f"the kernel queues no packets at {hook_kind(hook)}", run)
    for leaf in (leaf for condition in policy.conditions for leaf in ir.leaves(condition)):
        if isinstance(leaf, ir.FlowTest) and leaf.attribute == "connections":
            refused("only the kernel counts connections", leaf.span)
    for step in (step for steps in policy.process.values() for step in ir.every_step(steps)):
        if step.action.once:
            refused("only the kernel keeps what was decided for a connection", step.span)


def _of_connections(policy: ir.Policy, findings: Findings) -> None:
    """Refuse flows by `connection`, which only the kernel can tell apart."""
    asked: dict[ir.Flow, Span] = {}
    if policy.in_python:
        asked = {flow: flow.span for flow in policy.flows}
    asked |= {limit.flow: limit.span for limit in _limits(policy) if limit.flow is not None}
    for flow, span in asked.items():
        if FIELDS["connection"] in flow.key:
            findings.error(
                _CODE, f"`{flow.name}` is by `connection`, which only the kernel knows", span,
                help="name the fields instead: `by saddr, sport, daddr, dport`",
            )  # fmt: skip


def _of_several(policy: ir.Policy, findings: Findings) -> None:
    """What several workers would each keep for itself."""
    each = f"each of the {policy.queueing.number} workers would"
    help = "use one queue"
    flows = f"{help}, or a flow by saddr, sport, daddr, dport: its packets stay together"
    if policy.in_python:
        for count in policy.counts:
            if not set(count.flow.key) >= _TOGETHER:
                findings.error(
                    _CODE, f"{each} count `{count.flow.name}` for itself", count.span, help=flows
                )
        for update in policy.updates[:1]:
            findings.error(_CODE, f"{each} learn for itself", update.span, help=help)
    for limit in _limits(policy):
        if limit.flow is None or not set(limit.flow.key) >= _TOGETHER:
            findings.error(_CODE, f"{each} limit for itself", limit.span, help=flows)


def _limits(policy: ir.Policy) -> Iterator[ir.Limit]:
    """The limits whose buckets are kept in Python."""
    for steps in policy.process.values():
        left = list(steps if policy.in_python else ir.handed_over(steps))
        while left:
            step = left.pop()
            if isinstance(step, ir.Limit):
                left += step.otherwise
                yield step
