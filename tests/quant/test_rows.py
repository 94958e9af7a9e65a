"""Rows quantized while loading: the codes nearest to the values, whatever the values are."""

from __future__ import annotations

import pytest
import torch

from quant import rows
from quant.rows import quantize_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("N", "K"), [(1, 1), (7, 31), (5, 64), (40, 100)])
def test_values_are_within_half_a_step(N: int, K: int, dtype: torch.dtype) -> None:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(N)).to(dtype)
    kept, wide = weight.clone(), weight.float()
    eight = quantize_rows(weight, 8)
    eight.check()
    assert (eight.bits, eight.group_size, eight.zeros, eight.scales.dtype) == (8, K, None, torch.float32)
    assert torch.equal(eight.scales[0], wide.abs().amax(1) / 127)
    assert ((eight.dequantize() - wide).abs() <= eight.scales[0].unsqueeze(1) * 0.5001).all()
    four = quantize_rows(weight, 4)
    four.check()
    assert (four.bits, four.group_size, four.scales.dtype) == (4, min(32, K), torch.float16) and four.zeros is not None
    step = four.scales.float().t().repeat_interleave(four.group_size, dim=1)[:, :K]
    # An extreme value may be cut by the rounding of the zero point (half a step) and of the scale (2 ** -11 of 15 steps).
    assert ((four.dequantize() - wide).abs() <= step * 1.01).all()
    assert ((four.dequantize() - wide).abs() <= step * 0.5001).float().mean() > 0.9
    assert torch.equal(weight, kept)


@pytest.mark.parametrize("bits", [8, 4])
def test_awkward_rows(bits: int) -> None:
    weight = torch.stack(
        [
            torch.zeros(64),
            torch.full((64,), 3.0),
            torch.full((64,), -1e-3),
            torch.linspace(1e-30, 1e-28, 64),  # float16 has no scale for these
            torch.linspace(-30000, 30000, 64),
        ]
    )
    found = quantize_rows(weight, bits).dequantize()
    assert torch.equal(found[0], torch.zeros(64))
    assert torch.allclose(found[1:3], weight[1:3], rtol=1e-3)
    assert torch.allclose(found[3], weight[3] if bits == 8 else torch.zeros(64), atol=1e-30, rtol=0.5)
    assert (found[4] - weight[4]).abs().max() <= (240 if bits == 8 else 2100)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_no_number_stays_none(bits: int, bad: float) -> None:
    weight = torch.randn(3, 40)
    weight[1, 7] = bad
    found = quantize_rows(weight, bits).dequantize()
    assert not found[1, 7].isfinite() and found[0].isfinite().all() and found[2].isfinite().all()


@pytest.mark.parametrize("bits", [8, 4])
def test_slabs_make_no_difference(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(50, 48)
    whole = quantize_rows(weight, bits)
    monkeypatch.setattr(rows, "SLAB", 48 * 7)
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "torch")  # the native extension does all at once
    parts = quantize_rows(weight, bits)
    assert torch.equal(whole.packed, parts.packed) and torch.equal(whole.scales, parts.scales)
    assert whole.zeros is None or torch.equal(whole.zeros, parts.zeros)


def test_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="rows are quantized to 4 or 8 bits, not 3"):
        quantize_rows(torch.randn(2, 2), 3)
