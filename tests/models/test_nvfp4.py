"""NVFP4 of both tools and MXFP4 of llm-compressor on every kind of operators.

Against the same weights, dequantized by the formula and stored in float32.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.ops import Ops, get_ops
from models.decoder import Decoder
from models.kv_scales import read_largest
from models.loader import load_model
from models.spec import ModelSpec
from quant.checkpoint import Checkpoint
from tests.memory.published import SMALL, fill, livelier, write_published
from tests.memory.test_nvfp4 import DENSE
from tests.models.test_against_transformers import feed
from tests.models.test_mixture import ops  # noqa: F401
from tests.quant.test_nvfp4 import codes

IDS = torch.randint(300, (40,), generator=torch.Generator().manual_seed(2))


def dequantized(folder: Path, to: Path) -> Path:
    tensors, made = load_file(folder / "model.safetensors"), {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight_packed" and f"{module}.weight_global_scale" not in tensors:
            scale = 2.0 ** (tensors[f"{module}.weight_scale"].double() - 127)
            made[f"{module}.weight"] = (codes(tensor) * scale.repeat_interleave(32, dim=1)).float()
        elif tensor.dtype == torch.uint8 and kind != "weight_scale":
            scale = tensors[f"{module}.weight_scale"].double()
            whole = 1 / tensors[f"{module}.weight_global_scale"].double() if kind == "weight_packed" else 0
            scale = scale * (tensors[f"{module}.weight_scale_2"].double() if kind == "weight" else whole)
            made[f"{module}.weight"] = (codes(tensor) * scale.repeat_interleave(16, dim=1)).float()
        elif "scale" not in kind:
            made[name] = tensor.float()
    to.mkdir()
    save_file(made, to / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "quantization_config"}))
    return to


@pytest.fixture(
    scope="module", params=[("qwen3", "modelopt-nvfp4"), ("qwen3-moe", "ct-nvfp4"), ("qwen3-moe", "ct-mxfp4")], ids="-".join
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A checkpoint, and the logits of its weights in float32."""
    name, variant = request.param
    folder = tmp_path_factory.mktemp(variant)
    livelier(fill(write_published(folder / "as-published", DENSE if name == "qwen3" else SMALL, variant), variant))
    dense = load(dequantized(folder / "as-published", folder / "dense"), get_ops("cpu", reference=True), torch.float32)
    return folder / "as-published", feed(dense, IDS, [len(IDS)])


def load(folder: Path, ops: Ops, dtype: torch.dtype, activation: str = "auto") -> Decoder:  # noqa: F811
    with Checkpoint.open(folder) as checkpoint:
        spec = ModelSpec.from_config(checkpoint.config)
        return load_model(checkpoint, spec, ops, dtype=dtype, max_len=64, lm_head_dtype="model", activation=activation)


def test_in_float32(pair: tuple[Path, torch.Tensor], ops: Ops) -> None:  # noqa: F811
    folder, expected = pair
    decoder = load(folder, ops, torch.float32)
    assert expected.std() > 0.1 and (feed(decoder, IDS, [31, 8, 1]) - expected).abs().max() < 1e-4 * expected.std()
    scaled = decoder.kv_largest[0]
    assert (scaled is not None) == ("k_scale" in " ".join(load_file(folder / "model.safetensors")))


@pytest.mark.parametrize("activation", ["bf16", "int8"])
def test_in_bfloat16(pair: tuple[Path, torch.Tensor], ops: Ops, activation: str) -> None:  # noqa: F811
    """A token whose experts differ by a rounding is off by more: in the mean it is little."""
    folder, expected = pair
    off = (feed(load(folder, ops, torch.bfloat16, activation), IDS, [31, 8, 1]) - expected).abs() / expected.std()
    assert off.mean() < (0.02 if activation == "bf16" else 0.025 if "nvfp4" in str(folder) else 0.035)


@pytest.mark.parametrize(("algorithm", "largest"), [("FP8", 448.0), ("NVFP4", 6 * 448.0)])
def test_scales_of_a_cache(tmp_path: Path, algorithm: str, largest: float) -> None:
    """Of an FP8 cache, and of one in NVFP4, whose scale is for those of groups. Here from ModelOpt's own file."""
    fill(write_published(tmp_path, DENSE, "modelopt-nvfp4"), "modelopt-nvfp4")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": algorithm, "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(settings))
    tensors = load_file(tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        found = read_largest(checkpoint, "model.layers.0.self_attn", 2)
    expected = [tensors[f"model.layers.0.self_attn.{part}_proj.{part}_scale"].item() * largest for part in "kv"]
    assert found == pytest.approx(expected)
