"""/v1/embeddings, over a client that embeds a prompt as its token ids."""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from appliance.config import EngineConfig, ServerConfig
from appliance.text.tokenizer import Tokenizer
from tests.server.conftest import Served, serve_in_thread
from tests.server.fake import FakeClient
from tests.server.test_lifecycle import eventually


@pytest.fixture(scope="module")
def embedding(tokenizer: Tokenizer, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    engine = EngineConfig(model=str(model_dir), runner="pooling")
    audit = tmp_path_factory.mktemp("audit") / "log"
    server = ServerConfig(served_model_name=("tiny",), max_prompt_tokens=20, audit_log=str(audit))
    with serve_in_thread(FakeClient, tokenizer, engine, server) as one:
        yield one


def embedded(served: Served, status: int = 200, **body: Any) -> Any:
    response = served.post("/v1/embeddings", **body)
    assert response.status_code == status, response.text
    return response.json() if status == 200 else response.json()["error"]


def test_the_openai_client(embedding: Served, tokenizer: Tokenizer) -> None:
    """It asks for base64 where nothing is said."""
    texts = ["hello", "who are you?", "a"]
    ids = [tokenizer.encode(text) for text in texts]
    client = embedding.openai
    for form in ({}, {"encoding_format": "float"}):
        answer = client.embeddings.create(model="tiny", input=texts, user="me", **form)
        assert [one.embedding for one in answer.data] == ids and [one.index for one in answer.data] == [0, 1, 2]
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids)) and answer.model == "tiny"
    assert client.embeddings.create(model="tiny", input="hello", dimensions=2).data[0].embedding == ids[0][:2]
    assert client.embeddings.create(model="tiny", input=[5, 6]).data[0].embedding == [5, 6]
    assert [one.embedding for one in client.embeddings.create(model="tiny", input=[[5], [6, 7]]).data] == [[5], [6, 7]]


def test_what_the_engine_is_asked(embedding: Served) -> None:
    raw = embedded(embedding, input=[7, 8, 9], encoding_format="base64", cache_salt="mine")["data"][0]["embedding"]
    assert struct.unpack("<3f", base64.b64decode(raw)) == (7, 8, 9)
    submit = embedding.client.submitted[-1]
    assert submit.pooling and submit.pooling.normalize and submit.pooling.dimensions is None
    assert submit.params.max_tokens == 1 and submit.cache_salt == "mine"
    embedded(embedding, input="hello", normalize=False, dimensions=3, truncate_prompt_tokens=2)
    submit = embedding.client.submitted[-1]
    assert (
        submit.pooling and not submit.pooling.normalize and submit.pooling.dimensions == 3 and len(submit.prompt_token_ids) == 2
    )


def test_many_inputs(embedding: Served) -> None:
    answer = embedded(embedding, input=[[n % 90 + 3] for n in range(2048)])
    assert [one["embedding"] for one in answer["data"]] == [[n % 90 + 3] for n in range(2048)]
    error = embedded(embedding, 400, input=[[5]] * 2049)
    assert error["param"] == "input" and "input has 2049 texts: at most 2048" in error["message"]


@pytest.mark.parametrize(
    "body, param, says",
    [
        ({}, "input", "input is required"),
        ({"input": []}, "input", "input must be text, .* got an empty list"),
        ({"input": {"text": "x"}}, "input", "input must be text"),
        ({"input": "x" * 30}, "input", "this server takes at most 20"),
        ({"input": [[5], []]}, "input", "input must be text"),
        ({"input": [98, 99]}, "input", "token id 99"),
        ({"input": [5] * 21}, "input", "this server takes at most 20"),
        ({"input": "x", "dimensions": 0}, "dimensions", "at least 1 and at most 64"),
        ({"input": "x", "dimensions": 65}, "dimensions", "its embeddings have 64 numbers"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "x", "truncation_side": "up"}, "truncation_side", "left or right"),
        ({"input": "x", "cache_salt": ""}, "cache_salt", "empty"),
        ({"input": "x", "model": "other"}, "model", "other"),
        ({"input": "x", "priority": 3}, "priority", "--scheduling-policy priority"),
        ({"input": "x", "images": ["y"]}, "images", "only texts"),
        ({"input": "x", "prompt_name": "query"}, "prompt_name", "before the text itself"),
        ({"input": "x", "embed_dtype": "float16"}, "embed_dtype", "float32"),
        ({"input": "x", "audio": {"voice": "a"}}, "audio", "only text is"),
    ],
)
def test_refused(embedding: Served, body: dict[str, Any], param: str, says: str) -> None:
    error = embedded(embedding, 404 if param == "model" else 400, **body)
    assert error["param"] == param and re.search(says, error["message"]), error


def test_an_error_of_the_engine(embedding: Served) -> None:
    embedding.client.fail_at = 0
    try:
        assert "the step failed" in embedded(embedding, 500, input=["a", "b"])["message"]
    finally:
        embedding.client.fail_at = None


def test_either_texts_or_embeddings(embedding: Served, served: Served) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "hello"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
        ("/v1/responses", {"input": "hello"}),
        ("/v1/messages", {"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": "hello"}]}),
    ):
        response = embedding.post(path, **body)
        assert response.status_code == 400 and "use /v1/embeddings" in response.json()["error"]["message"], path
    with pytest.raises(openai.BadRequestError, match="--runner pooling") as caught:
        served.openai.embeddings.create(model="tiny", input="hello")
    assert caught.value.code == "unsupported_model"
    with embedding.http as http:
        assert http.post("/embeddings", json={"input": "hello"}).status_code == 200  # a base_url without its /v1


def test_what_is_counted(embedding: Served) -> None:
    with embedding.http as http:
        before = http.get("/metrics").text
        embedded(embedding, input=[[5, 6, 7], [8]])
        after = http.get("/metrics").text

    def value(text: str, name: str) -> float:
        return next(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name) and "model" in line)

    for name in ("appliance:time_to_first_token_seconds_count", "appliance:request_params_max_tokens_count"):
        assert value(after, name) == value(before, name)  # there are no tokens
    assert value(after, "appliance:request_prompt_tokens_sum") == value(before, "appliance:request_prompt_tokens_sum") + 4
    audit = embedding.state.audit
    assert audit is not None
    eventually(lambda: '"stop","stop"]' in audit.path.read_text(), 10)
    line = json.loads(audit.path.read_text().splitlines()[-1])
    assert line["endpoint"] == "POST /v1/embeddings" and (line["prompt_tokens"], line["generated_tokens"]) == (4, 0)
