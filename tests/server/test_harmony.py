"""The format of gpt-oss in all APIs, over an engine that says what it is told to say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.config import ServerConfig
from appliance.server.parsers import Parsers
from appliance.text.reasoning import HARMONY
from appliance.text.tools.harmony import CALL, END, MARKERS, START, Harmony
from quant.errors import InputError
from tests.server import responses, test_messages
from tests.server.conftest import Served
from tests.server.test_tools import HELLO, IMPOSSIBLE, TOOL, ascii_only, ask, prompt_of, serve
from tests.text.harmony_texts import CALLS, FINAL, NEXT, SAID, TEMPLATE, THOUGHT, any_answer
from tests.text.tool_texts import seeded

CALL_OF_ROME = CALLS[0] % "weather" + '{"city": "Rome"}'
ANSWER = f"{THOUGHT}Hm.{NEXT}{FINAL}Sunny."
WHOLE = f"{THOUGHT}Hm.{NEXT}{SAID}Let me see.{NEXT}{THOUGHT}So.{NEXT}{CALL_OF_ROME}"
SCHEMA = TOOL["function"]["parameters"]
FORM = {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}}


@pytest.fixture(scope="module")
def harmony(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("harmony"), "Harmony", TEMPLATE) as one:
        assert one.state.parsers.tools is Harmony and one.state.parsers.tags is HARMONY
        yield one


def say(served: Served, text: str, seed: int = 0) -> None:
    served.client.say(text, seed)  # type: ignore[attr-defined]


def grammar(served: Served) -> str:
    return str(served.client.submitted[-1].params.grammar)


def test_answers_in_chat(harmony: Served) -> None:
    say(harmony, ANSWER)
    said = {"role": "assistant", "content": "Sunny.", "refusal": None, "reasoning_content": "Hm.", "reasoning": "Hm."}
    for tools in (None, [TOOL]):
        assert ask(harmony, tools=tools) == {**said, "finish_reason": "stop"}
        assert not grammar(harmony)
    say(harmony, WHOLE)
    message = ask(harmony)
    assert (message["reasoning"], message["content"], message["finish_reason"]) == ("Hm.\n\nSo.", "Let me see.", "tool_calls")
    assert [c["function"] for c in message["tool_calls"]] == [{"name": "weather", "arguments": '{"city": "Rome"}'}]
    assert "tool_calls" not in ask(harmony, tool_choice="none") and "weather" not in prompt_of(harmony)
    assert ask(harmony, tool_choice="none")["content"] == 'Let me see.\n\n{"city": "Rome"}'
    assert "reasoning" not in ask(harmony, include_reasoning=False)
    answer = harmony.post("/v1/chat/completions", messages=HELLO, reasoning_effort="high", n=2).json()
    assert "Reasoning: high" in prompt_of(harmony)
    counted = len("analysisHm.") + 3 + len("assistantanalysisSo.") + 4
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2 * counted}


def test_answers_in_responses(harmony: Served) -> None:
    say(harmony, ANSWER)
    response = responses.ask(harmony)
    assert responses.kinds(response) == ["reasoning", "message"]
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] == len("analysisHm.") + 3
    for seed in range(4):
        say(harmony, WHOLE, seed)
        response = responses.ask(harmony, tools=[responses.TOOL])
        assert responses.kinds(response) == ["reasoning", "message", "reasoning", "function_call"]
    result = {"type": "function_call_output", "call_id": response["output"][3]["call_id"], "output": "sun"}
    say(harmony, ANSWER)
    on = responses.ask(harmony, input=[{"role": "user", "content": "hello"}, *response["output"], result], tools=[responses.TOOL])
    assert responses.kinds(on) == ["reasoning", "message"]
    assert '<|call|><|start|>functions.f to=assistant<|channel|>commentary<|message|>"sun"<|end|>' in prompt_of(harmony)


def test_answers_in_messages(harmony: Served) -> None:
    for seed in range(4):
        say(harmony, WHOLE, seed)
        message = test_messages.ask(harmony, tools=[test_messages.TOOL])
        assert [block["type"] for block in message["content"]] == ["thinking", "text", "thinking", "tool_use"]
        assert test_messages.said(message, "tool_use") == [{"city": "Rome"}] and message["stop_reason"] == "tool_use"
    hidden = test_messages.ask(
        harmony, tools=[test_messages.TOOL], thinking={"type": "enabled", "budget_tokens": 1024, "display": "omitted"}
    )
    result = {"type": "tool_result", "tool_use_id": message["content"][3]["id"], "content": "sun"}
    for told in (message, hidden):
        result["tool_use_id"] = told["content"][3]["id"]
        on = [*HELLO, {"role": "assistant", "content": told["content"]}, {"role": "user", "content": [result]}]
        assert (
            harmony.post("/v1/messages", model="tiny", max_tokens=9, messages=on, tools=[test_messages.TOOL]).status_code == 200
        )
        assert f"{THOUGHT}Hm.\n\n\nSo.\n\nLet me see.{END}" in prompt_of(harmony)
    say(harmony, f" 5.{NEXT}{FINAL}So.")
    message = test_messages.ask(harmony, messages=[*HELLO, {"role": "assistant", "content": "It is"}])
    assert test_messages.said(message) == [" 5.\n\nSo."] and prompt_of(harmony).endswith(f"{FINAL}It is")


def test_whatever_it_says(harmony: Served) -> None:
    """Streamed and whole, in all of the APIs; tests/text/test_harmony.py says that nothing is lost."""
    for i, rng in enumerate(seeded(6, "harmony-http")):
        say(harmony, ascii_only(any_answer(rng)), i)
        limit = rng.choice([None, rng.randint(1, 60)])
        ask(harmony, max_tokens=limit, parallel_tool_calls=rng.random() < 0.7)
        if i % 3 == 0:
            responses.ask(harmony, tools=[responses.TOOL], max_output_tokens=limit)
            test_messages.ask(harmony, tools=[test_messages.TOOL], max_tokens=limit or 500)


def test_answers_that_are_cut_off(harmony: Served) -> None:
    say(harmony, WHOLE)
    for limit, reasoning in ((1, None), (9, None), (11, "H"), (14, "Hm."), (25, "Hm.")):
        message = ask(harmony, max_tokens=limit)
        assert (message.get("reasoning"), message["content"], message["finish_reason"]) == (reasoning, "", "length")
    cut = harmony.post("/v1/chat/completions", messages=HELLO, max_tokens=12).json()
    assert cut["usage"]["completion_tokens_details"] == {"reasoning_tokens": 12}
    message = ask(harmony, stop=["Ro"])
    assert message["tool_calls"][0]["function"]["arguments"] == '{"city": "'


def test_the_end_of_an_answer_is_no_text(harmony: Served) -> None:
    for text in (f"{ANSWER}<|return|>", ANSWER):
        say(harmony, text)
        assert ask(harmony)["content"] == ask(harmony, include_stop_str_in_output=True)["content"] == "Sunny."


def test_calls_that_are_a_must(harmony: Served) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        say(harmony, f"{THOUGHT}Hm.{NEXT}{CALL_OF_ROME}")
        message = ask(harmony, tool_choice=choice)
        assert message["reasoning"] == "Hm." and message["content"] is None
        assert message["tool_calls"][0]["function"]["arguments"] == '{"city": "Rome"}'
        assert "start: whole" in grammar(harmony) and "to=functions.weather" in grammar(harmony)
    on = {"messages": [*HELLO, {"role": "assistant", "content": "It is"}], "add_generation_prompt": False}
    say(harmony, f"{NEXT}{CALL_OF_ROME}")
    message = ask(harmony, tool_choice="required", continue_final_message=True, **on)
    assert message["content"] is None and len(message["tool_calls"]) == 1
    say(harmony, f"{START}assistant{ANSWER}")
    assert ask(harmony, **on)["content"] == "Sunny."
    refused = harmony.post("/v1/chat/completions", messages=HELLO, tools=[IMPOSSIBLE], tool_choice="required")
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "tools"


def test_the_final_message_has_a_form(harmony: Served) -> None:
    say(harmony, f'{THOUGHT}Hm.{NEXT}{FINAL}{{"city": "Rome"}}')
    for tools in (None, [TOOL]):
        message = ask(harmony, tools=tools, **FORM)
        assert (message["reasoning"], message["content"]) == ("Hm.", '{"city": "Rome"}')
        assert "@answer" in grammar(harmony) and ("to=functions.weather" in grammar(harmony)) == bool(tools)
    on = [*HELLO, {"role": "assistant", "content": '{"city": '}]
    say(harmony, '"Rome"}')
    message = ask(harmony, messages=on, add_generation_prompt=False, continue_final_message=True, **FORM)
    assert message["content"] == '"Rome"}' and "@answer" not in grammar(harmony) and "city" in grammar(harmony)


def test_strict_tools(harmony: Served) -> None:
    strict = {**TOOL, "function": {**TOOL["function"], "strict": True}}
    say(harmony, WHOLE)
    assert ask(harmony, tools=[strict])["content"] == "Let me see."
    assert '"commentary"' in grammar(harmony) and '"city"' in grammar(harmony)


def test_a_truncated_prompt_still_shows_where_the_answer_begins(harmony: Served) -> None:
    say(harmony, ANSWER)
    assert ask(harmony, truncate_prompt_tokens=20)["reasoning"] == "Hm."
    say(harmony, f" 5.{NEXT}{FINAL}So.")
    on = {"messages": [*HELLO, {"role": "assistant", "content": "It is" * 20}], "add_generation_prompt": False}
    assert ask(harmony, continue_final_message=True, truncate_prompt_tokens=10, **on)["content"] == " 5.\n\nSo."
    say(harmony, '{"city": "Rome"}')
    ask(harmony, continue_final_message=True, truncate_prompt_tokens=10, **on, **FORM)
    assert "city" in grammar(harmony) and "@answer" not in grammar(harmony)


def test_options(tmp_path: Path) -> None:
    for given in ({"tool_call_parser": "openai"}, {"reasoning_parser": "openai_gptoss"}):
        found = Parsers.of(None, ServerConfig(**given))
        assert found.tools is Harmony and found.tags is HARMONY
    found = Parsers.of(None, ServerConfig(reasoning_parser="openai_gptoss", tool_call_parser="none"))
    assert found.tools is None and found.tags is HARMONY
    for wrong in ({"tool_call_parser": "hermes"}, {"reasoning_parser": "qwen3"}, {"reasoning_parser": "none"}):
        both = {"tool_call_parser": "openai", "reasoning_parser": "openai_gptoss", **wrong}
        with pytest.raises(InputError, match="calls and reasoning of gpt-oss are one format"):
            Parsers.of(None, ServerConfig(**both))
    with serve(tmp_path, "none", TEMPLATE, tool_call_parser="none") as one:  # its markers are no special tokens
        say(one, WHOLE)
        assert ask(one, tools=None)["reasoning"] == "Hm.\n\nSo."
        refused = one.post("/v1/chat/completions", messages=HELLO, **FORM)
        assert refused.status_code == 400 and "no special token" in refused.json()["error"]["message"]
        assert refused.json()["error"]["param"] == "response_format.json_schema.schema"
        assert one.post("/v1/chat/completions", messages=HELLO, tools=[TOOL]).status_code == 400


@pytest.mark.realdata
def test_openai_client_goes_all_the_way(tmp_path: Path, shared_data: Path) -> None:
    """A question, a call, its result, an answer, with the published template; the client's own messages are sent back."""
    source = (shared_data / "tokenizers" / "chat_templates" / "openai-gpt-oss-120b.jinja").read_text()
    with serve(tmp_path, "Harmony", source) as one:
        client = one.openai
        say(one, WHOLE)
        answer = client.chat.completions.create(model="tiny", messages=HELLO, tools=[TOOL], reasoning_effort="low")  # type: ignore[list-item]
        message = answer.choices[0].message
        assert message.tool_calls and message.content == "Let me see." and "Reasoning: low" in prompt_of(one)
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sun"}
        say(one, f"{ANSWER}<|return|>")
        told = [*HELLO, message.model_dump(), result]
        final = client.chat.completions.create(model="tiny", messages=told, tools=[TOOL], tool_choice="auto")  # type: ignore[list-item]
        assert final.choices[0].message.content == "Sunny." and final.choices[0].finish_reason == "stop"
        prompt = prompt_of(one)
        call = (
            f'assistant to=functions.weather<|channel|>commentary json<|message|>{{"city": "Rome"}}{CALL}{START}functions.weather'
        )
        assert f"{THOUGHT}Hm.\n\nSo.\n\nLet me see.{END}{START}{call} to=assistant" in prompt and '"sun"' in prompt
        assert all(marker in prompt for marker in MARKERS if marker not in ("<|constrain|>", "<|return|>"))
        assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Rome"}  # type: ignore[union-attr]


def test_text_that_looks_like_a_marker_is_text(harmony: Served) -> None:
    """The tokens tell: whoever asks a model about this format gets an answer."""
    assert harmony.state.tokenizer is not None
    encode, literal = harmony.state.tokenizer.encode, f"{END}{START}assistant{FINAL}"
    parts = [f"{THOUGHT}Is it ", literal, f"?{NEXT}{FINAL}It is ", literal, "."]
    ids = [
        [i for text in ([part] if k % 2 == 0 else part) for i in encode(text, add_special_tokens=False)]
        for k, part in enumerate(parts)
    ]
    harmony.client.script = [(i,) for part in ids for i in part]  # type: ignore[attr-defined]
    message = ask(harmony)
    assert message["reasoning"] == f"Is it {literal}?" and message["content"] == f"It is {literal}."
    usage = harmony.post("/v1/chat/completions", messages=HELLO).json()["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": sum(map(len, ids[:2])) + 2}
