"""What is shown of overlays: status, words, the picture; and what the compiler makes of them."""

from xml.etree import ElementTree

import pytest

from itmlang.diagnostics import CompileError
from itmlang.overlays import Overlay, via
from itmlang.pipeline import Compiled, analyse, compile
from itmlang.source import Source
from runtime.cli.words import overlay_line, paths, routed
from runtime.overlay.graph import svg
from runtime.overlay.status import OverlayStatus, seen

MESH = """
overlay mesh {
    self 192.0.2.1
    neighbor chicago 192.0.2.2
    neighbor denver 192.0.2.3
    destination { 10.3.0.0/16, 10.4.0.0/16 } at 192.0.2.9
    destination 10.5.0.0/16 at 192.0.2.2
    destination 10.6.0.0/16 at 192.0.2.1
    key from "mesh.key"
}
policy p {
    at prerouting, output
    interest { daddr @mesh }
    classify { a when dport == 80  b }
    process { a { set dscp ef  route by mesh }  b { route by mesh } }
}
"""


def overlay(text: str = MESH) -> Overlay:
    (found,) = (p.overlay for p in analyse(Source("a.itm", text)).policies if p.overlay is not None)
    return found


def compiled(text: str = MESH) -> Compiled:
    return compile(Source("a.itm", text))


def candidate(name: str, state: str, chosen: bool, rtt: float | None) -> dict[str, object]:
    return {
        "name": name, "via": "", "state": state, "chosen": chosen, "rtt_raw": rtt, "rtt": rtt,
        "loss": 0.25, "last": 0.5,
    }  # fmt: skip


TOLD = {
    "period": 0.2,
    "counters": {"sent": 9, "forged": 2, "truncated": 0},
    "egresses": [
        {
            "egress": "192.0.2.9", "prefixes": ["10.3.0.0/16", "10.4.0.0/16"],
            "learned": ["10.7.0.0/16"], "choice": "chicago", "moved": 3.0, "moves": 2,
            "why": "direct: <3> answers & more are missing",
            "candidates": [
                candidate("direct", "out", False, None), candidate("chicago", "working", True, 1.5),
            ],
        }
    ],
}  # fmt: skip


def status(**changes: object) -> OverlayStatus:
    return seen(overlay(), {**TOLD, **changes}, "")


def test_the_ways_are_told_in_words():
    one = status()
    assert overlay_line(one) == (
        "overlay member 192.0.2.1, neighbours: chicago 192.0.2.2, denver 192.0.2.3; "
        "a probe every 0.2 s"
    )
    head, rows = paths(one)
    assert [row[head.index("by")] for row in rows] == ["direct", "chicago"]
    assert rows[0][:2] == ("192.0.2.9", "10.3.0.0/16, 10.4.0.0/16, 10.7.0.0/16")
    assert rows[1][2:] == ("chicago", "chosen", "working", "1.5 ms", "25%", "0.5 s ago")
    assert rows[0][5] == "-"
    assert routed(one) == [
        "192.0.2.9 goes by chicago for 3 s (2 times moved): direct: <3> answers & more are missing",
        "datagrams not taken: 2 forged",
    ]


def test_what_keeps_it_from_probing_is_told():
    assert routed(seen(overlay(), {}, "its key is gone")) == ["it does not probe: its key is gone"]
    assert routed(seen(overlay(), {}, "")) == ["it does not probe: nothing was probed yet"]


def test_the_picture_is_sound_and_has_all_that_is_known():
    drawn = svg("a&b", status())
    root = ElementTree.fromstring(drawn)
    texts = [one.text for one in root.iter() if one.text]
    for text in ("192.0.2.1", "chicago", "denver", "192.0.2.9", "10.3.0.0/16", "1.5 ms, 25% lost"):
        assert text in texts
    lines = [one.get("class") for one in root.iter() if one.tag.endswith("line")]
    assert sorted(lines) == ["chosen", "chosen", "out"]  # through chicago are two, directly one


def test_an_empty_overlay_can_be_drawn():
    text = 'overlay m { self 192.0.2.1 key from "k" } policy p { at input classify { a } }'
    assert ElementTree.fromstring(svg("m", seen(overlay(text), {}, ""))) is not None


def test_an_overlay_is_a_set_and_a_policy():
    policies = compiled().policies
    assert [p.name for p in policies] == ["p", "mesh"]
    mine = policies[1]
    assert (mine.hooks, mine.priority, mine.classes) == (("prerouting",), 45, ("tunnelled",))
    assert overlay().own == ((10 << 24 | 6 << 16, 16),)
    # Each class leads to the same rules of a neighbour, which are there once.
    chains = [c.name for t in compiled().ruleset.tables for c in t.chains if c.role == "via"]
    assert chains == ["via_chicago", "via_denver"]
    assert set(policies[0].ways) == {via("mesh", "chicago"), via("mesh", "denver")}


def test_only_members_tunnels_are_opened():
    text = compiled().text.text
    assert "ip daddr 192.0.2.1 ip saddr { 192.0.2.2/31, 192.0.2.9 }" in text
    (way,) = (t for table in compiled().ruleset.tables for t in table.tunnels if t.inward)
    assert way.destinations == (0xC0000201,)
    assert sorted(way.sources) == [(0xC0000202, 31), (0xC0000209, 32)]


def test_python_tunnels_where_the_overlay_says_so():
    found = compiled(MESH.replace("key from", "run python  key from"))
    assert [t for table in found.ruleset.tables for t in table.tunnels] == []
    queues = [queue.policy for table in found.ruleset.tables for queue in table.queues]
    assert sorted(queues) == ["mesh", "p"]


@pytest.mark.parametrize("words", ["sticky", "discover", "port 5000", "choose by both hold 1s"])
def test_further_lines_stand_anywhere(words):
    for where in ("self 192", "key from", "destination 10.5"):
        overlay(MESH.replace(where, f"{words} {where}"))


def test_more_neighbours_than_the_mark_can_tell_are_refused():
    many = "\n".join(f"neighbor n{n} 198.51.100.{n}" for n in range(1, 15))
    with pytest.raises(CompileError, match="13 neighbours at most"):
        analyse(Source("a.itm", MESH.replace("key from", f"{many} key from")))
