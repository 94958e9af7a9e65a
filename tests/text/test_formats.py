"""Calls between markers of their own, in lists, and as Python: what holds of every text and every cutting, and cases by hand."""

import json

import pytest

from appliance.core.params import RequestError
from appliance.text.tools.choice import forced, tool_choice
from appliance.text.tools.formats import PARSERS, Apertus, Hunyuan, Phi4Mini
from appliance.text.tools.forms import FORMS
from appliance.text.tools.gemma import FunctionGemma
from appliance.text.tools.marked import DeepSeekV3, DeepSeekV31, KimiK2, SolarOpen
from appliance.text.tools.pythonic import Lfm2, Olmo3
from tests.text.test_strict_tools import Model
from tests.text.test_tools import check_account, check_cutting, found, streamed
from tests.text.tool_texts import ALIKE, SCRAPS, calls, cuts, nonsense, seeded, spoiled

KINDS = (DeepSeekV3, DeepSeekV31, KimiK2, SolarOpen, Hunyuan, Phi4Mini, Apertus, Olmo3, Lfm2, FunctionGemma)
WORDS = (Olmo3, Lfm2, FunctionGemma)  # arguments are called by words
MARKED = (DeepSeekV3, DeepSeekV31, KimiK2, SolarOpen)


def simple(rng):
    """Calls whose arguments have names that are words: in Python there are no others."""
    values = [1, -2.5, True, None, "", "a'b\"c)\n", [1, ["x", {}]], {"k": "</function_calls>"}]
    return [
        ("f", json.dumps({key: rng.choice(values) for key in ("a", "b_1")[: rng.randrange(3)]})) for _ in range(rng.randint(1, 3))
    ]


def written(rng, kind):
    some = simple(rng) if kind in WORDS else calls(rng)
    return some, FORMS[kind][0].write(some)


@pytest.mark.parametrize("kind", KINDS)
def test_cutting_changes_nothing(kind):
    form = FORMS[kind][0]
    scraps = [
        *SCRAPS,
        *kind.special,
        form.before,
        form.after,
        form.begin("f"),
        form.closing,
        form.between,
        "f(",
        "a=",
        ")",
        "'",
        "=",
    ]
    for rng in seeded(150, kind.__name__):
        text = "".join(rng.choice(scraps) for _ in range(rng.randrange(25)))
        if rng.random() < 0.6:
            text = nonsense(rng, 3) + spoiled(rng, written(rng, kind)[1]) + text
        check_cutting(kind, text, cuts(rng, text))
        check_account(kind, text)


@pytest.mark.parametrize("kind", KINDS)
def test_calls_come_back_as_they_were_written(kind):
    for rng in seeded(60, "round"):
        some, text = written(rng, kind)
        before, after = rng.choice(["", "Let me see.\n\n", "Ünï "]), rng.choice(["", "\n", " "])
        answer = streamed(kind(), cuts(rng, before + text + after))
        assert answer.content == before.rstrip(), text
        assert [one.name for one in answer.calls] == [name for name, _ in some]
        for one, (_, arguments) in zip(answer.calls, some, strict=True):
            assert one.arguments == arguments or (kind in WORDS and json.loads(one.arguments) == json.loads(arguments))
        assert len({one.id for one in answer.calls}) == len(some)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_off_call_is_the_beginning_of_the_whole(kind):
    text = "So.\n" + FORMS[kind][0].write([("f", '{"a": "b c", "d": [1, {"e": null}]}'), ("g", '{"a": 2}')])
    _, every = found(kind, text)
    assert every == [("f", '{"a": "b c", "d": [1, {"e": null}]}'), ("g", '{"a": 2}')]
    for n in range(len(text)):
        _, some = found(kind, text[:n])
        assert all(one[0] == whole[0] and whole[1].startswith(one[1]) for one, whole in zip(some, every, strict=False))
        assert some[:-1] == every[: max(0, len(some) - 1)]


V3, V31 = DeepSeekV3.section + "<｜tool▁call▁begin｜>", DeepSeekV31.section + "<｜tool▁call▁begin｜>"
KIMI, SOLAR = KimiK2.section + "<|tool_call_begin|>", SolarOpen.section + "<|tool_call:begin|>"
HAND = [  # content None: all of it
    (DeepSeekV3, V3 + 'function<｜tool▁sep｜>f\n```json\n{"a": "```"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>', "",
     [("f", '{"a": "```"}')]),
    (DeepSeekV3, V3 + 'function<｜tool▁sep｜>f\n```json\n{"a": 1}\n``', "", [("f", '{"a": 1}')]),
    (DeepSeekV3, V3 + "function<｜tool▁sep｜>f\n```json\n[1]\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>", None, []),
    (DeepSeekV3, V3 + 'function<｜tool▁sep｜>f\n```json\n{"a": 1 1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>', "",
     [("f", '{"a": 1 1}\n')]),
    (DeepSeekV31, V31 + "f<｜tool▁sep｜>{}<｜tool▁call▁end｜>\n<｜tool▁calls▁end｜> Bye.", " Bye.", [("f", "{}")]),
    (DeepSeekV31, V31 + "f<｜tool▁sep｜><｜tool▁call▁end｜><｜tool▁calls▁end｜>", "", [("f", "{}")]),
    (DeepSeekV31, V31 + "f<｜tool▁sep｜>{} no", " no", [("f", "{}")]),
    (DeepSeekV31, V31 + "f", None, []),
    (DeepSeekV31, "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜>", None, []),
    (DeepSeekV31, DeepSeekV31.section + DeepSeekV31.close, None, []),
    (KimiK2, KIMI + 'functions.a.b:c:12<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|><|tool_calls_section_end|>', "",
     [("a.b:c", '{"a": 1}')]),
    (KimiK2, KIMI + "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>", None, []),
    (SolarOpen, SOLAR + 'x1<|tool_call:name|>f<|tool_call:args|>{"a": 1}<|tool_call:end|><|calls|>', "", [("f", '{"a": 1}')]),
    (Hunyuan, 'Hm.\n<tool_calls>\n[\n{"name": "f", "arguments": {"a": 1}}\n]\n</tool_calls>\nOk', "Hm.\nOk", [("f", '{"a": 1}')]),
    (Hunyuan, '<tool_calls>{"name": "f", "arguments": {}}</tool_calls>', None, []),
    (Phi4Mini, 'functools[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "parameters": {}}]', "",
     [("f", '{"a": 1}'), ("g", "{}")]),
    (Phi4Mini, "import functools\nfunctools.partial, functools[0]", None, []),
    (Apertus, '<|tools_prefix|>[{"f": {"a": 1}}, {"g": {}}]<|tools_suffix|> Ok', " Ok", [("f", '{"a": 1}'), ("g", "{}")]),
    (Apertus, '<|tools_prefix|>[{"f": {"a": 1}, "g": {}}]<|tools_suffix|>', ', "g": {}}]<|tools_suffix|>', [("f", '{"a": 1}')]),
    (Apertus, '<|tools_prefix|>[{"f": 1}]<|tools_suffix|>', None, []),
    (Apertus, "<|tools_prefix|>[]<|tools_suffix|>", None, []),
    (Olmo3, "<function_calls>\nf(a='x', b = [1, 'y'], c=true)\ng()\n</function_calls>", "",
     [("f", '{"a": "x", "b": [1, "y"], "c": true}'), ("g", "{}")]),
    (Olmo3, "<function_calls>f(a=None, b={'k': (1, True)},)</function_calls>", "", [("f", '{"a": null, "b": {"k": [1, true]}}')]),
    (Olmo3, "<function_calls>f(a='it\\'s, (so)', b=Rome)</function_calls>", "", [("f", '{"a": "it\'s, (so)", "b": "Rome"}')]),
    (Olmo3, "<function_calls>f(a=\"x\n'y\", b='x\n\"y', c=[\"1\n2\"])</function_calls>", "",
     [("f", '{"a": "x\\n\'y", "b": "x\\n\\"y", "c": ["1\\n2"]}')]),
    (Olmo3, "<function_calls>f(नाम='x', ü_1=2)</function_calls>", "", [("f", '{"नाम": "x", "ü_1": 2}')]),
    (Olmo3, "<function_calls>f(a-b='x')</function_calls>", None, []),
    (Olmo3, "<function_calls>f(\"Rome\")</function_calls>", None, []),
    (Olmo3, "<function_calls>f(a=1 b=2)", "", [("f", '{"a": "1 b=2"}')]),
    (Olmo3, "<function_calls>f(a=[1)</function_calls>", "[1)</function_calls>", [("f", "{")]),
    (Lfm2, "<|tool_call_start|>[f(a='x'), g()]<|tool_call_end|>Checking.", "Checking.", [("f", '{"a": "x"}'), ("g", "{}")]),
    (Lfm2, "<|tool_call_start|>[f(a=[1, 2]) g()]<|tool_call_end|>", " g()]<|tool_call_end|>", [("f", '{"a": [1, 2]}')]),
    (Lfm2, "<|tool_call_start|>f(a=1)<|tool_call_end|>", None, []),
    (Lfm2, "<|tool_call_start|>[]<|tool_call_end|>", None, []),
    (FunctionGemma, "<start_function_call>call:f{city:<escape>Zürich<escape>,days:[1,2]}<end_function_call>", "",
     [("f", '{"city": "Zürich", "days": [1, 2]}')]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "content", "expected"), HAND)
def test_by_hand(kind, text, content, expected):
    assert found(kind, text) == (text if content is None else content, expected)


@pytest.mark.parametrize("kind", MARKED)
def test_ids(kind):
    """Those that the model wrote, where it does; the template asks for them."""
    ids = [one.id for one in kind().parse(FORMS[kind][0].write([("f", "{}"), ("g", "{}")])).calls]
    wrote = {KimiK2: ["functions.f:0", "functions.g:1"], SolarOpen: ["0", "1"]}
    assert ids == wrote[kind] if kind in wrote else all(one.startswith("call_") for one in ids)


def test_arguments_are_told_as_they_come():
    parser = KimiK2()
    text = KIMI + 'functions.f:0<|tool_call_argument_begin|>{"city": "Rome"}<|tool_call_end|><|tool_calls_section_end|>'
    told = [(one.name, one.arguments) for delta in map(parser.push, text) for one in delta.calls]
    assert told == [("f", "{"), *((None, character) for character in '"city": "Rome"}')]


@pytest.mark.parametrize("kind", [one for one, forms in FORMS.items() if not forms[0].as_json])
def test_names_that_do_not_go_into_a_call_are_refused(kind):
    choice = tool_choice([{"type": "function", "function": {"name": 'f"\0.*\0'}}], "required")
    with pytest.raises(RequestError, match="does not go into the markup in which this model writes calls"):
        forced(choice, FORMS[kind][0])


@pytest.mark.parametrize("kind", ALIKE)
def test_what_a_grammar_lets_through(kind):
    """Calls that fit, also several and among text, are written to their end; one that does not fit is not."""
    (form,) = FORMS[kind]
    model = Model(kind, form, special=False)
    fine = form.write([("f", '{"n": 5, "unit": "C"}'), ("get_weather", '{"any": ["thing"]}')])
    for text in ("Hm.", fine, f"So:\n{fine} and\n{fine}"):
        assert model.write(text) == (text, True)
    bad = form.write([("f", '{"n": "x"}')])
    assert model.write(bad)[0] != bad and not model.write(bad)[1]


def test_every_parser_has_a_form_and_its_own_markers():
    kinds = {kind for kind in PARSERS.values() if kind.__name__ != "Harmony"}
    assert kinds == set(FORMS)
    assert all(form.write([("f", "{}")]).startswith((*kind.openers, "{")) for kind, forms in FORMS.items() for form in forms)
