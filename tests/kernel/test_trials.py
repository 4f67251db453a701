"""Tests in policy files before a real kernel: they hold and fail as in the semantics."""

from pathlib import Path

import pytest

from runtime.traffic import Namespace
from tests.test_cli import itmc
from tests.test_trials import POLICY


@pytest.fixture(autouse=True)
def _needs_namespaces(empty_namespace: Namespace) -> None:
    """Skipped, with the reason, where there are none."""


def run(tmp_path: Path, test: str, policy: str = POLICY) -> tuple[int, str]:
    file = tmp_path / "a.itm"
    file.write_text(f'{policy}\ntest "t" {{\n{test}\n}}\n')
    done = itmc("test", "--kernel", str(file))
    assert done.stderr == ""
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    "test",
    [
        "send 2 udp 10.0.0.1:1 -> 10.0.0.2:2 expect class early dscp ef ttl 64\n"
        "send 1 udp 10.0.0.1:1 -> 10.0.0.2:2 expect class late drop",
        "policy p(limit = 9)\npolicy q\n"
        "send 5 udp [fd00::1]:1 -> [fd00::2]:7 expect class early class known ttl 9",
        "path in\nsend 3 udp 10.0.0.1:1 -> 10.0.0.2:2 expect untouched\n"
        "send 3 udp [fd00::1]:1 -> [fd00::2]:2 expect untouched",
        "path out\nsend 2 tcp 10.0.0.1:1 -> 10.0.0.2:2 expect untouched",
        'send icmp 10.0.0.1 -> 10.0.0.2 in "lan" out "wan.7" expect class early',
    ],
)
def test_what_holds(tmp_path: Path, test: str) -> None:
    code, output = run(tmp_path, test)
    assert code == 0, output
    assert "all as expected" in output


@pytest.mark.parametrize(
    ("test", "came"),
    [
        ("send 3 udp 10.0.0.1:1 -> 10.0.0.2:2 expect class early", "2 of 3 packets"),
        ("send 3 udp 10.0.0.1:1 -> 10.0.0.2:2 expect length 28", "1 of 3 packets did not arrive"),
        ("send udp 10.0.0.1:1 -> 10.0.0.2:2 expect drop", "1 of 1 packets passed"),
        ("send udp 10.0.0.1:1 -> 10.0.0.2:2 expect dscp cs1", "dscp ef"),
        ("send udp 10.0.0.1:1 -> 10.0.0.2:2 expect untouched", "class early"),
        ("path in\nsend udp 10.0.0.1:1 -> 10.0.0.2:2 expect drop", "1 of 1 packets passed"),
    ],
)
def test_what_fails(tmp_path: Path, test: str, came: str) -> None:
    code, output = run(tmp_path, test)
    assert code == 1
    assert came in output and "(kernel)" in output


def test_a_long_wait_is_not_run_and_said_to_be(tmp_path: Path) -> None:
    code, output = run(tmp_path, "wait 2m\nsend udp 10.0.0.1:1 -> 10.0.0.2:2 expect class early")
    assert code == 0
    assert "not run" in output and output.endswith("1 test, 0 packets, 1 not run\n")
