"""Plans of headers that do not hold the model that config.json describes are refused, by tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from appliance.config import EngineConfig
from appliance.hub import demo_model
from appliance.memory.agreement import check_headers
from appliance.memory.planner import make_plan
from models.spec import ModelSpec
from quant.errors import CheckpointError
from quant.headers import CheckpointIndex
from quant.scheme import read_scheme
from tests.memory.published import Tensors, write_headers
from tests.models.test_loader import DENSE

LAYER = "model.layers.0"


def check(directory: Path) -> None:
    index = CheckpointIndex.open(directory)
    config, scheme = read_scheme(index, None)
    check_headers(index, ModelSpec.from_config(config), scheme)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_model(), tmp_path / "model"))


def change(model: Path, **settings: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.realdata
def test_published_ones_agree(shared_data: Path) -> None:
    found = sorted(path.parent for path in shared_data.glob("*/*/config.json") if list(path.parent.glob("*.safetensors")))
    assert len(found) >= 9
    for directory in found:
        check(directory)


def test_settings_of_another_size(model: Path) -> None:
    check(model)
    inner = json.loads((model / "config.json").read_text())["intermediate_size"]
    change(model, intermediate_size=2 * inner)
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.mlp\.\w+\.\w+: found .*, config.json expects a weight \[out, in\] of"):
        check(model)
    change(model, intermediate_size=inner, num_hidden_layers=99)
    with pytest.raises(CheckpointError, match=r"model\.layers\.\d+\.self_attn\.q_proj: its weight is missing from "):
        check(model)
    with pytest.raises(CheckpointError, match="its weight is missing from "):  # before anything is loaded
        make_plan(model, EngineConfig())


def test_what_is_missing_or_turned(model: Path) -> None:
    file = next(model.glob("*.safetensors"))
    tensors = load_file(file)
    weight = next(name for name in tensors if name.startswith(f"{LAYER}.self_attn.o_proj.") and name.endswith("weight"))
    norm = f"{LAYER}.input_layernorm.weight"
    changed: list[tuple[dict[str, Any], str]] = [
        ({weight: None}, rf"{LAYER}\.self_attn\.o_proj: its weight is missing"),
        ({norm: None}, rf"{norm}: the tensor is missing"),
        ({norm: tensors[norm][:-1].clone()}, rf"{norm}: found .*, expected \[\d+\]"),
        (
            {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"].t().contiguous()},
            "model.embed_tokens.weight: found",
        ),
    ]
    for changes, words in changed:
        save_file({name: t for name, t in (tensors | changes).items() if t is not None}, file)
        with pytest.raises(CheckpointError, match=words):
            check(model)


def test_a_head_that_may_be_the_embedding(model: Path) -> None:
    """A file of one that reads pictures may say nothing of it: transformers leaves out what is its default, by family."""
    change(model, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"^lm_head: its weight .* config\.json needs tie_word_embeddings: true\)$"):
        check(model)
    change(model, tie_word_embeddings=True)
    check(model)


def test_a_tied_table_that_is_stored_in_codes_as_the_head(tmp_path: Path) -> None:
    """It has the head's bits, not the embedding's, which the settings do not name."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": True}
    group = {"targets": ["re:.*lm_head"], "weights": weights}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    config = {**DENSE, "tie_word_embeddings": True, "quantization_config": settings}
    spec = ModelSpec.from_config(config)
    tensors: Tensors = {}
    for module in spec.modules():
        tensors[f"{module.name}.weight"] = ("BF16", (module.N, module.K))
    N, K = tensors.pop("model.embed_tokens.weight")[1]
    tensors |= {name: ("BF16", (size,)) for name, size in spec.small_tensors()}
    head: Tensors = {"lm_head.weight_packed": ("I32", (N, K // 8)), "lm_head.weight_scale": ("BF16", (N, K // 16))}
    check(write_headers(tmp_path / "whole", tensors | head, config))
    head["lm_head.weight_packed"] = ("I32", (N // 2, K // 8))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight_packed: found"):
        check(write_headers(tmp_path / "half", tensors | head, config))
