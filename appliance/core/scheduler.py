"""Which tokens of which requests run in the next step: a value, decided before anything is computed.

The rules and what they guarantee are in docs/scheduling.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, takewhile

from appliance.core.audit import audit
from appliance.core.blocks import BlockPool
from appliance.core.door import check_room
from appliance.core.drafts import Drafts
from appliance.core.kept import Kept
from appliance.core.params import RequestError
from appliance.core.queues import Queues
from appliance.core.request import Request
from appliance.core.step import Chunk, Return, StepPlan
from appliance.core.store import Store

FAIR_TOKENS = 1024
"""So many tokens, at least, a request generates before it makes room for one that waits."""
WATERMARK = 0.01
"""The share of the pool that admission leaves free, so that those who run have room to grow."""
PATIENCE = 16
"""Steps after which the head of the queue is looked up again while nothing became free: others may have computed its prefix."""


class Scheduler(Queues):
    """Continuous batching with chunked prefill over one pool, in order of priority, then of arrival.

    Requests are admitted from the head of the queue and preempted from the tail of the running ones.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        host: BlockPool | None = None,
        caching: bool = False,
        kept: int = 0,
        priorities: bool = False,
        swaps: Callable[[Request], bool] = lambda request: True,
        fair_tokens: int = FAIR_TOKENS,
        turn: Callable[[Return], int] = lambda back: 0,
        watermark: float = WATERMARK,
        drafts: Drafts | None = None,
    ) -> None:
        """``host``: blocks of host memory, for requests that give way where ``swaps`` says so, and for cached prefixes. ``kept``:
        with ``caching`` so many places, numbered on from the seats, keep states, where layers have some. ``turn``: how many
        tokens, if more than ``fair_tokens``, make up for a return. ``drafts``: only where each step is committed before the next
        one is scheduled."""
        if max_num_batched_tokens < 1 or max_num_seqs < 1:
            raise ValueError(f"max_num_batched_tokens={max_num_batched_tokens} and max_num_seqs={max_num_seqs} must be >= 1")
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)  # so that every running decode fits into every step
        super().__init__(priorities=priorities, seats=self.max_num_seqs)
        states = Kept(self.max_num_seqs, kept) if caching and kept else None
        self.pool, self.store = pool, Store(pool, host, caching=caching, kept=states)
        self.swaps, self.fair_tokens, self.turn = swaps, fair_tokens, turn
        self.drafts = drafts
        self.reserve = int(watermark * pool.num_blocks)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.num_preemptions = self.num_swaps = 0
        self.prompt_tokens_looked_up = self.prompt_tokens_found = self.prompt_tokens_found_in_host = 0
        self._blocked: tuple[Request, int, int] | None = None  # the head, the free blocks it takes, looks until it is tried again

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError for an id in use and for one whose tokens the whole pool cannot hold."""
        if self.find(*request.key):
            raise RequestError(f"request_id {request.request_id!r} is in use", param="request_id", code="request_id_in_use")
        check_room(request, self.pool.num_blocks, self.pool.block_size)
        self._enter(request)

    def abort(self, request_id: str, index: int | None = None) -> list[Request]:
        """End a request (all its completions, or one) with "abort" and free its blocks now. Unknown ids end nothing."""
        found = self.find(request_id, index)
        for request in found:
            self._drop(request)
            request.finish_reason = request.finish_reason or "abort"
        return found

    def schedule(self) -> StepPlan:
        """Decide the next step, and give its tokens their blocks.

        The step before may be under way: a request goes on from the token that is being sampled, unless that is its last one.
        """
        for request in [r for r in self.running if r.finished]:
            self._drop(request)
        yielding, preempted = self._make_room(), []
        chunks: list[Chunk] = []
        budget, place = self.max_num_batched_tokens, 0
        while place < len(self.running):
            request, place = self.running[place], place + 1
            if request.held or len(request.tokens) + request.ahead >= request.max_total or (request.beam and request.ahead):
                continue  # the last token is under way, or its group decides what comes after this one
            while (chunk := self._chunk(request, budget - len(self.running) + place)) is None:  # a token for each of those behind
                preempted.append(self._preempt(self.running[-1]))
                if preempted[-1] is request:
                    break
            else:
                chunks.append(chunk)
                budget -= chunk.length
        while not preempted and (admitted := self._admit(budget)) is not None:
            if (chunk := self._chunk(admitted, budget)) is None:  # only where allocations are made to fail
                preempted.append(self._preempt(admitted))
            else:
                chunks.append(chunk)
                budget -= chunk.length
        if self.drafts is not None:
            chunks = self.drafts.lengthen(chunks, self.store, budget=budget, reserve=self.reserve)
        chunks.sort(key=lambda chunk: chunk.length > 1)
        return StepPlan(tuple(chunks), (*yielding, *preempted), self.store.take_copies())

    def commit(self, plan: StepPlan, sampled: Sequence[int | Sequence[int] | None]) -> list[Request]:
        """Take what the step computed: ``sampled[i]`` is the token of chunk i where it samples, else None.

        Of a chunk with a draft it is as many tokens of that as were right, and the one after them.
        Steps are taken in the order in which they were scheduled. Returns the requests that are finished now; their blocks are
        free, as whatever is computed with them later comes after the steps under way. Requests that ended since ``schedule`` are
        skipped; one whose finish_reason was set since (an error in its row) is finished and takes no token.
        """
        if len(sampled) != len(plan.chunks):
            raise ValueError(f"{len(plan.chunks)} chunks, but {len(sampled)} sampled entries")
        finished = []
        for chunk, token in zip(plan.chunks, sampled, strict=True):
            request, end = chunk.request, chunk.start + chunk.length
            if not self.has(request):
                continue
            if chunk.draft:
                end = chunk.start + 1  # as long as nobody knows which guesses were right
            if request.finish_reason is None and chunk.samples:
                if token is None:
                    raise ValueError(f"request {request.key} reached its last token, but nothing was sampled")
                request.ahead -= 1
                if request.beam:
                    self.hold(request, True)
                elif isinstance(token, int):
                    request.append(token)
                elif self.drafts is not None:
                    end = self.drafts.take(chunk, token, self.store)
            if request.running and request.computed >= end:
                self.store.landed(request, chunk.start, end)
            if request.finish_reason is not None:
                self._drop(request)
                finished.append(request)
        return finished

    def branch(self, moves: Sequence[tuple[Request, Request, int]]) -> None:
        """Each (child, parent, token): the child goes on from the parent's tokens and this one; all at once.

        They are completions of one request, none with a step under way. They share their blocks, in host memory too.
        """
        states = []
        for child, parent, token in moves:
            alike = child.running == parent.running  # else one would have blocks where the other has none
            blocks, host = (parent.blocks[:], parent.host[:]) if alike else (parent.blocks[:0], parent.host[:0])
            self.pool.share(blocks)
            if self.store.host is not None:
                self.store.host.share(host)
            states.append((child, [*parent.tokens, token], blocks, host, parent.computed if alike else 0, parent.keys[:]))
        for child, tokens, blocks, host, computed, keys in states:
            self.store.drop(child)
            self.store.drop_host(child)
            child.tokens, child.blocks, child.host, child.keys = tokens, blocks, host, keys
            self.store.swapped += bool(host)
            child.computed = child.landed = computed
            self.hold(child, False)

    def recover(self) -> list[Request]:
        """A step failed, so what it should have copied and computed is not there: end all that run; the others start anew."""
        ended = list(self.running)
        for request in ended:
            self._drop(request)
            request.finish_reason = request.finish_reason or "error"
        for request in (*self.waiting, *self.deferred):
            self.store.drop_host(request)
            request.computed = request.landed = request.ahead = 0
        self.store.forget()
        return ended

    def check(self) -> None:
        """Raises PoolError where the books are wrong: see appliance.core.audit."""
        everyone = list(chain.from_iterable(map(dict.values, self._requests.values())))
        audit(self.store, self.running, self.waiting, self.deferred, everyone, self.seats, self.max_num_seqs)

    def _chunk(self, request: Request, budget: int) -> Chunk | None:
        """As many of its next tokens as the budget takes, or None where there are no blocks for them."""
        start, known = request.computed, len(request.tokens) + request.ahead
        end = self.store.until(request, min(known, start + budget))
        if not self.store.extend(request, end):
            return None
        self.store.keep(request)
        request.computed = end
        request.ahead += end == known
        return Chunk(request, start, end - start, end == known)

    def _head(self) -> Request | None:
        """The next to be admitted, unless its next token is under way, or its siblings' leader is amid their prompt.

        Who waits for its group is passed over: the others may be behind it.
        """
        while self.waiting and self.waiting[0].finished:
            self._drop(self.waiting[0])
        if not self.waiting or self.waiting[0].ahead:
            return None
        request = self.waiting[0]
        leader = request.leader
        led = leader is not None and leader.running and not request.output_len and leader.landed < leader.prompt_len
        return None if led else request

    @property
    def _room(self) -> int:
        """How many blocks an admission may take."""
        return self.pool.free - (self.reserve if self.running else 0)

    def _admit(self, budget: int) -> Request | None:
        """Move the head of the queue to the running ones, if there is budget, a seat, and blocks for all of it."""
        request = self._head()
        if request is None or budget == 0 or len(self.running) == self.max_num_seqs:
            return None
        if self._blocked is not None and self._blocked[0] is request:
            _, need, patience = self._blocked
            self._blocked = (request, need, patience - 1)
            if need > self._room and patience and budget < self.max_num_batched_tokens:  # and others go on
                return None
        places, computed = self.store.places(request)
        need = self.store.need(request, places, computed)
        if need > self._room or not self.store.fetch(request, places, expect=self.store.blocks(request.max_total - 1)):
            self._blocked = (request, need, PATIENCE)
            return None
        self._blocked = None
        copied = sum(place.host for place in places)
        if not request.preemptions:
            request.cached = min(computed, request.prompt_len)
        if not request.preemptions and self.store.caching:
            self.prompt_tokens_looked_up += request.prompt_len
            self.prompt_tokens_found += request.cached
            self.prompt_tokens_found_in_host += min(request.cached, copied * self.pool.block_size)
        self._take(request)
        request.running, request.computed, request.landed = True, computed, computed
        self._put(request)
        self.store.seated(request)
        back = Return(computed, request.known, copied, len(self.running), self.pool.used)
        request.turn = request.known + max(self.fair_tokens, self.turn(back) if request.preemptions else 0)
        return request

    def _make_room(self) -> list[Request]:
        """Preempt for the head of the queue: those of lower priority, those that wait anyway, those that have had their turn.

        Beams that wait make room for their siblings, and for anybody where nothing else could go on. They keep their place in
        the queue: else each of their tokens would cost them a turn of all others.
        """
        head = self._head()
        if head is None or not self.running:
            return []
        level = head.ticket[0]
        stuck = all(r.held for r in self.running)
        idle = [r for r in reversed(self.running) if r.held and (stuck or r.request_id == head.request_id)]
        turns = [r for r in self.running if not r.held and r.known >= r.turn]
        peers = (r for r in [*idle, *turns] if r.ticket[0] == level)
        victims = [*takewhile(lambda r: r.ticket[0] > level, reversed(self.running)), *peers]
        if not victims:
            return []
        most = self.pool.free + sum(len(r.blocks) for r in victims)
        if len(victims) < len(self.running):
            most -= self.reserve
            if self._blocked is not None and self._blocked[0] is head and self._blocked[1] > most:
                return []  # by what it needed when it was looked up last
        if (need := self.store.need(head, *self.store.places(head))) > most:
            return []
        gone: list[Request] = []
        while victims and (len(self.running) == self.max_num_seqs or need > self._room):
            gone.append(self._preempt(victims.pop(0), last=True))
            if need <= self._room:  # never less than before: what it finds may have been held by those who went
                need = self.store.need(head, *self.store.places(head))
        return gone

    def _drop(self, request: Request) -> None:
        """Forget a request, wherever it is, and free its blocks."""
        self._leave(request)
        request.running = False
        self.store.drop(request)
        self.store.drop_host(request)

    def _preempt(self, request: Request, *, last: bool = False) -> Request:
        """Back to the queue with a running request: it is swapped out, or it will be computed anew."""
        self._take(request)
        request.running = False
        if self.store.host is not None and self.swaps(request) and self.store.swap_out(request):
            self.num_swaps += 1
        else:
            self.store.drop(request)
            request.computed = 0
        request.preemptions += 1
        self.num_preemptions += 1
        self._enqueue(request, last=last and not request.held)
        return request
