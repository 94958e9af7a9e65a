"""The fields of /v1/responses: what reaches the engine, what is left away, what is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.server.conftest import Served
from tests.server.responses import TOOL, ask, say
from tests.server.test_tools import prompt_of, serve


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("hermes"), "Hermes") as one:
        yield one


def test_options_reach_the_engine(hermes: Served) -> None:
    say(hermes, "Yes.")
    options: dict[str, Any] = {"top_k": 7, "min_p": 0.1, "seed": 3, "stop": ["x"], "repetition_penalty": 1.1, "top_p": 0.5}
    response = ask(hermes, **options, logit_bias={"5": 1.0}, priority=0, cache_salt="s", truncation="disabled", user="me")
    params = hermes.client.submitted[-1].params
    assert {name: getattr(params, name) for name in options} == {**options, "stop": ("x",)} and params.logit_bias == {5: 1.0}
    assert hermes.client.submitted[-1].cache_salt == "s" and response["user"] == "me" and response["top_p"] == 0.5


def test_truncation(hermes: Served) -> None:
    """What was said first is left away, up to a message of the user; what the system says stays."""
    say(hermes, "Yes.")
    turns = [
        [{"role": "user", "content": f"{i} " + "x" * 2000}, {"role": "assistant", "content": f"answer {i}"}] for i in range(9)
    ]
    said = [{"role": "system", "content": "S"}, *(one for turn in turns for one in turn), {"role": "user", "content": "last"}]
    refused = hermes.post("/v1/responses", input=said)
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"
    ask(hermes, input=said, truncation="auto", max_output_tokens=1000)
    prompt = prompt_of(hermes)
    assert prompt.startswith("<s>system: Suser: 6 xxx") and prompt.endswith("user: lastassistant: ")
    ask(hermes, input=said, truncation="auto", max_output_tokens=20)
    assert prompt_of(hermes).startswith("<s>system: Suser: 5 xxx")
    ask(hermes, input=said[-2:], truncation="auto")
    assert "answer 8" in prompt_of(hermes)
    over = hermes.post("/v1/responses", input="y" * 9000, truncation="auto")
    assert over.json()["error"]["code"] == "context_length_exceeded"


HERE: Any = {"role": "user", "content": "hello"}
REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": 3}, "input"),
    ({"input": ["hello"]}, "input[0]"),
    ({"input": [{"role": "robot", "content": "hello"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [HERE, {"type": "web_search_call", "id": "ws_1"}]}, "input[1].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "u"}]}]}, "input[0].content[0]"),
    ({"input": [{"role": "user", "content": [{"type": [[]], "text": "a"}]}]}, "input[0].content[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]}, "input[0].content[0]"),
    ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
    ({"input": [HERE, {"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input[1].call_id"),
    ({"input": [{"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "e"}]}, "input[0].encrypted_content"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].id"),
    ({"background": True}, "background"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ({"context_management": [{"type": "compaction"}]}, "context_management"),
    ({"messages": [HERE]}, "messages"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"n": 2}, "n"),
    ({"echo": True}, "echo"),
    ({"include_reasoning": False}, "include_reasoning"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"top_logprobs": 200}, "top_logprobs"),
    ({"include": ["everything"]}, "include[0]"),
    ({"truncation": "sometimes"}, "truncation"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"text": {"format": {"type": "xml"}}}, "text.format"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "colour"}}}}, "text.format.schema"),
    ({"tools": "weather"}, "tools"),
    ({"tools": [{"type": "file_search", "vector_store_ids": ["v"]}]}, "tools[0]"),
    ({"tools": [{"type": "web_search"}, {"type": "mcp"}]}, "tools[1]"),
    ({"tools": [{"type": "web_search"}, {"type": "function", "name": ""}]}, "tools[1].name"),
    ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL, {"type": "web_search"}], "tool_choice": {"type": "web_search"}}, "tool_choice"),
    ({"tools": [TOOL, {"type": "namespace", "name": "agents", "tools": [{"type": "custom"}]}]}, "tools[1].tools[0]"),
    ({"tools": [TOOL, {"type": "namespace", "name": "agents", "tools": [TOOL, TOOL]}, TOOL]}, "tools[1].tools[1].name"),
    ({"tools": [{"type": "namespace", "name": "", "tools": [TOOL]}]}, "tools[0].name"),
    ({"tools": [{"type": "namespace", "name": "agents", "tools": {}}]}, "tools[0].tools"),
    ({"tools": [{"type": "namespace", "name": "agents", "description": 1, "tools": [TOOL]}]}, "tools[0].description"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [{"type": "function", "name": "f", "parameters": 3}]}, "tools[0].parameters"),
    ({"tools": [TOOL], "tool_choice": {"type": "web_search_preview"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "clock"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "clock"}]}}, "tool_choice"),
    (
        {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [TOOL, {"type": "custom"}]}},
        "tool_choice.tools[1]",
    ),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": {}}}, "tool_choice.tools"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{}, {}, {}]}}, "tool_choice"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"suffix": "x"}, "suffix"),
]


@pytest.mark.parametrize(("body", "param"), REFUSALS, ids=lambda value: value if isinstance(value, str) else None)
def test_refusals(hermes: Served, body: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        answer = hermes.post("/v1/responses", **{"input": "hello", "stream": stream, **body})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error"), error
        assert param in error["message"]


def test_fields_that_nobody_knows(hermes: Served) -> None:
    say(hermes, "Yes.")
    ask(hermes, favourite_colour="red", conversation=None)
    config = hermes.state.server_config
    hermes.state.server_config = replace(config, strict_requests=True)
    try:
        ask(hermes, max_tool_calls=3, background=False, service_tier="auto", client_metadata={"a": "b"})
        for path in ("/v1/responses", "/v1/responses/input_tokens"):
            error = hermes.post(path, input="hello", favourite_colour="red").json()["error"]
            assert (error["param"], error["code"]) == ("favourite_colour", "unknown_parameter")
    finally:
        hermes.state.server_config = config


def test_fields_that_change_nothing(hermes: Served) -> None:
    say(hermes, "Yes.")
    some = {"include": ["reasoning.encrypted_content"], "service_tier": "auto", "max_tool_calls": 3, "background": False}
    some |= {"reasoning": {"effort": "low", "summary": "auto"}, "stream_options": {"include_obfuscation": False}, "n": 1}
    some |= {"prompt_cache_key": "k", "safety_identifier": "s", "text": {"verbosity": "medium"}}
    assert hermes.post("/v1/responses", input="hello", **some).status_code == 200
    assert ask(hermes, **some)["reasoning"] == {"effort": "low", "summary": "auto"}
