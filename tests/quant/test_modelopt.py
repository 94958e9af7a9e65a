"""FP8 of NVIDIA's ModelOpt: values against the formula, and models by the tool itself where that is installed.

NVFP4, which it writes too, is in tests/quant/test_nvfp4.py. Names, types, shapes and settings are those that ModelOpt 0.47 wrote.
"""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kernels.ops import get_ops
from models.kv_scales import read_largest
from models.loader import load_model
from models.spec import ModelSpec
from quant.checkpoint import Checkpoint
from quant.errors import CheckpointError
from quant.headers import CheckpointIndex
from quant.scheme import read_scheme
from quant.tensor import QuantTensor
from tests.memory.published import MODELOPT
from tests.models.test_against_transformers import feed
from tests.quant.writers import MODULE, load, save

KINDS = {"modelopt-fp8": (), "modelopt-fp8-channels": (200,), "modelopt-fp8-blocks": (2, 1, 3, 1), "modelopt-mxfp8": (200, 10)}


def tensors(kind: str) -> dict[str, torch.Tensor]:
    """``KINDS`` has the shapes of scales."""
    weight, scale = torch.randn(200, 300).to(torch.float8_e4m3fn), 0.01 + torch.rand(KINDS[kind])
    scale = torch.randint(0, 255, scale.shape, dtype=torch.uint8) if kind == "modelopt-mxfp8" else scale
    return {"weight": weight, "weight_scale": scale, "input_scale": torch.tensor(0.02)}


@pytest.mark.parametrize("kind", KINDS)
def test_values(tmp_path: Path, kind: str) -> None:
    """To the bit: the number of the weight, of its output, of its block of 128 x 128 or of 32 inputs times the float."""
    found = tensors(kind)
    save(tmp_path, found, MODELOPT[kind][2])
    scale = found["weight_scale"]
    if scale.dim() == 4:
        scale = scale[:, 0, :, 0].repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    elif scale.dim() == 2:
        scale = 2.0 ** (scale.float() - 127).repeat_interleave(32, 1)[:, :300]
    elif scale.dim() == 1:
        scale = scale[:, None]
    weight = load(tmp_path, (200, 300))
    assert weight.kind == "fp8" and torch.equal(weight.dequantize(), found["weight"].float() * scale)
    assert weight.activation == {"modelopt-fp8": "fp8-tensor", "modelopt-fp8-channels": "fp8-token"}.get(kind)
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.weight(MODULE)
        assert checkpoint.leftover() == [] and checkpoint.scheme.method == "modelopt"
        assert not checkpoint.scheme.for_module("lm_head").quantized


def test_settings_in_a_file_of_their_own(tmp_path: Path) -> None:
    """As of the first checkpoints: config.json says nothing, and the scales of the FP8 cache are found all the same."""
    found = {f"mlp.up_proj.{name}": tensor for name, tensor in tensors("modelopt-fp8").items()}
    found |= {f"self_attn.{part}_proj.{part}_scale": torch.tensor(0.5 + i) for i, part in enumerate("kv")}
    save(tmp_path, found, None, "model.layers.0")
    file = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(file))
    scheme = read_scheme(CheckpointIndex.open(tmp_path))[1]
    assert (scheme.method, scheme.source) == ("modelopt", "hf_quant_config.json")
    assert scheme.for_module(MODULE).layout == "float-quantized"
    with Checkpoint.open(tmp_path) as checkpoint:
        assert read_largest(checkpoint, "model.layers.0.self_attn", 2) == (0.5 * 448, 1.5 * 448)


@pytest.mark.parametrize(
    ("kind", "scale", "words"),
    [
        ("modelopt-fp8", torch.ones(3), r"weight_scale: found \[3, 1\], expected one number, \[200, 1\] or"),
        ("modelopt-fp8-blocks", torch.ones(2, 1, 2, 1), r"scale: found \[2, 2\], expected \[2, 3\] for blocks of 128 x 128"),
        ("modelopt-fp8-blocks", torch.ones(2, 2, 3, 1), r"scale: found \[4, 3\], expected \[2, 3\] for blocks of 128 x 128"),
    ],
)  # fmt: skip
def test_scales_of_another_shape(tmp_path: Path, kind: str, scale: torch.Tensor, words: str) -> None:
    save(tmp_path, tensors(kind) | {"weight_scale": scale}, MODELOPT[kind][2])
    with pytest.raises(CheckpointError, match=words):
        load(tmp_path, (200, 300))


@pytest.fixture
def tool() -> ModuleType:
    return pytest.importorskip("modelopt.torch.quantization", exc_type=ImportError)


def calibrated(tool: ModuleType, algorithm: str) -> tuple[Any, torch.Tensor]:
    """A small Llama in float32 that the tool has rounded, not yet packed; inputs stay as they are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 300}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=1, eos_token_id=2)).eval()
    model.config.architectures = ["LlamaForCausalLM"]
    ids = torch.randint(300, (1, 32))
    tool.quantize(model, copy.deepcopy(getattr(tool, algorithm)), lambda one: one(ids))
    tool.disable_quantizer(model, "*input_quantizer")
    return model, ids[0]


def export(tool: ModuleType, model: Any, to: Path) -> None:
    from modelopt.torch.export import export_hf_checkpoint

    tool.enable_quantizer(model, "*input_quantizer")
    tool.disable_quantizer(model, "*lm_head*")
    export_hf_checkpoint(model, export_dir=to)


@torch.no_grad()
@pytest.mark.parametrize("algorithm", ["FP8_DEFAULT_CFG", "FP8_PER_CHANNEL_PER_TOKEN_CFG", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"])
def test_fp8_by_modelopt_itself(tool: ModuleType, tmp_path: Path, algorithm: str) -> None:
    """Its weights as it rounds them (a last bit apart: it divides where scales are multiplied), and logits of those."""
    model, ids = calibrated(tool, algorithm)
    linears = {name: one for name, one in model.named_modules() if name.endswith("_proj")}
    rounded = {name: one.weight_quantizer(one.weight) for name, one in linears.items()}
    expected = model(ids[None]).logits[0]
    export(tool, model, tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.scheme.method == "modelopt" and len(rounded) == 14
        for name, weight in rounded.items():
            found = checkpoint.weight(name)
            assert isinstance(found, QuantTensor)
            torch.testing.assert_close(found.dequantize(), weight, rtol=2**-21, atol=0.0)
        spec = ModelSpec.from_config(checkpoint.config)
        decoder = load_model(checkpoint, spec, get_ops("cpu", reference=True), dtype=torch.float32, max_len=64)
    assert (feed(decoder, ids, [32]) - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("algorithm", ["NVFP4", "MXFP8"])
def test_4_and_8_bits_in_groups_by_modelopt_itself(tool: ModuleType, tmp_path: Path, algorithm: str) -> None:
    """To the bit what its own dequantizer makes of what it wrote. (It rounds no weights on a CPU before it packs them.)"""
    qtensor = importlib.import_module("modelopt.torch.quantization.qtensor")
    export(tool, calibrated(tool, f"{algorithm}_DEFAULT_CFG")[0], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    names = [name.removesuffix(".weight_scale") for name in tensors if name.endswith("weight_scale")]
    with Checkpoint.open(tmp_path) as checkpoint:
        for name in names:
            packed, more = tensors[f"{name}.weight"], {"scale": tensors[f"{name}.weight_scale"]}
            if algorithm == "NVFP4":
                more |= {"double_scale": tensors[f"{name}.weight_scale_2"], "block_sizes": {-1: 16}}
            shape = (packed.shape[0], packed.shape[1] * (2 if algorithm == "NVFP4" else 1))
            own = getattr(qtensor, f"{algorithm}QTensor")(shape, torch.float32, packed).dequantize(torch.float32, **more)
            found = checkpoint.weight(name)
            assert isinstance(found, QuantTensor) and torch.equal(found.dequantize(), own)
    assert len(names) == 14
