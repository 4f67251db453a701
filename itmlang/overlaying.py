"""Overlays as written -> checked `Overlay`s, and what each of them is besides: a set, a policy.

An overlay's name is a set's, too: the networks that it leads to. And it is a policy's, that
takes out of tunnels what other members send by this one. Everything that can be told without
the machine is told here: a neighbour that is this box, networks that overlap, a network that
a tunnel's own end lies in.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, TypeVar

from itmlang import ir, syntax, values
from itmlang.actions.encapsulate import Decapsulate, Encapsulate
from itmlang.diagnostics import Findings, did_you_mean
from itmlang.evaluate import Scope, one_address, single, value_set
from itmlang.fields import FIELDS
from itmlang.overlays import (
    MEASURES,
    MOST_DESTINATIONS,
    MOST_NEIGHBORS,
    PORT,
    PRIORITY,
    TUNNELLED,
    Destination,
    Neighbor,
    Overlay,
    ends,
)
from itmlang.resolve import check_name
from itmlang.source import Span
from itmlang.tunnelling import prefixes
from itmlang.values import IPV4, Addresses, Ranges

_IPIP: Final = 4
SHORTEST: Final = 50  # milliseconds between two probes of a path
_LONGEST: Final = 3_600_000
_MOST_REMEMBERED: Final = 64  # answers that decide whether a path is out
_EVERY, _LOST, _MARGIN = 1000, (3, 4), 10
_HOLD: Final = 5  # probe periods
_DISCOVERED: Final = 64
FEWEST: Final = 4  # networks that are a set: fewer are as quick, and easier to read, in the rule
_CONTRADICTION: Final = "E071"
_Line = TypeVar(
    "_Line", syntax.OverlaySelf, syntax.OverlayProbe, syntax.OverlayChoose, syntax.OverlayKey,
    syntax.OverlayPort, syntax.OverlaySticky, syntax.OverlayDiscover, syntax.Run,
)  # fmt: skip


def overlays(
    nodes: Sequence[syntax.Overlay], scope: Scope, findings: Findings
) -> dict[str, Overlay | None]:
    """The overlays of a file by name; None for one with errors."""
    found: dict[str, Overlay | None] = {}
    for node in nodes:
        first = next((n for n in nodes if n.name.text == node.name.text), node)
        if first is not node:
            findings.error(
                "E012", f"there are two overlays named `{node.name.text}`", node.name.span,
                notes=(("the first one is here", first.name.span),),
            )  # fmt: skip
            continue
        found[node.name.text] = _Check(node, scope, findings).overlay()
    _apart([one for one in found.values() if one is not None], findings)
    return found


def named_sets(
    nodes: Sequence[syntax.Overlay], checked: Mapping[str, Overlay | None]
) -> dict[str, ir.AnySet]:
    """The networks that each overlay leads to, as `@NAME`; the runtime adds what it discovers."""
    found: dict[str, ir.AnySet] = {}
    for node in nodes:
        one = checked[node.name.text]
        # What was reported is not reported again where the set is used.
        networks: values.ValueSet = values.ADDRESS.everything
        if one is not None:
            networks = Addresses.of(
                (IPV4, *ends(prefix)) for to in one.destinations for prefix in to.prefixes
            )
        name, type = node.name.text, values.ADDRESS
        few = one is not None and sum(len(to.prefixes) for to in one.destinations) < FEWEST
        found[name] = ir.NamedSet(name, type, networks, node.span, inline=few)
        if one is not None and one.discover:
            size = 2 * MOST_DESTINATIONS
            found[name] = ir.LearnedSet(name, type, None, size, node.span, networks)
    return found


def policy(overlay: Overlay) -> ir.Policy:
    """What takes packets out of an overlay's tunnels: those of members, to this box."""
    span = overlay.span

    def test(field: str, found: values.ValueSet) -> ir.Test:
        return ir.Test(FIELDS[field], found, span)

    def of(*found: int) -> Addresses:
        return Addresses.of([(IPV4, one, one) for one in found])

    interest = ir.And(
        (
            test("protocol", Ranges(255, ((_IPIP, _IPIP),))),
            test("daddr", of(overlay.address)),
            test("saddr", of(*overlay.members)),
        ),
        span,
    )
    return ir.Policy(
        name=overlay.name, hooks=("prerouting",), at=span, priority=PRIORITY, interest=interest,
        flows=(), rules=(ir.ClassRule(TUNNELLED, None, span),), counts=(), notes=(),
        process={TUNNELLED: (ir.Step(Decapsulate(), span),)}, updates=(), span=span,
        tunnels_in_python=overlay.in_python, overlay=overlay,
    )  # fmt: skip


def ways(overlay: Overlay) -> Mapping[str, ir.Steps]:
    """By neighbour, what is done to a packet that goes by it."""
    return {
        one.name: (ir.Step(Encapsulate((one.address, overlay.address)), one.span),)
        for one in overlay.neighbors
    }


def _apart(found: Sequence[Overlay], findings: Findings) -> None:
    """Refuse two overlays that would hear one another's probes."""
    for index, one in enumerate(found):
        for other in found[:index]:
            if (one.address, one.port) == (other.address, other.port):
                findings.error(
                    "E012", f"`{one.name}` and `{other.name}` both take probes at the port {one.port}",
                    one.span, help=f"give one of them another: `port {one.port + 1}`",
                    notes=(("the first one is here", other.span),),
                )  # fmt: skip


def _text(prefix: tuple[int, int]) -> str:
    return values.prefix_text(IPV4, *ends(prefix))


class _Check:
    """The check of one overlay."""

    def __init__(self, node: syntax.Overlay, scope: Scope, findings: Findings) -> None:
        self.node, self.scope, self.findings = node, scope, findings
        self.failed = False

    def overlay(self) -> Overlay | None:
        node = self.node
        check_name(node.name, self.findings)
        own = self._one(syntax.OverlaySelf, "self", "self 192.0.2.1")
        key = self._one(syntax.OverlayKey, "key", f'key from "{node.name.text}.key"')
        address = self._address(own.value) if own is not None else None
        neighbors = self._neighbors(address)
        destinations, behind = self._destinations(address)
        self._disjoint(destinations, neighbors, address)
        every, timeout, lost = self._probe()
        measure, margin, hold = self._choose(every)
        port = self._whole(self._option(syntax.OverlayPort, "port"), values.PORT, 1, 65535, PORT)
        discover = self._one(syntax.OverlayDiscover, "discover")
        learned = 0
        if discover is not None:
            learned = _DISCOVERED
            if discover.most is not None:
                learned = self._whole(
                    discover.most, values.NUMBER, 1, MOST_DESTINATIONS, _DISCOVERED
                )
        in_python = self._run()
        sticky = self._one(syntax.OverlaySticky, "sticky") is not None
        if self.failed or address is None or key is None:
            return None
        return Overlay(
            node.name.text, address, neighbors, destinations, behind, every, timeout, lost,
            measure, margin, hold, sticky, learned, in_python, port, key.path.text, key.span,
            node.span,
        )  # fmt: skip

    def _error(
        self, code: str, message: str, span: Span | None, help: str = "", notes: Any = ()
    ) -> None:
        self.failed = True
        self.findings.error(code, message, span, help=help, notes=notes)

    def _one(self, kind: type[_Line], keyword: str, example: str = "") -> _Line | None:
        """The overlay's only line of a kind; it must be there if there is an example of it."""
        found = [line for line in self.node.lines if isinstance(line, kind)]
        for extra in found[1:]:
            self._error(
                "E013", f"an overlay has one `{keyword}` at most", extra.span,
                notes=(("the first one is here", found[0].span),),
            )  # fmt: skip
        if not found and example:
            self._error(
                "E015", f"the overlay `{self.node.name.text}` has no {keyword}",
                self.node.name.span, help=f"add a line such as `{example}`",
            )  # fmt: skip
        return found[0] if found else None

    def _option(self, kind: type[syntax.OverlayPort], keyword: str) -> syntax.Value | None:
        line = self._one(kind, keyword)
        return None if line is None else line.value

    # Addresses.

    def _address(self, node: syntax.Value) -> int | None:
        found = one_address(node, self.scope, self.findings)
        if found is None:
            self.failed = True
            return None
        if found[0] != IPV4:
            self._error("E023", "a tunnel's ends are IPv4 addresses (RFC 2003)", node.span)
            return None
        refusal = Encapsulate((found[1], None)).refusal()
        if refusal:
            self._error("E023", refusal, node.span)
        return found[1]

    def _neighbors(self, address: int | None) -> tuple[Neighbor, ...]:
        found: list[Neighbor] = []
        for line in (n for n in self.node.lines if isinstance(n, syntax.OverlayNeighbor)):
            check_name(line.name, self.findings)
            one = self._address(line.value)
            if one is None:
                continue
            if one == address:
                self._error(
                    _CONTRADICTION, f"the neighbour `{line.name.text}` is this box itself",
                    line.value.span, help="leave it out here; the others name it",
                )  # fmt: skip
                continue
            for other in found:
                if other.name == line.name.text or other.address == one:
                    what = "named" if other.name == line.name.text else "with the address of"
                    self._error(
                        "E012", f"there are two neighbours {what} `{other.name}`", line.span,
                        notes=(("the first one is here", other.span),),
                    )  # fmt: skip
            found.append(Neighbor(line.name.text, one, line.span))
        if len(found) > MOST_NEIGHBORS:
            self._error(
                "E023", f"an overlay has {MOST_NEIGHBORS} neighbours at most",
                found[MOST_NEIGHBORS].span,
                help="the mark tells no more tunnels apart; name those that paths may lead through",
            )  # fmt: skip
        return tuple(found)

    def _destinations(
        self, address: int | None
    ) -> tuple[tuple[Destination, ...], tuple[tuple[int, int], ...]]:
        """Those behind others, and the networks behind this box."""
        found: list[Destination] = []
        own: list[tuple[int, int]] = []
        for line in (n for n in self.node.lines if isinstance(n, syntax.OverlayDestination)):
            egress = self._address(line.egress)
            given = value_set(line.prefixes, values.ADDRESS, self.scope, self.findings)
            if not isinstance(given, Addresses):
                self.failed = True
                continue
            if not given.family(values.IPV6).empty or given.family(IPV4).empty:
                self._error(
                    "E023", "an overlay leads to IPv4 networks: its tunnels take no others",
                    line.prefixes.span,
                )  # fmt: skip
                continue
            if given.family(IPV4).full:
                self._error(
                    _CONTRADICTION, "a destination cannot be everywhere: the tunnels to it "
                    "would lead into themselves", line.prefixes.span,
                    help="name the networks behind the far traffic manager",
                )  # fmt: skip
                continue
            networks = prefixes(given.family(IPV4))
            if egress is None:
                continue
            if egress == address:
                own += networks
            else:
                found.append(Destination(networks, egress, line.span))
        if sum(len(one.prefixes) for one in found) > MOST_DESTINATIONS:
            self._error(
                "E023", f"an overlay leads to {MOST_DESTINATIONS} networks at most", found[-1].span
            )
        return tuple(found), tuple(own)

    def _disjoint(
        self,
        destinations: Sequence[Destination],
        neighbors: Sequence[Neighbor],
        address: int | None,
    ) -> None:
        """No network is in two destinations; none has a tunnel's end in it."""
        if self.failed:
            return
        spans = sorted(
            ((*ends(prefix), prefix, one) for one in destinations for prefix in one.prefixes),
            key=lambda span: span[:2],
        )
        for (_, before, _, first), (low, _, prefix, one) in pairwise(spans):
            if low <= before:
                self._error(
                    _CONTRADICTION, f"{_text(prefix)} lies in two destinations", one.span,
                    notes=(("the other one is here", first.span),),
                )  # fmt: skip
        for low, high, prefix, one in spans:
            for end in neighbors:
                if low <= end.address <= high:
                    self._error(
                        _CONTRADICTION, f"the neighbour `{end.name}` lies in the destination "
                        f"{_text(prefix)}: the way to it would lead through itself", one.span,
                        help="leave its address out of the networks",
                        notes=(("the neighbour is here", end.span),),
                    )  # fmt: skip
            if address is not None and low <= address <= high:
                self._error(
                    _CONTRADICTION, f"this box lies in the destination {_text(prefix)}", one.span,
                    help="a destination is behind another traffic manager",
                )  # fmt: skip

    # Settings.

    def _probe(self) -> tuple[int, int, tuple[int, int]]:
        line = self._one(syntax.OverlayProbe, "probe")
        if line is None:
            return _EVERY, _EVERY, _LOST
        every = self._whole(line.every, values.DURATION, SHORTEST, _LONGEST, _EVERY)
        timeout = self._whole(line.timeout, values.DURATION, 1, _LONGEST, every)
        if line.lost is None or line.of is None:
            return every, timeout, _LOST
        of = self._whole(line.of, values.NUMBER, 2, _MOST_REMEMBERED, _LOST[1])
        lost = self._whole(line.lost, values.NUMBER, 2, max(2, of), _LOST[0])
        return every, timeout, (lost, of)

    def _choose(self, every: int) -> tuple[str, int, int]:
        line = self._one(syntax.OverlayChoose, "choose by")
        if line is None:
            return MEASURES[0], _MARGIN, _HOLD * every
        measure = line.measure.text
        if measure not in MEASURES:
            self._error(
                "E010", f"paths are not compared by `{measure}`", line.measure.span,
                help=did_you_mean(measure, MEASURES) or f"it is one of {', '.join(MEASURES)}",
            )  # fmt: skip
        # A percentage is a share of a million.
        margin = self._whole(line.margin, values.PERCENT, 0, 10**6 - 1, _MARGIN * 10**4)
        hold = self._whole(line.hold, values.DURATION, 0, _LONGEST, _HOLD * every)
        return measure, margin // 10**4, hold

    def _run(self) -> bool:
        line = self._one(syntax.Run, "run")
        if line is None:
            return False
        if line.where.text not in ("kernel", "python"):
            self._error(
                "E010", f"there is no place `{line.where.text}` to run", line.where.span,
                help="`run kernel` or `run python`",
            )  # fmt: skip
        return line.where.text == "python"

    def _whole(
        self, node: syntax.Value | None, type: values.Type, low: int, high: int, default: int
    ) -> int:
        if node is None:
            return default
        found = single(node, type, self.scope, self.findings)
        if found is None:
            self.failed = True
        elif not low <= found <= high:
            self._error(
                "E023", f"this lies between {type.text(low)} and {type.text(high)}", node.span
            )
        return default if found is None else found
