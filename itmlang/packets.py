"""Packets as written (`tcp 10.0.0.1:1000 -> 10.0.0.2:80 flags syn`) -> packet headers."""

from typing import Any, Final

from itmlang import syntax, values
from itmlang.diagnostics import Findings, did_you_mean
from itmlang.evaluate import Scope, single, value_set
from itmlang.packet import ICMP, ICMPV6, PORT_PROTOCOLS, TCP, Header
from itmlang.parser import parse_packet
from itmlang.source import Source
from itmlang.values import PROTOCOLS, Addresses, Names, Ranges, Type

_OPTIONS: Final[dict[str, Type]] = {
    "flags": values.FLAGS,
    "length": values.LENGTH,
    "tos": values.TOS,
    "dscp": values.DSCP,
    "ecn": values.ECN,
    "ttl": values.OCTET,
    "mark": values.NUMBER,
    "mss": values.MSS,
    "fragment": values.BOOLEAN,
    "in": values.INTERFACE,
    "out": values.INTERFACE,
}
_TYPES: Final = {ICMP: values.ICMP_TYPE, ICMPV6: values.ICMPV6_TYPE}
_LONGEST: Final = 65_535


def read_packet(text: str, findings: Findings, name: str = "PACKET") -> Header | None:
    """A packet from the command line; errors point into its own text."""
    tree = parse_packet(Source(name, text), findings)
    return None if tree is None else header(tree, findings)


def header(node: syntax.PacketText, findings: Findings) -> Header | None:
    """The header that a packet's text stands for; None after an error."""
    protocol = _protocol(node.protocol, findings)
    source = _address(node.source.address, findings)
    destination = _address(node.destination.address, findings)
    if protocol is None or source is None or destination is None:
        return None
    if source[0] != destination[0]:
        findings.error("E027", "the packet goes from one IP version to the other", node.span)
        return None
    ports = [_port(end, protocol, findings) for end in (node.source, node.destination)]
    options = _options(node, protocol, findings)
    if findings.failed:
        return None
    built = Header(protocol, source, destination, ports[0], ports[1], **options)
    if built.length is not None and built.length < built.least_length:
        findings.error(
            "E023", f"a packet with these headers is {built.least_length} bytes at least", node.span
        )
        return None
    return built


def _protocol(node: syntax.Name, findings: Findings) -> int | None:
    number = PROTOCOLS.get(node.text)
    if number is None:
        findings.error(
            "E010", f"there is no protocol `{node.text}`", node.span,
            help=did_you_mean(node.text, PROTOCOLS),
        )  # fmt: skip
    return number


def _address(node: syntax.Address, findings: Findings) -> tuple[int, int] | None:
    found = value_set(node, values.ADDRESS, Scope(), findings)
    if not isinstance(found, Addresses):
        return None
    ((family, lo, hi),) = values.intervals(found)
    if lo != hi:
        findings.error("E022", "a packet has one address, not a prefix", node.span)
        return None
    return family, lo


def _port(end: syntax.Endpoint, protocol: int, findings: Findings) -> int | None:
    if protocol not in PORT_PROTOCOLS:
        if end.port is not None:
            findings.error(
                "E028", "packets of this protocol have no ports", end.port.span,
                help=f"write `{end.address.text}` alone",
            )  # fmt: skip
        return None
    if end.port is None:
        findings.error(
            "E028", "the port is missing", end.span,
            help="write `10.0.0.1:1000`, or `[2001:db8::1]:1000`",
        )  # fmt: skip
        return None
    return single(end.port, values.PORT, Scope(), findings)


def _options(node: syntax.PacketText, protocol: int, findings: Findings) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for option in node.options:
        type = _TYPES.get(protocol) if option.name == "type" else _OPTIONS.get(option.name)
        if type is None:
            findings.error(
                "E010", f"a packet's `{option.name}` cannot be given", option.span,
                help=did_you_mean(option.name, [*_OPTIONS, "type"]),
            )  # fmt: skip
        elif option.name in found:
            findings.error("E012", f"`{option.name}` is given twice", option.span)
        elif option.name in ("flags", "mss") and protocol != TCP:
            findings.error("E028", f"only TCP packets have {option.name}", option.span)
        else:
            found[option.name] = _option(option, type, findings)
    found["fragment"] = bool(found.get("fragment"))
    tos = found.pop("tos", None) or 0
    dscp, ecn = found.pop("dscp", None), found.pop("ecn", None)
    tos = tos if dscp is None else dscp << 2 | tos & 3
    tos = tos if ecn is None else tos & ~3 | ecn
    fields = {"in": "input", "out": "output"}  # `in` is a word of Python
    return {**{fields.get(name, name): value for name, value in found.items()}, "tos": tos}


def _option(option: syntax.PacketOption, type: Type, findings: Findings) -> int | str | None:
    if type is values.FLAGS:  # a list of flags is a packet with all of them
        found = value_set(option.value, type, Scope(), findings)
        bits = 0
        for lo, hi in found.spans if isinstance(found, Ranges) else ():
            for value in range(lo, hi + 1):
                bits |= value
        return bits
    if type is values.INTERFACE:
        found = value_set(option.value, type, Scope(), findings)
        if isinstance(found, Names) and len(found.patterns) == 1:
            return next(iter(found.patterns))
        return None
    number = single(option.value, type, Scope(), findings)
    if option.name == "length" and number is not None and number > _LONGEST:
        findings.error("E023", f"a packet is {_LONGEST} bytes at most", option.span)
    return number
