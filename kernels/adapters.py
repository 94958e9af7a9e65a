"""What LoRA adapters add to products: y + x @ A.T @ B.T, for those rows of a step whose requests have one (Hu et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from kernels.parts import Norm, Weight

if TYPE_CHECKING:
    from kernels.ops import MatMul


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to one product, or to all that are made of the same rows at once."""

    a: Weight  # [R, K]
    b: Weight  # [N, R]; the factor by which the adapter counts is in it

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes


@dataclass(frozen=True)
class AdapterLayer:
    """Of one decoder layer, by the product that it belongs to; None: nothing is added there."""

    qkv: LowRank | None = None
    o: LowRank | None = None
    gate_up: LowRank | None = None
    down: LowRank | None = None

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in (self.qkv, self.o, self.gate_up, self.down) if one is not None)


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    layers: tuple[AdapterLayer, ...]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)


@dataclass(frozen=True)
class Adapted:
    """The rows of a step that belong to requests with one adapter, at most layout.ADAPTED_AT_ONCE of them."""

    weights: AdapterWeights
    rows: slice | Tensor  # int64, on the device


class Additions:
    """What adapters add to the products of one layer in one step."""

    def __init__(self, matmul: MatMul, adapted: Sequence[Adapted], layer: int) -> None:
        self._matmul, self._each = matmul, [(one.weights.layers[layer], one.rows) for one in adapted]

    def __call__(self, slot: str, y: Tensor, x: Tensor, norm: Norm | None = None) -> Tensor:
        """The product y [T, N] of x [T, K], normalized where there is a norm, with what adapters add; y may be overwritten."""
        for layer, rows in self._each:
            pair: LowRank | None = getattr(layer, slot)
            if pair is not None:
                before = y[rows]
                after = self._matmul(self._matmul(x[rows], pair.a, norm=norm), pair.b, residual=before)
                if isinstance(rows, Tensor) or after.data_ptr() != before.data_ptr():
                    y[rows] = after
        return y
