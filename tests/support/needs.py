"""What a test needs of the machine, and what happens where that is missing."""

import os
from typing import NoReturn

import pytest


def unavailable(error: Exception) -> NoReturn:
    """Skip what needs root, with the reason; where CI runs as root it may not be missing."""
    reason = f"needs root, network namespaces and veth: {error}"
    if os.environ.get("CI") and os.geteuid() == 0:
        pytest.fail(reason)
    pytest.skip(reason)
