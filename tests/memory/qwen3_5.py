"""Checkpoints of Qwen3.5 as they are published, or in AWQ: layers that keep a state beside those of attention. No values.

Shapes are those of transformers' model and of AutoAWQ; nothing here comes from the planner.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.memory.published import VARIANTS, Tensors, write_headers

SMALL: dict[str, Any] = {
    "architectures": ["Qwen3_5ForCausalLM"], "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 300, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "dtype": "bfloat16", "tie_word_embeddings": False, "attn_output_gate": True,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4, "eos_token_id": 7, "full_attention_interval": 4,
    "layer_types": [*["linear_attention"] * 3, "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25, "mrope_section": [4, 2, 2]},
}  # fmt: skip

# A layer that keeps a state, and one of attention.
TWO_LAYERS: dict[str, Any] = {
    **SMALL, "hidden_size": 128, "intermediate_size": 128, "head_dim": 32, "num_hidden_layers": 2, "vocab_size": 100,
    "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 32, "linear_value_head_dim": 32,
}  # fmt: skip


def write_qwen3_5(directory: Path, config: dict[str, Any], variant: str, left_alone: tuple[str, ...] = ("b", "a")) -> Path:
    """In one of VARIANTS. ``left_alone``: inputs of delta layers that are not quantized; b and a are too few to be packed."""
    make, group, quantization = VARIANTS[variant]
    dense = VARIANTS["none"][0]
    text = config.get("text_config", config)
    before = "model." if text is config else "model.language_model."
    hidden, inner, vocab, size = (text[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    q, kv = text["num_attention_heads"] * size, text["num_key_value_heads"] * size
    heads = text["linear_num_value_heads"]
    values, keys = heads * text["linear_value_head_dim"], text["linear_num_key_heads"] * text["linear_key_head_dim"]
    channels = 2 * keys + values
    mlp = {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    attention = {"q_proj": (2 * q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    parts = {"qkv": channels, "z": values, "b": heads, "a": heads}
    tensors: Tensors = {f"{before}embed_tokens.weight": ("BF16", (vocab, hidden)), f"{before}norm.weight": ("BF16", (hidden,))}
    tensors["lm_head.weight"] = ("BF16", (vocab, hidden))
    for layer, kind in enumerate(text["layer_types"]):
        prefix = f"{before}layers.{layer}"
        small: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        linears = dict(mlp)
        if kind == "full_attention":
            linears |= {f"self_attn.{name}": shape for name, shape in attention.items()}
            small |= {f"self_attn.{name}_norm.weight": (size,) for name in "qk"}
        else:
            linears |= {f"linear_attn.in_proj_{name}": (outputs, hidden) for name, outputs in parts.items()}
            linears["linear_attn.out_proj"] = (hidden, values)
            small |= {"linear_attn.conv1d.weight": (channels, 1, text["linear_conv_kernel_dim"])}
            small |= {"linear_attn.A_log": (heads,), "linear_attn.dt_bias": (heads,)}
            small |= {"linear_attn.norm.weight": (text["linear_value_head_dim"],)}
        for name, (N, K) in linears.items():
            one = dense if name.rpartition("in_proj_")[2] in left_alone else make
            tensors |= one(f"{prefix}.{name}", N, K, group)
        tensors |= {f"{prefix}.{name}": ("BF16", shape) for name, shape in small.items()}
    if quantization is not None:
        skipped = [f"in_proj_{name}" for name in left_alone]
        config = {**config, "quantization_config": {**quantization, "modules_to_not_convert": skipped}}
    return write_headers(directory, tensors, config)
