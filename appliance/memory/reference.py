"""What a step of the reference operators takes for a while: everything of theirs is in float32, and nothing is done in parts.

A step has moments, of which the one that takes the most counts. Attention's is the only one that grows with the context: the
scores of all heads are there at once, for each token of a sequence and each token that it may see. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from appliance.memory.modules import Loaded, Machinery
from appliance.memory.settings import ITEM_SIZE
from models.spec import Mixture, ModelSpec

FLOAT = 4


@dataclass(frozen=True)
class Moment:
    """Bytes beside the residual stream: of any step, of a token of it, of one of the context, and of each pair of these."""

    fixed: int = 0
    token: int = 0
    context: int = 0
    pair: int = 0

    def nbytes(self, tokens: int, length: int) -> int:
        """Of a step of so many tokens; sequences have at most ``length`` of them, and are computed one after another."""
        return self.fixed + self.token * tokens + self.context * length + self.pair * min(tokens, length) * length


def moments(
    spec: ModelSpec, layers: Sequence[Loaded], head: Loaded, machinery: Machinery, *, logit_rows: int
) -> tuple[Moment, ...]:
    """All that may be the one which takes the most.

    ``layers``: the weights of decoder layers, of those that are alike one; ``logit_rows``: rows of the head's product, at most,
    whose logits are planned by themselves.
    """
    size, hidden, mixture = ITEM_SIZE[machinery.dtype], spec.hidden, spec.mixture
    found = [replace(one, fixed=one.fixed + logit_rows * FLOAT * head.module.K, token=0) for one in _weight(head, 0, size)]
    found += [*_attention(spec, size), *_rotation(spec, size)]
    for one in layers:
        N, K, beside = one.module.N, one.module.K, 0
        if one.module.part == "experts" and mixture is not None:
            beside = _mixed(hidden, mixture, size) + size * K
        if one.slot == "gate_up" and not one.gated and not spec.ungated:  # by itself: two such are joined, and then multiplied
            beside += 2 * N * size
            found.append(Moment(token=beside + 4 * N * FLOAT + 2 * N * size))
        clamped = mixture is not None and mixture.clamp is not None
        values = (5 if clamped else 2) * (N // 2) if one.gated else 0  # what becomes of gate and up, both of which stay
        if one.slot in ("o", "down") and one.module.part != "experts":
            values += 2 * N  # the residual, and the sum
        found += _weight(one, beside + size * K * (one.slot in ("o", "down", "q_b")), size, values)
    return tuple(found)


def _weight(one: Loaded, beside: int, size: int, values: int = 0) -> Iterator[Moment]:
    """While it is made dense, and while it is multiplied with a token's input in float32; ``values``: more than the product."""
    numbers, wide = one.module.N * one.module.K, FLOAT * one.module.K
    dense = 0 if one.kind == "dense" and size == FLOAT else FLOAT * numbers
    if one.kind != "dense":  # codes less zero points, and that times scales, each of them for every code
        copies = 3 if one.kind == "int" and not one.stored.symmetric else 2
        yield Moment(fixed=copies * FLOAT * numbers, token=beside + wide)
    result = (one.module.N + values) * FLOAT
    yield Moment(fixed=dense, token=beside + wide + result)


def _attention(spec: ModelSpec, size: int) -> Iterator[Moment]:
    """Scores are there twice: before and after they are scaled, masked, and made shares; with a cap three times."""
    for heads in set(spec.by_layer):
        queries, values = spec.heads * heads.size, (1 if spec.latent is not None else 2) * heads.count * heads.size
        kept = 0 if spec.latent is not None else queries + values  # what was projected
        yield Moment(
            token=(kept + 2 * queries) * size + (2 if size < FLOAT else 1) * queries * FLOAT,
            context=(2 * heads.count * heads.size + (queries if heads.count < spec.heads else 0)) * FLOAT,
            pair=(3 if spec.cap is not None else 2) * FLOAT * spec.heads + 2,
        )


def _rotation(spec: ModelSpec, size: int) -> Iterator[Moment]:
    """Queries in float32, times cosines and sines, and what comes of it; what was projected is still there."""
    for heads in set(spec.by_layer):
        queries = spec.heads * heads.size
        yield Moment(token=(2 * queries + 2 * heads.count * heads.size) * size + 3 * queries * FLOAT)


def _mixed(hidden: int, mixture: Mixture, size: int) -> int:
    """Bytes of a token while experts are computed one by one: what they read, their sum, choices and shares, and one's result."""
    return hidden * (size + 2 * FLOAT) + 24 * mixture.experts
