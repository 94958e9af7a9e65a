"""Mixtures of experts, and states, through the engine with the kernels of a card: the reference's answers, the planned bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from appliance.config import EngineConfig
from appliance.memory.demand import Demand
from appliance.memory.modules import Machinery
from appliance.memory.planner import make_plan
from appliance.runtime import startup, trial
from appliance.runtime.check import weights_by_part
from appliance.runtime.engine import Engine
from kernels.ops import MLP, Mixture
from models.spec import ModelSpec
from quant.headers import CheckpointIndex
from quant.scheme import read_scheme
from tests.kernels.triton.conftest import DEVICE, INTERPRETED
from tests.memory.published import GLM4_MOE, GLM4_MOE_LITE, MIXTRAL, fill, livelier, write_published
from tests.memory.qwen3_5 import TWO_LAYERS, write_qwen3_5
from tests.runtime.conftest import answers, submit

from kernels.triton import ops, stream  # isort: skip  (after the conftest has chosen the interpreter)
from kernels.triton.matmul import Card  # isort: skip

ONE = {"num_hidden_layers": 1}
MODELS = {"awq": GLM4_MOE, "gptq": {**MIXTRAL, **ONE, "intermediate_size": 128}}


def checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Engine, EngineConfig]:
    """A prompt in two chunks, the second beside another's; then a token of each, and one alone. Every byte is the planned one."""
    config: dict[str, Any] = {"model": str(folder), "dtype": "float16", "max_model_len": 32, "kv_cache_memory_bytes": 1 << 20}
    config |= {"max_num_batched_tokens": 5, "threads": 1, "skip_tokenizer_init": True, "lm_head_dtype": "model"}
    requests = [submit("a", [3, 1, 4, 1, 5, 9, 2], max_tokens=3), submit("b", [8, 97], max_tokens=2)]
    expected = answers(Engine.load(EngineConfig(reference_ops=True, **config)), requests)
    monkeypatch.setattr(ops, "this_card", lambda device: Card(1, 80))  # few programs for the interpreter
    monkeypatch.setattr(startup, "get_ops", lambda *args, **options: ops.make_ops(torch.device(DEVICE)))
    engine = Engine.load(EngineConfig(**config))
    assert engine.info.kernels == "triton" and answers(engine, requests) == expected

    settings, scheme = read_scheme(CheckpointIndex.open(folder))
    card = Machinery(ops="triton", dtype="float16", head_bits=None)
    demand = Demand.of(ModelSpec.from_config(settings), scheme, card, model="m")
    decoder = engine.runner.decoder
    assert weights_by_part(decoder) == demand.weights
    for layer, planned in zip(decoder.layers, demand.streamed, strict=True):
        assert isinstance(layer.mlp, MLP) or len(layer.mlp.experts) == 1
        assert stream.park(layer).nbytes == sum(planned.values())
    return engine, EngineConfig(**config)


def tried(folder: Path, config: EngineConfig, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> int:
    """The layers of a trial of a card, which gives what the reference does."""
    monkeypatch.setattr(trial, "TOKENS", 6)
    monkeypatch.setattr(trial, "STEPS", (4, 1))
    plan, decoder = make_plan(folder, config), engine.runner.decoder
    oracle, tokens = trial.load_oracle(config, plan, decoder)
    assert all(off < 0.02 for _, off in trial.deviations(decoder, oracle, tokens, plan, None))
    return int(oracle.spec.layers)


@pytest.mark.skipif(not INTERPRETED, reason="tests/runtime/test_cuda.py runs the engine on a card")
def test_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token is in the cache once; what takes queries to the latents' space stays on the card with --cpu-offload-gb."""
    folder = livelier(fill(write_published(tmp_path, GLM4_MOE_LITE, "awq"), "awq"))
    engine, config = checked(folder, monkeypatch)
    assert all(cache.values_are_keys for cache in engine.runner.caches)
    tried(folder, config, engine, monkeypatch)


@pytest.mark.skipif(not INTERPRETED, reason="tests/runtime/test_cuda.py runs the engine on a card")
@pytest.mark.parametrize("variant", MODELS)
def test_mixtures(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = livelier(fill(write_published(tmp_path, MODELS[variant], variant), variant))
    engine, _ = checked(folder, monkeypatch)
    assert isinstance(engine.runner.decoder.layers[-1].mlp, Mixture)


@pytest.mark.skipif(not INTERPRETED, reason="tests/runtime/test_cuda.py runs the engine on a card")
def test_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the trial of a card, which takes a layer of each kind."""
    engine, config = checked(livelier(fill(write_qwen3_5(tmp_path, TWO_LAYERS, "awq"), "awq")), monkeypatch)
    assert tried(tmp_path, config, engine, monkeypatch) == 2
