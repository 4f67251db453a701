"""Network namespaces, links, addresses, routes and queues; the only user of pyroute2.

Strategy: namespaces are anonymous. A short-lived thread unshares one and leaves
only an open file that refers to it, so the kernel frees the namespace, with every
link in it, when that file closes: also after kill -9. Work in a namespace is work
of a thread that has entered it, because sockets, netlink and /proc/sys/net all
follow the namespace of the calling thread.

A link made here is point to point and silent: both ends share one MAC address and
have ARP and multicast off, so a neighbour never has to be resolved and no packet
(ARP, neighbour or router solicitation, MLD) exists that nobody asked for.
"""

import ctypes
import errno
import fcntl
import ipaddress
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.nftables.expressions import genex
from pyroute2.nftables.main import NFTables

CLONE_NEWNET = 0x40000000
IFF_UP, IFF_NOARP, IFF_MULTICAST = 0x1, 0x80, 0x1000
IFA_F_NODAD = 0x02
SIOCETHTOOL = 0x8946
# Of linux/ethtool.h; segmentation goes before the checksums that it rests on.
ETHTOOL_STSO, ETHTOOL_SGSO, ETHTOOL_SGRO = 0x1F, 0x24, 0x2C
ETHTOOL_STXCSUM, ETHTOOL_SRXCSUM = 0x17, 0x15
OFFLOADS = (ETHTOOL_STSO, ETHTOOL_SGSO, ETHTOOL_SGRO, ETHTOOL_STXCSUM, ETHTOOL_SRXCSUM)
_MAIN = 254  # RT_TABLE_MAIN
# TC_H_CLSACT with TC_H_MIN_INGRESS, with TC_H_MIN_EGRESS.
_INCOMING, _OUTGOING, _ETH_P_IP = 0xFFFF_FFF2, 0xFFFF_FFF3, 0x0800
MAC = "02:00:00:00:00:01"  # locally administered; the same at both ends of every link


class TrafficError(Exception):
    """The machine refused; the message says what was tried and what would help."""


@dataclass(frozen=True)
class Namespace:
    """A network namespace without a name in the file system.

    `name` serves messages only. The namespace lives as long as `file`, or a
    socket or a thread inside it, is alive.
    """

    name: str
    file: BinaryIO

    @classmethod
    def create(cls, name: str) -> "Namespace":
        """A new namespace: loopback up, and links made later get no IPv6 link-local address.

        Raises TrafficError, without root for one.
        """
        ns = cls(name, _unshared(name))
        try:
            # A link-local address would bring router solicitations and MLD with it.
            set_sysctl(ns, "net/ipv6/conf/default/addr_gen_mode", "1")
            with _netlink(ns, "bring up lo") as netlink:
                netlink.link("set", index=_index(ns, "lo"), state="up")
        except BaseException:
            ns.close()
            raise
        return ns

    @classmethod
    def here(cls) -> "Namespace":
        """The namespace that the calling thread is in. Raises TrafficError."""
        return cls("here", _own_namespace())

    @property
    def fd(self) -> int:
        """The file descriptor for setns(2); raises TrafficError once closed."""
        if self.file.closed:
            raise TrafficError(f"namespace {self.name} is closed")
        return self.file.fileno()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Put the calling thread into this namespace; put it back on leaving, always.

        Sockets keep the namespace they were made in; threads and processes started
        inside inherit it. Not to be held across a yield of a coroutine. Raises
        TrafficError if the namespace is closed or may not be entered.
        """
        with _own_namespace() as home:
            if os.fstat(home.fileno()).st_ino == os.fstat(self.fd).st_ino:
                yield  # where it is already; a service may not move at all
                return
            try:  # Before the move: an interrupt may come right after it.
                with _refusals(f"cannot enter namespace {self.name}"):
                    _setns(self.fd)
                yield
            finally:
                _setns(home.fileno())

    def close(self) -> None:
        """Let go of the namespace; a second call does nothing."""
        self.file.close()


def veth(a: Namespace, a_name: str, b: Namespace, b_name: str, *, offloads: bool = False) -> None:
    """Connect two namespaces by a pair of links, both up.

    Without `offloads`, every packet that arrives is one real packet of the wire: at most
    the MTU long, checksums complete. With `offloads` it is as the sending stack made it:
    many packets in one, checksums left open. Raises TrafficError.
    """
    what = f"create the link {a.name}/{a_name} - {b.name}/{b_name}"
    peer = {"ifname": b_name, "address": MAC, "net_ns_fd": b.fd}
    with _netlink(a, what) as netlink:
        netlink.link("add", ifname=a_name, kind="veth", address=MAC, peer=peer)
    for ns, link in ((a, a_name), (b, b_name)):
        if not offloads:
            _offloads_off(ns, link)
        with _netlink(ns, f"bring up {link}") as netlink:
            netlink.link(
                "set",
                index=_index(ns, link),
                flags=IFF_UP | IFF_NOARP,
                change=IFF_UP | IFF_NOARP | IFF_MULTICAST,
            )


def add_address(ns: Namespace, link: str, address: str) -> None:
    """Give `link` an IPv4 or IPv6 address with its prefix length ("10.0.1.1/24").

    An IPv6 address is usable at once: no duplicate address detection. Raises
    TrafficError; ValueError if `address` is not one.
    """
    interface = ipaddress.ip_interface(address)
    nodad = {"flags": IFA_F_NODAD} if interface.version == 6 else {}
    with _netlink(ns, f"add {address} to {link}") as netlink:
        netlink.addr(
            "add",
            index=_index(ns, link),
            address=str(interface.ip),
            prefixlen=interface.network.prefixlen,
            **nodad,
        )


def add_link_route(ns: Namespace, destination: str, link: str) -> None:
    """Route `destination` (a prefix) out of `link`, whose other end takes all. Raises TrafficError."""
    network = ipaddress.ip_network(destination)
    family = socket.AF_INET if network.version == 4 else socket.AF_INET6
    with _netlink(ns, f"add a route to {destination} by {link}") as netlink:
        netlink.route("add", family=family, dst=str(network), oif=_index(ns, link))


def add_route(ns: Namespace, destination: str, *, via: str, table: int = _MAIN) -> None:
    """Route `destination` (a prefix, or "default") through the neighbour `via`.

    `table` is the routing table's number. The family is that of `via`. Raises TrafficError; ValueError if an address or
    prefix is not one.
    """
    family = socket.AF_INET if ipaddress.ip_address(via).version == 4 else socket.AF_INET6
    if destination != "default":
        destination = str(ipaddress.ip_network(destination))
    with _netlink(ns, f"add a route to {destination} via {via}") as netlink:
        netlink.route("add", family=family, dst=destination, gateway=via, table=table)


def add_link(ns: Namespace, link: str, kind: str, **options: str) -> None:
    """Make a link of a kind that needs no other end (`ifb`, `ipip`), down.

    `options` are the kind's own, as pyroute2 names them. Raises TrafficError.
    """
    with _netlink(ns, f"create {link}, of kind {kind}") as netlink:
        netlink.link("add", ifname=link, kind=kind, **options)


def add_qdisc(ns: Namespace, link: str, kind: str) -> None:
    """Give `link` a root qdisc of a kind (`htb`, `netem`), with no options. Raises TrafficError."""
    with _netlink(ns, f"add the qdisc {kind} to {link}") as netlink:
        netlink.tc("add", kind, _index(ns, link), handle="1:")


def put_bpf_route(
    ns: Namespace,
    table: int,
    link: str,
    mtu: int,
    programs: tuple[int, int],
    name: str,
    protocol: int,
) -> None:
    """Make the default route of a table one through BPF, of `bpf.BEFORE_ROUTE`, `bpf.ON_ROUTE`.

    `programs` are their file descriptors, `name` is what listings call them, `mtu` is in bytes, and
    `protocol` says whose the route is (rtm_protocol, 1 to 255). Raises TrafficError.
    """
    first, second = ({"fd": program, "name": name} for program in programs)
    encap = {"type": "bpf", "out": first, "xmit": second}
    with _netlink(ns, f"put a route through BPF into table {table}") as netlink:
        netlink.route(
            "replace", dst="0.0.0.0/0", oif=_index(ns, link), table=table, proto=protocol,
            metrics={"mtu": mtu}, encap=encap,
        )  # fmt: skip


def bpf_routes(ns: Namespace, protocol: int) -> dict[int, tuple[str, int, str]]:
    """By table, IPv4 routes of a protocol: link, MTU, the program's name. Raises TrafficError."""
    found = {}
    what = f"namespace {ns.name}: cannot list the routes through BPF"
    # Only so the kernel itself sorts out the others: a router may have a million.
    with ns.entered(), _refusals(what), IPRoute(strict_check=True) as netlink:
        for route in netlink.route(
            "dump", dump_filter=lambda _: True, family=socket.AF_INET, proto=protocol
        ):
            program = route.get_nested("RTA_ENCAP", "LWT_BPF_XMIT", "LWT_BPF_PROG_NAME")
            if route["proto"] == protocol and program is not None:
                mtu = route.get_nested("RTA_METRICS", "RTAX_MTU") or 0
                link = socket.if_indextoname(route.get_attr("RTA_OIF"))
                found[route.get_attr("RTA_TABLE")] = (link, mtu, program)
    return found


def link_towards(ns: Namespace, destination: str) -> str:
    """The link that packets to an IPv4 address leave by. Raises TrafficError."""
    with _netlink(ns, f"find the way to {destination}") as netlink:
        (route,) = netlink.route("get", dst=destination)
        return socket.if_indextoname(route.get_attr("RTA_OIF"))


def delete_default_route(ns: Namespace, table: int) -> None:
    """Raises TrafficError."""
    with _netlink(ns, f"delete the default route of table {table}") as netlink:
        netlink.route("del", dst="0.0.0.0/0", table=table)


@dataclass(frozen=True, order=True)
class MarkRule:
    """IPv4 packets whose mark is `mark` in the bits of `mask` are routed by `table`.

    Rules are asked in the order of their `priority`; `protocol` says whose this one is.
    Packets that start here come in at the `link` lo; without a name, all are meant.
    """

    mark: int
    mask: int
    table: int
    priority: int
    protocol: int
    link: str = ""


def add_mark_rule(ns: Namespace, rule: MarkRule) -> None:
    """Raises TrafficError, also if it is there."""
    with _netlink(ns, f"add a rule for the mark {rule.mark:#x}") as netlink:
        netlink.rule("add", family=socket.AF_INET, **_rule(rule))


def delete_mark_rule(ns: Namespace, rule: MarkRule) -> None:
    """Raises TrafficError."""
    with _netlink(ns, f"delete the rule for the mark {rule.mark:#x}") as netlink:
        netlink.rule("del", family=socket.AF_INET, **_rule(rule))


def mark_rules(ns: Namespace, protocol: int) -> list[MarkRule]:
    """Those of a protocol, sorted. Raises TrafficError."""
    with _netlink(ns, "list the rules of routing") as netlink:
        found = [
            MarkRule(
                mark=rule.get_attr("FRA_FWMARK") or 0,
                mask=rule.get_attr("FRA_FWMASK") or 0,
                table=rule.get_attr("FRA_TABLE") or 0,
                priority=rule.get_attr("FRA_PRIORITY") or 0,
                protocol=rule.get_attr("FRA_PROTOCOL") or 0,
                link=rule.get_attr("FRA_IIFNAME") or "",
            )
            for rule in netlink.get_rules(family=socket.AF_INET)
        ]
    return sorted(rule for rule in found if rule.protocol == protocol)


def _rule(rule: MarkRule) -> dict[str, Any]:
    link = {"iifname": rule.link} if rule.link else {}
    return link | {
        "fwmark": rule.mark, "fwmask": rule.mask, "table": rule.table,
        "priority": rule.priority, "protocol": rule.protocol,
    }  # fmt: skip


def link_types(ns: Namespace) -> dict[str, int]:
    """The links' hardware types (linux/if_arp.h) by their names. Raises TrafficError."""
    with _netlink(ns, "list the links") as netlink:
        return {link.get_attr("IFLA_IFNAME"): link["ifi_type"] for link in netlink.get_links()}


def links_with_filter_queue(ns: Namespace) -> set[str]:
    """The links that have what filters of incoming packets hang on. Raises TrafficError."""
    with _netlink(ns, "list the links' queues") as netlink:
        names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in netlink.get_links()}
        return {
            names[queue["index"]]
            for queue in netlink.get_qdiscs()
            if queue.get_attr("TCA_KIND") in ("clsact", "ingress") and queue["index"] in names
        }


def has_filters(ns: Namespace, link: str) -> bool:
    """Hangs any filter on the qdisc clsact of `link`, for either way? Raises TrafficError."""
    with _netlink(ns, f"list the filters of {link}") as netlink:
        index = _index(ns, link)
        return any(
            bool(list(netlink.get_filters(index, parent=way))) for way in (_INCOMING, _OUTGOING)
        )


def add_filter_queue(ns: Namespace, link: str) -> None:
    """Give `link` what filters hang on (the qdisc clsact). Raises TrafficError."""
    with _netlink(ns, f"add the qdisc clsact to {link}") as netlink:
        netlink.tc("add", "clsact", _index(ns, link))


def delete_filter_queue(ns: Namespace, link: str) -> None:
    """Take away the qdisc clsact and all filters on it. Raises TrafficError."""
    with _netlink(ns, f"delete the qdisc clsact of {link}") as netlink:
        netlink.tc("del", "clsact", _index(ns, link))


def put_bpf_filter(
    ns: Namespace, link: str, priority: int, handle: int, program: int, name: str
) -> None:
    """Let each IPv4 packet that comes in at `link` go through a BPF program of `bpf.ON_LINK`.

    `program` is its file descriptor, `name` what listings call it. Filters run in the
    order of their priority; one that is there with this `handle` is replaced. Raises
    TrafficError.
    """
    with _netlink(ns, f"let {link} go through BPF") as netlink:
        netlink.tc(
            "replace-filter", "bpf", _index(ns, link), handle, fd=program, name=name,
            parent=_INCOMING, prio=priority, protocol=_ETH_P_IP, direct_action=True,
        )  # fmt: skip


def bpf_filters(ns: Namespace, link: str, priority: int) -> dict[int, str]:
    """By handle, the names of the programs that what comes in goes through. Raises TrafficError."""
    found = {}
    with _netlink(ns, f"list the filters of {link}") as netlink:
        for entry in netlink.get_filters(_index(ns, link), parent=_INCOMING):
            name = entry.get_nested("TCA_OPTIONS", "TCA_BPF_NAME")
            if entry["info"] >> 16 == priority and entry["handle"] and name is not None:
                found[entry["handle"]] = name
    return found


def delete_bpf_filter(ns: Namespace, link: str, priority: int, handle: int) -> None:
    """Raises TrafficError."""
    with _netlink(ns, f"delete a filter of {link}") as netlink:
        netlink.tc(
            "del-filter", "bpf", _index(ns, link), handle,
            parent=_INCOMING, prio=priority, protocol=_ETH_P_IP,
        )  # fmt: skip


def add_xt_queue_rule(ns: Namespace, table: str, chain: str, queue: int) -> None:
    """Add a rule to a chain of an inet table: packets to a queue, past it if nobody listens.

    It is the target NFQUEUE of xtables, for kernels without nftables' own `queue`.
    Raises TrafficError.
    """
    info = struct.pack("=HHH2x", queue, 1, 1)  # xt_NFQ_info_v3: the first, how many, 1 for bypass
    target = genex("target", {"name": "NFQUEUE", "rev": 3, "info": info})
    what = f"add an xt queue rule to {table} {chain}"
    with (
        ns.entered(),
        _refusals(f"namespace {ns.name}: cannot {what}"),
        NFTables(nfgen_family=1) as nftables,
    ):
        nftables.rule("add", table=table, chain=chain, expressions=([target],))


def set_sysctl(ns: Namespace, name: str, value: str) -> None:
    """Write `value` to /proc/sys/`name` as seen in `ns`; `name` begins with "net/".

    Anything else under /proc/sys belongs to the whole machine and is refused with
    ValueError. Raises TrafficError.
    """
    parts = PurePosixPath(name).parts
    if parts[:1] != ("net",) or ".." in parts:
        raise ValueError(f"{name} does not belong to a namespace")
    with (
        ns.entered(),
        _refusals(f"namespace {ns.name}: cannot set {name} to {value}"),
        # Unbuffered, because a buffered write that failed fails once more on closing.
        open(f"/proc/sys/{name}", "wb", buffering=0) as file,
    ):
        file.write(value.encode())


def _own_namespace() -> BinaryIO:
    # Not /proc/self: that is the namespace of the process's first thread.
    with _refusals("cannot open the network namespace of this thread"):
        return open("/proc/thread-self/ns/net", "rb")


def _unshared(name: str) -> BinaryIO:
    """A file on a new namespace, made by a thread of its own, so that no caller ever moves."""
    made: list[BinaryIO] = []
    failed: list[TrafficError] = []

    def unshare() -> None:
        try:
            with _refusals(f"cannot create network namespace {name}"):
                _libc("unshare", CLONE_NEWNET)
            made.append(_own_namespace())
        except TrafficError as error:
            failed.append(error)

    thread = threading.Thread(target=unshare, name=f"unshare {name}")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]


def _setns(fd: int) -> None:
    _libc("setns", fd, CLONE_NEWNET)


def _libc(function: str, *arguments: int) -> None:
    # os.unshare and os.setns come with Python 3.12.
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _offloads_off(ns: Namespace, link: str) -> None:
    with (
        ns.entered(),
        _refusals(f"namespace {ns.name}: cannot switch offloads of {link} off"),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control,
    ):
        for command in OFFLOADS:
            off = ctypes.create_string_buffer(struct.pack("=II", command, 0), 8)
            request = struct.pack("16sP16x", link.encode(), ctypes.addressof(off))
            fcntl.ioctl(control, SIOCETHTOOL, request)


def _index(ns: Namespace, link: str) -> int:
    with ns.entered(), _refusals(f"namespace {ns.name} has no link {link}"):
        return socket.if_nametoindex(link)


@contextmanager
def _netlink(ns: Namespace, what: str) -> Iterator[IPRoute]:
    with ns.entered(), _refusals(f"namespace {ns.name}: cannot {what}"), IPRoute() as netlink:
        yield netlink


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Turn what the kernel refuses into a TrafficError whose message begins with `what`."""
    try:
        yield
    except (OSError, NetlinkError) as error:
        code = error.code if isinstance(error, NetlinkError) else error.errno
        raise TrafficError(f"{what}: {_reason(code, error)}") from error


def _reason(code: int | None, error: Exception) -> str:
    match code:
        case errno.EPERM | errno.EACCES:
            return "this needs root (CAP_SYS_ADMIN and CAP_NET_ADMIN)"
        case errno.EOPNOTSUPP:
            return "this kernel has no support for it (is a module missing?)"
        case errno.EROFS:
            return "/proc/sys is read-only here (an unprivileged container?)"
        case None:
            return str(error)
        case _:
            return os.strerror(code)
