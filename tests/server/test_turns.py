"""Turns of a conversation: where an answer ends, where its form begins, and what of it is reasoning."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.server.turn import Turn
from appliance.text.tools.formats import Hermes, nine_characters
from tests.server.conftest import Served
from tests.server.test_completions import events
from tests.server.test_lifecycle import eventually
from tests.server.test_tools import HELLO, TOOL, ask, serve
from tests.text.tool_texts import FORMS, KINDS


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def any_kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Any]]:
    """A server for a model of each format, which it finds out by itself."""
    with serve(tmp_path_factory.mktemp("tools"), request.param.__name__) as one:
        yield one, request.param


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("hermes"), "Hermes") as one:
        yield one


def test_an_answer_of_one_call_ends_with_it(any_kind: tuple[Served, Any]) -> None:
    """Nothing is computed behind it, and nothing of that is told."""
    served, kind = any_kind
    for form in FORMS[kind]:
        text = "Let me see.\n" + form.write([("weather", '{"city": "Rome"}')] * 2) + "\nThat was " + "it" * 50
        served.client.say(text, 3)  # type: ignore[attr-defined]
        body: Any = {"messages": HELLO, "tools": [TOOL]}
        whole = served.post("/v1/chat/completions", **body).json()["usage"]["completion_tokens"]
        message = ask(served, parallel_tool_calls=False)
        assert (message["content"], len(message["tool_calls"])) == ("Let me see.", 1)
        assert (
            message["finish_reason"] == "tool_calls" and message["tool_calls"][0]["function"]["arguments"] == '{"city": "Rome"}'
        )
        for stream in (False, True):
            options: Any = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
            answer = served.post("/v1/chat/completions", **body, parallel_tool_calls=False, n=2, **options)
            usage = events(answer.text)[-1]["usage"] if stream else answer.json()["usage"]
            assert usage["completion_tokens"] < 2 * (whole - 100)
        eventually(lambda: not served.client.running)


def test_a_call_is_told_before_its_end(hermes: Served) -> None:
    """Even where all of it comes at once: the openai client makes no event of a call that ends in the chunk it began in."""
    client: Any = hermes.client
    client.script = [tuple(client.tokenizer.encode(FORMS[Hermes][0].write([("weather", '{"city": "Rome"}')])))]
    body: Any = {"messages": HELLO, "tools": [TOOL], "stream": True, "parallel_tool_calls": False, "return_token_ids": True}
    *_, call, end = [one["choices"][0] for one in events(hermes.post("/v1/chat/completions", **body).text)]
    assert call["delta"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Rome"}' and call["finish_reason"] is None
    assert end["delta"] == {} and end["finish_reason"] == "tool_calls" and tuple(end["token_ids"]) == client.script[0]


def test_usage_counts_the_tokens_of_reasoning(hermes: Served) -> None:
    """Every token of the tiny model is a character."""
    for text, think, expected in [
        ("<think>Hm.</think>Yes.", False, len("<think>Hm.</think>")),
        ("Hm.</think>\nYes.", True, len("Hm.</think>")),
        ("Hm", True, len("Hm") + 1),  # and the end of text
        ("Yes. <think>", False, 0),
    ]:
        marks = sum(text.count(mark) * (len(mark) - 1) for mark in ("<think>", "</think>") if special(hermes, mark))
        hermes.client.say(text)  # type: ignore[attr-defined]
        body: Any = {"messages": HELLO, "chat_template_kwargs": {"think": think}, "n": 2}
        usage = hermes.post("/v1/chat/completions", **body).json()["usage"]
        assert usage["completion_tokens_details"] == {"reasoning_tokens": 2 * (expected - (marks if expected else 0))}
        options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        told = [chunk["usage"] for chunk in events(hermes.post("/v1/chat/completions", **body, **options).text)]
        assert told[-1] == usage
        counts = [one["completion_tokens_details"]["reasoning_tokens"] for one in told]
        assert counts == sorted(counts)


def test_usage_of_many_choices_is_not_counted_anew_with_each_piece(hermes: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece tells the tokens of all that came so far, and only its own choice's are looked at."""
    looked: list[int] = []
    count = Turn.reasoning_tokens
    monkeypatch.setattr(Turn, "reasoning_tokens", lambda self, c: (looked.append(c), count(self, c))[1])
    hermes.client.say("<think>Hm, well.</think>Yes, so it is.", 3)  # type: ignore[attr-defined]
    monkeypatch.setattr(hermes.client, "cached", 2)
    body: Any = {"messages": HELLO, "n": 40, "stream": True, "return_token_ids": True}
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = events(hermes.post("/v1/chat/completions", **body).text)
    come = 0
    for chunk in chunks:
        come += len(chunk["choices"][0].get("token_ids", ()))
        opens = chunk["choices"][0]["delta"].get("role") == "assistant"  # told ahead of the tokens that it comes with
        assert (chunk["usage"]["completion_tokens"] > come) if opens else (chunk["usage"]["completion_tokens"] == come)
        assert chunk["usage"]["total_tokens"] == chunk["usage"]["prompt_tokens"] + chunk["usage"]["completion_tokens"]
    assert last["usage"] == chunks[-1]["usage"] and last["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert len(looked) == len(chunks) - 40
    whole = hermes.post("/v1/chat/completions", **body | {"stream": False, "stream_options": None}).json()["usage"]
    assert whole == last["usage"]


def special(served: Served, text: str) -> bool:
    assert served.state.tokenizer is not None
    return bool(served.state.tokenizer.special_among([text]))


def test_an_answer_whose_form_is_said(hermes: Served) -> None:
    """It is content, behind reasoning where the model reasons; the engine's grammar begins there, too."""
    text = '{"name": "weather", "parameters": {}}'
    form = {"response_format": {"type": "json_object"}, "tools": None}
    for said, think in ((text, False), (f"<think>Hm.</think>\n{text}", False), (f"Hm.</think>\n\n{text}", True)):
        hermes.client.say(said)  # type: ignore[attr-defined]
        message = ask(hermes, **form, chat_template_kwargs={"think": think})
        assert message["content"] == text and message["finish_reason"] == "stop" and "tool_calls" not in message
        assert message.get("reasoning") == (None if said == text else "Hm.")
        params = hermes.client.submitted[-1].params
        assert params.structured_outputs is not None and params.structured_outputs.json_object
        around = json.loads(params.grammar)["grammars"][0]["lark_grammar"]
        assert around.startswith("start: thoughts between (" if think else 'start: ("<think>" thoughts between)? (')
    closed = [*HELLO, {"role": "assistant", "content": "<think>Hm.</think>"}]
    on: Any = {"messages": closed, "add_generation_prompt": False, "continue_final_message": True}
    hermes.client.say(text)  # type: ignore[attr-defined]
    assert ask(hermes, **form, **on)["content"] == text
    assert "thoughts" not in hermes.client.submitted[-1].params.grammar


def test_a_form_and_tools(hermes: Served) -> None:
    """The model may call, or answer in the form; where it must call, the form does not matter."""
    form: Any = {"response_format": {"type": "json_object"}}
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    for text, calls_ in (('{"a": 1}', 0), (call, 1)):
        hermes.client.say(text)  # type: ignore[attr-defined]
        message = ask(hermes, **form)
        assert len(message.get("tool_calls", ())) == calls_ and message["content"] == (None if calls_ else text)
        around, answer = json.loads(hermes.client.submitted[-1].params.grammar)["grammars"]
        assert "between)? (calls | @answer)" in around["lark_grammar"] and answer["json_schema"] == {"type": "object"} | {
            "x-guidance": answer["json_schema"]["x-guidance"]
        }
    assert ask(hermes, **form, tool_choice="required")["tool_calls"]
    assert "@answer" not in hermes.client.submitted[-1].params.grammar


@pytest.mark.realdata
def test_calls_of_another_server_go_on_here(shared_data: Path, tmp_path: Path) -> None:
    """Mistral's own templates want ids of nine letters and digits; OpenAI's are longer."""
    sources = [path.read_text() for path in sorted((shared_data / "tokenizers" / "chat_templates").glob("*istral*.jinja"))]
    strict = [source for source in sources if "length 9" in source]
    assert strict
    for i, source in enumerate(strict):
        (directory := tmp_path / str(i)).mkdir()
        with serve(directory, "Mistral", source=source) as one:
            one.client.say("Sunny.")
            call = {"id": "call_0123456789abcdef", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
            result = {"role": "tool", "tool_call_id": call["id"], "content": "sun"}
            messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}, result]
            answer = one.post("/v1/chat/completions", messages=messages, tools=[TOOL])
            assert answer.status_code == 200, answer.text
            sent = one.state.tokenizer.decode(one.client.submitted[-1].prompt_token_ids, skip_special_tokens=False)
            fitted = nine_characters(call["id"])
            assert call["id"] not in sent and sent.count(fitted) == 2


@pytest.mark.realdata
def test_no_effort_is_no_reasoning(shared_data: Path, tmp_path: Path) -> None:
    """By the model's own template; a form then begins at once."""
    source = (shared_data / "tokenizers" / "chat_templates" / "Qwen-Qwen3-0.6B.jinja").read_text()
    with serve(tmp_path, "Hermes", source=source) as one:
        body: Any = {"messages": HELLO, "response_format": {"type": "json_object"}}
        for text, effort in (('<think>Hm.</think>{"a": 1}', "high"), ('{"a": 1}', "none")):
            one.client.say(text)
            message = one.post("/v1/chat/completions", **body, reasoning_effort=effort).json()["choices"][0]["message"]
            assert message["content"] == '{"a": 1}' and message.get("reasoning") == (None if effort == "none" else "Hm.")
            assert ("thoughts" in one.client.submitted[-1].params.grammar) == (effort == "high")
        on = one.post("/v1/chat/completions", **body, reasoning_effort="none", chat_template_kwargs={"enable_thinking": True})
        assert on.status_code == 200 and "thoughts" in one.client.submitted[-1].params.grammar
