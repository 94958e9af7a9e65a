"""Where the keys and values of requests are: in the pool, in host memory, or in both; and what must be copied for that.

A full block is known by a hash of its tokens and of all before them, so any request whose tokens begin alike finds it::

    key 0 = hash(salt and adapter, tokens of block 0)     key i = hash(key i - 1, tokens of block i)

A block that nobody holds is kept until its room is needed; then, where there is a second tier, it moves to host memory (again for
as long as nobody needs the room there), from where a later request gets it back. Where that is full, it takes another one's place
only if appliance.core.ghosts expects it back. A request that must give way moves there whole, and what it has there is its own
until it returns.

Where a model's layers keep a state of each sequence, as many of the blocks that are found count as states are kept for
(appliance.core.kept), and these are copied to the seat of whoever begins there.

Every decision appends to ``copies``. They are carried out one after another, before the step with which they were decided: so a
block may be handed on as soon as its copy has been decided.
"""

from __future__ import annotations

from array import array
from hashlib import sha256
from typing import Literal, NamedTuple

from appliance.core.blocks import BlockPool, PoolError
from appliance.core.ghosts import Ghosts
from appliance.core.kept import Kept
from appliance.core.request import Request


class Copy(NamedTuple):
    """Of a whole block. "out": from the pool to host memory; "in": back; "copy": within the pool. "states": of a sequence's
    states, from place to place."""

    kind: Literal["out", "in", "copy", "states"]
    source: int
    target: int


class Place(NamedTuple):
    """Where a block is found. ``host`` means host memory."""

    host: bool
    block: int


class Store:
    """The pool, and with ``host`` a second one in host memory. Without ``caching`` requests share only what forks share.

    ``kept``: of a model whose layers keep states. With it there is no second tier, and nothing is forked."""

    def __init__(self, pool: BlockPool, host: BlockPool | None = None, *, caching: bool = True, kept: Kept | None = None) -> None:
        if host is not None and host.block_size != pool.block_size:
            raise PoolError(f"blocks of {pool.block_size} tokens cannot move to blocks of {host.block_size}")
        self.pool, self.host, self.caching, self.kept = pool, host, caching, kept
        self.copies: list[Copy] = []
        self.swapped = 0  # requests that have blocks in host memory
        self.ghosts = None if host is None else Ghosts(host.num_blocks)
        if host is not None:
            pool.evicting = self._save

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.pool.block_size)

    def take_copies(self) -> tuple[Copy, ...]:
        """What has been decided since the last call."""
        copies, self.copies = tuple(self.copies), []
        return copies

    def find(self, request: Request) -> list[Place]:
        """Where its first full blocks are, as far as they are anywhere."""
        if not self.caching:
            return []
        self._hash(request, len(request.tokens))
        found = []
        for key in request.keys:
            place = self._find(key)
            if place is None:
                break
            found.append(place)
        return found

    def places(self, request: Request) -> tuple[list[Place], int]:
        """Where the blocks are that a waiting request need not compute, and how many tokens they spare it."""
        if request.host:
            return self._swapped(request), request.computed
        if request.params.prompt_logprobs is not None and not request.output_len:  # these come from computing the prompt
            return [], 0
        last = len(request.tokens) - 1  # it is computed in any case: the token after it comes from that
        leader = request.leader
        if leader is not None and leader.running and not request.output_len:
            return [Place(False, block) for block in leader.blocks[: self.blocks(last)]], last
        places = self.find(request)
        if self.kept is not None:
            places = places[: self._known_state(request, min(len(places), last // self.pool.block_size))]
        return places, min(len(places) * self.pool.block_size, last)

    def need(self, request: Request, places: list[Place], computed: int) -> int:
        """How many free blocks its admission takes: for every known token and the next one (but the very last is never stored).

        So a request that gave way in this step, or one behind it, cannot come in again at once.
        """
        known, first, holders = len(request.tokens), computed // self.pool.block_size, self.pool.holders
        need = self.blocks(max(known, min(known + 1, request.max_total - 1)))
        need -= sum(not host and holders(block) > 0 for host, block in places)
        if first < len(places) and not places[first].host and holders(places[first].block):
            need += 1  # it writes there, so it gets a copy
        return need

    def fetch(self, request: Request, places: list[Place], expect: int) -> bool:
        """Give the request these blocks, in order; its own ones in host memory are given up. False: the pool has too few."""
        here, there = ([place.block for place in places if place.host is host] for host in (False, True))
        self.pool.share(here)  # these first, so that none is evicted for another
        if self.host is not None:
            self.host.share(there)
        fresh = self.pool.allocate(len(there), expect=expect)
        if fresh is None:
            self.pool.release(here)
        if self.host is not None:
            self.host.release(there)
        if fresh is None:
            return False
        new = iter(fresh)
        for i, place in enumerate(places):
            if not place.host:
                request.blocks.append(place.block)
                continue
            block = next(new)
            request.blocks.append(block)
            self.copies.append(Copy("in", place.block, block))
            if i < len(request.keys):
                self.pool.register(block, request.keys[i])
        self.drop_host(request)
        return True

    def seated(self, request: Request) -> None:
        """Its admission has given it a seat: states come there from where they are kept, after its ``computed`` tokens."""
        if self.kept is None:
            return
        size = self.pool.block_size
        if request.computed:
            self.copies.append(Copy("states", self.kept.use(request.keys[request.computed // size - 1]), request.seat))
        last = (request.prompt_len - 1) // size * size
        parts = min(len(self.find(request)) * size, last)  # somebody had these tokens, and went on otherwise or ended
        request.stops = self.kept.stops(request.computed, parts, last)

    def until(self, request: Request, end: int) -> int:
        """Where its next chunk has to end, at most at ``end``: at the first place of which it will keep the states."""
        if self.kept is not None:
            for stop in request.stops:
                if request.computed < stop < end and self._key(request, stop) not in self.kept:
                    return stop
        return end

    def keep(self, request: Request) -> None:
        """Its next chunk is decided: if it stands now where states are to be kept, they are."""
        if self.kept is not None and request.computed in request.stops:
            key = self._key(request, request.computed)
            if key not in self.kept:
                self.copies.append(Copy("states", request.seat, self.kept.keep(key)))

    def extend(self, request: Request, tokens: int) -> bool:
        """Blocks for its first ``tokens`` tokens, and the one that is written next for itself alone. False: too few are free."""
        pool, held, size = self.pool, len(request.blocks), self.pool.block_size
        first = request.computed // size  # the only one that can be shared among those that are written
        shared = first < held and pool.holders(request.blocks[first]) > 1
        need = -(-tokens // size) - held
        if need <= 0 and not shared:
            return True
        need, after = max(0, need), request.blocks[-1] if held else None
        blocks = pool.allocate(need + shared, after=after, expect=self.blocks(request.max_total - 1) - held)
        if blocks is None:
            return False
        if shared:
            self.copies.append(Copy("copy", request.blocks[first], blocks[0]))
            pool.release([request.blocks[first]])
            request.blocks[first] = blocks[0]
        request.blocks.extend(blocks[shared:])
        return True

    def landed(self, request: Request, start: int, end: int) -> None:
        """Its tokens ``start : end`` are in the cache for certain: full blocks can be found by others from now on."""
        request.landed = max(request.landed, end)
        first, last = start // self.pool.block_size, end // self.pool.block_size
        if first == last or not self.caching:
            return
        self._hash(request, end)
        for i in range(first, last):
            self.pool.register(request.blocks[i], request.keys[i])

    def swap_out(self, request: Request) -> bool:
        """Move a request to host memory. False, and nothing changed, where there is too little room."""
        host, count = self.host, self.blocks(request.computed)
        if host is None or not count:
            return False
        full = request.computed // self.pool.block_size if self.caching else 0
        self._hash(request, full * self.pool.block_size)
        known = {i: slot for i, key in enumerate(request.keys[:full]) if (slot := host.find(key)) is not None}
        host.share(list(known.values()))
        slots = host.allocate(count - len(known))
        if slots is None:
            host.release(list(known.values()))
            return False
        new = iter(slots)
        for i in range(count):
            slot = known.get(i)
            if slot is None:
                slot = next(new)
                self.copies.append(Copy("out", request.blocks[i], slot))
                if i < full:
                    host.register(slot, request.keys[i])
            request.host.append(slot)
        self.swapped += 1
        del request.keys[full:]  # the block behind these is not full in host memory, though its tokens may be known
        self.drop(request)
        return True

    def drop(self, request: Request) -> None:
        """Its blocks in the pool are not its own any more."""
        self.pool.release(request.blocks)
        del request.blocks[:]

    def drop_host(self, request: Request) -> None:
        """The same of those in host memory."""
        if self.host is not None and request.host:
            self.host.release(request.host)
            del request.host[:]
            self.swapped -= 1

    def forget(self) -> None:
        """Copies were not carried out, or a step failed: nothing that has a key can be trusted any more."""
        self.copies.clear()
        self.pool.forget()
        if self.kept is not None:
            self.kept.forget()
        if self.host is not None and self.ghosts is not None:
            self.host.forget()
            self.ghosts.forget()

    def check(self) -> None:
        self.pool.check()
        if self.kept is not None:
            self.kept.check()
        if self.host is not None:
            self.host.check()

    def _swapped(self, request: Request) -> list[Place]:
        """Where the blocks of a request that is swapped out are: some may have stayed in the pool."""
        places = []
        for i, slot in enumerate(request.host):
            block = self.pool.find(request.keys[i]) if i < len(request.keys) else None
            places.append(Place(True, slot) if block is None else Place(False, block))
        return places

    def _known_state(self, request: Request, blocks: int) -> int:
        """After how many of its first ``blocks`` blocks states are kept, at most."""
        assert self.kept is not None
        return next((count for count in range(blocks, 0, -1) if request.keys[count - 1] in self.kept), 0)

    def _key(self, request: Request, tokens: int) -> bytes:
        """Of the block that ends with its first ``tokens`` tokens."""
        self._hash(request, tokens)
        return request.keys[tokens // self.pool.block_size - 1]

    def _find(self, key: bytes) -> Place | None:
        block = self.pool.find(key)
        if block is not None:
            return Place(False, block)
        slot = None if self.host is None else self.host.find(key)
        return None if slot is None else Place(True, slot)

    def _hash(self, request: Request, tokens: int) -> None:
        """The keys of all full blocks among its first ``tokens`` tokens."""
        size, keys = self.pool.block_size, request.keys
        if not self.caching or len(keys) >= tokens // size:
            return
        before = keys[-1] if keys else sha256(request.root).digest()
        for start in range(len(keys) * size, tokens - size + 1, size):
            before = sha256(before + array("q", request.tokens[start : start + size]).tobytes()).digest()
            keys.append(before)

    def _save(self, block: int, key: bytes) -> None:
        """A block is about to be handed on: what it contains moves to host memory, if there is room or it is worth another's."""
        host, ghosts = self.host, self.ghosts
        if host is None or ghosts is None:
            return
        worth = ghosts.leaves(key)
        if (slot := host.find(key)) is not None:  # it was used more recently than there
            host.share([slot])
            host.release([slot])
            return
        slots = host.allocate(1) if worth or host.kept < host.free else None
        if slots is None:
            return
        self.copies.append(Copy("out", block, slots[0]))
        host.register(slots[0], key)
        host.release(slots)
