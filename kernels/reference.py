"""Every operator in plain torch, computed in float32: the oracle of all others, and the fallback that always works."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.delta import delta
from kernels.kv_cache import dequantize, quantize
from kernels.mixture import mix
from kernels.ops import Clamp, KVCache, Norm, Ops, PagedBatch, Weight
from quant.tensor import QuantTensor


@dataclass(frozen=True, eq=False)
class ReferenceWeight:
    """The canonical weight as it is; dequantized anew at every use."""

    tensor: QuantTensor | Tensor
    bias: Tensor | None
    gated: bool
    gelu: bool
    clamp: Clamp | None
    rows: int
    K: int
    wide: bool = False  # the product is in float32

    @property
    def N(self) -> int:
        return self.rows // 2 if self.gated else self.rows

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes + (0 if self.bias is None else self.bias.nbytes)


def pack(
    weight: QuantTensor | Tensor,
    *,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    gated: bool = False,
    gelu: bool = False,
    clamp: Clamp | None = None,
    activation: str = "auto",
) -> ReferenceWeight:
    if isinstance(weight, QuantTensor):
        return ReferenceWeight(weight, bias, gated, gelu, clamp, weight.N, weight.K)
    return ReferenceWeight(weight.to(dtype), bias, gated, gelu, clamp, *weight.shape)


def ungated(weight: Weight) -> ReferenceWeight:
    assert isinstance(weight, ReferenceWeight)
    return replace(weight, gated=False, wide=True)


def matmul(
    x: Tensor,
    weight: Weight,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    if not isinstance(weight, ReferenceWeight):
        raise TypeError(f"a {type(weight).__name__} was packed for other operators than the reference")
    wide = x.float() if norm is None else rms_norm(x, **norm._asdict()).float()
    tensor = weight.tensor
    if isinstance(tensor, QuantTensor):
        wide = quantize_activations(wide, tensor.activation)
        # Rounded to the dtype of the scales: the tools that publish checkpoints dequantize in that, so these are the weights
        # they measured. Float32 activations with unrounded weights differ from them by up to 0.05 in a log-probability.
        dense = tensor.dequantize(tensor.rounding).float()
    else:
        dense = tensor.float()
    found = F.linear(wide, dense, None if weight.bias is None else weight.bias.float())
    if weight.gated:
        multiply = gelu_mul if weight.gelu else silu_mul
        found = multiply(found) if weight.clamp is None else clamped_mul(found, weight.clamp)
    if residual is not None:
        found = found + residual.float()
    if weight.wide:
        return found
    return found.to(x.dtype) if out is None else out.copy_(found)


def quantize_activations(x: Tensor, activation: str | None) -> Tensor:
    """x float32 [T, K] rounded to what int8 activations can hold, one scale a token, where the checkpoint asks for that.

    FP8 activations are left as they are: without FP8 arithmetic they would cost accuracy and gain nothing.
    """
    if activation != "int8-token":
        return x
    scale = int8_scales(x)
    return (x / scale).round().clamp(-128, 127) * scale


def int8_scales(x: Tensor) -> Tensor:
    """float32 [T, 1]: the largest magnitude of each token over 127."""
    return x.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127.0


def embedding(ids: Tensor, table: Tensor | Weight, dtype: torch.dtype) -> Tensor:
    if isinstance(table, ReferenceWeight):
        tensor = table.tensor
        return (tensor[ids] if isinstance(tensor, Tensor) else tensor.select_rows(ids).dequantize()).to(dtype)
    if not isinstance(table, Tensor):
        raise TypeError(f"a {type(table).__name__} was packed for other operators than the reference")
    return table[ids].to(dtype)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0, residual: Tensor | None = None) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    found = wide * (weight.float() + offset) if offset else wide.to(x.dtype) * weight
    return (found if residual is None else found.float() + residual.float()).to(x.dtype)


def rope(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    return rotated(q, positions, cos_sin), rotated(k, positions, cos_sin)


def rotated(x: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
    """x [T, heads, D], of which the first features turn, halves against each other."""
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)  # [T, 1, rotary / 2]
    half = cos.shape[-1]
    a, b, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], dim=-1)


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def gelu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)


def clamped_mul(gate_up: Tensor, clamp: Clamp) -> Tensor:
    """As Clamp says, for gate_up [T, 2 * I] (gate first) -> [T, I]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    gate, up = gate.clamp(max=clamp.limit), up.clamp(-clamp.limit, clamp.limit)
    return (gate * torch.sigmoid(clamp.slope * gate) * (up + 1)).to(gate_up.dtype)


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
    q, k, v = split_heads(qkv, heads, cache)
    q = q if q_norm is None else rms_norm(q, **q_norm._asdict())
    if k is not None:
        k = k if k_norm is None else rms_norm(k, **k_norm._asdict())
        store_kv(rotated(k, batch.positions, cos_sin), v, cache, batch.slots)
    return rotated(q, batch.positions, cos_sin)


def split_heads(qkv: Tensor, heads: int, cache: KVCache) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(queries, keys, values), [T, their heads, D] each; values are None where they are the keys, both where there are none."""
    kv_heads, size = cache.k.shape[2], cache.head_dim
    if queries_alone(qkv, heads, cache):
        return qkv.unflatten(1, (heads, size)), None, None
    parts = [heads, kv_heads] if cache.values_are_keys else [heads, kv_heads, kv_heads]
    q, k, *v = qkv.unflatten(1, (sum(parts), size)).split(parts, dim=1)
    return q, k, v[0] if v else None


def queries_alone(qkv: Tensor, heads: int, cache: KVCache) -> bool:
    """Whether there is nothing to store."""
    return qkv.shape[1] == heads * cache.head_dim


def store_kv(k: Tensor, v: Tensor | None, cache: KVCache, slots: Tensor) -> None:
    """k and v [T, Hkv, D] at their slots of the cache; v None: values are the keys."""
    given = cache.given or (None, None)
    for x, codes, scales, scale in zip((k, v), (cache.k, cache.v), (cache.k_scale, cache.v_scale), given, strict=True):
        if x is None:
            continue
        if scales is None:
            codes.flatten(0, 1)[slots] = x.to(codes.dtype)
        else:
            codes.flatten(0, 1)[slots], scales.flatten(0, 1)[slots] = quantize(x, cache.dtype, scale)


def attention(
    q: Tensor,
    cache: KVCache,
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    out = torch.empty_like(q)
    for (row, stop), end, table in zip(
        pairwise(batch.query_starts_list), batch.seq_lens_list, batch.block_tables_list, strict=True
    ):
        rows = slice(row, stop)
        blocks = torch.tensor(table, device=q.device)
        k, v = (_values(*pair, blocks, end) for pair in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)))
        mine = q[rows].float()
        queries = mine.shape[0]
        grouped = mine.unflatten(1, (k.shape[0], -1)).permute(1, 2, 0, 3)  # [Hkv, group, T, D]
        scores = grouped @ k.unsqueeze(1).transpose(-1, -2) * scale  # [Hkv, group, T, end]
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        key, query = torch.arange(end, device=q.device), torch.arange(end - queries, end, device=q.device).unsqueeze(1)
        seen = key <= query if window is None else (key <= query) & (key > query - window)
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            last = sinks.float().view(*scores.shape[:2], 1, 1).expand(-1, -1, queries, -1)
            scores = torch.cat((scores, last), dim=-1)
        found = scores.softmax(-1)[..., :end] @ v.unsqueeze(1)
        out[rows] = found.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)
    return out


def _values(codes: Tensor, scales: Tensor | None, blocks: Tensor, end: int) -> Tensor:
    """float32 [Hkv, end, D]: what these blocks hold of a sequence."""
    chosen = None if scales is None else scales[blocks].flatten(0, 1)[:end]
    return dequantize(codes[blocks].flatten(0, 1)[:end], chosen).transpose(0, 1)


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    values, ids = logits.max(dim=-1)
    return values, ids


def kth_largest(row: Tensor, k: int) -> float:
    return row.topk(k).values[-1].item()


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    uniform: Tensor,
) -> Tensor:
    best, greedy = logits.max(dim=-1)
    heat = temperature.double().clamp(min=1e-9)[:, None]
    weights = ((logits.double() - best.double()[:, None]) / heat).exp()
    if top_k is not None:
        for row, k in enumerate(top_k.tolist()):
            if 1 <= k <= logits.shape[1]:
                weights[row, logits[row] < logits[row].topk(k).values[-1]] = 0
    if min_p is not None:
        weights[weights < min_p[:, None]] = 0
    if top_p is not None:
        ordered, order = weights.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # the token that reaches the share is in
        out = (before >= top_p[:, None] * ordered.sum(-1, keepdim=True)) & (top_p < 1)[:, None]
        weights = weights.masked_fill(out.gather(1, order.argsort(dim=-1)), 0)
    sums = weights.cumsum(-1)
    drawn = torch.searchsorted(sums, uniform.double()[:, None] * sums[:, -1:], right=True)[:, 0]
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())[:, 0]  # should rounding leave none
    tokens = torch.where(temperature > 0, torch.minimum(drawn, last), greedy)
    return torch.where(best.isfinite(), tokens, -1)


def make_ops(device: torch.device) -> Ops:
    """The reference on any device."""
    return Ops(
        name="reference",
        device=device,
        pack=pack,
        matmul=matmul,
        embedding=embedding,
        rms_norm=rms_norm,
        rope_store=rope_store,
        attention=attention,
        silu_mul=silu_mul,
        argmax=argmax,
        kth_largest=kth_largest,
        gelu_mul=gelu_mul,
        mix=partial(mix, matmul, rms_norm, silu_mul, gelu_mul),
        sample=sample,
        delta=delta,
        ungated=ungated,
    )
