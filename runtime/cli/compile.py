"""`itmc compile`: the ruleset, as `apply` loads it. Needs no root and no kernel."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from itmlang.ir import Condition
from itmlang.nft.text import comment
from itmlang.pipeline import Compiled
from itmlang.source import Span
from itmlang.unparse import condition_text
from runtime.cli.files import capabilities, compiled, file_argument, machine_option, write
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
    "--against", type=click.Choice(["native", "xt"]), default="native",
    help="The form of queue rules. Nothing is queued yet, so both give the same text.",
)  # fmt: skip
@click.option("--placement", is_flag=True, help="List what runs where and why, instead.")
@machine_option
def command(
    file: str | None,
    output: str | None,
    form: str,
    against: str,
    placement: bool,
    machine: str | None,
) -> None:
    """Print the nftables ruleset for FILE, commented with the policy's lines.

    It is the very text that `itmc apply` loads. No root needed.
    """
    result = compiled(file, capabilities(machine))
    if placement:
        rows = [(p.policy, p.part, p.where, p.reason) for p in result.placements]
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
                "chains": [
                    {
                        "name": chain.name,
                        "hook": chain.hook.name if chain.hook else None,
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
    }


def _ir(result: Compiled) -> str:
    """The simplified policies, for people."""

    def line(name: str, condition: Condition | None) -> str:
        return f"  {name}" + ("" if condition is None else f" when {condition_text(condition)}")

    lines = []
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
    return "\n".join(lines) + "\n"


def _one_line(span: Span) -> str:
    return " ".join(span.text.split())
