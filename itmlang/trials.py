"""Tests in the file: as written -> checked, and run through the semantics.

A test names policies (with arguments of their own, if it likes) or means all that
the file loads. Its packets go past them one by one, all in one state; a `wait`
lets time pass. What is expected of a packet is checked when the test is read, so
that running one can only hold or fail.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from itmlang import ir, syntax, values
from itmlang.check import check_instance
from itmlang.diagnostics import Findings, did_you_mean
from itmlang.evaluate import Scope, one_address, single
from itmlang.links import Link
from itmlang.packet import Header, Packet
from itmlang.packets import header
from itmlang.resolve import Instance, Program, arguments
from itmlang.semantics import PATHS, Doer, Host, Line, Visit, nothing_done
from itmlang.source import Span
from itmlang.values import Type

MOST_PACKETS: Final = 1_000_000
# Where a test's packets come in and leave, if it does not say.
INTERFACES: Final = ("eth0", "eth1")
VERDICTS: Final = ("accept", "drop", "reject")
# What can be expected of a packet's fields: its type, and what the packet calls it.
_FIELDS: Final[Mapping[str, tuple[Type, str]]] = {
    "tos": (values.TOS, "tos"),
    "dscp": (values.DSCP, "dscp"),
    "ecn": (values.ECN, "ecn"),
    "ttl": (values.OCTET, "ttl"),
    "length": (values.LENGTH, "length"),
    "mark": (values.NUMBER, "mark"),
    "saddr": (values.ADDRESS, "source"),
    "daddr": (values.ADDRESS, "destination"),
    "sport": (values.PORT, "source_port"),
    "dport": (values.PORT, "destination_port"),
    "mss": (values.MSS, "tcp_mss"),
}


@dataclass(frozen=True)
class Expected:
    """One expectation: `kind` is "class" (of `policy`, if given), "untouched", a verdict or a
    field's name; `value` is the class or the field's value."""

    kind: str
    value: object
    span: Span
    policy: str = ""


@dataclass(frozen=True)
class Send:
    """So many equal packets on a path ("" if the test names none), and what is expected of each."""

    count: int
    header: Header
    path: str
    expected: tuple[Expected, ...]
    span: Span
    text: str  # the packet as written


@dataclass(frozen=True)
class Wait:
    seconds: float
    span: Span


@dataclass(frozen=True)
class Trial:
    """A test in the file."""

    name: str
    policies: tuple[ir.Policy, ...]
    steps: tuple[Send | Wait, ...]
    span: Span


@dataclass(frozen=True)
class Failure:
    """What did not come as expected: of which packet of a line, what came, and why.

    `lines` is the story of the packet, policy by policy; `decided` is the line that
    gave the class, if one did.
    """

    send: Send
    number: int  # from 1
    expected: Expected
    came: str
    lines: tuple[Line, ...]
    decided: Span | None


def read_trials(
    program: Program, loaded: Sequence[ir.Policy], links: Sequence[Link], findings: Findings
) -> tuple[Trial, ...]:
    """The tests of a file, checked. Errors go to `findings`."""
    trials, names = [], dict[str, Span]()
    for node in program.tests:
        if node.name.text in names:
            findings.error(
                "E012", f"there are two tests named `{node.name.text}`", node.name.span,
                notes=(("the first one is here", names[node.name.text]),),
            )  # fmt: skip
        names.setdefault(node.name.text, node.name.span)
        trial = _Reader(program, loaded, {link.name: link for link in links}, findings).trial(node)
        trials += [trial] if trial is not None else []
    return tuple(trials)


@dataclass
class _Reader:
    program: Program
    loaded: Sequence[ir.Policy]
    links: Mapping[str, Link]
    findings: Findings

    def trial(self, node: syntax.Test) -> Trial | None:
        named = [line for line in node.lines if isinstance(line, syntax.TestPolicy)]
        found = [self._policy(line) for line in named]
        policies = tuple(p for p in found if p is not None) if named else tuple(self.loaded)
        if len(found) != len([p for p in found if p is not None]):
            return None
        steps: list[Send | Wait] = []
        path = ""
        for line in node.lines:
            match line:
                case syntax.Path():
                    path = line.name.text
                    if path not in PATHS:
                        self.findings.error(
                            "E010", f"there is no path `{path}`", line.name.span,
                            help="`path forward`, `path in` or `path out`",
                        )  # fmt: skip
                        return None
                case syntax.Wait():
                    time = single(line.value, values.DURATION, Scope(), self.findings)
                    steps += [Wait(time / 1000, line.span)] if time is not None else []
                case syntax.Send():
                    send = self._send(line, path, policies)
                    steps += [send] if send is not None else []
                case _:
                    pass
        if not any(isinstance(step, Send) for step in steps) and not self.findings.failed:
            self.findings.error(
                "E046", "the test sends nothing", node.name.span,
                help="add a line such as `send 1 udp 10.0.0.1:1 -> 10.0.0.2:53 expect class x`",
            )  # fmt: skip
        return Trial(node.name.text, policies, tuple(steps), node.span)

    def _policy(self, node: syntax.TestPolicy) -> ir.Policy | None:
        """The policy or the instance of this name, with the test's own arguments."""
        name = node.name.text
        instance = next((i for i in self.program.instances if i.name.text == name), None)
        if instance is not None and (instance.use is None or not node.arguments):
            template, given = instance.policy, dict(instance.arguments)
        elif name in self.program.policies:
            instance, template, given = None, self.program.policies[name], {}
        elif instance is not None:
            template, given = instance.policy, dict(instance.arguments)
        else:
            self.findings.error(
                "E010", f"there is no policy `{name}`", node.name.span,
                help=did_you_mean(name, self.program.policies),
            )  # fmt: skip
            return None
        if instance is None or node.arguments:
            errors = len(self.findings.diagnostics)
            own = arguments(template, node.arguments, node.name.span, self.findings)
            if any(d.is_error for d in self.findings.diagnostics[errors:]):
                return None
            given |= own
        use = instance.use if instance is not None else None
        made = Instance(node.name, template, given, use)
        quiet = Findings()  # what there is to warn of was said of the policy itself
        overlays = {p.overlay.name: p.overlay for p in self.loaded if p.overlay is not None}
        checked = check_instance(made, self.program.sets, quiet, self.links, overlays)
        for diagnostic in quiet.diagnostics:
            if diagnostic.is_error:
                self.findings.add(diagnostic)
        return checked

    def _send(self, node: syntax.Send, path: str, policies: Sequence[ir.Policy]) -> Send | None:
        built = header(node.packet, self.findings)
        if not 0 < node.count.value <= MOST_PACKETS:
            self.findings.error(
                "E023", f"a test sends 1 to {MOST_PACKETS} packets a line", node.count.span
            )
            return None
        expected = [self._expected(one, policies) for one in node.expectations]
        if built is None or None in expected:
            return None
        return Send(
            int(node.count.value), built, path, tuple(e for e in expected if e is not None),
            node.span, " ".join(node.packet.span.text.split()),
        )  # fmt: skip

    def _expected(self, node: syntax.Expectation, policies: Sequence[ir.Policy]) -> Expected | None:
        if node.kind == "class" and node.name is not None:
            return self._class(node, node.name, policies)
        if node.kind == "untouched" or node.kind in VERDICTS:
            return Expected(node.kind, None, node.span)
        if node.kind not in _FIELDS or node.value is None:
            self.findings.error(
                "E010", f"`{node.kind}` cannot be expected", node.span,
                help=did_you_mean(node.kind, ["class", "untouched", *VERDICTS, *_FIELDS]),
            )  # fmt: skip
            return None
        type = _FIELDS[node.kind][0]
        value: object
        if type is values.ADDRESS:
            value = one_address(node.value, Scope(), self.findings)
        else:
            value = single(node.value, type, Scope(), self.findings)
        return None if value is None else Expected(node.kind, value, node.span)

    def _class(
        self, node: syntax.Expectation, name: syntax.Name, policies: Sequence[ir.Policy]
    ) -> Expected | None:
        wanted = node.policy.text if node.policy is not None else ""
        among = [p for p in policies if wanted in ("", p.name)]
        if not among and node.policy is not None:
            self.findings.error(
                "E010", f"the test has no policy `{wanted}`", node.policy.span,
                help=did_you_mean(wanted, [p.name for p in policies]),
            )  # fmt: skip
            return None
        classes = [c for p in among for c in p.classes]
        if name.text not in classes:
            self.findings.error(
                "E010", f"there is no class `{name.text}`", name.span,
                help=did_you_mean(name.text, classes),
            )  # fmt: skip
            return None
        return Expected("class", name.text, node.span, wanted)


# Running.


def run(trial: Trial, path: str = "forward", do: Doer = nothing_done) -> list[Failure]:
    """The trial through the semantics: what did not come as expected, one failure a line.

    `path` is that of packets for which the test names none; `do` does what is Python's.
    """
    host, now, failures = Host(trial.policies, do=do), 0.0, list[Failure]()
    for step in trial.steps:
        if isinstance(step, Wait):
            now += step.seconds
            continue
        for number in range(1, step.count + 1):
            way = step.path or path
            packet, before = built(step.header, way, *INTERFACES), step.header.build()
            visits = host.traverse(packet, way, now, told=True)
            failure = _compare(step, number, visits, before, packet)
            if failure is not None:
                failures.append(failure)
                break  # the others of the line would say the same
    return failures


def built(header: Header, path: str, input: str | None = None, output: str | None = None) -> Packet:
    """The packet, with the interfaces that it can have on its path; those given if it has none."""
    packet = header.build()
    packet.input = None if path == "out" else packet.input or input
    packet.output = None if path == "in" else packet.output or output
    return packet


def _compare(
    send: Send, number: int, visits: Sequence[Visit], before: Packet, after: Packet
) -> Failure | None:
    story = tuple(line for visit in visits for line in visit.outcome.lines)
    decided = [v.outcome.decided for v in visits if v.outcome.decided is not None]
    verdict = visits[-1].outcome.verdict if visits else "accept"
    wanted = {e.kind for e in send.expected}
    expected = list(send.expected)
    if not wanted & {*VERDICTS}:
        # Nobody who expects something else of a packet expects it to be gone.
        expected.append(Expected("accept", None, send.span))
    for one in expected:
        came = _came(one, visits, before, after, verdict)
        if came is not None:
            return Failure(send, number, one, came, story, decided[-1] if decided else None)
    return None


def _came(
    expected: Expected, visits: Sequence[Visit], before: Packet, after: Packet, verdict: str
) -> str | None:
    """What came instead of what was expected, None if that came."""
    match expected.kind:
        case "class":
            among = [v for v in visits if expected.policy in ("", v.policy.name)]
            if any(v.outcome.name == expected.value for v in among):
                return None
            return classes_text([(v.policy.name, v.outcome.name) for v in among])
        case "untouched":
            classes = [(v.policy.name, v.outcome.name) for v in visits if v.outcome.name]
            if classes:
                return classes_text(classes)
            return None if before.data == after.data else "the packet was changed"
        case "accept" | "drop" | "reject":
            return None if verdict == expected.kind else f"verdict {verdict}"
        case field:
            return field_text(field, expected.value, after)


def field_text(field: str, wanted: object, packet: Packet) -> str | None:
    """What a field of the packet is, None if it is what was wanted."""
    type, attribute = _FIELDS[field]
    value = getattr(packet, attribute)
    if value == wanted:
        return None
    if value is None:
        return f"the packet has no {field}"
    return f"{field} {value:#x}" if field in ("tos", "mark") else f"{field} {type.text(value)}"


def classes_text(classes: Sequence[tuple[str, str | None]]) -> str:
    """`class long`, `class a.long, b.0`: the classes that a packet had, 0 for none."""
    if not classes:
        return "no class: no policy saw it"
    several = len({policy for policy, _ in classes}) > 1
    texts = [
        (f"{policy}." if several else "") + (name or "0") for (policy, name), _ in groupby(classes)
    ]
    return f"class {', '.join(texts)}"
