"""Overlays: traffic managers that send packets by one another, as an `overlay` of a file says.

Of a packet to a destination, the traffic manager at the far side (the egress) is known, and
neighbours of this one through which it may go; the direct path is always a candidate. Pure
data; `runtime/overlay/` probes the paths and chooses, `nft/overlays.py` makes the rules that
follow the choice.
"""

from dataclasses import dataclass
from typing import Final

from itmlang.source import Span
from itmlang.values import IPV4, address_text

DIRECT: Final = 0  # instead of a neighbour's address: the path without a tunnel
PORT: Final = 4748  # of probes (UDP), unless the overlay says otherwise
# The mark's tunnel bits tell 14 tunnels apart; one is for what comes out of them.
MOST_NEIGHBORS: Final = 13
MOST_DESTINATIONS: Final = 1024
MEASURES: Final = ("rtt", "loss", "both")
# A policy of the overlay's own takes packets out of its tunnels. It stands behind those that
# route by it, so that these can see that a packet came out of one; before address translation.
PRIORITY: Final = 45
TUNNELLED: Final = "tunnelled"  # its class
STAY_BITS: Final = 0xF  # of a connection's mark: by which neighbour it goes
# An overlay, and the neighbour: what is done to a packet that goes so.
_VIA: Final = " via "


@dataclass(frozen=True)
class Neighbor:
    """Another traffic manager; `address` is IPv4, an integer."""

    name: str
    address: int
    span: Span


@dataclass(frozen=True)
class Destination:
    """Networks (address, prefix length) behind the traffic manager `egress`."""

    prefixes: tuple[tuple[int, int], ...]
    egress: int
    span: Span


@dataclass(frozen=True)
class Overlay:
    """An overlay as one of its traffic managers sees it.

    `address` is its own. `own` are the networks behind this one, which it tells of. Each path
    is probed `every` so often, an answer is missed after `timeout` (milliseconds); a path is
    out when `lost[0]` of its last `lost[1]` answers are missing. `measure` is what is
    compared, of `MEASURES`; another path must be better by `margin` (percent) and the choice
    be as old as `hold` (milliseconds). `sticky`: connections stay on a path that works.
    `discover` bounds the destinations that are learned from others (0: none are). `in_python`:
    tunnels are Python's. `key` is the file with the key, as written.
    """

    name: str
    address: int
    neighbors: tuple[Neighbor, ...]
    destinations: tuple[Destination, ...]
    own: tuple[tuple[int, int], ...]
    every: int
    timeout: int
    lost: tuple[int, int]
    measure: str
    margin: int
    hold: int
    sticky: bool
    discover: int
    in_python: bool
    port: int
    key: str
    key_at: Span
    span: Span

    @property
    def egresses(self) -> tuple[int, ...]:
        """The far traffic managers, each once, in their order."""
        return tuple(dict.fromkeys(one.egress for one in self.destinations))

    @property
    def members(self) -> tuple[int, ...]:
        """All that are known by the file, sorted: from these, tunnels are opened."""
        return tuple(sorted({*(n.address for n in self.neighbors), *self.egresses}))

    @property
    def chosen(self) -> str:
        """The map from destinations to the rules of the chosen neighbour."""
        return f"route_{self.name}"

    @property
    def staying(self) -> str:
        """The map from what a connection's mark says to the rules of a neighbour that works."""
        return f"stay_{self.name}"


def counted(what: str, egress: int) -> str:
    """The counter of TCP packets "sent" to an egress's networks, or come "back" from there."""
    return f"{what}_{address_text(IPV4, egress).replace('.', '_')}"


def ends(prefix: tuple[int, int]) -> tuple[int, int]:
    """A network's first and last address."""
    address, length = prefix
    return address, address | (1 << 32 - length) - 1


def via(overlay: str, neighbor: str) -> str:
    """What packets that go by a neighbour are called in `Policy.process`."""
    return f"{overlay}{_VIA}{neighbor}"


def is_via(name: str) -> bool:
    return _VIA in name
