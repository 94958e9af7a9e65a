"""What holds at any moment of the books of a scheduler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import chain

from appliance.core.blocks import BlockPool, PoolError
from appliance.core.request import Request
from appliance.core.store import Store


def audit(
    store: Store,
    running: Sequence[Request],
    waiting: Sequence[Request],
    deferred: Sequence[Request],
    requests: Collection[Request],
    seats: Sequence[int],
    max_num_seqs: int,
) -> None:
    """Raises PoolError unless all of this holds.

    Running, waiting and deferred ones are in order, each where its flags say, and are all there are. A running request holds at
    least ceil(computed / block_size) blocks (what is stored) and at most ceil(known / block_size); another one none, but in host
    memory those of what it has computed. Every running request has a seat of its own, nobody else has one, and the others are
    free: ``seats``. Every block has as many references as requests hold it, and no other is used, here and there. The books of
    the pools are right.
    """
    store.check()
    for queue in (running, waiting, deferred):
        tickets = [r.ticket for r in queue]
        if tickets != sorted(tickets) or len({*tickets}) != len(tickets):
            raise PoolError("requests are not in order of arrival")
    if {*running, *waiting, *deferred} != {*requests} or len(running) + len(waiting) + len(deferred) != len(requests):
        raise PoolError("running, waiting and deferred are not all requests")
    if any(r.running or r.held for r in waiting) or not all(r.held and not r.running for r in deferred):
        raise PoolError("a request is not where its flags say")
    if len(running) > max_num_seqs:
        raise PoolError(f"{len(running)} running, more than {max_num_seqs}")
    taken = [r.seat for r in running]
    if sorted([*seats, *taken]) != [*range(max_num_seqs)]:
        raise PoolError(f"seats {sorted(taken)} are taken and {sorted(seats)} free, of {max_num_seqs}")
    size = store.pool.block_size
    for r in running:
        computed, known = r.computed, r.known
        if not r.landed <= computed <= known or r.ahead < 0:
            raise PoolError(f"request {r.key}: {r.landed} tokens landed, {computed} computed, {known} known")
        low, high = -(-computed // size), -(-known // size)
        if not low <= len(r.blocks) <= high or r.host or not r.running:
            raise PoolError(f"request {r.key} holds {len(r.blocks)} blocks, expected {low} to {high}")
    resting = (*waiting, *deferred)
    for r in resting:
        if r.seat != -1:
            raise PoolError(f"request {r.key} waits with seat {r.seat}")
        if r.blocks or len(r.host) != store.blocks(r.computed):
            raise PoolError(f"request {r.key} waits with {len(r.blocks)} blocks and {r.computed} tokens computed")
    _owners(store.pool, [r.blocks for r in running])
    if store.swapped != sum(bool(r.host) for r in resting):
        raise PoolError(f"{store.swapped} requests counted in host memory, {sum(bool(r.host) for r in resting)} are")
    if store.host is not None:
        _owners(store.host, [r.host for r in resting])


def _owners(pool: BlockPool, held: Sequence[Sequence[int]]) -> None:
    for blocks in held:
        if len({*blocks}) != len(blocks):
            raise PoolError(f"a request owns a block twice: {list(blocks)}")
    owners = Counter(chain.from_iterable(held))
    if len(owners) != pool.used:
        raise PoolError(f"{pool.used} blocks in use, {owners.total()} owned, {len(owners)} of them different")
    for block, count in owners.items():
        if pool.holders(block) != count:
            raise PoolError(f"block {block} is owned by {count} requests, but has {pool.holders(block)} references")
