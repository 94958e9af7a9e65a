"""The text that a model is shown while it is quantized, as token ids."""

from __future__ import annotations

import inspect
import json
import random
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from appliance.text.tokenizer import Tokenizer
from quant.errors import InputError

CHUNK = 1 << 20  # characters that are tokenized at a time


def calibration_ids(
    file: str | None,
    tokenizer: Tokenizer,
    *,
    samples: int,
    length: int,
    vocab: int,
    seed: int,
    text: str | None = None,
) -> Tensor:
    """Token ids int64 [samples, length]: pieces of the text, each beginning somewhere at random.

    ``file`` and ``text`` as for ``text_ids``. Raises InputError where it is too short.
    """
    ids = text_ids(file, tokenizer, text)
    if len(ids) < length + samples:
        raise InputError(
            f"--calibration {file or 'by default'} has {len(ids)} tokens: {samples} samples of {length} need at least "
            f"{length + samples} (better {samples * length}); give more text, fewer --calibration-samples or a smaller "
            "--calibration-length"
        )
    strange = max(ids)
    if strange >= vocab:
        raise InputError(
            f"the tokenizer makes token {strange} of {file}, but the model has {vocab} tokens: give its own tokenizer"
        )
    starts = random.Random(seed).sample(range(len(ids) - length + 1), samples)
    return torch.tensor([ids[start : start + length] for start in starts])


def default_text() -> str:
    """English prose and code that every Python has: its language reference and some of its library.

    A stand-in: text like that for which the model will be used is better.
    """
    from pydoc_data.topics import topics

    modules = ("argparse", "calendar", "csv", "difflib", "fractions", "json.decoder", "mailbox", "statistics", "textwrap")
    sources = [inspect.getsource(import_module(name)) for name in modules]
    return "\n\n".join([*(topics[key] for key in sorted(topics)), *sources])


def text_ids(file: str | None, tokenizer: Tokenizer, text: str | None = None) -> list[int]:
    """All of a file's text, without special tokens; None: ``default_text``. Raises InputError.

    ``file``: text, or JSON lines with "text" or "messages" (content is taken); ``text``: its text, where it has been read.
    """
    if text is None:
        text = default_text() if file is None else read_text(file)
    return _encode(text, tokenizer)


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    found: list[int] = []
    for first in range(0, len(text), CHUNK):
        found += tokenizer.encode(text[first : first + CHUNK], add_special_tokens=False)
    return found


def read_text(file: str) -> str:
    """A text file, or the texts of JSON lines. Raises InputError."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")  # what Windows puts before it is no text
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InputError(f"{file}: byte {error.start} ({byte:#x}) is not UTF-8: give a text file, converted to UTF-8") from None
    if file.lower().endswith((".jsonl", ".ndjson", ".json")):
        return "\n\n".join(_line(file, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    return text


def _texts(content: Any) -> list[str]:
    """Of a message: a string, or parts, of which some may be text; null where tools are called."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return [text for text in texts if isinstance(text, str)]


def _line(file: str, number: int, line: str) -> str:
    try:
        value = json.loads(line)
        if isinstance(value, str):
            return value
        if isinstance(value.get("text"), str):
            return value["text"]
        contents = [message.get("content") for message in value["messages"]]
        return "\n".join(chain.from_iterable(map(_texts, contents)))
    except (ValueError, AttributeError, KeyError, TypeError):
        raise InputError(f'{file}, line {number}: JSON with "text" or "messages" is needed') from None
