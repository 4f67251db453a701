"""Packets as handlers see them: against scapy, against the kernel's view, against any bytes.

ITM_PACKETS is how many packets the seeded search makes; 200 000 is the nightly form.
"""

import os
import random
import struct
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_LSRR, IPOption_NOP, IPOption_RR
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6PacketTooBig,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    IPv6ExtHdrSegmentRouting,
    RouterAlert,
)
from scapy.packet import Packet as Layer
from scapy.packet import Raw

from itmlang import packet as kernel
from itmlang.headers import (
    DestinationOptions,
    Extension,
    FiveTuple,
    Fragment,
    HopByHop,
    ICMPHeader,
    ICMPv6Header,
    IncompleteError,
    IPv4Header,
    IPv6Header,
    MalformedError,
    Option,
    Packet,
    Routing,
    TCPHeader,
    UDPHeader,
)
from itmlang.headers.view import Address, Bit, Number
from itmlang.packet import Header
from tests.support.frames import SHAPES, ones_complement, shaped, wrong_checksums

PACKETS = int(os.environ.get("ITM_PACKETS", "5000"))
VIEWS = (IPv4Header, IPv6Header, TCPHeader, UDPHeader, ICMPHeader, ICMPv6Header)
V4 = {"src": "10.0.0.1", "dst": "10.0.0.2"}
V6 = {"src": "fd00::1", "dst": "fd00::2"}
TCP_OPTIONS = [("MSS", 1460), ("SAckOK", b""), ("Timestamp", (1, 2)), ("NOP", None), ("WScale", 7)]


def _samples() -> dict[str, bytes]:
    """Well-formed packets of all kinds, as scapy makes them."""
    transports = {
        "tcp": TCP(sport=1000, dport=80, flags="S", options=TCP_OPTIONS) / Raw(b"hello"),
        "tcp-odd-mss": TCP(options=[("NOP", None), ("MSS", 1460)], flags="S"),
        "tcp-bare": TCP(sport=1, dport=2, flags="PA", seq=7, ack=9) / Raw(b"x" * 40),
        "udp": UDP(sport=53, dport=1000) / Raw(b"question"),
        "udp-unchecked": UDP(sport=53, dport=1000, chksum=0) / Raw(b"quest"),
        "other": Raw(b"\x11\x22\x33\x44" * 5),
    }
    outer: dict[str, tuple[Layer, dict[str, Layer]]] = {
        "ipv4": (IP(**V4), {**transports, "icmp": ICMP(id=7, seq=8) / Raw(b"ping")}),
        "options": (IP(**V4, options=[IPOption_NOP(), IPOption_RR(routers=["1.2.3.4"])]), transports),
        "source-route": (IP(**V4, options=IPOption_LSRR(routers=["9.9.9.9", "8.8.8.8"])), transports),
        "ipv6": (IPv6(**V6), {**transports, "icmpv6": ICMPv6EchoRequest(id=7, seq=8) / Raw(b"pong"),
                              "too-big": ICMPv6PacketTooBig(mtu=1280) / Raw(b"z" * 48)}),
        "hop-by-hop": (IPv6(**V6) / IPv6ExtHdrHopByHop(options=[RouterAlert(value=1)]), transports),
        "destination": (IPv6(**V6) / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt(), transports),
        "routing": (IPv6(**V6) / IPv6ExtHdrRouting(addresses=["fd00::8", "fd00::9"], segleft=1), transports),
        "routed": (IPv6(**V6) / IPv6ExtHdrRouting(addresses=["fd00::8", "fd00::2"], segleft=0), transports),
        "segments": (IPv6(**V6) / IPv6ExtHdrSegmentRouting(addresses=["fd00::5", "fd00::2"], segleft=1, lastentry=1), transports),
    }  # fmt: skip
    made = {}
    for name, (ip, inner) in outer.items():
        for kind, transport in inner.items():
            layer = ip / transport
            if kind == "other":
                layer[IP if IP in layer else IPv6].underlayer = None
                layer = ip.copy()
                last = layer.lastlayer()
                setattr(last, "proto" if isinstance(last, IP) else "nh", 253)
                layer = layer / transport
            made[f"{name}-{kind}"] = bytes(layer)
    return made


SAMPLES = _samples()
PLAIN = {name: data for name, data in SAMPLES.items() if name.partition("-")[0] in ("ipv4", "ipv6")}


def _fragments() -> dict[str, bytes]:
    """Packets with fragment headers, and some that end before their headers do."""
    made = {}
    for family in (4, 6):
        for protocol in (1, 6, 17, 58, 132):
            data = bytes(Header(protocol, (family, 1), (family, 2), 3, 4, length=100).build().data)
            for shape in SHAPES:
                try:
                    made[f"{family}-{protocol}-{shape}"] = shaped(data, shape)
                except (ValueError, KeyError):
                    continue
    return made


FRAGMENTS = _fragments()


def fields(kind: type) -> list[str]:
    """The public fields of a view or packet."""
    return [
        name
        for name in dir(kind)
        if not name.startswith("_")
        and isinstance(getattr(kind, name), Number | Bit | Address | property)
    ]


def views(packet: Packet) -> Iterator[Any]:
    yield packet.ip
    for view in (packet.tcp, packet.udp, packet.icmp, packet.icmpv6):
        if view is not None:
            yield view


def read_all(packet: Packet) -> dict[str, object]:
    """Every field that the packet has."""
    found: dict[str, object] = {}
    for name in fields(Packet):
        if name in ("ip", "tcp", "udp", "icmp", "icmpv6"):
            continue
        try:
            found[name] = getattr(packet, name)
        except IncompleteError:
            assert name == "payload" and not packet.whole
    for view in views(packet):
        for name in fields(type(view)):
            found[f"{type(view).__name__}.{name}"] = getattr(view, name)
    for extension in packet.extensions:
        found[f"{extension}"] = [getattr(extension, name) for name in fields(type(extension))]
    repr(packet)
    return found


def _options(rand: random.Random) -> list[Option]:
    some = (
        Option(1),
        Option(2, rand.randbytes(2)),
        Option(8, rand.randbytes(8)),
        Option(0x88, b"ab"),
    )
    return rand.choices(some, k=rand.randrange(5))


def _extensions(rand: random.Random) -> list[Extension]:
    some = (
        HopByHop.of([Option(5, b"\0\0")]), DestinationOptions.of(()),
        Routing.of(0, rand.randrange(2), bytes(4) + rand.randbytes(16)),
    )  # fmt: skip
    return rand.choices(some, k=rand.randrange(3))


def value(view: Any, name: str, rand: random.Random) -> Any:
    """Something that could be written there."""
    match getattr(type(view), name):
        case Number() as number:
            return rand.choice((0, number._limit, rand.randint(0, number._limit)))
        case Bit():
            return rand.random() < 0.5
        case Address() as address:
            return address._kind(rand.getrandbits(address._kind(0).max_prefixlen))
    if name in ("mss", "mark"):
        return rand.choice((0, 0xFFFF, rand.randrange(0x10000)))
    made: dict[str, Callable[[], Any]] = {
        "options": lambda: _options(rand), "extensions": lambda: _extensions(rand),
        "payload": lambda: rand.randbytes(rand.randrange(40)), "rest": lambda: rand.randbytes(4),
        "protocol": lambda: rand.choice((0, 1, 6, 17, 43, 44, 58, 60)),
        "data": lambda: rand.choice(list(SAMPLES.values())),
    }  # fmt: skip
    return made[name]()


def writable(view: Any) -> list[str]:
    return [
        name
        for name in fields(type(view))
        if not (isinstance(getattr(type(view), name), property) and getattr(type(view), name).fset is None)
    ]  # fmt: skip


# Writing these gives the bytes another meaning, so the checksum behind is another's.
MEANINGS = {"protocol", "more_fragments", "fragment_offset", "data"}


def ip_like(data: bytes, rand: random.Random) -> bytes:
    """A packet damaged: bytes changed, cut, grown, lengths that lie or fit again."""
    made = bytearray(data)
    for _ in range(rand.choice((0, 1, 1, 2, 5, 20))):
        at = rand.randrange(min(len(made), rand.choice((12, 60, 1000))))
        made[at] = rand.choice(
            (0, 1, 2, 3, 0xFF, rand.randrange(256), made[at] ^ 1 << rand.randrange(8))
        )
    match rand.randrange(5):
        case 0:
            del made[rand.randrange(len(made) + 1) :]
        case 1:
            made += rand.randbytes(rand.randrange(1, 20))
        case 2:
            del made[rand.randrange(20, len(made) + 1) :]
            place, taken = (2, 0) if made[0] >> 4 == 4 else (4, 40)
            if len(made) >= taken:
                made[place : place + 2] = (len(made) - taken).to_bytes(2)
        case 3:
            start = rand.randrange(len(made))
            made[start:] = rand.randbytes(len(made) - start)
    return bytes(made)


def test_the_seeded_search_for_bytes_that_break_it() -> None:
    """All fields of damaged packets are read and written: nothing is raised but what is said."""
    rand = random.Random(13)
    sources = [*SAMPLES.values(), *FRAGMENTS.values()]
    seen = dict.fromkeys(("malformed", "cut", "tcp", "extensions", "refused", "written"), 0)
    for _ in range(PACKETS):
        data = ip_like(rand.choice(sources), rand) if rand.random() < 0.95 else rand.randbytes(60)
        packet = Packet(data)
        try:
            read_all(packet)
        except MalformedError:
            seen["malformed"] += 1
            for name in ("ip", "tcp", "payload", "whole", "five_tuple", "extensions"):
                with pytest.raises(MalformedError):
                    getattr(packet, name)
            assert packet.data == data and not packet.altered
            continue
        assert packet.data == data and not packet.altered
        seen["cut"] += not packet.whole
        seen["tcp"] += packet.tcp is not None
        seen["extensions"] += bool(packet.extensions)
        targets = [(view, name) for view in (packet, *views(packet)) for name in writable(view)]
        rand.shuffle(targets)
        for view, name in targets:
            before = packet.data
            try:
                setattr(view, name, value(view, name, rand))
                seen["written"] += 1
            except (MalformedError, IncompleteError):
                seen["refused"] += 1
                # A field that is refused leaves the packet alone.
                assert packet.data == before
            except ValueError as error:
                assert any(why in str(error) for why in ("no extension", "room for", "the most"))
                assert packet.data == before
        try:
            read_all(packet)
        except MalformedError as error:
            raise AssertionError(f"{data.hex()} became {packet.data.hex()}") from error
    assert all(seen.values()), seen


@pytest.mark.parametrize("name", SAMPLES)
def test_checksums_are_right_after_any_writes(name: str) -> None:
    rand = random.Random(name)
    assert wrong_checksums(SAMPLES[name]) == []
    for _ in range(12):
        packet = Packet(SAMPLES[name])
        targets = [
            (view, field) for view in (packet, *views(packet)) for field in writable(view)
            if field not in MEANINGS and (field, type(view)) != ("extensions", IPv4Header)
        ]  # fmt: skip
        for view, field in rand.choices(targets, k=rand.randrange(1, 8)):
            if field == "extensions" and packet.ip.version == 4:
                continue
            setattr(view, field, value(view, field, rand))
            assert wrong_checksums(packet.data) == [], field
            assert packet.whole and packet.length == len(packet.data)


@pytest.mark.parametrize("name", SAMPLES)
def test_each_field_reads_as_written(name: str) -> None:
    rand = random.Random(name)
    for number, view in enumerate(views(Packet(SAMPLES[name]))):
        for field in writable(view):
            if field in MEANINGS:
                continue
            packet = Packet(SAMPLES[name])
            target = list(views(packet))[number]
            written = value(target, field, rand)
            others = read_all(packet)
            setattr(target, field, written)
            read = getattr(target, field)
            assert read == (tuple(written) if field == "options" else written), field
            if field not in ("options", "mss"):
                mine = {field, "checksum", "tos", "dscp", "ecn", "flags", "rest", "identifier",
                        "sequence", "fin", "syn", "rst", "psh", "ack", "urg", "ece", "cwr"}  # fmt: skip
                for key, before in others.items():
                    if key.rpartition(".")[2] not in mine | {"data", "altered", "five_tuple"}:
                        assert read_all(packet)[key] == before, (field, key)


@pytest.mark.parametrize("name", [*PLAIN, "destination-tcp", "routed-udp", "options-tcp"])
def test_a_copy_of_the_headers_alone(name: str) -> None:
    """Cut at every byte: what can be written fits the bytes that are not there."""
    whole, rand = SAMPLES[name], random.Random(name)
    for size in range(len(whole)):
        packet = Packet(whole[:size])
        try:
            found = read_all(packet)
        except MalformedError:
            least = 20 if whole[0] >> 4 == 4 else 40
            assert size < max(least, (whole[0] & 15) * 4 if least == 20 else 0)
            continue
        assert not packet.whole and packet.length == len(whole)
        everything = read_all(Packet(whole))
        for key, read in found.items():
            if key not in (
                "data",
                "whole",
                "extensions",
                "protocol",
                "five_tuple",
                "IPv6Header.protocol",
            ):
                assert everything[key] == read, key
        for wanted in ("payload", "data"):
            with pytest.raises((IncompleteError, MalformedError)):
                setattr(packet, wanted, whole[:size])
        grown = 0
        for view in views(packet):
            for field in writable(view):
                if field in MEANINGS:
                    continue
                try:
                    setattr(view, field, value(view, field, rand))
                except (IncompleteError, MalformedError):
                    assert field in ("source", "destination", "options")
                grown = packet.length - len(whole)
        assert len(packet.data) == size + grown
        if size % 7 == 0 or size > len(whole) - 4:
            assert wrong_checksums(packet.data + whole[size:]) == []


@pytest.mark.parametrize("name", [*SAMPLES, *FRAGMENTS])
def test_a_packet_that_ends_at_any_byte(name: str) -> None:
    """The IP length says so: short headers are none."""
    whole = {**SAMPLES, **FRAGMENTS}[name]
    place, taken = (2, 0) if whole[0] >> 4 == 4 else (4, 40)
    for size in range((whole[0] & 15) * 4 if whole[0] >> 4 == 4 else 40, len(whole)):
        cut = bytearray(whole[:size])
        cut[place : place + 2] = (size - taken).to_bytes(2)
        packet = Packet(bytes(cut))
        found = read_all(packet)
        assert {**read_all(Packet(cut + bytes(40))), "data": bytes(cut)} == found
        assert packet.whole and packet.length == size
        seen = kernel.Packet(cut)
        assert packet.ip.protocol == seen.protocol
        assert packet.five_tuple[3:] == (
            (seen.source_port, seen.destination_port) if seen.destination_port is not None else (None, None)
        )  # fmt: skip
        room = 0 if seen.protocol is None else size - seen.transport
        assert (packet.udp is not None) == (
            seen.protocol == 17 and room >= 8 and not seen.fragment_offset
        )
        if packet.tcp is not None:
            assert packet.tcp.header_length <= room


@pytest.mark.parametrize("name", [*SAMPLES, *FRAGMENTS])
def test_bytes_behind_the_packet_are_not_its(name: str) -> None:
    data = {**SAMPLES, **FRAGMENTS}[name]
    packet, more = Packet(data), Packet(data + b"trailing")
    assert {**read_all(more), "data": data} == read_all(packet)
    for one in (packet, more):
        one.ip.tos ^= 0xFF
    assert packet.data == more.data and len(more.data) == len(data)


def test_nothing_is_copied_or_parsed_before_it_must() -> None:
    packet = Packet(b"junk", mark=3, input="eth0", output="eth1", hook="forward")
    assert (packet.mark, packet.input, packet.output, packet.hook) == (3, "eth0", "eth1", "forward")
    assert packet.data == b"junk" and not packet.altered
    packet.mark = 7
    assert packet.mark == 7 and not packet.altered
    for wrong in (-1, 2**32, "1"):
        with pytest.raises(ValueError, match="mark is a number"):
            packet.mark = wrong  # type: ignore[assignment]
    for name in ("input", "output", "hook", "altered", "length", "whole"):
        with pytest.raises(AttributeError):
            setattr(packet, name, "eth2")
    data = SAMPLES["ipv4-tcp"]
    packet = Packet(data)
    read_all(packet)
    packet.ip.tos = packet.ip.tos
    packet.payload = packet.payload
    packet.tcp.options = packet.tcp.options
    assert not packet.altered and packet._bytes is data
    packet = Packet(SAMPLES["hop-by-hop-tcp"])
    packet.extensions = packet.extensions
    assert not packet.altered


def test_figure_13() -> None:
    """The paper's: the TOS byte and a port written, all checksums right."""
    data = SAMPLES["ipv4-tcp"]
    packet = Packet(data)
    packet.ip.tos = 0x55
    packet.tcp.destination_port = 5555
    assert packet.altered and Packet(packet.data).tcp.destination_port == 5555
    assert IP(packet.data).tos == 0x55 and wrong_checksums(packet.data) == []
    changed = {i for i in range(len(data)) if data[i] != packet.data[i]}
    assert {1, 22, 23} <= changed <= {1, 10, 11, 22, 23, 36, 37}


def test_figure_14() -> None:
    """The paper's: a packet within another, and out again."""
    inner = SAMPLES["ipv4-udp"]
    packet = Packet(inner)
    packet.data = bytes(IP(src="192.0.2.1", dst="192.0.2.2", proto=4) / Raw(packet.data))
    assert (packet.ip.protocol, packet.udp, packet.payload) == (4, None, inner)
    packet.data = packet.payload + b"trailing"
    assert packet.data == inner and packet.udp.destination_port == 1000
    for wrong in (b"", inner[:-1], b"\x75" + inner[1:]):
        with pytest.raises(MalformedError):
            packet.data = wrong
    assert packet.data == inner


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from((4, 6)), st.sampled_from((6, 17, 58, 1, 136)), st.sampled_from(("", *SHAPES)),
    st.integers(0, 255), st.integers(0, 65535), st.integers(0, 2**32 - 1), st.integers(40, 120),
)  # fmt: skip
def test_the_same_bytes_as_the_kernels_rules(
    family: int, protocol: int, shape: str, octet: int, port: int, address: int, length: int
) -> None:
    """What policies can write, handlers write to the same bytes."""
    header = Header(protocol, (family, 1), (family, 2), 3, 4, mss=1460 if protocol == 6 else None)
    try:
        data = shaped(bytes(header.build().data), shape)
    except (ValueError, KeyError, IndexError):
        assume(False)
    seen, packet = kernel.Packet(bytearray(data)), Packet(data)
    seen.set_tos(octet)
    packet.ip.tos = octet
    seen.set_ttl(octet)
    packet.ip.ttl = octet
    seen.set_source_port(port)
    seen.set_destination_port(port ^ 1)
    transport = packet.tcp or packet.udp
    if transport is not None:
        transport.source_port, transport.destination_port = port, port ^ 1
    elif protocol != 6:  # the kernel writes the ports of the shortest TCP header, too
        assert seen.source_port in (3, None)
    try:
        packet.ip.source = ip_address(address.to_bytes(4 if family == 4 else 16))
        packet.ip.destination = ip_address((address ^ port).to_bytes(4 if family == 4 else 16))
    except IncompleteError:
        assert packet.tcp is None or protocol == 136
        return
    seen.set_source((family, address))
    seen.set_destination((family, address ^ port))
    assert packet.data == bytes(seen.data)
    if packet.tcp is not None and packet.tcp.mss is not None and port < 1460 and "nop" not in shape:
        seen.set_tcp_mss(port)
        packet.tcp.mss = port
        place = seen.transport + 16
        # The kernel has another zero there.
        mine, theirs = (bytearray(d) for d in (packet.data, seen.data))
        assert (
            int.from_bytes(mine[place : place + 2]) % 0xFFFF
            == int.from_bytes(theirs[place : place + 2]) % 0xFFFF
        )
        del mine[place : place + 2], theirs[place : place + 2]
        assert mine == theirs


def _of_scapy(layer: Layer) -> dict[str, object]:
    """What scapy reads, by our names."""
    found: dict[str, object] = {}
    rows: dict[type[Layer], tuple[str, dict[str, str]]] = {
        IP: ("IPv4Header", {"tos": "tos", "ttl": "ttl", "protocol": "proto", "identification": "id",
                            "fragment_offset": "frag", "checksum": "chksum"}),
        IPv6: ("IPv6Header", {"tos": "tc", "ttl": "hlim", "flow_label": "fl"}),
        TCP: ("TCPHeader", {"source_port": "sport", "destination_port": "dport", "sequence": "seq",
                            "acknowledgement": "ack", "window": "window", "checksum": "chksum",
                            "urgent_pointer": "urgptr"}),
        UDP: ("UDPHeader", {"source_port": "sport", "destination_port": "dport", "length": "len",
                            "checksum": "chksum"}),
        ICMP: ("ICMPHeader", {"type": "type", "code": "code", "checksum": "chksum",
                              "identifier": "id", "sequence": "seq"}),
        ICMPv6EchoRequest: ("ICMPv6Header", {"type": "type", "code": "code", "checksum": "cksum",
                                             "identifier": "id", "sequence": "seq"}),
    }  # fmt: skip
    for kind, (name, names) in rows.items():
        if kind in layer:
            found |= {f"{name}.{ours}": layer[kind].getfieldval(its) for ours, its in names.items()}
    for kind, name in ((IP, "IPv4Header"), (IPv6, "IPv6Header")):
        if kind in layer:
            found |= {f"{name}.source": ip_address(layer[kind].src),
                      f"{name}.destination": ip_address(layer[kind].dst)}  # fmt: skip
    if IP in layer:
        flags = int(layer[IP].flags)
        found |= {"IPv4Header.dont_fragment": bool(flags & 2), "IPv4Header.more_fragments": bool(flags & 1),
                  "IPv4Header.header_length": layer[IP].ihl * 4}  # fmt: skip
    if TCP in layer:
        bits = ("fin", "syn", "rst", "psh", "ack", "urg", "ece", "cwr")
        flags = int(layer[TCP].flags)
        found |= {f"TCPHeader.{bit}": bool(flags >> n & 1) for n, bit in enumerate(bits)}
        found |= {"TCPHeader.flags": flags & 0xFF, "TCPHeader.header_length": layer[TCP].dataofs * 4,
                  "TCPHeader.mss": dict(layer[TCP].options).get("MSS"),
                  "payload": bytes(layer[TCP].payload)}  # fmt: skip
    if UDP in layer:
        found["payload"] = bytes(layer[UDP].payload)
    return found


octets, words = st.integers(0, 255), st.integers(0, 65535)


@st.composite
def scapy_packets(draw: st.DrawFn) -> Layer:
    long = st.integers(0, 2**32 - 1)
    v4 = draw(st.booleans())
    option = st.sampled_from(TCP_OPTIONS)
    transport = draw(st.one_of(
        st.builds(TCP, sport=words, dport=words, seq=long, ack=long, flags=octets, window=words,
                  urgptr=words, options=st.lists(option, max_size=5, unique_by=lambda o: o[0])),
        st.builds(UDP, sport=words, dport=words, chksum=st.sampled_from((None, 0))),
        st.builds(ICMP, type=st.just(8), code=octets, id=words, seq=words) if v4
        else st.builds(ICMPv6EchoRequest, code=octets, id=words, seq=words),
    ))  # fmt: skip
    payload = Raw(draw(st.binary(max_size=60)))
    if v4:
        some = [
            IPOption_NOP(),
            IPOption_RR(routers=["1.1.1.1"] * 2),
            IPOption_LSRR(routers=["9.9.9.9"]),
        ]
        ip = draw(st.builds(
            IP, tos=octets, ttl=octets, id=words, flags=st.sampled_from((0, 2, 4, 6)),
            src=st.just("10.0.0.1"), dst=st.just("10.0.0.2"),
            options=st.lists(st.sampled_from(some), max_size=3, unique_by=type),
        ))  # fmt: skip
        return IP(bytes(ip / transport / payload))
    whole = draw(st.builds(IPv6, tc=octets, hlim=octets, fl=st.integers(0, 0xFFFFF),
                           src=st.just("fd00::1"), dst=st.just("fd00::2")))  # fmt: skip
    extension = st.sampled_from((
        IPv6ExtHdrHopByHop(options=[RouterAlert()]), IPv6ExtHdrDestOpt(),
        IPv6ExtHdrDestOpt(),
        IPv6ExtHdrRouting(addresses=["fd00::8"], segleft=1), IPv6ExtHdrRouting(),
    ))  # fmt: skip
    for header in draw(st.lists(extension, max_size=2, unique_by=type)):
        whole = whole / header.copy()
    return IPv6(bytes(whole / transport / payload))


@settings(max_examples=400, deadline=None)
@given(scapy_packets())
def test_scapy_reads_the_same(layer: Layer) -> None:
    data = bytes(layer)
    found = read_all(Packet(data))
    for key, wanted in _of_scapy(layer).items():
        assert found[key] == wanted, key
    kinds = (IPv6ExtHdrHopByHop, IPv6ExtHdrRouting, IPv6ExtHdrDestOpt)
    if IPv6 in layer:
        assert len(Packet(data).extensions) == sum(kind in layer for kind in kinds)
    options = Packet(data).tcp.options if TCP in layer else ()
    if TCP in layer:
        numbers = {"NOP": 1, "MSS": 2, "WScale": 3, "SAckOK": 4, "Timestamp": 8}
        named = [numbers[name] for name, _ in layer[TCP].options if name != "EOL"]
        assert [option.kind for option in options] == named


@settings(max_examples=400, deadline=None)
@given(scapy_packets(), st.data())
def test_scapy_builds_the_same_after_a_change(layer: Layer, draw: st.DataObject) -> None:
    """The same field changed here and there; scapy computes all lengths and checksums anew."""
    packet, ip = Packet(bytes(layer)), layer[IP if IP in layer else IPv6]
    names = {IP: {"tos": ("tos", octets), "ttl": ("ttl", octets), "identification": ("id", words),
                  "source": ("src", st.just("203.0.113.77")), "destination": ("dst", st.just("203.0.113.9"))},
             IPv6: {"tos": ("tc", octets), "ttl": ("hlim", octets), "flow_label": ("fl", words),
                    "source": ("src", st.just("2001:db8::77")), "destination": ("dst", st.just("2001:db8::9"))},
             TCP: {"source_port": ("sport", words), "sequence": ("seq", words), "window": ("window", words),
                   "flags": ("flags", octets), "destination_port": ("dport", words)},
             UDP: {"source_port": ("sport", words), "destination_port": ("dport", words)},
             ICMP: {"code": ("code", octets), "identifier": ("id", words)},
             ICMPv6EchoRequest: {"code": ("code", octets), "sequence": ("seq", words)}}  # fmt: skip
    upper = next(kind for kind in (TCP, UDP, ICMP, ICMPv6EchoRequest) if kind in layer)
    views = {TCP: packet.tcp, UDP: packet.udp, ICMP: packet.icmp, ICMPv6EchoRequest: packet.icmpv6}
    for kind, view in ((type(ip), packet.ip), (upper, views[upper])):
        name = draw.draw(st.sampled_from(sorted(names[kind])))
        its, strategy = names[kind][name]
        wanted = draw.draw(strategy)
        setattr(view, name, wanted)
        setattr(layer[kind], its, wanted)
    payload = draw.draw(st.binary(min_size=1, max_size=80))
    packet.payload = payload
    changed = layer
    if upper is ICMPv6EchoRequest:
        layer[upper].data = payload
    else:
        layer[upper].remove_payload()
        changed = layer / Raw(payload)
    for kind, fresh in ((IP, ("len", "chksum")), (IPv6, ("plen",)), (TCP, ("chksum",)),
                        (UDP, ("len", "chksum")), (ICMP, ("chksum",)), (ICMPv6EchoRequest, ("cksum",))):  # fmt: skip
        if kind in changed:
            for name in fresh:
                if kind is UDP and name == "chksum" and changed[UDP].chksum == 0:
                    continue
                delattr(changed[kind], name)
    wanted_bytes, got = bytearray(bytes(changed)), bytearray(packet.data)
    assert wrong_checksums(bytes(got)) == []
    ip_check = [10] if IP in changed else []
    for place in ip_check:  # 0 and 0xffff are both zero
        for one in (wanted_bytes, got):
            if one[place : place + 2] == b"\xff\xff":
                one[place : place + 2] = b"\0\0"
    assert got == wanted_bytes


@pytest.mark.parametrize("name", [n for n in FRAGMENTS if n.endswith(("-fragment", "-short"))])
def test_fragments(name: str) -> None:
    packet = Packet(FRAGMENTS[name])
    later = name.endswith("-fragment") and not name.endswith("first-fragment")
    assert packet.is_fragment and packet.is_later_fragment == later
    with pytest.raises(IncompleteError, match="covers the other fragments"):
        packet.payload = b"new"
    if later:
        assert [packet.tcp, packet.udp, packet.icmp, packet.icmpv6] == [None] * 4
        assert packet.five_tuple[3:] == (None, None)
        behind = packet.payload
        packet.ip.source = packet.ip.destination
        packet.ip.ttl = 3
        assert packet.payload == behind  # the checksum lies in the first fragment
    if packet.ip.version == 6:
        (header,) = packet.extensions
        assert isinstance(header, Fragment) and header.identification == 7
        assert header.more != later and header.offset == (185 if later else 0)
    if packet.tcp is not None:
        with pytest.raises(IncompleteError, match="not their length"):
            packet.tcp.options = [Option(2, b"\x05\xb4")]
    if name.endswith("6-short"):
        before = packet.data
        with pytest.raises(IncompleteError, match="not among the bytes"):
            packet.ip.source = packet.ip.destination
        assert packet.data == before


def test_a_first_fragment_keeps_the_checksum_of_all() -> None:
    """Fields of the first of two fragments are written; put together they are a right packet."""
    whole = SAMPLES["ipv4-tcp-bare"]
    first = Packet(whole[:44])
    assert not first.whole
    data = bytearray(whole[:44])
    struct.pack_into("!HHHHHH", data, 2, 44, 9, 0x2000, 64 << 8 | 6, 0, 0x0A00)
    first = Packet(bytes(data))
    first.tcp.source_port, first.tcp.window, first.ip.destination = 7777, 1, "192.0.2.9"
    rest = Packet(bytes(first.data[:20]) + whole[44:])
    joined = bytearray(first.data + whole[44:])
    struct.pack_into("!HHH", joined, 2, len(joined), 0, 0)
    struct.pack_into("!H", joined, 10, 0)
    struct.pack_into("!H", joined, 10, kernel.internet_checksum(joined[:20]))
    assert wrong_checksums(bytes(joined)) == [] and rest.ip.source == first.ip.source


@pytest.mark.parametrize("name", SAMPLES)
def test_payloads_of_any_length(name: str) -> None:
    for payload in (b"", b"a", b"ab" * 50, bytes(1500)):
        packet = Packet(SAMPLES[name])
        packet.payload = payload
        assert packet.payload == payload and wrong_checksums(packet.data) == []
        assert packet.whole and Packet(packet.data).payload == payload
        if packet.udp is not None:
            assert packet.udp.length == 8 + len(payload)
            assert (packet.udp.checksum == 0) == ("unchecked" in name)
    before = packet.data
    with pytest.raises(ValueError, match=r"bytes"):
        packet.payload = bytes(70_000)
    assert packet.data == before
    # One byte too many by the IP length alone.
    room = 65_535 - (0 if packet.ip.version == 4 else -40) - (len(before) - 1500)
    with pytest.raises(ValueError, match=r"65535|65575"):
        packet.payload = bytes(room + 1)
    assert packet.data == before
    packet.payload = bytes(room)
    assert packet.whole and len(packet.data) in (65_535, 65_575)


def test_views_stay_right_when_headers_before_them_move() -> None:
    packet = Packet(SAMPLES["ipv4-tcp"])
    tcp = packet.tcp
    packet.ip.options = [Option(0x94, b"\0\0")]
    tcp.destination_port = 99
    assert IP(packet.data)[TCP].dport == 99 and wrong_checksums(packet.data) == []
    packet.data = SAMPLES["ipv4-udp"]
    for use in (lambda: tcp.window, lambda: setattr(tcp, "window", 3), lambda: tcp.options):
        with pytest.raises(MalformedError, match="no whole TCPHeader any more"):
            use()
    ip = packet.ip
    packet.data = SAMPLES["ipv6-udp"]
    with pytest.raises(MalformedError, match="no whole IPv4Header any more"):
        ip.tos = 3
    assert packet.data == SAMPLES["ipv6-udp"]


@pytest.mark.parametrize(("field", "wrong"), [
    ("ip.tos", 256), ("ip.tos", -1), ("ip.ttl", "64"), ("ip.dscp", 64), ("ip.ecn", 4),
    ("ip.identification", 65536), ("ip.protocol", 256), ("ip.dont_fragment", 2), ("ip.ttl", 1.0),
    ("ip.source", "fd00::1"), ("ip.source", "10.0.0"), ("ip.source", 5), ("ip.destination", None),
    ("ip.source", IPv6Address("fd00::1")), ("tcp.source_port", 65536), ("tcp.sequence", 2**32),
    ("tcp.mss", 65536), ("tcp.options", [Option(2, bytes(39))]), ("tcp.options", [Option(0)]),
    ("tcp.options", [Option(1, b"x")]), ("tcp.options", [Option(256)]), ("extensions", ()),
    ("ip.options", [Option(7, bytes(39))]), ("ip.options", [Option(7, bytes(254))]),
])  # fmt: skip
def test_what_does_not_fit_is_refused(field: str, wrong: object) -> None:
    packet = Packet(SAMPLES["ipv4-tcp"])
    *view, name = field.split(".")
    target = getattr(packet, view[0]) if view else packet
    with pytest.raises(ValueError) as caught:
        setattr(target, name, wrong)
    assert caught.type is ValueError and not packet.altered
    assert str(caught.value)


def test_wrong_values_of_ipv6_and_icmp() -> None:
    packet = Packet(SAMPLES["ipv6-icmpv6"])
    for name, wrong in (("flow_label", 2**20), ("protocol", 256), ("source", "10.0.0.1")):
        with pytest.raises(ValueError):
            setattr(packet.ip, name, wrong)
    with pytest.raises(ValueError, match="4 bytes, not 3"):
        packet.icmpv6.rest = b"abc"
    for make in (
        lambda: HopByHop(b"12345"), lambda: Routing(bytes(2054)), lambda: Fragment(bytes(14)),
        lambda: Fragment.of(0x2000, False, 0), lambda: Fragment.of(0, False, 2**32),
        lambda: HopByHop.of([Option(300)]), lambda: HopByHop.of([Option(0, b"x")]),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            make()
    with pytest.raises(ValueError, match="more than its length can say"):
        HopByHop.of([Option(5, bytes(256))])
    assert not packet.altered


def test_ipv6_extensions() -> None:
    packet = Packet(SAMPLES["ipv6-tcp"])
    assert packet.extensions == () and Packet(SAMPLES["ipv4-tcp"]).extensions == ()
    hops, options = HopByHop.of([Option(5, b"\0\1")]), DestinationOptions.of(())
    way = Routing.of(0, 1, bytes(4) + IPv6Address("fd00::99").packed)
    packet.extensions = (hops, way, options)
    assert packet.extensions == (hops, way, options)
    assert packet.tcp.destination_port == 80 and packet.ip.protocol == 6
    layer = IPv6(packet.data)
    assert layer[IPv6ExtHdrHopByHop].options[0].value == 1
    assert layer[IPv6ExtHdrRouting].addresses == ["fd00::99"]
    assert (way.type, way.segments_left, way.final_destination) == (0, 1, IPv6Address("fd00::99"))
    # The checksum is over the final destination now, not over the next one.
    assert wrong_checksums(packet.data) == []
    checksum = packet.tcp.checksum
    packet.ip.destination = "fd00::1234"
    assert packet.tcp.checksum == checksum and wrong_checksums(packet.data) == []
    packet.extensions = [e for e in packet.extensions if not isinstance(e, Routing)]
    assert wrong_checksums(packet.data) == []
    packet.extensions = ()
    packet.ip.destination = "fd00::2"
    assert packet.data == SAMPLES["ipv6-tcp"]
    packet.extensions = (Fragment.of(0, False, 3),)
    assert packet.is_fragment and packet.tcp is not None and packet.ip.protocol == 6
    packet.ip.protocol = 17
    assert packet.ip.protocol == 17 and IPv6(packet.data)[IPv6ExtHdrFragment].nh == 17


def test_broken_extensions() -> None:
    whole = bytearray(SAMPLES["hop-by-hop-tcp"])
    whole[41] = 200  # a length beyond the packet
    whole[40] = 60
    packet = Packet(bytes(whole))
    assert (packet.extensions, packet.tcp, packet.ip.protocol, packet.payload) == (
        (),
        None,
        None,
        b"",
    )
    for name, new in (("extensions", ()), ("payload", b"x")):
        with pytest.raises(MalformedError, match="broken off"):
            setattr(packet, name, new)
    for name, written in (("source", "fd00::3"), ("protocol", 6)):
        with pytest.raises(MalformedError, match="broken off"):
            setattr(packet.ip, name, written)
    packet.ip.tos = 3
    assert packet.ip.tos == 3 and packet.data[40:] == bytes(whole[40:])


def test_an_authentication_header_ends_the_chain_as_in_nftables() -> None:
    data = bytes(IPv6(**V6, nh=51) / Raw(bytes((6, 4)) + bytes(22) + bytes(TCP())))
    packet = Packet(data)
    assert (packet.ip.protocol, packet.tcp, packet.extensions) == (51, None, ())
    assert packet.payload == data[40:] and kernel.Packet(bytearray(data)).protocol == 51


def test_options_of_ip_and_tcp() -> None:
    packet = Packet(SAMPLES["options-tcp"])
    assert [o.kind for o in packet.ip.options] == [1, 7]
    packet.ip.options = ()
    assert packet.ip.header_length == 20 and wrong_checksums(packet.data) == []
    assert [o.kind for o in packet.tcp.options] == [2, 4, 8, 1, 3]
    packet.tcp.options = [o for o in packet.tcp.options if o.kind != 8]
    assert packet.payload == b"hello"
    assert dict(IP(packet.data)[TCP].options)["WScale"] == 7 and wrong_checksums(packet.data) == []
    # In place, at an odd place, and where there is none.
    for name in ("ipv4-tcp", "ipv6-tcp-odd-mss", "routing-tcp-bare"):
        packet = Packet(SAMPLES[name])
        packet.tcp.mss = 536
        layer = (IP if packet.ip.version == 4 else IPv6)(packet.data)
        assert dict(layer[TCP].options)["MSS"] == 536 == packet.tcp.mss
        assert wrong_checksums(packet.data) == []


@pytest.mark.parametrize("raw", [
    b"\x02\x00\x05\xb4", b"\x02\x01\x05\xb4", b"\x02\xff\x05\xb4", b"\x01\x01\x01\x02", b"\x00\x02\x04\x05",
])  # fmt: skip
def test_options_that_cannot_be_end_the_list(raw: bytes) -> None:
    data = bytearray(SAMPLES["ipv4-tcp-odd-mss"])
    data[40:48] = b"\x08\x04\xaa\xbb" + raw
    packet = Packet(bytes(data))
    options = [o for o in packet.tcp.options if o.kind != 1]
    assert options == [Option(8, b"\xaa\xbb")]


def test_addresses_and_the_five_tuple() -> None:
    packet = Packet(SAMPLES["ipv4-udp"])
    assert packet.ip.source == IPv4Address("10.0.0.1")
    packet.ip.source = "192.0.2.1"
    packet.ip.destination = IPv4Address("192.0.2.2")
    assert packet.five_tuple == FiveTuple(
        IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2"), 17, 53, 1000
    )
    assert "17" in repr(packet) and "192.0.2.1 port 53" in repr(packet)
    packet = Packet(SAMPLES["ipv6-icmpv6"])
    assert packet.five_tuple[3:] == (None, None) and packet.icmp is None
    assert packet.icmpv6.identifier == 7
    packet.icmpv6.rest = b"\0\1\0\2"
    assert (packet.icmpv6.identifier, packet.icmpv6.sequence) == (1, 2)
    assert wrong_checksums(packet.data) == []
    assert "cut short" in repr(Packet(b"\x45"))


def test_an_address_covered_by_dccp_is_mended() -> None:
    """RFC 4340 section 9.1: its checksum is over the pseudo-header, too."""
    body = bytearray(struct.pack("!HHBBHBBH", 1, 2, 4, 0, 0, 4, 0, 0) + bytes(4))
    ends = ip_address(V4["src"]).packed + ip_address(V4["dst"]).packed
    pseudo = ends + struct.pack("!II", len(body), 33)
    body[6:8] = kernel.internet_checksum(pseudo + body).to_bytes(2)
    packet = Packet(bytes(IP(**V4, proto=33) / Raw(bytes(body))))
    packet.ip.source = "203.0.113.200"
    pseudo = packet.ip.source.packed + pseudo[4:]
    assert kernel.internet_checksum(pseudo + packet.payload) == 0


# But for source routes: they have another pseudo-header.
kinds = st.integers(2, 255).filter(lambda kind: kind not in (131, 137))


@given(st.lists(st.tuples(kinds, st.binary(max_size=6)), max_size=4))
def test_options_are_read_as_written(some: list[tuple[int, bytes]]) -> None:
    options = [Option(1), *(Option(*one) for one in some)]
    packet = Packet(SAMPLES["ipv4-tcp"])
    packet.ip.options = packet.tcp.options = options
    assert packet.ip.options == packet.tcp.options == tuple(options)
    assert packet.payload == b"hello" and packet.length == len(packet.data)
    head, segment = packet.data[: packet.ip.header_length], packet.data[packet.ip.header_length :]
    assert ones_complement(head) == 0
    assert ones_complement(head[12:20] + struct.pack("!II", len(segment), 6) + segment) == 0
    padded = HopByHop.of(options).options
    assert padded[: len(options)] == tuple(options) and {
        o.kind for o in padded[len(options) :]
    } <= {0, 1}


def test_a_home_address_is_what_checksums_cover() -> None:
    """RFC 6275 section 6.3: the sender's home address stands for the source."""
    udp = UDP(sport=1, dport=2) / Raw(b"from afar")
    home, care_of = IPv6(src="fd00::77", dst="fd00::2"), IPv6(src="fd00::1", dst="fd00::2")
    packet = Packet(bytes(care_of / udp.copy()))
    wanted = IPv6(bytes(home / udp.copy()))[UDP].chksum
    packet.extensions = [DestinationOptions.of([Option(201, IPv6Address("fd00::77").packed)])]
    assert packet.udp.checksum == wanted != IPv6(bytes(care_of / udp.copy()))[UDP].chksum
    packet.ip.source = "fd00::abcd"
    assert packet.udp.checksum == wanted
    packet.payload = b"anew"
    anew = UDP(sport=1, dport=2) / Raw(b"anew")
    assert packet.udp.checksum == IPv6(bytes(home / anew))[UDP].chksum


def test_a_later_fragment_of_a_header_keeps_its_fragment_header() -> None:
    """Without it nobody would know what the bytes are."""
    data = bytes(IPv6(**V6, nh=44) / Raw(bytes((60, 0, 0x05, 0xC8, 0, 0, 0, 1)) + b"\x3c\xc8" * 8))
    packet = Packet(data)
    (fragment,) = packet.extensions
    with pytest.raises(MalformedError):
        packet.extensions = ()
    assert packet.data == data and not packet.altered and packet.is_later_fragment
    packet.extensions = (HopByHop.of(()), fragment)
    assert packet.is_later_fragment and packet.payload == data[48:]


@pytest.mark.parametrize(("pointer", "final"), [(4, "8.8.8.8"), (8, "8.8.8.8"), (12, "10.0.0.2")])
def test_a_source_route_has_a_final_destination(pointer: int, final: str) -> None:
    """RFC 791 section 3.1: at its end, it is the destination itself."""
    route = Option(131, bytes((pointer,)) + bytes((9, 9, 9, 9, 8, 8, 8, 8)))
    packet = Packet(SAMPLES["ipv4-udp"])
    packet.ip.options = [route]
    packet.payload = b"over there"
    ends = packet.ip.source.packed + ip_address(final).packed
    segment = packet.data[packet.ip.header_length :]
    assert ones_complement(ends + struct.pack("!II", len(segment), 17) + segment) == 0
    checksum = packet.udp.checksum
    packet.ip.destination = "10.9.9.9"
    assert (packet.udp.checksum == checksum) == (pointer != 12)


def test_what_moves_headers_is_followed() -> None:
    packet = Packet(SAMPLES["ipv4-udp"])
    assert packet.udp is not None and not packet.is_fragment
    packet.ip.more_fragments = True
    assert packet.is_fragment and packet.udp is not None
    packet.ip.fragment_offset = 3
    assert packet.is_later_fragment and packet.udp is None
    packet.ip.fragment_offset, packet.ip.more_fragments = 0, False
    assert packet.data == SAMPLES["ipv4-udp"]
    packet.ip.protocol = 253
    assert packet.udp is None and packet.five_tuple[2:] == (253, None, None)


def test_a_udp_payload_ends_where_its_length_says() -> None:
    data = bytearray(SAMPLES["ipv4-udp"])
    for said, wanted in (
        (12, b"ques"),
        (8, b""),
        (7, b"question"),
        (17, b"question"),
        (0, b"question"),
    ):
        data[24:26] = said.to_bytes(2)
        assert Packet(bytes(data)).payload == wanted
    packet = Packet(bytes(data))
    packet.payload = b"answer"
    assert packet.udp.length == 14 and wrong_checksums(packet.data) == []


def test_icmp_of_the_other_family_is_none() -> None:
    packet = Packet(bytes(IPv6(**V6, nh=1) / Raw(bytes(ICMP()))))
    assert (packet.icmp, packet.icmpv6, packet.ip.protocol) == (None, None, 1)
    packet = Packet(bytes(IP(**V4, proto=58) / Raw(bytes(8))))
    assert (packet.icmp, packet.icmpv6, packet.payload) == (None, None, bytes(8))
