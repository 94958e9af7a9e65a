"""The engine over quantized caches: the same answers however requests are cut, preempted or swapped; and what they cost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from appliance import LLM, SamplingParams
from appliance.hub import demo_model
from appliance.runtime.engine import Engine
from kernels.cpu import backend
from kernels.layout import SCALED_CACHES, kv_nbytes
from tests.runtime.conftest import answers
from tests.runtime.test_engine import mixed

Load = Callable[..., Engine]
QUANTIZED = list(SCALED_CACHES)


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_cut_preempted_or_swapped_the_answers_stay(load: Load, dtype: str) -> None:
    """A token is quantized by itself, so it does not matter with which others it was written."""
    whole = answers(load(kv_cache_dtype=dtype), mixed(1))
    assert answers(load(kv_cache_dtype=dtype, max_num_batched_tokens=33), mixed(1)) == whole
    block = 2 * 2 * 2 * kv_nbytes(dtype, 16) * 16  # layers, k and v, heads; 16 tokens
    for swap_space, mode in ((0.0, "recompute"), (0.01, "swap")):
        engine = load(
            kv_cache_dtype=dtype, max_model_len=160, kv_cache_memory_bytes=11 * block, swap_space=swap_space, preemption_mode=mode
        )
        assert engine.scheduler.pool.num_blocks == 11
        assert answers(engine, mixed(1)) == whole
        stats = engine.stats()
        assert stats.preemptions > 0 and (stats.swaps > 0) == (mode == "swap")


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("kind", ["torch", "native"])
def test_other_operators_agree_with_the_reference(load: Load, dtype: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32; a code that their rounding moves may turn a near-tie over."""
    if kind == "native" and backend.native() is None:
        pytest.skip("the native extension is not built")
    expected = answers(load(kv_cache_dtype=dtype), mixed(1))
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "torch" if kind == "torch" else "auto")
    found = answers(load(kv_cache_dtype=dtype, reference_ops=False), mixed(1))
    assert sum(found[key] == expected[key] for key in expected) >= len(expected) - 2


@pytest.mark.parametrize("dtype", ["auto", "fp8", *QUANTIZED])
def test_the_demo_model_still_knows_its_answers(dtype: str) -> None:
    items = [json.loads(line) for line in (demo_model() / "heldout.jsonl").read_text().splitlines()][::8]
    llm = LLM(model=str(demo_model()), threads=1, kv_cache_dtype=dtype, kv_cache_memory_bytes=4 << 20)
    outputs = llm.chat(
        [[{"role": "user", "content": i["question"]}] for i in items], SamplingParams(temperature=0), use_tqdm=False
    )
    right = sum(o.outputs[0].text.strip() == i["answer"] for o, i in zip(outputs, items, strict=True))
    assert right >= 0.85 * len(items)


@pytest.mark.realdata
def test_what_eight_bits_cost(shared_data: Path) -> None:
    """fp8 and int8: at most half a percent of perplexity, with nothing else in less than float32."""
    text = (shared_data / "text" / "tinystories.txt").read_text()
    found = {dtype: perplexity(shared_data / "models/TinyStories-656K", dtype, text) for dtype in ("auto", "fp8", "int8")}
    assert found["auto"] < 100, "tokens are phrases here: 2048 would be guessing"
    assert found["fp8"] != found["auto"] != found["int8"]
    assert max(found["fp8"], found["int8"]) / found["auto"] - 1 <= 0.005, found


def perplexity(model: Path, dtype: str, text: str, windows: int = 16, length: int = 400) -> float:
    llm = LLM(model=str(model), threads=1, dtype="float32", kv_cache_dtype=dtype, kv_cache_memory_bytes=16 << 20)
    ids = llm.get_tokenizer().encode(text[: windows * length * 6], add_special_tokens=False)
    prompts = [{"prompt_token_ids": [1, *ids[i * length : (i + 1) * length]]} for i in range(windows)]
    scores = [
        entry[token].logprob
        for o in llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
        for token, entry in zip(o.prompt_token_ids[1:], (o.prompt_logprobs or [])[1:], strict=True)
        if entry is not None
    ]
    return math.exp(-sum(scores) / len(scores))
