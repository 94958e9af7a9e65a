"""AWQ (Lin et al. 2024): columns of weights that matter are scaled up before rounding, their inputs down; extremes are cut off.

A scale s leaves the product as it is, W x = (W diag(s)) (x / s), but rounding W diag(s) is kinder to columns with a large s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.algorithms.grid import Grid

RATIOS = 20  # of inputs' sizes to weights' that are tried
CUTS, DEEPEST = 10, 0.5  # extremes that are tried: from all of them down to this share
CHUNK, CACHED = 1 << 25, 1 << 20  # values of weights that are tried at a time; on a CPU, whose cache should hold them
Tie = Callable[[Tensor], Tensor]  # [K] -> [K]
Outputs = Callable[[Sequence[Tensor]], Tensor]  # of weights [N, K] in the type of the inputs


@dataclass(frozen=True)
class Scaling:
    scales: Tensor  # float32 [K]: what the weights' columns are multiplied with
    loss: float  # squared error of all outputs together, over the inputs given; of ``outputs`` where that is given
    before: float  # the same without scales


def search_scales(
    weights: Sequence[Tensor],
    x: Tensor,
    sizes: Tensor,
    grid: Grid,
    tie: Tie | None = None,
    outputs: Outputs | None = None,
) -> Scaling:
    """The scales that serve all ``weights`` (float32 [N, K], which read the same inputs) best.

    ``x`` [T, K]: some of the inputs, in the type in which outputs are compared; ``sizes`` float32 [K]: the mean magnitude of each
    over all that were seen. Tried are s = sizes^r / w^(1 - r), r = 0, 1/20, .., 19/20, where w is a column's mean magnitude in
    shares of its groups' largest, as AutoAWQ does. ``tie`` makes inputs share a scale that come from the same output.

    ``outputs``: what the linears are for, such as a whole block's outputs, whose squared error then counts in place of their own:
    what the block makes of an error decides how much that matters. It takes the weights in the type of ``x``.
    """
    error = _own_error(weights, x, grid) if outputs is None else _error_behind(weights, outputs, grid, x.dtype)
    columns = torch.stack([_relative(weight, grid) for weight in weights]).mean(0)
    before = error(None)
    best, scales = before, torch.ones_like(sizes)
    for step in range(RATIOS):
        ratio = step / RATIOS
        tried = (sizes**ratio / (columns ** (1 - ratio) + 1e-4)).clamp(min=1e-4)
        tried = tried / (tried.max() * tried.min()).sqrt()
        tried = torch.where(torch.isfinite(tried), tried, 1.0)
        tried = tried if tie is None else tie(tried)
        loss = error(tried)
        if loss < best:
            best, scales = loss, tried
    return Scaling(scales, best, before)


def _relative(weight: Tensor, grid: Grid) -> Tensor:
    """Mean over outputs of each column's magnitude, in shares of the largest of its group; [K]."""
    total = torch.zeros(weight.shape[1], device=weight.device)
    for rows in _rows(weight):
        parts = grid.parts(rows).abs()
        total += parts.div_(parts.amax(2, keepdim=True).add_(1e-6)).sum(0).flatten()[: weight.shape[1]]
    return total / weight.shape[0]


def _own_error(weights: Sequence[Tensor], x: Tensor, grid: Grid) -> Callable[[Tensor | None], float]:
    """By scales: the sum over outputs and inputs of (x (W - Q)^T)^2."""

    def error(scales: Tensor | None) -> float:
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        for weight in weights:
            for rows in _rows(weight):
                total += (x @ _tried(rows, scales, grid).sub_(rows).to(x.dtype).t()).float().square_().sum()
        return float(total)

    return error


def _error_behind(
    weights: Sequence[Tensor], outputs: Outputs, grid: Grid, dtype: torch.dtype
) -> Callable[[Tensor | None], float]:
    """By scales: the sum of the squared differences that rounding makes to ``outputs``."""
    exact = outputs([weight.to(dtype) for weight in weights]).float()

    def error(scales: Tensor | None) -> float:
        tried = [torch.cat([_tried(rows, scales, grid).to(dtype) for rows in _rows(weight)]) for weight in weights]
        return float((outputs(tried).float() - exact).square_().sum(dtype=torch.float64))

    return error


def _tried(rows: Tensor, scales: Tensor | None, grid: Grid) -> Tensor:
    """Rows of a weight as they would be read back."""
    return grid.rounded(rows) if scales is None else grid.rounded(rows * scales).div_(scales)


def _rows(weight: Tensor) -> Sequence[Tensor]:
    return weight.split(max(1, (CACHED if weight.device.type == "cpu" else CHUNK) // weight.shape[1]))


def search_cuts(weight: Tensor, x: Tensor, grid: Grid) -> Tensor:
    """By how much the extremes of groups are best shrunk before rounding: float32 [N, G], 1 for not at all.

    ``weight`` float32 [N, K]; ``x`` float32 [T, K]: some inputs. The squared error of a group's part of an output counts.
    """
    inputs = grid.parts(x).permute(1, 0, 2)  # [G, T, size]
    if inputs.shape[1] > inputs.shape[2]:  # as many rows as a group has columns say the same about sums of squares
        inputs = torch.linalg.qr(inputs, mode="r").R
    inputs, found = inputs.contiguous(), []
    for rows in _rows(weight):
        least = _group_errors(rows, inputs, grid, 1.0)
        best = torch.ones_like(least)
        for cut in range(1, CUTS):
            shrink = 1 - cut * (1 - DEEPEST) / CUTS
            errors = _group_errors(rows, inputs, grid, shrink)
            better = errors < least
            best = torch.where(better, shrink, best)
            least = torch.where(better, errors, least)
        found.append(best)
    return torch.cat(found)


def _group_errors(rows: Tensor, inputs: Tensor, grid: Grid, shrink: float) -> Tensor:
    """[n, G]: the squared error that each group brings into each output."""
    off = grid.parts(grid.rounded(rows, shrink).sub_(rows)).permute(1, 2, 0)  # [G, size, n]
    return torch.bmm(inputs, off).square_().sum(1).t()
