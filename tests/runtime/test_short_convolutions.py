"""Engines of a model whose layers keep their last inputs: transformers' answers, however requests are cut and put together."""

from __future__ import annotations

import pytest

from appliance.config import EngineConfig
from appliance.runtime.check import check
from tests.runtime.conftest import answers, submit
from tests.runtime.oracle_engines import TOKENS, Load, Oracle, choose_operators, loader, spoil


@pytest.fixture
def oracle(oracles: dict[str, Oracle]) -> Oracle:
    return oracles["Lfm2Moe"]


@pytest.fixture
def load(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> Load:
    return loader(oracle, monkeypatch)


@pytest.mark.parametrize("kind", ["reference", "torch", "native"])
def test_greedy_answers_are_those_of_transformers(load: Load, oracle: Oracle, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = spoil(load(**choose_operators(kind, monkeypatch)))
    for _ in range(2):  # at seats that were somebody's, then
        assert answers(engine, oracle.submits) == oracle.answers
    assert engine.info.plan["states"]["bytes"] == sum(t.nbytes for one in engine.runner.states for t in one)  # type: ignore[index]


@pytest.mark.parametrize(("budget", "seqs"), [(1, 8), (7, 3), (33, 1)])
def test_prompts_in_chunks_at_few_seats(load: Load, oracle: Oracle, budget: int, seqs: int) -> None:
    assert answers(spoil(load(max_num_batched_tokens=budget, max_num_seqs=seqs)), oracle.submits) == oracle.answers


def test_who_gives_way_is_computed_again(load: Load, oracle: Oracle) -> None:
    token = 2 * 2 * 16 * 4  # of one layer: keys and values, heads, their size, float32
    engine = spoil(load(max_model_len=104, kv_cache_memory_bytes=token * 8 * 13, block_size=8, max_num_seqs=8))
    assert answers(engine, oracle.submits) == oracle.answers
    assert engine.stats().preemptions > 0


def test_each_turn_goes_on_where_the_last_prompt_ended(load: Load, oracle: Oracle) -> None:
    engine = spoil(load(block_size=8, max_num_batched_tokens=16))
    engine.scheduler.store.kept.worth = 1  # type: ignore[union-attr]
    for one in oracle.talks[0]:
        assert answers(engine, [submit("one", one["prompt"], max_tokens=TOKENS)]) == {("one", 0): one["answer"]}
    assert engine.stats().prefix_hits == sum((len(one["prompt"]) - 1) // 8 * 8 for one in oracle.talks[0][:-1])


def test_a_check_of_the_plan(oracle: Oracle) -> None:
    config = EngineConfig(kv_cache_memory_bytes="1M", threads=1, max_model_len=64, max_num_seqs=5, max_num_batched_tokens=48)
    exact = {row.name: row for row in check(oracle.model, config).rows if not row.allowed and not row.below}
    assert {"states", "weights: conv", "weights: experts", "KV cache"} <= exact.keys()
    assert all(row.holds for row in exact.values())
