"""The fields that interest, conditions and flow keys can name: one row each.

A row says what a field's values are (its type), how a packet answers (`get`),
how nftables spells it for each family, and when a packet has it at all. A new
field is a new row; nothing else in the compiler names one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from itmlang import values
from itmlang.packet import ICMP, ICMPV6, PORT_PROTOCOLS, TCP, Packet
from itmlang.values import IPV4, IPV6, Type

# Those with a device of their own stand around the others.
INGRESS, EGRESS = "ingress", "egress"
HOOKS: Final = ("prerouting", "input", "forward", "output", "postrouting")
ANY_FAMILY: Final = 0
# Connection tracking comes at these hooks, at this priority of a policy (-200 in nftables).
TRACKING_HOOKS: Final = ("prerouting", "output")
TRACKING: Final = -50

Value = int | tuple[int, int] | str


def hook_kind(hook: str) -> str:
    """The hook without its device: `ingress "eth0"` is an ingress."""
    return hook.partition(" ")[0]


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
    hooks: Mapping[str, str] = field(
        default_factory=lambda: dict.fromkeys((INGRESS, *HOOKS, EGRESS), "all")
    )
    whole: bool = True
    present: str = ""
    covers: tuple[str, ...] = ()  # fields that are there whenever this one is
    key: bool = True  # can be part of a flow's key
    compared: bool = True  # can stand in interest and conditions
    datatype: str = ""  # nftables' name for the field's type in a key; ip_addr by family
    nft_names: Mapping[int, str] = field(default_factory=dict)
    nft_format: str = "d"
    says_protocol: bool = False  # nft itself tests the protocol before it loads the field
    listed: bool = False  # its values are names that stand in no range
    tracked: bool = False  # it is what connection tracking says of the packet

    @property
    def by_family(self) -> bool:
        """Do the families spell the field differently, or has only one of them the field?"""
        return ANY_FAMILY not in self.nft

    @cached_property
    def by_protocol(self) -> bool:
        """Is the field spelled with the name of the protocol?"""
        return any("{proto}" in expression for expression in self.nft.values())

    def in_family(self, family: int) -> bool:
        """Can packets of the family have the field?"""
        return ANY_FAMILY in self.nft or family in self.nft or not self.nft

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


# Those of the language's names that nft 1.0.6 has, too.
_NFT_ICMP: Final = {v: n for n, v in values.ICMP_TYPE.names.items()}
_NFT_ICMPV6: Final = {
    v: n for n, v in values.ICMPV6_TYPE.names.items() if v < 5 or n.startswith("echo")
}
_TRACKED: Final = dict.fromkeys(HOOKS, "all")


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
            hooks={INGRESS: "all", "prerouting": "all", "input": "all", "forward": "all", "postrouting": "some"},
        ),
        Field(
            "out", values.INTERFACE, lambda p: p.output, _one("oifname"), datatype="ifname",
            hooks={"forward": "all", "output": "all", "postrouting": "all", EGRESS: "all"},
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
            # Rules never ask this: later fragments are diverted to rules of their own.
            "fragment", values.BOOLEAN, lambda p: int(p.is_later_fragment), {}, key=False,
        ),
        Field(
            "tcp.flags", values.FLAGS, lambda p: p.tcp_flags, _one("tcp flags"), says_protocol=True,
            protocols=frozenset({TCP}), whole=False, key=False, nft_format="#04x",
        ),
        Field(
            "tcp.mss", values.MSS, lambda p: p.tcp_mss, _one("tcp option maxseg size"),
            protocols=frozenset({TCP}), whole=False, key=False, says_protocol=True,
        ),
        Field(
            "icmp.type", values.ICMP_TYPE, lambda p: p.icmp_type, {IPV4: "icmp type"},
            protocols=frozenset({ICMP}), whole=False, key=False, says_protocol=True,
            nft_names=_NFT_ICMP,
        ),
        Field(
            "icmpv6.type", values.ICMPV6_TYPE, lambda p: p.icmpv6_type, {IPV6: "icmpv6 type"},
            protocols=frozenset({ICMPV6}), whole=False, key=False, says_protocol=True,
            nft_names=_NFT_ICMPV6,
        ),
        Field(
            "ct.state", values.CT_STATE, lambda p: p.ct_state, _one("ct state"), hooks=_TRACKED,
            key=False, nft_names={n: name for name, n in values.CT_STATE.names.items()}, listed=True,
            tracked=True,
        ),
        Field(
            "ct.direction", values.CT_DIRECTION, lambda p: p.ct_direction, _one("ct direction"),
            hooks=_TRACKED, whole=False, key=False, tracked=True,
            nft_names={n: name for name, n in values.CT_DIRECTION.names.items()},
        ),
        Field(
            # Drawn once for all classes; see `simplify`.
            "random", values.PERCENT, lambda p: p.draw, _one("numgen random mod 1000000"), key=False,
        ),
        Field(
            # `ct id` is one number for both directions (nf_ct_get_id); packets that
            # connection tracking does not know have none.
            "connection", values.NUMBER,
            lambda p: None if p.connection is None else p.connection.number,
            _one("ct id"), hooks=_TRACKED, whole=False, datatype="integer", compared=False,
            tracked=True,
        ),
    )
}  # fmt: skip

# What interest may name, in the order that reads best in the ruleset.
INTEREST_FIELDS: Final = (
    "in", "out", "family", "protocol", "saddr", "daddr", "sport", "dport",
)  # fmt: skip

# What can be asked of a flow, with its type; a rate is one of bits or of packets.
FLOW_ATTRIBUTES: Final[Mapping[str, Type]] = {
    "packets": values.PACKETS,
    "bytes": values.BYTES,
    "rate": values.RATE,
    "age": values.DURATION,
    "connections": values.NUMBER,
}
