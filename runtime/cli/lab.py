"""`itmc lab`: a policy between a client and a server, with real TCP, in a throwaway network."""

import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import click

from itmlang.packet import Packet
from itmlang.pipeline import Compiled
from itmlang.semantics import at_hook
from itmlang.values import IPV4, address_text
from runtime.apply import apply
from runtime.cli.files import compiled, file_argument
from runtime.cli.output import table
from runtime.errors import MachineError, UsageError
from runtime.status import flow_counts, status
from runtime.units import unit_of

_SIZES = "1KB,10KB,50KB,200KB,1MB"
_UNITS = {"KB": 1000, "MB": 1_000_000, "B": 1}
_LARGEST = 50_000_000


@click.command()
@file_argument
@click.option("--sizes", default=_SIZES, show_default=True, help="Sizes of the downloads.")
@click.option("--topology", type=click.Choice(["line"]), default="line",
              help="line: client - traffic manager - server.")  # fmt: skip
def command(file: str | None, sizes: str, topology: str) -> None:
    """Run real TCP through FILE's policies and show what was marked and counted.

    Client, traffic manager and server are network namespaces of their own that
    vanish with this command. Each size is downloaded once over IPv4, once over IPv6.
    """
    result = compiled(file)
    wanted = [_size(text) for text in sizes.split(",")]
    from runtime.lab import LabError
    from runtime.traffic import TrafficError

    try:
        _run(result, wanted)
    except (LabError, TrafficError) as error:
        raise MachineError(str(error), "the lab needs root and the kernel's veth") from error


def _size(text: str) -> int:
    """A size such as `10KB`, in bytes."""
    stripped = text.strip()
    unit = next((u for u in _UNITS if stripped.endswith(u)), "")
    digits = stripped.removesuffix(unit).strip()
    size = int(digits) * _UNITS.get(unit, 1) if digits.isdecimal() and len(digits) < 12 else 0
    if not 0 < size <= _LARGEST:
        raise UsageError(f"`{text}` is no size", "sizes such as 10KB or 1MB, up to 50MB")
    return size


def _run(result: Compiled, sizes: Sequence[int]) -> None:
    from runtime.lab import Network, run_flows

    with tempfile.TemporaryDirectory() as folder, Network() as network:
        # The lab's policies are nobody else's business.
        os.environ["ITM_STATE_DIR"] = folder
        with network.manager.entered():
            apply(unit_of(result, result.source.name))
        records = run_flows(network, sizes)
        with network.manager.entered():
            counted = {p.name: flow_counts(p.name) for p in result.policies}
            policies = status()
    click.echo("client 10.0.1.1, fd00:1::1 - traffic manager - server 10.0.2.1, fd00:2::1\n")
    _show_flows(result, records, counted)
    for policy in policies:
        hooks = ", ".join(hook for hook, _ in policy.hooks)
        click.echo(f"{policy.name} at {hooks}, as the kernel counted it:")
        rows = [(c.name, c.packets, c.bytes) for c in policy.classes]
        table(("class", "packets", "bytes"), rows)
    sent = sum(len(r.forward) + len(r.backward) for r in records)
    click.echo(f"{sent} packets on the wire, in both directions of {len(records)} connections")


def _show_flows(
    result: Compiled, records: Sequence[Any], counted: Mapping[str, Mapping[str, Any]]
) -> None:
    """A row for each direction of each connection: what the wire shows, what the kernel counted."""
    flows = [(p, f) for h in ("prerouting", "forward", "postrouting")
             for p in at_hook(result.policies, h) for f in p.flows]  # fmt: skip
    flows = list({(p.name, f.name): (p, f) for p, f in flows}.values())
    rows = []
    for record in records:
        for direction, captured in (("data", record.forward), ("acks", record.backward)):
            packets = [Packet(bytearray(c.data)) for c in captured]
            first = packets[0]
            services = Counter(p.tos for p in packets)
            marks = ", ".join(
                f"{tos:#04x}: {n}" for tos, n in sorted(services.items(), reverse=True)
            )
            ends = f"{_end(first, True)} > {_end(first, False)}"
            rows.append([
                f"IPv{record.flow.family}", direction, f"{record.flow.size:,}", ends, len(packets), marks,
                *(_counted(first, f.key, counted[p.name].get(f.name, {})) for p, f in flows),
            ])  # fmt: skip
    head = ("family", "way", "download", "packets of", "on the wire", "of them with tos")
    table((*head, *(f"{p.name}: {f.name}" for p, f in flows)), rows)
    click.echo()


def _end(packet: Packet, source: bool) -> str:
    family, address = packet.source if source else packet.destination
    port = packet.source_port if source else packet.destination_port
    text = address_text(family, address)
    return f"{text}:{port}" if family == IPV4 else f"[{text}]:{port}"


def _counted(packet: Packet, key: Sequence[Any], table: Mapping[tuple[Any, ...], Any]) -> str:
    """The kernel's count of the packet's flow, `-` where the key is not in the packet."""
    wanted = []
    for field in key:
        value = field.get(packet)
        wanted.append(address_text(*value) if isinstance(value, tuple) else value)
    found = table.get(tuple(wanted))
    return str(found[0]) if found is not None else "-"
