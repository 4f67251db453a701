"""Failures -> messages on stderr and exit codes, in one place.

0 done; 1 the policy is wrong; 2 wrong use of the command; 3 the machine refused,
nothing changed; 4 `plan --exit-code` and there are changes; 5 rolled back; 74 the answer could not
be written, whatever was done.
"""

from typing import Final

import click

from itmlang.diagnostics import CompileError
from runtime.cli.output import show, warn
from runtime.errors import MachineError, RolledBackError, UsageError

POLICY_WRONG: Final = 1
WRONG_USE: Final = 2
MACHINE_REFUSED: Final = 3
CHANGES: Final = 4
ROLLED_BACK: Final = 5
UNANSWERED: Final = 74  # EX_IOERR of sysexits.h
BROKEN_PIPE: Final = 141


def exit_code_of(error: Exception) -> int:
    """Say what went wrong and return the exit code for it."""
    match error:
        case CompileError():
            show(error.diagnostics)
            return POLICY_WRONG
        case UsageError():
            warn(error.message, error.help)
            return WRONG_USE
        case MachineError():
            show(error.diagnostics)
            warn(error.message, error.help)
            return MACHINE_REFUSED
        case RolledBackError():
            warn(error.message, error.help)
            return ROLLED_BACK
        case click.exceptions.Exit():
            return error.exit_code
        case click.Abort():
            return 130
        case click.ClickException():
            error.show()
            return error.exit_code
        case BrokenPipeError():
            return BROKEN_PIPE
        case OSError() if error.filename is None:
            # Of stdout, for what is loaded and what is on disk have errors of their own.
            warn(
                f"the answer could not be written: {error.strerror}",
                "what was asked for may be done: `itmc status` shows it",
            )
            return UNANSWERED
        case OSError():
            warn(f"the machine refused: {error}")
            return MACHINE_REFUSED
        case RecursionError() | MemoryError():
            warn("the policy is too large or nests too deep for this machine")
            return POLICY_WRONG
        case _:
            warn(
                f"internal error: {type(error).__name__}: {error}",
                "this is a bug in itm; with ITM_DEBUG=1 it shows where",
            )
            return MACHINE_REFUSED
