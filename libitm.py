"""Handle packets in Python: the façade that programs and handlers import.

A program that stands alone (`docs/libitm.md`):

    import libitm

    app = libitm.App("qos_ctrl")

    @app.on("postrouting", protocol="tcp", dport=80)
    def mark(packet):
        packet.ip.tos = 0x10

    app.run()  # until Ctrl-C

A handler of a policy (`call "module:function"`) is a function of one packet; it takes
`Verdict`, `Class`, `headers_only` and `whole_packets` from here.
"""

from itmlang.headers import FiveTuple, IncompleteError, MalformedError, Option, Packet
from runtime.app import App, Registration, Timer
from runtime.errors import MachineError, UsageError
from runtime.handlers import Class, Verdict, headers_only, whole_packets
from runtime.nested import decapsulate, encapsulate
from runtime.program import Copy, Info, Interest

ACCEPT = Verdict.ACCEPT
DROP = Verdict.DROP
MODIFIED = Verdict.MODIFIED
HEADERS = Copy.HEADERS

__all__ = [
    "ACCEPT",
    "DROP",
    "HEADERS",
    "MODIFIED",
    "App",
    "Class",
    "Copy",
    "FiveTuple",
    "IncompleteError",
    "Info",
    "Interest",
    "MachineError",
    "MalformedError",
    "Option",
    "Packet",
    "Registration",
    "Timer",
    "UsageError",
    "Verdict",
    "decapsulate",
    "encapsulate",
    "headers_only",
    "whole_packets",
]
