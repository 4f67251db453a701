"""Each case four times: its golden text, `nft -c`, the semantics, a real kernel."""

import time
from contextlib import nullcontext
from dataclasses import replace

import pytest

from itmlang.marks import CLASS_BITS
from itmlang.packet import Packet
from itmlang.pipeline import Compiled
from itmlang.semantics import Host
from runtime.aside import served
from runtime.traffic import Namespace
from tests.support.cases import Case, Send, cases, printed, unmet
from tests.support.frames import routed, wrong_checksums
from tests.support.kernel import Exchange, Wire, counted, nft_check, placed, through
from tests.support.serving import in_python, xt_text

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
    best, *plain = case.forms
    assert printed(best, case.blocks) == case.golden
    if case.linear is not None:
        blocks, golden = case.linear
        assert plain, "without optimisations it is the same"
        assert printed(plain[0], blocks) == golden


@each_case
def test_nft_check(case: Case, empty_namespace: Namespace) -> None:
    with empty_namespace.entered():
        # Of the two forms of rules to queues every kernel that has queues takes this one.
        for compiled in case.forms:
            assert nft_check(xt_text(compiled.ruleset)) == ""


@each_case
def test_semantics(case: Case) -> None:
    host = case.host()
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
    for compiled in case.forms:
        for _ in range(MOST_RUNS):
            problems, latest = _before_the_kernel(case, compiled, wire)
            if not problems or latest < LATE:
                break
            # A packet took so long that the semantics may have judged it at another time
            # than the kernel: this run says nothing of what depends on time.
        assert not problems, "\n".join(problems)


@each_case
def test_in_python(case: Case, wire: Wire) -> None:
    """The same policies forced to Python: the same verdicts, bytes and counts; or refused."""
    moved, refused = in_python(case.compiled())
    if refused:
        assert moved is None, refused
        return
    assert moved is not None
    for _ in range(MOST_RUNS):
        problems, latest = _before_python(case, moved, wire)
        if not problems or latest < LATE:
            break
    assert not problems, "\n".join(problems)


def _before_python(case: Case, moved: Compiled, wire: Wire) -> tuple[list[str], float]:
    """What Python did otherwise than the semantics; the longest that a packet took."""
    host = Host(case.compiled().policies)
    problems: list[str] = []
    latest, start = 0.0, time.monotonic()
    with (
        wire.loaded(xt_text(moved.ruleset)) as exchange,
        served(wire.network.manager, moved, {}) as engines,
    ):
        for written in case.sends:
            # On the way to Python these bits of the mark are itm's.
            send = replace(written, mark=written.mark & ~CLASS_BITS)
            time.sleep(send.wait)
            for number in range(1, send.count + 1):
                packet = placed(send.packet(), send.path)
                before = time.monotonic()
                visits = through(host, packet, send.path, before - start)
                passes = all(not visit.outcome.dropped for visit in visits)
                problems += [
                    f"{send.place}, packet {number}: {problem}"
                    for problem in _passed(exchange, send, packet, passes)
                ]
                latest = max(latest, time.monotonic() - before)
                python = {name: dict(one.state.packets) for name, (one,) in engines.items()}
                wanted = {name: dict(state.packets) for name, state in host.states.items()}
                if python != wanted:
                    problems.append(f"{send.place}, packet {number}: {python}, not {wanted}")
                    break
        stray = exchange.stray()
        problems += [f"{stray} packets too many"] if stray else []
        unserved = {k: n for k, n in wire.counted(moved.ruleset).items() if " unserved " in k and n}
        problems += [f"not served: {unserved}"] if unserved else []
    return problems, latest


def _before_the_kernel(case: Case, compiled: Compiled, wire: Wire) -> tuple[list[str], float]:
    """What the kernel did otherwise than the semantics; the longest that a packet took."""
    host = case.host()
    problems: list[str] = []
    latest, start = 0.0, time.monotonic()
    # The kernel looks for connections that have ended once a tick (nf_conncount.c).
    tick = TICK if " ct count " in compiled.text.text else 0.0
    with (
        wire.loaded(xt_text(compiled.ruleset)) as exchange,
        served(wire.network.manager, compiled, case.handlers()) if case.queued else nullcontext(),
    ):
        for send in case.sends:
            time.sleep(send.wait)
            for number in range(1, send.count + 1):
                time.sleep(tick)
                packet = placed(send.packet(), send.path)
                before = time.monotonic()
                visits = through(host, packet, send.path, before - start)
                passes = all(not visit.outcome.dropped for visit in visits)
                where = f"{send.place}, packet {number}"
                problems += [
                    f"{where}: {problem}" for problem in _passed(exchange, send, packet, passes)
                ]
                latest = max(latest, time.monotonic() - before)
                counters = wire.counted(compiled.ruleset)
                wanted = counted(host) | {name: 0 for name in counters if " unserved " in name}
                if counters != wanted:
                    problems.append(f"{where}: the kernel counts {counters}, not {wanted}")
                    break
        stray = exchange.stray()
        problems += [f"{stray} packets too many"] if stray else []
    return problems, latest


def _passed(exchange: Exchange, send: Send, packet: Packet, passes: bool) -> list[str]:
    """Send a packet; what came of it otherwise than the semantics say, of which `packet` comes."""
    leaving = bytes(packet.data)
    arrived = exchange.pass_on(send.data, send.path, send.mark, passes, leaving)
    if (arrived is not None) != passes:
        return [f"{'dropped' if passes else 'passed'} by the kernel"]
    if arrived is None:
        return []
    if arrived.traffic_class is None:
        problems = [_difference(arrived.data, leaving)] if arrived.data != leaving else []
        return problems + wrong_checksums(arrived.data)
    problems = []
    if arrived.traffic_class != packet.tos:
        problems.append(f"traffic class {arrived.traffic_class:#04x}, not {packet.tos:#04x}")
    if arrived.data != leaving[40:]:
        problems.append(_difference(arrived.data, leaving[40:]))
    return problems


def _difference(got: bytes, wanted: bytes | bytearray) -> str:
    places = [i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b]
    return (f"bytes {places} differ ({len(got)} and {len(wanted)} long): "
            f"{got.hex()} is not {bytes(wanted).hex()}")  # fmt: skip
