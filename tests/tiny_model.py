"""A small random Llama checkpoint in AWQ form, written without anybody's help: for tests that need some model, not a good one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes."""

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    mlp: int = 128
    group: int = 32
    vocab: int = 256
    max_len: int = 512
    tied: bool = False


LLAMA_1B = Shape(2048, 16, 32, 8, 64, 8192, 128, 128256, 32768, tied=True)
LLAMA_8B = Shape(4096, 32, 32, 8, 128, 14336, 128, 128256, 32768)


def make_checkpoint(directory: Path, *, seed: int = 0, shape: Shape = Shape(), tokenizer: bool = True) -> Path:
    """Random int4 weights with the magnitudes of a real model; token ids 0 (unknown), 1 (start), 2 (end of text) are special."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        words = torch.randint(-(2**31), 2**31 - 1, (inputs, outputs // 8), generator=rng, dtype=torch.int64)
        tensors[f"{name}.qweight"] = words.to(torch.int32)
        zeros = torch.full((inputs // shape.group, outputs // 8), 0x88888888 - 2**32, dtype=torch.int64)
        tensors[f"{name}.qzeros"] = zeros.to(torch.int32)
        scale = 0.25 / inputs**0.5
        tensors[f"{name}.scales"] = (scale * (0.5 + torch.rand(inputs // shape.group, outputs, generator=rng))).half()

    hidden, queries, keys = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors["model.embed_tokens.weight"] = torch.randn(shape.vocab, hidden, generator=rng).half()
    if not shape.tied:
        tensors["lm_head.weight"] = torch.randn(shape.vocab, hidden, generator=rng).mul(0.3).half()
    tensors["model.norm.weight"] = torch.ones(hidden).half()
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = torch.ones(hidden).half()
        tensors[f"{prefix}.post_attention_layernorm.weight"] = torch.ones(hidden).half()
        for name, inputs, outputs in (
            ("self_attn.q_proj", hidden, queries),
            ("self_attn.k_proj", hidden, keys),
            ("self_attn.v_proj", hidden, keys),
            ("self_attn.o_proj", queries, hidden),
            ("mlp.gate_proj", hidden, shape.mlp),
            ("mlp.up_proj", hidden, shape.mlp),
            ("mlp.down_proj", shape.mlp, hidden),
        ):
            linear(f"{prefix}.{name}", inputs, outputs)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config(shape)))
    if tokenizer:
        write_tokenizer(directory)
    return directory


def config(shape: Shape = Shape()) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": shape.max_len,
        "hidden_act": "silu",
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "float16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_bias": False,
        "mlp_bias": False,
        "quantization_config": {
            "quant_method": "awq",
            "bits": 4,
            "group_size": shape.group,
            "zero_point": True,
            "version": "gemm",
        },
    }


def write_tokenizer(directory: Path) -> None:
    """One token a printable character, and a chat template that names the roles."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    characters = [chr(c) for c in range(32, 127)] + ["\n"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{c: i for i, c in enumerate(characters, 3)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "chat_template": "<s>{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def write_thoughts(directory: Path, template: str) -> Path:
    """Give the tokenizer there this chat template and the tokens <think> and </think>, 99 and 100."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tags = ("<think>", "</think>")
    tokenizer["added_tokens"] += [{"id": 99 + i, "content": tag, **plain} for i, tag in enumerate(tags)]
    tokenizer["model"]["vocab"] |= {tag: 99 + i for i, tag in enumerate(tags)}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    return directory
