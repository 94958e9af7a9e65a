"""The CPU's operators from the best that torch has. Products: kernels.cpu.weights; attention: kernels.cpu.paged_attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.cpu.paged_attention import PagedAttention
from kernels.cpu.weights import matmul, pack
from kernels.ops import KVCache, Ops


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    return table.index_select(0, ids)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps=eps), total


def rope(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)  # float32 [T, 1, rotary / 2]
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype)
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    out[..., :half] = torch.addcmul(first * cos, second, sin, value=-1)
    out[..., half : 2 * half] = torch.addcmul(second * cos, first, sin)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def store_kv(k: Tensor, v: Tensor, cache: KVCache, slots: Tensor) -> None:
    cache.k.flatten(0, 1).index_copy_(0, slots, k)
    cache.v.flatten(0, 1).index_copy_(0, slots, v)


def make_ops(device: torch.device) -> Ops:
    """A CPU's Ops. One engine uses them at a time: attention remembers the step it is in."""
    return Ops(
        name="cpu",
        device=device,
        pack=pack,
        matmul=matmul,
        embedding=embedding,
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
        rope=rope,
        silu_mul=silu_mul,
        store_kv=store_kv,
        attention=PagedAttention(),
    )
