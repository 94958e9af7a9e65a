"""POST /tokenize and /detokenize, in vLLM's form and in llama.cpp's: the field names tell which."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from appliance.core.door import check_ids
from appliance.core.params import RequestError
from appliance.server.fields import refuse
from appliance.server.prompts import render, tokenize
from appliance.server.schemas import DetokenizeRequest, Fields, TokenizeRequest
from appliance.server.state import ServerState
from appliance.text.tokenizer import Tokenizer
from appliance.text.tools.choice import tool_choice

PIECES_CHARS = 2**18  # with the text of each token


async def tokenize_answer(state: ServerState, body: TokenizeRequest) -> dict[str, Any]:
    tokenizer, limit = _tokenizer(state), state.known.max_model_len
    _check_fields(state, body)
    choice = tool_choice(body.tools, body.tool_choice)  # what chat would tell the model of, and refuse
    if sum(one is not None for one in (body.content, body.prompt, body.messages)) != 1:
        raise RequestError("give exactly one of prompt, messages and content", param="prompt")
    if body.content is not None:
        if not body.parse_special:
            raise RequestError("parse_special=false is not supported", param="parse_special", code="unsupported_parameter")
        ids = await _ids(state, body.content, body.add_special, pieces=body.with_pieces)
        return {"tokens": await asyncio.to_thread(_pieces, tokenizer, ids) if body.with_pieces else ids}
    if body.messages is not None:
        tools = list(choice.tools) if body.tool_choice != "none" else None
        text, special = await render(tokenizer, state.parsers.fitted(body), tools or None), bool(body.add_special_tokens)
    else:
        text, special = body.prompt or "", body.add_special_tokens is not False
    ids = await _ids(state, text, special, pieces=body.return_token_strs)
    names = [piece["piece"] for piece in await asyncio.to_thread(_pieces, tokenizer, ids)] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": names}


def _check_fields(state: ServerState, body: Fields) -> None:
    """As of requests that compute. Raises RequestError."""
    refuse(body.model_extra or {})
    state.check_unknown(body)


async def _ids(state: ServerState, text: str, special: bool, *, pieces: bool) -> list[int]:
    if pieces and len(text) > PIECES_CHARS:
        message = f"the text has {len(text)} characters: at most {PIECES_CHARS} are taken where each token's text is asked for"
        raise RequestError(message, param="prompt")
    return await tokenize(_tokenizer(state), text, special, state.known.max_model_len)


def _pieces(tokenizer: Tokenizer, ids: list[int]) -> list[dict[str, Any]]:
    return [{"id": i, "piece": tokenizer.token_str(i)} for i in ids]


async def detokenize_answer(state: ServerState, body: DetokenizeRequest) -> dict[str, Any]:
    _check_fields(state, body)
    check_ids("tokens", body.tokens, state.known.vocab_size)
    text = await asyncio.to_thread(_tokenizer(state).decode, body.tokens, skip_special_tokens=False)
    return {"prompt": text, "content": text}


def tokenizer_info(state: ServerState) -> dict[str, Any]:
    """tokenizer_config.json with the names of special tokens and the chat template that count here: what vLLM tells."""
    tokenizer, directory = _tokenizer(state), state.engine_config.tokenizer or state.engine_config.model
    path = Path(directory or "") / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    none = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"))
    return {**config, **none, **tokenizer.named_tokens, "chat_template": next(iter(tokenizer.chat_templates), None)}


def _tokenizer(state: ServerState) -> Tokenizer:
    if state.tokenizer is None:
        raise RequestError("this server runs without a tokenizer (--skip-tokenizer-init)")
    return state.tokenizer
