"""NVFP4 of both tools: values against the formula, settings in every place, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.checkpoint import Checkpoint
from quant.errors import CheckpointError
from quant.headers import CheckpointIndex
from quant.rules import DENSE, MXFP4, NVFP4
from quant.scheme import QuantScheme, load_configs, read_scheme
from quant.tensor import QuantTensor
from tests.memory import published
from tests.quant.writers import MODULE, ct_config, load, save

CT, MODELOPT = (published.FLOATS4[name][2] for name in ("ct-nvfp4", "modelopt-nvfp4"))
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
FLOAT4, MX4, LAYOUT = published.FLOAT4, published.MX4, "nvfp4-pack-quantized"
VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
Q, GATE = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.gate"


def parts(N: int, K: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes in every byte, and every scale that is a positive number or 0."""
    rng = torch.Generator().manual_seed(seed)
    scales = torch.randint(0, 0x7F, (N, -(-K // 16)), generator=rng, dtype=torch.uint8)
    return torch.randint(0, 256, (N, K // 2), generator=rng, dtype=torch.uint8), scales.view(torch.float8_e4m3fn)


def modelopt(N: int, K: int, scale: float = 3.1e-4) -> dict[str, torch.Tensor]:
    packed, scales = parts(N, K)
    whole = torch.tensor(scale)
    return {"weight": packed, "weight_scale": scales, "weight_scale_2": whole, "input_scale": torch.tensor(0.01)}


def compressed(N: int, K: int, scale: float = 3127.3) -> dict[str, torch.Tensor]:
    packed, scales = parts(N, K)
    whole = torch.tensor([scale])
    return {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": whole, "input_global_scale": whole.clone()}


def codes(packed: torch.Tensor) -> torch.Tensor:
    """Even inputs in low nibbles."""
    return VALUES[torch.stack((packed % 16, packed // 16), dim=2).flatten(1).int()]


@pytest.mark.parametrize(("N", "K"), [(127, 256), (5, 16), (3, 40)])
def test_values_of_modelopt(tmp_path: Path, N: int, K: int) -> None:
    """To the bit: the code times the product of both scales, in float32."""
    tensors = modelopt(N, K)
    save(tmp_path, tensors, MODELOPT)
    weight = load(tmp_path, (N, K))
    each = tensors["weight_scale"].float() * tensors["weight_scale_2"]
    expected = codes(tensors["weight"]) * each.repeat_interleave(16, dim=1)[:, :K]
    assert weight.kind == "fp4" and weight.rounding == torch.float32 and torch.equal(weight.dequantize(), expected)
    assert weight.nbytes == N * K // 2 + N * -(-K // 16) + 4 * N
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.weight(MODULE, (N, K))
        assert checkpoint.leftover() == [] and checkpoint.scheme.method == "modelopt"


def test_values_of_compressed_tensors(tmp_path: Path) -> None:
    """The code times the scale over the global one; 1 / that is rounded here, which a last bit of float32 shows."""
    tensors = compressed(9, 64)
    save(tmp_path, tensors, CT)
    each = tensors["weight_scale"].double() / tensors["weight_global_scale"].double()
    expected = codes(tensors["weight_packed"]).double() * each.repeat_interleave(16, dim=1)
    found = load(tmp_path, (9, 64)).dequantize()
    assert bool(((found - expected).abs() <= expected.abs() * 2**-22).all()) and found.count_nonzero() > 400


def test_parts_with_factors_of_their_own_are_one_weight(tmp_path: Path) -> None:
    weights = []
    for number, scale in enumerate((1e-4, 7e-4, 3e-3)):
        folder = tmp_path / str(number)
        folder.mkdir()
        save(folder, modelopt(8 + number, 48, scale), MODELOPT)
        weights.append(load(folder))
    whole, dense = QuantTensor.cat(weights), torch.cat([weight.dequantize() for weight in weights])
    whole.check()
    assert torch.equal(whole.dequantize(), dense)
    order = torch.randperm(27)
    assert torch.equal(whole.select_rows(order).dequantize(), dense[order])
    assert [torch.equal(a.dequantize(), b.dequantize()) for a, b in zip(whole.split([8, 9, 10]), weights, strict=True)] == [
        True
    ] * 3
    assert torch.equal(whole.on(torch.device("cpu")).dequantize(), dense)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"weight_scale_2": torch.tensor(0.0)}, r"weight_scale_2: found \[0\.0\], expected one positive number"),
        ({"weight_scale_2": torch.tensor(float("nan"))}, r"weight_scale_2: found \[nan\], expected one positive"),
        ({"weight_scale_2": torch.tensor(1e36)}, r"weight_scale_2: found \[\S+e\+35\], expected one positive"),
        ({"weight_scale_2": torch.ones(2)}, r"weight_scale_2: found \[1\.0, 1\.0\], expected one positive number"),
        ({"weight_scale_2": None}, r"weight_scale_2: the tensor is missing"),
        ({"weight_scale": parts(8, 64)[1]}, r"weight_scale: found F8_E4M3\[8, 4\], expected F8_E4M3\[8, 2\]"),
        ({"weight_scale": torch.ones(8, 2)}, r"weight_scale: found F32\[8, 2\], expected F8_E4M3\[8, 2\]"),
        ({"weight_scale": torch.full((8, 2), float("nan")).to(torch.float8_e4m3fn)}, r"weight_scale: some of its scales are neg"),
        ({"weight_scale": torch.full((8, 2), -1.0).to(torch.float8_e4m3fn)}, r"are negative, or no numbers: .* damaged"),
        ({"weight": torch.ones(8, 32, dtype=torch.int8)}, r"weight: found I8\[8, 32\], expected U8\[\*, \*\]"),
        ({"weight": parts(8, 64)[0]}, r"weight_scale: found F8_E4M3\[8, 2\], expected F8_E4M3\[8, 4\]"),
    ],
)  # fmt: skip
def test_what_is_damaged(tmp_path: Path, tensors: dict[str, Any], words: str) -> None:
    found = {name: tensor for name, tensor in (modelopt(8, 32) | tensors).items() if tensor is not None}
    save(tmp_path, found, MODELOPT)
    with pytest.raises(CheckpointError, match=words):
        load(tmp_path, (8, 32))


def test_a_global_scale_of_nothing(tmp_path: Path) -> None:
    save(tmp_path, compressed(8, 32) | {"weight_global_scale": torch.zeros(1)}, CT)
    with pytest.raises(CheckpointError, match=r"weight_global_scale: found \[0\.0\], expected one positive number"):
        load(tmp_path)


def test_settings() -> None:
    for quantization in (CT, MODELOPT):
        scheme = QuantScheme.from_config({"quantization_config": quantization})
        assert scheme.for_module(Q) == NVFP4 and (NVFP4.bits, NVFP4.group_size, NVFP4.activation) == (4, 16, None)
        assert scheme.for_module(GATE) == scheme.for_module("lm_head") == scheme.for_module("model.embed_tokens") == DENSE
    assert QuantScheme.from_config({"quantization_config": published.FLOATS4["ct-mxfp4"][2]}).for_module(Q) == MXFP4
    mixed = json.loads(json.dumps(CT))
    mixed["format"] = "mixed-precision"
    eight = {
        "targets": ["re:.*q_proj"],
        "format": "float-quantized",
        "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
    }
    mixed["config_groups"]["group_1"] = eight
    mixed["config_groups"]["group_2"] = {"targets": ["re:.*down_proj"], "weights": MX4, "format": "mxfp4-pack-quantized"}
    scheme = QuantScheme.from_config({"quantization_config": mixed})
    assert (scheme.for_module(Q).layout, scheme.for_module(GATE.replace("gate", "up_proj"))) == ("float-quantized", NVFP4)
    assert scheme.for_module(GATE.replace("gate", "down_proj")) == MXFP4


def test_settings_beside_config_json(tmp_path: Path) -> None:
    """ModelOpt's own file, alone as with its first checkpoints, and beside settings in config.json."""
    quantization = {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "NVFP4",
        "group_size": 16,
        "exclude_modules": ["lm_head", "*.gate"],
    }
    file = {"producer": {"name": "modelopt", "version": "0.23.0"}, "quantization": quantization}
    save(tmp_path, modelopt(8, 32), None)
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(file))
    config, scheme = read_scheme(CheckpointIndex.open(tmp_path))
    assert (scheme.method, scheme.source, scheme.for_module(MODULE)) == ("modelopt", "hf_quant_config.json", NVFP4)
    assert config["quantization_config"]["kv_cache_quant_algo"] == "NVFP4" and scheme.for_module(GATE) == DENSE
    scheme.as_stated("modelopt_fp4")
    save(tmp_path, compressed(8, 32), CT)
    assert QuantScheme.from_config(*load_configs(tmp_path)).method == "compressed-tensors"
    quantization["quant_algo"] = "NVFP4_AWQ"
    save(tmp_path, modelopt(8, 32), None)
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(file))
    with pytest.raises(
        CheckpointError, match=r"hf_quant_config\.json: quant_algo 'NVFP4_AWQ' is not supported; one of NVFP4, W4A16"
    ):
        load(tmp_path)


def test_tensors_without_settings(tmp_path: Path) -> None:
    save(tmp_path, modelopt(8, 32), None)
    scheme = read_scheme(CheckpointIndex.open(tmp_path))[1]
    assert scheme.method == "modelopt" and scheme.for_module(MODULE) == NVFP4 and "beside" in scheme.source


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ct_config({**FLOAT4, "group_size": 32}, LAYOUT), "weights.group_size 32 is not supported; one of 16"),
        (ct_config({**FLOAT4, "strategy": "group"}, LAYOUT), "'group' is not supported; one of tensor_group is"),
        (ct_config({**FLOAT4, "num_bits": 8}, LAYOUT), "num_bits 8 is not supported; one of 4 is"),
        (ct_config(FLOAT4, "mxfp4-pack-quantized"), "weights.strategy 'tensor_group' is not supported; one of group is"),
        (ct_config({**MX4, "group_size": 16}, "mxfp4-pack-quantized"), "weights.group_size 16 is not supported; one of 32"),
        (ct_config({**MX4, "group_size": 16}, "mixed-precision"), "weights.group_size 16 is not supported; one of 32"),
        (ct_config({**FLOAT4, "strategy": "channel"}, "mixed-precision"), "'channel' is not supported; one of tensor_group, gr"),
        (ct_config(INT4, "mxfp4-pack-quantized"), "format 'mxfp4-pack-quantized' does not hold weights of type 'int'"),
        ({"quant_method": "modelopt", "quant_algo": "W8A16"}, "'W8A16' is not supported; one of NVFP4, W4A16_NVFP4, FP8, FP8"),
        ({"quant_method": "modelopt"}, "quant_algo 'NONE' is not supported"),
        ({**MODELOPT, "group_size": 32}, "group_size 32 is not supported; one of 16 is"),
        ({**MODELOPT, "ignore": "lm_head"}, "ignore is 'lm_head', expected a list of module names"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        QuantScheme.from_config({"quantization_config": config})
