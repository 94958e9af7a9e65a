"""Checkpoints of Gemma 4's text part as published, or quantized: heads of two kinds, experts beside MLPs, layers that are told of
tokens and read each other's keys. No values.

Shapes are those of transformers' model; nothing here comes from the planner.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.memory.published import VARIANTS, Tensors, write_headers

SMALL: dict[str, Any] = {
    "architectures": ["Gemma4ForCausalLM"], "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "global_head_dim": 128, "num_global_key_value_heads": 1,
    "attention_k_eq_v": True, "vocab_size": 203, "max_position_embeddings": 256, "sliding_window": 9, "dtype": "bfloat16",
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 5.0,
}  # fmt: skip
TOLD: dict[str, Any] = {
    "hidden_size_per_layer_input": 128, "vocab_size_per_layer_input": 203, "num_kv_shared_layers": 1,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "use_double_wide_mlp": True, "attention_k_eq_v": False, "num_global_key_value_heads": None,
}  # fmt: skip
EXPERTS = {"enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 128}


def write_gemma4(directory: Path, config: dict[str, Any], variant: str, group: int = 0) -> Path:
    """In one of VARIANTS, whose groups are of another size where ``group`` says so; a text part under the names of the whole.

    Experts that are not quantized are one tensor. Of models that see pictures, too, a tensor of these is there.
    """
    make, size, quantization = VARIANTS[variant]
    dense, size, text = VARIANTS["none"][0], group or size, config.get("text_config", config)
    before = "model." if text is config else "model.language_model."
    hidden, inner, vocab, heads = (text[k] for k in ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"))
    tensors: Tensors = {f"{before}embed_tokens.weight": ("BF16", (vocab, hidden)), f"{before}norm.weight": ("BF16", (hidden,))}
    if text is not config:
        tensors["model.embed_vision.embedding_projection.weight"] = ("BF16", (hidden, 8))
    norms = ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"]
    sparse = text.get("enable_moe_block")
    norms += [f"{name}_feedforward_layernorm_{n}" for name, n in (("post", 1), ("post", 2), ("pre", 2))] if sparse else []
    told, layers = text["hidden_size_per_layer_input"], text["num_hidden_layers"]
    own_kv = layers - text.get("num_kv_shared_layers", 0)
    if told:
        norms.append("post_per_layer_input_norm")
        tensors[f"{before}embed_tokens_per_layer.weight"] = ("BF16", (vocab, layers * told))
        tensors[f"{before}per_layer_projection_norm.weight"] = ("BF16", (told,))
        tensors |= dense(f"{before}per_layer_model_projection", layers * told, hidden, 0)
    for layer, kind in enumerate(text["layer_types"]):
        prefix, full = f"{before}layers.{layer}", kind == "full_attention"
        head = text["global_head_dim" if full else "head_dim"]
        keys_only = full and text["attention_k_eq_v"]
        kv = head * text["num_global_key_value_heads" if keys_only else "num_key_value_heads"]
        wide = 2 if layer >= own_kv and text.get("use_double_wide_mlp") else 1
        small = {f"{name}.weight": hidden for name in norms} | {f"self_attn.{name}_norm.weight": head for name in "qk"}
        linears = {"self_attn.q_proj": (heads * head, hidden), "self_attn.k_proj": (kv, hidden)}
        linears |= {} if keys_only else {"self_attn.v_proj": (kv, hidden)}  # of layers that read another's, too: they are there
        linears |= {"self_attn.o_proj": (hidden, heads * head), **mlp("mlp", wide * inner, hidden)}
        linears |= {"per_layer_input_gate": (told, hidden), "per_layer_projection": (hidden, told)} if told else {}
        if sparse:
            count, own = text["num_experts"], text["moe_intermediate_size"]
            small |= {"router.scale": hidden, "router.per_expert_scale": count}
            tensors |= dense(f"{prefix}.router.proj", count, hidden, 0)
            if quantization is None:
                tensors[f"{prefix}.experts.gate_up_proj"] = ("BF16", (count, 2 * own, hidden))
                tensors[f"{prefix}.experts.down_proj"] = ("BF16", (count, hidden, own))
            else:
                linears |= {name: shape for e in range(count) for name, shape in mlp(f"experts.{e}", own, hidden).items()}
        for name, (N, K) in linears.items():
            tensors |= make(f"{prefix}.{name}", N, K, size)
        tensors |= {f"{prefix}.{name}": ("BF16", (numel,)) for name, numel in {**small, "layer_scalar": 1}.items()}
    if quantization is not None:
        in_groups = json.dumps(quantization).replace('"group_size": 128', f'"group_size": {size}')
        config = {**config, "quantization_config": json.loads(in_groups)}
    return write_headers(directory, tensors, config)


def mlp(name: str, inner: int, hidden: int) -> dict[str, tuple[int, int]]:
    """[out, in] of its linears."""
    return {f"{name}.gate_proj": (inner, hidden), f"{name}.up_proj": (inner, hidden), f"{name}.down_proj": (hidden, inner)}
