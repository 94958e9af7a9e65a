"""Bad requests: the status, the shape, the field, the words."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from appliance.config import EngineConfig, ServerConfig
from appliance.server.fields import HARMLESS, REFUSED
from appliance.text.tokenizer import Tokenizer
from tests.server.conftest import Served, serve_in_thread
from tests.server.fake import FakeClient

HELLO = [{"role": "user", "content": "hello"}]


def refused(served: Served, path: str, status: int = 400, **body: Any) -> dict[str, Any]:
    response = served.post(path, **body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert "\n" not in error["message"] and len(error["message"]) < 400
    return error


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", -1, "temperature must be a number at least 0.0, got -1"),
        ("temperature", "hot", "temperature: Input should be a valid number, got 'hot'"),
        ("n", 0, "n must be an integer at least 1"),
        ("n", 1.5, "n: Input should be a valid integer, got 1.5"),
        ("max_tokens", -3, "max_tokens must be an integer at least 1, got -3"),
        ("max_tokens", "many", "max_tokens: Input should be a valid integer, got 'many'"),
        ("max_tokens", True, "max_tokens: Input should be a valid integer, got True"),
        ("top_p", 0, "top_p must be a number above 0.0 and at most 1.0, got 0"),
        ("min_p", 2, "min_p must be"),
        ("top_k", -2, "top_k must be"),
        ("stop", 3, "stop must be text or a list of texts, got 3"),
        ("stop", ["a", 1], "stop must be text or a list of texts"),
        ("stop", [""], "stop holds an empty"),
        ("logit_bias", {"a": 1}, "logit_bias must map token ids to numbers"),
        ("logit_bias", {"5000": 1}, "logit_bias holds token id 5000, but the vocabulary has ids 0 to 98"),
        ("logit_bias", [1], "logit_bias: Input should be an object, got [1]"),
        ("allowed_token_ids", [], "allowed_token_ids is empty"),
        ("prompt_logprobs", 21, "prompt_logprobs is 21, but at most 20 are allowed"),
        ("stream_options", {"include_usage": True}, "stream_options is only allowed together with stream=true"),
        ("best_of", 0, "best_of must be an integer at least 1 and at most 1024, got 0"),
        ("best_of", "two", "best_of: Input should be a valid integer, got 'two'"),
        ("use_beam_search", 1, "use_beam_search: Input should be a valid boolean, got 1"),
        ("length_penalty", "x", "length_penalty: Input should be a valid number, got 'x'"),
        ("length_penalty", 11, "length_penalty must be a number at least -10.0 and at most 10.0, got 11"),
        ("cache_salt", "", "cache_salt is empty"),
        ("cache_salt", 3, "cache_salt: Input should be a valid string, got 3"),
        ("priority", 2, "priority is 2, but requests are served in order of arrival: start the server with --scheduling-policy"),
        ("priority", 1.5, "priority: Input should be a valid integer, got 1.5"),
        ("priority", "high", "priority: Input should be a valid integer, got 'high'"),
        ("truncate_prompt_tokens", 0, "truncate_prompt_tokens is -1"),
        ("truncation_side", "middle", "truncation_side is left or right"),
        ("seed", "x", "seed: Input should be a valid integer"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_bad_values(served: Served, path: str, field: str, value: Any, words: str) -> None:
    body = {"prompt": "a"} if path == "/v1/completions" else {"messages": HELLO}
    error = refused(served, path, **body, **{field: value})
    assert error["message"].startswith(words) and error["param"] == field


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"n": 3, "best_of": 2}, "best_of", "best_of is 2, less than n = 3"),
        ({"best_of": 2, "stream": True}, "best_of", "best_of is 2, more than n = 1: which are best is known in the end"),
        ({"best_of": 2, "temperature": 0}, "best_of", "best_of is 2, but temperature 0 gives one answer"),
        ({"n": 2, "temperature": 0}, "n", "n is 2, but temperature 0 gives one answer"),
        (
            {"use_beam_search": True, "n": 2, "best_of": 3},
            "best_of",
            "best_of is 3, but with use_beam_search n = 2 is the number",
        ),
        ({"use_beam_search": True, "stop": ["x"]}, "stop", "stop does not go with use_beam_search"),
        ({"use_beam_search": True, "presence_penalty": 1}, "presence_penalty", "presence_penalty does not go with use_beam"),
        ({"use_beam_search": True, "logit_bias": {"5": 1}}, "logit_bias", "logit_bias does not go with use_beam_search"),
        ({"use_beam_search": True, "n": 99}, "n", "n is 99: so many beams cannot differ in a vocabulary of 99 tokens"),
        (
            {"use_beam_search": True, "n": 300},
            "n",
            "n must be an integer at least 1 and at most 256 (the number of beams), got 300",
        ),
        ({"use_beam_search": True, "n": 2, "early_stopping": True}, "early_stopping", "early_stopping: not supported"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_what_does_not_go_together(served: Served, path: str, body: dict[str, Any], param: str, words: str) -> None:
    prompt = {"prompt": "a"} if path == "/v1/completions" else {"messages": HELLO}
    error = refused(served, path, **prompt, **body)
    assert error["message"].startswith(words) and error["param"] == param


def test_pictures_are_not_left_out_silently(served: Served) -> None:
    """Ollama's clients send them beside the text."""
    error = refused(served, "/v1/chat/completions", messages=[*HELLO, {"role": "user", "content": "this?", "images": ["aGk="]}])
    assert error["param"] == "messages[1].images" and error["message"].endswith("this model reads text only")
    assert served.post("/v1/chat/completions", messages=[{**HELLO[0], "images": []}], max_tokens=1).status_code == 200


@pytest.mark.parametrize("field", sorted(REFUSED))
def test_fields_that_would_change_the_answer(served: Served, field: str) -> None:
    error = refused(served, "/v1/completions", prompt="a", **{field: {"some": "thing"}})
    assert error["param"] == field and error["message"].startswith(f"{field}: ") and error["code"] == "unsupported_parameter"
    for value in (None, *REFUSED[field][0]):
        assert served.post("/v1/completions", prompt="a", max_tokens=1, **{field: value}).status_code == 200


def test_fields_that_cannot_change_it(served: Served) -> None:
    assert served.post("/v1/completions", prompt="a", max_tokens=1, **dict.fromkeys(HARMLESS, "x")).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tools": [{"type": "function"}], "tool_choice": "auto"}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"content": "hello"}]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages[0].content"),
        ({"messages": ["hello"]}, "messages[0]"),
    ],
)
def test_bad_chat(served: Served, body: dict[str, Any], param: str) -> None:
    assert refused(served, "/v1/chat/completions", **{"messages": HELLO, **body})["param"] == param


def test_tools_that_may_not_be_used_are_fine(served: Served) -> None:
    body = {"messages": HELLO, "max_tokens": 1, "tools": [{"type": "function"}], "tool_choice": "none"}
    assert served.post("/v1/chat/completions", **body).status_code == 200
    assert served.post("/v1/chat/completions", messages=HELLO, max_tokens=1, tools=[], tool_choice="auto").status_code == 200


def test_all_optional_fields_may_be_null(served: Served) -> None:
    from appliance.server.schemas import ChatRequest, CompletionRequest

    nulls = dict.fromkeys(name for name, field in CompletionRequest.model_fields.items() if not field.is_required())
    assert served.post("/v1/completions", prompt="a", **nulls).status_code == 200
    nulls = dict.fromkeys(name for name, field in ChatRequest.model_fields.items() if not field.is_required())
    assert served.post("/v1/chat/completions", messages=HELLO, **{**nulls, "max_tokens": 2}).status_code == 200
    assert refused(served, "/v1/completions", prompt=None)["message"] == "prompt is required"


@pytest.mark.parametrize("prompt", [[], {}, 3, ["a", 1], [1.5], [True], [[]], [["a"]]])
def test_bad_prompts(served: Served, prompt: Any) -> None:
    assert refused(served, "/v1/completions", prompt=prompt)["param"] == "prompt"


def test_token_ids_outside_the_vocabulary(served: Served) -> None:
    assert "token id 99" in refused(served, "/v1/completions", prompt=[99])["message"]
    assert "token id -1" in refused(served, "/v1/completions", prompt=[-1])["message"]


def test_too_long(served: Served) -> None:
    error = refused(served, "/v1/completions", prompt="a" * 600)
    assert error["code"] == "context_length_exceeded" and error["param"] == "prompt"
    assert "512 tokens" in error["message"] and "601" in error["message"]
    error = refused(served, "/v1/completions", prompt="a" * 99, max_tokens=500)
    assert error["code"] == "context_length_exceeded" and error["param"] == "max_tokens"
    assert all(number in error["message"] for number in ("512", "100", "500"))
    assert refused(served, "/v1/chat/completions", messages=[{"role": "user", "content": "a" * 600}])["param"] == "messages"
    assert refused(served, "/v1/responses", input="a" * 600)["param"] == "input"
    assert not any(len(s.prompt_token_ids) > 512 for s in served.client.submitted)


def test_ten_megabytes(served: Served) -> None:
    error = refused(served, "/v1/completions", prompt="so it goes " * 950_000)
    assert error["code"] == "context_length_exceeded" and "512 tokens" in error["message"]
    assert "your prompt contains at least 4097 input tokens" in error["message"]  # it was not tokenized to its end


def test_huge_body(served: Served) -> None:
    with served.http as http:
        response = http.post("/v1/completions", content=b" " * (33 * 1024**2))
    assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize("raw", [b"", b"{", b"hello", b'{"prompt": "a"', b'\xff{"prompt": 1}', b'{"prompt": "\\ud800"}'])
def test_body_that_is_not_json(served: Served, raw: bytes) -> None:
    with served.http as http:
        response = http.post("/v1/completions", content=raw)
    assert response.status_code == 400 and response.json()["error"]["message"].startswith("the body is not JSON")


@pytest.mark.parametrize("raw", [b"[]", b"3", b'"a"', b"null"])
def test_body_that_is_no_object(served: Served, raw: bytes) -> None:
    with served.http as http:
        response = http.post("/v1/completions", content=raw)
    assert response.status_code == 400 and "must be a JSON object" in response.json()["error"]["message"]


def test_content_type_does_not_matter(served: Served) -> None:
    with served.http as http:
        response = http.post(
            "/v1/completions", content=b'{"prompt": "a", "max_tokens": 1}', headers={"content-type": "text/plain"}
        )
    assert response.status_code == 200


def test_unknown_model(served: Served) -> None:
    error = refused(served, "/v1/completions", 404, model="gpt-4", prompt="a")
    assert error["code"] == "model_not_found" and "`gpt-4` does not exist" in error["message"] and "tiny" in error["message"]
    assert served.post("/v1/completions", model="alias/of-tiny", prompt="a", max_tokens=1).json()["model"] == "tiny"


def test_unknown_route_and_wrong_method(served: Served) -> None:
    with served.http as http:
        response = http.get("/v1/nothing")
        assert response.status_code == 404 and response.json()["error"]["code"] == "not_found"
        response = http.get("/v1/completions")
        assert response.status_code == 405 and response.json()["error"]["code"] == "method_not_allowed"
        assert response.headers["allow"] == "POST" and response.headers["x-request-id"]


def test_unknown_fields_are_named_once(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="appliance.server"):
        for _ in range(3):
            assert served.post("/v1/completions", prompt="a", max_tokens=1, flux_capacitor=1).status_code == 200
    assert sum("flux_capacitor" in record.getMessage() for record in caplog.records) == 1


def test_strict_requests(tokenizer: Tokenizer, model_dir: Path) -> None:
    config = ServerConfig(strict_requests=True)
    with serve_in_thread(FakeClient, tokenizer, EngineConfig(model=str(model_dir)), config) as served:
        error = refused(served, "/v1/completions", prompt="a", flux_capacitor=1)
        assert error["param"] == "flux_capacitor" and error["code"] == "unknown_parameter"
        assert served.post("/v1/completions", prompt="a", max_tokens=1, user="me").status_code == 200


def test_error_of_one_request(slow: Served) -> None:
    slow.client.fail_at = 2
    response = slow.post("/v1/completions", prompt="a", max_tokens=9)
    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": "the step failed",
        "type": "server_error",
        "param": None,
        "code": "engine_error",
    }
    text = slow.post("/v1/completions", prompt="a", max_tokens=9, stream=True).text
    *_, error, done, rest = text.split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_error" and (done, rest) == ("data: [DONE]", "")
    slow.client.fail_at = 0  # before anything was sent the status still tells
    assert slow.post("/v1/completions", prompt="a", max_tokens=9, stream=True).status_code == 500


def test_what_nobody_foresaw(slow: Served, caplog: pytest.LogCaptureFixture) -> None:
    def broken(request_id: str) -> Any:
        raise ZeroDivisionError("a bug")

    slow.client.generate = broken  # type: ignore[method-assign,assignment]
    response = slow.post("/v1/completions", prompt="a", request_id="unlucky")
    assert response.status_code == 500 and response.json()["error"]["code"] == "internal_error"
    assert "a bug" not in response.text and response.headers["x-request-id"] == "unlucky"
    assert [r.exc_info[0] for r in caplog.records if r.exc_info] == [ZeroDivisionError]


def test_without_a_tokenizer(model_dir: Path) -> None:
    with serve_in_thread(FakeClient, None, EngineConfig(model=str(model_dir)), ServerConfig()) as served:
        assert "without a tokenizer" in refused(served, "/v1/completions", prompt="a")["message"]
        assert "without one" in refused(served, "/v1/chat/completions", messages=HELLO)["message"]
        answer = served.post("/v1/completions", prompt=[5, 6], max_tokens=3, return_token_ids=True, logprobs=0).json()
        assert answer["choices"][0]["token_ids"] == [5, 6, 5] and answer["choices"][0]["logprobs"]["tokens"] == ["5", "6", "5"]
