"""A checkpoint as a whole: real ones from the reference tools, what is left over, what does not fit, and how much is read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from quant.checkpoint import Checkpoint
from quant.errors import CheckpointError, InputError
from quant.tensor import QuantTensor
from tests.quant import writers
from tests.quant.writers import MODULE, make, save

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}


def modules(checkpoint: Checkpoint) -> list[str]:
    suffixes = (".qweight", ".weight_packed", ".weight")
    return sorted({name.rsplit(".", 1)[0] for name in checkpoint.index.tensors if name.endswith(suffixes)})


@pytest.mark.realdata
def test_every_real_checkpoint_is_read_whole(shared_data: Path) -> None:
    """As published by AutoAWQ, GPTQModel and llm-compressor; the float model they were made from lies close by every weight."""
    original = Checkpoint.open(shared_data / "models" / "TinyStories-656K")
    names = [path.name for path in sorted((shared_data / "quantized").iterdir())]
    assert names
    for name in names:
        with Checkpoint.open(shared_data / "quantized" / name) as checkpoint:
            quantized = 0
            for module in modules(checkpoint):
                if "norm" in module:
                    checkpoint.tensor(f"{module}.weight")
                    continue
                weight = checkpoint.weight(module)
                if isinstance(weight, QuantTensor):
                    weight.check()
                    quantized += 1
                    expected = original.weight(module)
                    assert isinstance(expected, torch.Tensor)
                    if not name.startswith("awq"):  # AWQ moves scales between layers, so its weights are not the original's
                        error = (weight.dequantize() - expected.float()).norm() / expected.float().norm()
                        assert error < (0.02 if weight.bits == 8 and weight.kind == "int" else 0.04 if weight.bits == 8 else 0.25)
            assert checkpoint.leftover() == []
            assert quantized == 14
            assert checkpoint.scheme.method == {"a": "awq", "g": "gptq", "c": "compressed-tensors"}[name[0]]
        checkpoint.scheme.as_stated(checkpoint.scheme.method)
        with pytest.raises(InputError, match="was stated, but the checkpoint is"):
            Checkpoint.open(shared_data / "quantized" / name, quantization="none")


def test_expected_shape(tmp_path: Path) -> None:
    save(tmp_path, writers.awq_gemm(make(np.random.default_rng(0), 16, 64, 32, 4, sym=False)), AWQ)
    checkpoint = Checkpoint.open(tmp_path)
    assert isinstance(checkpoint.weight(MODULE, (16, 64)), QuantTensor)
    with pytest.raises(
        CheckpointError, match=r"up_proj: found a weight \[out, in\] of \[16, 64\], config.json expects \[16, 128\]"
    ):
        checkpoint.weight(MODULE, (16, 128))
    with pytest.raises(CheckpointError, match=r"gone.weight: the tensor is missing .*, expected F16/BF16/F32\[4, 4\]"):
        checkpoint.weight("gone", (4, 4))
    with pytest.raises(CheckpointError, match=r"model.norm.weight: the tensor is missing .*, expected a tensor"):
        checkpoint.tensor("model.norm.weight")


def test_dense_weights(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        weight = torch.randn(3, 5).to(dtype)
        save(tmp_path, {"weight": weight}, None)
        with Checkpoint.open(tmp_path, "none") as checkpoint:
            read = checkpoint.weight(MODULE, (3, 5))
            assert isinstance(read, torch.Tensor) and torch.equal(read, weight)
            with pytest.raises(CheckpointError, match=r"up_proj.weight: found \w+\[3, 5\], expected F16/BF16/F32\[5, 3\]"):
                checkpoint.weight(MODULE, (5, 3))
    save(tmp_path, {"weight": torch.ones(3, 5, dtype=torch.float64)}, None)
    with pytest.raises(CheckpointError, match=r"up_proj.weight: found F64\[3, 5\], expected F16/BF16/F32"):
        Checkpoint.open(tmp_path).weight(MODULE)


def test_dtypes_and_shapes_survive(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6, dtype=torch.int64).reshape(2, 3),
        "b": torch.tensor(1.5, dtype=torch.bfloat16),
        "c": torch.empty(0, 4),
        "d": torch.tensor([True, False]),
        "e": torch.randn(3).to(torch.float8_e4m3fn),
        "f": torch.randn(7, dtype=torch.float64),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with Checkpoint.open(tmp_path) as checkpoint:
        for name, tensor in tensors.items():
            read = checkpoint.tensor(name)
            assert read.dtype == tensor.dtype and read.shape == tensor.shape
            assert torch.equal(read.float(), tensor.float())
        assert checkpoint.leftover() == []


def test_leftover(tmp_path: Path) -> None:
    written = make(np.random.default_rng(0), 16, 64, 32, 4, sym=False)
    module = {**writers.awq_gemm(written), "bias": torch.zeros(16), "rubbish": torch.ones(1)}
    save(tmp_path, module, AWQ)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.k_scale": torch.ones(1),
        "model.layers.0.self_attn.k_proj.output_scale": torch.ones(1),
        "model.layers.0.self_attn.attn.v_scale": torch.ones(1),
        "transformer.h.0.attn.masked_bias": torch.ones(1),
        "model.layers.0.self_attn.q_proj.bias": torch.zeros(4),
    }
    save_file(extra, tmp_path / "extra.safetensors")
    files = dict.fromkeys(extra, "extra.safetensors") | {f"{MODULE}.{suffix}": "model.safetensors" for suffix in module}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (tmp_path / "model.safetensors").rename(tmp_path / "first.safetensors")
    files = {name: file.replace("model.", "first.") for name, file in files.items()}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.weight(MODULE)
        # A bias of zeros beside a weight that was read means nothing; one whose weight nobody read might.
        assert checkpoint.leftover() == ["model.layers.0.mlp.up_proj.rubbish", "model.layers.0.self_attn.q_proj.bias"]
        assert checkpoint.has(f"{MODULE}.bias") and not checkpoint.has("nothing")
        checkpoint.skip(f"{MODULE}.rubbish")
        assert checkpoint.leftover() == ["model.layers.0.self_attn.q_proj.bias"]
    module["bias"][3] = 1
    save_file({f"{MODULE}.{suffix}": tensor for suffix, tensor in module.items()}, tmp_path / "first.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.weight(MODULE)
        assert f"{MODULE}.bias" in checkpoint.leftover()


def test_tensors_that_do_not_fit_together(tmp_path: Path) -> None:
    written = make(np.random.default_rng(0), 16, 64, 32, 4, sym=False)
    module = writers.awq_gemm(written)
    save(tmp_path, {**module, "scales": module["scales"].double()}, AWQ)
    with pytest.raises(CheckpointError, match=r"up_proj.scales: found F64\[2, 16\], expected F16/BF16/F32"):
        Checkpoint.open(tmp_path).weight(MODULE)


def test_config_is_needed(tmp_path: Path) -> None:
    save(tmp_path, {"weight": torch.ones(2, 2)}, None)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: not valid JSON"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json: the file is missing"):
        Checkpoint.open(tmp_path)


def test_a_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    save(tmp_path, {"weight": torch.ones(64, 64)}, None)
    with Checkpoint.open(tmp_path) as checkpoint:
        path = tmp_path / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=r"truncated while reading model.layers.0.mlp.up_proj.weight"):
            checkpoint.weight(MODULE)


def test_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    written = make(np.random.default_rng(0), 16, 64, 32, 4, sym=False)
    save_file(
        {"model.layers.0.a.weight": torch.ones(512, 512)} | {f"{MODULE}.{k}": v for k, v in writers.awq_gemm(written).items()},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": AWQ}))
    read: list[int] = []
    real = os.preadv

    def counted(fd: int, buffers: list[memoryview], at: int) -> int:
        read.append(real(fd, buffers, at))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counted)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert read == []
        checkpoint.weight(MODULE)
        assert sum(read) == 64 * 2 * 4 + 2 * 2 * 4 + 2 * 16 * 2
