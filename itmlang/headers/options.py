"""Options of IPv4, TCP and IPv6: values that are read, and written, all at once."""

from collections.abc import Iterable
from typing import NamedTuple


class Option(NamedTuple):
    """One option: its number and the bytes behind its length, none in a "no operation".

    Numbers: https://www.iana.org/assignments/ip-parameters, tcp-parameters, ipv6-parameters.
    """

    kind: int
    data: bytes = b""


def read_options(raw: bytes, *, ipv6: bool = False) -> tuple[Option, ...]:
    """The options in these bytes, padding included, up to the end of the list.

    An option whose length cannot be ends them, too, as in the kernel (`tcp_parse_options`,
    net/ipv4/tcp_input.c). IPv4 (RFC 791) and TCP (RFC 9293) count an option's number and
    length into its length, and have an end of the list; IPv6 (RFC 8200 section 4.2) not.
    """
    alone, end, own = (0, -1, 0) if ipv6 else (1, 0, 2)
    found: list[Option] = []
    at = 0
    while at < len(raw) and raw[at] != end:
        if raw[at] == alone:
            found.append(Option(alone))
            at += 1
            continue
        size = raw[at + 1] - own if at + 1 < len(raw) else -1
        if size < 0 or at + 2 + size > len(raw):
            break
        found.append(Option(raw[at], raw[at + 2 : at + 2 + size]))
        at += 2 + size
    return tuple(found)


def write_options(options: Iterable[Option], *, ipv6: bool = False) -> bytes:
    """The bytes of these options, not padded. Raises `ValueError` for what no option can be."""
    alone, end, own = (0, -1, 0) if ipv6 else (1, 0, 2)
    raw = bytearray()
    for kind, data in options:
        if not 0 <= kind <= 255 or kind == end:
            raise ValueError(f"an option's number is {end + 1} to 255, not {kind}")
        if kind == alone:
            if data:
                raise ValueError(f"option {alone} is one byte, it has no data")
            raw.append(kind)
            continue
        if len(data) + own > 255:
            raise ValueError(f"option {kind} has {len(data)} bytes, more than its length can say")
        raw += bytes((kind, len(data) + own)) + data
    return bytes(raw)


def padded_options(options: Iterable[Option], most: int, where: str) -> bytes:
    """Options of IPv4 or TCP, filled with ends of the list to whole words of four bytes.

    Raises `ValueError` if they take more than `most` bytes.
    """
    raw = write_options(options)
    if len(raw) > most:
        raise ValueError(f"options of {len(raw)} bytes: {where} has room for {most}")
    return raw + bytes(-len(raw) % 4)
