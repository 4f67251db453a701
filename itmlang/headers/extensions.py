"""IPv6 extension headers (RFC 8200 section 4): values over the bytes of each.

A value keeps the very bytes, so that what is put back is what was read. What else
stands in them is read from there when asked. An authentication header ends the
chain, as it does for nftables: it and all behind it are the packet's payload.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import ClassVar, Final

from itmlang.headers.options import Option, read_options, write_options
from itmlang.packet import FRAGMENT

_HOP_BY_HOP, _ROUTING, _DESTINATION_OPTIONS = 0, 43, 60
_PAD1, _PADN, _HOME_ADDRESS = 0, 1, 201
# Where the last address of the way stands, counted in the extension's `data`: RFC 5095
# and RFC 6275 list them in their order, RFC 8754 backwards.
_LAST_SEGMENT: Final = {0: slice(-16, None), 2: slice(-16, None), 4: slice(6, 22)}


@dataclass(frozen=True, slots=True)
class Extension:
    """An extension header; `data` is all behind its next header and length bytes.

    Raises `ValueError` if the header would not be whole units of eight bytes, 2048 at most.
    """

    protocol: ClassVar[int]
    data: bytes

    def __post_init__(self) -> None:
        if (len(self.data) + 2) % 8 or not 6 <= len(self.data) <= 2046:
            raise ValueError(f"an extension header holds 6, 14, … 2046 bytes, not {len(self.data)}")


class _Options(Extension):
    __slots__ = ()

    @classmethod
    def of(cls, options: Iterable[Option]) -> "_Options":
        """A header with these options, padded (PadN) to whole units of eight bytes."""
        raw = write_options(options, ipv6=True)
        space = -(len(raw) + 2) % 8
        padding = [Option(_PADN, bytes(space - 2))] if space > 1 else [Option(_PAD1)] * space
        return cls(raw + write_options(padding, ipv6=True))

    @property
    def options(self) -> tuple[Option, ...]:
        """The options, padding included."""
        return read_options(self.data, ipv6=True)


class HopByHop(_Options):
    """Options for each router on the way (RFC 8200 section 4.3)."""

    __slots__ = ()
    protocol = _HOP_BY_HOP


class DestinationOptions(_Options):
    """Options for the receiver (RFC 8200 section 4.6)."""

    __slots__ = ()
    protocol = _DESTINATION_OPTIONS

    @property
    def home_address(self) -> bytes | None:
        """The sender's home address (RFC 6275 section 6.3), which checksums cover instead."""
        homes = [o.data for o in self.options if o.kind == _HOME_ADDRESS and len(o.data) == 16]
        return homes[0] if homes else None


class Routing(Extension):
    """A way to go (RFC 8200 section 4.4)."""

    __slots__ = ()
    protocol = _ROUTING

    @classmethod
    def of(cls, type: int, segments_left: int, rest: bytes) -> "Routing":
        """A header of this type; `rest` is what its RFC says stands behind the segments left."""
        return cls(bytes((type, segments_left)) + rest)

    @property
    def type(self) -> int:
        return self.data[0]

    @property
    def segments_left(self) -> int:
        return self.data[1]

    @property
    def final_destination(self) -> IPv6Address | None:
        """Where the packet goes in the end; None if it is there, or if the type is not known.

        Known are types 0 (RFC 5095), 2 (RFC 6275) and 4 (RFC 8754).
        """
        place = _LAST_SEGMENT.get(self.type)
        if place is None or not self.segments_left or len(self.data) < 22:
            return None
        return IPv6Address(self.data[place])


class Fragment(Extension):
    """Where a fragment belongs (RFC 8200 section 4.5)."""

    __slots__ = ()
    protocol = FRAGMENT

    def __post_init__(self) -> None:
        if len(self.data) != 6:
            raise ValueError(f"a fragment header holds 6 bytes, not {len(self.data)}")

    @classmethod
    def of(cls, offset: int, more: bool, identification: int) -> "Fragment":
        """A fragment at an offset in units of eight bytes."""
        if not 0 <= offset <= 0x1FFF or not 0 <= identification <= 0xFFFF_FFFF:
            raise ValueError("an offset has 13 bits, an identification 32")
        return cls((offset << 3 | more).to_bytes(2) + identification.to_bytes(4))

    @property
    def offset(self) -> int:
        """In units of eight bytes."""
        return int.from_bytes(self.data[:2]) >> 3

    @property
    def more(self) -> bool:
        return bool(self.data[1] & 1)

    @property
    def identification(self) -> int:
        return int.from_bytes(self.data[2:])


_KINDS: Final[dict[int, type[Extension]]] = {
    kind.protocol: kind for kind in (HopByHop, DestinationOptions, Routing, Fragment)
}


def read_extensions(data: bytes, following: int) -> tuple[tuple[Extension, ...], int]:
    """The extension headers of just these bytes, and what follows the last one.

    `following` is the next header of the IPv6 header. Headers that are not whole are
    left out: then a number of an extension header follows.
    """
    found: list[Extension] = []
    at = 0
    while at + 8 <= len(data) and following in _KINDS:
        size = 8 if following == FRAGMENT else (data[at + 1] + 1) * 8
        if at + size > len(data):
            break
        found.append(_KINDS[following](data[at + 2 : at + size]))
        following, at = data[at], at + size
    return tuple(found), following


def write_extensions(extensions: Iterable[Extension], following: int) -> tuple[int, bytes]:
    """The next header of the IPv6 header and the bytes of these, before what follows."""
    raw = b""
    for extension in reversed(tuple(extensions)):
        units = 0 if extension.protocol == FRAGMENT else len(extension.data) // 8
        raw = bytes((following, units)) + extension.data + raw
        following = extension.protocol
    return following, raw
