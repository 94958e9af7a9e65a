"""Engines whose weights stay in host memory: the answers of resident ones, and the bytes that were planned."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from appliance.config import GIB, EngineConfig
from appliance.memory.devices import DeviceInfo
from appliance.memory.offload import Offload, offloaded
from appliance.memory.planner import MemoryPlan, PlanError, make_plan
from appliance.runtime import engine as engine_module
from appliance.runtime import startup
from appliance.runtime.engine import Engine
from appliance.runtime.footprint import Resident, footprint
from appliance.runtime.startup import Timeline, Tools, load_decoder
from models.decoder import Decoder
from tests.kernels.triton.conftest import DEVICE
from tests.kernels.triton.late import LateQueues
from tests.models.test_loader import write_dense
from tests.runtime.conftest import answers, submit
from tests.runtime.fake_lane import FakeLane
from tests.tiny_model import Shape, make_checkpoint

from kernels.triton import stream  # isort: skip  (after the conftest has chosen the interpreter)
from kernels.triton.ops import make_ops  # isort: skip

if DEVICE != "cpu":
    pytest.skip("tests/runtime/test_cuda.py has a card", allow_module_level=True)
CPU, CARD = torch.device("cpu"), DeviceInfo("cuda", "a card", 24 * GIB, 23 * GIB, 89)
FIXTURES = ("awq-gemm-g32", "ct-fp8-dynamic", "ct-w8a8-int8", "gptq-4bit-g32-act-order", "gptq-8bit-channel")


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines load with the operators of a card, which the interpreter plays."""
    monkeypatch.setattr(startup, "get_ops", lambda *args, **options: make_ops(CPU))


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of five layers."""
    return make_checkpoint(tmp_path_factory.mktemp("deep"), shape=Shape(layers=5))


def load(directory: Path, plan: MemoryPlan) -> Decoder:
    config = EngineConfig(model=str(directory), device="cuda", activation_dtype="auto")
    return load_decoder(config, plan, CPU, Timeline(), None)[0]


def check(directory: Path, gib: float, caplog: pytest.LogCaptureFixture, **options: object) -> MemoryPlan:
    """Plan, load, and hold the bytes against each other."""
    given = EngineConfig(model=str(directory), device="cuda", max_model_len=60, cpu_offload_gb=gib, **options)  # type: ignore[arg-type]
    plan = make_plan(directory, given, CARD)
    with caplog.at_level(logging.INFO, logger="appliance.offload"):
        decoder = load(directory, plan)
    assert "but they are" not in caplog.text and f"{len(plan.offload.layers)} of " in caplog.text
    streamed = {number: layer for number, layer in enumerate(decoder.layers) if number in plan.offload.layers}
    moved = [
        tensor
        for layer in streamed.values()
        for weight in layer.weights
        for tensor in (weight.words, weight.params)  # type: ignore[attr-defined]
        if tensor is not None
    ]
    buffers = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in moved}
    assert sum(buffers.values()) == plan.offload.staging_bytes == plan.weights["staging"]
    assert decoder.streamed == sum(tensor.nbytes for tensor in moved)
    runner: Any = SimpleNamespace(decoder=decoder, caches=[], states=[], swap_bytes=0)
    found = footprint(plan, runner, Resident(0))
    assert (found["weights"], found["rotary table"]) == (plan.weight_bytes, plan.scratch["positions"])
    return plan


@pytest.mark.parametrize("name", FIXTURES)
@pytest.mark.usefixtures("triton")
def test_what_is_planned_is_what_a_card_holds(shared_data: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    plan = check(shared_data / "quantized" / name, 100.0, caplog)
    assert plan.offload.bytes_out > 0


@pytest.mark.parametrize("dtype", ["float16", "float32"])  # in float32 weights are dense
@pytest.mark.usefixtures("triton")
def test_bytes_of_every_choice(deep: Path, dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    for gib in (1e-9, 2e-5, 1.0):
        check(deep, gib, caplog, dtype=dtype)


@pytest.mark.usefixtures("triton")
def test_bytes_of_odd_shapes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Dense weights that end amid 512 bytes, with biases, which stay: the buffers have padding, the card's weights none."""
    odd = {"hidden_size": 40, "intermediate_size": 37, "num_hidden_layers": 6, "attention_bias": True}
    plan = check(write_dense(tmp_path, **odd), 1.0, caplog, dtype="float16")
    assert plan.offload.bytes_out % 512 == 0 and len(plan.offload.layers) == 6
    assert plan.weights["attention"] > 0 == plan.weights["mlp"]  # biases


@pytest.mark.usefixtures("triton")
def test_answers_of_an_engine(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps launched ahead, prompts and single tokens, copies as late as can be: the tokens of an engine with all in place."""
    lates: list[LateQueues] = []

    def streams() -> LateQueues:
        lates.append(LateQueues())
        return lates[-1]

    monkeypatch.setattr(stream, "AtOnce", streams)
    monkeypatch.setattr(Tools, "of", classmethod(lambda cls, *args: Tools(FakeLane())))
    requests = [submit(f"r{n}", range(3, 6 + 9 * n), max_tokens=3 + n) for n in range(2)]

    def engine(offload: Offload) -> Engine:
        def planned(directory: Path, config: EngineConfig) -> MemoryPlan:
            return replace(make_plan(directory, config, DeviceInfo("cpu", "a card", 1 << 34, 1 << 33)), offload=offload)

        monkeypatch.setattr(engine_module, "make_plan", planned)
        options = {"max_model_len": 48, "kv_cache_memory_bytes": 1 << 20, "max_num_seqs": 2, "lm_head_dtype": "model"}
        return Engine.load(EngineConfig(model=str(deep), dtype="float16", threads=1, **options))  # type: ignore[arg-type]

    expected = answers(engine(offloaded([], 1)), requests)
    assert not lates
    plan = make_plan(deep, EngineConfig(cpu_offload_gb=6e-5, max_model_len=48, lm_head_dtype="model"), CARD)
    assert len(plan.offload.layers) == 4
    ours = engine(plan.offload)
    waits = lates[0].waits
    assert ours.runner.runs_ahead and answers(ours, requests) == expected and lates[0].waits > waits + 20


@pytest.mark.usefixtures("triton")
def test_memory_that_cannot_be_pinned(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(deep, EngineConfig(cpu_offload_gb=1.0, max_model_len=48), CARD)

    def fail(layer: object) -> None:
        raise error

    monkeypatch.setattr(stream, "park", fail)
    error: RuntimeError = RuntimeError("CUDA error: out of memory\nCompile with ..")
    with pytest.raises(
        PlanError, match=r"no memory to pin on the host \(5.00 MiB are needed in all\): .* \(CUDA error: out of mem"
    ):
        load(deep, plan)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ..")
    with pytest.raises(torch.OutOfMemoryError):
        load(deep, plan)
