"""LoRA adapters as a user serves them: the command, a real engine, adapters as PEFT writes them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from models.spec import ModelSpec
from tests.adapters import write_adapter
from tests.processes import gone
from tests.server.test_lifecycle import eventually
from tests.server.test_metrics import read
from tests.server.test_real import FLAGS, Running, started
from tests.server.test_several import SMALL, states
from tests.tiny_model import Shape, config, make_checkpoint

SHAPE = Shape(max_len=4096)
PROMPTS = ("hello", "who are you?", "a b c", "The quick brown fox")


def adapter(directory: Path, seed: int, rank: int = 4, hidden: int = SHAPE.hidden) -> Path:
    """Large enough to change every answer."""
    spec = ModelSpec.from_config({**config(SHAPE), "hidden_size": hidden})
    return write_adapter(directory, spec, seed=seed, rank=rank, size=0.4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    make_checkpoint(folder / "model", shape=SHAPE)
    for seed, name in enumerate(("one", "two", "three")):
        adapter(folder / name, seed, rank=4 + seed)
    return folder


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    modules = ("--lora-modules", f"one={folder / 'one'}", json.dumps({"name": "two", "path": str(folder / "two")}))
    more = ("--served-model-name", "base", "--allow-runtime-lora-updating", "--max-loras", "3", *FLAGS)
    with started(str(folder / "model"), *modules, *more) as running:
        yield running


def complete(http: httpx.Client, model: str, prompt: str = PROMPTS[0], **more: Any) -> httpx.Response:
    body = {"model": model, "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True, **more}
    return http.post("/v1/completions", json=body)


def text(http: httpx.Client, model: str, prompt: str = PROMPTS[0]) -> tuple[str, str]:
    answer = complete(http, model, prompt).json()
    return answer["model"], answer["choices"][0]["text"]


def at_once(http: httpx.Client, wanted: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    found: dict[int, tuple[str, str]] = {}

    def ask(at: int) -> None:
        found[at] = text(http, *wanted[at])

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[at] for at in range(len(wanted))]


def change(http: httpx.Client, what: str, status: int = 200, **body: Any) -> str:
    response = http.post(f"/v1/{what}_lora_adapter", json=body)
    assert response.status_code == status, response.text
    return response.text


def test_in_one_batch_each_answers_as_it_does_alone(running: Running) -> None:
    wanted = [(name, prompt) for prompt in PROMPTS for name in ("base", "one", "two")]
    with running.http as http:
        alone = [text(http, *one) for one in wanted]
        assert [model for model, _ in alone] == [name for name, _ in wanted]
        for k in range(0, len(alone), 3):
            assert len({answer for _, answer in alone[k : k + 3]}) == 3, "each adapter changes the answer"
        for _ in range(2):  # of which the second finds all prompts in the cache, each of its own model
            assert at_once(http, wanted * 2) == alone * 2


def test_the_openai_client_finds_and_asks_them(running: Running, folder: Path) -> None:
    client = OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, http_client=httpx.Client(trust_env=False))
    cards = {card.id: card for card in client.models.list()}
    assert list(cards)[:3] == ["base", "one", "two"]
    assert cards["two"].root == str(folder / "two") and cards["two"].parent == "base"  # type: ignore[attr-defined]
    chat = client.chat.completions.create(model="two", messages=[{"role": "user", "content": "hello"}], max_tokens=4)
    response = client.responses.create(model="one", input="hello", max_output_tokens=4)
    assert chat.model == "two" and response.model == "one" and client.responses.retrieve(response.id).model == "one"


def test_they_come_and_go_while_it_runs(running: Running, folder: Path) -> None:
    with running.http as http:
        change(http, "load", lora_name="three", lora_path=str(folder / "three"))
        three = text(http, "three")
        assert three[0] == "three" and three[1] not in {text(http, name)[1] for name in ("base", "one", "two")}
        assert "3 LoRA adapters are loaded, and --max-loras is 3" in change(
            http, "load", 400, lora_name="x", lora_path=str(folder / "one")
        )
        change(http, "unload", lora_name="three")
        assert complete(http, "three").status_code == 404
        for name, words in (("wide", "is the adapter one of this model?"), ("deep", "has rank 64, but --max-lora-rank is 16")):
            adapter(folder / name, 3, rank=64 if name == "deep" else 4, hidden=96 if name == "wide" else SHAPE.hidden)
            assert words in change(http, "load", 400, lora_name=name, lora_path=str(folder / name))
        assert "has no adapter_config.json" in change(http, "load", 400, lora_name="x", lora_path=str(folder))
        change(http, "load", lora_name="again", lora_path=str(folder / "three"))
        assert text(http, "again")[1] == three[1]
        change(http, "unload", lora_name="again")


def test_in_place_of_another(running: Running, folder: Path) -> None:
    """What was computed with the weights before is not found by requests for those that are there now."""
    own = shutil.copytree(folder / "one", folder / "own")
    with running.http as http:
        one, two = text(http, "one")[1], text(http, "two")[1]
        change(http, "load", lora_name="own", lora_path=str(own))
        assert text(http, "own")[1] == one
        shutil.copytree(folder / "two", own, dirs_exist_ok=True)
        change(http, "load", 400, lora_name="own", lora_path=str(own))
        change(http, "load", lora_name="own", lora_path=str(own), load_inplace=True)
        assert text(http, "own")[1] == two
        (own / "adapter_model.safetensors").write_bytes(b"damaged")
        assert "cannot be read" in change(http, "load", 400, lora_name="own", lora_path=str(own), load_inplace=True)
        assert text(http, "own")[1] == two, "one that cannot be loaded takes nobody's place"
        change(http, "unload", lora_name="own")


def adapters_at_work(http: httpx.Client) -> tuple[set[str], list[str]]:
    """As metrics and dashboards have it."""
    told = [dict(labels) for name, labels in read(http.get("/metrics").text) if name == "vllm:lora_requests_info"]
    rows = http.get("/stats").json()["engine"]["requests_now"]
    return {labels["running_lora_adapters"] for labels in told}, [row["adapter"] for row in rows]


def test_requests_go_on_to_their_end(running: Running, folder: Path) -> None:
    body = {"model": "three", "prompt": PROMPTS[0], "max_tokens": 1500, "ignore_eos": True, "temperature": 0}
    with running.http as http:
        change(http, "load", lora_name="three", lora_path=str(folder / "three"))
        whole = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
        with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
            lines = stream.iter_lines()
            pieces = [next(line for line in lines if line)]
            eventually(lambda: adapters_at_work(http) == ({"three"}, ["three"]))
            change(http, "unload", lora_name="three")
            assert complete(http, "three").status_code == 404
            more = {"lora_name": "x", "lora_path": str(folder / "three")}
            assert "1 of them unloaded, but still in use" in change(http, "load", 400, **more)
            pieces += [line for line in lines if line]
        chunks = [json.loads(line.removeprefix("data: ")) for line in pieces if "[DONE]" not in line]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole
        change(http, "load", **more)
        change(http, "unload", lora_name="x")


def test_they_are_there_again_when_the_engine_has_died(running: Running, folder: Path) -> None:
    with running.http as http:
        before = [text(http, name) for name in ("base", "one", "two")]
        lost = shutil.copytree(folder / "three", folder / "lost")
        change(http, "unload", lora_name="one")
        change(http, "load", lora_name="late", lora_path=str(folder / "one"))
        change(http, "load", lora_name="lost", lora_path=str(lost))
        shutil.rmtree(lost)
        engine = running.engine
        os.kill(engine.pid, signal.SIGKILL)
        eventually(lambda: gone(engine))
        eventually(lambda: http.get("/health").status_code == 200, 60)
        assert [text(http, name)[1] for name in ("base", "late", "two")] == [answer for _, answer in before]
        assert list(states(http)) == ["base", "two", "late"]
        assert complete(http, "lost").status_code == complete(http, "one").status_code == 404
        assert any("the adapter lost cannot be loaded again, and is left out: " in line for line in running.output)


def test_adapters_of_models_that_are_loaded_on_demand(folder: Path) -> None:
    file = folder / "models.toml"
    file.write_text(
        '[plain]\nmodel = "model"\n'
        '[adapted]\nmodel = "model"\nload = "demand"\nidle_unload = 1.0\nlora_modules = ["one=one"]\nmax_loras = 2\n'
    )
    with started("--models", str(file), "--allow-runtime-lora-updating", *SMALL) as running, running.http as http:
        assert states(http) == {"plain": "ok", "adapted": "unloaded", "one": "unloaded"}
        assert text(http, "one") != text(http, "adapted") and states(http)["one"] == "ok"
        change(http, "load", lora_name="two", lora_path=str(folder / "two"))
        answers = [text(http, name) for name in ("plain", "adapted", "one", "two")]
        assert answers[0][1] == answers[1][1] and len({answer for _, answer in answers}) == 3
        eventually(lambda: states(http)["adapted"] == "unloaded")
        assert states(http) == {"plain": "ok", "adapted": "unloaded", "one": "unloaded", "two": "unloaded"}
        change(http, "unload", lora_name="one")
        assert text(http, "two") == answers[3] and complete(http, "one").status_code == 404
        assert "there is no memory for LoRA adapters" in change(http, "load", 400, lora_name="x", lora_path="/", model="plain")


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("one=/no/such/directory", "no such directory"),
        ("one=.", "has no adapter_config.json"),
        ("model=one", "a name of the model"),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_is_loaded(folder: Path, module: str, words: str) -> None:
    name, _, path = module.partition("=")
    module = f"{name}={folder / path}"
    with pytest.raises(AssertionError, match=words):  # what the command has said
        with started(str(folder / "model"), "--served-model-name", "model", "--lora-modules", module, *FLAGS):
            pass
