"""What messages are made of: arguments of calls in pieces, conversations for templates, signs of life."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from appliance.core.params import RequestError
from appliance.server import turn
from appliance.server.messages import answer
from appliance.server.messages.answer import WAYS
from appliance.server.messages.convert import Way, chat_request
from appliance.server.messages.events import Blocks
from appliance.server.messages.schemas import MessagesRequest
from appliance.server.messages.signature import hidden, signature
from appliance.server.messages.tool_input import ToolInput
from appliance.server.schemas import ChatRequest
from appliance.text.delta import AnswerDelta
from appliance.text.tools.choice import tool_choice
from appliance.text.tools.detect import detect
from appliance.text.tools.formats import nine_characters
from tests.server.conftest import Served
from tests.server.test_messages import TOOL, events_of
from tests.text.test_tool_choice import chat_of
from tests.text.tool_texts import arguments, cuts, nonsense, seeded, spoiled


def told(pieces: list[str], *, cut: bool = False) -> str:
    one = ToolInput()
    return "".join([*(one.push(piece) for piece in pieces), one.finish(cut=cut)])


def test_arguments_come_whole() -> None:
    for rng in seeded(500, "arguments"):
        text = arguments(rng)
        found = json.loads(told(cuts(rng, text)))
        assert found == json.loads(text) or (r"\ud83d" in text and found["INVALID_JSON"] == text)


def test_anything_becomes_an_object_however_it_is_cut() -> None:
    for rng in seeded(1500, "spoiled"):
        text = "{" + spoiled(rng, arguments(rng))[1:] + rng.choice(["", "", nonsense(rng, 4)])
        for cut in (True, False):
            found = told([text], cut=cut)
            assert found == told(cuts(rng, text), cut=cut) == told(list(text), cut=cut)
            value = json.loads(found, parse_constant=lambda name: pytest.fail(name))
            assert isinstance(value, dict)
            try:
                good = isinstance(json.loads(text, strict=False), dict)
            except ValueError:
                good = False
            assert cut or good or value.get("INVALID_JSON") == text, text


def test_what_was_told_is_never_taken_back() -> None:
    """A client that reads while it comes sees members that are complete."""
    one, text = ToolInput(), '{"a": {"b": "x, y}"}, "c": [1, {"d": 2}], "e": "never ends'
    seen = [so_far for so_far in (one.push(c) for c in text) if so_far]
    assert seen == ['{"a":{"b":"x, y}"}', ', "c":[1,{"d":2}]'] and one.finish(cut=True) == "}"


@pytest.mark.parametrize(
    ("text", "cut", "found"),
    [
        ("{}", False, {}),
        ("{ }", False, {}),
        ("{", True, {}),
        ('{"a"', True, {}),
        ('{"a": 1, "b": ', True, {"a": 1}),
        ('{"a": "x\ny"}', False, {"a": "x\ny"}),
        ('{"a": 1,}', False, {"a": 1, "INVALID_JSON": '{"a": 1,}'}),
        ('{"a": 1]}', False, {"INVALID_JSON": '{"a": 1]}'}),
        ('{"a": NaN}', False, {"INVALID_JSON": '{"a": NaN}'}),
        ('{"a": 1e999}', False, {"INVALID_JSON": '{"a": 1e999}'}),
        ('{"a": 1} {"b": 2}', False, {"a": 1, "INVALID_JSON": '{"a": 1} {"b": 2}'}),
        ('{"a": ' + "[" * 300 + "]" * 300 + "}", False, None),
    ],
)
def test_arguments(text: str, cut: bool, found: dict[str, Any] | None) -> None:
    assert json.loads(told([text], cut=cut)) == ({"INVALID_JSON": text} if found is None else found)


def test_long_arguments_cost_no_more_in_pieces() -> None:
    text = json.dumps({"path": "a", "content": '"quoted" \\ {text}\n' * 20_000})
    one, steps = ToolInput(), 0
    for piece in cuts(random.Random(1), text[:2000]):
        one.push(piece)
    for i in range(2000, len(text), 7):
        one.push(text[i : i + 7])
        steps += len(one._member) > 0
    assert steps and json.loads(told([text])) == json.loads(text)


def test_signatures() -> None:
    for text in ("Hm.", "", "ü😀\n" * 50):
        assert hidden(signature(text, shown=False)) == text and hidden(signature(text, shown=True)) == ""
    for other in ("", "EqQBCkYIBx", "thinking:", "thinking:%%%", "thinking:/w=="):
        assert hidden(other) == ""


def chat(messages: list[Any], way: Way = WAYS[0], **more: Any) -> ChatRequest:
    body = {"model": "m", "max_tokens": 5, "messages": messages, **more}
    return chat_request(MessagesRequest.model_validate_json(json.dumps(body)), way)


ASKED = {"role": "user", "content": [{"type": "text", "text": "Note"}, {"type": "text", "text": "Hi"}]}
THOUGHT = {"type": "thinking", "thinking": "WHY", "signature": "s"}
CALLED = {
    "role": "assistant",
    "content": [
        THOUGHT,
        {"type": "text", "text": "Let me"},
        {"type": "tool_use", "id": "toolu_01", "name": "weather", "input": {"city": "Rome"}},
    ],
}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_01", "content": [{"type": "text", "text": "SUN"}]}
GOT, GOT_AND_SAID = ({"role": "user", "content": [RESULT, *more]} for more in ([], [{"type": "text", "text": "And quick"}]))
SAID = {"role": "assistant", "content": "Sunny."}
NOTE = {"role": "system", "content": "LATE"}


def roles(request: ChatRequest) -> list[tuple[str, str]]:
    return [(one["role"], one["content"]) for one in request.messages]


def test_system_text_stays_where_it_stands() -> None:
    """So a conversation that grows begins as it did: what was computed of it is found again."""
    turns = [ASKED, CALLED, GOT, NOTE, SAID, NOTE, ASKED, CALLED, NOTE, GOT_AND_SAID, NOTE]
    whole = roles(chat(turns, system="S"))
    assert whole[:4] == [("system", "S"), ("user", "Note\nHi"), ("assistant", "Let me"), ("tool", "SUN\n\nLATE")]
    assert whole[4:] == [
        ("assistant", "Sunny."),
        ("user", "LATE\n\nNote\nHi"),
        ("assistant", "Let me"),
        ("tool", "SUN"),
        ("user", "LATE\n\nAnd quick\n\nLATE"),
    ]
    for n, known in ((4, 4), (7, 6)):
        assert roles(chat(turns[:n], system="S")) == whole[:known]
    assert roles(chat([NOTE, ASKED], system="S"))[0] == ("system", "S\nLATE")
    assert roles(chat([ASKED, SAID, NOTE]))[-1] == ("user", "LATE")


def test_tools_that_are_loaded_late() -> None:
    late = {**TOOL, "name": "late", "defer_loading": True}
    reference = {"type": "tool_result", "tool_use_id": "toolu_01", "content": [{"type": "tool_reference", "tool_name": "late"}]}
    names = [
        [tool["function"]["name"] for tool in chat(messages, tools=[late, TOOL], **more).tools]
        for messages, more in (
            ([ASKED], {}),
            ([ASKED, CALLED, {"role": "user", "content": [reference]}], {}),
            ([ASKED], {"tool_choice": {"type": "tool", "name": "late"}}),
        )
    ]
    assert names == [["weather"], ["late", "weather"], ["late", "weather"]]


@pytest.mark.realdata
def test_real_templates_take_what_clients_send(shared_data: Path) -> None:
    """Thinking, ids of Anthropic's, text behind results, notes of the system, an answer to go on with: in some way all do."""
    read: dict[Way, int] = dict.fromkeys(WAYS, 0)
    for path in sorted((shared_data / "tokenizers" / "chat_templates").glob("*.jinja")):
        template = chat_of(path.read_text())
        if (kind := detect(template)) is None and "gemma-2" not in path.name:
            continue
        talks = [[ASKED, SAID, NOTE, ASKED], [ASKED, ASKED, SAID]]
        talks += [[ASKED, CALLED, GOT_AND_SAID], [ASKED, CALLED, GOT, NOTE], [ASKED, CALLED, GOT, SAID, ASKED]] if kind else []
        for talk in talks:
            way, text = understood(template, talk, mistral=kind == "mistral")
            read[way] += 1
            told = ["Note", "Hi", *(["SUN"] if CALLED in talk else []), *(["LATE"] if NOTE in talk else [])]
            told += ["Be kind"] if "gemma-2" in path.name else []  # (some of Mistral's drop a system that no last user follows)
            assert all(word in text for word in told) and "None" not in text, path.name
            assert talk[-1] is not SAID or text.endswith("Sunny."), path.name
    assert all(read.values()) and sum(read.values()) >= 70


def understood(template: Any, talk: list[Any], *, mistral: bool) -> tuple[Way, str]:
    for way in WAYS:
        given = chat(talk, replace(way, fit_id=nine_characters) if mistral else way, system="Be kind", tools=[TOOL])
        options = {"add_generation_prompt": given.add_generation_prompt, "continue_final_message": given.continue_final_message}
        try:
            return way, template(given.messages, tools=list(tool_choice(given.tools, None).tools), **options)
        except RequestError:
            continue
    raise AssertionError("no way")


def test_blocks_without_anything() -> None:
    blocks = Blocks()
    assert blocks.push(AnswerDelta()) == [] and blocks.push(AnswerDelta(("",))) == [] and blocks.finish() == []


def test_signs_of_life(slow: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream begins although no token has come, and tells of itself while nothing comes."""
    monkeypatch.setattr(answer, "QUIET_S", 0.05)
    monkeypatch.setattr(turn, "PATIENCE_S", 0.05)
    slow.client.delay_s = 0.3
    body = {"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": "hello"}], "stream": True}
    with slow.http as http, http.stream("POST", "/v1/messages", json=body) as response:
        text = "".join(response.iter_text())
    start = text.index("message_start")
    assert text.count("event: ping") >= 6 and text.index("ping") > start
    events = events_of(text)
    assert events[0]["message"]["usage"]["output_tokens"] == 0 and events[-2]["usage"]["output_tokens"] == 2
    slow.client.fail_at = 0  # by then there is a stream that says so
    assert "event: error" in slow.post("/v1/messages", **body).text
