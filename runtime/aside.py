"""Queues served by a thread of this process: for policies in a throwaway network.

What the runtime is for a machine, without its processes: the same servers, the same sign
of life, for as long as a test lasts.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from itmlang.pipeline import Compiled
from runtime.engine import Engine
from runtime.handlers import Handler
from runtime.life import BEAT, Life
from runtime.server import Server
from runtime.traffic import Namespace, add_xt_queue_rule

_PAUSE: Final = 0.0003  # seconds between two looks at empty queues


@contextmanager
def served(
    namespace: Namespace, compiled: Compiled, handlers: Mapping[str, Handler]
) -> Iterator[dict[str, list[Engine]]]:
    """The queues of a ruleset that is loaded in its xt form, with their rules; engines by policy.

    Raises `MachineError`, `TrafficError`.
    """
    servers: list[Server] = []
    lives: list[Life] = []
    engines: dict[str, list[Engine]] = {}
    with namespace.entered():
        for table in compiled.ruleset.tables:
            for queue in table.queues:
                policy = next(p for p in compiled.policies if p.name == queue.policy)
                for number in range(queue.first, queue.first + queue.many):
                    server = Server(policy, queue, number, handlers, lambda text: None)
                    servers.append(server)
                    engines.setdefault(policy.name, []).append(server.engine)
                lives.append(Life(queue.first))
            for chain in table.chains:
                if chain.role == "queue":
                    add_xt_queue_rule(namespace, table.name, chain.name, chain.number)
    done = threading.Event()

    def loop() -> None:
        due = 0.0
        with namespace.entered():  # where interfaces have their names
            while not done.is_set():
                if time.monotonic() >= due:
                    for life in lives:
                        life.send()
                    due = time.monotonic() + BEAT
                if not sum(server.serve() for server in servers):
                    time.sleep(_PAUSE)

    for life in lives:
        life.send()
    thread = threading.Thread(target=loop, name="queues")
    thread.start()
    try:
        yield engines
    finally:
        done.set()
        thread.join()
        for server in servers:
            server.close()
        for life in lives:
            life.close()
