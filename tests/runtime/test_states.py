"""Engines of a model whose layers keep states: transformers' answers, however requests are cut, put together and thrown out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from appliance.config import EngineConfig
from appliance.core.params import RequestError
from appliance.memory.devices import DeviceInfo
from appliance.memory.measure import Reading, measured
from appliance.memory.planner import make_plan
from appliance.runtime.check import check
from appliance.runtime.footprint import Resident, footprint
from quant.errors import InputError
from tests.runtime.conftest import answers, finish, submit
from tests.runtime.oracle_engines import LENGTHS, TOKENS, Load, Oracle, choose_operators, loader, on_a_card, spoil


@pytest.fixture
def oracle(oracles: dict[str, Oracle]) -> Oracle:
    return oracles["Qwen3_5"]


@pytest.fixture
def load(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> Load:
    return loader(oracle, monkeypatch)


@pytest.mark.parametrize("kind", ["reference", "torch", "native"])
def test_greedy_answers_are_those_of_transformers(load: Load, oracle: Oracle, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = choose_operators(kind, monkeypatch)
    engine = spoil(load(**options))
    assert answers(engine, oracle.submits) == oracle.answers
    assert answers(engine, oracle.submits) == oracle.answers, "and once more, at seats that were somebody's"
    stats = engine.stats()
    assert stats.prefix_queries > 0 and stats.prefix_hits == 0 and not engine.info.forks, "these prompts are too short for that"
    assert engine.info.plan["states"]["bytes"] == sum(t.nbytes for one in engine.runner.states for t in one)  # type: ignore[index]


@pytest.mark.parametrize("budget", [2048, 5])
def test_beside_experts(load: Load, oracles: dict[str, Oracle], budget: int) -> None:
    oracle = oracles["Qwen3Next"]
    engine = spoil(load(model=str(oracle.model), max_num_batched_tokens=budget))
    assert engine.info.architecture == "Qwen3NextForCausalLM"
    assert answers(engine, oracle.submits) == oracle.answers


@pytest.mark.parametrize("budget", [1, 7, 33])
def test_prompts_in_chunks(load: Load, oracle: Oracle, budget: int) -> None:
    assert answers(spoil(load(max_num_batched_tokens=budget)), oracle.submits) == oracle.answers


@pytest.mark.parametrize("seqs", [1, 3])
def test_few_seats(load: Load, oracle: Oracle, seqs: int) -> None:
    engine = spoil(load(max_num_seqs=seqs))
    assert all(len(tensor) == seqs + seqs + 1 for states in engine.runner.states for tensor in states)
    assert answers(engine, oracle.submits) == oracle.answers


@pytest.mark.parametrize("budget", [2048, 40])
def test_who_gives_way_is_computed_again(load: Load, oracle: Oracle, budget: int) -> None:
    token = 2 * 2 * 16 * 4  # of one layer: keys and values, heads, their size, float32
    tight = {"max_model_len": 104, "kv_cache_memory_bytes": token * 8 * 13, "block_size": 8, "max_num_seqs": 8}
    engine = spoil(load(max_num_batched_tokens=budget, **tight))
    assert engine.scheduler.pool.num_blocks == 13
    assert answers(engine, oracle.submits) == oracle.answers
    stats = engine.stats()
    assert stats.preemptions > 0 and stats.swaps == 0


def test_turns(load: Load, oracle: Oracle) -> None:
    engine = spoil(load(max_num_seqs=2))
    engine.scheduler.fair_tokens, engine.scheduler.turn = 2, lambda back: 0
    assert answers(engine, oracle.submits) == oracle.answers
    assert engine.stats().preemptions > 5


def test_aborts_and_late_comers(load: Load, oracle: Oracle) -> None:
    """Every third request ends early, and its seat is taken by others while the rest goes on."""
    engine, told = spoil(load(max_num_seqs=4, max_num_batched_tokens=20)), dict(oracle.answers)
    found: dict[tuple[str, int], list[int]] = {key: [] for key in told}
    left = oracle.submits
    for number in range(200):
        if left:
            engine.submit(left.pop(0))
        for event in engine.step():
            found[event.request_id, event.index] += event.token_ids
        engine.check()
        if number % 3 == 2 and engine.scheduler.running:
            gone = engine.scheduler.running[-1].key
            engine.abort(*gone)
            said, whole = found.pop(gone), told.pop(gone)
            assert said == whole[: len(said)]
    assert not engine.has_work and 1 < len(found) < len(LENGTHS) and found == told


def test_completions_compute_the_prompt_each(load: Load, oracle: Oracle) -> None:
    engine = spoil(load(max_num_batched_tokens=24))
    prompt = oracle.cases[-2]["prompt"]
    engine.submit(submit("two", prompt, max_tokens=TOKENS, n=2, temperature=1.0, top_k=1))
    engine.step()
    assert engine.stats().blocks_shared == 0
    found = finish(engine)
    assert {key: [t for e in news for t in e.token_ids] for key, news in found.items()} == dict.fromkeys(
        [("two", 0), ("two", 1)], oracle.cases[-2]["answer"]
    )
    assert engine.stats().prompt_tokens == 2 * len(prompt) and not engine.stats().copied_blocks
    hot = {"temperature": 1.0, "seed": 3, "max_tokens": TOKENS}
    many = answers(engine, [submit("many", prompt, n=3, **hot), *oracle.submits])
    again = answers(load(max_num_seqs=2), [submit("many", prompt, n=3, **hot)])
    assert len({tuple(many["many", i]) for i in range(3)}) == 3 and all(many[key] == again[key] for key in again)


def test_beams_are_refused(load: Load) -> None:
    with pytest.raises(RequestError, match="use_beam_search: this model's layers keep a state of each sequence") as error:
        load().submit(submit("beams", [3, 4], n=2, use_beam_search=True))
    assert error.value.param == "use_beam_search"


def test_a_failed_step_is_forgotten_whole(load: Load, oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the midst of a layer, when some states have been written: who ran ends with an error, who waited is answered."""
    engine = spoil(load(max_num_seqs=3))
    ops, calls = engine.runner.decoder.ops, 0

    def failing(*args: Any, **more: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3 * 4 + 2:  # of the fifth step
            raise RuntimeError("out of luck")
        return ops.delta(*args, **more)

    object.__setattr__(engine.runner.decoder, "ops", replace(ops, delta=failing))
    for one in oracle.submits:
        engine.submit(one)
    news = finish(engine)
    ended = {key for key, events in news.items() if events[-1].finish_reason == "error"}
    assert len(ended) == 3 and all("out of luck" in str(news[key][-1].error) for key in ended)
    told = {key: [t for e in events for t in e.token_ids] for key, events in news.items() if key not in ended}
    assert told == {key: answer for key, answer in oracle.answers.items() if key not in ended}
    assert answers(engine, oracle.submits) == oracle.answers


def test_log_probabilities_of_prompts(load: Load, oracle: Oracle) -> None:
    engine = spoil(load(max_num_batched_tokens=9))
    for i, one in enumerate(oracle.cases):
        engine.submit(submit(f"r{i}", one["prompt"], max_tokens=1, prompt_logprobs=0))
    news = finish(engine)
    for i, one in enumerate(oracle.cases):
        found = news[f"r{i}", 0][0].prompt_logprobs
        assert found is not None and [p.logprob for p in found[1:] if p] == pytest.approx(one["logprobs"], abs=1e-4)


@pytest.mark.parametrize("at_once", [1, 7, 200])
def test_every_logit(load: Load, oracle: Oracle, at_once: int) -> None:
    runner, case = spoil(load(max_num_batched_tokens=200)).runner, oracle.cases[-1]
    scores = torch.cat([part.log_softmax(-1) for part in runner.every_logit(case["prompt"], at_once)])
    found = scores[torch.arange(len(scores) - 1), torch.tensor(case["prompt"][1:])]
    assert found.tolist() == pytest.approx(case["logprobs"], abs=1e-4)


def test_guesses_and_swapping_are_refused(load: Load) -> None:
    with pytest.raises(InputError, match="--speculative-config does not work with Qwen3_5ForCausalLM"):
        load(speculative_config='{"method": "ngram"}')
    with pytest.raises(InputError, match="--swap-space is 1, but nothing of Qwen3_5ForCausalLM"):
        load(swap_space=1)


def test_a_check_of_the_plan_has_states(oracle: Oracle) -> None:
    config = EngineConfig(kv_cache_memory_bytes="1M", threads=1, max_model_len=64, max_num_seqs=5, max_num_batched_tokens=48)
    report = check(oracle.model, config)
    exact = {row.name: row for row in report.rows if not row.allowed and not row.below}
    assert {"states", "weights: delta", "weights: attention", "KV cache"} <= exact.keys()
    assert all(row.holds for row in exact.values()) and report.steps >= 10
    assert exact["states"].measured == report.plan.state_bytes == (5 + 6) * report.plan.sequence_bytes > 0
    assert report.plan.kv.layers == 1


def test_recorded_and_ahead_of_the_host(oracle: Oracle, load: Load) -> None:
    """As on a card: steps are padded with sequences at a seat of their own, and launched before the last tokens are known."""
    options: dict[str, Any] = {"max_model_len": 256, "kv_cache_memory_bytes": 4 << 20, "max_num_seqs": 5}
    engine = spoil(on_a_card(load(reference_ops=True, **options), **options))
    assert {states.conv.shape[0] for states in engine.runner.states} == {5 + 6 + 1}
    assert answers(engine, oracle.submits) == oracle.answers
    assert answers(engine, oracle.submits) == oracle.answers


def test_states_are_no_part_of_what_a_card_has_for_itself(oracle: Oracle, load: Load) -> None:
    """They are there when it is measured; the next plan would set them aside twice."""
    card, engine = DeviceInfo("cuda", "card", 80 << 30, 80 << 30, 90), load(max_num_seqs=5)
    config = EngineConfig(dtype="float32", max_model_len=256, max_num_seqs=5, enforce_eager=True)
    plan = make_plan(oracle.model, config, card)
    reading = Reading(free=card.available - (plan.fixed - plan.runtime + 777), reserved=0, peak=0)
    found = measured(plan, reading, auto_length=False)
    assert plan.state_bytes > 0 and found.measured is not None and found.measured.planned == plan.fixed
    assert footprint(found, engine.runner, loaded=Resident(1))["runtime"] == 777
