"""MXFP4 as gpt-oss publishes it: what is stacked comes apart expert by expert, values are exact, the rest is refused.

That of llm-compressor is held to its own dequantizer in tests/quant/test_oracles.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.checkpoint import Checkpoint
from quant.errors import CheckpointError
from quant.headers import CheckpointIndex, read_header
from quant.rules import MXFP4
from quant.scheme import QuantScheme
from quant.tensor import QuantTensor
from tests.memory.published import FLOATS4, GPT_OSS, fill, write_gpt_oss
from tests.quant.writers import MODULE, load, save

EXPERTS = "model.layers.1.mlp.experts"
VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(write_gpt_oss(tmp_path_factory.mktemp("mxfp4"), GPT_OSS), "none")


def changed(folder: Path, to: Path, name: str, at: tuple[int, ...], value: int) -> Path:
    tensors = load_file(folder / "model.safetensors")
    tensors[name][at] = value
    save_file(tensors, to / "model.safetensors")
    (to / "config.json").write_text((folder / "config.json").read_text())
    return to


def test_values(folder: Path) -> None:
    """Number by number, from the definition: sign, code, and a power of two for 32 inputs."""
    raw = load_file(folder / "model.safetensors")
    blocks, scales = raw[f"{EXPERTS}.down_proj_blocks"][3].tolist(), raw[f"{EXPERTS}.down_proj_scales"][3].tolist()
    with Checkpoint.open(folder) as checkpoint:
        weight = checkpoint.weight(f"{EXPERTS}.3.down_proj", expect=(96, 160))
        assert isinstance(weight, QuantTensor) and weight.kind == "fp4" and checkpoint.scheme.method == "mxfp4"
        dense = weight.dequantize().tolist()
        for n in range(0, 96, 7):
            for k in range(160):
                code = blocks[n][k // 32][k % 32 // 2] >> k % 2 * 4 & 15
                value = VALUES[code & 7] * (-1 if code & 8 else 1) * 2.0 ** (scales[n][k // 32] - 127)
                assert dense[n][k] == value
        assert torch.equal(weight.dequantize(torch.bfloat16).float(), weight.dequantize())
        bias = checkpoint.tensor(f"{EXPERTS}.3.gate_up_proj.bias")
        assert torch.equal(bias, raw[f"{EXPERTS}.gate_up_proj_bias"][3])
        order = torch.randperm(96)
        picked = QuantTensor.cat([weight.select_rows(order[:40]), weight.select_rows(order[40:])])
        picked.check()
        assert torch.equal(picked.dequantize(), weight.dequantize()[order])


def test_stacked_tensors_come_apart(folder: Path) -> None:
    """Every byte once, by names that say which expert's."""
    raw, index = read_header(folder / "model.safetensors"), CheckpointIndex.open(folder)
    assert index.total_bytes == sum(info.nbytes for info in raw.values())
    names = {
        f"{EXPERTS}.{e}.{m}.{kind}"
        for e in range(5)
        for m in ("gate_up_proj", "down_proj")
        for kind in ("blocks", "scales", "bias")
    }
    assert {name for name in index.tensors if name.startswith(EXPERTS)} == names
    one, whole = index.tensors[f"{EXPERTS}.4.down_proj.blocks"], raw[f"{EXPERTS}.down_proj_blocks"]
    assert one.shape == (96, 5, 16) and (one.start, one.end) == (whole.end - one.nbytes, whole.end)


@pytest.mark.parametrize("config", [GPT_OSS, {k: v for k, v in GPT_OSS.items() if k != "quantization_config"}])
def test_settings(folder: Path, config: dict[str, object]) -> None:
    """Stated, or seen from the tensors; globs of modules that are left alone; without headers the rules decide."""
    for index in (None, CheckpointIndex.open(folder)):
        if index is None and "quantization_config" not in config:
            continue
        scheme = QuantScheme.from_config(config, index=index)
        assert scheme.for_module(f"{EXPERTS}.0.gate_up_proj") == scheme.for_module(f"{EXPERTS}.4.down_proj") == MXFP4
        for name in ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.router", "lm_head", "model.embed_tokens"):
            assert not scheme.for_module(name).quantized, name


@pytest.mark.parametrize(
    ("name", "at", "value", "words"),
    [
        ("down_proj_scales", (2, 5, 1), 253, r"experts\.2\.down_proj\.scales: found 253, expected at most 252: .* damaged"),
        ("down_proj_scales", (2, 5, 1), 255, r"found 255, expected at most 252"),
        ("down_proj_scales", (2, 5, 1), 0, r"experts\.2\.down_proj\.scales: found 0 \(2\^-127\) beside weights that are not 0"),
    ],
)
def test_scales_that_cannot_be_held(folder: Path, tmp_path: Path, name: str, at: tuple[int, ...], value: int, words: str) -> None:
    with Checkpoint.open(changed(folder, tmp_path, f"{EXPERTS}.{name}", at, value)) as checkpoint:
        checkpoint.weight(f"{EXPERTS}.1.down_proj", expect=(96, 160))
        with pytest.raises(CheckpointError, match=words):
            checkpoint.weight(f"{EXPERTS}.2.down_proj", expect=(96, 160))


def test_zeros_may_have_any_scale(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{EXPERTS}.down_proj_blocks"][0, 7] = 0x80  # a zero, and one with a sign
    tensors[f"{EXPERTS}.down_proj_scales"][0, 7] = 0
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with Checkpoint.open(tmp_path) as checkpoint:
        weight = checkpoint.weight(f"{EXPERTS}.0.down_proj")
    assert isinstance(weight, QuantTensor) and not weight.dequantize()[7].any()


def test_shapes_that_do_not_agree(folder: Path) -> None:
    with (
        Checkpoint.open(folder) as checkpoint,
        pytest.raises(CheckpointError, match=r"found a weight .* of \[96, 160\], .* \[96, 192\]"),
    ):
        checkpoint.weight(f"{EXPERTS}.0.down_proj", expect=(96, 192))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"weight_packed": torch.zeros(8, 24, dtype=torch.uint8)}, r"found U8\[8, 24\], 48 inputs, which are not whole"),
        ({"weight_scale": torch.full((8, 3), 120, dtype=torch.uint8)}, r"scale: found U8\[8, 3\], expected U8/F8_E8M0\[8, 2\]"),
        ({"weight_scale": torch.full((8, 2), 254, dtype=torch.uint8)}, r"weight_scale: found 254, expected at most 252: .* dam"),
        ({"weight_scale": torch.zeros(8, 2, dtype=torch.uint8)}, r"scale: found 0 \(2\^-127\) beside weights that are not 0"),
        ({"weight_scale": None}, r"weight_scale: the tensor is missing"),
        ({}, ""),
    ],
)  # fmt: skip
def test_what_is_damaged_of_llm_compressor(tmp_path: Path, tensors: dict[str, torch.Tensor | None], words: str) -> None:
    whole = {"weight_packed": torch.full((8, 32), 0x91, dtype=torch.uint8), "input_global_scale": torch.ones(1)}
    whole |= {"weight_scale": torch.full((8, 2), 128, dtype=torch.uint8)}
    found = {name: tensor for name, tensor in (whole | tensors).items() if tensor is not None}
    save(tmp_path, found, FLOATS4["ct-mxfp4"][2])
    if words:
        with pytest.raises(CheckpointError, match=words):
            load(tmp_path)
        return
    assert load(tmp_path).dequantize().tolist() == [[1.0, -1.0] * 32] * 8
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.weight(MODULE, (8, 64))
        assert checkpoint.leftover() == [] and checkpoint.scheme.for_module(MODULE) == MXFP4
