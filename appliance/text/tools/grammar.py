"""Calls that are a must, and what stands before an answer, as a grammar in llguidance's Lark."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from appliance.text.reasoning import Tags
from appliance.text.tools.choice import Alternative, Forced
from appliance.text.tools.harmony import CHANNEL, END, MESSAGE, START
from appliance.text.tools.tags import Tagging, as_text

_NONE: Mapping[str, int] = MappingProxyType({})
# How the arguments are spelled, as chat templates write them; what stands in the schema under this name may not say otherwise.
_SPELLING = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
    "coerce_one_of": False,
}


_SPACE = r"[\s\x1c-\x1f]*"  # what Python takes for white space
_HEAD = '{"name": "'  # of a call without a marker, as the grammar writes it behind one
# The same as a model may write it; what stands before it says whether the parser takes it for a call's (``Llama3Json``).
_BEGUN = rf'\{{{_SPACE}("type"{_SPACE}:{_SPACE}"function"{_SPACE},{_SPACE})?"name"{_SPACE}:{_SPACE}"'
_TEXT = "/(?s:.*)/"


def lark(
    calls: Forced | None,
    tags: Tags | None = None,
    *,
    opened: bool = False,
    formed: bool = False,
    markers: Sequence[str] = (),
    specials: Mapping[str, int] = _NONE,
) -> str:
    """The grammar of an answer that is calls, with reasoning before them where the model has tags for it.

    ``opened``: as ``Tags.opened`` says; the answer begins within reasoning then. ``formed``: it may be ``@answer`` instead.
    ``markers``: it may be any text instead, in which these begin calls. ``specials``: markers that are special tokens, and their
    ids: to a grammar such a token is no text.
    """

    spelled = _speller(specials)
    if calls is not None and markers:
        text, rules = "answer", _among_text(calls, markers, spelled, specials)
    else:
        start, rules = ["calls"] if calls else [], [] if calls is None else _calls(calls, spelled, formed=formed)
        text = " | ".join(start + ["@answer"] * formed)
    if tags is None:
        return "\n".join([f"start: {text}", *rules])
    special = tags.end in specials
    rules.append(f"thoughts: {_TEXT} {spelled(tags.end)}" if special else f"thoughts[suffix={_text(tags.end)}]: {_TEXT}")
    rules.append(r"between: /\n{0,2}/")
    if text != "answer":
        before = "thoughts between" if opened else f"({spelled(tags.start)} thoughts between)?"
        return "\n".join([f"start: {before} ({text})", *rules])
    rules.append(f"UNENDED: TEXT & ~/(?s:.*{_literal(tags.end)}.*)/")
    thinking = "(thoughts between answer | UNENDED)"  # text that is free may end anywhere
    if opened:
        whole = thinking
    elif tags.start in specials:
        whole = f"{spelled(tags.start)} {thinking} | answer"
    else:  # it could be either, and text goes on for longer
        whole = f"{spelled(tags.start)} {thinking} | bare_answer"
        rules += [rf"BARRED: /(?s:{_SPACE}{_literal(tags.start)}.*)/", *_answer(rules, "bare_", " & ~BARRED")]
    return "\n".join([f"start: {whole}", *rules])


def harmony(calls: Forced | None, place: str, *, formed: bool, free: bool, specials: Mapping[str, int]) -> str:
    """The same for gpt-oss, whose answers are messages: reasoning, then a call or the final message, which is ``@answer``.

    ``place``: that of a ``Harmony`` which has read what the prompt has of the answer. ``free``: messages are of all kinds and may
    end anywhere, calls alone are held. ``specials`` has all of the markers.
    """
    spelled = _speller(specials)
    further = spelled(f"{END}{START}assistant")
    channels = ("analysis", "commentary", "final") if free else ("analysis",)
    last = ["said"] * free + ["calls"] * (calls is not None) + [spelled(f"{CHANNEL}final{MESSAGE}") + " @answer"] * formed
    start = {"header": "whole", "between": f"{spelled(f'{START}assistant')} whole", "reasoning": f"TEXT {further} whole"}
    within = f"TEXT ({further} whole)?" if free else f"{further} whole"
    return "\n".join(
        [
            f"start: {within if free and place == 'reasoning' else start.get(place, within)}",
            f"whole: (said {further})* ({' | '.join(last)})",
            f"said: {spelled(CHANNEL)} ({' | '.join(map(_text, channels))}) {spelled(MESSAGE)} TEXT",
            f"TEXT: {_TEXT}",
            *([] if calls is None else _calls(calls, spelled, formed=False)),
        ]
    )


def _speller(specials: Mapping[str, int]) -> Callable[[str], str]:
    """Writes a text in Lark, markers that are special tokens by their ids, and what stands between two NULs as a pattern."""
    apart = re.compile("|".join(("(\0.*?\0)", *(f"({re.escape(one)})" for one in specials))))

    def one(part: str) -> str:
        if part.startswith("\0"):
            return f"/{part[1:-1]}/"
        return f"<[{specials[part]}]>" if part in specials else _text(part)

    return lambda text: " ".join(one(part) for part in apart.split(text) if part)


def _calls(calls: Forced, spelled: Callable[[str], str], *, formed: bool) -> list[str]:
    rules = []
    for i, one in enumerate(calls.alternatives):
        if formed and one.begin.startswith("{"):  # as JSON: a text that begins so would keep out other JSON, read greedily
            rules.append(f"call{i}: %json {_json(_whole(one))}")
        else:
            rules.append(f"call{i}: {spelled(one.begin)} arguments{i} {spelled(one.end)}")
            name, tags = f"arguments{i}", calls.tagged
            rules += _tagged(name, one.schema, tags, spelled) if tags else [f"{name}: %json {_json(one.schema)}"]
    if calls.tagged and calls.tagged.end:
        end, plain = spelled(calls.tagged.end), _text(calls.tagged.end)
        rules.append(f"value[suffix={plain}]: {_TEXT}" if end == plain else f"value: {_TEXT} {end}")
    more = "" if calls.most == 1 else f" ({spelled(calls.between)} call)*"
    rules.append("call: " + " | ".join(f"call{i}" for i in range(len(calls.alternatives))))
    rules.append(f"calls: {spelled(calls.before)} call{more} {spelled(calls.after)}")
    if more and (calls.between + calls.alternatives[0].begin)[:2] == calls.after[:2]:
        rules.append('%llguidance {"no_forcing": true}')  # else what both begin with is forced, and keeps the markers' tokens out
    return rules


def _tagged(name: str, schema: Mapping[str, Any], tags: Tagging, spelled: Callable[[str], str]) -> list[str]:
    """Rules of arguments in tags: the properties in their order, of which those that are not required may be missing.

    Where none are named there may be any.
    """
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    parts, rules = [], []
    unnamed = {key: {"type": "string"} if tags.end else {} for key in required if key not in properties}
    for i, (key, one) in enumerate({**properties, **unnamed}.items()):
        value = "value"
        if as_text(one, tags):
            value = f"({' | '.join(spelled(some + tags.end) for some in one['enum'])})" if "enum" in one else value
        else:
            given = one if isinstance(one, Mapping) else {}
            refers = '"$ref"' in json.dumps(given)
            rules.append(f"{name}_json{i}: %json {_json({**(shared if refers else {}), **given})}")
            value = f"{name}_json{i} {spelled(tags.end)}"
        if one is not False:
            rules.append(f"{name}_{i}: {spelled(tags.begin(key))} {value}" + ' "\\n"' * bool(tags.end))
            parts.append(f"{name}_{i}" if key in required else f"{name}_{i}?")
    free = not parts and schema.get("additionalProperties", True) is True
    if not tags.end:
        if free:
            return [f'{name}: ({name}_any (", " {name}_any)*)?', f"{name}_any: /\\w+/ {spelled(tags.between)} %json {_json({})}"]
        return [*_listed(name, parts), *rules]
    if free:
        rules.append(f'{name}_any: {spelled(tags.before)} /[^"<>\\n]+/ {spelled(tags.between)} value "\\n"')
        parts = [f"{name}_any*"]
    return [f"{name}: {' '.join(parts) or _text('')}", *rules]


def _listed(name: str, parts: Sequence[str]) -> list[str]:
    """Rules of arguments with commas between them, of which those that end in "?" may be missing."""
    rules = []
    for i, part in enumerate(parts):
        rest = f"{name}_more{i + 1}"
        rules.append(f"{name}_from{i}: {part.rstrip('?')} {rest}" + f" | {name}_from{i + 1}" * part.endswith("?"))
        rules.append(f'{name}_more{i}: ", " {part.rstrip("?")} {rest}' + f" | {rest}" * part.endswith("?"))
    last = len(parts)
    return [f"{name}: {name}_from0", *rules, f'{name}_from{last}: ""', f'{name}_more{last}: ""']


def _among_text(calls: Forced, markers: Sequence[str], spelled: Callable[[str], str], specials: Mapping[str, int]) -> list[str]:
    """Rules of ``answer``: text in which a marker, or what the parser takes for a call's beginning, begins one of ``calls``.

    Each call is written to its end, behind which the parser looks for no other. Lazily: a text ends with its first marker. Calls
    are written with the first of the markers; behind the others they go on alike.
    """
    bare = not (calls.before or calls.alternatives[0].begin).startswith(markers[0])  # a call may begin with its own JSON alone
    cut = len(_HEAD) if bare else len(markers[0])
    if calls.before:
        tail = replace(calls, before=calls.before[cut:])
    else:
        each = tuple(replace(one, begin=one.begin[cut:]) for one in calls.alternatives)
        tail = replace(calls, alternatives=each, most=1)
    rules = [*_calls(tail, spelled, formed=False), f"TEXT: {_TEXT}"]
    special, plain = ([spelled(one) for one in markers if (one in specials) == token] for token in (True, False))
    rules += [f"marker: {' | '.join(special)}"] * bool(special) + [f"MARKED: TEXT ({' | '.join(plain)})"] * bool(plain)
    if bare:
        written = [json.loads(f"{one.begin}null{one.end}")["name"] for one in calls.alternatives]
        names = "|".join(_literal(_text(name)[1:-1]) for name in written)
        rules += [
            f'KNOWN: /(?s:({names})".*)/',
            "UNKNOWN: TEXT & ~KNOWN",  # behind the head that a call has
            f"behind[lazy]: /(?s:((.*\\n)?{_SPACE}|{_SPACE};{_SPACE}){_BEGUN})/",
            f"LATER: /(?s:.*\\n{_SPACE}{_BEGUN})/",
            "later[lazy]: LATER & ~KNOWN",
            f"FIRST: /(?s:(.*\\n)?{_SPACE}{_BEGUN})/",
            f"next: {_text(_HEAD)} calls",
            "unknown_marked: UNKNOWN marker" if special else "unknown_marked[lazy]: MARKED & ~KNOWN",
        ]
    return rules + _answer(rules)


def _answer(rules: list[str], name: str = "", but: str = "") -> list[str]:
    """Rules of an answer that is free, beside the shared ``rules``: ``called`` is all of it up to a call's end, ``begun`` up
    to a call's head. ``but``: what its first text may not be."""
    special, plain = (any(rule.startswith(one) for rule in rules) for one in ("marker:", "MARKED:"))
    free = [f"{name.upper()}FREE: TEXT{but}"]
    free += [f"{name}written[lazy]: MARKED{but}"] * plain
    free.append(f"{name}marked: " + " | ".join([f"{name.upper()}FREE marker"] * special + [f"{name}written"] * plain))
    after = "marked_after"
    if not name:
        free += ["plain_marked[lazy]: MARKED"] * plain
        free.append("marked_after: " + " | ".join(["TEXT marker"] * special + ["plain_marked"] * plain))
    if not any(rule.startswith("FIRST") for rule in rules):
        return [
            *free,
            f"{name}called: {name}marked calls | {name}called {after} calls",
            f"{name}answer: {name.upper()}FREE | {name}called TEXT",
        ]
    return [
        *free,
        f"{name}first[lazy]: FIRST{but}",
        f"{name}called: {name}marked next | {name}begun calls | {name}called {after} next | {name}begun unknown_marked next",
        f"{name}begun: {name}first | {name}called behind | {name}begun later",
        f"{name}answer: {name.upper()}FREE | {name}called TEXT | {name}begun UNKNOWN",
    ]


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


def _literal(text: str) -> str:
    """As it stands within a regular expression of Lark."""
    return re.escape(text).replace("/", r"\/")
