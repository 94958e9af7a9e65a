"""How large a model is: in its files, by weight, and in memory, embedding and head told apart. Headers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.spec import ModelSpec
from quant.headers import CheckpointIndex
from quant.scheme import QuantScheme, read_scheme


@dataclass(frozen=True)
class Sizes:
    """Bytes, and numbers of weights."""

    weights: int  # of the whole model; what two share counts once
    file_bytes: int  # of all tensors
    linears: int  # weights of the decoder layers' linears that are quantized; of all, where none is
    linear_bytes: int  # of these in the files: with scales, zeros and orders, without biases
    memory: Mapping[str, int]  # by part, as the plan has them: embedding, attention, mlp (or router, experts), head, norms
    head: str  # what the head is in memory, in words

    @property
    def linear_bits(self) -> float:
        """Bits for a weight of a quantized linear."""
        return 8 * self.linear_bytes / self.linears

    @property
    def bits(self) -> float:
        """Bits for a weight of the model, in its files: what llama.cpp calls BPW."""
        return 8 * self.file_bytes / self.weights

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "parameters": self.weights,
            "file_bytes": self.file_bytes,
            "bits_per_linear_weight": self.linear_bits,
            "bits_per_weight": self.bits,
            "weights_bytes": self.memory_bytes,
            "embedding_bytes": self.memory.get("embedding", 0),
            "head_bytes": self.memory.get("head", 0),
            "bits_per_weight_in_memory": 8 * self.memory_bytes / self.weights,
            "lm_head": self.head,
        }


def read_sizes(directory: Path, plan: Mapping[str, Any]) -> Sizes:
    """``plan``: MemoryPlan.to_dict() of the model as it is loaded."""
    index = CheckpointIndex.open(directory)
    config, scheme = read_scheme(index)
    spec = ModelSpec.from_config(config)
    linears, nbytes = _linears(index, spec, scheme)
    memory = {name: size for name, size in plan["weights_bytes"].items() if name != "total"}
    return Sizes(spec.num_parameters, index.total_bytes, linears, nbytes, memory, str(plan["lm_head"]))


def _linears(index: CheckpointIndex, spec: ModelSpec, scheme: QuantScheme) -> tuple[int, int]:
    """(weights, bytes) of the quantized ones, or of all."""
    modules = [one for one in spec.modules() if one.in_layer]
    some = [one for one in modules if scheme.for_module(one.name).quantized] or modules
    names = {one.name for one in some}
    stored = (info.nbytes for info in index.tensors.values() if _owner(info.name) in names and not info.name.endswith(".bias"))
    return sum(one.N * one.K for one in some), sum(stored)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]
