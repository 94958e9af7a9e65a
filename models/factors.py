"""What a family multiplies with, by what configs say. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from models.architectures import MULTIPLIERS
from models.family import Architecture
from models.fields import Fields


def multipliers(kind: Architecture, fields: Fields) -> dict[str, float]:
    """MULTIPLIERS, each 1 where a family has none."""
    return {key: fields.number(key, default=1.0) if kind.multiplied else 1.0 for key in MULTIPLIERS}


def score_scale(kind: Architecture, fields: Fields, by: Mapping[str, float], head_dim: int) -> float:
    """Of scores. Some families name what queries are divided by the root of; where others do, transformers passes over it."""
    if kind.multiplied:
        return by["attention_multiplier"]
    if kind.scale is not None:
        return kind.scale
    own = "query_pre_attn_scalar" in kind.defaults
    return (fields.number("query_pre_attn_scalar", default=head_dim) if own else head_dim) ** -0.5
