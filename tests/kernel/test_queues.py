"""Both readers before a real kernel: UDP and TCP through a queue, and what comes of them.

Packets are sent, then served, then received, all by one thread, so each test knows what
waits in the queue and what does not.
"""

import fcntl
import hashlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from random import Random

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.packet import Packet as Layer

from runtime import nft
from runtime.errors import MachineError
from runtime.netqueue import NF_ACCEPT, NF_DROP, Answer, RawReader, Reader, Settings, _Layout
from runtime.queue import LibraryReader
from runtime.traffic import Namespace, TrafficError, add_address, add_xt_queue_rule, veth
from tests.support.kernel import SO_MARK
from tests.support.needs import unavailable

QUEUE, PORT = 7, 5000
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1
LOCAL = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
MARKS = range(8)
RULES = f"""
table inet queued {{
	chain to_python {{ }}
	chain at_hook {{
		type filter hook HOOK priority 0
		meta l4proto {{ tcp, udp }} th dport {PORT} jump to_python
	}}
}}
table inet seen {{
	{"".join(f"counter mark_{mark} {{ }}{chr(10)}" for mark in MARKS)}
	chain late {{
		type filter hook HOOK priority 100
		th dport {PORT} counter name meta mark map {{
			{", ".join(f'{mark} : "mark_{mark}"' for mark in MARKS)} }}
	}}
}}
"""
Kind = Callable[..., Reader]
BOTH = pytest.mark.parametrize("kind", [RawReader, LibraryReader], ids=["raw", "library"])


def unchanged(mark: int) -> Answer:
    return NF_ACCEPT, None, mark


def accept(payload: bytes, mark: int, *_: int) -> Answer:
    return NF_ACCEPT, None, mark


@pytest.fixture(params=["output"])
def hooked(host: Namespace, request: pytest.FixtureRequest) -> Namespace:
    """UDP and TCP to the port are queued, past a counter for each mark."""
    nft.load(RULES.replace("HOOK", request.param))
    try:
        add_xt_queue_rule(host, "queued", "to_python", QUEUE)
    except TrafficError as error:
        unavailable(error, "the xt target NFQUEUE")
    return host


def marked() -> dict[int, int]:
    """By mark, the packets that came out of the queue."""
    counters = nft.counters("inet seen")
    return {mark: counters[f"mark_{mark}"][0] for mark in MARKS if counters[f"mark_{mark}"][0]}


class Ends:
    """A UDP socket that sends and one that receives, on the loopback."""

    def __init__(self, family: int) -> None:
        self._to = LOCAL[family], PORT
        self._receiver = socket.socket(family, socket.SOCK_DGRAM)
        self._receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        self._receiver.bind(self._to)
        self._sender = socket.socket(family, socket.SOCK_DGRAM)
        self._sender.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 64 << 20)
        self._sender.setblocking(False)  # what waits in the queue still fills its buffer

    def send(self, data: bytes, mark: int = 0) -> None:
        self._sender.setsockopt(socket.SOL_SOCKET, SO_MARK, struct.pack("=I", mark))
        self._sender.sendto(data, self._to)

    def received(self) -> list[bytes]:
        """All that has arrived."""
        found = []
        try:
            while True:
                found.append(self._receiver.recv(1 << 16, socket.MSG_DONTWAIT))
        except BlockingIOError:
            return found

    def close(self) -> None:
        self._sender.close()
        self._receiver.close()


@contextmanager
def ends(family: int = socket.AF_INET) -> Iterator[Ends]:
    with closing(Ends(family)) as made:
        yield made


def drained(reader: Reader) -> int:
    """Serve until nothing waits; how many packets."""
    total = 0
    while count := reader.read():
        total += count
    return total


@BOTH
def test_verdicts_and_marks(hooked: Namespace, kind: Kind) -> None:
    verdicts = {1: (NF_ACCEPT, None, 1), 2: (NF_DROP, None, 2), 3: (NF_ACCEPT, None, 4)}
    with (
        ends() as udp,
        closing(kind(Settings(QUEUE), lambda _, mark, *rest: verdicts[mark], unchanged)) as reader,
    ):
        for mark in (1, 2, 3):
            udp.send(b"%d" % mark, mark)
        assert udp.received() == []
        assert reader.read() == 3
        assert reader.read() == 0
        assert udp.received() == [b"1", b"3"]
        assert marked() == {1: 1, 4: 1}


@BOTH
@pytest.mark.parametrize(
    ("hooked", "told"), [("output", (3, 0, 1, 0)), ("input", (1, 1, 0, 0))], indirect=["hooked"]
)
@pytest.mark.parametrize("family", LOCAL)
def test_what_is_told_of_a_packet(
    hooked: Namespace, kind: Kind, told: tuple[int, ...], family: int
) -> None:
    """Its bytes, mark, hook, interfaces; nothing of its length, as all of it is there."""
    seen = []

    def serve(payload: bytes, *rest: int) -> Answer:
        seen.append((payload, rest))
        return NF_ACCEPT, None, 0

    with ends(family) as udp, closing(kind(Settings(QUEUE), serve, unchanged)) as reader:
        for mark in (0, 5, 0, 0xFFFFFFFF):
            udp.send(b"hello", mark)
        assert drained(reader) == 4
    assert [rest for _, rest in seen] == [(mark, *told) for mark in (0, 5, 0, 0xFFFFFFFF)]
    for payload, _ in seen:
        layer = (IP if family == socket.AF_INET else IPv6)(payload)
        assert layer[UDP].dport == PORT and bytes(layer[UDP].payload) == b"hello"
        assert len(payload) == (28 if family == socket.AF_INET else 48) + 5


def rewritten(packet: bytes, data: bytes) -> bytes:
    """The packet with other data, its lengths and checksums by scapy."""
    layer: Layer = (IP if packet[0] >> 4 == 4 else IPv6)(packet)
    layer[UDP].remove_payload()
    layer[UDP].add_payload(data)
    for part, fields in ((IP, ("len", "chksum")), (IPv6, ("plen",)), (UDP, ("len", "chksum"))):
        if part in layer:
            for field in fields:
                delattr(layer[part], field)
    return bytes(layer)


@BOTH
@pytest.mark.parametrize("family", LOCAL)
@pytest.mark.parametrize("kept", [bytes, bytearray])
def test_new_bytes(hooked: Namespace, kind: Kind, family: int, kept: type) -> None:
    """As long as the old ones, longer, shorter; with lengths that are no multiple of four."""
    wanted = [b"12345", b"123456789" * 100, b"1", b"12", b"123", b"x" * 20_000]

    def serve(payload: bytes, mark: int, *_: int) -> Answer:
        return NF_ACCEPT, kept(rewritten(payload, wanted[mark])), 6

    with ends(family) as udp, closing(kind(Settings(QUEUE), serve, unchanged)) as reader:
        for mark in range(len(wanted)):
            udp.send(b"hello", mark)
        assert drained(reader) == len(wanted)
        assert udp.received() == wanted
        assert reader.truncated == 0
    assert marked() == {6: len(wanted)}


@BOTH
def test_large_packets_come_whole_and_can_be_changed(hooked: Namespace, kind: Kind) -> None:
    """NetfilterQueue by itself would cut them to 4 016 bytes and not say so."""
    seen = []

    def serve(payload: bytes, mark: int, *rest: int) -> Answer:
        seen.append((payload[28:], rest[-1]))
        return NF_ACCEPT, rewritten(payload, payload[:-4:-1] + payload[28:-3]) if mark else None, 0

    sent = [Random(size).randbytes(size) for size in (3988, 3989, 4096, 9000, 65_000)]
    with ends() as udp, closing(kind(Settings(QUEUE), serve, unchanged)) as reader:
        for data in sent:
            udp.send(data)
            udp.send(data, mark=1)
        assert drained(reader) == 2 * len(sent)
        assert udp.received() == [
            some for data in sent for some in (data, data[:-4:-1] + data[:-3])
        ]
    assert seen == [(data, 0) for data in sent for _ in range(2)]


@BOTH
def test_many_large_packets_are_changed(hooked: Namespace, kind: Kind) -> None:
    """More bytes than one message to the kernel may have."""

    def serve(payload: bytes, mark: int, *_: int) -> Answer:
        return NF_ACCEPT, rewritten(payload, bytes(60_000)), mark

    with (
        ends() as udp,
        closing(kind(Settings(QUEUE, buffer=64 << 20), serve, unchanged)) as reader,
    ):
        for _ in range(100):
            udp.send(b"x" * 60_000)
        assert drained(reader) == 100
        assert udp.received() == [bytes(60_000)] * 100


@BOTH
def test_the_largest_packet(hooked: Namespace, kind: Kind) -> None:
    """Netlink has no room for its last four bytes: it can be passed, not changed."""
    seen = []

    def serve(payload: bytes, mark: int, *rest: int) -> Answer:
        seen.append((len(payload), rest[-1]))
        return NF_ACCEPT, payload if mark else None, 0

    largest = Random(1).randbytes(65_507)
    with ends() as udp, closing(kind(Settings(QUEUE), serve, unchanged)) as reader:
        udp.send(largest)
        udp.send(largest, mark=1)
        assert drained(reader) == 2
        assert (udp.received(), reader.truncated) == ([largest] * 2, 1)
    assert seen == [(65_531, 65_535)] * 2


@BOTH
@pytest.mark.parametrize("verdict", [NF_ACCEPT, NF_DROP])
@pytest.mark.parametrize("family", LOCAL)
def test_what_was_not_copied_is_not_lost(
    hooked: Namespace, kind: Kind, verdict: int, family: int
) -> None:
    """A packet that came in part is never replaced by its part."""
    seen = []

    def serve(payload: bytes, mark: int, *rest: int) -> Answer:
        seen.append((len(payload), rest[-1]))
        return NF_ACCEPT, payload, 0

    header = 28 if family == socket.AF_INET else 48
    fits = 100 - header
    with (
        ends(family) as udp,
        closing(kind(Settings(QUEUE, copy=100), serve, lambda m: (verdict, None, m + 1))) as reader,
    ):
        sent = [bytes(fits - 1), bytes(fits), bytes(fits + 1), bytes(9000)]
        for data in sent:
            udp.send(data, mark=3)
        assert drained(reader) == 4
        assert reader.truncated == 2
        assert udp.received() == (sent if verdict else sent[:2])
    assert seen == [(99, 0), (100, 0), (100, 101), (100, 9000 + header)]
    assert marked() == ({0: 2, 4: 2} if verdict else {0: 2})


@BOTH
def test_mixed_verdicts_hit_their_own_packets(hooked: Namespace, kind: Kind) -> None:
    """Runs of all lengths, of verdicts, marks and new bytes, in one batch and over several."""
    draw = Random(1)
    plan: list[int] = []
    while len(plan) < 500:
        plan += [draw.randrange(4)] * draw.choice((1, 1, 1, 2, 3, 70))

    def serve(payload: bytes, *_: int) -> Answer:
        number = int(payload[28:])
        match plan[number]:
            case 0:
                return NF_ACCEPT, None, 1
            case 1:
                return NF_DROP, None, 1
            case 2:
                return NF_ACCEPT, rewritten(payload, b"new %d" % number), 2
            case _:
                return NF_ACCEPT, None, 3

    with ends() as udp, closing(kind(Settings(QUEUE), serve, unchanged)) as reader:
        for number in range(len(plan)):
            udp.send(b"%d" % number)
        assert drained(reader) == len(plan)
        assert udp.received() == [
            b"new %d" % number if what == 2 else b"%d" % number
            for number, what in enumerate(plan)
            if what != 1
        ]
    assert marked() == {1: plan.count(0), 2: plan.count(2), 3: plan.count(3)}


@BOTH
def test_accept_and_drop_by_turns(hooked: Namespace, kind: Kind) -> None:
    def serve(payload: bytes, *_: int) -> Answer:
        return int(payload[28:]) % 2, None, 0

    with ends() as udp, closing(kind(Settings(QUEUE), serve, unchanged)) as reader:
        for number in range(200):
            udp.send(b"%d" % number)
        assert drained(reader) == 200
        assert udp.received() == [b"%d" % number for number in range(1, 200, 2)]


@BOTH
def test_ten_thousand_packets(hooked: Namespace, kind: Kind) -> None:
    """Sent while they are served: none is lost, none passes unserved, none twice."""
    number = 10_000
    settings = Settings(QUEUE, length=number, buffer=64 << 20)
    with (
        ends() as udp,
        closing(kind(settings, lambda _, mark, *rest: (NF_ACCEPT, None, 1), unchanged)) as reader,
    ):
        sent = [b"%d" % n for n in range(number)]
        sender = threading.Thread(target=lambda: [udp.send(data) for data in sent])
        sender.start()
        served = 0
        while sender.is_alive():
            served += reader.read()
        served += drained(reader)
        assert (served, reader.overruns) == (number, 0)
        assert udp.received() == sent
    assert marked() == {1: number}


@BOTH
def test_a_call_is_bounded(hooked: Namespace, kind: Kind) -> None:
    """However many packets wait, and keep coming, the caller gets its turn."""
    more = iter(range(1000))
    with ends() as udp:

        def serve(payload: bytes, mark: int, *_: int) -> Answer:
            if next(more, None) is not None:
                udp.send(b"one more")
            return NF_ACCEPT, None, mark

        with closing(kind(Settings(QUEUE, length=300), serve, unchanged)) as reader:
            for _ in range(200):
                udp.send(b"")
            assert 0 < reader.read() < 200


@BOTH
def test_full_queue_passes(hooked: Namespace, kind: Kind) -> None:
    """A reader that stalls holds up what it was given, nothing else."""
    settings = Settings(QUEUE, length=10)
    with (
        ends() as udp,
        closing(kind(settings, lambda *_: (NF_ACCEPT, None, 1), unchanged)) as reader,
    ):
        for number in range(100):
            udp.send(b"%d" % number)
        assert udp.received() == [b"%d" % number for number in range(10, 100)]
        assert drained(reader) == 10
        assert udp.received() == [b"%d" % number for number in range(10)]
    assert marked() == {0: 90, 1: 10}


@BOTH
def test_overrun_is_counted_and_passes(hooked: Namespace, kind: Kind) -> None:
    with (
        ends() as udp,
        closing(
            kind(Settings(QUEUE, buffer=8192), lambda *_: (NF_ACCEPT, None, 1), unchanged)
        ) as reader,
    ):
        for _ in range(200):
            udp.send(bytes(1000))
        served = drained(reader)
        assert 0 < served < 200
        assert reader.overruns == 1
        assert len(udp.received()) == 200
        udp.send(b"again")
        assert drained(reader) == 1
        assert udp.received() == [b"again"]
    assert marked() == {0: 200 - served, 1: served + 1}


@BOTH
def test_close_serves_what_waits_and_opens_the_way(hooked: Namespace, kind: Kind) -> None:
    with ends() as udp:

        def serve(payload: bytes, *_: int) -> Answer:
            if payload[28:] == b"0":
                udp.send(b"meanwhile")
            return NF_ACCEPT, None, 1

        reader = kind(Settings(QUEUE), serve, unchanged)
        for number in range(200):
            udp.send(b"%d" % number)
        reader.close()
        reader.close()
        assert sorted(udp.received()) == sorted([b"%d" % n for n in range(200)] + [b"meanwhile"])
        assert marked() == {0: 1, 1: 200}
        udp.send(b"nobody listens")
        assert udp.received() == [b"nobody listens"]
        with closing(kind(Settings(QUEUE), accept, unchanged)) as another:
            udp.send(b"x")
            assert another.read() == 1


@BOTH
@pytest.mark.parametrize("other", [RawReader, LibraryReader], ids=["raw", "library"])
def test_a_queue_has_one_reader(hooked: Namespace, kind: Kind, other: Kind) -> None:
    with ends() as udp, closing(other(Settings(QUEUE), accept, unchanged)) as first:
        with pytest.raises(MachineError) as raised:
            kind(Settings(QUEUE), accept, unchanged)
        assert raised.value.message.startswith(f"cannot serve queue {QUEUE}: another program reads")
        assert "other queues" in raised.value.help
        udp.send(b"x")
        assert (first.read(), udp.received()) == (1, [b"x"])
        kind(Settings(QUEUE + 1), accept, unchanged).close()


@BOTH
def test_without_rights(hooked: Namespace, kind: Kind) -> None:
    """In a process of its own, which gives up being root."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            os.setresuid(65534, 65534, 65534)
            kind(Settings(QUEUE), accept, unchanged)
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    assert said == f"MachineError: cannot serve queue {QUEUE}: this needs root (CAP_NET_ADMIN)"


@BOTH
def test_packets_of_a_link_that_went_down(hooked: Namespace, kind: Kind) -> None:
    """The kernel flushes them; verdicts on them are refused, which disturbs nothing."""
    veth(hooked, "a", hooked, "b")
    add_address(hooked, "a", "10.9.0.1/24")
    served = 0

    def serve(payload: bytes, mark: int, *_: int) -> Answer:
        nonlocal served
        served += 1
        return NF_ACCEPT, payload if served % 2 else None, mark

    with (
        ends() as udp,
        closing(kind(Settings(QUEUE), serve, unchanged)) as reader,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as away,
    ):
        for _ in range(100):
            away.sendto(b"gone", ("10.9.0.2", PORT))
        request = struct.pack("16sH22x", b"a", 0)
        flags = struct.unpack_from("16sH", fcntl.ioctl(away, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(away, SIOCSIFFLAGS, struct.pack("16sH22x", b"a", flags & ~IFF_UP))
        udp.send(b"here")
        while served < 101:
            reader.read()
        assert udp.received() == [b"here"]
        assert marked() == {0: 1}


@pytest.mark.parametrize("rewrite", [False, True])
def test_unsegmented_packets(hooked: Namespace, rewrite: bool) -> None:
    """TCP goes through with headers only, in packets far above the MTU; no rewriting harms it."""
    lengths: list[tuple[int, int]] = []
    size = 4 << 20
    data = Random(1).randbytes(size)
    peer = Namespace.create("peer")
    with closing(peer):
        veth(hooked, "eth0", peer, "eth0", offloads=True)
        add_address(hooked, "eth0", "10.9.0.1/24")
        add_address(peer, "eth0", "10.9.0.2/24")
        with peer.entered():
            server = socket.create_server(("10.9.0.2", PORT))
        received = hashlib.sha256()

        def receive() -> None:
            with server, server.accept()[0] as connection:
                while some := connection.recv(1 << 20):
                    received.update(some)

        def send() -> None:
            with client:
                client.settimeout(10)
                client.connect(("10.9.0.2", PORT))
                client.sendall(data)

        def serve(payload: bytes, mark: int, *rest: int) -> Answer:
            lengths.append((len(payload), rest[-1]))
            return NF_ACCEPT, payload if rewrite else None, 1

        client = socket.socket()
        threads = [threading.Thread(target=job, daemon=True) for job in (receive, send)]
        settings = Settings(QUEUE, copy=128, segments=False)
        with closing(RawReader(settings, serve, lambda _: (NF_ACCEPT, None, 2))) as reader:
            for thread in threads:
                thread.start()
            end = time.monotonic() + 20
            while any(thread.is_alive() for thread in threads) and time.monotonic() < end:
                reader.read()
        assert received.digest() == hashlib.sha256(data).digest()
        assert reader.truncated == (len(lengths) if rewrite else 0)
    assert max(length for _, length in lengths) > 30_000
    assert {copied for copied, length in lengths if length} == {128}
    assert marked() == {2 if rewrite else 1: len(lengths)}


def test_segmented_by_default(hooked: Namespace) -> None:
    """What the stack sends as one is cut and its checksums are complete, before it is queued."""
    peer = Namespace.create("peer")
    seen: list[bytes] = []

    def serve(payload: bytes, mark: int, *_: int) -> Answer:
        seen.append(payload)
        return NF_ACCEPT, None, mark

    with (
        closing(peer),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        closing(RawReader(Settings(QUEUE), serve, unchanged)) as reader,
    ):
        veth(hooked, "eth0", peer, "eth0", offloads=True)
        add_address(hooked, "eth0", "10.9.0.1/24")
        udp.setsockopt(socket.SOL_UDP, 103, 1000)  # UDP_SEGMENT, linux/udp.h
        udp.sendto(Random(1).randbytes(9_500), ("10.9.0.2", PORT))
        assert drained(reader) == 10
    assert [len(packet) for packet in seen] == [1028] * 9 + [528]
    for packet in seen:
        assert rewritten(packet, packet[28:]) == packet


def message(*attributes: tuple[int, bytes], queue: int = QUEUE) -> bytes:
    """One as the kernel sends it."""
    body = struct.pack("!BBH", socket.AF_INET, 0, queue)
    for kind, value in attributes:
        body += struct.pack("=HH", 4 + len(value), kind) + value
        body += bytes(-len(value) % 4) if kind != 10 else b""
    return struct.pack("=IHHII", 16 + len(body), 3 << 8, 0, 0, 0) + body


HEADER = (1, struct.pack("!IHB", 9, 0x0800, 3))
WHOLE = message(
    HEADER, (6, struct.pack("!I", 4)), (3, struct.pack("!I", 77)), (9, bytes(12)), (4, bytes(16)),
    (13, struct.pack("!I", 1500)), (10, b"packet of odd size"),
)  # fmt: skip


def test_layout() -> None:
    layout = _Layout.of(WHOLE)
    assert layout is not None
    assert (layout.hook, layout.input, layout.output, layout.whole) == (3, 0, 4, False)
    assert layout.values.unpack_from(WHOLE) == (9, 77, 1500)
    assert WHOLE[layout.start :] == b"packet of odd size"
    other = message(
        HEADER, (6, struct.pack("!I", 4)), (3, struct.pack("!I", 1)), (9, b"x" * 12), (4, b"y" * 16),
        (13, struct.pack("!I", 2)), (10, b"another"),
    )  # fmt: skip
    assert layout.shape.unpack_from(other) == layout.same
    assert layout.values.unpack_from(other) == (9, 1, 2)


@pytest.mark.parametrize(
    "unlike",
    [
        message(HEADER, (5, bytes(4)), (3, bytes(4)), (9, bytes(12)), (4, bytes(16)), (13, bytes(4)), (10, b"x" * 100)),
        message(HEADER, (6, struct.pack("!I", 5)), (3, bytes(4)), (9, bytes(12)), (4, bytes(16)), (13, bytes(4)), (10, b"x" * 100)),
        message(HEADER, (6, struct.pack("!I", 4)), (9, bytes(12)), (4, bytes(16)), (13, bytes(4)), (10, WHOLE)),
        message(HEADER, (6, struct.pack("!I", 4)), (3, bytes(4)), (9, bytes(12)), (4, bytes(16)), (10, WHOLE)),
        message((1, struct.pack("!IHB", 9, 0x0800, 2)), (6, struct.pack("!I", 4)), (3, bytes(4)), (9, bytes(12)), (4, bytes(16)), (13, bytes(4)), (10, WHOLE)),
    ],
    ids=["incoming", "another link", "no mark", "whole", "another hook"],
)  # fmt: skip
def test_another_layout_is_not_taken_for_it(unlike: bytes) -> None:
    layout, own = _Layout.of(WHOLE), _Layout.of(unlike)
    assert layout is not None and own is not None
    assert layout.shape.unpack_from(unlike) != layout.same


def test_malformed_messages_are_no_packets() -> None:
    for end in range(len(WHOLE)):
        assert _Layout.of(WHOLE[:end]) is None
        assert _Layout.of(struct.pack("=I", end) + WHOLE[4:end]) is None or end >= 16 + 4 + 12 + 4
    draw = Random(1)
    for _ in range(20_000):
        broken = bytearray(WHOLE)
        for _ in range(draw.randrange(1, 4)):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        _Layout.of(bytes(broken))
