"""Engines whose layers have heads of two kinds: transformers' answers, whatever becomes of the blocks, and plans that hold.

One has experts beside MLPs. Another is told of tokens beside hidden states, and the last two of its four layers read the keys and
values of the first two.
"""

from __future__ import annotations

from typing import Any

import pytest

from appliance.config import EngineConfig
from appliance.runtime.check import check
from tests.runtime.conftest import answers
from tests.runtime.oracle_engines import Load, Oracle, choose_operators, loader, on_a_card

TOKEN = 2 * 4 * (2 * 2 * 16 + 2 * 1 * 24)  # bytes, in float32: two layers of two heads of 16, two of one of 24
TOLD_TOKEN = 2 * 4 * (2 * 16 + 2 * 24)  # one of each, of two heads


@pytest.fixture
def oracle(oracles: dict[str, Oracle]) -> Oracle:
    return oracles["Gemma4"]


@pytest.fixture
def told(oracles: dict[str, Oracle]) -> Oracle:
    return oracles["Gemma4Told"]


@pytest.fixture
def load(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> Load:
    return loader(oracle, monkeypatch)


@pytest.mark.parametrize("kind", ["reference", "torch", "native"])
def test_greedy_answers_are_those_of_transformers(load: Load, oracle: Oracle, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = choose_operators(kind, monkeypatch)
    engine = load(**options, max_num_batched_tokens=33)
    assert [tuple(cache.k.shape[2:]) for cache in engine.runner.caches] == [(2, 16), (1, 24)] * 2
    assert sum(t.nbytes for cache in engine.runner.caches for t in cache.tensors) == engine.info.plan["kv_cache"]["bytes"]  # type: ignore[index]
    assert answers(engine, oracle.submits) == oracle.answers
    assert answers(engine, oracle.submits) == oracle.answers, "and once more, from the prefix cache"
    assert engine.stats().prefix_hits > 0


@pytest.mark.parametrize("kind", ["reference", "torch", "native"])
def test_and_where_layers_read_keys_of_others(told: Oracle, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load = loader(told, monkeypatch)
    engine = load(**choose_operators(kind, monkeypatch), max_num_batched_tokens=33)
    assert [tuple(cache.k.shape[2:]) for cache in engine.runner.caches] == [(2, 16), (2, 24)]
    assert sum(t.nbytes for cache in engine.runner.caches for t in cache.tensors) == engine.info.plan["kv_cache"]["bytes"]  # type: ignore[index]
    assert answers(engine, told.submits) == told.answers
    assert answers(engine, told.submits) == told.answers, "and once more, from the prefix cache"
    assert engine.stats().prefix_hits > 0


@pytest.mark.parametrize(("model", "mode"), [("Gemma4", "swap"), ("Gemma4", "recompute"), ("Gemma4Told", "swap")])
def test_blocks_come_and_go(oracles: dict[str, Oracle], model: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle, token = oracles[model], TOKEN if model == "Gemma4" else TOLD_TOKEN
    tight = {"max_model_len": 104, "kv_cache_memory_bytes": token * 8 * 13, "block_size": 8, "max_num_seqs": 8}
    load = loader(oracle, monkeypatch)
    engine = load(swap_space=0.001 if mode == "swap" else 0, preemption_mode=mode, **tight)
    assert engine.scheduler.pool.num_blocks == 13
    assert answers(engine, oracle.submits) == oracle.answers
    stats = engine.stats()
    assert stats.preemptions > 0 and (stats.swaps > 0) == (mode == "swap")


@pytest.mark.parametrize("model", ["Gemma4", "Gemma4Told"])
def test_a_check_of_the_plan(oracles: dict[str, Oracle], model: str) -> None:
    oracle, experts = oracles[model], model == "Gemma4"
    config = EngineConfig(kv_cache_memory_bytes="1M", threads=1, max_model_len=64, max_num_seqs=5, max_num_batched_tokens=48)
    report = check(oracle.model, config)
    exact = {row.name: row for row in report.rows if not row.allowed and not row.below}
    parts = {f"weights: {part}" for part in ("attention", "mlp", "norms")}
    parts |= {f"weights: {part}" for part in (("router", "experts") if experts else ("per_layer_embedding", "per_layer"))}
    assert parts | {"KV cache"} <= exact.keys() and all(row.holds for row in exact.values())
    assert report.plan.kv.token_bytes == (TOKEN if experts else TOLD_TOKEN) and report.steps >= 10


@pytest.mark.parametrize("model", ["Gemma4", "Gemma4Told"])
def test_recorded_and_ahead_of_the_host(oracles: dict[str, Oracle], model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card: steps are padded, and launched before the last tokens are known."""
    oracle = oracles[model]
    load = loader(oracle, monkeypatch)
    options: dict[str, Any] = {"max_model_len": 256, "kv_cache_memory_bytes": 4 << 20, "max_num_seqs": 5}
    engine = on_a_card(load(reference_ops=True, **options), **options)
    assert answers(engine, oracle.submits) == oracle.answers
