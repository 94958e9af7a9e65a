"""What of a request's parameters can only be said with the tokenizer at hand."""

from __future__ import annotations

from dataclasses import replace

from appliance.core.params import RequestError, SamplingParams
from appliance.text.grammar import compile_grammar
from appliance.text.tokenizer import Tokenizer


def prepare(params: SamplingParams, tokenizer: Tokenizer | None) -> SamplingParams:
    """The parameters with ``bad_words`` as token ids, and ``structured_outputs`` as a grammar that is known to compile.

    Raises RequestError where it does not, and where they need a tokenizer and there is none.
    """
    if tokenizer is None and params.stop:
        raise RequestError("stop strings need a tokenizer: use stop_token_ids", param="stop")
    if params.structured_outputs is not None and not params.grammar and tokenizer is not None:
        params = replace(params, grammar=compile_grammar(params.structured_outputs))
    if not params.bad_words:
        return params
    if tokenizer is None:
        raise RequestError("bad_words need a tokenizer", param="bad_words")
    ways = [way for word in params.bad_words for way in _spellings(word, tokenizer)]
    return replace(params, bad_words_token_ids=tuple(dict.fromkeys([*params.bad_words_token_ids, *ways])))


def _spellings(word: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """A word's tokens at the start of a text and after a space."""
    bare = word.strip() if isinstance(word, str) else ""
    if not bare:
        raise RequestError(f"bad_words holds {word!r}: every bad word needs at least one visible character", param="bad_words")
    ways = (tuple(tokenizer.encode(text, add_special_tokens=False)) for text in (bare, " " + bare))
    return [way for way in ways if way]
