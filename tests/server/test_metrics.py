"""Metrics: against known courses of requests, of a real server that has answered some, and the dashboard file against those."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from appliance.config import EngineConfig, ServerConfig
from appliance.core.messages import COUNTERS, Event, Stats, continued
from appliance.core.params import SamplingParams
from appliance.memory.devices import allowed_processors, cpu_threads
from appliance.runtime.pace import NICE
from appliance.server.machine_metrics import machine
from appliance.server.metrics import Course, HttpMetrics, Metrics
from appliance.server.scrape import ENGINE, Model, Scrape
from appliance.text.tokenizer import Tokenizer
from tests.server.conftest import Served, serve_in_thread
from tests.server.fake import FakeClient, info
from tests.server.test_lifecycle import eventually

ROOT = Path(__file__).resolve().parents[2]
BOARD = json.loads((ROOT / "docs/grafana/appliance.json").read_text())
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(text: str) -> Samples:
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names)), "a family may come once only"
    samples = [(s.name, frozenset(s.labels.items()), s.value) for family in families for s in family.samples]
    assert len({pair[:2] for pair in samples}) == len(samples), "a series may come once only"
    return {(name, labels): value for name, labels, value in samples}


def one(samples: Samples, name: str, /, **labels: str) -> float:
    (value,) = [v for (n, have), v in samples.items() if n == name and labels.items() <= dict(have).items()]
    return value


def scraped(*models: Model, http: HttpMetrics | None = None, vllm: bool = True, look: dict[str, Any] | None = None) -> Samples:
    return read(Scrape(http or HttpMetrics(), vllm=vllm).text(models, look or {}).decode())


def model(metrics: Metrics, stats: Stats | None = None, status: str = "ok") -> Model:
    return Model(metrics, stats or Stats(), info(), status, {})


def test_where_the_time_of_a_request_went() -> None:
    metrics = Metrics("m")
    course = Course(begun=100.0)
    metrics.tokens(course, Event("r", 0, (1,), scheduled=101.5, cached_tokens=6), 102.0)
    for now, preemptions in ((102.5, 0), (104.0, 2)):
        metrics.tokens(course, Event("r", 0, (1,), preemptions=preemptions), now)
    metrics.finished("stop", course, 104.25, prompt_tokens=10, output_tokens=3)
    metrics.answered(SamplingParams(n=2, max_tokens=50), 7)
    expected = {
        "time_to_first_token_seconds": (1, 2.0),
        "inter_token_latency_seconds": (2, 2.0),
        "time_per_output_token_seconds": (2, 2.0),
        "e2e_request_latency_seconds": (1, 4.25),
        "request_queue_time_seconds": (1, 1.5),
        "request_prefill_time_seconds": (1, 0.5),
        "request_decode_time_seconds": (1, 2.0),
        "request_inference_time_seconds": (1, 2.5),
        "request_time_per_output_token_seconds": (1, 1.0),
        "request_prompt_tokens": (1, 10),
        "request_prefill_kv_computed_tokens": (1, 4),
        "request_generation_tokens": (1, 3),
        "request_num_preemptions": (1, 2),
        "request_max_num_generation_tokens": (1, 7),
        "request_params_max_tokens": (1, 50),
        "request_params_n": (1, 2),
    }
    samples = scraped(model(metrics))
    for prefix in ("appliance:", "vllm:"):
        for name, (count, total) in expected.items():
            assert one(samples, f"{prefix}{name}_count") == count, name
            assert one(samples, f"{prefix}{name}_sum") == pytest.approx(total), name
        assert one(samples, f"{prefix}request_queue_time_seconds_bucket", le="1.5") == 1
        assert one(samples, f"{prefix}request_queue_time_seconds_bucket", le="1.0") == 0
        assert one(samples, f"{prefix}request_success_total", finished_reason="stop") == 1


def test_a_request_that_never_ran_has_no_times_but_its_own() -> None:
    metrics = Metrics("m")
    metrics.finished("abort", Course(begun=100.0), 99.0, prompt_tokens=10, output_tokens=0)  # a clock was set back, too
    samples = scraped(model(metrics))
    assert (
        one(samples, "vllm:e2e_request_latency_seconds_count") == 1 and one(samples, "vllm:e2e_request_latency_seconds_sum") == 0
    )
    for name in ("queue_time", "prefill_time", "decode_time", "inference_time"):
        assert one(samples, f"vllm:request_{name}_seconds_count") == 0
    assert one(samples, "vllm:request_success_total", finished_reason="abort") == 1


def test_steps_by_their_tokens() -> None:
    sizes = {0: 5, 3: 2, 4: 1, 11: 4, 20: 1}  # of 1, up to 8, up to 16, up to 2048 and of a million tokens
    samples = scraped(model(Metrics("m"), Stats(step_sizes=sizes, step_tokens=999)))
    found = {float(dict(k[1])["le"]): v for k, v in samples.items() if k[0] == "vllm:iteration_tokens_total_bucket"}
    assert found[1] == 5 and found[8] == 7 and found[16] == 8 and found[1024] == 8 and found[2048] == 12
    assert found[16384] == 12 and found[float("inf")] == 13 == one(samples, "vllm:iteration_tokens_total_count")
    assert one(samples, "vllm:iteration_tokens_total_sum") == 999


def test_all_counters_go_on_with_another_engine() -> None:
    """And nothing else does."""
    parts: dict[str, Any] = {"step_sizes": {3: 2}, "finished": {"stop": 2}, "copied_blocks": {"in": 2}}
    counted: dict[str, Any] = {name: parts.get(name, 2) for name in COUNTERS}
    earlier, now = Stats(running=5, time=7.0, **counted), Stats(running=1, time=3.0, **counted)
    both = continued(earlier, now)
    assert (both.running, both.time, both.copied_blocks, both.step_sizes) == (1, 3.0, {"in": 4}, {3: 4})
    for kind, name, _, value, _ in ENGINE:
        assert value(both) == value(now) * (2 if kind == "counter" else 1), name
        assert kind == "gauge" or value(now), name
    assert continued(Stats(), now) == now == continued(now, Stats(running=1, time=3.0))


def test_several_models_share_families() -> None:
    first, second = Metrics("first"), Metrics("second")
    second.tokens(Course(0.0), Event("r", 0, (1,)), 1.0)
    second.restarts = 3
    samples = scraped(model(first), model(second, Stats(running=4), "unloaded"))
    assert one(samples, "vllm:time_to_first_token_seconds_count", model_name="second") == 1
    assert one(samples, "vllm:time_to_first_token_seconds_count", model_name="first") == 0
    assert one(samples, "appliance:num_requests_running", model_name="second") == 4
    assert one(samples, "appliance:engine_restarts_total", model_name="second") == 3
    assert one(samples, "appliance:engine_state", model_name="second", state="unloaded") == 1
    assert one(samples, "vllm:engine_sleep_state", model_name="second", sleep_state="awake") == 0
    assert one(samples, "vllm:engine_sleep_state", model_name="first", sleep_state="awake") == 1


def test_names_of_models_are_no_names_of_metrics() -> None:
    samples = scraped(model(Metrics('appliance:odd"name\n')))
    assert one(samples, "vllm:num_requests_running", model_name='appliance:odd"name\n') == 0


SOURCES = ("local_compute", "local_cache_hit", "external_kv_transfer")


def test_prompt_tokens_mean_what_they_do_in_vllm() -> None:
    """Those found in the cache are in its count of prompt tokens; ours is of those computed."""
    samples = scraped(model(Metrics("m"), Stats(prompt_tokens=70, prefix_hits=30, prefix_host_hits=12, waiting=5, held=2)))
    assert one(samples, "appliance:prompt_tokens_total") == 70 and one(samples, "vllm:prompt_tokens_total") == 100
    source = {name: one(samples, "vllm:prompt_tokens_by_source_total", source=name) for name in SOURCES}
    assert source == {"local_compute": 70, "local_cache_hit": 18, "external_kv_transfer": 12}
    assert one(samples, "vllm:prompt_tokens_cached_total") == 30
    assert one(samples, "vllm:prompt_tokens_cached_by_source_total", source="device") == 18
    assert one(samples, "vllm:prompt_tokens_cached_by_source_total", source="host") == 12
    assert one(samples, "vllm:num_requests_waiting_by_reason", reason="capacity") == 3
    assert one(samples, "vllm:num_requests_waiting_by_reason", reason="deferred") == 2


def test_without_vllms_names(tokenizer: Tokenizer, model_dir: Path) -> None:
    config = ServerConfig(vllm_metrics=False)
    with serve_in_thread(FakeClient, tokenizer, EngineConfig(model=str(model_dir)), config) as served, served.http as http:
        text = http.get("/metrics").text
    names = {name for name, _ in read(text)}
    assert names and not [name for name in names if name.startswith(("vllm:", "http_"))]
    assert "appliance:num_requests_running" in names and "process_cpu_seconds_total" in names


def test_errors_by_kind(served: Served) -> None:
    with served.http as http:
        before = read(http.get("/metrics").text)
        http.post("/v1/completions", json={"prompt": "a", "max_tokens": 10**6})
        http.post("/v1/completions", json={"prompt": "a", "top_p": 7})
        http.post("/v1/completions", json={"prompt": "a", "model": "absent"})
        http.get("/absent/1")
        http.get("/absent/2")
        http.request("BREW", "/v1/completions")
        served.client.fail_at = 0
        http.post("/v1/completions", json={"prompt": "a"})
        served.client.fail_at = 2
        http.post("/v1/completions", json={"prompt": "a", "stream": True, "max_tokens": 9})
        served.client.fail_at = None
        eventually(lambda: served.state.shared.http.errors[200, "engine_error"])  # a stream's is counted when it is over
        after = read(http.get("/metrics").text)
    grown = {(n, tuple(sorted(labels))): v - before.get((n, labels), 0) for (n, labels), v in after.items()}
    errors = {(dict(k)["status"], dict(k)["code"]): v for (n, k), v in grown.items() if n == "appliance:http_errors_total" and v}
    assert errors == {
        ("400", "context_length_exceeded"): 1,
        ("400", "invalid_request_error"): 1,
        ("404", "model_not_found"): 1,
        ("404", "not_found"): 2,
        ("405", "method_not_allowed"): 1,
        ("500", "engine_error"): 1,
        ("200", "engine_error"): 1,
    }
    answers = {tuple(v for _, v in k): v for (n, k), v in grown.items() if n == "appliance:http_requests_total" and v}
    assert answers["none", "GET", "404"] == 2 and answers["/v1/completions", "POST", "400"] == 2
    assert [key for key in answers if key[1] == "other"], "made-up methods are one series"
    theirs = {tuple(v for _, v in k): v for (n, k), v in grown.items() if n == "http_requests_total" and v}
    assert theirs["/v1/completions", "POST", "4xx"] == 3 and theirs["/v1/completions", "POST", "5xx"] == 1


def test_how_long_answers_took() -> None:
    http = HttpMetrics()
    for seconds in (0.05, 0.3, 200.0):
        http.answered("POST", "/v1/completions", 200, seconds)
    http.answered("GET", "/health", 503, 0.01)
    samples = scraped(model(Metrics("m")), http=http)
    for name in ("appliance:http_request_duration_seconds", "http_request_duration_seconds"):
        assert one(samples, f"{name}_sum", handler="/v1/completions", method="POST") == pytest.approx(200.35)
        mine = {
            dict(k[1])["le"]: v for k, v in samples.items() if k[0] == f"{name}_bucket" and ("handler", "/v1/completions") in k[1]
        }
        assert mine["0.1"] == 1 and mine["0.5"] == mine["10.0"] == 2 and mine["+Inf"] == 3
    assert one(samples, "appliance:http_requests_total", handler="/health", status="503") == 1
    probes = [labels for name, labels in samples if name.startswith("http_request") and ("handler", "/health") in labels]
    assert not probes, "vLLM leaves them out"


CARD = {
    "index": 0,
    "name": "NVIDIA L4",
    "utilization": 0.5,
    "memory_utilization": None,
    "memory_used_bytes": 7,
    "memory_total_bytes": 9,
}
CARD |= {
    "process_bytes": 5,
    "temperature_c": 66,
    "power_w": 71.5,
    "power_limit_w": 72.0,
    "sm_clock_mhz": 1200,
    "memory_clock_mhz": 6251,
}
CARD |= {"throttle_reasons": ["sw_power_cap"]}


def test_the_machine() -> None:
    cpu = {"utilization": 0.25, "cores": 2, "threads": 4, "load": [1.0, 2.0, 3.0], "temperature_c": None}
    memory = {"total_bytes": 100, "available_bytes": 40, "swap_total_bytes": 0, "swap_used_bytes": 0}
    process = {"server": {"cpu_cores": 0.5, "rss_bytes": 10}, "engine": {"cpu_cores": None, "rss_bytes": None}}
    look = {"cpu": cpu, "memory": memory, "processes": process, "gpus": [CARD, {**CARD, "index": 1, "utilization": None}]}
    samples = scraped(model(Metrics("m")), look=look)
    assert one(samples, "appliance:cpu_utilization") == 0.25 and one(samples, "appliance:cpu_load", minutes="5") == 2
    assert one(samples, "appliance:host_memory_available_bytes") == 40
    assert one(samples, "appliance:process_cpu_cores", process="server") == 0.5
    assert one(samples, "appliance:gpu_utilization", gpu="0", name="NVIDIA L4") == 0.5
    assert (
        one(samples, "appliance:gpu_sm_clock_hertz", gpu="1") == 1.2e9
        and one(samples, "appliance:gpu_power_watts", gpu="0") == 71.5
    )
    assert one(samples, "appliance:gpu_throttled", gpu="0", reason="sw_power_cap") == 1
    unsaid = ("cpu_temperature_celsius", "gpu_memory_utilization")
    assert not [name for name, _ in samples if name.removeprefix("appliance:") in unsaid], "what is not known is not 0"
    assert list(machine({})) == []


NVML = """
import types, pynvml
def says(answer): return lambda *args: answer
for name, answer in {
    "Init": None, "DeviceGetCount": 1, "DeviceGetHandleByIndex": 0, "DeviceGetName": "NVIDIA L4", "DeviceGetUUID": "GPU-1",
    "DeviceGetUtilizationRates": types.SimpleNamespace(gpu=87, memory=40), "DeviceGetPowerUsage": 71500,
    "DeviceGetMemoryInfo": types.SimpleNamespace(used=7, total=23), "DeviceGetEnforcedPowerLimit": 72000,
    "DeviceGetTemperature": 66, "DeviceGetClockInfo": 1200, "DeviceGetMaxClockInfo": 2040,
    "DeviceGetCurrentClocksEventReasons": 4,
}.items():
    setattr(pynvml, "nvml" + name, says(answer))
class Any(int):
    def __eq__(self, other): return True
    def __hash__(self): return 0
import os
def held(handle):
    children = [pid for task in os.listdir("/proc/self/task") for pid in open(f"/proc/self/task/{task}/children").read().split()]
    return [types.SimpleNamespace(pid=int(pid), usedGpuMemory=5) for pid in children]
pynvml.nvmlDeviceGetComputeRunningProcesses = held
import psutil
psutil.sensors_temperatures = lambda: {"coretemp": [types.SimpleNamespace(current=61.0)]}
"""


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """/metrics and /stats of the command itself, after requests of several kinds, on a machine that seems to have a card."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(NVML)
    command = [sys.executable, "-m", "appliance", "serve", "--port", "0", "--swap-space", "0.01"]
    env = {"PYTHONPATH": f"{folder}:{ROOT}", "PATH": "/usr/bin:/bin", "HOME": str(folder), "APPLIANCE_LOG_LEVEL": "warning"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    output: list[str] = []
    reader = threading.Thread(target=lambda: output.extend(process.stdout or ()), daemon=True)
    reader.start()
    try:
        eventually(lambda: any("ready at" in line for line in output) or process.poll() is not None, 60)
        found = re.search(r"ready at (http://[\d.:]+)/v1", "".join(output))
        assert found, output
        with httpx.Client(base_url=found[1], timeout=30, trust_env=False) as http:
            told = {"answers": ask(http), "metrics": http.get("/metrics").text, "stats": http.get("/stats").json()}
            nices = [psutil.Process(process.pid).nice(), *(engine.nice() for engine in engines(process.pid))]
            os.kill(told["stats"]["hardware"]["processes"]["engine"]["pid"], signal.SIGKILL)
            eventually(lambda: http.get("/health").status_code == 503)
            eventually(lambda: http.get("/health").status_code == 200, 60)
            nices += [engine.nice() for engine in engines(process.pid)]
            yield {**told, "later": http.get("/metrics").text, "nices": nices}
    finally:
        process.terminate()
        process.wait(20)
        reader.join(5)


def engines(server: int) -> list[psutil.Process]:
    return [one for one in psutil.Process(server).children() if "appliance.runtime.worker" in one.cmdline()]


def ask(http: httpx.Client) -> list[dict[str, Any]]:
    bodies: list[dict[str, Any]] = [
        {"prompt": "Once upon a time there was a", "max_tokens": 12, "n": 3, "temperature": 1.0, "seed": 1, "ignore_eos": True},
        {"prompt": "Once upon a time there was a", "max_tokens": 5, "ignore_eos": True},
        {"prompt": ["One", "Two"], "max_tokens": 4, "ignore_eos": True},
        {"prompt": "Tell", "max_tokens": 40, "ignore_eos": True, "stop": ["e", "a", " "], "temperature": 0.0},
        {"prompt": "One", "max_tokens": 6, "use_beam_search": True, "n": 2, "temperature": 0.0},
    ]
    answers = [http.post("/v1/completions", json=body) for body in bodies]
    assert [answer.status_code for answer in answers] == [200] * len(bodies)
    assert http.post("/v1/completions", json={"prompt": "a", "top_p": 7}).status_code == 400
    return [answer.json() for answer in answers]


def test_what_a_real_server_says_adds_up(real: dict[str, Any]) -> None:
    samples, stats = read(real["metrics"]), real["stats"]
    reasons = [choice["finish_reason"] for answer in real["answers"] for choice in answer["choices"]]
    assert reasons.count("stop") >= 1, "a stop string ended one"
    generated = sum(answer["usage"]["completion_tokens"] for answer in real["answers"])
    for prefix in ("vllm:", "appliance:"):
        ended = {
            r: one(samples, f"{prefix}request_success_total", finished_reason=r) for r in ("stop", "length", "abort", "error")
        }
        assert ended == {"stop": reasons.count("stop"), "length": reasons.count("length"), "abort": 0, "error": 0}
        assert {k: v for k, v in stats["engine"]["finished"].items() if v} == {k: v for k, v in ended.items() if v}
        assert one(samples, f"{prefix}request_generation_tokens_sum") == generated
        for name in ("queue_time", "prefill_time", "decode_time", "inference_time"):
            assert one(samples, f"{prefix}request_{name}_seconds_count") == len(reasons), name
        times = {
            n: one(samples, f"{prefix}request_{n}_seconds_sum")
            for n in ("queue_time", "prefill_time", "decode_time", "inference_time")
        }
        assert all(value >= 0 for value in times.values())
        assert times["prefill_time"] + times["decode_time"] == pytest.approx(times["inference_time"])
        assert times["queue_time"] + times["inference_time"] <= one(samples, f"{prefix}e2e_request_latency_seconds_sum") + 1e-6
        assert (
            one(samples, f"{prefix}request_params_n_count") == 6
            and one(samples, f"{prefix}request_params_n_sum") == 3 + 1 + 2 + 1 + 2
        )
    steps = one(samples, "vllm:iteration_tokens_total_count")
    assert steps == one(samples, "appliance:engine_steps_total") == stats["engine"]["steps"] > 10
    assert one(samples, "vllm:iteration_tokens_total_sum") == stats["engine"]["step_tokens"] > steps
    prompts = one(samples, "vllm:prompt_tokens_total")
    assert (
        prompts
        == stats["engine"]["prompt_tokens"] + stats["engine"]["prefix_hits"]
        > one(samples, "vllm:prompt_tokens_cached_total")
        > 0
    )
    assert one(samples, "appliance:engine_state", state="ok") == 1
    assert one(samples, "appliance:build_info", device="cpu", quantization="awq") == 1
    assert one(samples, "vllm:cache_config_info", block_size="16", enable_prefix_caching="True") == 1


def test_an_engine_that_dies_is_counted_and_counts_go_on(real: dict[str, Any]) -> None:
    before, after = read(real["metrics"]), read(real["later"])
    assert one(before, "appliance:engine_restarts_total") == 0 and one(after, "appliance:engine_restarts_total") == 1
    for name, labels in before:
        if name.startswith("vllm:request_") or name == "vllm:time_to_first_token_seconds_count":
            assert after[name, labels] == before[name, labels], name
    steps = [one(samples, "appliance:engine_steps_total") for samples in (before, after)]
    assert 0 < steps[0] <= steps[1], "what the engine before had counted is counted on"
    assert (
        one(after, "appliance:http_errors_total", code="engine_dead")
        + one(after, "appliance:http_errors_total", code="model_loading")
        > 0
    )


# All that vLLM 0.33 documents and names that it had, but single guesses, other nodes, and samples of blocks.
# (What it has of adapters is there where a server has some: tests/server/test_adapters.py.)
VLLM = """
    num_requests_running num_requests_waiting num_requests_waiting_by_reason kv_cache_usage_perc engine_sleep_state
    cache_config_info prompt_tokens_total prompt_tokens_cached_total prompt_tokens_by_source_total generation_tokens_total
    request_success_total num_preemptions_total prefix_cache_queries_total prefix_cache_hits_total admission_rejections_total
    spec_decode_num_drafts_total spec_decode_num_draft_tokens_total spec_decode_num_accepted_tokens_total
    gpu_cache_usage_perc cpu_cache_usage_perc num_requests_swapped gpu_prefix_cache_queries_total gpu_prefix_cache_hits_total
"""
VLLM_HISTOGRAMS = """
    time_to_first_token_seconds inter_token_latency_seconds request_time_per_output_token_seconds e2e_request_latency_seconds
    request_queue_time_seconds request_inference_time_seconds request_prefill_time_seconds request_decode_time_seconds
    iteration_tokens_total request_prompt_tokens request_generation_tokens request_max_num_generation_tokens
    request_params_max_tokens request_params_n request_prefill_kv_computed_tokens request_num_preemptions
    time_per_output_token_seconds
"""


def test_all_of_vllms_names_are_there(real: dict[str, Any]) -> None:
    names = {name for name, _ in read(real["metrics"])}
    wanted = {f"vllm:{name}" for name in VLLM.split()}
    wanted |= {f"vllm:{name}_{part}" for name in VLLM_HISTOGRAMS.split() for part in ("bucket", "sum", "count")}
    assert wanted - names == set() and "http_requests_total" in names


# The dashboard file.
TOKEN = re.compile(
    r"\s+|(?P<text>\"[^\"]*\")|(?P<number>\d+(?:\.\d+)?(?:e\d+)?)|(?P<variable>\$\w+)|(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)"
    r"|(?P<sign>=~|!~|!=|==|>=|<=|[-+*/=(){}\[\],<>])"
)
FUNCTIONS = {"rate", "increase", "changes", "sum", "max", "min", "avg", "count", "histogram_quantile", "label_values"}
TARGET = {"instance", "job"}  # labels that Prometheus itself adds


def parse(expression: str) -> list[tuple[str, set[str], set[str], str]]:
    """Of each selector: (metric, its matchers' labels, labels of the ``by`` before it, function around it). Raises ValueError."""
    tokens, place = [], 0
    while place < len(expression):
        match = TOKEN.match(expression, place)
        if match is None:
            raise ValueError(f"not PromQL at {expression[place:]!r}")
        place = match.end()
        if match.lastgroup:
            tokens.append((match.lastgroup, match[0]))
    found: list[tuple[str, set[str], set[str], str]] = []
    stack: list[str] = []
    by: set[str] = set()
    k = 0
    while k < len(tokens):
        kind, value = tokens[k]
        after = tokens[k + 1][1] if k + 1 < len(tokens) else ""
        if value in "([{":
            stack.append(tokens[k - 1][1] if value == "(" and k and tokens[k - 1][0] == "name" else value)
        elif value in ")]}":
            if not stack:
                raise ValueError("a bracket too many")
            stack.pop()
        elif kind == "name" and value == "by":
            end = next(j for j in range(k, len(tokens)) if tokens[j][1] == ")")
            by = {v for kd, v in tokens[k + 1 : end] if kd == "name"}
            k = end
        elif kind == "name" and value in FUNCTIONS:
            if after != "(" and after != "by":
                raise ValueError(f"{value} is a function")
        elif kind == "name":
            labels: set[str] = set()
            if after == "{":
                end = next(j for j in range(k, len(tokens)) if tokens[j][1] == "}")
                labels = {tokens[j][1] for j in range(k + 2, end) if tokens[j][0] == "name"}
                k = end
            found.append((value, labels, by, next((f for f in reversed(stack) if f in FUNCTIONS), "")))
        k += 1
    if stack:
        raise ValueError(f"unclosed: {stack}")
    return found


EXPRESSIONS = [(p["title"], t) for p in BOARD["panels"] for t in p.get("targets", ())]


def test_the_parser_sees_what_is_wrong() -> None:
    assert parse('sum by (le) (rate(a:b_bucket{x=~"$y"}[$__rate_interval])) / 2e3') == [("a:b_bucket", {"x"}, {"le"}, "rate")]
    for bad in ("sum(a", "a)", "sum a", "a # b", "a{x='y'}"):
        with pytest.raises(ValueError):
            parse(bad)


@pytest.fixture(scope="module")
def series(real: dict[str, Any]) -> tuple[dict[str, set[str]], dict[str, str]]:
    """The labels that each metric has, and its type."""
    labels: dict[str, set[str]] = {}
    for name, have in read(real["metrics"]):
        labels.setdefault(name, set()).update(dict(have))
    return labels, {s.name: f.type for f in text_string_to_metric_families(real["metrics"]) for s in f.samples}


@pytest.mark.parametrize(("title", "target"), EXPRESSIONS, ids=[f"{t}-{x['refId']}" for t, x in EXPRESSIONS])
def test_the_dashboard_asks_for_what_there_is(
    series: tuple[dict[str, set[str]], dict[str, str]], title: str, target: dict[str, Any]
) -> None:
    labels, types = series
    for metric, matched, by, function in parse(target["expr"]):
        assert metric in labels, f"{title}: there is no {metric}"
        known = labels[metric] | TARGET
        assert matched <= known and by <= known, f"{title}: {metric} has {sorted(known)}"
        counts = types[metric] == "counter" or (types[metric] == "histogram" and metric.endswith(("_bucket", "_sum", "_count")))
        assert counts == (function in ("rate", "increase")), f"{title}: {metric} is a {types[metric]}"
        assert metric.endswith("_bucket") == ("le" in by) == ("histogram_quantile" in target["expr"])
        shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        assert shown <= (by or known)


def test_a_number_has_its_series_in_the_values_that_are_asked_for(real: dict[str, Any]) -> None:
    """``state="ok"`` and the like: values that the labels really have."""
    values: dict[str, set[str]] = {}
    for _, have in read(real["metrics"]):
        for label, value in have:
            values.setdefault(label, set()).add(value)
    for title, target in EXPRESSIONS:
        for label, wanted in re.findall(r'(\w+)=~?"([^"$]+)"', target["expr"]):
            for value in wanted.split("|"):
                assert [v for v in values[label] if re.fullmatch(value, v)], f"{title}: no {label} is {value}"


def test_grafana_can_take_the_dashboard() -> None:
    assert BOARD["schemaVersion"] >= 39 and BOARD["id"] is None and BOARD["uid"] and BOARD["title"]
    variables = {v["name"]: v for v in BOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    ids = [p["id"] for p in BOARD["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["description"] and panel["datasource"]["uid"] == "${datasource}"
        refs = [t["refId"] for t in panel["targets"]]
        assert len(refs) == len(set(refs)) and all(t["datasource"]["uid"] == "${datasource}" for t in panel["targets"])
        used = {v for t in panel["targets"] for v in re.findall(r"\$(\w+)", t["expr"])} - {"__rate_interval", "__range"}
        assert used <= variables.keys()
    for name in ("instance", "model"):
        assert parse(variables[name]["definition"])[0][0] == "appliance:build_info"


def test_every_metric_is_documented(real: dict[str, Any]) -> None:
    text = (ROOT / "docs/operations.md").read_text()
    ours = {
        re.sub(r"_(bucket|sum|count)$", "", n.removeprefix("appliance:"))
        for n, _ in read(real["metrics"])
        if n.startswith("appliance:")
    }
    missing = sorted(name for name in ours if f"`{name}" not in text and f" {name}" not in text)
    assert missing == []


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")
def test_the_server_steps_aside_and_its_engines_do_not(real: dict[str, Any]) -> None:
    """Not even one that it starts later."""
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    crowded = cpu_threads(None) >= allowed_processors()
    assert real["nices"] == [max(ours, NICE) if crowded else ours, ours, ours]
