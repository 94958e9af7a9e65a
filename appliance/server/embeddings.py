"""POST /v1/embeddings."""

from __future__ import annotations

import base64
from contextlib import aclosing
from typing import Any

from starlette.responses import Response

from appliance.core.messages import Pooling
from appliance.core.params import RequestError
from appliance.pooling import embedding_params, numbers
from appliance.server.errors import JSONResponse
from appliance.server.job import Job
from appliance.server.prompts import completion_prompts
from appliance.server.schemas import EmbeddingRequest
from appliance.server.state import ServerState


async def answer(state: ServerState, request_id: str, body: EmbeddingRequest) -> Response:
    body.check()
    state.check_unknown(body)
    if state.pooler is None:
        message = "this model generates text: start the server with --runner pooling to have its hidden states as embeddings"
        raise RequestError(message, param="model", code="unsupported_model")
    prompts = await completion_prompts(body, state.tokenizer, state.info.max_model_len)
    normalize = state.pooler.normalize if body.normalize is None else body.normalize
    pooling = Pooling(body.dimensions, normalize)
    job = Job(state, request_id, "embd", prompts, embedding_params(), body, pooling=pooling)
    async with aclosing(job.run()) as deltas:
        async for _ in deltas:
            pass
    data = []
    for index, vector in enumerate(job.embeddings):
        written = base64.b64encode(vector).decode() if body.encoding_format == "base64" else numbers(vector)
        data.append({"object": "embedding", "index": index, "embedding": written})
        await job.pace()
    tokens = sum(len(prompt.token_ids) for prompt in prompts)
    whole: dict[str, Any] = {
        "id": job.id,
        "object": "list",
        "created": int(job.begun),
        "model": job.model,
        "data": data,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    return JSONResponse(whole)
