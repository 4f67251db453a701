"""`itmc explain`: what happens to a packet, policy by policy, line by line. Needs no root."""

import click

from itmlang.diagnostics import Findings
from itmlang.packet import Packet
from itmlang.packets import read_packet
from itmlang.semantics import PATHS, State, Visit, traverse
from runtime.cli.files import compiled
from runtime.errors import UsageError

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

    In a shell, `->` needs quotes: put them around the whole packet.
    """
    policies = compiled(file).policies
    text = " ".join(packet)
    findings = Findings()
    header = read_packet(text, findings)
    if header is None or findings.failed:
        from runtime.cli.output import show

        show(findings.diagnostics)
        raise UsageError("the packet is not understood", "see `itmc explain --help`")
    states = {policy.name: State.of(policy) for policy in policies}
    for _ in range(after):
        traverse(policies, states, _fresh(header.build(), path), path, 0.0)
    built = _fresh(header.build(), path)
    visits = traverse(policies, states, built, path, 0.0, told=True)
    click.echo(f"{text}: packet {after + 1} of its flow, path {path}")
    if not visits:
        click.echo("\nno policy stands on this path")
    for visit in visits:
        _show(visit)
    dropped = bool(visits) and visits[-1].outcome.verdict == "drop"
    click.echo()
    if dropped:
        click.echo(f"dropped by {visits[-1].policy.name} at {visits[-1].hook}")
    else:
        click.echo(f"accepted, tos {built.tos:#04x} (dscp {built.dscp}, ecn {built.ecn})")


def _fresh(packet: Packet, path: str) -> Packet:
    """The packet with the interfaces that it can have on its path."""
    packet.input = None if path == "out" else packet.input
    packet.output = None if path == "in" else packet.output
    return packet


def _show(visit: Visit) -> None:
    outcome, policy = visit.outcome, visit.policy
    click.echo(f"\n{visit.hook}: {policy.name} ({policy.span}, priority {policy.priority})")
    width = max((len(line.text) for line in outcome.lines), default=0)
    for line in outcome.lines:
        number = f"line {line.span.line}"
        row = f"  {line.section:<9} {number:<9} {line.text:<{min(width, 60)}}  {line.result}"
        click.echo(row.rstrip())
    if not outcome.interested:
        click.echo("  not of interest: untouched")
    elif outcome.name is None:
        click.echo("  class 0: nothing is processed")
    else:
        click.echo(f"  class {outcome.name}: {outcome.verdict}")
