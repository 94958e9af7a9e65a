"""vLLM's further sampling fields through the engine: budgets of thoughts, log-probabilities of chosen tokens, repetitions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance import LLM, RepetitionDetectionParams, SamplingParams, StructuredOutputsParams
from appliance.core.params import RequestError
from appliance.core.thinking import ThinkingMarks
from appliance.runtime.engine import Engine
from tests.runtime.conftest import answers, submit
from tests.tiny_model import make_checkpoint, write_thoughts

THINKS = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<think>{% else %}</think>{% endif %}"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    directory = write_thoughts(make_checkpoint(tmp_path_factory.mktemp("thinks")), THINKS)
    options: dict[str, Any] = {"dtype": "float32", "reference_ops": True, "threads": 1, "kv_cache_memory_bytes": 4 << 20}
    yield LLM(str(directory), max_model_len=256, **options)


def tokens_of(llm: LLM, content: str, **params: Any) -> list[int]:
    own = {99: -100.0, 100: -100.0}  # the random model would write them now and then
    sampling = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.8, seed=3, logit_bias=own, **params)
    return llm.chat([{"role": "user", "content": content}], sampling, use_tqdm=False)[0].outputs[0].token_ids


def test_thoughts_end_at_their_budget_and_all_else_stays(llm: LLM) -> None:
    free = tokens_of(llm, "Hi")
    for budget in (0, 1, 7, 19):
        found = tokens_of(llm, "Hi", thinking_token_budget=budget)
        assert found[:budget] == free[:budget] and found[budget] == 100 and found.count(100) == 1
    for much in (20, 1000, -1):
        assert tokens_of(llm, "Hi", thinking_token_budget=much) == free


def test_it_is_the_last_word_but_for_a_grammar(llm: LLM) -> None:
    """Penalties and masks of the request's own do not keep thoughts open; a grammar of the whole answer has no thoughts."""
    found = tokens_of(llm, "Hi", thinking_token_budget=2, allowed_token_ids=[5, 6], min_tokens=9)
    assert found[2] == 100 and {*found} <= {5, 6, 100}
    form = StructuredOutputsParams(regex="[ab]{8}")
    sampling = SamplingParams(max_tokens=20, thinking_token_budget=0, structured_outputs=form)
    (one,) = llm.generate("<think>", sampling, use_tqdm=False)[0].outputs
    assert len(one.text) == 8 and {*one.text} <= {*"ab"} and one.finish_reason == "stop"


def test_a_text_that_goes_on(llm: LLM) -> None:
    """Of a prompt's own thoughts nothing is left to think; of those that are over, or a user's words, nobody speaks."""
    free = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0.0)
    few = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0.0, thinking_token_budget=3)
    prompts = ["<think>ab", "<think>abcd", "<think>ab</think>", "<think>ab</s>cd", "ab"]
    kept, cut = ([one.outputs[0].token_ids for one in llm.generate(prompts, p, use_tqdm=False)] for p in (free, few))
    assert cut[0][:2] == [kept[0][0], 100] and cut[1][0] == 100 and cut[2:] == kept[2:]


def test_thoughts_in_company_and_preempted(load: Callable[..., Engine]) -> None:
    marks = ThinkingMarks((7,), 9, (9, 11, 12), 0, again=True)
    own = {"thinking_token_budget": 9, "thinking_marks": marks, "temperature": 0.9, "max_tokens": 40}
    asked = [submit(f"r{i}", [5 + i] * (7 + 5 * i), seed=i, **own) for i in range(6)]
    alone: dict[Any, list[int]] = {}
    for one in asked:
        alone |= answers(load(), [one])
    assert all(found[9:12] == [9, 11, 12] for found in alone.values())
    tight = load(max_model_len=160, kv_cache_memory_bytes=2 * 2 * 2 * 16 * 4 * 16 * 11, max_num_batched_tokens=16)
    assert answers(tight, asked) == alone and tight.stats().preemptions > 0


def test_log_probabilities_of_chosen_tokens(llm: LLM) -> None:
    """They are those that logprobs=-1 has, in the order asked for, the token itself beside them."""
    all_, some = (
        llm.generate("abc", SamplingParams(max_tokens=4, temperature=0.0, **asked), use_tqdm=False)[0].outputs[0].logprobs
        for asked in ({"logprobs": 20}, {"logprob_token_ids": [9, 4, 250]})
    )
    assert all_ is not None and some is not None
    for every, chosen in zip(all_, some, strict=True):
        first, *rest = chosen
        assert every[first].logprob == chosen[first].logprob and chosen[first].rank == every[first].rank == 1
        assert rest == [token for token in (9, 4, 250) if token != first]
        assert all(chosen[token].logprob == every[token].logprob for token in rest if token in every)
        assert all(chosen[token].logprob <= min(one.logprob for one in every.values()) for token in rest if token not in every)


def test_repetition_ends_an_answer(llm: LLM) -> None:
    for count in (2, 5):
        params = SamplingParams(
            max_tokens=64, temperature=0.0, allowed_token_ids=[5], repetition_detection=RepetitionDetectionParams(3, 1, count)
        )
        (one,) = llm.generate("abc", params, use_tqdm=False)[0].outputs
        assert one.token_ids == [5] * count and (one.finish_reason, one.stop_reason) == ("repetition", "repetition_detected")


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"logprob_token_ids": [1] * 129}, "at most 128"),
        ({"logprob_token_ids": [256]}, "token id 256, but the vocabulary"),
        ({"logprob_token_ids": [4, 5], "logprobs": 3}, "leave one out"),
        ({"logprob_token_ids": ["a"]}, "must be a list of token ids"),
        ({"thinking_token_budget": -2}, "at least 0"),
        ({"thinking_token_budget": 1.5}, "an integer"),
        ({"thinking_token_budget": 3, "use_beam_search": True, "n": 2}, "does not go with use_beam_search"),
        ({"thinking_marks": ThinkingMarks((1,), 2, (2,))}, "made from thinking_token_budget"),
    ],
)
def test_what_cannot_be(llm: LLM, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        llm.generate("abc", SamplingParams(**asked), use_tqdm=False)


def test_a_model_that_shows_no_thoughts(tiny: Path) -> None:
    llm = LLM(str(tiny), dtype="float32", reference_ops=True, threads=1, max_model_len=64, kv_cache_memory_bytes=1 << 20)
    with pytest.raises(RequestError, match="shows no thoughts"):
        llm.generate("abc", SamplingParams(thinking_token_budget=4), use_tqdm=False)
