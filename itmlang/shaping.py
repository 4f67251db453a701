"""Links as written -> checked `Link`s: rates, classes, where packets go.

Everything that can be told without the machine is told here: a part that is missing,
guarantees that are more than the link has, a ceiling below a guarantee.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar

from itmlang import syntax, values
from itmlang.control import number
from itmlang.diagnostics import Findings, did_you_mean
from itmlang.evaluate import Scope, single, value_set
from itmlang.links import (
    MOST_CLASSES,
    PRIORITIES,
    Link,
    LinkClass,
    class_number,
    handle,
    overlap,
    rate_text,
)
from itmlang.resolve import check_name
from itmlang.source import Span
from itmlang.values import Names, Ranges

# The kernel counts packets of a queue in 32 bits; so many never wait anywhere.
LONGEST_QUEUE: Final = 1_000_000
# Below, a full packet takes longer than a second.
SLOWEST: Final = 1500  # bytes a second
_INNER: Final = ("fq_codel", "fifo")
_Line = TypeVar("_Line", syntax.LinkInterface, syntax.LinkRate, syntax.LinkOtherwise)
_SETTINGS: Final = ("priority", "at least", "at most", "queue", "inner", "dscp")


def links(
    nodes: Sequence[syntax.Link], probed: Collection[str], scope: Scope, findings: Findings
) -> dict[str, Link | None]:
    """The links of a file by name; None for one with errors. Those `probed` have probes sent by."""
    found: dict[str, Link | None] = {}
    taken: set[int] = set()
    for node in nodes:
        first = next((n for n in nodes if n.name.text == node.name.text), node)
        if first is not node:
            findings.error(
                "E012", f"there are two links named `{node.name.text}`", node.name.span,
                notes=(("the first one is here", first.name.span),),
            )  # fmt: skip
            continue
        made = _Check(node, scope, findings).link(handle(node.name.text, frozenset(taken)))
        if made is not None:
            taken.add(made.handle)
            made = replace(made, probed=made.name in probed and not made.ingress)
        found[node.name.text] = made
    _apart([one for one in found.values() if one is not None], findings)
    return found


def _apart(found: list[Link], findings: Findings) -> None:
    """Refuse two links of one interface."""
    for index, one in enumerate(found):
        for other in found[:index]:
            if one.ingress == other.ingress and overlap(one, other):
                findings.error(
                    "E012", f"`{one.name}` and `{other.name}` are links of one interface", one.at,
                    notes=(("the first one is here", other.at),),
                )  # fmt: skip


class _Check:
    """The check of one link."""

    def __init__(self, node: syntax.Link, scope: Scope, findings: Findings) -> None:
        self.node, self.scope, self.findings = node, scope, findings
        self.failed = False
        self.numbers: set[int] = set()

    def link(self, handle: int) -> Link | None:
        node = self.node
        lines = (syntax.LinkInterface, syntax.LinkRate)
        marks = bool(node.lines) and not any(isinstance(line, lines) for line in node.lines)
        interface = self._one(
            syntax.LinkInterface, "interface", "" if marks else 'interface "eth1"'
        )
        rate_line = self._one(syntax.LinkRate, "rate", "" if marks else "rate 10 mbit")
        nodes = [line for line in node.lines if isinstance(line, syntax.LinkClass)]
        if not nodes:
            self._error("E015", f"the link `{node.name.text}` has no class", node.name.span,
                        "add a line such as `class bulk { priority 1 }`")  # fmt: skip
        elif len(nodes) > MOST_CLASSES:
            self._error("E023", f"a link has {MOST_CLASSES} classes at most", nodes[-1].span)
        device = self._interface(interface) if interface is not None else ""
        rate = self._rate(rate_line.value) if rate_line is not None else 0
        classes = tuple(self._class(one, rate) for one in nodes)
        self._named_once(nodes)
        self._guarantees(rate, classes)
        self._marked_once(classes)
        otherwise = self._otherwise(classes)
        if marks and not self.failed:
            return self._marking(nodes, classes, handle)
        if self.failed or interface is None or not device or not rate:
            return None
        return Link(
            node.name.text, device, interface.ingress, rate, handle, otherwise, classes,
            interface.span, node.span,
        )  # fmt: skip

    def _marking(
        self, nodes: Sequence[syntax.LinkClass], classes: tuple[LinkClass, ...], handle: int
    ) -> Link | None:
        """A link of a box that only marks: each class is one DSCP, and nothing else."""
        for node, one in zip(nodes, classes, strict=True):
            others = [s for s in node.settings if s.name != "dscp"]
            if len(one.dscp) != 1:
                self._error(
                    "E015", f"`{self.node.name.text}` has no interface, so it only marks: "
                    f"`{one.name}` needs one dscp", node.span,
                    help=f'write `class {one.name} {{ dscp ef }}`, or add `interface "eth1"` and a rate',
                )  # fmt: skip
            for setting in others:
                self._error(
                    "E015", f"`{self.node.name.text}` has no interface, so nothing waits there: "
                    f"`{setting.name}` means nothing", setting.span,
                    help='add `interface "eth1"` and a rate, or leave it out',
                )  # fmt: skip
        if self.failed:
            return None
        name = self.node.name
        return Link(name.text, "", False, 0, handle, 0, classes, name.span, self.node.span)

    def _error(
        self, code: str, message: str, span: Span | None, help: str = "", notes: Any = ()
    ) -> None:
        self.failed = True
        self.findings.error(code, message, span, help=help, notes=notes)

    def _one(self, kind: type[_Line], keyword: str, example: str) -> _Line | None:
        """The link's only line of a kind; it must be there if there is an example of it."""
        found = [line for line in self.node.lines if isinstance(line, kind)]
        for extra in found[1:]:
            self._error(
                "E013", f"a link has one `{keyword}` at most", extra.span,
                notes=(("the first one is here", found[0].span),),
            )  # fmt: skip
        if not found and example:
            self._error(
                "E015", f"the link `{self.node.name.text}` has no {keyword}", self.node.name.span,
                help=f"add a line such as `{example}`",
            )  # fmt: skip
        return found[0] if found else None

    def _interface(self, node: syntax.LinkInterface) -> str:
        text = syntax.Text(node.interface.span, node.interface.text)
        found = value_set(text, values.INTERFACE, self.scope, self.findings)
        if isinstance(found, Names) and len(found.patterns) == 1:
            if node.interface.text == "lo":
                self._error(
                    "E025", "`lo` sends nothing over a wire: it cannot be a link", text.span
                )
            return next(iter(found.patterns))
        self.failed = True
        if found is not None:
            self.findings.error(
                "E025", "a link is of some interfaces, not of all", text.span,
                help='name one, or a pattern such as "veth*"',
            )  # fmt: skip
        return ""

    def _rate(self, node: syntax.Value) -> int:
        """Bytes a second; 0 after an error."""
        raw = single(node, values.RATE, self.scope, self.findings)
        if raw is None:
            self.failed = True
            return 0
        rate = int(number(values.RATE, raw))
        if rate < SLOWEST:
            self._error("E023", "a link has 12 kbit at least: one full packet a second", node.span)
        return rate

    def _class(self, node: syntax.LinkClass, rate: int) -> LinkClass:
        check_name(node.name, self.findings)
        given: dict[str, syntax.ClassSetting] = {}
        for setting in node.settings:
            if setting.name not in _SETTINGS:
                self._error(
                    "E010", f"a link's class has no `{setting.name}`", setting.span,
                    help=did_you_mean(setting.name, _SETTINGS)
                    or f"it has {', '.join(f'`{one}`' for one in _SETTINGS)}",
                )  # fmt: skip
            elif setting.name in given:
                self._error("E012", f"`{setting.name}` is given twice", setting.span)
            given.setdefault(setting.name, setting)
        least = self._share(given.get("at least"), 0)
        most = self._share(given.get("at most"), rate)
        for name, share in (("at least", least), ("at most", most)):
            if rate and share > rate:
                self._error(
                    "E065", f"`{name} {given[name].value.span.text}` is more than the link has",
                    given[name].span,
                )  # fmt: skip
        if "at most" in given and least > most:
            self._error(
                "E065", f"`{node.name.text}` has {given['at least'].value.span.text} at least, "
                f"and {given['at most'].value.span.text} at most", given["at most"].span,
            )  # fmt: skip
        number = class_number(node.name.text, frozenset(self.numbers))
        self.numbers.add(number)
        return LinkClass(
            name=node.name.text,
            number=number,
            priority=self._whole(given.get("priority"), values.PRIORITY, 0, PRIORITIES - 1, 0),
            least=least,
            most=most,
            queue=self._whole(given.get("queue"), values.PACKETS, 1, LONGEST_QUEUE, 0),
            inner=self._inner(given.get("inner")),
            dscp=self._dscp(given.get("dscp")),
            span=node.span,
        )

    def _share(self, setting: syntax.ClassSetting | None, default: int) -> int:
        """Bytes a second."""
        if setting is None:
            return default
        raw = single(setting.value, values.RATE, self.scope, self.findings)
        if raw is None:
            self.failed = True
            return default
        share = int(number(values.RATE, raw))
        if share == 0:
            self._error("E023", "a rate of 0 lets nothing through", setting.value.span)
        return share

    def _whole(
        self,
        setting: syntax.ClassSetting | None,
        type: values.Type,
        low: int,
        high: int,
        default: int,
    ) -> int:
        if setting is None:
            return default
        found = single(setting.value, type, self.scope, self.findings)
        if found is None:
            self.failed = True
        elif not low <= found <= high:
            self._error(
                "E023", f"`{setting.name}` lies between {low} and {high}", setting.value.span
            )
        return default if found is None else found

    def _inner(self, setting: syntax.ClassSetting | None) -> str:
        if setting is None:
            return ""
        word = setting.value.text if isinstance(setting.value, syntax.Word) else ""
        if word not in _INNER:
            self._error(
                "E010", f"`{setting.value.span.text}` is no queue that a class can have",
                setting.value.span, help=f"it is one of {', '.join(_INNER)}",
            )  # fmt: skip
        return word

    def _dscp(self, setting: syntax.ClassSetting | None) -> tuple[int, ...]:
        if setting is None:
            return ()
        found = value_set(setting.value, values.DSCP, self.scope, self.findings)
        if not isinstance(found, Ranges):
            self.failed = True
            return ()
        return tuple(n for low, high in found.spans for n in range(low, high + 1))

    # What holds among the classes.

    def _named_once(self, nodes: Sequence[syntax.LinkClass]) -> None:
        first: dict[str, syntax.LinkClass] = {}
        for node in nodes:
            other = first.setdefault(node.name.text, node)
            if other is not node:
                self._error(
                    "E012", f"there are two classes named `{node.name.text}`", node.name.span,
                    notes=(("the first one is here", other.name.span),),
                )  # fmt: skip

    def _guarantees(self, rate: int, classes: Sequence[LinkClass]) -> None:
        total = sum(one.least for one in classes)
        if rate and total > rate and not self.failed:
            self._error(
                "E065", f"the classes are guaranteed {rate_text(total)}, more than the link's "
                f"{rate_text(rate)}", max(classes, key=lambda one: one.least).span,
                help="what is guaranteed must fit into the rate all at once",
            )  # fmt: skip

    def _marked_once(self, classes: Sequence[LinkClass]) -> None:
        owner: dict[int, LinkClass] = {}
        for one in classes:
            for dscp in one.dscp:
                other = owner.setdefault(dscp, one)
                if other is not one:
                    self._error(
                        "E012", f"`{other.name}` has packets with dscp "
                        f"{values.DSCP.text(dscp)} already", one.span,
                    )  # fmt: skip
                    break

    def _otherwise(self, classes: Sequence[LinkClass]) -> int:
        """The number of the class for all else: the one of least priority if the link does not say."""
        node = self._one(syntax.LinkOtherwise, "otherwise", "")
        if not classes:
            return 0
        if node is None:
            return max(reversed(classes), key=lambda one: one.priority).number
        found = next((one for one in classes if one.name == node.name.text), None)
        if found is None:
            names = [one.name for one in classes]
            self._error(
                "E010", f"the link has no class `{node.name.text}`", node.name.span,
                help=did_you_mean(node.name.text, names) or f"it has {', '.join(names)}",
            )  # fmt: skip
        return 0 if found is None else found.number
