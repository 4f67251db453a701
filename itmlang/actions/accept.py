"""`accept`: done with this policy; later policies and other tables still see the packet."""

from dataclasses import dataclass

from itmlang.actions.action import Action


@dataclass(frozen=True)
class Accept(Action):
    words = ("accept",)
    verdict = "accept"
