"""No request makes a card compile a kernel: whatever serving launches, starting has launched before.

On the CPU, in Triton's interpreter, with launches keyed as a card's own cache keys them.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from appliance.config import EngineConfig
from appliance.memory.devices import DeviceInfo
from appliance.memory.planner import MemoryPlan, make_plan
from appliance.runtime import engine as engine_module
from appliance.runtime import startup, warmup
from appliance.runtime.engine import Engine
from appliance.runtime.startup import Tools
from kernels.layout import SCALED_CACHES
from kernels.ops import Ops
from tests.kernels.triton.conftest import DEVICE
from tests.memory.gemma4 import SMALL as GEMMA4
from tests.memory.gemma4 import TOLD, write_gemma4
from tests.memory.published import SMALL, fill, write_published
from tests.runtime.conftest import answers, submit
from tests.runtime.fake_lane import FakeLane
from tests.runtime.test_ahead import workload
from tests.runtime.test_graphs import FakeRecorder
from tests.runtime.test_startup import FakeGauge, Lengths
from tests.tiny_model import Shape, make_checkpoint

from kernels.triton.attention_decode import split_count  # isort: skip  (after that conftest has chosen the interpreter)
from kernels.triton.ops import make_ops  # isort: skip

if DEVICE != "cpu":
    pytest.skip("launches are recorded in Triton's interpreter", allow_module_level=True)
from tests.kernels.triton.compile_keys import Key, recorded  # isort: skip  (which a card does not load)


LARGER = Shape(hidden=512, layers=1, mlp=512, heads=4, kv_heads=2, head_dim=128, group=128)  # few rows split its inputs


def hollow() -> Ops:
    """The card's operators where their kernels write nothing: what comes back to the host is 0."""
    ops = make_ops(torch.device("cpu"))
    assert ops.sample is not None

    def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(t.zero_() for t in ops.argmax(logits))  # type: ignore[return-value]

    def sample(*given: Tensor) -> Tensor:
        return ops.sample(*given).zero_()  # type: ignore[misc]

    def kth_largest(row: Tensor, k: int) -> float:
        ops.kth_largest(row, k)
        return 0.0

    return replace(ops, argmax=argmax, sample=sample, kth_largest=kth_largest)


def launches(
    directory: Path, seqs: int, eager: bool, monkeypatch: pytest.MonkeyPatch, cache: str = "auto", dtype: str = "float16"
) -> tuple[set[Key], set[Key]]:
    """(what starting an engine launches, what a crowd of requests does)."""
    tools = Tools(FakeLane(), FakeGauge(available=1 << 33), None if eager else FakeRecorder())
    monkeypatch.setattr(Tools, "of", classmethod(lambda cls, *args: tools))
    monkeypatch.setattr(startup, "get_ops", lambda *args, **options: hollow())

    def planned(directory: Path, config: EngineConfig) -> MemoryPlan:
        plan = make_plan(directory, config, DeviceInfo("cpu", "fake card", 1 << 34, 1 << 33))
        return replace(plan, graphs={} if eager else {"pool": 0})

    monkeypatch.setattr(engine_module, "make_plan", planned)
    config = EngineConfig(
        model=str(directory), dtype=dtype, max_model_len=500, kv_cache_memory_bytes=32 << 20, max_num_seqs=seqs, threads=1,
        max_num_batched_tokens=300, enforce_eager=eager, block_size=64, swap_space=0.01, preemption_mode="swap",
        kv_cache_dtype=cache,
    )  # fmt: skip
    with recorded() as warm:
        engine = Engine.load(config)
    assert engine.runner.runs_ahead
    rng = random.Random(7)
    long = [
        submit(f"long{i}", [3] * rng.randrange(1, 440), max_tokens=rng.randrange(1, 60), temperature=0.5 * (i % 2), seed=i)
        for i in range(seqs)
    ]
    requests = workload(7, seqs) + long + [submit("scored", [3] * 270, prompt_logprobs=2, max_tokens=3)]
    rng.shuffle(requests)
    with recorded() as used:
        answers(engine, requests)
    return warm, used


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(("shape", "seqs"), [(Shape(), 9), (LARGER, 70)])
def test_serving_launches_nothing_new(
    shape: Shape, seqs: int, eager: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm, used = launches(make_checkpoint(tmp_path, shape=shape), seqs, eager, monkeypatch)
    assert len(used) > 15
    new = sorted(used - warm, key=str)
    assert not new, "\n".join(f"{key}\n    nearest: {nearest(key, warm)}" for key in new)


def test_mixtures_of_experts_launch_nothing_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fill(write_published(tmp_path, {**SMALL, "num_hidden_layers": 1, "max_position_embeddings": 512}, "awq"), "awq")
    for file in make_checkpoint(tmp_path / "plain").glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    warm, used = launches(folder, 70, False, monkeypatch)
    assert sum("experts:product" in key[0] for key in used) > 4
    assert not used - warm, sorted(used - warm, key=str)


@pytest.mark.parametrize("eager", [False, True])
def test_layers_that_store_nothing_launch_nothing_new(eager: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have as many rows as all others, or a few."""
    config = {**GEMMA4, **TOLD, "max_position_embeddings": 512, "vocab_size": 256, "vocab_size_per_layer_input": 256}
    folder = fill(write_gemma4(tmp_path, config, "awq"), "awq")
    for file in make_checkpoint(tmp_path / "plain").glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    warm, used = launches(folder, 9, eager, monkeypatch, dtype="bfloat16")
    assert not used - warm, sorted(used - warm, key=str)


@pytest.mark.parametrize("cache", SCALED_CACHES)
def test_quantized_caches_launch_nothing_new(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warm, used = launches(make_checkpoint(tmp_path), 9, cache == "int4", monkeypatch, cache)
    code = str({"fp8_e4m3": "e4m3", "fp8_e5m2": "e5m2"}.get(cache, cache))
    kernels = [{key[0].rpartition(":")[2] for key in keys if ("CODE", code) in key} for keys in (warm, used)]
    assert kernels[0] >= kernels[1] == {"_rope_store", "_decode", "_prefill"}
    assert not used - warm, sorted(used - warm, key=str)


@pytest.mark.parametrize(("processors", "kv_heads"), [(82, 8), (132, 8), (132, 1)])
@pytest.mark.parametrize(("longest", "window"), [(500, None), (40_000, None), (40_000, 4096)])
def test_attention_is_cut_in_every_way_before(processors: int, kv_heads: int, longest: int, window: int | None) -> None:
    """Parts are merged by a kernel for each power of two of them. Beside prompts single tokens are launched, however many
    sequences and however long; recorded steps are cut for the longest context alone.
    """

    def cut(sequences: int, longest: int) -> int:
        parts = split_count(longest if window is None else min(longest, window), sequences, kv_heads, processors)
        return (parts - 1).bit_length()

    steps = warmup.trials(Lengths(2048, 256, longest))  # type: ignore[arg-type]
    singles = [[start + length for start, length in step.chunks if length == 1] for step in steps]
    tried = {cut(len(ends), max(ends)) for ends in singles if ends}
    assert tried == {cut(sequences, seen) for sequences in range(1, 65) for seen in range(1, longest + 1, 128)}


def test_too_short_a_warm_up_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "trials", lambda plan: [warmup.full(plan)])
    warm, used = launches(make_checkpoint(tmp_path), 9, True, monkeypatch)
    assert {key[0].partition(":")[2] for key in used - warm} > {"product", "_select_digit"}


def nearest(key: Key, warm: set[Key]) -> list:
    """What is different in the most similar launch of the same kernel."""
    others = [other for other in warm if other[0] == key[0]]
    differences = [[(a, b) for a, b in zip(key, other, strict=False) if a != b] for other in others]
    return min(differences, key=len, default=[])
