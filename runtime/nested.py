"""A handler's packet into another one, and out again (RFC 2003): for programs that route by hand.

A policy's `encapsulate to` does more: it knows the path's MTU, and answers with ICMP errors.
"""

from functools import lru_cache
from ipaddress import IPv4Address

from itmlang.headers import Packet
from itmlang.tunnel import PROTOCOL, Expired, Refused, TooBig, Tunnel
from itmlang.tunnel import decapsulate as _decapsulated

_LARGEST = 65_535


def encapsulate(
    packet: Packet, source: str | IPv4Address, destination: str | IPv4Address, mtu: int = _LARGEST
) -> None:
    """Put an IPv4 packet into one from `source` (an address of this machine) to `destination`.

    TOS, ECN and DF are copied, TTL is counted as the RFC says. `mtu` is what the way takes, in
    bytes. Raises `ValueError` for a packet that must not go there: it is no IPv4, it is too
    long and not to be fragmented, its TTL ends here, it is in this tunnel already.
    """
    tunnel = _tunnel(source, destination)
    match tunnel.encapsulate(packet.data, mtu, packet.hook == "prerouting"):
        case bytes() as made:
            packet.data = made
        case TooBig(most):
            raise ValueError(f"{packet!r} is longer than the {most} bytes that the tunnel takes")
        case Expired():
            raise ValueError(f"the time to live of {packet!r} ends here")
        case Refused(reason):
            raise ValueError(f"{packet!r}: {reason}")


@lru_cache(maxsize=256)
def _tunnel(source: str | IPv4Address, destination: str | IPv4Address) -> Tunnel:
    return Tunnel(int(IPv4Address(source)), int(IPv4Address(destination)))


def decapsulate(packet: Packet) -> None:
    """Put what an IPv4 packet of protocol 4 carries in its place.

    Raises `ValueError` if it carries no sound IPv4 packet.
    """
    if packet.ip.protocol != PROTOCOL:
        raise ValueError(f"{packet!r} carries no other packet")
    made = _decapsulated(packet.data)
    if isinstance(made, Refused):
        raise ValueError(f"{packet!r}: {made.reason}")
    packet.data = made
