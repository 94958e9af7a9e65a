"""LoRA adapters as PEFT publishes them, laid out for the products of a model. Strict: nothing missing, nothing left over."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernels.adapters import AdapterLayer, AdapterWeights, LowRank
from kernels.ops import Ops
from models.adaptable import adaptable
from models.adapter_config import WEIGHTS, AdapterConfig
from models.order import ordered
from models.spec import ModelSpec, ModuleShape
from quant.errors import InputError

NAME = re.compile(
    r"base_model\.model\.(?:model\.|model\.language_model\.|language_model\.model\.|language_model\.)?"
    r"layers\.(\d+)\.(.+)\.lora_(A|B)(?:\.default)?\.weight"
)


@dataclass(frozen=True)
class Pair:
    """Of one module: [r, K] and [N, r], as they are published, and the factor of their product."""

    a: Tensor
    b: Tensor
    scale: float


def load_adapter(
    directory: Path,
    spec: ModelSpec,
    ops: Ops,
    *,
    dtype: torch.dtype,
    max_rank: int,
    begin: Callable[[], None] = lambda: None,
) -> AdapterWeights:
    """Read an adapter for a model whose activations are of ``dtype``. ``begin``: called when nothing is wrong with it, before
    it takes the memory of an adapter.

    Raises InputError naming the file, the tensor and what was found, where it is none for this model, or of a larger rank.
    """
    config = AdapterConfig.read(directory)
    if config.largest > max_rank:
        raise InputError(f"{directory} has rank {config.largest}, but --max-lora-rank is {max_rank}")
    pairs = _pairs(directory, spec, config)
    begin()
    return AdapterWeights(tuple(_layer(spec, number, pairs, ops, dtype) for number in range(spec.layers)))


def _pairs(directory: Path, spec: ModelSpec, config: AdapterConfig) -> dict[tuple[int, str], Pair]:
    """By layer and module."""
    halves: dict[tuple[int, str], dict[str, Tensor]] = {}
    names: dict[tuple[int, str], str] = {}
    shapes = {number: {m.name: m for group in adaptable(spec, number).values() for m in group} for number in range(spec.layers)}
    others = []
    for name, tensor in _tensors(directory / WEIGHTS):
        found = NAME.fullmatch(name)
        place = None if found is None else (int(found[1]), found[2])
        if found is None or place is None or place[1] not in shapes.get(place[0], {}):
            others.append(name)
            continue
        halves.setdefault(place, {})[found[3]] = _checked(name, tensor, found[3], shapes[place[0]][place[1]])
        names[place] = name.partition(".lora_")[0]
    if others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise InputError(
            f"{directory / WEIGHTS}: {len(others)} tensors have no place in a {spec.architecture} of {spec.layers} layers, where "
            f"attention's and the MLP's linears can have adapters: {shown}"
        )
    if not halves:
        raise InputError(f"{directory / WEIGHTS} has no tensors of an adapter (...lora_A.weight, ...lora_B.weight)")
    return {place: _pair(names[place], both, config) for place, both in halves.items()}


def _pair(name: str, both: dict[str, Tensor], config: AdapterConfig) -> Pair:
    if len(both) == 1:
        raise InputError(f"{name} has lora_{next(iter(both))}, but not the other matrix")
    a, b = both["A"], both["B"]
    if a.shape[0] != b.shape[1]:
        raise InputError(f"{name}: lora_A has rank {a.shape[0]}, lora_B {b.shape[1]}")
    return Pair(a, b, config.scale(name.removeprefix("base_model.model."), a.shape[0]))


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    if not path.is_file():
        pickled = path.with_name("adapter_model.bin").is_file()
        hint = "adapter_model.bin is a pickle, which can run code: save it as safetensors" if pickled else "it is needed"
        raise InputError(f"{path.parent} has no {path.name}: {hint}")
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # no dict
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def _checked(name: str, tensor: Tensor, half: str, module: ModuleShape) -> Tensor:
    """Float32, of the module's shape on its side."""
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise InputError(f"{name} is {tensor.dtype}: float32, float16 or bfloat16 is needed")
    side = (1, module.K) if half == "A" else (0, module.N)
    if tensor.dim() != 2 or tensor.shape[side[0]] != side[1] or not tensor.numel():
        wanted = f"[rank, {module.K}]" if half == "A" else f"[{module.N}, rank]"
        raise InputError(f"{name} is {list(tensor.shape)}, but {wanted} is needed: is the adapter one of this model?")
    if not bool(tensor.isfinite().all()):
        raise InputError(f"{name} has numbers that are not finite")
    return tensor.float()


def _layer(spec: ModelSpec, number: int, pairs: dict[tuple[int, str], Pair], ops: Ops, dtype: torch.dtype) -> AdapterLayer:
    made = {}
    for slot, modules in adaptable(spec, number).items():
        each = [pairs.get((number, module.name)) for module in modules]
        if any(each):
            a, parts = joined(each, modules)
            parts = [b for b, _ in ordered(spec, number, [(part, None) for part in parts])] if slot == "qkv" else parts  # type: ignore[misc]
            packed = [ops.pack(half.to(ops.device, dtype), dtype=dtype, activation="bf16") for half in (a, torch.cat(parts))]
            made[slot] = LowRank(*packed)
    return AdapterLayer(**made)


def joined(pairs: Sequence[Pair | None], modules: Sequence[ModuleShape]) -> tuple[Tensor, list[Tensor]]:
    """One pair for modules that read the same: A of all, [R, K], and for each module its outputs' rows of B, [N, R].

    A module's rows have its own matrix in its own columns, and zeros beside: so all are two products.
    """
    columns = sum(len(pair.a) for pair in pairs if pair is not None)
    first, parts = 0, []
    for pair, module in zip(pairs, modules, strict=True):
        part = torch.zeros(module.N, columns)
        if pair is not None:
            part[:, first : first + len(pair.a)] = pair.b * pair.scale
            first += len(pair.a)
        parts.append(part)
    return torch.cat([pair.a for pair in pairs if pair is not None]), parts
