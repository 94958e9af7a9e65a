"""The algorithms' insides: half a Hessian, its factor in the same square, groups of neighbours, few inputs; and all on a card."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.plain import PlainLayer
from models.rope import cos_sin_table
from models.spec import ModelSpec
from quant.algorithms.awq import search_cuts, search_scales
from quant.algorithms.gptq import Hessian, factored, gptq, sweep
from quant.algorithms.grid import Grid, Quantized, round_to_nearest
from tests.fake_card import CARD, Card, OnCard


def problem(N: int, K: int, rows: int) -> tuple[Tensor, Tensor]:
    """(weight, inputs): inputs that depend on each other."""
    torch.manual_seed(0)
    return torch.randn(N, K) * 0.05, torch.randn(rows, K) @ (torch.randn(K, K) * torch.logspace(0, -2, K))


def seen(x: Tensor) -> Hessian:
    hessian = Hessian(x.shape[1], x.device)
    hessian.add(x)
    return hessian


def error(found: Quantized, weight: Tensor, x: Tensor) -> float:
    return float((x @ (found.dequantize() - weight).t()).square().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_of_a_hessian_is_enough(dtype: torch.dtype) -> None:
    """Wider than a strip; and what narrow inputs say is added up as exactly as what wide ones say."""
    x = torch.randn(300, 1100, dtype=dtype)
    hessian = Hessian(1100)
    hessian.add(x[:100])
    hessian.add(x[100:].view(2, 100, 1100))
    expected = x.double().t() @ x.double() / 300
    copy, own = hessian.mean(), hessian.taken()
    assert own.data_ptr() == hessian.sum.data_ptr() and torch.equal(copy, own) and torch.equal(own, own.t())
    assert float((own - expected).norm() / expected.norm()) < 2e-6


@pytest.mark.parametrize("K", [40, 256, 700])
@pytest.mark.parametrize("act_order", [False, True])
def test_the_factor_is_that_of_the_inverse_in_the_same_memory(K: int, act_order: bool) -> None:
    _, x = problem(1, K, 3 * K)
    hessian = seen(x)
    exact = hessian.mean().double()
    found = factored(hessian.taken(), act_order=act_order)
    assert found.upper.data_ptr() == hessian.sum.data_ptr()
    if act_order:
        assert found.perm is not None and bool((exact.diagonal()[found.perm].diff() <= 0).all())
        exact = exact[found.perm][:, found.perm]
    exact.diagonal().add_(0.01 * exact.diagonal().mean())
    expected = torch.linalg.cholesky(torch.linalg.inv(exact), upper=True)
    assert float((found.upper.triu() - expected).norm() / expected.norm()) < 1e-5


def test_damping_that_is_raised_begins_with_the_same_hessian(caplog: pytest.LogCaptureFixture) -> None:
    """One that is not positive until the third try, and in whose first columns to be factorized nothing is wrong yet."""
    K = 600
    H = torch.eye(K)
    H[:2, :2] = torch.tensor([[1.0, 1.05], [1.05, 1.0]])
    with caplog.at_level(logging.WARNING, "appliance.quantize"):
        found = factored(H.clone(), damping=0.001, name="x.y")
    assert found.damping == pytest.approx(0.1) and [r.getMessage().split(":")[0] for r in caplog.records] == ["x.y", "x.y"]
    expected = factored(H.clone(), damping=found.damping)
    assert torch.equal(found.upper.triu(), expected.upper.triu())


def test_weights_that_read_the_same_share_a_factor() -> None:
    weight, x = problem(24, 200, 600)
    factor, grid = factored(seen(x).taken()), Grid(4, 40, True)
    for part in weight.split(12):
        alone = gptq(part, seen(x).mean(), grid)
        shared = sweep(part, factor, grid)
        assert torch.equal(shared.weight.codes, alone.weight.codes) and shared.loss == alone.loss


def plain_static(weight: Tensor, H: Tensor, grid: Grid, act_order: bool) -> Tensor:
    """GPTQ with static groups, a column after the other: float64."""
    size, K = grid.size(weight.shape[1]), weight.shape[1]
    made = [grid.fit(part.amin(1), part.amax(1)) for part in weight.split(size, 1)]
    order = H.diagonal().argsort(descending=True, stable=True).tolist() if act_order else list(range(K))
    W, H = weight.double()[:, order], H.double()[order][:, order]
    H.diagonal().add_(0.01 * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    out = torch.zeros_like(W)
    for j, column in enumerate(order):
        scales, zeros = made[column // size]
        rounded = (grid.codes(W[:, j].float(), scales, zeros) - zeros) * scales
        W[:, j + 1 :] -= torch.outer((W[:, j] - rounded) / U[j, j], U[j, j + 1 :])
        out[:, column] = rounded
    return out


@pytest.mark.parametrize(("K", "group"), [(96, 32), (300, 128), (160, -1)])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_static_groups_are_those_of_the_original_columns(K: int, group: int, act_order: bool, symmetric: bool) -> None:
    weight, x = problem(24, K, 4 * K)
    grid, H = Grid(4, group, symmetric), seen(x).mean()
    found = gptq(weight, H, grid, act_order=act_order, static_groups=True)
    assert found.weight.perm is None
    rounded = round_to_nearest(weight, grid)
    assert torch.equal(found.weight.scales, rounded.scales) and torch.equal(found.weight.zeros, rounded.zeros)
    expected = plain_static(weight, H, grid, act_order).float()
    assert (found.weight.dequantize() - expected).abs().gt(1e-6).float().mean() < 0.02
    off = [float((x @ (q - weight).t()).square().mean()) for q in (found.weight.dequantize(), expected)]
    assert off[0] == pytest.approx(off[1], rel=0.02) and off[0] < 0.7 * error(rounded, weight, x)


@pytest.mark.parametrize("rows", [4, 32, 128, 256])
def test_fewer_inputs_than_columns(rows: int) -> None:
    """What was seen is served better than by rounding, and what was not no worse, or hardly; with the usual damping it is."""
    weight, x = problem(64, 512, 4096)
    grid, hessian, unseen = Grid(4, 128, True), seen(x[:rows]), x[1000:]
    found = gptq(weight, hessian.mean(), grid, damping=hessian.damping()).weight
    rounded, usual = round_to_nearest(weight, grid), gptq(weight, hessian.mean(), grid).weight
    assert error(found, weight, x[:rows]) < 0.75 * error(rounded, weight, x[:rows])
    assert error(found, weight, unseen) < 1.05 * error(rounded, weight, unseen)
    assert error(found, weight, unseen) < error(usual, weight, unseen)
    assert seen(x).damping() == 0.01 and seen(x).damping(0.1) == 0.1


def algorithms(weight: Tensor, x: Tensor) -> list[Tensor]:
    """Everything once, on the device of its inputs."""
    found = []
    for grid, orders in ((Grid(4, 16, True), ((False, False), (True, True))), (Grid(3, -1, False), ((True, False),))):
        for order, static in orders:
            one = sweep(weight, factored(seen(x).taken(), act_order=order), grid, static_groups=static).weight
            found += [one.dequantize(), one.codes, one.scales]
        scaling = search_scales([weight, weight[:8]], x, x.abs().mean(0), grid, tie=lambda scales: scales.sqrt())
        cuts = search_cuts(weight * scaling.scales, x / scaling.scales, grid)
        one = round_to_nearest(weight * scaling.scales, grid, cuts)
        found += [one.dequantize(), one.zeros, cuts]
    return found


def test_algorithms_stay_on_the_card() -> None:
    weight, x = problem(16, 48, 150)
    x[:, 5] = 0.0
    expected = algorithms(weight, x)
    with Card(), torch.inference_mode():
        found = algorithms(weight.to(CARD), x.to(CARD))
        assert all(isinstance(one, OnCard) for one in found)
        assert all(torch.equal(ours.cpu(), one) for ours, one in zip(found, expected, strict=True))


def test_the_card_of_these_tests_refuses_what_a_card_refuses() -> None:
    with Card(), torch.inference_mode():
        there = torch.ones(3, device=CARD)
        assert float((there * 2 + torch.tensor(1.0)).sum()) == 9.0
        with pytest.raises(RuntimeError, match="some of its tensors are on the card"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match="some of its tensors are on the card"):
            torch.zeros(4, 3).addmm_(torch.ones(4, 1), there[None])


def layer(tmp_path: Path, compute: torch.dtype) -> PlainLayer:
    config = {
        "architectures": ["Qwen3ForCausalLM"], "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 1, "vocab_size": 8, "max_position_embeddings": 32,
        "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0,
    }  # fmt: skip
    spec = ModelSpec.from_config(config)
    torch.manual_seed(0)
    made = PlainLayer(spec, 0, cos_sin_table(spec.rope, 16), compute=compute)
    made.weights = {module.name: (torch.randn(module.N, module.K) / module.K**0.5).bfloat16() for module in spec.layer_modules()}
    small = ((name.removeprefix("model.layers.0.").removesuffix(".weight"), size) for name, size in spec.small_tensors())
    made.norms = {name: 1 + torch.randn(size) * 0.1 for name, size in small}
    return made


def test_a_layer_in_a_narrow_type_and_on_the_card(tmp_path: Path) -> None:
    hidden = torch.randn(2, 16, 32)
    wide, told = layer(tmp_path, torch.float32).forward(hidden), []
    narrow = layer(tmp_path, torch.bfloat16)
    found = narrow.forward(hidden, lambda name, x: told.append(x.dtype))
    assert found.dtype == torch.float32 and set(told) == {torch.bfloat16}
    assert 1e-5 < float((found - wide).norm() / wide.norm()) < 0.01
    with Card(), torch.inference_mode():
        there = narrow.to(CARD).forward(hidden.to(CARD))
        assert isinstance(there, OnCard) and torch.equal(there.cpu(), found)
