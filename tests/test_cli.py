"""The command as a user meets it: output, exit codes, bad input. Nothing here needs root."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from itmlang.resources import resource as shipped

ITMC = [sys.executable, "-c", "from runtime.cli.main import main; main()"]
SIZE_AWARE = str(shipped("policies", "size_aware.itm"))
QOS_MOD = str(shipped("policies", "qos_mod.itm"))
POLICY = "policy p { at forward classify { a when dport == 80 } process { a { drop } } }\n"
PACKET = "tcp 10.0.0.1:1000 -> 10.0.0.2:80"


def itmc(
    *arguments: str, text: str = "", folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*ITMC, *arguments], input=text, capture_output=True, text=True, cwd=folder,
        timeout=120, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr
    return done


def test_check_says_what_it_checked():
    done = itmc("check", SIZE_AWARE, QOS_MOD)
    assert done.returncode == 0
    assert done.stdout == f"{SIZE_AWARE}: 1 policy, no errors\n{QOS_MOD}: 1 policy, no errors\n"
    assert done.stderr == ""


def test_several_errors_in_one_run_each_underlined(tmp_path):
    file = tmp_path / "a.itm"
    file.write_text(
        "policy a {\n at forwrd\n classify { x when dprt == 80 }\n}\npolicy b {\n att\n}\n"
    )
    done = itmc("check", str(file))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{file}:2:5: error[E010]: there is no hook `forwrd`" in done.stderr
    assert "    2 |  at forwrd\n      |     ^^^^^^" in done.stderr
    assert "help: did you mean `forward`?" in done.stderr
    assert f"{file}:3:20: error[E010]: there is no field `dprt`" in done.stderr
    assert f"{file}:6:2: error[E001]: unexpected `att`" in done.stderr


def test_compile_is_the_same_every_time_and_goes_to_stdout_or_a_file(tmp_path):
    first = itmc("compile", SIZE_AWARE).stdout
    assert first.startswith(f"# {SIZE_AWARE}, compiled by itmc\n")
    assert itmc("compile", SIZE_AWARE, "-o", str(tmp_path / "out.nft")).stdout == ""
    assert (tmp_path / "out.nft").read_text() == first
    assert list(tmp_path.iterdir()) == [tmp_path / "out.nft"]
    assert itmc("compile", SIZE_AWARE, "-o", str(tmp_path / "no" / "out")).returncode == 2


def test_compile_knows_other_forms():
    data = json.loads(itmc("compile", "--format", "json", QOS_MOD).stdout)
    assert (data["schema"], [t["name"] for t in data["tables"]]) == (1, ["itm_qos_mod"])
    rules = [r for c in data["tables"][0]["chains"] for r in c["rules"]]
    assert all(r["comment"].startswith(QOS_MOD[-20:]) or "qos_mod" in r["comment"] for r in rules)
    assert "class long when conn.packets > 0" in itmc("compile", "--format", "ir", QOS_MOD).stdout
    assert "class short" in itmc("compile", "--placement", QOS_MOD).stdout


def test_compile_shows_what_runs_in_python(tmp_path):
    file = tmp_path / "a.itm"
    file.write_text(
        "policy p {\n at forward\n"
        " classify { a when dport == 1  b when dport == 2  c when dport == 3  d }\n"
        ' process { a { set ttl 9  call "site:seen"  drop }  b { call "site:first" once per connection }'
        ' c { limit 1/s else { call "site:over" } } }\n'
        " queues 1 length 7 from 100\n fail closed\n}\n"
        "policy q { at forward classify { a } log { sample 1 in 10 } run python queues 3 from 200 }\n"
    )
    shown = " ".join(itmc("compile", "--placement", str(file)).stdout.split())
    for wanted in (
        "p class a kernel nftables has what comes first: set ttl 9",
        'p class a queue 100 nftables has no call "site:seen", and what follows: drop',
        "p class b queue 100 a connection's first packet",
        "p class b kernel what was decided holds for the others",
        'p class c queue 100 nftables has no call "site:over", so Python limits: limit 1/s else',
        "p class d kernel nftables has all its actions",
        "p unserved kernel `fail closed`: it is dropped",
        "q sample, record kernel",
        "q all else queue 200-202 the policy says `run python`",
        "q unserved kernel `fail open`: it passes",
    ):
        assert wanted in shown
    first, second = json.loads(itmc("compile", "--format", "json", str(file)).stdout)["tables"][
        ::-1
    ]
    (queue,) = first["queues"] if first["name"] == "itm_p" else second["queues"]
    assert (queue["first"], queue["length"], queue["fail"]) == (100, 7, "closed")
    assert queue["calls"] == ["site:seen", "site:first", "site:over"]
    plain = itmc("compile", "--format", "ir", str(file)).stdout
    assert "python: queues 1 from 100 length 7" in plain and "run python: queues 3" in plain
    native = itmc("compile", str(file)).stdout
    assert itmc("compile", "--against", "native", str(file)).stdout == native
    assert native.count("queue flags bypass to ") == 4
    xt = itmc("compile", "--against", "xt", str(file)).stdout
    assert (xt.count("queue flags"), xt.count("# NFQUEUE ")) == (0, 4)


LINKS = """\
link wan {
    interface "eth1"  ingress
    rate 10 mbit
    class fast { priority 0  dscp { ef, cs6 } }
    class bulk { priority 1  at least 1 mbit  at most 8 mbit  queue 100 packets  inner fifo }
    otherwise fast
}
policy p(threshold: packets = 10) {
    at postrouting
    flow conn by saddr, daddr
    classify { short when conn.packets < threshold  long }
    log { count conn }
    process { short { priority wan.fast } }
    control {
        threshold every 1s toward short.rate = 2 mbit with pi kp 0.5 ki 0.1 within 2-20 dry run
        wan.rate every 100ms toward cpu = 50% with call "site:rate" within 1 mbit-20 mbit
        every 10s call "site:tick"
    }
}
"""


def test_compile_shows_links_controllers_and_timers(tmp_path):
    file = tmp_path / "a.itm"
    file.write_text(LINKS.replace("  ingress", ""))
    plain = itmc("compile", "--format", "ir", str(file)).stdout
    id, fast = re.search(r"class fast ([0-9a-f]{4}):([0-9a-f]+) ", plain).groups()
    bulk = re.search(rf"class bulk {id}:([0-9a-f]+) ", plain)[1]
    for wanted in (
        'link wan at "eth1" rate 10 mbit\n'
        f"  class fast {id}:{fast} priority 0 at most 10 mbit dscp {{ ef, cs6 }} otherwise\n"
        f"  class bulk {id}:{bulk} priority 1 at least 1 mbit at most 8 mbit queue 100 packets inner fifo\n"
        "policy p at postrouting",
        "\n  control threshold every 1000 ms toward short.rate = 2 mbit with pi ki 0.1 kp 0.5 "
        "within 2 - 20 from 10, 19 values dry run\n",
        '\n  control wan.rate every 100 ms toward cpu = 50% with call "site:rate" '
        "within 1 mbit - 20 mbit from 10 mbit\n",
        '\n  every 10000 ms call "site:tick"\n',
    ):
        assert wanted in plain
    shown = " ".join(itmc("compile", "--placement", str(file)).stdout.split())
    for wanted in (
        "p control threshold process laws are Python; rules for each value are there",
        "p control wan.rate process laws are Python; it writes the rate of a qdisc",
        'p every 10000 ms process call "site:tick" is Python',
        "wan link kernel a tree of HTB qdiscs: eth1",
    ):
        assert wanted in shown
    data = json.loads(itmc("compile", "--format", "json", str(file)).stdout)
    (table,), (link,) = data["tables"], data["links"]
    assert (link["interface"], link["rate"], link["line"]) == ("eth1", 1_250_000, 1)
    assert [one["classid"] for one in link["classes"]] == [f"{id}:{fast}", f"{id}:{bulk}"]
    assert [one["otherwise"] for one in link["classes"]] == [True, False]
    assert [(c["written"], c["gains"]) for c in table["controllers"]] == [
        ("threshold", {"ki": 0.1, "kp": 0.5}), ("wan.rate", {}),
    ]  # fmt: skip
    assert table["timers"] == [{"policy": "p", "period": 10000, "calls": "site:tick", "line": 17}]


def test_what_comes_in_is_said_to_wait_at_a_device_of_its_own(tmp_path):
    file = tmp_path / "a.itm"
    file.write_text(LINKS.replace("process { short { priority wan.fast } }", ""))
    assert 'link wan at "eth1" ingress rate' in itmc("compile", "--format", "ir", str(file)).stdout
    assert "what comes in at eth1, by an IFB" in itmc("compile", "--placement", str(file)).stdout
    assert json.loads(itmc("compile", "--format", "json", str(file)).stdout)["links"][0]["ingress"]


def test_explain_tells_where_a_packet_waits(tmp_path):
    file = tmp_path / "a.itm"
    file.write_text(LINKS.replace("  ingress", ""))
    shown = " ".join(itmc("explain", str(file), PACKET).stdout.split())
    assert re.search(r"priority wan.fast waits in the link's class [0-9a-f]{4}:[0-9a-f]+ ", shown)


def test_a_pipe_that_closes_early_is_no_error(tmp_path):
    command = " ".join([f"'{part}'" for part in ITMC]) + f" compile {SIZE_AWARE} | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_the_file_may_be_left_out(tmp_path):
    done = itmc("check", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no *.itm here" in done.stderr
    (tmp_path / "one.itm").write_text(POLICY)
    assert itmc("check", folder=tmp_path).stdout == "one.itm: 1 policy, no errors\n"
    (tmp_path / "two.itm").write_text(POLICY)
    assert "there are 2 *.itm files here" in itmc("check", folder=tmp_path).stderr
    (tmp_path / "site.itm").write_text(POLICY)
    assert itmc("check", folder=tmp_path).stdout == "site.itm: 1 policy, no errors\n"


def test_standard_input_is_a_file():
    assert itmc("check", "-", text=POLICY).stdout == "-: 1 policy, no errors\n"
    assert "-:1:1: error[E002]" in itmc("check", "-", text="").stderr


def _bad_files(folder: Path) -> dict[str, tuple[Path, int, str]]:
    contents: dict[str, tuple[bytes, str]] = {
        "empty": (b"", "error[E002]: the file holds no policy"),
        "comments": (b"# nothing\n\n;;\n", "error[E002]"),
        "binary": (bytes(range(256)), "error[E005]: this is no text"),
        "zeros": (bytes(1000), "error[E005]"),
        "latin": ("policy \xfc {}".encode("latin-1"), "error[E005]"),
        "deep": (b"policy p { at forward classify { a when " + b"(" * 100_000, "error[E003]"),
        "not": (b"policy p { classify { a when " + b"not " * 900_000, "error[E003]"),
        "words": (
            b"policy p { at forward classify { a when ttl==1" + b" or ttl==1" * 400_000 + b"}}",
            "error[E006]: the file has more than 1000000 words",
        ),
        "number": (POLICY.replace("80", "9" * 100_000).encode(), "error[E023]"),
        "unclosed": (b"policy p { at forward", "error[E001]: the text ends too early"),
        "string": (b'policy p { interest { in "eth0 } }', "error[E004]"),
        "line": (b"policy p { " + b"x" * 1_000_000, "error[E001]"),
    }
    found = {}
    for name, (content, message) in contents.items():
        (folder / name).write_bytes(content)
        found[name] = (folder / name, 1, message)
    with open(folder / "huge", "wb") as huge:
        huge.truncate(100 * 2**20)
    found["huge"] = (folder / "huge", 1, "error[E006]: the file is larger than 8 MiB")
    found["missing"] = (folder / "missing", 2, "No such file or directory")
    found["folder"] = (folder, 2, "this is a folder")
    found["device"] = (Path("/dev/zero"), 2, "not a regular file")
    os.mkfifo(folder / "fifo")
    found["fifo"] = (folder / "fifo", 1, "error[E002]")
    found["long"] = (folder / ("x" * 300), 2, "File name too long")
    return found


def test_bad_files_get_a_clear_error_in_bounded_memory(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**30, before[1]))
    try:
        for name, (path, code, message) in _bad_files(tmp_path).items():
            done = itmc("check", str(path))
            assert (name, done.returncode, done.stdout) == (name, code, "")
            assert message in done.stderr, (name, done.stderr[:500])
            assert len(done.stderr) < 20_000, name
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_strange_file_names_reach_the_rules_harmlessly(tmp_path):
    for name in ('a "b\n.itm', "x" * 200 + ".itm", "ü\u202e.itm", "-.itm"):
        file = tmp_path / name
        file.write_text(POLICY)
        done = itmc("compile", "--", str(file))
        assert done.returncode == 0, name
        comments = [
            line.split(' comment "')[1] for line in done.stdout.splitlines() if " comment " in line
        ]
        assert comments
        for comment in comments:
            assert comment.endswith('"')
            assert '"' not in comment[:-1]
            assert len(comment[:-1].encode()) <= 128


def test_other_line_ends_and_a_byte_order_mark_are_no_matter(tmp_path):
    file = tmp_path / "dos.itm"
    file.write_bytes(b"\xef\xbb\xbf" + Path(SIZE_AWARE).read_bytes().replace(b"\n", b"\r\n"))
    done = itmc("check", str(file))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["frob"], "No such command"),
        ([], "Usage"),
        (["compile", "--format", "xml", SIZE_AWARE], "--format"),
        (["remove"], "name the policies or links to remove"),
        (["explain", SIZE_AWARE, "tcp 10.0.0.1 -> 10.0.0.2:80"], "the port is missing"),
        (["explain", SIZE_AWARE, "tpc 10.0.0.1:1 -> 10.0.0.2:80"], "did you mean `tcp`?"),
        (["explain", SIZE_AWARE, "tcp 10.0.0.1:1 -> [::1]:80"], "one IP version to the other"),
        (["explain", SIZE_AWARE, "nonsense"], "the packet is not understood"),
        (["lab", SIZE_AWARE, "--sizes", "many"], "`many` is no size"),
    ],
)
def test_wrong_use(arguments, expected):
    done = itmc(*arguments)
    assert done.returncode == 2
    assert expected in done.stderr + done.stdout


def test_explain_tells_the_story_line_by_line():
    done = itmc("explain", SIZE_AWARE, "--after", "11", *PACKET.split(), "tos", "0x11")
    assert done.returncode == 0
    assert "class long: accept" in done.stdout
    assert "line 16  conn.packets <= threshold  no (conn.packets is 11)" in done.stdout
    assert "unset tos minimize-delay   tos 0x11 -> 0x01" in done.stdout
    assert done.stdout.endswith("accepted, tos 0x01 (dscp 0, ecn 1)\n")
    short = itmc("explain", SIZE_AWARE, "--after", "10", PACKET).stdout
    assert "class short: accept" in short
    dropped = itmc("explain", "-", PACKET, text=POLICY).stdout
    assert dropped.endswith("dropped by p at forward\n")
    assert (
        "no policy stands on this path"
        in itmc("explain", "-", "--path", "in", PACKET, text=POLICY).stdout
    )


def test_colour_only_where_it_is_wanted():
    assert "\x1b" not in itmc("check", "-", text="nonsense").stderr
