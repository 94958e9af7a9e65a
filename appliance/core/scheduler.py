"""Which tokens of which requests run in the next step: a value, decided before anything is computed.

The rules and what they guarantee are in docs/scheduling.md.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from appliance.core.blocks import BlockPool, PoolError
from appliance.core.params import RequestError
from appliance.core.request import Request


class Chunk(NamedTuple):
    """Compute tokens ``start : start + length`` of a request; its blocks already hold room for them."""

    request: Request
    start: int
    length: int
    samples: bool  # the chunk reaches the last known token: its last row's logits give the next one


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. ``chunks`` are in order of arrival: single tokens (decodes), then what is left of prompts."""

    chunks: tuple[Chunk, ...]
    preempted: tuple[Request, ...]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


class Scheduler:
    """Continuous batching with chunked prefill, first come first served, over one pool.

    ``running`` and then ``waiting`` are always in order of arrival: requests are admitted from the head of the queue and
    preempted from the tail of the running ones.
    """

    def __init__(self, pool: BlockPool, *, max_num_batched_tokens: int, max_num_seqs: int) -> None:
        if max_num_batched_tokens < 1 or max_num_seqs < 1:
            raise ValueError(f"max_num_batched_tokens={max_num_batched_tokens} and max_num_seqs={max_num_seqs} must be >= 1")
        self.pool = pool
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)  # so that every running decode fits into every step
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.num_preemptions = 0
        self._requests: dict[tuple[str, int], Request] = {}  # in order of arrival

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError for an id in use and for one whose tokens the whole pool cannot hold."""
        if request.key in self._requests:
            raise RequestError(f"request_id {request.request_id!r} is in use", param="request_id", code="request_id_in_use")
        need, have = self._blocks(request.max_total - 1), self.pool.num_blocks
        if need > have:
            size = self.pool.block_size
            raise RequestError(
                f"prompt plus answer may reach {request.max_total} tokens ({need} KV blocks of {size}), but the whole cache "
                f"holds {have * size} ({have} blocks): ask for at most {have * size + 1} tokens in all",
                param="max_tokens",
                code="context_length_exceeded",
            )
        self._requests[request.key] = request
        self.waiting.append(request)

    def abort(self, request_id: str, index: int | None = None) -> list[Request]:
        """End a request (all its completions, or one) with "abort" and free its blocks now. Unknown ids end nothing."""
        found = [r for r in self._requests.values() if r.request_id == request_id and index in (None, r.index)]
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
        budget = self.max_num_batched_tokens
        chunks: list[Chunk] = []
        preempted: list[Request] = []
        place = 0
        while place < len(self.running) or self._admit(budget):
            request = self.running[place]
            start, known = request.computed, request.known
            if known >= request.max_total:  # its last token is under way
                place += 1
                continue
            end = min(known, start + budget)  # the budget is never spent here: only the youngest has more than one token pending
            while not self._extend(request, end):
                preempted.append(self._preempt_youngest())
                if preempted[-1] is request:
                    break
            else:
                chunks.append(Chunk(request, start, end - start, end == known))
                budget -= end - start
                request.computed, place = end, place + 1
                request.ahead += end == known
        return StepPlan(tuple(chunks), tuple(preempted))

    def commit(self, plan: StepPlan, sampled: Sequence[int | None]) -> list[Request]:
        """Take what the step computed: ``sampled[i]`` is the token of chunk i where it samples, else None.

        Steps are taken in the order in which they were scheduled. Returns the requests that are finished now; their blocks are
        free, as whatever is computed with them later comes after the steps under way. Requests that ended since ``schedule`` are
        skipped; one whose finish_reason was set since (an error in its row) is finished and takes no token.
        """
        if len(sampled) != len(plan.chunks):
            raise ValueError(f"{len(plan.chunks)} chunks, but {len(sampled)} sampled entries")
        finished = []
        for chunk, token in zip(plan.chunks, sampled, strict=True):
            request = chunk.request
            if self._requests.get(request.key) is not request:
                continue
            if request.finish_reason is None and chunk.samples:
                if token is None:
                    raise ValueError(f"request {request.key} reached its last token, but nothing was sampled")
                request.ahead -= 1
                request.append(token)
            if request.finish_reason is not None:
                self._drop(request)
                finished.append(request)
        return finished

    def check(self) -> None:
        """Raises PoolError unless, at any moment, all of this holds.

        running + waiting is the order of arrival; a running request holds at least ceil(computed / block_size) blocks (what
        is stored) and at most ceil(known / block_size); a waiting one holds none and has computed 0;
        no block has two owners; every used block has an owner; the pool's own books are right.
        """
        self.pool.check()
        if [*self.running, *self.waiting] != list(self._requests.values()):
            raise PoolError("running + waiting is not the order of arrival")
        if len(self.running) > self.max_num_seqs:
            raise PoolError(f"{len(self.running)} running, more than {self.max_num_seqs}")
        for r in self.running:
            low, high = self._blocks(r.computed), self._blocks(r.known)
            if not low <= len(r.blocks) <= high:
                raise PoolError(f"request {r.key} holds {len(r.blocks)} blocks, expected {low} to {high}")
        for r in self.waiting:
            if r.blocks or r.computed:
                raise PoolError(f"request {r.key} waits with {len(r.blocks)} blocks and {r.computed} tokens computed")
        owned = [block for r in self.running for block in r.blocks]
        if len(set(owned)) != len(owned) or len(owned) != self.pool.used:
            raise PoolError(f"{self.pool.used} blocks in use, {len(owned)} owned, {len(set(owned))} of them different")

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.pool.block_size)

    def _admit(self, budget: int) -> bool:
        """Move the head of the queue to the running ones, if there is budget, a seat, and blocks for all of it.

        "All" is every known token and the next one (but the very last is never stored). So a request that was preempted in
        this step, or one behind it, cannot come in again at once: fewer blocks are free now than it had.
        """
        while self.waiting and self.waiting[0].finished:
            self._drop(self.waiting[0])
        if not self.waiting or budget == 0 or len(self.running) == self.max_num_seqs:
            return False
        request, known = self.waiting[0], len(self.waiting[0].tokens)
        if request.ahead:  # preempted while its next token is under way
            return False
        if self._blocks(max(known, min(known + 1, request.max_total - 1))) > self.pool.free:
            return False
        self.running.append(self.waiting.popleft())
        return True

    def _extend(self, request: Request, tokens: int) -> bool:
        """Give the request blocks for its first ``tokens`` tokens, if they are free."""
        held, size = len(request.blocks), self.pool.block_size
        need = -(-tokens // size) - held
        if need > 0:
            after = request.blocks[-1] if held else None
            blocks = self.pool.allocate(need, after=after, expect=-(-(request.max_total - 1) // size) - held)
            if blocks is None:
                return False
            request.blocks.extend(blocks)
        return True

    def _release(self, request: Request) -> None:
        self.pool.release(request.blocks)
        del request.blocks[:]

    def _drop(self, request: Request) -> None:
        """Forget a request, wherever it is, and free its blocks."""
        del self._requests[request.key]
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self._release(request)

    def _preempt_youngest(self) -> Request:
        """Put the youngest running request back to the head of the queue; it will be computed anew."""
        victim = self.running.pop()
        self._release(victim)
        victim.computed = 0
        victim.preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(victim)
        return victim
