"""Layers that store nothing compute the rows alone that somebody looks at: which these are, and that answers stay the same."""

from __future__ import annotations

import random
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from appliance.config import EngineConfig
from appliance.core.messages import Submit
from appliance.core.step import Chunk
from appliance.memory.devices import DeviceInfo
from appliance.memory.inputs import input_bytes, offsets
from appliance.memory.planner import make_plan
from appliance.runtime import warmup
from appliance.runtime.batch import Draws, StepArrays
from appliance.runtime.engine import Engine
from kernels.ops import PagedBatch
from tests.kernels.paged import make_step, wanting
from tests.runtime.conftest import submit
from tests.runtime.oracle_engines import Load, Oracle, choose_operators, loader, on_a_card
from tests.runtime.test_drafts import NGRAM, Answer, answers, requests, same


@pytest.fixture
def told(oracles: dict[str, Oracle]) -> Oracle:
    return oracles["Gemma4Told"]


@pytest.fixture
def load(told: Oracle, monkeypatch: pytest.MonkeyPatch) -> Load:
    return loader(told, monkeypatch)


def alike(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def steps(batch: PagedBatch) -> StepArrays:
    """As the runner would have it."""
    tensors = (batch.positions, batch.slots, batch.query_starts, batch.seq_lens, batch.block_tables)
    return StepArrays(np.zeros(len(batch.positions), np.int64), *(t.numpy() for t in tensors), batch.max_query, batch.singles)


@pytest.mark.parametrize("seed", range(30))
def test_a_batch_of_the_rows_that_are_wanted(seed: int) -> None:
    """Against the one of tests.kernels.paged, which goes by sequences in Python."""
    rng = random.Random(seed)
    lengths = sorted([rng.choice([1, 1, rng.randrange(1, 40)]) for _ in range(rng.randrange(1, 9))], key=lambda n: n > 1)
    batch, _ = make_step([(rng.randrange(50), n) for n in lengths], seed=seed)
    counts = [rng.choice([0, 1, 1, rng.randrange(n + 1), n]) for n in lengths]
    step = steps(batch).wanting(counts)
    used = max((s + 1 for s, count in enumerate(counts) if count), default=0)
    counts = [max(1, count) for count in counts[:used]] + [0] * (len(counts) - used)
    assert step.result_starts.tolist() == np.cumsum([0, *counts[:used]]).tolist()
    if sum(counts) == sum(lengths):
        assert step.rows is None and step.batch([torch.from_numpy(a) for a in step.arrays]).wanted is None
        return
    found = step.batch([torch.from_numpy(a) for a in step.arrays]).wanted
    expected = wanting(batch, counts).wanted
    assert found is not None and expected is not None and torch.equal(found.rows, expected.rows)
    for field in fields(PagedBatch):
        assert alike(getattr(found.batch, field.name), getattr(expected.batch, field.name)), field.name


def test_inputs_fit_where_they_are_sent(told: Oracle) -> None:
    """The most rows that can be fewer than all."""
    card = DeviceInfo("cuda", "NVIDIA GeForce RTX 4090", 24564 << 20, 24100 << 20, capability=89)
    plan = make_plan(
        told.model, EngineConfig(max_model_len=64, max_num_seqs=3, max_num_batched_tokens=40, dtype="bfloat16"), card
    )
    assert plan.scratch["inputs"] == input_bytes(40, 3, plan.kv.blocks(64), wanted=True) > input_bytes(40, 3, plan.kv.blocks(64))
    batch, _ = make_step([(9, 1), (0, 2), (0, 37)])
    step = steps(batch).wanting([1, 1, 37])
    sent = [*step.arrays, np.zeros(3, np.int64), *Draws.build([])]
    assert step.rows is not None and offsets([array.nbytes for array in sent])[-1] <= plan.scratch["inputs"]


class Counter:
    """Of the tokens of an engine's steps, and of the rows that layers give which store nothing."""

    def __init__(self, engine: Engine) -> None:
        self.tokens, self.rows, self.skipped, self._forward = 0, 0, 0, engine.runner._forward
        engine.runner._forward = self

    def __call__(self, ids: Tensor, batch: PagedBatch) -> Tensor:
        found = self._forward(ids, batch)
        assert len(found) == (len(ids) if batch.wanted is None else len(batch.wanted.rows))
        self.tokens, self.rows, self.skipped = self.tokens + len(ids), self.rows + len(found), self.skipped + (not len(found))
        return found


def asked(told: Oracle) -> list[Submit]:
    """In every way, and prompts that are alike at the beginning."""
    plain = [submit(f"plain{i}", one["prompt"]) for i, one in enumerate(told.cases)]
    return [
        *requests(3),
        *plain,
        submit("again", [*told.cases[-1]["prompt"], 7, 8], prompt_logprobs=2, n=2, temperature=0.5, seed=4),
    ]


@pytest.fixture
def expected(told: Oracle, load: Load, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], Answer]:
    """Of an engine that is asked for all rows of each step."""
    with monkeypatch.context() as patch:
        patch.setattr(Chunk, "wanted", property(lambda chunk: chunk.length))
        engine = load(reference_ops=True)
        counter = Counter(engine)
        found = answers(engine, asked(told))
        assert counter.rows == counter.tokens
        return found


TIGHT = {"max_model_len": 128, "kv_cache_memory_bytes": 2 * 4 * (2 * 16 + 2 * 24) * 8 * 40, "block_size": 8, "max_num_seqs": 8}
MORE: dict[str, dict[str, Any]] = {
    "as they come": {},
    "in chunks": {"max_num_batched_tokens": 19, "max_num_seqs": 3},
    "swapped": {**TIGHT, "swap_space": 0.001, "preemption_mode": "swap"},
    "computed again": {**TIGHT, "preemption_mode": "recompute"},
    "with guesses": {"speculative_config": NGRAM, "max_num_batched_tokens": 40},
}


@pytest.mark.parametrize("how", MORE)
def test_answers_are_the_same(told: Oracle, load: Load, expected: dict[tuple[str, int], Answer], how: str) -> None:
    engine = load(reference_ops=True, **MORE[how])
    counter = Counter(engine)
    same(answers(engine, asked(told)), expected)
    same(answers(engine, asked(told)), expected)  # and once more, from the prefix cache
    stats = engine.stats()
    assert stats.prefix_hits > 0 and counter.rows < counter.tokens
    assert stats.preemptions > 0 or "preemption_mode" not in MORE[how]
    assert (stats.swaps > 0) == (how == "swapped")


def test_beside_recorded_steps(told: Oracle, load: Load, expected: dict[tuple[str, int], Answer]) -> None:
    """As on a card, where all rows of a recorded step are computed."""
    options: dict[str, Any] = {"max_model_len": 256, "kv_cache_memory_bytes": 4 << 20, "max_num_seqs": 5}
    engine = on_a_card(load(reference_ops=True, max_num_batched_tokens=30, **options), max_num_batched_tokens=30, **options)
    counter = Counter(engine)
    same(answers(engine, asked(told)), expected)
    assert counter.rows < counter.tokens


@pytest.mark.parametrize("kind", ["reference", "torch", "native"])
def test_of_a_prompt_one_row_is_computed(told: Oracle, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = loader(told, monkeypatch)(**choose_operators(kind, monkeypatch), max_num_batched_tokens=33)
    counter = Counter(engine)
    one = max(told.cases, key=lambda case: len(case["prompt"]))
    found = answers(engine, [submit("r", one["prompt"], max_tokens=2)])[("r", 0)]
    assert found.tokens == one["answer"][:2]
    assert (counter.tokens, counter.rows) == (len(one["prompt"]) + 1, 2) and counter.skipped == (len(one["prompt"]) - 1) // 33


def test_a_warm_up_computes_all_rows(told: Oracle, load: Load) -> None:
    """What all layers take for most tokens is taken, and compiled, before somebody asks for prompt_logprobs."""
    options: dict[str, Any] = {"max_model_len": 256, "max_num_batched_tokens": 48, "kv_cache_memory_bytes": 4 << 20}
    engine, plan = load(**options), make_plan(told.model, EngineConfig(dtype="float32", **options))
    counter = Counter(engine)
    assert warmup.run(engine.runner, [warmup.full(plan)], 256) == 1
    assert counter.rows == counter.tokens == 48
