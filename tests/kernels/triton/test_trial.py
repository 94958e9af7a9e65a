"""The trial of a card (appliance/runtime/trial.py) with the kernels that a card runs: as they are, they pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from appliance.config import EngineConfig
from appliance.memory.planner import make_plan
from appliance.runtime import startup, trial
from appliance.runtime.startup import Timeline, load_decoder
from tests.kernels.triton.conftest import DEVICE
from tests.tiny_model import Shape, make_checkpoint

from kernels.triton.ops import make_ops  # isort: skip  (after the interpreter was asked for)


def test_the_kernels_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "get_ops", lambda *args, **flags: make_ops(torch.device(DEVICE)))
    monkeypatch.setattr(trial, "TOKENS", 18)
    monkeypatch.setattr(trial, "STEPS", (17, 9))
    directory = make_checkpoint(tmp_path / "model", shape=Shape(layers=2))
    config = EngineConfig(model=str(directory), kv_cache_memory_bytes=1 << 20, threads=1, max_model_len=64, dtype="float16")
    plan = make_plan(directory, config)
    decoder, _ = load_decoder(config, plan, torch.device(DEVICE), Timeline(), None)
    oracle, tokens = trial.load_oracle(config, plan, decoder)
    off = dict(trial.deviations(decoder, oracle, tokens, plan, None))
    assert set(off) == {17, 9} and all(value < trial.ALLOWED / 4 for value in off.values()), off
