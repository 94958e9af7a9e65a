"""What GPTQ knows of a linear's inputs, H = X^T X, and the triangle that its sweep needs: both in one square of memory.

The upper factor U with H^-1 = U^T U is the inverse of the upper R with H = R R^T: R is a Cholesky factorization that begins at
the last column. So one of these and one inversion of a triangle, (2/3) K^3 operations, stand for H^-1 and its factor, (4/3) K^3.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.errors import InputError

log = logging.getLogger("appliance.quantize")

STRIP, TILE = 512, 256  # columns of H that are added to, and that are factorized, at a time
DAMPING = 0.01  # of the mean of H's diagonal, added to it
TRIES = 4  # each with ten times the damping of the one before


class Hessian:
    """X^T X of the inputs of a linear, gathered batch by batch: the upper half of float32 [K, K]. ``rows``: of how many."""

    def __init__(self, K: int, device: torch.device | str = "cpu") -> None:
        self.sum = torch.zeros(K, K, dtype=torch.float32, device=device)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Inputs [..., K] of any float type; sums are in float32."""
        flat = x.reshape(-1, x.shape[-1])
        wide = flat.float()
        with _exact_products(flat.dtype):
            for first in range(0, wide.shape[1], STRIP):
                last = first + STRIP
                self.sum[first:last, first:].addmm_(wide[:, first:last].t(), wide[:, first:])
        self.rows += flat.shape[0]

    def mean(self) -> Tensor:
        """H / rows, float32 [K, K]: of about the same size however many inputs there were."""
        return Hessian.taken(self._copy())

    def taken(self) -> Tensor:
        """The same in the memory of the sum, which must not be added to any more."""
        self.sum.div_(max(self.rows, 1))
        for first in range(0, self.sum.shape[0], STRIP):
            rows = self.sum[first : first + STRIP]
            self.sum[first:, first : first + STRIP] = rows[:, first:].t().clone()
            own = rows[:, first : first + STRIP]
            own.copy_(own.triu() + own.triu(1).t())
        return self.sum

    def damping(self, least: float = DAMPING) -> float:
        """The damping that these inputs ask for: as many directions as were not seen by each that was.

        With fewer inputs than columns the sweep would otherwise make use of directions in which nothing is known: on inputs that
        were not seen, outputs became up to 1.8 times worse than by rounding.
        """
        return max(least, self.sum.shape[0] / max(self.rows, 1) - 1)

    def _copy(self) -> Hessian:
        made = Hessian(0)
        made.sum, made.rows = self.sum.clone(), self.rows
        return made


@contextmanager
def _exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Let products of float32 that hold no more than ``dtype`` says take the units for it: they, too, add up in float32.

    On a CPU without such units this leaves MKL for oneDNN, which is twice as fast on AMD's.
    """
    settings = {torch.bfloat16: ("bf16", "tf32"), torch.float16: ("ieee", "tf32")}.get(dtype, ("ieee", "ieee"))
    places: tuple[Any, Any] = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = [place.fp32_precision for place in places]
    try:
        for place, setting in zip(places, settings, strict=True):
            place.fp32_precision = setting
        yield
    finally:
        for place, setting in zip(places, before, strict=True):
            place.fp32_precision = setting


@dataclass(frozen=True)
class Factor:
    """What the sweep needs of a Hessian. All weights that read the same inputs can use it."""

    upper: Tensor  # float32 [K, K]: U with H^-1 = U^T U, of the damped H; below its diagonal is something else
    perm: Tensor | None  # int64 [K]: the order of columns, where it is not their own
    dead: Tensor  # bool [K], in that order: inputs that were always 0
    damping: float  # that it took


def factored(hessian: Tensor, *, act_order: bool = False, damping: float = DAMPING, name: str = "a weight") -> Factor:
    """The factor of a mean of x x^T, float32 [K, K], whose memory it takes.

    ``act_order``: columns in order of falling diagonal. Raises InputError naming the weight where the inputs tell too little for
    H to be inverted even when damped, or hold numbers that are not finite.
    """
    H, diagonal = hessian, hessian.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise InputError(
            f"{name}: its inputs hold numbers that are not finite: the calibration text drives the model out of range"
        )
    perm = diagonal.argsort(descending=True, stable=True) if act_order else None
    if perm is not None:
        _permute(H, perm)
    dead = diagonal == 0  # nothing is lost by leaving them out
    diagonal[dead] = diagonal[~dead].mean() if bool((~dead).any()) else 1.0
    kept, mean = diagonal.clone(), diagonal.mean()
    for attempt in range(TRIES):
        if attempt:
            log.warning("%s: the Hessian cannot be inverted with a damping of %g; ten times that is tried", name, damping)
            damping *= 10
            _restore(H)
        diagonal.copy_(kept + damping * mean)
        if _factorize(H) and _invert(H):
            return Factor(H, perm, dead, damping)
    raise InputError(
        f"{name}: the Hessian of its inputs cannot be inverted, even with a damping of {damping:g}: give more calibration "
        "text (--calibration-samples), or a higher --damping"
    )


def _permute(H: Tensor, perm: Tensor) -> None:
    """Rows and columns, in place."""
    for rows in H.split(STRIP):
        rows.copy_(rows[:, perm])
    for columns in H.split(STRIP, 1):
        columns.copy_(columns[perm])


def _restore(H: Tensor) -> None:
    """The upper half is what the lower half is, which factorizing leaves as it was."""
    for first in range(0, H.shape[0], TILE):
        last = first + TILE
        H[first:last, last:] = H[last:, first:last].t()
        own = H[first:last, first:last]
        own.copy_(own.tril() + own.tril(-1).t())


def _tiles(K: int) -> list[tuple[int, int]]:
    """Beginnings and ends, the last columns first."""
    return [(first, min(first + TILE, K)) for first in reversed(range(0, K, TILE))]


def _factorize(H: Tensor) -> bool:
    """Replace the upper half by R with H = R R^T; False where there is none. The lower half stays."""
    for first, last in _tiles(H.shape[0]):
        after = H[first:last, last:]
        own = H[first:last, first:last]
        lower, failed = torch.linalg.cholesky_ex(torch.addmm(own, after, after.t(), alpha=-1).flip(0, 1))
        if int(failed):
            return False
        upper = lower.flip(0, 1)
        own.copy_(upper + own.tril(-1))
        above = H[:first, first:last].addmm_(H[:first, last:], after.t(), alpha=-1)
        above.copy_(torch.linalg.solve_triangular(upper.t(), above, upper=False, left=False))
    return True


def _invert(R: Tensor) -> bool:
    """Replace the upper triangle by its inverse; False where that is not finite. What is below the diagonal stays."""
    K, finite = R.shape[0], torch.ones((), dtype=torch.bool, device=R.device)
    for first, last in _tiles(K):
        own, after = R[first:last, first:last], R[first:last, last:]
        inverse = torch.linalg.solve_triangular(own.triu(), torch.eye(last - first, device=R.device), upper=True)
        own.copy_(inverse + own.tril(-1))
        row = -(inverse @ after)
        for begin in range(last, K, STRIP):  # row @ U[last:, last:], which is a triangle
            end = min(begin + STRIP, K)
            part = row[:, begin - last : end - last] @ R[begin:end, begin:end].triu()
            after[:, begin - last : end - last] = part.addmm_(row[:, : begin - last], R[last:begin, begin:end])
        finite &= torch.isfinite(after).all() & torch.isfinite(inverse).all()
    return bool(finite)
