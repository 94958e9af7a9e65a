"""Errors under /v1/messages: Anthropic's form, its client's classes, and what makes it try again."""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import ErrorResponse
from pydantic import TypeAdapter

from appliance.config import EngineConfig, ServerConfig
from appliance.text.tokenizer import Tokenizer
from tests.server.conftest import Served, serve_in_thread
from tests.server.fake import FakeClient
from tests.server.test_lifecycle import eventually
from tests.server.test_messages import HELLO, TOOL, client
from tests.server.test_tools import serve
from tests.text.tool_texts import seeded

KEY = "sk-messages-messages"
ASK: dict[str, Any] = {"model": "tiny", "max_tokens": 3, "messages": HELLO}
FORM: TypeAdapter[Any] = TypeAdapter(ErrorResponse)


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("hermes"), "Hermes") as one:
        yield one


def told(response: httpx.Response, status: int, kind: str) -> str:
    """The message of an error in Anthropic's form."""
    assert response.status_code == status, response.text
    found = response.json()
    assert found.keys() == {"type", "error", "request_id"} and found["type"] == "error"
    assert found["error"].keys() == {"type", "message"} and found["error"]["type"] == kind
    assert found["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    if kind != "request_too_large" and kind != "timeout_error":
        FORM.validate_json(response.text, strict=True)
    message: str = found["error"]["message"]
    return message


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def bot(*blocks: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


USE = {"type": "tool_use", "id": "t1", "name": "f", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "t1"}
# What replaces fields of a good request, or is all of the body -> what the message begins with.
BAD: list[tuple[Any, str]] = [
    ({"model": None}, "model is required"),
    ({"model": 3}, "model: "),
    ({"max_tokens": None}, "max_tokens is required"),
    ({"max_tokens": "3"}, "max_tokens: "),
    ({"max_tokens": -1}, "max_tokens: "),
    ({"max_tokens": 1.5}, "max_tokens: "),
    ({"max_tokens": True}, "max_tokens: "),
    ({"max_tokens": float("nan")}, "max_tokens: "),
    ({"messages": None}, "messages is required"),
    ({"messages": []}, "messages must hold at least one message"),
    ({"messages": "hello"}, "messages: "),
    ({"messages": {"role": "user", "content": "x"}}, "messages: "),
    ({"messages": ["hello"]}, "messages[0]: "),
    ({"messages": [{"content": "x"}]}, "messages[0].role is required"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role: "),
    ({"messages": [{"role": "user"}]}, "messages[0].content is required"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content must be text or a list of blocks"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages[0].content is empty"),
    ({"messages": [user()]}, "messages[0].content is empty"),
    ({"messages": [user(3)]}, "messages[0].content[0] must be a block"),
    ({"messages": [user({"text": "x"})]}, "messages[0].content[0] must be a block"),
    ({"messages": [user({"type": "text"})]}, "messages[0].content[0].text must be text"),
    ({"messages": [user({"type": "text", "text": ["x"]})]}, "messages[0].content[0].text must be text"),
    ({"messages": [user({"type": "image", "source": {}})]}, "messages[0].content[0] is of type 'image'"),
    ({"messages": [user({"type": "document", "source": {}})]}, "messages[0].content[0] is of type 'document'"),
    ({"messages": [user({"type": "thinking", "thinking": "x"})]}, "messages[0].content[0] is of type 'thinking'"),
    ({"messages": [*HELLO, bot(USE)]}, "messages[1] ends with tool_use"),
    ({"messages": [*HELLO, bot({**USE, "input": "x"}), user(RESULT)]}, "messages[1].content[0].input must be an object"),
    ({"messages": [*HELLO, bot({**USE, "id": None}), user(RESULT)]}, "messages[1].content[0].id must be text"),
    ({"messages": [*HELLO, bot({**USE, "name": ""}), user(RESULT)]}, "messages[1].content[0].name must be text"),
    ({"messages": [user(RESULT)]}, "messages[0].content[0].tool_use_id is 't1', and no tool_use"),
    (
        {"messages": [*HELLO, bot(USE), user({**RESULT, "content": [{"type": "image"}]})]},
        "messages[2].content[0].content[0] is of type 'image'",
    ),
    ({"messages": [*HELLO, bot(USE), user({**RESULT, "content": 3})]}, "messages[2].content[0].content must be text"),
    ({"messages": [*HELLO, bot({"type": "thinking", "thinking": 3}), *HELLO]}, "messages[1].content[0].thinking must be text"),
    ({"messages": [*HELLO, bot({"type": "thinking", "thinking": "x"})]}, "messages[1] ends with thinking"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages must hold at least one message"),
    ({"messages": [{"role": "assistant", "content": ""}]}, "messages must hold at least one message"),
    ({"system": 3}, "system must be text or a list of blocks"),
    ({"system": [{"type": "image"}]}, "system[0] is of type 'image'"),
    ({"temperature": -1}, "temperature "),
    ({"temperature": float("nan")}, "temperature "),
    ({"temperature": "hot"}, "temperature: "),
    ({"top_p": 0}, "top_p "),
    ({"top_p": float("inf")}, "top_p "),
    ({"top_k": -5}, "top_k "),
    ({"top_k": 1e30}, "top_k: "),
    ({"stop_sequences": "x"}, "stop_sequences: "),
    ({"stop_sequences": [""]}, "stop_sequences holds an empty text"),
    ({"stop_sequences": [3]}, "stop_sequences[0]: "),
    ({"stream": "yes"}, "stream: "),
    ({"tools": {}}, "tools: "),
    ({"tools": ["f"]}, "tools[0]: "),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema must be a JSON schema"),
    ({"tools": [{"input_schema": {}}]}, "tools[0].name must be text"),
    ({"tools": [{"name": "f", "input_schema": {"type": "array"}}]}, "tools[0].input_schema must be a JSON schema"),
    ({"tools": [{"name": "f", "input_schema": {}, "description": 3}]}, "tools[0].description must be text"),
    ({"tools": [TOOL, TOOL]}, "tools[1].name is that of another tool, too"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0] is of type 'web_search_20250305'"),
    ({"tools": [TOOL, {"type": "bash_20250124", "name": "bash"}]}, "tools[1] is of type 'bash_20250124'"),
    ({"tools": [{**TOOL, "input_schema": {"properties": 3}}], "tool_choice": {"type": "any"}}, "tools: "),
    ({"tool_choice": "auto"}, "tool_choice: "),
    ({"tool_choice": {"type": "must"}}, "tool_choice.type: "),
    ({"tool_choice": {"type": "any"}}, "tool_choice 'any' needs tools"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name is required"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice.name is 'g', tools are: weather"),
    ({"thinking": True}, "thinking: "),
    ({"thinking": {"type": "on"}}, "thinking.type: "),
    ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens: "),
    ({"output_config": {"format": {"type": "regex"}}}, "output_config.format.type: "),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema is required"),
    (
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "colour"}}}},
        "output_config.format.schema cannot be served",
    ),
    ({"mcp_servers": [{"url": "x"}]}, "mcp_servers: "),
    ({"container": "c1"}, "container: "),
    ({"n": 2}, "n: "),
    ({"logprobs": True}, "logprobs: "),
    ({"seed": "x"}, "seed: "),
    ({"mirostat": 2}, "mirostat: "),
    ({"chat_template_kwargs": "x", "thinking": {"type": "disabled"}}, "chat_template_kwargs: "),
    (
        {"output_config": {"format": {"type": "json_schema", "schema": {}}}, "guided_regex": "a"},
        "output_config.format and guided_regex both say",
    ),
    ({"messages": [user({"type": "tool_result", "tool_use_id": []})]}, "messages[0].content[0].tool_use_id is []"),
    ({"messages": [user({"type": "text", "text": "a" * 20000})]}, "prompt is too long: "),
    (b"", "the body is not JSON"),
    (b"{", "the body is not JSON"),
    (b"[]", "the body must be a JSON object"),
    (b"null", "the body must be a JSON object"),
    (b"\xff\xfe", "the body is not JSON"),
    (b'{"model": "\\ud800"}', "the body is not JSON"),
    (b'{"model":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "the body is not JSON"),
]


@pytest.mark.parametrize(("wrong", "begins"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_requests(hermes: Served, wrong: Any, begins: str) -> None:
    body = wrong if isinstance(wrong, bytes) else json.dumps({**ASK, **wrong}).encode()
    before = len(hermes.client.submitted)
    with hermes.http as http:
        assert told(http.post("/v1/messages", content=body), 400, "invalid_request_error").startswith(begins)
    assert len(hermes.client.submitted) == before


GOOD: dict[str, Any] = {
    **ASK,
    "system": [{"type": "text", "text": "S", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        user({"type": "text", "text": "hi"}),
        bot({"type": "thinking", "thinking": "x", "signature": "thinking:eA=="}, {"type": "redacted_thinking", "data": "q"}, USE),
        user(
            {
                **RESULT,
                "is_error": True,
                "content": [{"type": "text", "text": "r"}, {"type": "tool_reference", "tool_name": "f"}],
            },
            {"type": "search_result", "title": "T", "source": "s", "content": [{"type": "text", "text": "z"}]},
        ),
        {"role": "system", "content": "note"},
    ],
    "tools": [{**TOOL, "defer_loading": False}],
    "tool_choice": {"type": "any", "disable_parallel_tool_use": False},
    "thinking": {"type": "enabled", "budget_tokens": 1024, "display": "omitted"},
    "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
    "stop_sequences": ["zz"],
    "metadata": {"user_id": "u"},
    "logit_bias": {"5": 1},
    "chat_template_kwargs": {"think": False},
    "cache_salt": "s",
}
SCRAPS: list[Any] = [
    *(None, True, False, 0, -1, 3.5, 1e308, 10**30, float("nan"), float("inf")),
    *("", "x", "text", "tool_use", "tool_result", "thinking", "image", "user", "assistant", "system", "any", "\x00", "a" * 5000),
    *([], [[]], [None], ["a"], {}, {"type": "text"}, [{"type": "text", "text": "q"}], {"type": "object"}, {"a": {"b": [1]}}),
]


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where there are values, as the keys on the way."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*here, key)
        yield from places(inner, (*here, key))


def mutated(rng: random.Random) -> dict[str, Any]:
    body = copy.deepcopy(GOOD)
    for _ in range(rng.choice([1, 1, 2, 3])):
        *way, key = rng.choice([*places(body)])
        inner: Any = body
        for step in way:
            inner = inner[step]
        if rng.random() < 0.8:
            inner[key] = copy.deepcopy(rng.choice(SCRAPS))
        else:
            del inner[key]
    return body


def test_no_request_is_too_bad(hermes: Served) -> None:
    """Anything anywhere in a request that has it all: it is served, or refused in the right form."""
    seen: dict[int, int] = {}
    with hermes.http as http:
        for rng in seeded(250, "mutated"):
            response = http.post(rng.choice(["/v1/messages", "/v1/messages/count_tokens"]), content=json.dumps(mutated(rng)))
            seen[response.status_code] = seen.get(response.status_code, 0) + 1
            if response.status_code != 200:
                told(response, response.status_code, {404: "not_found_error"}.get(response.status_code, "invalid_request_error"))
    assert seen.keys() <= {200, 400, 404} and min(seen[200], seen[400]) > 50


def test_bad_counts(hermes: Served) -> None:
    for wrong in ({"messages": []}, {"tools": [{"name": "f"}]}, {"messages": [user({"type": "image"})]}, {"seed": "x"}):
        message = told(hermes.post("/v1/messages/count_tokens", **{**ASK, **wrong}), 400, "invalid_request_error")
        assert message.startswith(next(iter(wrong)))


def test_classes_of_the_client(hermes: Served) -> None:
    api = client(hermes)
    with pytest.raises(anthropic.NotFoundError) as unknown:
        api.messages.create(model="claude-haiku", max_tokens=3, messages=HELLO)
    assert unknown.value.type == "not_found_error" and "tiny" in str(unknown.value) and unknown.value.request_id
    with pytest.raises(anthropic.BadRequestError) as bad:
        api.messages.create(model="tiny", max_tokens=-1, messages=HELLO)
    assert bad.value.type == "invalid_request_error" and str(bad.value.api_message).startswith("max_tokens")
    with hermes.http as http:
        told(http.get("/v1/messages"), 405, "invalid_request_error")
        told(http.get("/v1/messages/batches"), 404, "not_found_error")
        told(http.post("/v1/messages/batches", json={}), 404, "not_found_error")
        told(http.post("/v1/messages", content=b" " * (33 << 20)), 413, "request_too_large")
        told(http.post("/v1/messages", headers={f"x-{i}": "y" for i in range(120)}), 431, "invalid_request_error")
        assert http.get("/v1/nothing").json()["error"].keys() == {"message", "type", "param", "code"}  # the others' form
        assert "request-id" not in http.get("/v1/models").headers


def test_what_fails_on_the_way(slow: Served) -> None:
    slow.client.fail_at = 3
    api = client(slow)
    with pytest.raises(anthropic.InternalServerError) as whole:
        api.messages.create(model="tiny", max_tokens=9, messages=HELLO)
    assert whole.value.type == "api_error" and whole.value.status_code == 500
    with (
        pytest.raises(anthropic.APIStatusError, match="the step failed") as streamed,
        api.messages.stream(model="tiny", max_tokens=9, messages=HELLO) as stream,
    ):
        stream.until_done()
    assert streamed.value.type == "api_error"
    raw = slow.post("/v1/messages", **{**ASK, "max_tokens": 9}, stream=True)
    *_, last, end = raw.text.split("\n\n")
    name, data = last.split("\n")
    error = json.loads(data.removeprefix("data: "))
    assert end == "" and name == "event: error" and error["request_id"] == raw.headers["request-id"]
    slow.client.fail_at = 0  # before there is anything to send
    told(slow.post("/v1/messages", **ASK, stream=True), 500, "api_error")
    slow.client.fail_at = None
    slow.run(slow.client.die, "gone")
    with pytest.raises(anthropic.ServiceUnavailableError) as dead:
        api.messages.create(model="tiny", max_tokens=3, messages=HELLO)
    assert dead.value.type == "overloaded_error" and dead.value.response.headers["retry-after"]


def test_a_model_that_is_loading(tokenizer: Tokenizer, model_dir: Path) -> None:
    config = ServerConfig(served_model_name=("tiny",))
    with serve_in_thread(lambda: FakeClient(state="loading"), tokenizer, EngineConfig(model=str(model_dir)), config) as one:
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            response = one.post(path, **ASK)
            assert "loading" in told(response, 503, "overloaded_error") and response.headers["retry-after"]


@pytest.fixture
def guarded(tokenizer: Tokenizer, model_dir: Path, tmp_path: Path) -> Iterator[Served]:
    """With two keys, one of which may ask one thing at a time."""
    file = tmp_path / "keys.toml"
    digest = sha256(KEY.encode()).hexdigest()
    file.write_text(f'meek = {{ sha256 = "{digest}", concurrency = 1 }}\n')
    config = ServerConfig(served_model_name=("tiny",), api_key=("sk-free-free-free",), api_key_file=str(file))
    with serve_in_thread(lambda: FakeClient(delay_s=0.02), tokenizer, EngineConfig(model=str(model_dir)), config) as one:
        yield one


def test_keys_and_their_limits(guarded: Served) -> None:
    for options in ({"api_key": "sk-free-free-free"}, {"api_key": None, "auth_token": "sk-free-free-free"}):
        assert client(guarded, **options).messages.create(**ASK).usage.output_tokens == 3
    with pytest.raises(anthropic.AuthenticationError) as refused:
        client(guarded, api_key="sk-wrong").messages.create(**ASK)
    assert refused.value.type == "authentication_error" and "sk-wrong" not in str(refused.value)
    told(guarded.post("/v1/messages/count_tokens", **ASK), 401, "authentication_error")
    api = client(guarded, api_key=KEY)
    with api.messages.stream(**{**ASK, "max_tokens": 100}, extra_body={"ignore_eos": True}) as stream:
        next(iter(stream))
        with pytest.raises(anthropic.RateLimitError) as limited:
            client(guarded, api_key=KEY).messages.create(**ASK)
        assert limited.value.type == "rate_limit_error" and limited.value.response.headers["retry-after"] == "1"
    eventually(lambda: not guarded.state.jobs)
    assert api.messages.create(**ASK).stop_reason == "max_tokens"


def test_clients_try_again(guarded: Served) -> None:
    """After the time that the answer says: by then the one request that the key may have has gone."""
    answers: list[tuple[int, float]] = []
    with httpx.Client(base_url=guarded.url, trust_env=False, headers={"x-api-key": KEY}) as http:
        body = {**ASK, "max_tokens": 400, "stream": True, "ignore_eos": True}
        with http.stream("POST", "/v1/messages", json=body) as first:
            events = first.iter_text()
            assert next(events).startswith("event: message_start")

            def heard(response: Any) -> None:
                first.close()
                eventually(lambda: not guarded.state.jobs)
                answers.append((response.status_code, time.monotonic()))

            hooked = anthropic.DefaultHttpxClient(trust_env=False, event_hooks={"response": [heard]})
            api = client(guarded, api_key=KEY, max_retries=2, http_client=hooked)
            assert api.messages.create(**ASK).stop_reason == "max_tokens"
    (_, refused), (_, answered) = answers
    assert [status for status, _ in answers] == [429, 200] and 1 <= answered - refused < 10


def test_too_much_to_do(tokenizer: Tokenizer, model_dir: Path) -> None:
    """Anthropic's own status says so, by which its client tries again."""
    config = ServerConfig(served_model_name=("tiny",), max_num_queued_reqs=0)
    with serve_in_thread(FakeClient, tokenizer, EngineConfig(model=str(model_dir)), config) as one:
        with pytest.raises(anthropic.OverloadedError) as busy:
            client(one).messages.create(**ASK)
        assert busy.value.type == "overloaded_error" and busy.value.response.headers["retry-after"] == "5"
        assert one.post("/v1/chat/completions", messages=HELLO).status_code == 503
