"""Small models to quantize, and what their weights say: shared by the tests of quantizing and of judging."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from appliance.quantize.job import Job
from appliance.quantize.options import Options
from models.plain import FLOATS, PlainLayer
from models.rope import cos_sin_table
from models.spec import ModelSpec
from quant.checkpoint import Checkpoint
from quant.tensor import QuantTensor
from tests.tiny_model import write_tokenizer

VOCAB, LENGTH = 99, 32
BESIDE = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def make(directory: Path, kind: str = "Llama", **config: Any) -> Path:
    """A random model as transformers writes it, whose norms make some channels large. ``kind``: Llama, Gemma3Text, .."""
    import transformers

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16}
    shape |= {"num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 256, "tie_word_embeddings": False}
    dtype, saved = getattr(torch, config.pop("dtype", "float32")), config.pop("saved", {})
    settings = getattr(transformers, f"{kind}Config")(
        **shape | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | config
    )
    model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(settings).float()
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if "layernorm" in name:
                parameter[::13] += 19  # outliers, as real models have them; some store what is above 1
            elif parameter.dim() == 2:
                parameter.copy_(torch.randn_like(parameter) * 1.5 / parameter.shape[1] ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.to(dtype).save_pretrained(directory, **saved)
    write_tokenizer(directory)
    return directory


def dense(quantized: Path, output: Path) -> Path:
    """A quantized checkpoint's weights as an unquantized checkpoint in float32."""
    output.mkdir()
    with Checkpoint.open(quantized) as checkpoint:
        spec, tensors = ModelSpec.from_config(checkpoint.config), {}
        for module in spec.modules():
            weight = checkpoint.weight(module.name, expect=(module.N, module.K))
            tensors[f"{module.name}.weight"] = weight.dequantize() if isinstance(weight, QuantTensor) else weight.float()
        tensors |= {name: checkpoint.tensor(name).float() for name, _ in spec.small_tensors()}
        config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, output / "model.safetensors", {"format": "pt"})
    (output / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    for name in BESIDE:
        shutil.copyfile(quantized / name, output / name)
    return output


def ids(seed: int = 1, samples: int = 24) -> Tensor:
    return torch.randint(3, VOCAB, (samples, LENGTH), generator=torch.Generator().manual_seed(seed))


def logits(directory: Path, tokens: Tensor, rounded: torch.dtype = torch.float32) -> Tensor:
    """Log-probabilities [B, T, V] of a checkpoint's own weights, in float32; the layers' are ``rounded`` to a type before."""
    with Checkpoint.open(directory) as checkpoint, torch.inference_mode():
        spec = ModelSpec.from_config(checkpoint.config)
        table, head = (
            checkpoint.take(name if checkpoint.has(name) else other, dtypes=FLOATS).float()
            for name, other in (("model.embed_tokens.weight", "lm_head.weight"), ("lm_head.weight", "model.embed_tokens.weight"))
        )
        norm = checkpoint.take("model.norm.weight", dtypes=FLOATS).float() + spec.norm_offset
        hidden = table[tokens] * spec.embedding_scale
        for number in range(spec.layers):
            angles = cos_sin_table(spec.rope_of(number), tokens.shape[1])
            layer = PlainLayer.read(checkpoint, spec, number, angles, torch.float32)
            weights = {name: weight.to(rounded).float() for name, weight in layer.weights.items()}
            hidden = replace(layer, weights=weights).forward(hidden)
        hidden = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + spec.eps) * norm
        found = hidden @ head.t() / spec.logit_divisor
        return torch.log_softmax(found if spec.logit_cap is None else spec.logit_cap * torch.tanh(found / spec.logit_cap), -1)


def spoken(directory: Path, samples: int, length: int, seed: int) -> Tensor:
    """What the model says by itself, drawn at temperature 1: int64 [samples, length]. Nobody predicts that better than itself."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    rng, tokens, before = torch.Generator().manual_seed(seed), torch.ones(samples, 1, dtype=torch.int64), None
    with torch.inference_mode():
        while tokens.shape[1] < length:
            told = model(tokens[:, -1:], past_key_values=before, use_cache=True)
            before, follows = told.past_key_values, told.logits[:, -1].softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(follows, 1, generator=rng)], 1)
    return tokens


def judged(directory: Path, text: Tensor, base: Tensor) -> tuple[float, float]:
    """(perplexity, mean KL divergence) over ``text`` [B, T], by the ``base``'s log-probabilities [B, T, V]."""
    found = logits(directory, text)
    likely = found[:, :-1].gather(2, text[:, 1:, None])
    return math.exp(-float(likely.mean())), float((base.exp() * (base - found)).sum(-1).mean())


def divergence(directory: Path, original: Path) -> float:
    """Mean KL divergence over tokens that were not seen while quantizing."""
    expected, found = (logits(one, ids(seed=99, samples=8)) for one in (original, directory))
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def quantized(source: Path, output: Path, tokens: Tensor | None = None, **options: Any) -> Path:
    made = Options(**{"group_size": 16, **options}).checked()
    with torch.inference_mode():
        Job(source, output, made, tokens if tokens is not None else ids() if made.calibrated else None).run()
    return output
