"""Values and their types: what a field can hold and how it is written.

Every comparison of the language comes down to "the field's value lies in this
set", so a set of values is the one thing that all later stages handle:
`Ranges` (integers), `Addresses` (IPv4 and IPv6 apart) or `Names` (interface
patterns). They share one small algebra: union, intersection, complement,
membership. A `Type` says which of them a field has, what its values may be
called and which units it takes.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from operator import itemgetter
from typing import Final, Self

IPV4: Final = 4
IPV6: Final = 6
FAMILIES: Final = (IPV4, IPV6)
ADDRESS_MAX: Final = {IPV4: 2**32 - 1, IPV6: 2**128 - 1}


@dataclass(frozen=True)
class Ranges:
    """A set of integers from 0 to `limit`, as sorted, disjoint, non-touching intervals."""

    limit: int
    spans: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, limit: int, intervals: Iterable[tuple[int, int]]) -> Self:
        """The set of the given inclusive intervals; what lies outside 0..limit is cut off."""
        clipped = [(max(lo, 0), min(hi, limit)) for lo, hi in intervals]
        pairs = sorted([pair for pair in clipped if pair[0] <= pair[1]])
        if len(pairs) < 2:
            return cls(limit, tuple(pairs))
        merged: list[tuple[int, int]] = []
        for lo, hi in pairs:
            if merged and lo <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(hi, merged[-1][1]))
            else:
                merged.append((lo, hi))
        return cls(limit, tuple(merged))

    @property
    def empty(self) -> bool:
        return not self.spans

    @property
    def full(self) -> bool:
        return self.spans == ((0, self.limit),)

    def __contains__(self, value: int) -> bool:
        index = bisect_right(self.spans, value, key=itemgetter(0)) - 1
        return index >= 0 and value <= self.spans[index][1]

    def within(self, other: "Ranges") -> bool:
        """Are all values in the other set, too?"""
        for lo, hi in self.spans:
            index = bisect_right(other.spans, lo, key=itemgetter(0)) - 1
            if index < 0 or hi > other.spans[index][1]:
                return False
        return True

    def union(self, other: "Ranges") -> "Ranges":
        return Ranges.of(self.limit, self.spans + other.spans)

    def intersection(self, other: "Ranges") -> "Ranges":
        pairs, mine, theirs = [], 0, 0
        while mine < len(self.spans) and theirs < len(other.spans):
            left, right = self.spans[mine], other.spans[theirs]
            lo, hi = max(left[0], right[0]), min(left[1], right[1])
            if lo <= hi:
                pairs.append((lo, hi))
            if left[1] < right[1]:
                mine += 1
            else:
                theirs += 1
        return Ranges(self.limit, tuple(pairs))

    def complement(self) -> "Ranges":
        gaps, start = [], 0
        for lo, hi in self.spans:
            if start < lo:
                gaps.append((start, lo - 1))
            start = hi + 1
        if start <= self.limit:
            gaps.append((start, self.limit))
        return Ranges(self.limit, tuple(gaps))


@dataclass(frozen=True)
class Addresses:
    """A set of IP addresses: one field for both families, so IPv4 and IPv6 side by side."""

    v4: Ranges = Ranges(ADDRESS_MAX[IPV4])
    v6: Ranges = Ranges(ADDRESS_MAX[IPV6])

    @classmethod
    def of(cls, intervals: Iterable[tuple[int, int, int]]) -> Self:
        """The set of inclusive intervals (family, low, high)."""
        every = list(intervals)
        return cls(
            *(
                Ranges.of(ADDRESS_MAX[family], [(lo, hi) for f, lo, hi in every if f == family])
                for family in FAMILIES
            )
        )

    def family(self, family: int) -> Ranges:
        return self.v4 if family == IPV4 else self.v6

    @property
    def empty(self) -> bool:
        return self.v4.empty and self.v6.empty

    @property
    def full(self) -> bool:
        return self.v4.full and self.v6.full

    def __contains__(self, value: tuple[int, int]) -> bool:
        """Is (family, address as an integer) in the set?"""
        return value[1] in self.family(value[0])

    def within(self, other: "Addresses") -> bool:
        """Are all addresses in the other set, too?"""
        return self.v4.within(other.v4) and self.v6.within(other.v6)

    def union(self, other: "Addresses") -> "Addresses":
        return Addresses(self.v4.union(other.v4), self.v6.union(other.v6))

    def intersection(self, other: "Addresses") -> "Addresses":
        return Addresses(self.v4.intersection(other.v4), self.v6.intersection(other.v6))

    def complement(self) -> "Addresses":
        return Addresses(self.v4.complement(), self.v6.complement())


@dataclass(frozen=True)
class Names:
    """A set of interface names: those that match a pattern (`veth*`), or all others."""

    patterns: frozenset[str] = frozenset()
    inverted: bool = False

    def __post_init__(self) -> None:
        # Patterns within others go: nftables wants the intervals of a set disjoint.
        widest = frozenset(p for p in self.patterns if not _within(p, self.patterns - {p}))
        object.__setattr__(self, "patterns", widest)

    @property
    def empty(self) -> bool:
        return not self.patterns and not self.inverted

    @property
    def full(self) -> bool:
        return not self.patterns and self.inverted

    def __contains__(self, name: str) -> bool:
        return any(_matches(p, name) for p in self.patterns) != self.inverted

    def within(self, other: "Names") -> bool:
        """Are all names in the other set, too? May say False where that has no simple form."""
        try:
            return self.intersection(other) == self
        except InexpressibleError:
            return False

    def union(self, other: "Names") -> "Names":
        return self.complement().intersection(other.complement()).complement()

    def intersection(self, other: "Names") -> "Names":
        match self.inverted, other.inverted:
            case False, False:
                both = {p for p in self.patterns if _within(p, other.patterns)} | {
                    p for p in other.patterns if _within(p, self.patterns)
                }
                return Names(frozenset(both))
            case True, True:
                return Names(self.patterns | other.patterns, True)
            case True, False:
                return other.intersection(self)
            case _:
                kept = Names(frozenset(p for p in self.patterns if not _within(p, other.patterns)))
                if any(_within(p, kept.patterns) for p in other.patterns):
                    raise InexpressibleError("all of a pattern's interfaces but some of them")
                return kept

    def complement(self) -> "Names":
        return Names(self.patterns, not self.inverted)


class InexpressibleError(Exception):
    """A set that has no compact form; the caller keeps the two tests apart."""


def _matches(pattern: str, name: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def _within(pattern: str, patterns: frozenset[str]) -> bool:
    """Is each name of the pattern one of the patterns' names?"""
    stems = (f"{pattern[:end]}*" for end in range(len(pattern) + 1))
    return pattern in patterns or any(stem in patterns for stem in stems)


ValueSet = Ranges | Addresses | Names


@dataclass(frozen=True)
class Type:
    """What a value is: its kind of set, its greatest value, its names and its units.

    `units` maps a unit to the number of base units in it, and `offsets` to what is added
    to each value, to tell one unit's values from another's; `plain` tells whether a
    number without a unit is taken. `refused` maps names that one would expect to
    the reason why they cannot be used.
    """

    name: str
    kind: str  # "integer", "address", "interface" or "duration"
    limit: int = 0
    names: Mapping[str, int] = field(default_factory=dict)
    units: Mapping[str, int] = field(default_factory=dict)
    offsets: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    plain: bool = True
    article: str = "a"

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def nothing(self) -> ValueSet:
        match self.kind:
            case "address":
                return Addresses()
            case "interface":
                return Names()
            case _:
                return Ranges(self.limit)

    @property
    def everything(self) -> ValueSet:
        return complement(self.nothing)

    @cached_property
    def _by_value(self) -> dict[int, str]:
        return {value: name for name, value in reversed(list(self.names.items()))}

    def text(self, value: int | tuple[int, int] | str) -> str:
        """A value as one would write it in a policy."""
        if isinstance(value, str):
            return f'"{value}"'
        if isinstance(value, tuple):
            return address_text(*value)
        if self.kind == "duration":
            return duration_text(value)
        if self in (RATE, PACKET_RATE, PERCENT):
            return _with_unit(value, self)
        if self is FLAGS:
            return ",".join(name for name, bit in self.names.items() if value & bit) or "none"
        return self._by_value.get(value, str(value))


def union(a: ValueSet, b: ValueSet) -> ValueSet:
    """The values in either set; both must be of one kind."""
    match a, b:
        case (Ranges(), Ranges()) | (Addresses(), Addresses()) | (Names(), Names()):
            return a.union(b)  # type: ignore[arg-type]
    raise TypeError(f"{a!r} and {b!r} are not of one kind")


def union_all(nothing: ValueSet, sets: Sequence[ValueSet]) -> ValueSet:
    """The values in any of the sets, all of the kind of `nothing`; linear in their number."""
    match nothing:
        case Ranges():
            return Ranges.of(nothing.limit, [i[1:] for one in sets for i in intervals(one)])
        case Addresses():
            return Addresses.of([i for one in sets for i in intervals(one)])
        case Names():
            names = [one for one in sets if isinstance(one, Names)]
            if not any(one.inverted for one in names):
                return Names(frozenset().union(*(one.patterns for one in names)))
            found: ValueSet = nothing
            for one in names:
                found = union(found, one)
            return found


def intersection(a: ValueSet, b: ValueSet) -> ValueSet:
    """The values in both sets; both must be of one kind.

    Raises `InexpressibleError` where two interface patterns have no common form.
    """
    match a, b:
        case (Ranges(), Ranges()) | (Addresses(), Addresses()) | (Names(), Names()):
            return a.intersection(b)  # type: ignore[arg-type]
    raise TypeError(f"{a!r} and {b!r} are not of one kind")


def within(a: ValueSet, b: ValueSet) -> bool:
    """Are all values of a in b? Both must be of one kind."""
    match a, b:
        case (Ranges(), Ranges()) | (Addresses(), Addresses()) | (Names(), Names()):
            return a.within(b)  # type: ignore[arg-type]
    raise TypeError(f"{a!r} and {b!r} are not of one kind")


def complement(values: ValueSet) -> ValueSet:
    """The values that are not in the set."""
    return values.complement()


def address_text(family: int, value: int) -> str:
    if family == IPV4:  # many times as quick as the library
        return f"{value >> 24}.{value >> 16 & 255}.{value >> 8 & 255}.{value & 255}"
    return str(IPv6Address(value))


def prefix_text(family: int, lo: int, hi: int) -> str:
    """An address interval as an address, a prefix or `low-high`, whichever is shortest."""
    if lo == hi:
        return address_text(family, lo)
    size = hi - lo + 1
    bits = 32 if family == IPV4 else 128
    if size & (size - 1) == 0 and lo % size == 0:
        return f"{address_text(family, lo)}/{bits - size.bit_length() + 1}"
    return f"{address_text(family, lo)}-{address_text(family, hi)}"


def network_interval(text: str) -> tuple[int, int, int]:
    """(family, low, high) of an address or a prefix.

    Raises `ValueError` for what is neither, and for a prefix with host bits set.
    """
    if "%" in text or (not text.rpartition("/")[2].isdigit() and "/" in text):
        raise ValueError("zones and netmasks cannot be used")
    if "/" not in text:
        address = IPv6Address(text) if ":" in text else IPv4Address(text)
        return address.version, int(address), int(address)
    network = IPv6Network(text) if ":" in text else IPv4Network(text)
    low = int(network.network_address)
    return network.version, low, low + 2 ** (network.max_prefixlen - network.prefixlen) - 1


_DURATIONS: Final = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}


def duration_text(milliseconds: int) -> str:
    """A duration in its largest whole unit, as the language writes it."""
    if not milliseconds:
        return "0s"
    for unit, size in _DURATIONS.items():
        if milliseconds % size == 0:
            return f"{milliseconds // size}{unit}"
    raise AssertionError("a duration is a whole number of milliseconds")


def _with_unit(value: int, type: Type) -> str:
    """A value in its largest unit that gives a whole number, else in the largest that it reaches."""
    offset = value % len(PERIODS) if type.offsets else 0
    value -= offset
    units = ((n, s) for n, s in type.units.items() if type.offsets.get(n, 0) == offset)
    sizes = sorted(units, key=lambda unit: -unit[1])
    for name, size in sizes:
        if value % size == 0 and value:
            return f"{value // size}{_gap(name)}"
    name, size = next(((n, s) for n, s in sizes if s <= value), sizes[-1])
    return f"{value / size:g}{_gap(name)}"


def _gap(unit: str) -> str:
    return unit if unit[0] in "%/" else f" {unit}"


def _dscp_names() -> dict[str, int]:
    """RFC 2474 class selectors, RFC 2597 assured and RFC 3246 expedited forwarding, RFC 8622."""
    names = {f"cs{n}": n << 3 for n in range(8)}
    names |= {f"af{c}{d}": (c << 3) | (d << 1) for c in range(1, 5) for d in range(1, 4)}
    return names | {"ef": 46, "le": 1, "va": 44}


# IANA's protocol numbers, under the names that this language gives them.
PROTOCOLS: Final[Mapping[str, int]] = {
    "icmp": 1, "igmp": 2, "ipip": 4, "tcp": 6, "udp": 17, "dccp": 33, "ipv6": 41, "rsvp": 46,
    "gre": 47, "esp": 50, "ah": 51, "icmpv6": 58, "eigrp": 88, "ospf": 89, "pim": 103,
    "vrrp": 112, "l2tp": 115, "sctp": 132, "udplite": 136,
}  # fmt: skip

SERVICES: Final[Mapping[str, int]] = {
    "ftp-data": 20, "ftp": 21, "ssh": 22, "telnet": 23, "smtp": 25, "dns": 53, "domain": 53,
    "bootps": 67, "bootpc": 68, "tftp": 69, "http": 80, "kerberos": 88, "pop3": 110, "ntp": 123,
    "imap": 143, "snmp": 161, "bgp": 179, "ldap": 389, "https": 443, "submissions": 465,
    "isakmp": 500, "syslog": 514, "submission": 587, "ldaps": 636, "imaps": 993, "pop3s": 995,
    "openvpn": 1194, "mysql": 3306, "stun": 3478, "rdp": 3389, "postgresql": 5432, "sip": 5060,
    "sips": 5061, "mdns": 5353, "http-alt": 8080, "wireguard": 51820,
}  # fmt: skip

# RFC 9293 section 3.1; the two high bits by RFC 3168.
TCP_FLAGS: Final[Mapping[str, int]] = {
    "fin": 1, "syn": 2, "rst": 4, "psh": 8, "ack": 16, "urg": 32, "ece": 64, "cwr": 128,
}  # fmt: skip

# RFC 1349's types of service, as the paper's section 5 uses them.
TOS_NAMES: Final[Mapping[str, int]] = {
    "minimize-delay": 0x10,
    "maximize-throughput": 0x08,
    "maximize-reliability": 0x04,
}
_MINIMIZE_COST = "its bit (0x02) lies in what is the ECN field today (RFC 3168)"

_PACKETS: Final = {"packets": 1, "packet": 1}
_BYTES: Final = {
    "bytes": 1, "byte": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip

# A rate keeps the period that it was given in, for a bucket is one period deep. Its value
# is the amount a day, a whole number for all units, times four, plus the period's number.
PERIODS: Final = {"s": 86_400, "m": 1_440, "h": 24, "d": 1}
_BITS: Final = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}


# What one writes elsewhere, by its lower case.
_UNITS_MEANT: Final = {
    "bps": "bit", "kbps": "kbit", "mbps": "mbit", "gbps": "gbit", "kbit": "kbit", "mbit": "mbit",
    "gbit": "gbit", "kb": "KB", "mb": "MB", "gb": "GB", "pps": "packets/s", "pkts": "packets",
    "pkt": "packets", "b": "bytes", "sec": "s", "secs": "s", "second": "s", "seconds": "s",
    "min": "m", "mins": "m", "minute": "m", "minutes": "m", "hour": "h", "hours": "h", "day": "d",
    "days": "d", "msec": "ms",
}  # fmt: skip


def unit_help(word: str) -> str:
    """What unit was meant by a word that is none, as help; "" if there is no telling."""
    meant = _UNITS_MEANT.get(word.lower())
    return f"there is no unit `{word}`: write `{meant}`" if meant and meant != word else ""


def _rates(amounts: Mapping[str, int]) -> dict[str, int]:
    return {
        f"{unit}/{per}": size * times * len(PERIODS)
        for unit, size in amounts.items()
        for per, times in PERIODS.items()
    }


_RATES: Final = _rates(_BITS | {u: 8 * n for u, n in _BYTES.items()}) | {
    unit: size * PERIODS["s"] * len(PERIODS) for unit, size in _BITS.items()
}
_PACKET_RATES: Final = _rates({"packets": 1, "packet": 1, "": 1})
_PERIOD_OF: Final = {
    unit: list(PERIODS).index(unit[-1]) for unit in (*_RATES, *_PACKET_RATES) if "/" in unit
}

FAMILY: Final = Type("family", "integer", 1, {"ipv4": 0, "ipv6": 1}, plain=False)
PROTOCOL: Final = Type("protocol", "integer", 255, PROTOCOLS)
ADDRESS: Final = Type("address", "address", article="an")
PORT: Final = Type("port", "integer", 65535, SERVICES)
INTERFACE: Final = Type("interface", "interface", article="an")
NUMBER: Final = Type("number", "integer", 2**32 - 1)
OCTET: Final = Type("octet", "integer", 255, article="an")
TOS: Final = Type("tos", "integer", 255, TOS_NAMES, refused={"minimize-cost": _MINIMIZE_COST})
DSCP: Final = Type("dscp", "integer", 63, _dscp_names())
ECN: Final = Type("ecn", "integer", 3, {"not-ect": 0, "ect1": 1, "ect0": 2, "ce": 3}, article="an")
FLAGS: Final = Type("flag", "integer", 255, TCP_FLAGS)
PACKETS: Final = Type("packets", "integer", 2**63 - 1, units=_PACKETS)
BYTES: Final = Type("bytes", "integer", 2**63 - 1, units=_BYTES)
LENGTH: Final = Type("bytes", "integer", 2**32 - 1, units=_BYTES)
DURATION: Final = Type("duration", "duration", 2**48, units=_DURATIONS, plain=False)
PRIORITY: Final = Type("priority", "integer", 2**31 - 1)
RATE: Final = Type("rate", "integer", 2**63 - 1, units=_RATES, offsets=_PERIOD_OF, plain=False)
PACKET_RATE: Final = Type(
    "packet_rate", "integer", 2**63 - 1, units=_PACKET_RATES, offsets=_PERIOD_OF, plain=False
)
# Millionths.
PERCENT: Final = Type("percentage", "integer", 10**6, units={"%": 10**4}, plain=False)
BOOLEAN: Final = Type(
    "boolean", "integer", 1, {"no": 0, "yes": 1, "false": 0, "true": 1}, plain=False
)
MSS: Final = Type("bytes", "integer", 65_535, units=_BYTES)
CT_STATE: Final = Type(
    "state", "integer", 4,
    {"invalid": 0, "established": 1, "related": 2, "new": 3, "untracked": 4}, plain=False,
)  # fmt: skip
CT_DIRECTION: Final = Type("direction", "integer", 1, {"original": 0, "reply": 1}, plain=False)
# RFC 792 and RFC 4443, by IANA's registries.
ICMP_TYPE: Final = Type(
    "icmp_type", "integer", 255,
    {
        "echo-reply": 0, "destination-unreachable": 3, "source-quench": 4, "redirect": 5,
        "echo-request": 8, "router-advertisement": 9, "router-solicitation": 10,
        "time-exceeded": 11, "parameter-problem": 12, "timestamp-request": 13,
        "timestamp-reply": 14,
    }, article="an",
)  # fmt: skip
ICMPV6_TYPE: Final = Type(
    "icmpv6_type", "integer", 255,
    {
        "destination-unreachable": 1, "packet-too-big": 2, "time-exceeded": 3,
        "parameter-problem": 4, "echo-request": 128, "echo-reply": 129, "mld-query": 130,
        "mld-report": 131, "mld-done": 132, "router-solicitation": 133,
        "router-advertisement": 134, "neighbor-solicitation": 135,
        "neighbor-advertisement": 136, "redirect": 137, "mld2-report": 143,
    }, article="an",
)  # fmt: skip
# The bits that `set tos` and `unset tos` know.
TOS_BIT: Final = Type(
    "type of service", "integer", 255, TOS_NAMES,
    refused={"minimize-cost": _MINIMIZE_COST}, plain=False,
)  # fmt: skip

# The types that a parameter can be declared with.
PARAMETER_TYPES: Final[Mapping[str, Type]] = {
    t.name: t
    for t in (
        ADDRESS, BOOLEAN, BYTES, CT_DIRECTION, CT_STATE, DSCP, DURATION, ECN, FAMILY, FLAGS,
        ICMP_TYPE, ICMPV6_TYPE, INTERFACE, NUMBER, OCTET, PACKETS, PACKET_RATE, PERCENT, PORT,
        PROTOCOL, RATE, TOS,
    )
}  # fmt: skip


def intervals(values: ValueSet) -> Iterator[tuple[int, int, int]]:
    """(family or 0, low, high) for each interval of a set of integers or addresses."""
    match values:
        case Ranges():
            yield from ((0, lo, hi) for lo, hi in values.spans)
        case Addresses():
            for family in FAMILIES:
                yield from ((family, lo, hi) for lo, hi in values.family(family).spans)
        case Names():
            raise TypeError("names have no intervals")
