"""Perplexity of real checkpoints, to 0.001, against transformers in float32 over weights as their own tools dequantize them.

AutoAWQ and compressed-tensors do so in the type of the scales, GPTQModel in the type that the model was published in; so does
the engine, whatever it computes in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from appliance.config import EngineConfig
from appliance.eval.scoring import Model, score, windows
from appliance.text.tokenizer import Tokenizer
from tests.test_eval import EXACT, loop

pytestmark = pytest.mark.realdata


def by_autoawq(tensors: dict[str, Tensor], name: str, group: int) -> Tensor:
    packing = pytest.importorskip("awq.utils.packing_utils", exc_type=ImportError)
    parts = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
    return packing.dequantize_gemm(*parts, 4, group).t()


def by_gptq(tensors: dict[str, Tensor], name: str, bits: int, dtype: torch.dtype) -> Tensor:
    """Version 1, by its definition: words along the inputs, zero points less one. Scales are cast when a model is loaded."""
    qweight, qzeros, scales, g_idx = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
    shifts, most = torch.arange(0, 32, bits), 2**bits - 1
    codes = (qweight[:, None] >> shifts[None, :, None] & most).flatten(0, 1)
    zeros = (qzeros[:, :, None] >> shifts & most).flatten(1) + 1 & most
    return (scales.to(dtype)[g_idx] * (codes - zeros[g_idx])).t()


def dequantized(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """All weights by their names in transformers, each in the type that its tool gives it."""
    config = json.loads((directory / "config.json").read_text())
    dtype, quant = getattr(torch, config.get("dtype") or config["torch_dtype"]), config["quantization_config"]
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            if quant["quant_method"] == "awq":
                yield f"{module}.weight", by_autoawq(tensors, module, quant["group_size"])
            else:
                yield f"{module}.weight", by_gptq(tensors, module, quant["bits"], dtype)
        elif name.endswith((".weight", ".bias")):
            yield name, tensor


def reference(directory: Path, dense: Path) -> Callable[[Tensor], Tensor]:
    """Logits [1, T, V] for tokens [T]."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    if directory.name.startswith("ct"):
        pytest.importorskip("compressed_tensors", exc_type=ImportError)
        asked = CompressedTensorsConfig(dequantize=True)
        found = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, quantization_config=asked)
        return lambda piece: found(piece[None]).logits  # type: ignore[no-any-return]
    found = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    if directory != dense:
        own = {name: weight.float() for name, weight in dequantized(directory)}
        table = {"lm_head.weight": "model.embed_tokens.weight", "model.embed_tokens.weight": "lm_head.weight"}
        own |= {there: own[name] for name, there in table.items() if name in own and there not in own}
        found.load_state_dict(own)
    return lambda piece: found(piece[None]).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "name",
    ["TinyStories-656K", "awq-gemm-g32", "gptq-4bit-g32-act-order", "gptq-4bit-g64-asym", "gptq-8bit-channel", "ct-w4a16-g128"],
)
def test_perplexity_is_that_of_the_tools_own_weights(shared_data: Path, name: str) -> None:
    dense = shared_data / "models/TinyStories-656K"
    directory = dense if name == dense.name else shared_data / "quantized" / name
    text = Tokenizer.load(dense).encode((shared_data / "text/tinystories.txt").read_text()[:9000], add_special_tokens=False)
    forward, loaded = reference(directory, dense), Model(EngineConfig(model=str(directory), **EXACT), 257)
    for stride in (None, 128):
        *_, found = score(loaded, windows(text, 256, None, 1, stride))
        assert found.perplexity == pytest.approx(loop(forward, text, 256, stride or 256, 1, stride is not None), abs=1e-3)
