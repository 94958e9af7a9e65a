"""From a StepPlan to the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from appliance.core.scheduler import Chunk
from kernels.ops import PagedBatch


def build_batch(chunks: Sequence[Chunk], block_size: int, device: torch.device) -> tuple[Tensor, PagedBatch]:
    """Token ids (int64 [T]) of the chunks one after another, and where they stand in the cache."""
    ids: list[int] = []
    positions = np.concatenate([np.arange(c.start, c.start + c.length, dtype=np.int64) for c in chunks])
    starts = [0]
    for chunk in chunks:
        ids += chunk.request.tokens[chunk.start : chunk.start + chunk.length]
        starts.append(len(ids))
    seq_lens = tuple(c.start + c.length for c in chunks)
    # Only the blocks that hold tokens by the end of this step: later ones would be read as garbage.
    tables = tuple(tuple(c.request.blocks[: -(-n // block_size)]) for c, n in zip(chunks, seq_lens, strict=True))
    width = max(len(t) for t in tables)
    padded = np.zeros((len(chunks), width), dtype=np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    owner = np.repeat(np.arange(len(chunks)), np.diff(starts))
    slots = padded[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
    batch = PagedBatch(
        positions=torch.from_numpy(positions).to(device),
        slots=torch.from_numpy(slots).to(device),
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        block_tables=torch.from_numpy(padded).to(device),
        query_starts_list=tuple(starts),
        seq_lens_list=seq_lens,
        block_tables_list=tables,
        max_query=max(c.length for c in chunks),
        max_seq=max(seq_lens),
    )
    return torch.tensor(ids, dtype=torch.int64, device=device), batch
