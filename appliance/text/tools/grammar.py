"""Calls that are a must, and what stands before an answer, as a grammar in llguidance's Lark."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from appliance.text.reasoning import Tags
from appliance.text.tools.choice import Alternative, Forced

_NONE: Mapping[str, int] = MappingProxyType({})
# How the arguments are spelled, as chat templates write them; what stands in the schema under this name may not say otherwise.
_SPELLING = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
    "coerce_one_of": False,
}


def lark(
    calls: Forced | None,
    tags: Tags | None = None,
    *,
    opened: bool = False,
    formed: bool = False,
    specials: Mapping[str, int] = _NONE,
) -> str:
    """The grammar of an answer that is calls, with reasoning before them where the model has tags for it.

    ``opened``: as ``Tags.opened`` says; the answer begins within reasoning then. ``formed``: it may be ``@answer`` instead.
    ``specials``: markers that are special tokens, and their ids: to a grammar such a token is no text.
    """

    def spelled(text: str) -> str:
        parts = re.split(f"({'|'.join(map(re.escape, specials))})", text) if specials else [text]
        return " ".join(f"<[{specials[part]}]>" if part in specials else _text(part) for part in parts)

    start, rules = ["calls"] if calls else [], [] if calls is None else _calls(calls, spelled, formed=formed)
    text = " | ".join(start + ["@answer"] * formed)
    if tags is None:
        return "\n".join([f"start: {text}", *rules])
    before = "thoughts between" if opened else f"({spelled(tags.start)} thoughts between)?"
    special = tags.end in specials
    rules.append(f"thoughts: /(?s:.*)/ {spelled(tags.end)}" if special else f"thoughts[suffix={_text(tags.end)}]: /(?s:.*)/")
    return "\n".join([f"start: {before} ({text})", *rules, r"between: /\n{0,2}/"])


def _calls(calls: Forced, spelled: Callable[[str], str], *, formed: bool) -> list[str]:
    rules = []
    for i, one in enumerate(calls.alternatives):
        if formed and one.begin.startswith("{"):  # as JSON: a text that begins so would keep out other JSON, read greedily
            rules.append(f"call{i}: %json {_json(_whole(one))}")
        else:
            rules.append(f"call{i}: {spelled(one.begin)} arguments{i} {spelled(one.end)}")
            rules.append(f"arguments{i}: %json {_json(one.schema)}")
    more = "" if calls.most == 1 else f" ({spelled(calls.between)} call)*"
    rules.append("call: " + " | ".join(f"call{i}" for i in range(len(calls.alternatives))))
    rules.append(f"calls: {spelled(calls.before)} call{more} {spelled(calls.after)}")
    return rules


def _whole(one: Alternative) -> dict[str, Any]:
    """The schema of a call that is nothing but JSON."""
    names = json.loads(f"{one.begin}null{one.end}")
    shared: dict[str, Any] = {
        name: one.schema[name] for name in ("$defs", "definitions") if name in one.schema
    }  # "#" is the whole now
    properties = {name: one.schema if value is None else {"const": value} for name, value in names.items()}
    return {**shared, "type": "object", "properties": properties, "required": [*names], "additionalProperties": False}


def _json(schema: Mapping[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": _SPELLING}, ensure_ascii=False)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
