"""What a request does to its row of logits before the draw: masks, biases and penalties, in vLLM's order."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from appliance.core.request import Request

_NEVER = float("-inf")


def touches_logits(request: Request) -> bool:
    """Whether ``adjust`` would change this request's row."""
    p = request.params
    return bool(
        p.allowed_token_ids is not None
        or p.bad_words_token_ids
        or p.logit_bias
        or request.output_len < p.min_tokens
        or p.repetition_penalty != 1.0
        or p.presence_penalty
        or p.frequency_penalty
        or (request.thinking is not None and not request.thinking.over)  # the next token may depend on the one before
    )


def adjust(row: Tensor, request: Request) -> None:
    """Apply the request's masks, biases and penalties to its logits, float32 [V], in place."""
    params = request.params
    forced = None if request.thinking is None else request.thinking.forced(request.tokens)
    if forced is not None and row[forced] > _NEVER:  # else a grammar does not want it
        row.fill_(_NEVER)[forced] = 0.0
        return
    if params.allowed_token_ids is not None:
        allowed = _allowed(tuple(params.allowed_token_ids), row.numel(), row.device)
        values = row[allowed]
        row.fill_(_NEVER)[allowed] = values
    row[_index(_ends_bad_word(request), row)] = _NEVER
    if request.output_len < params.min_tokens:
        row[_index({*request.eos_token_ids, *(params.stop_token_ids or ())}, row)] = _NEVER
    if params.logit_bias:
        count = len(params.logit_bias)
        ids = np.fromiter(params.logit_bias, np.int64, count)
        biases = np.fromiter(params.logit_bias.values(), np.float32, count)[ids < row.numel()]
        row[_index(params.logit_bias, row)] += torch.from_numpy(biases).to(row.device)
    _penalize(row, request)


def _penalize(row: Tensor, request: Request) -> None:
    """The repetition penalty of CTRL (Keskar et al. 2019, over prompt and output), then OpenAI's two (over the output)."""
    params = request.params
    if params.repetition_penalty != 1.0:
        seen = _index(request.tokens, row)  # those that come twice are written the same value twice
        values, penalty = row[seen], params.repetition_penalty
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    output = request.tokens[request.prompt_len :]
    if output and (params.frequency_penalty or params.presence_penalty):
        ids, counts = torch.unique(_index(output, row), return_counts=True)
        row[ids] -= params.frequency_penalty * counts + params.presence_penalty


def _ends_bad_word(request: Request) -> set[int]:
    """Tokens that would complete one of the request's bad words now; a match lies within the output, as in vLLM."""
    banned = set()
    for word in request.params.bad_words_token_ids:
        prefix = word[:-1]
        start = len(request.tokens) - len(prefix)
        if start >= request.prompt_len and tuple(request.tokens[start:]) == prefix:
            banned.add(word[-1])
    return banned


def _index(ids: Collection[int], row: Tensor) -> Tensor:
    """Token ids as an index into the row. A stop id or bad word beyond the model's vocabulary can never be drawn anyway."""
    found = np.fromiter(ids, np.int64, len(ids))  # of a penalty: a whole context in every step
    return torch.from_numpy(found[found < row.numel()]).to(row.device)


@lru_cache(8)
def _allowed(ids: tuple[int, ...], vocab: int, device: torch.device) -> Tensor:
    """The same of those that a request allows, in every step: they may be as many as the model has."""
    return torch.tensor([t for t in ids if t < vocab], dtype=torch.int64, device=device)
