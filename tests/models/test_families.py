"""The families beside the plain ones, as they are published: what is read of their config.json, and what is refused of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from appliance.quantize.job import check_kind
from models.rope import cos_sin_table, query_scales
from models.rope_spec import RopeSpec
from models.spec import ModelSpec
from quant.errors import InputError

YARN = {
    "rope_type": "yarn",
    "type": "yarn",
    "rope_theta": 1e6,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def mistral(kind: str, hidden: int, inner: int, layers: int, *, top: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    text = {
        "model_type": kind, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 131072, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "sliding_window": None, **more,
    }  # fmt: skip
    whole = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "torch_dtype": "bfloat16"}
    return {**whole, "image_token_index": 10, "vision_config": {"hidden_size": 1024}, "text_config": text, **(top or {})}


def ministral(hidden: int, inner: int, layers: int, span: int, factor: float, **more: Any) -> dict[str, Any]:
    rope = {**YARN, "factor": factor, "original_max_position_embeddings": span, "llama_4_scaling_beta": 0.1}
    return mistral("ministral3", hidden, inner, layers, rope_parameters=rope, max_position_embeddings=int(span * factor), **more)


QWEN2_5_VL = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "hidden_size": 3584,
    "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 128000, "max_window_layers": 28, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": 32768,
    "use_sliding_window": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "eos_token_id": 151645,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vision_config": {"hidden_size": 1280, "depth": 32},
}  # fmt: skip
QWEN3_VL = {
    "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "tie_word_embeddings": True,
    "vision_config": {"hidden_size": 1024}, "text_config": {
        "model_type": "qwen3_vl_text", "dtype": "bfloat16", "hidden_size": 2560, "intermediate_size": 9728,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936, "rope_theta": 5e6,
        "max_position_embeddings": 262144, "rms_norm_eps": 1e-6, "attention_bias": False, "tie_word_embeddings": True,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    },
}  # fmt: skip
PIXTRAL = {
    "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "torch_dtype": "bfloat16",
    "vision_config": {"model_type": "pixtral"}, "text_config": {
        "model_type": "mistral", "hidden_size": 5120, "head_dim": 128, "intermediate_size": 14336, "num_hidden_layers": 40,
        "max_position_embeddings": 1024000, "rms_norm_eps": 1e-5, "rope_theta": 1e9, "sliding_window": None, "vocab_size": 131072,
    },
}  # fmt: skip
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "torch_dtype": "float16", "vision_config": {},
    "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064},
}  # fmt: skip
GRANITE = {
    "architectures": ["GraniteForCausalLM"], "hidden_size": 4096, "intermediate_size": 12800, "num_hidden_layers": 40,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 49159, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 1e7, "rope_scaling": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "attention_bias": False, "mlp_bias": False, "attention_multiplier": 0.0078125, "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22, "logits_scaling": 16.0,
}  # fmt: skip
GRANITE_MOE = {
    **GRANITE, "architectures": ["GraniteMoeForCausalLM"], "hidden_size": 1536, "intermediate_size": 512,
    "num_attention_heads": 24, "num_key_value_heads": 8, "num_hidden_layers": 32, "num_local_experts": 40,
    "num_experts_per_tok": 8, "vocab_size": 49155, "attention_multiplier": 0.015625, "logits_scaling": 6.0,
}  # fmt: skip
HYBRID = {
    **GRANITE, "architectures": ["GraniteMoeHybridForCausalLM"], "hidden_size": 2560, "shared_intermediate_size": 8192,
    "intermediate_size": 8192, "num_attention_heads": 40, "vocab_size": 100352, "attention_multiplier": 0.015625,
    "logits_scaling": 10, "layer_types": ["attention"] * 40, "num_local_experts": 0, "num_experts_per_tok": 0,
    "position_embedding_type": "rope",
}  # fmt: skip
SEED = {
    "architectures": ["SeedOssForCausalLM"], "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64,
    "num_attention_heads": 80, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 155136, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 524288, "rope_theta": 1e7, "rope_scaling": {"rope_type": "default"}, "attention_bias": True,
    "attention_out_bias": False, "mlp_bias": False, "pretraining_tp": 1, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
SMOL = {
    "architectures": ["SmolLM3ForCausalLM"], "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
    "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 128256, "rms_norm_eps": 1e-6, "rope_theta": 5e6,
    "max_position_embeddings": 65536, "max_window_layers": 28, "pretraining_tp": 2, "use_sliding_window": False,
    "sliding_window": None, "rope_scaling": None, "no_rope_layer_interval": 4, "torch_dtype": "bfloat16",
    "no_rope_layers": [1, 1, 1, 0] * 9, "layer_types": ["full_attention"] * 36,
}  # fmt: skip
QWEN2_MOE = {
    "architectures": ["Qwen2MoeForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944, "moe_intermediate_size": 2560,
    "shared_expert_intermediate_size": 20480, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 151936, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": 65536, "max_window_layers": 28, "use_sliding_window": False,
    "norm_topk_prob": False, "decoder_sparse_step": 1, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
GLM4_MOE = {
    "architectures": ["Glm4MoeForCausalLM"], "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408,
    "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "num_hidden_layers": 46, "num_attention_heads": 96,
    "num_key_value_heads": 8, "head_dim": 128, "partial_rotary_factor": 0.5, "use_qk_norm": False, "attention_bias": True,
    "num_nextn_predict_layers": 1, "vocab_size": 151552, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 1e6, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
ERNIE_MOE = {
    "architectures": ["Ernie4_5_MoeForCausalLM"], "hidden_size": 2560, "intermediate_size": 12288, "moe_intermediate_size": 1536,
    "moe_num_experts": 64, "moe_k": 6, "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "num_hidden_layers": 28,
    "num_attention_heads": 20, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 103424, "use_bias": False,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
DOTS = {
    "architectures": ["Dots1ForCausalLM"], "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408,
    "n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
    "vocab_size": 152064, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e7, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
OLMO2 = {
    "architectures": ["Olmo2ForCausalLM"], "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64,
    "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 100352, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6, "rope_theta": 5e5, "rope_scaling": None, "attention_bias": False, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "eos_token_id": 100257, "pad_token_id": 100277,
}  # fmt: skip
OLMO3 = {
    **OLMO2, "architectures": ["Olmo3ForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 100278, "max_position_embeddings": 65536,
    "sliding_window": 4096, "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8, "rope_scaling": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "attention_factor": 1.2079441541679836,
        "beta_fast": 32, "beta_slow": 1,
    },
}  # fmt: skip
OLMOE = {
    "architectures": ["OlmoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
    "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 50304, "max_position_embeddings": 4096,
    "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False, "clip_qkv": None, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
EXAONE4 = {
    "architectures": ["Exaone4ForCausalLM"], "hidden_size": 5120, "intermediate_size": 27392, "num_hidden_layers": 64,
    "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 102400, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": 4096, "sliding_window_pattern": "LLLG",
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 16, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "rope_scaling": {
        "rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
EXAONE4_SMALL = {
    **EXAONE4, "hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 30, "num_attention_heads": 32, "head_dim": 64,
    "max_position_embeddings": 65536, "sliding_window": None, "sliding_window_pattern": None, "tie_word_embeddings": True,
    "layer_types": ["full_attention"] * 30,
}  # fmt: skip
EXAONE_MOE = {
    **EXAONE4, "architectures": ["ExaoneMoeForCausalLM"], "num_hidden_layers": 4, "layer_types": None,
    "sliding_window_pattern": 4,
    "moe_intermediate_size": 2048, "num_experts": 128, "num_experts_per_tok": 8, "num_shared_experts": 1,
}  # fmt: skip
HUNYUAN = {
    "architectures": ["HunYuanDenseV1ForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "attention_head_dim": 128, "vocab_size": 128167,
    "max_position_embeddings": 32768, "num_experts": 1, "use_cla": False, "use_qk_norm": True, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "rope_scaling": {
        "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "dynamic",
    },
}  # fmt: skip
HUNYUAN_MOE = {
    **HUNYUAN, "architectures": ["HunYuanMoEV1ForCausalLM"], "intermediate_size": 3072, "moe_intermediate_size": [3072] * 32,
    "num_experts": 64, "moe_topk": [8] * 32, "num_shared_expert": [1] * 32, "use_mixed_mlp_moe": True,
    "moe_layer_num_skipped": 0,
}  # fmt: skip
MINIMAX_M2 = {
    "architectures": ["MiniMaxM2ForCausalLM"], "hidden_size": 3072, "intermediate_size": 1536, "num_hidden_layers": 62,
    "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128, "rotary_dim": 64, "vocab_size": 200064,
    "num_local_experts": 256, "num_experts_per_tok": 8, "scoring_func": "sigmoid", "use_qk_norm": True, "use_routing_bias": True,
    "num_mtp_modules": 3, "use_mtp": True, "shared_intermediate_size": 0, "max_position_embeddings": 196608,
    "rms_norm_eps": 1e-6, "rope_theta": 5000000, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN3_VL_MOE = {
    "architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe", "tie_word_embeddings": False,
    "vision_config": {"hidden_size": 1152}, "text_config": {
        "model_type": "qwen3_vl_moe_text", "dtype": "bfloat16", "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "rope_theta": 5e6, "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6, "attention_bias": False, "tie_word_embeddings": True,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    },
}  # fmt: skip
ARCEE = {
    "architectures": ["ArceeForCausalLM"], "hidden_size": 2560, "intermediate_size": 18432, "num_hidden_layers": 36,
    "num_attention_heads": 20, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 128004, "hidden_act": "relu2",
    "max_position_embeddings": 65536, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "rope_scaling": {
        "rope_type": "yarn", "factor": 20.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0,
        "mscale": 1.0,
    },
}  # fmt: skip
APERTUS = {
    "architectures": ["ApertusForCausalLM"], "hidden_size": 4096, "intermediate_size": 21504, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 131072, "hidden_act": "xielu", "qk_norm": True,
    "max_position_embeddings": 65536, "rms_norm_eps": 1e-5, "rope_theta": 12000000, "attention_bias": False, "mlp_bias": False,
    "post_norm": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}  # fmt: skip
# Not copied from the hub: sizes as they are known. And parameters in billions, without what reads pictures.
PUBLISHED = {
    "mistral-small-3.1": (mistral("mistral", 5120, 32768, 40, rope_theta=1e9, max_position_embeddings=131072), 23.57),
    "ministral-3-3b": (ministral(3072, 9216, 26, 16384, 16.0, tie_word_embeddings=True), 3.43),
    "ministral-3-8b": (ministral(4096, 14336, 34, 16384, 16.0), 8.49),
    "devstral-small-2": (ministral(5120, 32768, 40, 8192, 48.0), 23.57),
    "qwen2.5-vl-7b": (QWEN2_5_VL, 7.62),
    "qwen3-vl-4b": (QWEN3_VL, 4.02),
    "qwen3-vl-30b-a3b": (QWEN3_VL_MOE, 30.53),
    "pixtral-12b": (PIXTRAL, 12.25),
    "llava-1.5-7b": (LLAVA, 6.74),
    "granite-3.3-8b": (GRANITE, 8.17),
    "granite-3.1-3b-a800m": (GRANITE_MOE, 3.30),
    "granite-4.0-micro": (HYBRID, 3.40),
    "seed-oss-36b": (SEED, 36.15),
    "smollm3-3b": (SMOL, 3.08),
    "qwen2-57b-a14b": (QWEN2_MOE, 57.41),
    "glm-4.5-air": (GLM4_MOE, 106.85),
    "ernie-4.5-21b-a3b": (ERNIE_MOE, 21.83),
    "dots.llm1": (DOTS, 142.77),
    "exaone-4.0-32b": (EXAONE4, 32.00),
    "exaone-4.0-1.2b": (EXAONE4_SMALL, 1.28),
    "hunyuan-7b": (HUNYUAN, 7.50),
    "hunyuan-a13b": (HUNYUAN_MOE, 80.39),
    "minimax-m2": (MINIMAX_M2, 228.69),
    "afm-4.5b": (ARCEE, 4.62),
    "apertus-8b": (APERTUS, 8.05),
    "olmo-2-32b": (OLMO2, 32.23),
    "olmo-3-7b": (OLMO3, 7.30),
    "olmoe-1b-7b": (OLMOE, 6.92),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_the_published_sizes(name: str) -> None:
    config, billions = PUBLISHED[name]
    assert abs(ModelSpec.from_config(config).num_parameters / 1e9 - billions) < 0.006


def test_what_is_read_of_the_published_files() -> None:
    read = {name: ModelSpec.from_config(config) for name, (config, _) in PUBLISHED.items()}
    small, tiny, coder = read["mistral-small-3.1"], read["ministral-3-3b"], read["devstral-small-2"]
    assert (small.max_len, small.windows[0], small.tie_embeddings, small.dtype, small.rope.theta) == (
        131072,
        None,
        False,
        "bfloat16",
        1e9,
    )
    assert (tiny.max_len, tiny.tie_embeddings, tiny.rope.query_beta, tiny.rope.query_span) == (262144, True, 0.1, 16384)
    assert (coder.max_len, coder.rope.kind, coder.rope.query_span) == (393216, "yarn", 8192)
    pictures = read["qwen2.5-vl-7b"]
    assert (pictures.qkv_bias, pictures.o_bias, pictures.head_dim, pictures.rope.kind) == (True, False, 128, "default")
    assert (pictures.eos_token_ids, pictures.windows[-1], pictures.max_len) == ((151645,), None, 128000)
    assert (read["qwen3-vl-4b"].qk_norm, read["qwen3-vl-4b"].rope.theta, read["qwen3-vl-4b"].tie_embeddings) == (True, 5e6, True)
    assert (read["pixtral-12b"].heads, read["llava-1.5-7b"].layers, read["llava-1.5-7b"].kv_heads) == (32, 32, 32)
    granite = read["granite-3.3-8b"]
    assert (granite.scale, granite.logit_divisor, granite.rounded_scale, granite.float16) == (2**-7, 16.0, False, False)
    assert granite.embedding_scale == pytest.approx(12 / 0.22) and granite.eps == pytest.approx(1e-5 / 0.22**2)
    assert (read["seed-oss-36b"].qkv_bias, read["seed-oss-36b"].o_bias) == (True, False)
    smol = read["smollm3-3b"]
    assert smol.tie_embeddings and [smol.rope_of(layer).kind for layer in range(4)] == ["default"] * 3 + ["none"]


def test_what_is_read_of_the_published_olmos() -> None:
    two, three, experts = (ModelSpec.from_config(PUBLISHED[f"olmo{name}"][0]) for name in ("-2-32b", "-3-7b", "e-1b-7b"))
    assert (two.whole_qk_norm, two.pre_norm, two.windows[0], two.rope.theta, two.max_len) == (True, False, None, 5e5, 4096)
    assert [three.windows[layer] for layer in range(5)] == [4096, 4096, 4096, None, 4096] and three.max_len == 65536
    assert [three.rope_of(layer).kind for layer in (2, 3)] == ["default", "yarn"]
    assert [rope.theta for rope in three.ropes] == [5e5, 5e5]
    assert experts.mixture is not None and experts.pre_norm and not experts.mixture.normalized


def test_layers_of_exaone_4_that_see_everything_rotate_where_all_do() -> None:
    large, small = (ModelSpec.from_config(config) for config in (EXAONE4, EXAONE4_SMALL))
    assert [large.rope_of(layer).kind for layer in range(4)] == ["llama3"] * 3 + ["none"] and large.windows[2:4] == (4096, None)
    assert small.local_rope is None and small.windows == (None,) * 30 and (small.qk_norm, small.pre_norm) == (True, False)
    mixture = ModelSpec.from_config(EXAONE_MOE).mixture
    assert mixture is not None and (mixture.dense_layers, mixture.scores.scale) == ((0,), 2.5)
    typed = ModelSpec.from_config({**EXAONE_MOE, "mlp_layer_types": ["sparse", "dense", "sparse", "sparse"]})
    assert typed.mixture is not None and typed.mixture.dense_layers == (1,)


def test_hunyuan_s_base_is_stretched_once() -> None:
    for config in (HUNYUAN, HUNYUAN_MOE):
        spec = ModelSpec.from_config(config)
        assert (
            spec.rope.kind == "default" and spec.rope.theta == pytest.approx(1e4 * 1000 ** (128 / 126)) and spec.max_len == 32768
        )
        assert spec.qk_names == ("query_layernorm", "key_layernorm") and spec.late_qk_norm and spec.one_by_one
    mixture = spec.mixture
    assert mixture is not None and (mixture.active, mixture.shared, mixture.normalized) == (8, 3072, True)


def test_half_of_a_head_rotates_in_minimax_m2() -> None:
    spec = ModelSpec.from_config(MINIMAX_M2)
    assert (spec.rope.rotary_dim, spec.whole_qk_norm, spec.max_len) == (64, True, 196608)
    assert spec.qk_norms(0) == (("q_norm", 48 * 128), ("k_norm", 8 * 128)) and spec.ahead[0] == "model.layers.62."
    mixture = spec.mixture
    assert mixture is not None and mixture.scores.sigmoid and (mixture.shared, mixture.normalized) == (0, True)
    assert mixture.correction == "block_sparse_moe.e_score_correction_bias"


def test_mlps_without_a_gate_have_two_products() -> None:
    arcee, apertus = (ModelSpec.from_config(config) for config in (ARCEE, APERTUS))
    for spec in (arcee, apertus):
        assert [module.name for module in spec.layer_modules() if module.part == "mlp"] == ["mlp.up_proj", "mlp.down_proj"]
    names = [name.removeprefix("model.layers.31.") for name, _ in apertus.small_tensors() if ".31." in name]
    norms = ["attention_layernorm", "feedforward_layernorm", "self_attn.q_norm", "self_attn.k_norm"]
    assert names == [*(f"{name}.weight" for name in norms), "mlp.act_fn.alpha_p", "mlp.act_fn.alpha_n"]
    assert apertus.small_nbytes(2) == 2 * (4096 + 32 * (2 * 4096 + 2 * 128)) and arcee.max_len == 81920
    check_kind(Path("arcee"), arcee)
    with pytest.raises(InputError, match="is a ApertusForCausalLM, whose layers this version serves and does not quantize"):
        check_kind(Path("apertus"), apertus)


def test_layers_of_granite_4_rotate_or_do_not() -> None:
    for rotates in ("rope", None):
        spec = ModelSpec.from_config({**HYBRID, "position_embedding_type": rotates})
        assert {spec.rope_of(layer).kind for layer in range(40)} == {"default" if rotates else "none"}
        assert (spec.head_dim, spec.intermediate, spec.fused_gate_up, spec.fused_qkv) == (64, 8192, True, False)


@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "pixtral-12b", "granite-4.0-micro"])
def test_what_quantizing_does_not_know_is_refused_by_name(name: str) -> None:
    config = PUBLISHED[name][0]
    with pytest.raises(InputError, match=f"model is a {config['architectures'][0]}"):
        check_kind(Path("model"), ModelSpec.from_config(config))


def test_all_layers_of_smollm3_may_rotate() -> None:
    spec = ModelSpec.from_config({**SMOL, "no_rope_layers": [1] * 36})
    assert spec.local_rope is None and spec.ropes == (spec.rope,)


def test_settings_in_one_place_and_in_two_are_the_same() -> None:
    """Qwen2.5-VL as it was published, and as later versions of transformers write it."""
    whole = ("architectures", "vision_config", "torch_dtype", "eos_token_id")
    text = {key: value for key, value in QWEN2_5_VL.items() if key not in whole} | {"model_type": "qwen2_5_vl_text"}
    nested = {key: QWEN2_5_VL[key] for key in whole} | {"text_config": text}
    assert ModelSpec.from_config(nested) == ModelSpec.from_config(QWEN2_5_VL)
    assert ModelSpec.from_config({**QWEN2_5_VL, **nested, "hidden_size": 7}) == ModelSpec.from_config(QWEN2_5_VL)


def test_a_head_is_tied_where_either_place_says_so() -> None:
    tied = [ModelSpec.from_config(mistral("mistral", 128, 128, 1, **said)).tie_embeddings for said in (
        {}, {"tie_word_embeddings": True}, {"top": {"tie_word_embeddings": True}}, {"tie_word_embeddings": False},
        {"tie_word_embeddings": True, "top": {"tie_word_embeddings": False}},
    )]  # fmt: skip
    assert tied == [False, True, True, False, True]
    for top in (True, False):  # of these, transformers writes that of the text part as true always
        assert ModelSpec.from_config({**QWEN3_VL_MOE, "tie_word_embeddings": top}).tie_embeddings == top


def test_layers_that_do_not_rotate_leave_features_as_they_are() -> None:
    table = cos_sin_table(RopeSpec("none", 1e4, 8, 64), 5)
    assert torch.equal(table, torch.tensor([1.0] * 4 + [0.0] * 4).expand(5, 8))


def test_queries_are_scaled_by_whole_spans() -> None:
    found = query_scales(RopeSpec("default", 1e4, 8, 64, query_beta=0.5, query_span=4), torch.tensor([0, 3, 4, 7, 8, 4000003]))
    assert found is not None
    expected = 1 + 0.5 * torch.tensor([0, 0, 1, 1, 2, 1000000], dtype=torch.float64).log1p()
    assert torch.allclose(found.double(), expected, atol=1e-6)
    assert query_scales(RopeSpec("default", 1e4, 8, 64), torch.arange(3)) is None


@pytest.mark.parametrize(
    "config,message", [
        (mistral("mistral4", 64, 64, 1), "model_type 'mistral4', which is not supported in Mistral3ForConditionalGeneration"),
        ({**LLAVA, "text_config": {"model_type": ["qwen2"]}}, "model_type ['qwen2'], which is not supported in Llava"),
        ({**LLAVA, "text_config": None, "hidden_size": 64}, "text_config is None, expected an object"),
        (mistral("mistral", 64, 64, 1, rope_scaling={**YARN, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8}),
         "llama_4_scaling_beta = 0.1 is not supported for Mistral3ForConditionalGeneration"),
        (mistral("ministral3", 64, 64, 1, rope_parameters={"llama_4_scaling_beta": 0.1}), "original_max_position_embeddings is "),
        ({**SMOL, "no_rope_layers": [1, 0]}, "no_rope_layers is [1, 0], expected 1 (it rotates) or 0 for each of 36"),
        ({**SMOL, "no_rope_layers": [2] * 36}, "expected 1 (it rotates) or 0 for each of 36"),
        ({**GRANITE, "residual_multiplier": 0}, "residual_multiplier is 0, expected a positive number"),
        ({**GRANITE, "pretraining_tp": 2}, "pretraining_tp = 2 is not supported for GraniteForCausalLM"),
        ({**HYBRID, "layer_types": ["attention", "mamba"] * 20}, "layer_types has 'mamba', and of GraniteMoeHybridForCausalLM"),
        ({**HYBRID, "layer_types": None}, "layer_types has None, and of GraniteMoeHybridForCausalLM only layers of"),
        ({**HYBRID, "position_embedding_type": "nope"}, "position_embedding_type is 'nope', expected rope or null"),
        ({**HYBRID, "num_local_experts": 62}, "num_local_experts = 62 is not supported for GraniteMoeHybridForCausalLM"),
        ({**EXAONE4, "layer_types": None}, "sliding_window_pattern is 'LLLG', expected an integer of at least 1"),
        ({**EXAONE_MOE, "mlp_layer_types": ["dense"]}, "mlp_layer_types must name dense or sparse for each of 4 layers"),
        ({**HUNYUAN_MOE, "moe_topk": [8] * 31 + [4]}, "layers that differ in it are not supported in HunYuanMoEV1ForCausalLM"),
        ({**HUNYUAN, "use_cla": True}, "use_cla = True is not supported for HunYuanDenseV1ForCausalLM"),
        ({**HUNYUAN, "rope_scaling": {**YARN, "factor": 2.0}}, "rope type yarn is not supported for HunYuanDenseV1ForCausalLM"),
        ({**HUNYUAN, "rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 3.0}}, "hold 'alpha', which the linear"),
        ({**MINIMAX_M2, "rotary_dim": 256}, "partial_rotary_factor is 2.0, expected a positive number of at most 1"),
        ({**MINIMAX_M2, "scoring_func": "softmax"}, "scoring_func = 'softmax' is not supported for MiniMaxM2ForCausalLM"),
        ({**ARCEE, "hidden_act": "silu"}, "hidden_act 'silu' is not supported; supported is relu2"),
        ({**APERTUS, "post_norm": True}, "post_norm = True is not supported for ApertusForCausalLM"),
        ({**OLMOE, "clip_qkv": 8.0}, "clip_qkv = 8.0 is not supported for OlmoeForCausalLM"),
        ({**SEED, "logits_scaling": 2.0}, "logits_scaling = 2.0 is not supported for SeedOssForCausalLM"),
    ],
)  # fmt: skip
def test_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        ModelSpec.from_config(config)
    assert message in str(error.value)
