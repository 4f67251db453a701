"""`control` sections as written -> checked controllers and timers.

A measure's unit follows from the set-point: `short.rate = 20 mbit` is in bytes a second,
`short.rate = 500 packets/s` in packets.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from itmlang import laws, syntax, values
from itmlang.actions.call import Call
from itmlang.control import (
    CONTROLLED,
    SHORTEST_PERIOD,
    Controller,
    Measure,
    Timer,
    number,
    steps,
    text,
)  # fmt: skip
from itmlang.diagnostics import Findings, did_you_mean
from itmlang.evaluate import Parameter, Scope, one_address, single, value_set
from itmlang.links import Link
from itmlang.source import Span
from itmlang.values import Ranges, Type

_HOSTS: Final = ("rtt", "delay")
_OF_CLASS: Final = ("rate",)
_OF_FLOW: Final = ("flows",)
_OF_LINK: Final = ("backlog", "drops", "rate", "share")
_LEAST_RATE: Final = 1500  # bytes a second, that a link may be set to


@dataclass(frozen=True)
class Around:
    """What a control section may name."""

    policy: str
    classes: tuple[str, ...]
    flows: tuple[str, ...]
    links: Mapping[str, Link | None]
    parameters: Mapping[str, tuple[syntax.Parameter, Parameter]]
    scope: Scope


def entries(
    node: syntax.Control, around: Around, findings: Findings
) -> tuple[tuple[Controller, ...], tuple[Timer, ...]]:
    """The section's controllers and timers."""
    check = _Check(around, findings)
    controllers: dict[str, Controller] = {}
    timers = []
    for entry in node.entries:
        if isinstance(entry, syntax.Timer):
            timers += check.timer(entry)
            continue
        made = check.controller(entry)
        if made is not None and made.written in controllers:
            findings.error(
                "E012", f"two controllers write `{made.written}`", entry.written.span,
                notes=(("the first one is here", controllers[made.written].span),),
            )  # fmt: skip
        elif made is not None:
            controllers[made.written] = made
    return tuple(controllers.values()), tuple(timers)


class _Check:
    def __init__(self, around: Around, findings: Findings) -> None:
        self.around, self.findings = around, findings
        self.scope = around.scope

    def timer(self, node: syntax.Timer) -> list[Timer]:
        period = self._period(node.period)
        refused = Call((node.target.text, False)).refusal()
        if refused:
            self.findings.error("E023", refused, node.target.span)
        if period is None or refused:
            return []
        return [Timer(self.around.policy, period, node.target.text, node.span)]

    def controller(self, node: syntax.Controller) -> Controller | None:
        period = self._period(node.period)
        written = self._written(node)
        measured = self._measure(node)
        law = self._law(node)
        gains = self._gains(node, law)
        bounds = self._bounds(node, written)
        options = [o for o in node.options if isinstance(o, syntax.Dry)]
        if (
            period is None or written is None or measured is None or law is None
            or gains is None or bounds is None
        ):  # fmt: skip
            return None
        type, base = written
        low, high = bounds
        if not low <= base <= high:
            self.findings.error(
                "E039", f"`{node.written.text}` is {text(type, base)}, outside of its controller's "
                "bounds", self._bounds_span(node),
                help="the file's value is where it starts, and what it goes back to",
            )  # fmt: skip
            return None
        measure, target = measured
        whole = type is not values.PERCENT
        link = "." in node.written.text
        at = () if link else steps(type, low, high, base)
        return Controller(
            policy=self.around.policy, written=node.written.text, period=period, measure=measure,
            target=target, law=law, gains=tuple(sorted(gains.items())), base=base, low=low,
            high=high, whole=whole, dry=bool(options), values=at,
            steps=tuple(text(type, value) for value in at), span=node.span,
        )  # fmt: skip

    def _period(self, node: syntax.Value) -> int | None:
        period = single(node, values.DURATION, self.scope, self.findings)
        if period is not None and period < SHORTEST_PERIOD:
            self.findings.error(
                "E023", f"a period has {SHORTEST_PERIOD} ms at least: each one costs a look at "
                "the kernel", node.span,
            )  # fmt: skip
            return None
        return period

    # What is written.

    def _written(self, node: syntax.Controller) -> tuple[Type, float] | None:
        """Its type, and the file's value."""
        name = node.written.text
        stem, dot, part = name.rpartition(".")
        if dot:
            return self._written_link(node, stem, part)
        known = self.around.parameters
        if name not in known:
            self.findings.error(
                "E010", f"there is no parameter `{name}` to control", node.written.span,
                help=did_you_mean(name, [*known, *(f"{one}.rate" for one in self.around.links)])
                or "a controller writes a parameter of its policy, or `LINK.rate`",
            )  # fmt: skip
            return None
        parameter = known[name][1]
        self.scope.used.add(name)
        if parameter.values is None:
            return None  # said where it has its value
        spans = parameter.values.spans if isinstance(parameter.values, Ranges) else ()
        if parameter.type.name not in [one.name for one in CONTROLLED] or parameter.set is not None:
            self.findings.error(
                "E066", f"`{name}` is {parameter.type.article} {parameter.type.name}: "
                "a controller writes numbers", node.written.span,
                help=f"its type may be {', '.join(one.name for one in CONTROLLED)}",
            )  # fmt: skip
            return None
        if len(spans) != 1 or spans[0][0] != spans[0][1]:
            self.findings.error(
                "E066", f"`{name}` is not one value, so it cannot be moved", node.written.span
            )
            return None
        return parameter.type, number(parameter.type, spans[0][0])

    def _written_link(
        self, node: syntax.Controller, name: str, part: str
    ) -> tuple[Type, float] | None:
        link = self._link(name, node.written.span)
        if link is None:
            return None
        if part != "rate":
            self.findings.error(
                "E010", f"of a link, a controller writes the rate: `{name}.rate`", node.written.span
            )
            return None
        return values.RATE, float(link.rate)

    def _link(self, name: str, span: Span) -> Link | None:
        if name not in self.around.links:
            self.findings.error(
                "E010", f"there is no link `{name}`", span,
                help=did_you_mean(name, self.around.links)
                or f"declare it: `link {name} {{ interface \"eth0\"  rate 10 mbit  class bulk {{ }} }}`",
            )  # fmt: skip
        return self._scheduled(self.around.links.get(name), span)

    def _scheduled(self, link: Link | None, span: Span) -> Link | None:
        """The link, if it is one that has a rate and queues."""
        if link is None or not link.only_marks:
            return link
        self.findings.error(
            "E067", f"`{link.name}` only marks: it has no rate, and nothing waits there", span,
            notes=(("it has no interface", link.span),),
        )  # fmt: skip
        return None

    # What is measured.

    def _measure(self, node: syntax.Controller) -> tuple[Measure, float] | None:
        name, of = node.measure.name, node.measure.of
        *parts, last = name.text.split(".")
        if not parts and last in _HOSTS:
            if of is None:
                self.findings.error(
                    "E067", f"`{last}` is to a host", name.span, help=f"write `{last} 192.0.2.1`"
                )
                return None
            found = one_address(of, self.scope, self.findings)
            if found is None:
                return None
            host = values.address_text(*found)
            return self._target(node, last, (host,), (values.DURATION, "ms"))
        if of is not None:
            self.findings.error(
                "E067", f"only `rtt` and `delay` are to a host, `{name.text}` is not", of.span
            )
            return None
        if not parts and last == "cpu":
            return self._target(node, "cpu", (), (values.PERCENT, "%"))
        return self._of_name(node, tuple(parts), last)

    def _of_name(
        self, node: syntax.Controller, parts: tuple[str, ...], last: str
    ) -> tuple[Measure, float] | None:
        around, span = self.around, node.measure.name.span
        rates = (values.RATE, "bytes/s"), (values.PACKET_RATE, "packets/s")
        if len(parts) == 1 and parts[0] in around.classes and parts[0] not in around.links:
            if not self._known(node, last, _OF_CLASS):
                return None
            return self._target(node, "class", parts, *rates)
        if len(parts) == 1 and parts[0] in around.flows and parts[0] not in around.links:
            if not self._known(node, last, _OF_FLOW):
                return None
            return self._target(node, "flow", parts, (values.NUMBER, "flows"))
        if len(parts) not in (1, 2):
            self.findings.error(
                "E067", f"`{node.measure.span.text}` is no measure", span,
                help="a measure is CLASS.rate, FLOW.flows, LINK.CLASS.backlog, LINK.rate, "
                "`rtt 192.0.2.1`, `delay 192.0.2.1` or `cpu`",
            )  # fmt: skip
            return None
        if parts[0] not in around.links:
            named = [*around.classes, *around.flows, *around.links]
            self.findings.error(
                "E010", f"there is no class, flow or link `{parts[0]}`", span,
                help=did_you_mean(parts[0], named),
            )  # fmt: skip
            return None
        link = self._scheduled(around.links[parts[0]], span)
        if link is None or not self._known(node, last, _OF_LINK):
            return None
        if len(parts) == 2 and link.find(parts[1]) is None:
            names = [one.name for one in link.classes]
            self.findings.error(
                "E010", f"the link `{link.name}` has no class `{parts[1]}`", span,
                help=did_you_mean(parts[1], names) or f"it has {', '.join(names)}",
            )  # fmt: skip
            return None
        of = (link.name, parts[1] if len(parts) == 2 else "")
        if last == "backlog":
            return self._target(
                node, "link", of, (values.PACKETS, "packets"), (values.BYTES, "bytes")
            )
        if last == "share":
            if not of[1]:
                self.findings.error(
                    "E067", "the link itself has all of what it sends", span,
                    help=f"write `{link.name}.{link.classes[0].name}.share`",
                )  # fmt: skip
                return None
            return self._target(node, "link", of, (values.PERCENT, "%"))
        if last == "drops":
            return self._target(node, "link", of, (values.PACKET_RATE, "dropped/s"))
        return self._target(node, "link", of, *rates)

    def _known(self, node: syntax.Controller, last: str, known: tuple[str, ...]) -> bool:
        if last in known:
            return True
        self.findings.error(
            "E067", f"`{last}` is not measured there", node.measure.name.span,
            help=did_you_mean(last, known) or f"there is {', '.join(known)}",
        )  # fmt: skip
        return False

    def _target(
        self, node: syntax.Controller, kind: str, of: tuple[str, ...], *types: tuple[Type, str]
    ) -> tuple[Measure, float] | None:
        """The measure in the unit of its set-point."""
        unit = node.target.unit if isinstance(node.target, syntax.Number) else ""
        type, name = next((one for one in types if unit and unit in one[0].units), types[0])
        raw = single(node.target, type, self.scope, self.findings)
        if raw is None:
            return None
        return Measure(kind, of, name, node.measure.span.text), number(type, raw)

    # How it is reckoned.

    def _law(self, node: syntax.Controller) -> str | None:
        if isinstance(node.law, syntax.Text):
            refused = Call((node.law.text, False)).refusal()
            if refused:
                self.findings.error("E023", refused, node.law.span)
            return None if refused else node.law.text
        named = [name for name, law in laws.LAWS.items() if not law.free]
        if node.law.text not in named:
            self.findings.error(
                "E010", f"there is no law `{node.law.text}`", node.law.span,
                help=did_you_mean(node.law.text, named)
                or f'it is one of {", ".join(named)}, or `call "module:function"`',
            )  # fmt: skip
            return None
        law = laws.LAWS[node.law.text]
        if law.load and (
            node.measure.name.text != "delay" or not node.written.text.endswith(".rate")
        ):
            self.findings.error(
                "E067", f"`{node.law.text}` writes a link's rate by the delay to a host",
                node.law.span,
                help=f"write `LINK.rate every 100ms toward delay 192.0.2.1 = 15ms with {node.law.text} …`",
            )  # fmt: skip
            return None
        return node.law.text

    def _gains(self, node: syntax.Controller, law: str | None) -> dict[str, float] | None:
        given: dict[str, syntax.Gain] = {}
        found: dict[str, float] = {}
        for gain in (o for o in node.options if isinstance(o, syntax.Gain)):
            if gain.name.text in given:
                self.findings.error("E012", f"`{gain.name.text}` is given twice", gain.span)
            given[gain.name.text] = gain
            value = self._gain(gain)
            if value is None:
                return None
            found[gain.name.text] = value
        if law is None:
            return None
        cooldown = {k: found.pop(k) for k in ("cooldown",) if k in found}
        if cooldown.get("cooldown", 0) < 0:
            self.findings.error("E023", "a cooldown is a time", given["cooldown"].span)
            return None
        wrong = laws.faults("call" if ":" in law else law, found)
        for name, told in wrong:
            span = given[name].span if name in given else (node.law.span)
            self.findings.error("E023", told, span)
        return None if wrong else found | cooldown

    def _gain(self, node: syntax.Gain) -> float | None:
        """A plain number, or one with a unit: seconds, bytes or packets a second, a share."""
        value = node.value
        sign = -1.0 if node.negative else 1.0
        if isinstance(value, syntax.Number):
            if not value.unit:
                return sign * float(value.value)
            for type, scale in (
                (values.DURATION, 0.001), (values.RATE, 1.0), (values.PACKET_RATE, 1.0),
                (values.PERCENT, 0.01), (values.PACKETS, 1.0), (values.BYTES, 1.0),
            ):  # fmt: skip
                if value.unit in type.units:
                    raw = single(value, type, self.scope, self.findings)
                    return None if raw is None else sign * scale * number(type, raw)
        self.findings.error("E020", f"`{value.span.text}` is no number", value.span)
        return None

    def _bounds_span(self, node: syntax.Controller) -> Span:
        given = next((o for o in node.options if isinstance(o, syntax.Bounds)), None)
        return node.written.span if given is None else given.span

    def _bounds(
        self, node: syntax.Controller, written: tuple[Type, float] | None
    ) -> tuple[float, float] | None:
        """The least and the greatest value; the parameter's own bounds hold, too."""
        given = [o for o in node.options if isinstance(o, syntax.Bounds)]
        for extra in given[1:]:
            self.findings.error("E013", "a controller has one `within` at most", extra.span)
        if written is None:
            return None
        own = None
        if node.written.text in self.around.parameters:
            own = self.around.parameters[node.written.text][0].bounds
        if not given and own is None:
            self.findings.error(
                "E015", f"nothing says how far `{node.written.text}` may go", node.span,
                help="end the controller with `within LEAST-GREATEST`",
            )  # fmt: skip
            return None
        found = [
            self._range(value, written[0])
            for value in (*(o.value for o in given[:1]), *((own,) if own is not None else ()))
        ]
        ranges = [one for one in found if one is not None]
        if len(ranges) < len(found):
            return None
        low, high = max(r[0] for r in ranges), min(r[1] for r in ranges)
        if low > high or (len(ranges) == 2 and ranges[0] != (low, high)):
            self.findings.error(
                "E039", f"the controller may go further than `{node.written.text}` itself",
                given[0].span, notes=(("its bounds are here", own.span),) if own else (),
            )  # fmt: skip
            return None
        if "." in node.written.text and low < _LEAST_RATE:
            self.findings.error("E023", "a link has 12 kbit at least", self._bounds_span(node))
            return None
        if low == high:
            self.findings.error(
                "E023", "there is only one value within these bounds", self._bounds_span(node)
            )
            return None
        return low, high

    def _range(self, node: syntax.Value, type: Type) -> tuple[float, float] | None:
        found = value_set(node, type, self.scope, self.findings)
        if found is None:
            return None
        if not isinstance(found, Ranges) or len(found.spans) != 1:
            self.findings.error("E022", "bounds are one range, such as `2-200`", node.span)
            return None
        low, high = found.spans[0]
        return number(type, low), number(type, high)
