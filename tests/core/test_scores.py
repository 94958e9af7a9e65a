"""The log-probabilities of long prompts: as sent as they were found, and quickly."""

from __future__ import annotations

import pickle
import random
import time

import pytest

from appliance.core.messages import Event, TokenLogprob
from appliance.core.scores import PromptLogprobs


def scored(count: int, top: int) -> list[TokenLogprob | None]:
    rng = random.Random(count)

    def one() -> TokenLogprob:
        width = rng.choice([0, top, top])
        best = tuple((rng.randrange(150_000), -rng.random()) for _ in range(width))
        return TokenLogprob(rng.randrange(150_000), rng.choice([-rng.random(), float("-inf")]), rng.randrange(1, 150_000), best)

    return [None, *(one() for _ in range(count - 1))]


@pytest.mark.parametrize(("count", "top"), [(1, 3), (2, 0), (50, 5)])
def test_what_is_read_is_what_was_added(count: int, top: int) -> None:
    expected = scored(count, top)
    found = PromptLogprobs.of(expected[:1])
    found.extend(expected[1:])
    for one in (found, pickle.loads(pickle.dumps(found))):
        assert len(one) == count and list(one) == expected and [one[i] for i in range(count)] == expected
        assert one[-1] == expected[-1] and list(one[1:7:2]) == expected[1:7:2] and one == PromptLogprobs.of(expected)
        with pytest.raises(IndexError):
            one[count]
    if count > 2:
        assert found != PromptLogprobs.of(expected[:-1]) and expected[5] in found


def test_a_long_prompt_crosses_a_pipe_in_a_moment() -> None:
    """Processor time, in which neither an engine's next step nor a server's event loop can begin."""
    event = Event("r", 0, (1,), prompt_logprobs=PromptLogprobs.of(scored(30_000, 20)), finish_reason="length")
    times = []
    for _ in range(3):
        begun = time.thread_time()
        sent = pickle.dumps(event)
        between = time.thread_time()
        assert pickle.loads(sent) == event
        times.append(max(between - begun, time.thread_time() - between))
    assert min(times) < 0.05
