"""What holds at any moment of the books of a scheduler."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from appliance.core.blocks import BlockPool, PoolError
from appliance.core.request import Request
from appliance.core.store import Store


def audit(
    store: Store, running: Sequence[Request], waiting: Sequence[Request], requests: Collection[Request], max_num_seqs: int
) -> None:
    """Raises PoolError unless all of this holds.

    Running and waiting ones are in order, and are all there are. A running request holds at least ceil(computed / block_size)
    blocks (what is stored) and at most ceil(known / block_size); a waiting one none, but in host memory those of what it has
    computed. Every block has as many references as requests hold it, and no other is used, here and there. The books of the pools
    are right.
    """
    store.check()
    for queue in (running, waiting):
        if [r.ticket for r in queue] != sorted({r.ticket for r in queue}):
            raise PoolError("requests are not in order of arrival")
    if {*running, *waiting} != {*requests} or any(r.running for r in waiting):
        raise PoolError("running and waiting are not all requests")
    if len(running) > max_num_seqs:
        raise PoolError(f"{len(running)} running, more than {max_num_seqs}")
    for r in running:
        if not r.landed <= r.computed <= r.known or r.ahead < 0:
            raise PoolError(f"request {r.key}: {r.landed} tokens landed, {r.computed} computed, {r.known} known")
        low, high = store.blocks(r.computed), store.blocks(r.known)
        if not low <= len(r.blocks) <= high or r.host or not r.running:
            raise PoolError(f"request {r.key} holds {len(r.blocks)} blocks, expected {low} to {high}")
    for r in waiting:
        if r.blocks or len(r.host) != store.blocks(r.computed):
            raise PoolError(f"request {r.key} waits with {len(r.blocks)} blocks and {r.computed} tokens computed")
    _owners(store.pool, [r.blocks for r in running])
    if store.host is not None:
        _owners(store.host, [r.host for r in waiting])


def _owners(pool: BlockPool, held: Sequence[Sequence[int]]) -> None:
    owners: dict[int, int] = {}
    for blocks in held:
        if len(set(blocks)) != len(blocks):
            raise PoolError(f"a request owns a block twice: {list(blocks)}")
        for block in blocks:
            owners[block] = owners.get(block, 0) + 1
    if len(owners) != pool.used:
        raise PoolError(f"{pool.used} blocks in use, {sum(owners.values())} owned, {len(owners)} of them different")
    for block, count in owners.items():
        if pool.holders(block) != count:
            raise PoolError(f"block {block} is owned by {count} requests, but has {pool.holders(block)} references")
