"""What a test needs of the machine, and what happens where that is missing."""

import os
from typing import NoReturn

import pytest


def unavailable(error: Exception, needs: str = "root, network namespaces and veth") -> NoReturn:
    """Skip what `needs` something, with the reason; where CI runs as root it may not be missing."""
    reason = f"needs {needs}: {error}"
    if os.environ.get("CI") and os.geteuid() == 0:
        pytest.fail(reason)
    pytest.skip(reason)
