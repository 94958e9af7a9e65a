"""POST /tokenize and /detokenize, in vLLM's form and in llama.cpp's: the field names tell which."""

from __future__ import annotations

from typing import Any

from appliance.core.params import RequestError
from appliance.server.prompts import render, tokenize
from appliance.server.schemas import DetokenizeRequest, TokenizeRequest
from appliance.server.state import ServerState
from appliance.text.tokenizer import Tokenizer


async def tokenize_answer(state: ServerState, body: TokenizeRequest) -> dict[str, Any]:
    tokenizer, limit = _tokenizer(state), state.info.max_model_len
    if sum(one is not None for one in (body.content, body.prompt, body.messages)) != 1:
        raise RequestError("give exactly one of prompt, messages and content", param="prompt")
    if body.content is not None:
        if not body.parse_special:
            raise RequestError("parse_special=false is not supported", param="parse_special", code="unsupported_parameter")
        ids = await tokenize(tokenizer, body.content, body.add_special)
        return {"tokens": [{"id": i, "piece": tokenizer.token_str(i)} for i in ids] if body.with_pieces else ids}
    if body.messages is not None:
        text = await render(tokenizer, body, body.chat_template_kwargs or {}, body.tools)
        ids = await tokenize(tokenizer, text, bool(body.add_special_tokens))
    else:
        ids = await tokenize(tokenizer, body.prompt or "", body.add_special_tokens is not False)
    names = [tokenizer.token_str(i) for i in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": names}


def detokenize_answer(state: ServerState, body: DetokenizeRequest) -> dict[str, Any]:
    wrong = next((t for t in body.tokens if not 0 <= t < state.info.vocab_size), None)
    if wrong is not None:
        message = f"tokens holds id {wrong}, but the vocabulary has ids 0 to {state.info.vocab_size - 1}"
        raise RequestError(message, param="tokens")
    text = _tokenizer(state).decode(body.tokens, skip_special_tokens=False)
    return {"prompt": text, "content": text}


def _tokenizer(state: ServerState) -> Tokenizer:
    if state.tokenizer is None:
        raise RequestError("this server runs without a tokenizer (--skip-tokenizer-init)")
    return state.tokenizer
