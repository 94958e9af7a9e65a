"""What grammars are matched against: whatever a tokenizer does to a text, tokens are asked for that spell it exactly."""

import json
import random

import numpy as np
import pytest

from appliance.text.grammar import _Vocabulary, library, limits, vocabulary
from appliance.text.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "a longer name": {"enum": ["one thing", "another"]},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "a longer name", "n"],
    "additionalProperties": False,
}


@pytest.fixture(params=["byte_level", "llama", "tokenizers/llama2", "tokenizers/smollm2"])
def tokenizer(request, byte_level_dir, llama_dir):
    made = {"byte_level": byte_level_dir, "llama": llama_dir}
    return Tokenizer.load(made.get(request.param) or request.getfixturevalue("shared_data") / request.param)


def test_forced_texts_are_spelled_exactly(tokenizer):
    """Where all else is ruled out the library asks for the tokens of a text, and gives up on any others."""
    tokenizer.spell_specials()
    found = _Vocabulary(tokenizer, len(tokenizer), tokenizer.eos_token_id)
    for text in (
        '{"',
        "{",
        " {",
        "a",
        "  two",
        "\n",
        "\t}",
        "é",
        "今日",
        "😀",
        "\x00",
        "</s>",
        "",
        '{"a longer name": "one thing"}',
    ):
        ids = found(text)
        assert b"".join(found.tokens[token] for token in ids) == text.encode() and not {*ids} & tokenizer.special_ids, text


def test_every_choice_that_is_allowed_makes_an_answer(tokenizer):
    size, end, lib, rng = len(tokenizer), tokenizer.eos_token_id, library(), random.Random(0)
    words = vocabulary(tokenizer, size, (end,))
    grammar = lib.LLMatcher.grammar_from_json_schema(json.dumps(SCHEMA), overrides={"whitespace_flexible": False})
    bits = np.zeros(4 * -(-size // 32), np.uint8)
    for _ in range(5):
        matcher, text = lib.LLMatcher(words, grammar, log_level=0, limits=limits()), b""
        while not matcher.is_stopped():
            matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
            token = rng.choice(np.flatnonzero(np.unpackbits(bits, count=size, bitorder="little")).tolist())
            matcher.consume_tokens([token])
            assert not matcher.get_error()
            text += b"" if token == end else tokenizer.token_bytes(token)
        answer = json.loads(text)
        assert answer.keys() == set(SCHEMA["required"]) and answer["n"] <= 99 and len(answer["name"]) <= 6


def test_what_has_no_tokens_is_spelled_as_far_as_it_can_be(llama_dir):
    found = _Vocabulary(Tokenizer.load(llama_dir), 300, 2)
    found.tokens = [b"", b"", b"", b"a", b"ab", b"b", b"{"]
    assert found._greedy(b"aab{") == [3, 4, 6] and found._greedy(b"ba?b") == [5, 3] and found._greedy(b"?") == []
