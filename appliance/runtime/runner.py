"""Runs one planned step on the device: batch, forward, logits in slices of fixed size, sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from appliance.core.messages import TokenLogprob
from appliance.core.request import Request
from appliance.core.scheduler import Chunk, StepPlan
from appliance.memory.planner import LOGIT_ROWS, MemoryPlan
from appliance.runtime.batch import StepArrays
from appliance.runtime.graphs import DecodeGraphs, Recorder, capture_sizes
from appliance.runtime.sampler import Sampled, sample, token_logprobs
from kernels.ops import KVCache
from models.decoder import Decoder


@dataclass(frozen=True)
class PromptScores:
    """Log-probabilities of the prompt tokens ``first ..`` of one request, as one chunk gave them."""

    request: Request
    first: int
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class StepResult:
    sampled: tuple[Sampled | None, ...]  # one per chunk; None where the chunk does not sample
    prompt_scores: tuple[PromptScores, ...]


class Runner:
    """Owns the model and its KV cache. Everything that lasts is allocated here, before the first request."""

    def __init__(
        self, decoder: Decoder, plan: MemoryPlan, *, dtype: torch.dtype, device: torch.device, recorder: Recorder | None = None
    ) -> None:
        """``recorder``: steps of single tokens are recorded with it, here, and replayed."""
        self.decoder, self.device, self.block_size = decoder, device, plan.kv.block_size
        spare = 0 if recorder is None else 1  # a block for what fills up recorded steps
        self.caches = allocate_caches(plan, plan.num_blocks + spare, dtype=dtype, device=device)
        self._forward = decoder.bind(self.caches, max_tokens=plan.max_num_batched_tokens)
        self._graphs = None if recorder is None else self._record(plan, recorder)
        # Not made anew for each step: the system would clear its pages each time, which takes longer than to write logits there.
        self._out = torch.zeros(plan.logit_rows, decoder.spec.vocab, dtype=torch.float32, device=device)

    @torch.inference_mode()
    def _record(self, plan: MemoryPlan, recorder: Recorder) -> DecodeGraphs:
        return DecodeGraphs(
            self._forward,
            sizes=capture_sizes(plan.max_num_seqs),
            table_width=plan.kv.blocks(plan.max_model_len),
            spare_block=plan.num_blocks,
            block_size=self.block_size,
            recorder=recorder,
            device=self.device,
        )

    @torch.inference_mode()
    def run(self, plan: StepPlan, scored: Sequence[int]) -> StepResult:
        """Execute a plan. ``scored[i]`` says how many prompt tokens of chunk i's request have their log-probabilities already."""
        step = StepArrays.build(plan.chunks, self.block_size)
        if self._graphs is not None and self._graphs.takes(step):
            hidden = self._graphs.run(step)
        else:
            hidden = self._forward(*step.tensors(self.device))
        scores = []
        if any(c.request.params.prompt_logprobs is not None for c in plan.chunks):
            rows = hidden.split([c.length for c in plan.chunks])
            scores = [self._score_prompt(c, own, n) for c, own, n in zip(plan.chunks, rows, scored, strict=True)]
        last = hidden if step.max_query == 1 else hidden[torch.from_numpy(step.starts[1:] - 1).to(self.device)]
        return StepResult(sampled=self._sample(plan.chunks, last), prompt_scores=tuple(s for s in scores if s))

    def _sample(self, chunks: Sequence[Chunk], last: Tensor) -> tuple[Sampled | None, ...]:
        """Tokens after ``last`` [chunks, hidden], the hidden states of each chunk's last row."""
        out: list[Sampled | None] = [None] * len(chunks)
        ops = self.decoder.ops
        rows = [i for i, c in enumerate(chunks) if c.samples]
        if len(rows) < len(chunks):
            last = last[torch.tensor(rows, dtype=torch.int64, device=self.device)]
        for first in range(0, len(rows), LOGIT_ROWS):
            part = rows[first : first + LOGIT_ROWS]
            logits = self._logits(last[first : first + len(part)])
            found = sample(logits, [chunks[i].request for i in part], argmax=ops.argmax, kth=ops.kth_largest)
            for i, one in zip(part, found, strict=True):
                out[i] = one
        return tuple(out)

    def _logits(self, hidden: Tensor) -> Tensor:
        """float32 [R, V] for at most LOGIT_ROWS rows; they last until they are asked for again."""
        return self.decoder.logits(hidden, self._out[: hidden.shape[0]])

    def _score_prompt(self, chunk: Chunk, hidden: Tensor, scored: int) -> PromptScores | None:
        """Row p of the chunk predicts token p + 1. The first prompt token has nothing before it and no log-probability."""
        request = chunk.request
        if request.params.prompt_logprobs is None:
            return None
        first = max(chunk.start + 1, scored)
        last = min(chunk.start + chunk.length + 1, request.prompt_len)  # one past the last token that can be scored
        found: list[TokenLogprob] = []
        for a in range(first, last, LOGIT_ROWS):
            b = min(a + LOGIT_ROWS, last)
            logits = self._logits(hidden[a - 1 - chunk.start : b - 1 - chunk.start])
            wanted = [request.params.prompt_logprobs] * (b - a)
            found += token_logprobs(logits, request.tokens[a:b], wanted, kth=self.decoder.ops.kth_largest)
        return PromptScores(request, first, tuple(found)) if found else None


def allocate_caches(plan: MemoryPlan, blocks: int, *, dtype: torch.dtype, device: torch.device) -> list[KVCache]:
    """The whole pool, layer by layer: [blocks, block_size, Hkv, D] for keys and for values."""
    kv = plan.kv
    shape = (blocks, kv.block_size, kv.kv_heads, kv.head_dim)
    return [
        KVCache(k=torch.zeros(shape, dtype=dtype, device=device), v=torch.zeros(shape, dtype=dtype, device=device))
        for _ in range(kv.layers)
    ]
