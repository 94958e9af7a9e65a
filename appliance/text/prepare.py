"""What of a request's parameters can only be said with the tokenizer at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from appliance.core.params import RequestError, SamplingParams
from appliance.core.thinking import ThinkingMarks
from appliance.text.grammar import compile_grammar
from appliance.text.reasoning import HARMONY, Tags
from appliance.text.tokenizer import Tokenizer
from appliance.text.tools.harmony import CHANNEL, END, MESSAGE, START

FINAL = f"{END}{START}assistant{CHANNEL}final{MESSAGE}"  # of gpt-oss: else the next message may be thoughts again
NEAR = 8  # tokens at the end of a prompt: what a template writes behind thoughts that are over


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


def with_thinking(
    params: SamplingParams, tokenizer: Tokenizer | None, tags: Tags | None, prompt: Sequence[int]
) -> SamplingParams:
    """The parameters with what a thinking_token_budget needs: the tokens around thoughts, and how many this prompt ends with.

    Raises RequestError where the model does not show them by tokens of their own.
    """
    if params.thinking_token_budget is None:
        return params
    why = "the model's chat template shows no thoughts (--reasoning-parser names their form)" if tags is None else ""
    end = None if tokenizer is None or tags is None else tokenizer.added(tags.end)
    if tokenizer is None or tags is None or end is None:
        why = why or ("there is no tokenizer" if tokenizer is None or tags is None else f"{tags.end!r} is no token of its own")
        raise RequestError(f"thinking_token_budget: {why}", param="thinking_token_budget", code="unsupported_parameter")
    start = tuple(tokenizer.encode(tags.start, add_special_tokens=False))
    close = tuple(tokenizer.encode(FINAL, add_special_tokens=False)) if tags is HARMONY else (end,)
    marks = ThinkingMarks(start, end, close, _thought(tokenizer, tags, start, end, prompt), again=tags is HARMONY)
    return replace(params, thinking_marks=marks)


def _thought(tokenizer: Tokenizer, tags: Tags, start: tuple[int, ...], end: int, prompt: Sequence[int]) -> int | None:
    """How many of a prompt's tokens are thoughts that the answer goes on with; None where it does not begin with thoughts.

    What a user writes is followed by a special token, the end of the turn; open thoughts are not.
    """
    for place in range(len(prompt) - 1, -1, -1):
        if tuple(prompt[max(0, place + 1 - len(start)) : place + 1]) == start:
            return len(prompt) - 1 - place
        if prompt[place] == end or prompt[place] in tokenizer.special_ids:
            break
    return 0 if tags.assumed and end not in prompt[-NEAR:] else None


def _spellings(word: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """A word's tokens at the start of a text and after a space."""
    bare = word.strip() if isinstance(word, str) else ""
    if not bare:
        raise RequestError(f"bad_words holds {word!r}: every bad word needs at least one visible character", param="bad_words")
    ways = (tuple(tokenizer.encode(text, add_special_tokens=False)) for text in (bare, " " + bare))
    return [way for way in ways if way]
