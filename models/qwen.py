"""How the families of Qwen differ from plain Llama. No torch."""

from __future__ import annotations

from dataclasses import replace

from models.family import Architecture

QWEN2 = Architecture(qkv_bias=True, o_bias=False, window="upper", default_window=4096, max_position=32768)
# For text alone the three positions of a token are the same, and rotation is the plain one.
QWEN2_VL = replace(QWEN2, text_part=True, eps=1e-5, theta=1e6, defaults={"max_window_layers": 80})
# For text alone its rotation, too, is the plain one.
QWEN3_5 = Architecture(
    qk_norm=True,
    unit_norms=True,
    default_head_dim=256,
    max_position=32768,
    partial_rotation=True,
    delta="split",
    ahead=("mtp.",),
    refused={"attn_output_gate": (None, True)},
    defaults={
        "vocab_size": 248320,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "partial_rotary_factor": 0.25,
    },
)
QWEN3_NEXT = replace(
    QWEN3_5,
    delta="fused",
    mixture="mlp",
    shared="shared_expert",
    shared_gate="shared_expert_gate",
    defaults={
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.25,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts_per_tok": 10,
        "num_experts": 512,
        "norm_topk_prob": True,
    },
)
QWEN3_5_MOE = replace(
    QWEN3_NEXT,
    delta="split",
    normalized=True,
    defaults={**QWEN3_NEXT.defaults, "vocab_size": 248320, "num_hidden_layers": 40, "num_experts_per_tok": 8, "num_experts": 256},
)
QWEN2_MOE = replace(
    QWEN2, qkv_bias="qkv_bias", window="lower", mixture="mlp", sparse="step", shared="shared_expert",
    shared_gate="shared_expert_gate", defaults={
        "qkv_bias": True, "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
    },
)  # fmt: skip
