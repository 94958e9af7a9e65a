"""What programs send by themselves: fields that nobody chose to send are no reason to refuse a request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.conftest import Served
from tests.server.test_tools import HELLO, serve

SCHEMA = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "properties": {"city": {"type": "string", "description": "where"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": SCHEMA, "strict": False}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "x"}'}}
PARTS = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
BODIES: dict[str, dict[str, Any]] = {
    "Open WebUI": {
        **USAGE,
        "messages": HELLO,
        "temperature": None,
        "max_tokens": None,
        "session_id": "s",
        "chat_id": "c",
        "id": "m",
        "metadata": {"user_id": "u", "features": {}},
        "tags": [],
        "variables": {},
        "features": {"web_search": False},
        "background_tasks": {"title_generation": True},
    },
    "Continue": {**USAGE, "messages": HELLO, "tools": [TOOL], "parallel_tool_calls": False, "stop": ["<|im_end|>"]},
    "Continue's edits": {"messages": HELLO, "stream": True, "prediction": {"type": "content", "content": "hello"}},
    "Cline": {
        **USAGE,
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]},
        ],
        "temperature": 0,
        "reasoning_effort": "high",
    },
    "aider": {
        "messages": [*HELLO, {"role": "assistant", "content": "Ok."}, *HELLO],
        "stream": False,
        "temperature": 0,
        "num_ctx": 8192,
    },
    "LibreChat": {
        "messages": [{"role": "user", "name": "bob", "content": [{"type": "text", "text": "hi"}]}],
        "stream": True,
        "user": "66",
        "temperature": 1,
        "top_p": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
    },
    "Zed": {
        **USAGE,
        "messages": PARTS,
        "max_completion_tokens": 5,
        "stop": [],
        "temperature": 1.0,
        "tools": [TOOL],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "prompt_cache_key": "k",
    },
    "n8n": {
        **USAGE,
        "messages": HELLO,
        "n": 1,
        "temperature": 0.7,
        "top_p": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "response_format": {"type": "text"},
    },
    "OpenAI's client, with all defaults": {
        "messages": HELLO,
        "store": False,
        "service_tier": "auto",
        "verbosity": "medium",
        "metadata": {},
        "modalities": ["text"],
        "audio": None,
        "web_search_options": None,
        "logprobs": False,
        "top_logprobs": None,
        "safety_identifier": "x",
        "functions": [],
        "tools": [],
        "tool_choice": "auto",
    },
    "a conversation with calls": {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "d"}]},
            *HELLO,
            {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "annotations": [], "audio": None},
            {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": [{"type": "text", "text": "sunny"}]},
            {"role": "assistant", "content": "", "reasoning_content": "r", "tool_calls": [], "function_call": None},
            *HELLO,
        ],
        "tools": [TOOL],
    },
    "a call without arguments": {
        "messages": [
            *HELLO,
            {"role": "assistant", "tool_calls": [{**CALL, "index": 0, "function": {"name": "weather", "arguments": ""}}]},
            {"role": "tool", "tool_call_id": "call_1", "content": ""},
        ],
        "tools": [TOOL],
    },
    "fields of messages that are the client's own": {"messages": [{**HELLO[0], "id": 5, "timestamp": 1, "images": None}]},
}


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("hermes"), "Hermes") as one:
        yield one


@pytest.mark.parametrize("name", BODIES)
def test_what_clients_send_by_themselves(hermes: Served, name: str) -> None:
    answer = hermes.post("/v1/chat/completions", **{"model": hermes.state.names[0], "max_tokens": 4, **BODIES[name]})
    assert answer.status_code == 200, answer.text
    assert '"error"' not in answer.text


def test_what_they_may_not_do_without_is_refused_by_its_place(hermes: Served) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA", "detail": "auto"}}
    answer = hermes.post("/v1/chat/completions", messages=[{"role": "user", "content": [{"type": "text", "text": "x"}, image]}])
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == "messages[0].content" and "'image_url'" in error["message"]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_limit_beyond_the_context_is_named_as_it_was_sent(hermes: Served, name: str) -> None:
    error = hermes.post("/v1/chat/completions", messages=HELLO, **{name: 10**9}).json()["error"]
    assert error["param"] == name and f"and {name} asks for 1000000000 more" in error["message"]
    assert error["code"] == "context_length_exceeded"
