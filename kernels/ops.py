"""The seam between a model and the arithmetic it runs on: one frozen record of callables per device.

Shapes in this file: T tokens of one step (all sequences packed one after another), S sequences, N outputs, K inputs,
Hq query heads, Hkv key/value heads, D head size, V vocabulary, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quant.tensor import QuantTensor


@dataclass(frozen=True)
class KVCache:
    """One layer's paged cache. A token's slot is ``block * block_size + offset``."""

    k: Tensor  # [B, block_size, Hkv, D]
    v: Tensor  # [B, block_size, Hkv, D]

    @property
    def block_size(self) -> int:
        return self.k.shape[1]


@dataclass(frozen=True)
class PagedBatch:
    """Where the T tokens of one step stand: computed once a step, read by every layer.

    Sequence s owns the rows ``query_starts[s] : query_starts[s + 1]``; after ``store_kv`` its cache holds ``seq_lens[s]`` tokens,
    of which its rows are the last. The ``*_list`` twins hold the same integers for code that loops in Python.
    """

    positions: Tensor  # int64 [T]
    slots: Tensor  # int64 [T]
    query_starts: Tensor  # int32 [S + 1]
    seq_lens: Tensor  # int32 [S]
    block_tables: Tensor  # int32 [S, max blocks], rows padded with 0
    query_starts_list: tuple[int, ...]
    seq_lens_list: tuple[int, ...]
    block_tables_list: tuple[tuple[int, ...], ...]
    max_query: int
    max_seq: int


class Weight(Protocol):
    """A weight in the layout a device wants; made by ``Ops.pack`` and understood only by the same Ops."""

    @property
    def N(self) -> int: ...

    @property
    def K(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


class Pack(Protocol):
    def __call__(self, weight: QuantTensor | Tensor, *, dtype: torch.dtype, bias: Tensor | None = None) -> Weight:
        """Lay out a canonical weight (QuantTensor, or dense [N, K]) for ``matmul`` with activations of ``dtype``."""


class MatMul(Protocol):
    def __call__(self, x: Tensor, weight: Weight) -> Tensor:
        """x [T, K] @ weight.T + bias -> [T, N], in x's dtype; x is gathered first where the weight carries a permutation."""


class Embedding(Protocol):
    def __call__(self, ids: Tensor, table: Tensor) -> Tensor:
        """Rows of table [V, hidden] for int64 ids [T]."""


class RMSNorm(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        """x * weight / sqrt(mean(x^2) + eps) over the last dimension, the mean in float32."""


class AddRMSNorm(Protocol):
    def __call__(self, x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + residual), x + residual)."""


class Rope(Protocol):
    def __call__(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate the first ``rotary`` features of q [T, Hq, D] and k [T, Hkv, D] (halves, not interleaved).

        cos_sin is float32 [max positions, rotary]: the cosines of ``rotary / 2`` frequencies, then their sines.
        """


class SiluMul(Protocol):
    def __call__(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up for gate_up [T, 2 * I] (gate first) -> [T, I]."""


class StoreKV(Protocol):
    def __call__(self, k: Tensor, v: Tensor, cache: KVCache, slots: Tensor) -> None:
        """Write k, v [T, Hkv, D] into the cache at slots [T]."""


class Attention(Protocol):
    def __call__(self, q: Tensor, cache: KVCache, batch: PagedBatch, *, scale: float, window: int | None = None) -> Tensor:
        """Causal attention of q [T, Hq, D] over the paged cache -> [T, Hq, D].

        A token at position p sees positions max(0, p - window + 1) .. p. Hq is a multiple of Hkv; query head h reads
        key/value head h // (Hq // Hkv).
        """


@dataclass(frozen=True)
class Ops:
    """Everything a model may ask of a device."""

    name: str  # "reference", "cpu", ...
    device: torch.device
    pack: Pack
    matmul: MatMul
    embedding: Embedding
    rms_norm: RMSNorm
    add_rms_norm: AddRMSNorm
    rope: Rope
    silu_mul: SiluMul
    store_kv: StoreKV
    attention: Attention


def get_ops(device: str = "cpu", *, reference: bool = False) -> Ops:
    """The fastest Ops for a device, or the plain-torch reference, which always works."""
    if torch.device(device).type == "cpu" and not reference:
        from kernels.cpu.torch_ops import make_ops
    else:
        from kernels.reference import make_ops
    return make_ops(torch.device(device))
