"""Calls that are a must, and what stands before an answer, as a grammar in llguidance's Lark."""

from __future__ import annotations

import json

from appliance.text.reasoning import Tags
from appliance.text.tools.choice import Forced

# How the arguments are spelled, as chat templates write them; what stands in the schema under this name may not say otherwise.
_SPELLING = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
    "coerce_one_of": False,
}


def lark(calls: Forced | None, tags: Tags | None = None, *, opened: bool = False, formed: bool = False) -> str:
    """The grammar of an answer that is calls, with reasoning before them where the model has tags for it.

    ``opened``: as ``Tags.opened`` says; the answer begins within reasoning then. ``formed``: it may be ``@answer`` instead.
    """
    start, rules = ["calls"] if calls else [], [] if calls is None else _calls(calls)
    text = " | ".join(start + ["@answer"] * formed)
    if tags is None:
        return "\n".join([f"start: {text}", *rules])
    before = "thoughts between" if opened else f"({_text(tags.start)} thoughts between)?"
    rules += [f"thoughts[suffix={_text(tags.end)}]: /(?s:.*)/", r"between: /\n{0,2}/"]
    return "\n".join([f"start: {before} ({text})", *rules])


def _calls(calls: Forced) -> list[str]:
    rules = []
    for i, one in enumerate(calls.alternatives):
        schema = {**one.schema, "x-guidance": _SPELLING}
        rules.append(f"call{i}: {_text(one.begin)} arguments{i} {_text(one.end)}")
        rules.append(f"arguments{i}: %json {json.dumps(schema, ensure_ascii=False)}")
    more = "" if calls.most == 1 else f" ({_text(calls.between)} call)*"
    rules.append("call: " + " | ".join(f"call{i}" for i in range(len(calls.alternatives))))
    rules.append(f"calls: {_text(calls.before)} call{more} {_text(calls.after)}")
    return rules


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
