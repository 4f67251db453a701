"""Options and fixtures: `--bless`, and the networks in which the kernel is asked."""

import os
from collections.abc import Iterator

import pytest

from runtime.lab import Network
from runtime.traffic import Namespace, TrafficError
from tests.support.kernel import Wire


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bless", action="store_true", help="rewrite the nftables sections of the cases"
    )


def _unavailable(error: TrafficError) -> None:
    """Skip what needs root, with the reason; where CI runs as root it may not be missing."""
    reason = f"no network namespaces: {error}"
    if os.environ.get("CI") and os.geteuid() == 0:
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def empty_namespace() -> Iterator[Namespace]:
    """A namespace in which nothing is ever loaded."""
    try:
        namespace = Namespace.create("check")
    except TrafficError as error:
        _unavailable(error)
    yield namespace
    namespace.close()


@pytest.fixture(scope="session")
def wire() -> Iterator[Wire]:
    """Client, manager and server, ready for packets."""
    try:
        network = Network().__enter__()
    except TrafficError as error:
        _unavailable(error)
    try:
        with Wire(network) as ready:
            yield ready
    finally:
        network.__exit__(None, None, None)
