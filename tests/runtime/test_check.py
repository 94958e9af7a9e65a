"""plan --check: exact where a plan is exact, and the process within two hundredths once a start has taught what it takes."""

from __future__ import annotations

import json
import logging
import mmap
import os
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socketpair
from typing import Any

import pytest
import torch

from appliance.config import EngineConfig
from appliance.memory.learned import FILE
from appliance.memory.plan import PlanError
from appliance.memory.report import CheckReport, Row
from appliance.runtime import warmup
from appliance.runtime.check import Meter, check, largest
from appliance.runtime.check_process import check_apart
from appliance.runtime.footprint import resident
from tests.tiny_model import Shape, make_checkpoint

ROOT = Path(__file__).parents[2]
CACHES = ("auto", "auto", "int8")
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
ready = resident().total
answer([""] * 64)
plain = resident().total
lark = [f'start: "{i}" /[a-z]{{1,30}}/ | /[0-9]{{{i % 7 + 1}}}/ "."' for i in range(40)]
grammars = [json.dumps({"grammars": [{"json_schema": schema}]}) for _, schema in schemas(40)] + lark
answered = answer(grammars)
first = resident().total
answer(grammars * 2)
print(json.dumps([plain - ready, answered, first - plain, resident().total - first, engine.info.plan["grammars_bytes"]]))
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("APPLIANCE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / FILE


def apart(directory: Path, **options: Any) -> dict[str, Any]:
    return check_apart(directory, EngineConfig(**options)).to_dict()


def whole(report: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(row for row in report["rows"] if row["name"] == "all, while the largest steps run")
    return found


def start_and_stop(directory: Path, **options: Any) -> None:
    """The engine's process of a server, until it is ready."""
    ours, theirs = socketpair()
    with theirs, Connection(ours.detach()) as conn:
        command = [sys.executable, "-m", "appliance.runtime.worker", str(theirs.fileno())]
        with subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE) as process:
            conn.send((EngineConfig(model=str(directory), **options), logging.WARNING))
            while (message := conn.recv())[0] == "loading":
                pass
            assert message[0] == "ready", message
            conn.send(None)
            assert process.wait(60) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_the_whole_process_is_as_planned(tmp_path: Path, cache: Path) -> None:
    """The first start on a device teaches what the process itself takes; from the second on all is within two hundredths."""
    shape = Shape(hidden=256, layers=3, mlp=512, head_dim=64, group=64, vocab=4000, max_len=256)
    directory = make_checkpoint(tmp_path / "model", shape=shape, tokenizer=False)
    options = {
        "kv_cache_memory_bytes": "64M", "threads": 1, "max_num_seqs": 64, "max_num_batched_tokens": 512, "swap_space": 0.01,
    }  # fmt: skip
    first, *later = (apart(directory, **options, kv_cache_dtype=kind) for kind in CACHES)
    for report in (first, *later):
        exact = [row for row in report["rows"] if not row["allowed_bytes"] and not row["upper_bound"]]
        assert len(exact) == 9 and all(row["difference_bytes"] == 0 for row in exact), exact
        assert next(row for row in report["rows"] if row["name"] == "loading, at most")["holds"]
        assert report["steps"] >= 10
    assert not first["plan"]["runtime_learned"]
    for report in later:
        total = whole(report)
        assert report["plan"]["runtime_learned"] and total["allowed_bytes"] == int(0.02 * total["planned_bytes"])
        assert total["holds"] and report["holds"], report["rows"]


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_what_a_server_of_another_model_has_taught_is_enough(tmp_path: Path, cache: Path) -> None:
    """Its engine's process has what the check's has, and how much code loading has needed is no matter."""
    other = make_checkpoint(tmp_path / "other", shape=Shape(vocab=9000, hidden=192, layers=2), tokenizer=False)
    directory = make_checkpoint(tmp_path / "model", shape=Shape(hidden=256, layers=3, mlp=512), tokenizer=False)
    options: dict[str, Any] = {"kv_cache_memory_bytes": "16M", "threads": 1, "max_model_len": 64, "skip_tokenizer_init": True}
    start_and_stop(other, **options, dtype="float32")
    report = apart(directory, **options)
    assert report["plan"]["runtime_learned"] and whole(report)["holds"], whole(report)
    assert [len(table) for table in json.loads(cache.read_text()).values() if isinstance(table, dict)] == [1, 1, 1, 0]


def test_errors_come_from_there(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_checkpoint(tmp_path / "model", tokenizer=False)
    with pytest.raises(PlanError, match="does not fit") as refused:
        apart(directory, kv_cache_memory_bytes="1M", max_model_len=64, max_num_batched_tokens=1 << 40)
    assert refused.value.remedies
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(RuntimeError, match="ended with code 1"):
        apart(directory)


@pytest.mark.skipif(sys.platform != "linux", reason="files in memory are read from /proc")
def test_code_that_the_system_takes_away_counts(tmp_path: Path) -> None:
    """Here a mapped file is what goes: between two steps, of which the second takes more."""
    size, file, meter = 16 << 20, tmp_path / "code", Meter(torch.device("cpu"), 0)
    file.write_bytes(b"x" * size)
    before, step = resident(), warmup.Trial(())
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as code:
        steps = meter.over([step, step])
        next(steps)
        assert code[::4096].count(b"x") == size // 4096
        next(steps)
    took = mmap.mmap(-1, 4 * size, flags=mmap.MAP_PRIVATE)  # unlike a tensor's, what it frees never stays with malloc
    for page in range(0, len(took), 4096):
        took[page] = 1
    assert next(steps, None) is None and resident().code < before.code + size
    assert 0.9 * 5 * size < meter.peak() - before.total < 5.2 * size
    took.close()
    assert meter.now() < before.total + 1.2 * size


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
