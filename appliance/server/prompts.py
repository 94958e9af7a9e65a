"""From what a body calls a prompt to token ids. Long texts are tokenized off the event loop, and never further than needed."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from appliance.core.door import ContextOverflow
from appliance.core.params import RequestError
from appliance.server.beside import one_at_a_time
from appliance.server.sampling import COMPLETION_TOKENS
from appliance.server.schemas import ChatRequest, CompletionRequest, EmbeddingRequest, TokenizeRequest
from appliance.text.timelimit import TimeLimit
from appliance.text.tokenizer import Tokenizer

INLINE_CHARS = 2000  # texts up to this length are tokenized on the event loop (well under a millisecond)
CHARS_PER_TOKEN = 8  # first guess at how much text certainly overflows the context
SLACK = 16  # tokens by which a cut text may differ from the uncut one
MAX_PROMPTS, MAX_INPUTS = 1024, 2048  # of a request (the second is OpenAI's); each is a request of its own to the engine
MAX_CHARS, MAX_CHARS_PER_TOKEN = 2**21, 16  # texts longer than both say (of the context) are not tokenized, truncated or not
LARGE_CHARS = 2**17  # longer texts are tokenized one after another: a token takes some hundred bytes meanwhile
# Of processor time for a chat template: at first, and in the line of those for which that is too little.
BRIEF_S, RENDER_S = 0.25, 5.0

Sends = CompletionRequest | ChatRequest | EmbeddingRequest

_long = ThreadPoolExecutor(1, thread_name_prefix="template")


@dataclass(frozen=True)
class Prompt:
    token_ids: tuple[int, ...]
    text: str | None = None  # None where token ids were sent, or the text was truncated


async def completion_prompts(body: CompletionRequest | EmbeddingRequest, tokenizer: Tokenizer | None, limit: int) -> list[Prompt]:
    """The prompts of a body. Raises RequestError, also when one is longer than ``limit`` tokens."""
    special = body.add_special_tokens is not False
    prompts = []
    for k, one in enumerate(_split(body)):
        if k % 16 == 15:
            await asyncio.sleep(0)  # others have their turn
        if isinstance(one, str):
            prompts.append(await _from_text(one, body, _needed(tokenizer), limit, special))
        else:
            prompts.append(_truncate(Prompt(tuple(one)), body, limit))
    return prompts


async def chat_prompt(body: ChatRequest, tokenizer: Tokenizer | None, limit: int, tools: list[Any] | None = None) -> Prompt:
    """Messages, and the tools that the model may call, written with the model's chat template. Raises RequestError."""
    if tokenizer is None:
        raise RequestError("chat needs a tokenizer, and this server runs without one: use /v1/completions with token ids")
    text = await render(tokenizer, body, tools)
    return await _from_text(text, body, tokenizer, limit, bool(body.add_special_tokens))


async def render(tokenizer: Tokenizer, body: ChatRequest | TokenizeRequest, tools: Any) -> str:
    """The conversation as the model's chat template writes it. Raises RequestError, also where that takes too long.

    What most need no time for is not kept waiting by what takes long, and what nobody waits for any more ends.
    """
    kwargs = dict(body.chat_template_kwargs or {})
    for name in ("documents", "reasoning_effort"):
        if getattr(body, name) is not None:
            kwargs.setdefault(name, getattr(body, name))
    if body.reasoning_effort == "none":  # by the two names that templates have for it
        kwargs = {"enable_thinking": False, "thinking": False, **kwargs}
    clash = {"tools", "add_generation_prompt", "continue_final_message"} & kwargs.keys()
    if clash:
        raise RequestError(f"chat_template_kwargs may not hold {sorted(clash)[0]!r}", param="chat_template_kwargs")
    work = partial(
        tokenizer.chat,
        body.messages or [],
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        tools=tools,
        **kwargs,
    )
    try:
        try:
            return await _limited(work, BRIEF_S)
        except TimeoutError:
            return await _limited(work, RENDER_S, _long)
    except TimeoutError as error:
        message = f"the chat template cannot write this conversation: {error}; send fewer or shorter messages"
        raise RequestError(message, param="messages") from None


async def _limited(work: Callable[[], str], seconds: float, where: Executor | None = None) -> str:
    limit = TimeLimit(seconds)
    try:
        return await asyncio.get_running_loop().run_in_executor(where, limit.run, work)
    finally:
        limit.stop()


async def tokenize(tokenizer: Tokenizer, text: str, special: bool, limit: int) -> list[int]:
    """Token ids, of a text for a context of ``limit`` tokens. Raises RequestError where it is too long to be looked at."""
    if len(text) <= INLINE_CHARS:
        return tokenizer.encode(text, add_special_tokens=special)
    most = max(MAX_CHARS, MAX_CHARS_PER_TOKEN * limit if limit < sys.maxsize else 0)  # which is what counting alone says
    if len(text) > most:
        raise RequestError(f"the text has {len(text)} characters: at most {most} are taken", param="prompt")
    work = one_at_a_time if len(text) > LARGE_CHARS else asyncio.to_thread
    return await work(tokenizer.encode, text, add_special_tokens=special)


async def _from_text(text: str, body: Sends, tokenizer: Tokenizer, limit: int, special: bool) -> Prompt:
    if body.truncate_prompt_tokens is None:
        cut = limit * CHARS_PER_TOKEN
        while cut < len(text):  # a text that is far too long shall not cost the time of tokenizing it all
            count = len(await tokenize(tokenizer, text[:cut], special, limit))
            if count > limit + SLACK:
                raise ContextOverflow(count, None, limit, at_least=True)
            cut *= 2
    ids = await tokenize(tokenizer, text, special, limit)
    return _truncate(Prompt(tuple(ids), text), body, limit)


def _truncate(prompt: Prompt, body: Sends, limit: int) -> Prompt:
    """Cut to what the request asks for (-1: what fits with the tokens it wants); nothing is cut where it does not ask."""
    wanted = body.truncate_prompt_tokens
    if wanted is None:
        return prompt
    if isinstance(body, EmbeddingRequest):
        asked = 0
    else:
        asked = max(1, getattr(body, "max_completion_tokens", None) or body.max_tokens or 1)
    if isinstance(body, CompletionRequest) and body.max_tokens is None:
        asked = COMPLETION_TOKENS
    keep = limit - asked if wanted == -1 else wanted
    if keep < 1 or keep >= len(prompt.token_ids):
        return prompt
    return Prompt(prompt.token_ids[-keep:] if body.truncation_side == "left" else prompt.token_ids[:keep])


def _split(body: CompletionRequest | EmbeddingRequest) -> list[str | list[int]]:
    """Text, token ids, or a list of either -> a list of prompts."""
    if isinstance(body, EmbeddingRequest):
        name, prompt, most = "input", body.input, MAX_INPUTS
    else:
        name, prompt, most = "prompt", body.prompt, MAX_PROMPTS
    if isinstance(prompt, str) or _is_ids(prompt):
        return [prompt]
    if isinstance(prompt, list) and len(prompt) > most:
        message = f"{name} has {len(prompt)} texts: at most {most} are taken in one request; send several"
        raise RequestError(message, param=name)
    if isinstance(prompt, list) and prompt and all(isinstance(p, str) or _is_ids(p) for p in prompt):
        return prompt
    what = "text, a list of texts, a list of token ids, or a list of lists of token ids"
    found = "an empty list" if prompt == [] else f"{type(prompt).__name__} {prompt!r:.60}"
    raise RequestError(f"{name} must be {what}, got {found}", param=name, code="invalid_type")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)


def _needed(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise RequestError("this server runs without a tokenizer: send token ids as prompt", param="prompt")
    return tokenizer


def text_of(prompt: Prompt, tokenizer: Tokenizer | None) -> str:
    """A prompt as text, for echo."""
    if prompt.text is not None:
        return prompt.text
    return tokenizer.decode(list(prompt.token_ids), skip_special_tokens=False) if tokenizer else ""
