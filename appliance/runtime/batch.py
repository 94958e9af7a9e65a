"""From a StepPlan to the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from appliance.core.scheduler import Chunk
from kernels.ops import PagedBatch


def build_batch(chunks: Sequence[Chunk], block_size: int, device: torch.device) -> tuple[Tensor, PagedBatch]:
    """Token ids (int64 [T]) of the chunks one after another, and where they stand in the cache.

    A step with 256 sequences is built in a third of a millisecond, so what is done for each of them in Python is kept small.
    """
    ids: list[int] = []
    for request, start, length, _ in chunks:
        ids += request.tokens[start : start + length] if length > 1 else (request.tokens[start],)
    lengths = np.array([chunk.length for chunk in chunks])
    ends = lengths + [chunk.start for chunk in chunks]
    starts = np.zeros(len(chunks) + 1, dtype=np.int32)
    lengths.cumsum(out=starts[1:])
    # A token's position is its place in the batch, less where its sequence's rows begin, plus where the chunk begins.
    owner = np.arange(len(chunks)) if len(ids) == len(chunks) else np.repeat(np.arange(len(chunks)), lengths)
    positions = np.arange(len(ids)) + (ends - starts[1:])[owner]
    # Only the blocks that hold tokens by the end of this step: later ones would be read as garbage.
    used = -(-ends // block_size)
    tables = np.zeros((len(chunks), used.max()), dtype=np.int32)
    for row, count, chunk in zip(tables, used.tolist(), chunks, strict=True):
        row[:count] = chunk.request.blocks[:count]
    slots = tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device)

    batch = PagedBatch(
        positions=tensor(positions),
        slots=tensor(slots),
        query_starts=tensor(starts),
        seq_lens=tensor(ends.astype(np.int32)),
        block_tables=tensor(tables),
        max_query=int(lengths.max()),
        max_seq=int(ends.max()),
    )
    return tensor(np.array(ids)), batch
