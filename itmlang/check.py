"""Instances -> checked policies: names, types, units, conflicts.

Each instance is checked by itself, statement by statement; all errors are
collected. What comes out is `ir.Policy`, in which nothing can be wrong any more
but what only the simplifier (can it ever match?) or the kernel can tell.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Final, TypeVar

from itmlang import ir, syntax, values
from itmlang.actions import ACTIONS, Action
from itmlang.actions.call import Call
from itmlang.actions.drop import Drop
from itmlang.actions.dscp import SetDscp
from itmlang.actions.encapsulate import Encapsulate
from itmlang.actions.priority import Priority
from itmlang.actions.route import RouteBy
from itmlang.conditions import COMPARED, Conditions, flow_tests
from itmlang.control import Controller, Timer
from itmlang.controlling import Around, entries
from itmlang.diagnostics import Findings, did_you_mean
from itmlang.evaluate import Parameter, Scope, one_address, single, value_set
from itmlang.fields import EGRESS, FIELDS, HOOKS, INGRESS, INTEREST_FIELDS, Field, hook_kind
from itmlang.links import Link
from itmlang.overlaying import policy as overlay_policy
from itmlang.overlaying import ways
from itmlang.overlays import PRIORITY, Overlay, via
from itmlang.rates import advice, fits, period
from itmlang.resolve import DEFAULT_SIZE, Instance, Program, check_name, size_options
from itmlang.shaping import links
from itmlang.source import Span
from itmlang.tunnelling import Inward, inward, outward, why_not
from itmlang.values import IPV4, PARAMETER_TYPES, Names, Type, ValueSet
from itmlang.workers import refuse

DEFAULT_TIMEOUT: Final = 5 * 60_000
# nft packs the types of a key into 32 bits, six for each field; the kernel has
# sixteen 4-byte registers for it (NFT_REG32_COUNT).
MOST_KEY_FIELDS: Final = 5
LARGEST_KEY: Final = 64
HIGHEST_PRIORITY: Final = 1_000_000
# NF_LOG_PREFIXLEN, include/net/netfilter/nf_log.h, with its end and our blank.
LONGEST_PREFIX: Final = 126
# What `limit` and `record` have where the policy says nothing.
DEFAULT_BURST: Final = 5
DEFAULT_RECORDS: Final = (10, 1)
DEFAULT_GROUP: Final = 1
FULL_PACKET: Final = 1500  # bytes, as an Ethernet carries them

# Words of the language that later versions will know as actions.
_LATER: Final = frozenset({"send", "proxy"})
# Class numbers of a policy fit into the bits of `model.CLASS_BITS`, workers on a machine.
MOST_QUEUES: Final = 16
LARGEST_QUEUE: Final = 65_535  # the greatest number of one, and the packets that wait in it
LEAST_COPY: Final = 128  # bytes: the longest IPv4 header and TCP's, or IPv6's with extensions
LARGEST_PACKET: Final = 65_535
LARGEST_BUFFER: Final = 1 << 30

_QUEUE_OPTIONS: Final[Mapping[str, tuple[Type, int, int]]] = {
    "queues": (values.NUMBER, 1, MOST_QUEUES),
    "length": (values.PACKETS, 1, LARGEST_QUEUE),
    "buffer": (values.BYTES, 1 << 16, LARGEST_BUFFER),
    "copy": (values.BYTES, LEAST_COPY, LARGEST_PACKET),
    "from": (values.NUMBER, 0, LARGEST_QUEUE),
}

# Actions with a form of their own.
_WRITTEN: Final[Mapping[type[Action], str]] = {
    Call: 'write `call "module:function"`',
    Encapsulate: "write `encapsulate to 192.0.2.1`",
    Priority: "write `priority LINK.CLASS`",
    RouteBy: "write `route by OVERLAY`",
}

Node = TypeVar("Node", bound=syntax.Statement)


def check(
    program: Program, overlays: Mapping[str, Overlay | None], findings: Findings
) -> tuple[tuple[ir.Policy, ...], tuple[Link, ...]]:
    """The policies that are to be loaded, in order, those of overlays last, and the links.

    Errors and warnings go to `findings`; policies with errors are left out.
    """
    named = links(program.links, _probed(program), Scope(program.sets), findings)
    checked = [
        check_instance(one, program.sets, findings, named, overlays) for one in program.instances
    ]
    checked += [overlay_policy(one) for one in overlays.values() if one is not None]
    for policy in program.templates:
        check_instance(Instance(policy.name, policy), program.sets, findings, named, overlays)
    policies = tuple(policy for policy in checked if policy is not None)
    if not findings.failed:
        _check_sets(program, policies, findings)
        _check_queues(policies, findings)
        _check_written(policies, findings)
        _check_ingress(policies, named.values(), findings)
    return policies, tuple(link for link in named.values() if link is not None)


def _probed(program: Program) -> set[str]:
    """The links whose rate some controller writes by round trips."""
    return {
        entry.written.text.removesuffix(".rate")
        for policy in program.policies.values()
        for statement in policy.statements
        if isinstance(statement, syntax.Control)
        for entry in statement.entries
        if isinstance(entry, syntax.Controller) and entry.measure.of is not None
    }


def check_instance(
    instance: Instance,
    sets: Mapping[str, ir.AnySet],
    findings: Findings,
    links: Mapping[str, Link | None] | None = None,
    overlays: Mapping[str, Overlay | None] | None = None,
) -> ir.Policy | None:
    """One instance of a policy, None if something is wrong with it."""
    one = _Check(instance, sets, findings, links or {}, overlays or {})
    if instance.use is None:
        return one.policy()
    with findings.because(f"`{instance.name.text}` uses it here", instance.use.span):
        return one.policy()


def _check_sets(program: Program, policies: Iterable[ir.Policy], findings: Findings) -> None:
    """Warn about sets that are asked but never filled; refuse what no table can share."""
    standing: dict[ir.LearnedSet, ir.Policy] = {}
    for policy in policies:
        for one in policy.learned:
            other = standing.setdefault(one, policy)
            if policy is not other and (policy.in_python or other.in_python):
                findings.error(
                    "E034", f"`{policy.name}` and `{other.name}` cannot share `@{one.name}`: "
                    "what a policy learns in Python stays there", policy.span,
                    help="leave `run python` out",
                )  # fmt: skip
            if _egress(policy) != _egress(other):
                findings.error(
                    "E016", f"`{policy.name}` and `{other.name}` cannot share `@{one.name}`: "
                    "nftables has egress in tables of another family", policy.span,
                    help="let one policy at postrouting do what the one at egress does",
                )  # fmt: skip
    filled = {c.set for p in policies for c in p.updates if isinstance(c, ir.Addition)}
    for policy in policies:
        for leaf in (leaf for c in policy.conditions for leaf in ir.leaves(c)):
            if isinstance(leaf, ir.Member) and leaf.set.known is None and leaf.set not in filled:
                findings.warning(
                    "W012", f"nothing is ever added to `@{leaf.set.name}`", leaf.span,
                    help=f"some policy's `update` should `add … to @{leaf.set.name}`",
                )  # fmt: skip


def _check_queues(policies: Iterable[ir.Policy], findings: Findings) -> None:
    """Refuse two policies that name the same queue."""
    owner: dict[int, ir.Policy] = {}
    for policy in policies:
        for number in policy.queueing.given if policy.hands_over else ():
            other = owner.setdefault(number, policy)
            if other is not policy:
                findings.error(
                    "E012", f"`{policy.name}` and `{other.name}` both take the queue {number}",
                    policy.queueing.span, help="leave `from` out: itm finds free ones",
                )  # fmt: skip
                break


def _check_written(policies: Iterable[ir.Policy], findings: Findings) -> None:
    """Refuse two policies that control the same link."""
    first: dict[str, Controller] = {}
    for one in (one for policy in policies for one in policy.controllers if one.link):
        other = first.setdefault(one.written, one)
        if other is not one:
            findings.error(
                "E012", f"`{one.policy}` and `{other.policy}` both write `{one.written}`",
                one.span, notes=(("the first one is here", other.span),),
            )  # fmt: skip


def _check_ingress(
    policies: Iterable[ir.Policy], named: Iterable[Link | None], findings: Findings
) -> None:
    """Refuse to ask for packets behind what takes them away."""
    for policy in policies:
        for hook in policy.hooks:
            kind, _, device = hook.partition(" ")
            for link in named:
                if kind == INGRESS and link and link.ingress and link.fits(device.strip('"')):
                    findings.error(
                        "E016", f"`{policy.name}` sees nothing at {hook}: the link `{link.name}` "
                        "takes it before", policy.at, notes=(("the link is here", link.at),),
                        help="stand at prerouting: there it comes when the link lets it go",
                    )  # fmt: skip


def _egress(policy: ir.Policy) -> bool:
    return any(hook_kind(hook) == EGRESS for hook in policy.hooks)


class _Check:
    """The check of one policy."""

    def __init__(
        self,
        instance: Instance,
        sets: Mapping[str, ir.AnySet],
        findings: Findings,
        links: Mapping[str, Link | None],
        overlays: Mapping[str, Overlay | None],
    ) -> None:
        self.instance = instance
        self.links, self.overlays = links, overlays
        self.node = instance.policy
        self.findings = findings
        self.scope = Scope(sets)
        self.flows: dict[str, ir.Flow] = {}
        self.at = self.node.name.span  # where the hooks are
        self.asked: set[str] = set()  # flows of which something is asked
        self.limited: set[str] = set()  # flows that a limit keeps buckets for

    def policy(self) -> ir.Policy | None:
        errors_before = len(self.findings.diagnostics)
        check_name(self.node.name, self.findings)
        check_name(self.instance.name, self.findings)
        complete = self._parameters()
        hooks = self._hooks()
        priority = self._priority()
        conditions = Conditions(hooks, self.flows, self.scope, self.findings, priority)
        interest = self._interest(conditions)
        for flow in self._all(syntax.Flow):
            self._flow(flow, conditions)
        rules = self._rules(conditions)
        counts, notes = self._log(conditions)
        process = self._process({rule.name for rule in rules}, hooks, conditions)
        routes = self._routes(process, priority)
        updates = self._updates(conditions)
        run, fails_open = self._placement()
        queueing = self._queueing()
        controllers, timers = self._control(tuple(dict.fromkeys(rule.name for rule in rules)))
        self._unused(counts, complete and not self._failed(errors_before))
        if not complete or self._failed(errors_before):
            return None
        policy = ir.Policy(
            name=self.instance.name.text,
            hooks=hooks,
            at=self.at,
            priority=priority,
            interest=interest,
            flows=tuple(self.flows.values()),
            rules=rules,
            counts=counts,
            notes=notes,
            process=process,
            updates=updates,
            span=self.instance.use.span if self.instance.use is not None else self.node.span,
            parameters={
                p.name.text: value.span.text
                for p in self.node.parameters
                if (value := self._value_of(p)) is not None
            },
            in_python=run is not None,
            fails_open=fails_open,
            queueing=queueing,
            controllers=controllers,
            timers=timers,
            tunnels_in_python=any(one.in_python for one in routes),
            routes=routes,
        )
        self._python(policy, run)
        return None if self._failed(errors_before) else policy

    def _failed(self, before: int) -> bool:
        """Was an error found since there were `before` findings?"""
        return any(d.is_error for d in self.findings.diagnostics[before:])

    # Statements of a kind.

    def _all(self, kind: type[Node]) -> list[Node]:
        return [s for s in self.node.statements if isinstance(s, kind)]

    def _one(self, kind: type[Node], keyword: str) -> Node | None:
        """The policy's only statement of a kind; that of a `use` is in place of it."""
        if self.instance.use is not None and kind in (syntax.At, syntax.Priority):
            own = [s for s in self.instance.use.statements if isinstance(s, kind)]
            if own:
                return self._first(own, keyword)
        return self._first(self._all(kind), keyword)

    def _first(self, found: list[Node], keyword: str) -> Node | None:
        for extra in found[1:]:
            self.findings.error(
                "E013",
                f"a policy has one `{keyword}` at most",
                extra.span,
                notes=(("the first one is here", found[0].span),),
            )
        return found[0] if found else None

    def _new_names(self, names: Iterable[syntax.Name], what: str) -> list[syntax.Name]:
        """The names, each checked and reported when it comes twice."""
        first: dict[str, syntax.Name] = {}
        for name in names:
            check_name(name, self.findings)
            if name.text in first:
                self.findings.error(
                    "E012",
                    f"there are two {what} named `{name.text}`",
                    name.span,
                    notes=(("the first one is here", first[name.text].span),),
                )
            first.setdefault(name.text, name)
        return list(first.values())

    # Head.

    def _value_of(self, parameter: syntax.Parameter) -> syntax.Value | None:
        return self.instance.arguments.get(parameter.name.text, parameter.default)

    def _parameters(self) -> bool:
        """Fill the scope; False if a parameter has no value."""
        complete = True
        self._new_names((p.name for p in self.node.parameters), "parameters")
        outside = Scope(self.scope.sets)
        for node in self.node.parameters:
            type = PARAMETER_TYPES.get(node.type.text)
            if type is None:
                self.findings.error(
                    "E010",
                    f"there is no type `{node.type.text}`",
                    node.type.span,
                    help=did_you_mean(node.type.text, PARAMETER_TYPES),
                )
                continue
            value = self._value_of(node)
            complete = complete and value is not None
            given = [v for v in (node.default, value) if v is not None]
            found, named = None, None
            for one in dict.fromkeys(given):  # a default is checked, used or not
                named = outside.named_set(one)
                if isinstance(named, ir.LearnedSet):
                    found = None
                    named = self._learned_argument(node, type, one, named)
                else:
                    found = value_set(one, type, outside, self.findings)
                    named = named if found is not None else None
                    self._within_bounds(node, type, one, found, outside)
            self.scope.parameters[node.name.text] = Parameter(type, found, named)
        return complete

    def _learned_argument(
        self, node: syntax.Parameter, type: Type, value: syntax.Value, named: ir.LearnedSet
    ) -> ir.LearnedSet | None:
        """The set if it can be the parameter's value, None after an error."""
        if named.type.name != type.name:
            self.findings.error(
                "E038", f"`@{named.name}` holds {named.type.name} values, "
                f"but `{node.name.text}` is {type.article} {type.name}", value.span,
            )  # fmt: skip
        elif node.bounds is not None:
            self.findings.error(
                "E039", f"`{node.name.text}` has bounds, and nobody knows what "
                f"`@{named.name}` will learn", value.span,
                notes=(("its bounds are here", node.bounds.span),),
            )  # fmt: skip
        else:
            return named
        return None

    def _within_bounds(
        self,
        node: syntax.Parameter,
        type: Type,
        value: syntax.Value,
        found: ValueSet | None,
        scope: Scope,
    ) -> None:
        if node.bounds is None:
            return
        bounds = value_set(node.bounds, type, scope, self.findings)
        if found is None or bounds is None:
            return
        if isinstance(found, Names):
            self.findings.error(
                "E039", "the values of an interface have no bounds", node.bounds.span
            )
        elif values.intersection(found, bounds) != found:
            self.findings.error(
                "E039",
                f"`{node.name.text}` is {value.span.text}, outside of {node.bounds.span.text}",
                value.span,
                notes=(("its bounds are here", node.bounds.span),),
            )

    def _hooks(self) -> tuple[str, ...]:
        node = self._one(syntax.At, "at")
        if node is None:
            self.findings.error(
                "E015",
                f"the policy `{self.node.name.text}` does not say where it stands",
                self.node.name.span,
                help="add a line such as `at postrouting`",
            )
            return ()
        self.at = node.span
        hooks: list[str] = []
        for hook in node.hooks:
            kind, _, device = hook.text.partition(" ")
            if kind not in (INGRESS, *HOOKS, EGRESS):
                self.findings.error(
                    "E010", f"there is no hook `{kind}`", hook.span,
                    help=did_you_mean(kind, (INGRESS, *HOOKS, EGRESS)),
                )  # fmt: skip
            elif device and kind not in (INGRESS, EGRESS):
                self.findings.error("E016", f"{kind} is a hook of all devices", hook.span)
            elif hook.text in hooks:
                self.findings.error("E012", f"`{hook.text}` is named twice", hook.span)
            elif kind in (INGRESS, EGRESS):
                hooks += [hook.text] if self._device(hook, kind, device.strip('"')) else []
            else:
                hooks.append(hook.text)
        if len(hooks) > 1 and any(hook_kind(hook) == EGRESS for hook in hooks):
            self.findings.error(
                "E016", "egress stands alone: nftables has it in tables of another family",
                node.span, help="write a policy of its own for egress, or use postrouting",
            )  # fmt: skip
        # In the order in which a packet meets them.
        order = (INGRESS, *HOOKS, EGRESS)
        return tuple(sorted(hooks, key=lambda hook: order.index(hook_kind(hook))))

    def _device(self, hook: syntax.Name, kind: str, device: str) -> bool:
        if not device:
            self.findings.error(
                "E016", f"{kind} needs a device", hook.span, help=f'write `{kind} "eth0"`'
            )
            return False
        found = value_set(
            syntax.Text(hook.span, device), values.INTERFACE, self.scope, self.findings
        )
        if found is not None and device.endswith("*"):
            self.findings.error("E016", f"{kind} is of one device, not of a pattern", hook.span)
        return found is not None

    def _priority(self) -> int:
        node = self._one(syntax.Priority, "priority")
        if node is None:
            return 0
        number = single(node.value, values.PRIORITY, self.scope, self.findings)
        if number is not None and number > HIGHEST_PRIORITY:
            self.findings.error(
                "E023",
                f"a priority lies between -{HIGHEST_PRIORITY} and {HIGHEST_PRIORITY}",
                node.value.span,
            )
        return -(number or 0) if node.negative else number or 0

    # Interest and conditions.

    def _interest(self, conditions: Conditions) -> ir.And:
        node = self._one(syntax.Interest, "interest")
        terms = self._interest_terms(node, conditions)
        use = self.instance.use
        if use is not None:
            own = [s for s in use.statements if isinstance(s, syntax.Interest)]
            # Of the place where it is written, so without the template's parameters.
            sets = Scope(self.scope.sets)
            outside = Conditions(conditions.hooks, {}, sets, self.findings, conditions.priority)
            terms += self._interest_terms(self._first(own, "interest"), outside)
            node = node or next(iter(own), None)
        return ir.And(tuple(terms), node.span if node is not None else self.node.name.span)

    def _interest_terms(
        self, node: syntax.Interest | None, conditions: Conditions
    ) -> list[ir.Condition]:
        terms: list[ir.Condition] = []
        known = {name: FIELDS[name] for name in INTEREST_FIELDS}
        for line in node.lines if node is not None else ():
            field = conditions.field(line.field, known)
            if field is None or not conditions.met(field, line.field.span):
                continue
            test = conditions.test(field, line.value, line.field.span.to(line.value.span))
            if test is not None:
                terms.append(ir.Not(test, line.span) if line.excluded else test)
        return terms

    # Flows.

    def _flow(self, node: syntax.Flow, conditions: Conditions) -> None:
        check_name(node.name, self.findings)
        if node.name.text in self.flows:
            first = self.flows[node.name.text].span
            self.findings.error(
                "E012",
                f"there are two flows named `{node.name.text}`",
                node.name.span,
                notes=(("the first one is here", first),),
            )
            return
        known = {name: field for name, field in FIELDS.items() if field.key}
        key: list[Field] = []
        for name in node.key:
            field = conditions.field(name, known)
            if field is None or not conditions.met(field, name.span):
                continue
            if field in key:
                self.findings.error("E012", f"`{name.text}` is named twice", name.span)
            key.append(field)
        if len(key) > 1 and FIELDS["connection"] in key:
            self.findings.error(
                "E032", "`connection` stands alone in a key: it has all the fields", node.span
            )
        if len(key) > MOST_KEY_FIELDS or sum(f.key_size for f in key) > LARGEST_KEY:
            self.findings.error(
                "E035",
                f"the key is too large for nftables: at most {MOST_KEY_FIELDS} fields and "
                f"{LARGEST_KEY} bytes",
                node.key[0].span.to(node.key[-1].span),
                help="addresses and interfaces take 16 bytes, all other fields 4",
            )
        given = size_options(node.options, self.scope, self.findings)
        self.flows[node.name.text] = ir.Flow(
            node.name.text, tuple(key), given.get("timeout", DEFAULT_TIMEOUT),
            given.get("max", DEFAULT_SIZE), node.span,
        )  # fmt: skip

    # The sections.

    def _rules(self, conditions: Conditions) -> tuple[ir.ClassRule, ...]:
        node = self._one(syntax.Classify, "classify")
        rules: list[ir.ClassRule] = []
        otherwise: ir.ClassRule | None = None
        # A handler can give a packet any class, those that no condition leads to, too.
        named = any(isinstance(one, syntax.Call) for one in self._actions())
        for rule in node.rules if node is not None else ():
            check_name(rule.name, self.findings)
            if otherwise is not None and not named:
                self.findings.warning(
                    "W001",
                    f"`{rule.name.text}` is never reached: `{otherwise.name}` takes all packets",
                    rule.span,
                    notes=(("it has no condition", otherwise.span),),
                )
            condition = None
            if rule.condition is not None:
                condition = conditions.condition(rule.condition)
                self.asked |= {test.flow.name for test in flow_tests(condition)}
                if condition is None:
                    # Kept, so that `process` is checked against all the names.
                    condition = ir.Or((), rule.span)
            made = ir.ClassRule(rule.name.text, condition, rule.span)
            rules.append(made)
            if condition is None and otherwise is None:
                otherwise = made
        return tuple(rules)

    def _log(
        self, conditions: Conditions
    ) -> tuple[tuple[ir.Count, ...], tuple[ir.Sample | ir.Record, ...]]:
        node = self._one(syntax.Log, "log")
        counts: dict[str, ir.Count] = {}
        notes: list[ir.Sample | ir.Record] = []
        for entry in node.entries if node is not None else ():
            match entry:
                case syntax.Count():
                    flow = self._known_flow(entry.flow)
                    if flow is not None and flow.name in counts:
                        self.findings.error("E012", f"`{flow.name}` is counted twice", entry.span)
                    elif flow is not None:
                        counts[flow.name] = ir.Count(flow, entry.span)
                case syntax.Sample():
                    notes += self._sample(entry)
                case syntax.Record():
                    notes += self._record(entry, conditions)
        return tuple(counts.values()), tuple(notes)

    def _known_flow(self, name: syntax.Name) -> ir.Flow | None:
        flow = self.flows.get(name.text)
        if flow is None:
            self.findings.error(
                "E010", f"there is no flow `{name.text}`", name.span,
                help=did_you_mean(name.text, self.flows)
                or f"declare it, as in `flow {name.text} by saddr`",
            )  # fmt: skip
        return flow

    def _sample(self, node: syntax.Sample) -> list[ir.Sample]:
        one = single(node.one, values.NUMBER, self.scope, self.findings)
        many = single(node.many, values.NUMBER, self.scope, self.findings)
        group = DEFAULT_GROUP
        if node.group is not None:
            given = single(node.group, values.NUMBER, self.scope, self.findings)
            if given is not None and given > 65_535:
                self.findings.error("E023", "the greatest group is 65535", node.group.span)
            group = given or 0
        if one is None or many is None:
            return []
        if one != 1 or many == 0:
            self.findings.error(
                "E023", "a sample is one packet of so many", node.span,
                help="write `sample 1 in 1000`",
            )  # fmt: skip
            return []
        return [ir.Sample(many, group, node.span)]

    def _record(self, node: syntax.Record, conditions: Conditions) -> list[ir.Record]:
        text = node.prefix.text
        amount, seconds = DEFAULT_RECORDS
        if node.rate is not None:
            rate = conditions.rate(node.rate)
            if rate is None:
                return []
            if rate[0] is not values.PACKET_RATE:
                self.findings.error(
                    "E020", "records are counted, not measured: write `at most 10/s`",
                    node.rate.span,
                )  # fmt: skip
                return []
            amount, seconds, _ = period(rate[1], False)
        prefix = text if text.endswith(" ") else text + " "
        if not text or len(prefix.encode()) > LONGEST_PREFIX or not prefix.isprintable():
            self.findings.error(
                "E045", f"the prefix needs 1 to {LONGEST_PREFIX - 1} printable characters",
                node.prefix.span,
            )  # fmt: skip
            return []
        if "$" in text:
            self.findings.error(
                "E045", "nftables would take `$` for the beginning of a variable's name",
                node.prefix.span,
            )  # fmt: skip
            return []
        return [ir.Record(prefix, amount, seconds, node.span)]

    def _process(
        self, classes: set[str], hooks: tuple[str, ...], conditions: Conditions
    ) -> dict[str, ir.Steps]:
        node = self._one(syntax.Process, "process")
        blocks = node.blocks if node is not None else ()
        self._new_names((block.name for block in blocks), "blocks")
        process: dict[str, ir.Steps] = {}
        for block in blocks:
            if block.name.text not in classes:
                self.findings.error(
                    "E010", f"there is no class `{block.name.text}`", block.name.span,
                    help=did_you_mean(block.name.text, classes),
                )  # fmt: skip
            steps = process[block.name.text] = self._steps(block.actions, hooks, conditions)
            once = next(
                (n for n, s in enumerate(steps) if isinstance(s, ir.Step) and s.action.once),
                len(steps),
            )
            later = ir.python_part(steps, once + 1)
            if once < len(steps) and later < len(steps):
                self.findings.error(
                    "E034", "what follows on `once per connection` is done by the kernel, "
                    "and this needs Python", steps[later].span,
                    notes=(("the first packet is shown here", steps[once].span),),
                )  # fmt: skip
        return process

    def _steps(
        self,
        nodes: Iterable[syntax.ActionNode],
        hooks: tuple[str, ...],
        conditions: Conditions,
    ) -> ir.Steps:
        steps: list[ir.Step | ir.Limit] = []
        for node in nodes:
            if isinstance(node, syntax.Limit):
                limit = self._limit(node, hooks, conditions)
                steps += [limit] if limit is not None else []
                continue
            action: Action | None
            if isinstance(node, syntax.Call):
                action = self._sound(Call((node.target.text, node.once)), node.target.span)
                if node.once and not conditions.met(FIELDS["ct.state"], node.span):
                    action = None
            elif isinstance(node, syntax.Encapsulate):
                action = self._encapsulate(node)
            elif isinstance(node, syntax.IntoLink):
                action = self._into_link(node)
            elif isinstance(node, syntax.Route):
                action = self._route(node)
            else:
                action = self._action(node)
            if action is not None and self._stands(action, hooks, node.span):
                steps.append(ir.Step(action, node.span))
        self._after_verdict(steps)
        return tuple(steps)

    def _limit(
        self, node: syntax.Limit, hooks: tuple[str, ...], conditions: Conditions
    ) -> ir.Limit | None:
        otherwise: ir.Steps
        if node.otherwise is None:
            otherwise = (ir.Step(Drop(), node.span),)
        else:
            otherwise = self._steps(node.otherwise, hooks, conditions)
        flow = None
        if node.flow is not None:
            flow = self._known_flow(node.flow)
            if flow is None:
                return None
            self.limited.add(flow.name)
        rate = conditions.rate(node.rate)
        if rate is None:
            return None
        in_bytes = rate[0] is values.RATE
        if in_bytes and not conditions.weighed(node.rate.span):
            return None
        amount, seconds, _ = period(rate[1], in_bytes)
        burst: int | None = 0 if in_bytes else DEFAULT_BURST
        if node.burst is not None:
            type = values.BYTES if in_bytes else values.PACKETS
            burst = single(node.burst, type, self.scope, self.findings)
            if burst == 0 and not in_bytes:
                self.findings.error("E023", "a burst of 0 lets nothing through", node.burst.span)
        if burst is None:
            return None
        if not fits(amount, seconds, burst, in_bytes):
            self.findings.error(
                "E042", f"the kernel cannot limit to `{node.rate.span.text}`"
                + (" with this burst" if node.burst is not None else ""), node.span,
                help=advice(amount, seconds, burst, in_bytes),
            )  # fmt: skip
            return None
        if in_bytes and amount + burst < FULL_PACKET:
            self.findings.warning(
                "W013", f"no packet of more than {amount + burst} bytes passes this limit",
                node.span, help=f"a larger burst mends that: `burst {FULL_PACKET} bytes`",
            )  # fmt: skip
        for step in ir.every_step(otherwise):
            if step.action.once:
                self.findings.error(
                    "E034", "what holds for a connection cannot depend on a limit", step.span,
                    notes=(("the limit is here", node.rate.span),),
                )  # fmt: skip
        return ir.Limit(amount, seconds, in_bytes, burst, flow, otherwise, node.span)

    def _stands(self, action: Action, hooks: tuple[str, ...], span: Span) -> bool:
        """Can the action stand at all the hooks?"""
        for hook in hooks:
            if hook_kind(hook) not in action.hooks:
                self.findings.error(
                    "E037", f"`{' '.join(action.words)}` cannot stand at {hook}: {action.why}",
                    span, help=f"it can at {', '.join(action.hooks)}",
                )  # fmt: skip
                return False
        return True

    def _sound(self, action: Action, span: Span) -> Action | None:
        if action.refusal():
            self.findings.error("E023", action.refusal(), span)
            return None
        return action

    def _encapsulate(self, node: syntax.Encapsulate) -> Action | None:
        ends: list[int | None] = []
        for value in (node.target, node.source):
            if value is None:
                ends.append(None)
                continue
            found = one_address(value, self.scope, self.findings)
            if found is None:
                return None
            if found[0] != IPV4:
                self.findings.error(
                    "E023", "a tunnel's ends are IPv4 addresses (RFC 2003)", value.span
                )
                return None
            ends.append(found[1])
        return self._sound(Encapsulate(tuple(ends)), node.span)

    def _into_link(self, node: syntax.IntoLink) -> Action | None:
        name, _, part = node.target.text.partition(".")
        if name not in self.links or not part:
            classes = [f"{k}.{c.name}" for k, one in self.links.items() if one for c in one.classes]
            self.findings.error(
                "E010", f"there is no link `{name}`" if name not in self.links
                else "a class of the link is wanted", node.target.span,
                help=did_you_mean(node.target.text, classes)
                or "write `priority LINK.CLASS`, and declare the link: "
                'link wan { interface "eth0"  rate 10 mbit  class bulk { priority 1 } }',
            )  # fmt: skip
            return None
        link = self.links[name]
        if link is None:
            return None  # said at the link
        found = link.find(part)
        if found is None:
            names = [one.name for one in link.classes]
            self.findings.error(
                "E010", f"the link `{name}` has no class `{part}`", node.target.span,
                help=did_you_mean(part, names) or f"it has {', '.join(names)}",
            )  # fmt: skip
            return None
        if link.only_marks:
            return SetDscp(found.dscp[0])
        if link.ingress:
            self.findings.error(
                "E037", f"`{name}` shapes what comes in, before any policy sees it",
                node.target.span, notes=(("it says `ingress` here", link.at),),
                help="there the DSCP alone tells classes apart: `class NAME { dscp ef }`",
            )  # fmt: skip
            return None
        return Priority((link.classid(found), f"{name}.{part}", link.probe))

    def _route(self, node: syntax.Route) -> Action | None:
        name = node.overlay.text
        if name not in self.overlays:
            self.findings.error(
                "E010", f"there is no overlay `{name}`", node.overlay.span,
                help=did_you_mean(name, self.overlays)
                or "declare it: overlay mesh { self 192.0.2.1  neighbor a 192.0.2.2 … }",
            )  # fmt: skip
            return None
        return None if self.overlays[name] is None else RouteBy(name)

    def _routes(self, process: dict[str, ir.Steps], priority: int) -> tuple[Overlay, ...]:
        """The overlays that classes route by; what is done by way of each neighbour joins `process`."""
        found: dict[str, Overlay] = {}
        for steps in list(process.values()):
            for step in ir.every_step(steps):
                if not isinstance(step.action, RouteBy):
                    continue
                overlay = self.overlays[step.action.overlay]
                assert overlay is not None
                found[overlay.name] = overlay
                if step not in steps:
                    self.findings.error(
                        "E034", "`route by` cannot depend on a limit", step.span,
                        help="let the limit drop, and route what is left",
                    )  # fmt: skip
                if priority >= PRIORITY:
                    self.findings.error(
                        "E037", f"`route by` cannot stand at priority {priority}: what came out of "
                        "a tunnel could not be told there, and would circle", step.span,
                        help=f"the overlay's own policy stands at {PRIORITY}; stay below",
                    )  # fmt: skip
                process |= {via(overlay.name, one): do for one, do in ways(overlay).items()}
        if len(found) > 1:
            self.findings.error(
                "E034", "a policy routes by one overlay at most", self.node.name.span,
                help="write a policy for each",
            )  # fmt: skip
        return tuple(found.values())

    def _control(
        self, classes: tuple[str, ...]
    ) -> tuple[tuple[Controller, ...], tuple[Timer, ...]]:
        node = self._one(syntax.Control, "control")
        if node is None:
            return (), ()
        known = {p.name.text: p for p in self.node.parameters}
        around = Around(
            policy=self.instance.name.text,
            classes=classes,
            flows=tuple(self.flows),
            links=self.links,
            parameters={name: (known[name], one) for name, one in self.scope.parameters.items()},
            scope=self.scope,
        )
        return entries(node, around, self.findings)

    def _action(self, node: syntax.Action) -> Action | None:
        kind = next((a for a in ACTIONS if a.words == node.words), None)
        if kind is None:
            written = " ".join(node.words)
            known = [" ".join(a.words) for a in ACTIONS]
            later = node.words[0] in _LATER
            self.findings.error(
                "E010",
                f"`{written}` is not in this version yet" if later
                else f"there is no action `{written}`", node.span,
                help="" if later else values.unit_help(written) or did_you_mean(written, known),
            )  # fmt: skip
            return None
        if kind in _WRITTEN:
            self.findings.error(
                "E001", f"unexpected end of `{node.words[0]}`", node.span,
                help=_WRITTEN[kind],
            )  # fmt: skip
            return None
        if kind.operand is None or node.value is None:
            return kind()
        value: object
        if kind.operand is values.ADDRESS:
            value = one_address(node.value, self.scope, self.findings)
        else:
            value = single(node.value, kind.operand, self.scope, self.findings)
        if value is None:
            return None
        return self._sound(kind(value), node.value.span)

    # Updates.

    def _updates(self, conditions: Conditions) -> tuple[ir.Addition | ir.Removal, ...]:
        node = self._one(syntax.Update, "update")
        updates: list[ir.Addition | ir.Removal] = []
        for change in node.changes if node is not None else ():
            condition = None
            if change.condition is not None:
                condition = conditions.condition(change.condition)
            field = conditions.field(change.field, COMPARED)
            if field is None or not conditions.met(field, change.field.span):
                continue
            learned = conditions.learned(change.set, field)
            if learned is None or (condition is None and change.condition is not None):
                continue
            if isinstance(change, syntax.Removal):
                updates.append(ir.Removal(field, learned, condition, change.span))
                continue
            timeout = None
            if change.duration is not None:
                timeout = single(change.duration, values.DURATION, self.scope, self.findings)
                if timeout == 0:
                    self.findings.error(
                        "E023", "an element for 0 is gone at once", change.duration.span
                    )
            updates.append(ir.Addition(field, learned, timeout, condition, change.span))
        self.asked |= {
            test.flow.name for update in updates for test in flow_tests(update.condition)
        }
        return tuple(updates)

    def _after_verdict(self, steps: list[ir.Step | ir.Limit]) -> None:
        for index, step in enumerate(steps[:-1]):
            if isinstance(step, ir.Step) and step.action.verdict:
                self.findings.error(
                    "E033",
                    f"nothing can follow `{step.action}`",
                    steps[index + 1].span,
                    notes=((f"`{step.action}` ends the class's actions", step.span),),
                )
                return

    def _placement(self) -> tuple[syntax.Run | None, bool]:
        """The line `run python`, and whether packets pass while nobody serves them."""
        run = self._one(syntax.Run, "run")
        if run is not None and run.where.text not in ("kernel", "python"):
            self.findings.error(
                "E010", f"a policy cannot run in `{run.where.text}`", run.where.span,
                help="`run kernel` or `run python`",
            )  # fmt: skip
        fail = self._one(syntax.Fail, "fail")
        if fail is not None and fail.mode.text not in ("open", "closed"):
            self.findings.error(
                "E010", f"a policy cannot fail `{fail.mode.text}`", fail.mode.span,
                help="`fail open` or `fail closed`",
            )  # fmt: skip
        if run is not None and run.where.text == "kernel":
            self._all_in_kernel(run)
        in_python = run is not None and run.where.text == "python"
        return run if in_python else None, fail is None or fail.mode.text == "open"

    def _python(self, policy: ir.Policy, run: syntax.Run | None) -> None:
        """What the policy has in Python must be possible, and allowed, there."""
        for said in self._all(syntax.Run):
            if said.where.text == "kernel":
                self._no_tunnels_in_python(policy, said)
        if run is not None or policy.hands_over:
            refuse(policy, self.at if run is None else run.span, self.findings)
            return
        for node in self._all(syntax.Queues):
            self.findings.warning(
                "W014", "nothing of the policy runs in Python, so it has no queues", node.span
            )

    def _all_in_kernel(self, run: syntax.Run) -> None:
        """Refuse what `run kernel` cannot mean."""
        for node in self._actions():
            if isinstance(node, syntax.Call):
                self.findings.error(
                    "E034", "the policy says `run kernel`, and a handler runs in Python",
                    node.span, notes=(("it says so here", run.span),),
                )  # fmt: skip

    def _no_tunnels_in_python(self, policy: ir.Policy, run: syntax.Run) -> None:
        for name, steps in policy.process.items():
            tunnel = next((s for s in ir.every_step(ir.handed_over(steps)) if s.in_python), None)
            if (
                tunnel is not None
                and outward(policy, name) is None
                and not isinstance(inward(policy, name), Inward)
            ):
                why = why_not(policy, name) or "only a class's last action can be a tunnel there"
                self.findings.error(
                    "E034", f"the policy says `run kernel`, and the kernel cannot `{tunnel.action}`: {why}",
                    tunnel.span, notes=(("it says so here", run.span),),
                )  # fmt: skip

    def _actions(self) -> Iterator[syntax.ActionNode]:
        """All actions as written, those of limits, too."""
        left = [a for p in self._all(syntax.Process) for b in p.blocks for a in b.actions]
        while left:
            node = left.pop()
            if isinstance(node, syntax.Limit):
                left += node.otherwise or ()
            yield node

    def _queueing(self) -> ir.Queueing:
        node = self._one(syntax.Queues, "queues")
        if node is None:
            return ir.Queueing()
        given: dict[str, int] = {}
        options = [(syntax.Name(node.number.span, "queues"), node.number), *node.options]
        for word, value in options:
            if word.text not in _QUEUE_OPTIONS:
                self.findings.error(
                    "E010", f"queues have no `{word.text}`", word.span,
                    help=did_you_mean(word.text, _QUEUE_OPTIONS.keys() - {"queues"}),
                )  # fmt: skip
                continue
            type, low, high = _QUEUE_OPTIONS[word.text]
            number = single(value, type, self.scope, self.findings)
            if word.text in given:
                self.findings.error("E012", f"`{word.text}` is named twice", word.span)
            elif number is not None and not low <= number <= high:
                self.findings.error(
                    "E023", f"`{word.text}` lies between {low} and {high}", value.span
                )
            elif number is not None:
                given[word.text] = number
        first = given.get("from")
        if first is not None and first + given.get("queues", 1) > LARGEST_QUEUE + 1:
            self.findings.error("E023", f"the greatest queue is {LARGEST_QUEUE}", node.span)
        return ir.Queueing(
            given.get("queues", 1), given.get("length", 4096), given.get("buffer", 8 << 20),
            given.get("copy"), first, node.span,
        )  # fmt: skip

    # Warnings about names.

    def _unused(self, counts: tuple[ir.Count, ...], sound: bool) -> None:
        for parameter in self.node.parameters:
            if parameter.name.text not in self.scope.used:
                self.findings.warning(
                    "W002", f"the parameter `{parameter.name.text}` is never used", parameter.span
                )
        counted = {count.flow.name: count for count in counts}
        for name, flow in self.flows.items():
            if name not in counted and name not in self.limited:
                self.findings.warning(
                    "W003",
                    f"the flow `{name}` is never counted"
                    + (", so what is asked of it stays 0" if name in self.asked else ""),
                    flow.span,
                    help=f"add `log {{ count {name} }}`",
                )
            elif name in counted and name not in self.asked and sound:
                self.findings.warning(
                    "W010", f"the flow `{name}` is counted but never asked", counted[name].span
                )
