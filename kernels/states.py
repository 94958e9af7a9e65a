"""What layers of the gated delta rule keep of a sequence, and what they have beside their projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from kernels.batch import PagedBatch


class StateCache(NamedTuple):
    """The states of one layer: of as many sequences as there are places, whatever their lengths. All float32."""

    conv: Tensor  # [places, kernel - 1, channels]: what the convolution saw of the last tokens, oldest first
    state: Tensor  # [places, value heads, key_dim, value_dim]


@dataclass(frozen=True)
class DeltaRule:
    """Parameters of one layer beside its projections, in float32."""

    key_heads: int
    conv: Tensor  # [kernel, channels]
    rate: Tensor  # [value heads]: exp(A_log)
    dt_bias: Tensor  # [value heads]
    norm: Tensor  # [value_dim]
    eps: float

    @property
    def value_heads(self) -> int:
        return self.rate.shape[0]

    @property
    def value_dim(self) -> int:
        return self.norm.shape[0]

    @property
    def key_dim(self) -> int:
        return (self.conv.shape[1] - self.value_heads * self.value_dim) // (2 * self.key_heads)

    @property
    def width(self) -> int:
        """Of what goes in: channels, and z."""
        return self.conv.shape[1] + self.value_heads * self.value_dim

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in (self.conv, self.rate, self.dt_bias, self.norm))


class Delta(Protocol):
    def __call__(self, x: Tensor, gates: Tensor, rule: DeltaRule, cache: StateCache, batch: PagedBatch) -> Tensor:
        """The gated delta rule over the rows of each sequence -> [T, value heads * value_dim] in x's dtype.

        x [T, rule.width]: queries, keys and values before the convolution, and z; gates [T, 2 * value heads]: b and a.
        Queries, keys and values go through the causal convolution and silu; q and k are divided by their lengths (the root of
        the sum of squares + 1e-6), q by the root of key_dim, too. Then for each value head, token by token, in float32:
        state *= exp(-rate * softplus(a + dt_bias)); state += outer(k, sigmoid(b) * (v - k @ state)); out = q @ state; and what
        is returned is out / sqrt(mean(out^2) + eps) * norm * silu(z).

        A sequence whose rows begin at position 0 begins with zeros, whatever is in its place (batch.states) of the cache; others
        go on from what is there. What comes after a sequence's last row is written there. Other places are left alone.
        """
