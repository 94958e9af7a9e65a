"""GET /openapi.json: the API's description, made of the schemas that requests are read by and the answers' shapes.

FastAPI cannot make it: the routes read their bodies themselves. What a route takes and gives is said in ``operations.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from starlette.responses import Response

from appliance.server.answers import ErrorAnswer
from appliance.server.errors import JSONResponse
from appliance.server.guard import PUBLIC
from appliance.server.kinds import RANGES
from appliance.server.route import state_of
from appliance.server.schemas import Fields
from appliance.version import __version__

router = APIRouter()

STATUSES = {
    400: "It cannot be served as asked: `param` names the field, `message` what was found and what would do.",
    401: "No key, or none that is valid.",
    403: "A web page of elsewhere asks, or the server is asked by a name that any page may have; not where keys are asked for.",
    404: "There is none of that name.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is compressed, which is not understood.",
    429: "A limit of the key is reached.",
    431: "Too many headers, or too large ones.",
    499: "It was aborted by `DELETE /v1/requests/{id}`.",
    500: "This request failed; the server goes on.",
    503: "Not now: the model is loading, the server is shutting down or has too much to do, or the engine has died.",
    529: "Too many requests wait.",
}
ALWAYS = (400, 431, 500, 503)  # no HTTP, too many headers, a fault of ours, more connections than there can be
BODY = (408, 413, 415)  # what reading a body can come to
COMPUTE = (*BODY, 404)  # and what the engine, too, has to do with
ANSWER = (*COMPUTE, 499)  # and what may take long


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One route: what it takes and gives. ALWAYS, 401, 403 and 429 need not be said: they follow from the route.

    ``answer`` and ``events`` are types: of the whole answer, and of one event's data where the body says ``stream``; ``done`` is
    the data of the event after the last one.
    """

    tag: str
    summary: str
    body: type | None = None
    example: Mapping[str, Any] | None = None  # of a body
    query: Mapping[str, tuple[Any, str]] | None = None  # name -> type, and what it is; all may be left out
    answer: Any = None
    text: str | None = None  # the media type of an answer that is no JSON
    events: Any = None
    done: str | None = "[DONE]"
    leads_to: tuple[str, ...] = ()  # routes whose path takes the ``id`` of this one's answer
    errors: tuple[int, ...] = ()
    error: Any = ErrorAnswer
    unready: Any = None  # what a 503 says, where it is no error

    def statuses(self, method: str, path: str) -> list[int]:
        found = {*self.errors, *ALWAYS}
        if path not in PUBLIC:
            found |= {401, 403, 429} if method == "post" else {401, 403}
        return sorted(found)

    def types(self) -> Iterator[Any]:
        return (one for one in (self.body, self.answer, self.events, self.error, self.unready) if one is not None)


class _Plain(GenerateJsonSchema):
    """pydantic's schemas, without a title that repeats each field's name, and with what bodies are checked for by hand."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def model_schema(self, schema: Any) -> dict[str, Any]:
        found = super().model_schema(schema)
        if issubclass(schema["cls"], Fields):
            for name in schema["cls"].not_described:
                found["properties"].pop(name, None)
            for name, field in found["properties"].items():
                for kind in field.get("anyOf", [field]):
                    kind |= RANGES.get(name, {}) if kind.get("type") in ("integer", "number") else {}
                if name not in found.get("required", ()):
                    _may_be_null(field)
        return found


def _may_be_null(field: dict[str, Any]) -> None:
    """In bodies null means absent."""
    kinds = field.pop("anyOf", None) or [{key: field.pop(key) for key in [*field] if key not in ("default", "description")}]
    field["anyOf"] = kinds if {"type": "null"} in kinds else [*kinds, {"type": "null"}]


@router.get("/openapi.json")
async def openapi(request: Request) -> Response:
    return JSONResponse(_ours(keys=state_of(request).keys.required))


@cache
def _ours(*, keys: bool) -> dict[str, Any]:
    """Made when somebody asks for it first: that takes a fifth of a second."""
    from appliance.server.operations import OPERATIONS

    return document(OPERATIONS, keys=keys)


def document(operations: Mapping[str, Operation], *, keys: bool) -> dict[str, Any]:
    """An OpenAPI 3.1 document of the operations, each by its "METHOD /path", where a path may have FastAPI's converters."""
    schemas, components = _schemas(operations.values())
    paths: dict[str, Any] = {}
    for route, operation in operations.items():
        method, path = route.lower().split(" ", 1)[0], re.sub(r"{(\w+):\w+}", r"{\1}", route.split(" ", 1)[1])
        paths.setdefault(path, {})[method] = _operation(method, path, operation, schemas)
    bearer, header = {"type": "http", "scheme": "bearer"}, {"type": "apiKey", "in": "header", "name": "x-api-key"}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "appliance",
            "version": __version__,
            "description": "A server of quantized language models. Keys are asked for where it was started with some.",
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"bearer": bearer, "x-api-key": header}},
        "security": [*([] if keys else [{}]), {"bearer": []}, {"x-api-key": []}],
    }


def _schemas(operations: Iterable[Operation]) -> tuple[dict[Any, Any], dict[str, Any]]:
    """From a type to its schema, and the definitions that these refer to."""
    types = {one for operation in operations for one in operation.types()}
    mode: Literal["validation"] = "validation"
    inputs = [(one, mode, TypeAdapter(one)) for one in types]
    found, definitions = TypeAdapter.json_schemas(inputs, ref_template="#/components/schemas/{model}", schema_generator=_Plain)
    return {key: schema for (key, _), schema in found.items()}, definitions["$defs"]


def _operation(method: str, path: str, operation: Operation, schemas: Mapping[Any, Any]) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": _id(method, path),
        "tags": [operation.tag],
        "summary": operation.summary,
        "responses": {"200": _success(operation, schemas)},
    }
    for status in operation.statuses(method, path):
        shape = schemas[operation.error]
        if status == 503 and operation.unready is not None:
            shape = {"anyOf": [schemas[operation.unready], shape]}
        content = {"application/json": {"schema": shape}}
        headers = {**_header("X-Request-Id"), **(_header("Retry-After") if status in (429, 503, 529) else {})}
        described["responses"][str(status)] = {"description": STATUSES[status], "headers": headers, "content": content}
    parameters = [
        {"name": one, "in": "path", "required": True, "schema": {"type": "string"}} for one in re.findall(r"{(\w+)}", path)
    ]
    for one, (kind, description) in (operation.query or {}).items():
        kinds = TypeAdapter(kind).json_schema(schema_generator=_Plain)
        parameters.append({"name": one, "in": "query", "required": False, "description": description, "schema": kinds})
    if parameters:
        described["parameters"] = parameters
    if operation.body is not None:
        content = {"application/json": {"schema": schemas[operation.body]}}
        if operation.example is not None:
            content["application/json"]["example"] = dict(operation.example)
        described["requestBody"] = {"required": True, "content": content}
    if path in PUBLIC:
        described["security"] = []
    return described


def _success(operation: Operation, schemas: Mapping[Any, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if operation.answer is not None:
        content["application/json"] = {"schema": schemas[operation.answer]}
    if operation.text is not None:
        content[operation.text] = {"schema": {"type": "string"}}
    if operation.events is not None:  # OpenAPI 3.1 has no word for the events of a stream; readers take this for one of them
        kinds = [schemas[operation.events], schemas[operation.error]]
        data: list[Any] = [{"contentMediaType": "application/json", "contentSchema": kind} for kind in kinds]
        data += [{"const": operation.done}] if operation.done else []
        event = {"type": "object", "properties": {"data": {"type": "string", "anyOf": data}}, "required": ["data"]}
        content["text/event-stream"] = {"schema": event}
    links = {}
    for method, path in (route.split() for route in operation.leads_to):
        parameters = dict.fromkeys(re.findall(r"{(\w+)}", path), "$response.body#/id")
        links[_id(method.lower(), path)] = {"operationId": _id(method.lower(), path), "parameters": parameters}
    more = {"links": links} if links else {}
    return {"description": "As asked.", "headers": _header("X-Request-Id"), "content": content, **more}


def _id(method: str, path: str) -> str:
    return f"{method}_{'_'.join(re.findall(r'[a-zA-Z0-9_]+', path)) or 'root'}"


def _header(name: str) -> dict[str, Any]:
    kind = "integer" if name == "Retry-After" else "string"
    return {name: {"required": True, "schema": {"type": kind}}}
