"""A file is a unit: what was removed of it, how it is called, how its command fails."""

import subprocess

import pytest

from runtime import apply as runtime_apply
from runtime import nft
from runtime import status as runtime_status
from runtime.errors import MachineError
from tests.kernel.test_apply import ITMC, send
from tests.support.commands import run

TWO = """
policy aa(threshold: packets = 3) {{
    at output
    interest {{ protocol udp }}
    flow conn by dport max {size}
    classify {{ few when conn.packets <= threshold; many }}
    log {{ count conn }}
    process {{ many {{ set dscp 1 }} }}
}}
policy bb {{ at output classify {{ all }} process {{ all {{ set ttl 9 }} }} }}
"""


@pytest.fixture
def file(host, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "two.itm"
    path.write_text(TWO.format(size=100))
    assert run("apply", "two.itm").returncode == 0
    return path


def names() -> list[str]:
    return [one.name for one in runtime_status.loaded()]


def test_what_was_removed_comes_back_with_its_file_and_not_before(file):
    run("remove", "bb")
    assert run("set", "aa.threshold", "20").stdout == "aa.threshold is 20\n"
    assert names() == ["aa"]
    assert run("plan", "--exit-code", "two.itm").returncode == 4
    run("apply", "two.itm")
    assert names() == ["aa", "bb"]


@pytest.mark.parametrize("option", ["--confirm", "--digest"])
def test_an_empty_option_is_no_missing_one(file, option):
    file.write_text(TWO.format(size=100).replace("= 3", "= 5"))
    done = run("apply", option, "", "two.itm")
    assert (done.returncode, done.stdout) == (2, "")
    assert runtime_status.status(["aa"])[0].parameters == {"threshold": "3"}


def test_the_same_file_by_another_path_is_no_change(file):
    (file.parent / "link.itm").symlink_to(file)
    for spelled in ("./two.itm", str(file), "link.itm"):
        assert run("plan", "--exit-code", spelled).returncode == 0, spelled
        assert run("apply", spelled).stdout == "loaded aa, bb: as it was\n"
    file.write_text("# one more line\n" + TWO.format(size=100))
    run("apply", str(file))
    assert run("plan", "--exit-code", "two.itm").returncode == 0


def test_the_same_value_again_is_no_generation(file):
    before = run("rollback", "--list").stdout
    assert run("set", "aa.threshold", "3").stdout == "aa.threshold is 3: as it was\n"
    assert run("rollback", "--list").stdout == before


def test_a_smaller_table_holds_no_more_than_it_may(file):
    for port in range(2000, 2040):
        send(1, port)
    file.write_text(TWO.format(size=10))
    assert "as many as find room (10)" in run("plan", "two.itm").stdout
    assert "30 entries found no room" in run("apply", "two.itm").stderr
    assert len(runtime_status.flow_counts("aa")["conn"]) == 10
    for port in range(3000, 3020):
        send(1, port)
    (flow,) = runtime_status.status(["aa"])[0].flows
    assert (flow.entries, flow.uncounted) == (10, 20)


def test_removing_all_takes_what_the_boot_would_load(file, monkeypatch, tmp_path):
    kept = tmp_path / "kept.json.gz"
    monkeypatch.setattr("runtime.store.boot_file", lambda **_: kept)
    file.write_text(TWO.format(size=101))
    from itmlang.pipeline import compile
    from itmlang.source import Source
    from runtime.units import unit_of

    runtime_apply.apply(unit_of(compile(Source("two.itm", file.read_text())), str(file)))
    assert kept.exists()
    nft.load("".join(f"delete table {path}\n" for path in nft.tables()))
    for path in (tmp_path / "state").rglob("*"):
        if path.is_file():
            path.unlink()
    assert runtime_apply.remove([]) == ()
    assert not kept.exists()


def test_an_answer_that_cannot_be_written_is_no_refusal(file):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*ITMC, "disable", "bb"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 74
    assert "the answer could not be written" in done.stderr
    assert {s.name: s.state for s in runtime_status.loaded()}["bb"] == "off"


def test_a_chain_that_somebody_hung_in_is_put_right(file):
    before = subprocess.run(["nft", "-s", "list", "table", "inet", "itm_bb"],
                            capture_output=True, text=True, check=True).stdout  # fmt: skip
    nft.load(
        "delete table inet itm_bb\nadd table inet itm_bb\n"
        "add chain inet itm_bb class_all { type filter hook input priority 0; }\n"
    )
    assert run("apply", "two.itm").returncode == 0
    after = subprocess.run(["nft", "-s", "list", "table", "inet", "itm_bb"],
                           capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert sorted(after.splitlines()) == sorted(before.splitlines())


def test_a_set_that_cannot_be_listed_is_not_taken_for_empty(file, monkeypatch):
    def refused(script: str, flags: str, check: bool) -> object:
        return nft._Answer(1, "", "Error: Operation not permitted")

    with monkeypatch.context() as broken:
        broken.setattr(nft, "_in_child", refused)
        with pytest.raises(MachineError, match="cannot list"):
            nft.elements("inet itm_aa", "flow_conn_inet")
    assert nft.elements("inet itm_aa", "nobody") == []


def test_a_set_resized_by_hand_is_drift(file):
    nft.load("table inet itm_aa {\n\tset flow_conn_inet {\n\t\ttypeof th dport\n\t\tsize 77\n"
             "\t\tflags dynamic,timeout\n\t}\n}\n")  # fmt: skip
    (status,) = runtime_status.status(["aa"])
    assert "set flow_conn_inet was changed" in status.changed
