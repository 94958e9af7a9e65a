"""DeepSeek's families, whose attention is over latents (models/latent.py), and one like them: rows of ARCHITECTURES. No torch."""

from __future__ import annotations

from dataclasses import replace

from models.family import Architecture

DEEPSEEK_V3 = Architecture(
    latent=True, max_position=4096, float16=False,  # what its MLPs add goes beyond it, as others found
    mixture="mlp", sparse="from", sigmoid=True, correction="gate.e_score_correction_bias", expert_count="n_routed_experts",
    shared="shared_experts", shared_count="n_shared_experts", ahead_count="num_nextn_predict_layers",
    refused={
        "topk_method": (None, "noaux_tc"), "scoring_func": (None, "sigmoid"), "moe_layer_freq": (None, 1),
    },
    defaults={
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8,
        "topk_group": 4, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "first_k_dense_replace": 3,
    },
)  # fmt: skip
DEEPSEEK_V2 = replace(
    DEEPSEEK_V3, max_position=2048, sigmoid=False, correction="", by_largest=True, normalized=False, ahead_count="",
    refused={
        "topk_method": (None, "greedy", "group_limited_greedy"), "scoring_func": (None, "softmax"), "moe_layer_freq": (None, 1),
        "norm_topk_prob": (None, False),  # which implementations take in different ways
        "mlp_bias": (None, False), "rope_interleave": (None, True),
    },
    defaults={
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        "moe_intermediate_size": 1407, "n_routed_experts": 64, "n_shared_experts": 2, "first_k_dense_replace": 0,
    },
)  # fmt: skip
GLM4_MOE_LITE = replace(
    DEEPSEEK_V3, eps=1e-5, max_position=202752, float16=True, sparse="types",
    defaults={
        "q_lora_rank": 768, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 192, "v_head_dim": 256,
        "moe_intermediate_size": 1536, "n_routed_experts": 64, "n_shared_experts": 1, "num_experts_per_tok": 4,
        "routed_scaling_factor": 1.8, "norm_topk_prob": True,
    },
)  # fmt: skip
