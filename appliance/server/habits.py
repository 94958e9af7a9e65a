"""What clients do that no route should have to know of: paths written a little otherwise, HEAD, other services' routes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

UNPREFIXED = (
    "/chat/completions",
    "/completions",
    "/models",
    "/responses",
    "/messages",
    "/embeddings",
    "/load_lora_adapter",
    "/unload_lora_adapter",
)  # where a base_url lacks its /v1
# Routes of OpenAI, vLLM, llama.cpp, Ollama and others that are known, and not served.
UNSERVED = {
    "/v1/moderations": "moderation is not done here",
    "/v1/images": "images are not made here",
    "/v1/audio": "audio is neither read nor made here",
    "/v1/realtime": "audio is neither read nor made here",
    "/v1/rerank": "texts are not ranked here",
    "/v1/score": "texts are not scored here: /v1/completions with echo and logprobs has the log-probabilities of a prompt",
    "/v1/files": "no files are kept here",
    "/v1/uploads": "no files are kept here",
    "/v1/vector_stores": "no files are kept here",
    "/v1/batches": "batches are not kept here: send the requests at once, they are computed together",
    "/v1/fine_tuning": "models are not trained here",
    "/v1/assistants": "assistants are not kept here: use /v1/responses or /v1/chat/completions",
    "/v1/threads": "assistants are not kept here: use /v1/responses or /v1/chat/completions",
    "/v1/conversations": "conversations are not kept here: use /v1/responses with previous_response_id",
    "/v1/containers": "no code is run here",
    "/v1/evals": "nothing is evaluated here",
    "/v1/videos": "videos are not made here",
    "/v2/rerank": "texts are not ranked here",
    "/rerank": "texts are not ranked here",
    "/score": "texts are not scored here: /v1/completions with echo and logprobs has the log-probabilities of a prompt",
    "/pooling": "use /v1/embeddings",
    "/embedding": "use /v1/embeddings",
    "/v2/embed": "use /v1/embeddings",
    "/classify": "texts are not classified here",
    "/completion": "llama.cpp's own form is not spoken here: use /v1/completions",
    "/infill": "filling in the middle is not done here: use /v1/completions",
    "/api": "Ollama's own form is not spoken here: use /v1/chat/completions",
    "/generate": "use /v1/completions",
    "/docs": "GET /openapi.json has the description",
    "/redoc": "GET /openapi.json has the description",
    "/slots": "GET /stats tells what runs",
    "/props": "GET /stats tells of the model, GET /tokenizer_info of its template",
    "/sleep": "POST /v1/models/unload frees a model's memory, and --idle-unload does it by itself",
    "/wake_up": "a model that was unloaded is loaded with the next request for it",
    "/is_sleeping": "GET /v1/models has the models' states",
    "/openai": "Azure's form is not spoken here: use /v1/chat/completions",
    "/v1beta": "Gemini's form is not spoken here: use /v1/chat/completions",
    "/lora-adapters": "GET /v1/models has the LoRA adapters, and requests name one as their model",
    "/v1/alpha": "nothing is searched for here",
    "/v1/chat/completions/input_tokens": "POST /tokenize with messages counts them",
    "/v1/chat/completions/render": "POST /tokenize with messages has the tokens of the prompt",
    "/v1/completions/render": "POST /tokenize with prompt has its tokens",
    "/apply-template": "POST /tokenize with messages has the tokens of the prompt, and POST /detokenize their text",
    "/invocations": "use /v1/chat/completions or /v1/completions",
    "/server_info": "GET /stats tells of the server and its model",
}

WHOLE = re.compile(r"https?://[^/]*", re.IGNORECASE)


class Habits:
    """Ahead of keys and routes, which see one spelling of each path. HEAD is answered as GET; uvicorn leaves the body out."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            path = scope["path"]
            if not path.startswith("/"):  # a whole address, as some proxies ask: its host is in a header, too
                path = WHOLE.sub("", path)
            scope = {**scope, "method": method, "path": usual(path)}
        await self.app(scope, receive, send)


def usual(path: str) -> str:
    """A path without the slashes that clients put in when they join addresses, and with exactly one /v1."""
    path = "/" + "/".join(part for part in path.split("/") if part)
    if path.startswith("/v1/v1/"):  # the base_url had one, and so had the client
        return path[3:]
    if any(path == one or path.startswith(f"{one}/") for one in UNPREFIXED):
        return f"/v1{path}"
    return path


def unserved(path: str) -> str:
    """Why there is no such route, where it is one that others have, else where to look."""
    known = (why for known, why in UNSERVED.items() if path == known or path.startswith(f"{known}/"))
    return next(known, "GET /openapi.json has all that there are")


def methods(routes: Iterable[Any], scope: Scope) -> set[str]:
    """What a path can be asked by: its first route's methods, and those of others that are written like it."""
    every = [one for route in routes for one in getattr(getattr(route, "original_router", None), "routes", [route])]
    fitting = [one for one in every if one.matches(dict(scope))[0] is not Match.NONE]
    return {method for one in fitting if one.path == fitting[0].path for method in one.methods}
