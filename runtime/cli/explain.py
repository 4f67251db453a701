"""`itmc explain`: what happens to a packet, policy by policy, line by line. Needs no root."""

from pathlib import Path

import click

from itmlang.diagnostics import Findings
from itmlang.packets import read_packet
from itmlang.semantics import PATHS, Host, Visit
from itmlang.trials import INTERFACES, built
from runtime.cli.files import compiled
from runtime.errors import UsageError
from runtime.simulated import doer

_MOST_BEFORE = 1_000_000


# `->` is no option, though it begins like one.
@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("file", type=click.Path())
@click.argument("packet", nargs=-1, required=True)
@click.option(
    "--after", type=click.IntRange(0, _MOST_BEFORE), default=0, metavar="N",
    help="The packet is the N+1st of its flow: N like it came before.",
)  # fmt: skip
@click.option(
    "--path", type=click.Choice(list(PATHS)), default="forward",
    help="forward: routed through this host; in: for it; out: from it.",
)  # fmt: skip
def command(file: str, packet: tuple[str, ...], after: int, path: str) -> None:
    """Show what the policies of FILE do to PACKET.

    PACKET is written as in a policy's tests:

        itmc explain FILE tcp 10.0.0.1:1000 -> 10.0.0.2:80 flags syn length 60

    A packet without `in` and `out` comes in at eth0 and leaves at eth1, as in tests.
    In a shell, `->` needs quotes: put them around the whole packet.
    """
    result = compiled(file)
    policies = result.policies
    text = " ".join(packet)
    findings = Findings()
    header = read_packet(text, findings)
    if header is None or findings.failed:
        from runtime.cli.output import show

        show(findings.diagnostics)
        raise UsageError("the packet is not understood", "see `itmc explain --help`")
    host = Host(policies, do=doer(policies, result.source.name))
    for _ in range(after):
        host.traverse(built(header, path, *INTERFACES), path, 0.0)
    gone = built(header, path, *INTERFACES)
    visits = host.traverse(gone, path, 0.0, told=True)
    click.echo(f"{text}: packet {after + 1} of its flow, path {path}")
    if not visits:
        click.echo("\nno policy stands on this path")
    for visit in visits:
        _show(visit)
    dropped = bool(visits) and visits[-1].outcome.dropped
    click.echo()
    if dropped:
        verb = {"drop": "dropped", "reject": "rejected"}[visits[-1].outcome.verdict]
        click.echo(f"{verb} by {visits[-1].policy.name} at {visits[-1].hook}")
    else:
        click.echo(f"accepted, tos {gone.tos:#04x} (dscp {gone.dscp}, ecn {gone.ecn})")


def _show(visit: Visit) -> None:
    outcome, policy = visit.outcome, visit.policy
    click.echo(f"\n{visit.hook}: {policy.name} ({policy.span}, priority {policy.priority})")
    width = max((len(line.text) for line in outcome.lines), default=0)
    # A template's lines are of another file than the `use` that the heading names.
    several = any(line.span.source is not policy.span.source for line in outcome.lines)
    places = [
        f"{Path(line.span.source.name).name}:{line.span.line}"
        if several
        else f"line {line.span.line}"
        for line in outcome.lines
    ]
    column = max(map(len, places), default=0)
    for line, place in zip(outcome.lines, places, strict=True):
        row = f"  {line.section:<9} {place:<{column}}  {line.text:<{min(width, 60)}}  {line.result}"
        click.echo(row.rstrip())
    if not outcome.interested:
        click.echo("  not of interest: untouched")
    elif outcome.name is None:
        click.echo("  class 0: nothing is processed")
    else:
        click.echo(f"  class {outcome.name}: {outcome.verdict}")
