"""Syntax tree -> checked policies: names, types, units, conflicts.

Each policy is checked by itself, statement by statement; all errors are
collected. What comes out is `ir.Policy`, in which nothing can be wrong any more
but what only the simplifier (can it ever match?) or the kernel can tell.
"""

import re
from collections.abc import Iterable
from typing import Final, TypeVar

from itmlang import ir, syntax, values
from itmlang.actions import ACTIONS, Action
from itmlang.conditions import Conditions, flow_tests
from itmlang.diagnostics import Findings, did_you_mean
from itmlang.evaluate import Parameter, Scope, single, value_set
from itmlang.fields import FIELDS, HOOKS, INTEREST_FIELDS, Field
from itmlang.source import Span
from itmlang.values import PARAMETER_TYPES

DEFAULT_TIMEOUT: Final = 5 * 60_000
DEFAULT_SIZE: Final = 65_536
# nft allows 255 characters; with the prefixes of generated names this is plenty.
LONGEST_NAME: Final = 64
# nft packs the types of a key into 32 bits, six for each field; the kernel has
# sixteen 4-byte registers for it (NFT_REG32_COUNT).
MOST_KEY_FIELDS: Final = 5
LARGEST_KEY: Final = 64
HIGHEST_PRIORITY: Final = 1_000_000
_NAME = re.compile(r"[a-z][a-z0-9_]*")

Node = TypeVar("Node", bound=syntax.Statement)


def check(file: syntax.File, findings: Findings) -> tuple[ir.Policy, ...]:
    """The policies of a file that are to be loaded, in the file's order.

    A policy with a parameter that has no value is a template: it is checked, but
    not loaded. Errors and warnings go to `findings`; policies with errors are
    left out.
    """
    checked, seen = [], dict[str, Span]()
    for node in file.policies:
        if node.name.text in seen:
            findings.error(
                "E012",
                f"there are two policies named `{node.name.text}`",
                node.name.span,
                notes=(("the first one is here", seen[node.name.text]),),
            )
            continue
        seen[node.name.text] = node.name.span
        policy = _Check(node, findings).policy()
        if policy is not None:
            checked.append(policy)
    if file.policies and not checked and not findings.failed:
        findings.error(
            "E014",
            "no policy here can be loaded: each has a parameter without a value",
            file.policies[0].name.span,
            help="give each parameter a default: `name: type = value`",
        )
    return tuple(checked)


class _Check:
    """The check of one policy."""

    def __init__(self, node: syntax.Policy, findings: Findings) -> None:
        self.node = node
        self.findings = findings
        self.scope = Scope()
        self.flows: dict[str, ir.Flow] = {}

    def policy(self) -> ir.Policy | None:
        errors_before = len(self.findings.diagnostics)
        self._name(self.node.name)
        complete = self._parameters()
        hooks = self._hooks()
        conditions = Conditions(hooks, self.flows, self.scope, self.findings)
        priority = self._priority()
        interest = self._interest(conditions)
        for flow in self._all(syntax.Flow):
            self._flow(flow, conditions)
        rules = self._rules(conditions)
        counts = self._counts()
        process = self._process({rule.name for rule in rules})
        self._placement()
        self._unused(rules, counts)
        errors = self.findings.diagnostics[errors_before:]
        if not complete or any(d.is_error for d in errors):
            return None
        return ir.Policy(
            name=self.node.name.text,
            hooks=hooks,
            priority=priority,
            interest=interest,
            flows=tuple(self.flows.values()),
            rules=rules,
            counts=counts,
            process=process,
            span=self.node.span,
            parameters={
                p.name.text: p.default.span.text
                for p in self.node.parameters
                if p.default is not None
            },
        )

    # Statements of a kind.

    def _all(self, kind: type[Node]) -> list[Node]:
        return [s for s in self.node.statements if isinstance(s, kind)]

    def _one(self, kind: type[Node], keyword: str) -> Node | None:
        """The policy's only statement of a kind."""
        found = self._all(kind)
        for extra in found[1:]:
            self.findings.error(
                "E013",
                f"a policy has one `{keyword}` at most",
                extra.span,
                notes=(("the first one is here", found[0].span),),
            )
        return found[0] if found else None

    def _name(self, name: syntax.Name) -> None:
        if not _NAME.fullmatch(name.text):
            self.findings.error(
                "E011",
                f"`{name.text}` cannot be a name",
                name.span,
                help="a name has lower-case letters, digits and `_`, and begins with a letter",
            )
        elif len(name.text) > LONGEST_NAME:
            self.findings.error(
                "E011", f"the name is longer than {LONGEST_NAME} characters", name.span
            )

    def _new_names(self, names: Iterable[syntax.Name], what: str) -> list[syntax.Name]:
        """The names, each checked and reported when it comes twice."""
        first: dict[str, syntax.Name] = {}
        for name in names:
            self._name(name)
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

    def _parameters(self) -> bool:
        """Fill the scope; False if a parameter has no value."""
        complete = True
        self._new_names((p.name for p in self.node.parameters), "parameters")
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
            found = None
            if node.default is None:
                complete = False
                self.findings.warning(
                    "W007",
                    f"`{self.node.name.text}` is not loaded: `{node.name.text}` has no value",
                    node.span,
                    help=f"give it a default: `{node.name.text}: {type.name} = …`",
                )
            else:
                found = value_set(node.default, type, Scope(), self.findings)
            self.scope.parameters[node.name.text] = Parameter(type, found)
        return complete

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
        hooks: list[str] = []
        for hook in node.hooks:
            word = hook.text.split()[0]
            if word in ("ingress", "egress"):
                self.findings.error(
                    "E016", f"policies at `{word}` are not supported yet", hook.span,
                    help="prerouting and postrouting see the same packets",
                )  # fmt: skip
            elif hook.text not in HOOKS:
                self.findings.error(
                    "E010", f"there is no hook `{hook.text}`", hook.span,
                    help=did_you_mean(hook.text, HOOKS),
                )  # fmt: skip
            elif hook.text in hooks:
                self.findings.error("E012", f"`{hook.text}` is named twice", hook.span)
            else:
                hooks.append(hook.text)
        # In the order in which a packet meets them.
        return tuple(h for h in HOOKS if h in hooks)

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
        terms: list[ir.Condition] = []
        known = {name: FIELDS[name] for name in INTEREST_FIELDS}
        for line in node.lines if node is not None else ():
            field = conditions.field(line.field, known)
            if field is None or not conditions.met(field, line.field.span):
                continue
            found = value_set(line.value, field.type, self.scope, self.findings)
            if found is None:
                continue
            test = ir.Test(field, found, line.field.span.to(line.value.span))
            terms.append(ir.Not(test, line.span) if line.excluded else test)
        return ir.And(tuple(terms), node.span if node is not None else self.node.name.span)

    # Flows.

    def _flow(self, node: syntax.Flow, conditions: Conditions) -> None:
        self._name(node.name)
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
        timeout, size = self._flow_options(node)
        self.flows[node.name.text] = ir.Flow(node.name.text, tuple(key), timeout, size, node.span)

    def _flow_options(self, node: syntax.Flow) -> tuple[int, int]:
        given: dict[str, int] = {}
        for option in node.options:
            type = values.DURATION if option.name == "timeout" else values.NUMBER
            if option.name in given:
                self.findings.error("E012", f"`{option.name}` is given twice", option.span)
            value = single(option.value, type, self.scope, self.findings)
            if value == 0:
                self.findings.error("E023", f"`{option.name}` cannot be 0", option.value.span)
            given[option.name] = value or 1
        return given.get("timeout", DEFAULT_TIMEOUT), given.get("max", DEFAULT_SIZE)

    # The sections.

    def _rules(self, conditions: Conditions) -> tuple[ir.ClassRule, ...]:
        node = self._one(syntax.Classify, "classify")
        rules: list[ir.ClassRule] = []
        otherwise: ir.ClassRule | None = None
        for rule in node.rules if node is not None else ():
            self._name(rule.name)
            if otherwise is not None:
                self.findings.warning(
                    "W001",
                    f"`{rule.name.text}` is never reached: `{otherwise.name}` takes all packets",
                    rule.span,
                    notes=(("it has no condition", otherwise.span),),
                )
            condition = None
            if rule.condition is not None:
                condition = conditions.condition(rule.condition)
                if condition is None:
                    # Kept, so that `process` is checked against all the names.
                    condition = ir.Or((), rule.span)
            made = ir.ClassRule(rule.name.text, condition, rule.span)
            rules.append(made)
            if condition is None and otherwise is None:
                otherwise = made
        return tuple(rules)

    def _counts(self) -> tuple[ir.Count, ...]:
        node = self._one(syntax.Log, "log")
        counts: dict[str, ir.Count] = {}
        for count in node.counts if node is not None else ():
            flow = self.flows.get(count.flow.text)
            if flow is None:
                self.findings.error(
                    "E010", f"there is no flow `{count.flow.text}`", count.flow.span,
                    help=did_you_mean(count.flow.text, self.flows),
                )  # fmt: skip
            elif flow.name in counts:
                self.findings.error("E012", f"`{flow.name}` is counted twice", count.span)
            else:
                counts[flow.name] = ir.Count(flow, count.span)
        return tuple(counts.values())

    def _process(self, classes: set[str]) -> dict[str, tuple[ir.Step, ...]]:
        node = self._one(syntax.Process, "process")
        blocks = node.blocks if node is not None else ()
        self._new_names((block.name for block in blocks), "blocks")
        process: dict[str, tuple[ir.Step, ...]] = {}
        for block in blocks:
            if block.name.text not in classes:
                self.findings.error(
                    "E010", f"there is no class `{block.name.text}`", block.name.span,
                    help=did_you_mean(block.name.text, classes),
                )  # fmt: skip
            steps = tuple(
                ir.Step(action, use.span)
                for use in block.actions
                if (action := self._action(use)) is not None
            )
            self._after_verdict(steps)
            process[block.name.text] = steps
        return process

    def _action(self, node: syntax.Action) -> Action | None:
        kind = next((a for a in ACTIONS if a.words == node.words), None)
        if kind is None:
            written = " ".join(node.words)
            known = [" ".join(a.words) for a in ACTIONS]
            self.findings.error(
                "E010", f"there is no action `{written}`", node.span,
                help=did_you_mean(written, known),
            )  # fmt: skip
            return None
        if kind.operand is None or node.value is None:
            return kind()
        value = single(node.value, kind.operand, self.scope, self.findings)
        return None if value is None else kind(value)

    def _after_verdict(self, steps: tuple[ir.Step, ...]) -> None:
        for index, step in enumerate(steps[:-1]):
            if step.action.verdict:
                self.findings.error(
                    "E033",
                    f"nothing can follow `{step.action}`",
                    steps[index + 1].span,
                    notes=((f"`{step.action}` ends the class's actions", step.span),),
                )
                return

    def _placement(self) -> None:
        run = self._one(syntax.Run, "run")
        if run is not None and run.where.text == "python":
            self.findings.error(
                "E034", "`run python` needs the queue runtime, which does not exist yet",
                run.span, help="leave it out: all that this version knows runs in the kernel",
            )  # fmt: skip
        elif run is not None and run.where.text != "kernel":
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

    # Warnings about names.

    def _unused(self, rules: tuple[ir.ClassRule, ...], counts: tuple[ir.Count, ...]) -> None:
        for parameter in self.node.parameters:
            if parameter.name.text not in self.scope.used:
                self.findings.warning(
                    "W002", f"the parameter `{parameter.name.text}` is never used", parameter.span
                )
        counted = {count.flow.name for count in counts}
        asked = {test.flow.name for rule in rules for test in flow_tests(rule.condition)}
        for name, flow in self.flows.items():
            if name not in counted:
                self.findings.warning(
                    "W003",
                    f"the flow `{name}` is never counted"
                    + (", so what is asked of it stays 0" if name in asked else ""),
                    flow.span,
                    help=f"add `log {{ count {name} }}`",
                )
