"""Which grid each module's weights are put on: the same for all, or more bits for those that need them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from models.plain import INPUTS
from models.spec import ModelSpec
from quant.algorithms.grid import Grid

KEPT = 16  # bits of a module that stays as it is


@dataclass(frozen=True)
class Recipe:
    """``others``: the grids of modules (model.layers.0.mlp.up_proj, ..) that are not on the default; None: left as it is."""

    default: Grid
    others: Mapping[str, Grid | None] = field(default_factory=dict)

    def grid(self, module: str) -> Grid | None:
        """None for a module that is left as it is."""
        return self.others.get(module, self.default)


def units(spec: ModelSpec) -> dict[str, list[str]]:
    """Modules that must have the same bits, since kernels work on them as one (they read the same): their full names, by unit.

    A unit's name is that of the layer and of what it reads: model.layers.0.attention, .heads, .mlp, .inner.
    """
    found: dict[str, list[str]] = {}
    for number in range(spec.layers):
        for module in spec.layer_modules():
            prefix = f"model.layers.{number}"
            found.setdefault(f"{prefix}.{INPUTS[module.name]}", []).append(f"{prefix}.{module.name}")
    return found


def stored_bytes(N: int, K: int, grid: Grid | None, form: str) -> int:
    """Of a weight in a file of that format; 2 a value if it is kept.

    Codes, and for each group a scale and a zero point, which compressed-tensors leaves out of symmetric ones; in GPTQ's formats
    the group of each input, too.
    """
    if grid is None:
        return 2 * N * K
    groups = -(-K // grid.size(K))
    zeros = 0 if grid.symmetric and form == "compressed-tensors" else N * groups * grid.bits // 8
    return N * K * grid.bits // 8 + 2 * N * groups + zeros + (4 * K if form.startswith("gptq") else 0)
