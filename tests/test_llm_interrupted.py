"""An LLM after ctrl-C, with answers that fail, in several threads, and in a fork."""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import appliance
from appliance import LLM, SamplingParams, StructuredOutputsParams
from appliance.core.messages import Event, Submit
from tests.tiny_model import make_checkpoint

ROOT = str(Path(appliance.__file__).parent)
PROMPTS = [[5, 6, 7]] * 3 + [[9] * 40]
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, stop=["qqq"])


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    model = make_checkpoint(tmp_path_factory.mktemp("tiny"))
    return LLM(str(model), threads=1, kv_cache_memory_bytes=4 << 20, max_model_len=64, swap_space=0.001)


def answers(llm: LLM) -> list[list[int]]:
    return [one.outputs[0].token_ids for one in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def whole(llm: LLM, expected: list[list[int]]) -> None:
    """Nothing is left of what was interrupted, and the next call is answered as ever."""
    llm._engine.check()
    assert not llm._engine.has_work and llm._engine.stats().blocks_used == 0
    assert answers(llm) == expected


def test_interrupted_as_a_prompt_is_submitted(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, submit = answers(llm), llm._engine.submit

    def interrupted(one: Submit) -> None:
        submit(one)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(llm._engine, "submit", interrupted)
        answers(llm)
    whole(llm, expected)


def interrupt(line: int) -> Callable[[FrameType, str, Any], Any]:
    """A tracer that raises KeyboardInterrupt after so many lines of the package."""
    left = [line]

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(ROOT):
            return None
        left[0] -= event == "line"
        if left[0] == 0 and event == "line":
            raise KeyboardInterrupt
        return trace

    return trace


@pytest.mark.parametrize("seed", range(40))
def test_interrupted_anywhere(llm: LLM, seed: int) -> None:
    expected, before = answers(llm), sys.gettrace()
    sys.settrace(interrupt(random.Random(seed).randrange(1, 2000)))
    try:
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    whole(llm, expected)


def test_interrupted_as_it_clears_up(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answers(llm)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(llm._engine, "step", interrupted)
        patch.setattr(llm._engine, "clear", interrupted)
        answers(llm)
    assert llm._engine.has_work
    assert answers(llm) == expected
    whole(llm, expected)


def test_one_that_fails_is_one(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    """A grammar that the model's tokens cannot follow, found out on the way."""
    alone = llm.generate("a", GREEDY, use_tqdm=False)[0].outputs[0]
    impossible = SamplingParams(max_tokens=6, structured_outputs=StructuredOutputsParams(choice=["\u4e2d"]))
    bad, good = llm.generate(["a", "a"], [impossible, GREEDY], use_tqdm=False)
    assert (good.outputs[0].token_ids, good.outputs[0].error) == (alone.token_ids, None)
    assert bad.finished and bad.outputs[0].finish_reason == "error"
    assert bad.outputs[0].error == "its grammar: no token of this model can go on with the text as it must"
    assert "1 answers of 2 prompts ended by an error; the first: its grammar" in caplog.text


def test_threads_take_turns(llm: LLM) -> None:
    expected, found = answers(llm), []
    threads = [threading.Thread(target=lambda: found.append(answers(llm))) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    assert found == [expected] * 4


def test_a_fork_is_refused(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    here = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: here + 1)
    for call in (lambda: answers(llm), llm.reset_prefix_cache, lambda: LLM("anything")):
        with pytest.raises(RuntimeError, match=rf"is a fork of process {here}, .*\. Start processes by 'spawn'"):
            call()


def test_the_best_are_those_without_an_error(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that failed before its first token has the largest sum of log-probabilities, 0."""
    step = llm._engine.step

    def failing() -> list[Event]:
        dead, events = llm._engine.abort("best", 0, "error"), step()
        return [*dead, *(one for one in events if one.index)]

    job = llm._job([5, 6], SamplingParams(n=2, best_of=3, seed=1, max_tokens=3, ignore_eos=True))
    job.submit = replace(job.submit, request_id="best")
    monkeypatch.setattr(llm._engine, "step", failing)
    llm._answer([job], False)
    assert [(one.finish_reason, one.error) for one in job.output().outputs] == [("length", None)] * 2
    assert list(job.errors) == job.streams[:1]
