"""Checkpoints made by the reference tools, through the decoder alone: the values that the tools' own weights give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.ops import get_ops
from models.decoder import Decoder
from models.loader import load_model
from models.spec import ModelSpec
from quant.checkpoint import Checkpoint
from tests.models.test_against_transformers import feed

pytestmark = pytest.mark.realdata

CHECKPOINTS = [
    "awq-gemm-g128", "awq-gemm-g32", "ct-fp8-dynamic", "ct-w4a16-g128", "ct-w8a8-int8", "gptq-4bit-g32-act-order",
    "gptq-4bit-g32-sym", "gptq-4bit-g64-asym", "gptq-8bit-channel",
]  # fmt: skip
ROUNDED = {"ct-w8a8-int8"}  # int8 activations, which the expected values do not have


def load(folder: Path, dtype: torch.dtype, *, reference: bool = False, **options: str) -> tuple[Decoder, list[dict[str, Any]]]:
    with Checkpoint.open(folder) as checkpoint:
        spec = ModelSpec.from_config(checkpoint.config)
        decoder = load_model(checkpoint, spec, get_ops("cpu", reference=reference), dtype=dtype, max_len=512, **options)
    return decoder, json.loads((folder / "expected.json").read_text())


def errors(decoder: Decoder, expected: list[dict[str, Any]]) -> torch.Tensor:
    """Absolute differences of the log-probabilities of all prompt tokens, fed in two chunks."""
    found = []
    for one in expected:
        ids = torch.tensor(one["prompt_token_ids"])
        logprobs = feed(decoder, ids, [2, len(ids) - 2]).log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        found.append((logprobs - torch.tensor(one["prompt_logprobs"][1:])).abs())
    return torch.cat(found)


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "cpu"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_float32(shared_data: Path, name: str, reference: bool) -> None:
    decoder, expected = load(shared_data / "quantized" / name, torch.float32, reference=reference)
    found = errors(decoder, expected)
    if name in ROUNDED:
        assert found.max() <= 0.35 and 0.001 < found.mean() <= 0.08  # rounded they are: not equal
        return
    assert found.max() <= 0.01
    for one in expected:  # the greedy answer, fed at once: each token is the likeliest after those before
        prompt, answer = one["prompt_token_ids"], one["greedy_token_ids"]
        logits = feed(decoder, torch.tensor(prompt + answer), [len(prompt) + len(answer)])[len(prompt) - 1 : -1]
        close = [i for i, margin in enumerate(one["greedy_top2_margin"]) if margin < 0.02]
        sure = close[0] if close else len(answer)
        assert logits.argmax(-1).tolist()[:sure] == answer[:sure]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [n for n in CHECKPOINTS if n not in ROUNDED])
def test_half_precision(shared_data: Path, name: str, dtype: torch.dtype) -> None:
    found = errors(*load(shared_data / "quantized" / name, dtype, activation="bf16", lm_head_dtype="model"))
    assert found.mean() <= (0.04 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("name", [n for n in CHECKPOINTS if n not in ROUNDED])
def test_head_in_int8_and_activations_as_the_kernels_like(shared_data: Path, name: str) -> None:
    """What is the default with native kernels; these models are tiny, so that a rounding weighs more than in larger ones."""
    found = errors(*load(shared_data / "quantized" / name, torch.bfloat16, lm_head_dtype="int8"))
    assert found.mean() <= 0.1
