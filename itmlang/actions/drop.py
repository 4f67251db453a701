"""`drop`: the paper's "claim" (section 3.1). The packet was logged; it goes no further."""

from dataclasses import dataclass

from itmlang.actions.action import Action


@dataclass(frozen=True)
class Drop(Action):
    words = ("drop",)
    verdict = "drop"
