"""What holds at any moment of the books of a scheduler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import chain

from appliance.core.blocks import BlockPool, PoolError
from appliance.core.request import Request
from appliance.core.store import Store

_FIRST = (float("-inf"), 0)  # before all tickets
_DISORDER = "requests are not in order of arrival"
_MISPLACED = "a request is not where its flags say"


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
    if {*running, *waiting, *deferred} != {*requests} or len(running) + len(waiting) + len(deferred) != len(requests):
        raise PoolError("running, waiting and deferred are not all requests")
    if len(running) > max_num_seqs:
        raise PoolError(f"{len(running)} running, more than {max_num_seqs}")
    taken = [r.seat for r in running]
    if sorted([*seats, *taken]) != [*range(max_num_seqs)]:
        raise PoolError(f"seats {sorted(taken)} are taken and {sorted(seats)} free, of {max_num_seqs}")
    size, ticket = store.pool.block_size, _FIRST
    for r in running:  # this and the next loop are what an audit costs: they call nothing
        if not r.running:
            raise PoolError(_MISPLACED)
        if r.ticket <= ticket:
            raise PoolError(_DISORDER)
        ticket = r.ticket
        computed, known = r.computed, len(r.tokens) + r.ahead
        if not r.landed <= computed <= known or r.ahead < 0:
            raise PoolError(f"request {r.key}: {r.landed} tokens landed, {computed} computed, {known} known")
        low, high = -(-computed // size), -(-known // size)
        if not low <= len(r.blocks) <= high or r.host:
            raise PoolError(f"request {r.key} holds {len(r.blocks)} blocks, expected {low} to {high}")
    swapped = 0
    for queue, held in ((waiting, False), (deferred, True)):
        ticket = _FIRST
        for r in queue:
            if r.running or r.held is not held:
                raise PoolError(_MISPLACED)
            if r.ticket <= ticket:
                raise PoolError(_DISORDER)
            ticket = r.ticket
            if r.seat != -1:
                raise PoolError(f"request {r.key} waits with seat {r.seat}")
            if r.blocks or len(r.host) != -(-r.computed // size):
                raise PoolError(f"request {r.key} waits with {len(r.blocks)} blocks and {r.computed} tokens computed")
            swapped += bool(r.host)
    _owners(store.pool, [r.blocks for r in running])
    if store.swapped != swapped:
        raise PoolError(f"{store.swapped} requests counted in host memory, {swapped} are")
    if store.host is not None:
        _owners(store.host, [r.host for queue in (waiting, deferred) for r in queue if r.host])


def _owners(pool: BlockPool, held: Sequence[Sequence[int]]) -> None:
    counts = [0] * pool.num_blocks
    for blocks in held:
        if len({*blocks}) != len(blocks):
            raise PoolError(f"a request owns a block twice: {list(blocks)}")
        if blocks and not 0 <= min(blocks) <= max(blocks) < pool.num_blocks:
            raise PoolError(f"a request owns a block that there is not, of {pool.num_blocks}: {list(blocks)}")
        for block in blocks:
            counts[block] += 1
    if counts == pool.references:
        return
    owners = Counter(chain.from_iterable(held))
    if len(owners) != pool.used:
        raise PoolError(f"{pool.used} blocks in use, {owners.total()} owned, {len(owners)} of them different")
    block, count = next((block, count) for block, count in owners.items() if pool.holders(block) != count)
    raise PoolError(f"block {block} is owned by {count} requests, but has {pool.holders(block)} references")
