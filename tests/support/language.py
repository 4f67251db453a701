"""The language at random: conditions, policies and packets for the property tests.

The lists of texts are what hypothesis draws from in `test_simplify`; `Chance` makes
whole files and packets of them with a seeded generator, where a thousand of them go
through a kernel. Addresses are 10.0.0.x and fd00::x; `placed_here` moves them to the
networks of the kernel tests.
"""

import struct
from dataclasses import dataclass
from random import Random

from tests.support import connections
from tests.support.frames import shaped

SHAPES = {
    4: ("", "", "", "options", "fragment", "first-fragment", "short"),
    6: ("", "", "", "hop-by-hop", "both-options", "fragment", "first-fragment", "short"),
}
SETS = """
set hosts: address = { 10.0.0.1, 10.0.0.4-10.0.0.9, fd00::2-fd00::3 }
set six: address = { fd00::/126 }
set ports: port = { 1, 80-90 }
set links: interface = { "eth0", "l*" }
set transports: protocol = { tcp, sctp }
set sizes: bytes = { 40-60 }
set empty: port = { }
set seen: address timeout 1h max 3
set met: address timeout 1h
set knocked: port timeout 1h max 3
set used: protocol timeout 1h
set entered: interface timeout 1h
set marked: number timeout 1h max 2
"""
# Which fields go into a learned set. What is removed from a set makes room there only
# within a second (the kernel's rhashtable keeps it until its next collection), so nothing
# is removed from those that can be full; and what comes back again and again, more than
# 16 times meanwhile, finds no room in its bucket.
LEARNED = {
    "seen": ("saddr", "daddr"), "met": ("saddr", "daddr"), "knocked": ("sport", "dport"),
    "used": ("protocol",), "entered": ("in", "out"), "marked": ("mark",),
}  # fmt: skip
EMPTIED = ("met", "used", "entered")
LEAVES = (
    "family == ipv4", "family != ipv6", "family in { ipv4, ipv6 }",
    "protocol == tcp", "protocol != udp", "protocol in { icmp, udp, 58 }", "protocol > 16",
    "saddr == 10.0.0.1", "saddr != { 10.0.0.0/30, fd00::2 }", "saddr in fd00::/126",
    "saddr in { 0.0.0.0/0 }", "daddr in { 10.0.0.2-10.0.0.3, fd00::1 }", "daddr != 10.0.0.1",
    "sport == 1", "sport != { 1, 3 }", "sport <= 2", "sport >= 0", "sport > 3", "sport in 0-65535",
    "dport in { 1-2, 80 }", "dport != 80", "dport < 0", "dport >= 2", "dport == 3",
    'in == "eth0"', 'in != "eth*"', 'in in { "eth0*", "lo" }', 'in in "*"', 'in != "eth0"',
    'in != { "*" }', 'out == "eth1"', 'out != "e*"', 'out in { "eth0", "eth1" }',
    "length > 60", "length <= 40", "ttl == 64", "ttl < 5", "ttl != { 1-63 }",
    "tos == 0", "tos in 0x10-0x1f", "dscp == ef", "dscp >= 10", "ecn != 0", "mark == 1", "mark > 1",
    "tcp.flags == syn", "tcp.flags != { ack, syn }", "tcp.flags has fin",
    "tcp.flags has { syn, rst }", "tcp.flags in 0-255",
    "fragment", "fragment == yes", "fragment != yes", "fragment == no", "fragment in { yes, no }",
    "tcp.mss > 1000", "tcp.mss <= 536", "tcp.mss != 1460", "tcp.mss >= 0",
    "tcp.mss in { 0-100, 1460 }", "tcp.mss == 536",
    "icmp.type == echo-request", "icmp.type != 8", "icmp.type in { 0, 3-5 }", "icmp.type > 8",
    "icmp.type in 0-255", "icmpv6.type == echo-request", "icmpv6.type != 128",
    "icmpv6.type in 128-137", "icmpv6.type < 128", "icmpv6.type != { 1-3, echo-reply }",
    "saddr in @hosts", "saddr != @hosts", "daddr in { @hosts, 10.0.0.3 }", "daddr != @six",
    "sport in @ports", "dport != @ports", "dport in { @ports, 2 }", "sport == @empty",
    "dport != @empty", "in in @links", "in != @links", "out in @links", "protocol in @transports",
    "protocol != @transports", "length in @sizes",
    "saddr in @seen", "saddr != @seen", "daddr in @seen", "saddr in @met", "daddr != @met", "sport in @knocked", "dport != @knocked",
    "protocol in @used", "protocol != @used", "in in @entered", "in != @entered", "mark in @marked",
    "out in @entered", "mark != @marked",
    "f.packets > 1", "f.packets <= 1", "f.packets == 0", "f.packets != 2", "f.packets in { 0, 3-4 }",
    "f.packets >= 0", "f.packets < 0", "f.bytes > 100", "f.bytes <= 200", "f.bytes < 1",
    "g.packets > 0", "g.packets <= 2", "g.bytes >= 100", "g.packets >= 0",
    "n.packets == 0", "n.packets > 0", "n.packets >= 0",
)  # fmt: skip
# What only holds for a while, what nobody can foretell, what needs connection tracking.
TIMED = (
    "f.age > 1s", "f.age <= 1s", "g.age < 1h", "g.age >= 5s", "n.age > 1s", "n.age <= 1s",
    "f.rate > 10 packets/s", "f.rate <= 10 packets/s", "g.rate > 1 mbit", "g.rate < 8 kbit",
    "n.rate > 1/s", "n.rate <= 1/s",
)  # fmt: skip
DRAWN = ("random < 33%", "random < 66%", "random >= 50%", "random != 0%", "random <= 100%",
         "random in 10%-20%", "random == 50%")  # fmt: skip
TRACKED = (
    "ct.state == new", "ct.state in { established, related }", "ct.state != invalid",
    "ct.state != { new, established }", "ct.state in { invalid, untracked, new }",
    "ct.direction == reply", "ct.direction != reply", "ct.direction in { original, reply }",
)  # fmt: skip
CONNECTIONS = ("f.connections > 1", "f.connections == 1", "f.connections <= 2",
               "g.connections < 3", "g.connections != 2", "n.connections > 0")  # fmt: skip
# Of times and rates, what comes out the same however long a packet takes (up to a second).
CLEAR = (
    "f.age <= 1h", "f.age > 1h", "g.age < 2h", "f.rate > 3 packets/d", "f.rate <= 3 packets/h",
    "g.rate > 500 bytes/d", "g.rate < 900 bytes/h", "g.rate >= 2 packets/d", "n.rate > 1/d",
)  # fmt: skip
INTERESTS = (
    "", "", "protocol tcp", "protocol { tcp, udp }", "not protocol tcp", "family ipv4",
    "family ipv6", "not family ipv6", "saddr 10.0.0.0/24", "not saddr { 10.0.0.1, fd00::1 }",
    "daddr fd00::/64", "sport 0-3", "not sport { 2 }", "dport { 1, 80 }", 'in "eth*"',
    'not in "eth0"', "protocol icmp", "not dport 80 protocol udp", "protocol { icmpv6, sctp }",
    "saddr @hosts", "not saddr @hosts", "not dport @ports", "sport @ports family ipv6",
    "not saddr @seen", "not dport @knocked", 'not in @links', "not protocol @transports",
    "daddr { @six, 10.0.0.0/24 }", "protocol @used",
)  # fmt: skip
KEYS = (
    "saddr", "sport", "saddr, dport", "dport, sport", "protocol", "family, sport", "in, dport",
    "daddr, protocol", "mark", "saddr, sport, daddr, dport",
)  # fmt: skip
CLASSES = ("a", "b", "c", "d")
MANY = ("a", "b", "c", "d", "e", "f", "g", "h")  # of policies with many classes

# What stands beside a field that is looked up.
LEAVES_OF_MANY = (
    "ttl == 64", "not ttl == 5", "f.packets > 1", "protocol == tcp", "daddr in @hosts",
    "daddr != 10.0.0.1", "tcp.flags == syn", "sport != 2", "saddr in @met", "length > 60",
)  # fmt: skip
_NETWORKS = {4: (0x0A000100, 0x0A000200), 6: (0xFD000001 << 96, 0xFD000002 << 96)}
_MANAGER = {4: 0x0A0002FE, 6: (0xFD000002 << 96) + 0xFE}
_CLIENTS_GATEWAY = {4: 0x0A0001FE, 6: (0xFD000001 << 96) + 0xFE}


def placed_here(text: str) -> str:
    """A text's addresses, moved to the client's network of the kernel tests, one to the server's."""
    text = text.replace("daddr fd00::/64", "daddr fd00:2::/64")
    return text.replace("10.0.0.", "10.0.1.").replace("fd00::", "fd00:1::")


@dataclass(frozen=True)
class Wants:
    """What the policies of a file may have, and the packets that go with it."""

    tracked: bool  # they ask connection tracking: then no fragments, for it reassembles them
    lossless: bool  # they drop nothing, so that they may tell connections apart: a new one
    # that is dropped leaves its number to the next
    connections: bool  # they count connections: then none ends, for that is found out late
    turned: bool  # they rewrite destinations: then all packets go one way


class Chance(Random):
    """A seeded generator of files and packets."""

    _odd_options = False

    def some(self, chance: float) -> bool:
        return self.random() < chance

    # Conditions.

    def leaf(self, pool: tuple[str, ...]) -> str:
        return self.choice(pool)

    def condition(self, pool: tuple[str, ...], depth: int) -> str:
        choice = self.random()
        if depth == 0 or choice < 0.3:
            return self.choice(pool)
        if choice < 0.5:
            return f"not ({self.condition(pool, depth - 1)})"
        word = self.choice((" and ", " or "))
        parts = (self.condition(pool, depth - 1) for _ in range(self.randint(2, 3)))
        return "(" + word.join(parts) + ")"

    # Files.

    def file(self, wants: Wants, hooks: tuple[str, ...]) -> str:
        """A file of one to three policies, one of them perhaps by `use`."""
        pool = LEAVES + CLEAR
        if wants.tracked:
            pool += TRACKED * 4
        if wants.connections:
            pool += CONNECTIONS * 3
        number = self.choice((1, 1, 2, 3))
        parts = [SETS]
        for index in range(number):
            parts.append(self.policy(f"p{index}", pool, wants, hooks))
        if self.some(0.3):
            parts.append(self._template(pool, wants, hooks))
        text = placed_here("\n".join(parts))
        # What is rewritten of malformed options is the kernel's own affair.
        self._odd_options = "set tcp.mss" not in text
        return text

    def policy(
        self, name: str, pool: tuple[str, ...], wants: Wants, hooks: tuple[str, ...],
        parameters: str = "",
    ) -> str:  # fmt: skip
        several = 1 if len(hooks) == 1 or wants.connections else self.choice((1, 1, 1, 2))
        at = ", ".join(self.sample(hooks, several))
        priority = f"priority {self.choice(('3', '-5', '10', '- 20'))}" if self.some(0.4) else ""
        keys = KEYS + ("connection",) * (3 if wants.tracked and wants.lossless else 0)
        interest = self.choice([i for i in INTERESTS if "in " not in i or self._enters(at)])
        keys = tuple(key for key in keys if self._stands(key.replace(",", " "), at))
        flows = " ".join(self._flow(flow, keys) for flow in "fgn")
        used = self.sample(CLASSES, self.randint(1, 4))
        here = tuple(leaf for leaf in pool if self._stands(leaf, at))
        rules = [f"{c} when {self.condition(here, 3)}" for c in used]
        if self.some(0.35):
            rules = self.many(here)
        if self.some(0.3):
            rules.append(self.choice(CLASSES))
        classes = sorted({rule.split()[0] for rule in rules})
        notes = self.choice(("", "", "sample 1 in 3", 'record "r" at most 4/d'))
        blocks = " ".join(
            f"{c} {{ {self._actions(at, wants, 0)} }}" for c in classes if self.some(0.8)
        )
        changes = " ".join(self._change(here, at) for _ in range(self.choice((0, 0, 1, 2))))
        update = f"update {{ {changes} }}" if changes else ""
        return (
            f"policy {name}{parameters} {{ at {at} {priority} interest {{ {interest} }} {flows} "
            f"classify {{ {' '.join(rules)} }} log {{ count f count g {notes} }} "
            f"process {{ {blocks} }} {update} }}"
        )

    def many(self, pool: tuple[str, ...]) -> list[str]:
        """Rules of many classes, such as become tables: of one field, of several, alternating."""
        kinds = self.sample(range(12), self.choice((1, 2, 2, 3, 4)))
        number = self.choice((4, 8, 20, 50, 120))
        if self.some(0.3):  # runs of each kind
            order = sorted(self.choices(kinds, k=number))
        else:
            order = self.choices(kinds, k=number)
        other = self.choice((0.0, 0.0, 0.05, 0.2))  # what no table has
        return [
            f"{self.choice(MANY)} when {self.leaf(pool) if self.some(other) else self._asks(kind)}"
            for kind in order
        ]

    def _asks(self, kind: int) -> str:
        end = self.choice(("saddr", "daddr"))
        one, two = sorted((self.randint(0, 9), self.randint(0, 9)))
        port, last = sorted((self.choice((0, 1, 2, 3, 80)), self.choice((1, 2, 3, 4, 79, 80, 90))))
        address = self.choice((f"10.0.0.{one}", f"fd00::{one}"))
        wide = self.choice((f"10.0.0.{one & ~3}/30", "fd00::/126", f"10.0.0.{one}-10.0.0.{two}"))
        match kind:
            case 0:
                return f"saddr == {address}"
            case 1:
                return f"{end} in {wide}"
            case 2:
                return f"daddr in {{ {address}, {wide} }}"
            case 3:
                return f"dport == {port}"
            case 4:
                return f"sport in {port}-{last}"
            case 5:
                return f"saddr == {address} and dport in {port}-{last}"
            case 6:
                return f"protocol == {self.choice(('tcp', 'udp', '58'))} and {end} in {wide}"
            case 7:
                return f"dport in {{ {port}, {last} }} or sport == {last}"
            case 8:
                return f"saddr in {wide} and {self.choice(LEAVES_OF_MANY)}"
            case 9:
                return f"dport in {port}-{last} and not saddr == {address}"
            case 10:
                return f"mark == {self.randint(0, 2)} and {end} == {address}"
            case _:
                return f"daddr in @hosts and (dport == {port} or ttl == {self.choice((2, 64))})"

    def _template(self, pool: tuple[str, ...], wants: Wants, hooks: tuple[str, ...]) -> str:
        pool = (*pool, *(("f.packets > most", "dport in these", "saddr in whom") * 6))
        parameters = "(most: packets = 2, these: port, whom: address = @hosts)"
        text = self.policy("t", pool, wants, hooks, parameters)
        given = self.choice(("these = 80", "3, @ports", "these = { 1, 2 }, whom = @seen"))
        block = self.choice(("", "{ priority 7 }", "{ interest { protocol { tcp, udp } } }"))
        return f"{text}\nuse t({given}) as used {block}"

    @staticmethod
    def _enters(at: str) -> bool:
        return "output" not in at and "egress" not in at

    def _stands(self, leaf: str, at: str) -> bool:
        """Can the field of a condition be asked at the hooks?"""
        if leaf.startswith("in "):
            return self._enters(at)
        if leaf.startswith("out "):
            return all(hook not in at for hook in ("prerouting", "input", "ingress"))
        if leaf.startswith("ct.") or ".connections" in leaf:
            return "gress" not in at
        return True

    def _flow(self, name: str, keys: tuple[str, ...]) -> str:
        options = self.choice(("", "", "", "max 2", "timeout 1h max 4", "timeout 20s"))
        return f"flow {name} by {self.choice(keys)} {options}"

    def _change(self, pool: tuple[str, ...], at: str) -> str:
        removed = self.some(0.3)
        name = self.choice(EMPTIED if removed else tuple(LEARNED))
        field = self.choice(LEARNED[name])
        if not self._stands(f"{field} ", at):
            name, field = "met", "saddr"
        when = f" when {self.condition(pool, 2)}" if self.some(0.7) else ""
        if removed:
            rarely = f"f.packets in {{ 3, 6 }}{' and' if when else ''}"
            return f"remove {field} from @{name} when {rarely}{when.replace(' when', '')}"
        return f"add {field} to @{name}{self.choice(('', ' for 1h'))}{when}"

    def _actions(self, at: str, wants: Wants, depth: int) -> str:
        rejects = "drop" if wants.tracked or "post" in at or "output" in at else "reject"
        plain = [
            "set dscp 3", "set dscp ef", "set tos minimize-delay", "unset tos minimize-delay",
            "set tos maximize-reliability", "unset tos maximize-throughput", "set ttl 40",
            "set ttl 255", "set mark 1", "set mark 0x20", "set sport 7", "set dport 2",
            "set dport 443", "set saddr 10.0.0.8", "set saddr fd00::8", "set tcp.mss 600",
            "set tcp.mss 1400",
        ]  # fmt: skip
        if wants.turned:
            plain += ["set daddr 10.0.2.7", "set daddr fd00:2::7"]
        if "gress" in at:
            return ""  # no action can stand there
        chosen = [self.choice(plain) for _ in range(self.choice((0, 1, 1, 2, 3)))]
        if self.some(0.3) and depth < 2:
            rate = self.choice(
                ("3 packets/d burst 2", "1/d burst 6", "500 bytes/d", "8 KB/d burst 300")
            )
            per = f" per {self.choice('fg')}" if self.some(0.4) else ""
            inner = self._actions(at, wants, depth + 1)
            otherwise = f" else {{ {inner} }}" if wants.lossless or self.some(0.7) else ""
            chosen.append(f"limit {rate}{per}{otherwise}")
            self.shuffle(chosen)
        ending = self.random()
        if wants.lossless:
            ending += 0.18
        if ending < 0.12:
            chosen.append("drop")
        elif ending < 0.18:
            chosen.append(rejects)
        elif ending < 0.3:
            chosen.append("accept")
        return " ".join(chosen)

    # Packets.

    def packet(self, wants: Wants, path: str) -> bytes:
        """A packet on a path; of connections, if the policies ask for them."""
        family = self.choice((4, 6))
        client, server = _NETWORKS[family]
        source, destination = client + self.randint(1, 4), server + 1
        if path == "out":
            source = _MANAGER[family]
        if path == "in":
            destination = _CLIENTS_GATEWAY[family]
        if path == "forward" and not wants.turned and self.some(0.3):
            source, destination = destination, source
        size = 4 if family == 4 else 16
        ends = source.to_bytes(size), destination.to_bytes(size)
        protocol = self.choice((6, 6, 17, 1 if family == 4 else 58, 132, 47, 136))
        if (wants.tracked and protocol == 136) or (wants.connections and protocol in (6, 132)):
            protocol = 17
        if path == "in" and protocol in (47, 136):
            protocol = 17
        ports = (self.choice((0, 1, 2, 3, 80)), self.choice((0, 1, 2, 3, 80)))
        hops = self.choice((2, 5, 64, 65))
        transport = self._transport(protocol, ports, wants)
        data = bytearray(connections.ip(*ends, protocol, transport, hops))
        self._mark_service(data)
        if protocol == 17 and family == 4 and self.some(0.2):
            data[26:28] = bytes(2)  # no checksum
        shapes = [""] * 8 if path != "forward" else list(SHAPES[family])
        if wants.tracked:
            shapes = [s for s in shapes if s in ("", "options")]
        elif path == "out" or (path == "in" and family == 6):
            shapes += ["fragment", "short"] if path == "out" else []
        return shaped(bytes(data), self.choice(shapes))

    def _mark_service(self, data: bytearray) -> None:
        """Another TOS byte; the IPv4 checksum is made anew when the packet gets its shape."""
        tos = self.choice((0, 1, 16, 0xB8, 255))
        if data[0] >> 4 == 4:
            data[1] = tos
        else:
            struct.pack_into("!H", data, 0, 6 << 12 | tos << 4)

    def _transport(self, protocol: int, ports: tuple[int, int], wants: Wants) -> bytes:
        payload = self.randbytes(self.choice((0, 0, 1, 7, 40, 101, 600)))
        match protocol:
            case 6 if wants.tracked:
                return connections.tcp(
                    ports, self.choice((2, 2, 18, 16, 16, 17, 16 if wants.lossless else 4))
                )
            case 6:
                flags = self.choice((0, 1, 2, 4, 16, 17, 18, 0xC2, 255))
                options = self._options() if self.some(0.6) else b""
                fixed = bytearray(connections.tcp(ports, flags))
                fixed[12] = (5 + len(options) // 4) << 4
                return bytes(fixed) + options + payload
            case 17:
                return connections.udp(ports, payload)
            case 1:
                return connections.icmp(self.choice((0, 8, 8, 13, 5, 40)), payload=payload)
            case 58:
                return connections.icmp(self.choice((128, 128, 129, 1, 4)), payload=payload)
            case 132:
                return connections.sctp(ports, self.choice((1, 1, 2, 10)))
            case 136:
                return struct.pack("!HHHH", *ports, 0, 0) + payload
            case _:
                return connections.gre()

    def _options(self) -> bytes:
        """TCP options, some of them broken, to a multiple of four bytes."""
        sound = (
            b"\x01", struct.pack("!BBH", 2, 4, self.choice((100, 536, 1000, 1460))),
            b"\x04\x02", b"\x03\x03\x07", b"\x08\x0a" + bytes(8),
        )  # fmt: skip
        odd = (b"\x02\x03\x07", b"\x00", b"\x1e\x00", b"\x02\x04", b"\x02")
        number = self.randint(1, 4)
        if self._odd_options:
            options = b"".join(self.choice(sound + odd) for _ in range(number))
        else:
            options = b"".join(self.sample(sound, number))
        return (options + bytes(-len(options) % 4))[:40]
