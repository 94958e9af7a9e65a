"""Errors as OpenAI's clients expect them: one JSON shape, the real HTTP status, a slug in ``code``.

Under /v1/messages they have the shape that Anthropic's clients expect.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Scope

from appliance.core.door import ContextOverflow
from appliance.core.params import RequestError
from appliance.runtime.client import EngineDied
from appliance.server.limits import RateLimited
from quant.errors import InputError

log = logging.getLogger("appliance.server")

about: ContextVar[dict[str, Any] | None] = ContextVar("about", default=None)
"""What is known of the request that this task answers: request_id, and the error_code of its answer."""

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",  # what there is for "try again"
    529: "overloaded_error",
}
ANTHROPIC_CODES = ("thread_unsupported_request",)  # that its clients know what to do about
OVERLOADED = 529  # Anthropic's own status, by which its clients know that there is too much to do
# The field that the prompt comes from, by path.
PROMPTS = {"/v1/chat/completions": "messages", "/v1/responses": "input", "/v1/embeddings": "input"}
RETRY_AFTER_S = {429: 1, 503: 5}
MAX_RETRY_S = 60.0  # clients that are told to wait longer had better tell their user


class EngineFailed(RuntimeError):
    """The engine could not compute this one request; it goes on with the others."""


as_json = partial(to_json, inf_nan_mode="null")  # fast, and infinities become null instead of invalid JSON


class JSONResponse(Response):
    """What is no JSON yet (bytes) is made JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return content if isinstance(content, bytes) else as_json(content)


def unavailable(message: str, code: str) -> RequestError:
    return RequestError(message, code=code, status=503)


def error_body(message: str, *, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    if (known := about.get()) is not None:
        known["error_code"], known["error_param"] = code or kind, param
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: Exception) -> tuple[int, dict[str, Any]]:
    """HTTP status and JSON body of an error. What nobody foresaw is logged with its traceback and told as a plain 500."""
    match error:
        case RequestError():
            return error.status, error_body(str(error), status=error.status, param=error.param, code=error.code)
        case InputError():
            return 400, error_body(str(error), status=400)
        case EngineDied():
            return 503, error_body(str(error), status=503, code="engine_dead")
        case EngineFailed():
            return 500, error_body(str(error), status=500, code="engine_error")
    log.error("unexpected error while answering a request", exc_info=error)
    return 500, error_body("internal error: the server's log has the details", status=500, code="internal_error")


def error_response(error: Exception, scope: Scope, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer to the request of this ``scope``."""
    kind = RequestError if scope["path"] == "/v1/embeddings" else ContextOverflow  # others have a field of that name
    if isinstance(error, kind) and error.param == "prompt":
        error.param = PROMPTS.get(scope["path"], error.param)
    status, body = describe(error)
    more = dict(headers or {})
    if isinstance(error, RateLimited):
        more["Retry-After"] = str(max(1, math.ceil(round(error.retry_after, 3))))
        if error.hopeless or error.retry_after > MAX_RETRY_S:
            more["x-should-retry"] = "false"  # the clients then ask no more
    elif status in RETRY_AFTER_S:
        more["Retry-After"] = str(RETRY_AFTER_S[status])
    return failure(status, body, scope, more)


def failure(status: int, body: dict[str, Any], scope: Scope, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error's body in the form that the request's path asks for."""
    if speaks_anthropic(scope):
        status = OVERLOADED if body["error"]["code"] == "server_overloaded" else status
        body = anthropic_body(status, body, scope["state"]["request_id"])
    return JSONResponse(body, status_code=status, headers=headers)


def speaks_anthropic(scope: Scope) -> bool:
    """Whether the client is one of Anthropic's: by the path, or by its own header where OpenAI's have the same path."""
    path = scope["path"]
    if path == "/v1/models" or path.startswith("/v1/models/"):
        return any(name == b"anthropic-version" for name, _ in scope["headers"])
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def anthropic_body(status: int, body: Mapping[str, Any], request_id: str) -> dict[str, Any]:
    """An error's body in Anthropic's form."""
    kind = ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    error: dict[str, Any] = {"type": kind, "message": body["error"]["message"]}
    if (code := body["error"]["code"]) in ANTHROPIC_CODES:
        error["details"] = {"error_code": code}
    return {"type": "error", "error": error, "request_id": request_id}
