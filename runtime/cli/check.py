"""`itmc check`: parse, check, warn. Needs no root and no kernel."""

import click

from itmlang.diagnostics import CompileError
from runtime.cli.exits import POLICY_WRONG
from runtime.cli.files import capabilities, compiled, machine_option
from runtime.cli.output import show


@click.command()
@click.argument("files", nargs=-1, type=click.Path())
@machine_option
def command(files: tuple[str, ...], machine: str | None) -> None:
    """Parse and check policy FILES; warn about what cannot be meant. No root needed."""
    wrong, target = False, capabilities(machine)
    for name in files or (None,):
        try:
            result = compiled(name, target)
        except CompileError as error:
            show(error.diagnostics)
            wrong = True
            continue
        number = len(result.policies)
        policies = "1 policy" if number == 1 else f"{number} policies"
        warned = len(result.warnings)
        warnings = f", {warned} warning{'s' if warned > 1 else ''}" if warned else ""
        click.echo(f"{result.source.name}: {policies}{warnings}, no errors")
    if wrong:
        raise click.exceptions.Exit(POLICY_WRONG)
