"""Size-aware differentiation, figures 8 to 11: short TCP flows get low delay, long ones lose it.

    python qos_ctrl.py [THRESHOLD]

The policy library has the same as rules of the kernel: `policies/qos_mod.itm`.
"""

import sys
from collections import Counter

import libitm

THRESHOLD = int(sys.argv[1]) if len(sys.argv) > 1 else 10
SHORT, LONG = 1, 2
MINIMIZE_DELAY, PRECEDENCE = 0x10, 0xE0

packets: Counter[libitm.FiveTuple] = Counter()  # of each flow


def classify(packet: libitm.Packet) -> int:
    """Figure 9: what was logged so far decides; 0 is not known yet."""
    flow = packet.five_tuple
    if flow not in packets:
        return 0
    ending = packet.tcp is not None and packet.tcp.fin
    return SHORT if packets[flow] <= THRESHOLD or ending else LONG


def log(packet: libitm.Packet) -> None:
    """Figure 10: a new entry, or one packet more until the threshold is reached."""
    flow = packet.five_tuple
    if flow not in packets:
        packets[flow] = 0
    elif packets[flow] <= THRESHOLD:
        packets[flow] += 1


def process(packet: libitm.Packet, kind: int) -> libitm.Verdict:
    """Figure 11: set TOS. The checksum follows, and the change is noticed."""
    tos = packet.ip.tos
    if kind == LONG and tos & MINIMIZE_DELAY:
        packet.ip.tos = tos & PRECEDENCE & ~MINIMIZE_DELAY
    elif kind == SHORT and not tos & MINIMIZE_DELAY:
        packet.ip.tos = tos & PRECEDENCE | MINIMIZE_DELAY
    return libitm.ACCEPT


# Figure 8. Update and control are not used.
data = libitm.Info(
    label="qos_ctrl",
    interest=libitm.Interest(protocol="tcp"),
    classify=classify,
    log=log,
    process=process,
    update=None,
    control=None,
)
app = libitm.App("qos")
app.register("postrouting", data)
app.run()
