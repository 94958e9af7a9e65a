"""POST /v1/completions: shapes, echo, logprobs, streams."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from tests.server.conftest import Served
from tests.server.fake import END


def events(text: str) -> list[Any]:
    """The data of a stream, checked for its form."""
    parts = text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") for part in parts)
    assert parts.pop() == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def test_one_prompt(served: Served) -> None:
    answer = served.post("/v1/completions", model="tiny", prompt="hello", max_tokens=7).json()
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-") and answer["model"] == "tiny"
    (choice,) = answer["choices"]
    assert choice["text"] == "hello"  # the client repeats "<s>hello<s>", and "<s>" has no text
    assert choice["finish_reason"] == "length" and choice["stop_reason"] is None and choice["logprobs"] is None
    usage = {"prompt_tokens": 6, "completion_tokens": 7, "total_tokens": 13, "prompt_tokens_details": {"cached_tokens": 0}}
    assert answer["usage"] == usage


def test_defaults_to_sixteen_tokens_or_what_fits(served: Served) -> None:
    assert served.post("/v1/completions", prompt="ab").json()["usage"]["completion_tokens"] == 16
    answer = served.post("/v1/completions", prompt=[5] * 505).json()
    assert answer["usage"]["completion_tokens"] == 7
    both = served.post("/v1/completions", prompt=[[5] * 505, [5, 6]]).json()
    assert both["usage"]["completion_tokens"] == 7 + 16  # each as if it were alone


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("abc", ["abc"]),
        (["abc", "xyz"], ["abc", "xyz"]),
        ([68, 69], ["ab"]),
        ([[68, 69], [90, 91]], ["ab", "wx"]),
        (["ab", [90, 91]], ["ab", "wx"]),
    ],
)
def test_forms_of_prompt(served: Served, prompt: Any, texts: list[str]) -> None:
    answer = served.post("/v1/completions", prompt=prompt, max_tokens=0, echo=True).json()
    assert [c["text"] for c in answer["choices"]] == texts
    assert [c["index"] for c in answer["choices"]] == list(range(len(texts)))
    assert answer["usage"]["completion_tokens"] == 0
    assert {c["finish_reason"] for c in answer["choices"]} == {"length"}


def test_n_times_prompts_in_order(served: Served) -> None:
    answer = served.post("/v1/completions", prompt=[[10, 11, 12], [20, 21, 22]], n=2, max_tokens=2, return_token_ids=True).json()
    assert [c["token_ids"] for c in answer["choices"]] == [[10, 11], [11, 12], [20, 21], [21, 22]]
    assert answer["usage"]["prompt_tokens"] == 6 and answer["usage"]["completion_tokens"] == 8


def test_best_of(served: Served) -> None:
    """The fake's later completions are the likelier ones; all that are generated count."""
    served.client.decay = 0.1
    try:
        answer = served.post("/v1/completions", prompt=[[10, 11, 12, 13], [20, 21, 22, 23]], n=2, best_of=4, max_tokens=2,
                             return_token_ids=True).json()  # fmt: skip
    finally:
        served.client.decay = 0.0
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    assert [c["token_ids"] for c in answer["choices"]] == [[13, 10], [12, 13], [23, 20], [22, 23]]
    assert all(c["logprobs"] is None for c in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 2 * 4 * 2 and answer["usage"]["prompt_tokens"] == 8
    as_many = served.post("/v1/completions", prompt=[10, 11], n=2, best_of=2, max_tokens=1, stream=True)
    assert as_many.status_code == 200


def test_what_reaches_the_engine(served: Served) -> None:
    served.post("/v1/completions", prompt="a", max_tokens=1, cache_salt="mine", use_beam_search=True, n=2, length_penalty=0.5)
    submit = served.client.submitted[-1]
    assert (submit.cache_salt, submit.priority) == ("mine", 0)
    assert (submit.params.use_beam_search, submit.params.n, submit.params.length_penalty) == (True, 2, 0.5)
    info = served.client.info
    served.client.info = replace(info, priorities=True)
    try:
        messages = [{"role": "user", "content": "a"}]
        assert served.post("/v1/chat/completions", messages=messages, max_tokens=1, priority=-3).status_code == 200
        assert (served.client.submitted[-1].priority, served.client.submitted[-1].cache_salt) == (-3, "")
    finally:
        served.client.info = info


def test_cached_tokens_are_those_of_each_prompts_first_completion(served: Served) -> None:
    served.client.cached = 3
    try:
        usage = served.post("/v1/completions", prompt=["abcdef", "ghijkl"], n=2, max_tokens=2).json()["usage"]
        chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "stream": True}
        chunks = events(served.post("/v1/chat/completions", **chat, stream_options={"include_usage": True}).text)
    finally:
        served.client.cached = 0
    assert usage["prompt_tokens_details"] == {"cached_tokens": 6}
    assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


def test_echo_with_logprobs(served: Served) -> None:
    answer = served.post("/v1/completions", prompt=[68, 69, 70], max_tokens=1, echo=True, logprobs=2).json()
    (choice,) = answer["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"] == "abca"
    assert logprobs["tokens"] == ["a", "b", "c", "a"] and logprobs["text_offset"] == [0, 1, 2, 3]
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5, -0.5]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][1] == {"b": -0.5, "c": -1.5}
    alone = served.post("/v1/completions", prompt=[68, 69, 70], max_tokens=0, echo=True, logprobs=0).json()
    assert alone["choices"][0]["logprobs"]["tokens"] == ["a", "b", "c"]
    assert alone["choices"][0]["logprobs"]["top_logprobs"] == [None, {"b": -0.5}, {"c": -0.5}]


def test_tokens_as_ids_and_prompt_logprobs(served: Served) -> None:
    body = {"prompt": [68, 69], "max_tokens": 1, "logprobs": 1, "return_tokens_as_token_ids": True, "prompt_logprobs": 1}
    (choice,) = served.post("/v1/completions", **body).json()["choices"]
    assert choice["logprobs"]["tokens"] == ["token_id:68"]
    assert choice["prompt_logprobs"] == [None, {"69": {"logprob": -0.5, "rank": 1, "decoded_token": "b"}}]


def test_stop_string_ends_one_choice_and_aborts_it(served: Served) -> None:
    answer = served.post("/v1/completions", prompt="abcdef", max_tokens=50, stop="de", add_special_tokens=False).json()
    (choice,) = answer["choices"]
    assert choice["text"] == "abc" and choice["finish_reason"] == "stop" and choice["stop_reason"] == "de"
    assert (served.client.submitted[-1].request_id, 0) in served.client.aborted
    kept = served.post(
        "/v1/completions", prompt="abcdef", max_tokens=50, stop=["de"], include_stop_str_in_output=True, add_special_tokens=False
    ).json()
    assert kept["choices"][0]["text"] == "abcde"


def test_end_of_text(served: Served) -> None:
    answer = served.post("/v1/completions", prompt=[68, 69, END], max_tokens=50).json()
    assert answer["choices"][0]["text"] == "ab" and answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("n", [1, 3])
def test_stream_equals_whole(served: Served, n: int) -> None:
    body = {"prompt": ["hello", "world"], "n": n, "max_tokens": 9, "logprobs": 1, "echo": True, "temperature": 0.7}
    whole = served.post("/v1/completions", **body).json()
    response = served.post("/v1/completions", **body, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response.text)
    assert len({c["id"] for c in chunks}) == 1 and {c["object"] for c in chunks} == {"text_completion"}
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert all(c["usage"] is None for c in chunks[:-1])
    for index, expected in enumerate(whole["choices"]):
        mine = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == index]
        assert "".join(c["text"] for c in mine) == expected["text"]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [expected["finish_reason"]]
        assert mine[-1]["finish_reason"] is not None
        for name in ("tokens", "text_offset", "token_logprobs", "top_logprobs"):
            assert [e for c in mine if c["logprobs"] for e in c["logprobs"][name]] == expected["logprobs"][name]


def test_continuous_usage(served: Served) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(served.post("/v1/completions", prompt=[68, 69], max_tokens=3, stream=True, stream_options=options).text)
    assert [c["usage"]["completion_tokens"] for c in chunks] == [1, 2, 3, 3]


def test_truncation_only_when_asked(served: Served) -> None:
    body = {"prompt": [68, 69, 70, 71], "max_tokens": 1, "return_token_ids": True}
    left = served.post("/v1/completions", **body, truncate_prompt_tokens=2).json()
    assert left["choices"][0]["prompt_token_ids"] == [70, 71]
    right = served.post("/v1/completions", **body, truncate_prompt_tokens=2, truncation_side="right").json()
    assert right["choices"][0]["prompt_token_ids"] == [68, 69]
    long = served.post(
        "/v1/completions", prompt=[68] * 600, max_tokens=3, truncate_prompt_tokens=-1, return_token_ids=True
    ).json()
    assert len(long["choices"][0]["prompt_token_ids"]) == 509


def test_request_ids(served: Served) -> None:
    with served.http as http:
        response = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers={"X-Request-Id": "mine-1"})
        assert response.headers["x-request-id"] == "mine-1" and response.json()["id"] == "cmpl-mine-1"
        response = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, "request_id": "body-1"})
        assert response.headers["x-request-id"] == "body-1" and response.json()["id"] == "cmpl-body-1"
        bad = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers={"X-Request-Id": "x" * 500})
        assert len(bad.headers["x-request-id"]) == 32
