"""From a StepPlan to the arrays, and then the tensors, of one step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from torch import Tensor

from appliance.core.request import Adapter, Request
from appliance.core.step import Chunk
from appliance.runtime.sampler import uniform
from kernels.adapters import Adapted, AdapterWeights
from kernels.batch import PagedBatch, Wanted
from kernels.layout import ADAPTED_AT_ONCE


@dataclass(frozen=True)
class StepArrays:
    """A step on the host: T tokens of S chunks, one after another."""

    ids: np.ndarray  # int64 [T]; -1 - r: the token that row r of the step before samples
    positions: np.ndarray  # int64 [T]
    slots: np.ndarray  # int64 [T]
    starts: np.ndarray  # int32 [S + 1]
    ends: np.ndarray  # int32 [S]: tokens in the cache at the end of the step
    tables: np.ndarray  # int32 [S, most blocks], rows padded with 0
    max_query: int
    singles: int = 0  # chunks of one token at the beginning
    seats: np.ndarray | None = None  # int32 [S]; None where sequences have no states
    rows: np.ndarray | None = None  # int64 [R]: those whose hidden states are wanted; None: all are
    row_starts: np.ndarray | None = None  # int32 [s + 1]: where among these those of each of the first s chunks begin
    adapters: tuple[tuple[Adapter, int], ...] = ()  # of the requests, each with the number of their rows
    adapted: np.ndarray | None = None  # int64: these rows, of one adapter after another, each's rising

    @classmethod
    def build(
        cls, chunks: Sequence[Chunk], block_size: int, sampling: Mapping[Request, int] | None = None, *, states: bool = False
    ) -> StepArrays:
        """``sampling``: the rows of the step before, for requests that have a token which is not known yet. ``states``: whether
        sequences have some, at their seats.

        A step with 256 sequences takes a third of a millisecond, so what is done for each of them in Python is kept small.
        """
        ids: list[int] = []
        for request, start, length, _, draft in chunks:
            if length > 1:
                ids += request.tokens[start : start + length]
                ids += draft
            else:
                tokens = request.tokens
                ids.append(tokens[start] if start < len(tokens) else -1 - sampling[request])  # type: ignore[index]
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
        longer = np.flatnonzero(lengths > 1)
        singles = int(longer[0]) if len(longer) else len(chunks)
        seats = np.array([chunk.request.seat for chunk in chunks], dtype=np.int32) if states else None
        known, last = np.array(ids, dtype=np.int64), ends.astype(np.int32)
        step = cls(known, positions, slots, starts, last, tables, int(lengths.max()), singles, seats)
        return step._with_adapters([chunk.request.adapter for chunk in chunks])

    def _with_adapters(self, each: Sequence[Adapter | None]) -> StepArrays:
        """``each``: that of each chunk's request."""
        if not any(each):
            return self
        chunks: dict[Adapter, list[int]] = {}
        for number, adapter in enumerate(each):
            if adapter is not None:
                chunks.setdefault(adapter, []).append(number)
        rows = [np.concatenate([np.arange(*self.starts[n : n + 2]) for n in own]) for own in chunks.values()]
        return replace(
            self,
            adapters=tuple((adapter, len(own)) for adapter, own in zip(chunks, rows, strict=True)),
            adapted=np.concatenate(rows).astype(np.int64),
        )

    def padded(self, size: int, width: int, spare: int, block_size: int, seat: int | None = None) -> StepArrays:
        """A step of single tokens with ``size`` sequences and tables of ``width`` blocks.

        The new rows are a token each at the beginning of block ``spare``; where sequences have states, theirs are at ``seat``.
        """
        n, used = self.tables.shape
        tables = np.full((size, width), spare, dtype=np.int32)
        tables[:n, :used] = self.tables

        def longer(values: np.ndarray, padding: int) -> np.ndarray:
            return np.concatenate([values, np.full(size - n, padding, dtype=values.dtype)])

        return StepArrays(
            ids=longer(self.ids, 0),
            positions=longer(self.positions, 0),
            slots=longer(self.slots, spare * block_size),
            starts=np.arange(size + 1, dtype=np.int32),
            ends=longer(self.ends, 1),
            tables=tables,
            max_query=1,
            singles=size,
            seats=None if seat is None else longer(np.zeros(0, np.int32) if self.seats is None else self.seats, seat),
        )

    def wanting(self, counts: Sequence[int]) -> StepArrays:
        """The same step, where of each chunk the hidden states of so many tokens are wanted, the last ones, or a few more.

        Sequences of which none is wanted are left out where no other comes after them; else they have one: so what is said of
        sequences can be said of the first ones.
        """
        known = np.array(counts)
        used = int(np.flatnonzero(known)[-1]) + 1 if known.any() else 0
        known = np.maximum(known[:used], 1)
        starts = np.zeros(used + 1, dtype=np.int32)
        known.cumsum(out=starts[1:])
        if starts[-1] == len(self.ids):
            return self
        rows = np.arange(starts[-1]) + np.repeat(self.starts[1 : used + 1] - starts[1:], known)
        return replace(self, rows=rows.astype(np.int64), row_starts=starts)

    @property
    def result_starts(self) -> np.ndarray:
        """Where among the hidden states that a forward gives those of each chunk begin; int32 [S + 1], or as ``row_starts``."""
        return self.starts if self.row_starts is None else self.row_starts

    @classmethod
    def empty(cls) -> StepArrays:
        long, short = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32)
        return cls(long, long, long, np.zeros(1, dtype=np.int32), short, short.reshape(0, 0), max_query=1)

    @property
    def arrays(self) -> list[np.ndarray]:
        """What ``batch`` wants on the device, in that order."""
        found = [self.ids, self.positions, self.slots, self.starts, self.ends, self.tables]
        return found + [array for array in (self.seats, self.rows, self.row_starts, self.adapted) if array is not None]

    @property
    def unknown(self) -> bool:
        """Whether there are tokens that are not known yet."""
        return bool((self.ids < 0).any())

    def batch(
        self, tensors: Sequence[Tensor], max_seq: int | None = None, adapters: Mapping[Adapter, AdapterWeights] | None = None
    ) -> PagedBatch:
        """Of the arrays, wherever they are now; ``max_seq`` bounds the lengths of sequences. ``adapters``: those of requests."""
        longest = int(self.ends.max()) if max_seq is None else max_seq
        _, positions, slots, starts, ends, tables, *more = tensors
        seats = None if self.seats is None else more.pop(0)
        whole = PagedBatch(positions, slots, starts, ends, tables, self.max_query, longest, self.singles, seats)
        if self.adapted is not None:
            return replace(whole, adapters=tuple(self._adapted(more.pop(), adapters or {})))
        return whole if self.row_starts is None else replace(whole, wanted=self._wanted(whole, *more))

    def _adapted(self, sent: Tensor, adapters: Mapping[Adapter, AdapterWeights]) -> Iterator[Adapted]:
        """By whom which rows are added to; ``sent``: ``adapted`` on the device. Rows that follow one another need no look-up."""
        assert self.adapted is not None
        first = 0
        for adapter, count in self.adapters:
            own = self.adapted[first : first + count]
            ends = np.flatnonzero(np.diff(own // ADAPTED_AT_ONCE, append=-1)) + 1  # of its rows in each window
            for begin, end in zip([0, *ends[:-1]], ends, strict=True):
                low, high = int(own[begin]), int(own[end - 1]) + 1
                rows = slice(low, high) if high - low == end - begin else sent[first + begin : first + end]
                yield Adapted(adapters[adapter], rows, low // ADAPTED_AT_ONCE * ADAPTED_AT_ONCE)
            first += count

    def _wanted(self, whole: PagedBatch, rows: Tensor, starts: Tensor) -> Wanted:
        """Rows that are wanted; they read what all of the step have written."""
        assert self.row_starts is not None
        counts, used = np.diff(self.row_starts), len(self.row_starts) - 1
        longer = np.flatnonzero(counts > 1)
        few = PagedBatch(
            positions=whole.positions[rows],
            slots=whole.slots[rows],
            query_starts=starts,
            seq_lens=whole.seq_lens[:used],
            block_tables=whole.block_tables[:used],
            max_query=int(counts.max(initial=0)),
            max_seq=int(self.ends[:used].max(initial=0)),
            singles=int(longer[0]) if len(longer) else used,
        )
        return Wanted(rows, few)


class Draws(NamedTuple):
    """How R rows of logits become tokens, on the host; see kernels.ops.Sample."""

    temperature: np.ndarray  # float32 [R]
    top_k: np.ndarray  # int64 [R]
    top_p: np.ndarray  # float64 [R]
    min_p: np.ndarray  # float64 [R]
    uniform: np.ndarray  # float64 [R]

    @classmethod
    def build(cls, chunks: Sequence[Chunk]) -> Draws:
        """Of the chunks that sample."""
        rows = len(chunks)
        temperature, uniforms = np.zeros(rows, dtype=np.float32), np.zeros(rows)
        top_k, top_p, min_p = np.zeros(rows, dtype=np.int64), np.ones(rows), np.zeros(rows)
        for row, (request, start, length, _, _) in enumerate(chunks):
            params = request.params
            if not params.greedy:
                temperature[row], uniforms[row] = params.temperature, uniform(request.seed, start + length)
                top_k[row], top_p[row], min_p[row] = params.top_k, params.top_p, params.min_p
        return cls(temperature, top_k, top_p, min_p, uniforms)

    @property
    def greedy(self) -> bool:
        return not self.temperature.any()

    @property
    def cut(self) -> bool:
        """Whether some row asks for top_k, top_p or min_p."""
        return bool((self.top_k > 0).any() or (self.top_p < 1).any() or self.min_p.any())
