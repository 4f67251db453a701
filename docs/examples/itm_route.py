"""Overlay routing, figure 14: packets to some destinations go through a neighbour, in a tunnel.

    python itm_route.py LOCAL [DESTINATION=NEIGHBOUR]...

LOCAL is our address. Each neighbour runs this program, too: it takes tunnelled packets out
again and forwards them (net.ipv4.ip_forward = 1). With fixed neighbours, a policy does it
in the kernel: `encapsulate to NEIGHBOUR`.
"""

import sys

import libitm

LOCAL = sys.argv[1]
NEIGHBOURS = dict(argument.split("=") for argument in sys.argv[2:])
ENCAPSULATE, DECAPSULATE = 1, 2
IPIP = 4


def classify(packet: libitm.Packet) -> int:
    return ENCAPSULATE if packet.hook == "output" else DECAPSULATE


def process(packet: libitm.Packet, kind: int) -> libitm.Verdict:
    if kind == ENCAPSULATE:
        libitm.encapsulate(packet, LOCAL, NEIGHBOURS[str(packet.ip.destination)])
    else:
        libitm.decapsulate(packet)
    return libitm.MODIFIED


app = libitm.App("itm_route")
if NEIGHBOURS:
    leaving = libitm.Interest(daddr=NEIGHBOURS)
    app.register("output", libitm.Info(interest=leaving, classify=classify, process=process))
tunnelled = libitm.Interest(protocol=IPIP, daddr=LOCAL)
app.register("prerouting", libitm.Info(interest=tunnelled, classify=classify, process=process))
app.run()
