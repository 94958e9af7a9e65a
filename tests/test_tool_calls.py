"""Calls that are a must, by a real model: what it writes is read back as calls whose arguments fit their schemas."""

import json
import re

import jsonschema
import numpy as np
import pytest

from appliance import LLM, SamplingParams, StructuredOutputsParams
from appliance.core.params import RequestError
from appliance.hub import demo_model
from appliance.text.answer import AnswerParser
from appliance.text.grammar import compile_grammar, library, limits, vocabulary
from appliance.text.reasoning import REASONING, THINK, ReasoningParser, Tags
from appliance.text.tokenizer import Tokenizer
from appliance.text.tools.choice import ToolChoice, forced, parameters, tool_choice
from appliance.text.tools.forms import FORMS, Form
from appliance.text.tools.grammar import lark
from tests.text.tool_texts import GRAMMARS
from tests.tiny_model import write_tokenizer

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "minimum": 0, "maximum": 20}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": True},  # is not obeyed
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "get_time"}},
]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
SCHEMAS = {one["name"]: parameters(one) for one in tool_choice(TOOLS, None).functions}


@pytest.fixture(scope="module")
def llm():
    return LLM(str(demo_model()), max_model_len=512, max_num_seqs=16, kv_cache_memory_bytes=32 << 20, threads=1)


def answers(llm: LLM, grammar: str, form: StructuredOutputsParams | None = None) -> list[tuple[str, bool]]:
    """Texts, and whether they came to their end. (A small model may add calls for ever.) ``grammar`` may stand around a form."""
    structured = form or StructuredOutputsParams(grammar=grammar)
    made = compile_grammar(structured, grammar if form else "")
    params = SamplingParams(temperature=1.0, seed=1, n=4, max_tokens=250, structured_outputs=structured, grammar=made)
    output = llm.generate(["One day"], params, use_tqdm=False)[0]
    return [(one.text, one.finish_reason == "stop") for one in output.outputs]


@pytest.mark.parametrize(("kind", "form"), GRAMMARS)
def test_a_model_that_must_call_does(llm: LLM, kind: type, form: Form) -> None:
    ends = 0
    for asked, parallel in (("required", True), ("required", False), (NAMED, True)):
        choice: ToolChoice = tool_choice(TOOLS, asked)
        for text, ended in answers(llm, lark(forced(choice, form, parallel=parallel))):
            answer = AnswerParser(None, kind(functions=choice.functions, held=choice.held)).parse(text)
            ends += ended
            assert not ended or (answer.content == "" and answer.calls), text
            assert (asked == "required" and parallel) or len(answer.calls) <= 1
            for call in answer.calls if ended else answer.calls[:-1]:
                assert call.name in [one["name"] for one in choice.functions]
                jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
    assert ends >= 6


@pytest.mark.parametrize("opened", [False, True])
def test_it_may_think_before(llm: LLM, opened: bool) -> None:
    kind, (form, *_) = next(iter(FORMS.items()))
    grammar = lark(forced(tool_choice(TOOLS, NAMED), form), THINK, opened=opened)
    grammar = grammar.replace("(?s:.*)", "(?s:.{0,40})")  # a small model would not end by itself
    for text, ended in answers(llm, grammar):
        answer = AnswerParser(ReasoningParser(THINK, opened=opened), kind()).parse(text)
        assert ended and [call.name for call in answer.calls] == ["get_weather"] and answer.content == "", text
        assert not opened or answer.reasoning


@pytest.mark.parametrize(
    "form", [{"json": CITY}, {"regex": "(Yes|No), [a-z]{3}"}, {"choice": ["red", "blue"]}, {"grammar": 'root ::= "x"+'}]
)
@pytest.mark.parametrize("opened", [False, True])
def test_a_form_begins_behind_reasoning(llm: LLM, form: dict, opened: bool) -> None:
    structured = StructuredOutputsParams(**form)
    around = lark(None, THINK, opened=opened, formed=True).replace("(?s:.*)", "(?s:.{0,40})")
    for text, ended in answers(llm, around, structured):
        answer = AnswerParser(ReasoningParser(THINK, opened=opened), None).parse(text)
        assert answer.reasoning or not opened
        if "json" in form and ended:
            jsonschema.validate(json.loads(answer.content), CITY)
        elif "json" not in form:
            assert re.fullmatch(form.get("regex") or "x+|red|blue", answer.content) and (ended or "grammar" in form), text


def test_a_form_or_calls(llm: LLM) -> None:
    """Both are had: which, the model says with its first token."""
    kind, (form, *_) = next(iter(FORMS.items()))
    around, seen = lark(forced(tool_choice(TOOLS, None), form, parallel=False), formed=True), set()
    for begin in ("<tool_call>", "{"):
        first = llm.get_tokenizer().encode(begin, add_special_tokens=False)[0]
        structured = StructuredOutputsParams(json=CITY)
        params = SamplingParams(
            temperature=0.0,
            max_tokens=250,
            structured_outputs=structured,
            grammar=compile_grammar(structured, around),
            logit_bias={first: 100.0},
        )
        output = llm.generate("One day", params, use_tqdm=False)[0].outputs[0]
        answer = AnswerParser(None, kind()).parse(output.text)
        assert bool(answer.calls) != bool(answer.content.strip()), output.text
        seen.add(bool(answer.calls))
        if answer.content and output.finish_reason == "stop":
            jsonschema.validate(json.loads(answer.content), CITY)
    assert seen == {False, True}


@pytest.mark.parametrize(("kind", "form"), GRAMMARS)
@pytest.mark.parametrize("tags", [None, THINK, REASONING["mistral"]], ids=["", "think", "THINK"])
@pytest.mark.parametrize("special", [False, True])
def test_markers_that_are_special_tokens(tmp_path, kind: type, form: Form, tags: Tags | None, special: bool) -> None:
    """The model's own tokens for them are allowed where they belong, and there alone."""
    write_tokenizer(tmp_path)
    backend = Tokenizer.load(tmp_path)._backend
    markers = [*kind.special, *(tags.special if tags else ())]
    (backend.add_special_tokens if special else backend.add_tokens)(markers)
    backend.save(str(tmp_path / "tokenizer.json"))
    reader, tokenizer = Tokenizer.load(tmp_path), Tokenizer.load(tmp_path)
    specials = {one: i for one in markers for i in tokenizer.special_among([one])}
    assert len(specials) == (len(markers) if special else 0)
    words, size = vocabulary(tokenizer, len(tokenizer), (2,)), len(tokenizer)
    call = form.write([("get_weather", '{"city": "Rome", "days": 3}'), ("get_time", "{}")])
    call = call.replace(">Rome<", '>"Rome"<')  # in tags what has a longest length is JSON, too
    thoughts = f"{tags.start}Hm.{tags.end}\n\n" if tags else ""
    required = lark(forced(tool_choice(TOOLS, "required"), form), tags, specials=specials)
    auto = lark(forced(tool_choice(TOOLS, None), form), tags, formed=True, specials=specials)
    answer = '{"city": "[TOOL_CALLS]", "days": 3}'
    made = compile_grammar(StructuredOutputsParams(grammar=required), ours=True)
    either = compile_grammar(StructuredOutputsParams(json=CITY), auto)
    for grammar, text in ((made, thoughts + call), (made, call), (either, thoughts + call), (either, thoughts + answer)):
        matcher = library().LLMatcher(words, grammar, limits=limits())
        ids = reader.encode(text, add_special_tokens=False)
        if text.endswith(answer):  # what only looks like a marker
            ids = reader.encode(thoughts, add_special_tokens=False) + tokenizer.encode(answer, add_special_tokens=False)
        for token in ids:
            allowed = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")[:size]
            assert allowed[token] and matcher.try_consume_tokens([token]) == 1, (text, reader.token_str(token))
        assert matcher.is_accepting()
    with pytest.raises(RequestError, match="special tokens"):
        compile_grammar(StructuredOutputsParams(grammar='start: <[5]> "a"'), "start: @answer")
