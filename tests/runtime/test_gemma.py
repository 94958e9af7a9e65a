"""Gemma on the operators of a card: the greedy answers of a whole engine are those of the reference."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from appliance.config import EngineConfig
from appliance.memory.devices import DeviceInfo
from appliance.memory.planner import MemoryPlan, make_plan
from appliance.runtime import engine as engine_module
from appliance.runtime import startup, warmup
from appliance.runtime.engine import Engine
from appliance.runtime.startup import Tools
from tests.kernels.triton.conftest import DEVICE
from tests.memory.published import fill, write_published
from tests.memory.test_gemma import SMALL, spread
from tests.runtime.conftest import answers, submit
from tests.runtime.fake_lane import FakeLane

from kernels.triton.ops import make_ops  # isort: skip  (after that conftest has chosen the interpreter)

if DEVICE != "cpu":
    pytest.skip("tests/runtime/test_cuda.py has a card", allow_module_level=True)
TINY = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.mark.parametrize(("name", "variant"), [("gemma2", "awq"), ("gemma3", "gptq-act-order")])
def test_answers_of_an_engine(tmp_path: Path, name: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of prompts in chunks and longer than the window, steps launched ahead; gate and up are one weight, or two."""
    config = {**SMALL[name], **TINY, "sliding_window_pattern": 2}
    directory, rng = spread(fill(write_published(tmp_path, config, variant), variant)), random.Random(5)
    requests = [submit(f"r{n}", [rng.randrange(203) for _ in range(n)], max_tokens=4) for n in (1, 13)]
    given: dict[str, Any] = {"model": str(directory), "dtype": "bfloat16", "max_model_len": 32, "threads": 1, "max_num_seqs": 2}
    given |= {"kv_cache_memory_bytes": 1 << 20, "max_num_batched_tokens": 8, "lm_head_dtype": "model"}
    expected = answers(Engine.load(EngineConfig(reference_ops=True, **given)), requests)

    def planned(directory: Path, config: EngineConfig) -> MemoryPlan:
        return make_plan(directory, config, DeviceInfo("cpu", "a card", 1 << 34, 1 << 33))

    monkeypatch.setattr(startup, "get_ops", lambda *args, **flags: make_ops(torch.device("cpu")))
    monkeypatch.setattr(engine_module, "make_plan", planned)
    monkeypatch.setattr(Tools, "of", classmethod(lambda cls, *args: Tools(FakeLane())))
    monkeypatch.setattr(warmup, "run", lambda *args: 0)  # nothing is to be compiled
    engine = Engine.load(EngineConfig(**given))
    assert engine.info.kernels == "triton" and engine.runner.runs_ahead
    assert answers(engine, requests) == expected
