"""Paged attention on a card: one kernel for sequences of one row, which come first in a step, and one for all others."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.ops import KVCache, PagedBatch
from kernels.triton.attention_decode import decode, split_count
from kernels.triton.attention_prefill import prefill
from kernels.triton.kv import capability

MULTIPROCESSORS = 128  # of a card about which nothing was said


def attention(
    q: Tensor,
    cache: KVCache,
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    sinks: Tensor | None = None,
    multiprocessors: int = MULTIPROCESSORS,
) -> Tensor:
    """Causal attention of q [T, Hq, D] (fp16, bf16, fp32) over the paged cache -> [T, Hq, D]; see ``kernels.ops.Attention``.

    The cache may hold another float type, float8_e4m3fn, float8_e5m2, or int8 with scales. Nothing here waits for the device, and
    what is launched depends on shapes, max_query and max_seq alone. ValueError for a layout that the kernels do not know,
    and for sinks (the memory plan refuses them before).
    """
    if sinks is not None:
        raise ValueError("no kernel for cards knows sinks")
    if q.stride(2) != 1:
        q = q.contiguous()
    if not q.numel():
        return q.new_empty(q.shape)
    card = capability(q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    singles = len(batch.seq_lens) if batch.max_query == 1 else batch.singles
    if singles:
        seen = batch.max_seq if window is None else min(batch.max_seq, window)
        splits = split_count(seen, singles, cache.k.shape[2], multiprocessors)
        decode(q, cache, batch, out, singles, scale=scale, window=window, cap=cap, splits=splits, capability=card)
    if singles < len(batch.seq_lens):
        prefill(q, cache, batch, out, singles, scale=scale, window=window, cap=cap, capability=card)
    return out
