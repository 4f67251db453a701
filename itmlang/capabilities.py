"""What a machine can do of all that itm can use: one row for each feature.

A row says what a feature is for, what its lack costs and how to mend it. A feature
that the compiler's rules use also says how it reads in nftables text (`spelled`):
what a policy needs is read off its compiled text, so that no part of the compiler can
emit what nobody asked the machine for. How a machine is asked is the runtime's affair
(`itmc doctor`); the answers are a `Capabilities`, also as a file for `compile --for`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

SCHEMA: Final = 1


class CapabilitiesError(ValueError):
    """What was read are no capabilities; the message says why."""


@dataclass(frozen=True)
class Feature:
    """One thing that a kernel, or the nftables on it, has or lacks.

    `part` is the part of itm that asks for it, one of `PARTS`. `spelled` is a pattern
    that finds it in a line of a compiled ruleset whose quotes are empty; "" if no rule
    of the compiler needs it. A policy without such a feature is refused. Of the part
    "queues" a machine needs one alone.
    """

    name: str
    part: str
    purpose: str
    cost: str
    mend: str
    spelled: str = ""

    def used_in(self, line: str) -> bool:
        """Does a line of a ruleset, its quotes emptied, use the feature?"""
        return bool(self.spelled) and re.search(self.spelled, line) is not None


PARTS: Final[Mapping[str, str]] = {
    "policies": "what policies compile to",
    "queues": "packets to Python, one way or the other",
    "tunnels": "tunnels of the kernel's own",
    "links": "shares of a link's rate",
    "applying": "changing what runs",
    "lab": "throwaway networks, for `lab` and `test --kernel`",
    "later": "for versions to come",
}


def _module(name: str, option: str) -> str:
    return f"`modprobe {name}`, or a kernel with {option}"


_NEWER: Final = "a newer kernel"
_OWN_RULES: Final = "a kernel with CONFIG_NF_TABLES, and the right to use it"

FEATURES: Final[tuple[Feature, ...]] = (
    # Where rules stand.
    Feature(
        "inet tables", "policies", "one table for IPv4 and IPv6: all policies but those at egress",
        "no policy can be loaded, except at egress",
        _module("nf_tables", "CONFIG_NF_TABLES_INET"), r"^table inet ",
    ),
    Feature(
        "ingress", "policies", "policies `at ingress \"DEVICE\"`", "no policy can stand at ingress",
        "Linux 5.10 or later with CONFIG_NETFILTER_INGRESS; or `at prerouting`",
        r" hook ingress ",
    ),
    Feature(
        "egress", "policies", "policies `at egress \"DEVICE\"`", "no policy can stand at egress",
        "Linux 5.16 or later with CONFIG_NETFILTER_EGRESS; or `at postrouting`",
        r" hook egress ",
    ),
    Feature(
        "route chains", "policies", "routing anew what was changed `at output`",
        "at output no `set mark`, `set saddr`, `set daddr`", _NEWER, r"\btype route hook ",
    ),
    # What rules look up.
    Feature(
        "value sets", "policies", "sets of values, ranges and prefixes", "only single values in conditions",
        _OWN_RULES, r"flags interval|@(?:keys|ports|protocols|addresses)_|(?:^|\s)(?!vmap|@)\S+ \{ (?!type\b).*\}",
    ),
    Feature(
        "verdict maps", "policies", "IPv4's types of service, chance, many classes",
        "no `set tos`, `unset tos`, `random`; many classes need `--no-optimize`",
        _OWN_RULES, r"^\tmap |\bvmap [@{]",
    ),
    Feature(
        "timed verdict maps", "policies", "parameters under control, back at their file's value when nobody moves them",
        "no parameter in `control`", _NEWER, r"^\t\tflags timeout$",
    ),
    Feature(
        "dynamic sets", "policies", "flows and learned sets, with time-outs and a size",
        "no flow, no learned set, no `update`", _NEWER, r"flags dynamic|\bupdate @|\badd @",
    ),
    Feature(
        "concatenations", "policies", "flows with a key of several fields",
        "each flow has one field as its key", _NEWER, r"\w \. \w",
    ),
    Feature(
        "element deletion", "policies", "`remove … from @set`, counting connections",
        "no `remove` in `update`, no `FLOW.connections`", _NEWER, r"\bdelete @",
    ),
    # What is kept for each flow.
    Feature(
        "element counters", "policies", "counting packets and bytes of each flow", "no `count`",
        _NEWER, r"\{[^}]*\bcounter\b",
    ),
    Feature(
        "element limits", "policies", "thresholds of packets, rates, limits of each flow",
        "no `FLOW.packets`, no `FLOW.rate`, no `limit … per`", _module("nft_limit", "CONFIG_NFT_LIMIT"),
        r"\{[^}]*\blimit rate\b",
    ),
    Feature(
        "element quotas", "policies", "thresholds of bytes", "no `FLOW.bytes`",
        _module("nft_quota", "CONFIG_NFT_QUOTA"), r"\{[^}]*\bquota\b",
    ),
    Feature(
        "element connections", "policies", "counting the open connections of each flow",
        "no `FLOW.connections`", _module("nft_connlimit", "CONFIG_NFT_CONNLIMIT"),
        r"\{[^}]*\bct count\b",
    ),
    # What rules ask of a packet.
    Feature(
        "raw header bytes", "policies", "`tos`, and header fields that nftables writes wrong or not at all",
        "no condition on `tos`, no ports of UDP written, no `set tcp.mss`; over IPv6 no `set tos`",
        "a kernel and an nftables that know payload expressions: any of the last years",
        r"@(?:nh|th),",
    ),
    Feature(
        "fragments", "policies", "telling later fragments of IPv6 from packets with ports",
        "over IPv6 no condition on ports or flags, no `fragment`", "a kernel with CONFIG_IPV6 and CONFIG_NF_TABLES_INET",
        r"\bfrag frag-off\b|\bexthdr frag\b",
    ),
    Feature(
        "TCP options", "policies", "reading and writing the largest segment size",
        "no condition on `tcp.mss`, no `set tcp.mss`", _NEWER, r"\btcp option\b",
    ),
    Feature(
        "connection tracking", "policies", "`ct.state`, `ct.direction`, and connections of a flow",
        "no condition on `ct.…`, no `FLOW.connections`", _module("nft_ct", "CONFIG_NFT_CT and CONFIG_NF_CONNTRACK"),
        r"\bct (?:state|direction|count)\b",
    ),
    Feature(
        "connection numbers", "policies", "flows by `connection`",
        "name the five fields of a connection instead", _NEWER,
        r"\bct id\b",
    ),
    Feature(
        "numbers drawn", "policies", "`random`, `sample`", "no `random`, no `sample`",
        _module("nft_numgen", "CONFIG_NFT_NUMGEN"), r"\bnumgen\b",
    ),
    # What rules do.
    Feature(
        "named counters", "policies", "packets and bytes of each class, for `status`",
        "no policy can be loaded", _module("nft_objref", "CONFIG_NFT_OBJREF or CONFIG_NF_TABLES"),
        r"^\tcounter |\bcounter name\b",
    ),
    Feature(
        "header rewriting", "policies", "writing addresses, ports, DSCP, TTL, and the checksums that follow",
        "no `set` of a header field", _NEWER, r"\b(?:[sd]addr|ttl|hoplimit|dscp|(?:tcp|udp) [sd]port) set\b",
    ),
    Feature(
        "SCTP rewriting", "policies", "writing SCTP's ports, and its checksum",
        "`set sport`, `set dport` only where the interest leaves SCTP out", _NEWER,
        r"\bsctp [sd]port set\b",
    ),
    Feature(
        "packet marks", "policies", "`set mark`, and updates under conditions of several parts",
        "no `set mark`", _OWN_RULES, r"\bmeta mark set\b",
    ),
    Feature(
        "limits", "policies", "`limit`, `record`", "no `limit`, no `record`",
        _module("nft_limit", "CONFIG_NFT_LIMIT"), r"\blimit rate\b(?![^{]*\})",
    ),
    Feature(
        "reject", "policies", "`reject`", "`drop` instead: the sender is not told",
        _module("nft_reject_inet", "CONFIG_NFT_REJECT_INET"), r"\breject with\b",
    ),
    Feature(
        "kernel log", "policies", "`record`", "no `record`",
        _module("nft_log", "CONFIG_NFT_LOG and CONFIG_NF_LOG_SYSLOG"), r"\blog prefix \"\"(?! group)",
    ),
    Feature(
        "log groups", "policies", "`sample`", "no `sample`",
        _module("nfnetlink_log", "CONFIG_NETFILTER_NETLINK_LOG"), r"\blog prefix \"\" group\b",
    ),
    # What Python does.
    Feature(
        "fragments together", "policies", "`decapsulate` of what was fragmented on its way", "no `decapsulate`",
        _module("nft_tproxy", "CONFIG_NFT_TPROXY"), r"\btproxy ip\b",
    ),
    Feature(
        "flow hashes", "policies", "packets of a flow kept together among several queues", "no `queues` but one",
        _module("nft_hash", "CONFIG_NFT_HASH"), r"\bsymhash\b",
    ),
    Feature(
        "connection marks", "policies", "what a handler decides `once per connection`",
        "no `once per connection`: it sees every packet", _module("nft_ct", "CONFIG_NF_CONNTRACK_MARK and CONFIG_NFT_CT"),
        r"\bct mark\b",
    ),
    Feature(
        "native queue", "queues", "`call`, tunnels, `run python`, by nftables' own `queue`",
        "the xt queue does the same", _module("nft_queue", "CONFIG_NFT_QUEUE"), r"\bqueue flags bypass to\b",
    ),
    Feature(
        "xt queue", "queues", "`call`, tunnels, `run python`, by the older target NFQUEUE",
        "the native queue does the same", _module("xt_NFQUEUE", "CONFIG_NFT_COMPAT and CONFIG_NETFILTER_XT_TARGET_NFQUEUE"),
        r"# NFQUEUE ",
    ),
    Feature(
        "BPF on routes", "tunnels", "`encapsulate` in the kernel", "Python does it",
        "a kernel with CONFIG_LWTUNNEL_BPF",
    ),
    Feature(
        "BPF on links", "tunnels", "`decapsulate` in the kernel", "Python does it",
        _module("cls_bpf", "CONFIG_NET_CLS_BPF and CONFIG_NET_SCH_INGRESS"),
    ),
    # What links do.
    Feature(
        "HTB", "links", "`link`: classes with rates and priorities", "no `link`",
        _module("sch_htb", "CONFIG_NET_SCH_HTB"),
    ),
    Feature(
        "u32 filters", "links", "`link`: packets that no policy gave a class", "no `link`",
        _module("cls_u32", "CONFIG_NET_CLS_U32"),
    ),
    Feature(
        "IFB", "links", "`link` with `ingress`: shaping of what comes in", "only what leaves can be shaped",
        "`modprobe -a ifb act_mirred sch_ingress`, or a kernel with CONFIG_IFB, CONFIG_NET_ACT_MIRRED and CONFIG_NET_SCH_INGRESS",
    ),
    Feature(
        "fq_codel", "links", "short queues in a link's classes, a fair share for each flow",
        "each class has a plain queue: a long flow delays the others of its class",
        _module("sch_fq_codel", "CONFIG_NET_SCH_FQ_CODEL"),
    ),
    # Changing what runs.
    Feature(
        "sets changed in place", "applying", "a new time-out or size for a set that keeps its elements",
        "a flow gets another `timeout` or `max` only after `itmc remove`", _NEWER,
    ),
    Feature(
        "elements restored", "applying", "elements put back with their counts and their time left",
        "a flow gets another key only after `itmc remove`; its counts are lost", "a newer kernel, or a newer libnftables",
    ),
    Feature(
        "rules replaced", "applying", "one rule changed, the others left alone",
        "a loaded policy is changed only after `itmc remove`", _OWN_RULES,
    ),
    Feature(
        "devices awaited", "applying", "ingress and egress of a device that comes later",
        "`apply` refuses a policy at a device that is not there yet", "Linux 6.16 or later; or apply after the device came",
    ),
    # Throwaway networks.
    Feature(
        "namespaces and veth", "lab", "networks that touch nothing of the machine's own",
        "no `itmc lab`, no `itmc test --kernel`", _module("veth", "CONFIG_NET_NS and CONFIG_VETH"),
    ),
    # What parts to come will ask.
    Feature(
        "netem", "later", "delay and loss in experiments", "delay and loss are made by a program",
        _module("sch_netem", "CONFIG_NET_SCH_NETEM"),
    ),
    Feature(
        "IPIP", "later", "tunnels of the kernel's own", "tunnels by BPF, or by Python",
        _module("ipip", "CONFIG_NET_IPIP"),
    ),
)  # fmt: skip

NAMES: Final = frozenset(feature.name for feature in FEATURES)


@dataclass(frozen=True)
class Capabilities:
    """What one machine has, by the names of `FEATURES`.

    `unasked` are features that it was never asked for, by an older itm; it counts as
    lacking them. `kernel` and `nftables` are versions as text, for people alone:
    nothing is decided by them.
    """

    features: frozenset[str]
    unasked: frozenset[str] = frozenset()
    kernel: str = ""
    nftables: str = ""

    def lacking(self, part: str) -> tuple[Feature, ...]:
        """The features of a part that the machine has not, in their order."""
        return tuple(f for f in FEATURES if f.part == part and f.name not in self.features)

    @property
    def queue(self) -> str:
        """The form of rules to queues that the machine takes, "native" before "xt"."""
        xt_alone = "native queue" not in self.features and "xt queue" in self.features
        return "xt" if xt_alone else "native"

    def to_json(self) -> dict[str, Any]:
        """As plain data for JSON; `from_json` reads it."""
        asked = (f.name for f in FEATURES if f.name not in self.unasked)
        return {
            "schema": SCHEMA,
            "kernel": self.kernel,
            "nftables": self.nftables,
            "features": {name: name in self.features for name in asked},
        }


# What is assumed of a machine that nobody asked.
EVERYTHING: Final = Capabilities(NAMES)


def from_json(data: object) -> Capabilities:
    """The capabilities in what JSON gave, such as `itmc doctor --json` prints.

    Features that this itm does not know, and whatever else stands there, are left
    alone. Raises `CapabilitiesError`.
    """
    if not isinstance(data, dict) or "schema" not in data:
        raise CapabilitiesError("this does not come from `itmc doctor --json`")
    if data["schema"] != SCHEMA or isinstance(data["schema"], bool):
        raise CapabilitiesError(f"it has schema {data['schema']!r}, not {SCHEMA}")
    features = data.get("features")
    if not isinstance(features, dict):
        raise CapabilitiesError("it has no `features`")
    for name, there in features.items():
        if not isinstance(there, bool):
            raise CapabilitiesError(f"the feature `{name}` is neither true nor false")
    texts = {key: data.get(key, "") for key in ("kernel", "nftables")}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise CapabilitiesError(f"`{key}` is no text")
    return Capabilities(
        frozenset(name for name in NAMES if features.get(name)),
        NAMES - features.keys(),
        **texts,
    )
