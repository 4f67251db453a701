"""Reading what nftables lists: tables, chains, sets, elements.

The texts are as nft 1.0.6 lists them, with handles; numbers in place of names.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from itmlang.nft.model import BaseHook, duration
from runtime.listing import Element, digest, milliseconds, read_elements, read_table

TABLE = """\
table inet itm_x { # handle 1
	counter class_a { # handle 5
	}

	set flow_f_ip { # handle 6
		typeof ip saddr . iifname . th dport
		size 10
		flags dynamic,timeout
		timeout 1m30s
	}

	set flow_f_ip_2_connections { # handle 9
		typeof ip saddr
		flags dynamic
	}

	set set_links { # handle 15
		type ifname
		flags interval
	}

	chain ingress_lo { # handle 1
		type filter hook ingress device "lo" priority -150; policy accept;
		goto classify comment "a # handle 5" # handle 17
	}

	chain output { # handle 2
		type route hook output priority 3; policy drop;
	}

	chain classify { # handle 3
		ip saddr @values accept comment "a, { b } # handle 9" # handle 18
		log prefix "hook # handle 4 " group 3 # handle 19
		type filter hook # handle 20
		iifname . th dport vmap { "eth0" . 3 : accept, "a,b" . 4 : drop } # handle 21
	}

	chain a.empty { # handle 4
	}
}
"""
TYPES = [
    {"metainfo": {"version": "1.0.6"}},
    {"set": {"name": "flow_f_ip", "type": ["ipv4_addr", "ifname", "inet_service"]}},
    {"set": {"name": "flow_f_ip_2_connections", "type": "ipv4_addr"}},
    {"set": {"name": "set_links", "type": "ifname"}},
]


def test_a_table_in_all_its_parts():
    running = read_table(TABLE, TYPES)
    assert list(running.chains) == ["ingress_lo", "output", "classify", "a.empty"]
    assert running.counters == ("class_a",)
    assert running.flags == ""
    flows = running.sets["flow_f_ip"]
    assert flows.types == ("ipv4_addr", "ifname", "inet_service")
    assert (flows.size, flows.timeout, flows.flags) == (10, 90_000, {"dynamic", "timeout"})
    busy = running.sets["flow_f_ip_2_connections"]
    assert (busy.types, busy.size, busy.timeout) == (("ipv4_addr",), 0, None)
    assert running.sets["set_links"].flags == {"interval"}


def test_base_chains_know_where_they_hang():
    chains = read_table(TABLE).chains
    assert chains["ingress_lo"].hook == BaseHook('ingress "lo"', -150, "filter")
    assert (chains["output"].hook, chains["output"].drops) == (BaseHook("output", 3, "route"), True)
    assert (chains["classify"].hook, chains["ingress_lo"].drops) == (None, False)


@pytest.mark.parametrize(
    "device",
    ['device "lo"', "device lo", 'devices = { "lo" }', "devices = { lo }"],
)
def test_a_device_is_read_as_every_version_lists_it(device):
    text = TABLE.replace('device "lo"', device)
    assert read_table(text).chains["ingress_lo"].hook == BaseHook('ingress "lo"', -150)


def test_rules_stand_without_their_handles_and_nothing_else_missing():
    classify = read_table(TABLE).chains["classify"]
    assert classify.handles == (18, 19, 20, 21)
    assert classify.rules == (
        'ip saddr @values accept comment "a, { b } # handle 9"',
        'log prefix "hook # handle 4 " group 3',
        "type filter hook",
        'iifname . th dport vmap { "eth0" . 3 : accept, "a,b" . 4 : drop }',
    )
    ingress = read_table(TABLE).chains["ingress_lo"]
    assert (ingress.rules, ingress.handles) == (('goto classify comment "a # handle 5"',), (17,))
    empty = read_table(TABLE).chains["a.empty"]
    assert (empty.rules, empty.handles, empty.hook) == ((), (), None)


@pytest.mark.parametrize(
    ("chain", "old", "new"),
    [
        ("classify", "accept comment", "drop comment"),
        ("classify", "a, { b }", "a, { c }"),
        ("classify", "\t\ttype filter hook # handle 20\n", ""),
        ("ingress_lo", '"lo"', '"lo1"'),
        ("ingress_lo", "-150", "-151"),
        ("output", "policy drop", "policy accept"),
        ("output", "type route", "type filter"),
    ],
)
def test_a_chains_digest_tells_of_each_change_and_of_no_handle(chain, old, new):
    before = read_table(TABLE).chains
    after = read_table(TABLE.replace(old, new, 1)).chains
    assert [name for name in before if before[name].digest != after[name].digest] == [chain]
    again = read_table(TABLE.replace("# handle 18\n", "# handle 99\n")).chains
    assert before["classify"].digest == again["classify"].digest


@pytest.mark.parametrize(
    "text", ["", "table inet itm_e { # handle 1\n}\n", "table inet itm_e {\n}\n"]
)
def test_an_empty_table(text):
    running = read_table(text)
    assert (running.chains, running.sets, running.counters, running.flags) == ({}, {}, (), "")


def test_a_table_that_sleeps():
    text = TABLE.replace("{ # handle 1\n", "{ # handle 1\n\tflags dormant\n\n", 1)
    running = read_table(text)
    assert running.flags == "dormant"
    assert list(running.chains) == list(read_table(TABLE).chains)


def test_a_digest_is_of_the_lines_and_their_order():
    assert digest(["a", "b"]) == digest(iter(["a", "b"]))
    assert len({digest(["a", "b"]), digest(["b", "a"]), digest(["ab"]), digest([])}) == 4


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("5s", 5_000), ("1m30s500ms", 90_500), ("36500d", 36_500 * 86_400_000), ("4m59s996ms", 299_996),
     ("1d1h1m1s1ms", 90_061_001), ("90s", 90_000), ("0s", 0)],
)  # fmt: skip
def test_times(text, wanted):
    assert milliseconds(text) == wanted


@given(st.integers(1, 2**45))
def test_a_time_that_we_write_is_read_again(time):
    assert milliseconds(duration(time)) == time


# Elements.

SET = """\
table inet itm_x {{
	set some {{
		typeof ip saddr
		size 10
		flags dynamic,timeout
		timeout 1m30s
		elements = {{ {} }}
	}}
}}
"""


def elements(listed: str) -> list[Element]:
    return read_elements(SET.format(listed))


def test_elements_with_all_that_can_stand_in_them():
    assert elements(
        "10.0.0.1 expires 49s, 10.0.0.2, 10.0.0.3 timeout 1h expires 59m996ms,\n"
        "\t\t\t     10.0.0.4 counter packets 3 bytes 90 timeout 5s expires 3s,\n"
        "10.0.0.5 limit rate over 1/week burst 3 packets expires 1s,\n"
        "10.0.0.6 limit rate over 1 bytes/week burst 99 bytes timeout 9s expires 1s,\n"
        "10.0.0.7 quota over 100 bytes used 29 bytes expires 2s, 10.0.0.8 ct count over 3,\n"
        "10.0.0.9 counter packets 1 bytes 2 quota over 10 bytes expires 3s"
    ) == [
        Element(("10.0.0.1",), expires=49_000),
        Element(("10.0.0.2",)),
        Element(("10.0.0.3",), timeout=3_600_000, expires=59 * 60_000 + 996),
        Element(("10.0.0.4",), 3, 90, 5_000, 3_000),
        Element(("10.0.0.5",), expires=1_000),
        Element(("10.0.0.6",), timeout=9_000, expires=1_000),
        Element(("10.0.0.7",), expires=2_000),
        Element(("10.0.0.8",)),
        Element(("10.0.0.9",), 1, 2, None, 3_000),
    ]


def test_the_sets_own_timeout_listed_at_an_element_is_not_the_elements():
    assert elements(
        "10.0.0.1 timeout 1m30s expires 49s, 10.0.0.2 timeout 1m expires 49s,\n"
        "10.0.0.3 counter packets 3 bytes 90 timeout 1m30s expires 3s"
    ) == [
        Element(("10.0.0.1",), expires=49_000),
        Element(("10.0.0.2",), timeout=60_000, expires=49_000),
        Element(("10.0.0.3",), 3, 90, None, 3_000),
    ]


def test_keys_of_several_fields_and_of_all_types():
    assert [e.key for e in elements("10.0.0.1 . 6 . 53, 0x0000002a . 2, fd00::1 . 80")] == [
        ("10.0.0.1", "6", "53"),
        ("0x0000002a", "2"),
        ("fd00::1", "80"),
    ]


@pytest.mark.parametrize("name", ["lo", "a,b", "s p", "a . b", "we}ird", "x expires 5s", "{", "@"])
def test_names_in_quotes_are_taken_as_they_stand(name):
    found = elements(
        f'"{name}" counter packets 1 bytes 2 expires 3s, 10.0.0.1 . "{name}" . 5 expires 4s, "z"'
    )
    assert found == [
        Element((f'"{name}"',), 1, 2, None, 3_000),
        Element(("10.0.0.1", f'"{name}"', "5"), expires=4_000),
        Element(('"z"',)),
    ]


def test_a_set_without_elements():
    assert read_elements(SET.format("").replace("\t\telements = {  }\n", "")) == []
    assert read_elements("") == []


_name = st.text("abz019.-@,{}<> ", min_size=1, max_size=15).map(lambda name: f'"{name}"')
_field = st.one_of(
    st.ip_addresses().map(str), st.integers(0, 65535).map(str), _name,
    st.integers(0, 2**32 - 1).map(lambda mark: f"0x{mark:08x}"),
)  # fmt: skip
_count = st.integers(0, 2**64 - 1)
_time = st.none() | st.integers(1, 2**43)
_statement = st.sampled_from(
    ["", " limit rate over 1/week burst 3 packets", " quota over 9 bytes", " ct count over 3"]
)


@given(
    st.lists(
        st.tuples(
            st.builds(
                Element, st.lists(_field, min_size=1, max_size=5).map(tuple), _count, _count, _time, _time
            ),
            _statement,
        ),
        max_size=8,
    )
)  # fmt: skip
def test_any_elements_are_read_as_they_are_listed(drawn):
    texts = []
    for element, statement in drawn:
        text = " . ".join(element.key)
        text += f" counter packets {element.packets} bytes {element.bytes}{statement}"
        if element.timeout is not None:
            text += f" timeout {duration(element.timeout)}"
        if element.expires is not None:
            text += f" expires {duration(element.expires)}"
        texts.append(text)
    assert elements(", ".join(texts)) == [element for element, _ in drawn]
