"""Quantization settings of all dialects: what each module gets, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quant.errors import CheckpointError, InputError
from quant.headers import CheckpointIndex
from quant.rules import DENSE
from quant.scheme import QuantScheme, load_configs, read_scheme
from tests.quant.writers import ct_config

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.1.mlp.up_proj"


def scheme(settings: dict[str, Any] | None, beside: dict[str, Any] | None = None) -> QuantScheme:
    return QuantScheme.from_config({} if settings is None else {"quantization_config": settings}, beside)


def with_tensors(directory: Path, config: dict[str, Any], **arrays: torch.Tensor) -> QuantScheme:
    save_file({name.replace("__", "."): array for name, array in arrays.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return read_scheme(CheckpointIndex.open(directory))[1]


def words(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def test_awq() -> None:
    found = scheme(
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 64,
            "zero_point": True,
            "version": "GEMM",
            "modules_to_not_convert": ["mlp.up"],
        }
    )
    assert found.method == "awq"
    q = found.for_module(Q)
    assert (q.layout, q.bits, q.group_size, q.symmetric, q.act_order, q.activation) == ("awq-gemm", 4, 64, False, False, None)
    assert found.for_module(UP) == found.for_module("lm_head") == found.for_module("model.embed_tokens") == DENSE


def test_early_awq_and_gptq_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "quant_config.json").write_text('{"zero_point": true, "q_group_size": 128, "w_bit": 4, "version": "GEMV"}')
    awq = QuantScheme.from_config(*load_configs(tmp_path))
    assert (awq.method, awq.for_module(Q).layout, awq.for_module(Q).group_size) == ("awq", "awq-gemv", 128)
    (tmp_path / "quantize_config.json").write_text('{"bits": 3, "group_size": -1, "desc_act": true, "damp_percent": 0.1}')
    gptq = QuantScheme.from_config(*load_configs(tmp_path))
    q = gptq.for_module(Q)
    assert (gptq.method, q.layout, q.bits, q.group_size, q.act_order, q.zero_offset) == ("gptq", "gptq", 3, -1, True, 1)
    assert gptq.for_module("lm_head") == DENSE


def test_config_json_wins_and_is_completed() -> None:
    found = scheme({"quant_method": "gptq", "bits": 4}, {"bits": 8, "group_size": 32, "checkpoint_format": "gptq_v2"})
    assert (found.for_module(Q).bits, found.for_module(Q).group_size, found.for_module(Q).zero_offset) == (4, 32, 0)


def test_gptq_dynamic() -> None:
    found = scheme(
        {
            "quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True, "lm_head": True,
            "dynamic": {
                r"-:.*self_attn\.k_proj": {},
                r"+:.*layers\.1\..*": {"bits": 8, "group_size": 32, "sym": False},
                r".*layers\.1\.mlp.*": {"bits": 2},
            },
        }
    )  # fmt: skip
    assert found.for_module("model.layers.1.self_attn.k_proj") == DENSE
    up = found.for_module(UP)
    assert (up.bits, up.group_size, up.symmetric, up.act_order) == (8, 32, False, True)
    assert found.for_module(Q).bits == found.for_module("lm_head").bits == 4
    assert found.for_module("model.embed_tokens") == DENSE


def test_compressed_tensors_targets() -> None:
    four = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    eight = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    fp8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    tokens = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    config = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "ignore": ["lm_head", "re:.*k_proj"],
        "config_groups": {
            "a": {"targets": ["Linear"], "weights": four},
            "b": {"targets": ["re:.*mlp.*"], "weights": eight, "format": "pack-quantized"},
            "c": {"targets": [UP], "weights": fp8, "input_activations": tokens},
        },
    }
    found = QuantScheme.from_config({"compression_config": config})
    assert (found.for_module(Q).layout, found.for_module(Q).bits, found.for_module(Q).group_size) == ("pack-quantized", 4, 128)
    assert (found.for_module(UP).layout, found.for_module(UP).activation) == ("float-quantized", "fp8-token")
    down = found.for_module("model.layers.0.mlp.down_proj")
    assert (down.bits, down.group_size) == (8, -1)
    assert found.for_module("lm_head") == found.for_module("model.layers.3.self_attn.k_proj") == DENSE
    assert found.for_module("model.embed_tokens") == DENSE


def test_fused_names() -> None:
    config = ct_config({"num_bits": 4, "strategy": "group", "group_size": 32})
    config["ignore"] = [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up")]
    found = scheme(config)
    assert found.for_module("model.layers.0.mlp.gate_up_proj") == DENSE
    assert found.for_module("model.layers.0.self_attn.qkv_proj").bits == 4
    config["ignore"].pop()
    with pytest.raises(CheckpointError, match=r"gate_up_proj: its parts gate_proj, up_proj are quantized in different ways"):
        scheme(config).for_module("model.layers.0.mlp.gate_up_proj")
    config["ignore"] = ["model.layers.0.mlp.gate_up_proj"]
    assert scheme(config).for_module("model.layers.0.mlp.gate_up_proj") == DENSE


def test_fp8() -> None:
    found = scheme({"quant_method": "fp8", "weight_block_size": [128, 64], "modules_to_not_convert": ["lm_head", "re:.*k_proj"]})
    q = found.for_module(Q)
    assert (q.layout, q.block, q.group_size, q.activation) == ("fp8-block", (128, 64), 64, None)
    assert found.for_module("model.layers.0.self_attn.k_proj") == DENSE
    static = scheme({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": None})
    assert (static.for_module(Q).layout, static.for_module(Q).activation) == ("float-quantized", "fp8-tensor")


def test_tensors_decide_which_modules_are_quantized(tmp_path: Path) -> None:
    found = with_tensors(
        tmp_path,
        {"quantization_config": {"quant_method": "awq", "group_size": 32, "modules_to_not_convert": ["gate"]}},
        layers__0__gate_proj__qweight=words(64, 2), layers__0__gate_proj__scales=torch.ones(2, 16),
        layers__0__up_proj__weight=torch.ones(16, 64),
        layers__0__v_proj__qweight=words(16, 32), layers__0__v_proj__scales=torch.ones(16, 8),
    )  # fmt: skip
    assert found.for_module("layers.0.gate_proj").layout == "awq-gemm"
    assert found.for_module("layers.0.v_proj").layout == "awq-gemv"
    assert found.for_module("layers.0.up_proj") == DENSE
    assert found.for_module("layers.0.gone").layout == "awq-gemm"


def test_detection_without_a_config(tmp_path: Path) -> None:
    gptq = with_tensors(
        tmp_path, {}, l__0__q__qweight=words(6, 64), l__0__q__scales=torch.ones(2, 64), l__0__q__qzeros=words(2, 6),
        l__0__q__g_idx=words(64),
    )  # fmt: skip
    q = gptq.for_module("l.0.q")
    assert (gptq.method, q.bits, q.group_size, q.symmetric) == ("gptq", 3, 32, False)
    assert "seen from the tensors: l.0.q.qweight I32[6, 64] beside scales F32[2, 64] and a g_idx" in gptq.source
    awq = with_tensors(
        tmp_path, {}, l__0__q__qweight=words(64, 8), l__0__q__scales=torch.ones(2, 64), l__0__q__qzeros=words(2, 8)
    )
    assert (awq.method, awq.for_module("l.0.q").layout, awq.for_module("l.0.q").group_size) == ("awq", "awq-gemm", 32)
    assert with_tensors(tmp_path, {}, w=torch.ones(1)).method == "none"
    for arrays, message in (
        ({"l__0__q__weight_packed": words(2, 2)}, r"l.0.q.weight_packed I32\[2, 2\] is quantized, but config.json has no"),
        (
            {"l__0__q__qweight": words(16, 8), "l__0__q__scales": torch.ones(16, 8)},
            "l.0.q.qweight .* is quantized, but config.json has",
        ),
        (
            {"l__0__q__qweight": words(16, 64), "l__0__q__scales": torch.ones(16, 8)},
            "awq-gemv packing need a quantization_config",
        ),
        ({"l__0__q__qweight": words(16, 8), "l__0__q__scales": torch.ones(2, 8)}, "neither qzeros nor g_idx tells the bits"),
        (
            {"l__0__q__qweight": words(10, 64), "l__0__q__scales": torch.ones(1, 64), "l__0__q__g_idx": words(64)},
            "5-bit GPTQ needs",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            with_tensors(tmp_path, {}, **arrays)


def test_config_and_tensors_contradict(tmp_path: Path) -> None:
    arrays = {"l__0__q__qweight": words(8, 64), "l__0__q__scales": torch.ones(2, 64), "l__0__q__g_idx": words(64)}
    with pytest.raises(
        CheckpointError, match=r"config.json's quantization_config says 'awq', but the tensors are laid out as 'gptq': l.0.q"
    ):
        with_tensors(tmp_path, {"quantization_config": {"quant_method": "awq", "bits": 4}}, **arrays)
    packed = {"layers__0__q__weight": torch.ones(4, 4, dtype=torch.int8)}
    found = with_tensors(tmp_path, {}, **packed)
    with pytest.raises(CheckpointError, match=r"layers.0.q.weight is I8\[4, 4\], which is quantized, but nothing says how"):
        found.for_module("layers.0.q")


def test_stated_quantization() -> None:
    awq = scheme({"quant_method": "awq"})
    for same in (None, "awq", "AutoAWQ", "auto_awq", "awq_marlin"):
        awq.as_stated(same)
    scheme(None).as_stated("none")
    scheme({"quant_method": "gptq", "bits": 4}).as_stated("gptq_marlin")
    with pytest.raises(
        InputError, match=r"'gptq' was stated, but the checkpoint is 'awq' \(config.json's quantization_config\); leave"
    ):
        awq.as_stated("gptq")
    with pytest.raises(InputError, match="'awq' was stated, but the checkpoint is 'none'"):
        scheme(None).as_stated("awq")
    with pytest.raises(InputError, match="'none' was stated, but the checkpoint is 'awq'"):
        awq.as_stated("none")
    with pytest.raises(
        InputError, match="'gguf' is not known; one of awq, gptq, auto-round, compressed-tensors, fp8, mxfp4, modelopt, none is"
    ):
        awq.as_stated("gguf")


GPTQ = {"quant_method": "gptq", "bits": 4}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "'bitsandbytes' is not supported; awq, gptq, auto-round, compressed-tensors, fp8, mxfp4 and modelopt are",
        ),
        ({"quant_method": "awq", "bits": 8}, "bits 8 is not supported; one of 4 is"),
        ({"quant_method": "awq", "version": "marlin"}, "version 'marlin' is not supported; one of gemm, exllama"),
        ({"quant_method": "awq", "group_size": 0}, "group_size 0 is not a group size"),
        ({"quant_method": "awq", "modules_to_not_convert": "gate"}, "modules_to_not_convert is 'gate', expected a list"),
        ({"quant_method": "gptq"}, "bits is missing"),
        ({**GPTQ, "bits": 9}, "bits 9 is not supported; one of 2, 3, 4, 5, 6, 7, 8 is"),
        ({**GPTQ, "bits": "four"}, "bits is 'four', expected a whole number"),
        ({**GPTQ, "group_size": -2}, "group_size -2 is not a group size"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported; one of gptq, gptq_v2, gptq_p"),
        ({**GPTQ, "is_marlin_format": True}, "checkpoint_format 'marlin' is not supported"),
        ({**GPTQ, "rotation": "hadamard"}, "rotation 'hadamard' is not supported"),
        ({**GPTQ, "bits": 3, "pack_dtype": "int64"}, "pack_dtype 'int64' is not supported; one of int32 is"),
        ({**GPTQ, "dynamic": {"+:(": {}}}, r"dynamic has '\(', which is not a regular expression"),
        ({**GPTQ, "dynamic": []}, None),
        ({**GPTQ, "dynamic": [1]}, r"dynamic is \[1\], expected an object"),
        ({**GPTQ, "dynamic": {"x": {"bits": 16}}}, "dynamic 'x': bits 16 is not supported"),
        (ct_config(INT4, "marlin-24"), "format 'marlin-24' is not supported; one of pack-quantized"),
        (ct_config(INT4, "nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized' does not hold weights of type 'int'"),
        ({**ct_config(INT4), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config format 'sparse-24-bitmask'"),
        ({**ct_config(INT4), "transform_config": {"config_groups": {"R1": {}}}}, "transform_config is not supported"),
        ({**ct_config(INT4), "config_groups": None}, "config_groups is None, expected an object"),
        (
            {**ct_config(INT4), "config_groups": {"W4A16": ["Linear"]}},
            r"group 'W4A16' is \['Linear'\]; presets must be written out",
        ),
        ({**ct_config(INT4), "ignore": ["re:("]}, r"ignore has '\(', which is not a regular expression"),
        (ct_config({**INT4, "num_bits": 1}), "weights.num_bits 1 is not supported"),
        (ct_config({**INT4, "type": "float"}), "weights.num_bits 4 is not supported; one of 8 is"),
        (ct_config({**INT4, "type": "complex"}), "weights.type 'complex' is not supported; one of int, float is"),
        (ct_config({**INT4, "strategy": "tensor_group"}), "weights.strategy 'tensor_group' is not supported"),
        (ct_config({**INT4, "actorder": "sometimes"}), "weights.actorder 'sometimes' is not supported"),
        (ct_config({**INT4, "dynamic": True}), "weights.dynamic True is not supported"),
        (ct_config(INT4, "float-quantized"), "format 'float-quantized' does not hold weights of type 'int'"),
        (ct_config({**INT4, "strategy": "block"}), "weights.block_structure is None, expected two positive numbers"),
        (ct_config(INT4, input_activations={"type": "posit"}), "input_activations.type 'posit' is not supported"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2' is not supported; one of e4m3"),
        ({"quant_method": "fp8", "activation_scheme": "later"}, "activation_scheme 'later' is not supported"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, r"weight_block_size is \[0, 128\], expected two positive"),
        (ct_config({**INT4, "observer": "anything", "observer_kwargs": {"x": 1}, "zp_dtype": "int4"}, version="9"), None),
        ({**GPTQ, "damp_percent": 7, "unheard_of": {}, "meta": "x"}, None),
    ],
)
def test_values_that_change_the_meaning_are_refused_by_name(config: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert scheme(config).for_module(Q).quantized
        return
    with pytest.raises(CheckpointError, match=message):
        scheme(config)


@pytest.mark.parametrize("names", ["language_model.model.", "model.language_model.", "model."])
def test_the_text_part_is_called_by_any_of_its_names(tmp_path: Path, names: str) -> None:
    """Configs say how modules were called when they were quantized, which need not be how they are stored."""
    tensors = {
        f"{names}layers.{n}.mlp.{part}.weight": torch.zeros(64, 32, dtype=torch.int8) for n in (0, 1) for part in ("a", "b")
    }
    tensors |= {name.replace(".weight", ".weight_scale"): torch.ones(64, 1) for name in tensors}
    tensors |= {"visual.merger.weight": torch.zeros(4, 4), f"{names}layers.2.mlp.a.weight": torch.zeros(64, 32)}
    save_file(tensors, tmp_path / "model.safetensors")
    every = ct_config({"num_bits": 8, "strategy": "channel"}, "int-quantized")
    (group,) = every["config_groups"].values()
    for called in ("language_model.model.", "model.language_model.", "model."):
        other = {**group, "weights": {**group["weights"], "symmetric": False}, "targets": [f"re:{called}layers.1.*a$"]}
        config = {**every, "config_groups": {"all": group, "one": other}, "ignore": ["re:.*visual.*"]}
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
        found = read_scheme(CheckpointIndex.open(tmp_path))[1]
        symmetric = {f"{n}{part}": found.for_module(f"model.layers.{n}.mlp.{part}").symmetric for n in (0, 1) for part in "ab"}
        assert symmetric == {"0a": True, "0b": True, "1a": False, "1b": True}, called
        assert found.for_module("model.layers.2.mlp.a") == DENSE


def test_a_text_part_with_a_head_of_its_own_is_not_tied(tmp_path: Path) -> None:
    """Whatever transformers writes of the whole, which it does for every Mistral3."""
    for text, head, tied in (
        (False, "lm_head", False),
        (False, "model.norm", True),
        (True, "lm_head", True),
        (None, "lm_head", True),
    ):
        save_file({f"language_model.{head}.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
        config = {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": text}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert read_scheme(CheckpointIndex.open(tmp_path))[0]["tie_word_embeddings"] is tied


def test_settings_in_odd_places() -> None:
    nested = {"text_config": {"quantization_config": {"quant_method": "awq"}}}
    assert QuantScheme.from_config(nested).method == "awq"
    with pytest.raises(CheckpointError, match="quantization_config is str, expected an object"):
        QuantScheme.from_config({"quantization_config": "awq"})
    as_autogptq_saves_awq = {"quant_method": "gptq", "checkpoint_format": "gemm", "bits": 4}
    assert scheme(as_autogptq_saves_awq).method == "awq"
    gptqmodel = {"quant_method": "awq", "method": "awq", "format": "gemv_fast", "sym": True, "bits": 4}
    assert (scheme(gptqmodel).for_module(Q).layout, scheme(gptqmodel).for_module(Q).symmetric) == ("awq-gemv-fast", True)
