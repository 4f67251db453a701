"""The header codec: against itself, against scapy, and against anything else."""

import struct
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.packet import Packet as Layer
from scapy.packet import Raw

from itmlang.packet import Header, MalformedError, Packet, internet_checksum, updated_checksum
from tests.support.frames import SHAPES, ones_complement, shaped, wrong_checksums

PROTOCOLS = (1, 6, 17, 33, 47, 58, 132, 136)
FIELDS = (
    "source", "destination", "source_port", "destination_port", "tcp_flags", "length", "ttl",
    "tos", "dscp", "ecn", "connection", "protocol", "fragment_offset", "family",
)  # fmt: skip


@st.composite
def headers(draw: st.DrawFn) -> Header:
    family = draw(st.sampled_from((4, 6)))
    address = st.integers(0, 2 ** (32 if family == 4 else 128) - 1)
    port = st.integers(0, 65535)
    return Header(
        draw(st.sampled_from(PROTOCOLS)),
        (family, draw(address)), (family, draw(address)), draw(port), draw(port),
        flags=draw(st.integers(0, 255)), tos=draw(st.integers(0, 255)),
        ttl=draw(st.integers(0, 255)), length=draw(st.one_of(st.none(), st.integers(60, 200))),
    )  # fmt: skip


@given(headers())
def test_what_is_built_reads_back(header: Header) -> None:
    packet = header.build()
    ports = header.protocol in (6, 17, 33, 132, 136)
    assert (packet.family, packet.source) == (header.source[0], header.source)
    assert packet.destination == header.destination
    assert packet.protocol == header.protocol
    assert packet.source_port == (header.source_port if ports else None)
    assert packet.destination_port == (header.destination_port if ports else None)
    assert packet.tcp_flags == (header.flags if header.protocol == 6 else None)
    assert (packet.tos, packet.dscp, packet.ecn) == (header.tos, header.tos >> 2, header.tos & 3)
    assert (packet.ttl, packet.fragment_offset) == (header.ttl, 0)
    assert packet.length == max(header.length or 0, header.least_length)


@given(headers())
def test_checksums_are_those_of_scapy(header: Header) -> None:
    # ICMP within IPv6 and ICMPv6 within IPv4 are nothing that scapy would know.
    if header.protocol != (58 if header.source[0] == 4 else 1):
        assert wrong_checksums(bytes(header.build().data)) == []


@given(headers(), st.integers(0, 255))
def test_rewriting_keeps_the_checksum_right(header: Header, tos: int) -> None:
    packet = header.build()
    before = bytes(packet.data)
    packet.set_tos(tos)
    assert packet.tos == tos
    if header.source[0] == 4:
        assert ones_complement(packet.data[:20]) in (0, 0xFFFF)
    packet.set_tos(header.tos)
    unchanged = [i for i in range(len(before)) if i not in (10, 11)]
    assert all(packet.data[i] == before[i] for i in unchanged)


@given(headers(), st.integers(0, 63))
def test_a_dscp_leaves_ecn_alone(header: Header, dscp: int) -> None:
    packet = header.build()
    packet.set_dscp(dscp)
    assert (packet.dscp, packet.ecn) == (dscp, header.tos & 3)


@given(st.binary(min_size=20, max_size=60).filter(lambda b: len(b) % 2 == 0), st.data())
def test_an_updated_checksum_is_the_recomputed_one(data: bytes, draw: st.DataObject) -> None:
    words = list(struct.unpack(f"!{len(data) // 2}H", data))
    at = draw.draw(st.integers(0, len(words) - 1))
    after = draw.draw(st.integers(0, 65535))
    checksum = internet_checksum(data)
    assert checksum == ones_complement(data)
    updated = updated_checksum(checksum, words[at], after)
    words[at] = after
    wanted = internet_checksum(struct.pack(f"!{len(words)}H", *words))
    assert updated == wanted or {updated, wanted} == {0, 0xFFFF}


def read_all(packet: Packet) -> list[object]:
    return [getattr(packet, name) for name in FIELDS]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("family", (4, 6))
def test_a_packet_cut_at_any_byte_is_refused_or_read(family: int, protocol: int) -> None:
    header = Header(protocol, (family, 1), (family, 2), 3, 4, length=100)
    for shape in ("", *SHAPES):
        try:
            whole = shaped(bytes(header.build().data), shape)
        except ValueError:
            continue
        for size in range(len(whole)):
            # As it is: the lengths do not fit any more.
            with pytest.raises(MalformedError):
                Packet(bytearray(whole[:size]))
            # With the length written anew: a short packet, fields missing.
            if size >= (20 if family == 4 else 40):
                cut = bytearray(whole[:size])
                place, total = (2, size) if family == 4 else (4, size - 40)
                struct.pack_into("!H", cut, place, total)
                try:
                    packet = Packet(cut)
                except MalformedError:
                    continue
                read_all(packet)
                assert packet.length == size


@settings(max_examples=500)
@given(st.one_of(
    st.binary(max_size=120),
    st.binary(max_size=120).map(lambda b: b"\x45\x00\x00\x30" + b),
    st.binary(max_size=120).map(lambda b: b"\x60\x00\x00\x00\x00\x20" + b),
))  # fmt: skip
def test_any_bytes_are_malformed_or_a_packet(data: bytes) -> None:
    try:
        packet = Packet(bytearray(data))
    except MalformedError:
        return
    read_all(packet)
    packet.set_tos(packet.tos ^ 0xFF)


transports = st.one_of(
    st.builds(TCP, sport=st.integers(0, 65535), dport=st.integers(0, 65535),
              flags=st.integers(0, 255)),
    st.builds(UDP, sport=st.integers(0, 65535), dport=st.integers(0, 65535)),
)  # fmt: skip
extensions = st.lists(
    st.sampled_from((IPv6ExtHdrHopByHop, IPv6ExtHdrDestOpt, IPv6ExtHdrRouting)), max_size=3
)


@st.composite
def scapy_packets(draw: st.DrawFn) -> tuple[bytes, Layer, bool]:
    """(bytes, transport layer, is it a later fragment?) as scapy makes them."""
    transport, payload = draw(transports), Raw(draw(st.binary(max_size=30)))
    fragment = draw(st.sampled_from((None, None, (0, 1), (100, 1), (100, 0))))
    tos, ttl = draw(st.integers(0, 255)), draw(st.integers(0, 255))
    if draw(st.booleans()):
        options = draw(st.sampled_from(([], b"\x01\x01\x01\x00", b"\x01" * 40)))
        offset, more = fragment or (0, 0)
        whole = IP(src="10.0.0.1", dst="10.0.0.2", tos=tos, ttl=ttl, options=options,
                   frag=offset, flags=more) / transport / payload  # fmt: skip
    else:
        whole = IPv6(src="fd00::1", dst="fd00::2", tc=tos, hlim=ttl)
        for extension in draw(extensions):
            whole /= extension()
        if fragment is not None:
            whole /= IPv6ExtHdrFragment(offset=fragment[0], m=fragment[1])
        whole = whole / transport / payload
    return bytes(whole), transport, bool(fragment and fragment[0])


@settings(max_examples=300, deadline=None)
@given(scapy_packets())
def test_fields_are_those_of_scapy(made: tuple[bytes, Layer, bool]) -> None:
    data, transport, later = made
    packet = Packet(bytearray(data))
    outer = (IP if data[0] >> 4 == 4 else IPv6)(data)
    tcp = isinstance(transport, TCP)
    assert packet.protocol == (6 if tcp else 17)
    assert packet.tos == (outer.tos if packet.family == 4 else outer.tc)
    assert packet.ttl == (outer.ttl if packet.family == 4 else outer.hlim)
    assert bool(packet.fragment_offset) == later
    ports = (None, None) if later else (transport.sport, transport.dport)
    assert (packet.source_port, packet.destination_port) == ports
    assert packet.tcp_flags == (int(transport.flags) if tcp and not later else None)
    assert packet.length == len(data)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from((4, 6)), st.sampled_from((1, 6, 17, 58, 132)), st.integers(40, 120),
    st.sampled_from(("", "options", "hop-by-hop", "no-checksum")), st.integers(0, 65535),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_checksums_are_right_after_rewriting(
    family: int, protocol: int, length: int, shape: str, port: int, address: int
) -> None:
    ends = ((family, address ^ 0xFFFF), (family, 2))
    header = Header(protocol, *ends, 1, 2, mss=1460 if protocol == 6 else None)
    data = bytes(replace(header, length=max(length, header.least_length)).build().data)
    wanted = {4: "options", 6: "hop-by-hop"}[family] if shape in ("options", "hop-by-hop") else ""
    wanted = "no-checksum" if shape == "no-checksum" and protocol == 17 else wanted
    packet = Packet(bytearray(shaped(data, wanted)))
    packet.set_source((family, address))
    packet.set_destination((family, address ^ port))
    packet.set_source_port(port)
    packet.set_destination_port(port ^ 0xFFFF)
    packet.set_ttl(port & 0xFF)
    packet.set_tos(port >> 8)
    packet.set_tcp_mss(port)
    assert (packet.source, packet.destination) == ((family, address), (family, address ^ port))
    assert packet.source_port == (port if protocol in (6, 17, 132) else None)
    assert packet.tcp_mss == (min(port, 1460) if protocol == 6 else None)
    assert wrong_checksums(bytes(packet.data)) == []
    if wanted == "no-checksum":
        assert packet.transport_bytes(6, 2) == b"\0\0"


@pytest.mark.parametrize("options", [b"\x01\x02\x04\x05\xb4", b"\x02\x06\x05\xb4\0\0", b"\x02\x02"])
def test_an_mss_option_that_the_kernel_cannot_mend_is_left_alone(options: bytes) -> None:
    header = Header(6, (4, 1), (4, 2), 1, 2, flags=2).build().data
    header[32] = (20 + 8) << 2
    data = header + options + bytes(8 - len(options))
    struct.pack_into("!H", data, 2, len(data))
    packet = Packet(bytearray(data))
    packet.set_tcp_mss(1000)
    assert packet.data == data


def test_a_later_fragment_of_an_extension_header_is_one() -> None:
    made = (
        IPv6(src="fd00::1", dst="fd00::2", nh=44)
        / bytes((60, 0, 0x05, 0xC8, 0, 0, 0, 1))
        / bytes(16)
    )
    packet = Packet(bytearray(bytes(made)))
    assert packet.is_later_fragment
    assert packet.protocol is None
