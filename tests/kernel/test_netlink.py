"""What the kernel tells by netlink, against what libnftables was told."""

import socket
from collections.abc import Iterator

import pytest

from runtime import netlink, nft
from runtime.traffic import Namespace, TrafficError
from tests.support.needs import unavailable


@pytest.fixture
def host() -> Iterator[Namespace]:
    try:
        namespace = Namespace.create("netlink")
    except TrafficError as error:
        unavailable(error)
    with namespace.entered():
        yield namespace
    namespace.close()


def test_tables_are_those_that_a_policy_can_have(host: Namespace) -> None:
    assert nft.tables() == ()
    for path in ("netdev z", "inet b", "ip theirs", "inet a", "ip6 theirs", "bridge theirs"):
        nft.load(f"add table {path}\n")
    assert nft.tables() == ("inet a", "inet b", "netdev z")


@pytest.mark.parametrize("family", ["inet", "netdev"])
def test_counters_of_one_table(host: Namespace, family: str) -> None:
    # More than one answer of netlink holds.
    wanted = {f"counter_{n}": (n, 10**12 + n) for n in range(3000)}
    lines = [
        f"add counter {family} here {name} {{ packets {packets} bytes {size} }}"
        for name, (packets, size) in wanted.items()
    ]
    others = ["add quota inet here q { over 5 bytes }"] if family == "inet" else []
    tables = [f"add table {one} {name}" for one in ("inet", "netdev") for name in ("here", "there")]
    elsewhere = [f"add counter {family} there other", "add counter ip here other"]
    nft.load("\n".join([*tables, "add table ip here", *lines, *others, *elsewhere, ""]))
    assert nft.counters(f"{family} here") == wanted
    assert nft.counters(f"{family} nowhere") == {}


def test_tables_of_others_are_not_fetched(host: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """libnftables reads all rules of all tables for either list."""
    monkeypatch.setattr(nft, "_in_child", lambda *_: pytest.fail("libnftables was asked"))
    assert nft.tables() == ()
    assert nft.counters("inet none") == {}


def test_bits_of_connections_marks_are_cleared_and_others_stay(host: Namespace) -> None:
    nft.load(
        "table inet t { chain c { type filter hook output priority 0; "
        "udp dport 9 ct mark set 0xab000001; udp dport 10 ct mark set 0x0b000002; }; }\n"
    )
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for port in (9, 10):
            sender.sendto(b"", ("127.0.0.1", port))
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"", ("::1", 9))
    assert netlink.clear_marks(0xF000_0000) == 2
    assert netlink.clear_marks(0xF000_0000) == 0
    assert netlink.clear_marks(0x0000_0001) == 2, "the lower bits had stayed"
    assert netlink.clear_marks(0x0B00_0000) == 3


def test_elements_of_one_set_sorted_and_the_same_as_long_as_nobody_changes_them(
    host: Namespace,
) -> None:
    nft.load(
        "table inet t { chain c { }; set s { type ipv4_addr; flags interval; }; "
        "map m { type inet_service : verdict; }; set empty { type mark; }; }\n"
        "add element inet t s { 10.0.0.0/8, 192.168.0.1 }\n"
        "add element inet t m { "
        + ", ".join(f"{port} : goto c" for port in range(1, 5001))
        + " }\n"
    )
    before = netlink.elements("inet t", "m")
    assert (len(before), before) == (5000, sorted(before))
    assert netlink.elements("inet t", "m") == before
    assert netlink.elements("inet t", "empty") == []
    assert netlink.elements("inet t", "s") != []
    nft.load("delete element inet t m { 7 }\nadd element inet t m { 7 : jump c }\n")
    assert netlink.elements("inet t", "m") != before
    with pytest.raises(OSError, match="No such file"):
        netlink.elements("inet t", "nothing")
