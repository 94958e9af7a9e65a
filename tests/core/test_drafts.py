"""Guesses of what comes next: which they are, when they are made, and what becomes of the books when they are wrong."""

from __future__ import annotations

import random
from array import array
from typing import Any

import pytest

from appliance.core.drafts import ROWS, Drafts, Said
from quant.errors import InputError
from tests.core.fake_model import alone, make_request, make_scheduler


def drafts(tokens: int = 5, shortest: int = 2, longest: int = 3, **more: Any) -> Drafts:
    return Drafts(tokens, shortest, longest, **more)


def guess(text: list[int], most: int = 9, **options: Any) -> tuple[int, ...]:
    return drafts(**options).guess(make_request("a", text, 50), most)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 1, 2], (3, 4, 5, 6, 7)),
        ([1, 2, 3, 9, 8, 2, 3, 7, 6, 5, 4, 0, 1, 2, 3], (9, 8, 2, 3, 7)),  # the longest, though what is shorter was said later
        ([1, 2, 3, 1, 2, 4, 1, 2], (4, 1, 2, 4, 1)),  # of equally long ones the last
        ([1, 2, 1, 2], (1, 2, 1, 2, 1)),  # what repeats itself goes on
        ([6, 6, 6], (6, 6, 6, 6, 6)),
        ([1, 2, 3, 4], ()),
        ([1], ()),
        ([256, 1, 0, 0, 9, 0, 0, 65536, 0, 0], (65536, 0, 0, 65536, 0)),
        ([0x01000000, 0x02000000, 5, 1, 2], ()),  # the same bytes, but across tokens
    ],
)
def test_what_follows(text: list[int], expected: tuple[int, ...]) -> None:
    assert guess(text) == expected


def test_it_is_what_a_plain_search_finds() -> None:
    rng = random.Random(4)
    for _ in range(300):
        text = [rng.choice((0, 1, 256, 1 << 24)) for _ in range(rng.randrange(1, 40))]
        shortest = rng.randrange(1, 4)
        longest, most = shortest + rng.randrange(3), rng.randrange(1, 8)
        expected: list[int] = []
        for count in range(min(longest, len(text) - 1), shortest - 1, -1):
            places = [i for i in range(len(text) - count) if text[i : i + count] == text[-count:]]
            if places:
                expected = text[places[-1] + count :]
                break
        found = guess(text, most, tokens=7, shortest=shortest, longest=longest)
        assert list(found) == (expected * most)[: min(most, 7)], text


def test_a_request_is_read_on_from_where_it_was() -> None:
    request, ours = make_request("a", [1, 2, 3, 1, 2], 50), drafts()
    assert ours.guess(request, 1) == (3,)
    request.tokens += [3, 1, 2, 7, 3, 1]
    assert ours.guess(request, 2) == (2, 7) and request.said.text == array("i", request.tokens).tobytes()


def test_hope_follows_what_came_true() -> None:
    """All right: twice as many; else as many as were right, and one at least."""
    ours, hopes, prompt = drafts(8, 1, 1), [], [3] * 4
    scheduler, runner = make_scheduler(drafts=ours)
    request = make_request("a", prompt, 40)
    request.said = Said(2)
    answer = alone(prompt, 40)
    right = iter([2, 4, 3, 0, 1, 2, 4])

    def told(request: Any, most: int) -> tuple[int, ...]:
        known, good = len(request.tokens), next(right)
        hopes.append(request.said.hope)
        return tuple(t if i < good else t ^ 1 for i, t in enumerate(answer[known : known + min(most, request.said.hope)]))

    ours.guess = told  # type: ignore[method-assign]
    scheduler.add(request)
    runner.step()
    for _ in range(7):
        plan, _ = runner.step()
        assert plan.chunks[0].length == 1 + hopes[-1]
        scheduler.check()
    assert hopes == [2, 4, 8, 3, 1, 2, 4] and request.tokens == answer[: len(request.tokens)]
    assert (ours.made, ours.guessed, ours.right) == (7, 24, 2 + 4 + 3 + 0 + 1 + 2 + 4)


def test_rows_are_shared_out_and_never_more_than_pay() -> None:
    for running, lengths in ((1, [6]), (2, [6, 6]), (4, [4] * 4), (8, [2] * 8), (12, [2] * 4 + [1] * 8), (17, [1] * 17)):
        scheduler, runner = make_scheduler(seqs=20, blocks=200, budget=200, drafts=drafts())
        for i in range(running):
            scheduler.add(make_request(f"r{i}", [i, 7, 7, 7, 7, 7], 30, seed=i))
        runner.step()
        for request in scheduler.running:
            request.tokens[-1] = 7
        plan = scheduler.schedule()
        assert sorted((c.length for c in plan.chunks), reverse=True) == lengths and plan.num_tokens <= max(ROWS, running)


def test_no_guesses_beside_a_prompt_that_fills_the_step_or_beyond_a_number_of_sequences() -> None:
    for more, length in (({"budget": 9}, 1), ({"budget": 200}, 1), ({"prompt": 2}, 6), ({"prompt": 2, "sequences": 1}, 1)):
        scheduler, runner = make_scheduler(budget=more.get("budget", 64), drafts=drafts(sequences=more.get("sequences")))
        first = make_request("a", [7] * 6, 30)
        scheduler.add(first)
        runner.step()
        first.tokens[-1] = 7
        scheduler.add(make_request("b", range(more.get("prompt", 40)), 3))
        assert {c.request.request_id: c.length for c in scheduler.schedule().chunks}["a"] == length, more


def test_guesses_take_no_block_that_is_kept_free() -> None:
    """Of 10 blocks of 4 admission leaves 3 free. Six tokens, the next one among them, lie in two blocks: two guesses do, too."""
    for others, length in ((4, 6), (5, 3)):
        scheduler, runner = make_scheduler(blocks=10, watermark=0.3, drafts=drafts())
        first = make_request("a", [7] * 5, 20)
        scheduler.add(first)
        runner.step()
        first.tokens[-1] = 7
        assert scheduler.pool.allocate(others) is not None
        assert [c.length for c in scheduler.schedule().chunks] == [length]


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ("ngram", "JSON is needed"),
        ("[1]", "only drafts from the text itself"),
        ('{"method": "eagle", "num_speculative_tokens": 2}', "only drafts from the text itself"),
        ('{"model": "small/model", "num_speculative_tokens": 2}', "only drafts from the text itself"),
        ('{"num_speculative_tokens": 0}', "num_speculative_tokens is 0: a whole number from 1 to 15"),
        ('{"num_speculative_tokens": 16}', "num_speculative_tokens is 16"),
        ('{"num_speculative_tokens": true}', "num_speculative_tokens is True"),
        ('{"num_speculative_tokens": 2, "draft_tensor_parallel_size": 2}', "'draft_tensor_parallel_size' is not supported"),
        ('{"prompt_lookup_min": 4, "prompt_lookup_max": 3}', "prompt_lookup_min is 4, more than prompt_lookup_max, which is 3"),
    ],
)
def test_what_is_refused(given: str, what: str) -> None:
    with pytest.raises(InputError, match=f"--speculative-config.*{what}"):
        Drafts.of(given, "cpu")


def test_options_are_vllms() -> None:
    def found(given: str) -> tuple[Any, ...]:
        ours = Drafts.of(given, "cpu")
        assert ours is not None
        return ours.tokens, ours.shortest, ours.longest, ours.sequences

    assert found('{"method": "ngram", "num_speculative_tokens": 3}') == (3, 5, 5, None)
    assert found('{"model": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}') == (3, 4, 4, None)
    assert found('{"prompt_lookup_min": 2, "prompt_lookup_max": 4, "disable_by_batch_size": 8}') == (5, 2, 4, 8)
    assert Drafts.of(None, "cuda") is None
    with pytest.raises(InputError, match="works on a CPU only"):
        Drafts.of('{"method": "ngram"}', "cuda")
