"""Rules to queues where the kernel has no `queue` of nftables' own: the older target NFQUEUE.

Text cannot say that target, so there the chains to queues are loaded empty and filled when
the transaction is done; in the milliseconds in which one is empty, its packets count as
unserved. Which of the two forms a kernel takes, it is asked.
"""

from collections.abc import Collection, Iterable
from dataclasses import replace

from itmlang.nft.model import Chain, Rule, Table
from itmlang.nft.queueing import queue_rule
from runtime import nft
from runtime.errors import MachineError
from runtime.nft import NftRefusalError
from runtime.state import State
from runtime.units import Unit

_PROBE = "table inet itm_probe_queue { chain asked { queue flags bypass to 1; }; }"


def fitted(units: Iterable[Unit]) -> tuple[Unit, ...]:
    """The units with their rules to queues in the form that this kernel takes."""
    found = tuple(units)
    if not any(table.queues for unit in found for table in unit.ruleset.tables):
        return found
    native = _native()
    return tuple(_fitted(unit, native) for unit in found)


def _native() -> bool:
    try:
        nft.load(_PROBE, check=True)
    except NftRefusalError:
        return False
    return True


def _fitted(unit: Unit, native: bool) -> Unit:
    tables = tuple(
        replace(table, chains=[_chain(chain, native) for chain in table.chains])
        if table.queues
        else table
        for table in unit.ruleset.tables
    )
    return unit.with_ruleset(replace(unit.ruleset, tables=tables))


def _chain(chain: Chain, native: bool) -> Chain:
    if chain.role != "queue" or native == bool(chain.rules):
        return chain
    return replace(chain, rules=[Rule(queue_rule(chain.number), chain.span)] if native else [])


def missing(state: State, paths: Collection[str]) -> list[tuple[Table, Chain]]:
    """The chains to queues of these tables that have no rule now, or are not there yet."""
    empty = [
        (table, chain)
        for table in state.tables
        if table.path in paths
        for chain in table.chains
        if chain.role == "queue" and not chain.rules
    ]
    if not empty:
        return []
    import runtime.traffic  # noqa: F401  (0.2 s that must not pass when the chains are empty)

    there = set(nft.tables())
    running = {table.path: nft.table(table.path) for table, _ in empty if table.path in there}

    def filled(table: Table, chain: Chain) -> bool:
        known = running.get(table.path)
        return known is not None and bool(
            chain.name in known.chains and known.chains[chain.name].rules
        )

    return [(table, chain) for table, chain in empty if not filled(table, chain)]


def fill(chains: Iterable[tuple[Table, Chain]]) -> None:
    """Give these chains to queues their rule. Raises `MachineError`."""
    for table, chain in chains:
        _add(table, chain)


def _add(table: Table, chain: Chain) -> None:
    from runtime.traffic import Namespace, TrafficError, add_xt_queue_rule  # 0.2 s

    here = Namespace.here()
    try:
        add_xt_queue_rule(here, table.name, chain.name, chain.number)
    except TrafficError as error:
        raise MachineError(
            f"this kernel queues no packets: {error}", "`itmc doctor` says how to mend that"
        ) from error
    finally:
        here.close()
