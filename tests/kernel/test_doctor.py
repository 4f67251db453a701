"""`itmc doctor`: what it says holds, nothing of the machine's own changes, lacks are told."""

import gzip
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import click
import pytest

from itmlang.capabilities import EVERYTHING, FEATURES, NAMES, from_json
from itmlang.pipeline import compile
from itmlang.source import Source
from runtime import capabilities, nft
from runtime.capabilities import TRIALS, Report, ask
from runtime.cli.main import itmc as group
from runtime.errors import MachineError
from runtime.traffic import Namespace, TrafficError, veth
from tests.support.needs import unavailable
from tests.test_capabilities import NEEDING, results
from tests.test_cli import ITMC, itmc

POLICIES_NEED = [feature.name for feature in FEATURES if feature.part == "policies"]
# The same asked by other tools, each in a namespace of its own. `nft` reads standard input.
BY_OTHERS = {
    "devices awaited": (
        "nft -f -",
        'table inet t { chain c { type filter hook ingress device "none" priority 0; }; }',
    ),
    "namespaces and veth": ("ip link add name one type veth peer name two", ""),
    "native queue": (
        "nft -f -",
        "table inet t { chain c { type filter hook output priority 0; queue num 1 bypass; }; }",
    ),
    "HTB": ("tc qdisc add dev lo root handle 1: htb", ""),
    "fq_codel": ("tc qdisc add dev lo root handle 1: fq_codel", ""),
    "netem": ("tc qdisc add dev lo root handle 1: netem", ""),
}
# Nothing is sent for these: loading is the proof, or they are no rules.
WITHOUT_PACKETS = {
    "fragments", "SCTP rewriting", "reject", "kernel log", "log groups", "TCP options",
    "elements restored", "devices awaited", "namespaces and veth", "fq_codel", "netem", "IPIP",
    "BPF on routes", "BPF on links", "fragments together",
}  # fmt: skip


@pytest.fixture(scope="module")
def report() -> Report:
    try:
        return ask()
    except MachineError as error:
        unavailable(error)


def there(report: Report) -> frozenset[str]:
    return report.capabilities.features


def run(command: str, text: str = "") -> bool:
    """Does another tool get it done, in a namespace that nobody else is in?"""
    words = ["unshare", "-n", *command.split()]
    if shutil.which(words[2]) is None:
        pytest.skip(f"needs {words[2]}")
    return subprocess.run(words, input=text, capture_output=True, text=True).returncode == 0


@pytest.mark.parametrize("name", POLICIES_NEED)
def test_a_policy_loads_where_the_doctor_says_so(name, report):
    """The `nft` command takes a policy's rules if all that they need is there."""
    queue = report.capabilities.queue
    text = compile(Source("a.itm", NEEDING[name]), queue=queue).text.text
    loads = run("nft -f -", text.replace('device "eth0"', 'device "lo"'))
    assert loads or name not in there(report)
    if set(POLICIES_NEED) <= there(report):
        assert loads


@pytest.mark.parametrize("name", BY_OTHERS)
def test_others_find_the_same(name, report):
    assert run(*BY_OTHERS[name]) == (name in there(report))


_SET = (
    "table inet t {{ set s {{ type inet_service; size {}; flags dynamic,timeout; timeout {}; }}; }}"
)
_CHAIN = "table inet t { chain c { type filter hook output priority 0; udp dport 1; }; }"
_REPLACE = "replace rule inet t c handle 2 udp dport 2 accept"


@pytest.mark.parametrize(
    "name, scripts, listed",
    [
        (
            "sets changed in place",
            (_SET.format(16, "1m"), "add element inet t s { 9 }", _SET.format(32, "2m")),
            ("size 32", "timeout 2m", "elements = { 9 "),
        ),
        (
            "elements restored",
            (
                _SET.format(16, "1m"),
                "add element inet t s { 9 counter packets 7 bytes 70 timeout 1h expires 30m }",
            ),
            ("9 counter packets 7 bytes 70 timeout 1h expires ",),
        ),
        ("rules replaced", (_CHAIN, _REPLACE), ("udp dport 2 accept",)),
    ],
)
def test_the_nft_command_finds_the_same(name, scripts, listed, report):
    lines = "".join(f"nft '{script}' || exit 1\n" for script in scripts) + "nft list ruleset\n"
    done = subprocess.run(
        ["unshare", "-n", "sh"], input=lines, capture_output=True, text=True, check=False
    )
    works = done.returncode == 0 and all(text in done.stdout for text in listed)
    assert works == (name in there(report)), done.stdout + done.stderr


@pytest.mark.parametrize(
    "name, options",
    [
        ("egress", ("NETFILTER_EGRESS",)),
        ("element quotas", ("NFT_QUOTA",)),
        ("element connections", ("NFT_CONNLIMIT",)),
        ("connection tracking", ("NFT_CT",)),
        ("numbers drawn", ("NFT_NUMGEN",)),
        ("limits", ("NFT_LIMIT",)),
        ("reject", ("NFT_REJECT_INET",)),
        ("native queue", ("NFT_QUEUE",)),
        ("xt queue", ("NFT_COMPAT", "NETFILTER_XT_TARGET_NFQUEUE")),
        ("HTB", ("NET_SCH_HTB",)),
        ("netem", ("NET_SCH_NETEM",)),
        ("u32 filters", ("NET_CLS_U32",)),
        ("IFB", ("IFB", "NET_ACT_MIRRED", "NET_SCH_INGRESS")),
        ("IPIP", ("NET_IPIP",)),
        ("BPF on routes", ("LWTUNNEL_BPF",)),
        ("BPF on links", ("NET_CLS_BPF", "NET_SCH_INGRESS")),
    ],
)
def test_what_the_kernel_was_built_with_is_there(name, options, report):
    """Of options that are modules nothing follows: they may not lie on this machine."""
    try:
        config = gzip.decompress(Path("/proc/config.gz").read_bytes()).decode()
    except FileNotFoundError:
        pytest.skip("this kernel does not tell its configuration")
    if any(f"CONFIG_{option}=m\n" in config for option in options):
        pytest.skip("a module")
    built_in = all(f"CONFIG_{option}=y\n" in config for option in options)
    assert built_in == (name in there(report))


def test_what_this_machine_has_is_enough_for_all_policies(report):
    """If it has all that policies can need; the rest it may lack."""
    if report.capabilities.lacking("policies") or not there(report) & {"native queue", "xt queue"}:
        pytest.skip("this kernel lacks something that policies need")
    alike = replace(EVERYTHING, features=NAMES - {"native queue", "xt queue"} | there(report))
    plain = {name: result.text.text for name, result in results(alike).items()}
    here = {name: result.text.text for name, result in results(report.capabilities).items()}
    assert here == plain


def test_it_is_quick():
    begin = time.monotonic()
    done = itmc("doctor")
    assert done.returncode in (0, 3)
    # About a second and a half; other tests run beside this one.
    assert time.monotonic() - begin < 10


def everything_here() -> str:
    """What somebody could see of a namespace: rules, links, queues, routes, addresses."""
    commands = ("nft -a list ruleset", "ip -d link", "ip addr", "ip route show table all",
                "tc qdisc", "ip -6 route show table all")  # fmt: skip
    seen = [subprocess.run(c.split(), capture_output=True, text=True).stdout for c in commands]
    settings = sorted(Path("/proc/sys/net/ipv4/conf/all").glob("*"))
    seen += [path.read_text() for path in settings if path.stat().st_mode & 0o400]
    seen.append(Path("/proc/sys/net/ipv4/ip_forward").read_text())
    return "\n".join(seen)


def test_nothing_of_the_machines_own_changes(host, tmp_path):
    veth(host, "doctor0", host, "doctor2")
    # Even a table of the name that is used in the scratch namespace.
    nft.load(
        "table inet doctor {\ncounter works {\n}\nchain at_output { "
        'type filter hook output priority 0;\ncounter name "works"\n}\n}\n'
    )
    before = everything_here()
    assert "doctor" in before
    namespaces = sorted(Path("/run/netns").glob("*"))
    done = itmc("doctor", "--json")
    assert done.returncode in (0, 3), done.stderr
    assert everything_here() == before
    assert sorted(Path("/run/netns").glob("*")) == namespaces
    assert not (tmp_path / "state").exists()


def test_the_file_is_what_compile_takes(host, tmp_path):
    done = itmc("doctor", "--json")
    data = json.loads(done.stdout)
    machine = from_json(data)
    assert (machine.kernel, machine.unasked) == (
        Path("/proc/sys/kernel/osrelease").read_text().strip(),
        set(),
    )
    assert data["reasons"].keys() == {f.name for f in FEATURES if f.name not in machine.features}
    assert all(data["reasons"].values())
    assert data["host"]["forwarding"] == {"IPv4": False, "IPv6": False}
    (tmp_path / "box.json").write_text(done.stdout)
    (tmp_path / "a.itm").write_text(NEEDING["reject"])
    taken = itmc("compile", "a.itm", "--for", "box.json", folder=tmp_path)
    assert taken.returncode == (0 if done.returncode == 0 else taken.returncode)


def test_people_are_told_each_feature_and_each_lack(host):
    (Path("/proc/sys/net/ipv4/ip_forward")).write_text("1")
    done = itmc("doctor")
    machine = from_json(json.loads(itmc("doctor", "--json").stdout))
    for feature in FEATURES:
        here = "yes" if feature.name in machine.features else "NO"
        row = next(
            line for line in done.stdout.splitlines() if line.startswith(feature.name + "  ")
        )
        assert row.removeprefix(feature.name).split()[0] == here
        assert feature.purpose in row
        if here == "NO":
            _, _, told = done.stdout.partition(f"\n  {feature.name}: ")
            assert f"= cost: {feature.cost}" in told.splitlines()[1]
            assert f"= help: {feature.mend}" in told.splitlines()[2]
    assert "IP forwarding: IPv4 on, IPv6 off\n" in done.stdout
    assert "policies at forward see no packet" in done.stdout


# A machine that lacks something.


def doctor(capsys) -> tuple[int, str]:
    """The command in this process: exit code and what it said."""
    try:
        code = group.main(["doctor"], standalone_mode=False) or 0
    except click.exceptions.Exit as exit:
        code = exit.exit_code
    return code, capsys.readouterr().out


def test_a_refusal_is_a_lack_with_its_reason(host, monkeypatch, capsys):
    load = nft.load

    def refusing(script, *, check=False):
        if "numgen" in script:
            raise nft.NftRefusalError((nft.NftError(3, "Could not process rule: No such file"),))
        load(script, check=check)

    monkeypatch.setattr(nft, "load", refusing)
    code, said = doctor(capsys)
    assert code == 3
    assert (
        "  numbers drawn: Could not process rule: No such file\n"
        "      = cost: no `random`, no `sample`\n"
        "      = help: `modprobe nft_numgen`, or a kernel with CONFIG_NFT_NUMGEN\n"
    ) in said


def test_rules_that_load_and_do_not_work_are_a_lack(host, monkeypatch):
    """As raw writes leave IPv4's checksum wrong: the packet never comes."""
    load = nft.load

    def writing_raw(script, *, check=False):
        load(script.replace("ip dscp set ef ip ttl set 9", "@nh,64,8 set 9"), check=check)

    before = there(ask())
    monkeypatch.setattr(nft, "load", writing_raw)
    report = ask()
    assert before - there(report) == {"header rewriting"} & before
    (answer,) = [a for a in report.answers if a.feature.name == "header rewriting"]
    assert answer.reason == "its rules load, but 0 packets match instead of 1"


def test_without_packets_nothing_that_counts_is_proven(host, monkeypatch):
    monkeypatch.setattr(capabilities, "_send", lambda packets: None)
    monkeypatch.setattr(capabilities, "_ARRIVAL", 0.0)
    assert there(ask()) <= WITHOUT_PACKETS
    assert TRIALS.keys() >= WITHOUT_PACKETS


def test_without_rules_nothing_that_counts_is_proven(host, monkeypatch):
    """The counts come from the rules that are tried: rules gone, nothing is counted."""
    load = nft.load
    monkeypatch.setattr(capabilities, "_ARRIVAL", 0.0)

    def halved(script, *, check=False):
        load(script.replace('counter name "works"', "continue"), check=check)

    monkeypatch.setattr(nft, "load", halved)
    proven = there(ask())
    assert proven <= (WITHOUT_PACKETS - {"TCP options", "BPF on routes", "BPF on links"}) | {
        "element counters",
        "sets changed in place",
        "HTB",
        "u32 filters",
    }


def test_libnftables_falling_over_is_a_lack(host, monkeypatch):
    load = nft.load

    def falling(script, *, check=False):
        if "ct id" in script:
            raise MachineError("libnftables ended with signal 6", "this is a bug in libnftables")
        load(script, check=check)

    monkeypatch.setattr(nft, "load", falling)
    (answer,) = [a for a in ask().answers if a.feature.name == "connection numbers"]
    assert (answer.there, answer.reason) == (False, "libnftables ended with signal 6")


def test_without_libnftables_it_says_what_to_install(host, monkeypatch):
    monkeypatch.setitem(sys.modules, "nftables", None)
    with pytest.raises(MachineError, match="libnftables cannot be loaded") as caught:
        ask()
    assert "apt-get install" in caught.value.help


@pytest.mark.parametrize("right", ["net_admin", "sys_admin"])
def test_without_rights_it_says_so(right):
    try:
        Namespace.create("rights").close()
    except TrafficError as error:
        unavailable(error)
    done = subprocess.run(
        ["setpriv", "--bounding-set", f"-{right}", *ITMC, "doctor"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert "Traceback" not in done.stderr
    assert "run it as root" in done.stderr


@pytest.mark.parametrize("kind", ["file", "damaged"])
def test_a_state_folder_that_cannot_be_used_is_told(host, tmp_path, monkeypatch, kind, capsys):
    if kind == "file":
        (tmp_path / "no").write_text("")
        monkeypatch.setenv("ITM_STATE_DIR", str(tmp_path / "no"))
    else:
        monkeypatch.setattr(capabilities.store, "load", damaged)
    code, said = doctor(capsys)
    assert code == 3
    assert ("no is no folder" if kind == "file" else "the state is damaged") in said
    assert "ITM_STATE_DIR" in said


def damaged():
    raise MachineError("the state is damaged")


def test_a_module_that_would_make_devices_is_not_loaded(host, tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(
        capabilities, "add_link", lambda ns, link, kind, **options: tried.append(kind)
    )
    monkeypatch.setattr(capabilities, "_MODULES", tmp_path)
    folder = tmp_path / Path("/proc/sys/kernel/osrelease").read_text().strip()
    folder.mkdir()
    (folder / "modules.dep").write_text(
        "kernel/net/ipv4/notthere.ko.zst: kernel/net/ipv4/ip_tunnel.ko.zst\n"
    )
    capabilities._has_link("notthere")(host)
    assert tried == []
    capabilities._has_link("ip_tunnel")(host)
    assert tried == ["ip_tunnel"]


def test_everything_is_more_than_a_machine_must_have(report):
    assert there(report) <= EVERYTHING.features
