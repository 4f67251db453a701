"""`itmc fmt`: one canonical form, comments kept. Needs no root and no kernel."""

from pathlib import Path

import click

from itmlang.diagnostics import CompileError
from itmlang.layout import layout
from runtime.cli.exits import POLICY_WRONG, exit_code_of
from runtime.cli.files import contents, decoded, default, write
from runtime.cli.output import say
from runtime.errors import UsageError


@click.command()
@click.argument("files", nargs=-1, type=click.Path())
@click.option("--check", is_flag=True, help="Write nothing; exit 1 if a file would change.")
def command(files: tuple[str, ...], check: bool) -> None:
    """Rewrite policy FILES in the one canonical form, comments kept. No root needed.

    The files that change are named. What cannot be parsed is left as it is. With - for
    FILE, standard input goes to standard output.
    """
    code = 0
    for name in files or (default(),):
        try:
            changed = _format(name, check)
        except (CompileError, UsageError) as error:
            code = max(code, exit_code_of(error))
            continue
        if changed and check:
            code = max(code, POLICY_WRONG)
    if code:
        raise click.exceptions.Exit(code)


def _format(name: str, check: bool) -> bool:
    """Bring one file into form; True if it was in another one."""
    if name != "-" and Path(name).is_fifo():
        raise UsageError(f"{name}: a pipe cannot be rewritten", "give - for standard input")
    raw = contents(name)
    text = layout(decoded(name, raw))
    changed = text.encode("utf-8") != raw
    if check:
        if changed:
            say(f"{name}: would change")
    elif name == "-":
        click.echo(text, nl=False)
    elif changed:
        write(Path(name), text)
        say(f"{name}: changed")
    return changed
