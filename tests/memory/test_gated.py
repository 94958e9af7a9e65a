"""What a plan has for gate and up on a card, where no kernel multiplies them as it sums them up; and for attention on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from appliance.memory.activations import activation_bytes
from appliance.memory.demand import attention_workspace
from appliance.memory.modules import Machinery, layer_weights
from models.spec import ModelSpec
from quant.headers import CheckpointIndex
from quant.scheme import QuantScheme, read_scheme
from tests.tiny_model import Shape, make_checkpoint


@pytest.mark.parametrize(("group", "in_tiles"), [(32, True), (128, True), (16, False)])
def test_gate_and_up_in_float32(group: int, in_tiles: bool, tmp_path: Path) -> None:
    shape = Shape(hidden=256, mlp=512, head_dim=64, group=group)
    config, scheme = read_scheme(CheckpointIndex.open(make_checkpoint(tmp_path, shape=shape, tokenizer=False)))
    spec = ModelSpec.from_config(config)
    layers = list(layer_weights(spec, scheme))
    card, expanded = (Machinery(ops="triton", dtype=dtype, head_bits=None) for dtype in ("float16", "float32"))
    few, many = activation_bytes(spec, layers, card), 3 * 2 * shape.mlp + 8 * shape.mlp
    assert (few < many) == in_tiles
    assert activation_bytes(spec, layers, expanded) > 3 * 4 * shape.mlp + 8 * shape.mlp


def test_attention_of_torchs_operators(tmp_path: Path) -> None:
    """Eight partial results of 256 queries, three in float32 as they are merged; 512 widened keys, 64 scattered blocks."""
    shape = Shape(hidden=256, mlp=512, heads=4, kv_heads=2, head_dim=64)
    config, _ = read_scheme(CheckpointIndex.open(make_checkpoint(tmp_path, shape=shape, tokenizer=False)))
    spec = ModelSpec.from_config(config)
    torch = Machinery(ops="cpu", dtype="bfloat16", head_bits=None, block_size=32)
    partial = 8 * 256 * 4 * (64 * 2 + 4) + 3 * 256 * 4 * 4 * (64 + 8)
    assert attention_workspace(spec, torch) == partial + 512 * 2 * 64 * 12 + 2 * 64 * 32 * 2 * 64 * 2
    capped = partial + 8 * 256 * 4 * 64 * 2 + 512 * (8 * 256 * 4 + 4 * 4 * 64) + 4 * 256 * 4 * 64
    assert attention_workspace(replace(spec, cap=30.0), torch) == capped + 512 * 2 * 64 * 12 + 2 * 64 * 32 * 2 * 64 * 2
    assert attention_workspace(spec, Machinery(ops="cpu-native", dtype="bfloat16", head_bits=8)) == 0


def test_norms_of_what_is_added(tmp_path: Path) -> None:
    """Both residuals, the product that is normalized, the next norm, and what was multiplied."""
    shape = Shape(hidden=1024, mlp=128, heads=2, kv_heads=1, head_dim=64)
    config, scheme = read_scheme(CheckpointIndex.open(make_checkpoint(tmp_path, shape=shape, tokenizer=False)))
    spec = ModelSpec.from_config(config)
    layers, card = list(layer_weights(spec, scheme)), Machinery(ops="triton", dtype="float16", head_bits=None)
    assert activation_bytes(replace(spec, norms=("a", "b", "c")), layers, card) == 2 * (4 * 1024 + 128) + 24
    assert activation_bytes(spec, layers, card) < 2 * (4 * 1024 + 128)


def test_what_is_published_as_one_is_not_joined() -> None:
    """Phi-3's qkv_proj is as wide as Llama's three, which the loader makes one."""
    sizes = {
        "hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 128, "max_position_embeddings": 512, "torch_dtype": "bfloat16",
    }  # fmt: skip
    scheme, native = QuantScheme("none"), Machinery(ops="cpu-native", dtype="bfloat16", head_bits=8)
    found = []
    for name in ("LlamaForCausalLM", "Phi3ForCausalLM"):
        spec = ModelSpec.from_config({"architectures": [name], **sizes})
        found.append(activation_bytes(spec, list(layer_weights(spec, scheme)), native))
    assert found == [2 * (256 + (4 + 2 * 2) * 64 + 4 * 64) + 24] * 2  # the residual stream; q, k and v, and the result
