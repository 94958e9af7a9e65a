"""LoRA adapters of an engine: each request has the one that it names, whatever stands beside it, and no other finds its cache."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from appliance.core.messages import Pooling, Submit
from appliance.core.params import RequestError
from appliance.memory.planner import make_plan
from appliance.memory.settings import ITEM_SIZE
from appliance.runtime.engine import Engine
from appliance.runtime.runner import Runner
from kernels.cpu import backend
from models.spec import ModelSpec
from quant.errors import InputError
from quant.headers import read_json
from tests.adapters import write_adapter
from tests.runtime.conftest import answers, finish, submit
from tests.runtime.fake_lane import SlowLane
from tests.runtime.test_drafts import NGRAM
from tests.runtime.test_drafts import requests as repeating

Load = Callable[..., Engine]
NAMES = ("", "a", "b")


@pytest.fixture(scope="module")
def adapters(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, spec = tmp_path_factory.mktemp("adapters"), ModelSpec.from_config(read_json(tiny / "config.json"))
    a = write_adapter(folder / "a", spec, seed=1, rank=4)
    b = write_adapter(folder / "b", spec, seed=2, rank=7, modules=("k_proj", "v_proj", "up_proj"))
    return {"a": a, "b": b}


def modules(adapters: dict[str, Path]) -> tuple[str, ...]:
    return tuple(f"{name}={path}" for name, path in adapters.items())


def having(adapter: str, one: Submit) -> Submit:
    return replace(one, adapter=adapter)


def workload(seed: int, count: int, **params: Any) -> list[Submit]:
    """Prompts that often begin alike, each with one of the adapters, or none."""
    rng = random.Random(seed)
    common = [rng.randrange(3, 256) for _ in range(40)]
    kinds: tuple[dict[str, Any], ...] = (
        {}, {"temperature": 0.9}, {"n": 2, "temperature": 1.1}, {"logprobs": 2}, {"prompt_logprobs": 1},
        {"use_beam_search": True, "n": 3, "max_tokens": 5}, {"presence_penalty": 0.7},
    )  # fmt: skip
    found = []
    for number in range(count):
        ids = common[: rng.choice((0, 16, 33, 40))] + [rng.randrange(3, 256) for _ in range(rng.randrange(1, 20))]
        settings = {"max_tokens": rng.randrange(1, 12), "seed": number, **rng.choice(kinds), **params}
        found.append(having(rng.choice(NAMES), submit(f"r{number}", ids, **settings)))
    return found


def alone(load: Load, adapters: dict[str, Path], requests: list[Submit], **options: Any) -> dict[tuple[str, int], list[int]]:
    """The answers of an engine that has nothing else to do at the same time, and remembers nothing."""
    engine = load(lora_modules=modules(adapters), enable_prefix_caching=False, **options)
    found: dict[tuple[str, int], list[int]] = {}
    for one in requests:
        found |= answers(engine, [one])
    return found


@pytest.mark.parametrize("blocks", [400, 9])
@pytest.mark.parametrize("swap", ["0", "1MiB"])
def test_answers_are_those_of_each_alone(load: Load, adapters: dict[str, Path], blocks: int, swap: str) -> None:
    """In one batch, with prefixes that are shared, in a pool so small that sequences give way, swapped or computed again."""
    options: dict[str, Any] = {"max_model_len": 96, "max_num_seqs": 7, "max_num_batched_tokens": 64}
    requests = workload(5, 40)
    expected = alone(load, adapters, requests, **options)
    size = load(**options).info.plan["kv_cache"]["block_bytes"] * blocks  # type: ignore[index, operator]
    engine = load(**options, kv_cache_memory_bytes=size, swap_space=swap, lora_modules=modules(adapters))
    assert answers(engine, requests) == expected
    assert engine.scheduler.num_preemptions > 0
    assert engine.scheduler.prompt_tokens_found > 0
    different = sum(
        answers(engine, [having(name, replace(one, request_id=f"{name}-{one.request_id}"))])
        != {(f"{name}-{key}", index): tokens for (key, index), tokens in expected.items() if key == one.request_id}
        for one in requests[:12]
        for name in NAMES
        if name != one.adapter
    )
    assert different > 12  # what an adapter adds is seen


@pytest.mark.skipif(backend.native() is None, reason="the native extension is not built")
@pytest.mark.parametrize("dtype", sorted(ITEM_SIZE))
def test_native_kernels(load: Load, adapters: dict[str, Path], dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in one batch and alone; to the reference's answers close enough that most first tokens are the same."""
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "auto")
    requests = workload(6, 30, temperature=0.0, n=1, use_beam_search=False)
    expected = alone(load, adapters, requests)
    options = {"lm_head_dtype": "model", "activation_dtype": "bf16", "reference_ops": False}
    engine = load(lora_modules=modules(adapters), dtype=dtype, **options)
    found = answers(engine, requests)
    same = sum(found[key] == told for key, told in expected.items())
    assert same == 30 if dtype == "float32" else sum(found[key][0] == told[0] for key, told in expected.items()) >= 24


def test_guesses_change_nothing(load: Load, adapters: dict[str, Path]) -> None:
    requests = [having(NAMES[number % 3], one) for number, one in enumerate(repeating(4))]
    engine, more = load(lora_modules=modules(adapters), speculative_config=NGRAM, max_num_seqs=3), {"max_num_seqs": 3}
    assert answers(engine, requests) == alone(load, adapters, requests, **more)
    assert engine.stats().drafts_right > 0


def test_a_device_of_its_own(load: Load, adapters: dict[str, Path]) -> None:
    """Steps are launched before the last one has landed, and rows that lie apart are named in the same stretch of memory."""
    options: dict[str, Any] = {"max_model_len": 96, "max_num_seqs": 7, "max_num_batched_tokens": 64}
    requests = workload(9, 40)
    expected = alone(load, adapters, requests, **options)
    engine = load(**options, lora_modules=modules(adapters))
    config = replace(_config(engine, adapters), **options)
    plan, before = make_plan(Path(engine.info.directory), config), engine.runner
    engine.runner = Runner(before.decoder, plan, device=torch.device("cpu"), lane=SlowLane())
    engine.adapters._runner = engine.runner
    engine.runner.adapters |= before.adapters
    assert engine.runner.runs_ahead
    assert answers(engine, requests) == expected


def _config(engine: Engine, adapters: dict[str, Path]) -> Any:
    from appliance.config import EngineConfig

    size = engine.info.plan["kv_cache"]["bytes"]  # type: ignore[index]
    return EngineConfig(
        model=engine.info.directory, dtype="float32", reference_ops=True, kv_cache_memory_bytes=size,
        lora_modules=modules(adapters),
    )  # fmt: skip


def test_prefixes_are_found_by_the_same_adapter_alone(load: Load, adapters: dict[str, Path]) -> None:
    engine = load(lora_modules=modules(adapters))
    ids = list(range(3, 60))

    def cached(name: str, adapter: str, salt: str = "") -> int:
        engine.submit(having(adapter, submit(name, ids, cache_salt=salt, max_tokens=1)))
        ((event,),) = finish(engine).values()
        return event.cached_tokens

    assert [cached(str(n), name) for n, name in enumerate((*NAMES, *NAMES))] == [0, 0, 0, 48, 48, 48]
    assert [cached(f"s{n}", name, "x") for n, name in enumerate(("a", "a", ""))] == [0, 48, 0]
    number = next(one.number for one in engine.runner.adapters if one.name == "a")
    assert cached("spoof", "", "\xff" + number.to_bytes(8).decode()) == 0
    engine.adapters.unload("a")
    engine.adapters.load("a", adapters["b"])  # another one of the same name
    assert cached("again", "a") == 0


def test_embeddings(load: Load, adapters: dict[str, Path]) -> None:
    engine, vectors = load(lora_modules=modules(adapters)), {}
    for name in NAMES:
        engine.submit(having(name, replace(submit(f"e{name}", range(3, 30), max_tokens=1), pooling=Pooling())))
    for (key, _), (event,) in finish(engine).items():
        vectors[key[1:]] = torch.frombuffer(bytearray(event.embedding or b""), dtype=torch.float32)
    assert len(vectors) == 3 and all(abs(float(one.norm()) - 1) < 1e-5 for one in vectors.values())
    assert all(float(vectors[x] @ vectors[y]) < 0.999 for x, y in (("", "a"), ("", "b"), ("a", "b")))


def test_who_has_an_adapter_that_is_unloaded_goes_on(load: Load, adapters: dict[str, Path]) -> None:
    first, second = (having("a", submit(f"r{n}", range(3, 20 + n), max_tokens=20)) for n in range(2))
    expected = alone(load, adapters, [first, second])
    engine = load(enable_lora=True, max_loras=1)
    assert engine.info.max_loras == 1 and engine.info.adapters == ()
    with pytest.raises(RequestError, match="no LoRA adapter 'a'") as refused:
        engine.submit(first)
    assert (refused.value.status, refused.value.param, refused.value.code) == (404, "model", "model_not_found")
    engine.adapters.load("a", adapters["a"])
    engine.submit(first)
    for _ in range(5):
        engine.step()
    engine.submit(second)  # waits
    engine.adapters.unload("a")
    with pytest.raises(RequestError, match="no LoRA adapter 'a'"):
        engine.submit(replace(first, request_id="late"))
    with pytest.raises(InputError, match="no LoRA adapter 'a'"):
        engine.adapters.unload("a")
    with pytest.raises(InputError, match="1 of them unloaded, but still in use, and --max-loras is 1"):
        engine.adapters.load("b", adapters["b"])
    told = {key: [t for event in news for t in event.token_ids] for key, news in finish(engine).items()}
    assert told["r1", 0] == expected["r1", 0] and expected["r0", 0][-len(told["r0", 0]) :] == told["r0", 0]
    engine.adapters.load("b", adapters["b"])
    assert [one.name for one in engine.runner.adapters] == ["b"]
    with pytest.raises(InputError, match="'b' is taken"):
        engine.adapters.load("b", adapters["a"])


def test_what_is_refused_names_what_was_found(load: Load, tiny: Path, tmp_path: Path) -> None:
    spec, engine = ModelSpec.from_config(read_json(tiny / "config.json")), load(enable_lora=True, max_lora_rank=8)
    number = iter(range(100))

    def refused(words: str, *, tensors: dict[str, Any] | None = None, rank: int = 4, **config: Any) -> None:
        folder = write_adapter(tmp_path / str(next(number)), spec, rank=rank, **config)
        if tensors is not None:
            path = folder / "adapter_model.safetensors"
            kept = {name: one for name, one in {**load_file(path), **tensors}.items() if one is not None}
            save_file(kept, path)
        with pytest.raises(InputError, match=words):
            engine.adapters.load("x", folder)

    q, zeros = "base_model.model.model.layers.0.self_attn.q_proj", torch.zeros(4, 64)
    refused("has rank 9, but --max-lora-rank is 8", rank=9)
    refused("has rank 9, but", rank_pattern={"q_proj": 9})
    refused("use_dora is set .DoRA", use_dora=True)
    refused("modules_to_save is set", modules_to_save=["lm_head"])
    refused("peft_type is 'IA3', but LORA alone", peft_type="IA3")
    refused("bias is 'all'", bias="all")
    refused("lora_alpha is 'x': a number", lora_alpha="x")
    refused("r is 0: a whole number", r=0)
    refused("rank_pattern is 3: an object", rank_pattern=3)
    refused(r"alpha_pattern has '\(', which is no regular expression", alpha_pattern={"(": 3})
    refused("init_lora_weights is 'pissa_niter_4', which changes", init_lora_weights="pissa_niter_4")
    refused("have rank 4, but adapter_config.json says 5", rank_pattern={"q_proj": 5})
    refused("q_proj has lora_B, but not the other matrix", tensors={f"{q}.lora_A.weight": None})
    refused(r"lora_A.weight is \[4, 65\], but \[rank, 64\] is needed", tensors={f"{q}.lora_A.weight": torch.zeros(4, 65)})
    refused("lora_A has rank 5, lora_B 4", tensors={f"{q}.lora_A.weight": torch.zeros(5, 64)})
    refused("is torch.int8: float32, float16", tensors={f"{q}.lora_A.weight": torch.zeros(4, 64, dtype=torch.int8)})
    refused("has numbers that are not finite", tensors={f"{q}.lora_A.weight": torch.full((4, 64), float("nan"))})
    other = q.replace("layers.0", "layers.7")
    refused(
        "1 tensors have no place in a LlamaForCausalLM of 2 layers.*layers.7",
        tensors={f"{other}.lora_A.weight": zeros},
    )
    refused("1 tensors have no place.*lm_head", tensors={"base_model.model.lm_head.lora_A.weight": zeros})
    for words, name, content in (
        ("cannot be read", "adapter_model.safetensors", struct.pack("<Q", 5) + b"{"),
        ("not valid JSON", "adapter_config.json", b"{"),
    ):
        folder = write_adapter(tmp_path / name, spec)
        (folder / name).write_bytes(content)
        with pytest.raises(InputError, match=words):
            engine.adapters.load("x", folder)
    with pytest.raises(InputError, match=r"has no adapter_config.json: a directory with a LoRA adapter"):
        engine.adapters.load("x", tmp_path)
    pickled = write_adapter(tmp_path / "pickled", spec)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(InputError, match="is a pickle"):
        engine.adapters.load("x", pickled)
    with pytest.raises(InputError, match="needs a name that no other has: '' is none"):
        engine.adapters.load("", tmp_path)
    with pytest.raises(InputError, match="start with --enable-lora"):
        load().adapters.load("x", pickled)
    assert not engine.runner.adapters


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("--max-loras is 0: a whole number", {"max_loras": 0}),
        ("--max-lora-rank is True", {"max_lora_rank": True}),
        ("NAME=DIRECTORY is needed", {"lora_modules": ("a",)}),
        ("NAME=DIRECTORY is needed", {"lora_modules": ("=x",)}),
        ("has no adapter_config.json", {"lora_modules": ("a=/nowhere",)}),
        ("names 'a' twice", {"lora_modules": ("a={a}", "a={b}")}),
        ("names 2 adapters, but --max-loras is 1: give at least 2", {"lora_modules": ("a={a}", "b={b}"), "max_loras": 1}),
        ("has rank 7, but --max-lora-rank is 4: give at least 7", {"lora_modules": ("b={b}",), "max_lora_rank": 4}),
    ],
)
def test_options_that_cannot_be(load: Load, adapters: dict[str, Path], words: str, options: dict[str, Any]) -> None:
    if "lora_modules" in options:
        options = {**options, "lora_modules": tuple(one.format(**adapters) for one in options["lora_modules"])}
    with pytest.raises(InputError, match=words):
        load(**options)


def test_room_is_planned_and_not_exceeded(load: Load, adapters: dict[str, Path]) -> None:
    """Exactly that of an adapter of the largest rank everywhere, for each; without adapters nothing changes."""
    plain, two = load(), load(lora_modules=modules(adapters), max_lora_rank=7)
    weights = [engine.info.plan["weights_bytes"] for engine in (plain, two)]
    assert "adapters" not in weights[0]  # type: ignore[operator]
    room = weights[1]["adapters"]  # type: ignore[index]
    assert weights[1]["total"] - room == weights[0]["total"]  # type: ignore[index]
    assert sum(one.nbytes for one in two.runner.adapters.values()) <= room
    full = write_adapter(
        adapters["a"].parent / "full", two.runner.decoder.spec, rank=7,
        modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    )  # fmt: skip
    two.adapters.unload("a")
    two.adapters.load("full", full)
    assert 2 * next(one.nbytes for name, one in two.runner.adapters.items() if name.name == "full") == room


@pytest.mark.skipif(backend.native() is None, reason="the native extension is not built")
@pytest.mark.parametrize("dtype", ["auto", "float16", "float32"])
def test_a_neighbour_with_an_adapter_changes_no_bit(
    load: Load, adapters: dict[str, Path], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the log-probabilities of requests without one, with native kernels' own settings."""
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "auto")
    engine = load(lora_modules=modules(adapters), dtype=dtype, reference_ops=False, enable_prefix_caching=False)
    plain = [submit(f"p{n}", range(3 + n, 40 + 2 * n), max_tokens=6, logprobs=3) for n in range(3)]
    beside = [having(name, submit(f"x{name}{n}", range(9, 30 + n), max_tokens=9)) for n, name in enumerate(("a", "b", "a"))]

    def told(requests: list[Submit]) -> dict[tuple[str, int], list[Any]]:
        for one in requests:
            engine.submit(one)
        found = finish(engine)
        return {key: [one for event in news for one in event.logprobs or ()] for key, news in found.items() if key[0][0] == "p"}

    expected = {key: news for one in plain for key, news in told([one]).items()}
    assert told([one for pair in zip(beside, plain, strict=True) for one in pair]) == expected
