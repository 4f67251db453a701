"""`itmc install-service`: policies come back at boot, and are served, before the network is up."""

from pathlib import Path

import click

from runtime import service
from runtime.cli.output import say, warn
from runtime.errors import UsageError


@click.command()
@click.option(
    "--root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write below DIR, the root of an image. No running systemd is told.",
)
@click.option("--itmc", "program", metavar="PATH", help="The itmc to start, instead of this one.")
@click.option("--print", "only_print", is_flag=True, help="Show the units, write nothing.")
@click.option("--remove", "removing", is_flag=True, help="Disable the units, take them away.")
@click.option("--force", is_flag=True, help="Also where a unit's file is not ours, or was edited.")
def command(
    root: Path | None, program: str | None, only_print: bool, removing: bool, force: bool
) -> None:
    """Have systemd load the last confirmed policies at each boot, before the network is up.

    Writes itm.service and itm-runtime.service to /etc/systemd/system and enables
    them: the first loads policies, the second handles what they have in Python.
    Nothing is loaded now, and stopping the units unloads nothing.
    """
    if removing and (only_print or program):
        raise UsageError("--remove goes with --root and --force only")
    # Resolved, an empty path or `..` cannot be mistaken for this machine's root.
    place = root.resolve() if root else Path("/")
    if removing:
        _report_removed(service.remove(place, force=force))
        return
    found = service.find(program, place)
    for doubt in service.doubts(found, place):
        warn(f"warning: {doubt}")
    if only_print:
        shown = [
            f"# {service.FOLDER / name}\n{text}" for name, text in service.texts(found).items()
        ]
        say("\n".join(shown).rstrip("\n"))
        return
    _report_installed(service.install(found, place, force=force), place)


def _report_installed(done: service.Done, root: Path) -> None:
    names = " ".join(unit.name for unit in service.UNITS)
    if not done.changed:
        say(f"{names}: installed and enabled already")
        return
    for path in done.changed:
        say(f"wrote {path}")
    if done.told:
        say(f"policies are loaded at each boot; now, by `systemctl start {names}`")
    else:
        say("enabled by links, no systemd was told; policies are loaded at each boot")


def _report_removed(done: service.Done) -> None:
    for path in done.changed:
        say(f"removed {path}")
    say("policies that are loaded stay" if done.changed else "nothing is installed")
