"""The demo model's tokenizer and chat template, and batches of conversations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from demo_model.questions import SYSTEMS, Conversations, Question, all_questions
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
PAD, BOS, END = 0, 1, 2
TEMPLATE = (
    "<|bos|>{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user and assistant, got ' + message['role']) }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] | trim }}"
    "{% if not (continue_final_message is defined and continue_final_message and loop.last) %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(vocab: int) -> Tokenizer:
    """Byte-level BPE over all questions and answers; digits and letters of a spelling stay single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = sorted({t for q in all_questions() for t in (q.text, q.answer)}) + SYSTEMS
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, max_len: int) -> None:
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[BOS],
        "eos_token": SPECIAL[END],
        "pad_token": SPECIAL[PAD],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_len,
        "chat_template": TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


class Batches:
    """Rows of whole conversations, one after another; marked are the answers and the token that ends each."""

    def __init__(self, tokenizer: Tokenizer, seed: int, rows: int, length: int) -> None:
        self.tokenizer, self.rows, self.length = tokenizer, rows, length
        self.source = Conversations(seed)
        self.cache: dict[str, list[int]] = {}
        self.roles = {role: SPECIAL.index(f"<|{role}|>") for role in ("system", "user", "assistant")}

    def next(self) -> tuple[Tensor, Tensor]:
        """(ids int64 [rows, length], wanted bool [rows, length])"""
        ids = torch.full((self.rows, self.length), PAD)
        wanted = torch.zeros((self.rows, self.length), dtype=torch.bool)
        for row in range(self.rows):
            at = 0
            while True:
                tokens, marks = self.conversation()
                if at + len(tokens) > self.length:
                    break
                ids[row, at : at + len(tokens)] = torch.tensor(tokens)
                wanted[row, at : at + len(tokens)] = torch.tensor(marks)
                at += len(tokens)
        return ids, wanted

    def conversation(self) -> tuple[list[int], list[bool]]:
        tokens, marks = [BOS], [False]
        for message in self.source.next():
            text = self.encode(message["content"])
            tokens += [self.roles[message["role"]], *text, END]
            marks += [False] + [message["role"] == "assistant"] * (len(text) + 1)
        return tokens, marks

    def encode(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self.cache[text]


def conversation_text(messages: Iterable[Mapping[str, str]]) -> str:
    """As the chat template has it: what a model that is served reads and writes."""
    return SPECIAL[BOS] + "".join(f"<|{one['role']}|>{one['content']}{SPECIAL[END]}" for one in messages)


def training_text(seed: int, number: int) -> str:
    """``number`` conversations like those that the model is trained on."""
    source = Conversations(seed)
    return "".join(conversation_text(source.next()) for _ in range(number))


def held_out_text(questions: Iterable[Question]) -> str:
    """Questions that were held out, each with its answer."""
    turns = ([{"role": "user", "content": q.text}, {"role": "assistant", "content": q.answer}] for q in questions)
    return "".join(map(conversation_text, turns))
