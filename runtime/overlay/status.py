"""What an overlay's process tells of itself, for `status`, `top` and the graph."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from itmlang.overlays import Overlay
from itmlang.values import address_text


@dataclass(frozen=True)
class PathStatus:
    """A candidate: directly, or by a neighbour. `rtt` (smoothed) and `rtt_raw` are in
    milliseconds, `loss` is a share, `answered` seconds since the last answer; None if unknown."""

    name: str
    state: str
    chosen: bool
    rtt: float | None
    rtt_raw: float | None
    loss: float | None
    answered: float | None


@dataclass(frozen=True)
class DestinationStatus:
    """The networks behind a far traffic manager, and the ways to it.

    `choice` is the name of the chosen one; it moved `moved` seconds ago (None: never), as `why`
    says, and `moves` times in all. `learned` are networks that it told of.
    """

    egress: str
    networks: tuple[str, ...]
    learned: tuple[str, ...]
    paths: tuple[PathStatus, ...]
    choice: str
    moved: float | None
    why: str
    moves: int


@dataclass(frozen=True)
class OverlayStatus:
    """An overlay as this member sees it.

    `period` is how often a path is probed, in seconds. `counters` are datagrams: sent, answered,
    forged, replayed, truncated and so on. `trouble` is what keeps it from probing, "" for
    nothing; then packets go directly.
    """

    address: str
    neighbors: Mapping[str, str]
    period: float
    destinations: tuple[DestinationStatus, ...]
    counters: Mapping[str, int]
    trouble: str


def seen(overlay: Overlay, told: Mapping[str, Any], trouble: str) -> OverlayStatus:
    """The status from what the process told last (nothing: it has not begun)."""
    return OverlayStatus(
        address=address_text(4, overlay.address),
        neighbors={one.name: address_text(4, one.address) for one in overlay.neighbors},
        period=told.get("period", overlay.every / 1000),
        destinations=tuple(_destination(one) for one in told.get("egresses", ())),
        counters=dict(told.get("counters", {})),
        trouble=trouble or ("" if told else "nothing was probed yet"),
    )


def _destination(one: Mapping[str, Any]) -> DestinationStatus:
    return DestinationStatus(
        egress=one["egress"],
        networks=tuple(one["prefixes"]),
        learned=tuple(one["learned"]),
        paths=tuple(
            PathStatus(
                each["name"], each["state"], each["chosen"], each["rtt"], each["rtt_raw"],
                each["loss"], each["last"],
            )
            for each in one["candidates"]
        ),
        choice=one["choice"],
        moved=one["moved"],
        why=one["why"],
        moves=one["moves"],
    )  # fmt: skip
