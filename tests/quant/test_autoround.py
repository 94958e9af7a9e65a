"""AutoRound's checkpoints: every packing, what single modules have of their own, and what is refused by name.

Configs are as AutoRound 0.16.1 wrote them; older spellings are those of its releases 0.2 to 0.4.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from quant.checkpoint import Checkpoint
from quant.errors import CheckpointError, InputError
from quant.formats import gptq as reader
from quant.rules import DENSE, WeightScheme
from quant.scheme import QuantScheme
from quant.tensor import QuantTensor
from tests.quant.test_scheme import scheme
from tests.quant.writers import MODULE, Weight, awq_gemm, gptq, load, make, save, stream

Q = "model.layers.0.self_attn.q_proj"
CONFIG = {
    "autoround_version": "0.16.1", "bits": 4, "block_name_to_quantize": "model.layers", "data_type": "int",
    "enable_quanted_input": False, "group_size": 32, "packing_format": "auto_round:auto_gptq", "quant_method": "auto-round",
    "sym": True,
}  # fmt: skip
FP8 = {**CONFIG, "bits": 8, "data_type": "fp", "fmt": "e4m3", "activation_scheme": "dynamic"}
BLOCKS = {
    **FP8, "packing_format": "auto_round:fp8", "group_size": [128, 128], "weight_block_size": [128, 128],
    "act_bits": 8, "act_data_type": "fp", "act_dynamic": True, "act_group_size": 128, "act_sym": True,
}  # fmt: skip


def drawn(*args: Any, sym: bool) -> Weight:
    """A random weight without a zero point of 0, which AutoGPTQ's packing cannot hold."""
    weight = make(*args, sym=sym)
    weight.zeros = np.maximum(weight.zeros, 1)
    return weight


def own(w: Weight) -> dict[str, Tensor]:
    """Zero points as they are, and no g_idx."""
    return {name: tensor for name, tensor in gptq(w, stored_zeros=w.zeros).items() if name != "g_idx"}


def less_one(w: Weight) -> dict[str, Tensor]:
    """Zero points less one. No g_idx."""
    return {name: tensor for name, tensor in gptq(w).items() if name != "g_idx"}


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(
    ("packing", "write"),
    [
        ("auto_round:auto_gptq", less_one),
        ("auto_round", own),
        ("auto_round:gptqmodel", lambda w: gptq(w, stored_zeros=w.zeros)),
    ],
    ids=["auto_gptq", "auto_round", "gptqmodel"],
)
def test_integers(tmp_path: Path, packing: str, write: Any, bits: int, sym: bool) -> None:
    rng = np.random.default_rng(bits)
    for K, size in ((96, 64), (64, -1)):  # the first has a short group
        weight = drawn(rng, 32, K, size, bits, sym=sym)
        config = {**CONFIG, "bits": bits, "group_size": size, "sym": sym, "packing_format": packing}
        found = load(save(tmp_path / str((K, size)), write(weight), config), (32, K))
        assert torch.equal(found.dequantize(), weight.values)


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_awq(tmp_path: Path, sym: bool) -> None:
    weight = make(np.random.default_rng(0), 64, 96, 32, 4, sym=sym)
    config = {**CONFIG, "packing_format": "auto_round:auto_awq", "sym": sym}
    assert torch.equal(load(save(tmp_path, awq_gemm(weight), config), (64, 96)).dequantize(), weight.values)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_of_0_as_0_6_to_0_14_wrote_them(tmp_path: Path, bits: int) -> None:
    """They took 1 from every field of a word at once, so that a 0 borrowed from the field above it."""
    weight = make(np.random.default_rng(bits), 64, 64, 32, bits, sym=False)
    weight.zeros[:, ::3] = 0
    ones = sum(1 << i for i in range(0, 32, bits))
    tensors = less_one(weight) | {"qzeros": torch.from_numpy(stream(weight.zeros, bits).view(np.uint32) - np.uint32(ones)).int()}
    found = load(save(tmp_path, tensors, {**CONFIG, "bits": bits, "sym": False}))
    assert torch.equal(found.dequantize(), weight.values)


def test_scales_stay_in_float16(tmp_path: Path) -> None:
    """AutoRound multiplies in float16 and rounds to the model's type thereafter; GPTQModel rounds the scales."""
    weight = make(np.random.default_rng(0), 64, 64, 32, 4, sym=True)
    save(tmp_path, less_one(weight), None)
    for config, dtype in ((CONFIG, torch.float16), ({"quant_method": "gptq", "bits": 4, "group_size": 32}, torch.bfloat16)):
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config, "dtype": "bfloat16"}))
        assert load(tmp_path).scales.dtype == dtype


def fp8(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)


def test_fp8(tmp_path: Path) -> None:
    """In blocks of 128 by 128; with one scale, activations left alone unless they were quantized, too; with one per output."""
    weight, scales = fp8(160, 200), torch.rand(2, 2).bfloat16()
    found = load(save(tmp_path / "blocks", {"weight": weight, "weight_scale_inv": scales}, BLOCKS), (160, 200))
    every = scales.float().repeat_interleave(128, 0)[:160].repeat_interleave(128, 1)[:, :200]
    assert torch.equal(found.dequantize(), weight.float() * every) and found.activation is None
    one = {"weight": weight, "weight_scale": torch.tensor([0.03]).bfloat16()}
    for act, activation in ((16, None), (8, "fp8-token")):
        config = {name: value for name, value in FP8.items() if name != "packing_format"} | {"group_size": 0, "act_bits": act}
        found = load(save(tmp_path / str(act), one, config), (160, 200))
        assert torch.equal(found.dequantize(), weight.float() * one["weight_scale"].float()) and found.activation == activation
    rows = torch.rand(160).bfloat16()
    static = {**FP8, "packing_format": "auto_round:fp8_static", "group_size": -1, "act_bits": 8, "activation_scheme": "static"}
    tensors = {"weight": weight, "weight_scale": rows, "input_scale": torch.ones(1).bfloat16()}
    found = load(save(tmp_path / "static", tensors, static), (160, 200))
    assert torch.equal(found.dequantize(), weight.float() * rows.float()[:, None]) and found.activation == "fp8-tensor"


EXTRA = {
    r".*1\.self_attn\.v_proj.*": {"bits": 16},
    r".*o_proj.*": {"bits": 3, "group_size": 64},
    "k_proj": {"sym": False},  # as it is written where nothing but the weights was read
    "mlp.gate": {"bits": 2},
    "model.layers.1.mlp.gate": {"bits": 16, "data_type": "float"},
    "model.layers.0.mlp.down_proj": {"bits": 8, "group_size": -1, "super_bits": None, "rotation_config": None},
    "model.layers.0.input_layernorm": {"bits": 16, "data_type": "float"},
    "lm_head": {"bits": 4, "group_size": 32, "sym": True, "data_type": "int", "act_bits": 16, "act_sym": None},
}


def test_modules_of_their_own() -> None:
    """By name, by a pattern, by a part of names; names go first, and of patterns the first that is found anywhere."""
    found = scheme({**CONFIG, "extra_config": EXTRA})
    default = WeightScheme("gptq", 4, 32, zero_offset=1, zero_borrow=True)
    of = {name: found.for_module(f"model.layers.{name}") for name in (
        "1.self_attn.v_proj", "0.self_attn.v_proj", "1.self_attn.o_proj", "0.self_attn.k_proj", "0.mlp.down_proj",
        "1.mlp.down_proj", "1.mlp.gate", "1.mlp.gate_proj",
    )}  # fmt: skip
    assert of["1.self_attn.v_proj"] == of["1.mlp.gate"] == DENSE
    assert of["0.self_attn.v_proj"] == of["1.mlp.down_proj"] == found.for_module("lm_head") == default
    o, k, down = of["1.self_attn.o_proj"], of["0.self_attn.k_proj"], of["0.mlp.down_proj"]
    assert (o.bits, o.group_size, k.bits, k.symmetric, down.bits, down.group_size) == (3, 64, 4, False, 8, -1)
    assert of["1.mlp.gate_proj"].bits == 2  # the pattern's; the router's name is no pattern
    assert found.for_module("model.embed_tokens") == scheme(CONFIG).for_module("lm_head") == DENSE
    norms = {f"model.layers.{n}.input_layernorm": {"bits": 16, "data_type": "float"} for n in range(900)}
    assert len(scheme({**CONFIG, "extra_config": norms}).rules) == 1


def test_a_checkpoint_of_several_widths(tmp_path: Path) -> None:
    """Every module with what is its own; tensors decide what is not quantized."""
    rng = np.random.default_rng(5)
    kinds = {
        "model.layers.0.self_attn.q_proj": (4, 32, True), "model.layers.1.self_attn.o_proj": (3, 64, True),
        "model.layers.0.self_attn.k_proj": (4, 32, False), "model.layers.0.mlp.down_proj": (8, -1, True),
        "lm_head": (4, 32, True),
    }  # fmt: skip
    weights = {name: drawn(rng, 64, 128, size, bits, sym=sym) for name, (bits, size, sym) in kinds.items()}
    tensors = {f"{name}.{suffix}": tensor for name, w in weights.items() for suffix, tensor in less_one(w).items()}
    plain = torch.randn(64, 128)
    tensors |= {f"model.layers.{n}.self_attn.v_proj.weight": plain.clone() for n in (0, 1)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {**CONFIG, "extra_config": EXTRA}}))
    with Checkpoint.open(tmp_path, "auto-round") as checkpoint:
        for name, weight in weights.items():
            found = checkpoint.weight(name, (64, 128))
            assert isinstance(found, QuantTensor) and torch.equal(found.dequantize(), weight.values), name
        for n in (0, 1):
            found = checkpoint.weight(f"model.layers.{n}.self_attn.v_proj", (64, 128))
            assert isinstance(found, Tensor) and torch.equal(found, plain)
        assert checkpoint.leftover() == []


@pytest.mark.parametrize(
    ("given", "layout", "offset"),
    [
        ({"quant_method": "intel/auto-round", "backend": "auto_round:exllamav2"}, "gptq", 0),
        ({"quant_method": "intel/auto-round", "backend": "auto_round:tritonv2"}, "gptq", 0),
        ({"quant_method": "intel/auto-round", "backend": "auto_round:gptq:exllamav2"}, "gptq", 1),
        ({"quant_method": "intel/auto-round", "backend": "gptq:exllamav2"}, "gptq", 1),
        ({"quant_method": "intel/auto-round", "backend": "auto_round:auto_awq:gemm"}, "awq-gemm", 0),
        ({"quant_method": "intel/auto_round", "backend": "auto"}, "gptq", 1),
        ({"quant_method": "auto_round"}, "gptq", 1),
        ({"quant_method": "auto-round", "packing_format": "auto_round:gptq", "backend": "auto_round:exllamav2"}, "gptq", 1),
    ],
)
def test_older_spellings(given: dict[str, Any], layout: str, offset: int) -> None:
    found = scheme({"bits": 4, "group_size": 128, "sym": False, "data_type": "int", **given})
    assert found.method == "auto-round"
    assert (found.for_module(Q).layout, found.for_module(Q).zero_offset, found.for_module(Q).symmetric) == (layout, offset, False)


def test_the_method_by_its_names(tmp_path: Path) -> None:
    found = scheme(CONFIG)
    for same in (None, "auto-round", "auto_round", "AutoRound", "intel/auto-round", "inc"):
        found.as_stated(same)
    with pytest.raises(InputError, match="'gptq' was stated, but the checkpoint is 'auto-round'"):
        found.as_stated("gptq")
    weight = make(np.random.default_rng(0), 64, 64, 32, 4, sym=True)
    save(tmp_path, awq_gemm(weight), CONFIG)
    with pytest.raises(CheckpointError, match=rf"says 'auto-round', but the tensors are laid out as 'awq': {re.escape(MODULE)}"):
        load(tmp_path)


WHAT_WOULD = (
    "'int' with act_bits 16 is, and 'fp' of 8 bits: AutoRound's schemes W2A16 to W8A16, FPW8A16, FP8_STATIC and FP8_BLOCK"
)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data_type": "mx_fp", "act_bits": 4}, f"data_type 'mx_fp' with act_bits 4 is not supported; {WHAT_WOULD}"),
        (
            {"data_type": "nv_fp", "act_bits": 4, "packing_format": "auto_round:llm_compressor"},
            "data_type 'nv_fp' with act_bits 4",
        ),
        ({"data_type": "mx_int", "packing_format": "auto_round"}, "data_type 'mx_int' with act_bits 16 is not supported"),
        ({"act_bits": 8}, f"data_type 'int' with act_bits 8 is not supported; {WHAT_WOULD}"),
        ({**FP8, "bits": 4}, "bits 4 is not supported; one of 8 is"),
        ({**FP8, "fmt": "e5m2"}, "fmt 'e5m2' is not supported; one of e4m3"),
        (
            {"packing_format": "auto_round:llm_compressor"},
            "packing_format 'auto_round:llm_compressor' is not supported; one of auto_round, auto_round:gptqmodel, "
            "auto_round:auto_gptq, auto_round:auto_awq is",
        ),
        ({"packing_format": "auto_round:fake"}, "packing_format 'auto_round:fake' is not supported"),
        ({"packing_format": None, "backend": "gptq:marlin"}, "packing_format 'gptq:marlin' is not supported"),
        ({"bits": 1}, "bits 1 is not supported; one of 2, 3, 4, 5, 6, 7, 8 is"),
        ({"bits": 8, "packing_format": "auto_round:auto_awq"}, "bits 8 is not supported; one of 4 is"),
        ({"bits": None}, "bits is missing"),
        ({"group_size": 0}, "group_size 0 is not a group size"),
        ({"rotation_config": {"block_size": 32}}, "rotation_config is not supported: it needs activations rotated at run time"),
        ({"spinquant_config": {"r4": True}}, "spinquant_config is not supported"),
        ({"extra_config": {Q: 16}}, "extra_config is .*, expected an object of objects"),
        ({"extra_config": {"(q": {"bits": 8}}}, r"extra_config has '.*\(q.*', which is not a regular expression"),
        ({"extra_config": {Q: {"bits": 9}}}, rf"extra_config '{Q}': bits 9 is not supported"),
        ({"extra_config": {Q: {"data_type": "mx_fp"}}}, f"extra_config '{Q}': data_type 'mx_fp' with act_bits 16"),
    ],
)
def test_refusals(given: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        QuantScheme.from_config({"quantization_config": {**CONFIG, **given}})


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(("module", "offset"), [("qlinear_torch", 0), ("qlinear_torch_zp", 1)])
def test_against_its_own_packers(module: str, offset: int, bits: int, sym: bool) -> None:
    """Wherever AutoRound is installed: what its layers pack, and what they make of it."""
    pytest.importorskip("auto_round")
    theirs = pytest.importorskip(f"auto_round_extension.torch.{module}").QuantLinear
    torch.manual_seed(bits)
    weight = drawn(np.random.default_rng(bits), 64, 96, 32, bits, sym=sym)
    linear = torch.nn.Linear(96, 64, bias=False)
    linear.weight.data = weight.values
    layer = theirs(bits, 32, 96, 64, False)
    layer.device = "cpu"
    zeros = 2 ** (bits - 1) if sym else torch.from_numpy(weight.zeros.T.copy()).float()
    layer.pack(linear, torch.from_numpy(weight.scales.T.copy()).float(), zeros, None, device="cpu")
    tensors = {f"l.{name}": tensor for name, tensor in layer.state_dict().items()}
    source = SimpleNamespace(
        info=lambda name: SimpleNamespace(numel=tensors[name].numel()) if name in tensors else None,
        take=lambda name, **_: tensors[name],
        skip=lambda name: None,
    )
    settings = {**CONFIG, "bits": bits, "sym": sym, "packing_format": "auto_round:auto_gptq" if offset else "auto_round"}
    found = reader.load(source, "l", scheme(settings).for_module(Q), (64, 96))
    assert torch.equal(found.dequantize(), weight.values)
    assert torch.equal(found.dequantize(torch.float16).float(), layer(torch.eye(96)).t())
