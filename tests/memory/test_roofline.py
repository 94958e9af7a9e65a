"""Predicted speed: the arithmetic by hand for a model of known shapes. (tests/test_gpu_predict.py has the document's.)"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from appliance.config import EngineConfig
from appliance.memory.cards import find_card
from appliance.memory.modules import Machinery
from appliance.memory.roofline import ATTENTION, HBM_REACH, LAUNCH_S, TARGETS, Limits, Work, reach
from models.spec import ModelSpec
from quant.scheme import QuantScheme
from tests.memory.gemma4 import SMALL, TOLD
from tests.memory.test_shard import AWQ, LLAMA_8B

CARD = find_card("RTX 4090")
LINEAR = 32 * (4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336)  # weights of the layers
HEAD = 128256 * 4096


def work(quantization: dict[str, Any] | None = None, options: dict[str, Any] | None = None, **changes: Any) -> Work:
    config = {**LLAMA_8B, **changes, **({"quantization_config": quantization} if quantization else {})}
    spec = ModelSpec.from_config(config)
    return Work.of(
        spec, QuantScheme.from_config(config), Machinery.choose(EngineConfig(**options or {}), spec.dtype, CARD.device())
    )


def test_the_roof_of_one_sequence_is_what_it_reads() -> None:
    found, limits = work(options={"lm_head_dtype": "model"}), Limits(1e12, 1e15, 1e15)
    assert found.weight_bytes == 2 * (LINEAR + HEAD)
    seconds = found.decode_s(limits, 1, 1000, 131072, None)
    assert seconds == pytest.approx((2 * (LINEAR + HEAD) + 1000 * 131072) / 1e12)


def test_many_sequences_are_bound_by_arithmetic() -> None:
    limits = Limits(1e18, 1e12, 1e12)
    assert work().decode_s(limits, 100, 0, 1, None) == pytest.approx(200 * (LINEAR + HEAD) / 1e12)


def test_shares_and_pauses() -> None:
    found, limits, half = work(), Limits(1e12, 1e18, 1e18), {name: {16: 0.5} for name in TARGETS}
    roof = found.decode_s(limits, 4, 512, 1000, None)
    assert found.decode_s(limits, 4, 512, 1000, half, pause=0.0) == pytest.approx(2 * roof)
    assert found.decode_s(limits, 4, 512, 1000, half, 0.5, pause=0.0) == pytest.approx(4 * roof)
    assert found.decode_s(limits, 4, 512, 1000, half) == pytest.approx(2 * roof + (32 * 10 + 8) * LAUNCH_S)
    slow = {**half, ATTENTION: {16: 0.25}}
    assert found.decode_s(limits, 4, 512, 1000, slow, pause=0.0) == pytest.approx(2 * roof + 2 * 4 * 512 * 1000 / 1e12)


def test_prompts() -> None:
    found, limits = work(), Limits(1e12, 1e12, 2e12)
    products, attention = found.prefill_ops(1000)
    assert products == 2 * LINEAR * 1000
    assert attention == 4 * (1000 * 1001 / 2) * 32 * 128 * 32
    assert found.prefill_s(limits, 1000, None) == pytest.approx(products / 1e12 + attention / 2e12)
    assert found.prefill_s(limits, 1000, 1.0) == pytest.approx(products / 0.7e12 + attention / 1e12)
    assert found.prefill_s(limits, 1000, 0.8) == pytest.approx(found.prefill_s(limits, 1000, 1.0) / 0.8)


def test_windows_bound_what_is_read_and_computed() -> None:
    whole = work()
    half = replace(whole, windows=(100,) * 16 + (None,) * 16)
    assert (half.seen(50), half.seen(500)) == (50, 300)
    pairs = sum(min(i + 1, 100) for i in range(500))
    assert half.prefill_ops(500)[1] == 4 * 32 * 128 * 16 * (pairs + 500 * 501 / 2)
    assert replace(whole, windows=(1000,) * 32).prefill_ops(500) == whole.prefill_ops(500)


def test_layers_that_store_nothing_see_the_last_token_of_a_prompt() -> None:
    """Three layers, of which the last one reads what the second has stored; heads of 64 and of 128."""
    spec = ModelSpec.from_config({**SMALL, **TOLD})
    config = EngineConfig(lm_head_dtype="model")
    found = Work.of(spec, QuantScheme.from_config({}), Machinery.choose(config, spec.dtype, CARD.device()))
    told, mlp = 2 * 128 * 256, 3 * 256 * 384
    stored = 256 * (8 * 64 + 4 * 64) + 256 * (8 * 128 + 4 * 128) + 2 * (mlp + told) + 3 * 128 * 256
    last = 256 * 2 * 4 * 128 + 2 * mlp + told
    products, attention = found.prefill_ops(20)
    assert products == 2 * (20 * stored + last) and spec.storing == 2
    pairs = sum(min(i + 1, 9) for i in range(20))
    assert attention == 4 * 4 * (64 * pairs + 128 * (20 * 21 / 2 + 20))
    assert found.weight_bytes == 2 * (stored + last + 203 * 256), "each decoded token goes through all of them"


def test_rounded_activations_have_their_rate() -> None:
    int8 = {"quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"], "config_groups": {"a": {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
        "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True},
    }}}  # fmt: skip
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    assert Limits.of(CARD, work(AWQ)) == Limits(1008e9, 165.2e12, 165.2e12)
    assert Limits.of(CARD, work(int8)).rate == Limits.of(CARD, work(AWQ, {"activation_dtype": "int8"})).rate == 660.8e12
    assert work(fp8).rounded in ("fp8", "")
    rounded = replace(work(), rounded="fp8")
    assert Limits.of(CARD, rounded).rate == 330.4e12 and Limits.of(find_card("3090"), rounded).rate == 71.2e12


def test_less_is_meant_to_be_reached_with_hbm() -> None:
    assert [reach(find_card(name)) for name in ("4090", "H200", "A30", "5090")] == [1.0, HBM_REACH, HBM_REACH, 1.0]
