"""How fast a loaded model reads and writes: through the whole engine, warm, with nothing else at work."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from appliance.core.messages import Submit
from appliance.core.params import SamplingParams
from appliance.runtime.engine import Engine
from quant.errors import InputError

REPEATS = 3  # prompts that are timed; the median counts


@dataclass(frozen=True)
class Speed:
    """Tokens a second."""

    input_len: int
    output_len: int
    prefill: float  # of one prompt, until its first token is there
    decode: dict[int, float]  # of all sequences together, by their number

    def to_dict(self) -> dict[str, Any]:
        decode = {str(count): value for count, value in self.decode.items()}
        return {"input_len": self.input_len, "output_len": self.output_len, "prefill_tokens_per_s": self.prefill,
                "decode_tokens_per_s": decode}  # fmt: skip


def measure(engine: Engine, sequences: Sequence[int], *, input_len: int, output_len: int, seed: int = 0) -> Speed:
    """Random prompts of ``input_len`` tokens, as many at once as each of ``sequences`` says, answered with ``output_len``.

    Decoding is timed step by step while all sequences decode: the tokens of a step by the median of its seconds, which some other
    program's moment does not move. InputError where the first answers end before the last prompt is read.
    """
    rng = random.Random(seed)

    def prompts(count: int) -> list[list[int]]:
        vocab = engine.info.vocab_size
        return [[rng.randrange(vocab // 100, vocab) for _ in range(input_len)] for _ in range(count)]

    _answer(engine, prompts(max(sequences)), min(4, output_len))  # warm: what is made at first use is there
    firsts = [_answer(engine, prompts(1), 1)[0][0] for _ in range(REPEATS)]
    decode = {count: _decoded(_answer(engine, prompts(count), output_len), count) for count in sequences}
    return Speed(input_len, output_len, input_len / statistics.median(firsts), decode)


def _answer(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int) -> list[tuple[float, int]]:
    """For each step that gave tokens: seconds since the prompts were handed over, and how many."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    begun, found = time.perf_counter(), []
    for k, prompt in enumerate(prompts):
        engine.submit(Submit(f"speed-{k}", tuple(prompt), params, time.time()))
    while engine.has_work:
        events = engine.step()
        errors = [event.error for event in events if event.error is not None]
        if errors:
            raise RuntimeError(errors[0])
        if events:
            found.append((time.perf_counter() - begun, sum(len(event.token_ids) for event in events)))
    return found


def _decoded(steps: Sequence[tuple[float, int]], sequences: int) -> float:
    """Tokens a second of the steps in which all sequences decoded, each timed from the end of the one before."""
    pairs = pairwise(steps)
    seconds = [now - before for (before, some), (now, tokens) in pairs if some == tokens == sequences]
    if not seconds:
        raise InputError(f"--output-len is too small for --batch-size {sequences}: no step had all {sequences} answers under way")
    return sequences / statistics.median(seconds)
