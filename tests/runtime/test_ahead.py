"""Steps launched before the tokens of the step before are known, on a device of which the CPU plays the part."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from appliance.config import EngineConfig
from appliance.core.messages import Pooling, Submit
from appliance.core.thinking import ThinkingMarks
from appliance.memory.inputs import input_bytes, offsets
from appliance.memory.planner import make_plan
from appliance.runtime.batch import Draws, StepArrays
from appliance.runtime.engine import Engine
from appliance.runtime.runner import Runner
from appliance.runtime.staging import Staging
from models.decoder import Decoder
from tests.runtime.conftest import answers, finish, submit
from tests.runtime.fake_lane import FakeLane, SlowLane

Load = Callable[..., Engine]


def ahead(engine: Engine, lane: FakeLane | None = None) -> Engine:
    """The same engine with a runner whose device works by itself."""
    settings = {
        "max_model_len": engine.info.max_model_len,
        "kv_cache_memory_bytes": engine.info.plan["kv_cache"]["bytes"],  # type: ignore[index]
        "max_num_seqs": engine.scheduler.max_num_seqs,
        "max_num_batched_tokens": engine.scheduler.max_num_batched_tokens,
    }
    config = EngineConfig(model=engine.info.directory, dtype="float32", reference_ops=True, **settings)  # type: ignore[arg-type]
    plan = make_plan(Path(engine.info.directory), config)
    assert plan.num_blocks == engine.scheduler.pool.num_blocks
    engine.runner = Runner(engine.runner.decoder, plan, device=torch.device("cpu"), lane=lane or SlowLane())
    assert engine.runner.runs_ahead
    return engine


def workload(seed: int, count: int) -> list[Submit]:
    """Answers that end by length, by a token, on the first or the last; draws of every kind, on the device and on the host."""
    rng = random.Random(seed)
    kinds = (
        {},
        {"temperature": 0.8},
        {"temperature": 1.2, "top_k": 20, "top_p": 0.9},
        {"temperature": 0.9, "min_p": 0.05},
        {"temperature": 0.7, "logprobs": 2},
        {"presence_penalty": 0.8, "frequency_penalty": 0.3},
        {"min_tokens": 4, "stop_token_ids": list(range(3, 60)), "max_tokens": 25},
        {"stop_token_ids": list(range(3, 40)), "temperature": 1.0},
        {"prompt_logprobs": 1, "max_tokens": 2},
        {"max_tokens": 1},
        {"temperature": 0.9, "thinking_token_budget": 3, "thinking_marks": ThinkingMarks((7,), 9, (9,), 0), "max_tokens": 12},
        {"temperature": 1.0, "repetition_detection": {"max_pattern_size": 3, "min_count": 2}, "allowed_token_ids": [5, 6]},
    )
    return [
        submit(
            f"r{i}",
            [rng.randrange(3, 256) for _ in range(rng.choice((1, 15, 16, 17, 40)))],
            **{"max_tokens": rng.randrange(1, 30), "seed": i, **rng.choice(kinds)},  # type: ignore[arg-type]
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("blocks", [400, 8])
@pytest.mark.parametrize("seed", range(4))
def test_the_same_answers_as_step_by_step(load: Load, blocks: int, seed: int) -> None:
    """Also where requests are preempted while their next token is being sampled."""
    options = {"max_num_seqs": 7, "max_num_batched_tokens": 64, "max_model_len": 96}
    plain = load(**options)
    size = plain.info.plan["kv_cache"]["block_bytes"] * blocks  # type: ignore[index, operator]
    requests = workload(seed, 30)
    expected = answers(load(**options, kv_cache_memory_bytes=size), requests)
    engine = ahead(load(**options, kv_cache_memory_bytes=size))
    assert answers(engine, requests) == expected
    assert engine.scheduler.pool.used == 0 and not engine.has_work
    assert (engine.scheduler.num_preemptions > 0) == (blocks == 8)
    stats = engine.stats()
    assert sum(stats.finished.values()) == len(requests)
    assert stats.generation_tokens == sum(len(tokens) for tokens in expected.values())


@pytest.mark.parametrize("blocks", [400, 8])
def test_embeddings_among_answers(load: Load, blocks: int) -> None:
    """Each is the one that its prompt has alone, on a device of its own too, also where prompts are computed twice."""
    options = {"max_num_seqs": 7, "max_num_batched_tokens": 64, "max_model_len": 96}
    size = load(**options).info.plan["kv_cache"]["block_bytes"] * blocks  # type: ignore[index, operator]
    rng, poolings = random.Random(3), (Pooling(), Pooling(normalize=False), Pooling(dimensions=7), Pooling(3, normalize=False))
    requests = workload(9, 24)
    for number in range(24):
        ids = [rng.randrange(3, 256) for _ in range(rng.choice((1, 15, 16, 17, 70, 96)))]
        one = replace(submit(f"e{number}", ids, max_tokens=1), pooling=poolings[number % 4])
        requests.insert(rng.randrange(len(requests)), one)
    tokens = {key: told for key, told in answers(load(**options), requests).items() if key[0][0] == "r"}
    wanted = {}
    for one in requests:
        if one.pooling is not None:
            alone = load(**options)
            alone.submit(one)
            ((end,),) = finish(alone).values()
            assert end.embedding is not None and end.finish_reason == "stop" and not end.token_ids
            wanted[one.request_id] = torch.frombuffer(bytearray(end.embedding), dtype=torch.float32)
            assert len(wanted[one.request_id]) == (one.pooling.dimensions or 64)
    for engine in (load(**options, kv_cache_memory_bytes=size), ahead(load(**options, kv_cache_memory_bytes=size))):
        for one in requests:
            engine.submit(one)
        told = finish(engine)
        assert {key: [t for e in news for t in e.token_ids] for key, news in told.items() if key[0][0] == "r"} == tokens
        for name, vector in wanted.items():
            (end,) = told[name, 0]
            found = torch.frombuffer(bytearray(end.embedding or b""), dtype=torch.float32)
            torch.testing.assert_close(found, vector, atol=1e-5, rtol=1e-5)
        stats = engine.stats()
        assert sum(stats.finished.values()) == len(requests) and (stats.preemptions > 0) == (blocks == 8)
        assert stats.generation_tokens == sum(len(one) for one in tokens.values())


def test_a_step_is_launched_before_the_last_one_lands(load: Load) -> None:
    """Where all tokens are drawn on the device: one that the host must draw is waited for."""
    lane = FakeLane()
    engine = ahead(load(), lane)
    engine.submit(submit("a", [3, 4, 5], max_tokens=5))
    assert engine.step() == []  # prefill under way
    first = engine.step()
    assert len(first) == 1 and (lane.marks, lane.waits) == (2, 1)
    assert len(finish(engine)[("a", 0)]) == 4
    engine.submit(submit("b", [3, 4, 5], max_tokens=3, logprobs=1))
    assert engine.step() == [] and lane.marks == lane.waits + 1
    (event,) = engine.step()
    assert event.logprobs and lane.marks == lane.waits + 1


def test_aborted_while_a_step_is_under_way(load: Load) -> None:
    engine = ahead(load())
    alone = answers(load(), [submit("b", [9, 8, 7], max_tokens=12)])
    engine.submit(submit("a", [3, 4, 5], max_tokens=30))
    engine.submit(submit("b", [9, 8, 7], max_tokens=12))
    for _ in range(3):
        engine.step()
    (event,) = engine.abort("a")
    assert event.finish_reason == "abort"
    engine.submit(submit("a", [3, 4, 5], max_tokens=2))  # the name and perhaps the blocks of the one that was aborted
    found = finish(engine)
    assert len([e for e in found[("a", 0)] if e.token_ids]) == 2
    assert alone[("b", 0)][-len(found[("b", 0)]) :] == [e.token_ids[0] for e in found[("b", 0)]]
    assert engine.scheduler.pool.used == 0


def test_rows_without_a_token_end_their_requests(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ahead(load())
    logits, poisoned = Decoder.logits, [False, False, True]

    def poison(self: Decoder, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        found = logits(self, hidden, out)
        return found.fill_(float("nan")) if poisoned and poisoned.pop(0) else found

    monkeypatch.setattr(Decoder, "logits", poison)
    engine.submit(submit("a", [3, 4, 5], max_tokens=9))
    events = finish(engine)[("a", 0)]
    assert len(events) == 3 and events[-1].finish_reason == "error" and "not finite" in (events[-1].error or "")
    assert not engine.has_work and engine.scheduler.pool.used == 0


def test_a_device_that_fails(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """The failure is seen where its results are waited for, or where the next step is launched."""
    engine = ahead(load())
    mark, failing = engine.runner._mark, [False, True]

    def marked() -> Callable[[], None]:
        wait = mark()

        def fail() -> None:
            wait()
            if failing and failing.pop(0):
                raise RuntimeError("an illegal memory access")

        return fail

    monkeypatch.setattr(engine.runner, "_mark", marked)
    engine.submit(submit("a", [3, 4, 5], max_tokens=9))
    events = finish(engine)[("a", 0)]
    assert [e.finish_reason for e in events] == [None, "error"] and "illegal memory access" in (events[-1].error or "")
    launch, broken = engine.runner.launch, [False, False, True]

    def fail(*given: object) -> object:
        if broken and broken.pop(0):
            raise RuntimeError("no memory for this step")
        return launch(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.runner, "launch", fail)
    engine.submit(submit("b", [3, 4, 5], max_tokens=9))
    events = finish(engine)[("b", 0)]
    assert [e.finish_reason for e in events] == [None, None, "error"], "what was under way is told"
    assert not engine.has_work and engine.scheduler.pool.used == 0


def test_inputs_fit_where_they_are_sent(load: Load) -> None:
    """The longest step that can be, with everything that is sent along."""
    rng = random.Random(0)
    for tokens, sequences, width in ((64, 7, 3), (1, 1, 1), (2048, 256, 40)):
        step = StepArrays.empty().padded(sequences, width, spare=9, block_size=16)
        arrays = step.arrays
        longer = [arrays[0].repeat(rng.randrange(1, 3))[:tokens] for _ in range(3)] + arrays[3:]
        draws = Draws.build([])
        sent = [*longer, arrays[0], *(arrays[0].astype(draw.dtype) for draw in draws)]
        used = offsets([array.nbytes for array in sent])[-1]
        assert used <= input_bytes(max(tokens, sequences), sequences, width) <= used + 8 * 3 * tokens + 5 * 64
        lane = FakeLane()
        found = Staging(input_bytes(max(tokens, sequences), sequences, width), lane, torch.device("cpu")).send(sent)
        assert all(
            (a == b.numpy()).all() and b.data_ptr() % 64 == found[0].data_ptr() % 64 for a, b in zip(sent, found, strict=True)
        )


def test_a_text_is_read_by_somebody_who_looks_at_its_end_only(load: Load) -> None:
    """Many steps are sent before anybody waits for their logits: inputs must not be overwritten on their way."""
    text = list(range(3, 131))
    expected = [part.clone() for part in load().runner.every_logit(text, 16)]
    engine = ahead(load())
    for _ in range(2):
        *_, last = engine.runner.every_logit(text, 16)
        assert torch.equal(last, expected[-1])
