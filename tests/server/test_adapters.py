"""LoRA adapters as a client sees them: models of their own, in every route, which come and go while the server runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from anthropic import Anthropic

from appliance.config import EngineConfig, ServerConfig
from appliance.core.messages import RequestStat, Stats
from appliance.text.tokenizer import Tokenizer
from tests.server.conftest import Served, serve_in_thread
from tests.server.fake import FakeClient, info
from tests.server.test_lifecycle import eventually
from tests.server.test_metrics import one, read

HELLO: Any = [{"role": "user", "content": "hello"}]


class Adapted(FakeClient):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.adapters = {"sql": "/adapters/sql", "org/tone": "/adapters/tone"}
        self.info = replace(info(), max_loras=4, adapters=tuple(self.adapters))


@pytest.fixture
def adapted(tokenizer: Tokenizer, model_dir: Path, tmp_path: Path) -> Iterator[Served]:
    modules = ("sql=/adapters/sql", '{"name": "org/tone", "path": "/adapters/tone", "base_model_name": "any"}')
    engine = EngineConfig(model=str(model_dir), enable_lora=True, lora_modules=modules)
    server = ServerConfig(
        served_model_name=("tiny", "alias/of-tiny"), allow_runtime_lora_updating=True, audit_log=str(tmp_path / "audit")
    )
    with serve_in_thread(Adapted, tokenizer, engine, server) as served:
        yield served


def asked(served: Served) -> str:
    return served.client.submitted[-1].adapter


def test_a_request_names_an_adapter_as_its_model(adapted: Served) -> None:
    client = adapted.openai
    for model, adapter, told in (("sql", "sql", "sql"), ("org/tone", "org/tone", "org/tone"), ("alias/of-tiny", "", "tiny")):
        answers: list[Any] = [
            client.completions.create(model=model, prompt="hello", max_tokens=3),
            client.chat.completions.create(model=model, messages=HELLO, max_tokens=3),
            client.responses.create(model=model, input="hello", max_output_tokens=3),
        ]
        answers += client.completions.create(model=model, prompt="hello", max_tokens=3, stream=True)
        answers += client.chat.completions.create(model=model, messages=HELLO, max_tokens=3, stream=True)
        assert {answer.model for answer in answers} == {told}
        assert [submit.adapter for submit in adapted.client.submitted[-5:]] == [adapter] * 5
        assert client.responses.retrieve(answers[2].id).model == told, "as it is kept"
    assert asked(adapted) == "" and adapted.post("/v1/completions", prompt="hello").json()["model"] == "tiny"


def test_anthropics_client(adapted: Served) -> None:
    client = Anthropic(base_url=adapted.url, api_key="none", max_retries=0)
    answer = client.messages.create(model="sql", max_tokens=3, messages=HELLO)
    assert answer.model == "sql" == asked(adapted)
    with client.messages.stream(model="sql", max_tokens=3, messages=HELLO) as stream:
        assert stream.get_final_message().model == "sql" == asked(adapted)
    assert client.messages.count_tokens(model="sql", messages=HELLO).input_tokens > 0
    assert {"tiny", "sql", "org/tone"} <= {one.id for one in client.models.list()}
    assert client.models.retrieve("org/tone").display_name == "org/tone"


def test_embeddings_of_an_adapter(tokenizer: Tokenizer, model_dir: Path) -> None:
    engine = EngineConfig(model=str(model_dir), runner="pooling", lora_modules=("sql=/adapters/sql",))
    with serve_in_thread(Adapted, tokenizer, engine, ServerConfig(served_model_name=("tiny",))) as served:
        assert served.openai.embeddings.create(model="sql", input="hello").model == "sql" == asked(served)
        assert served.openai.embeddings.create(model="tiny", input="hello").model == "tiny" and asked(served) == ""


def test_routes_of_text_and_of_the_server_take_the_name_too(adapted: Served) -> None:
    plain, own = (adapted.post("/tokenize", model=name, prompt="hello").json() for name in ("tiny", "sql"))
    assert plain == own and adapted.post("/detokenize", model="sql", tokens=own["tokens"]).json()["prompt"]
    assert adapted.post("/v1/responses/input_tokens", model="sql", input="hello").status_code == 200
    with adapted.http as http:
        assert http.get("/stats", params={"model": "sql"}).json()["model"] == "tiny"
        assert http.get("/tokenizer_info", params={"model": "sql"}).status_code == 200
        assert http.post("/reset_prefix_cache", params={"model": "sql"}).json() == {"success": True}


def test_names_that_are_none(adapted: Served) -> None:
    with pytest.raises(openai.NotFoundError, match=r"`sq` does not exist\. .* has: tiny, alias/of-tiny, sql, org/tone") as e:
        adapted.openai.completions.create(model="sq", prompt="hello")
    assert (e.value.code, e.value.param) == ("model_not_found", "model")
    adapted.client.adapters.clear()  # as one that is unloaded in this moment
    with pytest.raises(openai.NotFoundError, match="there is no LoRA adapter 'sql'") as e:
        adapted.openai.completions.create(model="sql", prompt="hello")
    assert (e.value.code, e.value.param) == ("model_not_found", "model")


def test_they_are_among_the_models(adapted: Served, model_dir: Path) -> None:
    cards = {card.id: card for card in adapted.openai.models.list()}
    assert list(cards) == ["tiny", "alias/of-tiny", "sql", "org/tone"]
    told = {name: (card.root, card.parent, card.max_model_len, card.status) for name, card in cards.items()}  # type: ignore[attr-defined]
    assert told["alias/of-tiny"] == told["tiny"] == (str(model_dir), None, 512, "ok")
    assert told["sql"] == ("/adapters/sql", "tiny", 512, "ok") and told["org/tone"][0] == "/adapters/tone"
    assert adapted.openai.models.retrieve("org/tone") == cards["org/tone"]


def test_load_and_unload(adapted: Served, tmp_path: Path) -> None:
    directory = tmp_path / "new"
    directory.mkdir()
    loaded = adapted.post("/v1/load_lora_adapter", lora_name="new", lora_path=str(directory))
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'new' added successfully.")
    assert adapted.client.adapters["new"] == str(directory) == adapted.openai.models.retrieve("new").root  # type: ignore[attr-defined]
    assert adapted.openai.completions.create(model="new", prompt="hello", max_tokens=2).model == "new" == asked(adapted)
    for name in ("new", "sql"):
        gone = adapted.post("/v1/unload_lora_adapter", lora_name=name, lora_int_id=3)
        assert (gone.status_code, gone.text) == (200, f"Success: LoRA adapter '{name}' removed successfully.")
        assert adapted.post("/v1/completions", model=name, prompt="hello").status_code == 404
        error = adapted.post("/v1/unload_lora_adapter", lora_name=name)
        assert error.status_code == 404 and error.json()["error"]["code"] == "model_not_found"
    assert [card.id for card in adapted.openai.models.list()] == ["tiny", "alias/of-tiny", "org/tone"]
    assert list(adapted.client.adapters) == ["org/tone"]
    assert adapted.post("/load_lora_adapter", lora_name="new", lora_path=str(directory)).status_code == 200, "as SGLang's"


def test_load_in_place(adapted: Served, tmp_path: Path) -> None:
    body = {"lora_name": "sql", "lora_path": str(tmp_path)}
    error = adapted.post("/v1/load_lora_adapter", **body)
    assert error.status_code == 400 and "load_inplace true loads it anew" in error.json()["error"]["message"]
    assert adapted.post("/v1/load_lora_adapter", **body, load_inplace=True).status_code == 200
    assert adapted.client.adapters["sql"] == str(tmp_path) == adapted.openai.models.retrieve("sql").root  # type: ignore[attr-defined]
    adapted.client.refuses = "it has rank 64"
    error = adapted.post("/v1/load_lora_adapter", lora_name="sql", lora_path="/", load_inplace=True)
    assert error.status_code == 400 and adapted.openai.models.retrieve("sql").root == str(tmp_path)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"lora_name": "tiny", "lora_path": "/"}, "lora_name", "a model's name"),
        ({"lora_name": "alias/of-tiny", "lora_path": "/", "load_inplace": True}, "lora_name", "a model's name"),
        ({"lora_name": "a b", "lora_path": "/"}, "lora_name", "printable ASCII without spaces"),
        ({"lora_name": "", "lora_path": "/"}, "lora_name", "printable ASCII"),
        ({"lora_name": "new", "lora_path": "org/adapter"}, "lora_path", "no such directory on the server's machine"),
        ({"lora_name": "new", "lora_path": "\0"}, "lora_path", "no such directory"),
        ({"lora_name": "new"}, "lora_path", "lora_path is required"),
        ({"lora_name": 3, "lora_path": "/"}, "lora_name", "lora_name"),
    ],
)
def test_what_cannot_be_loaded(adapted: Served, body: dict[str, Any], param: str, words: str) -> None:
    before = dict(adapted.client.adapters)
    response = adapted.post("/v1/load_lora_adapter", **body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param and words in error["message"], error
    assert adapted.client.adapters == before


def test_the_engines_refusals_are_told(adapted: Served) -> None:
    adapted.client.refuses = "2 LoRA adapters are loaded, and --max-loras is 2"
    response = adapted.post("/v1/load_lora_adapter", lora_name="new", lora_path="/")
    assert response.status_code == 400 and response.json()["error"]["message"] == adapted.client.refuses
    with adapted.http as http:
        assert http.get("/v1/models/new").status_code == 404
    assert adapted.post("/v1/load_lora_adapter", lora_name="new", lora_path="/", model="other").status_code == 404
    adapted.run(adapted.client.die, "exit code -9")
    response = adapted.post("/v1/load_lora_adapter", lora_name="new", lora_path="/")
    assert response.status_code == 503 and response.json()["error"]["code"] == "engine_dead"


def test_only_where_the_option_says_so(served: Served) -> None:
    for path, body in (("load", {"lora_name": "a", "lora_path": "/"}), ("unload", {"lora_name": "a"})):
        response = served.post(f"/v1/{path}_lora_adapter", **body)
        assert response.status_code == 404 and "--allow-runtime-lora-updating" in response.json()["error"]["message"]


def test_an_adapter_is_unloaded_by_its_own_route(adapted: Served) -> None:
    response = adapted.post("/v1/models/unload", model="sql")
    assert response.status_code == 400
    assert "/v1/unload_lora_adapter" in response.json()["error"]["message"]


def test_the_audit_log_has_the_name_that_was_asked_for(adapted: Served, tmp_path: Path) -> None:
    adapted.post("/v1/completions", model="sql", prompt="hello", max_tokens=2)
    adapted.post("/v1/load_lora_adapter", lora_name="new", lora_path="/")
    adapted.post("/v1/unload_lora_adapter", lora_name="new")
    log = tmp_path / "audit"
    eventually(lambda: log.exists() and len(log.read_text().splitlines()) == 3)
    rows = [json.loads(row) for row in log.read_text().splitlines()]
    assert [row["model"] for row in rows] == ["sql", "new", "new"]
    assert rows[1]["endpoint"] == "POST /v1/load_lora_adapter"


def test_metrics_and_stats_name_them(adapted: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    request = RequestStat("a", 0, "running", 1, 1, 1, 1, 0.0, 0, adapter="sql")

    async def stats() -> Stats:
        return Stats(running=1, requests_now=(request,), adapters_running=("org/tone", "sql"), adapters_waiting=("sql",))

    monkeypatch.setattr(adapted.client, "stats", stats)
    with adapted.http as http:
        found = read(http.get("/metrics").text)
        engine = http.get("/stats").json()["engine"]
    labels = {"max_lora": "4", "running_lora_adapters": "org/tone,sql", "waiting_lora_adapters": "sql"}
    assert one(found, "vllm:lora_requests_info", **labels) > 1.7e9, "the time, by which readers know the latest"
    assert engine["requests_now"][0]["adapter"] == "sql" and engine["adapters_running"] == ["org/tone", "sql"]


def test_without_adapters_there_is_no_metric_of_them(served: Served) -> None:
    with served.http as http:
        assert not re.search("^vllm:lora_requests_info{", http.get("/metrics").text, re.MULTILINE)
