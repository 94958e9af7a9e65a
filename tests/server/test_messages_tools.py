"""Tools in POST /v1/messages, for every format of calls, by Anthropic's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import anthropic
import pytest

from tests.server.conftest import Served
from tests.server.test_messages import HELLO, TOOL, ask, client, said
from tests.server.test_tools import CALL, ascii_only, prompt_of, serve
from tests.text.tool_texts import FORMS, KINDS, any_text, calls, seeded


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def any_kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Any]]:
    with serve(tmp_path_factory.mktemp("tools"), request.param.__name__) as one:
        yield one, request.param


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("hermes"), "Hermes") as one:
        yield one


def test_streamed_and_whole_answers_are_equal(any_kind: tuple[Served, Any]) -> None:
    """For every parser, whatever the model says and however it comes."""
    served, kind = any_kind
    for i, rng in enumerate(seeded(8, f"messages-{kind.__name__}")):
        text = ascii_only(any_text(rng))
        served.client.say(text, i)  # type: ignore[attr-defined]
        think, single = rng.random() < 0.3, rng.random() < 0.3
        choice = {"type": "auto", "disable_parallel_tool_use": single}
        limit = rng.choice([1000, 1000, max(1, len(text) // 2)])
        message = ask(served, tools=[TOOL], tool_choice=choice, chat_template_kwargs={"think": think}, max_tokens=limit)
        found = [block["type"] for block in message["content"]]
        assert found.count("tool_use") <= 1 or not single
        if message["usage"]["output_tokens"] == limit:
            assert message["stop_reason"] == "max_tokens"
        else:
            assert message["stop_reason"] == ("tool_use" if "tool_use" in found else "end_turn")
        assert all(isinstance(one, dict) for one in said(message, "tool_use"))
        assert not any(a == b != "tool_use" for a, b in pairwise(found))  # nothing is in two pieces


def test_calls_of_every_form(any_kind: tuple[Served, Any]) -> None:
    served, kind = any_kind
    for i, rng in enumerate(seeded(3, "forms")):
        some = [(name, json.dumps(json.loads(ascii_only(arguments)))) for name, arguments in calls(rng)]
        for form in FORMS[kind]:
            served.client.say("Let me see.\n" + form.write(some), i)  # type: ignore[attr-defined]
            message = ask(served, tools=[TOOL], max_tokens=4000)
            assert said(message) == ["Let me see."] and message["stop_reason"] == "tool_use"
            written = [(block["name"], block["input"]) for block in message["content"][1:]]
            assert written == [(name, json.loads(arguments)) for name, arguments in some]


def test_all_the_way(any_kind: tuple[Served, Any]) -> None:
    """A question, a call, its result, an answer: blocks go back as they came, ids too."""
    served, kind = any_kind
    api = client(served).messages
    form = FORMS[kind][0]
    served.client.say("<think>Hm.</think>" + form.write([("weather", '{"city": "Rome"}')]))  # type: ignore[attr-defined]
    first = api.create(model="tiny", max_tokens=500, messages=HELLO, tools=[TOOL])  # type: ignore[list-item]
    assert first.stop_reason == "tool_use" and [block.type for block in first.content] == ["thinking", "tool_use"]
    call = first.content[1]
    assert call.type == "tool_use" and call.input == {"city": "Rome"}
    served.client.say("Sunny.")  # type: ignore[attr-defined]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sun"}]}
    answer: Any = {"role": "user", "content": [result, {"type": "text", "text": "quick"}]}
    final = api.create(
        model="tiny",
        max_tokens=50,
        messages=[*HELLO, {"role": "assistant", "content": first.content}, answer],
        tools=[TOOL],  # type: ignore[list-item]
        tool_choice={"type": "auto"},
        system=[{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}],
    )
    assert final.content[0].to_dict() == {"type": "text", "text": "Sunny."} and final.stop_reason == "end_turn"
    written = CALL[kind.__name__].replace("NAME", "weather").replace("ARGUMENTS", '{"city": "Rome"}')
    prompt = prompt_of(served)
    assert "system: Be kind." in prompt and f"<think>Hm.</think>{written}" in prompt
    assert prompt.index(written) < prompt.index("tool: sun") < prompt.index("user: quick")


def test_the_clients_tool_runner(hermes: Served) -> None:
    """The beta routes' client runs tools by itself until the model calls none."""

    @anthropic.beta_tool
    def weather(city: str) -> str:
        """Of a city.

        Args:
            city: Its name.
        """
        lines.append(city)
        hermes.client.say("Sunny.")  # type: ignore[attr-defined]
        return "sun"

    lines: list[str] = []
    hermes.client.say(FORMS[KINDS[0]][0].write([("weather", '{"city": "Rome"}')]))  # type: ignore[attr-defined]
    runner = client(hermes).beta.messages.tool_runner(
        model="tiny", max_tokens=500, messages=HELLO, tools=[weather], betas=["interleaved-thinking-2025-05-14"]
    )
    final = runner.until_done()
    assert lines == ["Rome"] and final.content[0].to_dict()["text"] == "Sunny."
    assert "tool: sun" in prompt_of(hermes) and '"description": "Of a city."' in prompt_of(hermes)


def test_calls_that_are_cut_off_or_broken(hermes: Served) -> None:
    """What a client gets is always an object: members that are complete, and of what is no JSON the model's own text."""
    call = '<tool_call>{"name": "weather", "arguments": %s}</tool_call>'
    hermes.client.say(call % '{"city": "Rome", "days": 12}')  # type: ignore[attr-defined]
    message = ask(hermes, tools=[TOOL], max_tokens=60)
    assert message["stop_reason"] == "max_tokens" and said(message, "tool_use") == [{"city": "Rome"}]
    message = ask(hermes, tools=[TOOL], stop_sequences=["12"])
    assert message["stop_reason"] == "stop_sequence" and message["stop_sequence"] == "12"
    assert said(message, "tool_use") == [{"city": "Rome"}]
    message = ask(hermes, tools=[TOOL], stop_sequences=["</tool_call>"])
    assert (message["stop_reason"], message["stop_sequence"]) == ("tool_use", None)
    for wrong in ('{"city": Rome}', '{"city": "Rome" "days": 1}', '{"city": "Rome", "days": 01}'):
        hermes.client.say(call % wrong)  # type: ignore[attr-defined]
        (found,) = said(ask(hermes, tools=[TOOL]), "tool_use")
        assert found["INVALID_JSON"].startswith(wrong[:-1])
    hermes.client.say(call % '{"city": "a\nb"}')  # type: ignore[attr-defined]
    assert said(ask(hermes, tools=[TOOL]), "tool_use") == [{"city": "a\nb"}]


def test_text_between_calls(hermes: Served) -> None:
    one = '<tool_call>{"name": "a"}</tool_call>'
    hermes.client.say(f"So {one} and {one}.")  # type: ignore[attr-defined]
    message = ask(hermes, tools=[TOOL])
    assert [block["type"] for block in message["content"]] == ["text", "tool_use", "text", "tool_use", "text"]


def test_tool_choice(any_kind: tuple[Served, Any]) -> None:
    """any and tool hold the answer to a grammar of calls; none tells the model of no tools."""
    served, kind = any_kind
    served.client.say(FORMS[kind][0].write([("weather", '{"city": "Rome"}')]))  # type: ignore[attr-defined]
    for choice, several in (
        ({"type": "any"}, True),
        ({"type": "any", "disable_parallel_tool_use": True}, False),
        ({"type": "tool", "name": "weather"}, False),
    ):
        assert said(ask(served, tools=[TOOL], tool_choice=choice), "tool_use") == [{"city": "Rome"}]
        grammar = served.client.submitted[-1].params.grammar
        assert ("call)*" in grammar) == several and "city" in grammar
    message = ask(served, tools=[TOOL], tool_choice={"type": "none"})
    assert not said(message, "tool_use") and "weather" not in prompt_of(served).split("user:")[0]
    assert not served.client.submitted[-1].params.grammar
