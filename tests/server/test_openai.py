"""OpenAI's own client, and OpenAI's own description of the answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from appliance.server import respond
from appliance.server.fields import HARMLESS, REFUSED
from appliance.server.responses import schemas as responses
from appliance.server.schemas import ChatRequest, CompletionRequest
from tests.server.conftest import Served
from tests.server.responses import CALL_OF_ROME, say, told
from tests.server.responses import TOOL as FUNCTION
from tests.server.test_completions import events
from tests.server.test_tools import TOOL, serve
from tests.text.harmony_texts import CALLS, NEXT, SAID, TEMPLATE, THOUGHT

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def test_models(served: Served) -> None:
    client = served.openai
    assert [m.id for m in client.models.list()] == ["tiny", "alias/of-tiny"]
    assert client.models.retrieve("alias/of-tiny").id == "alias/of-tiny"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nothing")
    assert caught.value.code == "model_not_found"


def test_completions(served: Served) -> None:
    answer = served.openai.completions.create(model="tiny", prompt="hello", max_tokens=4, logprobs=1, echo=True)
    assert answer.choices[0].text == "hello" + "hel" and answer.usage and answer.usage.total_tokens == 10
    assert answer.choices[0].logprobs and answer.choices[0].logprobs.tokens and len(answer.choices[0].logprobs.tokens) == 10
    chunks = list(served.openai.completions.create(model="tiny", prompt="hello", max_tokens=4, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == "hel" and chunks[-1].choices[0].finish_reason == "length"


def test_chat(served: Served) -> None:
    answer = served.openai.chat.completions.create(
        model="tiny", messages=HELLO, max_completion_tokens=5, logprobs=True, user="me"
    )
    assert answer.choices[0].message.content == "user" and answer.choices[0].message.role == "assistant"
    assert answer.choices[0].logprobs and answer.choices[0].logprobs.content and len(answer.choices[0].logprobs.content) == 5
    stream = served.openai.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "user"
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == 5 and not chunks[-1].choices


def test_errors(slow: Served) -> None:
    client = slow.openai
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, temperature=-1)
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a" * 1000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")
    slow.client.fail_at = 3
    with pytest.raises(openai.APIError, match="the step failed"):
        list(client.completions.create(model="tiny", prompt="a", stream=True))
    slow.client.fail_at = None
    slow.run(slow.client.die, "gone")
    with pytest.raises(openai.InternalServerError) as dead:
        client.completions.create(model="tiny", prompt="a")
    assert dead.value.status_code == 503


def test_what_is_not_served_is_refused_by_name(served: Served) -> None:
    client = served.openai
    calls: list[tuple[str, Any]] = [
        ("moderation is not done", lambda: client.moderations.create(input="hello")),
        ("images are not made", lambda: client.images.generate(prompt="hello")),
        ("audio is neither", lambda: client.audio.speech.create(model="tiny", voice="alloy", input="hello")),
        ("no files are kept", lambda: client.files.list()),
        ("previous_response_id", lambda: client.conversations.create()),
        ("texts are not ranked", lambda: client.post("/rerank", cast_to=object, body={})),
    ]
    for says, call in calls:
        with pytest.raises(openai.NotFoundError, match=says) as caught:
            call()
        assert caught.value.code == "not_found" and caught.value.type == "invalid_request_error"
    for path, says in (("/api/chat", "Ollama"), ("/completion", "/v1/completions"), ("/embedding", "/v1/embeddings")):
        answer = served.post(path)
        assert answer.status_code == 404 and says in answer.json()["error"]["message"]


# vLLM's fields beside OpenAI's, of completions and of chat.
EXTRA = """\
use_beam_search top_k min_p repetition_penalty length_penalty stop_token_ids include_stop_str_in_output ignore_eos
min_tokens skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side allowed_token_ids
prompt_logprobs logprob_token_ids bad_words add_special_tokens response_format structured_outputs priority request_id
stream_interval return_tokens_as_token_ids return_token_ids cache_salt vllm_xargs repetition_detection
thinking_token_budget
"""
EXTRA_OF_CHAT = """\
echo add_generation_prompt continue_final_message documents chat_template chat_template_kwargs include_reasoning
mm_processor_kwargs media_io_kwargs
"""


@pytest.mark.realdata
def test_no_field_is_unknown(schemas: Any) -> None:
    """Each of OpenAI's fields and of vLLM's is served, harmless, or refused by name."""

    def properties(node: Any) -> set[str]:
        if "$ref" in node:
            return properties(components[node["$ref"].rpartition("/")[2]])
        return {*node.get("properties", ())}.union(*map(properties, node.get("allOf", ())))

    components = schemas("Model").schema["components"]["schemas"]
    known = HARMLESS | REFUSED.keys()
    completion, chat = properties(components["CreateCompletionRequest"]), properties(components["CreateChatCompletionRequest"])
    assert len(completion) == 18 and len(chat) >= 35
    assert {*completion, *EXTRA.split()} <= CompletionRequest.model_fields.keys() | known
    assert {*chat, *EXTRA.split(), *EXTRA_OF_CHAT.split()} <= ChatRequest.model_fields.keys() | known
    here = known | responses.HARMLESS | responses.REFUSED_HERE.keys()
    assert properties(components["CreateResponse"]) <= responses.ResponsesRequest.model_fields.keys() | here
    count = properties(components["TokenCountsBody"])
    assert count <= responses.InputTokensRequest.model_fields.keys() | here, count


def test_streams_that_are_silent_say_that_they_live(slow: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first token and between two; OpenAI's client does not notice."""
    monkeypatch.setattr(respond, "OPENAI", replace(respond.OPENAI, quiet_s=0.02))
    slow.client.delay_s = 0.15
    for path, body in (("/v1/completions", {"prompt": "hello"}), ("/v1/chat/completions", {"messages": HELLO})):
        lines = slow.post(path, **body, max_tokens=4, stream=True).text.split("\n\n")
        assert lines[0] == ": ping" and lines[-2] == "data: [DONE]"
        chunks = [i for i, line in enumerate(lines) if line.startswith("data: {")]
        assert ": ping" in lines[chunks[0] : chunks[-1]]
    slow.client.fail_at = 0
    failed = slow.post("/v1/completions", prompt="hello", stream=True)
    assert failed.status_code == 200 and events(failed.text.replace(": ping\n\n", ""))[-1]["error"]["code"] == "engine_error"
    slow.client.fail_at = None
    stream = slow.openai.completions.create(model="tiny", prompt="hello", max_tokens=3, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "he"


def nullable(node: Any) -> Any:
    """OpenAPI's ``nullable: true`` in JSON schema's words."""
    if isinstance(node, list):
        return [nullable(one) for one in node]
    if not isinstance(node, dict):
        return node
    node = {key: nullable(value) for key, value in node.items()}
    return {"anyOf": [node, {"type": "null"}]} if node.get("nullable") is True else node


@pytest.fixture(scope="module")
def schemas(shared_data: Path) -> Any:
    """From the name of one of OpenAI's schemas to its validator."""
    yaml, jsonschema = pytest.importorskip("yaml"), pytest.importorskip("jsonschema")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    components = nullable(yaml.load((shared_data / "openai" / "openapi.yaml").read_text(), Loader=loader)["components"])
    return lambda name: jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": components})


@pytest.mark.realdata
def test_answers_are_as_openai_describes_them(served: Served, schemas: Any) -> None:
    chat = {"messages": HELLO, "max_tokens": 3, "logprobs": True, "top_logprobs": 2, "n": 2}
    with served.http as http:
        schemas("ListModelsResponse").validate(http.get("/v1/models").json())
        schemas("Model").validate(http.get("/v1/models/tiny").json())
    schemas("CreateChatCompletionResponse").validate(served.post("/v1/chat/completions", **chat).json())
    schemas("CreateCompletionResponse").validate(served.post("/v1/completions", prompt="ab", max_tokens=3, logprobs=2).json())
    for options in ({"include_usage": True}, {"include_usage": False}):
        text = served.post("/v1/chat/completions", **chat, stream=True, stream_options=options).text
        for chunk in events(text):
            schemas("CreateChatCompletionStreamResponse").validate(chunk)
    schemas("ErrorResponse").validate(served.post("/v1/completions", prompt="a", n=0).json())


# A template (None: the usual one of tests), and an answer with everything in it.
KINDS = {
    "Hermes": (None, f"<think>Hm.</think>Hi {CALL_OF_ROME}"),
    "Harmony": (
        TEMPLATE,
        f'{THOUGHT}Hm.{NEXT}{SAID}Hi{NEXT}{CALLS[0] % "weather"}{{"city": "Rome"}}',
    ),
}


@pytest.mark.realdata
@pytest.mark.parametrize("kind", KINDS)
def test_calls_are_as_openai_describes_them(schemas: Any, tmp_path: Path, kind: str) -> None:
    source, text = KINDS[kind]
    with serve(tmp_path, kind, source) as one:
        one.client.say(text)
        body = {"messages": HELLO, "tools": [TOOL], "n": 2}
        answer = one.post("/v1/chat/completions", **body).json()
        assert answer["choices"][1]["message"]["tool_calls"]
        schemas("CreateChatCompletionResponse").validate(answer)
        for chunk in events(one.post("/v1/chat/completions", **body, stream=True).text):
            schemas("CreateChatCompletionStreamResponse").validate(chunk)


EVENTS = {
    "response.created": "ResponseCreatedEvent",
    "response.in_progress": "ResponseInProgressEvent",
    "response.output_item.added": "ResponseOutputItemAddedEvent",
    "response.output_item.done": "ResponseOutputItemDoneEvent",
    "response.content_part.added": "ResponseContentPartAddedEvent",
    "response.content_part.done": "ResponseContentPartDoneEvent",
    "response.output_text.delta": "ResponseTextDeltaEvent",
    "response.output_text.done": "ResponseTextDoneEvent",
    "response.reasoning_text.delta": "ResponseReasoningTextDeltaEvent",
    "response.reasoning_text.done": "ResponseReasoningTextDoneEvent",
    "response.function_call_arguments.delta": "ResponseFunctionCallArgumentsDeltaEvent",
    "response.function_call_arguments.done": "ResponseFunctionCallArgumentsDoneEvent",
    "response.completed": "ResponseCompletedEvent",
    "response.incomplete": "ResponseIncompleteEvent",
    "response.failed": "ResponseFailedEvent",
}


@pytest.mark.realdata
@pytest.mark.parametrize("kind", KINDS)
def test_responses_are_as_openai_describes_them(schemas: Any, tmp_path: Path, kind: str) -> None:
    """Every event, every item, and what is kept."""
    source, text = KINDS[kind]
    with serve(tmp_path, kind, source) as one:
        check_responses(one, schemas, text)


def check_responses(served: Served, schemas: Any, text: str) -> None:
    say(served, text)
    validators = {kind: schemas(name) for kind, name in EVENTS.items()}
    seen = set()
    for body in ({}, {"max_output_tokens": 30}, {"top_logprobs": 2, "include": ["message.output_text.logprobs"], "user": "me"}):
        body = {"input": "hello", "tools": [FUNCTION], "instructions": "Be kind.", **body}
        whole = served.post("/v1/responses", **body).json()
        schemas("Response").validate(whole)
        for event in told(served.post("/v1/responses", **body, stream=True).text):
            validators[event["type"]].validate(event)
            seen.add(event["type"])
    assert seen == EVENTS.keys() - {"response.failed"}
    call = next(item for item in whole["output"] if item["type"] == "function_call")
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": [{"type": "input_text", "text": "sun"}]}
    on = served.post("/v1/responses", input=[result], previous_response_id=whole["id"]).json()
    with served.http as http:
        items = http.get(f"/v1/responses/{on['id']}/input_items", params={"limit": 100}).json()
        schemas("ErrorResponse").validate(http.get("/v1/responses/none").json())
    assert [item["type"] for item in items["data"]] == [
        "function_call_output",
        "function_call",
        "message",
        "reasoning",
        "message",
    ]
    schemas("ResponseItemList").validate(items)
    schemas("TokenCountsResource").validate(served.post("/v1/responses/input_tokens", input="hello").json())
