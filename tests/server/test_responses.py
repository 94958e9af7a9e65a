"""POST /v1/responses, through OpenAI's client; the engine says what it is told to say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from pydantic import BaseModel

from appliance.text.reasoning import REASONING
from tests.server.conftest import Served
from tests.server.responses import CALL_OF_ROME, NESTED, TOOL, ask, kinds, say, summed, told
from tests.server.test_tools import CALL, ascii_only, prompt_of, serve
from tests.text.tool_texts import FORMS, KINDS, any_text, seeded


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def any_kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Any]]:
    with serve(tmp_path_factory.mktemp("responses"), request.param.__name__) as one:
        yield one, request.param


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("hermes"), "Hermes") as one:
        yield one


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


def test_a_call_that_a_stop_text_cuts_off_is_incomplete(hermes: Served) -> None:
    say(hermes, CALL_OF_ROME)
    for stop, status, arguments in (("ome", "incomplete", '{"city": "R'), ("</tool_call>", "completed", '{"city": "Rome"}')):
        response = ask(hermes, tools=[TOOL], stop=[stop])
        (call,) = response["output"]
        assert (call["status"], call["arguments"]) == (status, arguments)


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


def test_tools_in_namespaces(hermes: Served) -> None:
    """As Codex sends those of MCP servers: for the model they are functions with longer names."""
    find = {**TOOL, "name": "find", "description": "By city."}
    group = {"type": "namespace", "name": "crm", "description": "Customers.", "tools": [find, {**TOOL, "name": "add"}]}
    say(hermes, '<tool_call>{"name": "crm__find", "arguments": {"city": "Rome"}}</tool_call>')
    response = ask(hermes, tools=[TOOL, group])
    (call,) = response["output"]
    assert (call["namespace"], call["name"], call["arguments"]) == ("crm", "find", '{"city": "Rome"}')
    assert response["tools"][1] == group and "Customers." in prompt_of(hermes) and "crm__add" in prompt_of(hermes)
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "two"}
    ask(hermes, input=[{"role": "user", "content": "hello"}, call, result], tools=[group])
    assert '{"name": "crm__find", "arguments": {"city": "Rome"}}' in prompt_of(hermes)
    ask(hermes, input=[result], previous_response_id=response["id"], tools=[group], tool_choice="required")
    assert "crm__find" in prompt_of(hermes) and "crm__add" in hermes.client.submitted[-1].params.grammar
    answer = hermes.openai.responses.create(model="tiny", input="hello", tools=[group])  # type: ignore[list-item]
    assert answer.output[0].type == "function_call" and answer.output[0].namespace == "crm"
    say(hermes, CALL_OF_ROME)
    assert "namespace" not in ask(hermes, tools=[TOOL, group])["output"][0]


def test_web_search_is_left_out(hermes: Served) -> None:
    """Codex offers it; the others are there as they would be without it."""
    say(hermes, CALL_OF_ROME)
    search = {"type": "web_search", "external_web_access": False}
    alone, beside = ask(hermes, tools=[TOOL]), ask(hermes, tools=[search, TOOL, {"type": "web_search_preview_2025_03_11"}])
    assert beside["tools"] == alone["tools"] and len(alone["tools"]) == 1 and "web_search" not in prompt_of(hermes)
    assert beside["output"][0]["name"] == alone["output"][0]["name"]
    say(hermes, "Yes.")
    assert ask(hermes, tools=[search], tool_choice="auto")["tools"] == []


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
