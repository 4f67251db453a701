"""`call "module:function"`: a function of the user's sees the packet.

What it does is known when it is loaded, by the runtime. With `once per connection` it
sees a connection's first packet, and what it decides holds for the rest.
"""

import re
from dataclasses import dataclass
from typing import Final

from itmlang.actions.action import Action, Lowered
from itmlang.fields import HOOKS
from itmlang.packet import Packet
from itmlang.values import Ranges

_TARGET: Final = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclass(frozen=True)
class Call(Action):
    """`value` is the function's name, and whether it is called once for a connection."""

    words = ("call",)
    hooks = HOOKS
    why = "the kernel queues no packets there"
    in_python = True

    @property
    def handler(self) -> str:
        return str(self.value[0])

    @property
    def once(self) -> bool:
        return bool(self.value[1])

    def refusal(self) -> str:
        if not self.handler.isascii() or _TARGET.fullmatch(self.handler) is None:
            return 'a handler is written "module:function"'
        return ""

    def lower(self, family: int, protocols: Ranges) -> Lowered | None:
        return None

    def run(self, packet: Packet) -> None:
        raise NotImplementedError("a handler is run by who loaded it")

    def __str__(self) -> str:
        return f'call "{self.handler}"' + (" once per connection" if self.once else "")
