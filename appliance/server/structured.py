"""What a body says of its answer's form: OpenAI's response_format, vLLM's structured_outputs, its older names, llama.cpp's."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from functools import partial
from typing import Any

from appliance.core.params import RequestError, SamplingParams, StructuredOutputsParams
from appliance.server.schemas import PromptFields, SamplingFields
from appliance.text.compiler import Brief, Unfinished
from appliance.text.grammar import compile_grammar

# Field of a body -> what it is called in StructuredOutputsParams.
SHORT = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json_object": "json_object",
    "json_schema": "json",  # llama.cpp's, like the next
    "grammar": "grammar",
}
NOTHING = {"guided_json_object": False, "grammar": ""}  # what else than null says nothing: llama.cpp's clients send the latter
_waiting = ThreadPoolExecutor(32, thread_name_prefix="grammar")
_long = ThreadPoolExecutor(1, thread_name_prefix="long grammar")
KNOWN = tuple(field.name for field in fields(StructuredOutputsParams))


async def with_grammar(params: SamplingParams, body: SamplingFields) -> SamplingParams:
    """The parameters with what the body says of its answer's form, compiled (which may take long) beside the event loop.

    Raises RequestError naming the body's field.
    """
    found = structured_outputs(body)
    if found is None:
        return params
    source, structured = found
    params = replace(params, structured_outputs=structured)
    try:
        grammar = await compiled(structured)
    except RequestError as error:
        if source is None or error.code is not None:
            raise
        raise _renamed(error, source) from None
    return replace(params, grammar=grammar)


def _renamed(error: RequestError, source: str) -> RequestError:
    """With the name of the body's field."""
    param = error.param or ""
    name = "guided_whitespace_pattern" if param.endswith(".whitespace_pattern") else source
    return RequestError(str(error).replace(param, name, 1), param=name)


async def compiled(
    structured: StructuredOutputsParams, around: str = "", *, ours: bool = False, parts: Mapping[str, str] | None = None
) -> str:
    """As ``compile_grammar``, whose turn may be long in coming: not in the threads that all others need.

    What takes long goes to a line of its own, and what nobody waits for any more is not begun.
    """
    work, brief, loop = partial(compile_grammar, structured, around, ours=ours, parts=parts), Brief(), asyncio.get_running_loop()
    try:
        return await loop.run_in_executor(_waiting, brief.run, work)
    except Unfinished:
        return await loop.run_in_executor(_long, work)
    finally:
        brief.gone = True


def structured_outputs(body: SamplingFields) -> tuple[str | None, StructuredOutputsParams] | None:
    """(the field that says it, None for structured_outputs, which names its own; what it says), or None where nothing does.

    Raises RequestError, also where two fields say something.
    """
    found: dict[str, tuple[str | None, StructuredOutputsParams]] = {}
    if (form := _response_format(body.response_format)) is not None:
        found["response_format"] = form
    if body.structured_outputs is not None:
        given = {name: value for name, value in body.structured_outputs.items() if value is not None}
        if strange := sorted(given.keys() - set(KNOWN)):
            message = f"structured_outputs.{strange[0]} is not supported: of its fields there are {', '.join(KNOWN)}"
            raise RequestError(message, param="structured_outputs", code="unsupported_parameter")
        found["structured_outputs"] = None, StructuredOutputsParams(**given)
    for name, short in SHORT.items():
        value = getattr(body, name)
        if value is None or value == NOTHING.get(name):
            continue
        said: dict[str, Any] = {short: value}
        if short.startswith("json"):
            said["whitespace_pattern"] = body.guided_whitespace_pattern
        try:
            found[name] = name, StructuredOutputsParams(**said)
        except RequestError as error:
            raise _renamed(error, name) from None
    if len(found) > 1:
        raise RequestError(f"{' and '.join(found)} both say what the answer must be: send one of them", param=[*found][1])
    return next(iter(found.values()), None)


def form_field(body: PromptFields) -> str | None:
    """The field of a body that was taken which says what the answer must be; else the tools, where a call is a must."""
    if not isinstance(body, SamplingFields):
        return None
    if (found := structured_outputs(body)) is None:
        return "tools" if getattr(body, "tools", None) else None
    return found[0] or "structured_outputs"


def _response_format(form: Mapping[str, Any] | None) -> tuple[str, StructuredOutputsParams] | None:
    if form is None:
        return None
    match form.get("type"):
        case "text":
            return None
        case "json_object" if form.get("schema") is None:
            return "response_format", StructuredOutputsParams(json_object=True)
        case "json_object":  # llama.cpp's
            where, schema = "response_format.schema", form["schema"]
        case "json_schema":
            inner = form.get("json_schema")
            if not isinstance(inner, Mapping):
                raise RequestError(f"response_format.json_schema must be an object, got {inner!r:.80}", param="response_format")
            where, schema = "response_format.json_schema.schema", inner.get("schema")
        case other:
            message = f"response_format.type is 'text', 'json_object' or 'json_schema', got {other!r:.80}"
            raise RequestError(message, param="response_format")
    if not isinstance(schema, Mapping):
        raise RequestError(f"{where} must be a JSON schema (an object), got {schema!r:.80}", param=where)
    return where, StructuredOutputsParams(json=dict(schema))
