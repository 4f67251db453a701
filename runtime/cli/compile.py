"""`itmc compile`: the ruleset, as `apply` loads it. Needs no root and no kernel."""

import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from itmlang.ir import Condition
from itmlang.nft.text import comment
from itmlang.pipeline import Compiled
from itmlang.unparse import condition_text
from runtime.cli.files import compiled, file_argument
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
def command(file: str | None, output: str | None, form: str, against: str, placement: bool) -> None:
    """Print the nftables ruleset for FILE, commented with the policy's lines.

    It is the very text that `itmc apply` loads. No root needed.
    """
    result = compiled(file)
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
    _write(Path(output), text)


def _write(path: Path, text: str) -> None:
    """The whole file or nothing: a reader never sees half a ruleset.

    What is no regular file (a device, a pipe) is written to, never replaced.
    """
    try:
        target = path.resolve()
        if target.exists() and not target.is_file():
            target.write_text(text, encoding="utf-8")
            return
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
        descriptor, beside = tempfile.mkstemp(prefix=".itm", dir=target.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(beside, mode)
            os.replace(beside, target)
        except BaseException:
            os.unlink(beside)
            raise
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _json(result: Compiled) -> dict[str, Any]:
    """The stable schema of `--format json`."""
    return {
        "schema": 1,
        "file": result.source.name,
        "tables": [
            {
                "name": table.name,
                "family": "inet",
                "policy": table.policy,
                "counters": [
                    {"name": c.name, "kind": c.kind, "of": c.of, "line": c.span.line}
                    for c in table.counters
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
        for name, steps in policy.process.items():
            lines += [f"  process {name}: " + "; ".join(str(s.action) for s in steps)]
    return "\n".join(lines) + "\n"
