"""What attention over latents (models/latent.py) does between the products that read the hidden state and its last one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.layout import LATENT_ROWS

if TYPE_CHECKING:
    from kernels.ops import Weight


@dataclass(frozen=True)
class Latents:
    """Weights of a layer beside those that every layer of attention has; R numbers in a latent."""

    norm: Tensor  # [R], of latents
    keys: Tensor  # [heads, R, nope], in the activations' dtype: it takes a head's query to the latents' space
    values: Tensor  # [heads, value, R]: it takes a mean of latents to the values'
    query_norm: Tensor | None = None  # [query rank]
    query: Weight | None = None  # [heads * query, query rank], each head's rotated features first; None: qkv has the queries

    @classmethod
    def of(cls, up: Tensor, nope: int, norm: Tensor, query_norm: Tensor | None = None, query: Weight | None = None) -> Latents:
        """``up`` [heads, nope + value, R] makes each head's key and value of a latent, as it is published."""
        keys, values = up[:, :nope].transpose(1, 2).contiguous(), up[:, nope:].contiguous()
        return cls(norm, keys, values, query_norm, query)

    @property
    def weights(self) -> tuple[Weight | Tensor, ...]:
        found = (self.keys, self.values)
        return found if self.query is None else (self.query, *found)

    @property
    def nbytes(self) -> int:
        small = (self.norm,) if self.query_norm is None else (self.norm, self.query_norm)
        return sum(one.nbytes for one in (*self.weights, *small))

    def absorbed(self, queries: Tensor, rotated: Tensor, latent: Tensor) -> Tensor:
        """Queries in the latents' space, and the key that all heads share: [T, (heads + 1) * (rope + R)], for ``rope_store``.

        ``queries`` [T, heads * (rope + nope)]; ``rotated`` [T, rope] and ``latent`` [T, R], normalized, are the key.
        """
        heads, rank, nope = self.keys.shape
        rope = rotated.shape[1]
        each = queries.unflatten(1, (heads, rope + nope))
        found = queries.new_empty(len(queries), heads + 1, rope + rank)
        found[:, :-1, :rope] = each[:, :, :rope]
        _by_head(each[:, :, rope:], self.keys, found[:, :-1, rope:])
        found[:, -1, :rope] = rotated
        found[:, -1, rope:] = latent
        return found.flatten(1)

    def results(self, found: Tensor) -> Tensor:
        """[T, heads * value] of what attention gave, [T, heads, rope + R]."""
        heads, value, rank = self.values.shape
        out = found.new_empty(len(found), heads, value)
        _by_head(found[:, :, -rank:], self.values, out)
        return out.flatten(1)


def _by_head(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Each head's x [T, heads, K] times its weight [heads, N, K] into out [T, heads, N]; few rows at a time, for the copies."""
    for rows, to in zip(x.split(LATENT_ROWS), out.split(LATENT_ROWS), strict=True):
        to.copy_(torch.bmm(rows.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1))
