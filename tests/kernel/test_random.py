"""Random policies and random packets: the kernel and the semantics say the same.

Of each packet the verdict and every byte, of each policy every counter. Seeded, so
that a failure comes back: ITM_SEED chooses the files, ITM_POLICIES makes the run
longer (200 files, 20 000 packets are the nightly form). Not hypothesis: loading and
sending takes 300 ms a file, so its shrinking would take minutes. A file that fails is
sent again instead, with fewer packets each time, which finds the first one that goes
wrong.
"""

import os
import time
from collections import Counter
from collections.abc import Iterable

import pytest

from itmlang.diagnostics import CompileError
from itmlang.packet import Packet
from itmlang.pipeline import Compiled, compile
from itmlang.semantics import Host
from itmlang.source import Source
from tests.support.kernel import Locals, Wire, counted, placed, side_of, through
from tests.support.language import Chance, Wants

FILES = int(os.environ.get("ITM_POLICIES", "16"))
SEED = int(os.environ.get("ITM_SEED", "2003"))
PACKETS = 100
# Where packets go, and the hooks where policies can stand to see them.
PATHS = {
    "forward": ("prerouting", "forward", "postrouting"),
    "devices": ('ingress "eth0"', 'ingress "eth1"'),
    "in": ("prerouting", "input"),
    "out": ("output", "postrouting"),
}
# A file of which nothing is loaded: the simplifier or the kernel's bounds forbid it.
_REFUSED = {"E041"}
_SOON = 0.7  # seconds; a flow stays over a rate for one


class Disagreement(AssertionError):
    pass


def compiled(random: Chance, wants: Wants, hooks: tuple[str, ...]) -> Compiled:
    while True:
        text = random.file(wants, hooks)
        try:
            return compile(Source("random", text))
        except CompileError as error:
            codes = {d.code for d in error.diagnostics if d.is_error}
            assert codes <= _REFUSED, f"{[d.message for d in error.diagnostics]}\n{text}"


def foretold(host: Host, packets: Iterable[bytes], path: str) -> list[tuple[Packet, bool]]:
    """What the semantics make of the packets: each as it is then, and whether it passes."""
    found = []
    for number, data in enumerate(packets):
        packet = placed(Packet(bytearray(data)), path)
        visits = through(host, packet, path, number / 10_000)
        found.append((packet, not any(visit.outcome.dropped for visit in visits)))
    return found


def exchange(wire: Wire, file: Compiled, packets: list[bytes], path: str) -> Host:
    """Send the packets; raise `Disagreement` where the kernel and the semantics differ."""
    for attempt in range(3):
        host = Host(file.policies)
        found = foretold(host, packets, path)
        passing = [packet for packet, passes in found if passes]
        with wire.loaded(file.text.text) as sent, Locals(wire) as local:
            start = time.monotonic()
            if path == "in":
                _in(wire, packets, passing, local)
            else:
                sides = [side_of(bytes(packet.data)) for packet in passing]
                arrived = sent.burst(packets, path, Counter(sides))
                for side in (1, 2):
                    wanted = [
                        bytes(p.data) for p, s in zip(passing, sides, strict=True) if s == side
                    ]
                    _compare(wanted, arrived[side], f"at side {side}")
            late = time.monotonic() - start > _SOON
            got, wanted_counts = wire.counted(file.ruleset), counted(host)
        # What the simplifier found to never happen has no counter.
        differ = {
            name: (got.get(name, 0), wanted_counts.get(name, 0))
            for name in got | wanted_counts
            if got.get(name, 0) != wanted_counts.get(name, 0)
        }
        if not differ:
            return host
        if not late or attempt == 2:
            raise Disagreement(f"counters (kernel, semantics): {differ}")
    raise AssertionError("unreachable")


def _in(wire: Wire, packets: list[bytes], passing: list[Packet], local: Locals) -> None:
    """Packets to the manager itself, as raw sockets there hear them."""
    for data in packets:
        wire.send(data, "in")
    wanted: dict[tuple[int, int], list[tuple[bytes, int | None]]] = {}
    for packet in passing:
        assert packet.protocol is not None
        key = packet.family, packet.protocol
        data = bytes(packet.data)
        heard = (data, None) if packet.family == 4 else (data[packet.transport :], packet.tos)
        wanted.setdefault(key, []).append(heard)
    got: dict[tuple[int, int], list[tuple[bytes, int | None]]] = {}
    deadline = time.monotonic() + 1
    while True:
        for key, several in local.heard().items():
            got.setdefault(key, []).extend(several)
        if sum(map(len, got.values())) >= len(passing) or time.monotonic() > deadline:
            break
        time.sleep(0.002)
    for key in wanted | got:
        _compare(wanted.get(key, []), got.get(key, []), f"of {key}")


def _compare(wanted: list, got: list, where: str) -> None:  # type: ignore[type-arg]
    for number, (one, other) in enumerate(zip(wanted, got, strict=False)):
        if one != other:
            raise Disagreement(f"packet {number} {where}: {_hex(other)} came, not {_hex(one)}")
    if len(wanted) != len(got):
        raise Disagreement(f"{len(got)} packets came {where}, not {len(wanted)}")


def _hex(one: object) -> str:
    return one.hex() if isinstance(one, bytes) else f"{one!r}"


def first_wrong(wire: Wire, file: Compiled, packets: list[bytes], path: str) -> str:
    """Which packet goes wrong first: the shortest beginning of the packets that does."""
    low, high = 0, len(packets)
    message = ""
    while high - low > 1:
        middle = (low + high) // 2
        try:
            exchange(wire, file, packets[:middle], path)
            low = middle
        except Disagreement as error:
            high, message = middle, str(error)
    last = packets[high - 1].hex() if packets else ""
    return f"with packet {high - 1}, {last}: {message}"


def run(wire: Wire, seed: int) -> tuple[int, int, int, str]:
    """One file and its packets; (packets, those in a class, policies, text).

    Where classes are looked up, they are asked one by one as well: the same must come of it.
    """
    random = Chance(seed)
    route = random.choice(("forward", "forward", "forward", "devices", "in", "out"))
    path = "forward" if route == "devices" else route
    hooks = PATHS[route]
    tracked = route != "devices" and random.some(0.35)
    lossless = tracked and random.some(0.7)
    connections = lossless and random.some(0.6)
    turned = not tracked and route == "forward" and random.some(0.5)
    wants = Wants(tracked, lossless, connections, turned)
    file = compiled(random, wants, hooks)
    packets = [random.packet(wants, path) for _ in range(PACKETS)]
    plain = compile(file.source, optimisations=())
    for form in [file] if file.text.text == plain.text.text else [plain, file]:
        try:
            host = exchange(wire, form, packets, path)
        except Disagreement as error:
            pytest.fail(
                f"seed {seed}, path {path}, optimised {sorted(form.optimisations)}: {error}\n"
                f"{first_wrong(wire, form, packets, path)}\n{file.source.text}\n{form.text.text}"
            )
    classified = sum(sum(state.packets.values()) for state in host.states.values())
    return len(packets), classified, len(file.policies), file.text.text


def test_kernel_and_semantics_agree(wire: Wire) -> None:
    total, classified, policies = 0, 0, 0
    texts = []
    for number in range(FILES):
        packets, several, loaded, text = run(wire, SEED + number)
        total, classified, policies = total + packets, classified + several, policies + loaded
        texts.append(text)
    assert classified > total / 5
    tables = sum("\tmap classes_" in text or ".classes_" in text for text in texts)
    assert tables > FILES / 8, "hardly any classes are looked up"
    print(f"{policies} policies in {FILES} files, {total} packets, "
          f"{classified} times in a class, {tables} files with tables, all agree")  # fmt: skip
