"""How well a model predicts a text, and how far it is from another one: through the engine's own kernels and cache.

Perplexity is exp of the mean negative log-probability of a text's tokens, and what a token's depends on is which tokens before it
the model sees. Two ways are usual, and both are here:

    no stride      pieces of ``length`` tokens that do not overlap, each read by itself; every token of them counts
    stride         windows of ``length`` tokens, each begins ``stride`` tokens after the one before, and only tokens that were in
                   no window before count, so all but the first ones see at least ``length - stride`` tokens before them
                   (https://huggingface.co/docs/transformers/perplexity)

A window stands behind the start token where the tokenizer puts one before texts; without one its very first token, which has
nothing before it, does not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from appliance.config import EngineConfig
from appliance.core.messages import EngineInfo
from appliance.eval.score import Score, Window
from appliance.memory.planner import make_plan
from appliance.runtime.engine import Engine
from quant.errors import InputError


class Model:
    """A loaded model that texts are put through, one at a time; its engine can answer requests, too."""

    def __init__(self, config: EngineConfig, length: int, requests: tuple[int, int] = (0, 0)) -> None:
        """``length``: the most tokens of a text; ``requests``: how many at once of how many tokens. Raises InputError."""
        self.engine = Engine.load(with_room(config, length, *requests))
        self.at_once = min(config.max_num_batched_tokens, length)

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    def logits(self, ids: Sequence[int], at_once: int) -> Iterator[Tensor]:
        """Logits float32 [r, V] of what follows each token, some rows at a time, each part until the next one is asked for."""
        yield from self.engine.runner.every_logit(ids, at_once)


def with_room(config: EngineConfig, length: int, requests: int = 0, each: int = 0) -> EngineConfig:
    """No larger a cache than is needed: another model may have to be loaded beside this one. Raises InputError."""
    room = replace(config, max_num_seqs=max(1, requests), max_model_len=max(length, each), enable_prefix_caching=False)
    if room.kv_cache_memory_bytes is not None:
        return room
    kv = make_plan(Path(str(room.model)), replace(room, max_num_seqs=1)).kv
    return replace(room, kv_cache_memory_bytes=max(kv.blocks(length), requests * kv.blocks(each)) * kv.block_bytes)


Piece = tuple[list[int], int]
"""Tokens that are read together, and the first of them that counts."""


def windows(ids: Sequence[int], length: int, most: int | None, start: int | None, stride: int | None = None) -> list[Piece]:
    """Windows of ``length`` tokens, behind the ``start`` token, ``most`` at most. InputError for no window.

    Without ``stride`` a shorter one at the end is left out; with it the text's last tokens are in the last one.
    """
    if len(ids) < length:
        raise InputError(f"--text has {len(ids)} tokens, fewer than one window of {length}: give more, or a smaller --length")
    before: list[int] = [] if start is None else [start]
    found: list[Piece] = []
    done = 0
    while done < len(ids) and len(found) != most:
        first = len(found) * (stride or length)
        piece = ids[first : first + length]
        if stride is None and len(piece) < length:
            break
        found.append(([*before, *piece], max(1, len(before) + done - first)))
        done = first + len(piece)
    return found


def score(model: Model, pieces: Sequence[Piece], base: Model | None = None) -> Iterator[Score]:
    """Put the pieces through ``model`` (and ``base``, of the same vocabulary); what is known after each piece."""
    if base is not None and base.info.vocab_size != model.info.vocab_size:
        raise InputError(f"--base has {base.info.vocab_size} tokens, and {model.info.model} has {model.info.vocab_size}")
    total = Score()
    for ids, counts in pieces:
        total.windows.append(_read(model, ids, counts, base))
        yield total


def _read(model: Model, ids: list[int], counts: int, base: Model | None) -> Window:
    """One window, of which the tokens from ``counts`` on count: the row before a token says how likely it was."""
    at_once = min(one.at_once for one in (model, base) if one is not None)
    expected = base.logits(ids, at_once) if base is not None else None
    nll, base_nll, kl, agree, at = [], [], [], [], 0
    for found in model.logits(ids, at_once):
        of_base = None if expected is None else next(expected)
        rows = slice(max(0, counts - 1 - at), max(0, min(len(found), len(ids) - 1 - at)))
        after = torch.tensor(ids[at + rows.start + 1 : at + rows.stop + 1]).unsqueeze(1).to(found.device)
        at += len(found)
        if rows.start >= rows.stop:
            continue
        own = found[rows].float().log_softmax(-1)
        nll.append(-own.gather(1, after))
        if of_base is not None:
            other = of_base[rows].to(own.device).float().log_softmax(-1)
            base_nll.append(-other.gather(1, after))
            kl.append((other.exp() * (other - own)).sum(-1, dtype=torch.float64))
            agree.append(other.argmax(-1) == own.argmax(-1))
    if base is None:
        return Window(_joined(nll))
    return Window(_joined(nll), _joined(base_nll), _joined(kl), _joined(agree).astype(bool))


def _joined(parts: Sequence[Tensor]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    if not parts:
        return np.zeros(0)
    return torch.cat([part.flatten() for part in parts]).cpu().double().numpy()
