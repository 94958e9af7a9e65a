"""Engines of small models whose layers keep states, or latents, and what transformers answers with these."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from appliance.config import EngineConfig
from appliance.core.messages import Submit
from appliance.memory.planner import make_plan
from appliance.runtime.engine import Engine
from appliance.runtime.runner import Runner
from kernels.cpu import backend
from tests import warm
from tests.runtime.conftest import submit
from tests.runtime.fake_lane import FakeLane
from tests.runtime.test_graphs import FakeRecorder

LENGTHS = (1, 2, 3, 16, 17, 33, 64, 90)
TOKENS = 10
TALKS, TURNS, SYSTEM = 3, 3, 43  # conversations, turns of each; all begin with so many tokens


@dataclass(frozen=True)
class Oracle:
    """What transformers says."""

    model: Path
    cases: tuple[dict[str, Any], ...]
    talks: tuple[tuple[dict[str, Any], ...], ...]  # conversations, turn by turn

    @property
    def submits(self) -> list[Submit]:
        return [submit(f"r{i}", one["prompt"], max_tokens=TOKENS) for i, one in enumerate(self.cases)]

    @property
    def answers(self) -> dict[tuple[str, int], list[int]]:
        return {(f"r{i}", 0): one["answer"] for i, one in enumerate(self.cases)}


def make_oracles(folder: Path) -> dict[str, Oracle]:
    """Made without this repository on the path: transformers looks for a package ``kernels``."""
    asked: dict[str, Any] = {"Qwen3_5": {"lengths": LENGTHS, "tokens": TOKENS, "talks": TALKS, "turns": TURNS, "system": SYSTEM}}
    asked["Qwen3Next"] = {"lengths": (3, 20), "tokens": TOKENS}
    asked["Lfm2Moe"] = {"lengths": LENGTHS, "tokens": TOKENS, "talks": 1, "turns": 3, "system": SYSTEM}
    asked["Gemma4"] = asked["Gemma4Told"] = {"lengths": LENGTHS, "tokens": TOKENS}
    asked["DeepseekV3"] = {"lengths": LENGTHS, "tokens": TOKENS, "talks": 1, "turns": 2, "system": SYSTEM}
    script = (Path(__file__).parent / "engine_oracle.py").read_text()
    done = warm.run("-c", script, str(folder), input=json.dumps(asked), cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for name in asked:
        told = json.loads((folder / name / "expected.json").read_text())
        found[name] = Oracle(folder / name / "model", tuple(told["cases"]), tuple(map(tuple, told["talks"])))
    for one in found.values():
        assert all(case["margin"] > 1e-3 for case in (*one.cases, *chain(*one.talks))), "near ties would turn over"
        assert len({tuple(case["answer"]) for case in one.cases}) == len(one.cases)
    return found


Load = Callable[..., Engine]


def loader(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> Load:
    """With torch's operators in float32."""
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "torch")

    def make(**options: Any) -> Engine:
        settings = {
            "model": str(oracle.model),
            "dtype": "float32",
            "max_model_len": 256,
            "kv_cache_memory_bytes": 4 << 20,
            "threads": 1,
        }
        return Engine.load(EngineConfig(**{**settings, **options}))

    return make


def choose_operators(kind: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options for ``loader`` that take the reference, torch's operators, or the native ones; skips where these are not built."""
    if kind == "native":
        if backend.native() is None:
            pytest.skip("the native extension is not built")
        monkeypatch.delenv("APPLIANCE_CPU_ISA")
    return {"reference_ops": kind == "reference"}


def on_a_card(engine: Engine, **options: Any) -> Engine:
    """The same engine with a runner whose device works by itself, ahead of what is known, and records its steps."""
    plan = make_plan(Path(engine.info.directory), EngineConfig(dtype="float32", reference_ops=True, **options))
    engine.runner = Runner(engine.runner.decoder, plan, device=torch.device("cpu"), lane=FakeLane(), recorder=FakeRecorder())
    assert engine.runner.runs_ahead and plan.num_blocks == engine.scheduler.pool.num_blocks
    return engine


def spoil(engine: Engine) -> Engine:
    """What lies at the seats is nobody's yet."""
    for states in engine.runner.states:
        for tensor in states:
            tensor.fill_(torch.nan)
    return engine
