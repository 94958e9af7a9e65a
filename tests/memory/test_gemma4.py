"""Gemma 4: a plan of the published size by hand, and small ones in every format: what is planned is held, and operators agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from appliance.config import EngineConfig
from appliance.memory.demand import attention_workspace
from appliance.memory.devices import DeviceInfo
from appliance.memory.planner import make_plan
from appliance.memory.shard import shard
from appliance.memory.study import Study
from kernels.cpu import backend
from kernels.ops import get_ops
from models.loader import load_model
from models.spec import ModelSpec
from quant.checkpoint import Checkpoint
from quant.errors import InputError
from quant.tensor import QuantTensor
from tests.memory.gemma4 import EXPERTS, SMALL, write_gemma4
from tests.memory.published import fill
from tests.memory.test_gemma import CPU, IDS, load, spread
from tests.models.test_against_transformers import feed

from kernels.triton.ops import make_ops  # isort: skip  (after that conftest has chosen the interpreter)

CARD = DeviceInfo("cuda", "NVIDIA GeForce RTX 4090", 24564 << 20, 24100 << 20, capability=89)
MODELS: dict[str, dict[str, Any]] = {
    "dense": SMALL,
    "experts": {**SMALL, **EXPERTS},
    "text of pictures": {
        "architectures": ["Gemma4ForConditionalGeneration"], "tie_word_embeddings": True, "dtype": "bfloat16",
        "text_config": {**SMALL, **EXPERTS, "architectures": None},
    },
}  # fmt: skip
KINDS = [
    ("dense", "none"), ("dense", "awq"), ("dense", "gptq-act-order"), ("experts", "none"), ("experts", "ct-w4a16"),
    ("text of pictures", "none"), ("text of pictures", "ct-fp8"), ("text of pictures", "awq"),
]  # fmt: skip


@pytest.fixture
def whole(shared_data: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((shared_data / "configs" / "google--gemma-4-26B-A4B_config.json").read_text())
    return found


def linears(size: Any) -> dict[str, int]:
    """Bytes of 26B-A4B's by ``size`` of one [N, K]: 25 layers of 16 heads of 256, 5 of 16 of 512; 128 experts in each of 30."""
    attention = 25 * (size(4096, 2816) + 2 * size(2048, 2816) + size(2816, 4096))
    attention += 5 * (size(8192, 2816) + size(1024, 2816) + size(2816, 8192))
    experts = 30 * 128 * (2 * size(704, 2816) + size(2816, 704))
    return {"attention": attention, "mlp": 30 * (2 * size(2112, 2816) + size(2816, 2112)), "experts": experts}


NORMS = 2 * (30 * (8 * 2816 + 1) + 2816 + 3 * (25 * 256 + 5 * 512)) + 4 * 30 * 128  # q, k, and ones for v


@pytest.mark.realdata
def test_every_byte_of_the_published_size(whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "torch")
    spec = ModelSpec.from_config(whole)
    assert abs(spec.num_parameters / 1e9 - 25.2) < 0.1
    plan = make_plan(write_gemma4(tmp_path, whole, "none"), EngineConfig(max_model_len=4096, lm_head_dtype="model"), CPU)
    table, router = 2 * 262144 * 2816, {"router": 2 * 30 * 128 * 2816}
    by_part = linears(lambda N, K: 2 * N * K) | router
    assert plan.weights == {"embedding": table, **by_part, "head": 0, "norms": NORMS}
    assert plan.kv.token_bytes == 25 * 2 * 8 * 256 * 2 + 5 * 2 * 2 * 512 * 2 == 225_280
    assert plan.kv.by_layer == tuple([*[(8, 256)] * 5, (2, 512)] * 5) and plan.kv.layers == 30
    assert plan.scratch["positions"] == 4096 * 4 * (512 + 256)
    eight = make_plan(tmp_path, EngineConfig(max_model_len=4096, kv_cache_dtype="int8"), CPU)
    assert eight.kv.token_bytes == 25 * 2 * 8 * (256 + 4) + 5 * 2 * 2 * (512 + 4)


@pytest.mark.realdata
def test_a_card_of_24_gib_holds_it_in_four_bits(whole: dict[str, Any], tmp_path: Path) -> None:
    """In groups of 64, as 704 inputs are no whole groups of 128: 4 bits of each, in tiles of 128, and 32 for each group."""
    study = Study.read(write_gemma4(tmp_path, whole, "ct-w4a16", 64), EngineConfig(max_model_len=8192), CARD)
    plan = study.plan
    assert study.planned_only == "" and plan.sequences(8192) >= 1
    four = linears(lambda N, K: -(-K // 128) * 128 * N // 2 + -(-K // 128) * 8 * N)
    router = 2 * 30 * 128 * 2816
    assert plan.weights == {"embedding": 262144 * 2816 + 8 * 262144, **four, "router": router, "head": 0, "norms": NORMS}
    spec, _, machinery = study.whole[:3]
    assert attention_workspace(spec, machinery) == 2 * 192 * 8 * (512 + 1) * 4 <= plan.scratch["products"]
    with pytest.raises(InputError, match="whose layers have different heads, is not divided among cards: plan it for one"):
        shard(spec, 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("model", "variant"), KINDS)
def test_every_format_on_all_operators(
    tmp_path: Path, model: str, variant: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are those of the reference in float32, and every byte is as planned."""
    directory = spread(fill(write_gemma4(tmp_path, MODELS[model], variant), variant))
    expected = None
    for isa in ("reference", *backend.available()):
        monkeypatch.setenv("APPLIANCE_CPU_ISA", "torch" if isa == "reference" else isa)
        config = EngineConfig(max_model_len=64, reference_ops=isa == "reference", dtype=dtype, lm_head_dtype="model")
        plan = make_plan(directory, config, CPU)
        ops = get_ops("cpu", reference=isa == "reference", threads=1)
        decoder = load(directory, ops, dtype, activation="bf16")  # scores that are not scaled tell little differences apart
        assert plan.weight_bytes + plan.scratch["positions"] == decoder.nbytes
        if expected is None:
            expected = feed(load(directory, ops, "float32"), IDS, [40])
            assert expected.std() > 0.1
        off = (feed(decoder, IDS, [25, 15]) - expected).square().mean().sqrt() / expected.std()
        assert off < (0.05 if dtype == "bfloat16" else 1e-3), (isa, float(off))


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_while_it_is_loaded(tmp_path: Path, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the router, and of experts that are one tensor each by itself."""
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "torch")
    directory = fill(write_gemma4(tmp_path, MODELS["experts"], "none"), "none")
    config = EngineConfig(max_model_len=64, dtype="float32", lm_head_dtype="model", quantization=f"int{bits}")
    plan = make_plan(directory, config, CPU)
    with Checkpoint.open(directory, f"int{bits}") as checkpoint:
        spec, ops = ModelSpec.from_config(checkpoint.config), get_ops("cpu")
        assert isinstance(checkpoint.weight("model.layers.2.router.proj"), torch.Tensor)
        assert isinstance(checkpoint.weight("model.layers.2.experts.4.gate_proj"), QuantTensor)
        decoder = load_model(checkpoint, spec, ops, dtype=torch.float32, max_len=64, lm_head_dtype="model")
    assert plan.weight_bytes + plan.scratch["positions"] == decoder.nbytes
    assert plan.weights["router"] == 3 * 5 * 256 * 4 and bool(feed(decoder, IDS, [40]).isfinite().all())


@pytest.mark.parametrize(("model", "variant"), KINDS)
def test_every_byte_on_a_card(tmp_path: Path, model: str, variant: str) -> None:
    directory = fill(write_gemma4(tmp_path, MODELS[model], variant), variant)
    plan = make_plan(directory, EngineConfig(max_model_len=64, lm_head_dtype="model"), CARD)
    decoder = load(directory, make_ops(torch.device("cpu")), plan.dtype)
    assert plan.weight_bytes + plan.scratch["positions"] == decoder.nbytes
