"""Rules that a controller moves: for each value of its parameter, ready and waiting.

A policy is lowered once for each value that its parameter may take. Where the rules of a
chain differ, they go into chains of their own, one for each value, and a map leads to those in
force:

    chain log_flows   { …  jump by_threshold_1  … }
    chain by_threshold_1     { meta nfproto vmap @by_threshold_1   goto by_threshold_1_10 }
    chain by_threshold_1_17  { … the rules, with 17 for the threshold … }

The map is empty until a controller writes it, and its elements end by themselves unless they
are renewed: without its controller, the policy has the file's value. So to move the parameter
changes two elements, whatever the rules are; no rule is touched, and no count forgotten.
"""

from collections.abc import Sequence
from dataclasses import replace

from itmlang.control import Controller
from itmlang.diagnostics import Findings
from itmlang.nft.model import Chain, FlowSet, Rule, Table

ROLE = "control"  # of a map's set, and of the chains around it
_CODE = "E066"


def varied(
    table: Table, policy: str, controller: Controller, others: Sequence[Table], findings: Findings
) -> Controller:
    """Put the rules for all values into a table; the controller with the maps that lead there.

    `others` is the table as it is for each of the controller's values.
    """
    told = f"`{controller.written}` cannot be controlled"
    if any(_form(one) != _form(table) for one in others):
        findings.error(
            _CODE, f"{told}: it decides more than rules", controller.span,
            help="a time-out, a size, a named set or what Python does needs `itmc set`",
        )  # fmt: skip
        return controller
    sites: list[str] = []
    base = controller.steps[controller.step(controller.base)]
    for index, chain in enumerate(list(table.chains)):
        versions = [one.chains[index].rules for one in others]
        if all(_texts(rules) == _texts(chain.rules) for rules in versions):
            continue
        if chain.role or chain.name.startswith("by_"):
            findings.error(
                _CODE, f"{told}: another controller moves the same rules, or Python serves them",
                controller.span, help="one of the two needs a policy of its own",
            )  # fmt: skip
            return controller
        sites.append(f"{table.prefix(policy)}by_{controller.written}_{len(sites) + 1}")
        _dispatch(table, policy, chain, sites[-1], controller.steps, versions, base)
    if not sites:
        findings.warning(
            "W015", f"no rule depends on `{controller.written}`: to control it changes nothing",
            controller.span,
        )  # fmt: skip
    return replace(controller, sites=tuple(sites))


def chain_of(site: str, step: str) -> str:
    """The chain with the rules for a value."""
    return f"{site}_{''.join(c if c.isalnum() else '_' for c in step)}"


def _form(table: Table) -> object:
    """All of a table but the rules, and how large thresholds are."""
    return (
        [replace(one, threshold=0, statement="") for one in table.sets],
        [(c.name, c.policy, c.hook, c.role, c.number) for c in table.chains],
        table.counters, table.values, table.queues, table.tunnels,
    )  # fmt: skip


def _texts(rules: Sequence[Rule]) -> list[str]:
    return [rule.text for rule in rules]


def _dispatch(
    table: Table,
    policy: str,
    chain: Chain,
    site: str,
    steps: Sequence[str],
    versions: Sequence[list[Rule]],
    base: str,
) -> None:
    """Move the rules that differ into chains, and lead there."""
    texts = [_texts(rules) for rules in versions]
    begin = _common(texts)
    end = _common([list(reversed(text[begin:])) for text in texts])
    if any("return" in text.split() for rules in texts for text in rules[begin : len(rules) - end]):
        end = 0  # from there on nothing comes back: the whole rest moves
    span = chain.rules[min(begin, len(chain.rules) - 1)].span
    table.sets.append(
        FlowSet(
            name=site, policy=policy, flow="", role=ROLE, family=0, key=("nfproto",),
            types=("nf_proto",), expression="nf_proto : verdict", size=2, timeout=None, span=span,
        )
    )  # fmt: skip
    leading = Chain(site, span, policy, role=ROLE)
    leading.rules = [
        Rule(f"meta nfproto vmap @{site}", span, "controlled"),
        Rule(f"goto {chain_of(site, base)}", span, "else the file's value"),
    ]
    table.chains.append(leading)
    for step, rules in zip(steps, versions, strict=True):
        moved = Chain(chain_of(site, step), span, policy, role=ROLE)
        moved.rules = rules[begin : len(rules) - end]
        table.chains.append(moved)
    rest = chain.rules[len(chain.rules) - end :] if end else []
    word = "jump" if end or chain.hook is not None else "goto"
    chain.rules = [*chain.rules[:begin], Rule(f"{word} {site}", span), *rest]


def _common(texts: Sequence[Sequence[str]]) -> int:
    """How many rules all begin with."""
    shortest = min(len(text) for text in texts)
    first = texts[0]
    return next(
        (n for n in range(shortest) if any(text[n] != first[n] for text in texts)), shortest
    )
