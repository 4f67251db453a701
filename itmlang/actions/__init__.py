"""The actions of the language. A new one is a file here and an entry in `ACTIONS`."""

from itmlang.actions.accept import Accept
from itmlang.actions.action import Action, Lowered
from itmlang.actions.addresses import SetDaddr, SetSaddr
from itmlang.actions.call import Call
from itmlang.actions.drop import Drop
from itmlang.actions.dscp import SetDscp
from itmlang.actions.encapsulate import Decapsulate, Encapsulate
from itmlang.actions.mark import SetMark
from itmlang.actions.mss import SetMss
from itmlang.actions.ports import SetDport, SetSport
from itmlang.actions.priority import Priority
from itmlang.actions.reject import Reject
from itmlang.actions.route import RouteBy
from itmlang.actions.tos import SetTos, UnsetTos
from itmlang.actions.ttl import SetTtl

ACTIONS: tuple[type[Action], ...] = (
    Accept, Drop, Reject,
    SetDscp, SetTos, UnsetTos, SetTtl, SetMark,
    SetSaddr, SetDaddr, SetSport, SetDport, SetMss,
    Call, Encapsulate, Decapsulate, Priority, RouteBy,
)  # fmt: skip

__all__ = ["ACTIONS", "Action", "Lowered"]
