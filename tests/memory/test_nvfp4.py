"""Plans of NVFP4, MXFP4 and what else ModelOpt writes: planned is what is loaded, by hand for real models, refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from appliance.config import EngineConfig
from appliance.memory.agreement import check_headers
from appliance.memory.demand import Demand
from appliance.memory.devices import DeviceInfo
from appliance.memory.modules import Machinery
from appliance.memory.planner import make_plan
from models.spec import ModelSpec
from quant.errors import CheckpointError, InputError
from quant.headers import CheckpointIndex, read_header
from quant.scheme import read_scheme
from tests.memory.published import FLOATS4, MODELOPT, SMALL, fill, linears, write_headers, write_published
from tests.memory.test_planner import compare, kind  # noqa: F401

GIB = 1 << 30
DENSE = {key: value for key, value in SMALL.items() if "expert" not in key and not key.startswith("moe")}
DENSE |= {"architectures": ["Qwen3ForCausalLM"]}


@pytest.mark.parametrize("variant", [*FLOATS4, *MODELOPT])
@pytest.mark.parametrize("config", [DENSE, SMALL], ids=["qwen3", "qwen3-moe"])
def test_what_is_planned_is_what_the_loader_holds(tmp_path: Path, config: dict[str, Any], variant: str, kind: str) -> None:  # noqa: F811
    folder = fill(write_published(tmp_path, config, variant), variant)
    for dtype in ("auto", "float32"):
        plan = compare(folder, kind, dtype=dtype)
        assert plan.quantization == ("modelopt" if variant.startswith("modelopt") else "compressed-tensors")


@pytest.mark.realdata
@pytest.mark.parametrize("variant", FLOATS4)
@pytest.mark.parametrize("model", ["meta-llama--Meta-Llama-3.1-8B", "Qwen--Qwen3-30B-A3B"])
def test_worked_out_by_hand(shared_data: Path, tmp_path: Path, model: str, variant: str) -> None:
    """4.5 bits a weight and 4 bytes an output, of MXFP4 4.25 and none, in the files' way and in whole panels (all are of 64)."""
    config = json.loads((shared_data / "configs" / f"{model}_config.json").read_text())
    config["num_hidden_layers"] = min(config["num_hidden_layers"], 32 if "Llama" in model else 3)  # of as many tensors, not more
    directory = write_published(tmp_path, config, variant)
    settings, scheme = read_scheme(CheckpointIndex.open(directory))
    spec, layers = ModelSpec.from_config(settings), config["num_hidden_layers"]
    weights = Demand.of(spec, scheme, Machinery(ops="cpu-native", dtype="bfloat16", head_bits=8), model="m").weights
    sums = {"attention": 0, "mlp": 0, "experts": 0}
    for name, (N, K) in linears(config).items():
        part = "attention" if "attn" in name else "experts" if "experts." in name else "mlp"
        size = N * K * 17 // 32 if variant == "ct-mxfp4" else N * K * 9 // 16 + 4 * N
        sums[part] += 0 if name.endswith(".gate") else size
    assert {part: weights.get(part, 0) for part in sums} == {part: layers * size for part, size in sums.items()}
    plan = make_plan(directory, EngineConfig(max_model_len=4096), DeviceInfo("cpu", "machine", 64 * GIB, 60 * GIB))
    assert plan.load_peak < plan.runtime + plan.weight_bytes + 2.5 * GIB


@pytest.mark.parametrize(("dtype", "variant"), [("auto", "ct-nvfp4"), ("float32", "ct-nvfp4"), ("auto", "ct-mxfp4")])
def test_cards_refuse_it_by_name(tmp_path: Path, dtype: str, variant: str) -> None:
    card = DeviceInfo("cuda", "card", 80 * GIB, 80 * GIB, 90)
    words = rf"q_proj: cards have no kernel for 4-bit floats \({variant[3:].upper()}\): --device cpu serves them; of its other v"
    with pytest.raises(InputError, match=words):
        make_plan(write_published(tmp_path, DENSE, variant), EngineConfig(dtype=dtype), card)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("weight", ("U8", (256, 64)), r"q_proj\.weight: found U8\[256, 64\], .* of \[256, 256\]"),
        ("weight", ("I8", (256, 128)), r"q_proj\.weight: found I8\[256, 128\], .* of \[256, 256\]"),
        ("weight", None, r"layers\.1\.self_attn\.q_proj: its weight is missing"),
    ],
)
def test_headers_of_something_else(tmp_path: Path, name: str, shape: Any, words: str) -> None:
    directory = write_published(tmp_path, DENSE, "modelopt-nvfp4")
    tensors = {name: (info.dtype, info.shape) for name, info in read_header(directory / "model.safetensors").items()}
    tensors |= {f"model.layers.1.self_attn.q_proj.{name}": shape}
    config = json.loads((directory / "config.json").read_text())
    write_headers(directory, {name: shape for name, shape in tensors.items() if shape is not None}, config)
    index = CheckpointIndex.open(directory)
    with pytest.raises(CheckpointError, match=words):
        check_headers(index, ModelSpec.from_config(config), read_scheme(index)[1])
