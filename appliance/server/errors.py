"""Errors as OpenAI's clients expect them: one JSON shape, the real HTTP status, a slug in ``code``."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response

from appliance.core.params import RequestError
from appliance.runtime.worker import EngineDied
from appliance.server.limits import RateLimited
from quant.errors import InputError

log = logging.getLogger("appliance.server")

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
RETRY_AFTER_S = {429: 1, 503: 5}
MAX_RETRY_S = 60.0  # clients that are told to wait longer had better tell their user


class EngineFailed(RuntimeError):
    """The engine could not compute this one request; it goes on with the others."""


class JSONResponse(Response):
    """JSON by pydantic's encoder: fast, and infinities become null instead of invalid JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


def unavailable(message: str, code: str) -> RequestError:
    return RequestError(message, code=code, status=503)


def error_body(message: str, *, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
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


def error_response(error: Exception, headers: Mapping[str, str] | None = None) -> JSONResponse:
    status, body = describe(error)
    more = dict(headers or {})
    if isinstance(error, RateLimited):
        more["Retry-After"] = str(max(1, math.ceil(round(error.retry_after, 3))))
        if error.hopeless or error.retry_after > MAX_RETRY_S:
            more["x-should-retry"] = "false"  # OpenAI's clients then ask no more
    elif status in RETRY_AFTER_S:
        more["Retry-After"] = str(RETRY_AFTER_S[status])
    return JSONResponse(body, status_code=status, headers=more)
