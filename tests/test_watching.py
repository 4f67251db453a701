"""What `status` and `top` reckon and say of links and controllers; pure, without a machine."""

import json
from pathlib import Path

import pytest

from itmlang.control import measured
from itmlang.links import rate_text
from runtime.cli.top import Rate, rates
from runtime.cli.words import decided, link_line
from runtime.decisions import decisions, forget, last, lines, log_file
from runtime.state import State
from runtime.status import (
    ClassStatus,
    ControlStatus,
    Glance,
    LinkClassStatus,
    LinkStatus,
    PolicyStatus,
)


def seen(at: float, packets: int, drops: int = 0, state: str = "on") -> Glance:
    policy = PolicyStatus(
        "p", "on", "p.itm", (), 0, False, (ClassStatus("a", packets, 100 * packets),)
    )
    one = LinkClassStatus("bulk", 1, packets, 10 * packets, drops, 3, 300)
    link = LinkStatus("wan", state, "p.itm", "eth1", False, 5, 5, ("eth1",), (one,), False, ())
    return Glance(at, State(), (policy,), (link,))


def test_a_rate_is_of_the_time_between_two_looks():
    assert rates(seen(10.0, 100, 4), seen(12.0, 150, 5)) == {
        ("p", "a"): Rate(25.0, 2500.0, 0.0),
        ("wan", "bulk"): Rate(25.0, 250.0, 0.5),
    }


def test_what_counts_anew_or_was_not_there_has_no_rate():
    assert rates(seen(10.0, 100), seen(11.0, 50)) == {}
    assert list(rates(seen(10.0, 1), seen(11.0, 2, state="off"))) == [("p", "a")]
    assert list(rates(seen(10.0, 1, state="waiting"), seen(11.0, 2))) == [("p", "a")]
    assert rates(seen(10.0, 1), seen(10.0, 2)) == {}


@pytest.mark.parametrize(
    "rate, text, short",
    [
        (1_250_000, "10 mbit", "10 mbit"),
        (154_321, "1.23457 mbit", "1.23 mbit"),
        (62_500, "500 kbit", "500 kbit"),
        (125_000_000, "1 gbit", "1 gbit"),
        (0, "0 bit", "0 bit"),
    ],
)
def test_rates_read_as_policies_have_them(rate, text, short):
    assert (rate_text(rate), rate_text(rate, 3)) == (text, short)


@pytest.mark.parametrize(
    "value, unit, text",
    [
        (1_250_000, "bytes/s", "10 mbit"),
        (86.01239, "packets/s", "86.01 packets/s"),
        (12_345.6, "packets", "12346 packets"),
        (3, "dropped/s", "3 packets/s"),
        (12.5, "ms", "12.5 ms"),
        (50, "%", "50%"),
    ],
)
def test_samples_have_their_unit(value, unit, text):
    assert measured(value, unit) == text


def test_a_links_line_has_its_rate_now_and_the_files():
    link = LinkStatus("w", "on", "f", "veth*", True, 500_000, 625_000, ("veth0",), (), False, ())
    assert link_line(link) == (
        "w: on, link of veth* (veth0) ingress, 4 mbit now (5 mbit in its file), from f"
    )


def controlled(**fields: object) -> PolicyStatus:
    given = {
        "written": "threshold", "value": 3.0, "base": 10.0, "measure": "cpu", "unit": "%",
        "sample": 5.0, "target": 6.0, "law": "pi", "dry": False, "reason": "cpu is high",
        "blocked": "", "trouble": "", "period": 100, "low": 2.0, "high": 20.0, "in_force": "3",
        "in_file": "10", "would": "", "at": 1.0,
    } | fields  # fmt: skip
    return PolicyStatus("p", "on", "f", (), 0, False, control=(ControlStatus(**given),))


@pytest.mark.parametrize(
    "fields, text",
    [
        ({}, "threshold: cpu is high"),
        ({"blocked": "cooldown"}, "threshold: cpu is high; cooldown"),
        ({"reason": "", "blocked": "no sample"}, "threshold: no sample"),
        ({"would": "4"}, "threshold: cpu is high; it would be 4"),
        ({"reason": "", "at": None}, "threshold: nothing was decided yet"),
        ({"trouble": "the policy is off"}, "threshold is not controlled: the policy is off"),
    ],
)
def test_what_a_controller_decided_last_is_said(fields, text):
    assert decided(controlled(**fields)) == [text]


def write(folder: Path, *found: dict[str, object], older: bool = False) -> None:
    path = log_file(folder, "p")
    path = path.with_name(path.name + ".1") if older else path
    path.write_text("".join(json.dumps(one) + "\n" for one in found))


def test_the_last_decision_of_each_is_found_also_in_the_older_log(tmp_path):
    write(tmp_path, {"time": 1.0, "written": "b", "value": 7}, {"time": 2.0, "written": "a", "value": 0},
          older=True)  # fmt: skip
    write(
        tmp_path,
        {"time": 3.0, "written": "a", "value": 1},
        {"time": 4.0, "written": "a", "blocked": "x"},
    )
    found = last(tmp_path, "p", {"a", "b", "c"}, 0.5)
    assert {name: one["value"] for name, one in found.items()} == {"a": 1, "b": 7}
    assert found["a"]["blocked"] == "x"
    # Of an earlier life of the controller, nothing holds any more.
    assert list(last(tmp_path, "p", {"a", "b"}, 1.5)) == ["a"]
    assert last(tmp_path, "p", {"a"}, 5.0) == {}
    assert [one["time"] for one in decisions(tmp_path, "p")] == [1.0, 2.0, 3.0, 4.0]


def test_a_damaged_log_is_read_as_far_as_it_goes(tmp_path):
    log_file(tmp_path, "p").write_bytes(b'\xff\n[1]\n{"time": 1, "written": "a", "value": 2}\n{"ti')
    assert [one["value"] for one in decisions(tmp_path, "p")] == [2]
    assert last(tmp_path, "p", {"a"}, 0.0)["a"]["value"] == 2
    assert len(lines(tmp_path, "p")) == 4
    assert lines(tmp_path, "q") == []


def test_only_logs_of_policies_that_are_gone_are_forgotten(tmp_path):
    for name in (
        "control-p.jsonl",
        "control-p.jsonl.1",
        "control-pp.jsonl",
        "control-q.jsonl.1",
        "state.json",
    ):
        (tmp_path / name).write_text("")
    forget(tmp_path, {"pp"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["control-pp.jsonl", "state.json"]
