"""What is planned for steps of torch's operators, against the tensors that they make."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from appliance.config import EngineConfig
from appliance.memory.demand import NORMED
from appliance.memory.planner import make_plan
from appliance.runtime import warmup
from kernels.cpu.torch_ops import rms_norm
from tests.memory.published import fill, write_published
from tests.memory.test_reference import CPU, most

HIDDEN, INNER, TOKENS = 512, 640, 1024
GEMMA = {
    "architectures": ["Gemma2ForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 203, "max_position_embeddings": TOKENS,
    "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "attn_logit_softcapping": None,
}  # fmt: skip
LLAMA = {**GEMMA, "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bytes_of_a_norm(dtype: torch.dtype, offset: float) -> None:
    x, weight = torch.randn(600, 256).to(dtype), torch.ones(256, dtype=dtype)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen, torch.inference_mode():
        rms_norm(x, weight, eps=1e-6, offset=offset)
    held = highest = 0
    for event in sorted((e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    of_rows_and_weight = 3 * 4 * (600 + 256)
    assert 0 <= highest - NORMED[x.itemsize] * x.numel() <= of_rows_and_weight


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_norms_that_take_the_most(tmp_path: Path, after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an MLP that is hardly wider than the model: float32 copies of a norm are more than gate, up and their product.

    Before a product the residual stream is beside it; after one also what that was made of, and what came of it.
    """
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "torch")
    folder = fill(write_published(tmp_path, GEMMA if after else LLAMA, "none"), "none")
    options = EngineConfig(
        model=str(folder), max_model_len=TOKENS, max_num_batched_tokens=TOKENS, threads=1, skip_tokenizer_init=True,
        kv_cache_memory_bytes=4 << 20,
    )  # fmt: skip
    plan = make_plan(folder, options, CPU)
    token = 2 * HIDDEN + NORMED[2] * HIDDEN + (2 * (HIDDEN + INNER) if after else 0)
    assert plan.scratch["activations"] == (token + 24) * TOKENS
    taken = most(plan, options, warmup.Trial(((0, TOKENS),)))
    assert abs(taken - plan.scratch["activations"]) < 0.02 * taken
