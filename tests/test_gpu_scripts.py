"""scripts/tune and scripts/gpu_check, tried without a card: in Triton's interpreter, with sizes for it."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

from kernels import configs
from kernels.layout import SCALED_CACHES
from tests import warm
from tests.tiny_model import Shape, make_checkpoint

ROOT = Path(__file__).resolve().parents[1]


def call(name: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "scripts" / name), *args]
    given = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=given, check=False, cwd=ROOT)


@pytest.mark.timeout(600)  # half a minute where others have the processors, too
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
    arguments = ("--small", "--device", "cpu", "--out", str(tmp_path), "--minutes", "0")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    again = warm.run(str(ROOT / "scripts" / "tune.py"), *arguments, cwd=ROOT, env=environment, imported=warm.INTERPRETER)
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


@pytest.mark.usefixtures("scripts")
def test_tune_leaves_out_what_does_not_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever of Triton says so; but a card that is lost is no launch's fault alone."""
    import gpu_children
    import torch
    import tune
    import tune_search
    from triton.runtime.errors import OutOfResources, PTXASError

    shape = tune.Shape(4, 4, 4, False, "fp16")
    work = tune_search.Work(torch.zeros(1, 4).half(), SimpleNamespace(N=4), shape, None)
    errors = [OutOfResources(2, 1, "shared memory"), PTXASError("too many registers"), RuntimeError("PassManager::run failed")]

    def result(launch: Any) -> Any:
        raise errors[launch]

    monkeypatch.setattr(work, "result", result)
    assert not any(work.right(i, torch.ones(1)) for i in range(3))
    told = capsys.readouterr().err
    assert "shared memory" not in told and "too many registers" in told and "PassManager" in told
    monkeypatch.setattr(gpu_children, "card_answers", lambda: False)
    with pytest.raises(RuntimeError, match="PassManager"):
        work.right(2, torch.ones(1))


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


class Forked:
    """In place of subprocess.Popen: a process that need not import torch and triton, and has ended."""

    def __init__(self, command: list[str], *, cwd: Path, stdout: IO[bytes], stderr: int, env: dict[str, str]) -> None:
        done = warm.run(*command[1:], cwd=cwd, env=env, imported=warm.INTERPRETER)
        stdout.write((done.stdout + done.stderr).encode())
        self.code = done.returncode

    def poll(self) -> int:
        return self.code

    def wait(self, timeout: float) -> int:
        return self.code


@pytest.mark.timeout(600)  # half a minute where others have the processors, too
@pytest.mark.slow
@pytest.mark.usefixtures("scripts")
def test_gpu_check_measures_in_the_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it starts, and how, is seen in the next test."""
    import gpu_check
    import gpu_children

    monkeypatch.setattr(gpu_children, "subprocess", SimpleNamespace(Popen=Forked, STDOUT=subprocess.STDOUT))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # as it does by itself
    assert gpu_check.main(["--part", "bench", "--small", "--device", "cpu", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "gpu_check_bench.json").read_text())
    kinds = {row["op"] for row in report["kernels"]}
    caches = ("16 bits", *SCALED_CACHES)
    attention = {
        "prefill attention",
        "prefill attention of Gemma 2",
        "decode attention of Gemma 2, cache 16 bits",
        *(f"{op} {kind}" for kind in caches for op in ("decode attention, cache", "rotate, write to")),
    }
    assert kinds >= {"w4a16", "w4a8", "norm", "silu(gate) * up", "gelu(gate) * up", "sample, top-k and top-p"} | attention
    assert "mixture of 4 experts, 4 bits" in kinds
    assert not report["errors"] and not report["left_out"] and report["limits"]["copy"] > 0
    text = (tmp_path / "gpu_check_bench.md").read_text()
    assert text == printed[-len(text) - 1 : -1] and all(f"| {kind}" in text for kind in kinds)
    ElementTree.fromstring((tmp_path / "gpu_check_bench.svg").read_text())


def test_gpu_check_ends_in_time(tmp_path: Path) -> None:
    done = call("gpu_check", "--part", "bench", "--small", "--device", "cpu", "--out", str(tmp_path), "--minutes", "0")
    report = json.loads((tmp_path / "gpu_check_bench.json").read_text())
    assert done.returncode == 0 and report["kernels"] == []
    assert report["left_out"] == ["limits", "products", "rounded", "decode", "prefill", "experts", "small kernels"]
    assert "Left out" in (tmp_path / "gpu_check_bench.md").read_text()


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


LOST = """import sys
from types import SimpleNamespace

def gone() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_9() -> None:
    sys.modules["torch"] = SimpleNamespace(lost=True, cuda=SimpleNamespace(is_initialized=lambda: True, synchronize=gone))
    gone()

def test_10() -> None:
    assert not hasattr(sys.modules.get("torch"), "lost")
"""


@pytest.mark.usefixtures("scripts")
def test_gpu_check_runs_tests_whatever_happens_to_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails, loses the card or kills its process costs no other; what only compiles is left out; long files are cut."""
    import gpu_tests

    head = "import os, pytest\n\n\n"
    bodies = {
        "test_a": "def test() -> None:\n    assert True\n",
        "test_b": "def test_0() -> None:\n    assert 1 == 2\n",
        "test_d": "def test_1() -> None: os.abort()\ndef test_2() -> None: assert not 'this too'\ndef test_3() -> None: pass\n",
        "test_e": "@pytest.mark.compiles\ndef test_1() -> None: assert False\ndef test_2() -> None: pass\n",
        "test_h": LOST,
        "test_f": "".join(f"def test_{i}() -> None: assert {i} != 3\n" for i in range(5)),
    }
    for name, body in bodies.items():
        (tmp_path / f"{name}.py").write_text(head + body)
    monkeypatch.setattr(gpu_tests, "found", lambda part: [tmp_path / f"{name}.py" for name in sorted(bodies)])
    monkeypatch.setattr(gpu_tests, "LONG", {"test_f.py": 2})
    assert [child.name for child in gpu_tests.children("kernels", tmp_path)][:2] == ["test_f.py 1/2", "test_f.py 2/2"]
    seen: list[tuple[int, int]] = []
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(
        '#!/bin/sh\necho checked "$@"\nexec "$5" -c "import os; print(os.environ[\'CUDA_LAUNCH_BLOCKING\'], \'launch\')"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    report, log = gpu_tests.run(
        "kernels",
        tmp_path,
        time.monotonic() + 120,
        lambda found, log: seen.append((list(found["files"].values()).count("not over yet"), len(log))),
    )
    assert [files for files, _ in seen] == [6, 5, 4, 3, 2, 1, 0, 0, 0, 0, 0], "told as it grows"
    why = [f"{how}: ::{test}" for test in ("test_1", "test_9") for how in ("one launch at a time", "compute-sanitizer")]
    assert set(report["again"]) == set(why) and report["again"][why[1]] == report["again"][why[3]] == "1 launch"
    assert "1 failed" in report["again"][why[2]] and log.count("checked --tool memcheck") == 2
    assert set(report["wrong"]) == {"test_b.py", "test_d.py", "test_f.py 2/2", "test_h.py"} and report["exit_code"] == 1
    assert {name.rpartition("::")[2] for name in report["failed"]} == {"test_0", "test_2", "test_3", "test_9"}
    assert "ended with exit code 2 in" in report["files"]["test_h.py"] and "1 passed" in report["files"]["test_h.py"]
    assert "the card is lost: after" in log and "illegal memory access" in " ".join(report["failed"].values())
    assert "assert 1 == 2" in " ".join(report["failed"].values()) and "1 == 2" in log and "test_a" not in log
    assert "ended with exit code -6 in" in report["files"]["test_d.py"] and "1 failed, 1 passed" in report["files"]["test_d.py"]
    assert report["files"]["test_e.py"].startswith("1 passed, 1 deselected") and report["summary"] == "3 of 7 processes pass"


@pytest.mark.usefixtures("scripts")
def test_gpu_check_runs_what_takes_the_whole_card_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_children
    import gpu_tests

    made = gpu_tests.children("engine", tmp_path)
    assert made[-1].name == "test_startup.py" and "on_a_card" in made[-1].command and len(made) > 2
    (tmp_path / "test_a.py").write_text("def test() -> None:\n    __import__('time').sleep(1)\n")
    (tmp_path / "test_startup.py").write_text("def test_on_a_card() -> None: pass\ndef test_other() -> None: assert False\n")
    monkeypatch.setattr(gpu_tests, "found", lambda part: sorted(tmp_path.glob("test_*.py")))
    begun: dict[str, set[str]] = {}
    start = gpu_children.Child.start

    def watched(child: Any) -> None:
        begun[child.name] = {name for name in begun if alive[name].poll() is None}
        start(child)
        alive[child.name] = child._process

    alive: dict[str, Any] = {}
    monkeypatch.setattr(gpu_children.Child, "start", watched)
    report, _ = gpu_tests.run("engine", tmp_path, time.monotonic() + 60)
    assert report["exit_code"] == 0 and begun == {"test_a.py": set(), "test_startup.py": set()}


@pytest.mark.usefixtures("scripts")
def test_gpu_check_ends_tests_when_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_children
    import gpu_tests

    (tmp_path / "test_c.py").write_text("def test() -> None:\n    __import__('time').sleep(60)\n")
    monkeypatch.setattr(gpu_tests, "found", lambda part: [tmp_path / "test_c.py"])
    monkeypatch.setattr(gpu_children, "GRACE", 1.0)
    begun = time.monotonic()
    report, _ = gpu_tests.run("kernels", tmp_path, begun + 2)
    assert time.monotonic() - begun < 20 and report["exit_code"] == 1 and report["wrong"]["test_c.py"].startswith("cut off")
    late, _ = gpu_tests.run("kernels", tmp_path, begun)
    assert set(late["wrong"].values()) == {"not begun"} and late["exit_code"] == 1


def test_gpu_check_leaves_out_what_only_compiles() -> None:
    """Every test that compiles for other cards is marked, or in a file that is left out."""
    for path in (ROOT / "tests" / "kernels" / "triton").glob("test_*.py"):
        if any(name in path.name for name in ("compilations", "kernel_report", "emulated")):
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test") and "compile_all(" in ast.unparse(node):
                assert "pytest.mark.compiles" in map(ast.unparse, node.decorator_list), f"{path.name}: {node.name}"


@pytest.mark.usefixtures("scripts")
def test_a_process_that_dies_is_begun_again(tmp_path: Path) -> None:
    """It goes on behind what it was at; one that dies before it has begun anything is given up."""
    import gpu_children

    body = """
from gpu_children import Notebook
import os, sys, time
which, notebook = sys.argv[1], Notebook()
for case in "abcdefghij":
    if case in notebook.begun:
        continue
    notebook(begun=case)
    if case in which:
        time.sleep(60) if case == "j" else os.abort()
    notebook(row=case)
sys.exit(3 * (which == "z"))
"""
    (tmp_path / "program.py").write_text(body)

    class Impatient(gpu_children.Child):
        """Only with what never ends: a process may take its time to begin."""

        def over(self, deadline: float) -> bool:
            self.silent = 1.0 if "j" in self.of("begun") and len(self.faults) == 2 and self.name == "some" else 60.0
            return super().over(deadline)

    def run(name: str, *args: str) -> Any:
        return gpu_children.run(Impatient(name, [sys.executable, str(tmp_path / "program.py"), *args], tmp_path), far)

    far = time.monotonic() + 300

    child = run("some", "bdj")
    assert child.of("row") == list("acefghi") and child.code == 0
    assert child.faults == [*(f"ended with exit code -6 in {case}" for case in "bd"), "said nothing for 1 s in j"]
    assert run("many", "abcdefg").of("begun") == list("abcde"), "there is an end to it"
    assert run("last", "z").faults == ["ended with exit code 3 in j", "ended with exit code 3"]
    assert run("none").faults == ["ended with exit code 1"]


@pytest.mark.usefixtures("scripts")
def test_a_case_that_fails_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu_bench
    import gpu_children
    import torch

    monkeypatch.setenv(gpu_children.NOTES, str(tmp_path / "notes"))
    (tmp_path / "notes").write_text('{"begun": "before"}\n{"beg')
    bench = gpu_bench.Bench(torch.device("cpu"))
    cases = [("before", dict), ("wrong", lambda: 1 // 0), ("right", lambda: {"a": 1})]
    assert list(bench.rows(cases)) == [{"a": 1}]  # type: ignore[arg-type]
    noted = gpu_children.notes(tmp_path / "notes")
    assert [note["begun"] for note in noted if "begun" in note] == ["before", "wrong", "right"]
    assert noted[2] == {"error": "wrong: ZeroDivisionError: integer division or modulo by zero"}
    assert "in <lambda>" in capsys.readouterr().err, "the whole stack is in the output"


LOST_FOR_GOOD = {"synchronize": "an illegal memory access", "graph": "already recording to mempool_id"}


@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize("at", LOST_FOR_GOOD)
def test_a_card_that_is_lost_ends_its_process(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that records no graph any more, where every measurement is one."""
    import gpu_bench
    import gpu_children

    def lost(*args: object) -> None:
        raise RuntimeError(LOST_FOR_GOOD[at])

    def fine(*args: object, **options: object) -> Any:
        return nullcontext()

    card = dict.fromkeys(("synchronize", "graph", "CUDAGraph"), fine) | {"is_initialized": lambda: True}
    numbers = SimpleNamespace(add_=lambda n: None)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(**card), zeros=lambda *a, **o: numbers))
    assert gpu_children.card_answers()
    bench = gpu_bench.Bench(SimpleNamespace(type="cuda"))  # type: ignore[arg-type]
    assert list(bench.rows([("wrong", lambda: 1 // 0), ("right", lambda: {"a": 1})])) == [{"a": 1}]  # type: ignore[arg-type]
    monkeypatch.setattr(sys.modules["torch"].cuda, at, lost)
    assert not gpu_children.card_answers()
    with pytest.raises(ZeroDivisionError):
        list(bench.rows([("wrong", lambda: 1 // 0), ("right", lambda: {"a": 1})]))  # type: ignore[arg-type]


class Cold:
    """In place of torch.cuda: a card that takes ten times as long until it has worked for 20 ms."""

    def __init__(self) -> None:
        self.now = self.worked = 0.0
        self.graph, self.synchronize = lambda graph: nullcontext(), lambda: None

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=self.replay)

    def replay(self) -> None:
        seconds = 1e-4 if self.worked > 0.02 else 1e-3
        self.now, self.worked = self.now + seconds, self.worked + seconds

    def Event(self, enable_timing: bool) -> Any:
        event = SimpleNamespace(at=0.0, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event


@pytest.mark.usefixtures("scripts")
def test_what_is_timed_is_a_card_that_has_worked_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks are low where nothing has run."""
    import gpu_bench

    card = Cold()
    monkeypatch.setattr(gpu_bench, "torch", SimpleNamespace(cuda=card))
    monkeypatch.setattr(gpu_bench, "time", SimpleNamespace(perf_counter=lambda: card.now))
    bench = gpu_bench.Bench(SimpleNamespace(type="cuda"))  # type: ignore[arg-type]
    assert bench.time(lambda item: None, [1, 2]) == pytest.approx(5e-5)


@pytest.mark.usefixtures("scripts")
def test_kernels_that_are_compiled_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each a sign of life; who listened before goes on."""
    import gpu_children
    from triton import knobs

    heard: list[bool] = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda **facts: heard.append(facts["cache_hit"]))
    monkeypatch.setenv(gpu_children.NOTES, str(tmp_path / "notes"))
    gpu_children.Notebook().compilations()
    times = SimpleNamespace(total=1_250_000)
    for hit in (False, True):
        knobs.compilation.listener(src=None, metadata={"name": "product"}, metadata_group={}, times=times, cache_hit=hit)
    assert gpu_children.notes(tmp_path / "notes") == [{"compiled": "product", "seconds": 1.25}] and heard == [False, True]


@pytest.mark.usefixtures("scripts")
def test_gpu_check_reports_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the card's limits, with processes that die; few files, for some places give few back; nothing stays behind."""
    import gpu_check
    import gpu_tests

    program = tmp_path / "scripts" / "gpu_case.py"
    program.parent.mkdir()
    program.write_text(
        """
import os, sys
from gpu_children import Notebook
name, notebook = sys.argv[1], Notebook()
if name == "machine":
    notebook(row={"card": "some card", "capability": "9.0"})
elif "begun" not in notebook.begun:
    notebook(begun="begun")
    if name == "products":
        told = {"op": "w4a16", "shape": "o", "N": 1, "K": 1, "rows": 1, "dtype": "float16"}
        notebook(row={**told, "ours_s": 1.0, "dense_s": 2.0, "bytes": 1, "ops": 1})
    print("last words of", name, flush=True)
    os.abort()
"""
    )
    failing = {"exit_code": 1, "summary": "0 of 1", "wrong": {"a": "b"}, "failed": {"x::y": "z"}, "files": {}, "seconds": 1}
    failing |= {"again": {"one launch at a time: x::y": "why"}, "slow": {"x::y": 11.5}}
    failing |= {"compiled": {"kernels": 3, "seconds": 4, "longest": [[2.0, "product"]]}}
    monkeypatch.setattr(gpu_check, "__file__", str(program.with_name("gpu_check.py")))
    monkeypatch.setattr(gpu_tests, "run", lambda *args: (failing, "output of tests\n"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 1
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".md", ".log"}
    report = json.loads((tmp_path / "out" / "gpu_check_all.json").read_text())
    assert len(report["kernels"]) == 1 and report["limits"] == {} and report["engine"] == []
    assert "products: ended with exit code -6 in begun" in report["errors"]
    assert "engine: 8b all layers in host memory: ended with exit code -6 in begun" in report["errors"]
    text, log = (tmp_path / "out" / "gpu_check_all.md").read_text(), (tmp_path / "out" / "gpu_check_all.log").read_text()
    assert "| w4a16 float16 | o 1x1 | 1 | 1000000 |  |  | 2.00 x |" in text and "- x::y: z" in text and "- limits: ended" in text
    assert "time: x::y: why" in text and "- 11.5 s in x::y" in text and "Kernels compiled: tests of the kernels 3 in 4 s." in text
    assert "output of tests" in log and "last words of engine: 1b graphs" in log
    assert {path.name for path in tmp_path.iterdir()} == {"scripts", "out"}


def test_gpu_check_needs_no_hypothesis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of kernels and of the engine on a card are collected without it, and without what only a server needs; also where
    packages called ``tests`` and ``scripts`` are installed. Models are found there, too.
    """
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import gpu_tests

    monkeypatch.setattr(gpu_tests.importlib.util, "find_spec", lambda name: None)
    hidden = ("hypothesis", "fastapi", "pydantic", "textual", "transformers", "pytest_asyncio")
    (tmp_path / "hide.py").write_text(f"import sys\nsys.modules |= dict.fromkeys({hidden})\n")
    for name in ("tests", "scripts"):  # some package ships what it should not
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "scripts", tmp_path)))
    environment = os.environ | {"PYTHONPATH": paths, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    for part, name in (("kernels", "test_copy.py"), ("engine", "test_cuda.py")):
        path = next(path for path in gpu_tests.found(part) if path.name == name)
        command = [*gpu_tests.pytest_command(path), "-p", "hide", "--collect-only"]
        done = warm.run(*command[1:], cwd=ROOT, env=environment, imported=warm.INTERPRETER)
        assert "--confcutdir" in command and done.returncode == 0, done.stdout + done.stderr
    case = [str(ROOT / "scripts" / "gpu_case.py"), "engine: none", "--device", "cpu", "--folder", str(tmp_path)]
    done = warm.run(*case, cwd=ROOT, env=environment, imported=warm.INTERPRETER)
    assert "KeyError" in done.stderr and "tests" not in done.stderr.splitlines()[-1], done.stderr


def test_gpu_check_measures_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import gpu_bench
    import gpu_engine
    import gpu_report
    import torch

    monkeypatch.setattr(gpu_engine, "SHAPES", {"tiny": Shape()})
    monkeypatch.setattr(gpu_engine, "LENGTH", 64)
    monkeypatch.setattr(gpu_engine, "CASES", [gpu_engine.Case(1, 20, 1, 1), gpu_engine.Case(2, 8, 5, 1)])
    monkeypatch.setenv("GPU_NOTES", str(tmp_path / "notes"))
    bench = gpu_bench.Bench(torch.device("cpu"), small=True)
    assert gpu_engine.labels(["tiny"], card=False) == ["tiny graphs", "tiny launched one by one"]
    assert len(gpu_engine.labels(["1b", "8b"], card=True)) == 8
    rows: list[Any] = list(gpu_engine.run("tiny graphs", tmp_path, bench))
    assert [row["model"] for row in rows] == ["tiny graphs"] * 2 and rows[1]["decode_bytes_s"] > 0 < rows[0]["prefill_ops_s"]
    assert rows[0]["ready_s"] > 0 < rows[0]["planned_bytes"] and gpu_engine.bus(bench) > 0
    with pytest.raises(KeyError):
        next(gpu_engine.run("none graphs", tmp_path, bench))
    offload = {"layers": [1], "step_bytes": 3e9}
    row = {**rows[1], "model": "tiny 1 GiB freed", "offload": offload}
    for link, rate in ((1e9, 2 / 3), (1e20, rows[1]["decode_tok_s"])):  # as fast as the bus, or as all on the card
        assert gpu_engine.predicted(row, rows, link)["predicted_tok_s"] == pytest.approx(rate)
    assert gpu_engine.predicted({**row, "prompt": 9}, rows, 1e9) == gpu_engine.predicted(rows[1], rows, 1e9) == {}
    rows.append({**row, "predicted_tok_s": 0.6667})
    text = gpu_report.markdown({"machine": {}, "command": "", "limits": {"copy": 1e9, "float16": 1e12}, "engine": rows})
    assert "predicted, with layers on the host" in text and "0.667 |" in text
    assert "| tiny graphs | 2 | 8 |" in text
