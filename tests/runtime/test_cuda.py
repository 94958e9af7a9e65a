"""The engine on an NVIDIA card; skipped where there is none."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from appliance.config import EngineConfig
from appliance.core.messages import Pooling
from appliance.runtime.engine import Engine
from tests.memory import qwen3_5
from tests.memory.published import GLM4_MOE_LITE, fill, livelier, write_published
from tests.memory.published import SMALL as MIXTURE
from tests.memory.test_gemma import SMALL, spread
from tests.runtime.conftest import answers, finish, submit
from tests.tiny_model import Shape, make_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA card")


def load(model: Path, **options: object) -> Engine:
    settings = {"device": "cuda", "dtype": "float16", "max_model_len": 256, "kv_cache_memory_bytes": 8 << 20}
    return Engine.load(EngineConfig(model=str(model), **{**settings, **options}))  # type: ignore[arg-type]


def requests(vocab: int = 256) -> list:
    rng = random.Random(3)
    return [
        submit(
            f"r{i}",
            [rng.randrange(3, vocab) for _ in range(rng.choice((1, 15, 16, 17, 40, 100)))],
            max_tokens=rng.randrange(1, 30),
        )
        for i in range(20)
    ]


def test_recorded_steps_equal_launched_ones(tiny: Path) -> None:
    """The same kernels on as many rows or more: a rare near-tie may turn over, as tiles depend on the rows."""
    recorded, launched = answers(load(tiny), requests()), answers(load(tiny, enforce_eager=True), requests())
    assert sum(recorded[key] == launched[key] for key in launched) >= len(launched) - 2


@pytest.mark.parametrize("gib", [4e-5, 1.0])
def test_streamed_layers_equal_resident_ones(tmp_path: Path, gib: float) -> None:
    """Some layers, or all, in host memory: the same kernels on the same bits."""
    deep = make_checkpoint(tmp_path, shape=Shape(layers=7))
    streamed = load(deep, cpu_offload_gb=gib)
    assert len(streamed.info.plan["offload"]["layers"]) == (3 if gib < 1 else 7)  # type: ignore[index, arg-type]
    found = answers(streamed, requests())
    streamed.reset_prefix_cache()  # a chunk that begins later has fewer rows, of which tiles round otherwise
    assert found == answers(streamed, requests()) == answers(load(deep, enforce_eager=True), requests())


@pytest.mark.parametrize("kind", ["experts", "latents", "states"])
def test_other_layers(kind: str, tmp_path: Path) -> None:
    """Recorded, launched, with its layers in host memory, and the reference's first tokens."""
    config = {"experts": MIXTURE, "latents": GLM4_MOE_LITE, "states": qwen3_5.TWO_LAYERS}[kind] | {"max_position_embeddings": 256}
    write = qwen3_5.write_qwen3_5 if kind == "states" else write_published
    model, asked = livelier(fill(write(tmp_path, config, "awq"), "awq")), requests(min(256, config["vocab_size"]))
    given = {"skip_tokenizer_init": True, "lm_head_dtype": "model"}
    recorded, launched = answers(load(model, **given), asked), answers(load(model, enforce_eager=True, **given), asked)
    assert sum(recorded[key] == launched[key] for key in launched) >= len(launched) - 2
    assert answers(load(model, cpu_offload_gb=1.0, **given), asked) == launched
    exact = answers(load(model, device="cpu", dtype="float32", reference_ops=True, **given), asked)
    assert sum(recorded[key][0] == exact[key][0] for key in exact) >= len(exact) - 2


def test_first_tokens_are_those_of_the_cpu(tiny: Path) -> None:
    ours = answers(load(tiny, lm_head_dtype="model"), requests())
    exact = answers(load(tiny, device="cpu", dtype="float32", reference_ops=True), requests())
    assert sum(ours[key][0] == exact[key][0] for key in exact) >= len(exact) - 2


def test_embeddings(tiny: Path) -> None:
    """Beside answers, in recorded steps (of prompts of one token) and others. Of random weights attention has near-ties, too."""
    asked = [replace(one, pooling=Pooling() if number % 2 else None) for number, one in enumerate(requests())]
    found = []
    for engine in (load(tiny), load(tiny, device="cpu", dtype="float32", reference_ops=True)):
        for one in asked:
            engine.submit(one)
        ends = {name: news[-1].embedding for (name, _), news in finish(engine).items() if news[-1].embedding}
        found.append({name: torch.frombuffer(bytearray(told), dtype=torch.float32) for name, told in ends.items()})
    assert len(found[0]) == 10 and found[0].keys() == found[1].keys()
    assert sum(bool(found[0][name] @ found[1][name] > 0.99) for name in found[1]) >= len(found[1]) - 2


@pytest.mark.parametrize("name", SMALL)
def test_first_tokens_of_gemma(name: str, tmp_path: Path) -> None:
    model, asked = spread(fill(write_published(tmp_path, SMALL[name], "awq"), "awq")), requests(203)
    ours = answers(load(model, dtype="auto", lm_head_dtype="model"), asked)
    exact = answers(load(model, device="cpu", dtype="float32", reference_ops=True), asked)
    assert sum(ours[key][0] == exact[key][0] for key in exact) >= len(exact) - 2


def test_sampling_and_log_probabilities_run(tiny: Path) -> None:
    engine = load(tiny)
    many = [submit(f"s{i}", [5, 6, 7 + i], temperature=0.8, top_p=0.9, seed=i, logprobs=3, prompt_logprobs=1) for i in range(6)]
    assert answers(engine, many) == answers(engine, many)
