"""What docs/libitm.md shows runs, before a real kernel; so do the paper's figures."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import libitm
from runtime import nft
from runtime.lab import Capture
from runtime.status import status
from runtime.traffic import Namespace, add_address, add_route, set_sysctl, veth
from tests.kernel.test_libitm import tables
from tests.support.commands import PATIENCE, ROOT, until

PAGE = (ROOT / "docs" / "libitm.md").read_text()
EXAMPLES = ROOT / "docs" / "examples"


@contextmanager
def example(name: str, *arguments: str, policies: int) -> Iterator[subprocess.Popen[bytes]]:
    """An example as a process of its own, with all its policies loaded and served."""
    started = subprocess.Popen(
        [sys.executable, str(EXAMPLES / name), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        until(lambda: started.poll() is not None or _serving() == policies)
        assert started.poll() is None, started.stderr and started.stderr.read()
        yield started
        started.terminate()
        assert started.communicate(timeout=30)[1] == b""
        assert (started.returncode, tables()) == (0, [])
    finally:
        started.kill()
        started.wait()


def _serving() -> int:
    return sum(one.python is not None and one.python.workers for one in status())


def test_the_blocks_run(host: Namespace, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    assert "0 packets so far\n" in capsys.readouterr().out
    assert status() == ()


def rows() -> list[tuple[str, str]]:
    """The table of itmBench's functions: their names, and the line that does it here."""
    section = PAGE.partition("## What became of")[2].partition("\n## ")[0]
    found = re.findall(r"^\| (.*?) \| .*? \| `(.*)` \|$", section, re.MULTILINE)
    return [(first, line) for first, line in found]


def test_every_function_of_the_paper_has_its_line(host: Namespace) -> None:
    named = set(re.findall(r"(?:lib)?itm_[a-z_]+", " ".join(first for first, _ in rows())))
    assert named == {
        "itm_info", "itm_register_hook", "itm_register_timer", "itm_unregister_hook",
        "itm_unregister_timer", "libitm_init", "libitm_register", "libitm_unregister",
        "libitm_register_timer", "libitm_run", "libitm_stop", "libitm_packet_altered",
        "libitm_init_interest", "libitm_set_protocols", "libitm_set_saddr", "libitm_set_daddr",
        "libitm_set_src_ports", "libitm_set_dst_ports", "libitm_set_indev", "libitm_set_outdev",
    }  # fmt: skip
    names: dict[str, object] = {"libitm": libitm}
    seen: list[str] = []
    for _, line in rows():
        if line == "app.run()":
            app = names["app"]
            assert isinstance(app, libitm.App)
            app.register_timer(
                lambda app=app: seen.extend(one.name for one in app.registrations if one.active),
                seconds=0.1,
            )
        exec(line, names)
    assert sorted(set(seen)) == ["mapped_input", "mapped_output", "mapped_postrouting"]
    assert tables() == []


def test_every_interest_of_the_table_is_one() -> None:
    for _, line in rows():
        if line.startswith("libitm.Interest("):
            interest = eval(line, {"libitm": libitm})
            for hook in ("prerouting", "output"):
                try:
                    libitm.App("a").register(hook, libitm.Info(interest=interest))
                    break
                except libitm.UsageError:
                    continue
            else:
                raise AssertionError(line)


def test_the_fields_are_those_of_the_packet() -> None:
    """Each that the page lists is there; each that is there is listed."""
    from itmlang import headers

    kinds = {
        "`packet.ip`": (headers.IPv4Header, headers.IPv6Header),
        "IPv4": (headers.IPv4Header,),
        "IPv6": (headers.IPv6Header,),
        "`packet.tcp`": (headers.TCPHeader,),
        "`packet.udp`": (headers.UDPHeader,),
        "`packet.icmp`": (headers.ICMPHeader, headers.ICMPv6Header),
        "`packet`": (headers.Packet,),
    }
    listed: dict[type, set[str]] = {}
    for line in PAGE.partition("## The packet")[2].splitlines():
        first, _, rest = line.removeprefix("| ").partition(" | ")
        kind = kinds.get(first.partition(",")[0])
        if kind and line.startswith("|"):
            for one in kind:
                listed.setdefault(one, set()).update(re.findall(r"`(\w+)`", rest))
    for kind, names in listed.items():
        there = {name for name in dir(kind) if not name.startswith("_")}
        others = {"of", "tcp", "udp", "icmp", "icmpv6", "ip", "extensions", "is_later_fragment"}
        if issubclass(
            kind, headers.TCPHeader | headers.UDPHeader | headers.ICMPHeader | headers.ICMPv6Header
        ):
            others |= {"protocol", "header_length"}
        assert names <= there, kind
        assert there - names <= others, (kind, there - names)


# The paper's figures.


def test_figures_8_to_11(host: Namespace) -> None:
    """One TCP connection: its packets are not known, then short, then long; its end is short."""
    threshold = 3
    with example("qos_ctrl.py", str(threshold), policies=1), Capture(host, "lo") as capture:
        with socket.create_server(("127.0.0.1", 8000)) as server:
            client = socket.create_connection(("127.0.0.1", 8000))
            accepted, _ = server.accept()
            for sent in range(1, 9):
                client.sendall(b"x")
                accepted.recv(1)
                until(lambda sent=sent: len(_of(capture, 8000, b"x")) >= sent)
            client.close()
            accepted.close()
            until(lambda: any(packet.tcp.fin for packet in _of(capture, 8000)))
        packets = _of(capture, 8000)
    tos = [packet.ip.tos & 0x10 for packet in packets]
    ended = next(n for n, packet in enumerate(packets) if packet.tcp.fin)
    # Figures 9 and 10: the first is not known, and packet k is the first to be counted k - 2.
    short = threshold + 2
    assert tos[:ended] == [0] + [0x10] * (short - 1) + [0] * (ended - short)
    assert ended > short and tos[ended] == 0x10


def _of(capture: Capture, port: int, payload: bytes | None = None) -> list[libitm.Packet]:
    """The captured packets of TCP to a port, each once (the loopback shows them twice)."""
    found, seen = [], set()
    for one in list(capture.packets):
        packet = libitm.Packet(one.data)
        tcp = packet.tcp
        if tcp is None or tcp.destination_port != port or one.data in seen:
            continue
        seen.add(one.data)
        if payload is None or packet.payload == payload:
            found.append(packet)
    return found


def test_figure_13(host: Namespace) -> None:
    """A connection to port 5000 is one to port 5555, with another TOS, and works."""
    nft.load(
        "table inet seen { counter marked { }\n"
        "chain late { type filter hook input priority 300;\n"
        'tcp dport 5555 @nh,8,8 0x55 counter name "marked"\n}\n}\n'
    )
    with example("rewrite.py", policies=2), socket.create_server(("127.0.0.1", 5555)) as server:
        client = socket.create_connection(("127.0.0.1", 5000), timeout=5 * PATIENCE)
        accepted, _ = server.accept()
        client.sendall(b"there")
        assert accepted.recv(100) == b"there"
        accepted.sendall(b"back" * 1000)
        found = b""
        while len(found) < 4000:
            found += client.recv(5000)
        assert found == b"back" * 1000
        client.close()
        accepted.close()
    assert nft.counters("inet seen")["marked"][0] >= 3


def test_figure_14(host: Namespace) -> None:
    """Through a neighbour in a tunnel: on the wire between the two it is protocol 4."""
    neighbour, far = Namespace.create("neighbour"), Namespace.create("far")
    veth(host, "eth0", neighbour, "eth0")
    veth(neighbour, "eth1", far, "eth0")
    for place, link, address in (
        (host, "eth0", "10.0.0.1/24"), (neighbour, "eth0", "10.0.0.2/24"),
        (neighbour, "eth1", "10.0.1.2/24"), (far, "eth0", "10.0.1.3/24"),
    ):  # fmt: skip
        add_address(place, link, address)
    add_route(host, "default", via="10.0.0.2")
    add_route(far, "default", via="10.0.1.2")
    set_sysctl(neighbour, "net/ipv4/ip_forward", "1")
    with far.entered():
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        receiver.bind(("10.0.1.3", 9000))
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with example("itm_route.py", "10.0.0.1", "10.0.1.3=10.0.0.2", policies=2):
        receiver.settimeout(0.3)
        sender.sendto(b"nobody takes it out", ("10.0.1.3", 9000))
        with pytest.raises(TimeoutError):
            receiver.recv(100)
        receiver.settimeout(5 * PATIENCE)
        with (
            neighbour.entered(),
            example("itm_route.py", "10.0.0.2", policies=1),
            Capture(neighbour, "eth0") as near,
            Capture(far, "eth0") as beyond,
        ):
            sender.sendto(b"hello", ("10.0.1.3", 9000))
            assert receiver.recv(100) == b"hello"
            until(lambda: near.packets and beyond.packets)
            outer, inner = (libitm.Packet(one.packets[0].data) for one in (near, beyond))
    assert [str(outer.ip.source), str(outer.ip.destination)] == ["10.0.0.1", "10.0.0.2"]
    assert (outer.ip.protocol, outer.length - inner.length) == (4, 20)
    assert [str(inner.ip.source), str(inner.ip.destination)] == ["10.0.0.1", "10.0.1.3"]
    assert inner.payload == b"hello"
    neighbour.close()
    far.close()
