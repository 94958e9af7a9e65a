"""What is written is what is read: by our own readers, by AutoAWQ's and compressed-tensors' own code, from the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from quant.algorithms.grid import Grid, Quantized, round_to_nearest
from quant.errors import InputError
from quant.publish import check_shape, config_section, grid_for, pack_stream, tensors_of
from tests.quant.test_oracles import load, save
from tests.quant.writers import stream


def made(form: str, bits: int, group: int, symmetric: bool, N: int = 32, K: int = 128, *, act_order: bool = False) -> Quantized:
    torch.manual_seed(bits + group)
    weight = torch.randn(N, K) * torch.rand(N, 1)
    weight[3] = 0.0
    weight[5, :8] = weight[5, :8].abs()
    perm = torch.randperm(K) if act_order else None
    found = round_to_nearest(weight if perm is None else weight[:, perm], grid_for(form, bits, group, symmetric, torch.bfloat16))
    return found if perm is None else Quantized(found.codes, found.scales, found.zeros, found.grid, perm)


WIDTHS = [(4, 32, True, False), (4, 64, False, True), (8, -1, True, False), (3, 32, False, False), (4, -1, False, True)]
CASES = [
    ("awq", 4, 32, False, False),
    ("awq", 4, -1, True, False),
    *(("gptq", *one) for one in [*WIDTHS, (2, 32, True, False), (8, 32, False, True)]),
    *(("compressed-tensors", *one) for one in [*WIDTHS, (4, -1, False, False), (8, 64, False, False)] if not one[-1]),
]


@pytest.mark.parametrize(("form", "bits", "group", "symmetric", "act_order"), CASES)
def test_our_own_readers(tmp_path: Path, form: str, bits: int, group: int, symmetric: bool, act_order: bool) -> None:
    weight = made(form, bits, group, symmetric, act_order=act_order)
    check_shape(form, "it", 32, 128, weight.grid)
    save(
        tmp_path, tensors_of(form, weight), config_section(form, weight.grid, {}, act_order=act_order, more={"made_by": "a test"})
    )
    assert torch.equal(load(tmp_path, (32, 128)).dequantize(), weight.dequantize())


def test_rounding_is_to_the_nearest() -> None:
    """No other code is nearer, and an error is at most half a step."""
    for symmetric in (True, False):
        weight = torch.randn(16, 96)
        found = round_to_nearest(weight, Grid(4, 32, symmetric))
        scales = found.scales.float().repeat_interleave(32, 0).t()
        assert bool(((found.dequantize() - weight).abs() <= scales * (0.5 if not symmetric else 0.501) + 1e-3).all())
        for step in (-1, 1):
            other = (found.codes.to(torch.int16) + step).clamp(0, 15)
            zeros = found.zeros.to(torch.int16).repeat_interleave(32, 0).t()
            assert bool((((other - zeros) * scales - weight).abs() >= (found.dequantize() - weight).abs() - 1e-6).all())


def test_autoawq_reads_it() -> None:
    packing = pytest.importorskip("awq.utils.packing_utils", exc_type=ImportError)
    weight = made("awq", 4, 32, False)
    tensors = tensors_of("awq", weight)
    expected = packing.dequantize_gemm(tensors["qweight"], tensors["qzeros"], tensors["scales"].float(), 4, 32)
    assert torch.equal(weight.dequantize(), expected.t())


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_reads_it(bits: int, symmetric: bool) -> None:
    library = pytest.importorskip("compressed_tensors.quantization", exc_type=ImportError)
    compressors = pytest.importorskip("compressed_tensors.compressors", exc_type=ImportError)
    if not hasattr(compressors.BaseCompressor, "decompress"):
        pytest.skip("this version of compressed-tensors has another interface")
    weight = made("compressed-tensors", bits, 32, symmetric)
    args = library.QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=32)
    scheme = library.QuantizationScheme(targets=["Linear"], weights=args)
    packer = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    found = packer.decompress(tensors_of("compressed-tensors", weight), scheme)["weight"]
    assert torch.allclose(found.float(), weight.dequantize(), rtol=2**-7, atol=0)  # the library multiplies in bfloat16


@pytest.mark.parametrize("bits", range(2, 9))
def test_streams(bits: int) -> None:
    rng = np.random.default_rng(bits)
    values = rng.integers(0, 2**bits, (5, 37), dtype=np.uint8)
    assert np.array_equal(pack_stream(torch.from_numpy(values), bits).numpy(), stream(values, bits))


def test_refusals() -> None:
    for arguments, words in (
        (("marlin", 4, 32, True), "--format is 'marlin': one of awq, gptq, gptq_v2, compressed-tensors"),
        (("awq", 8, 32, True), "--bits is 8: the format awq has 4"),
        (("gptq", 5, 32, True), "the format gptq has 2, 3, 4, 8"),
        (("gptq", 4, 20, True), "--group-size is 20: a multiple of 8"),
        (("gptq", 4, 0, True), "--group-size is 0"),
    ):
        with pytest.raises(InputError, match=words):
            grid_for(*arguments, torch.float16)
    for form, bits, shape, words in (
        ("awq", 4, (12, 64), "12 outputs: the format awq needs a multiple of 8"),
        ("gptq", 3, (32, 48), "32 x 48: the format gptq needs multiples of 32 at 3 bits"),
        ("compressed-tensors", 4, (12, 72), "--group-size 16 does not divide the 72 inputs of it"),
    ):
        with pytest.raises(InputError, match=words):
            check_shape(form, "it", *shape, grid_for(form, bits, 16, True, torch.float16))
