"""What Python does to packets, where there is no kernel: for `test`, `explain` and `replay`.

Handlers are the very functions that the runtime calls. Of tunnels nothing is known but
what the policy says: their paths take 1500 bytes, and without `from` they begin at 0.0.0.0.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from itmlang import ir
from itmlang.actions import Action
from itmlang.actions.encapsulate import Decapsulate, Encapsulate
from itmlang.headers import Packet as Headers
from itmlang.packet import Packet
from itmlang.semantics import Did, Doer, nothing_done
from itmlang.tunnel import PROTOCOL, Tunnel, decapsulate
from itmlang.values import IPV4
from runtime.errors import UsageError
from runtime.handlers import HandlerError, answered, described, load

_MTU: Final = 1500


def doer(policies: Iterable[ir.Policy], file: str) -> Doer:
    """Who does what the policies of a file have in Python.

    Raises `UsageError` if a handler cannot be loaded; what it gives does if one fails.
    """
    steps = [
        step
        for policy in policies
        for steps in policy.process.values()
        for step in ir.every_step(steps)
        if step.in_python
    ]
    if not steps:
        return nothing_done
    beside = None if file == "-" else Path(file).resolve().parent
    try:
        handlers = load([s.action.handler for s in steps if s.action.handler], beside)
    except HandlerError as error:
        span = next(s.span for s in steps if s.action.handler == error.target)
        raise UsageError(f"{span}: {error}", "handlers are looked for beside the policy") from error

    def do(action: Action, packet: Packet, now: float) -> Did:
        payload = bytes(packet.data)
        made: object = payload
        match action:
            case Encapsulate():
                if packet.family == IPV4:
                    tunnel = Tunnel(action.source or 0, action.destination)
                    made = tunnel.encapsulate(payload, _MTU, packet.input is not None)
            case Decapsulate():
                if packet.family == IPV4 and packet.protocol == PROTOCOL:
                    made = decapsulate(payload)
            case _:
                headers = Headers(
                    payload, mark=packet.mark, input=packet.input, output=packet.output
                )
                try:
                    did = answered(handlers[action.handler].function(headers))
                except Exception as error:
                    raise UsageError(f"{action.handler} failed: {described(error)}") from error
                packet.mark = headers.mark
                if headers.altered and not action.once:
                    packet.replace(headers.data)
                return did
        if not isinstance(made, bytes):
            return Did("drop")
        if made != payload:
            packet.replace(made)
        return Did()

    return do
