"""Answers with guesses are the answers without, whatever is asked for; only the steps are fewer."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from appliance.core.messages import Event, Submit
from appliance.core.thinking import ThinkingMarks
from appliance.runtime.engine import Engine
from tests.runtime.conftest import finish, submit

NGRAM = json.dumps({"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 1, "prompt_lookup_max": 3})
ASKED: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.5, "seed": 1},
    {"temperature": 0.9, "seed": 2, "top_p": 0.9, "top_k": 20},
    {"logprobs": 3},
    {"temperature": 0.7, "seed": 3, "logprobs": 1, "n": 2},
    {"repetition_penalty": 1.05, "frequency_penalty": 0.1},
    {"prompt_logprobs": 1},
    {"logit_bias": {9: 4.0, 10: 4.0}},
    {"min_tokens": 20},
    {"thinking_token_budget": 20, "thinking_marks": ThinkingMarks((7,), 9, (9,), 0)},
    {"logprob_token_ids": [4, 9]},
    {"repetition_detection": {"max_pattern_size": 4, "min_count": 4}},
    {"use_beam_search": True, "n": 2, "max_tokens": 6},
)


def requests(seed: int) -> list[Submit]:
    """Texts that repeat themselves, so that there is something to guess from."""
    rng, made = random.Random(seed), []
    for i, asked in enumerate(ASKED):
        piece = [rng.randrange(3, 256) for _ in range(rng.randrange(2, 9))]
        made.append(submit(f"r{i}", piece * rng.randrange(2, 6), **{"max_tokens": rng.randrange(24, 60), **asked}))
    return made


class Answer(NamedTuple):
    tokens: list[int]
    ends: tuple[Any, ...]  # why
    logprobs: list[float]  # of tokens and of the most likely ones, in order; and of the prompt's

    @classmethod
    def of(cls, news: list[Event]) -> Answer:
        scores = [one for event in news for one in (*(event.logprobs or ()), *filter(None, event.prompt_logprobs or ()))]
        assert all(len(event.logprobs or event.token_ids) == len(event.token_ids) for event in news)
        assert [event.finish_reason for event in news[:-1]] == [None] * (len(news) - 1)
        tokens = [token for event in news for token in event.token_ids]
        told = [[one.logprob, *(logprob for _, logprob in one.top)] for one in scores]
        return cls(tokens, (news[-1].finish_reason, news[-1].stop_reason), [value for one in told for value in one])


def answers(engine: Engine, submits: list[Submit]) -> dict[tuple[str, int], Answer]:
    for one in submits:
        engine.submit(one)
    return {key: Answer.of(news) for key, news in finish(engine).items()}


def same(ours: dict[tuple[str, int], Answer], theirs: dict[tuple[str, int], Answer]) -> None:
    """To the token; log-probabilities but for what other shapes of the same sums are rounded to."""
    assert {key: one[:2] for key, one in ours.items()} == {key: one[:2] for key, one in theirs.items()}
    for key, one in ours.items():
        assert one.logprobs == pytest.approx(theirs[key].logprobs, abs=1e-4)


@pytest.mark.parametrize("more", [{"max_num_seqs": 1}, {"max_num_seqs": 3, "max_num_batched_tokens": 8}, {}])
def test_answers_are_the_same(load: Callable[..., Engine], more: dict[str, int]) -> None:
    engine, plain = load(speculative_config=NGRAM, **more), load(**more)
    asked = requests(1)
    expected = answers(plain, asked)
    same(answers(engine, asked), expected)
    ours, theirs = engine.stats(), plain.stats()
    assert ours.drafts <= ours.drafted and 30 < ours.drafts_right < ours.drafted and theirs.drafts == 0
    assert ours.steps < theirs.steps and ours.generation_tokens == theirs.generation_tokens
    # Each ends at a token from its midst, guessed or not: nothing behind it is told or kept.
    stops = {name: answer.tokens[len(answer.tokens) // 2] for (name, index), answer in expected.items() if not index}
    cut = [replace(one, params=replace(one.params, stop_token_ids=(stops[one.request_id],))) for one in asked[:-1]]
    expected = answers(plain, cut)
    same(answers(engine, cut), expected)
    assert sum(answer.ends == ("stop", answer.tokens[-1]) for answer in expected.values()) > 5


def test_native_kernels_guess_too(load: Callable[..., Engine]) -> None:
    """A step with guesses is not one of single tokens, and sums may be rounded otherwise: a rare near-tie may turn over."""
    engine, plain = (load(reference_ops=False, dtype="auto", speculative_config=given) for given in (NGRAM, None))
    greedy = [one for one in requests(2) if one.params.temperature == 0 and not one.params.use_beam_search]
    ours, theirs = answers(engine, greedy), answers(plain, greedy)
    assert sum(ours[key].tokens == theirs[key].tokens for key in theirs) >= len(theirs) - 1
    assert engine.stats().drafts_right > 20
