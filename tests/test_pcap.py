"""Captures: built by hand and by scapy, read, damaged, written, and read by others."""

import gzip
import os
import shutil
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, CookedLinux, CookedLinuxV2, Dot1AD, Dot1Q, Ether, Loopback
from scapy.packet import Packet as Layer
from scapy.packet import Raw
from scapy.utils import PcapNgWriter, PcapWriter, RawPcapReader, wrpcap

from runtime.pcap import LINK_TYPES, LONGEST, Capture, CapturedPacket, CaptureError, CaptureWriter

IPV4 = bytes(IP(src="10.0.0.1", dst="10.0.0.2") / UDP(sport=1, dport=2) / Raw(b"four"))
IPV6 = bytes(IPv6(src="fd00::1", dst="fd00::2") / UDP(sport=1, dport=2) / Raw(b"six"))
MACS = bytes(range(12))
ETHERNET = MACS + b"\x08\x00"
NOW = 1_700_000_000
NS = 10**9
DROP = b"drop"
ORDERS = ("<", ">")
MICRO, NANO = 0xA1B2C3D4, 0xA1B23C4D


def pcap(
    *records: tuple[int, int, bytes, int], order: str = "<", magic: int = MICRO, link: int = 1
) -> bytes:
    """A classic capture; records are seconds, fraction, bytes, and length on the wire."""
    data = struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, 65535, link)
    for seconds, fraction, frame, length in records:
        data += struct.pack(order + "IIII", seconds, fraction, len(frame), length) + frame
    return data


def block(order: str, kind: int, body: bytes) -> bytes:
    body += bytes(-len(body) % 4)
    size = struct.pack(order + "I", len(body) + 12)
    return struct.pack(order + "I", kind) + size + body + size


def section(order: str, version: int = 1) -> bytes:
    return block(order, 0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, version, 0, -1))


def interface(order: str, link: int = 1, snapshot: int = 0, options: bytes = b"") -> bytes:
    return block(order, 1, struct.pack(order + "HHI", link, 0, snapshot) + options)


def option(order: str, code: int, value: bytes) -> bytes:
    return struct.pack(order + "HH", code, len(value)) + value + bytes(-len(value) % 4)


def enhanced(order: str, number: int, ticks: int, frame: bytes, length: int | None = None) -> bytes:
    numbers = (number, ticks >> 32, ticks & 0xFFFFFFFF, len(frame), length or len(frame))
    body = struct.pack(order + "5I", *numbers) + frame + bytes(-len(frame) % 4)
    return block(order, 6, body + option(order, 1, b"a comment") + option(order, 0, b""))


def obsolete(order: str, number: int, ticks: int, frame: bytes) -> bytes:
    numbers = (number, 7, ticks >> 32, ticks & 0xFFFFFFFF, len(frame), len(frame))
    return block(order, 2, struct.pack(order + "HH4I", *numbers) + frame)


def simple(order: str, frame: bytes, length: int | None = None) -> bytes:
    return block(order, 3, struct.pack(order + "I", length or len(frame)) + frame)


SMALL = pcap((NOW, 5, ETHERNET + IPV4, 46), (NOW, 6, ETHERNET + IPV4, 1500))
SMALL_NG = b"".join(
    section(order)
    + interface(order, options=option(order, 9, b"\x09"))
    + enhanced(order, 0, NOW * NS + 5, ETHERNET + IPV4)
    + block(order, 0xBAD, b"custom")
    + simple(order, ETHERNET + IPV4)
    + obsolete(order, 0, NOW * NS + 6, ETHERNET + IPV4)
    for order in ORDERS
)


class Files:
    """Captures in a directory of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, data: bytes, name: str = "in.pcap") -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path

    def read(self, data: bytes) -> list[CapturedPacket]:
        with Capture(self.put(data)) as capture:
            return list(capture)

    def until(self, data: bytes) -> tuple[list[CapturedPacket], CaptureError | None]:
        """The packets before an error, and the error."""
        packets: list[CapturedPacket] = []
        try:
            with Capture(self.put(data)) as capture:
                for packet in capture:
                    packets.append(packet)
        except CaptureError as error:
            assert error.help and "in.pcap: " in error.message
            return packets, error
        return packets, None

    def written(
        self,
        data: bytes,
        change: Callable[[CapturedPacket], bytes | None] = lambda packet: packet.network,
    ) -> Path:
        """The capture written again; packets for which `change` gives DROP are left out."""
        out = self.folder / "out.pcap"
        with Capture(self.put(data)) as capture, CaptureWriter(out, capture) as writer:
            for packet in capture:
                network = change(packet)
                if network is not DROP:
                    writer.write(packet, network)
        return out


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("captures"))


def raw(path: Path) -> list[tuple[bytes, int, int, int]]:
    """What scapy reads: bytes, seconds, fraction, and length on the wire."""
    with RawPcapReader(str(path)) as reader:
        return [(data, meta.sec, meta.usec, meta.wirelen) for data, meta in reader]


# Reading


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("magic", "unit"), [(MICRO, 1000), (NANO, 1)])
def test_classic(files: Files, order: str, magic: int, unit: int) -> None:
    data = pcap((NOW, 5, ETHERNET + IPV4, 46), (NOW + 1, 999_999, ETHERNET + IPV4[:8], 46),
                order=order, magic=magic)  # fmt: skip
    whole, cut = files.read(data)
    assert tuple(whole) == (NOW * NS + 5 * unit, 1, ETHERNET, IPV4, 46)
    assert tuple(cut) == ((NOW + 1) * NS + 999_999 * unit, 1, ETHERNET, IPV4[:8], 46)
    assert [packet.cut for packet in (whole, cut)] == [False, True]


FRAMES = {
    "null": (0, b"\x02\0\0\0", IPV4),
    "null, other byte order": (0, b"\0\0\0\x1e", IPV6),
    "ethernet": (1, ETHERNET, IPV4),
    "ethernet, IPv6": (1, MACS + b"\x86\xdd", IPV6),
    "802.1Q": (1, MACS + b"\x81\0\0\x07\x08\0", IPV4),
    "802.1ad": (1, MACS + b"\x88\xa8\0\x07\x81\0\0\x08\x91\0\0\x09\x86\xdd", IPV6),
    "raw 12": (12, b"", IPV4),
    "raw 14": (14, b"", IPV6),
    "raw": (101, b"", IPV6),
    "loop": (108, b"\0\0\0\x18", IPV6),
    "cooked": (113, bytes(14) + b"\x08\0", IPV4),
    "cooked, 802.1Q": (113, bytes(14) + b"\x81\0\0\x07\x86\xdd", IPV6),
    "IPv4": (228, b"", IPV4),
    "IPv6": (229, b"", IPV6),
    "cooked 2": (276, b"\x08\0" + bytes(18), IPV4),
    "cooked 2, 802.1Q": (276, b"\x81\0" + bytes(18) + b"\0\x07\x86\xdd", IPV6),
}


@pytest.mark.parametrize(("link", "header", "network"), FRAMES.values(), ids=FRAMES)
def test_link_types(files: Files, link: int, header: bytes, network: bytes) -> None:
    records = [(NOW, 0, (header + network)[:end], 99) for end in range(len(header + network) + 1)]
    packets = files.read(pcap(*records, link=link))
    assert packets[-1] == (NOW * NS, link, header, network, 99)
    for end, packet in enumerate(packets):
        # However short: nothing is lost, and nothing of the header is taken for IP.
        assert packet.link + (packet.network or b"") == (header + network)[:end]
        assert packet.link == header[:end] and packet.cut
        assert packet.network is not None or end < max(1, len(header))


def test_all_link_types_are_tested() -> None:
    assert {link for link, _, _ in FRAMES.values()} == set(LINK_TYPES)


@pytest.mark.parametrize(("link", "frame"), [
    (1, MACS + b"\x08\x06" + bytes(28)), (1, MACS + b"\x81\0\0\x07\x08\x06"),
    (1, MACS + b"\x81\0" * 40), (1, MACS + b"\0\x26" + bytes(38)), (1, b""), (0, bytes(8)),
    (113, bytes(14) + b"\x08\x06" + bytes(28)), (276, b"\x08\x06" + bytes(40)),
])  # fmt: skip
def test_other_than_ip_is_kept_whole(files: Files, link: int, frame: bytes) -> None:
    data = pcap((NOW, 0, frame, len(frame)), link=link)
    assert files.read(data) == [(NOW * NS, link, frame, None, len(frame))]
    assert files.written(data).read_bytes()[24:] == data[24:]


def test_frame_check_sequences_may_be_announced(files: Files) -> None:
    assert len(files.read(pcap((NOW, 0, ETHERNET, 14), link=0x44000001))) == 1


@pytest.mark.parametrize("order", ORDERS)
def test_pcapng_interfaces_have_their_own_clocks(files: Files, order: str) -> None:
    binary = option(order, 9, b"\x8a")  # 2^-10 s
    late = option(order, 9, b"\x00") + option(order, 14, struct.pack(order + "q", -100))
    fine = option(order, 2, b"eth0") + option(order, 9, b"\x0c") + option(order, 0, b"")
    data = section(order) + interface(order) + interface(order, 101, options=binary)
    data += interface(order, 228, options=late) + interface(order, options=fine)
    data += interface(order, 189)  # USB: not known, but nobody hears of it
    data += enhanced(order, 0, NOW * 10**6 + 5, ETHERNET + IPV4, 1500)
    data += enhanced(order, 1, NOW * 1024 + 1, IPV6)
    data += obsolete(order, 2, NOW, IPV4)
    data += enhanced(order, 3, 60 * 10**12 + 1999, ETHERNET + IPV4)
    assert files.read(data) == [
        (NOW * NS + 5000, 1, ETHERNET, IPV4, 1500),
        (NOW * NS + NS // 1024, 101, b"", IPV6, len(IPV6)),
        ((NOW - 100) * NS, 228, b"", IPV4, len(IPV4)),
        (60 * NS + 1, 1, ETHERNET, IPV4, 46),
    ]


@pytest.mark.parametrize("order", ORDERS)
def test_simple_packets_take_the_time_before(files: Files, order: str) -> None:
    data = section(order) + interface(order, snapshot=20) + simple(order, ETHERNET + IPV4[:6], 46)
    data += enhanced(order, 0, 5, ETHERNET) + simple(order, ETHERNET)
    assert [(p.time, p.network, p.length) for p in files.read(data)] == [
        (0, IPV4[:6], 46), (5000, b"", 14), (5000, b"", 14),
    ]  # fmt: skip


def test_sections_may_differ_in_byte_order(files: Files) -> None:
    times = [5, 5, 6, 5, 5, 6]
    assert [p.time - NOW * NS for p in files.read(SMALL_NG)] == times
    # Interfaces are those of the section.
    _, error = files.until(SMALL_NG + section("<") + enhanced("<", 0, 1, ETHERNET))
    assert error and "interface 0" in error.message


def test_link_type_and_resolution(files: Files) -> None:
    for data, link, nanoseconds in (
        (pcap(link=113), 113, False), (pcap(magic=NANO), 1, True),
        (section("<") + interface("<", 276), None, True),
    ):  # fmt: skip
        with Capture(files.put(data)) as capture:
            assert (capture.link_type, capture.nanoseconds) == (link, nanoseconds)
            assert not list(capture) and capture.link_type == (link or 276)
            assert (capture.position, capture.size) == (len(data), len(data))


def test_gzipped(files: Files) -> None:
    assert files.read(gzip.compress(SMALL)) == files.read(SMALL)
    frame = ETHERNET + os.urandom(1400)
    data = gzip.compress(pcap(*[(NOW, 0, frame, 1414)] * 500), 0)
    for end in (*range(30), len(data) // 2, len(data) - 9, len(data) - 1):
        packets, error = files.until(data[:end])
        assert error and len(packets) >= (end - 20_000) // 1430
    broken = bytearray(data)
    broken[len(data) - 6] ^= 1
    packets, error = files.until(bytes(broken))
    assert error and len(packets) == 500


@pytest.mark.parametrize(
    "data", [SMALL, SMALL_NG, gzip.compress(SMALL)], ids=["pcap", "pcapng", "gzip"]
)
def test_from_a_slow_pipe(files: Files, data: bytes) -> None:
    fifo = files.folder / "fifo"
    os.mkfifo(fifo)

    def feed() -> None:
        with fifo.open("wb", buffering=0) as pipe:
            for start in range(0, len(data), 7):
                pipe.write(data[start : start + 7])

    feeder = threading.Thread(target=feed)
    feeder.start()
    with Capture(fifo) as capture:
        packets = list(capture)
        assert capture.size is None and capture.position > 24
    feeder.join()
    assert packets == files.read(data)


COPY = """
import sys
from runtime.pcap import Capture, CaptureWriter
with Capture("-") as capture, CaptureWriter(sys.argv[1], capture) as writer:
    for packet in capture:
        writer.write(packet)
"""


@pytest.mark.parametrize("target", ["-", "/dev/stdout"])
def test_standard_input_and_output(target: str) -> None:
    command = [sys.executable, "-c", COPY, target]
    done = subprocess.run(command, input=SMALL, capture_output=True, check=True)
    assert done.stdout[24:] == SMALL[24:] and not done.stderr


# Damage


@pytest.mark.parametrize("data", [SMALL, SMALL_NG], ids=["pcap", "pcapng"])
def test_cut_at_every_byte(files: Files, data: bytes) -> None:
    packets, error = files.until(data)
    assert error is None
    found = [files.until(data[:end]) for end in range(len(data))]
    for end, (before, error) in enumerate(found):
        assert before == packets[: len(before)]
        boundary = error is None
        if boundary:  # only between records
            assert end >= 24 and (end == 24 or len(before) > 0 or data is SMALL_NG)
    counts = [len(before) for before, _ in found]
    assert all(0 <= b - a <= 1 for a, b in pairwise(counts))
    assert sum(error is None for _, error in found) == (2 if data is SMALL else 11)


BAD = {
    "empty": (b"", 0, "is empty"),
    "text": (b"hello, this is text", 0, "is no packet capture"),
    "header": (SMALL[:20], 0, "byte 0: the capture ends within its header"),
    "link type": (pcap(link=189), 0, "link type 189"),
    "length": (SMALL + struct.pack("<4I", 1, 2, LONGEST + 1, 5), 2, "byte 148: a packet of 262145"),
    "huge": (SMALL + b"\xff" * 99, 2, "byte 148: a packet of 4294967295"),
    "end": (SMALL[:-1], 1, "byte 86: the capture ends in the middle"),
    "pcapng link type": (
        section("<") + interface("<", 189) + enhanced("<", 0, 1, IPV4), 0, "byte 48: packets of",
    ),
    "block size": (section("<") + struct.pack("<II", 5, 13), 0, "byte 28: a block of 13 bytes"),
    "huge block": (section(">") + b"\xff" * 8, 0, "byte 28: a block of 4294967295 bytes"),
    "order": (section("<").replace(b"\x4d", b"\x00"), 0, "without a byte order"),
    "version": (section("<", 2), 0, "another pcapng"),
    "two lengths": (section("<") + interface("<")[:-4] + bytes(4), 0, "two lengths"),
    "short": (section("<") + block("<", 6, b"four"), 0, "too short"),
    "no interface": (section("<") + simple("<", IPV4), 0, "interface 0"),
    "longer than its block": (
        section("<") + interface("<") + simple("<", IPV4, 99), 0, "longer than its block",
    ),
    "too long in pcapng": (
        section("<") + interface("<") + simple("<", bytes(LONGEST + 1)), 0, "a packet of 262145",
    ),
    "option": (
        section("<") + interface("<", options=b"\x09\0\xff\0"), 0, "an option is longer",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("data", "count", "message"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_said(files: Files, data: bytes, count: int, message: str) -> None:
    packets, error = files.until(data)
    assert len(packets) == count
    assert error and message in error.message


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(CaptureError, match=r"cannot be read: (Is a|No such)"):
            Capture(path)


FRAMED = st.one_of(
    st.binary(max_size=80), st.sampled_from([header + ip for _, header, ip in FRAMES.values()])
)
CHANGES = st.lists(
    st.tuples(st.integers(0, 2**16), st.sampled_from("=+-"), st.integers(0, 255)), max_size=8
)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(ORDERS), st.sampled_from([*LINK_TYPES, 189]), st.lists(FRAMED, max_size=3),
    st.booleans(), CHANGES, st.booleans(),
)  # fmt: skip
def test_damaged_captures(
    shared: Files, order: str, link: int, frames: list[bytes], new: bool,
    changes: list[tuple[int, str, int]], gzipped: bool,
) -> None:  # fmt: skip
    """Whatever is in a file: packets, then perhaps the module's own error; and they write."""
    if new:
        data = section(order) + interface(order, link, options=option(order, 9, b"\x06"))
        for frame in frames:
            data += enhanced(order, 0, NOW, frame) + simple(order, frame)
            data += obsolete(order, 0, NOW, frame)
    else:
        data = pcap(*((NOW, 0, frame, len(frame)) for frame in frames), order=order, link=link)
    data = gzip.compress(data) if gzipped else data
    damaged = bytearray(data)
    for at, what, byte in changes:
        at %= len(damaged)
        damaged[at : at + (what != "+")] = b"" if what == "-" else bytes((byte,))
    packets, error = shared.until(bytes(damaged))
    assert changes or link == 189 or error is None
    for packet in packets:
        assert len(packet.link) + len(packet.network or b"") <= LONGEST
    try:
        shared.written(bytes(damaged))
    except CaptureError as failure:
        assert failure.help


# Writing


def lower_ttl(packet: CapturedPacket) -> bytes | None:
    """Another IP packet of the same length; IPv6 is dropped."""
    if packet.network is None:
        return None
    if packet.network[0] >> 4 == 6:
        return DROP
    return packet.network[:8] + b"\x07" + packet.network[9:]


@pytest.mark.parametrize("link", LINK_TYPES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("magic", [MICRO, NANO])
def test_round_trip(files: Files, link: int, order: str, magic: int) -> None:
    records = [
        (NOW + n, 999_000 + n, header + ip, len(header + ip) + n)
        for n, (kind, header, ip) in enumerate(FRAMES.values())
        if kind == link
    ]
    data = pcap(*records, (2**32 - 1, 0, b"?", 1), order=order, magic=magic, link=link)
    out = files.written(data)
    assert out.read_bytes()[:4] == struct.pack("<I", magic)
    assert files.read(out.read_bytes()) == files.read(data)
    assert raw(out) == [(frame, s, f, length) for s, f, frame, length in records] + [
        (b"?", 2**32 - 1, 0, 1)
    ]


def test_pcapng_becomes_pcap_to_the_nanosecond(files: Files) -> None:
    data = section(">") + interface(">") + enhanced(">", 0, NOW * 10**6 + 5, ETHERNET + IPV4, 1500)
    data += interface(">", options=option(">", 9, b"\x09")) + enhanced(
        ">", 1, NOW * NS + 7, ETHERNET
    )
    out = files.written(data)
    assert raw(out) == [(ETHERNET + IPV4, NOW, 5000, 1500), (ETHERNET, NOW, 7, 14)]


def test_rewritten_and_dropped(files: Files) -> None:
    padded = ETHERNET + IPV4 + b"padding"
    arp = MACS + b"\x08\x06" + bytes(28)
    data = pcap((NOW, 1, padded, 53), (NOW, 2, MACS + b"\x86\xdd" + IPV6, 99), (NOW, 3, arp, 42))
    changed = IPV4[:8] + b"\x07" + IPV4[9:]
    out = files.written(data, lower_ttl)
    assert [record[0] for record in raw(out)] == [ETHERNET + changed + b"padding", arp]
    # An IP packet without the padding, and one that grew.
    out = files.written(data, lambda packet: packet.network and IPV4)
    assert raw(out)[0][0] == padded
    out = files.written(data, lambda packet: packet.network and packet.network + b"longer")
    assert [(len(frame), length) for frame, _, _, length in raw(out)] == [
        (59, 59), (14 + len(IPV6) + 6, 105), (42, 42),
    ]  # fmt: skip
    with Capture(files.put(data)) as capture, CaptureWriter(out, capture) as writer:
        writer.write(next(iter(capture)), bytearray(changed))
    assert raw(out)[0][0] == ETHERNET + changed + b"padding"


@pytest.mark.parametrize(
    ("data", "link"),
    [(pcap(link=113), 113), (section("<"), 1), (section("<") + interface("<", 0), 0)],
)
def test_without_packets_it_is_still_a_capture(files: Files, data: bytes, link: int) -> None:
    out = files.written(data)
    with Capture(out) as capture:
        assert capture.link_type == link and not list(capture)


def test_one_link_type_to_write(files: Files) -> None:
    data = section("<") + interface("<") + interface("<", 101)
    data += enhanced("<", 0, 1, ETHERNET) + enhanced("<", 1, 2, IPV4)
    with pytest.raises(CaptureError, match="link types 1 and 101"):
        files.written(data)
    assert [path.name for path in files.folder.iterdir()] == ["in.pcap"]


@pytest.mark.parametrize("ticks", [2**32 * 10**6, -1])
def test_times_that_pcap_cannot_hold(files: Files, ticks: int) -> None:
    zero = option("<", 14, struct.pack("<q", -1 if ticks < 0 else 0))
    data = section("<") + interface("<", options=zero) + enhanced("<", 0, max(0, ticks), ETHERNET)
    assert files.read(data)[0].time == ticks * (NS if ticks < 0 else 1000)
    with pytest.raises(CaptureError, match="cannot hold a time"):
        files.written(data)


def test_a_failure_leaves_what_was_there(files: Files) -> None:
    out = files.put(b"old", "out.pcap")
    with (
        pytest.raises(CaptureError, match="in the middle"),
        Capture(files.put(SMALL[:-1])) as capture,
        CaptureWriter(out, capture) as writer,
    ):
        for packet in capture:
            writer.write(packet)
    assert out.read_bytes() == b"old"
    assert {path.name for path in files.folder.iterdir()} == {"in.pcap", "out.pcap"}


def test_a_capture_may_replace_itself_behind_a_link(files: Files) -> None:
    path = files.put(SMALL)
    path.chmod(0o600)
    link = files.folder / "link"
    link.symlink_to(path)
    with Capture(path) as capture, CaptureWriter(link, capture) as writer:
        writer.write(next(iter(capture)))
    assert link.is_symlink() and path.read_bytes()[24:] == SMALL[24:86]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("target", "why"), [("none/out", "No such"), (".", "Is a"), ("/dev/full", "No space")]
)
def test_targets_that_cannot_be_written(files: Files, target: str, why: str) -> None:
    with (
        pytest.raises(CaptureError, match=f"cannot be written: {why}"),
        Capture(files.put(SMALL)) as capture,
        CaptureWriter(files.folder / target, capture) as writer,
    ):
        writer.write(next(iter(capture)))


# Others' captures, and others as readers


@pytest.mark.parametrize("layers", [
    [Ether() / IP() / UDP(), Ether() / Dot1Q(vlan=7) / IPv6() / UDP(), Ether() / ARP()],
    [Ether() / Dot1AD(vlan=5) / Dot1Q(vlan=7) / IP() / UDP()],
    [CookedLinux() / IP() / UDP(), CookedLinux(proto=0x86DD) / IPv6() / UDP()],
    [CookedLinuxV2(proto=0x0800) / IP() / UDP()],
    [Loopback(type=2) / IP() / UDP()], [IP() / UDP()], [IPv6() / UDP()],
])  # fmt: skip
@pytest.mark.parametrize("form", ["<", ">", "nano", "gzip", "ng"])
def test_captures_by_scapy(files: Files, layers: list[Layer], form: str) -> None:
    path = files.folder / "scapy"
    for layer in layers:
        layer.time = NOW + 0.25
    if form == "ng":
        with PcapNgWriter(str(path)) as writer:
            writer.write(layers)
    elif form == "gzip":
        wrpcap(str(path), layers, gz=True)
    else:
        with PcapWriter(str(path), endianness="<" if form == "nano" else form,
                        nano=form == "nano") as writer:  # fmt: skip
            writer.write(layers)
    packets = files.read(path.read_bytes())
    for packet, layer in zip(packets, layers, strict=True):
        ip = layer.getlayer(IP) or layer.getlayer(IPv6)
        assert packet.network == (bytes(ip) if ip else None)
        assert packet.link == bytes(layer)[: -len(ip) if ip else None]
        assert packet.time == NOW * NS + NS // 4
    out = files.written(path.read_bytes())
    assert [frame for frame, *_ in raw(out)] == [bytes(layer) for layer in layers]


def test_tcpdump_reads_the_same(files: Files) -> None:
    tcpdump = shutil.which("tcpdump")
    if tcpdump is None:
        pytest.skip("no tcpdump")
    captures = [
        pcap((NOW, 5, header + ip, 99), magic=magic, order=order, link=link)
        for link, header, ip in FRAMES.values()
        if link != 14  # libpcap knows it on OpenBSD only
        for magic in (MICRO, NANO)
        for order in ORDERS
    ]
    for order in ORDERS:
        head = section(order) + interface(order, options=option(order, 9, b"\x09"))
        captures.append(head + enhanced(order, 0, NOW * NS + 5, ETHERNET + IPV4, 99))
    command = [tcpdump, "-nexxtt", "--nano", "-r", "-"]
    for data in captures:
        before, after = (
            subprocess.run(command, input=text, capture_output=True, check=True).stdout
            for text in (data, files.written(data).read_bytes())
        )
        assert before and before == after
