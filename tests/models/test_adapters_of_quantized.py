"""LoRA adapters on quantized checkpoints: what they add to a model is what they add to the same weights, not quantized."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.cpu import backend
from kernels.ops import get_ops
from models.adapters import load_adapter
from models.decoder import Decoder
from models.loader import load_model
from models.spec import AdapterLimits, ModelSpec
from quant.checkpoint import Checkpoint
from quant.tensor import QuantTensor
from tests.adapters import write_adapter
from tests.models.test_adapters import feed
from tests.models.test_expected import CHECKPOINTS, ROUNDED, errors

pytestmark = pytest.mark.realdata


def load(folder: Path, *, reference: bool) -> Decoder:
    with Checkpoint.open(folder) as checkpoint:
        spec = replace(ModelSpec.from_config(checkpoint.config), adapters=AdapterLimits(1, 8))
        return load_model(checkpoint, spec, get_ops("cpu", reference=reference), dtype=torch.float32, max_len=512)


def expanded(folder: Path, target: Path) -> Path:
    """The same checkpoint without quantization."""
    target.mkdir()
    with Checkpoint.open(folder) as checkpoint:
        tensors = {}
        for module in ModelSpec.from_config(checkpoint.config).modules():
            if isinstance(weight := checkpoint.weight(module.name), QuantTensor):
                tensors[f"{module.name}.weight"] = weight.dequantize(weight.rounding)
        config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    for path in folder.glob("*.safetensors"):
        tensors |= {name: one for name, one in load_file(path).items() if name.endswith(("norm.weight", "embed_tokens.weight"))}
        tensors |= {name: one for name, one in load_file(path).items() if name == "lm_head.weight"}
    save_file({name: one.float().contiguous() for name, one in tensors.items()}, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    return target


@pytest.mark.parametrize("kind", ["reference", "torch", "native"])
@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if name not in ROUNDED])
def test_float32(shared_data: Path, tmp_path: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "native" and backend.native() is None:
        pytest.skip("the native extension is not built")
    monkeypatch.setenv("APPLIANCE_CPU_ISA", "auto" if kind == "native" else "torch")
    folder, reference = shared_data / "quantized" / name, kind == "reference"
    decoder, plain = load(folder, reference=reference), load(expanded(folder, tmp_path / "plain"), reference=reference)
    assert errors(decoder, json.loads((folder / "expected.json").read_text())[:2]).max() <= 0.01  # gate and up are apart here
    made = write_adapter(tmp_path / "adapter", decoder.spec, size=0.03)
    ours, theirs = (load_adapter(made, one.spec, one.ops, dtype=torch.float32, max_rank=8) for one in (decoder, plain))
    ids = torch.randint(3, decoder.spec.vocab, (29,), generator=torch.Generator().manual_seed(5))
    found, wanted = feed(decoder, ids, [ours, None, ours], first=20), feed(plain, ids, [theirs, None, theirs], first=20)
    assert (wanted[0] - wanted[1]).abs().max() > 0.1
    assert (found - wanted).abs().max() < 5e-3
