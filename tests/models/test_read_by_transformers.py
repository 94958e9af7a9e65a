"""What config.json leaves unsaid or overdoes: read as transformers reads it, or refused."""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from models.fields import Fields
from models.rope import _frequencies
from models.rope_spec import read_rope
from models.spec import ARCHITECTURES, ModelSpec
from quant.errors import InputError
from quant.headers import CheckpointIndex
from quant.scheme import read_scheme

MODEL_TYPES = {
    "LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Ministral3ForCausalLM": "ministral3",
    "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "Phi3ForCausalLM": "phi3", "Qwen3MoeForCausalLM": "qwen3_moe",
    "Qwen2MoeForCausalLM": "qwen2_moe", "Glm4MoeForCausalLM": "glm4_moe", "Ernie4_5_MoeForCausalLM": "ernie4_5_moe",
    "Glm4vMoeForConditionalGeneration": "glm4v_moe", "SolarOpenForCausalLM": "solar_open", "Dots1ForCausalLM": "dots1",
    "MixtralForCausalLM": "mixtral", "GptOssForCausalLM": "gpt_oss", "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text", "Gemma3ForConditionalGeneration": "gemma3", "GraniteForCausalLM": "granite",
    "Gemma4ForCausalLM": "gemma4_text", "Gemma4ForConditionalGeneration": "gemma4",
    "GlmForCausalLM": "glm", "Glm4ForCausalLM": "glm4", "Ernie4_5ForCausalLM": "ernie4_5",
    "GraniteMoeHybridForCausalLM": "granitemoehybrid", "SeedOssForCausalLM": "seed_oss", "SmolLM3ForCausalLM": "smollm3",
    "Mistral3ForConditionalGeneration": "mistral3", "LlavaForConditionalGeneration": "llava",
    "Qwen2VLForConditionalGeneration": "qwen2_vl", "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl", "Qwen3_5ForCausalLM": "qwen3_5_text",
    "Qwen3_5ForConditionalGeneration": "qwen3_5", "Qwen3_5MoeForCausalLM": "qwen3_5_moe_text",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5_moe", "Qwen3NextForCausalLM": "qwen3_next",
    "DeepseekV2ForCausalLM": "deepseek_v2", "DeepseekV3ForCausalLM": "deepseek_v3", "Glm4MoeLiteForCausalLM": "glm4_moe_lite",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe", "MiniMaxM2ForCausalLM": "minimax_m2",
    "GraniteMoeForCausalLM": "granitemoe", "Olmo2ForCausalLM": "olmo2", "Olmo3ForCausalLM": "olmo3", "OlmoeForCausalLM": "olmoe",
    "Exaone4ForCausalLM": "exaone4", "ExaoneMoeForCausalLM": "exaone_moe", "HunYuanDenseV1ForCausalLM": "hunyuan_v1_dense",
    "HunYuanMoEV1ForCausalLM": "hunyuan_v1_moe", "ArceeForCausalLM": "arcee", "ApertusForCausalLM": "apertus",
    "Lfm2ForCausalLM": "lfm2", "Lfm2MoeForCausalLM": "lfm2_moe",
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_windows_that_no_key_states_are_those_of_transformers(name: str) -> None:
    """All layers' windows, where the config switches them on and does not say how many positions they have."""
    kind, layers = ARCHITECTURES[name], 7
    sizes = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "max_position_embeddings")
    text: dict[str, Any] = {
        **dict.fromkeys(sizes, 8),
        "hidden_size": 64,
        "num_hidden_layers": layers,
        "vocab_size": 40,
        "use_sliding_window": True,
    }
    text |= {"max_window_layers": 2, "shared_intermediate_size": 8, "moe_intermediate_size": 8, "pad_token_id": 0}
    text |= {"layer_types": ["full_attention"] * layers} if kind.hybrid else {}
    text |= {} if kind.mixture else {"num_local_experts": 0}
    text |= {"hidden_size_per_layer_input": 0} if kind.global_heads else {}
    config = {"text_config": text} if kind.text_part else text
    theirs = AutoConfig.for_model(MODEL_TYPES[name], **config).get_text_config()
    window, types = (
        getattr(theirs, "sliding_window", None),
        getattr(theirs, "layer_types", None) or ["sliding_attention"] * layers,
    )
    expected = tuple(window if one == "sliding_attention" else None for one in types)
    experts = {"num_local_experts": 4, kind.expert_choice: 2} if kind.mixture else {}
    ours = {"text_config": {**text, **experts}} if kind.text_part else {**text, **experts}
    assert ModelSpec.from_config({**ours, "architectures": [name]}).windows == expected


@pytest.mark.parametrize("text", [None, False, True])
@pytest.mark.parametrize(
    "name",
    [
        "Mistral3",
        "Llava",
        "Qwen2VL",
        "Qwen2_5_VL",
        "Qwen3VL",
        "Gemma3",
        "Gemma4",
        "Llama",
        "SmolLM3",
        "Gemma2",
        "Glm4",
        "Ernie4_5",
    ]
    + ["Qwen3_5"],
)
def test_models_without_a_head_are_tied_where_transformers_ties_them(tmp_path: Path, name: str, text: bool | None) -> None:
    """Nothing is said of the whole: every class has a rule of its own for what its text part says, or does not.

    Those of Qwen3-VL and Qwen3.5 pass over a text part that says so, and have no head then: here they are tied.
    """
    whole = name in ("Mistral3", "Llava", "Gemma3", "Gemma4", "Qwen3_5") or name.endswith("VL")
    architecture = f"{name}For{'ConditionalGeneration' if whole else 'CausalLM'}"
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    said = {} if text is None else {"tie_word_embeddings": text}
    part = {**dict.fromkeys(sizes, 8), "max_position_embeddings": 8, "vocab_size": 8, "pad_token_id": 0, **said}
    part |= {"model_type": "mistral"} if name in ("Mistral3", "Llava") else {}
    part |= {"hidden_size_per_layer_input": 0} if name == "Gemma4" else {}
    config = {"text_config": part} if whole else part
    save_file({"language_model.model.norm.weight": torch.zeros(4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    theirs = AutoConfig.for_model(MODEL_TYPES[architecture], **copy.deepcopy(config))
    ours = ModelSpec.from_config(read_scheme(CheckpointIndex.open(tmp_path))[0])
    assert ours.tie_embeddings is (theirs.tie_word_embeddings or (text is True and name in ("Qwen3VL", "Qwen3_5")))


ODD = (0, -1, math.nan, math.inf, 1e-40, 1e300, "2", True, [1])


def draw(rng: random.Random, kind: str, rotary: int) -> dict[str, Any]:
    """Settings most of which are sound, and some of which go together badly."""

    def one(*sound: float | str) -> Any:
        return rng.choice(sound) if rng.random() < 0.95 else rng.choice(ODD)

    keys: dict[str, tuple[float | str, ...]] = {
        "factor": (1, 2.0, 8.5, 0.5),
        "original_max_position_embeddings": (1, 7, 64, 32768),
    }
    if kind == "llama3":
        keys |= {"low_freq_factor": (1.0, 2, 4), "high_freq_factor": (4.0, 1, 8)}
    if kind == "yarn":
        keys |= {"beta_fast": (32, 2.5, 0.5), "beta_slow": (1, 0.25, 2.5), "attention_factor": (0.7, 2), "mscale": (1.0, 0.7, 0)}
        keys |= {"mscale_all_dim": (0.8, 0), "truncate": (True, False)}
    always = ("factor", "low_freq_factor", "high_freq_factor")
    found: dict[str, Any] = {key: one(*sound) for key, sound in keys.items() if key in always or rng.random() < 0.6}
    if kind == "longrope":
        found |= {f"{name}_factor": [one(1.0, 1.5, 3, 40.0) for _ in range(rotary // 2)] for name in ("short", "long")}
    return {"rope_type": kind, "rope_theta": one(1e4, 5e5, 10, 1.5, 1.01), **found}


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "yarn", "longrope"])
def test_frequencies_are_those_of_transformers_or_refused(kind: str) -> None:
    rng, refused, same = random.Random(kind), 0, 0
    for _ in range(120):
        size, positions = rng.choice([2, 4, 16, 128]), rng.choice([4, 64, 131072])
        settings = draw(rng, kind, size)
        length = rng.choice([positions, 2 * positions])
        try:
            rope = read_rope(Fields({"max_position_embeddings": positions, "rope_scaling": settings}), size, positions)
        except InputError:
            refused += 1
            continue
        inverse, scale = _frequencies(rope, length)
        assert inverse.isfinite().all() and math.isfinite(scale) and scale > 0, settings
        config = LlamaConfig(
            hidden_size=size, num_attention_heads=1, max_position_embeddings=positions, rope_parameters=dict(settings)
        )
        expected, factor = ROPE_INIT_FUNCTIONS[kind](config, None, seq_len=length)
        assert torch.allclose(inverse, expected, rtol=2e-5, atol=1e-30) and scale == pytest.approx(factor), (settings, size)
        same += 1
    assert refused > 5 and same > 20, (refused, same)


@pytest.mark.parametrize("name", ["yarn", "longrope"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_what_phi3_calls_its_scaling(name: str, key: str) -> None:
    """Lists of factors, whatever stands above them: frequencies and the scale of both, below and beyond the original context."""
    settings = {key: name, "short_factor": [1.0, 1.25, 1.5, 2.0], "long_factor": [1.5, 3, 7.0, 40]}
    sizes = {"hidden_size": 16, "intermediate_size": 2, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    config: dict[str, Any] = {**sizes, "max_position_embeddings": 8192, "original_max_position_embeddings": 1024}
    theirs = Phi3Config(**config, rope_scaling=dict(settings), pad_token_id=0)
    rope = ModelSpec.from_config({**config, "rope_scaling": settings, "architectures": ["Phi3ForCausalLM"]}).rope
    assert rope.kind == theirs.rope_parameters["rope_type"] == "longrope"
    for length in (1024, 1025):
        expected, factor = ROPE_INIT_FUNCTIONS["longrope"](theirs, None, seq_len=length)
        inverse, scale = _frequencies(rope, length)
        assert torch.allclose(inverse, expected, rtol=2e-6) and scale == pytest.approx(factor)
    with pytest.raises(InputError, match="rope type longrope needs 'short_factor' and it is missing"):
        ModelSpec.from_config({**config, "rope_scaling": {key: name, "factor": 8.0}, "architectures": ["Phi3ForCausalLM"]})


def test_the_original_context_of_phi3() -> None:
    """Where config.json has it among the rope settings alone, that of the family counts."""
    settings = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "original_max_position_embeddings": 16}
    sizes = {"hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    for beside in ({}, {"original_max_position_embeddings": 32}):
        theirs = Phi3Config(**sizes, max_position_embeddings=8192, rope_scaling=dict(settings), pad_token_id=0, **beside)
        config = {
            **sizes,
            "max_position_embeddings": 8192,
            "rope_scaling": settings,
            "architectures": ["Phi3ForCausalLM"],
            **beside,
        }
        ours = ModelSpec.from_config(config).rope
        assert ours.original_max_position == theirs.rope_parameters["original_max_position_embeddings"]
