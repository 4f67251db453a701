"""`itmc compile`: the ruleset, as `apply` loads it. Needs no root and no kernel."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from itmlang.ir import Condition
from itmlang.links import Link, classid_text
from itmlang.nft.model import Queue
from itmlang.nft.text import comment
from itmlang.pipeline import Compiled
from itmlang.place import Placement
from itmlang.source import Span
from itmlang.unparse import condition_text, controller_text, link_lines, timer_text
from runtime.cli.files import (
    capabilities,
    compiled,
    file_argument,
    machine_option,
    optimise_option,
    write,
)
from runtime.cli.output import as_json, table
from runtime.errors import UsageError


@click.command()
@file_argument
@click.option("-o", "--output", type=click.Path(), help="Write to this file instead of stdout.")
@click.option(
    "--format", "form", type=click.Choice(["nft", "json", "ir"]), default="nft",
    help="nft: text that nftables loads; json: tables, sets and rules with the policy's lines; "
    "ir: the checked and simplified policy.",
)  # fmt: skip
@click.option(
    "--against", "queue", type=click.Choice(["native", "xt"]),
    help="The form of rules to queues: nftables' own (native), or the older target NFQUEUE (xt), "
    "which has no text: `apply` puts it in. Native if left out, or what the machine of --for has.",
)  # fmt: skip
@click.option("--placement", is_flag=True, help="List what runs where and why, instead.")
@machine_option
@optimise_option
def command(
    file: str | None,
    output: str | None,
    form: str,
    queue: str | None,
    placement: bool,
    machine: str | None,
    optimise: bool,
) -> None:
    """Print the nftables ruleset for FILE, commented with the policy's lines.

    It is the very text that `itmc apply` loads. No root needed.
    """
    result = compiled(file, capabilities(machine), queue or "", optimise)
    if placement:
        rows = [(p.policy, p.part, _where(p), p.reason) for p in result.placements]
        table(("policy", "part", "runs in", "because"), rows)
        return
    if form == "json":
        if output:
            raise UsageError("--output goes with --format nft", "redirect stdout instead")
        as_json(_json(result))
        return
    text = result.text.text if form == "nft" else _ir(result)
    if output == "":
        raise UsageError("--output needs the name of a file")
    if output is None or output == "-":
        click.echo(text, nl=False)
        return
    write(Path(output), text)


def _where(placement: Placement) -> str:
    numbers = placement.queues
    if not numbers:
        return placement.where
    return f"queue {numbers[0]}" + (f"-{numbers[-1]}" if len(numbers) > 1 else "")


def _json(result: Compiled) -> dict[str, Any]:
    """The stable schema of `--format json`."""
    return {
        "schema": 1,
        "file": result.source.name,
        "tables": [
            {
                "name": table.name,
                "family": table.family,
                "policies": list(table.policies),
                "counters": [
                    {
                        "name": c.name,
                        "kind": c.kind,
                        "policy": c.policy,
                        "of": c.of,
                        "line": c.span.line,
                    }
                    for c in table.counters
                ],
                "values": [
                    {
                        "name": v.name,
                        "kind": v.kind,
                        "type": v.type,
                        "elements": len(v.elements),
                        "line": v.span.line,
                    }
                    for v in table.values
                ],
                "sets": [
                    {k: v for k, v in asdict(s).items() if k != "span"} | {"line": s.span.line}
                    for s in table.sets
                ],
                "queues": [
                    {
                        "policy": q.policy,
                        "first": q.first,
                        "queues": q.many,
                        "length": q.length,
                        "buffer": q.buffer,
                        "copy": q.copy,
                        "fail": "open" if q.fails_open else "closed",
                        "whole": q.whole,
                        "calls": [target for target, _ in q.calls],
                        "line": q.span.line,
                    }
                    for q in table.queues
                ],
                "controllers": [
                    {k: v for k, v in asdict(c).items() if k not in ("span", "gains", "values")}
                    | {"gains": dict(c.gains), "line": c.span.line}
                    for c in table.controllers
                ],
                "timers": [
                    {"policy": t.policy, "period": t.period, "calls": t.target, "line": t.span.line}
                    for t in table.timers
                ],
                "chains": [
                    {
                        "name": chain.name,
                        "hook": chain.hook.name if chain.hook else None,
                        "role": chain.role,
                        "priority": chain.hook.priority if chain.hook else None,
                        "rules": [
                            {
                                "rule": rule.text,
                                "comment": comment(rule),
                                "line": rule.span.line,
                                "class": rule.label or None,
                            }
                            for rule in chain.rules
                        ],
                    }
                    for chain in table.chains
                ],
            }
            for table in result.ruleset.tables
        ],
        "links": [_link(link) for link in result.ruleset.links],
    }


def _link(link: Link) -> dict[str, Any]:
    """Rates are in bytes a second."""
    fields = {
        k: v for k, v in asdict(link).items() if k not in ("at", "span", "handle", "otherwise")
    }
    classes = [
        {k: v for k, v in asdict(one).items() if k not in ("span", "number")}
        | {
            "classid": classid_text(link.classid(one)),
            "otherwise": one.number == link.otherwise,
            "line": one.span.line,
        }
        for one in link.classes
    ]
    return {**fields, "classes": classes, "line": link.span.line}


def _ir(result: Compiled) -> str:
    """The simplified policies, for people."""

    def line(name: str, condition: Condition | None) -> str:
        return f"  {name}" + ("" if condition is None else f" when {condition_text(condition)}")

    lines = [line for link in result.ruleset.links for line in link_lines(link)]
    queues = [queue for table in result.ruleset.tables for queue in table.queues]
    for simple in result.simplified:
        policy = simple.policy
        hooks = ", ".join(policy.hooks)
        lines += [f"policy {policy.name} at {hooks} priority {policy.priority}"]
        lines += [f"  interest {condition_text(simple.whole.interest)}"]
        for flow in policy.flows:
            key = ", ".join(field.name for field in flow.key)
            timeout = "never" if flow.timeout is None else f"{flow.timeout} ms"
            lines += [f"  flow {flow.name} by {key} timeout {timeout} max {flow.size}"]
        lines += [line(f"class {rule.name}", rule.condition) for rule in simple.whole.rules]
        lines += [f"  count {count.flow.name}" for count in policy.counts]
        lines += [f"  {_one_line(note.span)}" for note in policy.notes]
        for name, steps in policy.process.items():
            lines += [f"  process {name}: " + "; ".join(_one_line(s.span) for s in steps)]
        lines += [f"  {_one_line(update.span)}" for update in policy.updates]
        lines += [_queue_line(q) for q in queues if q.policy == policy.name]
        lines += [f"  {controller_text(one)}" for one in policy.controllers]
        lines += [f"  {timer_text(one)}" for one in policy.timers]
    return "\n".join(lines) + "\n"


def _queue_line(queue: Queue) -> str:
    copy = "as handlers ask" if queue.copy is None else f"{queue.copy} bytes"
    return (
        f"  {'run python' if queue.whole else 'python'}: queues {queue.many} from {queue.first} "
        f"length {queue.length} buffer {queue.buffer} bytes copy {copy} "
        f"fail {'open' if queue.fails_open else 'closed'}"
    )


def _one_line(span: Span) -> str:
    return " ".join(span.text.split())
