"""From a request body to SamplingParams: the request wins over the model's generation_config, which wins over vLLM's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from appliance.core.params import RequestError, SamplingParams, check_logprobs
from appliance.server.kinds import MAX_COMPLETIONS
from appliance.server.schemas import ChatRequest, CompletionRequest, SamplingFields

# Fields that a body and SamplingParams share by name.
SHARED = (
    "n",
    "best_of",
    "use_beam_search",
    "length_penalty",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "prompt_logprobs",
    "logprob_token_ids",
    "thinking_token_budget",
    "repetition_detection",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
)

COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions; chat goes on to the end of the context


def completion_params(body: CompletionRequest, defaults: Mapping[str, Any], max_logprobs: int) -> SamplingParams:
    """With echo=true and max_tokens=0 one token is computed, and left out of the answer."""
    check_logprobs("logprobs", body.logprobs, max_logprobs)
    more: dict[str, Any] = {"logprobs": body.logprobs}
    if body.echo and body.logprobs is not None:
        both = (body.logprobs, body.prompt_logprobs or 0)
        more["prompt_logprobs"] = -1 if -1 in both else max(both)
    tokens = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens or 1
    return _params(body, defaults, max_logprobs, {**more, "max_tokens": tokens})


def chat_params(body: ChatRequest, defaults: Mapping[str, Any], max_logprobs: int) -> SamplingParams:
    check_logprobs("top_logprobs", body.top_logprobs, max_logprobs)
    if (body.top_logprobs or 0) < 0 and max_logprobs != -1:
        raise RequestError(f"top_logprobs must be at least 0, got {body.top_logprobs}", param="top_logprobs")
    tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    for name in ("max_tokens", "max_completion_tokens"):  # also of the one that does not count
        if (value := getattr(body, name)) is not None and value < 1:
            raise RequestError(f"{name} must be an integer at least 1, got {value}", param=name)
    more = {"logprobs": (body.top_logprobs or 0) if body.logprobs and not body.logprob_token_ids else None, "max_tokens": tokens}
    return _params(body, defaults, max_logprobs, more)


def _params(body: SamplingFields, defaults: Mapping[str, Any], limit: int, more: Mapping[str, Any]) -> SamplingParams:
    check_logprobs("prompt_logprobs", body.prompt_logprobs, limit)
    given = {name: value for name in SHARED if (value := getattr(body, name)) is not None}
    for name in ("n", "best_of") if not body.use_beam_search else ():
        if (value := given.get(name)) is not None and not 1 <= value <= MAX_COMPLETIONS:
            raise RequestError(f"{name} must be an integer at least 1 and at most {MAX_COMPLETIONS}, got {value}", param=name)
    if body.use_beam_search:  # it draws nothing
        defaults = {}
    return SamplingParams(**{**defaults, **given, **more})
