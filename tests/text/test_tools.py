"""Tool calls found in text: what holds of every text and every cutting, and the cases by hand."""

import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.text.tools.formats import PARSERS, Granite, Hermes, Llama3Json, Mistral
from appliance.text.tools.parser import ToolAnswer
from tests.text.tool_texts import ALL_KINDS as KINDS
from tests.text.tool_texts import SCRAPS, any_text, calls, cuts, seeded, written


def traced(kind):
    """A parser with a record of every cut of its text."""

    class Traced(kind):
        def __init__(self):
            super().__init__(lambda: f"id{self.count}")
            self.pieces = []

        def cut(self, n):
            text = super().cut(n)
            self.pieces.append(text)
            return text

    return Traced()


def streamed(parser, pieces):
    """The sum of the deltas, checked one by one: a call's name and id come once, first, and calls come in order."""
    answer, names = ToolAnswer(), 0
    for delta in [*map(parser.push, pieces), parser.finish()]:
        for news in delta.calls:
            if news.name is not None:
                assert news.id and news.index == names
                names += 1
            else:
                assert news.id is None and news.arguments and news.index == names - 1
        answer.add(delta.content, delta.calls)
    return answer


def whole(kind, text):
    return kind(lambda: "id").parse(text)


def found(kind, text):
    answer = kind().parse(text)
    return answer.content, [(one.name, one.arguments) for one in answer.calls]


def check_cutting(kind, text, pieces):
    parser = kind(lambda: "id")
    assert streamed(parser, pieces) == whole(kind, text), (kind, text, pieces)


def check_account(kind, text):
    """Every character goes somewhere, once and in order; what went nowhere beside a call is its markup."""
    parser = traced(kind)
    answer = streamed(parser, [text])
    rest = "".join(parser.pieces) + parser.held
    assert rest == text
    if not answer.calls:
        assert answer.content == text
    shown = iter(text)
    assert all(character in shown for character in answer.content)  # content is what the text says, in its order


@pytest.mark.parametrize("kind", KINDS)
def test_cutting_changes_nothing(kind):
    for rng in seeded(600, "cut"):
        text = any_text(rng)
        check_cutting(kind, text, cuts(rng, text))
        check_account(kind, text)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(SCRAPS) | st.text(max_size=3), max_size=20))
def test_cutting_changes_nothing_hypothesis(kind, scraps):
    text = "".join(scraps)
    check_cutting(kind, text, scraps)
    check_cutting(kind, text, list(text))
    check_account(kind, text)


@pytest.mark.parametrize("kind", KINDS)
def test_calls_come_back_as_they_were_written(kind):
    for rng in seeded(300, "round"):
        some = calls(rng)
        before, after = rng.choice(["", "Let me see.\n\n", "Ünï "]), rng.choice(["", "\n", " "])
        if kind is Llama3Json and before.endswith(" "):
            before += "\n"
        text = before + written(rng, kind, some) + after
        parser = kind()
        answer = streamed(parser, cuts(rng, text))
        assert [(one.name, one.arguments) for one in answer.calls] == some, text
        assert answer.content == before.rstrip()
        assert len({one.id for one in answer.calls}) == len(some)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_off_call_is_the_beginning_of_the_whole(kind):
    for rng in seeded(40, "off"):
        some = calls(rng)
        text = written(rng, kind, some)
        for n in range(0, len(text), 1 + len(text) // 40):
            answer = whole(kind, text[:n])
            assert len(answer.calls) <= len(some)
            for one, (name, arguments) in zip(answer.calls, some, strict=False):
                assert one.name == name and (arguments.startswith(one.arguments) or one.arguments.startswith(arguments))
            assert all(one.arguments == arguments for one, (_, arguments) in zip(answer.calls[:-1], some, strict=False))


HAND = [
    (Hermes, '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", [("f", '{"a": 1}')]),
    (Hermes, 'Hi.\n<tool_call>{"name":"f","arguments":{}}</tool_call> Bye.', "Hi. Bye.", [("f", "{}")]),
    (Hermes, '<tool_call>{"name": "f", "arguments": {"s": "</tool_call> } \\" {"}}</tool_call>', "",
     [("f", '{"s": "</tool_call> } \\" {"}')]),
    (Hermes, '<tool_call>{"name": "f", "arguments": {}}\n{"name": "g", "arguments": {}}</tool_call>\n', "",
     [("f", "{}"), ("g", "{}")]),
    (Hermes, '<tool_call>{"name": "f", "arguments": {}}\n<tool_call>{"name": "g"}', "", [("f", "{}"), ("g", "{}")]),
    (Hermes, '<tool_call>{"arguments": { "a" :1 }, "x": [{}], "name": "\\u0066"}</tool_call>', "", [("f", '{ "a" :1 }')]),
    (Hermes, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    (Hermes, '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
    (Hermes, '<tool_call>{"name": "f", "arguments": {"a": "\\u00e9\\ud83d\\ude00\nü"}}</tool_call>', "",
     [("f", '{"a": "\\u00e9\\ud83d\\ude00\nü"}')]),
    (Hermes, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', None, []),
    (Hermes, '<tool_call>{"name": 3, "arguments": {}}</tool_call>', None, []),
    (Hermes, '<tool_call>{"name": "", "arguments": {}}</tool_call>', None, []),
    (Hermes, "<tool_call>\nget_weather(city)\n</tool_call> x", None, []),
    (Hermes, "<tool_call>", None, []),
    (Hermes, "a <tool_call", None, []),
    (Hermes, '<tool_call>{"name": "f", "argu', None, []),
    (Hermes, "  \n", None, []),
    (Hermes, '<tool_call><tool_call>{"name": "f"}</tool_call>', "<tool_call>", [("f", "{}")]),
    (Hermes, '<tool_call>{"name": "f", "arguments": {"a": "it"s"}}</tool_call> x', " x", [("f", '{"a": "it"s"}}')]),
    (Hermes, '<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>', "", [("f", '{"a": 1')]),
    (Hermes, '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>', "", [("f", '{"a": 1}')]),
    (Hermes, '<tool_call>{"name": "f", "arguments": {"a": 1}}}\n</tool_call>', "}", [("f", '{"a": 1}')]),
    (Hermes, '<tool_call>{"name": "f", "arguments": {"a": 1}}\n</tool_', "", [("f", '{"a": 1}')]),
    (Hermes, '{"name": "f", "arguments": {}}', None, []),
    (Llama3Json, '{"name": "f", "parameters": {"q": "a; {b"}}', "", [("f", '{"q": "a; {b"}')]),
    (Llama3Json, '<|python_tag|>{"name": "f", "parameters": {}}', "", [("f", "{}")]),
    (Llama3Json, '{"type": "function", "name": "f", "arguments": {"a": 1}}; {"name": "g", "parameters": {}} ;', "",
     [("f", '{"a": 1}'), ("g", "{}")]),
    (Llama3Json, '{"name": "f", "parameters": {}}\n{"name": "g", "parameters": {}}', "", [("f", "{}"), ("g", "{}")]),
    (Llama3Json, 'Now:\n  {"name": "f", "parameters": {}}', "Now:", [("f", "{}")]),
    (Llama3Json, 'Now: {"name": "f", "parameters": {}}', None, []),
    (Llama3Json, '{"name": "Bob", "age": 7}', None, []),
    (Llama3Json, '{"name": "Bob"}', None, []),
    (Llama3Json, '{"person": {"name": "f", "parameters": {}}}', None, []),
    (Llama3Json, '[{"name": "f", "parameters": {}}]', None, []),
    (Llama3Json, '<|python_tag|>brave_search.call(query="x")', None, []),
    (Llama3Json, '<|python_tag|>{"name": "f"}', "", [("f", "{}")]),
    (Llama3Json, '{"name": "f", "parameters": {"a" 1}}; x', "", [("f", '{"a" 1}}; x')]),
    (Mistral, '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]', "",
     [("f", '{"a": 1}'), ("g", "{}")]),
    (Mistral, '[TOOL_CALLS][{"name": "f", "arguments": {"a": [1]}, "id": "abcdefghi"}]', "", [("f", '{"a": [1]}')]),
    (Mistral, 'So: [TOOL_CALLS]f[ARGS]{"a": "[TOOL_CALLS]"}[TOOL_CALLS]g[ARGS]{}', "So:",
     [("f", '{"a": "[TOOL_CALLS]"}'), ("g", "{}")]),
    (Mistral, '[TOOL_CALLS]f{"a": 1}', "", [("f", '{"a": 1}')]),
    (Mistral, '[TOOL_CALLS] {"name": "f", "arguments": {}}', "", [("f", "{}")]),
    (Mistral, '[TOOL_CALLS]f[ARGS]{"a": 1[TOOL_CALLS]g[ARGS]{}', "", [("f", '{"a": 1'), ("g", "{}")]),
    (Mistral, "[TOOL_CALLS]Sure, what?", None, []),
    (Granite, '<|tool_call|>[{"name": "f", "arguments": {"a": 1}}, {"arguments": {}, "name": "g"}]', "",
     [("f", '{"a": 1}'), ("g", "{}")]),
    (Granite, 'Yes. <|tool_call|> [\n{"name":"f","arguments":{"s":"<|tool_call|>]"}}\n]\n', "Yes.",
     [("f", '{"s":"<|tool_call|>]"}')]),
    (Granite, '<|tool_call|>[{"name": "f", "arguments": {"a": 1<|tool_call|>[{"name": "g"}]', "",
     [("f", '{"a": 1'), ("g", "{}")]),
    (Granite, '<|tool_call|>[{"name": "f", "arguments": {"a"', "", [("f", '{"a"')]),
    (Granite, '<|tool_call|>{"name": "f", "arguments": {}}', None, []),
    (Granite, '<|tool_call|>[]', None, []),
    (Granite, '[{"name": "f", "arguments": {}}]', None, []),
    (Granite, '<tool_call>[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"s": "<tool_call>["}}]', "",
     [("f", "{}"), ("g", '{"s": "<tool_call>["}')]),
    (Granite, 'So\n<tool_call> \n[{"name": "f", "arguments": {"a": 1<tool_call>[{"name": "g"}]', "So",
     [("f", '{"a": 1'), ("g", "{}")]),
    (Granite, '<tool_call>{"name": "f", "arguments": {}}</tool_call>', None, []),
    (Granite, '<|tool_call|><tool_call>[{"name": "f"}]', "<|tool_call|>", [("f", "{}")]),
    (Mistral, "[TOOL_CALLS]f[ARGS]", None, []),
    (Mistral, '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"foo": 1}]', ', {"foo": 1}]', [("f", "{}")]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "content", "expected"), HAND)
def test_by_hand(kind, text, content, expected):
    assert found(kind, text) == (text if content is None else content, expected)


def test_deltas_come_as_early_as_they_can():
    parser = Hermes(lambda: "id")
    text = 'Hi <b>\n<tool_call>\n{"name": "f", "arguments": {"city": "Rome"}}\n</tool_call>'
    seen = [(d.content, [(c.name, c.arguments) for c in d.calls]) for d in map(parser.push, text)]
    said = "".join(content for content, _ in seen[:6])
    assert said == "Hi <b>"  # what can be no marker is not held back
    begin = text.index('{"city"')
    assert seen[begin] == ("", [("f", "{")])
    assert [news for _, calls in seen[begin + 1 : begin + 16] for news in calls] == [(None, c) for c in '"city": "Rome"}']
    assert parser.finish().calls == ()


def test_ids():
    one = Mistral().parse("[TOOL_CALLS]f[CALL_ID]abcDEF123[ARGS]{}[TOOL_CALLS]g[ARGS]{}").calls
    assert one[0].id == "abcDEF123" and len(one[1].id) == 9 and one[1].id.isalnum()
    assert Hermes().parse('<tool_call>{"name": "f"}').calls[0].id.startswith("call_")


def test_arguments_stay_valid_json_where_the_model_wrote_it():
    deep = '{"a": ' * 50 + "{}" + "}" * 50
    assert found(Hermes, f'<tool_call>{{"name": "f", "arguments": {deep}}}</tool_call>') == ("", [("f", deep)])
    assert json.loads(deep)


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_take_time_in_proportion(kind):
    """Texts made to be read again and again; the bound is far above what reading them once takes."""
    n = 20_000
    texts = ["<tool_call>" * n, "\n" * n * 5, "{" * n * 5, "\n{" * n, "[TOOL_CALLS]" * n, '<tool_call>{"arguments":{"a":' * n]
    texts += [
        '[TOOL_CALLS][{"arguments":{"a":' * (n // 2),
        '\n{"arguments": {"' * n,
        "\n;" * n,
        '{"name": "f", "parameters": ' + "[" * n,
    ]
    for text in texts:
        begun = time.process_time()
        kind().parse(text)
        assert time.process_time() - begun < 3, text[:40]


def test_names_are_vllms():
    assert {"hermes", "llama3_json", "mistral", "granite"} <= set(PARSERS)
    assert all(kind.special and set(kind.openers) <= {*kind.special, "{"} for kind in PARSERS.values())


@pytest.mark.parametrize("kind", KINDS)
def test_spoiled_calls_lose_no_other_call(kind):
    """What is wrong with one call's inside leaves an intact one behind it whole, where markers tell them apart."""
    if kind is Llama3Json:
        pytest.skip("has no markers")
    opener = kind.openers[0]
    for rng in seeded(100, "spoiled"):
        good = ("good", '{"a": "x"}')
        bad = written(rng, kind, [("f", '{"k": [1, {"l": 2}]}')])
        bad = bad.replace("1", rng.choice([":", "]", "}", "1 1", "{", ",,"]))
        text = bad + "\n" + written(random.Random(0), kind, [good])
        assert (found(kind, text)[1] or [None])[-1] == good, (opener, text)
