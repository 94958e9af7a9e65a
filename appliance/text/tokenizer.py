"""Text to token ids and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import tokenizers

from appliance.core.params import RequestError
from appliance.text.detokenizer import Detokenizer, Spelling
from appliance.text.files import read_tokenizer
from appliance.text.template import ChatTemplates, explicit_defaults, explicit_template


class Tokenizer:
    """A model's tokenizer with its chat templates. Encodes as transformers 5 does."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        named: dict[str, str],
        templates: dict[str, str],
        chat_defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """``named`` holds bos_token, eos_token and so on; ``templates`` the chat templates by name, ``chat_defaults`` what they
        are told unless ``chat`` says otherwise."""
        self._backend = backend
        self.named_tokens = named
        self._chat = ChatTemplates(templates, named, chat_defaults)
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        state = None if backend.decoder is None else backend.decoder.__getstate__()  # to_str() would write the vocabulary too
        self.spelling = Spelling.of(None if state is None else json.loads(state))
        self._bytes: dict[int, bytes | None] = {}

    @classmethod
    def load(cls, directory: str | Path, chat_template: str | None = None, chat_defaults: str | None = None) -> Tokenizer:
        """Read a directory; ``chat_template`` (a Jinja file, or the template itself) replaces the model's own.

        ``chat_defaults``: a JSON object of what templates are told unless ``chat`` says otherwise.

        Raises InputError when there is no tokenizer, or a file cannot be read; it is named.
        """
        files = read_tokenizer(Path(directory))
        templates = files.templates if chat_template is None else {"default": explicit_template(chat_template)}
        return cls(files.backend, files.named, templates, explicit_defaults(chat_defaults))

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary without added tokens."""
        return self._backend.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._named_id("eos_token")

    @property
    def has_chat_template(self) -> bool:
        return bool(self._chat)

    @property
    def chat_templates(self) -> tuple[str, ...]:
        """The model's chat templates, as Jinja."""
        return self._chat.sources

    def special_among(self, texts: Iterable[str]) -> frozenset[int]:
        """The ids of those texts that are special tokens."""
        ids = (self._backend.token_to_id(text) for text in texts)
        return frozenset(i for i in ids if i is not None and i in self.special_ids)

    def added(self, text: str) -> int | None:
        """The id of a text that is one token whatever stands around it; None of others."""
        token = self._backend.token_to_id(text)
        return token if token in self._backend.get_added_tokens_decoder() else None

    def spell_specials(self) -> None:
        """From now on, what reads like a special token in a text is text."""
        self._backend.encode_special_tokens = True

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``, never truncated; RequestError where it is not valid Unicode.

        As a batch of one: only for batches does the library let other threads run meanwhile.
        """
        try:
            return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except TypeError:
            raise RequestError("the text holds an unpaired surrogate (half of a \\ud83d\\ude00 pair)", param="prompt") from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of these tokens. Bytes that are not UTF-8 become U+FFFD; ids that no token has become nothing."""
        if self.spelling is None:
            return self.decode_whole(ids, skip_special_tokens)
        stream = Detokenizer(self, skip_special_tokens=skip_special_tokens)
        return "".join([stream.push(token) for token in ids]) + stream.finish()

    def decode_whole(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """By the tokenizers library itself."""
        return self._backend.decode([i for i in ids if i >= 0], skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it; None where there is no such id."""
        return self._backend.id_to_token(token_id) if token_id >= 0 else None

    def token_bytes(self, token_id: int) -> bytes | None:
        """Exactly the bytes that a token contributes to a text (a part of a character, perhaps); None for an unknown id."""
        if token_id not in self._bytes:
            self._bytes[token_id] = self.spell(token_id)
        return self._bytes[token_id]

    def token_str(self, token_id: int) -> str:
        """One token's own text, its leading space included, U+FFFD for parts of characters. "" for an unknown id."""
        return (self.token_bytes(token_id) or b"").decode("utf-8", errors="replace")

    def chat(
        self,
        messages: Sequence[Any],
        /,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The conversation as the model's chat template writes it; encode it with ``add_special_tokens=False``.

        Raises RequestError with the template's own words where it refuses, and where there is no template.
        """
        return self._chat.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            documents=documents,
            extra=kwargs,
        )

    def with_template(self, source: str) -> Callable[..., str]:
        """``chat`` with another template (Jinja, or a file of it) than the model's. Raises InputError where it is none."""
        other = copy(self)
        other._chat = ChatTemplates({"default": explicit_template(source)}, self.named_tokens)
        return other.chat

    def _named_id(self, name: str) -> int | None:
        return self._backend.token_to_id(self.named_tokens[name]) if name in self.named_tokens else None

    def spell(self, token_id: int) -> bytes | None:
        """``token_bytes``, not kept."""
        token = self.token(token_id)
        if token is None:
            return None
        if self.spelling is None:
            return self.decode_whole([token_id], skip_special_tokens=False).encode()
        return self.spelling.spell(token)
