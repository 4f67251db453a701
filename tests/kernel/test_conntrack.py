"""The model of connection tracking against the kernel's, packet by packet."""

import time
from collections import Counter
from collections.abc import Iterator
from random import Random

import pytest

from itmlang.conntrack import Connection, Conntrack
from itmlang.packet import Packet
from runtime.lab import Network
from runtime.traffic import TrafficError
from tests.support.connections import (
    ACK,
    FIN,
    GRE,
    HOPS_OF_THE_LOST,
    ICMP,
    ICMPV6,
    RST,
    SCRIPTS,
    SCTP,
    SYN,
    TCP,
    UDP,
    URG,
    gre,
    host,
    icmp,
    ip,
    said,
    sctp,
    tcp,
    udp,
)  # fmt: skip
from tests.support.kernel import Exchange, Wire
from tests.support.needs import unavailable

SAYINGS = (
    "invalid", "untracked", "new", "established", "established reply", "related", "related reply",
)  # fmt: skip
RANDOM_PACKETS = 3000
TCP_NAMES = dict(zip("NSREFWLTCD", (
    "NONE", "SYN_SENT", "SYN_RECV", "ESTABLISHED", "FIN_WAIT", "CLOSE_WAIT", "LAST_ACK",
    "TIME_WAIT", "CLOSE", "SYN_SENT2",
), strict=True))  # fmt: skip
SCTP_NAMES = dict(zip("NCWKESRAH", (
    "NONE", "CLOSED", "COOKIE_WAIT", "COOKIE_ECHOED", "ESTABLISHED", "SHUTDOWN_SENT",
    "SHUTDOWN_RECD", "SHUTDOWN_ACK_SENT", "HEARTBEAT_SENT",
), strict=True))  # fmt: skip


LIMIT, CONNECTIONS = 3, 60  # of one client, for `ct count`


def ruleset() -> str:
    """Write into each packet what conntrack says of it, and count that; then lose some.

    New connections beyond `LIMIT` of one address are counted too.
    """
    counters, rules = [], []
    for number, saying in enumerate(SAYINGS, 1):
        state, _, reply = saying.partition(" ")
        tracked = f"ct direction {reply or 'original'}" if number > 2 else ""
        counters.append(f"counter said{number} {{ }}")
        rules += [
            f"ct state {state} {tracked} counter name said{number}",
            f"ct state {state} {tracked} ip dscp set {number}",
            f"ct state {state} {tracked} ip6 dscp set {number}",
        ]
    lost = HOPS_OF_THE_LOST - 1
    return "\n".join((
        "table inet itm_conntrack {", *counters, "counter over { }",
        "set connections { type ipv4_addr; size 100; flags dynamic; }",
        "chain says { type filter hook prerouting priority -150;", *rules,
        f"ct state new add @connections {{ ip saddr ct count over {LIMIT} }} counter name over", "}",
        "chain loses { type filter hook forward priority 0;",
        f"ip ttl {lost} drop", f"ip6 hoplimit {lost} drop", "}", "}", "",
    ))  # fmt: skip


class Kernel:
    """What the manager's conntrack says, and which connections it has."""

    def __init__(self, wire: Wire, exchange: Exchange) -> None:
        self._wire, self._exchange = wire, exchange
        self.counted: Counter[str] = Counter()

    def says(self, data: bytes) -> str:
        if hops(data) == HOPS_OF_THE_LOST:
            self._wire.send(data, "forward")
            deadline = time.monotonic() + 1
            before = self.counted
            while self._count() == before and time.monotonic() < deadline:
                pass
            (saying,) = self.counted - before
            return saying
        arrival = self._exchange.pass_on(data, "forward", 0, True)
        assert arrival is not None, f"lost: {data.hex()}"
        saying = SAYINGS[Packet(bytearray(arrival.data)).dscp - 1]
        self.counted[saying] += 1
        return saying

    def _count(self) -> Counter[str]:
        counters = self._wire.counters("inet itm_conntrack")
        self.counted = Counter({s: counters[f"said{n}"] for n, s in enumerate(SAYINGS, 1)})
        return self.counted

    def over(self) -> int:
        """The packets of connections beyond the limit so far."""
        return self._wire.counters("inet itm_conntrack")["over"]

    def connections(self) -> dict[tuple[str, ...], tuple[int, str]]:
        """The time left (seconds) and the state of each connection, by its original direction."""
        with (
            self._wire.network.manager.entered(),
            open("/proc/thread-self/net/nf_conntrack", encoding="ascii") as file,
        ):
            lines = file.read().splitlines()
        found = {}
        for line in lines:
            _, _, _, protocol, left, *rest = line.split()
            state = rest.pop(0) if "=" not in rest[0] else ""
            words = [word.partition("=") for word in rest]
            values = [value for name, _, value in words if value and "timeout" not in name]
            end = {"6": 4, "17": 4, "132": 4, "47": 4, "1": 5, "58": 5}.get(protocol, 2)
            found[protocol, *values[:end]] = int(left), state
        return found


def hops(data: bytes) -> int:
    return data[8] if data[0] >> 4 == 4 else data[7]


def listed(connection: Connection) -> tuple[str, ...]:
    """A connection's original direction as the kernel lists it."""
    family, protocol, source, destination, first, second = connection.keys[0]
    size = 4 if family == 4 else 16
    ends = [address_text(value.to_bytes(size)) for value in (source, destination)]
    rest: list[str]
    match protocol:
        case 6 | 17 | 132:
            rest = [str(first), str(second)]
        case 47:
            rest = [f"{first:#x}", f"{second:#x}"]
        case 1 | 58:
            rest = [str(second >> 8), str(second & 255), str(first)]
        case _:
            rest = []
    return (str(protocol), *ends, *rest)


def address_text(raw: bytes) -> str:
    if len(raw) == 4:
        return ".".join(map(str, raw))
    return ":".join(raw[i : i + 2].hex() for i in range(0, 16, 2))


@pytest.fixture
def own_wire() -> Iterator[Wire]:
    """A wire of one's own: its conntrack has seen nothing yet."""
    try:
        entered = Network().__enter__()
    except TrafficError as error:
        unavailable(error)
    with entered as network, Wire(network) as wire:
        yield wire


@pytest.fixture
def kernel(own_wire: Wire) -> Iterator[Kernel]:
    with own_wire.loaded(ruleset()) as exchange:
        yield Kernel(own_wire, exchange)


class Model:
    """The model beside it; it keeps all connections it ever told of."""

    def __init__(self) -> None:
        self._conntrack = Conntrack()
        self.seen: dict[int, Connection] = {}

    def says(self, data: bytes) -> str:
        now = time.monotonic()
        tracked = self._conntrack.track(Packet(bytearray(data)), now)
        if hops(data) != HOPS_OF_THE_LOST:
            self._conntrack.confirm(tracked, now)
        if tracked.connection is not None:
            self.seen[tracked.connection.number] = tracked.connection
        return said(tracked)

    def kept(self) -> list[Connection]:
        now = time.monotonic()
        return [connection for connection in self.seen.values() if now < connection.expires]


def assert_same_connections(kernel: Kernel, model: Model) -> None:
    """Both have the same connections, in the same states, for about the same time."""
    try:
        theirs = kernel.connections()
    except FileNotFoundError:
        pytest.skip("this kernel does not list its connections in /proc")
    ours = {listed(connection): connection for connection in model.kept()}
    assert theirs.keys() == ours.keys()
    now = time.monotonic()
    for key, (left, state) in theirs.items():
        connection = ours[key]
        names = {"6": TCP_NAMES, "132": SCTP_NAMES}.get(key[0])
        if names is not None:
            assert names[connection.state] == state, key
        # The kernel counts the two seconds to a stream of UDP in jiffies, so near them it may
        # have seen the last packet on the other side.
        age = connection.expires - connection.timeout - connection.opened
        if key[0] != "17" or abs(age - 2) > 0.05:
            assert connection.expires - now == pytest.approx(left, abs=1.5), key


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(kernel: Kernel, name: str) -> None:
    model = Model()
    for number, step in enumerate(SCRIPTS[name]):
        assert kernel.says(step.data) == step.said, f"packet {number}: {step.data.hex()}"
        assert model.says(step.data) == step.said, f"packet {number}: {step.data.hex()}"
    assert_same_connections(kernel, model)


def test_a_stream_of_udp_lives_longer(kernel: Kernel) -> None:
    model = Model()
    packets = [step.data for step in SCRIPTS["udp 4"][1:4]]
    for data in packets:
        assert model.says(data) == kernel.says(data)
    time.sleep(2.1)
    for data in packets[1:]:
        assert model.says(data) == kernel.says(data)
        assert_same_connections(kernel, model)


def test_closed_connections_are_not_counted(kernel: Kernel) -> None:
    random = Random(7)
    model = Model()
    client, server = host(4, 1), host(4, 2)

    def exchange(ports: tuple[int, int], text: str) -> None:
        """TCP of the client (in upper case) and the server: Syn, Ack, Fin, Rst."""
        for letter in text:
            flags = {"s": SYN, "a": 0, "f": FIN, "r": RST}[letter.lower()] | ACK
            if letter.isupper():
                data = ip(client, server, TCP, tcp(ports, flags))
            else:
                data = ip(server, client, TCP, tcp((ports[1], ports[0]), flags))
            assert model.says(data) == kernel.says(data)

    over = 0
    for number in range(CONNECTIONS):
        # In one jiffy the kernel looks only once for connections that are gone.
        time.sleep(0.025)
        living = [one for one in model.kept() if one.alive(time.monotonic())]
        over += len(living) >= LIMIT
        ports = 2000 + number, 80
        protocol, transport = random.choice(((TCP, tcp(ports, SYN)), (UDP, udp(ports))))
        lost = random.random() < 0.3
        data = ip(client, server, protocol, transport, HOPS_OF_THE_LOST if lost else 64)
        assert model.says(data) == kernel.says(data) == "new"
        assert kernel.over() == over, f"connection {number}, with {len(living)} others"
        if protocol == TCP and not lost:
            exchange(ports, "sA")
        established = [one for one in living if one.state == "E"]
        if len(living) >= LIMIT and established:
            *_, first, second = random.choice(established).keys[0]
            exchange((first, second), random.choice(("R", "r", "FfA", "faFa")))
    assert 0 < over < CONNECTIONS


def random_packet(random: Random) -> bytes:
    family = random.choice((4, 6))
    there = random.random() < 0.5
    source, destination = (host(family, side, random.randint(1, 2)) for side in (1, 2))
    ports = random.choice((1000, 1001, 1002)), 80
    if not there:
        source, destination, ports = destination, source, ports[::-1]
    answer = (0 if family == 4 else 129) if random.random() < 0.5 else (8 if family == 4 else 128)
    protocol = random.choice((TCP,) * 6 + (UDP, SCTP, GRE, ICMP, ICMPV6))
    if protocol == TCP:
        flags = random.choice(
            (SYN, SYN | ACK, ACK, ACK, ACK | URG, FIN | ACK, FIN | ACK, RST, RST | ACK, 0, FIN, 63)
        )
        # Other windows, or an acknowledgement would be taken for one sent again.
        transport = tcp(ports, flags, random.randint(1000, 65535))
    elif protocol == UDP:
        transport = udp(ports, bytes(random.randint(0, 9)))[: random.choice((6, 99, 99, 99))]
    elif protocol == SCTP:
        transport = sctp(ports, *random.choices(range(15), k=random.choice((1, 1, 1, 2))))
    elif protocol == GRE:
        transport = gre(random.choice((None, 0, 1)))
    elif random.random() < 0.5:
        transport = icmp(random.choice((answer, 135)), random.randint(1, 2), payload=bytes(16))
    else:
        inner = random.choice((
            (UDP, udp(ports[::-1])), (TCP, tcp(ports[::-1], ACK)), (protocol, icmp(8)), (GRE, gre()),
        ))  # fmt: skip
        quoted = ip(random.choice((destination, host(family, 1))), source, *inner)
        transport = icmp(random.choice((1, 3, 4, 5, 11, 12)), 0, 0, quoted)
    lost = random.random() < 0.02
    return ip(source, destination, protocol, transport, HOPS_OF_THE_LOST if lost else 64)


def test_random_packets(kernel: Kernel) -> None:
    random = Random(2026)
    model = Model()
    for number in range(RANDOM_PACKETS):
        data = random_packet(random)
        ours = model.says(data)
        assert kernel.says(data) == ours, f"packet {number}: {data.hex()}"
        if number % 300 == 299:
            assert_same_connections(kernel, model)
    print(f"{RANDOM_PACKETS} packets agree: {dict(kernel.counted)}")
    assert all(kernel.counted[saying] > RANDOM_PACKETS / 200 for saying in SAYINGS)
