"""Options and fixtures: `--bless`, and the networks in which the kernel is asked."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.lab import Network
from runtime.traffic import Namespace, TrafficError, veth
from tests.support.kernel import Wire
from tests.support.needs import unavailable


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bless",
        action="store_true",
        help="rewrite what is compared: the cases' nftables sections, docs/errors.md",
    )


@pytest.fixture(scope="session")
def empty_namespace() -> Iterator[Namespace]:
    """A namespace in which nothing is ever loaded, with the manager's devices."""
    try:
        namespace = Namespace.create("check")
        veth(namespace, "eth0", namespace, "eth1")
    except TrafficError as error:
        unavailable(error)
    yield namespace
    namespace.close()


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Namespace]:
    """The test runs in a namespace of its own, with a state folder of its own."""
    monkeypatch.setenv("ITM_STATE_DIR", str(tmp_path / "state"))
    try:
        namespace = Namespace.create("host")
    except TrafficError as error:
        unavailable(error)
    try:
        with namespace.entered():
            yield namespace
    finally:
        namespace.close()


@pytest.fixture(scope="session")
def wire() -> Iterator[Wire]:
    """Client, manager and server, ready for packets."""
    try:
        network = Network().__enter__()
    except TrafficError as error:
        unavailable(error)
    try:
        with Wire(network) as ready:
            yield ready
    finally:
        network.__exit__(None, None, None)
