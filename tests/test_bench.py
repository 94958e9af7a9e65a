"""The benchmark scripts: what they compute from times, how they start engines, what they draw, when a soak fails."""

from __future__ import annotations

import importlib
import json
import random
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from appliance.config import EngineConfig
from appliance.core.messages import Event, TokenLogprob
from appliance.runtime.engine import Engine
from kernels.cpu import backend
from models.spec import ModelSpec
from quant.headers import read_json
from tests.processes import gone
from tests.tiny_model import make_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
bench, compare, peaks, report_module, soak, target_module = (
    importlib.import_module(name)
    for name in ("bench", "bench_compare", "bench_peaks", "bench_report", "bench_soak", "bench_targets")
)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests do not wait for a quiet machine."""
    monkeypatch.setattr(compare, "WAITS", 0)
    monkeypatch.setattr(compare, "TRIES", 1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny", tokenizer=False)


def engine_config(checkpoint: Path) -> EngineConfig:
    return EngineConfig(model=str(checkpoint), device="cpu", threads=1, kv_cache_memory_bytes=2**22)


def test_decode_counts_only_the_time_in_which_all_sequences_decode() -> None:
    times = [[1.0, 1.5, 2.0, 2.5], [2.0, 2.25, 2.5, 3.0]]
    assert target_module.first_s(times) == 2.0
    assert target_module.decode_tok_s(times) == pytest.approx(3 / 0.5), "one token of the first and two of the second up to 2.5"
    assert target_module.decode_tok_s([[1.0]]) is None
    assert target_module.median([3.0, 1.0]) == 2.0 and target_module.median([5.0, 1.0, 3.0]) == 3.0


def test_every_run_of_a_case_asks_something_else() -> None:
    asked: list[list[list[int]]] = []

    def generate(prompts: list[list[int]], tokens: int) -> list[list[float]]:
        asked.append(prompts)
        return [[0.5 * len(asked) * (i + 1) for i in range(tokens)] for _ in prompts]

    case = target_module.Case(sequences=2, prompt=40, tokens=3, repeat=3)
    found = target_module.measure(generate, case, random.Random(5), 1000)
    assert {len(p) for prompts in asked for p in prompts} == {40} and len({tuple(p) for ps in asked for p in ps}) == 6
    assert found == {**asdict(case), "first_s": 1.0, "decode_tok_s": 2.0}


def test_clock_adds_up_calls_and_nothing_else() -> None:
    inner = SimpleNamespace(add=lambda a, b: a + b)
    clock = target_module.Clock(inner)
    assert clock.add(2, 3) == 5
    once = clock.seconds
    assert clock.add(4, 5) == 9 and clock.seconds > once > 0


def test_work_is_that_of_the_models_parameters(checkpoint: Path) -> None:
    spec = ModelSpec.from_config(read_json(checkpoint / "config.json"))
    work = compare.Work.of(spec)
    norms = sum(n for _, n in spec.small_tensors())
    assert work.linear_ops + work.head_ops == 2 * (spec.num_parameters - norms - spec.vocab * spec.hidden)
    assert work.attention_ops == 2 * 2 * spec.layers * spec.heads * spec.head_dim
    assert work.kv_bytes == 2 * 2 * spec.layers * spec.kv_heads * spec.head_dim
    assert work.prefill_ops(3) == 3 * work.linear_ops + work.head_ops + work.attention_ops * (1 + 2 + 3)


def test_derived_figures_hold_together(checkpoint: Path) -> None:
    work = compare.Work.of(ModelSpec.from_config(read_json(checkpoint / "config.json")))
    case = {"sequences": 4, "prompt": 100, "tokens": 20, "repeat": 1, "first_s": 0.5, "decode_tok_s": 80.0}
    result = {"name": "x", "read_bytes": 10**6, "cases": [case]}
    compare.derive(result, work, read_gb_s=0.1)
    assert case["prefill_tok_s"] == 800 and case["step_s"] == 0.05
    step_bytes = 10**6 + 4 * 110 * work.kv_bytes
    assert case["decode_gb_s"] == pytest.approx(20 * step_bytes / 1e9)
    assert case["of_memory_read"] == pytest.approx(case["decode_gb_s"] / 0.1)
    assert case["ops_per_byte"] * case["decode_gb_s"] * 1e9 == pytest.approx(case["decode_ops_s"])
    unknown = {"name": "y", "cases": [{**case, "decode_tok_s": None}]}
    compare.derive(unknown, work, read_gb_s=0.1)
    assert "decode_ops_s" in case and unknown["cases"][0]["prefill_tok_s"] == 800


def test_of_experts_those_count_that_tokens_go_through() -> None:
    work = compare.Work(linear_ops=10, head_ops=10, attention_ops=0, kv_bytes=0, chosen=0.25)
    case = {"sequences": 2, "prompt": 100, "tokens": 20, "repeat": 1, "first_s": 0.5, "decode_tok_s": 80.0}
    result = {"name": "x", "read_bytes": 10**6, "expert_bytes": 800_000, "cases": [case]}
    compare.derive(result, work, read_gb_s=0.1)
    assert result["token_bytes"] == 200_000 + 800_000 / 4  # a quarter of them
    assert case["decode_gb_s"] == pytest.approx(40 * (200_000 + 800_000 * (1 - 0.75**2)) / 1e9)


def test_an_engine_runs_in_a_process_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    cases = compare.make_cases(32, [1, 3], [], 2)
    job = {"kind": "appliance", "config": asdict(replace(engine_config(checkpoint), max_model_len=200))}
    target = compare.Target("ours", job, env={"APPLIANCE_CPU_ISA": "torch"})
    result = compare.run_target(target, cases, vocab=256, seed=1, log=tmp_path / "log", read_limit=lambda: 50.0)
    assert "error" not in result, (tmp_path / "log").read_text()
    assert [c["sequences"] for c in result["cases"]] == [1, 1, 3]
    assert [c["decode_tok_s"] is None for c in result["cases"]] == [True, False, False]
    assert [c.get("memory_read_gb_s") for c in result["cases"]] == [None, 50.0, None]
    assert all(c["first_s"] > 0 for c in result["cases"]) and result["ready_s"] > 0
    assert result["kernels"] == "torch" and result["host_us"] == {}
    assert 0 < result["read_bytes"] < result["weight_bytes"] < result["rss_bytes"]


def test_host_work_is_a_part_of_the_step(checkpoint: Path) -> None:
    if backend.name() == backend.TORCH:
        pytest.skip("the native kernels are not in use")
    ours = target_module.Appliance({"config": asdict(engine_config(checkpoint))})
    machine, runner = ours.engine.runner.decoder.ops.matmul.__self__.machine, ours.engine.runner
    facts = ours.facts()
    assert facts["host_us"].keys() == facts["bookkeeping_us"].keys() == {"1", "32", "256"}
    for sequences, host in facts["host_us"].items():
        assert 0 < facts["bookkeeping_us"][sequences] < host
    assert ours.engine.runner is runner and ours.engine.runner.decoder.ops.matmul.__self__.machine is machine
    assert "step" not in vars(ours.engine)


def answering(tmp_path: Path, *answers: dict[str, Any], last: str = "") -> Any:
    """An engine that gives these answers, whatever it is asked, and ends with ``last`` (shell)."""
    script = tmp_path / "python"
    lines = [f"read question; cat >&$2 <<'END'\n{json.dumps(answer)}\nEND\n" for answer in answers]
    script.write_text(f"#!/usr/bin/env bash\n{''.join(lines)}{last}\n")
    script.chmod(0o755)
    return compare.Target("theirs", {"kind": "llama"}, python=str(script))


CASE = {"sequences": 1, "prompt": 8, "tokens": 1, "repeat": 1, "first_s": 0.25, "decode_tok_s": None}


def test_one_that_dies_is_reported_with_what_it_did(tmp_path: Path) -> None:
    target = answering(tmp_path, {"ready_s": 1.5}, CASE, last="read question; echo last words >&2; exit 3")
    result = compare.run_target(
        target, compare.make_cases(8, [1], [], 1), vocab=100, seed=0, log=tmp_path / "log", read_limit=lambda: 50.0
    )
    assert result["error"] == "ended with status 3 after 1 of 2 cases"
    assert [{**CASE, "others_cores": c["others_cores"]} for c in result["cases"]] == result["cases"] and result["ready_s"] == 1.5
    assert len(result["cases"]) == 1 and (tmp_path / "log").read_text() == "last words\n"


def test_what_a_dead_engine_left_running_is_ended(tmp_path: Path) -> None:
    target = answering(tmp_path, last=f"sleep 300 & echo $! >{tmp_path}/child; exit 0")
    result = compare.run_target(target, [], vocab=100, seed=0, log=tmp_path / "log", read_limit=lambda: 50.0)
    assert result["error"] == "ended with status 0 after 0 of 0 cases"
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 60
    while not gone(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gone(child)


def test_a_disturbed_case_is_asked_again_and_the_quietest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(compare, "WAITS", 5)
    monkeypatch.setattr(compare, "TRIES", 4)
    others = iter([0.0, 1.5, 0.7, 0.6, 0.0, 0.4, 0.0, 0.05, 9.0])  # quiet, run, not quiet twice, quiet, run, quiet, run
    asked: list[Any] = []

    class Engine:
        busy = own = clock = 0.0
        fresh = True

        def usage(self) -> tuple[float, float, float]:
            if not self.fresh:
                self.clock, self.busy, self.own = self.clock + 2, self.busy + 2 * (1 + next(others)), self.own + 2
            self.fresh = not self.fresh
            return self.clock, self.busy, self.own

        def ask(self, question: dict[str, Any]) -> dict[str, Any]:
            asked.append(question["case"])
            return {"first_s": float(len(asked))}

    case = target_module.Case(1, 8, 1, 1)
    assert compare.least_disturbed(Engine(), case, lambda: 50.0) == {"first_s": 3.0, "others_cores": 0.05}
    assert asked == [asdict(case)] * 3


def sample_report() -> dict[str, Any]:
    spec = ModelSpec.from_config(read_json(Path(__file__).parents[1] / "appliance" / "demo" / "config.json"))
    work, targets = compare.Work.of(spec), []
    for name, speed in (("fast <one>", 2.0), ("slow", 1.0)):
        shapes = [(1, 512, 1), (1, 128, 33), (8, 128, 33), (1, 4096, 33)]
        cases = [
            {
                "sequences": n,
                "prompt": p,
                "tokens": t,
                "repeat": 1,
                "first_s": 0.5 / speed,
                "decode_tok_s": None if t == 1 else 90 * n * speed,
            }
            for n, p, t in shapes
        ]
        result = {"name": name, "read_bytes": 10**6, "cases": cases, "ready_s": 2.5, "rss_bytes": 2**30}
        compare.derive(result, work, read_gb_s=40.0)
        targets.append(result)
    targets[0] |= {"planned_bytes": 2**31, "host_us": {"1": 100.4, "32": 301.0, "256": 900.0}, "version": "v1"}
    targets.append({"name": "broken", "cases": [], "error": "ended with status 1 after 0 of 4 cases"})
    limits = {
        "memory_read_gb_s": 40.0,
        "tops": {"int8": 2.2, "float32": 0.5},
        "torch_tops": {"int8": 1.0},
        "how": "so",
        "threads": 2,
    }
    return {
        "model": "demo",
        "date": "2026-11-21",
        "commit": "abc",
        "machine": "M",
        "command": "scripts/bench",
        "limits": limits,
        "targets": targets,
    }


def test_markdown_has_every_case_and_marks_the_fastest() -> None:
    text = report_module.markdown(sample_report())
    assert "| prefill 512 | **2048** | 1024 |  |" in text
    assert "| decode, 1 sequence | **180** | 90.0 |  |" in text and "| decode, 8 sequences | **1440** | 720 |  |" in text
    assert "| prefill 4096 | **16384** | 8192 |  |" in text and "| decode, 1 at 4096 tokens | **180** | 90.0 |  |" in text
    assert "| planned, GiB (resident against it) | 2.00 (-50.0 %) |  |  |" in text
    assert "| host work a step at 1 / 32 / 256 sequences, us | 100 / 301 / 900 |  |  |" in text
    assert "~" not in text
    report = sample_report()
    report["targets"][1]["cases"][2]["others_cores"] = 0.3
    text = report_module.markdown(report)
    assert "| decode, 8 sequences | **1440** | 720~ |  |" in text and "~: other programs took more than 0.1 cores." in text
    assert "- broken: ended with status 1 after 0 of 4 cases" in text
    assert [report_module.number(v) for v in (None, 0, 0.0123456, 1.5, 999.6, 123456.0)] == [
        "",
        "0",
        "0.0123",
        "1.50",
        "1000",
        "123456",
    ]


def test_roofline_is_a_picture_with_every_point_inside_its_box() -> None:
    report = sample_report()
    root = ElementTree.fromstring(report_module.roofline(report))
    circles = [c for c in root.iter("{http://www.w3.org/2000/svg}circle") if len(c)]
    titles = [c[0].text for c in circles]
    assert titles == [f"{name}: {label}" for name in ("fast <one>", "slow") for label in ("prefill 512", "1", "8", "4k")]
    assert all(70 <= float(c.get("cx", 0)) <= 650 and 40 <= float(c.get("cy", 0)) <= 500 for c in circles)
    fast, slow = circles[1], circles[5]
    assert fast.get("cx") == slow.get("cx") and float(fast.get("cy", 0)) < float(slow.get("cy", 0)), "faster is higher"
    with pytest.raises(ValueError, match="no engine got far enough"):
        report_module.roofline({**report, "targets": report["targets"][2:]})


def test_limits_count_the_operations_that_were_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks.shutil, "which", lambda name: None)
    assert peaks.build() is None, "without a compiler torch alone is measured"
    monkeypatch.undo()
    order: list[int] = []
    assert peaks.best_s(2, order.append, repeat=3) >= 0 and sorted(order) == [0, 0, 0, 1, 1, 1]
    library = peaks.build()
    if library is None:
        pytest.skip("no C compiler that takes the routines")
    monkeypatch.setattr(peaks, "ROUNDS", dict.fromkeys(peaks.KINDS, 1000))
    monkeypatch.setattr(peaks, "BYTES", 2**16)
    assert peaks.memory_read(library, 2) > 0
    assert all(rate > 0 for rate in peaks.arithmetic(library, 1).values())


def test_of_two_measurements_the_higher_numbers_are_the_limits() -> None:
    one = {"memory_read_gb_s": 40.0, "tops": {"int8": 1.0, "float32": 0.5}, "how": "so", "threads": 2}
    other = {"memory_read_gb_s": 30.0, "tops": {"int8": 2.0, "float32": 0.4}, "how": "so", "threads": 2}
    assert bench.higher(one, other) == {
        "memory_read_gb_s": 40.0,
        "tops": {"int8": 2.0, "float32": 0.5},
        "how": "so",
        "threads": 2,
    }


def options(monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    return bench.parse()


def test_options_that_do_not_go_together_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert options(monkeypatch, "--context", "4096").max_model_len == 4129
    assert options(monkeypatch, "--soak", "1").max_model_len == "auto"
    for words, message in (
        (["--compare", "--gguf", "a"], "--llama-python and --gguf go together"),
        (["--isa", "avx2"], "need --compare"),
    ):
        with pytest.raises(SystemExit):
            options(monkeypatch, *words)
        assert message in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["bench", "--compare", "--isa", "avx9"])
    assert bench.main() == 2 and "--isa avx9 cannot run here; what can: " in capsys.readouterr().err


def test_reports_hold_no_paths_of_the_machine() -> None:
    words = ["--model", "/x/y/llama-1b-awq", "--vllm-python", "/x/venv-vllm/bin/python", "16"]
    assert [bench.without_folders(w) for w in words] == ["--model", "llama-1b-awq", "--vllm-python", "venv-vllm/bin/python", "16"]


def test_soak_passes_on_a_sound_engine(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "ALLOWED", 2**30)  # two seconds are no warming up
    report = soak.soak(engine_config(checkpoint), seconds=2.0, probe_every=0.2, seed=3)
    assert report["failures"] == []
    assert report["requests"] > 3 and report["probes"] >= 2 and report["generation_tokens"] > 0
    assert set(report["ended"]) <= soak.ENDS and len(report["samples"]) > 4


def test_soak_fails_when_the_probe_is_answered_differently(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, answers = Engine.step, iter(range(10**9))

    def forgetful(self: Engine) -> list[Event]:
        def change(event: Event) -> Event:
            assert event.logprobs is not None
            return replace(event, logprobs=tuple(replace(t, logprob=t.logprob - next(answers)) for t in event.logprobs))

        return [change(e) if e.request_id == soak.PROBE else e for e in step(self)]

    monkeypatch.setattr(Engine, "step", forgetful)
    report = soak.soak(engine_config(checkpoint), seconds=1.5, probe_every=0.1, seed=3)
    assert any("the probe was answered differently: log-probability" in failure for failure in report["failures"])


def test_only_ties_may_be_chosen_otherwise() -> None:
    def answer(*tokens: tuple[int, float, float]) -> list[TokenLogprob]:
        return [TokenLogprob(t, lp, 1, ((t, lp), (99, lp - margin))) for t, lp, margin in tokens]

    first = answer((5, -1.0, 2.0), (6, -1.5, 0.1), (7, -2.0, 2.0))
    assert soak.difference(first, answer((5, -1.2, 2.0), (6, -1.5, 0.0), (7, -2.0, 2.0))) is None
    assert soak.difference(first, answer((5, -1.0, 2.0), (99, -1.4, 0.1), (1, -9.0, 2.0))) is None, (
        "what follows a tie is another text"
    )
    assert (
        soak.difference(first, answer((8, -1.0, 2.0), (6, -1.5, 0.1), (7, -2.0, 2.0)))
        == "token 0 is 8 instead of 5, which led by 2.000"
    )
    assert soak.difference(first, answer((5, -1.6, 2.0), (6, -1.5, 0.1), (7, -2.0, 2.0))) == (
        "log-probability -1.600 instead of -1.000 at token 0"
    )
    assert soak.difference(first, first[:2]) == "2 tokens instead of 3"


def test_soak_fails_on_errors_growth_and_too_few_probes(checkpoint: Path) -> None:
    engine = Engine.load(engine_config(checkpoint))
    watch = soak.Watch(soak.Load(engine, random.Random(0)), (5, 6, 7))
    watch.load.alive["a"] = 1
    watch.take([Event("a", 0, finish_reason="error", error="no luck")], 3.0)
    watch.samples = [(t, 10**9 + (t >= 75) * 10**8) for t in range(100)]
    found = soak.verdict(engine, watch, 100.0)["failures"]
    assert found[0] == "after 3 s a ended with error: no luck"
    assert found[1] == "memory grew by 95 MiB after warming up; allowed are 32"
    assert found[2] == "the probe was answered 0 times: too few to compare; run longer"
