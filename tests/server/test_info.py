"""Models, health, version, metrics, stats, tokenize; the defaults from generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from appliance.config import EngineConfig, ServerConfig
from appliance.server.app import create_app
from appliance.text.tokenizer import Tokenizer
from appliance.version import __version__
from quant.errors import InputError
from tests.server.conftest import Served, serve_in_thread
from tests.server.fake import FakeClient

KINDS = {f"appliance:memory_{which}_bytes": "category" for which in ("plan", "found")}
KINDS |= {"appliance:kv_blocks_copied_total": "way"}


def test_models(served: Served) -> None:
    with served.http as http:
        listed = http.get("/v1/models").json()
        assert listed["object"] == "list" and [m["id"] for m in listed["data"]] == ["tiny", "alias/of-tiny"]
        assert listed["data"][0]["max_model_len"] == 512
        assert http.get("/v1/models/alias/of-tiny").json() == listed["data"][1]
        assert http.get("/v1/models/other").status_code == 404


def test_health_and_version(served: Served) -> None:
    with served.http as http:
        for path in ("/health", "/v1/health", "/ready", "/ping"):
            assert http.get(path).json() == {"status": "ok"}
        assert http.get("/version").json() == {"version": __version__}
        assert http.get("/load").json() == {"server_load": 0}


def test_health_of_an_engine_that_is_stuck(slow: Served) -> None:
    """Each question has it say something, and what came of the last one is told."""
    with slow.http as http:
        assert http.get("/health").status_code == 200 and slow.client.nudges == 1
        slow.client.stuck = True
        answer = http.get("/health")
        assert answer.status_code == 503 and answer.headers["retry-after"] and slow.client.nudges == 2
        assert answer.json()["status"] == "stuck" and answer.json()["error"]["code"] == "engine_stuck"
        assert http.get("/ping").status_code == 200
        slow.client.stuck = False
        assert http.get("/health").json() == {"status": "ok"}


def test_stats(served: Served) -> None:
    with served.http as http:
        stats = http.get("/stats").json()
    known = {"version", "model", "state", "uptime_s", "loading", "info", "engine", "latency", "hardware", "models"}
    assert set(stats) == known
    assert stats["models"] == [{"name": "tiny", "names": ["tiny", "alias/of-tiny"], "state": "ok", "bytes": None, "waiting": 0}]
    assert stats["model"] == "tiny" and stats["state"] == "ok" and stats["info"]["max_model_len"] == 512
    assert stats["engine"]["blocks_total"] == 64 and stats["engine"]["steps"] == 7


def test_reset_prefix_cache(served: Served) -> None:
    response = served.post("/reset_prefix_cache")
    assert response.status_code == 200 and response.json() == {"success": True} and served.client.resets == 1


def test_tokenize_both_forms(served: Served) -> None:
    assert served.post("/tokenize", prompt="ab").json() == {
        "count": 3,
        "max_model_len": 512,
        "tokens": [1, 68, 69],
        "token_strs": None,
    }
    bare = served.post("/tokenize", prompt="ab", add_special_tokens=False, return_token_strs=True).json()
    assert bare["tokens"] == [68, 69] and bare["token_strs"] == ["a", "b"]
    chat = served.post("/tokenize", messages=[{"role": "user", "content": "a"}]).json()
    assert chat["count"] == len("user: a\nassistant:") + 1
    assert served.post("/tokenize", content="ab").json() == {"tokens": [68, 69]}
    pieces = served.post("/tokenize", content="ab", add_special=True, with_pieces=True).json()
    assert pieces["tokens"][1:] == [{"id": 68, "piece": "a"}, {"id": 69, "piece": "b"}]
    assert served.post("/detokenize", tokens=[68, 69]).json() == {"prompt": "ab", "content": "ab"}
    for path, body in (("/tokenize", {}), ("/tokenize", {"prompt": "a", "content": "a"}), ("/detokenize", {"tokens": [99]})):
        assert served.post(path, **body).status_code == 400


def test_metrics(tokenizer: Tokenizer, model_dir: Path) -> None:
    config = ServerConfig(served_model_name=("tiny",))
    with serve_in_thread(FakeClient, tokenizer, EngineConfig(model=str(model_dir)), config) as served:
        served.post("/v1/completions", prompt="abc", max_tokens=5, n=2)
        served.post("/v1/completions", prompt=[68, 2], max_tokens=5)
        with served.http as http:
            text = http.get("/metrics").text
    families = list(text_string_to_metric_families(text))
    samples = {
        (s.name, s.labels.get("finished_reason") or s.labels.get("le")): s.value
        for family in families
        for s in family.samples
        if s.labels.get("model_name") == "tiny" and s.labels["engine"] == "0"
    }
    for prefix in ("appliance:", "vllm:"):
        assert samples[f"{prefix}request_success_total", "length"] == 2
        assert samples[f"{prefix}request_success_total", "stop"] == 1
        assert samples[f"{prefix}time_to_first_token_seconds_count", None] == 3
        assert samples[f"{prefix}inter_token_latency_seconds_count", None] == 4 + 4 + 1
        assert samples[f"{prefix}e2e_request_latency_seconds_bucket", "0.3"] == 3
        assert samples[f"{prefix}request_prompt_tokens_sum", None] == 4 + 4 + 2
        assert samples[f"{prefix}request_generation_tokens_sum", None] == 5 + 5 + 2
        assert samples[f"{prefix}generation_tokens_total", None] == 12
        assert samples[f"{prefix}kv_cache_usage_perc", None] == 0
        assert samples[f"{prefix}num_requests_running", None] == 0
        assert (f"{prefix}num_preemptions_total", None) in samples
        assert samples[f"{prefix}num_requests_waiting", None] == 1 and samples[f"{prefix}num_requests_swapped", None] == 2
        assert samples[f"{prefix}cpu_cache_usage_perc", None] == 0.4
        for old in ("", "gpu_"):
            assert samples[f"{prefix}{old}prefix_cache_queries_total", None] == 100
            assert samples[f"{prefix}{old}prefix_cache_hits_total", None] == 40
    expected = {"prefix_cache_host_hits_total": 8, "kv_blocks_kept": 5, "swap_blocks": 10, "swap_blocks_used": 4}
    expected |= {"swap_blocks_kept": 1, "num_swaps_total": 6}
    assert {name: samples[f"appliance:{name}", None] for name in expected} == expected
    kinds = {s.name: {} for family in families for s in family.samples if s.name in KINDS}
    for sample in (s for family in families for s in family.samples if s.name in KINDS):
        kinds[sample.name][sample.labels[KINDS[sample.name]]] = sample.value
    assert kinds["appliance:kv_blocks_copied_total"] == {"out": 9, "in": 0, "copy": 2}
    assert kinds["appliance:memory_plan_bytes"] == {"weights": 7, "runtime": 3}
    assert kinds["appliance:memory_found_bytes"] == {"weights": 7, "kv_cache": 9}
    assert samples["appliance:kv_blocks", None] == samples["appliance:kv_blocks_free", None] == 64
    assert "process_resident_memory_bytes" in text


def test_generation_config(tokenizer: Tokenizer, tmp_path: Path) -> None:
    settings = {"temperature": 0.6, "top_p": 0.9, "top_k": None, "eos_token_id": 2, "repetition_penalty": 1.1}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    engine = EngineConfig(model=str(tmp_path))
    with serve_in_thread(FakeClient, tokenizer, engine, ServerConfig()) as served:
        served.post("/v1/completions", prompt="a", max_tokens=1)
        params = served.client.submitted[-1].params
        assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0.6, 0.9, 0, 1.1)
        served.post("/v1/completions", prompt="a", max_tokens=1, temperature=0, top_p=None)
        params = served.client.submitted[-1].params
        assert (params.temperature, params.top_p) == (0, 0.9)
    with serve_in_thread(FakeClient, tokenizer, engine, ServerConfig(generation_config="appliance")) as served:
        served.post("/v1/completions", prompt="a", max_tokens=1)
        assert served.client.submitted[-1].params.temperature == 1.0


@pytest.mark.parametrize("content", ["{", "[]", '{"temperature": -1}', '{"top_p": "x"}'])
async def test_bad_generation_config(tokenizer: Tokenizer, tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(InputError, match=r"generation_config\.json: .*--generation-config appliance"):
        create_app(FakeClient(), tokenizer, EngineConfig(model=str(tmp_path)), ServerConfig())
    with pytest.raises(InputError, match="is 'auto' or 'appliance', got 'none'"):
        create_app(FakeClient(), tokenizer, EngineConfig(model=str(tmp_path)), ServerConfig(generation_config="none"))
