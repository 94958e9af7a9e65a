"""Gemma: plans of the published sizes, and small ones in every format: what is planned is held, and all operators agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tests.kernels.triton.conftest  # noqa: F401  (chooses the interpreter)
from appliance.config import EngineConfig
from appliance.memory.demand import attention_workspace
from appliance.memory.devices import DeviceInfo
from appliance.memory.planner import make_plan
from appliance.memory.study import Study
from kernels.cpu import backend
from kernels.ops import Ops, get_ops
from models.loader import load_model
from models.spec import ModelSpec
from quant.checkpoint import Checkpoint
from quant.errors import InputError
from tests.memory.published import VARIANTS, fill, linears, write_published
from tests.models.test_against_transformers import feed

from kernels.triton.ops import make_ops  # isort: skip  (after that conftest has chosen the interpreter)

GIB = 1 << 30
CPU = DeviceInfo("cpu", "some CPU", 192 * GIB, 190 * GIB)


def published(two: bool, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["Gemma2ForCausalLM" if two else "Gemma3ForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 256,
        "vocab_size": 256000 if two else 262208,
        "max_position_embeddings": 8192 if two else 131072,
        "sliding_window": 4096 if two else 1024,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **more,
    }


SCALED = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
# Not copied from the hub: sizes as they are known, the rest as transformers has it. And parameters, in billions, without vision.
PUBLISHED = {
    "gemma-2-2b": (published(True, 2304, 9216, 26, 8, 4), 2.614),
    "gemma-2-9b": (published(True, 3584, 14336, 42, 16, 8), 9.242),
    "gemma-2-27b": (published(True, 4608, 36864, 46, 32, 16, head_dim=128, query_pre_attn_scalar=144), 27.227),
    "gemma-3-1b": (
        published(False, 1152, 6912, 26, 4, 1, vocab_size=262144, sliding_window=512, max_position_embeddings=32768), 1.000,
    ),
    "gemma-3-4b": (published(False, 2560, 10240, 34, 8, 4, **SCALED), 3.880),
    "gemma-3-12b": (published(False, 3840, 15360, 48, 16, 8, **SCALED), 11.766),
    "gemma-3-27b": (published(False, 5376, 21504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168, **SCALED), 27.009),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_byte_of_the_published_sizes(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "torch")
    config, billions = PUBLISHED[name]
    spec = ModelSpec.from_config(config)
    assert abs(spec.num_parameters / 1e9 - billions) < 0.001 * billions
    plan = make_plan(write_published(tmp_path, config, "none"), EngineConfig(max_model_len=4096), CPU)
    hidden, layers, size, three = spec.hidden, spec.layers, config["head_dim"], name.startswith("gemma-3")
    attention, mlp = (sum(N * K for key, (N, K) in linears(config).items() if part in key) for part in ("self_attn", "mlp"))
    assert plan.weights == {
        "embedding": 2 * spec.vocab * hidden,
        "attention": 2 * layers * attention,
        "mlp": 2 * layers * mlp,
        "head": 0,
        "norms": 2 * ((4 * layers + 1) * hidden + 2 * layers * size * three),
    }
    assert plan.scratch["positions"] == 4096 * size * 4 * (2 if three else 1)
    assert plan.kv.token_bytes == 2 * layers * spec.kv_heads * size * 2


CARD = DeviceInfo("cuda", "NVIDIA GeForce RTX 4090", 24564 << 20, 24100 << 20, capability=89)


@pytest.mark.parametrize("name", ["gemma-2-9b", "gemma-3-4b"])
def test_cards_have_plans(tmp_path: Path, name: str) -> None:
    config = PUBLISHED[name][0]
    study = Study.read(write_published(tmp_path, config, "awq"), EngineConfig(max_model_len=4096), CARD)
    assert study.planned_only == "" and study.plan.tokens > 4096
    parts = 2 * 192 * 2 * (256 + 1) * 4  # two query heads of 256 and a sum, for each program of an attention that is split
    assert attention_workspace(study.whole[0], study.whole[2]) == parts <= study.plan.scratch["products"]


def test_float16_does_not_hold_it(tmp_path: Path) -> None:
    folder = write_published(tmp_path, {**PUBLISHED["gemma-3-1b"][0], "torch_dtype": "float16"}, "none")
    turing = DeviceInfo("cuda", "NVIDIA T4", 15360 << 20, 15000 << 20, capability=75)
    for device, dtype in ((CPU, "bfloat16"), (CARD, "bfloat16"), (turing, "float32")):
        assert Study.read(folder, EngineConfig(max_model_len=512), device).whole[2].dtype == dtype
        with pytest.raises(InputError, match=f"--dtype float16: .*use --dtype {dtype}"):
            make_plan(folder, EngineConfig(dtype="float16", max_model_len=512), device)


SMALL = {
    "gemma2": published(True, 256, 384, 3, 4, 2, head_dim=64, vocab_size=203, sliding_window=9, attn_logit_softcapping=2.0),
    "gemma3": published(False, 256, 384, 3, 4, 1, head_dim=64, vocab_size=203, sliding_window=9, sliding_window_pattern=3),
}
IDS = torch.randint(203, (40,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SMALL)
def test_every_format_on_all_operators(
    tmp_path: Path, name: str, variant: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are those of the reference in float32, and every byte is as planned."""
    directory = spread(fill(write_published(tmp_path, SMALL[name], variant), variant))
    expected = None
    for isa in ("reference", *backend.available()):
        monkeypatch.setenv("APPLIANCE_CPU_ISA", "torch" if isa == "reference" else isa)
        config = EngineConfig(max_model_len=64, reference_ops=isa == "reference", dtype=dtype, lm_head_dtype="model")
        plan = make_plan(directory, config, CPU)
        ops = get_ops("cpu", reference=isa == "reference", threads=1)
        decoder = load(directory, ops, dtype)
        assert plan.weight_bytes + plan.scratch["positions"] == decoder.nbytes
        if expected is None:
            expected = feed(load(directory, ops, "float32"), IDS, [40])
            assert expected.std() > 0.1
        off = (feed(decoder, IDS, [25, 15]) - expected).square().mean().sqrt() / expected.std()
        rounds = dtype == "bfloat16" or variant == "ct-w8a8"  # activations; the last bit decides where to
        assert off < (0.05 if rounds else 1e-3), (isa, float(off))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SMALL)
def test_every_byte_on_a_card(tmp_path: Path, name: str, variant: str) -> None:
    directory = fill(write_published(tmp_path, SMALL[name], variant), variant)
    plan = make_plan(directory, EngineConfig(max_model_len=64, lm_head_dtype="model"), CARD)
    decoder = load(directory, make_ops(torch.device("cpu")), plan.dtype)
    assert plan.weight_bytes + plan.scratch["positions"] == decoder.nbytes


def spread(directory: Path) -> Path:
    """Weights that are not quantized become such as a model could have, norms far from 1."""
    tensors, rng = load_file(directory / "model.safetensors"), torch.Generator().manual_seed(1)
    for key, tensor in tensors.items():
        if tensor.dtype == torch.bfloat16 and key.endswith(".weight"):
            size = 0.5 if tensor.dim() == 1 else 0.3 if "embed" in key else 0.06
            tensors[key] = (size * torch.randn(tensor.shape, generator=rng)).bfloat16()
    save_file(tensors, directory / "model.safetensors")
    return directory


def load(directory: Path, ops: Ops, dtype: str, activation: str = "auto") -> Any:
    with Checkpoint.open(directory) as checkpoint:
        spec = ModelSpec.from_config(checkpoint.config)
        options: dict[str, Any] = {"max_len": 64, "lm_head_dtype": "model", "activation": activation}
        return load_model(checkpoint, spec, ops, dtype=getattr(torch, dtype), **options)
