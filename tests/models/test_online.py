"""Unquantized checkpoints that ``--quantization int8`` or ``int4`` rounds while they are loaded, against torch's own rounding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from appliance.config import EngineConfig
from appliance.memory.planner import make_plan
from kernels.ops import get_ops
from models.decoder import Decoder
from models.loader import load_model
from models.spec import ModelSpec
from quant.checkpoint import Checkpoint
from quant.errors import CheckpointError
from quant.tensor import QuantTensor
from tests.memory.published import QWEN2_MOE, fill, write_published
from tests.models.test_loader import logits, write_dense

GROUP = 32


@pytest.fixture(scope="module", params=["llama", "mixture"])
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With inputs that are no multiple of a group."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "llama":
        return write_dense(folder, hidden_size=72, intermediate_size=108, num_attention_heads=6, head_dim=14)
    return fill(write_published(folder, QWEN2_MOE, "none"), "none")


def load(folder: Path, quantization: str | None, *, reference: bool = False) -> Decoder:
    with Checkpoint.open(folder, quantization) as checkpoint:
        spec, ops = ModelSpec.from_config(checkpoint.config), get_ops("cpu", reference=reference)
        return load_model(checkpoint, spec, ops, dtype=torch.float32, max_len=64)


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """By torch.fake_quantize_per_channel_affine: rows, or groups of GROUP with a zero point and a scale in float16."""
    N, K = weight.shape
    if bits == 8:
        scale = weight.abs().amax(dim=1) / 127
        return torch.fake_quantize_per_channel_affine(weight, scale, torch.zeros(N, dtype=torch.int32), 0, -127, 127)
    groups = torch.nn.functional.pad(weight, (0, -K % GROUP)).reshape(-1, GROUP)
    low, high = groups.amin(dim=1).clamp(max=0), groups.amax(dim=1).clamp(min=0)
    scale = ((high - low) / 15).half().float()
    zero = (-low / scale).round().clamp(0, 15).int()
    return torch.fake_quantize_per_channel_affine(groups, scale, zero, 0, 0, 15).reshape(N, -1)[:, :K].contiguous()


def in_layer(name: str) -> bool:
    """Whether this tensor is rounded: not embedding, head, norms, biases, nor what chooses the experts."""
    return name.startswith("model.layers.") and name.endswith("proj.weight")


@pytest.mark.parametrize("bits", [8, 4])
def test_each_weight_is_torchs(published: Path, bits: int) -> None:
    tensors = load_file(published / "model.safetensors")
    assert any(map(in_layer, tensors))
    with Checkpoint.open(published, f"INT{bits}") as checkpoint:
        for name in filter(in_layer, tensors):
            weight = checkpoint.weight(name.removesuffix(".weight"))
            assert isinstance(weight, QuantTensor) and weight.bits == bits
            off = (weight.dequantize() - rounded(tensors[name].float(), bits)).abs()
            assert off.gt(1e-6).float().mean() < 2e-3  # half way between two codes: torch multiplies where this divides
            assert off.max() <= 1.001 * weight.scales.float().max()


@pytest.mark.parametrize("bits", [8, 4])
def test_the_layers_are_rounded_and_nothing_else(published: Path, tmp_path: Path, bits: int) -> None:
    tensors = {name: tensor.float() for name, tensor in load_file(published / "model.safetensors").items()}
    with Checkpoint.open(published, f"int{bits}") as checkpoint:
        for name in filter(in_layer, tensors):
            weight = checkpoint.weight(name.removesuffix(".weight"))
            assert isinstance(weight, QuantTensor)
            tensors[name] = weight.dequantize(weight.rounding).float()  # as of other weights with scales in float16
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((published / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    for reference in (True, False):
        found, expected, plain = (
            logits(load(folder, how, reference=reference))
            for folder, how in ((published, f"int{bits}"), (tmp_path, None), (published, None))
        )
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
        assert (found - plain).abs().max() > 50 * (found - expected).abs().max()


def test_routers_stay(tmp_path: Path) -> None:
    names = ("gate", "shared_expert_gate", "experts.0.up_proj", "shared_expert.down_proj")
    with Checkpoint.open(fill(write_published(tmp_path, QWEN2_MOE, "none"), "none"), "int4") as checkpoint:
        found = [checkpoint.weight(f"model.layers.0.mlp.{name}") for name in names]
    assert [isinstance(one, QuantTensor) for one in found] == [False, False, True, True]


@pytest.mark.parametrize("quantization", ["int8", "int4", "int8_per_channel_weight_only"])
def test_the_plan_counts_what_is_loaded(published: Path, quantization: str) -> None:
    options = EngineConfig(quantization=quantization, dtype="float32", max_model_len=64, kv_cache_memory_bytes="4MiB")
    plan, decoder = make_plan(published, options), load(published, quantization)
    assert plan.weight_bytes + decoder.cos_sin.nbytes == decoder.nbytes and plan.quantization == quantization[:4]


def test_a_weight_that_is_not_finite(tmp_path: Path) -> None:
    folder = write_dense(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    for quantization in ("int8", "int4"):
        with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj: some of its scales are not finite"):
            load(folder, quantization)
