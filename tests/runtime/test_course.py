"""What the engine tells of the course of its requests: when they were first scheduled, how large steps are, how they ended."""

from __future__ import annotations

import time
from collections.abc import Callable

from appliance.runtime.engine import Engine
from tests.runtime.conftest import finish, submit

Load = Callable[..., Engine]


def test_when_a_completion_was_first_scheduled(load: Load) -> None:
    """With its first token alone; not when it was admitted again after a preemption."""
    engine = load(max_model_len=160, kv_cache_memory_bytes=2 * 2 * 2 * 16 * 4 * 16 * 11, max_num_seqs=2)
    begun = time.monotonic()
    for i in range(4):
        engine.submit(submit(f"r{i}", range(3, 40), max_tokens=60))
    events = finish(engine)
    assert engine.stats().preemptions > 0
    for news in events.values():
        assert news[0].scheduled is not None and begun <= news[0].scheduled <= time.monotonic()
        assert all(event.scheduled is None for event in news[1:])
    first, *_, last = sorted(news[0].scheduled or 0 for news in events.values())
    assert last > first, "of four, two had to wait for a place"


def test_beams_have_it_too(load: Load) -> None:
    engine, begun = load(), time.monotonic()
    engine.submit(submit("b", range(3, 9), max_tokens=4, n=2, use_beam_search=True))
    for news in finish(engine).values():
        assert begun <= (news[0].scheduled or 0) <= time.monotonic()


def test_sizes_of_steps(load: Load) -> None:
    """A prompt of 20 tokens by at most 8 a step: 8, 8, 4, and then one token each."""
    engine = load(max_num_batched_tokens=8)
    engine.submit(submit("r", range(3, 23), max_tokens=5))
    finish(engine)
    stats = engine.stats()
    assert stats.step_sizes == {3: 2, 2: 1, 0: 4} and sum(stats.step_sizes.values()) == stats.steps == 7
    assert stats.step_tokens == 20 + 4


def test_what_the_text_layer_ended_counts_as_it_says(load: Load) -> None:
    engine = load()
    for name in ("stopped", "aborted", "finished"):
        engine.submit(submit(name, range(3, 9), max_tokens=6))
    engine.step()
    assert [event.finish_reason for event in engine.abort("stopped", 0, "stop")] == ["stop"]
    assert [event.finish_reason for event in engine.abort("aborted")] == ["abort"]
    finish(engine)
    assert engine.stats().finished == {"stop": 1, "abort": 1, "length": 1}


def test_who_waits_for_something_else_than_a_place_is_held(load: Load) -> None:
    """Beams that have their token wait for the others of their group; requests without a place do not."""
    engine = load(max_num_seqs=2)
    for name in ("a", "b", "c"):
        engine.submit(submit(name, range(3, 9), max_tokens=6))
    engine.step()
    assert (engine.stats().waiting, engine.stats().held) == (1, 0)
    finish(engine)
    engine.submit(submit("beams", range(3, 9), max_tokens=6, n=4, use_beam_search=True))
    seen = set()
    while engine.has_work:
        engine.step()
        stats = engine.stats()
        assert stats.held <= stats.waiting
        seen.add(stats.held)
    assert max(seen) > 0
