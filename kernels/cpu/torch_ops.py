"""The CPU's operators from the best that torch has. Products: kernels.cpu.weights; attention: kernels.cpu.paged_attention."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import reference
from kernels.cpu import weights
from kernels.cpu.paged_attention import PagedAttention
from kernels.delta import delta
from kernels.mixture import mix
from kernels.ops import KVCache, Norm, Ops, PagedBatch, Weight


def matmul(
    x: Tensor,
    weight: Weight,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    if norm is not None:
        x = rms_norm(x, **norm._asdict())
    found = weights.matmul(x, weight)
    if residual is not None:
        found = residual.add_(found)
    return found if out is None else out.copy_(found)


def embedding(ids: Tensor, table: Tensor | Weight, dtype: torch.dtype) -> Tensor:
    if isinstance(table, Tensor):
        return table.index_select(0, ids).to(dtype)
    if not isinstance(table, reference.ReferenceWeight):
        raise TypeError(f"torch's operators have no look-up in a {type(table).__name__}: Ops.pack_table makes what they know")
    return reference.embedding(ids, table, dtype)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0, residual: Tensor | None = None) -> Tensor:
    wide = (x.float(), weight.float() + offset) if offset else (x, weight)
    found = F.rms_norm(wide[0], (x.shape[-1],), wide[1], eps).to(x.dtype)
    return found if residual is None else residual.add_(found)


def rope_store(
    qkv: Tensor,
    heads: int,
    cache: KVCache,
    batch: PagedBatch,
    cos_sin: Tensor,
    *,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
) -> Tensor:
    q, k, v = reference.split_heads(qkv, heads, cache)
    q = q if q_norm is None else rms_norm(q, **q_norm._asdict())
    cos, sin = cos_sin.index_select(0, batch.positions).unsqueeze(1).chunk(2, dim=-1)  # float32 [T, 1, rotary / 2]
    if k is not None:
        k = k if k_norm is None else rms_norm(k, **k_norm._asdict())
        reference.store_kv(_rotate(k, cos, sin), v, cache, batch.slots)
    return _rotate(q, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype)
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    out[..., :half] = torch.addcmul(first * cos, second, sin, value=-1)
    out[..., half : 2 * half] = torch.addcmul(second * cos, first, sin)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out


def make_ops(device: torch.device) -> Ops:
    """A CPU's Ops. One engine uses them at a time: attention remembers the step it is in."""
    return Ops(
        name="cpu",
        device=device,
        pack=weights.pack,
        matmul=matmul,
        embedding=embedding,
        rms_norm=rms_norm,
        rope_store=rope_store,
        attention=PagedAttention(),
        silu_mul=weights.silu_mul,
        gelu_mul=weights.gelu_mul,
        argmax=reference.argmax,
        kth_largest=reference.kth_largest,
        mix=partial(mix, matmul, rms_norm, weights.silu_mul, weights.gelu_mul),
        pack_table=reference.pack,
        delta=delta,
        ungated=weights.ungated,
    )
