"""Packets as Python handlers see them: typed headers over the packet's bytes.

    packet.ip.tos = 0x55
    packet.ip.source = "192.0.2.1"
    if packet.tcp is not None and packet.tcp.syn:
        packet.tcp.destination_port = 5555
    packet.payload = packet.payload.replace(b"colour", b"color")

Lengths and checksums follow by themselves. `itmlang.packet` is the same packet as
nftables sees it; where headers lie and how a checksum is mended is said there alone.
"""

from itmlang.headers.buffer import IncompleteError
from itmlang.headers.extensions import (
    DestinationOptions,
    Extension,
    Fragment,
    HopByHop,
    Routing,
)
from itmlang.headers.ip import IPv4Header, IPv6Header
from itmlang.headers.options import Option
from itmlang.headers.packet import FiveTuple, Packet
from itmlang.headers.transport import ICMPHeader, ICMPv6Header, TCPHeader, UDPHeader
from itmlang.packet import MalformedError

__all__ = [
    "DestinationOptions",
    "Extension",
    "FiveTuple",
    "Fragment",
    "HopByHop",
    "ICMPHeader",
    "ICMPv6Header",
    "IPv4Header",
    "IPv6Header",
    "IncompleteError",
    "MalformedError",
    "Option",
    "Packet",
    "Routing",
    "TCPHeader",
    "UDPHeader",
]
