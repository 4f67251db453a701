"""Classes of several shapes, the packets that belong to them, and the policies that say so.

What a class matches is a `Term`, so that itm, aerleon and foomuuri are asked for the same.
Terms of a shape do not overlap: a packet has one class, however its ruleset finds it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from bench.wire import Packet

KINDS: Final = 5  # of terms in "mixed"
MOST: Final = 10_000  # classes: of port ranges there are no more


@dataclass(frozen=True)
class Term:
    """All that is named must hold: one of the hosts or prefixes, the protocol, the ports."""

    to: tuple[str, ...] = ()
    protocol: str = ""
    dport: tuple[int, int] | None = None

    def condition(self) -> str:
        """In itm's language."""
        parts = [f"protocol == {self.protocol}"] if self.protocol else []
        if len(self.to) > 1:
            parts.append(f"daddr in {{ {', '.join(self.to)} }}")
        elif self.to:
            parts.append(f"daddr {'in' if '/' in self.to[0] else '=='} {self.to[0]}")
        if self.dport:
            first, last = self.dport
            parts.append(f"dport == {first}" if first == last else f"dport in {first}-{last}")
        return " and ".join(parts)

    def packet(self, turn: int) -> Packet:
        """One that it matches; at other turns, others."""
        to, dport = "10.128.0.1", 53
        if self.to:
            to, prefix, _ = self.to[turn % len(self.to)].partition("/")
            if prefix:
                to = to.removesuffix("0") + str(1 + turn % 9)
        if self.dport:
            dport = self.dport[0] + turn % (1 + self.dport[1] - self.dport[0])
        return Packet(to, self.protocol or "udp", dport=dport)


def _host(n: int) -> str:
    return f"10.{128 + (n >> 16)}.{n >> 8 & 255}.{n & 255}"


def _prefix(n: int) -> str:
    """From /24 to /28, of addresses that no host has."""
    return f"10.{192 + (n >> 8)}.{n & 255}.0/{24 + n % 5}"


def _ports(n: int) -> tuple[int, int]:
    return 1000 + 6 * n % 60_000, 1005 + 6 * n % 60_000


def _mixed(n: int) -> Term:
    match n % KINDS:
        case 0:
            return Term((_host(n),), "udp", _ports(n))
        case 1:
            return Term((_host(2 * n + MOST), _host(2 * n + 1 + MOST)))
        case 2:
            return Term((_prefix(n),), "udp")
        case 3:
            return Term((f"fd80:{n + 1:x}::0/{32 + n % 5 * 8}",))
        case _:
            return Term((_host(n),), "tcp", (443, 443))


SHAPES: Final[dict[str, Callable[[int], Term]]] = {
    "exact": lambda n: Term((_host(n),)),
    "ranges": lambda n: Term(protocol="udp", dport=_ports(n)),
    "prefixes": lambda n: Term((_prefix(n),)),
    "mixed": _mixed,
}


def terms(shape: str, classes: int) -> list[Term]:
    """What the classes 0, 1, 2 … match."""
    return [SHAPES[shape](n) for n in range(classes)]


def policy(terms: Sequence[Term]) -> str:
    """Classes c0, c1, c2 …, and `rest`."""
    rules = [f"        c{n} when {term.condition()}" for n, term in enumerate(terms)]
    lines = ["policy growth {", "    at forward", "    classify {", *rules, "        rest"]
    return "\n".join([*lines, "    }", "}", ""])
