"""scripts/tune and scripts/gpu_check, tried without a card: in Triton's interpreter, with sizes for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kernels import configs
from kernels.layout import SCALED_CACHES
from tests.tiny_model import Shape, make_checkpoint

ROOT = Path(__file__).resolve().parents[1]


def call(name: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "scripts" / name), *args]
    given = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=given, check=False, cwd=ROOT)


@pytest.mark.slow
def test_tune_writes_a_table_that_is_read(tmp_path: Path) -> None:
    done = call("tune", "--small", "--device", "cpu", "--out", str(tmp_path))
    assert done.returncode == 0 and "wrong" not in done.stderr, done.stderr
    path = tmp_path / "interpreter.json"
    table = configs.read(path)
    assert table.card == "interpreter" and {kind for kind, *_ in table.launches} == {"w4 fp16", "w8 fp16"}
    assert table.find("w4 fp16", 128, 512, 70) and not table.find("w4 fp16", 128, 512, 71)
    told = json.loads(path.read_text())
    entries = [entry for shapes in told["launches"].values() for sizes in shapes.values() for entry in sizes.values()]
    assert len(entries) == 4 and all(0 < entry["microseconds"] <= entry["by_rule_microseconds"] for entry in entries)
    assert told["torch"] and told["triton"] and "date" not in told
    again = call("tune", "--small", "--device", "cpu", "--out", str(tmp_path), "--minutes", "0")
    assert again.returncode == 0 and "minutes are over" in again.stdout and json.loads(path.read_text()) == told, (
        "nothing is lost"
    )


def test_tune_knows_the_shapes_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import tune

    directory = make_checkpoint(tmp_path, tokenizer=False)
    found = tune.wanted(tune.parse(["--model", str(directory)]))
    layers = [(128, 64, 4, False), (64, 64, 4, False), (256, 64, 4, True), (64, 128, 4, False)]
    assert [(s.outputs, s.inputs, s.bits, s.gated) for s in found] == [*layers, (256, 64, 8, False)]
    assert {s.dtype for s in found} == {"fp16"}
    usual = tune.wanted(tune.parse(["--dtypes", "bf16,fp16"]))
    assert len(usual) == len(set(usual)) >= 2 * 20 and {s.kind for s in usual} == set(configs.KINDS)


def test_tune_tries_only_what_a_plan_has_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import tune
    import tune_search

    from kernels.layout import TRITON_SPLIT_ROWS
    from kernels.tune import choose

    shape: Any = tune.Shape(4096, 4096, 4, False, "bf16")
    for rows in tune.ROWS:
        rule = choose(rows=rows, outputs=4096, inputs=4096)
        first = tune_search.first_round(rule, rows, shape, 128, small=False, half=False)
        every = {*first, *(other for one in first for other in tune_search.second_round(one, rows, shape, small=False))}
        assert all(one.split == 1 or (one.split * rows <= TRITON_SPLIT_ROWS and not one.group) for one in every)
        assert len(first) >= 20 and any(one.slab for one in every) == (rows > 64)
        assert rule in every or rows > 64


@pytest.mark.slow
def test_gpu_check_measures_in_the_interpreter(tmp_path: Path) -> None:
    done = call("gpu_check", "--part", "bench", "--small", "--device", "cpu", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu_check_bench.json").read_text())
    kinds = {row["op"] for row in report["kernels"]}
    caches = ("16 bits", *SCALED_CACHES)
    attention = {
        "prefill attention",
        *(f"{op} {kind}" for kind in caches for op in ("decode attention, cache", "rotate, write to")),
    }
    assert kinds >= {"w4a16", "w4a8", "norm", "silu(gate) * up", "sample, top-k and top-p"} | attention
    assert "errors" not in report and not report["left_out"] and report["limits"]["copy"] > 0
    text = (tmp_path / "gpu_check_bench.md").read_text()
    assert text == done.stdout[-len(text) - 1 : -1] and all(f"| {kind}" in text for kind in kinds)
    ElementTree.fromstring((tmp_path / "gpu_check_bench.svg").read_text())


def test_gpu_check_ends_in_time(tmp_path: Path) -> None:
    done = call("gpu_check", "--part", "bench", "--small", "--device", "cpu", "--out", str(tmp_path), "--minutes", "0")
    report = json.loads((tmp_path / "gpu_check_bench.json").read_text())
    assert done.returncode == 0 and report["kernels"] == [] and len(report["left_out"]) >= 10
    assert "Left out" in (tmp_path / "gpu_check_bench.md").read_text()


def test_gpu_check_runs_files_of_tests_until_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import gpu_check

    bodies = {"test_a": "assert True", "test_b": "assert 1 == 2", "test_compilations": "assert False"}
    bodies["test_c"] = "__import__('time').sleep(60)"
    for name, body in bodies.items():
        (tmp_path / f"{name}.py").write_text(f"def test() -> None:\n    {body}\n")
    monkeypatch.setattr(gpu_check, "ROOT", ROOT)
    monkeypatch.setattr(gpu_check, "found", lambda part: [tmp_path / f"{name}.py" for name in sorted(bodies)])
    monkeypatch.setattr(gpu_check, "GRACE", 1.0)
    begun = time.monotonic()
    report = gpu_check.run_tests("kernels", tmp_path, begun + 6)
    assert time.monotonic() - begun < 30 and report["exit_code"] == 1
    assert set(report["wrong"]) == {"test_b.py", "test_c.py"} and report["wrong"]["test_c.py"] == "cut off"
    assert set(report["files"]) == {"test_a.py", "test_b.py", "test_c.py"} and report["summary"] == "1 of 3 files pass"
    late = gpu_check.run_tests("kernels", tmp_path, begun)
    assert set(late["wrong"].values()) == {"not begun"} and late["exit_code"] == 1


def test_gpu_check_needs_no_hypothesis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of kernels and of the engine on a card are collected without it, and without what only a server needs."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import gpu_check

    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    hidden = ("hypothesis", "fastapi", "pydantic", "textual", "transformers", "pytest_asyncio")
    (tmp_path / "hide.py").write_text(f"import sys\nsys.modules |= dict.fromkeys({hidden})\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    for part, name in (("kernels", "test_copy.py"), ("engine", "test_cuda.py")):
        path = next(path for path in gpu_check.found(part) if path.name == name)
        command = [*gpu_check.pytest_command(path), "-p", "hide", "--collect-only"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, env=environment)
        assert "--confcutdir" in command and done.returncode == 0, done.stdout + done.stderr


def test_gpu_check_measures_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import gpu_bench
    import gpu_engine
    import gpu_report
    import torch

    monkeypatch.setattr(gpu_engine, "SHAPES", {"tiny": Shape()})
    monkeypatch.setattr(gpu_engine, "LENGTH", 64)
    monkeypatch.setattr(gpu_engine, "CASES", [gpu_engine.Case(1, 20, 1, 1), gpu_engine.Case(2, 8, 5, 1)])
    bench = gpu_bench.Bench(torch.device("cpu"), small=True)
    rows = gpu_engine.run(["tiny", "none"], tmp_path / "out", bench)
    assert [row["model"] for row in rows].count("tiny graphs") == 2 and rows[1]["decode_bytes_s"] > 0 < rows[0]["prefill_ops_s"]
    assert {row["error"] for row in rows if row["model"].startswith("none")} and not any("error" in r for r in rows[:2])
    assert gpu_engine.bus(bench) > 0
    offload = {"layers": [1], "step_bytes": 3e9}
    engine: Any = SimpleNamespace(engine=SimpleNamespace(info=SimpleNamespace(plan={"offload": offload})))
    row = {**rows[1], "model": "tiny 1 GiB freed"}
    for link, rate in ((1e9, 2 / 3), (1e20, rows[1]["decode_tok_s"])):  # as fast as the bus, or as all on the card
        assert gpu_engine.predicted(row, "tiny graphs", rows, engine, link)["predicted_tok_s"] == pytest.approx(rate)
    assert gpu_engine.predicted({**row, "prompt": 9}, "tiny graphs", rows, engine, 1e9) == {}
    rows.append({**row, "predicted_tok_s": 0.6667})
    text = gpu_report.markdown({"machine": {}, "command": "", "limits": {"copy": 1e9, "float16": 1e12}, "engine": rows})
    assert "predicted, with layers on the host" in text and "0.667 |" in text
    assert "| tiny graphs | 2 | 8 |" in text and "none graphs: KeyError" in text
