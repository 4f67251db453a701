"""How packets get to Python and come back: the chains around a policy's queues.

A class with actions that nftables cannot say writes its number into the class bits of the
mark and goes to `to_python`. That chain asks whether the runtime is alive: its sign of life,
a packet to the loopback with a mark of its own, renews an element that ends by itself
two seconds later. So it is the kernel that notices a runtime that was killed, stopped or
hangs, and lets packets by. Whoever comes back has clear class bits; the base chain right
behind, `settle`, finds those that nobody served, counts them, and lets them pass or drops
them as the policy says. It is also where a verdict lands that is the kernel's to give
(`reject`) or to remember (`once per connection`, in bits of the connection's mark).

Queues have numbers that follow from what is done in Python: another handler is another
queue, so that a change of the rules and of the workers behind them is one step.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Final

from itmlang import ir, marks
from itmlang.actions import Action
from itmlang.actions.encapsulate import Decapsulate, Encapsulate
from itmlang.actions.reject import Reject
from itmlang.diagnostics import Findings
from itmlang.fields import Field
from itmlang.nft.model import (
    MANGLE,
    TRACKED,
    BaseHook,
    Chain,
    Counter,
    FlowSet,
    Queue,
    Rule,
    Ruleset,
    Table,
)
from itmlang.source import Span
from itmlang.values import Type

# A runtime that gave no sign of life for so long, in milliseconds, is passed by.
ALIVE: Final = 2000
# Where packets are on their way out of the machine, before all others at that hook.
_BEAT_PRIORITY: Final = -400
# Default numbers of queues: a policy has one of so many blocks of 16, from 4096 on.
_BLOCKS: Final = 3840
_BLOCK: Final = 16
_FIRST: Final = 4096
REJECTED: Final = marks.MOST_NUMBERS  # the number of a packet that is to be rejected
# Rules that do nothing, but for which the kernel puts fragments together before any rule. No
# packet is so short; connection tracking would have all packets of the machine tracked, which
# costs a tenth of a stream's speed and a table that may run full, so it is for hooks at
# which the first one cannot stand.
_TOGETHER: Final = "meta nfproto ipv4 meta length 0 meta l4proto udp tproxy ip to :1"
_TRACKED_TOGETHER: Final = "ct state untracked"
_MARKED: Final = "marked"  # behind a decision: the connection's packets get its mark, too

Made = Callable[..., Chain]


@dataclass
class Kept:
    """What the policies of a file took: bits of the connection's mark, from the highest down,
    numbers of queues and of tunnels."""

    queues: set[int]
    free: int = 8
    tunnels: dict[object, int] = field(default_factory=dict)

    def take(self, width: int) -> int | None:
        """The lowest bit of a field so wide, None if there is no room."""
        if width > self.free:
            return None
        self.free -= width
        return marks.CLASS_SHIFT + self.free

    def tunnel(self, way: object) -> int | None:
        """The number of a way into a tunnel or out of one, None if all are taken."""
        if way not in self.tunnels and len(self.tunnels) == marks.MOST_TUNNELS:
            return None
        return self.tunnels.setdefault(way, len(self.tunnels) + 1)

    def block(self, wanted: int, many: int) -> int | None:
        """The first queue of a block with so many free ones, from a block on; None if all are taken."""
        for block in range(wanted, wanted + _BLOCKS):
            first = _FIRST + _BLOCK * (block % _BLOCKS)
            if self.queues.isdisjoint(range(first, first + many)):
                self.queues.update(range(first, first + many))
                return first
        return None


@dataclass
class Handing:
    """What one policy hands over: its entries, by their numbers, and what it decides once.

    `deciding` are the classes whose handler decides for a connection, with the chain where
    their packets go on that were accepted; `dropping` is the chain of those that were not,
    `moved` the chains with the actions of a class, `updating` the chain that updates sets.
    """

    policy: ir.Policy
    kept: Kept
    entries: list[tuple[str, int]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    deciding: dict[str, str] = field(default_factory=dict)
    dropping: str = ""
    moved: dict[str, str] = field(default_factory=dict)
    updating: str = ""
    shift: int | None = None  # of the decisions, in the connection's mark

    def number(self, name: str, begin: int, span: Span) -> int:
        """The number of a class whose actions run in Python from one on."""
        if (name, begin) not in self.entries:
            self.entries.append((name, begin))
            self.spans.append(span)
        return self.entries.index((name, begin)) + 1

    @property
    def rejects(self) -> bool:
        """Can Python come to a reject?"""
        process = self.policy.process
        parts = process.values() if self.policy.in_python or _names_classes(self.policy) else (
            ir.handed_over(steps) for steps in process.values()
        )  # fmt: skip
        return any(
            isinstance(step.action, Reject) for part in parts for step in ir.every_step(part)
        )

    @property
    def decisions(self) -> tuple[str, ...]:
        """What handlers can decide: `accept CLASS`, `drop`, `class OTHER`; all but a drop also
        `marked`: with a mark for the connection's packets."""
        if not self.deciding:
            return ()
        plain = [f"accept {name}" for name in self.deciding]
        plain += [f"class {name}" for name in self.targets]
        return ("drop", *plain, *(f"{one} {_MARKED}" for one in plain))

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """The classes that a connection can be moved to: those that stay in the kernel."""
        policy = self.policy
        once = [
            name for name, steps in policy.process.items()
            if any(step.action.once for step in ir.every_step(steps))
        ]  # fmt: skip
        return tuple(
            name for name in policy.classes
            if once and name not in once
            and not any(step.in_python for step in policy.process.get(name, ()))
        )  # fmt: skip

    # Decisions in the connection's mark: the number of one, and a bit for "with a mark".

    @property
    def _width(self) -> int:
        return (len(self.targets) + 2).bit_length() + 1

    def _place(self) -> int:
        if self.shift is None:
            self.shift = self.kept.take(self._width)
        return marks.CLASS_SHIFT if self.shift is None else self.shift

    @property
    def field(self) -> int:
        """The bits of the connection's mark that hold this policy's decisions."""
        return ((1 << self._width) - 1) << self._place()

    def value(self, decision: str) -> int:
        """A decision as the connection's mark has it."""
        kind, *words = decision.split()
        number = {"accept": 1, "drop": 2}.get(kind) or 3 + self.targets.index(words[0])
        marked = words[-1:] == [_MARKED]
        return (number | marked << self._width - 1) << self._place()

    def lookup(self, targets: Mapping[str, str]) -> str:
        """The rule that sends packets of a connection that was decided where they belong."""
        entries = ", ".join(f"{self.value(one):#010x} : goto {to}" for one, to in targets.items())
        return f"ct mark & {self.field:#010x} vmap {{ {entries} }}"

    def restored(self, decisions: Iterable[str]) -> str:
        """The rule that gives a packet the mark that was kept for its connection."""
        listed = [f"{self.value(one):#010x}" for one in decisions]
        values = listed[0] if len(listed) == 1 else f"{{ {', '.join(listed)} }}"
        keep = f"meta mark set ct mark & {marks.ALL ^ marks.KEPT:#010x}"
        return f"ct mark & {self.field:#010x} {values} {keep}"

    def remembered(self, decision: str) -> list[str]:
        """The rules that write a decision into the connection's mark, and clear the packet's."""
        value, others = f"{self.value(decision):#010x}", marks.ALL ^ self.field
        if not decision.endswith(_MARKED):
            return [f"ct mark set ct mark & {others:#010x} | {value}", marks.with_class(0)]
        # nftables writes no mark from two others: bits of other policies go by the packet's.
        clear = f"meta mark set meta mark & {marks.ALL ^ marks.KEPT:#010x}"
        bits = [1 << n for n in range(32) if 1 << n & marks.KEPT & others]
        carry = [f"ct mark & {b:#010x} != 0 meta mark set meta mark | {b:#010x}" for b in bits]
        return [clear, *carry, f"ct mark set meta mark & {others:#010x} | {value}", clear]


def defragmented(policy: ir.Policy) -> str:
    """A rule for whose sake packets come to a policy in one piece."""
    return _TOGETHER if policy.hooks == ("prerouting",) else _TRACKED_TOGETHER


def settle(table: Table, policy: ir.Policy, handing: Handing, findings: Findings) -> None:
    """Put the chains around a policy's queues into its table, if it has packets for Python."""
    if not handing.entries and not policy.in_python:
        return
    _refuse(policy, handing, findings)
    span = handing.spans[0] if handing.spans else policy.span
    prefix = table.prefix(policy.name)
    queue = _queue(policy, handing, span, findings)
    table.queues.append(queue)

    def chain(name: str, *rules: str, hook: BaseHook | None = None, role: str = "") -> Chain:
        made = Chain(prefix + name, span, policy.name, hook, [], role)
        made.rules += [Rule(text, span) for text in rules]
        return made

    chains = []
    if policy.in_python:
        chains.append(chain("hand_over", *_tracked(policy), f"goto {prefix}to_python"))
    serving = f"{prefix}serving"
    table.sets.append(
        FlowSet(serving, policy.name, "", "serving", 0, ("mark",), ("mark",), "meta mark", 16, ALIVE, span)
    )  # fmt: skip
    numbers = range(queue.first, queue.first + queue.many)
    to_queue = f"goto {prefix}queue_{queue.first}"
    if queue.many > 1:
        entries = ", ".join(f"{n - queue.first} : goto {prefix}queue_{n}" for n in numbers)
        to_queue = f"symhash mod {queue.many} vmap {{ {entries} }}"
    # The key is 0 in all packets: what is asked is whether the element is there.
    chains.append(chain("to_python", f"meta mark & 0x00000000 != @{serving} accept", to_queue))
    for number in numbers:
        one = chain(f"queue_{number}", queue_rule(number), role="queue")
        one.number = number
        chains.append(one)
    table.counters.append(Counter(f"{prefix}unserved", "unserved", "", span, policy.name))
    unserved = f'counter name "{prefix}unserved"'
    clear = marks.with_class(0)
    end = "accept" if policy.fails_open else "drop"
    chains.append(chain("unserved", unserved, clear, end))
    chains += _returned(policy, handing, chain, prefix)
    priority = MANGLE + policy.priority
    bits = f"meta mark & {marks.CLASS_BITS:#010x}"
    bases = [
        chain(f"settle_{hook}", f"{bits} != 0 goto {prefix}settle",
              hook=BaseHook(hook, priority), role="settle")
        for hook in policy.hooks
    ]  # fmt: skip
    beat = chain(
        "beat", f"meta mark {marks.BEAT | queue.first:#010x} update @{serving} {{ meta mark & 0x00000000 }} drop",
        hook=BaseHook("output", _BEAT_PRIORITY), role="beat",
    )  # fmt: skip
    # Of equal priorities the kernel runs first what comes last: these stand behind the policy.
    first = next(n for n, c in enumerate(table.chains) if c.policy == policy.name)
    table.chains[first:first] = [*bases, beat]
    table.chains += chains


def _returned(policy: ir.Policy, handing: Handing, chain: Made, prefix: str) -> list[Chain]:
    """Where packets go that come back with a number: decided, to be rejected, or not served."""
    entries, chains = [], []
    clear = marks.with_class(0)
    for number, decision in enumerate(handing.decisions, len(handing.entries) + 1):
        kind, *words = decision.split()
        # Classes may be called `x` and `x_marked`: what is theirs comes last.
        name = "_".join(("remember", *words[1:], kind, *words[:1]))
        match kind:
            case "accept":
                onward = handing.deciding[words[0]]
            case "class":
                onward = handing.moved[words[0]]
            case _:
                onward = handing.dropping
        chains.append(chain(name, *handing.remembered(decision), f"goto {onward}"))
        entries.append(f"{number << marks.CLASS_SHIFT:#010x} : goto {prefix}{name}")
    if handing.rejects:
        chains.append(chain("rejected", clear, *Reject().ending))
        entries.append(f"{REJECTED << marks.CLASS_SHIFT:#010x} : goto {prefix}rejected")
    late = set(handing.deciding) if handing.updating else set()
    if late:
        # What the kernel was to do behind the handler.
        chains.append(chain("undecided", f"jump {handing.updating}", f"goto {prefix}unserved"))
    names = [name for name, _ in handing.entries]
    if policy.in_python:
        names = [""] * (len(TRACKED) if policy.tracks else 1)
    # Numbers that are none of ours are somebody else's bits.
    entries += [
        f"{number << marks.CLASS_SHIFT:#010x} : goto {prefix}{'undecided' if name in late else 'unserved'}"
        for number, name in enumerate(names, 1)
    ]
    bits = f"meta mark & {marks.CLASS_BITS:#010x}"
    chains.append(chain("settle", f"{bits} vmap {{ {', '.join(sorted(entries))} }}"))
    return chains


def _tracked(policy: ir.Policy) -> list[str]:
    """Rules that carry over what connection tracking says."""
    if not policy.tracks:
        steps = (step for steps in policy.process.values() for step in ir.every_step(steps))
        together = any(step.action.defragments for step in steps)
        return [*([defragmented(policy)] if together else []), marks.with_class(1)]
    return [
        f"ct state {state} {f'ct direction {direction} ' if direction else ''}{marks.with_class(number)}"
        for number, (state, direction) in enumerate(TRACKED, 1)
    ]


def _queue(policy: ir.Policy, handing: Handing, span: Span, findings: Findings) -> Queue:
    given = policy.queueing
    made = Queue(
        policy.name, given.first or 0, given.number, given.length, given.buffer, given.copy,
        policy.fails_open, policy.in_python, tuple(handing.entries), handing.decisions,
        _calls(policy), span, "prerouting" in policy.hooks and _does(policy, handing, Encapsulate),
        _does(policy, handing, Decapsulate), handing.field if handing.deciding else 0,
    )  # fmt: skip
    part = zlib.crc32(_told(policy, made).encode())
    made = replace(made, part=part)
    if given.first is not None:
        return made
    first = handing.kept.block(part % _BLOCKS, made.many)
    if first is None:
        findings.error("E062", "no queue is left for this policy", span)
        return made
    return replace(made, first=first)


def _does(policy: ir.Policy, handing: Handing, kind: type[Action]) -> bool:
    """Does Python do an action of a kind?"""
    process = policy.process
    parts = process.values() if policy.in_python else (process[n][b:] for n, b in handing.entries)
    return any(isinstance(step.action, kind) for part in parts for step in ir.every_step(part))


def _calls(policy: ir.Policy) -> tuple[tuple[str, Span], ...]:
    """The handlers of a policy, each with the first place that names it."""
    found: dict[str, Span] = {}
    for steps in policy.process.values():
        for step in ir.every_step(steps):
            if step.action.handler:
                found.setdefault(step.action.handler, step.span)
    return tuple(found.items())


def _told(policy: ir.Policy, queue: Queue) -> str:
    """All that Python does of a policy, as text: the same text, the same queues."""
    if policy.in_python:
        return repr(_bare((queue, policy)))
    process = policy.process
    parts = process if _names_classes(policy) else {
        name: process[name][begin:] for name, begin in queue.entries
    }  # fmt: skip
    return repr(_bare((queue, parts)))


def _bare(node: object) -> object:
    """What a node says, without its places."""
    match node:
        case Span():
            return ""
        case Field() | Type():
            return node.name
        case tuple() | list():
            return [_bare(one) for one in node]
        case frozenset():
            return sorted(repr(_bare(one)) for one in node)
        case dict():
            return [(name, _bare(one)) for name, one in node.items()]
    if is_dataclass(node):
        return type(node).__name__, [_bare(getattr(node, one.name)) for one in fields(node)]
    return node


def _names_classes(policy: ir.Policy) -> bool:
    """Can a handler give a packet a class, whose actions Python does then?"""
    return any(
        step.action.handler and not step.action.once
        for steps in policy.process.values()
        for step in ir.every_step(steps)
    )


def queue_rule(number: int) -> str:
    """nftables' own rule to a queue; where nobody listens, packets go past it."""
    return f"queue flags bypass to {number}"


def for_xt(ruleset: Ruleset) -> Ruleset:
    """The ruleset for a kernel without nftables' own `queue`.

    Its chains to queues are empty: their rule, a target of xtables, cannot be said as text.
    """
    return replace(
        ruleset,
        tables=tuple(
            replace(
                table,
                chains=[
                    replace(chain, rules=[]) if chain.role == "queue" else chain
                    for chain in table.chains
                ],
            )
            if table.queues
            else table
            for table in ruleset.tables
        ),
    )


def _refuse(policy: ir.Policy, handing: Handing, findings: Findings) -> None:
    numbers = len(handing.entries) + len(handing.decisions) + handing.rejects
    if numbers > marks.MOST_NUMBERS:
        entries = len(handing.entries)
        many = f"{entries} {'class' if entries == 1 else 'classes'} for Python"
        more = f" and {len(handing.decisions)} things to decide" if handing.decisions else ""
        findings.error(
            "E062", f"the mark has room for {marks.MOST_NUMBERS} numbers, and the policy needs "
            f"{numbers}: {many}{more}", handing.spans[-1],
            help="split it into several policies",
        )  # fmt: skip
    if handing.deciding and handing.shift is None:
        findings.error(
            "E062", "the connection's mark has no room for one more policy's decisions",
            handing.spans[0], help="let fewer policies of this file decide once per connection",
        )  # fmt: skip
