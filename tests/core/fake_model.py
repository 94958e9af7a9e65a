"""A model of one line over real paged memory: the next token is a hash of everything that is stored for the sequence.

Memory is two dictionaries, of the pool and of the host: block -> what each of its slots holds, a position, a token and a salt in
one number. A step's copies are carried out one after another, then all its tokens are stored, then every chunk reads all that is
before it through its block table, and has to find just its own tokens there. That is the order in which a device works that is
told step after step; its host may know the tokens later (``commit`` them after the next step was run).
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from typing import Any

from appliance.core.blocks import BlockPool
from appliance.core.params import SamplingParams
from appliance.core.request import Request
from appliance.core.scheduler import Scheduler
from appliance.core.step import Chunk, StepPlan
from appliance.core.store import Copy

VOCAB = 1000
SPOILT = -1
SALTS = ("", "tenant-1", "tenant-2")


_params = cache(
    lambda max_tokens, scores, least, stops: SamplingParams(
        max_tokens=max_tokens, prompt_logprobs=scores, min_tokens=least, stop_token_ids=stops
    )
)


def make_request(
    name: str,
    prompt: Iterable[int],
    max_tokens: int,
    *,
    index: int = 0,
    eos: Iterable[int] = (),
    seed: int = 0,
    priority: int = 0,
    salt: str = "",
    leader: Request | None = None,
    beam: bool = False,
    scores: int | None = None,
    least: int = 0,
    stops: tuple[int, ...] = (),
) -> Request:
    """``scores``: prompt_logprobs, ``least``: min_tokens, ``stops``: stop_token_ids."""
    tokens = list(prompt)
    params, total = _params(max_tokens, scores, least, stops), len(tokens) + max_tokens
    return Request(
        name, index, tokens, len(tokens), params, total, seed, 0.0, frozenset(eos), priority, salt, leader=leader, beam=beam
    )


def next_token(tokens: Sequence[int], seed: int = 0) -> int:
    return zlib.crc32(tokens if isinstance(tokens, array) else array("q", tokens), seed) % VOCAB


def alone(prompt: Iterable[int], max_tokens: int, ends: Iterable[int] = (), seed: int = 0, least: int = 0) -> list[int]:
    """All tokens of a request that runs by itself, without blocks or chunks. ``ends``: tokens that end it, from ``least`` on."""
    tokens = array("q", prompt)
    for number in range(1, max_tokens + 1):
        tokens.append(next_token(tokens, seed))
        if number >= least and tokens[-1] in ends:
            break
    return tokens.tolist()


def codes(tokens: Iterable[int], salt: str, first: int = 0) -> list[int]:
    """What the slots of these tokens hold, the first of which has position ``first``."""
    base = SALTS.index(salt) << 40
    return [base + (position << 20) + token for position, token in enumerate(tokens, first)]


class PlainKey:
    """In place of sha256: the key of a block is all that it stands for, in plain text."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def digest(self) -> bytes:
        return self.data


@lru_cache(4096)
def contents(key: bytes, size: int | None) -> list[int]:
    """Of a block with a plain key, or of all blocks up to it."""
    salt, tokens = (key[:8].decode(), key[8:]) if key.startswith(b"tenant") else ("", key)
    told = array("q", tokens)
    return codes(told, salt) if size is None else codes(told[-size:], salt, len(told) - size)


class SpoilingPool(BlockPool):
    """A pool whose blocks lose what they contain when they become blank and when they are given out.

    It says so among the copies, in order: "spoil". ``fails`` decides which allocations return None for no reason.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, host: bool = False, fails: Callable[[], bool] = lambda: False
    ) -> None:
        super().__init__(num_blocks, block_size)
        self.kind, self.fails = "spoil host" if host else "spoil", fails
        self.log: Callable[[Copy], None] = lambda copy: None
        self.faults = 0

    def allocate(self, n: int, *, after: int | None = None, expect: int = 0) -> list[int] | None:
        if n and self.fails():
            self.faults += 1
            return None
        blocks = super().allocate(n, after=after, expect=expect)
        self._spoil(blocks or [])
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        super().release(blocks)
        self._spoil(block for block in blocks if self._counts[block] == 0 and block not in self._keys)

    def forget(self) -> None:
        self._spoil([*self._kept])
        super().forget()

    def _spoil(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self.log(Copy(self.kind, block, block))  # type: ignore[arg-type]


class FakeRunner:
    def __init__(self, scheduler: Scheduler, *, stateful: bool = False) -> None:
        """``stateful``: what a sequence has at its seat must be what its own tokens have left there, all of them in turn."""
        self.scheduler, self.stateful = scheduler, stateful
        self.states: dict[int, list[int]] = {}  # by seat or place: the codes of all tokens that are in it
        self.pool: dict[int, list[int]] = {}
        self.host: dict[int, list[int]] = {}
        self.sampled: dict[Request, int] = {}  # by the last step: what the host may not know yet
        for pool in (scheduler.pool, scheduler.store.host):
            if isinstance(pool, SpoilingPool):
                pool.log = lambda copy: scheduler.store.copies.append(copy)  # the list is replaced now and then

    def run(self, plan: StepPlan) -> list[int | tuple[int, ...] | None]:
        self.copy(plan.copies)
        tokens = [self._known(c)[: c.start + c.length] for c in plan.chunks]
        wanted = [codes(known, chunk.request.salt) for chunk, known in zip(plan.chunks, tokens, strict=True)]
        for chunk, want in zip(plan.chunks, wanted, strict=True):
            self._store(chunk.request.blocks, want, chunk.start)
        found: list[int | tuple[int, ...] | None] = []
        for chunk, known, want in zip(plan.chunks, tokens, wanted, strict=True):
            have = [code for block in chunk.request.blocks for code in self.pool[block]][: len(want)]
            assert have == want, f"{chunk.request.key} reads what is not its own at {_differ(have, want)}"
            found.append(
                _drawn(chunk, known) if chunk.draft else next_token(known, chunk.request.seed) if chunk.samples else None
            )
        if self.stateful:
            for chunk, want in zip(plan.chunks, wanted, strict=True):
                self._go_on(chunk, want)
        self.sampled = {chunk.request: token for chunk, token in zip(plan.chunks, found, strict=True) if isinstance(token, int)}
        return found

    def _known(self, chunk: Chunk) -> list[int]:
        return [*chunk.request.tokens, *(chunk.draft or [self.sampled.get(chunk.request, SPOILT)])]

    def copy(self, copies: Iterable[Copy]) -> None:
        for kind, source, target in copies:
            if kind == "out":
                self.host[target] = self.pool[source][:]
            elif kind == "in":
                self.pool[target] = self.host[source][:]
            elif kind == "copy":
                self.pool[target] = self.pool[source][:]
            elif kind == "states":
                self.states[target] = self.states[source][:]
            else:
                (self.pool if kind == "spoil" else self.host)[target] = self._blank()

    def spoil(self) -> None:
        """A step failed: nothing is what it was."""
        for memory in (self.pool, self.host):
            memory.update((block, self._blank()) for block in memory)
        self.states.update((seat, [SPOILT]) for seat in self.states)
        self.sampled = {}

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

    def _go_on(self, chunk: Chunk, want: Sequence[int]) -> None:
        """From nothing where it begins, from what is there where it goes on."""
        request, start = chunk.request, chunk.start
        state = self.states.get(request.seat) if start else []
        assert state == [*want[:start]], f"{request.key} goes on at seat {request.seat} from what is not its own"
        self.states[request.seat] = [*want]

    def _blank(self) -> list[int]:
        return [SPOILT] * self.scheduler.pool.block_size

    def _store(self, blocks: Sequence[int], want: Sequence[int], start: int) -> None:
        """Write what is wanted from ``start`` on; nobody else may see a change."""
        size = self.scheduler.pool.block_size
        for position in range(start, len(want)):
            block, slot = blocks[position // size], position % size
            held = self.pool.setdefault(block, self._blank())
            if held[slot] != want[position]:
                assert self.scheduler.pool.holders(block) == 1, f"block {block} is written, and others hold it"
                held[slot] = want[position]


def _drawn(chunk: Chunk, known: Sequence[int]) -> tuple[int, ...]:
    """What is drawn after each token of a chunk with a draft, as far as that is what was drawn."""
    known, found = known[: chunk.start + 1], []
    for guess in (*chunk.draft, None):
        found.append(next_token(known, chunk.request.seed))
        known = [*known, found[-1]]
        if guess != found[-1]:
            break
    return tuple(found)


def _differ(have: Sequence[int], want: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(have, want)) if a != b), len(have))


def make_scheduler(
    *, blocks: int = 64, size: int = 4, budget: int = 64, seqs: int = 8, host: int = 0, **options: Any
) -> tuple[Scheduler, FakeRunner]:
    """Over pools that spoil; ``host``: blocks of the second tier. The other options are the scheduler's."""
    second = SpoilingPool(host, size, host=True) if host else None
    pool = SpoilingPool(blocks, size)
    scheduler = Scheduler(pool, max_num_batched_tokens=budget, max_num_seqs=seqs, host=second, **options)
    return scheduler, FakeRunner(scheduler)


def shape(plan: StepPlan) -> list[tuple[str, int, int, bool]]:
    return [(c.request.request_id, c.start, c.length, c.samples) for c in plan.chunks]


def moves(plan: StepPlan) -> list[Copy]:
    return [copy for copy in plan.copies if copy.kind in ("out", "in", "copy")]
