"""Against the reference libraries' own packers and dequantizers.

The dev extra installs them; without the packages these are skipped, and tests/quant/test_formats.py alone holds the same layouts
to the formats' definitions.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
import torch

from tests.memory.published import FLOATS4
from tests.quant.writers import ct_config, load, save

AWQ = {"quant_method": "awq", "bits": 4}


@pytest.fixture(autouse=True)
def no_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoAWQ imports the large ``datasets`` package for calibration, which nothing here needs."""
    if importlib.util.find_spec("datasets") is None:
        stub = ModuleType("datasets")
        stub.load_dataset = None  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", stub)


@pytest.mark.parametrize("group", [32, 128])
def test_autoawq_gemm(tmp_path: Path, group: int) -> None:
    packing = pytest.importorskip("awq.utils.packing_utils", exc_type=ImportError)
    torch.manual_seed(group)
    words = torch.randint(-(2**31), 2**31 - 1, (256, 6), dtype=torch.int32)
    zeros = torch.randint(-(2**31), 2**31 - 1, (256 // group, 6), dtype=torch.int32)
    scales = torch.rand(256 // group, 48).half()
    save(tmp_path, {"qweight": words, "qzeros": zeros, "scales": scales}, {**AWQ, "group_size": group})
    expected = packing.dequantize_gemm(words, zeros, scales.float(), 4, group)
    assert torch.equal(load(tmp_path).dequantize(), expected.t())


@pytest.mark.parametrize("kind", ["gemm", "gemv", "gemv_fast"])
@pytest.mark.parametrize(("K", "group"), [(256, 64), (320, 32), (384, 128), (192, -1)])
def test_autoawq_packers(tmp_path: Path, kind: str, K: int, group: int) -> None:
    """A linear layer through the packer of AutoAWQ's module itself."""
    name = {"gemm": "WQLinear_GEMM", "gemv": "WQLinear_GEMV", "gemv_fast": "WQLinear_GEMVFast"}[kind]
    module = pytest.importorskip(f"awq.modules.linear.{kind}", exc_type=ImportError)
    torch.manual_seed(K)
    N, size = 32, K if group == -1 else group
    zeros, scales = torch.randint(0, 16, (N, K // size)), (torch.rand(N, K // size) * 0.05 + 0.01).half()
    codes = torch.randint(0, 16, (N, K))
    weight = (codes - zeros.repeat_interleave(size, 1)).float() * scales.repeat_interleave(size, 1).float()
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data = weight
    order = (lambda t: t.t().contiguous()) if kind == "gemm" else (lambda t: t)
    made = getattr(module, name).from_linear(linear, 4, size, scales=order(scales), zeros=order(zeros))
    tensors = {key: tensor.contiguous() for key, tensor in made.state_dict().items()}
    save(tmp_path, tensors, {**AWQ, "group_size": group, "version": kind})
    assert torch.equal(load(tmp_path, (N, K)).dequantize(), weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("strategy", ["group", "channel"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_packed(tmp_path: Path, bits: int, strategy: str, symmetric: bool) -> None:
    library = pytest.importorskip("compressed_tensors.quantization", exc_type=ImportError)
    compressors = pytest.importorskip("compressed_tensors.compressors", exc_type=ImportError)
    if not hasattr(compressors.BaseCompressor, "decompress"):
        pytest.skip("this version of compressed-tensors has another interface")
    torch.manual_seed(bits)
    N, K, G = 24, 160, 5 if strategy == "group" else 1
    args = {"num_bits": bits, "symmetric": symmetric, "strategy": strategy, "group_size": 32 if strategy == "group" else None}
    scheme = library.QuantizationScheme(targets=["Linear"], weights=library.QuantizationArgs(**args))
    zero = torch.zeros(N, G) if symmetric else torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (N, G))
    state = {"weight": torch.randn(N, K), "weight_scale": torch.rand(N, G) + 0.1, "weight_zero_point": zero.to(torch.int8)}
    packer = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    packed = packer.compress(state, scheme)
    expected = packer.decompress(packed, scheme)["weight"]
    save(tmp_path, {name: tensor.contiguous() for name, tensor in packed.items()}, ct_config(args))
    assert torch.equal(load(tmp_path, (N, K)).dequantize(), expected)


@pytest.mark.parametrize("strategy", ["tensor", "channel", "group", "block"])
@pytest.mark.parametrize("kind", ["int", "float"])
def test_compressed_tensors_plain(tmp_path: Path, kind: str, strategy: str) -> None:
    library = pytest.importorskip("compressed_tensors.quantization", exc_type=ImportError)
    compressors = pytest.importorskip("compressed_tensors.compressors", exc_type=ImportError)
    if not hasattr(compressors.BaseCompressor, "decompress"):
        pytest.skip("this version of compressed-tensors has another interface")
    torch.manual_seed(0)
    shape = {"tensor": (1,), "channel": (64, 1), "group": (64, 4), "block": (4, 2)}[strategy]
    args = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": strategy}
    args |= {"group_size": 32 if strategy == "group" else None, "block_structure": [16, 64] if strategy == "block" else None}
    scheme = library.QuantizationScheme(targets=["Linear"], weights=library.QuantizationArgs(**args))
    packer = compressors.BaseCompressor.get_value_from_registry(f"{kind}-quantized")
    packed = packer.compress({"weight": torch.randn(64, 128), "weight_scale": torch.rand(shape) * 0.01 + 0.01}, scheme)
    expected = packer.decompress(packed, scheme)["weight"]
    save(tmp_path, {name: tensor.contiguous() for name, tensor in packed.items()}, ct_config(args, f"{kind}-quantized"))
    assert torch.equal(load(tmp_path, (64, 128)).dequantize(), expected.float())


def preset(name: str, stored: str) -> tuple[Any, Any]:
    """(the packer, the scheme) that compressed-tensors has by this name and format."""
    compressors = pytest.importorskip("compressed_tensors.compressors", exc_type=ImportError)
    schemes = pytest.importorskip("compressed_tensors.quantization.quant_scheme", exc_type=ImportError)
    if not hasattr(compressors.BaseCompressor, "decompress") or not hasattr(schemes, name):
        pytest.skip("this version of compressed-tensors has another interface")
    packer = compressors.BaseCompressor.get_value_from_registry(stored)
    return packer, schemes.preset_name_to_scheme(name, ["Linear"])


def scales_of(groups: torch.Tensor, scheme: Any) -> torch.Tensor:
    """By compressed-tensors, of weights [N, groups, inputs]."""
    qparams = pytest.importorskip("compressed_tensors.quantization.utils", exc_type=ImportError)
    scale, _ = qparams.calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
    return cast(torch.Tensor, scale)


def test_compressed_tensors_nvfp4(tmp_path: Path) -> None:
    """In bfloat16, as it dequantizes: a last bit differs now and then, since it divides by the global scale."""
    packer, scheme = preset("NVFP4", "nvfp4-pack-quantized")
    torch.manual_seed(4)
    scale = (torch.rand(96, 10) * 448).to(torch.float8_e4m3fn).float() + 0.01
    state = {"weight": torch.randn(96, 160) / 4, "weight_scale": scale, "weight_global_scale": torch.tensor([3127.3])}
    packed = packer.compress(state, scheme)
    save(tmp_path, {name: tensor.contiguous() for name, tensor in packed.items()}, FLOATS4["ct-nvfp4"][2])
    expected, found = packer.decompress(packed, scheme)["weight"], load(tmp_path, (96, 160)).dequantize(torch.bfloat16)
    assert expected.dtype == torch.bfloat16 and expected.count_nonzero() > 10000
    assert (found != expected).float().mean() < 1e-3 and bool(((found - expected).abs() <= expected.abs() / 128).all())


def test_compressed_tensors_mxfp4(tmp_path: Path) -> None:
    """To the bit: bfloat16 holds a code times a power of two. Weights of very different sizes, and a group that is all zeros."""
    packer, scheme = preset("MXFP4", "mxfp4-pack-quantized")
    torch.manual_seed(5)
    groups = torch.randn(96, 5, 32) * 2.0 ** torch.randint(-100, 100, (96, 5, 1))
    groups[7, 3] = 0
    scale = scales_of(groups, scheme)
    packed = packer.compress({"weight": groups.flatten(1), "weight_scale": scale}, scheme)
    save(tmp_path, {name: tensor.contiguous() for name, tensor in packed.items()}, FLOATS4["ct-mxfp4"][2])
    expected, found = packer.decompress(packed, scheme)["weight"], load(tmp_path, (96, 160)).dequantize(torch.bfloat16)
    assert expected.dtype == torch.bfloat16 and expected.count_nonzero() > 10000 and torch.equal(found, expected)


def test_compressed_tensors_mxfp8(tmp_path: Path) -> None:
    """To the bit, as above."""
    packer, scheme = preset("MXFP8", "mxfp8-quantized")
    torch.manual_seed(6)
    groups = torch.randn(96, 5, 32) * 2.0 ** torch.randint(-100, 100, (96, 5, 1))
    scale = scales_of(groups, scheme)
    packed = packer.compress({"weight": groups.flatten(1), "weight_scale": scale}, scheme)
    config = {"quant_method": "compressed-tensors", "format": "mxfp8-quantized", "ignore": ["lm_head"]}
    config["config_groups"] = {"group_0": json.loads(scheme.model_dump_json())}
    save(tmp_path, {name: tensor.contiguous() for name, tensor in packed.items()}, config)
    expected, found = packer.decompress(packed, scheme)["weight"], load(tmp_path, (96, 160)).dequantize()
    assert expected.count_nonzero() > 10000 and torch.equal(found, expected.float())
