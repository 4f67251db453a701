"""What members tell, and what of it is believed: pure.

The file wins over what is told, a member's address over a network around it, and who told
first over who told later. Only neighbours introduce members; these tell of themselves.
"""

from collections.abc import Iterator, Mapping
from typing import Final

from itmlang.overlays import Overlay
from runtime.overlay.wire import Told, contains, overlaps

Prefix = tuple[int, int]

# This host, loopback, multicast and what is beyond: not where hosts are (RFC 6890).
_UNUSUAL: Final = ((0, 8), (127 << 24, 8), (224 << 24, 3))


def members(overlay: Overlay, told: Mapping[int, Told | None]) -> Iterator[int]:
    """All members: those of the file, then at most `overlay.discover` that were introduced.

    `told` is what each member up to now told last, None if it has told nothing for long. Who
    still tells is kept, even if nobody introduces it just now.
    """
    known = set(overlay.members)
    yield from overlay.members
    neighbors = {one.address for one in overlay.neighbors}
    heard = {
        other
        for address, its in told.items()
        if address in neighbors and its is not None
        for other in its.neighbors
    }
    learned = [a for a, its in told.items() if a not in known and (a in heard or its is not None)]
    taken = (overlay.address, *told)
    mine = tuple(_of_file(overlay))
    learned += sorted(
        a for a in heard
        if a not in taken and _is_usual((a, 32)) and not any(contains(one, a) for one in mine)
    )  # fmt: skip
    yield from learned[: overlay.discover]


def networks(
    overlay: Overlay, told: Mapping[int, Told | None], known: Mapping[int, tuple[Prefix, ...]]
) -> dict[int, tuple[Prefix, ...]]:
    """The networks behind members, at most `overlay.discover`, that clash with nothing.

    `told` has all members; `known` is what was believed up to now.
    """
    clash = list(_of_file(overlay))
    addresses = (overlay.address, *told)
    its = {a: one.prefixes for a, one in told.items() if one is not None}
    every = [(a, one) for a, its_own in known.items() for one in its_own if one in its.get(a, ())]
    every += [(a, one) for a in its for one in its[a] if one not in known.get(a, ())]
    found: dict[int, list[Prefix]] = {}
    left = overlay.discover
    for address, one in every:
        if (
            left
            and _is_usual(one)
            and not any(contains(one, member) for member in addresses)
            and not any(overlaps(one, other) for other in clash)
        ):
            found.setdefault(address, []).append(one)
            clash.append(one)
            left -= 1
    return {address: tuple(prefixes) for address, prefixes in found.items()}


def _of_file(overlay: Overlay) -> Iterator[Prefix]:
    yield from overlay.own
    for one in overlay.destinations:
        yield from one.prefixes


def _is_usual(prefix: Prefix) -> bool:
    return not any(overlaps(prefix, one) for one in _UNUSUAL)
