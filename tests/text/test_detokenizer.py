"""Streaming text: the pieces make the whole, never end within a character, and never change."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from appliance.core.messages import Event
from appliance.core.params import SamplingParams
from appliance.text.detokenizer import MARK, Detokenizer, Spelling
from appliance.text.output import OutputStream
from appliance.text.tokenizer import Tokenizer
from tests.tiny_model import write_tokenizer

NAMES = ["byte_level", "llama", "tokenizers/llama2", "tokenizers/qwen2-instruct", "tokenizers/smollm2", "models/TinyStories-656K"]


@pytest.fixture(scope="module")
def load(byte_level_dir, llama_dir):
    return lambda name: Tokenizer.load({"byte_level": byte_level_dir, "llama": llama_dir}[name])


@pytest.fixture(scope="module", params=NAMES)
def tokenizer(request, load):
    if "/" not in request.param:
        return load(request.param)
    return Tokenizer.load(request.getfixturevalue("shared_data") / request.param)


def pieces(tokenizer, ids, **options):
    stream = Detokenizer(tokenizer, **options)
    return [*(stream.push(i) for i in ids), stream.finish()]


def test_pieces_of_random_ids_make_the_whole(tokenizer):
    """For byte-level vocabularies the whole is the library's own, for the others where it loses nothing."""
    size = len(tokenizer)
    near = st.integers(0, min(size, 300) - 1)  # special tokens and single bytes

    @settings(max_examples=150, deadline=None)
    @given(st.lists(near | st.integers(0, size + 3), max_size=40), st.booleans())
    def check(ids, skip):
        parts = pieces(tokenizer, ids, skip_special_tokens=skip)
        whole = tokenizer.decode(ids, skip_special_tokens=skip)
        assert "".join(parts) == whole
        reference = tokenizer.decode_whole(ids, skip)
        if tokenizer.spelling.byte_level or "\ufffd" not in reference:
            assert whole == reference

    check()


def test_pieces_of_text_never_end_within_a_character(tokenizer):
    @settings(max_examples=100, deadline=None)
    @given(st.text(max_size=30) | st.text("aé今😀👩‍ \n", max_size=30))
    def check(text):
        ids = tokenizer.encode(text, add_special_tokens=False)
        whole = tokenizer.decode_whole(ids, True)
        parts = pieces(tokenizer, ids)
        assert "".join(parts) == whole
        if "\ufffd" not in whole:
            assert not any("\ufffd" in part for part in parts) and parts[-1] == ""

    check()


def test_bytes_become_characters_as_soon_as_they_are_whole(load):
    llama = load("llama")
    smile, hello = [3 + b for b in "😀".encode()], llama.encode("hello", add_special_tokens=False)
    assert pieces(llama, [*smile, *smile])[:8] == ["", "", "", "😀", "", "", "", "😀"]
    assert "".join(pieces(llama, [*smile[:3], *hello])) == "\ufffd" * 3 + " hello"  # one mark for each stray byte, as the library
    assert "".join(pieces(llama, smile[:2])) == "\ufffd" * 2
    assert "".join(pieces(llama, [*smile, smile[0]])) == "😀\ufffd"  # the library would lose the good character too


def test_the_first_space_is_the_tokenizers_own_unless_text_comes_before(load):
    llama = load("llama")
    ids = llama.encode("hello world", add_special_tokens=False)
    assert "".join(pieces(llama, ids)) == "hello world"
    assert "".join(pieces(llama, ids, follows_text=True)) == " hello world"
    assert "".join(pieces(llama, [1, *ids])) == "hello world"
    assert "".join(pieces(llama, [1, *ids], skip_special_tokens=False)) == "<s> hello world"


def test_spellings():
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    steps = [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    assert Spelling.of({"type": "ByteLevel"}) == Spelling(byte_level=True)
    assert Spelling.of({"type": "Sequence", "decoders": steps}) == Spelling(byte_tokens=True)
    assert Spelling.of({"type": "Sequence", "decoders": [*steps, strip]}) == Spelling(byte_tokens=True, strip=True)
    assert Spelling.of({"type": "Metaspace", "replacement": "_", "prepend_scheme": "never"}) == Spelling(space="_")
    for unknown in ({"type": "WordPiece"}, None, {"type": "Sequence", "decoders": [*steps, {**strip, "start": 2}]}):
        assert Spelling.of(unknown) is None


def test_a_kind_without_spelling_is_decoded_whole():
    backend = Backend(models.WordLevel({"hel": 0, "##lo": 1, "world": 2, ".": 3}, unk_token="."))
    backend.decoder = decoders.WordPiece()
    tokenizer = Tokenizer(backend, {}, {})
    assert json.loads(backend.to_str())["decoder"]["type"] == "WordPiece"
    assert pieces(tokenizer, [0, 1, 2]) == ["hel", "lo", " world", ""]
    assert tokenizer.decode([0, 1, 2]) == "hello world" and tokenizer.token_str(2) == "world"


def test_special_tokens_that_are_text(tokenizer):
    """What is written for them stands where they do, also behind half a character; the sum of all text has no marks."""
    special = min(tokenizer.special_ids)
    name, text = tokenizer.token(special), tokenizer.encode(" Hi there", add_special_tokens=False)
    byte = next((i for i in range(min(len(tokenizer), 400)) if tokenizer.token_bytes(i) == b"\xc3"), None)
    for shown, skip in ((MARK + name, True), (MARK + name, False), (name, True)):
        ids = [*text, *([byte] if byte else []), special, *text]
        found = pieces(tokenizer, ids, shown={special: shown}, skip_special_tokens=skip, follows_text=True)
        assert "".join(found) == f" Hi there{'�' if byte else ''}{shown} Hi there"
        stream = OutputStream(tokenizer, SamplingParams(skip_special_tokens=skip), [5000], shown={special: shown})
        told = stream.push(Event("r", 0, tuple(ids), finish_reason="length")).text
        assert told == "".join(found) and stream.text == told.replace(MARK, "")
    assert "".join(pieces(tokenizer, [special, *text], follows_text=True)) == " Hi there"


def test_special_tokens_that_are_text_where_tokens_have_no_spelling(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.spelling is None
    ids = [*tokenizer.encode("Hi", add_special_tokens=False), 2, *tokenizer.encode("you", add_special_tokens=False)]
    assert pieces(tokenizer, ids, shown={2: f"{MARK}</s>"}) == ["H", "i", f"{MARK}</s>", "y", "o", "u", ""]
    assert "".join(pieces(tokenizer, ids)) == "Hiyou"
