"""Tables of tokens, before and behind the layers: the embedding, the head, and what layers are told beside hidden states."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.layout import shares_table
from kernels.ops import Ops, Weight
from models.module import ModuleShape
from models.per_layer import NORM, PerLayer
from models.spec import ModelSpec
from quant.checkpoint import Checkpoint
from quant.errors import CheckpointError
from quant.rows import dequantize_rows, quantize_rows
from quant.tensor import QuantTensor

log = logging.getLogger("appliance.loader")

FLOATS = ("F16", "BF16", "F32")
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@dataclass(frozen=True)
class TokenInputs:
    """What layers are told of tokens: rows of ``table`` [V, width], and a projection of the embedding, normalized."""

    table: Tensor | Weight  # a dense one is as it was published
    projection: Weight  # [width, hidden]
    norm: Tensor  # [features of a layer]

    @property
    def nbytes(self) -> int:
        return self.table.nbytes + self.projection.nbytes + self.norm.nbytes


@dataclass(frozen=True)
class Tables:
    """Loads them. ``head_bits`` and ``embedding_bits``: in which a head, and other tables, are kept that are not quantized."""

    checkpoint: Checkpoint
    spec: ModelSpec
    ops: Ops
    dtype: torch.dtype
    activation: str
    head_bits: int | None
    embedding_bits: int | None

    def ends(self) -> tuple[Tensor | Weight, Weight, bool]:
        """(embedding, head, whether they are one). A tied model may store the one table under either name."""
        if not self.spec.tie_embeddings:  # one after the other: the first table is gone before the second is read
            return self._embedding(self._table(EMBEDDING)), self._head(self._table(HEAD)), False
        stored = self._stored(EMBEDDING)
        if not (stored and self._stored(HEAD)):
            return self._shared(self._table(EMBEDDING if stored else HEAD))
        table, head = self._table(EMBEDDING), self._table(HEAD)
        if isinstance(head, Tensor) and isinstance(table, Tensor):
            if torch.equal(head.to(self.dtype), table.to(self.dtype)):
                return self._shared(table)
            log.warning(
                "config.json says that the head is tied to the embedding, but the checkpoint has both and they differ: using both"
            )
        return self._embedding(table), self._head(head), False

    def _stored(self, module: str) -> bool:
        return any(name.startswith(f"{module}.") for name in self.checkpoint.index.tensors)

    def _table(self, name: str) -> QuantTensor | Tensor:
        return self._read(ModuleShape(name, self.spec.vocab, self.spec.hidden, "embedding", False))

    def _shared(self, table: QuantTensor | Tensor) -> tuple[Tensor | Weight, Weight, bool]:
        """Embedding and head of one table: one copy where the operators can look up rows of what they multiply with."""
        bits = table.bits if isinstance(table, QuantTensor) else self.head_bits
        shared = shares_table(self.ops.name, bits)
        if isinstance(table, Tensor) and shared and bits is None:
            dense = table.to(self.ops.device, self.dtype)
            return dense, self._pack(dense), True
        if isinstance(table, Tensor) and shared and bits is not None:
            table = quantize_rows(table, bits)  # the table is gone before the packed copy is made
        if isinstance(table, QuantTensor) and shared and has_rows(table):
            packed = self._pack(table)
            return packed, packed, True
        embedding = self._embedding(table)
        if isinstance(embedding, Tensor) and bits is not None:
            log.info("the head is stored in int%d; the embedding it is tied to stays beside it in %s", bits, self.dtype)
        return embedding, self._head(table), False

    def _embedding(self, table: QuantTensor | Tensor) -> Tensor | Weight:
        """An embedding by itself, quantized where that is wanted and the checkpoint has not done it."""
        if isinstance(table, Tensor):
            if self.embedding_bits is None:
                return table.to(self.ops.device, self.dtype)
            table = quantize_rows(table, self.embedding_bits)
        if not has_rows(table):
            return dequantize_rows(table, self.dtype).to(self.ops.device)
        return (self.ops.pack_table or self.ops.pack)(table, dtype=self.dtype, activation=self.activation)

    def _head(self, head: QuantTensor | Tensor) -> Weight:
        """Packed, and quantized before where that is wanted and the checkpoint has not done it."""
        if isinstance(head, Tensor) and self.head_bits is not None:
            head = quantize_rows(head, self.head_bits)
        return self._pack(head)

    def inputs(self, net: PerLayer) -> TokenInputs:
        """The table stays in the type it was published in: it is large, and a step reads a few rows."""
        table, projection = net.ends(self.spec.vocab, self.spec.hidden)
        rows = self._read(table)
        whole = isinstance(rows, Tensor) and self.embedding_bits is None
        kept = rows.to(self.ops.device) if isinstance(rows, Tensor) and whole else self._embedding(rows)
        del rows  # before the other one is read
        norm = self.checkpoint.take(f"{NORM}.weight", dtypes=FLOATS, shape=(net.size,))
        return TokenInputs(kept, self._pack(self._read(projection)), norm.to(self.ops.device, self.dtype))

    def _read(self, module: ModuleShape) -> QuantTensor | Tensor:
        return finite(module.name, self.checkpoint.weight(module.name, expect=(module.N, module.K)))

    def _pack(self, weight: QuantTensor | Tensor) -> Weight:
        return self.ops.pack(weight, dtype=self.dtype, activation=self.activation)


def finite(name: str, weight: QuantTensor | Tensor) -> QuantTensor | Tensor:
    """CheckpointError where scales are not.

    Readers of 4-bit floats have looked at theirs: there are many, which would take four times as much for a moment.
    """
    if isinstance(weight, QuantTensor) and weight.kind != "fp4" and not bool(torch.isfinite(weight.scales.float()).all()):
        raise CheckpointError(f"{name}: some of its scales are not finite numbers: the checkpoint is damaged")
    return weight


def has_rows(table: QuantTensor) -> bool:
    """Whether operators can look up rows of it. Of others (FP8, inputs in another order) a dense embedding is made."""
    return table.kind == "int" and table.perm is None
