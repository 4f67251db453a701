"""What a machine has: the table, its file, and the errors where a policy needs what lacks."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from itmlang import values
from itmlang.capabilities import (
    EVERYTHING,
    FEATURES,
    NAMES,
    PARTS,
    Capabilities,
    CapabilitiesError,
    from_json,
)
from itmlang.diagnostics import CompileError, render
from itmlang.pipeline import Compiled, compile
from itmlang.resources import resource
from itmlang.source import Source
from runtime.capabilities import TRIALS
from runtime.cli.files import reader
from tests.support.cases import cases
from tests.test_cli import itmc

POLICIES_NEED = [feature for feature in FEATURES if feature.part == "policies"]

# For each feature a policy that needs it, on the line that ends in `# here`.
NEEDING = {
    "inet tables": "policy p { at forward classify { a } } # here",
    "ingress": """policy p {
        at ingress "eth0" # here
        classify { a }
    }""",
    "egress": """policy p {
        at egress "eth0" # here
        classify { a }
    }""",
    "route chains": """policy p {
        at output # here
        classify { a }
        process { a { set mark 1 } }
    }""",
    "value sets": """policy p {
        at forward
        classify {
            a when mark in { 7, 9 } # here
        }
    }""",
    "verdict maps": """policy p {
        at forward
        interest { family ipv4 }
        classify { a }
        process {
            a { set tos minimize-delay } # here
        }
    }""",
    "timed verdict maps": """policy p(most: packets = 10) {
        at forward
        flow f by saddr
        classify {
            a when f.packets <= most
            b
        }
        log { count f } # here
        control { most every 1s toward f.flows = 5 with threshold step 1 within 2-20 }
    }""",
    "dynamic sets": """policy p {
        at forward
        flow f by protocol # here
        classify { a }
        log { count f }
    }""",
    "concatenations": """policy p {
        at forward
        flow f by protocol, mark # here
        classify { a }
        log { count f }
    }""",
    "element deletion": """set seen: address timeout 1m max 100
    policy p {
        at forward
        classify { a when saddr in @seen }
        update {
            add saddr to @seen
            remove saddr from @seen when ttl == 3 # here
        }
    }""",
    "element counters": """policy p {
        at forward
        flow f by protocol
        classify { a }
        log {
            count f # here
        }
    }""",
    "element limits": """policy p {
        at forward
        flow f by protocol
        classify { a when f.packets > 7 }
        log {
            count f # here
        }
    }""",
    "element quotas": """policy p {
        at forward
        flow f by protocol
        classify { a when f.bytes > 700 }
        log {
            count f # here
        }
    }""",
    "element connections": """policy p {
        at forward
        flow f by protocol
        classify { a when f.connections > 7 }
        log {
            count f # here
        }
    }""",
    "raw header bytes": """policy p {
        at forward
        interest { family ipv4 }
        classify {
            a when tos == 4 # here
        }
    }""",
    "fragments": """policy p {
        at forward
        interest { family ipv6 }
        classify {
            a when dport == 7 # here
        }
    }""",
    "TCP options": """policy p {
        at forward
        classify {
            a when tcp.mss > 700 # here
        }
    }""",
    "connection tracking": """policy p {
        at forward
        classify {
            a when ct.state == new # here
        }
    }""",
    "connection numbers": """policy p {
        at forward
        flow f by connection # here
        classify { a }
        log { count f }
    }""",
    "numbers drawn": """policy p {
        at forward
        classify { a }
        log {
            sample 1 in 10 group 1 # here
        }
    }""",
    "named counters": """policy p {
        at forward
        classify {
            a # here
        }
    }""",
    "header rewriting": """policy p {
        at forward
        classify { a }
        process {
            a { set ttl 7 } # here
        }
    }""",
    "SCTP rewriting": """policy p {
        at forward
        interest { protocol sctp }
        classify { a }
        process {
            a { set dport 7 } # here
        }
    }""",
    "packet marks": """policy p {
        at forward
        classify { a }
        process {
            a { set mark 7 } # here
        }
    }""",
    "limits": """policy p {
        at forward
        classify { a }
        process {
            a { limit 10 packets/s } # here
        }
    }""",
    "reject": """policy p {
        at forward
        classify { a }
        process {
            a { reject } # here
        }
    }""",
    "fragments together": """policy p {
        at prerouting
        classify { a }
        process {
            a { decapsulate } # here
        }
    }""",
    "flow hashes": """policy p {
        at forward
        classify { a }
        process {
            a { call "site:seen" } # here
        }
        queues 2
    }""",
    "connection marks": """policy p {
        at forward
        classify { a }
        process {
            a { call "site:seen" once per connection } # here
        }
    }""",
    "kernel log": """policy p {
        at forward
        classify { a }
        log {
            record "seen" at most 1/s # here
        }
    }""",
    "log groups": """policy p {
        at forward
        classify { a }
        log {
            sample 1 in 10 group 1 # here
        }
    }""",
}

# Words of rules that every nftables knows: no feature of a machine.
_WORDS = """
    accept add ah burst bytes chain checksum comment daddr day dccp device direction dport
    drop dscp echo-reply echo-request ecn element elements esp established filter flush forward
    frag-off goto gre hook hour icmp icmpv6 icmpx ifname iif iifname inc inet_proto
    inet_service input invalid ip ip6 ipv4 ipv4_addr ipv6 ipv6-icmp ipv6_addr jump l4proto
    length map mark maxseg meta minute missing mod name netdev new nf_proto nfproto oifname
    original output over packets policy port-unreachable postrouting prefix prerouting
    priority protocol random related reply reset return saddr sctp second set size snaplen
    sport state table tcp th timeout type typeof udp udplite untracked verdict version vmap week with
"""
EVERYWHERE = set(_WORDS.split())


def lacking(*names: str) -> Capabilities:
    return replace(EVERYTHING, features=NAMES - set(names))


def refused(text: str, machine: Capabilities) -> list:
    with pytest.raises(CompileError) as caught:
        compile(Source("a.itm", text), capabilities=machine)
    return [found for found in caught.value.diagnostics if found.is_error]


def results(machine: Capabilities = EVERYTHING) -> dict[str, Compiled]:
    """Each case and each policy of the library, for a machine."""
    found = {
        case.name: compile(Source(case.path.name, case.policy), case._read, machine)
        for case in cases()
    }
    for path in sorted(resource("policies", "").glob("*.itm")):
        found[path.name] = compile(Source(str(path), path.read_text()), reader(), machine)
    return found


def test_the_rows_are_whole():
    assert len(NAMES) == len(FEATURES)
    for feature in FEATURES:
        assert feature.part in PARTS, feature.name
        assert all((feature.purpose, feature.cost, feature.mend)), feature.name
        assert not any(text.endswith(".") for text in (feature.purpose, feature.cost, feature.mend))
        assert bool(feature.spelled) == (feature.part in ("policies", "queues")), feature.name


def test_the_machine_is_asked_for_each_and_no_other():
    assert TRIALS.keys() == NAMES


def test_each_that_policies_need_has_a_policy():
    assert NEEDING.keys() == {feature.name for feature in POLICIES_NEED}


@pytest.mark.parametrize("feature", POLICIES_NEED, ids=lambda feature: feature.name)
def test_what_lacks_is_refused_where_it_is_used(feature):
    text = NEEDING[feature.name]
    assert compile(Source("a.itm", text), capabilities=EVERYTHING).text
    (error,) = refused(text, lacking(feature.name))
    assert error.code == "E061"
    assert error.span.source.line(error.span.line).endswith("# here")
    assert feature.name in error.message
    assert feature.purpose in error.message
    assert feature.cost in error.notes[0][0]
    assert error.help == feature.mend


@pytest.mark.parametrize("feature", POLICIES_NEED, ids=lambda feature: feature.name)
def test_it_is_the_only_one_of_its_kind_that_is_needed(feature):
    """With nothing lacking but what the policy does not use, it compiles."""
    wanted = {f.name for f in POLICIES_NEED if _needs(NEEDING[feature.name], f.name)}
    assert feature.name in wanted
    text = NEEDING[feature.name]
    machine = Capabilities(frozenset({*wanted, "native queue"}))
    assert compile(Source("a.itm", text), capabilities=machine).text


def _needs(text: str, name: str) -> bool:
    try:
        compile(Source("a.itm", text), capabilities=lacking(name))
    except CompileError:
        return True
    return False


CALLS = """policy p {
    at forward
    classify { a }
    process {
        a { call "site:seen" } # here
    }
}"""


def test_queues_are_in_the_form_that_the_machine_has():
    def text(*lacks: str) -> str:
        return compile(Source("a.itm", CALLS), capabilities=lacking(*lacks)).text.text

    assert text() == text("xt queue")
    assert re.findall(r"queue flags bypass to \d+", text())
    assert "queue flags" not in text("native queue")
    assert re.findall(r"\d+", text().partition("queue flags bypass to ")[2])[0] in re.findall(
        r"# NFQUEUE (\d+)", text("native queue")
    )


@pytest.mark.parametrize("form, row", [("", "native"), ("native", "native"), ("xt", "xt")])
def test_a_machine_without_the_form_of_queues_that_is_wanted_is_refused(form, row):
    lacks = ("native queue", "xt queue") if not form else (f"{form} queue",)
    with pytest.raises(CompileError) as caught:
        compile(Source("a.itm", CALLS), capabilities=lacking(*lacks), queue=form)
    (error,) = (found for found in caught.value.diagnostics if found.is_error)
    assert (error.code, f"lacks `{row} queue`" in error.message) == ("E061", True)
    assert error.span.source.line(error.span.line).endswith("# here")


def test_a_plain_policy_needs_little():
    little = {f.name for f in POLICIES_NEED if _needs(NEEDING["inet tables"], f.name)}
    assert little == {"inet tables", "named counters"}


def test_all_that_lacks_is_said_at_once_and_further_lines_beside():
    conditions = "".join(f"            c{n} when tcp.mss == {n}\n" for n in range(100, 106))
    text = f"policy p {{\n at forward\n classify {{\n{conditions} }}\n process {{ c100 {{ reject }} }}\n}}"
    options, reject = refused(text, lacking("TCP options", "reject"))
    assert (options.span.line, reject.span.line) == (4, 11)
    assert [span.line for _, span in options.notes if span] == [5, 6, 7]
    assert options.notes[-1] == ("and in 2 more lines", None)
    assert "= note: needed here, too (a.itm:5)" in render(options)


def test_what_stands_in_quotes_is_no_need():
    text = """policy p {
        at forward
        interest { in "reject" }
        classify { a }
        log { record "reject with numgen ct id" at most 1/s }
    }"""
    assert compile(
        Source("a.itm", text),
        capabilities=lacking("reject", "numbers drawn", "connection numbers", "log groups"),
    ).text


def test_rules_say_nothing_that_no_row_knows():
    """A new word in a rule: give its feature a row, or say that it is everywhere."""
    spelled = re.sub(r"\\[bstw]", " ", " ".join(feature.spelled for feature in FEATURES))
    known = {*EVERYWHERE, *re.findall(r"[a-z]\w*", spelled), *values.DSCP.names}
    unknown = {}
    for name, result in results().items():
        tables = result.ruleset.tables
        own = {one.name for t in tables for one in (t, *t.chains, *t.counters, *t.sets, *t.values)}
        for line in result.text.text.splitlines():
            bare = re.sub(r'"[^"]*"|#.*', "", line)
            words = re.findall(r"(?<![^\s{,(])[a-z][\w.-]*(?![\w:.-])", bare)
            unknown |= {word: name for word in words if word not in known | own}
    assert unknown == {}


def test_a_file_comes_back_as_it_was():
    machine = Capabilities(
        frozenset({"ingress", "egress", "HTB"}), frozenset({"netem"}), "6.1.0", "1.0.6"
    )
    assert from_json(json.loads(json.dumps(machine.to_json()))) == machine
    assert from_json(EVERYTHING.to_json()) == EVERYTHING


def test_what_a_file_says_beside_is_left_alone():
    data = EVERYTHING.to_json()
    data["features"]["time travel"] = True
    data["host"] = {"forwarding": {"IPv4": True}}
    assert from_json(data) == EVERYTHING


def test_what_was_never_asked_counts_as_lacking_and_is_said_to_be():
    data = EVERYTHING.to_json()
    del data["features"]["reject"]
    machine = from_json(data)
    assert machine.unasked == {"reject"}
    (error,) = refused(NEEDING["reject"], machine)
    assert "was never asked for `reject`" in error.message
    assert "itmc doctor --json" in error.help


@pytest.mark.parametrize(
    "data, why",
    [
        ([], "does not come from"),
        ("box", "does not come from"),
        (None, "does not come from"),
        ({"features": {}}, "does not come from"),
        ({"schema": 2, "features": {}}, "schema 2, not 1"),
        ({"schema": "1", "features": {}}, "schema '1', not 1"),
        ({"schema": True, "features": {}}, "schema True"),
        ({"schema": 1}, "no `features`"),
        ({"schema": 1, "features": ["reject"]}, "no `features`"),
        ({"schema": 1, "features": {"reject": "yes"}}, "`reject` is neither true nor false"),
        ({"schema": 1, "features": {}, "kernel": 6}, "`kernel` is no text"),
    ],
)
def test_what_is_no_such_file_is_refused(data, why):
    with pytest.raises(CapabilitiesError, match=re.escape(why)):
        from_json(data)


# The command.


def test_compile_and_check_for_another_machine(tmp_path):
    file = tmp_path / "a.itm"
    file.write_text(NEEDING["reject"])
    box = tmp_path / "box.json"
    box.write_text(json.dumps(EVERYTHING.to_json()))
    plain = itmc("compile", str(file))
    done = itmc("compile", str(file), "--for", str(box))
    assert (done.returncode, done.stdout) == (0, plain.stdout)
    box.write_text(json.dumps(lacking("reject").to_json()))
    for command in ("compile", "check"):
        done = itmc(command, str(file), "--for", str(box))
        assert (done.returncode, done.stdout) == (1, "")
        assert f"{file}:5:17: error[E061]: the machine lacks `reject`" in done.stderr
        # The machine may come on standard input, as from `itmc doctor --json`.
        again = itmc(command, str(file), "--for", "-", text=box.read_text())
        assert (again.returncode, again.stderr) == (1, done.stderr)


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("policy p { }", "is no JSON"),
        ("\x00\xff", "is no JSON"),
        ("{}", "tells of no machine: this does not come from `itmc doctor --json`"),
        ('{"schema": 7, "features": {}}', "it has schema 7, not 1"),
    ],
)
def test_a_bad_machine_file_is_wrong_use(tmp_path, text, why):
    file = tmp_path / "a.itm"
    file.write_text(NEEDING["reject"])
    box = tmp_path / "box.json"
    box.write_text(text, encoding="latin-1")
    done = itmc("compile", str(file), "--for", str(box))
    assert (done.returncode, done.stdout) == (2, "")
    assert why in done.stderr
    assert "= help: make it on that machine: `itmc doctor --json > box.json`" in done.stderr


@pytest.mark.parametrize("name", ["missing.json", "."])
def test_a_machine_file_that_is_not_there_is_wrong_use(tmp_path, name):
    (tmp_path / "a.itm").write_text(NEEDING["reject"])
    done = itmc("compile", "a.itm", "--for", name, folder=tmp_path)
    assert done.returncode == 2
    assert f"itmc: {name}: " in done.stderr
    assert "itmc doctor --json" in done.stderr


def test_the_page_has_the_table(request):
    page = Path(__file__).parents[1] / "docs" / "doctor.md"
    begin = "| feature | for | without it | mend it by |\n| --- | --- | --- | --- |\n"
    rows = "".join(f"| {f.name} | {f.purpose} | {f.cost} | {f.mend} |\n" for f in FEATURES)
    before, _, rest = page.read_text().partition(begin)
    made = f"{before}{begin}{rows}\n{rest[rest.index('The parts:') :]}"
    if request.config.getoption("--bless"):
        page.write_text(made)
    assert page.read_text() == made, "make it anew: pytest tests/test_capabilities.py --bless"
