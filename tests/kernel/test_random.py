"""Random policies and random packets: the kernel and the semantics say the same.

Seeded, so that a failure comes back; ITM_POLICIES makes the run longer.
"""

import os
from random import Random

from itmlang.diagnostics import CompileError
from itmlang.packet import Header, Packet
from itmlang.pipeline import Compiled, compile
from itmlang.semantics import State
from itmlang.source import Source
from tests.support.frames import shaped
from tests.support.kernel import Wire, placed, through
from tests.test_simplify import INTERESTS, LEAVES, SHAPES

POLICIES = int(os.environ.get("ITM_POLICIES", "16"))
PACKETS = 25
KEYS = ("saddr", "sport", "saddr, dport", "dport, sport", "protocol", "family, sport", "in, dport")
CLASSES = ("a", "b", "c")
NETWORKS = {4: (0x0A000100, 0x0A000201), 6: (0xFD000001 << 96, (0xFD000002 << 96) + 1)}


def _here(text: str) -> str:
    """The texts' addresses, moved to the networks of the test's hosts."""
    return text.replace("10.0.0.", "10.0.1.").replace("fd00::", "fd00:1::")


def _condition(random: Random, depth: int) -> str:
    choice = random.random()
    if depth == 0 or choice < 0.3:
        return _here(random.choice([leaf for leaf in LEAVES if "mark" not in leaf]))
    if choice < 0.5:
        return f"not ({_condition(random, depth - 1)})"
    word = random.choice((" and ", " or "))
    return "(" + word.join(_condition(random, depth - 1) for _ in range(random.randint(2, 3))) + ")"


def _policy(random: Random) -> Compiled:
    while True:
        flows = " ".join(f"flow {name} by {random.choice(KEYS)}" for name in "fgn")
        rules = " ".join(f"{name} when {_condition(random, 3)}" for name in CLASSES)
        text = (
            f"policy p {{ at forward interest {{ {_here(random.choice(INTERESTS))} }} {flows} "
            f"classify {{ {rules} }} log {{ count f count g }} }}"
        )
        try:
            return compile(Source("random", text))
        except CompileError as error:  # too deep for the kernel
            assert {d.code for d in error.diagnostics if d.is_error} == {"E041"}


def _packet(random: Random) -> bytes:
    family = random.choice((4, 6))
    network, destination = NETWORKS[family]
    header = Header(
        random.choice((6, 6, 17, 1 if family == 4 else 58, 132, 47)),
        (family, network + random.randint(1, 4)),
        (family, destination),
        random.choice((0, 1, 2, 3, 80)),
        random.choice((0, 1, 2, 3, 80)),
        flags=random.choice((None, 0, 1, 2, 4, 16, 18)),
        tos=random.choice((0, 1, 16, 0xB8, 255)),
        ttl=random.choice((2, 5, 64, 65)),
        length=random.choice((None, 100)),
    )
    return shaped(bytes(header.build().data), random.choice(SHAPES[family]))


def test_kernel_and_semantics_agree(wire: Wire) -> None:
    random = Random(2003)
    classified = 0
    for _ in range(POLICIES):
        compiled = _policy(random)
        (policy,) = compiled.policies
        states, counted = {"p": State.of(policy)}, dict.fromkeys(CLASSES, 0)
        with wire.loaded(compiled.text.text) as exchange:
            for number in range(PACKETS):
                data = _packet(random)
                packet = placed(Packet(bytearray(data)), "forward")
                (visit,) = through([policy], states, packet, "forward", number / 1000)
                if visit.outcome.name is not None:
                    counted[visit.outcome.name] += 1
                    classified += 1
                exchange.pass_on(data, "forward", 0, True)
                kernel = wire.counters("itm_p")
                assert {name: kernel[f"class_{name}"] for name in CLASSES} == counted, (
                    f"packet {number}: {data.hex()}\n{compiled.source.text}"
                )
    assert classified > POLICIES * PACKETS / 5
    print(f"{POLICIES} policies, {POLICIES * PACKETS} packets, {classified} in a class, all agree")
