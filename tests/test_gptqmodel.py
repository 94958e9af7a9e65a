"""GPTQModel reads what is made here with equal weights. Runs where that package is installed, which nothing here needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.spec import ModelSpec
from quant.checkpoint import Checkpoint
from quant.tensor import QuantTensor
from tests.quantizing import make, quantized

CHECKPOINTS: dict[str, dict[str, Any]] = {
    **{f"{bits} bits": {"method": "gptq", "bits": bits, "group_size": 32} for bits in (2, 3, 4, 8)},
    **{f"{bits} bits, zero points": {"method": "gptq", "bits": bits, "sym": False} for bits in (2, 3, 4, 8)},
    "version 2, symmetric": {"method": "gptq", "format": "gptq_v2"},
    "a scale for each output": {"method": "gptq", "group_size": -1},
    "static groups": {"method": "gptq", "act_order": True},
    "groups in order": {"method": "gptq", "act_order": True, "static_groups": False},
    "mixed": {"method": "gptq", "target_bits": 6.5, "group_size": 32},
    "head": {"method": "gptq", "lm_head_bits": 8},
    "awq": {"method": "awq", "group_size": 32},
    "awq, mixed": {"method": "awq", "format": "awq", "group_size": 32, "target_bits": 9},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("dense") / "model", num_hidden_layers=2, vocab_size=128)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_gptqmodel_reads_the_same_weights(model: Path, tmp_path: Path, name: str) -> None:
    package = pytest.importorskip("gptqmodel", exc_type=ImportError)
    made = quantized(model, tmp_path / "made", **CHECKPOINTS[name])
    awq = name.startswith("awq")
    backend = package.BACKEND.AWQ_TORCH if awq else package.BACKEND.GPTQ_TORCH
    theirs = dict(package.GPTQModel.load(str(made), device="cpu", dtype=torch.float16, backend=backend).model.named_modules())
    with Checkpoint.open(made) as checkpoint:
        modules = ModelSpec.from_config(checkpoint.config).modules()
        for module in modules:
            weight, found = checkpoint.weight(module.name, expect=(module.N, module.K)), theirs[module.name]
            if isinstance(weight, QuantTensor):
                found.float()  # its scales: else codes times scales are rounded, as its operator for awq does in any case
                ours = weight.dequantize(torch.float16 if awq else torch.float32).float()
                assert torch.equal(found(torch.eye(module.K)).t(), ours), module.name
            else:
                assert torch.equal(found.weight, weight.half()), module.name
    assert any(hasattr(theirs[module.name], "qweight") for module in modules)


def test_gptqmodel_refuses_zero_points_in_version_1(model: Path, tmp_path: Path) -> None:
    """Whoever made them but itself: so they are in version 2, unless asked for."""
    package = pytest.importorskip("gptqmodel", exc_type=ImportError)
    made = quantized(model, tmp_path / "made", method="gptq", sym=False, format="gptq")
    with pytest.raises(ValueError, match="only supported if produced by gptqmodel"):
        package.GPTQModel.load(str(made), device="cpu", backend=package.BACKEND.GPTQ_TORCH)
