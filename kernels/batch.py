"""Where the tokens of one step stand. T tokens of S sequences, packed one after another."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kernels.adapters import Adapted

AT_ONCE = 256  # rows


@dataclass(frozen=True)
class Wanted:
    """The rows of a step whose hidden states somebody will look at, where these are not all of them."""

    rows: Tensor  # int64 [R], rising, of the step's T
    batch: PagedBatch  # of these alone: of each sequence the last ones


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
    wanted: Wanted | None = None  # None: all rows are
    adapters: tuple[Adapted, ...] = ()  # rows to whose products something is added

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


def moved_up(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], where rows rise, in x's own memory: none is overwritten before it is read."""
    for first in range(0, rows.shape[0], AT_ONCE):
        part = rows[first : first + AT_ONCE]
        x[first : first + part.shape[0]] = x[part]
    return x[: rows.shape[0]]
