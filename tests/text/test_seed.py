"""Calls of Seed-OSS: tags, with arguments that are text until the tool's parameters say what they stand for."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.core.params import RequestError, SamplingParams, StructuredOutputsParams
from appliance.server.parsers import Parsers
from appliance.server.prompts import Prompt
from appliance.server.schemas import ChatRequest
from appliance.text.tools.seed import SeedOss, typed
from tests.text.test_tools import check_account, check_cutting, streamed
from tests.text.tool_texts import cuts, nonsense, seeded

SCRAPS = [
    "<seed:tool_call>", "</seed:tool_call>", "<function=f>", "<function=", "</function>", "<parameter=a>", "<parameter=", ">",
    "</parameter>", "\n", " ", "1", "f", "é😀", "<", "</", "<seed:", "Hello", '"', "\\", "{", "<seed:tool_call>\n<function=f>\n",
    "<parameter=a>1</parameter>\n", "</function>\n</seed:tool_call>",
]  # fmt: skip
TYPES = {"text": "string", "whole": "integer", "part": "number", "flag": "boolean", "list": "array", "map": "object"}
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {name: {"type": kind} for name, kind in TYPES.items()}}}


def write(calls):
    """As the published chat template writes calls whose values are text already."""
    return "".join(
        f"\n<seed:tool_call>\n<function={name}>\n"
        + "".join(f"<parameter={key}>{value}</parameter>\n" for key, value in values.items())
        + "</function>\n</seed:tool_call>"
        for name, values in calls
    )


def found(text, functions=(FUNCTION,)):
    answer = SeedOss(functions=functions).parse(text)
    return answer.content, [(one.name, one.arguments) for one in answer.calls]


def test_cutting_changes_nothing():
    for rng in seeded(500, "seed"):
        text = "".join(rng.choice(SCRAPS) for _ in range(rng.randrange(25)))
        if rng.random() < 0.5:
            text = nonsense(rng, 3) + write([("f", {"text": nonsense(rng), "whole": "1"})] * rng.randint(1, 2)) + text
        check_cutting(SeedOss, text, cuts(rng, text))
        check_account(SeedOss, text)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(SCRAPS) | st.text(max_size=3), max_size=20))
def test_cutting_changes_nothing_hypothesis(scraps):
    text = "".join(scraps)
    check_cutting(SeedOss, text, scraps)
    check_cutting(SeedOss, text, list(text))
    check_account(SeedOss, text)


def test_values_come_back_as_they_were():
    """In JSON, and as the template writes what is no text: like Python."""
    for rng in seeded(100, "values"):
        values = {
            "text": nonsense(rng).replace("</parameter>", "").strip("\n"), "whole": rng.randrange(-999, 999),
            "part": rng.random() * 1e9, "flag": rng.random() < 0.5, "list": [1, "a'b", None, True], "map": {"k": [{}, "ü"]},
        }  # fmt: skip
        for spell in (str, json.dumps):
            wrote = {key: value if isinstance(value, str) else spell(value) for key, value in values.items()}
            text = "So:\n" + write([("f", wrote), ("g.h", {})]) + rng.choice(["", "\n"])
            answer = streamed(SeedOss(functions=[FUNCTION]), cuts(rng, text))
            assert [one.name for one in answer.calls] == ["f", "g.h"] and answer.content == "So:"
            assert json.loads(answer.calls[0].arguments) == values and answer.calls[1].arguments == "{}"


def test_a_cut_off_call_is_the_beginning_of_the_whole():
    text = write([("f", {"text": "a b", "whole": "12"}), ("f", {"flag": "true"})])
    _, every = found(text)
    assert every == [("f", '{"text": "a b", "whole": 12}'), ("f", '{"flag": true}')]
    for n in range(len(text)):
        _, some = found(text[:n])
        assert all(one[0] == "f" and whole[1].startswith(one[1]) for one, whole in zip(some, every, strict=False))
        assert some[:-1] == every[: max(0, len(some) - 1)]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("<seed:tool_call><function=f></function></seed:tool_call>", "", [("f", "{}")]),
        ("Hi. <seed:tool_call><function=f></function><function=g></function></seed:tool_call> Bye.", "Hi. Bye.",
         [("f", "{}"), ("g", "{}")]),
        ("<seed:tool_call>\n<function=f>\n<parameter=text>\na\n\nb\n</parameter>\n</function>", "",
         [("f", '{"text": "a\\n\\nb"}')]),
        ("<seed:tool_call><function=f><parameter=text>a</parameter>", "", [("f", '{"text": "a"')]),
        ("<seed:tool_call><function=f><parameter=text>a</para", "", [("f", "{")]),
        ("<seed:tool_call><function=f><parameter=text>a</parameter>no</seed:tool_call>", "no</seed:tool_call>",
         [("f", '{"text": "a"')]),
        ("<seed:tool_call><function=f><parameter=text>1</parameter><parameter=whole>1</parameter></function>", "",
         [("f", '{"text": "1", "whole": 1}')]),
        ("<seed:tool_call>f(a)</seed:tool_call>", None, []),
        ("<seed:tool_call><function=>", None, []),
        ("<seed:tool_call><function=f", None, []),
        ("<function=f></function>", None, []),
        ("  \n", None, []),
    ],
)  # fmt: skip
def test_by_hand(text, content, calls):
    assert found(text) == (text if content is None else content, calls)


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("5", {"type": "string"}, "5"),
        ("5", {"type": "integer"}, 5),
        ("five", {"type": "integer"}, "five"),
        ("null", {"type": ["integer", "null"]}, None),
        ("null", {"type": "string"}, "null"),
        ("True", {"type": "boolean"}, True),
        (" false ", {"type": "boolean"}, False),
        ("{'a': (1, None)}", {"type": "object"}, {"a": [1, None]}),
        ("{1, 2}", {"type": "array"}, "{1, 2}"),
        ("NaN", {"type": "number"}, "NaN"),
        ("1e999", {"type": "number"}, "1e999"),
        ("9" * 5000, {"type": "integer"}, "9" * 5000),
        ("(" * 5000, {"type": "array"}, "(" * 5000),
        ("[" * 100_000, {"type": "array"}, "[" * 100_000),
        ("__import__('os')", {"type": "object"}, "__import__('os')"),
        ("5", None, "5"),
        ("5", {"anyOf": [{"type": "integer"}]}, "5"),
        ('[1, "a"]', {"$ref": "#/$defs/a"}, [1, "a"]),
        ("{not}", {}, "{not}"),
    ],
)
def test_typed(text, schema, value):
    assert json.loads(typed(text, schema)) == value


def request(**body):
    tools = [{"type": "function", "function": {**FUNCTION, **body.pop("function", {})}}]
    return ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "Hi"}], "tools": tools, **body})


def test_answers_of_a_server():
    """Arguments have the types of the request's tools; strict ones are free, since nothing holds the model to these tags."""
    parsers, body = Parsers(tools=SeedOss), request(function={"strict": True})
    choice = parsers.choice(body, SamplingParams())
    assert choice.mode == "auto" and not choice.strict
    parser = parsers.new(choice, body, Prompt(token_ids=[1]))
    assert parser.parse(write([("f", {"whole": "7", "text": "7"})])).calls[0].arguments == '{"whole": 7, "text": "7"}'
    assert parsers.choice(request(tool_choice="none"), SamplingParams()).mode == "none"


@pytest.mark.parametrize(
    ("body", "params", "param"),
    [
        ({"tool_choice": "required"}, None, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, None, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, StructuredOutputsParams(json_object=True), "response_format"),
    ],
)
def test_what_nothing_holds_it_to_is_refused(body, params, param):
    with pytest.raises(RequestError, match="this model writes calls in tags, to which it is not held") as told:
        Parsers(tools=SeedOss).choice(request(**body), SamplingParams(structured_outputs=params))
    assert told.value.param == param
