"""Which classes the kernel's own tunnels can serve: programs on routes and links, no queue.

`encapsulate` is steered by the mark that a rule gives, so any condition will do; it must
be the class's last action, because behind it there is another packet. `decapsulate` happens
where a packet comes in, before any rule: there only addresses can be asked, so the class
must be the policy's first, ask for nothing else, and do nothing else. What the program
leaves alone (fragments, options) goes the ordinary way, to Python.
"""

from dataclasses import dataclass
from ipaddress import IPv4Address, summarize_address_range
from typing import Final

from itmlang import ir
from itmlang.actions.accept import Accept
from itmlang.actions.encapsulate import Decapsulate, Encapsulate
from itmlang.values import IPV4, Addresses, Names, Ranges

_IPIP: Final = 4
MOST_DESTINATIONS: Final = 16
MOST_SOURCES: Final = 64


@dataclass(frozen=True)
class Inward:
    """Packets of protocol 4 to one of our addresses, from one of some networks (none: from
    anywhere), that come in by one of some devices (none: by any). Addresses are integers."""

    sources: tuple[tuple[int, int], ...]  # prefixes: address, length
    destinations: tuple[int, ...]
    devices: tuple[str, ...]


def outward(policy: ir.Policy, name: str) -> Encapsulate | None:
    """The tunnel into which the kernel can put a class's packets; None if Python must."""
    steps = policy.process.get(name, ())
    begin = ir.python_part(steps)
    if policy.in_python or policy.tunnels_in_python or begin == len(steps):
        return None
    step, *rest = steps[begin:]
    last = all(isinstance(s, ir.Step) and isinstance(s.action, Accept) for s in rest)
    if last and isinstance(step, ir.Step) and isinstance(step.action, Encapsulate):
        return step.action
    return None


def inward(policy: ir.Policy, name: str) -> Inward | str:
    """What the kernel can take out of its tunnel for a class, or why Python must."""
    steps = policy.process.get(name, ())
    if policy.tunnels_in_python:
        return "the overlay says `run python`"
    if policy.in_python or policy.hooks != ("prerouting",):
        return "it stands elsewhere, too"
    if not _alone(steps):
        return "the class has other actions"
    if policy.counts or policy.notes or policy.updates:
        return "the policy logs or learns"
    if policy.rules[0].name != name or any(r.name == name for r in policy.rules[1:]):
        return "the class is not the first"
    asked = _asked(policy.interest) + (_asked(policy.rules[0].condition) or [])
    if None in asked:
        return "its conditions ask for more than addresses"
    protocol, sources, destinations = _every(255), _every(2**32 - 1), _every(2**32 - 1)
    devices: frozenset[str] | None = None
    for test in asked:
        assert test is not None
        match test.field.name, test.values:
            case "protocol", Ranges() as found:
                protocol = protocol.intersection(found)
            case "saddr", Addresses() as found:
                sources = sources.intersection(found.family(IPV4))
            case "daddr", Addresses() as found:
                destinations = destinations.intersection(found.family(IPV4))
            case "in", Names() as found:
                devices = found.patterns if devices is None else devices & found.patterns
    if protocol != Ranges(255, ((_IPIP, _IPIP),)):
        return "it is not of the protocol ipip alone"
    if sum(hi - lo + 1 for lo, hi in destinations.spans) > MOST_DESTINATIONS:
        return f"its destinations are more than {MOST_DESTINATIONS} addresses"
    networks = prefixes(sources)
    if len(networks) > MOST_SOURCES:
        return f"its sources are more than {MOST_SOURCES} networks"
    if devices is not None and any("*" in one for one in devices):
        return "its interfaces are a pattern"
    ours = tuple(n for lo, hi in destinations.spans for n in range(lo, hi + 1))
    return Inward(networks, ours, tuple(sorted(devices or ())))


def why_not(policy: ir.Policy, name: str) -> str:
    """Why the kernel cannot serve a class that decapsulates, "" for other classes."""
    steps = policy.process.get(name, ())
    if any(isinstance(step.action, Decapsulate) for step in ir.every_step(steps)):
        found = inward(policy, name)
        return found if isinstance(found, str) else ""
    return ""


def _alone(steps: ir.Steps) -> bool:
    """Is `decapsulate` all that is done?"""
    actions = [s.action for s in steps if isinstance(s, ir.Step)]
    return (
        len(actions) == len(steps)
        and isinstance(actions[0] if actions else None, Decapsulate)
        and all(isinstance(one, Accept) for one in actions[1:])
    )


def _asked(condition: ir.Condition | None) -> list[ir.Test | None]:
    """The tests that must all hold; None for what is no such test."""
    match condition:
        case None:
            return []
        case ir.And():
            return [test for term in condition.terms for test in _asked(term)]
        case ir.Test() if condition.field.name in ("protocol", "saddr", "daddr", "in"):
            return [condition]
        case _:
            return [None]


def _every(limit: int) -> Ranges:
    return Ranges(limit, ((0, limit),))


def prefixes(found: Ranges) -> tuple[tuple[int, int], ...]:
    """Networks that hold just these addresses; none if they are all there are."""
    if found.full:
        return ()
    return tuple(
        (int(one.network_address), one.prefixlen)
        for lo, hi in found.spans
        for one in summarize_address_range(IPv4Address(lo), IPv4Address(hi))
    )
