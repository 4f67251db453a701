"""`itmc overlay`: what an overlay looks like."""

from pathlib import Path

import click

from runtime.errors import MachineError, UsageError
from runtime.overlay.graph import svg
from runtime.status import status


@click.group()
def command() -> None:
    """Show overlays: the ways to each destination, as a picture."""


@command.command()
@click.argument("name", required=False)
@click.option(
    "-o", "out", type=click.Path(dir_okay=False, path_type=Path), metavar="OUT",
    help="The file to write (SVG); stdout if left out.",
)  # fmt: skip
def graph(name: str | None, out: Path | None) -> None:
    """Draw an overlay as this member sees it now: ways, round trips, the choice."""
    found = [p for p in status((name,) if name else ()) if p.overlay is not None]
    if not found:
        told = f"`{name}` is no overlay" if name else "no overlay is loaded"
        raise UsageError(told, "`itmc list` shows what is loaded")
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise UsageError(f"several overlays are loaded: {names}", "name one")
    (one,) = found
    assert one.overlay is not None
    text = svg(one.name, one.overlay)
    if out is None:
        click.echo(text, nl=False)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MachineError(f"{out} cannot be written: {error.strerror}") from error
