"""How well a model predicts a text, and how far it is from another one: through the engine's own kernels and cache.

Perplexity by windows, as is usual: the text is cut into pieces of ``length`` tokens that do not overlap, each is read by itself
behind a start token (where the model has one), and every token of it counts: exp of the mean negative log-probability.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from appliance.config import EngineConfig
from appliance.core.messages import EngineInfo
from appliance.runtime.engine import Engine
from quant.errors import InputError


class Model:
    """A loaded model that texts are put through, one at a time."""

    def __init__(self, config: EngineConfig, length: int) -> None:
        """``length``: the most tokens of a text. Raises InputError."""
        room = replace(config, max_num_seqs=1, max_model_len=length, enable_prefix_caching=False)
        self.engine = Engine.load(room)
        self._at_once = min(config.max_num_batched_tokens, length)

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    @property
    def nbytes(self) -> int:
        """Of weights, as they lie in memory."""
        weights = self.info.plan["weights_bytes"]
        return int(weights["total"]) if isinstance(weights, dict) else 0

    def logprobs(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """Log-probabilities float32 [r, V] of what follows each token, some rows at a time."""
        for logits in self.engine.runner.every_logit(ids, self._at_once):
            yield logits.float().log_softmax(-1)


@dataclass
class Score:
    """Sums over tokens."""

    tokens: int = 0
    nll: float = 0.0  # of the text
    kl: float = 0.0  # D(base || model), where there is a base
    agree: int = 0  # tokens at which both find the same one most likely

    @property
    def perplexity(self) -> float:
        mean = self.nll / self.tokens
        return math.exp(mean) if mean < 700 else math.inf

    def add(self, ids: Tensor, found: Tensor, base: Tensor | None) -> None:
        """``ids`` int64 [r]: what does follow; ``found`` and ``base`` [r, V]."""
        self.tokens += len(ids)
        self.nll -= float(found.gather(1, ids.unsqueeze(1)).sum(dtype=torch.float64))
        if base is not None:
            self.kl += float((base.exp() * (base - found)).sum(dtype=torch.float64))
            self.agree += int((base.argmax(-1) == found.argmax(-1)).sum())


def windows(ids: Sequence[int], length: int, most: int | None, start: int | None) -> list[list[int]]:
    """Pieces of ``length`` tokens, behind the ``start`` token; a shorter one at the end is left out. InputError for no piece."""
    found = [list(ids[k : k + length]) for k in range(0, len(ids) - length + 1, length)][:most]
    if not found:
        raise InputError(f"--text has {len(ids)} tokens, fewer than one window of {length}: give more, or a smaller --length")
    return [[start, *piece] if start is not None else piece for piece in found]


def score(model: Model, pieces: Sequence[Sequence[int]], base: Model | None = None) -> Iterator[Score]:
    """Put the pieces through ``model`` (and ``base``, of the same vocabulary); the sums after each piece."""
    if base is not None and base.info.vocab_size != model.info.vocab_size:
        raise InputError(f"--base has {base.info.vocab_size} tokens, and {model.info.model} has {model.info.vocab_size}")
    total = Score()
    for piece in pieces:
        after = torch.tensor([*piece[1:], -1])
        at = 0
        both = (
            zip(model.logprobs(piece), base.logprobs(piece), strict=True)
            if base
            else ((one, None) for one in model.logprobs(piece))
        )
        for found, expected in both:
            rows = min(len(found), len(piece) - 1 - at)  # nothing follows the last token
            if rows > 0:
                total.add(after[at : at + rows], found[:rows].cpu(), None if expected is None else expected[:rows].cpu())
            at += len(found)
        yield total
