"""What a tracked flow costs: bytes of kernel memory at 1 000 000 flows, and packets a second.

For each form of flow, by its fields and by connection, three lines of namespaces take turns: no
rules; a table that holds all flows already; and one that churns, because its entries live for
a second and each packet comes later than that, so that every one begins a flow anew. Memory is
what the kernel has more of (slabs it cannot reclaim, per-processor memory, vmalloc) when the
table is full than before the policy was loaded; other programs move it too. No
packet may be lost. One that found no room in its table is told of, as uncounted.

    python -m bench.state [--flows 1000000] [--slices 10] [--quick]

Needs root, a C compiler, and 4 GB of free memory at 1 000 000 flows. Connection tracking's limit
is the whole machine's: it is raised for so long, and put back.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from bench import wire
from bench.growth import LossError, compiled
from bench.wire import Line, Packet, Spread, Stream
from runtime import nft
from runtime.traffic import Namespace, TrafficError, set_sysctl

FORMS: Final = {"fields": "saddr, sport, daddr, dport", "connection": "connection"}
POLICY: Final = """\
policy state {{
    at forward
    flow conn by {key} timeout {timeout} max {room}
    classify {{
        short when conn.packets <= 10
        long
    }}
    log {{ count conn }}
}}
"""
TABLE: Final = "inet itm_state"
_MEMORY: Final = ("SUnreclaim", "Percpu", "VmallocUsed")
_FREE: Final = 4_000  # bytes of free memory for a flow
_CONNTRACK: Final = "net/netfilter/nf_conntrack_"
_LOOKS: Final = 60
_PASSES: Final = 6  # at most, until all flows are in


def memory() -> dict[str, int]:
    """Bytes, by the names of /proc/meminfo."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines}


def settled() -> int:
    """Bytes of what flows are made of, when it has stayed about the same for two seconds."""
    looks: list[int] = []
    for _ in range(_LOOKS):
        found = memory()
        looks.append(sum(found[name] for name in _MEMORY))
        if len(looks) > 4 and max(looks[-5:]) - min(looks[-5:]) < 1 << 20:
            break
        time.sleep(0.5)
    return looks[-1]


@contextmanager
def room_for(flows: int) -> Iterator[None]:
    """Let connection tracking hold so many, twice; afterwards it is as it was."""
    here, before = Namespace.here(), {}
    try:
        for name, wanted in (("max", 3 * flows), ("buckets", flows)):
            found = int(Path(f"/proc/sys/{_CONNTRACK}{name}").read_text())
            if found < wanted:
                set_sysctl(here, f"{_CONNTRACK}{name}", str(wanted))
                before[name] = found
        yield
    finally:
        for name, value in before.items():
            set_sysctl(here, f"{_CONNTRACK}{name}", str(value))
        here.close()


def uncounted(line: Line) -> int:
    with line.router.entered():
        return nft.counters(TABLE)["flow_conn_uncounted"][0]


def tracked(line: Line) -> int:
    """Connections that are tracked in the router."""
    with line.router.entered():
        return int(Path(f"/proc/sys/{_CONNTRACK}count").read_text())


def policy(form: str, timeout: str, room: int, folder: Path) -> str:
    """What itmc makes of it."""
    file = folder / "state.itm"
    file.write_text(POLICY.format(key=FORMS[form], timeout=timeout, room=room))
    return compiled(file)


def filled(line: Line, stream: Stream, flows: int) -> None:
    """Send until the table has every flow. Raises LossError."""
    for _ in range(_PASSES):
        before = uncounted(line)
        stream.send(flows)
        if uncounted(line) == before:
            return
    raise LossError(f"{uncounted(line) - before} of {flows} flows find no room, also at pass {_PASSES}")  # fmt: skip


@dataclass(frozen=True)
class Full:
    """A stream along a line whose table has all flows: how many bytes they take, and how many of them
    connection tracking knows."""

    stream: Stream
    taken: int
    connections: int


def full(form: str, flows: int, stream: Stream, folder: Path) -> Full:
    """Raises LossError."""
    line = stream.line
    timeouts(line, 3600)
    before = settled()
    line.load(policy(form, "1h", flows, folder))
    filled(line, stream, flows)
    taken, connections = settled() - before, tracked(line)
    if form == "connection" and connections != flows:
        raise LossError(f"{connections} connections are tracked, of {flows}")
    return Full(stream, taken, connections)


def timeouts(line: Line, seconds: int) -> None:
    """Of connection tracking in its router."""
    for kind in ("udp_timeout", "udp_timeout_stream"):
        set_sysctl(line.router, f"{_CONNTRACK}{kind}", str(seconds))


def timed(
    form: str, flows: int, slices: int, known: Full, none: Stream, churn: Stream, folder: Path
) -> dict[str, Any]:
    """Packets of known flows, of ever new ones, and without rules, in turns. Raises LossError."""
    timeouts(churn.line, 1)
    # Twice as much room: what has run out is collected once a second.
    churn.line.load(policy(form, "1s", 2 * flows, folder))
    churn.send(flows)
    time.sleep(1.5)  # all of them have run out: no packet below finds its flow
    streams = {"none": none, "full": known.stream, "churn": churn}
    missed = {name: uncounted(streams[name].line) for name in ("full", "churn")}
    costs: dict[str, list[float]] = {name: [] for name in streams}
    each = flows // slices
    for number in range(slices):
        for name in list(streams)[:: 1 if number % 2 else -1]:
            costs[name].append(streams[name].send(each) / each)
    for name, stream in streams.items():
        if stream.line.arrived() != stream.sent:
            raise LossError(
                f"{form}, {name}: {stream.sent} packets sent, {stream.line.arrived()} arrived"
            )
    missed = {name: uncounted(streams[name].line) - before for name, before in missed.items()}
    return {
        "flows": flows, "bytes": round(known.taken / flows), "connections": known.connections,
        "kpps": {name: round(1e-3 / median(found), 1) for name, found in costs.items()},
        "ratio": {
            name: Spread.of([n / c for n, c in zip(costs["none"], costs[name], strict=True)]).told()
            for name in costs
        },
        "uncounted": {name: many / (each * slices) for name, many in missed.items()},
    }  # fmt: skip


def measure(flows: int, slices: int) -> dict[str, Any]:
    """Raises LossError, TrafficError."""
    if memory()["MemAvailable"] < _FREE * flows:
        raise LossError(f"{flows} flows need {_FREE * flows >> 20} MB of free memory")
    with tempfile.TemporaryDirectory() as place:
        packets = (
            Packet(f"10.{128 + (n >> 16)}.{n >> 8 & 255}.{n & 255}", sport=1024 + n % 60_000)
            for n in range(flows)
        )
        file = wire.stored(packets, Path(place, "flows"))
        folder, program = Path(place), wire.compiled("packets", Path(place))
        with room_for(flows), ExitStack() as stack:

            def stream() -> Stream:
                line = stack.enter_context(wire.line())
                return stack.enter_context(Stream(line, program, file, wire.processor()))

            # Nothing is given back between these: that would take its time, and be measured.
            known = {}
            for form in FORMS:
                known[form] = full(form, flows, stream(), folder)
            forms = {
                form: timed(form, flows, slices, known[form], stream(), stream(), folder)
                for form in FORMS
            }
    return {"machine": wire.machine(), "slices": slices, "forms": forms}


def markdown(found: Mapping[str, Any]) -> str:
    rows = []
    for form, one in found["forms"].items():
        rows.append(
            [f"`flow by {FORMS[form]}`", one["flows"], one["bytes"]]
            + [str(Spread(*one["ratio"][name])) for name in ("full", "churn")]
            + [f"{one['uncounted']['churn']:.2%}"]
        )
    columns = [
        "",
        "flows",
        "bytes a flow",
        "packets a second, all known",
        "each one new",
        "uncounted",
    ]
    lines = [
        "# Tracked flows", "",
        "Packets a second as ratios to no rules, median (least to greatest) of "
        f"{found['slices']} slices in turn; {wire.described(found['machine'])}. "
        "Written by `python -m bench.state`.", "",
        *wire.table(columns, rows),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--flows", type=int, default=1_000_000)
    parser.add_argument("--slices", type=int, default=10)
    wire.options(parser, "few flows")
    given = parser.parse_args(arguments)
    if given.quick:
        given.flows, given.slices = 10_000, 2
    try:
        found = measure(given.flows, given.slices)
    except (LossError, TrafficError) as error:
        print(error, file=sys.stderr)
        return 2
    wire.kept("state", found, markdown(found), None, wire.folder(given))
    return 0


if __name__ == "__main__":
    sys.exit(main())
