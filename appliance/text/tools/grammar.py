"""Calls that are a must, and what stands before an answer, as a grammar in llguidance's Lark."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
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


# Of a format without a marker: a brace at the beginning, in a new line, or behind a call; and text that begins no call behind it.
_BRACES = (
    r"KEY: /(?s:\s*\"(name|parameters|arguments|type|id)\".*|\s*\"[^\"\\]*\\.*)/",
    r"BRACE: /(?s:(.*\n)?\s*;?\s*\{)/",
    "PLAIN: TEXT & ~KEY",
    "open[lazy]: BRACE",
    "again[lazy]: BRACE & ~KEY",
    'answer: TEXT | (open calls? | marked "{" calls) more',
    'more: (again calls? | remarked "{" calls)* PLAIN',
)


def lark(
    calls: Forced | None,
    tags: Tags | None = None,
    *,
    opened: bool = False,
    formed: bool = False,
    marker: str = "",
    specials: Mapping[str, int] = _NONE,
) -> str:
    """The grammar of an answer that is calls, with reasoning before them where the model has tags for it.

    ``opened``: as ``Tags.opened`` says; the answer begins within reasoning then. ``formed``: it may be ``@answer`` instead.
    ``marker``: it may be any text instead, in which this begins calls. ``specials``: markers that are special tokens, and their
    ids: to a grammar such a token is no text.
    """

    def spelled(text: str) -> str:
        parts = re.split(f"({'|'.join(map(re.escape, specials))})", text) if specials else [text]
        return " ".join(f"<[{specials[part]}]>" if part in specials else _text(part) for part in parts)

    if calls is not None and marker:
        text, rules = "answer", _among_text(calls, marker, spelled, special=marker in specials)
    else:
        start, rules = ["calls"] if calls else [], [] if calls is None else _calls(calls, spelled, formed=formed)
        text = " | ".join(start + ["@answer"] * formed)
    if tags is None:
        return "\n".join([f"start: {text}", *rules])
    before = "thoughts between" if opened else f"({spelled(tags.start)} thoughts between)?"
    if text == "answer" and not opened and tags.start not in specials:  # as text it could be either, and text goes on for longer
        before, text = "", f"{spelled(tags.start)} thoughts between answer | bare"
        rules += _bare(rules, tags.start)
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


def _among_text(calls: Forced, marker: str, spelled: Callable[[str], str], *, special: bool) -> list[str]:
    """Rules of ``answer``: text in which the marker, or what the parser takes for a call's beginning, begins one of ``calls``.

    Each call is written to its end, behind which the parser looks for no other. Lazily: a text ends with its first marker.
    """
    brace = not (calls.before or calls.alternatives[0].begin).startswith(marker)  # a call may begin with that alone
    cut = 1 if brace else len(marker)
    if calls.before:
        tail = replace(calls, before=calls.before[cut:])
    else:
        each = tuple(replace(one, begin=one.begin[cut:]) for one in calls.alternatives)
        tail = replace(calls, alternatives=each, most=1)
    rules = [*_calls(tail, spelled, formed=False), "TEXT: /(?s:.*)/"]
    if special:
        rules += [f"marked: TEXT {spelled(marker)}", f"remarked: PLAIN {spelled(marker)}"]
    else:
        rules += [f"MARKED: TEXT {_text(marker)}", "marked[lazy]: MARKED", "remarked[lazy]: MARKED & ~KEY"]
    return [*rules, *_BRACES] if brace else [*rules[:-1], "answer: (marked calls)* TEXT"]


def _bare(rules: list[str], tag: str) -> list[str]:
    """Rules of ``bare``: an answer, as ``_among_text`` has it, that does not begin with a tag."""
    barred, marked = rf"BARRED: /(?s:\s*{re.escape(tag)}.*)/", next(rule for rule in rules if rule.startswith("marked"))
    found = [barred, "BARE: TEXT & ~BARRED", "barely" + marked.removeprefix("marked").replace("TEXT", "BARE")]
    if "[lazy]" in marked:
        found[-1] += " & ~BARRED"
    if _BRACES[0] not in rules:
        return [*found, "bare: BARE | barely calls answer"]
    return [*found, "openly[lazy]: BRACE & ~BARRED", 'bare: BARE | (openly calls? | barely "{" calls) more']


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
