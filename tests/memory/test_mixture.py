"""Plans of mixtures of experts: every expert is counted, as loaded; a step reads those that are chosen."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from appliance.config import EngineConfig
from appliance.memory.cards import find_card
from appliance.memory.demand import Demand
from appliance.memory.devices import DeviceInfo
from appliance.memory.fit import fit
from appliance.memory.giving_way import CPU_BANDWIDTH, CPU_RATE, GivingWay
from appliance.memory.modules import Machinery
from appliance.memory.planner import make_plan, read_settings
from appliance.memory.roofline import Limits, Work
from appliance.memory.shard import check_layout, shard
from appliance.plan_command import Asked, plan_of
from models.spec import ModelSpec
from quant.errors import InputError
from quant.headers import CheckpointIndex
from quant.scheme import QuantScheme, read_scheme
from tests.memory.published import (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    ERNIE_MOE,
    GLM4_MOE,
    MIXTRAL,
    QWEN2_MOE,
    SMALL,
    VARIANTS,
    fill,
    write_published,
)
from tests.memory.test_planner import compare, kind  # noqa: F401

GIB = 1 << 30


@pytest.mark.parametrize(
    ("config", "variant"),
    [
        *((config, variant) for config in (SMALL, MIXTRAL) for variant in VARIANTS),
        *((config, variant) for config in (QWEN2_MOE, GLM4_MOE, ERNIE_MOE) for variant in ("none", "awq", "ct-w8a8")),
        *((DEEPSEEK_V3, variant) for variant in ("none", "awq", "fp8-blocks", "gptq-act-order")),
        (DEEPSEEK_V2, "ct-w4a16"),
    ],
    ids=lambda one: one if isinstance(one, str) else one["architectures"][0],
)
def test_what_is_planned_is_what_the_loader_holds(tmp_path: Path, config: dict[str, Any], variant: str, kind: str) -> None:  # noqa: F811
    plan = compare(fill(write_published(tmp_path, config, variant), variant), kind)
    assert plan.weights["experts"] > plan.weights["router"] > 0
    assert ("mlp" in plan.weights) == (config not in (SMALL, MIXTRAL))


@pytest.fixture(scope="module")
def qwen3_30b(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSpec, QuantScheme]:
    config = json.loads((shared_data / "configs" / "Qwen--Qwen3-30B-A3B_config.json").read_text())
    settings, scheme = read_scheme(CheckpointIndex.open(write_published(tmp_path_factory.mktemp("30b"), config, "awq")))
    return ModelSpec.from_config(settings), scheme


@pytest.mark.realdata
def test_qwen3_30b_worked_out_by_hand(qwen3_30b: tuple[ModelSpec, QuantScheme]) -> None:
    """48 layers of 128 experts, each of 3 x 768 x 2048 weights; attention of 2048 x (2 x 4096 + 2 x 512).

    AWQ in groups of 128, with 16-bit scales and zero points of a byte: 4 bits and 3 bytes a group. 8 of 128 experts are read.
    """
    (spec, scheme), native = qwen3_30b, Machinery(ops="cpu-native", dtype="bfloat16", head_bits=8)
    expert, attention = 3 * 768 * 2048, 2048 * (2 * 4096 + 2 * 512)
    weights = Demand.of(spec, scheme, native, model="m").weights
    assert weights["experts"] == 48 * 128 * (expert // 2 + 3 * expert // 128) == 15_174_991_872
    assert weights["attention"] == 48 * (attention // 2 + 3 * attention // 128)
    assert weights["router"] == 48 * 128 * 2048 * 2
    assert weights["embedding"] == 151936 * 2048 * 2 and weights["head"] == 151936 * (2048 + 4)

    work, limits = Work.of(spec, scheme, native), Limits(1e12, 1e18, 1e18)
    rest = weights["attention"] + weights["router"] + weights["head"]
    assert work.decode_s(limits, 1, 0, 1, None) == pytest.approx((rest + weights["experts"] / 16) / 1e12)
    share = 1 - (15 / 16) ** 32
    assert work.decode_s(limits, 32, 0, 1, None) == pytest.approx((rest + weights["experts"] * share) / 1e12)
    busy = Limits(1e18, 1e12, 1e12)
    active = 48 * (attention + 128 * 2048 + 8 * expert)
    assert work.decode_s(busy, 100, 0, 1, None) == pytest.approx(200 * (active + 151936 * 2048) / 1e12)
    assert work.prefill_ops(10)[0] == 20 * active
    assert spec.linear_parameters == (48 * (attention + 128 * 2048 + 128 * expert), active)

    cost = GivingWay.of(spec, DeviceInfo("cpu", "machine", 64 * GIB, 64 * GIB), 1, 10**9)
    assert cost.linear_s == 2 * active / CPU_RATE
    assert cost.step_s == pytest.approx(10**9 / CPU_BANDWIDTH * active / spec.linear_parameters[0])


@pytest.mark.realdata
def test_mixtral_fits_where_its_files_do(shared_data: Path, tmp_path: Path) -> None:
    config = json.loads((shared_data / "configs" / "mistralai--Mixtral-8x7B-v0.1_config.json").read_text())
    directory = write_published(tmp_path, config, "awq")
    plan = make_plan(directory, EngineConfig(max_model_len=4096), DeviceInfo("cpu", "machine", 64 * GIB, 60 * GIB))
    assert plan.weights["experts"] == 32 * 8 * 3 * 4096 * 14336 * (64 + 3) // 128
    assert plan.weight_bytes == pytest.approx(CheckpointIndex.open(directory).total_bytes, rel=0.01)
    assert plan.load_peak < plan.runtime + plan.weight_bytes + GIB, "one expert at a time is read, not a layer"


def test_parts_of_experts_on_several_cards() -> None:
    spec = ModelSpec.from_config({**SMALL, "torch_dtype": "float16"})
    card = Machinery.choose(EngineConfig(lm_head_dtype="model"), spec.dtype, find_card("RTX 3090").device())
    whole, half = (Demand.of(one, QuantScheme.from_config(SMALL), card, model="m").weights for one in (spec, shard(spec, 2)))
    assert half["experts"] * 2 == whole["experts"] and half["router"] == whole["router"]


def test_cards_are_planned_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_published(tmp_path, SMALL, "awq")
    config = EngineConfig(model=str(directory))
    assert plan_of(directory, config, Asked(gpu=("RTX 4090",))) == 0
    told = capsys.readouterr().out
    assert "Planned only" not in told and "Predicted speed" in told and re.search(r"^    experts +\d", told, re.M)
    assert plan_of(directory, config, Asked(gpu=("RTX 4090",), json=True)) == 0
    assert json.loads(capsys.readouterr().out)["planned_only"] is None
    streamed = make_plan(directory, replace(config, cpu_offload_gb=0.0001), DeviceInfo("cuda", "card", 8 * GIB, 8 * GIB, 89))
    assert streamed.offload.layers == (1,) or len(streamed.offload.layers) == 2
    assert (
        streamed.weights["experts"]
        < make_plan(directory, config, DeviceInfo("cuda", "card", 8 * GIB, 8 * GIB, 89)).weights["experts"]
    )


@pytest.mark.realdata
def test_qwen3_30b_on_a_card_of_24_gib(qwen3_30b: tuple[ModelSpec, QuantScheme]) -> None:
    """It fits, with 12 sequences of 8,192 tokens in 8 bits; bytes of experts, and of a step's tokens, are worked out by hand."""
    (spec, scheme), card = qwen3_30b, find_card("RTX 4090").device()
    config = EngineConfig(max_model_len=8192, max_num_batched_tokens=1024, kv_cache_dtype="fp8")
    demand = Demand.of(spec, scheme, Machinery.choose(config, spec.dtype, card), model="m")
    plan = fit(demand, read_settings(config, card), card)
    tile = 128 * 128 // 2 + 128 * 4  # codes, and a scale with its zero point
    assert plan.weights["experts"] == 48 * 128 * (3 * 6 * 16) * tile
    assert plan.weights["router"] == 48 * 128 * 2048 * 2
    assert plan.total <= plan.budget and plan.sequences(8192) >= 12
    routed = 4 * 4 * 128 + 8 * (25 + 768 * 2 + 2048 * 4)  # logits in four parts; for each expert places, gate * up, and a part
    token = 2 * 2 * 2048 + routed + 2 * 2 * 2048 + 24  # the residual and its norm, before and after
    assert plan.scratch["activations"] == 1024 * token


SCHEMES = {
    "gptq-act-order": r"m: model\.layers\.0\.mlp\.experts\.0\.gate_proj has its inputs in an order of its own \(act-order\): "
    "cards have no kernel for such experts, --device cpu serves them",
    "ct-w8a8": r"experts\.0\.gate_proj asks for activations in int8: cards",
    r"+:.*layers\.1\.mlp\.experts\.3\.up": r"layers\.1\.mlp\.experts\.3\.gate_proj and its other half .* different ways: cards",
    r"-:.*layers\.0\.mlp\.experts\.6\.down": r"experts\.6\.down_proj is stored in another way than .*experts\.0\.down_proj: ca",
}


@pytest.mark.parametrize("name", SCHEMES)
def test_what_experts_on_a_card_cannot_be(name: str) -> None:
    """A variant, or one of GPTQ with other bits for what fits a pattern."""
    quantization = VARIANTS[name if name in VARIANTS else "gptq"][2]
    assert quantization is not None
    dynamic = {} if name in VARIANTS else {"dynamic": {name: {"bits": 8}}}
    scheme, spec = QuantScheme.from_config({"quantization_config": {**quantization, **dynamic}}), ModelSpec.from_config(SMALL)
    native = Machinery(ops="cpu-native", dtype="bfloat16", head_bits=8)
    assert Demand.of(spec, scheme, native, model="m").weights["experts"]
    with pytest.raises(InputError, match=SCHEMES[name]):
        Demand.of(spec, scheme, replace(native, ops="triton"), model="m")


def test_experts_in_float32_are_for_a_cpu() -> None:
    spec, card = ModelSpec.from_config(SMALL), Machinery(ops="triton", dtype="float32", head_bits=8)
    with pytest.raises(InputError, match="m: cards have no kernel for experts in float32: --dtype float16 or bfloat16, or --dev"):
        Demand.of(spec, QuantScheme.from_config({}), card, model="m")


def test_experts_in_groups_are_for_a_cpu() -> None:
    spec = ModelSpec.from_config({**GLM4_MOE, "n_group": 2})
    card = Machinery(ops="triton", dtype="bfloat16", head_bits=8)
    with pytest.raises(InputError, match=r"m: cards have no kernel for experts in groups \(n_group\): --device cpu serves it"):
        Demand.of(spec, QuantScheme.from_config({}), card, model="m")
    assert Demand.of(ModelSpec.from_config(GLM4_MOE), QuantScheme.from_config({}), card, model="m").weights["mlp"]


def test_first_layers_without_experts_on_several_cards() -> None:
    spec = ModelSpec.from_config({**GLM4_MOE, "torch_dtype": "float16"})
    card = Machinery.choose(EngineConfig(lm_head_dtype="model"), spec.dtype, find_card("RTX 3090").device())
    whole, half = (Demand.of(one, QuantScheme.from_config(GLM4_MOE), card, model="m").weights for one in (spec, shard(spec, 2)))
    assert all(half[part] * 2 == whole[part] for part in ("mlp", "experts")) and half["router"] == whole["router"]
    with pytest.raises(InputError, match=r"640 features of the MLP are no multiple of 3; 2 would do|attention heads"):
        shard(spec, 3)
    scheme = QuantScheme.from_config({"quantization_config": VARIANTS["gptq"][2]})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.shared_experts\.down_proj cannot be split: 64 inputs a card"):
        check_layout(spec, shard(spec, 2), scheme, 2)
