"""The lab: real TCP through the library's policies, packet by packet against their meaning."""

import subprocess
import sys
from collections import Counter

import pytest
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6

from itmlang.packet import Packet
from itmlang.pipeline import compile
from itmlang.resources import resource
from itmlang.semantics import State
from itmlang.source import Source
from runtime import apply as runtime_apply
from runtime import status as runtime_status
from runtime.lab import Network, run_flows
from runtime.traffic import TrafficError
from runtime.units import unit_of
from tests.support.needs import unavailable

SIZES = (1_000, 40_000, 300_000)


@pytest.fixture
def network():
    try:
        entered = Network().__enter__()
    except TrafficError as error:
        unavailable(error)
    with entered as network:
        yield network


def complete(data: bytes) -> bool:
    """Are the checksums right? Computed by scapy, from scratch."""
    packet = (IP if data[0] >> 4 == 4 else IPv6)(data)
    again = packet.copy()
    if IP in again:
        del again[IP].chksum
    del again["TCP"].chksum
    return bytes(again) == data


@pytest.mark.parametrize("name", ["size_aware", "qos_mod"])
def test_real_tcp_is_marked_as_the_policy_means(network, name, tmp_path, monkeypatch):
    monkeypatch.setenv("ITM_STATE_DIR", str(tmp_path))
    path = resource("policies", f"{name}.itm")
    compiled = compile(Source(str(path), path.read_text()))
    with network.manager.entered():
        runtime_apply.apply(unit_of(compiled, str(path)))
    records = run_flows(network, SIZES)
    with network.manager.entered():
        (status,) = runtime_status.status()
        flows = runtime_status.flow_counts(name)["conn"]
    (policy,) = compiled.policies
    state, classes = State(policy), Counter[str]()
    for record in records:
        for captured in (record.forward, record.backward):
            for one in captured:
                assert complete(one.data)
                packet = Packet(bytearray(one.data))
                packet.set_tos(0)  # as it was sent
                outcome = state.step(packet, 0.0)
                assert packet.data == one.data
                classes[outcome.name or "class 0"] += 1
    assert {c.name: c.packets for c in status.classes} == {
        name: classes[name] for name in ("short", "long")
    }
    assert min(classes["short"], classes["long"]) > 50
    meant = [e.packets for table in state.flows["conn"].entries.values() for e in table.values()]
    assert sorted(packets for packets, _ in flows.values()) == sorted(meant)
    assert len(flows) == 2 * 2 * len(SIZES)
    assert status.flows[0].uncounted == 0


def test_the_command_shows_each_flow(network):
    itmc = [sys.executable, "-c", "from runtime.cli.main import main; main()"]
    done = subprocess.run(
        [*itmc, "lab", str(resource("policies", "size_aware.itm")), "--sizes", "1KB, 100KB"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("IPv")]
    assert len(rows) == 8
    for row in rows:
        on_the_wire, counted = int(row[6]), int(row[-1])
        assert on_the_wire == counted
    assert "size_aware at postrouting, as the kernel counted it:" in done.stdout
