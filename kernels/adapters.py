"""What LoRA adapters add to products: y + x @ A.T @ B.T, for those rows of a step whose requests have one (Hu et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
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
    """Rows of a step that belong to requests with one adapter: all in one window of layout.ADAPTED_AT_ONCE rows."""

    weights: AdapterWeights
    rows: slice | Tensor  # int64, on the device
    window: int  # where that begins


class Additions:
    """What adapters add to the products of one layer in one step; false where they add nothing to any."""

    def __init__(self, matmul: MatMul, adapted: Sequence[Adapted], layer: int) -> None:
        self._matmul, self._each = matmul, [(one.weights.layers[layer], one.rows, one.window) for one in adapted]

    def __bool__(self) -> bool:
        return bool(self._each)

    def __call__(self, slot: str, y: Tensor, x: Tensor, norm: Norm | None = None, first: int = 0) -> Tensor:
        """The product y [T, N] of x [T, K], normalized where there is a norm, with what adapters add; y may be overwritten.

        ``first``: of whole windows, the row of the step with which y begins.
        """
        for layer, rows, window in self._each:
            pair: LowRank | None = getattr(layer, slot)
            if pair is not None and first <= window < first + len(y):
                own = slice(rows.start - first, rows.stop - first) if isinstance(rows, slice) else rows - first
                before, inner = y[own], self._matmul(x[own], pair.a, norm=norm)
                if y.dtype == x.dtype:
                    after = self._matmul(inner, pair.b, residual=before)
                else:
                    after = before.add_(self._matmul(inner, pair.b, out=torch.empty_like(before)))
                if isinstance(own, Tensor) or after.data_ptr() != before.data_ptr():
                    y[own] = after
        return y
