"""What each route takes and gives, for the description of the API: a route that is added is added here, too."""

from __future__ import annotations

from appliance.server import about, answers
from appliance.server.messages import described as messages
from appliance.server.openapi import ANSWER, COMPUTE, Operation
from appliance.server.responses import described as responses
from appliance.server.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    LoadAdapterRequest,
    ModelRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
)

HELLO = [{"role": "user", "content": "Hello!"}]
EITHER_ERROR = answers.ErrorAnswer | messages.AnthropicErrorAnswer
READY = Operation(tag="health", summary="Whether requests are served", answer=about.Health, unready=about.NotReady)

OPERATIONS: dict[str, Operation] = {
    "POST /v1/completions": Operation(
        tag="answers",
        summary="Go on with a text, or with token ids",
        body=CompletionRequest,
        example={"prompt": "Once upon a time", "max_tokens": 16},
        answer=answers.Completion,
        events=answers.CompletionChunk,
        errors=ANSWER,
    ),
    "POST /v1/chat/completions": Operation(
        tag="answers",
        summary="Answer a conversation",
        body=ChatRequest,
        example={"messages": HELLO, "max_tokens": 16},
        answer=answers.ChatCompletion,
        events=answers.ChatChunk,
        errors=ANSWER,
    ),
    "POST /v1/embeddings": Operation(
        tag="answers",
        summary="The embeddings of texts, of a model that makes such",
        body=EmbeddingRequest,
        example={"input": "Once upon a time"},
        answer=answers.Embeddings,
        errors=ANSWER,
    ),
    "GET /v1/models": Operation(
        tag="models",
        summary="The models, under all their names, and their LoRA adapters",
        answer=about.Models | messages.ModelsPage,
        error=EITHER_ERROR,
    ),
    "GET /v1/models/{model:path}": Operation(
        tag="models",
        summary="The model of that name",
        answer=about.Model | messages.ModelInfo,
        errors=(404,),
        error=EITHER_ERROR,
    ),
    "POST /v1/models/load": Operation(
        tag="models",
        summary="Load a model, once others have made room for it",
        body=ModelRequest,
        answer=about.ModelChange,
        errors=COMPUTE,
    ),
    "POST /v1/models/unload": Operation(
        tag="models",
        summary="Unload a model as soon as its requests are answered; the next request for it loads it again",
        body=ModelRequest,
        answer=about.ModelChange,
        errors=COMPUTE,
    ),
    "POST /v1/load_lora_adapter": Operation(
        tag="models",
        summary="Load a LoRA adapter from a directory of the server's machine (with --allow-runtime-lora-updating)",
        body=LoadAdapterRequest,
        text="text/plain",
        errors=COMPUTE,
    ),
    "POST /v1/unload_lora_adapter": Operation(
        tag="models",
        summary="Let no more requests ask for a LoRA adapter (with --allow-runtime-lora-updating)",
        body=UnloadAdapterRequest,
        text="text/plain",
        errors=COMPUTE,
    ),
    "POST /tokenize": Operation(
        tag="text",
        summary="Token ids of a text, or of messages as the model sees them",
        body=TokenizeRequest,
        example={"prompt": "Once upon a time"},
        answer=about.Tokens | about.LlamaTokens,
        errors=COMPUTE,
    ),
    "POST /detokenize": Operation(
        tag="text",
        summary="The text of token ids",
        body=DetokenizeRequest,
        example={"tokens": [5, 6, 7]},
        answer=about.Text,
        errors=COMPUTE,
    ),
    "GET /tokenizer_info": Operation(
        tag="text",
        summary="The model's tokenizer_config.json, with the special tokens and the chat template that count here",
        query={"model": (str, "the model that is meant; the first one where it is left out")},
        answer=about.TokenizerInfo,
        errors=(404,),
    ),
    "DELETE /v1/requests/{request_id:path}": Operation(
        tag="answers",
        summary="Abort a running request, of the same key, by its X-Request-Id or by the id of its answer",
        answer=about.Aborted,
        errors=(404,),
    ),
    "GET /health": READY,
    "GET /v1/health": READY,
    "GET /ready": READY,
    "GET /ping": Operation(tag="health", summary="The process answers, whatever the engine does", answer=about.Health),
    "GET /version": Operation(tag="server", summary="The server's version", answer=about.Version),
    "GET /load": Operation(tag="server", summary="How many requests it works on", answer=about.Load),
    "GET /metrics": Operation(tag="server", summary="Metrics for Prometheus", text="text/plain"),
    "GET /stats": Operation(
        tag="server",
        summary="All that the dashboard shows",
        query={"model": (str, "the model that is meant, where the server has several; the first one where it is left out")},
        answer=about.ServerStats,
        errors=(404,),
    ),
    "GET /logs": Operation(
        tag="server",
        summary="The latest lines of the log",
        query={"after": (int, "only lines whose `seq` is above this")},
        answer=about.LogLines,
    ),
    "POST /reset_prefix_cache": Operation(
        tag="server",
        summary="Requests that come from now on find nothing of what was computed before",
        query={"model": (str, "the model that is meant; the first one where it is left out")},
        answer=about.Success,
        errors=(404,),
    ),
    "GET /openapi.json": Operation(tag="server", summary="This description", answer=dict[str, object]),
    **responses.OPERATIONS,
    **messages.OPERATIONS,
}
