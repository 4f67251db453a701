"""What the kernel tells by netlink, against what libnftables was told."""

from collections.abc import Iterator

import pytest

from runtime import nft
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
