"""Programs on libitm before a real kernel: UDP over the loopback, through a program, and back.

Most programs run in the test's own process, in its main thread, while a thread beside it
sends. Those that are to be ended by a signal or by an error are processes of their own.
"""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import libitm
import runtime.app
from runtime import netqueue, nft
from runtime.status import status
from runtime.traffic import Namespace, add_address, veth
from tests.support.commands import PATIENCE, ROOT, processes, run, until
from tests.support.kernel import SO_MARK

PORT = 5000
LOCAL = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
SEEN = """
table inet seen {
	counter marked { }
	chain late { type filter hook output priority 300; meta mark 7 counter name "marked"; }
}
"""


class Ends:
    """UDP on the loopback: what is sent, and what arrives with which TOS."""

    def __init__(self, port: int = PORT, family: int = socket.AF_INET) -> None:
        self._to = LOCAL[family], port
        self._receiver = socket.socket(family, socket.SOCK_DGRAM)
        self._receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self._receiver.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        self._receiver.bind(self._to)
        self._sender = socket.socket(family, socket.SOCK_DGRAM)

    def send(self, data: bytes, mark: int = 0) -> None:
        self._sender.setsockopt(socket.SOL_SOCKET, SO_MARK, struct.pack("=I", mark))
        self._sender.sendto(data, self._to)

    def receive(self, within: float = 5.0) -> tuple[bytes, int] | None:
        """The next packet's data and TOS; None if none comes."""
        self._receiver.settimeout(within * PATIENCE)
        try:
            data, control, _, _ = self._receiver.recvmsg(1 << 16, 64)
        except TimeoutError:
            return None
        return data, control[0][2][0] if control else 0

    def passed(self, *sent: bytes) -> list[tuple[bytes, int]]:
        """What arrives of these, each sent when the one before has arrived or has not."""
        found = []
        for data in sent:
            self.send(data)
            came = self.receive(0.5 if data.startswith(b"lost") else 5.0)
            if came is not None:
                found.append(came)
        return found


def beside(app: libitm.App, drive: Callable[[], Any]) -> Any:
    """Run a program in this thread, and something beside it that ends it when it returns."""
    found: list[Any] = []
    failed: list[BaseException] = []

    def act() -> None:
        try:
            until(lambda: app.running and all(each.active for each in app.registrations))
            found.append(drive())
        except BaseException as error:
            failed.append(error)
        finally:
            app.stop()

    thread = threading.Thread(target=act)
    thread.start()
    try:
        app.run()
    finally:
        thread.join()
    if failed:
        raise failed[0]
    return found[0]


def one(app: libitm.App, number: int = 0) -> libitm.Registration:
    return app.registrations[number]


def udp(**fields: Any) -> libitm.Interest:
    return libitm.Interest(protocol="udp", dport=PORT, **fields)


# Functions, classes, verdicts.


def test_the_five_functions_and_their_classes(host: Namespace) -> None:
    called: list[tuple[Any, ...]] = []

    def classify(packet: libitm.Packet) -> object:
        called.append(("classify", packet.payload))
        return {b"none": None, b"zero": 0, b"short": "short"}.get(packet.payload, 2)

    def process(packet: libitm.Packet, kind: object) -> None:
        called.append(("process", kind))
        packet.ip.tos = 0x10

    info = libitm.Info(
        interest=udp(),
        classify=classify,
        log=lambda _: called.append(("log",)),
        process=process,
        update=lambda _: called.append(("update",)),
        control=lambda _: called.append(("control",)),
    )
    app, ends = libitm.App("five"), Ends()
    app.register("output", info)
    sent = [b"none", b"zero", b"short", b"other"]
    assert beside(app, lambda: ends.passed(*sent)) == [
        (b"none", 0), (b"zero", 0), (b"short", 0x10), (b"other", 0x10),
    ]  # fmt: skip
    before, after = [("log",)], [("update",), ("control",)]
    assert called == [
        ("classify", b"none"), *before, *after,
        ("classify", b"zero"), *before, *after,
        ("classify", b"short"), *before, ("process", "short"), *after,
        ("classify", b"other"), *before, ("process", 2), *after,
    ]  # fmt: skip
    assert one(app).counts["packets"] == 4 and not one(app).active


def test_verdicts(host: Namespace) -> None:
    app, ends = libitm.App("verdicts"), Ends()

    @app.on("output", protocol="udp", dport=PORT)
    def process(packet: libitm.Packet) -> libitm.Verdict | None:
        match packet.payload:
            case b"lost":
                return libitm.DROP
            case b"modified":
                packet.ip.tos = 0x20
                return libitm.MODIFIED
            case b"longer":
                packet.payload = b"much longer than before"
                return libitm.ACCEPT
            case b"shorter":
                packet.payload = b"s"
        return None

    sent = [b"as it is", b"lost", b"modified", b"longer", b"shorter"]
    assert beside(app, lambda: ends.passed(*sent)) == [
        (b"as it is", 0), (b"modified", 0x20), (b"much longer than before", 0), (b"s", 0),
    ]  # fmt: skip
    counts = one(app).counts
    assert (counts["packets"], counts["dropped"], counts["failed"]) == (5, 1, 0)


# Which packets, and where.


def test_interest_is_the_kernels_to_tell(host: Namespace) -> None:
    """What is of no interest never reaches the program."""
    seen = []
    app = libitm.App("interest")
    others = [Ends(port) for port in (5001, 5002, 5003, 5004)]

    @app.on("output", protocol="udp", dport=[5001, range(5003, 5005)], lines="not dport 5004")
    def process(packet: libitm.Packet) -> None:
        seen.append(packet.five_tuple.destination_port)

    beside(app, lambda: [ends.passed(b"x") for ends in others])
    assert seen == [5001, 5003]


@pytest.mark.parametrize("family", LOCAL)
def test_families_and_addresses(host: Namespace, family: int) -> None:
    ends = {family: Ends(family=family) for family in LOCAL}
    app = libitm.App("family")
    seen = []

    @app.on("output", protocol="udp", dport=PORT, daddr=LOCAL[family])
    def process(packet: libitm.Packet) -> None:
        seen.append(packet.ip.version)

    beside(app, lambda: [each.passed(b"x") for each in ends.values()])
    assert seen == [4 if family == socket.AF_INET else 6]


def test_several_hooks_in_one_program(host: Namespace) -> None:
    """A packet to ourselves passes them in their order; each tells where it was met."""
    app, ends = libitm.App("hooks"), Ends()
    seen = []

    def process(packet: libitm.Packet, _: object) -> None:
        seen.append((packet.hook, packet.input, packet.output))

    for hook in ("input", "prerouting", "postrouting", "output"):
        app.register(hook, libitm.Info(interest=udp(), process=process))
    assert beside(app, lambda: ends.passed(b"x")) == [(b"x", 0)]
    assert seen == [
        ("output", None, "lo"), ("postrouting", None, "lo"),
        ("prerouting", "lo", None), ("input", "lo", None),
    ]  # fmt: skip


def test_forwarded_packets_and_devices(host: Namespace) -> None:
    ends = [Namespace.create(name) for name in ("near", "far")]
    for number, end in enumerate(ends):
        veth(end, "eth0", host, f"eth{number}")
        add_address(end, "eth0", f"10.0.{number}.2/24")
        add_address(host, f"eth{number}", f"10.0.{number}.1/24")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    for number, end in enumerate(ends):
        with end.entered():
            subprocess.run(["ip", "route", "add", "default", "via", f"10.0.{number}.1"], check=True)
    app = libitm.App("forward")
    seen = []

    @app.on("forward", protocol="udp", indev="eth0", outdev="eth1")
    def process(packet: libitm.Packet) -> None:
        seen.append((str(packet.ip.source), packet.input, packet.output))
        packet.udp.destination_port = PORT

    with ends[1].entered():
        far = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        far.bind(("", PORT))
        far.settimeout(5 * PATIENCE)
    with ends[0].entered():
        near = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    near.settimeout(5 * PATIENCE)

    def there_and_back() -> tuple[bytes, bytes]:
        near.sendto(b"there", ("10.0.1.2", 9))
        data, sender = far.recvfrom(100)
        far.sendto(b"back", sender)
        return data, near.recv(100)

    assert beside(app, there_and_back) == (b"there", b"back")
    assert seen == [("10.0.0.2", "eth0", "eth1")]
    for end in ends:
        end.close()


def test_one_after_the_other(host: Namespace) -> None:
    """Figure 12: each sees what those before it changed: by priority, then as they came."""
    app, ends = libitm.App("order"), Ends()

    def adding(letter: bytes) -> libitm.Info:
        def process(packet: libitm.Packet, _: object) -> None:
            packet.payload += letter

        return libitm.Info(interest=udp(), process=process)

    app.register("output", adding(b"b"))
    app.register("output", adding(b"c"))
    app.register("output", adding(b"d"), priority=10)
    app.register("output", adding(b"a"), priority=-10)
    assert beside(app, lambda: ends.passed(b"-")) == [(b"-abcd", 0)]


def test_behind_a_policy_of_the_kernels(host: Namespace, tmp_path: Path) -> None:
    file = tmp_path / "first.itm"
    file.write_text(
        "policy first { at output; interest { protocol udp }\n"
        "classify { all } process { all { set dscp ef } } }\n"
    )
    assert run("apply", str(file)).returncode == 0
    app, ends = libitm.App("behind"), Ends()
    seen = []

    @app.on("output", protocol="udp", dport=PORT)
    def process(packet: libitm.Packet) -> None:
        seen.append(packet.ip.tos)
        packet.ip.tos |= 1

    assert beside(app, lambda: ends.passed(b"x")) == [(b"x", 46 << 2 | 1)]
    assert seen == [46 << 2]
    assert [policy.name for policy in status()] == ["first"]


# How much of a packet.


def test_headers_only(host: Namespace) -> None:
    """256 bytes of each packet, to be read; the mark may be written, and a verdict given."""
    nft.load(SEEN)
    app, ends = libitm.App("headers"), Ends()
    seen = []

    def process(packet: libitm.Packet, _: object) -> libitm.Verdict | None:
        seen.append((len(packet.data), packet.length, packet.whole))
        if packet.length < 100:
            return libitm.DROP
        packet.mark = 7
        return None

    app.register("output", libitm.Info(interest=udp(), process=process), copy=libitm.HEADERS)
    sent = [b"lost", bytes(228), bytes(229), bytes(9000)]
    assert beside(app, lambda: ends.passed(*sent)) == [(data, 0) for data in sent[1:]]
    assert seen == [(32, 32, True), (256, 256, True), (256, 257, False), (256, 9028, False)]
    assert nft.counters("inet seen")["marked"][0] == 3


def test_headers_are_not_written(host: Namespace, caplog: pytest.LogCaptureFixture) -> None:
    app, ends = libitm.App("headers"), Ends()

    def process(packet: libitm.Packet, _: object) -> None:
        packet.ip.tos = 0x10

    app.register("output", libitm.Info(interest=udp(), process=process), copy=libitm.HEADERS)
    assert beside(app, lambda: ends.passed(b"x", bytes(9000))) == [(b"x", 0), (bytes(9000), 0)]
    assert one(app).counts["failed"] == 2
    assert "ask for whole packets" in caplog.text


@pytest.mark.parametrize("fail", ["open", "closed"])
def test_whole_packets_up_to_a_length(host: Namespace, fail: str) -> None:
    app, ends = libitm.App("whole"), Ends()
    seen = []

    def process(packet: libitm.Packet, _: object) -> None:
        seen.append(packet.length)
        packet.ip.tos = 0x10

    app.register("output", libitm.Info(interest=udp(), process=process), copy=1000, fail=fail)
    short, longer = b"short".ljust(972), b"lost?".ljust(973)
    passed = [(short, 0x10)] + ([(longer, 0)] if fail == "open" else [])
    assert beside(app, lambda: ends.passed(short, longer)) == passed
    assert seen == [1000]
    assert one(app).counts["cut"] == 1


@pytest.mark.parametrize("size", [4000, 20_000, 65_000])
def test_large_packets_are_whole(host: Namespace, size: int) -> None:
    app, ends = libitm.App("large"), Ends()

    @app.on("output", protocol="udp", dport=PORT)
    def process(packet: libitm.Packet) -> None:
        packet.payload = packet.payload[::-1]

    data = os.urandom(size)
    assert beside(app, lambda: ends.passed(data)) == [(data[::-1], 0)]


# What goes wrong in a function costs its packet.


@pytest.mark.parametrize("fail", ["open", "closed"])
def test_what_fails_costs_its_packet(
    host: Namespace, fail: str, caplog: pytest.LogCaptureFixture
) -> None:
    app, ends = libitm.App("fails"), Ends()
    hung = threading.Event()

    def process(packet: libitm.Packet, _: object) -> object:
        match packet.payload:
            case b"lost? raises":
                raise ValueError("no good")
            case b"lost? exits":
                sys.exit(3)
            case b"lost? says":
                return "accept"
            case b"lost? hangs":
                while not hung.wait(0.01):
                    pass
        packet.ip.tos = 0x10
        return None

    info = libitm.Info(interest=udp(), process=process)  # type: ignore[arg-type]
    app.register("output", info, fail=fail)
    bad = [b"lost? raises", b"lost? exits", b"lost? says", b"lost? hangs"]

    def drive() -> list[tuple[bytes, int]]:
        found = ends.passed(b"good", *bad[:3], b"good")
        ends.send(bad[3])
        until(lambda: one(app).counts["hung"] == 1)
        return found + ([ends.receive()] if fail == "open" else []) + ends.passed(b"good")

    good = (b"good", 0x10)
    if fail == "open":
        wanted = [good, *((data, 0) for data in bad[:3]), good, (bad[3], 0), good]
    else:
        wanted = [good, good, good]
    assert beside(app, drive) == wanted
    counts = one(app).counts
    assert (counts["packets"], counts["failed"], counts["hung"]) == (7, 3, 1)
    assert "fails_output failed: ValueError: no good (test_libitm.py:" in caplog.text
    assert "fails_output took too long" in caplog.text


def test_the_log_is_bounded(host: Namespace, caplog: pytest.LogCaptureFixture) -> None:
    app, ends = libitm.App("fails"), Ends()

    @app.on("output", protocol="udp", dport=PORT)
    def process(packet: libitm.Packet) -> None:
        raise ValueError

    def drive() -> None:
        for _ in range(500):
            ends.send(b"x")
        until(lambda: one(app).counts["failed"] == 500)

    began = time.monotonic()
    beside(app, drive)
    lines = [line for line in caplog.messages if "ValueError" in line]
    assert 0 < len(lines) <= 5 * (time.monotonic() - began + 1)


# Timers.


def test_timers(host: Namespace) -> None:
    """They are called again and again, between packets, and what is missed is left out."""
    app, ends = libitm.App("timers"), Ends()
    app.register("output", libitm.Info(interest=udp()))
    times: list[float] = []

    def slow() -> None:
        times.append(time.monotonic())
        time.sleep(0.25)

    quick = app.register_timer(lambda: None, seconds=0.02)
    late = app.register_timer(slow, seconds=0.1)

    def drive() -> list[tuple[bytes, int]]:
        until(lambda: late.calls >= 4)
        return ends.passed(b"x")

    assert beside(app, drive) == [(b"x", 0)]
    assert late.skipped >= 3  # two of three; none was made up for
    pauses = [after - before for before, after in pairwise(times)]
    assert min(pauses) >= 0.25
    assert quick.calls > late.calls and quick.skipped > 0
    assert (quick.failed, late.failed) == (0, 0)


def test_timers_that_fail(
    host: Namespace, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.app, "LONGEST_TICK", 0.5)
    app = libitm.App("timers")

    @app.every(0.05)
    def raising() -> None:
        raise ValueError("no good")

    @app.every(0.05)
    def hanging() -> None:
        time.sleep(60)

    first, second = app.timers
    beside(app, lambda: until(lambda: first.failed >= 2 and second.failed >= 2))
    assert "timers: the timer raising failed: ValueError: no good (test_libitm.py:" in caplog.text
    assert "timers: the timer hanging took too long" in caplog.text


def test_timers_come_and_go_while_it_runs(host: Namespace) -> None:
    app = libitm.App("timers")
    made: list[libitm.Timer] = []

    def ends_itself() -> None:
        app.unregister_timer(made[0])

    def drive() -> None:
        made.append(app.register_timer(ends_itself, seconds=0.05))
        later = app.register_timer(lambda: None, seconds=0.05)
        until(lambda: later.calls >= 4)
        app.unregister_timer(later)

    beside(app, drive)
    assert made[0].calls == 1 and app.timers == ()


# Coming and going while it runs.


def test_from_another_thread(host: Namespace) -> None:
    """It holds when the call returns."""
    app, ends = libitm.App("coming"), Ends()

    def process(packet: libitm.Packet, _: object) -> None:
        packet.ip.tos = 0x10

    def drive() -> list[tuple[bytes, int]]:
        found = ends.passed(b"before")
        made = app.register("output", libitm.Info(interest=udp(), process=process))
        found += ends.passed(b"while")
        app.unregister(made)
        found += ends.passed(b"after")
        assert status() == ()
        until(lambda: netqueue.table() == [])
        app.register("output", libitm.Info(interest=udp(), process=process))
        found += ends.passed(b"again")
        app.unregister("output")
        return found + ends.passed(b"after")

    assert beside(app, drive) == [
        (b"before", 0), (b"while", 0x10), (b"after", 0), (b"again", 0x10), (b"after", 0),
    ]  # fmt: skip


def test_from_timers_and_functions(host: Namespace) -> None:
    """A packet has the next one handled by another function, and that one by none."""
    app, ends = libitm.App("coming"), Ends()

    def second(packet: libitm.Packet, _: object) -> None:
        packet.ip.tos = 0x20
        app.unregister("postrouting")

    def first(packet: libitm.Packet, _: object) -> None:
        packet.ip.tos = 0x10
        app.unregister("output")
        app.register("postrouting", libitm.Info(interest=udp(), process=second))

    def begin() -> None:
        app.unregister_timer(timer)
        app.register("output", libitm.Info(interest=udp(), process=first))

    timer = app.register_timer(begin, seconds=0.1)

    def names() -> list[str]:
        return [policy.name for policy in status()]

    def drive() -> list[tuple[bytes, int]]:
        until(lambda: names() == ["coming_output"])
        found = ends.passed(b"first")
        until(lambda: names() == ["coming_postrouting"])
        found += ends.passed(b"second")
        until(lambda: names() == [])
        return found + ends.passed(b"third")

    assert beside(app, drive) == [(b"first", 0x10), (b"second", 0x20), (b"third", 0)]
    assert app.registrations == ()


def test_refused_while_it_runs(host: Namespace, tmp_path: Path) -> None:
    """What cannot be loaded is refused to whoever asked; the rest goes on."""
    file = tmp_path / "taken.itm"
    file.write_text("policy taken { at output; classify { all } }\n")
    assert run("apply", str(file)).returncode == 0
    app, ends = libitm.App("refused"), Ends()
    app.register("output", libitm.Info(interest=udp(), process=lambda p, _: libitm.ACCEPT))

    def drive() -> list[tuple[bytes, int]]:
        with pytest.raises(libitm.UsageError, match="`taken` is loaded already, from"):
            app.register("output", libitm.Info(label="taken"))
        return ends.passed(b"x")

    assert beside(app, drive) == [(b"x", 0)]
    assert [each.name for each in app.registrations] == ["refused_output"]
    assert [policy.name for policy in status()] == ["taken"]


def test_others_lose_nothing_meanwhile(host: Namespace) -> None:
    """Packets flow past one registration while others come and go beside it."""
    app, ends = libitm.App("flowing"), Ends()
    app.register("output", libitm.Info(interest=udp(), process=lambda p, _: libitm.ACCEPT))
    over = threading.Event()
    sent = []

    def send() -> None:
        while not over.is_set():
            ends.send(b"%d" % len(sent))
            sent.append(b"%d" % len(sent))
            time.sleep(0.002 * PATIENCE)  # as slow as who serves them

    def change() -> None:
        made = app.register("input", libitm.Info(interest=libitm.Interest(protocol="icmp")))
        app.unregister(made)

    def drive() -> None:
        sender = threading.Thread(target=send)
        sender.start()
        timer = app.register_timer(change, seconds=0.3 * PATIENCE)
        until(lambda: timer.calls >= 3)
        change()
        over.set()
        sender.join()

    beside(app, drive)
    found = []
    while (came := ends.receive(0.2)) is not None:
        found.append(came[0])
    # What waits when a hook goes is dropped by the kernel: at most what one turn had not served.
    lost = set(sent) - set(found)
    assert len(sent) > 50 and len(lost) <= 3, sorted(lost)


# The end.

PROGRAM = """
import sys, time
import libitm

app = libitm.App("program")

@app.on("output", protocol="udp", dport=5000)
def process(packet):
    packet.ip.tos = 0x10

@app.every(0.05)
def tick():
    if app.registrations[0].active:
        print("on", flush=True)
        app.unregister_timer(tick_timer)

tick_timer = app.timers[0]
"""


@contextmanager
def program(
    folder: Path, end: str = "app.run()", name: str = ""
) -> Iterator[subprocess.Popen[str]]:
    """A program as a process of its own, ready when this begins; `end` is how it goes on."""
    file = folder / "program.py"
    text = PROGRAM + end
    file.write_text(text.replace('"program"', f'"{name}"') if name else text)
    started = subprocess.Popen(
        [sys.executable, str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert started.stdout is not None
        assert started.stdout.readline() == "on\n", started.communicate()[1]
        yield started
    finally:
        started.kill()
        started.communicate()


def tables() -> list[str]:
    return [path for path in nft.tables() if "itm_" in path]


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_clean_up(host: Namespace, tmp_path: Path, ending: signal.Signals) -> None:
    ends = Ends()
    with program(tmp_path, "app.run()\nprint('after')") as process:
        assert ends.passed(b"x") == [(b"x", 0x10)]
        assert tables() == ["inet itm_program_output"]
        process.send_signal(ending)
        said, error = process.communicate(timeout=30 * PATIENCE)
    assert (process.returncode, said, error) == (0, "after\n", "")
    assert (tables(), status()) == ([], ())
    assert ends.passed(b"x") == [(b"x", 0)]


def test_ignored_signals_stay_ignored(host: Namespace, tmp_path: Path) -> None:
    """As under nohup."""
    before = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\napp.run()"
    with program(tmp_path, before) as process:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert Ends().passed(b"x") == [(b"x", 0x10)]


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("app.register_timer(lambda: sys.exit(3), seconds=0.5)\napp.run()", 3),
        ("app.register_timer(app.stop, seconds=0.5)\napp.run()\nsys.exit(4)", 4),
        ("app.register_timer(app.stop, seconds=0.5)\napp.run()\nraise ValueError", 1),
    ],
)
def test_errors_clean_up(host: Namespace, tmp_path: Path, end: str, code: int) -> None:
    with program(tmp_path, end) as process:
        process.communicate(timeout=30 * PATIENCE)
    assert process.returncode == code
    assert (tables(), status()) == ([], ())


def test_a_killed_program(host: Namespace, tmp_path: Path) -> None:
    """Its packets pass; `status` says that it is gone; the next program takes its rules away."""
    ends = Ends()
    with program(tmp_path) as process:
        shown = run("status").stdout
        assert f"served by the program program (process {process.pid})" in shown
        process.kill()
        process.wait()
        until(lambda: ends.passed(b"x") == [(b"x", 0)])
    (left,) = status()
    assert left.python is not None
    assert (left.name, left.state, left.drift) == ("program_output", "on", False)
    assert (left.python.process, left.python.workers) == (0, 0)
    assert "its program program is gone: start it again, or `itmc remove" in left.python.trouble
    assert left.python.trouble in run("status").stdout
    assert (
        json.loads(run("status", "--json").stdout)["policies"][0]["python"]["program"] == "program"
    )
    other = libitm.App("other")
    beside(other, lambda: None)
    assert (tables(), status()) == ([], ())


def test_a_killed_program_starts_again(host: Namespace, tmp_path: Path) -> None:
    ends = Ends()
    for _ in range(2):
        with program(tmp_path) as process:
            assert ends.passed(b"x") == [(b"x", 0x10)]
            process.kill()
            process.wait()
    assert run("remove", "program_output").returncode == 0
    assert (tables(), status()) == ([], ())


def test_a_living_program_is_left_alone(host: Namespace, tmp_path: Path) -> None:
    """Also one that is stopped: then the kernel lets its packets by, until it goes on."""
    ends = Ends()
    with program(tmp_path) as process:
        process.send_signal(signal.SIGSTOP)
        until(lambda: ends.passed(b"lost?", b"x")[-1:] == [(b"x", 0)])
        beside(libitm.App("other"), lambda: None)
        assert [each.name for each in status()] == ["program_output"]
        process.send_signal(signal.SIGCONT)
        until(lambda: ends.passed(b"x")[-1:] == [(b"x", 0x10)])


def test_one_program_of_a_name(host: Namespace, tmp_path: Path) -> None:
    with program(tmp_path):
        with pytest.raises(libitm.UsageError, match="program program runs already"):
            libitm.App("program").run()
        assert Ends().passed(b"x") == [(b"x", 0x10)]


def test_removed_by_hand(host: Namespace, tmp_path: Path) -> None:
    """`itmc` knows its policies; the program goes on without them, and ends as it should."""
    ends = Ends()
    with program(tmp_path) as process:
        assert run("disable", "program_output").returncode == 0
        assert ends.passed(b"x") == [(b"x", 0)]
        assert run("enable", "program_output").returncode == 0
        assert ends.passed(b"x") == [(b"x", 0x10)]
        assert run("remove", "--all").returncode == 0
        assert ends.passed(b"x") == [(b"x", 0)]
        process.terminate()
        assert process.communicate(timeout=30 * PATIENCE)[1] == ""
    assert process.returncode == 0


def test_no_worker_is_started_for_it(host: Namespace, tmp_path: Path) -> None:
    """The runtime of the policies has no part in it, whatever else is loaded."""
    file = tmp_path / "mark.itm"
    file.write_text("policy mark { at input; classify { all } process { all { set mark 1 } } }\n")
    with program(tmp_path) as process:
        assert run("apply", str(file)).returncode == 0
        assert [*processes()] == [process.pid]
        assert Ends().passed(b"x") == [(b"x", 0x10)]


def test_a_change_that_waits_keeps_its_rules(
    host: Namespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """While `apply --confirm` waits nothing else may change, so the rules stay, and are told of."""
    file = tmp_path / "mark.itm"
    file.write_text("policy mark { at input; classify { all } process { all { set mark 1 } } }\n")
    app, ends = libitm.App("waits"), Ends()
    app.register("output", libitm.Info(interest=udp()))
    beside(app, lambda: run("apply", "--confirm", "60s", str(file)))
    assert "its rules stay" in caplog.text and "waits to be confirmed" in caplog.text
    assert ends.passed(b"x") == [(b"x", 0)]
    assert run("rollback").returncode == 0
    beside(libitm.App("other"), lambda: None)
    assert status() == ()


def test_it_is_run_again(host: Namespace) -> None:
    app, ends = libitm.App("again"), Ends()

    @app.on("output", protocol="udp", dport=PORT)
    def process(packet: libitm.Packet) -> None:
        packet.ip.tos = 0x10

    for _ in range(2):
        assert beside(app, lambda: ends.passed(b"x")) == [(b"x", 0x10)]
        assert ends.passed(b"x") == [(b"x", 0)]


def test_stopped_before_it_runs(host: Namespace) -> None:
    app = libitm.App("stopped")
    app.stop()
    app.run()
    assert tables() == []
