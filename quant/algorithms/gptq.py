"""GPTQ (Frantar et al. 2023): columns are rounded one after another, and what rounding changes is made good by those that follow.

Minimizes sum((X (W - Q)^T)^2) over the inputs X that were seen, which enter by H = X^T X alone.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.algorithms.grid import Grid, Quantized
from quant.errors import InputError

log = logging.getLogger("appliance.quantize")

BLOCK, SMALL = 128, 16  # columns whose effect on all others, and on the others of a block, is added up before it is carried over
DAMPING = 0.01  # of the mean of H's diagonal, added to it
TRIES = 4  # each with ten times the damping of the one before


class Hessian:
    """X^T X of the inputs of a linear, gathered batch by batch; ``rows`` is how many there were."""

    def __init__(self, K: int, device: torch.device | str = "cpu") -> None:
        self.sum = torch.zeros(K, K, dtype=torch.float32, device=device)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Inputs [..., K]."""
        flat = x.reshape(-1, x.shape[-1]).float()
        self.sum.addmm_(flat.t(), flat)
        self.rows += flat.shape[0]

    def mean(self) -> Tensor:
        """H / rows: of about the same size however many inputs there were."""
        return self.sum / max(self.rows, 1)


@dataclass(frozen=True)
class Found:
    weight: Quantized
    loss: float  # mean of the squared errors of an output, over inputs like those seen, the damping counted as such, too
    damping: float  # that it took


def gptq(
    weight: Tensor, hessian: Tensor, grid: Grid, *, act_order: bool = False, damping: float = DAMPING, name: str = "a weight"
) -> Found:
    """Quantize ``weight`` [N, K] for inputs with this mean of x x^T, float32 [K, K].

    ``act_order``: columns in order of falling diagonal, which makes ``perm`` (GPTQ's desc_act). Raises InputError naming the
    weight where the inputs tell too little for H to be inverted even when damped, or hold numbers that are not finite.
    """
    W = weight.float().clone()
    if not bool(torch.isfinite(hessian.diagonal()).all()):
        raise InputError(
            f"{name}: its inputs hold numbers that are not finite: the calibration text drives the model out of range"
        )
    perm = hessian.diagonal().argsort(descending=True, stable=True) if act_order else None
    H = hessian.clone() if perm is None else hessian[perm][:, perm]
    if perm is not None:
        W = W[:, perm]
    dead = H.diagonal() == 0  # inputs that were always 0: nothing is lost by leaving them out
    H.diagonal()[dead] = H.diagonal()[~dead].mean() if bool((~dead).any()) else 1.0
    W[:, dead] = 0.0
    inverse, used = _inverse_factor(H, damping, name)
    made, loss = _sweep(W, inverse, grid)
    return Found(replace(made, perm=perm), loss / weight.shape[0], used)


def _inverse_factor(H: Tensor, damping: float, name: str) -> tuple[Tensor, float]:
    """The upper Cholesky factor of H^-1, and the damping with which it exists."""
    mean = H.diagonal().mean().item()
    for _ in range(TRIES):
        damped = H.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed) and bool(torch.isfinite(upper).all()):
                return upper, damping
        log.warning("%s: the Hessian cannot be inverted with a damping of %g; ten times that is tried", name, damping)
        damping *= 10
    raise InputError(
        f"{name}: the Hessian of its inputs cannot be inverted, even with a damping of {damping / 10:g}: give more calibration "
        "text (--calibration-samples), or a higher --damping"
    )


def _sweep(W: Tensor, inverse: Tensor, grid: Grid) -> tuple[Quantized, float]:
    """Round the columns of ``W`` in their order; also the loss, summed over outputs. A group's scale is made when it is reached.

    Columns are rows here, so that each lies in one piece; what one changes is carried over at once within its small block, to
    the rest of the large block when that one ends, and to all others at the end of the large block.
    """
    columns, size = W.t().contiguous(), grid.size(W.shape[1])  # [K, N]
    K, N = columns.shape
    codes = torch.empty(K, N, dtype=torch.uint8)
    all_scales, all_zeros = [], []
    errors, loss = torch.empty(BLOCK, N), 0.0
    for begin in range(0, K, BLOCK):
        end = min(begin + BLOCK, K)
        for first in range(begin, end, SMALL):
            last = min(first + SMALL, end)
            for j in range(first, last):
                if j % size == 0:
                    carried = _carried(columns, inverse, errors, begin, first, j, min(j + size, K))
                    scales, zeros = grid.fit(carried.amin(0), carried.amax(0))
                    all_scales.append(scales)
                    all_zeros.append(zeros)
                column = columns[j]
                code = grid.codes(column, scales, zeros)
                codes[j] = code
                error = torch.sub(column, code.sub_(zeros).mul_(scales), out=errors[j - begin]).div_(inverse[j, j])
                columns[j + 1 : last].addr_(inverse[j, j + 1 : last], error, alpha=-1)
            done = slice(first - begin, last - begin)
            columns[last:end].addmm_(inverse[first:last, last:end].t(), errors[done], alpha=-1)
        columns[end:].addmm_(inverse[begin:end, end:].t(), errors[: end - begin], alpha=-1)
        loss += float(errors[: end - begin].square().sum(dtype=torch.float64))
    scales, zeros = torch.stack(all_scales), torch.stack(all_zeros)
    return Quantized(codes.t().contiguous(), scales.to(grid.scale_dtype), zeros.to(torch.uint8), grid), loss


def _carried(columns: Tensor, inverse: Tensor, errors: Tensor, begin: int, first: int, j: int, end: int) -> Tensor:
    """Columns j .. end, a group [.., N], with all that earlier columns change in them, whether it was carried over yet or not."""
    own, block = min(first + SMALL, columns.shape[0]), min(begin + BLOCK, columns.shape[0])
    now = columns[j:end].clone()
    if end > own:  # what this small block's columns before j change beyond it
        now[max(0, own - j) :].addmm_(inverse[first:j, max(own, j) : end].t(), errors[first - begin : j - begin], alpha=-1)
    if end > block:  # and what the small blocks before change beyond the large one
        now[max(0, block - j) :].addmm_(inverse[begin:first, max(block, j) : end].t(), errors[: first - begin], alpha=-1)
    return now
