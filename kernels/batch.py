"""Where the tokens of one step stand. T tokens of S sequences, packed one after another."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PagedBatch:
    """Where the T tokens of one step stand: computed once a step, read by every layer.

    Sequence s owns the rows ``query_starts[s] : query_starts[s + 1]``; after ``rope_store`` its cache holds ``seq_lens[s]``
    tokens, of which its rows are the last. The ``*_list`` twins are the same integers for code that loops in Python.
    """

    positions: Tensor  # int64 [T]
    slots: Tensor  # int64 [T]
    query_starts: Tensor  # int32 [S + 1]
    seq_lens: Tensor  # int32 [S]
    block_tables: Tensor  # int32 [S, max blocks], rows padded with 0
    max_query: int
    max_seq: int
    singles: int = 0  # so many sequences at the beginning are known to have one row each
    states: Tensor | None = None  # int32 [S]: the place of each sequence in a StateCache; of models that have such

    @property
    def query_starts_list(self) -> list[int]:
        return self.query_starts.tolist()

    @property
    def seq_lens_list(self) -> list[int]:
        return self.seq_lens.tolist()

    @property
    def block_tables_list(self) -> list[list[int]]:
        """With the rows' padding."""
        return self.block_tables.tolist()
