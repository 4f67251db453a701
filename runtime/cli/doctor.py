"""`itmc doctor`: what this machine can do, what each lack costs, how to mend it."""

import click

from itmlang.capabilities import FEATURES, PARTS
from runtime.capabilities import Answer, Report, ask
from runtime.cli.exits import MACHINE_REFUSED
from runtime.cli.output import as_json, say, table

_QUEUES = [feature for feature in FEATURES if feature.part == "queues"]


@click.command()
@click.option("--json", "in_json", is_flag=True, help="As JSON, the file of `compile --for`.")
def command(in_json: bool) -> None:
    """Ask the kernel, by trying, for each feature that policies can use. Root.

    It is tried in a network namespace of its own; nothing of this one is changed.
    Exit code 3 if policies can need something that this machine lacks, or if the
    state folder cannot be used. Any other lack is only said.
    """
    report = ask()
    if in_json:
        as_json(_json(report))
    else:
        _show(report)
    found = report.capabilities
    without_queue = len(found.lacking("queues")) == len(_QUEUES)
    if found.lacking("policies") or without_queue or report.host.state_problem:
        raise click.exceptions.Exit(MACHINE_REFUSED)


def _json(report: Report) -> dict[str, object]:
    host = report.host
    return {
        **report.capabilities.to_json(),
        "reasons": {a.feature.name: a.reason for a in report.answers if not a.there},
        "host": {
            "forwarding": dict(host.forwarding),
            "state_folder": host.state_folder,
            "state_problem": host.state_problem,
        },
    }


def _show(report: Report) -> None:
    say(f"kernel {report.kernel}, libnftables {report.nftables or '(no version)'}")
    for part, title in PARTS.items():
        say(f"\n{title[0].upper()}{title[1:]}:\n")
        rows = [
            (a.feature.name, "yes" if a.there else "NO", a.feature.purpose)
            for a in report.answers
            if a.feature.part == part
        ]
        table(("feature", "here", "what for"), rows)
    lacks = [answer for answer in report.answers if not answer.there]
    if lacks:
        say("\nWhat lacks:")
    for answer in lacks:
        _show_lack(answer)
    say("")
    _show_host(report)


def _show_lack(answer: Answer) -> None:
    feature = answer.feature
    say(f"  {feature.name}: {' '.join(answer.reason.split())}")
    say(f"      = cost: {feature.cost}")
    say(f"      = help: {feature.mend}")


def _show_host(report: Report) -> None:
    words = {True: "on", False: "off", None: "not there"}
    forwarding = report.host.forwarding
    states = ", ".join(f"{family} {words[state]}" for family, state in forwarding.items())
    say(f"IP forwarding: {states}")
    if not all(forwarding.values()):
        say("      = note: where it is off, policies at forward see no packet")
    say(f"state folder {report.host.state_folder}: {report.host.state_problem or 'can be used'}")
    if report.host.state_problem:
        say("      = help: mend it, or set ITM_STATE_DIR to a folder that can be written")
