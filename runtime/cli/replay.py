"""`itmc replay`: a capture through the policies; what each class and flow got of it. Needs no root."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Final

import click

from itmlang.ir import Flow
from itmlang.packet import MalformedError, Packet
from itmlang.semantics import PATHS, Host, State
from itmlang.tables import Entry
from itmlang.values import duration_text
from runtime.cli.files import compiled
from runtime.cli.output import as_json, say, table, warn
from runtime.errors import UsageError
from runtime.pcap import Capture, CaptureError, CaptureWriter
from runtime.simulated import doer

# Packets between two looks at the progress.
_STRIDE: Final = 4096
_LONG: Final = 8 << 20  # bytes of a capture that is worth a progress bar


@dataclass
class _Tally:
    """What became of a capture's packets."""

    packets: int = 0
    bytes: int = 0
    other: int = 0  # not IP
    malformed: int = 0
    cut: int = 0  # too short to be a packet, because the capture kept only a part
    seconds: float = 0.0  # between the first packet and the last
    verdicts: Counter[str] = field(default_factory=Counter)
    broken: str = ""  # why the capture ended too early


@click.command()
@click.argument("file", type=click.Path())
@click.argument("capture", type=click.Path(), metavar="PCAP")
@click.option("-w", "--write", type=click.Path(), metavar="OUT", help="Write what would leave.")
@click.option(
    "--path", type=click.Choice(list(PATHS)), default="forward", show_default=True,
    help="forward: routed through this host; in: for it; out: from it.",
)  # fmt: skip
@click.option("--in", "input_", metavar="NAME", help="The interface where the packets came in.")
@click.option("--out", "output", metavar="NAME", help="The interface where they leave.")
@click.option("--top", type=click.IntRange(0), default=5, show_default=True, metavar="N",
              help="Show the N largest entries of each flow.")  # fmt: skip
@click.option("--json", "in_json", is_flag=True, help="As JSON.")
def command(
    file: str,
    capture: str,
    write: str | None,
    path: str,
    input_: str | None,
    output: str | None,
    top: int,
    in_json: bool,
) -> None:
    """Run the packets of a capture (pcap, pcapng) through the policies of FILE.

    Time is the capture's. Nothing is routed and TTLs stay; without --in and --out,
    packets have no interfaces. PCAP may be - for standard input. Packets that are cut short or malformed are counted, and copied
    to OUT as they are; so is what is not IP.
    """
    if write is not None and write == capture and write != "-":
        raise UsageError("the rewritten capture needs a file of its own")
    result = compiled(file)
    policies = result.policies
    host, tally = Host(policies, do=doer(policies, result.source.name)), _Tally()
    ends = (None if path == "out" else input_, None if path == "in" else output)
    try:
        with Capture(capture) as packets:
            writing = CaptureWriter(write, packets) if write else nullcontext()
            with writing as writer, _progress(packets) as advance:
                _replay(host, packets, path, ends, writer, tally, advance)
    except CaptureError as error:
        raise UsageError(error.message, error.help) from error
    if in_json:
        as_json(_json(host, tally, top))
    elif write != "-":
        _show(host, tally, top)
    if tally.broken:
        warn(f"{tally.broken}; {tally.packets} packets came before")


def _replay(
    host: Host,
    packets: Capture,
    path: str,
    ends: tuple[str | None, str | None],
    writer: CaptureWriter | None,
    tally: _Tally,
    advance: Any,
) -> None:
    """The loop; written for speed, since captures are long."""
    entering, leaving = ends
    pass_on, verdicts = host.pass_on, tally.verdicts
    number = octets = accepted = 0
    start, now = None, 0.0
    try:
        for captured in packets:
            number += 1
            if not number % _STRIDE:
                advance()
            octets += captured.length
            network = captured.network
            if start is None:
                start = captured.time
            # Packets of several interfaces may stand out of order: time never goes back.
            now = max(now, (captured.time - start) / 1e9)
            if network is None:
                tally.other += 1
            else:
                try:
                    packet = Packet(bytearray(network), entering, leaving)
                except MalformedError:
                    if captured.cut:
                        tally.cut += 1
                    else:
                        tally.malformed += 1
                else:
                    verdict = pass_on(packet, path, now)
                    if verdict == "accept":
                        accepted += 1
                        network = packet.data  # type: ignore[assignment]
                    else:
                        verdicts[verdict] += 1
                        continue
            if writer is not None:
                writer.write(captured, network)
    except CaptureError as error:
        # What came before stays usable.
        if not number:
            raise
        tally.broken = error.message
    tally.packets, tally.bytes, tally.seconds = number, octets, now
    verdicts["accept"] = accepted


@contextmanager
def _progress(packets: Capture) -> Iterator[Any]:
    """A bar on the terminal for a long capture."""
    size = packets.size
    if size is None or size < _LONG or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("replaying", total=size)
        yield lambda: bar.update(task, completed=packets.position)


def _show(host: Host, tally: _Tally, top: int) -> None:
    say(f"{tally.packets:,} packets, {tally.bytes:,} bytes, {tally.seconds:.3f} s")
    parts = [f"{n:,} {verb}" for verb, n in (
        ("accepted", tally.verdicts["accept"]), ("dropped", tally.verdicts["drop"]),
        ("rejected", tally.verdicts["reject"]), ("not IP", tally.other),
        ("malformed", tally.malformed), ("cut short by the capture", tally.cut),
    ) if n]  # fmt: skip
    say(", ".join(parts) + "\n")
    for policy in host.policies:
        state = host.states[policy.name]
        say(f"{policy.name} at {', '.join(policy.hooks)}")
        rows = [(c, state.packets[c], state.bytes[c]) for c in policy.classes]
        table(("class", "packets", "bytes"), rows)
        for flow in policy.flows:
            _show_flow(state, flow, top)
        for one in policy.learned:
            held = host.sets[one.name].held(tally.seconds)
            say(f"  @{one.name}: {held} of {one.size}")
        say("")


def _show_flow(state: State, flow: Flow, top: int) -> None:
    found = state.flows[flow.name]
    entries = sum(len(part) for part in found.entries.values())
    if not entries and not found.uncounted:
        return
    say(f"  {flow.name}: {entries:,} flows" + (
        f", {found.uncounted:,} packets of others found no room" if found.uncounted else ""))  # fmt: skip
    rows = [
        (*key, entry.packets, entry.bytes, _age(entry)) for key, entry in _top(state, flow, top)
    ]
    if rows:
        table((*(f.name for f in flow.key), "packets", "bytes", "lasted"), rows)


def _age(entry: Entry) -> str:
    return duration_text(round((entry.last - entry.first) * 1000))


def _top(state: State, flow: Flow, top: int) -> list[tuple[tuple[str, ...], Entry]]:
    """The largest entries of a flow by bytes, their keys as text."""
    every = [item for part in state.flows[flow.name].entries.values() for item in part.items()]
    every.sort(key=lambda item: -item[1].bytes)
    return [
        (
            tuple(f.type.text(v).strip('"') for f, v in zip(flow.key, key, strict=True)),  # type: ignore[arg-type]
            entry,
        )
        for key, entry in every[:top]
    ]


def _json(host: Host, tally: _Tally, top: int) -> dict[str, Any]:
    """The stable schema of `--json`."""
    policies = []
    for policy in host.policies:
        state = host.states[policy.name]
        flows = [
            {
                "name": flow.name,
                "key": [f.name for f in flow.key],
                "entries": sum(len(part) for part in state.flows[flow.name].entries.values()),
                "uncounted": state.flows[flow.name].uncounted,
                "top": [
                    {"key": list(key), "packets": e.packets, "bytes": e.bytes}
                    for key, e in _top(state, flow, top)
                ],
            }
            for flow in policy.flows
        ]
        classes = [
            {"name": c, "packets": state.packets[c], "bytes": state.bytes[c]}
            for c in policy.classes
        ]
        policies.append({"name": policy.name, "classes": classes, "flows": flows})
    return {
        "schema": 1,
        "packets": tally.packets,
        "bytes": tally.bytes,
        "seconds": tally.seconds,
        "accepted": tally.verdicts["accept"],
        "dropped": tally.verdicts["drop"],
        "rejected": tally.verdicts["reject"],
        "not_ip": tally.other,
        "malformed": tally.malformed,
        "cut": tally.cut,
        "ended_early": tally.broken,
        "policies": policies,
    }
