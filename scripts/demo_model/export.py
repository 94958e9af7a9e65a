"""Writes the trained model as an AWQ checkpoint: 4 bits, GEMM packing, group size 64, zero points."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from demo_model.model import GROUP, Llama, grid
from demo_model.tokens import BOS, END, PAD
from safetensors.torch import save_file
from torch import Tensor

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # the column that nibble i of a word holds


def pack(codes: Tensor) -> Tensor:
    """Codes 0..15 [R, N] -> int32 [R, N / 8]."""
    columns = codes.to(torch.int64).unflatten(1, (-1, 8))[..., ORDER]
    words = (columns << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def export(model: Llama, directory: Path) -> None:
    """Everything but the tokenizer."""
    tensors: dict[str, Tensor] = {
        "model.embed_tokens.weight": model.embed_tokens.weight.detach().half(),
        "model.norm.weight": model.norm.weight.detach().half(),
    }
    for number, layer in enumerate(model.layers):
        for name, parameter in layer.named_parameters():
            module = name.removesuffix(".weight")
            if parameter.dim() == 1:
                tensors[f"model.layers.{number}.{name}"] = parameter.detach().half()
                continue
            part = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            codes, scales, zeros = grid(parameter.detach())
            full = f"model.layers.{number}.{part}.{module}"
            tensors[f"{full}.qweight"] = pack(codes.flatten(1).t())
            tensors[f"{full}.qzeros"] = pack(zeros.squeeze(-1).t())
            tensors[f"{full}.scales"] = scales.squeeze(-1).t().half().contiguous()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    shape = model.shape
    config = {
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
        "torch_dtype": "float16",
        "bos_token_id": BOS,
        "eos_token_id": END,
        "pad_token_id": PAD,
        "quantization_config": {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": None,
        },
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    generation = {"bos_token_id": BOS, "eos_token_id": END, "pad_token_id": PAD, "temperature": 0.0}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")
