"""A delay line: packets of a queue of the kernel's (NFQUEUE) wait, and go on in their order.

A process of its own, `python -m tests.support.delay QUEUE MILLISECONDS [JITTER]`, for kernels
without netem. It says "ready" as soon as it holds the queue and ends when its input does. Only
the packets' headers' places are known to it (no byte is copied), so it is quick enough for TCP.
"""

import os
import random
import selectors
import sys
import time
from collections import deque

from netfilterqueue import COPY_META, NetfilterQueue, Packet


def main(queue: int, delay: float, jitter: float) -> None:
    waiting: deque[tuple[float, Packet]] = deque()
    last = 0.0

    def come(packet: Packet) -> None:
        nonlocal last
        # None overtakes another, as on a line.
        last = max(last, time.monotonic() + delay + random.uniform(0, jitter))
        waiting.append((last, packet))

    line = NetfilterQueue()
    line.bind(queue, come, 16_384, COPY_META, 64, 8 << 20)
    print("ready", flush=True)
    with selectors.DefaultSelector() as selector:
        selector.register(line.get_fd(), selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        while True:
            wait = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
            for key, _ in selector.select(wait):
                if key.fileobj is sys.stdin:
                    if not os.read(sys.stdin.fileno(), 1):
                        return
                else:
                    line.run(block=False)
            now = time.monotonic()
            while waiting and waiting[0][0] <= now:
                waiting.popleft()[1].accept()


if __name__ == "__main__":
    number, *times = sys.argv[1:]
    main(int(number), float(times[0]) / 1000, float(times[1]) / 1000 if len(times) > 1 else 0.0)
