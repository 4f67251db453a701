"""Tests in policy files: what holds, what fails and how that is said, what is refused."""

from pathlib import Path

import pytest

from itmlang.diagnostics import CompileError
from itmlang.pipeline import analyse
from itmlang.source import Source
from itmlang.trials import Failure, run
from tests.test_cli import itmc

POLICY = """
set seen: address timeout 1m
policy p(limit: packets = 2) {
    at forward
    flow f by saddr
    classify {
        early when f.packets < limit
        late
    }
    log { count f }
    process { early { set dscp ef } late { drop } }
    update { add saddr to @seen when dport == 7 }
}
policy q {
    at postrouting
    interest { saddr @seen }
    classify { known }
    process { known { set ttl 9 } }
}
"""


def failures(test: str, policy: str = POLICY) -> list[Failure]:
    (trial,) = analyse(Source("t.itm", f'{policy}\ntest "t" {{\n{test}\n}}\n')).trials
    return run(trial)


@pytest.mark.parametrize(
    "test",
    [
        "send 2 udp 10.0.0.1:1 -> 10.0.0.2:2 expect class early dscp ef\n"
        "send 1 udp 10.0.0.1:1 -> 10.0.0.2:2 expect class late drop",
        "policy p(limit = 1)\nsend udp 10.0.0.1:1 -> 10.0.0.2:2 expect class early\n"
        "send udp 10.0.0.1:1 -> 10.0.0.2:2 expect class p.late drop",
        "policy p\npolicy q\nsend udp 10.0.0.1:1 -> 10.0.0.2:7 expect class early class known ttl 9",
        "send udp 10.0.0.1:1 -> 10.0.0.2:7 expect class q.known\nwait 1m\n"
        "send udp 10.0.0.1:1 -> 10.0.0.2:2 expect class early ttl 64",
        "path in\nsend 3 udp 10.0.0.1:1 -> 10.0.0.2:2 expect untouched",
        "policy q\nsend udp 10.0.0.1:1 -> 10.0.0.2:2 expect untouched accept",
    ],
)
def test_what_holds(test: str) -> None:
    assert failures(test) == []


@pytest.mark.parametrize(
    ("test", "number", "expected", "came", "decided"),
    [
        ("send 3 udp 10.0.0.1:1 -> 10.0.0.2:2 expect class early", 3, "class early", "class late", 8),
        ("send 3 udp 10.0.0.1:1 -> 10.0.0.2:2 expect dscp ef", 3, "dscp ef", "dscp cs0", 8),
        ("send udp 10.0.0.1:1 -> 10.0.0.2:2 expect drop", 1, "drop", "verdict accept", 7),
        ("send udp 10.0.0.1:1 -> 10.0.0.2:2 expect untouched", 1, "untouched", "class early", 7),
        ("send udp 10.0.0.1:1 -> 10.0.0.2:7 expect ttl 64", 1, "ttl 64", "ttl 9", 17),
        ("policy q\nsend udp 10.0.0.1:1 -> 10.0.0.2:7 expect class known", 1, "class known",
         "class 0", None),
    ],
)  # fmt: skip
def test_what_fails(test: str, number: int, expected: str, came: str, decided: int | None) -> None:
    (failure,) = failures(test)
    assert failure.number == number
    assert failure.expected.span.text == expected
    assert failure.came == came
    assert (failure.decided.line if failure.decided else None) == decided


def test_a_packet_that_is_gone_fails_unless_that_was_expected() -> None:
    (failure,) = failures("send 3 udp 10.0.0.1:1 -> 10.0.0.2:2 expect length 28")
    assert (failure.number, failure.came) == (3, "verdict drop")


@pytest.mark.parametrize(
    ("test", "code", "message"),
    [
        ("", "E046", "sends nothing"),
        ("send udp 10.0.0.1:1 -> 10.0.0.2:2 expect class none", "E010", "no class `none`"),
        ("send udp 10.0.0.1:1 -> 10.0.0.2:2 expect class r.early", "E010", "no policy `r`"),
        ("send udp 10.0.0.1:1 -> 10.0.0.2:2 expect color 3", "E010", "`color` cannot be expected"),
        ("send udp 10.0.0.1:1 -> 10.0.0.2:2 expect ttl 300", "E023", "too large"),
        ("policy r\nsend udp 10.0.0.1:1 -> 10.0.0.2:2 expect untouched", "E010", "no policy `r`"),
        ("policy p(limt = 3)\nsend udp 10.0.0.1:1 -> 10.0.0.2:2 expect untouched", "E019",
         "no parameter `limt`"),
        ("path sideways\nsend udp 10.0.0.1:1 -> 10.0.0.2:2 expect untouched", "E010",
         "no path `sideways`"),
        ("send 0 udp 10.0.0.1:1 -> 10.0.0.2:2 expect untouched", "E023", "1 to 1000000"),
        ("send udp 10.0.0.1 -> 10.0.0.2 expect untouched", "E028", "port is missing"),
    ],
)  # fmt: skip
def test_what_is_refused(test: str, code: str, message: str) -> None:
    with pytest.raises(CompileError) as caught:
        failures(test)
    assert any(d.code == code and message in d.message for d in caught.value.diagnostics)


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "a.itm"
    send = "    send 3 udp 10.0.0.1:1 -> 10.0.0.2:2 expect class early\n"
    file.write_text(
        POLICY + 'test "holds" {\n    send udp 10.0.0.1:1 -> 10.0.0.2:2 expect class early\n}\n'
        f'test "fails" {{\n{send}}}\n'
    )
    done = itmc("test", str(file))
    assert done.returncode == 1
    assert f"ok       {file}:20: holds" in done.stdout
    assert f"FAILED   {file}:23: fails\n    line 24, packet 3 of 3: udp 10.0.0.1:1" in done.stdout
    assert "expected  class early\n      came      class late\n" in done.stdout
    assert f"decided   {file}:8: late" in done.stdout
    assert done.stdout.endswith("2 tests, 4 packets, 1 failed\n")
    assert "conn" not in done.stdout
    assert "f.packets is 2" in itmc("test", "-v", str(file)).stdout


def test_a_file_without_tests_and_one_that_is_wrong(tmp_path: Path) -> None:
    plain, wrong = tmp_path / "plain.itm", tmp_path / "wrong.itm"
    plain.write_text("policy p { at forward classify { a } }\n")
    wrong.write_text("policy p { at nowhere classify { a } }\n")
    done = itmc("test", str(plain))
    assert (done.returncode, done.stdout) == (0, f"{plain}: no tests\n0 tests, 0 packets\n")
    done = itmc("test", str(plain), str(wrong))
    assert done.returncode == 1
    assert "no hook `nowhere`" in done.stderr
