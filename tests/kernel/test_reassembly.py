"""Behind connection tracking there are no fragments: all of a datagram is classified by its ports."""

from scapy.layers.inet import IP, UDP, fragment
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment, fragment6

from itmlang.packet import Packet
from itmlang.pipeline import compile
from itmlang.source import Source
from tests.support.kernel import Wire

POLICY = """
policy p {
    at prerouting, forward, postrouting
    flow conn by connection
    classify { seven when dport == 7 and ct.state == new  other }
    log { count conn }
    process { seven { set dscp ef } other { set dscp cs1 } }
}
"""


def fragments(family: int, port: int) -> list[bytes]:
    """A datagram of 2000 bytes in two fragments, the later one first."""
    if family == 4:
        whole = IP(src="10.0.1.1", dst="10.0.2.1", id=port) / UDP(sport=9, dport=port) / bytes(2000)
        return [bytes(one) for one in reversed(fragment(whole, 1400))]
    whole = (
        IPv6(src="fd00:1::1", dst="fd00:2::1") / IPv6ExtHdrFragment(id=port)
        / UDP(sport=9, dport=port) / bytes(2000)
    )  # fmt: skip
    return [bytes(one) for one in reversed(fragment6(whole, 1400))]


def test_a_datagram_in_fragments_is_one_packet(wire: Wire) -> None:
    compiled = compile(Source("p.itm", POLICY))
    assert "frag-off" not in compiled.text.text
    with wire.loaded(compiled.text.text) as exchange:
        sends = [data for f in (4, 6) for port in (7, 8) for data in fragments(f, port)]
        found = exchange.burst(sends, "forward", {2: 8})[2]
        counted = wire.counters("inet itm_p")
    assert len(found) == 8
    services = [(Packet(bytearray(data)).family, Packet(bytearray(data)).dscp) for data in found]
    assert services == [(4, 46), (4, 46), (4, 8), (4, 8), (6, 46), (6, 46), (6, 8), (6, 8)]
    assert all(Packet(bytearray(d)).is_fragment for d in found)
    # One packet for each datagram at each of the three hooks.
    assert (counted["class_seven"], counted["class_other"]) == (6, 6)
