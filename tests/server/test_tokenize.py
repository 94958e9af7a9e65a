"""POST /tokenize of a conversation: the tokens that chat computes with the same fields, and the same words for what it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.conftest import Served
from tests.server.test_tools import TOOL, serve

CHAT = "/v1/chat/completions"
CALL = {"id": "call_of_another_server", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
HELLO = [{"role": "user", "content": "a"}]
CALLED = [
    *HELLO,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": CALL["id"], "content": "b"},
]
BARE: dict[str, Any] = {"type": "function", "function": {"name": "bare", "description": None}}
TEMPLATE = """<s>{{ tools | tojson if tools else "" }}{{ documents }}{{ reasoning_effort }}{{ enable_thinking }}{{ colour }}
{% for m in messages %}{{ m.role }}: {{ m.content or '' }}{{ m.tool_call_id }}{% for c in m.tool_calls or [] %}\
[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{{ c.id }}{% endfor %}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("mistral"), "Mistral", TEMPLATE) as one:
        yield one


@pytest.mark.parametrize(
    "body",
    [
        {"messages": CALLED},
        {"messages": HELLO, "tools": [TOOL, BARE]},
        {"messages": HELLO, "tools": [TOOL, BARE], "tool_choice": "none"},
        {
            "messages": HELLO,
            "tools": [TOOL, BARE],
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "bare"}}]},
            },
        },
        {"messages": HELLO, "documents": [{"text": "d"}], "reasoning_effort": "low"},
        {"messages": HELLO, "reasoning_effort": "none", "chat_template_kwargs": {"colour": "red"}},
        {"messages": [{"role": "developer", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]}, *HELLO]},
        {
            "messages": [*HELLO, {"role": "assistant", "content": "b"}],
            "continue_final_message": True,
            "add_generation_prompt": False,
        },
    ],
)
def test_a_conversation_has_the_tokens_that_chat_computes(mistral: Served, body: dict[str, Any]) -> None:
    counted = mistral.post("/tokenize", **body).json()
    assert mistral.post(CHAT, **body, max_tokens=1).status_code == 200
    computed = list(mistral.client.submitted[-1].prompt_token_ids)
    assert counted["tokens"] == computed and counted["count"] == len(computed)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_what_chat_refuses_is_refused(mistral: Served, more: dict[str, Any], param: str) -> None:
    answers = [mistral.post(path, messages=HELLO, **more) for path in ("/tokenize", CHAT)]
    assert [one.status_code for one in answers] == [400, 400]
    assert answers[0].json() == answers[1].json() and answers[0].json()["error"]["param"] == param


def test_tools_are_looked_at_beside_a_prompt_too(mistral: Served) -> None:
    answer = mistral.post("/tokenize", prompt="a", tool_choice={"type": "function"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "tool_choice"


def test_unknown_fields_are_named_or_refused(tmp_path_factory: pytest.TempPathFactory, mistral: Served) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})):
        assert mistral.post(path, **body, colour=1, **{path[1:]: 1}).status_code == 200
    assert {"colour", "tokenize", "detokenize"} <= mistral.state.shared.named
    with serve(tmp_path_factory.mktemp("strict"), "Mistral", strict_requests=True) as strict:
        for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})):
            error = strict.post(path, **body, colour=1).json()["error"]
            assert (error["param"], error["code"]) == ("colour", "unknown_parameter")
            assert strict.post(path, **body).status_code == 200
