"""Tools and reasoning in POST /v1/chat/completions, through OpenAI's client, over an engine that says what it is told to say."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from appliance.config import EngineConfig, ServerConfig
from appliance.core.messages import Event, Submit
from appliance.server.parsers import Parsers
from appliance.text.reasoning import REASONING, THINK
from appliance.text.tokenizer import Tokenizer
from appliance.text.tools.choice import tool_choice
from appliance.text.tools.detect import detect
from appliance.text.tools.gemma import Gemma4
from appliance.text.tools.harmony import Harmony
from quant.errors import InputError
from tests.server.conftest import Served, serve_in_thread
from tests.server.fake import END, FakeClient, info, score
from tests.server.test_completions import events
from tests.text.test_tool_choice import chat_of
from tests.text.tool_texts import FORMS, KINDS, any_text, calls, seeded
from tests.tiny_model import write_tokenizer

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
IMPOSSIBLE: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {"type": "colour"}}}
CALL = {
    "Hermes": '<tool_call>\n{"name": "NAME", "arguments": ARGUMENTS}\n</tool_call>',
    "Llama3Json": '{"name": "NAME", "parameters": ARGUMENTS}',
    "Mistral": "[TOOL_CALLS]NAME[ARGS]ARGUMENTS",
}
TEMPLATE = """<s>{% if tools %}{{ tools | tojson }}
{% endif %}{% for m in messages %}{{ m.role }}: {% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}\
{{ m.content or '' }}{% if 'tool_calls' in m %}{% for c in m.tool_calls %}CALL{% endfor %}{% endif %}
{% endfor %}{% if add_generation_prompt %}assistant: {% if think %}<think>
{% endif %}{% endif %}"""


def template(kind: str) -> str:
    call = CALL[kind].replace("NAME", "{{ c.function.name }}").replace("ARGUMENTS", "{{ c.function.arguments | tojson }}")
    return TEMPLATE.replace("CALL", call)


class Scripted(FakeClient):
    """Says ``script``, a few tokens at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.info = replace(info(8192), vocab_size=len(tokenizer))
        self.tokenizer = tokenizer
        self.say("")

    def say(self, text: str, seed: int = 0) -> None:
        ids, rng = self.tokenizer.encode(text, add_special_tokens=False), random.Random(seed)
        self.script: list[tuple[int, ...]] = []
        while ids:
            n = rng.randint(1, 5)
            self.script.append(tuple(ids[:n]))
            ids = ids[n:]

    def _event(self, submit: Submit, index: int, step: int) -> Event:
        said = sum(map(len, self.script[:step]))
        tokens = self.script[step] if step < len(self.script) else (END,)
        limit, top = submit.params.max_tokens, submit.params.logprobs
        reason = "stop" if step >= len(self.script) else None
        if limit is not None and said + len(tokens) >= limit:
            tokens, reason = tokens[: limit - said], "length"
        scored = None if top is None else tuple(score(token, top) for token in tokens)
        return replace(super()._event(submit, index, 0), token_ids=tokens, logprobs=scored, finish_reason=reason)


def serve(directory: Path, kind: str, source: str | None = None, **options: Any) -> Any:
    write_tokenizer(directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": source or template(kind)}))
    backend = Tokenizer.load(directory)._backend
    backend.add_special_tokens([marker for one in (*KINDS, Harmony, Gemma4) if one.__name__ == kind for marker in one.special])
    backend.save(str(directory / "tokenizer.json"))
    tokenizer = Tokenizer.load(directory)
    config = ServerConfig(served_model_name=("tiny",), **options)
    return serve_in_thread(lambda: Scripted(tokenizer), tokenizer, EngineConfig(model=str(directory)), config)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def any_kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Any]]:
    """A server for a model of each format, which it finds out by itself."""
    with serve(tmp_path_factory.mktemp("tools"), request.param.__name__) as one:
        yield one, request.param


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("hermes"), "Hermes") as one:
        yield one


def ask(served: Served, **body: Any) -> dict[str, Any]:
    """The message and how it ended, whole and from the stream, which must agree but for the ids of calls."""
    body = {"messages": HELLO, "tools": [TOOL], **body}
    response = served.post("/v1/chat/completions", **body)
    assert response.status_code == 200, response.text
    answer = response.json()["choices"][0]
    whole: dict[str, Any] = {"finish_reason": answer["finish_reason"], **answer["message"]}
    streamed: dict[str, Any] = {"role": None, "content": "", "refusal": None, "finish_reason": None}
    with served.http as http:
        chunks = events(http.post("/v1/chat/completions", json={**body, "stream": True}).text)
    for chunk in chunks:
        choice = chunk["choices"][0]
        delta = choice["delta"]
        assert streamed["finish_reason"] is None
        streamed["finish_reason"] = choice["finish_reason"]
        streamed["role"] = delta.get("role", streamed["role"])
        for field in ("content", "reasoning_content", "reasoning"):
            if field in delta:
                streamed[field] = streamed.get(field, "") + delta[field]
        for news in delta.get("tool_calls", ()):
            add_call(streamed.setdefault("tool_calls", []), news)
    for call in (*whole.get("tool_calls", ()), *streamed.get("tool_calls", ())):
        assert isinstance(call.pop("id"), str)
    if "tool_calls" in streamed and not streamed["content"]:
        streamed["content"] = None
    assert streamed == whole
    return whole


def add_call(so_far: list[dict[str, Any]], news: dict[str, Any]) -> None:
    if "id" in news:
        assert news["index"] == len(so_far)
        so_far.append({"id": news["id"], "type": news["type"], "function": dict(news["function"])})
    else:
        so_far[news["index"]]["function"]["arguments"] += news["function"]["arguments"]


def ascii_only(text: str) -> str:
    """What the tiny tokenizer can say."""
    return "".join(c for c in text if c == "\n" or 32 <= ord(c) < 127)


def test_streamed_and_whole_answers_are_equal(any_kind: tuple[Served, Any]) -> None:
    """For every parser, whatever the model says and however it comes."""
    served, kind = any_kind
    found = served.state.parsers
    several = [THINK] * 6 + [tags for tags in dict.fromkeys(REASONING.values()) if tags != THINK] + [None]
    for i, (tags, rng) in enumerate(zip(several, seeded(len(several), f"server-{kind.__name__}"))):
        served.state.parsers = replace(found, tags=tags)
        text = ascii_only(any_text(rng))
        if tags is not None and tags != THINK:
            text = f"{tags.start}Hm.\n{text}{tags.end}\n{text}" if rng.random() < 0.7 else f"Hm.{tags.end}{text}"
        served.client.say(text, i)  # type: ignore[attr-defined]
        think = rng.random() < 0.3
        message = ask(served, chat_template_kwargs={"think": think}, parallel_tool_calls=rng.random() < 0.7)
        kept = (message["content"] or "") + message.get("reasoning", "")
        assert len(kept) + sum(len(c["function"]["arguments"]) for c in message.get("tool_calls", ())) <= len(text)
        if tags == THINK and "tool_calls" not in message and not any(tag in text for tag in ("<think>", "</think>")):
            assert kept == (text.lstrip("\n") if think else text)
    served.state.parsers = found


def test_calls_of_every_form(any_kind: tuple[Served, Any]) -> None:
    """Markers that are special tokens of the model are found; what was written comes back."""
    served, kind = any_kind
    for i, rng in enumerate(seeded(4, "forms")):
        some = [(name, json.dumps(json.loads(ascii_only(arguments)))) for name, arguments in calls(rng)]
        for form in FORMS[kind]:
            served.client.say("Let me see.\n" + form.write(some), i)  # type: ignore[attr-defined]
            message = ask(served)
            assert message["content"] == "Let me see." and message["finish_reason"] == "tool_calls"
            assert [(c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]] == some


@pytest.mark.realdata
@pytest.mark.parametrize("end", ["<channel|>", ""])
def test_calls_and_thoughts_of_gemma(end: str, shared_data: Path, tmp_path: Path) -> None:
    """With its own template, and markers that are special tokens."""
    source = (shared_data / "tokenizers" / "chat_templates" / "google-gemma-4-31B-it.jinja").read_text()
    with serve(tmp_path, "Gemma4", source) as served:
        served.client.say(f'<|channel>thought\nHm.\n{end}<|tool_call>call:weather{{city:<|"|>Rome<|"|>}}<tool_call|>')  # type: ignore[attr-defined]
        message = ask(served, chat_template_kwargs={"enable_thinking": True})
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}
    assert (message["content"], message["reasoning"], message["finish_reason"]) == (None, "Hm.", "tool_calls")


def test_openai_client_goes_all_the_way(any_kind: tuple[Served, Any]) -> None:
    """A question, a call, its result, an answer; the client's own messages are sent back."""
    served, kind = any_kind
    client = served.openai
    served.client.say(FORMS[kind][0].write([("weather", '{"city": "Rome"}')]))  # type: ignore[attr-defined]
    answer = client.chat.completions.create(model="tiny", messages=HELLO, tools=[TOOL])  # type: ignore[list-item]
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None and choice.message.tool_calls
    call = choice.message.tool_calls[0]
    assert call.type == "function" and json.loads(call.function.arguments) == {"city": "Rome"}
    served.client.say("Sunny.")  # type: ignore[attr-defined]
    result = {"role": "tool", "tool_call_id": call.id, "content": "sun"}
    messages = [*HELLO, choice.message.model_dump(), result]
    final = client.chat.completions.create(model="tiny", messages=messages, tools=[TOOL], tool_choice="auto")  # type: ignore[list-item]
    assert final.choices[0].message.content == "Sunny." and final.choices[0].finish_reason == "stop"
    assert final.choices[0].message.tool_calls is None
    prompt = prompt_of(served)
    assert CALL[kind.__name__].replace("NAME", "weather").replace("ARGUMENTS", '{"city": "Rome"}') in prompt
    assert "tool: sun" in prompt and '"name": "weather"' in prompt.split("user:")[0]
    with client.chat.completions.stream(model="tiny", messages=[*messages, final.choices[0].message.model_dump()]) as events_:  # type: ignore[list-item]
        assert events_.get_final_completion().choices[0].message.content == "Sunny."


def prompt_of(served: Served) -> str:
    assert served.state.tokenizer is not None
    return served.state.tokenizer.decode(served.client.submitted[-1].prompt_token_ids, skip_special_tokens=False)


def test_reasoning(hermes: Served) -> None:
    hermes.client.say("<think>\nHm.\n</think>\n\nYes.")  # type: ignore[attr-defined]
    expected = {"role": "assistant", "content": "Yes.", "refusal": None, "reasoning_content": "Hm.", "reasoning": "Hm."}
    assert ask(hermes, tools=None) == {**expected, "finish_reason": "stop"}
    quiet = ask(hermes, include_reasoning=False)
    assert quiet["content"] == "Yes." and not {"reasoning", "reasoning_content"} & quiet.keys()
    hermes.client.say("Hm.\n</think>\nYes.")  # type: ignore[attr-defined]
    assert ask(hermes, chat_template_kwargs={"think": True}) == {**expected, "finish_reason": "stop"}
    continued = [*HELLO, {"role": "assistant", "content": "<think>So"}]
    on = {"messages": continued, "add_generation_prompt": False, "continue_final_message": True}
    assert ask(hermes, **on) == {**expected, "finish_reason": "stop"}
    cut_off = ask(hermes, chat_template_kwargs={"think": True}, max_tokens=2)
    assert (cut_off["content"], cut_off["reasoning"], cut_off["finish_reason"]) == ("", "Hm", "length")
    history = [*HELLO, {"role": "assistant", "content": "Yes.", "reasoning": "Hm."}, *HELLO]
    ask(hermes, messages=history)
    assert "<think>Hm.</think>Yes." in prompt_of(hermes)


def test_a_prompt_that_was_truncated_still_shows_where_the_answer_begins(hermes: Served) -> None:
    hermes.client.say("Hm.</think>Yes.")  # type: ignore[attr-defined]
    message = ask(hermes, chat_template_kwargs={"think": True}, truncate_prompt_tokens=12)
    assert len(hermes.client.submitted[-1].prompt_token_ids) == 12 and message["reasoning"] == "Hm."


def test_calls_that_are_cut_off(hermes: Served) -> None:
    hermes.client.say('<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>')  # type: ignore[attr-defined]
    message = ask(hermes, max_tokens=43)
    assert message["finish_reason"] == "length" and message["content"] is None
    assert message["tool_calls"][0]["function"]["arguments"] == '{"city": '
    message = ask(hermes, max_tokens=10)
    assert message["content"] == '<tool_call>{"name": '[: len(message["content"])] and "tool_calls" not in message
    message = ask(hermes, stop=["Ro"])
    assert message["finish_reason"] == "stop" and message["tool_calls"][0]["function"]["arguments"] == '{"city": "'
    message = ask(hermes, stop=["</tool_call>"])
    assert message["finish_reason"] == "tool_calls" and message["tool_calls"][0]["function"]["arguments"] == '{"city": "Rome"}'


@pytest.mark.realdata
def test_calls_without_content_are_read_by_real_templates(shared_data: Path) -> None:
    """As OpenAI's client sends back what it got: content and other fields are null. Qwen3's own template fails on that."""
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    empty = dict.fromkeys(("content", "refusal", "audio", "function_call", "annotations"))
    messages = [
        *HELLO,
        {"role": "assistant", "tool_calls": [call], **empty},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "!"},
    ]
    answered = [*messages, {"role": "assistant", "content": "Sunny.", "tool_calls": None, "refusal": None}, *HELLO]
    read = 0
    for path in sorted((shared_data / "tokenizers" / "chat_templates").glob("*.jinja")):
        chat = chat_of(path.read_text())
        if detect(chat) is None:
            continue
        text = chat(answered, add_generation_prompt=True, tools=list(tool_choice([TOOL], None).tools))
        assert "Sunny." in text and text.count("weather") >= 2 and "None" not in text, path.name
        read += 1
    assert read >= 15


def test_parallel_calls(hermes: Served) -> None:
    hermes.client.say('<tool_call>{"name": "a"}</tool_call><tool_call>{"name": "b"}</tool_call>')  # type: ignore[attr-defined]
    assert [c["function"]["name"] for c in ask(hermes)["tool_calls"]] == ["a", "b"]
    assert [c["function"]["name"] for c in ask(hermes, parallel_tool_calls=False)["tool_calls"]] == ["a"]


def test_several_choices_with_logprobs(hermes: Served) -> None:
    text = '<tool_call>{"name": "a"}</tool_call>'
    hermes.client.say(text)  # type: ignore[attr-defined]
    answer = hermes.post("/v1/chat/completions", messages=HELLO, tools=[TOOL], n=2, return_token_ids=True).json()
    assert [c["message"]["tool_calls"][0]["function"]["name"] for c in answer["choices"]] == ["a", "a"]
    assert all(len(c["token_ids"]) == answer["usage"]["completion_tokens"] // 2 for c in answer["choices"])
    ids = {c["message"]["tool_calls"][0]["id"] for c in answer["choices"]}
    assert len(ids) == 2


def test_tools_that_are_not_to_be_called(hermes: Served) -> None:
    """Without tools, or with tool_choice none, text is text, and the prompt knows of no tools."""
    text = '<tool_call>{"name": "a"}</tool_call>'
    hermes.client.say(text)  # type: ignore[attr-defined]
    for body in ({"tools": None}, {"tools": []}, {"tool_choice": "none"}):
        message = ask(hermes, **body)
        assert message["finish_reason"] == "stop" and "tool_calls" not in message
        assert "weather" not in prompt_of(hermes)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": "weather"}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
        ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "clock"}}}, "tool_choice"),
        ({"tools": [IMPOSSIBLE], "response_format": {"type": "json_object"}}, "tools"),
        ({"tools": [IMPOSSIBLE], "tool_choice": "required"}, "tools"),
        ({"parallel_tool_calls": 3}, "parallel_tool_calls"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": "yes"}}]}, "tools[0].function.strict"),
        ({"tools": [{**IMPOSSIBLE, "function": {**IMPOSSIBLE["function"], "strict": True}}]}, "tools"),
        ({"tools": [TOOL], "functions": [TOOL["function"]]}, "functions"),
    ],
)
def test_refusals(hermes: Served, body: dict[str, Any], param: str) -> None:
    answer = hermes.post("/v1/chat/completions", messages=HELLO, **body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_calls_that_are_a_must(any_kind: tuple[Served, Any]) -> None:
    """The engine gets a grammar of them (which tests/test_tool_calls.py tries out); what it makes of it comes back as calls."""
    served, kind = any_kind
    named: Any = {"type": "function", "function": {"name": "weather"}}
    choices: tuple[Any, ...] = ("required", named)
    for choice in choices:
        for form in FORMS[kind]:
            served.client.say(form.write([("weather", '{"city": "Rome"}')]))  # type: ignore[attr-defined]
            message = ask(served, tool_choice=choice)
            assert [c["function"]["arguments"] for c in message["tool_calls"]] == ['{"city": "Rome"}']
            assert message["content"] is None and message["finish_reason"] == "tool_calls"
        params = served.client.submitted[-1].params
        assert '"weather' in params.grammar.replace("\\", "") or "weather[ARGS]" in params.grammar
        assert ("call)*" in params.grammar) == (choice == "required")
    served.client.say("Hm.</think>" + FORMS[kind][0].write([("weather", "{}")]))  # type: ignore[attr-defined]
    message = ask(served, tool_choice="required", chat_template_kwargs={"think": True}, parallel_tool_calls=False)
    assert message["reasoning"] == "Hm." and "start: thoughts" in served.client.submitted[-1].params.grammar
    assert "call)*" not in served.client.submitted[-1].params.grammar


def test_strict_tools(any_kind: tuple[Served, Any]) -> None:
    """Their arguments are held to their schema where the model may call them, in all APIs (tests/text/test_strict_tools.py)."""
    served, kind = any_kind
    function = TOOL["function"]
    flat = {"name": function["name"], "input_schema": function["parameters"]}
    messages = {"messages": HELLO, "model": "tiny", "max_tokens": 200}
    ways: list[tuple[str, dict[str, Any], Any]] = [
        ("/v1/chat/completions", {"messages": HELLO}, lambda strict: {"type": "function", "function": {**function, **strict}}),
        ("/v1/responses", {"input": "hello"}, lambda strict: {"type": "function", **function, **strict}),
        ("/v1/messages", messages, lambda strict: {**flat, **strict}),
    ]
    other = {"type": "function", "function": {"name": "other", "parameters": IMPOSSIBLE["function"]["parameters"]}}
    for path, body, tool in ways:
        served.client.say(CALL[kind.__name__].replace("NAME", "weather").replace("ARGUMENTS", '{"city": "Rome"}'))  # type: ignore[attr-defined]
        for strict in ({}, {"strict": False}, {"strict": None}):
            assert served.post(path, **body, tools=[tool(strict)]).status_code == 200
            assert not served.client.submitted[-1].params.grammar, "free"
        answer = served.post(path, **body, tools=[tool({"strict": True})])
        assert answer.status_code == 200 and "Rome" in answer.text
        grammar = served.client.submitted[-1].params.grammar
        assert '"city"' in grammar and "TEXT: " in grammar
    strict = {**TOOL, "function": {**function, "strict": True}}
    assert ask(served, tools=[strict, other])["tool_calls"][0]["function"]["arguments"] == '{"city": "Rome"}'
    grammar = served.client.submitted[-1].params.grammar
    assert "colour" not in grammar and grammar.count('"city"') == 1, "what is not strict fits any object"
    assert ask(served, tools=[strict], tool_choice="none")["content"] and not served.client.submitted[-1].params.grammar
    assert ask(served, tools=[strict, other], chat_template_kwargs={"think": True})["reasoning"]
    assert "start: (thoughts between answer |" in served.client.submitted[-1].params.grammar
    free: tuple[dict[str, Any], ...] = ({"min_tokens": 2}, {"ignore_eos": True}, {"use_beam_search": True, "temperature": 0})
    for fields in free:
        answer = served.post("/v1/chat/completions", messages=HELLO, tools=[strict], **fields)
        assert answer.status_code == 200, (fields, answer.text)
        assert not served.client.submitted[-1].params.grammar, "what does not go with a grammar leaves the tools free"
    form = {"response_format": {"type": "json_object"}}
    refused = served.post("/v1/chat/completions", messages=HELLO, tools=[strict], min_tokens=2, **form)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "min_tokens"


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_what_of_tools_cannot_be_held_is_named(hermes: Served, choice: str) -> None:
    """At the door, though it would show within the arguments alone; without a text that nobody sent."""
    wide: dict[str, Any] = {"type": "object", "properties": {f"a{i}": {"type": "integer"} for i in range(700)}}
    slow = {"properties": {"a": {"type": "integer", "multipleOf": 99999999}}}
    wrong: list[tuple[Any, str]] = [(wide, "2000"), ({"properties": {"a": {"type": "colour"}}}, "Invalid type: colour")]
    wrong += [(slow, "more than 2 s")] * (choice == "auto")
    for schema, reason in wrong:
        tools = [
            {"type": "function", "function": {"name": name, "strict": True, "parameters": one}}
            for name, one in (("fine", TOOL["function"]["parameters"]), ("off", schema))
        ]
        for more in ({}, {"response_format": {"type": "json_object"}})[: 1 if schema is slow else 2]:
            answer = hermes.post("/v1/chat/completions", messages=HELLO, tools=tools, tool_choice=choice, **more)
            error = answer.json()["error"]
            assert answer.status_code == 400 and error["param"] == "tools"
            assert "'off'" in error["message"] and reason in error["message"] and "fine" not in error["message"]
            assert "start:" not in error["message"] and "x-guidance" not in error["message"] and len(error["message"]) < 250


@pytest.mark.parametrize("strict", [1, "true", [True]])
def test_strict_is_true_or_false(hermes: Served, strict: Any) -> None:
    function, hello = {**TOOL["function"], "strict": strict}, {"messages": HELLO, "model": "tiny", "max_tokens": 20}
    flat = {"name": "weather", "input_schema": TOOL["function"]["parameters"], "strict": strict}
    ways: tuple[tuple[str, dict[str, Any], str], ...] = (
        (
            "/v1/chat/completions",
            {"messages": HELLO, "tools": [{"type": "function", "function": function}]},
            "tools[0].function.strict",
        ),
        ("/v1/responses", {"input": "hello", "tools": [{"type": "function", **function}]}, "strict"),
        ("/v1/messages", {**hello, "tools": [flat]}, "tools[0].strict"),
        ("/v1/messages/count_tokens", {"messages": HELLO, "model": "tiny", "tools": [flat]}, "tools[0].strict"),
    )
    for path, body, where in ways:
        answer = hermes.post(path, **body)
        assert answer.status_code == 400 and where in answer.text and "true or false" in answer.text, (path, answer.text)


def test_json_beside_strict_tools(tmp_path: Path) -> None:
    """Where calls need no marker: only those of the tools that there are count."""
    strict = {**TOOL, "function": {**TOOL["function"], "strict": True}}
    with serve(tmp_path, "Llama3Json") as one:
        for text in ('{"name": "Ann", "parameters": {}}', 'So:\n{"id": 1, "x": 2}', '{"name": "weath', '{"type": "function"}'):
            one.client.say(text)
            assert ask(one, tools=[strict])["content"] == text
        one.client.say('{"name": "Ann", "parameters": {}}\n{"name": "weather", "parameters": {"city": "Rome"}}')
        message = ask(one, tools=[strict])
        assert message["content"] == '{"name": "Ann", "parameters": {}}' and len(message["tool_calls"]) == 1
        assert len(ask(one)["tool_calls"]) == 2, "without a strict tool any name is one"


def test_options(tmp_path: Path) -> None:
    """A parser that is named wins over what the template says; none leaves all text as it is."""
    text = '<think>Hm.</think>{"name": "a", "parameters": {}}'
    (tmp_path / "a").mkdir()
    with serve(tmp_path / "a", "Hermes", tool_call_parser="llama3_json", reasoning_parser="none") as one:
        one.client.say(text)
        assert ask(one)["content"] == text
        one.client.say(text.removeprefix("<think>Hm.</think>"))
        assert ask(one)["tool_calls"][0]["function"] == {"name": "a", "arguments": "{}"}
    (tmp_path / "b").mkdir()
    with serve(tmp_path / "b", "Hermes", tool_call_parser="none", reasoning_parser="deepseek_r1") as one:
        one.client.say("Hm.</think>Yes.")
        assert ask(one, tools=None)["reasoning"] == "Hm."
        refused = one.post("/v1/chat/completions", messages=HELLO, tools=[TOOL])
        assert refused.status_code == 400 and "--tool-call-parser" in refused.json()["error"]["message"]
    for options in ({"tool_call_parser": "vicuna"}, {"reasoning_parser": "vicuna"}):
        with pytest.raises(InputError, match="vicuna: there is no such parser: auto, none"):
            Parsers.of(None, ServerConfig(**options))
