"""Embeddings of the demo model, which was not made for them, as other people's clients get them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import httpx
import pytest
from langchain_openai import OpenAIEmbeddings
from openai import OpenAI

from appliance import LLM
from tests.clients.conftest import FLAGS, Description
from tests.server.test_real import Running, started

TEXTS = ["The cat sat on the mat.", "A dog in the fog", "x", "Once upon a time " * 20]


@pytest.fixture(scope="module")
def embedding() -> Iterator[Running]:
    with started(*FLAGS, "--runner", "pooling", "--dtype", "float32") as one:
        yield one


def test_the_openai_client(embedding: Running, description: Description) -> None:
    http = httpx.Client(trust_env=False, event_hooks={"response": [description.check]})
    with OpenAI(base_url=f"{embedding.url}/v1", api_key="none", max_retries=0, http_client=http) as client:
        answer = client.embeddings.create(model="demo", input=TEXTS, encoding_format="float")
        short = client.embeddings.create(model="demo", input=TEXTS[0], encoding_format="float", dimensions=8)
    found = [one.embedding for one in answer.data]
    assert all(math.isclose(math.hypot(*vector), 1.0, abs_tol=1e-5) for vector in found)
    norm = math.hypot(*found[0][:8])
    assert short.data[0].embedding == pytest.approx([one / norm for one in found[0][:8]], abs=1e-6)
    llm = LLM("demo", dtype="float32", threads=1, kv_cache_memory_bytes=20_000_000, runner="pooling")
    for vector, output in zip(found, llm.embed(TEXTS, use_tqdm=False), strict=True):
        assert vector == pytest.approx(output.outputs.embedding, abs=2e-6)
    with embedding.http as http_client:
        engine = http_client.get("/stats").json()["engine"]
    assert engine["blocks_used"] == 0 and engine["generation_tokens"] == 0 and engine["finished"]["stop"] == len(TEXTS) + 1


def test_langchain(embedding: Running, description: Description) -> None:
    http = httpx.Client(trust_env=False, event_hooks={"response": [description.check]})
    model = OpenAIEmbeddings(
        model="demo",
        base_url=f"{embedding.url}/v1",
        api_key="none",  # type: ignore[arg-type]
        http_client=http,
        check_embedding_ctx_length=False,  # else it splits texts into tokens of OpenAI's
        chunk_size=3,
    )
    many = model.embed_documents(TEXTS)
    assert len(many) == len(TEXTS) and model.embed_query(TEXTS[1]) == pytest.approx(many[1], abs=1e-6)
    if description.components is not None:
        assert "CreateEmbeddingResponse" in description.seen
    assert any("with model demo for embeddings: up to" in line for line in embedding.output)
