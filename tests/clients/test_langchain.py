"""langchain-openai against a running server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langchain_openai import OpenAI as TextOpenAI
from pydantic import BaseModel

from tests.clients.conftest import Description
from tests.server.test_real import Running


class Report(BaseModel):
    """How it is."""

    city: Literal["Rome", "Oslo"]
    warm: bool


@tool
def clock(zone: Literal["utc", "cet"]) -> str:
    """The time."""
    return f"12:00 {zone}"


@pytest.fixture(scope="module")
def made(live: Running, description: Description) -> Iterator[Any]:
    """Makes a model; what it gets is validated on its way."""
    http = httpx.Client(trust_env=False, event_hooks={"response": [description.check]})

    def make(kind: type = ChatOpenAI, **options: Any) -> Any:
        more = {"http_async_client": httpx.AsyncClient(trust_env=False), **({"stream_usage": True} if kind is ChatOpenAI else {})}
        given: dict[str, Any] = {"model": "demo", "base_url": f"{live.url}/v1", "api_key": "none", "max_retries": 0}
        return kind(**{**given, "temperature": 0, "max_tokens": 40, "http_client": http, **more, **options})

    yield make
    http.close()


@pytest.mark.parametrize("responses", [False, True])
def test_chat(made: Any, responses: bool) -> None:
    model = made(use_responses_api=responses)
    answer = model.invoke("Hello!")
    assert isinstance(answer, AIMessage) and answer.text and answer.usage_metadata
    assert answer.usage_metadata["total_tokens"] > answer.usage_metadata["output_tokens"] > 0
    assert answer.response_metadata["model_name"] == "demo"
    chunks = [*model.stream("Hello!")]
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert len(chunks) > 2 and whole.text == answer.text and whole.usage_metadata == answer.usage_metadata
    turns = [SystemMessage("Be kind."), HumanMessage("Hello!"), answer, HumanMessage("Thanks")]
    assert model.invoke(turns).usage_metadata["input_tokens"] > answer.usage_metadata["input_tokens"]


@pytest.mark.parametrize("responses", [False, True])
def test_chains_batches_and_async(made: Any, responses: bool) -> None:
    model = made(use_responses_api=responses)
    chain = ChatPromptTemplate.from_messages([("user", "{a} plus {b}")]) | model | StrOutputParser()
    sums = [{"a": a, "b": 3} for a in range(6)]
    texts = chain.batch(sums)
    assert all(texts) and len({*texts}) > 2

    async def again() -> tuple[list[str], list[str]]:
        streams = [[piece async for piece in chain.astream(one)] for one in sums]
        return await asyncio.wait_for(chain.abatch(sums), 60), ["".join(pieces) for pieces in streams]

    batch, streamed = asyncio.run(again())
    assert batch == streamed == texts


@pytest.mark.parametrize("responses", [False, True])
@pytest.mark.parametrize("choice", ["any", "clock"])
def test_tools(made: Any, responses: bool, choice: str) -> None:
    model = made(use_responses_api=responses, max_tokens=100)
    must = model.bind_tools([clock], tool_choice=choice, parallel_tool_calls=False, strict=True)
    answer = must.invoke("What time is it?")
    (call,) = answer.tool_calls
    assert call["name"] == "clock" and call["args"]["zone"] in ("utc", "cet") and not answer.invalid_tool_calls
    streamed = None
    for chunk in must.stream("What time is it?"):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed is not None and [c["args"] for c in streamed.tool_calls] == [call["args"]]
    result = clock.invoke(call)
    assert isinstance(result, ToolMessage)
    last = model.bind_tools([clock]).invoke([HumanMessage("What time is it?"), answer, result])
    assert isinstance(last, AIMessage) and last.usage_metadata["input_tokens"] > answer.usage_metadata["input_tokens"]


@pytest.mark.parametrize("responses", [False, True])
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(made: Any, responses: bool, method: str) -> None:
    model = made(use_responses_api=responses, max_tokens=100)
    found = model.with_structured_output(Report, method=method, strict=True, include_raw=True).invoke("How is it?")
    assert isinstance(found["parsed"], Report) and found["parsing_error"] is None
    assert isinstance(model.with_structured_output(Report, method=method, strict=True).invoke("How is it?"), Report)
    if method == "json_schema":
        *_, last = model.with_structured_output(Report, method=method).stream("How is it?")
        assert last == found["parsed"] or isinstance(last, Report)


def test_json_mode(made: Any) -> None:
    """Any object: where a model of this size ends its own is a matter of luck, so what a stop leaves is looked at."""
    model = made(max_tokens=300, stop=['"']).with_structured_output(None, method="json_mode", include_raw=True)
    found = model.invoke("Hello!")
    assert found["raw"].content.startswith("{") and found["parsed"] == {}


def test_options_of_chat(made: Any) -> None:
    model = made(logprobs=True, top_logprobs=2, seed=1, temperature=1.0, n=2, presence_penalty=0.1, frequency_penalty=0.1)
    result = model.generate([[HumanMessage("Hello!")]])
    assert len(result.generations[0]) == 2
    answer = made(logprobs=True, top_logprobs=2, stop=["you"]).invoke("Hello!")
    assert answer.response_metadata["logprobs"]["content"] and "you" not in answer.content
    own = made(extra_body={"top_k": 1, "min_p": 0.1, "chat_template_kwargs": {"enable_thinking": False}})
    assert own.invoke("Hello!").content


def test_completions(made: Any) -> None:
    model = made(TextOpenAI)
    text = model.invoke("The capital")
    assert text and "".join(model.stream("The capital")) == text
    assert model.batch(["The capital", "The dog"])[0] == text
    assert asyncio.run(made(TextOpenAI).ainvoke("The capital")) == text
    several = made(TextOpenAI, n=2, best_of=3, temperature=1.0, logprobs=1, seed=1).generate(["The capital"])
    assert len(several.generations[0]) == 2 and several.llm_output["token_usage"]["completion_tokens"] > 3


@pytest.mark.parametrize("responses", [False, True])
def test_errors(made: Any, responses: bool) -> None:
    with pytest.raises(openai.NotFoundError):
        made(model="other", use_responses_api=responses).invoke("Hello!")
    with pytest.raises(openai.BadRequestError):
        made(use_responses_api=responses).invoke("Hello! " * 600)
    with pytest.raises(openai.BadRequestError):
        [*made(use_responses_api=responses, temperature=-1).stream("Hello!")]
