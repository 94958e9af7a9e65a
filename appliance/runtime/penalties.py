"""What a request does to its row of logits before the draw: masks, biases and penalties, in vLLM's order."""

from __future__ import annotations

from collections.abc import Collection

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
    vocab = row.numel()
    if (ids := params.allowed_token_ids) is not None:
        allowed = _index(request.once("allowed", lambda: _known(ids, vocab)), row)
        values = row[allowed]
        row.fill_(_NEVER)[allowed] = values
    if words := params.bad_words_token_ids:
        _rule_out(row, request, request.once("bad words", lambda: _bad_words(words, vocab)))
    if request.output_len < params.min_tokens:
        ends = request.once("ends", lambda: _known({*request.eos_token_ids, *(params.stop_token_ids or ())}, vocab))
        row[_index(ends, row)] = _NEVER
    if bias := params.logit_bias:
        tokens = request.once("biased", lambda: _known(bias, vocab))
        biases = request.once("biases", lambda: np.fromiter(map(bias.__getitem__, tokens.tolist()), np.float32, len(tokens)))
        row[_index(tokens, row)] += _index(biases, row)
    _penalize(row, request)


def _penalize(row: Tensor, request: Request) -> None:
    """The repetition penalty of CTRL (Keskar et al. 2019, over prompt and output), then OpenAI's two (over the output)."""
    params = request.params
    if params.repetition_penalty != 1.0:
        seen = _index(_array(request.tokens), row)  # those that come twice are written the same value twice
        values, penalty = row[seen], params.repetition_penalty
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    output = request.tokens[request.prompt_len :]
    if output and (params.frequency_penalty or params.presence_penalty):
        ids, counts = torch.unique(_index(_array(output), row), return_counts=True)
        row[ids] -= params.frequency_penalty * counts + params.presence_penalty


BadWords = dict[int, dict[tuple[int, ...], np.ndarray]]  # by how many tokens come before the last, then by these: the last ones


def _bad_words(words: Collection[tuple[int, ...]], vocab: int) -> BadWords:
    found: dict[int, dict[tuple[int, ...], list[int]]] = {}
    for *before, last in words:
        found.setdefault(len(before), {}).setdefault(tuple(before), []).append(last)
    return {length: {before: _known(last, vocab) for before, last in some.items()} for length, some in found.items()}


def _rule_out(row: Tensor, request: Request, words: BadWords) -> None:
    """Tokens that would complete one of the request's bad words now; a match lies within the output, as in vLLM."""
    for length, some in words.items():
        start = len(request.tokens) - length
        if start >= request.prompt_len and (last := some.get(tuple(request.tokens[start:]))) is not None:
            row[_index(last, row)] = _NEVER


def _known(ids: Collection[int], vocab: int) -> np.ndarray:
    """Token ids, ascending. A stop id or bad word beyond the model's vocabulary can never be drawn anyway."""
    found = np.sort(_array(ids))
    return found[: found.searchsorted(vocab)]


def _array(ids: Collection[int]) -> np.ndarray:
    return np.fromiter(ids, np.int64, len(ids))


def _index(values: np.ndarray, row: Tensor) -> Tensor:
    """Where the row is."""
    return torch.from_numpy(values).to(row.device)
