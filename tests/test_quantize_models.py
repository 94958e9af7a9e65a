"""Every architecture that is served can be quantized and judged; and what was made, others read with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.spec import ARCHITECTURES, ModelSpec
from quant.algorithms.grid import round_to_nearest
from quant.checkpoint import Checkpoint
from quant.publish import check_shape, grid_for, tensors_of
from quant.tensor import QuantTensor
from tests.quantizing import divergence, ids, logits, make, quantized

MODELS: dict[str, dict[str, Any]] = {
    "llama-tied-bfloat16": {"kind": "Llama", "tie_word_embeddings": True, "dtype": "bfloat16"},
    "llama-biases": {"kind": "Llama", "attention_bias": True, "mlp_bias": True},
    "mistral-window": {"kind": "Mistral", "sliding_window": 11, "dtype": "float16"},
    "qwen2-shards": {"kind": "Qwen2", "saved": {"max_shard_size": "100KB"}},
    "qwen3": {"kind": "Qwen3", "attention_bias": True, "tie_word_embeddings": True},
    "phi3": {"kind": "Phi3", "sliding_window": 13},
    "gemma2": {"kind": "Gemma2", "sliding_window": 13, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    "gemma3": {"kind": "Gemma3Text", "sliding_window": 13, "query_pre_attn_scalar": 16},
    "granite": {
        "kind": "Granite",
        "embedding_multiplier": 4.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
    },
    "seed-oss": {"kind": "SeedOss", "attention_out_bias": True},
    "smollm3": {"kind": "SmolLM3", "no_rope_layers": [0, 1]},
    "olmo2": {"kind": "Olmo2"},
    "olmo3": {"kind": "Olmo3", "sliding_window": 13, "layer_types": ["sliding_attention", "full_attention"]},
    "exaone4": {"kind": "Exaone4", "sliding_window": 13, "layer_types": ["sliding_attention", "full_attention"]},
    "hunyuan": {"kind": "HunYuanDenseV1"},
    "arcee": {"kind": "Arcee", "mlp_bias": True},
    "glm": {"kind": "Glm", "head_dim": 12},
    "glm4": {"kind": "Glm4", "head_dim": 12, "attention_bias": False},
    "ernie4.5": {"kind": "Ernie4_5", "head_dim": 8, "use_bias": True},
    "ministral3": {
        "kind": "Ministral3",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 16.0,
            "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.2,
        },
    },
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("dense") / request.param, num_hidden_layers=2, **MODELS[request.param])


def test_none_is_left_out() -> None:
    """But for those of whose files only a part is served, hybrids, short convolutions, xIELU, and mixtures of experts."""
    xielu = {name for name, kind in ARCHITECTURES.items() if kind.ungated == "xielu" or kind.conv}
    served = {name for name, kind in ARCHITECTURES.items() if kind.text_part or kind.hybrid or kind.mixture or kind.delta} | xielu
    kinds = {f"{one['kind'].removesuffix('Text')}ForCausalLM" for one in MODELS.values()}
    assert kinds == set(ARCHITECTURES) - served


def test_a_plain_layer_is_what_transformers_computes(model: Path) -> None:
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids()).logits.log_softmax(-1)
    assert torch.allclose(logits(model, ids()), expected, atol=2e-4)


@pytest.fixture(scope="module")
def made(model: Path) -> Path:
    """By AWQ, which changes norms, values, up projections and their biases; with zero points."""
    given = {"method": "awq", "format": "compressed-tensors", "sym": False}
    return quantized(model, model.with_name(f"{model.name}-made"), ids(samples=12), **given)


def test_quantizing_leaves_the_function_as_it_was(model: Path, made: Path, tmp_path: Path) -> None:
    rounded = divergence(quantized(model, tmp_path / "rtn", method="rtn", format="compressed-tensors"), model)
    assert divergence(made, model) < rounded
    assert divergence(quantized(model, tmp_path / "gptq", ids(samples=12), method="gptq", sym=False), model) < rounded


def test_the_engine_computes_what_the_weights_say(made: Path) -> None:
    from appliance import LLM, SamplingParams

    tokens = ids(seed=5, samples=1)
    llm = LLM(str(made), dtype="float32", reference_ops=True, kv_cache_memory_bytes=1 << 20, lm_head_dtype="model", threads=1)
    (output,) = llm.generate([{"prompt_token_ids": tokens[0].tolist()}], SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert output.prompt_logprobs is not None
    found = [entry[token].logprob for token, entry in zip(tokens[0].tolist(), output.prompt_logprobs, strict=True) if entry]
    expected = logits(made, tokens)[0, :-1].gather(1, tokens[0, 1:, None])[:, 0]
    off = (torch.tensor(found) - expected).abs()  # the engine rounds weights to the type of their scales, this does not
    coarse = 4 if "bfloat16" in made.name else 1
    assert float(off.mean()) < 0.015 * coarse and float(off.max()) < 0.15 * coarse


def test_transformers_reads_the_same_weights(made: Path) -> None:
    """By compressed-tensors' own loader in it: each weight, and the logits."""
    pytest.importorskip("compressed_tensors", exc_type=ImportError)
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    theirs = AutoModelForCausalLM.from_pretrained(
        made, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    weights = theirs.state_dict()
    with Checkpoint.open(made) as checkpoint, torch.inference_mode():
        for module in ModelSpec.from_config(checkpoint.config).modules():
            weight = checkpoint.weight(module.name, expect=(module.N, module.K))
            dense = weight.dequantize() if isinstance(weight, QuantTensor) else weight.float()
            assert torch.allclose(weights[f"{module.name}.weight"].float(), dense, rtol=2**-7, atol=0), module.name
        rounded = torch.bfloat16 if "bfloat16" in made.name else torch.float16  # to the type of the scales, as it does
        off = (logits(made, ids(), rounded) - theirs(ids()).logits.log_softmax(-1)).abs()
    assert float(off.max()) < 1e-3


@pytest.mark.parametrize("options", [{}, {"bits": 8}, {"target_bits": 8.2}])
def test_transformers_reads_the_defaults_of_compressed_tensors(tmp_path: Path, options: dict[str, Any]) -> None:
    """Without being told anything; in float32 it rounds nothing."""
    pytest.importorskip("compressed_tensors", exc_type=ImportError)
    from transformers import AutoModelForCausalLM

    source = make(tmp_path / "model", num_hidden_layers=1)
    made = quantized(source, tmp_path / "made", method="rtn", format="compressed-tensors", **options)
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)(ids()).logits.log_softmax(-1)
    assert torch.allclose(logits(made, ids()), theirs, atol=2e-4)


@pytest.mark.parametrize(
    ("N", "K", "group"), [(8, 16, 16), (8, 64, -1), (40, 72, 8), (48, 192, 64), (136, 256, 128), (24, 200, 40)]
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_autoawq_reads_the_same_weights(N: int, K: int, group: int, symmetric: bool) -> None:
    """By its own dequantizer: every shape that a layer may have, with and without zero points."""
    packing = pytest.importorskip("awq.utils.packing_utils", exc_type=ImportError)
    torch.manual_seed(N)
    weight = round_to_nearest(torch.randn(N, K), grid_for("awq", 4, group, symmetric, torch.bfloat16))
    check_shape("awq", "it", N, K, weight.grid)
    tensors = tensors_of("awq", weight)
    size = K if group == -1 else group
    found = packing.dequantize_gemm(tensors["qweight"], tensors["qzeros"], tensors["scales"].float(), 4, size)
    assert torch.equal(found.t(), weight.dequantize())
