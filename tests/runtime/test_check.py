"""plan --check: exact where a plan is exact, and the process within two hundredths once a start has taught what it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from appliance.config import EngineConfig
from appliance.runtime.check import CheckReport, Row, check, largest
from tests.tiny_model import Shape, make_checkpoint

ROOT = Path(__file__).parents[2]
CACHES = ("auto", "auto", "int8")
PROGRAM = """
import json, sys
from pathlib import Path
from appliance.config import EngineConfig
from appliance.runtime.check import check
print(json.dumps(check(Path(sys.argv[1]), EngineConfig(**json.loads(sys.argv[2]))).to_dict()))
"""

GROWTH = """
import json, sys
from appliance.config import EngineConfig
from appliance.core.messages import Submit
from appliance.core.params import SamplingParams
from appliance.hub import demo_model
from appliance.runtime.engine import Engine
from appliance.runtime.footprint import resident
from tests.schemas import schemas

engine = Engine.load(EngineConfig(model=str(demo_model()), threads=1, max_model_len=96, kv_cache_memory_bytes="8M"))

def answer(grammars):
    for i, grammar in enumerate(grammars):
        params = SamplingParams(max_tokens=40, temperature=1.0, seed=i)
        if grammar:
            object.__setattr__(params, "grammar", grammar)
        engine.submit(Submit(f"r{i}", (5, 6, 7), params, arrival=0.0))
    count = 0
    while engine.has_work:
        count += sum(event.finish_reason in ("stop", "length") for event in engine.step())
    return count

answer([""] * 64)
ready = resident()
answer([""] * 64)
plain = resident()
lark = [f'start: "{i}" /[a-z]{{1,30}}/ | /[0-9]{{{i % 7 + 1}}}/ "."' for i in range(40)]
grammars = [json.dumps({"grammars": [{"json_schema": schema}]}) for _, schema in schemas(40)] + lark
answered = answer(grammars)
first = resident()
answer(grammars * 2)
print(json.dumps([plain - ready, answered, first - plain, resident() - first, engine.info.plan["grammars_bytes"]]))
"""


def in_a_process_of_its_own(directory: Path, cache: Path, **options: Any) -> dict[str, Any]:
    environment = {**os.environ, "APPLIANCE_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", PROGRAM, str(directory), json.dumps(options)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_the_whole_process_is_as_planned(tmp_path: Path) -> None:
    """The first start on a device teaches what the process itself takes; from the second on all is within two hundredths."""
    shape = Shape(hidden=256, layers=3, mlp=512, head_dim=64, group=64, vocab=4000, max_len=256)
    directory = make_checkpoint(tmp_path / "model", shape=shape, tokenizer=False)
    options = {
        "kv_cache_memory_bytes": "64M", "threads": 1, "max_num_seqs": 64, "max_num_batched_tokens": 512, "swap_space": 0.01,
    }  # fmt: skip
    first, *later = (in_a_process_of_its_own(directory, tmp_path / "cache", **options, kv_cache_dtype=kind) for kind in CACHES)
    for report in (first, *later):
        exact = [row for row in report["rows"] if not row["allowed_bytes"] and not row["upper_bound"]]
        assert len(exact) == 9 and all(row["difference_bytes"] == 0 for row in exact), exact
        assert next(row for row in report["rows"] if row["name"] == "loading, at most")["holds"]
        assert report["steps"] >= 10
    assert not first["plan"]["runtime_learned"]
    for report in later:
        total = next(row for row in report["rows"] if row["name"] == "all, while the largest steps run")
        assert report["plan"]["runtime_learned"] and total["allowed_bytes"] == int(0.02 * total["planned_bytes"])
        assert total["holds"] and report["holds"], report["rows"]


def test_a_report_says_what_does_not_hold(tmp_path: Path) -> None:
    report = check(
        make_checkpoint(tmp_path, tokenizer=False), EngineConfig(kv_cache_memory_bytes="1M", threads=1, max_model_len=64)
    )
    rows = (Row("a", 100, 100), Row("b", 1 << 20, 1 << 21, 5), Row("c", 100, 50, below=True), Row("d", 100, 95, 5))
    wrong = CheckReport(report.plan, rows, 3)
    assert [row.holds for row in rows] == [True, False, True, True] and not wrong.holds
    lines = wrong.table().splitlines()
    assert [line.split()[-1] for line in lines[:5]] == ["holds", "yes", "NO", "yes", "yes"]
    assert len(lines) == 6 and f"was estimated at {report.plan.runtime >> 20}.00 MiB; now it is known" in lines[5]
    assert "+1.00 MiB (+100.0%)" in lines[2] and "at most as planned" in lines[3] and lines[1].split()[-2] == "exact"
    assert json.loads(json.dumps(wrong.to_dict()))["holds"] is False
    steps = list(largest(report.plan))
    assert max(step.tokens for step in steps) == min(report.plan.max_num_batched_tokens, 64 * report.plan.max_num_seqs)
    assert max(len(step.chunks) for step in steps) == report.plan.max_num_seqs


@pytest.mark.parametrize("lacks", ["the package llguidance", "no tokenizer"])
def test_what_cannot_be_checked_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: str) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    directory = make_checkpoint(tmp_path, tokenizer=lacks != "no tokenizer")
    report = check(directory, EngineConfig(kv_cache_memory_bytes="1M", threads=1, max_model_len=64))
    assert lacks in report.unchecked and report.to_dict()["unchecked"] == report.unchecked
    assert report.plan.grammars and not any("grammars" in row.name for row in report.rows)
    assert report.table().splitlines()[-1] == f"  Not checked: {report.unchecked}."


@pytest.mark.skipif(sys.platform != "linux", reason="what the allocator keeps is another's")
def test_answers_that_follow_grammars_take_what_is_reserved_for_them() -> None:
    """Once ready an engine grows by that alone."""
    environment = {**os.environ, "APPLIANCE_CACHE_DIR": ""}
    done = subprocess.run([sys.executable, "-c", GROWTH], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    plain, answered, grown, again, reserved = json.loads(done.stdout)
    assert plain < 1 << 20 and answered > 40
    assert reserved["vocabulary"] // 4 < grown < reserved["total"] == sum(reserved.values()) // 2
    assert again < reserved["masks and places"]
