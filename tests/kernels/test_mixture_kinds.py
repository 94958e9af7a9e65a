"""Mixtures beyond a softmax over all experts: what all tokens go through, and other ways to choose; against sums in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.cpu import backend, torch_ops
from kernels.cpu.native_ops import NativeOps
from kernels.layout import native_routes_bytes
from kernels.mixture import route
from kernels.ops import MLP, Mixture, Norm, Ops
from kernels.reference import make_ops as make_reference
from kernels.scores import Scores
from tests.kernels.native import instruction_sets
from tests.kernels.test_mixture import CPU, HIDDEN, INNER, off, pack, random_experts
from tests.models.test_bind import make_ops

NATIVE = instruction_sets() if backend.native() is not None else []
OWN = 40  # features of the shared MLP: no multiple of 16
SIGMOID = Scores(sigmoid=True, least=1e-20, scale=2.5)
GROUPS = SIGMOID._replace(groups=4, chosen_groups=2)
KINDS = {  # scores, correction, normalized
    "sigmoid": (Scores(sigmoid=True), False, False),
    "sigmoid, corrected": (SIGMOID, True, True),
    "groups": (GROUPS, True, True),
    "groups of a softmax": (Scores(groups=6, chosen_groups=3), False, False),
    "groups by their largest": (Scores(groups=6, chosen_groups=3, best=1, scale=4.0), False, False),
    "softmax, corrected": (Scores(least=1e-12), True, True),
    "little is little": (Scores(least=0.5), True, True),
    "scaled": (Scores(scale=0.3), False, True),
}


@pytest.fixture(params=["reference", "torch", *NATIVE])
def ops(request: pytest.FixtureRequest) -> Ops:
    plain = {"reference": make_reference, "torch": torch_ops.make_ops}
    return plain[request.param](CPU) if request.param in plain else make_ops(request.param)


def shares(scores: Scores, correction: Tensor | None, normalized: bool, active: int, logits: Tensor) -> dict[int, float]:
    """A token's experts, one after another; logits float64 [experts]."""
    found = (1 / (1 + (-logits).exp()) if scores.sigmoid else logits.exp() / logits.exp().sum()).tolist()
    keys = [score + (0 if correction is None else float(correction[e])) for e, score in enumerate(found)]
    size = len(keys) // scores.groups
    if scores.groups > 1:
        sums = [sum(sorted(keys[g * size : g * size + size])[-scores.best :]) for g in range(scores.groups)]
        groups = sorted(range(scores.groups), key=lambda g: -sums[g])[: scores.chosen_groups]
    else:
        groups = [0]
    best = sorted((e for e in range(len(keys)) if e // size in groups), key=lambda e: -keys[e])[:active]
    by = max(sum(found[e] for e in best), scores.least) if normalized else 1.0
    return {e: found[e] / by * scores.scale for e in best}


def gated(weights: tuple[Tensor, ...], row: Tensor) -> Tensor:
    gate, up, down = (weight.double() for weight in weights)
    return down @ (torch.nn.functional.silu(gate @ row) * (up @ row))


@pytest.mark.parametrize("kind", KINDS)
def test_ways_to_choose(ops: Ops, kind: str) -> None:
    """Shares, too, of all tokens; the correction is large enough to change most choices."""
    scores, corrected, normalized = KINDS[kind]
    count, active, norm = 24, 5, Norm(0.1 * torch.randn(HIDDEN), 1e-5, 1.0)
    router, experts = torch.randn(count, HIDDEN), random_experts(count)
    correction = torch.randn(count) / (4 if scores.sigmoid else 20) if corrected else None
    mixture = replace(pack(ops, router, experts, torch.float32, active, normalized), scores=scores, correction=correction)
    for rows in (1, 37):
        x = torch.randn(rows, HIDDEN)
        normed = torch.nn.functional.rms_norm(x.double(), (HIDDEN,), norm.weight.double() + 1, norm.eps)
        expected, plain = x.double(), 0
        for token, row in enumerate(normed):
            logits = router.double() @ row
            found = shares(scores, correction, normalized, active, logits)
            plain += set(found) == set(logits.topk(active).indices.tolist())
            for e, share in found.items():
                expected[token] += share * gated(experts[e], row)  # type: ignore[arg-type]
        assert off(ops.mix(x, mixture, norm=norm), expected, x) < 1e-5, rows
    assert (plain < 30) == (corrected or scores.groups > 1)


def test_the_first_of_equal_experts_and_groups(ops: Ops) -> None:
    scores = Scores(sigmoid=True, groups=3, chosen_groups=1)
    experts, x, norm = random_experts(6), torch.randn(3, HIDDEN), Norm(torch.ones(HIDDEN), 1e-5)
    for number in range(2, 6):
        experts[number][0].fill_(float("nan"))  # type: ignore[union-attr]
    mixture = replace(pack(ops, torch.zeros(6, HIDDEN), experts, torch.float32, 2, False), scores=scores)
    normed = torch.nn.functional.rms_norm(x.double(), (HIDDEN,), None, norm.eps)
    added = [0.5 * (gated(experts[0], row) + gated(experts[1], row)) for row in normed]  # type: ignore[arg-type]
    assert off(ops.mix(x, mixture, norm=norm), x + torch.stack(added), x) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [True, False])
def test_what_all_tokens_go_through(ops: Ops, dtype: torch.dtype, share: bool) -> None:
    """More tokens than the kernels take at a time, and with every kind of numbers; what comes in stays as it is."""
    rounding = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.004}[dtype]
    router = torch.zeros(3, HIDDEN)  # all go to the first
    given = [tuple(weight.to(dtype).float() for weight in one) for one in random_experts(3)]  # type: ignore[union-attr]
    own = tuple(weight.to(dtype).float() for weight in random_experts(1, inner=OWN)[0])  # type: ignore[union-attr]
    gate = (torch.randn(1, HIDDEN) / HIDDEN**0.5).to(dtype).float()
    norm = Norm((0.1 * torch.randn(HIDDEN)).to(dtype), 1e-5, 1.0)
    mlp = pack(ops, router, [own], dtype, 1).experts[0]  # type: ignore[list-item]
    mixture = pack(ops, router, given, dtype, 1)  # type: ignore[arg-type]
    mixture = replace(mixture, shared=mlp, shared_gate=ops.pack(gate, dtype=dtype) if share else None)
    x = torch.randn(1100, HIDDEN).to(dtype)
    kept = x.clone()
    found = ops.mix(x, mixture, norm=norm)
    assert torch.equal(x, kept) and found.dtype == dtype
    normed = torch.nn.functional.rms_norm(x.double(), (HIDDEN,), norm.weight.double() + 1, norm.eps)
    for rows in (slice(0, 9), slice(505, 520), slice(1090, 1100)):
        part = (gate.double() @ normed[rows].t())[0].sigmoid() if share else torch.ones(len(normed[rows]))
        sums = [gated(given[0], row) + one * gated(own, row) for row, one in zip(normed[rows], part, strict=True)]
        assert off(found[rows], x[rows].double() + torch.stack(sums), x[rows]) < rounding, rows


@pytest.mark.parametrize("apart", [False, True])
def test_beside_an_mlp(ops: Ops, apart: bool) -> None:
    """A norm of the router's own, gains of the experts, gates by gelu; and the sum is added to nothing."""
    count, active, dtype = 7, 3, torch.float32
    router, experts, gains = torch.randn(count, HIDDEN), random_experts(count), 1 + 0.5 * torch.randn(count)
    norm, own = Norm(1 + 0.1 * torch.randn(HIDDEN), 1e-5), torch.randn(HIDDEN)

    def packed(gate: Tensor, up: Tensor, down: Tensor) -> MLP:
        joined = (ops.pack(torch.cat([gate, up]), dtype=dtype, gated=True, gelu=True),)
        gate_up = (ops.pack(gate, dtype=dtype), ops.pack(up, dtype=dtype)) if apart else joined
        return MLP(gate_up, ops.pack(down, dtype=dtype))

    mlps = tuple(packed(*one) for one in experts)  # type: ignore[arg-type]
    mixture = replace(pack(ops, router, experts, dtype, active), experts=mlps, norm=own, gains=gains, gelu=True)
    for rows in (1, 37):
        x = torch.randn(rows, HIDDEN)
        kept, expected = x.clone(), torch.zeros(rows, HIDDEN, dtype=torch.float64)
        for token, row in enumerate(torch.nn.functional.rms_norm(x.double(), (HIDDEN,), None, norm.eps)):
            for e, share in shares(mixture.scores, None, True, active, router.double() @ (row * own)).items():
                gate, up, down = (weight.double() for weight in experts[e])  # type: ignore[union-attr]
                wide = row * norm.weight
                inner = torch.nn.functional.gelu(gate @ wide, approximate="tanh") * (up @ wide)
                expected[token] += float(gains[e]) * share * (down @ inner)
        assert off(ops.mix(x, mixture, norm=norm, alone=True), expected, 0 * x) < 1e-5, rows
        assert torch.equal(x, kept)
        assert off(ops.mix(x, mixture, norm=norm), expected + x, x) < 1e-5, rows


@pytest.mark.parametrize("isa", NATIVE[:1])
def test_parts_of_it_that_cannot_be_one_weight(isa: str) -> None:
    """Then the operators are called one by one."""
    ops, experts, own = make_ops(isa), random_experts(3), random_experts(1, inner=OWN)[0]
    router, norm, x = torch.randn(3, HIDDEN), Norm(torch.ones(HIDDEN), 1e-5), torch.randn(7, HIDDEN)
    gate, up, down = own
    whole = pack(ops, router, [own], torch.float32, 1).experts[0]
    apart = MLP((ops.pack(gate, dtype=torch.float32), ops.pack(up, dtype=torch.float32)), ops.pack(down, dtype=torch.float32))
    mixture = pack(ops, router, experts, torch.float32, 2)
    found, other = (ops.mix(x, replace(mixture, shared=one), norm=norm) for one in (whole, apart))
    assert (found - other).abs().max() < 1e-5 and (found - ops.mix(x, mixture, norm=norm)).abs().max() > 0.1


@pytest.mark.parametrize("isa", NATIVE)
def test_the_planned_memory_of_routes_is_enough(isa: str) -> None:
    """Beside what a mixture without such an MLP takes, whose own is larger than the others."""
    sizes, own = [], 4 * INNER
    for shared in (False, True):
        ops = NativeOps(isa, 1)
        mixture = pack(ops, torch.randn(3, HIDDEN), random_experts(3), torch.float32, 2)
        mlp = pack(ops, torch.randn(3, HIDDEN), random_experts(1, inner=own), torch.float32, 1).experts[0]
        gate = ops.pack(torch.randn(1, HIDDEN), dtype=torch.float32)
        mixture = replace(mixture, shared=mlp, shared_gate=gate) if shared else mixture
        ops.mix(torch.randn(600, HIDDEN), mixture, norm=Norm(torch.ones(HIDDEN), 1e-5))
        sizes.append(ops.machine.scratch_bytes)
    planned = [native_routes_bytes(600, INNER, 4, experts=3, active=2, shared=features) for features in (0, own)]
    products = 512 * 4 * (own + 128)  # rows of its second product, which are wider than all others
    assert sizes[0] < sizes[1] <= sizes[0] + planned[1] - planned[0] + products + (4 << 20)


def test_shares_as_the_mixture_says() -> None:
    mixture = Mixture(None, (), 2, True)  # type: ignore[arg-type]
    assert mixture.scores == Scores() and mixture.correction is None
    chosen, found = route(torch.tensor([[0.0, 200.0, 100.0, -200.0]]), 3, False)
    assert chosen.tolist() == [[1, 2, 0]] and found[0, 0] == 1.0
