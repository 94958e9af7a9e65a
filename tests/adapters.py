"""Random LoRA adapters as PEFT writes them, without PEFT."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from models.adaptable import adaptable
from models.spec import ModelSpec

SOME = ("q_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")


def write_adapter(
    directory: Path,
    spec: ModelSpec,
    *,
    seed: int = 0,
    rank: int = 4,
    size: float = 0.1,
    modules: Iterable[str] = SOME,
    **config: Any,
) -> Path:
    """For all layers of a model; ``size``: of the numbers of both matrices."""
    rng, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(spec.layers):
        for module in (one for group in adaptable(spec, layer).values() for one in group):
            if module.name.rpartition(".")[2] in modules:
                name = f"base_model.model.model.layers.{layer}.{module.name}"
                tensors[f"{name}.lora_A.weight"] = torch.randn(rank, module.K, generator=rng) * size
                tensors[f"{name}.lora_B.weight"] = torch.randn(module.N, rank, generator=rng) * size
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    whole = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(modules), **config}
    (directory / "adapter_config.json").write_text(json.dumps(whole))
    return directory
