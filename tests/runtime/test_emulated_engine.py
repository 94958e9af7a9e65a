"""The engine on a card that is not there, from its warm-up to its answers: what is compiled runs on the CPU (tests/emulator).

Skipped unless APPLIANCE_EMULATE names an architecture; tests/kernels/triton/test_emulated.py starts it so.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from appliance.config import EngineConfig
from appliance.memory.devices import DeviceInfo
from appliance.memory.planner import MemoryPlan, make_plan
from appliance.runtime import engine as engine_module
from appliance.runtime import startup
from appliance.runtime.engine import Engine
from appliance.runtime.startup import Tools
from kernels.layout import SCALED_CACHES
from tests.kernels.triton.conftest import EMULATED
from tests.runtime.conftest import answers, submit
from tests.runtime.fake_lane import FakeLane
from tests.runtime.test_ahead import workload
from tests.runtime.test_graphs import FakeRecorder
from tests.runtime.test_startup import FakeGauge

if not EMULATED:
    pytest.skip("no card is emulated", allow_module_level=True)
from kernels.triton.ops import make_ops  # isort: skip  (which is then compiled)

Answers = dict[tuple[str, int], list[int]]


def same(found: Answers, expected: Answers) -> int:
    return sum(found[key] == expected[key] for key in expected)


def first(found: Answers, expected: Answers) -> int:
    """Of how many the first token is the same."""
    return sum(found[key][0] == expected[key][0] for key in expected)


@pytest.mark.timeout(1800)  # a minute on a core of its own
@pytest.mark.parametrize("cache", ["auto", *SCALED_CACHES])
def test_answers_of_a_whole_engine(cache: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of all kinds, recorded ones too, the next launched before the last has landed: the reference's greedy answers."""
    config = {"model": str(tiny), "max_model_len": 96, "kv_cache_memory_bytes": 1 << 20, "max_num_seqs": 6, "threads": 1,
              "max_num_batched_tokens": 48, "lm_head_dtype": "model", "kv_cache_dtype": cache}  # fmt: skip
    rng = random.Random(3)
    requests = [
        submit(f"r{i}", [rng.randrange(3, 256) for _ in range(rng.choice((1, 15, 16, 17, 40)))], max_tokens=rng.randrange(1, 9))
        for i in range(12)
    ]
    expected, half = (
        answers(Engine.load(EngineConfig(dtype=dtype, reference_ops=True, **config)), requests)  # type: ignore[arg-type]
        for dtype in ("float32", "float16")
    )
    tools = Tools(FakeLane(), FakeGauge(available=1 << 33), FakeRecorder())
    monkeypatch.setattr(Tools, "of", classmethod(lambda cls, *args: tools))
    monkeypatch.setattr(startup, "get_ops", lambda *args, **options: make_ops(torch.device("cpu")))

    def planned(directory: Path, given: EngineConfig) -> MemoryPlan:
        plan = make_plan(directory, given, DeviceInfo("cpu", "emulated card", 1 << 34, 1 << 33))
        return replace(plan, graphs={"pool": 0})

    monkeypatch.setattr(engine_module, "make_plan", planned)
    engine = Engine.load(EngineConfig(dtype="float16", **config))  # type: ignore[arg-type]
    assert engine.runner.runs_ahead and engine.info.kernels == "triton"
    found = answers(engine, requests)
    # A near tie may turn over in float16. Of coarse codes more do: as many as the reference's, less one.
    rounded = cache != "auto"
    assert same(found, expected) >= (same(half, expected) if rounded else len(expected)) - 1
    assert first(found, expected) >= (first(half, expected) - 1 if rounded else len(expected))
    short = [replace(one, params=replace(one.params, max_tokens=min(one.params.max_tokens or 8, 8))) for one in workload(3, 10)]
    drawn = answers(engine, short)  # every way to draw
    assert len(drawn) == 10 and all(0 <= token < 256 for tokens in drawn.values() for token in tokens)
