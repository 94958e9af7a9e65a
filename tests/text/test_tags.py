"""Calls in tags (Seed-OSS, Qwen3-Coder, MiniMax, GLM): arguments are text until the tool's parameters say what they stand for."""

import json
import subprocess
import sys

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.core.params import RequestError, SamplingParams, StructuredOutputsParams
from appliance.server.parsers import Parsers
from appliance.server.prompts import Prompt
from appliance.server.schemas import ChatRequest
from appliance.text.grammar import library, limits
from appliance.text.tools.choice import forced, tool_choice
from appliance.text.tools.forms import FORMS
from appliance.text.tools.grammar import lark
from appliance.text.tools.tags import Glm, MiniMaxM2, Qwen3Coder, SeedOss, typed
from tests.text.test_strict_tools import Words
from tests.text.test_tools import check_account, check_cutting, streamed
from tests.text.tool_texts import cuts, nonsense, seeded

KINDS = (SeedOss, Glm, Qwen3Coder, MiniMaxM2)
OPEN = {
    SeedOss: "<seed:tool_call>\n<function=%s>\n",
    Glm: "<tool_call>%s\n",
    Qwen3Coder: "<tool_call>\n<function=%s>\n",
    MiniMaxM2: '<minimax:tool_call>\n<invoke name="%s">\n',
}
ARGUMENT = {
    SeedOss: "<parameter=%s>%s</parameter>\n",
    Glm: "<arg_key>%s</arg_key>\n<arg_value>%s</arg_value>\n",
    Qwen3Coder: "<parameter=%s>%s</parameter>\n",
    MiniMaxM2: '<parameter name="%s">%s</parameter>\n',
}
CLOSE = {
    SeedOss: "</function>\n</seed:tool_call>",
    Glm: "</tool_call>",
    Qwen3Coder: "</function>\n</tool_call>",
    MiniMaxM2: "</invoke>\n</minimax:tool_call>",
}
ANY = ["\n", " ", "1", "f", "é😀", "<", "</", "Hello", '"', "\\", "{", ">"]
SCRAPS = {
    SeedOss: [
        "<seed:tool_call>", "</seed:tool_call>", "<function=f>", "<function=", "</function>", "<parameter=a>", "<parameter=",
        "</parameter>", "<seed:", "<seed:tool_call>\n<function=f>\n", "<parameter=a>1</parameter>\n",
        "</function>\n</seed:tool_call>", *ANY,
    ],
    Glm: [
        "<tool_call>", "</tool_call>", "<tool_call>f", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
        "<arg_key>a</arg_key>", "<tool_", "<arg_", "<tool_call>f\n", "<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n", *ANY,
    ],
}  # fmt: skip
SCRAPS[Qwen3Coder] = [one.replace("seed:", "") for one in SCRAPS[SeedOss]]
SCRAPS[MiniMaxM2] = [
    "<minimax:tool_call>", "</minimax:tool_call>", '<invoke name="f">', "<invoke name=", "</invoke>", '<parameter name="a">',
    '<parameter name="', "</parameter>", '">', "<minimax:", '<minimax:tool_call>\n<invoke name="f">\n',
    '<parameter name="a">1</parameter>\n', "</invoke>\n</minimax:tool_call>", *ANY,
]  # fmt: skip
TYPES = {"text": "string", "whole": "integer", "part": "number", "flag": "boolean", "list": "array", "map": "object"}
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {name: {"type": kind} for name, kind in TYPES.items()}}}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def write(calls, kind=SeedOss):
    """As the published chat template writes calls whose values are text already."""
    return "".join(
        f"\n{OPEN[kind] % name}" + "".join(ARGUMENT[kind] % pair for pair in values.items()) + CLOSE[kind]
        for name, values in calls
    )


def found(text, functions=(FUNCTION,), kind=SeedOss):
    answer = kind(functions=functions).parse(text)
    return answer.content, [(one.name, one.arguments) for one in answer.calls]


def test_cutting_changes_nothing(kind):
    for rng in seeded(250, kind.__name__):
        text = "".join(rng.choice(SCRAPS[kind]) for _ in range(rng.randrange(25)))
        if rng.random() < 0.5:
            calls = [("f", {"text": nonsense(rng), "whole": "1"})] * rng.randint(1, 2)
            text = nonsense(rng, 3) + write(calls, kind) + text
        check_cutting(kind, text, cuts(rng, text))
        check_account(kind, text)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(KINDS), st.data())
def test_cutting_changes_nothing_hypothesis(kind, data):
    scraps = data.draw(st.lists(st.sampled_from(SCRAPS[kind]) | st.text(max_size=3), max_size=20))
    text = "".join(scraps)
    check_cutting(kind, text, scraps)
    check_cutting(kind, text, list(text))
    check_account(kind, text)


def test_values_come_back_as_they_were(kind):
    """In JSON, and as the template writes what is no text: like Python."""
    for rng in seeded(50, "values"):
        values = {
            "text": nonsense(rng).replace(kind.tags.end, "").strip("\n"), "whole": rng.randrange(-999, 999),
            "part": rng.random() * 1e9, "flag": rng.random() < 0.5, "list": [1, "a'b", None, True], "map": {"k": [{}, "ü"]},
        }  # fmt: skip
        for spell in (str, json.dumps):
            wrote = {key: value if isinstance(value, str) else spell(value) for key, value in values.items()}
            text = "So:\n" + write([("f", wrote), ("g.h", {})], kind) + rng.choice(["", "\n"])
            answer = streamed(kind(functions=[FUNCTION]), cuts(rng, text))
            assert [one.name for one in answer.calls] == ["f", "g.h"] and answer.content == "So:"
            assert json.loads(answer.calls[0].arguments) == values and answer.calls[1].arguments == "{}"


def test_a_cut_off_call_is_the_beginning_of_the_whole(kind):
    text = write([("f", {"text": "a b", "whole": "12"}), ("f", {"flag": "true"})], kind)
    _, every = found(text, kind=kind)
    assert every == [("f", '{"text": "a b", "whole": 12}'), ("f", '{"flag": true}')]
    for n in range(len(text)):
        _, some = found(text[:n], kind=kind)
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
    ("text", "content", "calls"),
    [
        ("<tool_call>f</tool_call>", "", [("f", "{}")]),
        ("<tool_call>f<arg_key>text</arg_key><arg_value>a</arg_value><arg_key>whole</arg_key><arg_value>1</arg_value></tool_call>",
         "", [("f", '{"text": "a", "whole": 1}')]),
        ("Hi. <tool_call>f\n</tool_call>\n<tool_call>\ng</tool_call> Bye.", "Hi. Bye.", [("f", "{}"), ("g", "{}")]),
        ("<tool_call>f\n<arg_key>text</arg_key>\n<arg_value>\na\n\nb\n</arg_value>", "", [("f", '{"text": "a\\n\\nb"')]),
        ("<tool_call>f<arg_key>text</arg_key> no</tool_call>", "<arg_key>text</arg_key> no</tool_call>", [("f", "{")]),
        ('<tool_call>{"name": "f", "arguments": {}}</tool_call>', None, []),
        ("<tool_call>f(a)</tool_call>", None, []),
        ("<tool_call>f", None, []),
        ("<tool_call></tool_call>", None, []),
        ("f<arg_key>a</arg_key>", None, []),
    ],
)  # fmt: skip
def test_by_hand_of_glm(text, content, calls):
    assert found(text, kind=Glm) == (text if content is None else content, calls)


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


def test_what_a_model_writes_is_warned_of_nowhere():
    """By Python's compiler; the warnings of others are, in other threads as well."""
    script = """
import sys, threading, warnings
from appliance.text.tools.tags import typed
before = list(warnings.filters)
assert typed(r"{'a': '\\d'}", {}) == r'{"a": "\\\\d"}' and typed("[1or 2]", {}) == '"[1or 2]"'
assert warnings.filters == before
compile(r"'\\e'", "<other>", "eval")
"""
    done = subprocess.run([sys.executable, "-W", "always", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\\d" not in done.stderr and "decimal" not in done.stderr and "invalid escape sequence '\\e'" in done.stderr


SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "description": "any"},
        "unit": {"type": "string", "enum": ["C", "C F", ""]},
        "code": {"type": "string", "pattern": "^[a-z]{2}$"},
        "bare": {"enum": ["x", 5, None, "[1]"]},
        "whole": {"type": "integer"},
        "maybe": {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]},
        "list": {"type": "array", "items": {"$ref": "#/$defs/item"}, "maxItems": 2},
    },
    "required": ["text", "whole", "more"],
    "$defs": {"item": {"type": "object", "properties": {"s": {"type": "string"}}, "additionalProperties": False}},
}
HELD = {"name": "f", "parameters": SCHEMA}


@pytest.fixture(scope="module", params=KINDS)
def matcher(request):
    """(a kind, of a grammar of calls of "f" and of "g", byte by byte)."""

    tools = [{"type": "function", "function": one} for one in (HELD, {"name": "g"}, {"name": "h", "parameters": {}})]
    grammar = lark(forced(tool_choice(tools, "required"), FORMS[request.param][0]))
    words = Words([*(bytes([i]) for i in range(256)), b"\xff<end>"], range(256, 257))
    lib = library()
    return request.param, lib.LLMatcher(lib.LLTokenizer(lib.TokenizerWrapper(words)), grammar, log_level=0, limits=limits())


def drawn(matcher, rng, most, end):
    """What the grammar lets through, at random; of a text's characters rather those that could be misread."""
    matcher.reset()
    made = bytearray()
    while len(made) < most:
        allowed = {i for i, bias in enumerate(matcher.compute_logit_bias()) if bias}
        if allowed == {256} or (256 in allowed and rng.random() < 0.7):
            return made.decode()
        handy = [i for i in b'<>/parmetelcbuwfgh"\\{}[]: ,1\nC' if i in allowed]
        token = rng.choice(handy or [i for i in allowed if i < 128] or list(allowed))
        assert matcher.consume_token(token)
        made.append(token)
        if token == 60 and rng.random() < 0.5:  # else a text would not end
            made += end[1 : 1 + matcher.try_consume_tokens(list(end[1:].encode()))].encode()
    return None


def test_whatever_the_grammar_lets_through_is_read_as_it_was_held(matcher):
    """Random texts of it: calls whose arguments fit, however the text is cut."""
    kind, grammar = matcher
    validator, whole, keys = jsonschema.Draft202012Validator(SCHEMA), 0, set()
    for rng in seeded(100, "held"):
        text = drawn(grammar, rng, 2000, kind.tags.end)
        if text is None:
            continue
        whole += 1
        answer = streamed(kind(functions=[HELD], held=["f", "g", "h"]), cuts(rng, text))
        assert answer.content == "" and answer.calls
        for call in answer.calls:
            found = json.loads(call.arguments)
            assert call.name != "g" or found == {}
            if call.name == "f":
                validator.validate(found)
                keys |= set(found)
    assert whole > 25 and keys == {*SCHEMA["properties"], "more"}


@pytest.mark.parametrize(
    ("values", "fits"),
    [
        ({"text": "a\n</b>", "whole": 1, "more": "5"}, True),
        ({"text": "", "unit": "C F", "code": '"ab"', "bare": "null", "whole": 1, "list": '[{"s": "</parameter>"}]',
          "more": ""}, True),
        ({"text": "", "bare": '"x"', "whole": 1, "maybe": '"abc"', "more": ""}, True),
        ({"text": "", "whole": 1, "maybe": "null", "more": ""}, True),
        ({"text": "", "unit": "K", "whole": 1, "more": ""}, False),
        ({"text": "", "code": "ab", "whole": 1, "more": ""}, False),
        ({"text": "", "code": '"abc"', "whole": 1, "more": ""}, False),
        ({"text": "", "whole": "one", "more": ""}, False),
        ({"text": "", "whole": 1}, False),
        ({"whole": 1, "more": ""}, False),
        ({"text": "", "whole": 1, "other": "", "more": ""}, False),
    ],
)  # fmt: skip
def test_what_is_held(matcher, values, fits):
    kind, grammar = matcher
    grammar.reset()
    values = {key: str(value).replace(SeedOss.tags.end, kind.tags.end) for key, value in values.items()}
    text = write([("f", values)], kind).removeprefix("\n")
    assert (grammar.try_consume_tokens(list(text.encode())) == len(text.encode()) and grammar.is_accepting()) == fits
    if fits:
        (call,) = kind(functions=[HELD], held=["f"]).parse(text).calls
        jsonschema.validate(json.loads(call.arguments), SCHEMA)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ({"name": "f", "parameters": {"anyOf": [{"required": ["a"]}]}}, "parameters of 'f' have 'anyOf': this model writes arg"),
        ({"name": "f", "parameters": {"properties": {"a>b": {}}}}, "one called 'a>b', which does not go into a tag"),
        ({"name": "f", "parameters": {"required": [""]}}, "one called '', which does not go into a tag"),
        ({"name": "f", "parameters": {"properties": ["a"]}}, "the parameters of 'f' must have an object of properties"),
        ({"name": "f", "parameters": {"required": "a"}}, "the parameters of 'f' must have an object of properties and a list"),
        ({"name": "f", "parameters": {"required": [["a"]]}}, "which does not go into a tag"),
        ({"name": "f g"}, "'f g' does not go into the markup in which this model writes calls: letters"),
    ],
)
def test_what_tags_cannot_hold_is_refused(function, words):
    for choice in (
        tool_choice([{"type": "function", "function": function}], "required"),
        tool_choice([{"type": "function", "function": {**function, "strict": True}}], None),
    ):
        with pytest.raises(RequestError, match=words) as told:
            forced(choice, FORMS[SeedOss][0], strict=choice.strict)
        assert told.value.param == "tools"


def request(**body):
    tools = [{"type": "function", "function": {**HELD, **body.pop("function", {})}}]
    return ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "Hi"}], "tools": tools, **body})


@pytest.mark.parametrize(
    ("body", "form", "held"),
    [
        ({}, None, False),
        ({"function": {"strict": True}}, None, True),
        ({"tool_choice": "required"}, None, True),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, None, True),
        ({}, StructuredOutputsParams(json_object=True), True),
    ],
)
def test_answers_of_a_server(body, form, held):
    """Arguments have the types of the request's tools, and are read as they were held where a grammar holds them."""
    parsers, asked = Parsers(tools=SeedOss), request(**body)
    choice = parsers.choice(asked, SamplingParams(structured_outputs=form))
    parser = parsers.new(choice, asked, Prompt(token_ids=[1]))
    text = write([("f", {"text": "7", "whole": "7", "bare": "5"})])
    assert json.loads(parser.parse(text).calls[0].arguments) == {"text": "7", "whole": 7, "bare": 5 if held else "5"}
    assert parsers.choice(request(tool_choice="none"), SamplingParams()).mode == "none"
