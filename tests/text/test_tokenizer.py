"""Encoding and decoding against transformers' AutoTokenizer, and what a damaged or missing tokenizer is answered with."""

import json
import random
import shutil

import pytest

from appliance.core.params import RequestError, SamplingParams
from appliance.text.prepare import prepare
from appliance.text.tokenizer import Tokenizer
from quant.errors import CheckpointError, InputError

WORDS = """
Hello world the The is n't 's don't . , ! ? ... 123 4567 3.14 0x1F naïve Žluťoučký e\u0301 ﬁ Å 今日は 你好 안녕 สวัสดี مرحبا שלום
Привет नमस्ते 😀 👩‍👩‍👧 🏳️‍🌈 𝒳 def f(x): return {} [] (); => <div> https://example.com/a?b=c ▁ ▁the Ġ [INST] [/INST] aaaa
<s> </s> <unk> <|im_start|> <|im_end|> <|endoftext|> <|start_story|> <|end_story|> <|end|> <tool> <0x0A> <extra> <pad> <c>
"""
FRAGMENTS = WORDS.split()
FRAGMENTS += [" the", " ,", " .", "  ", " ", "\n", "\n\n", "\t", "\r\n", "   \n  ", "    x", "A" * 40, "<a b>"]
FRAGMENTS += ["\u200b", "\ufeff", "\u00a0", "\u2028", "\x00", "\x7f", "\ufffd"]


def some_texts(number, seed):
    rng = random.Random(seed)
    texts = ["", " ", "  ", "\n", " Hello", "Hello ", *FRAGMENTS]
    while len(texts) < number:
        glue = rng.choice(["", " ", ""])
        texts.append(glue.join(rng.choices(FRAGMENTS, k=rng.randint(1, 12))))
    return texts[:number]


def compare(directories, ask, number=300):
    """Every directory's tokenizer says what transformers says."""
    texts, rng = some_texts(number, 1), random.Random(2)
    ours = [Tokenizer.load(d) for d in directories]
    ids = []
    for tokenizer in ours:
        some = [tokenizer.encode(t) for t in texts]
        ids.append(some + [rng.choices(range(len(tokenizer)), k=rng.randint(1, 20)) for _ in range(100)])
    job = [{"directory": str(d), "texts": texts, "ids": i} for d, i in zip(directories, ids, strict=True)]
    for directory, tokenizer, own, want in zip(directories, ours, ids, ask("tokenize", job), strict=True):
        for text, encoded, bare in zip(texts, want["encoded"], want["bare"], strict=True):
            assert tokenizer.encode(text) == encoded, (directory, text)
            assert tokenizer.encode(text, add_special_tokens=False) == bare, (directory, text)
        for some, decoded, visible in zip(own, want["decoded"], want["visible"], strict=True):
            same_text(tokenizer, tokenizer.decode(some, skip_special_tokens=False), decoded)
            same_text(tokenizer, tokenizer.decode(some), visible)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (want["bos"], want["eos"]), directory
        assert len(tokenizer) == want["size"] and sorted(tokenizer.special_ids) == want["specials"], directory
        assert tokenizer.named_tokens == want["named"], directory


def same_text(tokenizer, ours, theirs):
    """Equal; but of a run of <0x..> tokens with one stray byte the library keeps nothing, and we keep its good characters."""
    if "\ufffd" in theirs and tokenizer.spelling.byte_tokens:
        assert ours.count("\ufffd") <= theirs.count("\ufffd")
        kept = iter(ours)
        assert all(c in kept for c in theirs.replace("\ufffd", ""))
    else:
        assert ours == theirs


def test_small_tokenizers_as_transformers(byte_level_dir, llama_dir, ask):
    compare([byte_level_dir, llama_dir], ask)


@pytest.mark.realdata
def test_real_tokenizers_as_transformers(shared_data, ask):
    quantized = sorted(p for p in (shared_data / "quantized").iterdir() if p.is_dir())
    names = ["tokenizers/llama2", "tokenizers/qwen2-instruct", "tokenizers/smollm2", "models/TinyStories-656K"]
    compare([*(shared_data / name for name in names), *quantized], ask)


def test_the_llama_rules_as_transformers(llama_dir, tmp_path, ask):
    """legacy, add_prefix_space, an old file with a prepending normalizer, a class that the model's type overrules, ..."""
    prepend = {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}],
    }
    added = {"420": {"content": "<a b>", "special": False}, "421": {"content": "<c>", "special": True}}
    variants = {
        "legacy": ({"legacy": True}, {}, {}),
        "no_space": ({"add_prefix_space": False}, {}, {}),
        "old": ({}, {"normalizer": prepend, "pre_tokenizer": None}, {}),
        "mistral": ({}, {"normalizer": prepend, "pre_tokenizer": None}, {"model_type": "mistral"}),
        "bos": ({"add_bos_token": False, "add_eos_token": True}, {}, {}),  # the file's post-processor decides
        "more": ({"additional_special_tokens": ["<extra>"], "pad_token": "<pad>"}, {}, {}),
        "declared": ({"added_tokens_decoder": added}, {}, {}),
    }
    for name, (config, state, model) in variants.items():
        shutil.copytree(llama_dir, tmp_path / name)
        patch(tmp_path / name / "tokenizer_config.json", config)
        patch(tmp_path / name / "tokenizer.json", state)
        patch(tmp_path / name / "config.json", model)
    compare([tmp_path / name for name in variants], ask, number=150)


def patch(path, changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_vocabulary_and_merges_without_tokenizer_json_as_transformers(byte_level_dir, tmp_path, ask):
    model = json.loads((byte_level_dir / "tokenizer.json").read_text())["model"]
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])])
    variants = {
        "gpt2": {
            "tokenizer_class": "GPT2Tokenizer",
            "bos_token": "<|user|>",
            "eos_token": "<|end|>",
            "unk_token": "<|end|>",
            "add_bos_token": True,
        },
        "gpt2_space": {
            "tokenizer_class": "GPT2TokenizerFast",
            "add_prefix_space": True,
            "eos_token": "<|end|>",
            "bos_token": None,
            "unk_token": None,
        },
        "qwen2": {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|end|>",
            "pad_token": "<|end|>",
            "unk_token": None,
            "additional_special_tokens": ["<|user|>"],
        },
    }
    for name, config in variants.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.json").write_text(json.dumps(model["vocab"]))
        (tmp_path / name / "merges.txt").write_text(merges)
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "qwen2" if name == "qwen2" else "gpt2"}))
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config))
    compare([tmp_path / name for name in variants], ask, number=150)


@pytest.mark.realdata
def test_a_sentencepiece_model_is_read_through_transformers(shared_data, tmp_path, ask):
    source = shared_data / "tokenizers" / "llama2"
    for name in ("tokenizer.model", "tokenizer_config.json", "config.json"):
        shutil.copy(source / name, tmp_path / name)
    compare([tmp_path], ask, number=100)


@pytest.mark.realdata
def test_prompts_of_the_quantized_models(shared_data):
    paths = sorted((shared_data / "quantized").glob("*/expected.json"))
    assert paths
    for path in paths:
        tokenizer = Tokenizer.load(path.parent)
        for prompt in json.loads(path.read_text()):
            assert tokenizer.encode(prompt["prompt"]) == prompt["prompt_token_ids"], path
            assert tokenizer.decode(prompt["greedy_token_ids"]) == prompt["greedy_text"], path


def test_nothing_is_cut_or_padded(byte_level_dir):
    tokenizer = Tokenizer.load(byte_level_dir)  # whose file says 16 tokens at most
    text = "The quick brown fox jumps over the lazy dog. " * 50
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("a")) == 1


def test_token_bytes_spell_the_text(byte_level_dir, llama_dir):
    text = " Hello  wörld 😀 今日は"
    for directory, begin in ((byte_level_dir, ""), (llama_dir, "")):
        tokenizer = Tokenizer.load(directory)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(tokenizer.token_bytes(i) or b"" for i in ids).decode() == begin + text
        assert tokenizer.token_bytes(99_999) is None and tokenizer.token_str(99_999) == "" and tokenizer.token_bytes(-1) is None
    llama = Tokenizer.load(llama_dir)
    assert llama.token_bytes(3 + 0xE4) == b"\xe4" and llama.token_str(3 + 0xE4) == "\ufffd"
    assert llama.token_bytes(1) == b"<s>"
    level = Tokenizer.load(byte_level_dir)
    assert level.token_str(level.encode("<tool>")[0]) == "<tool>"


def test_ids_without_a_token_decode_to_nothing(byte_level_dir):
    tokenizer = Tokenizer.load(byte_level_dir)
    ids = tokenizer.encode("Hello")
    assert tokenizer.decode([10**6, *ids, -5]) == "Hello"


def test_half_a_surrogate_pair_is_refused(byte_level_dir):
    with pytest.raises(RequestError, match="unpaired surrogate"):
        Tokenizer.load(byte_level_dir).encode("a\ud83d")


def test_missing_and_damaged_files_are_named(byte_level_dir, llama_dir, tmp_path):
    with pytest.raises(InputError, match="nowhere: there is no such directory"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"none of tokenizer.json, vocab.json .*--tokenizer.*--skip-tokenizer-init"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(InputError, match=r"tekken.json, which Mistral's own tools read, is none of these. Name a directory"):
        Tokenizer.load(tmp_path)
    broken = {
        "tokenizer.json": ("{", "tokenizer.json: not a readable tokenizer"),
        "tokenizer_config.json": ("[1", "tokenizer_config.json: not valid JSON"),
        "config.json": ("nonsense", "config.json: not valid JSON"),
    }
    for name, (content, message) in broken.items():
        directory = tmp_path / name.replace(".", "_")
        shutil.copytree(byte_level_dir, directory)
        (directory / name).write_text(content)
        with pytest.raises(CheckpointError, match=message):
            Tokenizer.load(directory)
    shutil.copytree(llama_dir, tmp_path / "odd")
    patch(tmp_path / "odd" / "tokenizer_config.json", {"added_tokens_decoder": {"3": {"contents": "<x>"}}})
    with pytest.raises(CheckpointError, match="cannot understand its special tokens"):
        Tokenizer.load(tmp_path / "odd")
    (tmp_path / "pieces").mkdir()
    (tmp_path / "pieces" / "tokenizer.model").write_bytes(b"not a model")
    (tmp_path / "pieces" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="transformers cannot read this tokenizer"):
        Tokenizer.load(tmp_path / "pieces")


def test_bad_words_become_token_ids(byte_level_dir):
    tokenizer = Tokenizer.load(byte_level_dir)
    params = prepare(SamplingParams(bad_words=["fox", " dog "]), tokenizer)
    ways = {tokenizer.decode(way) for way in params.bad_words_token_ids}
    assert ways == {"fox", " fox", "dog", " dog"}
    assert prepare(params, tokenizer).bad_words_token_ids == params.bad_words_token_ids
    with pytest.raises(RequestError, match="at least one visible character"):
        prepare(SamplingParams(bad_words=["  "]), tokenizer)
    with pytest.raises(RequestError, match="bad_words need a tokenizer"):
        prepare(SamplingParams(bad_words=["a"]), None)
    with pytest.raises(RequestError, match="stop strings need a tokenizer"):
        prepare(SamplingParams(stop=["a"]), None)
