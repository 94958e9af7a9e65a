"""``serve --models FILE`` as a user starts it, an engine that is stuck, and one that dies again and again: real processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from appliance.memory.text import size_text
from tests.processes import gone
from tests.server.test_lifecycle import eventually
from tests.server.test_real import FLAGS, Running, started
from tests.tiny_model import Shape, make_checkpoint

SMALL = FLAGS[:-2]  # the memory is shared out
STUCK = {"prompt": "abc", "max_tokens": 3800, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("one", "two"):
        make_checkpoint(folder / name, shape=Shape(max_len=4096), seed=len(name) + ord(name[0]))
    return folder


def states(http: httpx.Client) -> dict[str, str]:
    return {card["id"]: card["status"] for card in http.get("/v1/models").json()["data"]}


def ask(http: httpx.Client, model: str | None) -> httpx.Response:
    return http.post("/v1/completions", json={"model": model, "prompt": "hello", "max_tokens": 4, "temperature": 0})


def written(http: httpx.Client, model: str, **kwargs: str) -> str:
    """What the chat template makes of a mood."""
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "chat_template_kwargs": kwargs}
    ids = http.post("/tokenize", json=body).json()["tokens"]
    return str(http.post("/detokenize", json={"model": model, "tokens": ids}).json()["prompt"]).removesuffix("hello")


def engines(running: Running) -> list[psutil.Process]:
    return psutil.Process(running.process.pid).children()


def test_two_models_of_which_one_fits_at_a_time(folder: Path) -> None:
    file = folder / "turns.toml"
    file.write_text(
        '[one]\nmodel = "one"\nkv_cache_memory_bytes = "4M"\naliases = ["first"]\n'
        '[two]\nmodel = "two"\nkv_cache_memory_bytes = "8M"\nmax_model_len = 256\n'
    )
    total = psutil.virtual_memory().total
    with started("--models", str(file), *SMALL, "--gpu-memory-utilization", f"{600 * 2**20 / total:.4f}") as running:
        assert any("Together fit: one; two" in line for line in running.output), running.output
        with running.http as http:
            assert states(http) == {"one": "ok", "first": "ok", "two": "unloaded"}
            asked = {name: http.post("/tokenize", json={"model": name, "prompt": "a"}).json() for name in ("two", "one")}
            assert {name: told["max_model_len"] for name, told in asked.items()} == {"two": 256, "one": 4096}
            alien = {"model": "two", "tokens": [10**6]}
            refused = http.post("/detokenize", json=alien).json()
            assert states(http)["two"] == "unloaded" and "the vocabulary has ids 0 to" in refused["error"]["message"]
            first = ask(http, "first")
            assert first.json()["model"] == "one" == ask(http, None).json()["model"]
            assert ask(http, "two").json()["model"] == "two"
            assert http.post("/detokenize", json=alien).json() == refused, "what the plan knew, the engine says"
            assert states(http) == {"one": "unloaded", "first": "unloaded", "two": "ok"} and len(engines(running)) == 1
            assert http.get("/health").status_code == 200
            both = [threading.Thread(target=lambda name=name: answers.append(ask(http, name))) for name in ("one", "two", "one")]
            answers: list[httpx.Response] = []
            for thread in both:
                thread.start()
            for thread in both:
                thread.join(60)
            assert sorted(one.json()["model"] for one in answers) == ["one", "one", "two"]
            assert [one.json()["choices"] for one in answers if one.json()["model"] == "one"] == [first.json()["choices"]] * 2
            assert ask(http, "three").status_code == 404
        running.process.send_signal(signal.SIGTERM)
        assert running.ended() == 0


def test_two_models_that_fit_together(folder: Path) -> None:
    file = folder / "both.toml"
    file.write_text(
        '[one]\nmodel = "one"\n[two]\nmodel = "two"\nload = "demand"\nidle_unload = 1.5\n'
        """default_chat_template_kwargs = '{"mood": "high"}'\n"""
    )
    template = "{% if mood %}<{{ mood }}>{% endif %}{{ messages[0].content }}"
    with started("--models", str(file), "--chat-template", template, *SMALL) as running, running.http as http:
        assert any("All of them fit together" in line for line in running.output), running.output
        assert states(http) == {"one": "ok", "two": "unloaded"}
        budget = http.get("/stats").json()["info"]["plan"]["budget_bytes"]
        assert any(line.startswith(f"Budget {size_text(budget)}: ") for line in running.output), (budget, running.output)
        families = text_string_to_metric_families(http.get("/metrics").text)
        planned = [one for family in families for one in family.samples if one.labels.get("category") == "budget"]
        assert [one.value for one in planned] == [budget]
        assert http.post("/models/load", json={"model": "two"}).json() == {"success": True, "model": "two", "status": "ok"}
        assert len(engines(running)) == 2 and states(http) == {"one": "ok", "two": "ok"}
        assert ask(http, "one").json()["choices"] != ask(http, "two").json()["choices"]
        said = [written(http, "one"), written(http, "two"), written(http, "two", mood="low")]
        assert said == ["", "<high>", "<low>"], "what one model's template is told by default, and what a request says"
        eventually(lambda: states(http) == {"one": "ok", "two": "unloaded"})
        eventually(lambda: len(engines(running)) == 1)
        told = [line for line in running.output if "loaded on demand" in line or "it is unloaded" in line]
        assert len(told) == 2 and not any(line.rstrip().endswith("]") for line in told), "these are no request's lines"
        assert http.post("/models/unload", json={"model": "one"}).json()["status"] == "unloaded"
        assert not engines(running) and http.get("/health").status_code == 200
        assert http.post("/v1/models/unload", json={"model": "three"}).status_code == 404
        running.process.send_signal(signal.SIGTERM)
        assert running.ended() == 0


def test_an_engine_that_is_stuck_or_dies_is_started_again_but_not_for_ever(folder: Path) -> None:
    with started(str(folder / "one"), *FLAGS, "--engine-step-timeout", "3") as running, running.http as http:
        stuck = running.engine
        with http.stream("POST", "/v1/completions", json={**STUCK, "stream": True}) as response:
            lines = response.iter_lines()
            assert next(lines)
            os.kill(stuck.pid, signal.SIGSTOP)
            begun = time.monotonic()
            *_, error, done = [line for line in lines if line]
        assert "the engine is stuck: it has work, but uses no processor time since" in error and done == "data: [DONE]"
        assert time.monotonic() - begun < 30
        for _ in range(2):
            eventually(lambda: http.get("/health").status_code == 200, 60)
            (engine,) = engines(running)
            assert engine.pid != stuck.pid and ask(http, None).status_code == 200
            engine.send_signal(signal.SIGKILL)
            eventually(lambda engine=engine: gone(engine))
            eventually(lambda engine=engine: running.process.poll() is not None or engines(running) != [engine])
        assert running.ended() == 1
    assert any("the engine died 3 times in a row" in line and "exit code -9" in line for line in running.output), running.output[
        -5:
    ]
