"""A whole model over its caches, with the partial sums of split products added by whoever reads them next.

Few rows leave a card half empty, so products of few rows are cut along their inputs (kernels/tune.py). Adding the parts up is a
launch of its own where operators are called one by one; here the next kernel does it while it reads them::

    layer   x = norm(residual)   [T, hidden]
            product qkv        -> parts [splits, T, (Hq + 2 Hkv) D] -> rope_store adds: q, and the cache
            attention          -> [T, Hq D]
            product o          -> parts [splits, T, hidden]         -> the norm adds: residual, x
            product gate, up   -> parts                             -> finish adds: the gated product
            product down       -> parts [splits, T, hidden]         -> the next layer's norm adds: residual, x
            or a mixture       -> parts, one for each expert of a token, too (experts.py)

That is ten launches a layer instead of thirteen (nine where attention is not split). Weights that want their inputs in another
order (act-order) or in int8 find them so: the norm writes them that way, which saves a gather or a rounding. A product that is
not cut (many rows, dense weights) or whose weight is several takes the operators' way; results are the operators' own, in the
same order of additions.

A layer's words and params are read while it is ``present`` and not before or after; the norm behind ``down`` belongs to the next
layer, of which it reads what never leaves the card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.ops import MLP, Embedding, Forward, KVCache, Layer, Linear, Mixture, Norm, PagedBatch, Stack, Weight
from kernels.states import StateCache
from kernels.triton.attention import attention
from kernels.triton.elementwise import gelu_mul, silu_mul
from kernels.triton.experts import mixed_parts
from kernels.triton.matmul import UNKNOWN, Card, matmul, partial_sums
from kernels.triton.norm import add_rms_norm, add_rms_norm_int8, rms_norm, rms_norm_int8
from kernels.triton.quantize import Rounded
from kernels.triton.rope import rope_store, rope_store_sums
from kernels.triton.rounded import takes_codes
from kernels.triton.weights import TritonWeight


def bind(
    stack: Stack,
    caches: Sequence[KVCache],
    *,
    states: Sequence[StateCache] = (),
    max_tokens: int,
    embedding: Embedding,
    card: Card = UNKNOWN,
) -> Forward | None:
    """As kernels.ops.Bind.

    None where a weight was packed for other operators, or layers have states, no norms before products, normalized values, or
    none of their own.

    ``embedding`` looks up rows of the stack's table.

    Nothing in a forward waits for the device, and what it launches depends on shapes, max_query and max_seq alone, so that it can
    be recorded as a graph. ValueError for more than ``max_tokens`` tokens.
    """
    if not all(isinstance(weight, TritonWeight) for layer in stack.layers for weight in layer.weights):
        return None
    if states or any(layer.input_norm is None or layer.v_norm is not None or layer.shared for layer in stack.layers):
        return None
    if len(caches) != len(stack.layers):
        raise ValueError(f"{len(caches)} caches for {len(stack.layers)} layers")
    model = _Model.of(stack, tuple(caches), embedding, card)

    def forward(ids: Tensor, batch: PagedBatch) -> Tensor:
        if ids.shape[0] > max_tokens:
            raise ValueError(f"{ids.shape[0]} tokens, but at most {max_tokens} were said to come at once")
        return model.forward(ids, batch)

    return forward


@dataclass(frozen=True, eq=False)
class _Norm:
    """A norm as the weights behind it want it."""

    norm: Norm
    perm: Tensor | None = None
    codes: bool = False  # in int8

    @staticmethod
    def before(norm: Norm, weights: Linear) -> tuple[_Norm, Linear]:
        """(the norm, the weights as they are to be called then)."""
        first = weights[0]
        perm = first.perm if isinstance(first, TritonWeight) and len(weights) == 1 else None
        if isinstance(first, TritonWeight) and perm is not None:
            weights = (replace(first, perm=None),)
        codes = all(isinstance(weight, TritonWeight) and takes_codes(weight) for weight in weights)
        return _Norm(norm, perm, codes), weights

    def __call__(self, x: Tensor) -> Tensor | Rounded:
        """Of x [T, hidden]."""
        if self.codes:
            return Rounded(*rms_norm_int8(x, **self.norm._asdict(), perm=self.perm), None)
        return rms_norm(x, **self.norm._asdict(), perm=self.perm)

    def of_sum(
        self, parts: Tensor, bias: Tensor | None, residual: Tensor, post: Tensor | None
    ) -> tuple[Tensor | Rounded, Tensor]:
        """(of the sum, the sum) of parts [splits, T, hidden] (or whole ones, [T, hidden]), bias and residual.

        post: the weight of a norm of what is added.
        """
        given = {**self.norm._asdict(), "bias": bias, "post": post, "perm": self.perm}
        if self.codes:
            codes, scales, added = add_rms_norm_int8(parts, residual, **given)
            return Rounded(codes, scales, None), added
        return add_rms_norm(parts, residual, **given)


@dataclass(frozen=True, eq=False)
class _Model:
    stack: Stack
    layers: tuple[Layer, ...]  # with weights as the norms before them want them called
    norms: tuple[_Norm, ...]  # two a layer, and the last
    caches: tuple[KVCache, ...]
    embedding: Embedding
    card: Card

    @staticmethod
    def of(stack: Stack, caches: tuple[KVCache, ...], embedding: Embedding, card: Card) -> _Model:
        layers, norms, like = [], [], stack.norm
        for layer in stack.layers:
            assert layer.input_norm is not None and layer.post_norm is not None  # as bind has seen
            first, qkv = _Norm.before(like._replace(weight=layer.input_norm), layer.qkv)
            before, mlp = like._replace(weight=layer.post_norm), layer.mlp
            second = _Norm(before)
            if isinstance(mlp, MLP):
                second, gate_up = _Norm.before(before, mlp.gate_up)
                mlp = MLP(gate_up, mlp.down)
            layers.append(replace(layer, qkv=qkv, mlp=mlp))
            norms += [first, second]
        return _Model(stack, tuple(layers), (*norms, _Norm(stack.norm)), caches, embedding, card)

    def forward(self, ids: Tensor, batch: PagedBatch) -> Tensor:
        residual = self.embedding(ids, self.stack.embedding, self.stack.norm.weight.dtype)
        if self.stack.embedding_scale != 1.0:
            residual *= self.stack.embedding_scale
        x = self.norms[0](residual)
        for i, (layer, cache) in enumerate(zip(self.layers, self.caches, strict=True)):
            with layer.present():
                x = self._attention(x, layer, cache, batch)
                x, residual = self._join(x, layer.o, residual, layer.attention_norm, self.norms[2 * i + 1])
                x, residual = self._mlp(x, layer, residual, self.norms[2 * i + 2])
        assert isinstance(x, Tensor)
        return x

    def _attention(self, x: Tensor | Rounded, layer: Layer, cache: KVCache, batch: PagedBatch) -> Tensor:
        """[T, Hq * D]; new keys and values are in the cache."""
        stack, dtype, cos_sin = self.stack, self.stack.norm.weight.dtype, self.stack.rotation(layer)
        gains = (layer.q_norm, layer.k_norm)
        q_norm, k_norm = (None if gain is None else stack.norm._replace(weight=gain) for gain in gains)
        weight = layer.qkv[0]
        parts = partial_sums(x, weight, card=self.card) if len(layer.qkv) == 1 else None
        if parts is None:
            qkv = self._linear(x, layer.qkv)
            q = rope_store(qkv, stack.heads, cache, batch, cos_sin, q_norm=q_norm, k_norm=k_norm)
        else:
            given = (parts, bias_of(weight), stack.heads, cache, batch, cos_sin)
            q = rope_store_sums(*given, dtype=dtype, q_norm=q_norm, k_norm=k_norm)
        found = attention(
            q, cache, batch, scale=stack.scale, window=layer.window, cap=stack.cap, multiprocessors=self.card.multiprocessors
        )
        return found.flatten(1)

    def _join(
        self, x: Tensor, weight: Weight, residual: Tensor, post: Tensor | None, norm: _Norm
    ) -> tuple[Tensor | Rounded, Tensor]:
        """(the norm of the new residual, the new residual = x @ weight.T + bias + residual), [T, hidden] both.

        post: the weight of a norm of the product.
        """
        parts = partial_sums(x, weight, card=self.card)
        if parts is not None:
            return norm.of_sum(parts, bias_of(weight), residual, post)
        if post is not None:
            return norm.of_sum(self._product(x, weight), None, residual, post)
        added = matmul(x, weight, residual=residual, card=self.card)
        return norm(added), added

    def _mlp(self, x: Tensor | Rounded, layer: Layer, residual: Tensor, norm: _Norm) -> tuple[Tensor | Rounded, Tensor]:
        """(the norm of the new residual, the new residual), [T, hidden] both, behind an MLP or a mixture of such."""
        if isinstance(layer.mlp, Mixture):
            assert isinstance(x, Tensor)  # the norm before it is a plain one
            return norm.of_sum(mixed_parts(x, layer.mlp, card=self.card), None, residual, None)
        return self._join(self._gated(x, layer), layer.mlp.down, residual, layer.mlp_norm, norm)

    def _gated(self, x: Tensor | Rounded, layer: Layer) -> Tensor:
        """silu(gate) * up, or gelu(gate) * up, [T, intermediate]."""
        gate_up = layer.only_mlp.gate_up
        found = self._linear(x, gate_up)
        multiply = gelu_mul if self.stack.gelu else silu_mul
        return found if len(gate_up) == 1 else multiply(found)

    def _linear(self, x: Tensor | Rounded, weights: Linear) -> Tensor:
        found = [self._product(x, weight) for weight in weights]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def _product(self, x: Tensor | Rounded, weight: Weight) -> Tensor:
        rows = x.codes if isinstance(x, Rounded) else x
        out = torch.empty((rows.shape[0], weight.N), dtype=self.stack.norm.weight.dtype, device=rows.device)
        return matmul(x, weight, out=out, card=self.card)


def bias_of(weight: Weight) -> Tensor | None:
    assert isinstance(weight, TritonWeight)
    return weight.bias
