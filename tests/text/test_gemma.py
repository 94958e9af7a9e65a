"""Calls and thoughts of Gemma 4: what its published templates write comes back, however it is cut."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.text.answer import Answer, AnswerParser
from appliance.text.reasoning import GEMMA, ReasoningDelta, ReasoningParser, tags_of
from appliance.text.tools.forms import FORMS
from appliance.text.tools.gemma import Gemma4
from appliance.text.tools.reader import decoded
from tests.text.test_tool_choice import chat_of
from tests.text.test_tools import check_account, check_cutting, streamed
from tests.text.tool_texts import cuts, nonsense, seeded, value

SCRAPS = [
    "<|tool_call>", "<tool_call|>", '<|"|>', "call:", "call:f{", "<|tool_call>call:f{", "a:", '<|"|>a<|"|>:', '<|"|>x<|"|>',
    "1", "-2.5e3", "true", "None", ",", "{", "}", "[", "]", ":", '"', "\\", "<|", "|>", "<", " ", "\n", "f", "ü😀", "\u2028",
]  # fmt: skip
THOUGHTS = ["<|channel>", "<channel|>", "thought\n", "thou", "ght", "\n", "<|tool_call>call:f{}<tool_call|>", "<|", "Hm.", "ü"]
TEMPLATES = ("google-gemma-4-31B-it", "google-gemma-4-31B-it-interleaved")


def found(text):
    answer = Gemma4().parse(text)
    return answer.content, [(one.name, one.arguments) for one in answer.calls]


def test_cutting_changes_nothing():
    for rng in seeded(250, "gemma"):
        text = "".join(rng.choices(SCRAPS, k=rng.randrange(25)))
        check_cutting(Gemma4, text, cuts(rng, text))
        check_account(Gemma4, text)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(SCRAPS) | st.text(max_size=3), max_size=20))
def test_cutting_changes_nothing_hypothesis(scraps):
    text = "<|tool_call>call:f{" + "".join(scraps)
    check_cutting(Gemma4, text, list(text))
    check_account(Gemma4, text)
    for call in Gemma4().parse(text).calls:  # what was given out is an object, or all of one but its end
        assert any(isinstance(decoded(call.arguments + end), dict) for end in ("", "}"))


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("<|tool_call>call:f{}<tool_call|>", "", [("f", "{}")]),
        ('Hi.\n<|tool_call>call:a.b-c{s:<|"|>x, {y}: "z"\n<|"|>,n:-1.5e3}<tool_call|><|tool_call>call:g{}<tool_call|> Bye.',
         "Hi. Bye.", [("a.b-c", '{"s": "x, {y}: \\"z\\"\\n", "n": -1.5e3}'), ("g", "{}")]),
        ('<|tool_call>call:f{o:{k:<|"|>v<|"|>,l:[{},[],[true,null,None]]},<|"|>a b<|"|>:1}<tool_call|>', "",
         [("f", '{"o": {"k": "v", "l": [{}, [], [true, null, null]]}, "a b": 1}')]),
        ('<|tool_call>call:f{"s": "a\\"<|", "n": 007, w: two words }<tool_call|>', "",
         [("f", '{"s": "a\\"<|", "n": "007", "w": "two words"}')]),
        ('<|tool_call>call:f{"s": "a\nb", "t": "\\d"}<tool_call|>', "", [("f", '{"s": "a\\nb", "t": "\\\\d"}')]),
        ("<|tool_call>call:f{a:1}", "", [("f", '{"a": 1}')]),
        ("<|tool_call>call:f{a:1}<tool_", "", [("f", '{"a": 1}')]),
        ("<|tool_call>call:f{a:1,b:[2", "", [("f", '{"a": 1')]),
        ("<|tool_call>call:f{a:1,b:[2}<tool_call|>", ",b:[2}<tool_call|>", [("f", '{"a": 1')]),
        ("<|tool_call>call:f{a:1,}", ",}", [("f", '{"a": 1')]),
        ("<|tool_call>call:f{a}<|tool_call>call:g{}", "a}", [("f", "{"), ("g", "{}")]),
        ("<|tool_call>call:f{a:1}<|tool_call>call:g{}", "", [("f", '{"a": 1}'), ("g", "{}")]),
        ("<|tool_call>call:f(a)<tool_call|>", None, []),
        ("<|tool_call>call:{}<tool_call|>", None, []),
        ("<|tool_call>f{}<tool_call|>", None, []),
        ("<|tool_call>call:f", None, []),
        ("call:f{}", None, []),
    ],
)  # fmt: skip
def test_by_hand(text, content, calls):
    assert found(text) == (text if content is None else content, calls)


def test_deep_values_end():
    """However many brackets: nothing here calls itself."""
    _, calls = found("<|tool_call>call:f{a:" + "[" * 100_000 + "]" * 100_000 + "}<tool_call|>")
    assert calls == [("f", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")]


def rename(rng, given):
    """Keys as parameters have them; strings without the token that ends them."""
    if isinstance(given, dict):
        return {f"{rng.choice('abcXYZ')}_{i}": rename(rng, one) for i, one in enumerate(given.values())}
    if isinstance(given, list):
        return [rename(rng, one) for one in given]
    return given


@pytest.mark.realdata
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_templates_write_comes_back(shared_data, name):
    """Reasoning and calls of a turn, whole and in pieces."""
    source = (shared_data / "tokenizers" / "chat_templates" / f"{name}.jinja").read_text()
    chat, user = chat_of(source), {"role": "user", "content": "Hi"}
    assert tags_of([source]) is GEMMA
    for rng in seeded(40, name):
        made = [rename(rng, {str(i): value(rng) for i in range(rng.randrange(4))}) for _ in range(rng.randint(1, 3))]
        calls = [
            {"id": f"c{i}", "type": "function", "function": {"name": f"f.{i}-x", "arguments": one}} for i, one in enumerate(made)
        ]
        thought = (
            "" if len(made) > 1 and "inter" in name else rng.choice(["", "Hm.\n\nSo:"])
        )  # that one writes it before each call
        turn = {"role": "assistant", "content": "", "tool_calls": calls, "reasoning_content": thought}
        text = chat([user, turn], add_generation_prompt=False, tools=None).rpartition("<|turn>model\n")[2]
        text = text.removesuffix("<turn|>\n").removesuffix("<|tool_response>")

        whole, parts = (AnswerParser(ReasoningParser(GEMMA), Gemma4(lambda: "id")) for _ in range(2))
        answer, summed = whole.parse(text), Answer()
        for delta in [*map(parts.push, cuts(rng, text)), parts.push("", last=True)]:
            summed.reasoning += delta.reasoning
            summed.add(delta.content, delta.calls)
        assert answer == summed and answer.content == "" and answer.reasoning == thought
        assert [json.loads(one.arguments) for one in answer.calls] == made
        assert [one.name for one in answer.calls] == [one["function"]["name"] for one in calls]


def test_json_that_a_grammar_holds_comes_back():
    for rng in seeded(60, "json"):
        given = {nonsense(rng, 4): value(rng) for _ in range(rng.randrange(4))}
        text = FORMS[Gemma4][0].write([("f", json.dumps(given, ensure_ascii=rng.random() < 0.5))] * 2)
        answer = streamed(Gemma4(), cuts(rng, text))
        assert answer.content == "" and [json.loads(one.arguments) for one in answer.calls] == [given] * 2


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "content"),
    [
        ("<|channel>thought\nHm.\n\nSo.\n<channel|>Yes.", False, "Hm.\n\nSo.", "Yes."),
        ("<|channel>thought\n<channel|>Yes.", False, "", "Yes."),
        ("<|channel>thoughts?<channel|>Yes.", False, "thoughts?", "Yes."),
        ("<|channel>thought\nHm.\n<|tool_call>call:f{}<tool_call|>", False, "Hm.", "<|tool_call>call:f{}<tool_call|>"),
        ("Hm.<|tool_call>call:f{}", True, "Hm.", "<|tool_call>call:f{}"),
        ("Yes. <|channel>thought\nHm.<channel|>", False, "", "Yes. <|channel>thought\nHm.<channel|>"),
        ("<|channel>thou", False, "", ""),
        ("<|channel>thought\nHm. <chan", False, "Hm. <chan", ""),
        ("<|chan", False, "", "<|chan"),
    ],
)
def test_thoughts(text, opened, reasoning, content):
    assert ReasoningParser(GEMMA, opened=opened).parse(text) == ReasoningDelta(reasoning, content)


@settings(max_examples=100, deadline=None)
@given(st.booleans(), st.lists(st.sampled_from(THOUGHTS), max_size=10))
def test_cutting_thoughts_changes_nothing(opened, scraps):
    text = "".join(scraps)
    for pieces in (scraps, list(text)):
        parser = ReasoningParser(GEMMA, opened=opened)
        deltas = [*map(parser.push, pieces), parser.finish()]
        summed = ReasoningDelta("".join(d.reasoning for d in deltas), "".join(d.content for d in deltas))
        assert summed == ReasoningParser(GEMMA, opened=opened).parse(text)
        shown = iter(text)
        assert all(character in shown for character in summed.reasoning + summed.content)


@pytest.mark.parametrize("end", ["<channel|>", "<|tool_call>"])
def test_tokens_of_thoughts_are_counted(end):
    """The end tag among them; a call that comes in its place is none."""
    parser, tokens = (
        AnswerParser(ReasoningParser(GEMMA), Gemma4()),
        ["<|channel>", "thought", "\n", "Hm", ".", end, "call", ":f", "{}"],
    )
    for token in tokens:
        parser.push(token)
    assert parser.reasoning_tokens(range(9), lambda i: tokens[i].encode()) == 5 + (end == "<channel|>")


def test_where_an_answer_begins():
    assert GEMMA.opened("<|turn>model\n<|channel>thought\n") and GEMMA.opened("<|turn>model\n<|channel>")
    assert not GEMMA.opened("<|turn>model\n") and not GEMMA.opened("a thought\n")
    assert GEMMA.closed("<|turn>model\n<|channel>thought\n<channel|>") and not GEMMA.closed("<|turn>model\n")
