"""The bits of the packet mark, and of the connection's, that are itm's own.

A mark is shared with other tools, so only these bits are ever written, but for what
a policy says by `set mark`. Their upper half steers packets into tunnels of the kernel,
from the policy to the routing decision. The lower half says of which class a packet is
on its way to Python and, on its way back, what was decided; between two policies it is
clear.
"""

from typing import Final

KEPT: Final = 0xFF00_0000
TUNNEL_BITS: Final = 0xF000_0000
TUNNEL_SHIFT: Final = 28
CLASS_BITS: Final = 0x0F00_0000
CLASS_SHIFT: Final = 24
# One less than there is room for: the sign of life has all of these bits.
MOST_TUNNELS: Final = 14
MOST_NUMBERS: Final = 15  # that the class bits tell apart; 0 is no packet for Python
# One of the class bits, while a policy's sets are updated: a change was made.
CHANGED: Final = 0x0100_0000
# The runtime's sign of life carries a policy's first queue in the bits below. It is of no
# tunnel and of no class: where no rule waits for it, it is a packet like others.
BEAT: Final = 0xF000_0000
# The runtime's probes of paths: of no tunnel, so no overlay routes them, and no sign of life.
PROBE: Final = 0xF0FF_FFFF
ALL: Final = 0xFFFF_FFFF


def with_class(number: int) -> str:
    """The nftables statement that writes the class bits."""
    bits = f" | {number << CLASS_SHIFT:#010x}" if number else ""
    return f"meta mark set meta mark & {ALL ^ CLASS_BITS:#010x}{bits}"
