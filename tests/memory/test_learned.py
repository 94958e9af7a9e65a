"""What starts have taught: a small file that is a help and never a need."""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from appliance import LLM
from appliance.config import EngineConfig
from appliance.memory.devices import MIB, DeviceInfo
from appliance.memory.graphs import LAYER_BYTES, measured_layer
from appliance.memory.learned import (
    BOUNDS,
    CODE,
    FILE,
    KEPT,
    MOST_KEYS,
    MOST_LAYER_BYTES,
    STARTS,
    key,
    model_words,
    recall,
    recall_layer,
    record,
    record_layer,
    record_steps,
)
from appliance.memory.measure import categories, comparison
from appliance.memory.plan import RUNTIME
from appliance.memory.planner import make_plan
from appliance.memory.study import Study
from appliance.runtime.engine import Engine
from tests.tiny_model import Shape, make_checkpoint

CPU = DeviceInfo("cpu", "some CPU", 24 << 30, 22 << 30)
CARD = DeviceInfo("cuda", "some card", 24 << 30, 23 << 30, 89)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("APPLIANCE_CACHE_DIR", str(tmp_path / "deep" / "cache"))
    return tmp_path / "deep" / "cache" / FILE


def test_the_largest_of_the_last_starts_counts(file: Path) -> None:
    assert recall(CPU, "cpu") is None
    for size in (300, 280, 260, 250, 240):
        record(CPU, "cpu", size * MIB)
    assert recall(CPU, "cpu") == 300 * MIB + KEPT["cpu"] + CODE["cpu"]
    record(CPU, "cpu", 230 * MIB)
    assert recall(CPU, "cpu") == 280 * MIB + KEPT["cpu"] + CODE["cpu"]
    assert len(json.loads(file.read_text())["runtime_bytes"][key(CPU, "cpu")]) == STARTS
    assert recall(CPU, "cpu-native") is None and recall(CARD, "cpu") is None  # other kernels, another device
    assert list(file.parent.iterdir()) == [file]


def test_code_is_what_there_is_of_it_after_steps(file: Path) -> None:
    """Whatever a start had of it before them: that depends on the model, and the system takes pages of files away."""

    def found(kind: str = "") -> int:
        size = recall(CPU, "cpu-native", kind)
        assert size is not None
        return (size - KEPT["cpu-native"]) // MIB

    for ready in (88, 30):
        record(CPU, "cpu-native", 150 * MIB, ready * MIB)
    assert found() == found("awq in bfloat16") == 238 + CODE["cpu-native"] // MIB
    for steps in (95, 40):
        record_steps(CPU, "cpu-native", "awq in bfloat16", steps * MIB)
        assert found() == found("awq in bfloat16") == found("none in bfloat16") == 245
    record_steps(CPU, "cpu-native", "none in bfloat16", 91 * MIB)
    assert found("none in bfloat16") == 241 and found("awq in bfloat16") == found("none in float32") == found() == 245
    record(CPU, "cpu-native", 151 * MIB, 93 * MIB)
    assert found() == 246 and found("none in bfloat16") == 242
    record(CARD, "triton", 500 * MIB)
    record_steps(CARD, "triton", "", 95 * MIB)
    assert recall(CARD, "triton") == 500 * MIB  # its memory has none of it


@pytest.mark.parametrize("device", [CPU, CARD])
def test_what_cannot_be_is_bounded(file: Path, device: DeviceInfo) -> None:
    least, most = BOUNDS[device.kind]
    record(device, "x", 1)
    assert recall(device, "x") == least
    record(device, "x", 1 << 50)
    assert recall(device, "x") == most
    assert least < RUNTIME[device.kind] < most


def test_before_any_start() -> None:
    """Between what it is with native kernels and with torch's operators, once steps have run, with such a build of torch."""
    assert RUNTIME["cpu"] == (250 if version("torch").endswith("+cpu") else 506) * MIB


def test_only_so_many_devices_are_kept(file: Path) -> None:
    for number in range(MOST_KEYS + 6):
        record(CPU, f"ops {number}", 250 * MIB)
    assert len(json.loads(file.read_text())["runtime_bytes"]) == MOST_KEYS
    assert recall(CPU, "ops 5") is None and recall(CPU, "ops 6") is not None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": 2}', '{"format": 2, "runtime_bytes": [1]}', '{"format": 2, "runtime_bytes": {"a": 5}}',
     '{"format": 2, "runtime_bytes": {"a": ["5"]}}', '{"format": 2, "runtime_bytes": {"a": [-1]}}', "\xff\x00", '{"format": NaN'],
)  # fmt: skip
def test_a_damaged_file_is_ignored_with_a_warning(file: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    file.parent.mkdir(parents=True)
    file.write_bytes(text.encode("latin1"))
    with caplog.at_level(logging.WARNING):
        assert recall(CPU, "cpu") is None
    assert f"{file} is damaged and is not used" in caplog.text and len(caplog.records) == 1
    record(CPU, "cpu", 250 * MIB)
    assert recall(CPU, "cpu") == 250 * MIB + KEPT["cpu"] + CODE["cpu"]


def test_a_file_of_another_format_is_left_alone(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.parent.mkdir(parents=True)
    file.write_text('{"format": 3, "runtime_bytes": {}}')
    assert recall(CPU, "cpu") is None and not caplog.records


def test_nowhere_to_write_fails_no_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no folder").write_text("a file where a folder should be")
    for place in ("", str(tmp_path / "no folder"), str(tmp_path / "no folder" / "below"), "/proc/nothing/here"):
        monkeypatch.setenv("APPLIANCE_CACHE_DIR", place)
        record(CPU, "cpu", 250 * MIB)
        assert recall(CPU, "cpu") is None
    assert sorted(os.listdir(tmp_path)) == ["no folder"]


def test_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("APPLIANCE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    record(CPU, "cpu", 250 * MIB)
    assert (tmp_path / "xdg" / "appliance" / FILE).is_file()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    record(CPU, "cpu", 250 * MIB)
    assert (tmp_path / "home" / ".cache" / "appliance" / FILE).is_file()


def test_the_next_plan_has_what_was_learned(file: Path, tmp_path: Path) -> None:
    directory, config = make_checkpoint(tmp_path / "model", tokenizer=False), EngineConfig()
    before = make_plan(directory, config, CARD)
    record(CARD, "triton", 500 * MIB)
    after = make_plan(directory, config, CARD)
    assert not before.learned and after.learned and before.runtime - after.runtime == 300 * MIB
    assert after.to_dict()["runtime_learned"] is True and after.to_dict()["runtime_bytes"] == 500 * MIB
    assert make_plan(directory, config, CPU).runtime == RUNTIME["cpu"]


def test_the_next_plan_has_what_recorded_steps_took(file: Path, tmp_path: Path) -> None:
    """Where that was more than the estimate, and for models of the same kind on the same card."""
    shape = Shape(layers=3)
    directory, config = make_checkpoint(tmp_path / "model", shape=shape, tokenizer=False), EngineConfig(max_num_seqs=16)
    before = make_plan(directory, config, CARD)
    words = model_words(before.architecture, before.quantization, before.dtype, before.kv.layers)
    steps = len(before.decode_sizes) * 3
    assert before.graphs["steps"] == steps * LAYER_BYTES and "3 layers" in words
    record_layer(CARD, "triton", words, LAYER_BYTES // 2)
    assert make_plan(directory, config, CARD).graphs == before.graphs
    taken = before.graph_bytes - before.graphs["spare_block"] + steps * 1000
    record_layer(CARD, "triton", words, measured_layer(before.graphs, taken, sizes=len(before.decode_sizes), layers=3))
    after = make_plan(directory, config, CARD)
    assert after.graphs == {**before.graphs, "steps": steps * (LAYER_BYTES + 1000)}
    assert Study.read(directory, config, CARD).plan.graphs == after.graphs
    assert make_plan(directory, config, replace(CARD, name="another card")).graphs == before.graphs
    assert make_plan(directory, replace(config, dtype="float32"), CARD).graphs["steps"] == before.graphs["steps"]
    assert make_plan(directory, replace(config, enforce_eager=True), CARD).graphs == {}
    record_layer(CARD, "triton", words, 1 << 40)
    assert recall_layer(CARD, "triton", words) == MOST_LAYER_BYTES and recall(CARD, "triton") is None
    record(CARD, "triton", 500 * MIB)
    assert recall_layer(CARD, "triton", words) == MOST_LAYER_BYTES and recall(CARD, "triton") == 500 * MIB


@pytest.mark.parametrize("swap", [0.0, 0.001])
def test_a_start_compares_and_remembers(file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, swap: float) -> None:
    directory = make_checkpoint(tmp_path / "model", tokenizer=False)
    with caplog.at_level(logging.INFO, "appliance.startup"):
        engine = Engine.load(
            EngineConfig(model=str(directory), kv_cache_memory_bytes="1M", threads=1, swap_space=swap), alone=True
        )
    found = engine.info.plan["found_bytes"]
    lines = [line for line in caplog.messages if line.startswith("memory: ")]
    assert len(lines) == 1 + len(found) and all(line.endswith(" none") for line in lines[1:-1])
    assert found["weights"] == engine.info.plan["weights_bytes"]["total"]
    assert found["KV cache"] == engine.info.plan["kv_cache"]["bytes"] and ("swap space" in found) == bool(swap)
    kept = json.loads(file.read_text())
    ((own,),), ((code,),) = (kept[table].values() for table in ("runtime_bytes", "code_bytes"))
    assert own + code == found["runtime"] and own > 50 * MIB and (code > 50 * MIB or sys.platform != "linux")


def test_a_process_with_other_things_teaches_nothing(file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A program that has an engine in it: its own data, and that of engines before, are none of the engine's."""
    directory = make_checkpoint(tmp_path / "model", tokenizer=False)
    with caplog.at_level(logging.INFO, "appliance.startup"):
        llm = LLM(str(directory), kv_cache_memory_bytes="1M", threads=1, skip_tokenizer_init=True)
    found = llm._engine.info.plan["found_bytes"]
    assert set(found) == {"weights", "rotary table", "KV cache"} and not file.exists()
    assert not any(line.startswith("memory: runtime") for line in caplog.messages)


def test_differences_are_told_by_category(tmp_path: Path) -> None:
    plan = make_plan(make_checkpoint(tmp_path / "model", tokenizer=False), EngineConfig(kv_cache_memory_bytes="1M"), CPU)
    planned = categories(plan)
    assert sum(planned.values()) == plan.total - plan.workspace - plan.grammar_bytes + plan.scratch["positions"]
    lines = comparison(planned, {**planned, "runtime": planned["runtime"] - 5 * MIB, "KV cache": planned["KV cache"] + 2048})
    assert [line.split()[-1] for line in lines] == ["difference", "none", "none", "KiB", "MiB"]
    assert lines[3].endswith("+2.00 KiB") and lines[4].endswith(
        f"{RUNTIME['cpu'] // MIB}.00 MiB   {RUNTIME['cpu'] // MIB - 5}.00 MiB    -5.00 MiB"
    )
