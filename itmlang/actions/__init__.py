"""The actions of the language. A new one is a file here and an entry in `ACTIONS`."""

from itmlang.actions.accept import Accept
from itmlang.actions.action import Action, Lowered
from itmlang.actions.drop import Drop
from itmlang.actions.dscp import SetDscp
from itmlang.actions.tos import SetTos, UnsetTos

ACTIONS: tuple[type[Action], ...] = (Accept, Drop, SetDscp, SetTos, UnsetTos)

__all__ = ["ACTIONS", "Action", "Lowered"]
