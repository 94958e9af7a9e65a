"""Structured output over HTTP: every way to ask for it reaches the engine, and every refusal names the field that was sent."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import pytest

from appliance.core.params import StructuredOutputsParams
from appliance.hub import demo_model
from tests.server.conftest import Served
from tests.server.test_real import Running, started

HELLO = [{"role": "user", "content": "a b"}]
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
CHAT, TEXT = ("/v1/chat/completions", {"messages": HELLO}), ("/v1/completions", {"prompt": "a b"})
WAYS: tuple[tuple[dict[str, Any], StructuredOutputsParams], ...] = (
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}},
        StructuredOutputsParams(json=SCHEMA),
    ),
    ({"response_format": {"type": "json_object"}}, StructuredOutputsParams(json_object=True)),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, StructuredOutputsParams(json=SCHEMA)),
    ({"structured_outputs": {"regex": "a+", "json": None}}, StructuredOutputsParams(regex="a+")),
    ({"structured_outputs": {"choice": ["a", "b"]}}, StructuredOutputsParams(choice=["a", "b"])),
    (
        {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
        StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True),
    ),
    ({"guided_json": SCHEMA}, StructuredOutputsParams(json=SCHEMA)),
    ({"guided_json": json.dumps(SCHEMA)}, StructuredOutputsParams(json=json.dumps(SCHEMA))),
    (
        {"guided_json": SCHEMA, "guided_whitespace_pattern": " ", "guided_decoding_backend": "xgrammar"},
        StructuredOutputsParams(json=SCHEMA, whitespace_pattern=" "),
    ),
    ({"guided_regex": "a+"}, StructuredOutputsParams(regex="a+")),
    ({"guided_choice": ["a"]}, StructuredOutputsParams(choice=["a"])),
    ({"guided_grammar": 'root ::= "a"'}, StructuredOutputsParams(grammar='root ::= "a"')),
    ({"guided_json_object": True}, StructuredOutputsParams(json_object=True)),
    ({"grammar": 'root ::= "a"'}, StructuredOutputsParams(grammar='root ::= "a"')),
    ({"json_schema": SCHEMA}, StructuredOutputsParams(json=SCHEMA)),
    ({"guided_json": {}}, StructuredOutputsParams(json={})),  # any JSON
    ({"json_schema": {}, "grammar": ""}, StructuredOutputsParams(json={})),
    ({"structured_outputs": {"json": {}}}, StructuredOutputsParams(json={})),
    ({"guided_json": SCHEMA, "guided_whitespace_pattern": ""}, StructuredOutputsParams(json=SCHEMA, whitespace_pattern="")),
)


@pytest.mark.parametrize("where", [CHAT, TEXT], ids=["chat", "completions"])
@pytest.mark.parametrize("way", range(len(WAYS)))
def test_every_way_to_ask_reaches_the_engine(served: Served, where: tuple[str, dict[str, Any]], way: int) -> None:
    asked, expected = WAYS[way]
    path, body = where
    assert served.post(path, **body, **asked, max_tokens=2).status_code == 200
    params = served.client.submitted[-1].params
    assert params.structured_outputs == expected and params.grammar


@pytest.mark.parametrize(
    "asked",
    [
        {"response_format": {"type": "text"}},
        {"response_format": None, "structured_outputs": None, "json_schema": None},
        {"guided_json": None, "guided_regex": None, "guided_choice": None, "guided_grammar": None},
        {"guided_json_object": False, "grammar": ""},
        {},
    ],
)
def test_what_asks_for_nothing(served: Served, asked: dict[str, Any]) -> None:
    assert served.post(TEXT[0], **TEXT[1], **asked, max_tokens=2).status_code == 200
    assert served.client.submitted[-1].params.structured_outputs is None


def schema_format(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


@pytest.mark.parametrize("where", [CHAT, TEXT], ids=["chat", "completions"])
@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        (schema_format({"type": "bogus"}), "response_format.json_schema.schema", "Invalid type: bogus"),
        (schema_format({"type": "integer", "minimum": 2, "maximum": 1}), "response_format.json_schema.schema", "Unsatisfiable"),
        (schema_format({"not": {}}), "response_format.json_schema.schema", '"not"'),
        (schema_format(None), "response_format.json_schema.schema", "must be a JSON schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema must be an object"),
        ({"response_format": {"type": "xml"}}, "response_format", "'xml'"),
        ({"response_format": {"schema": {}}}, "response_format", "None"),
        ({"response_format": "json_object"}, "response_format", "should be an object"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex", "unclosed group"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "structural_tag is not supported"),
        ({"structured_outputs": {"choice": "a"}}, "structured_outputs.choice", "cannot be"),
        ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
        ({"guided_grammar": "root ::= b"}, "guided_grammar", "'b' not found"),
        ({"guided_json": "{"}, "guided_json", "EOF"),
        (
            {"guided_json": "{}", "guided_whitespace_pattern": "("},
            "guided_whitespace_pattern",
            "guided_whitespace_pattern cannot",
        ),
        ({"guided_json": ""}, "guided_json", "guided_json is empty"),
        ({"json_schema": ""}, "json_schema", "json_schema is empty"),
        ({"guided_regex": ""}, "guided_regex", "guided_regex is empty"),
        ({"guided_grammar": ""}, "guided_grammar", "guided_grammar is empty"),
        ({"guided_choice": []}, "guided_choice", "guided_choice must be a list of texts, none of them empty"),
        ({"guided_choice": ["a", ""]}, "guided_choice", "guided_choice must be a list of texts, none of them empty"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one of"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs", "found none"),
        ({"structured_outputs": {"json": ""}}, "structured_outputs.json", "structured_outputs.json is empty"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "structured_outputs.regex is empty"),
        ({"structured_outputs": {"grammar": ""}}, "structured_outputs.grammar", "structured_outputs.grammar is empty"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "must be a list of texts"),
        ({"response_format": {}}, "response_format", "got None"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex", "send one of them"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "send one of them"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "send one of them"),
        ({"guided_regex": "a", "min_tokens": 2, "max_tokens": 5}, "min_tokens", "does not go with"),
        ({"guided_regex": "a", "use_beam_search": True}, "structured_outputs", "does not go with use_beam_search"),
    ],
)
def test_refusals_name_the_field_that_was_sent(
    served: Served, where: tuple[str, dict[str, Any]], asked: dict[str, Any], param: str, words: str
) -> None:
    answer = served.post(where[0], **where[1], **asked)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and words in error["message"], error


@pytest.fixture(scope="module")
def real() -> Iterator[Running]:
    flags = ["--port", "0", "--threads", "1", "--kv-cache-memory-bytes", "16000000", "--max-num-seqs", "8"]
    with started(str(demo_model()), *flags) as server:
        yield server


def person(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def wide(number: int, name: str = "") -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{name}_{i}": {} for i in range(number)}}


LISTS = [{"type": "array", "items": {"type": "string", "pattern": f"^v{i}[a-z]+$"}} for i in range(500)]
WORDS = [f"entry {i}" for i in range(3000)]
MANY = {"anyOf": [{"type": "object", "properties": {"k": {"const": f"c{i}"}}} for i in range(1000)]}
RULES = [f"r{i}" for i in range(2500)]
LARGE: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "choices": ({"structured_outputs": {"choice": WORDS}}, None, "|".join(WORDS)),
    "choices that begin otherwise": ({"guided_choice": [f"{i * 2654435761 % 2**32:x}" for i in range(4000)]}, None, "[0-9a-f]+"),
    "choices that begin alike": ({"guided_choice": ["a", "ab", "\x7f"]}, None, "a|ab|\x7f"),
    "an enum": ({"guided_json": {"enum": WORDS}}, None, '"entry [0-9]+"'),
    "an enum of numbers": ({"guided_json": {"enum": [i * 7919 for i in range(6000)]}}, None, "[0-9]+"),
    "an alternation": ({"guided_regex": "|".join(WORDS)}, None, "|".join(WORDS)),
    "too many choices": ({"structured_outputs": {"choice": 2 * WORDS}}, "structured_outputs.choice", "at most 65536"),
    "alternatives": ({"guided_json": MANY}, "guided_json", "max is 2000"),
    "rules": ({"guided_grammar": "root ::= " + " | ".join(RULES) + "\n" + "\n".join(f'{r} ::= "x{r}"' for r in RULES)},
              "guided_grammar", "max is 2000"),
    "optional properties": ({"guided_json": {"type": "object", "properties": {f"p{i}": {} for i in range(1500)}}},
                            "guided_json", "max is 2000"),
    "optional properties further on": (
        {"guided_json": person(text={"type": "string"}, there=wide(600))}, "guided_json", "max is 2000"),
    "optional properties in a list": ({"guided_json": {"type": "array", "items": wide(600)}}, "guided_json", "max is 2000"),
    "alternatives further on": ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": person(
        a={"type": "boolean"}, b={"$ref": "#/$defs/some"}) | {"$defs": {"some": {"anyOf": LISTS}}}}}},
        "response_format.json_schema.schema", "max is 2000"),
    "alternatives that are wide together": (
        {"guided_json": person(a={"type": "string"}, b={"anyOf": [
            {"type": "object", "properties": {**wide(90, str(i))["properties"], "k": {"const": i}}, "required": ["k"]}
            for i in range(8)]})},
        "guided_json", "max is 2000"),
    "optional properties, not too many": ({"guided_json": person(a={"type": "string", "maxLength": 3}, b=wide(350))}, None, ".*"),
    "deep lists": ({"guided_json": '{"items":' * 1500 + "{}" + "}" * 1500}, "guided_json", "recursion limit"),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_large_forms_are_served_or_refused_by_name(real: Running, name: str) -> None:
    """Never by an engine that finds out when the answer has begun."""
    asked, param, expected = LARGE[name]
    with httpx.Client(base_url=real.url, timeout=60, trust_env=False) as http:
        answer = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 60, **asked})
    if param is None:
        assert answer.status_code == 200 and re.fullmatch(expected, answer.json()["choices"][0]["text"]), answer.text
    else:
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == param and expected in error["message"], error


def growing(name: str) -> str:
    """So ambiguous that with the answer grows what a step takes: from about ten tokens on it is too much. Once for each name."""
    return f'root ::= s\ns ::= [a-z] | "{name}" | ' + " | ".join(" ".join(["s"] * i) for i in range(2, 10))


CALLS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 300},
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 300},
    "/v1/responses": {"input": "a", "max_output_tokens": 300},
    "/v1/messages": {"model": str(demo_model()), "messages": HELLO, "max_tokens": 300},
}


@pytest.mark.parametrize("path", CALLS)
def test_a_form_that_grows_too_complex_ends_its_answer_in_order(real: Running, path: str) -> None:
    """What cannot be known before: the stream ends with the reason and the field, and nobody else hears of it."""
    free: dict[str, Any] = {"prompt": "a b c", "max_tokens": 200, "temperature": 1.0, "seed": 3, "ignore_eos": True}
    asked = {**CALLS[path], "temperature": 1.0, "seed": 2, "structured_outputs": {"grammar": growing(path)}}
    with real.http as http, ThreadPoolExecutor(1) as pool:
        beside = pool.submit(http.post, "/v1/completions", json=free)
        streamed = http.post(path, json={**asked, "stream": True})
        told = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
        assert streamed.status_code == 200 and len(told) > 5, streamed.text
        failed = [one for one in told if "its grammar" in json.dumps(one)]
        errors = [one["response"]["error"] if path == "/v1/responses" else one["error"] for one in failed]
        assert len(errors) == 1 and "less ambiguous" in errors[0]["message"]
        assert errors[0].get("param", "structured_outputs") == "structured_outputs"
        asked["structured_outputs"] = {"grammar": growing(f"{path}, whole")}
        for _ in range(2):  # in mid-answer; then it is known
            refused = http.post(path, json=asked)
            error = refused.json()["error"]
            assert refused.status_code == 400 and "less ambiguous" in error["message"]
            assert error.get("param", "structured_outputs") == "structured_outputs"
        assert beside.result().json()["choices"] == http.post("/v1/completions", json=free).json()["choices"]


def test_a_form_that_the_engine_gives_up_is_named(served: Served) -> None:
    served.client.unanswerable = "its grammar: too many items"
    try:
        for asked, param in (
            ({"guided_regex": "a+"}, "guided_regex"),
            ({"structured_outputs": {"regex": "a+"}}, "structured_outputs"),
        ):
            answer = served.post("/v1/completions", prompt="a b", max_tokens=3, **asked)
            assert answer.status_code == 400 and answer.json()["error"]["param"] == param
            assert answer.json()["error"]["message"] == "its grammar: too many items"
    finally:
        served.client.unanswerable = None


def test_a_form_and_tools_together_are_refused(served: Served) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    body = {"messages": HELLO, "tools": [tool], "response_format": {"type": "json_object"}}
    refused = served.post("/v1/chat/completions", **body)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "tools"
    assert served.post("/v1/chat/completions", **body, tool_choice="none", max_tokens=2).status_code == 200


def test_through_a_real_server(real: Running) -> None:
    """Whole and streamed, in both endpoints, by the official client."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0, http_client=real.http)
    person = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer", "minimum": 1, "maximum": 120}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": person, "strict": True}}
    messages: Any = [{"role": "user", "content": "What is 2 plus 3?"}]
    model = client.models.list().data[0].id
    settings: Any = {"model": model, "messages": messages, "temperature": 0.9, "seed": 5, "max_tokens": 200}
    whole = client.chat.completions.create(**settings, response_format=form)
    assert whole.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(whole.choices[0].message.content or ""), person)
    chunks = client.chat.completions.create(**settings, response_format=form, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    several = client.completions.create(
        model=model, prompt="2 plus 3 is", n=4, temperature=2.0, max_tokens=40, extra_body={"guided_regex": r"\d{2}(\.\d{2})?"}
    )
    assert all(re.fullmatch(r"\d{2}(\.\d{2})?", one.text) for one in several.choices), several.choices
    picked = client.chat.completions.create(
        **settings, logprobs=True, top_logprobs=3, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}
    )
    assert picked.choices[0].message.content in ("yes", "no") and picked.choices[0].logprobs is not None
    free = client.chat.completions.create(model=model, messages=messages, temperature=0)
    assert free.choices[0].message.content == "2 plus 3 is 5."
