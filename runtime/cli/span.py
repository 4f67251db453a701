"""Times on the command line: `60s`, `5m`, `1h30m`."""

import re
from typing import Final

from runtime.errors import UsageError

_PART: Final = re.compile(r"(\d{1,9}(?:\.\d+)?)(ms|s|m|h|d)", re.ASCII)
_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_LONGEST: Final = 7 * 86_400.0


def seconds(text: str) -> float:
    """A time in seconds. Raises `UsageError` for what is none, or longer than a week."""
    parts = _PART.findall(text)
    if "".join(number + unit for number, unit in parts) != text.strip() or not parts:
        raise UsageError(f"`{text}` is no time", "times such as 60s, 5m or 1h30m")
    found = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not 0 < found <= _LONGEST:
        raise UsageError(f"`{text}` is too {'long' if found else 'short'}", "7d at most")
    return found
