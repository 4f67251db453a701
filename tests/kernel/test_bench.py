"""The benches run, and what they check can fail: lost, miscounted and wrongly marked packets."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench import compile, growth, overhead, shapes, state, wire
from bench.growth import Contender, LossError
from bench.wire import Line, Packet, Spread, Stream
from runtime.traffic import TrafficError
from tests.support.needs import unavailable


@pytest.fixture
def line() -> Iterator[Line]:
    if shutil.which("cc") is None:
        unavailable(FileNotFoundError("cc"), "a C compiler")
    try:
        made = wire.line()
        ready = made.__enter__()
    except TrafficError as error:
        unavailable(error)
    yield ready
    made.__exit__(None, None, None)


def own(shape: str, classes: int, folder: Path) -> Contender:
    file = folder / "growth.itm"
    file.write_text(shapes.policy(shapes.terms(shape, classes)))
    return Contender("itm", classes, growth.compiled(file))


def checked(
    one: Contender, shape: str, line: Line, folder: Path, *, confused: bool = False
) -> None:
    """Send 500 packets through it and check them, perhaps against the wrong classes."""
    packets, names = growth.traffic(shape, one.classes)
    file = wire.stored(packets, folder / "frames")
    line.load(one.ruleset)
    with Stream(line, wire.compiled("packets", folder), file, wire.processor()) as stream:
        stream.send(400, 100)
        mistaken = [name.replace("c0", "c1") for name in names]
        growth.checked(one, line, stream, mistaken if confused else names)


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_every_packet_is_counted_in_its_class(shape: str, line: Line, tmp_path: Path) -> None:
    checked(own(shape, 7, tmp_path), shape, line, tmp_path)


def test_a_lost_packet_is_found(line: Line, tmp_path: Path) -> None:
    one = own("exact", 3, tmp_path)
    lossy = "table inet lossy { chain f { type filter hook forward priority 0; ip daddr 10.128.0.1 drop; }; }\n"
    with pytest.raises(LossError, match="packets sent"):
        checked(replace(one, ruleset=one.ruleset + lossy), "exact", line, tmp_path)


def test_a_packet_in_another_class_is_found(line: Line, tmp_path: Path) -> None:
    with pytest.raises(LossError, match="class_c0 counted"):
        checked(own("exact", 3, tmp_path), "exact", line, tmp_path, confused=True)


def test_growth_runs(line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert growth.main(["--quick", "--shapes", "mixed", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "growth.json").read_text())["shapes"]["mixed"]["contenders"]
    assert {"no rules", "itm 1", "itm 20"} <= set(found)
    assert found["itm 1"]["ratio"] == [1, 1, 1]
    assert "| itm 20 | " in capsys.readouterr().out


def test_growth_tells_of_what_is_under_its_bar() -> None:
    rows = {"itm 10": {"ratio": [0.5, 0.79, 1.0]}}
    found = {"sizes": [1, 10], "shapes": {"mixed": {"contenders": rows}}}
    assert growth.slow(found) == ["mixed: itm 10: 0.79 of one class, at least 0.8 is wanted"]
    rows["itm 10"]["ratio"][1] = 0.8
    assert growth.slow(found) == []


def loaded(name: str, ruleset: str, line: Line) -> overhead.Loaded:
    line.load(ruleset)
    return overhead.Loaded(name, ruleset, line, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("room", [65_536, 20])
def test_by_hand_means_the_same(room: int, line: Line) -> None:
    """Also where a table is full."""
    texts = [growth.compiled(overhead.POLICY), overhead.BY_HAND.read_text()]
    compiled, by_hand = (text.replace("size 65536", f"size {room}") for text in texts)
    with wire.line() as other:
        overhead.compared(loaded("compiled", compiled, line), loaded("by hand", by_hand, other))


@pytest.mark.parametrize(
    ("correct", "wrong"),
    [
        ("burst 11", "burst 12"),
        ("0x01 : goto to_0x04", "0x01 : goto to_0x0c"),
        ("& 0xfe3f | 0x0100", "& 0xffff | 0x0100"),
        ("ip frag-off & 0x1fff != 0 goto long", "ip frag-off & 0x1fff != 0 goto short"),
    ],
)
def test_what_means_something_else_is_found(correct: str, wrong: str, line: Line) -> None:
    text = overhead.BY_HAND.read_text()
    assert correct in text
    compiled = loaded("compiled", growth.compiled(overhead.POLICY), line)
    with wire.line() as other, pytest.raises(LossError):
        overhead.compared(compiled, loaded("by hand", text.replace(correct, wrong), other))


def test_overhead_runs(line: Line, tmp_path: Path) -> None:
    assert overhead.main(["--quick", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "overhead.json").read_text())
    assert set(found["ratio"]) == set(overhead.PARTS)


def test_state_runs(line: Line, tmp_path: Path) -> None:
    before = Path("/proc/sys/net/netfilter/nf_conntrack_max").read_text()
    assert state.main(["--quick", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "state.json").read_text())["forms"]
    assert found["connection"]["connections"] == found["connection"]["flows"]
    assert found["fields"]["connections"] == 0
    assert Path("/proc/sys/net/netfilter/nf_conntrack_max").read_text() == before


def test_a_table_that_is_too_small_is_found(line: Line, tmp_path: Path) -> None:
    packets = [Packet(f"10.128.0.{n}") for n in range(200)]
    file = wire.stored(packets, tmp_path / "frames")
    line.load(state.policy("fields", "1h", 100, tmp_path))
    with (
        Stream(line, wire.compiled("packets", tmp_path), file, wire.processor()) as stream,
        pytest.raises(LossError, match="find no room"),
    ):
        state.filled(line, stream, len(packets))


def test_compile_runs(tmp_path: Path) -> None:
    words = ["100", "--runs", "1", "--shapes", "mixed", "elements", "--actions", "with"]
    assert compile.main([*words, "--quick", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "compile.json").read_text())
    assert [row.get("refused") for row in found["growth"]] == [None] * 4


def test_compile_tells_of_missed_bars() -> None:
    row = {"shape": "mixed", "actions": "with", "rules": 1}
    found = {
        "growth": [
            row | {"size": 1_000, "seconds": [0.1, 0.1, 0.1], "megabytes": 40},
            row | {"size": 10_000, "seconds": [1.0, 2.1, 3.0], "megabytes": 501},
            row | {"size": 100_000, "refused": "too many words"},
        ],
        "starts": {"itmc --version": [0.1, 0.1, 0.9], "itmc --help": [0.1, 0.2, 0.2]},
    }
    said = "\n".join(compile.missed(found))
    assert said.count("\n") == 4
    for part in ("2.1 s", "501 MB", "15 times", "too many words", "itmc --help"):
        assert part in said


def test_a_spread_is_least_median_and_greatest() -> None:
    assert Spread.of([3, 1, 2, 9]).told() == [1, 2.5, 9]


def test_a_program_that_does_not_compile_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="libnetfilter-queue-dev"):
        wire.compiled("queue", tmp_path / "missing", "-lnetfilter_queue")
