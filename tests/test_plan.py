"""Plans without a kernel: the edits of rules, what each change is called, digests, units as JSON.

A small model of the kernel takes the place of one: it lists what it was given.
"""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from itmlang.nft.model import FlowSet, Rule, Table
from itmlang.nft.text import rule_line
from itmlang.pipeline import compile
from itmlang.resources import resource
from itmlang.source import Source, Span
from runtime.cli.files import reader
from runtime.listing import Running, RunningChain, RunningSet, digest
from runtime.plan import Plan, listed, plan, rule_edits
from runtime.state import State
from runtime.units import Recorder, Unit, from_json, to_json, unit_of
from tests.support.cases import Case, cases

SOURCE = Source("a.itm", "one\ntwo\nthree\nfour\n")
LINES = [Span(SOURCE, start, start + 1) for start in (0, 4, 8, 14)]

# Rules.


class Listed:
    """A chain as the kernel keeps it: rules with handles, changed by commands."""

    def __init__(self, rules: list[str]) -> None:
        self.rules = [(handle, rule) for handle, rule in enumerate(rules, 10)]
        self.next = 1000

    def run(self, command: str) -> None:
        verb, handle, rule = re.fullmatch(
            r"(\w+) rule inet t c (?:handle (\d+))? ?(.*)", command
        ).groups()
        if verb == "add":
            self.rules.append((self._new(), rule))
            return
        place = [known for known, _ in self.rules].index(int(handle))
        if verb == "insert":
            self.rules.insert(place, (self._new(), rule))
        elif verb == "replace":
            self.rules[place] = (int(handle), rule)
        else:
            assert (verb, rule) == ("delete", "")
            del self.rules[place]

    def _new(self) -> int:
        self.next += 1
        return self.next


_rules = st.lists(
    st.builds(
        Rule,
        st.sampled_from(["accept", "drop", "meta l4proto { tcp, udp } accept", "goto x"]),
        st.sampled_from(LINES),
        st.sampled_from(["", "few"]),
    ),
    max_size=12,
)


def of_chain(rules: list[Rule]) -> Unit:
    """A unit whose chain `classify` has these rules."""
    unit = small()
    (table,) = unit.ruleset.tables
    chains = [replace(c, rules=rules) if c.name == "classify" else c for c in table.chains]
    return replace(unit, ruleset=replace(unit.ruleset, tables=(replace(table, chains=chains),)))


@given(_rules, _rules)
def test_the_edits_turn_any_rules_into_any_others(old, new):
    edits = rule_edits(old, new)
    assert edits is not None
    chain = Listed([rule_line(rule) for rule in old])
    handles = [handle for handle, _ in chain.rules]
    for place, rule in edits.inserted:
        chain.run(f"insert rule inet t c handle {handles[place]} {rule_line(rule)}")
    for place, rule in edits.replaced:
        chain.run(f"replace rule inet t c handle {handles[place]} {rule_line(rule)}")
    for place in edits.deleted:
        chain.run(f"delete rule inet t c handle {handles[place]}")
    for rule in edits.added:
        chain.run(f"add rule inet t c {rule_line(rule)}")
    assert [rule for _, rule in chain.rules] == [rule_line(rule) for rule in new]
    kept = {handle for handle, _ in chain.rules}
    touched = {place for place, _ in edits.replaced} | set(edits.deleted)
    assert not {place for place, _ in edits.replaced} & set(edits.deleted)
    assert {h for place, h in enumerate(handles) if place not in touched} <= kept
    if [rule_line(r) for r in old] == [rule_line(r) for r in new]:
        assert (edits.inserted, edits.replaced, edits.deleted, edits.told) == ((),) * 4


@given(_rules, _rules)
def test_a_plans_commands_turn_any_rules_into_any_others(old, new):
    """In place, or all of them again, without what libnftables 1.0.6 cannot do."""
    before, after = of_chain(old), of_chain(new)
    found = planned(after, before)
    chain = Listed([rule_line(rule) for rule in old])
    running = kernel(before)["inet itm_watch"].chains["classify"]
    chain.rules = list(zip(running.handles, (rule for _, rule in chain.rules), strict=True))
    inside = False
    for line in found.before.lines + found.after.lines:
        if line == "flush chain inet itm_watch classify":
            chain.rules = []
        elif " rule inet itm_watch classify" in line:
            assert not line.startswith("insert")
            assert not (line.startswith("replace") and "{ tcp, udp }" in line)
            chain.run(line.replace("inet itm_watch classify", "inet t c"))
        elif inside and line.startswith("\t\t") and not line.startswith("\t\t#"):
            chain.run(f"add rule inet t c {line.strip()}")
        inside = line == "\tchain classify {" or (inside and line != "\t}")
    assert [rule for _, rule in chain.rules] == [rule_line(rule) for rule in new]


def test_too_much_to_compare_is_not_compared():
    old = [Rule(f"a{n}", LINES[0]) for n in range(2100)]
    new = [Rule(f"b{n}", LINES[0]) for n in range(2100)]
    assert rule_edits(old, new) is None
    # What is the same at both ends does not count.
    edits = rule_edits([*old, *new], [*old, Rule("x", LINES[0]), *new])
    assert edits is not None
    assert [(place, rule.text) for place, rule in edits.inserted] == [(2100, "x")]
    assert not edits.in_place


def test_rules_that_only_moved_their_line_are_replaced_in_place():
    old = [Rule("accept", LINES[0]), Rule("drop", LINES[1])]
    new = [Rule("accept", LINES[0]), Rule("drop", LINES[2])]
    edits = rule_edits(old, new)
    assert edits is not None
    assert (edits.replaced, edits.inserted, edits.deleted) == (((1, new[1]),), (), ())
    assert edits.told == (("~", 'drop comment "a.itm:3"'),)


# Plans.

WATCH = """
set local: address = { 127.0.0.0/8, ::1 }
policy watch(threshold: packets = 3) {
    at output
    interest { protocol udp daddr @local }
    flow conn by daddr, dport timeout 1m max 64
    classify { few when conn.packets <= threshold  many }
    log { count conn }
    process { many { set dscp cs1 } }
}
"""


def of(text: str, name: str = "/policies/a.itm") -> Unit:
    return unit_of(compile(Source(name, text)), name)


def small() -> Unit:
    return of(WATCH)


def _flags(one: FlowSet) -> frozenset[str]:
    if one.role in ("route", "networks"):
        return frozenset({"interval", "timeout"})
    if one.is_map:
        return frozenset({"timeout"})
    return frozenset({"dynamic", "timeout"} if one.timed else {"dynamic"})


def running(table: Table) -> Running:
    """A table as a kernel lists it that took it as it was written."""
    number = 0
    chains = {}
    for chain in table.chains:
        handles = tuple(range(number, number + len(chain.rules)))
        number += len(handles)
        rules = tuple(f"as listed: {rule_line(rule)}" for rule in chain.rules)
        chains[chain.name] = RunningChain(chain.hook, rules, handles)
    sets = {
        s.name: RunningSet(
            s.types,
            s.size,
            s.timeout,
            _flags(s),
            "map" if s.is_map else "set",
        )
        for s in table.sets
    }
    sets |= {
        v.name: RunningSet((v.type,), 0, None, frozenset(("interval",) * v.interval), v.kind)
        for v in table.values
    }
    values = {v.name: digest(map(" ".join, v.entries)) for v in table.values}
    return Running(chains, sets, tuple(c.name for c in table.counters), values)


def kernel(*units: Unit) -> dict[str, Running]:
    return {table.path: running(table) for unit in units for table in unit.ruleset.tables}


def state(*units: Unit) -> State:
    known = State()
    for unit in units:
        known = known.with_unit(unit, 0.0)
    seen = {path: listed(one) for path, one in kernel(*units).items()}
    return replace(known, listed=seen, generation=1 if units else 0)


def planned(wanted: Unit, *before: Unit, there: dict[str, Running] | None = None) -> Plan:
    """The plan from units that were loaded to another version of the first."""
    known = state(*before)
    return plan(known.with_unit(wanted, 1.0), known, kernel(*before) if there is None else there)


def named(found: Plan) -> dict[str, str]:
    """What becomes of each object that does not stay as it is."""
    return {f"{c.kind} {c.name}": c.action for c in found.changes if c.action != "keep"}


def test_no_change_is_an_empty_plan():
    found = planned(small(), small())
    assert found.empty
    assert {c.action for c in found.changes} == {"keep"}
    assert (found.moves, found.counters, found.touched, found.lost) == ((), (), (), ())


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_no_change_of_a_case_is_an_empty_plan(case: Case):
    unit = unit_of(case.compiled(), "/a.itm")
    found = planned(unit, unit)
    assert found.empty
    assert {c.action for c in found.changes} == {"keep"}


def test_a_first_load_creates_everything():
    found = planned(small())
    assert set(named(found).values()) == {"create"}
    assert found.before.text == compile(Source("/policies/a.itm", WATCH)).text.text
    assert "table itm_watch" in named(found)


def changed(*edits: tuple[str, str]) -> dict[str, str]:
    text = WATCH
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    return named(planned(of(text), small()))


FAMILIES = ("conn_ip", "conn_ip6")


def test_an_action_replaces_the_rules_of_its_class():
    assert changed(("cs1", "cs2")) == {"chain class_many": "replace"}


def test_a_threshold_moves_what_follows_from_it():
    assert changed(("= 3", "= 4")) == {
        "chain log_flows": "replace",
        **{f"set flow_{f}_threshold_packets": "migrate" for f in FAMILIES},
        **{f"set flow_{f}_over_threshold_packets": "migrate" for f in FAMILIES},
    }


def test_a_class_that_comes_and_goes():
    assert changed(("many }", "many when dport == 5  other }")) == {
        "chain classify": "replace",
        "chain classify_1": "create",
        "chain class_other": "create",
        "counter class_other": "create",
    }
    assert changed(("many }", "}"), ("many { set dscp cs1 }", "")) == {
        "chain classify": "replace",
        "chain class_many": "delete",
        "counter class_many": "delete",
    }


def test_a_key_that_changes_migrates_or_is_lost():
    coarser = changed(("by daddr, dport", "by dport"))
    assert coarser["set flow_conn_inet"] == "migrate"
    assert coarser["set flow_conn_ip"] == "delete"
    found = planned(of(WATCH.replace("by daddr, dport", "by daddr, dport, sport")), small())
    finer = {c.name: (c.action, c.learned) for c in found.changes if c.kind == "set"}
    assert finer["flow_conn_ip"] == ("replace", "lost")
    assert {c.name for c in found.lost} == {f"flow_{f}" for f in FAMILIES}


def test_what_follows_from_counts_shares_their_fate():
    """Sets that stand before the counts among them: of a threshold of 0, and of an age."""
    text = WATCH.replace("<= threshold", "<= 0 and conn.age < 1h")
    finer = planned(of(text.replace("by daddr", "by sport, daddr")), of(text))
    assert finer.moves == ()
    coarser = planned(of(text.replace("by daddr, dport", "by dport")), of(text))
    assert {move.target.name: move.how for move in coarser.moves} == {
        "flow_conn_inet": "sum",
        "flow_conn_inet_over_0_packets": "over",
        "flow_conn_inet_1h_age": "begin",
    }


def test_sizes_and_times_change_in_place():
    found = planned(of(WATCH.replace("max 64", "max 65").replace("1m", "2m")), small())
    sets = {c.name: (c.action, c.learned) for c in found.changes if c.kind == "set"}
    del sets["set_local_ip"], sets["set_local_ip6"]
    assert set(sets.values()) == {("migrate", "kept")}
    assert "delete" not in found.before.text


def test_elements_of_a_set_change_alone():
    assert changed(("127.0.0.0/8", "127.0.0.0/9")) == {"set set_local_ip": "replace"}


def test_another_hook_hangs_the_chain_in_anew():
    assert changed(("at output", "at postrouting")) == {
        "chain output": "delete",
        "chain postrouting": "create",
    }
    assert changed(("at output", "at output priority 3")) == {"chain output": "replace"}


def test_comment_lines_only_move_line_numbers():
    found = planned(of("# one\n\n" + WATCH), small())
    assert {mark for c in found.changes for mark, _ in c.rules} == {"~"}
    assert {c.kind for c in found.changes if c.action != "keep"} == {"chain"}
    assert all(line.startswith("replace rule")
               for line in found.before.lines + found.after.lines)  # fmt: skip


def test_what_goes_is_deleted_and_named():
    known = state(small())
    found = plan(known.without({"watch"}), known, kernel(small()))
    assert found.deleted == ("watch",)
    assert found.before.text == "delete table inet itm_watch\n"
    assert named(found) == {"table itm_watch": "delete"}


# What somebody else changed.


def by_hand(**changes: object) -> dict[str, Running]:
    (path, one), *_ = kernel(small()).items()
    return {path: replace(one, **changes)}  # type: ignore[arg-type]


def test_what_somebody_else_changed_is_mended():
    one = kernel(small())["inet itm_watch"]
    chain = one.chains["classify"]
    other = RunningChain(chain.hook, ("drop", *chain.rules), (99, *chain.handles))
    found = planned(small(), small(), there=by_hand(chains={**one.chains, "classify": other}))
    assert named(found)["chain classify"] == "replace"
    found = planned(small(), small(), there=by_hand(chains={**one.chains, "more": other}))
    assert named(found)["chain more"] == "delete"
    found = planned(small(), small(), there=by_hand(flags="dormant"))
    assert named(found) == {"table itm_watch": "replace"}
    found = planned(small(), small(), there=by_hand(values={**one.values, "set_local_ip": "x"}))
    assert named(found) == {"set set_local_ip": "replace"}
    found = planned(small(), small(), there=by_hand(counters=one.counters[1:]))
    assert named(found) == {f"counter {one.counters[0]}": "create"}
    found = planned(small(), small(), there=by_hand(counters=(*one.counters, "theirs")))
    assert named(found) == {"counter theirs": "delete"}
    sets = {**one.sets, "theirs": one.sets["flow_conn_ip"]}
    assert named(planned(small(), small(), there=by_hand(sets=sets))) == {"set theirs": "delete"}


def test_with_the_state_lost_the_counts_stay():
    found = plan(state(small()), State(), kernel(small()))
    told = {c.name: (c.action, c.learned) for c in found.changes if c.kind in ("set", "counter")}
    assert told["flow_conn_ip"] == told["class_few"] == ("keep", "kept")
    assert told["flow_conn_ip_threshold_packets"] == ("migrate", "carried")
    assert found.lost == ()


# Digests.


def test_a_digest_is_the_same_for_the_same_change_and_no_other():
    text = WATCH.replace("cs1", "cs2")
    first = planned(of(text), small()).digest
    assert first == planned(of(text), small()).digest
    assert first != planned(of(text.replace("cs2", "cs3")), small()).digest
    assert first != planned(of(text), of(text.replace("cs2", "cs3"))).digest
    # The change is the same if something was loaded beside it.
    other = of("policy other { at input }", "/policies/b.itm")
    assert first == planned(of(text), small(), other).digest


def test_a_digest_tells_of_the_kernel_that_it_was_made_for():
    text = WATCH.replace("cs1", "cs2")
    one = kernel(small())["inet itm_watch"]
    there = by_hand(counters=(*one.counters, "theirs"))
    assert planned(of(text), small()).digest != planned(of(text), small(), there=there).digest


# Units.


def spans(unit: Unit) -> list[tuple[str, int, int, str]]:
    found = []
    for table in unit.ruleset.tables:
        parts = [table, *table.counters, *table.values, *table.sets, *table.chains]
        parts += [rule for chain in table.chains for rule in chain.rules]
        for one in (part.span for part in parts):
            found.append((one.source.name, one.start, one.end, one.text))
    found += [(p.span.source.name, p.span.start, p.span.end, p.span.text) for p in unit.policies]
    return found


def without_places(value: object) -> str:
    """All of a value but the identity of sources."""
    return re.sub(r"Source\(name='[^']*'\)", "Source", repr(value))


def units() -> list[Unit]:
    found = []
    for path in sorted(resource("policies").glob("*.itm")):
        recorder = Recorder(reader())
        result = compile(Source(str(path), path.read_text()), recorder)
        found.append(unit_of(result, str(path), recorder.reads))
    for case in cases():
        recorder = Recorder(case._read)
        result = compile(Source(case.path.name, case.policy), recorder)
        found.append(unit_of(result, str(case.path), recorder.reads, {"p": {"x": "3"}}))
    return found


def test_units_are_the_same_after_json():
    for unit in units():
        data = json.loads(json.dumps(to_json(unit)))
        back = from_json(data)
        assert without_places(back) == without_places(unit)
        assert spans(back) == spans(unit)
        assert back.made_of == unit.made_of
        assert to_json(back) == to_json(unit)
        assert plan(state(back), state(unit), kernel(unit)).empty


def test_places_in_texts_that_no_one_recorded_are_kept_too():
    case = next(case for case in cases() if case.name == "include/diamond")
    unit = unit_of(case.compiled(), "/a.itm")
    assert {name for name, *_ in spans(unit)} > {case.path.name}
    assert spans(from_json(to_json(unit))) == spans(unit)


@pytest.mark.parametrize("damage", [{}, {"texts": []}, {"texts": [["a", 3]], "tables": 5}])
def test_other_values_are_refused(damage):
    data = {**to_json(small()), **damage} if damage else damage
    with pytest.raises((KeyError, TypeError, ValueError, IndexError)):
        from_json(data)
