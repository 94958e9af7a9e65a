"""LoRA adapters of an LLM: as vLLM's are asked for, loaded when they first are, and sent away for others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from appliance import LLM, BeamSearchParams, LoRARequest, SamplingParams
from models.spec import ModelSpec
from quant.errors import InputError
from quant.headers import read_json
from tests.adapters import write_adapter
from tests.tiny_model import make_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
PROMPTS = ["one two three", "one two", "three three one"]
OPTIONS: dict[str, Any] = {"dtype": "float32", "max_model_len": 128, "kv_cache_memory_bytes": 2 << 20, "reference_ops": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapters(model: Path) -> list[LoRARequest]:
    spec = ModelSpec.from_config(read_json(model / "config.json"))
    paths = [write_adapter(model / f"adapter-{n}", spec, seed=n, rank=3 + n) for n in range(3)]
    return [LoRARequest(f"a{n}", n + 1, path if n else str(path)) for n, path in enumerate(paths)]


def texts(llm: LLM, request: Any, **options: Any) -> list[list[int]]:
    found = llm.generate(PROMPTS, GREEDY, use_tqdm=False, lora_request=request, **options)
    return [list(one.outputs[0].token_ids) for one in found]


def test_each_prompt_has_its_own(model: Path, adapters: list[LoRARequest]) -> None:
    llm = LLM(model, enable_lora=True, max_loras=2, **OPTIONS)
    plain, first, second = (texts(llm, one) for one in (None, *adapters[:2]))
    assert plain != first != second != plain
    assert texts(llm, [adapters[1], None, adapters[0]]) == [second[0], plain[1], first[2]]
    third = texts(llm, adapters[2])  # in the place of the one that was used longest ago
    assert [one.name for one in llm._engine.runner.adapters] == ["a1", "a2"] or third not in (plain, first, second)
    assert texts(llm, adapters[0]) == first and texts(llm, None) == plain
    assert len(llm._engine.runner.adapters) == 2
    with pytest.raises(InputError, match="3 LoRA adapters are asked for at once, but max_loras is 2"):
        texts(llm, adapters)
    other = LoRARequest("a0", 9, adapters[1].lora_path)  # another one under a name that is taken
    assert texts(llm, other) == second and texts(llm, adapters[0]) == first
    with pytest.raises(InputError, match="two LoRA adapters are called 'a0'"):
        texts(llm, [other, adapters[0], None])
    assert texts(llm, LoRARequest("a0")) == first
    with pytest.raises(InputError, match="'new' has no lora_path, and none of that name is loaded"):
        texts(llm, LoRARequest("new"))
    with pytest.raises(InputError, match="2 lora_requests for 3 prompts"):
        texts(llm, adapters[:2])


def test_beams_and_adapters_from_the_start(model: Path, adapters: list[LoRARequest]) -> None:
    llm = LLM(model, lora_modules=[f"mine={adapters[0].lora_path}"], **OPTIONS)
    params = BeamSearchParams(beam_width=2, max_tokens=6, ignore_eos=True)
    plain, adapted = (llm.beam_search(PROMPTS[0], params, lora_request=one) for one in (None, LoRARequest("mine", 1)))
    assert plain[0].sequences[0].tokens != adapted[0].sequences[0].tokens
    again = llm.beam_search(PROMPTS[0], params, lora_request=adapters[0])[0]  # takes the one place there is
    assert again.sequences[0].tokens == adapted[0].sequences[0].tokens


def test_embeddings(model: Path, adapters: list[LoRARequest]) -> None:
    llm = LLM(model, runner="pooling", enable_lora=True, **OPTIONS)
    plain, adapted = (llm.embed(PROMPTS, lora_request=one, use_tqdm=False) for one in (None, adapters[0]))
    assert all(x.outputs.embedding != y.outputs.embedding for x, y in zip(plain, adapted, strict=True))
    mixed = llm.embed(PROMPTS, lora_request=[None, adapters[0], None], use_tqdm=False)
    assert mixed[1].outputs.embedding == pytest.approx(adapted[1].outputs.embedding, abs=1e-5)


def test_without_memory_for_them(model: Path, adapters: list[LoRARequest]) -> None:
    llm = LLM(model, **OPTIONS)
    with pytest.raises(InputError, match="make the LLM with enable_lora=True"):
        texts(llm, adapters[0])
    assert texts(llm, None)
