"""How Gemma 2, 3 and 4 differ from plain Llama. No torch."""

from __future__ import annotations

from dataclasses import replace

from models.family import Architecture

GEMMA2 = Architecture(
    window="alternate",
    unit_norms=True,
    norms=("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    gelu=True,
    scaled_embedding=True,
    float16=False,
    soft_caps=("attn_logit_softcapping", "final_logit_softcapping"),
    defaults={
        "vocab_size": 256000,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
)
GEMMA3 = replace(
    GEMMA2,
    qk_norm=True,
    window="pattern",
    soft_caps=("final_logit_softcapping",),
    theta=1e6,
    local_theta=1e4,
    defaults={
        **{key: value for key, value in GEMMA2.defaults.items() if "softcapping" not in key},
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
    },
)
GEMMA4 = replace(
    GEMMA3,
    unit_norms=False,
    global_heads=True,
    per_layer_inputs=True,
    v_norm=True,
    layer_scalar=True,
    scale=1.0,
    mixture="experts",
    router="router.proj",
    sparse="switched",
    expert_choice="top_k_experts",
    normalized=True,
    router_norm="router.scale",
    gains="router.per_expert_scale",
    beside=("pre_feedforward_layernorm_2", "post_feedforward_layernorm_2", "post_feedforward_layernorm_1"),
    rope={"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},  # of layers that see everything
    refused={
        "use_bidirectional_attention": (None, False, "vision"),  # text sees what came before it, alone
    },
    defaults={
        "vocab_size": 262144,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 30,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 512,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": 262144,
    },
)
