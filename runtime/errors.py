"""What can go wrong with the machine and with the command, as errors."""

from itmlang.diagnostics import Diagnostic


class MachineError(Exception):
    """The machine said no, and nothing was changed.

    `diagnostics` shows where in the policy, if that is known; `help` says what to do.
    """

    def __init__(
        self, message: str, help: str = "", diagnostics: tuple[Diagnostic, ...] = ()
    ) -> None:
        super().__init__(message)
        self.message = message
        self.help = help
        self.diagnostics = diagnostics


class UsageError(Exception):
    """The command was given something that is not there or does not fit."""

    def __init__(self, message: str, help: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.help = help


class RolledBackError(Exception):
    """A change that waited to be confirmed went back."""

    def __init__(self, message: str, help: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.help = help
