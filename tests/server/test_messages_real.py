"""Messages by a real model: what is forced holds, streamed or whole, and prompts are found again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import jsonschema
import pytest
from anthropic.types import Message

from tests.server.test_messages import plain
from tests.server.test_real import Running, started

ASKED: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "minimum": 0, "maximum": 20}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"name": "weather", "input_schema": CITY},
    {"name": "time", "input_schema": {"type": "object", "additionalProperties": False}},
]
SCHEMAS = {tool["name"]: tool["input_schema"] for tool in TOOLS}


@pytest.fixture(scope="module")
def demo() -> Iterator[Running]:
    """The demo model: its template knows no tools, but calls can be read and forced all the same."""
    with started("--port", "0", "--threads", "1", "--tool-call-parser", "hermes") as one:
        yield one


def ask(demo: Running, **more: Any) -> Message:
    """Whole and streamed, which must agree: the seed says what is drawn."""
    api = anthropic.Anthropic(base_url=demo.url, api_key="none", max_retries=0).messages
    body = {"model": "demo", "max_tokens": 60, "messages": ASKED, "extra_body": {"seed": 3}, **more}
    whole = api.create(**body)
    with api.stream(**body) as stream:
        streamed = stream.get_final_message()
    prompts = [one.usage.input_tokens + (one.usage.cache_read_input_tokens or 0) for one in (whole, streamed)]
    assert prompts[0] == prompts[1]
    assert {**plain(whole.to_dict()), "usage": None} == {**plain(streamed.to_dict()), "usage": None}
    return whole


def test_text(demo: Running) -> None:
    answer = ask(demo, extra_body={"temperature": 0})
    assert answer.content[0].to_dict() == {"type": "text", "text": "The capital of France is Paris."}
    assert answer.stop_reason == "end_turn"
    stopped = ask(demo, stop_sequences=[" Paris"], extra_body={"temperature": 0})
    assert stopped.content[0].to_dict()["text"] == "The capital of France is" and stopped.stop_sequence == " Paris"
    continued = ask(demo, messages=[*ASKED, {"role": "assistant", "content": "The capital"}], extra_body={"temperature": 0})
    assert continued.content[0].to_dict()["text"].strip().startswith("of France")


def test_calls_that_are_a_must(demo: Running) -> None:
    ended = 0
    choices: list[dict[str, Any]] = [{"type": "tool", "name": "weather"}, {"type": "any", "disable_parallel_tool_use": True}]
    for choice in choices:
        for seed in range(3):
            answer = ask(demo, tools=TOOLS, tool_choice=choice, max_tokens=120, extra_body={"seed": seed})
            assert [block.type for block in answer.content] in (["tool_use"], []) or answer.stop_reason == "max_tokens"
            if answer.stop_reason == "tool_use":
                (call,) = answer.content
                assert call.type == "tool_use"
                jsonschema.validate(call.input, SCHEMAS[call.name])
                ended += 1
    assert ended >= 4


def test_an_answer_of_a_form(demo: Running) -> None:
    form: Any = {"format": {"type": "json_schema", "schema": CITY}}
    for seed in range(3):
        answer = ask(demo, output_config=form, max_tokens=120, extra_body={"seed": seed})
        assert answer.stop_reason == "end_turn"
        jsonschema.validate(json.loads(answer.content[0].to_dict()["text"]), CITY)


def test_what_was_computed_is_found(demo: Running) -> None:
    long: list[Any] = [{"role": "user", "content": "Tell me of the sun, the moon and all the stars. " * 12}]
    api = anthropic.Anthropic(base_url=demo.url, api_key="none", max_retries=0).messages
    counted = api.count_tokens(model="demo", messages=long).input_tokens
    first = api.create(model="demo", max_tokens=0, messages=long).usage
    assert first.input_tokens == counted and first.cache_read_input_tokens == 0 and first.output_tokens == 0
    second = api.create(model="demo", max_tokens=3, messages=long).usage
    assert second.input_tokens + (second.cache_read_input_tokens or 0) == counted
    assert (second.cache_read_input_tokens or 0) >= counted - 16
