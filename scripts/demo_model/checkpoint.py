"""Writes the trained model as an unquantized Hugging Face checkpoint: the optimizer's own weights in float32, not yet rounded."""

from __future__ import annotations

import json
from pathlib import Path

from demo_model.model import Llama, Shape
from demo_model.tokens import BOS, END, PAD
from safetensors.torch import save_file

MLP = ("gate_proj", "up_proj", "down_proj")


def save(model: Llama, directory: Path) -> None:
    """Everything but the tokenizer."""
    tensors = {"model.embed_tokens.weight": model.embed_tokens.weight, "model.norm.weight": model.norm.weight}
    for number, layer in enumerate(model.layers):
        for name, parameter in layer.named_parameters():
            tensors[published_name(number, name)] = parameter
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
        directory / "model.safetensors",
        {"format": "pt"},
    )
    ends = {"bos_token_id": BOS, "eos_token_id": END, "pad_token_id": PAD}
    (directory / "config.json").write_text(json.dumps(config(model.shape) | ends, indent=1) + "\n")
    (directory / "generation_config.json").write_text(json.dumps(ends | {"temperature": 0.0}, indent=1) + "\n")


def published_name(layer: int, name: str) -> str:
    """Of a parameter of a layer: q_proj.weight -> model.layers.0.self_attn.q_proj.weight."""
    module = name.removesuffix(".weight")
    part = "" if module.endswith("layernorm") else "mlp." if module in MLP else "self_attn."
    return f"model.layers.{layer}.{part}{name}"


def config(shape: Shape) -> dict[str, object]:
    """config.json, without the tokens that begin and end a text."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_len,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
