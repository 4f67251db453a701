"""Overlays on a real kernel: which way packets go, and what becomes of them when a path fails.

A diamond of namespaces, built once: a client behind the traffic manager `near`, a server behind
`far`; between these a plain router, `core`, and, one link further, the relays `one` and
`two`, each behind a plain router (`left`, `right`). What goes wrong does so in the plain routers.
Each test applies its policies, and when it is over, nothing of them may be left anywhere.
"""

import hashlib
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.packet import Raw

from itmlang.overlays import PORT
from runtime import apply as runtime_apply
from runtime import nft, status, store
from runtime.lab import Capture
from runtime.overlay import wire
from runtime.traffic import MAC, Namespace, TrafficError, set_sysctl
from tests.support import commands
from tests.support.commands import PATIENCE, lasting, until
from tests.support.diamond import (
    BEHIND,
    BY_LOSS,
    BY_TIME,
    CLIENT,
    FAR,
    HOSTS,
    KEY,
    LINKS,
    MANAGERS,
    NEAR,
    OURS,
    SERVER,
    Diamond,
    keyed,
    overlay,
)
from tests.support.mesh import Box, Stream, mesh
from tests.support.needs import unavailable

FOOTPRINT = """
nft list ruleset; ip -4 rule; ip -4 route show table all; ip link
for link in /sys/class/net/*; do tc qdisc show dev ${link##*/}; tc filter show dev ${link##*/} ingress; done
cd /proc/sys/net/ipv4; grep . ip_forward conf/*/rp_filter conf/*/accept_local conf/*/src_valid_mark
"""


def footprint(box: Box) -> str:
    """All that policies might leave in a namespace."""
    with box.ns.entered():
        made = subprocess.run(
            ["sh", "-c", FOOTPRINT], capture_output=True, text=True, check=False
        ).stdout
        left = [path.name for path in store.directory().glob("*") if "mesh" in path.name]
    return "\n".join([made, *left])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Diamond]:
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("mesh")
        try:
            made = stack.enter_context(mesh(folder, LINKS, MANAGERS, HOSTS))
        except TrafficError as error:
            unavailable(error)
        yield Diamond(made)


@pytest.fixture
def diamond(built: Diamond) -> Iterator[Diamond]:
    before = built.mesh.everywhere(footprint)
    try:
        yield built
    finally:
        built.mesh.heal()
        built.mesh.end()
    assert built.mesh.everywhere(footprint) == before


def push(box: Box, link: str, *packets: bytes) -> None:
    """Out of a link, byte for byte."""
    mac = bytes.fromhex(MAC.replace(":", ""))
    with box.ns.entered(), socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM) as wire_:
        for packet in packets:
            wire_.sendto(packet, (link, 0x0800, 0, 0, mac))


def heard(box: Box, neighbor: str) -> Capture:
    """What comes in from a neighbour."""
    return Capture(box.ns, box.links[neighbor])


def packet(size: int = 8, **fields: object) -> bytes:
    ends = {"src": CLIENT, "dst": SERVER, "id": 77}
    return bytes(IP(**(ends | fields)) / UDP(sport=1, dport=2) / Raw(bytes(size)))


def told(box: Box, name: str) -> int:
    """One of the engine's counters."""
    found = box.state().get("counters", {}).get(name, 0)
    assert isinstance(found, int)
    return found


def counted(box: Box, name: str, many: int) -> Callable[[], bool]:
    return lambda: told(box, name) >= many


# The best path.


def test_the_direct_path_is_the_default(diamond: Diamond) -> None:
    diamond.apply()
    with heard(diamond.core, "near") as direct, diamond.stream() as stream:
        stream.flowing(20)
    assert diamond.ways() == ("direct", "direct")
    assert diamond.near.elements() == diamond.far.elements() == {}
    assert {p.data[9] for p in direct.packets if p.data[16:20] == socket.inet_aton(SERVER)} == {17}
    assert diamond.moves() == (0, 0)


@pytest.mark.parametrize("source", ["", OURS], ids=["forwarded", "local"])
def test_a_path_that_gets_slow_is_left_and_taken_again(diamond: Diamond, source: str) -> None:
    """There and back, once each."""
    sender = diamond.near if source else diamond.client
    with (
        # Without that, all paths would be as long as this machine is busy.
        diamond.left.slow(10 * PATIENCE),
        diamond.right.slow(10 * PATIENCE),
    ):
        diamond.apply(every=0.05, timeout=0.5, more=BY_TIME)
        there_and_back(diamond, Stream(sender, diamond.server, SERVER, source=source))


def there_and_back(diamond: Diamond, stream: Stream) -> None:
    with stream:
        with diamond.core.slow(40 * PATIENCE):
            diamond.settled(direct=False)
            with heard(diamond.core, "near") as direct, heard(diamond.far, "server"):
                stream.flowing(20)
            to = socket.inet_aton(SERVER)
            assert not [p for p in direct.packets if p.data[16:20] == to]
            relay = diamond.near.choice(FAR)
            assert diamond.near.elements() == {"10.3.0.0/16": f"via_{relay}"}
            assert diamond.near.counter(f"via_{relay}") >= 20
        diamond.settled(direct=True)
        stream.flowing(20)
    assert diamond.moves() == (2, 2), (diamond.near.moves(), diamond.far.moves())
    told = [(move["before"], move["value"]) for move in diamond.near.moves()]
    assert told == [("direct", f"via {relay}"), (f"via {relay}", "direct")]
    assert " ms, direct: " in diamond.near.moves()[0]["reason"]


@pytest.mark.parametrize("from_", ["", "far"], ids=["both ways", "back"])
def test_a_silent_path_is_left_in_time(diamond: Diamond, from_: str) -> None:
    """Within four probes' time, the best of up to three times: this machine has other work, too.

    The download goes on, and both ends come back without flapping.
    """
    every = 0.2
    diamond.apply(every=every)
    bound = 4 * every * PATIENCE
    gaps: list[float] = []
    with diamond.stream() as stream, diamond.download() as download:
        while len(gaps) < 3 and not (gaps and min(gaps) <= bound):
            begun = time.monotonic()
            diamond.core.die(from_)
            diamond.settled(direct=False)
            stream.flowing()
            gaps.append(stream.gap(begun))
            download.goes_on()
            diamond.core.trouble()
            diamond.settled(direct=True)
            stream.flowing()
        download.goes_on()
    assert not download.wrong
    assert diamond.moves() == (2 * len(gaps), 2 * len(gaps))
    if from_ != "far":  # datagrams only go there
        assert min(gaps) <= bound, gaps


def test_relays_that_die_and_a_far_side_that_falls_silent(diamond: Diamond) -> None:
    """From one to the other; but where all are silent the choice stays: most likely only the far
    side's runtime ended, and packets pass."""
    diamond.apply()
    near = diamond.near
    diamond.core.die()
    diamond.settled(direct=False)
    first = near.choice(FAR)
    other = "two" if first == "one" else "one"
    with diamond.stream() as stream:
        (diamond.left if first == "one" else diamond.right).die()
        until(lambda: near.elements() == {"10.3.0.0/16": f"via_{other}"})
        stream.flowing(20)
        moves = near.moves()
        begun = time.monotonic()
        diamond.far.kill(diamond.far.processes())
        until(lambda: diamond.known(near, FAR, "direct", "one", "two"))
        stream.flowing(20)
        assert stream.gap(begun) < 0.4 * PATIENCE  # what is lost would be for longer
    assert (near.elements(), near.moves()) == ({"10.3.0.0/16": f"via_{other}"}, moves)


# What can be ended.


def test_a_killed_process_is_replaced_and_the_choice_holds(diamond: Diamond) -> None:
    diamond.apply()
    diamond.core.die()
    diamond.settled(direct=False)
    before, moves = diamond.near.elements(), diamond.near.moves()
    with diamond.stream() as stream:
        begun = time.monotonic()
        process = diamond.near.worker()["process"]
        diamond.near.kill([process])
        until(lambda: diamond.near.worker().get("process", process) != process)
        until(lambda: diamond.known(diamond.near, FAR, "direct"))
        stream.flowing(20)
        assert stream.gap(begun) < 0.4 * PATIENCE
    assert (diamond.near.elements(), diamond.near.moves()) == (before, moves)
    assert "was ended by signal 9" in diamond.near.asked()["log"][-1]


def test_without_a_runtime_packets_go_directly(diamond: Diamond) -> None:
    """It is killed, and with it, at once, the path that was chosen dies."""
    diamond.apply(timeout=0.5, more=BY_TIME)
    with diamond.core.slow(40 * PATIENCE), diamond.stream() as stream:
        diamond.settled(direct=False)
        relay = diamond.near.choice(FAR)
        begun = time.monotonic()
        diamond.near.kill(diamond.near.processes())
        (diamond.left if relay == "one" else diamond.right).die()
        until(lambda: not diamond.near.elements())
        stream.flowing()
        # The elements live for 0.8 s, as long as it takes to miss three probes.
        assert stream.gap(begun) < 2.0 * PATIENCE
        # `itmc apply` of the same file brings it back.
        assert diamond.near.apply(overlay(diamond.near, timeout=0.5, more=BY_TIME)).plan.empty
        until(diamond.near.worker)


def test_without_runtimes_the_choice_stays_where_the_direct_path_is_out(diamond: Diamond) -> None:
    """Going directly would make a hole that nobody ends; and relays pass on by themselves."""
    diamond.apply()
    near = diamond.near
    diamond.core.die()
    diamond.settled(direct=False)
    # It must know by now, and have said so.
    until(lambda: "timeout" not in near.nft("list", "map", "inet", "itm_outward", "route_mesh")
          .partition("elements")[2])  # fmt: skip
    before, moves = near.elements(), near.moves()
    relay = diamond.one if near.choice(FAR) == "one" else diamond.two
    with diamond.stream() as stream:
        begun = time.monotonic()
        relay.kill(relay.processes())
        stream.flowing(100)
        assert near.moves() == moves
        near.kill(near.processes())
        time.sleep(1.5 * PATIENCE)
        stream.flowing(20)
        assert stream.gap(begun) < 0.4 * PATIENCE
    assert near.elements() == before
    diamond.core.trouble()
    near.apply(overlay(near))
    diamond.settled(direct=True)


# What data tells, and connections.


def test_a_path_that_loses_only_data_is_left(diamond: Diamond) -> None:
    """Its probes pass: the packets tell, of which none are acknowledged."""
    diamond.apply()
    with diamond.download() as download:
        diamond.core.trouble(f'iifname "{diamond.core.links["far"]}" meta l4proto tcp drop')
        until(lambda: diamond.far.elements(), 30)
        download.goes_on()
    assert "no packets have come back" in diamond.far.moves()[0]["reason"]


def test_a_path_that_loses_data_both_ways_is_left_by_both(diamond: Diamond) -> None:
    """What one side sends again looks to the other as if all were well, so it is told."""
    diamond.apply()
    with diamond.download() as download:
        diamond.core.trouble("meta l4proto tcp drop")
        until(lambda: diamond.far.elements() and diamond.near.elements(), 30)
        download.goes_on()


def test_sticky_connections_stay_where_they_are_while_it_works(diamond: Diamond) -> None:
    diamond.apply(more=f"{BY_LOSS}\n    sticky")
    diamond.core.die()
    diamond.settled(direct=False)
    relays = [diamond.near.choice(FAR), diamond.far.choice(NEAR)]
    with diamond.download() as download:
        diamond.core.trouble()
        diamond.settled(direct=True)
        with heard(diamond.core, "far") as direct:
            download.goes_on()
        assert not [one for one in direct.packets if one.data[9] == 6]
        with heard(diamond.core, "near") as direct, diamond.stream() as stream:
            stream.flowing(20)  # a new one goes directly
        assert len([one for one in direct.packets if one.data[9] == 17]) >= 20
        for relay in set(relays):
            (diamond.left if relay == "one" else diamond.right).die()
        download.goes_on()


# What may not happen.


def test_nothing_circles(diamond: Diamond) -> None:
    """Each of two sends by the other: a packet passes each once, and arrives."""
    behind = {**BEHIND, "one": {HOSTS["server"]: FAR}}
    diamond.apply(behind=behind)
    for box in (diamond.near, diamond.one):
        box.kill(box.processes())
    for box, by in ((diamond.near, "one"), (diamond.one, "near")):
        box.nft("flush", "map", "inet", "itm_outward", "route_mesh")
        box.nft("add", "element", "inet", "itm_outward", "route_mesh",
                f"{{ 10.3.0.0/16 : goto via_{by} }}")  # fmt: skip
    with (
        heard(diamond.server, "far") as arrived,
        heard(diamond.left, "near") as there,
        heard(diamond.left, "one") as back,
        heard(diamond.core, "near") as direct,
    ):
        push(diamond.client, "eth0", packet(id=1, ttl=64))
        until(lambda: len(arrived.packets) >= 1)
        with diamond.one.ns.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ours:
            ours.sendto(b"from one", (SERVER, 2))
        until(lambda: len(arrived.packets) >= 2)

    def ours_in(capture: Capture) -> list[IP]:
        found = [IP(one.data) for one in capture.packets]
        return [one for one in found if one.dst == SERVER or one.proto == 4]

    assert [len(ours_in(one)) for one in (there, back, direct)] == [1, 1, 1]
    assert [one.ttl for one in ours_in(arrived)] == [61, 61]
    # Its own went by the near one, out of whose tunnel it came and went on directly.
    assert (diamond.one.counter("via_near"), diamond.near.counter("via_one")) == (1, 1)


def test_probes_that_are_none_change_nothing(diamond: Diamond) -> None:
    """Recorded ones, changed ones, cut ones, and some with another key."""
    diamond.apply()
    far, core = diamond.far, diamond.core
    with heard(core, "near") as capture:

        def kinds() -> dict[int, bytes]:
            found = [one.data for one in capture.packets if probes(one.data)]
            return {wire.unpack(data[28:], KEY.encode()).kind: data for data in found}

        until(lambda: len(kinds()) == 2)
    real, answer = kinds()[wire.PROBE], kinds()[wire.ANSWER]
    datagram = real[28:]
    sender, target = (int.from_bytes(socket.inet_aton(one)) for one in (NEAR, FAR))
    known = wire.unpack(datagram, KEY.encode())
    assert (known.sender, known.target) == (sender, target)
    foreign = wire.Message(wire.PROBE, sender, target, 0, known.sequence + 10**9, bytes(8))
    changed = datagram[:20] + bytes([datagram[20] ^ 1]) + datagram[21:]

    def as_sent(data: bytes, source: str = NEAR) -> bytes:
        return bytes(IP(src=source, dst=FAR) / UDP(sport=PORT, dport=PORT) / Raw(data))

    asked = wire.pack(foreign, KEY.encode())
    cases = {
        "replayed": [real, answer] * 3,
        "forged": [as_sent(changed), as_sent(wire.pack(foreign, b"another key, quite long"))],
        "truncated": [as_sent(datagram[:-1]), as_sent(b""), as_sent(datagram[:40])],
        # The key is right, but it is somebody else who says so.
        "unexpected": [as_sent(asked, source="192.0.2.2")],
    }
    with heard(diamond.near, "core") as answers:
        for name, packets in cases.items():
            all_came = counted(far, name, told(far, name) + len(packets))
            push(core, core.links["far"], *packets)
            until(all_came)
        time.sleep(0.1)
    echoes = [one.data[28:] for one in answers.packets if probes(one.data)]
    taken = [wire.unpack(one, KEY.encode()) for one in echoes]
    assert known.sequence not in [one.sequence for one in taken if one.kind == wire.ANSWER]
    assert foreign.sequence not in [one.sequence for one in taken]
    assert diamond.ways() == ("direct", "direct") and diamond.moves() == (0, 0)
    assert not [line for line in far.asked()["log"] if "Traceback" in line]


def probes(data: bytes) -> bool:
    """Is it a datagram of an overlay?"""
    return data[9] == 17 and data[22:24] == PORT.to_bytes(2)


def test_other_tunnels_are_left_alone(diamond: Diamond) -> None:
    """Protocol 4 from somebody else is for whoever listens; what only passes, passes."""
    diamond.apply()
    near, client = diamond.near, diamond.client
    inner = packet(id=5)
    ours = bytes(IP(src="192.0.2.2", dst=NEAR, proto=4, id=1) / inner)
    foreign = bytes(IP(src=CLIENT, dst=NEAR, proto=4, id=2) / inner)
    passing = bytes(IP(src="192.0.2.2", dst=SERVER, proto=4, id=3) / inner)
    with near.ns.entered():
        listener = socket.socket(socket.AF_INET, socket.SOCK_RAW, 4)
    listener.settimeout(5 * PATIENCE)
    with listener, heard(diamond.server, "far") as arrived:
        push(client, "eth0", foreign, passing, ours)
        assert listener.recv(1 << 16)[20:] == inner
        until(lambda: len(arrived.packets) >= 2)
    found = [IP(one.data) for one in arrived.packets]
    assert sorted((one.proto, one.id) for one in found) == [(4, 3), (17, 5)]


# Size.


def transfer(client: Box, server: Box, size: int) -> None:
    """The client sends so many bytes; the server tells what it got."""
    data = bytes(range(251)) * (size // 251)
    with server.ns.entered():
        listener = socket.create_server((SERVER, 5000))
    got: list[bytes] = []

    def serve() -> None:
        with listener, listener.accept()[0] as end:
            end.settimeout(20 * PATIENCE)
            got.extend(iter(lambda: end.recv(1 << 20), b""))

    thread = threading.Thread(target=serve)
    thread.start()
    with client.ns.entered():
        link = socket.socket()
    with link:
        link.settimeout(20 * PATIENCE)
        link.connect((SERVER, 5000))
        link.sendall(data)
    thread.join()
    assert hashlib.sha256(b"".join(got)).digest() == hashlib.sha256(data).digest()


def test_full_packets_with_df_pass(diamond: Diamond) -> None:
    """The sender is told of the tunnel's MTU, and goes by it."""
    diamond.apply()
    diamond.core.die()
    diamond.settled(direct=False)
    large = packet(1500 - 28, flags="DF")
    with heard(diamond.client, "near") as back:
        push(diamond.client, "eth0", large)
        until(lambda: back.packets)
    error = IP(back.packets[0].data)
    assert (error.proto, error[ICMP].type, error[ICMP].code) == (1, 3, 4)
    assert error[ICMP].nexthopmtu == 1480
    assert bytes(error[ICMP].payload)[:20] == large[:20]
    with heard(diamond.server, "far") as arrived:
        push(diamond.client, "eth0", packet(1480 - 28, flags="DF", id=9))
        until(lambda: arrived.packets)
        assert arrived.packets[0].data[4:6] == b"\0\x09"
        transfer(diamond.client, diamond.server, 2_000_000)
    assert max(len(one.data) for one in arrived.packets) == 1480


def test_large_segments_pass(tmp_path: Path) -> None:
    """With offloads on, packets of 64 KB go through the tunnel as they are."""
    with mesh(tmp_path, LINKS, MANAGERS, HOSTS, offloads=True) as made:
        diamond = Diamond(made)
        diamond.apply()
        diamond.core.die()
        diamond.settled(direct=False)
        relay = diamond.one if diamond.near.choice(FAR) == "one" else diamond.two
        router = diamond.left if relay is diamond.one else diamond.right
        with heard(relay, router.name) as between:
            transfer(diamond.client, diamond.server, 8_000_000)
        assert max(len(one.data) for one in between.packets) > 5000


# The life of policies.


def test_life(diamond: Diamond) -> None:
    """Off, on, away, back again: each time as if nothing had been, and no drift meanwhile."""
    diamond.apply()
    near = diamond.near
    diamond.core.die()
    diamond.settled(direct=False)
    text = overlay(near)

    def leads() -> bool:
        return bool(near.elements())

    shown = near.run("status")
    assert shown.returncode == 0 and "changed by something else" not in shown.stdout
    with near.ns.entered():
        assert runtime_apply.planned(near.unit(text))[0].empty
        generation = store.Store(store.directory()).state.generation
        # Off: nobody probes, and what was chosen is gone with it.
        runtime_apply.switch(["mesh"], on=False)
        until(lambda: not near.worker() and not leads())
        runtime_apply.switch(["mesh"], on=True)
        until(leads)
        runtime_apply.switch(["outward"], on=False)
        assert near.worker()
        runtime_apply.switch(["outward"], on=True)
        until(leads)
        assert runtime_apply.planned(near.unit(text))[0].empty
        # Another file without the neighbour that is chosen; and back.
        chosen = near.choice(FAR)
        other = "two" if chosen == "one" else "one"
        fewer = "\n".join(line for line in text.splitlines() if f"neighbor {chosen}" not in line)
        near.apply(fewer)
        until(lambda: near.elements() == {"10.3.0.0/16": f"via_{other}"})
        assert set(near.paths(FAR)) == {"direct", other}
        runtime_apply.rollback(generation)
        until(lambda: set(near.paths(FAR)) == {"direct", "one", "two"} and leads())
        assert runtime_apply.planned(near.unit(text))[0].empty
        assert not any(one.drift for one in status.status())
        runtime_apply.remove(["outward"])
        runtime_apply.remove(["mesh"])
        until(lambda: not near.processes())


SLOW = """
import time
time.sleep(1.5)
def handle(packet):
    pass
"""
OTHER = """
policy other {
    at input
    interest { protocol udp dport 9 }
    classify { all }
    process { all { call "slow:handle" } }
}
"""


def test_paths_are_chosen_while_others_change_policies(diamond: Diamond) -> None:
    """For as long as handlers are imported, nobody else may change rules; choices go on."""
    diamond.apply()
    diamond.core.die()
    diamond.settled(direct=False)
    (diamond.near.folder / "slow.py").write_text(SLOW)
    with diamond.stream() as stream:
        begun = time.monotonic()
        diamond.near.apply(OTHER, "other.itm")
        stream.flowing(20)
        assert stream.gap(begun) < 0.5 * PATIENCE


def test_the_choice_outlives_a_change_of_settings(diamond: Diamond) -> None:
    diamond.apply()
    diamond.core.die()
    diamond.settled(direct=False)
    moves = diamond.moves()

    def again(box: Box) -> None:
        keyed(box, KEY[::-1])
        box.apply(overlay(box, every=0.15))

    with diamond.stream() as stream:
        begun = time.monotonic()
        diamond.mesh.everywhere(again)
        until(lambda: told(diamond.near, "returned") > 20)
        stream.flowing(20)
        assert stream.gap(begun) < 0.5 * PATIENCE
    assert diamond.moves() == moves
    assert diamond.near.state()["period"] == pytest.approx(0.15 * PATIENCE)


# Bad input.


@pytest.fixture
def box(host: Namespace, tmp_path: Path) -> Iterator[Box]:
    with host.entered():
        subprocess.run(["ip", "address", "add", f"{NEAR}/32", "dev", "lo"], check=True)
        subprocess.run(["ip", "route", "add", "192.0.2.0/24", "dev", "lo"], check=True)
    made = Box("near", host, tmp_path, NEAR)
    with commands.nothing_left():
        yield made
        assert nft.tables() == ()
        until(lambda: not commands.processes())


def shortened(box: Box) -> None:
    keyed(box, "short")


def opened(box: Box) -> None:
    keyed(box, mode=0o644)


def written(box: Box) -> None:
    keyed(box, mode=0o660)


@pytest.mark.parametrize(
    ("prepare", "change", "code", "words"),
    [
        (None, ("", ""), 3, "there is no key `mesh.key`"),
        (opened, ("", ""), 3, "the key `mesh.key` is open to others (mode 0644)"),
        (written, ("", ""), 3, "the key `mesh.key` is open to others (mode 0660)"),
        (shortened, ("", ""), 3, "`mesh.key` cannot be used"),
        (keyed, ("one 192.0.2.2", f"one {NEAR}"), 1, "the neighbour `one` is this box itself"),
        (keyed, (f"at {FAR}", f"at {FAR}\n    destination 10.3.8.0/24 at 192.0.2.2"), 1,
         "10.3.8.0/24 lies in two destinations"),
        (keyed, ("10.3.0.0/16", "192.0.2.2/31"), 1,
         "the neighbour `one` lies in the destination 192.0.2.2/31"),
        (keyed, (f"self {NEAR}", "self 192.0.2.77"), 3, "192.0.2.77 is no address of this box"),
    ],
)  # fmt: skip
def test_what_cannot_be(
    box: Box, prepare: Callable[[Box], None] | None, change: tuple[str, str], code: int, words: str
) -> None:
    if prepare is not None:
        prepare(box)
    text = overlay(box).replace(*change)
    file = box.folder / "mesh.itm"
    file.write_text(text)
    done = box.run("apply", str(file))
    assert (done.returncode, words in done.stderr) == (code, True), done.stderr
    assert "mesh.itm:" in done.stderr  # where it is
    assert "= help:" in done.stderr or "= note:" in done.stderr


def test_a_port_that_is_taken_is_told_of(box: Box) -> None:
    keyed(box)
    file = box.folder / "mesh.itm"
    file.write_text(overlay(box))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind((NEAR, PORT))
        done = box.run("apply", str(file))
    assert done.returncode == 3
    assert f"its UDP port {PORT} is taken" in commands.one_message(done)


def test_a_key_that_is_gone_is_told_of(diamond: Diamond) -> None:
    """While it runs nobody needs the file; the next process does, and until then all is direct."""
    diamond.apply()
    near = diamond.near
    (near.folder / "mesh.key").unlink()
    assert near.worker()
    near.kill([near.worker()["process"]])
    until(lambda: "there is no key `mesh.key`" in near.run("status", "mesh").stdout)
    assert not near.worker() and not near.elements()
    keyed(near)
    until(near.worker)


# Where the kernel asks whether packets come from where it would send them.


def test_strict_reverse_paths(diamond: Diamond) -> None:
    def strict(box: Box) -> None:
        set_sysctl(box.ns, "net/ipv4/conf/all/rp_filter", "1")

    diamond.mesh.everywhere(strict)
    try:
        before = diamond.mesh.everywhere(footprint)
        diamond.apply()
        diamond.core.die()
        diamond.settled(direct=False)
        with diamond.stream() as stream:
            stream.flowing(20)
        diamond.mesh.end()
        assert diamond.mesh.everywhere(footprint) == before
    finally:
        for box in diamond.mesh.managers:
            set_sysctl(box.ns, "net/ipv4/conf/all/rp_filter", "0")


# In Python.


def test_python_makes_the_same_packets(diamond: Diamond) -> None:
    """`run python`: what goes into the tunnel, and what comes out of it, byte for byte."""
    packets = [packet(id=100 + tos, tos=tos) for tos in (0, 1, 2, 3, 0xB8)]
    packets += [packet(id=200, ttl=5), packet(700, id=201, flags="DF"), packet(1452, id=202)]
    found: list[tuple[list[bytes], list[bytes]]] = []
    for place in ("", "run python"):
        diamond.apply(more=f"{BY_LOSS}\n    {place}")
        diamond.core.die()
        diamond.settled(direct=False)
        relay = diamond.one if diamond.near.choice(FAR) == "one" else diamond.two
        router = diamond.left if relay is diamond.one else diamond.right
        with heard(relay, router.name) as between, heard(diamond.server, "far") as arrived:
            push(diamond.client, "eth0", *packets)
            until(lambda: len(arrived.packets) >= len(packets))
        ours = [data for one in between.packets if (data := one.data)[9] == 4 and data[29] == 17
                and data[40:44] == b"\0\1\0\2"]  # fmt: skip
        # The outer destination differs where another relay was chosen.
        outer = [data[:10] + data[12:16] + data[20:] for data in ours]
        found.append((outer, [one.data for one in arrived.packets]))
        diamond.core.trouble()
        diamond.mesh.end()
    assert len(found[0][0]) == len(packets)
    assert found[0] == found[1]


# Discovery.


DISCOVERS = f"""\
overlay mesh {{
    self {NEAR}
    neighbor far {FAR}
    neighbor one {MANAGERS["one"]}
    neighbor two {MANAGERS["two"]}
    probe every {lasting(0.1)}
    {BY_LOSS}
    discover
    key from "mesh.key"
}}
policy outward {{
    at prerouting, output
    interest {{ daddr @mesh }}
    classify {{ all }}
    process {{ all {{ route by mesh }} }}
}}
"""


def test_networks_are_learned_and_forgotten(diamond: Diamond) -> None:
    """The far one tells what is behind it; the near one's file knows only that it is there."""
    near, far = diamond.near, diamond.far
    own = f"destination {HOSTS['server']} at {FAR}"
    texts = {
        "near": DISCOVERS,
        "far": overlay(far).replace("key from", f"{own}\n    key from"),
        "one": overlay(diamond.one),
        "two": overlay(diamond.two),
    }

    def one(box: Box) -> None:
        keyed(box)
        box.apply(texts[box.name])

    diamond.mesh.everywhere(one)
    until(lambda: diamond.known(near, FAR))
    diamond.core.die()
    until(lambda: list(near.elements()) == ["10.3.0.0/16"], 30)
    with diamond.stream() as stream:
        stream.flowing(20)
    far.apply(overlay(far))
    until(lambda: not near.state()["egresses"], 30)
    until(lambda: not near.elements())
    time.sleep(0.5)
    assert not near.elements()
