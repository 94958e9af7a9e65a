"""GPTQ (Frantar et al. 2023): columns are rounded one after another, and what rounding changes is made good by those that follow.

Minimizes sum((X (W - Q)^T)^2) over the inputs X that were seen, which enter by H = X^T X alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.algorithms.grid import Grid, Quantized
from quant.algorithms.hessian import DAMPING, Factor, Hessian, factored

__all__ = ["DAMPING", "Factor", "Found", "Hessian", "factored", "gptq", "sweep"]

BLOCK, SMALL = 128, 16  # columns whose effect on all others, and on the others of a block, is added up before it is carried over


@dataclass(frozen=True)
class Found:
    weight: Quantized
    loss: float  # mean of the squared errors of an output, over inputs like those seen, the damping counted as such, too
    damping: float  # that it took


def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    act_order: bool = False,
    static_groups: bool = False,
    damping: float = DAMPING,
    name: str = "a weight",
) -> Found:
    """Quantize ``weight`` [N, K] for inputs with this mean of x x^T, float32 [K, K].

    ``act_order``: columns in order of falling diagonal, which makes ``perm`` (GPTQ's desc_act). Raises InputError naming the
    weight where the inputs tell too little for H to be inverted even when damped, or hold numbers that are not finite. Where
    several weights read the same inputs, ``factored`` and ``sweep`` do this with one factorization.
    """
    factor = factored(hessian.clone(), act_order=act_order, damping=damping, name=name)
    return sweep(weight, factor, grid, static_groups=static_groups)


def sweep(weight: Tensor, factor: Factor, grid: Grid, *, static_groups: bool = False) -> Found:
    """Quantize ``weight`` [N, K] of any float type, on whose device all is done, by the factor of its inputs' Hessian.

    Columns are taken in the factor's order. Groups are of columns that follow one another in it, and a group's scales are made
    when it is reached: ``perm`` says which it is. With ``static_groups`` they are of neighbours in the weight and are made before
    anything is changed (GPTQ's static_groups, llm-compressor's actorder "static"): there is no ``perm``.
    """
    columns = weight.t().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if factor.perm is not None:
        columns = columns[factor.perm]
    columns[factor.dead] = 0.0
    places = _Places(columns, factor.perm, grid, static_groups)
    loss = _sweep(columns, factor.upper, places)
    return Found(places.quantized(), loss / weight.shape[0], factor.damping)


class _Places:
    """Where codes go, and whose scales are used: the columns of a sweep are numbered in its order."""

    def __init__(self, columns: Tensor, perm: Tensor | None, grid: Grid, static: bool) -> None:
        """``columns`` [K, N]."""
        (K, N), device = columns.shape, columns.device
        self.grid, self.static, self.perm, self.size = grid, static, perm, grid.size(K)
        self.codes = torch.empty(K, N, dtype=torch.uint8, device=device)
        self.scales = torch.empty(-(-K // self.size), N, device=device)
        self.zeros = torch.empty_like(self.scales)
        self.groups = [j // self.size for j in (range(K) if perm is None or not static else perm.cpu().tolist())]
        if static:
            where = torch.arange(K, device=device) if perm is None else perm.argsort()
            for group, part in enumerate(where.split(self.size)):
                self.fit(group, columns[part])

    def begins(self, j: int) -> bool:
        """Whether a group begins with column j whose scales are not made yet."""
        return not self.static and j % self.size == 0

    def fit(self, group: int, columns: Tensor) -> None:
        self.scales[group], self.zeros[group] = self.grid.fit(columns.amin(0), columns.amax(0))

    def round(self, j: int, column: Tensor) -> Tensor:
        """Keep the codes [N] of column j; the values that they stand for."""
        scales, zeros = self.scales[self.groups[j]], self.zeros[self.groups[j]]
        code = self.grid.codes(column, scales, zeros)
        self.codes[j] = code
        return code.sub_(zeros).mul_(scales)

    def quantized(self) -> Quantized:
        codes, perm = self.codes, self.perm
        if self.static and perm is not None:
            codes, perm = torch.empty_like(self.codes), None
            codes[self.perm] = self.codes
        scales, zeros = self.scales.to(self.grid.scale_dtype), self.zeros.to(torch.uint8)
        return Quantized(codes.t().contiguous(), scales, zeros, self.grid, perm)


def _sweep(columns: Tensor, inverse: Tensor, places: _Places) -> float:
    """Round ``columns`` [K, N], which is used up, in their order; the loss, summed over outputs.

    Columns are rows here, so that each lies in one piece; what one changes is carried over at once within its small block, to
    the rest of the large block when that one ends, and to all others at the end of the large block.
    """
    K, N = columns.shape
    errors = torch.empty(BLOCK, N, device=columns.device)
    loss = torch.zeros((), dtype=torch.float64, device=columns.device)
    diagonal = inverse.diagonal().cpu().tolist()
    for begin in range(0, K, BLOCK):
        end = min(begin + BLOCK, K)
        for first in range(begin, end, SMALL):
            last = min(first + SMALL, end)
            for j in range(first, last):
                if places.begins(j):
                    places.fit(places.groups[j], _carried(columns, inverse, errors, begin, first, j, min(j + places.size, K)))
                error = torch.sub(columns[j], places.round(j, columns[j]), out=errors[j - begin]).div_(diagonal[j])
                columns[j + 1 : last].addr_(inverse[j, j + 1 : last], error, alpha=-1)
            done = slice(first - begin, last - begin)
            columns[last:end].addmm_(inverse[first:last, last:end].t(), errors[done], alpha=-1)
        columns[end:].addmm_(inverse[begin:end, end:].t(), errors[: end - begin], alpha=-1)
        loss += errors[: end - begin].square().sum(dtype=torch.float64)
    return float(loss)


def _carried(columns: Tensor, inverse: Tensor, errors: Tensor, begin: int, first: int, j: int, end: int) -> Tensor:
    """Columns j .. end, a group [.., N], with all that earlier columns change in them, whether it was carried over yet or not."""
    own, block = min(first + SMALL, columns.shape[0]), min(begin + BLOCK, columns.shape[0])
    now = columns[j:end].clone()
    if end > own:  # what this small block's columns before j change beyond it
        now[max(0, own - j) :].addmm_(inverse[first:j, max(own, j) : end].t(), errors[first - begin : j - begin], alpha=-1)
    if end > block:  # and what the small blocks before change beyond the large one
        now[max(0, block - j) :].addmm_(inverse[begin:first, max(block, j) : end].t(), errors[: first - begin], alpha=-1)
    return now
