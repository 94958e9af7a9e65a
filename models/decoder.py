"""The one decoder: pre-norm attention and gated MLP, driven by a ModelSpec, calling Ops only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ops import KVCache, Ops, PagedBatch, Weight
from models.spec import ModelSpec

Linear = tuple[Weight, ...]  # several where the parts of a fused projection cannot be one weight; outputs are joined


@dataclass(frozen=True)
class Layer:
    """Weights of one layer, in the device's layout; norms [hidden] or [head_dim] in the activations' dtype."""

    input_norm: Tensor
    qkv: Linear
    o: Weight
    post_norm: Tensor
    gate_up: Linear
    down: Weight
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    window: int | None = None

    @property
    def nbytes(self) -> int:
        norms = (self.input_norm, self.post_norm, self.q_norm, self.k_norm)
        return sum(w.nbytes for w in (*self.qkv, self.o, *self.gate_up, self.down)) + sum(
            n.nbytes for n in norms if n is not None
        )


@dataclass(frozen=True)
class Decoder:
    """A loaded model. ``embedding`` [V, hidden] is also the head's storage where ``spec.tie_embeddings`` says so."""

    spec: ModelSpec
    ops: Ops
    embedding: Tensor
    layers: tuple[Layer, ...]
    norm: Tensor
    head: Weight
    cos_sin: Tensor  # float32 [max_len, rotary_dim]
    tied: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all weights and tables, shared ones once."""
        head = 0 if self.tied else self.head.nbytes
        return self.embedding.nbytes + sum(layer.nbytes for layer in self.layers) + self.norm.nbytes + head + self.cos_sin.nbytes

    def forward(self, ids: Tensor, batch: PagedBatch, caches: Sequence[KVCache]) -> Tensor:
        """Token ids int64 [T] -> hidden states [T, hidden] after the final norm; writes keys and values into ``caches``."""
        ops, eps = self.ops, self.spec.eps
        residual = ops.embedding(ids, self.embedding)
        x = ops.rms_norm(residual, self.layers[0].input_norm, eps=eps)
        for i, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            x = self._attention(layer, x, batch, cache)
            x, residual = ops.add_rms_norm(x, residual, layer.post_norm, eps=eps)
            x = ops.matmul(ops.silu_mul(self._linear(x, layer.gate_up)), layer.down)
            following = self.layers[i + 1].input_norm if i + 1 < len(self.layers) else self.norm
            x, residual = ops.add_rms_norm(x, residual, following, eps=eps)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [R, V] of hidden states [R, hidden]."""
        return self.ops.matmul(hidden, self.head).float()

    def _attention(self, layer: Layer, x: Tensor, batch: PagedBatch, cache: KVCache) -> Tensor:
        spec, ops = self.spec, self.ops
        qkv = self._linear(x, layer.qkv)
        q, k, v = (t.unflatten(1, (-1, spec.head_dim)) for t in qkv.split([spec.q_size, spec.kv_size, spec.kv_size], dim=1))
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = ops.rms_norm(q, layer.q_norm, eps=spec.eps), ops.rms_norm(k, layer.k_norm, eps=spec.eps)
        q, k = ops.rope(q, k, batch.positions, self.cos_sin)
        ops.store_kv(k, v, cache, batch.slots)
        out = ops.attention(q, cache, batch, scale=spec.head_dim**-0.5, window=layer.window)
        return ops.matmul(out.flatten(1), layer.o)

    def _linear(self, x: Tensor, weights: Linear) -> Tensor:
        if len(weights) == 1:
            return self.ops.matmul(x, weights[0])
        return torch.cat([self.ops.matmul(x, weight) for weight in weights], dim=1)
