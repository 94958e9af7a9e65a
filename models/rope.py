"""Cosines and sines for every position, per kind of scaling; formulas as in transformers' modeling_rope_utils.

Keys are cached rotated, so one table must serve a sequence of any length up to ``max_len``. Where transformers switches with the
length of the sequence, the choice is made once, by ``max_len`` (as vLLM does): longrope takes its long factors when ``max_len``
is beyond the original context, dynamic stretches its base for ``max_len``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.rope_spec import RopeSpec


def cos_sin_table(rope: RopeSpec, max_len: int) -> Tensor:
    """float32 [max_len, rotary_dim]: cosines of the rotary_dim / 2 frequencies, then their sines, times the attention factor."""
    inverse, scale = _frequencies(rope, max_len)
    angles = torch.outer(torch.arange(max_len, dtype=torch.float32), inverse)
    return torch.cat([angles.cos(), angles.sin()], dim=1) * scale


def query_scales(rope: RopeSpec, positions: Tensor) -> Tensor | None:
    """What queries at positions, integers of any shape, are multiplied by, float32; None where the model knows no such."""
    return None if rope.query_beta == 0 else 1 + rope.query_beta * torch.log1p((positions // rope.query_span).float())


def _frequencies(rope: RopeSpec, max_len: int) -> tuple[Tensor, float]:
    """(inverse frequencies float32 [rotary_dim / 2], factor on cosines and sines)."""
    match rope.kind:
        case "linear":
            return _plain(rope, rope.theta) / rope.factor, 1.0
        case "dynamic":
            length = max(max_len, rope.max_position)
            stretch = rope.factor * length / rope.max_position - (rope.factor - 1)
            return _plain(rope, rope.theta * stretch ** (rope.rotary_dim / (rope.rotary_dim - 2))), 1.0
        case "llama3":
            return _llama3(rope), 1.0
        case "yarn":
            return _yarn(rope), _yarn_attention(rope)
        case "longrope":
            long = max_len > rope.original_max_position
            factors = torch.tensor(rope.long_factor if long else rope.short_factor, dtype=torch.float32)
            return 1.0 / (factors / _plain(rope, rope.theta)), _longrope_attention(rope)
        case "proportional":
            return _plain(rope, rope.theta) / rope.factor, 1.0
        case "none":
            return torch.zeros(rope.rotary_dim // 2), 1.0
        case _:
            return _plain(rope, rope.theta), 1.0


def _exponents(rope: RopeSpec) -> Tensor:
    return torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / (rope.spread or rope.rotary_dim)


def _plain(rope: RopeSpec, theta: float) -> Tensor:
    return 1.0 / theta ** _exponents(rope)


def _llama3(rope: RopeSpec) -> Tensor:
    """Long waves are slowed by ``factor``, short ones kept, those between are blended (Llama 3.1)."""
    inverse = _plain(rope, rope.theta)
    turns = rope.original_max_position * inverse / (2 * math.pi)  # full turns within the original context
    blend = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - blend) * inverse / rope.factor + blend * inverse


def _yarn(rope: RopeSpec) -> Tensor:
    """Peng et al. 2023: dimensions that turn less than beta_slow times are interpolated, those over beta_fast times kept."""

    def dimension(turns: float) -> float:
        return rope.rotary_dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    ramp = ((torch.arange(rope.rotary_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    inverse = _plain(rope, rope.theta)
    return inverse / rope.factor * ramp + inverse * (1 - ramp)


def _yarn_attention(rope: RopeSpec) -> float:
    def scale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def _longrope_attention(rope: RopeSpec) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 1.0 if rope.factor <= 1 else math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position))
