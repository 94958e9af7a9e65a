"""Steps that make a card compile or load every kernel which serving will launch, before anyone waits for it.

They go the way of real steps, through a Runner, so that nothing has to be said twice: products and attention for every range of
rows and lengths that takes a kernel of its own, the head, and each way to draw a token. All of them store into block 0.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from appliance.core.params import SamplingParams
from appliance.core.request import Request
from appliance.core.step import Chunk, StepPlan
from appliance.memory.planner import LOGIT_ROWS, MemoryPlan
from appliance.runtime.runner import Flight, Runner
from kernels.configs import table

GREEDY = SamplingParams(temperature=0.0)
EVERY_ROW = SamplingParams(temperature=0.0, prompt_logprobs=0)  # goes through layers that store nothing, too
DRAWS = (SamplingParams(), SamplingParams(top_k=5, top_p=0.9, min_p=0.01))
ON_HOST = (
    SamplingParams(temperature=0.0, logprobs=2),
    SamplingParams(logprobs=0, top_k=5),
    SamplingParams(logprobs=0, top_p=0.9),
    SamplingParams(logprobs=0, top_p=0.9, min_p=0.01),
    SamplingParams(repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1, logit_bias={0: 1.0}, min_tokens=1),
)
SPLIT = 128  # tokens of context: attention over one sequence is cut differently at this many, twice, four times as many


@dataclass(frozen=True)
class Trial:
    """One step: for each sequence where its chunk begins, and its length."""

    chunks: tuple[tuple[int, int], ...]
    params: SamplingParams = field(default_factory=lambda: GREEDY)
    scored: bool = False  # whether prompt tokens have their log-probabilities already

    @property
    def tokens(self) -> int:
        return sum(length for _, length in self.chunks)


def edges(most: int) -> list[int]:
    """Numbers in 1 .. most, in each range that a launch may depend on (kernels/tune.py): they end at powers of 2, or amid two."""
    powers = [2**k for k in range(most.bit_length())]
    found = {1, most, *powers, *(p + 1 for p in powers), *(3 * p // 2 for p in powers if p <= 256)}
    return sorted(n for n in found if n <= most)


def full(plan: MemoryPlan, tokens: int | None = None) -> Trial:
    """A step of so many prompt tokens, or of the most: of one sequence, or of several where the context is shorter."""
    longest, left = plan.max_model_len, tokens or plan.max_num_batched_tokens
    chunks: list[tuple[int, int]] = []
    while left and len(chunks) < plan.max_num_seqs:
        chunks.append((0, min(left, longest)))
        left -= chunks[-1][1]
    return Trial(tuple(sorted(chunks, key=lambda chunk: chunk[1] > 1)), EVERY_ROW, scored=True)


def decodes(sequences: int, params: SamplingParams = GREEDY) -> Trial:
    return Trial(((1, 1),) * sequences, params)


def table_rows(card: str) -> set[int]:
    """Numbers of rows at which the table of measured launches of a card, where there is one, goes from one to the next."""
    found = table(card)
    ends = {most for sizes in found.launches.values() for most, _ in sizes} if found else set()
    return ends | {end + 1 for end in ends}


def trials(plan: MemoryPlan) -> Iterator[Trial]:
    """All steps of a warm-up, the one that takes the most memory first.

    One sequence of each length stands for all numbers of them: it is cut into the most parts. That counts where decode steps are
    recorded, too: single tokens beside a prompt are launched, over contexts of any length.
    """
    tokens, longest = plan.max_num_batched_tokens, plan.max_model_len
    sequences = min(plan.max_num_seqs, tokens)
    measured = {rows for rows in table_rows(plan.device.name) if rows < tokens}
    for rows in sorted({*edges(tokens), *measured}, reverse=True):
        yield full(plan, rows)
    for count in reversed(edges(sequences)):
        yield decodes(count)
    few, many = min(2, sequences), min(LOGIT_ROWS, sequences)
    yield from (decodes(rows, params) for params in DRAWS for rows in sorted({1, few, many}))
    yield from (decodes(rows, params) for params in ON_HOST for rows in sorted({1, few}))
    for rows in edges(max(1, min(LOGIT_ROWS, longest - 1, tokens - 1))):  # all but the last of a prompt go through the head
        yield Trial(((0, min(rows + 1, longest, tokens)),), SamplingParams(prompt_logprobs=2))
    if sequences > 1 and tokens > 4 and longest > 3:
        yield Trial(((1, 1), (0, 3)))
        yield Trial(((1, 1),) * (sequences // 2) + ((0, min(tokens - sequences // 2, longest)),), DRAWS[-1])
    lengths = {SPLIT * 2**k + 1 for k in range(longest.bit_length())}
    yield from (Trial(((length - 1, 1),)) for length in sorted({n for n in lengths if n <= longest} | {longest}))


def rehearsal(plan: MemoryPlan) -> Iterator[Trial]:
    """A few steps with all in place: what they need is in hand, and shown to be enough, before the first request comes."""
    sequences = min(plan.max_num_seqs, plan.max_num_batched_tokens)
    yield full(plan)
    yield decodes(sequences, DRAWS[-1])
    yield decodes(1)


def run(runner: Runner, steps: Iterable[Trial], longest: int) -> int:
    """Run the steps; how many there were. Where the runner runs ahead, single tokens are followed by the next ones at once.

    ``longest``: tokens that a sequence may have.
    """
    count = 0
    for trial in steps:
        requests = [_request(i, trial, start, length, runner.block_size) for i, (start, length) in enumerate(trial.chunks)]
        flights = [_launch(runner, requests, trial, trial.chunks)]
        ahead = tuple((start + 1, 1) for start, length in trial.chunks if length == 1 and start + 2 <= longest)
        if runner.runs_ahead and flights[0].open and len(ahead) == len(requests):
            flights.append(_launch(runner, requests, trial, ahead))
        for flight in flights:
            flight.land()
        count += len(flights)
    return count


def _launch(runner: Runner, requests: list[Request], trial: Trial, chunks: tuple[tuple[int, int], ...]) -> Flight:
    plan = StepPlan(tuple(Chunk(r, start, length, True) for r, (start, length) in zip(requests, chunks, strict=True)), ())
    return runner.launch(plan, [request.prompt_len if trial.scored else 0 for request in requests])


def _request(index: int, trial: Trial, start: int, length: int, block_size: int) -> Request:
    tokens = start + length
    return Request(
        request_id="warm-up",
        index=index,
        tokens=[0] * tokens,
        prompt_len=start or length,
        params=trial.params,
        max_total=tokens + 1,
        seed=index,
        arrival=0.0,
        computed=start,
        seat=index,
        blocks=array("i", [0] * -(-(tokens + 1) // block_size)),
    )
