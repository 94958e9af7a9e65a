"""POST /v1/responses, through OpenAI's client and by OpenAI's own description; the engine says what it is told to say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from appliance.config import EngineConfig, ServerConfig
from appliance.core.params import RequestError
from appliance.server.responses.store import Record, ResponseStore
from appliance.text.reasoning import REASONING
from appliance.text.tokenizer import Tokenizer
from tests.server.conftest import Served, serve_in_thread
from tests.server.fake import FakeClient
from tests.server.test_lifecycle import eventually
from tests.server.test_tools import CALL, ascii_only, prompt_of, serve
from tests.text.tool_texts import FORMS, KINDS, any_text, seeded

TOOL: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
NESTED = {"type": "function", "function": {name: value for name, value in TOOL.items() if name != "type"}}
CALL_OF_ROME = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def any_kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Any]]:
    with serve(tmp_path_factory.mktemp("responses"), request.param.__name__) as one:
        yield one, request.param


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("hermes"), "Hermes") as one:
        yield one


def say(served: Served, text: str, seed: int = 0) -> None:
    served.client.say(text, seed)  # type: ignore[attr-defined]


def told(text: str) -> list[dict[str, Any]]:
    """The events of a stream; the names of events are their types, and their numbers have no gaps."""
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}" and event["sequence_number"] == len(found)
        found.append(event)
    return found


def plain(value: Any) -> Any:
    """Without what is another one each time."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in ("id", "call_id", "created_at", "completed_at")}
    return value


def summed(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items of a stream, put together from its deltas alone, and every event in its place."""
    items: list[dict[str, Any]] = []
    opened = -1
    for event in events:
        kind, index = event["type"].removeprefix("response."), event.get("output_index")
        if index is None:
            continue
        if kind == "output_item.added":
            assert opened == -1 and index == len(items) and event["item"]["status"] == "in_progress"
            items.append(event["item"])
            opened = index
            continue
        item = items[index]
        assert opened == index
        if kind == "output_item.done":
            assert event["item"] == {**item, "status": event["item"]["status"]}
            items[index], opened = event["item"], -1
            continue
        assert event["item_id"] == item["id"]
        part = item["content"][event["content_index"]] if event.get("content_index") is not None and item["content"] else None
        match kind:
            case "content_part.added":
                item["content"].append(event["part"])
            case "content_part.done":
                assert event["part"] == part
            case "output_text.delta" | "reasoning_text.delta":
                assert event["delta"] and part is not None
                part["text"] += event["delta"]
                part.get("logprobs", []).extend(event.get("logprobs", []))
            case "output_text.done" | "reasoning_text.done":
                assert part is not None and event["text"] == part["text"]
            case "function_call_arguments.delta":
                item["arguments"] += event["delta"]
            case "function_call_arguments.done":
                assert (event["name"], event["arguments"]) == (item["name"], item["arguments"])
            case _:
                raise AssertionError(event)
    assert opened == -1
    return items


def ask(served: Served, **body: Any) -> dict[str, Any]:
    """The response, whole and from the stream, which must agree but for ids and times."""
    body = {"input": "hello", **body}
    answer = served.post("/v1/responses", **body)
    assert answer.status_code == 200, answer.text
    whole: dict[str, Any] = answer.json()
    with served.http as http:
        events = told(http.post("/v1/responses", json={**body, "stream": True}).text)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    begun, last = events[0]["response"], events[-1]
    assert begun["status"] == "in_progress" and begun["output"] == [] and begun["id"] == last["response"]["id"]
    assert last["type"] == ("response.completed" if whole["status"] == "completed" else "response.incomplete")
    assert plain(last["response"]) == plain(whole)
    assert summed(events) == last["response"]["output"]
    return whole


def kinds(response: dict[str, Any]) -> list[str]:
    return [item["type"] for item in response["output"]]


def test_text(hermes: Served) -> None:
    say(hermes, "Good morning.")
    response = ask(hermes, instructions="Be kind.", temperature=0.5, metadata={"a": "b"})
    (item,) = response["output"]
    assert item["content"] == [{"type": "output_text", "text": "Good morning.", "annotations": [], "logprobs": []}]
    assert (item["role"], item["status"], response["status"]) == ("assistant", "completed", "completed")
    assert (response["temperature"], response["metadata"], response["instructions"]) == (0.5, {"a": "b"}, "Be kind.")
    assert prompt_of(hermes) == "<s>system: Be kind.user: helloassistant: "
    usage = response["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] and usage["output_tokens"] == 14
    cut = ask(hermes, max_output_tokens=4)
    assert cut["status"] == "incomplete" and cut["incomplete_details"] == {"reason": "max_output_tokens"}
    assert cut["output"][0]["status"] == "incomplete" and cut["output"][0]["content"][0]["text"] == "Good"
    assert ask(hermes, max_output_tokens=10**6)["status"] == "completed"  # a bound, not a wish
    say(hermes, "")
    assert ask(hermes)["output"][0]["content"][0]["text"] == ""


def test_openai_client(hermes: Served) -> None:
    say(hermes, "<think>Hm.</think>Good morning.")
    client = hermes.openai
    answer = client.responses.create(model="tiny", input="hello", max_output_tokens=100)
    assert answer.output_text == "Good morning." and answer.usage and answer.usage.output_tokens_details.reasoning_tokens > 0
    with client.responses.stream(model="tiny", input=[{"role": "user", "content": "hello"}]) as events:
        snapshots = [event.snapshot for event in events if event.type == "response.output_text.delta"]
        final = events.get_final_response()
    assert snapshots[-1] == final.output_text == "Good morning."
    reasoning = final.output[0]
    assert reasoning.type == "reasoning" and reasoning.content and reasoning.content[0].text == "Hm." and reasoning.summary == []
    counted = client.responses.input_tokens.count(model="tiny", input="hello")
    assert counted.input_tokens == answer.usage.input_tokens


def test_streamed_and_whole_answers_are_equal(any_kind: tuple[Served, Any]) -> None:
    """For every parser, whatever the model says and however it comes; and what chat says is the same."""
    served, kind = any_kind
    found = served.state.parsers
    several = [None, *dict.fromkeys(REASONING.values())]
    for i, (tags, rng) in enumerate(zip(several, seeded(len(several), f"responses-{kind.__name__}"))):
        served.state.parsers = replace(found, tags=tags)
        thoughts = "" if tags is None or rng.random() < 0.3 else f"{tags.start}Hm.{tags.end}"
        say(served, thoughts + ascii_only(any_text(rng)), i)
        more = {"chat_template_kwargs": {"think": rng.random() < 0.3}, "parallel_tool_calls": rng.random() < 0.7}
        response = ask(served, tools=[TOOL], **more)
        messages = [{"role": "user", "content": "hello"}]
        chat = served.post("/v1/chat/completions", messages=messages, tools=[NESTED], **more).json()["choices"][0]["message"]
        texts = [part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"]]
        assert "".join(texts) == (chat["content"] or "")
        thoughts = [part["text"] for item in response["output"] if item["type"] == "reasoning" for part in item["content"]]
        assert "".join(thoughts) == chat.get("reasoning", "")
        calls = [(item["name"], item["arguments"]) for item in response["output"] if item["type"] == "function_call"]
        assert calls == [(c["function"]["name"], c["function"]["arguments"]) for c in chat.get("tool_calls", ())]
    served.state.parsers = found


def test_items_come_in_the_order_in_which_they_were_written(hermes: Served) -> None:
    for seed in range(4):
        say(hermes, f"<think>Hm.</think>First {CALL_OF_ROME} then {CALL_OF_ROME}{CALL_OF_ROME}", seed)
        response = ask(hermes, tools=[TOOL])
        assert kinds(response) == ["reasoning", "message", "function_call", "message", "function_call", "function_call"]
        assert len({item["id"] for item in response["output"]}) == 6
        assert kinds(ask(hermes, tools=[TOOL], parallel_tool_calls=False)) == ["reasoning", "message", "function_call"]


def test_tools_all_the_way(any_kind: tuple[Served, Any]) -> None:
    """A question, a call, its result, an answer: with what was said sent again, and with previous_response_id."""
    served, kind = any_kind
    client, question = served.openai, {"role": "user", "content": "How is it in Rome?"}
    say(served, FORMS[kind][0].write([("weather", '{"city": "Rome"}')]))
    first = client.responses.create(model="tiny", input=[question], tools=[TOOL])  # type: ignore[list-item]
    (call,) = first.output
    assert call.type == "function_call" and json.loads(call.arguments) == {"city": "Rome"} and call.status == "completed"
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
    say(served, "Sunny.")
    again: list[Any] = [question, *[item.model_dump() for item in first.output], result]
    whole = client.responses.create(model="tiny", input=again, tools=[TOOL])  # type: ignore[list-item]
    sent = prompt_of(served)
    assert CALL[kind.__name__].replace("NAME", "weather").replace("ARGUMENTS", '{"city": "Rome"}') in sent and "tool: sun" in sent
    on = client.responses.create(model="tiny", input=[result], tools=[TOOL], previous_response_id=first.id)  # type: ignore[list-item]
    assert whole.output_text == on.output_text == "Sunny." and prompt_of(served) == sent
    last = client.responses.create(model="tiny", input="Thanks", previous_response_id=on.id)
    assert "assistant: Sunny.user: Thanks" in prompt_of(served) and last.previous_response_id == on.id
    listed = [item.type for item in client.responses.input_items.list(last.id, limit=2, order="asc")]
    assert listed == ["message", "function_call", "function_call_output", "message", "message"]


def test_instructions_do_not_carry_over(hermes: Served) -> None:
    say(hermes, "Yes.")
    first = ask(
        hermes, instructions="Be brief.", input=[{"role": "developer", "content": "And kind."}, {"role": "user", "content": "a"}]
    )
    assert prompt_of(hermes) == "<s>system: Be brief.\n\nAnd kind.user: aassistant: "
    ask(hermes, previous_response_id=first["id"], input="b")
    assert prompt_of(hermes) == "<s>system: And kind.user: aassistant: Yes.user: bassistant: "


def test_reasoning_comes_back_to_the_template(hermes: Served) -> None:
    say(hermes, "<think>Hm.</think>Yes.")
    first = ask(hermes)
    assert kinds(first) == ["reasoning", "message"] and first["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    ask(hermes, previous_response_id=first["id"], input="b")
    assert "assistant: <think>Hm.</think>Yes.user: b" in prompt_of(hermes)
    by_id = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
    ask(hermes, input=[{"role": "user", "content": "hello"}, *by_id, {"role": "user", "content": "b"}])
    assert "user: helloassistant: <think>Hm.</think>Yes.user: b" in prompt_of(hermes)


def test_what_is_kept(hermes: Served) -> None:
    client = hermes.openai
    say(hermes, "Yes.")
    kept = client.responses.create(model="tiny", input="hello")
    assert client.responses.retrieve(kept.id).to_dict() == kept.to_dict()
    page = client.responses.input_items.list(kept.id)
    assert [part.text for item in page for part in item.content] == ["hello"]  # type: ignore[union-attr]
    client.responses.delete(kept.id)
    loose = client.responses.create(model="tiny", input="hello", store=False)
    for gone in (kept.id, loose.id, "resp_of_nobody"):
        with pytest.raises(openai.NotFoundError) as caught:
            client.responses.retrieve(gone)
        assert caught.value.code == "response_not_found"
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(model="tiny", input="on", previous_response_id=gone)
        assert refused.value.code == "previous_response_not_found"
    named = {"X-Request-Id": "mine"}
    first, second = (client.responses.create(model="tiny", input=text, extra_headers=named) for text in "ab")
    assert first.id == "resp_mine" != second.id and second.id.startswith("resp_mine_")
    with pytest.raises(openai.BadRequestError, match="has ended already"):
        client.responses.cancel(first.id)


def test_cancel(hermes: Served) -> None:
    say(hermes, "y" * 4000)
    hermes.client.delay_s = 0.005
    try:
        with hermes.openai.responses.create(model="tiny", input="hello", stream=True) as stream:
            for event in stream:
                if event.type == "response.created":
                    running = event.response.id
                if event.type == "response.output_text.delta":
                    break
            assert hermes.openai.responses.retrieve(running).status == "in_progress"
            with pytest.raises(openai.BadRequestError, match="still in progress"):
                hermes.openai.responses.create(model="tiny", input="on", previous_response_id=running)
            assert hermes.openai.responses.cancel(running).status == "cancelled"
            last = list(stream)[-1]
        assert (
            last.type == "response.incomplete"
            and last.response.status == "cancelled"
            and last.response.output_text.startswith("y")
        )
        assert hermes.openai.responses.retrieve(running).status == "cancelled"
        with hermes.openai.responses.create(model="tiny", input="hello", stream=True) as stream:
            gone = next(event.response.id for event in stream if event.type == "response.created")
        eventually(lambda: not hermes.client.running)
        assert hermes.state.shared.responses.find(None, gone) is None  # its client went away
    finally:
        hermes.client.delay_s = 0.0


def test_failures(hermes: Served) -> None:
    say(hermes, "Good morning.")
    hermes.client.fail_at = 0
    fake, original = hermes.client, hermes.client._event
    fake._event = lambda submit, index, step: (
        original(submit, index, step) if step < 2 else super(type(fake), fake)._event(submit, index, 1)
    )  # type: ignore[method-assign]
    try:
        assert hermes.post("/v1/responses", input="hello").json()["error"]["code"] == "engine_error"
        events = told(hermes.post("/v1/responses", input="hello", stream=True).text)
        assert events[-1]["type"] == "response.failed"
        failed = events[-1]["response"]
        assert failed["error"] == {"code": "server_error", "message": "the step failed"} and failed["status"] == "failed"
        assert summed(events) == failed["output"] and failed["output"][0]["status"] == "incomplete"
        assert hermes.openai.responses.retrieve(failed["id"]).status == "failed"
    finally:
        hermes.client.fail_at = None
        del fake._event


def test_forms(hermes: Served) -> None:
    class City(BaseModel):
        name: str

    say(hermes, '{"name": "Rome"}')
    parsed = hermes.openai.responses.parse(model="tiny", input="hello", text_format=City)
    assert parsed.output_parsed == City(name="Rome")
    answer = hermes.client.submitted[-1].params.structured_outputs
    assert answer is not None and isinstance(answer.json, dict) and answer.json["properties"]["name"]["type"] == "string"
    assert ask(hermes, text={"format": {"type": "json_object"}})["text"]["format"] == {"type": "json_object"}
    assert (
        '"@answer' not in hermes.client.submitted[-1].params.grammar and "@answer" in hermes.client.submitted[-1].params.grammar
    )
    ask(hermes, text={"format": {"type": "text"}})
    assert not hermes.client.submitted[-1].params.grammar
    ask(hermes, structured_outputs={"choice": ["a", "b"]})
    assert hermes.client.submitted[-1].params.grammar


def test_choices_of_tools(hermes: Served) -> None:
    say(hermes, CALL_OF_ROME)
    other = {**TOOL, "name": "clock"}
    for choice in ("required", {"type": "function", "name": "weather"}):
        assert kinds(ask(hermes, tools=[TOOL, other], tool_choice=choice)) == ["function_call"]
        assert ("clock" in hermes.client.submitted[-1].params.grammar) == (choice == "required")
    assert kinds(ask(hermes, tools=[TOOL], tool_choice="none")) == ["message"]
    for mode in ("auto", "required"):
        allowed = {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": "weather"}]}
        assert kinds(ask(hermes, tools=[TOOL, other], tool_choice=allowed)) == ["function_call"]
        assert "clock" not in prompt_of(hermes) and "weather" in prompt_of(hermes)
        assert bool(hermes.client.submitted[-1].params.grammar) == (mode == "required")


def test_logprobs(hermes: Served) -> None:
    """Of the text alone: not of reasoning, calls and the end."""
    say(hermes, f"<think>Hm.</think>Yes, sir. {CALL_OF_ROME}")
    fake: Any = hermes.client
    fake.script = [(token,) for tokens in fake.script for token in tokens]
    for body in ({"include": ["message.output_text.logprobs"]}, {"top_logprobs": 2}):
        response = ask(hermes, tools=[TOOL], **body)
        (part,) = response["output"][1]["content"]
        assert "".join(one["token"] for one in part["logprobs"]) == part["text"] == "Yes, sir."
        assert all(len(one["top_logprobs"]) == body.get("top_logprobs", 0) for one in part["logprobs"])
    say(hermes, "Yes.")
    (part,) = ask(hermes, top_logprobs=1)["output"][0]["content"]
    assert "".join(one["token"] for one in part["logprobs"]) == "Yes."
    assert ask(hermes)["output"][0]["content"][0]["logprobs"] == []


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
    ({"tools": [{"type": "web_search"}]}, "tools[0]"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [{"type": "function", "name": "f", "parameters": 3}]}, "tools[0].parameters"),
    ({"tools": [TOOL], "tool_choice": {"type": "web_search_preview"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "clock"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "clock"}]}}, "tool_choice"),
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
        ask(hermes, max_tool_calls=3, background=False, service_tier="auto")
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


def test_each_key_has_its_own(tokenizer: Tokenizer, model_dir: Path) -> None:
    config = ServerConfig(served_model_name=("tiny",), api_key=("sk-first-first", "sk-second-second"), max_stored_responses=2)
    with serve_in_thread(FakeClient, tokenizer, EngineConfig(model=str(model_dir)), config) as one:
        first, second = (one.openai.with_options(api_key=key) for key in config.api_key)
        mine = first.responses.create(model="tiny", input="hello", max_output_tokens=2)
        for refused in (
            second.responses.retrieve,
            second.responses.delete,
            second.responses.cancel,
            second.responses.input_items.list,
        ):
            with pytest.raises(openai.NotFoundError):
                refused(mine.id)
        with pytest.raises(openai.BadRequestError):
            second.responses.create(model="tiny", input="on", previous_response_id=mine.id)
        with pytest.raises(openai.BadRequestError, match="no item of that id"):
            second.responses.create(model="tiny", input=[{"type": "item_reference", "id": mine.output[0].id}])  # type: ignore[arg-type,list-item]
        for _ in range(3):
            second.responses.create(model="tiny", input="hello", max_output_tokens=2)
        assert first.responses.retrieve(mine.id).id == mine.id
        for _ in range(2):
            first.responses.create(model="tiny", input="hello", max_output_tokens=2)
        with pytest.raises(openai.NotFoundError):
            first.responses.retrieve(mine.id)


def record(name: str, previous: str | None = None, size: int = 0) -> Record:
    return Record.of({"id": name, "previous_response_id": previous, "output": [], "x": "y" * size}, [])


def test_the_store_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    store = ResponseStore(3)
    for name in "abc":
        store.put("alice", record(name, chr(ord(name) - 1) if name > "a" else None))
    store.put("bob", record("a"))
    assert [one.id for one in store.chain("alice", "c")] == ["a", "b", "c"]
    store.put("alice", record("d"))
    assert store.find("alice", "a") is None and store.find("bob", "a") is not None
    with pytest.raises(RequestError, match="'a' is kept here"):
        store.chain("alice", "c")
    assert store.find("carol", "d") is None and store.find(None, "d") is None
    monkeypatch.setattr("appliance.server.responses.store.KEY_BYTES", 1000)
    for name in "xyz":
        store.put("alice", record(name, size=400))
    assert store.find("alice", "x") is None and store.find("alice", "y") is not None
    monkeypatch.setattr("appliance.server.responses.store.ALL_BYTES", 1000)
    store.put("bob", record("e", size=100))
    assert store.find("alice", "z") is None and store.find("bob", "a") is not None and store.find("bob", "e") is not None
    nothing = ResponseStore(0)
    nothing.put(None, record("a"))
    assert nothing.find(None, "a") is None
