"""Runs planned steps on the device: batch, forward, logits in slices of fixed size, sampling.

A step is launched, and later landed. Where the device works by itself and draws the tokens too, the next step is launched before
the last one lands: its inputs are those that the host knows, and the tokens that it does not know yet are already there.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from appliance.core.messages import TokenLogprob
from appliance.core.params import SamplingParams
from appliance.core.request import Adapter, Request
from appliance.core.step import Chunk, StepPlan
from appliance.core.store import Copy
from appliance.memory.inputs import input_bytes
from appliance.memory.planner import LOGIT_ROWS, MemoryPlan
from appliance.runtime.batch import Draws, StepArrays
from appliance.runtime.caches import allocate_caches, allocate_states, move_states
from appliance.runtime.grammar import Masks
from appliance.runtime.graphs import DecodeGraphs, Recorder
from appliance.runtime.mover import make_mover, rehearse
from appliance.runtime.pooling import embeddings
from appliance.runtime.sampler import Sampled, draws_on_device, sample, token_logprobs
from appliance.runtime.staging import Lane, Staging, send_at_once
from kernels.adapters import AdapterWeights
from kernels.ops import Ops
from models.decoder import Decoder
from models.spec import ModelSpec


@dataclass(frozen=True)
class PromptScores:
    """Log-probabilities of the prompt tokens ``first ..`` of one request, as one chunk gave them."""

    request: Request
    first: int
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class StepResult:
    sampled: tuple[tuple[Sampled, ...], ...]  # of each chunk: none where it does not sample, several where a draft was right
    prompt_scores: tuple[PromptScores, ...]
    embeddings: dict[Request, bytes]


@dataclass(frozen=True)
class Flight:
    """A step under way."""

    plan: StepPlan
    rows: dict[Request, int]  # whose token is which of ``tokens``
    tokens: Tensor  # int64, on the host; written once ``wait`` returns
    wait: Callable[[], None]
    drawn: dict[Request, Sampled]  # on the host, while the step was launched
    prompt_scores: tuple[PromptScores, ...]
    guided: bool  # whether the host must see a token before it knows what may come after it
    embeddings: dict[Request, bytes]  # of requests that want theirs
    guesses: dict[Request, list[Request]]  # with drafts: each as it would be if one more token of its draft were known

    @property
    def open(self) -> bool:
        """Whether the next step can be launched before this one lands: all that it asks of the host is done."""
        return not self.drawn and not self.prompt_scores and not self.guided

    def land(self) -> StepResult:
        """Wait for the device, and take the tokens. RuntimeError where it failed."""
        self.wait()
        tokens = self.tokens.tolist()
        found: list[tuple[Sampled, ...]] = []
        for chunk in self.plan.chunks:
            row = self.rows.get(chunk.request)
            one = self.drawn.get(chunk.request) if row is None else Sampled.of(tokens[row])
            found.append(() if one is None else (one, *self._after(chunk, one.token)))
        return StepResult(sampled=tuple(found), prompt_scores=self.prompt_scores, embeddings=self.embeddings)

    def _after(self, chunk: Chunk, token: int) -> Iterator[Sampled]:
        """What was drawn after this token, and so on, as far as the chunk's draft says what was drawn."""
        for guess, request in zip(chunk.draft, self.guesses.get(chunk.request, ()), strict=True):
            one = self.drawn[request]
            if guess != token or one.error is not None:  # an error will come again, where it is the next token's
                return
            yield one
            token = one.token


class Runner:
    """Owns the model and its KV cache. Everything that lasts is allocated here, before the first request."""

    def __init__(
        self,
        decoder: Decoder,
        plan: MemoryPlan,
        *,
        device: torch.device,
        lane: Lane | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """``lane``: how a device that works by itself is told; ``recorder``: steps of single tokens are recorded and replayed."""
        self.decoder, self.device, self.block_size = decoder, device, plan.kv.block_size
        self.runs_ahead = lane is not None and decoder.ops.sample is not None
        spare = 0 if recorder is None else 1  # a block, and a seat, for what fills up recorded steps
        self.caches = allocate_caches(plan, plan.num_blocks + spare, device=device, given=decoder.given_scales(plan.kv.dtype))
        self.states = allocate_states(decoder.spec, plan.state_places + spare, device=device)
        self.adapters: dict[Adapter, AdapterWeights] = {}  # that requests may have
        self._mover = make_mover(decoder.ops.name, self.caches, plan.swap_blocks)
        self._forward = decoder.bind(self.caches, states=self.states, max_tokens=plan.max_num_batched_tokens)
        self._staging = None if lane is None else Staging(_input_bytes(plan, decoder.spec), lane, device)
        # Not made anew for each step: the system would clear its pages each time, which takes longer than to write logits there.
        self._out = torch.zeros(plan.logit_rows, decoder.spec.vocab, dtype=torch.float32, device=device)
        self._tokens = torch.zeros(plan.max_num_seqs, dtype=torch.int64, device=device)  # drawn by the last step
        self._answers = [self._tokens] if lane is None else [lane.pinned(self._tokens.nbytes).view(torch.int64) for _ in range(2)]
        self._mark: Callable[[], Callable[[], None]] = (lambda: _nothing_to_wait_for) if lane is None else lane.mark
        self._rows: dict[Request, int] = {}  # whose token is where in ``_tokens``
        self._graphs = None if recorder is None else self._record(plan, recorder)

    @torch.inference_mode()
    def _record(self, plan: MemoryPlan, recorder: Recorder) -> DecodeGraphs:
        return DecodeGraphs(
            lambda ids, batch: self._forward(self._known(ids), batch),
            sizes=plan.decode_sizes,
            table_width=plan.kv.blocks(plan.max_model_len),
            spare_block=plan.num_blocks,
            block_size=self.block_size,
            recorder=recorder,
            send=self._send,
            spare_seat=plan.state_places if self.states else None,
        )

    @property
    def swap_bytes(self) -> int:
        """Of host memory, for blocks."""
        return self._mover.host_bytes

    @torch.inference_mode()
    def move(self, copies: Sequence[Copy]) -> None:
        """Carry out the copies of a plan, before it is launched. States lie elsewhere than blocks: their order is their own."""
        for copy in (copy for copy in copies if copy.kind == "states"):
            move_states(self.states, copy.source, copy.target)
        if blocks := [copy for copy in copies if copy.kind != "states"]:
            self._mover.move(blocks)

    def rehearse_copies(self, plan: MemoryPlan) -> None:
        """Before there is anything in the cache: what copies need is compiled."""
        rehearse(self._mover, plan.num_blocks, plan.swap_blocks)

    @torch.inference_mode()
    def launch(self, plan: StepPlan, scored: Sequence[int]) -> Flight:
        """Start a plan. ``scored[i]`` says how many prompt tokens of chunk i's request have their log-probabilities already.

        Before the step launched last has landed, only where that one is ``open`` and this runner ``runs_ahead``.
        """
        chunks = plan.chunks
        self._mover.wait(chunks)
        step = StepArrays.build(chunks, self.block_size, self._rows, states=bool(self.states))
        recorded = None if self._graphs is None else self._graphs.prepare(step)
        if recorded is None and any(self.decoder.spec.shared) and not step.adapters:  # whose rows are those of the whole step
            step = step.wanting([chunk.wanted for chunk in chunks])
        sampling, starts = [chunk for chunk in chunks if chunk.samples], step.result_starts
        last = np.array([end - 1 for chunk, end in zip(chunks, starts[1:], strict=False) if chunk.samples], dtype=np.int64)
        guesses = {chunk.request: _guesses(chunk) for chunk in sampling if chunk.draft}
        requests = [chunk.request for chunk in sampling]
        if guesses:  # a row for each of them, too
            last = np.concatenate([np.arange(row - len(chunk.draft), row + 1) for chunk, row in zip(sampling, last, strict=True)])
            requests = [request for own in requests for request in (own, *guesses.get(own, ()))]
        on_device = self.decoder.ops.sample is not None and not guesses
        draws = Draws.build(sampling) if on_device else None
        sent = self._send([*(recorded or step).arrays, last, *(draws or ())])
        hidden = self._hidden(step, recorded, sent)
        masks = Masks.of(requests, self.decoder.spec.vocab)  # while the device works
        scores = []
        if any(c.request.params.prompt_logprobs is not None for c in chunks):
            rows = hidden.tensor_split(starts[1:-1].tolist())
            scores = [self._score_prompt(c, own, n) for c, own, n in zip(chunks, rows, scored, strict=False)]
        if starts[-1] > len(requests):
            hidden = hidden[sent[len(step.arrays)]]
        drawn = self._draw(requests, hidden, masks, draws, sent[len(step.arrays) + 1 :])
        self._rows = {request: row for row, request in enumerate(requests) if request not in drawn}
        self._answers.reverse()
        answer = self._answers[0][: len(requests)]
        if self._rows:
            answer.copy_(self._tokens[: len(requests)], non_blocking=True)
        mark, told = self._mark(), tuple(s for s in scores if s)
        return Flight(plan, self._rows, answer, mark, drawn, told, bool(masks), embeddings(hidden, requests), guesses)

    def _send(self, arrays: Sequence[np.ndarray]) -> list[Tensor]:
        return send_at_once(arrays, self.device) if self._staging is None else self._staging.send(arrays)

    def _hidden(self, step: StepArrays, recorded: StepArrays | None, sent: Sequence[Tensor]) -> Tensor:
        """Hidden states [T, hidden] of a step whose arrays (as they were recorded, where they were) have been sent.

        [R, hidden] where not all rows are wanted.
        """
        if recorded is not None and self._graphs is not None:
            return self._graphs.replay(recorded)[: len(step.ids)]
        arrays = sent[: len(step.arrays)]
        ids = self._known(arrays[0]) if step.unknown else arrays[0]
        return self._forward(ids, step.batch(arrays, adapters=self.adapters))

    def _known(self, ids: Tensor) -> Tensor:
        """Token ids, with what the step before drew in place of -1 - row. One that it could not draw is 0: its request ends."""
        return torch.where(ids < 0, self._tokens[(-1 - ids).clamp_(min=0)], ids).clamp_(min=0)

    def _draw(
        self, sampling: Sequence[Request], last: Tensor, masks: Masks, draws: Draws | None, sent: Sequence[Tensor]
    ) -> dict[Request, Sampled]:
        """Draw each request's next token after its row of ``last`` [R, hidden]: into ``_tokens``; what is returned, on the host.

        ``sent``: the draws on the device, or nothing where all are the host's.
        """
        drawn: dict[Request, Sampled] = {}
        ops = self.decoder.ops
        for first in range(0, len(sampling), LOGIT_ROWS):
            requests = sampling[first : first + LOGIT_ROWS]
            rows = slice(first, first + len(requests))
            logits = self._logits(last[rows])
            masks.rule_out(logits, first)
            own = [draws is None or not draws_on_device(request) for request in requests]
            if draws is not None and not all(own):
                self._tokens[rows] = _draw_rows(ops, logits, draws, [t[rows] for t in sent])
            if all(own):
                drawn.update(zip(requests, sample(logits, requests, argmax=ops.argmax, kth=ops.kth_largest), strict=True))
            elif any(own):
                for row, request, mine in zip(logits.split(1), requests, own, strict=True):
                    if mine:
                        drawn[request] = sample(row, [request], argmax=ops.argmax, kth=ops.kth_largest)[0]
        return drawn | {request: Sampled(-1, error=error) for request, error in masks.errors.items()}

    def _logits(self, hidden: Tensor) -> Tensor:
        """float32 [R, V] for at most LOGIT_ROWS rows; they last until they are asked for again."""
        return self.decoder.logits(hidden, self._out[: hidden.shape[0]])

    @torch.inference_mode()
    def every_logit(self, ids: Sequence[int], at_once: int) -> Iterator[Tensor]:
        """Logits float32 [r, V] after each of a text's tokens, some rows at a time, each part until the next one is asked for.

        For measuring, while no request is there: it writes into the cache from its first block on, and at the first seat.
        ``at_once``: tokens of a step.
        """
        blocks = array("i", range(-(-len(ids) // self.block_size)))
        request = Request("", 0, list(ids), len(ids), SamplingParams(), len(ids) + 1, 0, 0.0, blocks=blocks, seat=0)
        before = last = self._mark()
        for start in range(0, len(ids), at_once):
            chunk = Chunk(request, start, min(at_once, len(ids) - start), False)
            step = StepArrays.build([chunk], self.block_size, states=bool(self.states))
            before()  # inputs go out from two places in turn: nobody else waits until those of the step before last have arrived
            sent = self._send(step.arrays)
            before, last = last, self._mark()
            hidden = self._hidden(step, None, sent)
            for part in hidden.split(LOGIT_ROWS):
                yield self._logits(part)

    def _score_prompt(self, chunk: Chunk, hidden: Tensor, scored: int) -> PromptScores | None:
        """Row p of the chunk predicts token p + 1. The first prompt token has nothing before it and no log-probability.

        ``hidden``: all rows of the chunk, where its request asks for that.
        """
        request = chunk.request
        if request.params.prompt_logprobs is None:
            return None
        first = max(chunk.start + 1, scored)
        last = min(chunk.start + chunk.length + 1, request.prompt_len)  # one past the last token that can be scored
        found: list[TokenLogprob] = []
        for a in range(first, last, LOGIT_ROWS):
            b = min(a + LOGIT_ROWS, last)
            logits = self._logits(hidden[a - 1 - chunk.start : b - 1 - chunk.start])
            kth = self.decoder.ops.kth_largest
            found += token_logprobs(logits, request.tokens[a:b], request.params.prompt_logprobs, kth=kth)
        return PromptScores(request, first, tuple(found)) if found else None


def _guesses(chunk: Chunk) -> list[Request]:
    """The chunk's request as it will be if the first token of its draft is right, the first two, and so on."""
    found = []
    for count in range(1, 1 + len(chunk.draft)):
        found.append(replace(chunk.request, tokens=[*chunk.request.tokens, *chunk.draft[:count]]))
    return found


def _draw_rows(ops: Ops, logits: Tensor, draws: Draws, sent: Sequence[Tensor]) -> Tensor:
    """One token a row, int64 [R], -1 where there is none to draw; few different launches, as each has to be compiled before."""
    temperature, top_k, top_p, min_p, uniform = sent
    if draws.greedy:
        best, tokens = ops.argmax(logits)
        return torch.where(best.isfinite(), tokens, -1)
    assert ops.sample is not None
    if draws.cut:
        return ops.sample(logits, temperature, top_k, top_p, min_p, uniform)
    return ops.sample(logits, temperature, None, None, None, uniform)


def _nothing_to_wait_for() -> None:
    """A device that has done what it was told has nothing else under way."""


def _input_bytes(plan: MemoryPlan, spec: ModelSpec) -> int:
    sizes = plan.max_num_batched_tokens, plan.max_num_seqs, plan.kv.blocks(plan.max_model_len)
    return input_bytes(*sizes, states=any(spec.linear), wanted=any(spec.shared), adapters=spec.adapters is not None)
