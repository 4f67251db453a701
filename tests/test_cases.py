"""Each case four times: its golden text, `nft -c`, the semantics, a real kernel."""

import time

import pytest

from itmlang.semantics import State
from runtime.traffic import Namespace
from tests.support.cases import Case, cases, printed, unmet
from tests.support.frames import routed, wrong_checksums
from tests.support.kernel import Wire, nft_check, placed, through

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
    policies = case.compiled().policies
    states = {policy.name: State.of(policy) for policy in policies}
    now, problems = 0.0, []
    for send in case.sends:
        now += send.wait
        for number in range(1, send.count + 1):
            packet, bare = placed(send.packet(), send.path), send.packet()
            visits = through(policies, states, packet, send.path, now)
            if packet.ttl != bare.ttl:
                routed(bare.data)
            problems += [
                f"{send.place}, packet {number}: {problem}"
                for problem in unmet(send.expectations, visits, bare, packet)
            ]
    assert not problems, "\n".join(problems)


@each_case
def test_kernel(case: Case, wire: Wire) -> None:
    compiled = case.compiled()
    states = {policy.name: State.of(policy) for policy in compiled.policies}
    counted = {(p.name, c): 0 for p in compiled.policies for c in p.classes}
    problems: list[str] = []
    start = time.monotonic()
    with wire.loaded(compiled.text.text) as exchange:
        for send in case.sends:
            time.sleep(send.wait)
            for number in range(1, send.count + 1):
                packet = placed(send.packet(), send.path)
                visits = through(
                    compiled.policies, states, packet, send.path, time.monotonic() - start
                )
                passes = all(visit.outcome.verdict != "drop" for visit in visits)
                for visit in visits:
                    if visit.outcome.name is not None:
                        counted[visit.policy.name, visit.outcome.name] += 1
                arrived = exchange.pass_on(send.data, send.path, send.mark, passes)
                where = f"{send.place}, packet {number}"
                if (arrived is not None) != passes:
                    problems.append(f"{where}: {'dropped' if passes else 'passed'} by the kernel")
                elif arrived is not None and arrived.traffic_class is not None:
                    if arrived.traffic_class != packet.tos:
                        problems.append(f"{where}: traffic class {arrived.traffic_class:#04x}, "
                                        f"not {packet.tos:#04x}")  # fmt: skip
                elif arrived is not None:
                    if arrived.data != bytes(packet.data):
                        problems.append(f"{where}: {_difference(arrived.data, packet.data)}")
                    problems += [f"{where}: {wrong}" for wrong in wrong_checksums(arrived.data)]
                real = {
                    (policy.name, name): counters[f"class_{name}"]
                    for policy in compiled.policies
                    for counters in (wire.counters(f"itm_{policy.name}"),)
                    for name in policy.classes
                }
                if real != counted:
                    problems.append(f"{where}: the kernel counts {real}, not {counted}")
                    counted = real
        stray = exchange.stray()
    assert not problems, "\n".join(problems)
    assert not stray, f"{stray} packets too many"


def _difference(got: bytes, wanted: bytes | bytearray) -> str:
    places = [i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b]
    return (f"bytes {places} differ ({len(got)} and {len(wanted)} long): "
            f"{got.hex()} is not {bytes(wanted).hex()}")  # fmt: skip
