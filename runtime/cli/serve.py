"""`itmc serve`: be the runtime, which handles packets in Python."""

import click

from runtime import nft
from runtime.serving import serve


@click.command()
@click.option(
    "--detached", is_flag=True, hidden=True, help="As `apply` starts it: end when nobody needs it."
)
def command(detached: bool) -> None:
    """Serve the queues of all policies that are loaded in this network namespace.

    `itmc apply` starts it by itself where a policy needs it; a service does it at boot.
    """
    nft.require_rights()
    serve(detached=detached)
