"""Requests that follow grammars, in the engine: beside others, ahead, preempted, and where a grammar cannot be had."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from appliance.config import EngineConfig
from appliance.core.messages import Submit
from appliance.core.params import RequestError, SamplingParams, StructuredOutputsParams
from appliance.core.request import Request
from appliance.hub import demo_model
from appliance.memory.planner import make_plan
from appliance.runtime import grammar
from appliance.runtime.engine import IDLE_S, Engine
from appliance.runtime.runner import Runner
from appliance.runtime.sampler import sample
from appliance.text.prepare import prepare
from appliance.text.tokenizer import Tokenizer
from tests.runtime.conftest import answers, finish
from tests.runtime.fake_lane import FakeLane

PHONE = r"\d{3}-\d{4}"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 130}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CONSTRAINTS: tuple[dict[str, Any] | None, ...] = (
    None,
    {"regex": PHONE},
    {"choice": ["yes", "no", "maybe so"]},
    {"json": PERSON},
    {"grammar": 'root ::= "<" [a-z]+ ">" ("," root)?'},
    None,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(demo_model())


@pytest.fixture
def load() -> Callable[..., Engine]:
    def make(**options: Any) -> Engine:
        settings = {"model": str(demo_model()), "dtype": "float32", "reference_ops": True, "max_model_len": 96, "threads": 1}
        return Engine.load(EngineConfig(**{**settings, "kv_cache_memory_bytes": 4 << 20, **options}))

    return make


def ahead(engine: Engine) -> Engine:
    """The same engine with a runner whose device works by itself and draws the tokens."""
    config = EngineConfig(
        model=engine.info.directory,
        dtype="float32",
        reference_ops=True,
        max_model_len=engine.info.max_model_len,
        kv_cache_memory_bytes=engine.info.plan["kv_cache"]["bytes"],  # type: ignore[index]
        max_num_seqs=engine.scheduler.max_num_seqs,
        max_num_batched_tokens=engine.scheduler.max_num_batched_tokens,
    )
    plan = make_plan(Path(engine.info.directory), config)
    engine.runner = Runner(engine.runner.decoder, plan, device=torch.device("cpu"), lane=FakeLane())
    return engine


def ask(tokenizer: Tokenizer, name: str, structured: dict[str, Any] | None, prompt: str = "Tell me", **more: Any) -> Submit:
    chosen = None if structured is None else StructuredOutputsParams(**structured)
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 28, "structured_outputs": chosen, **more})
    return Submit(name, tuple(tokenizer.encode(prompt)), prepare(params, tokenizer), arrival=0.0)


def workload(tokenizer: Tokenizer, count: int) -> list[Submit]:
    kinds: tuple[dict[str, Any], ...] = (
        {},
        {"temperature": 1.0},
        {"temperature": 1.5, "top_k": 7, "top_p": 0.8},
        {"temperature": 1.0, "logprobs": 3},
        {"temperature": 0.9, "frequency_penalty": 0.5},
    )
    return [
        ask(tokenizer, f"r{i}", CONSTRAINTS[i % 6], "Tell me about " + "cats " * (i % 9), seed=i, **kinds[i % 5])
        for i in range(count)
    ]


def follows(text: str, structured: dict[str, Any]) -> bool:
    match structured:
        case {"regex": pattern}:
            return bool(re.fullmatch(pattern, text))
        case {"choice": choices}:
            return text in choices
        case {"grammar": _}:
            return bool(re.fullmatch(r"<[a-z]+>(,<[a-z]+>)*", text))
        case _:
            found = json.loads(text)
            return found.keys() == {"name", "age"} and len(found["name"]) <= 8 and 0 <= found["age"] <= 130


def check(tokenizer: Tokenizer, submits: Iterable[Submit], found: dict[tuple[str, int], list[int]]) -> None:
    """Every answer ends by itself, with the token that ends a text, and follows its grammar."""
    ended = 0
    for i, one in enumerate(submits):
        structured = CONSTRAINTS[i % 6]
        for index in range(one.params.width) if structured else ():
            tokens = found[one.request_id, index]
            if tokens[-1] == tokenizer.eos_token_id:
                ended += 1
                text = tokenizer.decode(tokens[:-1])
                assert follows(text, structured or {}), (structured, text)
            else:
                assert len(tokens) == one.params.max_tokens
    assert ended


@pytest.mark.parametrize("given", [None, '{"num_speculative_tokens": 3, "prompt_lookup_min": 1}'])
def test_answers_follow_their_grammars_beside_others_that_are_free(
    load: Callable[..., Engine], tokenizer: Tokenizer, given: str | None
) -> None:
    submits = workload(tokenizer, 12)
    engine = load(max_num_seqs=8, speculative_config=given)
    found = answers(engine, submits)
    check(tokenizer, submits, found)
    assert bool(engine.stats().drafts) == (given is not None)  # of those that are free
    free = [one for one in submits if one.params.structured_outputs is None]
    alone = answers(load(max_num_seqs=8), free)
    assert {key: found[key] for key in alone} == alone, "the neighbours' grammars changed an answer"


def test_the_same_answers_where_the_device_runs_ahead_and_under_preemption(
    load: Callable[..., Engine], tokenizer: Tokenizer
) -> None:
    options: dict[str, Any] = {"max_num_seqs": 7, "max_num_batched_tokens": 64}
    submits = workload(tokenizer, 9)
    plain = load(**options)
    expected = answers(plain, submits)
    check(tokenizer, submits, expected)
    size = plain.info.plan["kv_cache"]["block_bytes"] * 10  # type: ignore[index, operator]
    assert answers(ahead(load(**options)), submits) == expected
    for engine in (load(**options, kv_cache_memory_bytes=size), ahead(load(**options, kv_cache_memory_bytes=size))):
        assert answers(engine, submits) == expected
        assert engine.scheduler.num_preemptions > 0


def test_several_completions_have_places_of_their_own(load: Callable[..., Engine], tokenizer: Tokenizer) -> None:
    one = ask(tokenizer, "a", {"regex": PHONE}, temperature=2.0, n=6, seed=1)
    found = answers(load(), [one])
    texts = [tokenizer.decode(tokens[:-1]) for tokens in found.values()]
    assert len(found) == 6 and len(set(texts)) > 2
    assert all(re.fullmatch(PHONE, text) for text in texts), texts


def test_others_go_on_while_a_grammar_is_compiled(
    load: Callable[..., Engine], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, compiled, gate = load(), grammar.Grammars._compile, threading.Event()

    def slow(self: grammar.Grammars, text: str) -> Any:
        assert gate.wait(30)
        return compiled(self, text)

    monkeypatch.setattr(grammar.Grammars, "_compile", slow)
    engine.submit(ask(tokenizer, "guided", {"regex": PHONE}))
    engine.submit(ask(tokenizer, "gone", {"regex": PHONE}))
    engine.submit(ask(tokenizer, "free", None, max_tokens=20))
    steps = [engine.step() for _ in range(25)]
    assert {event.request_id for events in steps for event in events} == {"free"}
    assert any(event.finish_reason for events in steps for event in events)
    begun = time.perf_counter()
    assert engine.has_work and engine.step() == []
    assert time.perf_counter() - begun >= IDLE_S, "who has nothing to do but wait does not spin"
    assert [event.finish_reason for event in engine.abort("gone")] == ["abort"]
    gate.set()
    events = finish(engine)
    assert events["guided", 0][-1].finish_reason == "stop" and ("gone", 0) not in events


def test_a_grammar_that_cannot_be_compiled_ends_its_own_request(
    load: Callable[..., Engine], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the door lets in compiles; should the engine's side fail all the same, nobody else hears of it."""
    engine = load()
    broken = ask(tokenizer, "broken", {"regex": "a"}, n=2, temperature=1.0)
    object.__setattr__(broken.params, "grammar", "start: nothing_like_that")
    engine.submit(broken)
    engine.submit(ask(tokenizer, "good", {"choice": ["yes"]}))
    events = finish(engine)
    assert [events["broken", i][-1].finish_reason for i in range(2)] == ["error", "error"]
    assert "nothing_like_that" in (events["broken", 0][-1].error or "")
    assert events["good", 0][-1].finish_reason == "stop"


def test_the_vocabulary_is_read_before_anybody_asks(
    load: Callable[..., Engine], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once; what was wrong with it then is left to the requests that need it."""
    made: list[int] = []

    def counted(words: Tokenizer, size: int, ends: tuple[int, ...]) -> Any:
        made.append(size)
        if len(made) == 2:
            raise ValueError("its files are damaged")
        return vocabulary(words, size, ends)

    vocabulary = grammar.vocabulary
    monkeypatch.setattr(grammar, "vocabulary", counted)
    for prepared, asked in ((1, 1), (2, 3)):
        engine = load()
        engine.prepare()
        grammar.deep_thread().submit(len, ()).result()  # behind it
        assert len(made) == prepared and not engine.has_work
        submit = ask(tokenizer, "a", {"regex": PHONE})
        assert re.fullmatch(PHONE, tokenizer.decode(answers(engine, [submit])["a", 0])) and len(made) == asked


def test_a_request_of_which_nothing_is_left_ends_with_the_reason(load: Callable[..., Engine], tokenizer: Tokenizer) -> None:
    one = ask(tokenizer, "a", {"choice": ["yes"]}, allowed_token_ids=tokenizer.encode("7", add_special_tokens=False))
    engine = load()
    engine.submit(one)
    last = finish(engine)["a", 0][-1]
    assert last.finish_reason == "error" and "beside its grammar" in (last.error or "")


def test_log_probabilities_are_those_of_what_the_grammar_allows(load: Callable[..., Engine], tokenizer: Tokenizer) -> None:
    engine = load()
    engine.submit(ask(tokenizer, "a", {"choice": ["yes", "no"]}, logprobs=5))
    first = finish(engine)["a", 0][0].logprobs
    assert first is not None
    tokens = {tokenizer.token_str(token) for token, _ in first[0].top}
    assert tokens <= {"y", "ye", "yes", "n", "no"} and len(tokens) >= 2
    assert sum(2.718281828**logprob for _, logprob in first[0].top) == pytest.approx(1.0, abs=1e-4)


def test_what_the_engine_refuses(load: Callable[..., Engine], tokenizer: Tokenizer) -> None:
    engine = load()
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))
    with pytest.raises(RequestError, match="need a tokenizer"):
        engine.submit(Submit("a", (5,), params, arrival=0.0))
    assert not engine.has_work


def test_without_the_library(load: Callable[..., Engine], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine and everything else work; who asks for a grammar is told what is missing."""
    from appliance.text.grammar import _checked

    _checked.cache_clear()
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match="pip install llguidance"):
        ask(tokenizer, "a", {"regex": "ab"})
    assert len(answers(load(), [ask(tokenizer, "b", None, max_tokens=3)])["b", 0]) == 3


@pytest.mark.parametrize("more", [{}, {"top_k": 5}, {"top_k": 5000}, {"top_p": 0.7}, {"min_p": 0.2}, {"logprobs": 4}])
def test_draws_from_a_large_vocabulary_leave_aside_what_is_ruled_out(more: dict[str, Any]) -> None:
    """And find what they would have found among all of it."""
    vocab = 20_000
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(1)) * 3
    logits[0, torch.arange(vocab) % 7 != 3] = float("-inf")
    for seed in range(40):
        params = SamplingParams(temperature=1.3, max_tokens=1, **more)
        plain, guided = (Request("a", 0, [1], 1, params, 2, seed, 0.0, guide=guide) for guide in (None, object()))
        expected, found = sample(logits.clone(), [plain])[0], sample(logits.clone(), [guided])[0]
        assert found == expected and found.token % 7 == 3


def test_masks_leave_the_rows_of_others_alone() -> None:
    """Bits are counted from the lowest; rows of the slice alone are touched; tokens beyond the last bit's byte do not exist."""
    logits = torch.zeros(3, 37)
    bits = np.zeros(8, dtype=np.uint8)
    bits[0], bits[4] = 0b101, 0b10000
    masks = grammar.Masks(np.array([1, 4, 9]), np.stack([bits, bits, bits]))
    masks.rule_out(logits, 3)
    assert logits.isfinite().all(dim=1).tolist() == [True, False, True]
    assert logits[1].isfinite().nonzero().view(-1).tolist() == [0, 2, 36]
    assert masks and not grammar.Masks()


@pytest.mark.parametrize("vocab", [37, 640, 40_000])
@pytest.mark.parametrize("at_once", [1, 100_000])
def test_masks_of_any_rows(vocab: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against one row after another: rows side by side and apart, in slices that begin and end anywhere."""
    monkeypatch.setattr(grammar, "AT_ONCE", at_once)
    rng = np.random.default_rng(vocab)
    for rows in ([0], [0, 1, 2, 3], [5, 6, 7], [0, 2, 3, 9], [11], [3, 4, 5, 6, 7, 8]):
        bits = rng.integers(0, 256, (len(rows), 4 * -(-vocab // 32)), dtype=np.uint8)
        masks = grammar.Masks(np.array(rows), bits)
        for first, count in ((0, 12), (3, 4), (6, 6), (0, 1)):
            logits = torch.from_numpy(rng.standard_normal((count, vocab)).astype(np.float32))
            expected = logits.clone()
            for row, own in zip(rows, bits, strict=True):
                if first <= row < first + count:
                    allowed = np.unpackbits(own, bitorder="little")[:vocab].astype(bool)
                    expected[row - first, torch.from_numpy(~allowed)] = float("-inf")
            masks.rule_out(logits, first)
            assert torch.equal(logits, expected)
