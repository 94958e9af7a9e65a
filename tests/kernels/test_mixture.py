"""Mixtures of experts: the native kernel under every instruction set, and torch's operators, against sums in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.cpu import backend, torch_ops
from kernels.cpu.native_ops import NativeOps
from kernels.layout import native_mixture_bytes, native_routes_bytes, native_workspace_bytes
from kernels.mixture import route
from kernels.ops import MLP, Clamp, Mixture, Norm, Ops
from quant.tensor import QuantTensor
from tests.kernels.native import instruction_sets
from tests.kernels.weights import random_fp4, random_nvfp4, random_weight
from tests.models.test_bind import make_ops

if backend.native() is None:
    pytest.skip("the native extension is not built", allow_module_level=True)

HIDDEN, INNER = 96, 72
CPU = torch.device("cpu")
Weights = tuple[QuantTensor | Tensor, QuantTensor | Tensor, QuantTensor | Tensor]


@pytest.fixture(params=["torch", *instruction_sets()])
def ops(request: pytest.FixtureRequest) -> Ops:
    return torch_ops.make_ops(CPU) if request.param == "torch" else make_ops(request.param)


def random_experts(count: int, kind: str = "dense", hidden: int = HIDDEN, inner: int = INNER) -> list[Weights]:
    """Gate, up and down of each."""

    def one(N: int, K: int, seed: int) -> QuantTensor | Tensor:
        if kind == "dense":
            return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) / K**0.5
        options = {"bits": {"fp8": 0, "int8": 8}.get(kind, 4), "group_size": None if kind in ("fp8", "int8") else 24}
        return random_weight(N, K, **options, asymmetric=kind == "awq", act_order=kind == "order" and inner == N, seed=seed)  # type: ignore[arg-type]

    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    # gate and up have one order between them, as tools that see the same inputs give them
    return [tuple(one(N, K, 3 * e + (i == 2)) for i, (N, K) in enumerate(shapes)) for e in range(count)]  # type: ignore[misc]


def pack(
    ops: Ops | NativeOps, router: Tensor, experts: Sequence[Weights], dtype: torch.dtype, active: int, normalized: bool = True
) -> Mixture:
    def both(gate: QuantTensor | Tensor, up: QuantTensor | Tensor) -> QuantTensor | Tensor:
        if isinstance(gate, QuantTensor) and isinstance(up, QuantTensor):
            return QuantTensor.cat([gate, up])
        assert isinstance(gate, Tensor) and isinstance(up, Tensor)
        return torch.cat([gate, up])

    mlps = tuple(
        MLP(
            (ops.pack(both(gate, up), dtype=dtype, gated=True, activation="bf16"),),
            ops.pack(down, dtype=dtype, activation="bf16"),
        )
        for gate, up, down in experts
    )
    return Mixture(ops.pack(router, dtype=dtype), mlps, active, normalized)


def exact(x: Tensor, router: Tensor, experts: Sequence[Weights], active: int, normalized: bool, norm: Norm) -> Tensor:
    """In float64, token by token."""

    def dense(weight: QuantTensor | Tensor) -> Tensor:
        return (weight.dequantize() if isinstance(weight, QuantTensor) else weight).double()

    wide = x.double()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.double()
    out = wide.clone()
    for token, row in enumerate(normed):
        shares = (dense(router) @ row).softmax(0)
        chosen = shares.topk(active).indices.tolist()
        total = sum(shares[e] for e in chosen) if normalized else 1.0
        for e in chosen:
            gate, up, down = map(dense, experts[e])
            out[token] += shares[e] / total * (down @ (torch.nn.functional.silu(gate @ row) * (up @ row)))
    return out


def off(found: Tensor, expected: Tensor, x: Tensor) -> float:
    """Relative to what the experts add."""
    assert found.shape == expected.shape and bool(found.isfinite().all())
    return float((found.double() - expected).abs().max() / (expected - x.double()).abs().max())


@pytest.mark.parametrize("kind", ["dense", "awq", "order", "int8", "fp8"])
@pytest.mark.parametrize(("count", "active"), [(1, 1), (5, 2), (4, 4), (33, 6)])
def test_sums(ops: Ops, kind: str, count: int, active: int) -> None:
    assert ops.mix is not None
    router, experts = torch.randn(count, HIDDEN), random_experts(count, kind)
    norm = Norm(1 + 0.1 * torch.randn(HIDDEN), 1e-5)
    for rows, normalized in ((1, True), (2, False), (19, True)):
        x = torch.randn(rows, HIDDEN)
        mixture = pack(ops, router, experts, torch.float32, active, normalized)
        expected = exact(x, router, experts, active, normalized, norm)
        kept = x.clone()
        assert off(ops.mix(x, mixture, norm=norm), expected, x) < 3e-3, (rows, normalized)  # 16-bit rounding of expanded weights
        assert torch.equal(x, kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(ops: Ops, dtype: torch.dtype) -> None:
    """Routing must not hang on a rounding: the router is made to tell experts apart."""
    assert ops.mix is not None
    router, experts, norm = 4 * torch.randn(9, HIDDEN), random_experts(9), Norm(torch.ones(HIDDEN, dtype=dtype), 1e-5)
    router = router.to(dtype).float()
    experts = [tuple(weight.to(dtype).float() for weight in one) for one in experts]  # type: ignore[misc, union-attr]
    x = torch.randn(40, HIDDEN).to(dtype)
    expected = exact(x.float(), router, experts, 3, True, norm)
    logits = torch.nn.functional.rms_norm(x.float(), (HIDDEN,)) @ router.t()
    best = logits.sort(dim=-1, descending=True).values
    sure = best[:, 2] - best[:, 3] > 0.1
    assert int(sure.sum()) > 20
    found = ops.mix(x, pack(ops, router, experts, dtype, 3), norm=norm)
    assert found.dtype == dtype
    assert off(found[sure], expected[sure], x[sure]) < (0.03 if dtype == torch.bfloat16 else 0.004)


def test_more_tokens_than_a_block_that_all_choose_alike(ops: Ops) -> None:
    """Experts without a row are not touched: theirs are NaN. One expert has all rows, another few."""
    assert ops.mix is not None
    experts = random_experts(6)
    for gate, _, _ in (experts[0], experts[2], experts[5]):
        gate.fill_(float("nan"))  # type: ignore[union-attr]
    router, x = torch.zeros(6, HIDDEN), torch.randn(530, HIDDEN)
    x[:, 0] = 30.0
    router[1, 0] = router[3, 0] = 5.0
    x[7::100, 1], router[4, 1] = 900.0, 50.0
    norm = Norm(torch.ones(HIDDEN), 1e-5)
    expected = exact(x, router, experts, 2, True, norm)
    assert off(ops.mix(x, pack(ops, router, experts, torch.float32, 2), norm=norm), expected, x) < 1e-4


def test_of_equal_logits_the_first(ops: Ops) -> None:
    assert ops.mix is not None
    experts, x, norm = random_experts(5), torch.randn(3, HIDDEN), Norm(torch.ones(HIDDEN), 1e-5)
    found = ops.mix(x, pack(ops, torch.zeros(5, HIDDEN), experts, torch.float32, 2, False), norm=norm)
    two = [tuple(0.4 * weight if i == 2 else weight for i, weight in enumerate(one)) for one in experts[:2]]
    assert off(found, exact(x, torch.zeros(2, HIDDEN), two, 2, True, norm), x) < 1e-4  # type: ignore[arg-type]
    chosen, shares = route(torch.tensor([[0.0, 1.0, 1.0, 0.0]]), 3, True)
    assert chosen.tolist() == [[1, 2, 0]] and shares.sum() == pytest.approx(1.0)


def test_one_token_of_nonsense_harms_no_other(ops: Ops) -> None:
    assert ops.mix is not None
    router, experts, norm = torch.randn(5, HIDDEN), random_experts(5), Norm(torch.ones(HIDDEN), 1e-5)
    mixture, x = pack(ops, router, experts, torch.float32, 2), torch.randn(9, HIDDEN)
    broken = x.clone()
    broken[4] = float("nan")
    found, others = ops.mix(broken, mixture, norm=norm), [0, 1, 2, 3, 5, 6, 7, 8]
    assert bool(found[4].isnan().all())
    assert off(found[others], exact(x, router, experts, 2, True, norm)[others], x[others]) < 1e-4


def test_nothing(ops: Ops) -> None:
    assert ops.mix is not None
    mixture = pack(ops, torch.randn(3, HIDDEN), random_experts(3), torch.float32, 2)
    assert ops.mix(torch.empty(0, HIDDEN), mixture, norm=Norm(torch.ones(HIDDEN), 1e-5)).shape == (0, HIDDEN)


@pytest.mark.parametrize("kind", ["dense", "fp4", "nvfp4"])
def test_biases_and_gates_that_are_clamped(ops: Ops, kind: str) -> None:
    """As gpt-oss has them: a bias for the router and for each expert, shares of those chosen."""
    assert ops.mix is not None
    clamp, norm, count, active = Clamp(1.5, 1.702), Norm(1 + 0.1 * torch.randn(HIDDEN), 1e-5), 6, 3
    make, group = (random_nvfp4, 16) if kind == "nvfp4" else (random_fp4, 24)
    weights = [(make(2 * INNER, HIDDEN, seed=e), make(HIDDEN, INNER, group_size=group, seed=50 + e)) for e in range(count)]
    dense = [(both.dequantize(), down.dequantize()) for both, down in weights]
    biases = [(torch.randn(2 * INNER), torch.randn(HIDDEN)) for _ in range(count)]
    router, router_bias = torch.randn(count, HIDDEN), 3 * torch.randn(count)
    options = {"dtype": torch.float32, "activation": "bf16"}
    experts = tuple(
        MLP((ops.pack(both, bias=b, gated=True, clamp=clamp, **options),), ops.pack(down, bias=c, **options))
        for (both, down), (b, c) in zip(dense if kind == "dense" else weights, biases, strict=True)
    )
    mixture = Mixture(ops.pack(router, bias=router_bias, **options), experts, active, True)
    for rows in (1, 2, 40):
        x = torch.randn(rows, HIDDEN)
        normed = torch.nn.functional.rms_norm(x.double(), (HIDDEN,), norm.weight.double(), norm.eps)
        expected = x.double()
        for token, row in enumerate(normed):
            best = (router.double() @ row + router_bias).topk(active)
            for e, share in zip(best.indices.tolist(), best.values.softmax(0), strict=True):
                gate, up = (dense[e][0].double() @ row + biases[e][0]).chunk(2)
                gate, up = gate.clamp(max=clamp.limit), up.clamp(-clamp.limit, clamp.limit)
                inner = gate * torch.sigmoid(clamp.slope * gate) * (up + 1)
                expected[token] += share * (dense[e][1].double() @ inner + biases[e][1])
        assert off(ops.mix(x, mixture, norm=norm), expected, x) < 1e-5, rows


@pytest.mark.parametrize("isa", instruction_sets())
def test_the_order_of_additions_is_that_of_experts(isa: str) -> None:
    """With any number of threads, and of tokens beside it up to the size of a tile, a token's sum has the same bits."""
    router, experts, norm = torch.randn(9, HIDDEN), random_experts(9, "awq"), Norm(torch.ones(HIDDEN), 1e-5)
    x, found = torch.randn(5, HIDDEN), []
    for threads in (1, 2, 3, 16):
        ops = make_ops(isa, threads)
        assert ops.mix is not None
        found.append(ops.mix(x, pack(ops, router, experts, torch.float32, 3), norm=norm))
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("isa", instruction_sets())
def test_parts_that_cannot_be_one_weight(isa: str) -> None:
    """Gate and up of one expert are stored differently: then the operators are called one by one."""
    ops = make_ops(isa)
    assert ops.mix is not None
    router, experts, norm = torch.randn(3, HIDDEN), random_experts(3), Norm(torch.ones(HIDDEN), 1e-5)
    whole = pack(ops, router, experts, torch.float32, 2)
    gate, up, _ = experts[1]
    apart = MLP((ops.pack(gate, dtype=torch.float32), ops.pack(up, dtype=torch.float32)), whole.experts[1].down)
    x, mixture = torch.randn(7, HIDDEN), Mixture(whole.router, (whole.experts[0], apart, whole.experts[2]), 2, True)
    assert off(ops.mix(x, mixture, norm=norm), exact(x, router, experts, 2, True, norm), x) < 1e-5


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_planned_workspace_is_enough(isa: str, dtype: torch.dtype) -> None:
    """As in test_layout.py: scratch memory only grows. 40 experts, of which 600 tokens choose all there are, evenly."""
    ops, count, active = NativeOps(isa, 1), 40, 6
    experts, router = random_experts(count, "awq"), torch.randn(count, HIDDEN)
    mixture, norm = pack(ops, router, experts, dtype, active), Norm(torch.ones(HIDDEN, dtype=dtype), 1e-5)
    for rows in (1, 30, 600):
        ops.mix(torch.randn(rows, HIDDEN).to(dtype), mixture, norm=norm)
        shapes = [(HIDDEN, 24, False), (INNER, 24, False), (HIDDEN, HIDDEN, False)]
        parts = [native_workspace_bytes(rows, K, group, rounded=rounded) for K, group, rounded in shapes]
        mixed = [
            native_mixture_bytes(rows, K, group, rounded=rounded, experts=count, active=active)
            for K, group, rounded in shapes[:2]
        ]
        routes = native_routes_bytes(rows, INNER, dtype.itemsize, experts=count, active=active)
        planned = max(*mixed, *(shared for shared, _ in parts)) + routes + max(thread for _, thread in parts)
        assert 0 < ops.machine.scratch_bytes <= planned, rows
        if rows > 30 and dtype == torch.float32:  # pairs of bfloat16 take half of a row
            assert ops.machine.scratch_bytes > planned / 3  # rows of 96 inputs are planned as of 256


def test_the_reference_has_float32_sums() -> None:
    ops = reference.make_ops(CPU)
    assert ops.mix is not None
    router, experts, norm = torch.randn(5, HIDDEN), random_experts(5), Norm(torch.rand(HIDDEN), 1e-5)
    x = torch.randn(11, HIDDEN)
    expected = exact(x, router, experts, 3, False, norm)
    assert off(ops.mix(x, pack(ops, router, experts, torch.float32, 3, False), norm=norm), expected, x) < 1e-5
