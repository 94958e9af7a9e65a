"""Plans of models with attention over latents: a token's numbers are in the cache once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from appliance.config import EngineConfig
from appliance.memory.demand import Demand
from appliance.memory.devices import DeviceInfo
from appliance.memory.fit import fit
from appliance.memory.modules import Machinery
from appliance.memory.planner import make_plan, read_settings
from appliance.memory.shard import shard
from appliance.quantize.job import check_kind
from models.spec import ModelSpec
from quant.errors import InputError
from quant.headers import CheckpointIndex
from quant.scheme import read_scheme
from tests.memory.published import DEEPSEEK_V2, DEEPSEEK_V3, fill, write_published
from tests.memory.test_planner import compare, kind  # noqa: F401

GIB = 1 << 30
CARD = DeviceInfo("cuda", "a card with 192 GiB", 192 * GIB, 190 * GIB, capability=90)


@pytest.fixture(scope="module")
def v3(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 671B, in blocks of FP8, as published but for the layer that guesses tokens ahead."""
    config = json.loads((shared_data / "configs" / "deepseek-ai--DeepSeek-V3_config.json").read_text())
    return write_published(tmp_path_factory.mktemp("v3"), {**config, "num_nextn_predict_layers": 0}, "fp8-blocks")


@pytest.mark.realdata
def test_deepseek_v3_worked_out_by_hand(v3: Path) -> None:
    """61 layers; 3 have an MLP of 18,432 features, 58 have 256 experts of 2,048 and one that all tokens go through.

    Native kernels keep FP8 in a byte and a float32 for each output and 128 inputs, outputs in whole panels of 64; kv_b_proj is
    dense, in bfloat16. q_a_proj and kv_a_proj_with_mqa are one weight of 1536 + 576 outputs.
    """
    settings, scheme = read_scheme(CheckpointIndex.open(v3))
    spec, native = ModelSpec.from_config(settings), Machinery(ops="cpu-native", dtype="bfloat16", head_bits=8)
    demand = Demand.of(spec, scheme, native, model="m")

    def fp8(outputs: int, inputs: int) -> int:
        return outputs * (inputs + 4 * inputs // 128)

    attention = fp8(1536 + 576, 7168) + fp8(128 * 192, 1536) + 128 * 256 * 512 * 2 + fp8(7168, 128 * 128)
    expert = 3 * fp8(2048, 7168)
    assert fp8(2048, 7168) == fp8(7168, 2048)
    assert demand.weights == {
        "embedding": 129280 * 7168 * 2,
        "attention": 61 * attention,
        "mlp": 3 * 3 * fp8(18432, 7168) + 58 * expert,
        "router": 58 * 256 * 7168 * 2,
        "experts": 58 * 256 * expert,
        "head": 129280 * (7168 + 4),
        "norms": 2 * (7168 + 61 * (2 * 7168 + 1536 + 512)) + 4 * 58 * 256,
    }
    assert spec.num_parameters == 671_026_419_200
    assert demand.kv(16).token_bytes == 61 * 576 * 2, "70 KB a token; keys and values of 128 heads would be 5 MB"
    assert demand.kv(16, "fp8_e4m3").token_bytes == 61 * (576 + 4)
    assert spec.scale == pytest.approx(192**-0.5 * 1.8739, rel=1e-4), "YaRN's 1 + 0.1 log 40, squared"
    machine = DeviceInfo("cpu", "machine", 1400 * GIB, 1400 * GIB)
    plan = fit(demand, read_settings(EngineConfig(max_model_len=8192), machine), machine)
    assert plan.kv.block_bytes == 16 * 61 * 576 * 2 and 630 * GIB < plan.weight_bytes < 680 * GIB


def test_cards_take_it(tmp_path: Path) -> None:
    """Not DeepSeek's own V3, whose experts are chosen by groups; Kimi K2, which is its architecture with one group."""
    one_group = {**DEEPSEEK_V3, "n_group": 1, "topk_group": 1}
    plan = make_plan(write_published(tmp_path / "one", one_group, "none"), EngineConfig(), CARD)
    assert plan.kv.token_bytes == DEEPSEEK_V3["num_hidden_layers"] * (128 + 32) * 2
    with pytest.raises(InputError, match=r"cards have no kernel for experts in groups \(n_group\): --device cpu serves it"):
        make_plan(write_published(tmp_path / "three", DEEPSEEK_V3, "none"), EngineConfig(), CARD)


def test_it_is_neither_divided_nor_quantized() -> None:
    spec = ModelSpec.from_config(DEEPSEEK_V3)
    with pytest.raises(InputError, match="DeepseekV3ForCausalLM, whose attention is over latents, is not divided among cards"):
        shard(spec, 2)
    with pytest.raises(InputError, match="m is a DeepseekV3ForCausalLM: its attention over latents is served and not quantized"):
        check_kind(Path("m"), spec)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_what_is_rounded_while_it_is_loaded(tmp_path: Path, kind: str, quantization: str) -> None:  # noqa: F811
    """All but what is kept dense anyway."""
    folder = fill(write_published(tmp_path, DEEPSEEK_V3, "none"), "none")
    compare(folder, kind, quantization=quantization)
    scheme = read_scheme(CheckpointIndex.open(folder), quantization)[1]
    found = {name: scheme.for_module(f"model.layers.1.self_attn.{name}").quantized for name in ("kv_b_proj", "q_b_proj")}
    assert found == {"kv_b_proj": False, "q_b_proj": True}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7, expected an even number"),
        ({"kv_lora_rank": 0}, "kv_lora_rank is 0, expected an integer of at least 1"),
        ({"q_lora_rank": None, "attention_bias": True}, "attention_bias is true, which is supported with a q_lora_rank alone"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope type linear is not supported for latent attention: defa",
        ),
        ({"topk_method": "greedy"}, "topk_method = 'greedy' is not supported for DeepseekV3ForCausalLM"),
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax' is not supported for DeepseekV3ForCausalLM"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, expected 1"),
        ({"architectures": ["DeepseekV2ForCausalLM"]}, "norm_topk_prob = True is not supported for DeepseekV2ForCausalLM"),
        (
            {"architectures": ["Glm4MoeLiteForCausalLM"], "mlp_layer_types": ["dense"]},
            "mlp_layer_types must name dense or sparse for each of 2",
        ),
    ],
)
def test_configs_of_something_else(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ModelSpec.from_config({**DEEPSEEK_V3, **change})


def test_groups_by_method() -> None:
    limited, plain = (ModelSpec.from_config({**DEEPSEEK_V2, "topk_method": one}) for one in ("group_limited_greedy", "greedy"))
    assert limited.mixture is not None and plain.mixture is not None
    assert limited.mixture.scores[:4] == (False, 3, 2, 1) and plain.mixture.scores[:3] == (False, 1, 1)
