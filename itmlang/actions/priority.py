"""`priority LINK.CLASS`: the packet waits in a class of a scheduled link.

nftables writes the class's id into the packet's priority, by which HTB chooses the class
(net/sched/sch_htb.c: htb_classify). By another way than the link's, it means nothing.
"""

from dataclasses import dataclass

from itmlang.actions.action import Action, Lowered
from itmlang.fields import EGRESS
from itmlang.links import classid_text
from itmlang.packet import Packet
from itmlang.values import Ranges


@dataclass(frozen=True)
class Priority(Action):
    """`value` is the classid, the class as `link.class`, and the classid of the link's probes.

    A controller's probes (0: none) stay in the class that they have by themselves: behind what
    waits here they would measure this queue, not the one that is looked for.
    """

    words = ("priority",)
    # ip_forward() writes the priority anew from the TOS (net/ipv4/ip_forward.c).
    hooks = ("forward", "output", "postrouting", EGRESS)
    kernels_own = "nothing in Python can put a packet into a link's class"
    why = "forwarding forgets there what was chosen; forward or postrouting keep it"

    def lower(self, family: int, protocols: Ranges) -> Lowered:
        probes = f"meta priority != {classid_text(self.value[2])} " if self.value[2] else ""
        return Lowered((f"{probes}meta priority set {classid_text(self.value[0])}",))

    def run(self, packet: Packet) -> None:
        packet.priority = self.value[0]

    def __str__(self) -> str:
        return f"priority {self.value[1]}"
