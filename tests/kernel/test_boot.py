"""The units at work, under a real systemd: their sandbox, their order, what fails."""

import sys
from pathlib import Path

from runtime import service
from tests.support import systemd
from tests.support.needs import unavailable

ITMC = Path("/mnt/itmc")
POLICY = """\
policy web {
    at output
    interest { protocol tcp }
    flow conn by daddr, dport timeout 1m max 16
    classify { few when conn.packets <= 3; many }
    log { count conn }
    process { many { set dscp cs1 } }
}
"""
# Debian's, as far as it matters: flushes all rules when it starts, reloads and stops.
NFTABLES = """\
[Unit]
DefaultDependencies=no
Wants=network-pre.target
Before=network-pre.target shutdown.target
[Service]
Type=oneshot
RemainAfterExit=yes
StandardOutput=append:/mnt/output
ExecStart=/bin/sh -c 'sleep 0.2; nft flush ruleset; echo flushed'
ExecReload=/bin/sh -c 'sleep 0.2; nft flush ruleset; echo flushed'
ExecStop=/usr/sbin/nft flush ruleset
"""
NETWORK = """\
[Unit]
DefaultDependencies=no
Wants=network-pre.target nftables.service
After=network-pre.target
[Service]
Type=oneshot
RemainAfterExit=yes
StandardOutput=append:/mnt/output
ExecStart=/bin/echo network
"""
CONFINED = """\
import ctypes, sys
sys.path.insert(0, "/srv")
from runtime import nft
with open("/proc/self/status") as status:
    print(*(line.replace("\\t", "") for line in status if line.startswith(("CapEff", "Seccomp:"))))
nft.load('''
table inet itm_a {
    set s {
        type ipv4_addr . inet_service
        flags dynamic
        size 65535
        timeout 1m
    }
    chain c {
        type filter hook postrouting priority -150
        ct state new limit rate 10/second counter log
        update @s { ip daddr . tcp dport limit rate over 1/week burst 10 packets }
    }
}
''')
print(*nft.tables())
print("callback", ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 3)())
for folder in ("/run/itm", "/var/lib/itm", "/etc", "/usr", "/var/lib", "/proc/sys/net"):
    try:
        open(folder + "/x", "w").close()
        print("writable", folder)
    except OSError:
        pass
"""


def story(tmp_path: Path, text: str, *settings: str, **files: str) -> list[str]:
    """What a story prints on a machine with our units; `settings` go into a drop-in."""
    units, shared = tmp_path / "units", tmp_path / "shared"
    units.mkdir()
    shared.mkdir()
    (shared / "itmc").write_text(systemd.ITMC)
    (shared / "itmc").chmod(0o755)
    places = ITMC, Path(sys.executable).resolve(), Path(sys.base_prefix)
    for name, unit in service.texts(service.Program(ITMC, places)).items():
        (units / name).write_text(unit)
        (units / f"{name}.d").mkdir()
        output = ("StandardOutput=append:/mnt/output", "StandardError=append:/mnt/output")
        (units / f"{name}.d/test.conf").write_text("\n".join(["[Service]", *output, *settings]))
    (units / "nftables.service").write_text(NFTABLES)
    (units / "network.service").write_text(NETWORK)
    for name, content in files.items():
        (shared / name).write_text(content)
    try:
        said = systemd.run(units, shared, text)
    except systemd.NoSystemdError as error:
        unavailable(error, needs="root, systemd, namespaces and cgroup2")
    return said.splitlines()


def starts(command: str) -> tuple[str, ...]:
    """Settings by which the unit starts something else, whatever was confirmed."""
    return (
        "ExecStart=", f"ExecStart={command}", "ExecReload=", f"ExecReload={command}",
        "[Unit]", "ConditionPathExists=", "[Service]",
    )  # fmt: skip


def test_the_sandbox_lets_a_ruleset_be_loaded_and_no_more(tmp_path):
    said = story(
        tmp_path,
        "systemctl start itm.service",
        *starts(f"{systemd.PYTHON} /mnt/confined.py"),
        **{"confined.py": CONFINED},
    )
    assert [line.strip() for line in said if line] == [
        f"CapEff:{1 << 12:016x}",  # CAP_NET_ADMIN
        "Seccomp:2",
        "inet itm_a",
        "callback 3",
        "writable /run/itm",
        "writable /var/lib/itm",
    ]


def test_policies_come_after_nftables_and_before_the_network(tmp_path):
    """And again when nftables, which flushes all, starts or reloads."""
    said = story(
        tmp_path,
        """
        # `systemctl` waits for the named unit, not for those that go with it.
        found() {
          for attempt in $(seq 50); do ! nft list tables | grep . || return 0; sleep 0.1; done
        }
        systemctl start network.service itm.service
        found
        systemctl reload nftables
        found
        systemctl restart nftables
        found
        systemctl stop itm
        nft list tables
        """,
        *starts("/bin/sh -c 'nft add table inet itm_a; echo loaded'"),
    )
    table = "table inet itm_a"
    assert said == [
        "flushed", "loaded", "network", table,
        "flushed", "loaded", table,
        "flushed", "loaded", table,
        table,
    ]  # fmt: skip


def test_the_network_does_not_wait_for_what_fails_and_a_late_device_is_met(tmp_path):
    said = story(
        tmp_path,
        """
        systemctl start network.service itm.service || echo failed
        systemctl is-active itm || true
        touch /mnt/device
        for attempt in $(seq 100); do
          ! systemctl is-active --quiet itm || break
          sleep 0.1
        done
        systemctl is-active itm
        """,
        *starts("/bin/sh -c '[ -e /mnt/device ] || exit 3; echo loaded'"),
        "RestartSec=1",
    )
    assert "failed" in said
    assert [line for line in said if line in ("network", "activating", "loaded", "active")] == [
        "network", "activating", "loaded", "active",
    ]  # fmt: skip


def test_a_running_systemd_knows_what_is_installed_and_removed(tmp_path):
    said = story(
        tmp_path,
        f"""
        cd /etc/systemd/system
        rm -r itm*.service*
        {ITMC} install-service 2>/dev/null
        ls -d *.wants
        systemctl is-enabled itm
        systemctl show --property Wants sysinit.target | grep -o itm.service
        systemctl start itm
        echo '# mine' >>itm.service
        {ITMC} install-service --remove 2>&1 | grep edited || true
        systemctl is-enabled itm
        {ITMC} install-service --remove --force
        systemctl is-enabled itm 2>&1 || true
        systemctl show --property LoadState itm
        """,
    )
    unit = "/etc/systemd/system/itm.service"
    link = "/etc/systemd/system/sysinit.target.wants/itm.service"
    assert said == [
        f"wrote {unit}",
        f"wrote {link}",
        f"wrote {unit.replace('itm.', 'itm-runtime.')}",
        f"wrote {link.replace('itm.', 'itm-runtime.')}",
        "policies are loaded at each boot; now, by `systemctl start itm.service itm-runtime.service`",
        "sysinit.target.wants",
        "enabled",
        "itm.service",
        f"itmc: {unit} was edited since itmc wrote it",
        "enabled",
        f"removed {link}",
        f"removed {unit}",
        f"removed {link.replace('itm.', 'itm-runtime.')}",
        f"removed {unit.replace('itm.', 'itm-runtime.')}",
        "policies that are loaded stay",
        "Failed to get unit file state for itm.service: No such file or directory",
        "LoadState=not-found",
    ]


def test_where_nothing_was_confirmed_nothing_fails(tmp_path):
    said = story(tmp_path, "systemctl start itm; systemctl is-failed itm || true")
    assert said == ["inactive"]


def test_the_policies_that_were_confirmed_are_there_after_a_reboot(tmp_path):
    said = story(
        tmp_path,
        f"""
        {ITMC} apply /mnt/web.itm >/dev/null
        ls /var/lib/itm
        # What a reboot leaves of it:
        nft flush ruleset
        rm -r /run/itm
        systemctl start network.service itm.service
        nft list tables
        {ITMC} list
        {ITMC} remove --all
        {ITMC} boot
        """,
        **{"web.itm": POLICY},
    )
    order = [line for line in said if line in ("flushed", "network", "table inet itm_web")]
    assert order == ["flushed", "network", "table inet itm_web"]
    assert said[-2] == "removed web"
    # Removed for later boots, too.
    assert "nothing" in said[-1]


SERVED = """\
policy p {
    at output
    fail closed
    interest { protocol udp  dport 5000 }
    classify { all }
    process { all { call "hand:handle" } }
}
"""
HAND = """\
def handle(packet):
    packet.payload = packet.payload.upper()
"""
# Says what arrives of a datagram, "dropped" if the sender is told so.
SAY = """\
import socket
taker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
taker.bind(("127.0.0.1", 5000))
taker.settimeout(5)
try:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"said", ("127.0.0.1", 5000))
    print(taker.recv(100).decode())
except PermissionError:
    print("dropped")
"""


def test_handlers_are_there_before_the_network_and_whenever_they_can_be(tmp_path):
    """The second unit: it waits for its handlers, comes back when killed, takes over, gives up."""
    said = story(
        tmp_path,
        f"""
        ip link set lo up
        say() {{ echo "$1: $({systemd.PYTHON} /mnt/say.py)"; }}
        {ITMC} apply /mnt/p.itm
        say applied
        # The one that `apply` started gives way to the service.
        systemctl start itm-runtime
        say served
        systemctl stop itm-runtime
        say stopped
        nft flush ruleset
        rm -r /run/itm
        systemctl start network.service itm.service itm-runtime.service
        say booted
        {ITMC} status p | grep -c '1 of 1 workers serve'
        kill -9 $(systemctl show --property MainPID --value itm-runtime)
        say killed
        for attempt in $(seq 100); do ! say again | grep SAID || break; sleep 0.1; done
        grep Cap /proc/$(systemctl show --property MainPID --value itm-runtime)/status | grep Eff
        # Handlers that cannot be loaded keep no machine from booting.
        echo 'raise RuntimeError' >/mnt/hand.py
        systemctl restart itm-runtime
        say broken
        {ITMC} remove --all
        systemctl stop itm-runtime
        """,
        **{"p.itm": SERVED, "hand.py": HAND, "say.py": SAY},
    )
    told = [line for line in said if ":" in line and line.partition(":")[0].isalpha()]
    assert [line for line in told if line.split(":")[0] != "CapEff"] == [
        "applied: SAID", "served: SAID", "stopped: dropped", "booted: SAID", "killed: dropped",
        "again: SAID", "broken: dropped",
    ]  # fmt: skip
    assert f"CapEff:\t{1 << 12 | 1 << 13:016x}" in said
    assert "1" in said
    assert said.index("network") < said.index("booted: SAID")
