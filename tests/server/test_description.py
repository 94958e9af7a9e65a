"""/openapi.json: all routes, all fields, all answers as they are; and schemathesis, which makes requests out of it."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from fastapi.openapi.utils import get_openapi
from starlette.routing import Route

from appliance.config import EngineConfig, ServerConfig
from appliance.server.app import create_app
from appliance.server.guard import PUBLIC
from appliance.server.kinds import RANGES
from appliance.server.operations import OPERATIONS
from appliance.server.schemas import Fields
from appliance.text.tokenizer import Tokenizer
from appliance.web import pages
from tests.server.conftest import Served, serve_in_thread
from tests.server.fake import FakeClient
from tests.server.test_lifecycle import eventually

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def described(served: Served) -> dict[str, Any]:
    with served.http as http:
        found: dict[str, Any] = http.get("/openapi.json").json()
        return found


def test_every_route_is_described(served: Served, described: dict[str, Any]) -> None:
    app = create_app(FakeClient(), served.state.tokenizer, served.state.engine_config, ServerConfig())
    routed = get_openapi(title="", version="", routes=app.routes)["paths"]
    plain = {(route.path, "get") for route in app.router.routes if isinstance(route, Route)}
    assert plain == {(route.path, "get") for route in pages.ROUTES}  # the built-in page is no part of the API
    expected = {(path, method) for path, methods in routed.items() for method in methods}
    assert {(path, method) for path, methods in described["paths"].items() for method in methods} == expected


def bodies(kind: type[Fields] = Fields) -> Iterator[type[Fields]]:
    for one in kind.__subclasses__():
        yield one
        yield from bodies(one)


def test_every_field_is_described(described: dict[str, Any]) -> None:
    schemas = described["components"]["schemas"]
    used = {operation.body for operation in OPERATIONS.values() if operation.body}
    for body in bodies():
        if body.__name__ not in schemas:
            assert body.__subclasses__(), f"no route takes {body.__name__}"
            continue
        found = schemas[body.__name__]["properties"]
        assert found.keys() == {field.alias or name for name, field in body.model_fields.items()} - {*body.not_described}
        assert all(field for field in found.values()), f"{body.__name__} has fields of which nothing is said"
    assert used <= {*bodies()}


def test_it_is_openapi(described: dict[str, Any]) -> None:
    from schemathesis.specs.openapi.definitions import OPENAPI_31

    jsonschema.Draft202012Validator(OPENAPI_31).validate(described)
    ids = [one["operationId"] for methods in described["paths"].values() for one in methods.values()]
    assert len(ids) == len({*ids})
    for schema in described["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("name", sorted(RANGES))
def test_ranges_are_those_that_hold(served: Served, name: str) -> None:
    """A number beyond a bound is refused by name; one at the bound is not refused for being out of range."""
    path, body = "/v1/completions", {"prompt": "ab", "max_tokens": 1, "n": None}
    if "top_logprobs" in name or "completion" in name:
        path, body = "/v1/chat/completions", {"messages": HELLO, "logprobs": True, "max_completion_tokens": 1}
    for bound, step in (("minimum", -1), ("exclusiveMinimum", 0), ("maximum", 1)):
        if (value := RANGES[name].get(bound)) is not None:
            error = served.post(path, **{**body, name: value + step}).json()["error"]
            assert error["param"] == name, error


def strict(node: Any) -> Any:
    """No keys but those that are described."""
    if isinstance(node, list):
        return [strict(one) for one in node]
    if not isinstance(node, dict):
        return node
    node = {key: strict(value) for key, value in node.items()}
    if "properties" in node and node.get("title") != "RequestStat":  # which the server adds to
        node.setdefault("additionalProperties", False)
    return node


class Conformity:
    def __init__(self, described: dict[str, Any]) -> None:
        self.document = strict(copy.deepcopy(described))

    def check(self, response: Any, method: str, path: str) -> None:
        found = self.document["paths"][path][method]["responses"]
        assert str(response.status_code) in found, (path, response.status_code, response.text)
        content = found[str(response.status_code)]["content"]
        media = response.headers["content-type"].split(";")[0]
        assert media in content, media
        schema = content[media]["schema"]
        if media == "text/event-stream":
            kinds = [one["contentSchema"] for one in schema["properties"]["data"]["anyOf"] if "contentSchema" in one]
            told = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
            assert told
            for data in told:
                if {"const": data} not in schema["properties"]["data"]["anyOf"]:
                    self._validate(json.loads(data), {"anyOf": kinds})
        elif media == "application/json":
            self._validate(response.json(), schema)

    def _validate(self, value: Any, schema: Any) -> None:
        whole = {**schema, "components": self.document["components"]}
        jsonschema.Draft202012Validator(whole).validate(value)


def test_embeddings_are_as_described(tokenizer: Tokenizer, described: dict[str, Any], served: Served) -> None:
    conformity, engine = Conformity(described), EngineConfig(model=str(served.state.engine_config.model), runner="pooling")
    with serve_in_thread(FakeClient, tokenizer, engine, ServerConfig()) as one, one.http as http:
        for body in ({}, {"encoding_format": "base64"}, {"encoding_format": "float", "dimensions": 2, "input": ["ab", "cd"]}):
            response = http.post("/v1/embeddings", json={"input": "hello", **body})
            assert response.status_code == 200, response.text
            conformity.check(response, "post", "/v1/embeddings")
        for path in ("/v1/completions", "/v1/chat/completions"):
            conformity.check(http.post(path, json=OPERATIONS[f"POST {path}"].example), "post", path)


USAGE = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
ASKED: list[tuple[str, dict[str, Any]]] = [
    *[(path, dict(one.example)) for path, one in ((route.split()[1], one) for route, one in OPERATIONS.items()) if one.example],
    ("/v1/completions", {"prompt": ["ab", "cd"], "n": 2, "logprobs": 2, "echo": True, "max_tokens": 2}),
    ("/v1/completions", {"prompt": [5, 6], "prompt_logprobs": 1, "return_token_ids": True, "max_tokens": 2}),
    ("/v1/completions", {"prompt": [5, 6], "n": 2, "best_of": 3, "max_tokens": 2}),
    ("/v1/completions", {"prompt": "ab", "max_tokens": 0, "echo": True, "logprobs": 0}),
    ("/v1/chat/completions", {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "n": 2, "max_tokens": 2}),
    ("/v1/chat/completions", {"messages": HELLO, "prompt_logprobs": 1, "return_token_ids": True, "max_tokens": 2}),
    ("/v1/chat/completions", {"messages": HELLO, "stop": "s", "seed": 1, "user": "me"}),
    ("/tokenize", {"messages": HELLO, "return_token_strs": True}),
    ("/tokenize", {"content": "ab"}),
    ("/tokenize", {"content": "ab", "with_pieces": True}),
    ("/reset_prefix_cache", {}),
]
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {}),
    ("/v1/completions", {"prompt": "a", "model": "other"}),
    ("/v1/chat/completions", {"messages": HELLO, "temperature": -1}),
    ("/tokenize", {}),
    ("/detokenize", {"tokens": [1000]}),
]


@pytest.mark.parametrize("ready", [True, False])
def test_answers_are_as_described(tokenizer: Tokenizer, described: dict[str, Any], served: Served, ready: bool) -> None:
    conformity, done = Conformity(described), set[str]()
    engine, client = EngineConfig(model=str(served.state.engine_config.model)), FakeClient(state="ready" if ready else "loading")
    server = ServerConfig(served_model_name=("tiny",), allow_runtime_lora_updating=True)
    with serve_in_thread(lambda: client, tokenizer, engine, server) as one, one.http as http:
        for path, body in ASKED:
            operation = OPERATIONS[f"POST {path}"]
            for more in ({}, {"stream": True}, {"stream": True, **USAGE})[: 1 + 2 * bool(operation.events)]:
                response = http.post(path, json={**body, **more})
                refused = more and (path == "/v1/messages" or "best_of" in body or "prompt_logprobs" in body)
                refused = refused or path == "/v1/embeddings"  # of a model that generates text
                assert response.status_code in ((200, 400) if refused else (200,)) if ready else (503, 400), response.text
                conformity.check(response, "post", path)
                done.add(f"POST {path}")
        for path, body in REFUSED:
            conformity.check(http.post(path, json=body), "post", path)
        for route in OPERATIONS:
            method, path = route.split()
            if method == "GET":
                filled = path.replace("{model:path}", "tiny")
                conformity.check(http.get(filled), "get", path.replace(":path}", "}"))
                done.add(route)
        kept = http.post("/v1/responses", json={"input": "hello", "max_output_tokens": 2}).json().get("id", "none")
        for method, rest in (("get", ""), ("get", "/input_items"), ("post", "/cancel"), ("delete", ""), ("delete", "")):
            response = http.request(method, f"/v1/responses/{kept}{rest}")
            assert response.status_code in ((200, 400, 404) if ready else (404,)), response.text
            conformity.check(response, method, f"/v1/responses/{{response_id}}{rest}")
            done.add(f"{method.upper()} /v1/responses/{{response_id}}{rest}")
        conformity.check(http.delete("/v1/requests/none"), "delete", "/v1/requests/{request_id}")
        conformity.check(http.get("/logs?after=x"), "get", "/logs")
        for what in ("load", "load", "unload", "unload"):  # which the first time are done
            path = f"/v1/{what}_lora_adapter"
            conformity.check(response := http.post(path, json={"lora_name": "sql", "lora_path": "/"}), "post", path)
            again = f"POST {path}" in done
            assert not ready or response.status_code in ((400, 404) if again else (200,)), response.text
            done.add(f"POST {path}")
        for path in ("/v1/models/load", "/v1/models/unload"):  # tests/server/test_models.py has a server that may
            conformity.check(http.post(path, json={"model": "tiny"}), "post", path)
            done.add(f"POST {path}")
    assert done | {"DELETE /v1/requests/{request_id:path}"} == OPERATIONS.keys(), "a route that nobody asks"


HEADS: dict[str, tuple[int, dict[str, str]]] = {  # what no route sees, since something before it answers
    "no key": (401, {}),
    "a name of elsewhere": (403, {"host": "evil.example"}),
    "a page of elsewhere": (403, {"sec-fetch-site": "cross-site", "origin": "https://evil.example"}),
    "two lengths": (400, {"content-length": "2", "transfer-encoding": "chunked"}),
    "many headers": (431, {f"x-{k}": "" for k in range(100)}),
    "a limit": (429, {"authorization": "Bearer sk-limited"}),
    "a fault": (500, {}),
}


@pytest.mark.parametrize("why", HEADS)
async def test_what_comes_before_a_route_is_described_too(
    why: str, tokenizer: Tokenizer, described: dict[str, Any], served: Served, tmp_path: Path
) -> None:
    (status, headers), keys = HEADS[why], tmp_path / "keys.toml"
    keys.write_text(f'one = {{ sha256 = "{sha256(b"sk-limited").hexdigest()}", requests_per_minute = 1 }}')
    server = ServerConfig(api_key_file=str(keys) if status in (401, 429) else None)
    app = create_app(FakeClient(), tokenizer, EngineConfig(model=str(served.state.engine_config.model)), server)
    if why == "a fault":
        app.router.middleware_stack = fail
    conformity, exempt = Conformity(described), PUBLIC if status in (401, 403, 429) else ()
    methods = {"a limit": ("POST",), "a page of elsewhere": ("POST", "DELETE")}.get(why, ("GET", "POST", "DELETE"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
        await http.post("/tokenize", headers=headers)
        for method, path in (route.split() for route in OPERATIONS):
            response = await http.request(method, re.sub("{.*?}", "x", path), headers=headers)
            conformity.check(response, method.lower(), path.replace(":path}", "}"))
            assert (response.status_code == status) is (method in methods and path not in exempt), (method, path)


async def fail(scope: Any, receive: Any, send: Any) -> None:
    raise RuntimeError("nobody foresaw this")


def test_what_is_aborted_is_answered_as_described(slow: Served, described: dict[str, Any]) -> None:
    body = {"model": "tiny", "max_tokens": 400, "messages": HELLO, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool, slow.http as http:
        answer = pool.submit(slow.post, "/v1/messages", **body)
        eventually(lambda: slow.state.jobs)
        (job,) = slow.state.jobs
        http.delete(f"/v1/requests/{job.request_id}")
        assert answer.result().status_code == 499
    Conformity(described).check(answer.result(), "post", "/v1/messages")


def test_a_check_of_answers_can_fail(described: dict[str, Any]) -> None:
    class Answer:
        status_code, headers, text = 200, {"content-type": "application/json"}, ""

        def json(self) -> Any:
            return {"version": "1", "more": 2}

    with pytest.raises(jsonschema.ValidationError):
        Conformity(described).check(Answer(), "get", "/version")


def test_it_needs_a_key_where_there_are_keys(tokenizer: Tokenizer, served: Served) -> None:
    engine = EngineConfig(model=str(served.state.engine_config.model))
    with serve_in_thread(FakeClient, tokenizer, engine, ServerConfig(api_key=("secret",))) as one, one.http as http:
        assert http.get("/openapi.json").status_code == 401
        assert http.get("/openapi.json", headers={"Authorization": "Bearer secret"}).json()["security"] == [
            {"bearer": []},
            {"x-api-key": []},
        ]


def test_schemathesis(served: Served, described: dict[str, Any]) -> None:
    """A few requests for each route, the same ones each time; scripts/fuzz_api sends many."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings

    from tests.server import fuzz

    schema = schemathesis.openapi.from_dict(json.loads(json.dumps(described)))
    left_out = [schemathesis.checks.CHECKS.get_one(fuzz.LEFT_OUT)]
    served_once = set()
    quiet = settings(derandomize=True, database=None, phases=[Phase.generate], suppress_health_check=[*HealthCheck])
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in schemathesis.GenerationMode if operation.body else [schemathesis.GenerationMode.POSITIVE]:

            @settings(quiet, max_examples=4 if operation.body else 1)
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                response = case.call(base_url=served.url)
                served_once.add((case.operation.label, response.status_code))
                case.validate_response(response, excluded_checks=left_out)

            ask()
    posts = {route for route, operation in OPERATIONS.items() if operation.example}
    answered = {label for label, status in served_once if status == 200}
    assert len(posts & answered) * 2 >= len(posts), "requests that get nowhere prove little"
