"""Plans of gpt-oss: what is planned is what is loaded, the published 20b worked out by hand, and what is refused by name."""

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
from appliance.memory.roofline import Limits, Work
from appliance.quantize.job import check_kind
from models.spec import ModelSpec
from quant.errors import CheckpointError, InputError
from quant.headers import CheckpointIndex, read_header
from quant.scheme import read_scheme
from tests.memory.published import GPT_OSS, fill, write_gpt_oss, write_headers
from tests.memory.test_planner import compare, kind  # noqa: F401

GIB = 1 << 30


@pytest.mark.parametrize("choice", ["auto", "int4", "model"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_what_is_planned_is_what_the_loader_holds(tmp_path: Path, dtype: str, choice: str, kind: str) -> None:  # noqa: F811
    plan = compare(fill(write_gpt_oss(tmp_path, GPT_OSS), "none"), kind, dtype=dtype, lm_head_dtype=choice)
    assert plan.dtype == ("float32" if dtype == "float32" else "bfloat16"), "of the tensors: the config says none"
    assert plan.weights["experts"] > plan.weights["router"] > 0 and "mlp" not in plan.weights


@pytest.fixture(scope="module")
def published(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = json.loads((shared_data / "configs" / "openai--gpt-oss-20b_config.json").read_text())
    return write_gpt_oss(tmp_path_factory.mktemp("20b"), config)


@pytest.mark.realdata
def test_20b_worked_out_by_hand(published: Path) -> None:
    """24 layers of 32 experts of 3 x 2880 x 2880 weights, 4.25 bits each, with float32 biases; 4 of 32 are read for a token."""
    config, scheme = read_scheme(CheckpointIndex.open(published))
    spec, native = ModelSpec.from_config(config), Machinery(ops="cpu-native", dtype="bfloat16", head_bits=8)
    assert (spec.dtype, spec.max_len, spec.windows[:3], spec.rope.truncate) == ("bfloat16", 131072, (128, None, 128), False)
    weights = Demand.of(spec, scheme, native, model="m").weights
    assert weights["experts"] == 24 * 32 * (3 * 2880 * 2880 * 17 // 32 + 4 * 3 * 2880) == 10_178_887_680
    assert weights["attention"] == 24 * (2880 * (2 * 4096 + 2 * 512) * 2 + 4 * (4096 + 2 * 512 + 2880))
    assert weights["router"] == 24 * (64 * 2880 * 2 + 4 * 64), "a whole panel of outputs"
    assert weights["norms"] == (2 * 24 + 1) * 2880 * 2 + 24 * 64 * 2, "and sinks"
    assert weights["embedding"] == 201088 * 2880 * 2 and weights["head"] == 201088 * (23 * 128 + 4)
    assert spec.num_parameters == 20_914_757_184, "as its publisher counts: 20.9 billion"
    work, limits = Work.of(spec, scheme, native), Limits(1e12, 1e18, 1e18)
    rest = weights["attention"] + weights["router"] + weights["head"]
    assert work.decode_s(limits, 1, 0, 1, None) == pytest.approx((rest + weights["experts"] / 8) / 1e12)
    plan = make_plan(published, EngineConfig(max_model_len=8192), DeviceInfo("cpu", "machine", 32 * GIB, 28 * GIB))
    assert plan.load_peak < plan.runtime + plan.weight_bytes + 2 * GIB, "one expert at a time is read, not a layer"


@pytest.mark.realdata
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_cards_refuse_it_by_name(published: Path, dtype: str) -> None:
    card = DeviceInfo("cuda", "card", 80 * GIB, 80 * GIB, 90)
    with pytest.raises(InputError, match=r"cards have no kernel for .* sinks \(GptOssForCausalLM\): --device cpu serves it"):
        make_plan(published, EngineConfig(max_model_len=4096, dtype=dtype), card)


def test_quantizing_is_refused() -> None:
    with pytest.raises(InputError, match="GptOssForCausalLM is a mixture of experts, and this version quantizes none"):
        check_kind(Path("m"), ModelSpec.from_config(GPT_OSS))


def headers(directory: Path, changes: dict[str, Any], **config: Any) -> None:
    """Checks those of GPT_OSS with tensors that are taken away (None), or of other shapes."""
    write_gpt_oss(directory, GPT_OSS)
    tensors = {name: (info.dtype, info.shape) for name, info in read_header(directory / "model.safetensors").items()}
    tensors = {name: shape for name, shape in (tensors | changes).items() if shape is not None}
    write_headers(directory, tensors, {**GPT_OSS, **config})
    index = CheckpointIndex.open(directory)
    settings, scheme = read_scheme(index)
    check_headers(index, ModelSpec.from_config(settings), scheme)


DOWN = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {f"{DOWN}_blocks": None, f"{DOWN}_scales": None, DOWN: ("BF16", (5, 160, 96))},
            r"layers\.1\.mlp\.experts\.down_proj: found BF16\[5, 160, 96\]: such experts in one tensor are known in MXFP4 alone",
        ),
        ({f"{DOWN}_blocks": None}, r"layers\.1\.mlp\.experts\.0\.down_proj: its weight is missing"),
        ({f"{DOWN}_blocks": ("U8", (4, 96, 5, 16))}, r"layers\.1\.mlp\.experts\.4\.down_proj: its weight is missing"),
        ({f"{DOWN}_blocks": ("U8", (5, 96, 6, 16))}, r"experts\.0\.down_proj\.blocks: found U8\[96, 6, 16\], .* of \[96, 160\]"),
        ({"model.layers.0.self_attn.sinks": None}, r"layers\.0\.self_attn\.sinks: the tensor is missing from .*, expected \[6\]"),
    ],
)
def test_headers_of_something_else(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        headers(tmp_path, changes)


def test_float16_is_refused(tmp_path: Path) -> None:
    directory = write_gpt_oss(tmp_path, GPT_OSS)
    with pytest.raises(InputError, match=r"--dtype float16: this model's activations can grow beyond .*; use --dtype bfloat16"):
        make_plan(directory, EngineConfig(dtype="float16"), DeviceInfo("cpu", "machine", GIB, GIB))
