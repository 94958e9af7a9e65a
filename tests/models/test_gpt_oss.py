"""gpt-oss from MXFP4, on every kind of operators: against the reference, with every cache, and what a checkpoint may not lack."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from appliance.config import EngineConfig
from appliance.core.messages import Submit
from appliance.core.params import SamplingParams
from appliance.runtime.engine import Engine
from kernels.ops import Mixture, Ops, get_ops
from models.decoder import Decoder
from models.loader import load_model
from models.spec import ModelSpec
from quant.checkpoint import Checkpoint
from quant.errors import CheckpointError, InputError
from tests.memory.published import GPT_OSS, fill, livelier, write_gpt_oss
from tests.models.test_against_transformers import feed
from tests.models.test_mixture import ops, take  # noqa: F401

IDS = torch.randint(300, (70,), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sinks that matter, biases that tell experts apart."""
    folder = livelier(fill(write_gpt_oss(tmp_path_factory.mktemp("oss"), GPT_OSS), "none"))
    tensors, rng = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(6)
    for name, tensor in tensors.items():
        if name.endswith(("bias", "sinks")):
            size = 1.0 if name.endswith(("sinks", "router.bias")) else 0.2
            tensors[name] = (size * torch.randn(tensor.shape, generator=rng)).bfloat16()
    save_file(tensors, folder / "model.safetensors")
    return folder


def load(folder: Path, ops: Ops, dtype: torch.dtype, activation: str = "auto") -> Decoder:  # noqa: F811
    with Checkpoint.open(folder) as checkpoint:
        spec = ModelSpec.from_config(checkpoint.config)
        return load_model(checkpoint, spec, ops, dtype=dtype, max_len=128, lm_head_dtype="model", activation=activation)


@pytest.fixture(scope="module")
def expected(folder: Path) -> torch.Tensor:
    return feed(load(folder, get_ops("cpu", reference=True), torch.float32), IDS, [len(IDS)])


def test_in_float32(folder: Path, expected: torch.Tensor, ops: Ops) -> None:  # noqa: F811
    """Whole, in chunks and token by token; windows of 12 in every other layer."""
    decoder = load(folder, ops, torch.float32)
    assert all(isinstance(layer.mlp, Mixture) and layer.sinks is not None for layer in decoder.layers) and expected.std() > 0.1
    for chunks in ([70], [30, 40], [13, 55, 1, 1]):
        assert (feed(decoder, IDS, chunks) - expected).abs().max() < 1e-4 * expected.std(), chunks


@pytest.mark.parametrize("activation", ["bf16", "int8"])
def test_in_bfloat16(folder: Path, expected: torch.Tensor, ops: Ops, activation: str) -> None:  # noqa: F811
    """A token whose experts differ by a rounding is off by more: in the mean it is little."""
    decoder = load(folder, ops, torch.bfloat16, activation)
    off = (feed(decoder, IDS, [60, 9, 1]) - expected).abs() / expected.std()
    assert off.mean() < (0.04 if activation == "bf16" else 0.06)


@pytest.mark.parametrize("kind", ["auto", "fp8", "int8", "int4"])
def test_an_engine_with_every_cache(folder: Path, kind: str) -> None:
    """Alone and among others, with the reference's operators: nobody's answer depends on its company."""
    options = {"max_model_len": 64, "kv_cache_memory_bytes": 1 << 22, "reference_ops": True, "skip_tokenizer_init": True}
    engine = Engine.load(EngineConfig(model=str(folder), threads=1, kv_cache_dtype=kind, **options))  # type: ignore[arg-type]
    answers = []
    for together in (False, True):
        found: dict[str, list[int]] = {}
        for i in range(3):
            params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
            engine.submit(Submit(f"r{i}", tuple(IDS[: 15 + 3 * i].tolist()), params, 0.0))
            while engine.has_work and not together:
                take(engine, found)
        while engine.has_work:
            take(engine, found)
        engine.reset_prefix_cache()
        answers.append(found)
    assert answers[0] == answers[1] and all(len(tokens) == 3 for tokens in answers[0].values())


@pytest.mark.parametrize(
    "missing", ["self_attn.sinks", "mlp.router.bias", "mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_scales"]
)
def test_what_is_missing_is_named(folder: Path, tmp_path: Path, missing: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"model.layers.1.{missing}"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    words = missing.replace("experts.", r"experts\.0\.").replace("_bias", r"\.bias").replace("_scales", r"\.scales")
    with pytest.raises(CheckpointError, match=rf"model\.layers\.1\.{words}: the tensor is missing"):
        load(tmp_path, get_ops("cpu", reference=True), torch.float32)


def test_experts_beyond_the_config_are_left_over(folder: Path, tmp_path: Path) -> None:
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**GPT_OSS, "num_local_experts": 4}))
    with pytest.raises(CheckpointError, match=r"mlp\.router\.weight: found BF16\[5, 96\], expected .*\[4, 96\]"):
        load(tmp_path, get_ops("cpu", reference=True), torch.float32)
    tensors = load_file(folder / "model.safetensors")
    cut = {name: tensor[:4].clone() if ".router." in name else tensor for name, tensor in tensors.items()}
    save_file(cut, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"12 tensors have no place in a GptOssForCausalLM: model\.layers\.0\.mlp\.experts\.4\."
    ):
        load(tmp_path, get_ops("cpu", reference=True), torch.float32)


def test_its_config() -> None:
    spec = ModelSpec.from_config(GPT_OSS)
    assert spec.mixture is not None and spec.mixture.clamp == (2.0, 1.702) and spec.mixture.normalized and spec.mixture.bias
    assert (spec.dtype, spec.windows, spec.qkv_bias, spec.o_bias, spec.sinks) == ("bfloat16", (12, None), True, True, True)
    assert (spec.rope.kind, spec.rope.theta, spec.rope.factor, spec.rope.truncate) == ("yarn", 150000.0, 8.0, False)
    bare = {
        key: value
        for key, value in GPT_OSS.items()
        if key not in ("rope_scaling", "rope_theta", "swiglu_limit", "attention_bias")
    }
    spec = ModelSpec.from_config({**bare, "max_position_embeddings": 131072})
    assert spec.mixture is not None and spec.mixture.clamp == (7.0, 1.702) and spec.qkv_bias
    assert (spec.rope.kind, spec.rope.theta, spec.rope.factor, spec.max_len) == ("yarn", 150000.0, 32.0, 131072), (
        "transformers' defaults"
    )
    with pytest.raises(InputError, match=r"swiglu_limit is -1, expected a positive number"):
        ModelSpec.from_config({**GPT_OSS, "swiglu_limit": -1})


def test_unquantized_experts_in_one_tensor_are_refused(folder: Path, tmp_path: Path) -> None:
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.0.mlp.experts.gate_up_proj"
    tensors[name] = torch.zeros(5, 96, 320, dtype=torch.bfloat16)
    save_file(
        {key: tensor for key, tensor in tensors.items() if key not in (f"{name}_blocks", f"{name}_scales")},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps(GPT_OSS))
    with pytest.raises(
        CheckpointError,
        match=r"experts\.gate_up_proj: found BF16\[5, 96, 320\]: such experts in one tensor are known in MXFP4",
    ):
        load(tmp_path, get_ops("cpu", reference=True), torch.float32)
