"""What LoRA adapters take: the room that is set aside for them, and what they need while a step computes. No torch."""

from __future__ import annotations

from appliance.memory.modules import NATIVE, Loaded, Machinery
from appliance.memory.reference import FLOAT
from appliance.memory.settings import ITEM_SIZE
from kernels.layout import ADAPTED_AT_ONCE, ADDED_INPUTS, BLOCK_N, NATIVE_ROWS, padded
from models.adaptable import adaptable
from models.module import ModuleShape
from models.spec import ModelSpec
from quant.rules import DENSE


def adapter_weights(spec: ModelSpec, layer: int) -> list[tuple[Loaded, Loaded]]:
    """Both matrices of each product of a layer that an adapter may add to, of the largest rank, as models/adapters.py does."""
    assert spec.adapters is not None
    found = []
    for modules in adaptable(spec, layer).values():
        if modules:
            columns, first = spec.adapters.rank * len(modules), modules[0]
            shapes = (columns, first.K), (sum(module.N for module in modules), columns)
            a, b = (Loaded(ModuleShape(first.name, *shape, "adapters", False), DENSE, 2) for shape in shapes)
            found.append((a, b))
    return found


def adapters_nbytes(spec: ModelSpec, machinery: Machinery) -> int:
    """Of all that may be loaded."""
    if spec.adapters is None:
        return 0
    kinds = {spec.kind(number): sum(a.nbytes(machinery) + b.nbytes(machinery) for a, b in adapter_weights(spec, number))
             for number in spec.unlike}  # fmt: skip
    return spec.adapters.count * sum(kinds[spec.kind(number)] for number in range(spec.layers))


def adapters_workspace(spec: ModelSpec, machinery: Machinery) -> int:
    """Bytes of some rows while something is added to them: those of the product and of its input, and what comes of both.

    Gate and up are apart then, in float32, as they are computed, joined, and multiplied. Other operators than native ones widen
    the rest, too. Native ones, where they add within a product, need what is between both matrices alone (native/added.h).
    """
    if spec.adapters is None:
        return 0
    size = ITEM_SIZE[machinery.dtype] + (0 if machinery.ops == NATIVE else 4)
    pairs = [pair for number in spec.unlike for pair in adapter_weights(spec, number)]
    beside = max((a.module.K + a.module.N + 2 * b.module.N for a, b in pairs), default=0)
    apart = ADAPTED_AT_ONCE * (size * beside + 6 * FLOAT * padded(spec.mlp_size, BLOCK_N))
    if machinery.ops != NATIVE:
        return apart
    pieces = (-(-a.module.K // ADDED_INPUTS) * padded(a.module.N, 16) for a, _ in pairs)
    return max(apart, FLOAT * NATIVE_ROWS * max(pieces, default=0))
