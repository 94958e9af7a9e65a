"""Whether the headers hold the model that config.json describes: else a plan of one would be a plan of neither."""

from __future__ import annotations

from collections.abc import Mapping

from models.spec import ModelSpec, ModuleShape
from quant.errors import CheckpointError
from quant.headers import CheckpointIndex, TensorInfo, check_stack
from quant.scheme import QuantScheme

PACKED = ("qweight", "weight_packed", "blocks")
ENDS = ("model.embed_tokens", "lm_head")  # of a tied model one may be stored for both
CORRECTION = ".e_score_correction_bias"  # ERNIE has it in one row, GLM without
TIED = " (if the model's head is its embedding, config.json needs tie_word_embeddings: true)"


def check_headers(index: CheckpointIndex, spec: ModelSpec, scheme: QuantScheme) -> None:
    """Raises CheckpointError naming a weight or norm that is missing, or too large or small for its [N, K].

    The loader is stricter: it looks at every tensor, and leaves none over.
    """
    tensors = index.tensors
    for module in spec.modules():
        stored = _weight(tensors, module.name)
        if stored is None and spec.tie_embeddings and module.name in ENDS:
            stored = _weight(tensors, next(name for name in ENDS if name != module.name))
        expects = f"config.json expects a weight [out, in] of {[module.N, module.K]}"
        if stored is None:
            check_stack(tensors, module.name)
            tied = TIED if module.part == "head" else ""
            raise CheckpointError(f"{module.name}: its weight is missing from {index.directory}, {expects}{tied}")
        if not _fits(stored, module, scheme.for_module(stored.name.rpartition(".")[0]).bits):
            raise CheckpointError(f"{stored.name}: found {stored}, {expects}")
    wide = {} if spec.recurrent is None else dict(spec.recurrent.small_tensors)
    for name, numel in spec.small_tensors():
        shape = wide.get(name.split(".", 3)[-1], (numel,))  # by its name within a layer
        if name not in tensors:
            raise CheckpointError(f"{name}: the tensor is missing from {index.directory}, expected {list(shape)}")
        shapes = [shape, (1, numel)] if name.endswith(CORRECTION) else [shape]
        if tensors[name].shape not in shapes:
            raise CheckpointError(f"{name}: found {tensors[name]}, expected {list(shape)}")


def _weight(tensors: Mapping[str, TensorInfo], module: str) -> TensorInfo | None:
    return next((tensors[name] for kind in ("weight", *PACKED) if (name := f"{module}.{kind}") in tensors), None)


def _fits(stored: TensorInfo, module: ModuleShape, bits: int) -> bool:
    """Packed ones by their size: formats pack along either dimension, and round it up to whole words, or to groups of them."""
    if stored.name.endswith(".weight"):
        return stored.shape == (module.N, module.K // 2 if stored.dtype == "U8" else module.K)
    if stored.name.endswith(".blocks"):
        return stored.shape == (module.N, module.K // 32, 16)
    exact = module.N * module.K * bits
    return exact <= 8 * stored.nbytes <= exact + 1024 * bits * (module.N + module.K)
