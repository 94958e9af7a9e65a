"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import Served
from tests.server.test_completions import events

HELLO = [{"role": "user", "content": "hello"}]
RENDERED = "<s>user: hello\nassistant:"


def prompt_of(served: Served) -> str:
    assert served.state.tokenizer is not None
    return served.state.tokenizer.decode(served.client.submitted[-1].prompt_token_ids, skip_special_tokens=False)


def test_answer(served: Served) -> None:
    answer = served.post("/v1/chat/completions", model="tiny", messages=HELLO, max_tokens=5).json()
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "user", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert prompt_of(served) == RENDERED
    assert served.client.submitted[-1].prompt_token_ids.count(1) == 1  # the template wrote "<s>"; it is not added again


def test_goes_on_to_the_context_unless_limited(served: Served) -> None:
    served.post("/v1/chat/completions", messages=HELLO, stop="er", n=1)
    assert served.client.submitted[-1].params.max_tokens is None
    served.post("/v1/chat/completions", messages=HELLO, max_tokens=9, max_completion_tokens=2)
    assert served.client.submitted[-1].params.max_tokens == 2


def test_parts_and_developer(served: Served) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}]
    assert served.post("/v1/chat/completions", messages=messages, max_tokens=1).status_code == 200
    assert prompt_of(served) == "<s>system: be kind\nuser: one\ntwo\nassistant:"


def test_continue_final_message(served: Served) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "I thi"}]
    body = {"messages": messages, "max_tokens": 1, "continue_final_message": True}
    assert served.post("/v1/chat/completions", **body, add_generation_prompt=False).status_code == 200
    assert prompt_of(served) == "<s>user: hello\nassistant: I thi"
    refused = served.post("/v1/chat/completions", **body)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "continue_final_message"


def test_logprobs(served: Served) -> None:
    answer = served.post("/v1/chat/completions", messages=HELLO, max_tokens=2, logprobs=True, top_logprobs=2).json()
    _, u = answer["choices"][0]["logprobs"]["content"]
    assert u == {
        "token": "u",
        "logprob": -0.5,
        "bytes": [117],
        "top_logprobs": [
            {"token": "u", "logprob": -0.5, "bytes": [117]},
            {"token": "v", "logprob": -1.5, "bytes": [118]},
        ],
    }
    alone = served.post("/v1/chat/completions", messages=HELLO, max_tokens=2, logprobs=True).json()
    assert [e["top_logprobs"] for e in alone["choices"][0]["logprobs"]["content"]] == [[], []]


@pytest.mark.parametrize("n", [1, 3])
def test_stream_equals_whole(served: Served, n: int) -> None:
    body: dict[str, Any] = {"messages": HELLO, "max_tokens": 9, "n": n, "logprobs": True, "top_logprobs": 1, "temperature": 0.5}
    whole = served.post("/v1/chat/completions", **body).json()
    response = served.post("/v1/chat/completions", **body, stream=True, stream_options={"include_usage": True})
    chunks = events(response.text)
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"} and len({c["id"] for c in chunks}) == 1
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    for index, expected in enumerate(whole["choices"]):
        mine = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in mine) == expected["message"]["content"]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == ["length"] and mine[-1]["finish_reason"] == "length"
        assert [e for c in mine if c["logprobs"] for e in c["logprobs"]["content"]] == expected["logprobs"]["content"]


def test_template_arguments_reach_the_template(served: Served) -> None:
    refused = served.post("/v1/chat/completions", messages=HELLO, chat_template_kwargs={"tools": []})
    assert refused.status_code == 400 and "chat_template_kwargs" in refused.json()["error"]["message"]
    assert served.post("/v1/chat/completions", messages=HELLO, max_tokens=1, chat_template_kwargs={"x": 1}).status_code == 200
