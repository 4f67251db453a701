"""The rules of tunnels that the kernel has: a number in the mark steers packets.

Into a tunnel: the rule of the class writes the tunnel's number, a routing rule finds it.
Out of one: the program on the link has written the number, the policy's chain counts the
packet for its class and clears it. Numbers are the machine's: two files may come with the
same one, and then the second one's are changed when it is applied.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from itmlang import marks
from itmlang.nft.model import Chain, Rule, Ruleset, Table, Tunnel

_BITS = f"meta mark & {marks.TUNNEL_BITS:#010x}"
_OTHERS = marks.ALL ^ marks.TUNNEL_BITS
# In a base chain: packets that a program took out of a tunnel, or that go into one.
TAKEN = f"{_BITS} != 0"


def rules(tunnel: Tunnel, counter: str, between: Iterable[str] = ()) -> tuple[str, ...]:
    """What stands in the tunnel's chain; `counter` counts for its class. `between` are further
    rules for what came out of it."""
    number = f"{tunnel.number << marks.TUNNEL_SHIFT:#010x}"
    if not tunnel.inward:
        return (f"meta mark set meta mark & {_OTHERS:#010x} | {number}", "accept")
    return (
        f"{_BITS} != {number} return",
        *between,
        f"{counter} meta mark set meta mark & {_OTHERS:#010x} accept",
    )


def renumbered(
    ruleset: Ruleset, others: Mapping[int, Tunnel], before: Mapping[int, Tunnel]
) -> Ruleset | None:
    """The ruleset with numbers for its tunnels that no others have; None if there are too many.

    `others` are the tunnels that stay, by number. The ones of `before`, which may go, keep
    their numbers, and as long as there are others nobody gets them: packets that the
    rules of before steer must not come into another tunnel, however short the time.
    """
    changes: dict[int, int] = {}
    for tunnel in sorted(
        (t for table in ruleset.tables for t in table.tunnels), key=lambda t: t.number
    ):
        if tunnel.number in changes:
            continue
        shared = [n for n, other in (*before.items(), *others.items()) if other.same_as(tunnel)]
        free = [
            n
            for n in (*shared, tunnel.number, *range(1, marks.MOST_TUNNELS + 1))
            if n not in changes.values() and (n not in others or others[n].same_as(tunnel))
        ]
        if not free:
            return None
        quiet = (n for n in free if n not in before or before[n].same_as(tunnel))
        changes[tunnel.number] = next(quiet, free[0])
    if all(old == new for old, new in changes.items()):
        return ruleset
    return replace(ruleset, tables=tuple(_renumbered(t, changes) for t in ruleset.tables))


def _renumbered(table: Table, changes: dict[int, int]) -> Table:
    tunnels = [replace(t, number=changes[t.number]) for t in table.tunnels]
    by_old = {old.number: new for old, new in zip(table.tunnels, tunnels, strict=True)}
    chains = [
        _with_rules(chain, by_old[chain.number]) if chain.role == "tunnel" else chain
        for chain in table.chains
    ]
    return replace(table, tunnels=tunnels, chains=chains)


def _with_rules(chain: Chain, tunnel: Tunnel) -> Chain:
    counter = chain.rules[-1].text.partition(" meta mark")[0]
    between = [rule.text for rule in chain.rules[1:-1]]
    made = [
        Rule(text, rule.span, rule.label)
        for text, rule in zip(rules(tunnel, counter, between), chain.rules, strict=True)
    ]
    return replace(chain, rules=made, number=tunnel.number)
