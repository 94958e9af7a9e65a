"""States that are kept: conversations go on and prompts begin where others stood, and answers are what they are without that."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from appliance.runtime.engine import Engine
from tests.runtime.conftest import answers, finish, submit
from tests.runtime.oracle_engines import SYSTEM, TOKENS, Load, Oracle, loader, on_a_card, spoil

BLOCK = 8
TOKEN = 2 * 2 * 16 * 4  # bytes of one layer: keys and values, heads, their size, float32


@pytest.fixture
def oracle(oracles: dict[str, Oracle]) -> Oracle:
    return oracles["Qwen3_5"]


@pytest.fixture
def load(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> Load:
    made = loader(oracle, monkeypatch)
    return lambda **options: keen(spoil(made(**{"block_size": BLOCK, **options})))


def keen(engine: Engine) -> Engine:
    """It keeps states for the sake of a single token."""
    if engine.scheduler.store.kept is not None:
        engine.scheduler.store.kept.worth = 1
    return engine


def boundary(tokens: int) -> int:
    return (tokens - 1) // BLOCK * BLOCK


@pytest.mark.parametrize("budget", [1, 7, 16, 33, 2048])
def test_each_turn_goes_on_where_the_last_prompt_ended(load: Load, oracle: Oracle, budget: int) -> None:
    """With transformers' answers; and from the third conversation on, all that begin alike have their beginning from others."""
    engine, seen = load(max_num_batched_tokens=budget), 0
    for number, talk in enumerate(oracle.talks):
        begins = 0 if number < 2 or budget == 1 else SYSTEM // BLOCK * BLOCK  # with one seat are two places, and they are in use
        for turn, one in enumerate(talk):
            assert answers(engine, [submit("one", one["prompt"], max_tokens=TOKENS)]) == {("one", 0): one["answer"]}
            found, seen = engine.stats().prefix_hits - seen, engine.stats().prefix_hits
            assert found == (boundary(len(talk[turn - 1]["prompt"])) if turn else begins)
    stats = engine.stats()
    asked = sum(len(one["prompt"]) for talk in oracle.talks for one in talk)
    assert stats.prefix_queries == asked and stats.prompt_tokens == asked - stats.prefix_hits < 0.8 * asked
    assert not stats.copied_blocks


@pytest.mark.parametrize("kind", ["together", "card", "seats", "tiny pool"])
def test_conversations_beside_one_another(load: Load, oracle: Oracle, kind: str) -> None:
    options: dict[str, Any] = {"max_num_seqs": 5, "kv_cache_memory_bytes": 4 << 20, "max_model_len": 256}
    if kind == "seats":
        options["max_num_seqs"] = 2
    if kind == "tiny pool":
        options |= {"max_model_len": 152, "kv_cache_memory_bytes": 24 * BLOCK * TOKEN, "max_num_batched_tokens": 16}
    engine = load(reference_ops=kind == "card", **options)
    if kind == "card":
        engine = keen(spoil(on_a_card(engine, block_size=BLOCK, **options)))
    for turn in zip(*oracle.talks, strict=True):
        submits = [submit(str(i), one["prompt"], max_tokens=TOKENS) for i, one in enumerate(turn)]
        assert answers(engine, submits) == {(str(i), 0): one["answer"] for i, one in enumerate(turn)}
    stats = engine.stats()
    assert stats.prefix_hits > 0 and (stats.preemptions > 0) == (kind == "tiny pool")
    if kind in ("together", "card"):
        last = sum(boundary(len(talk[-2]["prompt"])) for talk in oracle.talks)
        assert stats.prefix_hits == last + sum(boundary(len(talk[0]["prompt"])) for talk in oracle.talks)


@pytest.mark.parametrize("seed", range(3))
def test_answers_are_those_without_kept_states(load: Load, oracle: Oracle, seed: int) -> None:
    """Prompts that go on from others or part from them, salts, aborts, few places in a small pool: nothing is different."""
    rng = random.Random(seed)
    small = {"max_model_len": 120, "kv_cache_memory_bytes": 26 * BLOCK * TOKEN, "max_num_batched_tokens": (7, 33, 200)[seed]}
    engine = load(max_num_seqs=(5, 3, 2)[seed], **small)
    if rng.random() < 0.5:
        engine.scheduler.fair_tokens, engine.scheduler.turn = 3, lambda back: 0
    texts = [[rng.randrange(3, 256) for _ in range(40)] for _ in range(2)]
    asked: dict[str, list[int]] = {}
    said: dict[str, list[int]] = {}
    for number in range(200):
        if len(asked) < 24 and rng.random() < 0.5:
            old = rng.choice(texts)
            prompt = old[: rng.randrange(1, min(len(old), 100) + 1)] if rng.random() < 0.3 else old[:100]
            prompt = prompt + [rng.randrange(3, 256) for _ in range(rng.randrange(10))]
            name = f"r{len(asked)}"
            asked[name], said[name] = prompt, []
            engine.submit(submit(name, prompt, max_tokens=rng.randrange(1, 10), cache_salt=rng.choice(["", "", "", "other"])))
        for event in engine.step():
            said[event.request_id] += event.token_ids
            if event.finish_reason == "length":
                texts = [*texts[-5:], asked[event.request_id] + said[event.request_id]]
        engine.check()
        if engine.scheduler.running and rng.random() < 0.04:
            engine.abort(*rng.choice(engine.scheduler.running).key)
        if number in (70, 140):
            engine.reset_prefix_cache()
            for states in engine.runner.states:
                for tensor in states:
                    tensor[engine.scheduler.max_num_seqs :] = torch.nan
    for key, events in finish(engine).items():
        said[key[0]] += [token for event in events for token in event.token_ids]
    stats = engine.stats()
    assert stats.prefix_hits > 100 and len(asked) == 24
    plain = load(enable_prefix_caching=False)
    whole = answers(plain, [submit(name, prompt, max_tokens=9) for name, prompt in asked.items()])
    assert plain.stats().prefix_queries == 0 and len(plain.runner.states[0].conv) == plain.scheduler.max_num_seqs
    assert all(said[name] == whole[name, 0][: len(said[name])] for name in asked)


def test_salts_scores_and_what_is_forgotten(load: Load, oracle: Oracle) -> None:
    engine, one = load(max_model_len=160), oracle.talks[0][1]
    expected, last = {("one", 0): one["answer"]}, boundary(len(one["prompt"]))

    def found(**more: Any) -> int:
        before = engine.stats().prefix_hits
        assert answers(engine, [submit("one", one["prompt"], max_tokens=TOKENS, **more)]) == expected
        return engine.stats().prefix_hits - before

    assert [found(), found(), found(cache_salt="a"), found(cache_salt="a"), found(prompt_logprobs=0), found()] == [
        0, last, 0, last, 0, last
    ]  # fmt: skip
    engine.reset_prefix_cache()
    spoil(engine)
    assert [found(), found()] == [0, last]
    kept = engine.scheduler.store.kept
    assert kept is not None and len(kept.items()) == 1
    move, engine.runner.move = engine.runner.move, fail  # type: ignore[method-assign]
    engine.submit(submit("two", one["prompt"], max_tokens=TOKENS))
    news = finish(engine)["two", 0]
    assert news[-1].finish_reason == "error" and "no copy today" in str(news[-1].error) and not kept.items()
    engine.runner.move = move  # type: ignore[method-assign]
    spoil(engine)
    assert [found(), found()] == [0, last]


def fail(*args: Any) -> None:
    raise RuntimeError("no copy today")


def test_completions_that_come_later_go_on_from_the_first(load: Load, oracle: Oracle) -> None:
    engine, one = load(max_num_seqs=1), oracle.talks[0][1]
    found = answers(engine, [submit("three", one["prompt"], max_tokens=TOKENS, n=3, temperature=1.0, top_k=1)])
    assert found == {("three", i): one["answer"] for i in range(3)}
    assert engine.stats().prefix_hits == 2 * boundary(len(one["prompt"]))
