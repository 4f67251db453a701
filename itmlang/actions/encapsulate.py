"""`encapsulate to T from S`, `decapsulate`: IPv4 in IPv4 (RFC 2003), ECN as RFC 6040 has it.

The outer packet is routed by its own destination, so the action stands where routing is
still to come. What a packet of another family or without an outer header is asked
to do, it does not: it passes as it is.
"""

from dataclasses import dataclass
from typing import Final

from itmlang import values
from itmlang.actions.action import Action, Lowered
from itmlang.packet import Packet
from itmlang.values import Ranges

# First bytes of addresses that are no host's, or this host's alone (RFC 1122 section 3.2.1.3,
# RFC 5771): this network, loopback, multicast and all above.
_NO_END: Final = frozenset({0, 127, *range(224, 256)})


@dataclass(frozen=True)
class Encapsulate(Action):
    """`value` is the tunnel's end and its source (None: as routing chooses), integers."""

    words = ("encapsulate",)
    hooks = ("prerouting", "output")
    why = "there the packet's way is chosen already, and the outer one would take it, too"
    reroutes = True
    in_python = True

    @property
    def destination(self) -> int:
        return int(self.value[0])

    @property
    def source(self) -> int | None:
        return None if self.value[1] is None else int(self.value[1])

    def refusal(self) -> str:
        for end in (end for end in self.value if end is not None):
            if end >> 24 in _NO_END:
                return f"{values.address_text(4, end)} cannot be a tunnel's end"
        return "a tunnel has two ends" if self.source == self.destination else ""

    def lower(self, family: int, protocols: Ranges) -> Lowered | None:
        return None

    def run(self, packet: Packet) -> None:
        raise NotImplementedError("a tunnel is run by who knows its path")

    def __str__(self) -> str:
        source = "" if self.source is None else f" from {values.address_text(4, self.source)}"
        return f"encapsulate to {values.address_text(4, self.destination)}{source}"


@dataclass(frozen=True)
class Decapsulate(Action):
    words = ("decapsulate",)
    hooks = ("prerouting",)
    why = "the inner packet would not be routed anew"
    in_python = True
    defragments = True

    def lower(self, family: int, protocols: Ranges) -> Lowered | None:
        return None

    def run(self, packet: Packet) -> None:
        raise NotImplementedError("a tunnel is run by who knows its path")
