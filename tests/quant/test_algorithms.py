"""GPTQ and AWQ against what they promise: a smaller error of outputs than rounding has; and GPTQ's sweep against plain code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant.algorithms.awq import search_cuts, search_scales
from quant.algorithms.gptq import Hessian, gptq
from quant.algorithms.grid import Grid, Quantized, round_to_nearest
from quant.errors import InputError


def problem(N: int, K: int, rows: int, seed: int = 0, *, outliers: bool = False) -> tuple[Tensor, Tensor]:
    """(weight, inputs): inputs that depend on each other, some of them large if asked for."""
    torch.manual_seed(seed)
    x = torch.randn(rows, K) @ (torch.randn(K, K) * torch.logspace(0, -2, K))
    if outliers:
        x[:, ::29] *= 30
    return torch.randn(N, K) * 0.05, x


def error(found: Quantized, weight: Tensor, x: Tensor, scales: Tensor | float = 1.0) -> float:
    return float((x @ (found.dequantize() / scales - weight).t()).square().mean())


def plain_gptq(weight: Tensor, H: Tensor, grid: Grid) -> Tensor:
    """The published algorithm, a column after the other, nothing blocked: float64."""
    W, H = weight.double().clone(), H.double().clone()
    H.diagonal().add_(0.01 * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    out, size = torch.zeros_like(W), grid.size(W.shape[1])
    for j in range(W.shape[1]):
        if j % size == 0:
            scales, zeros = grid.fit(*(f(W[:, j : j + size], 1).values.float() for f in (torch.min, torch.max)))
        out[:, j] = (grid.codes(W[:, j].float(), scales, zeros) - zeros) * scales
        W[:, j + 1 :] -= torch.outer((W[:, j] - out[:, j]) / U[j, j], U[j, j + 1 :])
    return out


@pytest.mark.parametrize(("K", "group"), [(96, 32), (200, 40), (256, 128), (160, -1), (150, 64), (300, 200)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_sweep_is_that_of_the_paper(K: int, group: int, symmetric: bool) -> None:
    """Blocks only change the order of sums: a few codes at the border of two may differ."""
    weight, x = problem(24, K, 4 * K)
    hessian, grid = Hessian(K), Grid(4, group, symmetric)
    hessian.add(x[: 2 * K])
    hessian.add(x[2 * K :].view(2, K, K))
    found = gptq(weight, hessian.mean(), grid).weight.dequantize()
    expected = plain_gptq(weight, x.t() @ x / len(x), grid).float()
    assert (found - expected).abs().gt(1e-6).float().mean() < 0.02
    off = [float((x @ (q - weight).t()).square().mean()) for q in (found, expected)]
    assert off[0] == pytest.approx(off[1], rel=0.02)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_beats_rounding(bits: int, act_order: bool) -> None:
    weight, x = problem(64, 256, 1024)
    hessian, grid = Hessian(256), Grid(bits, 64, True)
    hessian.add(x)
    found = gptq(weight, hessian.mean(), grid, act_order=act_order)
    assert error(found.weight, weight, x) < 0.6 * error(round_to_nearest(weight, grid), weight, x)
    assert found.loss >= error(found.weight, weight, x) * 0.99  # the damping is counted, too
    assert (found.weight.perm is not None) == act_order


def test_inputs_that_were_never_there() -> None:
    weight, x = problem(16, 64, 300)
    x[:, 10:20] = 0.0
    hessian = Hessian(64)
    hessian.add(x)
    grid = Grid(4, 32, False)
    found = gptq(weight, hessian.mean(), grid, act_order=True).weight
    assert bool(torch.isfinite(found.dequantize()).all())
    assert error(found, weight, x) < 0.7 * error(round_to_nearest(weight, grid), weight, x)


def test_what_cannot_be_inverted_says_so() -> None:
    weight, _ = problem(8, 32, 64)
    with pytest.raises(InputError, match="layer 3: the Hessian of its inputs cannot be inverted, even with a damping of 1e-17"):
        gptq(weight, -torch.eye(32), Grid(4, 32, True), damping=1e-20, name="layer 3")
    with pytest.raises(InputError, match="layer 3: its inputs hold numbers that are not finite"):
        gptq(weight, torch.full((32, 32), float("nan")), Grid(4, 32, True), name="layer 3")
    few = Hessian(32)
    few.add(torch.randn(3, 32))  # of rank 3: damping makes it good
    assert gptq(weight, few.mean(), Grid(4, 32, True)).damping >= 0.01


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_beats_rounding(bits: int, symmetric: bool) -> None:
    weight, x = problem(64, 256, 512, outliers=True)
    grid = Grid(bits, 64, symmetric)
    plain = error(round_to_nearest(weight, grid), weight, x)
    found = search_scales([weight[:32], weight[32:]], x, x.abs().mean(0), grid)
    scaled = error(round_to_nearest(weight * found.scales, grid), weight, x, found.scales)
    assert found.loss < found.before and scaled == pytest.approx(found.loss / x.shape[0] / 64, rel=1e-3)
    assert found.before / x.shape[0] / 64 == pytest.approx(plain, rel=1e-3) and scaled < 0.7 * plain
    cuts = search_cuts(weight * found.scales, x / found.scales, grid)
    assert error(round_to_nearest(weight * found.scales, grid, cuts), weight, x, found.scales) < scaled
    assert float(cuts.min()) >= 0.5 and float(cuts.max()) <= 1.0


def test_scales_that_are_tied() -> None:
    weight, x = problem(32, 64, 256, outliers=True)

    def tie(scales: Tensor) -> Tensor:
        return scales.view(4, 16).mean(0).repeat(4)

    found = search_scales([weight], x, x.abs().mean(0), Grid(4, 16, False), tie).scales.view(4, 16)
    assert torch.equal(found, found[:1].expand(4, 16)) and float(found.std()) > 0


def test_scales_by_what_is_made_of_the_outputs() -> None:
    """Of two linears only one matters: the scales are those that serve it alone, and the other's errors do not count."""
    weight, x = problem(64, 128, 256, outliers=True)
    other, grid, sizes = torch.randint(-4, 4, (64, 128)).float(), Grid(3, 32, False), x.abs().mean(0)
    other[:, ::32], other[:, 1::32] = -4, 3  # on the grid as it is: any scale makes errors, and large ones
    whole = search_scales([weight, other], x, sizes, grid, outputs=lambda made: torch.cat([x @ one.t() for one in made], 1))
    own = search_scales([weight, other], x, sizes, grid)
    assert torch.equal(whole.scales, own.scales) and whole.loss == pytest.approx(own.loss, rel=1e-3)
    assert whole.before == pytest.approx(own.before, rel=1e-3)
    gated = search_scales([weight, other], x, sizes, grid, outputs=lambda made: x @ made[0].t())
    assert torch.equal(own.scales, torch.ones(128)) and not torch.equal(gated.scales, own.scales)

    def alone(scales: Tensor) -> float:
        return float((x @ (grid.rounded(weight * scales) / scales - weight).t()).square().sum())

    assert gated.loss == pytest.approx(alone(gated.scales), rel=1e-3) and gated.loss < 0.7 * alone(own.scales)
    assert gated.before == pytest.approx(alone(torch.ones(128)), rel=1e-3)


def test_cuts_are_the_best_of_those_tried() -> None:
    weight, x = problem(8, 64, 128)
    grid = Grid(4, 32, False)
    cuts, inputs = search_cuts(weight, x, grid), x.view(128, 2, 32)
    for tried in (1.0, 0.95, 0.75, 0.55):
        off = [(grid.rounded(weight, cut) - weight).view(8, 2, 32) for cut in (cuts, tried)]
        ours, theirs = (torch.einsum("tgk,ngk->tng", inputs, one).square().sum(0) for one in off)
        assert bool((ours <= theirs * 1.0001).all())
