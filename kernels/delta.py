"""The gated delta rule in plain torch, token by token: the oracle, and what torch's operators do."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.batch import PagedBatch
from kernels.layout import DELTA_ROWS
from kernels.states import DeltaRule, StateCache

EPS = 1e-6  # of the lengths of queries and keys


def delta(x: Tensor, gates: Tensor, rule: DeltaRule, cache: StateCache, batch: PagedBatch) -> Tensor:
    """As kernels.states.Delta."""
    if batch.states is None:
        raise ValueError("the batch does not say where the states of its sequences are")
    out = x.new_empty(x.shape[0], rule.value_heads * rule.value_dim)
    for place, (row, stop), end in zip(
        batch.states.tolist(), pairwise(batch.query_starts_list), batch.seq_lens_list, strict=True
    ):
        conv, state = cache.conv[place], cache.state[place]
        if end == stop - row:
            conv.zero_()
            state.zero_()
        for first in range(row, stop, DELTA_ROWS):
            rows = slice(first, min(first + DELTA_ROWS, stop))
            out[rows] = _rows(x[rows].float(), gates[rows].float(), rule, conv, state)
    return out


def _rows(x: Tensor, gates: Tensor, rule: DeltaRule, conv: Tensor, state: Tensor) -> Tensor:
    """Tokens of one sequence, float32 [T, ..] -> [T, value heads * value_dim]; ``conv`` and ``state`` go on behind them."""
    heads, tokens = rule.value_heads, x.shape[0]
    (mixed, z), (b, a) = x.split([rule.conv.shape[1], heads * rule.value_dim], dim=1), gates.chunk(2, dim=1)
    seen = torch.cat((conv, mixed))
    conv.copy_(seen[tokens:])
    mixed = F.silu(sum(seen[i : i + tokens] * tap for i, tap in enumerate(rule.conv)))
    keys = rule.key_heads * rule.key_dim
    q, k, v = mixed.split([keys, keys, heads * rule.value_dim], dim=1)
    q, k = (_unit(part.unflatten(1, (rule.key_heads, -1))).repeat_interleave(heads // rule.key_heads, dim=1) for part in (q, k))
    q = q * rule.key_dim**-0.5
    decay, beta = torch.exp(-rule.rate * F.softplus(a + rule.dt_bias)), torch.sigmoid(b)
    v = v.unflatten(1, (heads, -1))
    out = torch.empty_like(v)
    for t in range(tokens):
        state.mul_(decay[t, :, None, None])
        change = (v[t, :, None] - k[t, :, None] @ state) * beta[t, :, None, None]
        state.baddbmm_(k[t, :, :, None], change)
        out[t] = (q[t, :, None] @ state)[:, 0]
    normed = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + rule.eps) * rule.norm
    return normed.flatten(1) * F.silu(z)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)
