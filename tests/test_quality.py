"""Real checkpoints through the whole engine: log-probabilities and tokens as their own tools' weights give, and perplexity."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from appliance import LLM, SamplingParams

pytestmark = pytest.mark.realdata

CHECKPOINTS = [
    "awq-gemm-g128",
    "awq-gemm-g32",
    "ct-fp8-dynamic",
    "ct-w4a16-g128",
    "ct-w8a8-int8",
    "gptq-4bit-g32-act-order",
    "gptq-4bit-g32-sym",
    "gptq-4bit-g64-asym",
    "gptq-8bit-channel",
]
QUANTIZED_ACTIVATIONS = {"ct-fp8-dynamic", "ct-w8a8-int8"}  # expected.json does not quantize them, the scheme does


def load(path: Path, **options: Any) -> LLM:
    return LLM(model=str(path), threads=1, kv_cache_memory_bytes=8 << 20, **options)


def errors(llm: LLM, expected: list[dict[str, Any]]) -> list[float]:
    """Absolute differences of all prompt log-probabilities."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": e["prompt_token_ids"]} for e in expected], params, use_tqdm=False)
    found = []
    for output, want in zip(outputs, expected, strict=True):
        assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
        pairs = zip(want["prompt_token_ids"][1:], output.prompt_logprobs[1:], want["prompt_logprobs"][1:], strict=True)
        found += [abs(got[token].logprob - value) for token, got, value in pairs if got is not None]
    return found


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_float32_gives_the_expected_values(shared_data: Path, name: str) -> None:
    path = shared_data / "quantized" / name
    expected = json.loads((path / "expected.json").read_text())
    llm = load(path, dtype="float32")
    for one in expected:
        assert llm.get_tokenizer().encode(one["prompt"]) == one["prompt_token_ids"]
    diffs = errors(llm, expected)
    if name in QUANTIZED_ACTIVATIONS:
        assert max(diffs) <= 0.35 and sum(diffs) / len(diffs) <= 0.08
        return
    assert max(diffs) <= 0.01
    outputs = llm.generate([e["prompt"] for e in expected], SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True))
    for output, want in zip(outputs, expected, strict=True):
        close = [i for i, margin in enumerate(want["greedy_top2_margin"]) if margin < 0.02]
        sure = close[0] if close else len(want["greedy_token_ids"])
        assert output.outputs[0].token_ids[:sure] == want["greedy_token_ids"][:sure]


@pytest.mark.parametrize("name", [n for n in CHECKPOINTS if n not in QUANTIZED_ACTIVATIONS])
def test_default_dtype_stays_close(shared_data: Path, name: str) -> None:
    """bfloat16 alone, and with what the defaults store and multiply in int8 (simulated elsewhere: 0.03 to 0.06)."""
    path = shared_data / "quantized" / name
    expected = json.loads((path / "expected.json").read_text())
    plain = errors(load(path, activation_dtype="bf16", lm_head_dtype="model"), expected)
    assert sum(plain) / len(plain) <= 0.03
    diffs = errors(load(path), expected)
    assert sum(diffs) / len(diffs) <= 0.07


@pytest.mark.parametrize(
    "name", ["awq-gemm-g32", "gptq-4bit-g32-act-order", "gptq-8bit-channel", "ct-w4a16-g128", "ct-w8a8-int8"]
)
def test_perplexity_of_the_default_settings(shared_data: Path, name: str) -> None:
    """Within 0.3 % of float32 over 100 windows of 256 tokens of the TinyStories text."""
    text = (shared_data / "text" / "tinystories.txt").read_text()
    found = {dtype: perplexity(load(shared_data / "quantized" / name, dtype=dtype), text) for dtype in ("float32", "auto")}
    assert found["float32"] < 100, "tokens are phrases here: 2048 would be guessing, a trained model is far below"
    assert abs(found["auto"] / found["float32"] - 1) < 0.003, found


def perplexity(llm: LLM, text: str, windows: int = 100, length: int = 256) -> float:
    ids = llm.get_tokenizer().encode(text[: windows * length * 6], add_special_tokens=False)
    bos = [1]
    prompts = [{"prompt_token_ids": bos + ids[i * length : (i + 1) * length]} for i in range(windows)]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    scores = [
        entry[token].logprob
        for o in outputs
        for token, entry in zip(o.prompt_token_ids[1:], (o.prompt_logprobs or [])[1:], strict=True)
        if entry is not None
    ]
    return math.exp(-sum(scores) / len(scores))
