"""Every feature of completions and chat by OpenAI's own client, against a running server."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any, Literal

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from tests.clients.conftest import Description, used
from tests.server.test_lifecycle import eventually
from tests.server.test_real import Running

HELLO: list[Any] = [{"role": "user", "content": "Hello!"}]
STORY = "The capital"
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK: dict[str, Any] = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "additionalProperties": False}},
}


class Weather(BaseModel):
    city: Literal["Rome", "Oslo"]
    warm: bool
    days: Literal[1, 2, 3]


def test_completions(client: OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt=STORY, max_tokens=8, temperature=0)
    (choice,) = answer.choices
    assert choice.text and choice.finish_reason == "length"
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    usage = answer.usage
    assert usage and usage.completion_tokens == 8 and usage.total_tokens == usage.prompt_tokens + 8
    chunks = list(client.completions.create(model="demo", prompt=STORY, max_tokens=8, temperature=0, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == choice.text and chunks[-1].choices[0].finish_reason == "length"
    assert len({c.id for c in chunks}) == 1 and all(c.usage is None for c in chunks)


def test_forms_of_prompts(client: OpenAI, live: Running) -> None:
    with live.http as http:
        ids = http.post("/tokenize", json={"prompt": STORY}).json()["tokens"]
    body: dict[str, Any] = {"model": "demo", "max_tokens": 6, "temperature": 0}
    texts = [
        [choice.text for choice in client.completions.create(prompt=prompt, **body).choices]
        for prompt in (STORY, [STORY], ids, [ids], [STORY, STORY], [ids, ids])
    ]
    assert {text for found in texts for text in found} == {texts[0][0]} and [*map(len, texts)] == [1, 1, 1, 1, 2, 2]


def test_several_completions(client: OpenAI) -> None:
    body: dict[str, Any] = {"model": "demo", "prompt": [STORY, "The dog"], "max_tokens": 6, "temperature": 1.0, "seed": 3}
    whole = client.completions.create(n=3, **body)
    assert [choice.index for choice in whole.choices] == list(range(6)) and len({c.text for c in whole.choices}) > 2
    assert [c.text for c in client.completions.create(n=3, **body).choices] == [c.text for c in whole.choices]  # the seed
    texts = Counter[int]()
    told = dict.fromkeys(range(6), "")
    for chunk in client.completions.create(n=3, stream=True, stream_options={"include_usage": True}, **body):
        for choice in chunk.choices:
            told[choice.index] += choice.text
            texts[choice.index] += choice.finish_reason is not None
    assert [*told.values()] == [c.text for c in whole.choices] and set(texts.values()) == {1}
    assert chunk.usage == whole.usage and not chunk.choices
    best = client.completions.create(best_of=4, n=2, **body)
    assert len(best.choices) == 4 and best.usage and best.usage.completion_tokens > 24


def test_logprobs_and_echo(client: OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt=STORY, max_tokens=3, logprobs=2, echo=True, temperature=0)
    found = answer.choices[0].logprobs
    assert found and found.tokens and found.token_logprobs and found.top_logprobs and found.text_offset and answer.usage
    assert len(found.tokens) == answer.usage.total_tokens and found.token_logprobs[0] is None
    assert answer.choices[0].text.startswith(STORY)
    generated = zip(found.token_logprobs[-3:], found.top_logprobs[-3:])
    assert all(score == max(top.values()) and 2 <= len(top) <= 3 for score, top in generated)
    scored = client.completions.create(model="demo", prompt=STORY, max_tokens=0, logprobs=0, echo=True).choices[0]
    assert scored.text == STORY and scored.logprobs and scored.logprobs.token_logprobs == found.token_logprobs[:-3]


def test_how_texts_end(client: OpenAI) -> None:
    body: dict[str, Any] = {"model": "demo", "prompt": STORY, "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**body).choices[0].text
    word = whole.split()[-1]
    for stop in (word, [word, "never"]):
        choice = client.completions.create(stop=stop, **body).choices[0]
        assert choice.text == whole[: whole.index(word)] and choice.finish_reason == "stop"
        assert choice.stop_reason == word  # type: ignore[attr-defined]
    streamed = [c.choices[0].text for c in client.completions.create(stop=word, stream=True, **body)]
    assert "".join(streamed) == whole[: whole.index(word)]
    banned = client.completions.create(logit_bias={"2": -100}, **body).choices[0]  # 2: the end of text
    assert banned.finish_reason == "length"


def test_our_own_fields_by_extra_body(client: OpenAI) -> None:
    own = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "min_tokens": 4, "return_token_ids": True}
    answer = client.completions.create(model="demo", prompt=STORY, max_tokens=6, extra_body=own)
    assert len(answer.choices[0].token_ids) == 6  # type: ignore[attr-defined]
    regex = client.completions.create(model="demo", prompt=STORY, extra_body={"structured_outputs": {"regex": "[0-9]{4}"}})
    assert regex.choices[0].text.isdigit() and regex.choices[0].finish_reason == "stop"


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo",
        messages=[{"role": "developer", "content": "Be kind."}, *HELLO],
        max_completion_tokens=20,
        temperature=0,
        store=True,
        metadata={"a": "b"},
        user="me",
        service_tier="auto",
    )
    message = answer.choices[0].message
    assert message.role == "assistant" and message.content and message.tool_calls is None and message.refusal is None
    parts: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]}]
    same = client.chat.completions.create(model="demo", messages=parts, max_tokens=20, temperature=0)
    assert same.choices[0].message.content
    more = client.chat.completions.create(
        model="demo",
        messages=[*HELLO, {"role": "assistant", "content": message.content}, {"role": "user", "content": "Thanks"}],
        max_tokens=5,
    )
    assert more.usage and answer.usage and more.usage.prompt_tokens > same.usage.prompt_tokens  # type: ignore[union-attr]


@pytest.mark.parametrize("n", [1, 3])
def test_chat_streams(client: OpenAI, n: int) -> None:
    body: dict[str, Any] = {"model": "demo", "messages": HELLO, "max_tokens": 10, "temperature": 0.8, "seed": 5, "n": n}
    whole = client.chat.completions.create(logprobs=True, top_logprobs=2, **body)
    chunks = list(
        client.chat.completions.create(logprobs=True, top_logprobs=2, stream=True, stream_options={"include_usage": True}, **body)
    )
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    for choice in whole.choices:
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(one.delta.content or "" for one in mine) == choice.message.content
        tokens = [token for one in mine if one.logprobs for token in one.logprobs.content or ()]
        assert choice.logprobs and tokens == choice.logprobs.content and all(len(t.top_logprobs) == 2 for t in tokens)
        assert [one.finish_reason for one in mine if one.finish_reason] == [choice.finish_reason]


def test_the_clients_stream_helper(client: OpenAI) -> None:
    with client.chat.completions.stream(model="demo", messages=HELLO, max_tokens=60, temperature=0) as stream:
        kinds = Counter(event.type for event in stream)
        final = stream.get_final_completion()
    assert kinds["content.delta"] > 1 and kinds["content.done"] == 1 and final.choices[0].message.content


def test_structured_output(client: OpenAI) -> None:
    parsed = client.chat.completions.parse(model="demo", messages=HELLO, response_format=Weather, max_tokens=200)
    assert isinstance(parsed.choices[0].message.parsed, Weather)
    with client.chat.completions.stream(model="demo", messages=HELLO, response_format=Weather, max_tokens=200) as stream:
        snapshots = [event.parsed for event in stream if event.type == "content.delta"]
        assert snapshots and isinstance(stream.get_final_completion().choices[0].message.parsed, Weather)
    short = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1, 2, 3]}}}
    for form in (short, {"type": "text"}):
        answer = client.chat.completions.create(model="demo", messages=HELLO, response_format=form, max_tokens=9)  # type: ignore[call-overload]
        assert answer.choices[0].message.content in ("1", "2", "3") or form["type"] == "text"
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="demo", messages=HELLO, response_format=Weather, max_tokens=3)
    impossible = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "colour"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=HELLO, response_format=impossible)  # type: ignore[call-overload]
    assert caught.value.param == "response_format.json_schema.schema"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_tools_that_must_be_called(client: OpenAI, choice: Any) -> None:
    tools = [WEATHER, CLOCK] if choice == "required" else [CLOCK, WEATHER]
    body: dict[str, Any] = {"model": "demo", "messages": HELLO, "tools": tools, "tool_choice": choice, "max_tokens": 100}
    answer = client.chat.completions.create(parallel_tool_calls=False, **body)
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.type == "function" and call.function.name in ("weather", "clock")
    assert answer.choices[0].finish_reason == "tool_calls"
    arguments = json.loads(call.function.arguments)
    assert choice == "required" or (call.function.name == "weather" and arguments["city"] in ("Rome", "Oslo"))
    with client.chat.completions.stream(parallel_tool_calls=False, **body) as stream:
        kinds = Counter(event.type for event in stream)
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert kinds["tool_calls.function.arguments.done"] == 1 and json.loads(streamed.function.arguments) is not None
    back = [*HELLO, answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    last = client.chat.completions.create(model="demo", messages=back, tools=tools, max_tokens=5)
    assert last.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_tools_by_the_clients_own_helper(client: OpenAI) -> None:
    tool = openai.pydantic_function_tool(Weather, name="report")
    answer = client.chat.completions.parse(
        model="demo", messages=HELLO, tools=[tool], tool_choice="required", max_tokens=150, parallel_tool_calls=False
    )
    (call,) = answer.choices[0].message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, Weather)


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_tools_that_need_not_be_called(client: OpenAI, choice: Literal["auto", "none"]) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=HELLO, tools=[WEATHER], tool_choice=choice, max_tokens=20, temperature=0
    )
    assert answer.choices[0].message.content is not None and not answer.choices[0].message.tool_calls


def test_models_and_headers(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"] and client.models.retrieve("demo").object == "model"
    raw = client.chat.completions.with_raw_response.create(
        model="demo", messages=HELLO, max_tokens=1, extra_headers={"X-Request-Id": "mine-1"}
    )
    answer = raw.parse()
    assert raw.headers["x-request-id"] == "mine-1" == answer._request_id and answer.id == "chatcmpl-mine-1"
    with client.completions.with_streaming_response.create(model="demo", prompt=STORY, max_tokens=4, stream=True) as response:
        assert [line for line in response.iter_lines() if line][-1] == "data: [DONE]"


@pytest.mark.parametrize(
    ("body", "kind", "code", "param"),
    [
        ({"temperature": -1}, openai.BadRequestError, None, "temperature"),
        ({"max_tokens": 100_000}, openai.BadRequestError, "context_length_exceeded", "max_tokens"),
        ({"model": "other"}, openai.NotFoundError, "model_not_found", "model"),
        ({"tools": "x"}, openai.BadRequestError, None, "tools"),
        ({"extra_body": {"suffix": "x"}}, openai.BadRequestError, "unsupported_parameter", "suffix"),
        ({"stream": True, "n": 0}, openai.BadRequestError, None, "n"),
        ({"logit_bias": {"1": 1000}}, openai.BadRequestError, None, "logit_bias"),
    ],
)
def test_errors(client: OpenAI, body: dict[str, Any], kind: type[openai.APIStatusError], code: str | None, param: str) -> None:
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": "demo", "messages": HELLO, **body})
    error = caught.value
    assert error.type == "invalid_request_error" and error.code == code and error.param == param and error.request_id


def test_timeouts_and_streams_that_are_left(live: Running, live_client: OpenAI) -> None:
    long: dict[str, Any] = {"model": "demo", "prompt": STORY, "extra_body": {"ignore_eos": True}}
    with pytest.raises(openai.APITimeoutError):
        live_client.with_options(timeout=0.05).completions.create(max_tokens=480, n=16, temperature=1.0, **long)
    eventually(lambda: used(live) == 0)
    stream = live_client.completions.create(max_tokens=480, stream=True, **long)
    assert next(stream).choices
    stream.close()
    eventually(lambda: used(live) == 0)
    with pytest.raises(openai.APIConnectionError):
        OpenAI(base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=0).models.list()


def test_async_client(live: Running) -> None:
    """Many at once, each with its own answer; those that are cancelled leave nothing behind."""

    async def all_of_it() -> None:
        http = httpx.AsyncClient(trust_env=False, limits=httpx.Limits(max_connections=40))
        async with AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=60, http_client=http) as client:

            async def count(i: int) -> str:
                prompt = f"{i} and {i + 1} and"
                stream = await client.completions.create(model="demo", prompt=prompt, max_tokens=8, temperature=0, stream=True)
                streamed = "".join([chunk.choices[0].text async for chunk in stream])
                whole = await client.completions.create(model="demo", prompt=prompt, max_tokens=8, temperature=0)
                assert streamed == whole.choices[0].text
                return streamed

            assert len(set(await asyncio.gather(*map(count, range(12))))) > 6
            body: dict[str, Any] = {"model": "demo", "messages": HELLO, "extra_body": {"ignore_eos": True}}
            tasks = [asyncio.create_task(client.chat.completions.create(max_tokens=480, **body)) for _ in range(8)]
            await asyncio.sleep(0.2)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(all_of_it())
    eventually(lambda: used(live) == 0)


def test_as_lm_eval_asks(live: Running) -> None:
    """A batch of token ids, echo, one token more than is wanted; it slices behind the context, and the last token off."""
    with live.http as http:
        info = http.get("/tokenizer_info").json()
        assert info["eos_token"] == "<|end|>" and info["chat_template"].startswith("<|bos|>") and info["tokenizer_class"]
        context, rest = ("<|bos|><|user|>2 + 3 = ?<|end|><|assistant|>", "2 plus 3 is 5.")
        ask = {"add_special_tokens": False}
        head, tail = (http.post("/tokenize", json={"prompt": text, **ask}).json()["tokens"] for text in (context, rest))
        other = http.post("/tokenize", json={"prompt": "2 plus 3 is 7.", **ask}).json()["tokens"]
        body = {
            "model": "demo",
            "prompt": [head + tail, head + other],
            "echo": True,
            "logprobs": 1,
            "max_tokens": 1,
            "seed": 1234,
        }
        choices = http.post("/v1/completions", json={**body, "temperature": 0}).json()["choices"]
        exact = http.post("/v1/completions", json={"prompt": head + tail, "prompt_logprobs": 0, "max_tokens": 1}).json()[
            "choices"
        ]
    sums, greedy = [], []
    for choice in sorted(choices, key=lambda one: one["index"]):
        found = {name: values[len(head) : -1] for name, values in choice["logprobs"].items()}
        sums.append(sum(found["token_logprobs"]))
        greedy.append(all(name == max(top, key=top.get) for name, top in zip(found["tokens"], found["top_logprobs"])))
    assert greedy == [True, False] and sums[0] > -1 > sums[1]
    scored = [next(iter(one.values()))["logprob"] for one in exact[0]["prompt_logprobs"][len(head) :]]
    assert sums[0] == pytest.approx(sum(scored), abs=1e-3)


def test_everything_was_as_openai_describes_it(description: Description) -> None:
    """The last test of this file: that there was something to validate."""
    if description.components is None:
        pytest.skip("no real data: OpenAI's description is absent")
    assert Counter(description.seen).keys() >= {
        "CreateCompletionResponse",
        "CreateChatCompletionResponse",
        "CreateChatCompletionStreamResponse",
        "ErrorResponse",
    }
