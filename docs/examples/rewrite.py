"""Other header fields, figure 13: TCP to port 5000 gets another TOS, and goes to port 5555.

    python rewrite.py

What comes back gets the old port again, so that connections work.
"""

import libitm

app = libitm.App("rewrite")


@app.on("prerouting", protocol="tcp", dport=5000)
def there(packet: libitm.Packet) -> libitm.Verdict:
    packet.ip.tos = 0x55  # a field of the IP header
    if packet.tcp is not None:
        packet.tcp.destination_port = 5555  # a field of the TCP header
    return libitm.MODIFIED  # checksums are right already; without this, too


@app.on("output", protocol="tcp", sport=5555)
def back(packet: libitm.Packet) -> libitm.Verdict:
    if packet.tcp is not None:
        packet.tcp.source_port = 5000
    return libitm.MODIFIED


app.run()
