"""POST /v1/messages by Anthropic's own client, over an engine that says what it is told to say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import BaseModel, TypeAdapter

from tests.server.conftest import Served
from tests.server.test_lifecycle import eventually
from tests.server.test_tools import prompt_of, serve

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL: dict[str, Any] = {"name": "weather", "description": "Of a city.", "input_schema": SCHEMA}
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
# Of each type of delta: the type of the blocks that it is for, and the key of its text.
DELTAS = {
    "text_delta": ("text", "text"),
    "thinking_delta": ("thinking", "thinking"),
    "signature_delta": ("thinking", "signature"),
    "input_json_delta": ("tool_use", "partial_json"),
}


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("hermes"), "Hermes") as one:
        yield one


def client(served: Served, **options: Any) -> anthropic.Anthropic:
    return connected(served.url, **options)


@cache  # making one takes longer than most requests
def connected(url: str, **options: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(**{"base_url": url, "api_key": "none", "max_retries": 0, "timeout": 20, **options})


def known(found: Any) -> None:
    """All fields are of the client's own models, and what must be there is there."""
    if isinstance(found, BaseModel):
        assert not found.model_extra, found
        for name in type(found).model_fields:
            known(getattr(found, name))
    elif isinstance(found, list):
        for one in found:
            known(one)


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream, each checked: its name, its shape, and that it comes at its time."""
    *blocks, rest = text.split("\n\n")
    assert rest == ""
    found, open_block, count = [], None, 0
    for block in blocks:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] == "ping":
            continue
        checked = EVENT.validate_json(data.removeprefix("data: "), strict=True)
        known(checked)
        assert checked.to_dict() == event
        match event["type"]:
            case "content_block_start":
                assert open_block is None and event["index"] == count
                open_block = event["content_block"]["type"]
            case "content_block_delta":
                kind, key = DELTAS[event["delta"]["type"]]
                assert event["index"] == count and open_block == kind and event["delta"][key]
            case "content_block_stop":
                assert event["index"] == count and open_block is not None
                open_block, count = None, count + 1
            case _:
                assert open_block is None
        found.append(event)
    kinds = [event["type"] for event in found if not event["type"].startswith("content_block")]
    assert kinds == ["message_start", "message_delta", "message_stop"]
    assert found[0]["type"] == "message_start" and found[-1]["type"] == "message_stop"
    return found


def plain(message: dict[str, Any]) -> dict[str, Any]:
    """Without what is another one in each answer, and without fields that only the client puts there."""
    content = [{key: value for key, value in block.items() if not (key == "id" or value is None)} for block in message["content"]]
    return {**{k: v for k, v in message.items() if k not in ("id", "stop_details")}, "content": content}


def ask(served: Served, **body: Any) -> dict[str, Any]:
    """The message: whole, streamed as the client adds it up, and the sum of all events, which must agree but for ids."""
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 1000, **body}
    response = served.post("/v1/messages", **body)
    assert response.status_code == 200, response.text
    whole: dict[str, Any] = response.json()
    checked = Message.model_validate_json(response.text, strict=True)
    known(checked)
    assert checked.to_dict() == whole and whole["id"].startswith("msg_")
    events = events_of(served.post("/v1/messages", **body, stream=True).text)
    inputs: dict[int, str] = {}
    for event in events:
        if event["type"] == "content_block_delta" and "partial_json" in event["delta"]:
            inputs[event["index"]] = inputs.get(event["index"], "") + event["delta"]["partial_json"]
    for i, block in enumerate(whole["content"]):
        assert block["type"] != "tool_use" or json.loads(inputs[i]) == block["input"]
    extra = {key: value for key, value in body.items() if key not in ("model", "messages", "max_tokens")}
    with client(served).messages.stream(**{k: v for k, v in body.items() if k not in extra}, extra_body=extra) as stream:
        streamed = stream.get_final_message().to_dict()
    assert plain(streamed) == plain(whole)
    return whole


def said(message: dict[str, Any], kind: str = "text") -> list[Any]:
    """What blocks of a type say."""
    return [
        block[{"text": "text", "thinking": "thinking", "tool_use": "input"}[kind]]
        for block in message["content"]
        if block["type"] == kind
    ]


def test_text_stream_and_events(hermes: Served) -> None:
    hermes.client.say("<think>\nHm.\n</think>\n\nHello there")  # type: ignore[attr-defined]
    with client(hermes).messages.stream(model="tiny", max_tokens=100, messages=HELLO) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(pieces) == "Hello there" and len(pieces) > 1
    assert said(final.to_dict(), "thinking") == ["Hm."] and stream.response.headers["request-id"]
    raw = hermes.post("/v1/messages", model="tiny", max_tokens=100, messages=HELLO, stream=True)
    assert raw.headers["content-type"].startswith("text/event-stream") and "event: ping" in raw.text and "[DONE]" not in raw.text
    start, *_, delta, _ = events_of(raw.text)
    assert start["message"]["stop_reason"] is None and start["message"]["content"] == []
    assert delta["usage"]["output_tokens"] > start["message"]["usage"]["output_tokens"]
    assert raw.headers["request-id"] == raw.headers["x-request-id"] == start["message"]["id"].removeprefix("msg_")


def test_thinking(hermes: Served) -> None:
    """What is sent back, signed, is there in the next turn, also where it was not shown; other servers' signatures do."""
    hermes.client.say("<think>\nHm.\n</think>\n\nYes.")  # type: ignore[attr-defined]
    on = {"type": "enabled", "budget_tokens": 1024}
    for display in ("summarized", "omitted"):
        message = ask(hermes, thinking={**on, "display": display})
        block = message["content"][0]
        assert (block["thinking"] == "Hm.") == (display == "summarized") and block["signature"] and said(message) == ["Yes."]
        assert 0 < message["usage"]["output_tokens_details"]["thinking_tokens"] < message["usage"]["output_tokens"]
        ask(hermes, messages=[*HELLO, {"role": "assistant", "content": message["content"]}, *HELLO])
        assert "<think>Hm.</think>Yes." in prompt_of(hermes)
    foreign = [{"type": "thinking", "thinking": "Oh.", "signature": "EqQB"}, {"type": "redacted_thinking", "data": "x"}]
    ask(hermes, messages=[*HELLO, {"role": "assistant", "content": [*foreign, {"type": "text", "text": "No."}]}, *HELLO])
    assert "<think>Oh.</think>No." in prompt_of(hermes)
    cut_off = ask(hermes, chat_template_kwargs={"think": True}, max_tokens=2)
    assert [b["type"] for b in cut_off["content"]] == ["thinking"] and cut_off["stop_reason"] == "max_tokens"


def test_thinking_reaches_the_template(tmp_path: Path) -> None:
    shows = "{{ enable_thinking }} {{ thinking }} {{ reasoning_effort }}|{{ messages[-1].content }}"
    with serve(tmp_path, "Hermes", tool_call_parser="hermes") as one:
        one.state.tokenizer._chat._sources["default"] = shows
        for thinking, seen in (
            ({"type": "enabled", "budget_tokens": 2000}, "True True "),
            ({"type": "disabled"}, "False False "),
            ({"type": "adaptive"}, "  "),
            (None, "  "),
        ):
            ask(one, thinking=thinking, output_config={"effort": "low"})
            assert prompt_of(one).startswith(f"{seen}low|")
        ask(one, thinking={"type": "disabled"}, chat_template_kwargs={"enable_thinking": True})
        assert prompt_of(one).startswith("True False ")


def test_how_an_answer_ends(hermes: Served) -> None:
    hermes.client.say("one two three")  # type: ignore[attr-defined]
    message = ask(hermes, stop_sequences=["three", " two"])
    assert (said(message), message["stop_reason"], message["stop_sequence"]) == (["one"], "stop_sequence", " two")
    message = ask(hermes, max_tokens=3)
    assert (said(message), message["stop_reason"], message["stop_sequence"]) == (["one"], "max_tokens", None)
    assert message["usage"]["output_tokens"] == 3
    message = ask(hermes, max_tokens=100_000)  # more than there is room for
    assert message["stop_reason"] == "end_turn"
    hermes.client.say("")  # type: ignore[attr-defined]
    message = ask(hermes)
    assert message["content"] == [] and message["stop_reason"] == "end_turn"
    again = [*HELLO, {"role": "assistant", "content": message["content"]}, *HELLO]
    assert ask(hermes, messages=again)["stop_reason"] == "end_turn"  # what we say we also take


def test_the_context_is_full(served: Served) -> None:
    """More tokens may be asked for than there is room for; a prompt that has no room is told as Anthropic tells it."""
    message = ask(served, max_tokens=100_000, ignore_eos=True)
    total = message["usage"]["input_tokens"] + message["usage"]["output_tokens"]
    assert message["stop_reason"] == "model_context_window_exceeded" and total == 512
    for size in (495, 600, 9000):
        with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 512 maximum"):
            client(served).messages.create(model="tiny", max_tokens=1, messages=[{"role": "user", "content": "a" * size}])


def test_nothing_to_generate(hermes: Served) -> None:
    """max_tokens 0: the prompt is computed, so that later ones find it."""
    hermes.client.say("one two")  # type: ignore[attr-defined]
    message = ask(hermes, max_tokens=0)
    assert message["content"] == [] and message["usage"]["output_tokens"] == 0 and message["stop_reason"] == "max_tokens"


def test_prefill(hermes: Served) -> None:
    hermes.client.say(" Paris.")  # type: ignore[attr-defined]
    for content in ("It is", [{"type": "text", "text": "It is"}]):
        assert said(ask(hermes, messages=[*HELLO, {"role": "assistant", "content": content}])) == [" Paris."]
        assert prompt_of(hermes).endswith("assistant: It is")
    ask(hermes, messages=[*HELLO, {"role": "assistant", "content": ""}])  # nothing to go on with
    assert prompt_of(hermes).endswith("assistant: ")


def test_structured_output(hermes: Served) -> None:
    class City(BaseModel):
        name: str

    hermes.client.say('{"name": "Rome"}')  # type: ignore[attr-defined]
    parsed = client(hermes).messages.parse(model="tiny", max_tokens=100, messages=HELLO, output_format=City)
    assert parsed.parsed_output == City(name="Rome") and '"name"' in hermes.client.submitted[-1].params.grammar
    older = ask(hermes, output_format={"type": "json_schema", "schema": City.model_json_schema()})
    assert said(older) == ['{"name": "Rome"}'] and '"name"' in hermes.client.submitted[-1].params.grammar


def test_tokens_are_counted_once(hermes: Served) -> None:
    hermes.client.say("Yes.")  # type: ignore[attr-defined]
    asked = {"system": "Be kind.", "tools": [TOOL], "messages": [*HELLO, {"role": "assistant", "content": "It"}]}
    counted = client(hermes).messages.count_tokens(model="tiny", **asked)  # type: ignore[arg-type]
    usage = ask(hermes, **asked)["usage"]
    assert counted.input_tokens == usage["input_tokens"] == len(hermes.client.submitted[-1].prompt_token_ids)
    hermes.client.cached = 8
    usage = ask(hermes, **asked)["usage"]
    hermes.client.cached = 0
    assert usage["cache_read_input_tokens"] == 8 and usage["cache_creation_input_tokens"] == 0
    assert usage["input_tokens"] + 8 == counted.input_tokens
    long = [{"role": "user", "content": "a" * 9000}]
    assert client(hermes).messages.count_tokens(model="tiny", messages=long).input_tokens > 9000  # type: ignore[arg-type]


def test_as_claude_code_asks(hermes: Served) -> None:
    """System blocks of which the first is another one in each request, reminders within the conversation, betas, metadata."""
    hermes.client.say("Yes.")  # type: ignore[attr-defined]
    prompts = []
    for number in ("65abc", "fa690"):
        billing = f"x-anthropic-billing-header: cc_version=2.1.42.834; cc_entrypoint=cli; cch={number};"
        body = {
            "model": "tiny",
            "max_tokens": 32000,
            "stream": True,
            "system": [
                {"type": "text", "text": billing},
                {"type": "text", "text": "You are a tool.", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
                {"type": "text", "text": "\nUse it.", "cache_control": {"type": "ephemeral"}},
            ],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "<system-reminder>x</system-reminder>"}, *hello()]},
                {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {}}]},
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "is_error": True, "content": "no"}],
                },
                {"role": "system", "content": [{"type": "text", "text": "5 tokens left"}]},
            ],
            "tools": [{**TOOL, "name": name, "cache_control": {"type": "ephemeral"}} for name in ("Read", "Write")],
            "thinking": {"type": "adaptive"},
            "metadata": {"user_id": "user_1_account__session_2"},
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            "temperature": 1,
        }
        headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "claude-code-20250219,context-management-2025-06-27"}
        with hermes.http as http:
            response = http.post("/v1/messages?beta=true", json=body, headers=headers)
        assert response.status_code == 200 and events_of(response.text)[-2]["delta"]["stop_reason"] == "end_turn"
        prompts.append(prompt_of(hermes))
    assert prompts[0] == prompts[1] and "billing" not in prompts[0] and "system: You are a tool.\n\nUse it." in prompts[0]
    assert "tool: Error: no\n\n5 tokens leftassistant: " in prompts[0]


def hello() -> list[dict[str, Any]]:
    return [{"type": "text", "text": "hello", "cache_control": {"type": "ephemeral"}}]


def test_our_own_fields(hermes: Served) -> None:
    hermes.client.say("Yes.")  # type: ignore[attr-defined]
    ask(hermes, min_p=0.1, seed=5, top_k=3, top_p=0.5, temperature=0.7, repetition_penalty=1.1, cache_salt="a", ignore_eos=False)
    submit = hermes.client.submitted[-1]
    params = submit.params
    assert (params.min_p, params.seed, params.top_k, params.top_p, params.repetition_penalty) == (0.1, 5, 3, 0.5, 1.1)
    assert params.temperature == 0.7 and submit.cache_salt == "a"


def test_requests_are_aborted_by_the_id_of_their_message(slow: Served) -> None:
    api = client(slow)
    with api.messages.stream(model="tiny", max_tokens=400, messages=HELLO, extra_body={"ignore_eos": True}) as stream:
        events = iter(stream)
        start = next(events)
        assert start.type == "message_start"
        with slow.http as http:
            assert http.delete(f"/v1/requests/{start.message.id}").status_code == 200
        with pytest.raises(anthropic.APIStatusError, match="aborted"):
            list(events)
    with api.messages.stream(model="tiny", max_tokens=400, messages=HELLO, extra_body={"ignore_eos": True}) as stream:
        next(iter(stream))
        assert slow.state.jobs
    eventually(lambda: not slow.client.running and not slow.state.jobs)  # the client went away


def test_models(served: Served) -> None:
    models = client(served).models
    page = models.list()
    known(page)
    assert [one.id for one in page] == ["tiny", "alias/of-tiny"] and not page.has_next_page()
    one = models.retrieve("alias/of-tiny")
    known(one)
    assert one.max_input_tokens == 512 and one.created_at.year >= 2026 and one.display_name == "alias/of-tiny"
    with pytest.raises(anthropic.NotFoundError) as unknown:
        models.retrieve("claude")
    assert unknown.value.type == "not_found_error" and unknown.value.request_id
    with served.http as http:
        assert http.get("/v1/models").json()["object"] == "list"  # others get OpenAI's form
