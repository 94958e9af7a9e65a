"""A whole model over its caches, with the partial sums of split products added by whoever reads them next.

Few rows leave a card half empty, so products of few rows are cut along their inputs (kernels/tune.py). Adding the parts up is a
launch of its own where operators are called one by one; here the next kernel does it while it reads them::

    layer   x = norm(residual)   [T, hidden]
            product qkv        -> parts [splits, T, (Hq + 2 Hkv) D] -> rope_store adds: q, and the cache
            attention          -> [T, Hq D]
            product o          -> parts [splits, T, hidden]         -> the norm adds: residual, x
            product gate, up   -> parts                             -> finish adds: silu(gate) * up
            product down       -> parts [splits, T, hidden]         -> the next layer's norm adds: residual, x

That is ten launches a layer instead of thirteen (nine where attention is not split). A product that is not cut (many rows, dense
weights) or whose weight is several takes the operators' way; results are the operators' own, in the same order of additions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ops import Embedding, Forward, KVCache, Layer, Linear, Norm, PagedBatch, Stack, Weight
from kernels.triton.attention import attention
from kernels.triton.elementwise import silu_mul
from kernels.triton.matmul import UNKNOWN, Card, matmul, partial_sums
from kernels.triton.norm import add_rms_norm, add_rms_norm_int8, rms_norm, rms_norm_int8
from kernels.triton.quantize import Rounded
from kernels.triton.rope import rope_store, rope_store_sums
from kernels.triton.rounded import takes_codes
from kernels.triton.weights import TritonWeight


def bind(
    stack: Stack, caches: Sequence[KVCache], *, max_tokens: int, embedding: Embedding, card: Card = UNKNOWN
) -> Forward | None:
    """As kernels.ops.Bind; None where a weight was packed for other operators. ``embedding`` looks up rows of the stack's table.

    Nothing in a forward waits for the device, and what it launches depends on shapes, max_query and max_seq alone, so that it can
    be recorded as a graph. ValueError for more than ``max_tokens`` tokens.
    """
    if not all(isinstance(weight, TritonWeight) for layer in stack.layers for weight in _weights(layer)):
        return None
    model = _Model(stack, tuple(caches), embedding, card)
    if len(model.caches) != len(stack.layers):
        raise ValueError(f"{len(model.caches)} caches for {len(stack.layers)} layers")

    def forward(ids: Tensor, batch: PagedBatch) -> Tensor:
        if ids.shape[0] > max_tokens:
            raise ValueError(f"{ids.shape[0]} tokens, but at most {max_tokens} were said to come at once")
        return model.forward(ids, batch)

    return forward


def _weights(layer: Layer) -> tuple[Weight, ...]:
    return (*layer.qkv, layer.o, *layer.gate_up, layer.down)


@dataclass(frozen=True)
class _Model:
    stack: Stack
    caches: tuple[KVCache, ...]
    embedding: Embedding
    card: Card

    def forward(self, ids: Tensor, batch: PagedBatch) -> Tensor:
        layers, last = self.stack.layers, self.stack.norm.weight
        residual = self.embedding(ids, self.stack.embedding, last.dtype)
        # Each norm with the weights behind it; behind the last is the head, which takes it as it is.
        norms = [*((layer.input_norm, layer.qkv) for layer in layers), (last, ())]
        x = self._norm(residual, *norms[0])
        for layer, cache, following in zip(layers, self.caches, norms[1:], strict=True):
            found = self._attention(x, layer, cache, batch)
            x, residual = self._join(found, layer.o, residual, layer.post_norm, layer.gate_up)
            x, residual = self._join(self._gated(x, layer), layer.down, residual, *following)
        assert isinstance(x, Tensor)
        return x

    def _attention(self, x: Tensor | Rounded, layer: Layer, cache: KVCache, batch: PagedBatch) -> Tensor:
        """[T, Hq * D]; new keys and values are in the cache."""
        stack, (scale, dtype) = self.stack, (self.stack.head_dim**-0.5, self.stack.norm.weight.dtype)
        q_norm, k_norm = (None if gain is None else Norm(gain, stack.norm.eps) for gain in (layer.q_norm, layer.k_norm))
        weight = layer.qkv[0]
        parts = partial_sums(x, weight, card=self.card) if len(layer.qkv) == 1 else None
        if parts is None:
            qkv = self._linear(x, layer.qkv)
            q = rope_store(qkv, stack.heads, cache, batch, stack.cos_sin, q_norm=q_norm, k_norm=k_norm)
        else:
            given = (parts, bias_of(weight), stack.heads, cache, batch, stack.cos_sin)
            q = rope_store_sums(*given, dtype=dtype, q_norm=q_norm, k_norm=k_norm)
        card = self.card.multiprocessors
        return attention(q, cache, batch, scale=scale, window=layer.window, multiprocessors=card).flatten(1)

    def _join(
        self, x: Tensor, weight: Weight, residual: Tensor, norm: Tensor, following: Linear
    ) -> tuple[Tensor | Rounded, Tensor]:
        """(the norm of the new residual, for ``following``; the new residual = x @ weight.T + bias + residual [T, hidden])."""
        parts, eps = partial_sums(x, weight, card=self.card), self.stack.norm.eps
        if parts is None:
            added = matmul(x, weight, residual=residual, card=self.card)
            return self._norm(added, norm, following), added
        if take_codes(following):
            codes, scales, added = add_rms_norm_int8(parts, residual, norm, eps=eps, bias=bias_of(weight))
            return Rounded(codes, scales, None), added
        return add_rms_norm(parts, residual, norm, eps=eps, bias=bias_of(weight))

    def _norm(self, x: Tensor, norm: Tensor, following: Linear) -> Tensor | Rounded:
        """Of x [T, hidden], rounded to int8 where all weights behind it want that."""
        if take_codes(following):
            return Rounded(*rms_norm_int8(x, norm, eps=self.stack.norm.eps), None)
        return rms_norm(x, norm, eps=self.stack.norm.eps)

    def _gated(self, x: Tensor | Rounded, layer: Layer) -> Tensor:
        """silu(gate) * up, [T, intermediate]."""
        found = self._linear(x, layer.gate_up)
        return found if len(layer.gate_up) == 1 else silu_mul(found)

    def _linear(self, x: Tensor | Rounded, weights: Linear) -> Tensor:
        found = [self._product(x, weight) for weight in weights]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def _product(self, x: Tensor | Rounded, weight: Weight) -> Tensor:
        rows = x.codes if isinstance(x, Rounded) else x
        out = torch.empty((rows.shape[0], weight.N), dtype=self.stack.norm.weight.dtype, device=rows.device)
        return matmul(x, weight, out=out, card=self.card)


def take_codes(weights: Linear) -> bool:
    """Whether the norm before these weights is to be rounded to int8."""
    return len(weights) > 0 and all(isinstance(weight, TritonWeight) and takes_codes(weight) for weight in weights)


def bias_of(weight: Weight) -> Tensor | None:
    assert isinstance(weight, TritonWeight)
    return weight.bias
