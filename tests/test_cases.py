"""Each case four times: its golden text, `nft -c`, the semantics, a real kernel."""

import time

import pytest

from itmlang.semantics import Host
from runtime.traffic import Namespace
from tests.support.cases import Case, cases, printed, unmet
from tests.support.frames import routed, wrong_checksums
from tests.support.kernel import Wire, counted, nft_check, placed, through

# Seconds that a packet may take for the semantics and the kernel to judge it at one time,
# and how often a case is run for a run without a later one.
LATE, MOST_RUNS = 0.04, 8
TICK = 0.012  # seconds, longer than a tick of a kernel with HZ=100

each_case = pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)


@each_case
def test_golden(case: Case, request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--bless"):
        case.bless()
        return
    assert case.blocks, "name the chains to show: `--- nftables classify`"
    assert printed(case.compiled(), case.blocks) == case.golden


@each_case
def test_nft_check(case: Case, empty_namespace: Namespace) -> None:
    with empty_namespace.entered():
        assert nft_check(case.compiled().text.text) == ""


@each_case
def test_semantics(case: Case) -> None:
    host = Host(case.compiled().policies)
    now, problems = 0.0, []
    for send in case.sends:
        now += send.wait
        for number in range(1, send.count + 1):
            packet, bare = placed(send.packet(), send.path), send.packet()
            visits = through(host, packet, send.path, now)
            if packet.ttl != bare.ttl:
                routed(bare.data)
            problems += [
                f"{send.place}, packet {number}: {problem}"
                for problem in unmet(send.expectations, visits, bare, packet)
            ]
    assert not problems, "\n".join(problems)


@each_case
def test_kernel(case: Case, wire: Wire) -> None:
    for _ in range(MOST_RUNS):
        problems, latest = _before_the_kernel(case, wire)
        if not problems or latest < LATE:
            break
        # A packet took so long that the semantics may have judged it at another time than
        # the kernel: this run says nothing of what depends on time.
    assert not problems, "\n".join(problems)


def _before_the_kernel(case: Case, wire: Wire) -> tuple[list[str], float]:
    """What the kernel did otherwise than the semantics; the longest that a packet took."""
    compiled = case.compiled()
    host = Host(compiled.policies)
    problems: list[str] = []
    latest, start = 0.0, time.monotonic()
    # The kernel looks for connections that have ended once a tick (nf_conncount.c).
    tick = TICK if " ct count " in compiled.text.text else 0.0
    with wire.loaded(compiled.text.text) as exchange:
        for send in case.sends:
            time.sleep(send.wait)
            for number in range(1, send.count + 1):
                time.sleep(tick)
                packet = placed(send.packet(), send.path)
                before = time.monotonic()
                visits = through(host, packet, send.path, before - start)
                passes = all(not visit.outcome.dropped for visit in visits)
                leaving = bytes(packet.data)
                arrived = exchange.pass_on(send.data, send.path, send.mark, passes, leaving)
                latest = max(latest, time.monotonic() - before)
                where = f"{send.place}, packet {number}"
                if (arrived is not None) != passes:
                    problems.append(f"{where}: {'dropped' if passes else 'passed'} by the kernel")
                elif arrived is not None and arrived.traffic_class is not None:
                    if arrived.traffic_class != packet.tos:
                        problems.append(f"{where}: traffic class {arrived.traffic_class:#04x}, "
                                        f"not {packet.tos:#04x}")  # fmt: skip
                    if arrived.data != leaving[40:]:
                        problems.append(f"{where}: {_difference(arrived.data, leaving[40:])}")
                elif arrived is not None:
                    if arrived.data != leaving:
                        problems.append(f"{where}: {_difference(arrived.data, leaving)}")
                    problems += [f"{where}: {wrong}" for wrong in wrong_checksums(arrived.data)]
                counters = wire.counted(compiled.ruleset)
                if counters != counted(host):
                    problems.append(f"{where}: the kernel counts {counters}, not {counted(host)}")
                    break
        stray = exchange.stray()
        problems += [f"{stray} packets too many"] if stray else []
    return problems, latest


def _difference(got: bytes, wanted: bytes | bytearray) -> str:
    places = [i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b]
    return (f"bytes {places} differ ({len(got)} and {len(wanted)} long): "
            f"{got.hex()} is not {bytes(wanted).hex()}")  # fmt: skip
