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
from tests.memory.gemma4 import EXPERTS, SMALL, TOLD, write_gemma4
from tests.memory.published import fill
from tests.memory.test_gemma import CPU, IDS, load, spread
from tests.models.test_against_transformers import feed

from kernels.triton.ops import make_ops  # isort: skip  (after that conftest has chosen the interpreter)

CARD = DeviceInfo("cuda", "NVIDIA GeForce RTX 4090", 24564 << 20, 24100 << 20, capability=89)
MODELS: dict[str, dict[str, Any]] = {
    "dense": SMALL,
    "experts": {**SMALL, **EXPERTS},
    "told": {**SMALL, **TOLD},
    "text of pictures": {
        "architectures": ["Gemma4ForConditionalGeneration"], "tie_word_embeddings": True, "dtype": "bfloat16",
        "text_config": {**SMALL, **EXPERTS, "architectures": None},
    },
}  # fmt: skip
KINDS = [
    ("dense", "none"), ("dense", "awq"), ("dense", "gptq-act-order"), ("experts", "none"), ("experts", "ct-w4a16"),
    ("text of pictures", "none"), ("text of pictures", "ct-fp8"), ("text of pictures", "awq"),
    ("told", "none"), ("told", "gptq-act-order"), ("told", "ct-w4a16"),
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
    assert plan.scratch["positions"] == 4096 * 4 * (128 + 256)
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


def effective(hidden: int, inner: int, layers: int, kv_heads: int, shared: int, every: int, wide: bool) -> dict[str, Any]:
    """Not copied from the hub: sizes of E2B and E4B as they are known, the rest as transformers has it."""
    types = ["full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in range(layers)]
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_key_value_heads": kv_heads}
    return SMALL | sizes | {
        "num_attention_heads": 8, "head_dim": 256, "global_head_dim": 512, "num_global_key_value_heads": None,
        "attention_k_eq_v": False, "sliding_window": 512, "max_position_embeddings": 131072, "vocab_size": 262144,
        "vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 256, "num_kv_shared_layers": shared,
        "use_double_wide_mlp": wide, "layer_types": types, "final_logit_softcapping": 30.0,
    }  # fmt: skip


E2B, E4B = effective(1536, 6144, 35, 1, 20, 5, True), effective(2560, 10240, 42, 2, 18, 6, False)


def test_every_byte_of_e2b(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """28 sliding layers and 7 others, of which 12 and 3 have keys and values: these alone are in the pool."""
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "torch")
    directory = write_gemma4(tmp_path, E2B, "none")
    plan = make_plan(directory, EngineConfig(max_model_len=4096, lm_head_dtype="model"), CPU)
    q, kv = 28 * 2048 + 7 * 4096, 12 * 256 + 3 * 512  # features of all layers
    told = 35 * 256
    assert plan.weights == {
        "embedding": 2 * 262144 * 1536,
        "per_layer_embedding": 2 * (262144 * told + told * 1536),
        "attention": 2 * 1536 * (2 * q + 2 * kv),
        "per_layer": 2 * 2 * told * 1536,
        "mlp": 2 * 3 * 1536 * (15 * 6144 + 20 * 12288),
        "head": 0,
        "norms": 2 * (35 * (5 * 1536 + 1) + 1536 + 256 + 28 * 256 + 7 * 512 + 2 * (12 * 256 + 3 * 512)),
    }
    assert plan.kv.layers == 15 and plan.kv.token_bytes == 2 * 2 * kv == 18_432
    spec = ModelSpec.from_config(E2B)
    assert spec.caches == (*range(15), *[13, 13, 13, 13, 14] * 4) and abs(spec.num_parameters / 1e9 - 4.63) < 0.01
    eight = make_plan(directory, EngineConfig(max_model_len=4096, embedding_dtype="int8", lm_head_dtype="model"), CPU)
    assert eight.weights["per_layer_embedding"] == 262144 * (told + 4) + 2 * told * 1536
    card = make_plan(directory, EngineConfig(max_model_len=32768, lm_head_dtype="model"), CARD)
    assert card.weights == plan.weights and card.sequences(32768) >= 1


def test_every_byte_of_e4b_in_four_bits(tmp_path: Path) -> None:
    """Layers in 4 bits (AWQ); what they are told stays as it is."""
    plan = make_plan(write_gemma4(tmp_path, E4B, "awq"), EngineConfig(max_model_len=8192, lm_head_dtype="model"), CARD)
    told, four = 42 * 256, lambda N, K: N * K // 2 + K // 128 * 4 * N
    kv = 20 * 2 * four(512, 2560) + 4 * 2 * four(1024, 2560)
    o = 35 * four(2560, 2048) + 7 * four(2560, 4096)
    assert plan.weights == {
        "embedding": 2 * 262144 * 2560,
        "per_layer_embedding": 2 * (262144 * told + told * 2560),
        "attention": 35 * four(2048, 2560) + 7 * four(4096, 2560) + kv + o,
        "per_layer": 42 * (four(256, 2560) + four(2560, 256)),
        "mlp": 42 * (2 * four(10240, 2560) + four(2560, 10240)),
        "head": 0,
        "norms": 2 * (42 * (5 * 2560 + 1) + 2560 + 256 + 35 * 256 + 7 * 512 + 2 * (20 * 256 + 4 * 512)),
    }
    assert plan.kv.layers == 24 and plan.kv.token_bytes == 2 * 2 * (20 * 2 * 256 + 4 * 2 * 512)


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


@pytest.mark.parametrize(("model", "variant"), [*KINDS, ("told", "awq")])
def test_every_byte_on_a_card(tmp_path: Path, model: str, variant: str) -> None:
    directory = fill(write_gemma4(tmp_path, MODELS[model], variant), variant)
    plan = make_plan(directory, EngineConfig(max_model_len=64, lm_head_dtype="model"), CARD)
    decoder = load(directory, make_ops(torch.device("cpu")), plan.dtype)
    assert plan.weight_bytes + plan.scratch["positions"] == decoder.nbytes
