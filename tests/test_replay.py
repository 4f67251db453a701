"""`itmc replay`: a capture through the policies, and what is written of it."""

import json
import struct
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, CookedLinux, Dot1Q, Ether
from scapy.packet import Packet as Layer
from scapy.utils import PcapNgWriter, PcapWriter, rdpcap, wrpcap

from tests.support.frames import wrong_checksums
from tests.test_cli import SIZE_AWARE, itmc

POLICY = """policy p {
    at forward
    flow f by saddr max 2
    classify {
        web when dport == 80
        gone when dport == 81
        other when dport == 82
        many when f.packets > 1000
    }
    log { count f }
    process { web { set dscp ef set ttl 7 set sport 9 } gone { drop } other { reject } }
}
"""


def ip(port: int, source: str = "10.0.0.1") -> Layer:
    if ":" in source:
        return IPv6(src=source, dst="fd00::9") / UDP(sport=5, dport=port) / b"abc"
    return IP(src=source, dst="10.0.0.9") / UDP(sport=5, dport=port) / b"abc"


@pytest.fixture
def policy(tmp_path: Path) -> str:
    (tmp_path / "p.itm").write_text(POLICY)
    return str(tmp_path / "p.itm")


def replay(policy: str, capture: Path, *options: str) -> dict[str, object]:
    done = itmc("replay", policy, str(capture), "--json", *options)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_classes_flows_and_verdicts(tmp_path: Path, policy: str) -> None:
    capture = tmp_path / "in.pcap"
    frames = [Ether() / ip(80), Ether() / ip(80), Ether() / ip(81), Ether() / ip(82, "fd00::1"),
              Ether() / ip(99, "10.0.0.2"), Ether() / ip(99, "10.0.0.3"), Ether() / ARP()]  # fmt: skip
    wrpcap(str(capture), frames)
    found = replay(policy, capture)
    assert (found["packets"], found["not_ip"], found["malformed"]) == (7, 1, 0)
    assert (found["accepted"], found["dropped"], found["rejected"]) == (4, 1, 1)
    (one,) = found["policies"]  # type: ignore[misc]
    assert [(c["name"], c["packets"], c["bytes"]) for c in one["classes"]] == [
        ("web", 2, 62), ("gone", 1, 31), ("other", 1, 51), ("many", 0, 0),
    ]  # fmt: skip
    (flow,) = one["flows"]
    assert (flow["entries"], flow["uncounted"]) == (3, 1)
    assert flow["top"][0] == {"key": ["10.0.0.1"], "packets": 3, "bytes": 93}


def test_the_table(tmp_path: Path, policy: str) -> None:
    capture = tmp_path / "in.pcap"
    wrpcap(str(capture), [Ether() / ip(80), Ether() / ip(81)])
    done = itmc("replay", policy, str(capture))
    assert done.returncode == 0
    assert done.stdout.startswith("2 packets, 90 bytes, ")
    assert "1 accepted, 1 dropped" in done.stdout
    assert "p at forward" in done.stdout
    assert "f: 1 flows" in done.stdout
    assert itmc("replay", policy, str(capture), "--top", "0").stdout.count("10.0.0.1") == 0


@pytest.mark.parametrize("kind", ["ethernet", "vlan", "raw", "cooked", "pcapng"])
def test_the_rewritten_capture(tmp_path: Path, policy: str, kind: str) -> None:
    before, after = tmp_path / "in.cap", tmp_path / "out.cap"
    link = {
        "ethernet": Ether(src="02:00:00:00:00:05"), "vlan": Ether() / Dot1Q(vlan=7),
        "raw": None, "cooked": CookedLinux(), "pcapng": Ether(),
    }[kind]  # fmt: skip
    several = [ip(80), ip(81), ip(99), ip(80, "fd00::1")]
    frames = [link / one if link is not None else one for one in several]
    writer = PcapNgWriter(str(before)) if kind == "pcapng" else PcapWriter(str(before))
    with writer:
        writer.write(frames)
    replay(policy, before, "-w", str(after))
    wanted = [frames[0], frames[2], frames[3]]
    written = rdpcap(str(after))
    assert len(written) == 3
    for one, other in zip(wanted, written, strict=True):
        data = bytes(other.getlayer(IPv6) or other.getlayer(IP))
        packet = IPv6(data) if data[0] >> 4 == 6 else IP(data)
        assert wrong_checksums(data) == []
        if bytes(one) != bytes(other):
            assert (packet.tc if IPv6 in packet else packet.tos) == 46 << 2
            assert (packet.hlim if IPv6 in packet else packet.ttl) == 7
            assert packet[UDP].sport == 9
    assert [bytes(one) == bytes(other) for one, other in zip(wanted, written, strict=True)] == [
        False, True, False,
    ]  # fmt: skip
    assert bytes(written[1]) == bytes(wanted[1])


def test_truncated_and_malformed_packets_are_counted_and_kept(tmp_path: Path, policy: str) -> None:
    whole = bytes(Ether() / ip(80))
    broken = [
        (whole[:20], len(whole)), (whole[:33], len(whole)), (whole[:14], 14),
        (whole[:14] + b"\x65" + whole[15:], len(whole)), (whole, len(whole)),
    ]  # fmt: skip
    capture, after = tmp_path / "in.pcap", tmp_path / "out.pcap"
    with capture.open("wb") as file:
        file.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1))
        for data, length in broken:
            file.write(struct.pack("<IIII", 1, 0, len(data), length) + data)
    found = replay(policy, capture, "-w", str(after))
    assert (found["packets"], found["cut"], found["malformed"]) == (5, 2, 2)
    assert [len(bytes(p)) for p in rdpcap(str(after))] == [len(data) for data, _ in broken]


def test_a_capture_that_breaks_off_is_told_and_counted(tmp_path: Path, policy: str) -> None:
    capture = tmp_path / "in.pcap"
    wrpcap(str(capture), [Ether() / ip(80)] * 3)
    capture.write_bytes(capture.read_bytes()[:-5])
    done = itmc("replay", policy, str(capture), "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["packets"] == 2
    assert "2 packets came before" in done.stderr


def test_what_is_no_capture_or_not_there(tmp_path: Path, policy: str) -> None:
    wrong = tmp_path / "x.pcap"
    wrong.write_bytes(b"this is no capture at all")
    assert itmc("replay", policy, str(wrong)).returncode == 2
    assert itmc("replay", policy, str(tmp_path / "none.pcap")).returncode == 2
    assert itmc("replay", policy, str(wrong), "-w", str(wrong)).returncode == 2


def test_time_is_the_captures(tmp_path: Path) -> None:
    capture = tmp_path / "in.pcap"
    frames = []
    for number, at in enumerate([0, 1, 2, 400]):  # the last one after the flow's 2 minutes
        frame = Ether() / IP(src="10.0.0.1", dst="10.0.0.2") / TCP(sport=1, dport=2, seq=number)
        frame.time = 1_700_000_000 + at
        frames.append(frame)
    wrpcap(str(capture), frames)
    found = replay(SIZE_AWARE, capture)
    (flow,) = found["policies"][0]["flows"]  # type: ignore[index]
    assert flow["top"][0]["packets"] == 1


def test_interfaces_and_path(tmp_path: Path) -> None:
    file, capture = tmp_path / "p.itm", tmp_path / "in.pcap"
    file.write_text('policy p { at input interest { in "eth7" } classify { c } }\n')
    wrpcap(str(capture), [Ether() / ip(80)])
    for options, packets in (
        (("--path", "in", "--in", "eth7"), 1),
        (("--path", "in", "--in", "eth8"), 0),
        (("--path", "forward", "--in", "eth7"), 0),
    ):
        (one,) = replay(str(file), capture, *options)["policies"]  # type: ignore[misc]
        assert one["classes"][0]["packets"] == packets
