"""What a request must satisfy to be let in: everything that can be said before any work is done."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from appliance.core.checks import check_number
from appliance.core.messages import EngineInfo, Submit
from appliance.core.params import RequestError, SamplingParams
from appliance.core.repetition import Repetition
from appliance.core.request import Adapter, Request
from appliance.core.thinking import Thinking

_MASK = 2**64 - 1


def check_submit(submit: Submit, info: EngineInfo) -> None:
    """Raise RequestError, naming the field and the numbers, where the engine could never serve this request."""
    params, prompt, limit, vocab = submit.params, submit.prompt_token_ids, info.max_model_len, info.vocab_size
    if not prompt:
        raise RequestError("the prompt is empty: it needs at least one token", param="prompt")
    if len(prompt) + (0 if submit.pooling else params.max_tokens or 1) > limit:
        raise ContextOverflow(len(prompt), params.max_tokens, limit)
    check_ids("prompt", prompt, vocab)
    check_ids("logit_bias", params.logit_bias or (), vocab)
    check_ids("allowed_token_ids", params.allowed_token_ids or (), vocab)
    check_ids("logprob_token_ids", params.logprob_token_ids or (), vocab)
    if params.thinking_token_budget is not None and params.thinking_marks is None:
        raise RequestError("thinking_token_budget needs a tokenizer", param="thinking_token_budget")
    if params.use_beam_search and not info.forks:
        raise RequestError(
            "use_beam_search: this model's layers keep a state of each sequence, which beams cannot share: leave it out",
            param="use_beam_search",
        )
    if params.use_beam_search and params.n + len(info.eos_token_ids) > vocab:
        raise RequestError(f"n is {params.n}: so many beams cannot differ in a vocabulary of {vocab} tokens", param="n")
    if params.structured_outputs is not None:
        lacks = "a tokenizer" if not params.grammar else "a model that names the token which ends a text"
        if not params.grammar or not info.eos_token_ids:
            raise RequestError(f"structured_outputs need {lacks}", param="structured_outputs")
    if submit.pooling is not None and submit.pooling.dimensions is not None:
        hint = f"its embeddings have {info.hidden_size} numbers"
        check_number("dimensions", submit.pooling.dimensions, 1, info.hidden_size, integer=True, hint=hint)
    if isinstance(submit.priority, bool) or not isinstance(submit.priority, int):
        raise RequestError(f"priority must be an integer, got {submit.priority!r:.80}", param="priority")
    if submit.priority and not info.priorities:
        hint = "requests are served in order of arrival: start the server with --scheduling-policy priority"
        raise RequestError(f"priority is {submit.priority}, but {hint}", param="priority")


def check_ids(name: str, ids: Collection[int], vocab: int) -> None:
    """Raise RequestError unless all are Python's integers, and tokens of the vocabulary."""
    if wrong_kinds := {kind for kind in set(map(type, ids)) if kind is bool or not issubclass(kind, int)}:
        found = next(t for t in ids if type(t) in wrong_kinds)
        raise RequestError(f"{name} holds {found!r:.60} ({type(found).__name__}): token ids are integers", param=name)
    if ids and not 0 <= min(ids) <= max(ids) < vocab:
        wrong = next(t for t in ids if not 0 <= t < vocab)
        raise RequestError(f"{name} holds token id {wrong}, but the vocabulary has ids 0 to {vocab - 1}", param=name)


class ContextOverflow(RequestError):
    """OpenAI's error for a prompt (with its answer) that is longer than the context. ``at_least``: not all of it was counted.

    ``whose``: the limit is not the context, but that of somebody's prompts.
    """

    def __init__(
        self, prompt_len: int, max_tokens: int | None, limit: int, *, at_least: bool = False, whose: str | None = None
    ) -> None:
        self.prompt_len, self.limit = prompt_len, limit
        asked = "" if max_tokens is None or prompt_len >= limit else f" and max_tokens asks for {max_tokens} more"
        super().__init__(
            f"the prompt has {prompt_len} tokens, and {whose} takes at most {limit} in one"
            if whose
            else f"This model's maximum context length is {limit} tokens. However, your prompt contains "
            f"{'at least ' if at_least else ''}{prompt_len} input tokens{asked}. "
            f"Please reduce the length of the prompt{' or max_tokens' if asked else ''}.",
            param="max_tokens" if asked else "prompt",
            code="context_length_exceeded",
        )


def check_room(request: Request, num_blocks: int, block_size: int) -> None:
    """Raise RequestError where the empty pool could not hold a request. Its last token is sampled and never stored."""
    need, room = -(-(request.max_total - 1) // block_size), num_blocks * block_size
    if need > num_blocks:
        raise RequestError(
            f"prompt plus answer may reach {request.max_total} tokens ({need} KV blocks of {block_size}), but the whole cache "
            f"holds {room} ({num_blocks} blocks): ask for at most {room + 1} tokens in all",
            param="max_tokens",
            code="context_length_exceeded",
        )


def make_requests(submit: Submit, info: EngineInfo, *, fallback_seed: int, adapter: Adapter | None = None) -> list[Request]:
    """All completions of a submission, with its adapter. ``fallback_seed`` serves those that bring no seed of their own."""
    params, prompt = submit.params, submit.prompt_token_ids
    max_total = info.max_model_len if params.max_tokens is None else len(prompt) + params.max_tokens
    eos = frozenset() if params.ignore_eos else frozenset(info.eos_token_ids)
    seed = params.seed if params.seed is not None else fallback_seed
    own = [_own(params, index, len(eos)) for index in range(min(2, params.width))]  # the others are as the second
    made: dict[str, Any] = {}
    requests = [
        Request(
            request_id=submit.request_id,
            index=index,
            tokens=list(prompt),
            prompt_len=len(prompt),
            params=own[min(index, 1)],
            max_total=max_total,
            seed=hash_u64(seed, index),
            arrival=submit.arrival,
            eos_token_ids=eos,
            priority=submit.priority,
            pooling=submit.pooling,
            salt=submit.cache_salt,
            adapter=adapter,
            beam=params.use_beam_search,
            made=made,
            thinking=_thinking(params, len(prompt)),
            repetition=None if params.repetition_detection is None else Repetition(params.repetition_detection),
        )
        for index in range(params.width)
    ]
    for sibling in requests[1:] if info.forks else ():
        sibling.leader = requests[0]
    return requests


def _thinking(params: SamplingParams, prompt_len: int) -> Thinking | None:
    if params.thinking_token_budget is None or params.thinking_marks is None:
        return None
    return Thinking(params.thinking_token_budget, params.thinking_marks, prompt_len)


def beam_candidates(width: int, eos: int) -> int:
    """How many most likely tokens of each beam are looked at: 2 * width (as vLLM), and enough when many tokens end a text."""
    return max(2 * width, width + eos)


def _own(params: SamplingParams, index: int, eos: int) -> SamplingParams:
    """What one completion asks of the sampler."""
    if params.use_beam_search:
        shown = params.logprobs or 0
        return SamplingParams(
            temperature=0.0,
            logprobs=-1 if shown == -1 else max(shown, beam_candidates(params.n, eos)),
            prompt_logprobs=None if index else params.prompt_logprobs,
            max_tokens=params.max_tokens,
            ignore_eos=params.ignore_eos,
        )
    if params.width > params.n and params.scored is None:
        return replace(params, logprobs=0)  # the best are known by their log-probabilities
    return params


def hash_u64(a: int, b: int) -> int:
    """Mix two integers into 64 bits (the finalizer of Steele, Lea and Flood's SplitMix64)."""
    z = (a * 0x9E3779B97F4A7C15 + b * 0xD1B54A32D192ED03 + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
