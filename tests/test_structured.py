"""Structured output as a user asks for it: what comes back is what was asked for, and what cannot be had is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from appliance import LLM, SamplingParams, StructuredOutputsParams
from appliance.core.params import RequestError
from appliance.hub import demo_model
from appliance.text.grammar import MAX_CHARS, compile_grammar
from tests.schemas import FORMATS_CHECKED, schemas

ALL = dict(schemas())


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(str(demo_model()), max_model_len=512, max_num_seqs=16, kv_cache_memory_bytes=32 << 20, threads=1)


def texts(llm: LLM, structured: list[dict[str, Any]], **params: Any) -> Iterator[list[tuple[str, str | None]]]:
    """Of each, its completions' texts and why they ended."""
    settings = {"temperature": 1.0, "max_tokens": 250, "seed": 1}
    asked = [SamplingParams(**{**settings, **params, "structured_outputs": StructuredOutputsParams(**one)}) for one in structured]
    for output in llm.generate(["Say it as data: "] * len(asked), asked, use_tqdm=False):
        yield [(one.text, one.finish_reason) for one in output.outputs]


def test_answers_are_valid_under_their_schemas(llm: LLM) -> None:
    chosen = [(name, schema) for name, schema in ALL.items() if not name.startswith("refused")][::6]
    ended = 0
    for (_, schema), found in zip(chosen, texts(llm, [{"json": schema} for _, schema in chosen], n=2), strict=True):
        for text, reason in found:
            assert reason in ("stop", "length")
            if reason == "stop":
                ended += 1
                jsonschema.Draft202012Validator(schema, format_checker=FORMATS_CHECKED).validate(json.loads(text))
    assert ended > 1.5 * len(chosen), "most answers come to their end"


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("refused")])
def test_what_cannot_be_had_is_refused_by_name(name: str) -> None:
    with pytest.raises(RequestError, match=r"cannot be served: .{8}") as caught:
        compile_grammar(StructuredOutputsParams(json=ALL[name]))
    assert caught.value.param == "structured_outputs.json" and caught.value.status == 400


@pytest.mark.parametrize(
    "pattern",
    [
        r"\d{3}-\d{4}",
        r"(red|green|blue) (cat|dog)s?",
        r"[A-Z][a-z]{2,5}(, [A-Z][a-z]{2,5}){0,2}\.",
        r"(?i)yes|no",
        r"^[^\x00-\x7f]{1,3}$",
        r"a/b\\c\"d",
        r"<b>[^<>\n]{0,12}</b>",
        "line\none",
    ],
)
def test_a_regular_expression_is_matched_as_a_whole(llm: LLM, pattern: str) -> None:
    for found in texts(llm, [{"regex": pattern}], n=4, max_tokens=100):
        assert {reason for _, reason in found} == {"stop"}
        assert all(re.fullmatch(pattern, text) for text, _ in found), found


def test_choices_and_grammars(llm: LLM) -> None:
    choices = ["yes", "no", 'say "maybe"', "tab\there", "größe", "日本", "back\\slash", "yes, but"]
    (found,) = texts(llm, [{"choice": choices}], n=12, temperature=5.0)
    assert {text for text, _ in found} <= set(choices) and len({text for text, _ in found}) > 2
    gbnf = 'root ::= sum\nsum ::= term ("+" term){1,2}\nterm ::= [1-9] [0-9]? # no zero first'
    lark = 'start: sum\nsum: TERM ("+" TERM){1,2}\nTERM: /[1-9][0-9]?/'
    for found in texts(llm, [{"grammar": gbnf}, {"grammar": lark}], n=4):
        assert all(re.fullmatch(r"[1-9]\d?(\+[1-9]\d?){1,2}", text) and reason == "stop" for text, reason in found), found
    (found,) = texts(llm, [{"json": {}}], n=30, max_tokens=60, temperature=4.0)  # any JSON: of all kinds some end in time
    whole = [json.loads(text) for text, reason in found if reason == "stop"]
    assert len({type(one) for one in whole}) > 1, found
    (found,) = texts(llm, [{"json_object": True}], n=4, max_tokens=60)
    assert all(isinstance(json.loads(text), dict) for text, reason in found if reason == "stop")


def test_white_space_between_the_parts_is_bounded_or_none(llm: LLM) -> None:
    schema = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 3, "maxItems": 3}
    tight, dotted = {"json": schema, "disable_any_whitespace": True}, {"json": schema, "whitespace_pattern": "[ ]{3}"}
    found = list(texts(llm, [tight, dotted, {"json": schema}, {"json": schema, "whitespace_pattern": ""}], n=6, temperature=3.0))
    assert all(re.fullmatch(r"\[\d,\d,\d\]", text) for text, _ in (*found[0], *found[3])), found
    assert all(re.fullmatch(r"\[( {3})?\d(( {3})?,( {3})?\d){2}( {3})?\]", text) for text, _ in found[1]), found[1]
    assert any(" " in text for text, _ in found[1])
    assert not any(re.search(r"[ \t]{26}|\n\s*\n", text) for text, _ in found[2]), found[2]


@pytest.mark.parametrize(
    ("asked", "field", "words"),
    [
        ({}, "structured_outputs", "exactly one"),
        ({"regex": "a", "choice": ["b"]}, "structured_outputs", "found regex and choice"),
        ({"json_object": False}, "structured_outputs", "exactly one"),
        ({"regex": 3}, "structured_outputs.regex", "3"),
        ({"choice": "abc"}, "structured_outputs.choice", "abc"),
        ({"choice": []}, "structured_outputs.choice", "list of texts"),
        ({"choice": ["a", ""]}, "structured_outputs.choice", "empty"),
        ({"regex": "(a"}, "structured_outputs.regex", "unclosed group"),
        ({"regex": r"\bword"}, "structured_outputs.regex", "lookarounds"),
        ({"regex": "\ud83d"}, "structured_outputs.regex", "surrogate"),
        ({"json": "{"}, "structured_outputs.json", "EOF"),
        ({"json": "[1]"}, "structured_outputs.json", "object"),
        ({"json": {"const": {1}}}, "structured_outputs.json", "no JSON"),
        ({"grammar": "root ::= missing"}, "structured_outputs.grammar", "'missing' not found"),
        ({"grammar": "start: missing"}, "structured_outputs.grammar", "unknown name"),
        ({"grammar": "what is this?"}, "structured_outputs.grammar", "Expected ::="),
        ({"grammar": "start: <|im_end|>"}, "structured_outputs.grammar", "special tokens"),
        (
            {"json": {"oneOf": [{"type": "integer"}, {"type": "number"}]}},
            "structured_outputs.json",
            "exclude each other: use anyOf",
        ),
        ({"grammar": "root ::= root"}, "structured_outputs.grammar", "served: it leads to a place where no text can go on"),
        ({"json": {}, "whitespace_pattern": "("}, "structured_outputs.whitespace_pattern", "unclosed group"),
        ({"json": {"type": "bogus"}, "whitespace_pattern": "("}, "structured_outputs.whitespace_pattern", "unclosed group"),
        ({"regex": "a" * (MAX_CHARS + 1)}, "structured_outputs.regex", f"at most {MAX_CHARS}"),
    ],
)
def test_what_is_refused_names_the_field_and_says_why(asked: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        compile_grammar(StructuredOutputsParams(**asked))
    assert words in str(caught.value) and (caught.value.param or "").startswith(field)
    assert "<" not in str(caught.value) or "special tokens" in words, "no marks of the library's own"


@pytest.mark.parametrize("more", [{"use_beam_search": True, "n": 2}, {"ignore_eos": True}, {"min_tokens": 3}])
def test_what_does_not_go_with_it(more: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="does not go with"):
        SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"), **more)


HOSTILE = {
    "chain of rules": {"grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(4500)) + 'r4500: "a"'},
    "chain of terminals": {"grammar": "start: R0\n" + "".join(f"R{i}: R{i + 1}\n" for i in range(4500)) + 'R4500: "a"'},
    "chain of references": {
        "json": {
            "$ref": "#/$defs/0",
            "$defs": {**{str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(1900)}, "1900": {"type": "null"}},
        }
    },
    "nested schemas": {"json": '{"items":' * 6000 + "{}" + "}" * 6000},
    "nested groups": {"regex": "(" * 30000 + "a" + ")" * 30000},
    "nested grammar": {"grammar": "root ::= " + "(" * 30000 + '"a"' + ")" * 30000},
    "nested lark": {"grammar": "start: " + "(" * 30000 + '"a"' + ")" * 30000},
    "exponential automaton": {"regex": "(a|b)*a(a|b){400}"},
    "large repetitions": {"regex": "((a{1,1000}){1,1000}){1,1000}"},
    "product of unions": {
        "json": {"allOf": [{"anyOf": [{"properties": {f"{i}_{j}": {}}} for j in range(3)]} for i in range(14)]}
    },
    "refers to itself": {"json": {"allOf": [{"$ref": "#"}, {"type": "object"}]}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused_or_bounded(llm: LLM, name: str) -> None:
    """None takes the process down, and none takes long: an answer, or an error that says which limit was reached."""
    try:
        ((text, reason),) = next(texts(llm, [HOSTILE[name]], max_tokens=20))
    except RequestError as error:
        assert str(error).startswith("structured_outputs.")
    except RuntimeError as error:  # a request that the engine ended
        assert "grammar" in str(error)
    else:
        assert text and reason in ("stop", "length")
