"""Outputs that checkpoints have in another order than operators: which published one stands where, int64."""

from __future__ import annotations

import torch
from torch import Tensor

from models.delta import DeltaNet
from models.spec import ModelSpec
from quant.tensor import QuantTensor

Part = tuple[QuantTensor | Tensor, Tensor | None]  # a published weight [N, K] and its bias [N]


def halves(spec: ModelSpec, heads: int) -> Tensor:
    """Of outputs [heads * head_dim] whose neighbours rotate against each other those that then stand where halves do."""
    order, rotary = torch.arange(heads * spec.head_dim).view(heads, spec.head_dim), spec.rope.rotary_dim
    return torch.cat([order[:, 0:rotary:2], order[:, 1:rotary:2], order[:, rotary:]], dim=1).flatten()


def rotated_first(heads: int, rest: int, rotary: int, *, interleaved: bool) -> Tensor:
    """Of outputs [heads * (rest + rotary)]: each head's ``rotary`` ones, in halves, before the others.

    ``interleaved``: their neighbours rotate against each other as they are published.
    """
    order = torch.arange(heads * (rest + rotary)).view(heads, -1)
    turned = order[:, rest:]
    if interleaved:
        turned = torch.cat([turned[:, 0::2], turned[:, 1::2]], dim=1)
    return torch.cat([turned, order[:, :rest]], dim=1).flatten()


def turning_first(heads: int, size: int, rotary: int) -> Tensor:
    """Of outputs [heads * size], of whose halves the first ``rotary / 2`` each turn against each other: these before the rest."""
    order, pairs, half = torch.arange(heads * size).view(heads, size), rotary // 2, size // 2
    parts = (order[:, :pairs], order[:, half : half + pairs], order[:, pairs:half], order[:, half + pairs :])
    return torch.cat(parts, dim=1).flatten()


def as_published(values: Tensor, pairs: int) -> Tensor:
    """Heads [.., size] that were made in the order of ``turning_first``, of so many pairs, as they are published."""
    half = values.shape[-1] // 2
    turned, other, first, second = values.split([pairs, pairs, half - pairs, half - pairs], dim=-1)
    return torch.cat((turned, first, other, second), dim=-1)


def gated_queries(heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """(queries, gates) of outputs that have both of each head, one after the other."""
    queries, gates = torch.arange(2 * heads * head_dim).view(heads, 2, head_dim).unbind(1)
    return queries.flatten(), gates.flatten()


def ordered(spec: ModelSpec, layer: int, parts: list[Part]) -> list[Part]:
    """Published outputs of queries, keys and values of a layer (as many of these as it has) in the order of operators."""
    heads, rope, counts = spec.heads_of(layer), spec.rope_of(layer), (spec.heads, spec.heads_of(layer).count)
    if spec.interleaved:  # scores stay the same where queries and keys change their order together
        both = (halves(spec, count) for count in (spec.heads, spec.kv_heads))
        parts = [*map(select, parts[:2], both), *parts[2:]]
    if rope.spread:
        both = (turning_first(count, heads.size, rope.rotary_dim) for count in counts)
        parts = [*map(select, parts[:2], both), *parts[2:]]
    if spec.output_gate:
        queries, gates = gated_queries(spec.heads, spec.head_dim)
        parts = [select(parts[0], queries), *parts[1:], select(parts[0], gates)]
    return parts


def apart(net: DeltaNet) -> tuple[Tensor, Tensor]:
    """(queries, keys, values and z; b and a) of in_proj_qkvz and in_proj_ba, which have the parts of each key head together."""
    group = net.value_heads // net.key_heads
    return _apart(net.key_heads, [net.key_dim] * 2 + [group * net.value_dim] * 2), _apart(net.key_heads, [group] * 2)


def _apart(heads: int, sizes: list[int]) -> Tensor:
    """The first part of all heads, then the second of all, and so on."""
    order = torch.arange(heads * sum(sizes)).view(heads, -1)
    return torch.cat([part.flatten() for part in order.split(sizes, dim=1)])


def select(part: Part, index: Tensor) -> Part:
    """The outputs index[0], index[1], .. (int64) of a weight and its bias."""
    weight, bias = part
    rows = weight.select_rows(index) if isinstance(weight, QuantTensor) else weight[index]
    return rows, None if bias is None else bias[index]
