"""Quantizing a model: what is refused, and that nothing is left then which looks whole."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from appliance.quantize.options import Options
from appliance.quantize.run import unread
from quant.errors import InputError
from tests.memory.published import fill, write_published
from tests.memory.test_mixture import MIXTRAL, SMALL
from tests.quantizing import make, quantized


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("dense") / "model")


def test_refusals(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, words in (
        ({"method": "marlin"}, "--method is 'marlin'"),
        ({"method": "awq", "act_order": True}, "--act-order is GPTQ's"),
        (
            {"method": "gptq", "act_order": True, "static_groups": False, "format": "compressed-tensors"},
            "compressed-tensors has given up groups",
        ),
        ({"method": "gptq", "static_groups": False}, "--no-static-groups says how groups are made with --act-order"),
        ({"method": "gptq", "format": "awq"}, "--format awq cannot say what GPTQ makes"),
        ({"format": "gguf"}, "--format is 'gguf'"),
        ({"damping": 0.0}, "--damping is 0"),
        ({"calibration_samples": 0}, "--calibration-samples is 0"),
    ):
        with pytest.raises(InputError, match=words):
            Options(**options).checked()  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"--group-size 48 does not divide the 64 inputs of self_attn\.q_proj"):
        quantized(model, tmp_path / "a", group_size=48)
    with pytest.raises(InputError, match="the model was made for 256 tokens"):
        quantized(model, tmp_path / "a", torch.zeros(2, 300, dtype=torch.int64))
    made = quantized(model, tmp_path / "b", method="rtn")
    with pytest.raises(InputError, match="quantized already"):
        quantized(made, tmp_path / "a")
    with pytest.raises(InputError, match="exists already"):
        quantized(model, made)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(InputError, match=r"has 1000 bytes free, and the checkpoint will take \S+ KiB more"):
        quantized(model, tmp_path / "a")
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.partial").exists()


@pytest.mark.parametrize("config", [SMALL, MIXTRAL], ids=["qwen3-moe", "mixtral"])
def test_mixtures_of_experts(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = fill(write_published(tmp_path / "mixture", config, "none"), "none")
    with pytest.raises(
        InputError, match=r"(Qwen3Moe|Mixtral)ForCausalLM is a mixture of experts, and this version quantizes none"
    ):
        quantized(folder, tmp_path / "a", method="rtn")
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.partial").exists()


def test_defaults_are_what_others_load() -> None:
    """transformers loads no zero points of compressed-tensors, and GPTQModel none of a version 1 that it did not make."""
    for given, form, sym, words in (
        ({}, "awq", False, None),
        ({"method": "gptq"}, "gptq", True, None),
        ({"method": "rtn", "format": "gptq"}, "gptq", True, None),
        ({"format": "gptq_v2"}, "gptq_v2", True, None),
        ({"method": "gptq", "sym": False}, "gptq_v2", False, None),
        ({"method": "gptq", "sym": False, "format": "gptq"}, "gptq", False, "GPTQModel refuses zero points in a version 1"),
        ({"method": "gptq", "target_bits": 4.5, "format": "gptq"}, "gptq", True, "it knows one width"),
        ({"method": "gptq", "lm_head_bits": 8}, "gptq", True, "no head in codes"),
        ({"bits": 8}, "compressed-tensors", True, None),
        ({"target_bits": 4.5}, "compressed-tensors", True, "reads all widths as one"),
        ({"format": "compressed-tensors"}, "compressed-tensors", True, None),
        ({"format": "compressed-tensors", "sym": False}, "compressed-tensors", False, "does not load zero points"),
    ):
        found = Options(**given).checked()  # type: ignore[arg-type]
        assert (found.format, found.sym) == (form, sym), given
        said = unread(found)
        assert said is None if words is None else said is not None and words in said, given


def test_what_the_file_cannot_hold(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = tmp_path / "large"
    shutil.copytree(model, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = 1e6
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"model\.layers\.1\.input_layernorm\.weight: some of its values are not finite numbers in float16"
    ):
        quantized(other, tmp_path / "made", method="rtn")
    (tmp_path / "made.partial" / "job.json").unlink()
    with pytest.raises(InputError, match="files of a job that nobody knows"):
        quantized(model, tmp_path / "made", method="rtn")
