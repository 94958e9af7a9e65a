"""The format of gpt-oss: what holds of every answer and every cutting, the cases by hand, and what grammars let through."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.core.params import RequestError
from appliance.text.answer import Answer, AnswerParser, HarmonyAnswer
from appliance.text.detokenizer import MARK
from appliance.text.reasoning import HARMONY, REASONING, tags_of
from appliance.text.tools.detect import detect
from appliance.text.tools.formats import PARSERS
from appliance.text.tools.harmony import CALL, END, MARKERS, START, Harmony
from tests.text.harmony_texts import (
    CALL_OF_F,
    CALLS,
    FINAL,
    NEXT,
    SAID,
    SCRAPS,
    TEMPLATE,
    THOUGHT,
    TOOL,
    answer,
    any_answer,
    tokens,
)
from tests.text.test_tool_choice import chat_of
from tests.text.tool_texts import cuts, seeded


def parser(*, parallel: bool = True, **options: Any) -> AnswerParser:
    return AnswerParser(None, Harmony(lambda: "id", **options), parallel=parallel)


def streamed(one: AnswerParser, pieces: Sequence[str]) -> Answer:
    total = Answer()
    for delta in [*map(one.push, pieces), one.push("", last=True)]:
        assert all(piece != "" for piece in delta.pieces)
        total.reasoning += delta.reasoning
        total.add(delta.content, delta.calls)
    return total


def marked(text: str) -> str:
    """As special tokens come out of the detokenizer."""
    return re.sub("|".join(map(re.escape, MARKERS)), lambda found: MARK + found[0], text)


HAND: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    (f"{THOUGHT}Hm.{NEXT}{FINAL}Yes.", "Hm.", "Yes.", []),
    (f"{FINAL}Yes.<|return|>", "", "Yes.", []),
    (f"{THOUGHT}Hm.{NEXT}{CALL_OF_F}{{}}<|call|>", "Hm.", "", [("f", "{}")]),
    (f"{THOUGHT}Hm.{NEXT}{CALLS[1] % 'f'}{{}}", "Hm.", "", [("f", "{}")]),
    (f"{SAID}Let me see.{NEXT}{CALL_OF_F}{{}}", "", "Let me see.", [("f", "{}")]),
    (f"{THOUGHT}A{NEXT}{SAID}B{NEXT}{THOUGHT}C{NEXT}{FINAL}D", "A\n\nC", "B\n\nD", []),
    (f"{CALL_OF_F}{{}}<|call|>{START}assistant{CALLS[4] % 'g'} 1 + 1", "", "", [("f", "{}"), ("g", "1 + 1")]),
    (CALL_OF_F, "", "", [("f", "{}")]),
    (f"{CALL_OF_F} \n{CALL}", "", "", [("f", "{}")]),
    (f'{CALL_OF_F}{{"a": "<b', "", "", [("f", '{"a": "<b')]),
    (f"{THOUGHT}Hm", "Hm", "", []),
    (f"{THOUGHT}Hm.{END}", "Hm.", "", []),
    (f"{THOUGHT}Hm.{NEXT}<|channel|>fin", "Hm.", "<|start|>assistant<|channel|>fin", []),
    (f"{THOUGHT}Hm.{NEXT}<|channel|>final", "Hm.", "", []),
    (f"{THOUGHT}Hm.{NEXT}<|channel|>commentary to=functions.", "Hm.", "", []),
    ("<|channel|>", "", "", []),
    ("", "", "", []),
    ("Hello <b> there", "", "Hello <b> there", []),
    (" to=day", "", " to=day", []),
    ("<|chan", "", "<|chan", []),
    ("<|channel|>final Hello", "", "<|channel|>final Hello", []),
    ("<|channel|>final Hello there<|message|>Yes", "", "<|channel|>final Hello there\n\nYes", []),
    ("<|channel|>dreams<|message|>Yes", "", "Yes", []),
    (f"{THOUGHT}A{FINAL}B", "A", "B", []),
    (f"{THOUGHT}A{END}{FINAL}B", "A", "B", []),
    (f"{THOUGHT}A{END} B", "A", " B", []),
    (f"{FINAL}A <| b", "", "A <| b", []),
    ("<|start|>assistant<|channel|>final<|message|>A", "", "A", []),
]


@pytest.mark.parametrize(("text", "reasoning", "content", "calls"), HAND)
def test_by_hand(text: str, reasoning: str, content: str, calls: list[tuple[str, str]]) -> None:
    for one in (text, marked(text)):
        for pieces in ([one], list(one), tokens(one)):
            found = streamed(parser(marked=one is not text), pieces)
            assert (found.reasoning, found.content, [(call.name, call.arguments) for call in found.calls]) == (
                reasoning,
                content,
                calls,
            )


def test_answers_come_back_as_they_were_written() -> None:
    for rng in seeded(200, "harmony"):
        made = answer(rng)
        found = streamed(parser(), cuts(rng, made.text))
        assert found.reasoning == "\n\n".join(made.thoughts) and found.content == "\n\n".join(made.texts), made.text
        assert [(one.name, one.arguments) for one in found.calls] == made.calls, made.text


def test_text_that_looks_like_a_marker_is_text() -> None:
    """Where markers are special tokens: of whoever asks about this format, and in what is written by a call."""
    literal = f"{END}{START}assistant{FINAL}{CALL_OF_F}<|return|>"
    for rng in seeded(100, "marked"):
        made = answer(rng)
        found = streamed(parser(marked=True), cuts(rng, marked(made.text).replace("Hm. ", literal)))
        assert found.reasoning == "\n\n".join(made.thoughts).replace("Hm. ", literal)
        assert found.content == "\n\n".join(made.texts).replace("Hm. ", literal)
        assert parser(marked=True).parse(made.text) == Answer(made.text)
    fine = marked(f"{THOUGHT}Hm.{NEXT}{CALL_OF_F}") + f'{{"s": "{literal}"}}' + MARK + CALL
    assert [one.arguments for one in parser(marked=True).parse(fine).calls] == [f'{{"s": "{literal}"}}']


def check_cutting(text: str, pieces: Sequence[str], **options: Any) -> None:
    assert streamed(parser(**options), pieces) == parser(**options).parse(text), (text, pieces, options)


def test_cutting_changes_nothing() -> None:
    for rng in seeded(250, "cut"):
        text = any_answer(rng)
        options = {"calls": rng.random() < 0.8, "parallel": rng.random() < 0.7, "marked": rng.random() < 0.5}
        before = rng.choice(
            ["", "", f"{START}assistant{FINAL}It is", f"{START}user<|message|>Hi{END}", f"{START}assistant{THOUGHT}"]
        )
        one = marked(text) if options["marked"] else text
        check_cutting(one, cuts(rng, one), before=before, **options)
        check_account(text)
        assert len(parser(parallel=False).parse(text).calls) <= 1 and not parser(calls=False).parse(text).calls


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(SCRAPS) | st.text(max_size=3), max_size=16))
def test_cutting_changes_nothing_hypothesis(scraps: list[str]) -> None:
    text = "".join(scraps)
    check_cutting(text, scraps)
    check_cutting(text, list(text))
    check_account(text)


class Traced(Harmony):
    """With a record of every cut of its text."""

    apart = ""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.markup: list[str] = []
        self._giving = False
        super().__init__()

    def _give(self, n: int) -> None:
        self._giving = True
        super()._give(n)
        self._giving = False

    def cut(self, n: int) -> str:
        text = super().cut(n)
        (self.told if self._giving else self.markup).append(text)
        return text


HEADER = re.compile(r"(<\|start\|>[^\s<]*)?(\s|<\|channel\|>|<\|constrain\|>|[^\s<])*<\|message\|>")
CUT_OFF = re.compile(
    r"\s*(<\|start\|>|assistant|<\|channel\|>|analysis|commentary|final|\s|to=[^\s<]*|<\|constrain\|>|json)*(<\|?[a-z]*\|?)?"
)


def check_account(text: str) -> None:
    """Nothing but headers and markers is lost."""
    one = Traced()
    *_, last = [*map(one.push, text), one.finish()]
    assert last is not None and one.held == ""
    for k, markup in enumerate(filter(None, one.markup)):
        known = markup in (END, "<|return|>", CALL) or HEADER.fullmatch(markup)
        assert known or (k == len([*filter(None, one.markup)]) - 1 and CUT_OFF.fullmatch(markup)), (text, markup)
    assert len("".join(one.told)) + len("".join(one.markup)) == len(text)
    if not any(marker in text for marker in MARKERS):
        found = parser().parse(text)
        assert found.content == text and not found.reasoning and not found.calls


def test_an_answer_that_is_cut_off_is_the_beginning_of_the_whole() -> None:
    for rng in seeded(40, "off"):
        made = answer(rng)
        parts = tokens(made.text)
        whole = parser().parse(made.text)
        for n in range(0, len(parts), 1 + len(parts) // 30):
            found = parser().parse("".join(parts[:n]))
            assert whole.reasoning.startswith(found.reasoning) or "<|start|>" in found.content
            for one, (name, arguments) in zip(found.calls, made.calls, strict=False):
                assert name.startswith(one.name) and (arguments.startswith(one.arguments) or one.arguments == "{}")


def test_what_comes_is_passed_on_at_once() -> None:
    one = parser()
    text = f"{THOUGHT}Hm <b>.{NEXT}{FINAL}Yes."
    seen = [(delta.reasoning, delta.content) for delta in map(one.push, tokens(text))]
    assert [pair for pair in seen if pair != ("", "")][:5] == [("H", ""), ("m", ""), (" ", ""), ("<b", ""), (">", "")]
    assert seen[-4:] == [("", c) for c in "Yes."]
    nonsense = parser()
    assert "".join(nonsense.push(piece).content for piece in ("He", "llo", " there")) == "Hello there"


def test_an_answer_goes_on_with_what_the_prompt_has() -> None:
    begun = f"{START}assistant{FINAL}It is <"
    assert parser(before=begun).parse(f" 5.{NEXT}{FINAL}So.") == Answer(" 5.\n\nSo.")
    assert parser(before=f"{START}assistant{THOUGHT}So").parse(f" be it.{NEXT}{FINAL}5") == Answer("5", reasoning=" be it.")
    assert parser(before=f"{START}user<|message|>Hi{END}").parse(f"{START}assistant{FINAL}5") == Answer("5")
    assert parser(before=f"{START}assistant").parse(f"{FINAL}5") == Answer("5")


def test_reasoning_tokens() -> None:
    """All that reasoning takes, its headers and ends included; however often it is asked for."""
    for rng in seeded(60, "tokens"):
        made = answer(rng)
        words = tokens(made.text)
        one, ids = HarmonyAnswer("", {}, calls=True), range(len(words))
        counts = [one.reasoning_tokens(ids[:n], lambda i, words=words: words[i].encode()) for n in range(len(words) + 1)]
        expected = sum(len(tokens(message)) for message in made.thinking)
        assert counts[-1] == expected and counts == sorted(counts), made.text
        assert HarmonyAnswer("", {}, calls=True).reasoning_tokens(ids, lambda i, words=words: words[i].encode()) == expected
    assert HarmonyAnswer("", {}, calls=True).reasoning_tokens([], lambda _: b"") == 0


def test_the_answer_ends_with_its_first_call() -> None:
    one = parser(parallel=False)
    text = f"{THOUGHT}Hm.{NEXT}{CALL_OF_F}{{}}{END}"
    ends = [(one.push(piece), one.satisfied)[1] for piece in tokens(text)]
    assert one.may_end and ends == [False] * (len(ends) - 1) + [True]
    assert one.finish_reason("stop") == "tool_calls" and one.push(f"{START}assistant{FINAL}5", last=True).pieces == ()


def test_long_texts_take_time_in_proportion() -> None:
    n = 10_000
    for text in (
        START * n,
        f"{START}assistant" * n,
        "<|channel|> " * n,
        f"{THOUGHT}a{END}" * n,
        "<|constrain|>" * n,
        "<" * n * 5,
    ):
        begun = time.process_time()
        parser().parse(text)
        assert time.process_time() - begun < 3, text[:40]


def test_names_are_vllms() -> None:
    assert PARSERS["openai"] is Harmony and REASONING["openai_gptoss"] is HARMONY


def test_the_template_tells() -> None:
    assert tags_of([TEMPLATE]) is HARMONY and detect(chat_of(TEMPLATE)) == "openai"


# What a template is told of: one call a message, and a thought or text beside it.
def call(name: str, k: int) -> dict[str, Any]:
    return {"id": f"call_{k}", "type": "function", "function": {"name": name, "arguments": f'{{"n": {k}}}'}}


def conversation() -> list[dict[str, Any]]:
    calls = {
        "role": "assistant",
        "content": "Let me see.",
        "reasoning_content": "Hm.",
        "tool_calls": [call("f", 1), call("g", 2)],
    }
    results = [{"role": "tool", "tool_call_id": f"call_{k}", "content": f"result {k}"} for k in (2, 1)]
    return [{"role": "user", "content": "Hi"}, calls, *results]


def check_conversation(chat: Any) -> None:
    text = chat(conversation(), add_generation_prompt=True, tools=[TOOL])
    _, *turns = text.split("<|start|>user<|message|>Hi<|end|>")[1].split(START)
    assert [turn.partition("<|message|>")[2].removesuffix(END).removesuffix(CALL) for turn in turns] == [
        "Hm.\n\nLet me see.",
        '{"n": 1}',
        '"result 1"',
        '{"n": 2}',
        '"result 2"',
        "",
    ]
    assert turns[1].startswith("assistant to=functions.f<|channel|>commentary") and "=functions.g" in turns[3]
    assert turns[5] == "assistant"
    alone = [
        conversation()[0],
        {"role": "assistant", "content": "", "tool_calls": [call("f", 1)]},
        {"role": "tool", "content": "!"},
    ]
    text = chat(alone, add_generation_prompt=True, tools=None)
    assert text.count("analysis<|message|>") == 0 and text.endswith('"!"<|end|><|start|>assistant')
    going_on = [conversation()[0], {"role": "assistant", "content": "It is ", "reasoning_content": "Hm."}]
    text = chat(going_on, add_generation_prompt=False, continue_final_message=True, tools=None)
    assert text.endswith(f"{FINAL}It is ")
    with pytest.raises(RequestError, match="needs a last message with text"):
        chat(conversation()[:2], add_generation_prompt=False, continue_final_message=True, tools=None)


def test_conversations() -> None:
    check_conversation(chat_of(TEMPLATE))


@pytest.mark.realdata
def test_the_real_template(shared_data: Any) -> None:
    source = (shared_data / "tokenizers" / "chat_templates" / "openai-gpt-oss-120b.jinja").read_text()
    chat = chat_of(source)
    check_conversation(chat)
    assert tags_of([source]) is HARMONY and detect(chat) == "openai"
    text = chat(conversation()[:1], add_generation_prompt=True, tools=None, extra={"reasoning_effort": "high"})
    assert "Reasoning: high" in text and text.endswith("<|start|>assistant")
