"""The engine with attention over latents: transformers' answers, in whatever order and cache the tokens were written."""

from __future__ import annotations

import pytest

from appliance.config import EngineConfig
from appliance.runtime.check import check
from appliance.runtime.mover import PlainMover
from kernels.cpu import backend
from kernels.layout import kv_nbytes
from tests.runtime.conftest import answers, submit
from tests.runtime.oracle_engines import Load, Oracle, choose_operators, loader
from tests.runtime.test_engine import mixed

SIZE, LAYERS = 8 + 24, 2  # numbers of a token in a layer, once


@pytest.fixture
def oracle(oracles: dict[str, Oracle]) -> Oracle:
    return oracles["DeepseekV3"]


@pytest.fixture
def load(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> Load:
    return loader(oracle, monkeypatch)


@pytest.mark.parametrize("kind", ["reference", "torch", "native"])
def test_greedy_answers_are_those_of_transformers(load: Load, oracle: Oracle, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, in chunks, and once more with what is kept of the prompts."""
    options = choose_operators(kind, monkeypatch)
    for budget in (2048, 7):
        engine = load(**options, max_num_batched_tokens=budget)
        assert answers(engine, oracle.submits) == oracle.answers
    assert answers(engine, oracle.submits) == oracle.answers
    assert engine.stats().prefix_hits > 0 and engine.info.forks


def test_a_conversation_finds_its_own_beginning(load: Load, oracle: Oracle) -> None:
    engine = load()
    for turn, one in enumerate(oracle.talks[0]):
        found = answers(engine, [submit(f"t{turn}", one["prompt"], max_tokens=len(one["answer"]))])
        assert found == {(f"t{turn}", 0): one["answer"]}
    assert engine.stats().prefix_hits > 0


@pytest.mark.parametrize("dtype", ["float32", "fp8_e4m3", "int4"])
def test_cut_preempted_or_swapped_the_answers_stay(load: Load, dtype: str) -> None:
    options = {"kv_cache_dtype": "auto" if dtype == "float32" else dtype, "reference_ops": True}
    whole = answers(load(**options), mixed(1))
    assert answers(load(**options, max_num_batched_tokens=33), mixed(1)) == whole
    block = LAYERS * kv_nbytes(dtype, SIZE) * 16
    for swap_space, mode in ((0.0, "recompute"), (0.01, "swap")):
        memory = {"max_model_len": 160, "kv_cache_memory_bytes": 11 * block, "swap_space": swap_space, "preemption_mode": mode}
        engine = load(**options, **memory)
        assert engine.scheduler.pool.num_blocks == 11 and all(cache.v is cache.k for cache in engine.runner.caches)
        assert answers(engine, mixed(1)) == whole
        stats = engine.stats()
        assert stats.preemptions > 0 and (stats.swaps > 0) == (mode == "swap")


def test_completions_and_beams_share_what_is_cached(load: Load, oracle: Oracle) -> None:
    """Blocks are copied where two write, once: values are not there a second time."""
    prompt = oracle.cases[5]["prompt"]
    asked = [submit("r", prompt, n=3, temperature=0.9, seed=5), submit("b", prompt, n=2, use_beam_search=True, ignore_eos=False)]
    engine = load(reference_ops=True)
    found = answers(engine, asked)
    assert len(found) == 5 and found == answers(load(reference_ops=True, max_num_batched_tokens=9), asked)
    assert len({tuple(tokens) for tokens in found.values()}) == 5
    mover = PlainMover(engine.runner.caches, 5)
    assert mover.host_bytes == 5 * LAYERS * kv_nbytes("float32", SIZE) * 16


@pytest.mark.parametrize("kind", ["torch", "native"])
def test_a_check_of_the_plan(oracle: Oracle, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "native" and backend.native() is None:
        pytest.skip("the native extension is not built")
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "auto" if kind == "native" else "torch")
    config = EngineConfig(kv_cache_memory_bytes="1M", threads=1, max_model_len=64, max_num_seqs=5, max_num_batched_tokens=48)
    report = check(oracle.model, config)
    exact = {row.name: row for row in report.rows if not row.allowed and not row.below}
    assert {"weights: attention", "weights: experts", "weights: norms", "KV cache"} <= exact.keys()
    assert all(row.holds for row in exact.values()) and report.steps >= 10
    assert report.plan.kv.token_bytes == LAYERS * kv_nbytes(report.plan.dtype, SIZE)
