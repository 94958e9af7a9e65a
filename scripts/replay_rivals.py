"""What paged memory is compared with: requests that get room in one piece when they are admitted, and batches that end as one.

Everything else is as kind to them as can be: the same steps with chunked prompts, no fragments between rooms, rooms of a batch
padded only in memory, no work for rows that have ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from appliance.core.params import RequestError
from appliance.core.request import Request


class Part(NamedTuple):
    """As appliance.core.scheduler.Chunk."""

    request: Request
    start: int
    length: int
    samples: bool


class Step(NamedTuple):
    chunks: tuple[Part, ...]


class Reserved:
    """First come, first served over ``capacity`` tokens; ``room(request)`` of them are a request's from admission to its end.

    whole_batches: nobody is admitted before all of the batch have ended, and every room is as large as the batch's largest.
    """

    def __init__(
        self,
        capacity: int,
        room: Callable[[Request], int],
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        whole_batches: bool = False,
    ) -> None:
        self.capacity, self.room, self.whole_batches = capacity, room, whole_batches
        self.max_num_batched_tokens, self.max_num_seqs = max_num_batched_tokens, min(max_num_seqs, max_num_batched_tokens)
        self.running: list[Request] = []  # with whole batches also those that have ended
        self.waiting: deque[Request] = deque()
        self.held = 0  # tokens' room that is taken
        self._largest = 0  # room in the batch

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def stored(self) -> int:
        return sum(r.computed for r in self.running if not r.finished)

    def add(self, request: Request) -> None:
        if self.room(request) > self.capacity:
            raise RequestError(f"{self.room(request)} tokens are more than {self.capacity}", param="max_tokens")
        self.waiting.append(request)

    def schedule(self) -> Step:
        open_batch = not self.whole_batches or not self.running
        budget, parts, place = self.max_num_batched_tokens, [], 0
        if self.whole_batches and open_batch:
            while self._admit():
                pass
        while budget and (place < len(self.running) or (open_batch and self._admit())):
            request, place = self.running[place], place + 1
            if request.finished:
                continue
            start, known = request.computed, len(request.tokens)
            length = min(known - start, budget)
            parts.append(Part(request, start, length, start + length == known))
            request.computed += length
            budget -= length
        return Step(tuple(parts))

    def commit(self, step: Step, sampled: Sequence[int | None]) -> list[Request]:
        ended = []
        for part, token in zip(step.chunks, sampled, strict=True):
            if part.samples:
                assert token is not None
                part.request.append(token)
                if part.request.finished:
                    ended.append(part.request)
        if not self.whole_batches and ended:
            self.running = [r for r in self.running if not r.finished]
            self.held -= sum(self.room(r) for r in ended)
        elif ended and all(r.finished for r in self.running):
            self.running, self.held, self._largest = [], 0, 0
        return ended

    def _admit(self) -> bool:
        if not self.waiting or len(self.running) == self.max_num_seqs:
            return False
        room = self.room(self.waiting[0])
        largest = max(room, self._largest)
        held = largest * (len(self.running) + 1) if self.whole_batches else self.held + room
        if held > self.capacity:
            return False
        self.held, self._largest = held, largest
        self.running.append(self.waiting.popleft())
        return True
