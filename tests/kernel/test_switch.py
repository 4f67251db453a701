"""Policies off and on again: nothing learned is lost, the others run on, order holds."""

import itertools

import pytest

from runtime import apply as runtime_apply
from runtime import nft
from runtime import status as runtime_status
from runtime.errors import UsageError
from tests.kernel.test_apply import (
    FLOW,
    MARK,
    counts,
    last_dscp,
    policy,
    send,
)
from tests.test_cli import itmc

SHARED = """
set seen: port timeout 1h max 16
policy learn {
    at output
    interest { protocol udp }
    classify { all }
    process { all { set dscp 1 } }
    update { add dport to @seen }
}
policy use_it {
    at output
    interest { dport @seen }
    classify { known }
    process { known { set dscp 2 } }
}
"""


def states() -> dict[str, tuple[str, bool]]:
    return {s.name: (s.state, s.drift) for s in runtime_status.loaded()}


def test_off_and_on_again_keeps_all_counts(host):
    runtime_apply.apply(policy(FLOW.format(process="many { set dscp cs1 }")))
    send(3)
    assert runtime_apply.switch(["watch"], on=False) == ("watch",)
    assert states() == {"watch": ("off", False)}
    send(2)
    assert counts("watch") == {"few": 3, "many": 0}
    assert last_dscp() == 0
    assert runtime_apply.switch(["watch"], on=False) == ()
    assert runtime_apply.switch(["watch"], on=True) == ("watch",)
    assert states() == {"watch": ("on", False)}
    send(2)
    assert counts("watch") == {"few": 4, "many": 1}


def test_each_of_three_can_be_off_alone_and_the_order_holds(host):
    texts = [MARK.format(name=n, priority=0, dscp=d) for n, d in (("a", 1), ("b", 2))]
    runtime_apply.apply(policy("".join(texts)))
    runtime_apply.apply(policy(MARK.format(name="c", priority=0, dscp=3), "/policies/b.itm"))
    marks = {"a": 1, "b": 2, "c": 3}
    for on in itertools.product((True, False), repeat=3):
        wanted = dict(zip(marks, on, strict=True))
        for name, value in wanted.items():
            runtime_apply.switch([name], on=value)
        last = [marks[name] for name, value in wanted.items() if value]
        assert last_dscp() == (last[-1] if last else 0), wanted
        assert states() == {n: ("on" if v else "off", False) for n, v in wanted.items()}


def test_what_is_off_stays_off_when_its_file_is_applied(host):
    text = MARK.format(name="a", priority=0, dscp=1) + MARK.format(name="b", priority=0, dscp=2)
    runtime_apply.apply(policy(text))
    runtime_apply.switch(["b"], on=False)
    done = runtime_apply.apply(policy(text.replace("dscp 1", "dscp 5")))
    assert done.off == ("b",)
    assert last_dscp() == 5
    assert states() == {"a": ("on", False), "b": ("off", False)}
    runtime_apply.switch(["b"], on=True)
    assert last_dscp() == 2
    runtime_apply.switch(["a", "b"], on=False)
    assert runtime_apply.remove([]) == ("a", "b")
    assert nft.tables() == ()


def test_one_of_a_shared_table_off(host):
    runtime_apply.apply(policy(SHARED))
    assert last_dscp() == 2
    runtime_apply.switch(["learn"], on=False)
    assert last_dscp() == 2  # the port is still known
    assert states() == {"learn": ("off", False), "use_it": ("on", False)}
    runtime_apply.switch(["learn", "use_it"], on=True)
    runtime_apply.switch(["use_it"], on=False)
    assert last_dscp() == 1
    runtime_apply.switch(["use_it"], on=True)
    assert last_dscp() == 2


def test_the_commands(host, tmp_path):
    (tmp_path / "a.itm").write_text(MARK.format(name="a", priority=0, dscp=1))
    assert itmc("apply", str(tmp_path / "a.itm")).returncode == 0
    assert itmc("disable", "a").stdout == "a: off now\n"
    assert itmc("disable", "a").stdout == "a: off already\n"
    assert " off " in itmc("list").stdout
    assert "off, as before: a" in itmc("apply", str(tmp_path / "a.itm")).stdout
    assert itmc("enable", "a").stdout == "a: on now\n"
    done = itmc("enable", "b")
    assert (done.returncode, "no policy `b` is loaded" in done.stderr) == (2, True)


def test_a_name_that_is_not_loaded_changes_nothing(host):
    runtime_apply.apply(policy(MARK.format(name="a", priority=0, dscp=1)))
    with pytest.raises(UsageError):
        runtime_apply.switch(["a", "x"], on=False)
    assert last_dscp() == 1


def test_order_holds_where_the_state_was_lost(host, tmp_path):
    texts = [MARK.format(name=n, priority=0, dscp=d) for n, d in (("a", 1), ("b", 2))]
    runtime_apply.apply(policy("".join(texts)))
    (state,) = (tmp_path / "state").rglob("state.json")
    state.unlink()
    runtime_apply.apply(policy("".join(reversed(texts))))
    assert [s.name for s in runtime_status.loaded()] == ["b", "a"]
    assert last_dscp() == 1
