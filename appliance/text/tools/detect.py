"""Which format a model's calls have: the one whose parser reads what the model's own chat template writes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from appliance.core.params import RequestError
from appliance.text.tools.formats import PARSERS
from appliance.text.tools.parser import ToolParser
from appliance.text.tools.reader import decoded

_USER = "The question of the user"
_CITY = "Zürich {1}"
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_CALL: dict[str, Any] = {"id": "abcdef123", "type": "function", "function": {"name": "get_weather", "arguments": {"city": _CITY}}}
_NO_THOUGHTS = re.compile(r"<think>\s*(</think>)?|</think>")


def detect(chat: Callable[..., str]) -> str | None:
    """The name of the parser for a model's calls, None where no parser knows them. ``chat`` renders like ``Tokenizer.chat``."""
    user, answer = {"role": "user", "content": _USER}, {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    try:
        question = chat([user], add_generation_prompt=True, tools=[_TOOL])
        called = chat([user, answer], add_generation_prompt=False, tools=[_TOOL])
    except RequestError:  # the template knows no calls
        return None
    if _TOOL["function"]["name"] not in question:  # the model would never hear of its tools
        return None
    turn = _behind_user(question)
    return next((name for name, parser in PARSERS.items() if _reads(parser, _behind_user(called), turn)), None)


def _behind_user(text: str) -> str:
    return _NO_THOUGHTS.sub("", text.rpartition(_USER)[2])


def _reads(kind: type[ToolParser], text: str, turn: str) -> bool:
    """Whether a parser finds exactly the call, with nothing before it but how the template begins an assistant's turn."""
    text, turn = (text.removeprefix(turn), "") if text.startswith(turn) else (text, turn)
    found = [(call.name, decoded(call.arguments)) for call in kind().parse(text).calls]
    if found != [(_CALL["function"]["name"], _CALL["function"]["arguments"])]:
        return False
    parser, before = kind(), ""
    for character in text:
        before += parser.push(character).content
        if parser.count:
            break
    return turn.strip().startswith(before.strip())
