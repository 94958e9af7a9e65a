"""Answers of gpt-oss that are held: what grammars let through, whatever a model would rather write."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from appliance.core.params import StructuredOutputsParams
from appliance.text.answer import AnswerParser
from appliance.text.grammar import compile_grammar, library, limits, vocabulary
from appliance.text.tokenizer import Tokenizer
from appliance.text.tools.choice import forced, tool_choice
from appliance.text.tools.forms import HARMONY as FORM
from appliance.text.tools.grammar import harmony
from appliance.text.tools.harmony import CALL, END, MARKERS, START, Harmony
from tests.text.harmony_texts import CALL_OF_F, CALLS, FINAL, NEXT, SAID, THOUGHT, TOOL, any_answer, tokens
from tests.text.test_strict_tools import SCHEMA, Model, choice
from tests.text.tool_texts import seeded
from tests.tiny_model import write_tokenizer


class Held(Model):
    def __init__(
        self, place: str = "header", *, mode: Any = None, formed: bool = False, free: bool = False, calls: bool = True
    ) -> None:
        self.specials = {marker: 256 + i for i, marker in enumerate(MARKERS)}
        tools = choice() if mode is None else tool_choice([TOOL], mode)
        some = forced(tools, FORM, parallel=False, strict=free) if calls else None
        grammar = harmony(some, place, formed=formed, free=free, specials=self.specials)
        if formed:
            grammar = compile_grammar(StructuredOutputsParams(json=SCHEMA), grammar)
        else:
            compile_grammar(StructuredOutputsParams(grammar=grammar), ours=True)
        self.follow(grammar)

    def writes(self, text: str) -> bool | None:
        """Whether it may end there; None where it cannot be written."""
        said, may_end = self.write(text)
        return may_end if said == text else None


def test_a_call_that_is_a_must() -> None:
    for mode in ("required", {"type": "function", "function": {"name": "f"}}):
        one = Held(mode=mode)
        for thoughts in ("", f"{THOUGHT}Hm.{NEXT}", f'{THOUGHT}{{"n"{NEXT}{THOUGHT}{NEXT}'):
            assert one.writes(thoughts) is False and one.writes(thoughts + CALL_OF_F) is False
            assert one.writes(f'{thoughts}{CALL_OF_F}{{"n": 5, "unit": "C"}}') is True
            for wrong in (
                FINAL,
                SAID,
                "Hello",
                START,
                f'{CALL_OF_F}{{"n": "',
                f'{CALL_OF_F}{{"m',
                CALLS[0] % "g",
                CALLS[4] % "f",
            ):
                assert one.writes(thoughts + wrong) is None, wrong
            assert one.writes(f'{thoughts}{CALL_OF_F}{{"n": 5}}{END}') is None
        assert one.writes(f"{THOUGHT}Hm.") is False


def test_the_final_message_has_a_form() -> None:
    for calls in (False, True):
        one = Held(formed=True, calls=calls)
        for thoughts in ("", f"{THOUGHT}Hm.{NEXT}"):
            assert one.writes(f'{thoughts}{FINAL}{{"n": 5}}') is True and one.writes(f"{thoughts}{FINAL}") is False
            assert one.writes(f"{thoughts}{FINAL}Hello") is None and one.writes(f"{thoughts}{SAID}") is None
            assert one.writes(f'{thoughts}{CALL_OF_F}{{"n": 5}}') is (True if calls else None)


def test_where_the_answer_begins() -> None:
    fine = f'{CALL_OF_F}{{"n": 5}}'
    for place, begin in (("between", f"{START}assistant"), ("content", NEXT), ("reasoning", f" so{NEXT}")):
        one = Held(place, mode="required")
        assert one.writes(begin + fine) is True and one.writes(f"{begin}{THOUGHT}Hm.{NEXT}{fine}") is True
        assert one.writes(fine) is None and one.writes(begin) is False
    for place in ("content", "reasoning"):
        one = Held(place, free=True)
        assert one.writes("") is True and one.writes(" so on") is True and one.writes(f" so on{NEXT}{fine}") is True
        assert one.writes(f'{NEXT}{CALL_OF_F}{{"n": "') is None
    one = Held("reasoning", formed=True)
    assert one.writes(f'Hm.{NEXT}{FINAL}{{"n": 5}}') is True and one.writes(f"Hm.{NEXT}{FINAL}5") is None


@pytest.fixture(scope="module")
def free() -> Iterator[Held]:
    yield Held(free=True)


def test_strict_tools_among_free_messages(free: Held) -> None:
    text = f"{THOUGHT}Hm <b>\n{NEXT}{SAID}Let me see.{NEXT}{FINAL}Hello, {{and}} so on"
    for n in range(len(tokens(text))):
        part = "".join(tokens(text)[:n])
        header = re.search(r"(^|<\|end\|>(<\|start\|>[a-z]*)?)(<\|channel\|>[a-z]*)?$", part)
        assert free.writes(part) is (header is None), part
    assert free.writes(f'{text}{NEXT}{CALLS[0] % "get_weather"}{{"any": ["thing"]}}') is True
    assert free.writes(f'{text}{NEXT}{CALL_OF_F}{{"n": 5}}') is True
    for wrong in (f'{CALL_OF_F}{{"n": "x"', f"{CALL_OF_F}[", CALLS[0] % "other", "Hello"):
        assert free.writes(f"{THOUGHT}Hm.{NEXT}{wrong}") is None


def test_whatever_a_model_would_rather_write(free: Held) -> None:
    """Every call whose text is complete has fitting arguments."""
    ended = called = 0
    for k, rng in enumerate(seeded(80, "rather")):
        wrong = rng.choice(['{"n": "x"}', '{"n": 1, "m": 2}', '{"n": 17}', "[]"])
        text = any_answer(rng) if k % 2 else f"{THOUGHT}Hm.{NEXT}{rng.choice(CALLS) % rng.choice(['f', 'get_weather'])}{wrong}"
        said, may_end = free.write(text, rng)
        if not may_end:
            continue
        ended += 1
        for one in AnswerParser(None, Harmony()).parse(said).calls:
            assert one.name in ("f", "get_weather"), said
            if one.name == "f":
                jsonschema.validate(json.loads(one.arguments), SCHEMA)
                called += 1
    assert ended > 30 and called > 5, (ended, called)


def test_the_models_own_tokens(tmp_path: Path) -> None:
    """Markers are allowed where they belong and there alone; any token that ends a text may end an answer that is complete."""
    write_tokenizer(tmp_path)
    backend = Tokenizer.load(tmp_path)._backend
    backend.add_special_tokens([*MARKERS])
    backend.save(str(tmp_path / "tokenizer.json"))
    reader, tokenizer = Tokenizer.load(tmp_path), Tokenizer.load(tmp_path)
    ids = {marker: i for marker in MARKERS for i in reader.special_among([marker])}
    ends, size = {ids["<|return|>"], ids[CALL], 2}, len(tokenizer)
    words = vocabulary(tokenizer, size, tuple(sorted(ends)))
    calls = forced(tool_choice([TOOL], "required"), FORM, parallel=False)
    must = compile_grammar(
        StructuredOutputsParams(grammar=harmony(calls, "header", formed=False, free=False, specials=ids)), ours=True
    )
    form = compile_grammar(StructuredOutputsParams(json=SCHEMA), harmony(None, "header", formed=True, free=False, specials=ids))
    thoughts = f"{THOUGHT}Hm.{NEXT}"
    for made, text in ((must, f'{thoughts}{CALL_OF_F}{{"n": 5}}'), (form, f'{thoughts}{FINAL}{{"n":5}}')):
        matcher = library().LLMatcher(words, made, limits=limits())
        written = [*reader.encode(text, add_special_tokens=False)]
        for k, token in enumerate([*written, None]):
            mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")[:size]
            allowed = {int(i) for i in np.flatnonzero(mask)}
            markers = allowed & {*ids.values()} - ends
            if token is None:
                assert allowed == ends, text
            else:
                assert token in allowed and not allowed & ends, reader.decode(written[: k + 1], skip_special_tokens=False)
                assert markers <= {token} or (
                    markers == {ids[END]} and k < len(reader.encode(thoughts, add_special_tokens=False))
                )
                assert matcher.try_consume_tokens([token]) == 1
