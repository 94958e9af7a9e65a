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

KEPT = 1 << 30
"""Bytes of a base's log-probabilities that are kept for the next model."""
Piece = tuple[list[int], int]
"""Tokens that are read together, and the first of them that counts."""


class Model:
    """A loaded model that texts are put through, one at a time; its engine can answer requests, too."""

    def __init__(self, config: EngineConfig, length: int, requests: tuple[int, int] = (0, 0)) -> None:
        """``length``: the most tokens of a text; ``requests``: how many at once of how many tokens. Raises InputError."""
        self.engine = Engine.load(with_room(config, length, *requests))
        self.at_once = min(config.max_num_batched_tokens, length)
        self._kept: dict[tuple[int, ...], list[Tensor]] = {}
        self._room = KEPT

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    def logprobs(self, piece: Piece, at_once: int, *, keep: bool = False) -> Iterator[Tensor]:
        """Log-probabilities float32 [r, V] of what may stand at each token of a window that counts, some rows at a time.

        ``keep``: it will be asked for again, so it is remembered as long as all that is takes no more than KEPT bytes.
        """
        name = (*piece[0], piece[1], at_once)
        if name in self._kept:
            yield from self._kept[name]
            return
        parts, ids, at = [], piece[0], 0
        keep = keep and self._room >= 4 * self.info.vocab_size * (len(ids) - piece[1])
        for found in self.engine.runner.every_logit(ids, at_once):
            rows = slice(max(0, piece[1] - 1 - at), max(0, min(len(found), len(ids) - 1 - at)))  # the row before a token
            at += len(found)
            if rows.start < rows.stop:
                part = found[rows].float().log_softmax(-1)
                yield part
                parts += [part.cpu()] if keep else []
        if keep:
            self._kept[name] = parts
            self._room -= sum(part.nbytes for part in parts)


def with_room(config: EngineConfig, length: int, requests: int = 0, each: int = 0) -> EngineConfig:
    """No larger a cache than is needed: another model may have to be loaded beside this one. Raises InputError."""
    room = replace(config, max_num_seqs=max(1, requests), max_model_len=max(length, each), enable_prefix_caching=False)
    if room.kv_cache_memory_bytes is not None:
        return room
    kv = make_plan(Path(str(room.model)), replace(room, max_num_seqs=1)).kv
    return replace(room, kv_cache_memory_bytes=max(kv.blocks(length), requests * kv.blocks(each)) * kv.block_bytes)


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
    for piece in pieces:
        total.windows.append(_read(model, piece, base))
        yield total


def _read(model: Model, piece: Piece, base: Model | None) -> Window:
    """One window."""
    at_once = min(one.at_once for one in (model, base) if one is not None)
    expected = None if base is None else base.logprobs(piece, at_once, keep=True)
    text = torch.tensor(piece[0][piece[1] :]).unsqueeze(1)
    nll, base_nll, kl, agree, at = [], [], [], [], 0
    for own in model.logprobs(piece, at_once):
        after = text[at : at + len(own)].to(own.device)
        at += len(own)
        nll.append(-own.gather(1, after))
        if expected is not None:
            other = next(expected).to(own.device)
            base_nll.append(-other.gather(1, after))
            kl.append((other.exp() * (other - own)).sum(-1, dtype=torch.float64))
            agree.append(other.argmax(-1) == own.argmax(-1))
    if expected is None:
        return Window(_joined(nll))
    for _ in expected:  # so that it comes to its end, and keeps what it found
        pass
    return Window(_joined(nll), _joined(base_nll), _joined(kl), _joined(agree).astype(bool))


def _joined(parts: Sequence[Tensor]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return torch.cat([part.flatten() for part in parts]).cpu().double().numpy()
