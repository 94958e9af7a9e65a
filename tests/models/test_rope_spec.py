"""Rope settings that are damaged, or mean different things to different implementations: refused when config.json is read."""

from __future__ import annotations

from typing import Any

import pytest

from models.spec import ARCHITECTURES, ModelSpec
from quant.errors import InputError
from tests.models.test_spec import LLAMA, read

YARN = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
REFUSED_ROPES: list[tuple[dict[str, Any], str]] = [
    ({**YARN, "beta_fast": -1}, "beta_fast is -1, expected a positive number"),
    ({**YARN, "beta_slow": 0}, "beta_slow is 0, expected a positive number"),
    ({**YARN, "beta_slow": 33}, "beta_fast of 32.0 and a beta_slow of 33.0, expected the first to be no less than the second"),
    ({**YARN, "attention_factor": 0.0}, "attention_factor is 0.0, expected a positive number"),
    ({**YARN, "factor": 0}, "factor is 0, expected a positive number"),
    ({**YARN, "mscale": -0.1}, "mscale is -0.1, expected a positive number"),
    ({**YARN, "mscale_all_dim": float("nan")}, "mscale_all_dim is nan, expected a positive number"),
    ({**YARN, "truncate": "false"}, "truncate is 'false', expected true or false"),
    ({**YARN, "rope_theta": 1.0}, "rope settings of config.json: rope_theta is 1.0, expected a number above 1"),
    ({**YARN, "original_max_position_embeddings": 6}, "yarn has 6 original_max_position_embeddings, expected 7 to "),
    ({**YARN, "original_max_position_embeddings": 512, "rope_theta": 1.5}, "expected 7 to 408 for a beta_slow"),
    ({**YARN, "llama_4_scaling_beta": float("inf")}, "llama_4_scaling_beta is inf, expected a positive number"),
    ({**LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor of 4.0 and a high_freq_factor of 4.0, expected the first to be less"),
    ({**LLAMA3, "low_freq_factor": 5.0}, "low_freq_factor of 5.0 and a high_freq_factor of 4.0, expected the first to be less"),
    ({**LLAMA3, "high_freq_factor": float("nan")}, "high_freq_factor is nan, expected a positive number"),
    ({**LONGROPE, "original_max_position_embeddings": 1}, "longrope has 1 original_max_position_embeddings, expected at least 2"),
    ({**LONGROPE, "long_factor": [1.0, float("inf"), 1, 1]}, "long_factor[1] is inf, expected a positive number"),
    ({**LONGROPE, "short_factor": [1.0, 1, 1, True]}, "short_factor[3] is True, expected a positive number"),
    ({**LONGROPE, "attention_factor": -2}, "attention_factor is -2, expected a positive number"),
    ({"rope_type": "linear", "factor": 1e-3}, "a rope factor of 0.001 leaves no position of 512 max_position_embeddings"),
    ({"rope_type": "linear", "factor": 1e-40}, "factor is 1e-40, expected a positive number"),
]  # fmt: skip


@pytest.mark.parametrize("settings,message", REFUSED_ROPES)
def test_refused_ropes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        read(rope_scaling=settings)
    assert message in str(error.value)


@pytest.mark.parametrize("changes,message", [
    ({"rope_theta": 1}, "config.json: rope_theta is 1, expected a number above 1"),
    ({"rope_theta": 0.5, "rope_scaling": LLAMA3}, "config.json: rope_theta is 0.5, expected a number above 1"),
    ({"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2}}, "dynamic needs 4 rotary features or more, and"),
    ({"head_dim": 7}, "partial_rotary_factor 1.0 of head size 7 gives 7 rotary features, expected an even number of at least 2"),
    ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5, expected 1: all features of a head rotate in"),
])  # fmt: skip
def test_refused_rotation(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        read(**changes)
    assert message in str(error.value)


def test_a_base_of_windows_is_refused_by_its_name() -> None:
    with pytest.raises(InputError, match="rope_local_base_freq is 1, expected a number above 1"):
        read("Gemma3ForCausalLM", rope_local_base_freq=1)


PARTIAL = (
    "Phi3ForCausalLM", "GlmForCausalLM", "Glm4ForCausalLM", "Glm4MoeForCausalLM", "Glm4vMoeForConditionalGeneration",
    "Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration",
    "Qwen3NextForCausalLM", "MiniMaxM2ForCausalLM",
)  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_who_rotates_a_part_of_each_head(architecture: str) -> None:
    """Found with tiny models of all. The others' in transformers pass over it, or fail, and vLLM's do not."""
    kind = ARCHITECTURES[architecture]
    more: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8} if kind.mixture else {}
    more |= {"layer_types": ["attention"] * 3, "num_local_experts": 0, "shared_intermediate_size": 8} if kind.hybrid else {}
    more |= {"layer_types": ["linear_attention"] * 2 + ["full_attention"]} if kind.delta else {}
    last = {"layer_types": [*["sliding_attention"] * 2, "full_attention"], "hidden_size_per_layer_input": 0}
    more |= {"head_dim": 8, "hidden_act": kind.ungated or "silu", **(last if kind.global_heads else {})}
    half = {"partial_rotary_factor": 0.5}
    places: list[dict[str, Any]] = [half, {"rope_parameters": {"full_attention": half} if kind.local_theta is not None else half}]
    places += [] if kind.local_theta is not None else [{"rope_scaling": half}]
    for place in places:
        text = {key: value for key, value in LLAMA.items() if key != "architectures"} | more | place
        config = {"architectures": [architecture], **({"text_config": text} if kind.text_part else text)}
        if architecture in PARTIAL:
            assert ModelSpec.from_config(config).rope.rotary_dim == 4
        else:
            with pytest.raises(InputError, match=rf"partial_rotary_factor is 0\.5, expected 1: .* in a {architecture}"):
                ModelSpec.from_config(config)


def test_shares_of_a_head_are_cut_as_transformers_cuts_them() -> None:
    sizes = {share: read("Phi3ForCausalLM", partial_rotary_factor=share).rope.rotary_dim for share in (0.34, 0.5, 0.76, 1)}
    assert list(sizes.values()) == [2, 4, 6, 8]
    for share, rotary in ((0.1, 0), (0.4, 3), (0.99, 7)):
        with pytest.raises(
            InputError, match=f"partial_rotary_factor {share} of head size 8 gives {rotary} rotary features, expected"
        ):
            read("Phi3ForCausalLM", partial_rotary_factor=share)
    with pytest.raises(InputError, match=r"partial_rotary_factor is 1\.1, expected a positive number of at most 1"):
        read("Phi3ForCausalLM", partial_rotary_factor=1.1)
