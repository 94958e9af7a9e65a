"""The engine on a tiny model: the same answers however requests are batched, chunked, preempted or restarted."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from appliance.core.messages import Submit
from appliance.core.params import RequestError, SamplingParams
from appliance.core.step import StepPlan
from appliance.runtime.engine import MAX_FAILURES, Engine
from appliance.runtime.runner import Flight
from kernels.cpu import backend
from models.decoder import Decoder
from quant.errors import InputError
from tests.runtime.conftest import answers, finish, submit

Load = Callable[..., Engine]


def mixed(seed: int, number: int = 12) -> list[Submit]:
    """Greedy and seeded requests of all lengths around the block borders."""
    rng = random.Random(seed)
    lengths = [1, 2, 15, 16, 17, 31, 32, 33, 47, 64, 100, 130]
    out = []
    for i in range(number):
        ids = [rng.randrange(3, 256) for _ in range(lengths[i % len(lengths)])]
        heat = {} if i % 2 == 0 else {"temperature": 0.9, "seed": i, "top_p": 0.9, "repetition_penalty": 1.1}
        out.append(submit(f"r{i}", ids, max_tokens=rng.randrange(1, 24), **heat))
    return out


@pytest.fixture
def alone(load: Load) -> dict[tuple[str, int], list[int]]:
    engine = load()
    found: dict[tuple[str, int], list[int]] = {}
    for one in mixed(1):
        found |= answers(engine, [one])
    return found


def test_batched_equals_alone(load: Load, alone: dict) -> None:
    assert answers(load(), mixed(1)) == alone


@pytest.mark.parametrize("budget", [1, 7, 16, 33])
def test_chunked_equals_whole(load: Load, alone: dict, budget: int) -> None:
    assert answers(load(max_num_batched_tokens=budget), mixed(1)) == alone


def test_preempted_equals_not(load: Load, alone: dict) -> None:
    kv_token = 2 * 2 * 2 * 16 * 4  # layers, k and v, heads, head size, float32
    engine = load(max_model_len=160, kv_cache_memory_bytes=kv_token * 16 * 11)
    assert engine.scheduler.pool.num_blocks == 11
    assert answers(engine, mixed(1)) == alone
    assert engine.stats().preemptions > 0, "the pool was meant to be too small"


def test_restarted_equals_not(load: Load, alone: dict) -> None:
    engine = load()
    answers(engine, mixed(2))
    assert answers(engine, mixed(1)) == alone


def test_other_block_sizes(load: Load, alone: dict) -> None:
    for block_size in (8, 64):
        assert answers(load(block_size=block_size), mixed(1)) == alone


def test_native_operators_agree_with_reference(load: Load, alone: dict) -> None:
    """Same tokens from the CPU operators in float32: their rounding differs, so a rare near-tie may turn over."""
    found = answers(load(reference_ops=False), mixed(1))
    assert sum(found[key] == alone[key] for key in alone) >= len(alone) - 1


@pytest.mark.parametrize("kind", ["reference", "torch", "native"])
def test_the_engine_says_what_computes(
    load: Load, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "native" and backend.native() is None:
        pytest.skip("the native extension is not built")
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "torch" if kind == "torch" else "auto")
    caplog.set_level("INFO")
    threads = torch.get_num_threads()
    try:
        engine = load(reference_ops=kind == "reference", dtype="bfloat16", threads=2)
        assert torch.get_num_threads() == (1 if kind == "native" else 2)
    finally:
        torch.set_num_threads(threads)
    kernels = backend.name() if kind == "native" else kind
    head = "int8" if kind == "native" else "bfloat16"
    assert (engine.info.kernels, engine.info.plan["lm_head"]) == (kernels, head)
    assert f"{kernels} kernels, activations in bfloat16, head in {head}" in caplog.text
    assert answers(engine, [submit("one", [3, 4, 5])])


@pytest.mark.parametrize("option", ["lm_head_dtype", "activation_dtype"])
def test_an_unknown_storage_type_is_refused(load: Load, option: str) -> None:
    with pytest.raises(InputError, match=f"--{option.replace('_', '-')} is 'int3': one of auto, "):
        load(**{option: "int3"})


@pytest.mark.parametrize("choice", ["int8", "int4"])
def test_answers_with_a_quantized_head(load: Load, choice: str) -> None:
    """Both operators multiply with the same codes."""
    found = [answers(load(lm_head_dtype=choice, reference_ops=reference), mixed(1)) for reference in (True, False)]
    assert sum(found[0][key] == found[1][key] for key in found[0]) >= len(found[0]) - 1


def test_n_answers_differ_and_repeat(load: Load) -> None:
    engine = load()
    one = submit("many", [5, 6, 7], n=4, temperature=1.0, seed=3)
    first = answers(engine, [one])
    assert len(first) == 4 and len({tuple(t) for t in first.values()}) > 1
    assert answers(engine, [one, *mixed(1)])[("many", 2)] == first[("many", 2)]


def test_requests_without_seed_differ(load: Load) -> None:
    engine = load()
    found = answers(engine, [submit(f"s{i}", [9, 9, 9], temperature=1.0) for i in range(4)])
    assert len({tuple(t) for t in found.values()}) > 1


def test_prompt_logprobs_survive_chunks_and_preemption(load: Load) -> None:
    ids = [random.Random(5).randrange(3, 256) for _ in range(70)]
    whole = load()
    whole.submit(submit("p", ids, prompt_logprobs=2))
    expected = finish(whole)[("p", 0)][0].prompt_logprobs
    assert expected is not None and len(expected) == 70 and expected[0] is None
    assert all(len(one.top) == 2 and one.token_id == t for one, t in zip(expected[1:], ids[1:], strict=True))
    chunked = load(max_num_batched_tokens=9)
    chunked.submit(submit("p", ids, prompt_logprobs=2))
    for other in mixed(3):
        chunked.submit(other)
    news = finish(chunked)[("p", 0)]
    got = news[0].prompt_logprobs
    assert got is not None and all(e.prompt_logprobs is None for e in news[1:])
    for a, b in zip(got[1:], expected[1:], strict=True):
        assert a.token_id == b.token_id and abs(a.logprob - b.logprob) < 1e-4


def test_logprobs_match_a_forward_by_hand(load: Load) -> None:
    engine = load()
    engine.submit(submit("a", [4, 5, 6], max_tokens=3, logprobs=5))
    news = finish(engine)[("a", 0)]
    tokens = [4, 5, 6] + [e.token_ids[0] for e in news]
    engine.submit(submit("b", tokens, max_tokens=1, prompt_logprobs=5))
    scored = finish(engine)[("b", 0)][0].prompt_logprobs
    assert scored is not None
    for event, other in zip(news, scored[3:], strict=True):
        assert event.logprobs is not None and other is not None
        assert event.logprobs[0].rank == other.rank == 1
        assert abs(event.logprobs[0].logprob - other.logprob) < 1e-4


def test_ends(load: Load) -> None:
    engine = load()
    free = answers(engine, [submit("x", [10, 11, 12], max_tokens=6)])[("x", 0)]
    engine.submit(submit("x", [10, 11, 12], max_tokens=6, stop_token_ids=[free[2]]))
    last = finish(engine)[("x", 0)][-1]
    assert (last.finish_reason, last.stop_reason) == ("stop", free[2])
    engine.submit(submit("x", [10, 11, 12], max_tokens=6, stop_token_ids=[free[2]], min_tokens=6))
    news = finish(engine)[("x", 0)]
    assert news[-1].finish_reason == "length" and free[2] not in [t for e in news[:-1] for t in e.token_ids]
    engine.submit(submit("x", [10, 11, 12], max_tokens=None))
    assert sum(len(e.token_ids) for e in finish(engine)[("x", 0)]) == 256 - 3


def test_abort_frees_blocks_at_once(load: Load) -> None:
    engine = load()
    for one in mixed(1):
        engine.submit(one)
    engine.step()
    used = engine.scheduler.pool.used
    events = engine.abort("r11")
    assert [(e.request_id, e.finish_reason) for e in events] == [("r11", "abort")]
    assert engine.scheduler.pool.used < used
    assert engine.abort("r11") == [] and engine.abort("unknown") == []
    engine.check()
    assert ("r11", 0) not in finish(engine)


def test_prompt_logprobs_are_told_once_and_forgotten(load: Load) -> None:
    """Also where a request is preempted after its first token, and its prompt is computed again."""
    engine = load(max_model_len=160, kv_cache_memory_bytes=2 * 2 * 2 * 16 * 4 * 16 * 11)
    for i in range(4):
        engine.submit(submit(f"p{i}", range(3, 40), max_tokens=60, prompt_logprobs=0))
    events = finish(engine)
    assert engine.stats().preemptions > 0 and not engine._scores
    for news in events.values():
        told = [e.prompt_logprobs for e in news if e.prompt_logprobs is not None]
        assert len(told) == 1 and len(told[0]) == 37


@pytest.mark.parametrize(
    ("ids", "params", "param", "words"),
    [
        ([], {}, "prompt", "empty"),
        ([3, 256], {}, "prompt", "token id 256, but the vocabulary has ids 0 to 255"),
        ([3] * 256, {}, "prompt", "maximum context length is 256 tokens. However, your prompt contains 256 input tokens"),
        ([3] * 200, {"max_tokens": 57}, "max_tokens", "200 input tokens and max_tokens asks for 57 more"),
        ([3], {"logit_bias": {300: 1.0}}, "logit_bias", "token id 300"),
        ([3], {"allowed_token_ids": [400]}, "allowed_token_ids", "token id 400"),
    ],
)
def test_refused_at_the_door(load: Load, ids: list[int], params: dict, param: str, words: str) -> None:
    engine = load()
    with pytest.raises(RequestError, match=words) as error:
        engine.submit(submit("bad", ids, **params))
    assert error.value.param == param and not engine.has_work


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError, OverflowError, ValueError, KeyError])
def test_a_failing_step_ends_its_own_requests_only(load: Load, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    engine = load()
    launch, broken = engine.runner.launch, [True]

    def fail_once(plan: StepPlan, scored: list[int]) -> Flight:
        if broken and broken.pop():
            raise kind("no memory for this step")
        return launch(plan, scored)

    monkeypatch.setattr(engine.runner, "launch", fail_once)
    engine.submit(submit("unlucky", [3, 4]))
    events = engine.step()
    assert events[0].finish_reason == "error" and "no memory for this step" in (events[0].error or "")
    assert answers(engine, [submit("lucky", [3, 4])])

    def fail_always(plan: StepPlan, scored: list[int]) -> Flight:
        raise RuntimeError("broken for good")

    monkeypatch.setattr(engine.runner, "launch", fail_always)
    for i in range(MAX_FAILURES - 1):
        engine.submit(submit(f"f{i}", [3, 4]))
        engine.step()
    engine.submit(submit("last", [3, 4]))
    with pytest.raises(RuntimeError, match="broken for good"):
        engine.step()


def test_nan_logits_end_the_request_with_an_error(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load()
    engine.runner.caches[0].k.fill_(float("nan"))  # unused slots are never read: this must not matter
    assert answers(engine, [submit("fine", [3, 4, 5])])
    monkeypatch.setattr(Decoder, "logits", lambda self, hidden, out: out.fill_(float("nan")))
    engine.submit(submit("bad", [3, 4, 5]))
    event = finish(engine)[("bad", 0)][-1]
    assert event.finish_reason == "error" and "not finite" in (event.error or "")


@pytest.mark.realdata
def test_two_hundred_requests_of_a_real_trace(load: Load, shared_data: Path) -> None:
    """Azure's conversation trace, lengths scaled to the model: all end, no step starves, memory stays flat."""
    lines = (shared_data / "traces" / "AzureLLMInferenceTrace_conv.csv").read_text().splitlines()[1:201]
    lengths = [(max(1, int(a) // 40), max(1, int(b) // 40)) for _, a, b in (line.split(",") for line in lines)]
    engine = load(kv_cache_memory_bytes=1 << 20, max_num_seqs=32, max_num_batched_tokens=128, reference_ops=False)
    rng = random.Random(0)
    for i, (prompt, output) in enumerate(lengths):
        ids = tuple(rng.randrange(3, 256) for _ in range(min(prompt, 200)))
        params = SamplingParams(max_tokens=min(output, 50), ignore_eos=True, seed=i)
        engine.submit(Submit(f"t{i}", ids, params, 0.0))
    done, waited, process = 0, 0, psutil.Process()
    marks: list[int] = []
    while engine.has_work:
        events = engine.step()
        engine.check()
        waited = 0 if events else waited + 1
        assert waited < 10, "a step without news follows a step without news"
        done += sum(e.finish_reason is not None for e in events)
        marks.append(process.memory_info().rss)
    assert done == 200 and engine.scheduler.pool.used == 0
    assert max(marks[len(marks) // 2 :]) - marks[len(marks) // 4] < 16 << 20
