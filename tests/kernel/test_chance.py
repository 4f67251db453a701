"""`random` in a kernel: how often, and that all classes of a policy see one draw."""

import math

from itmlang.pipeline import compile
from itmlang.source import Source
from tests.support import connections
from tests.support.kernel import Wire

PACKETS = 6000
# Six standard deviations: once in 500 million runs it is more by mere chance.
DEVIATIONS = 6
POLICY = """
policy p {
    at forward
    classify {
        torn when random < 33% and random >= 33%
        a when random < 33%
        b when random < 66%
        rare when random >= 99%
        c
    }
    process { torn { drop } }
}
policy q {
    at forward
    priority 1
    classify { half when not random < 50%  other }
    update { add protocol to @seldom when random < 1% }
}
set seldom: protocol timeout 1h
"""


def test_classes_share_one_draw(wire: Wire) -> None:
    compiled = compile(Source("chance.itm", POLICY))
    data = [
        connections.ip(connections.host(family, 1), connections.host(family, 2), connections.UDP,
                       connections.udp((1, 2)))
        for family in (4, 6)
    ]  # fmt: skip
    with wire.loaded(compiled.text.text) as exchange:
        for _ in range(PACKETS // 200):
            arrived = exchange.burst(data * 100, "forward", {2: 200})
            assert len(arrived[2]) == 200
        counted = wire.counted(compiled.ruleset)
    wanted = {
        "p class torn": 0, "p class a": 0.33, "p class b": 0.33, "p class rare": 0.01,
        "p class c": 0.33, "q class half": 0.5, "q class other": 0.5,
    }  # fmt: skip
    for name, share in wanted.items():
        room = DEVIATIONS * math.sqrt(PACKETS * share * (1 - share))
        assert abs(counted[name] - PACKETS * share) <= room, (name, counted)
    assert sum(n for name, n in counted.items() if name.startswith("p class")) == PACKETS
