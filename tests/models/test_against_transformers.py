"""Every architecture and every kind of rotary embedding against transformers in float32, whole, in chunks and token by token."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from appliance.config import EngineConfig
from appliance.memory.devices import DeviceInfo
from appliance.memory.planner import make_plan
from kernels.cpu import backend
from kernels.ops import KVCache, Ops, PagedBatch, StateCache, get_ops
from models.decoder import Decoder
from models.loader import load_model
from models.spec import ModelSpec
from quant.checkpoint import Checkpoint
from tests import warm
from tests.kernels.paged import wanting

BASE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PARTIAL = {"original_max_position_embeddings": 16}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn-mscale": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 0.9,
        "beta_fast": 20, "beta_slow": 2,
    },
}  # fmt: skip


def longrope(rotary: int) -> dict[str, Any]:
    short, long = [1.0 + 0.1 * i for i in range(rotary // 2)], [2.0 + 0.5 * i for i in range(rotary // 2)]
    return {"rope_type": "longrope", "short_factor": short, "long_factor": long}


GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 12, "num_hidden_layers": 4}
GEMMA4 = {
    "head_dim": 16, "global_head_dim": 24, "num_global_key_value_heads": 1, "attention_k_eq_v": True, "sliding_window": 12,
    "hidden_size_per_layer_input": 0, "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}  # fmt: skip
TOLD = {
    **GEMMA4, "attention_k_eq_v": False, "hidden_size_per_layer_input": 12, "vocab_size_per_layer_input": 97,
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": [*["sliding_attention", "full_attention"] * 2],
}  # fmt: skip
BESIDE = {"enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 20}
LOCAL = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 9000.0, "factor": 8.0},
}
VISION = {
    "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 7,
}  # fmt: skip
PICTURES = {"mm_tokens_per_image": 4, "vision_config": {"model_type": "siglip_vision_model", **VISION}}
PIXTRAL = {"vision_config": {"model_type": "pixtral", "head_dim": 8, **VISION}}
CLIP = {"vision_config": {"model_type": "clip_vision_model", "projection_dim": 8, "vocab_size": 99, **VISION}}
QWEN = {"depth": 1, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2, "patch_size": 7, "out_hidden_size": 48}
SCALED = {**ROPES["yarn-mscale"], "rope_theta": 5000.0, "llama_4_scaling_beta": 0.4}
HYBRID = {
    "layer_types": ["full_attention"] * 3, "num_local_experts": 0, "shared_intermediate_size": 56, "mamba_n_heads": 8,
    "embedding_multiplier": 4.0, "residual_multiplier": 0.3, "attention_multiplier": 0.5, "logits_scaling": 2.0,
}  # fmt: skip

DELTA = {
    "head_dim": 16, "linear_key_head_dim": 12, "linear_value_head_dim": 20, "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 900.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
}  # fmt: skip
EXPERTS = {
    "moe_intermediate_size": 20, "shared_expert_intermediate_size": 28, "num_experts": 6, "num_experts_per_tok": 3,
}  # fmt: skip
GPT_OSS = {
    "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_local_experts": 5, "num_experts_per_tok": 3,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False,
        "beta_fast": 2.0, "beta_slow": 0.5,
    },
}  # fmt: skip


OLMO3 = {
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        "full_attention": {**ROPES["yarn"], "rope_theta": 900.0, "attention_factor": 1.2},
    },
}  # fmt: skip
SPARSE = {"moe_intermediate_size": 28}


LIQUID = {
    "num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "conv"], "block_multiple_of": 24,
    "intermediate_size": 99,
}  # fmt: skip


LATENT = {
    "num_key_value_heads": 6, "q_lora_rank": 20, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12,
    "v_head_dim": 10, "moe_intermediate_size": 28, "n_routed_experts": 8, "num_experts_per_tok": 3,
}  # fmt: skip


def case(architecture: str, **config: Any) -> dict[str, Any]:
    return {"architecture": architecture, "config": {**BASE, **config}}


def with_text(architecture: str, beside: dict[str, Any], **text: Any) -> dict[str, Any]:
    """Of a model that reads pictures, too."""
    return {"architecture": f"{architecture}ForConditionalGeneration", "config": {"text_config": {**BASE, **text}, **beside}}


CASES = {
    "llama": case("LlamaForCausalLM"),
    "llama-tied-mha-bias": case(
        "LlamaForCausalLM", tie_word_embeddings=True, num_key_value_heads=6, attention_bias=True, mlp_bias=True
    ),
    "llama-head-dim": case("LlamaForCausalLM", head_dim=20, num_key_value_heads=1),
    **{f"llama-{name}": case("LlamaForCausalLM", rope_parameters={"rope_theta": 5000.0, **rope}) for name, rope in ROPES.items()},
    "llama-dynamic-beyond": case(
        "LlamaForCausalLM", max_position_embeddings=32, rope_parameters={"rope_theta": 5000.0, **ROPES["dynamic"]}
    ),
    "mistral-window": case("MistralForCausalLM", sliding_window=12),
    "mistral-full": case("MistralForCausalLM", sliding_window=None),
    "qwen2": case("Qwen2ForCausalLM", tie_word_embeddings=True),
    "qwen2-window": case("Qwen2ForCausalLM", use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen3": case("Qwen3ForCausalLM", head_dim=16),
    "qwen3-bias": case("Qwen3ForCausalLM", head_dim=16, attention_bias=True, tie_word_embeddings=True),
    "qwen2-moe": case(
        "Qwen2MoeForCausalLM",
        moe_intermediate_size=20,
        shared_expert_intermediate_size=52,
        num_experts=7,
        num_experts_per_tok=3,
        use_sliding_window=True,
        sliding_window=9,
        max_window_layers=2,
    ),
    "qwen2-moe-tied": case(
        "Qwen2MoeForCausalLM",
        moe_intermediate_size=36,
        shared_expert_intermediate_size=12,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        qkv_bias=False,
        tie_word_embeddings=True,
    ),
    "qwen2-moe-steps": case(
        "Qwen2MoeForCausalLM",
        **SPARSE,
        num_hidden_layers=5,
        decoder_sparse_step=2,
        num_experts=6,
        shared_expert_intermediate_size=20,
    ),
    "qwen3-moe-some": case(
        "Qwen3MoeForCausalLM", **SPARSE, mlp_only_layers=[1], num_experts=6, num_experts_per_tok=2, norm_topk_prob=True
    ),
    "qwen3-moe": case("Qwen3MoeForCausalLM", moe_intermediate_size=36, num_experts=7, num_experts_per_tok=3, norm_topk_prob=True),
    "qwen3-moe-all": case(
        "Qwen3MoeForCausalLM",
        head_dim=16,
        attention_bias=True,
        tie_word_embeddings=True,
        moe_intermediate_size=20,
        num_experts=4,
        num_experts_per_tok=4,
        use_sliding_window=True,
        sliding_window=11,
    ),
    "mixtral": case("MixtralForCausalLM", num_local_experts=5),
    "mixtral-one-window": case("MixtralForCausalLM", num_local_experts=3, num_experts_per_tok=1, sliding_window=12),
    "glm4-moe": case(
        "Glm4MoeForCausalLM",
        **SPARSE,
        head_dim=16,
        n_routed_experts=6,
        n_shared_experts=1,
        num_experts_per_tok=2,
        routed_scaling_factor=1.8,
        num_hidden_layers=4,
        first_k_dense_replace=2,
        use_qk_norm=True,
    ),
    "glm4-moe-groups": case(
        "Glm4MoeForCausalLM",
        **SPARSE,
        head_dim=16,
        n_routed_experts=12,
        n_shared_experts=2,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        norm_topk_prob=False,
        first_k_dense_replace=0,
        attention_bias=True,
        rope_parameters={"rope_theta": 900.0, "partial_rotary_factor": 0.25},
    ),
    "glm4v-moe-text-of-pictures": with_text(
        "Glm4vMoe",
        {"vision_config": {**QWEN, "num_position_embeddings": 16}},
        **SPARSE,
        head_dim=16,
        n_routed_experts=5,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 900.0, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5},
    ),
    "solar-open": case(
        "SolarOpenForCausalLM", **SPARSE, head_dim=12, n_routed_experts=6, num_experts_per_tok=2, attention_bias=True
    ),
    "dots1": case(
        "Dots1ForCausalLM",
        **SPARSE,
        n_routed_experts=6,
        n_shared_experts=2,
        num_experts_per_tok=3,
        first_k_dense_replace=1,
        routed_scaling_factor=0.7,
        sliding_window=9,
        max_window_layers=1,
        attention_bias=True,
    ),
    "ernie4.5-moe": case("Ernie4_5_MoeForCausalLM", **SPARSE, moe_num_experts=7, moe_k=3),
    "ernie4.5-moe-range": case(
        "Ernie4_5_MoeForCausalLM",
        **SPARSE,
        num_hidden_layers=7,
        moe_num_experts=5,
        moe_k=2,
        moe_num_shared_experts=0,
        moe_layer_start_index=1,
        moe_layer_end_index=5,
        moe_layer_interval=2,
        moe_norm_min=0.7,
        tie_word_embeddings=False,
    ),
    "glm": case("GlmForCausalLM", head_dim=16),
    "glm-whole": case("GlmForCausalLM", head_dim=8, partial_rotary_factor=1.0, attention_bias=False, num_key_value_heads=3),
    "glm4": case("Glm4ForCausalLM", head_dim=20, rope_parameters={"rope_theta": 900.0, "partial_rotary_factor": 0.4}),
    "glm4-yarn": case(
        "Glm4ForCausalLM", head_dim=16, rope_parameters={**ROPES["yarn"], "rope_theta": 900.0, "partial_rotary_factor": 0.5}
    ),
    "ernie4.5": case("Ernie4_5ForCausalLM"),
    "ernie4.5-bias": case("Ernie4_5ForCausalLM", head_dim=20, use_bias=True, tie_word_embeddings=False),
    "gpt-oss": case("GptOssForCausalLM", **GPT_OSS, sliding_window=12),
    "gpt-oss-one": case(
        "GptOssForCausalLM",
        **{**GPT_OSS, "hidden_size": 96, "intermediate_size": 32, "num_experts_per_tok": 1, "num_key_value_heads": 1},
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        sliding_window=5,
        swiglu_limit=1.5,
        swiglu_alpha=1.1,
        attention_bias=False,
    ),
    "phi3": case("Phi3ForCausalLM", sliding_window=20),
    "phi3-partial": case(
        "Phi3ForCausalLM",
        head_dim=16,
        partial_rotary_factor=0.75,
        rope_parameters={"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.75},
    ),
    "phi3-long": case("Phi3ForCausalLM", **PARTIAL, rope_parameters={"rope_theta": 1e4, **longrope(8)}),
    "phi3-short": case(
        "Phi3ForCausalLM",
        original_max_position_embeddings=64,
        max_position_embeddings=128,
        rope_parameters={"rope_theta": 1e4, **longrope(8)},
    ),
    "gemma2": case("Gemma2ForCausalLM", **GEMMA, attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
    "gemma2-uncapped": case(
        "Gemma2ForCausalLM",
        **GEMMA,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        tie_word_embeddings=False,
        attention_bias=True,
    ),
    "gemma3": case("Gemma3ForCausalLM", **GEMMA, rope_parameters=LOCAL, sliding_window_pattern=3),
    "gemma3-types": case(
        "Gemma3ForCausalLM",
        **{**GEMMA, "head_dim": 20},
        final_logit_softcapping=4.0,
        num_key_value_heads=1,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    ),
    "gemma3-text-of-pictures": with_text("Gemma3", PICTURES, **GEMMA),
    "gemma4": case("Gemma4ForCausalLM", **GEMMA4, final_logit_softcapping=4.0),
    "gemma4-own-values": case(
        "Gemma4ForCausalLM",
        **{**GEMMA4, "attention_k_eq_v": False, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        attention_bias=True,
        num_key_value_heads=3,
        tie_word_embeddings=False,
        rope_parameters=LOCAL,
    ),
    "gemma4-told": case("Gemma4ForCausalLM", **TOLD, final_logit_softcapping=4.0, use_double_wide_mlp=True),
    "gemma4-told-text-of-pictures": with_text(
        "Gemma4", {"vision_config": {**VISION, "head_dim": 8}}, **{**TOLD, "num_kv_shared_layers": 1}
    ),
    "gemma4-moe": case("Gemma4ForCausalLM", **GEMMA4, **BESIDE, final_logit_softcapping=4.0),
    "gemma4-moe-text-of-pictures": with_text(
        "Gemma4", {"vision_config": {**VISION, "head_dim": 8}}, **{**GEMMA4, "num_global_key_value_heads": None}, **BESIDE
    ),
    "gemma4-text-of-pictures": with_text("Gemma4", {"vision_config": {**VISION, "head_dim": 8}}, **GEMMA4),
    "granite": case(
        "GraniteForCausalLM",
        embedding_multiplier=5.0,
        residual_multiplier=0.3,
        attention_multiplier=0.6,
        logits_scaling=3.0,
        attention_bias=True,
        mlp_bias=True,
        rms_norm_eps=1e-2,
    ),
    "granite-tied": case("GraniteForCausalLM", tie_word_embeddings=True, residual_multiplier=0.22),
    "granitemoe": case(
        "GraniteMoeForCausalLM",
        num_local_experts=6,
        num_experts_per_tok=3,
        embedding_multiplier=5.0,
        residual_multiplier=0.3,
        attention_multiplier=0.6,
        logits_scaling=3.0,
        attention_bias=True,
        rms_norm_eps=1e-2,
    ),
    "granitemoe-tied": case("GraniteMoeForCausalLM", num_local_experts=3, tie_word_embeddings=True, residual_multiplier=0.22),
    "granite4": case("GraniteMoeHybridForCausalLM", **HYBRID, position_embedding_type="rope"),
    "granite4-unrotated": case("GraniteMoeHybridForCausalLM", **HYBRID, tie_word_embeddings=True, attention_bias=True),
    "seed-oss": case("SeedOssForCausalLM", head_dim=20, attention_out_bias=True, mlp_bias=True),
    "smollm3": case("SmolLM3ForCausalLM", num_hidden_layers=5, no_rope_layer_interval=2),
    "smollm3-list": case(
        "SmolLM3ForCausalLM", no_rope_layers=[0, 1, 0], use_sliding_window=True, sliding_window=9, tie_word_embeddings=False
    ),
    "smollm3-types": case(
        "SmolLM3ForCausalLM",
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        no_rope_layers=[1, 0, 0],
        use_sliding_window=True,
        sliding_window=9,
    ),
    "olmo2": case("Olmo2ForCausalLM"),
    "olmo2-bias": case("Olmo2ForCausalLM", num_key_value_heads=6, attention_bias=True, tie_word_embeddings=True),
    "olmo3": case("Olmo3ForCausalLM", **OLMO3, sliding_window=12, num_hidden_layers=5),
    "olmo3-types": case(
        "Olmo3ForCausalLM", **OLMO3, sliding_window=9, layer_types=["full_attention", "sliding_attention", "full_attention"]
    ),
    "olmoe": case("OlmoeForCausalLM", num_experts=7, num_experts_per_tok=3),
    "olmoe-normalized": case("OlmoeForCausalLM", num_experts=4, num_experts_per_tok=2, norm_topk_prob=True, attention_bias=True),
    "exaone4": case("Exaone4ForCausalLM", num_hidden_layers=5, sliding_window=9, tie_word_embeddings=True),
    "exaone4-rotated": case(
        "Exaone4ForCausalLM",
        head_dim=20,
        sliding_window=None,
        layer_types=["full_attention"] * 3,
        rope_parameters={"rope_theta": 5000.0, **ROPES["llama3"]},
    ),
    "exaone-moe": case(
        "ExaoneMoeForCausalLM", **SPARSE, sliding_window=9, num_hidden_layers=5, num_experts=6, num_experts_per_tok=2
    ),
    "exaone-moe-groups": case(
        "ExaoneMoeForCausalLM",
        **SPARSE,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        mlp_layer_types=["sparse", "dense", "sparse"],
        num_experts=8,
        num_experts_per_tok=3,
        num_shared_experts=2,
        n_group=4,
        topk_group=2,
        norm_topk_prob=False,
    ),
    "hunyuan": case("HunYuanDenseV1ForCausalLM", head_dim=16, rope_parameters={"rope_theta": 900.0, "rope_type": "default"}),
    "hunyuan-alpha": case(
        "HunYuanDenseV1ForCausalLM",
        head_dim=8,
        attention_bias=True,
        tie_word_embeddings=True,
        rope_parameters={**ROPES["dynamic"], "rope_theta": 900.0, "alpha": 50.0, "beta_fast": 32, "mscale": 1.0},
    ),
    "hunyuan-moe": case(
        "HunYuanMoEV1ForCausalLM",
        head_dim=8,
        num_experts=6,
        moe_topk=[2, 2, 2],
        rope_parameters={"rope_type": "dynamic", "factor": 1.0, "rope_theta": 900.0, "alpha": 50.0},
    ),
    "hunyuan-moe-one": case("HunYuanMoEV1ForCausalLM", head_dim=12, num_experts=3, moe_topk=1, tie_word_embeddings=True),
    "minimax-m2": case("MiniMaxM2ForCausalLM", head_dim=16, num_local_experts=6, num_experts_per_tok=3, rotary_dim=8),
    "minimax-m2-whole": case(
        "MiniMaxM2ForCausalLM", head_dim=8, num_local_experts=4, num_experts_per_tok=1, tie_word_embeddings=True
    ),
    "arcee": case("ArceeForCausalLM", head_dim=12, mlp_bias=True, attention_bias=True),
    "arcee-yarn": case("ArceeForCausalLM", tie_word_embeddings=True, rope_parameters={**ROPES["yarn"], "rope_theta": 900.0}),
    "apertus": case("ApertusForCausalLM"),
    "apertus-tied": case(
        "ApertusForCausalLM",
        attention_bias=True,
        tie_word_embeddings=True,
        rope_parameters={**ROPES["llama3"], "rope_theta": 900.0},
    ),
    "ministral3": case("Ministral3ForCausalLM", head_dim=16, rope_parameters=SCALED),
    "mistral3": with_text("Mistral3", PIXTRAL, model_type="mistral", head_dim=20, sliding_window=None),
    "mistral3-of-ministral3": with_text("Mistral3", PIXTRAL, model_type="ministral3", head_dim=8, rope_parameters=SCALED),
    "llava": with_text("Llava", CLIP, model_type="llama"),
    "llava-of-mistral": with_text("Llava", CLIP, model_type="mistral", sliding_window=12),
    "vl-qwen2": with_text(
        "Qwen2VL",
        {"vision_config": {**QWEN, "embed_dim": 16, "hidden_size": 48}},
        rope_parameters={"rope_type": "default", "rope_theta": 900.0, "mrope_section": [1, 1, 2]},
    ),
    "vl-qwen2.5": with_text(
        "Qwen2_5_VL",
        {"vision_config": QWEN, "tie_word_embeddings": True},
        rope_parameters={**ROPES["yarn"], "rope_theta": 900.0, "mrope_section": [1, 1, 2]},
        use_sliding_window=True,
        sliding_window=9,
        max_window_layers=1,
    ),
    "vl-qwen3": with_text(
        "Qwen3VL",
        {"vision_config": {**QWEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}},
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 900.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    ),
    "vl-qwen3-moe": with_text(
        "Qwen3VLMoe",
        {"vision_config": {**QWEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}},
        **EXPERTS,
        head_dim=12,
        mlp_only_layers=[1],
    ),
    "qwen3.5": case("Qwen3_5ForCausalLM", **DELTA),
    "qwen3.5-bias": case(
        "Qwen3_5ForCausalLM",
        **{**DELTA, "linear_num_value_heads": 2, "linear_conv_kernel_dim": 2, "layer_types": None},
        attention_bias=True,
        tie_word_embeddings=True,
    ),
    "qwen3.5-of-pictures": with_text(
        "Qwen3_5",
        {"vision_config": {**QWEN, "num_position_embeddings": 16}},
        **{**DELTA, "linear_key_head_dim": 16, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 5},
    ),
    "qwen3.5-moe": case("Qwen3_5MoeForCausalLM", **DELTA, **EXPERTS),
    "qwen3.5-moe-of-pictures": with_text(
        "Qwen3_5Moe", {"vision_config": {**QWEN, "num_position_embeddings": 16}, "tie_word_embeddings": True}, **DELTA, **EXPERTS
    ),
    "qwen3-next": case("Qwen3NextForCausalLM", **DELTA, **EXPERTS),
    "qwen3-next-unnormalized": case("Qwen3NextForCausalLM", **DELTA, **EXPERTS, norm_topk_prob=False, attention_bias=True),
    "deepseek-v3": case(
        "DeepseekV3ForCausalLM",
        **LATENT,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        rope_parameters={**ROPES["yarn-mscale"], "rope_theta": 5000.0},
    ),
    "deepseek-v3-dense": case(
        "DeepseekV3ForCausalLM", **{**LATENT, "q_lora_rank": None}, first_k_dense_replace=3, rope_interleave=False
    ),
    "deepseek-v2": case(
        "DeepseekV2ForCausalLM",
        **LATENT,
        n_group=4,
        topk_group=2,
        topk_method="group_limited_greedy",
        first_k_dense_replace=1,
        routed_scaling_factor=3.0,
        rope_parameters={**ROPES["yarn-mscale"], "rope_theta": 5000.0},
    ),
    "deepseek-v2-lite": case("DeepseekV2ForCausalLM", **{**LATENT, "q_lora_rank": None}, first_k_dense_replace=1),
    "lfm2": case("Lfm2ForCausalLM", **LIQUID, block_ffn_dim_multiplier=1.3),
    "lfm2-untied": case(
        "Lfm2ForCausalLM",
        **LIQUID,
        conv_L_cache=4,
        block_auto_adjust_ff_dim=False,
        tie_embedding=False,
        rope_parameters={"rope_type": "default", "rope_theta": 900.0},
    ),
    "lfm2-moe": case(
        "Lfm2MoeForCausalLM", **LIQUID, **SPARSE, num_dense_layers=1, num_experts=6, num_experts_per_tok=3, conv_L_cache=2
    ),
    "lfm2-moe-all": case(
        "Lfm2MoeForCausalLM",
        **LIQUID,
        **SPARSE,
        num_dense_layers=0,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        routed_scaling_factor=1.7,
    ),
    "glm4-moe-lite": case("Glm4MoeLiteForCausalLM", **LATENT, attention_bias=True, mlp_layer_types=["sparse", "dense", "sparse"]),
}
DENSE = ("gemma", "qwen3", "granite", "deepseek-v3-dense")
CHOOSING = (
    "gemma4-moe",
    "gemma4-moe-text-of-pictures",
    "granitemoe",
    "granitemoe-tied",
    "qwen3-moe",
    "qwen3-moe-some",
    "qwen3.5-moe",
    "qwen3.5-moe-of-pictures",
    "qwen3-next",
    "qwen3-next-unnormalized",
)  # experts


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made in another working directory and without this repository on the path: transformers looks for a package ``kernels``."""
    folder = tmp_path_factory.mktemp("oracle")
    script = (Path(__file__).parent / "oracle.py").read_text()
    done = warm.run("-c", script, str(folder), input=json.dumps(CASES), cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def load(
    folder: Path, name: str, ops: Ops, dtype: torch.dtype = torch.float32, max_len: int | None = None, **options: Any
) -> tuple[Decoder, torch.Tensor, torch.Tensor]:
    with Checkpoint.open(folder / name) as checkpoint:
        spec = ModelSpec.from_config(checkpoint.config)
        expected = load_file(folder / f"{name}.expected.safetensors")
        # Scaling that depends on the length is chosen by max_len here, by the length of the sequence there: make them one.
        decoder = load_model(checkpoint, spec, ops, dtype=dtype, max_len=max_len or len(expected["ids"]), **options)
    return decoder, expected["ids"], expected["logits"]


def feed(decoder: Decoder, ids: torch.Tensor, chunks: list[int], block_size: int = 8, *, last: int | None = None) -> torch.Tensor:
    """Logits [T, V] of the sequence fed in chunks, over a cache of shuffled blocks whose unused slots are poison.

    ``last``: of so many tokens of the last chunk alone.
    """
    spec, total, device = decoder.spec, len(ids), decoder.ops.device
    count = -(-total // block_size)
    table = torch.randperm(count + 3, generator=torch.Generator().manual_seed(total))[:count].tolist()
    shapes = [(count + 3, block_size, heads.count, heads.size) for heads in spec.by_layer if not heads.shared]
    empty = [[torch.full(shape, float("nan"), dtype=decoder.dtype, device=device) for _ in "kv"] for shape in shapes]
    caches = [KVCache(k, k if spec.latent else v) for k, v in empty]
    states = poisoned_states(spec, 3)
    forward, out, start = decoder.bind(caches, states=states, max_tokens=max(chunks)), [], 0
    for length in chunks:
        end = start + length
        positions = torch.arange(start, end)
        slots = torch.tensor([table[p // block_size] * block_size + p % block_size for p in positions.tolist()])
        used = table[: -(-end // block_size)]
        batch = PagedBatch(
            positions=positions.to(device),
            slots=slots.to(device),
            query_starts=torch.tensor([0, length], dtype=torch.int32, device=device),
            seq_lens=torch.tensor([end], dtype=torch.int32, device=device),
            block_tables=torch.tensor([used], dtype=torch.int32, device=device),
            max_query=length,
            max_seq=end,
            states=torch.tensor([1], dtype=torch.int32) if states else None,
        )
        if last is not None:
            batch = wanting(batch, [last if end == total else 0])
        hidden = forward(ids[start:end].to(device), batch)
        logits = torch.full((len(hidden), spec.vocab), float("nan"), device=device)
        out.append(decoder.logits(hidden, logits).cpu())
        start = end
    assert start == total
    return torch.cat(out)


def poisoned_states(spec: ModelSpec, places: int) -> list[StateCache]:
    """One for each layer that has such."""
    net = spec.recurrent
    if net is None:
        return []
    shapes = net.conv_shape, net.state_shape
    return [StateCache(*(torch.full((places, *shape), float("nan")) for shape in shapes)) for _ in range(sum(spec.linear))]


def test_experts_that_were_published_with_inputs_first(models: Path, tmp_path: Path) -> None:
    """As Qwen3-VL's are; transformers reads both, and writes outputs first."""
    shutil.copytree(models / "vl-qwen3-moe", tmp_path / "vl-qwen3-moe")
    shutil.copy(models / "vl-qwen3-moe.expected.safetensors", tmp_path)
    path = tmp_path / "vl-qwen3-moe" / "model.safetensors"
    tensors = load_file(path)
    stacks = [name for name in tensors if ".experts." in name]
    assert len(stacks) == 4 and all(tensors[name].dim() == 3 for name in stacks)
    save_file(tensors | {name: tensors[name].transpose(1, 2).contiguous() for name in stacks}, path)
    decoder, ids, logits = load(tmp_path, "vl-qwen3-moe", get_ops("cpu", reference=True))
    assert (feed(decoder, ids, [len(ids)]) - logits).abs().max() < 2e-4


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "cpu"])
@pytest.mark.parametrize("name", list(CASES))
def test_logits(models: Path, name: str, reference: bool) -> None:
    decoder, ids, logits = load(models, name, get_ops("cpu", reference=reference))
    total = len(ids)
    for chunks in ([total], [17, total - 17], [8, 8, 9, total - 25], [total - 5, *[1] * 5]):
        found = feed(decoder, ids, chunks)
        assert (found - logits).abs().max() < 2e-4, (name, chunks)


@pytest.mark.parametrize("kind", ["reference", "torch", "native"])
@pytest.mark.parametrize("name", ["gemma4-told", "gemma4-told-text-of-pictures"])
def test_logits_of_last_rows_alone(models: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "native" and backend.native() is None:
        pytest.skip("the native extension is not built")
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "auto" if kind == "native" else "torch")
    decoder, ids, logits = load(models, name, get_ops("cpu", reference=kind == "reference"), lm_head_dtype="model")
    for chunks, last in (([len(ids)], 1), ([len(ids)], 4), ([17, len(ids) - 17], 1), ([8, 8, len(ids) - 17, 1], 1)):
        found = feed(decoder, ids, chunks, last=last)
        assert len(found) == last and (found - logits[-last:]).abs().max() < 2e-4, (name, chunks)


@pytest.mark.parametrize("kind", ["reference", "torch", "native"])
@pytest.mark.parametrize(
    "name",
    [name for name in CASES if name.startswith(DENSE) and name not in CHOOSING],
)
def test_bfloat16_is_as_close_as_theirs(models: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To float32, in the mean over all logits: norms multiply by 1 + weight before anything is rounded.

    Not where experts are chosen: rounding changes a choice now and then, here or there, and with it all that follows.
    """
    if kind == "native" and backend.native() is None:
        pytest.skip("the native extension is not built")
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "auto" if kind == "native" else "torch")
    ops, expected = get_ops("cpu", reference=kind == "reference"), load_file(models / f"{name}.expected.safetensors")
    decoder, ids, logits = load(models, name, ops, torch.bfloat16, activation="bf16", lm_head_dtype="model")
    found = feed(decoder, ids, [17, len(ids) - 17])
    ours, theirs = ((one - logits).square().mean().sqrt() for one in (found, expected["rounded"]))
    assert ours < 1.15 * theirs, (float(ours), float(theirs))


@pytest.mark.skipif(backend.native() is None, reason="the native extension is not built")
def test_queries_that_are_not_scaled_yet_need_no_operators_one_by_one(models: Path) -> None:
    for max_len in (16, 17):
        decoder, ids, logits = load(models, "ministral3", get_ops("cpu"), max_len=max_len)
        bound = decoder.bind([KVCache(torch.empty(2, 8, 2, 16), torch.empty(2, 8, 2, 16))] * 3, max_tokens=8)
        assert isinstance(bound, partial) == (max_len > 16)
        found = feed(decoder, ids[:max_len], [9, max_len - 9])
        assert (found - logits[:max_len]).abs().max() < 2e-4


@pytest.mark.parametrize("name", list(CASES))
def test_every_byte_is_planned(models: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "torch")
    decoder, ids, _ = load(models, name, get_ops("cpu"), lm_head_dtype="model")
    config = EngineConfig(max_model_len=len(ids), dtype="float32", lm_head_dtype="model")
    plan = make_plan(models / name, config, DeviceInfo("cpu", "some CPU", 8 << 30, 8 << 30))
    assert plan.weight_bytes + plan.scratch["positions"] == decoder.nbytes


def test_the_comparison_can_fail(models: Path) -> None:
    """The expected logits are no near-constant: another model's are far away."""
    names = ("mistral-window", "mistral-full", "gemma2", "gemma3")
    logits = {name: load_file(models / f"{name}.expected.safetensors")["logits"] for name in names}
    assert all(one.std() > 0.5 for one in logits.values())
    assert (logits["mistral-window"] - logits["mistral-full"]).abs().max() > 0.5
