"""Token ids to text, one token at a time, at the same cost for each."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from appliance.text.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Before the text of special tokens, where a parser has to tell them from the same text. Stands for no character of any language.
MARK = "\ufdd0"


def _printable_bytes() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes with: printable Latin-1 as itself, the other 68 from U+0100 on (GPT-2)."""
    plain = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_LEVEL = _printable_bytes()


@dataclass(frozen=True)
class Spelling:
    """How a vocabulary writes text: in byte-level letters, or with a mark for the space and ``<0x..>`` for single bytes."""

    byte_level: bool = False
    space: str = "▁"
    byte_tokens: bool = False
    strip: bool = False  # the space before the first word is the tokenizer's own

    @classmethod
    def of(cls, decoder: dict[str, Any] | None) -> Spelling | None:
        """From the decoder section of a tokenizer.json; None for kinds whose tokens have no spelling of their own."""
        decoder = decoder or {}
        steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
        kinds = [step.get("type") for step in steps]
        if kinds == ["ByteLevel"]:
            return cls(byte_level=True)
        if kinds == ["Metaspace"]:
            return cls(space=steps[0]["replacement"], strip=steps[0].get("prepend_scheme", "always") != "never")
        if kinds in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
            pattern = steps[0]["pattern"].get("String")
            strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
            if pattern and steps[0]["content"] == " " and steps[3:] in ([], [strip]):
                return cls(space=pattern, byte_tokens=True, strip=bool(steps[3:]))
        return None

    def spell(self, token: str) -> bytes:
        """The bytes of a token."""
        if self.byte_level:
            try:
                return bytes([_BYTE_LEVEL[c] for c in token])
            except KeyError:  # an added token, written in plain letters
                return token.encode()
        found = _BYTE.fullmatch(token) if self.byte_tokens else None
        return bytes([int(found[1], 16)]) if found else token.replace(self.space, " ").encode()


def _one_mark_per_byte(error: UnicodeError) -> tuple[str, int]:
    """As the tokenizers library writes stray ``<0x..>`` tokens."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("appliance-one-mark-per-byte", _one_mark_per_byte)


class Detokenizer:
    """Turns tokens into pieces of text that never end within a character; what was given out is never changed."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        follows_text: bool = False,
        shown: Mapping[int, str] | None = None,
    ) -> None:
        """``follows_text``: a prompt comes before, so that a space at the start is one between words and stays.

        ``shown``: special tokens that are text even where special tokens are skipped, and which text.
        """
        self._tokenizer, self._spelling = tokenizer, tokenizer.spelling
        self._shown = shown or {}
        self._skip = tokenizer.special_ids.difference(self._shown) if skip_special_tokens else frozenset()
        self._strip = self._spelling is not None and self._spelling.strip and not follows_text
        errors = "appliance-one-mark-per-byte" if self._spelling and self._spelling.byte_tokens else "replace"
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)
        self._ids: list[int] = []  # for the kinds that can only be decoded whole
        self._given = ""

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" while it stops within a character."""
        if token_id in self._skip:
            return ""
        if self._spelling is None:
            self._ids.append(token_id)
            text, plain = self._whole(held="\ufffd"), self._tokenizer.token(token_id)
            if token_id in self._shown and plain and text.endswith(plain):
                return text.removesuffix(plain) + self._shown[token_id]
            return text
        if token_id in self._shown:
            return self._stripped(self._utf8.decode(b"", final=True)) + self._stripped(self._shown[token_id])
        data = self._tokenizer.token_bytes(token_id)
        if data is None:
            return ""
        if not self._spelling.byte_level and not self._is_byte(token_id):  # a whole piece: unfinished bytes before it stay so
            return self._stripped(self._utf8.decode(b"", final=True)) + self._stripped(data.decode())
        return self._stripped(self._utf8.decode(data))

    def finish(self) -> str:
        """What is left at the end: U+FFFD for bytes that never became a character."""
        return self._whole(held="") if self._spelling is None else self._stripped(self._utf8.decode(b"", final=True))

    def _is_byte(self, token_id: int) -> bool:
        assert self._spelling is not None
        return self._spelling.byte_tokens and _BYTE.fullmatch(self._tokenizer.token(token_id) or "") is not None

    def _stripped(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text

    def _whole(self, held: str) -> str:
        """Decode everything again (rare kinds only), and give out what is new."""
        text = self._tokenizer.decode_whole(self._ids, skip_special_tokens=False)
        if held:
            text = text.rstrip(held)
        new = text[len(self._given) :]
        self._given += new
        return new
