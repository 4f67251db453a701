"""Views of headers, and their fields as descriptors over whole 16-bit words.

A view keeps no place: it asks the packet each time, so it stays right when options or
extension headers before it change their length.
"""

from collections.abc import Iterable
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Self, overload

from itmlang.headers.buffer import Buffer
from itmlang.packet import MalformedError, mend


class View:
    """A header of a packet. Every access raises `MalformedError` if the packet lost it since."""

    __slots__ = ("_packet",)

    def __init__(self, packet: Buffer) -> None:
        self._packet = packet

    @classmethod
    def _place(cls, packet: Buffer) -> int | None:
        """Where the packet has such a header, None if it has none that is whole."""
        raise NotImplementedError

    @classmethod
    def of(cls, packet: Buffer) -> Self | None:
        """The packet's header of this kind, None if it has none that is whole."""
        return None if cls._place(packet) is None else cls(packet)

    def _start(self) -> int:
        place = self._place(self._packet)
        if place is None:
            raise MalformedError(f"the packet has no whole {type(self).__name__} any more")
        return place

    def _checksums(self, start: int) -> Iterable[int]:
        """Where the checksums lie that cover the header's fields."""
        return ()


class Number:
    """A field that is a number, unsigned: some bits of one or two 16-bit words.

    `offset` and `size` (2 or 4) are of the words in bytes, `shift` is of the bits in them.
    Writing raises `ValueError` if the number does not fit.
    """

    def __init__(
        self, offset: int, limit: int, *, size: int = 2, shift: int = 0, moves: bool = False
    ) -> None:
        self._end, self._offset, self._size = offset + size, offset, size
        self._limit, self._shift, self._moves = limit, shift, moves
        self._others = ~(limit << shift)

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, view: None, owner: type) -> Self: ...
    @overload
    def __get__(self, view: View, owner: type) -> int: ...
    def __get__(self, view: View | None, owner: type) -> int | Self:
        if view is None:
            return self
        start = view._start()
        word = int.from_bytes(view._packet._bytes[start + self._offset : start + self._end])
        return word >> self._shift & self._limit

    def __set__(self, view: View, value: int) -> None:
        if not isinstance(value, int) or not 0 <= value <= self._limit:
            raise ValueError(f"{self._name} is a number from 0 to {self._limit}, not {value!r}")
        packet, start = view._packet, view._start()
        at = start + self._offset
        before = int.from_bytes(packet._bytes[at : at + self._size])
        after = before & self._others | value << self._shift
        if after != before:
            data = packet._writable()
            data[at : at + self._size] = after.to_bytes(self._size)
            for place in view._checksums(start):
                mend(data, place, before, after)
            if self._moves:
                packet._moved()


class Bit:
    """A field of one bit, by its number within a 16-bit word."""

    def __init__(self, offset: int, number: int, *, moves: bool = False) -> None:
        self._word = Number(offset, 1, shift=number, moves=moves)

    def __set_name__(self, owner: type, name: str) -> None:
        self._word.__set_name__(owner, name)

    @overload
    def __get__(self, view: None, owner: type) -> Self: ...
    @overload
    def __get__(self, view: View, owner: type) -> bool: ...
    def __get__(self, view: View | None, owner: type) -> bool | Self:
        return self if view is None else self._word.__get__(view, owner) == 1

    def __set__(self, view: View, value: bool) -> None:
        self._word.__set__(view, value)


class Address:
    """An address field. It takes addresses and text; `ValueError` for what is none of its family."""

    def __init__(self, offset: int, kind: type[IPv4Address] | type[IPv6Address]) -> None:
        self._offset, self._kind = offset, kind
        self._end = offset + kind(0).max_prefixlen // 8

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, view: None, owner: type) -> Self: ...
    @overload
    def __get__(self, view: View, owner: type) -> IPv4Address | IPv6Address: ...
    def __get__(self, view: View | None, owner: type) -> IPv4Address | IPv6Address | Self:
        if view is None:
            return self
        start = view._start()
        return self._kind(bytes(view._packet._bytes[start + self._offset : start + self._end]))

    def __set__(self, view: View, value: IPv4Address | IPv6Address | str) -> None:
        address: IPv4Address | IPv6Address | None = None
        if isinstance(value, IPv4Address | IPv6Address):
            address = value
        elif isinstance(value, str):
            with suppress(ValueError):
                address = ip_address(value)
        if not isinstance(address, self._kind):
            raise ValueError(f"{self._name} is an {self._kind.__name__}, not {value!r}")
        view._packet._write_address(view._start() + self._offset, address.packed)
