"""When an answer counts as saying the same again and again, against the plain definition."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.core.params import RepetitionDetectionParams, RequestError, SamplingParams
from appliance.core.repetition import Repetition
from appliance.core.request import Request


def repeats(answer: list[int], params: RepetitionDetectionParams) -> bool:
    """Whether its last tokens are one pattern, as often as asked."""
    for size in range(max(1, params.min_pattern_size), params.max_pattern_size + 1):
        tail = answer[-size * params.min_count :]
        if len(tail) == size * params.min_count and tail == tail[:size] * params.min_count:
            return True
    return False


def request(prompt: list[int], **params: object) -> Request:
    sampling = SamplingParams(max_tokens=100, **params)  # type: ignore[arg-type]
    found = Request("r", 0, list(prompt), len(prompt), sampling, len(prompt) + 100, 0, 0.0)
    found.repetition = Repetition(sampling.repetition_detection) if sampling.repetition_detection else None
    return found


@settings(max_examples=300)
@given(
    prompt=st.lists(st.integers(0, 2), max_size=12),
    answer=st.lists(st.integers(0, 2), min_size=1, max_size=60),
    sizes=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    count=st.integers(2, 5),
    min_tokens=st.integers(0, 30),
)
def test_an_answer_ends_with_the_token_that_completes_a_pattern(
    prompt: list[int], answer: list[int], sizes: tuple[int, int], count: int, min_tokens: int
) -> None:
    params = RepetitionDetectionParams(max(1, *sizes), min(sizes), count)
    one = request(prompt, repetition_detection=params, min_tokens=min_tokens)
    for length, token in enumerate(answer, 1):
        one.append(token)
        expected = length >= min_tokens and repeats(answer[:length], params)
        assert one.finished == expected
        if expected:
            assert (one.finish_reason, one.stop_reason) == ("repetition", "repetition_detected")
            return


def test_nothing_to_look_for() -> None:
    for nothing in (None, {}, {"max_pattern_size": 0, "min_count": 7}, RepetitionDetectionParams()):
        assert SamplingParams(repetition_detection=nothing).repetition_detection is None  # type: ignore[arg-type]
    given_ = {"max_pattern_size": 4, "min_count": 3}
    assert SamplingParams(repetition_detection=given_).repetition_detection == RepetitionDetectionParams(4, 0, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"max_pattern_size": 4}, "min_count must be an integer at least 2"),
        ({"max_pattern_size": 4, "min_count": 1}, "min_count must be an integer at least 2"),
        ({"max_pattern_size": 1025, "min_count": 2}, "at most 1024"),
        (
            {"max_pattern_size": 4, "min_pattern_size": 5, "min_count": 2},
            "min_pattern_size must be an integer at least 0 and at most 4",
        ),
        ({"max_pattern_size": "4", "min_count": 2}, "max_pattern_size must be an integer"),
        ({"size": 4}, "has 'size'"),
        (7, "must be RepetitionDetectionParams, got 7"),
    ],
)
def test_what_cannot_be(wrong: object, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        SamplingParams(repetition_detection=wrong)  # type: ignore[arg-type]
    assert str(caught.value.param).startswith("repetition_detection")
