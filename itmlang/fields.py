"""The fields that interest, conditions and flow keys can name: one row each.

A row says what a field's values are (its type), how a packet answers (`get`),
how nftables spells it for each family, and when a packet has it at all. A new
field is a new row; nothing else in the compiler names one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from itmlang import values
from itmlang.packet import PORT_PROTOCOLS, TCP, Packet
from itmlang.values import IPV4, IPV6, Type

HOOKS: Final = ("prerouting", "input", "forward", "output", "postrouting")
ANY_FAMILY: Final = 0

Value = int | tuple[int, int] | str


@dataclass(frozen=True, eq=False)
class Field:
    """One matchable field.

    `nft` maps a family (or ANY_FAMILY) to the expression that loads the field;
    with `{proto}` in it, the name of the one protocol that the policy is about,
    or `th` where there may be several. `protocols` limits the field to packets of
    these protocols; `hooks` tells where packets have it: always ("all"), some of
    them ("some"), or none (not listed). `whole` says whether every IP packet that
    passes the two has the field's bytes. `present` is a match that holds exactly
    on the packets that have the field, for where a comparison would not tell.
    """

    name: str
    type: Type
    get: Callable[[Packet], Value | None]
    nft: Mapping[int, str]
    protocols: frozenset[int] | None = None
    hooks: Mapping[str, str] = field(default_factory=lambda: dict.fromkeys(HOOKS, "all"))
    whole: bool = True
    present: str = ""
    covers: tuple[str, ...] = ()  # fields that are there whenever this one is
    key: bool = True  # can be part of a flow's key
    compared: bool = True  # can stand in interest and conditions
    datatype: str = ""  # nftables' name for the field's type in a key; ip_addr by family
    nft_names: Mapping[int, str] = field(default_factory=dict)
    nft_format: str = "d"

    def families(self) -> tuple[int, ...]:
        """ANY_FAMILY alone, or the families that spell the field differently."""
        return tuple(self.nft)

    def key_type(self, family: int) -> str:
        """The type of the field in a set's key, as nftables lists it."""
        if self.datatype == "ip_addr":
            return "ipv4_addr" if family == IPV4 else "ipv6_addr"
        return self.datatype

    @property
    def key_size(self) -> int:
        """Bytes that the field takes in a set's key, in its larger family."""
        return 16 if self.datatype in ("ip_addr", "ifname") else 4

    def nft_value(self, value: int) -> str:
        """A value of the field as nftables reads it (addresses have their own form)."""
        return self.nft_names.get(value) or format(value, self.nft_format)


def _both(ipv4: str, ipv6: str) -> dict[int, str]:
    return {IPV4: ipv4, IPV6: ipv6}


def _one(expression: str) -> dict[int, str]:
    return {ANY_FAMILY: expression}


# The names that nft 1.0.6 knows and prints.
_NFT_PROTOCOLS: Final = {1: "icmp", 6: "tcp", 17: "udp", 33: "dccp", 47: "gre", 50: "esp",
                         51: "ah", 58: "ipv6-icmp", 132: "sctp", 136: "udplite"}  # fmt: skip
_NFT_DSCP: Final = {v: n for n, v in values.DSCP.names.items() if n[:2] in ("cs", "af", "ef")}


def _connection_number(packet: Packet) -> int | None:
    """A number for the packet's connection, as `ct id` is one: 32 bits, the same both ways."""
    connection = packet.connection
    return None if connection is None else hash(connection) & 0xFFFFFFFF


FIELDS: Final[Mapping[str, Field]] = {
    row.name: row
    for row in (
        Field(
            "family", values.FAMILY, lambda p: 0 if p.family == IPV4 else 1,
            _one("meta nfproto"), datatype="nf_proto", nft_names={0: "ipv4", 1: "ipv6"},
        ),
        Field(
            # An IPv6 packet whose extension headers are broken off has no known protocol.
            "protocol", values.PROTOCOL, lambda p: p.protocol,
            _one("meta l4proto"), whole=False, datatype="inet_proto", nft_names=_NFT_PROTOCOLS,
        ),
        Field(
            "saddr", values.ADDRESS, lambda p: p.source,
            _both("ip saddr", "ip6 saddr"), datatype="ip_addr",
        ),
        Field(
            "daddr", values.ADDRESS, lambda p: p.destination,
            _both("ip daddr", "ip6 daddr"), datatype="ip_addr",
        ),
        Field(
            "sport", values.PORT, lambda p: p.source_port,
            _one("{proto} sport"), protocols=PORT_PROTOCOLS, whole=False, datatype="inet_service",
        ),
        Field(
            "dport", values.PORT, lambda p: p.destination_port,
            _one("{proto} dport"), protocols=PORT_PROTOCOLS, whole=False, covers=("sport",),
            datatype="inet_service",
        ),
        Field(
            # Where there is no interface, nftables loads an empty name instead of
            # breaking off the rule: hence the index, which is 0 then.
            "in", values.INTERFACE, lambda p: p.input, _one("iifname"), present="iif != 0", datatype="ifname",
            hooks={"prerouting": "all", "input": "all", "forward": "all", "postrouting": "some"},
        ),
        Field(
            "out", values.INTERFACE, lambda p: p.output, _one("oifname"), datatype="ifname",
            hooks={"forward": "all", "output": "all", "postrouting": "all"},
        ),
        Field("length", values.LENGTH, lambda p: p.length, _one("meta length"), key=False),
        Field("ttl", values.OCTET, lambda p: p.ttl, _both("ip ttl", "ip6 hoplimit"), key=False),
        Field(
            "tos", values.TOS, lambda p: p.tos,
            _both("@nh,8,8", "@nh,4,8"), key=False, nft_format="#04x",
        ),
        Field(
            "dscp", values.DSCP, lambda p: p.dscp,
            _both("ip dscp", "ip6 dscp"), key=False, nft_names=_NFT_DSCP, nft_format="#04x",
        ),
        Field("ecn", values.ECN, lambda p: p.ecn, _both("ip ecn", "ip6 ecn"), key=False),
        Field("mark", values.NUMBER, lambda p: p.mark, _one("meta mark"), datatype="mark", nft_format="#x"),
        Field(
            "tcp.flags", values.FLAGS, lambda p: p.tcp_flags, _one("tcp flags"),
            protocols=frozenset({TCP}), whole=False, key=False, nft_format="#04x",
        ),
        Field(
            # `ct id` is one number for both directions (nf_ct_get_id); packets that
            # connection tracking does not know have none.
            "connection", values.NUMBER, lambda p: _connection_number(p),
            _one("ct id"), whole=False, datatype="integer", compared=False,
        ),
    )
}  # fmt: skip

# What interest may name, in the order that reads best in the ruleset.
INTEREST_FIELDS: Final = (
    "in", "out", "family", "protocol", "saddr", "daddr", "sport", "dport",
)  # fmt: skip

# What can be asked of a flow, with its type.
FLOW_ATTRIBUTES: Final[Mapping[str, Type]] = {"packets": values.PACKETS, "bytes": values.BYTES}
