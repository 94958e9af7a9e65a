"""Mixtures of experts on a card: routing to the letter, sums against the reference's, in every format, however tokens choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from kernels import layout, reference
from kernels.mixture import route as plain_route
from kernels.ops import MLP, Mixture, Norm, Ops
from kernels.scores import Scores
from quant.tensor import QuantTensor
from tests.kernels.triton.conftest import DEVICE
from tests.kernels.triton.tensors import poison  # noqa: F401
from tests.kernels.weights import random_weight

from kernels.triton import experts, routing  # isort: skip  (after the conftest has chosen the interpreter)
from kernels.triton.matmul import Card  # isort: skip
from kernels.triton.norm import add_rms_norm  # isort: skip
from kernels.triton.ops import make_ops  # isort: skip
from kernels.tune import Launch, choose_experts  # isort: skip

HIDDEN = 256
LIMIT = {torch.float16: 4e-3, torch.bfloat16: 6e-2 if DEVICE == "cpu" else 3e-2}  # the interpreter cuts bfloat16 off
FORMATS = {  # bits (0: FP8), group, zero points, intermediate size
    "dense": (16, None, False, 72),
    "awq, groups of 128": (4, 128, True, 256),
    "groups of 64": (4, 64, False, 192),
    "gptq, groups of 32": (4, 32, True, 96),
    "one group": (4, None, True, 72),
    "bytes": (8, None, False, 96),
    "bytes, scales in float32": (8, None, False, 96),  # as quant.rows makes them
    "bytes, groups of 32": (8, 32, True, 64),
    "fp8": (0, 128, False, 256),
    "groups that fit no tile": (4, 48, True, 96),
}
Weights = tuple[QuantTensor | Tensor, QuantTensor | Tensor]


def random_experts(count: int, name: str, dtype: torch.dtype) -> list[Weights]:
    """[gate; up] and down of each, whose sums are about 1."""
    bits, group, asymmetric, inner = FORMATS[name]

    def one(N: int, K: int) -> QuantTensor | Tensor:
        if bits == 16:
            return (torch.randn(N, K) / K**0.5).to(dtype)
        size = min(group or K, K)
        found = random_weight(N, K, bits=bits, group_size=size, asymmetric=asymmetric, seed=int(torch.randint(1 << 30, ())))
        scales = found.scales.float() if name.endswith("float32") else found.scales
        return replace(found, scales=scales * (20 * K**-0.5 * {4: 1, 8: 1 / 16, 0: 0.1}[bits]))

    return [(one(2 * inner, HIDDEN), one(HIDDEN, inner)) for _ in range(count)]


def mixture_of(ops: Ops, router: Tensor, given: Sequence[Weights], dtype: torch.dtype, active: int, normalized: bool) -> Mixture:
    mlps = [
        MLP((ops.pack(gate_up, dtype=dtype, gated=True, activation="bf16"),), ops.pack(down, dtype=dtype, activation="bf16"))
        for gate_up, down in given
    ]
    joined = tuple(mlps) if ops.join_experts is None else ops.join_experts(iter(mlps), len(mlps))
    return Mixture(ops.pack(router, dtype=dtype), joined, active, normalized)


def both(
    x: Tensor, router: Tensor, given: Sequence[Weights], active: int, normalized: bool = True, card: Card | None = None
) -> tuple[Tensor, Tensor]:
    """(ours, the reference's) of x [T, HIDDEN]."""
    dtype, gain = x.dtype, (1 + 0.1 * torch.randn(HIDDEN)).to(x.dtype)
    ours, plain = make_ops(torch.device(DEVICE)), reference.make_ops(torch.device("cpu"))
    theirs = plain.mix(x, mixture_of(plain, router, given, dtype, active, normalized), norm=Norm(gain, 1e-5))
    kept, mine = x.to(DEVICE, copy=True), mixture_of(ours, router, given, dtype, active, normalized)
    found = experts.mix(kept, mine, norm=Norm(gain.to(DEVICE), 1e-5), card=card or Card(1, 80))
    assert torch.equal(kept.cpu().nan_to_num(9), x.nan_to_num(9)) and found.dtype == dtype
    return found.float().cpu(), theirs.float()


def telling(count: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(router, x) such that no token hesitates between its last expert and the next: one of ``count`` features decides."""
    router = torch.zeros(count, HIDDEN)
    router[:, :count] = 4 * torch.eye(count)
    x = torch.randn(tokens, HIDDEN)
    x[:, :count] = torch.stack([torch.randperm(count) for _ in range(tokens)]) / count
    return router.to(dtype), x.to(dtype)


def close(found: Tensor, expected: Tensor, x: Tensor, dtype: torch.dtype) -> None:
    assert found.shape == expected.shape and bool(found.isfinite().all())
    off = (found - expected).abs().max() / (expected - x.float()).abs().max()
    assert off < LIMIT[dtype], float(off)


CASES = [(name, torch.float16) for name in FORMATS] + [("gptq, groups of 32", torch.bfloat16), ("dense", torch.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_every_format(name: str, dtype: torch.dtype) -> None:
    router, x = telling(3, 3, dtype)
    found, expected = both(x, router, random_experts(3, name, dtype), 2, normalized=name != "bytes")
    close(found, expected, x, dtype)


@pytest.mark.parametrize(("tokens", "count", "active", "card"), [(1, 7, 3, 200), (17, 5, 2, 1), (3, 4, 4, 1), (2, 1, 1, 200)])
def test_however_many(tokens: int, count: int, active: int, card: int) -> None:
    """On a card that is filled by one program, and on one that narrower tiles fill."""
    router, x = telling(count, tokens, torch.float16)
    found, expected = both(x, router, random_experts(count, "dense", torch.float16), active, card=Card(card, 80))
    close(found, expected, x, torch.float16)


def test_experts_that_nobody_or_everybody_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    """All 23 tokens go to one; another has one of them; weights of the rest are NaN and not touched. Blocks are several."""
    monkeypatch.setattr(experts, "choose_experts", lambda **shape: Launch(16, 128, 1 if shape["gated"] else 2, 4, 2))
    dtype, given = torch.float16, random_experts(5, "dense", torch.float16)
    for number in (0, 2):
        given[number][0].fill_(float("nan"))
    router, x = torch.zeros(5, HIDDEN, dtype=dtype), torch.randn(23, HIDDEN).to(dtype)
    x[:, :2], router[3, 0], router[1, 0] = 8.0, 1.0, 0.5
    x[7, 1], router[4, 1] = 64.0, 4.0
    found, expected = both(x, router, given, 2, False)
    close(found, expected, x, dtype)


def test_a_tile_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "choose_experts", lambda **shape: Launch(64, 128, 1, 4, 2))
    router, x = telling(2, 19, torch.float16)
    found, expected = both(x, router, random_experts(2, "one group", torch.float16), 1)
    close(found, expected, x, torch.float16)


def test_one_token_of_nonsense_harms_no_other() -> None:
    router, x = telling(5, 4, torch.float16)
    given = random_experts(5, "dense", torch.float16)
    x[2] = float("nan")
    found, expected = both(x, router, given, 2)
    others = [0, 1, 3]
    assert bool(found[2].isnan().all())
    close(found[others], expected[others], x[others], torch.float16)


@pytest.mark.parametrize(("tokens", "count", "active", "rows"), [(1, 130, 8, 8), (3, 128, 8, 8), (9, 7, 7, 16), (40, 5, 2, 8)])
def test_routes(tokens: int, count: int, active: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts and shares are the reference's, ties by number; blocks have every pair once, each of its expert; room is left."""
    monkeypatch.setattr(routing, "LOOK", 32 * 16)
    monkeypatch.setattr(routing, "WIDE", 32)
    parts = torch.randn(3, tokens, count).round(decimals=1)  # equal ones are common
    parts[:, :, 0] += 9.0 * (tokens == 3)
    chosen, shares = plain_route(((0 + parts[0]) + parts[1]) + parts[2], active, tokens % 2 == 1)
    found = routing.route(parts.to(DEVICE), active, tokens % 2 == 1, rows)
    chosen, at = chosen.sort(dim=1)
    torch.testing.assert_close(found.shares.cpu(), shares.gather(1, at), rtol=1e-5, atol=1e-7)
    order, blocks = found.order.cpu(), found.blocks.cpu()
    assert len(blocks) == layout.triton_expert_blocks(tokens, count, active, rows)
    assert order.sort().values.equal(torch.arange(tokens * active, dtype=torch.int32))
    used = blocks[blocks[:, 2] > 0]
    assert int(used[:, 2].sum()) == tokens * active and int(used[:, 2].max()) <= rows
    for expert, first, size in used.tolist():
        pairs = order[first : first + size].long()
        assert bool((chosen.view(-1)[pairs] == expert).all()) and bool((pairs.diff() > 0).all())
    firsts = used[:, 1].sort().values
    assert torch.equal(firsts, torch.cumsum(used[used[:, 1].argsort(), 2], 0).int() - used[used[:, 1].argsort(), 2])


@pytest.mark.parametrize(
    ("scores", "corrected", "normalized"),
    [
        (Scores(sigmoid=True), False, False),
        (Scores(sigmoid=True, least=1e-20, scale=2.5), True, True),
        (Scores(least=1e-12), True, True),
        (Scores(least=0.5, scale=0.3), True, True),
        (Scores(scale=3.0), True, False),
    ],
)
@pytest.mark.parametrize("tokens", [1, 6])
def test_other_ways_to_choose(scores: Scores, corrected: bool, normalized: bool, tokens: int) -> None:
    logits, correction = torch.randn(1, tokens, 20), torch.randn(20) if corrected else None
    chosen, shares = plain_route(logits[0], 4, normalized, scores, correction)
    there = None if correction is None else correction.to(DEVICE)
    found = routing.route(logits.to(DEVICE), 4, normalized, 8, scores, there)
    chosen, at = chosen.sort(dim=1)
    torch.testing.assert_close(found.shares.cpu(), shares.gather(1, at), rtol=1e-5, atol=1e-7)
    blocks = found.blocks.cpu()[found.blocks.cpu()[:, 2] > 0]
    assert sorted(e for e, _, size in blocks.tolist() for _ in range(size)) == sorted(chosen.flatten().tolist())


def test_experts_in_groups() -> None:
    with pytest.raises(ValueError, match="groups"):
        routing.route(torch.zeros(1, 2, 8), 2, True, 8, Scores(sigmoid=True, groups=2))


@pytest.mark.parametrize(("tokens", "inputs"), [(1, 256), (5, 200), (70, 72)])
def test_logits_are_not_rounded(tokens: int, inputs: int) -> None:
    x, router = torch.randn(tokens, inputs).half(), torch.randn(19, inputs).half()
    found = routing.logits(x.to(DEVICE), router.to(DEVICE)).sum(0).cpu()
    torch.testing.assert_close(found, x.float() @ router.float().t(), rtol=1e-5, atol=1e-4)


def test_a_quantized_router() -> None:
    """And in a model bound as a whole the norm behind adds the parts, to the same bits."""
    ours, plain = make_ops(torch.device(DEVICE)), reference.make_ops(torch.device("cpu"))
    given, router = random_experts(6, "dense", torch.float16), random_weight(6, HIDDEN, group_size=64)
    x, norm = torch.randn(2, HIDDEN).half(), Norm(torch.ones(HIDDEN).half(), 1e-5)
    expected = plain.mix(x, mixture_of(plain, router, given, torch.float16, 2, True), norm=norm)  # type: ignore[arg-type]
    mixture = mixture_of(ours, router, given, torch.float16, 2, True)  # type: ignore[arg-type]
    gain, x_there = norm.weight.to(DEVICE), x.to(DEVICE)
    found = ours.mix(x_there, mixture, norm=Norm(gain, norm.eps))
    parts = experts.mixed_parts(ours.rms_norm(x_there, gain, eps=norm.eps), mixture)
    assert torch.equal(add_rms_norm(parts, x_there, gain, eps=norm.eps)[1], found)
    close(found.float().cpu(), expected.float(), x, torch.float16)


def with_shared(ops: Ops, mixture: Mixture, own: Weights, gate: Tensor | None, dtype: torch.dtype) -> Mixture:
    gate_up, down = own
    mlp = MLP((ops.pack(gate_up, dtype=dtype, gated=True),), ops.pack(down, dtype=dtype))
    return replace(mixture, shared=mlp, shared_gate=None if gate is None else ops.pack(gate, dtype=dtype))


@pytest.mark.parametrize(("name", "share"), [("dense", True), ("awq, groups of 128", True), ("bytes", False)])
def test_what_all_tokens_go_through(name: str, share: bool) -> None:
    """Of other features than the experts, and with a norm that adds 1 to its weight."""
    dtype, (router, x) = torch.float16, telling(3, 5, torch.float16)
    given, own = random_experts(3, "dense", dtype), random_experts(1, name, dtype)[0]
    gate, gain, found = (0.1 * torch.randn(1, HIDDEN)).to(dtype) if share else None, 0.1 * torch.randn(HIDDEN), []
    for ops, device in ((make_ops(torch.device(DEVICE)), DEVICE), (reference.make_ops(torch.device("cpu")), "cpu")):
        mixture = with_shared(ops, mixture_of(ops, router, given, dtype, 2, True), own, gate, dtype)
        found.append(ops.mix(x.to(device), mixture, norm=Norm(gain.to(dtype).to(device), 1e-5, 1.0)).float().cpu())
    close(found[0], found[1], x, dtype)


@pytest.mark.parametrize("tokens", [1, 5])
def test_beside_an_mlp(tokens: int) -> None:
    """A norm of the router's own, gains of the experts, gates by gelu; and the sum is added to nothing."""
    dtype, (router, x) = torch.float16, telling(3, tokens, torch.float16)
    given, gain, gains = random_experts(3, "awq, groups of 128", dtype), (1 + 0.1 * torch.randn(HIDDEN)).to(dtype), torch.rand(3)
    own, found = (0.5 + torch.rand(HIDDEN)).to(dtype), []
    for ops, device in ((make_ops(torch.device(DEVICE)), DEVICE), (reference.make_ops(torch.device("cpu")), "cpu")):
        pack = partial(ops.pack, dtype=dtype, activation="bf16")
        mlps = [MLP((pack(gate_up, gated=True, gelu=True),), pack(down)) for gate_up, down in given]
        joined = tuple(mlps) if ops.join_experts is None else ops.join_experts(iter(mlps), len(mlps))
        plain = mixture_of(ops, router, given, dtype, 2, True)
        mixture = replace(plain, experts=joined, norm=own.to(device), gains=gains.to(device), gelu=True)
        found.append(ops.mix(x.to(device), mixture, norm=Norm(gain.to(device), 1e-5), alone=True).float().cpu())
    close(found[0], found[1], 0 * x, dtype)


@pytest.mark.parametrize("shared", [False, True])
def test_the_planned_workspace_is_enough(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a mixture takes, if none of it were given back before the end."""
    ops, dtype, count, active = make_ops(torch.device(DEVICE)), torch.float16, 5, 3
    given, taken, empty = random_experts(count, "dense", dtype), [0], torch.empty
    mixture, own = mixture_of(ops, torch.randn(count, HIDDEN), given, dtype, active, True), 0
    if shared:
        mixture, own = with_shared(ops, mixture, random_experts(1, "bytes", dtype)[0], torch.randn(1, HIDDEN), dtype), 96

    def counted(*args: object, **options: object) -> Tensor:
        made: Tensor = empty(*args, **options)  # type: ignore[call-overload]
        taken[0] += made.nbytes
        return made

    monkeypatch.setattr(torch, "empty", counted)
    for tokens in (1, 5):
        taken[0] = 0
        parts = experts.mixed_parts(torch.randn(tokens, HIDDEN).to(dtype).to(DEVICE), mixture, card=Card(200, 80))
        inner = FORMATS["dense"][3]
        token = layout.triton_mixture_nbytes(HIDDEN, inner, 2, experts=count, active=active, shared=own)
        more = max(0, parts.shape[0] - active - shared) * tokens * HIDDEN * 4
        split = 4 * layout.TRITON_SPLIT_ROWS * HIDDEN if shared else 0  # parts of its products
        assert more <= 4 * layout.TRITON_SPLIT_ROWS * HIDDEN
        assert 0.5 * token * tokens < taken[0] - more <= token * tokens + split, tokens


def test_launches_depend_on_powers_of_two_alone() -> None:
    """What warm-ups try (appliance/runtime/warmup.py); parts times pairs stay within the planned room."""
    for experts_, active, inner, hidden in ((128, 8, 768, 2048), (8, 2, 14336, 4096), (60, 4, 1408, 2048)):
        found: dict[tuple[bool, int], Launch] = {}
        for gated in (False, True):
            outputs, inputs = (2 * inner, hidden) if gated else (hidden, inner)
            for rows in range(1, 1100):
                launch = choose_experts(
                    rows=rows, experts=experts_, active=active, outputs=outputs, inputs=inputs, kind="w4 fp16", gated=gated
                )
                assert found.setdefault((gated, (rows - 1).bit_length()), launch) == launch
                assert launch.split == 1 or (not gated and launch.split * rows * active <= layout.TRITON_SPLIT_ROWS)
                assert launch.block_m == found[False, (rows - 1).bit_length()].block_m >= min(rows, 8)


def test_what_cannot_be_joined() -> None:
    ops = make_ops(torch.device(DEVICE))
    assert ops.join_experts is not None

    def mlp(gate_up: QuantTensor | Tensor, **options: str) -> MLP:
        packed = ops.pack(gate_up, dtype=torch.float16, gated=True, **options)  # type: ignore[arg-type]
        return MLP((packed,), ops.pack(torch.randn(128, 64), dtype=torch.float16))

    plain = mlp(random_weight(128, 128, group_size=128))
    for other in (
        mlp(random_weight(128, 128, group_size=32)),
        mlp(random_weight(128, 128, group_size=128, act_order=True)),
        mlp(random_weight(128, 128, group_size=128), activation="int8"),
        MLP((plain.down, plain.down), plain.down),
    ):
        with pytest.raises(TypeError, match="experts"):
            ops.join_experts([plain, other], 2)
    with pytest.raises(TypeError, match="not joined"):
        experts.mixed_parts(torch.randn(1, 128).half(), Mixture(plain.down, (plain, plain), 1, True))


def test_nothing() -> None:
    ops = make_ops(torch.device(DEVICE))
    mixture = mixture_of(ops, torch.randn(2, HIDDEN), random_experts(2, "dense", torch.float16), torch.float16, 1, True)
    x, norm = torch.empty(0, HIDDEN, dtype=torch.float16, device=DEVICE), Norm(torch.ones(HIDDEN).half().to(DEVICE), 1e-5)
    assert ops.mix(x, mixture, norm=norm).shape == (0, HIDDEN) and experts.mixed_parts(x, mixture).shape == (1, 0, HIDDEN)
