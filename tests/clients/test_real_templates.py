"""Tools by other people's clients, with chat templates of real models: a small random model, held to the form of their calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai import OpenAI

from tests.clients.conftest import FLAGS
from tests.server.test_real import Running, started
from tests.tiny_model import Shape, make_checkpoint

# A template that writes reasoning leaves the choice between it and the call to chance: it is told not to.
TEMPLATES = {"Qwen-Qwen3-0.6B": "hermes", "meta-llama-Llama-3.1-8B-Instruct": "llama3_json"}
PLAIN = {"chat_template_kwargs": {"enable_thinking": False}}
ASKED: list[Any] = [{"role": "user", "content": "Rome?"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


@tool
def clock(zone: Literal["utc", "cet"]) -> str:
    """The time."""
    return f"12:00 {zone}"


@pytest.fixture(scope="module", params=TEMPLATES)
def real(request: pytest.FixtureRequest, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    model = make_checkpoint(tmp_path_factory.mktemp("model") / "tiny", shape=Shape(max_len=8192))
    template = shared_data / "tokenizers" / "chat_templates" / f"{request.param}.jinja"
    with started(str(model), *FLAGS, "--served-model-name", "tiny", "--chat-template", str(template)) as one:
        yield one


def test_calls(real: Running) -> None:
    http = httpx.Client(trust_env=False)
    client = OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0, timeout=60, http_client=http)
    body: dict[str, Any] = {"model": "tiny", "messages": ASKED, "tools": [WEATHER], "max_tokens": 200, "extra_body": PLAIN}
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        answer = client.chat.completions.create(tool_choice=choice, parallel_tool_calls=False, seed=1, **body)
        (call,) = answer.choices[0].message.tool_calls or ()
        arguments = json.loads(call.function.arguments)
        assert arguments["city"] in ("Rome", "Oslo") and 1 <= arguments["days"] <= 9
        assert answer.choices[0].finish_reason == "tool_calls" and not answer.choices[0].message.content
        with client.chat.completions.stream(tool_choice=choice, parallel_tool_calls=False, seed=1, **body) as stream:
            (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or ()
        assert json.loads(streamed.function.arguments) == arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"sky": "blue"}'}
    last = client.chat.completions.create(**{**body, "messages": [*ASKED, answer.choices[0].message, result], "max_tokens": 3})
    assert last.usage and answer.usage and last.usage.prompt_tokens > answer.usage.prompt_tokens + len(call.function.arguments)


def test_langchain(real: Running) -> None:
    model = ChatOpenAI(
        model="tiny", base_url=f"{real.url}/v1", api_key="none", max_retries=0, max_tokens=200, extra_body=PLAIN, seed=1
    )
    answer = model.bind_tools([clock], tool_choice="any", parallel_tool_calls=False, strict=True).invoke("The time?")
    (call,) = answer.tool_calls
    assert call["name"] == "clock" and call["args"]["zone"] in ("utc", "cet")
    model.bind_tools([clock]).invoke([HumanMessage("The time?"), answer, clock.invoke(call)], max_tokens=3)
