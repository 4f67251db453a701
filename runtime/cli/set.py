"""`itmc set`: change a parameter of a running policy."""

import click

from runtime.apply import set_parameter
from runtime.cli.apply import tell
from runtime.errors import UsageError


@click.command(context_settings={"ignore_unknown_options": True})  # `-5` is a value
@click.argument("parameter", metavar="NAME.PARAM")
@click.argument("value")
def command(parameter: str, value: str) -> None:
    """Give a parameter of a loaded policy another value, as in `itmc set size_aware.threshold 20`.

    Every flow keeps its count and is judged by the new value from its next packet on.
    It holds until the policy's file is applied again.
    """
    policy, dot, name = parameter.partition(".")
    if not (policy and dot and name):
        raise UsageError(f"`{parameter}` names no parameter", "as in `size_aware.threshold`")
    done = set_parameter(policy, name, value)
    click.echo(f"{parameter} is {value}{': as it was' if done.plan.empty else ''}")
    tell(done)
