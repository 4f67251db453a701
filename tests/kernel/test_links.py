"""Links in the kernel: real packets from a box to a peer, in namespaces of their own.

What takes how long is judged by what a rate allows at least; how classes share, by the order in
which packets arrive.
"""

import json
import os
import re
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from itmlang.links import Link, LinkClass
from itmlang.source import Source, Span
from runtime import links, nft, qdisc, trees
from runtime.errors import MachineError
from runtime.links import Before
from runtime.traffic import Namespace, TrafficError, add_address, veth
from tests.support.commands import PATIENCE
from tests.support.needs import unavailable

NOWHERE = Span(Source("a.itm", ""), 0, 0)
PORT = 4000
SIZE = 1000  # bytes of payload
FRAME = SIZE + 8 + 20 + 14
EF, CS1 = 46, 8
WAIT = 5.0 * PATIENCE  # seconds until what does not come is missing
SO_PRIORITY, IPV6_TCLASS = 12, 67


def one_class(name: str, number: int, priority: int, most: int, **others: Any) -> LinkClass:
    # fq_codel drops what waits for long, and so changes who comes when.
    given = {"least": 0, "queue": 400, "inner": "fifo", "dscp": ()} | others
    return LinkClass(name=name, number=number, priority=priority, most=most, span=NOWHERE, **given)


def link(rate: int = 100_000, *classes: LinkClass, **others: Any) -> Link:
    given = {"name": "wan", "interface": "eth0", "ingress": False, "handle": 0x1234,
             "otherwise": 0x20} | others  # fmt: skip
    two = (
        one_class("interactive", 0x10, 0, rate, dscp=(EF,)),
        one_class("bulk", 0x20, 1, rate, dscp=(CS1,)),
    )
    return Link(rate=rate, classes=classes or two, at=NOWHERE, span=NOWHERE, **given)


def put(*wanted: Link, earlier: Before | None = None) -> Before:
    """As a caller does it: what was there is stored, as JSON, before anything is changed."""
    stored: Before = json.loads(json.dumps(links.before(wanted, earlier)))
    return links.put(wanted, stored).before


def tc(command: str) -> str:
    done = subprocess.run(["tc", *command.split()], capture_output=True, text=True)
    assert done.returncode == 0, f"tc {command}: {done.stderr}"
    return done.stdout


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)


def queues(*devices: str) -> str:
    """All that tc tells of devices' queues."""
    return "".join(
        tc(f"-d {what} show dev {device} {way}")
        for device in devices
        for what, way in (("qdisc", ""), ("class", ""), ("filter", ""),
                          ("filter", "ingress"), ("filter", "egress"))
    )  # fmt: skip


def devices() -> str:
    return subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout


@pytest.fixture
def ends() -> Iterator[tuple[Namespace, Namespace]]:
    """The box, which the test is in, and a peer."""
    try:
        box, peer = Namespace.create("box"), Namespace.create("peer")
        veth(box, "eth0", peer, "eth0")
    except TrafficError as error:
        unavailable(error)
    for number, place in enumerate((box, peer), 1):
        add_address(place, "eth0", f"10.0.0.{number}/24")
        add_address(place, "eth0", f"fd00::{number}/64")
    with box.entered():
        yield box, peer
    for place in (box, peer):
        place.close()


def receiver(place: Namespace) -> socket.socket:
    with place.entered():
        one = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    one.setsockopt(socket.SOL_SOCKET, 33, 1 << 22)  # SO_RCVBUFFORCE
    one.bind(("::", PORT))
    one.settimeout(WAIT)
    return one


def send(place: Namespace, what: bytes, number: int = 1, *, to: str, dscp: int = 0,
         priority: int = 0, size: int = SIZE) -> None:  # fmt: skip
    family = socket.AF_INET6 if ":" in to else socket.AF_INET
    with place.entered():
        sender = socket.socket(family, socket.SOCK_DGRAM)
    with sender:
        # The waiting packets are the sender's: it must not be held up.
        sender.setsockopt(socket.SOL_SOCKET, 32, 1 << 22)  # SO_SNDBUFFORCE
        if family == socket.AF_INET6:
            sender.setsockopt(socket.IPPROTO_IPV6, IPV6_TCLASS, dscp << 2)
        else:
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, dscp << 2)
        sender.setsockopt(socket.SOL_SOCKET, SO_PRIORITY, priority)
        for _ in range(number):
            sender.sendto(what.ljust(size, b"."), (to, PORT))


def received(one: socket.socket, number: int) -> str:
    """The first letters of what comes, in its order."""
    return "".join(one.recv(2000)[:1].decode() for _ in range(number))


def counted(wanted: Link, interface: str = "eth0") -> dict[str, int]:
    found = links.stats([wanted])[wanted.name, interface]
    return {name: counts.packets for name, counts in found.items() if name}


def took(box: Namespace, peer: Namespace, number: int) -> float:
    with receiver(peer) as there:
        begin = time.monotonic()
        send(box, b"x", number, to="10.0.0.2")
        received(there, number)
        return time.monotonic() - begin


# What packets find.


def test_a_link_is_shaped_to_its_rate(ends):
    put(link(250_000))
    number = 200
    least = number * FRAME / 250_000
    seconds = took(*ends, number)
    # What may be saved up comes at once; a machine that is busy is late.
    assert least * 0.95 < seconds < least * 3 * PATIENCE


def test_a_class_is_held_to_its_ceiling(ends):
    rate = 10_000_000
    put(link(rate, one_class("a", 0x10, 0, rate), one_class("b", 0x20, 1, 250_000)))
    assert took(*ends, 200) > 200 * FRAME / 250_000 * 0.95


def test_the_best_class_goes_first(ends):
    box, peer = ends
    put(link(100_000))
    with receiver(peer) as there:
        send(box, b"bulk", 60, to="10.0.0.2")
        send(box, b"short", 20, to="10.0.0.2", dscp=EF)
        order = received(there, 80)
    # A bulk packet or two wait in the device, and each class has a little of its own.
    assert order[: order.rindex("s")].count("b") < 12, order


def test_classes_of_one_priority_share(ends):
    box, peer = ends
    put(
        link(
            100_000, one_class("a", 0x10, 1, 100_000, dscp=(EF,)), one_class("b", 0x20, 1, 100_000)
        )
    )
    with receiver(peer) as there:
        send(box, b"b", 60, to="10.0.0.2")
        send(box, b"a", 60, to="10.0.0.2", dscp=EF)
        order = received(there, 120)
    assert 20 < order[:80].count("a") < 60


def test_a_guarantee_is_kept_before_the_best_class(ends):
    box, peer = ends
    rate = 100_000
    put(link(rate, one_class("a", 0x10, 0, rate, dscp=(EF,)),
             one_class("b", 0x20, 1, rate, least=50_000)))  # fmt: skip
    with receiver(peer) as there:
        send(box, b"a", 100, to="10.0.0.2", dscp=EF)
        send(box, b"b", 100, to="10.0.0.2")
        order = received(there, 100)
    assert 35 < order.count("b") < 65, order


def raw(place: Namespace, protocol: int, body: bytes) -> None:
    with place.entered():
        one = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, protocol)
    with one:
        one.bind(("eth0", protocol))
        one.send(bytes(12) + struct.pack("!H", protocol) + body)


def neighbours(kind: int) -> bytes:
    """An ICMPv6 message of a type, in a header of IPv6."""
    return struct.pack("!IHBB", 6 << 28, 24, 58, 255) + bytes(32) + bytes([kind]) + bytes(23)


@pytest.mark.parametrize("ingress", [False, True])
def test_each_packet_finds_its_class(ends, ingress):
    box, peer = ends
    wanted = link(10_000_000, ingress=ingress)
    put(wanted)
    source, to4, to6 = (peer, "10.0.0.1", "fd00::1") if ingress else (box, "10.0.0.2", "fd00::2")
    best, other = {"interactive": 1, "bulk": 0}, {"interactive": 0, "bulk": 1}
    # (what is sent, the class it is in); IPv6 needs to know no neighbour on these links.
    cases = [
        (lambda: send(source, b"", to=to4, dscp=EF), best),
        (lambda: send(source, b"", to=to6, dscp=EF), best),
        (lambda: send(source, b"", to=to4, dscp=CS1), other),
        (lambda: send(source, b"", to=to6, dscp=CS1), other),
        (lambda: send(source, b"", to=to4), other),
        (lambda: send(source, b"", to=to6), other),
        (lambda: send(source, b"", to=to4, dscp=EF + 1), other),
        (lambda: raw(source, 0x0806, bytes(28)), best),
        (lambda: raw(source, 0x88CC, bytes(46)), best),
        (lambda: raw(source, 0x88B5, bytes(46)), other),  # anything
        (lambda: raw(source, 0x86DD, neighbours(135)), best),
        (lambda: raw(source, 0x86DD, neighbours(136)), best),
        (lambda: raw(source, 0x86DD, neighbours(128)), other),
    ]
    if not ingress:  # a policy said so
        cases.append((lambda: send(box, b"", to=to4, priority=0x1234_0010), best))
        cases.append((lambda: send(box, b"", to=to4, dscp=EF, priority=0x1234_0020), other))
    before = counted(wanted)
    for number, (sent, expected) in enumerate(cases):
        sent()
        deadline = time.monotonic() + WAIT
        while (now := counted(wanted)) == before and time.monotonic() < deadline:
            time.sleep(0.001)
        assert {name: now[name] - before[name] for name in now} == expected, number
        before = now


def test_what_comes_in_is_shaped_and_arrives_once(ends):
    box, peer = ends
    put(link(250_000, ingress=True))
    nft.load(
        "table inet t {\ncounter seen {\n}\nchain c { type filter hook prerouting priority 0; "
        f'udp dport {PORT} counter name "seen"\n}}\n}}\n'
        "table netdev t {\ncounter seen {\n}\n"
        'chain c { type filter hook ingress device "eth0" priority 0; counter name "seen"\n}\n}\n'
    )
    with receiver(box) as here:
        begin = time.monotonic()
        send(peer, b"x", 200, to="10.0.0.1")
        received(here, 200)
        seconds = time.monotonic() - begin
    assert seconds > 200 * FRAME / 250_000 * 0.95
    assert nft.counters("inet t")["seen"][0] == 200
    # As this module says; if this changes, so may what the language refuses.
    assert nft.counters("netdev t")["seen"][0] == 0


def test_several_links_at_one_interface(ends):
    box, peer = ends
    both = [link(10_000_000), link(10_000_000, name="in", ingress=True, handle=0x2345)]
    put(*both)
    with receiver(peer) as there, receiver(box) as here:
        send(box, b"x", 3, to="10.0.0.2")
        send(peer, b"x", 4, to="10.0.0.1")
        received(there, 3)
        received(here, 4)
    assert [counted(one)["bulk"] for one in both] == [3, 4]
    found = links.stats(both)
    assert {key: set(counts) for key, counts in found.items()} == {
        (name, "eth0"): {"", "interactive", "bulk"} for name in ("wan", "in")
    }
    assert found["in", "eth0"][""].bytes == 4 * FRAME


# Changes.


def full(box: Namespace, peer: Namespace, wanted: Link) -> links.Counts:
    """Let 50 packets wait in its class bulk."""
    send(box, b"x", 50, to="10.0.0.2")
    counts = links.stats([wanted])["wan", "eth0"]["bulk"]
    assert counts.waiting > 40 and counts.waiting_bytes == counts.waiting * FRAME
    return counts


SLOW = int(20_000 / PATIENCE)


@pytest.mark.parametrize(
    "changed",
    [
        {"rate": 2 * SLOW},
        {"least": SLOW // 4},
        {"most": SLOW // 2},
        {"queue": 300},
        {"dscp": (CS1, 10)},
        {"otherwise": 0x10},
        {"more": one_class("new", 0x30, 2, SLOW)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_change_keeps_what_waits_and_what_was_counted(ends, changed):
    old = link(SLOW)
    stored = put(old)
    before = full(*ends, old)
    new = old
    if "rate" in changed:
        new = links.at_rate(old, changed["rate"])
    elif "otherwise" in changed:
        new = replace(old, **changed)
    elif "more" in changed:
        new = replace(old, classes=(*old.classes, changed["more"]))
    else:
        new = replace(old, classes=(old.classes[0], replace(old.classes[1], **changed)))
    assert links.wrong([new])["wan"]
    stored = put(new, earlier=stored)
    assert links.wrong([new]) == {"wan": []}
    after = links.stats([new])["wan", "eth0"]["bulk"]
    assert after.waiting >= before.waiting - 8 and after.packets >= before.packets
    assert after.drops == 0
    put(old, earlier=stored)
    assert links.wrong([old]) == {"wan": []}
    assert links.stats([old])["wan", "eth0"]["bulk"].waiting >= before.waiting - 16


@pytest.mark.parametrize("before, after, first", [((3, 1), (3, 5), "s"), ((1, 3), (1, 0), "x")])
def test_a_changed_priority_counts_at_once(ends, before, after, first):
    """Also of a class that is never empty: the kernel alone would leave that at its old one."""
    box, peer = ends
    old = link(SLOW)

    def at(priorities: tuple[int, int]) -> Link:
        pairs = zip(old.classes, priorities, strict=True)
        return replace(old, classes=tuple(replace(one, priority=n) for one, n in pairs))

    stored = put(at(before))
    counts = full(box, peer, old)
    put(at(after), earlier=stored)
    now = links.stats([old])["wan", "eth0"]["bulk"]
    assert now.waiting == 0 and now.packets >= counts.packets
    with receiver(peer) as there:
        send(box, b"x", 40, to="10.0.0.2")
        send(box, b"s", 40, to="10.0.0.2", dscp=EF)
        order = received(there, 40)
    assert order[10:].count(first) > 24, order


def test_a_removed_class_goes_and_its_packets_go_elsewhere(ends):
    box, peer = ends
    old = link(10_000_000)
    stored = put(old)
    new = replace(old, classes=old.classes[1:])
    put(new, earlier=stored)
    assert links.wrong([new]) == {"wan": []}
    assert "1234:10 " not in tc("class show dev eth0")
    with receiver(peer) as there:
        send(box, b"x", to="10.0.0.2", priority=0x1234_0010)
        send(box, b"x", to="10.0.0.2", dscp=EF)
        received(there, 2)
    assert counted(new) == {"bulk": 2}


def test_to_put_twice_changes_nothing(ends, monkeypatch):
    both = [link(), link(name="in", ingress=True, handle=0x2345)]
    stored = put(*both)
    before = queues("eth0", "itm-eth0")
    asked = []
    monkeypatch.setattr(qdisc, "request", lambda *given: asked.append(given))
    assert put(*both, earlier=stored) == stored
    assert asked == []
    assert queues("eth0", "itm-eth0") == before


def test_set_rate_changes_what_follows_the_rate(ends):
    wanted = link(100_000, one_class("a", 0x10, 0, 100_000), one_class("b", 0x20, 1, 30_000))
    put(wanted)
    for rate in (50_000, 20_000, 200_000):
        links.set_rate(wanted, "eth0", rate)
        assert links.wrong([links.at_rate(wanted, rate)]) == {"wan": []}
    assert links.wrong([wanted])["wan"]
    with pytest.raises(MachineError, match="link wan at eth9: cannot set its rate"):
        links.set_rate(wanted, "eth9", 1000)
    # Nothing is made by it.
    tc("qdisc del dev eth0 root")
    with pytest.raises(MachineError, match="link wan at eth0: cannot set its rate"):
        links.set_rate(wanted, "eth0", 1000)


def test_at_rate():
    wanted = link(
        100, one_class("a", 0x10, 0, 100, least=20), one_class("b", 0x20, 1, 50, least=60)
    )

    def at(rate: int) -> list[tuple[int, int]]:
        found = links.at_rate(wanted, rate)
        assert found.rate == rate
        return [(one.least, one.most) for one in found.classes]

    assert at(200) == [(20, 200), (60, 50)]
    assert at(90) == [(20, 90), (60, 50)]
    assert at(40) == [(10, 40), (30, 40)]
    assert links.at_rate(wanted, 100) == wanted


@pytest.mark.parametrize("rate", [100, 1_000, 4_294_967_295, 4_294_967_296, 50_000_000_000])
def test_rates_are_what_they_are(ends, rate):
    wanted = link(rate, one_class("a", 0x10, 0, rate, least=rate), one_class("b", 0x20, 7, rate))
    put(wanted)
    assert links.wrong([wanted]) == {"wan": []}
    shape = qdisc.classes(socket.if_nametoindex("eth0"))[0x1234_0010].shape
    assert (shape.rate, shape.ceiling) == (rate, rate)


def test_waiting_packets_are_bounded_by_the_ceiling(ends):
    classes = [one_class(str(n), 0x10 * n, 0, most, queue=queue)
               for n, (most, queue) in enumerate([(1000, 0), (1_500_000, 0), (10**9, 0), (1000, 7)], 1)]  # fmt: skip
    put(link(10**9, *classes))
    found = [line.split() for line in tc("qdisc show dev eth0").splitlines() if "pfifo" in line]
    limits = {words[words.index("parent") + 1]: words[-1] for words in found}
    assert limits == {"1234:10": "50p", "1234:20": "100p", "1234:30": "1000p", "1234:40": "7p"}


def test_the_inner_queue_is_what_the_kernel_has(ends):
    put(link(1000, one_class("a", 0x20, 0, 1000, inner="")))
    kinds = {one.kind for one in qdisc.qdiscs() if one.parent == 0x1234_0020}
    wanted = link(1000, one_class("a", 0x20, 0, 1000, inner="fq_codel"))
    if kinds == {"fq_codel"}:
        put(wanted)
        assert links.wrong([wanted]) == {"wan": []}
        return
    assert kinds == {"pfifo"}
    with pytest.raises(MachineError) as caught:
        put(wanted)
    assert caught.value.message.startswith(
        "link wan at eth0: cannot give class a its queue (fq_codel): No such file or directory"
    )
    assert "itmc doctor" in caught.value.help


def test_after_a_refusal_the_old_links_come_back(ends, monkeypatch):
    stored = put(old := link())
    new = link(50_000, one_class("a", 0x20, 0, 50_000), one_class("c", 0x30, 0, 50_000))
    both: Before = links.before([new], stored)
    put_class = qdisc.put_class

    def refusing(device: int, handle: int, *given: Any, **others: Any) -> None:
        if handle == 0x1234_0030:
            raise OSError(12, "Cannot allocate memory")
        put_class(device, handle, *given, **others)

    monkeypatch.setattr(qdisc, "put_class", refusing)
    with pytest.raises(MachineError) as caught:
        links.put([new], both)
    assert caught.value.message == (
        "link wan at eth0: cannot give class c its rate: Cannot allocate memory"
    )
    assert links.wrong([old])["wan"]
    monkeypatch.undo()
    links.put([old], both)
    assert links.wrong([old]) == {"wan": []}


# Others' queues.

FOREIGN = {
    "tbf": ["qdisc add dev eth0 root handle 7: tbf rate 1mbit burst 4000 limit 9000"],
    "htb": [
        "qdisc add dev eth0 root handle 1: htb default 20 r2q 20",
        "class add dev eth0 parent 1: classid 1:1 htb rate 8mbit burst 9k",
        "class add dev eth0 parent 1:1 classid 1:20 htb rate 1mbit ceil 8mbit prio 2 quantum 3000",
        "class add dev eth0 parent 1:1 classid 1:10 htb rate 40gbit ceil 50gbit",
        "qdisc add dev eth0 parent 1:10 handle 10: pfifo limit 77",
        "qdisc add dev eth0 parent 1:20 handle 20: tbf rate 1mbit burst 4000 limit 9000",
        # The second preference gets the first table of u32.
        "filter add dev eth0 parent 1: pref 9 protocol ip u32 match ip dport 53 0xffff flowid 1:10",
        "filter add dev eth0 parent 1: pref 5 protocol ip u32 match ip tos 0xb8 0xfc "
        "match ip dst 10.0.0.0/8 flowid 1:10",
        "filter add dev eth0 parent 1: pref 5 protocol ip u32 match ip dport 80 0xffff flowid 1:20",
        "filter add dev eth0 parent 1: pref 7 protocol ip handle 2: u32 divisor 16",
        "filter add dev eth0 parent 1: pref 7 protocol ip u32 ht 2:5: match ip sport 1 0xffff "
        "flowid 1:20",
        "filter add dev eth0 parent 1: pref 7 protocol ip u32 link 2: hashkey mask 0xff at 16 "
        "match ip dst 10.9.0.0/16",
        "filter add dev eth0 parent 1:1 pref 3 protocol ip u32 match u32 0 0 flowid 1:20",
    ],
    "mirred": [
        "qdisc add dev eth0 root handle 1: htb default 20",
        "class add dev eth0 parent 1: classid 1:20 htb rate 1mbit",
        "filter add dev eth0 parent 1: pref 1 protocol ip u32 match ip dport 9 0xffff "
        "action mirred egress redirect dev lo",
    ],
    "fifo": ["qdisc add dev eth0 root handle 1: pfifo limit 5"],
    "no handle": ["qdisc add dev eth0 root pfifo limit 5"],
    "prio": [
        "qdisc add dev eth0 root handle 1: prio bands 4",
        "qdisc add dev eth0 parent 1:2 handle 2: pfifo limit 6",
        "filter add dev eth0 parent 1: pref 1 protocol ip u32 match ip tos 0xb8 0xfc flowid 1:1",
    ],
}  # fmt: skip


if not os.uname().release.endswith("-amd64"):  # Debian's kernels have it, others may not
    del FOREIGN["prio"]


def without_index(text: str) -> str:
    """Actions have an index in their namespace, which the kernel may give to others."""
    return re.sub(r"index \d+ ref", "index N ref", text)


def set_up(name: str) -> str:
    for command in FOREIGN[name]:
        done = subprocess.run(["tc", *command.split()], capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    return queues("eth0")


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_tree_comes_back(ends, name):
    before = set_up(name)
    wanted = link()
    root = FOREIGN[name][0].split()
    assert links.foreign([wanted]) == {
        "eth0": next(w for w in root if w in ("tbf", "htb", "pfifo", "prio"))
    }
    stored = put(wanted)
    assert links.foreign([wanted], stored) == {}
    assert links.foreign([replace(wanted, handle=0x2000)], stored) == {}
    assert links.wrong([wanted]) == {"wan": []}
    # What is stored later is still what was there at first.
    stored = put(link(50_000), earlier=stored)
    assert links.take_away(stored) == ()
    assert without_index(queues("eth0")) == without_index(before)
    assert links.foreign([wanted]) != {}
    # Once more: it is not ours, so nothing is done.
    before = queues("eth0")
    assert links.take_away(stored) == ()
    assert queues("eth0") == before


def test_the_tree_of_a_link_that_goes_comes_back_and_the_others_stay(ends):
    box, _ = ends
    veth(box, "eth1", box, "eth2")
    before = set_up("htb")
    two = link(interface="eth1", name="two", handle=0x2345)
    stored = put(link(), two)
    stored = put(two, earlier=stored)
    assert queues("eth0") == before
    assert set(stored["egress"]) == {"eth1"}
    assert links.wrong([two]) == {"two": []}


@pytest.mark.parametrize("how_many", range(1, len(FOREIGN["htb"]) - 1))
def test_who_is_killed_while_putting_back_is_taken_up(ends, monkeypatch, how_many):
    before = set_up("htb")
    stored = put(link())
    body, done = qdisc.put_body, []

    def dying(*given: Any) -> None:
        if len(done) == how_many:
            raise KeyboardInterrupt
        done.append(given)
        body(*given)

    monkeypatch.setattr(qdisc, "put_body", dying)
    with pytest.raises(KeyboardInterrupt):
        links.take_away(stored)
    monkeypatch.undo()
    assert queues("eth0") != before
    assert links.take_away(stored) == ()
    assert queues("eth0") == before


def test_what_somebody_else_set_since_stays(ends):
    set_up("fifo")
    stored = put(link())
    tc("qdisc replace dev eth0 root handle 9: tbf rate 1mbit burst 4000 limit 9000")
    before = queues("eth0")
    assert links.wrong([link()])["wan"] == ["its root qdisc is tbf 9:0 at eth0"]
    assert links.foreign([link()], stored) == {"eth0": "tbf"}
    assert links.take_away(stored) == ()
    assert queues("eth0") == before


def test_what_cannot_come_back_is_told(ends, monkeypatch):
    set_up("htb")
    stored = put(link())
    body = qdisc.put_body

    def refusing(message: int, *given: Any) -> None:
        if message == qdisc.NEW_FILTER:
            raise OSError(22, "Invalid argument")
        body(message, *given)

    monkeypatch.setattr(qdisc, "put_body", refusing)
    told = links.take_away(stored)
    assert told[0] == "eth0: the filter u32 of 1:0, preference 9: Invalid argument"
    assert "class htb 1:20" in tc("class show dev eth0")


# Nothing is left.


def test_nothing_is_left(ends):
    box, peer = ends
    before, there = queues("eth0"), devices()
    both = [link(), link(name="in", ingress=True, handle=0x2345)]
    stored = put(*both)
    assert queues("eth0") != before
    assert links.take_away(stored) == ()
    assert (queues("eth0"), devices()) == (before, there)
    assert links.take_away(stored) == () == links.take_away(None)
    with receiver(peer) as one:
        send(box, b"x", to="10.0.0.2")
        received(one, 1)


@pytest.mark.parametrize("kind", ["clsact", "ingress"])
def test_filters_of_others_on_what_comes_in_stay(ends, kind):
    tc(f"qdisc add dev eth0 {kind}")
    tc(
        "filter add dev eth0 ingress pref 1 protocol ip u32 match ip dport 9 0xffff action mirred egress redirect dev lo"
    )
    wanted = link(name="in", ingress=True)
    before = queues("eth0").replace(" not_in_hw", "")
    stored = put(wanted)
    assert stored["ingress"]["eth0"]["clsact"] is False
    assert links.wrong([wanted]) == {"in": []}
    links.take_away(stored)
    assert queues("eth0").replace(" not_in_hw", "") == before


def test_an_empty_queue_for_filters_stays_if_it_was_there(ends):
    tc("qdisc add dev eth0 clsact")
    before = queues("eth0")
    links.take_away(put(link(name="in", ingress=True)))
    assert queues("eth0") == before


def test_filters_that_came_later_keep_their_queue(ends):
    stored = put(link(name="in", ingress=True))
    tc(
        "filter add dev eth0 egress pref 1 protocol ip u32 match ip dport 9 0xffff action mirred egress redirect dev lo"
    )
    links.take_away(stored)
    assert "clsact" in tc("qdisc show dev eth0")
    assert tc("filter show dev eth0 ingress") == ""


def test_a_queue_that_tunnels_made_goes_with_the_last_of_ours(ends):
    tc("qdisc add dev eth0 clsact")
    wanted = [link(name="in", ingress=True)]
    stored = links.before(wanted, None, ["eth0"])
    links.put(wanted, stored)
    links.take_away(stored)
    assert "clsact" not in tc("qdisc show dev eth0")


def test_a_device_with_several_queues(ends):
    ip("link add name many numtxqueues 4 type ifb")
    ip("link set many up")
    before = queues("many")
    assert "qdisc mq 0: root" in before
    wanted = link(interface="many")
    assert links.foreign([wanted]) == {}
    stored = put(wanted)
    assert links.wrong([wanted]) == {"wan": []}
    links.take_away(stored)
    assert queues("many") == before


# Interfaces that come and go.


def test_a_pattern(ends):
    box, _ = ends
    wanted = [link(interface="veth*"), link(name="in", interface="veth*", ingress=True)]
    stored = put(*wanted)
    assert (stored, links.wrong(wanted)) == (
        {"egress": {}, "ingress": {}, "aside": {}},
        {"wan": [], "in": []},
    )
    veth(box, "veth1", box, "veth2")
    assert links.interfaces(wanted[0]) == ["veth1", "veth2"]
    assert links.wrong(wanted)["wan"] == [
        "its root qdisc is gone at veth1",
        "its root qdisc is gone at veth2",
    ]
    stored = put(*wanted, earlier=stored)
    assert links.wrong(wanted) == {"wan": [], "in": []}
    assert set(links.stats(wanted)) == {(w, v) for w in ("wan", "in") for v in ("veth1", "veth2")}
    ip("link del veth1")
    assert links.interfaces(wanted[0]) == []
    assert links.stats(wanted) == {}
    stored = put(*wanted, earlier=stored)
    assert stored == {"egress": {}, "ingress": {}, "aside": {}}
    assert "itm-" not in devices()


def test_a_pattern_fits_no_device_of_ours_and_not_lo(ends):
    wanted = link(name="in", interface="*", ingress=True)
    stored = put(wanted)
    assert links.interfaces(wanted) == ["eth0"]
    assert put(wanted, earlier=stored) == stored


def test_an_interface_that_is_made_anew(ends):
    box, _ = ends
    veth(box, "veth1", box, "veth2")
    tc("qdisc add dev veth1 root handle 1: pfifo limit 5")
    wanted = [link(interface="veth1"), link(name="in", interface="veth1", ingress=True)]
    stored = put(*wanted)
    assert stored["egress"]["veth1"]["tree"]
    ip("link del veth1")
    assert links.wrong(wanted)["wan"] == ["its interface veth1 is not there"]
    veth(box, "veth1", box, "veth2")
    before = queues("veth1")
    stored = put(*wanted, earlier=stored)
    assert links.wrong(wanted) == {"wan": [], "in": []}
    # The tree was the other one's.
    links.take_away(stored)
    assert queues("veth1") == before
    assert "itm-" not in devices()


def test_nothing_is_left_at_an_interface_that_got_another_name(ends):
    box, _ = ends
    veth(box, "veth1", box, "veth2")
    tc("qdisc add dev veth1 root handle 1: pfifo limit 5")
    theirs = queues("veth1")
    wanted = [link(interface="veth1"), link(name="in", interface="veth1", ingress=True)]
    stored = put(*wanted)
    ip("link set veth1 down")
    ip("link set veth1 name other")
    stored = put(*wanted, earlier=stored)
    assert queues("other") == theirs.replace("veth1", "other")
    assert (stored["egress"], stored["ingress"]) == ({}, {})
    assert "itm-" not in devices()


def test_it_goes_with_the_interface(ends):
    box, _ = ends
    veth(box, "veth1", box, "veth2")
    there = devices()
    stored = put(link(name="in", interface="veth1", ingress=True), link(interface="veth1"))
    ip("link del veth1")
    assert links.take_away(stored) == ()
    assert "itm-" not in devices() and "itm-" not in there


def test_a_long_name(ends):
    box, _ = ends
    veth(box, "a-very-long-one", box, "veth2")
    wanted = link(name="in", interface="a-very-long-one", ingress=True)
    stored = put(wanted)
    assert links.wrong([wanted]) == {"in": []}
    links.take_away(stored)
    assert "itm-" not in devices()


def test_somebody_elses_device_of_that_name_is_left_alone(ends):
    ip("link add name itm-eth0 type ifb")
    wanted = link(name="in", ingress=True)
    with pytest.raises(
        MachineError, match=r"link in at eth0: cannot make the device .*: File exists"
    ):
        put(wanted)
    links.take_away(links.before([wanted]))
    assert "itm-eth0" in devices()


# What is wrong.


@pytest.mark.parametrize(
    "done, told",
    [
        ("qdisc del dev eth0 root", "its root qdisc is gone at eth0"),
        ("class change dev eth0 parent 1234:1 classid 1234:20 htb rate 1mbit",
         "class bulk is guaranteed 125000 bytes/s, not 1000 at eth0"),
        ("class change dev eth0 classid 1234:1 htb rate 1mbit",
         "the class above all is guaranteed 125000 bytes/s, not 100000 at eth0"),
        ("qdisc change dev eth0 parent 1234:20 pfifo limit 9",
         "the queue of class bulk holds 9 packets at eth0"),
        ("qdisc replace dev eth0 parent 1234:20 tbf rate 1mbit burst 4000 limit 9000",
         "the queue of class bulk is tbf at eth0"),
        ("qdisc del dev eth0 parent 1234:20", "the queue of class bulk is gone at eth0"),
        ("filter del dev eth0 parent 1234: pref 27015",
         "the filter to 1234:20 of preference 27015 is gone at eth0"),
        ("filter add dev eth0 parent 1234: pref 1 protocol ip u32 match u32 0 0 flowid 1234:10",
         "there is a filter of preference 1 to 1234:10 at eth0"),
        ("class add dev eth0 parent 1234:1 classid 1234:99 htb rate 1mbit",
         "there is a class 1234:99 at eth0"),
        ("filter del dev eth0 ingress", "nothing leads to itm-eth0 what comes in at eth0"),
        ("qdisc del dev eth0 clsact", "the qdisc clsact is gone at eth0"),
        ("qdisc del dev itm-eth0 root", "its root qdisc is gone at eth0"),
    ],
)  # fmt: skip
def test_drift_is_told_and_mended(ends, done, told):
    both = [link(), link(name="in", ingress=True, handle=0x2345)]
    stored = put(*both)
    tc(done)
    found = links.wrong(both)
    assert told in found["wan"] + found["in"]
    put(*both, earlier=stored)
    assert links.wrong(both) == {"wan": [], "in": []}


def test_a_device_that_is_gone_is_told_and_mended(ends):
    wanted = link(name="in", ingress=True)
    stored = put(wanted)
    ip("link del itm-eth0")
    assert links.wrong([wanted])["in"] == ["its device itm-eth0 is gone at eth0"]
    put(wanted, earlier=stored)
    assert links.wrong([wanted]) == {"in": []}


def test_a_missing_interface_is_told(ends):
    assert links.wrong([link(interface="eth9")]) == {"wan": ["its interface eth9 is not there"]}
    assert links.interfaces(link(interface="eth9")) == []
    put(link(interface="eth9"))


def test_speed(ends):
    assert links.speed("eth0") == 1_250_000_000  # what veth says
    assert links.speed("lo") is None
    assert links.speed("eth9") is None


def test_a_tree_is_the_same_if_only_time_went_by(ends):
    box, peer = ends
    set_up("htb")
    index = socket.if_nametoindex("eth0")
    before = trees.recorded(index)
    assert len(before) == len(FOREIGN["htb"])
    with receiver(peer) as there:
        send(box, b"x", 3, to="10.0.0.2")
        received(there, 3)
    assert trees.recorded(index) == before
