"""Tools whose arguments must fit, among text that is free: what a grammar lets through, whatever a model would rather write."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import pytest

from appliance.core.params import RequestError, StructuredOutputsParams
from appliance.text.answer import AnswerParser
from appliance.text.grammar import compile_grammar, library, limits
from appliance.text.reasoning import THINK, ReasoningParser
from appliance.text.tools.choice import ToolChoice, forced, tool_choice
from appliance.text.tools.formats import Granite, Hermes, Llama3Json
from appliance.text.tools.forms import FORMS, Form
from appliance.text.tools.grammar import lark
from appliance.text.tools.parser import ToolAnswer, ToolParser
from tests.text.tool_texts import GRAMMARS, any_text, cuts, seeded

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "unit": {"enum": ["C", "F"]}},
    "required": ["n"],
    "additionalProperties": False,
}
HANDY = frozenset(b' "{}:,0123456789nCFunit')


def choice(strict: bool = True) -> ToolChoice:
    f = {"name": "f", "parameters": SCHEMA, "strict": strict}
    return tool_choice(
        [{"type": "function", "function": one} for one in (f, {"name": "get_weather", "parameters": SCHEMA})], None
    )


class Model:
    """Writes what it would like to, byte by byte, as far as the grammar lets it."""

    def __init__(self, kind: type[ToolParser], form: Form, *, special: bool, opened: bool | None = None) -> None:
        """``opened`` None: it does not reason."""
        markers = (*kind.special, *(() if opened is None else THINK.special))
        self.specials = {marker: 256 + i for i, marker in enumerate(markers)} if special else {}
        tags = None if opened is None else THINK
        calls = forced(choice(), form, strict=True)
        self.follow(lark(calls, tags, opened=bool(opened), markers=kind.openers, specials=self.specials))

    def follow(self, grammar: str) -> None:
        self.grammar, lib = grammar, library()
        assert not lib.LLMatcher.validate_grammar(self.grammar, limits=limits())
        words = [bytes([i]) for i in range(256)] + [b"\xff" + marker.encode() for marker in self.specials] + [b"\xff<end>"]
        self.words = [*(bytes([i]) for i in range(256)), *(marker.encode() for marker in self.specials), b""]
        self.end = len(words) - 1
        vocabulary = Words(words, range(256, len(words)))
        self.matcher = lib.LLMatcher(
            lib.LLTokenizer(lib.TokenizerWrapper(vocabulary)), self.grammar, log_level=0, limits=limits()
        )

    def tokens(self, text: str) -> list[int]:
        parts = re.split(f"({'|'.join(map(re.escape, self.specials))})", text) if self.specials else [text]
        return [i for part in parts for i in ([self.specials[part]] if part in self.specials else part.encode())]

    def write(self, text: str, rng: random.Random | None = None, most: int = 60) -> tuple[str, bool]:
        """(what comes of it, whether that may be all). Where the grammar does not let it go on: the end, or ``rng``'s choices."""
        self.matcher.reset()
        said: list[int] = []
        for token in self.tokens(text):
            for _ in range(most):
                if self.matcher.try_consume_tokens([token]):
                    said.append(token)
                    break
                allowed = [i for i, bias in enumerate(self.matcher.compute_logit_bias()) if bias and i != self.end]
                if rng is None or not allowed:
                    break
                said.append(rng.choice([i for i in allowed if i in HANDY] or allowed))
                assert self.matcher.consume_token(said[-1])
            else:
                break
            if said[-1:] != [token]:
                break
        return b"".join(self.words[i] for i in said).decode(errors="replace"), self.matcher.is_accepting()


class Words:
    """As llguidance asks of a tokenizer."""

    def __init__(self, words: list[bytes], special: range) -> None:
        self.tokens, self.special_token_ids = words, list(special)
        self.bos_token_id, self.eos_token_id = None, len(words) - 1

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


@pytest.fixture(scope="module", params=[(*one, special) for one in GRAMMARS for special in (False, True)], ids=str)
def model(request: pytest.FixtureRequest) -> tuple[type[ToolParser], Form, Model]:
    kind, form, special = request.param
    return kind, form, Model(kind, form, special=special)


KNOWN = ("f", "get_weather")
LLAMA = FORMS[Llama3Json][0]


def reader(kind: type[ToolParser]) -> ToolParser:
    return kind(known=KNOWN, functions=choice().functions, held=choice().held)


def check(kind: type[ToolParser], text: str) -> int:
    """Every call that the parser finds has fitting arguments; how many there are of the strict function."""
    found = reader(kind).parse(text).calls
    for call in found:
        arguments = json.loads(call.arguments)
        assert isinstance(arguments, dict) and call.name in ("f", "get_weather"), text
        if call.name == "f":
            jsonschema.validate(arguments, SCHEMA)
    return sum(call.name == "f" for call in found)


def test_whatever_a_model_would_rather_write(model: tuple[type[ToolParser], Form, Model]) -> None:
    kind, form, one = model
    ended = calls = 0
    for k, rng in enumerate(seeded(120, form.opening)):
        wrong = [("f", '{"n": "x"}'), ("f", '{"n": 1, "m": 2}'), ("f", '{"n": 17}'), ("get_weather", '{"any": ["thing"]}')]
        text = any_text(rng) if k % 2 else rng.choice(["", "So.\n", "Hm "]) + form.write(rng.choices(wrong, k=rng.randint(1, 3)))
        said, may_end = one.write(text, rng)
        if may_end:
            ended += 1
            calls += check(kind, said)
    assert ended > 40 and calls > 10, (ended, calls)


def test_what_is_free_stays_free(model: tuple[type[ToolParser], Form, Model]) -> None:
    kind, form, one = model
    fine = form.write([("get_weather", '{"any": [{"thing": "}"}]}'), ("f", '{"n": 5, "unit": "C"}')])
    for text in ("", "Hello,\n\nwhat a day: 3 < 4 {and} [so] on; <tool", '"name" is a word', '```json\n{\n "a": 1}\n```\n', fine):
        assert one.write(text) == (text, True)
    between = "\n" if kind is Llama3Json else " and "
    for text in (f"Let me see.\n{fine}", f"{fine}{between}then\n{fine}\nDone."):
        assert one.write(text) == (text, True) and len(reader(kind).parse(text).calls) == 2 * text.count('"thing"')


@pytest.mark.parametrize("bad", ['{"n": "x"}', '{"n": 1, "m": 1}', '{"unit": "C"}', "[]", "null"])
def test_what_does_not_fit_cannot_be_written(model: tuple[type[ToolParser], Form, Model], bad: str) -> None:
    _, form, one = model
    text = form.write([("f", bad if bad.startswith("{") or not form.tagged else '{"n": null}')])
    said, may_end = one.write(f"So:\n{text}")
    assert len(said) < len(f"So:\n{text}") and not may_end


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize(("kind", "form"), GRAMMARS, ids=str)
def test_reasoning_is_free(kind: type[ToolParser], form: Form, special: bool, opened: bool) -> None:
    one, begin = Model(kind, form, special=special, opened=opened), "" if opened else "<think>"
    fine, bad = form.write([("f", '{"n": 5}')]), form.write([("f", '{"n": "x"}')])
    thought = 'Like {"n": "x"}?\n{"n": "x"}' if special and kind is not Llama3Json else f"Like\n{bad}?"
    text = f"{begin}{thought}</think>\n\n{fine}"
    assert one.write(text) == (text, True)
    answer = AnswerParser(ReasoningParser(THINK, opened=opened), reader(kind)).parse(text)
    assert answer.reasoning == thought and answer.content == "" and answer.calls[0].arguments == '{"n": 5}'
    said, may_end = one.write(f"{begin}Hm.</think>{bad}")
    assert said.endswith(form.tagged.begin("n") if form.tagged else '{"n": ') and not may_end
    if not opened:
        assert one.write(f"No thoughts.\n{fine}") == (f"No thoughts.\n{fine}", True)
        assert not one.write(f"No thoughts.\n{bad}")[1] and not one.write(bad)[1]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize(("kind", "form"), GRAMMARS, ids=str)
def test_an_answer_may_end_within_reasoning(kind: type[ToolParser], form: Form, special: bool, opened: bool) -> None:
    one = Model(kind, form, special=special, opened=opened)
    for thought in ("", "Hm", "Hm.\n", 'Like {"name": "f", "arg', "Is </thin", "One.\n\nTwo; {"):
        text = ("" if opened else "<think>") + thought
        assert one.write(text) == (text, True)
        answer = AnswerParser(ReasoningParser(THINK, opened=opened), reader(kind)).parse(text)
        assert answer.reasoning == thought and not answer.content and not answer.calls
        text += "</think>Yes."
        assert one.write(text) == (text, True)
        text += "\n" + form.write([("f", '{"n": "x"}')])
        assert not one.write(text)[1], "behind reasoning, calls are held"


@pytest.mark.parametrize("special", [False, True])
def test_another_spelling_of_the_marker_is_held_alike(special: bool) -> None:
    """Granite 3.1's, which is no token where the other is one."""
    form, fine = FORMS[Granite][0], '<tool_call>[{"name": "f", "arguments": {"n": 5}}]'
    one = Model(Granite, form, special=special)
    one.specials.pop("<tool_call>", None)
    calls = forced(choice(), form, strict=True)
    one.follow(lark(calls, markers=Granite.openers, specials=one.specials))
    for text in (
        fine,
        f"So:\n{fine} and <tool_ {form.write([('f', '{}')])[:13]}",
        f"{fine}\n{form.write([('f', json.dumps({'n': 1}))])}",
    ):
        said, may_end = one.write(text)
        assert said == text and may_end == (not text.endswith("<|tool_call|>"))
    for text in (fine.replace("5", '"x"'), f"{fine} {fine.replace('5', 'null')}", f"<|tool_call|>{fine[11:].replace('5', '[]')}"):
        assert not one.write(text)[1]
    found = 0
    for rng in seeded(60, "spelling"):
        some = form.write([("f", rng.choice(['{"n": "x"}', '{"n": 7}', '{"n": 7, "m": 8}']))])
        spelled = some.replace("<|tool_call|>", rng.choice(["<|tool_call|>", "<tool_call>"]))
        said, may_end = one.write(rng.choice(["", "So. ", any_text(rng)]) + spelled, rng)
        found += check(Granite, said) if may_end else 0
    assert found > 10


JSONS = [
    *('{"id": 1, "x": 2}', '{"name": "Ann", "age": 5}', '{"type": "object", "properties": {}}', '{"parameters": {}, "name": 1}'),
    *(
        '{"arguments": [1]}',
        '```json\n{\n  "id": 7,\n  "name": "f2"\n}\n```',
        '[\n{"id": 1},\n{"name": "Bo", "parameters": {}}\n]',
    ),
    *('{"name": "Ann"}\n{"name": "Bo", "parameters": {"n": "x"}}', '{"name": "fu", "parameters": {}}', '{"name": 5}', '{"name":'),
    *(
        '{"type": "function", "id": 1}',
        '{"type": "function", "name": "other", "parameters": {}}',
        '{"name\\u0065": "f"}',
        '{"name": "f',
    ),
    *('{ "na\nme" }', 'So; {"name": "f", "age": 5}', "{\n;{", '{"id": 1, "name": "f", "parameters": {"n": "x"}}'),
]


@pytest.mark.parametrize("special", [False, True])
def test_json_that_is_no_call_of_a_known_tool_is_free(special: bool) -> None:
    """Of a format in which a call may begin without a marker."""
    one, fine = Model(Llama3Json, LLAMA, special=special), LLAMA.write([("f", '{"n": 5}')])
    for text in JSONS:
        for before in ("", "Here:\n", "\n", '{"name": "Ann"}\n'):
            assert one.write(before + text) == (before + text, True)
            answer = reader(Llama3Json).parse(before + text)
            assert answer.content == before + text and not answer.calls
        both = f"{text}\n{fine}; {fine}\n{text}\n"
        assert one.write(both) == (both, True) and len(reader(Llama3Json).parse(both).calls) == 2
    for head in (
        '{"name": "f"',
        '{ "name"\n:"f"',
        '{"type": "function", "name": "f"',
        '\n \x1c{"name": "f"',
        f'{fine};{{"name": "f"',
    ):
        for before in ("", "Yes:\n", '{"name": "Ann"}\n {"id": 1}\n'):
            said, may_end = one.write(f'{before}{head}, "parameters": {{"n": 1}}}}')
            assert may_end and len(reader(Llama3Json).parse(said).calls) == 1 + (fine in head)
            for bad in (', "parameters": {"n": "x"}}', ', "age": 5}', "}"):
                assert not one.write(before + head + bad)[1]


def test_parser_and_grammar_agree_about_what_is_a_call() -> None:
    """Of scraps: calls in what the grammar lets through fit, and it lets all texts through in which no call may begin."""
    scraps = [
        '{"name": "f"',
        '{"name": "g"',
        '{"type": "function", "name": "f"',
        '"id": 1',
        '"parameters": ',
        '{"n": 1}',
        '{"n": "x"}',
    ]
    scraps += [
        "{",
        "}",
        ";",
        "\n",
        " ",
        ", ",
        "Hi",
        "\x1c",
        "\u2028",
        Llama3Json.TAG,
        '{"name": "Ann"}',
        LLAMA.write([("f", '{"n": 5}')]),
    ]
    models = [Model(Llama3Json, LLAMA, special=special) for special in (False, True)]
    calls = free = 0
    for rng in seeded(2500, "scraps"):
        text = "".join(rng.choices(scraps, k=rng.randint(1, 9)))
        said, may_end = models[rng.randrange(2)].write(text)
        if may_end:
            calls += check(Llama3Json, said)
        may_be = re.search(r'<\|python_tag|(\A|[\n}])[\s;]*\{("type": "function", )?"name": "f"', text)
        if not may_be:
            assert not reader(Llama3Json).parse(text).calls
            free += "{" in text
            assert (said, may_end) == (text, True), text
        pieces = cuts(rng, text)
        parser, answer = Llama3Json(lambda: "id", KNOWN), ToolAnswer()
        for delta in (*map(parser.push, pieces), parser.finish()):
            answer.add(delta.content, delta.calls)
        assert answer == Llama3Json(lambda: "id", KNOWN).parse(text), "streamed = whole"
    assert calls > 100 and free > 100, (calls, free)


def test_many_described_tools() -> None:
    """What a schema says beside constraints takes no room in the grammar; what is called like that stays."""
    said = {"description": "what it is about " * 9, "title": "A title", "examples": ["one"], "default": None, "$comment": "x"}
    properties: dict[str, Any] = {f"title_{i}": {"type": "string", "enum": ["description"], **said} for i in range(5)}
    properties["description"] = {"anyOf": [{"type": "integer", **said}, {"type": "array", "items": {"type": "null", **said}}]}
    schema = {"type": "object", "properties": properties, "required": ["description"], "additionalProperties": False, **said}

    def made(count: int) -> str:
        some = [{"name": f"f{i}", "strict": True, "parameters": schema} for i in range(count)]
        tools = tool_choice([{"type": "function", "function": one} for one in some], None)
        calls = forced(tools, FORMS[Hermes][0], strict=True)
        parts = {f["name"]: json.dumps(one.schema) for f, one in zip(tools.functions, calls.alternatives, strict=True)}
        grammar = StructuredOutputsParams(grammar=lark(calls, markers=["<tool_call>"]))
        return compile_grammar(grammar, ours=True, parts=parts)

    assert len(made(60)) < 65536 < len(grammar := made(180))
    assert "what it is" not in grammar and "A title" not in grammar and "$comment" not in grammar and "examples" not in grammar
    assert grammar.count('"title_4": {"type": "string", "enum": ["description"]}') == 180
    assert grammar.count('"description": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "null"}}]}') == 180
    with pytest.raises(RequestError, match=r"the grammar of their calls has [0-9]+ characters: at most 196608") as error:
        made(900)
    assert error.value.param == "tools"
