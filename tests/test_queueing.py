"""Queues and what leads to them: their numbers, what a change moves, what is stored of them."""

import json
import re
from dataclasses import replace

import pytest

from itmlang import ir
from itmlang.diagnostics import CompileError
from itmlang.nft.model import Queue
from itmlang.pipeline import Compiled, compile
from itmlang.resolve import Given
from itmlang.semantics import Did, Host
from itmlang.source import Source
from runtime.units import from_json, to_json, unit_of
from tests.support.cases import cases
from tests.support.kernel import placed

POLICY = """
set near: address = { 10.0.0.0/8 }
set seen: address timeout 1h

policy p(rate: packet_rate = 10/s, far: address = 192.0.2.1) {
    at prerouting
    flow host by saddr timeout 1m
    classify { a when saddr in @near  b when dport == 80  c when saddr in @seen  rest }
    process {
        a { set dscp ef  limit rate per host  call "site:seen" }
        b { limit rate per host else { call "site:late" } }
        rest { set ttl 9 }
    }
    update { add saddr to @seen when dport == 22 }
}
"""


def compiled(text: str, given: Given | None = None) -> Compiled:
    return compile(Source("a.itm", text), given=given)


def queues(text: str, given: Given | None = None) -> list[Queue]:
    return [q for table in compiled(text, given).ruleset.tables for q in table.queues]


def first(text: str, given: Given | None = None) -> int:
    (queue,) = queues(text, given)
    return queue.first


# What the workers do not see: other places, other words around, what the kernel does.
SAME = {
    "nothing": lambda text: text,
    "layout": lambda text: "# a comment\n" + text.replace("  ", "\n        "),
    "what the kernel does": lambda text: text.replace("dscp ef", "dscp cs1"),
    "classes of the kernel": lambda text: text.replace("dport == 22", "dport == 23"),
    "sets of the kernel": lambda text: text.replace("10.0.0.0/8", "10.0.0.0/9"),
    "another policy": lambda text: text + "policy q { at forward classify { x } }",
}
OTHERS = {
    "a handler": lambda text: text.replace("site:seen", "site:known"),
    "a handler of an else": lambda text: text.replace("site:late", "site:known"),
    "a parameter of a limit there": lambda text: text.replace("= 10/s", "= 11/s"),
    "the key of its flow": lambda text: text.replace("by saddr timeout", "by daddr timeout"),
    "the time-out of its flow": lambda text: text.replace("timeout 1m", "timeout 2m"),
    "a class that handlers can name": lambda text: text.replace("set ttl 9", "set ttl 8"),
    "the policy's name": lambda text: text.replace("policy p(", "policy other("),
    "how many": lambda text: text.replace("update {", "queues 1 length 7 update {"),
    "what becomes of the unserved": lambda text: text.replace("update {", "fail closed update {"),
}


@pytest.mark.parametrize("change", [name for name in SAME if name != "what the kernel does"])
def test_queues_stay_where_python_does_the_same(change):
    assert first(SAME[change](POLICY)) == first(POLICY)


def test_what_stands_before_a_call_is_not_pythons_where_no_class_can_be_named():
    tunnel = POLICY.replace('call "site:seen"', "decapsulate").replace('call "site:late"', "drop")
    assert first(SAME["what the kernel does"](tunnel)) == first(tunnel)


@pytest.mark.parametrize("change", OTHERS)
def test_queues_are_others_where_python_does_something_else(change):
    assert first(OTHERS[change](POLICY)) != first(POLICY)


def test_a_parameter_that_is_set_is_another_queue():
    given = {"p": {"rate": "11/s"}}
    assert first(POLICY, given) == first(POLICY.replace("= 10/s", "= 11/s")) != first(POLICY)


@pytest.mark.parametrize(
    "old, new",
    [
        ("dport == 80", "dport == 81"), ("10.0.0.0/8", "10.0.0.0/9"), ("host.packets", "host.bytes"),
        ("at forward", "at postrouting"), ("interest {", "interest { protocol tcp "),
    ],
)  # fmt: skip
def test_of_a_policy_in_python_all_is_pythons(old, new):
    text = """set near: address = { 10.0.0.0/8 }
    policy p {
        at forward
        interest { saddr @near }
        flow host by saddr
        classify { a when dport == 80 and host.packets > 7 }
        log { count host }
        run python
    }"""
    assert old in text
    assert first(text.replace(old, new)) != first(text)


def test_instances_have_queues_of_their_own():
    text = POLICY + "use p(rate = 5/s) as q\nuse p as r { at prerouting  interest { sport 1 } }"
    numbers = [range(q.first, q.first + q.many) for q in queues(text)]
    assert len(numbers) == 3
    assert len({n for one in numbers for n in one}) == 3


def test_no_two_policies_of_a_file_share_a_queue():
    one = 'policy NAME { at forward classify { a } process { a { call "site:seen" } } MORE }\n'
    many = [("queues 16", 16), ("", 1), ("queues 3", 3)]
    text = "".join(one.replace("NAME", f"p{n}").replace("MORE", many[n % 3][0]) for n in range(300))
    # Those that name theirs keep them, wherever they stand.
    taken = queues(text)[7].first
    text += one.replace("NAME", "last").replace("MORE", f"queues 1 from {taken}")
    found = queues(text)
    assert found[-1].first == taken
    numbers = [n for q in found for n in range(q.first, q.first + q.many)]
    assert len(numbers) == len(set(numbers))
    assert all(4096 <= n <= 65_535 for n in numbers)


def test_when_no_queue_is_left_it_is_said():
    one = 'policy p{} {{ at forward classify {{ a }} process {{ a {{ call "site:seen" }} }} queues 16 }}\n'
    named = one.replace("queues 16", "queues 16 from {}")
    text = "".join(named.format(n, n * 16) for n in range(4096)) + one.format("last")
    with pytest.raises(CompileError) as caught:
        compiled(text)
    assert [d.code for d in caught.value.diagnostics if d.is_error] == ["E062"]


def test_rules_lead_only_to_what_is_there():
    for case in cases():
        for table in case.compiled().ruleset.tables:
            names = [chain.name for chain in table.chains]
            assert len(names) == len(set(names)), case.name
            rules = [re.sub(r'"[^"]*"', "", r.text) for c in table.chains for r in c.rules]
            assert {w for r in rules for w in re.findall(r"(?:goto|jump) ([\w.]+)", r)} <= {*names}
            sets = {one.name for one in (*table.sets, *table.values)}
            assert {w for r in rules for w in re.findall(r"@((?!nh|th)[\w.]+)", r)} <= sets


# Stored.

QUEUED = [case for case in cases() if case.queued]


@pytest.mark.parametrize("case", QUEUED, ids=lambda case: case.name)
def test_what_is_stored_comes_back(case):
    unit = unit_of(case.compiled(), "/a.itm")
    again = from_json(json.loads(json.dumps(to_json(unit))))
    # Of a source nothing but its name is in this text.
    assert repr(again.ruleset) == repr(unit.ruleset)


def test_a_policy_taken_away_takes_its_queues_along():
    case = next(case for case in QUEUED if case.name == "call/shared")
    unit = unit_of(case.compiled(), "/a.itm")
    for gone, left in (("p", "q"), ("q", "p")):
        tables = unit.without({gone}).ruleset.tables
        table = next(t for t in tables if left in t.policies)
        assert [queue.policy for queue in table.queues] == [left]
        names = [one.name for one in (*table.chains, *table.counters, *table.sets)]
        assert not [name for name in names if name.startswith(f"{gone}.")]
        assert {"q.serving", "p.serving"} & {*names} == {f"{left}.serving"}


# The meaning, where a handler says odd things.


@pytest.mark.parametrize("said", ["a", "b", "c", "d", "the other"])
def test_a_class_that_a_handler_names_is_followed_once(said):
    text = """policy p {
        at forward
        classify { a when dport == 1  b when dport == 2  c when dport == 3  d }
        process {
            a { call "site:a" once per connection  set ttl 3 }
            b { call "site:b"  set ttl 4 }
            c { call "site:c"  set ttl 5 }
            d { set ttl 6 }
        }
    }"""
    policies = compiled(text).policies
    case = next(case for case in QUEUED if case.name == "call/drop")
    for port in (1, 2, 3):
        calls = []

        def do(action, packet, now, calls=calls):
            calls.append(action)
            others = {"site:a": "d", "site:b": "c", "site:c": "b"}
            return Did("", others[action.handler] if said == "the other" else said)

        host = Host(policies, do=do)
        for _ in range(3):
            packet = placed(case.sends[0].packet(), "forward")
            packet.set_destination_port(port)
            (visit,) = host.traverse(packet, "forward", 0.0)
            assert visit.outcome.verdict == "accept"
        assert len(calls) <= 6


def test_the_parts_of_a_class_add_up():
    (policy,) = compiled(POLICY).policies
    for steps in policy.process.values():
        begin = ir.python_part(steps)
        assert not any(step.in_python for step in steps[:begin])
        assert ir.handed_over(steps) == steps[begin:]
    once = replace(policy.process["a"][-1].action, value=("site:seen", True))
    steps = (ir.Step(once, policy.span), *policy.process["rest"])
    assert ir.handed_over(steps) == steps[:1]
