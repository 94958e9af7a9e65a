"""A model of one line over a real paged cache: the next token is a hash of everything that is stored for the sequence.

It reads only what it finds in the slots of the request's block table, so a wrong table, a stale slot or a block with two
owners gives other tokens than ``alone``.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

from appliance.core.params import SamplingParams
from appliance.core.request import Request
from appliance.core.scheduler import Scheduler
from appliance.core.step import StepPlan

VOCAB = 1000


def make_request(
    name: str, prompt: Sequence[int], max_tokens: int, *, index: int = 0, eos: Iterable[int] = (), arrival: float = 0.0
) -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    total = len(prompt) + max_tokens
    return Request(name, index, list(prompt), len(prompt), params, total, 0, arrival, frozenset(eos))


def next_token(tokens: Sequence[int]) -> int:
    return zlib.crc32(repr(list(tokens)).encode()) % VOCAB


def alone(prompt: Sequence[int], max_tokens: int, eos: Iterable[int] = ()) -> list[int]:
    """All tokens of a request that runs by itself, without blocks or chunks."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
        if tokens[-1] in eos:
            break
    return tokens


class FakeRunner:
    """Stores (position, token) by slot and samples from what it reads back."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.cache: dict[int, tuple[int, int]] = {}
        self.sampled: dict[Request, int] = {}  # what the host may not know yet

    def run(self, plan: StepPlan) -> list[int | None]:
        for chunk in plan.chunks:  # as on a device: all keys and values are stored before any is read
            for position in range(chunk.start, chunk.start + chunk.length):
                self.cache[self._slot(chunk.request, position)] = (position, self._token(chunk.request, position))
        found = [self._sample(chunk.request, chunk.start + chunk.length) if chunk.samples else None for chunk in plan.chunks]
        self.sampled = {chunk.request: token for chunk, token in zip(plan.chunks, found, strict=True) if token is not None}
        return found

    def step(self) -> tuple[StepPlan, list[Request]]:
        plan = self.scheduler.schedule()
        return plan, self.scheduler.commit(plan, self.run(plan))

    def finish(self, limit: int) -> list[Request]:
        """Step until nothing is left, or fail after ``limit`` steps."""
        ended: list[Request] = []
        for _ in range(limit):
            if not self.scheduler.has_work:
                return ended
            ended += self.step()[1]
            self.scheduler.check()
        assert not self.scheduler.has_work, f"unfinished after {limit} steps"
        return ended

    def _slot(self, request: Request, position: int) -> int:
        size = self.scheduler.pool.block_size
        return request.blocks[position // size] * size + position % size

    def _token(self, request: Request, position: int) -> int:
        return request.tokens[position] if position < len(request.tokens) else self.sampled[request]

    def _sample(self, request: Request, known: int) -> int:
        stored = [self.cache[self._slot(request, p)] for p in range(known)]
        assert [position for position, _ in stored] == list(range(len(stored))), "a slot holds another position's token"
        return next_token([token for _, token in stored])
