"""Products of many rows: tiles in another order, and weights expanded for torch's product."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kernels import configs, layout, reference
from kernels.configs import Launch
from kernels.triton import half, many, matmul, ops, slab
from kernels.triton.weights import TILE, TritonWeight, pack
from quant.tensor import QuantTensor
from tests.kernels.triton.conftest import DEVICE
from tests.kernels.weights import random_weight

DTYPES = (torch.float16, torch.bfloat16)
KINDS = [(4, 128, True), (4, 64, False), (4, 32, True), (4, 256, True), (4, None, True), (8, 128, False), (8, None, False)]
LIMIT = {torch.float16: 2e-3, torch.bfloat16: 2e-2}  # as in test_matmul.py


def on_device(weight: QuantTensor, *, bias: torch.Tensor | None = None, **options: object) -> TritonWeight:
    bias = None if bias is None else bias.to(DEVICE)
    return pack(weight.on(torch.device(DEVICE)), bias=bias, **options)  # type: ignore[arg-type]


def wanted(
    x: torch.Tensor, weight: QuantTensor, bias: torch.Tensor | None = None, gated: bool = False, **options: torch.Tensor
) -> torch.Tensor:
    packed = reference.pack(weight.dequantize(), dtype=torch.float32, bias=bias, gated=gated)
    return reference.matmul(x.float(), packed, **options)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float().cpu() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group", "asymmetric"), KINDS)
def test_a_slab_is_the_weight(bits: int, group: int | None, asymmetric: bool, dtype: torch.dtype) -> None:
    """To the last bit, from any output on; what lies beside it stays."""
    for N, K, first, count in ((300, 512, 131, 140), (130, 200, 0, 130)):
        if group and K % group and group > TILE:
            continue
        weight = random_weight(N, K, bits=bits, group_size=group, asymmetric=asymmetric, seed=N)
        to = torch.full((count + 3, layout.padded(K, TILE)), float("nan"), dtype=dtype, device=DEVICE)
        slab.expand(on_device(weight, dtype=dtype), first, to[:count])
        expected = weight.dequantize()[first : first + count]
        found = to[:count, :K].cpu()
        if dtype == torch.float16 or DEVICE == "cuda":
            assert torch.equal(found, expected.to(dtype))
        else:  # the interpreter cuts bfloat16 off
            assert ((found.float() - expected).abs() <= expected.abs() * 2**-7).all()
        assert to[count:].isnan().all() and to[:, K:].isnan().all()


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_a_slab_with_scales_of_any_type(scale_dtype: torch.dtype) -> None:
    weight = random_weight(128, 256, group_size=64, asymmetric=True, scale_dtype=scale_dtype)
    to = torch.empty(128, 256, dtype=torch.float16, device=DEVICE)
    slab.expand(on_device(weight, dtype=torch.float16), 0, to)
    assert torch.equal(to.cpu(), weight.dequantize(torch.float16))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("biased", "added", "wide"), [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (0, 1, 1)])
def test_slab_after_slab(gated: bool, biased: int, added: int, wide: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several slabs, the last of them short; bias, gate, residual and a result in float32."""
    monkeypatch.setattr(layout, "TRITON_SLAB_BYTES", 2 * 256 * 128)
    dtype, rows, N, K = torch.float16, 19, 580, 200
    weight, x = random_weight(N, K, group_size=64, asymmetric=True), torch.randn(rows, K).to(torch.float16)
    outputs = N // 2 if gated else N
    bias = torch.randn(N) if biased else None
    residual = torch.randn(rows, outputs).to(dtype) if added else None
    packed = on_device(weight, dtype=dtype, bias=bias, gated=gated)
    assert layout.triton_slab(N, K) == (128, 256) and outputs > 2 * 128
    out = torch.full((rows, outputs), float("nan"), dtype=torch.float32 if wide else dtype, device=DEVICE)
    found = slab.multiply(x.to(DEVICE), packed, None if residual is None else residual.to(DEVICE), out)
    options = {} if residual is None else {"residual": residual.float()}
    assert found is out and error(out, wanted(x, weight, bias=bias, gated=gated, **options)) < 3e-3


def test_the_workspace_is_what_the_plan_has() -> None:
    for inputs in (1, 128, 4096, 14336, 100_000):
        for outputs in (1, 130, 4096, 1 << 20):
            rows, across = layout.triton_slab(outputs, inputs)
            assert (
                rows % TILE == across % TILE == 0
                and across >= inputs
                and (rows >= outputs or rows * across * 2 <= 16 << 20 or rows == TILE)
            )
            assert rows * across * 2 <= layout.triton_slab_nbytes(inputs)
    assert layout.triton_slab_nbytes(4096) == layout.TRITON_SLAB_BYTES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group", "asymmetric"), KINDS)
def test_tiles_in_groups(bits: int, group: int | None, asymmetric: bool, dtype: torch.dtype) -> None:
    """More tiles of rows than a group has, the last group short; every program writes its own tile."""
    rows, N, K = 330, 257, 256
    weight, x = random_weight(N, K, bits=bits, group_size=group, asymmetric=asymmetric), torch.randn(rows, K).to(dtype)
    packed = on_device(weight, dtype=dtype)
    out = torch.full((rows, N), float("nan"), dtype=dtype, device=DEVICE)
    many.multiply(x.to(DEVICE), packed, None, out, Launch(64, 128, 1, 8, 2, group=4), finished=True)
    assert error(out, wanted(x, weight)) < LIMIT[dtype]


@pytest.mark.parametrize("launch", [Launch(128, 128, 1, 8, 2, group=8), Launch(64, 64, 1, 4, 2, group=1)])
def test_tiles_with_bias_and_residual(launch: Launch) -> None:
    rows, N, K = 130, 200, 200
    weight, x = random_weight(N, K, group_size=64), torch.randn(rows, K + 8).half()[:, :K]
    bias, residual = torch.randn(N), torch.randn(rows, N).half()
    packed = on_device(weight, dtype=torch.float16, bias=bias)
    out = torch.full((rows, N), float("nan"), device=DEVICE)
    many.multiply(x.to(DEVICE), packed, residual.to(DEVICE), out, launch, finished=True)
    assert error(out, wanted(x, weight, bias=bias, residual=residual.float())) < 2e-3
    many.multiply(x.to(DEVICE), packed, None, out, launch, finished=False)
    assert error(out, wanted(x, weight)) < 2e-3


@pytest.mark.parametrize("launch", [Launch(64, 128, 1, 8, 3, group=8), Launch(64, 64, 1, 4, 3, group=2, half=True)])
@pytest.mark.parametrize(("bits", "outputs"), [(4, 130), (8, 254), (4, 2)])
@pytest.mark.parametrize("more", [False, True])
def test_tiles_with_a_gate(bits: int, outputs: int, more: bool, launch: Launch) -> None:
    """Gate and up side by side in a tile, wherever up begins; the last columns of a tile are nobody's."""
    rows, K = 67, 200
    weight, x = random_weight(2 * outputs, K, bits=bits, group_size=64, seed=outputs), 3 * torch.randn(rows, K)
    bias, residual = (torch.randn(2 * outputs), torch.randn(rows, outputs).half()) if more else (None, None)
    packed = on_device(weight, dtype=torch.float16, bias=bias, gated=True)
    out = torch.full((rows, outputs), float("nan"), device=DEVICE)
    given = None if residual is None else residual.to(DEVICE)
    many.multiply(x.half().to(DEVICE), packed, given, out, launch, finished=True)
    options = {} if residual is None else {"residual": residual.float()}
    assert error(out, wanted(x.half(), weight, bias=bias, gated=True, **options)) < (6e-3 if launch.half else 2e-3)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("rows", "capability", "taken"), [(70, 89, "many"), (260, 89, "many"), (130, 90, "many"), (260, 90, "slab")]
)
def test_what_a_card_takes(rows: int, capability: int, taken: str, gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    for module, name in ((many, "many"), (slab, "slab")):
        multiply = module.multiply
        monkeypatch.setattr(module, "multiply", lambda *a, _m=multiply, _n=name, **o: (used.append(_n), _m(*a, **o))[1])
    weight = random_weight(256, 128, group_size=128, asymmetric=True, act_order=True)
    x, bias = torch.randn(rows, 128).half(), torch.randn(256)
    packed = on_device(weight, dtype=torch.float16, bias=bias, gated=gated)
    found = matmul.matmul(x.to(DEVICE), packed, card=matmul.Card(2, capability))
    assert used == [taken] and error(found, wanted(x, weight, bias=bias, gated=gated)) < 3e-3


@pytest.mark.parametrize("asked", [None, "0", "1"])
def test_sums_in_float16_are_asked_for_in_the_environment(asked: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("APPLIANCE_FP16_SUMS", raising=False)
    if asked is not None:
        monkeypatch.setenv("APPLIANCE_FP16_SUMS", asked)
    found = SimpleNamespace(multi_processor_count=128, major=8, minor=9, name="NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    card = ops.this_card(torch.device("cuda"))
    assert card == matmul.Card(128, 89, "NVIDIA GeForce RTX 4090", asked == "1")
    weight, x = random_weight(256, 128, group_size=128), torch.randn(70, 128).half()
    packed, used = on_device(weight, dtype=torch.float16), []
    shrink = many.shrink
    monkeypatch.setattr(many, "shrink", lambda x: (used.append(True), shrink(x))[1])
    assert error(matmul.matmul(x.to(DEVICE), packed, card=card), wanted(x, weight)) < 6e-3
    assert bool(used) == (asked == "1")


def test_a_table_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    configs.table.cache_clear()
    launch = {"block_m": 32, "block_n": 64, "split": 3, "warps": 4, "stages": 2}
    table = {"card": "Card 1", "capability": 89, "launches": {"w4 bf16": {"128x384": {"8": launch}}}}
    (tmp_path / "card-1.json").write_text(json.dumps(table))
    weight, x = random_weight(128, 384, group_size=128), torch.randn(5, 384).bfloat16()
    packed, card = on_device(weight, dtype=torch.bfloat16), matmul.Card(128, 89, "Card 1")
    parts = matmul.partial_sums(x.to(DEVICE), packed, card=card)
    assert parts is not None and parts.shape == (3, 5, 128)
    assert error(matmul.matmul(x.to(DEVICE), packed, card=card), wanted(x, weight)) < LIMIT[torch.bfloat16]
    configs.table.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 1000, 3000])
def test_rows_are_shrunk_by_powers_of_two(dtype: torch.dtype, columns: int) -> None:
    x = torch.randn(9, columns) * torch.tensor([1.0, 1e-3, 1e3, 1e4, 2e-4, 0.0, 1.0, 1.0, 3.0])[:, None]
    x[6, 0], x[7, 0] = torch.inf, torch.nan
    x = torch.cat([x.to(dtype), torch.zeros(9, 7, dtype=dtype)], dim=1)[:, :columns]
    found, back = (t.cpu() for t in half.shrink(x.to(DEVICE)))
    most = x.float().abs().amax(1)
    assert ((found.float().abs().amax(1) >= 1) & (found.float().abs().amax(1) < 2))[most > 0][:5].all()
    assert (back.log2() == back.log2().round()).all() and back[6] == back[7] == 1 and (found[5] == 0).all()
    finite = [0, 1, 2, 3, 4, 5, 8]
    difference = (found.float() * back[:, None] - x.float()).abs()[finite]
    assert (difference <= 2.0**-25 * most[finite, None]).all()
    assert found[6, 0] == torch.inf and found[7, 0].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group", "asymmetric"), [*KINDS, (8, 128, True)])
def test_half_sums_never_overflow(bits: int, group: int | None, asymmetric: bool, dtype: torch.dtype) -> None:
    """Not with the largest activations that there are, nor with codes all at the far end of their zero point."""
    rows, N, K = 70, 130, 256
    weight, x = random_weight(N, K, bits=bits, group_size=group, asymmetric=asymmetric), torch.randn(rows, K)
    x[0], x[1] = 65000.0, -65000.0
    x[2, ::2] = 3e-3
    weight = replace(weight, packed=weight.packed.clone(), scales=weight.scales * 2**-10)
    weight.packed[0], weight.packed[1] = 255, 0
    if weight.zeros is not None:
        weight.zeros[:, 0], weight.zeros[:, 1] = 0, 255 if bits == 8 else 15
    packed, x = on_device(weight, dtype=dtype), x.to(dtype)
    out = torch.full((rows, N), float("nan"), device=DEVICE)
    many.multiply(x.to(DEVICE), packed, None, out, Launch(64, 128, 1, 8, 3, group=8, half=True), finished=True)
    expected = wanted(x, weight)
    assert out.isfinite().all()
    error = (out.cpu() - expected).abs().amax(1) / expected.abs().amax(1)  # of a row: they differ by their sizes
    assert error.max() < 6e-3, error


def test_half_sums_of_fp8_are_whole_ones() -> None:
    weight, x = random_weight(130, 256, bits=0), torch.randn(66, 256).half()
    packed = on_device(weight, dtype=torch.float16)
    if packed.words.dtype != torch.uint16:
        pytest.skip("kept dequantized")
    outs = [torch.empty(66, 130, device=DEVICE) for _ in range(2)]
    for out, is_half in zip(outs, (False, True), strict=True):
        many.multiply(x.to(DEVICE), packed, None, out, Launch(64, 128, 1, 8, 3, group=8, half=is_half), finished=True)
    assert torch.equal(*outs)
