"""From a StepPlan to the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from appliance.core.scheduler import Chunk
from kernels.ops import PagedBatch


@dataclass(frozen=True)
class StepArrays:
    """A step on the host: T tokens of S chunks, one after another."""

    ids: np.ndarray  # int64 [T]
    positions: np.ndarray  # int64 [T]
    slots: np.ndarray  # int64 [T]
    starts: np.ndarray  # int32 [S + 1]
    ends: np.ndarray  # int32 [S]: tokens in the cache at the end of the step
    tables: np.ndarray  # int32 [S, most blocks], rows padded with 0
    max_query: int

    @classmethod
    def build(cls, chunks: Sequence[Chunk], block_size: int) -> StepArrays:
        """A step with 256 sequences takes a third of a millisecond, so what is done for each of them in Python is kept small."""
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
        return cls(np.array(ids), positions, slots, starts, ends.astype(np.int32), tables, int(lengths.max()))

    def tensors(self, device: torch.device) -> tuple[Tensor, PagedBatch]:
        """(token ids, where they stand in the cache) on the device."""

        def tensor(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(device)

        batch = PagedBatch(
            positions=tensor(self.positions),
            slots=tensor(self.slots),
            query_starts=tensor(self.starts),
            seq_lens=tensor(self.ends),
            block_tables=tensor(self.tables),
            max_query=self.max_query,
            max_seq=int(self.ends.max()),
        )
        return tensor(self.ids), batch
