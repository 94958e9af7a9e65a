"""Small tokenizers of the two great families, made on the spot, and a way to ask transformers about any tokenizer."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests import warm

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox does not.",
    "def main(argv):\n    return [int(x) for x in argv if x.isdigit()]\n",
    "Žluťoučký kůň úpěl ďábelské ódy. 今日は良い天気ですね。 Привет, мир! 😀 👩‍👩‍👧",
    "Hello world, hello there, hello again: one two three four five six seven eight nine ten.",
] * 4


@pytest.fixture(scope="session")
def byte_level_dir(tmp_path_factory) -> Path:
    """A byte-level BPE like GPT-2's, with chat tokens and a template in the configuration."""
    directory = tmp_path_factory.mktemp("byte_level")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<tool>", normalized=False)])  # an added token that is no special one
    backend.enable_truncation(16)
    backend.save(str(directory / "tokenizer.json"))
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "chat_template": template + "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return directory


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory) -> Path:
    """A BPE with ▁ for spaces and a token for every byte, like Llama 2's; its file says what LlamaTokenizer expects."""
    directory = tmp_path_factory.mktemp("llama")
    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    specials = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=specials, show_progress=False, limit_alphabet=60)
    words = [w for text in CORPUS for w in text.split()]
    backend.train_from_iterator(words, trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < 3]  # bytes are no special tokens
    (directory / "tokenizer.json").write_text(json.dumps(state))
    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return directory


@pytest.fixture(scope="session")
def ask(tmp_path_factory):
    """ask("tokenize" | "render", job) -> transformers' answer."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    script = str(Path(__file__).with_name("oracle.py"))

    def question(what, job):
        done = warm.run(script, input=json.dumps({"what": what, "job": job}), cwd=elsewhere)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return question
