"""What is planned for steps of torch's operators, against the tensors that they make."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from appliance.config import EngineConfig
from appliance.memory.activations import NORMED
from appliance.memory.demand import Demand, attention_workspace, product_workspace
from appliance.memory.modules import Machinery, parents
from appliance.memory.planner import make_plan
from appliance.runtime import warmup
from kernels.cpu.torch_ops import rms_norm
from models.spec import ModelSpec
from quant.rules import WeightScheme
from quant.scheme import QuantScheme
from tests.memory.gemma4 import EXPERTS, SMALL, write_gemma4
from tests.memory.published import QWEN2_MOE, fill, write_published
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("normed", [False, True])
def test_queries_that_take_the_most(tmp_path: Path, normed: bool, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many heads: the residual stream, q, k and v, queries that are normalized, and what turning them takes."""
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "torch")
    kind = {"architectures": ["Qwen3ForCausalLM" if normed else "LlamaForCausalLM"], "hidden_act": "silu"}
    config = {**GEMMA, **kind, "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 16}
    folder = fill(write_published(tmp_path, config, "none"), "none")
    tokens, size, q = 2 * TOKENS, {"bfloat16": 2, "float32": 4}[dtype], 16 * 64
    options = EngineConfig(
        model=str(folder), dtype=dtype, max_model_len=TOKENS, max_num_batched_tokens=tokens, threads=1, skip_tokenizer_init=True,
        kv_cache_memory_bytes=4 << 20,
    )  # fmt: skip
    plan = make_plan(folder, options, CPU)
    turning = {2: 8, 4: 4}[size] * q + size * q
    assert plan.scratch["activations"] == (size * (256 + q + 2 * 64 + normed * q) + turning + 24) * tokens
    taken = most(plan, options, warmup.Trial(((0, TOKENS),) * 2))
    assert 0.98 * plan.scratch["activations"] < taken < plan.scratch["activations"] + plan.scratch["products"]


DELTA = {
    **LLAMA, "architectures": ["Qwen3NextForCausalLM"], "hidden_size": 256, "intermediate_size": 256, "head_dim": 64,
    "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 64,
    "linear_value_head_dim": 64, "linear_num_key_heads": 1, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    "num_experts": 2, "num_experts_per_tok": 1,
}  # fmt: skip


@pytest.mark.parametrize("heads", [16, 64])
def test_the_delta_rule_where_its_blocks_are_given_back(heads: int) -> None:
    """They are there beside what its own layer has, not beside the widest point; smaller ones stay with the allocator."""
    spec = ModelSpec.from_config({**DELTA, "linear_num_value_heads": heads})
    machinery = Machinery(ops="cpu", dtype="bfloat16", head_bits=None)
    demand = Demand.of(spec, QuantScheme("none"), machinery, model="some")
    channels = 2 * 64 + heads * 64
    rule = 4 * 256 * (6 * channels + heads * (4 * 64 + 6 * 64 + 8))
    assert rule > attention_workspace(replace(spec, delta=None), machinery)
    if heads == 16:  # 256 rows of 1152 channels in float32
        assert attention_workspace(spec, machinery) == rule and not demand.moments
        assert demand.products(2048, 512) == demand.slab
    else:
        assert attention_workspace(spec, machinery) == attention_workspace(replace(spec, delta=None), machinery)
        layer = 2 * (2 * 256 + heads * 64 + channels + heads * 64 + 2 * heads)  # both hidden states, result, qkvz, b and a
        assert demand.products(2048, 512) == demand.slab + max(0, rule + 2048 * (layer - demand.token_bytes))
        assert demand.products(1, 512) == demand.slab + rule + layer - demand.token_bytes


def test_experts_beside_an_mlp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 4's: the mixture is beside what the MLP made of gate and up, not beside these. Each expert has all tokens here."""
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "torch")
    hidden, inner, own = 256, 512, 128
    more = {"intermediate_size": inner, "num_experts": 2, "global_head_dim": 64, "max_position_embeddings": TOKENS}
    folder = fill(write_gemma4(tmp_path, {**SMALL, **EXPERTS, **more, "moe_intermediate_size": own}, "none"), "none")
    options = EngineConfig(
        model=str(folder), max_model_len=TOKENS, max_num_batched_tokens=TOKENS, threads=1, skip_tokenizer_init=True,
        kv_cache_memory_bytes=4 << 20,
    )  # fmt: skip
    plan = make_plan(folder, options, CPU)
    expert = 2 * 2 * own + 2 * 2 * own  # gate and up, and a slab of them
    results = hidden * (3 * 4 + 2) + 2 * own  # three in float32, one as it is made, and what that is made of
    mixture = max(hidden * (2 * 4 + 2) + 2 * own + expert, results) + 24 * 2 + 2 * (inner + hidden)
    assert plan.scratch["activations"] == (2 * 2 * hidden + mixture + 24) * TOKENS
    taken = most(plan, options, warmup.Trial(((0, TOKENS),)))
    assert abs(taken - plan.scratch["activations"]) < 0.03 * taken


def test_a_shared_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2-MoE's, twice as wide as the others: its result is there beside the sum, and beside the last expert's."""
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "torch")
    sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 256}
    more = {"num_experts": 3, "num_experts_per_tok": 2, "max_position_embeddings": TOKENS}
    folder = fill(write_published(tmp_path, {**QWEN2_MOE, **sizes, **more}, "none"), "none")
    options = EngineConfig(
        model=str(folder), max_model_len=TOKENS, max_num_batched_tokens=TOKENS, threads=1, skip_tokenizer_init=True,
        kv_cache_memory_bytes=4 << 20,
    )  # fmt: skip
    plan = make_plan(folder, options, CPU)
    assert plan.scratch["activations"] == (2 * 2 * HIDDEN + HIDDEN * (3 * 4 + 2) + 2 * 256 + 24 * 3 + 24) * TOKENS
    taken = most(plan, options, warmup.Trial(((0, TOKENS),)))
    assert abs(taken - plan.scratch["activations"]) < 0.03 * taken


@pytest.mark.parametrize("wide", [128, 4096])
def test_first_layers_without_experts(wide: int) -> None:
    """GLM-4.5's: the MLP of a dense layer, or an expert with what a mixture has, whichever is more."""
    sizes = {"first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
    sizes["moe_intermediate_size"] = 64
    spec = ModelSpec.from_config({**LLAMA, **sizes, "architectures": ["Glm4MoeForCausalLM"], "intermediate_size": wide})
    demand = Demand.of(spec, QuantScheme("none"), Machinery(ops="cpu", dtype="bfloat16", head_bits=None), model="some")
    mixture = HIDDEN * (3 * 4 + 2) + 2 * 64 + 24 * 4
    assert demand.token_bytes == 2 * 2 * HIDDEN + max(3 * 2 * wide, mixture) + 24


def test_queries_of_latents() -> None:
    """As they turn: the residual stream, queries and the key, both rotated features in float32, and the result."""
    sizes = {"q_lora_rank": 96, "kv_lora_rank": 128, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64}
    more = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
        "n_group": 1,
    }
    config = {**LLAMA, **sizes, **more, "topk_group": 1, "num_attention_heads": 16, "num_key_value_heads": 16}
    spec = ModelSpec.from_config({**config, "architectures": ["DeepseekV3ForCausalLM"]})
    demand = Demand.of(spec, QuantScheme("none"), Machinery(ops="cpu", dtype="bfloat16", head_bits=None), model="some")
    queries, key = 16 * (32 + 128), 32 + 128
    assert demand.token_bytes == 2 * (HIDDEN + 2 * queries + key) + 8 * 16 * 32 + 24


def test_activations_without_a_gate() -> None:
    """Of what is made for them all is given back: it counts beside the one product, not beside the widest point of a layer."""
    sizes, machinery = {"hidden_size": 64, "intermediate_size": 128}, Machinery(ops="cpu", dtype="bfloat16", head_bits=None)
    relu2, xielu = (
        Demand.of(ModelSpec.from_config({**LLAMA, **sizes, **more}), QuantScheme("none"), machinery, model="some")
        for more in (
            {"architectures": ["ArceeForCausalLM"], "hidden_act": "relu2"},
            {"architectures": ["ApertusForCausalLM"], "hidden_act": "xielu"},
        )
    )
    assert relu2.slab == xielu.slab == relu2.products(2048, 512) and not relu2.moments
    five = 5 * 4 << 20  # float32, of a million values at a time
    assert xielu.products(2048, 512) == xielu.slab + max(0, five + 2048 * (2 * (2 * 64 + 128) - xielu.token_bytes))
    spec = ModelSpec.from_config(
        {**LLAMA, "intermediate_size": 4096, "architectures": ["ArceeForCausalLM"], "hidden_act": "relu2"}
    )
    wide = Demand.of(spec, QuantScheme("none"), machinery, model="some")
    assert wide.token_bytes == 2 * (2 * HIDDEN + 4096) + 2 * 4096 + 24  # both hidden states, the product, a slab of it


@pytest.mark.parametrize("inner", [256, 1280])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_activations_that_are_rounded(tmp_path: Path, dtype: str, inner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """W8A8: beside the input in float32 and its codes, the sums of q, k and v, or of gate and up, are float32 twice."""
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "torch")
    config = {**LLAMA, "intermediate_size": inner, "num_attention_heads": 8}
    folder, size = fill(write_published(tmp_path, config, "ct-w8a8"), "ct-w8a8"), {"bfloat16": 2, "float32": 4}[dtype]
    options = EngineConfig(
        model=str(folder), dtype=dtype, max_model_len=TOKENS, max_num_batched_tokens=TOKENS, threads=1, skip_tokenizer_init=True,
        kv_cache_memory_bytes=4 << 20,
    )  # fmt: skip
    plan = make_plan(folder, options, CPU)
    outputs, attention = max(2 * inner, 10 * 64), plan.scratch["products"]
    copy = 4 if size == 2 else 0
    assert plan.scratch["activations"] == (2 * size * HIDDEN + (copy + 1) * HIDDEN + 8 * outputs + 24) * TOKENS
    taken = most(plan, options, warmup.Trial(((0, TOKENS),)))
    assert 0.97 * plan.scratch["activations"] < taken < 1.03 * plan.scratch["activations"] + (outputs == 10 * 64) * attention


def test_a_slab_is_no_larger_than_its_weight(tmp_path: Path) -> None:
    """Of expanded weights: the widest one here has 1,280 outputs, where a slab has room for 4,096."""
    spec, machinery = ModelSpec.from_config(LLAMA), Machinery(ops="cpu", dtype="bfloat16", head_bits=None)
    scheme = QuantScheme("awq", default=WeightScheme("awq-gemm", bits=4, group_size=128, symmetric=False))
    made = [one for parent in parents(spec, scheme) for one in parent.joined]
    assert product_workspace(spec, made, machinery) == 2 * 2 * HIDDEN * 2 * INNER
    wide = ModelSpec.from_config({**LLAMA, "intermediate_size": 1 << 14})
    made = [one for parent in parents(wide, scheme) for one in parent.joined]
    assert product_workspace(wide, made, machinery) == 2 * (4 << 20)
