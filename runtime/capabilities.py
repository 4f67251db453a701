"""What this machine can do, asked of the machine itself.

Each feature is tried in a network namespace that nobody else is in and that ends
with this process: a tiny ruleset is loaded; where loading is no proof, packets are
sent over its loopback and what the rules counted must be right. Nothing is concluded
from versions. The namespace that itmc was started in is only read.

A kernel may load modules to answer, as it would for the first policy that needs
them. Two kinds of links are not tried then, because their modules would leave devices
in the namespace of the host: for them, a module that lies there is an answer.
"""

import os
import platform
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic, sleep
from typing import Final

from itmlang import marks
from itmlang.capabilities import EVERYTHING, FEATURES, Capabilities, Feature
from itmlang.nft.model import Ruleset
from itmlang.packet import UDP, Header
from itmlang.tunnel import PROTOCOL
from itmlang.values import IPV4
from runtime import bpf, nft, programs, qdisc, store
from runtime.errors import MachineError
from runtime.qdisc import Match, Shape
from runtime.traffic import (
    MarkRule,
    Namespace,
    TrafficError,
    add_filter_queue,
    add_link,
    add_mark_rule,
    add_qdisc,
    add_xt_queue_rule,
    put_bpf_filter,
    put_bpf_route,
    veth,
)

_PORT: Final = 9  # of `discard`
_QUEUE: Final = 7
_ARRIVAL: Final = 0.5  # seconds that the kernel may take to count what was sent
_PAYLOAD: Final = bytes(72)  # 100 bytes with the headers of UDP and IPv4
_MODULES: Final = Path("/lib/modules")
_SO_MARK: Final = 36  # asm-generic/socket.h
_ETHERNET_HEADER: Final = 14  # bytes, on lo as well


class _Lacking(Exception):
    """The machine has not the feature that was tried; the message says what came instead."""


@dataclass(frozen=True)
class Answer:
    """Is a feature there? If not, `reason` is what the machine said."""

    feature: Feature
    there: bool
    reason: str = ""


@dataclass(frozen=True)
class Host:
    """What matters beside the kernel's features, of the namespace that itmc runs in.

    `forwarding` tells for "IPv4" and "IPv6" whether packets are forwarded; None where
    the machine has no such protocol. `state_problem` is "" if the state folder can be
    used.
    """

    forwarding: Mapping[str, bool | None]
    state_folder: str
    state_problem: str


@dataclass(frozen=True)
class Report:
    """All that was found out: `answers` in the order of `FEATURES`."""

    kernel: str
    nftables: str
    answers: tuple[Answer, ...]
    host: Host

    @property
    def capabilities(self) -> Capabilities:
        """What the compiler takes."""
        there = frozenset(answer.feature.name for answer in self.answers if answer.there)
        return Capabilities(there, kernel=self.kernel, nftables=self.nftables)


def ask() -> Report:
    """Ask the machine for everything; takes about a second.

    Raises `MachineError` where nothing can be asked: without root, without libnftables.
    """
    nft.require_rights()
    host = _host()
    try:
        namespace = Namespace.create("doctor")
    except TrafficError as error:
        raise MachineError(
            f"no network namespace can be made to ask in: {error}",
            "run it as root, on a kernel with CONFIG_NET_NS",
        ) from error
    try:
        with namespace.entered():
            nftables = nft.version()
            answers = tuple(_answer(feature, namespace) for feature in FEATURES)
    finally:
        namespace.close()
    return Report(platform.release(), nftables, answers, host)


def without_tunnels(ruleset: Ruleset) -> Capabilities | None:
    """What a machine has that lacks the kernel's tunnels of a ruleset: Python does it there.

    None if it has them. Who may not ask (a container) may not load the programs, either.
    Raises `MachineError` without root.
    """
    tunnels = [tunnel for table in ruleset.tables for tunnel in table.tunnels]
    if not tunnels:
        return None
    names = {"BPF on links" if tunnel.inward else "BPF on routes" for tunnel in tunnels}
    nft.require_rights()
    try:
        namespace = Namespace.create("tunnels")
    except TrafficError:
        lacking = names
    else:
        try:
            with namespace.entered():
                answers = [_answer(f, namespace) for f in FEATURES if f.name in names]
        finally:
            namespace.close()
        lacking = {answer.feature.name for answer in answers if not answer.there}
    return replace(EVERYTHING, features=EVERYTHING.features - lacking) if lacking else None


def _answer(feature: Feature, namespace: Namespace) -> Answer:
    try:
        TRIALS[feature.name](namespace)
    except (_Lacking, nft.NftRefusalError, TrafficError) as error:
        return Answer(feature, False, str(error))
    except OSError as error:
        return Answer(feature, False, error.strerror or str(error))
    except MachineError as error:  # libnftables fell over it
        return Answer(feature, False, error.message)
    return Answer(feature, True)


# Rules, and packets through them.

_PATH: Final = "inet doctor"
_SEEN: Final = "set seen { typeof udp dport; size 16; flags dynamic,timeout; timeout 1m; }"


def _table(content: str, path: str = _PATH) -> str:
    """A script for a table that is new, whatever was tried before."""
    fresh = f"table {path}\ndelete table {path}\ntable {path} {{\n"
    return f"{fresh}counter works {{ }}\n{content}\n}}\n"


def _chain(*rules: str, hook: str = "output", kind: str = "filter") -> str:
    body = "\n".join(rules)
    return f"chain at_{hook.split()[0]} {{ type {kind} hook {hook} priority 0; \n{body}\n}}"


def _send(packets: int) -> None:
    """Datagrams to our own port 9, each from a port of its own; nobody listens there."""
    for _ in range(packets):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(_PAYLOAD, ("127.0.0.1", _PORT))


def _connect() -> None:
    """The first packet of a TCP connection, which is refused."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sender:
        sender.setblocking(False)
        sender.connect_ex(("127.0.0.1", _PORT))


def _counted(wanted: int, path: str = _PATH) -> None:
    """The counter of the table must come to a number."""
    deadline = monotonic() + _ARRIVAL
    while True:
        packets, _ = nft.counters(path)["works"]
        if packets == wanted:
            return
        if packets > wanted or monotonic() > deadline:
            raise _Lacking(f"its rules load, but {packets} packets match instead of {wanted}")
        sleep(0.01)


def _loads(content: str) -> Callable[[Namespace], None]:
    """Loading is the proof."""
    return lambda _: nft.load(_table(content))


def _counts(
    content: str,
    matched: int = 1,
    *,
    sent: int = 1,
    send: Callable[[], None] | None = None,
    path: str = _PATH,
) -> Callable[[Namespace], None]:
    """Of the packets that are `sent`, the counter `works` must see so many."""

    def tried(_: Namespace) -> None:
        nft.load(_table(content, path))
        if send is None:
            _send(sent)
        else:
            send()
        _counted(matched, path)

    return tried


_WORKS: Final = 'counter name "works"'
_ARRIVED: Final = _chain(f"udp dport {_PORT} {_WORKS}", hook="input")


def _counts_in_elements(_: Namespace) -> None:
    nft.load(_table(_SEEN + "\n" + _chain("update @seen { udp dport counter }")))
    _send(2)
    found = [element.packets for element in nft.elements(_PATH, "seen")]
    if found != [2]:
        raise _Lacking(f"the elements have counted {found} instead of 2 packets")


def _changes_in_place(_: Namespace) -> None:
    nft.load(_table(_SEEN + "\n" + _chain("update @seen { udp dport }")))
    _send(1)
    wider = _SEEN.replace("size 16", "size 32").replace("timeout 1m", "timeout 2m")
    nft.load(f"table {_PATH} {{\n{wider}\n}}")
    found = nft.table(_PATH).sets["seen"]
    if (found.size, found.timeout) != (32, 120_000) or not nft.elements(_PATH, "seen"):
        raise _Lacking("the kernel takes it and changes nothing, or loses the elements")


def _restores_elements(_: Namespace) -> None:
    nft.load(_table(_SEEN + "\n" + _chain("update @seen { udp dport counter }")))
    kept = "counter packets 7 bytes 700 timeout 1h expires 30m"
    nft.load(f"add element {_PATH} seen {{ {_PORT} {kept} }}")
    found = [(e.packets, (e.expires or 0) <= 1_800_000) for e in nft.elements(_PATH, "seen")]
    if found != [(7, True)]:
        raise _Lacking("elements come back without what they counted, or their time left")


def _replaces_rules(_: Namespace) -> None:
    nft.load(_table(_chain("udp dport 1")))
    handle = nft.table(_PATH).chains["at_output"].handles[0]
    nft.load(f"replace rule {_PATH} at_output handle {handle} udp dport {_PORT} {_WORKS}")
    _send(1)
    _counted(1)


def _queues_by_xt(namespace: Namespace) -> None:
    nft.load(_table(_chain() + "\n" + _ARRIVED))
    add_xt_queue_rule(namespace, "doctor", "at_output", _QUEUE)
    _send(1)
    _counted(1)


# Links and queues.


def _has_veth(namespace: Namespace) -> None:
    other = Namespace.create("doctor")
    try:
        veth(namespace, "doctor0", other, "doctor1")
    finally:
        other.close()


def _has_qdisc(kind: str) -> Callable[[Namespace], None]:
    def tried(_: Namespace) -> None:
        with _place() as place:
            add_qdisc(place, "lo", kind)

    return tried


def _has_link(kind: str, **options: str) -> Callable[[Namespace], None]:
    def tried(_: Namespace) -> None:
        if not _waits_as_module(kind):
            with _place() as place:
                add_link(place, "doctor2", kind, **options)

    return tried


_CLASS: Final = 0x1000_0010


def _has_htb(_: Namespace) -> None:
    with _place():
        lo = socket.if_nametoindex("lo")
        _shape(lo, default=_CLASS & 0xFFFF)
        _send(1)
        _passed(lo, 1)


def _has_u32(_: Namespace) -> None:
    with _place():
        lo = socket.if_nametoindex("lo")
        _shape(lo, default=0)
        words = ((0xFFFF, _PORT, 20),)
        qdisc.put_filter(lo, _CLASS & ~0xFFFF, Match(1, qdisc.IPV4, words), _CLASS)
        _send(2)
        _passed(lo, 2)


def _has_ifb(_: Namespace) -> None:
    if _waits_as_module("ifb"):
        return
    with _place():
        nft.load(_table(_ARRIVED))
        lo, device = socket.if_nametoindex("lo"), qdisc.add_ifb("doctor2", "doctor")
        _shape(device, default=_CLASS & 0xFFFF)
        qdisc.add_clsact(lo)
        qdisc.put_filter(lo, qdisc.INCOMING, Match(1, qdisc.ALL), 0, redirect=device)
        _send(1)
        _counted(1)
        _passed(device, 1)


def _shape(device: int, default: int) -> None:
    """A tree of HTB with one class."""
    qdisc.put_root(device, _CLASS & ~0xFFFF, default)
    qdisc.put_class(device, _CLASS, Shape(qdisc.ROOT, 10**6, 10**6, 10**6, 10**6, 1514))
    qdisc.put_fifo(device, _CLASS, 10)


def _passed(device: int, wanted: int) -> None:
    """So many packets, at least, must go through the class."""
    deadline = monotonic() + _ARRIVAL
    while (packets := qdisc.classes(device)[_CLASS].counts.packets) < wanted:
        if monotonic() > deadline:
            raise _Lacking(f"it can be set, but {packets} packets pass instead of {wanted}")
        sleep(0.01)


# The very programs of tunnels, and packets through them, from this machine to itself.
_ENDS: Final = (0x7F00_0001, 0x7F00_0002)
_NUMBER: Final = 1 << marks.TUNNEL_SHIFT


def _has_bpf_routes(_: Namespace) -> None:
    with (
        _program(bpf.BEFORE_ROUTE, programs.gathering()) as first,
        _program(bpf.ON_ROUTE, programs.encapsulation(*_ENDS)) as second,
        _place() as place,
    ):
        put_bpf_route(place, 1, "lo", 1480, (first, second), "itm", 1)
        add_mark_rule(place, MarkRule(_NUMBER, marks.TUNNEL_BITS, 1, 1, 1))
        nft.load(
            _table(_chain(f"ip daddr 127.0.0.2 ip protocol {PROTOCOL} {_WORKS}", hook="input"))
        )
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.SOL_SOCKET, _SO_MARK, _NUMBER)
            sender.bind(("127.0.0.1", 0))
            sender.sendto(_PAYLOAD, ("192.0.2.1", _PORT))
        _counted(1)


def _has_bpf_filters(_: Namespace) -> None:
    code = programs.decapsulation((), _ENDS[1:], _NUMBER, _ETHERNET_HEADER)
    inner = Header(UDP, (IPV4, _ENDS[0]), (IPV4, _ENDS[1]), _PORT, _PORT).build().data
    with _program(bpf.ON_LINK, code) as program, _place() as place:
        add_filter_queue(place, "lo")
        put_bpf_filter(place, "lo", 1, 1, program, "itm")
        nft.load(_table(_chain(f"udp dport {_PORT} meta mark {_NUMBER:#x} {_WORKS}", hook="input")))
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, PROTOCOL) as sender:
            sender.sendto(inner, ("127.0.0.2", 0))
        _counted(1)


@contextmanager
def _place() -> Iterator[Namespace]:
    """A namespace of its own, so that one trial's queues do not hold up another's packets."""
    place = Namespace.create("doctor")
    try:
        with place.entered():
            yield place
    finally:
        place.close()


@contextmanager
def _program(kind: int, code: bytes) -> Iterator[int]:
    program = bpf.load(kind, code)
    try:
        yield program
    finally:
        os.close(program)


def _waits_as_module(name: str) -> bool:
    """Does a module lie there, not loaded, that would make devices when it is?"""
    if Path("/sys/module", name).exists():
        return False
    listed = ""
    with suppress(OSError):
        listed = (_MODULES / platform.release() / "modules.dep").read_text("utf-8", "replace")
    files = (line.partition(":")[0] for line in listed.splitlines())
    return any(Path(file).name.partition(".")[0] == name for file in files)


TRIALS: Final[Mapping[str, Callable[[Namespace], None]]] = {
    "inet tables": _counts(_chain(f"udp dport {_PORT} meta nfproto ipv4 {_WORKS}")),
    "ingress": _counts(_chain(f"udp dport {_PORT} {_WORKS}", hook='ingress device "lo"')),
    "egress": _counts(
        _chain(f"udp dport {_PORT} {_WORKS}", hook='egress device "lo"'), path="netdev doctor"
    ),
    "route chains": _counts(_chain(f"udp dport {_PORT} meta mark set 5 {_WORKS}", kind="route")),
    "value sets": _counts(
        "set near { type ipv4_addr; flags interval; elements = { 127.0.0.0/8 } }\n"
        + _chain(f"ip daddr @near udp dport {{ 1-3, {_PORT} }} {_WORKS}")
    ),
    "verdict maps": _counts(
        f"chain hit {{ {_WORKS}\n}}\n"
        + _chain(f"udp dport vmap {{ 1-3 : drop, {_PORT} : jump hit }}")
    ),
    "timed verdict maps": _counts(
        f"chain hit {{ {_WORKS}\n}}\n"
        "map ways { type nf_proto : verdict; flags timeout; "
        "elements = { ipv4 timeout 1m : jump hit } }\n"
        + _chain(f"udp dport {_PORT} meta nfproto vmap @ways")
    ),
    "dynamic sets": _counts(
        _SEEN + "\n" + _chain(f"udp dport @seen {_WORKS}", "update @seen { udp dport timeout 1h }"),
        sent=2,
    ),
    "concatenations": _counts(
        "set pairs { typeof ip saddr . udp dport; size 16; flags dynamic,timeout; timeout 1m; }\n"
        + _chain(
            f"ip saddr . udp dport @pairs {_WORKS}", "update @pairs { ip saddr . udp dport }"
        ),
        sent=2,
    ),
    "element deletion": _counts(
        _SEEN
        + "\n"
        + _chain(
            "update @seen { udp dport }", "delete @seen { udp dport }",
            f"udp dport != @seen {_WORKS}",
        )
    ),
    "element counters": _counts_in_elements,
    "element limits": _counts(
        _SEEN
        + "\n"
        + _chain(f"update @seen {{ udp dport limit rate over 1/week burst 2 packets }} {_WORKS}"),
        sent=3,
    ),
    "element quotas": _counts(
        _SEEN + "\n" + _chain(f"update @seen {{ udp dport quota over 250 bytes }} {_WORKS}"),
        sent=3,
    ),
    "element connections": _counts(
        "set seen { typeof udp dport; size 16; flags dynamic; }\n"
        + _chain(f"add @seen {{ udp dport ct count over 2 }} {_WORKS}"),
        sent=3,
    ),
    "raw header bytes": _counts(
        _chain(
            "meta nfproto ipv6 @nh,0,16 & 0x0100 == 0 @nh,0,16 set @nh,0,16 & 0xfe3f | 0x0100",
            f"meta nfproto ipv4 @nh,8,8 0 udp dport {_PORT} @th,16,16 set 10",
            f"udp dport 10 {_WORKS}",
        )
    ),
    "fragments": _loads(_chain("frag frag-off != 0 drop", "meta nfproto ipv6 exthdr frag missing")),
    "TCP options": _counts(
        _chain(
            "tcp option maxseg size > 1200 tcp option maxseg size set 1200",
            f"tcp option maxseg size 1200 {_WORKS}",
        ),
        send=_connect,
    ),
    "connection tracking": _counts(
        _chain(f"udp dport {_PORT} ct state new ct direction original {_WORKS}")
    ),
    "connection numbers": _counts(
        "set known { typeof ct id; size 16; flags dynamic,timeout; timeout 1m; }\n"
        + _chain(
            f"udp dport {_PORT} update @known {{ ct id }}",
            f"udp dport {_PORT} ct id @known {_WORKS}",
        )
    ),
    "numbers drawn": _counts(
        _chain(f"udp dport {_PORT} numgen random mod 100 0-99 numgen inc mod 2 0 {_WORKS}"), sent=2
    ),
    "named counters": _counts(_chain(f"udp dport {_PORT} {_WORKS}")),
    "header rewriting": _counts(
        # With a wrong checksum the packet would not come so far.
        _chain("ip6 dscp set ef", "ip6 hoplimit set 9",
               "ip dscp set ef ip ttl set 9 ip saddr set 127.0.0.2",
               f"udp dport {_PORT} udp dport set 10")
        + "\n"
        + _chain(f"ip dscp ef ip ttl 9 ip saddr 127.0.0.2 udp dport 10 {_WORKS}", hook="input")
    ),
    "SCTP rewriting": _loads(_chain("sctp dport set 10")),
    "packet marks": _counts(
        _chain("meta mark set meta mark & 0xff000000 | 0x5",
               f"udp dport {_PORT} meta mark 0x5 {_WORKS}")
    ),
    "limits": _counts(
        _chain("limit rate over 1000000000 bytes/second drop",
               f"udp dport {_PORT} limit rate over 1/week burst 2 packets {_WORKS}"),
        sent=3,
    ),
    "reject": _loads(
        _chain("meta l4proto tcp reject with tcp reset", "reject with icmpx port-unreachable")
    ),
    "kernel log": _loads(_chain('udp dport 1 log prefix "itm doctor "')),
    "log groups": _loads(_chain('udp dport 1 log prefix "itm doctor " group 1 snaplen 128')),
    "fragments together": _loads(
        _chain("meta nfproto ipv4 meta length 0 meta l4proto udp tproxy ip to :1", hook="prerouting")
    ),
    "flow hashes": _counts(
        f"chain hit {{ {_WORKS}\n}}\n"
        + _chain(f"udp dport {_PORT} symhash mod 2 vmap {{ 0 : goto hit, 1 : goto hit }}")
    ),
    "connection marks": _counts(
        _chain(
            f"udp dport {_PORT} ct mark set ct mark & 0x00ffffff | 0x60000000",
            f"udp dport {_PORT} ct mark & 0xe0000000 vmap {{ 0x60000000 : goto hit }}",
        )
        + f"\nchain hit {{ {_WORKS}\n}}"
    ),
    "sets changed in place": _changes_in_place,
    "elements restored": _restores_elements,
    "rules replaced": _replaces_rules,
    "devices awaited": _loads(_chain(hook='ingress device "doctor9"')),
    "namespaces and veth": _has_veth,
    "native queue": _counts(_chain(f"udp dport {_PORT} queue flags bypass to {_QUEUE}") + "\n" + _ARRIVED),
    "xt queue": _queues_by_xt,
    "HTB": _has_htb,
    "u32 filters": _has_u32,
    "IFB": _has_ifb,
    "fq_codel": _has_qdisc("fq_codel"),
    "netem": _has_qdisc("netem"),
    # With a remote end: the one without is made with each namespace.
    "IPIP": _has_link("ipip", ipip_remote="192.0.2.1"),
    "BPF on routes": _has_bpf_routes,
    "BPF on links": _has_bpf_filters,
}  # fmt: skip


# The host.


def _host() -> Host:
    folder = store.directory()
    switches = {
        "IPv4": Path("/proc/sys/net/ipv4/ip_forward"),
        "IPv6": Path("/proc/sys/net/ipv6/conf/all/forwarding"),
    }
    forwarding = {family: _switch(path) for family, path in switches.items()}
    return Host(forwarding, str(folder), _state_problem(folder))


def _switch(path: Path) -> bool | None:
    try:
        return path.read_text("ascii").strip() != "0"
    except OSError:
        return None


def _state_problem(folder: Path) -> str:
    """Why the state folder cannot be used; nothing is written to find out."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        return f"{there} is no folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there} cannot be written"
    if os.statvfs(there).f_bavail == 0:
        return f"the disk of {there} is full"
    try:
        store.load()
    except MachineError as error:
        return error.message
    return ""
