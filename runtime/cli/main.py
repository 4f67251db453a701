"""`itmc`: finds the command, runs it, and turns whatever fails into a message and an exit code.

Commands are imported when they are called, so that `itmc --help` is quick.
"""

import gc
import importlib
import os
import sys
from typing import Final

import click

from itmlang import __version__
from runtime.cli.exits import BROKEN_PIPE, exit_code_of

# Command -> its help line. The module has the command's name, with `_` for `-`.
COMMANDS: Final = {
    "check": "Parse and check policies; warn about what cannot be meant.",
    "fmt": "Rewrite policy files in the one canonical form, comments kept.",
    "compile": "Print the ruleset that `apply` loads.",
    "plan": "Show what `apply` would change, and what becomes of what was learned.",
    "apply": "Load a file's policies into the kernel, in one transaction.",
    "run": "Apply, stay in the foreground, remove on Ctrl-C.",
    "confirm": "Keep what `apply --confirm` loaded.",
    "rollback": "Go back to an earlier generation.",
    "list": "Show which policies are loaded, in the order they run, and the links.",
    "status": "Show what runs: packets and bytes of each class, flows, drift, controllers.",
    "top": "Show what runs, live: rates, drops, what waits.",
    "overlay": "Draw the ways of an overlay, with their round trips and the choice.",
    "flows": "Show the flows that a policy has learned, largest first.",
    "set": "Change a parameter of a running policy.",
    "enable": "Switch policies and links on again.",
    "disable": "Switch policies and links off; what was learned stays.",
    "remove": "Take policies and links away; nothing stays behind.",
    "serve": "Handle packets in Python, for the policies that are loaded.",
    "boot": "Load the last confirmed policies, as the service does at boot.",
    "install-service": "Load the last confirmed policies at each boot, by systemd.",
    "test": "Run the tests in policy files, also before a real kernel.",
    "replay": "Run a capture through the policies; write what would leave.",
    "explain": "Show what happens to a packet, line by line.",
    "doctor": "Say what this machine can do, what each lack costs, how to mend it.",
    "lab": "Try a policy on real TCP in a throwaway network.",
}


class _Commands(click.Group):
    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"runtime.cli.{name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="itmc")
def itmc() -> None:
    """Declarative traffic management: compile policies to nftables, load and watch them.

    FILE may be left out: then it is site.itm in the current folder, else the only
    *.itm there. FILE may be - for standard input.

    Exit codes: 0 done, 1 the policy is wrong, 2 wrong use of the command, 3 the
    machine refused and nothing was changed, 4 `plan --exit-code` and there are
    changes, 5 rolled back, 74 the answer could not be written.
    """


def main() -> None:
    """The entry point. Ends the process; no traceback reaches the user."""
    # Most of what a command makes is needed to its end: looking through it again and again
    # took a tenth of the time for 10 000 rules.
    gc.set_threshold(100_000)
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # where they were closed, no other file may become our output
    os.close(null)
    try:
        # Not standalone, click returns the code of an `Exit`, and None from a command.
        code = itmc(standalone_mode=False) or 0
    except Exception as error:
        if os.environ.get("ITM_DEBUG"):
            raise
        code = exit_code_of(error)
    except KeyboardInterrupt:
        code = 130
    except SystemExit:
        # We end nowhere else: so do click and rich where whoever read us has gone.
        code = BROKEN_PIPE
    try:
        if sys.stdout is not None:  # closed from the beginning
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read us has gone; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or BROKEN_PIPE
    sys.exit(code)


if __name__ == "__main__":  # as `apply` starts the runtime
    main()
