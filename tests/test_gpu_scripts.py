"""scripts/tune and scripts/gpu_check, tried without a card: in Triton's interpreter, with sizes for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kernels import configs
from tests.tiny_model import make_checkpoint

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

    from kernels.tune import SPLIT_ROWS, choose

    shape: Any = tune.Shape(4096, 4096, 4, False, "bf16")
    for rows in tune.ROWS:
        rule = choose(rows=rows, outputs=4096, inputs=4096)
        first = tune_search.first_round(rule, rows, shape, 128, small=False, half=False)
        every = {*first, *(other for one in first for other in tune_search.second_round(one, rows, shape, small=False))}
        assert all(one.split == 1 or (one.split * rows <= SPLIT_ROWS and not one.group) for one in every)
        assert len(first) >= 20 and any(one.slab for one in every) == (rows > 64)
        assert rule in every or rows > 64
