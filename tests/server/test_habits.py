"""What clients do besides: other spellings of paths, HEAD, OPTIONS, compressed bodies, routes of other services."""

from __future__ import annotations

import gzip
import json
import socket
from typing import Any

import httpx
import openai
import pytest

from appliance.config import EngineConfig, ServerConfig
from appliance.server.habits import UNSERVED, usual
from appliance.text.tokenizer import Tokenizer
from tests.server.conftest import Served, serve_in_thread
from tests.server.fake import FakeClient

HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("asked", "served"),
    [
        ("/v1/models/", "/v1/models"),
        ("//v1/models", "/v1/models"),
        ("/v1//models", "/v1/models"),  # Open WebUI, where the address ends with a slash
        ("/v1/v1/models", "/v1/models"),
        ("/models", "/v1/models"),
        ("/models/alias/of-tiny", "/v1/models/alias/of-tiny"),
        ("/chat/completions/", "/v1/chat/completions"),
        ("/", "/"),
        ("//", "/"),
        ("/modelsx", "/modelsx"),
        ("/chat", "/chat"),
        ("/v1/v2/models", "/v1/v2/models"),
    ],
)
def test_one_spelling(asked: str, served: str) -> None:
    assert usual(asked) == served == usual(served)


@pytest.mark.parametrize(
    "path", ["/chat/completions", "/v1/chat/completions/", "/v1/v1/chat/completions", "//v1/chat/completions"]
)
def test_chat_by_any_path(served: Served, path: str) -> None:
    response = served.post(served.url + path, messages=HELLO, max_tokens=5)
    assert response.status_code == 200 and response.json()["choices"][0]["message"]["content"] == "user"
    assert not response.history  # at once, without being sent elsewhere


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/", "/v1/v1"])
def test_a_base_url_as_people_write_it(served: Served, suffix: str) -> None:
    http = httpx.Client(trust_env=False)
    client = openai.OpenAI(base_url=served.url + suffix, api_key="none", max_retries=0, http_client=http)
    assert [m.id for m in client.models.list()] == ["tiny", "alias/of-tiny"]
    assert client.completions.create(model="tiny", prompt="hello", max_tokens=4).choices[0].text == "hel"


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/models/", "/metrics", "/stats", "/version", "/openapi.json"])
def test_head(served: Served, path: str) -> None:
    with served.http as http:
        head, get = http.head(path), http.get(path)
    assert head.status_code == get.status_code == 200 and head.content == b"" and get.content
    assert head.headers["content-type"] == get.headers["content-type"]


def test_head_of_what_is_not_there(served: Served) -> None:
    with served.http as http:
        assert http.head("/nothing").status_code == 404
        assert http.head("/v1/completions").status_code == 405
        assert http.get("/health").status_code == 200  # the connection is as good as before


def test_the_key_is_asked_for_by_every_path(tokenizer: Tokenizer, served: Served) -> None:
    engine = EngineConfig(model=str(served.state.engine_config.model))
    with serve_in_thread(FakeClient, tokenizer, engine, ServerConfig(api_key=("secret",))) as one, one.http as http:
        for path in ("/models", "//v1/models", "/v1/models/", "/v1/v1/models", "/health/../stats", "//stats", "/stats/", "/x//"):
            for method in ("GET", "HEAD", "POST", "OPTIONS"):
                assert http.request(method, one.url + path).status_code == 401, (method, path)
        assert http.get("/health/").status_code == 200 == http.head(f"{one.url}//health").status_code


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/models", "GET"),
        ("/v1/completions", "POST"),
        ("/v1/models/load", "POST"),
        ("/v1/models/tiny", "GET"),
        ("/v1/responses/x", "DELETE, GET"),
    ],
)
def test_wrong_methods_are_told_the_right_ones(served: Served, path: str, allowed: str) -> None:
    with served.http as http:
        for method in ("OPTIONS", "PUT", "TRACE"):
            response = http.request(method, path)
            assert response.status_code == 405 and response.headers["allow"] == allowed
            assert response.json()["error"]["code"] == "method_not_allowed"


def test_whole_addresses(served: Served) -> None:
    """A proxy may ask for one, and each server has to understand it."""
    address = httpx.URL(served.url)
    for path, status in (("/v1/models", 200), ("", 200), ("/nothing", 404)):
        with socket.create_connection((address.host, address.port or 80), timeout=10) as sock:
            head = f"GET {served.url}{path} HTTP/1.1\r\nHost: {address.host}\r\nConnection: close\r\n\r\n"
            sock.sendall(head.encode())
            answer = sock.makefile("rb").read()
        assert answer.startswith(f"HTTP/1.1 {status} ".encode()), (path, answer[:200])


@pytest.mark.parametrize("path", ["/v1/requests/", "/v1/requests", "/nothing/"])
def test_nobody_is_sent_in_circles(served: Served, path: str) -> None:
    with served.http as http:
        for method in ("DELETE", "GET", "POST"):
            answer = http.request(method, path, follow_redirects=False)
            assert answer.status_code in (404, 405) and answer.json()["error"]["code"] in ("not_found", "method_not_allowed")


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate", "zstd", "GZIP"])
def test_compressed_bodies(served: Served, coding: str) -> None:
    body = gzip.compress(json.dumps({"messages": HELLO}).encode())
    with served.http as http:
        response = http.post("/v1/chat/completions", content=body, headers={"Content-Encoding": coding})
        assert response.status_code == 415 and response.json()["error"]["code"] == "unsupported_encoding"
        assert coding in response.json()["error"]["message"]
        plain = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers={"Content-Encoding": "identity"})
        assert plain.status_code == 200


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/json; charset=utf-8", "application/x-www-form-urlencoded", "nonsense", ""]
)
def test_content_types(served: Served, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    with served.http as http:
        response = http.post("/v1/completions", content=b'{"prompt": "hello", "max_tokens": 1}', headers=headers)
        assert response.status_code == 200, response.text
        assert http.post("/v1/completions", content=b"prompt=hello", headers=headers).json()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize("body", ['{"prompt": "hello", "max_tokens": 1}', '\n {"prompt": "hello", "max_tokens": 1}\r\n'])
def test_bodies_in_chunks_and_with_a_mark(served: Served, body: str) -> None:
    with served.http as http:
        chunked = http.post("/v1/completions", content=iter([body[:5].encode(), body[5:].encode()]))
        assert chunked.status_code == 200
        assert http.post("/v1/completions", content=b"\xef\xbb\xbf" + body.encode()).status_code == 200  # a byte order mark


@pytest.mark.parametrize("path", [*UNSERVED, "/v1/images/generations", "/api/tags", "/v1/nothing", "/v1"])
def test_routes_of_others(served: Served, path: str) -> None:
    """At once, with a reason; 404, since OpenAI's clients try again after a 501."""
    with served.http as http:
        for method in ("GET", "POST"):
            error = http.request(method, path).json()["error"]
            assert error["code"] == "not_found" and error["type"] == "invalid_request_error"
    known = UNSERVED.keys() & {path, path.rpartition("/")[0], f"/v1{path}"}
    assert all(UNSERVED[one] in error["message"] for one in known)
    assert known or path not in ("/v1/nothing", "/v1") or error["message"].endswith("GET /openapi.json has all that there are")


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}, {"role": "user", "content": "b"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}, {"role": "user", "content": "b"}],
        [{"role": "user", "content": "a"}, {"role": "assistant"}, {"role": "user", "content": "b"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": []}, {"role": "user", "content": "b"}],
        [{"role": "user", "content": "a", "id": 17, "opts": {"visible": False}, "name": "me", "timestamp": 1.5}],
        [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]}],
        [{"role": "system", "content": [{"type": "text", "text": "s"}]}, {"role": "user", "content": "a"}],
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "audio": None, "function_call": None},
            {"role": "tool", "tool_call_id": "c1", "name": "f", "content": "42"},
        ],
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": [], "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "42"}]},
        ],
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": ""},
        ],
        [
            {"role": "user", "content": "a"},
            {
                "role": "assistant",
                "content": "b",
                "reasoning_content": "r",
                "reasoning": "r",
                "annotations": [],
                "tool_calls": [],
            },
            {"role": "user", "content": "c"},
        ],
    ],
)
def test_messages_as_clients_send_them(served: Served, messages: list[dict[str, Any]]) -> None:
    response = served.post("/v1/chat/completions", messages=messages, max_tokens=1)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": None, "stop": None, "tools": None, "tool_choice": None, "response_format": None, "stream_options": None},
        {"stop": [f"stop {i}" for i in range(20)], "max_tokens": 3},
        {"stop": [], "tools": [], "logit_bias": {}, "max_tokens": 3},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "max_tokens": 3},
        {"temperature": 1, "top_p": 1, "n": 1, "presence_penalty": 0, "frequency_penalty": 0, "max_tokens": 3},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}, "max_tokens": 3},
        {"max_tokens": 3, "max_completion_tokens": 3, "reasoning_effort": "low", "store": False, "user": "x", "metadata": {}},
        {"max_tokens": 3, "options": {"num_ctx": 8192}, "keep_alive": "5m", "cache_prompt": True, "session_id": "s"},
        {"max_tokens": 3, "model": ""},
        {"max_tokens": 3.0, "n": 1.0, "top_k": 4.0, "seed": 7e0, "temperature": 1.0, "top_p": 1},
    ],
)
def test_bodies_as_clients_send_them(served: Served, body: dict[str, Any]) -> None:
    response = served.post("/v1/chat/completions", messages=HELLO, **body)
    assert response.status_code == 200, response.text


def test_model_lists_as_clients_ask_for_them(served: Served) -> None:
    """With queries that mean something elsewhere, and headers that mean nothing here."""
    with served.http as http:
        for query in ("?limit=20", "?owned_by=me&order=desc", "?api-version=2024-10-21", "?_=1"):
            headers = {"OpenAI-Organization": "x", "OpenAI-Beta": "assistants=v2", "Authorization": "Bearer", "Accept": "*/*"}
            assert [m["id"] for m in http.get(f"/v1/models{query}", headers=headers).json()["data"]] == ["tiny", "alias/of-tiny"]
