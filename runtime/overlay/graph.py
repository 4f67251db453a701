"""An overlay as a picture: this member, its neighbours, the far traffic managers. SVG, pure.

Three columns: this member, the neighbours in the middle, the egresses with their networks to the
right. Each way is a line with its round trip and loss; the chosen one is thick, one that is out
is dashed.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Final
from xml.sax.saxutils import escape

from runtime.overlay.status import OverlayStatus, PathStatus

_WIDTH: Final = 860
_COLUMNS: Final = (110, 400, 700)
_ROW: Final = 120
_TOP: Final = 90
_STYLE: Final = """\
text { font: 13px sans-serif; fill: #222; text-anchor: middle }
.small { font-size: 11px; fill: #555 }
circle { fill: #fff; stroke: #333; stroke-width: 1.5 }
line { stroke: #999; stroke-width: 1.2 }
.chosen { stroke: #0a7d33; stroke-width: 4 }
.out { stroke: #b3261e; stroke-dasharray: 6 5 }
"""


def svg(name: str, one: OverlayStatus) -> str:
    """The picture of an overlay called `name`."""
    rows = max(len(one.destinations), len(one.neighbors), 1)
    height = 2 * _TOP + (rows - 1) * _ROW
    middle = {
        n: (_COLUMNS[1], _y(i, len(one.neighbors), height)) for i, n in enumerate(one.neighbors)
    }
    here = (_COLUMNS[0], height // 2)
    far = {
        to.egress: (_COLUMNS[2], _y(i, len(one.destinations), height))
        for i, to in enumerate(one.destinations)
    }
    lines: list[str] = []
    for to in one.destinations:
        for path in to.paths:
            by = middle.get(path.name)
            points = [here, *([by] if by else []), far[to.egress]]
            lines += _way(points, path, len(one.destinations))
    boxes = [_box(*here, one.address, [name], "this")]
    boxes += [_box(*middle[n], n, [address], "near") for n, address in one.neighbors.items()]
    for to in one.destinations:
        networks = [*to.networks, *to.learned]
        more = [f"and {len(networks) - 2} more"] if len(networks) > 2 else []
        boxes.append(_box(*far[to.egress], to.egress, [*networks[:2], *more], "far"))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
            f'width="{_WIDTH}" height="{height}">',
            f"<title>overlay {escape(name)} at {escape(one.address)}</title>",
            f"<style>{_STYLE}</style>",
            *lines,
            *boxes,
            "</svg>",
            "",
        ]
    )


def _y(index: int, many: int, height: int) -> int:
    return height // 2 + int((index - (many - 1) / 2) * _ROW)


def _way(points: list[tuple[int, int]], path: PathStatus, many: int) -> Iterable[str]:
    kind = "chosen" if path.chosen else "" if path.state == "working" else "out"
    for (x1, y1), (x2, y2) in pairwise(points):
        yield f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" class="{kind}"/>'
    (x1, y1), (x2, y2) = points[-2:]
    x, y = (x1 + 2 * x2) // 3, (y1 + 2 * y2) // 3 - 6
    told = path.state if path.rtt is None else f"{path.rtt:.1f} ms"
    told += f", {path.loss:.0%} lost" if path.loss else ""
    yield f'<text x="{x}" y="{y}" class="small">{escape(told)}</text>'


def _box(x: int, y: int, title: str, below: list[str], kind: str) -> str:
    found = [f'<circle cx="{x}" cy="{y}" r="16"/>']
    found.append(f'<text x="{x}" y="{y - 24}">{escape(title)}</text>')
    for number, text in enumerate(below):
        found.append(
            f'<text x="{x}" y="{y + 32 + 14 * number}" class="small">{escape(text)}</text>'
        )
    return f'<g class="{kind}">' + "".join(found) + "</g>"
