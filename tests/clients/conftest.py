"""A server as a user starts it, of the demo model, which other people's clients talk to."""

from __future__ import annotations

import base64
import json
import os
from array import array
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
import yaml
from openai import OpenAI

from tests.conftest import SHARED
from tests.server.test_openai import EVENTS as OF_RESPONSES
from tests.server.test_openai import nullable
from tests.server.test_real import Running, started

# The demo model's own template, with tools as Hermes' and Qwen's models write them.
TEMPLATE = """<|bos|>{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}{% for m in messages %}<|{{ m.role }}|>\
{{ m.content | trim }}\
{% for c in m.tool_calls or [] %}<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\
</tool_call>{% endfor %}{% if not (continue_final_message and loop.last) %}<|end|>{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
FLAGS = ("--port", "0", "--threads", "1", "--kv-cache-memory-bytes", "20000000")
EVENTS = {"/v1/completions": "CreateCompletionResponse", "/v1/chat/completions": "CreateChatCompletionStreamResponse"}
ANSWERS = {
    "/v1/completions": "CreateCompletionResponse",
    "/v1/chat/completions": "CreateChatCompletionResponse",
    "/v1/embeddings": "CreateEmbeddingResponse",
    "/v1/responses": "Response",
}


class Description:
    """OpenAI's own, of what it answers; none where the folder of real data is absent."""

    def __init__(self) -> None:
        path = SHARED / "openai" / "openapi.yaml"
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        self.components = nullable(yaml.load(path.read_text(), Loader=loader)["components"]) if path.is_file() else None
        self.seen: list[str] = []

    def check(self, response: httpx.Response) -> None:
        """An httpx hook: reads the answer, all of it, and validates it."""
        response.read()
        path = response.request.url.path
        if self.components is None or path not in ANSWERS:
            return
        if response.status_code != 200:
            return self._validate("ErrorResponse", response.json())
        if response.headers["content-type"].startswith("application/json"):
            return self._validate(ANSWERS[path], response.json())
        for line in response.text.splitlines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                self._validate(OF_RESPONSES[event["type"]] if path == "/v1/responses" else EVENTS[path], event)

    def _validate(self, name: str, value: Any) -> None:
        if name == "CreateCompletionResponse":
            value = {**value, "choices": [_described(one) for one in value["choices"]]}
            if value.get("usage", {}) is None:  # as its words have it: null in all chunks but the last one
                del value["usage"]
        if name == "CreateEmbeddingResponse":
            value = {**value, "data": [{**one, "embedding": _numbers(one["embedding"])} for one in value["data"]]}
        self.seen.append(name)
        schema = {"$ref": f"#/components/schemas/{name}", "components": self.components}
        jsonschema.Draft202012Validator(schema).validate(value)


def _described(choice: dict[str, Any]) -> dict[str, Any]:
    """Without the nulls that OpenAI sends, and does not describe: no reason in chunks, no score of a prompt's first token."""
    found = {**choice, "finish_reason": choice["finish_reason"] or "stop"}
    if scored := choice["logprobs"]:
        begin = 1 if scored["token_logprobs"][:1] == [None] else 0
        found["logprobs"] = {name: values[begin:] for name, values in scored.items()}
    return found


def _numbers(embedding: str | list[float]) -> list[float]:
    """As OpenAI's client reads them: that they may come in base64 is not described."""
    return embedding if isinstance(embedding, list) else array("f", base64.b64decode(embedding)).tolist()


@pytest.fixture(scope="session")
def description() -> Description:
    return Description()


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    template = tmp_path_factory.mktemp("template") / "tools.jinja"
    template.write_text(TEMPLATE)
    os.environ.pop("OPENAI_API_KEY", None)
    with started(*FLAGS, "--chat-template", str(template)) as one:
        yield one


@pytest.fixture(scope="session")
def client(live: Running, description: Description) -> Iterator[OpenAI]:
    """OpenAI's client; what it gets is validated on its way."""
    http = httpx.Client(trust_env=False, event_hooks={"response": [description.check]})
    with OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=60, http_client=http) as one:
        yield one


@pytest.fixture(scope="session")
def live_client(live: Running) -> Iterator[OpenAI]:
    """The same without the validation, which would read all of a stream before the client sees its beginning."""
    with OpenAI(
        base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=60, http_client=httpx.Client(trust_env=False)
    ) as one:
        yield one


def used(live: Running) -> int:
    with live.http as http:
        engine = http.get("/stats").json()["engine"]
        return int(engine["blocks_used"]) + int(engine["running"])
