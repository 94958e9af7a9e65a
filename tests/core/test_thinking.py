"""How long a model may think: what is forced when, over random tokens of a model that obeys."""

from __future__ import annotations

import random

import pytest

from appliance.core.thinking import SOON, Thinking, ThinkingMarks

START, END, TALK = 7, 8, (1, 2, 3)


def write(thinking: Thinking, tokens: list[int], said: list[int]) -> list[int]:
    """What is written where a model would say this: forced tokens take the place of what it would have said."""
    for token in said:
        forced = thinking.forced(tokens)
        assert forced == thinking.forced(tokens), "asking changes nothing"
        tokens.append(token if forced is None else forced)
    return tokens


@pytest.mark.parametrize("thought", [0, 3])
@pytest.mark.parametrize("budget", [0, 1, 5])
def test_open_thoughts_end_at_the_budget(budget: int, thought: int) -> None:
    prompt = [4, START, *TALK[:thought]]
    marks = ThinkingMarks((START,), END, (END,), thought)
    answer = write(Thinking(budget, marks, len(prompt)), list(prompt), [1] * 20)[len(prompt) :]
    left = max(0, budget - thought)
    assert answer == [1] * left + [END] + [1] * (19 - left)


def test_thoughts_that_end_by_themselves_are_left_alone() -> None:
    marks = ThinkingMarks((START,), END, (END,), 0)
    for length in range(5):
        said = [1] * length + [END] + [2] * 20
        thinking = Thinking(5, marks, 2)
        assert write(thinking, [4, START], said) == [4, START, *said]
        assert thinking.over and thinking.forced([4, START, *said]) is None


@pytest.mark.parametrize("start", [(START,), (START, 6, 5)])
def test_thoughts_that_begin_in_the_answer(start: tuple[int, ...]) -> None:
    said = [9, *start, *[1] * 10, END, 2]
    thinking = Thinking(4, ThinkingMarks(start, END, (END,)), 1)
    assert write(thinking, [4], said)[1:] == [9, *start, 1, 1, 1, 1, END, *said[6 + len(start) :]]


def test_who_does_not_think_soon_is_not_watched() -> None:
    thinking = Thinking(0, ThinkingMarks((START,), END, (END,)), 1)
    said = [1] * (SOON + 1) + [START, 1, 1]
    assert write(thinking, [4], said) == [4, *said] and thinking.over


def test_an_end_of_several_tokens_and_thoughts_that_begin_anew() -> None:
    """As of gpt-oss, whose messages are thoughts or not: the budget is that of all of them together."""
    marks = ThinkingMarks((START,), END, (END, 5, 6), again=True)
    said = [START, 1, END, 3, START, 1, 1, 1, 1, 1, 1, 1, START, 1, 1, 1]
    expected = [START, 1, END, 3, START, 1, 1, END, 5, 6, 1, 1, START, END, 5, 6]
    thinking = Thinking(3, marks, 1)
    assert write(thinking, [4], said)[1:] == expected and not thinking.over


def test_who_may_not_obey_is_left_alone() -> None:
    """Where a grammar rules the end out."""
    thinking = Thinking(1, ThinkingMarks((START,), END, (END,), 0), 2)
    assert thinking.forced([4, START, 1]) == END
    assert thinking.forced([4, START, 1, 2]) is None and thinking.over


def test_random_texts_never_think_longer() -> None:
    rng = random.Random(5)
    for _ in range(300):
        budget, thought = rng.randrange(8), rng.choice([None, 0, 2])
        prompt = [4] if thought is None else [START, *TALK[:thought]]
        said = rng.choices([*TALK, START, END], [4, 4, 4, 1, 1], k=rng.randrange(30))
        marks = ThinkingMarks((START,), END, (END,), thought)
        written = write(Thinking(budget, marks, len(prompt)), list(prompt), said)
        within, count, done = thought is not None, thought or 0, False
        for place, token in enumerate(written[len(prompt) :]):
            if within and token == END:
                within, done = False, True
            elif within:
                count += 1
                assert count <= max(budget, thought or 0)
            elif token == START and not done and place <= SOON:
                within = True
