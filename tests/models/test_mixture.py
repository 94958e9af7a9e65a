"""Checkpoints of mixtures of experts: every format on every kind of operators, what is missing or left over, and the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from appliance.config import EngineConfig
from appliance.core.messages import Submit
from appliance.core.params import SamplingParams
from appliance.runtime.engine import Engine
from kernels.cpu import backend
from kernels.ops import Mixture, Ops, get_ops
from models.decoder import Decoder
from models.loader import load_model
from models.spec import ModelSpec
from quant.checkpoint import Checkpoint
from quant.errors import CheckpointError
from quant.tensor import QuantTensor
from tests.kernels.native import instruction_sets
from tests.memory.published import (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    ERNIE_MOE,
    GLM4_MOE,
    MIXTRAL,
    QWEN2_MOE,
    SMALL,
    VARIANTS,
    fill,
    livelier,
    write_published,
)
from tests.models.test_against_transformers import feed
from tests.models.test_bind import make_ops

IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9])
MADE = [
    *((SMALL, variant) for variant in VARIANTS),
    (MIXTRAL, "awq"),
    (QWEN2_MOE, "gptq-act-order"),
    (GLM4_MOE, "awq"),
    (ERNIE_MOE, "ct-w4a16"),
    *((DEEPSEEK_V3, variant) for variant in ("none", "fp8-blocks", "gptq-act-order", "ct-w8a8")),
    (DEEPSEEK_V2, "awq"),
]
KINDS = ["reference", "torch", *(instruction_sets() if backend.native() is not None else [])]


@pytest.fixture(params=KINDS)
def ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Ops:
    if request.param in ("reference", "torch"):
        monkeypatch.setenv("APPLIANCE_CPU_ISA", "torch")
        return get_ops("cpu", reference=request.param == "reference")
    return make_ops(request.param)


def load(folder: Path, ops: Ops, dtype: torch.dtype = torch.float32) -> Decoder:
    with Checkpoint.open(folder) as checkpoint:
        return load_model(
            checkpoint, ModelSpec.from_config(checkpoint.config), ops, dtype=dtype, max_len=64, lm_head_dtype="model"
        )


def logits(decoder: Decoder, chunks: list[int] | None = None) -> torch.Tensor:
    return feed(decoder, IDS, chunks or [len(IDS)])


def written_dense(folder: Path, to: Path) -> Path:
    """The same weights in float32, as this version's reader sees them."""
    tensors = {}
    with Checkpoint.open(folder) as checkpoint:
        spec = ModelSpec.from_config(checkpoint.config)
        for m in spec.modules():
            weight = checkpoint.weight(m.name, expect=(m.N, m.K))
            tensors[f"{m.name}.weight"] = weight.dequantize() if isinstance(weight, QuantTensor) else weight.float()
        tensors |= {name: checkpoint.tensor(name).float() for name, _ in spec.small_tensors()}
        config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    to.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, to / "model.safetensors")
    (to / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    return to


@pytest.fixture(
    scope="module", params=MADE, ids=lambda param: f"{param[0]['architectures'][0].removesuffix('ForCausalLM')}-{param[1]}"
)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A checkpoint, and its logits when the same weights are written dense; with rounded activations the reference's own."""
    config, variant = request.param
    folder = livelier(fill(write_published(tmp_path_factory.mktemp("made"), config, variant), variant))
    dense = folder if variant == "ct-w8a8" else written_dense(folder, tmp_path_factory.mktemp("dense") / "it")
    return folder, logits(load(dense, get_ops("cpu", reference=True)))


def test_every_format(made: tuple[Path, torch.Tensor], ops: Ops) -> None:
    """Whole and in chunks."""
    folder, expected = made
    decoder, config = load(folder, ops), (folder / "config.json").read_text()
    rounded = "int-quantized" in config
    settings = json.loads(config)
    dense = settings.get("first_k_dense_replace", settings.get("moe_layer_start_index", 0))
    assert [isinstance(layer.mlp, Mixture) for layer in decoder.layers] == [number >= dense for number in (0, 1)]
    assert expected.std() > 0.1
    for chunks in ([15], [4, 10, 1], [12, 1, 1, 1]):
        off = (logits(decoder, chunks) - expected).abs() / expected.std()
        assert off.mean() < (0.1 if rounded else 0.01) and (rounded or off.max() < 0.02), (
            chunks
        )  # a code that goes the other way may choose experts


def test_an_order_of_inputs_moves_into_gate_and_up(tmp_path: Path) -> None:
    folder = fill(write_published(tmp_path, SMALL, "gptq-act-order"), "gptq-act-order")
    for layer in load(folder, make_ops(instruction_sets()[0])).layers:
        assert isinstance(layer.mlp, Mixture)
        for expert in layer.mlp.experts:
            assert len(expert.gate_up) == 1 and expert.gate_up[0].perm is not None and expert.down.perm is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("left_out", [["gate"], ["mlp.gate"], None])
def test_routers_that_configs_leave_out_in_any_words(tmp_path: Path, left_out: list[str] | None) -> None:
    """AutoAWQ's "gate" is a part of gate_proj's name, too; the tensors tell which are quantized."""
    folder = fill(write_published(tmp_path, SMALL, "awq"), "awq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = left_out
    (folder / "config.json").write_text(json.dumps(config))
    with Checkpoint.open(folder) as checkpoint:
        names = ("mlp.gate", "mlp.experts.6.gate_proj", "mlp.experts.0.down_proj")
        found = [checkpoint.scheme.for_module(f"model.layers.1.{name}").quantized for name in names]
    assert found == [False, True, True]
    load(folder, get_ops("cpu", reference=True))


@pytest.mark.parametrize("missing", ["mlp.gate.weight", "mlp.experts.6.up_proj.weight", "mlp.experts.0.down_proj.weight"])
def test_a_missing_expert_is_named(tmp_path: Path, missing: str) -> None:
    folder = fill(write_published(tmp_path, SMALL, "none"), "none")
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"model.layers.1.{missing}"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"model\.layers\.1\.{missing.removesuffix('.weight')}.*missing"):
        load(folder, get_ops("cpu", reference=True))


def test_experts_beyond_the_config_are_left_over(tmp_path: Path) -> None:
    folder = fill(write_published(tmp_path, SMALL, "none"), "none")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_experts": 6}))
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t[:6] if n.endswith("mlp.gate.weight") else t for n, t in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"6 tensors have no place in a Qwen3MoeForCausalLM: model\.layers\.0\.mlp\.experts\.6\."
    ):
        load(folder, get_ops("cpu", reference=True))


@pytest.mark.parametrize(("config", "variant"), [(SMALL, "awq"), (SMALL, "none"), (QWEN2_MOE, "gptq")])
def test_the_engine_answers_alike_alone_and_among_others(tmp_path: Path, config: dict[str, Any], variant: str) -> None:
    """With the reference's operators, whose products do not depend on how many rows there are together."""
    folder = livelier(fill(write_published(tmp_path, config, variant), variant))
    options = {"max_model_len": 64, "kv_cache_memory_bytes": 1 << 22, "reference_ops": True, "skip_tokenizer_init": True}
    engine, answers = Engine.load(EngineConfig(model=str(folder), threads=1, **options)), []  # type: ignore[arg-type]
    for together in (False, True):
        found: dict[str, list[int]] = {}
        for i in range(3):
            params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
            engine.submit(Submit(f"r{i}", tuple(IDS[: 5 + 3 * i].tolist()), params, 0.0))
            while engine.has_work and not together:
                take(engine, found)
        while engine.has_work:
            take(engine, found)
        engine.reset_prefix_cache()
        assert all(len(tokens) == 4 for tokens in found.values())
        answers.append(found)
    assert answers[0] == answers[1]


def take(engine: Engine, found: dict[str, list[int]]) -> None:
    for event in engine.step():
        found.setdefault(event.request_id, []).extend(event.token_ids)


def test_layers_that_guess_tokens_ahead_are_left_out_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As GLM publishes them: behind the others. Where config.json knows of none, they are left over."""
    folder = fill(write_published(tmp_path, GLM4_MOE, "none"), "none")
    with caplog.at_level("INFO", "appliance.loader"):
        assert len(load(folder, get_ops("cpu", reference=True)).layers) == 2
    assert "tensors that guess tokens ahead (model.layers.2.eh_proj.weight, ...) are not read" in caplog.text
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    with pytest.raises(
        CheckpointError, match=r"tensors have no place in a Glm4MoeForCausalLM: model\.layers\.2\.eh_proj\.weight, "
    ):
        load(folder, get_ops("cpu", reference=True))
