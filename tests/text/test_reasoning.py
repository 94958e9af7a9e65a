"""Reasoning taken apart from content: what holds of every text and cutting, and the cases by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.text.answer import Answer, AnswerParser
from appliance.text.reasoning import GRANITE, REASONING, THINK, ReasoningDelta, ReasoningParser, Tags, tags_of
from appliance.text.template import ChatTemplates
from appliance.text.tools.formats import Apertus, Hermes, Mistral
from appliance.text.tools.forms import FORMS
from appliance.text.tools.marked import KimiK2
from tests.text.test_tool_choice import chat_of
from tests.text.tool_texts import KINDS, any_text, cuts, seeded

SCRAPS = ["<think>", "</think>", "<thi", "nk>", "</", "<", "\n", "\r\n", " ", "Hm.", "Yes.", "ü", "<tool_call>", '{"name": "f"}']
CASES = [
    ("<think>\nHm.\nSo.\n</think>\n\n  Yes.\n", False, "Hm.\nSo.", "  Yes.\n"),
    ("\n <think>Hm.</think>Yes.", False, "Hm.", "Yes."),
    ("Yes. <think>Hm.</think>", False, "", "Yes. <think>Hm.</think>"),
    ("<think></think>", False, "", ""),
    ("<think>\n\n</think>\n\nYes.", False, "", "Yes."),
    ("<think>Hm. <think> </think> a </think> b", False, "Hm. <think> ", " a </think> b"),
    ("<think>Hm.\n</thi", False, "Hm.\n</thi", ""),
    ("<thi", False, "", "<thi"),
    ("Hm.\n</think>\nYes.", True, "Hm.", "Yes."),
    ("<think>\nHm.</think>Yes.", True, "Hm.", "Yes."),  # the tag again, although the prompt has it
    ("\nHm. <", True, "Hm. <", ""),
    ("</think>\n\nYes.", True, "", "Yes."),
    ("</think>\n\nYes.", False, "", "</think>\n\nYes."),
    ("", True, "", ""),
    ("\n\n", False, "", "\n\n"),
]


@pytest.mark.parametrize(("text", "opened", "reasoning", "content"), CASES)
def test_by_hand(text, opened, reasoning, content):
    assert ReasoningParser(THINK, opened=opened).parse(text) == ReasoningDelta(reasoning, content)


def check(tags, text, pieces, opened):
    whole = ReasoningParser(tags, opened=opened).parse(text)
    parser = ReasoningParser(tags, opened=opened)
    deltas = [*map(parser.push, pieces), parser.finish()]
    assert ReasoningDelta("".join(d.reasoning for d in deltas), "".join(d.content for d in deltas)) == whole, (text, pieces)
    order = "".join("r" * bool(d.reasoning) + "c" * bool(d.content) for d in deltas)
    assert "cr" not in order
    reasoning, content = "".join(whole.reasoning.split()), "".join(whole.content.split())
    first, last = ("".join(tag.split()) for tag in (tags.start, tags.end))
    tagged = [start + reasoning + end + content for start in ("", first) for end in ("", last)]
    assert "".join(text.split()) in tagged  # all but the tags and white space beside them is there
    if tags.start not in text and tags.end not in text and not opened:
        assert whole == ReasoningDelta(content=text)


@pytest.mark.parametrize("opened", [False, True])
@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(SCRAPS) | st.text(max_size=2), max_size=12))
def test_cutting_changes_nothing(opened, scraps):
    text = "".join(scraps)
    check(THINK, text, scraps, opened)
    check(THINK, text, list(text), opened)


def test_cutting_changes_nothing_with_other_tags():
    for rng in seeded(300, "tags"):
        text = any_text(rng).replace("think>", rng.choice(["think>", "THINK]", "seed:think>"])).replace("<", rng.choice("<["))
        check(rng.choice(list(REASONING.values())), text, cuts(rng, text), rng.random() < 0.5)


@pytest.mark.parametrize("tags", dict.fromkeys(REASONING.values()), ids=lambda tags: tags.start)
def test_cutting_changes_nothing_with_any_tags(tags):
    scraps = [*SCRAPS, tags.start, tags.end, *tags.around, tags.label, tags.before, tags.start[:-1], tags.end[:-2]]
    for rng in seeded(100, tags.end):
        text = "".join(rng.choice(scraps) for _ in range(rng.randrange(12)))
        opened = rng.random() < 0.5
        parser, whole = ReasoningParser(tags, opened=opened), ReasoningParser(tags, opened=opened).parse(tags.start + text)
        deltas = [*map(parser.push, cuts(rng, tags.start + text)), parser.finish()]
        assert ReasoningDelta("".join(d.reasoning for d in deltas), "".join(d.content for d in deltas)) == whole, text


def test_tags_of_families_with_tags_of_their_own():
    """The tags around an answer are no part of it, and calls end what a model thinks, and are none of its thoughts."""
    hunyuan, kimi = tags_of(["<think></think> <answer></answer>"]), tags_of(["<|tool_calls_section_begin|> <think></think>"])
    apertus = tags_of(["<|inner_prefix|> <|inner_suffix|>"])
    assert (hunyuan, kimi, apertus) == tuple(REASONING[name] for name in ("hunyuan_a13b", "kimi_k2", "apertus"))
    assert ReasoningParser(hunyuan).parse("<think>\nHm.\n</think>\n<answer>\nYes.\n</answer>") == ReasoningDelta("Hm.", "Yes.")
    for tags, parser in ((kimi, KimiK2), (apertus, Apertus)):
        call = FORMS[parser][0].write([("f", "{}")])
        for text in (f"{tags.start}Hm.{tags.end}{call}", f"{tags.start}Hm.{call}"):
            answer = AnswerParser(ReasoningParser(tags), parser()).parse(text)
            assert (answer.reasoning, answer.content, [one.name for one in answer.calls]) == ("Hm.", "", ["f"]), text


def test_nothing_is_held_back_that_can_be_no_tag():
    parser = ReasoningParser(THINK, opened=True)
    assert [parser.push(piece).reasoning for piece in ("a", "b <", "i>", "c\n", "d", "</think")] == [
        "a",
        "b ",
        "<i>",
        "c",
        "\nd",
        "",
    ]
    assert parser.push("> e") == ReasoningDelta(content=" e")


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_answers_with_reasoning_and_calls(kind):
    """The two parsers behind one another: cutting changes nothing, and calls are found in content alone."""
    for rng in seeded(300, "answer"):
        text = rng.choice(["", "<think>\n"]) + any_text(rng) + rng.choice(["", "\n</think>\n\n"]) + any_text(rng)
        opened, parallel = rng.random() < 0.5, rng.random() < 0.5

        def make(opened=opened, parallel=parallel):
            tools = None if kind is None else kind(lambda: "id")
            return AnswerParser(ReasoningParser(THINK, opened=opened), tools, parallel=parallel)

        whole, parts, parser = make().parse(text), Answer(), make()
        for delta in [*map(parser.push, cuts(rng, text)), parser.push("", last=True)]:
            parts.reasoning += delta.reasoning
            parts.add(delta.content, delta.calls)
        assert whole == parts, text
        assert parallel or len(whole.calls) <= 1
        alone = ReasoningParser(THINK, opened=opened).parse(text)
        assert whole.reasoning == alone.reasoning
        if kind is None:
            assert whole.content == alone.content


def test_long_answers():
    text = (
        "<think>" + "Hm. " * 5000 + "</think>" + '<tool_call>{"name": "f", "arguments": {"a": "' + "x" * 8191 + '"}}</tool_call>'
    )
    for extra in ("", "y", "y" * 4096):
        answer = AnswerParser(ReasoningParser(THINK), Hermes()).parse(text + extra)
        assert (len(answer.reasoning), answer.content, len(answer.calls[0].arguments)) == (20000, extra, 8200)


def test_finish_reasons():
    call = '<tool_call>{"name": "f"}</tool_call>'
    for text, reason, expected in [
        (call, "stop", "tool_calls"),
        (call, "length", "length"),
        ("Hi", "stop", "stop"),
        (call, None, None),
    ]:
        parser = AnswerParser(None, Hermes())
        parser.parse(text)
        assert parser.finish_reason(reason) == expected
    plain = AnswerParser(None, None)
    assert plain.parse(call).content == call and plain.finish_reason("stop") == "stop"
    inside = AnswerParser(ReasoningParser(THINK), Mistral()).parse(
        "<think>I could [TOOL_CALLS]f[ARGS]{}</think>[TOOL_CALLS]g[ARGS]{}"
    )
    assert inside.reasoning == "I could [TOOL_CALLS]f[ARGS]{}" and [one.name for one in inside.calls] == ["g"]


def test_where_an_answer_begins():
    assert THINK.closed("<|im_start|>assistant\n<think>\n\n</think>\n\n") and not THINK.closed("user: </think>\nassistant:")
    assert THINK.closed("", "<think>Hm.</think> so") and not THINK.closed("</think>", "<think>So")
    assert THINK.opened("<|im_start|>assistant\n<think>\n") and not THINK.opened("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not THINK.opened("user: <think>\nassistant:")
    always = REASONING["deepseek_r1"]
    assert always.opened("<|Assistant|>") and not always.opened("<|Assistant|></think>")
    assert (
        THINK.opened("", "<think> so far")
        and not THINK.opened("<think>", "<think>Hm.</think> so")
        and not THINK.opened("<think>", "So")
    )


@pytest.mark.realdata
def test_real_templates(shared_data):
    """The tags are found in the template, and its prompt says whether the answer begins within them."""
    opened = {}
    for path in sorted((shared_data / "tokenizers" / "chat_templates").glob("*.jinja")):
        tags = tags_of([path.read_text()])
        if tags is None:
            continue
        opened[path.name] = tags.opened(
            chat_of(path.read_text())([{"role": "user", "content": "Hi"}], add_generation_prompt=True, tools=None)
        )
    assert len(opened) > 15
    assert opened["Qwen3.5-4B.jinja"] and opened["deepseek-ai-DeepSeek-R1-Distill-Llama-8B.jinja"]
    assert not opened["Qwen-Qwen3-0.6B.jinja"] and not opened["HuggingFaceTB-SmolLM3-3B.jinja"]
    seed = (shared_data / "tokenizers" / "chat_templates" / "ByteDance-Seed-OSS.jinja").read_text()
    assert tags_of([seed]) == Tags("<seed:think>", "</seed:think>") and tags_of(["plain"]) is None
    granite = (shared_data / "tokenizers" / "chat_templates" / "ibm-granite-granite-3.3-2B-Instruct.jinja").read_text()
    assert tags_of([granite]) is GRANITE


def test_phrases_of_granite():
    granite = tags_of(["Write your thoughts after 'Here is my thought process:' and your response after 'Here is my response:'"])
    text = "Here is my thought process:\n\nHm.\n\nHere is my response:\n\nYes."
    assert granite is REASONING["granite"] and ReasoningParser(granite).parse(text) == ReasoningDelta("Hm.", "Yes.")
    for rng in seeded(20, "granite"):
        check(granite, text, cuts(rng, text), False)


THOUGHT = "<think>\nHm. <response>\n</think>\n\n"


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("<response>\nYes.\n\n So.\n</response>\n", "Yes.\n\n So."),
        (" <response> Yes. </response>", " Yes. "),
        ("<response></response>", ""),
        ("<response>Yes. </response> No.</response>", "Yes. </response> No."),
        ("<response>Yes.\n\n</resp", "Yes.\n\n</resp"),
        ("<response>Yes.\n", "Yes.\n"),
        ("<respon", "<respon"),
        ("Yes. <response>No.</response>", "Yes. <response>No.</response>"),
        ("\n Yes.</response>", " Yes.</response>"),
        ("", ""),
    ],
)
def test_tags_around_the_answer_of_granite(text, content):
    """However they are cut; without reasoning before them they are text."""
    granite = tags_of(["Write your thoughts between <think></think> and your response between <response></response>"])
    expected = ReasoningDelta("Hm. <response>", content)
    for rng in seeded(30, text):
        parser, whole = ReasoningParser(granite), THOUGHT + text
        deltas = [*map(parser.push, rng.choice([cuts(rng, whole), list(whole), [whole]])), parser.finish()]
        assert ReasoningDelta("".join(d.reasoning for d in deltas), "".join(d.content for d in deltas)) == expected
    assert granite is not THINK and ReasoningParser(granite).parse(text) == ReasoningDelta("", text)
    assert tags_of(["<think></think> <tool_response></tool_response> <response>x</response>"]) is THINK


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([*SCRAPS, "<response>", "</response>", "</resp", "<respon"]), max_size=12))
def test_cutting_changes_nothing_around_the_answer(scraps):
    text = "<think>Hm.</think>" + "".join(scraps)
    for pieces in (["<think>Hm.</think>", *scraps], list(text)):
        parser = ReasoningParser(GRANITE)
        deltas = [*map(parser.push, pieces), parser.finish()]
        found = ReasoningDelta("".join(d.reasoning for d in deltas), "".join(d.content for d in deltas))
        assert found == ReasoningParser(GRANITE).parse(text), pieces
    bare = "".join(found.content.split())
    assert any(
        "".join("".join(scraps).split()) == first + bare + last for first in ("", "<response>") for last in ("", "</response>")
    )


@pytest.mark.realdata
def test_real_templates_without_reasoning(shared_data):
    """Most templates close the reasoning in the prompt where none is asked for; of none is it open and closed."""
    closed = {"asked": set(), "off": set()}
    for path in sorted((shared_data / "tokenizers" / "chat_templates").glob("*.jinja")):
        tags = tags_of([path.read_text()])
        if tags is None:
            continue
        templates = ChatTemplates({"default": path.read_text()}, {"bos_token": "<s>", "eos_token": "</s>"})
        for name, extra in (("asked", {}), ("off", {"enable_thinking": False, "thinking": False, "reasoning_effort": "none"})):
            hello = [{"role": "user", "content": "Hi </think>"}]
            options = {"add_generation_prompt": True, "continue_final_message": False, "tools": None, "documents": None}
            prompt = templates.render(hello, **options, extra=extra)
            assert not (tags.closed(prompt) and tags.opened(prompt))
            if tags.closed(prompt):
                closed[name].add(path.stem)
    some = {"Qwen-Qwen3-0.6B", "Qwen3.5-4B", "GLM-4.6", "GLM-4.7-Flash", "HuggingFaceTB-SmolLM3-3B"}
    assert some <= closed["off"] and not some & closed["asked"] and "deepseek-ai-DeepSeek-V3.1" in closed["asked"]
