"""Liquid's LFM2 as it is published: what is read of config.json, names and formats of its weights, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from appliance.config import EngineConfig
from appliance.memory.devices import DeviceInfo
from appliance.memory.planner import make_plan
from appliance.quantize.job import check_kind
from models.conv import ShortConv
from models.spec import ModelSpec
from quant.errors import InputError
from quant.headers import CheckpointIndex
from quant.scheme import read_scheme
from tests.memory.published import VARIANTS, Tensors, dense, fill, write_headers
from tests.memory.test_planner import compare, kind  # noqa: F401

LFM2_1_2B: dict[str, Any] = {
    "architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2", "block_auto_adjust_ff_dim": True, "block_dim": 2048,
    "block_ff_dim": 12288, "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 256, "block_norm_eps": 1e-5,
    "block_use_swiglu": True, "bos_token_id": 1, "conv_L_cache": 3, "conv_bias": False, "conv_dim": 2048, "conv_dim_out": 2048,
    "eos_token_id": 7, "full_attn_idxs": [2, 5, 8, 10, 12, 14], "hidden_size": 2048, "max_position_embeddings": 128000,
    "norm_eps": 1e-5, "num_attention_heads": 32, "num_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "pad_token_id": 0, "rope_theta": 1e6, "torch_dtype": "bfloat16", "use_pos_enc": True, "vocab_size": 65536,
}  # fmt: skip
LFM2_8B_A1B: dict[str, Any] = {
    "architectures": ["Lfm2MoeForCausalLM"], "model_type": "lfm2_moe", "bos_token_id": 1, "conv_L_cache": 3, "conv_bias": False,
    "dtype": "bfloat16", "eos_token_id": 7, "hidden_size": 2048, "intermediate_size": 7168, "max_position_embeddings": 128000,
    "layer_types": ["full_attention" if layer in (2, 6, 10, 14, 18, 21) else "conv" for layer in range(24)],
    "moe_intermediate_size": 1792, "norm_eps": 1e-5, "norm_topk_prob": True, "num_attention_heads": 32, "num_dense_layers": 2,
    "num_experts": 32, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8, "pad_token_id": 0,
    "rope_theta": 1e6, "routed_scaling_factor": 1.0, "use_expert_bias": True, "vocab_size": 65536,
}  # fmt: skip
SMALL = LFM2_1_2B | {
    "hidden_size": 256, "block_ff_dim": 600, "block_multiple_of": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 3, "full_attn_idxs": [1], "vocab_size": 300, "max_position_embeddings": 128,
}  # fmt: skip
SMALL_MOE = LFM2_8B_A1B | {
    "hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "num_experts": 5,
    "num_experts_per_tok": 2, "num_dense_layers": 1, "vocab_size": 300, "max_position_embeddings": 128,
}  # fmt: skip


def written(folder: Path, config: dict[str, Any], variant: str) -> Path:
    """Under the names that it is published with, which what is left alone is called by, too."""
    make, group, quantization = VARIANTS[variant]
    hidden, moe = 256, "num_experts" in config
    tensors: Tensors = {"model.embed_tokens.weight": ("BF16", (300, hidden)), "model.embedding_norm.weight": ("BF16", (hidden,))}
    for layer in range(3):
        prefix, linears = f"model.layers.{layer}", {}
        tensors |= {f"{prefix}.{name}.weight": ("BF16", (hidden,)) for name in ("operator_norm", "ffn_norm")}
        if layer == 1:
            linears = {"self_attn.q_proj": (256, hidden), "self_attn.k_proj": (128, hidden), "self_attn.v_proj": (128, hidden)}
            linears["self_attn.out_proj"] = hidden, 256
            tensors |= {f"{prefix}.self_attn.{name}_layernorm.weight": ("BF16", (64,)) for name in "qk"}
        else:
            tensors |= dense(f"{prefix}.conv.in_proj", 3 * hidden, hidden, 0)
            linears["conv.out_proj"] = hidden, hidden
            tensors[f"{prefix}.conv.conv.weight"] = "BF16", (hidden, 1, 3)
        inner = 128 if moe and layer else 384 if moe else 512
        for mlp in [f"feed_forward.experts.{number}" for number in range(5)] if moe and layer else ["feed_forward"]:
            linears |= {f"{mlp}.w1": (inner, hidden), f"{mlp}.w3": (inner, hidden), f"{mlp}.w2": (hidden, inner)}
        if moe and layer:
            tensors |= dense(f"{prefix}.feed_forward.gate", 5, hidden, 0)
            tensors[f"{prefix}.feed_forward.expert_bias"] = "F32", (5,)
        for name, (N, K) in linears.items():
            alone = layer == 0 and name.endswith(".w2")
            tensors |= (dense if alone else make)(f"{prefix}.{name}", N, K, group)
    if quantization is not None:
        key = "ignore" if "config_groups" in quantization else "modules_to_not_convert"
        names = ["lm_head", "model.layers.0.feed_forward.w2", *(f"model.layers.{layer}.conv.in_proj" for layer in (0, 2))]
        gates = [f"model.layers.{layer}.feed_forward.gate" for layer in (1, 2)] if moe else []
        config = {**config, "quantization_config": {**quantization, key: names + gates}}
    return fill(write_headers(folder, tensors, config), variant)


@pytest.mark.parametrize("config", [SMALL, SMALL_MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("variant", ["none", "awq", "ct-w4a16", "ct-w8a8"])
def test_what_is_planned_is_what_the_loader_holds(tmp_path: Path, variant: str, config: dict[str, Any], kind: str) -> None:  # noqa: F811
    plan = compare(written(tmp_path, config, variant), kind)
    assert plan.weights["conv"] > plan.weights["attention"] > 0
    assert plan.sequence_bytes == 2 * 4 * 2 * 256 and plan.kv.layers == 1


@pytest.mark.parametrize("variant", ["awq", "ct-w4a16"])
def test_what_a_config_leaves_alone_by_its_published_name(tmp_path: Path, variant: str) -> None:
    index = CheckpointIndex.open(written(tmp_path, SMALL, variant))
    scheme = read_scheme(index)[1]
    found = {layer: scheme.for_module(f"model.layers.{layer}.mlp.down_proj").quantized for layer in range(3)}
    assert found == {0: False, 1: True, 2: True}


def test_as_published() -> None:
    """Liquid says 1.17 and 8.3 thousand millions of parameters."""
    dense_, moe = ModelSpec.from_config(LFM2_1_2B), ModelSpec.from_config(LFM2_8B_A1B)
    assert dense_.num_parameters == 1_170_340_608 and dense_.intermediate == 8192 and dense_.tie_embeddings
    assert dense_.conv == ShortConv(2048, 3) and [dense_.is_linear(layer) for layer in range(4)] == [True, True, False, True]
    attention, conv = 2048 * (2048 + 2 * 512 + 2048) + 2 * 64, 2048 * (3 * 2048 + 2048 + 3)
    experts, mlp = 32 * (3 * 2048 * 1792 + 2048 + 1), 3 * 2048 * 7168
    layers = 6 * attention + 18 * conv + 2 * mlp + 22 * experts + 24 * 2 * 2048
    assert moe.num_parameters == 65536 * 2048 + layers + 2048 == 8_339_930_560
    assert moe.mixture is not None and moe.mixture.dense_layers == (0, 1)
    assert moe.mixture.scores.sigmoid and moe.mixture.scores.least == 1e-6 and moe.max_len == 128000
    assert dense_.eos_token_ids == (7,) and dense_.eps == 1e-5 and dense_.rope.theta == 1e6
    assert dense_.recurrent is not None and dense_.recurrent.state_bytes == 4 * 2 * 2048


def test_layers_of_attention_alone() -> None:
    spec = ModelSpec.from_config({**LFM2_1_2B, "full_attn_idxs": list(range(16))})
    assert spec.conv is None and not any(spec.linear) and spec.attention_layers == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv_bias": True}, "conv_bias = True is not supported for Lfm2ForCausalLM"),
        ({"full_attn_idxs": [16]}, "full_attn_idxs is [16], expected numbers of the 16 layers"),
        ({"full_attn_idxs": []}, "none of 16 layers is one of full_attention"),
        ({"layer_types": ["conv", "mamba"]}, "layer_types must name conv or full_attention for each of 16 layers"),
        ({"conv_L_cache": 1}, "conv_L_cache is 1, expected an integer of at least 2"),
        ({"block_ff_dim": "many"}, "intermediate_size is 'many', expected an integer"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        ModelSpec.from_config({**LFM2_1_2B, **change})
    assert message in str(error.value)


def test_refused_on_cards_and_by_quantize(tmp_path: Path) -> None:
    directory = written(tmp_path, SMALL, "awq")
    with pytest.raises(InputError, match=r"no kernel for short convolutions \(Lfm2ForCausalLM\): --device cpu serves it"):
        make_plan(directory, EngineConfig(), DeviceInfo("cuda", "card", 80 << 30, 80 << 30, 90))
    with pytest.raises(InputError, match=r"m is a Lfm2ForCausalLM, whose layers this version serves and does not quantize"):
        check_kind(Path("m"), ModelSpec.from_config(LFM2_1_2B))
